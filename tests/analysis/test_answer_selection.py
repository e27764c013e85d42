"""Rules on matrices written by hand; probes on planted directions and on noise."""

import dataclasses

import numpy as np
import pytest

from latent_reasoning.analysis import answer_selection
from latent_reasoning.analysis.block_states import BlockActivations

VOTES = np.array([['1', '2', '2', '3'], ['1', '1', '2', '2'], ['4', '4', '4', '5'],
                  ['1', '2', '3', '4']])


def test_rules_by_hand():
  """Each rule's block; of equals the latest, and the final one where nothing agrees."""
  confidence = -np.array([[4., 3, 2, 2], [1, 2, 3, 4], [3, 1, 2, 4], [2, 2, 2, 2]])
  found = answer_selection.rules(VOTES, confidence, np.eye(4))
  assert {name: block.tolist() for name, block in found.items()} == {
      'final': [3, 3, 3, 3], 'majority': [2, 3, 2, 3], 'most confident': [3, 0, 1, 3],
      'first two that agree': [2, 1, 1, 3], 'probe': [0, 1, 2, 3]}
  assert answer_selection.agreement(VOTES).tolist() == [
      [1, 1, 2, 1], [1, 2, 1, 2], [1, 2, 3, 1],
                                              [1, 1, 1, 1]]
  right = np.array([[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]], bool)
  assert answer_selection.chosen(right, found['majority']).tolist() == [
      True, False, False, False]


@pytest.mark.parametrize('seed', range(3))
def test_areas(seed):
  """AUROC by all pairs and AUPRC by its sum, ties included."""
  rng = np.random.default_rng(seed)
  score, right = rng.integers(0, 6, 40).astype(float), rng.random(40) < 0.4
  pairs = [(a > b) + 0.5 * (a == b) for a in score[right] for b in score[~right]]
  assert answer_selection.auroc(score, right) == pytest.approx(np.mean(pairs))
  area, before = 0.0, 0.0
  for t in sorted(set(score), reverse=True):
    taken = score >= t
    recall = right[taken].sum() / right.sum()
    area, before = area + (recall - before) * right[taken].mean(), recall
  assert answer_selection.auprc(score, right) == pytest.approx(area)
  assert np.isnan(answer_selection.auroc(score, np.ones(40, bool)))


@pytest.mark.integration
def test_interval_holds_the_value():
  """The interval is around the value and narrows with more problems."""
  rng = np.random.default_rng(0)
  def found(n):
    right = rng.random((n, 2)) < 0.5
    return answer_selection.interval(
        answer_selection.auroc, right + rng.normal(size=(n, 2)), right)
  few, many = found(50), found(800)
  for one in (few, many):
    assert one['low'] < one['value'] < one['high']
  assert many['high'] - many['low'] < 0.5 * (few['high'] - few['low'])


def test_probe_is_at_its_optimum():
  """The gradient of the penalised loss is zero, by its definition."""
  rng = np.random.default_rng(0)
  x, y = rng.normal(2, 3, (200, 5)), rng.integers(0, 3, 200)
  probe = answer_selection.fit(x, y)
  z = np.append((x - x.mean(0)) / x.std(0), np.ones((200, 1)), 1)
  gradient = z.T @ (probe.predict_proba(x) - np.eye(3)[y])
  gradient[:-1] += answer_selection.L2 * probe[-1].coef_.T
  assert np.abs(gradient).max() < 0.01 * np.abs(z.T @ (1 / 3 - np.eye(3)[y])).max()


@pytest.mark.parametrize('planted', [True, False])
def test_probe_finds_what_is_there(planted):
  """A planted direction is found on held-out data; on noise it is at chance."""
  rng = np.random.default_rng(1)
  x, direction = rng.normal(size=(1200, 16)), rng.normal(size=16)
  y = np.digitize(x @ direction, [-2, 2]) if planted else rng.integers(0, 3, 1200)
  right = (answer_selection.fit(x[:600], 10 + y[:600]).predict(x[600:]) == 10 + y[600:]).mean()
  assert right > 0.85 if planted else 0.25 < right < 0.42


def made(seed: int, n: int = 300) -> BlockActivations:
  """Three blocks, right more and more often; the state's first coordinate tells."""
  rng = np.random.default_rng(seed)
  correct = rng.random((n, 3)) < [0.2, 0.5, 0.9]
  states = rng.normal(size=(n, 3, 2, 6)).astype(np.float32)
  states[..., -1, 0] += 4 * correct
  votes = np.where(correct, 'right', rng.integers(0, 5, (n, 3)).astype(str))
  blank = np.zeros((n, 3))
  return BlockActivations(np.arange(n), np.full(n, 4), states, votes, votes, correct,
                          np.where(correct, -0.1, -1.0) + rng.normal(0, 0.3, (n, 3)), blank,
                          blank.astype(int), blank[:, 0].astype(int))


@pytest.mark.integration
def test_compare():
  """A probe that can tell beats the final block; 'any' bounds every rule."""
  found = answer_selection.compare(made(0), made(1))
  rules = found['rules']
  assert rules['probe']['accuracy'] > rules['final']['accuracy'] + 0.03
  assert max(r['accuracy'] for r in rules.values()) <= found['any']
  assert found['auroc']['low'] > 0.95 and found['auprc']['low'] > found['right']
  assert rules['probe']['selection'] == pytest.approx(
      rules['probe']['accuracy'] / found['any'])


@pytest.mark.integration
def test_adaptive():
  """Lower thresholds read fewer blocks; at the ends all stop at the first or the last."""
  valid, test = made(0), made(1)
  found = answer_selection.adaptive(valid, test, answer_selection.correctness_probe(valid))
  for one in found.values():
    read = [p['blocks'] for p in one['curve']]
    assert read == sorted(read) and 1 <= read[0] <= read[-1] <= 3
    assert one['chosen'] in one['curve']
  fixed = [p['accuracy'] for p in found['fixed number']['curve']]
  assert fixed == pytest.approx(test.correct.mean(0).tolist())
  assert found['probe']['chosen']['blocks'] < 2.6
  assert found['probe']['chosen']['accuracy'] > fixed[-1] - 0.05


@pytest.mark.integration
def test_thresholds_do_not_see_test_data():
  """Other test labels change accuracies, and nothing that was chosen."""
  valid, test = made(0), made(1)
  other = dataclasses.replace(test, correct=~test.correct)
  one, two = (answer_selection.compare(valid, t)['adaptive'] for t in (test, other))
  for name in one:
    assert [p['threshold'] for p in one[name]['curve']] == [
        p['threshold'] for p in two[name]['curve']]
    assert one[name]['chosen']['threshold'] == two[name]['chosen']['threshold']
