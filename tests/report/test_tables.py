"""Tables in plain text."""

import re
import subprocess
import sys

import pytest

from latent_reasoning import report


def test_table_is_aligned():
  """The first column is flush left, the others flush right, under a ruled header."""
  assert report.table([['name', 'n'], ['a', 1000], ['longer', 2]]) == '\n'.join([
      'name       n',
      '------  ----',
      'a       1000',
      'longer     2'])


def test_columns_end_together():
  """In any table, a column ends at the same place in every row."""
  text = report.table([['x', 'block 1', 'any'], ['a', '±1', 'é'], ['bb', '100.0', '']])
  header, rule, *rows = text.splitlines()
  ends = [i for i, c in enumerate(rule + ' ') if c == ' ' and rule[i - 1] == '-']
  assert all(header[e - 1] != ' ' for e in ends[1:])
  assert rows[0][:ends[1]].endswith('±1') and rows[1][:ends[1]].endswith('100.0')
  assert not any(line.endswith(' ') for line in text.splitlines())


def test_percent():
  """Shares in percent, with one digit."""
  assert report.percent(0.93249) == '93.2'
  assert report.percent(1.0, 0.0078) == '100.0 ±0.8'
  assert report.percent(0) == '0.0'
  for nothing in (float('nan'), None):  # as measured, and as JSON has it
    assert report.percent(nothing, 0.1, 3) == ''


@pytest.mark.parametrize('right, n', [(0, 3), (3, 3), (0, 2000), (1, 1), (2, 5), (3, 400)])
def test_few_right_or_wrong_have_an_interval(right, n):
  """Where a standard error is nonsense (0 of 3: 0.0 ±0.0), an exact interval stands there."""
  error = (right / n * (1 - right / n) / n) ** 0.5
  text = report.percent(right / n, error, n)
  low, high = map(float, re.fullmatch(r'[\d.]+ \[([\d.]+), ([\d.]+)\]', text).groups())
  assert 0 <= low <= 100 * right / n <= high <= 100 and high > low
  if right in (0, n):  # closed form: so few right, or none, in one of 40 such draws
    assert max(100 - low, high) == pytest.approx(100, abs=0.1) and (
        high - low == pytest.approx(100 * (1 - 0.025 ** (1 / n)), abs=0.1))
  found = {**RESULT, 'n': n, 'accuracy': {'final': right / n, 'per_block': [right / n]},
           'standard_error': {'final': error}}
  assert text in report.results(found) and '95% interval' in report.results(found)


def test_many_right_and_wrong_have_a_standard_error():
  for right, n in ((5, 10), (1960, 2000), (4, 2000), (36, 40)):
    assert re.fullmatch(r'[\d.]+ ±[\d.]+', report.percent(right / n, 0.01, n))


RESULT = {
    'method': 'rim', 'dataset': 'arithmetic', 'split': 'test', 'n': 40, 'too_long': 0,
    'rule': 'numeric',
    'accuracy': {'final': 0.725, 'any': 0.8, 'pass@4': 0.9, 'per_block': [0.125, 0.725]},
    'standard_error': {'final': 0.071, 'any': 0.063, 'pass@4': 0.047,
                       'per_block': [0.05, 0.071]},
    'by_steps': {'2': {'n': 30, 'final': 0.75, 'standard_error': 0.079},
                 '10': {'n': 10, 'final': 0.65, 'standard_error': 0.15}}}


def test_results_hold_the_numbers():
  """Accuracy at every block and over all, with errors, and by number of steps."""
  text = report.results(RESULT)
  assert text.splitlines()[0] == 'rim on arithmetic/test, 40 problems, compared by rule numeric'
  for number in ('12.5', '72.5', '72.5 ±7.1', '80.0 ±6.3', '90.0 ±4.7', '75.0', '65.0'):
    assert number in text, number
  for name in ('block 1', 'block 2', 'final', 'any', 'pass@4'):
    assert name in text, name
  steps, _, problems, final = text.splitlines()[-4:]
  assert steps.split() == ['steps', '2', '10']
  assert problems.split() == ['problems', '30', '10']
  assert final.split() == ['final', '%', '75.0', '65.0']
  assert 'too long' not in text


def test_results_of_free_text_have_overlaps():
  """Mean and standard error of each overlap, in percent."""
  text = report.results({**RESULT, 'overlap': {'f1': {'mean': 0.5, 'standard_error': 0.02}}})
  assert text.splitlines()[-1] == 'f1 50.0 ±2.0 %'
  one = report.results({**RESULT, 'n': 1, 'overlap': {'f1': {'mean': 0.5,
                                                            'standard_error': 0.0}}})
  assert one.splitlines()[-1] == 'f1 50.0 %'  # nothing is known of its error


def test_paper_and_contamination_say_what_they_are():
  """The protocol's name stands in each of its lines; a sample is called one."""
  lines = report.paper({
      'steps': [100, 200], 'chosen': [3, 13], 'accuracy': 0.5, 'standard_error': 0.01,
      'cuts': 16, 'selection_items': 264, 'scored_items': 1055,
      'sets': {'hard': {'n': 9, 'accuracy': 0.25, 'standard_error': 0.0}}}).splitlines()
  assert all(line.startswith('protocol paper') for line in lines) and len(lines) == 2
  assert '50.0 ±1.0 % of 1055' in lines[0] and '100 (3), 200 (13)' in lines[0]
  assert 'hard: final 25.0 ±0.0 % of 9' in lines[1]
  found = {'train': 5000, 'read': 200, 'sets': {'test': {
      'n': 9, 'exact': 1, 'numbers_masked': 2, 'ngram_share': 0.125}}}
  text = report.contamination(found)
  assert 'a sample, 200 of 5,000 read' in text and '\n' not in text
  assert 'test: 1 of 9 exact, 2 but for their numbers, 12.5 % of 8-grams' in text
  assert 'all of 5,000 read' in report.contamination({**found, 'read': 5000})


def test_results_of_one_readout():
  """A method with one readout has no block columns and no `any`, which would repeat it."""
  one = {**RESULT, 'method': 'cot', 'too_long': 3,
         'accuracy': {'final': 0.5, 'any': 0.5, 'per_block': [0.5]}}
  text = report.results(one)
  assert 'block' not in text and 'any' not in text
  assert '3 too long for the model' in text and '50.0 ±7.1' in text


def test_latency_table():
  """One row an entry, with its times and FLOPs."""
  entry = {'method': 'rim', 'batch': 32, 'prefix_tokens': 40, 'tokens': 2, 'first_ms': 1.5,
           'full_ms': 2.25, 'first_spread_ms': 0.5, 'full_spread_ms': 0.25,
           'first_vs_direct': 1.25, 'full_vs_direct': 1.5,
           'first_flops': 3.5e6, 'full_flops': 4e6}
  text = report.latency({'entries': [entry, {**entry, 'batch': 1}, {
      **entry, 'batch': 1, 'method': 'direct', 'first_vs_direct': 1.0}]})
  row = text.splitlines()[2].split()
  assert row == ['32', 'rim', '40', '2', '1.500', '0.250', '2.250', '0.125', '1.25', '3.5',
                 '4.0']
  assert "At batch 1 rim begins its answer after 1.25 times direct's time." in text


def test_leakage_lines():
  """One line a check; a failed one stands out."""
  text = report.leakage([{'check': 'short', 'ok': True, 'found': 'all 3'},
                         {'check': 'a longer one', 'ok': False, 'found': 'a leak'}])
  assert text == 'ok    short         all 3\nFAIL  a longer one  a leak'


def test_needs_no_jax():
  """Reports can be made where JAX is not installed."""
  code = ('import sys; sys.modules["jax"] = None; '
          'from latent_reasoning import report; print(report.percent(0.5))')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert done.stdout == '50.0\n', done.stderr
