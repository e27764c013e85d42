"""Configuration: one frozen dataclass for each part of the program.

`ml_collections` stops here. A config file builds a `ConfigDict`; `from_dict`
checks it against these dataclasses key by key, and every other module receives
the frozen dataclass of its own group. A default lives in the config file,
never here, so a missing key is as much an error as an unknown one.
"""

import dataclasses
import math
import re
import typing
from typing import Any

import ml_collections

from latent_reasoning.errors import InputError, nearest


@dataclasses.dataclass(frozen=True)
class ArithmeticConfig:
  """Generated chains of operations, evaluated left to right."""
  min_steps: int  # fewest operations in a problem
  max_steps: int  # most operations in a problem
  modulus: int  # every result is taken modulo this; 0: plain integers
  max_value: int  # operands are drawn from 0 … max_value
  operations: str  # subset of '+-*'
  templates: int  # how many wordings: 1 is the terse expression alone
  train_size: int  # problems in the training split
  valid_size: int  # problems in the validation split
  test_size: int  # problems in the test split


@dataclasses.dataclass(frozen=True)
class BucketConfig:
  """Static sizes that a batch is padded to: the smallest that holds it."""
  prefix: tuple[int, ...]  # tokens of question and memory blocks
  readout: tuple[int, ...]  # input tokens of one readout
  count: tuple[int, ...]  # readouts in a row


@dataclasses.dataclass(frozen=True)
class DataConfig:
  name: str  # 'arithmetic' | 'gsm8k' | 'gsm8k_aug' | 'files' | a text (data.text)
  path: str  # a text file, for method lm
  block: int  # tokens of a row of text
  dir: str  # file or directory of the data; '': generated, or from the hub
  train: str  # file of one split, where `dir` does not name it
  valid: str
  test: str
  cache_dir: str  # where hub downloads are kept; '': the library's default
  steps: str  # 'equations' | 'sentences': what a step is in OpenAI's JSONL
  step_marks: bool  # write equation steps as <<3+4=7>> instead of 3+4=7
  on_error: str  # 'raise' | 'skip' (and count) a malformed line
  too_long: str  # 'raise' | 'drop' (and count) a row no bucket holds
  valid_size: int  # problems carved from train where there is no valid split
  limit: int  # use only the first N problems of each split; 0: all
  sort_window: int  # batches whose rows are sorted by length together; 1: none
  arithmetic: ArithmeticConfig
  buckets: BucketConfig


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  kind: str  # 'char' | 'bpe' | 'file'
  path: str  # a tokenizer.json, for kind 'file'
  vocab_size: int  # most entries of a trained 'bpe', special tokens not counted
  at_least: int  # entries of the vocabulary; set from pretrained weights
  pad_to: int  # the vocabulary is padded to a multiple of this


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary positions (models.layers)."""
  base: float
  scaling: str  # '' | 'linear' | 'llama3': how a longer context is reached
  factor: float  # of the scaling
  low: float  # of llama3: wavelengths above original / low are stretched whole
  high: float  # of llama3: those below original / high are kept
  original: int  # positions before llama3's scaling


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Low-rank adaptation of dense layers (Hu et al. 2021)."""
  rank: int  # 0: none
  alpha: float  # what a layer adds is scaled by alpha / rank
  dropout: float  # on what goes into the low-rank maps
  targets: tuple[str, ...]  # patterns (re.search) of paths such as 'block_3/qkv'


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  init_from: str  # pretrained weights: a directory or hub id, which sets the sizes; '': none
  family: str  # 'gpt' | 'llama' (also Mistral, Qwen, SmolLM2)
  layers: int
  width: int
  heads: int
  kv_heads: int  # of keys and values, family llama; 0: as many
  head_size: int  # family llama; 0: width / heads
  hidden: int  # width of the MLP
  max_positions: int
  positions: str  # 'learned' | 'rotary'
  tied: bool  # the head is the transposed embedding table
  bias: bool  # biases in dense layers and norms; of family llama, in the MLP
  qkv_bias: bool  # family llama, as Qwen2
  out_bias: bool  # family llama, of attention's output
  qk_norm: bool  # family llama: queries and keys are normed, as in Qwen3
  norm_epsilon: float
  rope: RopeConfig
  lora: LoraConfig
  dtype: str  # compute dtype; parameters and softmax stay float32
  attention: str  # 'split' (fast) | 'packed' (one dense mask, the oracle)
  scan: bool  # one compiled layer, scanned; parameters are stacked
  remat: bool  # recompute each layer in the backward pass
  frozen_dtype: str  # of parameters that are not trained; what is trained is float32


@dataclasses.dataclass(frozen=True)
class RimConfig:
  """Memory blocks and readouts; RiM, arXiv 2605.30343."""
  blocks: int  # K, blocks in stage 2 and at inference
  block_tokens: int  # M, memory tokens between <b> and </b>
  max_steps: int  # T_max, most reasoning steps, thus most blocks in stage 1
  readout_offset: int  # 1: block t predicts step t+1; 0: step t
  schedule: str  # 'uniform' | 'linear' | 'relative': how step weights anneal
  block_attention: str  # 'causal' | 'bidirectional' inside a block
  readout_sees_question: bool  # False forces everything through the blocks
  pause_tokens: int  # method 'pause': how many follow the question


@dataclasses.dataclass(frozen=True)
class ImmConfig:
  """A memory bank inside the layers; IMM, arXiv 2502.21030 (models.memory)."""
  write: str  # a policy of models.recurrence; '': no memory
  slots: int  # N; 0: round(sqrt(width))
  rank: int  # R of f_write, f_query and g, and width of the bank; 0: full
  layers: tuple[int, ...]  # which layers have it, from 0; (): all
  shared: bool  # one bank: the first of them writes, all read
  rounds: int  # writes and reads of a token in a layer, a bank each
  every: int  # only each n-th token writes
  place: str  # 'after' | 'before' attention and MLP
  off: tuple[str, ...]  # mechanisms off: 'write', 'query', 'read', 'norm'
  out_scale: float  # of g's initial matrix; 0: changes nothing at step 0 but the norm
  gate_bias: float  # initial; sigmoid(gate_bias) of an addressed slot is overwritten
  implementation: str  # 'chunked' (fast) | 'naive' (token by token, the oracle)
  chunk: int  # tokens in a chunk; above 16, float32 overflows where gates saturate


@dataclasses.dataclass(frozen=True)
class ExplicitConfig:
  """A small decoder beside the model that says as text what its memory holds."""
  source: str  # '' | 'blocks': hidden states of RiM's blocks | 'memory': what the IMM read
  joint: bool  # trained with the model; False: on the finished model, by --mode=explain
  layers: int  # of the decoder, as wide as the model's
  weight: float  # of its tokens in the loss beside the model's own, where joint
  steps: int  # of its own training, where not joint
  learning_rate: float  # of that


@dataclasses.dataclass(frozen=True)
class StageConfig:
  """One stage of the curriculum."""
  steps: int  # training steps; 0: count epochs instead
  epochs: float  # passes over the training split, where steps is 0
  learning_rate: float
  schedule: str  # 'constant' | 'cosine', after the warm-up
  warmup: float  # share of the stage's steps spent in linear warm-up
  dropout: float
  optimizer: str  # 'adamw' | 'muon', for the matrices inside the layers
  reset_optimizer: bool  # start the stage with a fresh optimizer state


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  trained: str  # 'all' | 'new': LoRA, rows of new tokens and memory; the rest is frozen
  batch_size: int  # problems in a step, over all processes
  accumulate: int  # microbatches a step is cut into
  muon_scale: float  # learning rate of matrices under muon, as a multiple of the stage's
  beta1: float
  beta2: float
  epsilon: float
  weight_decay: float  # on matrices only: no biases, norms or embeddings
  clip: float  # global norm of the gradient; 0: no clipping
  stage1: StageConfig
  stage2: StageConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  log_every: int  # steps between lines of metrics.jsonl
  eval_every: int  # steps between validations; 0: at the end only
  save_every: int  # steps between checkpoints; 0: at the end only
  keep: int  # newest checkpoints kept, beside the best
  max_loss: float  # a loss above this stops the run; 0: 3 ln(vocabulary)
  compilation_cache: str  # directory of compiled programs; '': none
  prefetch: int  # batches made ahead of time in a thread


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  batch_size: int
  valid_problems: int  # problems per validation during training
  test_problems: int  # test problems scored at the end; 0: all
  blocks: int  # blocks at inference; 0: as trained
  max_tokens: int  # tokens a readout may generate, chain of thought included
  samples: int  # pass@k by sampling; 0: off
  temperature: float  # of the samples
  top_k: int  # likeliest tokens that samples are drawn from; 0: all
  checkpoint: str  # 'best' (by validation accuracy) | 'last'
  sets: tuple[str, ...]  # more test files, scored beside the test split
  latency_repeats: int  # timed runs per entry of --mode=latency
  audit_rows: int  # random real rows per check of --mode=audit


@dataclasses.dataclass(frozen=True)
class SweepConfig:
  """Several runs by one command (sweep)."""
  runs: tuple[str, ...]  # 'name key=value key=value …', keys without 'config.'; (): none
  seeds: tuple[int, ...]  # each run with each of them
  control: str  # name of the run that others are held against


@dataclasses.dataclass(frozen=True)
class Config:
  method: str  # a row of layout.METHODS
  seed: int
  data: DataConfig
  tokenizer: TokenizerConfig
  model: ModelConfig
  rim: RimConfig
  imm: ImmConfig
  explicit: ExplicitConfig
  optim: OptimConfig
  train: TrainConfig
  eval: EvalConfig
  sweep: SweepConfig

  @property
  def causal(self) -> bool:
    """Whether nothing reads the future."""
    return self.imm.write not in NOT_CAUSAL


NOT_CAUSAL = ('sequence_mean',)  # policies of models.recurrence that read the future
OFF = ('write', 'query', 'read', 'norm')  # mechanisms of the memory

PROBLEMS = ('arithmetic', 'gsm8k', 'gsm8k_aug', 'files')  # of data.name
TEXTS = ('text', 'shakespeare', 'wikitext', 'c4')  # of data.name, for method lm

# Keys with a fixed set of values. Methods are checked by their table.
CHOICES = {
    'data.name': (*PROBLEMS, *TEXTS),
    'data.steps': ('equations', 'sentences'),
    'data.on_error': ('raise', 'skip'),
    'data.too_long': ('raise', 'drop'),
    'tokenizer.kind': ('char', 'bpe', 'file'),
    'model.family': ('gpt', 'llama'),
    'model.rope.scaling': ('', 'linear', 'llama3'),
    'model.positions': ('learned', 'rotary'),
    'model.frozen_dtype': ('float32', 'bfloat16'),
    'optim.trained': ('all', 'new'),
    'model.dtype': ('float32', 'bfloat16', 'float16'),
    'model.attention': ('split', 'packed'),
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
    'eval.checkpoint': ('best', 'last'),
}

SIGNED = ('imm.gate_bias',)

# Integers and floats that must be at least 1, or at least 0, to mean anything.
POSITIVE = (
    'data.sort_window', 'data.block', 'data.arithmetic.min_steps', 'data.arithmetic.max_value',
    'data.arithmetic.templates', 'data.arithmetic.train_size',
    'data.arithmetic.valid_size', 'data.arithmetic.test_size',
    'tokenizer.pad_to', 'model.layers', 'model.width', 'model.heads',
    'model.hidden', 'model.max_positions', 'rim.blocks', 'rim.max_steps',
    'imm.rounds', 'imm.every', 'imm.chunk', 'explicit.layers', 'explicit.steps',
    'optim.batch_size', 'optim.accumulate', 'train.log_every', 'train.keep',
    'eval.batch_size', 'eval.valid_problems', 'eval.max_tokens',
    'eval.latency_repeats', 'eval.audit_rows')


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
  _check_imm(config)
  _check_explicit(config)
  if (config.method == 'lm') != (data.name in TEXTS):
    raise InputError(f"config.method is '{config.method}' with config.data.name "
                     f"'{data.name}'; expected method lm with one of {TEXTS}, and any "
                     f'other method with one of {PROBLEMS}')
  if config.method == 'lm' and data.block > model.max_positions:
    raise InputError(f'config.data.block is {data.block}, above config.model.max_positions '
                     f'{model.max_positions}')
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


def get(config: Any, key: str) -> Any:
  """Returns the value of a dotted key."""
  for part in key.split('.'):
    config = getattr(config, part)
  return config


def flatten(config: Config | dict, prefix: str = '') -> dict[str, Any]:
  """Returns {dotted key: value} over all groups."""
  if dataclasses.is_dataclass(config):
    config = dataclasses.asdict(config)
  flat = {}
  for key, value in config.items():
    if isinstance(value, dict):
      flat.update(flatten(value, f'{prefix}{key}.'))
    else:
      flat[prefix + key] = list(value) if isinstance(value, tuple) else value
  return flat


def difference(old: dict, new: dict, ignore: tuple[str, ...] = ()) -> list[str]:
  """Returns 'key: old -> new' for each key that differs between two configs.

  Args:
    old: a config as nested dict.
    new: likewise.
    ignore: dotted prefixes of keys that may differ.
  """
  old, new = flatten(old), flatten(new)
  absent = '(absent)'
  return [f'config.{k}: {old.get(k, absent)!r} -> {new.get(k, absent)!r}'
          for k in sorted(old.keys() | new.keys())
          if old.get(k, absent) != new.get(k, absent) and not k.startswith(ignore)]
