"""The loss beside its definition in NumPy."""

import functools

import jax
import numpy as np
import pytest

from latent_reasoning import layout, objectives, pipeline
from latent_reasoning.layout import Readout
from latent_reasoning.models.gpt import GPT

pytestmark = pytest.mark.usefixtures('quick_compilation')

VOCAB = 12
ROWS = [
    # Two blocks' worth of prefix, readouts at 4 and 7, one with a start token.
    layout.plain([1, 2, 3, 4, 5, 6, 7], [Readout(4, [8, 9, 10], 0.25), Readout(7, [3, 10]),
                                         Readout(7, [5, 6, 10], 0.5, start=11)]),
    layout.plain([4, 2, 9], [Readout(3, [1, 1, 10], 0.75)])]


@pytest.fixture(scope='module')
def model(tiny_config):
  return GPT(tiny_config().model, VOCAB)


@pytest.fixture(scope='module')
def params(model, random_params):
  return random_params(model, pipeline.collate(ROWS, 9, 3, 3))


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, batch):
  hidden, _ = model.apply({'params': params}, batch.tokens, batch.positions, batch.mask)
  return model.apply({'params': params}, hidden, method='head')


@functools.partial(jax.jit, static_argnums=0)
def loss_of(model, params, batch, rng=None):
  """((loss, sums), gradient)."""
  def loss(params):
    return objectives.next_token(model, params, batch, rng)
  return jax.value_and_grad(loss, has_aux=True)(params)


def log_softmax(logits) -> np.ndarray:
  logits = np.asarray(logits, np.float64)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_definition(model, params):
  """Σ w · -log p(target) over all positions, with its weight and what is correct."""
  batch = pipeline.collate(ROWS, 9, 3, 3)
  logp = log_softmax(logits(model, params, batch))
  nll = -np.take_along_axis(logp, batch.targets[..., None], -1)[..., 0]
  right = logp.argmax(-1) == batch.targets
  (loss, sums), _ = loss_of(model, params, batch)
  np.testing.assert_allclose(loss, (batch.weights * nll).sum(), rtol=1e-5)
  np.testing.assert_allclose(sums['loss'], loss)
  assert sums['weight'] == batch.weights.sum() == 0.25 * 3 + 2 + 0.5 * 3 + 0.75 * 3
  np.testing.assert_allclose(sums['correct'], (batch.weights * right).sum(), rtol=1e-6)


def test_packed_is_the_sum_of_sequences(model, params):
  """A packed row costs what its readouts cost, each as a plain causal sequence."""
  (loss, _), _ = loss_of(model, params, pipeline.collate(ROWS, 9, 3, 3))
  total = 0.0
  for row in ROWS:
    for out in row.readouts:
      tokens = [*row.prefix[:out.until], *out.inputs]
      logp = log_softmax(logits(model, params, pipeline.collate(
          [layout.plain(tokens, ())], 12, 0, 0)))[0]
      first = len(tokens) - len(out.out)
      total -= out.weight * sum(logp[first + i, t] for i, t in enumerate(out.out))
  np.testing.assert_allclose(loss, total, rtol=1e-5)


def test_padding_costs_nothing(model, params):
  """Whatever stands in the padding, the loss is the same, and so is its gradient."""
  (value, _), grads = loss_of(model, params, pipeline.collate(ROWS, 9, 3, 3))
  wide = pipeline.collate(ROWS, 12, 4, 5, pad=VOCAB - 1)
  (other, _), other_grads = loss_of(model, params, wide)
  np.testing.assert_allclose(value, other, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, other_grads)


def test_weights_scale_the_loss(model, params):
  """The loss is linear in its weights, and its sums add up over rows."""
  batch = pipeline.collate(ROWS, 9, 3, 3)
  (loss, sums), _ = loss_of(model, params, batch)
  (double, _), _ = loss_of(model, params, batch.replace(weights=2 * batch.weights))
  np.testing.assert_allclose(double, 2 * loss, rtol=1e-6)
  parts = []
  for b in range(2):  # the other row weighs nothing
    weights = np.where(np.arange(2)[:, None] == b, batch.weights, 0)
    parts.append(loss_of(model, params, batch.replace(weights=weights))[0][1])
  for name in sums:
    np.testing.assert_allclose(parts[0][name] + parts[1][name], sums[name], rtol=1e-5)


def test_head_only_where_something_is_predicted(tiny_config, params):
  """Logits are made for anchors and readouts, not for the whole prefix."""
  sizes = []

  class Counting(GPT):
    def head(self, hidden, kernel_DV=None):
      sizes.append(hidden.shape)
      return super().head(hidden, kernel_DV)

  model, batch = Counting(tiny_config().model, VOCAB), pipeline.collate(ROWS, 9, 3, 3)
  jax.eval_shape(lambda: objectives.next_token(model, params, batch))
  assert sizes == [(2, 3 + 3 * 3, 16)]


def test_dropout_needs_a_key():
  """Without a key the model is deterministic; with one it gets it for its dropout."""
  calls = []

  class Recorder:
    def apply(self, variables, x, *args, method=None, **kwargs):
      if method:  # the head
        return np.zeros((*x.shape[:-1], VOCAB), np.float32)
      calls.append(kwargs)
      return np.zeros((*x.shape, 4), np.float32), (None,) * 4

  batch, rng = pipeline.collate(ROWS, 9, 3, 3), jax.random.key(0)
  for key in (None, rng):
    jax.eval_shape(lambda key=key: objectives.next_token(Recorder(), {}, batch, key)[0])
  assert calls == [{'embeddings': None, 'deterministic': True, 'rngs': None},
                   {'embeddings': None, 'deterministic': False, 'rngs': {'dropout': rng}}]


def test_every_method_names_an_objective():
  """The table of methods and the table of losses fit together."""
  assert {m.objective for m in layout.METHODS.values()} <= set(objectives.OBJECTIVES)
