"""Questions that training had none of are said to be so; white space alone is none."""

import re

import pytest

from latent_reasoning.config import ArithmeticConfig, TokenizerConfig
from latent_reasoning.data.arithmetic import Arithmetic
from latent_reasoning.data.example import Example
from latent_reasoning.data.questions import TrainingQuestions
from latent_reasoning.data.synthetic import Generated
from latent_reasoning.data.tokenizers import build

CHAINS = Arithmetic(ArithmeticConfig(min_steps=2, max_steps=4, operations='+-', max_value=9),
                    False, 0, 'train')


@pytest.mark.parametrize('question, found', [
    ('7 + 2 -  5', ''), ('7+2-5', ''), (CHAINS[3].question, ''),
    (' '.join(CHAINS[4].question), ''),
    ('1+2', '1 operation;'), ('1+2+3+4+5+6', '5 operations;'), ('77+2-5', 'the number 77;'),
    ('7+2*5', r'the operation \*;'), ('7+02-5', 'the number 02;'),
    ('What is 2 plus 3?', 'none of the chains of 2 to 4 operations'), ('', 'none of'),
    ('-7+2-5', 'none of'), ('7+2-', 'none of'), ('7÷2+5', 'none of')])
def test_chains(question, found):
  known = TrainingQuestions(CHAINS, None)
  said = known.unlike(known.normalise(question))
  assert bool(said) == bool(found)
  if found:
    assert re.search(found, said) and 'unlike those of training' in said


def test_every_training_question_is_like_them():
  """Also where they are told as stories."""
  for templates in (1, 8):
    config = ArithmeticConfig(min_steps=1, max_steps=5, templates=templates)
    train = Arithmetic(config, False, 1, 'train')
    known = TrainingQuestions(train, None)
    for example in train[:300]:
      assert known.normalise(example.question) == example.question
      assert known.unlike(example.question) == ''


def test_stories():
  """White space in a story is one space; without stories, one is not like a chain."""
  told = Arithmetic(ArithmeticConfig(templates=8), False, 0, 'train')
  assert TrainingQuestions(told, None).normalise(' Ada  has\n3. ') == 'Ada has 3.'
  assert TrainingQuestions(CHAINS, None).unlike('Ada has 3 apples.')


def test_other_data(tmp_path):
  """Length and tokens of the training questions say what is unlike them."""
  tokenizer = build(TokenizerConfig(), lambda: [], tmp_path / 'tokenizer.json', 0)
  train = [Example('abc 12?', (), '1'), Example('cab 3?', (), '2')]
  known = TrainingQuestions(train, tokenizer)
  assert known.unlike('bca 31?') == known.unlike('abc d?') == ''
  assert 'tokens, they have at most' in known.unlike('abc 12? abc')
  assert "such as 'h', 'i'" in known.unlike('hi j?')


def test_a_task_that_does_not_know_its_form(tmp_path):
  """Lengths and tokens tell, as for problems of a file."""
  class Maxima(Generated):
    def _draw(self, key):
      values = [str(b % 10) for b in key[-3:]]
      return '/'.join(values), values

    def _example(self, drawn):
      return Example(','.join(drawn), (), max(drawn))

    def _space(self):
      return 'lists of three'
  train = Maxima(0, 'train', 50)
  tokenizer = build(TokenizerConfig(), lambda: [], tmp_path / 'tokenizer.json', 0)
  known = TrainingQuestions(train, tokenizer)
  assert known.unlike(train[3].question) == ''
  assert 'stand in none of them' in known.unlike('hello')
