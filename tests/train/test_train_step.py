"""One training step, and what it must not depend on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from close import assert_close

from latent_reasoning import batching, sequences
from latent_reasoning.models.transformer import Transformer
from latent_reasoning.train import losses, optimizer
from latent_reasoning.train import train_step as step_lib

pytestmark = pytest.mark.usefixtures('quick_compilation')

VOCAB, SIZE = 12, 8


def make_batch() -> batching.Batch:
  """Rows of different weight, so that a mean of means would be another loss."""
  rng, rows = np.random.default_rng(0), []
  for b in range(SIZE):
    prefix = rng.integers(0, VOCAB, 6).tolist()
    outs = [sequences.Readout(u, rng.integers(0, VOCAB, 1 + b % 3).tolist(), (b + 1) / 8)
            for u in (4, 6)]
    rows.append(sequences.causal(prefix, outs[b % 2:]))
  return batching.collate(rows, 6, 2, 2)


BATCH = make_batch()

# Adam divides noise by noise where a gradient is 0: plain descent shows it as it is.
SGD = optax.scale(-1.0)


@dataclasses.dataclass(frozen=True)
class Bigram:
  """The smallest model there is; the step does not know what is inside."""
  dropout: float = 0.0
  needs_rng = property(lambda self: self.dropout > 0)


def bigram(model, params, batch, rng):
  """Next token of the token alone, with dropout on its logits."""
  at, targets, weights = losses.predictions(batch)
  logits = params['table'][jnp.take_along_axis(batch.tokens, at, axis=1)]
  if rng is not None:
    keep = jax.random.bernoulli(rng, 1 - model.dropout, logits.shape)
    logits = jnp.where(keep, logits / (1 - model.dropout), 0)
  each = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  loss = jnp.sum(weights * each)
  return loss, {'loss': loss, 'weight': jnp.sum(weights)}


def table(tx=SGD, step: int = 0) -> step_lib.TrainState:
  """A state of its own for each call: the step takes it away."""
  values = np.random.default_rng(1).normal(size=(VOCAB, VOCAB)).astype(np.float32)
  params = {'table': jnp.array(values)}
  return step_lib.TrainState(jnp.asarray(step, jnp.int32), params, tx.init(params))


@functools.cache
def train_step(model=Bigram(), objective=bigram, tx=SGD, seed=0, accumulate=1):
  return step_lib.make_train_step(model, objective, tx, seed, accumulate)


@pytest.fixture(scope='module')
def gpt(tiny_config, random_params):
  """(model, maker of fresh states) of a GPT of one layer."""
  model = Transformer(tiny_config(**{'model.num_layers': 1}).model, VOCAB)
  def fresh(tx):
    params = random_params(model, BATCH)
    return step_lib.TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
  return model, fresh


def host(tree):
  """A copy that outlives donation."""
  return jax.tree.map(lambda a: np.array(a, copy=True), tree)


def close(a, b, atol):
  jax.tree.map(lambda x, y: assert_close(x, y, tol=atol), a, b)


def equal(a, b) -> bool:
  return all(np.array_equal(x, y) for x, y in
             zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.integration
def test_accumulation_changes_nothing(gpt):
  """Four microbatches of unequal weight make the update of the whole batch."""
  model, fresh = gpt
  step = functools.partial(train_step, model, losses.next_token)
  one, whole = step()(fresh(SGD), BATCH, 1.0)
  four, parts = step(accumulate=4)(fresh(SGD), BATCH, 1.0)
  assert not equal(one.params, fresh(SGD).params)
  close(one.params, four.params, 1e-6)
  close(whole, parts, 1e-4)


@pytest.mark.integration
def test_loss_falls(gpt, tiny_config):
  """Thirty steps of a GPT on one batch all but learn it by heart."""
  model, fresh = gpt
  adam = optimizer.build(tiny_config().optim)
  step, state, history = train_step(model, losses.next_token, adam), fresh(adam), []
  for _ in range(30):
    state, sums = step(state, BATCH, 1e-2)
    history.append(float(sums['loss'] / sums['weight']))
  assert history[-1] < history[0] / 4


@pytest.mark.integration
def test_gradient_is_of_the_mean():
  """Plain descent by 1 subtracts the gradient of Σ w nll / Σ w, worked out by hand."""
  before = np.array(table().params['table'], np.float64)
  at, targets, weights = map(np.asarray, losses.predictions(BATCH))
  gradient = np.zeros_like(before)
  for b, i in np.argwhere(weights > 0):
    row = BATCH.tokens[b, at[b, i]]
    p = np.exp(before[row]) / np.exp(before[row]).sum()
    gradient[row] += weights[b, i] * (p - np.eye(VOCAB)[targets[b, i]]) / weights.sum()
  for accumulate in (1, 2, 8):
    after, sums = train_step(accumulate=accumulate)(table(), BATCH, 1.0)
    # The difference of two tables that are 30 times as large has their roundings.
    assert_close(before - after.params['table'], gradient, tol=1e-4)
    assert_close(sums['grad_norm'], np.linalg.norm(gradient))
    assert sums['weight'] == BATCH.weights.sum()


def test_the_state_is_donated_and_counted(tiny_config):
  """The old state's buffers are gone; the new one is a step further."""
  adam = optimizer.build(tiny_config().optim)
  old = table(adam, step=7)
  new, _ = train_step(tx=adam)(old, BATCH, 1e-3)
  assert all(a.is_deleted() for a in jax.tree.leaves(old.params))
  assert all(a.is_deleted() for a in jax.tree.leaves(old.opt_state))
  assert new.step == 8 and new.step.dtype == jnp.int32


def test_learning_rate(tiny_config):
  """Nothing is learned at rate 0, and twice the rate is twice the way."""
  adam = optimizer.build(tiny_config().optim)
  start = host(table().params)
  moved = [host(train_step(tx=adam)(table(adam), BATCH, rate)[0].params)
           for rate in (0.0, 1e-2, 2e-2)]
  assert equal(moved[0], start) and not equal(moved[1], start)
  way = [moved[i]['table'] - start['table'] for i in (1, 2)]
  assert_close(2 * way[0], way[1], tol=1e-4)  # as above


@pytest.mark.integration
def test_dropout_is_of_seed_and_step():
  """The same (seed, step) drops the same; another step or seed drops another."""
  def after(seed, step):
    call = train_step(Bigram(0.3), seed=seed)
    return host(call(table(step=step), BATCH, 1.0)[0].params)
  first = after(0, 5)
  assert equal(first, after(0, 5))
  assert not equal(first, after(0, 6))
  assert not equal(first, after(1, 5))


@pytest.mark.integration
def test_microbatches_drop_differently():
  """Two microbatches of the same rows do not share a dropout mask."""
  twice = jax.tree.map(lambda a: np.concatenate([a[:4], a[:4]]), BATCH)
  half = jax.tree.map(lambda a: a[:4], BATCH)
  rates = {}
  for rate in (0.0, 0.3):
    two, _ = train_step(Bigram(rate), accumulate=2)(table(), twice, 1.0)
    one, _ = train_step(Bigram(rate))(table(), half, 1.0)
    rates[rate] = np.allclose(two.params['table'], one.params['table'], atol=1e-5)
  assert rates == {0.0: True, 0.3: False}


def test_keys():
  """A key is a function of (seed, purpose, step), and no two are alike."""
  def data(*args):
    return tuple(np.asarray(jax.random.key_data(step_lib.key(*args))).tolist())
  arguments = [(seed, purpose, step) for seed in (0, 1)
               for purpose in (step_lib.INIT, step_lib.DROPOUT, step_lib.SAMPLE,
                               step_lib.LEAKAGE) for step in (0, 1, 2)]
  assert len({data(*a) for a in arguments}) == len(arguments)
  assert data(3, step_lib.SAMPLE, 4) == data(3, step_lib.SAMPLE, 4)
  assert data(3, step_lib.SAMPLE) == data(3, step_lib.SAMPLE, 0)


@pytest.mark.integration
def test_init(gpt):
  """A fresh state is of its seed, at step 0, and of no batch's contents."""
  other = dataclasses.replace(BATCH, tokens=BATCH.tokens[::-1].copy())
  states = [step_lib.init(gpt[0], SGD, batch, seed)
            for batch, seed in ((BATCH, 0), (other, 0), (BATCH, 1))]
  assert states[0].step == 0 and states[0].step.dtype == jnp.int32
  assert equal(states[0], states[1]) and not equal(states[0].params, states[2].params)
