"""Figures of runs and of their comparison. What is not causal is dashed, grey and says so."""

import pathlib
from collections.abc import Sequence
from typing import Any

from latent_reasoning.report import scaling
from latent_reasoning.report.comparison import mark, varied
from latent_reasoning.report.runs import Folder, curve
from latent_reasoning.report.style import (
  GREY,
  INK,
  MARKERS,
  Chart,
  canvas,
  colours,
  drawing,
  finite,
  legend,
  plain_log,
  shown,
  spread,
)

BOUNDS = ('direct', 'cot')  # methods that others are read against
WIDE = (7.6, 4.2)  # inches of a chart of lines


def write(path: pathlib.Path, charts: Sequence[Chart]) -> list[pathlib.Path]:
  """Charts as PNG files in a folder."""
  return [chart.picture.save(path / f'{chart.name}.png') for chart in charts]


# --- curves of training -----------------------------------------------------------


def curves(groups: dict[str, Sequence[Folder]]) -> list[Chart]:
  """Training loss, validation loss and validation accuracy by step, where they were logged."""
  seeds = max((len(folders) for folders in groups.values()), default=0)
  mean = f', mean of {seeds} seeds' * (seeds > 1)
  charts = []
  for name, split, value, label, caption in (
      ('training_loss', 'train', 'loss', 'nats a token', 'Training loss by step'),
      ('validation_loss', 'valid', 'loss', 'nats a token', 'Validation loss by step'),
      ('validation_accuracy', 'valid', 'final', 'exact match %',
       'Accuracy on validation problems by step')):
    scale = 100 if value == 'final' else 1
    lines = {run: finite((step, scale * found) for step, found in curve(folders, split, value))
             for run, folders in groups.items()}
    if any(len(points) > 1 for points in lines.values()):
      switches = _switches(groups)
      caption += mean + '; dotted: stage 2 begins' * bool(switches) + '.'
      charts.append(Chart(name, caption, _curves(groups, lines, label, split == 'valid',
                                                 switches)))
  return charts


@drawing
def _curves(groups, lines, label, dots, switches):
  figure, axis = canvas(*WIDE)
  colour = colours({name: _method(folders) for name, folders in groups.items()})
  for name, points in lines.items():
    causal = all(folder.causal for folder in groups[name])
    axis.plot([p[0] for p in points], [p[1] for p in points], marker='o' if dots else '',
              markersize=3, linewidth=1.4, color=colour[name] if causal else GREY,
              linestyle='-' if causal else '--',
              label=name if causal else f'{name} (NOT CAUSAL)')
  _stage_begins(axis, switches)
  axis.set(xlabel='training step', ylabel=label)
  axis.xaxis.get_major_locator().set_params(integer=True)
  if label.endswith('%'):
    axis.set_ylim(-2, 103)
  legend(figure, axis)
  return figure


def _stage_begins(axis, steps: Sequence[int], stage: int = 2) -> None:
  """Marks where a stage of training begins: by a dotted line, and its name at the first."""
  for i, step in enumerate(steps):
    axis.axvline(step, color=INK, linestyle=':', linewidth=1.2)
    if not i:
      axis.annotate(f'stage {stage}', (step, 0.97), ha='left', va='top', fontsize=9,
                    xytext=(4, 0), textcoords='offset points',
                    xycoords=axis.get_xaxis_transform())


def _method(folders: Sequence[Folder]) -> str:
  return next((f.results.get('method') or f.config.get('method') or '' for f in folders), '')


def _switches(groups: dict[str, Sequence[Folder]]) -> list[int]:
  """The steps at which some run goes over to its second stage, at most three of them."""
  found = set()
  for folders in groups.values():
    for folder in folders:
      first = [r['step'] for r in folder.metrics if r.get('stage') == 1]
      if first and any(r.get('stage') == 2 for r in folder.metrics):
        found.add(max(first))
  return sorted(found) if len(found) <= 3 else []


@drawing
def learning(folder: Folder):
  """Loss by step, and validation accuracy by step and block, of one run.

  Between the stages of a curriculum stands a line: their losses are of other texts.
  """
  figure, ((left, right),) = canvas(10.5, 3.8, 1, 2)
  train = [r for r in folder.metrics if r['split'] == 'train' and 'loss' in r]
  stages = sorted({r['stage'] for r in train})
  for stage in stages:
    own = [r for r in train if r['stage'] == stage]
    left.plot([r['step'] for r in own], [r['loss'] for r in own],
              marker='' if len(own) > 1 else 'o')  # one point makes no line
  valid = [r for r in folder.metrics if r['split'] == 'valid' and 'per_block' in r]
  steps = [r['step'] for r in valid]
  count = len(valid[-1]['per_block']) if valid else 0
  for k in range(count):
    last = k + 1 == count
    right.plot(steps, [100 * r['per_block'][k] for r in valid], marker='o', markersize=3.5,
               color=_block_colour(k, count), linewidth=2.5 if last else 1.5,
               label='the answer' if count == 1 else f'block {k + 1}' + ' (final)' * last)
  for before, after in zip(stages, stages[1:], strict=False):
    switch = max(r['step'] for r in folder.metrics if r['stage'] == before)
    for axis in (left, right):
      _stage_begins(axis, [switch], after)
  left.set(xlabel='training step', ylabel='nats a token', title='training loss')
  right.set(xlabel='training step', ylabel='exact match %', ylim=(-2, 103),
            title='validation, answer read after each block' if count > 1 else 'validation')
  for axis in (left, right):
    axis.xaxis.get_major_locator().set_params(integer=True)
  legend(figure, right)
  return figure


def _block_colour(k: int, count: int):
  from matplotlib import colormaps
  return colormaps['viridis'](0.85 * (1 - (k + 1) / count))


# --- a comparison -----------------------------------------------------------------


def comparison(summary: dict[str, Any]) -> list[Chart]:
  """What the runs of a comparison differ in, a chart for each cost there is.

  Args:
    summary: of `comparison.summarize`.
  """
  runs = {mark(name, run): run for name, run in summary['runs'].items()}
  if not runs:
    return []
  charts, bars = [], _errors(runs)
  timed = {name: next(e for e in run['latency'] if e['batch'] == 1)
           for name, run in runs.items() if any(e['batch'] == 1 for e in run['latency'])}
  if len(runs) > 1 and not timed:
    charts.append(Chart('accuracy', f'Exact match on the test problems{bars}.',
                        _bars(runs, summary['control'])))
  if timed:
    charts.append(Chart(
        'by_latency', 'Accuracy against the time to the full answer, each model alone at batch '
        f'1, a median; better is up and to the left{bars}.',
        _against(runs, {n: e['full_ms'] for n, e in timed.items()}, 'full answer, ms')))
    charts.append(Chart(
        'latency', 'Time at batch 1, median, to the first token of the answer and to the full '
        'answer; what a method does before it answers lies before the first.', _times(timed)))
  if found := varied(summary):
    charts.append(Chart('varied', f'Accuracy by {found[0]}, a line a method{bars}.',
                        _varied(summary['runs'], *found)))
  if any(len(run['by_steps']) > 1 for run in runs.values()):
    charts.append(Chart(
        'by_steps', f'Accuracy by the number of steps that a problem takes{bars}.',
        _lines(runs, {name: [(float(s), v) for s, v in run['by_steps'].items()]
                      for name, run in runs.items()}, 'steps of a problem')))
  blocks = {name: list(enumerate(run['per_block'], 1)) for name, run in runs.items()
            if len(run['per_block']) > 1}
  if blocks:
    charts.append(Chart(
        'by_block', f'Accuracy of the answer that is read after each block{bars}. The last one '
        'is the answer' + _bounds(runs) + '.', _lines(runs, blocks, 'block', bounds=True)))
  for axis in sorted({axis for run in runs.values() for axis in run['scaling']}):
    curves = {name: run['scaling'][axis]['curve'] for name, run in runs.items()
              if axis in run['scaling']}
    charts.append(Chart(
        f'by_{axis}', f'Accuracy by {scaling.NAMES[axis]} when asked{bars}. Trained with '
        + ', '.join(f"{runs[name]['scaling'][axis]['trained']} ({name})" for name in curves)
        + '.', _lines(runs, curves, f'{scaling.NAMES[axis]} when asked')))
  depths = {n: r['serial_layers'] for n, r in runs.items() if r['serial_layers']}
  if len(set(depths.values())) > 2:
    charts.append(Chart(
        'by_serial_layers', 'Accuracy against the layers that follow one another before the '
        f"answer's first token, a chain of thought's tokens included{bars}.",
        _against(runs, depths, 'serial layers')))
  sizes = {n: r['parameters'] for n, r in runs.items() if r['parameters']}
  if len(set(sizes.values())) > 2:
    charts.append(Chart('by_parameters', f'Accuracy against the size of the model{bars}.',
                        _against(runs, sizes, 'parameters')))
  return charts


def _bounds(runs: dict[str, Any]) -> str:
  """Says which lines of `_lines` are other methods, to be compared with."""
  named = [name for name, run in runs.items() if run['method'] in BOUNDS]
  return f"; dotted: the answers of {' and '.join(named)}" if named else ''


def _errors(runs: dict[str, Any]) -> str:
  """What the bars of a caption are."""
  seeds = max(len(run['seeds']) for run in runs.values())
  return f'; mean and standard error of {seeds} seeds' if seeds > 1 else '; one seed'


def _colours(runs: dict[str, Any]) -> dict[str, str]:
  found = colours({name: run['method'] for name, run in runs.items()})
  return {name: colour if runs[name]['causal'] else GREY for name, colour in found.items()}


def _percent(value: dict[str, float]) -> tuple[float, float]:
  return 100 * value['mean'], 100 * (value['error'] or 0)


@drawing
def _bars(runs, control):
  figure, axis = canvas(7.6, 0.9 + 0.36 * len(runs))
  _accuracy_bars(axis, runs)
  if control in runs:
    axis.axvline(100 * runs[control]['final']['mean'], color=GREY, linestyle=':', linewidth=1)
  return figure


def _accuracy_bars(axis, runs) -> None:
  """A bar a run, the first on top, with its number and its standard error."""
  values = [_percent(run['final']) for run in runs.values()]
  errors = [error for _, error in values]
  bars = axis.barh(list(runs), [mean for mean, _ in values], 0.62,
                   color=list(_colours(runs).values()), xerr=errors if any(errors) else None,
                   ecolor=GREY)
  axis.bar_label(bars, [f'{mean:.1f}' + f' ±{error:.1f}' * bool(error)
                        for mean, error in values], padding=4, fontsize=9)
  axis.set(xlabel='exact match %, test problems', xlim=(0, 115))
  axis.grid(False, axis='y')
  axis.invert_yaxis()


@drawing
def _times(timed):
  figure, axis = canvas(7.6, 1.3 + 0.52 * len(timed))
  _time_bars(axis, timed.values())
  axis.set_yticks(range(len(timed)), list(timed))
  axis.invert_yaxis()
  legend(figure, axis)
  return figure


def _time_bars(axis, entries) -> None:
  """Two bars a run: to the first token of its answer, and to the full answer."""
  for shift, key, name, colour in ((-0.19, 'first_ms', 'first token of the answer', '#7fb2e5'),
                                   (0.19, 'full_ms', 'full answer', '#1f7fd6')):
    values = [entry[key] for entry in entries]
    bars = axis.barh([i + shift for i in range(len(values))], values, 0.36, label=name,
                     color=colour)
    axis.bar_label(bars, [f'{v:.2f}' for v in values], padding=3, fontsize=9)
  axis.set(xlabel='ms at batch 1, median')
  axis.margins(x=0.15)
  axis.grid(False, axis='y')


@drawing
def _lines(runs, points, label, bounds=False):
  """A line a run through (x, mean and error); with bounds, answers alone as levels."""
  figure, axis = canvas(*WIDE)
  colour = _colours(runs)
  for number, (name, own) in enumerate(points.items()):
    own = finite((x, *_percent(value)) for x, value in own)
    errors = [p[2] for p in own]
    axis.errorbar([p[0] for p in own], [p[1] for p in own], errors if any(errors) else None,
                  label=name, color=colour[name], marker=MARKERS[number % len(MARKERS)],
                  linestyle='-' if runs[name]['causal'] else '--')
  for name, run in runs.items() if bounds else ():
    if run['method'] in BOUNDS:
      axis.axhline(100 * run['final']['mean'], color=colour[name], linestyle=':', label=name)
  axis.set(xlabel=label, ylabel='exact match %', ylim=(-2, 103))
  axis.xaxis.get_major_locator().set_params(integer=True)
  legend(figure, axis)
  return figure


@drawing
def _varied(runs, label, lines):
  """Accuracy by what was varied, a line a method."""
  figure, axis = canvas(*WIDE)
  colour = colours({method: runs[points[0][1]]['method'] for method, points in lines.items()})
  for number, (method, points) in enumerate(lines.items()):
    own = [(x, *_percent(runs[name]['final'])) for x, name in points]
    axis.errorbar([p[0] for p in own], [p[1] for p in own], [p[2] for p in own], label=method,
                  color=colour[method], marker=MARKERS[number % len(MARKERS)])
  if label == 'parameters':
    axis.set_xscale('log')
    plain_log(axis.xaxis)
  else:
    axis.set_xticks(sorted({x for points in lines.values() for x, _ in points}))
  axis.set(xlabel=label, ylabel='exact match %', ylim=(-2, 103))
  legend(figure, axis)
  return figure


@drawing
def _against(runs, x, label):
  """Accuracy against a cost, a named point a run."""
  figure, axis = canvas(*WIDE)
  colour, texts = _colours(runs), []
  for number, (name, value) in enumerate(x.items()):
    mean, error = _percent(runs[name]['final'])
    axis.errorbar(value, mean, error or None, color=colour[name], markersize=7,
                  marker=MARKERS[number % len(MARKERS)])
    texts.append((value, mean, name, colour[name]))
  axis.set(xlabel=label, ylabel='exact match %', ylim=(-4, 106))
  if max(x.values()) > 20 * min(x.values()) > 0:
    axis.set_xscale('log')
    plain_log(axis.xaxis)
  axis.margins(x=0.12)
  spread(figure, axis, texts)
  return figure


@drawing
def accuracy_and_time(summary: dict[str, Any]):
  """Accuracy beside the time to the answer at batch 1, a bar a run.

  Args:
    summary: of `comparison.summarize`, with latencies.
  """
  runs = {mark(n, r): r for n, r in summary['runs'].items()}
  figure, ((left, right),) = canvas(10.5, 1.5 + 0.55 * len(runs), 1, 2, sharey=True)
  _accuracy_bars(left, runs)
  _time_bars(right, [next(e for e in r['latency'] if e['batch'] == 1) for r in runs.values()])
  left.set_title('accuracy')
  right.set_title('time')
  legend(figure, right)
  return figure


# --- a model ----------------------------------------------------------------------


@drawing
def slots(tokens: Sequence[str], maps: Any, banks: Sequence[str], causal: bool):
  """Attention over slots of a memory: a panel a layer and round, a column a token.

  Args:
    tokens: T of them, as text.
    maps: [layers and rounds, T, N] shares of 1.
    banks: what each of the maps is called.
    causal: whether the reads are of the past alone.
  """
  width = min(24, max(6, 0.16 * len(tokens) + 1.5))
  figure, axes = canvas(width, 1.3 + 1.6 * len(maps), len(maps), 1, sharex=True)
  for axis, one, bank in zip(axes[:, 0], maps, banks, strict=True):
    image = axis.imshow(one.T, aspect='auto', cmap='magma', vmin=0, interpolation='nearest')
    axis.grid(False)
    axis.set_ylabel(f'{bank}\nslot')
    axis.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axis, pad=0.01, fraction=0.03)
  axes[-1, 0].set_xticks(range(len(tokens)), shown(tokens), fontsize=7, family='monospace')
  axes[-1, 0].set_xlabel('token of the text')
  axes[0, 0].set_title('share of each slot in what a token reads, a scale for each panel'
                       + ('' if causal else ' (NOT CAUSAL: reads the future)'))
  return figure


@drawing
def adapters(grown: dict[str, dict[int, float]]):
  """How much LoRA adds to each matrix (lora.lora_norms)."""
  depth = 1 + max(layer for own in grown.values() for layer in own)
  shares = [[own.get(layer, float('nan')) for layer in range(depth)] for own in grown.values()]
  figure, axis = canvas(3 + 0.6 * depth, 1.6 + 0.42 * len(grown))
  image = axis.imshow(shares, vmin=0, aspect='auto')
  axis.grid(False)
  axis.set_xticks(range(depth), range(1, depth + 1))
  axis.set_yticks(range(len(grown)), list(grown))
  axis.set(xlabel='layer', title='size of what LoRA adds, as a share of the weight')
  if depth <= 16:
    top = max(max(own.values()) for own in grown.values())
    for i, own in enumerate(grown.values()):
      for layer, share in own.items():
        axis.text(layer, i, f'{share:.2f}', ha='center', va='center', fontsize=8,
                  color='black' if share > 0.6 * top else 'white')
  figure.colorbar(image, ax=axis, pad=0.02)
  return figure
