r"""Numbers in answers, by a grammar and a parser that reads a text once, in linear time.

  quantity  = [sign] [currency] [sign] magnitude [scale …]
  magnitude = decimal | fraction | mixed | scientific
  decimal   = digits ['.' digits] ['e' [sign] digits] | '.' digits, where digits may be
              grouped by threes with one kind of separator: , ' ’ _ or one space
  fraction  = whole '/' whole | vulgar                1/2, 1 / 2, ½
  mixed     = whole fraction, below one               3 1/2, 3½
  scientific = decimal times '10' power               1.5 x 10^6, 1.5×10**6, 1.5·10⁶
  scale     = hundred | thousand | million | billion | trillion, and their plurals
  sign      = + - and the minus signs of Unicode; a hyphen that joins a word to a number
              (covid-19) is none
  currency  = any currency symbol, perhaps behind letters: $ US$ A$ ¥ ₹ €; or USD, EUR, Rs. …

Two quantities that an operator joins (3*4, 5-3, 2:3, 2³, 10^2, a date), a decimal comma
(2,5), a list (1,2,3), a version (1.2.3) and a number of more than `LONGEST` digits are
no number: an unevaluated expression is no answer. A power behind a unit is the unit's (5 m^2),
and digits inside a word (H2O) are the word's.
"""

import dataclasses
import re
import unicodedata
from fractions import Fraction

LONGEST = 1000  # digits of a number, and the largest power of ten
TAIL = 4 * LONGEST  # characters in which the last number of a text is looked for
MINUS = '-\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d'
SCALES = {'hundred': 2, 'thousand': 3, 'million': 6, 'billion': 9, 'trillion': 12}
CURRENCIES = {'usd', 'eur', 'gbp', 'inr', 'jpy', 'cny', 'rmb', 'aud', 'cad', 'chf', 'rs', 'us',
              'a', 'c', 'au', 'ca', 'nz', 'hk', 'r'}

_TOKENS = re.compile(rf"""
    (?P<number> (?: \d+ (?: [.,'\u2019_]\d+ )* | \.\d+ ) (?: [eE][-+]?\d+ (?!\w) )? )
  | (?P<vulgar> [\u00bc-\u00be\u2150-\u215f\u2189] )
  | (?P<raised> [\u207a\u207b]?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+ )
  | (?P<word> [^\W\d_]+ )
  | (?P<space> \s+ )
  | (?P<power> \*\* | \^ )
  | (?P<sign> [+{re.escape(MINUS)}] )
  | (?P<operator> [*/:\u00d7\u22c5\u00b7\u00f7\u2215\u2044] )
  | (?P<other> . )""", re.VERBOSE | re.DOTALL)
_GROUPED = re.compile(r"\d{1,3}(?:([,'\u2019_])\d{3}(?:\1\d{3})*)?|\d+")
_SUPERSCRIPTS = str.maketrans('\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079'
                              '\u207a\u207b', '0123456789+-')
_TIMES = ('*', '\u00d7', '\u22c5', '\u00b7', 'x', 'X')
_SLASHES = ('/', '\u2215', '\u2044')


@dataclasses.dataclass(frozen=True)
class Quantity:
  """A number in a text, or what looks like one and is none.

  Attributes:
    value: exact; None: an expression, a list or another thing that is no number.
    start, stop: where it stands, its sign and currency included.
  """
  value: Fraction | None
  start: int
  stop: int


@dataclasses.dataclass(frozen=True)
class _Token:
  kind: str
  text: str
  start: int


def quantities(text: str) -> list[Quantity]:
  """The quantities of a text, in order."""
  found = _Parser(text).run()
  between = [text[a.stop:b.start].strip() for a, b in zip(found, found[1:], strict=False)]
  if between and all(b in (',', ';') for b in between):
    around = text[:found[0].start] + text[found[-1].stop:]
    if not re.search(r'\w', around):  # nothing but numbers: a list
      return [Quantity(None, found[0].start, found[-1].stop)]
  return found


def last(text: str) -> Fraction | None:
  """The last quantity of a text, of which the end is read; None: no number."""
  if len(text) > TAIL:
    text = text[-TAIL:].partition(' ')[2] or text[-TAIL:]
  found = quantities(text)
  return found[-1].value if found else None


class _Parser:
  """Reads tokens from left to right; each is looked at a bounded number of times."""

  def __init__(self, text: str):
    self.tokens = [_Token(m.lastgroup, m[0], m.start()) for m in _TOKENS.finditer(text)]
    self.tokens.append(_Token('end', '', len(text)))
    self.i = 0

  def run(self) -> list[Quantity]:
    found = []
    while self.tokens[self.i].kind != 'end':
      if self._is_start(self.i):
        found.append(self._expression())
      else:
        self.i += 1
    return found

  def _is_start(self, i: int) -> bool:
    """Whether a magnitude begins here, and not inside a word."""
    token = self.tokens[i]
    before = self.tokens[i - 1] if i else None
    if token.kind == 'vulgar':
      return True
    inside = (before and before.kind in ('word', 'power')
              and before.start + len(before.text) == token.start)
    return token.kind == 'number' and (
        not inside or before.text.lower() in CURRENCIES or before.text in ('x', 'X'))

  def _expression(self) -> Quantity:
    """A quantity, or several that operators join, which are none."""
    sign, start = self._ornaments()
    value = self._magnitude()
    joined = False
    while (after := self._joins()) is not None:
      joined, self.i = True, after
      self._magnitude()
    if joined or value is None:
      value = None
    elif sign < 0:
      value = -value
    return Quantity(value, start, self.tokens[self.i].start)

  def _ornaments(self) -> tuple[int, int]:
    """Sign and currency before the magnitude at `i`: the sign, and where it all begins."""
    sign, j = 1, self.i
    for _ in range(2):  # currency, then sign; or sign, then currency, then sign
      j, minus = self._sign_before(j)
      sign *= minus
      j = self._currency_before(j)
    j, minus = self._sign_before(j)
    return sign * minus, self.tokens[j].start

  def _back(self, j: int) -> int:
    """The token before j, a space left out."""
    j -= 1
    return j - 1 if j >= 0 and self.tokens[j].kind == 'space' else j

  def _sign_before(self, j: int) -> tuple[int, int]:
    k = self._back(j)
    if k < 0 or self.tokens[k].kind != 'sign':
      return j, 1
    before = self.tokens[k - 1] if k else None
    if before and before.kind in ('word', 'number', 'vulgar'):
      return j, 1  # a hyphen
    return k, -1 if self.tokens[k].text in MINUS else 1

  def _currency_before(self, j: int) -> int:
    k = self._back(j)
    if k < 0:
      return j
    token = self.tokens[k]
    if token.text == '.' and k and self.tokens[k - 1].text.lower() == 'rs':
      return k - 1
    if token.kind == 'word' and token.text.lower() in CURRENCIES and len(token.text) > 1:
      return k
    if token.kind != 'other' or unicodedata.category(token.text) != 'Sc':
      return j
    if k and self.tokens[k - 1].kind == 'word' and \
        self.tokens[k - 1].text.lower() in CURRENCIES:
      return k - 1
    return k

  def _magnitude(self) -> Fraction | None:
    """The magnitude at `i`, which is left behind; None where it is no number."""
    value, whole = self._decimal()
    before = self.i
    fraction = self._fraction_behind(value) if whole else None
    if self.i > before:
      value = fraction
    elif (power := self._scientific()) is not None:
      value = None if value is None or abs(power) > LONGEST else value * _ten(power)
    if self.tokens[self.i].kind in ('raised', 'power'):  # 2³, 10^2
      value = None
    while (scale := self._scale()) is not None:
      value = None if value is None else value * _ten(scale)
    return value

  def _decimal(self) -> tuple[Fraction | None, bool]:
    """A decimal or vulgar fraction, and whether it is a whole number without ornaments."""
    token = self.tokens[self.i]
    self.i += 1
    if token.kind == 'vulgar':
      return Fraction(unicodedata.numeric(token.text)).limit_denominator(100), False
    text = token.text
    if text.isdigit() and len(text) <= 3:  # perhaps grouped by spaces
      while text.isdigit() and (group := self._spaced_group()):
        text += group
        self.i += 2
    return _decimal(text), text.isdigit()

  def _spaced_group(self) -> str:
    """The three digits behind one space, of which no fraction is made, and decimals."""
    space, group, after = self.tokens[self.i], *self._two(self.i + 1)
    spaced = space.kind == 'space' and len(space.text) == 1 and space.text not in '\n\r\t'
    if spaced and group.kind == 'number' and re.fullmatch(r'\d{3}(\.\d+)?', group.text) \
        and after.text not in _SLASHES and after.kind != 'vulgar':
      return group.text
    return ''

  def _two(self, i: int) -> tuple[_Token, _Token]:
    end = self.tokens[-1]
    return (self.tokens[i] if i < len(self.tokens) else end,
            self.tokens[i + 1] if i + 1 < len(self.tokens) else end)

  def _fraction_behind(self, whole: Fraction | None) -> Fraction | None:
    """The whole number just read as the numerator, or the whole, of a fraction."""
    if whole is None:
      return None
    if (below := self._denominator(self.i)) is not None:
      value, self.i = below
      return whole / value if value else None
    at = self.i + (self.tokens[self.i].kind == 'space')
    token = self.tokens[at]
    if token.kind == 'vulgar':
      self.i = at + 1
      return whole + Fraction(unicodedata.numeric(token.text)).limit_denominator(100)
    if at > self.i and token.kind == 'number' and token.text.isdigit():
      below = self._denominator(at + 1)
      above = _decimal(token.text)
      if below and above is not None and above < below[0]:
        self.i = below[1]
        return whole + above / below[0]
    return None

  def _denominator(self, i: int) -> tuple[Fraction, int] | None:
    """The whole number behind a slash at i, and where it ends."""
    i += self.tokens[i].kind == 'space'
    if self.tokens[i].text not in _SLASHES:
      return None
    i += 1
    i += self.tokens[i].kind == 'space'
    token, after = self._two(i)
    value = _decimal(token.text) if token.kind == 'number' and token.text.isdigit() else None
    if value is None or after.kind in ('power', 'raised') or after.text in _SLASHES:
      return None
    return value, i + 1

  def _scientific(self) -> int | None:
    """The exponent of '× 10^6' at `i`."""
    i = self.i + (self.tokens[self.i].kind == 'space')
    if self.tokens[i].text not in _TIMES:
      return None
    i += 1
    i += self.tokens[i].kind == 'space'
    ten, power = self._two(i)
    if ten.text != '10' or power.kind not in ('power', 'raised'):
      return None
    if power.kind == 'raised':
      self.i = i + 2
      return _integer(power.text.translate(_SUPERSCRIPTS))
    i += 2
    opened = self.tokens[i].text in ('(', '{')
    i += opened
    sign = ''
    if self.tokens[i].kind == 'sign':
      sign = '-' if self.tokens[i].text in MINUS else ''
      i += 1
    if not (self.tokens[i].kind == 'number' and self.tokens[i].text.isdigit()):
      return None
    exponent = _integer(sign + self.tokens[i].text)
    self.i = i + 1 + (opened and self.tokens[i + 1].text in (')', '}'))
    return exponent

  def _scale(self) -> int | None:
    i = self.i + (self.tokens[self.i].kind == 'space')
    word = self.tokens[i].text.lower() if self.tokens[i].kind == 'word' else ''
    scale = SCALES.get(word.removesuffix('s'))
    if scale is not None:
      self.i = i + 1
    return scale

  def _joins(self) -> int | None:
    """Where the next magnitude is that an operator joins to what was just read."""
    i = self.i + (self.tokens[self.i].text == '%')
    spaced = self.tokens[i].kind == 'space'
    i += spaced
    first = i
    while (self.tokens[i].kind in ('operator', 'power', 'sign')
           or self.tokens[i].text in ('x', 'X')) and i < first + 4:
      i += 1
      i += self.tokens[i].kind == 'space'
    if i == first:
      # Without a word between them two numbers are one thing: 1.2.3, 3½ 4.
      if spaced or self.tokens[i].kind not in ('number', 'vulgar', 'raised'):
        return None
    if self.tokens[i].kind == 'word' and self.tokens[i].text.lower() in CURRENCIES:
      i += 1
    if self.tokens[i].text and (self.tokens[i].text in '([{' or
                                unicodedata.category(self.tokens[i].text[0]) == 'Sc'):
      i += 1
    return i if self.tokens[i].kind in ('number', 'vulgar', 'raised') else None


def _decimal(text: str) -> Fraction | None:
  """The number that a token spells; None where it is a list, too long or grouped wrongly."""
  body, _, exponent = text.lower().partition('e')
  whole, _, part = body.partition('.')
  power = _integer(exponent) if exponent else 0
  if len(body) > LONGEST or power is None or abs(power) > LONGEST:
    return None
  if part and not part.isdigit() or whole and not _GROUPED.fullmatch(whole):
    return None
  digits = re.sub(r'\D', '', whole)
  return Fraction(int(f'{digits}{part}' or 0)) * _ten(power - len(part))


def _integer(text: str) -> int | None:
  return int(text) if len(text) <= 6 else None


def _ten(power: int) -> Fraction:
  return Fraction(10)**power
