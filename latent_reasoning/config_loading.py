"""The door for configurations: a `ConfigDict` checked key by key, and frozen.

`ml_collections` stops here. A missing key is as much an error as an unknown one.
"""

import dataclasses
import math
import re
import runpy
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from latent_reasoning.config import OFF, PROBLEMS, TEXTS, Config, flatten, get
from latent_reasoning.errors import InputError, nearest

# Keys with a fixed set of values. Methods are checked by their table.
CHOICES = {
    'data.name': (*PROBLEMS, *TEXTS),
    'data.steps': ('equations', 'sentences'),
    'data.on_error': ('raise', 'skip'),
    'data.too_long': ('raise', 'drop'),
    'tokenizer.kind': ('char', 'bpe', 'file'),
    'tokenizer.add_bos': ('auto', 'true', 'false'),
    'model.family': ('gpt', 'llama'),
    'model.rope.scaling': ('', 'linear', 'llama3'),
    'model.positions': ('learned', 'rotary'),
    'model.frozen_dtype': ('float32', 'bfloat16'),
    'optim.trained': ('all', 'new'),
    'model.dtype': ('float32', 'bfloat16', 'float16'),
    'model.attention': ('split', 'packed', 'cudnn', 'splash'),
    'rim.readout_offset': (0, 1),
    'rim.schedule': ('uniform', 'linear', 'relative'),
    'rim.block_attention': ('causal', 'bidirectional'),
    'imm.write': ('', 'sequence_mean', 'prefix_mean', 'ring', 'gated', 'delta'),
    'imm.place': ('after', 'before'),
    'imm.implementation': ('chunked', 'naive'),
    'explicit.source': ('', 'blocks', 'memory'),
    'optim.stage1.optimizer': ('adamw', 'muon'),
    'optim.stage2.optimizer': ('adamw', 'muon'),
    'optim.stage1.schedule': ('constant', 'cosine'),
    'optim.stage2.schedule': ('constant', 'cosine'),
    'sweep.budget': ('steps', 'flops'),
    'eval.checkpoint': ('best', 'last'),
    'eval.protocol': ('validation', 'paper'),
}

SIGNED = ('imm.gate_bias', 'mesh.data', 'mesh.fsdp', 'mesh.tensor')

# Integers and floats that must be at least 1, or at least 0, to mean anything.
POSITIVE = (
    'data.sort_window', 'data.block', 'data.arithmetic.min_steps', 'data.arithmetic.max_value',
    'data.arithmetic.templates', 'data.arithmetic.train_size',
    'data.arithmetic.valid_size', 'data.arithmetic.test_size',
    'data.graphs.min_hops', 'data.graphs.train_size', 'data.graphs.valid_size',
    'data.graphs.test_size',
    'tokenizer.pad_to', 'model.layers', 'model.width', 'model.heads',
    'model.hidden', 'model.max_positions', 'rim.blocks', 'rim.max_steps',
    'rim.peers.parts', 'rim.peers.thoughts', 'imm.rounds', 'imm.every', 'imm.chunk',
    'explicit.layers', 'explicit.steps',
    'optim.batch_size', 'optim.accumulate', 'train.log_every', 'train.keep',
    'train.peer_timeout',
    'eval.batch_size', 'eval.valid_problems', 'eval.max_tokens',
    'eval.latency_repeats', 'eval.audit_rows')


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
    config.update_from_flattened_dict(changes)
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    text = error.args[0] if isinstance(error, KeyError) else error
    raise InputError(f'{file}: {text}; expected FILE.py or FILE.py:variant, and keys that '
                     'the file has') from None
  return from_dict(config)


def from_dict(config: ml_collections.ConfigDict) -> Config:
  """Checks a `ConfigDict` and freezes it.

  Raises:
    InputError: an unknown, missing or ill-typed key, or a value out of range;
      names the key and the nearest known one.
  """
  frozen = _group(Config, config.to_dict(), '')
  for key, choices in CHOICES.items():
    if (value := get(frozen, key)) not in choices:
      raise InputError(f'config.{key} is {value!r}; expected one of {choices}')
  for key in POSITIVE:
    if (value := get(frozen, key)) < 1:
      raise InputError(f'config.{key} is {value!r}; expected at least 1')
  for key, value in flatten(frozen).items():
    low = -math.inf if key in SIGNED else -1e-300
    if isinstance(value, (int, float)) and not low < value < math.inf:
      raise InputError(f'config.{key} is {value!r}; expected a finite number of at least 0')
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
  if not data.graphs.min_hops <= data.graphs.max_hops < data.graphs.nodes - 2:
    raise InputError(
        f'config.data.graphs has min_hops {data.graphs.min_hops}, max_hops '
        f'{data.graphs.max_hops} and {data.graphs.nodes} nodes; expected min_hops <= max_hops '
        '< nodes - 2')
  for name, sizes in dataclasses.asdict(data.buckets).items():
    if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
      raise InputError(f'config.data.buckets.{name} is {sizes}; expected '
                       'increasing sizes of at least 1')
  size = model.head_size or model.width // model.heads
  few = model.kv_heads or model.heads
  if model.family == 'gpt' and (model.head_size or model.kv_heads):
    raise InputError('config.model.head_size and kv_heads are of family llama; expected 0 '
                     'with family gpt')
  if model.heads % few:
    raise InputError(f'config.model.heads {model.heads} is not a multiple of '
                     f'config.model.kv_heads {few}; change one of them')
  if model.width % model.heads and not model.head_size:
    raise InputError(f'config.model.width {model.width} is not a multiple of '
                     f'config.model.heads {model.heads}; change one of them')
  if model.positions == 'rotary' and size % 2:
    raise InputError(f'rotary positions need an even head size; found {size}')
  if model.attention == 'cudnn' and model.dtype == 'float32':
    raise InputError("config.model.attention is 'cudnn', which has no float32; expected "
                     "config.model.dtype='bfloat16' or 'float16', or attention 'split'")
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
  if model.frozen_dtype != 'float32' and optim.trained == 'all':
    raise InputError("config.model.frozen_dtype is 'bfloat16', but nothing is frozen; what is "
                     "trained is float32. Expected config.optim.trained='new'")
  sizes = dataclasses.astuple(config.mesh)
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise InputError(f'config.mesh is {dataclasses.asdict(config.mesh)}; expected sizes of at '
                     'least 1, and at most one -1')
  _check_imm(config)
  _check_explicit(config)
  _check_rim(config)
  if (config.method == 'lm') != (data.name in TEXTS):
    raise InputError(f"config.method is '{config.method}' with config.data.name "
                     f"'{data.name}'; expected method lm with one of {TEXTS}, and any "
                     f'other method with one of {PROBLEMS}')
  if config.method == 'lm' and config.eval.protocol == 'paper':
    raise InputError("config.eval.protocol is 'paper', but method lm answers no test items; "
                     "expected 'validation'")
  if optim.batch_size % optim.accumulate:
    raise InputError(f'config.optim.batch_size {optim.batch_size} is not a multiple '
                     f'of config.optim.accumulate {optim.accumulate}')
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
  for name in imm.off:
    if name not in OFF:
      raise InputError(f'config.imm.off has {name!r}; expected some of {OFF}')
  if any(not 0 <= layer < model.layers for layer in imm.layers):
    raise InputError(f'config.imm.layers is {imm.layers}; expected layers from 0 to '
                     f'{model.layers - 1}, or () for all')
  if imm.rank > model.width:
    raise InputError(f'config.imm.rank is {imm.rank}, above config.model.width '
                     f'{model.width}; 0 is full rank')
  if not imm.write:
    return
  if model.scan and (imm.layers or imm.shared):
    raise InputError('config.model.scan needs equal layers; set it to False, or '
                     'config.imm.layers=() and config.imm.shared=False')
  if not config.rim.readout_sees_question:
    raise InputError('config.rim.readout_sees_question=False with config.imm.write: the '
                     'bank would show the question to the readouts; choose one of them')
  if imm.write == 'gated' and imm.implementation == 'chunked' and imm.chunk > 16:
    raise InputError(f'config.imm.chunk is {imm.chunk}; expected at most 16 for gated')
  if not config.causal and config.method != 'lm':
    raise InputError(
        f"config.imm.write '{imm.write}' reads the future, so method '{config.method}' "
        "would be shown its answers; it is for method 'lm', to reproduce a paper. "
        "Causal policies: 'prefix_mean', 'ring', 'gated', 'delta'")


def _check_explicit(config: Config) -> None:
  explicit = config.explicit
  if not explicit.source:
    return
  if config.method == 'lm':
    raise InputError(f"config.explicit.source is '{explicit.source}', but method lm has no "
                     'reasoning to say; expected a method that answers questions')
  if explicit.source == 'blocks' and config.method != 'rim':
    raise InputError(f"config.explicit.source is 'blocks', but method {config.method} has "
                     "none; expected method rim, or source 'memory' with config.imm.write")
  if explicit.source == 'memory' and not config.imm.write:
    raise InputError("config.explicit.source is 'memory', but config.imm.write is ''; "
                     "expected a policy such as 'gated'")


def _check_rim(config: Config) -> None:
  aux = config.aux
  if aux.align or aux.smooth:
    if config.method != 'rim' or config.explicit.joint:
      raise InputError('config.aux.align and smooth are losses on RiM\'s blocks; expected '
                       'config.method=rim without config.explicit.joint')
    if not aux.temperature:
      raise InputError('config.aux.temperature is 0; expected a number above 0')
  if config.rim.externalize and config.method != 'rim':
    raise InputError(f'config.rim.externalize says what blocks hold; method {config.method} '
                     'has none; expected method rim')


def _group(cls: type, values: Any, path: str) -> Any:
  if not isinstance(values, dict):
    raise InputError(f'config.{path} is {values!r}; expected a group of keys')
  dot = f'{path}.' if path else ''
  fields = typing.get_type_hints(cls)
  for key in values:
    if key not in fields:
      raise InputError(f"config.{dot}{key} is unknown; {nearest(key, fields)}")
  for key in fields:
    if key not in values:
      raise InputError(f'config.{dot}{key} is missing; every key is written in the '
                       'config file')
  return cls(**{key: _value(hint, values[key], f'{dot}{key}')
                for key, hint in fields.items()})


def _value(hint: Any, value: Any, path: str) -> Any:
  if dataclasses.is_dataclass(hint):
    return _group(hint, value, path)
  if typing.get_origin(hint) is tuple:
    item = typing.get_args(hint)[0]
    if not isinstance(value, (tuple, list)):
      raise InputError(f'config.{path} is {value!r}; expected a tuple of {item.__name__}')
    return tuple(_value(item, v, path) for v in value)
  if hint is float and type(value) is int:
    return float(value)
  if type(value) is not hint:
    raise InputError(f'config.{path} is {value!r} ({type(value).__name__}); expected '
                     f'{hint.__name__}')
  return value
