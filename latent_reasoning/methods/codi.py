"""CODI (Shen et al., arXiv 2502.21074): latents taught by the same model's chain of thought.

SIM-CoT (arXiv 2509.20317) is a switch, reasoning_decoder.source 'latents' and joint: the input
of latent k also says step k, as long as there are steps. The loss is a mean over tokens, added
with reasoning_decoder.weight (1 in the paper); inference has no decoder.

KaVa's loss on keys and values (arXiv 2510.02312) is another, baselines.kv_weight.
"""

from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from latent_reasoning.batching import Batch
from latent_reasoning.config import Config
from latent_reasoning.methods import kava
from latent_reasoning.methods.coconut import said
from latent_reasoning.methods.icot import rest
from latent_reasoning.models import latents
from latent_reasoning.sequences import (
  DecoderTarget,
  Method,
  PackedSequence,
  Readout,
  SpecialTokens,
  TokenizedExample,
  causal,
  chain_of_thought,
)
from latent_reasoning.train.losses import BatchLoss, next_token, of_hidden


def student(example: TokenizedExample, progress: float, config: Config,
            ids: SpecialTokens) -> PackedSequence:
  """x <b> h … h </b> #### y, in both stages; its teacher is the same model on `teacher`.

  The mark stands in for the published prompt "The answer is:", whose end both rows have.
  """
  return _row(example.question, rest([], example, config, ids), config, ids)


def _row(question: Sequence[int], out: Sequence[int], config: Config,
         ids: SpecialTokens) -> PackedSequence:
  x, b = [*question, ids.block_open], config.baselines
  return causal(x, [Readout(len(x), out, start=ids.block_close, latents=b.latents,
                            mark=len(ids.answer) * b.keep_mark)])


def teacher(example: TokenizedExample, progress: float, config: Config,
            ids: SpecialTokens) -> PackedSequence:
  """A chain of thought without its last step, whose result is the answer: else the state
  that is taught would copy it instead of working it out."""
  x = example.question
  return causal(x, [Readout(len(x), chain_of_thought(example.steps[:-1], example.answer, ids))])


def prompt(question: Sequence[int], blocks: int, config: Config,
           ids: SpecialTokens) -> PackedSequence:
  """The question and its latents."""
  return _row(question, (), config, ids)


def decoder_targets(example: TokenizedExample, row: PackedSequence, config: Config,
                    ids: SpecialTokens) -> list[DecoderTarget]:
  """Step k out of latent k, of those that there are."""
  return said(example.steps, row, 1, ids)


def loss(config: Config, student_loss: Callable[..., Any] = next_token,
         from_layer: int = 0) -> BatchLoss:
  """A student with latents, taught by its own chain of thought.

    L = CE_student + w_t · CE_teacher + w_d · mean_l smooth_L1(h_l, sg h*_l) / σ_l

  w_t and w_d are baselines.teacher_weight and distill_weight. Each CE is the mean over its own
  tokens. h_l and h*_l, l = 0 … L, are embedding with position, and the states after layer l,
  the last one normed, of student and teacher at the token that predicts the answer, the end of
  its mark in both; smooth L1 is the mean over problems and width, σ_l the standard deviation
  of h*_l over both. States before `from_layer` do not count. With baselines.kv_weight, that
  times L_KV is added (methods.kava).

  The sums have those of the student, 'teacher_loss', 'distance' and 'kv_distance'.
  `student_loss` is what stands for CE_student, as `train.losses.next_token`.
  """
  b = config.baselines

  def teach(model, params, batch: Batch, rng):
    rng = None if rng is None else jax.random.split(rng)[1]
    out = latents.forward(model, params, batch.teacher, rng)
    # An answer is as long in both rows, the last tokens of the chain of thought.
    length = jnp.sum(batch.weights > 0, axis=1) - batch.mark
    said = jnp.sum(batch.teacher.weights > 0, axis=1) - length  # steps and mark
    states = _states(model, params, batch.teacher, out, batch.teacher.prefix + said - 1)
    steps = said - batch.mark
    kv = kava.chosen(out.layers, batch.teacher, steps, kava.count(batch),
                     b.kv_importance) if b.kv_weight else None
    return out.hidden, jax.lax.stop_gradient(states[from_layer:]), kv, steps

  def statistics(model, params, batch: Batch, rng):
    _, states, kv, steps = teach(model, params, batch, rng)
    return {'states': jnp.swapaxes(states, 0, 1),
            'weight': jnp.sum(batch.weights, axis=1),
            'teacher_weight': jnp.sum(batch.teacher.weights, axis=1),
            **({'kv': kava.moments(kv, steps)} if b.kv_weight else {})}

  def terms(model, params, batch: Batch, rng, whole, first):
    own_rng = None if rng is None else jax.random.split(rng)[0]
    out, cache = latents.forward_with_cache(model, params, batch, own_rng)
    loss, sums = student_loss(model, params, batch, own_rng, out)
    own = _states(model, params, batch, out, batch.prefix + batch.latents + batch.mark)
    own = own[from_layer:]
    hidden, theirs, kv, steps = teach(model, params, batch, rng)
    taught, _ = of_hidden(model, params, batch.teacher, hidden)
    weight = whole['weight'].sum()  # by which the sums will be divided
    spread = jnp.std(whole['states'], axis=(0, 2))[:, None, None] + 1e-6
    distance = jnp.sum(_smooth_l1(own - theirs) / spread) / (
        len(own) * own.shape[-1] * len(whole['states']))
    sums = {**sums, 'teacher_loss': taught * weight / whole['teacher_weight'].sum(),
            'distance': distance * weight}
    loss += b.teacher_weight * sums['teacher_loss'] + b.distill_weight * sums['distance']
    if b.kv_weight:
      sums['kv_distance'] = weight * kava.distance(
          kava.of_latents(cache, batch), kv, steps, whole['kv'])
      loss += b.kv_weight * sums['kv_distance']
    return loss, sums
  return BatchLoss(statistics, terms)


def _smooth_l1(difference: chex.Array) -> chex.Array:
  """|d| - 1/2 beyond 1, d² / 2 within (Girshick 2015)."""
  size = jnp.abs(difference)
  return jnp.where(size < 1, 0.5 * size**2, size - 0.5)


def _states(model, params, batch: Batch, out, place) -> chex.Array:
  """What goes into the layers, and the states behind each, the last one normed, at one
  position of each row: float32 [layers + 1, B, D]."""
  place = jnp.broadcast_to(place, len(batch.tokens))[:, None]
  tokens, positions = (jnp.take_along_axis(a, place, axis=1)
                       for a in (batch.tokens, batch.positions))
  first = model.apply({'params': params}, tokens, positions, method='inputs')
  later = [jnp.take_along_axis(x, place[..., None], axis=1)
           for x in (*[*out.layers.hidden][:-1], out.hidden)]
  return jnp.stack([first, *later])[:, :, 0].astype(jnp.float32)


CODI = Method(
    'codi', 'CODI: continuous thoughts, distilled from the chain of thought of the same model '
    '(arXiv 2502.21074).', (student, student), prompt, loss, decoder_targets=decoder_targets,
    decoder_mean='tokens', teacher=teacher, marked=True,
    has_latents=True, counts='baselines.latents')
