"""Losses: pure functions (model, params, batch, rng) -> sums. Those of one method are in its
file.

Each returns weighted sums, never means: sums add over microbatches, devices and
processes, and are divided once, by the weight of the whole batch. A term that is a mean over
something else, or compares the problems of a batch, needs to know of the whole batch however
it is cut: such a loss is a `BatchLoss`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from latent_reasoning.batching import Batch, DecoderTargets
from latent_reasoning.config import AuxConfig
from latent_reasoning.models import latents, masks
from latent_reasoning.models import reasoning_decoder as decoder_lib
from latent_reasoning.models.reasoning_decoder import ReasoningDecoder
from latent_reasoning.models.transformer import Output
from latent_reasoning.train import cross_entropy


def predictions(batch: Batch) -> tuple[chex.Array, chex.Array, chex.Array]:
  """Returns the positions that can predict, their targets and weights: [B, K + K·R].

  These are the anchors and the readouts. The rest of the prefix never predicts,
  and with a large vocabulary the head on it would cost more than the layers.
  """
  size, length = batch.tokens.shape
  readouts = jnp.broadcast_to(jnp.arange(batch.prefix, length), (size, length - batch.prefix))
  at = jnp.concatenate([batch.anchors, readouts], axis=1)
  return (at, jnp.take_along_axis(batch.targets, at, axis=1),
          jnp.take_along_axis(batch.weights, at, axis=1))


def next_token(model, params, batch: Batch, rng: chex.PRNGKey | None = None,
               out: Output | None = None):
  """Weighted next-token loss, Σ w · -log p(target): the losses L1 and L2 of RiM.

  Args:
    model: as models.transformer.Transformer.
    params: its parameters.
    batch: rows.
    rng: for dropout; None: deterministic.
    out: what the model computed of the rows; None: to be computed.

  Returns:
    the sum, and a dict of float32 scalar sums: 'loss', 'weight' (the divisor),
    'correct' (weight of the predictions that are right).
  """
  out = latents.forward(model, params, batch, rng) if out is None else out
  return of_hidden(model, params, batch, out.hidden)


def of_hidden(model, params, batch: Batch, hidden: chex.Array):
  """`next_token` of final hidden states [B, L, D]."""
  at, targets, weights = predictions(batch)
  hidden = jnp.take_along_axis(hidden, at[..., None], axis=1)
  return under_head(model, params, hidden, targets, weights)


@dataclasses.dataclass(frozen=True)
class BatchLoss:
  """A loss that depends on statistics of the whole batch.

  Attributes:
    statistics: (model, params, batch, rng) -> a pytree of arrays whose leading axis is the
      batch's, so that those of its parts are put together; no gradient goes through them.
    terms: (model, params, batch, rng, statistics, first) -> as `next_token`; of the whole
      batch's statistics, the first row that is this part's is `first`.
  """
  statistics: Callable[..., Any]
  terms: Callable[..., Any]

  def __call__(self, model, params, batch: Batch, rng: chex.PRNGKey | None = None,
               statistics: Any = None, first: chex.Array | int = 0):
    """The loss of a batch, or of a part of one whose statistics are given."""
    if statistics is None:
      statistics = self.statistics(model, params, batch, rng)
    return self.terms(model, params, batch, rng, jax.lax.stop_gradient(statistics), first)


def decoder_loss(decoder: ReasoningDecoder, params, source: chex.Array, texts: DecoderTargets,
                 rng: chex.PRNGKey | None = None):
  """The reasoning decoder's loss: -log p(text | source), summed. As `next_token`.

  Args:
    decoder: with parameters `params`.
    source: [B·C, S, E], of `models.reasoning_decoder.hidden_and_source`.
    texts: the C texts of each sequence.
  """
  size, length = source.shape[:2]
  targets, weights = (a.reshape(size, -1) for a in (texts.targets, texts.weights))
  # The last source vector predicts the first token.
  whole = length + targets.shape[1] - 1
  tokens = jnp.pad(targets[:, :-1], ((0, 0), (length, 0)))
  places = jnp.broadcast_to(jnp.arange(whole), (size, whole))
  rngs = None if rng is None else {'dropout': rng}
  hidden = decoder.apply({'params': params}, source, tokens, places,
                         masks.plain(size, whole), rng is None, rngs=rngs)[:, length - 1:]
  return under_head(decoder, params, hidden, targets, weights)


def with_decoder(decoder: ReasoningDecoder, kind: str, weight: float):
  """`next_token` with a reasoning decoder trained jointly: its tokens' losses are added
  with a weight, and its gradient reaches the model.

  Returns:
    (model, params, batch, rng, out) -> sums, where params has the decoder's as
    'reasoning_decoder'
    and the sums tell its own loss beside the model's.
  """
  def objective(model, params, batch: Batch, rng: chex.PRNGKey | None = None,
                out: Output | None = None):
    out = latents.forward(model, params, batch, rng) if out is None else out
    source = decoder_lib.source(model, params, batch, kind, out)
    loss, sums = of_hidden(model, params, batch, out.hidden)
    more, own = decoder_loss(decoder, params['reasoning_decoder'], source,
                             batch.decoder_targets, rng)
    return loss + weight * more, {
        **sums, **{f'decoder_{name}': value for name, value in own.items()}}
  return objective


def with_aux(aux: AuxConfig) -> BatchLoss:
  """`next_token` with auxiliary losses on RiM's blocks, read at the anchors of a row, the
  `</b>` of the blocks that have a readout. For a batch of B rows:

    align:  mean_b of -log softmax_c(cos(z_b, e_c) / temperature) at c = b, where z is the
            final state of the last block, e the mean embedding of the answer's tokens
            (which has no gradient), and rows with b's own answer are no negatives.
    smooth: mean over rows and inner blocks k of 1 - cos(z_k - z_{k-1}, z_{k+1} - z_k),
            0 where the states of the blocks lie on a line, 2 where they go back.

  The sums hold each mean, times the total weight, as 'aux_align' and 'aux_smooth'.
  """
  def statistics(model, params, batch: Batch, rng):
    means, texts = _answers(model, params, batch)
    return {'weight': jnp.sum(batch.weights, axis=1), 'means': means, 'texts': texts,
            'inner': jnp.sum(batch.anchors[:, 2:] > 0, axis=1)}

  def terms(model, params, batch: Batch, rng, whole, first):
    hidden = latents.forward(model, params, batch, rng).hidden
    loss, sums = of_hidden(model, params, batch, hidden)
    z = jnp.take_along_axis(hidden, batch.anchors[..., None], axis=1).astype(jnp.float32)
    weight = whole['weight'].sum()  # by which the sums will be divided
    if aux.align:
      last = jnp.take_along_axis(z, batch.anchors.argmax(1)[:, None, None], axis=1)[:, 0]
      sums['aux_align'] = weight * jnp.sum(contrast(
          last, whole['means'], whole['texts'], first, aux.temperature)) / len(whole['means'])
    if aux.smooth:
      sums['aux_smooth'] = weight * turning(z, batch.anchors) / jnp.maximum(
          whole['inner'].sum(), 1)
    for name, share in (('aux_align', aux.align), ('aux_smooth', aux.smooth)):
      loss += share * sums.get(name, 0.0)
    return loss, sums
  return BatchLoss(statistics, terms)


def _answers(model, params, batch: Batch) -> tuple[chex.Array, chex.Array]:
  """Of each row, the mean embedding of the last block's text [B, D], float32, and its tokens
  [B, R], -1 where there is none."""
  last = batch.anchors.argmax(1)[:, None]  # the readout of the last block
  size, count = batch.anchors.shape
  def of_last(a):  # what its anchor predicts, and its own tokens: [B, 1 + R]
    own = a[:, batch.prefix:].reshape(size, count, -1)
    at = jnp.take_along_axis(batch.anchors, last, axis=1)
    return jnp.concatenate([jnp.take_along_axis(a, at, axis=1), jnp.take_along_axis(
        own, last[..., None], axis=1)[:, 0]], axis=1)
  targets, spoken = of_last(batch.targets), of_last(batch.weights) > 0
  spoken &= jnp.cumsum(spoken, axis=1) < spoken.sum(1, keepdims=True)  # but the end token
  embedded = model.apply({'params': params}, targets, method='embed').astype(jnp.float32)
  means = jnp.sum(embedded * spoken[..., None], 1) / jnp.maximum(spoken.sum(1), 1)[:, None]
  return means, jnp.where(spoken, targets, -1)


def contrast(states: chex.Array, means: chex.Array, texts: chex.Array,
             first: chex.Array | int, temperature: float) -> chex.Array:
  """InfoNCE (van den Oord et al. 2018) of b states [b, D] against B means [B, D]: [b].

  The state of row i belongs to the mean of row first + i; rows whose texts [B, R] are the
  same are no negatives of each other.
  """
  logits = _unit(states) @ _unit(means).T / temperature
  own = first + jnp.arange(len(states))
  same = (texts[own][:, None] == texts[None]).all(-1)
  same &= own[:, None] != jnp.arange(len(means))
  logits = jax.nn.log_softmax(jnp.where(same, -1e30, logits), axis=-1)
  return -jnp.take_along_axis(logits, own[:, None], axis=-1)[:, 0]


def turning(z: chex.Array, anchors: chex.Array) -> chex.Array:
  """Sum of 1 - cos between successive changes of states [B, K, D], over those of three
  blocks in a row; an anchor of 0 is no block."""
  d = _unit(jnp.diff(z, axis=1))
  turn = 1 - jnp.sum(d[:, 1:] * d[:, :-1], axis=-1)
  return jnp.sum(turn * (anchors[:, 2:] > 0))  # blocks come in order, no block after them


def _unit(a: chex.Array) -> chex.Array:
  return a * jax.lax.rsqrt(jnp.sum(a * a, axis=-1, keepdims=True) + 1e-12)


def under_head(model, params, hidden: chex.Array, targets: chex.Array, weights: chex.Array):
  """The sums of `next_token`, of final hidden states [B, T, D], targets and weights [B, T].

  In tiles of config.model.loss_tile tokens (train.cross_entropy); whole where that is 0, or on
  one device where there are no more tokens than that.
  """
  tile, mesh = model.config.loss_tile, jax.sharding.get_abstract_mesh()
  if not tile or targets.size <= tile and (mesh.empty or mesh.size == 1):
    logits = model.apply({'params': params}, hidden, method='head')
    return sums_of_logits(logits, targets, weights)
  kernels = model.apply({'params': params}, method='kernels')
  loss, correct = cross_entropy.sums(hidden, kernels, targets, weights, tile, model.num_tokens,
                                     model.config.logit_cap)
  return loss, {'loss': loss, 'weight': jnp.sum(weights), 'correct': correct}


def sums_of_logits(logits, targets, weights):
  """The sums of `next_token`, of logits [..., V] and their targets and weights [...]."""
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  loss = jnp.sum(losses * weights)
  correct = jnp.sum((jax.lax.stop_gradient(logits).argmax(-1) == targets) * weights)
  return loss, {'loss': loss, 'weight': jnp.sum(weights), 'correct': correct}
