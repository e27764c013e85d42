"""Contamination: what of the test questions stands in the training data."""

from collections.abc import Sequence

from latent_reasoning.data import contamination
from latent_reasoning.data.contamination import measure
from latent_reasoning.data.example import Example

LONG = 'one two three four five six seven eight nine ten'


def ask(*questions, steps=()):
  return [Example(q, tuple(steps), '1') for q in questions]


def test_exact_and_masked():
  """Case, spaces and punctuation do not count; numbers only in the exact measure."""
  train = ask('Tom has 3 apples, and 1,200.5 pears.', 'Nothing alike')
  test = ask('tom has 3  apples and 1,200.5 pears?', 'Tom has 44 apples and 7 pears',
             'Tom has apples and pears', 'Tom has 3 apples and 1,200.5 pears')
  found = measure(train, {'test': test})['sets']['test']
  assert (found['n'], found['exact'], found['numbers_masked']) == (4, 2, 3)


def test_signs_tell_problems_apart():
  """7-2 is not 7+2, masked or not."""
  found = measure(ask('7-2'), {'test': ask('7+2', '8-1')})['sets']['test']
  assert (found['exact'], found['numbers_masked'], found['short']) == (0, 1, 2)


def test_ngrams_are_counted_once():
  """Of ten words there are three 8-grams; the two of nine words occur."""
  train = ask('one two three four five six seven eight nine')
  test = [*ask(LONG, LONG, 'too short'), *ask('one TWO three four five six seven eight.')]
  found = measure(train, {'test': test})['sets']['test']
  assert found['ngrams'] == 3 and found['ngram_share'] == 2 / 3 and found['short'] == 1
  assert found['exact'] == 0


def test_steps_are_searched_too():
  """A test question told in a training step is found by its words, not as a question."""
  found = measure(ask('x', steps=('a', LONG)), {'test': ask(LONG)})['sets']['test']
  assert found['ngram_share'] == 1 and found['exact'] == 0


def test_words_across_questions_are_no_ngram():
  """An 8-gram stands within one question or step."""
  half = LONG.split()
  train = ask(' '.join(half[:5]), ' '.join(half[5:]))
  assert measure(train, {'test': ask(LONG)})['sets']['test']['ngram_share'] == 0


def test_sets_are_told_apart():
  """Each set has its own figures."""
  sets = measure(ask('a'), {'one': ask('a', 'b'), 'two': ask('b')})['sets']
  assert (sets['one']['exact'], sets['two']['exact']) == (1, 0)


class Lazy(Sequence):
  """Generated problems that count how often they are made."""
  made = 0

  def __len__(self):
    return 10**6

  def __getitem__(self, i):
    self.made += 1
    return Example(f'problem {i}', (), '1')


def test_generated_data_is_sampled_and_says_so(monkeypatch):
  """Only so many problems of a lazy sequence are made; a list is read to its end."""
  monkeypatch.setattr(contamination, 'SAMPLED', 50)
  lazy = Lazy()
  found = measure(lazy, {'test': ask('problem 49', 'problem 50')})
  assert (found['train'], found['read'], lazy.made) == (10**6, 50, 50)
  assert found['sets']['test']['exact'] == 1
  found = measure(ask(*(f'problem {i}' for i in range(60))), {'test': ask('problem 55')})
  assert found['read'] == found['train'] == 60 and found['sets']['test']['exact'] == 1
