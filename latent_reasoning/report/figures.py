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
  return [save(pyplot, drawing, path / 'losses.png')]


def learning(path: pathlib.Path, folder: Folder) -> pathlib.Path:
  """Draws loss by step, and validation accuracy by step and block, of one run.

  Between the stages of a curriculum stands a line: their losses are of other texts.
  """
  pyplot = load_pyplot()
  drawing, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.8))
  train = [r for r in folder.metrics if r['split'] == 'train' and 'loss' in r]
  stages = sorted({r['stage'] for r in train})
  for stage in stages:
    own = [r for r in train if r['stage'] == stage]
    left.plot([r['step'] for r in own], [r['loss'] for r in own],
              label=f'stage {stage}' if len(stages) > 1 else None)
  valid = [r for r in folder.metrics if r['split'] == 'valid' and 'per_block' in r]
  steps = [r['step'] for r in valid]
  count = len(valid[-1]['per_block']) if valid else 0
  for k in range(count):
    last = k + 1 == count
    right.plot(steps, [100 * r['per_block'][k] for r in valid], marker='o', markersize=4,
               color=pyplot.get_cmap('viridis')(0.85 * (1 - (k + 1) / count)),
               linewidth=2.5 if last else 1.5,
               label='the answer' if count == 1 else f'block {k + 1}' + ' (final)' * last)
  for before, after in zip(stages, stages[1:], strict=False):
    switch = max(r['step'] for r in folder.metrics if r['stage'] == before)
    for axis in (left, right):
      axis.axvline(switch, color='black', linestyle=':', linewidth=1)
    left.annotate(f'stage {after} ', (switch, 0.97), ha='left', va='top', fontsize=8,
                  xytext=(4, 0), textcoords='offset points',
                  xycoords=left.get_xaxis_transform())
  left.set(xlabel='step', ylabel='nats a token', title='training loss')
  right.set(xlabel='step', ylabel='exact match %', ylim=(-2, 103),
            title='validation, answer read after each block' if count > 1 else 'validation')
  for axis in (left, right):
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[1]:
      axis.legend(fontsize=8)
  return save(pyplot, drawing, path / 'learning.png')


def accuracy_and_time(path: pathlib.Path, summary: dict[str, Any]) -> pathlib.Path:
  """Draws final accuracy beside the time to the answer at batch 1, a bar a run.

  Args:
    path: folder for the file.
    summary: of `comparison.summarize`, with latencies.
  """
  pyplot = load_pyplot()
  runs = {mark(n, r): r for n, r in summary['runs'].items()}
  drawing, (left, right) = pyplot.subplots(1, 2, figsize=(11, 1.4 + 0.55 * len(runs)),
                                           sharey=True)
  accuracy = [100 * r['final']['mean'] for r in runs.values()]
  errors = [100 * (r['final']['error'] or 0) for r in runs.values()]
  bars = left.barh(list(runs), accuracy, 0.6, color='#31688e',
                   xerr=errors if any(errors) else None, capsize=3)
  left.bar_label(bars, [f'{a:.1f}' for a in accuracy], padding=3)
  left.set(xlim=(0, 115), xlabel='exact match %, test problems', title='accuracy')
  for shift, key, name, color in ((-0.2, 'first_ms', 'first token of the answer', '#fdae61'),
                                  (0.2, 'full_ms', 'whole answer', '#b2182b')):
    times = [next((e[key] for e in r['latency'] if e['batch'] == 1), 0) for r in runs.values()]
    bars = right.barh([i + shift for i in range(len(runs))], times, 0.36, label=name,
                      color=color)
    right.bar_label(bars, [f'{t:.2f}' for t in times], padding=3, fontsize=8)
  right.set(xlabel='ms at batch 1, median', title='time')
  right.margins(x=0.15)
  right.legend(fontsize=8)
  left.invert_yaxis()
  return save(pyplot, drawing, path / 'accuracy_and_time.png')


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
  files.append(save(pyplot, drawing, path / 'accuracy.png'))

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
    files.append(save(pyplot, drawing, path / 'by_steps.png'))

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
  return save(pyplot, drawing, file)


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
  return save(pyplot, drawing, file)


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
    axis.set_ylabel(f'memory {number + 1}\nslot')
    axis.yaxis.get_major_locator().set_params(integer=True)
    drawing.colorbar(image, ax=axis, pad=0.01, fraction=0.03)
  axes[-1, 0].set_xticks(range(len(tokens)), shown(tokens), fontsize=7, family='monospace')
  axes[0, 0].set_title('share of each slot in what a token reads, a scale for each memory'
                       + ('' if causal else ' (NOT CAUSAL: reads the future)'))
  return save(pyplot, drawing, path / 'slots.png')


def adapters(path: pathlib.Path, grown: dict[str, dict[int, float]]) -> pathlib.Path:
  """Draws how much LoRA adds to each matrix (lora.growth)."""
  pyplot = load_pyplot()
  depth = 1 + max(layer for own in grown.values() for layer in own)
  shares = [[own.get(layer, float('nan')) for layer in range(depth)] for own in grown.values()]
  drawing, axis = pyplot.subplots(figsize=(3 + 0.6 * depth, 1.6 + 0.42 * len(grown)))
  image = axis.imshow(shares, cmap='viridis', vmin=0, aspect='auto')
  axis.set_xticks(range(depth), range(1, depth + 1))
  axis.set_yticks(range(len(grown)), list(grown))
  axis.set(xlabel='layer', title='size of what LoRA adds, as a share of the weight')
  if depth <= 16:
    top = max(max(own.values()) for own in grown.values())
    for i, own in enumerate(grown.values()):
      for layer, share in own.items():
        axis.text(layer, i, f'{share:.2f}', ha='center', va='center', fontsize=8,
                  color='black' if share > 0.6 * top else 'white')
  drawing.colorbar(image, ax=axis, pad=0.02)
  return save(pyplot, drawing, path / 'adapters.png')


def shown(tokens: Sequence[str]) -> list[str]:
  """Tokens as labels: white space spelt out, no mathematics."""
  return [repr(t)[1:-1].replace(' ', '␣') if t.isspace() else t.replace('$', r'\$')
          for t in tokens]


def save(pyplot, drawing, file: pathlib.Path) -> pathlib.Path:
  drawing.tight_layout()
  drawing.savefig(file, dpi=120)
  pyplot.close(drawing)
  return file


def load_pyplot():
  try:
    import matplotlib
  except ImportError:
    raise InputError("figures need matplotlib; pip install -e '.[report]'"
                     ) from None
  matplotlib.use('Agg')
  from matplotlib import pyplot
  return pyplot
