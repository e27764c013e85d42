"""Losses: pure functions (model, params, batch, rng) -> sums, found by name.

Each returns weighted sums, never means: sums add over microbatches, devices and
processes, and are divided once.
"""

import chex
import jax
import jax.numpy as jnp
import optax

from latent_reasoning.pipeline import Batch


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
  at, targets, weights = predictions(batch)
  rngs = None if rng is None else {'dropout': rng}
  hidden, _ = model.apply({'params': params}, batch.tokens, batch.positions, batch.mask,
                          deterministic=rng is None, rngs=rngs)
  hidden = jnp.take_along_axis(hidden, at[..., None], axis=1)
  logits = model.apply({'params': params}, hidden, method='head')
  return _sums(logits, targets, weights)


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


OBJECTIVES = {'next_token': next_token, 'language_model': language_model}
