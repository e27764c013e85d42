"""A GGUF of llama.cpp, as the Hugging Face checkpoint that it was made of.

Its metadata say what a config.json says, its tensors have other names and are dequantized to
float32, one by one. What llama.cpp's converter (convert_hf_to_gguf.py) does to weights is
undone: rows of Llama's queries and keys, whose rotary pairs are neighbours there and halves
here, and the transposition of GPT-2's maps.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from latent_reasoning.config import ModelConfig, RopeConfig
from latent_reasoning.data import gguf_file
from latent_reasoning.errors import InputError, ensure
from latent_reasoning.hf import families
from latent_reasoning.models import layers

# Keys of the metadata, without the architecture's name, and those of config.json.
LLAMA = {
    'context_length': 'max_position_embeddings', 'embedding_length': 'hidden_size',
    'block_count': 'num_hidden_layers', 'feed_forward_length': 'intermediate_size',
    'attention.head_count': 'num_attention_heads',
    'attention.head_count_kv': 'num_key_value_heads', 'attention.key_length': 'head_dim',
    'attention.layer_norm_rms_epsilon': 'rms_norm_eps', 'rope.freq_base': 'rope_theta',
    'attention.sliding_window': 'sliding_window', 'expert_count': 'num_local_experts'}
GPT2 = {
    'context_length': 'n_positions', 'embedding_length': 'n_embd', 'block_count': 'n_layer',
    'feed_forward_length': 'n_inner', 'attention.head_count': 'n_head',
    'attention.layer_norm_epsilon': 'layer_norm_epsilon'}
ARCHITECTURES = {'llama': LLAMA, 'qwen2': LLAMA, 'qwen3': LLAMA, 'gpt2': GPT2}
# Read below, or of no consequence beside the tensors.
OTHERS = {'vocab_size', 'rope.dimension_count', 'attention.value_length', 'rope.scaling.type',
          'rope.scaling.factor', 'rope.scaling.original_context_length',
          'rope.scaling.finetuned'}
FREQUENCIES = 'rope_freqs.weight'  # how far Llama 3 stretches each rotary pair


def values(path: pathlib.Path) -> dict[str, Any]:
  """What the model's config.json says.

  Raises:
    InputError: no sound GGUF, another architecture, or metadata that are not known here.
  """
  found = gguf_file.opened(path)
  kind = found.values.get('general.architecture')
  ensure(kind in ARCHITECTURES, f'{path} is of the architecture {kind!r}; expected one of '
         f'{tuple(ARCHITECTURES)}, or the files of Hugging Face')
  own = {key.removeprefix(f'{kind}.'): float(str(np.float32(value))) if isinstance(
      value, float) else value for key, value in found.values.items()
      if key.startswith(f'{kind}.')}  # a float32 by its shortest spelling
  keys = ARCHITECTURES[kind]
  if unknown := sorted(own.keys() - keys.keys() - OTHERS):
    raise InputError(f'{path} has the metadata {kind}.{unknown[0]} {own[unknown[0]]!r}, which '
                     'are not computed here; expected the files of Hugging Face')
  table = found.tensors.get('token_embd.weight')
  ensure(table is not None, f'{path} has no tensor token_embd.weight; expected a whole model')
  made = {'model_type': kind, 'vocab_size': int(table.shape[-1]), 'tie_word_embeddings': True,
          **{theirs: own[key] for key, theirs in keys.items() if key in own}}
  if kind != 'gpt2':
    made['attention_bias'] = 'blk.0.attn_q.bias' in found.tensors
    made['mlp_bias'] = 'blk.0.ffn_up.bias' in found.tensors
    made.update(_rotary(path, own, made, found.tensors.get(FREQUENCIES)))
  return made


def _rotary(path: pathlib.Path, own: dict[str, Any], made: dict[str, Any],
            stretch: Any) -> dict[str, Any]:
  """What a config.json says of rotary positions."""
  heads = made.get('num_attention_heads')
  size = made.get('head_dim') or (made.get('hidden_size', 0) // heads if isinstance(
      heads, int) and heads else 0)
  for key in ('rope.dimension_count', 'attention.value_length'):
    ensure(own.get(key, size) == size, f'{path} has the metadata {key} {own.get(key)!r} with '
           f'heads of {size}; expected the same')
  if stretch is None:
    scaling = {'rope_type': own.get('rope.scaling.type', 'none'),
               'factor': own.get('rope.scaling.factor'),
               'original_max_position_embeddings': own.get(
                   'rope.scaling.original_context_length')}
    return {} if scaling['rope_type'] == 'none' else {
        'rope_scaling': {k: v for k, v in scaling.items() if v is not None}}
  # Llama 3's own numbers but for the factor are the same in all its models.
  found = np.asarray(stretch.data, np.float32)
  rope = RopeConfig(made.get('rope_theta', 10_000.0), 'llama3', float(found.max()), 1.0, 4.0,
                    8192)
  plain = layers.frequencies(len(found), dataclasses.replace(rope, scaling=''))
  ensure(np.allclose(plain / layers.frequencies(len(found), rope), found, rtol=1e-3),
         f'{path} stretches rotary positions ({FREQUENCIES}) in another way than Llama 3; '
         'expected the files of Hugging Face')
  return {'rope_scaling': {
      'rope_type': 'llama3', 'factor': rope.factor, 'low_freq_factor': rope.low,
      'high_freq_factor': rope.high, 'original_max_position_embeddings': rope.original}}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor as load.Tensor has it; dequantized to float32 when it is read."""
  name: str
  file: pathlib.Path
  tensor: Any  # of gguf.GGUFReader
  change: Callable[[np.ndarray], np.ndarray] | None = None
  dtype: str = 'F32'

  @property
  def shape(self) -> tuple[int, ...]:
    shape = tuple(int(n) for n in reversed(self.tensor.shape))
    return shape[::-1] if self.change is np.transpose else shape

  def read(self, rows: slice | None = None) -> np.ndarray:
    """The numbers; some rows, of a table."""
    data = self.tensor.data if rows is None else self.tensor.data[rows]
    value = gguf_file.library(self.file).quants.dequantize(data, self.tensor.tensor_type)
    return value if self.change is None else self.change(value)


def tensors(path: pathlib.Path) -> dict[str, Tensor]:
  """Every tensor by the name that it has in the files of Hugging Face; what has none there
  keeps its own."""
  found, gguf = gguf_file.opened(path), gguf_file.library(path)
  said = values(path)
  model = dataclasses.replace(families.model_config(said, ModelConfig(), str(path)),
                              tie_embeddings=False)
  kind, family = said['model_type'], families.FAMILIES[said['model_type']]
  theirs = gguf.get_tensor_name_map(
      next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind),
      model.num_layers)
  names = {}
  for name, (entry, _) in families.names(model).items():
    full = name if name.startswith('lm_head') else family.prefix + name
    change = np.transpose if family.conv1d and entry.ours[-1] == 'kernel' else None
    if kind == 'llama' and len(entry.ours) > 1 and entry.ours[1] in ('q', 'k'):
      heads = model.num_heads if entry.ours[1] == 'q' else model.num_kv_heads
      change = functools.partial(_halves, heads)
    names[theirs.get_name(full, ('.weight', '.bias'))] = full, change
  return {full: Tensor(full, path, tensor, change) for (full, change), tensor in (
      (names.get(name, (name, None)), tensor) for name, tensor in found.tensors.items()
      if name != FREQUENCIES)}


def _halves(heads: int, value: np.ndarray) -> np.ndarray:
  """Rows of queries or keys with the two of each rotary pair half a head apart."""
  paired = value.reshape(heads, -1, 2, *value.shape[1:])
  return paired.swapaxes(1, 2).reshape(value.shape)
