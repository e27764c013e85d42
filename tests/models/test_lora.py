"""LoRA and frozen parameters: nothing at first, merged = beside, frozen = untouched."""

import dataclasses

import jax
import numpy as np
import pytest
from close import assert_close
from flax import traverse_util
from llama import LLAMA

from latent_reasoning import batching, sequences
from latent_reasoning.errors import InputError
from latent_reasoning.models import lora
from latent_reasoning.models.transformer import Transformer
from latent_reasoning.train import trainer

pytestmark = pytest.mark.usefixtures('quick_compilation')

LORA = {'model.lora.rank': 3, 'model.lora.alpha': 6.0, 'optim.trainable': 'new'}
SHORT = {**LORA, 'model.num_layers': 1, 'optim.stage1.steps': 2, 'optim.stage2.steps': 2,
         'train.save_every': 2, 'eval.valid_problems': 4}
BATCH = batching.collate([sequences.causal([3, 12, 5, 14], ())] * 2, 4, 0, 0)


def flat(params):
  return traverse_util.flatten_dict(params)


@pytest.fixture(scope='module')
def logits():
  @jax.jit
  def run(params, static):
    model = static.value
    hidden = model.apply({'params': params}, BATCH.tokens, BATCH.positions, BATCH.mask).hidden
    return model.apply({'params': params}, hidden, method='head')

  @jax.tree_util.register_static
  @dataclasses.dataclass(frozen=True)
  class Static:
    value: Transformer
  return lambda model, params: run(params, Static(model))


@pytest.mark.integration
@pytest.mark.parametrize('changes', [
    {}, {'model.scan': True, 'model.tie_embeddings': False},
    LLAMA])
def test_growth(tiny_config, random_params, changes):
  """The share of what merging adds in the merged weight, by kind and layer."""
  config = tiny_config(**LORA, **changes)
  params = random_params(Transformer(config.model, 16, pretrained_vocab=11), BATCH)
  before, after = flat(params), flat(lora.merge(params, config.model.lora))
  found = lora.lora_norms(params, config.model.lora)
  assert {tuple(own) for own in found.values()} == {(0, 1)}
  def at(tree, layer):
    return (tree['blocks', 'up', 'kernel'][layer] if config.model.scan else
            tree[f'block_{layer}', 'up', 'kernel'])
  for layer in (0, 1):
    w = at(before, layer)
    share = np.linalg.norm(at(after, layer) - w) / np.linalg.norm(w)
    assert found['up'][layer] == pytest.approx(share, rel=1e-4)


@pytest.mark.parametrize('changes', [
    {}, {'model.scan': True, 'model.tie_embeddings': False},
    LLAMA])
def test_merged_is_beside(tiny_config, random_params, logits, changes):
  """A plain model with merged weights says what LoRA and rows of their own say."""
  config = tiny_config(**LORA, **changes)
  model = Transformer(config.model, 16, pretrained_vocab=11)
  params = random_params(model, BATCH)
  merged = lora.merge(params, config.model.lora)
  none = dataclasses.replace(config.model.lora, rank=0)
  plain = Transformer(dataclasses.replace(config.model, lora=none), 16)
  shapes = jax.eval_shape(plain.init, jax.random.key(0), BATCH.tokens, BATCH.positions,
                          BATCH.mask)['params']
  assert jax.tree.map(lambda a: a.shape, merged) == jax.tree.map(lambda a: a.shape, shapes)
  assert_close(logits(model, params), logits(plain, merged), tol=1e-4)
  without = {k: np.zeros_like(a) if k[-1] == 'lora_b' else a for k, a in flat(params).items()}
  assert np.abs(logits(model, traverse_util.unflatten_dict(without))
                - logits(model, params)).max() > 1e-2


@pytest.mark.integration
def test_nothing_at_first(tiny_config, logits):
  """B is zero: before the first step, LoRA changes no logit."""
  config = tiny_config(**LORA)
  model = Transformer(config.model, 16)
  params = model.init(jax.random.key(0), BATCH.tokens, BATCH.positions, BATCH.mask)['params']
  plain = {path: a for path, a in flat(params).items() if 'lora' not in path[-1]}
  none = dataclasses.replace(config.model.lora, rank=0)
  bare = Transformer(dataclasses.replace(config.model, lora=none), 16)
  np.testing.assert_array_equal(logits(model, params),
                                logits(bare, traverse_util.unflatten_dict(plain)))


def test_targets(tiny_config):
  """Only layers whose path a pattern finds are adapted."""
  config = tiny_config(**{**LORA, 'model.lora.targets': ('qkv', 'block_1/up')})
  shapes = jax.eval_shape(Transformer(config.model, 16).init, jax.random.key(0), BATCH.tokens,
                          BATCH.positions, BATCH.mask)['params']
  assert {path[:-1] for path in flat(shapes) if path[-1] == 'lora_a'} == {
      ('block_0', 'qkv'), ('block_1', 'qkv'), ('block_1', 'up')}


def test_split_and_join(tiny_config, random_params):
  """Every parameter is on one side, and comes back."""
  config = tiny_config(**LORA, **{'imm.write_policy': 'gated'})
  model = Transformer(config.model, 16, imm=config.imm, pretrained_vocab=11)
  params = random_params(model, BATCH)
  own, frozen = lora.split(params, 'new')
  assert not flat(own).keys() & flat(frozen).keys()
  assert ('new_embedding',) in flat(own) and ('embedding',) in flat(frozen)
  assert any('memory' in path for path in flat(own))
  jax.tree.map(np.testing.assert_array_equal, lora.join(own, frozen), params)
  assert lora.split(params, 'all') == (params, {})


@pytest.mark.integration
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_frozen_stay(tiny_config, make_run, tmp_path, dtype):
  """Trained through both stages, what is frozen is bit for bit what it was, of its type, and
  has no optimizer state; what is new has moved, in float32."""
  run = make_run(tiny_config(**SHORT, **{'model.frozen_dtype': dtype}), tmp_path)
  first = run.init()
  before, state = flat(jax.tree.map(np.asarray, first.params)), trainer.train(run)
  for path, value in flat(state.params).items():
    if lora.is_new(path):
      assert value.dtype == np.float32 and not np.array_equal(value, before[path])
    else:
      assert value.dtype == dtype
      np.testing.assert_array_equal(value, before[path])
  own = sum(a.size for a in jax.tree.leaves(lora.split(state.params, 'new')[0]))
  assert sum(a.size for a in jax.tree.leaves(state.opt_state)) <= 2 * own + 2
  again = run.restore().state
  jax.tree.map(np.testing.assert_array_equal, again.params, state.params)


@pytest.mark.integration
def test_memory_changes_nothing_at_first(tiny_config, random_params, logits):
  """Inserted without a norm and with g at zero, a memory leaves every logit as it was."""
  config = tiny_config(**{'imm.write_policy': 'gated', 'imm.ablate': ('norm',),
                          'imm.out_scale': 0.0,
                          'imm.layers': (1,)})
  plain = Transformer(config.model, 16)
  params = random_params(plain, BATCH)
  model = plain.clone(imm=config.imm)
  fresh = model.init(jax.random.key(0), BATCH.tokens, BATCH.positions, BATCH.mask)['params']
  with_memory = {**params, 'block_1': {**params['block_1'],
                                       'memory': fresh['block_1']['memory']}}
  np.testing.assert_array_equal(logits(model, with_memory), logits(plain, params))


@pytest.mark.parametrize('changes, message', [
    ({'model.lora.targets': ('(',)}, 'no regular expression'),
    ({'model.lora.rank': 2, 'model.lora.targets': ()}, r'targets is \(\)'),
    ({'model.lora.dropout': 1.0}, 'less than 1'),
    ({'model.frozen_dtype': 'bfloat16'}, 'nothing is frozen')])
def test_mistakes(tiny_config, changes, message):
  with pytest.raises(InputError, match=message):
    tiny_config(**changes)
