"""The GPT: causal by gradient, the same in every form it is written."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close

from latent_reasoning import batching, sequences
from latent_reasoning.config import RopeConfig
from latent_reasoning.models import layers, transformer
from latent_reasoning.models.transformer import Transformer

pytestmark = pytest.mark.usefixtures('quick_compilation')

VOCAB, LENGTH = 11, 6
ROPE = RopeConfig(1e4, '', 1.0, 1.0, 4.0, 8192)
TEXT = np.random.default_rng(0).integers(0, VOCAB, (2, LENGTH)).tolist()


def plain_rows(texts, length=LENGTH) -> batching.Batch:
  """Plain causal sequences."""
  return batching.collate([sequences.causal(t, ()) for t in texts], length, 0, 0)


BATCH = plain_rows(TEXT)


@pytest.fixture(scope='module')
def make(tiny_config):
  """Makes a GPT from fields of its config."""
  base = tiny_config().model
  def build(dropout=0.0, **changes):
    return Transformer(dataclasses.replace(base, **changes), VOCAB, dropout)
  return build


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, batch):
  hidden = model.apply({'params': params}, batch.tokens, batch.positions, batch.mask).hidden
  return model.apply({'params': params}, hidden, method='head')


@functools.partial(jax.jit, static_argnums=0)
def influence(model, params, batch):
  """[L, L]: size of the gradient of the logits at i by the input embedding at j."""
  embeddings = model.apply({'params': params}, batch.tokens, method='embed')
  direction = jnp.asarray(np.random.default_rng(1).normal(size=VOCAB), jnp.float32)
  def outputs(embeddings):
    hidden = model.apply({'params': params}, batch.tokens, batch.positions, batch.mask,
                            embeddings=embeddings).hidden
    return model.apply({'params': params}, hidden, method='head')[0] @ direction
  return jnp.abs(jax.jacrev(outputs)(embeddings)[:, 0]).max(-1)


@pytest.mark.integration
@pytest.mark.parametrize('changes', [
    {'position_embedding': 'learned', 'tie_embeddings': True, 'bias': True},
    {'position_embedding': 'learned', 'tie_embeddings': False, 'bias': False, 'num_layers': 1},
    {'position_embedding': 'rotary', 'tie_embeddings': True, 'bias': False, 'num_layers': 1},
    {'position_embedding': 'rotary', 'tie_embeddings': False, 'bias': True, 'scan': True},
    {'position_embedding': 'rotary', 'tie_embeddings': True, 'bias': False, 'norm': 'rms',
     'mlp': 'swiglu', 'fused_qkv': False, 'num_heads': 4,
     'num_kv_heads': 2, 'head_dim': 6, 'qk_norm': True}])
def test_causal_by_gradient(make, random_params, changes):
  """A logit depends on every token up to its own, and on none after it."""
  model = make(**changes)
  params = random_params(model, BATCH)
  assert ('position_embedding' in params) == (changes['position_embedding'] == 'learned')
  assert ('head' in params) != changes['tie_embeddings']
  names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params)}
  assert ('bias' in names) == changes['bias']
  np.testing.assert_array_equal(influence(model, params, BATCH) > 0,
                                np.tri(LENGTH, dtype=bool))


def test_equals_numpy(make, random_params):
  """Every operation of one layer, written out in NumPy."""
  model = make(num_layers=1)
  params = random_params(model, BATCH)
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

  def norm(x, w):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * w['scale'] + w['bias']

  def dense(x, w):
    return x @ w['kernel'] + w['bias']

  x = p['embedding'][BATCH.tokens[0]] + p['position_embedding'][:LENGTH]
  w, heads, size = p['block_0'], 2, 8
  q, k, v = np.split(dense(norm(x, w['norm_1']), w['qkv']), 3, axis=-1)
  out = np.zeros_like(x)
  for n in range(heads):
    own = slice(n * size, (n + 1) * size)
    scores = np.where(np.tri(LENGTH) > 0, q[:, own] @ k[:, own].T / size**0.5, -np.inf)
    weights = np.exp(scores)
    out[:, own] = weights / weights.sum(-1, keepdims=True) @ v[:, own]
  x = x + dense(out, w['out'])
  up = dense(norm(x, w['norm_2']), w['up'])
  gelu = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
  x = x + dense(gelu, w['down'])
  expected = norm(x, p['norm']) @ p['embedding'].T
  assert_close(logits(model, params, BATCH)[0], expected)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(model, params, batch):
  def loss(params):
    hidden = model.apply({'params': params}, batch.tokens, batch.positions, batch.mask).hidden
    return jnp.sum(jnp.sin(model.apply({'params': params}, hidden, method='head')))
  return jax.value_and_grad(loss)(params)


@pytest.fixture(scope='module')
def plain(make, random_params):
  """A loop over layers: its parameters, loss and gradient."""
  model = make(position_embedding='rotary')
  params = random_params(model, BATCH)
  return params, *loss_and_gradient(model, params, BATCH)


@pytest.mark.integration
@pytest.mark.parametrize('scan,remat', [(True, 'none'), (False, 'dots'), (False, 'full'),
                                        (True, 'dots'), (True, 'full')])
def test_scan_and_remat_change_nothing(make, plain, scan, remat):
  """Scanned and recomputed layers have the loop's loss and gradient."""
  params, loss, grads = plain
  if scan:
    params, grads = (transformer.stack_layers(tree, 2) for tree in (params, grads))
  model = make(position_embedding='rotary', scan=scan, remat=remat)
  found, found_grads = loss_and_gradient(model, params, BATCH)
  assert_close(found, loss)
  jax.tree.map(lambda a, b: assert_close(a, b, tol=1e-4),  # through all layers
               found_grads, grads)


@pytest.mark.parametrize('changes', [
    {}, {'position_embedding': 'rotary', 'tie_embeddings': False, 'bias': False}])
def test_stacked_parameters(make, changes):
  """`stack_layers` gives the tree that a scanned model makes for itself."""
  def shapes(model):
    return jax.eval_shape(model.init, jax.random.key(0), BATCH.tokens, BATCH.positions,
                          BATCH.mask)['params']
  stacked = jax.eval_shape(lambda p: transformer.stack_layers(p, 2), shapes(make(**changes)))
  assert stacked == shapes(make(scan=True, **changes))


@pytest.mark.integration
def test_bfloat16(make, random_params):
  """Computes in bfloat16; parameters, gradients and logits stay float32."""
  model = make(dtype='bfloat16', scan=True)
  params = random_params(model, BATCH)
  loss, grads = jax.eval_shape(loss_and_gradient, model, params, BATCH)
  assert {a.dtype for a in jax.tree.leaves((params, loss, grads))} == {jnp.dtype('float32')}
  out = jax.eval_shape(lambda: model.apply(
      {'params': params}, BATCH.tokens, BATCH.positions, BATCH.mask))
  assert {a.dtype for a in jax.tree.leaves(out)} == {jnp.dtype('bfloat16')}
  found = logits(model, params, BATCH)
  assert found.dtype == jnp.float32
  exact = logits(make(scan=True), params, BATCH)
  assert 0 < np.abs(found - exact).max() < 0.3  # of logits around 3


def test_padded_is_unpadded(make, random_params):
  """A shorter sequence in a longer row has the logits it has alone."""
  model = make(scan=True)
  params = random_params(model, BATCH)
  short = [TEXT[0][:4], TEXT[1]]
  found = logits(model, params, plain_rows(short))
  alone = logits(model, params, plain_rows([TEXT[0][:4]] * 2, 4))
  assert_close(found[0, :4], alone[0])


@pytest.mark.integration
def test_dropout(make, random_params):
  """Only where not deterministic, and then of its key alone."""
  model = make(dropout=0.5, scan=True)
  params = random_params(model, BATCH)

  @functools.partial(jax.jit, static_argnums=0)
  def run(deterministic, seed):
    hidden = model.apply({'params': params}, BATCH.tokens, BATCH.positions, BATCH.mask,
                         deterministic=deterministic,
                         rngs={'dropout': jax.random.key(seed)}).hidden
    return model.apply({'params': params}, hidden, method='head')

  calm = run(True, 0)
  np.testing.assert_array_equal(calm, run(True, 1))
  assert_close(calm, logits(make(scan=True), params, BATCH))
  drawn = run(False, 0)
  np.testing.assert_array_equal(drawn, run(False, 0))
  assert not np.allclose(drawn, calm) and not np.allclose(drawn, run(False, 1))


@pytest.mark.parametrize('scan', [False, True])
def test_everything_drops_out(make, random_params, scan):
  """At rate 1, embeddings and both branches of each layer are gone."""
  model = make(dropout=1.0, scan=scan)
  params = random_params(model, BATCH)
  hidden = jax.jit(lambda: model.apply(
      {'params': params}, BATCH.tokens, BATCH.positions, BATCH.mask, deterministic=False,
      rngs={'dropout': jax.random.key(0)}))().hidden
  bias = np.asarray(params['norm']['bias'])  # the norm of nothing
  assert_close(hidden, np.broadcast_to(bias, hidden.shape))


@pytest.mark.integration
def test_scanned_layers_drop_differently(make, random_params):
  """Two layers that each add a 1, half of them dropped, leave 0, 2 and 4: not 0 and 4."""
  model = make(dropout=0.5, scan=True)
  params = jax.tree.map(jnp.zeros_like, random_params(model, BATCH))
  params['blocks']['down']['bias'] += 1
  params['norm']['scale'] += 1
  hidden = jax.jit(lambda: model.apply(
      {'params': params}, BATCH.tokens, BATCH.positions, BATCH.mask, deterministic=False,
      rngs={'dropout': jax.random.key(0)}))().hidden
  levels = [len(np.unique(np.round(x, 3))) for x in np.asarray(hidden).reshape(-1, 16)]
  assert max(levels) == 3


@pytest.mark.parametrize('positions', ['rotary', 'learned'])
def test_positions(make, random_params, positions):
  """Rotary positions tell distances only; learned ones tell places. Both tell order."""
  model = make(position_embedding=positions, scan=True)
  params = random_params(model, BATCH)
  here = logits(model, params, BATCH)
  later = logits(model, params, BATCH.replace(positions=BATCH.positions + 7))
  assert np.allclose(here, later, atol=1e-4) == (positions == 'rotary')
  stretched = logits(model, params, BATCH.replace(positions=2 * BATCH.positions))
  assert not np.allclose(here, stretched, atol=1e-2)


def test_rotate():
  """A rotation of each pair (i, i + H/2) by position · 10000^(-2i/H)."""
  x = np.random.default_rng(0).normal(size=(1, 3, 2, 8)).astype(np.float32)
  positions = np.array([[0, 1, 5]])
  found = np.asarray(jax.jit(lambda x: layers.rotary(x, positions, ROPE))(x))
  for t, i in np.ndindex(3, 4):
    turn = np.exp(1j * positions[0, t] * 10_000**(-2 * i / 8))
    expected = (x[0, t, :, i] + 1j * x[0, t, :, i + 4]) * turn
    assert_close(found[0, t, :, i], expected.real)
    assert_close(found[0, t, :, i + 4], expected.imag)


def test_keys_and_values_of_all_layers(make):
  """What a cache is made of, of both forms of the model."""
  def kept(model):
    params = jax.eval_shape(model.init, jax.random.key(0), BATCH.tokens, BATCH.positions,
                            BATCH.mask)
    return jax.eval_shape(lambda p: model.apply(
        p, BATCH.tokens, BATCH.positions, BATCH.mask).layers, params)
  out = kept(make())
  assert [a.shape for a in (*out.keys, *out.values, *out.queries)] == [(2, LENGTH, 2, 8)] * 6
  assert [a.shape for a in out.hidden] == [(2, LENGTH, 16)] * 2
  out = kept(make(scan=True))
  assert out.keys.shape == out.values.shape == (2, 2, LENGTH, 2, 8)
  assert out.hidden.shape == (2, 2, LENGTH, 16) and out.banks is out.reads is None


@pytest.mark.integration
def test_init(make):
  """Kernels start at 1 / sqrt(fan-in), branch outputs smaller with depth."""
  params = jax.jit(make(scan=True, tie_embeddings=False).init)(
      jax.random.key(0), BATCH.tokens, BATCH.positions, BATCH.mask)['params']
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    names = [k.key for k in path]
    if names[-1] == 'scale':
      assert (leaf == 1).all()
    elif names[-1] == 'bias':
      assert not leaf.any()
    elif names[-1] == 'kernel':
      std = leaf.shape[-2]**-0.5 / (2 if names[-2] in ('out', 'down') else 1)
      assert np.std(leaf) == pytest.approx(std, rel=0.1), names
      assert not np.allclose(leaf[0], leaf[1])  # layers do not start alike
