"""What a family of Hugging Face is: a configuration and tensors, both ways.

Each file of this room that describes a family has a `Family` with the choices of modules it
makes (config.model), the keys of its config.json and the names of its tensors.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from latent_reasoning.config import ModelConfig, RopeConfig
from latent_reasoning.errors import InputError, ensure


@dataclasses.dataclass(frozen=True)
class Name:
  """One tensor: its path here and its name there, with {} for the layer.

  Linear maps are [in, out] here; PyTorch's nn.Linear keeps [out, in].

  Attributes:
    heads: how many heads' queries, keys and values one map has there, head by head; here all
      queries stand before all keys. 0: in the order that they have here.
  """
  ours: tuple[str, ...]
  theirs: str
  transposed: bool = False
  heads: int = 0

  def read(self, value: Any) -> Any:
    """A tensor of a file as it is here."""
    value = value.T if self.transposed else value
    if not self.heads or value.shape[-1] % (3 * self.heads):
      return value
    return value.reshape(*value.shape[:-1], self.heads, 3, -1).swapaxes(-3, -2).reshape(
        value.shape)

  def order(self, value: Any) -> Any:
    """What the map returns, the last axis, in the order of files."""
    if not self.heads:
      return value
    return value.reshape(*value.shape[:-1], 3, self.heads, -1).swapaxes(-3, -2).reshape(
        value.shape)

  def write(self, value: Any) -> Any:
    """A parameter as files have it."""
    return self.order(value).T if self.transposed else self.order(value)


def dense(ours: str, theirs: str, transposed: bool, bias: bool, heads: int = 0) -> list[Name]:
  """The tensors of a linear map of each layer."""
  names = [Name(('block_{}', ours, 'kernel'), f'{theirs}.weight', transposed, heads)]
  return names + [Name(('block_{}', ours, 'bias'), f'{theirs}.bias', heads=heads)] * bias


@dataclasses.dataclass(frozen=True)
class Family:
  """A family of pretrained models.

  Attributes:
    model_type: its name in config.json.
    architecture: of its model with a head, as transformers names the class.
    keys: of config.json, from which `read` computes, or which it refuses.
    read: (reader, base) -> the sizes and switches of a config.json over those of `base`.
    fits: (config) -> whether transformers would compute what a model here does, so that it
      can be exported as this family.
    write: (config) -> its keys of a config.json, the inverse of `read`.
    tensors: (config) -> names without prefix; those of layers once, with {}.
    prefix: of the tensors in files of the model with a head.
    conv1d: whether its linear maps are [in, out] in files, as GPT-2's.
    head: the name of its head.
  """
  model_type: str
  architecture: str
  keys: frozenset[str]
  read: Callable[['Reader', ModelConfig], ModelConfig]
  fits: Callable[[ModelConfig], bool]
  write: Callable[[ModelConfig], dict[str, Any]]
  tensors: Callable[[ModelConfig], list[Name]]
  prefix: str = 'model.'
  conv1d: bool = False
  head: str = 'lm_head.weight'


# What most families do not have: {key of config.model: its value then}.
NONE_OF_IT = {key: getattr(ModelConfig(), key) for key in (
    'scale_embeddings', 'norm_place', 'parallel', 'activation', 'fused_mlp', 'qk_norm_over',
    'attention_scale', 'attention_cap', 'logit_cap', 'window', 'window_layers',
    'no_rope_layers')}


def plain(config: ModelConfig, *known: str, rope: tuple[str, ...] = ('multiplier',)) -> bool:
  """Whether a model has none of that, but what is known, and of rotary positions."""
  others = {'multiplier', 'fraction', 'local_base'} - {*rope}
  return all(key in known or getattr(config, key) == value for key, value in NONE_OF_IT.items(
      )) and all(getattr(config.rope, key) == getattr(RopeConfig(), key) for key in others)


ACTIVATIONS = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu',
               'relu': 'relu', 'silu': 'silu', 'swish': 'silu'}


def read_activation(values: 'Reader', key: str, default: str, mlp: str) -> str:
  """The value of config.model.activation, of an MLP."""
  found = values.get(key, str) or default
  ensure(found in ACTIVATIONS, f'{values.where}: {key} is {short(found)}, which is not '
         f'computed here; supported: {tuple(ACTIVATIONS)}')
  usual = dataclasses.replace(ModelConfig(), mlp=mlp).nonlinearity
  return '' if ACTIVATIONS[found] == usual else ACTIVATIONS[found]


def write_activation(config: ModelConfig) -> str:
  """The name of a model's activation in a config.json."""
  return next(k for k, ours in ACTIVATIONS.items() if ours == config.nonlinearity)


WINDOWS = {'full_attention': False, 'sliding_attention': True}


def read_windows(values: 'Reader', local: Callable[[int], bool], size: int | None = None,
                 keep: bool = False) -> dict[str, Any]:
  """The keys of config.model for layers with a window.

  Args:
    local: (layer) -> whether it has one where layer_types does not say.
    size: of the window where the key sliding_window is missing; None: there is none then.
    keep: also a window that hides nothing.
  """
  count, types = values.size('num_hidden_layers'), values.get('layer_types', list)
  ensure(types is None or len(types) == count and all(among(t, tuple(WINDOWS)) for t in types),
         f'{values.where}: layer_types has {short(types)}; supported: {tuple(WINDOWS)}, one '
         f'for each of {count} layers')
  window = size if 'sliding_window' not in values.values else (
      values.size('sliding_window') if values.get('sliding_window', int) else None)
  layers = tuple(i for i in range(count) if (local(i) if types is None else WINDOWS[types[i]]))
  ensure(window or types is None or not layers, f'{values.where}: layer_types has '
         "'sliding_attention', and sliding_window says of no window")
  if not window or not layers or not keep and window >= values.size(
      'max_position_embeddings'):
    return {'window': 0, 'window_layers': ()}
  return {'window': window, 'window_layers': () if len(layers) == count else layers}


def write_types(config: ModelConfig) -> list[str]:
  """The key layer_types of a config.json."""
  local = range(config.num_layers) if config.window and not config.window_layers else (
      config.window_layers)
  return [('full_attention', 'sliding_attention')[i in local] for i in range(config.num_layers)]


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
    'use_bidirectional_attention': (None, False), 'use_qk_norm': (None, False),
    'qk_layernorm': (None, False), 'no_rope_layers': NOTHING,
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
    _sliding_window_pattern cache_implementation
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


class Reader:
  """The values of a config.json, each of its type and in its range."""

  def __init__(self, values: dict[str, Any], where: str):
    self.values, self.where = values, where

  def get(self, key: str, kind: type | tuple[type, ...]) -> Any:
    """A value of a type; None where there is none."""
    value = self.values.get(key)
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool) and (
        kind is not bool)):
      names = ' or '.join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
      raise InputError(f'{self.where}: {key} is {short(value)}; expected {names}')
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


def among(value: Any, allowed: tuple) -> bool:
  """Whether a value is one of some, True and 1 apart."""
  return any(type(value) is type(a) and value == a for a in allowed)


def short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else f'{text[:77]}…'


def read_rope(read: Reader, fraction: float = 0.0, base: float = 10_000.0,
              supported: tuple[str, ...] = ()) -> RopeConfig:
  """Rotary positions, as transformers 5 writes them or as version 4 did.

  Up to max_position_embeddings, the most positions there are here, 'dynamic' changes nothing.

  Args:
    fraction: of a head that is turned where nothing else says; 0: a family that turns all.
    base: where nothing else says.
    supported: the types of the family; (): all that are computed.
  """
  where, found = read.where, {'rope_theta': read.number('rope_theta', base)}
  for key in ('rope_scaling', 'rope_parameters'):
    found.update(read.get(key, dict) or {})
  if fraction:
    share = Reader({'partial_rotary_factor': read.values.get('partial_rotary_factor'), **found,
                    'model_type': ''}, where).number('partial_rotary_factor', fraction)
    ensure(share <= 1, f'{where}: partial_rotary_factor is {share}; expected at most 1')
    fraction = share
    found.pop('partial_rotary_factor', None)
  kind = found.pop('rope_type', None) or found.pop('type', None) or 'default'
  found.pop('type', None)
  known = {'default': set(), 'linear': {'factor'},
           'llama3': {'factor', 'low_freq_factor', 'high_freq_factor',
                      'original_max_position_embeddings'},
           'yarn': {'factor'}, 'dynamic': {'factor'}}
  more = {'yarn': {'beta_fast', 'beta_slow', 'attention_factor', 'mscale', 'mscale_all_dim',
                   'truncate'}}
  known = {k: v for k, v in known.items() if not supported or k in supported}
  if not isinstance(kind, str) or kind not in known:
    raise InputError(f'{where}: rotary positions of type {short(kind)}; supported: '
                     f'{tuple(known)}')
  inert = {k for k, v in found.items() if k in CHANGING and among(v, CHANGING[k])}
  if surplus := found.keys() - known[kind] - more.get(kind, set()) - inert - {
      'rope_theta', 'original_max_position_embeddings'}:
    raise InputError(f'{where}: rotary positions of type {kind!r} with {sorted(surplus)}; '
                     f'supported beside rope_theta: {sorted(known[kind])}')
  if missing := known[kind] - found.keys():
    raise InputError(f'{where}: rotary positions of type {kind!r} without {sorted(missing)}')
  own = Reader({**found, 'model_type': 'rotary positions'}, f'{where}: rotary positions')
  if kind == 'yarn':
    return dataclasses.replace(_read_yarn(own, read), fraction=fraction or 1.0)
  if kind == 'dynamic':
    own.number('factor')
    return RopeConfig(own.number('rope_theta'), fraction=fraction or 1.0)
  rope = RopeConfig(
      own.number('rope_theta'), '' if kind == 'default' else kind, own.number('factor', 1.0),
      own.number('low_freq_factor', 1.0), own.number('high_freq_factor', 4.0),
      own.size('original_max_position_embeddings', 8192), fraction=fraction or 1.0)
  ensure(rope.low < rope.high, f'{where}: rotary positions have low_freq_factor {rope.low} and '
         f'high_freq_factor {rope.high}; expected the second above the first')
  return rope


def _read_yarn(own: Reader, read: Reader) -> RopeConfig:
  """Of type 'yarn'; queries and keys grow by 1 + 0.1 log(factor), unless it says otherwise."""
  ensure(own.flag('truncate', True), f'{own.where} of type yarn have truncate=False, which is '
         'not computed here; supported: True')
  factor = own.number('factor')
  up, down = (1 + 0.1 * (own.number(key, 1.0) if own.values.get('mscale') and own.values.get(
      'mscale_all_dim') else default) * math.log(max(1.0, factor))
              for key, default in (('mscale', 1), ('mscale_all_dim', 0)))
  return RopeConfig(
      own.number('rope_theta'), 'yarn', factor, own.number('beta_slow', 1.0),
      own.number('beta_fast', 32.0), own.size('original_max_position_embeddings', read.size(
          'max_position_embeddings')), own.number('attention_factor', up / down))


def write_rope(rope: RopeConfig) -> dict[str, Any]:
  """Rotary positions as keys of a config.json, for transformers 5 and 4."""
  found = {'rope_type': rope.scaling or 'default'}
  if rope.scaling:
    found['factor'] = rope.factor
  if rope.scaling == 'llama3':
    found.update(low_freq_factor=rope.low, high_freq_factor=rope.high,
                 original_max_position_embeddings=rope.original)
  if rope.scaling == 'yarn':
    found.update(beta_slow=rope.low, beta_fast=rope.high, attention_factor=rope.multiplier,
                 original_max_position_embeddings=rope.original)
  if rope.fraction != 1:
    found['partial_rotary_factor'] = rope.fraction
  return {'rope_parameters': {'rope_theta': rope.base, **found}, 'rope_theta': rope.base,
          'rope_scaling': found if rope.scaling else None}
