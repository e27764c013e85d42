"""What was measured, as a dict that shows itself: a table in a notebook, and a figure."""

import html
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any


class Picture:
  """A figure as PNG; a notebook shows it."""

  def __init__(self, data: bytes):
    self.data = data

  def _repr_png_(self) -> bytes:
    return self.data

  def save(self, path: str | pathlib.Path) -> pathlib.Path:
    """Writes it to a file."""
    path = pathlib.Path(path)
    path.write_bytes(self.data)
    return path


class Result(dict):
  """A dict of what was found, with a text and a figure of it.

  Args:
    values: what was found.
    text: how it reads; a function, called when it is shown.
    draw: (folder, result) -> the file of its figure; None: it has none.
  """

  def __init__(self, values: Mapping[str, Any], text: Callable[[], str] | None = None,
               draw: Callable[[pathlib.Path, 'Result'], pathlib.Path] | None = None):
    super().__init__(values)
    self._text, self._draw = text, draw

  def __str__(self) -> str:
    return self._text() if self._text else super().__repr__()

  def _repr_html_(self) -> str:
    return f'<pre>{html.escape(str(self))}</pre>'

  def to_dict(self) -> dict[str, Any]:
    """The values alone."""
    return dict(self)

  def plot(self) -> Picture:
    """Its figure; ValueError where there is none, InputError without matplotlib."""
    if self._draw is None:
      raise ValueError('this result has no figure; its values are in to_dict()')
    with tempfile.TemporaryDirectory() as folder:
      return Picture(pathlib.Path(self._draw(pathlib.Path(folder), self)).read_bytes())
