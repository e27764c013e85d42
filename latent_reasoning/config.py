"""Configuration: one frozen dataclass for each part of the program.

Each module receives the frozen dataclass of its own group. A default lives in the
config file, never here; `config_loading.from_dict` makes these from one.
"""

import dataclasses
from typing import Any


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
class GraphConfig:
  """Generated graph reasoning in the form of ProsQA (data.prosqa)."""
  min_hops: int  # fewest steps from the person to the right option
  max_hops: int  # most
  nodes: int  # drawn; those without an edge are left out
  parents: float  # of a node, on average (Poisson)
  concepts: int  # size of the vocabulary of concepts
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
  name: str  # 'arithmetic' | 'graphs' | 'gsm8k' | 'gsm8k_aug' | 'files' | a text (data.text)
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
  graphs: GraphConfig
  buckets: BucketConfig


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  kind: str  # 'char' | 'bpe' | 'file'
  path: str  # tokenizer.json, vocab.json (and merges.txt), tokenizer.model or a folder of
  # them, for kind 'file'; with pretrained weights, in place of the checkpoint's own
  add_bos: str  # 'auto' (as the tokenizer's post-processor) | 'true' | 'false': BOS in front
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
  attention: str  # 'split' (fast) | 'packed' (one dense mask, the oracle) | 'cudnn' | 'splash'
  scan: bool  # one compiled layer, scanned; parameters are stacked
  remat: bool  # recompute each layer in the backward pass
  frozen_dtype: str  # of parameters that are not trained; what is trained is float32


@dataclasses.dataclass(frozen=True)
class PeersConfig:
  """The methods icot, coconut and codi (sequences)."""
  parts: int  # equal parts of stage 1: in part i, i steps are gone (icot, coconut)
  smoothing: float  # icot: o steps more are removed, P(o) ∝ exp(-smoothing·o); 0: none
  thoughts: int  # continuous thoughts: coconut, for each step gone; codi, in all
  projection: bool  # an MLP between a thought and the next input, as codi has
  teacher: float  # codi: weight of the chain of thought's loss
  distil: float  # codi: weight of the distance of hidden states


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
  externalize: bool  # stage 2 keeps step readouts alive, to be asked for (--externalize)
  externalize_weight: float  # of a row's step readouts together; its answers have 1
  pause_tokens: int  # method 'pause': how many follow the question
  peers: PeersConfig


@dataclasses.dataclass(frozen=True)
class ImmConfig:
  """A memory bank inside the layers; IMM, arXiv 2502.21030 (models.imm)."""
  write: str  # a policy of models.memory_policies; '': no memory
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
class AuxConfig:
  """Auxiliary losses on RiM's blocks (train.losses.with_aux); all 0: none."""
  align: float  # weight: the last block's state finds the answer among the batch's
  temperature: float  # of that contrast
  smooth: float  # weight: changes from block to block should not turn


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
class MeshConfig:
  """Devices along each axis (sharding); -1: all that the others leave."""
  data: int  # cuts the batch
  fsdp: int  # cuts the batch and the parameters, which layers gather
  tensor: int  # cuts heads, hidden width and vocabulary


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  log_every: int  # steps between lines of metrics.jsonl
  eval_every: int  # steps between validations; 0: at the end only
  save_every: int  # steps between checkpoints; 0: at the end only
  keep: int  # newest checkpoints kept, beside the best
  restart: bool  # begin again where checkpoints were and none is sound
  max_loss: float  # a loss above this stops the run; 0: 3 ln(vocabulary)
  compilation_cache: str  # directory of compiled programs; '': none
  prefetch: int  # batches made ahead of time in a thread
  peer_timeout: int  # seconds without a step, longer than compiling: a process is lost
  profile_steps: int  # steps traced into the folder profile after the first ten; 0: none


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  batch_size: int
  valid_problems: int  # problems per validation during training
  test_problems: int  # test problems scored at the end; 0: all
  blocks: int  # blocks at inference; 0: as trained
  max_tokens: int  # tokens a readout may generate, chain of thought included
  samples: int  # pass@k by sampling; 0: off
  temperature: float  # of the samples
  top_k: int  # most probable tokens that samples are drawn from; 0: all
  checkpoint: str  # 'best' (by validation accuracy) | 'last'
  sets: tuple[str, ...]  # more test sets: files, or names of data.hub.SETS
  protocol: str  # 'validation' | 'paper': how a checkpoint is chosen (protocol)
  contamination: bool  # look for the test questions in the training data
  latency_repeats: int  # timed runs per entry of --mode=latency
  audit_rows: int  # random real rows per check of --mode=audit


@dataclasses.dataclass(frozen=True)
class SweepConfig:
  """Several runs by one command (sweep)."""
  runs: tuple[str, ...]  # 'name key=value key=value …', keys without 'config.'; (): none
  seeds: tuple[int, ...]  # each run with each of them
  control: str  # name of the run that others are compared with
  budget: str  # 'steps': each run trains for its own | 'flops': for the control's FLOPs


@dataclasses.dataclass(frozen=True)
class Config:
  method: str  # a row of sequences.METHODS
  seed: int
  data: DataConfig
  tokenizer: TokenizerConfig
  model: ModelConfig
  rim: RimConfig
  imm: ImmConfig
  explicit: ExplicitConfig
  aux: AuxConfig
  optim: OptimConfig
  mesh: MeshConfig
  train: TrainConfig
  eval: EvalConfig
  sweep: SweepConfig

  @property
  def causal(self) -> bool:
    """Whether nothing reads the future."""
    return self.imm.write not in NOT_CAUSAL

NOT_CAUSAL = ('sequence_mean',)  # policies of models.memory_policies that read the future
OFF = ('write', 'query', 'read', 'norm')  # mechanisms of the memory

PROBLEMS = ('arithmetic', 'graphs', 'gsm8k', 'gsm8k_aug', 'files')  # of data.name
TEXTS = ('text', 'shakespeare', 'wikitext', 'c4')  # of data.name, for method lm


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
