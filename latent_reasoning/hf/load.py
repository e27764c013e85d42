"""Checkpoints of Hugging Face: found, read and put in place.

Weights are safetensors, whole or in shards with an index, or a GGUF (hf.gguf); each tensor
goes by itself from its file into its parameter. Every tensor is accounted for: what is
missing, surplus or of another shape is named, and nothing is guessed.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from latent_reasoning.config import Config, ModelConfig
from latent_reasoning.data import hub, storage
from latent_reasoning.errors import InputError, ensure, local_path
from latent_reasoning.hf import gguf
from latent_reasoning.hf.families import BUFFERS, find, model_config, names

# --- finding it ---------------------------------------------------------------


FILES = ('*.safetensors', '*.safetensors.index.json', 'config.json', 'adapter_config.json',
         'tokenizer*.json',
         'tokenizer.model', 'vocab.json', 'merges.txt', 'special_tokens_map.json',
         'chat_template.jinja')  # of a checkpoint


def directory(init_from: str) -> pathlib.Path:
  """The folder of a checkpoint, or its file that is a GGUF: itself, or copied from its address
  or the hub, and cached.

  Raises:
    InputError: neither, or the library for the hub is missing.
  """
  if storage.is_address(init_from):
    alone = init_from.endswith('.gguf')
    return storage.fetch(init_from, 'config.model.init_from', () if alone else FILES)
  path = local_path(init_from, 'config.model.init_from')
  if path.exists():
    return path
  ensure(path.suffix != '.gguf', f'config.model.init_from is {init_from!r}, which is no file '
         'here; expected the path of a GGUF')
  if not re.fullmatch(r'[\w.-]+(/[\w.-]+)?', init_from) or init_from.startswith('.'):
    raise InputError(f'config.model.init_from is {init_from!r}, which is no directory here; '
                     'expected one with config.json and *.safetensors, the workdir of a run, '
                     "or a hub id such as 'openai-community/gpt2'")
  try:
    return hub.snapshot(init_from, allow_patterns=list(FILES),
                        ignore_patterns=['consolidated*', '*/*'])  # the same, otherwise
  except ImportError:
    raise InputError(f'config.model.init_from {init_from!r} is no directory here, and the hub '
                     "needs a library: pip install -e '.[hf]'") from None
  except Exception as error:
    why = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if 'ConnectError' in why or 'Name or service' in why or 'connection' in why.lower():
      why = 'the hub cannot be reached, and no copy is cached'
    raise InputError(
        f'config.model.init_from {init_from!r} is no directory here, and could not be had from '
        f'the hub ({why}); expected a directory in --config.model.init_from=DIR') from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise InputError(f'{path} does not exist; expected a checkpoint with config.json and '
                     '*.safetensors') from None
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(f'{path} cannot be read as JSON: {error}') from None
  if not isinstance(found, dict):
    raise InputError(f'{path} holds a {type(found).__name__}; expected an object')
  return found


def values(path: pathlib.Path) -> dict[str, Any]:
  """The config.json of a checkpoint, or what a GGUF says instead."""
  return read_json(path / 'config.json') if path.is_dir() else gguf.values(path)


def resolve(config: Config) -> Config:
  """The configuration with sizes and tokenizer of the checkpoint it starts from."""
  if not config.model.init_from:
    return config
  path = directory(config.model.init_from)
  said = values(path)
  where = str(path / 'config.json') if path.is_dir() else str(path)
  model = model_config(said, config.model, where)
  if model.tie_embeddings and _own_head(path, model):
    model = dataclasses.replace(model, tie_embeddings=False)
  tokenizer = dataclasses.replace(
      config.tokenizer, kind='file', path=config.tokenizer.path or str(
          config.model.init_from if storage.is_address(config.model.init_from)
          and path.is_dir() else path),
      at_least=said['vocab_size'])
  return dataclasses.replace(config, model=model, tokenizer=tokenizer)


ROWS = 1 << 14  # of a table that are compared at a time


def _own_head(path: pathlib.Path, model: ModelConfig) -> bool:
  """Whether a checkpoint that calls its head tied has one that differs from its table."""
  held, family = tensors(path), find(model)
  name = next(n.theirs for n in family.tensors(model) if n.ours == ('embedding',))
  table = held.get(family.prefix + name) or held.get(name)
  head = held.get(family.head) or held.get('lm_head.weight')
  if head is None or table is None:
    return False
  if head.shape != table.shape:
    return True
  count = table.shape[0]
  parts = [slice(i, min(i + ROWS, count)) for i in range(0, count, ROWS)]
  return any(not np.array_equal(np.asarray(head.read(part)), np.asarray(table.read(part)))
             for part in parts)


PICKLES = ('.bin', '.pt', '.pth', '.pkl', '.ckpt')


def shards(path: pathlib.Path) -> list[pathlib.Path]:
  """The files of a checkpoint's weights.

  Raises:
    InputError: there are none, only pickled ones, or the index names a file that is
      missing or lies elsewhere.
  """
  if path.is_file():
    return [path]
  index = path / 'model.safetensors.index.json'
  if index.exists():
    files = sorted(set(weight_map(index).values()))
    for file in files:
      if not (path / file).is_file():
        raise InputError(f'{path / file} is missing, which {index.name} names; download it')
    return [path / file for file in files]
  if (path / 'model.safetensors').is_file():
    return [path / 'model.safetensors']
  pickled = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
  also = (f'; {pickled[0]} is a pickle, which can run any code and is never read: convert it '
          'with save_pretrained(safe_serialization=True)') if pickled else ''
  raise InputError(f'{path} has no model.safetensors and no index of shards{also}')


def weight_map(index: pathlib.Path) -> dict[str, str]:
  """The file of each tensor, by an index of shards."""
  found = read_json(index).get('weight_map')
  if not isinstance(found, dict) or not found:
    raise InputError(f"{index} has no object 'weight_map'")
  for name, file in found.items():
    if not isinstance(file, str) or pathlib.PurePath(file).name != file:
      raise InputError(f'{index} names {file!r} for {name}; expected a file beside it')
  return found


FLOATS = ('F16', 'BF16', 'F32', 'F64')  # types of tensors that are weights


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of a checkpoint, by its header; the numbers are read when asked for."""
  name: str
  file: pathlib.Path
  dtype: str  # as safetensors has it: F32, BF16, I8 …
  shape: tuple[int, ...]

  def read(self, rows: slice | None = None) -> chex.Array:
    """The numbers, all or some rows of them."""
    with _opened(self.file) as file:
      return file.get_tensor(self.name) if rows is None else file.get_slice(self.name)[rows]


@contextlib.contextmanager
def _opened(file: pathlib.Path):
  try:
    with safe_open(str(file), framework='flax') as opened:
      yield opened
  except SafetensorError as error:
    raise InputError(f'{file} is no sound safetensors file ({error}); it may be cut off: '
                     'download it again') from None


def tensors(path: pathlib.Path, files: list[pathlib.Path] | None = None
            ) -> dict[str, Tensor | gguf.Tensor]:
  """Every tensor of a checkpoint, in the order of its files, or of `files`.

  Of several shards the index says which one has a tensor; what it does not name is there too.

  Raises:
    InputError: a file is not sound, or does not have what the index says.
  """
  if path.is_file():
    return gguf.tensors(path)
  index = path / 'model.safetensors.index.json'
  wanted = weight_map(index) if index.exists() else {}
  found = {}
  for file in files or shards(path):
    with _opened(file) as opened:
      for name in opened.keys():  # noqa: SIM118 it is no mapping
        if wanted.get(name, file.name) == file.name:
          part = opened.get_slice(name)
          found[name] = Tensor(name, file, part.get_dtype(), tuple(part.get_shape()))
  if absent := sorted(wanted.keys() - found.keys()):
    raise InputError(f'{index} names {some(absent)}, which the files that it names for them '
                     'do not have; download them again')
  return found


BLOCKS, BLOCK = 64, 1 << 20  # of a file that its hash reads: all of one up to 64 MiB


def fingerprint(init_from: str) -> str:
  """A hash of a checkpoint's weights."""
  return hash_files(shards(directory(init_from)))


def hash_files(files: list[pathlib.Path]) -> str:
  """A hash of files: of each its size and up to 64 blocks of it."""
  found = hashlib.blake2b(digest_size=16)
  for file in files:
    size = file.stat().st_size
    found.update(f'{file.name} {size} '.encode())
    with file.open('rb') as opened:
      for i in range(BLOCKS):
        opened.seek(max(0, size - BLOCK) * i // (BLOCKS - 1))
        found.update(opened.read(BLOCK))
  return found.hexdigest()


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
  path, expected, prefix = directory(config.init_from), names(config), find(config).prefix
  out = jax.tree.map(lambda a: None, like)
  seen, surplus, wrong = {}, [], []
  keys = dict(zip(('embedding', 'head'), jax.random.split(rng), strict=True))
  for full, tensor in tensors(path).items():
    name = full.removeprefix(prefix)
    if re.fullmatch(BUFFERS, name):
      continue
    if name == 'lm_head.weight':  # as transformers calls each head since version 5
      name = find(config).head
    if config.tie_embeddings and name == find(config).head:  # equal to the table (`resolve`)
      continue
    if name not in expected:
      surplus.append(full)
      continue
    if name in seen:
      wrong.append(f'{full} of {tensor.file.name} is {seen[name]} once more')
      continue
    seen[name] = full
    entry, layer = expected[name]
    try:
      if tensor.dtype not in FLOATS:
        raise ValueError(f'its type is {tensor.dtype}, expected one of {FLOATS}')
      value = entry.read(tensor.read())
      if entry.ours[-1] in keys:
        put_rows(out, like, placed, entry.ours[-1], value, tokens, keys[entry.ours[-1]])
      else:
        put(out, like, placed, entry.ours, layer, value, config.scan)
    except ValueError as error:
      wrong.append(f'{full} of {tensor.file.name}: {error}')
  missing = [name for name in expected if name not in seen]
  if missing or surplus or wrong:
    said = [f'{len(missing)} tensors are missing: {some(missing)}'] * bool(missing)
    said += [f'{len(surplus)} are surplus: {some(surplus)}'] * bool(surplus)
    said += [f'{len(wrong)} are wrong: {some(wrong)}'] * bool(wrong)
    raise InputError(f"{path}: {'; '.join(said)}. Expected the weights of the model that its "
                     'config.json describes')
  return fill_in(out, fresh, placed)


def fill_in(out: dict, fresh: Callable[[], dict], placed: dict | None) -> dict:
  """Parameters with fresh ones where there are none yet."""
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


def some(found: list[str]) -> str:
  return ', '.join(found[:5]) + (f' and {len(found) - 5} more' if len(found) > 5 else '')


def _place(value: chex.Array, like: Any, placed: Any) -> chex.Array:
  """A tensor in its type and at its place; ValueError where a number of it is none then."""
  value = jnp.asarray(value).astype(like.dtype)
  if not bool(jnp.isfinite(value).all()):
    raise ValueError(f'it holds numbers that are not finite in {like.dtype}')
  return value if placed is None else jax.device_put(value, placed)


@functools.partial(jax.jit, donate_argnums=0)
def _fill(stack: chex.Array, value: chex.Array, layer: int) -> chex.Array:
  return jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0)


def put(out: dict, like: dict, placed: dict | None, ours: tuple[str, ...],
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
    raise ValueError(f'its shape is {list(value.shape)}, expected {list(shape)}')
  if not stacked:
    out[path[-1]] = _place(value, leaf, place)
  else:
    if out[path[-1]] is None:
      out[path[-1]] = jnp.zeros(leaf.shape, leaf.dtype, device=place)
    out[path[-1]] = _fill(out[path[-1]], _place(value, leaf, None), layer)
  jax.block_until_ready(out[path[-1]])  # or reading runs ahead and holds many


def put_rows(out: dict, like: dict, placed: dict | None, name: str, value: chex.Array,
              tokens: int, rng: chex.PRNGKey) -> None:
  """Puts an embedding or a head, whose number of rows may be another here: those from
  `tokens` on are new. Rows of our special tokens, new or known by an exported model, are a
  parameter of their own where they alone are trained (models.lora)."""
  axis = {'embedding': 0, 'head': 1}[name]
  names = [n for n in (name, f'new_{name}') if n in like]
  width = like[name].shape[1 - axis]
  if value.ndim != 2 or value.shape[1 - axis] != width:
    raise ValueError(f'its shape is {list(value.shape)}, expected {width} columns or rows')
  if value.shape[axis] < tokens:
    raise InputError(f'{name} has {value.shape[axis]} rows, but the tokenizer knows {tokens} '
                     'tokens; expected a tokenizer.json of this model')
  sizes = tuple(like[n].shape[axis] for n in names)
  for part, rows in zip(names, _widen(value, rng, sizes, tokens, axis), strict=True):
    out[part] = jax.block_until_ready(_place(rows, like[part], placed and placed[part]))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _widen(known: chex.Array, rng: chex.PRNGKey, sizes: tuple[int, ...], tokens: int,
           axis: int) -> tuple[chex.Array, ...]:
  """Known rows and new ones, cut into one part or two: the mean of the known, plus noise of
  their spread, float32."""
  rows = jnp.moveaxis(known, axis, 0)[:tokens].astype(jnp.float32)
  noise = jax.random.normal(rng, (sum(sizes) - tokens, rows.shape[1])) * rows.std(0)
  rows = jnp.concatenate([rows, rows.mean(0) + 0.1 * noise])
  return tuple(jnp.moveaxis(part, 0, axis) for part in jnp.split(rows, [*sizes[:-1]]))
