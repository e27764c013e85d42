"""Language modelling on plain text: batches, the loss of a whole split, continuations."""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from latent_reasoning import batching, methods, sequences
from latent_reasoning.config import Config
from latent_reasoning.errors import InputError
from latent_reasoning.eval import decoding
from latent_reasoning.methods import language_model
from latent_reasoning.parallel import sharding
from latent_reasoning.train import batches
from latent_reasoning.train import train_step as step_lib
from latent_reasoning.train.curriculum import Curriculum


@dataclasses.dataclass(frozen=True)
class Ids:
  """Token ids of both splits, int32, the report of `data.text.load`, and what each row begins
  with: BOS or nothing."""
  train: np.ndarray
  valid: np.ndarray
  report: dict
  start: tuple[int, ...] = ()


def encode(found, tokenizer) -> Ids:
  """Tokenizes a `data.text.Text`."""
  train, valid = (np.array(tokenizer.encode(t), np.int32) for t in (found.train, found.valid))
  counts = {'train_tokens': len(train), 'valid_tokens': len(valid)}
  return Ids(train, valid, {**found.report, **counts}, tuple(tokenizer.start))


def rows(ids: np.ndarray, weights: np.ndarray | None = None) -> batching.Batch:
  """Rows [B, T + 1] of text as a batch that predicts every next token."""
  size, length = ids.shape[0], ids.shape[1] - 1
  place = np.broadcast_to(np.arange(length, dtype=np.int32), (size, length))
  zeros = np.zeros((size, length), np.int32)
  weights = np.ones((size, length), np.float32) if weights is None else weights
  return batching.Batch(ids[:, :-1], place, ids[:, 1:], weights, zeros, zeros, place + 1,
                        np.zeros((size, 0), np.int32), length, causal_prefix=True)


class Batches(batches.Stepwise):
  """Random crops of the training text, a function of (seed, step), as in nanoGPT; each
  behind `start`, BOS or nothing."""

  def __init__(self, config: Config, ids: np.ndarray, curriculum: Curriculum,
               start: Sequence[int] = ()):
    self.config, self.ids, self.curriculum, self.start = config, ids, curriculum, start
    self.method = methods.get(config.method)
    if config.data.seq_len > config.model.max_positions:
      raise InputError(f'config.data.seq_len is {config.data.seq_len}, above config.model.'
                       f'max_positions {config.model.max_positions}{batches.window(config)}')
    if len(ids) <= config.data.seq_len:
      raise InputError(f'the training text has {len(ids)} tokens; expected more than '
                       f'config.data.seq_len {config.data.seq_len}')

  def at(self, step: int) -> batching.Batch:
    """Returns the rows of a step."""
    length = self.config.data.seq_len + 1 - len(self.start)
    draw = np.random.default_rng((self.config.seed, step))
    at = draw.integers(len(self.ids) - length + 1, size=self.config.optim.batch_size)
    return rows(np.stack([[*self.start, *self.ids[i:i + length]] for i in at]))


@functools.partial(jax.jit, static_argnums=0)
def _sums(model, params, batch):
  return language_model.next_token(model, params, batch)[1]


def loss(model, params, ids: np.ndarray, block: int, batch_size: int,
         start: Sequence[int] = ()) -> dict[str, float]:
  """Mean loss in nats over every token of a split; over all but the first without `start`.

  The text is cut into blocks of `block` tokens side by side, each behind `start`; the last
  may be short.

  Returns:
    {'loss', 'token_accuracy', 'tokens'}.
  """
  count, size = len(ids) - (not start), block + 1 - max(1, len(start))
  if mesh := sharding.mesh_of(params):
    batch_size += -batch_size % sharding.parts(mesh)  # each device has as many rows
  blocks = -(-count // size)
  blocks = -(-blocks // batch_size) * batch_size  # whole batches, so that one shape serves
  weights = (np.arange(blocks * size) < count).astype(np.float32).reshape(blocks, size)
  weights = np.pad(weights, ((0, 0), (block - size, 0)))  # BOS itself is not predicted
  padded = np.zeros(blocks * size + 1, np.int32)
  padded[:len(ids)] = ids
  cut = padded[:-1].reshape(blocks, size)
  cut = np.concatenate([np.tile(np.array(start, np.int32), (blocks, 1)), cut] if start else
                       [cut, padded[1:].reshape(blocks, size)[:, -1:]], axis=1)
  total = {'loss': 0.0, 'correct': 0.0, 'weight': 0.0}
  for start in range(0, blocks, batch_size):
    part = slice(start, start + batch_size)
    batch = rows(cut[part], weights[part])
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
      sums = _sums(model, params, sharding.batch(batch, mesh) if mesh else batch)
    sums = jax.device_get(sums)
    total = {name: total[name] + float(sums[name]) for name in total}
  return {'loss': total['loss'] / total['weight'],
          'token_accuracy': total['correct'] / total['weight'], 'tokens': count}


def generate(config: Config, model, params, tokenizer, prompt: str, tokens: int) -> str:
  """Continues a prompt at eval.temperature and eval.top_k (temperature 0: greedy).

  Half a block at a time, each from the half block before it, so that a text may be
  longer than the model's positions.
  """
  special, half = sequences.special_tokens(tokenizer), max(1, config.data.seq_len // 2)
  ids = tokenizer.encode(prompt)
  if not ids:
    raise InputError('the prompt is empty; give one with --question="..."')
  start = tokenizer.start or tokenizer.encode('\n')  # position 0 never predicts
  ids = [*start, *ids]
  head, said = decoding.head_kernel(model, params), 0
  while said < tokens:
    context = ids[-half:]
    row = sequences.causal(context, [sequences.Readout(len(context))])
    rng = step_lib.key(config.seed, step_lib.SAMPLE, said)
    out = sharding.by_rows(lambda batch, rng=rng: decoding.generate(
        model, params, head, batch, rng, config.eval.temperature or 1.0, end=-1,
        pad=special.pad, max_tokens=half, sample=config.eval.temperature > 0,
        top_k=config.eval.top_k), params, batching.collate([row], half, 1, 1, special.pad))
    ids += out[0, 0].tolist()
    said += half
  return tokenizer.decode(ids[len(start):len(ids) - (said - tokens)])


def halves(ids: np.ndarray, block: int, count: int,
           seed: int) -> Sequence[sequences.TokenizedExample]:
  """Crops of the text for the leakage checks: the second half as an answer to the first."""
  length = min(block, len(ids) - 1)
  if length < 4:
    raise InputError(f'config.data.seq_len is {block}; expected at least 4 for leakage checks')
  at = np.random.default_rng(seed).integers(len(ids) - length, size=count)
  return [sequences.TokenizedExample(ids[i:i + length // 2].tolist(), [],
                                     ids[i + length // 2:i + length - 1].tolist()) for i in at]
