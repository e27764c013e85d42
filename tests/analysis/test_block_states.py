"""What is collected of blocks, beside plain forward passes over each block alone."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from close import assert_close

from latent_reasoning import batching, sequences
from latent_reasoning.analysis import block_states
from latent_reasoning.data.example import Example
from latent_reasoning.errors import InputError

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture(scope='module')
def predictor(tiny_config, make_run, tmp_path_factory):
  """Of a tiny random model that is lively enough to say different things."""
  run = make_run(tiny_config(), tmp_path_factory.mktemp('run'))
  return run.predictor(jax.tree.map(lambda a: 6 * a, run.init().params))


@pytest.fixture(scope='module')
def examples(predictor):
  return [Example('1+2*3', ('1+2=3', '3*3=9'), '9'),
          Example('4-1+2-9', ('4-1=3', '3+2=5', '5-9=6'), '6'),
          Example('5*5+1', ('5*5=5', '5+1=6'), '6'),
          Example('7+0*0-1', ('7+0=7', '7*0=0', '0-1=9'), '9'),
          Example('8', (), '8')]


@pytest.fixture(scope='module')
def seen(predictor, examples):
  return block_states.collect(predictor, examples, 'numeric')


def test_shows_itself_in_a_line(seen):
  """Not its arrays: how many problems, which shape, how many right."""
  text = repr(seen)
  assert len(text) < 200 and '\n' not in text and '5 problems, 3 blocks' in text
  assert ', '.join(f'{100 * share:.1f}' for share in seen.correct.mean(0)) in text


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, batch):
  out = model.apply({'params': params}, batch.tokens, batch.positions, batch.mask)
  return out.hidden, out.layers.hidden, jax.nn.log_softmax(
      model.apply({'params': params}, out.hidden, method='head'))


@pytest.mark.integration
def test_states_and_confidence(predictor, examples, seen):
  """As of question, blocks 1 … k and the answer as one plain causal sequence."""
  end = predictor.special.end
  for b, example in enumerate(examples):
    row = predictor.row(example.question)
    said = np.asarray(predictor.generate([row]))[0].tolist()
    for k, out in enumerate(row.readouts):
      own = said[k][:said[k].index(end) + 1] if end in said[k] else said[k]
      tokens = [*row.prefix[:out.visible_until], *own[:-1]]
      batch = batching.collate([sequences.causal(tokens, ())], 28, 0, 0)
      hidden, layers, logp = forward(predictor.model, predictor.params, batch)
      expected = np.stack([a[0, out.visible_until - 1] for a in (*layers, hidden)])
      # Weights of 0.2 make states of 200 and amplify roundings from layer to layer.
      assert_close(seen.states[b, k], expected, tol=2e-4)
      at = range(out.visible_until - 1, len(tokens))
      assert_close(
          seen.confidence[b, k], np.mean([logp[0, i, t] for i, t in zip(at, own, strict=True)]),
          tol=2e-4)


def test_predictions_are_those_of_evaluation(predictor, examples, seen):
  texts = list(predictor.texts([e.question for e in examples]))
  np.testing.assert_array_equal(seen.predictions, texts)
  assert len(set(seen.predictions.ravel())) > 3  # a constant would prove little
  assert seen.correct.shape == seen.votes.shape == (5, 3)


def test_true_chain(predictor, examples, seen):
  """Results of the steps as numbers, first tokens of what follows each block."""
  nan = float('nan')
  np.testing.assert_array_equal(
      seen.values, [[3, 9, nan], [3, 5, 6], [5, 6, nan], [7, 0, 9], [nan] * 3])
  def ids(text):
    return [predictor.tokenizer.encode(c)[0] for c in text]
  assert seen.next_token.tolist() == [ids(t) for t in ('399', '356', '566', '709', '888')]
  assert seen.answer_token.tolist() == ids('96698')
  assert seen.length.tolist() == [6, 8, 6, 8, 2]


def test_file(seen, tmp_path):
  """What is saved is loaded."""
  seen.save(tmp_path / 'seen.npz')
  back = block_states.BlockActivations.load(tmp_path / 'seen.npz')
  for field in dataclasses.fields(seen):
    np.testing.assert_array_equal(getattr(back, field.name), getattr(seen, field.name))


@pytest.mark.integration
def test_budget(predictor, examples, seen):
  """With k blocks, the answer of block k; with none, that of the bare question."""
  found = block_states.by_budget(predictor, examples, 'numeric')
  assert_close(found[1:], seen.correct.mean(0))
  bare = [sequences.causal(q, [sequences.Readout(len(q))]) for q in (
      predictor.tokenizer.encode(e.question + '\n') for e in examples)]
  said = [t for i in range(0, 5, 4) for t in predictor.read(
      predictor.generate(block_states.fill(bare[i:i + 4], 4))[:len(bare[i:i + 4])])]
  hits = [text[0].strip() == e.answer for text, e in zip(said, examples, strict=True)]
  assert found[0] == np.mean(hits)


def test_too_long_is_left_out(predictor, examples, seen):
  """A question without room is not collected; its neighbours are the same."""
  long = Example('1+' * 30 + '1', ('1',), '1')
  found = block_states.collect(predictor, [examples[0], long, *examples[1:]], 'numeric')
  assert found.index.tolist() == [0, 2, 3, 4, 5]
  assert_close(found.states, seen.states)
  with pytest.raises(InputError, match='no question fits'):
    block_states.collect(predictor, [long], 'numeric')


def test_other_methods_have_no_blocks(predictor):
  direct = dataclasses.replace(predictor.config, method='direct')
  other = type(predictor)(direct, predictor.model, predictor.params, predictor.tokenizer)
  with pytest.raises(InputError, match='no blocks'):
    block_states.collect(other, [], 'numeric')


def test_the_rule_of_the_data(predictor, examples, monkeypatch):
  """Answers are compared, and votes counted, as evaluation does."""
  said = [['the answer is B', '(b)', 'B) 12']] * len(examples)
  monkeypatch.setattr(predictor, 'read', lambda tokens: said[:len(tokens)])
  choice = [dataclasses.replace(e, answer='B') for e in examples]
  found = block_states.collect(predictor, choice, 'letter')
  assert found.correct.all() and (found.votes == 'B').all()
  assert not block_states.collect(predictor, choice, 'text').correct[:, 0].any()
