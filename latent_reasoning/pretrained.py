"""Checkpoints of Hugging Face: their configuration and weights, in and out.

One name table a family serves both ways. Weights are safetensors, whole or in shards
with an index; each tensor goes by itself from its file into its parameter. Every
tensor and every key of the configuration is accounted for: what is missing, surplus,
of another shape or not supported is named, and nothing is guessed.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from latent_reasoning.config import Config, ModelConfig, RopeConfig
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


# --- finding it ---------------------------------------------------------------


def directory(init_from: str) -> pathlib.Path:
  """The folder of a checkpoint: itself, or downloaded from the hub and cached.

  Raises:
    InputError: neither, or the library for the hub is missing.
  """
  path = pathlib.Path(init_from).expanduser()
  if path.is_dir():
    return path
  if not re.fullmatch(r'[\w.-]+(/[\w.-]+)?', init_from) or init_from.startswith('.'):
    raise InputError(f'config.model.init_from is {init_from!r}, which is no directory here; '
                     "expected one with config.json and *.safetensors, or a hub id such as "
                     "'openai-community/gpt2'")
  try:
    import huggingface_hub  # only who asks the hub needs it
  except ImportError:
    raise InputError(f'config.model.init_from {init_from!r} is no directory here, and the hub '
                     "needs a library: pip install 'latent_reasoning[hf]'") from None
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(
        init_from, allow_patterns=['*.safetensors', '*.safetensors.index.json', 'config.json',
                                   'tokenizer*.json']))
  except Exception as error:
    raise InputError(
        f'{init_from} could not be loaded from the hub, {type(error).__name__}: {error}; '
        'expected the hub, a cached copy, or a directory in --config.model.init_from=DIR'
        ) from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise InputError(f'{path} does not exist; expected a checkpoint with config.json and '
                     '*.safetensors') from None
  except (OSError, ValueError) as error:
    raise InputError(f'{path} cannot be read as JSON: {error}') from None
  if not isinstance(found, dict):
    raise InputError(f'{path} holds a {type(found).__name__}; expected an object')
  return found


def resolve(config: Config) -> Config:
  """The configuration with sizes and tokenizer of the checkpoint it starts from."""
  if not config.model.init_from:
    return config
  path = directory(config.model.init_from)
  values = read_json(path / 'config.json')
  model = model_config(values, config.model, str(path / 'config.json'))
  tokenizer = dataclasses.replace(
      config.tokenizer, kind='file', path=str(path / 'tokenizer.json'),
      at_least=int(values['vocab_size']))
  return dataclasses.replace(config, model=model, tokenizer=tokenizer)


PICKLES = ('.bin', '.pt', '.pth', '.pkl', '.ckpt')


def shards(path: pathlib.Path) -> list[pathlib.Path]:
  """The safetensors files of a checkpoint.

  Raises:
    InputError: there are none, only pickled ones, or the index names a file that is
      missing or lies elsewhere.
  """
  index = path / 'model.safetensors.index.json'
  if index.exists():
    wanted = read_json(index).get('weight_map')
    if not isinstance(wanted, dict):
      raise InputError(f"{index} has no object 'weight_map'")
    files = sorted(set(wanted.values()))
    for file in files:
      if not isinstance(file, str) or pathlib.PurePath(file).name != file:
        raise InputError(f'{index} names {file!r}; expected a file beside it')
      if not (path / file).is_file():
        raise InputError(f'{path / file} is missing, which {index.name} names; download it')
    return [path / file for file in files]
  if (path / 'model.safetensors').is_file():
    return [path / 'model.safetensors']
  pickled = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
  also = (f'; {pickled[0]} is a pickle, which can run any code and is never read: convert it '
          'with save_pretrained(safe_serialization=True)') if pickled else ''
  raise InputError(f'{path} has no model.safetensors and no index of shards{also}')


def tensors(path: pathlib.Path) -> Iterator[tuple[str, Callable[[], chex.Array], str]]:
  """Yields (name, its reader, file) of every tensor of a checkpoint."""
  for file in shards(path):
    try:
      with safe_open(str(file), framework='flax') as opened:
        for name in opened.keys():  # noqa: SIM118 it is no mapping
          yield name, lambda name=name, opened=opened: opened.get_tensor(name), file.name
    except SafetensorError as error:
      raise InputError(f'{file} is no sound safetensors file ({error}); it may be cut off: '
                       'download it again') from None


# --- in -----------------------------------------------------------------------


def load(config: ModelConfig, like: dict, tokens: int, rng: chex.PRNGKey,
         fresh: Callable[[], dict]) -> dict:
  """Parameters of a model from the checkpoint in `config.init_from`.

  Args:
    config: as `resolve` made it.
    like: shapes of all parameters of our model (jax.eval_shape).
    tokens: V of the tokenizer that the checkpoint knows; rows from there on are new.
    rng: for the new rows: the mean of the known rows, plus noise of their spread.
    fresh: makes parameters that no checkpoint has, such as a memory's.

  Raises:
    InputError: tensors are missing, surplus or of another shape; lists them all.
  """
  path, expected = directory(config.init_from), names(config)
  out = jax.tree.map(lambda a: None, like)
  seen, surplus, wrong = {}, [], []
  for full, read, file in tensors(path):
    name = full.removeprefix(PREFIX[config.family])
    if re.fullmatch(BUFFERS, name) or (config.tied and name == 'lm_head.weight'):
      continue
    if name not in expected:
      surplus.append(full)
      continue
    entry, layer = expected[name]
    value = read()
    value = value.T if entry.transposed else value
    try:
      _put(out, like, entry.ours, layer, value.astype(jnp.float32), config.scan)
    except ValueError as error:
      wrong.append(f'{full} of {file}: {error}')
    seen[name] = True
  missing = [name for name in expected if name not in seen]
  if missing or surplus or wrong:
    said = [f'{len(missing)} tensors are missing: {_some(missing)}'] * bool(missing)
    said += [f'{len(surplus)} are surplus: {_some(surplus)}'] * bool(surplus)
    said += [f'{len(wrong)} have another shape: {_some(wrong)}'] * bool(wrong)
    raise InputError(f"{path}: {'; '.join(said)}. Expected the weights of the model that its "
                     'config.json describes')
  rows = jax.random.split(rng)
  for name, key, axis in (('embedding', rows[0], 0), ('head', rows[1], 1)):
    apart = f'new_{name}'  # a parameter of its own where it is trained alone (adapt)
    if name in like:
      if out[name].shape[axis] < tokens:
        raise InputError(f'{path}: {name} has {out[name].shape[axis]} rows, but its tokenizer '
                         f'knows {tokens} tokens; expected a tokenizer.json of this model')
      new = like[apart].shape[axis] if apart in like else 0
      wide = _widen(jnp.asarray(out[name]), like[name].shape[axis] + new, tokens, axis, key)
      out[name] = wide
      if apart in like:
        out[name], out[apart] = jnp.split(wide, [tokens], axis=axis)
  if any(leaf is None for leaf in jax.tree.leaves(out, is_leaf=lambda a: a is None)):
    def absent():  # what is not asked for is never computed
      return jax.tree.map(lambda a, b: b if a is None else None, out, fresh(),
                          is_leaf=lambda a: a is None)
    out = jax.tree.map(lambda a, b: b if a is None else a, out, jax.jit(absent)(),
                       is_leaf=lambda a: a is None)
  return jax.tree.map(jnp.asarray, out)


def _some(found: list[str]) -> str:
  return ', '.join(found[:5]) + (f' and {len(found) - 5} more' if len(found) > 5 else '')


def _put(out: dict, like: dict, ours: tuple[str, ...], layer: int | None, value: chex.Array,
         scan: bool) -> None:
  """Puts one tensor at its place; ValueError where its shape is another."""
  path = [part.format(layer) for part in ours]
  stacked = scan and layer is not None
  if stacked:
    path[0] = 'blocks'
  for part in path[:-1]:
    out, like = out[part], like[part]
  shape = like[path[-1]].shape[1:] if stacked else like[path[-1]].shape
  # Only the vocabulary may have another size here: new tokens and padding.
  axis = {'embedding': 0, 'head': 1}.get(path[-1])
  same = [a == b or i == axis for i, (a, b) in enumerate(
      zip(value.shape, shape, strict=False))]
  if value.ndim != len(shape) or not all(same):
    raise ValueError(f'found {list(value.shape)}, expected {list(shape)}')
  if not stacked:
    out[path[-1]] = value
    return
  if out[path[-1]] is None:
    out[path[-1]] = np.empty(like[path[-1]].shape, np.float32)
  out[path[-1]][layer] = np.asarray(value)


def _widen(known: chex.Array, size: int, tokens: int, axis: int,
           rng: chex.PRNGKey) -> chex.Array:
  """Rows from `tokens` on are new: the mean of the known, plus noise of their spread."""
  rows = jnp.moveaxis(known, axis, 0)[:tokens]
  noise = jax.random.normal(rng, (size - tokens, rows.shape[1])) * rows.std(0)
  return jnp.moveaxis(jnp.concatenate([rows, rows.mean(0) + 0.1 * noise]), 0, axis)
