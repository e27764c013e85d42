"""Evaluation: answers of every method by one decoder, scored by one rule."""

import collections
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import chex
import numpy as np
from scipy import stats

from latent_reasoning import batching, methods, sequences
from latent_reasoning.config import Config
from latent_reasoning.data.example import Example
from latent_reasoning.eval import answer_matching, decoding
from latent_reasoning.parallel import sharding
from latent_reasoning.train import train_step as step_lib


class Predictor:
  """Answers questions with fixed parameters.

  Args:
    config: method, rim, data.buckets, eval and seed are read.
    model: as models.transformer.Transformer, without dropout.
    params: its parameters.
    tokenizer: a `tokenizers.Tokenizer`.
  """

  def __init__(self, config: Config, model, params, tokenizer):
    self.config, self.model, self.params, self.tokenizer = config, model, params, tokenizer
    self.head = decoding.head_kernel(model, params)
    self.method = methods.get(config.method)
    self.special = sequences.special_tokens(tokenizer)
    self.blocks = config.eval.blocks or config.rim.blocks

  def row(self, question: str, samples: int = 0) -> sequences.PackedSequence:
    """The prompt of a question; `samples` readouts at its end instead of its own."""
    row = self.method.prompt(self.tokenizer.question(question), self.blocks,
                             self.config, self.special)
    if samples:
      row = sequences.PackedSequence(row.prefix, row.visible_until,
                                     [row.readouts[-1]] * samples)
    return row

  def fits(self, row: sequences.PackedSequence) -> bool:
    """Whether the model has positions for the prompt and the tokens to come."""
    last = max(out.visible_until + len(out.inputs) for out in row.readouts)
    return last + self.config.eval.max_new_tokens <= self.config.model.max_positions

  def texts(self, questions: Sequence[str], samples: int = 0) -> Iterator[list[str] | None]:
    """Yields the text of every readout of each question, in order.

    Greedy, or drawn at `eval.temperature` where `samples` is given. A question
    with too many positions yields None.
    """
    size = self.config.eval.batch_size
    for start in range(0, len(questions), size):
      rows = [self.row(q, samples) for q in questions[start:start + size]]
      fitting = [row for row in rows if self.fits(row)]
      decoded = iter(self._decode(fitting, start, samples) if fitting else ())
      for row in rows:
        yield next(decoded) if self.fits(row) else None

  def _decode(self, rows: list[sequences.PackedSequence], start: int,
              samples: int) -> list[list[str]]:
    # A short batch is filled up, so that one shape serves all.
    filled = rows + [rows[-1]] * (self.config.eval.batch_size - len(rows))
    rng = step_lib.key(self.config.seed, step_lib.SAMPLE, start)
    return self.read(self.generate(filled, rng if samples else None)[:len(rows)])

  def read(self, tokens: chex.Array) -> list[list[str]]:
    """The texts of generated tokens [B, K, max_tokens]."""
    return [[self.tokenizer.decode(self._until_end(out)) for out in row]
            for row in tokens.tolist()]

  def _until_end(self, tokens: list[int]) -> list[int]:
    end = self.special.end
    return tokens[:tokens.index(end)] if end in tokens else tokens

  def generate(self, rows: Sequence[sequences.PackedSequence], rng: chex.PRNGKey | None = None,
               edit: Callable | None = None):
    """Tokens of every readout, int32 [B, K, max_tokens]; sampled where `rng` is given.

    Each device decodes its share of the rows. The readouts either all begin with a token of
    their own or none does; `edit` as in `decode.prefill`.
    """
    e = self.config.eval

    def decode(batch, edit=None):
      return decoding.generate(
          self.model, self.params, self.head, batch,
          step_lib.key(0, step_lib.SAMPLE) if rng is None else rng, e.temperature,
          end=self.special.end, pad=self.special.pad, max_tokens=e.max_new_tokens,
          sample=rng is not None, top_k=e.top_k, edit=edit)
    batch = prompt_batch(rows, self.config, self.special.pad)
    return np.asarray(sharding.by_rows(decode, self.params, batch, *[edit] if edit else []))


def prefix_width(rows: Sequence[sequences.PackedSequence], config: Config) -> int:
  """The static size of the prefix of these prompts.

  A prompt longer than the largest bucket takes the next power of two: nothing
  is left out of an evaluation for its length.
  """
  prefix = batching.sizes(rows)[0]
  return next((b for b in config.data.buckets.prefix if b >= prefix),
              1 << (prefix - 1).bit_length())


def prompt_batch(rows: Sequence[sequences.PackedSequence], config: Config,
                 pad: int = 0) -> batching.Batch:
  """Collates prompts, the prefix in the smallest bucket; a readout has one slot, or as
  many as are given of it."""
  return batching.collate(rows, prefix_width(rows, config), *batching.sizes(rows)[1:], pad)


def evaluate(predictor: Predictor, examples: Sequence[Example], dataset: str, split: str,
             rule: str, progress: Callable[[int, int], None] | None = None,
             ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """Scores the answers to all examples.

  Args:
    predictor: method, model and parameters.
    examples: the problems.
    dataset, split: names for the result.
    rule: how answers are compared (answer_matching.RULES).
    progress: called with (problems done, problems in all) after each.

  Returns:
    the result (see `summarize`), and one record a problem.
  """
  config = predictor.config
  questions = [e.question for e in examples]
  sampled = (predictor.texts(questions, config.eval.samples) if config.eval.samples
             else iter([None] * len(questions)))
  records = []
  greedy = predictor.texts(questions)
  for index, (example, texts, draws) in enumerate(zip(examples, greedy, sampled, strict=True)):
    right = (example.answer, *example.others)
    record = {
        'dataset': dataset, 'split': split, 'index': index, 'question': example.question,
        'steps': len(example.steps), 'answer': example.answer, 'too_long': texts is None,
        'predictions': texts or [],
        'correct': [answer_matching.correct(rule, t, right) for t in texts or []]}
    if config.eval.samples:
      record['samples'] = draws or []
      record['samples_correct'] = [answer_matching.correct(rule, t, right) for t in draws or []]
    if rule == 'free_text':
      record['overlap'] = answer_matching.overlap(texts[-1] if texts else '', right)
    records.append(record)
    if progress:
      progress(index + 1, len(questions))
  return summarize(records, config, dataset, split, rule), records


def summarize(records: Sequence[dict[str, Any]], config: Config, dataset: str, split: str,
              rule: str) -> dict[str, Any]:
  """Accuracy in [0, 1], with counts and standard errors.

  `final` is the headline: the last readout. `any` is right after at least one
  block, an upper bound. A question too long for the model counts as wrong. Of free text,
  `overlap` has mean and standard error of token F1 and ROUGE-L of the last readout.
  """
  n = len(records)
  count = max(1, *(len(r['correct']) for r in records))  # 1: no question may have fitted
  padded = [r['correct'] or [False] * count for r in records]
  hits = {'final': sum(c[-1] for c in padded), 'any': sum(any(c) for c in padded)}
  if config.eval.samples:
    hits[f'pass@{config.eval.samples}'] = sum(any(r['samples_correct']) for r in records)
  accuracy = {name: value / n for name, value in hits.items()}
  groups = collections.defaultdict(list)
  for record, correct in zip(records, padded, strict=True):
    groups[record['steps']].append(correct[-1])
  per_block = [sum(column) / n for column in zip(*padded, strict=True)]
  return {
      'method': config.method, 'about': methods.get(config.method).about,
      'dataset': dataset, 'split': split, 'n': n, 'rule': rule,
      **({'tolerance': answer_matching.TOLERANCE} if rule == 'numeric_close' else {}),
      'accuracy': {**accuracy, 'per_block': per_block},
      'standard_error': {**{name: _error(a, n) for name, a in accuracy.items()},
                         'per_block': [_error(a, n) for a in per_block]},
      'by_steps': {str(steps): {'n': len(c), 'final': sum(c) / len(c),
                                'standard_error': _error(sum(c) / len(c), len(c))}
                   for steps, c in sorted(groups.items())},
      **({'overlap': {name: mean_error([r['overlap'][name] for r in records])
                      for name in records[0]['overlap']}} if rule == 'free_text' else {}),
      'too_long': sum(r['too_long'] for r in records),
      'seed': config.seed, 'causal': config.causal}


def _error(share: float, n: int) -> float:
  """Standard error of a share of n."""
  return math.sqrt(share * (1 - share) / n)


def mean_error(values: Sequence[float]) -> dict[str, float]:
  """Mean and standard error."""
  return {'mean': statistics.fmean(values),
          'standard_error': float(stats.sem(values)) if len(values) > 1 else 0.0}
