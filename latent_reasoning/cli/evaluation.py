"""What --mode=eval measures of a checkpoint, and what every result says of where it is from."""

import datetime
import json
import pathlib
import re
import statistics
import subprocess
import sys
from typing import Any

import jax
import numpy as np

from latent_reasoning import config as config_lib
from latent_reasoning import progress, report
from latent_reasoning.data import contamination, splits
from latent_reasoning.data.synthetic import Generated
from latent_reasoning.errors import InputError
from latent_reasoning.eval import answer_matching, checkpoint_selection, scaling
from latent_reasoning.eval.evaluator import Predictor
from latent_reasoning.eval.evaluator import evaluate as score
from latent_reasoning.experiment import Experiment
from latent_reasoning.hf import init_from
from latent_reasoning.models import lora
from latent_reasoning.report.result import Result
from latent_reasoning.train import flops, metrics, profiler, versions, workdir
from latent_reasoning.train import train_step as step_lib
from latent_reasoning.train.checkpoint import Restored


def restored(run: Experiment) -> Restored:
  """The run's checkpoint, or where no step was trained the weights that it would begin with.

  Raises:
    InputError: there is neither.
  """
  found = run.restore()
  lost = run.workdir.lost_checkpoints()
  if found is None and lost:
    raise InputError(f'{lost}, and none can be read in {run.workdir.checkpoints}; bring one '
                     'back, with its seal (checkpoints.seals/)')
  if found is None and run.config.model.init_from and not run.workdir.metrics.exists():
    return _untrained(run)
  if found is None:
    raise InputError(f'there is no checkpoint in {run.workdir.checkpoints}; train first '
                     '(--mode=train with the same --config and --workdir; in Python .train()), '
                     'or give weights with --config.model.init_from=… in a new --workdir')
  stage, total = run.curriculum.at(max(0, found.step - 1)).stage, run.curriculum.total
  if run.steps_trained() < total:
    print(f'warning: training is not finished; the checkpoint is of step {found.step:,} of '
          f'{total:,}, in stage {stage}', file=sys.stderr)
  return found


def _untrained(run: Experiment) -> Restored:
  """The weights of config.model.init_from as they are; says so, once a process."""
  new = init_from.untrained(run.config, run.tokenizer)
  line = (f'{run.config.model.init_from}: nothing was trained in {run.workdir.path}; its '
          'weights are used as they are'
          + f", untrained new tokens: {' '.join(new)}" * bool(new))
  if line not in _said:
    _said.add(line)
    print(line, file=sys.stderr)
  state = step_lib.TrainState(np.int32(0), run.pretrained_params(), None)
  return Restored(state, 0, {'accuracy': None})


_said: set[str] = set()


def environment() -> dict[str, Any]:
  """Versions and machine, for whoever reads a result later."""
  return {'date': datetime.date.today().isoformat(), 'machine': profiler.machine(),
          'devices': jax.device_count(), **versions.here(),
          'commit': commit()}


def commit() -> str:
  """Of the checkout that runs, with a + where its files differ from it; '' without one."""
  root = pathlib.Path(__file__).parents[2]
  if not (root / '.git').exists():
    return ''
  try:
    return subprocess.run(
        ['git', '-C', str(root), 'describe', '--always', '--dirty=+', '--exclude=*'],
        capture_output=True, text=True, timeout=10, check=True).stdout.strip()
  except (OSError, subprocess.SubprocessError):  # no git here, or not one's own checkout
    return ''


def scores(result: dict[str, Any]) -> str:
  """What `scored` found, as tables."""
  how = {'best': 'best in validation; --config.eval.checkpoint=last reads the last'}
  step = (f"checkpoint of step {result['step']} "
          f"({how.get(result['checkpoint'], result['checkpoint'])})" if result['step']
          else 'weights of config.model.init_from, not trained here')
  if 'protocol' not in result:
    return f'{report.text(result)}\n\n{step}'
  return '\n'.join([
      *(f'{report.results(one)}\n' for one in (result, *result['sets'])),
      f'protocol validation: {step}',
      *([report.paper(result['paper'])] if 'paper' in result else []),
      *([report.contamination(result['contamination'])] if 'contamination' in result else [])])


def scored(run: Experiment) -> dict[str, Any]:
  """Scores the test split and `eval.sets`, of text the loss; writes predictions and results."""
  config, found = run.config, restored(run)
  if run.batches.method.is_text:
    return _scored_text(run, found)
  scored = _score_all(run, found)
  result, *sets = (one for one, _ in scored)
  for one, (_, loaded) in zip(sets, run.sets.values(), strict=True):
    one['data'] = loaded
  result.update(
      step=found.step, trained_steps=run.curriculum.total * bool(found.step),
      protocol='validation', checkpoint=config.eval.checkpoint if found.step else 'init_from',
      blocks=run.predictor(found.state.params).blocks,
      validation_accuracy=found.meta['accuracy'],
      **parameters(run, found), **compute(run, found, scored[0][1]),
      tokens=tokens(run, scored[0][1]), training=training(run, found.step),
      data=run.splits.report, sets=sets, environment=environment())
  if config.eval.checkpoint_selection == 'paper' and found.step:
    result['paper'] = _paper(run, found.step, scored)
  others = [examples for examples, _ in run.sets.values()]
  made = all(isinstance(one, Generated) for one in (run.splits.train, *others))  # disjoint
  if config.eval.contamination and not made:
    result['contamination'] = contamination.measure(run.splits.train, {
        'test': run.test, **{path: examples for path, (examples, _) in run.sets.items()}})
  lines = ''.join(json.dumps(r, ensure_ascii=False) + '\n' for _, records in scored
                  for r in records)
  results, predictions = files(run)
  workdir.write_text(predictions, lines)
  workdir.write_json(results, result)
  return result


# Keys that say what is scored: an evaluation with others is not the run's.
SCORED = ('eval.blocks', 'eval.passes', 'eval.latents', 'eval.loops', 'eval.test_problems',
          'eval.max_new_tokens', 'eval.checkpoint', 'eval.checkpoint_selection', 'data.test',
          'data.limit')


def files(run: Experiment) -> tuple[pathlib.Path, pathlib.Path]:
  """Where results and predictions go: those by other keys than the run's, beside its own."""
  results, predictions = run.workdir.results, run.workdir.predictions
  if not run.workdir.config.exists():
    return results, predictions
  saved = config_lib.flatten(workdir.read_object(run.workdir.config) or {})
  others = {key: config_lib.get(run.config, key) for key in SCORED}
  name = ''.join(f'-{key.rpartition(".")[2]}={value}' for key, value in others.items()
                 if value != saved.get(key, value))
  name = re.sub(r'[^\w=.-]', '_', name)
  return (results.with_name(f'{results.stem}{name}{results.suffix}'),
          predictions.with_name(f'{predictions.stem}{name}{predictions.suffix}'))


def _score_all(run: Experiment, found: Restored) -> list[tuple[dict, list[dict]]]:
  """Result and records of the test split, then of each of `eval.sets`."""
  predictor, rules = run.predictor(found.state.params), run.splits.report['rules']
  scored = [_with_progress(predictor, run.test, run.config.data.name, 'test', rules['test'])]
  for entry, (examples, loaded) in run.sets.items():
    path = pathlib.Path(entry)
    # A file test.json is named by its folder.
    dataset, split = ((path.parent.name, path.stem) if path.stem in splits.STEMS and
                      path.parent.name else (path.stem, 'test'))
    scored.append(_with_progress(predictor, examples, dataset, split, loaded['rule']))
  return scored


def _paper(run: Experiment, step: int, scored: list[tuple[dict, list[dict]]]) -> dict[str, Any]:
  """The paper's protocol over every checkpoint kept; that of `step` is scored already."""
  steps, columns = [], []
  for found in run.kept():
    own = scored if found.step == step else _score_all(run, found)
    steps.append(found.step)
    columns.append([[bool(r['correct']) and r['correct'][-1] for r in records]
                    for _, records in own])
  test, *others = (np.array(column) for column in zip(*columns, strict=True))
  return {'steps': steps, **checkpoint_selection.paper(
      test, run.config.seed, dict(zip(run.sets, others, strict=True)))}


ABOUT_MEMORY = (' Each token writes to a bank of slots inside the layers and reads from it '
                '(IMM, arXiv 2502.21030); write policy {}.')


def _scored_text(run: Experiment, found: Restored) -> dict[str, Any]:
  config, params = run.config, found.state.params
  result = {
      'method': config.method, 'about': run.batches.method.about + ABOUT_MEMORY.format(
          config.imm.write_policy) * bool(config.imm.write_policy),
      'dataset': run.splits.report['name'], 'split': 'valid',
      **run.loss(params, 'valid'), 'train': run.loss(params, 'train'),
      'causal': config.causal, 'memory': config.imm.write_policy, 'seed': config.seed,
      'step': found.step, 'trained_steps': run.curriculum.total * bool(found.step),
      'checkpoint': config.eval.checkpoint if found.step else 'init_from',
      **parameters(run, found), 'training': training(run, found.step),
      'data': run.splits.report, 'environment': environment()}
  if config.imm.write_policy:
    result['memory_zeroed'] = run.loss(params, 'valid', ablate=(*config.imm.ablate, 'read'))
  workdir.write_json(run.workdir.results, result)
  return result


def scaled(run: Experiment) -> Result:
  """Accuracy on the test split and eval.sets by passes, loops, continuous thoughts or blocks
  when asked; writes scaling.json."""
  numbers = scaling.axes(run.config)
  found, rules = restored(run), run.splits.report['rules']
  sets = {run.config.data.name: (run.test, rules['test']), **{
      entry: (examples, loaded['rule']) for entry, (examples, loaded) in run.sets.items()}}
  with progress.steps(f'{", ".join(numbers)} when asked',
                      scaling.evaluations(run.config)) as done:
    axes = scaling.measure(run.config, lambda config: run.predictor(found.state.params, config),
                           sets, lambda: done(1))
  result = Result({
      'method': run.config.method, 'seed': run.config.seed, 'step': found.step,
      'sets': list(sets), 'axes': axes, 'environment': environment()},
      lambda: report.scaling.text(axes),
      lambda _: report.scaling.figure(axes, run.config.method))
  workdir.write_json(run.workdir.scaling, result)
  return result


def _with_progress(predictor: Predictor, examples, dataset: str, split: str, rule: str):
  before = 0

  def count(now: int, _: Any) -> None:
    nonlocal before
    done(now - before)
    before = now
  what = f'{len(examples):,} problems of {dataset}/{split}'
  with progress.steps(what, len(examples)) as done, progress.slow(what):
    return score(predictor, examples, dataset, split, rule, count)


def parameters(run: Experiment, found: Restored) -> dict[str, int]:
  """How many there are, and how many of them are trained."""
  params = found.state.params
  return {name: sum(a.size for a in jax.tree.leaves(tree)) for name, tree in (
      ('parameters', params), ('trained', lora.split(params, run.trained)[0]))}


def compute(run: Experiment, found: Restored, records: list[dict[str, Any]]) -> dict[str, Any]:
  """What the model computes before the answer's first token.

  Returns:
    'passes' of the model, one after another: the prompt's, one for each further pass over its
    end, one for each latent that is fed back; 'serial_layers': layers one after another, those
    of a generated chain of thought included; 'token_layers': tokens times the layers that each
    passes, a mean over problems.
  """
  predictor = run.predictor(found.state.params)
  depth = predictor.model.config.depth  # as asked, config.eval.loops included
  rows = [predictor.row(r['question']) for r in records[:COUNTED]]
  passes = max(r.loops.passes if r.loops else 1 for r in rows) + rows[0].readouts[-1].latents
  said = _before_answer(run, records[:COUNTED])
  tokens = statistics.mean(
      len(r.prefix) + r.readouts[-1].latents + (
          r.loops.size * (r.loops.passes - 1) if r.loops else 0) for r in rows) + said
  return {'passes': passes, 'serial_layers': depth * (passes + said),
          'token_layers': depth * tokens}


COUNTED = 200  # problems whose prompts are counted


def _before_answer(run: Experiment, records: list[dict[str, Any]]) -> float:
  """Mean number of tokens that are generated before the answer's own."""
  if not run.batches.method.speaks_first(run.config):
    return 0.0
  said = [r['predictions'][-1] for r in records if r['predictions']]
  if not said:
    return 0.0
  whole, own = (run.tokenizer.encode_batch(texts) for texts in (
      said, [answer_matching.extract(one) for one in said]))
  return statistics.mean(len(a) - len(b) for a, b in zip(whole, own, strict=True))


def tokens(run: Experiment, records: list[dict[str, Any]]) -> dict[str, float]:
  """Tokens generated for the headline's text with its end token: mean and median."""
  most = run.config.eval.max_new_tokens
  texts = [r['predictions'][-1] for r in records if r['predictions']]
  counts = [min(len(ids) + 1, most) for ids in run.tokenizer.encode_batch(texts)] or [0]
  return {'mean': statistics.mean(counts), 'median': statistics.median(counts)}


def training(run: Experiment, step: int) -> dict[str, Any]:
  """What the training cost: seconds as logged, FLOPs as counted, epochs, and the steps of each
  part of stage 1 where it has several; nothing where none was."""
  if not step:
    return {'seconds': 0.0, 'flops': 0.0, 'stages': []}
  logged = metrics.read(run.workdir.metrics) if run.workdir.metrics.exists() else []
  parts = {'parts': run.curriculum.part_steps} if run.curriculum.parts > 1 else {}
  return {'seconds': metrics.seconds(logged), **flops.training(run), **parts}
