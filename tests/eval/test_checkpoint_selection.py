"""The paper's protocol: chosen on some items, scored on the others."""

import math

import numpy as np
import pytest

from latent_reasoning.errors import InputError
from latent_reasoning.eval import checkpoint_selection

N = 400


def matrix(*shares, n=N, seed=0):
  """Checkpoints that are right on about these shares of the items."""
  rng = np.random.default_rng(seed)
  return np.stack([rng.random(n) < share for share in shares])


def test_one_checkpoint_is_scored_on_the_other_items():
  """With nothing to choose, the mean is near the whole accuracy, with its error."""
  found = checkpoint_selection.paper(matrix(0.6), 0)
  assert found['chosen'] == [16] and found['protocol'] == 'paper'
  assert found['scored_items'] == N - 264
  assert abs(found['accuracy'] - matrix(0.6).mean()) < 0.03
  assert 0 < found['standard_error'] < 0.02


def test_by_an_independent_computation():
  """The same figures, cut by cut, in plain Python."""
  correct = matrix(0.5, 0.5, 0.5, seed=5)
  scores, chosen = [], [0, 0, 0]
  for cut in range(16):
    order = [int(i) for i in np.random.default_rng((7, cut)).permutation(N)]
    held, rest = order[:264], order[264:]
    assert sorted(held + rest) == list(range(N))
    best = max(range(3), key=lambda c: (sum(correct[c][i] for i in held), c))
    chosen[best] += 1
    scores.append(sum(correct[best][i] for i in rest) / len(rest))
  mean = sum(scores) / 16
  found = checkpoint_selection.paper(correct, 7)
  assert found['accuracy'] == pytest.approx(mean)
  assert found['standard_error'] == pytest.approx(
      math.sqrt(sum((s - mean) ** 2 for s in scores) / 15 / 16))
  assert found['chosen'] == chosen and min(chosen) > 0


def test_the_better_checkpoint_is_chosen():
  """A clear difference decides every cut."""
  assert checkpoint_selection.paper(matrix(0.3, 0.9, 0.5), 0)['chosen'] == [0, 16, 0]


def test_of_equals_the_latest():
  """A tie goes to the later checkpoint."""
  row = matrix(0.5)[0]
  assert checkpoint_selection.paper(np.stack([row, row]), 0)['chosen'] == [0, 16]


def test_selection_is_not_scored():
  """Knowing only what it is chosen by does not help a checkpoint: no item is used twice."""
  # Of each cut, some checkpoint is right on exactly the items that choose.
  cuts = [np.random.default_rng((3, cut)).permutation(N) for cut in range(16)]
  correct = np.zeros((16, N), bool)
  for row, order in zip(correct, cuts, strict=True):
    row[order[:264]] = True
  found = checkpoint_selection.paper(correct, 3)
  assert found['chosen'] == [1] * 16 and found['accuracy'] == 0


def test_seed_and_order():
  """Another seed cuts otherwise; the same one cuts alike."""
  correct = matrix(0.5, 0.5)
  assert checkpoint_selection.paper(correct, 1) == checkpoint_selection.paper(correct, 1)
  one, two = (checkpoint_selection.paper(correct, n)['accuracy'] for n in (1, 2))
  assert one != two


def test_other_sets_are_scored_whole_by_the_chosen():
  """Another set may be small; its own items choose nothing."""
  hard = np.array([[True] * 4, [True, False, False, False]])
  found = checkpoint_selection.paper(matrix(0.2, 0.8), 0, {'hard': hard})
  assert found['sets'] == {'hard': {'n': 4, 'accuracy': 0.25, 'standard_error': 0.0}}


@pytest.mark.parametrize('n', [1, 100, 264])
def test_too_few_items(n):
  """The error says how many there are and how many are needed."""
  with pytest.raises(InputError, match=f'found {n} test items, expected at least 265'):
    checkpoint_selection.paper(matrix(0.5, n=n), 0)
  checkpoint_selection.check(265)
