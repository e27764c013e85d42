"""Figures as PNG, of extra `report` (matplotlib)."""

import pathlib
from collections.abc import Sequence
from typing import Any

from latent_reasoning.errors import InputError
from latent_reasoning.report.comparison import mark, varied
from latent_reasoning.report.runs import Folder, curve


def figure(path: pathlib.Path, groups: dict[str, Sequence[Folder]]) -> list[pathlib.Path]:
  """Draws train and validation loss by step, mean over seeds; [] without matplotlib.

  What reads the future is dashed, grey and says so.
  """
  try:
    pyplot = load_pyplot()
  except InputError:
    return []
  drawing, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, sharex=True)
  for name, folders in groups.items():
    causal = all(f.causal for f in folders)
    for axis, split in zip(axes, ('train', 'valid'), strict=True):
      points = curve(folders, split, 'loss')
      style = {} if causal else {'linestyle': '--', 'color': 'grey', 'linewidth': 2.5}
      axis.plot([p[0] for p in points], [p[1] for p in points],
                label=name + ('' if causal else ' (NOT CAUSAL: reads the future)'),
                marker='o' if split == 'valid' else '', markersize=3, **style)
  for axis, title in zip(axes, ('training loss', 'validation loss, whole split'), strict=True):
    axis.set(xlabel='step', title=title)
    axis.grid(alpha=0.3)
  axes[0].set_ylabel('nats a token')
  axes[1].legend(fontsize=8)
  return [_save(pyplot, drawing, path / 'losses.png')]


def comparison_figures(path: pathlib.Path, summary: dict[str, Any]) -> list[pathlib.Path]:
  """Draws accuracy by run, by number of steps, and against latency and parameters,
  each where there is something to draw; [] without matplotlib.

  Args:
    path: folder for the files.
    summary: of `comparison.summarize`.
  """
  try:
    pyplot = load_pyplot()
  except InputError:
    return []
  runs = {mark(name, run): run for name, run in summary['runs'].items()}
  files = []

  drawing, axis = pyplot.subplots(figsize=(7, 1 + 0.35 * len(runs)))
  axis.barh(list(runs), [100 * r['final']['mean'] for r in runs.values()],
            xerr=[100 * (r['final']['error'] or 0) for r in runs.values()], capsize=3)
  axis.set(xlabel='final accuracy %, mean and standard error over seeds', xlim=(0, 100))
  axis.invert_yaxis()
  axis.grid(alpha=0.3, axis='x')
  files.append(_save(pyplot, drawing, path / 'accuracy.png'))

  if found := varied(summary):
    files.append(_varied(pyplot, path / 'varied.png', summary['runs'], *found))
  elif len({s for r in runs.values() for s in r['by_steps']}) > 1:
    drawing, axis = pyplot.subplots(figsize=(7, 4.2))
    for number, (name, run) in enumerate(runs.items()):
      axis.errorbar([float(s) for s in run['by_steps']],
                    [100 * v['mean'] for v in run['by_steps'].values()],
                    [100 * (v['error'] or 0) for v in run['by_steps'].values()], label=name,
                    marker='osv^D<>P'[number % 8], capsize=3,
                    linestyle=('-', '--', ':')[number // 8 % 3])
    axis.set(xlabel='steps of a problem', ylabel='final accuracy %', ylim=(0, 103))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5))
    files.append(_save(pyplot, drawing, path / 'by_steps.png'))

  timed = {n: next(e['full_ms'] for e in r['latency'] if e['batch'] == 1)
           for n, r in runs.items() if any(e['batch'] == 1 for e in r['latency'])}
  if timed:
    files.append(_against(pyplot, path / 'by_latency.png', runs, timed,
                          'full answer ms, batch 1'))
  sizes = {n: r['parameters'] for n, r in runs.items() if r['parameters']}
  if len(set(sizes.values())) > 2:
    files.append(_against(pyplot, path / 'by_parameters.png', runs, sizes, 'parameters'))
  return files


def _varied(pyplot, file: pathlib.Path, runs, label: str,
            lines: dict[str, list[tuple[float, str]]]) -> pathlib.Path:
  """Accuracy by what was varied, a line a method."""
  drawing, axis = pyplot.subplots(figsize=(7, 4.2))
  for number, (method, points) in enumerate(lines.items()):
    final = [runs[name]['final'] for _, name in points]
    axis.errorbar([x for x, _ in points], [100 * f['mean'] for f in final],
                  [100 * (f['error'] or 0) for f in final], label=method, capsize=3,
                  marker='osv^D<>P'[number % 8])
  values = sorted({x for points in lines.values() for x, _ in points})
  if label == 'parameters':
    axis.set_xscale('log')
  else:
    axis.set_xticks(values)
  axis.set(xlabel=label, ylabel='final accuracy %', ylim=(0, 103))
  axis.grid(alpha=0.3)
  axis.legend(fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5))
  return _save(pyplot, drawing, file)


def _against(pyplot, file: pathlib.Path, runs, x: dict[str, float],
             label: str) -> pathlib.Path:
  """Accuracy against a cost, a point a run."""
  drawing, axis = pyplot.subplots(figsize=(7, 4.2))
  for name, value in x.items():
    final = runs[name]['final']
    axis.errorbar(value, 100 * final['mean'], 100 * (final['error'] or 0), marker='o',
                  capsize=3)
    axis.annotate(name, (value, 100 * final['mean']), xytext=(6, 4),
                  textcoords='offset points', fontsize=8)
  axis.set(xlabel=label, ylabel='final accuracy %', ylim=(0, 106))
  if max(x.values()) > 20 * min(x.values()):
    axis.set_xscale('log')
  axis.margins(x=0.18)
  axis.grid(alpha=0.3, which='both')
  return _save(pyplot, drawing, file)


def slots(path: pathlib.Path, tokens: Sequence[str], maps: Any,
          causal: bool) -> pathlib.Path:
  """Draws attention over slots: a panel a layer, a column a token.

  Args:
    path: folder for slots.png.
    tokens: T of them, as text.
    maps: [layers, T, N] shares.
    causal: whether the reads are of the past alone.
  """
  pyplot = load_pyplot()
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
  return _save(pyplot, drawing, path / 'slots.png')


def _save(pyplot, drawing, file: pathlib.Path) -> pathlib.Path:
  drawing.tight_layout()
  drawing.savefig(file, dpi=120)
  pyplot.close(drawing)
  return file


def load_pyplot():
  try:
    import matplotlib
  except ImportError:
    raise InputError("figures need matplotlib; pip install 'latent_reasoning[report]'"
                     ) from None
  matplotlib.use('Agg')
  from matplotlib import pyplot
  return pyplot
