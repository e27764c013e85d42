"""Gemma 2 (arXiv 2408.00118) and the text models of Gemma 3 (arXiv 2503.19786).

A Llama whose embeddings are scaled by sqrt(D), with norms by 1 + scale of what attention and
the MLP read and of what they add, a gated GELU, and layers with and without a window. Gemma 2
caps logits; Gemma 3 norms queries and keys, and its layers with a window have a rotary base of
their own.
"""

import dataclasses
from typing import Any

from latent_reasoning.config import ModelConfig, RopeConfig
from latent_reasoning.errors import ensure
from latent_reasoning.hf import llama
from latent_reasoning.hf.family import (
  Family,
  Reader,
  plain,
  read_activation,
  read_rope,
  read_windows,
  short,
  write_activation,
  write_rope,
  write_types,
)

GELU = 'gelu_pytorch_tanh'
CAPS = ('attn_logit_softcapping', 'final_logit_softcapping')
KEYS = llama.KEYS - {'mlp_bias'} | {
    'hidden_act', 'hidden_activation', 'query_pre_attn_scalar', *CAPS}
PLACES = {'full_attention', 'sliding_attention'}  # of rope_parameters


def shared(values: Reader, base: ModelConfig, rope: RopeConfig, caps: tuple[float, float],
           windows: dict[str, Any]) -> ModelConfig:
  """The model of a config.json; `caps` hold where it does not say."""
  size = values.size('head_dim', 256)
  scalar = values.number('query_pre_attn_scalar', 256.0)
  attention, head = (values.number(key, 0.0) if key in values.values else cap
                     for key, cap in zip(CAPS, caps, strict=True))
  return dataclasses.replace(
      llama.shared(values, base, rope, tied=True), norm='rms_zero_centered', norm_place='both',
      scale_embeddings=True, head_dim=size, mlp_bias=False,
      activation=read_activation(values, 'hidden_activation', GELU, 'swiglu'),
      attention_scale=0.0 if scalar == size else scalar**-0.5, attention_cap=attention,
      logit_cap=head, **windows)


def read_gemma2(values: Reader, base: ModelConfig) -> ModelConfig:
  """Every second layer has a window, the first has."""
  return shared(values, base, read_rope(values), (50.0, 30.0),
                read_windows(values, lambda i: i % 2 == 0, 4096))


def read_gemma3(values: Reader, base: ModelConfig) -> ModelConfig:
  """All layers but every sixth have a window, and a rotary base of their own."""
  both = values.get('rope_parameters', dict) or {}
  ensure(both.keys() <= PLACES and all(isinstance(a, dict | None) for a in both.values()),
         f'{values.where}: rope_parameters is {short(both)}; expected {sorted(PLACES)}')
  rope, local = (Reader({**values.values, **more, 'rope_parameters': both.get(place) or {}},
                        values.where) for place, more in (
      ('full_attention', {}), ('sliding_attention', {
          'rope_scaling': None, 'rope_theta': values.get(
              'rope_local_base_freq', (int, float))})))
  rope = read_rope(rope, base=1e6, supported=('default', 'linear', 'llama3', 'dynamic'))
  own = read_rope(local, base=1e4, supported=('default',)).base
  every = values.size('sliding_window_pattern', 6)
  windows = read_windows(values, lambda i: (i + 1) % every != 0, 4096, keep=True)
  if not windows['window']:
    own = 0.0
  return dataclasses.replace(
      shared(values, base, dataclasses.replace(rope, local_base=own), (0.0, 0.0), windows),
      qk_norm=True)


def similar(config: ModelConfig, *rope: str) -> bool:
  """Whether a model is a Gemma, norms of queries and keys apart."""
  c = config
  return (plain(c, 'scale_embeddings', 'norm_place', 'activation', 'attention_scale',
                'attention_cap', 'logit_cap', 'window', 'window_layers', rope=rope)
          and c.norm == 'rms_zero_centered' and c.norm_place == 'both' and c.scale_embeddings
          and c.mlp == 'swiglu' and not c.fused_qkv and c.position_embedding == 'rotary'
          and not c.bias and not c.mlp_bias and c.qkv_bias == c.out_bias
          and not c.embed_dim % c.num_heads)


def fits_gemma2(config: ModelConfig) -> bool:
  """Whether a model is a Gemma 2."""
  return similar(config, 'multiplier') and not config.qk_norm


def fits_gemma3(config: ModelConfig) -> bool:
  """Whether a model is a Gemma 3."""
  return similar(config, 'local_base') and config.qk_norm


def write_gemma2(config: ModelConfig) -> dict[str, Any]:
  """The keys of a Gemma 2."""
  c, found = config, llama.write_shared(config)
  act = GELU if c.nonlinearity == 'gelu_tanh' else write_activation(c)
  scalar = c.attention_scale**-2 if c.attention_scale else found['head_dim']
  return {**found, 'attention_bias': c.qkv_bias, 'hidden_act': act, 'hidden_activation': act,
          'query_pre_attn_scalar': round(scalar),
          'attn_logit_softcapping': c.attention_cap or None,
          'final_logit_softcapping': c.logit_cap or None, 'layer_types': write_types(c),
          'sliding_window': c.window or c.max_positions}


def write_gemma3(config: ModelConfig) -> dict[str, Any]:
  """The keys of a Gemma 3."""
  rope = write_rope(dataclasses.replace(config.rope, local_base=0.0))
  local = config.rope.local_base or config.rope.base
  return {**write_gemma2(config), **rope, 'rope_local_base_freq': local, 'rope_parameters': {
      'full_attention': rope['rope_parameters'],
      'sliding_attention': {'rope_type': 'default', 'rope_theta': local}}}


GEMMA2 = Family('gemma2', 'Gemma2ForCausalLM', KEYS, read_gemma2, fits_gemma2, write_gemma2,
                llama.tensors)
GEMMA3 = Family('gemma3_text', 'Gemma3ForCausalLM', KEYS | {
    'rope_local_base_freq', 'sliding_window_pattern'}, read_gemma3, fits_gemma3, write_gemma3,
    llama.tensors)
