"""Llama (Touvron et al. 2023), and what is built alike: Mistral, Qwen 2 and 3, SmolLM2.

Root-mean-square norm, SwiGLU, rotary positions, fewer heads for keys and values. Qwen 2 has
biases in the maps to queries, keys and values; Qwen 3 norms queries and keys. Layers of Mistral
and Qwen may have windows.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from latent_reasoning.config import ModelConfig, RopeConfig
from latent_reasoning.errors import ensure
from latent_reasoning.hf.family import (
  NONE_OF_IT,
  Family,
  Name,
  Reader,
  dense,
  plain,
  read_rope,
  read_windows,
  short,
  write_rope,
  write_types,
)

KEYS = frozenset((
    'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads',
    'num_key_value_heads', 'head_dim', 'rms_norm_eps', 'rope_theta', 'rope_scaling',
    'rope_parameters', 'attention_bias', 'mlp_bias', 'max_position_embeddings',
    'sliding_window', 'layer_types'))
WINDOWED = KEYS | {'use_sliding_window', 'max_window_layers'}


def read(values: Reader, base: ModelConfig) -> ModelConfig:
  """A Llama, of whose layers none has a window."""
  types = values.get('layer_types', list) or ()
  ensure(all(t == 'full_attention' for t in types),
         f"{values.where}: layer_types has {short(types)}; supported: 'full_attention' alone")
  config = shared(values, base)
  # Up to there a window hides nothing.
  return dataclasses.replace(config, max_positions=min(
      config.max_positions, values.size('sliding_window', config.max_positions)))


def shared(values: Reader, base: ModelConfig, rope: RopeConfig | None = None,
           tied: bool = False) -> ModelConfig:
  """The model of a config.json, without what single families add.

  Args:
    rope: rotary positions; None: as most have them.
    tied: whether the head is the table where nothing says.
  """
  heads, width = values.size('num_attention_heads'), values.size('hidden_size')
  bias = values.flag('attention_bias', False)
  return dataclasses.replace(
      base, **NONE_OF_IT, norm='rms', mlp='swiglu', fused_qkv=False,
      position_embedding='rotary', bias=False, qkv_bias=bias, out_bias=bias,
      mlp_bias=values.flag('mlp_bias', False), qk_norm=False,
      num_layers=values.size('num_hidden_layers'), embed_dim=width, num_heads=heads,
      num_kv_heads=values.size('num_key_value_heads', heads),
      head_dim=values.size('head_dim', max(1, width // heads)),
      mlp_dim=values.size('intermediate_size'),
      max_positions=values.size('max_position_embeddings'),
      tie_embeddings=values.flag('tie_word_embeddings', tied),
      norm_epsilon=values.number('rms_norm_eps'), rope=rope or read_rope(values))


def read_mistral(values: Reader, base: ModelConfig) -> ModelConfig:
  """As Llama, with a window in all layers where there is one."""
  return dataclasses.replace(shared(values, base), **read_windows(
      values, lambda i: True, 4096))


def used_windows(values: Reader, local: Callable[[int], bool],
                 size: int | None = None) -> dict[str, Any]:
  """As `read_windows`, where use_sliding_window says so."""
  if not values.flag('use_sliding_window', False):
    values, size = Reader({**values.values, 'sliding_window': None}, values.where), None
  return read_windows(values, local, size)


def qwen(values: Reader, base: ModelConfig) -> ModelConfig:
  """As Llama, with a window from layer max_window_layers on where it is used."""
  full = values.get('max_window_layers', int)
  first = 28 if full is None else full
  return dataclasses.replace(shared(values, base), **used_windows(
      values, lambda i: i >= first, 4096))


def read_qwen2(values: Reader, base: ModelConfig) -> ModelConfig:
  """As Llama; biases are in the maps to queries, keys and values alone, unless it says not."""
  return dataclasses.replace(
      qwen(values, base), qkv_bias=values.flag('attention_bias', True), out_bias=False)


def read_qwen3(values: Reader, base: ModelConfig) -> ModelConfig:
  """As Llama; queries and keys are normed."""
  return dataclasses.replace(qwen(values, base), qk_norm=True)


def similar(config: ModelConfig, *known: str) -> bool:
  """Whether a model is built like a Llama, biases, norms of queries and keys and what is known
  apart."""
  return (plain(config, *known) and config.norm == 'rms' and config.mlp == 'swiglu'
          and config.position_embedding == 'rotary' and not config.fused_qkv
          and not config.bias)


def fits(config: ModelConfig) -> bool:
  """Whether a model is a Llama."""
  return similar(config) and not config.qk_norm and config.qkv_bias == config.out_bias


def fits_mistral(config: ModelConfig) -> bool:
  """Whether a model is a Mistral with windows; one without is a Llama."""
  return (similar(config, 'window') and not config.qk_norm and not config.qkv_bias
          and not config.out_bias and not config.mlp_bias)


def fits_qwen2(config: ModelConfig) -> bool:
  """Whether a model is a Qwen 2."""
  return (similar(config, 'window', 'window_layers') and not config.qk_norm
          and config.qkv_bias and not config.out_bias and not config.mlp_bias)


def fits_qwen3(config: ModelConfig) -> bool:
  """Whether a model is a Qwen 3."""
  return (similar(config, 'window', 'window_layers') and config.qk_norm
          and config.qkv_bias == config.out_bias and not config.mlp_bias)


def write_shared(config: ModelConfig) -> dict[str, Any]:
  """The keys of a config.json that the families share."""
  return {
      'num_hidden_layers': config.num_layers, 'hidden_size': config.embed_dim,
      'num_attention_heads': config.num_heads,
      'num_key_value_heads': config.num_kv_heads or config.num_heads,
      'head_dim': config.head_dim or config.embed_dim // config.num_heads,
      'intermediate_size': config.mlp_dim, 'max_position_embeddings': config.max_positions,
      'rms_norm_eps': config.norm_epsilon, 'hidden_act': 'silu', **write_rope(config.rope)}


def write_mistral(config: ModelConfig) -> dict[str, Any]:
  """The keys of a Mistral."""
  return {**write_shared(config), 'sliding_window': config.window or None}


def write_qwen2(config: ModelConfig) -> dict[str, Any]:
  """The keys of a Qwen 2."""
  return {**write_shared(config), **({
      'use_sliding_window': True, 'sliding_window': config.window,
      'layer_types': write_types(config)} if config.window else {})}


def write_qwen3(config: ModelConfig) -> dict[str, Any]:
  """The keys of a Qwen 3."""
  return {**write_qwen2(config), 'attention_bias': config.qkv_bias}


def write(config: ModelConfig) -> dict[str, Any]:
  """The keys of a Llama."""
  return {**write_shared(config), 'attention_bias': config.qkv_bias,
          'mlp_bias': config.mlp_bias}


NORMS = {
    'before': {'norm_1': 'input_layernorm', 'norm_2': 'post_attention_layernorm'},
    'after': {'post_norm_1': 'post_attention_layernorm',
              'post_norm_2': 'post_feedforward_layernorm'},
    'both': {'norm_1': 'input_layernorm', 'post_norm_1': 'post_attention_layernorm',
             'norm_2': 'pre_feedforward_layernorm',
             'post_norm_2': 'post_feedforward_layernorm'}}


def outer(config: ModelConfig) -> list[Name]:
  """The names of the table and of the norms of the residual stream."""
  return [Name(('embedding',), 'embed_tokens.weight'), Name(('norm', 'scale'), 'norm.weight'),
          *(Name(('block_{}', ours, 'scale'), f'layers.{{}}.{theirs}.weight')
            for ours, theirs in NORMS[config.norm_place].items())]


def tensors(config: ModelConfig) -> list[Name]:
  """The names of the tensors, of all these families."""
  names = outer(config)
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
MISTRAL = Family('mistral', 'MistralForCausalLM', KEYS, read_mistral, fits_mistral,
                 write_mistral, tensors)
QWEN2 = Family('qwen2', 'Qwen2ForCausalLM', WINDOWED, read_qwen2, fits_qwen2, write_qwen2,
               tensors)
QWEN3 = Family('qwen3', 'Qwen3ForCausalLM', WINDOWED, read_qwen3, fits_qwen3, write_qwen3,
               tensors)
