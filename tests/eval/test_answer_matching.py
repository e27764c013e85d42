"""Answers: numbers read as people write them, and the exact match."""

import decimal
import sys
import threading
import unicodedata
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from latent_reasoning.errors import InputError
from latent_reasoning.eval import answer_matching

NUMBERS = [  # text, the number it holds
    ('72', '72'), ('1,234', '1234'), ('$1,234.50', '1234.5'), ('1,234,567', '1234567'),
    ('-3', '-3'), ('\u22123', '-3'), ('+3', '3'), ('- 3', '-3'), ('-$3', '-3'),
    ('$-3', '-3'), ('\u2212$1,000.25', '-1000.25'), ('€5', '5'), ('£ 5', '5'),
    ('3.0', '3'), ('0.50', '0.5'), ('.5', '0.5'), ('-.5', '-0.5'), ('007', '7'),
    ('72 dollars', '72'), ('72.', '72'), ('72,', '72'), ('the answer is -3', '-3'),
    ('x=-3', '-3'), ('(-3)', '-3'), ('x-3', '3'), ('5-3=2', '2'), ('50%', '50'),
    ('1e3', '1000'), ('2.5E-2', '0.025'), ('1 or 2', '2'), ('-0', '0')]


@pytest.mark.parametrize('text, value', NUMBERS)
def test_number(text, value):
  """The last number of a text, with its sign and without its ornaments."""
  assert answer_matching.number(text) == Fraction(value)


@pytest.mark.parametrize('text', ['', 'no number', '-', '$', '.', ',', '\u2212'])
def test_no_number(text):
  """A text without digits holds none."""
  assert answer_matching.number(text) is None


SAME = [  # predicted, reference
    ('72', '72'), ('1,234', '1234'), ('1234', '1,234'), ('$1,234.50', '1234.5'),
    ('\u22123', '-3'), ('+3', '3'), ('3.0', '3'), ('3', '3.0'), ('0.50', '.5'),
    ('72 dollars', '72'), ('72', '72 dollars'), ('72 apples', '72 dollars'),
    ('#### 72', '72'), ('72', '#### 72'), ('x=1\n####72', '72'), ('#### 1\n#### 72', '72'),
    ('3+4=7\n7*2=14\n####14', '14'), ('50%', '50'), ('50', '50%'),
    ('1e3', '1000'), ('1000', '1e3'), ('72.', '72'), ('  72\n', '72'), ('0', '-0'),
    ('Sally is a sterpus.', 'Sally is a sterpus'),
    ('sally is a STERPUS', 'Sally is a sterpus.'),
    ('Sally  is\na sterpus!', 'Sally is a sterpus.'), ('#### True', 'true'),
    ('yes', 'Yes.'), ('well known', 'Well-known!'), ('X - 1', 'x - 1'), ('x*y', 'x*y.'),
    ('the answer is 12', '12'), ('12345678901234567890123', '12345678901234567890123.0')]


@pytest.mark.parametrize('predicted, reference', SAME)
def test_same(predicted, reference):
  """Two spellings of one answer."""
  assert answer_matching.same(predicted, reference)


DIFFERENT = [
    ('73', '72'), ('-3', '3'), ('3', '-3'), ('\u22123', '3'), ('7', '72'), ('72', '7'),
    ('1.234', '1,234'), ('12.34', '1234'), ('', '72'), ('no number', '0'), ('', '0'),
    ('72\n####', '72'), ('####72\n####73', '72'), ('#### 73 not 72 but 73', '72'),
    ('5-3', '5'), ('5-3', '3'), ('5-3', '-3'), ('0.5', '50%'), ('1e3', '1'), ('1e3', '3'),
    ('1', '1e3'),
    ('Sally is a yumpus.', 'Sally is a sterpus.'), ('', 'Sally is a sterpus.'),
    ('Sally is not a sterpus.', 'Sally is a sterpus.'), ('no', 'yes'), ('yes no', 'yes'),
    ('x+1', 'x-1'), ('x-1', 'x+1'), ('a*b', 'a+b'), ('1', 'x-1'), ('?', '!'), ('x', '3*x'),
    ('12345678901234567890124', '12345678901234567890123'),
    ('-12345678901234567890123456789012345', '-12345678901234567890123456789012346'),
    ('0.1000000000000000055511151231257827', '0.1')]


@pytest.mark.parametrize('predicted, reference', DIFFERENT)
def test_different(predicted, reference):
  """Two answers; neither rounding nor a missing answer makes them one."""
  assert not answer_matching.same(predicted, reference)


@pytest.mark.parametrize('text', [
    '1e99999999999999999999', '-1e9999999', '1e-99999999999999999999', '9' * 5000,
    '-' + '9' * 5000, '1e1000000000', '.e9', '1,,,,2', '٣', '3²', '--3', '+-3', '1.2.3'])
def test_no_generated_text_is_an_error(text):
  """A model may write anything: a comparison never raises, and never takes it for 7."""
  assert not answer_matching.same(text, '7')
  assert not answer_matching.same(text, 'seven')


@given(st.text(alphabet='0123456789+-\u2212.,$€%eE #x\n', max_size=30))
@settings(max_examples=300, deadline=None)
@example('1e' + '9' * 20)
@example('-1e' + '9' * 7)
def test_any_text_can_be_compared(text):
  """No text of number-like characters raises; same is reflexive."""
  assert answer_matching.same(text, text)
  answer_matching.same(text, '7')


NUMERIC = {'72': True, '$1,234.50': True, '-3': True, '72 dollars': True, '50%': True,
           '#### 72': True, 'Sally is a sterpus.': False, '': False, '3 of 4': False,
           'x-1': False, 'x+1': False, '3*x': False, '=3': False, 'twelve': False,
           'room 12 upstairs': False}


@pytest.mark.parametrize('text, numeric', NUMERIC.items())
def test_is_numeric(text, numeric):
  """One number with at most a word around it."""
  assert answer_matching.is_numeric(text) is numeric


def test_extract():
  """What follows the last mark, or everything."""
  assert answer_matching.extract('1+1=2\n#### 2 \n') == '2'
  assert answer_matching.extract('#### 1 #### 2') == '2'
  assert answer_matching.extract(' 2 ') == '2'
  assert answer_matching.extract('####') == ''


decimals = st.decimals(min_value=-10**12, max_value=10**12, places=2)


@given(decimals, st.sampled_from(['', '$', '€']),
       st.sampled_from(['', ' dollars', '%', '.']), st.integers(0, 3), st.booleans(),
       st.sampled_from(['-', '\u2212']))
@settings(deadline=None)
def test_ornaments_do_not_count(value, currency, unit, zeros, commas, minus):
  """Commas, currency, trailing zeros, a unit and the kind of minus change nothing."""
  digits = f'{abs(value):,f}' if commas else f'{abs(value):f}'
  sign = minus if value < 0 else ''
  written = f'{sign}{currency}{digits}{"0" * zeros}{unit}'
  plain = f'{value:f}'
  assert answer_matching.same(written, plain)
  assert answer_matching.same(plain, written)
  assert answer_matching.same(f'a + b = c\n#### {written}', plain)
  other = f'{value + decimal.Decimal("0.01"):f}'
  assert not answer_matching.same(written, other)
  assert not answer_matching.same(other, written)


@given(st.integers(-10**40, 10**40))
@settings(deadline=None)
def test_large_integers_are_exact(value):
  """Neighbours differ, however many digits they have."""
  assert answer_matching.same(f'{value:,}', str(value))
  assert not answer_matching.same(str(value + 1), str(value))


words = st.text(alphabet='abcdefghijklmnopqrstuvwxyz', min_size=1, max_size=6)


@given(st.lists(words, min_size=1, max_size=5))
@settings(deadline=None)
def test_case_space_and_punctuation_of_text_do_not_count(parts):
  """Text is compared word by word."""
  reference = ' '.join(parts)
  assert answer_matching.same(', '.join(parts).upper() + ' .', reference)
  assert not answer_matching.same(reference + ' x', reference)


CHOICES = {
    'B': 'B', '(b)': 'B', 'b.': 'B', '#### C': 'C', 'the answer is B': 'B', 'Answer: D': 'D',
    'The correct option is A.': 'A', 'B) 12': 'B', 'B. 12': 'B', '(b) 12': 'B', '(A) x': 'A',
    'not (C), I take (D)': 'D', 'A cat': None, 'none': None, '': None, 'E': None, '12': None,
    '(A) or (B)? The answer is (C).': 'C',
    'The answer is B. Option A is a common distractor.': 'B',
    'Answer: C. The other choice B fails.': 'C', r'\boxed{B}': 'B', r'\boxed{\text{B}}': 'B',
    'answer: c': 'C', 'I choose B': 'B', 'B because of C': 'B', 'B, because': 'B', 'So B': 'B',
    '答案是B': 'B', '答案：C': 'C', 'The answer is A dog': None, 'the answer is a dog': None,
    'the answer is a.': 'A', 'The answer is A because C is not': 'A', 'Answer:\nB': 'B',
    'The answer is A. No, the answer is **D**.': 'D', r'Final: $\boxed{C}$ (not A)': 'C',
    'option B': 'B', 'A and B are wrong, so C': 'C', 'D is correct': 'D', r'\boxed D': 'D',
    'I would pick D since it fits': 'D', 'Both A and B': None}


@pytest.mark.parametrize('text, choice', CHOICES.items())
def test_letter(text, choice):
  """The option that a text chooses, however it says so; an article is none."""
  assert answer_matching.letter(text) == choice
  for reference in 'ABCD':
    assert answer_matching.correct('letter', text, [reference]) is (reference == choice)


def test_text_rule_reads_no_numbers():
  """By `text`, 72 dollars are not 72; by `numeric` they are."""
  assert answer_matching.correct('numeric', '72', ['72 dollars'])
  assert not answer_matching.correct('text', '72', ['72 dollars'])
  assert answer_matching.correct('text', 'Tom is a lempus', ['Tom is a lempus.'])


@pytest.mark.parametrize('rule', ['numeric', 'text', 'free_text', 'letter'])
def test_any_right_answer_counts(rule):
  """One of several references is enough."""
  assert answer_matching.correct(rule, 'B', ['A', 'B'])
  assert not answer_matching.correct(rule, 'C', ['A', 'B'])
  assert not answer_matching.correct(rule, '', ['A', 'B'])


EQUAL = [(r'\$5', r'\$5'), (r'\$18.90', r'\$18.90'), (r'\$32,\!348', r'\$32,\!348'),
         (r'\text{\$5}', r'\text{\$5}'), ('5', r'\$5'), (r'\$5', '5'), ('18.90', r'\$18.90'),
         ('32348', r'\$32,\!348'), ('5', r'\text{\$5}'), (r'\[5\]', '5'), ('5', r'\[5\]'),
         ('1 < x < 2', '(1,2)'), ('(1,2)', '1 < x < 2'), (r'1 \le x < 2', '[1,2)'),
         ('72_8', '72_8'), (r'\boxed 2', '2'), (r'\boxed2', '2'), (r'\boxed {2}', '2'),
         (r'\fbox{2}', '2'), (r'\boxed{3}, so \boxed 2', '2'), (r'\boxed{3}, so \fbox{2}', '2'),
         (r'\boxed{\frac{1}{2}}', '1/2'), ('10,080', '10080'), (r'\{1,2\}', r'\{2,1\}'),
         ('1/2', r'\frac{1}{2}'), ('0.5', r'\frac12'), ('(x+1)^2', 'x^2+2x+1'),
         (r'(3, \pi/2)', r'\left( 3, \frac{\pi}{2} \right)'), (r'so \boxed{7}', '7'),
         ('#### 7', '7'), (r'\text{Evelyn}', r'\text{Evelyn}'), ('90', r'90^\circ')]
UNEQUAL = [('72_8', '72'), ('72', '72_8'), ('(3,4)', '(4,3)'), ('1,2,3', '123'),
           (r'\boxed{2}, so \boxed 3', '2'), ('12', '13'), ('', '1'), ('$', '1'),
           (r'\frac{', '1'), ('x+1', 'x-1'),
           ('9**9**9**9', '1')]


@pytest.mark.parametrize('predicted, reference, equal', [
    *((p, r, True) for p, r in EQUAL), *((p, r, False) for p, r in UNEQUAL)])
def test_latex(predicted, reference, equal):
  """Equal mathematics in any writing; no text raises."""
  pytest.importorskip('math_verify')
  assert answer_matching.correct('latex', predicted, [reference]) is equal


def test_overlap():
  """Token F1 and ROUGE-L worked out by hand; the best of several references."""
  pytest.importorskip('rouge_score')
  # F1 without articles: cat sat | cat sat down. ROUGE-L: 2 of 3 and 2 of 4 in order.
  assert answer_matching.overlap('the cat sat', ['a cat sat down']) == {
      'f1': pytest.approx(0.8), 'rouge_l': pytest.approx(4 / 7)}
  assert answer_matching.overlap('sat cat', ['cat sat'])['f1'] == 1
  assert answer_matching.overlap('sat cat', ['cat sat'])['rouge_l'] == 0.5
  assert answer_matching.overlap('x', ['y', 'x']) == {'f1': 1, 'rouge_l': 1}
  assert answer_matching.overlap('', ['x']) == {'f1': 0, 'rouge_l': 0}


@pytest.mark.parametrize('rule, module', [('latex', 'math_verify'),
                                          ('free_text', 'rouge_score')])
def test_a_missing_library_names_the_extra(monkeypatch, rule, module):
  """What a rule needs is told; the other rules need nothing."""
  monkeypatch.setitem(sys.modules, module, None)  # makes `import` fail
  with pytest.raises(InputError, match=r"pip install -e '.\[eval\]'"):
    answer_matching.library(rule)
  assert answer_matching.library('numeric') is None


@pytest.mark.parametrize('one,other,equal', [
    ('$1,234.50', '1234.5 dollars', True), ('####7', '7.0', True), ('7', '8', False),
    ('Paris.', 'paris', True), ('', ' ', True), ('100', '1e2', True)])
def test_canonical(one, other, equal):
  """Votes count for what means the same."""
  assert (answer_matching.canonical(one) == answer_matching.canonical(other)) is equal


def test_latex_in_a_thread():
  """The library's limits of time are signals, which only the main thread may set."""
  pytest.importorskip('math_verify')
  found = []
  thread = threading.Thread(
      target=lambda: found.append(answer_matching.same_latex('1/2', '0.5')))
  thread.start()
  thread.join()
  assert found == [True]


@pytest.mark.parametrize('said, right, equal', [
    ('3244047.1', '3244047.0999999996', True), ('3244047.1004', '3244047.1', True),
    ('3244047.102', '3244047.1', False), ('12345678901234567', '12345678901234568', True),
    ('1234567890123456', '1234567890123556', False), ('', '3', False), ('x', '3', False),
    ('3*1', '3', False), ('yes', 'Yes.', True)])
def test_close(said, right, equal):
  """GSM-Hard's references carry the noise of float64."""
  assert answer_matching.correct('numeric_close', said, [right]) is equal
  assert answer_matching.correct('numeric', said, [right]) is (said == 'yes')


@pytest.mark.parametrize('one, other, equal', [
    ('की', 'का', False), ('é', 'e\u0301', True), ('straße', 'STRASSE', True),
    ('3.5', '3 5', False), ('C#', 'C', False), ('C++', 'C', False), ("don't", 'don’t', True),
    ('ΣΑΣ', 'σας', True), ('x-1', 'x−1', True), ('ΐ', '\u03b9\u0308\u0301', True),
    ('ไม่', 'ไม', False), ('v1.2', 'v12', False)])
def test_text_of_other_scripts(one, other, equal):
  """Marks are part of letters; composition, case and the form of an apostrophe do not count."""
  assert answer_matching.same_text(one, other) is equal
  assert answer_matching.same_text(other, one) is equal


@given(st.text(max_size=40))
@settings(deadline=None)
def test_plain_is_stable(text):
  """Normal forms compose: case, composition and repetition change nothing more."""
  once = answer_matching.plain(text)
  assert answer_matching.same_text(text, unicodedata.normalize('NFD', text)) or not text.strip()
  assert answer_matching.plain(once) == once


@pytest.mark.integration
@pytest.mark.parametrize('text', ['Привет, мир', '東京は日本の首都です', 'की का हाल', 'Ελλάδα'])
def test_overlap_of_other_scripts(text):
  """What is the same overlaps wholly."""
  pytest.importorskip('rouge_score')
  assert answer_matching.overlap(text, [text]) == {'f1': 1, 'rouge_l': 1}


@pytest.mark.integration
@pytest.mark.parametrize('rule', answer_matching.RULES)
@pytest.mark.parametrize('character', [' ', '7', ',', '{', '}', '\\', '-', '$', 'B', '('])
def test_long_texts(rule, character):
  """100,000 characters are no trouble to any rule (a cubic one would take hours)."""
  if rule in ('latex', 'free_text'):
    pytest.importorskip('math_verify')
  for text in (character * 100_000, f'the answer{character * 100_000}is 72',
               '\\boxed' + character * 100_000):
    answer_matching.correct(rule, text, ['72', text])
    answer_matching.canonical(text, rule)
