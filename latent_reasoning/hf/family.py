"""What a family of Hugging Face is: a configuration and tensors, both ways.

Each file of this room that describes a family has a `Family` with the choices of modules it
makes (config.model), the keys of its config.json and the names of its tensors.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from latent_reasoning.config import ModelConfig, RopeConfig
from latent_reasoning.errors import InputError, ensure


@dataclasses.dataclass(frozen=True)
class Name:
  """One tensor: its path here and its name there, with {} for the layer.

  Linear maps are [in, out] here; PyTorch's nn.Linear keeps [out, in].
  """
  ours: tuple[str, ...]
  theirs: str
  transposed: bool = False


def dense(ours: str, theirs: str, transposed: bool, bias: bool) -> list[Name]:
  """The tensors of a linear map of each layer."""
  names = [Name(('block_{}', ours, 'kernel'), f'{theirs}.weight', transposed)]
  return names + [Name(('block_{}', ours, 'bias'), f'{theirs}.bias')] * bias


@dataclasses.dataclass(frozen=True)
class Family:
  """A family of pretrained models.

  Attributes:
    model_type: its name in config.json.
    architecture: of its model with a head, as transformers names the class.
    keys: of config.json, from which `read` computes.
    read: (reader, base) -> the sizes and switches of a config.json over those of `base`.
    fits: (config) -> whether transformers would compute what a model here does, so that it
      can be exported as this family.
    write: (config) -> its keys of a config.json, the inverse of `read`.
    tensors: (config) -> names without prefix; those of layers once, with {}.
    prefix: of the tensors in files of the model with a head.
    conv1d: whether its linear maps are [in, out] in files, as GPT-2's.
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


def read_rope(read: Reader) -> RopeConfig:
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
    raise InputError(f'{where}: rotary positions of type {short(kind)}; supported: '
                     f'{tuple(known)}')
  inert = {k for k, v in found.items() if k in CHANGING and among(v, CHANGING[k])}
  if surplus := found.keys() - known[kind] - inert - {
      'rope_theta', 'original_max_position_embeddings'}:
    raise InputError(f'{where}: rotary positions of type {kind!r} with {sorted(surplus)}; '
                     f'supported beside rope_theta: {sorted(known[kind])}')
  if missing := known[kind] - found.keys():
    raise InputError(f'{where}: rotary positions of type {kind!r} without {sorted(missing)}')
  own = Reader({**found, 'model_type': 'rotary positions'}, f'{where}: rotary positions')
  rope = RopeConfig(
      own.number('rope_theta'), '' if kind == 'default' else kind, own.number('factor', 1.0),
      own.number('low_freq_factor', 1.0), own.number('high_freq_factor', 4.0),
      own.size('original_max_position_embeddings', 8192))
  ensure(rope.low < rope.high, f'{where}: rotary positions have low_freq_factor {rope.low} and '
         f'high_freq_factor {rope.high}; expected the second above the first')
  return rope


def write_rope(rope: RopeConfig) -> dict[str, Any]:
  """Rotary positions as keys of a config.json, for transformers 5 and 4."""
  found = {'rope_type': rope.scaling or 'default'}
  if rope.scaling:
    found['factor'] = rope.factor
  if rope.scaling == 'llama3':
    found.update(low_freq_factor=rope.low, high_freq_factor=rope.high,
                 original_max_position_embeddings=rope.original)
  return {'rope_parameters': {'rope_theta': rope.base, **found}, 'rope_theta': rope.base,
          'rope_scaling': found if rope.scaling else None}
