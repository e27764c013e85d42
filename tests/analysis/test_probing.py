"""Looking inside: planted axes, states that must agree with what the model says."""

import dataclasses

import jax
import numpy as np
import pytest
from close import assert_close

from latent_reasoning import batching
from latent_reasoning.analysis import block_states, probing
from latent_reasoning.data.example import Example
from latent_reasoning.models import attention

pytestmark = pytest.mark.usefixtures('quick_compilation')
EXAMPLES = [Example('1+2*3', ('1+2=3', '3*3=9'), '9'), Example('5*5+1', ('5*5=5',), '6'),
            Example('2-1+4', ('2-1=1', '1+4=5'), '5'), Example('4-1+2-9', ('4-1=3',), '6')]


@pytest.fixture(scope='module', params=[False, True], ids=['', 'scanned'])
def predictor(request, tiny_config, make_run, tmp_path_factory):
  run = make_run(tiny_config(**{'model.scan': request.param}), tmp_path_factory.mktemp('run'))
  return run.predictor(jax.tree.map(lambda a: 6 * a, run.init().params))


def test_trajectories_are_on_the_axes_that_are_there():
  """Two planted axes are found, with their shares of the variance, and points on them."""
  rng = np.random.default_rng(0)
  axes = np.linalg.qr(rng.normal(size=(8, 2)))[0]
  planted = rng.normal(size=(500, 3, 2)) * [3, 1]
  states = (planted @ axes.T + 5)[:, :, None]  # one layer
  blank = np.zeros((500, 3))
  seen = block_states.BlockActivations(np.arange(500), blank[:, 0], states, *(blank,) * 6,
                                       blank[:, 0])
  found = probing.trajectories([seen, seen])
  assert found['explained'] == pytest.approx([0.9, 0.1], abs=0.02)
  centred = planted - planted.reshape(-1, 2).mean(0)
  assert_close(np.abs(found['points']), np.abs(centred), tol=0.15)
  assert_close(found['means'][1], found['points'].mean(0))


def test_turns():
  """1 along a line, 0 at a right angle, -1 on the way back."""
  line = np.array([[[0, 0], [1, 0], [3, 0], [3, 2], [3, 1]]], float)
  assert_close(probing.curvature(line), [[1, 0, -1]])


def test_values_are_read_where_they_are():
  """A value written into one block and layer is read there, and nowhere else."""
  def made(seed, n=400):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 4, (n, 2)).astype(float)
    states = rng.normal(size=(n, 2, 2, 6)).astype(np.float32)
    states[:, 1, 0, :4] += 6 * (values[:, :1] == np.arange(4))
    values[:, 1] = np.nan  # a step that no problem has
    fields = [f.name for f in dataclasses.fields(block_states.BlockActivations)]
    return block_states.BlockActivations(**{**dict.fromkeys(fields), 'states': states,
                                            'values': values})
  found = probing.value_probes(made(0), made(1))
  assert found['accuracy'][0, 1, 0] > 0.97
  assert (found['accuracy'][0][[0, 0, 1], [0, 1, 1]] < 0.4).all()
  assert np.isnan(found['accuracy'][1]).all() and np.isnan(found['commonest'][1])


@pytest.mark.integration
def test_lens_of_the_final_state(predictor):
  """There the lens says what the model says; the last two entries of a state agree."""
  seen = block_states.collect(predictor, EXAMPLES, 'numeric')
  said = np.asarray(predictor.generate([predictor.row(e.question) for e in EXAMPLES]))[:, :, 0]
  found = probing.lens(predictor, seen)
  for name, truth in (('next step', seen.next_token),
                      ('answer', seen.answer_token[:, None])):
    np.testing.assert_array_equal(found[name][:, -1], (said == truth).mean(0))
    np.testing.assert_array_equal(found[name][:, -2], found[name][:, -1])


def test_attention_adds_to_one(predictor):
  """Each query's shares add to 1, nothing looks ahead, and one length is averaged."""
  found = probing.attention(predictor, EXAMPLES)
  assert found['n'] == 3 and ''.join(found['tokens']) == '1+2*3\n'
  assert_close(found['question'].sum(-1) + found['blocks'].sum(-1), 1)
  assert_close(found['readouts'].sum(-1), 1)
  assert (np.triu(found['blocks'][0], 1) == 0).all()
  assert (found['blocks'].sum((0, 1)) > 0).all()
  assert (np.triu(found['readouts'][0, :, 1:-1], 1) == 0).all()


def test_weights_are_those_that_are_used(predictor):
  """Weights times values is what packed attention returns."""
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(2, 18, n, 4)).astype(np.float32) for n in (4, 2, 2))
  batch = batching.collate([predictor.row(e.question) for e in EXAMPLES[:2]], 15, 3, 1)
  w = attention.weights(q, k, batch.mask)
  assert_close(w.sum(-1), 1)
  expected = np.einsum('bnts,bsnh->btnh', w, np.repeat(v, 2, axis=2))
  assert_close(attention.dense(q, k, v, batch.mask), expected)
