"""Layers that all decoders are made of."""

import math
import re
from typing import Any

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from latent_reasoning.config import LoraConfig, ModelConfig, RopeConfig

# Names of what config.model.remat 'dots' keeps for the backward pass (transformer.REMAT).
DENSE, LOW_RANK, ATTENDED = 'dense', 'low_rank', 'attended'


def by_batch(x: chex.Array, axis: int = 0, others: Any = None) -> chex.Array:
  """Keeps activations on a mesh cut by batch alone, so that layers gather their weights
  instead of them. Nothing without a mesh (sharding), or where it does not divide the batch.

  Args:
    axis: the batch's.
    others: how the other axes are cut: None: not; PartitionSpec.UNCONSTRAINED: as may be.
  """
  mesh, axis = jax.sharding.get_abstract_mesh(), axis % x.ndim
  if mesh.empty or mesh.size == 1 or x.shape[axis] % (mesh.shape['data'] * mesh.shape['fsdp']):
    return x
  spec = [others] * x.ndim
  spec[axis] = ('data', 'fsdp')
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


class RMSNorm(nn.Module):
  """x / sqrt(mean x²) · scale over the last axis (Zhang and Sennrich 2019), in float32."""
  epsilon: float
  dtype: jnp.dtype
  zero_centered: bool = False  # by 1 + scale

  @nn.compact
  def __call__(self, x: chex.Array) -> chex.Array:
    begin = nn.initializers.zeros if self.zero_centered else nn.initializers.ones
    scale = self.param('scale', begin, (x.shape[-1],), jnp.float32)
    scale = 1 + scale if self.zero_centered else scale
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.epsilon)
    return (wide * scale).astype(self.dtype)


def norm(config: ModelConfig, **kwargs) -> nn.Module:
  """The norm that config.model.norm names."""
  dtype = jnp.dtype(config.dtype)
  if config.norm != 'layer':
    return RMSNorm(config.norm_epsilon, dtype, config.norm == 'rms_zero_centered', **kwargs)
  return nn.LayerNorm(config.norm_epsilon, use_bias=config.bias, dtype=dtype, **kwargs)


class Dense(nn.Module):
  """x W + b over flattened leading dimensions.

  On a CPU the gradient of a three-dimensional dense layer costs twice as much
  as the same over a matrix; elsewhere the reshape is free.
  """
  features: int
  bias: bool
  dtype: jnp.dtype
  scale: float = 1.0  # of the initial kernel
  lora: LoraConfig | None = None
  deterministic: bool = True  # no dropout of LoRA

  @nn.compact
  def __call__(self, x: chex.Array) -> chex.Array:
    # 1 / sqrt(fan-in), not GPT-2's 0.02, which starts narrow models far too small.
    kernel = self.param('kernel', nn.initializers.normal(self.scale * x.shape[-1]**-0.5),
                        (x.shape[-1], self.features), jnp.float32)
    x_flat = x.reshape(-1, x.shape[-1]).astype(self.dtype)
    y = x_flat @ kernel.astype(self.dtype)
    if self._adapted():
      y += self._low_rank(x_flat)
    if self.bias:
      y += self.param('bias', nn.initializers.zeros, (self.features,),
                      jnp.float32).astype(self.dtype)
    return checkpoint_name(y, DENSE).reshape(*x.shape[:-1], self.features)

  def _adapted(self) -> bool:
    lora, path = self.lora, '/'.join(self.path)
    return bool(lora and lora.rank) and any(re.search(t, path) for t in lora.targets)

  def _low_rank(self, x: chex.Array) -> chex.Array:
    """alpha / rank · x A B, with B zero at first."""
    lora = self.lora
    a = self.param('lora_a', nn.initializers.normal(x.shape[-1]**-0.5),
                   (x.shape[-1], lora.rank), jnp.float32)
    b = self.param('lora_b', nn.initializers.zeros, (lora.rank, self.features), jnp.float32)
    x = nn.Dropout(lora.dropout, deterministic=self.deterministic)(x)
    low = checkpoint_name(x @ a.astype(self.dtype), LOW_RANK)
    return low @ b.astype(self.dtype) * (lora.alpha / lora.rank)


def frequencies(half: int, rope: RopeConfig) -> chex.Array:
  """The angle a position turns each of H/2 pairs by, float32 [H/2].

  'linear' stretches all positions (Chen et al. 2023). 'llama3' stretches the slow
  pairs by `factor`, keeps the fast ones, and goes over smoothly between wavelengths of
  original / high and original / low positions. 'yarn' does too, evenly over the pairs between
  those wavelengths, rounded to whole pairs (Peng et al. 2023).
  """
  turns = rope.base**(-jnp.arange(half, dtype=jnp.float32) / half)
  if rope.scaling == 'linear':
    return turns / rope.factor
  if rope.scaling == 'llama3':
    waves = rope.original * turns / (2 * jnp.pi)  # in the original context
    smooth = jnp.clip((waves - rope.low) / (rope.high - rope.low), 0, 1)
    return turns * (smooth + (1 - smooth) / rope.factor)
  if rope.scaling == 'yarn':
    def pair(waves):  # which one turns so often in the original context
      return half * math.log(rope.original / (2 * math.pi * waves)) / math.log(rope.base)
    first, last = max(math.floor(pair(rope.high)), 0), min(math.ceil(pair(rope.low)),
                                                           2 * half - 1)
    smooth = jnp.clip((jnp.arange(half) - first) / max(last - first, 1e-3), 0, 1)
    return turns * (1 - smooth + smooth / rope.factor)
  return turns


class LatentProjection(nn.Module):
  """A hidden state as the next input: dense, GELU, dense, layer norm, as in CODI."""
  width: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, hidden: chex.Array) -> chex.Array:
    up = nn.gelu(Dense(self.width, True, self.dtype, name='up')(hidden))
    return nn.LayerNorm(dtype=self.dtype, name='norm')(
        Dense(self.width, True, self.dtype, name='down')(up))


@flax.struct.dataclass
class Own:
  """What layers do not have in common; a leading layer axis [L], or of one layer.

  Attributes:
    window: int32 [], as Mask.window; None: no layer has one.
    turns: float32 [H/2], as `frequencies`, 0 in a layer without positions; None: all alike.
  """
  window: chex.Array | None = None
  turns: chex.Array | None = None

  def layer(self, i: int) -> 'Own':
    """Of layer i."""
    return jax.tree.map(lambda a: a[i], self)


def own(config: ModelConfig) -> Own:
  """What each layer of a model has of its own."""
  c, rope = config, config.rope
  windowed = [bool(c.window) and (not c.window_layers or i in c.window_layers)
              for i in range(c.num_layers)]
  window = turns = None
  if any(windowed):
    window = jnp.asarray([c.window if w else 2**30 for w in windowed], jnp.int32)
  if c.position_embedding == 'rotary' and (c.no_rope_layers or rope.local_base):
    half = pairs(c.head_dim or c.embed_dim // c.num_heads, rope)
    plain = frequencies(half, rope)
    local = frequencies(half, RopeConfig(rope.local_base)) if rope.local_base else plain
    turns = jnp.stack([0 * plain if i in c.no_rope_layers else local if windowed[i] else plain
                       for i in range(c.num_layers)])
  return Own(window, turns)


def pairs(size: int, rope: RopeConfig) -> int:
  """How many pairs of a head's dimensions are turned."""
  return int(size * rope.fraction) // 2


def rotary(x: chex.Array, positions: chex.Array, rope: RopeConfig,
           turns: chex.Array | None = None) -> chex.Array:
  """Rotary positions (Su et al. 2021), halves convention.

  Args:
    x: [B, T, N, H].
    positions: int32 [B, T].
    rope: base and scaling.
    turns: of a layer with others (`own`).
  """
  half = pairs(x.shape[-1], rope)
  turns = frequencies(half, rope) if turns is None else turns
  angle = positions[..., None].astype(jnp.float32) * turns
  sin, cos = jnp.sin(angle)[:, :, None], jnp.cos(angle)[:, :, None]  # [B, T, 1, H/2]
  if rope.multiplier != 1:
    sin, cos = rope.multiplier * sin, rope.multiplier * cos
  a, b, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
  parts = [a * cos - b * sin, b * cos + a * sin] + [rest] * bool(rest.size)
  return jnp.concatenate(parts, axis=-1).astype(x.dtype)
