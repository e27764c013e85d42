"""Hashes of arrays, wherever their parts lie, and of bytes."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def digest(data) -> str:
  return hashlib.blake2b(data, digest_size=16).hexdigest()


@jax.jit
def fingerprint(array: jax.Array) -> jax.Array:
  """Four uint32 of an array's bits: sums, modulo 2^32, of each element mixed with its place.

  A sum is the same whatever its order, hence wherever parts lie. Mixing is one to one in
  an element's bits, so one changed element always shows; more escape with 2^-128.
  """
  bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f'uint{8 * array.dtype.itemsize}')) \
      if array.dtype != jnp.bool_ else array
  bits, place = bits.astype(jnp.uint32), jnp.zeros(array.shape, jnp.uint32)
  for axis, size in enumerate(array.shape):
    place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
  return jnp.stack([jnp.sum(_mix(_mix(place + np.uint32(salt)) ^ bits), dtype=jnp.uint32)
                    for salt in (0x9E3779B9, 0x7F4A7C15, 0xF39CC060, 0x5CEDC834)])


def _mix(x: jax.Array) -> jax.Array:
  """A one to one scrambling of uint32: each bit of x moves half of the result's."""
  for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
    x = (x ^ (x >> shift)) * np.uint32(factor)
  return x ^ (x >> 16)


def describe(tree: Any, hashed: bool = True) -> dict[str, str]:
  """Returns {path: 'dtype[shape] hash'} of every array."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  prints = jax.device_get([fingerprint(leaf) for _, leaf in leaves]) if hashed else None
  described = {}
  for i, (path, leaf) in enumerate(leaves):
    text = f'{np.dtype(leaf.dtype)}{list(leaf.shape)}'
    if hashed:
      text = f'{text} {"".join(f"{part:08x}" for part in prints[i])}'
    described[jax.tree_util.keystr(path)] = text
  return described
