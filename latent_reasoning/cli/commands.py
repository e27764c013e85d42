"""What the modes other than training do with a run; `main` picks one."""

import datetime
import functools
import json
import pathlib
import platform
import re
import statistics
import string
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from latent_reasoning import batching, progress, report, sequences
from latent_reasoning import config as config_lib
from latent_reasoning.analysis import verbalizer
from latent_reasoning.data import contamination, questions, splits
from latent_reasoning.data.synthetic import Generated
from latent_reasoning.errors import InputError, ensure
from latent_reasoning.eval import (
  answer_matching,
  checkpoint_selection,
  language_modeling,
  leakage,
)
from latent_reasoning.eval import latency as latency_lib
from latent_reasoning.eval.evaluator import Predictor
from latent_reasoning.eval.evaluator import evaluate as score
from latent_reasoning.experiment import Experiment
from latent_reasoning.hf import export as export_lib
from latent_reasoning.models import imm
from latent_reasoning.report.result import Result
from latent_reasoning.train import flops, metrics, profiler, trainer, workdir
from latent_reasoning.train.checkpoint import Restored, versions


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
          'devices': jax.device_count(), 'python': platform.python_version(), **versions()}


def verify(run: Experiment) -> int:
  """Says of every checkpoint whether it is sound; 1 where one is not."""
  found = verified(run)
  print(f'{found} in {run.workdir.checkpoints}')
  return int(any(found.values()))


def verified(run: Experiment) -> Result:
  """What is wrong with each checkpoint, by step: '' where it is sound."""
  checkpoints = run.checkpoints()
  found = checkpoints.verify(run.like, run.same_sources)
  checkpoints.close()
  if not found:
    raise InputError(f'there is no checkpoint in {checkpoints.path}; train first')
  return Result(found, lambda: '\n'.join([
      *(f'checkpoint {step}: ' + (f'UNSOUND, {wrong}' if wrong else 'sound')
        for step, wrong in found.items()),
      f'{sum(not wrong for wrong in found.values())} of {len(found)} sound']))


def train(run: Experiment) -> int:
  """Trains, then evaluates."""
  trainer.train(run)
  return evaluate(run)


def evaluate(run: Experiment) -> int:
  """Scores the checkpoint, prints what came out, and for text a sample."""
  result = scored(run)
  print(f'\n{scores(result)}')
  if run.batches.method.is_text:
    print('\n' + (language_modeling.generate(
        run.config, run.model(), restored(run).state.params, run.tokenizer, SAMPLE_PROMPT,
        run.config.eval.max_new_tokens) if run.config.causal else
        'no sample: a model that reads the future cannot generate'))
  print(f'written to {_files(run)[0]}')
  return 0


# Keys that say what is scored: an evaluation with others is not the run's.
SCORED = ('eval.blocks', 'eval.test_problems', 'eval.max_new_tokens', 'eval.checkpoint',
          'eval.checkpoint_selection', 'data.test', 'data.limit')


def _files(run: Experiment) -> tuple[pathlib.Path, pathlib.Path]:
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
  results, predictions = _files(run)
  workdir.write_text(predictions, lines)
  workdir.write_json(results, result)
  return result


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


def count(run: Experiment) -> int:
  """Counts training FLOPs before anything is trained."""
  print(f'{counted(run)}; written to {run.workdir.flops}')
  return 0


def counted(run: Experiment) -> Result:
  """The training FLOPs of the configuration, stage by stage; writes flops.json."""
  found = flops.training(run)
  workdir.write_json(run.workdir.flops, found)
  return Result(found, lambda: '\n'.join([
      *(f"stage {stage['stage']}: {stage['steps']:,} steps, {stage['flops']:.4g} FLOPs"
        for stage in found['stages']),
      f"training: {found['flops']:.4g} FLOPs of matrix products"]))


SAMPLE_PROMPT = '\n'


def _with_progress(predictor: Predictor, examples, dataset: str, split: str, rule: str):
  before = 0

  def count(now: int, _: Any) -> None:
    nonlocal before
    done(now - before)
    before = now
  with progress.steps(f'{len(examples):,} problems of {dataset}/{split}',
                      len(examples)) as done:
    return score(predictor, examples, dataset, split, rule, count)


def generate(run: Experiment, question: str | None, say: Callable | None = None) -> int:
  """Answers one question, or those typed until the end of input, as `say` does it: None is
  `reply`."""
  if not run.config.causal:
    raise InputError(f"config.imm.write_policy '{run.config.imm.write_policy}' reads the "
                     'future, which does not exist while generating; expected a causal policy')
  params = restored(run).state.params
  if run.batches.method.is_text:
    def answer(prompt):
      return language_modeling.generate(run.config, run.model(), params, run.tokenizer, prompt,
                                        run.config.eval.max_new_tokens)
  else:
    answer = functools.partial(say or reply, run.predictor(params))

  known = questions.TrainingQuestions(run.splits.train, run.tokenizer)

  def ask(line):
    if not run.batches.method.is_text:
      line = known.normalise(line)
      ensure(line, 'the question is empty; expected text')
      if found := known.unlike(line):
        print(f'warning: {found}', file=sys.stderr)
    read = run.tokenizer.decode(run.tokenizer.encode(line))
    if unknown := sorted(set(line) - set(read) - set(string.whitespace)):
      print(f'warning: the tokenizer does not know {unknown}', file=sys.stderr)
    print(answer(line))
  if question is not None:
    ask(question)
    return 0
  prompt = 'question> ' if sys.stdin.isatty() else ''
  while True:
    try:
      line = input(prompt)
    except (EOFError, KeyboardInterrupt):
      return 0
    if line.strip():
      try:
        ask(line)
      except InputError as error:
        print(f'error: {error}', file=sys.stderr)


def answers(predictor: Predictor, question: str) -> list[str]:
  """The texts of a question's readouts: after each block, the headline last.

  Raises:
    InputError: an empty question, or one longer than the model's positions.
  """
  config = predictor.config
  row = predictor.row(question)
  if not predictor.fits(row):
    raise InputError(
        f'the question takes {len(row.prefix)} positions with its blocks, and '
        f'config.eval.max_new_tokens {config.eval.max_new_tokens} more; the model has '
        f'{config.model.max_positions}. Ask a shorter question')
  return next(iter(predictor.texts([question])))


def reply(predictor: Predictor, question: str) -> str:
  """What the model answers, block by block, the headline last; errors as `answers`."""
  texts = answers(predictor, question)
  several = texts if len(texts) > 1 else []
  lines = [f'after block {k}: {text}' for k, text in enumerate(several, 1)]
  if predictor.method.trace:
    lines.append(texts[-1])
  answer = answer_matching.extract(texts[-1])
  return '\n'.join([*lines, f'answer: {answer}' if answer.strip() else
                    'answer: none; what the model says there is empty'])


def export(run: Experiment, kind: str) -> int:
  """Writes the model as a directory for other engines."""
  print(f'written to {exported(run, kind)}, read back and equal')
  return 0


def exported(run: Experiment, kind: str) -> pathlib.Path:
  """The directory that was written, in the run's folder."""
  found = restored(run)
  results = run.workdir.results
  path = run.workdir.path / 'export' / kind
  export_lib.write(run.config, found.state.params, run.tokenizer, path,
                   workdir.read_object(results), kind)
  return path


def verbalize(run: Experiment, question: str | None) -> int:
  """Verbalizes a question, or scores and times the reasoning decoder on the test split."""
  own = trained_verbalizer(run)
  if question is not None:
    print(reply(own.predictor, question))
    for number, text_ in enumerate(own.verbalize(question), 1):
      print(f'{run.config.reasoning_decoder.source} {number}: {text_}')
    return 0
  print(f'{report.verbalized(verbalized(run, own))}\n\nwritten to {run.workdir.verbalized}')
  return 0


def trained_verbalizer(run: Experiment) -> verbalizer.Verbalizer:
  """The reasoning decoder with its model; it is trained first where there is none yet.

  Raises:
    InputError: config.reasoning_decoder.source is ''.
  """
  config, found = run.config, restored(run)
  e = config.reasoning_decoder
  if not e.source:
    raise InputError("config.reasoning_decoder.source is ''; expected 'blocks' for RiM, or "
                     "'memory' for a model with config.imm.write_policy")
  if run.joint:
    own = found.state.params['reasoning_decoder']
  else:
    place = run.workdir.reasoning_decoder
    free = tuple(key for key in workdir.FREE if key != 'reasoning_decoder.')
    try:
      workdir.open_workdir(place.path, config, False, free)
    except InputError as error:
      raise InputError(f'{error}, or remove {place.path} to train a reasoning decoder anew'
                       ) from None
    if place.base.exists() and workdir.read_object(place.base) != {'step': found.step}:
      raise InputError(f'{place.path} verbalizes another checkpoint than that of step '
                       f'{found.step}; remove the folder to train it again')
    workdir.write_json(place.base, {'step': found.step})
    own = trainer.train(verbalizer.frozen(run, found.state.params)).params
  return verbalizer.Verbalizer(run, found.state.params, own, found.step)


def verbalized(run: Experiment, own: verbalizer.Verbalizer) -> dict[str, Any]:
  """Accuracy and cost of the reasoning decoder on the test split; writes verbalized.json."""
  config, test = run.config, run.test
  result = {
      'method': config.method, 'dataset': config.data.name, 'split': 'test',
      'source': config.reasoning_decoder.source, 'joint': config.reasoning_decoder.joint,
      'seed': config.seed, 'step': own.step, **verbalizer.score(own, test),
      'foreign': verbalizer.score(own, test, foreign=True),
      'parameters': sum(a.size for a in jax.tree.leaves(own.decoder_params)),
      'cost': verbalizer.cost(own, test, config.eval.latency_repeats),
      'environment': environment()}
  workdir.write_json(run.workdir.verbalized, result)
  return result


def plot_memory(run: Experiment, question: str | None) -> int:
  """Draws which slots each token of a text reads, layer by layer."""
  found = slot_reads(run, question)
  figure = found.plot().save(run.workdir.path / 'slots.png')
  print(f'{found}; figure in {figure}')
  return 0


def slot_reads(run: Experiment, text: str | None) -> Result:
  """Which slots of the implicit memory each token of a text reads.

  Returns:
    'tokens', T texts; 'reads' float32 [layers and rounds, T, slots], shares of 1; 'causal'.

  Raises:
    InputError: a model without a memory, no text, or one longer than the model's positions.
  """
  config = run.config
  if not config.imm.write_policy:
    raise InputError("config.imm.write_policy is '', so there are no slots to attend to; "
                     "expected a policy such as 'gated'")
  if not text:
    raise InputError('no text to read; give one with --question="..."')
  params = restored(run).state.params
  if run.batches.method.is_text:
    row = sequences.causal([*run.tokenizer.start, *run.tokenizer.encode(text)], ())
  else:
    row = run.predictor(params).row(text)
  if len(row.prefix) > config.model.max_positions:
    raise InputError(f'the text has {len(row.prefix)} tokens; the model has '
                     f'{config.model.max_positions} positions. Give a shorter text')
  reads = np.asarray(imm.attention(
      run.model(), params, batching.collate([row], len(row.prefix), 0, 0)))[:, 0]
  return Result(
      {'tokens': [run.tokenizer.decode([i]) or '·' for i in row.prefix], 'reads': reads,
       'causal': config.causal},
      lambda: f'{config.imm.write_policy} memory, {len(reads)} layers and rounds of '
      f'{reads.shape[-1]} slots, read by {reads.shape[1]} tokens',
      lambda found: report.slots(found['tokens'], found['reads'], found['causal']))


def check_leakage(run: Experiment) -> int:
  """Prints a line a check; status 1 if one fails."""
  found = leakage_checks(run)
  print(f"{found['method']}, {found['weights']}, {found['rows']} rows\n"
        f"{report.leakage(found['checks'])}\n"
        f"{'all checks passed' if found['ok'] else 'LEAKAGE FOUND'}; written to "
        f'{run.workdir.leakage}')
  return 0 if found['ok'] else 1


def leakage_checks(run: Experiment) -> dict[str, Any]:
  """Runs every check on the checkpoint, or fresh weights; writes leakage.json."""
  found = run.restore()
  state = found.state if found else run.init()
  examples = _real(run, run.config.eval.leakage_rows)
  checks = leakage.run(leakage.Subject(run.config, run.model(), state.params,
                                       run.tokenizer, examples))
  weights = f'checkpoint of step {found.step}' if found else 'fresh weights'
  result = {'ok': all(check['ok'] for check in checks), 'method': run.config.method,
            'weights': weights, 'rows': len(examples), 'checks': checks,
            'environment': environment()}
  workdir.write_json(run.workdir.leakage, result)
  return result


def latency(run: Experiment) -> int:
  """Prints the table of times."""
  measured = latencies(run)
  print(f"one model, one decoder; a chain of thought has {measured['trace_tokens']} tokens, "
        f"an answer {measured['answer_tokens']}; medians of {measured['repeats']} runs on "
        f"{measured['device']}\n\n{report.latency(measured)}\n\nwritten to "
        f'{run.workdir.latency}')
  return 0


def latencies(run: Experiment) -> dict[str, Any]:
  """Times every method on the run's model; writes latency.json."""
  if run.batches.method.is_text:
    raise InputError('--mode=latency times answers to questions; method language_model '
                     'has none')
  found = run.restore()
  params = found.state.params if found else run.init().params
  measured = latency_lib.measure(run.config, run.model(), params, run.tokenizer,
                                 _real(run, 64))
  measured['environment'] = environment()
  workdir.write_json(run.workdir.latency, measured)
  return measured


CHECKED_TOKENS = 48  # of text in a row: enough for every rule, and quick to differentiate


def _real(run: Experiment, count: int) -> list[sequences.TokenizedExample]:
  """Training problems drawn by seed, encoded."""
  train = run.splits.train
  if run.batches.method.is_text:
    return language_modeling.halves(train, min(run.config.data.seq_len, CHECKED_TOKENS), count,
                                    run.config.seed)
  index = np.random.default_rng(run.config.seed).choice(len(train), min(count, len(train)),
                                                        replace=False)
  return sequences.encode([train[i] for i in index], run.tokenizer)
