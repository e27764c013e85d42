"""Answers: reading one out of a generated text, and comparing two by a rule.

| rule      | equal are                                                              |
|-----------|------------------------------------------------------------------------|
| numeric   | equal numbers, where the reference is one; else as `text`              |
| text      | the same words, without case and punctuation                           |
| free_text | as `text`; token F1 and ROUGE-L are measured beside it                 |
| letter    | the same option, A to D                                                |
| latex     | equal mathematics (library `math-verify`)                              |

The form of the data names the rule (data.files). All but `latex` are exact.
"""

import collections
import decimal
import re
from collections.abc import Sequence

from latent_reasoning.errors import InputError
from latent_reasoning.layout import ANSWER_MARK

# A number as people write it: sign, currency, thousands' commas, decimals.
_NUMBER = re.compile(
    r'([-+\u2212]?)\s*[$€£]?\s*([-+\u2212]?)(\d[\d,]*(?:\.\d+)?|\.\d+)(e[-+]?\d{1,3}(?!\d))?',
    re.IGNORECASE)
_OPERATOR = re.compile(r'[-+*/=^<>\u2212]')


def extract(text: str) -> str:
  """Returns what follows the last answer mark, or the whole text without one."""
  return text.rsplit(ANSWER_MARK, 1)[-1].strip()


def number(text: str) -> decimal.Decimal | None:
  """Returns the last number in an answer, or None.

  Commas, units, currency and a final full stop do not count: '$1,234.50' and
  '1234.5 dollars' are the same number. A minus directly after a digit or letter
  subtracts, so '5-3' holds 3.
  """
  matches = list(_NUMBER.finditer(text))
  if not matches:
    return None
  match = matches[-1]
  outer, inner, digits, exponent = match.groups()
  sign = inner or ('' if _subtracts(text, match) else outer)
  value = decimal.Decimal(digits.replace(',', '') + (exponent or ''))
  # copy_negate, because unary minus rounds to the context's 28 digits.
  return value.copy_negate() if sign in ('-', '\u2212') else value


def _subtracts(text: str, match: re.Match) -> bool:
  """Whether the sign before a number joins it to what stands on its left."""
  before = text[:match.start()].rstrip()
  return bool(match[1] and before and before[-1].isalnum())


def same(predicted: str, reference: str) -> bool:
  """Exact match after normalisation, numeric where the reference is a number.

  A reference that is a number and perhaps a unit compares as a number; any
  other as text without case, punctuation and repeated spaces.
  """
  if is_numeric(reference):
    return number(extract(predicted)) == number(extract(reference))
  return same_text(predicted, reference)


def same_text(predicted: str, reference: str) -> bool:
  """Whether two answers are the same words and operators."""
  return _plain(extract(predicted)) == _plain(extract(reference))


# Where a text says its choice, the surest first: alone, said, leading, in brackets.
_CHOICES = tuple(re.compile(p) for p in (
    r'^\W*([A-Da-d])\W*$', r'(?i:answer|option|choice)(?i:\s+is)?\W*\b([A-D])\b',
    r'^\(?([A-Da-d])[).:]', r'\(([A-Da-d])\)'))


def letter(text: str) -> str | None:
  """The option that an answer chooses, or None: 'B', '(b)', 'the answer is B', 'B) 12'."""
  text = extract(text)
  for pattern in _CHOICES:
    if found := pattern.findall(text):
      return found[-1].upper()
  return None


def same_letter(predicted: str, reference: str) -> bool:
  return letter(predicted) == letter(reference) is not None


def same_latex(predicted: str, reference: str) -> bool:
  """Whether two answers are equal mathematics: 1/2, 0.5 and \\frac{1}{2} are."""
  lib = library('latex')
  gold, said = ([*lib.parse(_in_latex(extract(text)))] for text in (reference, predicted))
  return lib.verify(gold, said)


def _in_latex(text: str) -> str:
  return text if '$' in text or '\\boxed' in text or not text else f'${text}$'


ARTICLES = ('a', 'an', 'the')  # do not count in token F1

RULES = {'numeric': same, 'text': same_text, 'free_text': same_text, 'letter': same_letter,
         'latex': same_latex}


def correct(rule: str, predicted: str, references: Sequence[str]) -> bool:
  """Whether an answer equals one of the right ones by a rule of `RULES`."""
  return any(RULES[rule](predicted, reference) for reference in references)


def library(rule: str):
  """The library that a rule needs, None for none; InputError where it is missing."""
  try:
    if rule == 'latex':
      import math_verify
      return math_verify
    if rule == 'free_text':
      from rouge_score import rouge_scorer
      return rouge_scorer
  except ImportError as error:
    raise InputError(f"answers by rule '{rule}' need {error.name}, which is not installed; "
                     "pip install -e '.[eval]'") from None
  return None


def overlap(predicted: str, references: Sequence[str]) -> dict[str, float]:
  """Token F1 (as SQuAD's, arXiv 1606.05250) and ROUGE-L (F, no stemming), of the best match."""
  scorer = library('free_text').RougeScorer(['rougeL'])
  said = extract(predicted)
  return {'f1': max(_f1(said, r) for r in references),
          'rouge_l': float(max(scorer.score(r, said)['rougeL'].fmeasure for r in references))}


def _f1(predicted: str, reference: str) -> float:
  said, right = (collections.Counter(w for w in _plain(t).split() if w not in ARTICLES)
                 for t in (predicted, reference))
  common = (said & right).total()
  return 2 * common / (said.total() + right.total()) if common else float(said == right)


def canonical(text: str, rule: str = 'numeric') -> str:
  """One spelling for answers that mean the same by a rule, to count votes by."""
  if rule == 'letter':
    return letter(text) or _plain(extract(text))
  found = number(extract(text)) if is_numeric(text) else None
  return _plain(extract(text)) if found is None else f'{found.normalize():f}'


def is_numeric(reference: str) -> bool:
  """Whether an answer is one number with at most a unit of one word around it."""
  text = extract(reference)
  found = list(_NUMBER.finditer(text))
  rest = _NUMBER.sub(' ', text)
  if len(found) != 1 or len(re.findall(r'[^\W\d_]+', rest)) > 1:
    return False
  return not _OPERATOR.search(rest) and not _subtracts(text, found[0])


def _plain(text: str) -> str:
  """Words and operators; a hyphen between letters is none. All of it, if that is nothing."""
  kept = re.sub(r'(?<=[^\W\d])-(?=[^\W\d])|[^\w\s+*/=^<>\u2212-]', ' ', text.lower())
  return ' '.join(kept.split()) or text.strip()
