"""What the modes other than training do with a run; `main` picks one."""

import functools
import pathlib
import string
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from latent_reasoning import batching, report, sequences
from latent_reasoning.analysis import verbalizer
from latent_reasoning.cli import evaluation
from latent_reasoning.cli.evaluation import environment, restored, scored, scores
from latent_reasoning.data import questions
from latent_reasoning.data.example import Example
from latent_reasoning.errors import Diverged, InputError, ensure
from latent_reasoning.eval import (
  answer_matching,
  language_modeling,
  leakage,
)
from latent_reasoning.eval import latency as latency_lib
from latent_reasoning.eval.evaluator import Predictor
from latent_reasoning.experiment import Experiment
from latent_reasoning.hf import export as export_lib
from latent_reasoning.models import imm
from latent_reasoning.progress import slow
from latent_reasoning.report.result import Result
from latent_reasoning.train import flops, trainer, workdir


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


def trial(run: Experiment) -> int:
  """Trains, and writes trial.json: the best score in validation, None where the loss
  diverged. No test problem is looked at."""
  try:
    trainer.train(run)
    found = evaluation.restored(run)
    result = {'score': found.meta['accuracy'], 'step': found.step,
              'trained_steps': run.curriculum.total}
  except Diverged as error:
    result = {'score': None, 'error': str(error)}
  workdir.write_json(run.workdir.trial, {**result, 'seed': run.config.seed,
                                         'environment': evaluation.environment()})
  print(f"{result.get('error') or f'''best validation score {result['score']:.4f}'''}; written "
        f'to {run.workdir.trial}')
  return 0


def evaluate(run: Experiment) -> int:
  """Scores the checkpoint, prints what came out, and for text a sample."""
  result = scored(run)
  print(f'\n{scores(result)}')
  if run.batches.method.is_text:
    print('\ntext sampled from the model:\n' + language_modeling.generate(
        run.config, run.model(), restored(run).state.params, run.tokenizer, SAMPLE_PROMPT,
        run.config.eval.max_new_tokens) if run.config.causal else
        '\nno sample: a model that reads the future cannot generate')
  print(f'written to {evaluation.files(run)[0]}')
  return 0


def scale(run: Experiment) -> int:
  """Prints and draws accuracy by what the model computes when asked."""
  found = evaluation.scaled(run)
  print(f'{found}\n\nwritten to {run.workdir.scaling}')
  try:
    print(f"figure {found.plot().save(run.workdir.path / 'scaling.png')}")
  except InputError as error:
    print(f'no figure: {error}')
  return 0


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


def generate(run: Experiment, question: str | None, say: Callable | None = None) -> int:
  """Answers one question, or those typed until the end of input, as `say` does it: None is
  `reply`."""
  require_causal(run)
  params = restored(run).state.params
  if run.batches.method.is_text:
    def answer(prompt):
      return language_modeling.generate(run.config, run.model(), params, run.tokenizer, prompt,
                                        run.config.eval.max_new_tokens)
  else:
    answer = functools.partial(say or reply, run.predictor(params))

  known = questions.of(run.splits, run.tokenizer)

  def ask(line):
    if not run.batches.method.is_text:
      line = known.normalise(line)
      ensure(line, 'the question is empty; expected text')
      if found := known.unlike(line):
        print(f'warning: {found}', file=sys.stderr)
    read = run.tokenizer.decode(run.tokenizer.encode(line))
    if unknown := sorted(set(line) - set(read) - set(string.whitespace)):
      print(f'warning: the tokenizer does not know {unknown}', file=sys.stderr)
    with slow('answering'):
      said = answer(line)
    print(said)
  if question is not None:
    ask(question)
    return 0
  typed = sys.stdin.isatty()
  while True:
    try:
      line = input('question> ' if typed else '')
    except (EOFError, KeyboardInterrupt):
      return 0
    if line.strip():
      if not typed and not run.batches.method.is_text:  # nobody sees what is piped in
        print(f'question: {line}', flush=True)
      try:
        ask(line)
      except InputError as error:
        print(f'error: {error}', file=sys.stderr)


def require_causal(run: Experiment) -> None:
  """Raises InputError where a model reads what is not generated yet."""
  if not run.config.causal:
    raise InputError(f"config.imm.write_policy '{run.config.imm.write_policy}' reads the "
                     'future, which does not exist while generating; expected a causal policy')


def check_fits(predictor: Predictor, question: str) -> None:
  """Raises InputError for an empty question, or one longer than the model's positions."""
  config, row = predictor.config, predictor.row(question)
  if not predictor.fits(row):
    raise InputError(
        f'the question takes {len(row.prefix)} positions with its blocks, and '
        f'config.eval.max_new_tokens {config.eval.max_new_tokens} more; the model has '
        f'{config.model.max_positions}. Ask a shorter question')


def answers(predictor: Predictor, question: str) -> list[str]:
  """The texts of a question's readouts: after each block, the headline last.

  Raises:
    InputError: an empty question, or one longer than the model's positions.
  """
  check_fits(predictor, question)
  return next(iter(predictor.texts([question])))


def reply(predictor: Predictor, question: str) -> str:
  """What the model answers, block by block, the headline last; errors as `answers`."""
  texts = answers(predictor, question)
  several = texts if len(texts) > 1 else []
  lines = [f'after block {k}: {report.or_empty(text)}' for k, text in enumerate(several, 1)]
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
  path = run.workdir.path / 'export' / kind
  with slow(f'writing {path}, and reading it back'):
    found = restored(run)
    export_lib.write(run.config, found.state.params, run.tokenizer, path,
                     workdir.read_object(run.workdir.results), kind, found.step, _problems(run))
  return path


def _problems(run: Experiment) -> tuple[Sequence[Example], str] | None:
  """The test problems and how they are compared; None where there are no data."""
  loaded = getattr(run.splits, 'report', {})
  if 'rules' not in loaded or loaded.get('absent'):
    return None
  return run.test, loaded['rules']['test']


def verbalize(run: Experiment, question: str | None) -> int:
  """Verbalizes a question, or scores and times the reasoning decoder on the test split."""
  own = trained_verbalizer(run)
  if question is not None:
    print(reply(own.predictor, question))
    for number, text_ in enumerate(own.verbalize(question), 1):
      print(f'{run.config.reasoning_decoder.source} {number}: {report.or_empty(text_)}')
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
    raise InputError("config.reasoning_decoder.source is ''; expected 'blocks' for RiM, "
                     "'latents' for coconut and codi, or 'memory' for a model with "
                     "config.imm.write_policy")
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
    'tokens', T texts; 'reads' float32 [layers and rounds, T, slots], shares of 1; 'banks',
    the name of each of these; 'causal'.

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
  rounds = [f', round {i}' for i in range(1, 1 + config.imm.rounds)]
  banks = [f'layer {layer + 1}' + one * (len(rounds) > 1) for layer in sorted(set(
      config.imm.layers or range(config.model.num_layers))) for one in rounds]
  return Result(
      {'tokens': [run.tokenizer.decode([i]) or '·' for i in row.prefix], 'reads': reads,
       'banks': banks, 'causal': config.causal},
      lambda: f'{config.imm.write_policy} memory, {len(reads)} banks of '
      f'{reads.shape[-1]} slots, read by {reads.shape[1]} tokens',
      lambda found: report.slots(found['tokens'], found['reads'], found['banks'],
                                 found['causal']))


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
