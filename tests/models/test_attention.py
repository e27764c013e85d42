"""Split and cached attention beside their oracle, one dense mask."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close

from latent_reasoning import batching, methods, sequences
from latent_reasoning.errors import InputError
from latent_reasoning.models import attention, masks
from latent_reasoning.models.transformer import LayerOutput
from latent_reasoning.train import packing

pytestmark = pytest.mark.usefixtures('quick_compilation')

IDS = sequences.SpecialTokens(90, 91, 92, 93, 94, 95, (96, 97, 98), (10,), (35,))
SHAPE = (20, 3, 6)  # P, K, R that hold every method but chain of thought
N, H = 2, 4

VARIANTS = {
    'rim': {}, 'rim, stage 2': {'stage': 2},
    'rim, offset 0': {'rim.readout_offset': 0},
    'rim, bidirectional': {'rim.block_attention': 'bidirectional'},
    'rim, blind': {'rim.readout_sees_question': False},
    'rim, bidirectional, blind': {'rim.block_attention': 'bidirectional',
                                  'rim.readout_sees_question': False},
    'direct': {'method': 'direct'}, 'direct_steps': {'method': 'direct_steps'},
    'pause': {'method': 'pause'}, 'cot': {'method': 'cot', 'shape': (20, 1, 24)},
    'packed': {'data.packing': True, 'shape': (80, 2, 24, 16)},
    'packed, bidirectional': {'data.packing': True, 'shape': (80, 2, 24, 16),
                              'rim.block_attention': 'bidirectional'}}


def random_batch(config, seed: int, stage: int = 1, shape=SHAPE) -> batching.Batch:
  """Two rows of a method, with questions, steps and answers of random length; with
  config.data.packing several problems in each, and a shape of four sizes."""
  rng = np.random.default_rng(seed)
  def text(low, high):
    return rng.integers(1, 90, rng.integers(low, high + 1)).tolist()
  rows = []
  for _ in range(8 if config.data.packing else 2):
    example = sequences.TokenizedExample(
        text(2, 8), [text(1, 5) for _ in range(rng.integers(0, 4))], text(1, 2))
    rows.append(methods.get(config.method).sequence(example, stage, 0.0, config, IDS))
  if not config.data.packing:
    return batching.collate(rows, *shape)
  shape = packing.Shape(*shape)
  packed = packing.pack(rows, shape)
  assert len(packed[0]) > 2
  packed += [[]] * (2 - len(packed))
  return batching.lay_out(packed, *dataclasses.astuple(shape), shared=True)


def qkv(seed: int, length: int):
  return np.random.default_rng(seed).normal(size=(3, 2, length, N, H)).astype(np.float32)


PLAIN = ('shared_prefix', 'dense')  # those of XLA alone
forward = {name: jax.jit(attention.IMPLEMENTATIONS[name]) for name in PLAIN}
cached = jax.jit(attention.cached)


@functools.partial(jax.jit, static_argnums=0)
def run(name, qkv, mask, direction):
  """Output, and gradients of q, k and v in a random direction of it."""
  def call(qkv):
    return attention.IMPLEMENTATIONS[name](*qkv, mask)
  out, vjp = jax.vjp(call, qkv)
  return out, vjp(direction)[0]


@pytest.fixture(scope='module')
def make(tiny_config):
  """Returns the batch of a variant and a seed."""
  def build(variant, seed=0):
    changes = dict(VARIANTS[variant])
    extra = {k: changes.pop(k) for k in ('stage', 'shape') if k in changes}
    return random_batch(tiny_config(**changes), seed, **extra)
  return build


@pytest.mark.parametrize('variant', VARIANTS)
def test_shared_prefix_is_dense(make, variant):
  """Forward and gradient agree on random rows, at every position, padding too."""
  for seed in range(5):
    batch = make(variant, seed)
    x = qkv(seed, batch.tokens.shape[1])
    direction = qkv(100 + seed, batch.tokens.shape[1])[0]
    found, expected = (run(name, x, batch.mask, direction) for name in ('shared_prefix',
                                                                        'dense'))
    assert_close(found[0], expected[0])
    assert_close(found[1], expected[1])
    assert np.abs(expected[1]).max(axis=(1, 2, 3, 4)).min() > 1e-2


KERNELS = {
    'cudnn': functools.partial(attention.cudnn, implementation='xla'),
    'splash': functools.partial(attention.splash, interpret=True)}


@pytest.mark.integration
@pytest.mark.parametrize('variant', ['rim', 'rim, bidirectional, blind', 'direct_steps', 'cot',
                                     'packed', 'packed, bidirectional'])
@pytest.mark.parametrize('name', KERNELS)
def test_kernels_are_dense(tiny_config, name, variant):
  """Forward and gradient at all tokens, of the kernel on a CPU or of what is handed to it: rows
  longer than a tile, of odd length, and fewer heads for keys."""
  config = tiny_config(**{k: v for k, v in VARIANTS[variant].items() if k != 'shape'})
  batch = random_batch(config, 0, shape=(139, 2, 50, 16)[:3 + config.data.packing])
  assert batch.causal_prefix == ('bidirectional' not in variant)
  q, k, v = qkv(0, batch.tokens.shape[1])
  real = is_real(batch)[..., None, None]
  direction = qkv(1, q.shape[1])[0] * real

  @functools.partial(jax.jit, static_argnums=0)
  def both(call, *given):
    out, vjp = jax.vjp(lambda *a: call(*a, batch.mask) * real, *given)
    return out, *vjp(direction)
  given = q, k[:, :, :1], v[:, :, :1]
  for found, expected in zip(both(KERNELS[name], *given), both(attention.dense, *given),
                             strict=True):
    assert_close(found, expected, tol=2e-5)
    assert np.abs(expected).max() > 1e-2


def is_real(batch) -> np.ndarray:
  """bool [B, L], whether a place is a token's."""
  return batch.tokens != 0  # no text of random_batch has a 0


@pytest.mark.integration
@pytest.mark.parametrize('variant', ['rim', 'rim, bidirectional'])
@pytest.mark.parametrize('name', [*PLAIN, *KERNELS])
def test_padding_changes_no_number(tiny_config, name, variant):
  """Forward and gradient of the tokens are those of rows in larger buckets."""
  config = tiny_config(**VARIANTS[variant])
  call = KERNELS.get(name, attention.IMPLEMENTATIONS[name])
  found, rng = [], np.random.default_rng(2)
  for shape in (SHAPE, (150, 4, 9)):
    batch = random_batch(config, 0, shape=shape)
    real = is_real(batch)
    x, direction = np.split(rng.normal(size=(4, *real.shape, N, H)).astype(np.float32), [3])
    if found:  # tokens follow each other in the same order
      x[:, real], direction[:, real] = found[0][:2]
    own = x[:, real], direction[:, real]
    direction = direction[0] * real[..., None, None]
    out, vjp = jax.vjp(lambda a, b=batch: call(*a, b.mask), x)
    found.append((*own, np.asarray(out)[real], np.asarray(vjp(direction)[0])[:, real]))
  for one, other in zip(*(f[2:] for f in found), strict=True):
    assert_close(one, other, tol=2e-5)
    assert np.abs(one).max() > 1e-2


@pytest.mark.parametrize('variant', ['rim', 'rim, bidirectional', 'packed',
                                     'packed, bidirectional'])
def test_a_causal_prefix_has_no_mask(make, tiny_config, variant):
  """Splash attention is handed no array of P x P; of any other prefix, one."""
  changes = {k: v for k, v in VARIANTS[variant].items() if k != 'shape'}
  shape = (130, 2, 24, 16) if 'packed' in variant else (130, 2, 5)
  batch = random_batch(tiny_config(**changes), 0, shape=shape)
  x = qkv(0, batch.tokens.shape[1])
  found = {a.aval.shape for a in arrays(jax.make_jaxpr(
      lambda a: attention.splash(*a, batch.mask))(x).jaxpr)}
  wide = [shape for shape in found if len(shape) > 1 and min(shape[-2:]) > 128]
  assert batch.causal_prefix == (not wide), wide


def arrays(jaxpr):
  """All that a jaxpr computes, and those inside of it but for kernels."""
  for equation in jaxpr.eqns:
    yield from equation.outvars
    if equation.primitive.name != 'pallas_call':
      for inner in jax.tree.leaves(list(equation.params.values()),
                                   is_leaf=lambda x: hasattr(x, 'eqns')):
        inner = getattr(inner, 'jaxpr', inner)
        if hasattr(inner, 'eqns'):
          yield from arrays(inner)


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['rim', 'rim, bidirectional', 'packed'])
def test_splash_compiles_for_a_tpu(make, variant):
  """As far as it goes without one: tiles and layouts that the kernel's compiler accepts."""
  batch = make(variant)
  q, k = (jax.ShapeDtypeStruct((2, batch.tokens.shape[1], n, 64), jnp.bfloat16) for n in (4, 2))

  def both(q, k, v):
    out, vjp = jax.vjp(lambda *a: attention.splash(*a, batch.mask), q, k, v)
    return vjp(out)
  text = jax.jit(both).trace(q, k, k).lower(lowering_platforms=('tpu',)).as_text()
  assert text.count('tpu_custom_call') == 3  # forward, and dq, dk and dv


@pytest.mark.parametrize('name', KERNELS)
def test_kernels_want_their_device(name, monkeypatch):
  """Anywhere else they are refused, by the machine that there is."""
  for backend in ('cpu', 'gpu', 'tpu'):
    monkeypatch.setattr(jax, 'default_backend', lambda backend=backend: backend)
    if backend == attention.KERNELS[name]:
      attention.check(name)
    else:
      with pytest.raises(InputError, match=f"is '{name}', a kernel for .PUs, but .* "
                                           f'{backend.upper()}s'):
        attention.check(name)
    attention.check('shared_prefix')


def test_dense_is_its_definition(make):
  """The reference, position by position in NumPy."""
  batch = make('rim, bidirectional, blind')
  q, k, v = np.asarray(qkv(0, batch.tokens.shape[1]))
  may = np.asarray(masks.allowed(batch.mask))
  expected = np.zeros_like(q)
  for b, i in np.ndindex(q.shape[:2]):
    for n in range(N):
      keys = np.flatnonzero(may[b, i])
      weights = np.exp(k[b, keys, n] @ q[b, i, n] / H**0.5)
      expected[b, i, n] = weights @ v[b, keys, n] / weights.sum()
  assert_close(forward['dense'](q, k, v, batch.mask), expected)


def test_prefix_alone(make):
  """Without readouts, the shared prefix is dense as well."""
  batch = make('rim, bidirectional')
  mask = batch.mask.part(0, batch.prefix).replace(count=0)
  q, k, v = qkv(0, batch.prefix)
  assert_close(forward['shared_prefix'](q, k, v, mask), forward['dense'](q, k, v, mask))


@pytest.mark.parametrize('served', [N, 1])
@pytest.mark.parametrize('variant', ['rim', 'rim, bidirectional, blind', 'direct_steps'])
def test_cached_is_uncached(make, variant, served):
  """Readouts fed token by token to a cache attend as they do in a row."""
  p, count, r = SHAPE
  batch = make(variant, 3)
  q, k, v = qkv(1, batch.tokens.shape[1])
  k, v = k[:, :, :served], v[:, :, :served]
  expected = forward['shared_prefix'](q, k, v, batch.mask)[:, p:].reshape(2, count, r, N, H)
  own = [a[:, p:].reshape(2, count, r, -1, H) for a in (q, k, v)]
  empty = np.zeros((2, count, served, r, H), np.float32)
  cache = attention.Cache(*(a[:, :p].swapaxes(1, 2) for a in (k, v)), empty, empty)
  # The mask of a readout's first query is the mask of all of its queries.
  mask = jax.tree.map(lambda a: a[:, p::r], batch.mask)
  for step in range(r):
    out, new = cached(*(a[:, :, step] for a in own), mask, cache, step)
    cache = cache.add(LayerOutput(None, None, *new), step)
    assert_close(out, expected[:, :, step])
  np.testing.assert_array_equal(cache.own_k.swapaxes(2, 3), own[1])
  np.testing.assert_array_equal(cache.own_v.swapaxes(2, 3), own[2])


def test_several_tokens_at_once(make):
  """A cache that takes a readout's tokens by twos and threes attends as one by one."""
  p, count, r = SHAPE
  batch = make('rim', 3)
  q, k, v = qkv(1, batch.tokens.shape[1])
  expected = forward['shared_prefix'](q, k, v, batch.mask)[:, p:].reshape(2, count, r, N, H)
  empty = np.zeros((2, count, N, r, H), np.float32)
  cache = attention.Cache(*(a[:, :p].swapaxes(1, 2) for a in (k, v)), empty, empty)
  parts = jax.tree.map(lambda a: a[:, p:].reshape(2, count, r, *a.shape[2:]),
                       (q, k, v, batch.mask.replace(until=batch.segment, key_positions=None)))
  for start, stop in ((0, 2), (2, r)):
    own_q, own_k, own_v, mask = jax.tree.map(
        lambda a, s=slice(start, stop): a[:, :, s].reshape(2, -1, *a.shape[3:]), parts)
    mask = mask.replace(until=batch.mask.until)
    out, new = cached(own_q, own_k, own_v, mask, cache, start)
    cache = cache.add(LayerOutput(None, None, *new), start)
    assert_close(out.reshape(2, count, -1, N, H), expected[:, :, start:stop])


def test_softmax_in_float32(make):
  """Of bfloat16 in, bfloat16 comes out, as exact as its inputs allow."""
  batch = make('rim')
  x = qkv(0, batch.tokens.shape[1])
  for name in PLAIN:
    call = forward[name]
    half = call(*x.astype(jnp.bfloat16), batch.mask)
    assert half.dtype == jnp.bfloat16
    assert_close(half.astype(jnp.float32), call(*x, batch.mask), tol=0.05)


def test_masked_logits_have_no_gradient(make):
  """Keys out of sight get a gradient of exactly 0, even with huge logits, never NaN."""
  batch = make('rim')
  x = 100 * qkv(0, batch.tokens.shape[1])
  may = np.asarray(masks.allowed(batch.mask))
  unseen = [np.flatnonzero(~may[b].any(axis=0)) for b in range(2)]
  for name in PLAIN:
    _, grads = run(name, x, batch.mask, np.ones(x.shape[1:], np.float32))
    assert np.isfinite(grads).all()
    for b in range(2):
      assert not np.asarray(grads)[1:, b, unseen[b]].any()
