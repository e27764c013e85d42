"""KaVa (arXiv 2510.02312): latents learn the compressed keys and values of a chain of thought.

Of the N tokens of the steps, each layer and head keeps the M, as many as there are latents, of
the highest score (R-KV, arXiv 2505.24133):

  S_i = λ I_i + (1 - λ) R_i
  I_i = mean over the answer's tokens j of softmax_i(q_j · k_i / √H)
  R_i = softmax_i(-mean_j cos(k_i, k_j))

They keep their order, and the m-th is what latent m is to have:

  L_KV = 1/2 mean smooth_L1(sg K̃ - K) / σ_K + 1/2 mean smooth_L1(sg Ṽ - V) / σ_V

with means over problems, layers, heads, latents and width, and σ of each layer over those of
K̃ or Ṽ. Latents beyond N have none. Keys have their positions, as a cache has them.

We have the paper's formulas at second hand (method.md names the loss alone). Read by us: the
softmax of I is over the steps alone, the mean of R has i itself, heads that share a key are
averaged, and smooth L1 is divided by σ as CODI's is.
"""

import chex
import jax
import jax.numpy as jnp
import optax

from latent_reasoning.batching import Batch
from latent_reasoning.models.attention import NEGATIVE, Cache
from latent_reasoning.models.transformer import LayerOutput


def chosen(layers: LayerOutput, batch: Batch, steps: chex.Array, count: int,
           share: float) -> chex.Array:
  """Keys and values of the tokens that are kept, [B, L, 2, M, n, H], without gradient.

  Args:
    layers: what the model computed of a batch of chains of thought.
    batch: those rows.
    steps: [B], how many tokens of each readout are its steps; behind them is the answer.
    count: n, how many are kept.
    share: λ.
  """
  length = batch.tokens.shape[1] - batch.prefix
  slot, size = jnp.arange(length), batch.tokens.shape[0]
  kept = slot < steps[:, None]
  inputs = jnp.sum(batch.weights > 0, axis=1) - 1  # the first is predicted by the question
  answer = ~kept & (slot < inputs[:, None])

  def mean(a, which, axis):  # over tokens of [B, ..., T, ...]
    which = which.reshape(size, *(length if i == axis % a.ndim else 1
                                  for i in range(1, a.ndim)))
    return jnp.sum(a * which, axis) / jnp.maximum(1, which.sum(axis))

  def softmax(a):  # over steps, the last axis
    which = kept.reshape(size, *[1] * (a.ndim - 2), length)
    return jax.nn.softmax(jnp.where(which, a, NEGATIVE), axis=-1)

  def one(q, k, v):  # of a layer: [2, B, M, n, H]
    q, k, v = (a[:, batch.prefix:].astype(jnp.float32) for a in (q, k, v))
    q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    reads = softmax(jnp.einsum('BTMGH,BSMH->BMGTS', q, k) * q.shape[-1]**-0.5)
    importance = mean(reads, answer, -2).mean(2)  # [B, M, S]
    unit = k / (jnp.linalg.norm(k, axis=-1, keepdims=True) + 1e-8)
    alike = mean(jnp.einsum('BSMH,BUMH->BMSU', unit, unit), kept, -1)
    score = share * importance + (1 - share) * softmax(-alike)
    score = jnp.where(kept[:, None], score, -1.0)  # those of steps are not below 0
    best, at = jax.lax.top_k(jnp.pad(score, ((0, 0), (0, 0), (0, count)),
                                     constant_values=-1.0), count)
    at = jnp.sort(jnp.where(best >= 0, at, length - 1), axis=-1)
    return jnp.stack([jnp.take_along_axis(jnp.swapaxes(a, 1, 2), at[..., None], axis=2)
                      for a in (k, v)])
  found = jnp.stack([one(*a) for a in zip(layers.queries, layers.keys, layers.values,
                                          strict=True)])
  return jax.lax.stop_gradient(jnp.moveaxis(found, 2, 0))


def count(batch: Batch) -> int:
  """How many latents a row has, those of several passes included."""
  return batch.loops.size if batch.loops else batch.latents


def of_latents(cache: Cache, batch: Batch) -> chex.Array:
  """Keys and values of the latents behind a forward pass, of the last one where there are
  several, [B, L, 2, M, n, H]."""
  if batch.loops:
    last = [jnp.stack([*a])[..., batch.prefix - batch.loops.size:batch.prefix, :]
            for a in (cache.prefix_k, cache.prefix_v)]
  else:
    last = [jnp.stack([*a])[:, :, 0, :, :batch.latents] for a in (cache.own_k, cache.own_v)]
  return jnp.moveaxis(jnp.stack(last, 1), 2, 0).astype(jnp.float32)


def moments(taught: chex.Array, steps: chex.Array) -> dict[str, chex.Array]:
  """What σ and the means of a batch follow from, of each row: how many of what is kept is
  there, and the sum and the sum of squares of it by layer, of keys and values, [B, L, 2]."""
  count = taught.shape[-2]
  there = jnp.arange(count) < steps[:, None]
  taught = taught * there[:, None, None, None, :, None]
  return {'kept': there.sum(1), 'sum': taught.sum((-3, -2, -1)),
          'square': (taught**2).sum((-3, -2, -1))}


def distance(own: chex.Array, taught: chex.Array, steps: chex.Array,
             whole: dict[str, chex.Array]) -> chex.Array:
  """The part of L_KV that these rows have, of a batch whose moments are `whole`."""
  _, layers, _, heads, count, width = own.shape
  there = (jnp.arange(count) < steps[:, None])[:, None, None, None, :, None]
  total = jnp.maximum(1, whole['kept'].sum()) * heads * width
  spread = jnp.sqrt(jnp.maximum(
      whole['square'].sum(0) / total - (whole['sum'].sum(0) / total)**2, 0)) + 1e-6
  each = optax.huber_loss(own, taught) / spread[None, :, :, None, None, None]
  return jnp.sum(each * there) / (2 * layers * total)
