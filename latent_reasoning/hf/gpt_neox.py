"""GPT-NeoX (arXiv 2204.06745), of which Pythia is: attention and the MLP read the same residual
stream, a part of each head is turned, and one map has the queries, keys and values of one head
after another."""

import dataclasses
from typing import Any

from latent_reasoning.config import ModelConfig
from latent_reasoning.errors import ensure
from latent_reasoning.hf.family import (
  NONE_OF_IT,
  Family,
  Name,
  Reader,
  dense,
  plain,
  read_activation,
  read_rope,
  write_activation,
  write_rope,
)


def read(values: Reader, base: ModelConfig) -> ModelConfig:
  """The model of a config.json."""
  ensure(values.flag('attention_bias', True), f'{values.where}: attention_bias is False, which '
         'is not computed here for gpt_neox; supported: True')
  rope = read_rope(values, values.number('rotary_pct', 0.25),
                   values.number('rotary_emb_base', 10_000.0))
  own = {'activation': read_activation(values, 'hidden_act', 'gelu', 'gelu'),
         'parallel': values.flag('use_parallel_residual', True)}
  return dataclasses.replace(
      base, **{**NONE_OF_IT, **own}, norm='layer', mlp='gelu', fused_qkv=True,
      position_embedding='rotary', bias=True, qkv_bias=False, out_bias=False, mlp_bias=False,
      qk_norm=False, num_layers=values.size('num_hidden_layers'),
      embed_dim=values.size('hidden_size'), num_heads=values.size('num_attention_heads'),
      num_kv_heads=0, head_dim=0, mlp_dim=values.size('intermediate_size'),
      max_positions=values.size('max_position_embeddings'),
      tie_embeddings=values.flag('tie_word_embeddings', False),
      norm_epsilon=values.number('layer_norm_eps', 1e-5), rope=rope)


def fits(config: ModelConfig) -> bool:
  """Whether a model is a GPT-NeoX."""
  c = config
  return (plain(c, 'activation', 'parallel', rope=('fraction', 'multiplier'))
          and c.norm == 'layer' and c.mlp == 'gelu' and c.fused_qkv and c.bias
          and c.position_embedding == 'rotary' and not c.qk_norm
          and c.num_kv_heads in (0, c.num_heads)
          and c.head_dim in (0, c.embed_dim // c.num_heads))


def write(config: ModelConfig) -> dict[str, Any]:
  """The keys of its config.json."""
  rope = write_rope(config.rope)
  rope['rope_parameters']['partial_rotary_factor'] = config.rope.fraction
  return {'num_hidden_layers': config.num_layers, 'hidden_size': config.embed_dim,
          'num_attention_heads': config.num_heads, 'intermediate_size': config.mlp_dim,
          'max_position_embeddings': config.max_positions,
          'hidden_act': write_activation(config), 'layer_norm_eps': config.norm_epsilon,
          'use_parallel_residual': config.parallel,
          'rotary_pct': config.rope.fraction, 'rotary_emb_base': config.rope.base, **rope}


def tensors(config: ModelConfig) -> list[Name]:
  """The names of its tensors."""
  names = [Name(('embedding',), 'embed_in.weight')]
  for ours, theirs in ((('block_{}', 'norm_1'), 'layers.{}.input_layernorm'),
                       (('block_{}', 'norm_2'), 'layers.{}.post_attention_layernorm'),
                       (('norm',), 'final_layer_norm')):
    names += [Name((*ours, 'scale'), f'{theirs}.weight'),
              Name((*ours, 'bias'), f'{theirs}.bias')]
  names += dense('qkv', 'layers.{}.attention.query_key_value', True, True, config.num_heads)
  for ours, theirs in (('out', 'attention.dense'), ('up', 'mlp.dense_h_to_4h'),
                       ('down', 'mlp.dense_4h_to_h')):
    names += dense(ours, f'layers.{{}}.{theirs}', True, True)
  return names


GPT_NEOX = Family(
    'gpt_neox', 'GPTNeoXForCausalLM',
    frozenset(('hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads',
               'hidden_act', 'layer_norm_eps', 'max_position_embeddings', 'rope_theta',
               'rope_scaling', 'rope_parameters', 'rotary_pct', 'rotary_emb_base',
               'partial_rotary_factor', 'use_parallel_residual', 'attention_bias')),
    read, fits, write, tensors, prefix='gpt_neox.', head='embed_out.weight')
