"""Attention over rows of a prefix and readouts: plain, split, by kernels, and cached.

All take q as [B, T, N, H], k and v as [B, T, M, H] with N a multiple of M, whose heads
each serve N / M of q's in order, and do their softmax in float32.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from latent_reasoning.config import ModelConfig
from latent_reasoning.errors import InputError, ensure
from latent_reasoning.models import masks
from latent_reasoning.models.masks import Mask

NEGATIVE = -1e30  # finite, so that a masked logit has a gradient of 0, not NaN


@flax.struct.dataclass
class Cache:
  """Keys and values while K readouts decode from one prefix.

  Attributes:
    prefix_k, prefix_v: [B, M, P, H], shared by the K readouts. Heads before places:
      what a token reads of a head lies together, and is never copied to be so.
    own_k, own_v: [B, K, M, S, H], what each readout has decoded so far.
    banks: what each readout remembers (models.imm); None without memory.

  Those are of one layer; of a whole model, each is a tuple over layers, or an
  array with a leading layer axis where the layers are scanned.
  """
  prefix_k: chex.Array
  prefix_v: chex.Array
  own_k: chex.Array
  own_v: chex.Array
  banks: Any = None

  def add(self, layers, step: chex.Array) -> 'Cache':
    """This cache with what the model returned of more tokens (transformer.LayerOutput), in the
    places from `step` on. Layers return these alone, so that a loop changes it in place."""
    own_k, own_v = (jax.tree.map(functools.partial(_put, step), own, new) for own, new in (
        (self.own_k, layers.keys), (self.own_v, layers.values)))
    return self.replace(own_k=own_k, own_v=own_v, banks=layers.banks)

  def layer(self, i: int) -> 'Cache':
    """The cache of layer i, of a tuple over layers."""
    return Cache(self.prefix_k[i], self.prefix_v[i], self.own_k[i], self.own_v[i],
                 self.banks[i])


def _put(step: chex.Array, own: chex.Array, new: chex.Array) -> chex.Array:
  """[..., S, H] with [..., R, H] in the places from `step` on."""
  return jax.lax.dynamic_update_slice_in_dim(own, new, step, axis=own.ndim - 2)


def _logits(equation: str, q: chex.Array, k: chex.Array, cap: float) -> chex.Array:
  logits = jnp.einsum(equation, q, k, preferred_element_type=jnp.float32) * q.shape[-1]**-0.5
  return cap * jnp.tanh(logits / cap) if cap else logits


def _serve(k: chex.Array, q: chex.Array) -> chex.Array:
  """Repeats the heads of keys or values for those of queries."""
  return jnp.repeat(k, q.shape[-2] // k.shape[-2], axis=-2) if k.shape[-2] < q.shape[-2] else k


def _softmax(logits: chex.Array, mask: chex.Array) -> chex.Array:
  return jax.nn.softmax(jnp.where(mask, logits, NEGATIVE), axis=-1)


def dense(q: chex.Array, k: chex.Array, v: chex.Array, mask: Mask,
          cap: float = 0.0) -> chex.Array:
  """One dense mask over the whole row: the reference of `shared_prefix`."""
  shares = weights(q, k, mask, cap).astype(v.dtype)
  return jnp.einsum('BNTS,BSNH->BTNH', shares, _serve(v, q))


def weights(q: chex.Array, k: chex.Array, mask: Mask, cap: float = 0.0) -> chex.Array:
  """The shares with which queries attend to keys: float32 [B, N, T, S], rows add to 1."""
  return _softmax(_logits('BTNH,BSNH->BNTS', q, _serve(k, q), cap),
                  masks.allowed(mask)[:, None])


def shared_prefix(q: chex.Array, k: chex.Array, v: chex.Array, mask: Mask,
                  cap: float = 0.0) -> chex.Array:
  """The same by parts: the prefix by itself, each readout to prefix and itself.

  A readout's own keys are R instead of K·R, and the prefix has none of them:
  P² + K·R·(P + R) logits instead of (P + K·R)². One softmax over both parts.
  """
  return _by_parts(functools.partial(dense_prefix, cap=cap), q, k, v, mask, cap)


def dense_prefix(q: chex.Array, k: chex.Array, v: chex.Array, mask: Mask,
                 cap: float = 0.0) -> chex.Array:
  """The prefix to itself: all [B, P, N or M, H]."""
  k, v = _serve(k, q), _serve(v, q)
  weights = _softmax(_logits('BTNH,BSNH->BNTS', q, k, cap),
                     masks.sees_prefix(mask, q.shape[1])[:, None])
  return jnp.einsum('BNTS,BSNH->BTNH', weights.astype(v.dtype), v)


def _by_parts(prefix: Callable[..., chex.Array], q: chex.Array, k: chex.Array, v: chex.Array,
              mask: Mask, cap: float = 0.0) -> chex.Array:
  """The prefix to itself by a function as `dense_prefix`, then the readouts."""
  p, count = mask.prefix, mask.count
  out = prefix(q[:, :p], k[:, :p], v[:, :p], mask.part(0, p))
  if not count:
    return out
  batch, length, heads, size = q.shape
  k, v = _serve(k, q), _serve(v, q)
  r = (length - p) // count
  own = (batch, count, r, heads, size)
  sees = masks.sees_prefix(mask.part(p, length), p).reshape(batch, count, r, p)
  near = masks.within(jnp.arange(r)[:, None] - jnp.arange(r), mask)
  causal = jnp.broadcast_to(jnp.tril(jnp.ones((r, r), bool)) & near, (batch, count, r, r))
  if mask.shared:
    segment = mask.segment[:, p:].reshape(batch, count, r)
    causal &= (segment[..., :, None] == segment[..., None, :]) & (segment[..., None, :] > 0)
  readouts = _readouts(
      q[:, p:].reshape(own), k[:, :p], v[:, :p], k[:, p:].reshape(own),
      v[:, p:].reshape(own), sees, causal, cap)
  return jnp.concatenate([out, readouts.reshape(batch, length - p, heads, size)], axis=1)


def cached(q: chex.Array, k: chex.Array, v: chex.Array, mask: Mask, cache: Cache,
           step: chex.Array,
           cap: float = 0.0) -> tuple[chex.Array, tuple[chex.Array, chex.Array]]:
  """The next R tokens of each of K readouts, from a cache.

  Args:
    q: [B, K·R, N, H]. k, v: [B, K·R, M, H].
    mask: of the queries, [B, K·R] each.
    cache: of this layer.
    step: int32 scalar, tokens that each readout has decoded before these.

  Returns:
    [B, K·R, N, H], and keys and values as the cache has them, [B, K, M, R, H].
  """
  batch, count = cache.own_k.shape[:2]
  q, k, v = (a.reshape(batch, count, -1, *a.shape[2:]) for a in (q, k, v))
  new = k.swapaxes(2, 3), v.swapaxes(2, 3)
  own_k, own_v = _put(step, cache.own_k, new[0]), _put(step, cache.own_v, new[1])
  p, r, served = cache.prefix_k.shape[2], q.shape[2], k.shape[3]
  shared = q.reshape(batch, count, r, served, -1, q.shape[-1])  # G queries of a key
  distance = step + jnp.arange(r)[:, None] - jnp.arange(own_k.shape[3])
  near = masks.within(distance, mask)
  if mask.own is None:
    causal = (distance >= 0) & near
    own = jnp.broadcast_to(causal, (batch, count, *causal.shape))
  else:
    own = mask.own[:, None] & near
  sees = jnp.concatenate([
      masks.sees_prefix(mask, p).reshape(batch, count, r, p), own], axis=-1)
  logits = jnp.concatenate([
      _logits('BKRMGH,BMPH->BKMGRP', shared, cache.prefix_k, cap),
      _logits('BKRMGH,BKMSH->BKMGRS', shared, own_k, cap)], axis=-1)
  weights = _softmax(logits, sees[:, :, None, None]).astype(v.dtype)
  out = (jnp.einsum('BKMGRP,BMPH->BKRMGH', weights[..., :p], cache.prefix_v)
         + jnp.einsum('BKMGRS,BKMSH->BKRMGH', weights[..., p:], own_v))
  return out.reshape(batch, count * r, -1, q.shape[-1]), new


def _readouts(q: chex.Array, prefix_k: chex.Array, prefix_v: chex.Array,
              own_k: chex.Array, own_v: chex.Array, sees: chex.Array,
              causal: chex.Array, cap: float) -> chex.Array:
  """Attends from [B, K, R] queries to a shared prefix and S own keys each.

  Args:
    q: [B, K, R, N, H].
    prefix_k, prefix_v: [B, P, N, H].
    own_k, own_v: [B, K, S, N, H].
    sees: bool [B, K, R, P]. causal: bool [B, K, R, S].

  Returns:
    [B, K, R, N, H].
  """
  p = prefix_k.shape[1]
  logits = jnp.concatenate([
      _logits('BKRNH,BPNH->BNKRP', q, prefix_k, cap),
      _logits('BKRNH,BKSNH->BNKRS', q, own_k, cap)], axis=-1)
  weights = _softmax(logits, jnp.concatenate([sees, causal], axis=-1)[:, None])
  weights = weights.astype(own_v.dtype)
  return (jnp.einsum('BNKRP,BPNH->BKRNH', weights[..., :p], prefix_v)
          + jnp.einsum('BNKRS,BKSNH->BKRNH', weights[..., p:], own_v))


def cudnn(q: chex.Array, k: chex.Array, v: chex.Array, mask: Mask,
          implementation: str = 'cudnn') -> chex.Array:
  """The same with cuDNN's fused kernel over the prefix; readouts as in `shared_prefix`.

  A causal prefix needs no mask: its padding is on the right, where no token sees it, and the
  kernel skips what is above the diagonal. Any other mask (bidirectional blocks, several
  problems in a row) is a bias to cuDNN, which then skips nothing. Our tests have no GPU: they
  run what is handed to it with `implementation` 'xla', and compile it for one.
  """
  def prefix(q, k, v, mask):
    p = q.shape[1]
    attend = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
    if mask.causal_prefix and not mask.shared:
      return attend(*_pad(2, q, k, v), is_causal=True)[:, :p]  # its backward pass: even lengths
    *qkv, may = _pad(2, q, k, v, masks.sees_prefix(mask, p))
    return attend(*qkv, mask=may[:, None])[:, :p]
  return _by_parts(prefix, q, k, v, mask)


def splash(q: chex.Array, k: chex.Array, v: chex.Array, mask: Mask,
           interpret: bool = False) -> chex.Array:
  """The same with splash attention, the TPU kernel of Pallas, over the prefix; readouts as in
  `shared_prefix`.

  It skips tiles in which nothing is seen and keeps no weights. The mask of a causal prefix
  is static, an object of the kernel: padding is on the right, where no token sees it; of
  several problems in a row, each has a number that its tokens see alone. Any other mask
  (bidirectional blocks) is an array, of each row its own: rows then take the place of
  the kernel's heads, and heads are mapped over, so that a mask serves all of them. On a mesh
  each device runs it on its rows and heads. Our tests run it with `interpret`, and compile
  it for a TPU.
  """
  def prefix(q, k, v, mask):
    mesh = jax.sharding.get_abstract_mesh()
    call, more = functools.partial(_static_splash, interpret=interpret), ()
    if mask.shared:
      more = (mask.visible_from,)
    if not mask.causal_prefix:
      call = functools.partial(_dynamic_splash, interpret=interpret)
      more = (masks.sees_prefix(mask, q.shape[1]),)
    if not mesh.empty and mesh.size > 1:
      rows = ('data', 'fsdp') if not q.shape[0] % (
          mesh.shape['data'] * mesh.shape['fsdp']) else None
      heads = 'tensor' if not k.shape[2] % mesh.shape['tensor'] else None
      place = PartitionSpec(rows, None, heads)
      call = jax.shard_map(call, in_specs=(place, place, place, *[PartitionSpec(rows)] * len(
          more)), out_specs=place, check_vma=False)
    return call(q, k, v, *more)
  return _by_parts(prefix, q, k, v, mask)


def _static_splash(q: chex.Array, k: chex.Array, v: chex.Array,
                   problem: chex.Array | None = None, *, interpret: bool) -> chex.Array:
  from jax.experimental.pallas.ops.tpu import splash_attention as lib  # 0.3 s to import
  length = q.shape[1]
  q, k, v = (a.swapaxes(1, 2) for a in _pad(128, q, k, v))  # a TPU's tiles need T, H last
  tile = next(n for n in (512, 384, 256, 128) if not q.shape[2] % n)
  one = lib.CausalMask((q.shape[2],) * 2)
  kernel = lib.make_splash_mha_single_device(
      lib.MultiHeadMask([one] * q.shape[1]), interpret=interpret,
      block_sizes=lib.BlockSizes(*[tile] * 8))
  more = ()
  if problem is not None:
    ids = jnp.pad(problem, ((0, 0), (0, q.shape[2] - length)))
    more = (lib.SegmentIds(ids, ids),)
  return jax.vmap(kernel)(_scaled(q), k, v, *more).swapaxes(1, 2)[:, :length]


def _dynamic_splash(q: chex.Array, k: chex.Array, v: chex.Array, may: chex.Array,
                    interpret: bool) -> chex.Array:
  from jax.experimental.pallas.ops.tpu import splash_attention as lib
  length, served = q.shape[1], k.shape[2]
  q, k, v, may = _pad(128, q, k, v, may)
  kernel = lib.make_splash_mha_single_device(may, interpret=interpret)
  # Under jit it makes a traced array of this flag, which it then asks in Python.
  kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
  q = _scaled(q).reshape(
      *q.shape[:2], served, -1, q.shape[-1]).transpose(2, 3, 0, 1, 4)  # [M, G, B, T, H]
  k, v = (a.transpose(2, 0, 1, 3) for a in (k, v))
  one_key = jax.vmap(kernel, in_axes=(0, None, None))  # G queries of a key
  out = jax.vmap(one_key)(q, k, v).transpose(2, 3, 0, 1, 4)
  return out.reshape(*out.shape[:2], -1, out.shape[-1])[:, :length]


def _scaled(q: chex.Array) -> chex.Array:
  return (q * q.shape[-1]**-0.5).astype(q.dtype)


def _pad(multiple: int, q: chex.Array, k: chex.Array, v: chex.Array,
         may: chex.Array | None = None) -> list[chex.Array]:
  """Lengthens queries and keys to a multiple. Under a mask [B, T, T], what is added sees the
  first key, for a softmax over nothing is no number, and is seen by none."""
  def lengthen(a, axis=1):
    return jnp.pad(a, [(0, -a.shape[axis] % multiple if i == axis else 0)
                       for i in range(a.ndim)])
  padded = [lengthen(a) for a in (q, k, v)]
  if may is None:
    return padded
  return [*padded, lengthen(lengthen(may), 2).at[:, may.shape[1]:, 0].set(True)]


def require(config: ModelConfig) -> None:
  """Raises InputError where a kernel does not compute what the model asks for."""
  for what in ('window', 'attention_cap'):
    ensure(config.attention not in KERNELS or not getattr(config, what),
           f"config.model.attention is '{config.attention}', a kernel that does not compute "
           f"config.model.{what} ({getattr(config, what)}); expected 'shared_prefix'")


def check(name: str) -> None:
  """Raises InputError where an implementation does not run on the devices there are."""
  needs = KERNELS.get(name)
  if needs and jax.default_backend() != needs:
    raise InputError(f"config.model.attention is '{name}', a kernel for {needs.upper()}s, but "
                     f"this machine has {jax.default_backend().upper()}s; expected "
                     f"'shared_prefix'")


def without_kernel(config: ModelConfig) -> ModelConfig:
  """The same model without a kernel in its attention, to be compiled anywhere."""
  return dataclasses.replace(
      config, attention='shared_prefix') if config.attention in KERNELS else config


IMPLEMENTATIONS = {'shared_prefix': shared_prefix, 'dense': dense, 'cudnn': cudnn,
                   'splash': splash}
KERNELS = {'cudnn': 'gpu', 'splash': 'tpu'}  # and their backends
