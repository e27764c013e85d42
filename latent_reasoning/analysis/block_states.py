"""What RiM's blocks hold and say: collected once, for rules, probes and figures."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from latent_reasoning import batching, methods, progress, sequences
from latent_reasoning.config import Config
from latent_reasoning.data.example import Example
from latent_reasoning.errors import InputError
from latent_reasoning.eval import answer_matching
from latent_reasoning.eval.evaluator import Predictor
from latent_reasoning.parallel import sharding
from latent_reasoning.train import losses


@dataclasses.dataclass(frozen=True, repr=False)
class BlockActivations:
  """N problems, K blocks each, S steps at most.

  Attributes:
    index: int [N], places in the split.
    length: int [N], tokens of the question.
    states: float32 [N, K, layers + 1, D], at each block's `</b>`: the residual stream
      after every layer, then the normed state that the head reads.
    predictions: str [N, K], the answers.
    votes: str [N, K], one spelling for equal answers.
    correct: bool [N, K]; False where a problem has no answer.
    confidence: float32 [N, K], mean log-probability of the generated tokens of an
      answer, its end token included.
    values: float64 [N, S], result of each step of the true chain; NaN: none.
    next_token, answer_token: int [N, K] and [N], first token of the true step that
      follows block k (of the answer, after the last), and of the true answer; -1: none.
  """
  index: np.ndarray
  length: np.ndarray
  states: np.ndarray
  predictions: np.ndarray
  votes: np.ndarray
  correct: np.ndarray
  confidence: np.ndarray
  values: np.ndarray
  next_token: np.ndarray
  answer_token: np.ndarray

  def __repr__(self) -> str:
    count, blocks, layers, width = self.states.shape
    right = ', '.join(f'{100 * share:.1f}' for share in self.correct.mean(0))
    return (f'{count:,} problems, {blocks} blocks each: states {layers} x {width} (layers and '
            f'the final norm, width), answers right after each block {right}%')

  def halves(self) -> tuple['BlockActivations', 'BlockActivations']:
    """Every other problem, and the rest."""
    return tuple(BlockActivations(**{f.name: getattr(self, f.name)[start::2]
                                     for f in dataclasses.fields(self)}) for start in (0, 1))

  def save(self, path: pathlib.Path) -> None:
    np.savez(path, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})

  @classmethod
  def load(cls, path: pathlib.Path) -> 'BlockActivations':
    with np.load(path) as found:
      return cls(**found)


def require(config: Config) -> None:
  """Raises InputError where there are no blocks to look at."""
  if not methods.get(config.method).has_blocks:
    raise InputError(f'method {config.method} has no blocks; expected method rim')
  if config.imm.write_policy:
    raise InputError("config.imm.write_policy is set, and its banks would carry what the "
                     "blocks' keys and values do not; expected ''")
  if config.rim.passes > 1:
    raise InputError(f'there are {config.rim.passes} passes over the blocks, but states of '
                     'blocks are those of one; expected config.rim.passes 1 and '
                     'config.eval.passes 0')


def parts(predictor: Predictor, examples: Sequence[Example]) -> Iterator[tuple[list, list]]:
  """Yields (indices, rows) of the problems that fit, at most eval.batch_size at a time."""
  rows = [(i, predictor.row(e.question)) for i, e in enumerate(examples)]
  fitting = [(i, row) for i, row in rows if predictor.fits(row)]
  if not fitting:
    raise InputError('no question fits the positions of the model with its blocks and '
                     'config.eval.max_new_tokens; lower config.eval.blocks or max_new_tokens')
  size = predictor.config.eval.batch_size
  for start in range(0, len(fitting), size):
    yield tuple(map(list, zip(*fitting[start:start + size], strict=True)))


def fill(rows: list, size: int) -> list:
  """Repeats the last row, so that one compiled shape serves every part."""
  return rows + rows[-1:] * (size - len(rows))


def collect(predictor: Predictor, examples: Sequence[Example], rule: str,
            what: str = '') -> BlockActivations:
  """Answers every problem that fits at every block, and looks at the blocks' states.

  Args:
    rule: how answers are compared (answer_matching.RULES).
    what: which problems they are, for the progress.
  """
  require(predictor.config)
  size, collected = predictor.config.eval.batch_size, []
  for index, rows in progress.track(
      parts(predictor, examples), f"states of the blocks of {len(examples):,} "
      f"{what or 'problems'}",
      -(-len(examples) // size)):
    filled = fill(rows, size)
    said = np.asarray(predictor.generate(filled))
    states, confidence = observe(predictor, filled, said)
    n = len(rows)
    collected.append((index, states[:n], predictor.read(said[:n]), confidence[:n]))
  index, states, texts, confidence = (
      [x for part in column for x in part] for column in zip(*collected, strict=True))
  own = [examples[i] for i in index]
  encoded = sequences.encode(own, predictor.tokenizer)
  blocks = predictor.blocks
  steps = max(1, *(len(e.steps) for e in own))
  return BlockActivations(
      np.array(index), np.array([len(e.question) for e in encoded]),
      np.stack(states), np.array(texts),
      np.array([[answer_matching.canonical(t, rule) for t in row] for row in texts]),
      np.array([[bool(e.answer) and answer_matching.correct(rule, t, (e.answer, *e.others))
                 for t in row] for e, row in zip(own, texts, strict=True)]),
      np.stack(confidence), np.array([_values(e.steps, steps) for e in own]),
      np.array([_next_tokens(e, blocks) for e in encoded]),
      np.array([_first(e.answer) for e in encoded]))


def _values(steps: Sequence[str], count: int) -> list[float]:
  found = [answer_matching.number(step.rpartition('=')[2]) for step in steps]
  known = [float('nan') if v is None else float(v) for v in found]
  return known + [float('nan')] * (count - len(known))


def _next_tokens(example: sequences.TokenizedExample, blocks: int) -> list[int]:
  texts = [*example.steps, example.answer][1:] or [example.answer]
  return [_first(texts[min(k, len(texts) - 1)]) for k in range(blocks)]


def _first(tokens: Sequence[int]) -> int:
  return tokens[0] if len(tokens) else -1


def observe(predictor: Predictor, rows: Sequence[sequences.PackedSequence],
            said: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """One forward pass over rows with what their readouts said.

  Args:
    said: int [B, K, T], tokens of each readout.

  Returns:
    states [B, K, layers + 1, D] where each readout is attached to the prefix, and the mean
    log-probability of its tokens [B, K].
  """
  special = predictor.special
  spoken = [dataclasses.replace(row, readouts=[
      dataclasses.replace(out, out=_with_end(tokens, special.end))
      for out, tokens in zip(row.readouts, own, strict=True)])
      for row, own in zip(rows, said.tolist(), strict=True)]
  prefix, count, readout = batching.sizes(spoken)
  prefix, readout = _round(prefix), _round(readout)  # few shapes
  batch = batching.collate(spoken, prefix, count, readout, special.pad)
  ends = np.array([[out.visible_until - 1 for out in row.readouts] for row in spoken])
  look = functools.partial(_observe, predictor.model, predictor.params)
  return tuple(map(np.asarray, sharding.by_rows(look, predictor.params, batch, ends)))


def _round(length: int) -> int:
  return 1 << (length - 1).bit_length()


def _with_end(tokens: list[int], end: int) -> list[int]:
  return tokens[:tokens.index(end) + 1] if end in tokens else tokens


@functools.partial(jax.jit, static_argnums=0)
def _observe(model, params, batch: batching.Batch, ends):
  out = model.apply({'params': params}, batch.tokens, batch.positions, batch.mask)
  hidden, layers = out.hidden, out.layers.hidden
  at, targets, weights = losses.predictions(batch)
  picked = jnp.take_along_axis(hidden, at[..., None], axis=1)
  logits = jax.nn.log_softmax(model.apply({'params': params}, picked, method='head'))
  logp = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  count = ends.shape[1]

  def total(a):  # of each readout: what its anchor predicts, and its own tokens
    return a[:, :count] + a[:, count:].reshape(*ends.shape, -1).sum(-1)
  states = jnp.stack([jnp.take_along_axis(a, ends[..., None], axis=1)
                      for a in (*layers, hidden)], axis=2)
  spoken = (weights > 0).astype(jnp.float32)
  return states.astype(jnp.float32), total(logp * spoken) / total(spoken)


def by_budget(predictor: Predictor, examples: Sequence[Example], rule: str) -> list[float]:
  """Accuracy with 0, 1, … `predictor.blocks` blocks, problems that do not fit left out.

  A readout sees no block after its own, so one row holds every budget.
  """
  require(predictor.config)
  size, hits = predictor.config.eval.batch_size, []
  size_of_block = predictor.config.rim.block_length
  for index, rows in parts(predictor, examples):
    with_none = [dataclasses.replace(row, readouts=[
        sequences.Readout(row.readouts[0].visible_until - size_of_block),
        *row.readouts]) for row in rows]
    texts = predictor.read(predictor.generate(fill(with_none, size))[:len(rows)])
    hits += [[answer_matching.correct(rule, t, (examples[i].answer, *examples[i].others))
              for t in row]
             for i, row in zip(index, texts, strict=True)]
  return np.mean(hits, axis=0).tolist()
