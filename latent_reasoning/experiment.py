"""What a configuration builds, shared by all modes."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
import optax

from latent_reasoning import config as config_lib
from latent_reasoning import config_loading, data, methods, sequences
from latent_reasoning.config import Config
from latent_reasoning.data import hub, storage, tokenizers
from latent_reasoning.data import text as data_text
from latent_reasoning.data.example import Example
from latent_reasoning.data.stored import Stored
from latent_reasoning.errors import InputError, ensure, local_path
from latent_reasoning.eval import answer_matching, checkpoint_selection, language_modeling
from latent_reasoning.eval.evaluator import Predictor, evaluate
from latent_reasoning.hf import init_from as pretrained
from latent_reasoning.models import (
  attention,
  imm,
  lora,
  memory_policies,
  reasoning_decoder,
  transformer,
)
from latent_reasoning.models.transformer import Transformer, parameter_count
from latent_reasoning.parallel import device_errors, devices, multihost, programs, sharding
from latent_reasoning.report.runs import below
from latent_reasoning.train import batches as batches_lib
from latent_reasoning.train import curriculum, losses, optimizer
from latent_reasoning.train import train_step as step_lib
from latent_reasoning.train.checkpoint import Checkpoints, Restored
from latent_reasoning.train.workdir import Workdir, locate, open_workdir


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Everything of a run but its parameters."""
  config: Config
  workdir: Workdir
  splits: data.Splits | language_modeling.Ids
  tokenizer: tokenizers.Tokenizer
  batches: batches_lib.Batches | language_modeling.Batches
  sets: dict[str, tuple[Sequence[Example], dict[str, Any]]]  # of eval.sets, by path or name

  @property
  def curriculum(self) -> curriculum.Curriculum:
    return self.batches.curriculum

  @property
  def joint(self) -> bool:
    """Whether a reasoning decoder is trained with the model."""
    return bool(self.config.reasoning_decoder.source) and self.config.reasoning_decoder.joint

  @property
  def objective(self):
    method = self.batches.method
    if self.joint:
      e = self.config.reasoning_decoder
      own = losses.with_decoder(self.decoder(), e.source, e.weight)
      return method.loss(self.config, own) if method.loss else own
    if self.config.aux.align or self.config.aux.smooth:
      return losses.with_aux(self.config.aux)
    return method.loss(self.config) if method.loss else losses.next_token

  @property
  def test(self) -> list[Example]:
    """The test problems that are scored."""
    self.require_data()
    count = self.config.eval.test_problems or len(self.splits.test)
    return self.splits.test[:count]

  def require_data(self) -> None:
    """Raises InputError where the data could not be loaded, and nothing but asking needs it."""
    if found := getattr(self.splits, 'report', {}).get('absent'):
      raise InputError(found)

  @property
  def trains(self) -> str:
    """What a training of it trains, as its log says."""
    return self.config.method

  @property
  def trained(self) -> str:
    return self.config.optim.trainable

  @functools.cached_property
  def mesh(self) -> jax.sharding.Mesh:
    return sharding.make(self.config.mesh)

  def on_mesh(self) -> contextlib.AbstractContextManager:
    """Within it layers and losses know the mesh; on one device there is nothing to know."""
    return jax.set_mesh(self.mesh) if self.mesh.size > 1 else contextlib.nullcontext()

  def placed(self, like: step_lib.TrainState) -> step_lib.TrainState | None:
    """Where a state lies on the mesh; None: whole, on the one device."""
    return None if self.mesh.size == 1 else sharding.state(self.config, like, self.mesh)

  def model(self, dropout: float = 0.0) -> Transformer:
    known = self.tokenizer.size if self.trained == 'new' else 0
    projection = self.batches.method.has_latents and self.config.baselines.projection
    return Transformer(self.config.model, self.tokenizer.vocab_size, dropout, self.config.imm,
                       known, projection, self.tokenizer.used)

  def decoder(self, dropout: float = 0.0) -> reasoning_decoder.ReasoningDecoder:
    """The reasoning decoder of config.reasoning_decoder."""
    return reasoning_decoder.ReasoningDecoder(
        self.config.model, self.tokenizer.vocab_size,
        self.config.reasoning_decoder.num_layers, dropout)

  def tx(self, stage: int) -> optax.GradientTransformation:
    """The update rule of a stage."""
    return optimizer.build(self.config.optim, self.curriculum.stages[stage - 1].optimizer)

  def init(self, stage: int | None = None) -> step_lib.TrainState:
    """The state to begin with: pretrained weights, or fresh ones from the seed.

    Args:
      stage: whose optimizer it has; None: the first.
    """
    if self.mesh.size == 1 and not self.config.model.init_from:
      return jax.jit(lambda: self.fresh(stage))()
    like = jax.eval_shape(lambda: self.fresh(stage))
    placed = self.placed(like)
    if not self.config.model.init_from:
      return jax.jit(lambda: self.fresh(stage), out_shardings=placed)()
    return self.begin(self.pretrained_params(), stage or self.curriculum.at(0).stage, placed)

  def pretrained_params(self) -> dict[str, Any]:
    """The parameters of config.model.init_from."""
    like = jax.eval_shape(self.fresh)
    placed = self.placed(like)
    return pretrained.load(
        self.config, like.params, self.tokenizer,
        step_lib.key(self.config.seed, step_lib.INIT), lambda: self.fresh().params,
        placed and placed.params)

  def begin(self, params, stage: int,
            placed: step_lib.TrainState | None = None) -> step_lib.TrainState:
    """The state that a stage begins with: its optimizer has seen nothing."""
    tx = self.tx(stage)
    if self.mesh.size == 1:
      return step_lib.start(params, tx, self.trained)
    if placed is None:
      placed = self.placed(jax.eval_shape(
          lambda p: step_lib.start(p, tx, self.trained), params))
    return jax.jit(lambda p: step_lib.start(p, tx, self.trained), out_shardings=placed)(params)

  def fresh(self, stage: int | None = None) -> step_lib.TrainState:
    """A state from the seed alone."""
    batch, seed = self.batches.at(0), self.config.seed
    tx = self.tx(stage or self.curriculum.at(0).stage)
    params = step_lib.init(self.model(), tx, batch, seed, self.trained).params
    if self.joint:
      params = {**params, 'reasoning_decoder': reasoning_decoder.init(
          self.decoder(), self.config.reasoning_decoder.source, self.model(), params, batch,
          step_lib.key(seed, step_lib.DECODER))}
    params = lora.cast(params, self.trained, self.config.model.frozen_dtype)
    return step_lib.start(params, tx, self.trained)

  def like(self, step: int) -> step_lib.TrainState:
    """Shapes and types of the state after some steps."""
    total = self.curriculum.total
    ensure(step <= total, f'a checkpoint of step {step} is past the {total} steps of this '
           'configuration; use the configuration it was trained with, its '
           '--config.train.extend included')
    stage = self.curriculum.at(max(0, step - 1)).stage
    like = jax.eval_shape(lambda: self.fresh(stage))
    placed = self.placed(like)
    return like if placed is None else jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), like, placed)

  def predictor(self, params, config: Config | None = None) -> Predictor:
    config, model = sequences.at_inference(config or self.config), self.model()
    if config.eval.loops:
      model = model.clone(config=dataclasses.replace(model.config, loop=dataclasses.replace(
          model.config.loop, count=config.eval.loops)))
    return Predictor(config, model, params, self.tokenizer)

  def validate(self, params, part: int | None = None) -> tuple[dict[str, Any], float, str]:
    """Values to log, a score of which more is better, and a line to print.

    Args:
      part: of stage 1, as which the model is asked; None: as at inference.
    """
    config = self.config
    if part is not None:
      config = self.batches.method.asks(config, part)
    if self.batches.method.is_text:
      found = self.loss(params, 'valid')
      mark = '' if config.causal else ' (NOT CAUSAL)'
      return found, -found['loss'], f"loss {found['loss']:.4f}{mark} on the whole split"
    count = min(config.eval.valid_problems, len(self.splits.valid))
    examples = [self.splits.valid[i] for i in range(count)]
    greedy = dataclasses.replace(config, eval=dataclasses.replace(config.eval, samples=0))
    accuracy = evaluate(self.predictor(params, greedy), examples, config.data.name,
                        'valid', self.splits.report['rules']['valid'])[0]['accuracy']
    of = {} if part is None else {'part': part}
    return ({**accuracy, 'n': count, **of}, accuracy['final'],
            f'{f"as part {part} trains, " if of else ""}on {count} problems: final '
            f'{accuracy["final"]:.1%}, any {accuracy["any"]:.1%}')

  def watch(self, params, batch) -> dict[str, float]:
    """The memory's failure signatures on a batch; empty without memory."""
    if not self.config.imm.write_policy:
      return {}
    found = _memory_usage(self.model(), params, batch)
    return {name: float(value) for name, value in jax.device_get(found).items()}

  def loss(self, params, split: str, **imm: Any) -> dict[str, float]:
    """Loss over a whole split of text; `imm` changes keys of the memory."""
    model = self.model().clone(imm=dataclasses.replace(self.config.imm, **imm))
    return language_modeling.loss(model, params, getattr(self.splits, split),
                                  self.config.data.seq_len,
                                  self.config.eval.batch_size, self.splits.start)

  @functools.cached_property
  def fingerprint(self) -> dict[str, str]:
    """A hash of each split; empty for generated problems, which the config determines."""
    splits = {s: getattr(self.splits, s, ()) for s in ('train', 'valid', 'test')}
    return {name: found.fingerprint() if isinstance(found, Stored) else hashlib.blake2b(
        found.tobytes() if isinstance(found, np.ndarray) else repr(found).encode(),
        digest_size=16).hexdigest() for name, found in splits.items()
            if isinstance(found, (list, tuple, np.ndarray, Stored))}

  def checkpoints(self, writer: bool = False) -> Checkpoints:
    return Checkpoints(self.workdir.checkpoints, self.config.train.max_to_keep, writer=writer)

  def steps_trained(self) -> int:
    """Those of the newest checkpoint; 0: there is none."""
    if not self.workdir.checkpoints.exists():
      return 0
    checkpoints = self.checkpoints()
    try:
      return max(checkpoints.steps(), default=0)
    finally:
      checkpoints.close()

  def follow(self, meta: dict[str, Any] | None) -> None:
    """Puts the parts of stage 1 where a checkpoint says that they began, and the end where
    it says; without one, none has begun yet, where they are not equally long."""
    b, batches = self.config.baselines, self.batches
    starts = () if b.part_accuracy or b.part_patience else None
    if batches.curriculum.parts == 1:
      starts = None
    elif starts is not None and meta:
      starts = tuple(meta.get('parts', {}).get('starts', ()))
    ended = meta.get('stopping', {}).get('ended', 0) if meta else 0
    batches.curriculum = dataclasses.replace(batches.curriculum, starts=starts, ended=ended)

  def restore(self) -> Restored | None:
    """The checkpoint that `eval.checkpoint` names, or None before the first.

    Raises:
      InputError: none is sound, or it is of another tokenizer or other weights.
    """
    checkpoints = self.checkpoints()
    for _ in range(10):  # beside training, which may remove one while it is read
      step = checkpoints.best() if self.config.eval.checkpoint == 'best' else None
      try:
        restored = checkpoints.restore(self.like, step)
        break
      except InputError:
        if step is None or step in checkpoints.steps():
          raise
    checkpoints.close()
    if restored:
      self.same_sources(restored.meta)
      self.follow({**restored.meta, 'stopping': {'ended': checkpoints.ended}})
    return restored

  def kept(self) -> Iterator[Restored]:
    """Every checkpoint there is, the oldest first."""
    checkpoints = self.checkpoints()
    for step in reversed(checkpoints.steps()):
      restored = checkpoints.restore(self.like, step)
      self.same_sources(restored.meta)
      yield restored
    checkpoints.close()

  @functools.cached_property
  def sources(self) -> dict[str, str]:
    """Hashes of what a checkpoint means nothing without: tokenizer, pretrained weights."""
    start = self.config.model.init_from
    return {'tokenizer': self.tokenizer.fingerprint,
            'pretrained weights': pretrained.fingerprint(start) if start else ''}

  def same_sources(self, meta: dict[str, Any]) -> None:
    """Raises InputError where a checkpoint was trained with another tokenizer or other
    pretrained weights than are here now."""
    for name, ours in self.sources.items():
      if (theirs := meta.get('sources', {}).get(name)) != ours:
        raise InputError(
            f'the {name} of the checkpoint of step {meta["step"]} are not those here (hash '
            f'{theirs}, found {ours}): its numbers would mean something else. Restore '
            f'{self.workdir.tokenizer if name == "tokenizer" else start_of(self.config)}, or '
            'train in another --workdir=DIR')


def start_of(config: Config) -> str:
  return f'config.model.init_from {config.model.init_from!r}'


_memory_usage = jax.jit(imm.usage, static_argnums=0)


def open_run(config: Config, path: str | pathlib.Path, training: bool = True,
             asking: bool = False) -> Experiment:
  """The run of a configuration in a folder, new or begun.

  Compiled programs are kept where train.compilation_cache says, from then on in the whole
  process.

  Args:
    config: as `config_loading` makes it.
    path: of the folder.
    training: as `train.workdir.open_workdir`.
    asking: as `build`.

  Raises:
    InputError: from weights, folder or data.
  """
  config = multihost.primary_first(lambda: pretrained.resolve(config), hub.shared)
  _keep_programs(config)
  place = multihost.primary_first(lambda: open_workdir(path, config, training))
  return multihost.primary_first(lambda: build(config, place, asking), hub.shared)


def _keep_programs(config: Config) -> None:
  if config.train.compilation_cache:
    jax.config.update('jax_compilation_cache_dir',
                      storage.shared_folder(config.train.compilation_cache,
                                            'config.train.compilation_cache'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)


def reopen(path: str | pathlib.Path) -> Experiment:
  """The run that a folder holds, by the configuration in it.

  Raises:
    InputError: it holds none.
  """
  remote = '://' in str(path) and not str(path).startswith('file://')
  place = locate(path) if remote else Workdir(local_path(path, 'a workdir').absolute())
  place.pull()
  if not place.config.is_file():
    raise InputError(f'{path}: found no config.json in it; expected the folder of a run'
                     + ('' if remote else below([place.path])))
  try:
    config = ml_collections.ConfigDict(json.loads(place.config.read_text(encoding='utf-8')))
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(f'{path}: {error}; expected the folder of a finished run') from None
  config = pretrained.resolve(config_loading.from_dict(config))
  _keep_programs(config)
  return build(config, place)


def build(config: Config, workdir: Workdir, asking: bool = False) -> Experiment:
  """Loads data, tokenizer and curriculum.

  Args:
    asking: whether weights that nothing was trained of here are to answer questions, for
      which data may be missing: that is said, and refused where it is needed.

  Raises:
    InputError: from any of them, or because they do not fit together or the devices.
  """
  devices.require(config.device)
  programs.listen()
  programs.keep_few()
  attention.check(config.model.attention)
  _check_sizes(config)
  memory_policies.check(config.imm)
  transformer.check(config)
  method = methods.check(config)
  if method.is_text:
    return _build_text(config, workdir)
  parts = method.parts(config) if method.parts else 1
  epochs = method.resets_epochs and config.baselines.reset == 'published'
  asking = asking and bool(config.model.init_from) and not workdir.metrics.exists()
  load = data.load_or_stand_in if asking else data.load
  splits = load(config.data, config.seed, *[config.optim.batch_size] * asking)
  tokenizer = tokenizers.build(config.tokenizer, lambda: batches_lib.texts(splits.train),
                               workdir.tokenizer, config.rim.max_steps)
  if isinstance(splits.train, Stored):
    splits = dataclasses.replace(splits, train=splits.train.tokenized(tokenizer))
  config = batches_lib.sized(config, method, splits.train, tokenizer)
  train = batches_lib.fitting(config, method, splits.train, tokenizer)
  too_long = len(splits.train) - len(train)
  splits = dataclasses.replace(splits, train=train,
                               report={**splits.report, 'too_long': too_long})
  decoder = config.reasoning_decoder
  def unit():  # of rows, that devices and microbatches divide
    return config.optim.grad_accum_steps * sharding.parts(sharding.make(config.mesh))
  batches = batches_lib.Batches(config, method, train, tokenizer,
                                curriculum.build(config.optim, len(train), parts,
                                                 config.train.extend, epochs),
                                bool(decoder.source) and decoder.joint, unit)
  run = Experiment(config, workdir, splits, tokenizer, batches,
                   {entry: data.load_set(entry, config.data, config.seed)
                    for entry in config.eval.sets if 'absent' not in splits.report})
  # What evaluation lacks shows here, not after the training.
  for rule in (*splits.report['rules'].values(), *(found['rule'] for _, found in
                                                   run.sets.values())):
    answer_matching.library(rule)
  if config.eval.checkpoint_selection == 'paper' and not asking:
    checkpoint_selection.check(len(run.test))
  return run


LONGEST = 10_000_000  # positions of a row: more fit no memory


def _check_sizes(config: Config) -> None:
  """Raises InputError, before anything is built, where it cannot fit the memory there is."""
  model, rim, method = config.model, config.rim, methods.get(config.method)
  vocab = max(config.tokenizer.at_least, config.tokenizer.vocab_size, config.tokenizer.pad_to)
  count = parameter_count(model, vocab) + model.num_layers * config.imm.slots
  copies = 4 if config.optim.trainable == 'all' else 1  # gradients and two moments
  here, where = device_errors.memory()
  ensure(4 * count * copies <= here * multihost.count(),
         f'config.model describes about {float(count):.3g} parameters, which take '
         f'{4 * count * copies / 2**30:.3g} GiB in training; found {here / 2**30:.3g} GiB of '
         f'{where}. Expected a smaller model (config.model.num_layers, embed_dim, mlp_dim), '
         'or --mode=plan for machines that are not here')
  longest = min(model.max_positions, LONGEST)
  for key, tokens in (('rim.blocks', rim.blocks * rim.block_length),
                      ('eval.blocks', config.eval.blocks * rim.block_length),
                      ('rim.max_steps', rim.max_steps),
                      ('baselines.pause_tokens', config.baselines.pause_tokens),
                      ('baselines.latents', config.baselines.latents)):
    used = method.has_blocks or key in ('rim.max_steps', method.counts)
    ensure(not used or tokens < longest,
           f'config.{key} is {config_lib.get(config, key)}, which takes {tokens} positions or '
           f'more; config.model.max_positions is {model.max_positions}')


def _build_text(config: Config, workdir: Workdir) -> Experiment:
  found = data_text.load(config.data)
  tokenizer = tokenizers.build(config.tokenizer, lambda: [found.train], workdir.tokenizer, 0)
  ids = language_modeling.encode(found, tokenizer)
  crops = max(len(ids.train) // config.data.seq_len, config.optim.batch_size)  # an epoch
  length = curriculum.build(config.optim, crops, extend=config.train.extend)
  batches = language_modeling.Batches(config, ids.train, length, ids.start)
  return Experiment(config, workdir, ids, tokenizer, batches, {})
