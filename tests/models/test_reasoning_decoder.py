"""The reasoning decoder: reads its source alone, and nothing flows back unless asked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close

from latent_reasoning import batching, methods, sequences
from latent_reasoning.errors import InputError
from latent_reasoning.models import masks, reasoning_decoder
from latent_reasoning.models.transformer import Transformer, stack_layers
from latent_reasoning.train import losses

pytestmark = pytest.mark.usefixtures('quick_compilation')

IDS = sequences.SpecialTokens(0, 1, 2, 3, 4, 5, (), (6,), (6, 7))


def rows(config, name):
  """Two problems of different length as a batch with what it should tell."""
  found = [sequences.TokenizedExample([8, 9, 10, 11][:n], [[12, 13], [14]], [9])
           for n in (2, 4)]
  method = methods.get(name)
  made = [method.sequence(e, 2, 0.0, config, IDS) for e in found]
  targets = [method.decoder_targets(e, row, config, IDS)
             for e, row in zip(found, made, strict=True)]
  return batching.collate(made, *batching.sizes(made)).replace(
      decoder_targets=batching.collate_decoder_targets(targets))


@pytest.fixture
def world(tiny_config, random_params):
  """Makes (config, model, params, batch, decoder, its params) of a source."""
  def make(kind, **changes):
    config = tiny_config(**{'reasoning_decoder.source': kind, **changes})
    batch = rows(config, config.method)
    model = Transformer(config.model, 16, imm=config.imm)
    params = random_params(model, batch)
    decoder = reasoning_decoder.ReasoningDecoder(config.model, 16, 1)
    own = reasoning_decoder.init(decoder, kind, model, params, batch, jax.random.key(0))
    return config, model, params, batch, decoder, own
  return make


def test_what_is_told(tiny_config):
  """Step t out of block t; without blocks, all steps out of the question's end."""
  config = tiny_config(**{'rim.blocks': 3, 'rim.block_tokens': 1})
  decoder_targets = rows(config, 'rim').decoder_targets
  assert decoder_targets.at[0].tolist() == [[2, 3, 4], [5, 6, 7]]
  assert decoder_targets.at[1].tolist() == [[4, 5, 6], [7, 8, 9]]
  assert decoder_targets.targets[0].tolist() == [[12, 13, 1, 0], [14, 1, 0, 0]]
  assert decoder_targets.weights[0].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
  decoder_targets = rows(config, 'direct').decoder_targets
  assert decoder_targets.at.tolist() == [[[1]], [[3]]]
  assert decoder_targets.targets[1, 0, :5].tolist() == [12, 13, 6, 14, 1]
  none = methods.get('direct').decoder_targets(
      sequences.TokenizedExample([8, 9], [], [9]), sequences.causal([8, 9], ()), config, IDS)
  assert none == [] and not batching.collate_decoder_targets([none]).weights.any()


@pytest.mark.integration
@pytest.mark.parametrize('kind, changes', [
    ('blocks', {'method': 'rim'}), ('memory', {'method': 'direct',
                                               'imm.write_policy': 'delta'}),
    ('memory', {'method': 'rim', 'imm.write_policy': 'gated', 'imm.linformer_rank': 3,
                'imm.rounds': 2})])
def test_reads_its_own_block(world, kind, changes):
  """A text's source is of its own positions; nothing after them can be in it."""
  _, model, params, batch, _, _ = world(kind, **changes)
  find = jax.jit(lambda b: reasoning_decoder.hidden_and_source(model, params, b, kind)[1])
  whole, count = find(batch), batch.decoder_targets.at.shape[1]
  for b in range(2):
    for c in range(count):
      if batch.decoder_targets.weights[b, c].any():
        last = int(batch.decoder_targets.at[b, c].max())
        later = np.roll(batch.tokens, 1, axis=0)  # the other row and the future differ
        later[b, :last + 1] = batch.tokens[b, :last + 1]
        found = find(batch.replace(tokens=later))[b * count + c]
        assert_close(found, whole[b * count + c])
        here = batch.tokens.copy()
        here[b, last] = 15
        assert np.abs(find(batch.replace(tokens=here))[b * count + c]
                      - whole[b * count + c]).max() > 1e-3


@pytest.mark.integration
def test_loss_is_the_text_after_the_source(world):
  """The summed loss = minus the log-probability of each text, token by token."""
  _, model, params, batch, decoder, own = world('blocks', method='rim')
  source = jax.jit(lambda b: reasoning_decoder.hidden_and_source(
      model, params, b, 'blocks')[1])(batch)
  loss, sums = jax.jit(lambda s: losses.decoder_loss(decoder, own, s,
                                                     batch.decoder_targets))(source)
  total, count = 0.0, 0
  length = source.shape[1]

  @jax.jit
  def logs(source, ids):
    hidden = decoder.apply({'params': own}, source, ids, np.arange(length + 4)[None],
                           masks.plain(1, length + 4))
    return jax.nn.log_softmax(decoder.apply({'params': own}, hidden, method='head'))
  for i, (targets, weights) in enumerate(zip(
      batch.decoder_targets.targets.reshape(len(source), -1),
      batch.decoder_targets.weights.reshape(len(source), -1), strict=True)):
    text = targets[:int(weights.sum())]
    for n, token in enumerate(text):
      ids = np.pad(text[:n], (length, 4 - n))[None]  # what follows is not seen
      total -= logs(source[i:i + 1], ids)[0, length + n - 1, token]
      count += 1
  assert_close(loss, total)
  assert sums['weight'] == count == 10


@pytest.mark.integration
@pytest.mark.parametrize('kind, changes', [
    ('blocks', {'method': 'rim'}), ('memory', {'method': 'rim', 'imm.write_policy': 'gated'})])
def test_joint_gradient(world, kind, changes):
  """Jointly trained, its gradient reaches the model; the model's own loss is unchanged."""
  _, model, params, batch, decoder, own = world(kind, **changes)
  both = {**params, 'reasoning_decoder': own}
  @jax.jit
  def grad(both, weight):
    objective = losses.with_decoder(decoder, kind, weight)
    return jax.grad(lambda p: objective(model, p, batch), has_aux=True)(both)
  zero, sums = grad(both, 0.0)
  some, more = grad(both, 1.0)
  plain, alone = jax.jit(jax.grad(lambda p: losses.next_token(model, p, batch),
                                  has_aux=True))(params)
  decoder_part = zero.pop('reasoning_decoder')
  for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(zero), strict=True):
    assert_close(one, other)
  assert not any(a.any() for a in jax.tree.leaves(decoder_part))
  assert np.abs(some['embedding'] - plain['embedding']).max() > 1e-3
  assert any(a.any() for a in jax.tree.leaves(some['reasoning_decoder']))
  assert_close(more['loss'], alone['loss'])
  assert sums['decoder_weight'] == 10


@pytest.mark.integration
def test_scanned_layers_are_the_unrolled(world):
  """What the memory read is found in the same order in scanned layers."""
  config, model, params, batch, _, _ = world('memory', method='rim',
                                             **{'imm.write_policy': 'gated'})
  scanned = model.clone(config=dataclasses.replace(config.model, scan=True))
  one, two = (jax.jit(lambda p, m=m: reasoning_decoder.hidden_and_source(
      m, p, batch, 'memory')[1])(p)
              for m, p in ((model, params), (scanned, stack_layers(params, 2))))
  assert_close(one, two)


@pytest.mark.integration
def test_too_many_positions(world):
  """A source and text longer than the position table are refused, not clamped."""
  _, _, _, _, decoder, own = world('blocks', method='rim')
  with pytest.raises(InputError, match='needs 49 positions'):
    decoder.apply({'params': own}, jnp.zeros((1, 3, 16)), jnp.zeros((1, 49), int),
                  jnp.zeros((1, 49), int), masks.plain(1, 49))
