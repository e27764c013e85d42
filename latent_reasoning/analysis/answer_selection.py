"""Which block answers: rules, linear probes, and reading no more blocks than needed.

Needs scikit-learn (extra `report`) and no JAX. `votes`, `correct` and `confidence` are [N, K],
of block_states.BlockActivations.
"""

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import stats

from latent_reasoning.analysis.block_states import BlockActivations
from latent_reasoning.errors import InputError

L2 = 1.0  # of a probe's weights on standardised inputs; its intercept is free
ITERATIONS = 200
BOOTSTRAPS = 1000


def sklearn(module: str) -> Any:
  """A module of scikit-learn, imported when it is used.

  Raises:
    InputError: it is missing.
  """
  try:
    return importlib.import_module(f'sklearn.{module}')
  except ImportError:
    raise InputError("probes need scikit-learn; pip install -e '.[report]'") from None


def fit(x: np.ndarray, y: np.ndarray, l2: float = L2) -> Any:
  """A linear classifier of states: multinomial logistic regression on standardised inputs,
  Σ -log p(y|x) + l2/2 |W|².

  Args:
    x: [N, D]. y: [N], labels of any kind.

  Returns:
    a pipeline of scikit-learn.
  """
  regression = sklearn('linear_model').LogisticRegression(C=1 / l2, max_iter=ITERATIONS)
  probe = sklearn('pipeline').make_pipeline(sklearn('preprocessing').StandardScaler(),
                                            regression)
  limits = importlib.import_module('threadpoolctl').threadpool_limits  # scikit-learn needs it
  with warnings.catch_warnings(), limits(1):  # many threads are in each other's way here
    warnings.simplefilter('ignore')  # that it has not converged to the last digit
    return probe.fit(x, y)


def auroc(score: np.ndarray, right: np.ndarray) -> float:
  """P(a right one scores above a wrong one), ties count half; NaN without both."""
  if right.all() or not right.any():
    return float('nan')
  return float(sklearn('metrics').roc_auc_score(right, score))


def auprc(score: np.ndarray, right: np.ndarray) -> float:
  """Average precision: Σ (recall_i - recall_{i-1}) · precision_i, ties together."""
  if not right.any():
    return float('nan')
  return float(sklearn('metrics').average_precision_score(right, score))


def interval(measure: Callable, score: np.ndarray, right: np.ndarray,
             seed: int = 0) -> dict[str, float]:
  """A measure of [N, …] scores with its 95% bootstrap interval over the N problems."""
  def of(index):
    return measure(score[index].ravel(), right[index].ravel())
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # of a measure that is the same in all draws
    drawn = stats.bootstrap(
        (np.arange(len(score)),), of, vectorized=False, method='percentile',
        n_resamples=BOOTSTRAPS, rng=seed).bootstrap_distribution
  finite = drawn[np.isfinite(drawn)]
  low, high = np.quantile(finite, [0.025, 0.975]) if len(finite) else (np.nan, np.nan)
  return {'value': measure(score.ravel(), right.ravel()), 'low': float(low),
          'high': float(high)}


def majority(votes: np.ndarray) -> np.ndarray:
  """The block of the commonest answer, the latest of it and of equals: int [N]."""
  counts = (votes[:, :, None] == votes[:, None, :]).sum(-1)
  return _last_best(counts)


def _last_best(score: np.ndarray) -> np.ndarray:
  return score.shape[1] - 1 - score[:, ::-1].argmax(1)


def agreement(votes: np.ndarray) -> np.ndarray:
  """How many answers in a row, up to and with block k, are the same: int [N, K]."""
  run = np.ones(votes.shape, int)
  for k in range(1, votes.shape[1]):
    run[:, k] = np.where(votes[:, k] == votes[:, k - 1], run[:, k - 1] + 1, 1)
  return run


def first(enough: np.ndarray) -> np.ndarray:
  """The first block where a condition [N, K] holds, else the last one: int [N]."""
  return np.where(enough.any(1), enough.argmax(1), enough.shape[1] - 1)


def rules(votes: np.ndarray, confidence: np.ndarray,
          probed: np.ndarray) -> dict[str, np.ndarray]:
  """The block that each rule answers with, int [N] from 0."""
  return {'final': np.full(len(votes), votes.shape[1] - 1),
          'majority': majority(votes), 'most confident': _last_best(confidence),
          'first two that agree': first(agreement(votes) >= 2),
          'probe': _last_best(probed)}


def chosen(correct: np.ndarray, block: np.ndarray) -> np.ndarray:
  return np.take_along_axis(correct, block[:, None], axis=1)[:, 0]


def correctness_probe(seen: BlockActivations) -> Any:
  """Tells from the state that the head reads whether a block's answer is right; None where
  all are right, or none is."""
  states = seen.states[:, :, -1]
  if seen.correct.all() or not seen.correct.any():
    return None
  return fit(states.reshape(-1, states.shape[-1]), seen.correct.ravel())


def probed(probe: Any, seen: BlockActivations) -> np.ndarray:
  """Log odds that a block is right, [N, K]; 0 where the probe saw one class only."""
  if probe is None:
    return np.zeros(seen.correct.shape)
  states = seen.states[:, :, -1]
  return probe.decision_function(states.reshape(-1, states.shape[-1])).reshape(
      seen.correct.shape)


def compare(valid: BlockActivations, test: BlockActivations) -> dict[str, Any]:
  """Every rule on test problems; the probe is trained on validation problems.

  Returns:
    {'n', 'any', 'rules': {name: {'accuracy', 'standard_error', 'selection', 'blocks'}},
    'auroc', 'auprc', 'auroc_by_block', 'auroc_confidence', 'adaptive'}: 'selection' is the
    accuracy where some block is right, 'any', an upper bound that no rule knows.
  """
  probe = correctness_probe(valid)
  scores, some = probed(probe, test), test.correct.any(1)
  found = {}
  for name, block in rules(test.votes, test.confidence, scores).items():
    right = chosen(test.correct, block)
    found[name] = {'accuracy': float(right.mean()),
                   'standard_error': float(right.std() / len(right)**0.5),
                   'selection': float(right[some].mean()) if some.any() else float('nan'),
                   'block': float(block.mean() + 1)}
  return {'n': len(some), 'any': float(some.mean()), 'rules': found,
          'auroc': interval(auroc, scores, test.correct),
          'auprc': interval(auprc, scores, test.correct),
          'right': float(test.correct.mean()),  # AUPRC of a guess
          'auroc_by_block': [interval(auroc, s, c) for s, c in
                             zip(scores.T, test.correct.T, strict=True)],
          'auroc_confidence': interval(auroc, test.confidence, test.correct),
          'adaptive': adaptive(valid, test, probe)}


def adaptive(valid: BlockActivations, test: BlockActivations, probe: Any,
             points: int = 21) -> dict[str, Any]:
  """Reads blocks 1, 2, … until a score passes a threshold; one curve a score.

  Thresholds are quantiles of the validation scores; all are on the curve. 'chosen' is
  the point with the fewest blocks whose validation accuracy is within a point of the
  final block's there.

  Returns:
    {score: {'curve': [{'threshold', 'blocks', 'accuracy'}], 'chosen': one of them}}.
  """
  def scores(seen):
    blocks = np.broadcast_to(np.arange(1, seen.votes.shape[1] + 1), seen.votes.shape)
    return {'fixed number': blocks, 'agreement': agreement(seen.votes),
            'confidence': seen.confidence, 'probe': probed(probe, seen)}
  curves, goal = {}, valid.correct[:, -1].mean() - 0.01
  for (name, old), new in zip(scores(valid).items(), scores(test).values(), strict=True):
    whole = np.issubdtype(old.dtype, np.integer)
    grid = np.unique(old if whole else np.quantile(old, np.linspace(0, 1, points)))
    curve = [_point(t, new, test.correct) for t in grid]
    before = [_point(t, old, valid.correct) for t in grid]
    good = [i for i, p in enumerate(before) if p['accuracy'] >= goal] or [len(grid) - 1]
    best = min(good, key=lambda i: before[i]['blocks'])
    curves[name] = {'curve': curve, 'chosen': curve[best]}
  return curves


def _point(threshold: float, score: np.ndarray, correct: np.ndarray) -> dict[str, float]:
  block = first(score >= threshold)
  return {'threshold': float(threshold), 'blocks': float(block.mean() + 1),
          'accuracy': float(chosen(correct, block).mean())}
