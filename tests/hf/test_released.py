"""The config.json of released models, key by key: accepted without a word, of the right size,
with a place on a mesh for each parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_reasoning.config import MeshConfig
from latent_reasoning.hf import families
from latent_reasoning.models import masks
from latent_reasoning.models.transformer import Transformer
from latent_reasoning.parallel import sharding

FULL, SLIDING = 'full_attention', 'sliding_attention'
RELEASED = {
    'allenai/OLMo-2-0425-1B': (1_484_916_736, {
        'architectures': ['Olmo2ForCausalLM'], 'attention_bias': False,
        'attention_dropout': 0.0, 'eos_token_id': 100257, 'hidden_act': 'silu',
        'hidden_size': 2048, 'initializer_range': 0.02, 'intermediate_size': 8192,
        'max_position_embeddings': 4096, 'model_type': 'olmo2', 'num_attention_heads': 16,
        'num_hidden_layers': 16, 'num_key_value_heads': 16, 'pad_token_id': 100277,
        'rms_norm_eps': 1e-06, 'rope_scaling': None, 'rope_theta': 500000,
        'tie_word_embeddings': False, 'torch_dtype': 'float32',
        'transformers_version': '4.47.0', 'use_cache': True, 'vocab_size': 100352}),
    'HuggingFaceTB/SmolLM3-3B': (3_075_098_624, {
        'architectures': ['SmolLM3ForCausalLM'], 'attention_bias': False,
        'attention_dropout': 0.0, 'bos_token_id': None, 'eos_token_id': 128012,
        'hidden_act': 'silu', 'hidden_size': 2048, 'initializer_range': 0.02,
        'intermediate_size': 11008, 'layer_types': [FULL] * 36,
        'max_position_embeddings': 65536, 'max_window_layers': 28, 'mlp_bias': False,
        'model_type': 'smollm3', 'no_rope_layer_interval': 4,
        'no_rope_layers': [1, 1, 1, 0] * 9, 'num_attention_heads': 16,
        'num_hidden_layers': 36, 'num_key_value_heads': 4, 'pad_token_id': 128004,
        'pretraining_tp': 2, 'rms_norm_eps': 1e-06, 'rope_scaling': None,
        'rope_theta': 5000000.0, 'sliding_window': None, 'torch_dtype': 'bfloat16',
        'transformers_version': '4.54.0.dev0', 'use_cache': False,
        'use_sliding_window': False, 'vocab_size': 128256}),
    'EleutherAI/pythia-70m': (70_426_624, {
        'architectures': ['GPTNeoXForCausalLM'], 'bos_token_id': 0, 'eos_token_id': 0,
        'hidden_act': 'gelu', 'hidden_size': 512, 'initializer_range': 0.02,
        'intermediate_size': 2048, 'layer_norm_eps': 1e-05, 'max_position_embeddings': 2048,
        'model_type': 'gpt_neox', 'num_attention_heads': 8, 'num_hidden_layers': 6,
        'rotary_emb_base': 10000, 'rotary_pct': 0.25, 'tie_word_embeddings': False,
        'torch_dtype': 'float16', 'transformers_version': '4.24.0', 'use_cache': True,
        'use_parallel_residual': True, 'vocab_size': 50304}),
    'microsoft/Phi-3-mini-4k-instruct': (3_821_079_552, {
        '_name_or_path': 'Phi-3-mini-4k-instruct', 'architectures': ['Phi3ForCausalLM'],
        'attention_bias': False, 'attention_dropout': 0.0, 'auto_map': {
            'AutoConfig': 'configuration_phi3.Phi3Config',
            'AutoModelForCausalLM': 'modeling_phi3.Phi3ForCausalLM'},
        'bos_token_id': 1, 'embd_pdrop': 0.0, 'eos_token_id': 32000, 'hidden_act': 'silu',
        'hidden_size': 3072, 'initializer_range': 0.02, 'intermediate_size': 8192,
        'max_position_embeddings': 4096, 'model_type': 'phi3', 'num_attention_heads': 32,
        'num_hidden_layers': 32, 'num_key_value_heads': 32,
        'original_max_position_embeddings': 4096, 'pad_token_id': 32000, 'resid_pdrop': 0.0,
        'rms_norm_eps': 1e-05, 'rope_scaling': None, 'rope_theta': 10000.0,
        'sliding_window': 2047, 'tie_word_embeddings': False, 'torch_dtype': 'bfloat16',
        'transformers_version': '4.40.2', 'use_cache': True, 'vocab_size': 32064}),
    'mistralai/Mistral-7B-v0.1': (7_241_732_096, {
        'architectures': ['MistralForCausalLM'], 'bos_token_id': 1, 'eos_token_id': 2,
        'hidden_act': 'silu', 'hidden_size': 4096, 'initializer_range': 0.02,
        'intermediate_size': 14336, 'max_position_embeddings': 32768,
        'model_type': 'mistral', 'num_attention_heads': 32, 'num_hidden_layers': 32,
        'num_key_value_heads': 8, 'rms_norm_eps': 1e-05, 'rope_theta': 10000.0,
        'sliding_window': 4096, 'tie_word_embeddings': False, 'torch_dtype': 'bfloat16',
        'transformers_version': '4.34.0.dev0', 'use_cache': True, 'vocab_size': 32000}),
    'Qwen/Qwen3-0.6B': (596_049_920, {
        'architectures': ['Qwen3ForCausalLM'], 'attention_bias': False,
        'attention_dropout': 0.0, 'bos_token_id': 151643, 'eos_token_id': 151645,
        'head_dim': 128, 'hidden_act': 'silu', 'hidden_size': 1024,
        'initializer_range': 0.02, 'intermediate_size': 3072,
        'max_position_embeddings': 40960, 'max_window_layers': 28, 'model_type': 'qwen3',
        'num_attention_heads': 16, 'num_hidden_layers': 28, 'num_key_value_heads': 8,
        'rms_norm_eps': 1e-06, 'rope_scaling': None, 'rope_theta': 1000000,
        'sliding_window': None, 'tie_word_embeddings': True, 'torch_dtype': 'bfloat16',
        'transformers_version': '4.51.0', 'use_cache': True, 'use_sliding_window': False,
        'vocab_size': 151936}),
    'google/gemma-2-2b': (2_614_341_888, {
        'architectures': ['Gemma2ForCausalLM'], 'attention_bias': False,
        'attention_dropout': 0.0, 'attn_logit_softcapping': 50.0, 'bos_token_id': 2,
        'cache_implementation': 'hybrid', 'eos_token_id': 1,
        'final_logit_softcapping': 30.0, 'head_dim': 256, 'hidden_act': 'gelu_pytorch_tanh',
        'hidden_activation': 'gelu_pytorch_tanh', 'hidden_size': 2304,
        'initializer_range': 0.02, 'intermediate_size': 9216,
        'max_position_embeddings': 8192, 'model_type': 'gemma2', 'num_attention_heads': 8,
        'num_hidden_layers': 26, 'num_key_value_heads': 4, 'pad_token_id': 0,
        'query_pre_attn_scalar': 256, 'rms_norm_eps': 1e-06, 'rope_theta': 10000.0,
        'sliding_window': 4096, 'torch_dtype': 'float32', 'transformers_version': '4.42.4',
        'use_cache': True, 'vocab_size': 256000}),
    'google/gemma-3-270m': (268_098_176, {
        '_sliding_window_pattern': 6, 'architectures': ['Gemma3ForCausalLM'],
        'attention_bias': False, 'attention_dropout': 0.0, 'attn_logit_softcapping': None,
        'bos_token_id': 2, 'eos_token_id': 1, 'final_logit_softcapping': None,
        'head_dim': 256, 'hidden_activation': 'gelu_pytorch_tanh', 'hidden_size': 640,
        'initializer_range': 0.02, 'intermediate_size': 2048,
        'layer_types': [*[SLIDING] * 5, FULL] * 3, 'max_position_embeddings': 32768,
        'model_type': 'gemma3_text', 'num_attention_heads': 4, 'num_hidden_layers': 18,
        'num_key_value_heads': 1, 'pad_token_id': 0, 'query_pre_attn_scalar': 256,
        'rms_norm_eps': 1e-06, 'rope_local_base_freq': 10000.0, 'rope_scaling': None,
        'rope_theta': 1000000.0, 'sliding_window': 512, 'torch_dtype': 'bfloat16',
        'transformers_version': '4.55.0.dev0', 'use_bidirectional_attention': False,
        'use_cache': True, 'vocab_size': 262144})}
PARTS = {  # (window, how many layers have it, how many have no positions)
    'HuggingFaceTB/SmolLM3-3B': (0, 0, 9), 'microsoft/Phi-3-mini-4k-instruct': (2047, 0, 0),
    'mistralai/Mistral-7B-v0.1': (4096, 0, 0), 'google/gemma-2-2b': (4096, 13, 0),
    'google/gemma-3-270m': (512, 15, 0)}


@pytest.mark.parametrize('name', RELEASED)
def test_released(tiny_config, name, capsys):
  """As many parameters as the release has, each with a rule of its place."""
  count, values = RELEASED[name]
  config = tiny_config(**{'model.scan': True})
  model = families.model_config(values, config.model, name)
  assert not capsys.readouterr().err
  assert (model.window, len(model.window_layers), len(model.no_rope_layers)) == PARTS.get(
      name, (0, 0, 0))
  tokens = jnp.zeros((1, 4), jnp.int32)
  like = jax.eval_shape(Transformer(model, values['vocab_size']).init, jax.random.key(0),
                        tokens, tokens, masks.plain(1, 4))['params']
  assert sum(int(np.prod(a.shape)) for a in jax.tree.leaves(like)) == count
  mesh = sharding.make(MeshConfig(), jax.devices()[:1])
  sharding.parameters(config.replace(**{
      f'model.{k}': v for k, v in (('tie_embeddings', model.tie_embeddings),
                                   ('position_embedding', 'rotary'))}), like, mesh)
  assert families.model_config(families.hf_config(model, 8), config.model, name) == model
