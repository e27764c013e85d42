"""Looking inside RiM's blocks: trajectories, values, attention, logit lens.

Trajectories and the probe of right and wrong answers are of the paper (arXiv 2605.30343);
probes of values after Alain and Bengio (arXiv 1610.01644), the lens after nostalgebraist
(2020). All of it reads states that `block_states.collect` gathered, or one more forward pass.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_reasoning import batching, progress
from latent_reasoning.analysis import answer_selection, block_states
from latent_reasoning.analysis.block_states import BlockActivations
from latent_reasoning.data.example import Example
from latent_reasoning.eval.evaluator import Predictor
from latent_reasoning.models import attention as attention_lib
from latent_reasoning.models import layers as layers_lib
from latent_reasoning.parallel import sharding
from latent_reasoning.report import block_plots, percent, table
from latent_reasoning.report.result import Result

CLASSES = 100  # most values that a probe tells apart; rarer ones count as wrong
LOOKED_AT = 256  # problems whose attention is averaged


def curvature(states: np.ndarray) -> np.ndarray:
  """Cosine between one change from block to block and the next: [N, K, D] -> [N, K - 2].

  1 is a straight line, 0 a right angle, -1 a way back.
  """
  d = np.diff(states, axis=1)
  unit = d / np.maximum(np.linalg.norm(d, axis=-1, keepdims=True), 1e-12)
  return (unit[:, 1:] * unit[:, :-1]).sum(-1)


def trajectories(seen: Sequence[BlockActivations]) -> dict[str, Any]:
  """Final states by block on two principal axes of the last of several checkpoints.

  Returns:
    {'explained': shares of the variance, 'points': [N, K, 2] and 'turns', the mean cosine
    at each inner block, of the last checkpoint, 'means': [checkpoints, K, 2]}.
  """
  last = seen[-1].states[:, :, -1]
  axes = answer_selection.sklearn('decomposition').PCA(2, svd_solver='full').fit(
      last.reshape(-1, last.shape[-1]))
  return {'explained': axes.explained_variance_ratio_.tolist(),
          'turns': curvature(last).mean(0).tolist(),
          'points': axes.transform(last.reshape(-1, last.shape[-1])).reshape(
              *last.shape[:2], -1),
          'means': np.stack([axes.transform(s.states[:, :, -1].mean(0)) for s in seen])}


def value_probes(valid: BlockActivations, test: BlockActivations | None = None) -> Result:
  """How often a linear probe reads the result of each true step off a block's state.

  Args:
    valid: of the problems that it is trained on, values as classes.
    test: of those that it is scored on; None: half of `valid`, which trains on the other.

  Returns:
    {'accuracy': [S, K, layers + 1], 'commonest': [S], the share of the commonest value};
    NaN for a step that too few problems have.
  """
  if test is None:
    valid, test = valid.halves()
  steps, (_, count, depth, _) = valid.values.shape[1], valid.states.shape
  accuracy = np.full((steps, count, depth), np.nan)
  commonest = np.full(steps, np.nan)
  steps = min(steps, test.values.shape[1])
  for s in progress.track(range(steps), f'{count * depth} linear probes for each of {steps} '
                          'steps', steps):
    here, there = ~np.isnan(valid.values[:, s]), ~np.isnan(test.values[:, s])
    values, counts = np.unique(valid.values[here, s], return_counts=True)
    here &= np.isin(valid.values[:, s], values[np.argsort(-counts, kind='stable')[:CLASSES]])
    if len(values) < 2 or not there.any():
      continue
    truth = test.values[there, s]
    commonest[s] = (truth == values[counts.argmax()]).mean()
    for k in range(count):
      for layer in range(depth):
        probe = answer_selection.fit(valid.states[here, k, layer], valid.values[here, s])
        guess = probe.predict(test.states[there, k, layer])
        accuracy[s, k, layer] = (guess == truth).mean()
  return Result({'accuracy': accuracy, 'commonest': commonest}, functools.partial(
      _table, accuracy, commonest, len(valid.states), len(test.states)), block_plots.probes)


def _table(accuracy: np.ndarray, commonest: np.ndarray, fitted: int, scored: int) -> str:
  rows = [['step', 'commonest value %', *(f'block {k + 1}' for k in range(accuracy.shape[1]))]]
  rows += [[str(s + 1), percent(common), *(percent(np.nanmax(one)) if not np.isnan(one).all()
                                           else '' for one in shares)]
           for s, (shares, common) in enumerate(zip(accuracy, commonest, strict=True))]
  return (f'{table(rows)}\n\n% of {scored:,} problems in which a linear probe of the state at '
          f'the end of a block, fitted on {fitted:,} others, reads the result of a step; the '
          'best of all layers')


def lens(predictor: Predictor, seen: BlockActivations) -> dict[str, np.ndarray]:
  """The head applied to every layer's state at `</b>`: how often its top token begins
  the true next step, and the true answer: [K, layers + 1] each."""
  top = np.asarray(sharding.by_rows(
      functools.partial(_lens, predictor.model, predictor.params), predictor.params,
      seen.states))
  return {'next step': (top == seen.next_token[:, :, None]).mean(0),
          'answer': (top == seen.answer_token[:, None, None]).mean(0)}


@functools.partial(jax.jit, static_argnums=0)
def _lens(model, params, states):
  def read(module, layer):  # the last entry is normed already
    return module.head(jnp.concatenate([module.norm(layer[..., :-1, :]), layer[..., -1:, :]],
                                       axis=-2).astype(model.config.dtype)).argmax(-1)
  return sharding.map_rows(lambda one: model.apply({'params': params}, one, method=read),
                           jnp.asarray(states))


def attention(predictor: Predictor, examples: Sequence[Example]) -> dict[str, Any]:
  """Where blocks and readouts look, means over heads and over problems of the commonest
  question length, at most LOOKED_AT.

  Returns:
    {'n', 'tokens' of the first such question, 'question': [layers, K, Q] from `</b>` of
    block k to each token of the question, 'blocks': [layers, K, K] from there to all tokens
    of block j, 'readouts': [layers, K, K + 2] from the first token that a readout says to
    the question, to each block, and to itself}.
  """
  block_states.require(predictor.config)
  lengths = [len(predictor.row(e.question).prefix) for e in examples]
  common = max(set(lengths), key=lengths.count)
  examples = [e for e, n in zip(examples, lengths, strict=True) if n == common][:LOOKED_AT]
  wide, found = predictor.config.rim.block_length, []
  for _, rows in block_states.parts(predictor, examples):
    said = np.asarray(predictor.generate(
        block_states.fill(rows, predictor.config.eval.batch_size)))
    # The pad makes one input of every readout, also of one that ends at once.
    spoken = [dataclasses.replace(row, readouts=[
        dataclasses.replace(out, out=[tokens[0], predictor.special.pad])
        for out, tokens in zip(row.readouts, own, strict=True)])
        for row, own in zip(rows, said.tolist(), strict=False)]
    batch = batching.collate(spoken, common, predictor.blocks, 1)
    found.append(sharding.by_rows(
        lambda batch: _look(predictor.model, predictor.params, batch, wide),
        predictor.params, batch))
  question, between, readouts = (np.concatenate(parts).mean(0)
                                 for parts in zip(*found, strict=True))
  tokens = predictor.row(examples[0].question).prefix[:question.shape[-1]]
  return {'n': len(examples), 'tokens': [predictor.tokenizer.decode([t]) for t in tokens],
          'question': question, 'blocks': between, 'readouts': readouts}


@functools.partial(jax.jit, static_argnums=(0, 3))
def _look(model, params, batch: batching.Batch, wide: int):
  count, p = batch.anchors.shape[1], batch.prefix
  question = p - wide * count
  ends = question + wide * jnp.arange(1, count + 1) - 1

  def one(row):  # by row, or the weights of a large model would not fit into memory
    row = jax.tree.map(lambda a: a[None], row)
    layers = model.apply({'params': params}, row.tokens, row.positions, row.mask).layers
    mask = row.mask.replace(positions=row.positions, key_positions=row.positions)
    own = layers_lib.own(model.config)
    w = jnp.stack([
        attention_lib.weights(q, k, mask.replace(window=own.layer(i).window),
                              model.config.attention_cap)[0].mean(0)
        for q, k, i in zip(layers.queries, layers.keys, model.config.order,
                           strict=True)])  # [layers, L, L]
    to_question = w[..., :question]
    to_blocks = w[..., question:p].reshape(*w.shape[:2], count, wide).sum(-1)
    readouts = jnp.concatenate([to_question.sum(-1, keepdims=True), to_blocks,
                                w[..., p:].sum(-1, keepdims=True)], axis=-1)[:, p:]
    return to_question[:, ends], to_blocks[:, ends], readouts
  return sharding.map_rows(one, jax.tree.map(jnp.asarray, batch))
