"""Generated state tracking: right by a solver of another kind, deterministic, disjoint."""

import dataclasses
import itertools

import pytest

from latent_reasoning.config import StateTrackingConfig
from latent_reasoning.data.state_tracking import SOLVE, StateTracking
from latent_reasoning.errors import InputError

CONFIG = StateTrackingConfig(min_steps=2, max_steps=8, live=4, train_size=300, valid_size=60,
                             test_size=60)
TASKS = tuple(SOLVE)


def make(task, split='test', seed=0, **changes):
  return StateTracking(dataclasses.replace(CONFIG, task=task, **changes), seed, split)


def expected(task, question):
  """The states after each step, by other means than the generator's."""
  if task == 'permutations':  # as maps of places
    moves = {'a': (1, 0, 2, 3, 4), 'b': (4, 0, 1, 2, 3)}
    state = tuple('12345')
    return [''.join(state := tuple(state[i] for i in moves[m])) for m in question]
  if task == 'hops':
    count, text = question.split(':')
    place, found = len(text) - 1, []
    for _ in range(int(count)):
      place = 1 + max(j for j in range(place) if text[j] == text[place])
      found.append(text[place])
    return found
  values, assignments = question.split(':')
  values, found = [*map(int, values)], []
  for one, symbol, other in assignments.split(','):
    a, b = ord(one) - 97, ord(other) - 97
    number = other if task == 'registers' else values[b]
    values[a] = eval(f'({values[a]}{symbol}{number}) % 10')
    found.append(''.join(map(str, values)))
  return found


@pytest.mark.parametrize('task', TASKS)
def test_right(task):
  lengths = set()
  for example in make(task, 'train')[:200]:
    states = expected(task, example.question)
    lengths.add(len(example.steps))
    assert len(states) == len(example.steps) and states[-1] == example.answer
    if task in ('variables', 'registers'):  # a step is what has changed
      for step, state in zip(example.steps, states, strict=True):
        assert state[ord(step[0]) - 97] == step[-1]
    else:
      assert [*example.steps] == states
  assert lengths == set(range(2, 9))


@pytest.mark.parametrize('task, question, answer', [
    ('permutations', 'bbaab', '34512'), ('hops', '4:abdadacccadccbdaabbcdaaa', 'a'),
    ('variables', '1846:a-a,a*a,b-c,d-c,a-c,a-a', '0442'),
    ('registers', '4806:a-6,b*9', '8206')])
def test_the_first_problem_stays_what_it_was(task, question, answer):
  """Of a seed; else a run that goes on has other data, and what was reported is of none."""
  first = make(task)[0]
  assert (first.question, first.answer) == (question, answer)


def test_registers_change_equally_often():
  for example in make('registers')[:60]:
    changes = [step[0] for step in example.steps]
    counts = [changes.count(name) for name in 'abcd']
    assert max(counts) - min(counts) <= 1 and sum(counts) == len(example.steps)


@pytest.mark.parametrize('task', TASKS)
def test_by_seed_split_and_index_alone(task):
  one, again = make(task), make(task)
  assert [*one] == [*again] and one[7] == one[5:9][2] == one[-53]
  assert [*make(task, seed=1)] != [*one]
  splits = [{e.question for e in make(task, split, max_steps=4, train_size=500)}
            for split in ('train', 'valid', 'test')]
  for a, b in itertools.combinations(splits, 2):
    assert not a & b


@pytest.mark.parametrize('task', TASKS)
def test_counterfactual(task):
  """One letter or value of the question differs, and so does the answer."""
  problems, seen = make(task), 0
  for i, example in enumerate(problems):
    other = problems.counterfactual(example, i)
    if other is None:  # where hops jump over most of the text
      continue
    seen += 1
    changed = [(a, b) for a, b in zip(example.question, other.question, strict=True) if a != b]
    assert len(changed) == 1 and other.answer != example.answer
    assert expected(task, other.question)[-1] == other.answer
    assert task != 'variables' or changed[0][0].isdigit()
  assert seen > 50 or task != 'hops' and seen == 60


def test_no_problem():
  """Two operations have four words, none of which a split of its own may have."""
  with pytest.raises(InputError, match="of config.data.state_tracking.task 'permutations'"):
    for split in ('train', 'valid', 'test'):
      make('permutations', split, min_steps=1, max_steps=1)
