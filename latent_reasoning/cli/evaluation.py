"""What --mode=eval measures of a checkpoint, and what every result says of where it is from."""

import datetime
import json
import pathlib
import re
import statistics
import sys
from typing import Any

import jax
import numpy as np

from latent_reasoning import config as config_lib
from latent_reasoning import progress, report
from latent_reasoning.data import contamination, splits
from latent_reasoning.data.synthetic import Generated
from latent_reasoning.errors import InputError
from latent_reasoning.eval import checkpoint_selection
from latent_reasoning.eval.evaluator import Predictor
from latent_reasoning.eval.evaluator import evaluate as score
from latent_reasoning.experiment import Experiment
from latent_reasoning.train import flops, metrics, profiler, versions, workdir
from latent_reasoning.train.checkpoint import Restored


def restored(run: Experiment) -> Restored:
  """The run's checkpoint; raises InputError where nothing was trained."""
  found = run.restore()
  if found is None:
    raise InputError(f'there is no checkpoint in {run.workdir.checkpoints}; train first '
                     '(--mode=train with the same --config and --workdir; in Python .train())')
  stage, total = run.curriculum.at(max(0, found.step - 1)).stage, run.curriculum.total
  if run.steps_trained() < total:
    print(f'warning: training is not finished; the checkpoint is of step {found.step:,} of '
          f'{total:,}, in stage {stage}', file=sys.stderr)
  return found


def environment() -> dict[str, Any]:
  """Versions and machine, for whoever reads a result later."""
  return {'date': datetime.date.today().isoformat(), 'machine': profiler.machine(),
          'devices': jax.device_count(), **versions.here()}


def scores(result: dict[str, Any]) -> str:
  """What `scored` found, as tables."""
  step = f"checkpoint of step {result['step']} ({result['checkpoint']})"
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
      step=found.step, trained_steps=run.curriculum.total, protocol='validation',
      checkpoint=config.eval.checkpoint, blocks=run.predictor(found.state.params).blocks,
      validation_accuracy=found.meta['accuracy'],
      parameters=sum(a.size for a in jax.tree.leaves(found.state.params)),
      tokens=tokens(run, scored[0][1]), training=training(run),
      data=run.splits.report, sets=sets, environment=environment())
  if config.eval.checkpoint_selection == 'paper':
    result['paper'] = _paper(run, found.step, scored)
  disjoint = isinstance(run.splits.train, Generated)  # from its own test problems
  if config.eval.contamination and (sets or not disjoint):
    result['contamination'] = contamination.measure(run.splits.train, {
        'test': run.test, **{path: examples for path, (examples, _) in run.sets.items()}})
  lines = ''.join(json.dumps(r, ensure_ascii=False) + '\n' for _, records in scored
                  for r in records)
  results, predictions = files(run)
  workdir.write_text(predictions, lines)
  workdir.write_json(results, result)
  return result


# Keys that say what is scored: an evaluation with others is not the run's.
SCORED = ('eval.blocks', 'eval.test_problems', 'eval.max_new_tokens', 'eval.checkpoint',
          'eval.checkpoint_selection', 'data.test', 'data.limit')


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


def _scored_text(run: Experiment, found: Restored) -> dict[str, Any]:
  config, params = run.config, found.state.params
  result = {
      'method': config.method, 'dataset': config.data.name, 'split': 'valid',
      **run.loss(params, 'valid'), 'train': run.loss(params, 'train'),
      'causal': config.causal, 'memory': config.imm.write_policy, 'seed': config.seed,
      'step': found.step, 'trained_steps': run.curriculum.total,
      'checkpoint': config.eval.checkpoint,
      'parameters': sum(a.size for a in jax.tree.leaves(params)),
      'training': training(run), 'data': run.splits.report, 'environment': environment()}
  if config.imm.write_policy:
    result['memory_zeroed'] = run.loss(params, 'valid', ablate=(*config.imm.ablate, 'read'))
  workdir.write_json(run.workdir.results, result)
  return result


def _with_progress(predictor: Predictor, examples, dataset: str, split: str, rule: str):
  before = 0

  def count(now: int, _: Any) -> None:
    nonlocal before
    done(now - before)
    before = now
  with progress.steps(f'{len(examples):,} problems of {dataset}/{split}',
                      len(examples)) as done:
    return score(predictor, examples, dataset, split, rule, count)


def tokens(run: Experiment, records: list[dict[str, Any]]) -> dict[str, float]:
  """Tokens generated for the headline's text with its end token: mean and median."""
  most = run.config.eval.max_new_tokens
  texts = [r['predictions'][-1] for r in records if r['predictions']]
  counts = [min(len(ids) + 1, most) for ids in run.tokenizer.encode_batch(texts)] or [0]
  return {'mean': statistics.mean(counts), 'median': statistics.median(counts)}


def training(run: Experiment) -> dict[str, Any]:
  """What the training cost: seconds as logged, FLOPs as counted."""
  logged = metrics.read(run.workdir.metrics) if run.workdir.metrics.exists() else []
  return {'seconds': metrics.seconds(logged), **flops.training(run)}
