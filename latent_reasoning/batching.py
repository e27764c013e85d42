"""From examples to batches: a pure function of (seed, step), run ahead by grain.

`Batches.at(step)` is random access, so the position of a run in its data is the
step itself: resuming needs no iterator state, and any number of processes sees
the same order. Every process lays out the whole batch, which is small, and puts its part of
it on its own devices (sharding.batch), whatever the mesh.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import chex
import flax.struct
import grain
import numpy as np

from latent_reasoning import sequences
from latent_reasoning.config import BucketConfig, Config
from latent_reasoning.data.example import Example
from latent_reasoning.errors import InputError

if TYPE_CHECKING:
  from latent_reasoning.train.curriculum import Curriculum


@flax.struct.dataclass
class Mask:
  """What the positions of a row may see.

  Attributes:
    segment: int32 [B, T]; 0 in the prefix, k in readout k.
    visible_from, visible_until: int32 [B, T]; the part of the prefix that is visible.
    until: int32 [B, K]; how much of the prefix each readout sees.
    prefix: P, the first P positions of a row are its prefix.
    count: K, the rest is K readouts of equal length; 0 for a plain prefix.
    unseen_from, unseen_until: int32 [B, T]; a part of the visible prefix that is not seen.
      None: there is none.
    causal_prefix: whether each token of the prefix sees those up to itself, which a kernel
      then need not be told; of padding, which no token sees, nothing is said.
    own: bool [B, R, S], what each of R tokens sees of the S of its own readout, in place of
      those before it; None: those.
  """
  segment: chex.Array
  visible_from: chex.Array
  visible_until: chex.Array
  until: chex.Array
  prefix: int = flax.struct.field(pytree_node=False)
  count: int = flax.struct.field(pytree_node=False)
  unseen_from: chex.Array | None = None
  unseen_until: chex.Array | None = None
  own: chex.Array | None = None
  causal_prefix: bool = flax.struct.field(pytree_node=False, default=False)

  def cut(self, how: Callable[[chex.Array], chex.Array]) -> 'Mask':
    """The same of some positions: `how` takes them from [B, T]."""
    return self.replace(**{name: how(a) for name in (
        'segment', 'visible_from', 'visible_until', 'unseen_from', 'unseen_until')
        if (a := getattr(self, name)) is not None})

  def part(self, start: int, stop: int) -> 'Mask':
    """The same for positions start … stop - 1 of a row."""
    return self.cut(lambda a: a[:, start:stop])


@flax.struct.dataclass
class DecoderTargets:
  """Reasoning that a reasoning decoder should say, C texts a row.

  Attributes:
    at: int32 [B, C, S], positions that a text is read out of, those of the readout as if they
      stood right behind the tokens of the prefix.
    targets: int32 [B, C, R], its tokens, the end token included.
    weights: float32 [B, C, R], equal for each of them, 0 for padding.
  """
  at: np.ndarray
  targets: np.ndarray
  weights: np.ndarray

  def mean(self, over: str, total: float) -> 'DecoderTargets':
    """Weights with which the loss, divided by a total, is a mean over 'tokens' or 'texts'."""
    said = self.weights > 0
    count = said.sum() if over == 'tokens' else said.any(-1).sum()
    return self.replace(weights=np.float32(said * (total / max(1, count))))


@flax.struct.dataclass
class Batch:
  """Rows of one static shape, the same struct for every method.

  A row of length L = P + K·R holds the prefix, padded to P, and K readouts,
  each padded to R. Its mask follows from three integer vectors (masks). Where there are
  several passes over the last n tokens of the prefix (sequences.Loops), those of the second
  pass, the third … stand behind the first in places of their own, which P counts.

  Attributes:
    tokens, positions: int32 [B, L].
    targets: int32 [B, L], the token predicted at a position.
    weights: float32 [B, L], of that prediction in the loss; 0 for none.
    segment, visible_from, visible_until: int32 [B, L].
    anchors: int32 [B, K], the prefix position which predicts the first token
      of a readout; 0, which never predicts, for none.
    prefix: P.
    decoder_targets: for a reasoning decoder; None: there is none.
    latents: how many stand at the beginning of each readout (models.latents), at most.
    own_latents: int32 [B, K], how many of each; None: as many.
    started: whether the first token of each readout is given.
    mark: tokens of the answer's mark that the text of each readout begins with, of 'codi'.
    teacher: rows that objective 'codi' learns from; None: there are none.
    loops: the passes over the end of the prefix; None: one.
    unseen_from, unseen_until: int32 [B, L], with loops: what a readout does not see of the
      prefix before its visible_until, which is the blocks of other passes.
    causal_prefix: as Mask.causal_prefix.
  """
  tokens: np.ndarray
  positions: np.ndarray
  targets: np.ndarray
  weights: np.ndarray
  segment: np.ndarray
  visible_from: np.ndarray
  visible_until: np.ndarray
  anchors: np.ndarray
  prefix: int = flax.struct.field(pytree_node=False)
  decoder_targets: DecoderTargets | None = None
  latents: int = flax.struct.field(pytree_node=False, default=0)
  own_latents: np.ndarray | None = None
  started: bool = flax.struct.field(pytree_node=False, default=False)
  mark: int = flax.struct.field(pytree_node=False, default=0)
  teacher: 'Batch | None' = None
  loops: sequences.Loops | None = flax.struct.field(pytree_node=False, default=None)
  unseen_from: np.ndarray | None = None
  unseen_until: np.ndarray | None = None
  causal_prefix: bool = flax.struct.field(pytree_node=False, default=False)

  def real(self, pad: int) -> int:
    """How many of its tokens are no padding, a teacher's included."""
    own = int(np.count_nonzero(self.tokens != pad))
    return own + (self.teacher.real(pad) if self.teacher else 0)

  @property
  def mask(self) -> Mask:
    count = self.anchors.shape[1]
    readout = max(1, (self.tokens.shape[1] - self.prefix) // max(1, count))
    until = self.visible_until[:, self.prefix::readout]
    return Mask(self.segment, self.visible_from, self.visible_until, until, self.prefix,
                count, self.unseen_from, self.unseen_until,
                causal_prefix=self.causal_prefix)


def collate(rows: Sequence[sequences.PackedSequence], prefix: int, count: int, readout: int,
            pad: int = 0) -> Batch:
  """Lays rows out in arrays of one shape: P = prefix, K = count, R = readout; P is longer by
  the places of later passes, where there are some.

  What the padding holds does not matter: no real token sees it, and its weight
  is 0. It sees the row's first token, because a softmax over nothing is a mean
  over everything.
  """
  first, loops = prefix, rows[0].loops
  if any(row.loops != loops for row in rows):
    raise ValueError('rows of one batch have the same passes')
  if loops:
    prefix += (loops.passes - 1) * loops.size
  size, length = len(rows), prefix + count * readout
  tokens = np.full((size, length), pad, np.int32)
  positions = np.zeros((size, length), np.int32)
  targets = np.full((size, length), pad, np.int32)
  weights = np.zeros((size, length), np.float32)
  segment = np.zeros((size, length), np.int32)
  segment[:, prefix:] = np.repeat(np.arange(1, count + 1), readout)
  visible_from = np.zeros((size, length), np.int32)
  visible_until = np.ones((size, length), np.int32)
  anchors = np.zeros((size, count), np.int32)
  unseen_from, unseen_until = np.zeros((2, size, length), np.int32)
  own_latents = np.zeros((size, count), np.int32)
  for b, row in enumerate(rows):
    n = len(row.prefix)
    tokens[b, :n] = row.prefix
    positions[b, :n] = np.arange(n)
    visible_until[b, :n] = row.visible_until
    if loops:
      before = n - loops.size  # what is read once
      for start in range(first, prefix, loops.size):
        again = slice(start, start + loops.size)
        tokens[b, again], positions[b, again] = row.prefix[before:], np.arange(before, n)
        visible_until[b, again] = before
    if row.labels:  # of the last pass
      stop = prefix if loops else n
      targets[b, stop - len(row.labels):stop] = np.maximum(row.labels, 0)
      weights[b, stop - len(row.labels):stop] = np.greater_equal(row.labels, 0)
    for k, out in enumerate(row.readouts):
      inputs, start = out.inputs, prefix + k * readout
      stop, begin = start + len(inputs), start + out.latents
      tokens[b, start:stop], own_latents[b, k] = inputs, out.latents
      positions[b, start:start + readout] = np.arange(out.visible_until,
                                                      out.visible_until + readout)
      visible_from[b, start:start + readout] = out.visible_from
      until = out.visible_until
      if out.reads > 1:  # in the places of that pass
        place = first + (out.reads - 2) * loops.size
        unseen_from[b, start:start + readout] = before
        unseen_until[b, start:start + readout] = place
        until += place - before
      visible_until[b, start:start + readout] = until
      if out.start is None:
        anchors[b, k] = until - 1
        if out.out:
          targets[b, until - 1] = out.out[0]
          weights[b, until - 1] = out.weight
          targets[b, start:stop] = out.out[1:]
      else:
        anchors[b, k] = until - 1 if out.latents else 0  # a latent begins there
        if out.out:
          targets[b, begin:stop] = out.out
      weights[b, begin:stop] = out.weight
  outs = [out for row in rows for out in row.readouts]
  return Batch(tokens, positions, targets, weights, segment, visible_from,
               visible_until, anchors, prefix,
               latents=max((out.latents for out in outs), default=0),
               own_latents=own_latents if any(out.mixed for out in outs) else None,
               started=bool(outs) and all(out.start is not None for out in outs),
               mark=max((out.mark for out in outs), default=0),
               loops=loops, causal_prefix=not loops and all(
                   [*row.visible_until] == [*range(1, len(row.prefix) + 1)] for row in rows),
               **({'unseen_from': unseen_from, 'unseen_until': unseen_until}
                  if loops else {}))


def sizes(rows: Sequence[sequences.PackedSequence]) -> tuple[int, int, int]:
  """Returns the P, K, R that these rows need (R at least 1)."""
  outs = [out for row in rows for out in row.readouts]
  return (max(len(row.prefix) for row in rows), max(len(row.readouts) for row in rows),
          max(1, max(len(out.inputs) for out in outs)))


def fit(needed: int, buckets: Sequence[int], name: str) -> int:
  """Returns the smallest bucket that holds `needed`; InputError if none does."""
  for size in buckets:
    if needed <= size:
      return size
  raise InputError(f'a row needs {needed} in config.data.buckets.{name}, whose largest '
                   f'is {buckets[-1]}; add a bucket')


def bucketed(rows: Sequence[sequences.PackedSequence], buckets: BucketConfig,
             pad: int = 0) -> Batch:
  """Collates rows into the smallest static shape that holds them."""
  p, k, r = sizes(rows)
  return collate(rows, fit(p, buckets.prefix, 'prefix'), fit(k, buckets.count, 'count'),
                 fit(r, buckets.readout, 'readout'), pad)


MOMENTS = (0.0, 0.25, 0.5, 0.75, 1 - 1e-6)  # of stage 1, whose readouts may be annealed away


def buckets(config: Config, method: sequences.Method,
            encoded: Sequence[sequences.TokenizedExample], ids: sequences.SpecialTokens,
            sampled: bool) -> Config:
  """The configuration with the buckets that it does not state: the largest row of each moment
  of training, of the method and of its teacher.

  Args:
    encoded: training problems; rows longer than the model's positions do not count.
    sampled: whether there are others, for which a bucket a quarter larger is added.
  """
  stated = config.data.buckets
  if stated.prefix and stated.readout and stated.count:
    return config
  parts = method.parts(config) if method.parts else 0
  moments = [(1, part / parts) for part in range(parts)] or [(1, s) for s in MOMENTS]
  found = {'prefix': set(), 'count': set(), 'readout': set()}
  for moment in [*moments, (2, 0.0)]:
    for rows in zip(*(_rows(config, method, e, moment, ids) for e in encoded), strict=True):
      fitting = [row for row in rows if _last(row) <= config.model.max_positions]
      for sizes_of, size in zip(found.values(), sizes(fitting or rows), strict=True):
        sizes_of.add(size)
  if sampled:
    for name in ('prefix', 'readout'):
      found[name].add(-(-max(found[name]) * 5 // 32) * 8)
  return dataclasses.replace(config, data=dataclasses.replace(config.data, buckets=BucketConfig(
      **{name: getattr(stated, name) or tuple(sorted(own)) for name, own in found.items()})))


def _rows(config: Config, method: sequences.Method, encoded: sequences.TokenizedExample,
          moment: tuple[int, float], ids: sequences.SpecialTokens
          ) -> list[sequences.PackedSequence]:
  """The row of a method at a moment (stage, progress), and its teacher's."""
  own = [method.sequence(encoded, *moment, config, ids)]
  return own + ([method.teacher(encoded, moment[1], config, ids)] if method.teacher else [])


def _last(row: sequences.PackedSequence) -> int:
  """Positions that a row needs."""
  return max(len(row.prefix), *(o.visible_until + len(o.inputs) for o in row.readouts))


def collate_decoder_targets(
    rows: Sequence[Sequence[sequences.DecoderTarget]]) -> DecoderTargets:
  """Lays out what each row tells; sizes are powers of two, so that few shapes arise."""
  def size(numbers):
    return 1 << (max([1, *numbers]) - 1).bit_length()
  count = size(len(row) for row in rows)
  width = max([1, *(len(one.at) for row in rows for one in row)])
  length = size(len(one.text) for row in rows for one in row)
  decoder_targets = DecoderTargets(
      np.zeros((len(rows), count, width), np.int32),
      np.zeros((len(rows), count, length), np.int32),
      np.zeros((len(rows), count, length), np.float32))
  for b, row in enumerate(rows):
    for c, one in enumerate(row):
      decoder_targets.at[b, c] = one.at
      decoder_targets.targets[b, c, :len(one.text)] = one.text
      decoder_targets.weights[b, c, :len(one.text)] = 1
  return decoder_targets


SAMPLED = 1000  # problems whose rows say what shapes there are


class Stepwise:
  """Batches by step: `at` is random access; `iterate` runs it ahead."""

  def shapes(self, stage: int) -> int:
    """How many static shapes the batches of a stage have at most; each is a program."""
    return 1

  def iterate(self, step: int) -> Iterator[Batch]:
    """Yields the batches from a step to the end, made ahead in a thread."""
    data = grain.MapDataset.range(step, self.curriculum.total).map(self.at)
    ahead = self.config.train.prefetch
    options = grain.ReadOptions(num_threads=min(1, ahead), prefetch_buffer_size=ahead)
    return iter(data.to_iter_dataset(options))


class Batches(Stepwise):
  """The training batches of one run.

  Args:
    config: the whole configuration.
    method: of `methods`.
    examples: the training split.
    tokenizer: a `tokenizers.Tokenizer`.
    curriculum: says stage and progress of a step.
    decoder_targets: whether batches carry what a reasoning decoder should say.
  """

  def __init__(self, config: Config, method: sequences.Method, examples: Sequence[Example],
               tokenizer, curriculum: 'Curriculum', decoder_targets: bool = False):
    self.decoder_targets = decoder_targets
    self.config, self.curriculum = config, curriculum
    self.examples, self.tokenizer = examples, tokenizer
    self.method = method
    self.special = sequences.special_tokens(tokenizer)
    # A run reads one epoch and one window at a time.
    self._order = functools.lru_cache(2)(self._order)
    self._window = functools.lru_cache(2)(self._window)

  def _order(self, stage: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((self.config.seed, stage, epoch)).permutation(
        len(self.examples))

  def _window(self, stage: int, epoch: int, window: int
              ) -> list[list[sequences.TokenizedExample]]:
    """Batches whose rows are alike in length, in random order."""
    size, span = self.config.optim.batch_size, self.config.data.sort_window
    stop = len(self.examples) // size * size
    index = self._order(stage, epoch)[:stop][window * span * size:(window + 1) * span * size]
    encoded = sequences.encode([self.examples[i] for i in index], self.tokenizer)
    if span > 1:
      encoded.sort(key=lambda e: (len(e.steps), len(e.question) + sum(map(len, e.steps))))
    batches = [encoded[i:i + size] for i in range(0, len(encoded), size)]
    order = np.random.default_rng((self.config.seed, stage, epoch, window)).permutation(
        len(batches))
    return [batches[i] for i in order]

  def shapes(self, stage: int) -> int:
    """As `Stepwise.shapes`, by a sample of the problems."""
    index = np.linspace(0, len(self.examples) - 1, min(SAMPLED, len(self.examples))).astype(int)
    encoded = sequences.encode([self.examples[i] for i in index], self.tokenizer)
    if self.method.parts:  # four draws of each, evenly spaced over all
      encoded = [dataclasses.replace(e, draw=(i * 0.618 + j) / 4 % 1)
                 for i, e in enumerate(encoded) for j in range(4)]
    parts = self.method.parts(self.config) if self.method.parts and stage == 1 else 1
    found = [{self._size(e, stage, part / parts) for e in encoded} for part in range(parts)]
    if self.config.optim.batch_size > 1:
      found = [_joined(rows) for rows in found]
    return min(len(set().union(*found)), self.curriculum.lengths[stage - 1])

  def _size(self, encoded: sequences.TokenizedExample, stage: int,
            progress: float) -> tuple[int, ...]:
    """The static sizes of a batch of such rows."""
    buckets = self.config.data.buckets
    rows = [self.method.sequence(encoded, stage, progress, self.config, self.special)]
    extra = ()
    if self.decoder_targets:
      texts = collate_decoder_targets([
          self.method.decoder_targets(encoded, rows[0], self.config, self.special)])
      extra = (*texts.at.shape, texts.targets.shape[-1])
    if self.method.teacher:
      rows.append(self.method.teacher(encoded, progress, self.config, self.special))
    sized = []
    for row in rows:
      p, k, r = sizes([row])
      sized += [fit(p, buckets.prefix, 'prefix'), fit(k, buckets.count, 'count'),
                fit(r, buckets.readout, 'readout'), row.loops.passes if row.loops else 1,
                max((o.latents for o in row.readouts), default=0)]
    return *sized, *extra

  def at(self, step: int) -> Batch:
    """Returns the batch of a global step: one static shape."""
    moment = self.curriculum.at(step)
    epoch, place = divmod(moment.step, len(self.examples) // self.config.optim.batch_size)
    window, place = divmod(place, self.config.data.sort_window)
    encoded = self._window(moment.stage, epoch, window)[place]
    if self.method.parts:
      draws = np.random.default_rng((self.config.seed, step)).random(len(encoded))
      encoded = [dataclasses.replace(e, draw=float(d))
                 for e, d in zip(encoded, draws, strict=True)]
    rows = [self.method.sequence(e, moment.stage, moment.progress, self.config, self.special)
            for e in encoded]
    batch = bucketed(rows, self.config.data.buckets, self.special.pad)
    if self.method.teacher:
      batch = batch.replace(teacher=bucketed(
          [self.method.teacher(e, moment.progress, self.config, self.special)
           for e in encoded], self.config.data.buckets, self.special.pad))
    if self.decoder_targets:
      texts = collate_decoder_targets([
          self.method.decoder_targets(e, row, self.config, self.special)
          for e, row in zip(encoded, rows, strict=True)])
      if self.method.decoder_mean and (total := batch.weights.sum()):  # 0 of prompts
        texts = texts.mean(self.method.decoder_mean, total)
      return batch.replace(decoder_targets=texts)
    return batch


def _joined(rows: set[tuple[int, ...]]) -> set[tuple[int, ...]]:
  """The sizes that batches of such rows can have: the largest of each, in every mixture."""
  more = rows
  while more:
    rows = rows | more
    more = {tuple(map(max, a, b)) for a in more for b in rows} - rows
  return rows


def usable(config: Config, method: sequences.Method, examples: Sequence[Example],
           tokenizer) -> list[Example]:
  """Returns the examples whose rows fit the buckets in every stage.

  Raises:
    InputError: a row does not fit and config.data.too_long is 'raise', or so few fit that
      there is no batch.
  """
  ids = sequences.special_tokens(tokenizer)
  kept, first = [], ''
  for example in examples:
    encoded, = sequences.encode([example], tokenizer)
    try:
      check(config, every_sequence(config, method, encoded, ids), len(example.steps))
    except InputError as error:
      if config.data.too_long == 'raise':
        raise InputError(f"{error}, or leave such problems out with config.data.too_long="
                         f"'drop'. The problem: {example.question[:80]!r}") from None
      first = first or str(error)
      continue
    kept.append(example)
  if first and len(kept) < config.optim.batch_size:
    raise InputError(
        f'{len(examples) - len(kept):,} of {len(examples):,} training problems are too long, '
        f'the first of them because {first}; what is left is less than '
        f'config.optim.batch_size {config.optim.batch_size}')
  return kept


def every_sequence(config: Config, method: sequences.Method,
                   encoded: sequences.TokenizedExample, ids: sequences.SpecialTokens
                   ) -> list[sequences.PackedSequence]:
  """The sequences that an example has in the course of training, each length once."""
  parts = method.parts(config) if method.parts else 1
  moments = [(1, part / parts) for part in range(parts)] + [(2, 0.0)]
  own = [method.sequence(encoded, *moment, config, ids) for moment in moments]
  return own + ([method.teacher(encoded, 0.0, config, ids)] if method.teacher else [])


def check(config: Config, rows: Sequence[sequences.PackedSequence], steps: int) -> None:
  """Raises InputError where a training row cannot be laid out."""
  if steps > config.rim.max_steps:
    raise InputError(f'a problem has {steps} steps, more than config.rim.max_steps '
                     f'{config.rim.max_steps}; raise it')
  for row in rows:
    if any(out.start is None and out.visible_until < 2 for out in row.readouts):
      raise InputError('a question is one token long, but position 0 never predicts; '
                       'expected at least two tokens')
    p, k, r = sizes([row])
    buckets = config.data.buckets
    fit(p, buckets.prefix, 'prefix')
    fit(k, buckets.count, 'count')
    fit(r, buckets.readout, 'readout')
    last = _last(row)
    if last > config.model.max_positions:
      raise InputError(f'a row needs {last} positions, more than config.model.max_positions '
                       f'{config.model.max_positions}{window(config)}')


def window(config: Config) -> str:
  """What has set the positions of a pretrained model, for errors."""
  return (f', which {config.model.init_from}/config.json says by max_position_embeddings or '
          'sliding_window: expected shorter texts, fewer blocks, or a model with a longer '
          'window' if config.model.init_from else '')
