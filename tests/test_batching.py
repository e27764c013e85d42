"""Rows to arrays, and the order in which they come."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_reasoning import batching, methods, sequences
from latent_reasoning.config import BucketConfig
from latent_reasoning.data import tokenizers
from latent_reasoning.data.example import Example
from latent_reasoning.errors import InputError
from latent_reasoning.models import masks
from latent_reasoning.sequences import PackedSequence, Readout
from latent_reasoning.train import curriculum, losses

P, K, R = 12, 3, 4  # one shape, so that JAX compiles once
token = st.integers(1, 99)


def usable(config, problems, tokenizer):
  return batching.usable(config, methods.get(config.method), problems, tokenizer)


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


def examples(count: int) -> list[Example]:
  """Problems that can be told apart, with 1 to 3 steps."""
  return [Example(f'{i:03d}', ('1+1=2',) * (1 + i % 3), str(i % 10)) for i in range(count)]


@pytest.fixture(scope='module')
def tokenizer(tiny_config, tmp_path_factory):
  """Characters."""
  path = tmp_path_factory.mktemp('tokenizer') / 'tokenizer.json'
  return tokenizers.build(tiny_config().tokenizer, lambda: ['0'], path, 3)


@pytest.fixture(scope='module')
def make(tiny_config, tokenizer):
  """Makes Batches from a number of problems and dotted keys."""
  def build(count=20, **changes):
    config = tiny_config(**{'optim.batch_size': 4, **changes})
    return batching.Batches(config, methods.get(config.method), examples(count), tokenizer,
                            curriculum.build(config.optim, count))
  return build


def same(a: batching.Batch, b: batching.Batch) -> bool:
  return jax.tree.structure(a) == jax.tree.structure(b) and all(
      map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def questions(batch: batching.Batch) -> list[tuple]:
  """The first three tokens of each row tell its problem."""
  return [tuple(row[:3].tolist()) for row in batch.tokens]


@pytest.mark.parametrize('prefetch', [0, 2])
@pytest.mark.parametrize('start', [0, 3, 9])
def test_iterate_is_random_access(make, start, prefetch):
  """From any step on, across epochs (5 steps) and stages (8 steps), as `at` says."""
  iterated = list(make(**{'train.prefetch': prefetch}).iterate(start))
  batches = make()
  assert len(iterated) == batches.curriculum.total - start == 14 - start
  for step, batch in enumerate(iterated, start):
    assert same(batch, batches.at(step)), step


def test_deterministic_in_any_order(make):
  """A batch does not depend on what was asked for before."""
  forward, backward = make(), make()
  ahead = [forward.at(s) for s in range(14)]
  back = [backward.at(s) for s in reversed(range(14))][::-1]
  assert all(same(a, b) for a, b in zip(ahead, back, strict=True))
  assert not same(ahead[0], ahead[1])
  assert not same(make(seed=1).at(0), ahead[0])


@pytest.mark.parametrize('window', [1, 2, 3])
def test_an_epoch_visits_each_problem_at_most_once(make, window):
  """22 problems in batches of 4: 5 steps an epoch, other problems left out each time."""
  batches = make(22, **{'optim.stage1.steps': 15, 'data.sort_window': window})
  epochs = []
  for epoch in range(3):
    seen = [q for s in range(5) for q in questions(batches.at(5 * epoch + s))]
    assert len(set(seen)) == len(seen) == 20
    epochs.append(seen)
  assert epochs[0] != epochs[1] != epochs[2]


def test_stages_have_orders_of_their_own(make):
  """Stage 2 begins with a fresh epoch, in another order than stage 1's."""
  batches = make(**{'optim.stage1.steps': 3, 'optim.stage2.steps': 5})
  second = [q for s in range(3, 8) for q in questions(batches.at(s))]
  assert len(set(second)) == 20
  assert second[:12] != [q for s in range(3) for q in questions(batches.at(s))]


def test_progress_reaches_the_rows(make):
  """Weights are annealed step by step."""
  batches = make(**{'optim.stage1.steps': 4, 'rim.schedule': 'uniform'})
  for step in range(4):
    batch = batches.at(step)
    weights = set(np.unique(batch.weights).tolist())
    assert weights == {0.0, 1 - step / 4, 1.0}


def test_sort_window(make):
  """A window has the same problems as without sorting, in batches alike in length."""
  plain, sorted_ = make(24), make(24, **{'data.sort_window': 3})
  for window in (0, 1):
    steps = range(3 * window, 3 * window + 3)
    before, after = ([b.at(s) for s in steps] for b in (plain, sorted_))
    assert (sorted(q for b in before for q in questions(b))
            == sorted(q for b in after for q in questions(b)))
    assert ({frozenset(questions(b)) for b in before}
            != {frozenset(questions(b)) for b in after})
    lengths = [sorted((b.anchors > 0).sum(1).tolist()) for b in after]
    lengths.sort()
    flat = list(itertools.chain(*lengths))
    assert flat == sorted(flat)  # no batch reaches into another's lengths


def test_fewer_problems_than_a_batch(make):
  """It is an error, and says so."""
  with pytest.raises(InputError, match='has 3 problems, fewer than'):
    make(3)


def test_too_long(tiny_config, tokenizer):
  """A problem that no bucket holds raises, or is dropped and the others kept."""
  problems = [*examples(3), Example('0123456789', ('1+1=2',) * 3, '1')]
  # question, newline, 3 blocks of 3: 13 tokens for the short, 20 for the long
  changes = {'data.buckets.prefix': (19,)}
  with pytest.raises(InputError, match="needs 20 in .*prefix.*The problem: '0123456789'"):
    usable(tiny_config(**changes), problems, tokenizer)
  config = tiny_config(**changes, **{'data.too_long': 'drop', 'optim.batch_size': 3})
  assert usable(config, problems, tokenizer) == problems[:3]
  with pytest.raises(InputError, match='1 of 3 .* too long.*needs 20 .*than .*batch_size 3'):
    usable(config, problems[1:], tokenizer)
  assert usable(tiny_config(), problems, tokenizer) == problems


@pytest.mark.parametrize('changes', [
    {'data.buckets.prefix': (12,)}, {'data.buckets.count': (2,)},
    {'data.buckets.readout': (1,)}])
def test_too_long_in_either_stage(tiny_config, tokenizer, changes):
  """A row must fit in stage 1 and in stage 2; where none does, that is the error."""
  problems = [Example('000', ('1+1=2', '1+1=2'), '1')]
  config = tiny_config(**changes, **{'data.too_long': 'drop'})
  with pytest.raises(InputError, match='1 of 1 training problems are too long.*a row needs'):
    usable(config, problems, tokenizer)


def test_one_token_question(tiny_config, tokenizer):
  """Position 0 never predicts, so nothing may be attached to a single token."""
  encoded = sequences.TokenizedExample([1], [], [2])
  ids = sequences.special_tokens(tokenizer)
  config = tiny_config(method='direct')
  with pytest.raises(InputError, match='one token long'):
    batching.check(config, [methods.get('direct').sequence(encoded, 1, 0.0, config, ids)], 0)
  batching.check(config, [methods.get('rim').sequence(encoded, 1, 0.0, config, ids)], 0)


def test_too_many_steps(tiny_config, tokenizer):
  """More steps than rim.max_steps cannot be laid out, in any method."""
  problem = Example('000', ('1',) * 4, '1')
  for method in ('rim', 'direct_steps', 'cot'):
    with pytest.raises(InputError, match='4 steps, more than config.rim.max_steps 3'):
      usable(tiny_config(method=method), [problem], tokenizer)


@pytest.mark.parametrize('method,positions', [
    # 4 of the question; for RiM, 2 blocks; the inputs of the longest readout there.
    ('rim', 4 + 6 + 5), ('direct', 4 + 1), ('direct_steps', 4 + 6), ('cot', 4 + 17 + 6)])
def test_max_positions(tiny_config, tokenizer, method, positions):
  """A row needs as many positions as its longest way through."""
  problem = Example('000', ('1+1=2',) * 3, '1')
  def config(size):
    return tiny_config(**{'method': method, 'model.max_positions': size})
  assert usable(config(positions), [problem], tokenizer) == [problem]
  with pytest.raises(InputError, match=f'needs {positions} positions, more than'):
    usable(config(positions - 1), [problem], tokenizer)
