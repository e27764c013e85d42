"""Softmax cross entropy under a head, whose logits never exist whole.

Tokens are cut into tiles. The logits of a tile are made, summed up and, where a gradient is
wanted, turned into it at once, before those of the next tile are made: the same three
products as over whole logits, and neither logits nor their gradient are kept. On a mesh
each device has its rows and, where the mesh cuts `tensor`, its part of the vocabulary: maxima
and sums go over devices, a logit never does.
"""

import dataclasses
import functools
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec as P

from latent_reasoning.models.attention import NEGATIVE

ROWS, VOCABULARY = ('data', 'fsdp'), 'tensor'  # axes of the mesh that cut them


@dataclasses.dataclass(frozen=True)
class _Plan:
  """What is static: a tile's tokens, the parts' widths, the axes that cut rows and columns."""
  tile: int
  widths: tuple[int, ...]
  num_tokens: int
  cap: float
  rows: tuple[str, ...] = ()
  vocabulary: str = ''


def sums(hidden: chex.Array, kernels: Sequence[chex.Array], targets: chex.Array,
         weights: chex.Array, tile: int, num_tokens: int = 0,
         cap: float = 0.0) -> tuple[chex.Array, chex.Array]:
  """Σ w · -log softmax(h W)[target], and Σ w over those whose largest logit is the target's.

  Args:
    hidden: [B, T, D], of the compute dtype.
    kernels: W by parts [D, n], one behind the other; one whose gradient nobody wants costs
      nothing backward.
    targets, weights: int32 and float32 [B, T].
    tile: tokens whose logits exist at a time on a device.
    num_tokens: columns behind them are no tokens; 0: there are none.
    cap: logits x are cap · tanh(x / cap); 0: x.

  Returns:
    float32 scalars; only the first has a gradient, for hidden and kernels.
  """
  widths = tuple(kernel.shape[1] for kernel in kernels)
  plan = _Plan(tile, widths, num_tokens or sum(widths), cap)
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty and mesh.size > 1:
    divides = hidden.shape[0] % (mesh.shape['data'] * mesh.shape['fsdp']) == 0
    plan = dataclasses.replace(plan, rows=ROWS if divides else (), vocabulary=VOCABULARY)
    cut = mesh.shape[VOCABULARY]  # a vocabulary need not be a number that it divides
    kernels = [jnp.pad(k, ((0, 0), (0, -k.shape[1] % cut))) for k in kernels]
  return _sums(hidden, tuple(kernels), targets, weights, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sums(hidden, kernels, targets, weights, plan):
  return _everywhere(plan, (False,) * (1 + len(kernels)), hidden, kernels, targets, weights)[:2]


def _forward(hidden, kernels, targets, weights, plan):
  wanted = (hidden.perturbed, *(kernel.perturbed for kernel in kernels))
  loss, correct, grads = _everywhere(plan, wanted, *jax.tree.map(
      lambda a: a.value, (hidden, kernels, targets, weights), is_leaf=lambda a: hasattr(
          a, 'perturbed')))
  return (loss, correct), grads


def _backward(plan, grads, cotangents):
  scale = cotangents[0]
  if isinstance(scale, SymbolicZero):
    return None, (None,) * len(plan.widths), None, None
  hidden, kernels = jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)
  return hidden, kernels, None, None


_sums.defvjp(_forward, _backward, symbolic_zeros=True)


def _everywhere(plan: _Plan, wanted: tuple[bool, ...], hidden, kernels, targets, weights):
  """The sums and the gradients that are wanted (else None), on all devices of the mesh."""
  here = functools.partial(_here, plan, wanted)
  if not plan.vocabulary:
    return here(hidden, kernels, targets, weights)
  mesh = jax.sharding.get_abstract_mesh()
  rows, columns = P(plan.rows or None), P(None, VOCABULARY)
  scatter = bool(plan.rows) and hidden.shape[-1] % mesh.shape['fsdp'] == 0
  here = functools.partial(_here, plan, wanted, scatter=scatter)
  placed = P('fsdp' if scatter else None, VOCABULARY)
  grads = (rows if wanted[0] else None, tuple(placed if w else None for w in wanted[1:]))
  return jax.shard_map(
      here, in_specs=(rows, (columns,) * len(kernels), rows, rows),
      out_specs=(P(), P(), grads), check_vma=False)(hidden, kernels, targets, weights)


def _here(plan: _Plan, wanted: tuple[bool, ...], hidden, kernels, targets, weights,
          scatter: bool = False):
  """The same on one device, with its rows and its columns of the kernels."""
  shape = hidden.shape
  flat = [hidden.reshape(-1, shape[-1]), targets.reshape(-1), weights.reshape(-1)]
  kernels = tuple(kernel.astype(hidden.dtype) for kernel in kernels)
  columns = _columns(plan, [kernel.shape[1] for kernel in kernels])
  tile = functools.partial(_tile, plan, wanted, kernels, columns)
  size, count = len(flat[0]), -(-len(flat[0]) // plan.tile)
  if count == 1:
    total, d_hidden = tile(*flat)
  else:
    more = count * plan.tile - size  # of weight 0
    tiles = [jnp.pad(a, ((0, more), *((0, 0),) * (a.ndim - 1))).reshape(
        count, plan.tile, *a.shape[1:]) for a in flat]
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(
        lambda: tile(*(a[0] for a in tiles))[0]))

    def body(total, one):
      own, d_hidden = tile(*one)
      return jax.tree.map(jnp.add, total, own), d_hidden
    total, d_hidden = jax.lax.scan(body, zeros, tiles)
    d_hidden = None if d_hidden is None else d_hidden.reshape(-1, shape[-1])[:size]
  loss, correct, d_kernels = total
  if plan.rows:
    loss, correct = (jax.lax.psum(a, plan.rows) for a in (loss, correct))
    if scatter:  # as the parameters lie
      d_kernels = jax.tree.map(lambda a: jax.lax.psum_scatter(a, 'fsdp', tiled=True), d_kernels)
    d_kernels = jax.tree.map(lambda a: jax.lax.psum(a, 'data' if scatter else plan.rows),
                             d_kernels)
  return loss, correct, (None if d_hidden is None else d_hidden.reshape(shape), d_kernels)


def _columns(plan: _Plan, sizes: Sequence[int]) -> list[chex.Array]:
  """Which token each column of each part is; -1: none."""
  found, first = [], 0
  for width, size in zip(plan.widths, sizes, strict=True):
    at = jnp.arange(size)
    if plan.vocabulary:
      at += size * jax.lax.axis_index(plan.vocabulary)
    found.append(jnp.where((at < width) & (first + at < plan.num_tokens), first + at, -1))
    first += width
  return found


def _tile(plan: _Plan, wanted: tuple[bool, ...], kernels, columns, hidden, targets, weights):
  """(loss, correct, gradient of each kernel), gradient of the hidden states [T, D]."""
  def over(reduce, parallel, parts):
    total = functools.reduce(reduce, parts)
    return parallel(total, plan.vocabulary) if plan.vocabulary else total

  def add(parts):
    return over(jnp.add, jax.lax.psum, [a.sum(-1) for a in parts])
  logits = [jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
            for kernel in kernels]
  slopes = None
  if plan.cap:
    bent = [jnp.tanh(a / plan.cap) for a in logits]
    logits, slopes = [plan.cap * a for a in bent], [1 - a**2 for a in bent]
  logits = [jnp.where(own >= 0, a, NEGATIVE) for a, own in zip(logits, columns, strict=True)]
  hits = [own == targets[:, None] for own in columns]
  top = over(jnp.maximum, jax.lax.pmax, [a.max(-1) for a in logits])[:, None]
  exps = [jnp.exp(a - top) for a in logits]
  total = add(exps)
  mine = add([jnp.where(hit, a, 0) for hit, a in zip(hits, logits, strict=True)])
  # The largest is the target's where none is larger, and none as large stands before it.
  ahead = add([((a > mine[:, None]) | ((a == mine[:, None]) & (own < targets[:, None])))
               & (own >= 0) for a, own in zip(logits, columns, strict=True)])
  loss = jnp.sum((top[:, 0] + jnp.log(total) - mine) * weights)
  correct = jnp.sum((ahead == 0) * weights)
  if not any(wanted):
    return (loss, correct, (None,) * len(kernels)), None
  d_logits = [(e / total[:, None] - hit) * weights[:, None]
              for e, hit in zip(exps, hits, strict=True)]
  if slopes:
    d_logits = [d * slope for d, slope in zip(d_logits, slopes, strict=True)]
  d_logits = [d.astype(hidden.dtype) for d in d_logits]
  d_kernels = tuple(
      jnp.matmul(hidden.T, d, preferred_element_type=jnp.float32) if want else None
      for d, want in zip(d_logits, wanted[1:], strict=True))
  d_hidden = None
  if wanted[0]:
    d_hidden = over(jnp.add, jax.lax.psum, [
        jnp.matmul(d, kernel.T, preferred_element_type=jnp.float32)
        for d, kernel in zip(d_logits, kernels, strict=True)]).astype(hidden.dtype)
  return (loss, correct, d_kernels), d_hidden
