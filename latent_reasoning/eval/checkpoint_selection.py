"""How a checkpoint is chosen before it is scored: two protocols, never mixed.

| protocol   | the checkpoint is chosen on | accuracy is of                               |
|------------|-----------------------------|----------------------------------------------|
| validation | the validation split        | the whole test split                         |
| paper      | 264 random test items       | the other test items, mean over 16 such cuts |

The second is that of RiM (arXiv 2605.30343). It looks at test items to choose, so its
figures are for comparison with the paper's alone.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from latent_reasoning.errors import InputError

CUTS = 16
SELECTION = 264  # items


def check(count: int) -> None:
  """Raises InputError where a test split of `count` items is too small for `paper`."""
  if count <= SELECTION:
    raise InputError(
        f"config.eval.checkpoint_selection is 'paper', which chooses the checkpoint on "
        f'{SELECTION} test items and scores the rest; found {count} test items, expected at '
        f"least {SELECTION + 1}; raise config.eval.test_problems, or set "
        "config.eval.checkpoint_selection='validation'")


def paper(correct: np.ndarray, seed: int,
          sets: Mapping[str, np.ndarray] | None = None) -> dict[str, Any]:
  """Scores by the paper's protocol.

  Args:
    correct: bool [checkpoints, items] of the test split, the oldest checkpoint first.
    seed: of the cuts.
    sets: bool [checkpoints, items] of other sets. All items of those are scored, with the
      checkpoint that each cut of the test split chose.

  Returns:
    mean `accuracy` and its `standard_error` over the cuts (which share items, so it is
    smaller than that of new test items); `chosen`, how often each checkpoint was; the
    same two figures of each of `sets`.

  Raises:
    InputError: too few items.
  """
  correct = np.asarray(correct, bool)
  check(correct.shape[1])
  chosen, scores = [], []
  for cut in range(CUTS):
    order = np.random.default_rng((seed, cut)).permutation(correct.shape[1])
    selection = correct[:, order[:SELECTION]].sum(1)
    best = len(selection) - 1 - int(np.argmax(selection[::-1]))  # the latest of equals
    chosen.append(best)
    scores.append(correct[best, order[SELECTION:]].mean())
  return {
      'protocol': 'paper', 'cuts': CUTS, 'selection_items': SELECTION,
      'scored_items': correct.shape[1] - SELECTION, **_over(scores),
      'chosen': np.bincount(chosen, minlength=len(correct)).tolist(),
      'sets': {name: {'n': other.shape[1], **_over(other[chosen].mean(1))}
               for name, other in (sets or {}).items()}}


def _over(scores) -> dict[str, float]:
  return {'accuracy': float(np.mean(scores)),
          'standard_error': float(np.std(scores, ddof=1) / np.sqrt(CUTS))}
