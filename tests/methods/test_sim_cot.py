"""SIM-CoT: latents of Coconut and CODI also say their steps, by a decoder that answers lack."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_reasoning import batching, methods, sequences
from latent_reasoning.errors import InputError
from latent_reasoning.eval import leakage, one_by_one
from latent_reasoning.models import masks, reasoning_decoder
from latent_reasoning.models.transformer import Transformer
from latent_reasoning.train import losses

pytestmark = pytest.mark.usefixtures('quick_compilation')

IDS = sequences.SpecialTokens(20, 21, 22, 23, 24, 25, (26, 27, 28), (10,), (10, 11))
EXAMPLES = [sequences.TokenizedExample([1, 2, 3], [[4, 5], [6, 7, 7]], [8]),
            sequences.TokenizedExample([3, 1, 2, 9, 4], [[5, 5]], [9, 1])]
JOINT = {'reasoning_decoder.source': 'latents', 'reasoning_decoder.joint': True}
VOCABULARY = 32


def rows_of(config, stage=2, progress=0.0):
  method = methods.get(config.method)
  return [method.sequence(e, stage, progress, config, IDS) for e in EXAMPLES]


def batch_of(config, rows, more=0):
  """The rows with what latents should say, as Batches makes them."""
  method = methods.get(config.method)
  batch = batching.collate(rows, *(n + more for n in batching.sizes(rows)))
  texts = batching.collate_decoder_targets([
      method.decoder_targets(e, row, config, IDS)
      for e, row in zip(EXAMPLES, rows, strict=True)])
  batch = batch.replace(decoder_targets=texts.mean(method.decoder_mean, batch.weights.sum()))
  if method.teacher:
    taught = [method.teacher(e, 0.0, config, IDS) for e in EXAMPLES]
    batch = batch.replace(teacher=batching.collate(taught, *batching.sizes(taught)))
  return batch


CASES = {'coconut': {'method': 'coconut', 'baselines.parts': 3, 'baselines.latents': 2},
         'codi': {'method': 'codi', 'baselines.latents': 3, 'baselines.projection': True}}


@pytest.fixture(params=CASES)
def world(request, tiny_config, random_params):
  """(config, model, parameters with the decoder's, decoder) of a method."""
  config = tiny_config(**JOINT, **CASES[request.param])
  model = Transformer(config.model, VOCABULARY, projection=config.baselines.projection)
  batch = batch_of(config, rows_of(config))
  params = random_params(model, batch)
  decoder = reasoning_decoder.ReasoningDecoder(config.model, VOCABULARY, 1)
  own = reasoning_decoder.init(decoder, 'latents', model, params, batch, jax.random.key(0))
  return config, model, {**params, 'reasoning_decoder': own}, decoder


def test_what_is_said(tiny_config):
  """Coconut: step k out of its c latents, the answer behind the steps; CODI: step k out of
  latent k. The input of the first latent stands at the end of the prefix."""
  config = tiny_config(**CASES['coconut'])
  method = methods.get('coconut')
  def said(config, example, *moment):
    method = methods.get(config.method)
    row = method.sequence(example, *moment, config, IDS)
    return [([*t.at], [*t.text]) for t in method.decoder_targets(example, row, config, IDS)]
  assert said(config, EXAMPLES[0], 1, 0.0) == []
  assert said(config, EXAMPLES[0], 1, 0.4) == [([3, 4], [4, 5, 21])]
  assert said(config, EXAMPLES[0], 2, 0.0) == [([3, 4], [4, 5, 21]), ([5, 6], [6, 7, 7, 21])]
  assert said(config, EXAMPLES[1], 1, 0.7) == [([5, 6], [5, 5, 21]), ([7, 8], [9, 1, 21])]
  mixed = config.replace(**{'baselines.mix_parts': True})
  late = dataclasses.replace(EXAMPLES[0], draw=0.99)
  assert said(mixed, late, 2, 0.0) == []
  codi = tiny_config(**CASES['codi'])
  assert said(codi, EXAMPLES[0], 1, 0.0) == [([3], [4, 5, 21]), ([4], [6, 7, 7, 21])]
  assert method.decoder_mean == 'texts' and methods.get('codi').decoder_mean == 'tokens'


def by_hand(config, model, params, decoder, row, example):
  """-log q of each text, one sequence at a time: a plain pass for each latent, and one of the
  decoder for each token."""
  out = row.readouts[0]
  tokens = [*row.prefix, *out.inputs]
  batch = batching.collate([sequences.causal(tokens, ())], len(tokens), 0, 0)
  inputs = model.apply({'params': params}, batch.tokens, method='embed')
  first = len(row.prefix)
  for place in range(first - 1, first - 1 + out.latents):
    inputs = one_by_one._next_thought(model, params, batch, inputs, place)

  @jax.jit
  def logs(z, text):  # what follows is not seen
    length = z.shape[1] + text.shape[1]
    own = {'params': params['reasoning_decoder']}
    hidden = decoder.apply(own, z, jnp.pad(text, ((0, 0), (z.shape[1], 0))),
                           jnp.arange(length)[None], masks.plain(1, length))
    return jax.nn.log_softmax(decoder.apply(own, hidden, method='head'))[0]
  per_step = {'coconut': config.baselines.latents, 'codi': 1}[config.method]
  texts = [*example.steps, *([example.answer] * 3 if config.method == 'coconut' else [])]
  found = []
  for k in range(min(len(texts), out.latents // per_step)):
    z = inputs[:, first + k * per_step:first + (k + 1) * per_step]
    text, nll = [*texts[k], IDS.end], 0.0
    for n, token in enumerate(text):
      before = jnp.asarray([text[:n] + [0] * (4 - n)])
      nll -= float(logs(z, before)[per_step + n - 1, token])
    found.append((nll, len(text)))
  return found


@pytest.mark.integration
def test_loss_by_hand(world):
  """L = the method's own + λ · mean over texts or tokens, of padded rows."""
  config, model, params, decoder = world
  rows, method = rows_of(config), methods.get(config.method)
  batch = batch_of(config, rows, more=2)
  def value(own):
    objective = method.loss(config, own) if method.loss else own
    loss, sums = jax.jit(lambda p: objective(model, p, batch))(params)
    return float(loss / sums['weight']), sums
  plain, _ = value(losses.next_token)
  joint, sums = value(losses.with_decoder(decoder, 'latents', 0.7))
  texts = [one for row, e in zip(rows, EXAMPLES, strict=True)
           for one in by_hand(config, model, params, decoder, row, e)]
  count = {'coconut': len(texts), 'codi': sum(n for _, n in texts)}[config.method]
  assert joint - plain == pytest.approx(0.7 * sum(nll for nll, _ in texts) / count, rel=1e-4)
  assert float(sums['decoder_loss'] / sums['decoder_weight']) == pytest.approx(
      sum(nll for nll, _ in texts) / sum(n for _, n in texts), rel=1e-4)


@pytest.mark.integration
def test_gradient_reaches_latents(world):
  """What latents say trains the question's way into them, and no token behind them."""
  config, model, params, decoder = world
  batch = batch_of(config, rows_of(config))

  def said(params):
    loss, sums = losses.with_decoder(decoder, 'latents', 1.0)(model, params, batch)
    return loss - sums['loss']
  grads = jax.jit(jax.grad(said))(params)
  embedding = np.abs(np.asarray(grads['embedding'])).max(-1)
  asked = {*EXAMPLES[0].question, *EXAMPLES[1].question, IDS.block_open}
  assert (embedding[sorted(asked)] > 0).all()
  assert not embedding[sorted({*range(VOCABULARY)} - asked)].any()
  assert any(a.any() for a in jax.tree.leaves(grads['reasoning_decoder']))
  if config.baselines.projection:
    assert all(a.any() for a in jax.tree.leaves(grads['thought']))


@pytest.mark.integration
def test_inference_has_no_decoder(tiny_config, make_run, tmp_path):
  """A run builds, its batches carry texts, and answers are those without the decoder."""
  run = make_run(tiny_config(**JOINT, **CASES['coconut']), tmp_path)
  params = run.init().params
  assert 'reasoning_decoder' in params
  batch = run.batches.at(run.curriculum.total - 1)
  said = batch.decoder_targets.weights > 0
  assert batch.decoder_targets.weights.sum() == pytest.approx(
      batch.weights.sum() * said.sum() / said.any(-1).sum(), rel=1e-5)
  rest = {k: v for k, v in params.items() if k != 'reasoning_decoder'}
  rows = [run.predictor(params).row(e.question) for e in run.splits.test[:4]]
  np.testing.assert_array_equal(run.predictor(params).generate(rows),
                                run.predictor(rest).generate(rows))


@pytest.mark.integration
def test_leak_check(world, monkeypatch):
  """Sound code passes; a text that is read out of the place behind its latents is found."""
  config, model, params, _ = world
  rows, method = rows_of(config), methods.get(config.method)

  class Subject(leakage.Subject):
    special = IDS
  subject = Subject(config, model, params, None, EXAMPLES)
  assert leakage.decoder_sources(subject, rows)[0]
  assert leakage.decoder_sources in [check for _, check, *_ in leakage._checks(subject)]
  later = dataclasses.replace(method, decoder_targets=lambda e, row, *args: [
      dataclasses.replace(t, at=[a + 4 for a in t.at])
      for t in method.decoder_targets(e, row, *args)])
  monkeypatch.setitem(methods.METHODS, config.method, later)
  assert not leakage.decoder_sources(subject, rows)[0]


@pytest.mark.parametrize('changes, words', [
    ({'method': 'rim'}, 'expected one of coconut, codi'),
    ({'method': 'lotus'}, 'expected one of coconut, codi'),
    ({'method': 'codi', 'reasoning_decoder.source': 'blocks'}, 'memory blocks'),
    ({'method': 'coconut', 'imm.write_policy': 'gated'}, 'which no memory reads')])
def test_refused(tiny_config, make_run, tmp_path, changes, words):
  """A source that a method has not is refused in a line."""
  with pytest.raises(InputError, match=words) as error:
    make_run(tiny_config(**{**JOINT, **changes}), tmp_path)
  assert '\n' not in str(error.value)
