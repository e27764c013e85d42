"""The one form every problem takes, whatever file it came from."""

import dataclasses
import decimal
import re
from collections.abc import Iterable

from latent_reasoning.errors import InputError

_NUMBER = re.compile(r'-?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?')


@dataclasses.dataclass(frozen=True)
class Example:
  """A question, its reasoning steps (possibly none) and its answer, as text.

  `others` are further answers that are as right; the model is trained on `answer`.
  """
  question: str
  steps: tuple[str, ...]
  answer: str
  others: tuple[str, ...] = ()

  @property
  def characters(self) -> int:
    """Of question and steps."""
    return len(self.question) + sum(map(len, self.steps))


def of(question: str, steps: Iterable[str], answer: str, others: Iterable[str]) -> Example:
  """An example as JSON holds it."""
  return Example(question, tuple(steps), answer, tuple(others))


def make(question: str, steps: Iterable[str], answer: str,
         others: Iterable[str] = ()) -> Example:
  """Returns an `Example` on single lines, without blank steps or other answers.

  Raises:
    InputError: an empty question or answer, or text that UTF-8 cannot hold.
  """
  question, answer = normalise(question), number(normalise(answer))
  if not question:
    raise InputError('found an empty question; expected text')
  if not answer:
    raise InputError('found an empty answer; expected text or a number')
  steps = tuple(s for s in map(normalise, steps) if s)
  others = tuple(number(a) for a in map(normalise, others) if a)
  try:
    ''.join((question, *steps, answer, *others)).encode()
  except UnicodeEncodeError as e:
    raise InputError(f'found the lone surrogate {e.object[e.start]!r}; expected text '
                     'that UTF-8 can hold') from e
  return Example(question, steps, answer, others)


def normalise(text: str) -> str:
  """Returns `text` with every run of whitespace, newlines too, as one space."""
  return ' '.join(text.split())


def is_number(text: str) -> bool:
  """Whether a text is one number, as `number` writes it, and nothing else."""
  return bool(_NUMBER.fullmatch(text))


def number(value: str | int | float) -> str:
  """Returns a number in its shortest decimal form; other text as it is.

  `16.0` and `'16.00'` become `16`, `'1,080'` becomes `1080`, `1e-05` becomes
  `0.00001`: one spelling, so that a tokenizer and an exact match see one answer.

  Raises:
    InputError: a float that is not finite.
  """
  if isinstance(value, float):
    value = decimal.Decimal(repr(value))
    if not value.is_finite():
      raise InputError(f'found the number {value}; expected a finite one')
    value = f'{value:f}'
  text = str(value)
  if not is_number(text):
    return text
  text = text.replace(',', '')
  if '.' in text:
    text = text.rstrip('0').rstrip('.')
  return '0' if text == '-0' else text
