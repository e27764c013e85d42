"""Figures of what is inside the blocks (analysis). Needs no JAX."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from latent_reasoning.report.style import (
  COLOURS,
  GREY,
  INK,
  canvas,
  drawing,
  legend,
  shown,
  spread,
)

NAMES = {'agreement': 'answers agree', 'confidence': 'the answer is confident',
         'probe': 'the probe trusts the answer'}


def _beside(axis, texts: Sequence[str]) -> None:
  """Writes what each bar is at the right of the axis, where no line crosses it."""
  for row, text in enumerate(texts):
    axis.text(1.01, row, text, transform=axis.get_yaxis_transform(), va='center', fontsize=9)


@drawing
def block_choice(found: dict[str, Any]):
  """Accuracy of each rule with standard errors, beside 'any' (of answer_selection.compare)."""
  rules = found['rules']
  figure, axis = canvas(7.6, 0.45 * len(rules) + 1.5)
  axis.grid(False, axis='y')
  share, error = ([100 * r[key] for r in rules.values()]
                  for key in ('accuracy', 'standard_error'))
  axis.axvline(100 * found['any'], color=INK, linestyle='--', linewidth=1, zorder=0)
  axis.barh(list(rules), share, 0.62, color=COLOURS['rim'], xerr=error, ecolor=GREY)
  _beside(axis, [f'{s:.1f} ±{e:.1f}' for s, e in zip(share, error, strict=True)])
  axis.invert_yaxis()
  axis.set_xlim(0, 102)
  axis.set_xlabel(f"exact match % on {found['n']:,} test problems; dashed: some block is right "
                  f"({100 * found['any']:.1f}),\nan upper bound that no rule knows")
  axis.set_title('which block answers')
  return figure


@drawing
def adaptive(found: dict[str, Any],
             by_budget: Sequence[float]):
  """Accuracy against mean blocks read, one curve a score, and against a fixed number of
  blocks, to beyond the trained one (answer_selection.adaptive, block_states.by_budget)."""
  trained = max(p['blocks'] for p in found['fixed number']['curve'])
  figure, ((left, right),) = canvas(10.5, 4, 1, 2, sharey=True)
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
                color=f'C{i}', markeredgecolor=INK)
  left.set_xlabel('mean blocks read (star: threshold from validation problems)')
  left.set_ylabel('exact match %')
  left.set_title('reading blocks until a score is reached')
  legend(figure, left)
  right.plot(range(len(by_budget)), 100 * np.array(by_budget), marker='o', color='gray')
  right.axvline(trained, color=INK, linestyle=':', linewidth=1)
  right.set_xlabel('blocks at inference (dotted: as trained)')
  right.set_title('a fixed number of blocks')
  right.xaxis.get_major_locator().set_params(integer=True)
  return figure


@drawing
def trajectories(found: dict[str, Any], steps: Sequence[int], answers: np.ndarray,
                 most: int = 300):
  """Final states at `</b>` on two principal axes of all blocks: a panel a block, coloured by
  the true answer, and the mean of each block by training step.

  Args:
    found: of probing.trajectories.
    steps: of its checkpoints.
    answers: true answer of each problem, as text.
    most: points of a colour that are drawn.
  """
  points, (first, second) = found['points'], found['explained']
  count = points.shape[1]
  several = len(found['means']) > 1
  figure, axes = canvas(2.9 * (count + several) + 0.4, 3.9, 1, count + several)
  kinds = sorted(set(answers), key=lambda a: (len(a), a))[:10]
  for k, axis in enumerate(axes[0, :count]):
    if k:
      axis.sharex(axes[0, 0])
      axis.sharey(axes[0, 0])
      axis.tick_params(labelleft=False)
    for i, kind in enumerate(kinds):
      axis.scatter(*points[answers == kind][:most, k].T, s=7, alpha=0.6, color=f'C{i}',
                   linewidths=0, label=kind, rasterized=True)
    axis.set_title(f'block {k + 1}')
  if several:  # on a scale of its own: means lie close together
    for k in range(count):
      means = found['means'][:, k]
      axes[0, -1].plot(*means.T, '-', color=GREY, linewidth=1)
      axes[0, -1].scatter(*means.T, color=GREY, s=12 + 30 * np.linspace(0, 1, len(means)))
    axes[0, -1].margins(0.15)
    axes[0, -1].set_title('means, on a scale of their own;\nsmall to large: '
                          f'steps {steps[0]:,} to {steps[-1]:,}')
  axes[0, 0].set_ylabel(f'axis 2 ({100 * second:.0f}%)')
  figure.supxlabel(f'axis 1 ({100 * first:.0f}% of the variance); colours: the true answer',
                   fontsize=10)
  figure.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside upper center',
                ncols=len(kinds), markerscale=2)
  if several:  # last: only now is known where the points lie on the paper
    spread(figure, axes[0, -1], [(*mean, f'block {k}', INK)
                                 for k, mean in enumerate(found['means'][-1], 1)])
  return figure


def _layers(depth: int) -> list[str]:
  return [*map(str, range(1, depth)), 'final']


def _grid(axis, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str,
          top: float = 100.0):
  """A heat map of shares in percent with its numbers, where they can be read."""
  image = axis.imshow(100 * values, vmin=0, vmax=top, aspect='auto')
  axis.grid(False)
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


@drawing
def probes(found: dict[str, Any]):
  """Where a linear probe finds each step's result (probing.value_probes)."""
  accuracy, commonest = found['accuracy'], found['commonest']
  steps, count, depth = accuracy.shape
  figure, axes = canvas(max(7, 3.1 * steps), 0.45 * count + 1.9, 1, steps, sharey=True)
  for s, axis in enumerate(axes[0]):
    _grid(axis, accuracy[s], [f'block {k + 1}' for k in range(count)], _layers(depth),
          f'result of step {s + 1}\n' + (
              '(too few problems)' if np.isnan(commonest[s]) else
              f'(commonest value: {100 * commonest[s]:.0f}%)'))
  figure.suptitle('what a linear probe of the state at </b> reads', fontsize=11)
  figure.supxlabel('layer whose output is probed; % right on held-out problems', fontsize=10)
  return figure


@drawing
def lens(found: dict[str, np.ndarray]):
  """What the head would say at each layer (probing.lens)."""
  count, depth = found['answer'].shape
  figure, axes = canvas(9, 0.45 * count + 1.9, 1, 2, sharey=True)
  titles = {'next step': 'first token of the true next step',
            'answer': 'first token of the answer'}
  for axis, (name, values) in zip(axes[0], found.items(), strict=True):
    _grid(axis, values, [f'block {k + 1}' for k in range(count)], _layers(depth), titles[name])
  figure.suptitle('logit lens: what the head says of the state at </b>', fontsize=11)
  figure.supxlabel('layer that the head reads; % of problems where its top token is it',
                    fontsize=10)
  return figure


@drawing
def attention(found: dict[str, Any]):
  """Shares of attention, layer by layer (probing.attention)."""
  question, between, readouts = (found[n] for n in ('question', 'blocks', 'readouts'))
  layers, count, length = question.shape
  names = [f'block {k + 1}' for k in range(count)]
  figure, axes = canvas(
      15, layers * (0.33 * count + 0.9) + 0.8, layers, 3,
      width_ratios=[max(4, min(12, 0.5 * length)), count + 1, count + 3])
  tokens, top = shown(found['tokens']), 100 * max(
      float(np.nanmax(a)) for a in (question, between, readouts))
  for i, (one, two, three) in enumerate(axes):
    _grid(one, question[i], names, tokens if length <= 40 else [''] * length,
          f'layer {i + 1}: </b> to the question', top)
    _grid(two, between[i], names, range(1, count + 1), '</b> to block', top)
    _grid(three, readouts[i], names, ['question', *range(1, count + 1), 'itself'],
          "readout's first token to block", top)
    one.set_ylabel('from')
  figure.suptitle(f"attention %, a mean over heads and {found['n']} problems of one length "
                  '(the tokens are those of the first)', fontsize=10)
  return figure


@drawing
def interventions(found: dict[str, Any]):
  """Accuracy under each intervention, and how often the answer becomes that of the question
  whose blocks were put in (activation_patching.interventions)."""
  lines = [line for line in found['lines'] if line['n']]
  figure, ((left, right),) = canvas(10.5, 1.4 + 0.3 * len(lines), 1, 2, sharey=True)
  names = [line['name'] for line in lines]
  for axis, title, shares, color in (
      (left, 'answer is right', [line['accuracy'] for line in lines], '#31688e'),
      (right, "answer became the donor's", [line.get('donor') for line in lines], '#d95f02')):
    axis.barh(names, [100 * (s or 0) for s in shares], color=color)
    _beside(axis, ['' if s is None else f'{100 * s:.1f}' for s in shares])
    axis.set(xlim=(0, 102), title=title, xlabel='% of problems')
  chance = [line['chance'] for line in lines if 'chance' in line]
  if chance:
    right.axvline(100 * sum(chance) / len(chance), color=INK, linestyle='--', linewidth=1,
                  zorder=0)
    right.set_xlabel('% of problems whose donor says something else\n(dashed: by chance)')
  left.invert_yaxis()
  return figure
