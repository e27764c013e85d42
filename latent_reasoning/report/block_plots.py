"""Figures of --mode=analyze, one function a PNG. Needs no JAX."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from latent_reasoning.report.figures import load_pyplot, save, shown

NAMES = {'agreement': 'answers agree', 'confidence': 'the answer is confident',
         'probe': 'the probe trusts the answer'}


def block_choice(path: pathlib.Path, found: dict[str, Any]) -> pathlib.Path:
  """Accuracy of each rule with standard errors, beside 'any' (of answer_selection.compare)."""
  pyplot = load_pyplot()
  rules = found['rules']
  drawing, axis = pyplot.subplots(figsize=(7, 0.5 * len(rules) + 1.6))
  share = [100 * r['accuracy'] for r in rules.values()]
  bars = axis.barh(list(rules), share, color='C0',
                   xerr=[100 * r['standard_error'] for r in rules.values()])
  axis.bar_label(bars, [f'{s:.1f}' for s in share], label_type='center', color='white')
  axis.axvline(100 * found['any'], color='black', linestyle='--', linewidth=1)
  axis.invert_yaxis()
  axis.set_xlim(0, 102)
  axis.set_xlabel(f"exact match % on {found['n']:,} test problems; dashed: some block is right "
                  f"({100 * found['any']:.1f}),\nan upper bound that no rule knows")
  axis.set_title('which block answers')
  return save(pyplot, drawing, path / 'block_choice.png')


def adaptive(path: pathlib.Path, found: dict[str, Any],
             by_budget: Sequence[float]) -> pathlib.Path:
  """Accuracy against mean blocks read, one curve a score, and against a fixed number of
  blocks, to beyond the trained one (answer_selection.adaptive, block_states.by_budget)."""
  pyplot = load_pyplot()
  trained = max(p['blocks'] for p in found['fixed number']['curve'])
  drawing, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
  for i, (name, one) in enumerate(found.items()):
    x, y = ([p[key] for p in one['curve']] for key in ('blocks', 'accuracy'))
    fixed = name == 'fixed number'
    label = 'fixed number'
    if not fixed:
      label = (f"until {NAMES[name]}: {one['chosen']['blocks']:.2f} blocks, "
               f"{100 * one['chosen']['accuracy']:.1f}%")
    left.plot(x, 100 * np.array(y), color='gray' if fixed else f'C{i}',
              linestyle='--' if fixed else '-', marker='o', markersize=3.5, label=label)
    if not fixed:
      left.plot(one['chosen']['blocks'], 100 * one['chosen']['accuracy'], '*', markersize=13,
                color=f'C{i}', markeredgecolor='black')
  left.set_xlabel('mean blocks read (star: threshold chosen on validation problems)')
  left.set_ylabel('exact match %')
  left.set_title('reading blocks until a score is reached')
  left.legend()
  right.plot(range(len(by_budget)), 100 * np.array(by_budget), marker='o', color='gray')
  right.axvline(trained, color='black', linestyle=':', linewidth=1)
  right.set_xlabel('blocks at inference (dotted: as trained)')
  right.set_title('a fixed number of blocks')
  right.xaxis.get_major_locator().set_params(integer=True)
  return save(pyplot, drawing, path / 'adaptive.png')


def trajectories(path: pathlib.Path, found: dict[str, Any], steps: Sequence[int],
                 answers: np.ndarray, shown: int = 300, lines: int = 10) -> pathlib.Path:
  """Final states on two principal axes: by block, and their means by training step.

  Args:
    found: of probing.trajectories.
    steps: of its checkpoints.
    answers: true answer of each problem, as text: the colour of the last block.
  """
  pyplot = load_pyplot()
  last, (first, second) = found['points'], found['explained']
  count = last.shape[1]
  drawing, axes = pyplot.subplots(1, 3, figsize=(15, 5.5))
  drawing.suptitle("final states at each block's </b>, on their principal axes", fontsize=11)
  for k in range(count):
    axes[0].scatter(*last[:shown, k].T, s=6, alpha=0.5, color=f'C{k}', label=f'block {k + 1}')
  for one in last[:lines]:
    axes[0].plot(*one.T, color='black', linewidth=0.7, alpha=0.7)
  axes[0].set_title(f'by block; lines: {min(lines, len(last))} problems')
  kinds = sorted(set(answers), key=lambda a: (len(a), a))[:10]
  for i, kind in enumerate(kinds):
    axes[1].scatter(*last[answers == kind][:shown, -1].T, s=6, alpha=0.6, color=f'C{i}',
                    label=kind)
  axes[1].set_title('last block, by true answer')
  for k in range(count):
    means = found['means'][:, k]
    axes[2].plot(*means.T, '-', color=f'C{k}', linewidth=1)
    axes[2].scatter(*means.T, color=f'C{k}', s=15 + 45 * np.linspace(0, 1, len(means)),
                    label=f'block {k + 1}')
  axes[2].set_title('means by training step, small to large:\n'
                    + ', '.join(f'{s:,}' for s in steps))
  for axis, scale in zip(axes, (2, 2, 1), strict=True):  # below, where no point is
    axis.legend(ncols=5, fontsize=9, loc='upper center', bbox_to_anchor=(0.5, -0.14),
                markerscale=scale)
    axis.set_xlabel(f'axis 1 ({100 * first:.0f}% of the variance)')
    axis.set_ylabel(f'axis 2 ({100 * second:.0f}%)')
  return save(pyplot, drawing, path / 'trajectories.png')


def _layers(depth: int) -> list[str]:
  return [*map(str, range(1, depth)), 'final']


def _grid(axis, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str,
          top: float = 100.0):
  """A heat map of shares in percent with its numbers, where they can be read."""
  image = axis.imshow(100 * values, vmin=0, vmax=top, cmap='viridis', aspect='auto')
  axis.set_xticks(range(len(columns)), columns)
  axis.set_yticks(range(len(rows)), rows)
  axis.set_title(title, fontsize=10)
  if values.size <= 120:
    for i, row in enumerate(values):
      for j, value in enumerate(row):
        if np.isfinite(value):
          axis.text(j, i, f'{100 * value:.0f}', ha='center', va='center', fontsize=8,
                    color='black' if 100 * value > 0.6 * top else 'white')
  return image


def probes(path: pathlib.Path, found: dict[str, Any]) -> pathlib.Path:
  """Where a linear probe finds each step's result (probing.value_probes)."""
  pyplot = load_pyplot()
  accuracy, commonest = found['accuracy'], found['commonest']
  steps, count, depth = accuracy.shape
  drawing, axes = pyplot.subplots(1, steps, figsize=(max(7, 3.1 * steps), 0.45 * count + 1.9),
                                  squeeze=False, sharey=True)
  for s, axis in enumerate(axes[0]):
    _grid(axis, accuracy[s], [f'block {k + 1}' for k in range(count)], _layers(depth),
          f'result of step {s + 1}\n(commonest value: {100 * commonest[s]:.0f}%)')
  drawing.suptitle('what a linear probe of the state at </b> reads', fontsize=11)
  drawing.supxlabel('layer whose output is probed; % right on held-out problems', fontsize=10)
  return save(pyplot, drawing, path / 'probes.png')


def lens(path: pathlib.Path, found: dict[str, np.ndarray]) -> pathlib.Path:
  """What the head would say at each layer (probing.lens)."""
  pyplot = load_pyplot()
  count, depth = found['answer'].shape
  drawing, axes = pyplot.subplots(1, 2, figsize=(9, 0.45 * count + 1.9), sharey=True)
  titles = {'next step': 'first token of the true next step', 'answer': 'first of the answer'}
  for axis, (name, values) in zip(axes, found.items(), strict=True):
    _grid(axis, values, [f'block {k + 1}' for k in range(count)], _layers(depth), titles[name])
  drawing.suptitle('logit lens: what the head says of the state at </b>', fontsize=11)
  drawing.supxlabel('layer that the head reads; % of problems where its top token is it',
                    fontsize=10)
  return save(pyplot, drawing, path / 'lens.png')


def attention(path: pathlib.Path, found: dict[str, Any]) -> pathlib.Path:
  """Shares of attention, layer by layer (probing.attention)."""
  pyplot = load_pyplot()
  question, between, readouts = (found[n] for n in ('question', 'blocks', 'readouts'))
  layers, count, length = question.shape
  names = [f'block {k + 1}' for k in range(count)]
  drawing, axes = pyplot.subplots(
      layers, 3, figsize=(15, layers * (0.33 * count + 0.9) + 0.8), squeeze=False,
      gridspec_kw={'width_ratios': [max(4, min(12, 0.5 * length)), count + 1, count + 3]})
  tokens, top = shown(found['tokens']), 100 * max(
      float(np.nanmax(a)) for a in (question, between, readouts))
  for i, (one, two, three) in enumerate(axes):
    _grid(one, question[i], names, tokens if length <= 40 else [''] * length,
          f'layer {i + 1}: </b> to the question', top)
    _grid(two, between[i], names, range(1, count + 1), '</b> to block', top)
    _grid(three, readouts[i], names, ['question', *range(1, count + 1), 'itself'],
          "readout's first token to block", top)
    one.set_ylabel('from')
  drawing.suptitle(f"attention %, mean over heads and {found['n']} problems (tokens: the first "
                   'of them)', fontsize=10)
  return save(pyplot, drawing, path / 'attention.png')


def interventions(path: pathlib.Path, found: dict[str, Any]) -> pathlib.Path:
  """Accuracy under each intervention, and how often the answer becomes that of the question
  whose blocks were put in (activation_patching.interventions)."""
  pyplot = load_pyplot()
  lines = [line for line in found['lines'] if line['n']]
  drawing, (left, right) = pyplot.subplots(1, 2, figsize=(11, 1.4 + 0.3 * len(lines)),
                                           sharey=True)
  names = [line['name'] for line in lines]
  for axis, title, shares, color in (
      (left, 'answer is right', [line['accuracy'] for line in lines], '#31688e'),
      (right, "answer became the donor's", [line.get('donor') for line in lines], '#d95f02')):
    bars = axis.barh(names, [100 * (s or 0) for s in shares], color=color)
    axis.bar_label(bars, ['' if s is None else f'{100 * s:.1f}' for s in shares], padding=3,
                   fontsize=8)
    axis.set(xlim=(0, 115), title=title, xlabel='% of problems')
  chance = [line['chance'] for line in lines if 'chance' in line]
  if chance:
    right.axvline(100 * sum(chance) / len(chance), color='black', linestyle='--', linewidth=1)
    right.set_xlabel('% of problems whose donor says something else\n(dashed: by chance)')
  left.invert_yaxis()
  return save(pyplot, drawing, path / 'interventions.png')
