"""Figures as PNG, of extra `report` (matplotlib)."""

import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from latent_reasoning.errors import InputError


def figure(path: pathlib.Path, names: Sequence[str],
           seeds: Sequence[int]) -> pathlib.Path | None:
  """Draws train and validation loss by step, mean over seeds; None without matplotlib.

  What reads the future is dashed, grey and says so.
  """
  try:
    pyplot = _pyplot()
  except InputError:
    return None
  drawing, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, sharex=True)
  for name in names:
    curves, causal = {'train': {}, 'valid': {}}, True
    for seed in seeds:
      file = path / f'{name}-{seed}' / 'metrics.jsonl'
      for line in file.read_text(encoding='utf-8').splitlines() if file.exists() else ():
        record = json.loads(line)
        causal &= record.get('causal', True)
        curves[record['split']].setdefault(record['step'], []).append(record['loss'])
    for axis, split in zip(axes, ('train', 'valid'), strict=True):
      steps = sorted(curves[split])
      style = {} if causal else {'linestyle': '--', 'color': 'grey', 'linewidth': 2.5}
      axis.plot(steps, [statistics.mean(curves[split][s]) for s in steps],
                label=name + ('' if causal else ' (NOT CAUSAL: reads the future)'),
                marker='o' if split == 'valid' else '', markersize=3, **style)
  for axis, title in zip(axes, ('training loss', 'validation loss, whole split'), strict=True):
    axis.set(xlabel='step', title=title)
    axis.grid(alpha=0.3)
  axes[0].set_ylabel('nats a token')
  axes[1].legend(fontsize=8)
  drawing.tight_layout()
  file = path / 'losses.png'
  drawing.savefig(file, dpi=120)
  pyplot.close(drawing)
  return file


def slots(path: pathlib.Path, tokens: Sequence[str], maps: Any,
          causal: bool) -> pathlib.Path:
  """Draws attention over slots: a panel a layer, a column a token.

  Args:
    path: folder for slots.png.
    tokens: T of them, as text.
    maps: [layers, T, N] shares.
    causal: whether the reads are of the past alone.
  """
  pyplot = _pyplot()
  width = min(24, max(6, 0.16 * len(tokens) + 1.5))
  drawing, axes = pyplot.subplots(len(maps), 1, figsize=(width, 1.3 + 1.6 * len(maps)),
                                  squeeze=False, sharex=True)
  for number, (axis, one) in enumerate(zip(axes[:, 0], maps, strict=True)):
    image = axis.imshow(one.T, aspect='auto', cmap='magma', vmin=0, interpolation='nearest')
    axis.set_ylabel(f'memory {number}\nslot')
    axis.yaxis.get_major_locator().set_params(integer=True)
    drawing.colorbar(image, ax=axis, pad=0.01)
  shown = [repr(t)[1:-1] if t.isspace() else t.replace('$', r'\$') for t in tokens]
  axes[-1, 0].set_xticks(range(len(tokens)), shown, fontsize=7, family='monospace')
  axes[0, 0].set_title('share of each slot in what a token reads'
                       + ('' if causal else ' (NOT CAUSAL: reads the future)'))
  drawing.tight_layout()
  file = path / 'slots.png'
  drawing.savefig(file, dpi=120)
  pyplot.close(drawing)
  return file


def _pyplot():
  try:
    import matplotlib
  except ImportError:
    raise InputError("figures need matplotlib; pip install 'latent_reasoning[report]'"
                     ) from None
  matplotlib.use('Agg')
  from matplotlib import pyplot
  return pyplot
