"""What Hugging Face calls things: tensors and keys of a configuration, both ways.

One name table a family serves import and export. A key of a config.json that we do not
support is named, not ignored.
"""

import dataclasses
from typing import Any

from latent_reasoning.config import ModelConfig, RopeConfig
from latent_reasoning.errors import InputError

# --- the name table -----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Name:
  """One tensor: its path here and its name there, with {} for the layer.

  Linear maps are [in, out] here; PyTorch's nn.Linear keeps [out, in].
  """
  ours: tuple[str, ...]
  theirs: str
  transposed: bool = False


def _dense(ours: str, theirs: str, transposed: bool, bias: bool) -> list[Name]:
  names = [Name(('block_{}', ours, 'kernel'), f'{theirs}.weight', transposed)]
  return names + [Name(('block_{}', ours, 'bias'), f'{theirs}.bias')] * bias


def table(config: ModelConfig) -> list[Name]:
  """The tensors of a model, without prefix; those of layers once, with {}."""
  if config.family == 'gpt':
    names = [Name(('embedding',), 'wte.weight'), Name(('position_embedding',), 'wpe.weight')]
    for ours, theirs in (('norm_1', 'h.{}.ln_1'), ('norm_2', 'h.{}.ln_2')):
      names += [Name(('block_{}', ours, 'scale'), f'{theirs}.weight'),
                Name(('block_{}', ours, 'bias'), f'{theirs}.bias')]
    for ours, theirs in (('qkv', 'attn.c_attn'), ('out', 'attn.c_proj'), ('up', 'mlp.c_fc'),
                         ('down', 'mlp.c_proj')):  # Conv1D, [in, out] as here
      names += _dense(ours, f'h.{{}}.{theirs}', False, True)
    names += [Name(('norm', 'scale'), 'ln_f.weight'), Name(('norm', 'bias'), 'ln_f.bias')]
  else:
    names = [Name(('embedding',), 'embed_tokens.weight'),
             Name(('block_{}', 'norm_1', 'scale'), 'layers.{}.input_layernorm.weight'),
             Name(('block_{}', 'norm_2', 'scale'), 'layers.{}.post_attention_layernorm.weight'),
             Name(('norm', 'scale'), 'norm.weight')]
    for ours, bias in (('q', config.qkv_bias), ('k', config.qkv_bias), ('v', config.qkv_bias),
                       ('out', config.out_bias)):
      theirs = f'layers.{{}}.self_attn.{ours[0]}_proj'
      names += _dense(ours, theirs, True, bias)
    for ours in ('gate', 'up', 'down'):
      names += _dense(ours, f'layers.{{}}.mlp.{ours}_proj', True, config.bias)
    if config.qk_norm:
      for ours in ('q_norm', 'k_norm'):
        names.append(Name(('block_{}', ours, 'scale'), f'layers.{{}}.self_attn.{ours}.weight'))
  return names + [Name(('head',), 'lm_head.weight', True)] * (not config.tied)


PREFIX = {'gpt': 'transformer.', 'llama': 'model.'}  # in files; GPT-2's own has none
# Constants that old files hold as tensors.
BUFFERS = r'h\.\d+\.attn\.(bias|masked_bias)|layers\.\d+\.self_attn\.rotary_emb\.inv_freq'


def names(config: ModelConfig) -> dict[str, tuple[Name, int | None]]:
  """{name in a file without prefix: (its entry, its layer)}."""
  found = {}
  for name in table(config):
    layers = range(config.layers) if '{}' in name.theirs else [None]
    for layer in layers:
      found[name.theirs.format(layer)] = (name, layer)
  return found


# --- the configuration --------------------------------------------------------

# Of every family: what says nothing about the computation.
SILENT = {
    'architectures', 'model_type', 'vocab_size', 'torch_dtype', 'dtype', 'transformers_version',
    'use_cache', 'initializer_range', 'bos_token_id', 'eos_token_id', 'pad_token_id',
    'unk_token_id', 'sep_token_id', 'attention_dropout', '_name_or_path', 'pretraining_tp',
    'attn_pdrop', 'embd_pdrop', 'resid_pdrop', 'summary_activation', 'summary_first_dropout',
    'summary_proj_to_labels', 'summary_type', 'summary_use_proj', 'task_specific_params',
    'gradient_checkpointing', 'n_ctx', 'output_past', 'is_decoder', 'tie_word_embeddings',
    'return_dict', 'output_hidden_states', 'output_attentions', 'chunk_size_feed_forward',
    'problem_type', 'id2label', 'label2id', 'is_encoder_decoder', 'max_window_layers',
    'reorder_and_upcast_attn', '_attn_implementation', 'is_llama_config', 'rope_interleaved',
    'transformers.js_config'}

# Keys that must have one of these values where they are there.
FIXED = {
    'activation_function': ('gelu_new', 'gelu_pytorch_tanh'), 'hidden_act': ('silu', 'swish'),
    'scale_attn_weights': (True,), 'scale_attn_by_inverse_layer_idx': (False,),
    'add_cross_attention': (False,), 'use_sliding_window': (False, None)}

FAMILIES = {'gpt2': 'gpt', 'llama': 'llama', 'mistral': 'llama', 'qwen2': 'llama',
            'qwen3': 'llama'}
READ = {
    'gpt': {'n_layer', 'n_embd', 'n_head', 'n_inner', 'n_positions', 'layer_norm_epsilon'},
    'llama': {'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads',
              'num_key_value_heads', 'head_dim', 'rms_norm_eps', 'rope_theta', 'rope_scaling',
              'rope_parameters', 'attention_bias', 'mlp_bias', 'max_position_embeddings',
              'sliding_window', 'layer_types'}}


def model_config(values: dict[str, Any], base: ModelConfig, where: str) -> ModelConfig:
  """The sizes and switches of a config.json, over those of `base`.

  Args:
    values: what config.json holds.
    base: keeps what a checkpoint does not say: dtype, attention, scan, remat.
    where: the file, for errors.

  Raises:
    InputError: an architecture, a key or a value that is not supported.
  """
  kind = values.get('model_type')
  if kind not in FAMILIES:
    raise InputError(f"{where}: model_type is {kind!r}; expected one of {tuple(FAMILIES)} "
                     '(SmolLM2 is llama)')
  family = FAMILIES[kind]
  for key, value in values.items():
    if key in FIXED and value not in FIXED[key]:
      raise InputError(f'{where}: {key} is {value!r}; supported: {FIXED[key]}')
    if key not in SILENT | READ[family] | FIXED.keys():
      raise InputError(f'{where}: the key {key!r} ({value!r}) is not supported; a model is '
                       'loaded whole or not at all')

  def need(key):
    if key not in values:
      raise InputError(f'{where}: {key} is missing; expected it in a config.json of {kind}')
    return values[key]
  if family == 'gpt':
    width = need('n_embd')
    return dataclasses.replace(
        base, family='gpt', layers=need('n_layer'), width=width, heads=need('n_head'),
        kv_heads=0, head_size=0, hidden=values.get('n_inner') or 4 * width,
        max_positions=need('n_positions'), positions='learned', bias=True, qkv_bias=False,
        out_bias=False, qk_norm=False, tied=values.get('tie_word_embeddings', True),
        norm_epsilon=values.get('layer_norm_epsilon', 1e-5))
  if set(values.get('layer_types') or ()) - {'full_attention'}:
    raise InputError(f"{where}: layer_types has {sorted(set(values['layer_types']))}; "
                     "supported: 'full_attention' alone")
  window, positions = values.get('sliding_window'), need('max_position_embeddings')
  if window and 'use_sliding_window' not in values:
    positions = min(positions, window)  # up to there a window hides nothing
  heads, width = need('num_attention_heads'), need('hidden_size')
  size = values.get('head_dim') or width // heads
  attention_bias = values.get('attention_bias', kind == 'qwen2')
  return dataclasses.replace(
      base, family='llama', layers=need('num_hidden_layers'), width=width, heads=heads,
      kv_heads=values.get('num_key_value_heads') or heads, head_size=size,
      hidden=need('intermediate_size'), max_positions=positions, positions='rotary',
      tied=values.get('tie_word_embeddings', False), bias=values.get('mlp_bias', False),
      qkv_bias=attention_bias, out_bias=attention_bias and kind != 'qwen2',
      qk_norm=kind == 'qwen3', norm_epsilon=need('rms_norm_eps'), rope=_rope(values, where))


def _rope(values: dict[str, Any], where: str) -> RopeConfig:
  """Rotary positions, as transformers 5 writes them or as version 4 did."""
  found = {'rope_theta': values.get('rope_theta', 10_000.0),
           **(values.get('rope_scaling') or {}), **(values.get('rope_parameters') or {})}
  kind = found.pop('rope_type', None) or found.pop('type', None) or 'default'
  found.pop('type', None)
  known = {'default': set(), 'linear': {'factor'},
           'llama3': {'factor', 'low_freq_factor', 'high_freq_factor',
                      'original_max_position_embeddings'}}
  if kind not in known:
    raise InputError(f'{where}: rotary positions of type {kind!r}; supported: {tuple(known)}')
  base = found.pop('rope_theta')
  if surplus := found.keys() - known[kind] - {'original_max_position_embeddings'}:
    raise InputError(f'{where}: rotary positions of type {kind!r} with {sorted(surplus)}; '
                     f'supported beside rope_theta: {sorted(known[kind])}')
  if missing := known[kind] - found.keys():
    raise InputError(f'{where}: rotary positions of type {kind!r} without {sorted(missing)}')
  return RopeConfig(
      float(base), '' if kind == 'default' else kind, float(found.get('factor', 1.0)),
      float(found.get('low_freq_factor', 1.0)), float(found.get('high_freq_factor', 4.0)),
      int(found.get('original_max_position_embeddings', 8192)))


def hf_config(config: ModelConfig, vocab: int, **ids: int) -> dict[str, Any]:
  """A config.json from which `model_config` and transformers build this model."""
  if config.family == 'gpt':
    return {'model_type': 'gpt2', 'architectures': ['GPT2LMHeadModel'], 'vocab_size': vocab,
            'n_layer': config.layers, 'n_embd': config.width, 'n_head': config.heads,
            'n_inner': config.hidden, 'n_positions': config.max_positions,
            'layer_norm_epsilon': config.norm_epsilon, 'activation_function': 'gelu_new',
            'tie_word_embeddings': config.tied, 'dtype': 'float32', **ids}
  kind = ('qwen3' if config.qk_norm else
          'qwen2' if config.qkv_bias and not config.out_bias else 'llama')
  rope = {'rope_theta': config.rope.base, 'rope_type': config.rope.scaling or 'default'}
  if config.rope.scaling:
    rope['factor'] = config.rope.factor
  if config.rope.scaling == 'llama3':
    rope.update(low_freq_factor=config.rope.low, high_freq_factor=config.rope.high,
                original_max_position_embeddings=config.rope.original)
  named = {'llama': 'Llama', 'qwen2': 'Qwen2', 'qwen3': 'Qwen3'}[kind]
  found = {
      'model_type': kind, 'architectures': [f'{named}ForCausalLM'], 'vocab_size': vocab,
      'num_hidden_layers': config.layers, 'hidden_size': config.width,
      'num_attention_heads': config.heads, 'num_key_value_heads': config.kv_heads,
      'head_dim': config.head_size, 'intermediate_size': config.hidden,
      'max_position_embeddings': config.max_positions, 'rms_norm_eps': config.norm_epsilon,
      'hidden_act': 'silu', 'tie_word_embeddings': config.tied, 'rope_parameters': rope,
      'rope_theta': config.rope.base, 'dtype': 'float32', **ids}
  if kind != 'qwen2':
    found['attention_bias'] = config.qkv_bias
  if kind == 'llama':
    found['mlp_bias'] = config.bias
  return found
