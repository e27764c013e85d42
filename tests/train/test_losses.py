"""The loss beside its definition in NumPy."""

import dataclasses
import functools

import jax
import jax.test_util
import numpy as np
import pytest
from close import assert_close

from latent_reasoning import batching, sequences
from latent_reasoning.methods import rim
from latent_reasoning.models.transformer import Transformer
from latent_reasoning.sequences import Readout
from latent_reasoning.train import losses

pytestmark = pytest.mark.usefixtures('quick_compilation')

VOCAB = 12
ROWS = [
    # Two blocks' worth of prefix, readouts at 4 and 7, one with a start token.
    sequences.causal([1, 2, 3, 4, 5, 6, 7], [Readout(4, [8, 9, 10], 0.25), Readout(7, [3, 10]),
                                             Readout(7, [5, 6, 10], 0.5, start=11)]),
    sequences.causal([4, 2, 9], [Readout(3, [1, 1, 10], 0.75)])]


@pytest.fixture(scope='module')
def model(tiny_config):
  return Transformer(tiny_config().model, VOCAB)


@pytest.fixture(scope='module')
def params(model, random_params):
  return random_params(model, batching.collate(ROWS, 9, 3, 3))


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, batch):
  hidden = model.apply({'params': params}, batch.tokens, batch.positions, batch.mask).hidden
  return model.apply({'params': params}, hidden, method='head')


@functools.partial(jax.jit, static_argnums=0)
def loss_of(model, params, batch, rng=None):
  """((loss, sums), gradient)."""
  def loss(params):
    return losses.next_token(model, params, batch, rng)
  return jax.value_and_grad(loss, has_aux=True)(params)


def log_softmax(logits) -> np.ndarray:
  logits = np.asarray(logits, np.float64)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.integration
def test_definition(model, params):
  """Σ w · -log p(target) over all positions, with its weight and what is correct."""
  batch = batching.collate(ROWS, 9, 3, 3)
  logp = log_softmax(logits(model, params, batch))
  nll = -np.take_along_axis(logp, batch.targets[..., None], -1)[..., 0]
  right = logp.argmax(-1) == batch.targets
  (loss, sums), _ = loss_of(model, params, batch)
  assert_close(loss, (batch.weights * nll).sum())
  assert_close(sums['loss'], loss)
  assert sums['weight'] == batch.weights.sum() == 0.25 * 3 + 2 + 0.5 * 3 + 0.75 * 3
  assert_close(sums['correct'], (batch.weights * right).sum())


def test_packed_is_the_sum_of_sequences(model, params):
  """A packed row costs what its readouts cost, each as a plain causal sequence."""
  (loss, _), _ = loss_of(model, params, batching.collate(ROWS, 9, 3, 3))
  total = 0.0
  for row in ROWS:
    for out in row.readouts:
      tokens = [*row.prefix[:out.visible_until], *out.inputs]
      logp = log_softmax(logits(model, params, batching.collate(
          [sequences.causal(tokens, ())], 12, 0, 0)))[0]
      first = len(tokens) - len(out.out)
      total -= out.weight * sum(logp[first + i, t] for i, t in enumerate(out.out))
  assert_close(loss, total)


@pytest.mark.integration
def test_padding_costs_nothing(model, params):
  """Whatever stands in the padding, the loss is the same, and so is its gradient."""
  (value, _), grads = loss_of(model, params, batching.collate(ROWS, 9, 3, 3))
  wide = batching.collate(ROWS, 12, 4, 5, pad=VOCAB - 1)
  (other, _), other_grads = loss_of(model, params, wide)
  assert_close(value, other)
  jax.tree.map(lambda a, b: assert_close(a, b), grads, other_grads)


def test_weights_scale_the_loss(model, params):
  """The loss is linear in its weights, and its sums add up over rows."""
  batch = batching.collate(ROWS, 9, 3, 3)
  (loss, sums), _ = loss_of(model, params, batch)
  (double, _), _ = loss_of(model, params, batch.replace(weights=2 * batch.weights))
  assert_close(double, 2 * loss)
  parts = []
  for b in range(2):  # the other row weighs nothing
    weights = np.where(np.arange(2)[:, None] == b, batch.weights, 0)
    parts.append(loss_of(model, params, batch.replace(weights=weights))[0][1])
  for name in sums:
    assert_close(parts[0][name] + parts[1][name], sums[name])


def test_head_only_where_something_is_predicted(tiny_config, params):
  """Logits are made for anchors and readouts, not for the whole prefix."""
  sizes = []

  class Counting(Transformer):
    def head(self, hidden, kernel_DV=None):
      sizes.append(hidden.shape)
      return super().head(hidden, kernel_DV)

  model, batch = Counting(tiny_config().model, VOCAB), batching.collate(ROWS, 9, 3, 3)
  jax.eval_shape(lambda: losses.next_token(model, params, batch))
  assert sizes == [(2, 3 + 3 * 3, 16)]


def test_dropout_needs_a_key(model, params):
  """Without a key the loss is that of no dropout; with one it is of the key alone."""
  batch, drops = batching.collate(ROWS, 9, 3, 3), model.clone(dropout=0.5)
  loss = jax.jit(lambda model, key=None: losses.next_token(model, params, batch, key)[0],
                 static_argnums=0)
  plain, first, second = loss(model), *(loss(drops, jax.random.key(seed)) for seed in (0, 1))
  assert loss(drops) == plain and loss(drops, jax.random.key(0)) == first
  assert len({float(a) for a in (plain, first, second)}) == 3


def rim_rows(tiny_config):
  """Three problems after three blocks; the first two have the same answer."""
  ids = sequences.SpecialTokens(11, 10, 7, 8, 9, 6, (), (), ())
  return [rim.refine(sequences.TokenizedExample(q, [[1], [2]], a), 0.0, tiny_config(), ids)
          for q, a in (([1, 2, 3], [4, 5]), ([2, 2], [4, 5]), ([3, 1, 1], [1]))]


@pytest.fixture(scope='module')
def aux_of(model, params, tiny_config):
  """(changes of config.aux) -> (loss, sums), on the rows of RiM; none: the plain loss."""
  batch = batching.collate(rim_rows(tiny_config), 14, 4, 3)
  def found(**changes):
    aux = dataclasses.replace(tiny_config().aux, **changes)
    objective = losses.with_aux(aux) if changes else losses.next_token
    return jax.jit(lambda p: objective(model, p, batch))(params)
  return batch, found


@pytest.mark.integration
def test_alignment_by_hand(model, params, aux_of):
  """InfoNCE of the last block's state and its answer's mean embedding, in NumPy."""
  batch, found = aux_of
  loss, sums = found(align=0.5, temperature=0.2)
  plain, _ = found()
  hidden = np.asarray(jax.jit(lambda p: model.apply(
      {'params': p}, batch.tokens, batch.positions, batch.mask).hidden)(params), np.float64)
  table = np.asarray(params['embedding'], np.float64)
  states = np.stack([hidden[b, batch.anchors[b, 2]] for b in range(3)])
  means = np.stack([table[a].mean(0) for a in ([4, 5], [4, 5], [1])])
  states, means = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (states, means))
  logits = states @ means.T / 0.2
  logits[0, 1] = logits[1, 0] = -np.inf  # the same answer is no negative
  expected = -np.diagonal(log_softmax(logits)).mean()
  assert_close(sums['aux_align'] / sums['weight'], expected, tol=1e-4)
  assert_close(loss, plain + 0.5 * sums['aux_align'])


def test_turning_by_hand():
  """0 on a line, 1 at a right angle, 2 on the way back; what is no block is left out."""
  def turning(states, anchors):
    return float(losses.turning(np.array(states, np.float32), np.array(anchors)))
  line, corner, back = ([[0., 0], [1, 0], [3, 0]], [[0., 0], [1, 0], [1, 5]],
                        [[0., 0], [1, 0], [0, 0]])
  for states, expected in ((line, 0), (corner, 1), (back, 2)):
    assert turning([states], [[1, 2, 3]]) == pytest.approx(expected, abs=1e-5)
  assert turning([line, corner], [[1, 2, 3]] * 2) == pytest.approx(1, abs=1e-5)
  assert turning([line, back], [[1, 2, 3], [1, 2, 0]]) == pytest.approx(0, abs=1e-5)
  assert turning([line], [[1, 2, 0]]) == 0


@pytest.mark.integration
def test_gradients_of_auxiliary_losses():
  """Gradients by the states are those of finite differences."""
  rng = np.random.default_rng(0)
  z, means = rng.normal(size=(4, 5, 6)), rng.normal(size=(4, 6))
  texts, anchors = np.array([[1, 2], [1, 2], [3, -1], [4, 5]]), np.array([[1, 2, 3, 4, 0]] * 4)
  for loss in (lambda z: losses.contrast(z[:, 0], means, texts, 0, 0.5).mean(),
               lambda z: losses.turning(z, anchors) / 8):
    jax.test_util.check_grads(loss, (z,), order=1, modes=['rev'], rtol=0.02)


def test_off_is_the_plain_loss(tiny_config, make_run, tmp_path):
  """Without weights, the objective is the very function that it was."""
  assert make_run(tiny_config(), tmp_path).objective is losses.next_token
