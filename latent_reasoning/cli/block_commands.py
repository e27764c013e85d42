"""--mode=inside and --mode=controls: what RiM's blocks hold, and whether it matters."""

import itertools
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np
import tqdm

from latent_reasoning import report, sequences
from latent_reasoning.analysis import (
  activation_patching,
  answer_selection,
  block_states,
  probing,
)
from latent_reasoning.cli import commands
from latent_reasoning.cli.commands import environment, restored
from latent_reasoning.errors import InputError
from latent_reasoning.eval.evaluator import Answerer
from latent_reasoning.experiment import Run
from latent_reasoning.report import block_plots as figures
from latent_reasoning.report.figures import load_pyplot
from latent_reasoning.train import workdir


def aloud(answerer: Answerer, question: str) -> str:
  """Block by block the step that the model would say there, its answer there and how
  confident it is of each; and what saying the steps costs. As `modes.reply`."""
  if not answerer.config.rim.externalize:
    raise InputError('--externalize needs a model that was trained to say its steps; train '
                     'with --config.rim.externalize')
  final = commands.reply(answerer, question).splitlines()[-1]
  row = answerer.row(question)
  columns = []
  for prompt in (sequences.steps_prompt(row, answerer.symbols), row):
    said = np.asarray(answerer.generate([prompt]))
    confidence = np.exp(block_states.observe(answerer, [prompt], said)[1][0])
    columns.append([(text, report.percent(share)) for text, share in zip(
        answerer.read(said)[0], confidence, strict=True)])
  table = [['', 'step', 'confidence %', 'answer', 'confidence %'], *(
      [f'block {k}', *step, *answer] for k, (step, answer) in enumerate(
          itertools.zip_longest(*columns, fillvalue=('', '')), 1))]
  times = [], []
  for _ in range(answerer.config.eval.latency_repeats):
    for taken, prompt in zip(times, (row, sequences.steps_prompt(row, answerer.symbols)),
                             strict=True):
      began = time.perf_counter()
      jax.block_until_ready(answerer.generate([prompt]))
      taken.append(1e3 * (time.perf_counter() - began))
  answers, steps = map(statistics.median, times)
  return (f'{report.table(table)}\n{final}\n{answers:.1f} ms for the answers, and '
          f'{steps:.1f} more for the steps')


TRAJECTORY = 300  # problems that older checkpoints are collected on


def controls(run: Run) -> int:
  """Prints the table of interventions, writes controls.json and draws it."""
  block_states.require(run.config)
  found = restored(run)
  result = {**_of(run, found.step), **activation_patching.controls(
      run.answerer(found.state.params), run.test, run.splits.report['rules']['test'])}
  workdir.write_json(run.workdir.controls, result)
  print(f'{report.table(report.controls(result))}\n\ndonor: the problem whose blocks are put '
        f'in, where it has another answer\n\nwritten to {run.workdir.controls}')
  try:
    print(f'figure {figures.controls(run.workdir.path, result)}')
  except InputError as error:
    print(f'no figure: {error}')
  return 0


def look_inside(run: Run) -> int:
  """Collects states, prints what was found in them, writes inside.json and figures."""
  block_states.require(run.config)
  load_pyplot()  # said before minutes of work, not behind them
  config, found = run.config, restored(run)
  answerer, path = run.answerer(found.state.params), run.workdir.path
  say = tqdm.tqdm.write if sys.stderr.isatty() else print
  seen, rules = {}, run.splits.report['rules']
  valid = run.splits.valid[:run.config.eval.test_problems or None]
  for split, own in (('valid', valid), ('test', run.test)):
    seen[split] = block_states.collect(answerer, own, rules[split])
    seen[split].save(path / f'blocks_{split}.npz')
  valid, test = seen['valid'], seen['test']
  chosen = answer_selection.compare(valid, test)
  budget = block_states.by_budget(_with_blocks(run, answerer), run.test, rules['test'])
  say(_choice(chosen, test, budget))
  examples = run.test
  before, steps = earlier(run, found.step, examples[:TRAJECTORY])
  path_of = probing.trajectories([*before, test])
  values, lens = probing.value_probes(valid, test), probing.lens(answerer, test)
  attention = probing.attention(answerer, examples)
  say(_states(path_of, values, lens, attention))
  truth = np.array([examples[i].answer for i in test.index])
  drawn = [
      figures.block_choice(path, chosen),
      figures.adaptive(path, chosen['adaptive'], budget),
      figures.trajectories(path, path_of, [*steps, found.step], truth),
      figures.probes(path, values), figures.lens(path, lens),
      figures.attention(path, attention)]
  del path_of['points']
  workdir.write_json(run.workdir.inside, _plain({
      **_of(run, found.step), 'n': len(test.index), 'blocks': answerer.blocks,
      'per_block': test.correct.mean(0), 'confidence': test.confidence.mean(0),
      'choice': chosen, 'by_budget': budget, 'trajectories': path_of, 'values': values,
      'lens': lens, 'attention': attention, 'dataset': config.data.name}))
  print(f"\nstates in {path}/blocks_*.npz, figures {', '.join(f.name for f in drawn)}; "
        f'written to {run.workdir.inside}')
  return 0


def _of(run: Run, step: int) -> dict[str, Any]:
  return {'method': run.config.method, 'seed': run.config.seed, 'step': step,
          'environment': environment()}


def _with_blocks(run: Run, answerer):
  """The same with twice as many blocks, or as many as the model has positions for."""
  more = run.answerer(answerer.params)
  longest = max(len(answerer.row(e.question).prefix) for e in run.test)
  room = run.config.model.max_positions - run.config.eval.max_new_tokens - longest
  size = run.config.rim.block_tokens + 2
  more.blocks = answerer.blocks + max(0, min(answerer.blocks, room // size))
  return more


def earlier(run: Run, last: int, examples):
  """What the checkpoints before a step hold: collected, and their steps."""
  checkpoints = run.checkpoints()
  steps = sorted(s for s in checkpoints.steps() if s < last)
  seen = []
  try:
    for step in steps:
      params = checkpoints.restore(run.like, step).state.params
      seen.append(block_states.collect(run.answerer(params), examples,
                                       run.splits.report['rules']['test']))
  except InputError as error:
    raise InputError(f'{error}; move it away') from None
  finally:
    checkpoints.close()
  return seen, steps


def _choice(found: dict[str, Any], test, budget) -> str:
  percent, count = report.percent, test.correct.shape[1]
  columns = [f'block {k + 1}' for k in range(count)]
  tests = [['AUROC % of', 'all', *columns],
           ['probe', _interval(found['auroc']), *map(_interval, found['auroc_by_block'])],
           ['confidence', _interval(found['auroc_confidence']), *[''] * count]]
  adaptive = [['read blocks until', 'threshold', 'mean blocks', 'accuracy %']]
  adaptive += [[name, f"{one['chosen']['threshold']:.3g}", f"{one['chosen']['blocks']:.2f}",
                percent(one['chosen']['accuracy'])] for name, one in found['adaptive'].items()]
  budgets = [['blocks at inference', *range(len(budget))],
             ['accuracy %', *map(percent, budget)]]
  return (f"{found['n']} test problems; probes and thresholds from validation problems\n\n"
          f'{report.table(report.choice(found))}\n\n{report.table(tests)}\nAUPRC of the probe '
          f"{_interval(found['auprc'])} (a guess: {percent(found['right'])}); 95% intervals by "
          f'bootstrap over problems\n\n{report.table(adaptive)}\n\n{report.table(budgets)}')


def _interval(found: dict[str, float]) -> str:
  return (f"{100 * found['value']:.1f} "
          f"[{100 * found['low']:.1f}, {100 * found['high']:.1f}]")


def _states(path_of, values, lens, attention) -> str:
  depth = lens['answer'].shape[1]
  layers = [*(f'layer {i}' for i in range(1, depth)), 'final']

  def by_layer(name, shares):
    return report.table([[name, *layers], *(
        [f'block {k + 1}', *map(report.percent, row)] for k, row in enumerate(shares))])
  tables = [by_layer(f'step {s + 1} read %, linear probe', shares)
            for s, shares in enumerate(values['accuracy'])]
  tables += [by_layer(f'lens: first of {name} %', shares) for name, shares in lens.items()]
  looks = [['mean over layers: from', 'question', *(f'block {k + 1}' for k in range(
      lens['answer'].shape[0])), 'itself']]
  mean = attention['question'].sum(-1, keepdims=True), attention['blocks']
  for k, row in enumerate(np.concatenate(mean, axis=-1).mean(0)):
    looks.append([f'</b> {k + 1}', *map(report.percent, row), ''])
  looks += [[f'readout {k + 1}', *map(report.percent, row)]
            for k, row in enumerate(attention['readouts'].mean(0))]
  straight = ', '.join(f'{t:.2f}' for t in path_of['turns'])
  shares = ', '.join(map(report.percent, path_of['explained']))
  return '\n\n'.join([*tables, report.table(looks),
                      f'two principal axes hold {shares}% of the variance; cosine of a change '
                      f'with the one before, at blocks 2 …: {straight}'])


def _plain(value: Any) -> Any:
  """Arrays as lists, and NaN as null, for JSON."""
  if isinstance(value, dict):
    return {key: _plain(v) for key, v in value.items()}
  if isinstance(value, (list, tuple, np.ndarray, jax.Array)):
    return [_plain(v) for v in (value.tolist() if hasattr(value, 'tolist') else value)]
  return None if isinstance(value, float) and not np.isfinite(value) else value
