"""LOTUS: its rows part by part, and its loss against one worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close
from toy import EXAMPLES, IDS

from latent_reasoning import batching, sequences
from latent_reasoning.eval import leakage, one_by_one
from latent_reasoning.methods import lotus
from latent_reasoning.models import latents
from latent_reasoning.models.transformer import Transformer
from latent_reasoning.sequences import Loops

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture
def subject(tiny_config, random_params):
  config = tiny_config(**{'method': 'lotus', 'baselines.parts': 3, 'baselines.latents': 3,
                          'model.num_layers': 1})
  model = Transformer(config.model, 32)
  two = batching.collate([sequences.causal([1, 2], ())], 2, 0, 0)
  return leakage.Subject(config, model, random_params(model, two), None, EXAMPLES)


def test_rows_part_by_part(tiny_config):
  """n steps gone, n·c latents, n rounds; what is left is said behind </b>."""
  config = tiny_config(**{'baselines.parts': 3, 'baselines.latents': 3})
  first, second, last = (lotus.internalize(EXAMPLES[0], p, config, IDS) for p in (0, 0.4, 0.9))
  assert first.prefix == [1, 2, 3, 22] and first.loops is None and not first.labels
  assert first.readouts[0].out == sequences.chain_of_thought(
      EXAMPLES[0].steps, EXAMPLES[0].answer, IDS)
  assert second.prefix == [1, 2, 3, 22, 23, 23, 23] and second.loops == Loops(2, 4)
  assert second.labels == [4, 5, 10, -1]
  assert last.loops == Loops(3, 7)
  assert last.labels == [4, 5, 10, 6, 7, 8, 9]  # its newline has no place left
  assert last.readouts[0].out == [1, 10, 11, 8, 21] and last.readouts[0].reads == 3
  assert last == lotus.answer(EXAMPLES[0], 0.0, config, IDS)
  short = lotus.internalize(EXAMPLES[1], 0.9, config, IDS)
  assert short.labels == [5, 5, 10, -1, -1, -1, -1]
  assert short.readouts[0].out == [10, 11, 9, 1, 21]  # behind its mark
  prompt = lotus.prompt(EXAMPLES[0].question, 1, config, IDS)
  assert (prompt.prefix, prompt.loops) == (last.prefix, last.loops)
  assert [(r.start, r.reads, r.visible_until) for r in prompt.readouts] == [
      (r.start, r.reads, r.visible_until) for r in last.readouts]


@pytest.mark.parametrize('steps, labels', [
    ([], [-1] * 5), ([[1, 2, 3, 4, 5, 6]], [1, 2, 3, 4, 5]),
    ([[1, 2, 3], [7]], [1, 2, 7, 10, -1]), ([[], [7, 8]], [10, -1, 7, 8, 10])])
def test_labels(steps, labels):
  """Two latents a step: what is longer runs on until the next step begins."""
  assert lotus.labels(steps, 5, 2, IDS) == labels


@pytest.mark.integration
def test_without_rounds_and_step_loss_it_is_pause(subject, tiny_config):
  """The same tokens as a plain causal sequence."""
  config = tiny_config(**{'baselines.parts': 3, 'baselines.latents': 3, 'baselines.rounds': 0,
                          'baselines.step_weight': 0.0, 'model.num_layers': 1})
  rows = [lotus.answer(e, 0.0, config, IDS) for e in EXAMPLES]
  batch = batching.collate(rows, *batching.sizes(rows))
  total, sums = lotus.loss(config)(subject.model, subject.params, batch)
  expected = 0.0
  for row in rows:
    tokens = [*row.prefix, *row.readouts[0].inputs]
    plain = batching.collate([sequences.causal(tokens, ())], len(tokens), 0, 0)
    found = one_by_one.all_log_probabilities(subject.model, subject.params, plain)
    found = np.asarray(found)[0]
    out = row.readouts[0].out
    expected -= found[np.arange(len(tokens) - len(out), len(tokens)), out].sum()
  assert_close(float(total), float(expected))
  assert batch.loops is None and float(sums['step_loss']) > 0  # which has no weight


@pytest.mark.integration
def test_loss_by_hand(subject):
  """Both means over their own tokens, of the whole batch and of its parts."""
  config = subject.config
  rows = [lotus.answer(e, 0.0, config, IDS) for e in EXAMPLES]
  batch = batching.collate(rows, *batching.sizes(rows))
  objective = lotus.loss(config)
  total, sums = jax.jit(objective, static_argnums=0)(subject.model, subject.params, batch)
  hidden = latents.forward(subject.model, subject.params, batch).hidden
  logits = subject.model.apply({'params': subject.params}, hidden, method='head')
  logs = np.asarray(jax.nn.log_softmax(logits), np.float64)
  said = [logs[b, batch.prefix - 7 + i, label] for b, row in enumerate(rows)
          for i, label in enumerate(row.labels) if label >= 0]
  spoken = np.concatenate(one_by_one.by_readout(subject, batch, rows))
  assert len(said) == 7 + 3
  assert_close(float(total / sums['weight']), -spoken.mean() - 0.05 * np.mean(said))
  assert_close(float(sums['step_loss'] / sums['weight']), -np.mean(said))
  whole = objective.statistics(subject.model, subject.params, batch, None)
  parts = [jax.tree.map(lambda a, b=b: a[b:b + 1], batch) for b in range(2)]
  halves = [objective(subject.model, subject.params, part, None, whole, b)
            for b, part in enumerate(parts)]
  assert_close(float(sum(loss for loss, _ in halves)), float(total))
  for name in sums:
    assert_close(float(sum(s[name] for _, s in halves)), float(sums[name]))


@pytest.mark.integration
def test_gradient_reaches_every_pass(subject):
  """Of the step loss alone, by the embeddings of the first pass and of each later one."""
  config = subject.config
  rows = [lotus.answer(e, 0.0, config, IDS) for e in EXAMPLES]
  batch = batching.collate(rows, *batching.sizes(rows))
  embeddings = subject.model.apply({'params': subject.params}, batch.tokens, method='embed')

  def loss(embeddings):
    hidden = latents.forward(subject.model, subject.params, batch, embeddings=embeddings).hidden
    return jnp.sum(hidden[:, batch.prefix - 7:batch.prefix])
  size = np.asarray(jnp.abs(jax.grad(loss)(embeddings)).sum(-1))
  for b, row in enumerate(rows):
    begin = len(row.prefix) - 7
    assert (size[b, :len(row.prefix)] > 0).all() and (size[b, begin:begin + 7] > 0).all()
  assert (size[:, batch.prefix - 14:batch.prefix] > 0).all()
  assert (size[:, batch.prefix:] == 0).all()
