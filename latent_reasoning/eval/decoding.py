"""Cached decoding, one path for every method.

The prefix is read once. Every readout of a row then decodes from its own part
of that one cache: K answers after K blocks, or k samples after the last block,
are K readouts of one prefill. Direct and chain of thought have one.
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from latent_reasoning.batching import Batch
from latent_reasoning.models import latents
from latent_reasoning.models.attention import Cache


def head_kernel(model, params) -> chex.Array:
  """Returns a [D, V] copy of the head, made once for many calls of `generate`."""
  if not model.config.tie_embeddings and not model.pretrained_vocab:
    return params['head']
  # A copy, not a view: inside the loop, the transpose would be taken each token.
  return jax.jit(lambda p: jnp.concatenate(
      model.apply({'params': p}, method='kernels'), axis=1))(params)


def prefill(model, params, head_DV: chex.Array, batch: Batch, room: int,
            embeddings: chex.Array | None = None,
            edit: Callable[[Cache], Cache] | None = None) -> tuple[chex.Array, Cache]:
  """Reads the prefixes, latents, and first tokens that are given.

  Args:
    batch: prompts (`sequences.Method.prompt`) with one slot a readout, L = P + K, or with
      what is given of it.
    room: tokens that each readout will add to the cache.
    embeddings: [B, P, D] in place of the prefixes' tokens, where nothing is given.
    edit: changes the cache of the prefixes before a readout reads anything.

  Returns:
    float32 logits of each readout's first token [B, K, V], and the cache.
  """
  p, count = batch.prefix, batch.anchors.shape[1]
  if batch.started:
    out, cache = latents.forward_with_cache(model, params, batch, room=room, edit=edit)
    hidden = out.hidden
    last = hidden[:, p:].reshape(hidden.shape[0], count, -1, hidden.shape[-1])[:, :, -1]
    return _logits(model, params, last, head_DV), cache
  out = latents.read_prefix(model, params, batch, embeddings=embeddings)
  anchors = jnp.take_along_axis(out.hidden, batch.anchors[..., None], axis=1)
  cache = latents.empty_cache(out.layers, count, room)
  return _logits(model, params, anchors, head_DV), edit(cache) if edit else cache


def given(batch: Batch) -> int:
  """Tokens of each readout that a prefill reads."""
  return (batch.tokens.shape[1] - batch.prefix) // batch.anchors.shape[1] * batch.started


def decode_step(model, params, head_DV: chex.Array, batch: Batch, cache: Cache,
                tokens: chex.Array, step: chex.Array) -> tuple[chex.Array, Cache]:
  """Feeds each readout its token number `step`: [B, K] -> logits [B, K, V], cache."""
  slots, step = slice(batch.prefix, None, max(1, given(batch))), step + given(batch)
  mask = batch.mask.cut(lambda a: a[:, slots])
  out = model.apply({'params': params}, tokens, batch.positions[:, slots] + step, mask, cache,
                    step)
  return _logits(model, params, out.hidden, head_DV), cache.add(out.layers, step)


def _logits(model, params, hidden, head_DV):
  return model.apply({'params': params}, hidden, head_DV, method='head')


def most_probable(logits: chex.Array) -> chex.Array:
  """argmax over the last axis, int32; on a CPU, two plain reductions are 8 times faster."""
  ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
  best = logits == logits.max(-1, keepdims=True)
  return jnp.where(best, ids, ids.size - 1).min(-1)


@functools.partial(jax.jit, static_argnames=('model', 'end', 'pad', 'max_tokens', 'sample',
                                             'top_k'))
def generate(model, params, head_DV: chex.Array, batch: Batch, rng: chex.PRNGKey,
             temperature: float, *, end: int, pad: int, max_tokens: int,
             sample: bool = False, top_k: int = 0,
             embeddings: chex.Array | None = None,
             edit: Callable[[Cache], Cache] | None = None) -> chex.Array:
  """Decodes every readout of every prompt until its end token, greedily or sampled.

  Args:
    batch: prompts with one slot a readout.
    rng: used where `sample`.
    temperature: of the samples.
    end: id that ends a readout; -1: none, always decode `max_tokens`.
    pad: fills what comes after the end.
    max_tokens: most tokens of a readout, the end token included.
    sample: draw from the distribution instead of taking its mode.
    top_k: of this many most probable tokens; 0: of all.
    embeddings: [B, P, D] in place of the prefixes' tokens.
    edit: as `prefill`; a pytree.

  Returns:
    int32 [B, K, max_tokens].
  """
  def pick(logits, step):
    if not sample:
      return most_probable(logits)
    own = jax.random.fold_in(rng, step)
    if top_k:
      least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
      logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(own, logits / temperature).astype(jnp.int32)

  def body(carry):
    step, token, done, out, cache = carry
    logits, cache = decode_step(model, params, head_DV, batch, cache, token, step)
    token = jnp.where(done, pad, pick(logits, step + 1))
    out = jax.lax.dynamic_update_slice_in_dim(out, token[..., None], step + 1, axis=2)
    return step + 1, token, done | (token == end), out, cache

  def going(carry):
    step, _, done, _, _ = carry
    return (step + 1 < max_tokens) & ~done.all()

  logits, cache = prefill(model, params, head_DV, batch, max_tokens - 1, embeddings, edit)
  token = pick(logits, 0)
  out = jnp.full((*token.shape, max_tokens), pad, jnp.int32).at[..., 0].set(token)
  start = (jnp.zeros((), jnp.int32), token, token == end, out, cache)
  return jax.lax.while_loop(going, body, start)[3]
