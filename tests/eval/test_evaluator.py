"""Evaluation: what is counted, in which order, and that batches do not matter."""

import dataclasses
import math

import jax
import pytest

from latent_reasoning import methods, sequences
from latent_reasoning.data.example import Example
from latent_reasoning.eval import evaluator
from latent_reasoning.eval.evaluator import summarize
from latent_reasoning.train import train_step

pytestmark = pytest.mark.usefixtures('quick_compilation')


class Said:
  """An answerer that says what it is told, a list of readouts a question."""

  def __init__(self, config, greedy, samples=None):
    self.config, self.greedy, self.samples = config, greedy, samples

  def texts(self, questions, samples=0):
    said = self.samples if samples else self.greedy
    assert not samples or samples == self.config.eval.samples
    for question in questions:
      yield said[question]


def problem(name, answer, steps=2):
  return Example(name, ('1+1=2',) * steps, answer)


def test_scores_by_hand(tiny_config):
  """final, any, per block, by steps and their errors, worked out by hand."""
  examples = [problem('a', '7'), problem('b', '8'), problem('c', '9', 3),
              problem('d', '3', 3)]
  said = {'a': ['7', '7', '7.0'], 'b': ['8', '1', '2'], 'c': ['1', '2', '9'],
          'd': ['x', '', '4']}
  reported = []
  result, records = evaluator.evaluate(
      Said(tiny_config(seed=5), said), examples, 'toy', 'test', 'numeric',
      lambda *a: reported.append(a))
  assert result['accuracy'] == {'final': 0.5, 'any': 0.75, 'per_block': [0.5, 0.25, 0.5]}
  error = result['standard_error']
  assert error['final'] == pytest.approx(0.25)  # √(½ · ½ / 4)
  assert error['any'] == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
  assert error['per_block'] == pytest.approx([0.25, math.sqrt(0.1875 / 4), 0.25])
  assert result['by_steps'] == {
      '2': {'n': 2, 'final': 0.5, 'standard_error': pytest.approx(math.sqrt(0.125))},
      '3': {'n': 2, 'final': 0.5, 'standard_error': pytest.approx(math.sqrt(0.125))}}
  assert (result['n'], result['too_long'], result['seed']) == (4, 0, 5)
  assert (result['method'], result['dataset'], result['split']) == ('rim', 'toy', 'test')
  assert [r['question'] for r in records] == ['a', 'b', 'c', 'd']
  assert records[1] == {
      'dataset': 'toy', 'split': 'test', 'index': 1, 'question': 'b', 'steps': 2,
      'answer': '8', 'too_long': False, 'predictions': ['8', '1', '2'],
      'correct': [True, False, False]}
  assert reported == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_pass_at_k(tiny_config):
  """pass@k is right where one of k samples is; the headline stays the greedy answer."""
  examples = [problem('a', '7'), problem('b', '8'), problem('c', '9'), problem('d', '3')]
  greedy = {'a': ['7'], 'b': ['1'], 'c': ['1'], 'd': ['1']}
  samples = {'a': ['1', '2'], 'b': ['8', '8'], 'c': ['1', '9'], 'd': ['1', '2']}
  result, records = evaluator.evaluate(
      Said(tiny_config(**{'eval.samples': 2}), greedy, samples), examples, 'toy', 'test',
      'numeric')
  assert result['accuracy'] == {'final': 0.25, 'any': 0.25, 'pass@2': 0.5,
                                'per_block': [0.25]}
  assert result['standard_error']['pass@2'] == 0.25
  assert records[2]['samples'] == ['1', '9']
  assert records[2]['samples_correct'] == [False, True]


def test_too_long_counts_as_wrong(tiny_config):
  """A question the model has no positions for is wrong at every block, and counted."""
  examples = [problem('a', '7'), problem('long', '8'), problem('c', '9')]
  said = {'a': ['7', '7'], 'long': None, 'c': ['9', '9']}
  result, records = evaluator.evaluate(Said(tiny_config(), said), examples, 'toy', 'test',
                                       'numeric')
  third = pytest.approx(2 / 3)
  assert result['accuracy'] == {'final': third, 'any': third, 'per_block': [third, third]}
  assert result['too_long'] == 1 and records[1]['too_long']
  assert records[1]['predictions'] == []


def test_the_rule_decides_and_is_written(tiny_config):
  """Letters are compared as letters; the best of several right answers counts."""
  examples = [Example('a', (), 'B'), Example('b', (), 'C', ('D',))]
  said = {'a': ['(b) 12'], 'b': ['the answer is D']}
  for rule, share in (('letter', 1.0), ('text', 0.0)):
    result, _ = evaluator.evaluate(Said(tiny_config(), said), examples, 'toy', 'test', rule)
    assert (result['rule'], result['accuracy']['final']) == (rule, share)


@pytest.mark.integration
def test_free_text_has_overlaps(tiny_config):
  """Token F1 and ROUGE-L of the last readout, their mean and standard error."""
  pytest.importorskip('rouge_score')
  examples = [Example('a', (), 'one two'), Example('b', (), 'x', ('three four',)),
              Example('long', (), 'y')]
  said = {'a': ['x', 'one two'], 'b': ['x', 'three'], 'long': None}
  result, records = evaluator.evaluate(Said(tiny_config(), said), examples, 'toy', 'test',
                                       'free_text')
  assert [r['overlap']['f1'] for r in records] == [1.0, pytest.approx(2 / 3), 0.0]
  f1 = result['overlap']['f1']
  assert f1['mean'] == pytest.approx(5 / 9)
  assert f1['standard_error'] == pytest.approx(
      math.sqrt(((4 / 9) ** 2 + (1 / 9) ** 2 + (5 / 9) ** 2) / 2 / 3))
  assert result['accuracy']['per_block'] == [pytest.approx(1 / 3)] * 2


@pytest.mark.parametrize('samples', [0, 2])
def test_all_too_long(tiny_config, samples):
  """Even where no question fits there is a result: all wrong."""
  config = tiny_config(**{'eval.samples': samples})
  examples = [problem('a', '7'), problem('b', '8')]
  said = {'a': None, 'b': None}
  result, _ = evaluator.evaluate(Said(config, said, said), examples, 'toy', 'test', 'numeric')
  assert result['accuracy']['final'] == result['accuracy']['any'] == 0
  assert result['too_long'] == 2


def test_steps_are_sorted_as_numbers(tiny_config):
  """By steps: 2 before 10."""
  records = [{'correct': [True], 'steps': s, 'too_long': False} for s in (10, 2, 10)]
  result = summarize(records, tiny_config(), 'toy', 'test', 'numeric')
  assert list(result['by_steps']) == ['2', '10']
  assert result['by_steps']['10']['n'] == 2


@pytest.fixture(scope='module')
def run(tiny_config, make_run, tmp_path_factory):
  """A fresh tiny model; initial weights that are larger give livelier answers."""
  return make_run(tiny_config(**{'model.num_layers': 1}), tmp_path_factory.mktemp('run'))


@pytest.fixture(scope='module')
def params(run):
  return jax.tree.map(lambda a: 6 * a, run.init().params)


def predictor(run, params, **changes):
  config = dataclasses.replace(
      run.config, eval=dataclasses.replace(run.config.eval, **changes))
  return run.predictor(params, config)


@pytest.fixture(scope='module')
def questions(run):
  return [run.splits.test[i].question for i in range(7)]


@pytest.fixture(scope='module')
def expected(run, params, questions):
  found = list(predictor(run, params, batch_size=1).texts(questions))
  assert len({tuple(texts) for texts in found}) > 2, 'the answers are too alike to test'
  return found


@pytest.mark.integration
@pytest.mark.parametrize('size', [4, 16])
def test_batch_size_does_not_change_answers(run, params, questions, expected, size):
  """Batches, whole, short or larger than the set, give the answers of single questions."""
  assert list(predictor(run, params, batch_size=size).texts(questions)) == expected


def test_order_is_kept(run, params, questions, expected):
  """Answers come in the order of the questions, of mixed lengths."""
  found = list(predictor(run, params, batch_size=4).texts(questions[::-1]))
  assert found == expected[::-1]


def test_one_text_a_block(run, questions, expected):
  """RiM answers after each block."""
  assert [len(texts) for texts in expected] == [run.config.rim.blocks] * len(questions)


def test_question_without_room(run, params, questions, expected):
  """A question with too many positions yields None and leaves its neighbours alone."""
  long = '1+' * 40 + '1'
  asked = [questions[0], long, questions[1], long]
  found = list(predictor(run, params, batch_size=4).texts(asked))
  assert found == [expected[0], None, expected[1], None]
  assert list(predictor(run, params, batch_size=2).texts([long, long])) == [None, None]


def test_fits_to_the_last_position(run, params):
  """The last position the model has can be used, and no further one."""
  config = run.config
  room = config.model.max_positions - config.eval.max_new_tokens - config.rim.blocks * (
      config.rim.block_tokens + 2)
  a = predictor(run, params)
  assert a.fits(a.row('1' * (room - 1)))  # and a newline
  assert not a.fits(a.row('1' * room))


def test_samples(run, params, questions):
  """k draws after the last block: the same for the same seed, and not all alike."""
  a = predictor(run, params, samples=5, temperature=3.0)
  one, two = list(a.texts(questions, 5)), list(a.texts(questions, 5))
  assert one == two
  assert all(len(draws) == 5 for draws in one)
  assert any(len(set(draws)) > 1 for draws in one)


@pytest.mark.integration
def test_cold_samples_are_greedy(run, params, questions, expected):
  """At a temperature near 0 every sample is the headline answer."""
  a = predictor(run, params, samples=3, temperature=1e-6)
  assert list(a.texts(questions, 3)) == [[texts[-1]] * 3 for texts in expected]


def test_text_stops_at_the_end_token(run, params):
  """What follows the end token is no part of the answer."""
  a = predictor(run, params)
  end = a.special.end
  assert a._until_end([1, 2, end, 3, end]) == [1, 2]
  assert a._until_end([1, 2]) == [1, 2]
  assert a._until_end([end]) == []


def test_blocks_at_inference(run, params, questions):
  """eval.blocks asks for another number of blocks than was trained."""
  a = predictor(run, params, blocks=2)
  assert [len(texts) for texts in a.texts(questions[:2])] == [2, 2]


def test_prompt_beyond_the_buckets(run):
  """A prompt longer than the largest bucket is laid out all the same."""
  special = sequences.special_tokens(run.tokenizer)
  row = methods.METHODS['direct'].prompt(list(range(1, 22)), 0, run.config, special)
  batch = evaluator.prompt_batch([row], run.config, special.pad)
  assert run.config.data.buckets.prefix[-1] < 21 <= batch.prefix == 32
  short = methods.METHODS['direct'].prompt([1, 2, 3], 0, run.config, special)
  assert evaluator.prompt_batch([short], run.config).prefix == 12


@pytest.mark.integration
def test_a_model_that_knows_the_answer(tiny_config, make_run, tmp_path):
  """After learning one problem by heart, the answer is right: texts, marks and all."""
  config = tiny_config(**{'method': 'cot', 'model.embed_dim': 32, 'model.num_layers': 1,
                          'data.arithmetic.train_size': 8, 'data.buckets.prefix': (12,),
                          'data.buckets.readout': (24,), 'data.buckets.count': (1,),
                          'optim.stage1.steps': 150, 'optim.stage1.learning_rate': 1e-2,
                          'optim.stage2.steps': 0, 'eval.max_new_tokens': 24})
  run = make_run(config, tmp_path)
  state, batch = run.init(), run.batches.at(0)
  stepper = train_step.make_train_step(run.model(), run.objective, run.tx(1), 0, 1)
  for i in range(150):
    state, _ = stepper(state, batch, run.curriculum.learning_rate(i))
  examples = [run.splits.train[i] for i in range(8)]
  result, records = evaluator.evaluate(run.predictor(state.params), examples, 'toy', 'train',
                                       'numeric')
  assert result['accuracy']['final'] == 1.0, [r['predictions'] for r in records]
  for record, example in zip(records, examples, strict=True):
    assert record['predictions'] == ['\n'.join([*example.steps, f'####{example.answer}'])]


@pytest.mark.parametrize('asked, size, sizes', [
    (1, 64, [1]), (2, 64, [2]), (3, 64, [4]), (5, 6, [6]), (9, 4, [4, 4, 4]), (64, 64, [64])])
def test_few_questions_take_few_rows(run, params, monkeypatch, asked, size, sizes):
  """Rows in a power of two, at most eval.batch_size; samples take as many as always."""
  own, seen = predictor(run, params, batch_size=size, samples=2), []
  def generate(rows, rng=None, edit=None):
    seen.append(len(rows))
    return jax.numpy.zeros((len(rows), 1, 1), int)
  monkeypatch.setattr(own, 'generate', generate)
  assert len(list(own.texts(['1+2'] * asked))) == asked
  assert seen == sizes
  seen.clear()
  list(own.texts(['1+2'] * asked, 2))
  assert set(seen) == {size}
