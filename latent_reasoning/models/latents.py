"""The forward pass of a batch, with continuous thoughts where its readouts have some, and
several passes over the end of its prefix where it has those (sequences.Loops).

A latent is a position whose input is no token but the hidden state before it (Coconut,
arXiv 2412.06769), through an MLP where the model has one (CODI, arXiv 2502.21074):

  h_0 = hidden state of the prefix's last token,  h_t = model(x, h_0 … h_{t-1})

Training and decoding share this path: the prefix is read once, latents follow one after
another from its cache, and the tokens behind them go in one piece. Where readouts of a batch
have other numbers of latents, what stands behind the fewer goes one after another as well, up
to the most.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from latent_reasoning.batching import Batch
from latent_reasoning.models.attention import Cache
from latent_reasoning.models.layers import by_batch
from latent_reasoning.models.transformer import LayerOutput, Output


def empty_cache(layers: LayerOutput, count: int, room: int) -> Cache:
  """A cache of a prefix, by what the model returned of it, for `count` readouts with room
  for some tokens each; on a mesh each device has that of its rows."""

  def own(a):  # [..., B, M, P, H] -> [..., B, K, M, room, H]
    *layers, size, heads, _, width = a.shape
    return by_batch(jnp.zeros((*layers, size, count, heads, max(1, room), width), a.dtype),
                    -5, PartitionSpec.UNCONSTRAINED)
  k, v = jax.tree.map(lambda a: by_batch(jnp.swapaxes(a, -3, -2), -4,
                                         PartitionSpec.UNCONSTRAINED),
                      (layers.keys, layers.values))
  return Cache(k, v, jax.tree.map(own, k), jax.tree.map(own, v), layers.banks)


def forward(model, params, batch: Batch, rng: chex.PRNGKey | None = None,
            embeddings: chex.Array | None = None, inspect: bool = False) -> Output:
  """The forward pass of a batch.

  Args:
    model: as models.transformer.Transformer.
    params: its parameters.
    batch: rows.
    rng: for dropout; None: deterministic.
    embeddings: [B, L, D] in place of the tokens'; those of latents are not read.
    inspect: as the model takes it; not with latents.

  Returns:
    final hidden states [B, L, D] and what the layers computed; of those, with latents, the
    residual streams alone.
  """
  if batch.latents or batch.loops:
    return forward_with_cache(model, params, batch, rng, embeddings)[0]
  rngs = None if rng is None else {'dropout': rng}
  return model.apply({'params': params}, batch.tokens, batch.positions, batch.mask,
                     embeddings=embeddings, deterministic=rng is None, inspect=inspect,
                     rngs=rngs)


def read_prefix(model, params, batch: Batch, rng: chex.PRNGKey | None = None,
                embeddings: chex.Array | None = None) -> Output:
  """The prefix of each row, pass by pass where there are several.

  Args:
    embeddings: [B, P, D] in place of the tokens'.

  Returns:
    final hidden states [B, P, D] and what the layers computed of the P tokens.
  """
  loops = batch.loops
  first = batch.prefix - (loops.passes - 1) * loops.size if loops else batch.prefix
  mask = batch.mask

  def apply(part, *args, **more):
    rngs = None if rng is None else {'dropout': jax.random.fold_in(rng, part)}
    return model.apply({'params': params}, *args, deterministic=rng is None, rngs=rngs, **more)
  out = apply(0, batch.tokens[:, :first], batch.positions[:, :first],
              mask.part(0, first).replace(count=0, prefix=first),
              embeddings=None if embeddings is None else embeddings[:, :first])
  if not loops:
    return out
  size, n, count = len(batch.tokens), loops.size, loops.passes - 1
  tokens = batch.tokens[:, first:batch.prefix]
  own = (model.apply({'params': params}, tokens, method='embed') if embeddings is None
         else embeddings[:, first:])
  begin = batch.visible_until[:, first]  # where what is read again begins, [B]
  places = begin[:, None] + jnp.arange(n)

  def of_first(a, shift=0):  # these tokens' part of the first pass
    return jnp.take_along_axis(a, places.reshape(size, n, *[1] * (a.ndim - 2)) - shift, axis=1)
  sees = jnp.arange(n) < (of_first(batch.visible_until) - begin[:, None])[..., None]
  if loops.block:
    block = jnp.arange(n) // loops.block
    sees |= block[:, None] != block
  again = mask.part(first, first + n).replace(own=sees, count=1)
  positions = batch.positions[:, first:first + n]
  cache = empty_cache(out.layers, 1, n)
  before = of_first(out.hidden, 1)[:, :1]  # of the token in front of these

  def one(hidden, step):
    part, inputs = step
    if loops.shift:
      hidden = jnp.concatenate([before, hidden[:, :-1]], axis=1)
    if loops.mix == 'replace':
      inputs = model.apply({'params': params}, hidden, method='latent_input')
    else:
      inputs += hidden
    found = apply(part, tokens[:, :n], positions, again, cache, 0, embeddings=inputs)
    layers = found.layers
    return found.hidden, (found.hidden, layers.hidden, layers.keys, layers.values)

  inputs = jnp.moveaxis(own.reshape(size, count, n, -1), 1, 0)
  _, (hidden, streams, keys, values) = jax.lax.scan(
      one, of_first(out.hidden), (1 + jnp.arange(count), inputs))

  def behind(old, new):  # [..., B, first, D], [count, ..., B, n, D] -> [..., B, P, D]
    new = jnp.moveaxis(new, 0, -3)
    return jnp.concatenate([old, new.reshape(*new.shape[:-3], count * n, new.shape[-1])], -2)

  def behind_heads(old, new):  # [..., B, first, M, H], [count, ..., B, 1, M, n, H]
    new = behind(jnp.swapaxes(old, -3, -2), jnp.squeeze(new, -4))
    return jnp.swapaxes(new, -3, -2)
  return Output(behind(out.hidden, hidden), out.layers.replace(
      hidden=jax.tree.map(behind, out.layers.hidden, streams),
      keys=jax.tree.map(behind_heads, out.layers.keys, keys),
      values=jax.tree.map(behind_heads, out.layers.values, values)))


def forward_with_cache(model, params, batch: Batch, rng: chex.PRNGKey | None = None,
                       embeddings: chex.Array | None = None, room: int = 0,
                       edit: Callable[[Cache], Cache] | None = None) -> tuple[Output, Cache]:
  """As `forward`, and the cache behind it, with room for more tokens of each readout.

  A batch without latents is read the same way; its readouts' tokens all go at once.
  `edit` changes the cache of the prefix, and of latents, before anything behind them is read.
  """
  p, count, n = batch.prefix, batch.anchors.shape[1], batch.latents
  size, length = batch.tokens.shape
  r = (length - p) // count
  mask = batch.mask
  if embeddings is None:
    embeddings = model.apply({'params': params}, batch.tokens, method='embed')

  def apply(part, places, own_mask, cache, step, inputs):
    rngs = None if rng is None else {'dropout': jax.random.fold_in(rng, part)}
    return model.apply({'params': params}, jnp.zeros(places.shape, jnp.int32), places,
                       own_mask, cache, step, embeddings=inputs, deterministic=rng is None,
                       rngs=rngs)

  prefix = read_prefix(model, params, batch, rng, embeddings[:, :p])
  cache = empty_cache(prefix.layers, count, r + room)
  h = jnp.take_along_axis(prefix.hidden, batch.anchors[..., None], axis=1)  # [B, K, D]

  def slots(start, stop):
    """Positions and mask of these slots of each readout, [B, K·n]."""
    def cut(a):
      return a[:, p:].reshape(size, count, r)[:, :, start:stop].reshape(size, -1)
    return cut(batch.positions), mask.cut(cut)

  def body(carry, t):
    h, cache = carry
    places, own_mask = slots(0, 1)  # latents differ in their position alone
    inputs = model.apply({'params': params}, h, method='latent_input')
    if batch.own_latents is not None:
      tokens = embeddings[:, p:].reshape(size, count, r, -1)[:, :, t]
      inputs = jnp.where((t < batch.own_latents)[..., None], inputs, tokens)
    out = apply(t + 1, places + t, own_mask, cache, t, inputs)
    return (out.hidden, cache.add(out.layers, t)), (out.hidden, out.layers.hidden)

  def rows(a):  # [n, ..., B, K, D] -> [..., B, K, n, D]
    return jnp.moveaxis(a, 0, -2)
  (_, cache), (latents, x) = jax.lax.scan(body, (h, cache), jnp.arange(n))
  cache = edit(cache) if edit else cache
  tail = embeddings[:, p:].reshape(size, count, r, -1)[:, :, n:].reshape(
      size, count * (r - n), -1)
  rest = apply(n + 1, *slots(n, r), cache, n, tail)

  def join(before, latent, after):
    *lead, width = after.shape[:-2] + after.shape[-1:]
    own = jnp.concatenate([rows(latent), after.reshape(*lead, count, r - n, width)], axis=-2)
    return jnp.concatenate([before, own.reshape(*lead, count * r, width)], axis=-2)
  streams = jax.tree.map(join, prefix.layers.hidden, x, rest.layers.hidden)
  return (Output(join(prefix.hidden, latents, rest.hidden),
                 LayerOutput(streams, None, None, None)), cache.add(rest.layers, n))
