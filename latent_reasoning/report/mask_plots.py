"""Figures of what positions see (latent_reasoning.analysis.mask_plots). Needs no JAX."""

from typing import Any

import numpy as np

from latent_reasoning.report.style import INK, canvas, drawing, shown

KINDS = {'question': '#31688e', 'block': '#e69f00', 'readout': '#c2185b', 'behind': '#777777'}


@drawing
def mask(row: dict[str, Any]):
  """Draws which position may see which, coloured by what is seen (mask_plots.row)."""
  from matplotlib.colors import to_rgb
  allowed, tokens, parts = row['allowed'], shown(row['tokens']), row['parts']
  n = len(tokens)
  image = np.ones((n, n, 3))
  for name, start, stop in parts:
    image[:, start:stop][allowed[:, start:stop]] = to_rgb(KINDS[name.split()[0]])
  figure, axis = canvas(2.6 + 0.24 * n, 1.6 + 0.22 * n)
  axis.grid(False)
  axis.imshow(image, interpolation='nearest', aspect='auto')
  axis.set_xticks(np.arange(n + 1) - 0.5, [''] * (n + 1), minor=True)
  axis.set_yticks(np.arange(n + 1) - 0.5, [''] * (n + 1), minor=True)
  axis.grid(which='minor', color='white', linewidth=0.6)
  axis.tick_params(which='both', length=0)
  style = {'fontsize': 8, 'family': 'monospace'}
  axis.set_xticks(range(n), tokens, rotation=90, **style)
  axis.set_yticks(range(n), tokens, **style)
  axis.xaxis.tick_top()
  axis.set_ylabel('a token of the row …')
  axis.set_title('… may see', fontsize=10)
  axis.text(n - 0.2, -1.1, 'predicts', ha='left', va='center', fontsize=10, clip_on=False)
  for i, token in enumerate(shown(row['predicts'])):
    axis.text(n - 0.2, i, token and f'→ {token}', ha='left', va='center', clip_on=False,
              **style)
  for name, start, stop in parts:
    for line in (axis.axhline, axis.axvline):
      line(stop - 0.5, color=INK, linewidth=0.8)
    axis.annotate(name, ((start + stop - 1) / 2, -0.01), ha='right', va='top', rotation=40,
                  rotation_mode='anchor', fontsize=9, annotation_clip=False,
                  color=KINDS[name.split()[0]], xycoords=axis.get_xaxis_transform())
  return figure


@drawing
def leak(found: dict[str, dict[str, Any]], other: str):
  """Draws how far each prediction moves when one token becomes `other`, a panel a run
  (mask_plots.moved).

  What moves before that token depends on the future; it is drawn in red, with a note.
  """
  figure, axes = canvas(12, 1 + 1.35 * len(found), len(found), 1, sharex=True, sharey=True)
  for axis, (name, one) in zip(axes[:, 0], found.items(), strict=True):
    place, moved, tokens = one['place'], one['moved'], shown(one['tokens'])
    mark = '' if one['causal'] else ' (NOT CAUSAL)'
    color = ['#b2182b' if i < place else '#999999' for i in range(len(moved))]
    axis.bar(range(len(moved)), 100 * moved, color=color)
    axis.axvline(place - 0.5, color=INK, linewidth=1)
    axis.set_title(
        f"{name}{mark}: just before it, p({tokens[place]}) is {one['p'][0]:.3f}, and "
        f"{one['p'][1]:.3f} once {shown([other])[0]} stands there", fontsize=10, loc='left',
        color='#b2182b' if mark else INK)
    axis.set(xlim=(-0.6, len(moved) - 0.4), ylim=(0, 105))
    axis.grid(alpha=0.3, axis='y')
  axes[-1, 0].set_xticks(range(len(tokens)), tokens, fontsize=8, family='monospace')
  axes[-1, 0].set_xlabel(f'right of the line, {tokens[place]} becomes {shown([other])[0]}; a '
                         'prediction left of it that moves (red) has seen the future')
  figure.supylabel('% of a prediction that moved', fontsize=9)
  return figure
