"""--mode=analyze and --mode=intervene: what latents hold, and whether it matters."""

import itertools
import statistics
import time
from typing import Any

import jax
import numpy as np

from latent_reasoning import methods, report
from latent_reasoning.analysis import (
  activation_patching,
  answer_selection,
  block_states,
  latent_interventions,
  probing,
)
from latent_reasoning.cli import commands, question_files
from latent_reasoning.cli.evaluation import environment, restored
from latent_reasoning.errors import InputError, ensure
from latent_reasoning.eval.evaluator import Predictor
from latent_reasoning.experiment import Experiment
from latent_reasoning.methods import rim
from latent_reasoning.report import block_plots as figures
from latent_reasoning.report import style
from latent_reasoning.report.result import Result
from latent_reasoning.train import workdir


def generate(run: Experiment, question: str | None, externalize: bool = False,
             questions: str | None = None, answers: str | None = None) -> int:
  """As `commands.generate`, where asked for with the step of each block; or a file of
  questions."""
  if questions is None:
    ensure(answers is None, '--answers=FILE needs the file of --questions=FILE')
  else:
    ensure(question is None and not externalize, '--questions=FILE is read alone; expected no '
           '--question and no --externalize beside it')
    return question_files.answer(run, questions, answers)
  return commands.generate(run, question, decode_steps if externalize else None)


def decode_steps(predictor: Predictor, question: str) -> str:
  """Block by block the step that the model would say there, its answer there and how
  confident it is of each; and what saying the steps costs. As `commands.reply`."""
  if not predictor.config.rim.externalize:
    raise InputError('--externalize needs a model that was trained to say its steps; train '
                     'with --config.rim.externalize=True')
  final = commands.reply(predictor, question).splitlines()[-1]
  row = predictor.row(question)
  columns = []
  for prompt in (rim.steps_prompt(row, predictor.special), row):
    said = np.asarray(predictor.generate([prompt]))
    confidence = np.exp(block_states.observe(predictor, [prompt], said)[1][0])
    columns.append([(report.or_empty(text), report.percent(share)) for text, share in zip(
        predictor.read(said)[0], confidence, strict=True)])
  table = [['', 'step', 'confidence %', 'answer', 'confidence %'], *(
      [f'block {k}', *step, *answer] for k, (step, answer) in enumerate(
          itertools.zip_longest(*columns, fillvalue=('', '')), 1))]
  times = [], []
  for _ in range(predictor.config.eval.latency_repeats):
    for taken, prompt in zip(times, (row, rim.steps_prompt(row, predictor.special)),
                             strict=True):
      began = time.perf_counter()
      jax.block_until_ready(predictor.generate([prompt]))
      taken.append(1e3 * (time.perf_counter() - began))
  answers, steps = map(statistics.median, times)
  return (f'{report.table(table)}\n{final}\n{answers:.1f} ms for the answers, and '
          f'{steps:.1f} more for the steps')


TRAJECTORY = 300  # problems that older checkpoints are collected on


def intervene(run: Experiment) -> int:
  """Prints the table of interventions and draws it."""
  result = intervened(run)
  print(f'{result}\n\n{report.INTERVENED}\n\nwritten to {run.workdir.interventions}')
  try:
    file = figures.interventions(result).save(run.workdir.path / 'interventions.png')
    print(f'figure {file}')
  except InputError as error:
    print(f'no figure: {error}')
  return 0


def intervened(run: Experiment) -> Result:
  """Answers under each intervention on latents, of RiM on each block too; writes
  interventions.json."""
  latent_interventions.require(run.config)
  found, rule = restored(run), run.splits.report['rules']['test']
  predictor = run.predictor(found.state.params)
  tests = latent_interventions.tests(
      predictor, run.test, rule, getattr(run.splits.test, 'counterfactual', None))
  lines = tests.pop('lines')
  if methods.get(run.config.method).has_blocks:
    blocks = activation_patching.interventions(predictor, run.test, rule)
    again = ('latents untouched', 'zeros', "another question's states")  # those of all blocks
    tests, lines = {**tests, 'blocks': blocks['blocks']}, blocks['lines'] + [
        line for line in lines if line['name'] not in again]
  result = Result({**_of(run, found.step), **tests, 'lines': lines}, lambda: '\n\n'.join((
      report.table(report.interventions(result)), report.table(report.verdict(result)),
      report.verdict_words(result))), figures.interventions)
  workdir.write_json(run.workdir.interventions, result)
  return result


def analyze(run: Experiment) -> int:
  """Prints what was found in the blocks, in short."""
  found = analyzed(run)
  print(f'{found}\n\nall tables in {run.workdir.path / TABLES}, states and figures beside it; '
        f'written to {run.workdir.analysis}. On one page: --mode=report {run.workdir.path}')
  return 0


TABLES = 'analysis.txt'


def analyzed(run: Experiment) -> Result:
  """Collects states and looks into them; writes them, analysis.json and figures."""
  block_states.require(run.config)
  style.require()  # said before minutes of work
  config, found = run.config, restored(run)
  predictor, path = run.predictor(found.state.params), run.workdir.path
  seen, rules = {}, run.splits.report['rules']
  valid = run.splits.valid[:run.config.eval.test_problems or None]
  for split, own in (('valid', valid), ('test', run.test)):
    seen[split] = block_states.collect(predictor, own, rules[split], f'{split} problems')
    seen[split].save(path / f'blocks_{split}.npz')
  valid, test = seen['valid'], seen['test']
  chosen = answer_selection.compare(valid, test)
  budget = block_states.by_budget(_with_blocks(run, predictor), run.test, rules['test'])
  examples = run.test
  before, steps = earlier(run, found.step, examples[:TRAJECTORY])
  path_of = probing.trajectories([*before, test])
  values, lens = probing.value_probes(valid, test), probing.lens(predictor, test)
  attention = probing.attention(predictor, examples)
  truth = np.array([examples[i].answer for i in test.index])
  for name, picture in (
      ('block_choice', figures.block_choice(chosen)),
      ('adaptive', figures.adaptive(chosen['adaptive'], budget)),
      ('trajectories', figures.trajectories(path_of, [*steps, found.step], truth)),
      ('probes', figures.probes(values)), ('lens', figures.lens(lens)),
      ('attention', figures.attention(attention))):
    picture.save(path / f'{name}.png')
  workdir.write_text(path / TABLES, f'{_choice(chosen, test, budget)}\n\n'
                     f'{_states(path_of, values, lens, attention)}\n')
  text = _summary(chosen, test, values)
  del path_of['points']
  result = Result(_plain({
      **_of(run, found.step), 'n': len(test.index), 'blocks': predictor.blocks,
      'per_block': test.correct.mean(0), 'confidence': test.confidence.mean(0),
      'choice': chosen, 'by_budget': budget, 'trajectories': path_of, 'values': values,
      'lens': lens, 'attention': attention, 'dataset': config.data.name}),
      lambda: text, lambda found: figures.block_choice(found['choice']))
  workdir.write_json(run.workdir.analysis, result)
  return result


def _of(run: Experiment, step: int) -> dict[str, Any]:
  return {'method': run.config.method, 'seed': run.config.seed, 'step': step,
          'environment': environment()}


def _with_blocks(run: Experiment, predictor):
  """The same with twice as many blocks, or as many as the model has positions for."""
  more = run.predictor(predictor.params)
  longest = max(len(predictor.row(e.question).prefix) for e in run.test)
  room = run.config.model.max_positions - run.config.eval.max_new_tokens - longest
  size = run.config.rim.block_length
  more.blocks = predictor.blocks + max(0, min(predictor.blocks, room // size))
  return more


def earlier(run: Experiment, last: int, examples):
  """What the checkpoints before a step hold: collected, and their steps."""
  checkpoints = run.checkpoints()
  steps = sorted(s for s in checkpoints.steps() if s < last)
  seen = []
  try:
    for step in steps:
      params = checkpoints.restore(run.like, step).state.params
      seen.append(block_states.collect(run.predictor(params), examples,
                                       run.splits.report['rules']['test'],
                                       f'problems, checkpoint of step {step:,}'))
  except InputError as error:
    raise InputError(f'{error}; move it away') from None
  finally:
    checkpoints.close()
  return seen, steps


def _summary(chosen: dict[str, Any], test, values: dict[str, Any]) -> str:
  """What the blocks hold: a table of rules, and in words."""
  percent, count = report.percent, test.correct.shape[1]
  rules = chosen['rules']
  best = max(rules, key=lambda name: rules[name]['accuracy'])
  reads = {name: one['chosen'] for name, one in chosen['adaptive'].items()
           if name != 'fixed number'}
  fewest = min(reads, key=lambda name: reads[name]['blocks'])
  lines = [
      report.table(report.choice(chosen)), '',
      'Read after each block, the answer is right in '
      + ', '.join(map(percent, test.correct.mean(0))) + f"% of {chosen['n']:,} test problems; "
      f"some block is right in {percent(chosen['any'])}%, and no rule can choose better.",
      f"The best rule, {best}, is right in {percent(rules[best]['accuracy'])}%; the last block "
      f"in {percent(rules['final']['accuracy'])}%.",
      f"Read until {figures.NAMES.get(fewest, fewest)}, {reads[fewest]['blocks']:.2f} of "
      f"{count} blocks are read, and {percent(reads[fewest]['accuracy'])}% are right."]
  for s, (shares, common) in enumerate(zip(values['accuracy'], values['commonest'],
                                           strict=True), 1):
    if not np.isnan(shares).all():
      block, layer = np.unravel_index(np.nanargmax(shares), shares.shape)
      where = f'layer {layer + 1}' if layer + 1 < shares.shape[1] else 'after the last norm'
      lines.append(
          f'The result of step {s} is read best, {percent(shares[block, layer])}%, by a linear '
          f'probe at the end of block {block + 1}, {where}; its commonest value is right in '
          f'{percent(common)}%.')
  return '\n'.join(lines)


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
  layers = [*(f'layer {i}' for i in range(1, depth)), 'last norm']

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
