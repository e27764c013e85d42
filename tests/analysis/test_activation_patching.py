"""Interventions: what must change nothing, and what must change all."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_reasoning import batching, sequences
from latent_reasoning.analysis import activation_patching
from latent_reasoning.data.example import Example
from latent_reasoning.errors import InputError
from latent_reasoning.eval import decoding
from latent_reasoning.eval.evaluator import prefix_width
from latent_reasoning.models.attention import Cache

pytestmark = pytest.mark.usefixtures('quick_compilation')
QUESTIONS = ['1+2*3', '4-1+2-9', '5*5+1', '7+0*0-1']


@pytest.fixture(scope='module', params=['causal', 'bidirectional'])
def predictor(request, tiny_config, make_run, tmp_path_factory):
  config = tiny_config(**{'rim.block_attention': request.param,
                          'model.scan': request.param == 'bidirectional'})
  run = make_run(config, tmp_path_factory.mktemp('run'))
  return run.predictor(jax.tree.map(lambda a: 6 * a, run.init().params))


def asked(predictor, blocks_too=True):
  rows = [predictor.row(q) for q in QUESTIONS]
  return [activation_patching.reread(r, predictor.special.block_close) for r in rows], [
      len(r.prefix) - 9 for r in rows]


def edit(predictor, other, scale, block=None):
  rows, lengths = asked(predictor)
  return activation_patching.edit(rows, lengths, prefix_width(rows, predictor.config),
                                  np.array(other), scale, block, 3)


def said(predictor, edit=None):
  return np.asarray(predictor.generate(asked(predictor)[0], edit=edit))[:, 0]


@pytest.mark.integration
def test_rereading_changes_nothing(predictor):
  """The final answers are those of ordinary decoding."""
  plain = np.asarray(predictor.generate([predictor.row(q) for q in QUESTIONS]))[:, -1]
  np.testing.assert_array_equal(said(predictor), plain)
  assert len(np.unique(plain)) > 3


@pytest.mark.integration
def test_transplant(predictor):
  """One pair: what each says untouched; the donor's blocks change it, the own do not."""
  one, two = QUESTIONS[:2]
  plain = [texts[-1] for texts in predictor.texts([one, two])]
  assert list(activation_patching.transplant(predictor, one, two)[:2]) == plain
  assert activation_patching.transplant(predictor, one, one) == (plain[0],) * 3
  assert len({activation_patching.transplant(predictor, q, d)[2] for q in QUESTIONS[:1]
              for d in QUESTIONS}) > 1


@pytest.mark.integration
@pytest.mark.parametrize('block', [None, 1])
def test_own_states_change_nothing(predictor, block):
  """A question that is given its own states back says what it said."""
  found = said(predictor, edit(predictor, range(4), 1, block))
  np.testing.assert_array_equal(found, said(predictor))


def test_others_states_and_zeros_change_something(predictor):
  plain = said(predictor)
  for changed in (edit(predictor, [2, 3, 0, 1], 1), edit(predictor, range(4), 0)):
    assert (said(predictor, changed) != plain).any()


def test_transplant_into_the_same_question(predictor):
  """Where only blocks are seen, the donor's states give the donor's answer."""
  rows, lengths = asked(predictor)
  blind = [activation_patching.reread(predictor.row(q), predictor.special.block_close, False, n)
           for q, n in zip(QUESTIONS, lengths, strict=True)]
  other = [2, 3, 0, 1]  # of the same length
  plain = np.asarray(predictor.generate(blind))[:, 0]
  found = np.asarray(predictor.generate(blind, edit=edit(predictor, other, 1)))[:, 0]
  np.testing.assert_array_equal(found, plain[other])
  assert (plain[other] != plain).any()


def test_edit_of_a_cache():
  """Positions of blocks alone, moved where the questions differ in length."""
  rows = [sequences.causal(range(5), [sequences.Readout(4)]), sequences.causal(range(7), [
      sequences.Readout(6)])]  # questions of 1 and 3, two blocks of 2, P = 8
  k = jnp.arange(2 * 8).reshape(1, 2, 1, 8, 1).astype(float)
  change = activation_patching.edit(rows, [1, 3], 8, np.array([1, 0]), 1, None, 2)
  found = change(Cache(k, -k, None, None))
  assert found.prefix_k[0, 0, 0, :, 0].tolist() == [0, 11, 12, 13, 14, 5, 6, 7]
  assert found.prefix_v[0, 1, 0, :, 0].tolist() == [-8, -9, -10, -1, -2, -3, -4, -15]
  one = activation_patching.edit(rows, [1, 3], 8, np.array([1, 0]), 0, 1, 2)(
      Cache(k, k, None, None))
  assert one.prefix_k[0, 0, 0, :, 0].tolist() == [0, 1, 2, 0, 0, 5, 6, 7]


def test_donors():
  """Another of the same group; alone, itself."""
  groups = [1, 2, 1, 3, 2, 1]
  other = activation_patching.donors(groups)
  assert other[3] == 3 and sorted(other) == list(range(6))
  assert all(groups[i] == groups[j] for i, j in enumerate(other))
  assert all(i != j for i, j in enumerate(other) if i != 3)


@pytest.mark.integration
def test_no_blocks(predictor):
  """An edit of no block leaves the cache as it is, to the bit."""
  rows = [sequences.causal(predictor.row(q).prefix[:4], [sequences.Readout(4)])
          for q in QUESTIONS]
  batch = batching.collate(rows, 12, 1, 1)
  none = activation_patching.edit(rows, [4] * 4, 12, np.array([1, 2, 3, 0]), 0, None, 3)
  one, two = (decoding.prefill(predictor.model, predictor.params, predictor.head, batch, 2,
                               edit=e)
              for e in (None, none))
  jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.integration
def test_table(predictor):
  """Counts, and that the untouched line is the ordinary evaluation."""
  examples = [Example(q, (), '3') for q in QUESTIONS]
  found = activation_patching.interventions(predictor, [*examples, Example('1', (), '1')],
                                            'numeric')
  lines = {line['name']: line for line in found['lines']}
  texts = list(predictor.texts(QUESTIONS + ['1']))
  right = [t[-1] == a for t, a in zip(texts, '33331', strict=True)]
  assert lines['untouched']['accuracy'] == np.mean(right)
  assert lines['untouched']['changed'] == 0 and found['n'] == 5
  assert lines['all blocks transplanted']['n'] == 4  # the fifth is alone in its batch
  assert {'block 1 zeroed', 'block 3 transplanted', 'no blocks'} <= lines.keys()


def test_blind_models_are_refused(predictor):
  rim = dataclasses.replace(predictor.config.rim, readout_sees_question=False)
  config = dataclasses.replace(predictor.config, rim=rim)
  other = type(predictor)(config, predictor.model, predictor.params, predictor.tokenizer)
  with pytest.raises(InputError, match='readout_sees_question'):
    activation_patching.interventions(other, [], 'numeric')
