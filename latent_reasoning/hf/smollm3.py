"""SmolLM3 (Bakouch et al. 2025): a Llama, of whose layers every fourth has no positions
(Yang et al., arXiv 2501.18795)."""

import dataclasses
from typing import Any

from latent_reasoning.config import ModelConfig
from latent_reasoning.errors import ensure
from latent_reasoning.hf import llama
from latent_reasoning.hf.family import Family, Reader, among, read_rope, short, write_types


def read(values: Reader, base: ModelConfig) -> ModelConfig:
  """The model of a config.json."""
  count, turned = values.size('num_hidden_layers'), values.get('no_rope_layers', list)
  every = values.size('no_rope_layer_interval', 4)
  if turned is None:
    turned = [int((i + 1) % every != 0) for i in range(count)]
  ensure(len(turned) >= count and all(among(a, (0, 1)) for a in turned),
         f'{values.where}: no_rope_layers is {short(turned)}; expected for each of {count} '
         'layers 1, with positions, or 0, without')
  without = tuple(i for i in range(count) if not turned[i])
  return dataclasses.replace(
      llama.shared(values, base, read_rope(values, base=2e6), tied=True),
      no_rope_layers=without, **llama.used_windows(values, lambda i: i in without))


def fits(config: ModelConfig) -> bool:
  """Whether a model is a SmolLM3."""
  return (llama.similar(config, 'window', 'window_layers', 'no_rope_layers')
          and not config.qk_norm and config.qkv_bias == config.out_bias)


def write(config: ModelConfig) -> dict[str, Any]:
  """The keys of its config.json."""
  return {**llama.write(config), 'use_sliding_window': bool(config.window),
          'sliding_window': config.window or None, 'layer_types': write_types(config),
          'no_rope_layers': [int(i not in config.no_rope_layers)
                             for i in range(config.num_layers)]}


SMOLLM3 = Family(
    'smollm3', 'SmolLM3ForCausalLM',
    llama.WINDOWED | {'no_rope_layers', 'no_rope_layer_interval'}, read, fits, write,
    llama.tensors)
