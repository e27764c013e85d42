"""Generated chains: right, deterministic, disjoint, worded without ambiguity."""

import dataclasses
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_reasoning.config import ArithmeticConfig
from latent_reasoning.data import arithmetic
from latent_reasoning.data.arithmetic import Arithmetic
from latent_reasoning.data.example import Example
from latent_reasoning.data.synthetic import SHARES, split_of
from latent_reasoning.errors import InputError

CONFIG = ArithmeticConfig(
    min_steps=1, max_steps=4, modulus=10, max_value=9, operations='+-*', templates=1,
    train_size=300, valid_size=100, test_size=100)
TEMPLATES = len(arithmetic.STORIES) + 1


def replaced(**changes):
  return dataclasses.replace(CONFIG, **changes)


def evaluate(chain: str, modulus: int) -> list[int]:
  """All results of '7+2-5', by a parser that shares nothing with the generator."""
  tokens = re.findall(r'\d+|[-+*]', chain)
  assert ''.join(tokens) == chain
  result, results = int(tokens.pop(0)), []
  while tokens:
    symbol, value, tokens = tokens[0], int(tokens[1]), tokens[2:]
    if symbol == '+':
      result = result + value
    elif symbol == '-':
      result = result - value
    else:
      result = result * value
    result = result - modulus * (result // modulus) if modulus else result
    results.append(result)
  return results


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**40), low=st.integers(1, 3), more=st.integers(0, 4),
       modulus=st.sampled_from([0, 7, 10, 97]), top=st.sampled_from([5, 9, 250]),
       operations=st.sampled_from(['+-*', '+', '-*']), marks=st.booleans())
def test_steps_and_answer_agree_with_an_independent_evaluator(
    seed, low, more, modulus, top, operations, marks):
  config = replaced(min_steps=low, max_steps=low + more, modulus=modulus, max_value=top,
                    operations=operations, train_size=20)
  for example in Arithmetic(config, marks, seed, 'train'):
    results = evaluate(example.question, modulus)
    assert low <= len(results) == len(example.steps) <= low + more
    assert example.answer == str(results[-1])
    operands = [int(n) for n in re.findall(r'\d+', example.question)]
    assert max(operands) <= (min(top, modulus - 1) if modulus else top)
    symbols = re.findall(r'[-+*]', example.question)
    assert set(symbols) <= set(operations)
    left = operands[0]
    for step, symbol, v, result in zip(example.steps, symbols, operands[1:], results,
                                       strict=True):
      plain = f'{left}{symbol}{v}={result}'
      assert step == (f'<<{plain}>>' if marks else plain)
      left = result


def test_the_first_problem_stays_what_it_was():
  # A change of the generator changes every published number; it must be meant.
  assert Arithmetic(CONFIG, False, 0, 'train')[0] == Example(
      '9*0-6*1', ('9*0=0', '0-6=4', '4*1=4'), '4')


def test_item_depends_on_seed_split_and_index_alone():
  first, again = (Arithmetic(CONFIG, False, 3, 'train') for _ in range(2))
  assert first[::-1] == list(again)[::-1]
  assert first[7] == Arithmetic(replaced(train_size=8), False, 3, 'train')[7]
  assert first[:50] != Arithmetic(CONFIG, False, 4, 'train')[:50]
  assert len(set(first[:50])) > 40


def test_sequence_ends():
  problems = Arithmetic(CONFIG, False, 0, 'valid')
  assert len(problems) == 100 == len(list(problems))
  assert problems[-1] == problems[99]
  for index in (100, -101):
    with pytest.raises(IndexError):
      problems[index]


@pytest.mark.parametrize('seed', [0, 1])
def test_splits_are_disjoint_across_seeds_and_templates(seed):
  config = replaced(max_steps=2, train_size=3000, valid_size=500, test_size=500)
  chains = {s: {e.question for e in Arithmetic(config, False, seed, s)}
            for s in ('train', 'valid', 'test')}
  for split, questions in chains.items():
    assert {split_of(q) for q in questions} == {split}
    assert len(questions) > 100
  # The worded twin of a problem is the same chain, so in the same split.
  worded = Arithmetic(dataclasses.replace(config, templates=TEMPLATES, modulus=0), False,
                      seed, 'test')
  steps = [e.steps for e in worded[:100]]
  for s in steps:
    chain = re.match(r'\d+', s[0])[0] + ''.join(
        re.search(r'[-+*]\d+(?==)', step)[0] for step in s)
    assert split_of(chain) == 'test'


def test_every_problem_has_one_split_in_the_shares_of_80_10_10():
  counts = dict.fromkeys(SHARES, 0)
  for a in range(100):
    for b in range(100):
      counts[split_of(f'{a}+{b}')] += 1
  assert abs(counts['train'] / 10_000 - 0.8) < 0.02
  assert abs(counts['valid'] / 10_000 - 0.1) < 0.02
  assert abs(counts['test'] / 10_000 - 0.1) < 0.02
  assert sorted(i for share in SHARES.values() for i in share) == [*range(256)]


def test_lengths_operands_and_operations_are_uniform():
  problems = Arithmetic(replaced(min_steps=2, train_size=6000), False, 0, 'train')
  questions = [e.question for e in problems]
  lengths = [sum(c in '+-*' for c in q) for q in questions]
  for n in (2, 3, 4):
    assert abs(lengths.count(n) / 6000 - 1 / 3) < 0.03
  text = ''.join(questions)
  digits, symbols = re.findall(r'\d', text), re.findall(r'[-+*]', text)
  for d in '0123456789':
    assert abs(digits.count(d) / len(digits) - 0.1) < 0.01
  for o in '+-*':
    assert abs(symbols.count(o) / len(symbols) - 1 / 3) < 0.02


# How each wording says an operation, kept apart from the generator's own table.
WORDS = {'+': r'rises|up by|credited|forward|added|raises|adds',
         '-': r'falls|down by|debited|back|subtracted|lowers|subtracts',
         '*': r'multiplied|times|multiplies'}


@pytest.mark.parametrize('modulus', [0, 31])
def test_stories_tell_operands_and_operations_in_order(modulus):
  config = replaced(templates=TEMPLATES, modulus=modulus, max_value=30, train_size=600)
  seen = set()
  for example in Arithmetic(config, False, 0, 'train'):
    question = example.question
    if re.fullmatch(r'[-+*\d]+', question):
      seen.add('terse')
      continue
    ring = f'All counting is on a ring of {modulus}. '
    assert question.startswith(ring) == bool(modulus)
    assert question.count('ring of') == bool(modulus)
    opening, *sentences, last = re.split(r'(?<=[.?]) ', question.removeprefix(ring))
    assert last.endswith('?') and not re.search(r'\d', last)
    chain = re.search(r'\d+', opening)[0]
    for sentence in sentences:
      value, = re.findall(r'\d+', sentence)
      symbol, = [o for o, words in WORDS.items()
                 if re.search(rf'\b({words})\b', sentence)]
      chain += symbol + value
    assert split_of(chain) == 'train'
    assert [str(r) for r in evaluate(chain, modulus)] == [
        s.split('=')[1] for s in example.steps]
    entities = '|'.join((*arithmetic.NAMES, *arithmetic.THINGS))
    seen.add(re.sub(rf'\b({entities}|\d+)\b', '', opening))
  assert len(seen) == TEMPLATES >= 7


def test_too_many_templates_names_the_maximum():
  with pytest.raises(InputError, match=f'templates is 99; expected at most {TEMPLATES}'):
    Arithmetic(replaced(templates=99), False, 0, 'train')


def test_a_space_without_test_problems_is_refused_at_the_door():
  # The only chain is 0+0, which is one split's; another has none.
  config = replaced(min_steps=1, max_steps=1, modulus=1, operations='+')
  empty = 'valid' if split_of('0+0') != 'valid' else 'test'
  with pytest.raises(InputError, match=f'no {empty} problem.*too small; enlarge'):
    Arithmetic(config, False, 0, empty)
  assert Arithmetic(config, False, 0, split_of('0+0'))[0].question == '0+0'


def test_generation_is_fast():
  problems = Arithmetic(replaced(train_size=3000), False, 0, 'train')
  best = min(_seconds(problems) for _ in range(3))
  assert best / 3000 < 100e-6  # 10 µs measured; the rest is for a busy machine


def _seconds(problems):
  start = time.perf_counter()
  problems[:]
  return time.perf_counter() - start


@pytest.mark.parametrize('modulus', [0, 10])
def test_counterfactual(modulus):
  """One operand differs, the answer does, and the steps are those of the new chain."""
  chains = Arithmetic(replaced(modulus=modulus, templates=3), False, 0, 'test')
  seen = 0
  for i, example in enumerate(chains[:60]):
    other = chains.counterfactual(example, i)
    if not re.fullmatch(r'[\d+*-]+', example.question):
      assert other is None
      continue
    seen += 1
    old, new = (re.split(r'([-+*])', e.question) for e in (example, other))
    assert sum(a != b for a, b in zip(old, new, strict=True)) == 1 and old[1::2] == new[1::2]
    assert other.answer != example.answer and len(other.steps) == len(example.steps)
    assert other.steps[-1].endswith(f'={other.answer}')
    assert chains.counterfactual(example, i) == other
  assert seen > 5


def test_counterfactual_where_no_operand_matters():
  chains = Arithmetic(replaced(operations='*', max_value=1, max_steps=6), False, 0, 'test')
  assert chains.counterfactual(Example('0*0*0', ('0*0=0', '0*0=0'), '0'), 0) is None
