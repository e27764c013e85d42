"""The order in which batches come, and what fits them."""

import itertools

import jax
import numpy as np
import pytest

from latent_reasoning import batching, methods, sequences
from latent_reasoning.data import tokenizers
from latent_reasoning.data.example import Example
from latent_reasoning.errors import InputError
from latent_reasoning.train import batches, curriculum


def usable(config, problems, tokenizer):
  return batches.usable(config, methods.get(config.method), problems, tokenizer)


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
    return batches.Batches(config, methods.get(config.method), examples(count), tokenizer,
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


ASKING = [name for name, method in methods.METHODS.items() if not method.is_text]


@pytest.mark.parametrize('method', ASKING)
def test_what_fits_is_what_fits_alone(tiny_config, tokenizer, method):
  """Many problems are seen to fit by one as long as all of them: as if each were looked at."""
  random = np.random.default_rng(0)
  def text(most):
    return ''.join(random.choice([*'0123456789+'], random.integers(1, most)))
  problems = [Example(text(14), tuple(text(9) for _ in range(random.integers(0, 5))), text(4))
              for _ in range(120)]
  config = tiny_config(**{'method': method, 'data.too_long': 'drop', 'optim.batch_size': 1,
                          'data.buckets.prefix': (19,), 'data.buckets.readout': (14,),
                          'model.max_positions': 40})
  own, ids = methods.get(method), sequences.special_tokens(tokenizer)
  def fits(problem):
    encoded, = sequences.encode([problem], tokenizer)
    try:
      batches.check(config, batches.every_sequence(config, own, encoded, ids),
                    len(problem.steps))
    except InputError:
      return False
    return True
  alone = [problem for problem in problems if fits(problem)]
  assert usable(config, problems, tokenizer) == alone and 10 < len(alone) < 110


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
    batches.check(config, [methods.get('direct').sequence(encoded, 1, 0.0, config, ids)], 0)
  batches.check(config, [methods.get('rim').sequence(encoded, 1, 0.0, config, ids)], 0)


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
