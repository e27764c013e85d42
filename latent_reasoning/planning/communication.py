"""What devices send each other in a training step: counted in a compiled program, and by a
written model.

Bytes are of one device, {kind: bytes}: what an all-gather makes, what the others take in.
"""

import collections
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from latent_reasoning.config import Config
from latent_reasoning.models import lora

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
PASSES = {'all-reduce': 2}  # of its bytes over a link, in a ring of many; of others: 1

_HEAD = re.compile(r'(ENTRY )?%(\S+) .*\{$')
_LINE = re.compile(r'\s*(?:ROOT )?(%\S+) = ([^%"]+?) ([a-z-]+)\(([^)]*)\)')
_SHAPE = re.compile(r'([a-z]+)(\d*)\w*\[([\d,]*)\]')
_BODY = re.compile(r'(?:body|to_apply|\w*computations?)=\{?(%[^\s,}]+(?:, %[^\s,}]+)*)')


def of_hlo(text: str) -> tuple[dict[str, float], int]:
  """Counts in the text of a compiled program, a loop's body as often as it runs.

  Returns:
    {kind: bytes}, and how many loops do not say how often they run (they count once).
  """
  shapes, programs = {}, collections.defaultdict(list)
  entry = name = None
  for line in text.splitlines():
    if head := _HEAD.match(line):
      name = head[2]
      entry = name if head[1] else entry
    elif found := _LINE.match(line):
      shapes[found[1]] = found[2]
      if found[3] in (*KINDS, 'while', 'call', 'conditional'):
        programs[name].append((*found.group(2, 3, 4), line))
  total, unknown, waiting = collections.Counter(), 0, [(entry, 1)]
  while waiting:
    name, times = waiting.pop()
    for made, kind, taken, line in programs[name]:
      if kind in KINDS:
        own = [made] if kind == 'all-gather' else [
            shapes[one] for one in re.findall(r'%[^\s,]+', taken)]
        total[kind] += times * sum(map(_bytes, own))
        continue
      trips = re.search(r'known_trip_count\W+n\W+(\d+)', line)
      unknown += kind == 'while' and not trips
      often = times * (int(trips[1]) if trips else 1)
      waiting += [(one.strip(' %'), often) for inner in _BODY.findall(line)
                  for one in inner.split(',')]
  return dict(total), unknown


def _bytes(shapes: str) -> float:
  """Of an array, or of a tuple of arrays; what holds bits holds bytes (pred)."""
  return sum((int(bits) / 8 if bits else 1) * math.prod(int(n) for n in sizes.split(',') if n)
             for _, bits, sizes in _SHAPE.findall(shapes))


def expected(config: Config, state, batch, mesh) -> dict[str, float]:
  """The written model of what a step sends, on any device.

  fsdp: matrices are gathered as they lie, those of layers for the forward and for the
  backward pass, others once, and their gradients are reduced and scattered. data:
  gradients are reduced (vectors over fsdp too). tensor: activations are reduced behind
  attention and behind the MLP, forward and backward, and again where remat runs the
  forward pass twice. Scalars are left out.

  Args:
    state: its shapes with their places (sharding.state).
    batch: shapes of the whole batch.
  """
  data, fsdp, tensor = (mesh.shape[axis] for axis in ('data', 'fsdp', 'tensor'))
  parts, model = config.optim.grad_accum_steps, config.model
  own, frozen = lora.split(state.params, config.optim.trainable)
  total = collections.Counter()

  def add(params: Any, trained: bool) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
      layer = any(key.key.startswith('block') for key in path)
      here = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
      cut = fsdp > 1 and any('fsdp' in (axes or ()) for axes in leaf.sharding.spec)
      if cut:
        total['all-gather'] += (1 + layer) * parts * fsdp * here
        total['reduce-scatter'] += trained * parts * fsdp * here
      if data > 1 or (fsdp > 1 and not cut):
        total['all-reduce'] += trained * parts * here
  add(own, True)
  add(frozen, False)
  if tensor > 1:
    rows, length = batch.tokens.shape
    times = 2 * model.num_layers * (3 if model.remat == 'full' else 2)
    total['all-reduce'] += (times * rows * length // (data * fsdp) * model.embed_dim
                            * jnp.dtype(model.dtype).itemsize)
  return {kind: float(size) for kind, size in total.items() if size}
