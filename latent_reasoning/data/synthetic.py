"""What generated data sets share: items by index, and three disjoint splits."""

import abc
import hashlib
import operator
from collections.abc import Sequence
from typing import Any

from latent_reasoning.data.example import Example
from latent_reasoning.errors import InputError

# Shares of all possible problems, in parts of 256: about 80%, 10%, 10%.
SHARES = {'train': range(0, 204), 'valid': range(204, 230), 'test': range(230, 256)}

ATTEMPTS = 1000  # a split with a tenth of the problems misses with 0.9 ** 1000


def split_of(identity: str) -> str:
  """Returns the one split that owns a problem.

  Args:
    identity: what makes it this problem. It holds no wording, name or seed, so that
      none of them can carry a problem from one split into another.
  """
  part = _part(identity)
  return next(split for split, share in SHARES.items() if part in share)


def _part(identity: str) -> int:
  return hashlib.blake2b(identity.encode(), digest_size=1).digest()[0]


class Generated(Sequence[Example]):
  """One split; item i is a function of (seed, split, i) alone.

  Problems are drawn with replacement, so a small space repeats some.
  """

  def __init__(self, seed: int, split: str, size: int):
    """Makes the sequence; nothing is generated but one problem, as a check.

    Raises:
      InputError: the space is too small for this split to have a problem.
    """
    self._seed, self._split, self._size = seed, split, size
    self[0]  # an empty split shows here, not in the middle of training

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(self._size))]
    i = operator.index(index)
    i += self._size if i < 0 else 0
    if not 0 <= i < self._size:
      raise IndexError(f'problem {index} of {self._size}')
    for attempt in range(ATTEMPTS):
      drawn = self._draw(f'{self._seed}/{self._split}/{i}/{attempt}'.encode())
      if drawn and _part(drawn[0]) in SHARES[self._split]:
        return self._example(drawn[1])
    raise InputError(f'no {self._split} problem among {ATTEMPTS} random {self._space()}')

  def normalise(self, question: str) -> str:
    """A question as these problems write theirs, where only white space differs."""
    return ' '.join(question.split())

  def unlike(self, question: str) -> str | None:
    """How a question differs from these problems, in words; '' where it does not, None where
    only lengths and tokens can tell (data.questions)."""
    return None

  def counterfactual(self, example: Example, seed: int) -> Example | None:
    """The problem with one fact changed, so that its answer is another; None: none is known."""
    return None

  @abc.abstractmethod
  def _draw(self, key: bytes) -> tuple[str, Any] | None:
    """(identity, what `_example` needs), or None to draw again."""

  @abc.abstractmethod
  def _example(self, drawn: Any) -> Example:
    """The problem in words."""

  @abc.abstractmethod
  def _space(self) -> str:
    """What to enlarge where no problem is found."""
