"""Charts as SVG text; colours are the page's, so that they follow light and dark."""

import dataclasses
import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 270, 48, 12, 10, 40
NOT_CAUSAL = '(NOT CAUSAL)'  # ends the names of such runs
COLOURS, DASHES = 8, ('', '7 3', '2 3')


@dataclasses.dataclass(frozen=True)
class Series:
  """A line or a row of bars; what is not causal is grey and dashed.

  Its number is its colour, the same for a run on the whole page.
  """
  name: str
  number: int
  points: Sequence[tuple[float, float, float | None]]  # x, y, error of y
  causal: bool = True


def ticks(low: float, high: float, count: int = 5) -> list[float]:
  """Round numbers from low to high."""
  if not high > low:
    return [low]
  rough = (high - low) / count
  scale = 10.0 ** math.floor(math.log10(rough))
  step = next(s * scale for s in (1, 2, 2.5, 5, 10) if s * scale >= rough * 0.999)
  first = math.ceil(low / step - 1e-9)
  return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def colour(one: Series) -> str:
  return f'var(--c{one.number % COLOURS})' if one.causal else 'var(--grey)'


def style(one: Series) -> str:
  """Colour and dash of a line."""
  dash = DASHES[one.number // COLOURS % len(DASHES)] if one.causal else '5 4'
  return f'style="stroke:{colour(one)}"' + (f' stroke-dasharray="{dash}"' if dash else '')


def legend(series: Sequence[Series]) -> str:
  """Names beside their lines."""
  items = ''.join(
      f'<span><svg viewBox="0 0 26 8" width="26" height="8" aria-hidden="true">'
      f'<path d="M1 4H25" class="line" {style(s)}/></svg>'
      f'{escape(s.name)}</span>' for s in series)
  return f'<div class="legend">{items}</div>'


def lines(title: str, series: Sequence[Series], x_label: str, y_label: str,
          top: float | None = None, dots: bool = True) -> str:
  """Lines over numbers; '' where there is nothing to draw.

  Args:
    top: end of the y axis, which then begins at 0; None: as the data needs.
    dots: mark the points.
  """
  points = [p for s in series for p in s.points if math.isfinite(p[1])]
  if not points:
    return ''
  low_x, high_x = min(p[0] for p in points), max(p[0] for p in points)
  low_y, high_y = (0.0, top) if top else (min(p[1] for p in points),
                                          max(p[1] for p in points))
  if not top:
    margin = 0.05 * (high_y - low_y) or abs(high_y) * 0.1 or 1.0
    low_y, high_y = low_y - margin, high_y + margin
  def x(value):
    share = (value - low_x) / (high_x - low_x) if high_x > low_x else 0.5
    return LEFT + 8 + share * (WIDTH - LEFT - RIGHT - 16)

  def y(value):
    share = (min(max(value, low_y), high_y) - low_y) / (high_y - low_y)
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

  parts = []
  for tick in ticks(low_y, high_y):
    parts.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}"/>'
                 + _label(LEFT - 6, y(tick) + 4, f'{tick:g}', 'end'))
  places = sorted({p[0] for p in points})
  few = len(places) <= 8 and all(float(p).is_integer() for p in places)
  last = -math.inf
  for tick in places if few else ticks(low_x, high_x, 4):
    if x(tick) - last > 30:  # or the labels run into each other
      last = x(tick)
      parts.append(_label(last, HEIGHT - BOTTOM + 16, f'{tick:g}'))
  for one in series:
    own = [p for p in one.points if math.isfinite(p[1])]
    parts.append(f'<path class="line" {style(one)} d="'
                 + ''.join(f"{'L' if i else 'M'}{x(p[0]):.1f} {y(p[1]):.1f}"
                           for i, p in enumerate(own)) + '"/>' if own else '')
    for px, py, error in own if dots else ():
      if error:
        parts.append(f'<path class="error" style="stroke:{colour(one)}" '
                     f'd="M{x(px):.1f} {y(py - error):.1f}V{y(py + error):.1f}"/>')
      parts.append(f'<circle cx="{x(px):.1f}" cy="{y(py):.1f}" r="3.5" '
                   f'style="fill:{colour(one)}">'
                   f'<title>{escape(one.name)}: {px:g}, {py:.4g}</title></circle>')
  middle = (HEIGHT - BOTTOM + TOP) / 2
  parts.append(_label((WIDTH + LEFT) / 2, HEIGHT - 6, x_label)
               + f'<g transform="translate(12 {middle}) rotate(-90)">'
               + f'{_label(0, 0, y_label)}</g>')
  return _figure(title, HEIGHT, parts, legend(series) if len(series) > 1 else '')


def bars(title: str, series: Sequence[Series], names: Sequence[str], label: str,
         form: str = '.1f', top: float | None = None) -> str:
  """Horizontal bars, in groups of one a series; x of a point is the number of its name."""
  points = [p for s in series for p in s.points if math.isfinite(p[1])]
  if not points:
    return ''
  high, left = top or max(p[1] + (p[2] or 0) for p in points) or 1.0, 142
  thick, pad = (17, 8) if len(series) == 1 else (15, 10)
  group = thick * len(series) + pad
  height = TOP + group * len(names) + BOTTOM
  span = WIDTH - left - 78
  parts = []
  for tick in ticks(0, high, 4):
    at = left + span * tick / high
    parts.append(f'<path class="grid" d="M{at:.1f} {TOP}V{height - BOTTOM}"/>'
                 + _label(at, height - BOTTOM + 15, f'{tick:g}'))
  for number, name in enumerate(names):
    mark = ' NOT CAUSAL' if name.endswith(NOT_CAUSAL) else ''  # never cut off
    room = 19 - len(mark)
    shown = name.removesuffix(NOT_CAUSAL).strip()
    shown = (shown if len(shown) <= room else shown[:room - 1] + '…') + mark
    parts.append(f'<text x="{left - 6}" y="{TOP + group * number + (group - pad) / 2 + 4:.1f}" '
                 f'text-anchor="end">{escape(shown)}<title>{escape(name)}</title></text>')
  for number, one in enumerate(series):
    for px, py, error in one.points:
      up = TOP + group * int(px) + thick * number
      end = left + span * min(py, high) / high
      fill = 'var(--grey)' if names[int(px)].endswith(NOT_CAUSAL) else colour(one)
      said = f'{py:{form}}' + (f' ±{error:{form}}' if error else '')
      reach = end + (span * (error or 0) / high)
      parts.append(
          f'<rect x="{left}" y="{up}" width="{max(0.5, end - left):.1f}" height="{thick - 2}" '
          f'style="fill:{fill}"/>' + (
              f'<path class="whisker" d="M{left + span * max(0, py - error) / high:.1f} '
              f'{up + thick / 2 - 1}H{reach:.1f}"/>' if error else '')
          + _label(reach + 5, up + thick / 2 + 3, said, 'start'))
  parts.append(_label((left + WIDTH - 78) / 2, height - 6, label))
  return _figure(title, height, parts, legend(series) if len(series) > 1 else '')


def _label(x: float, y: float, text: str, anchor: str = 'middle') -> str:
  return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _figure(title: str, height: float, parts: Sequence[str], below: str) -> str:
  return (f'<figure><figcaption>{escape(title)}</figcaption>'
          f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
          f"{''.join(parts)}</svg>{below}</figure>")
