"""Attention masks from integer vectors: one rule for every method."""

import chex
import jax.numpy as jnp

from latent_reasoning.batching import Mask


def plain(batch: int, length: int) -> Mask:
  """Causal rows without readouts."""
  place = jnp.broadcast_to(jnp.arange(length), (batch, length))
  zeros = jnp.zeros_like(place)
  return Mask(zeros, zeros, place + 1, zeros[:, :0], length, 0, causal_prefix=True)


def sees_prefix(query: Mask, keys: int) -> chex.Array:
  """Returns bool [B, T, S]: visible_from <= j < visible_until for prefix keys j, but those with
  unseen_from <= j < unseen_until, and those that a window hides."""
  j = jnp.arange(keys)
  sees = (j >= query.visible_from[..., None]) & (j < query.visible_until[..., None])
  if query.window is not None:
    sees &= query.positions[..., None] - query.key_positions[:, None, :keys] < query.window
  if query.unseen_from is None:
    return sees
  return sees & ~((j >= query.unseen_from[..., None]) & (j < query.unseen_until[..., None]))


def within(distance: chex.Array, mask: Mask) -> chex.Array | bool:
  """Whether a window lets tokens of a readout see others so many places before them."""
  return True if mask.window is None else distance < mask.window


def allowed(mask: Mask) -> chex.Array:
  """Returns bool [B, L, L]: whether query i may see key j (RiM: attention).

      segment[j] == 0  and  visible_from[i] <= j < visible_until[i]
      or  segment[i] == segment[j] != 0  and  j <= i

  Question q q, two blocks of one memory token, readouts a and b of two tokens
  (rows are queries; causal blocks):

             q q < m > < m > a a b b
      q      1
      q      1 1
      <      1 1 1
      m      1 1 1 1
      >      1 1 1 1 1
      <      1 1 1 1 1 1
      m      1 1 1 1 1 1 1
      >      1 1 1 1 1 1 1 1
      a      1 1 1 1 1       1
      a      1 1 1 1 1       1 1
      b      1 1 1 1 1 1 1 1     1
      b      1 1 1 1 1 1 1 1     1 1

  In a bidirectional block, each token has the block's end as visible_until;
  where readouts may not see the question, their visible_from is its length.
  """
  length = mask.segment.shape[1]
  i, j = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
  query, key = mask.segment[:, :, None], mask.segment[:, None, :]
  in_prefix = (key == 0) & sees_prefix(mask, length)
  in_readout = (query == key) & (key != 0) & (j <= i) & within(i - j, mask)
  return in_prefix | in_readout
