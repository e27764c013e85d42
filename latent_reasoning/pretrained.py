"""Checkpoints of Hugging Face: found, read and put in place.

Weights are safetensors, whole or in shards with an index; each tensor goes by itself
from its file into its parameter. Every tensor is accounted for: what is missing, surplus
or of another shape is named, and nothing is guessed.
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
from safetensors import SafetensorError, safe_open

from latent_reasoning.config import Config, ModelConfig
from latent_reasoning.errors import InputError
from latent_reasoning.hf_format import BUFFERS, PREFIX, model_config, names

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
                     "needs a library: pip install -e '.[hf]'") from None
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(
        init_from, allow_patterns=['*.safetensors', '*.safetensors.index.json', 'config.json',
                                   'tokenizer*.json', 'tokenizer.model', 'vocab.json',
                                   'merges.txt', 'special_tokens_map.json',
                                   'chat_template.jinja']))
  except Exception as error:
    raise InputError(
        f'config.model.init_from {init_from!r} is no directory here, and could not be had from '
        f"the hub, {type(error).__name__}: {' '.join(str(error).split())}; expected the hub, a "
        'cached copy, or a directory in --config.model.init_from=DIR'
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
      config.tokenizer, kind='file', path=config.tokenizer.path or str(path),
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
         fresh: Callable[[], dict], placed: dict | None = None) -> dict:
  """Parameters of a model from the checkpoint in `config.init_from`.

  Each tensor goes from its file to its place on the devices before the next is read, so
  that beside the model no more than one of them is in memory.

  Args:
    config: as `resolve` made it.
    like: shapes and types of all parameters of our model (jax.eval_shape).
    tokens: V of the tokenizer that the checkpoint knows; rows from there on are new.
    rng: for the new rows: the mean of the known rows, plus noise of their spread.
    fresh: makes parameters that no checkpoint has, such as a memory's.
    placed: where on a mesh each parameter lies; None: on the default device.

  Raises:
    InputError: tensors are missing, surplus or of another shape; lists them all.
  """
  path, expected = directory(config.init_from), names(config)
  out = jax.tree.map(lambda a: None, like)
  seen, surplus, wrong = {}, [], []
  keys = dict(zip(('embedding', 'head'), jax.random.split(rng), strict=True))
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
      if entry.ours[-1] in keys:
        _put_rows(out, like, placed, entry.ours[-1], value, tokens, keys[entry.ours[-1]])
      else:
        _put(out, like, placed, entry.ours, layer, value, config.scan)
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
  if any(leaf is None for leaf in jax.tree.leaves(out, is_leaf=lambda a: a is None)):
    def absent():  # what is not asked for is never computed
      return jax.tree.map(lambda a, b: b if a is None else None, out, fresh(),
                          is_leaf=lambda a: a is None)
    made = jax.jit(absent)()
    if placed is not None:
      made = jax.tree.map(lambda a, b: None if a is None else jax.device_put(a, b), made,
                          placed, is_leaf=lambda a: a is None)
    out = jax.tree.map(lambda a, b: b if a is None else a, out, made,
                       is_leaf=lambda a: a is None)
  return out


def _some(found: list[str]) -> str:
  return ', '.join(found[:5]) + (f' and {len(found) - 5} more' if len(found) > 5 else '')


def _place(value: chex.Array, like: Any, placed: Any) -> chex.Array:
  value = jnp.asarray(value).astype(like.dtype)
  return value if placed is None else jax.device_put(value, placed)


@functools.partial(jax.jit, donate_argnums=0)
def _fill(stack: chex.Array, value: chex.Array, layer: int) -> chex.Array:
  return jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0)


def _put(out: dict, like: dict, placed: dict | None, ours: tuple[str, ...],
         layer: int | None, value: chex.Array, scan: bool) -> None:
  """Puts one tensor at its place; ValueError where its shape is another."""
  path = [part.format(layer) for part in ours]
  stacked = scan and layer is not None
  if stacked:
    path[0] = 'blocks'
  for part in path[:-1]:
    out, like, placed = out[part], like[part], placed and placed[part]
  leaf, place = like[path[-1]], placed and placed[path[-1]]
  shape = leaf.shape[1:] if stacked else leaf.shape
  if value.shape != shape:
    raise ValueError(f'found {list(value.shape)}, expected {list(shape)}')
  if not stacked:
    out[path[-1]] = _place(value, leaf, place)
  else:
    if out[path[-1]] is None:
      out[path[-1]] = jnp.zeros(leaf.shape, leaf.dtype, device=place)
    out[path[-1]] = _fill(out[path[-1]], _place(value, leaf, None), layer)
  jax.block_until_ready(out[path[-1]])  # or reading runs ahead and holds many


def _put_rows(out: dict, like: dict, placed: dict | None, name: str, value: chex.Array,
              tokens: int, rng: chex.PRNGKey) -> None:
  """Puts an embedding or a head, whose number of rows may be another here: those from
  `tokens` on are new, in a parameter of their own where they are trained alone (adapt)."""
  axis = {'embedding': 0, 'head': 1}[name]
  names = [n for n in (name, f'new_{name}') if n in like]
  width = like[name].shape[1 - axis]
  if value.ndim != 2 or value.shape[1 - axis] != width:
    raise ValueError(f'found {list(value.shape)}, expected {width} columns or rows')
  if value.shape[axis] < tokens:
    raise InputError(f'{name} has {value.shape[axis]} rows, but the tokenizer knows {tokens} '
                     'tokens; expected a tokenizer.json of this model')
  sizes = tuple(like[n].shape[axis] for n in names)
  if len(sizes) == 2 and tokens > sizes[0]:
    raise InputError("the weights know our special tokens already: they are of an exported "
                     "model. Expected config.optim.trained='all'")
  for part, rows in zip(names, _widen(value, rng, sizes, tokens, axis), strict=True):
    out[part] = jax.block_until_ready(_place(rows, like[part], placed and placed[part]))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _widen(known: chex.Array, rng: chex.PRNGKey, sizes: tuple[int, ...], tokens: int,
           axis: int) -> tuple[chex.Array, ...]:
  """Known rows and new ones, in one part or two: the mean of the known, plus noise of
  their spread, float32."""
  rows = jnp.moveaxis(known, axis, 0)[:tokens].astype(jnp.float32)
  noise = jax.random.normal(rng, (sum(sizes) - tokens, rows.shape[1])) * rows.std(0)
  parts = rows, rows.mean(0) + 0.1 * noise
  if len(sizes) == 1:
    parts = (jnp.concatenate(parts),)
  return tuple(jnp.moveaxis(part, 0, axis) for part in parts)
