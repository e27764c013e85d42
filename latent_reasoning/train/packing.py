"""Several problems in a row, so that little of a batch is padding.

Problems of a row do not see one another (batching.Placed), so that losses and gradients are
those of a problem a row. What is packed are the two parts of a row: the prefixes follow one
another in P places, the readouts in K slots of R, each whole in one slot. Problems are placed
longest first, each into the fullest row that holds it (best-fit decreasing).
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

from latent_reasoning.batching import Batch, Placed, lay_out
from latent_reasoning.sequences import PackedSequence

LONGER = (1, 2, 3, 4)  # times the largest bucket: prefixes that are tried
LONGEST = 1024  # tokens of a prefix that is tried, where the largest bucket is shorter
SAMPLED = 4  # batches by which a shape is chosen
QUARTERS = 4  # of stage 1: readouts may be annealed away in its course
MANY = 24  # numbers of rows are so many to a batch's, that there are few programs


@dataclasses.dataclass(frozen=True)
class Shape:
  """The static sizes of a row: P = prefix, K = slots, R = readout, and A = anchors, the most
  readouts of a row."""
  prefix: int
  slots: int
  readout: int
  anchors: int

  @property
  def tokens(self) -> int:
    return self.prefix + self.slots * self.readout

  def holding(self, rows: Sequence[PackedSequence]) -> 'Shape':
    """The same, but so large that each of these has room in a row of its own."""
    prefix = max(len(row.prefix) for row in rows)
    readout = max(len(out.inputs) for row in rows for out in row.readouts)
    slots, wide = self.slots, max(self.readout, _round(readout))
    while any(_fit(row, [0] * slots, wide) is None for row in rows):
      slots += 1
    return Shape(max(self.prefix, _round(prefix)), slots, wide,
                 max([self.anchors, *(len(row.readouts) for row in rows)]))


class _Row:
  """A row that is being filled."""

  def __init__(self, shape: Shape):
    self.shape, self.placed = shape, []
    self.used, self.anchors, self.slots = 0, 0, [0] * shape.slots

  def add(self, row: PackedSequence) -> bool:
    """Whether there was room for one more."""
    if (self.used + len(row.prefix) > self.shape.prefix
        or self.anchors + len(row.readouts) > self.shape.anchors):
      return False
    fit = _fit(row, self.slots, self.shape.readout)
    if fit is None:
      return False
    places, self.slots = fit
    self.placed.append(Placed(row, self.used, places))
    self.used, self.anchors = self.used + len(row.prefix), self.anchors + len(row.readouts)
    return True

  @property
  def full(self) -> float:
    return (self.used + sum(self.slots)) / self.shape.tokens


def _fit(row: PackedSequence, used: Sequence[int], readout: int
         ) -> tuple[list[int], list[int]] | None:
  """Places of a sequence's readouts in slots of which so much is used, and what is used then;
  None: they have no room."""
  used, places = list(used), []
  for out in row.readouts:
    size = len(out.inputs)
    slot = next((k for k, n in enumerate(used) if n + size <= readout), None)
    if slot is None:
      return None
    places.append(slot * readout + used[slot])
    used[slot] += size
  return places, used


def pack(rows: Sequence[PackedSequence], shape: Shape) -> list[list[Placed]]:
  """Puts sequences into as few rows of a shape as best-fit decreasing finds.

  Raises:
    ValueError: one of them has no room in a row of its own (Shape.holding).
  """
  filled: list[_Row] = []
  for row in sorted(rows, key=lambda row: _share(row, shape), reverse=True):
    for one in sorted(filled, key=lambda one: one.full, reverse=True):
      if one.add(row):
        break
    else:
      filled.append(_Row(shape))
      if not filled[-1].add(row):
        raise ValueError(f'a sequence of {len(row.prefix)} tokens and {len(row.readouts)} '
                         f'readouts has no room in {shape}')
  return [one.placed for one in filled]


def _share(row: PackedSequence, shape: Shape) -> float:
  """How much of a row's scarcest part a sequence takes."""
  return max(len(row.prefix) / shape.prefix, _said(row) / (shape.slots * shape.readout))


def _said(row: PackedSequence) -> int:
  return sum(len(out.inputs) for out in row.readouts)


def _round(size: int) -> int:
  return -(-size // 8) * 8


def choose(batches: Sequence[Sequence[PackedSequence]], prefix: int, embed_dim: int) -> Shape:
  """The shape in which batches like these cost least.

  A token of a row costs about 24·d² operations a layer, and attention to n others 4·n·d: longer
  rows are filled better, and attend to more that is not seen.

  Args:
    prefix: a size that holds the longest prefix.
    embed_dim: d.
  """
  rows = list(itertools.chain(*batches))
  ratio = sum(map(_said, rows)) / sum(len(row.prefix) for row in rows)
  readout = _round(max(len(out.inputs) for row in rows for out in row.readouts))
  found = []
  for length in sorted({n * prefix for n in LONGER if n * prefix <= max(prefix, LONGEST)}):
    said = int(ratio * length)  # tokens of readouts that stand behind a full prefix
    for more in (1.0, 1.1, 1.2, 1.35, 1.6):
      places = max(readout, int(said * more))
      slots = places // readout
      shape = Shape(length, slots, _round(-(-places // slots)), len(rows)).holding(rows)
      packed = [pack(batch, shape) for batch in batches]
      attended = (shape.prefix + shape.readout) / (6 * embed_dim)
      cost = sum(map(len, packed)) * shape.tokens * (1 + attended)
      anchors = max(sum(len(one.row.readouts) for one in row) for row in
                    itertools.chain(*packed))
      found.append((cost, dataclasses.replace(shape, anchors=anchors)))
  return min(found, key=lambda one: one[0])[1]


class Packer:
  """Batches whose rows hold several problems, of few static shapes.

  Args:
    sample: (stage, progress) -> sequences of `SAMPLED` batches, or of as many as there are.
    size: problems of a batch.
    parts: of stage 1, each of which has shapes of its own.
    prefix, embed_dim: as `choose`.
    unit: says what the number of rows is a multiple of.
    pad: the token of the padding.
  """

  def __init__(self, sample: Callable[[int, float], Sequence[PackedSequence]], size: int,
               parts: int, prefix: int, embed_dim: int, unit: Callable[[], int], pad: int):
    self._sample, self._size, self._parts, self._unit = sample, size, parts, unit
    self._prefix, self._embed_dim, self._pad = prefix, embed_dim, pad
    self._chosen = functools.cache(self._chosen)

  def batch(self, rows: Sequence[PackedSequence], stage: int, progress: float) -> Batch:
    """A batch of these sequences."""
    shape, unit, _ = self._chosen(stage, self._part(stage, progress))
    shape = shape.holding(rows)
    packed = pack(rows, shape)
    packed += [[]] * (-len(packed) % unit)
    return lay_out(packed, shape.prefix, shape.slots, shape.readout, shape.anchors, self._pad,
                   shared=True)

  def shapes(self, stage: int) -> int:
    """How many the batches of a stage have, by those that were sampled."""
    parts = self._parts if stage == 1 else 1
    return len({(shape, count) for part in range(parts)
                for shape, _, counts in [self._chosen(stage, part)] for count in counts})

  def _part(self, stage: int, progress: float) -> int:
    return int(progress * self._parts + 1e-9) if stage == 1 else 0  # 1/49 · 49 is below 1

  def _chosen(self, stage: int, part: int) -> tuple[Shape, int, frozenset[int]]:
    """The shape of rows in a part, what their number is a multiple of, and what it was of the
    sample."""
    rows = self._sample(stage, part / self._parts)
    batches = [rows[i:i + self._size]
               for i in range(0, len(rows) // self._size * self._size, self._size)]
    shape = choose(batches, self._prefix, self._embed_dim)
    counts, least = [len(pack(batch, shape)) for batch in batches], self._unit()
    unit = least * max(1, round(sum(counts) / len(counts) / MANY / least))
    return shape, unit, frozenset(-(-count // unit) * unit for count in counts)
