"""Improved Coconut: problems of one batch are of different parts."""

import dataclasses

import jax
import numpy as np
import pytest
from close import assert_close

from latent_reasoning import batching, methods, sequences
from latent_reasoning.eval import leakage, one_by_one
from latent_reasoning.methods import coconut
from latent_reasoning.models import latents
from latent_reasoning.models.transformer import Transformer
from latent_reasoning.train import losses

pytestmark = pytest.mark.usefixtures('quick_compilation')

IDS = sequences.SpecialTokens(20, 21, 22, 23, 24, 25, (26, 27, 28), (10,), (10, 11))
EXAMPLES = [sequences.TokenizedExample([1, 2, 3], [[4, 5], [6, 7], [8, 4, 4, 4]], [8]),
            sequences.TokenizedExample([3, 1, 2, 9, 4], [[5, 5]], [9, 1])]
MIXED = {'method': 'coconut', 'baselines.mix_parts': True, 'baselines.parts': 3}


def draw_of(part: int, among: int) -> float:
  """A draw for which a problem of part `among` takes `part`."""
  return 1 - (part + 1) * (part + 1.5) / ((among + 1) * (among + 2))


def test_distribution():
  """P(i) = (i + 1) / Σ (j + 1) over i <= k; a draw of 0 is part k itself."""
  draws = (np.arange(20_000) + 0.5) / 20_000
  for part in range(6):
    taken = np.bincount([coconut.drawn(d, part) for d in draws], minlength=part + 1)
    weights = np.arange(1, part + 2)
    np.testing.assert_allclose(taken / len(draws), weights / weights.sum(), atol=1e-4)
    assert coconut.drawn(0.0, part) == part and coconut.drawn(np.nextafter(1, 0), part) == 0
    assert [coconut.drawn(draw_of(i, part), part) for i in range(part + 1)] == [
        *range(part + 1)]


def test_rows(tiny_config):
  """What is drawn in part k is the sequence of part i; stage 2 is the part behind the last."""
  on = tiny_config(**MIXED, **{'baselines.latents': 2})
  off = on.replace(**{'baselines.mix_parts': False})
  method = methods.get('coconut')
  plain = [method.sequence(EXAMPLES[0], 1, part / 3, off, IDS) for part in range(3)]
  plain.append(method.sequence(EXAMPLES[0], 2, 0.0, off, IDS))
  for part, stage, progress in ((0, 1, 0), (1, 1, 1 / 3), (2, 1, 2 / 3), (3, 2, 0.5)):
    for i in range(part + 1):
      one = dataclasses.replace(EXAMPLES[0], draw=draw_of(i, part))
      row = method.sequence(one, stage, progress, on, IDS)
      assert row.prefix == plain[i].prefix
      assert row.readouts[0] == dataclasses.replace(plain[i].readouts[0], mixed=True)
  prompt = method.prompt(EXAMPLES[0].question, 3, on, IDS)
  assert prompt == method.prompt(EXAMPLES[0].question, 3, off, IDS)


def test_batches(tiny_config, make_run, tmp_path):
  """Each step draws anew, always the same; every mixture has a bucket and a program."""
  run = make_run(tiny_config(**MIXED, **{
      'baselines.latents': 5, 'data.buckets.readout': (), 'optim.batch_size': 4,
      'optim.stage1.steps': 60, 'optim.stage2.steps': 20}), tmp_path)
  seen = [run.batches.at(step) for step in range(80)]
  jax.tree.map(np.testing.assert_array_equal, seen[50], run.batches.at(50))
  assert {int(n) for b in seen[:20] for n in b.own_latents.ravel()} == {0}
  assert {int(n) for b in seen[20:40] for n in b.own_latents.ravel()} == {0, 5}
  for part in (seen[40:60], seen[60:]):
    assert {int(n) for b in part for n in b.own_latents.ravel()} == {0, 5, 10}
  assert any(np.ptp(b.own_latents) for b in seen)
  assert all(b.latents == b.own_latents.max() for b in seen)


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)],
                ids=['layers', 'scanned, projected'])
def subject(request, tiny_config, random_params):
  config = tiny_config(**MIXED, **{'baselines.latents': 2, 'model.scan': request.param,
                                   'baselines.projection': request.param})
  model = Transformer(config.model, 32, projection=request.param)
  two = batching.collate([sequences.causal([1, 2], ())], 2, 0, 0)
  return leakage.Subject(config, model, random_params(model, two), None, EXAMPLES)


def mixed(config):
  """Rows of parts 0, 1 and 2 side by side."""
  method = methods.get('coconut')
  return [method.sequence(dataclasses.replace(e, draw=draw_of(i, 2)), 1, 0.7, config, IDS)
          for i, e in ((0, EXAMPLES[0]), (2, EXAMPLES[1]), (1, EXAMPLES[0]), (2, EXAMPLES[0]))]


@pytest.mark.integration
def test_short_rows_among_long_ones(subject):
  """A row beside one with more latents = itself alone, in a pass for each latent of its own;
  padded, too."""
  own = mixed(subject.config)
  p, k, r = batching.sizes(own)
  for batch in (batching.collate(own, p, k, r), batching.collate(own, p + 3, k + 1, r + 2)):
    assert batch.latents == 4 and batch.own_latents[:, 0].tolist() == [0, 4, 2, 4]
    for found, row in zip(one_by_one.by_readout(subject, batch, own), own, strict=True):
      assert_close(found, one_by_one.latents_of(subject, row))


@pytest.mark.integration
def test_gradients_of_short_rows(subject):
  """The gradient of a mixed batch is the sum of those of its rows alone."""
  own = mixed(subject.config)
  grad = jax.jit(jax.grad(lambda p, b: losses.next_token(subject.model, p, b)[0]))
  whole = grad(subject.params, batching.collate(own, *batching.sizes(own)))
  alone = [grad(subject.params, batching.collate([row], *batching.sizes([row])))
           for row in own]
  for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(
      jax.tree.map(lambda *a: sum(a), *alone)), strict=True):
    assert_close(one, other)


@pytest.mark.integration
def test_what_a_short_row_reads(subject):
  """Tokens behind its latents are read, of those that have as many as it they are not."""
  own = mixed(subject.config)
  batch = batching.collate(own, *batching.sizes(own))
  embeddings = subject.model.apply({'params': subject.params}, batch.tokens, method='embed')

  def loss(embeddings):
    hidden = latents.forward(subject.model, subject.params, batch, embeddings=embeddings).hidden
    return (hidden[:, batch.prefix:]**2 * (batch.weights[:, batch.prefix:, None] > 0)).sum()
  read = np.abs(np.asarray(jax.jit(jax.grad(loss))(embeddings))).max(-1)[:, batch.prefix:] > 0
  for b, row in enumerate(own):
    out = row.readouts[0]
    places = np.arange(read.shape[1])
    np.testing.assert_array_equal(
        read[b], (places >= out.latents) & (places < len(out.inputs)))
