"""The families of pretrained models: a config.json in and out, and the names of tensors.

A family is a file of this room and an entry in FAMILIES. A key of a config.json that changes
what is computed, in a way that is not computed here, is refused by name.
"""

import sys
from typing import Any

from latent_reasoning.config import ModelConfig
from latent_reasoning.errors import InputError, ensure
from latent_reasoning.hf.family import (
  CHANGING,
  INERT,
  NONE_OF_IT,
  Family,
  Name,
  Reader,
  among,
  short,
)
from latent_reasoning.hf.gemma import GEMMA2, GEMMA3
from latent_reasoning.hf.gpt2 import GPT2
from latent_reasoning.hf.gpt_neox import GPT_NEOX
from latent_reasoning.hf.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from latent_reasoning.hf.olmo2 import OLMO2
from latent_reasoning.hf.phi3 import PHI3
from latent_reasoning.hf.smollm3 import SMOLLM3

FAMILIES = {family.model_type: family for family in (
    GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, OLMO2, SMOLLM3, GPT_NEOX, PHI3, GEMMA2, GEMMA3)}

# Constants that old files hold as tensors.
BUFFERS = (r'h\.\d+\.attn\.(bias|masked_bias)|layers\.\d+\.self_attn\.rotary_emb\.inv_freq|'
           r'layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)')


def find(config: ModelConfig) -> Family:
  """The family that a model is of.

  Raises:
    InputError: transformers has no family that computes the same.
  """
  for family in FAMILIES.values():
    if family.fits(config):
      return family
  parts = ', '.join(f'{name}={getattr(config, name)!r}' for name in (
      'norm', 'mlp', 'fused_qkv', 'position_embedding', 'bias', 'qkv_bias', 'out_bias',
      'mlp_bias', 'qk_norm', *(k for k, v in NONE_OF_IT.items() if getattr(config, k) != v)))
  raise InputError(f'the model is of no family of transformers (config.model has {parts}); '
                   f'expected the parts of one of {tuple(FAMILIES)}')


def names(config: ModelConfig) -> dict[str, tuple[Name, int | None]]:
  """{name in a file without prefix: (its entry, its layer)}."""
  found = {}
  family = find(config)
  head = [Name(('head',), family.head, True)] * (not config.tie_embeddings)
  for name in family.tensors(config) + head:
    layers = range(config.num_layers) if '{}' in name.theirs else [None]
    for layer in layers:
      found[name.theirs.format(layer)] = (name, layer)
  return found


def model_config(values: dict[str, Any], base: ModelConfig, where: str) -> ModelConfig:
  """The sizes and switches of a config.json, over those of `base`.

  A key that changes the computation is computed or refused, by name and value; a key that
  changes nothing passes; one that nobody knows passes with a warning, unless `transformers`
  is installed, knows it, and has another value for it.

  Args:
    values: what config.json holds.
    base: keeps what a checkpoint does not say: dtype, attention, scan, remat.
    where: the file, for errors.

  Raises:
    InputError: an architecture or a computation that is not supported, or a value that no
      model can have.
  """
  kind = values.get('model_type')
  if not isinstance(kind, str) or kind not in FAMILIES:
    raise InputError(f"{where}: model_type is {kind!r}; expected one of {tuple(FAMILIES)} "
                     '(SmolLM2 is llama, Pythia gpt_neox)')
  read, family = Reader(values, where), FAMILIES[kind]
  for key, value in values.items():
    if key in CHANGING.keys() - family.keys and not among(value, CHANGING[key]):
      raise InputError(f'{where}: {key} is {short(value)}, which is not computed here; '
                       f'supported: {CHANGING[key]}')
    if key not in INERT | family.keys | CHANGING.keys() and not key.startswith('_'):  # of files
      _unknown(key, value, kind, where)
  config = family.read(read, base)
  size = config.head_dim or config.embed_dim // config.num_heads
  ensure(values.get('head_dim') or not config.embed_dim % config.num_heads,
         f'{where}: {config.num_heads} heads do not divide the width {config.embed_dim}')
  ensure(not config.num_heads % (config.num_kv_heads or config.num_heads),
         f'{where}: {config.num_kv_heads} heads of keys and values do not divide '
         f'{config.num_heads}')
  turned = int(size * config.rope.fraction)
  ensure(config.position_embedding != 'rotary' or turned and not turned % 2,
         f'{where}: heads are {turned} wide; rotary positions need an even number')
  read.size('vocab_size')
  return config


def _unknown(key: str, value: Any, kind: str, where: str) -> None:
  """Says that nobody here knows a key; refuses one of which transformers says otherwise."""
  default = _default_of(kind, key)
  if default is not None and default[0] == value:
    return
  if default is not None:
    raise InputError(f'{where}: the key {key!r} ({short(value)}) is not known here, and '
                     f'transformers computes something with it (its default is {default[0]!r})')
  print(f'warning: {where} has the key {key!r} ({short(value)}), which is not known here; it '
        'is left out', file=sys.stderr)


def _default_of(kind: str, key: str) -> tuple[Any] | None:
  """What transformers takes for a key of a model's config; None: it has none, or is absent."""
  try:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    known = CONFIG_MAPPING[kind]().__dict__
  except (ImportError, KeyError):
    return None
  return (known[key],) if key in known else None


def hf_config(config: ModelConfig, vocab: int, **ids: int) -> dict[str, Any]:
  """A config.json from which `model_config` and transformers build this model."""
  family = find(config)
  return {'model_type': family.model_type, 'architectures': [family.architecture],
          'vocab_size': vocab, 'tie_word_embeddings': config.tie_embeddings,
          'dtype': 'float32', **family.write(config), **ids}
