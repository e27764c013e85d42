"""Llama (Touvron et al. 2023), and what is built alike: Mistral, Qwen 2 and 3, SmolLM2.

Root-mean-square norm, SwiGLU, rotary positions, fewer heads for keys and values. Qwen 2 has
biases in the maps to queries, keys and values; Qwen 3 norms queries and keys.
"""

import dataclasses
from typing import Any

from latent_reasoning.config import ModelConfig
from latent_reasoning.errors import ensure
from latent_reasoning.hf.family import (
  Family,
  Name,
  Reader,
  dense,
  read_rope,
  short,
  write_rope,
)

KEYS = frozenset((
    'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads',
    'num_key_value_heads', 'head_dim', 'rms_norm_eps', 'rope_theta', 'rope_scaling',
    'rope_parameters', 'attention_bias', 'mlp_bias', 'max_position_embeddings',
    'sliding_window', 'layer_types', 'use_sliding_window'))


def read(values: Reader, base: ModelConfig) -> ModelConfig:
  """The model of a config.json, without what single families add."""
  types = values.get('layer_types', list) or ()
  ensure(all(t == 'full_attention' for t in types),
         f"{values.where}: layer_types has {short(types)}; supported: 'full_attention' alone")
  positions = values.size('max_position_embeddings')
  if 'use_sliding_window' not in values.values:
    # Up to there a window hides nothing.
    positions = min(positions, values.size('sliding_window', positions))
  heads, width = values.size('num_attention_heads'), values.size('hidden_size')
  bias = values.flag('attention_bias', False)
  return dataclasses.replace(
      base, norm='rms', mlp='swiglu', fused_qkv=False, position_embedding='rotary', bias=False,
      qkv_bias=bias, out_bias=bias, mlp_bias=values.flag('mlp_bias', False), qk_norm=False,
      num_layers=values.size('num_hidden_layers'), embed_dim=width, num_heads=heads,
      num_kv_heads=values.size('num_key_value_heads', heads),
      head_dim=values.size('head_dim', max(1, width // heads)),
      mlp_dim=values.size('intermediate_size'), max_positions=positions,
      tie_embeddings=values.flag('tie_word_embeddings', False),
      norm_epsilon=values.number('rms_norm_eps'), rope=read_rope(values))


def read_qwen2(values: Reader, base: ModelConfig) -> ModelConfig:
  """As Llama; biases are in the maps to queries, keys and values alone, unless it says not."""
  return dataclasses.replace(
      read(values, base), qkv_bias=values.flag('attention_bias', True), out_bias=False)


def read_qwen3(values: Reader, base: ModelConfig) -> ModelConfig:
  """As Llama; queries and keys are normed."""
  return dataclasses.replace(read(values, base), qk_norm=True)


def similar(config: ModelConfig) -> bool:
  """Whether a model is built like a Llama, biases and norms of queries and keys apart."""
  return (config.norm == 'rms' and config.mlp == 'swiglu' and not config.fused_qkv
          and not config.bias and config.position_embedding == 'rotary')


def fits(config: ModelConfig) -> bool:
  """Whether a model is a Llama."""
  return similar(config) and not config.qk_norm and config.qkv_bias == config.out_bias


def fits_qwen2(config: ModelConfig) -> bool:
  """Whether a model is a Qwen 2."""
  return (similar(config) and not config.qk_norm and config.qkv_bias and not config.out_bias
          and not config.mlp_bias)


def fits_qwen3(config: ModelConfig) -> bool:
  """Whether a model is a Qwen 3."""
  return (similar(config) and config.qk_norm and config.qkv_bias == config.out_bias
          and not config.mlp_bias)


def write_qwen2(config: ModelConfig) -> dict[str, Any]:
  """The keys of a config.json that the families share."""
  return {
      'num_hidden_layers': config.num_layers, 'hidden_size': config.embed_dim,
      'num_attention_heads': config.num_heads,
      'num_key_value_heads': config.num_kv_heads or config.num_heads,
      'head_dim': config.head_dim or config.embed_dim // config.num_heads,
      'intermediate_size': config.mlp_dim, 'max_position_embeddings': config.max_positions,
      'rms_norm_eps': config.norm_epsilon, 'hidden_act': 'silu', **write_rope(config.rope)}


def write_qwen3(config: ModelConfig) -> dict[str, Any]:
  """The keys of a Qwen 3."""
  return {**write_qwen2(config), 'attention_bias': config.qkv_bias}


def write(config: ModelConfig) -> dict[str, Any]:
  """The keys of a Llama."""
  return {**write_qwen3(config), 'mlp_bias': config.mlp_bias}


def tensors(config: ModelConfig) -> list[Name]:
  """The names of the tensors, of all these families."""
  names = [Name(('embedding',), 'embed_tokens.weight'),
           Name(('block_{}', 'norm_1', 'scale'), 'layers.{}.input_layernorm.weight'),
           Name(('block_{}', 'norm_2', 'scale'), 'layers.{}.post_attention_layernorm.weight'),
           Name(('norm', 'scale'), 'norm.weight')]
  for ours in ('q', 'k', 'v', 'out'):
    bias = config.out_bias if ours == 'out' else config.qkv_bias
    names += dense(ours, f'layers.{{}}.self_attn.{ours[0]}_proj', True, bias)
  for ours in ('gate', 'up', 'down'):
    names += dense(ours, f'layers.{{}}.mlp.{ours}_proj', True, config.mlp_bias)
  if config.qk_norm:
    names += [Name(('block_{}', ours, 'scale'), f'layers.{{}}.self_attn.{ours}.weight')
              for ours in ('q_norm', 'k_norm')]
  return names


LLAMA = Family('llama', 'LlamaForCausalLM', KEYS, read, fits, write, tensors)
MISTRAL = Family('mistral', 'MistralForCausalLM', KEYS, read, lambda config: False, write,
                 tensors)  # what it computes here is a Llama, and is exported as one
QWEN2 = Family('qwen2', 'Qwen2ForCausalLM', KEYS, read_qwen2, fits_qwen2, write_qwen2, tensors)
QWEN3 = Family('qwen3', 'Qwen3ForCausalLM', KEYS, read_qwen3, fits_qwen3, write_qwen3, tensors)
