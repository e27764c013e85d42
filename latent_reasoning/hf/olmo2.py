"""OLMo 2 (arXiv 2501.00656): a Llama whose attention and MLP norm what they add, not what they
read, with norms of all heads' queries and keys together."""

import dataclasses

from latent_reasoning.config import ModelConfig
from latent_reasoning.hf import llama
from latent_reasoning.hf.family import Family, Reader


def read(values: Reader, base: ModelConfig) -> ModelConfig:
  """The model of a config.json."""
  return dataclasses.replace(llama.shared(values, base), norm_place='after', qk_norm=True,
                             qk_norm_over='heads', mlp_bias=False)


def fits(config: ModelConfig) -> bool:
  """Whether a model is an OLMo 2."""
  return (llama.similar(config, 'norm_place', 'qk_norm_over') and config.norm_place == 'after'
          and config.qk_norm and config.qk_norm_over == 'heads' and not config.mlp_bias
          and config.qkv_bias == config.out_bias)


OLMO2 = Family('olmo2', 'Olmo2ForCausalLM', llama.KEYS - {
    'mlp_bias', 'sliding_window', 'layer_types'}, read, fits, llama.write_qwen3, llama.tensors)
