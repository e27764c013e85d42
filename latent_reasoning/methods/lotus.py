"""LOTUS (arXiv 2606.31779): latents that are read in several passes and say the steps.

  x <b> z_1 … z_{K·c} </b> r_{K+1} … r_T y

K steps are gone and c latents stand for each. After a first pass over <b> and the latents, R
rounds add the final hidden states to their embeddings and read them again (sequences.Loops);
what comes behind sees the last pass alone. The states that it ends in say the tokens of all K
steps at once.
"""

from collections.abc import Sequence

import chex
import jax.numpy as jnp

from latent_reasoning.batching import Batch
from latent_reasoning.config import Config
from latent_reasoning.methods.icot import passed, rest
from latent_reasoning.models import latents
from latent_reasoning.sequences import (
  Loops,
  Method,
  PackedSequence,
  Readout,
  SpecialTokens,
  TokenizedExample,
  lines,
)
from latent_reasoning.train.losses import BatchLoss, of_hidden, predictions, under_head


def internalize(example: TokenizedExample, progress: float, config: Config,
                ids: SpecialTokens) -> PackedSequence:
  """Part n of stage 1: n steps are gone, n·c latents stand for them, and there are n rounds."""
  return _sequence(example, passed(progress, config.baselines.parts), config, ids)


def answer(example: TokenizedExample, progress: float, config: Config,
           ids: SpecialTokens) -> PackedSequence:
  """Stage 2: the last part. Steps beyond it are said, also at inference."""
  return _sequence(example, config.baselines.parts - 1, config, ids)


def _sequence(example: TokenizedExample, gone: int, config: Config,
              ids: SpecialTokens) -> PackedSequence:
  row = _prompt(example.question, gone, config, ids)
  read, = row.readouts
  out = rest(lines(example.steps[gone:], ids), example, config, ids)
  return PackedSequence(
      row.prefix, row.visible_until,
      [Readout(read.visible_until, out, start=read.start, reads=read.reads)], row.loops,
      labels(example.steps[:gone], len(row.prefix) - len(example.question),
             config.baselines.latents, ids) if gone else ())


def _prompt(question: Sequence[int], gone: int, config: Config,
            ids: SpecialTokens) -> PackedSequence:
  count = gone * config.baselines.latents
  tokens = [*question, ids.block_open, *[ids.memory] * count]
  rounds = gone if config.baselines.rounds < 0 else config.baselines.rounds
  loops = Loops(rounds + 1, count + 1) if rounds and count else None
  return PackedSequence(tokens, range(1, len(tokens) + 1), [
      Readout(len(tokens), start=ids.block_close, reads=loops.passes if loops else 1)], loops)


def labels(steps: Sequence[Sequence[int]], places: int, each: int,
           ids: SpecialTokens) -> list[int]:
  """What some places say, -1 for nothing: token i of step k at place (k-1)·c + i, c = each. A
  step that is longer than c goes on in the places of the next, as far as that leaves any."""
  found = [-1] * places
  for k, step in enumerate(steps):
    text = [*step, *ids.newline][:places - k * each]
    found[k * each:k * each + len(text)] = text
  return found


def prompt(question: Sequence[int], blocks: int, config: Config,
           ids: SpecialTokens) -> PackedSequence:
  """The question and all latents."""
  return _prompt(question, config.baselines.parts - 1, config, ids)


def loss(config: Config) -> BatchLoss:
  """L = CE + w · CE_steps, each a mean over its own tokens.

  CE is of the steps that are left and the answer, CE_steps of what the last pass's states say
  of those that are gone; w is baselines.step_weight. The sums have 'step_loss', times the
  weight by which sums are divided.
  """
  def labelled(batch: Batch):  # targets and weights of the last pass, [B, n], and its places
    last = slice(batch.prefix - batch.loops.size if batch.loops else 0, batch.prefix)
    rows = jnp.arange(len(batch.tokens))[:, None]
    weights = jnp.asarray(batch.weights).at[rows, batch.anchors].set(0.0)  # readouts' own
    return batch.targets[:, last], weights[:, last], last

  def statistics(model, params, batch: Batch, rng: chex.PRNGKey | None):
    return {'weight': jnp.sum(predictions(batch)[2], axis=1),
            'labels': jnp.sum(labelled(batch)[1], axis=1)}

  def terms(model, params, batch: Batch, rng, whole, first):
    hidden = latents.forward(model, params, batch, rng).hidden
    total, sums = of_hidden(model, params, batch, hidden)
    targets, weights, last = labelled(batch)
    said, _ = under_head(model, params, hidden[:, last], targets, weights)
    said *= whole['weight'].sum() / jnp.maximum(whole['labels'].sum(), 1)
    return (total + config.baselines.step_weight * said, {**sums, 'step_loss': said})
  return BatchLoss(statistics, terms)


LOTUS = Method(
    'lotus', 'LOTUS: latents are read in several passes, and say all steps at once (arXiv '
    '2606.31779).', (internalize, answer), prompt, loss, marked=True,
    parts=lambda config: config.baselines.parts, counts='baselines.latents',
    passes=lambda config: (config.baselines.rounds if config.baselines.rounds >= 0 else
                           config.baselines.parts - 1) + 1)
