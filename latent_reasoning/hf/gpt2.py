"""GPT-2 (Radford et al. 2019): layer norm, one map to queries, keys and values, GELU."""

import dataclasses
from typing import Any

from latent_reasoning.config import ModelConfig
from latent_reasoning.hf.family import (
  NONE_OF_IT,
  Family,
  Name,
  Reader,
  dense,
  plain,
  read_activation,
  write_activation,
)


def read(values: Reader, base: ModelConfig) -> ModelConfig:
  """The model of a config.json."""
  width = values.size('n_embd')
  return dataclasses.replace(
      base, **{**NONE_OF_IT, 'activation': read_activation(
          values, 'activation_function', 'gelu_new', 'gelu')},
      norm='layer', mlp='gelu', fused_qkv=True, position_embedding='learned', bias=True,
      qkv_bias=False, out_bias=False, mlp_bias=False, qk_norm=False,
      num_layers=values.size('n_layer'), embed_dim=width, num_heads=values.size('n_head'),
      num_kv_heads=0, head_dim=0, mlp_dim=values.size('n_inner', 4 * width),
      max_positions=values.size('n_positions'),
      tie_embeddings=values.flag('tie_word_embeddings', True),
      norm_epsilon=values.number('layer_norm_epsilon', 1e-5))


def fits(config: ModelConfig) -> bool:
  """Whether a model is a GPT-2."""
  return (config.norm == 'layer' and config.mlp == 'gelu' and config.fused_qkv and config.bias
          and config.position_embedding == 'learned' and not config.qk_norm
          and config.num_kv_heads in (0, config.num_heads) and config.head_dim in (
              0, config.embed_dim // config.num_heads)
          and plain(config, 'activation', rope=('multiplier', 'fraction', 'local_base')))


def write(config: ModelConfig) -> dict[str, Any]:
  """The keys of its config.json."""
  return {'n_layer': config.num_layers, 'n_embd': config.embed_dim, 'n_head': config.num_heads,
          'n_inner': config.mlp_dim, 'n_positions': config.max_positions,
          'layer_norm_epsilon': config.norm_epsilon,
          'activation_function': write_activation(config)}


def tensors(config: ModelConfig) -> list[Name]:
  """The names of its tensors."""
  names = [Name(('embedding',), 'wte.weight'), Name(('position_embedding',), 'wpe.weight')]
  for ours, theirs in (('norm_1', 'h.{}.ln_1'), ('norm_2', 'h.{}.ln_2')):
    names += [Name(('block_{}', ours, 'scale'), f'{theirs}.weight'),
              Name(('block_{}', ours, 'bias'), f'{theirs}.bias')]
  for ours, theirs in (('qkv', 'attn.c_attn'), ('out', 'attn.c_proj'), ('up', 'mlp.c_fc'),
                       ('down', 'mlp.c_proj')):  # Conv1D, [in, out] as here
    names += dense(ours, f'h.{{}}.{theirs}', False, True)
  return [*names, Name(('norm', 'scale'), 'ln_f.weight'), Name(('norm', 'bias'), 'ln_f.bias')]


GPT2 = Family(
    'gpt2', 'GPT2LMHeadModel',
    frozenset(('n_layer', 'n_embd', 'n_head', 'n_inner', 'n_positions', 'layer_norm_epsilon',
               'activation_function')),
    read, fits, write, tensors, prefix='transformer.', conv1d=True)
