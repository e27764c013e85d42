"""Layers that are passed several times: identities with plain models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close

from latent_reasoning import batching, sequences
from latent_reasoning.config import LoopConfig
from latent_reasoning.errors import InputError
from latent_reasoning.models import lora, transformer
from latent_reasoning.models.transformer import Transformer
from latent_reasoning.parallel import sharding
from latent_reasoning.train import losses

pytestmark = pytest.mark.usefixtures('quick_compilation')

ROW = sequences.causal([1, 2, 3, 4], [sequences.Readout(4, [5, 6, 7]),
                                      sequences.Readout(3, [8, 9])])
BATCH = batching.collate([ROW], 6, 2, 3)
LLAMA = {'model.position_embedding': 'rotary', 'model.norm': 'rms', 'model.mlp': 'swiglu',
         'model.num_kv_heads': 1, 'model.bias': False, 'model.fused_qkv': False}


@pytest.fixture
def make(tiny_config, random_params):
  def build(**keys):
    loop = {f'model.loop.{k}': keys.pop(k) for k in ('count', 'layers', 'mix', 'norm')
            if k in keys}
    config = tiny_config(**{f'model.{k}' if '.' not in k else k: v for k, v in keys.items()},
                         **loop)
    model = Transformer(config.model, 16)
    return model, random_params(model, BATCH)
  return build


def loss(model, params):
  return losses.next_token(model, params, BATCH)[0]


def test_one_loop_is_the_plain_model(make):
  """The same parameters and program, whatever the other keys say."""
  plain, params = make()
  for keys in ({'mix': 'add', 'norm': 'final'}, {'mix': 'concat', 'layers': (1, 1)}):
    model, same = make(count=1, **keys)
    assert jax.tree.structure(same) == jax.tree.structure(params)
    assert str(jax.make_jaxpr(lambda p, m=model: loss(m, p))(params)) == str(
        jax.make_jaxpr(lambda p: loss(plain, p))(params))


@pytest.mark.integration
@pytest.mark.parametrize('keys', [
    {'num_layers': 2, 'count': 2},
    {'num_layers': 3, 'count': 3, 'layers': (1, 1), **LLAMA},
    {'num_layers': 4, 'count': 2, 'layers': (1, 2)}])
def test_equals_a_deeper_model_with_copied_weights(make, keys):
  """Values, and shared gradients are the sums of the copies'."""
  model, params = make(**keys)
  first, last = model.config.loop.layers or (0, model.config.num_layers - 1)
  again = list(range(first, last + 1)) * (model.config.loop.count - 1)
  order = [*range(last + 1), *again, *range(last + 1, model.config.num_layers)]
  config = dataclasses.replace(model.config, num_layers=len(order), loop=LoopConfig())
  deep = Transformer(config, 16)
  rest = {k: v for k, v in params.items() if not k.startswith('block_')}
  copies = {**rest, **{f'block_{n}': params[f'block_{i}'] for n, i in enumerate(order)}}
  assert model.config.depth == len(order)
  ours, grads = jax.value_and_grad(lambda p: loss(model, p))(params)
  theirs, by_copy = jax.value_and_grad(lambda p: loss(deep, p))(copies)
  assert_close(float(ours), float(theirs))
  for i in range(model.config.num_layers):
    added = jax.tree.map(lambda *a: sum(a), *(
        by_copy[f'block_{n}'] for n, j in enumerate(order) if i == j))
    jax.tree.map(lambda a, b: assert_close(np.asarray(a), np.asarray(b)),
                 grads[f'block_{i}'], added)


@pytest.mark.integration
def test_concat_begins_as_the_plain_model(make):
  """Of no loops, whatever was in the state: at [0 | I] each reads e alone."""
  model, params = make(count=3, mix='concat', norm='rms')
  made = model.init(jax.random.key(0), BATCH.tokens, BATCH.positions, BATCH.mask)['params']
  params = {**params, 'loop': made['loop']}
  plain = model.clone(config=dataclasses.replace(model.config, loop=LoopConfig()))
  rest = {k: v for k, v in params.items() if k != 'loop'}
  assert_close(float(loss(model, params)), float(loss(plain, rest)))
  grad = jax.grad(lambda p: loss(model, p))(params)['loop']
  assert float(jnp.abs(grad[:model.config.embed_dim]).sum()) > 0  # it learns to read the state
  assert lora.is_new(('loop',))  # of a frozen model it is trained, too


@pytest.mark.integration
@pytest.mark.parametrize('mix', ['add', 'replace', 'concat'])
@pytest.mark.parametrize('norm', ['', 'rms', 'final'])
def test_operator_by_hand(make, mix, norm):
  """s_1 = f(e), s_l = f(mix(e, s_(l-1))) by plain models of as many layers, scanned or not."""
  model, params = make(count=3, mix=mix, norm=norm)
  positions = params['position_embedding'][BATCH.positions]
  e = params['embedding'][BATCH.tokens] + positions
  bare = model.clone(config=dataclasses.replace(model.config, loop=LoopConfig()))

  def f(x):  # the model adds positions once more
    out = bare.apply({'params': params}, BATCH.tokens, BATCH.positions, BATCH.mask,
                     embeddings=x - positions)
    return out.layers.hidden[-1], out.hidden
  s, normed = f(e)
  for _ in range(2):
    if norm == 'final':
      s = normed
    elif norm == 'rms':
      s = s / jnp.sqrt(jnp.mean(s**2, -1, keepdims=True) + model.config.norm_epsilon)
    x = {'add': e + s, 'replace': s}.get(mix)
    x = jnp.concatenate([s, e], -1) @ params['loop'] if x is None else x
    s, normed = f(x)
  out = model.apply({'params': params}, BATCH.tokens, BATCH.positions, BATCH.mask)
  assert_close(np.asarray(out.hidden), np.asarray(normed))
  assert len(out.layers.hidden) == model.config.depth == 6
  stacked = transformer.stack_layers(params, 2)
  scanned = model.clone(config=dataclasses.replace(model.config, scan=True))
  again = scanned.apply({'params': stacked}, BATCH.tokens, BATCH.positions, BATCH.mask)
  assert_close(np.asarray(again.hidden), np.asarray(normed))
  assert again.layers.hidden.shape[0] == 6


@pytest.mark.parametrize('keys, said', [
    ({'model.loop.count': 2, 'model.loop.layers': (1, 7)}, 'layers 0 to 1'),
    ({'model.loop.count': 2, 'model.loop.layers': (1,)}, r'\(first, last\)'),
    ({'eval.loops': 3, 'model.loop.layers': (1, 0)}, r'\(first, last\)'),
    ({'model.loop.count': 2, 'model.loop.layers': (1, 1), 'model.scan': True}, 'stacks'),
    ({'model.loop.count': 2, 'imm.write_policy': 'gated'}, 'implicit memory'),
    ({'eval.loops': 2, 'model.loop.mix': 'concat'}, "'replace' or 'add'")])
def test_what_cannot_be_is_refused(tiny_config, keys, said):
  with pytest.raises(InputError, match=said):
    transformer.check(tiny_config(**keys))


def test_every_parameter_has_a_place(tiny_config):
  """The map of 'concat' among them."""
  config = tiny_config(**{'model.loop.count': 2, 'model.loop.mix': 'concat'})
  model = Transformer(config.model, 16)
  shapes = jax.eval_shape(lambda: model.init(
      jax.random.key(0), BATCH.tokens, BATCH.positions, BATCH.mask))['params']
  assert shapes['loop'].shape == (32, 16)
  assert any('loop' in rule.path and rule.when(config) for rule in sharding.TABLE)
