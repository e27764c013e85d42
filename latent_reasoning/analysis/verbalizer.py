"""The reasoning decoder of a run: trained on the frozen model, asked, scored, timed.

With config.reasoning_decoder.joint, training already made one; else --mode=verbalize trains one
on the finished model, as a run of its own in the folder `reasoning_decoder` of the workdir: its
gradient has no way into the model, whose answers stay what they were. Either way
answering does not touch it: only `Verbalizer` does, when asked.
"""

import collections
import dataclasses
import functools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import chex
import flax.struct
import jax
import numpy as np
import optax

from latent_reasoning import batching, methods, sequences
from latent_reasoning.data.example import Example
from latent_reasoning.eval import decoding, evaluator
from latent_reasoning.experiment import Experiment
from latent_reasoning.models import reasoning_decoder
from latent_reasoning.models.reasoning_decoder import ReasoningDecoder
from latent_reasoning.parallel import sharding
from latent_reasoning.train import batches as batches_lib
from latent_reasoning.train import curriculum, losses, optimizer
from latent_reasoning.train import train_step as step_lib


@flax.struct.dataclass
class DecoderInputs:
  """What a frozen model hands to its reasoning decoder.

  Attributes:
    source: [B·C, S, E].
    decoder_targets: the texts to say.
  """
  source: chex.Array
  decoder_targets: batching.DecoderTargets

  def real(self, pad: int) -> int:
    """How many tokens it tells."""
    return int(np.count_nonzero(self.decoder_targets.weights))

  @property
  def places(self) -> int:
    return self.decoder_targets.weights.size


def extract(model, params, batch: batching.Batch, kind: str) -> DecoderInputs:
  source = sharding.by_rows(lambda batch: _by_row(model, params, batch, kind), params, batch)
  return DecoderInputs(source.reshape(-1, *source.shape[2:]), batch.decoder_targets)


@functools.partial(jax.jit, static_argnames=('model', 'kind'))
def _by_row(model, params, batch: batching.Batch, kind: str) -> chex.Array:
  """The sources of each row, [B, C, S, E]."""
  source = reasoning_decoder.hidden_and_source(model, params, batch, kind)[1]
  return source.reshape(len(batch.tokens), -1, *source.shape[1:])


class _DecoderBatches:
  """The batches of a run as extracts of its prompts, by step."""

  def __init__(self, batches: batches_lib.Batches, model, params, kind: str):
    self.batches, self.method, self.curriculum = batches, batches.method, batches.curriculum
    self._extract = functools.partial(extract, model, params, kind=kind)

  def at(self, step: int) -> DecoderInputs:
    return self._extract(self.batches.at(step))

  def shapes(self, stage: int) -> int:
    """As those of the run's own batches."""
    return self.batches.shapes(stage)

  def iterate(self, step: int):
    return map(self._extract, self.batches.iterate(step))


def _objective(decoder: ReasoningDecoder, params, batch: DecoderInputs, rng=None):
  return losses.decoder_loss(decoder, params, batch.source, batch.decoder_targets, rng)


@dataclasses.dataclass(frozen=True)
class Frozen(Experiment):
  """The training of a reasoning decoder as a run, for `trainer.train`.

  Attributes:
    base: the run whose model is read.
    base_params: of that model.
  """
  base: Experiment
  base_params: Any

  @property
  def objective(self):
    return _objective

  @property
  def trained(self) -> str:
    return 'all'

  @property
  def trains(self) -> str:
    return f'reasoning decoder of {self.config.method}'

  def model(self, dropout: float = 0.0) -> ReasoningDecoder:
    return self.decoder(dropout)

  def tx(self, stage: int) -> optax.GradientTransformation:
    return optimizer.build(self.config.optim)

  def fresh(self, stage: int | None = None) -> step_lib.TrainState:
    params = reasoning_decoder.init(
        self.decoder(), self.config.reasoning_decoder.source, self.base.model(),
        self.base_params, self.batches.batches.at(0),
        step_lib.key(self.config.seed, step_lib.DECODER))
    return step_lib.start(params, self.tx(1))

  def init(self, stage: int | None = None) -> step_lib.TrainState:
    return self.fresh(stage)

  def validate(self, params, part: int | None = None) -> tuple[dict[str, Any], float, str]:
    count = min(self.config.eval.valid_problems, len(self.splits.valid))
    examples = [self.splits.valid[i] for i in range(count)]
    found = score(Verbalizer(self.base, self.base_params, params), examples)
    return ({'text_accuracy': found['accuracy'], 'n': found['n']}, found['accuracy'],
            f"of the reasoning decoder on {found['n']} texts: {found['accuracy']:.1%} right")

  def placed(self, like: step_lib.TrainState) -> step_lib.TrainState | None:
    return None if self.mesh.size == 1 else sharding.whole(like, self.mesh)

  def watch(self, params, batch) -> dict[str, float]:
    return {}


def frozen(run: Experiment, params) -> Frozen:
  """The run that trains a reasoning decoder on a model's prompts."""
  config = run.config
  e = config.reasoning_decoder
  none = dataclasses.replace(config.optim.stage2, steps=0, epochs=0.0)
  stage = dataclasses.replace(config.optim.stage1, steps=e.steps, optimizer='adamw',
                              learning_rate=e.learning_rate)
  length = curriculum.build(dataclasses.replace(config.optim, stage1=stage, stage2=none),
                            len(run.splits.train))
  batches = batches_lib.Batches(config, methods.get(config.method), run.splits.train,
                                run.tokenizer, length, decoder_targets=True)
  def prompt(example, progress, config, ids):  # what is read at inference
    return method.prompt(example.question, config.eval.blocks or config.rim.blocks, config, ids)
  method = batches.method
  batches.method = dataclasses.replace(method, stages=(prompt, prompt))
  return Frozen(
      config, run.workdir.reasoning_decoder, run.splits, run.tokenizer,
      _DecoderBatches(batches, run.model(), params, e.source), {}, run, params)


class Verbalizer:
  """Says what the memory holds after questions.

  Args:
    run: of the model.
    params: of the model.
    decoder_params: of the reasoning decoder.
    step: of the checkpoint that `params` are of.
  """

  def __init__(self, run: Experiment, params, decoder_params, step: int = 0):
    self.run, self.params, self.decoder_params = run, params, decoder_params
    self.step = step
    self.predictor = run.predictor(params)
    self.decoder = run.decoder()
    self.head = decoding.head_kernel(self.decoder.transformer(), decoder_params['decoder'])

  def batch(self, examples: Sequence[Example]) -> batching.Batch:
    """Prompts and what they should tell."""
    config, special = self.run.config, self.predictor.special
    encoded = sequences.encode(examples, self.run.tokenizer)
    rows = [self.predictor.row(e.question) for e in examples]
    targets = [self.predictor.method.decoder_targets(e, row, config, special)
               for e, row in zip(encoded, rows, strict=True)]
    prompts = evaluator.prompt_batch(rows, config, special.pad)
    return prompts.replace(decoder_targets=batching.collate_decoder_targets(targets))

  def verbalize(self, question: str) -> list[str]:
    """The text of each block, of each step's latents, or of what the memory read at the
    question's end."""
    row = self.predictor.row(question)
    most = (self.predictor.blocks if self.predictor.method.has_blocks
            else max(1, row.readouts[0].latents))
    batch = self.batch([Example(question, [''] * most, '')])
    source, texts = self.source(batch), int(batch.decoder_targets.weights.any(-1).sum())
    room = self.run.config.model.max_positions - source.shape[1]
    return self.say(source, min(room, self.run.config.eval.max_new_tokens))[:texts]

  def source(self, batch: batching.Batch) -> chex.Array:
    return extract(self.run.model(), self.params, batch,
                   self.run.config.reasoning_decoder.source).source

  def say(self, source: chex.Array, max_tokens: int) -> list[str]:
    """Decodes a text from each source, greedily."""
    size, length = source.shape[:2]
    rows = [sequences.causal([0] * length, [sequences.Readout(length)])] * size
    special = self.predictor.special
    params, rng = self.decoder_params, step_lib.key(0, step_lib.SAMPLE)
    out = sharding.by_rows(lambda batch, source: decoding.generate(
        self.decoder.transformer(), params['decoder'], self.head, batch, rng, 1.0,
        end=special.end, pad=special.pad, max_tokens=max_tokens,
        embeddings=_read(self.decoder, params, source)),
        params, batching.collate(rows, length, 1, 1), source)
    return [self.run.tokenizer.decode(ids[:ids.index(special.end)] if special.end in ids
                                      else ids) for ids in out[:, 0].tolist()]


@functools.partial(jax.jit, static_argnums=0)
def _read(decoder: ReasoningDecoder, own, source):
  return decoder.apply({'params': own}, source, method='read')


def score(verbalizer: Verbalizer, examples: Sequence[Example],
          foreign: bool = False) -> dict[str, Any]:
  """How often the reasoning decoder says the reasoning of a problem, exactly.

  Args:
    verbalizer: model and decoder.
    examples: problems with steps; others have nothing to say.
    foreign: give each text the memory of the problem before it: what can be guessed
      without reading anything of this problem.

  Returns:
    {'accuracy', 'n', 'by_text': {number of the step: {'accuracy', 'n'}}, 'samples'}.
  """
  size = verbalizer.run.config.eval.batch_size
  predictor = verbalizer.predictor
  examples = [e for e in examples if predictor.fits(predictor.row(e.question))]
  right, samples = collections.defaultdict(list), []
  for start in range(0, len(examples), size):
    part = list(examples[start:start + size])
    batch = verbalizer.batch(part + part[-1:] * (size - len(part)))
    source, decoder_targets = verbalizer.source(batch), batch.decoder_targets
    count = decoder_targets.at.shape[1]
    if foreign:
      source = np.roll(source, count, axis=0)
    said = verbalizer.say(source, decoder_targets.targets.shape[-1])
    for b, example in enumerate(part):
      for c in range(count):
        length = int(decoder_targets.weights[b, c].sum())
        if length:
          meant = verbalizer.run.tokenizer.decode(decoder_targets.targets[b, c, :length - 1])
          right[c + 1].append(said[b * count + c] == meant)
          if len(samples) < 20:
            samples.append({'question': example.question, 'text': c + 1, 'meant': meant,
                            'said': said[b * count + c]})
  every = [hit for hits in right.values() for hit in hits]
  return {'accuracy': sum(every) / max(1, len(every)), 'n': len(every),
          'by_text': {str(c): {'accuracy': sum(hits) / len(hits), 'n': len(hits)}
                      for c, hits in sorted(right.items())},
          'samples': samples}


def cost(verbalizer: Verbalizer, examples: Sequence[Example], repeats: int,
         sizes: Sequence[int] = (1, 32)) -> list[dict[str, float]]:
  """Milliseconds of answering alone, and of answering and saying the reasoning."""
  found = []
  for size in sizes:
    part = (list(examples) * size)[:size]
    batch = verbalizer.batch(part)
    length = batch.decoder_targets.targets.shape[-1]
    rows = [verbalizer.predictor.row(e.question) for e in part]
    calls = {'off_ms': lambda rows=rows: verbalizer.predictor.generate(rows),
             'on_ms': lambda rows=rows, batch=batch, length=length: (
                 verbalizer.predictor.generate(rows),
                 verbalizer.say(verbalizer.source(batch), length))}
    times = {name: [] for name in calls}
    for repeat in range(-2, repeats):
      for name, call in calls.items():
        began = time.perf_counter()
        jax.block_until_ready(call())
        if repeat >= 0:
          times[name].append(1e3 * (time.perf_counter() - began))
    found.append({'batch': size, **{n: statistics.median(t) for n, t in times.items()}})
  return found
