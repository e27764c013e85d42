"""PCCoT: refined latents tied to CODI's one after another, and to pause."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close
from toy import EXAMPLES, IDS

from latent_reasoning import batching, sequences
from latent_reasoning.eval import leakage, one_by_one
from latent_reasoning.methods import codi, pccot
from latent_reasoning.models import latents
from latent_reasoning.models.transformer import Transformer

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture
def make(tiny_config, random_params):
  def build(**changes):
    config = tiny_config(**{'method': 'pccot', 'baselines.latents': 3, 'model.num_layers': 2,
                            **changes})
    model = Transformer(config.model, 32, projection=config.baselines.projection)
    two = batching.collate([sequences.causal([1, 2], ())], 2, 0, 0)
    return leakage.Subject(config, model, random_params(model, two), None, EXAMPLES)
  return build


def batch_of(method, config):
  rows = [method.student(e, 0.0, config, IDS) for e in EXAMPLES]
  teachers = [codi.teacher(e, 0.0, config, IDS) for e in EXAMPLES]
  batch = batching.collate(rows, *batching.sizes(rows), pad=IDS.pad)
  return rows, batch.replace(teacher=batching.collate(teachers, *batching.sizes(teachers),
                                                      pad=IDS.pad))


def answers(subject, method, config):
  """Log probabilities of the mark and the answer, problem by problem."""
  rows, batch = batch_of(method, config)
  return one_by_one.by_readout(subject, batch, rows)


def test_rows(tiny_config):
  """Latents stand in the prefix; the answer and its mark are read in the last pass."""
  config = tiny_config(**{'baselines.latents': 2, 'baselines.rounds': -1})
  row = pccot.student(EXAMPLES[0], 0.7, config, IDS)
  assert row.prefix == [1, 2, 3, 22, 23, 23]
  assert row.loops == sequences.Loops(4, 2, 'replace', shift=1)
  read, = row.readouts
  assert (read.out, read.start, read.reads, read.mark) == ([10, 11, 8, 21], 24, 4, 2)
  assert pccot.prompt(EXAMPLES[0].question, 1, config, IDS).prefix == row.prefix


@pytest.mark.integration
@pytest.mark.parametrize('projection', [False, True])
@pytest.mark.parametrize('count', [1, 3])
def test_as_many_passes_as_latents_are_codi(make, projection, count):
  """And one pass less is not, but for the last latent, whose state nothing reads."""
  subject = make(**{'baselines.projection': projection, 'baselines.latents': count})
  ours = answers(subject, pccot, subject.config.replace(**{'baselines.rounds': count}))
  for a, b in zip(ours, answers(subject, codi, subject.config), strict=True):
    assert_close(a, b)
  fewer = answers(subject, pccot, subject.config.replace(**{'baselines.rounds': count - 1}))
  assert max(np.abs(a - b).max() for a, b in zip(ours, fewer, strict=True)) > 1e-4


@pytest.mark.integration
def test_no_pass_is_pause(make):
  """The same tokens as a plain causal sequence."""
  subject = make()
  config = subject.config.replace(**{'baselines.rounds': 0})
  rows, batch = batch_of(pccot, config)
  assert batch.loops is None
  for row, found in zip(rows, one_by_one.by_readout(subject, batch, rows), strict=True):
    tokens = [*row.prefix, *row.readouts[0].inputs]
    plain = batching.collate([sequences.causal(tokens, ())], len(tokens), 0, 0)
    logs = one_by_one.all_log_probabilities(subject.model, subject.params, plain)
    logs = np.asarray(logs)[0]
    out = row.readouts[0].out
    assert_close(found, logs[np.arange(len(tokens) - len(out), len(tokens)), out])


@pytest.mark.integration
@pytest.mark.parametrize('kv_weight', [0.0, 1.0])
def test_loss_is_codis_without_the_embeddings(make, kv_weight):
  """Of the same states: as many passes as latents. CODI's own has L + 1 of them."""
  subject = make()
  config = subject.config.replace(**{'baselines.rounds': 3, 'baselines.kv_weight': kv_weight})
  losses = {}
  for name, method, objective in (('pccot', pccot, pccot.PCCOT.loss(config)),
                                  ('layers', codi, codi.loss(config, from_layer=1)),
                                  ('codi', codi, codi.loss(config))):
    _, batch = batch_of(method, config)
    losses[name], _ = objective(subject.model, subject.params, batch)
  assert_close(float(losses['pccot']), float(losses['layers']))
  assert abs(float(losses['pccot']) - float(losses['codi'])) > 1e-4


@pytest.mark.integration
def test_gradient_goes_through_every_pass(make):
  """From the answer to the dummies of the first pass, and to the question through them."""
  subject = make()
  config = subject.config.replace(**{'baselines.rounds': 2})
  rows, batch = batch_of(pccot, config)
  embeddings = subject.model.apply({'params': subject.params}, batch.tokens, method='embed')

  def loss(embeddings):
    hidden = latents.forward(subject.model, subject.params, batch, embeddings=embeddings).hidden
    return jnp.sum(hidden[:, batch.prefix:] ** 2)
  size = np.asarray(jnp.abs(jax.grad(loss)(embeddings)).sum(-1))
  for b, row in enumerate(rows):
    n = len(row.prefix)
    assert (size[b, :n - 2] > 0).all()
    # The state of dummy c is dropped, and that of c - 1 has one pass too few to reach the end.
    assert size[b, n - 1] == 0
  # What a later pass would have of tokens, states have taken the place of.
  later = (batch.loops.passes - 1) * batch.loops.size
  assert (size[:, batch.prefix - later:batch.prefix] == 0).all()


@pytest.mark.parametrize('changes, passes', [({}, 3), ({'eval.passes': 6}, 6),
                                             ({'eval.passes': 1}, 1)])
def test_asked_otherwise_than_trained(tiny_config, changes, passes):
  config = sequences.at_inference(tiny_config(**{
      'method': 'pccot', 'baselines.rounds': 2, 'eval.latents': 5, **changes}))
  row = pccot.prompt([1, 2], 1, config, IDS)
  assert row.prefix.count(23) == 5
  assert (row.loops.passes if row.loops else 1) == passes == row.readouts[0].reads
