"""config.model.init_from: weights of others (hf.load), or of this package (hf.native).

Another run's LoRA is kept where the new run has the same maps, else it is merged into the
weights. Special tokens keep their rows; those that the new run has more of are new.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import chex
import jax
import numpy as np
from flax import traverse_util

from latent_reasoning.config import Config
from latent_reasoning.data.tokenizers import Tokenizer
from latent_reasoning.errors import InputError
from latent_reasoning.hf import load as pretrained
from latent_reasoning.hf import native
from latent_reasoning.hf.native import Source
from latent_reasoning.models import lora
from latent_reasoning.parallel import multihost


def resolve(config: Config) -> Config:
  """The configuration with sizes and tokenizer of what it starts from."""
  source = native.find(config.model.init_from) if config.model.init_from else None
  if source is None:
    return pretrained.resolve(config)
  theirs = source.config
  model = dataclasses.replace(theirs.model, **{
      name: getattr(config.model, name) for name in native.OWN})
  t = config.tokenizer
  bos = theirs.tokenizer.add_bos if t.add_bos == 'auto' else t.add_bos
  config = dataclasses.replace(config, model=model, tokenizer=dataclasses.replace(
      t, kind='file', path=str(source.path), add_bos=bos, at_least=theirs.tokenizer.at_least))
  _check_memory(source, config)
  return config


def _check_memory(source: Source, config: Config) -> None:
  """Raises InputError where the weights have a memory that is not the run's."""
  theirs, ours = source.config.imm, config.imm
  wrong = [f'config.imm.{name}={value!r}' for name, value in dataclasses.asdict(theirs).items()
           if name not in ('implementation', 'chunk') and value != getattr(ours, name)]
  if theirs.write_policy and wrong:
    raise InputError(
        f'{source.path} has an implicit memory of another kind than this run; expected '
        f"{', '.join(wrong)}")


def fingerprint(init_from: str) -> str:
  """A hash of which weights they are."""
  source = native.find(init_from)
  return source.fingerprint() if source else pretrained.fingerprint(init_from)


def untrained(config: Config, tokenizer: Tokenizer) -> list[str]:
  """Special tokens that a run's method reads or says and its weights were not trained on."""
  source, names = native.find(config.model.init_from), tokenizer.special()
  used = native.used(config, tokenizer)
  new = used - source.trained if source else {i for i in used if i >= tokenizer.known}
  return [names[i] for i in sorted(new)]


def load(config: Config, like: dict, tokenizer: Tokenizer, rng: chex.PRNGKey,
         fresh: Callable[[], dict], placed: dict | None = None) -> dict:
  """Parameters of a model from `config.model.init_from`.

  Args:
    config: as `resolve` made it.
    tokenizer: of the run.
    like, rng, fresh, placed: as `pretrained.load`.

  Raises:
    InputError: the weights are not those of the model.
  """
  source = native.find(config.model.init_from)
  if source is None:
    return pretrained.load(config.model, like, tokenizer.known, rng, fresh, placed)
  if (source.tokenizer.size, source.tokenizer.start) != (tokenizer.size, tokenizer.start):
    raise InputError(f'{source.path} has a tokenizer of {source.tokenizer.size} entries, this '
                     f"run's has {tokenizer.size}; expected the same (config.tokenizer.path "
                     "'' takes it)")
  held, step = source.parameters()
  flat = native.by_layer({path: a if path[0] != 'blocks' else [a] * a.shape[0]
                          for path, a in traverse_util.flatten_dict(like).items()})
  kept = _same_lora(source, config, held, flat)
  out, wrong, left = jax.tree.map(lambda a: None, like), [], []
  keys = dict(zip(('embedding', 'head'), jax.random.split(rng), strict=True))
  for path, read in held.items():
    name = path[-1]
    try:
      if name in keys:
        new = held.get((f'new_{name}',))
        value = read() if new is None else np.concatenate(
            [np.asarray(a, np.float32) for a in (read(), new())], axis=int(name == 'head'))
        axis = int(name == 'head')
        rows = sum(like[n].shape[axis] for n in (name, f'new_{name}') if n in like)
        pretrained.put_rows(out, like, placed, name, value, min(source.tokens, rows),
                            keys[name])
      elif name in lora.NEW and not (kept and name.startswith('lora')):
        continue  # merged, or put with the rows
      elif path not in flat:
        left.append(path)
      else:
        maps = None if kept or name != 'kernel' else held.get((*path[:-1], 'lora_a'))
        value = read() if maps is None else _merged(source, path, held)
        ours, layer = native.place_of(path)
        pretrained.put(out, like, placed, ours, layer, value, config.model.scan)
    except ValueError as error:
      wrong.append(f'{"/".join(path)}: {error}')
  missing = [path for path in flat if path not in held and not lora.is_new(path)]
  wrong += [f'{"/".join(path)} is missing' for path in missing]
  wrong += [f'{"/".join(path)} is surplus' for path in left
            if not any(part in ('reasoning_decoder', 'thought') for part in path)]
  if wrong:
    raise InputError(f'{source.path} does not hold the model of this run: '
                     f'{pretrained.some(wrong)}')
  _say(source, config, step, held, flat, kept, left)
  return pretrained.fill_in(out, fresh, placed)


def _same_lora(source: Source, config: Config, held: dict, flat: dict) -> bool:
  """Whether both have LoRA of one rank and scale on the same layers."""
  theirs, ours = source.config.model.lora, config.model.lora
  return (theirs.rank, theirs.alpha) == (ours.rank, ours.alpha) and (
      {p for p in held if p[-1] == 'lora_a'} == {p for p in flat if p[-1] == 'lora_a'})


def _merged(source: Source, path: native.Path, held: dict[native.Path, Any]) -> chex.Array:
  parts = {path: held[path]().astype('float32')}
  for name in ('lora_a', 'lora_b'):
    parts[*path[:-1], name] = held[*path[:-1], name]()
  merged = lora.merge(traverse_util.unflatten_dict(parts), source.config.model.lora)
  return traverse_util.flatten_dict(merged)[path]


def _say(source: Source, config: Config, step: int, held: dict, flat: dict, kept: bool,
         left: list) -> None:
  """One line about what a run begins with."""
  if not multihost.is_primary():
    return
  maps = any(path[-1] == 'lora_a' for path in held)
  new = {next((part for part in path if part in lora.PARTS), 'LoRA') for path in flat
         if path not in held and path[-1] not in ('new_embedding', 'new_head')}
  gone = {next((part for part in path if part in lora.PARTS), path[-1]) for path in left}
  what = {'run': f'{source.config.method}, step {step:,}', 'peft': 'adapter',
          'native': f'{source.config.method}, step {step:,}'}[source.kind]
  said = [f'begins with {config.model.init_from} ({what})',
          *[f"its LoRA is {'kept' if kept else 'merged'}"] * maps,
          *[f"new: {', '.join(sorted(new))}"] * bool(new),
          *[f"left out: {', '.join(sorted(gone))}"] * bool(gone)]
  print('; '.join(said), file=sys.stderr)
