"""Rows to arrays."""


import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_reasoning import batching, sequences
from latent_reasoning.config import BucketConfig
from latent_reasoning.errors import InputError
from latent_reasoning.models import masks
from latent_reasoning.sequences import PackedSequence, Readout
from latent_reasoning.train import losses

P, K, R = 12, 3, 4  # one shape, so that JAX compiles once
token = st.integers(1, 99)


@st.composite
def rows(draw) -> PackedSequence:
  """Any row that fits P, K, R: readouts at distinct anchors, or with a start token."""
  n = draw(st.integers(2, P))
  prefix = draw(st.lists(token, min_size=n, max_size=n))
  visible = [draw(st.integers(i, n)) for i in range(1, n + 1)]
  untils = draw(st.lists(st.integers(2, n), unique=True, max_size=K, min_size=1))
  readouts = []
  for until in untils:
    start = draw(st.none() | token)
    out = draw(st.lists(token, min_size=1, max_size=R + (start is None) - 1))
    readouts.append(Readout(until, out, draw(st.integers(1, 16)) / 8,
                            draw(st.integers(0, until - 1)), start))
  return PackedSequence(prefix, visible, readouts)


def recover(batch: batching.Batch, b: int, count: int) -> list[tuple]:
  """Reads (until, out, weight, start) of the first `count` readouts from the arrays."""
  r = (batch.tokens.shape[1] - batch.prefix) // batch.anchors.shape[1]
  found = []
  for k in range(count):
    own = slice(batch.prefix + k * r, batch.prefix + (k + 1) * r)
    weights = batch.weights[b, own]
    length = int((weights > 0).sum())
    targets = batch.targets[b, own][:length].tolist()
    anchor, start = batch.anchors[b, k], None
    if anchor:
      targets.insert(0, int(batch.targets[b, anchor]))
      weight = batch.weights[b, anchor]
    else:
      start, weight = int(batch.tokens[b, own][0]), weights[0]
    found.append((int(batch.visible_until[b, own][0]), targets, float(weight), start))
  return found


@settings(max_examples=60, deadline=None)
@given(st.tuples(rows(), rows()))
def test_collate(pair):
  """Every row can be read back, and every weight is gathered exactly once."""
  batch = batching.collate(pair, P, K, R, pad=0)
  for b, row in enumerate(pair):
    n = len(row.prefix)
    assert batch.tokens[b, :n].tolist() == list(row.prefix)
    assert batch.positions[b, :n].tolist() == list(range(n))
    assert batch.visible_until[b, :n].tolist() == list(row.visible_until)
    assert recover(batch, b, len(row.readouts)) == [
        (out.visible_until, list(out.out), out.weight, out.start) for out in row.readouts]
    for k, out in enumerate(row.readouts):
      start = P + k * R
      assert batch.tokens[b, start:start + len(out.inputs)].tolist() == out.inputs
      assert batch.positions[b, start:start + R].tolist() == list(
          range(out.visible_until, out.visible_until + R))
      assert (batch.visible_from[b, start:start + R] == out.visible_from).all()
      assert (batch.segment[b, start:start + R] == k + 1).all()
    assert not batch.segment[b, :P].any()
    tokens = sum(len(out.out) for out in row.readouts)
    assert (batch.weights[b] > 0).sum() == tokens
    assert batch.weights[b].sum() == sum(len(o.out) * o.weight for o in row.readouts)
  at, targets, weights = map(np.asarray, losses.predictions(batch))
  assert at.shape == (2, K + K * R)
  assert weights.sum() == batch.weights.sum()
  gathered = [[b, at[b, i]] for b, i in np.argwhere(weights > 0)]
  assert sorted(gathered) == np.argwhere(batch.weights > 0).tolist()


@settings(max_examples=20, deadline=None)
@given(rows())
def test_real_tokens_see_no_padding(row):
  """Whatever the layout, padding is out of sight, and no query sees nothing."""
  batch = batching.collate([row], P, K, R)
  may = np.asarray(masks.allowed(batch.mask))[0]
  real = list(range(len(row.prefix)))
  for k, out in enumerate(row.readouts):
    real += range(P + k * R, P + k * R + len(out.inputs))
  assert not np.delete(may[real], real, axis=1).any()
  assert may.any(axis=1).all()


def test_sizes_and_buckets():
  """The smallest bucket that holds the rows, in each dimension by itself."""
  a = sequences.causal([1] * 5, [Readout(5, [1, 2, 3])])
  b = sequences.causal([1] * 3, [Readout(2, [1]), Readout(3, [1], start=7)])
  assert batching.sizes([a]) == (5, 1, 2)
  assert batching.sizes([b]) == (3, 2, 1)
  assert batching.sizes([a, b]) == (5, 2, 2)
  assert batching.sizes([sequences.causal([1, 2], [Readout(2)])]) == (2, 1, 1)
  buckets = BucketConfig(prefix=(4, 6), readout=(1, 3), count=(1, 4))
  for rows, prefix, count, readout in (([a], 6, 1, 3), ([b], 4, 4, 1), ([a, b], 6, 4, 3)):
    batch = batching.bucketed(rows, buckets, pad=9)
    assert (batch.prefix, batch.anchors.shape) == (prefix, (len(rows), count))
    assert batch.tokens.shape == (len(rows), prefix + count * readout)
    assert batch.tokens[0, -1] == 9


@pytest.mark.parametrize('needed,size', [(1, 2), (2, 2), (3, 5), (5, 5)])
def test_fit(needed, size):
  """A bucket holds what is as long as itself."""
  assert batching.fit(needed, (2, 5), 'prefix') == size


def test_no_bucket():
  """The error names the key, what is needed and what there is."""
  with pytest.raises(InputError, match='needs 6 in config.data.buckets.count, .* is 5'):
    batching.fit(6, (2, 5), 'count')
