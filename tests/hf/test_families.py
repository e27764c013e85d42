"""What a config.json of Hugging Face means: taken, refused by name, or told to be unknown."""

import pathlib
import runpy

import pytest

from latent_reasoning.errors import InputError
from latent_reasoning.hf import families
from latent_reasoning.planning import estimate

SMALL = {'hidden_size': 24, 'intermediate_size': 40, 'num_hidden_layers': 2,
         'num_attention_heads': 4, 'vocab_size': 37, 'max_position_embeddings': 64}
LLAMA3 = {'rope_type': 'llama3', 'rope_theta': 5e5, 'factor': 8.0, 'low_freq_factor': 1.0,
          'high_freq_factor': 4.0, 'original_max_position_embeddings': 16}


@pytest.fixture
def base(tiny_config):
  return tiny_config().model


def test_old_spellings(base):
  """Rotary positions as transformers 4 wrote them are those of version 5."""
  new = {**SMALL, 'model_type': 'llama', 'rms_norm_eps': 1e-5, 'rope_parameters': LLAMA3}
  old = {**SMALL, 'model_type': 'llama', 'rms_norm_eps': 1e-5, 'rope_theta': 5e5,
         'rope_scaling': {k: v for k, v in LLAMA3.items() if k != 'rope_theta'}}
  assert (families.model_config(new, base, 'a')
          == families.model_config(old, base, 'b'))
  old['rope_scaling']['type'] = old['rope_scaling'].pop('rope_type')
  assert (families.model_config(new, base, 'a')
          == families.model_config(old, base, 'b'))


@pytest.mark.parametrize('changes, message', [
    ({'model_type': 'bert'}, "model_type is 'bert'; expected one of"),
    ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor is 0.5, which is not computed'),
    ({'hidden_act': 'gelu'}, "hidden_act is 'gelu', which is not computed"),
    ({'use_mrope': True}, 'use_mrope is True'), ({'quantization_config': {'bits': 4}}, 'bits'),
    ({'num_experts': 8}, 'num_experts is 8'), ({'pruned_heads': {'1': [0]}}, 'pruned_heads'),
    ({'num_hidden_layers': '12'}, "num_hidden_layers is '12'; expected int"),
    ({'num_hidden_layers': 1.5}, 'num_hidden_layers is 1.5; expected int'),
    ({'num_hidden_layers': -1}, 'num_hidden_layers is -1; expected at least 1'),
    ({'num_hidden_layers': 0}, 'num_hidden_layers is 0; expected at least 1'),
    ({'num_hidden_layers': True}, 'num_hidden_layers is True; expected int'),
    ({'num_hidden_layers': 10**40}, 'less than 2'),
    ({'num_attention_heads': 3, 'hidden_size': 8}, '3 heads do not divide the width 8'),
    ({'num_attention_heads': 4, 'hidden_size': 12}, 'rotary positions need'),
    ({'num_attention_heads': 4, 'num_key_value_heads': 3}, '3 heads of keys and values'),
    ({'hidden_size': float('nan')}, 'hidden_size is nan'), ({'rms_norm_eps': 0}, 'above 0'),
    ({'rms_norm_eps': float('nan')}, 'rms_norm_eps is nan'),
    ({'tie_word_embeddings': 'yes'}, "tie_word_embeddings is 'yes'; expected bool"),
    ({'rope_scaling': [1]}, r'rope_scaling is \[1\]; expected dict'),
    ({'rope_scaling': {'rope_type': 'linear', 'factor': 'a'}}, "factor is 'a'"),
    ({'vocab_size': None}, 'vocab_size is missing'), ({'model_type': ['llama']}, 'model_type'),
    ({'layer_types': 3}, 'layer_types is 3; expected list'),
    ({'layer_types': ['full_attention', 'sliding_attention']}, 'layer_types has'),
    ({'rope_parameters': {'rope_type': 'longrope', 'factor': 4.0}}, "'longrope'; supported"),
    ({'rope_parameters': {'rope_type': 'yarn', 'factor': 4.0, 'truncate': False}}, 'truncate'),
    ({'model_type': 'phi3', 'rope_scaling': {'type': 'longrope', 'short_factor': [1.0],
                                             'long_factor': [1.0]}}, "'longrope'; supported"),
    ({'model_type': 'phi3', 'attention_bias': True}, 'attention_bias is True'),
    ({'model_type': 'gpt_neox', 'attention_bias': False}, 'attention_bias is False'),
    ({'model_type': 'gpt_neox', 'hidden_act': 'mish'}, "hidden_act is 'mish', which is not"),
    ({'model_type': 'smollm3', 'no_rope_layers': [1]}, 'no_rope_layers is .1.; expected for'),
    ({'model_type': 'qwen2', 'use_sliding_window': True, 'layer_types': ['chunked'] * 2},
     'layer_types has .*supported'),
    ({'model_type': 'qwen2', 'layer_types': ['sliding_attention'] * 2}, 'says of no window'),
    ({'model_type': 'gemma3_text', 'rope_parameters': {'rope_type': 'yarn', 'factor': 4.0}},
     'rope_parameters is'),
    ({'model_type': 'gemma2', 'use_bidirectional_attention': True}, 'use_bidirectional'),
    ({'rope_parameters': {'rope_type': 'llama3', 'factor': 4.0}}, "'llama3' without"),
    ({'use_sliding_window': True}, 'use_sliding_window is True'),
    ({'rms_norm_eps': None, 'num_hidden_layers': None}, 'num_hidden_layers is missing')])
def test_unsupported_configuration(base, changes, message):
  """What a config.json says that we cannot do is named, not ignored."""
  values = {**SMALL, 'model_type': 'llama', 'rms_norm_eps': 1e-5, **changes}
  values = {k: v for k, v in values.items() if v is not None}
  with pytest.raises(InputError, match=message):
    families.model_config(values, base, 'config.json')


# The config.json of the recipes' checkpoints, as their publishers have them.
PUBLIC = {
    'openai-community/gpt2': {
        'activation_function': 'gelu_new', 'architectures': ['GPT2LMHeadModel'],
        'attn_pdrop': 0.1, 'bos_token_id': 50256, 'embd_pdrop': 0.1, 'eos_token_id': 50256,
        'initializer_range': 0.02, 'layer_norm_epsilon': 1e-05, 'model_type': 'gpt2',
        'n_ctx': 1024, 'n_embd': 768, 'n_head': 12, 'n_layer': 12, 'n_positions': 1024,
        'resid_pdrop': 0.1, 'summary_activation': None, 'summary_first_dropout': 0.1,
        'summary_proj_to_labels': True, 'summary_type': 'cls_index', 'summary_use_proj': True,
        'task_specific_params': {'text-generation': {'do_sample': True, 'max_length': 50}},
        'vocab_size': 50257},
    'meta-llama/Llama-3.2-1B': {
        'architectures': ['LlamaForCausalLM'], 'attention_bias': False,
        'attention_dropout': 0.0, 'bos_token_id': 128000, 'eos_token_id': 128001,
        'head_dim': 64, 'hidden_act': 'silu', 'hidden_size': 2048, 'initializer_range': 0.02,
        'intermediate_size': 8192, 'max_position_embeddings': 131072, 'mlp_bias': False,
        'model_type': 'llama', 'num_attention_heads': 32, 'num_hidden_layers': 16,
        'num_key_value_heads': 8, 'pretraining_tp': 1, 'rms_norm_eps': 1e-05,
        'rope_scaling': {'factor': 32.0, 'high_freq_factor': 4.0, 'low_freq_factor': 1.0,
                         'original_max_position_embeddings': 8192, 'rope_type': 'llama3'},
        'rope_theta': 500000.0, 'tie_word_embeddings': True, 'torch_dtype': 'bfloat16',
        'transformers_version': '4.45.0.dev0', 'use_cache': True, 'vocab_size': 128256},
    'HuggingFaceTB/SmolLM2-135M': {
        'architectures': ['LlamaForCausalLM'], 'attention_bias': False,
        'attention_dropout': 0.0, 'bos_token_id': 0, 'eos_token_id': 0, 'hidden_act': 'silu',
        'hidden_size': 576, 'initializer_range': 0.041666666666666664,
        'intermediate_size': 1536, 'is_llama_config': True, 'max_position_embeddings': 8192,
        'model_type': 'llama', 'num_attention_heads': 9, 'num_hidden_layers': 30,
        'num_key_value_heads': 3, 'pretraining_tp': 1, 'rms_norm_eps': 1e-05,
        'rope_interleaved': False, 'rope_scaling': None, 'rope_theta': 100000,
        'tie_word_embeddings': True, 'torch_dtype': 'bfloat16',
        'transformers_version': '4.40.1', 'use_cache': True, 'vocab_size': 49152},
    'Qwen/Qwen2.5-0.5B': {
        'architectures': ['Qwen2ForCausalLM'], 'attention_dropout': 0.0,
        'bos_token_id': 151643, 'eos_token_id': 151643, 'hidden_act': 'silu',
        'hidden_size': 896, 'initializer_range': 0.02, 'intermediate_size': 4864,
        'max_position_embeddings': 32768, 'max_window_layers': 24, 'model_type': 'qwen2',
        'num_attention_heads': 14, 'num_hidden_layers': 24, 'num_key_value_heads': 2,
        'rms_norm_eps': 1e-06, 'rope_theta': 1000000.0, 'sliding_window': 32768,
        'tie_word_embeddings': True, 'torch_dtype': 'bfloat16',
        'transformers_version': '4.40.1', 'use_cache': True, 'use_mrope': False,
        'use_sliding_window': False, 'vocab_size': 151936}}
PUBLIC['meta-llama/Llama-3.2-3B'] = {
    **PUBLIC['meta-llama/Llama-3.2-1B'], 'head_dim': 128, 'hidden_size': 3072,
    'num_attention_heads': 24, 'num_hidden_layers': 28}


@pytest.mark.parametrize('name', PUBLIC)
def test_recipes_load_their_checkpoints(base, name, capsys):
  """Key by key, without a word."""
  config = families.model_config(PUBLIC[name], base, name)
  known = estimate.KNOWN[name]
  assert config == families.model_config(known, base, name)
  assert not capsys.readouterr().err


def test_every_recipe_has_its_public_config():
  file = pathlib.Path(__file__).resolve().parents[2] / 'configs/rim_gsm8k.py'
  recipes = set(runpy.run_path(str(file))['PRETRAINED'].values()) - {''}
  assert recipes == PUBLIC.keys()


INERT = {
    '_num_labels': 1, 'n_special': 0, 'predict_special_tokens': True, 'unsloth_fixed': True,
    'unsloth_version': '2025.1', '_attn_implementation_autoset': True, 'torchscript': False,
    'pruned_heads': {}, 'max_length': 20, 'tokenizer_class': 'LlamaTokenizer',
    'partial_rotary_factor': 1.0, 'do_sample': True, 'auto_map': {'AutoModel': 'x.Y'},
    'use_mrope': False, 'quantization_config': None, 'num_experts': 0, 'logit_scale': None,
    'head_dim': None, 'sliding_window': None, 'rope_scaling': None, 'layer_types': None}


@pytest.mark.parametrize('key', INERT)
def test_what_changes_nothing_passes(base, key, capsys):
  values = {**SMALL, 'model_type': 'llama', 'rms_norm_eps': 1e-5}
  assert families.model_config({**values, key: INERT[key]}, base, 'config.json') == (
      families.model_config(values, base, 'config.json'))
  assert not capsys.readouterr().err


def test_what_nobody_knows_is_told(base, capsys, monkeypatch):
  """One line; refused where transformers knows the key and has another value."""
  values = {**SMALL, 'model_type': 'llama', 'rms_norm_eps': 1e-5}
  assert families.model_config({**values, 'made_up': 3}, base, 'f').num_layers == 2
  line, = capsys.readouterr().err.splitlines()
  assert line.startswith("warning: f has the key 'made_up' (3), which is not known")
  monkeypatch.setattr(families, '_default_of', lambda kind, key: (1,))
  families.model_config({**values, 'made_up': 1}, base, 'f')
  with pytest.raises(InputError, match="the key 'made_up' .* transformers computes"):
    families.model_config({**values, 'made_up': 3}, base, 'f')


def test_a_key_that_transformers_knows():
  pytest.importorskip('transformers', reason="pip install 'transformers'")
  assert families._default_of('llama', 'num_hidden_layers') == (32,)
  assert families._default_of('llama', 'made_up') is None
