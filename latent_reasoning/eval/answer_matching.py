"""Answers: reading one out of a generated text, and comparing two by a rule.

| rule          | equal are                                                             |
|---------------|-----------------------------------------------------------------------|
| numeric       | equal numbers, where the reference is one; else as `text`             |
| numeric_close | the same, up to `TOLERANCE`: the references carry float noise         |
| text          | the same words, without case and punctuation                          |
| free_text     | as `text`; token F1 and ROUGE-L are measured beside it                |
| letter        | the same option, A to D                                               |
| latex         | equal mathematics (library `math-verify`)                             |

The form of the data names the rule (data.files). What a number is, `answer_numbers` says. A
rule takes time in proportion to the length of a text.
"""

import collections
import logging
import re
import threading
import unicodedata
from collections.abc import Sequence
from fractions import Fraction

from latent_reasoning.errors import InputError
from latent_reasoning.eval import numbers
from latent_reasoning.sequences import ANSWER_MARK

# |a - b| <= max(absolute, relative · |b|); the absolute one is that of PAL's evaluation of
# GSM-Hard (arXiv 2211.10435), the relative one covers float64's noise in large numbers.
TOLERANCE = {'absolute': 1e-3, 'relative': 1e-15}
LONG = 1000  # characters: what is longer is no number, no letter and no formula


def extract(text: str) -> str:
  """Returns what follows the last answer mark, or the whole text without one."""
  return text.rsplit(ANSWER_MARK, 1)[-1].strip()


# --- numbers ------------------------------------------------------------------


def number(text: str) -> Fraction | None:
  """Returns the last number in an answer; None where there is none, or an expression.

  Units, currency, separators of thousands and a final full stop do not count: '$1,234.50'
  and '1234.5 dollars' are the same number; '3*4' is none.
  """
  return numbers.last(text)


def same(predicted: str, reference: str) -> bool:
  """Exact match after normalisation, numeric where the reference is a number.

  A reference that is a number and perhaps a unit compares as a number; any
  other as text without case, punctuation and repeated spaces.
  """
  if is_numeric(reference):
    return number(extract(predicted)) == number(extract(reference))
  return same_text(predicted, reference)


def same_close(predicted: str, reference: str) -> bool:
  """As `same`, but numbers may differ by `TOLERANCE`."""
  if not is_numeric(reference):
    return same_text(predicted, reference)
  said, right = number(extract(predicted)), number(extract(reference))
  if said is None:
    return False
  allowed = max(Fraction(TOLERANCE['absolute']), Fraction(TOLERANCE['relative']) * abs(right))
  return abs(said - right) <= allowed


def is_numeric(reference: str) -> bool:
  """Whether an answer is one number with at most a unit of one word around it."""
  text = extract(reference)
  if len(text) > 2 * LONG:
    return False
  found = numbers.quantities(text)
  if len(found) != 1 or found[0].value is None:
    return False
  before, behind = text[:found[0].start], text[found[0].stop:]
  behind = re.sub(r'(?<=[^\W\d_])(\^|\*\*)?-?[\d⁰¹²³⁴-⁹]+', '', behind)  # of a unit: m^2
  return (len(re.findall(r'[^\W\d_]+', before + ' ' + behind)) <= 1
          and not re.search(r'[*=^<>\d]', before + behind)
          and not re.search(rf'[{re.escape(numbers.MINUS)}+]\s*$', before))


# --- text ---------------------------------------------------------------------


def same_text(predicted: str, reference: str) -> bool:
  """Whether two answers are the same words and operators."""
  return plain(extract(predicted)) == plain(extract(reference))


def plain(text: str) -> str:
  """Words and operators of a text, one space between them; all of it, if that is nothing.

  Case (folded), composition (NFC) and punctuation do not count. Combining marks belong to
  their letters, points between digits to the number, `#` and `+` behind a letter to the word
  (C#), and an apostrophe inside a word joins it (don't); a hyphen between letters is a space.
  """
  folded = unicodedata.normalize('NFC', unicodedata.normalize('NFC', text).casefold())
  spaced = re.sub(r"(?<=\w)['\u2019\u02bc](?=\w)", '', folded)
  kept, last = [], len(spaced) - 1
  for i, character in enumerate(spaced):
    before, after = spaced[i - 1] if i else ' ', spaced[i + 1] if i < last else ' '
    if character.isalnum() or character in _OPERATORS or unicodedata.category(
        character).startswith('M'):
      keep = True
    elif character in numbers.MINUS:
      keep = not (before.isalpha() and after.isalpha())
      character = '-'
    else:
      keep = (character == '.' and before.isdigit() and after.isdigit()
              or character == '#' and before.isalnum())
    kept.append(character if keep else ' ')
  return ' '.join(''.join(kept).split()) or text.strip()


_OPERATORS = frozenset('+*/=^<>')


# --- letters ------------------------------------------------------------------

# Words that say an answer, or a choice; and what may stand between them and the letter.
_ANSWER = {'answer', 'answers', 'solution', 'correct', '答案', '答え', 'ответ', 'respuesta',
           'réponse', 'antwort'}
_CHOICE = {'choose', 'chose', 'pick', 'select', 'choosing', 'so', 'thus', 'hence', 'therefore'}
_OPTION = {'option', 'choice'}
_BETWEEN = {'is', 'are', 'be', 'would', 'should', 'must', 'the', 'correct', 'option', 'choice',
            'letter', 'answer', 'therefore', 'thus', 'so', 'it', 'final', '是', '为'}
_REASON = {'because', 'since', 'as', 'due', 'is', 'given', 'by', 'which'}
_PARTS = re.compile(r'[A-Za-z]+|[^\W\dA-Za-z_]+|\d+|[^\w\s]|_')


def letter(text: str) -> str | None:
  """The option, A to D, that an answer chooses, or None.

  The surest way of saying it counts, and of several the last: the last box; the letter
  alone; behind 'answer'; behind 'choose', 'so' …; behind 'option'; in front, with a mark or
  a reason behind it ('B) 12', 'B because'); in brackets. An article (`A dog`) is none.
  """
  text = extract(text)
  if '\\boxed' in text or '\\fbox' in text:
    return letter(boxed(text))
  parts = _PARTS.findall(re.sub(r'\\[A-Za-z]+', ' ', text))  # no commands of LaTeX
  words = [part for part in parts if part.isalnum()]
  if len(words) == 1:
    return _option(words[0])
  by_word = {'answer': None, 'choice': None, 'option': None}
  for i, part in enumerate(parts):
    kind = _kind(part)
    if kind and (found := _option_behind(parts, i + 1)):
      by_word[kind] = found
  leading = parts[1:] if parts[:1] == ['('] else parts
  front = len(leading) > 1 and _option(leading[0]) and (
      leading[1] in ').:,' or leading[0].isupper() and leading[1].lower() in _REASON)
  bracketed = [_option(part) for before, part, after in zip(
      parts, parts[1:], parts[2:], strict=False) if before == '(' and after == ')']
  return (by_word['answer'] or by_word['choice'] or by_word['option']
          or (_option(leading[0]) if front else None)
          or next(filter(None, reversed(bracketed)), None))


def _kind(word: str) -> str | None:
  """What a word says of a letter behind it."""
  word = word.lower()
  if word in _ANSWER or word.startswith(('答案', '答え')):
    return 'answer'
  return 'choice' if word in _CHOICE else 'option' if word in _OPTION else None


def _option(word: str) -> str | None:
  return word.upper() if len(word) == 1 and word.upper() in 'ABCD' else None


def _option_behind(parts: Sequence[str], i: int) -> str | None:
  """The letter behind a word, over marks and words such as 'is the'."""
  for j in range(i, min(i + 10, len(parts))):
    part = parts[j]
    if option := _option(part):
      after = parts[j + 1] if j + 1 < len(parts) else '.'
      article = after.isalpha() and after.lower() not in _REASON and (
          part in 'Aa' or part.islower())
      return None if article else option
    if part.isalnum() and part.lower() not in _BETWEEN or part in '.;!?':
      return None
  return None


def same_letter(predicted: str, reference: str) -> bool:
  return letter(predicted) == letter(reference) is not None


# --- LaTeX --------------------------------------------------------------------


def boxed(text: str) -> str:
  r"""What stands in the last box: \boxed{2}, \fbox{2}, \boxed {2}, \boxed 2, \boxed2."""
  at = max(text.rfind('\\boxed'), text.rfind('\\fbox'))
  if at < 0:
    return text
  rest = text[at:].removeprefix('\\boxed').removeprefix('\\fbox').lstrip()
  if not rest.startswith('{'):
    return re.match(r'\\?[^\W_]*[^\s$]?', rest)[0] if rest else ''
  depth = 0
  for i, character in enumerate(rest):
    depth += (character == '{') - (character == '}')
    if not depth:
      return rest[1:i]
  return rest[1:]


_CHAIN = re.compile(r'([^<>]+)(<=?|\\leq?|\\lt|≤)([^<>]+)(<=?|\\leq?|\\lt|≤)([^<>]+)')


def same_latex(predicted: str, reference: str) -> bool:
  """Whether two answers are equal mathematics: 1/2, 0.5 and \\frac{1}{2} are."""
  lib = library('latex')
  said, right = (_formula(boxed(extract(text))) for text in (predicted, reference))
  if said == right:
    return bool(right)
  if max(len(said), len(right)) > LONG:
    return False
  # Its limits of time are signals, which the main thread alone may set.
  main = threading.current_thread() is threading.main_thread()
  gold, answer = ([*lib.parse(f'${text}$', parsing_timeout=5 if main else None)] if text else []
                  for text in (right, said))
  return lib.verify(gold, answer, timeout_seconds=5 if main else None)


def _formula(text: str) -> str:
  """A formula without what does not count: delimiters, currency, spacing, thousands."""
  text = re.sub(r'\\[\[\]()]|\\!|\\,|\\ |(?<!\\)\$', ' ', text).strip()
  text = re.sub(r'\\(?:text|mathrm|textbf)\{\s*\\\$\s*([\d.,\s]+)\}', r'\1', text)
  text = text.replace('\\$', '').strip()
  text = re.sub(r'(?<=\d)\s*,\s*(?=\d{3}(?:\D|$))', ',', text)
  if re.fullmatch(r'\d{1,3}(,\d{3})+(\.\d+)?', text):
    text = text.replace(',', '')
  if re.fullmatch(r'\d+_\{?\d+\}?', text):  # a number in another base is no decimal one
    return f'base({text})'
  if len(text) <= LONG and (chain := _CHAIN.fullmatch(text)):
    low, first, _, second, high = chain.groups()
    opened, closed = '[('[first in _STRICT], '])'[second in _STRICT]
    return f'{opened}{low.strip()},{high.strip()}{closed}'
  return text


_STRICT = ('<', '\\lt')


# --- all rules ----------------------------------------------------------------

ARTICLES = ('a', 'an', 'the')  # do not count in token F1

RULES = {'numeric': same, 'numeric_close': same_close, 'text': same_text,
         'free_text': same_text, 'letter': same_letter, 'latex': same_latex}


def correct(rule: str, predicted: str, references: Sequence[str]) -> bool:
  """Whether an answer equals one of the right ones by a rule of `RULES`."""
  return any(RULES[rule](predicted, reference) for reference in references)


def library(rule: str):
  """The library that a rule needs, None for none; InputError where it is missing."""
  try:
    if rule == 'latex':
      import math_verify
      logging.getLogger('math_verify').setLevel(logging.ERROR)  # it warns off the main thread
      return math_verify
    if rule == 'free_text':
      from rouge_score import rouge_scorer
      return rouge_scorer
  except ImportError as error:
    raise InputError(f"answers by rule '{rule}' need {error.name}, which is not installed; "
                     "pip install -e '.[eval]'") from None
  return None


class _Words:
  """The words of any script for ROUGE, whose own tokenizer keeps ASCII alone."""

  def tokenize(self, text: str) -> list[str]:
    return plain(text).split()


def overlap(predicted: str, references: Sequence[str]) -> dict[str, float]:
  """Token F1 (as SQuAD's, arXiv 1606.05250) and ROUGE-L (F, no stemming), of the best match."""
  scorer = library('free_text').RougeScorer(['rougeL'], tokenizer=_Words())
  said = extract(predicted)
  return {'f1': max(_f1(said, r) for r in references),
          'rouge_l': float(max(scorer.score(r, said)['rougeL'].fmeasure for r in references))}


def _f1(predicted: str, reference: str) -> float:
  said, right = (collections.Counter(w for w in plain(t).split() if w not in ARTICLES)
                 for t in (predicted, reference))
  common = (said & right).total()
  return 2 * common / (said.total() + right.total()) if common else float(said == right)


def canonical(text: str, rule: str = 'numeric') -> str:
  """One spelling for answers that mean the same by a rule, to count votes by."""
  if rule == 'letter':
    return letter(text) or plain(extract(text))
  found = number(extract(text)) if is_numeric(text) else None
  return plain(extract(text)) if found is None else str(found)
