"""Hashes of arrays tell every change."""

import flax.struct
import jax.numpy as jnp
import numpy as np
import pytest

from latent_reasoning.train import hashes


def test_hash_tells_equal_from_unequal():
  """One changed value, type or shape changes the description."""
  @flax.struct.dataclass
  class Tree:
    a: np.ndarray

  base = hashes.describe(Tree(np.zeros((2, 3), np.float32)))
  assert base == hashes.describe(Tree(np.zeros((2, 3), np.float32)))
  for other in (np.zeros((3, 2), np.float32), np.zeros((2, 3), np.int32),
                np.full((2, 3), 1e-45, np.float32), -np.zeros((2, 3), np.float32)):
    assert base != hashes.describe(Tree(other))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8, jnp.bool_])
def test_fingerprint(dtype):
  """One bit, one place, one swap: another fingerprint."""
  a = np.random.default_rng(0).integers(0, 2, (7, 5)).astype(dtype)
  print_of = {tuple(np.asarray(hashes.fingerprint(jnp.asarray(x))).tolist()) for x in (
      a, a.T, a[::-1], np.roll(a, 1), np.zeros_like(a))}
  assert len(print_of) == 5
  b = a.copy().view(np.uint8).ravel()
  for place in range(0, b.size, 9):
    changed = b.copy()
    changed[place] ^= 1
    other = changed.view(a.dtype).reshape(a.shape)
    print_of.add(tuple(np.asarray(hashes.fingerprint(jnp.asarray(other))).tolist()))
  assert len(print_of) == 5 + len(range(0, b.size, 9))
