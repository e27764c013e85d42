"""Whether a question is like those of training: an answer to another kind is no answer."""

import functools
from collections.abc import Sequence
from typing import Any

from latent_reasoning.data.example import Example
from latent_reasoning.data.synthetic import Generated
from latent_reasoning.data.tokenizers import Tokenizer

LOOKED_AT = 20_000  # training problems at most
UNSEEN = 1 / 3  # share of a question's tokens that is remarkable


def of(splits: Any, tokenizer: Tokenizer) -> 'TrainingQuestions':
  """Those of a run's splits, where there are any."""
  absent = 'absent' in getattr(splits, 'report', {})
  return TrainingQuestions((), tokenizer) if absent else TrainingQuestions(
      splits.train, tokenizer)


class TrainingQuestions:
  """What the questions of training look like. A generated task knows its own form; else what
  counts are their lengths and tokens.

  Args:
    train: the training split.
    tokenizer: of the model.
  """

  def __init__(self, train: Sequence[Example], tokenizer: Tokenizer):
    self._train, self._tokenizer = train, tokenizer

  def normalise(self, question: str) -> str:
    """A question as training problems write theirs, where only white space differs."""
    return self._train.normalise(question) if isinstance(self._train, Generated) else question

  def unlike(self, question: str) -> str:
    """How a question differs from those of training, in a sentence; '' where it does not."""
    found = self._difference(question)
    return found and (f'the question is unlike those of training: {found}. Its answer means '
                      'little')

  def _difference(self, question: str) -> str:
    if not len(self._train):
      return ''  # nothing is known of them
    known = self._train.unlike(question) if isinstance(self._train, Generated) else None
    if known is not None:
      return known
    asked, (longest, seen) = self._tokenizer.question(question), self._seen
    if len(asked) > longest:
      return f'it has {len(asked)} tokens, they have at most {longest}'
    new = [token for token in asked if token not in seen]
    if len(new) > UNSEEN * len(asked):
      words = ', '.join(repr(self._tokenizer.decode([token]))
                        for token in dict.fromkeys(new[:5]))
      return f'{len(new)} of its {len(asked)} tokens stand in none of them, such as {words}'
    return ''

  @functools.cached_property
  def _seen(self) -> tuple[int, set[int]]:
    """The longest question in tokens, and every token of one."""
    size = min(len(self._train), LOOKED_AT)
    known = [self._tokenizer.question(self._train[i * len(self._train) // size].question)
             for i in range(size)]
    return max(map(len, known)), {token for row in known for token in row}
