"""The recurrences of the memory: fast = token by token, causal, bounded, isolated."""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

from latent_reasoning.config import NOT_CAUSAL, ImmConfig
from latent_reasoning.errors import InputError
from latent_reasoning.models import memory_policies
from latent_reasoning.models.memory_policies import POLICIES, MemoryBank, MemoryWrites

pytestmark = pytest.mark.usefixtures('quick_compilation')

CAUSAL = [name for name in POLICIES if name not in NOT_CAUSAL]


def draw(seed, batch, length, slots, rank, valid=0.8, start=0.1):
  """Random writes and queries, with padding and segments."""
  rng = np.random.default_rng(seed)
  shares = rng.dirichlet(np.ones(slots), (batch, length))
  gate = 1 / (1 + np.exp(-3 * rng.normal(size=(batch, length))))
  x = MemoryWrites(rng.normal(size=(batch, length, rank)).astype(np.float32),
                   shares.astype(np.float32), gate.astype(np.float32),
                   rng.random((batch, length)) < valid, rng.random((batch, length)) < start)
  return x, rng.normal(size=(batch, length, rank)).astype(np.float32), rng


def begin(rng, batch, slots, rank):
  """A bank that already remembers something."""
  return MemoryBank(rng.normal(size=(batch, slots, rank)).astype(np.float32) * (
      np.arange(slots)[:, None] < 3), np.full(batch, 3, np.int32))


@functools.partial(jax.jit, static_argnames=('name', 'run', 'size'))
def everything(name, run, size, x, q, until, weight):
  """Gradients, and reads, forks, the last bank and what was attended to."""
  policy = POLICIES[name]
  bank = memory_policies.empty(q.shape[:1], x.w.shape[-1], q.shape[-1])

  def total(s, w, beta, q):
    own = x.replace(s=s, w=w, beta=beta)
    r, forks, a = run(policy, bank, own, q, until, size=size, watch=True)
    last = run(policy, bank, own, q, size=size)[1]
    return jnp.sum(r * weight) + jnp.sum(jnp.sin(forks.slots)), (r, forks, last, a)

  return jax.grad(total, (0, 1, 2, 3), has_aux=True)(x.s, x.w, x.beta, q)


def check_equal(name, seed, length, slots, rank, size, start):
  x, q, rng = draw(seed, 2, length, slots, rank, start=start)
  args = (x, q, rng.integers(1, length + 1, (2, 3)), rng.normal(size=q.shape))
  slow_g, slow = everything(name, memory_policies.recurrent, 0, *args)
  fast_g, fast = everything(name, memory_policies.chunkwise, size, *args)
  for one, other in zip(jax.tree.leaves(slow), jax.tree.leaves(fast), strict=True):
    assert_close(other, one)
  # One loss has them all, and parts of a gradient cancel: relative to the largest of them.
  one, other = (ravel_pytree(g)[0] for g in (slow_g, fast_g))
  assert_close(other, one)


# length, slots, rank, chunk: compiling is what takes time, so few shapes and many draws.
SHAPES = [(1, 1, 2, 4), (23, 4, 3, 5)]


@pytest.mark.integration
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


@pytest.mark.integration
@pytest.mark.parametrize('name', CAUSAL)
def test_goes_on_from_a_bank(name):
  """Two halves, the second from the bank of the first, are the whole."""
  policy = POLICIES[name]
  x, q, _ = draw(1, 2, 21, 4, 3)
  run = jax.jit(memory_policies.chunkwise, static_argnums=(0,), static_argnames=('size',))
  whole, last, _ = run(policy, memory_policies.empty((2,), 4, 3), x, q, size=4)
  first = jax.tree.map(lambda a: a[:, :10], (x, q))
  second = jax.tree.map(lambda a: a[:, 10:], (x, q))
  r1, bank, _ = run(policy, memory_policies.empty((2,), 4, 3), *first, size=8)
  r2, bank, _ = run(policy, bank, *second, size=3)
  assert_close(np.concatenate([r1, r2], 1), whole)
  assert_close(bank.slots, last.slots)


@pytest.mark.parametrize('name', CAUSAL)
def test_causal_and_isolated(name):
  """No read depends on a later token, on another segment or on another sequence."""
  policy = POLICIES[name]
  x, q, _ = draw(2, 2, 12, 3, 4, valid=1.0, start=0.0)
  x = x.replace(start=x.start | (np.arange(12) == 7))
  bank = memory_policies.empty((2,), 3, 4)
  reads = jax.jit(jax.jacrev(
      lambda s: memory_policies.chunkwise(policy, bank, x.replace(s=s), q, size=5)[0]))(x.s)
  reach = np.abs(reads).max((2, 5))  # [B, T, B, T]
  for b in range(2):
    assert not reach[b, :, 1 - b].any()
    for t in range(12):
      assert not reach[b, t, b, t + 1:].any()
      assert not reach[b, t, b, :7].any() or t < 7
  assert reach[0, 11, 0, 9].any() and reach[1, 6, 1, 5].any()  # it does read


@pytest.mark.integration
def test_sequence_mean_leaks():
  """The published reference: every read depends on every token, and it says so."""
  x, q, _ = draw(3, 1, 6, 3, 4, valid=1.0, start=0.0)
  bank = memory_policies.empty((1,), 3, 4)
  reads = jax.jacrev(lambda s: memory_policies.whole_mean(bank, x.replace(s=s), q)[0])(x.s)
  assert (np.abs(reads).max((0, 2, 3, 5)) > 0).all()
  assert 'sequence_mean' in NOT_CAUSAL


def test_config_names_the_policies():
  """config.imm.write_policy is one of the table's, or none."""
  choices = typing.get_args(typing.get_type_hints(ImmConfig)['write_policy'])
  assert set(choices) == {'', *POLICIES} and set(NOT_CAUSAL) < set(POLICIES)


def test_chunks_that_overflow_are_refused():
  check = memory_policies.check
  check(ImmConfig(write_policy='gated', chunk=16))
  check(ImmConfig(write_policy='gated', chunk=32, implementation='recurrent'))
  check(ImmConfig(write_policy='delta', chunk=32))
  check(ImmConfig(chunk=32))
  with pytest.raises(InputError, match='chunk is 17; expected at most 16 for gated'):
    check(ImmConfig(write_policy='gated', chunk=17))


def test_a_policy_without_chunks():
  """One that says what a token writes and no more goes one token after another."""
  x, q, _ = draw(4, 1, 7, 3, 2, valid=1.0, start=0.0)
  bank = memory_policies.empty((1,), 3, 2)
  plain = memory_policies.Policy(POLICIES['ring'].write)
  one, two = (run(plain, bank, x, q) for run in (memory_policies.chunkwise,
                                                 memory_policies.recurrent))
  np.testing.assert_array_equal(one[0], two[0])


def test_ring_is_what_it_says():
  """Slot (n - 1) mod N holds write n, the last N writes are there and no others."""
  x, q, _ = draw(4, 1, 7, 3, 2, valid=1.0, start=0.0)
  _, bank, _ = memory_policies.chunkwise(
      POLICIES['ring'], memory_policies.empty((1,), 3, 2), x, q, size=4)
  np.testing.assert_array_equal(bank.slots[0], [x.s[0, 6], x.s[0, 4], x.s[0, 5]])


@pytest.mark.integration
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**16), scale=st.floats(0.01, 100))
def test_gated_slots_are_bounded(seed, scale):
  """Each slot is a convex combination of writes and zero: no norm above the largest write's."""
  x, q, _ = draw(seed, 2, 24, 3, 4)
  x = x.replace(s=x.s * np.float32(scale))
  until = np.tile(np.arange(1, 25), (2, 1))
  _, banks, _ = jax.jit(lambda x, q: memory_policies.chunkwise(
      POLICIES['gated'], memory_policies.empty((2,), 3, 4), x, q, until))(x, q)
  largest = np.maximum.accumulate(np.linalg.norm(x.s, axis=-1), axis=1)  # [B, T]
  norms = np.linalg.norm(banks.slots, axis=-1).max(-1)
  assert (norms <= largest * (1 + 1e-5)).all()


@pytest.mark.integration
@pytest.mark.parametrize('name', CAUSAL)
def test_saturated_gates_stay_finite(name):
  """Where every gate is fully open, the longest chunk that is allowed neither overflows nor
  loses the reference implementation."""
  policy = POLICIES[name]
  x, q, _ = draw(5, 1, 64, 1, 4, valid=1.0, start=0.0)
  x = x.replace(w=np.ones_like(x.w), beta=np.ones_like(x.beta))
  def total(s, run):
    bank = memory_policies.empty((1,), 1, 4)
    return jnp.sum(run(policy, bank, x.replace(s=s), q,
                       size=policy.longest_chunk or 64)[0]**2)
  fast, slow = (jax.jit(jax.grad(total), static_argnums=1)(x.s, run)
                for run in (memory_policies.chunkwise, memory_policies.recurrent))
  assert np.isfinite(fast).all()
  assert_close(fast, slow)
