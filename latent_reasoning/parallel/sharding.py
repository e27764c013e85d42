"""Where parameters, optimizer state and batches lie on a mesh of devices: one table.

Three axes. Batches are cut over `data` and `fsdp`; parameters over `fsdp`, from which a
layer gathers them when it runs, and over `tensor`, which cuts heads and the MLP's hidden
width (Megatron's column and row pairs). Losses are weighted sums over the whole batch,
so none depends on the mesh.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from latent_reasoning.config import Config, MeshConfig
from latent_reasoning.errors import InputError
from latent_reasoning.parallel import multihost

AXES = ('data', 'fsdp', 'tensor')
BATCH = P(('data', 'fsdp'))  # the leading axis of every batch


@dataclasses.dataclass(frozen=True)
class Rule:
  """Parameters whose path matches lie as `spec` says, without the axis of scanned layers."""
  path: str  # re.search
  spec: P
  when: Callable[[Config], bool] = lambda c: True  # the model has such parameters


def _lora(config: Config) -> bool:
  return config.model.lora.rank > 0


COLUMN, ROW = r'(qkv|q|k|v|up|gate|gate_up|project)', r'(out|down)'

# The first that matches holds. Vectors are whole everywhere.
TABLE = (
    Rule(r'memory/(gate/\w+|norm/\w+)$', P(), lambda c: bool(c.imm.write_policy)),
    Rule(r'memory/\w+_up/kernel$', P(None, 'fsdp'), lambda c: bool(c.imm.write_policy
                                                                   and c.imm.linformer_rank)),
    Rule(r'memory/\w+/kernel$', P('fsdp', None), lambda c: bool(c.imm.write_policy)),
    Rule(rf'(^|/){COLUMN}/kernel$', P('fsdp', 'tensor')),
    Rule(rf'(^|/){ROW}/kernel$', P('tensor', 'fsdp')),
    Rule(rf'(^|/){COLUMN}/lora_a$', P('fsdp', None), _lora),
    Rule(rf'(^|/){COLUMN}/lora_b$', P(None, ('tensor', 'fsdp')), _lora),
    Rule(rf'(^|/){ROW}/lora_a$', P(('tensor', 'fsdp'), None), _lora),
    Rule(rf'(^|/){ROW}/lora_b$', P(None, 'fsdp'), _lora),
    Rule(r'/bias$|(^|/)\w*norm\w*/(scale|bias)$', P()),
    # Known tokens need not be a number that a mesh divides; the width is.
    Rule(r'(^|/)embedding$', P(None, ('fsdp', 'tensor')), lambda c: c.optim.trainable == 'new'),
    Rule(r'^head$', P(('fsdp', 'tensor'), None),
         lambda c: c.optim.trainable == 'new' and not c.model.tie_embeddings),
    Rule(r'(^|/)new_embedding$', P(None, 'fsdp'), lambda c: c.optim.trainable == 'new'),
    Rule(r'^new_head$', P('fsdp', None),
         lambda c: c.optim.trainable == 'new' and not c.model.tie_embeddings),
    Rule(r'(^|/)embedding$', P('tensor', 'fsdp'), lambda c: c.optim.trainable == 'all'),
    Rule(r'(^|/)head$', P('fsdp', 'tensor'),
         lambda c: c.optim.trainable == 'all' and not c.model.tie_embeddings),
    Rule(r'^loop$', P('fsdp', None),
         lambda c: c.model.loop.count > 1 and c.model.loop.mix == 'concat'),
    Rule(r'(^|/)position_embedding$', P(None, 'fsdp'),
         lambda c: c.model.position_embedding == 'learned'))


def make(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """The mesh of all devices, of axes that the compiler shards over (Auto).

  Args:
    config: sizes; -1 takes what the others leave.
    devices: instead of all there are.

  Raises:
    InputError: the sizes do not multiply to the number of devices.
  """
  devices = list(devices or jax.devices())
  sizes = [getattr(config, axis) for axis in AXES]
  known = math.prod(size for size in sizes if size > 0)
  if -1 in sizes and len(devices) % known == 0:
    sizes[sizes.index(-1)] = len(devices) // known
  if math.prod(sizes) != len(devices):
    raise InputError(
        f'config.mesh is {dict(zip(AXES, sizes, strict=True))}, but there are {len(devices)} '
        'devices; expected sizes that multiply to it, one of them may be -1')
  return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES),
                       devices=devices)


def parameters(config: Config, params: Any, mesh: Mesh) -> Any:
  """The placing of each parameter, a tree of NamedSharding.

  Args:
    params: arrays or their shapes.

  Raises:
    InputError: a parameter that no rule covers, a rule that places nothing, or a size
      that the mesh does not divide.
  """
  rules = [rule for rule in TABLE if rule.when(config)]
  used = set()

  def place(path, leaf):
    name = _name(path)
    rule = next((r for r in rules if re.search(r.path, name)), None)
    if rule is None:
      raise InputError(f'no rule of sharding.TABLE covers the parameter {name}; add one')
    used.add(rule.path)
    scanned = 'blocks' in name.split('/') and len(rule.spec) > 0
    spec = P(None, *rule.spec) if scanned else rule.spec
    _divides(name, leaf.shape, spec, mesh)
    return NamedSharding(mesh, spec)

  placed = jax.tree_util.tree_map_with_path(place, params)
  if idle := [rule.path for rule in rules if rule.path not in used]:
    raise InputError(f'rules of sharding.TABLE place nothing in this model: {idle}; mend '
                     'their condition')
  return placed


def state(config: Config, like: Any, mesh: Mesh) -> Any:
  """The placing of a TrainState: optimizer state lies as its parameters do."""
  placed = parameters(config, like.params, mesh)
  by_path = {_name(path): s for path, s in jax.tree_util.tree_leaves_with_path(placed)}
  everywhere = NamedSharding(mesh, P())

  def place(path, leaf):
    parts = _name(path).split('/')
    for i in range(len(parts)):  # behind the optimizer's own names stands the parameter's
      own = by_path.get('/'.join(parts[i:]))
      if own is not None and leaf.ndim >= len(own.spec):
        return own
    return everywhere
  return dataclasses.replace(
      like, step=everywhere, params=placed,
      opt_state=jax.tree_util.tree_map_with_path(place, like.opt_state))


def parts(mesh: Mesh) -> int:
  """How many parts a mesh cuts a batch into."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def batch(tree: Any, mesh: Mesh) -> Any:
  """Puts a batch on the mesh, cut over `data` and `fsdp`; every process holds it whole."""
  if mesh.size == 1:
    return tree
  cut, size = parts(mesh), len(jax.tree.leaves(tree)[0])
  if size % cut:
    raise InputError(f'config.optim.batch_size is {size}, but config.mesh cuts a batch into '
                     f'{cut} parts (data × fsdp); expected a multiple of that')

  def place(a):
    where = NamedSharding(mesh, BATCH if np.ndim(a) else P())
    return a if isinstance(a, jax.Array) else jax.make_array_from_callback(
        np.shape(a), where, lambda at: np.asarray(a)[at])
  return jax.tree.map(place, tree)


def mesh_of(params: Any) -> Mesh | None:
  """The mesh of several devices that parameters lie on; None: there is none."""
  place = getattr(jax.tree.leaves(params)[0], 'sharding', None)
  return place.mesh if isinstance(place, NamedSharding) and place.mesh.size > 1 else None


def lengthened(tree: Any, mesh: Mesh) -> Any:
  """A batch of arrays with its last row repeated until the mesh cuts it into equal parts."""
  more = -len(jax.tree.leaves(tree)[0]) % parts(mesh)
  return jax.tree.map(lambda a: np.concatenate([a, np.repeat(a[-1:], more, axis=0)])
                      if more and np.ndim(a) else a, tree)


def by_rows(call: Callable[..., Any], params: Any, *trees: Any) -> Any:
  """What `call(*trees)` returns of batches, each device of the parameters' mesh having made
  its rows; whole in every process.

  Args:
    call: a jitted function that reads `params`; what it returns has the batch's axis first.
    params: as they lie.
    trees: arrays of one number of rows, which the mesh need not divide; a scalar goes to all.
  """
  mesh = mesh_of(params)
  if mesh is None:
    return call(*trees)
  rows = len(jax.tree.leaves(trees)[0])
  trees = jax.tree.map(np.asarray, trees)
  with jax.set_mesh(mesh):
    found = call(*(batch(lengthened(tree, mesh), mesh) for tree in trees))
  return jax.tree.map(lambda a: multihost.fetch(a)[:rows], found)


def map_rows(call: Callable[[Any], Any], tree: Any) -> Any:
  """`call` of one row of a batch after another, on each device of its own; under jit.

  `jax.lax.map` alone goes through a batch that is cut on every device.
  """
  mesh = jax.sharding.get_abstract_mesh()
  count = 1 if mesh.empty else parts(mesh)
  if count == 1 or len(jax.tree.leaves(tree)[0]) % count:
    return jax.lax.map(call, tree)

  def turn(a):  # [B, …] -> [B / count, count, …], where each device has one of each `count`
    return a.reshape(count, -1, *a.shape[1:]).swapaxes(0, 1)
  found = jax.lax.map(jax.vmap(call), jax.tree.map(turn, tree))
  return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(-1, *a.shape[2:]), found)


def whole(like: Any, mesh: Mesh) -> Any:
  """The placing of what is the same on every device."""
  return jax.tree.map(lambda _: NamedSharding(mesh, P()), like)


def _name(path) -> str:
  return '/'.join(str(getattr(key, 'key', getattr(key, 'name', getattr(key, 'idx', key))))
                  for key in path)


def _divides(name: str, shape: Sequence[int], spec: P, mesh: Mesh) -> None:
  for size, axes in zip(shape, spec, strict=False):
    axes = (axes,) if isinstance(axes, str) else axes or ()
    parts = math.prod(mesh.shape[axis] for axis in axes)
    if size % parts:
      raise InputError(
          f'the parameter {name} has the shape {list(shape)}, and config.mesh cuts {size} into '
          f'{parts} parts over {axes}; change the mesh, the size'
          + (', or config.tokenizer.pad_to' if 'embedding' in name or 'head' in name else ''))
