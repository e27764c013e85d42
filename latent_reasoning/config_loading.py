"""The boundary for configurations: a `ConfigDict` checked key by key, and frozen.

`ml_collections` stops here. What a key may be stands in config.
"""

import dataclasses
import math
import re
import runpy
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from latent_reasoning import config as config_lib
from latent_reasoning.config import (
  ABLATIONS,
  MOVED,
  MOVED_VALUES,
  NOT_CAUSAL,
  TEXTS,
  Config,
)
from latent_reasoning.errors import InputError, nearest


def read(file: str, changes: Mapping[str, Any]) -> Config:
  """A configuration file with some keys changed, as the command line has it.

  Args:
    file: FILE.py or FILE.py:variant.
    changes: {dotted key: value}.

  Raises:
    InputError: no such file or variant, or as `from_dict`.
  """
  path, _, variant = file.partition(':')
  try:
    config = runpy.run_path(path)['get_config'](variant)
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    text = error.args[0] if isinstance(error, KeyError) else error
    raise InputError(f'{file}: {text}; expected FILE.py or FILE.py:variant') from None
  config = from_dict(config).replace(**changes)
  return from_dict(dataclasses.asdict(config))


def from_dict(config: Mapping[str, Any] | ml_collections.ConfigDict) -> Config:
  """Checks a configuration and freezes it; a key that it lacks has its default.

  Raises:
    InputError: an unknown or ill-typed key, or a value out of range;
      names the key and the nearest known one, or what it is called now.
  """
  frozen = _group(Config, config.to_dict() if isinstance(
      config, ml_collections.ConfigDict) else dict(config), '')
  _check(frozen)
  return frozen


def _check(config: Config) -> None:
  """Checks what two keys say together."""
  data, model, optim = config.data, config.model, config.optim
  if data.arithmetic.max_steps < data.arithmetic.min_steps:
    raise InputError(
        f'config.data.arithmetic.max_steps is {data.arithmetic.max_steps}, below '
        f'min_steps {data.arithmetic.min_steps}; raise the one or lower the other')
  if not data.arithmetic.operations or set(data.arithmetic.operations) - set('+-*'):
    raise InputError(
        f'config.data.arithmetic.operations is {data.arithmetic.operations!r}; '
        "expected one or more of the characters '+-*'")
  own = data.state_tracking
  if own.min_steps > own.max_steps or own.live > 26 or (
      own.task == 'hops' and own.max_steps > 9):
    raise InputError(f'config.data.state_tracking has min_steps {own.min_steps}, max_steps '
                     f'{own.max_steps} and {own.live} live; expected min_steps <= max_steps, '
                     'of hops at most 9, and at most 26 live')
  if not data.graphs.min_hops <= data.graphs.max_hops < data.graphs.nodes - 2:
    raise InputError(
        f'config.data.graphs has min_hops {data.graphs.min_hops}, max_hops '
        f'{data.graphs.max_hops} and {data.graphs.nodes} nodes; expected min_hops <= max_hops '
        '< nodes - 2')
  for name, sizes in dataclasses.asdict(data.buckets).items():
    if list(sizes) != sorted(set(sizes)) or sizes and sizes[0] < 1:
      raise InputError(f'config.data.buckets.{name} is {sizes}; expected '
                       'increasing sizes of at least 1')
  if data.packing and data.sort_window > 1:
    raise InputError(f'config.data.sort_window is {data.sort_window}, which sorts problems by '
                     'length, and with config.data.packing rows hold problems of any length; '
                     'expected config.data.sort_window 1')
  if optim.patience and not config.train.eval_every:
    raise InputError('config.train.eval_every is 0, and training goes on until a validation '
                     'ends it (config.optim.patience); expected steps between validations')
  if optim.patience and config.train.extend:
    raise InputError(f'config.train.extend is {config.train.extend}, steps behind the end, '
                     'which with config.optim.patience is where validation improves no more; '
                     'expected one of the two, or more steps of the last stage')
  if config.sweep.budget == 'patience' and not optim.patience:
    raise InputError("config.sweep.budget is 'patience' and config.optim.patience 0; expected "
                     'validations without a better one after which a run ends')
  b = config.baselines
  if (b.part_accuracy or b.part_patience) and not config.train.eval_every:
    raise InputError('config.train.eval_every is 0, and parts of stage 1 go on until a '
                     'validation ends them (config.baselines.part_accuracy, part_patience); '
                     'expected steps between validations, or both of these 0')
  if not b.part_accuracy <= 1:
    raise InputError(f'config.baselines.part_accuracy is {b.part_accuracy}; expected a share, '
                     'at most 1')
  size = model.head_dim or model.embed_dim // model.num_heads
  few = model.num_kv_heads or model.num_heads
  if model.fused_qkv and model.qk_norm:
    raise InputError('config.model.qk_norm needs config.model.fused_qkv=False')
  if model.fused_mlp and model.mlp != 'swiglu':
    raise InputError(f"config.model.fused_mlp is of a gated MLP, and config.model.mlp is "
                     f"'{model.mlp}'; expected 'swiglu'")
  if model.parallel and model.norm_place != 'before':
    raise InputError("config.model.parallel has norms of what is read, and config.model."
                     f"norm_place is '{model.norm_place}'; expected 'before'")
  for name in ('window_layers', 'no_rope_layers'):
    if not all(0 <= i < model.num_layers for i in getattr(model, name)):
      raise InputError(f'config.model.{name} is {getattr(model, name)}; expected layers from '
                       f'0 to {model.num_layers - 1}')
  if model.rope.local_base and model.rope.multiplier != 1:
    raise InputError('config.model.rope.multiplier is of all layers, and local_base of some; '
                     'expected one of them')
  if model.num_heads % few:
    raise InputError(f'config.model.num_heads {model.num_heads} is not a multiple of '
                     f'config.model.num_kv_heads {few}; change one of them')
  if model.embed_dim % model.num_heads and not model.head_dim:
    raise InputError(f'config.model.embed_dim {model.embed_dim} is not a multiple of '
                     f'config.model.num_heads {model.num_heads}; change one of them')
  if model.position_embedding == 'rotary' and int(size * model.rope.fraction) % 2:
    raise InputError('rotary positions need an even head size; found '
                     f'{int(size * model.rope.fraction)}')
  if not 0 < model.rope.fraction <= 1:
    raise InputError(f'config.model.rope.fraction is {model.rope.fraction}; expected a share '
                     'above 0, at most 1')
  if model.attention == 'cudnn' and model.dtype == 'float32':
    raise InputError("config.model.attention is 'cudnn', which has no float32; expected "
                     "config.model.dtype='bfloat16' or 'float16', or attention 'shared_prefix'")
  for pattern in model.lora.targets:
    try:
      re.compile(pattern)
    except re.error as error:
      raise InputError(f'config.model.lora.targets has {pattern!r}, which is no regular '
                       f'expression: {error}') from None
  if not model.lora.dropout < 1:
    raise InputError(f'config.model.lora.dropout is {model.lora.dropout}; expected less than 1')
  if model.lora.rank and not model.lora.targets:
    raise InputError("config.model.lora.targets is (); expected patterns, such as ('.',) for "
                     'all dense layers')
  if model.frozen_dtype != 'float32' and optim.trainable == 'all':
    raise InputError("config.model.frozen_dtype is 'bfloat16', but nothing is frozen; what is "
                     "trained is float32. Expected config.optim.trainable='new'")
  sizes = dataclasses.astuple(config.mesh)
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise InputError(f'config.mesh is {dataclasses.asdict(config.mesh)}; expected sizes of at '
                     'least 1, and at most one -1')
  _check_imm(config)
  _check_reasoning_decoder(config)
  if (config.aux.align or config.aux.smooth) and not config.aux.temperature:
    raise InputError('config.aux.temperature is 0; expected a number above 0')
  if (config.method == 'language_model') != (data.name in TEXTS):
    raise InputError(f"config.method is '{config.method}' with config.data.name "
                     f"'{data.name}'; expected method language_model with one of {TEXTS}, "
                     'and any other method with none of them')
  if config.method == 'language_model' and config.eval.checkpoint_selection == 'paper':
    raise InputError("config.eval.checkpoint_selection is 'paper', but method language_model "
                     "answers no test items; expected 'validation'")
  if optim.batch_size % optim.grad_accum_steps:
    raise InputError(f'config.optim.batch_size {optim.batch_size} is not a multiple '
                     f'of config.optim.grad_accum_steps {optim.grad_accum_steps}')
  for name in ('stage1', 'stage2'):
    stage = getattr(optim, name)
    if not stage.dropout < 1:
      raise InputError(f'config.optim.{name}.dropout is {stage.dropout}; expected '
                       'less than 1')
    if not stage.warmup <= 1:
      raise InputError(f'config.optim.{name}.warmup is {stage.warmup}; expected a '
                       'share of the stage, 0 to 1')
  if optim.stage1.optimizer != optim.stage2.optimizer and not optim.stage2.reset_optimizer:
    raise InputError('config.optim.stage2.optimizer is not that of stage 1, so its state '
                     'cannot go on; set config.optim.stage2.reset_optimizer=True')
  if config.tokenizer.kind == 'file' and not config.tokenizer.path:
    raise InputError("config.tokenizer.kind is 'file' but config.tokenizer.path is "
                     'empty; give the path of a tokenizer.json')


def _check_imm(config: Config) -> None:
  imm, model = config.imm, config.model
  for name in imm.ablate:
    if name not in ABLATIONS:
      raise InputError(f'config.imm.ablate has {name!r}; expected some of {ABLATIONS}')
  if any(not 0 <= layer < model.num_layers for layer in imm.layers):
    raise InputError(f'config.imm.layers is {imm.layers}; expected layers from 0 to '
                     f'{model.num_layers - 1}, or () for all')
  if imm.linformer_rank > model.embed_dim:
    raise InputError(f'config.imm.linformer_rank is {imm.linformer_rank}, above '
                     f'config.model.embed_dim {model.embed_dim}; 0 is full rank')
  if not imm.write_policy:
    return
  if model.scan and (imm.layers or imm.shared):
    raise InputError('config.model.scan needs equal layers; set it to False, or '
                     'config.imm.layers=() and config.imm.shared=False')
  if not config.rim.readout_sees_question:
    raise InputError('config.rim.readout_sees_question=False with config.imm.write_policy: the '
                     'bank would show the question to the readouts; choose one of them')
  if not config.causal and config.method != 'language_model':
    causal = [name for name in typing.get_args(typing.get_type_hints(type(imm))['write_policy'])
              if name and name not in NOT_CAUSAL]
    raise InputError(
        f"config.imm.write_policy '{imm.write_policy}' reads the future, so method "
        f"'{config.method}' "
        "would be shown its answers; it is for method 'language_model', to reproduce a paper. "
        f"Causal policies: {', '.join(map(repr, causal))}")


def _check_reasoning_decoder(config: Config) -> None:
  decoder = config.reasoning_decoder
  if not decoder.source:
    return
  if config.method == 'language_model':
    raise InputError(f"config.reasoning_decoder.source is '{decoder.source}', but method "
                     'language_model has no reasoning to say; expected a method that answers '
                     'questions')
  if decoder.source == 'memory' and not config.imm.write_policy:
    raise InputError("config.reasoning_decoder.source is 'memory', but "
                     "config.imm.write_policy is ''; "
                     "expected a policy such as 'gated'")


def _group(cls: type, values: Any, path: str) -> Any:
  if not isinstance(values, dict):
    raise InputError(f'config.{path} is {values!r}; expected a group of keys')
  dot = f'{path}.' if path else ''
  hints = typing.get_type_hints(cls)
  for key in values:
    if key not in hints:
      raise InputError(moved(f'{dot}{key}') or
                       f'config.{dot}{key} is unknown; ' + '; '.join(filter(None, (
                           config_lib.elsewhere(str(key)), nearest(key, hints)))))
  return cls(**{field.name: _value(hints[field.name], values[field.name],
                                   f'{dot}{field.name}', field.metadata)
                for field in dataclasses.fields(cls) if field.name in values})


def _value(hint: Any, value: Any, path: str, metadata: Mapping) -> Any:
  if dataclasses.is_dataclass(hint):
    return _group(hint, value, path)
  if isinstance(value, str) and (path, value) in MOVED_VALUES:
    raise InputError(f'config.{path}={value} is now {MOVED_VALUES[path, value]}')
  if typing.get_origin(hint) is typing.Literal:
    choices = typing.get_args(hint)
    if value not in choices or type(value) is not type(choices[0]):
      raise InputError(f'config.{path} is {value!r}; expected one of {choices}')
    return value
  if typing.get_origin(hint) is tuple:
    item = typing.get_args(hint)[0]
    if not isinstance(value, (tuple, list)):
      raise InputError(f'config.{path} is {value!r}; expected a tuple of {item.__name__}')
    return tuple(_value(item, v, path, metadata) for v in value)
  if hint is float and type(value) is int:
    value = float(value)
  if type(value) is not hint:
    raise InputError(f'config.{path} is {value!r} ({type(value).__name__}); expected '
                     f'{hint.__name__}')
  low = metadata['at_least']
  if hint in (int, float):
    if not low <= value < math.inf:
      raise InputError(f'config.{path} is {value!r}; expected ' + (
          f'at least {low}' if low and low > -math.inf and value < math.inf
          else 'a finite number' + (' of at least 0' if not low else '')))
  return value


def moved(key: str) -> str:
  """What to say of a key that has another name now; '' for all others."""
  return f'config.{key} is now config.{MOVED[key]}' if key in MOVED else ''


def help_text(config: Config | None = None) -> str:
  """Every key with its value, what it may be and what it means.

  Args:
    config: whose values; beside those that it changes stands the default. None: defaults.
  """
  values = config_lib.flatten(config or Config())
  def lines(cls: type, prefix: str) -> list[str]:
    hints, own, inner = typing.get_type_hints(cls), [], []
    for field in dataclasses.fields(cls):
      hint, name = hints[field.name], f'{prefix}{field.name}'
      if dataclasses.is_dataclass(hint):
        inner += lines(hint, f'{name}.')
        continue
      choices = (f" ({' | '.join(map(repr, typing.get_args(hint)))})"
                 if typing.get_origin(hint) is typing.Literal else '')
      value, usual = values[name], field.default
      if isinstance(value, list):
        value = tuple(value)
      changed = f'; the default is {usual!r}' if value != usual else ''
      own += [f'  --config.{name}={value!r}{choices}{changed}',
              f"      {field.metadata['meaning']}"]
    title = cls.__doc__.partition('\n')[0]
    return [f'\n{prefix[:-1]}: {title}' if prefix else title, *own, *inner]
  return '\n'.join(lines(Config, ''))
