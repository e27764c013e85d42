"""Configuration: one frozen dataclass for each part of the program, the one home of a key.

A key's default, meaning and allowed values stand here and nowhere else; a file of configs/
says what differs. `default()` gives the keys as a locked `ConfigDict` to be changed, and
`config_loading.from_dict` checks and freezes it. `--help_config` prints this page's keys.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from latent_reasoning.errors import InputError, nearest


def key(default: Any, meaning: str, at_least: float = 0) -> Any:
  """A field of a group: its default, its meaning, and the least value of a number."""
  return dataclasses.field(
      default=default, metadata={'meaning': meaning, 'at_least': at_least})


def group(cls: type, **defaults: Any) -> Any:
  """A group of keys within a group, where given with other defaults."""
  return dataclasses.field(default_factory=lambda: cls(**defaults))


@dataclasses.dataclass(frozen=True)
class ArithmeticConfig:
  """Generated chains of operations, evaluated left to right (data.synthetic)."""
  min_steps: int = key(4, 'fewest operations in a problem', 1)
  max_steps: int = key(4, 'most operations in a problem')
  modulus: int = key(10, 'every result is taken modulo this; 0: plain integers')
  max_value: int = key(9, 'operands are drawn from 0 … max_value', 1)
  operations: str = key('+-*', "a subset of '+-*'")
  templates: int = key(1, 'wordings; 1: the terse expression alone', 1)
  train_size: int = key(1_000_000, 'problems of the training split; the splits are disjoint', 1)
  valid_size: int = key(2_000, 'problems of the validation split', 1)
  test_size: int = key(2_000, 'problems of the test split', 1)


@dataclasses.dataclass(frozen=True)
class GraphConfig:
  """Generated graph reasoning in the form of ProsQA (data.prosqa)."""
  wording: Literal['sentences', 'letters'] = key(
      'sentences', "'Every terpus is a brimpus.', or 'ab', an edge from a to b")
  min_hops: int = key(3, 'fewest steps from the person to the right option', 1)
  max_hops: int = key(6, 'most')
  nodes: int = key(28, 'drawn; those without an edge are left out')
  parents: float = key(1.5, 'of a node, on average (Poisson)')
  concepts: int = key(38, 'size of the vocabulary of concepts')
  train_size: int = key(1_000_000, 'problems of the training split; the splits are disjoint', 1)
  valid_size: int = key(2_000, 'problems of the validation split', 1)
  test_size: int = key(2_000, 'problems of the test split', 1)


@dataclasses.dataclass(frozen=True)
class StateTrackingConfig:
  """Generated words over S5, p-hop induction, or assignments (data.state_tracking)."""
  task: Literal['permutations', 'hops', 'variables', 'registers'] = key(
      'permutations', 'which')
  min_steps: int = key(4, 'fewest steps of a problem', 1)
  max_steps: int = key(4, 'most; of hops at most 9', 1)
  live: int = key(4, 'variables, all of whose values are asked; of hops, letters', 2)
  length: int = key(24, 'letters of the text of hops', 2)
  train_size: int = key(1_000_000, 'problems of the training split; the splits are disjoint', 1)
  valid_size: int = key(2_000, 'problems of the validation split', 1)
  test_size: int = key(2_000, 'problems of the test split', 1)


@dataclasses.dataclass(frozen=True)
class BucketConfig:
  """Static sizes that a batch is padded to: the smallest that holds it; (): what the method's
  rows of the training problems need (batches.buckets)."""
  prefix: tuple[int, ...] = key((), 'tokens of question and memory blocks')
  readout: tuple[int, ...] = key(
      (), 'input tokens of one readout: an answer, a step, a chain of thought')
  count: tuple[int, ...] = key((), 'readouts of a sequence')


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where problems or text come from, and how they are batched."""
  name: Literal['arithmetic', 'graphs', 'state_tracking', 'gsm8k', 'gsm8k_aug', 'files',
                'text', 'shakespeare', 'wikitext', 'c4'] = key(
      'arithmetic', 'the data set; the last four are plain text, for method language_model')
  path: str = key('', 'a text file, for method language_model')
  seq_len: int = key(64, 'tokens of a sequence of plain text', 1)
  dir: str = key('', "file or directory, here or gs://…; '': generated, or from the hub")
  train: str = key('', 'file of the training split, where dir does not name it')
  valid: str = key('', 'likewise of the validation split')
  test: str = key('', 'likewise of the test split')
  cache_dir: str = key('', "where downloads of the hub are kept; '': the library's default")
  steps: Literal['equations', 'sentences'] = key(
      'equations', "what a step is in OpenAI's GSM8K")
  step_marks: bool = key(False, 'write equation steps as <<3+4=7>> instead of 3+4=7')
  on_error: Literal['raise', 'skip'] = key(
      'raise', 'a malformed line; skipped ones are counted')
  too_long: Literal['raise', 'drop'] = key(
      'raise', 'a sequence that no bucket holds; dropped ones are counted')
  valid_size: int = key(500, 'problems carved from train where there is no valid split')
  limit: int = key(0, 'use only the first N problems of each split; 0: all')
  max_steps: int = key(
      0, 'of files and the hub: problems of more steps are left out of every split; 0: none')
  sort_window: int = key(1, 'batches whose sequences are sorted by length together; 1: none', 1)
  packing: bool = key(
      False, 'several problems in a row, which do not see one another, in place of buckets: '
      'less padding')
  arithmetic: ArithmeticConfig = group(ArithmeticConfig)
  graphs: GraphConfig = group(GraphConfig)
  state_tracking: StateTrackingConfig = group(StateTrackingConfig)
  buckets: BucketConfig = group(BucketConfig)


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  """Text to token ids (data.tokenizers)."""
  kind: Literal['char', 'bpe', 'file'] = key(
      'char', 'characters, a trained BPE, or a given file')
  path: str = key(
      '', 'tokenizer.json, vocab.json (and merges.txt), tokenizer.model or a folder of them, '
      "for kind file; with pretrained weights, in place of the checkpoint's")
  add_bos: Literal['auto', 'true', 'false'] = key(
      'auto', "BOS in front of a question; auto: as the tokenizer's post-processor says")
  vocab_size: int = key(0, 'most entries of a trained BPE, special tokens not counted')
  at_least: int = key(0, 'entries of the vocabulary; set from pretrained weights')
  pad_to: int = key(8, 'the vocabulary is padded to a multiple of this', 1)


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary positions (models.layers)."""
  base: float = key(10_000.0, 'of the wavelengths')
  scaling: Literal['', 'linear', 'llama3', 'yarn'] = key(
      '', 'how a longer context is reached')
  factor: float = key(1.0, 'of the scaling')
  low: float = key(
      1.0, 'of llama3 and yarn: wavelengths above original / low are stretched whole')
  high: float = key(4.0, 'of llama3 and yarn: those below original / high are kept')
  original: int = key(8192, "positions before llama3's or yarn's scaling")
  multiplier: float = key(1.0, 'of queries and keys that are turned, as yarn')
  fraction: float = key(1.0, 'share of a head that is turned, its first part, as GPT-NeoX')
  local_base: float = key(
      0.0, 'base in layers with a window, without scaling, as Gemma 3; 0: that of all layers')


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Low-rank adaptation of dense layers (Hu et al. 2021)."""
  rank: int = key(0, '0: none')
  alpha: float = key(256.0, 'what a layer adds is scaled by alpha / rank')
  dropout: float = key(0.0, 'on what goes into the low-rank maps')
  targets: tuple[str, ...] = key(
      ('.',), "patterns (re.search) of paths such as block_3/qkv; '.': all dense layers")


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """Layers that all tokens pass several times: a looped transformer (arXiv 1807.03819,
  2502.17416). Passes over RiM's blocks alone are rim.passes."""
  count: int = key(1, 'how often; 1: a plain model', 1)
  layers: tuple[int, ...] = key((), '(first, last), which are repeated; (): all')
  mix: Literal['replace', 'add', 'concat'] = key(
      'replace', 'what a loop reads of the state s that the last one left, and of e, what the '
      'first layer was given: s; e + s; W [s; e], which begins as e')
  norm: Literal['', 'rms', 'final'] = key(
      '', "of s between loops; final: the model's last norm")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The transformer (models.transformer), and where its weights come from."""
  init_from: str = key(
      '', 'weights to begin with, which set the sizes: a directory (or gs://…), FILE.gguf or '
      "hub id, of others or an export of this package, or the workdir of another run; '': from "
      'scratch')
  num_layers: int = key(4, 'transformer blocks', 1)
  embed_dim: int = key(64, 'width of the residual stream', 1)
  num_heads: int = key(4, 'attention heads', 1)
  num_kv_heads: int = key(0, 'of keys and values; 0: as many')
  head_dim: int = key(0, '0: embed_dim / num_heads')
  mlp_dim: int = key(256, 'hidden width of the MLP', 1)
  max_positions: int = key(128, 'longest sequence, generated tokens included', 1)
  position_embedding: Literal['learned', 'rotary'] = key('learned', 'how positions enter')
  tie_embeddings: bool = key(True, 'the head is the transposed embedding table')
  scale_embeddings: bool = key(
      False, "tokens' embeddings are multiplied by sqrt(embed_dim), as Gemma; the head is not")
  norm: Literal['layer', 'rms', 'rms_zero_centered'] = key(
      'layer', 'layer norm, as GPT-2; RMS norm, as Llama; RMS norm by 1 + scale, as Gemma')
  norm_epsilon: float = key(1e-6, 'of the norms')
  norm_place: Literal['before', 'after', 'both'] = key(
      'before', 'where attention and the MLP have norms: of what they read, as most; of what '
      'they add, as OLMo 2; or both, as Gemma')
  parallel: bool = key(
      False, 'attention and the MLP read the same residual stream, as GPT-NeoX')
  mlp: Literal['gelu', 'swiglu'] = key('gelu', 'as GPT-2, or gated, as Llama')
  activation: Literal['', 'gelu', 'gelu_tanh', 'relu', 'silu'] = key(
      '', "of the MLP; '': gelu_tanh, or of a gated one silu")
  fused_mlp: bool = key(False, 'one map to both halves of a gated MLP, as Phi-3')
  fused_qkv: bool = key(True, 'one map to queries, keys and values, as GPT-2; or three')
  bias: bool = key(True, 'biases in all dense layers and layer norms')
  qkv_bias: bool = key(False, 'without bias: biases of queries, keys and values, as Qwen2')
  out_bias: bool = key(False, "without bias: a bias of attention's output")
  mlp_bias: bool = key(False, 'without bias: biases in the MLP')
  qk_norm: bool = key(False, 'queries and keys are normed, as in Qwen3; needs fused_qkv=False')
  qk_norm_over: Literal['head', 'heads'] = key(
      'head', 'what such a norm is of: each head, or all heads together, as in OLMo 2')
  attention_scale: float = key(0.0, 'of q·k; 0: 1 / sqrt(head size)')
  attention_cap: float = key(
      0.0, "attention's logits x are cap · tanh(x / cap), as Gemma 2; 0: x")
  logit_cap: float = key(0.0, "the same of the head's logits")
  window: int = key(
      0, 'positions that a token attends to, from itself back, as Mistral; 0: all')
  window_layers: tuple[int, ...] = key((), 'layers with the window; (): all')
  no_rope_layers: tuple[int, ...] = key((), 'layers without rotary positions, as SmolLM3')
  rope: RopeConfig = group(RopeConfig)
  loop: LoopConfig = group(LoopConfig)
  lora: LoraConfig = group(LoraConfig)
  dtype: Literal['float32', 'bfloat16', 'float16'] = key(
      'float32', 'compute dtype; parameters and softmax stay float32')
  attention: Literal['shared_prefix', 'dense', 'cudnn', 'splash'] = key(
      'shared_prefix', 'shared_prefix: readouts against one prefix; dense: one mask, the '
      'reference implementation; cudnn: GPU; splash: TPU')
  scan: bool = key(False, 'scan over stacked layers: faster to compile')
  remat: Literal['none', 'dots', 'full'] = key(
      'none', 'what the backward pass recomputes: nothing; all but what dense layers and '
      'attention return; each layer from its input')
  loss_tile: int = key(
      4096, 'tokens whose logits exist at a time on a device, in training; 0: of all')
  frozen_dtype: Literal['float32', 'bfloat16'] = key(
      'float32', 'of parameters that are not trained; what is trained is float32')

  @property
  def order(self) -> tuple[int, ...]:
    """The layers that a token passes, one after another."""
    first, last = self.loop.layers or (0, self.num_layers - 1)
    once = tuple(range(self.num_layers))
    return once[:last + 1] + (self.loop.count - 1) * once[first:last + 1] + once[last + 1:]

  @property
  def depth(self) -> int:
    """How many layers a token passes."""
    return len(self.order)

  @property
  def nonlinearity(self) -> str:
    """Of the MLP."""
    return self.activation or {'gelu': 'gelu_tanh', 'swiglu': 'silu'}[self.mlp]


@dataclasses.dataclass(frozen=True)
class BaselinesConfig:
  """The methods that RiM is compared with (methods)."""
  pause_tokens: int = key(8, 'pause, pause_steps: tokens behind the question')
  parts: int = key(
      4, 'icot, coconut, lotus: parts of stage 1; in part i, i steps are gone', 1)
  mix_parts: bool = key(
      False, 'coconut: in part k, and in stage 2 behind them, a problem takes part i <= k, '
      'P(i) ∝ i + 1 (arXiv 2602.22441)')
  part_accuracy: float = key(
      0.0, 'icot, coconut: a part goes on until validation, asked as the part trains, is so '
      'right, or as part_patience says; both 0: parts are equally long')
  part_patience: int = key(
      0, 'icot, coconut: a part ends after so many validations in a row without a better one; '
      '0: never')
  reset: Literal['published', 'part'] = key(
      'published', "when a new optimizer state begins, beside the stages, where a stage's "
      'reset_optimizer: coconut at each part and epoch, icot at each part; or each part alone')
  keep_mark: bool = key(
      True, 'icot, coconut, codi: the answer has its mark also where no step is left')
  removal: Literal['tokens', 'steps'] = key(
      'tokens', 'icot: what is removed, as published tokens; or i steps in part i, unsmoothed '
      'in part 0')
  remove_tokens: int = key(8, 'icot: tokens that each part removes more', 1)
  remove_all_beyond: int = key(
      39, 'icot: a part that would remove more tokens than this removes all; 0: none does')
  smoothing: float = key(
      4.0, 'icot: o tokens more are removed, P(o) ∝ exp(-smoothing·o); 0: none')
  latents: int = key(
      1, 'continuous thoughts: of coconut and lotus for each step gone, of codi and '
      'pccot in all', 1)
  rounds: int = key(
      -1, 'lotus, pccot: passes over the latents after the first; -1: as many as steps are '
      'gone, of pccot 3', -1)
  step_weight: float = key(
      0.05, 'lotus, rim_parallel: of the loss of the steps that latents or blocks say')
  projection: bool = key(False, 'an MLP between a latent and the next input, as codi has')
  teacher_weight: float = key(1.0, "codi, pccot: of the chain of thought's loss")
  distill_weight: float = key(1.0, 'codi, pccot: of the distance of hidden states')
  kv_weight: float = key(
      0.0, "codi, pccot: of the distance of latents' keys and values from those that are kept "
      'of the chain of thought (KaVa, arXiv 2510.02312; 1 there); 0: none')
  kv_importance: float = key(
      0.1, 'λ of the score by which they are kept: what the answer attends to; the rest is '
      'unlikeness of keys')


@dataclasses.dataclass(frozen=True)
class RimConfig:
  """Memory blocks and readouts; RiM, arXiv 2605.30343 (methods.rim)."""
  blocks: int = key(4, 'K, blocks in stage 2 and at inference', 1)
  block_tokens: int = key(2, 'M, memory tokens between <b> and </b>')
  max_steps: int = key(4, 'T_max, most reasoning steps, thus most blocks in stage 1', 1)
  readout_offset: Literal[0, 1] = key(1, '1: block t predicts step t+1; 0: step t')
  passes: int = key(
      1, 'L, passes over the blocks, whose states are inputs again; step t is read in pass '
      '⌈t / blocks⌉ and the answer in the last', 1)
  hold_answer: bool = key(
      False, 'readouts behind the last step go on predicting the answer, in both stages, so '
      'that one model reads chains of unlike lengths; False: stage 1 ends with the last step')
  pass_attention: Literal['full', 'causal'] = key(
      'full', 'from the second pass on, what a block sees of others: all, or those before it')
  schedule: Literal['uniform', 'linear', 'relative'] = key(
      'uniform', 'how the weights of steps anneal in stage 1')
  block_attention: Literal['causal', 'bidirectional'] = key('causal', 'inside a block')
  readout_sees_question: bool = key(True, 'False forces everything through the blocks')
  externalize: bool = key(
      False, 'stage 2 trains step readouts too, to be asked for by generate --externalize')
  externalize_weight: float = key(
      1.0, "of a sequence's step readouts together; its answers have 1")

  @property
  def block_length(self) -> int:
    """Tokens of a block, the two that delimit it included."""
    return self.block_tokens + 2


@dataclasses.dataclass(frozen=True)
class ImmConfig:
  """A memory bank inside the layers; IMM, arXiv 2502.21030 (models.imm)."""
  write_policy: Literal['', 'sequence_mean', 'prefix_mean', 'ring', 'gated', 'delta'] = key(
      '', "models.memory_policies; sequence_mean, the published one, is not causal; '': none")
  slots: int = key(0, 'N; 0: round(sqrt(embed_dim))')
  linformer_rank: int = key(0, 'R of f_write, f_query and g, and width of the bank; 0: full')
  layers: tuple[int, ...] = key((), 'which layers have a bank, from 0; (): all')
  shared: bool = key(False, 'one bank: the first of these layers writes, all read')
  rounds: int = key(1, 'writes and reads of a token in a layer, a bank each', 1)
  write_interval: int = key(1, 'only each n-th token writes', 1)
  place: Literal['after', 'before'] = key('after', 'attention and MLP')
  ablate: tuple[str, ...] = key((), 'mechanisms that are off: write, query, read, norm')
  out_scale: float = key(
      1.0, "of g's initial matrix; 0: changes nothing at step 0 but the norm")
  gate_bias: float = key(
      0.0, 'initial; sigmoid(gate_bias) of an addressed slot is overwritten', -math.inf)
  implementation: Literal['chunkwise', 'recurrent'] = key(
      'chunkwise', 'recurrent: token by token, the reference implementation')
  chunk: int = key(16, 'tokens of a chunk; above 16, float32 overflows where gates saturate', 1)


@dataclasses.dataclass(frozen=True)
class ReasoningDecoderConfig:
  """A small decoder that turns what the memory holds into text (models.reasoning_decoder)."""
  source: Literal['', 'blocks', 'memory', 'latents'] = key(
      '', "hidden states of RiM's blocks, what the implicit memory returned, or the inputs of "
      "coconut's and codi's latents, which jointly is SIM-CoT (arXiv 2509.20317); '': none")
  joint: bool = key(
      False, 'trained with the model; else on the finished one, by --mode=verbalize')
  num_layers: int = key(1, "of the decoder, as wide as the model's", 1)
  weight: float = key(0.3, "of its loss beside the model's own, where joint")
  steps: int = key(1000, 'of its own training, where not joint', 1)
  learning_rate: float = key(1e-3, 'of its own training')


@dataclasses.dataclass(frozen=True)
class AuxConfig:
  """Auxiliary losses on RiM's blocks (train.losses.with_aux); all 0: none."""
  align: float = key(0.0, "weight: the last block's state finds the answer among the batch's")
  temperature: float = key(0.1, 'of that contrast')
  smooth: float = key(0.0, 'weight: changes from block to block should not turn')


@dataclasses.dataclass(frozen=True)
class StageConfig:
  """One stage of the curriculum."""
  steps: int = key(0, 'training steps; 0: count epochs instead')
  epochs: float = key(0.0, 'passes over the training split, where steps is 0')
  learning_rate: float = key(1e-3, 'peak')
  schedule: Literal['constant', 'cosine'] = key('cosine', 'after the warm-up')
  warmup: float = key(0.04, "share of the stage's steps spent in linear warm-up")
  dropout: float = key(0.0, 'on embeddings and residual branches')
  optimizer: Literal['adamw', 'muon'] = key('adamw', 'muon: for the matrices inside the layers')
  reset_optimizer: bool = key(
      True, 'begin the stage, or a part of it, with a new optimizer state')


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """Optimization, and the two stages."""
  trainable: Literal['all', 'new'] = key(
      'all', 'new: LoRA, rows of new tokens and memory; the rest is frozen')
  batch_size: int = key(64, 'problems of a step, over all processes', 1)
  grad_accum_steps: int = key(1, 'microbatches that a step is cut into', 1)
  muon_scale: float = key(
      2.0, "learning rate of matrices under muon, as a multiple of the stage's")
  beta1: float = key(0.9, 'of AdamW')
  beta2: float = key(0.99, 'of AdamW')
  epsilon: float = key(1e-8, 'of AdamW')
  weight_decay: float = key(0.0, 'on matrices only: no biases, norms or embeddings')
  max_epochs: float = key(
      0.0, 'a stage ends after so many passes over the training split, whatever its steps; '
      '0: never')
  patience: int = key(
      0, 'the last stage ends after so many validations in a row without a better one, after '
      'one that has every problem right, or after its steps; 0: never before')
  max_grad_norm: float = key(1.0, 'global norm that gradients are clipped to; 0: no clipping')
  stage1: StageConfig = group(StageConfig)
  stage2: StageConfig = group(StageConfig)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each axis (parallel.sharding); -1: all that the others leave."""
  data: int = key(-1, 'cuts the batch', -math.inf)
  fsdp: int = key(1, 'cuts the batch, and the parameters, which layers gather', -math.inf)
  tensor: int = key(1, "cuts heads, the MLP's width and the vocabulary", -math.inf)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The training loop: what it logs, saves and guards."""
  log_every: int = key(50, 'steps between lines of metrics.jsonl', 1)
  eval_every: int = key(500, 'steps between validations, each with a checkpoint; 0: at the end')
  save_every: int = key(500, 'steps between checkpoints; 0: at the end only')
  max_to_keep: int = key(3, 'newest checkpoints kept, beside the best', 1)
  restart: bool = key(False, 'begin again where checkpoints were and none is sound')
  extend: tuple[int, ...] = key(
      (), 'steps added to the last stage, also of a run that is there; an entry each time. A '
      'cosine learning rate warms up and falls over them once more, a constant one stays', 1)
  max_loss: float = key(0.0, 'a loss above this stops the run; 0: 3 ln(vocabulary)')
  compilation_cache: str = key(
      '~/.cache/latent_reasoning', "compiled programs: a directory, or a bucket's; '': none")
  wandb: str = key('', "project of Weights & Biases that logs it too (extra wandb); '': none")
  prefetch: int = key(2, 'batches made ahead of time in a thread')
  peer_timeout: int = key(
      600, 'seconds without a step, compiling not counted: a process is lost', 1)
  profile_steps: int = key(
      0, 'steps traced into the folder profile after the first ten; 0: none')


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Validation, the test, and how long an answer may be."""
  batch_size: int = key(64, 'problems at once', 1)
  valid_problems: int = key(500, 'of a validation during training', 1)
  test_problems: int = key(0, 'scored at the end; 0: all')
  blocks: int = key(0, 'blocks at inference; 0: as trained')
  passes: int = key(0, 'passes over them, or over latents, at inference (rim.passes, or '
                       'baselines.rounds and 1); 0: as trained')
  latents: int = key(0, 'continuous thoughts at inference; 0: as trained (baselines.latents)')
  loops: int = key(0, 'loops of the layers at inference; 0: as trained (model.loop.count)')
  max_new_tokens: int = key(
      128, 'tokens that a readout may generate, chain of thought included', 1)
  samples: int = key(0, 'pass@k by sampling; 0: off')
  temperature: float = key(1.0, 'of the samples')
  top_k: int = key(0, 'most probable tokens that samples are drawn from; 0: all')
  checkpoint: Literal['best', 'last'] = key('best', 'best: by validation accuracy')
  sets: tuple[str, ...] = key(
      (), 'more test sets: files, names such as svamp and math500 (data.hub), or other keys of '
      "a generated task, such as 'min_steps=5,max_steps=8'")
  checkpoint_selection: Literal['validation', 'paper'] = key(
      'validation', 'paper: on cuts of the test split, as the paper did')
  contamination: bool = key(True, 'look for the test questions in the training data')
  latency_repeats: int = key(50, 'timed runs of an entry of --mode=latency', 1)
  leakage_rows: int = key(8, 'real sequences of a check of --mode=check_leakage', 1)


@dataclasses.dataclass(frozen=True)
class SweepConfig:
  """Several runs by one command (cli.sweep)."""
  runs: tuple[str, ...] = key(
      (), "'name key=value key=value …', keys without 'config.'; (): none")
  seeds: tuple[int, ...] = key((0, 1, 2), 'each run with each of them')
  control: str = key('', 'name of the run that others are compared with')
  budget: Literal['steps', 'flops', 'epochs', 'patience'] = key(
      'steps', "each run trains for its own steps; for the control's FLOPs; for the control's "
      'passes over the training problems; until optim.patience ends it, its own steps at most')
  search: tuple[str, ...] = key(
      (), 'before the seeds are trained, each run is tried with the first of them at '
      "'key=value,value … key=…', of a single run 'name key=value,value …', and what is best "
      'in validation is taken; (): nothing is searched')
  trials: int = key(
      0, 'of each run, equally many: combinations that have each value about equally often; '
      '0: as many as the candidates for all runs make')


@dataclasses.dataclass(frozen=True, repr=False)
class Config:
  """A whole configuration."""
  method: str = key(
      'rim', 'of `methods`: rim | direct | direct_steps | cot | pause | pause_steps | icot | '
      'coconut | codi | pccot | lotus | rim_parallel | language_model')
  seed: int = key(0, 'of parameters, data and order')
  device: Literal['', 'cpu', 'gpu', 'tpu'] = key(
      '', "the devices that a run must find, or it ends; '': those that JAX takes")
  data: DataConfig = group(DataConfig)
  tokenizer: TokenizerConfig = group(TokenizerConfig)
  model: ModelConfig = group(ModelConfig)
  rim: RimConfig = group(RimConfig)
  baselines: BaselinesConfig = group(BaselinesConfig)
  imm: ImmConfig = group(ImmConfig)
  reasoning_decoder: ReasoningDecoderConfig = group(ReasoningDecoderConfig)
  aux: AuxConfig = group(AuxConfig)
  optim: OptimConfig = group(OptimConfig)
  mesh: MeshConfig = group(MeshConfig)
  train: TrainConfig = group(TrainConfig)
  eval: EvalConfig = group(EvalConfig)
  sweep: SweepConfig = group(SweepConfig)

  def __repr__(self) -> str:
    """What differs from the defaults."""
    own, usual = flatten(self), flatten(Config())
    return ', '.join(f'{key}={value!r}' for key, value in own.items() if value != usual[key])

  def replace(self, **changes: Any) -> 'Config':
    """The same with other values of dotted keys, or of several of a group, as a dict;
    `Experiment` checks them.

    Raises:
      InputError: there is no such key.
    """
    found = self
    for name, value in changes.items():
      found = _replaced(found, name.split('.'), value, name)
    return found

  @property
  def causal(self) -> bool:
    """Whether nothing reads the future."""
    return self.imm.write_policy not in NOT_CAUSAL


NOT_CAUSAL = ('sequence_mean',)  # policies of models.memory_policies that read the future
ABLATIONS = ('write', 'query', 'read', 'norm')  # mechanisms of the memory
TEXTS = ('text', 'shakespeare', 'wikitext', 'c4')  # of data.name: plain text

# What keys and values were called up to 0.1, for the error that names the new.
MOVED = {
    'data.block': 'data.seq_len', 'model.layers': 'model.num_layers',
    'model.family': 'model.norm, config.model.mlp and config.model.fused_qkv',
    'model.width': 'model.embed_dim', 'model.heads': 'model.num_heads',
    'model.kv_heads': 'model.num_kv_heads', 'model.head_size': 'model.head_dim',
    'model.hidden': 'model.mlp_dim', 'model.positions': 'model.position_embedding',
    'model.tied': 'model.tie_embeddings', 'rim.pause_tokens': 'baselines.pause_tokens',
    'rim.peers': 'baselines', 'rim.peers.parts': 'baselines.parts',
    'rim.peers.smoothing': 'baselines.smoothing', 'rim.peers.thoughts': 'baselines.latents',
    'rim.peers.projection': 'baselines.projection',
    'rim.peers.teacher': 'baselines.teacher_weight',
    'rim.peers.distil': 'baselines.distill_weight', 'imm.write': 'imm.write_policy',
    'imm.rank': 'imm.linformer_rank', 'imm.every': 'imm.write_interval',
    'imm.off': 'imm.ablate', 'explicit': 'reasoning_decoder',
    **{f'explicit.{name}': f'reasoning_decoder.{name}'
       for name in ('source', 'joint', 'weight', 'steps', 'learning_rate')},
    'explicit.layers': 'reasoning_decoder.num_layers', 'optim.trained': 'optim.trainable',
    'optim.accumulate': 'optim.grad_accum_steps', 'optim.clip': 'optim.max_grad_norm',
    'train.keep': 'train.max_to_keep', 'eval.max_tokens': 'eval.max_new_tokens',
    'eval.protocol': 'eval.checkpoint_selection', 'eval.audit_rows': 'eval.leakage_rows'}
MOVED_VALUES = {
    ('model.remat', 'True'): 'full', ('model.remat', 'False'): 'none',
    ('method', 'lm'): 'language_model', ('model.attention', 'split'): 'shared_prefix',
    ('model.attention', 'packed'): 'dense', ('imm.implementation', 'chunked'): 'chunkwise',
    ('imm.implementation', 'naive'): 'recurrent'}


def _replaced(group: Any, parts: list[str], value: Any, name: str) -> Any:
  """A group with another value of the key at the end of `parts`, in whole `name`."""
  known = [f.name for f in dataclasses.fields(group)] if dataclasses.is_dataclass(group) else []
  if parts[0] not in known:
    raise InputError(f'config.{name} is now config.{MOVED[name]}' if name in MOVED else
                     f'config.{name} is unknown; '
                     + '; '.join(filter(None, (elsewhere(name), nearest(parts[0], known)))))
  if len(parts) > 1:
    value = _replaced(getattr(group, parts[0]), parts[1:], value, name)
  elif dataclasses.is_dataclass(old := getattr(group, parts[0])) and isinstance(value, Mapping):
    for key, one in value.items():
      old = _replaced(old, key.split('.'), one, f'{name}.{key}')
    value = old
  return dataclasses.replace(group, **{parts[0]: value})


def default() -> Any:
  """Every key with its default, as a locked and typed `ml_collections.ConfigDict`."""
  import ml_collections
  return ml_collections.ConfigDict(dataclasses.asdict(Config())).lock()


def get(config: Any, name: str) -> Any:
  """Returns the value of a dotted key."""
  for part in name.split('.'):
    config = getattr(config, part)
  return config


ALIASES = {'lr': 'learning_rate', 'bs': 'batch_size', 'epoch': 'epochs', 'step': 'steps'}


def elsewhere(name: str) -> str:
  """Keys of any group whose last part is that of a name, in words; '' for none."""
  leaf = name.rpartition('.')[2]
  leaf = ALIASES.get(leaf, leaf)
  found = [f'config.{key}' for key in flatten(Config()) if key.rpartition('.')[2] == leaf]
  return f"there {'is' if len(found) == 1 else 'are'} {', '.join(found)}" if found else ''


def known(name: str) -> bool:
  """Whether there is such a dotted key."""
  return name in flatten(Config())


def tuples(values: Any) -> Any:
  """What JSON made lists of, as the tuples that configurations have."""
  if isinstance(values, dict):
    return {key: tuples(value) for key, value in values.items()}
  return tuple(map(tuples, values)) if isinstance(values, list) else values


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
    old: a config as nested dict. A key that it lacks came later, with a default that does
      what was done before.
    new: likewise, of today.
    ignore: dotted prefixes of keys that may differ.
  """
  old, new, later = flatten(old), flatten(new), flatten(Config())
  absent = '(absent)'
  return [f'config.{k}: {old.get(k, absent)!r} -> {new.get(k, absent)!r}'
          for k in sorted(old.keys() | new.keys())
          if old.get(k, later.get(k, absent)) != new.get(k, absent)
          and not k.startswith(ignore)]


def _fixed(group: Any, name: str, value: Any) -> None:
  """In place of dataclasses' own, which does not say what to do."""
  ends = [key for key in flatten(Config()) if f'.{key}'.endswith(f'.{name}')] or [name]
  raise dataclasses.FrozenInstanceError(
      f'cannot set {name}: a configuration is not changed in place. config.replace(**{{'
      f"'{ends[0]}': {value!r}}}) returns another one, as for each dotted key")


for _cls in [c for c in list(globals().values()) if dataclasses.is_dataclass(c)]:
  _cls.__setattr__ = _cls.__setitem__ = _fixed
