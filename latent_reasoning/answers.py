"""Answers: reading one out of a generated text, and comparing two."""

import decimal
import re

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
  return _plain(extract(predicted)) == _plain(extract(reference))


def canonical(text: str) -> str:
  """One spelling for answers that mean the same, to count votes by."""
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
