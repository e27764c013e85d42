"""Phi-3 (arXiv 2404.14219): a Llama with one map to queries, keys and values, and one to both
halves of the MLP. Of its types of rotary positions longrope is not computed."""

import dataclasses
from typing import Any

from latent_reasoning.config import ModelConfig
from latent_reasoning.errors import ensure
from latent_reasoning.hf import llama
from latent_reasoning.hf.family import (
  Family,
  Name,
  Reader,
  dense,
  plain,
  read_rope,
  read_windows,
)


def read(values: Reader, base: ModelConfig) -> ModelConfig:
  """The model of a config.json."""
  for key in ('attention_bias', 'mlp_bias'):
    ensure(not values.flag(key, False), f'{values.where}: {key} is True, which is not computed '
           'here for phi3; supported: False')
  rope = read_rope(values, 1.0, supported=('default',))
  return dataclasses.replace(
      llama.shared(values, base, rope), fused_qkv=True, fused_mlp=True,
      **read_windows(values, lambda i: True))


def fits(config: ModelConfig) -> bool:
  """Whether a model is a Phi-3."""
  c = config
  return (plain(c, 'fused_mlp', 'window', rope=('fraction',)) and not c.rope.scaling
          and c.norm == 'rms' and c.mlp == 'swiglu' and c.fused_mlp and c.fused_qkv
          and c.position_embedding == 'rotary' and not c.qk_norm
          and not (c.bias or c.qkv_bias or c.out_bias or c.mlp_bias)
          and c.head_dim in (0, c.embed_dim // c.num_heads))


def write(config: ModelConfig) -> dict[str, Any]:
  """The keys of its config.json."""
  found = llama.write_mistral(config)
  del found['head_dim']
  return {**found, 'partial_rotary_factor': config.rope.fraction,
          'original_max_position_embeddings': config.max_positions}


def tensors(config: ModelConfig) -> list[Name]:
  """The names of its tensors."""
  names = llama.outer(config)
  for ours, theirs in (('qkv', 'self_attn.qkv_proj'), ('out', 'self_attn.o_proj'),
                       ('gate_up', 'mlp.gate_up_proj'), ('down', 'mlp.down_proj')):
    names += dense(ours, f'layers.{{}}.{theirs}', True, False)
  return names


PHI3 = Family(
    'phi3', 'Phi3ForCausalLM',
    llama.KEYS - {'head_dim', 'layer_types'} | {
        'partial_rotary_factor', 'original_max_position_embeddings'},
    read, fits, write, tensors)
