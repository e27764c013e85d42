"""Losses: pure functions (model, params, batch, rng) -> sums, found by name.

Each returns weighted sums, never means: sums add over microbatches, devices and
processes, and are divided once.
"""

import chex
import jax
import jax.numpy as jnp
import optax

from latent_reasoning import masks, thoughts
from latent_reasoning.config import AuxConfig, PeersConfig
from latent_reasoning.models.explicit_decoder import ExplicitDecoder, hidden_and_source
from latent_reasoning.pipeline import Batch, Told


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


def next_token(model, params, batch: Batch, rng: chex.PRNGKey | None = None):
  """Weighted next-token loss, Σ w · -log p(target): the losses L1 and L2 of RiM.

  Args:
    model: as models.gpt.GPT.
    params: its parameters.
    batch: rows.
    rng: for dropout; None: deterministic.

  Returns:
    the sum, and a dict of float32 scalar sums: 'loss', 'weight' (the divisor),
    'correct' (weight of the predictions that are right).
  """
  return _of_hidden(model, params, batch, thoughts.forward(model, params, batch, rng)[0])


def _of_hidden(model, params, batch: Batch, hidden: chex.Array):
  at, targets, weights = predictions(batch)
  hidden = jnp.take_along_axis(hidden, at[..., None], axis=1)
  logits = model.apply({'params': params}, hidden, method='head')
  return _sums(logits, targets, weights)


def codi(peers: PeersConfig):
  """CODI (arXiv 2502.21074): a student that thinks, taught by its own chain of thought.

    L = L_student + teacher · L_cot + distil · Σ_b W_b Σ_l |h_l - sg(h*_l)|_1 / (D σ_l)

  h_l and h*_l are the residual streams behind layer l of student and teacher at the token
  that predicts the answer, σ_l the spread of the teacher's over the batch, W_b the weight of
  a problem's student loss, so that the distance counts as often as its tokens do.

  Returns:
    (model, params, batch, rng) -> sums of the student's rows and 'distance'.
  """
  def objective(model, params, batch: Batch, rng: chex.PRNGKey | None = None):
    rngs = (None, None) if rng is None else jax.random.split(rng)
    hidden, layers = thoughts.forward(model, params, batch, rngs[0])
    loss, sums = _of_hidden(model, params, batch, hidden)
    hidden, traced = thoughts.forward(model, params, batch.teacher, rngs[1])
    taught, _ = _of_hidden(model, params, batch.teacher, hidden)
    own = _before_answer(layers, batch.prefix + batch.thoughts)
    # An answer is as long in both rows, the last tokens of the chain of thought.
    length = jnp.sum(batch.weights > 0, axis=1)
    total = jnp.sum(batch.teacher.weights > 0, axis=1)
    said = total - length  # tokens of the chain of thought before the answer
    place = jnp.where(said == 0, batch.teacher.anchors[:, 0], batch.teacher.prefix + said - 1)
    theirs = jax.lax.stop_gradient(_before_answer(traced, place))
    spread = jnp.std(theirs, axis=1, keepdims=True).mean(-1, keepdims=True) + 1e-6
    each = (jnp.abs(own - theirs) / spread).mean(-1).sum(0)  # over layers: [B]
    distance = jnp.sum(each * jnp.sum(batch.weights, axis=1))
    return (loss + peers.teacher * taught + peers.distil * distance,
            {**sums, 'distance': distance})
  return objective


def _before_answer(layers, place) -> chex.Array:
  """Residual streams at one position of each row, float32 [layers, B, D]."""
  layers = layers if isinstance(layers, jax.Array) else jnp.stack(layers)
  place = jnp.broadcast_to(place, layers.shape[1])
  return jnp.take_along_axis(layers, place[None, :, None, None],
                             axis=2)[:, :, 0].astype(jnp.float32)


def told(decoder: ExplicitDecoder, params, source: chex.Array, told: Told,
         rng: chex.PRNGKey | None = None):
  """The explicit decoder's loss: -log p(text | source), summed. As `next_token`.

  Args:
    decoder: with parameters `params`.
    source: [B·C, S, E], of `models.explicit_decoder.hidden_and_source`.
    told: the C texts of each row.
  """
  size, length = source.shape[:2]
  targets, weights = (a.reshape(size, -1) for a in (told.targets, told.weights))
  # The last source vector predicts the first token.
  whole = length + targets.shape[1] - 1
  tokens = jnp.pad(targets[:, :-1], ((0, 0), (length, 0)))
  places = jnp.broadcast_to(jnp.arange(whole), (size, whole))
  rngs = None if rng is None else {'dropout': rng}
  hidden = decoder.apply({'params': params}, source, tokens, places,
                         masks.plain(size, whole), rng is None, rngs=rngs)[:, length - 1:]
  logits = decoder.apply({'params': params}, hidden, method='head')
  return _sums(logits, targets, weights)


def with_told(decoder: ExplicitDecoder, kind: str, weight: float):
  """`next_token` with an explicit decoder trained jointly: its tokens' losses are added
  with a weight, and its gradient reaches the model.

  Returns:
    (model, params, batch, rng) -> sums, where params has the decoder's as 'explicit'
    and the sums tell its own loss beside the model's.
  """
  def objective(model, params, batch: Batch, rng: chex.PRNGKey | None = None):
    hidden, source = hidden_and_source(model, params, batch, kind, rng)
    loss, sums = _of_hidden(model, params, batch, hidden)
    more, own = told(decoder, params['explicit'], source, batch.told, rng)
    return loss + weight * more, {
        **sums, **{f'explicit_{name}': value for name, value in own.items()}}
  return objective


def with_aux(aux: AuxConfig):
  """`next_token` with auxiliary losses on RiM's blocks, read at the anchors of a row, the
  `</b>` of the blocks that have a readout. For a batch of B rows:

    align:  mean_b of -log softmax_c(cos(z_b, e_c) / temperature) at c = b, where z is the
            final state of the last block, e the mean embedding of the answer's tokens
            (which has no gradient), and rows with b's own answer are no negatives.
    smooth: mean over rows and inner blocks k of 1 - cos(z_k - z_{k-1}, z_{k+1} - z_k),
            0 where the states of the blocks lie on a line, 2 where they go back.

  Returns:
    (model, params, batch, rng) -> sums. Each mean counts with its weight times the total
    weight, by which the sum is divided; the sums hold it as 'aux_align' and 'aux_smooth'.
  """
  def objective(model, params, batch: Batch, rng: chex.PRNGKey | None = None):
    rngs = None if rng is None else {'dropout': rng}
    hidden, _ = model.apply({'params': params}, batch.tokens, batch.positions, batch.mask,
                            deterministic=rng is None, rngs=rngs)
    loss, sums = _of_hidden(model, params, batch, hidden)
    z = jnp.take_along_axis(hidden, batch.anchors[..., None], axis=1).astype(jnp.float32)
    for name, weight, value in (
        ('align', aux.align, lambda: _align(model, params, batch, z, aux.temperature)),
        ('smooth', aux.smooth, lambda: turning(z, batch.anchors))):
      if weight:
        sums[f'aux_{name}'] = value() * sums['weight']
        loss += weight * sums[f'aux_{name}']
    return loss, sums
  return objective


def _align(model, params, batch: Batch, z: chex.Array, temperature: float):
  last = batch.anchors.argmax(1)[:, None]  # the readout of the last block
  size, count = batch.anchors.shape
  def of_last(a):  # what its anchor predicts, and its own tokens: [B, 1 + R]
    own = a[:, batch.prefix:].reshape(size, count, -1)
    at = jnp.take_along_axis(batch.anchors, last, axis=1)
    return jnp.concatenate([jnp.take_along_axis(a, at, axis=1), jnp.take_along_axis(
        own, last[..., None], axis=1)[:, 0]], axis=1)
  targets, spoken = of_last(batch.targets), of_last(batch.weights) > 0
  spoken &= jnp.cumsum(spoken, axis=1) < spoken.sum(1, keepdims=True)  # but the end token
  texts = jnp.where(spoken, targets, -1)
  embedded = model.apply({'params': params}, targets, method='embed').astype(jnp.float32)
  means = jnp.sum(embedded * spoken[..., None], 1) / jnp.maximum(spoken.sum(1), 1)[:, None]
  states = jnp.take_along_axis(z, last[..., None], axis=1)[:, 0]
  return contrast(states, jax.lax.stop_gradient(means), texts, temperature)


def contrast(states: chex.Array, means: chex.Array, texts: chex.Array,
             temperature: float) -> chex.Array:
  """InfoNCE (van den Oord et al. 2018) of states [B, D] against means [B, D]; rows whose
  texts [B, R] are the same are no negatives of each other."""
  logits = _unit(states) @ _unit(means).T / temperature
  same = (texts[:, None] == texts[None]).all(-1) & ~jnp.eye(len(texts), dtype=bool)
  logits = jnp.where(same, -1e30, logits)
  return -jnp.diagonal(jax.nn.log_softmax(logits, axis=-1)).mean()


def turning(z: chex.Array, anchors: chex.Array) -> chex.Array:
  """Mean of 1 - cos between successive changes of states [B, K, D], over those of three
  blocks in a row; an anchor of 0 is no block. 0 where no row has three."""
  d = _unit(jnp.diff(z, axis=1))
  turn = 1 - jnp.sum(d[:, 1:] * d[:, :-1], axis=-1)
  real = anchors[:, 2:] > 0  # blocks come in order, what is no block after them
  return jnp.sum(turn * real) / jnp.maximum(real.sum(), 1)


def _unit(a: chex.Array) -> chex.Array:
  return a * jax.lax.rsqrt(jnp.sum(a * a, axis=-1, keepdims=True) + 1e-12)


def language_model(model, params, batch: Batch, rng: chex.PRNGKey | None = None):
  """Next-token loss at every position of rows of text. As `next_token`."""
  rngs = None if rng is None else {'dropout': rng}
  hidden, _ = model.apply({'params': params}, batch.tokens, batch.positions, batch.mask,
                          deterministic=rng is None, rngs=rngs)
  logits = model.apply({'params': params}, hidden, method='head')
  return _sums(logits, batch.targets, batch.weights)


def _sums(logits, targets, weights):
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  loss = jnp.sum(losses * weights)
  correct = jnp.sum((jax.lax.stop_gradient(logits).argmax(-1) == targets) * weights)
  return loss, {'loss': loss, 'weight': jnp.sum(weights), 'correct': correct}


# Each is made from the part of the configuration that weighs its terms.
OBJECTIVES = {'next_token': lambda peers: next_token,
              'language_model': lambda peers: language_model, 'codi': codi}
