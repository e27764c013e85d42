"""From packed sequences to batches of one static shape."""

import dataclasses
from collections.abc import Callable, Sequence

import chex
import flax.struct
import numpy as np

from latent_reasoning import sequences
from latent_reasoning.config import BucketConfig
from latent_reasoning.errors import InputError


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
    causal_prefix: whether each token of the prefix sees those up to itself, so that a kernel
      needs no mask; padding, which no token sees, may see anything.
    own: bool [B, R, S], what each of R tokens sees of the S of its own readout, in place of
      those before it; None: those.
    key_positions: int32 [B, P], of the prefix, or of the whole row; and
    positions: int32 [B, T], of these tokens, and
    window: int32 [], from a token back to the first that it may see, both counted; None: there
      is none.
    shared: whether a row may hold several problems: each token of the prefix then sees its own
      problem's alone, from visible_from on, and each of a readout those of its segment alone.
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
  key_positions: chex.Array | None = None
  positions: chex.Array | None = None
  window: chex.Array | None = None
  shared: bool = flax.struct.field(pytree_node=False, default=False)

  def cut(self, how: Callable[[chex.Array], chex.Array]) -> 'Mask':
    """The same of some positions: `how` takes them from [B, T]."""
    return self.replace(**{name: how(a) for name in (
        'segment', 'visible_from', 'visible_until', 'unseen_from', 'unseen_until', 'positions')
        if (a := getattr(self, name)) is not None})

  def part(self, start: int, stop: int) -> 'Mask':
    """The same for positions start … stop - 1 of a row."""
    return self.cut(lambda a: a[:, start:stop])


@dataclasses.dataclass(frozen=True)
class Placed:
  """Where the sequence of a problem stands in a row.

  Attributes:
    row: the sequence.
    start: the place of its prefix's first token.
    readouts: of the first token of each of its readouts, counted from the end of the row's
      prefix.
  """
  row: sequences.PackedSequence
  start: int
  readouts: Sequence[int]


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
    slots: with several problems in a row (Placed), how many parts of equal length the places
      behind the prefix are; anchors are then [B, A] of at most A readouts. 0: a problem a row.
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
  slots: int = flax.struct.field(pytree_node=False, default=0)

  def real(self, pad: int) -> int:
    """How many of its tokens are no padding, a teacher's included."""
    own = int(np.count_nonzero(self.tokens != pad))
    return own + (self.teacher.real(pad) if self.teacher else 0)

  @property
  def places(self) -> int:
    """How many it has, padding and a teacher's included."""
    return self.tokens.size + (self.teacher.places if self.teacher else 0)

  @property
  def mask(self) -> Mask:
    count = self.slots or self.anchors.shape[1]
    readout = max(1, (self.tokens.shape[1] - self.prefix) // max(1, count))
    until = self.visible_until[:, self.prefix::readout]
    return Mask(self.segment, self.visible_from, self.visible_until, until, self.prefix,
                count, self.unseen_from, self.unseen_until,
                causal_prefix=self.causal_prefix,
                key_positions=self.positions[:, :self.prefix], shared=self.slots > 0)


def collate(rows: Sequence[sequences.PackedSequence], prefix: int, count: int, readout: int,
            pad: int = 0) -> Batch:
  """Lays rows out in arrays of one shape: P = prefix, K = count, R = readout; P is longer by
  the places of later passes, where there are some."""
  places = [k * readout for k in range(count)]
  return lay_out([[Placed(row, 0, places[:len(row.readouts)])] for row in rows], prefix, count,
                 readout, count, pad)


def lay_out(rows: Sequence[Sequence[Placed]], prefix: int, count: int, readout: int,
            anchored: int, pad: int = 0, shared: bool = False) -> Batch:
  """`collate` of sequences that have their places.

  What the padding holds does not matter: no real token sees it, and its weight
  is 0. It sees the row's first token, because a softmax over nothing is a mean
  over everything.

  Args:
    rows: what stands in each; nothing in a row of padding.
    anchored: A, of at most how many readouts a row has anchors.
    shared: whether a row may hold several problems, and each of its K parts several readouts.
  """
  every = [placed.row for row in rows for placed in row]
  first, loops = prefix, every[0].loops
  if any(row.loops != loops for row in every):
    raise ValueError('rows of one batch have the same passes')
  if loops:
    prefix += (loops.passes - 1) * loops.size
  size, length = len(rows), prefix + count * readout
  tokens = np.full((size, length), pad, np.int32)
  positions = np.zeros((size, length), np.int32)
  targets = np.full((size, length), pad, np.int32)
  weights = np.zeros((size, length), np.float32)
  segment = np.zeros((size, length), np.int32)
  if not shared:
    segment[:, prefix:] = np.repeat(np.arange(1, count + 1), readout)
  visible_from = np.zeros((size, length), np.int32)
  visible_until = np.ones((size, length), np.int32)
  anchors = np.zeros((size, anchored), np.int32)
  unseen_from, unseen_until = np.zeros((2, size, length), np.int32)
  own_latents = np.zeros((size, anchored), np.int32)
  readouts = [0] * size  # that have their places
  for b, placed in ((b, placed) for b, row in enumerate(rows) for placed in row):
    row, at, n = placed.row, placed.start, len(placed.row.prefix)
    own = slice(at, at + n)
    tokens[b, own] = row.prefix
    positions[b, own] = np.arange(n)
    visible_from[b, own] = at
    visible_until[b, own] = np.asarray(row.visible_until, np.int32) + at
    if loops:
      before = n - loops.size  # what is read once
      for start in range(first, prefix, loops.size):
        again = slice(start, start + loops.size)
        tokens[b, again], positions[b, again] = row.prefix[before:], np.arange(before, n)
        visible_until[b, again] = before
    if row.labels:  # of the last pass
      stop = prefix if loops else at + n
      targets[b, stop - len(row.labels):stop] = np.maximum(row.labels, 0)
      weights[b, stop - len(row.labels):stop] = np.greater_equal(row.labels, 0)
    for out, place in zip(row.readouts, placed.readouts, strict=True):
      k = readouts[b]
      readouts[b] += 1
      inputs, start = out.inputs, prefix + place
      stop, begin = start + len(inputs), start + out.latents
      part = slice(start, stop if shared else start + readout)
      tokens[b, start:stop], own_latents[b, k] = inputs, out.latents
      positions[b, part] = np.arange(out.visible_until,
                                     out.visible_until + part.stop - part.start)
      visible_from[b, part] = at + out.visible_from
      until = at + out.visible_until
      if out.reads > 1:  # in the places of that pass
        place = first + (out.reads - 2) * loops.size
        unseen_from[b, part] = before
        unseen_until[b, part] = place
        until += place - before
      visible_until[b, part] = until
      if shared:
        segment[b, part] = k + 1
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
  outs = [out for row in every for out in row.readouts]
  return Batch(tokens, positions, targets, weights, segment, visible_from,
               visible_until, anchors, prefix,
               latents=max((out.latents for out in outs), default=0),
               own_latents=own_latents if any(out.mixed for out in outs) else None,
               started=bool(outs) and all(out.start is not None for out in outs),
               mark=max((out.mark for out in outs), default=0),
               loops=loops, causal_prefix=not loops and all(
                   [*row.visible_until] == [*range(1, len(row.prefix) + 1)] for row in every),
               slots=count if shared else 0,
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
