"""The implicit memory: fast = token by token, causal, bounded, isolated."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_reasoning import decode, layout, pipeline
from latent_reasoning.models import memory
from latent_reasoning.models.gpt import GPT, stack_layers
from latent_reasoning.models.memory import POLICIES, Bank, Writes

pytestmark = pytest.mark.usefixtures('quick_compilation')

CAUSAL = [name for name, policy in POLICIES.items() if policy.causal]


def draw(seed, batch, length, slots, rank, valid=0.8, start=0.1):
  """Random writes and queries, with padding and segments."""
  rng = np.random.default_rng(seed)
  shares = rng.dirichlet(np.ones(slots), (batch, length))
  gate = 1 / (1 + np.exp(-3 * rng.normal(size=(batch, length))))
  x = Writes(rng.normal(size=(batch, length, rank)).astype(np.float32),
             shares.astype(np.float32), gate.astype(np.float32),
             rng.random((batch, length)) < valid, rng.random((batch, length)) < start)
  return x, rng.normal(size=(batch, length, rank)).astype(np.float32), rng


def begin(rng, batch, slots, rank):
  """A bank that already remembers something."""
  return Bank(rng.normal(size=(batch, slots, rank)).astype(np.float32) * (
      np.arange(slots)[:, None] < 3), np.full(batch, 3, np.int32))


@functools.partial(jax.jit, static_argnames=('name', 'run', 'size'))
def everything(name, run, size, x, q, until, weight):
  """Gradients, and reads, forks, the last bank and what was attended to."""
  policy = POLICIES[name]
  bank = memory.empty(q.shape[:1], x.w.shape[-1], q.shape[-1])

  def total(s, w, beta, q):
    own = x.replace(s=s, w=w, beta=beta)
    r, forks, a = run(policy, bank, own, q, until, size=size, watch=True)
    last = run(policy, bank, own, q, size=size)[1]
    return jnp.sum(r * weight) + jnp.sum(jnp.sin(forks.slots)), (r, forks, last, a)

  return jax.grad(total, (0, 1, 2, 3), has_aux=True)(x.s, x.w, x.beta, q)


def check_equal(name, seed, length, slots, rank, size, start):
  x, q, rng = draw(seed, 2, length, slots, rank, start=start)
  args = (x, q, rng.integers(1, length + 1, (2, 3)), rng.normal(size=q.shape))
  slow_g, slow = everything(name, memory.naive, 0, *args)
  fast_g, fast = everything(name, memory.chunked, size, *args)
  for one, other in zip(jax.tree.leaves(slow), jax.tree.leaves(fast), strict=True):
    np.testing.assert_allclose(other, one, atol=1e-5)
  for one, other in zip(slow_g, fast_g, strict=True):
    # Where a gate saturates its gradient is large: relative to that.
    np.testing.assert_allclose(other, one, atol=1e-5 * max(1, np.abs(one).max()))


# length, slots, rank, chunk: compiling is what takes time, so few shapes and many draws.
SHAPES = [(1, 1, 2, 4), (23, 4, 3, 5)]


@pytest.mark.parametrize('name', CAUSAL)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**16), shape=st.sampled_from(SHAPES),
       start=st.sampled_from([0.0, 0.15]))
def test_chunked_equals_naive(name, seed, shape, start):
  """Values and gradients, over padding and segments drawn at random."""
  check_equal(name, seed, *shape, start)


@pytest.mark.slow
@pytest.mark.parametrize('name', CAUSAL)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), length=st.integers(1, 40), slots=st.integers(1, 6),
       rank=st.integers(1, 5), size=st.integers(1, 16), start=st.sampled_from([0.0, 0.15]))
def test_chunked_equals_naive_for_any_shape(name, seed, length, slots, rank, size, start):
  """The same over any length, number of slots, rank and chunk."""
  check_equal(name, seed, length, slots, rank, size, start)


@pytest.mark.parametrize('name', CAUSAL)
def test_goes_on_from_a_bank(name):
  """Two halves, the second from the bank of the first, are the whole."""
  policy = POLICIES[name]
  x, q, _ = draw(1, 2, 21, 4, 3)
  run = jax.jit(memory.chunked, static_argnums=(0,), static_argnames=('size',))
  whole, last, _ = run(policy, memory.empty((2,), 4, 3), x, q, size=4)
  first = jax.tree.map(lambda a: a[:, :10], (x, q))
  second = jax.tree.map(lambda a: a[:, 10:], (x, q))
  r1, bank, _ = run(policy, memory.empty((2,), 4, 3), *first, size=8)
  r2, bank, _ = run(policy, bank, *second, size=3)
  np.testing.assert_allclose(np.concatenate([r1, r2], 1), whole, atol=1e-5)
  np.testing.assert_allclose(bank.slots, last.slots, atol=1e-5)


@pytest.mark.parametrize('name', CAUSAL)
def test_causal_and_isolated(name):
  """No read depends on a later token, on another segment or on another sequence."""
  policy = POLICIES[name]
  x, q, _ = draw(2, 2, 12, 3, 4, valid=1.0, start=0.0)
  x = x.replace(start=x.start | (np.arange(12) == 7))
  bank = memory.empty((2,), 3, 4)
  reads = jax.jit(jax.jacrev(
      lambda s: memory.chunked(policy, bank, x.replace(s=s), q, size=5)[0]))(x.s)
  reach = np.abs(reads).max((2, 5))  # [B, T, B, T]
  for b in range(2):
    assert not reach[b, :, 1 - b].any()
    for t in range(12):
      assert not reach[b, t, b, t + 1:].any()
      assert not reach[b, t, b, :7].any() or t < 7
  assert reach[0, 11, 0, 9].any() and reach[1, 6, 1, 5].any()  # it does read


def test_sequence_mean_leaks():
  """The published reference: every read depends on every token, and it says so."""
  x, q, _ = draw(3, 1, 6, 3, 4, valid=1.0, start=0.0)
  bank = memory.empty((1,), 3, 4)
  reads = jax.jacrev(lambda s: memory.whole_mean(bank, x.replace(s=s), q)[0])(x.s)
  assert (np.abs(reads).max((0, 2, 3, 5)) > 0).all()
  assert not POLICIES['sequence_mean'].causal


def test_ring_is_what_it_says():
  """Slot (n - 1) mod N holds write n, the last N writes are there and no others."""
  x, q, _ = draw(4, 1, 7, 3, 2, valid=1.0, start=0.0)
  _, bank, _ = memory.chunked(POLICIES['ring'], memory.empty((1,), 3, 2), x, q, size=4)
  np.testing.assert_array_equal(bank.slots[0], [x.s[0, 6], x.s[0, 4], x.s[0, 5]])


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**16), scale=st.floats(0.01, 100))
def test_gated_slots_are_bounded(seed, scale):
  """Each slot is a convex combination of writes and zero: no norm above the largest write's."""
  x, q, _ = draw(seed, 2, 24, 3, 4)
  x = x.replace(s=x.s * np.float32(scale))
  until = np.tile(np.arange(1, 25), (2, 1))
  _, banks, _ = jax.jit(lambda x, q: memory.chunked(
      POLICIES['gated'], memory.empty((2,), 3, 4), x, q, until))(x, q)
  largest = np.maximum.accumulate(np.linalg.norm(x.s, axis=-1), axis=1)  # [B, T]
  norms = np.linalg.norm(banks.slots, axis=-1).max(-1)
  assert (norms <= largest * (1 + 1e-5)).all()


def test_saturated_gates_stay_finite():
  """Where every gate is fully open, a chunk of 16 neither overflows nor loses the oracle."""
  x, q, _ = draw(5, 1, 64, 1, 4, valid=1.0, start=0.0)
  x = x.replace(w=np.ones_like(x.w), beta=np.ones_like(x.beta))
  def total(s, run):
    return jnp.sum(run(POLICIES['gated'], memory.empty((1,), 1, 4), x.replace(s=s), q)[0]**2)
  fast, slow = (jax.jit(jax.grad(total), static_argnums=1)(x.s, run)
                for run in (memory.chunked, memory.naive))
  assert np.isfinite(fast).all()
  np.testing.assert_allclose(fast, slow, atol=1e-4)


@pytest.fixture(scope='module')
def rim_batch(tiny_config):
  """Two RiM rows of different length in a batch, and their prompts."""
  ids = layout.Symbols(0, 1, 2, 3, 4, 5, (), (6,), (6, 7))
  rim = tiny_config().rim
  found = [layout.Encoded([8, 9, 10, 11][:n], [[12, 13], [14]], [9]) for n in (2, 4)]
  rows = [layout.rim(e, 1, 0.0, rim, ids) for e in found]
  prompts = [layout.rim_prompt(e.question, 2, rim, ids) for e in found]
  return pipeline.collate(rows, *pipeline.sizes(rows)), prompts


VARIANTS = {
    'prefix_mean': {'imm.write': 'prefix_mean'},
    'low rank': {'imm.write': 'gated', 'imm.rank': 3},
    'shared, twice, one layer': {'imm.write': 'delta', 'imm.rank': 3, 'imm.shared': True,
                                 'imm.rounds': 2},
    'some layers, seldom': {'imm.write': 'ring', 'imm.layers': (1,), 'imm.every': 2,
                            'imm.place': 'before', 'imm.off': ('norm',)}}


@pytest.mark.parametrize('variant', VARIANTS)
def test_gpt_with_memory(tiny_config, rim_batch, random_params, variant):
  """In a model: naive = chunked over a RiM row, and cached decoding = a plain sequence."""
  batch, prompts = rim_batch
  config = tiny_config(**VARIANTS[variant])
  model = GPT(config.model, 16, imm=config.imm)
  params = random_params(model, batch)
  slow = model.clone(imm=dataclasses.replace(config.imm, implementation='naive'))
  apply = jax.jit(lambda m, p, b: m.apply({'params': p}, b.tokens, b.positions, b.mask)[0],
                  static_argnums=0)
  np.testing.assert_allclose(apply(model, params, batch), apply(slow, params, batch),
                             atol=1e-5)
  prompt = pipeline.collate(prompts, pipeline.sizes(prompts)[0], 2, 1)
  head, said = decode.head_kernel(model, params), []
  logits, cache = jax.jit(decode.prefill, static_argnums=(0, 4))(model, params, head, prompt, 3)
  heard = [logits]
  for step in range(3):
    said.append(np.asarray(logits.argmax(-1), np.int32))
    logits, cache = jax.jit(decode.decode_step, static_argnums=0)(
        model, params, head, prompt, cache, said[-1], step)
    heard.append(logits)
  plain, places = [], []
  for b, row in enumerate(prompts):
    for k, out in enumerate(row.readouts):
      plain.append(layout.plain([*row.prefix[:out.until], *(int(t[b, k]) for t in said)], ()))
      places.append((b, k, out.until))
  alone = pipeline.collate(plain, max(len(row.prefix) for row in plain), 0, 0)
  logits = model.apply({'params': params}, apply(model, params, alone), method='head')
  for i, (b, k, until) in enumerate(places):
    for step in range(4):
      np.testing.assert_allclose(logits[i, until - 1 + step], heard[step][b, k], atol=1e-4)


def test_scanned_layers(tiny_config, rim_batch, random_params):
  """Scanned and rematerialised layers with a bank each are the unrolled ones."""
  batch, _ = rim_batch
  config = tiny_config(**{'imm.write': 'gated', 'imm.rank': 3})
  model = GPT(config.model, 16, imm=config.imm)
  params = random_params(model, batch)
  scanned = model.clone(config=dataclasses.replace(config.model, scan=True, remat=True))
  one, two = (
      jax.jit(lambda p, m=m: m.apply({'params': p}, batch.tokens, batch.positions,
                                     batch.mask)[0])(p)
      for m, p in ((model, params), (scanned, stack_layers(params, 2))))
  np.testing.assert_allclose(one, two, atol=1e-5)


def test_low_rank_is_exact(tiny_config):
  """The R-wide bank reads what the D-wide bank of W_up s would, queried by q itself."""
  config = tiny_config(**{'imm.write': 'gated', 'imm.rank': 3, 'imm.off': ('norm',)})
  layer = memory.Memory(config.imm, 8, jnp.float32, False)
  h = np.random.default_rng(0).normal(size=(1, 9, 8)).astype(np.float32)
  batch = pipeline.collate([layout.plain(range(9), ())], 9, 0, 0)
  params = layer.init(jax.random.key(0), h, batch.positions, batch.mask, None, False)['params']
  found, _, _ = layer.apply({'params': params}, h, batch.positions, batch.mask, None, False)
  k = {name: np.asarray(p['kernel']) for name, p in params.items()}
  x = layer.apply({'params': params}, h, batch.positions, method='writes')
  wide = x.replace(s=x.s @ k['write_up'])
  q = h @ k['query'] @ k['query_up'] * 8**-0.5
  r, _, _ = memory.naive(POLICIES['gated'], memory.empty((1,), x.w.shape[-1], 8), wide, q)
  np.testing.assert_allclose(found, h + r @ k['out'] @ k['out_up'], atol=1e-5)


@pytest.mark.parametrize('off', ['write', 'read'])
def test_switched_off(tiny_config, rim_batch, random_params, off):
  """Without writes, or without reads, nothing but the norm is left of the memory."""
  batch, _ = rim_batch
  config = tiny_config(**{'imm.write': 'gated', 'imm.off': (off, 'norm')})
  model = GPT(config.model, 16, imm=config.imm)
  params = random_params(model, batch)
  bare = {k: {n: v for n, v in p.items() if n != 'memory'} if k.startswith('block_') else p
          for k, p in params.items()}
  found, _ = model.apply({'params': params}, batch.tokens, batch.positions, batch.mask)
  plain, _ = model.clone(imm=None).apply({'params': bare}, batch.tokens, batch.positions,
                                         batch.mask)
  np.testing.assert_allclose(found, plain, atol=1e-6)


def test_banks_between_segments(tiny_config, random_params):
  """A model that is given the banks of a first part remembers it: memory = in one row."""
  config = tiny_config(**{'imm.write': 'gated'})
  model = GPT(config.model, 16, imm=config.imm)
  row = pipeline.collate([layout.plain(range(3, 9), ())], 6, 0, 0)
  params = random_params(model, row)
  mask = row.mask.replace(until=np.full((1, 1), 6, np.int32))
  @jax.jit
  def apply(mask, banks=None):
    return model.apply({'params': params}, row.tokens, row.positions, mask, banks=banks)
  without, (_, _, banks) = apply(mask)
  with_memory, _ = apply(mask, jax.tree.map(lambda a: a[:, 0], banks))
  assert np.abs(with_memory - without).max() > 1e-3


def test_watched(tiny_config, random_params):
  """Entropy, slot use and gate of a fresh and of a collapsed memory, and its warnings."""
  config = tiny_config(**{'imm.write': 'gated', 'imm.slots': 4})
  model = GPT(config.model, 16, imm=config.imm)
  batch = pipeline.collate([layout.plain(range(3, 9), ())] * 2, 6, 0, 0)
  params = random_params(model, batch)
  found = {k: float(v) for k, v in memory.watched(model, params, batch).items()}
  assert 0 < found['read_entropy'] <= 1 and 0.25 <= found['top_slot'] <= 1
  assert 0 < found['write_gate'] < 1
  assert memory.watched(model.clone(imm=None), params, batch) == {}
  blind = model.clone(imm=dataclasses.replace(config.imm, off=('query',)))
  uniform = {k: float(v) for k, v in memory.watched(blind, params, batch).items()}
  np.testing.assert_allclose([uniform['read_entropy'], uniform['top_slot']], [1, 0.25],
                             rtol=1e-5)
  assert 'reads all slots alike' in memory.warnings(uniform, 4)[0]
  assert memory.warnings({**found, 'memory_grad_norm': 0.0}, 4)
  assert memory.warnings({'read_entropy': 0.5, 'top_slot': 0.6}, 4) == []
