"""Numbers in texts: the grammar, and what is none of it."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_reasoning.eval import answer_matching
from latent_reasoning.eval.numbers import LONGEST, MINUS, SCALES, last, quantities

NUMBERS = {
    '1/2': Fraction(1, 2), '1 / 2': Fraction(1, 2), '½': Fraction(1, 2), '0.5': Fraction(1, 2),
    '3 1/2': Fraction(7, 2), '3½': Fraction(7, 2), '-3 1/2': Fraction(-7, 2),
    '⅔': Fraction(2, 3), '३.५': Fraction(7, 2),
    '1.5 x 10^6': 1_500_000, '1.5×10^6': 1_500_000, '1.5·10⁶': 1_500_000,
    '1.5 * 10**-3': Fraction(15, 10_000), '2 × 10^{3}': 2000, '1 234': 1234,
    '1\u00a0234': 1234, '1\u2009234\u2009567': 1_234_567, '1\u202f234': 1234, "1'234": 1234,
    '1’234': 1234, '1_234': 1234, '5 m^2': 5, '5 m²': 5, '6 m2': 6, '-¥5': -5, '-₹5': -5,
    '-US$5': -5, 'US$ 5': 5, '₹1,234.50': Fraction(2469, 2), 'Rs. 5': 5, '5 USD': 5,
    '5 thousand': 5000, '1.5 million dollars': 1_500_000, '2 hundred thousand': 200_000,
    'covid-19': 19, 'In 2020, 5 people': 5, '3 or 4': 4, 'x = 3, y = 4': 4, '٣': 3}
NONE = ('2³', '10^2', '2**3', '3*4', '3 x 4', '3x4', '2:3', '3,4', '2,5', '1,2,3', '1, 2, 3',
        '5-3', '5 - 3', '3–5', '$5-$6', '5%-6%', '2*-3', '1.2.3', '2020-01-02', '12:30', '1/0',
        '1.5/2', '12,34', '1,2345', '1 2/3/4', "1'2345", '1,234_567', '9' * (LONGEST + 1),
        '1e99999', 'H2O', 'x^2')


@pytest.mark.parametrize('text, value', NUMBERS.items())
def test_numbers(text, value):
  assert last(text) == value


@pytest.mark.parametrize('text', NONE)
def test_no_numbers(text):
  """Expressions, lists, ratios, dates and powers are no answer, whatever is in them."""
  assert last(text) is None
  for part in '0123456789':
    assert not answer_matching.same(text, part)


@pytest.mark.parametrize('text, reference', [
    ('3/2', '3'), ('3/2', '2'), ('3 1/2', '3'), ('3 1/2', '2'), ('3½', '3'), ('2³', '2'),
    ('2³', '3'), ('10^2', '10'), ('10^2', '2'), ('2**3', '3'), ('3*4', '4'), ('2:3', '3'),
    ('3,4', '4'), ('3,4', '34'), ('2,5', '5'), ('2,5', '25'), ('1,2,3', '123'), ('1,2,3', '3'),
    ('5 thousand', '5 million'), ('5 thousand', '5'), ('5 m^2', '2')])
def test_near_misses(text, reference):
  assert not answer_matching.same(text, reference) and not answer_matching.same(reference, text)


@pytest.mark.parametrize('minus', MINUS)
def test_minus_signs(minus):
  """Each is a sign before a number, and joins two."""
  assert last(f'{minus}5') == last(f'it is {minus} 5') == last(f'{minus}$5') == -5
  assert last(f'7{minus}5') is None


whole = st.integers(0, 10**15)
separators = st.sampled_from([',', ' ', '\u00a0', '\u2009', "'", '’', '_'])


@given(whole, separators, st.sampled_from(['', *MINUS]), st.sampled_from(['', '$', '€', 'US$']),
       st.sampled_from(['', ' apples', '%', '.', ' m^2', ' kg']), st.integers(0, 4))
@settings(deadline=None)
def test_what_is_written_is_read(value, separator, minus, currency, unit, zeros):
  """Separators, currency, units and zeros change nothing; a neighbour is another number."""
  text = f'{value:,}'.replace(',', separator) + ('.' + '0' * zeros) * bool(zeros)
  text = f'{minus}{currency}{text}{unit}'
  expected = -value if minus else value
  assert last(text) == expected and answer_matching.is_numeric(text)
  assert answer_matching.same(text, str(expected)) and answer_matching.same(str(expected), text)
  assert not answer_matching.same(text, str(expected + 1))


@given(st.fractions(-10**6, 10**6, max_denominator=10**6))
@settings(deadline=None)
def test_fractions(value):
  """a/b is the number, and its parts are not."""
  text = f'{value.numerator}/{value.denominator}'
  assert last(text) == value
  assert answer_matching.same(text, str(value.numerator)) is (value.denominator == 1)
  if value.denominator > 1 and value > 0:
    mixed = f'{value.numerator // value.denominator} ' \
            f'{value.numerator % value.denominator}/{value.denominator}'
    assert last(mixed) == value


@given(st.decimals(-10**9, 10**9, places=3), st.integers(-30, 30),
       st.sampled_from(['e{}', ' x 10^{}', '×10**{}', ' · 10^{{{}}}']))
@settings(deadline=None)
def test_powers_of_ten(value, power, form):
  text = f'{value:f}{form.format(power)}'
  assert last(text) == Fraction(value) * Fraction(10)**power


@given(st.integers(1, 999), st.sampled_from(sorted(SCALES)), st.sampled_from(['', 's']))
def test_scales(value, scale, plural):
  assert last(f'{value} {scale}{plural}') == value * 10**SCALES[scale]


@given(whole, whole, st.sampled_from(['*', '×', '÷', ':', '+', '^', '**', ' x ', *MINUS]),
       st.booleans())
@settings(deadline=None)
def test_expressions_are_none(a, b, operator, spaced):
  """No operator joins two numbers to a number that anybody meant as the answer."""
  text = f'{a} {operator} {b}' if spaced else f'{a}{operator}{b}'
  if not (b == 10 and operator.strip() in 'x×*'):
    assert last(text) is None
    assert not answer_matching.same(text, str(a)) and not answer_matching.same(text, str(b))


@given(st.text(alphabet='0123456789+-−.,/ ½²^*x×$€%eE\'()=', max_size=25))
@settings(max_examples=500, deadline=None)
def test_any_text_is_read(text):
  """Quantities lie side by side in order, and reading never fails."""
  found = quantities(text)
  ends = [edge for q in found for edge in (q.start, q.stop)]
  assert ends == sorted(ends) and all(0 <= e <= len(text) for e in ends)
  assert answer_matching.same(text, text)
