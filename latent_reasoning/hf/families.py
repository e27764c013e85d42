"""What Hugging Face calls things: tensors and keys of a configuration, both ways.

One name table a family serves import and export. A key of a config.json that changes what
is computed, in a way that is not computed here, is refused by name.
"""

import dataclasses
import sys
from typing import Any

from latent_reasoning.config import ModelConfig, RopeConfig
from latent_reasoning.errors import InputError, ensure

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
  return names + [Name(('head',), 'lm_head.weight', True)] * (not config.tie_embeddings)


PREFIX = {'gpt': 'transformer.', 'llama': 'model.'}  # in files; GPT-2's own has none
TABLE = {'gpt': 'wte.weight', 'llama': 'embed_tokens.weight'}  # of token embeddings
# Constants that old files hold as tensors.
BUFFERS = r'h\.\d+\.attn\.(bias|masked_bias)|layers\.\d+\.self_attn\.rotary_emb\.inv_freq'


def names(config: ModelConfig) -> dict[str, tuple[Name, int | None]]:
  """{name in a file without prefix: (its entry, its layer)}."""
  found = {}
  for name in table(config):
    layers = range(config.num_layers) if '{}' in name.theirs else [None]
    for layer in layers:
      found[name.theirs.format(layer)] = (name, layer)
  return found


# --- the configuration --------------------------------------------------------

FAMILIES = {'gpt2': 'gpt', 'llama': 'llama', 'mistral': 'llama', 'qwen2': 'llama',
            'qwen3': 'llama'}

# What changes the computation and is computed from: looked at below.
READ = {
    'gpt': {'n_layer', 'n_embd', 'n_head', 'n_inner', 'n_positions', 'layer_norm_epsilon'},
    'llama': {'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads',
              'num_key_value_heads', 'head_dim', 'rms_norm_eps', 'rope_theta', 'rope_scaling',
              'rope_parameters', 'attention_bias', 'mlp_bias', 'max_position_embeddings',
              'sliding_window', 'layer_types', 'use_sliding_window'}}

# What would change the computation in a way that is not computed here: {key: the values that
# change nothing}. A key that is absent changes nothing.
NOTHING = (None, False, 0, 0.0, [], {})
ONE = (None, 1, 1.0)
CHANGING = {
    'activation_function': ('gelu_new', 'gelu_pytorch_tanh'), 'hidden_act': ('silu', 'swish'),
    'hidden_activation': (None, 'silu', 'swish'), 'scale_attn_weights': (True,),
    'scale_attn_by_inverse_layer_idx': (None, False), 'add_cross_attention': (None, False),
    'is_encoder_decoder': (None, False), 'use_sliding_window': (None, False),
    'partial_rotary_factor': ONE, 'rotary_pct': ONE, 'rope_interleaved': (None, False),
    'use_mrope': (None, False), 'alibi': (None, False), 'use_alibi': (None, False),
    'embedding_multiplier': ONE, 'residual_multiplier': ONE, 'logits_scaling': ONE,
    'logit_scale': ONE, 'scale_emb': ONE, 'scale_depth': ONE, 'logits_soft_cap': NOTHING,
    'final_logit_softcapping': NOTHING, 'attn_logit_softcapping': NOTHING,
    'attention_multiplier': NOTHING, 'query_pre_attn_scalar': NOTHING, 'clip_qkv': NOTHING,
    'use_qk_norm': (None, False), 'qk_layernorm': (None, False), 'no_rope_layers': NOTHING,
    'no_rope_layer_interval': NOTHING, 'use_parallel_residual': (None, False),
    'parallel_attn': (None, False), 'num_local_experts': NOTHING, 'num_experts': NOTHING,
    'n_routed_experts': NOTHING, 'attention_chunk_size': NOTHING, 'pruned_heads': NOTHING,
    'quantization_config': NOTHING}

# What says nothing about the computation: of training, generation, files and other programs.
INERT = frozenset('''
    architectures model_type vocab_size torch_dtype dtype transformers_version use_cache
    initializer_range bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id
    cls_token_id mask_token_id decoder_start_token_id attention_dropout hidden_dropout
    classifier_dropout _name_or_path name_or_path pretraining_tp attn_pdrop embd_pdrop
    resid_pdrop summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj task_specific_params gradient_checkpointing n_ctx n_special
    predict_special_tokens output_past is_decoder tie_word_embeddings return_dict
    output_hidden_states output_attentions chunk_size_feed_forward problem_type
    finetuning_task id2label label2id _num_labels num_labels max_window_layers
    reorder_and_upcast_attn _attn_implementation _attn_implementation_autoset
    attn_implementation attn_implementation_internal is_llama_config transformers.js_config
    unsloth_fixed unsloth_version torchscript tokenizer_class auto_map max_length min_length
    max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens prefix
    tf_legacy_loss use_bfloat16 tie_encoder_decoder cross_attention_hidden_size
    use_flash_attn use_flash_attention _flash_attn_2_enabled model_name license language
    base_model quantization neftune_noise_alpha
    '''.split())


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
                     '(SmolLM2 is llama)')
  read = _Reader(values, where)
  family = FAMILIES[kind]
  for key, value in values.items():
    if key in CHANGING and not _among(value, CHANGING[key]):
      raise InputError(f'{where}: {key} is {_short(value)}, which is not computed here; '
                       f'supported: {CHANGING[key]}')
    if key not in INERT | READ[family] | CHANGING.keys():
      _unknown(key, value, kind, where)
  if family == 'gpt':
    width, heads = read.size('n_embd'), read.size('n_head')
    config = dataclasses.replace(
        base, family='gpt', num_layers=read.size('n_layer'), embed_dim=width,
        num_heads=heads,
        num_kv_heads=0, head_dim=0, mlp_dim=read.size('n_inner', 4 * width),
        max_positions=read.size('n_positions'), position_embedding='learned', bias=True,
        qkv_bias=False, out_bias=False, qk_norm=False,
        tie_embeddings=read.flag('tie_word_embeddings', True),
        norm_epsilon=read.number('layer_norm_epsilon', 1e-5))
  else:
    config = _llama(kind, read, base)
  size = config.head_dim or config.embed_dim // config.num_heads
  ensure(values.get('head_dim') or not config.embed_dim % config.num_heads,
         f'{where}: {config.num_heads} heads do not divide the width {config.embed_dim}')
  ensure(not config.num_heads % (config.num_kv_heads or config.num_heads),
         f'{where}: {config.num_kv_heads} heads of keys and values do not divide '
         f'{config.num_heads}')
  ensure(config.position_embedding != 'rotary' or not size % 2,
         f'{where}: heads are {size} wide; rotary positions need an even number')
  read.size('vocab_size')
  return config


def _llama(kind: str, read: '_Reader', base: ModelConfig) -> ModelConfig:
  types = read.get('layer_types', list) or ()
  ensure(all(t == 'full_attention' for t in types),
         f"{read.where}: layer_types has {_short(types)}; supported: 'full_attention' alone")
  positions = read.size('max_position_embeddings')
  if 'use_sliding_window' not in read.values:
    # Up to there a window hides nothing.
    positions = min(positions, read.size('sliding_window', positions))
  heads, width = read.size('num_attention_heads'), read.size('hidden_size')
  bias = read.flag('attention_bias', kind == 'qwen2')
  return dataclasses.replace(
      base, family='llama', num_layers=read.size('num_hidden_layers'), embed_dim=width,
      num_heads=heads,
      num_kv_heads=read.size('num_key_value_heads', heads),
      head_dim=read.size('head_dim', max(1, width // heads)),
      mlp_dim=read.size('intermediate_size'), max_positions=positions,
      position_embedding='rotary',
      tie_embeddings=read.flag('tie_word_embeddings', False), bias=read.flag('mlp_bias', False),
      qkv_bias=bias, out_bias=bias and kind != 'qwen2', qk_norm=kind == 'qwen3',
      norm_epsilon=read.number('rms_norm_eps'), rope=_rope(read))


class _Reader:
  """The values of a config.json, each of its type and in its range."""

  def __init__(self, values: dict[str, Any], where: str):
    self.values, self.where = values, where

  def get(self, key: str, kind: type | tuple[type, ...]) -> Any:
    """A value of a type; None where there is none."""
    value = self.values.get(key)
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool) and (
        kind is not bool)):
      names = ' or '.join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
      raise InputError(f'{self.where}: {key} is {_short(value)}; expected {names}')
    return value

  def size(self, key: str, default: int | None = None) -> int:
    """A whole number of at least 1."""
    value = self.get(key, int)
    if value is None:
      if default is None:
        raise InputError(f'{self.where}: {key} is missing; expected it in a config.json of '
                         f"{self.values['model_type']}")
      return default
    ensure(1 <= value < 2**31, f'{self.where}: {key} is {value}; expected at least 1, and less '
           'than 2^31')
    return value

  def number(self, key: str, default: float | None = None) -> float:
    """A finite number above 0."""
    value = self.get(key, (int, float))
    if value is None:
      if default is None:
        raise InputError(f'{self.where}: {key} is missing; expected it in a config.json of '
                         f"{self.values['model_type']}")
      return default
    ensure(0 < value < 1e30, f'{self.where}: {key} is {value}; expected a finite number '
           'above 0')
    return float(value)

  def flag(self, key: str, default: bool) -> bool:
    value = self.get(key, bool)
    return default if value is None else value


def _among(value: Any, allowed: tuple) -> bool:
  """Whether a value is one of some, True and 1 apart."""
  return any(type(value) is type(a) and value == a for a in allowed)


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else f'{text[:77]}…'


def _unknown(key: str, value: Any, kind: str, where: str) -> None:
  """Says that nobody here knows a key; refuses one of which transformers says otherwise."""
  default = _default_of(kind, key)
  if default is not None and default[0] == value:
    return
  if default is not None:
    raise InputError(f'{where}: the key {key!r} ({_short(value)}) is not known here, and '
                     f'transformers computes something with it (its default is {default[0]!r})')
  print(f'warning: {where} has the key {key!r} ({_short(value)}), which is not known here; it '
        'is left out', file=sys.stderr)


def _default_of(kind: str, key: str) -> tuple[Any] | None:
  """What transformers takes for a key of a model's config; None: it has none, or is absent."""
  try:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    known = CONFIG_MAPPING[kind]().__dict__
  except (ImportError, KeyError):
    return None
  return (known[key],) if key in known else None


def _rope(read: _Reader) -> RopeConfig:
  """Rotary positions, as transformers 5 writes them or as version 4 did."""
  where, found = read.where, {'rope_theta': read.number('rope_theta', 10_000.0)}
  for key in ('rope_scaling', 'rope_parameters'):
    found.update(read.get(key, dict) or {})
  kind = found.pop('rope_type', None) or found.pop('type', None) or 'default'
  found.pop('type', None)
  known = {'default': set(), 'linear': {'factor'},
           'llama3': {'factor', 'low_freq_factor', 'high_freq_factor',
                      'original_max_position_embeddings'}}
  if not isinstance(kind, str) or kind not in known:
    raise InputError(f'{where}: rotary positions of type {_short(kind)}; supported: '
                     f'{tuple(known)}')
  inert = {k for k, v in found.items() if k in CHANGING and _among(v, CHANGING[k])}
  if surplus := found.keys() - known[kind] - inert - {
      'rope_theta', 'original_max_position_embeddings'}:
    raise InputError(f'{where}: rotary positions of type {kind!r} with {sorted(surplus)}; '
                     f'supported beside rope_theta: {sorted(known[kind])}')
  if missing := known[kind] - found.keys():
    raise InputError(f'{where}: rotary positions of type {kind!r} without {sorted(missing)}')
  own = _Reader({**found, 'model_type': 'rotary positions'}, f'{where}: rotary positions')
  rope = RopeConfig(
      own.number('rope_theta'), '' if kind == 'default' else kind, own.number('factor', 1.0),
      own.number('low_freq_factor', 1.0), own.number('high_freq_factor', 4.0),
      own.size('original_max_position_embeddings', 8192))
  ensure(rope.low < rope.high, f'{where}: rotary positions have low_freq_factor {rope.low} and '
         f'high_freq_factor {rope.high}; expected the second above the first')
  return rope


def hf_config(config: ModelConfig, vocab: int, **ids: int) -> dict[str, Any]:
  """A config.json from which `model_config` and transformers build this model."""
  if config.family == 'gpt':
    return {'model_type': 'gpt2', 'architectures': ['GPT2LMHeadModel'], 'vocab_size': vocab,
            'n_layer': config.num_layers, 'n_embd': config.embed_dim,
            'n_head': config.num_heads,
            'n_inner': config.mlp_dim, 'n_positions': config.max_positions,
            'layer_norm_epsilon': config.norm_epsilon, 'activation_function': 'gelu_new',
            'tie_word_embeddings': config.tie_embeddings, 'dtype': 'float32', **ids}
  kind = ('qwen3' if config.qk_norm else
          'qwen2' if config.qkv_bias and not config.out_bias else 'llama')
  rope = {'rope_type': config.rope.scaling or 'default'}
  if config.rope.scaling:
    rope['factor'] = config.rope.factor
  if config.rope.scaling == 'llama3':
    rope.update(low_freq_factor=config.rope.low, high_freq_factor=config.rope.high,
                original_max_position_embeddings=config.rope.original)
  named = {'llama': 'Llama', 'qwen2': 'Qwen2', 'qwen3': 'Qwen3'}[kind]
  found = {
      'model_type': kind, 'architectures': [f'{named}ForCausalLM'], 'vocab_size': vocab,
      'num_hidden_layers': config.num_layers, 'hidden_size': config.embed_dim,
      'num_attention_heads': config.num_heads, 'num_key_value_heads': config.num_kv_heads,
      'head_dim': config.head_dim, 'intermediate_size': config.mlp_dim,
      'max_position_embeddings': config.max_positions, 'rms_norm_eps': config.norm_epsilon,
      'hidden_act': 'silu', 'tie_word_embeddings': config.tie_embeddings, 'dtype': 'float32',
      'rope_parameters': {'rope_theta': config.rope.base, **rope},  # transformers 5
      'rope_theta': config.rope.base,  # and 4, which reads no rope_parameters
      'rope_scaling': rope if config.rope.scaling else None, **ids}
  if kind != 'qwen2':
    found['attention_bias'] = config.qkv_bias
  if kind == 'llama':
    found['mlp_bias'] = config.bias
  return found
