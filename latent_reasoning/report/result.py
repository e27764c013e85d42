"""What was measured, as a dict that shows itself: a table in a notebook, and a figure."""

import html
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from latent_reasoning.report.style import Picture


class Result(dict):
  """A dict of what was found, with a text and a figure of it.

  Args:
    values: what was found.
    text: how it reads; a function, called when it is shown.
    draw: (result) -> its figure, of report.style; None: it has none.
  """

  def __init__(self, values: Mapping[str, Any], text: Callable[[], str] | None = None,
               draw: Callable[['Result'], Picture] | None = None):
    super().__init__(values)
    self._text, self._draw = text, draw

  def __repr__(self) -> str:
    return self._text() if self._text else super().__repr__()

  __str__ = __repr__

  def _repr_html_(self) -> str:
    return f'<pre>{html.escape(str(self))}</pre>'

  def to_dict(self) -> dict[str, Any]:
    """The values alone."""
    return dict(self)

  def plot(self, path: str | pathlib.Path | None = None) -> Picture:
    """Its figure, also written to a file where one is named (.png, .svg, .pdf).

    Raises:
      ValueError: it has none.
      InputError: matplotlib is missing, or the file cannot be written.
    """
    if self._draw is None:
      raise ValueError('this result has no figure; its values are in to_dict()')
    picture = self._draw(self)
    if path is not None:
      picture.save(path)
    return picture
