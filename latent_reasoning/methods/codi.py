"""CODI (Shen et al., arXiv 2502.21074): latents taught by the same model's chain of thought."""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp

from latent_reasoning.batching import Batch
from latent_reasoning.config import Config
from latent_reasoning.models import latents
from latent_reasoning.sequences import (
  Method,
  PackedSequence,
  Readout,
  SpecialTokens,
  TokenizedExample,
  causal,
  chain_of_thought,
)
from latent_reasoning.train.losses import BatchLoss, of_hidden


def student(example: TokenizedExample, progress: float, config: Config,
            ids: SpecialTokens) -> PackedSequence:
  """x <b> h … h </b> y, in both stages; its teacher is the same model on `teacher`."""
  x = [*example.question, ids.block_open]
  return causal(x, [Readout(len(x), [*example.answer, ids.end], start=ids.block_close,
                            latents=config.baselines.latents)])


def teacher(example: TokenizedExample, progress: float, config: Config,
            ids: SpecialTokens) -> PackedSequence:
  """A chain of thought without its last step, whose result is the answer: else the state
  that is taught would copy it instead of working it out."""
  x = example.question
  return causal(x, [Readout(len(x), chain_of_thought(example.steps[:-1], example.answer, ids))])


def prompt(question: Sequence[int], blocks: int, config: Config,
           ids: SpecialTokens) -> PackedSequence:
  """The question and its latents."""
  x = [*question, ids.block_open]
  return causal(x, [Readout(len(x), start=ids.block_close, latents=config.baselines.latents)])


def loss(config: Config) -> BatchLoss:
  """A student with latents, taught by its own chain of thought.

    L = CE_student + w_t · CE_teacher + w_d · mean_l smooth_L1(h_l, sg h*_l) / σ_l

  w_t and w_d are baselines.teacher_weight and distill_weight. Each CE is the mean over its own
  tokens. h_l and h*_l are the states after layer l, the last one normed, of student and
  teacher at the token that predicts the answer; smooth L1 is the mean over problems and
  width, σ_l the standard deviation of h*_l over both.

  The sums have those of the student, 'teacher_loss' and 'distance'.
  """
  def teach(model, params, batch: Batch, rng):
    rng = None if rng is None else jax.random.split(rng)[1]
    out = latents.forward(model, params, batch.teacher, rng)
    hidden, layers = out.hidden, out.layers.hidden
    # An answer is as long in both rows, the last tokens of the chain of thought.
    length = jnp.sum(batch.weights > 0, axis=1)
    said = jnp.sum(batch.teacher.weights > 0, axis=1) - length  # before the answer
    place = jnp.where(said == 0, batch.teacher.anchors[:, 0], batch.teacher.prefix + said - 1)
    return hidden, jax.lax.stop_gradient(_states(hidden, layers, place))

  def statistics(model, params, batch: Batch, rng):
    return {'states': jnp.swapaxes(teach(model, params, batch, rng)[1], 0, 1),
            'weight': jnp.sum(batch.weights, axis=1),
            'teacher_weight': jnp.sum(batch.teacher.weights, axis=1)}

  def terms(model, params, batch: Batch, rng, whole, first):
    own_rng = None if rng is None else jax.random.split(rng)[0]
    out = latents.forward(model, params, batch, own_rng)
    hidden, layers = out.hidden, out.layers.hidden
    loss, sums = of_hidden(model, params, batch, hidden)
    own = _states(hidden, layers, batch.prefix + batch.latents)
    hidden, theirs = teach(model, params, batch, rng)
    taught, _ = of_hidden(model, params, batch.teacher, hidden)
    weight = whole['weight'].sum()  # by which the sums will be divided
    spread = jnp.std(whole['states'], axis=(0, 2))[:, None, None] + 1e-6
    distance = jnp.sum(_smooth_l1(own - theirs) / spread) / (
        len(own) * own.shape[-1] * len(whole['states']))
    sums = {**sums, 'teacher_loss': taught * weight / whole['teacher_weight'].sum(),
            'distance': distance * weight}
    return (loss + config.baselines.teacher_weight * sums['teacher_loss'] +
            config.baselines.distill_weight * sums['distance'], sums)
  return BatchLoss(statistics, terms)


def _smooth_l1(difference: chex.Array) -> chex.Array:
  """|d| - 1/2 beyond 1, d² / 2 within (Girshick 2015)."""
  size = jnp.abs(difference)
  return jnp.where(size < 1, 0.5 * size**2, size - 0.5)


def _states(hidden: chex.Array, layers, place) -> chex.Array:
  """States behind each layer, the last one normed, at one position of each row: float32
  [layers, B, D]."""
  layers = [*layers][:-1] + [hidden]
  place = jnp.broadcast_to(place, hidden.shape[0])[:, None, None]
  return jnp.stack([jnp.take_along_axis(x, place, axis=1)[:, 0] for x in layers]).astype(
      jnp.float32)


CODI = Method(
    'codi', 'CODI: continuous thoughts, distilled from the chain of thought of the same model '
    '(arXiv 2502.21074).', (student, student), prompt, loss, teacher=teacher, has_latents=True)
