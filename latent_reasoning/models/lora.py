"""Which parameters are trained, and LoRA merged into the weights it adapts.

LoRA (Hu et al., arXiv 2106.09685): x W + alpha / rank · x A B, B zero at first.

With config.optim.trainable 'new', what pretraining did not know is trained alone: LoRA's
maps, the rows of new tokens, and a memory or reasoning decoder. Gradients and optimizer
state exist for those only.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from latent_reasoning.config import LoraConfig

NEW = ('lora_a', 'lora_b', 'new_embedding', 'new_head')  # leaves
PARTS = ('memory', 'reasoning_decoder', 'thought', 'loop')  # whole parts


def is_new(path: tuple[str, ...]) -> bool:
  """Whether pretraining did not know the parameter at a path."""
  return path[-1] in NEW or any(part in PARTS for part in path)


def split(params: dict, trained: str) -> tuple[dict, dict]:
  """Returns what is trained and what is frozen ({} where trained is 'all')."""
  if trained == 'all':
    return params, {}
  flat = traverse_util.flatten_dict(params)
  return tuple(traverse_util.unflatten_dict(
      {path: a for path, a in flat.items() if is_new(path) == new}) for new in (True, False))


def join(own: dict, frozen: dict) -> dict:
  """The inverse of `split`."""
  return traverse_util.unflatten_dict({
      **traverse_util.flatten_dict(frozen), **traverse_util.flatten_dict(own)})


def cast(params: dict, trained: str, dtype: str) -> dict:
  """Frozen parameters in another type; what is trained stays float32."""
  own, frozen = split(params, trained)
  return join(own, jax.tree.map(lambda a: a.astype(dtype), frozen)) if frozen else params


def merge(params: dict, lora: LoraConfig) -> dict:
  """Weights with LoRA and the rows of new tokens in them, as a plain model has them."""
  flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(params)
  merged = {path: a for path, a in flat.items() if path[-1] not in NEW}
  for path, a in flat.items():
    if path[-1] == 'lora_a':
      kernel, b = (*path[:-1], 'kernel'), flat[*path[:-1], 'lora_b']
      merged[kernel] = merged[kernel].astype(jnp.float32) + a @ b * (lora.alpha / lora.rank)
    elif path[-1] == 'new_embedding':
      merged['embedding',] = jnp.concatenate([flat['embedding',], a])
    elif path[-1] == 'new_head':
      merged['head',] = jnp.concatenate([flat['head',], a], axis=1)
  return traverse_util.unflatten_dict(merged)


def lora_norms(params: dict, lora: LoraConfig) -> dict[str, dict[int, float]]:
  """How much LoRA adds to each matrix, |A B| alpha / rank over |W| (Frobenius), by kind and
  layer: {'qkv': {0: share, …}, …}."""
  flat, found = traverse_util.flatten_dict(params), {}
  for path, a in flat.items():
    if path[-1] == 'lora_a':
      added = a @ flat[*path[:-1], 'lora_b'] * (lora.alpha / lora.rank)
      kernel = flat[*path[:-1], 'kernel'].astype(jnp.float32)
      share = jnp.atleast_1d(jnp.linalg.norm(added, axis=(-2, -1))
                             / jnp.linalg.norm(kernel, axis=(-2, -1)))
      first = 0 if path[0] == 'blocks' else int(path[0].rpartition('_')[2])  # stacked, or not
      found.setdefault('/'.join(path[1:-1]), {}).update(
          enumerate(share.tolist(), first))
  return found
