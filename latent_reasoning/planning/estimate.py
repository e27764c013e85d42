"""What a configuration needs on devices that are not here, and how long a step takes there.

  python -m latent_reasoning.main --mode=plan --config=FILE --target=tpu:v5p:2x2x1
  python -m latent_reasoning.main --mode=plan --config=FILE --devices=1,4,64 --device_kind=v5p

Nothing is allocated: shapes come from `jax.eval_shape`, places from `sharding`, and the
training step is compiled in a process of its own. Parameters, optimizer state, gradients and
FLOPs are exact. For a target, temporaries and collectives are those of its own compiler
(`targets`). For --devices they are those of XLA for as many fake devices of this CPU, which
keeps bfloat16 products in float32 and reduces gradients whole where others reduce and scatter:
upper bounds. Beside them stand written models. Of FLOPs, collectives by the model and
`hardware` follows the time of a step (`times`).
"""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from latent_reasoning import batching, methods
from latent_reasoning.config import Config
from latent_reasoning.data.tokenizers import ASCII, SPECIAL
from latent_reasoning.experiment import Experiment
from latent_reasoning.hf import families, init_from, native
from latent_reasoning.hf import load as pretrained
from latent_reasoning.models import attention, lora
from latent_reasoning.parallel import device_errors, sharding
from latent_reasoning.planning import communication, rows, targets
from latent_reasoning.train import flops, hardware
from latent_reasoning.train import train_step as step_lib
from latent_reasoning.train.curriculum import Curriculum

GIB = 2**30
SHARE = 0.6  # of the peak that matrix products reach: MaxText's MFU is 0.5 to 0.7 on TPUs


def _llama(layers: int, width: int, hidden: int, heads: int, size: int, tied: bool,
           factor: float) -> dict[str, Any]:
  return {'model_type': 'llama', 'num_hidden_layers': layers, 'hidden_size': width,
          'intermediate_size': hidden, 'num_attention_heads': heads, 'num_key_value_heads': 8,
          'head_dim': size, 'vocab_size': 128_256, 'rms_norm_eps': 1e-5,
          'tie_word_embeddings': tied, 'max_position_embeddings': 131_072,
          'rope_theta': 500_000.0, 'rope_scaling': {
              'rope_type': 'llama3', 'factor': factor, 'low_freq_factor': 1.0,
              'high_freq_factor': 4.0, 'original_max_position_embeddings': 8192}}


# config.json of checkpoints that one plans for without having them.
KNOWN = {
    'openai-community/gpt2': {
        'model_type': 'gpt2', 'n_layer': 12, 'n_embd': 768, 'n_head': 12, 'n_positions': 1024,
        'vocab_size': 50_257},
    'meta-llama/Llama-3.2-1B': _llama(16, 2048, 8192, 32, 64, True, 32.0),
    'meta-llama/Llama-3.2-3B': _llama(28, 3072, 8192, 24, 128, True, 32.0),
    'meta-llama/Llama-3.1-8B': _llama(32, 4096, 14_336, 32, 128, False, 8.0),
    'HuggingFaceTB/SmolLM2-135M': {
        'model_type': 'llama', 'num_hidden_layers': 30, 'hidden_size': 576,
        'intermediate_size': 1536, 'num_attention_heads': 9, 'num_key_value_heads': 3,
        'vocab_size': 49_152, 'rms_norm_eps': 1e-5, 'tie_word_embeddings': True,
        'max_position_embeddings': 8192, 'rope_theta': 1e5},
    'Qwen/Qwen2.5-0.5B': {
        'model_type': 'qwen2', 'num_hidden_layers': 24, 'hidden_size': 896,
        'intermediate_size': 4864, 'num_attention_heads': 14, 'num_key_value_heads': 2,
        'vocab_size': 151_936, 'rms_norm_eps': 1e-6, 'tie_word_embeddings': True,
        'max_position_embeddings': 32_768, 'rope_theta': 1e6}}


def resolve(config: Config) -> tuple[Config, int]:
  """The configuration with a checkpoint's sizes, and how many tokens are known."""
  name = config.model.init_from
  if not name:  # of characters that are not ASCII, the data alone know
    return config, (len(ASCII) + 1 if config.tokenizer.kind == 'char'
                    else config.tokenizer.vocab_size)
  values = KNOWN.get(name)
  if values is None and (source := native.find(name)):
    return init_from.resolve(config), source.tokenizer.size
  if values is None:
    values = pretrained.values(pretrained.directory(name))
  model = families.model_config(values, config.model, name)
  return dataclasses.replace(config, model=model), int(values['vocab_size'])


@dataclasses.dataclass(frozen=True)
class Planned(Experiment):
  """A run of shapes alone: no data, no tokenizer, no folder."""
  devices: Sequence[Any] = ()  # that are here or not; none: those that JAX has
  seen: Sequence[tuple[int, float]] = ()  # (tokens of a row, share of real batches)

  @functools.cached_property
  def mesh(self) -> jax.sharding.Mesh:
    return sharding.make(self.config.mesh, self.devices)


def planned(config: Config, devices: Sequence[Any] = ()) -> Planned:
  """A run whose batches are the largest rows of its data or method (rows), as many as the
  mesh can cut."""
  config, known = resolve(config)
  config, batch, seen = rows.of(config)
  need = known + len(SPECIAL) + config.rim.max_steps
  tokenizer = SimpleNamespace(
      size=known, used=need,
      vocab_size=-(-need // config.tokenizer.pad_to) * config.tokenizer.pad_to)
  method = methods.check(config)
  mesh = sharding.make(config.mesh, devices)
  cut = _row_unit(config, mesh)
  size = config.optim.batch_size
  if batch.slots:  # of a sample's problems, several in a row
    size = math.ceil(size * len(batch.tokens) / min(size, rows.MOST))
  size = -(-size // cut) * cut
  batch = jax.tree.map(lambda a: np.broadcast_to(a[:1], (size, *a.shape[1:])), batch)
  stages = (config.optim.stage1, config.optim.stage2)
  batches = SimpleNamespace(at=lambda step: batch, curriculum=Curriculum(stages, (1, 1)),
                            method=method)
  return Planned(config, None, None, tokenizer, batches, {}, devices, seen)


def measure(config: Config, target: str = '', shapes: bool = False) -> dict[str, Any]:
  """Bytes per device, FLOPs and collectives of a training step.

  Args:
    target: as targets.parse; '': the devices there are, where no kernel runs.
    shapes: also those of all arrays in the compiled program, such as 'f32[128,384]'.
  """
  began = time.monotonic()
  run = planned(config, targets.parse(target).devices() if target else ())
  mesh, kept = run.mesh, activations(run.config, run.mesh, run.batches.at(0))
  config = run.config
  if not target:
    config = dataclasses.replace(config, model=attention.without_kernel(config.model))
    run = dataclasses.replace(run, config=config)
  like = jax.eval_shape(run.fresh)
  placed = sharding.state(config, like, mesh)
  state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), like,
                       placed)
  cut = NamedSharding(mesh, sharding.BATCH)
  batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=cut),
                       run.batches.at(0))
  stepper = step_lib.make_train_step(
      run.model(config.optim.stage1.dropout), run.objective, run.tx(1), config.seed,
      config.optim.grad_accum_steps, run.trained, placed)
  with jax.set_mesh(mesh):
    rate = jax.ShapeDtypeStruct((), jnp.float32,
                                sharding=NamedSharding(mesh, jax.sharding.PartitionSpec()))
    lowered = stepper.lower(state, batch, rate)
    temporary, text, refused = _compiled(lowered)
  sent, unknown = (None, 0) if refused else communication.of_hlo(text)
  own, frozen = lora.split(state.params, run.trained)
  gradients = _bytes(own)
  params = sum(a.size for a in jax.tree.leaves(like.params))
  tokens = batch.tokens.shape
  found = {
      'devices': mesh.size, 'mesh': dict(mesh.shape), 'rows': list(tokens),
      'problems': config.optim.batch_size if run.batches.at(0).slots else tokens[0],
      'row_unit': _row_unit(config, mesh), 'refused': refused,
      'rows_seen': run.seen, 'readouts': batch.anchors.shape[1],
      'parameters': params, 'trained': sum(a.size for a in jax.tree.leaves(own)),
      'parameter_bytes': _bytes(own) + _bytes(frozen),
      'optimizer_bytes': _bytes(state.opt_state),
      'gradient_bytes': gradients, 'temporary_bytes': max(0, temporary - gradients),
      'activation_bytes': kept,
      'flops': flops.of_step(run, 1, state, batch),
      'model_flops': flops.of_step(run, 1, state, batch, remat=False),
      'collectives': sent, 'unknown_loops': unknown,
      'expected_collectives': communication.expected(config, state, batch, mesh),
      'traffic_bytes': traffic(config, state, mesh, kept),
      'vocabulary': run.tokenizer.vocab_size}
  if shapes:
    found['shapes'] = sorted(set(re.findall(r'[a-z]+\d*\[\d+(?:,\d+)+\]', text)))
  return {**found, 'seconds_to_plan': time.monotonic() - began,
          'total_bytes': sum(found[f'{part}_bytes'] for part in (
              'parameter', 'optimizer', 'gradient', 'temporary'))}


def _row_unit(config: Config, mesh) -> int:
  """The rows of a batch are a multiple of this."""
  return mesh.shape['data'] * mesh.shape['fsdp'] * config.optim.grad_accum_steps


def _compiled(lowered: jax.stages.Lowered) -> tuple[float, str, bool]:
  """(bytes of temporaries, the program's text, whether the compiler refuses it for memory).

  The compiler of a TPU makes no program that its memory cannot hold, and says how many
  bytes that would have taken.
  """
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    said = re.search(r'(?:temporaries \(|[Uu]sed )([\d.]+)([KMGT])', str(error))
    if device_errors.kind(error) != 'memory' or not said:
      raise
    return float(said[1]) * 1024**(1 + 'KMGT'.index(said[2])), '', True
  return compiled.memory_analysis().temp_size_in_bytes, compiled.as_text(), False


def activations(config: Config, mesh, batch: batching.Batch) -> int:
  """What the backward pass keeps on a device, in bytes: a written model.

  With remat, the input of each layer (and what its dense layers return, with 'dots') and one
  layer's working set, else every layer's:
  queries, keys, values, attention's weights in float32, its output, norms, the MLP.
  Beside them, the logits in float32 and their gradient, where something is predicted.
  Kernels keep no weights of attention.
  """
  c = config.model
  size = jnp.dtype(c.dtype).itemsize
  cut = mesh.shape['data'] * mesh.shape['fsdp']
  rows, length = batch.tokens.shape
  rows = max(1, rows // (cut * config.optim.grad_accum_steps))
  heads, few = c.num_heads, c.num_kv_heads or c.num_heads
  head = c.head_dim or c.embed_dim // c.num_heads
  wide = (heads + 2 * few) * head + heads * head + (3 if c.mlp == 'swiglu' else 2) * c.mlp_dim
  tensor = mesh.shape['tensor']
  layer = rows * length * (size * (4 * c.embed_dim + wide / tensor)
                           + (c.attention not in attention.KERNELS)
                           * 8 * heads / tensor * length)  # logits and weights of attention
  kept = rows * length * c.embed_dim * size
  vocabulary = config.tokenizer.vocab_size if not c.init_from else resolve(config)[1]
  count = batch.anchors.shape[1]  # the head runs on anchors and readouts alone
  predict = length - batch.prefix + count if count else length
  logits = 2 * 4 * rows * predict * vocabulary / tensor
  if c.loss_tile:  # logits and their gradient, of a tile
    logits = min(logits, 2 * 4 * c.loss_tile * vocabulary / tensor)
  by_layer = {'none': layer, 'full': kept, 'dots': kept + rows * length * size * (
      2 * c.embed_dim + (wide - c.mlp_dim) / tensor)}[c.remat]
  return int(c.depth * by_layer + (c.remat != 'none') * layer + logits)


def traffic(config: Config, state, mesh, kept: int) -> float:
  """Bytes through a device's memory in a step: a written model.

  All weights of its tensor part once a pass (forward, backward, remat's second forward)
  and microbatch; optimizer state, gradients and what is trained once read and once
  written, and so what the backward pass keeps.
  """
  passes = (3 if config.model.remat == 'full' else 2) * config.optim.grad_accum_steps
  weights = sum(a.size * a.dtype.itemsize
                for a in jax.tree.leaves(state.params)) / mesh.shape['tensor']
  own = _bytes(lora.split(state.params, config.optim.trainable)[0])
  return passes * weights + 2 * (_bytes(state.opt_state) + 2 * own + kept)


def times(one: dict[str, Any], peak: hardware.Peak) -> dict[str, float]:
  """The expected time of a step, in seconds, and its MFU.

  step = max(compute, memory) + collectives: none of them is assumed to be hidden behind
  the others' time. Compute is at SHARE of the peak, the rest at the stated bandwidths.
  """
  link = peak.link if one['devices'] <= peak.pod else peak.network
  sent = sum(size * communication.PASSES.get(kind, 1)
             for kind, size in one['expected_collectives'].items())
  found = {'compute': one['flops'] / one['devices'] / (SHARE * peak.flops),
           'memory': one['traffic_bytes'] / peak.bandwidth,
           'collectives': sent and (sent / link if link else math.nan)}
  step = max(found['compute'], found['memory']) + found['collectives']
  return {**found, 'step': step,
          'mfu': one['model_flops'] / one['devices'] / peak.flops / step}


def _bytes(tree: Any) -> int:
  """Bytes on one device."""
  return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
             for a in jax.tree.leaves(tree))
