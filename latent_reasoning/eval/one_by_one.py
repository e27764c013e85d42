"""Log-probabilities of readouts, of packed rows and one sequence at a time: the reference
implementations of continuous thoughts and of several passes, that leakage checks compare with.
"""

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from latent_reasoning import batching, sequences
from latent_reasoning.batching import Batch
from latent_reasoning.models import latents
from latent_reasoning.train import losses

if TYPE_CHECKING:
  from latent_reasoning.eval.leakage import Subject


def _log_probabilities(model, params, batch: Batch):
  """Log-probabilities of the targets, [B, K + K·R], and their weights."""
  at, targets, weights = losses.predictions(batch)
  hidden = latents.forward(model, params, batch).hidden
  hidden = jnp.take_along_axis(hidden, at[..., None], axis=1)
  logits = jax.nn.log_softmax(model.apply({'params': params}, hidden, method='head'))
  return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], weights


_log_probabilities = jax.jit(_log_probabilities, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def all_log_probabilities(model, params, batch: Batch, embeddings=None):
  """Log-probabilities at every position, [B, L, V]."""
  hidden = model.apply({'params': params}, batch.tokens, batch.positions, batch.mask,
                          embeddings=embeddings).hidden
  return jax.nn.log_softmax(model.apply({'params': params}, hidden, method='head'))


def by_readout(subject: 'Subject', batch: Batch, rows, model=None) -> list[np.ndarray]:
  """Log-probabilities of each readout's tokens, over all rows in turn."""
  values, _ = _log_probabilities(model or subject.model, subject.params, batch)
  values, count = np.asarray(values), batch.anchors.shape[1]
  r = (batch.tokens.shape[1] - batch.prefix) // count
  found = []
  for b, row in enumerate(rows):
    for k, out in enumerate(row.readouts):
      own = values[b, count + k * r + out.latents:count + k * r + len(out.inputs)]
      found.append(own if out.start is not None else np.append(values[b, k], own))
  return found


@functools.partial(jax.jit, static_argnums=0)
def _next_thought(model, params, batch: Batch, embeddings, place):
  """The embeddings with a latent put after the hidden state that it is, plain forward."""
  hidden = model.apply({'params': params}, batch.tokens, batch.positions, batch.mask,
                          embeddings=embeddings).hidden
  latent = model.apply({'params': params}, hidden[:, place], method='latent_input')
  return jax.lax.dynamic_update_index_in_dim(embeddings, latent, place + 1, 1)


def latents_of(subject: 'Subject', row: sequences.PackedSequence) -> np.ndarray:
  """Log-probabilities of a row with latents: no cache, no batch, no padding, each latent
  by a pass over all of the row as one plain causal sequence."""
  model, params, out = subject.model, subject.params, row.readouts[0]
  tokens = [*row.prefix, *out.inputs]
  batch = batching.collate([sequences.causal(tokens, ())], len(tokens), 0, 0)
  embeddings = model.apply({'params': params}, batch.tokens, method='embed')
  for place in range(len(row.prefix) - 1, len(row.prefix) - 1 + out.latents):
    embeddings = _next_thought(model, params, batch, embeddings, place)
  logits = all_log_probabilities(model, params, batch, embeddings)[0]
  at = np.arange(len(tokens) - len(out.out), len(tokens))
  return np.asarray(logits)[at, np.array(out.out)]


def pass_by_pass(subject: 'Subject', row: sequences.PackedSequence) -> list[np.ndarray]:
  """Log-probabilities of the readouts of a row with several passes: no cache, no batch, no
  padding. Each pass over the end of the prefix, and each readout behind it, is a sequence
  of its own that is read whole."""
  model, params, loops, n = subject.model, subject.params, row.loops, len(row.prefix)
  begin, place = n - loops.size, np.arange(n)
  embed = functools.partial(model.apply, {'params': params}, method='embed')
  first = embed(jnp.asarray([row.prefix]))
  later = np.array(row.visible_until)
  unseen = np.zeros((2, n), int)
  if loops.block:  # blocks see each other, as far as into themselves
    ends = begin + (1 + np.arange(loops.size) // loops.block) * loops.block
    unseen[:, begin:] = later[begin:], ends
    later = np.where(place < begin, later, n)

  def read(embeddings, number, out=None):
    more = len(out.inputs) if out else 0
    behind = np.arange(n, n + more)
    vectors = [np.append(row.visible_until if number == 1 else later, behind + 1)]
    vectors += [np.append(np.zeros(n, int) if number == 1 else a, behind * 0 + edge)
                for a, edge in zip(unseen, (out.visible_until if out else 0, n), strict=True)]
    until, unseen_from, unseen_until = (jnp.asarray(a[None]) for a in vectors)
    zeros = jnp.zeros_like(until)
    hides = zeros.at[:, n:].set(out.visible_from if out else 0)
    mask = batching.Mask(zeros, hides, until, zeros[:, :0], n + more, 0, unseen_from,
                         unseen_until)
    positions = np.append(place, (out.visible_until if out else 0) + behind - n)
    if more:
      embeddings = jnp.concatenate([embeddings, embed(jnp.asarray([out.inputs]))], axis=1)
    return model.apply({'params': params}, zeros, jnp.asarray(positions[None]), mask,
                       embeddings=embeddings).hidden

  inputs = [first]
  for number in range(1, loops.passes):
    hidden = read(inputs[-1], number)[:, begin - loops.shift:n - loops.shift]
    if loops.shift:  # what stands before these tokens is read once
      hidden = hidden.at[:, 0].set(read(first, 1)[:, begin - 1])
    hidden = (hidden + first[:, begin:] if loops.mix == 'add' else
              model.apply({'params': params}, hidden, method='latent_input'))
    inputs.append(jnp.concatenate([first[:, :begin], hidden], axis=1))
  found = []
  for out in row.readouts:
    hidden = read(inputs[out.reads - 1], out.reads, out)
    logits = jax.nn.log_softmax(model.apply({'params': params}, hidden, method='head'))[0]
    at = [*range(n, n + len(out.inputs))]
    at = [out.visible_until - 1, *at] if out.start is None else at[len(at) - len(out.out):]
    found.append(np.asarray(logits)[at, np.array(out.out)])
  return found
