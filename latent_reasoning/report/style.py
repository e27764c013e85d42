"""How charts look: one style for pages, files and notebooks, and one colour a method.

A function that draws is decorated with `drawing` and returns a `Picture`: PNG in notebooks and
files, SVG on pages, where text and axes follow the page's light or dark colours.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from latent_reasoning.errors import InputError

INK = '#1b1e23'  # of text and axes; the page puts its own colour in its place
GREY = '#8a9099'
COLOURS = {
    'rim': '#1f7fd6', 'direct': '#b8860b', 'cot': '#d9541e', 'direct_steps': '#8c6a4f',
    'pause': '#8a5fd1', 'pause_steps': '#b58be0', 'icot': '#cc4b94', 'coconut': '#0f9d78',
    'codi': '#5cb85c', 'pccot': '#2f9e9e', 'lotus': '#c9a227', 'rim_parallel': '#7fb8ec'}
CYCLE = (*COLOURS.values(), '#3fb4d8', '#e08f3c', '#6b7fd7')
MARKERS = 'osv^D<>PX*hd'
SPARE = (*CYCLE[len(COLOURS):], *CYCLE[:len(COLOURS)])  # for runs that no method's name colours


def require() -> None:
  """Raises InputError where the libraries of figures and pages are missing."""
  with style():
    pass
  try:
    import jinja2  # noqa: F401
  except ImportError:
    raise InputError("pages need jinja2; pip install -e '.[report]'") from None


class Picture:
  """A figure; a notebook shows it as PNG.

  Attributes:
    figure: of matplotlib.
  """

  def __init__(self, figure: Any):
    self.figure = figure

  def save(self, path: str | pathlib.Path) -> pathlib.Path:
    """Writes it to a file, whose name says the format: .png, .svg, .pdf."""
    try:
      with style():
        self.figure.savefig(path, facecolor='white')
    except (OSError, ValueError) as error:
      raise InputError(f'cannot write a figure to {path}: {error}; expected a file such as '
                       'figure.png in a folder that is there') from None
    return pathlib.Path(path)

  def __repr__(self) -> str:
    return "a figure, which .save('FILE.png') writes and a notebook shows"

  def _repr_png_(self) -> bytes:
    data = io.BytesIO()
    with style():
      self.figure.savefig(data, format='png', facecolor='white')
    return data.getvalue()

  def svg(self) -> str:
    """An element of HTML, in the colours of the page around it."""
    text = io.StringIO()
    with style():
      self.figure.savefig(text, format='svg', transparent=True,
                          metadata=dict.fromkeys(('Date', 'Creator', 'Format', 'Type')))
    found = text.getvalue()
    found = found[found.index('<svg'):]
    found = re.sub(r'<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->', '', found,
                   flags=re.DOTALL)
    # One page holds many: no name of a part twice, and as wide as there is room.
    found = re.sub(r' id="[A-Za-z0-9.]+_\d+"| xmlns(:\w+)?="[^"]*"', '', found)
    found = re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1>', found)
    return found.replace(INK, 'currentColor')


@dataclasses.dataclass(frozen=True)
class Chart:
  """A figure of a page: the name of its file, and a caption that says what it shows."""
  name: str
  caption: str
  picture: Picture | bytes  # PNG


@contextlib.contextmanager
def style():
  """The style, while something is drawn or written.

  Raises:
    InputError: matplotlib is missing.
  """
  try:
    import matplotlib
  except ImportError:
    raise InputError("figures need matplotlib; pip install -e '.[report]'") from None
  with matplotlib.rc_context({
      'text.color': INK, 'axes.labelcolor': INK, 'axes.edgecolor': INK, 'xtick.color': INK,
      'ytick.color': INK, 'axes.titlecolor': INK, 'legend.labelcolor': INK,
      'text.parse_math': False, 'axes.unicode_minus': False, 'font.size': 10,
      'axes.titlesize': 10, 'axes.labelsize': 10, 'legend.fontsize': 9, 'xtick.labelsize': 9,
      'ytick.labelsize': 9, 'axes.spines.top': False, 'axes.spines.right': False,
      'axes.grid': True, 'grid.color': GREY, 'grid.alpha': 0.3, 'grid.linewidth': 0.6,
      'axes.axisbelow': True, 'legend.frameon': False, 'lines.linewidth': 1.8,
      'lines.markersize': 4.5, 'errorbar.capsize': 3, 'image.cmap': 'viridis',
      'svg.fonttype': 'none', 'svg.hashsalt': 'latent_reasoning', 'savefig.dpi': 120}):
    yield


def drawing(draw: Callable[..., Any]) -> Callable[..., Any]:
  """Makes a function that returns a figure do so in the style, as a `Picture`."""
  @functools.wraps(draw)
  def styled(*args, **kwargs) -> Picture:
    with style():
      return Picture(draw(*args, **kwargs))
  return styled


def canvas(width: float, height: float, rows: int = 0, columns: int = 0,
           **kwargs: Any) -> tuple[Any, Any]:
  """A figure of some inches, and its axes: an array [rows, columns], or one without them."""
  from matplotlib.figure import Figure  # without pyplot: nothing global, nothing to close
  figure = Figure(figsize=(width, height), layout='constrained')
  axes = figure.subplots(max(1, rows), max(1, columns), squeeze=False, **kwargs)
  return figure, axes if rows else axes[0, 0]


def legend(figure: Any, axis: Any) -> None:
  """The names of what an axis shows, outside of it: where nothing lies under them."""
  lines, names = axis.get_legend_handles_labels()
  if len(names) > 1:
    fit = int(9.5 * figure.get_figwidth() / (6 + max(map(len, names))))
    figure.legend(lines, names, loc='outside lower center', ncols=min(4, max(1, fit)))


def spread(figure: Any, axis: Any, texts: Sequence[tuple[float, float, str, str]]) -> None:
  """Names beside points, moved apart where they would lie on each other.

  Args:
    texts: (x, y, name, colour) of each point, in the data of the axis.
  """
  figure.draw_without_rendering()  # so that the axis knows where its data are
  points = [(*axis.transData.transform((x, y)), name, colour, x, y)
            for x, y, name, colour in texts]
  line, taken = 14 * figure.dpi / 72, []
  for px, py, name, colour, x, y in sorted(points, key=lambda p: (-p[1], p[0])):
    width = (0.62 * 9 * len(name) + 8) * figure.dpi / 72
    left = px + width > axis.bbox.x1 + 20 and px - width > axis.bbox.x0
    start, at = px - width if left else px, py
    while any(abs(at - other) < line and start < b and a < start + width
              for other, a, b in taken):
      at -= line
    taken.append((at, start, start + width))
    axis.annotate(name, (x, y), xytext=((-7 if left else 7), (at - py) * 72 / figure.dpi),
                  textcoords='offset points', fontsize=9, color=colour, va='center',
                  ha='right' if left else 'left')


def plain_log(axis: Any) -> None:
  """Numbers of a logarithmic axis, written out."""
  from matplotlib.ticker import FuncFormatter, NullFormatter
  axis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:,.6g}'))
  axis.set_minor_formatter(NullFormatter())


def colours(methods: dict[str, str]) -> dict[str, str]:
  """A colour a run: its method's where no other run has that method, else one by order.

  Args:
    methods: {run: method}.
  """
  names = list(methods.values())
  own = {run: COLOURS[method] for run, method in methods.items()
         if method in COLOURS and names.count(method) == 1}
  spare = itertools.cycle([colour for colour in SPARE if colour not in own.values()])
  return {run: own.get(run) or next(spare) for run in methods}


def shown(tokens: Iterable[str]) -> list[str]:
  """Tokens as labels: white space spelt out."""
  return [repr(t)[1:-1].replace(' ', '␣') if t.isspace() else t for t in tokens]


def finite(points: Iterable[tuple[float, ...]]) -> list[tuple[float, ...]]:
  """Those of which every number is one, and small enough to draw."""
  return [p for p in points if all(v is None or math.isfinite(v) and abs(v) < 1e30 for v in p)]
