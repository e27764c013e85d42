"""Test-time scaling as a table, in words and as a figure (eval.scaling)."""

from collections.abc import Mapping, Sequence
from typing import Any

from latent_reasoning.report.style import COLOURS, INK, canvas, drawing, legend
from latent_reasoning.report.tables import percent, table

NAMES = {'loops': 'loops of the layers', 'passes': 'passes', 'latents': 'continuous thoughts',
         'blocks': 'blocks'}


def rows(axis: str, one: Mapping[str, Any]) -> list[list[str]]:
  """Accuracy by number, a column each; of problems of several lengths, by length too."""
  curve = one['curve']
  found = [[f'{NAMES[axis]} when asked', *(
      f"{p['count']}" + ' (trained)' * (p['count'] == one['trained']) for p in curve)],
           ['exact match %', *(percent(p['final'], p['standard_error'], p['n'])
                               for p in curve)]]
  steps = sorted({s for p in curve for s in p['by_steps']}, key=float)
  if len(steps) > 1:
    found += [[f'{s} steps', *(percent(p['by_steps'].get(s, {}).get('final')) for p in curve)]
              for s in steps]
  return found


def text(axes: Mapping[str, Any]) -> str:
  """A table an axis, and what it says."""
  found = []
  for axis, one in axes.items():
    found.append(table(rows(axis, one)))
    best = max(one['curve'], key=lambda p: p['final'])
    asked = next((p for p in one['curve'] if p['count'] == one['trained']), None)
    words = f"{NAMES[axis][0].upper()}{NAMES[axis][1:]}: trained with {one['trained']}"
    words += f", where {percent(asked['final'])}% are right" if asked else ''
    if best is not asked:
      words += f"; best with {best['count']}, {percent(best['final'])}%"
    if early := one.get('until_agree'):
      words += (f". Read until two readouts in a row agree, {early['readouts']:.2f} of "
                f"{early['of']} are read and {percent(early['final'])}% are right")
    found.append(f'{words}.')
  return '\n\n'.join(found)


@drawing
def figure(axes: Mapping[str, Any], method: str):
  """Accuracy by number, a panel an axis; thin lines: problems of each number of steps."""
  drawn, panels = canvas(0.5 + 5.2 * len(axes), 3.9, 1, len(axes), sharey=True)
  for panel, (axis, one) in zip(panels[0], axes.items(), strict=True):
    curve = one['curve']
    x = [p['count'] for p in curve]
    steps = sorted({s for p in curve for s in p['by_steps']}, key=float)
    for k, s in enumerate(steps if len(steps) > 1 else ()):
      panel.plot(x, [100 * p['by_steps'][s]['final'] for p in curve], linewidth=0.9,
                 color=_shade(k, steps), label=f'{s} steps')
    panel.errorbar(x, [100 * p['final'] for p in curve],
                   [100 * p['standard_error'] for p in curve], marker='o', linewidth=2.4,
                   color=COLOURS.get(method, INK), label='all problems')
    panel.axvline(one['trained'], color=INK, linestyle=':', linewidth=1)
    panel.set(xlabel=f'{NAMES[axis]} when asked (dotted: as trained)', ylim=(-2, 103))
    panel.xaxis.get_major_locator().set_params(integer=True)
  panels[0][0].set_ylabel('exact match %')
  legend(drawn, panels[0][-1])
  return drawn


def _shade(k: int, of: Sequence[str]):
  from matplotlib import colormaps
  return colormaps['viridis'](0.9 * (1 - k / len(of)))
