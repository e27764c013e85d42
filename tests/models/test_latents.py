"""Continuous thoughts: one forward pass for training and decoding, tied to a plain one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close

from latent_reasoning import batching, methods, sequences
from latent_reasoning.eval import decoding, leakage, one_by_one
from latent_reasoning.methods import codi as codi_lib
from latent_reasoning.models import latents
from latent_reasoning.models.transformer import Transformer
from latent_reasoning.train import losses

pytestmark = pytest.mark.usefixtures('quick_compilation')

IDS = sequences.SpecialTokens(pad=20, end=21, block_open=22, memory=23, block_close=24,
                              pause=25,
                              steps=(26, 27, 28), newline=(10,), answer=(10, 11))
EXAMPLES = [sequences.TokenizedExample([1, 2, 3], [[4, 5], [6, 7]], [8]),
            sequences.TokenizedExample([3, 1, 2, 9, 4], [[5, 5]], [9, 1])]
VOCABULARY = 32


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)],
                ids=['layers', 'scanned, projected'])
def subject(request, make):
  return make(request.param)


@pytest.fixture
def make(tiny_config, random_params):
  return lambda scanned: build(scanned, tiny_config, random_params)


def build(scanned, tiny_config, random_params):
  """A model that thinks, with rows of its last part of stage 1."""
  config = tiny_config(**{'method': 'coconut', 'baselines.parts': 3, 'baselines.latents': 2,
                          'baselines.projection': scanned, 'model.scan': scanned})
  model = Transformer(config.model, VOCABULARY, projection=scanned)
  two = batching.collate([sequences.causal([1, 2], ())], 2, 0, 0)
  return leakage.Subject(config, model, random_params(model, two), None, EXAMPLES)


def rows(subject, progress=0.7, stage=1):
  return [methods.get('coconut').sequence(e, stage, progress, subject.config, IDS)
          for e in EXAMPLES]


def values(subject, batch, rows):
  return one_by_one.by_readout(subject, batch, rows)


@pytest.mark.integration
def test_equals_one_by_one(subject):
  """Cached, batched and padded = a full pass for each thought of one row alone."""
  for progress in (0.4, 0.7):
    own = rows(subject, progress)
    p, k, r = batching.sizes(own)
    for batch in (batching.collate(own, p, k, r), batching.collate(own, p + 3, k + 1, r + 2)):
      for found, row in zip(values(subject, batch, own), own, strict=True):
        assert_close(found, one_by_one.latents_of(subject, row))


@pytest.mark.integration
def test_no_thoughts_is_the_plain_pass(subject):
  """A batch without thoughts, read by parts, has the hidden states of the whole row."""
  own = [methods.get('cot').sequence(e, 1, 0.0, subject.config, IDS) for e in EXAMPLES]
  batch = batching.collate(own, *batching.sizes(own))
  plain = latents.forward(subject.model, subject.params, batch)
  parts, _ = jax.jit(latents.forward_with_cache, static_argnums=0)(
      subject.model, subject.params, batch)
  real = np.asarray(batch.weights > 0)
  assert_close(np.asarray(parts.hidden)[real], np.asarray(plain.hidden)[real])
  last, own_last = (jax.tree.leaves(a)[-1] for a in (plain.layers.hidden, parts.layers.hidden))
  assert_close(np.asarray(own_last)[..., real, :] if own_last.ndim == 3
               else np.asarray(own_last)[-1][real],
               np.asarray(last)[..., real, :] if last.ndim == 3
               else np.asarray(last)[-1][real])


@pytest.mark.integration
def test_gradient_reaches_the_question_through_thoughts(subject):
  """Blind readouts: the answer's only way to the question is through the thoughts."""
  own = rows(subject, stage=2)
  batch = batching.collate(own, *batching.sizes(own))
  embeddings = subject.model.apply({'params': subject.params}, batch.tokens, method='embed')

  def loss(embeddings):
    hidden = latents.forward(subject.model, subject.params, batch, embeddings=embeddings).hidden
    return jnp.sum(hidden[:, batch.prefix + batch.latents]**2)
  grads = np.asarray(jax.jit(jax.grad(loss))(embeddings))
  assert np.isfinite(grads).all()
  assert (np.abs(grads[0, :3]).max(-1) > 0).all()
  thought = slice(batch.prefix, batch.prefix + batch.latents)
  assert not grads[:, thought].any()  # what stands there is not read


@pytest.mark.integration
def test_decoding_equals_a_full_pass(subject):
  """The prompt's greedy answer is the argmax of a row that holds it."""
  config = subject.config
  prompts = [methods.get('coconut').prompt(e.question, 0, config, IDS) for e in EXAMPLES]
  batch = batching.collate(prompts, *batching.sizes(prompts))
  assert batch.started and batch.latents == 4 and decoding.given(batch) == 5
  head = decoding.head_kernel(subject.model, subject.params)
  said = np.asarray(decoding.generate(
      subject.model, subject.params, head, batch, jax.random.key(0), 1.0, end=-1, pad=20,
      max_tokens=4))
  full = [dataclasses.replace(row, readouts=[dataclasses.replace(
      row.readouts[0], out=said[b, 0].tolist())]) for b, row in enumerate(prompts)]
  batch = batching.collate(full, *batching.sizes(full))
  hidden = latents.forward(subject.model, subject.params, batch).hidden
  logits = subject.model.apply({'params': subject.params}, hidden, method='head')
  at = slice(batch.prefix + batch.latents, batch.prefix + batch.latents + 4)
  np.testing.assert_array_equal(np.asarray(logits[:, at].argmax(-1)), said[:, 0])


@pytest.fixture
def one(make):
  return make(False)


evaluate = jax.jit(lambda objective, model, params, batch: objective(model, params, batch),
                   static_argnums=(0, 1))


@pytest.fixture
def codi(one):
  """The objective, and a batch of student and teacher rows of unlike lengths."""
  student = [codi_lib.student(e, 0.0, one.config, IDS) for e in EXAMPLES]
  teacher = [codi_lib.teacher(e, 0.0, one.config, IDS) for e in EXAMPLES]
  def collate(rows, more):
    return batching.collate(rows, *(n + m for n, m in zip(
        batching.sizes(rows), (more, 0, more), strict=True)))
  def make(more=0, **weights):
    batch = collate(student, more).replace(teacher=collate(teacher, more))
    return codi_lib.loss(dataclasses.replace(one.config, baselines=dataclasses.replace(
        one.config.baselines, **weights))), batch
  return make


@pytest.mark.integration
def test_codi_terms(one, codi):
  """Student, teacher and distance, each by its weight; padding changes none."""
  def value(more=0, **weights):
    objective, batch = codi(more, **weights)
    loss, sums = evaluate(objective, one.model, one.params, batch)
    return float(loss), {k: float(v) for k, v in sums.items()}
  alone, sums = value(teacher_weight=0.0, distill_weight=0.0)
  _, batch = codi()
  def plain(batch):
    return float(evaluate(losses.next_token, one.model, one.params, batch)[0])
  assert alone == pytest.approx(plain(batch), rel=1e-5)
  taught, _ = value(teacher_weight=1.0, distill_weight=0.0)
  # Each mean is over its own tokens; the sum is divided by the student's.
  assert (taught - alone) / sums['weight'] == pytest.approx(
      plain(batch.teacher) / batch.teacher.weights.sum(), rel=1e-4)
  near, _ = value(teacher_weight=0.0, distill_weight=1.0)
  assert near - alone == pytest.approx(sums['distance'], rel=1e-4) and sums['distance'] > 0
  assert value(3, teacher_weight=1.0, distill_weight=1.0)[0] == pytest.approx(
      value(teacher_weight=1.0, distill_weight=1.0)[0], rel=1e-4)


@pytest.mark.integration
def test_codi_distance_by_hand(one, codi):
  """Smooth L1 over the spread of the teacher's states, means over rows, width and L + 1 states,
  embeddings in."""
  objective, batch = codi()
  rows, entropy = {}, {}
  for name, own in (('student', batch), ('teacher', batch.teacher)):
    out = latents.forward(one.model, one.params, own)
    hidden, layers = out.hidden, out.layers.hidden
    # Both rows end in the answer, so the mark's last token is as far from their ends.
    at = [own.prefix + np.flatnonzero(np.asarray(own.weights)[b, own.prefix:])[-1]
          - len(EXAMPLES[b].answer) for b in range(len(EXAMPLES))]
    table, places = (np.asarray(one.params[k]) for k in ('embedding', 'position_embedding'))
    first = table[np.asarray(own.tokens)] + places[np.asarray(own.positions)]
    assert all(own.tokens[b, p] == IDS.answer[-1] for b, p in enumerate(at))
    states = np.stack([first, *np.asarray(layers)[:-1], hidden])
    rows[name] = np.stack([states[:, b, p] for b, p in enumerate(at)], 1).astype(np.float64)
    logits = np.asarray(hidden, np.float64) @ table.T.astype(np.float64)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    logp = np.take_along_axis(logits, np.asarray(own.targets)[..., None], -1)[..., 0]
    entropy[name] = -(logp * own.weights).sum() / own.weights.sum()
  d = np.abs(rows['student'] - rows['teacher'])
  smooth = np.where(d < 1, d**2 / 2, d - 0.5).mean((1, 2))
  expected = (smooth / rows['teacher'].std((1, 2))).mean()
  loss, sums = evaluate(objective, one.model, one.params, batch)
  assert float(sums['distance'] / sums['weight']) == pytest.approx(expected, rel=1e-4)
  total = sum(entropy.values()) + expected  # each mean over its own tokens, all weights 1
  assert float(loss / sums['weight']) == pytest.approx(total, rel=1e-4)


@pytest.mark.integration
def test_codi_compares_where_the_answer_is_predicted(one, codi):
  """The distance moves with the tokens before the answer, not with the answer."""
  objective, batch = codi(teacher_weight=0.0, distill_weight=1.0)

  def distance(batch):
    return float(evaluate(objective, one.model, one.params, batch)[1]['distance'])
  def changed(tokens, b, at):
    return np.where(np.arange(tokens.size).reshape(tokens.shape) == b * tokens.shape[1] + at,
                    tokens + 1, tokens)
  teacher, first = batch.teacher, batch.prefix + batch.latents + batch.mark
  said = [int((np.asarray(teacher.weights[b]) > 0).sum()) - len(e.answer) - 1
          for b, e in enumerate(EXAMPLES)]
  base = distance(batch)
  for b in range(2):
    before = teacher.prefix + said[b] - 1
    moved = teacher.replace(tokens=changed(teacher.tokens, b, before))
    assert abs(distance(batch.replace(teacher=moved)) - base) > 1e-4
    behind = teacher.replace(tokens=changed(teacher.tokens, b, before + 1))
    assert distance(batch.replace(teacher=behind)) == pytest.approx(base, rel=1e-6)
    assert abs(distance(batch.replace(tokens=changed(batch.tokens, b, first))) - base) > 1e-4


@pytest.mark.integration
def test_codi_teaches_the_student_alone(one, codi):
  """The distance has no gradient into the teacher's tokens."""
  objective, batch = codi(teacher_weight=0.0, distill_weight=1.0)

  def loss(params):
    return objective(one.model, params, batch)[1]['distance']
  grads = jax.jit(jax.grad(loss))(one.params)['embedding']
  only = sorted({i for e in EXAMPLES for s in e.steps for i in s}
                - {i for e in EXAMPLES for i in (*e.question, *e.answer)})
  assert only == [5, 6, 7]  # tokens that only teachers read
  assert not np.asarray(grads)[only].any() and np.asarray(grads).any()
