"""Weights that this package trained: its own format of an export, and what can be read.

| folder                               | what it is                                  |
|--------------------------------------|---------------------------------------------|
| config.json, checkpoints/            | a run: its checkpoint of eval.checkpoint    |
| config.json of type latent_reasoning | an export of any method (--format=native)   |
| adapter_config.json, our tokens      | an adapter for PEFT (--format=peft)         |

An export has config.json with the whole configuration, model.safetensors with every parameter
under its path here, float32, layer by layer, and tokenizer.json; no pickle.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath
from flax import traverse_util

from latent_reasoning import config as config_lib
from latent_reasoning import config_loading, methods, sequences
from latent_reasoning.config import Config, LoraConfig, MeshConfig, ModelConfig, SweepConfig
from latent_reasoning.data import storage, tokenizer_files
from latent_reasoning.data.tokenizers import SPECIAL, Tokenizer
from latent_reasoning.errors import InputError, ensure
from latent_reasoning.hf import families
from latent_reasoning.hf import load as pretrained
from latent_reasoning.train import resume, saved, versions

ADAPTER = 'adapter_model.safetensors'
MODEL_TYPE, FORMAT = 'latent_reasoning', 1
MOST_STEPS = 1000  # index tokens that are looked for in a tokenizer.json
# Of config.model, what a run that begins with weights says for itself.
OWN = ('init_from', 'lora', 'dtype', 'attention', 'scan', 'remat', 'loss_tile', 'frozen_dtype')

Path = tuple[str, ...]


def by_layer(params: dict[Path, Any]) -> dict[Path, Any]:
  """Parameters with a path a layer, also where layers are stacked (model.scan)."""
  found = {}
  for path, leaf in params.items():
    if path[0] == 'blocks':
      found.update({(f'block_{i}', *path[1:]): leaf[i] for i in range(len(leaf))})
    else:
      found[path] = leaf
  return found


def tensors(params: dict) -> dict[str, np.ndarray]:
  """Every parameter for model.safetensors."""
  return {'/'.join(path): np.asarray(leaf, np.float32)
          for path, leaf in by_layer(traverse_util.flatten_dict(params)).items()}


def values(config: Config, step: int) -> dict[str, Any]:
  """The config.json of an export; where a run computes is not part of it."""
  shared = dataclasses.replace(config, mesh=MeshConfig(), sweep=SweepConfig())
  return {'model_type': MODEL_TYPE, 'format': FORMAT, 'step': step,
          'versions': versions.here(), 'config': dataclasses.asdict(shared)}


@dataclasses.dataclass(frozen=True)
class Source:
  """A folder of weights that this package trained.

  Attributes:
    path: of the folder, here.
    kind: 'run', 'native' or 'peft'.
    config: of the run that trained them; of an adapter, the model and LoRA alone are its own.
    step: of an export; 0: not said.
    checkpoints: of a run, perhaps in a bucket.
    adapter: adapter_config.json, of an adapter.
  """
  path: pathlib.Path
  kind: str
  config: Config
  step: int = 0
  checkpoints: epath.Path | None = None
  adapter: dict[str, Any] = dataclasses.field(default_factory=dict)

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    text = tokenizer_files.checked(self.path / 'tokenizer.json', 'restore it')
    t = self.config.tokenizer
    return Tokenizer(text, self.config.rim.max_steps, t.pad_to, t.at_least, t.add_bos)

  @property
  def tokens(self) -> int:
    """Rows of the tables that mean something: those of text and of our special tokens."""
    return self.tokenizer.known if self.kind == 'peft' else self.tokenizer.used

  @property
  def trained(self) -> set[int]:
    """Ids of special tokens that its method reads or says; of an adapter, all of them."""
    if self.kind == 'peft':
      return set(self.tokenizer.special())
    return used(self.config, self.tokenizer)

  def fingerprint(self) -> str:
    """A hash of which weights they are: of a run, which may train on, its configuration."""
    if self.kind != 'run':
      base = self.adapter.get('base_model_name_or_path')
      return _hash(_files(self.path), pretrained.fingerprint(base) if base else '')
    flat = config_lib.flatten(self.config)
    return _hash({key: value for key, value in flat.items() if resume.kind(key) == 'refused'})

  def parameters(self) -> tuple[dict[Path, Callable[[], Any]], int]:
    """What reads each parameter, by its path of one layer; and the step."""
    if self.kind == 'run':
      found, meta = saved.parameters(self.checkpoints, self.config.eval.checkpoint == 'best')
      return {path: functools.partial(np.asarray, leaf)
              for path, leaf in by_layer(found).items()}, meta['step']
    if self.kind == 'native':
      return {tuple(name.split('/')): tensor.read
              for name, tensor in pretrained.tensors(self.path).items()}, self.step
    return self._adapted(), 0

  def _adapted(self) -> dict[Path, Callable[[], Any]]:
    """The parameters of the weights that an adapter is for, its maps and rows beside them."""
    model, held = self.config.model, pretrained.tensors(_base(self.adapter, self.path))
    names, prefix = families.names(model), families.find(model).prefix
    found, modules = {}, {}
    for theirs, (name, layer) in names.items():
      path = tuple(part.format(layer) for part in name.ours)
      tensor = held.get(prefix + theirs) or held.get(theirs)
      if tensor is not None:
        found[path] = functools.partial(_read, tensor.read, name.transposed)
      module = (theirs if theirs.startswith('lm_head') else prefix + theirs)
      modules[module.removesuffix('.weight')] = path
    for full, tensor in pretrained.tensors(self.path, [self.path / ADAPTER]).items():
      module, _, part = full.removeprefix('base_model.model.').partition(
          '.lora_' if '.lora_' in full else '.token_adapter.')
      path = modules.get(module)
      ensure(path, f'{self.path} adapts {module}, which the model of its base does not have')
      if part in ('A.weight', 'B.weight'):
        found[*path[:-1], f'lora_{part[0].lower()}'] = functools.partial(
            _read, tensor.read, True)
      elif part == 'trainable_tokens_delta':
        table, axis = path[-1], path[-1] == 'head'
        rows = (self.adapter.get('trainable_token_indices') or {}).get(
            module.rpartition('.')[2]) or [0]
        found[table,] = functools.partial(_first, found[table,], rows[0], int(axis))
        found[f'new_{table}',] = functools.partial(_read, tensor.read, axis)
      else:
        raise InputError(f'{self.path} holds {full}, which no adapter of this package has')
    return found


def _read(read: Callable[[], Any], transposed: bool) -> Any:
  return read().T if transposed else read()


def _first(read: Callable[[], Any], count: int, axis: int) -> Any:
  return read()[:, :count] if axis else read()[:count]


def used(config: Config, tokenizer: Tokenizer) -> set[int]:
  """Ids of the special tokens that a method reads or says when it answers."""
  if methods.get(config.method).is_text:
    return set()
  prompt = methods.get(config.method).prompt(
      [], config.eval.blocks or config.rim.blocks, config, sequences.special_tokens(tokenizer))
  given = {out.start for out in prompt.readouts} - {None}
  return {*prompt.prefix, *given, tokenizer.end} & set(tokenizer.special())


def find(init_from: str) -> Source | None:
  """The weights of this package at a folder, a hub id, or a run in a bucket; None: others'.

  Raises:
    InputError: there is nothing, or it is of another version or program.
  """
  path = pretrained.directory(init_from)
  if path.is_file():
    return None
  if (path / 'adapter_config.json').is_file():
    return _adapter(path)
  found = pretrained.read_json(path / 'config.json')
  if found.get('model_type') == MODEL_TYPE:
    ensure(found.get('format') == FORMAT, f'{path} has the format {found.get("format")!r} of '
           f'another version of latent_reasoning; this one reads format {FORMAT}')
    step = found.get('step')
    return Source(path, 'native', _config(found.get('config'), path),
                  step if isinstance(step, int) else 0)
  if found.keys() >= {'method', 'model', 'optim', 'train'}:
    return Source(path, 'run', _config(found, path), checkpoints=storage.folder(
        init_from if storage.is_address(init_from) else str(path.absolute()),
        'config.model.init_from') / 'checkpoints')
  return None


def _config(found: Any, path: pathlib.Path) -> Config:
  try:
    return config_loading.from_dict(found if isinstance(found, dict) else {'config': found})
  except InputError as error:
    raise InputError(f'{path / "config.json"} is of another version of latent_reasoning: '
                     f'{error}') from None


def _base(values: dict[str, Any], path: pathlib.Path) -> pathlib.Path:
  base = values.get('base_model_name_or_path')
  try:
    return pretrained.directory(base if isinstance(base, str) else '')
  except InputError as error:
    raise InputError(f'{path} is an adapter for the weights {base!r}, which are not there: '
                     f'{error}') from None


def _adapter(path: pathlib.Path) -> Source:
  """An adapter that this package exported.

  Raises:
    InputError: it is of another program.
  """
  found = pretrained.read_json(path / 'adapter_config.json')
  text = path / 'tokenizer.json'
  rank, alpha = found.get('r'), found.get('lora_alpha')
  held = (Tokenizer(tokenizer_files.checked(text, 'restore it'), MOST_STEPS, 1)
          if text.is_file() else None)
  plain = found.get('peft_type') == 'LORA' and not any(
      found.get(name) for name in ('use_rslora', 'use_dora', 'rank_pattern', 'alpha_pattern'))
  ensure(held and held.known > held.size and plain and isinstance(rank, int) and rank > 0
         and isinstance(alpha, (int, float)),
         f'{path} is an adapter of another program than this; put it into its weights (PEFT: '
         'merge_and_unload, save_pretrained), and give the folder that this writes')
  base = _base(found, path)
  config = pretrained.resolve(Config(model=ModelConfig(init_from=str(base))))
  return Source(path, 'peft', config.replace(**{
      'model.lora': LoraConfig(rank, float(alpha)),
      'rim.max_steps': held.known - held.size - len(SPECIAL)}), adapter=found)


def _files(path: pathlib.Path) -> str:
  adapter = path / ADAPTER
  return pretrained.hash_files([adapter] if adapter.is_file() else pretrained.shards(path))


def _hash(*parts: Any) -> str:
  return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


LAYER = re.compile(r'block_(\d+)')


def place_of(path: Path) -> tuple[Path, int | None]:
  """A path as `pretrained.put` has it: with {} for the layer."""
  found = LAYER.fullmatch(path[0])
  return (('block_{}', *path[1:]), int(found[1])) if found else (path, None)
