"""What a model remembers from one segment of a text to the next, held by the caller.

A `MemoryState` is a value: reading a segment returns a new one and leaves the old
one as it was, so a snapshot is a name for it and a rollback is going back to it. No
parameter changes. Each sequence of a batch has banks of its own.

With the policy `gated`, a slot is a convex combination of what was written and zero,
so however long the text, no slot's norm exceeds the largest write's: M_t[i] =
(1 - u) M_{t-1}[i] + u s_t with u in [0, 1] gives |M_t[i]| <= max(|M_{t-1}[i]|, |s_t|).
"""

import functools
import json
import pathlib
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.flax import load_file, save_file

from latent_reasoning.errors import InputError
from latent_reasoning.eval import language_modeling


@flax.struct.dataclass
class MemoryState:
  """The banks of all layers and rounds.

  Attributes:
    banks: as `models.transformer.Transformer` takes them, [B, N, R] each.
  """
  banks: Any

  def reset(self, sequences: chex.Array) -> 'MemoryState':
    """Empties the banks of the sequences [B] that are True."""
    def clear(a):
      return jnp.where(jnp.reshape(sequences, (-1, *(1,) * (a.ndim - 1))), 0, a)
    return MemoryState(jax.tree.map(clear, self.banks))

  def norms(self) -> chex.Array:
    """The largest norm of a slot of each sequence, [B]."""
    return jnp.stack([jnp.linalg.norm(a, axis=-1).max(-1) for a in self._slots()]).max(0)

  def drift(self, before: 'MemoryState') -> chex.Array:
    """How far each sequence's slots moved since `before`, relative to their size, [B]."""
    moved = sum(jnp.sum((a - b)**2, (-2, -1)) for a, b in zip(
        self._slots(), before._slots(), strict=True))
    size = sum(jnp.sum(b**2, (-2, -1)) for b in before._slots())
    return jnp.sqrt(moved / jnp.maximum(size, 1e-12))

  def _slots(self):
    return [a for a in jax.tree.leaves(self.banks) if a.ndim == 3]

  def save(self, path: str | pathlib.Path) -> None:
    """Writes safetensors."""
    leaves = jax.tree_util.tree_leaves_with_path(self.banks)
    save_file({jax.tree_util.keystr(p): jnp.asarray(np.ascontiguousarray(a))
               for p, a in leaves}, str(path))

  @classmethod
  def load(cls, path: str | pathlib.Path, like: 'MemoryState') -> 'MemoryState':
    """Reads what `save` wrote.

    Args:
      path: a file.
      like: a state of the same model and batch, for structure and shapes.

    Raises:
      InputError: no such file, or the banks of another model or batch.
    """
    try:
      found = load_file(str(path))
    except (OSError, SafetensorError, ValueError) as error:
      raise InputError(f'{path}: cannot be read as a memory state, {error}; expected a file '
                       'written by MemoryState.save') from None
    leaves, tree = jax.tree_util.tree_flatten_with_path(like.banks)
    expected = {jax.tree_util.keystr(p): (a.shape, str(a.dtype)) for p, a in leaves}
    shapes = {name: (a.shape, str(a.dtype)) for name, a in found.items()}
    if shapes != expected:
      raise InputError(f'{path}: found the banks {json.dumps(sorted(map(str, shapes.items())))}'
                       f'; expected {json.dumps(sorted(map(str, expected.items())))}: those '
                       'of the same model and batch')
    return cls(jax.tree.unflatten(tree, [found[jax.tree_util.keystr(p)] for p, _ in leaves]))


@functools.partial(jax.jit, static_argnums=0)
def read(model, params, tokens: chex.Array,
         state: MemoryState | None = None) -> tuple[chex.Array, MemoryState]:
  """Reads one segment of each of B texts.

  Positions begin at 0 in each segment; only the memory reaches back further.

  Args:
    model: as models.transformer.Transformer, with a causal memory.
    params: its parameters.
    tokens: int32 [B, T].
    state: what the segment before returned; None: empty.

  Returns:
    float32 logits [B, T, V], and the state for the next segment.
  """
  if not model.imm or not model.imm.write_policy:
    raise InputError("the model has no memory; expected config.imm.write_policy, such as "
                     "'gated'")
  batch = language_modeling.rows(jnp.pad(tokens, ((0, 0), (0, 1))))
  until = jnp.full((tokens.shape[0], 1), tokens.shape[1], jnp.int32)
  out = model.apply(
      {'params': params}, batch.tokens, batch.positions, batch.mask.replace(until=until),
      banks=state.banks if state else None)
  after = jax.tree.map(lambda a: a[:, 0], out.layers.banks)
  return model.apply({'params': params}, out.hidden, method='head'), MemoryState(after)
