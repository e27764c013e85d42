"""Interventions at inference: does the answer come from what the blocks hold?

Keys and values of block positions are changed in the prefill cache, in all layers, and
the final readout is decoded from it. The readout's first token is predicted at the last
block's `</b>`, whose state the prefill computed from untouched blocks; so that token is
read once more, as the readout's own first input, and sees only the changed ones. Without
a change this is ordinary decoding, to rounding.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from latent_reasoning import progress, sequences
from latent_reasoning.analysis import block_states
from latent_reasoning.data.example import Example
from latent_reasoning.errors import InputError
from latent_reasoning.eval import answer_matching
from latent_reasoning.eval.evaluator import Predictor, prefix_width
from latent_reasoning.models.attention import Cache


@flax.struct.dataclass
class Edit:
  """What stands in the cache in place of the states of some prefix positions.

  Attributes:
    at: bool [B, P], these positions.
    row: int32 [B], the row whose states come instead.
    position: int32 [B, P], and from where in it.
    scale: float32 scalar, times which they come; 0: zeros.
  """
  at: chex.Array
  row: chex.Array
  position: chex.Array
  scale: chex.Array

  def __call__(self, cache: Cache) -> Cache:
    def change(a):  # [..., B, M, P, H]
      other = jnp.take(a, self.row, axis=-4)
      other = jnp.take_along_axis(other, jnp.broadcast_to(
          self.position[:, None, :, None], other.shape), axis=-2)
      return jnp.where(self.at[:, None, :, None], other * self.scale.astype(a.dtype), a)
    return cache.replace(prefix_k=jax.tree.map(change, cache.prefix_k),
                         prefix_v=jax.tree.map(change, cache.prefix_v))


def reread(row: sequences.PackedSequence, close: int, sees_question: bool = True,
           question: int = 0) -> sequences.PackedSequence:
  """A prompt's final readout, beginning with the `</b>` that it is attached to.

  Args:
    row: of rim.prompt.
    close: the id of `</b>`.
    sees_question: False: the readout, that `</b>` included, sees blocks alone.
    question: tokens of the question, in that case.
  """
  since = row.readouts[-1].visible_from if sees_question else question
  out = sequences.Readout(row.readouts[-1].visible_until - 1, visible_from=since, start=close)
  return dataclasses.replace(row, readouts=[out])


def donors(groups: Sequence[Any], seed: int = 0) -> np.ndarray:
  """Another member of the same group for each: int [N], itself where it is alone."""
  rng, other = np.random.default_rng(seed), np.arange(len(groups))
  for group in sorted(set(groups)):
    own = rng.permutation([i for i, g in enumerate(groups) if g == group])
    other[own] = np.roll(own, 1)
  return other


def edit(rows: Sequence[sequences.PackedSequence], lengths: Sequence[int], width: int,
         other: np.ndarray,
         scale: float, block: int | None, size: int) -> Edit:
  """An edit of block positions, of one block (from 0) or of all.

  Args:
    rows: prompts, with equally many blocks.
    lengths: tokens of their questions.
    width: P, of the batch.
    other: int [B], the row that each takes its states from.
    scale: as `Edit`.
    block: which; None: all.
    size: tokens of a block.
  """
  place, n = np.arange(width), np.array(lengths)[:, None]
  inside = (place >= n) & (place < np.array([[len(r.prefix)] for r in rows]))
  at = inside if block is None else inside & ((place - n) // size == block)
  position = np.clip(place - n + n[other], 0, width - 1)
  return Edit(at, np.asarray(other, np.int32), position.astype(np.int32), np.float32(scale))


def transplant(predictor: Predictor, question: str, donor: str,
               block: int | None = None) -> tuple[str, str, str]:
  """The final answer to a question, that to a donor, and that to the question with the
  donor's block in place of its own.

  Args:
    donor: another question; of as many tokens, or positions do not match.
    block: which, from 0; None: all.
  """
  block_states.require(predictor.config)
  wide = predictor.config.rim.block_length
  prompts = [predictor.row(q) for q in (question, donor)]
  lengths = [len(r.prefix) - wide * predictor.blocks for r in prompts]
  rows = [reread(r, predictor.special.block_close) for r in prompts]
  change = edit(rows, lengths, prefix_width(rows, predictor.config), np.array([1, 0]), 1, block,
                wide)
  (own,), (other,) = predictor.read(predictor.generate(rows))
  (changed,), _ = predictor.read(predictor.generate(rows, edit=change))
  return own, other, changed


@dataclasses.dataclass(frozen=True)
class Part:
  """Problems of one batch, to be answered again and again.

  Attributes:
    prompts: of the method, the last one repeated until there are eval.batch_size.
    lengths: tokens of their questions.
    truth: the right answers, of those that are no repetition.
    say: (rows, edit or None) -> the answers to these, as `answer_matching.canonical` has them.
  """
  prompts: list[sequences.PackedSequence]
  lengths: list[int]
  truth: list[str]
  say: Callable[..., np.ndarray]


def parts(predictor: Predictor, examples: Sequence[Example], rule: str,
          what: str) -> Iterator[Part]:
  """The problems that fit, batch by batch; `what` is done with them, for the progress."""
  size = predictor.config.eval.batch_size
  for index, prompts in progress.track(
      block_states.parts(predictor, examples), f'{what}, batches of {len(examples):,} problems',
      -(-len(examples) // size)):
    real = len(prompts)

    def say(rows, edit=None, n=real):
      texts = predictor.read(predictor.generate(rows, edit=edit)[:n])
      return np.array([answer_matching.canonical(text[-1], rule) for text in texts])
    lengths = [len(predictor.tokenizer.question(examples[i].question)) for i in index]
    yield Part(block_states.fill(prompts, size), block_states.fill(lengths, size),
               [answer_matching.canonical(examples[i].answer, rule) for i in index], say)


def interventions(predictor: Predictor, examples: Sequence[Example],
                  rule: str) -> dict[str, Any]:
  """Accuracy of the final answer under each intervention.

  Donors are in the same batch: for 'transplanted', a question of the same length, so
  that every position matches; for 'any length', any other. Where a problem has no donor
  it is left out of that line ('n').

  Returns:
    {'n', 'blocks', 'lines': [{'name', 'n', 'accuracy', 'standard_error', 'changed',
    'donor', 'chance'}]}: 'changed', answers that are not what the model says untouched;
    'donor', among those whose donor says something else untouched, the share that becomes
    what the donor says; 'chance', the share that is what another's donor says.
  """
  block_states.require(predictor.config)
  if not predictor.config.rim.readout_sees_question:
    raise InputError('config.rim.readout_sees_question is False: only the `</b>` a readout '
                     'is attached to sees the question, and it cannot be read again; expected '
                     'True')
  ids, wide, count = predictor.special, predictor.config.rim.block_length, predictor.blocks
  found: dict[str, list] = {}
  total = 0
  for part in parts(predictor, examples, rule, f'{count * 2 + 7} interventions on blocks'):
    n, lengths = len(part.truth), part.lengths
    total += n
    rows = [reread(r, ids.block_close) for r in part.prompts]
    width = prefix_width(rows, predictor.config)

    def changed(scale, other, block=None, rows=rows, lengths=lengths, width=width, part=part):
      return part.say(rows, edit(rows, lengths, width, other, scale, block, wide))

    blind = [reread(r, ids.block_close, False, length)
             for r, length in zip(part.prompts, lengths, strict=True)]

    own, truth = np.arange(len(rows)), part.truth
    alike = np.append(donors(lengths[:n]), own[n:])
    any_one = np.append(donors([0] * n, seed=1), own[n:])
    plain = part.say(rows)
    lines = {
        'untouched': (plain, own),
        'all blocks zeroed': (changed(0, own), own),
        'all blocks transplanted': (changed(1, alike), alike),
        'all blocks transplanted, any length': (changed(1, any_one), any_one),
        'readout sees blocks only': (part.say(blind), own),
        'readout sees blocks only, transplanted': (changed(1, alike, rows=blind), alike),
        'no blocks': (part.say([
            sequences.causal(r.prefix[:length], [sequences.Readout(length)])
            for r, length in zip(part.prompts, lengths, strict=True)]), own)}
    for k in range(count):
      lines[f'block {k + 1} zeroed'] = changed(0, own, k), own
    for k in range(count):
      lines[f'block {k + 1} transplanted'] = changed(1, alike, k), alike
    for name, (said, other) in lines.items():
      other = other[:n]
      needs = 'transplanted' in name
      found.setdefault(name, []).extend(
          (said[b], truth[b], plain[b], plain[other[b]] if needs else None)
          for b in range(n) if not needs or other[b] != b)
  return {'n': total, 'blocks': count,
          'lines': [line_of(name, records) for name, records in found.items()]}


def line_of(name: str, records: list[tuple]) -> dict[str, Any]:
  """What became of some answers, of (said, right, said untouched, what the donor says or None)
  each."""
  if not records:
    return {'name': name, 'n': 0, 'accuracy': None}
  right = np.array([said == truth for said, truth, _, _ in records])
  line = {'name': name, 'n': len(records), 'accuracy': float(right.mean()),
          'standard_error': float(right.std() / len(right)**0.5),
          'changed': float(np.mean([said != plain for said, _, plain, _ in records]))}
  apart = [(said, donor) for said, _, plain, donor in records
           if donor is not None and donor != plain]
  if apart:
    line['donor'] = float(np.mean([said == donor for said, donor in apart]))
    said = np.array([s for s, _ in apart])
    line['chance'] = float(np.mean(np.roll(said, 1) == np.array([d for _, d in apart])))
  return line
