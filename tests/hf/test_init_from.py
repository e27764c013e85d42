"""A run that begins with another run, or an export of this package: the values are the same."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from latent_reasoning import api
from latent_reasoning.errors import InputError
from latent_reasoning.hf import export, init_from, native
from latent_reasoning.models import lora
from latent_reasoning.planning import estimate
from latent_reasoning.train import saved, trainer
from latent_reasoning.train.train_step import TrainState

pytestmark = pytest.mark.usefixtures('quick_compilation')

LORA = {'model.lora.rank': 3, 'model.lora.alpha': 6.0}
NEW = {'optim.trainable': 'new'}
MEMORY = {'imm.write_policy': 'gated'}
SLOW = functools.partial(pytest.param, marks=pytest.mark.integration)
FAST = {'eval.valid_problems': 2, 'eval.test_problems': 3, 'train.eval_every': 0}


def filled(like, seed=0):
  """Random values of these shapes, large enough that no two tokens are nearly alike."""
  rng = np.random.default_rng(seed)
  def draw(path, leaf):
    mean = 1.0 if path[-1].key == 'scale' else 0.0  # of a norm
    return jnp.asarray(rng.normal(mean, 0.5, leaf.shape), leaf.dtype)
  return jax.tree_util.tree_map_with_path(draw, like)


def save(run, seed=0, step=6):
  """A checkpoint of random weights in the run's folder; returns the parameters."""
  like = jax.eval_shape(run.fresh)
  params = filled(like.params, seed)
  state = TrainState(np.int32(step), params,
                     jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like.opt_state))
  checkpoints = run.checkpoints(writer=True)
  checkpoints.save(state, 0.5, config=dataclasses.asdict(run.config), data=run.fingerprint,
                   sources=run.sources, stage=2)
  checkpoints.wait()
  checkpoints.close()
  return params


@pytest.fixture
def source(tiny_config, make_run, tmp_path):
  """A run of random weights: source(**changes) -> (run, parameters)."""
  def make(**changes):
    run = make_run(tiny_config(**{**FAST, **changes}), tmp_path / 'source')
    return run, save(run)
  return make


@pytest.fixture
def begun(tiny_config, make_run, tmp_path):
  """A run that begins with a folder: begun(folder, **changes)."""
  def make(folder, **changes):
    config = init_from.resolve(tiny_config(**{**FAST, **changes,
                                              'model.init_from': str(folder)}))
    return make_run(config, tmp_path / f'begun{len(list(tmp_path.iterdir()))}')
  return make


def plain(run, params):
  """Merged weights by layer, tables cut to the rows that mean something."""
  flat = native.by_layer(traverse_util.flatten_dict(lora.merge(params, run.config.model.lora)))
  cut = {'embedding': np.s_[:run.tokenizer.used], 'head': np.s_[:, :run.tokenizer.used]}
  return {path: np.asarray(a, np.float32)[cut.get(path[-1], ...)] for path, a in flat.items()}


@pytest.mark.parametrize('theirs, ours', [
    ({'method': 'cot'}, {'method': 'coconut', 'baselines.projection': True}),
    SLOW({'method': 'cot'}, {'method': 'rim', **MEMORY}),
    SLOW({'method': 'cot', **LORA}, {'method': 'codi', **NEW}),
    ({'method': 'cot', **LORA, **NEW}, {'method': 'rim', **LORA, **NEW}),
    ({'method': 'cot', **LORA, **NEW}, {'method': 'icot', 'model.lora.rank': 2, **NEW}),
    ({'method': 'rim', 'model.scan': True, **LORA}, {'method': 'rim'}),
    SLOW({'method': 'rim'}, {'method': 'rim', 'model.scan': True, **LORA, **NEW}),
    SLOW({'method': 'rim', **MEMORY}, {'method': 'rim', **MEMORY, 'imm.chunk': 2}),
    SLOW({'method': 'rim', 'model.tie_embeddings': False, 'model.num_layers': 1}, {
        'method': 'rim', 'rim.max_steps': 5, **NEW}),
    ({'method': 'rim', 'rim.max_steps': 5}, {'method': 'direct'})])
@pytest.mark.parametrize('exported', [False, True])
def test_values(source, begun, theirs, ours, exported, tmp_path, capsys):
  """Every weight, LoRA within, and every row of a token that both have, in any layout."""
  run, params = source(**theirs)
  folder = run.workdir.path
  if exported:
    folder = tmp_path / 'shared'
    export.write(run.config, params, run.tokenizer, folder, None, 'native', 6)
  new = begun(folder, **ours)
  found, expected = plain(new, new.pretrained_params()), plain(run, params)
  assert found.keys() >= expected.keys()
  for path, value in expected.items():
    rows = tuple(map(min, zip(value.shape, found[path].shape, strict=True)))
    index = tuple(map(slice, rows))
    np.testing.assert_allclose(found[path][index], value[index], atol=1e-6,
                               err_msg='/'.join(path))
    if path[-1] not in ('embedding', 'head'):
      assert found[path].shape == value.shape
  assert all(np.isfinite(a).all() for a in found.values())
  err = capsys.readouterr().err
  assert f'begins with {folder} ({theirs["method"]}, step 6)' in err
  kept = theirs.get('model.lora.rank') and theirs.get('model.lora.rank') == ours.get(
      'model.lora.rank')
  assert ('LoRA is kept' in err) == bool(kept)
  assert ('LoRA is merged' in err) == bool(theirs.get('model.lora.rank') and not kept)


def test_new_rows(source, begun):
  """Tokens that the new run has more of begin near the mean of those that are known."""
  run, params = source(method='cot')
  new = begun(run.workdir.path, **{'rim.max_steps': 6, **NEW})
  assert new.tokenizer.used == run.tokenizer.used + 3
  rows = np.asarray(new.pretrained_params()['new_embedding'])
  known = np.asarray(params['embedding'])[:run.tokenizer.used]
  more = rows[run.tokenizer.used - run.tokenizer.size:]
  assert more.shape[0] == 3 and (np.abs(more - known.mean(0)) < 0.6 * known.std(0)).all()


@pytest.mark.integration
@pytest.mark.parametrize('method', ['cot', 'coconut', 'codi', 'rim'])
def test_answers_are_the_sources(source, begun, method, tmp_path):
  """At step 0 the method answers as it did, of the folder and of its export; one row each."""
  run, params = source(method=method, **{'baselines.projection': True})
  export.write(run.config, params, run.tokenizer, tmp_path / 'shared', None, 'native', 6)
  questions = ['1+2-3', '4*5+6', '7-8+9']
  expected = list(run.predictor(run.restore().state.params).texts(questions))
  assert len({text for texts in expected for text in texts}) > 1
  for folder in (run.workdir.path, tmp_path / 'shared'):
    new = begun(folder, method=method, **{'baselines.projection': True})
    assert list(new.predictor(new.pretrained_params()).texts(questions)) == expected
  loaded = api.Experiment.load(tmp_path / 'shared', tmp_path / 'loaded')
  assert loaded.config.method == method
  assert [list(answer.by_block) for answer in loaded.answer(questions)] == expected


@pytest.mark.integration
def test_coconut_trains_from_a_chain_of_thought(source, begun):
  """The first step's loss is that of the source's weights, and the run goes on by itself."""
  run, _ = source(method='cot')
  new = begun(run.workdir.path, method='coconut', **{'optim.stage1.steps': 2,
                                                     'optim.stage2.steps': 1})
  first = trainer.train(new)
  assert int(first.step) == 3
  save(run, seed=1, step=8)  # the source trains on; the new run is what it was
  assert int(trainer.train(new).step) == 3


@pytest.mark.parametrize('theirs, ours, message', [
    (MEMORY, {}, r"implicit memory of another kind.*config.imm.write_policy='gated'"),
    (MEMORY, {**MEMORY, 'imm.slots': 2}, 'config.imm.slots=0')])
def test_what_cannot_be_taken(source, begun, theirs, ours, message):
  """One line that names the keys."""
  run, _ = source(**theirs)
  with pytest.raises(InputError, match=message):
    begun(run.workdir.path, **ours)


def test_damage(source, begun, tmp_path):
  """Folders that hold less than they should: one line each, and nothing is guessed."""
  run, params = source()
  export.write(run.config, params, run.tokenizer, tmp_path / 'shared', None, 'native', 6)
  values = json.loads((tmp_path / 'shared/config.json').read_text())
  for change, message in (({'format': 9}, 'format 9 of another version'),
                          ({'config': 3}, 'another version of latent_reasoning'),
                          ({'config': {**values['config'], 'gone': 1}}, 'gone is unknown')):
    (tmp_path / 'shared/config.json').write_text(json.dumps({**values, **change}))
    with pytest.raises(InputError, match=message):
      begun(tmp_path / 'shared')
  values['config']['model']['num_layers'] = 3
  (tmp_path / 'shared/config.json').write_text(json.dumps(values))
  with pytest.raises(InputError, match='block_2/.* is missing'):
    begun(tmp_path / 'shared').pretrained_params()
  values['config']['model']['num_layers'] = 1
  (tmp_path / 'shared/config.json').write_text(json.dumps(values))
  with pytest.raises(InputError, match='block_1/.* is surplus'):
    begun(tmp_path / 'shared').pretrained_params()
  file = next((run.workdir.checkpoints / '6' / 'state').glob('ocdbt.process_0/d/*'))
  file.write_bytes(file.read_bytes()[:-7])
  with pytest.raises(InputError, match='checkpoint 6 of .* is unsound'):
    saved.parameters(run.workdir.checkpoints, True)
  shutil.rmtree(run.workdir.checkpoints)
  with pytest.raises(InputError, match='no checkpoint'):
    begun(run.workdir.path).pretrained_params()


@pytest.mark.parametrize('address', ['nowhere://x/run', 'file:///nowhere/x', 's3://a b/run'])
def test_addresses_that_are_none(address):
  with pytest.raises(InputError, match='config.model.init_from .*address|cannot be read'):
    native.find(address)


def test_an_address_of_a_run(source, begun, monkeypatch, tmp_path):
  """Its small files are copied, its checkpoints read where they are."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  run, params = source()
  new = begun(f'file://{run.workdir.path}', method='cot')
  found, expected = plain(new, new.pretrained_params()), plain(run, params)
  for path, value in expected.items():
    np.testing.assert_array_equal(found[path], value)
  assert native.find(f'file://{run.workdir.path}').path.is_relative_to(tmp_path / 'cache')


def test_plan(source, tiny_config):
  """A training that begins with a run is planned with its sizes."""
  run, _ = source(**{'model.num_layers': 1})
  config, known = estimate.resolve(tiny_config(**{'model.init_from': str(run.workdir.path)}))
  assert (config.model.num_layers, known) == (1, run.tokenizer.size)


def test_untrained_tokens(source, begun):
  """What a method reads and the source's did not."""
  run, _ = source(method='cot')
  for method, new in (('cot', []), ('direct', []), ('rim', ['<b>', '<m>', '</b>']),
                      ('pause', ['<pause>']), ('coconut', ['<b>', '</b>'])):
    other = begun(run.workdir.path, method=method)
    assert init_from.untrained(other.config, other.tokenizer) == new


@pytest.mark.integration
@pytest.mark.parametrize('same', [True, False])
def test_exports_for_others(tiny_config, make_run, make_checkpoint, begun, tmp_path, same):
  """An adapter for PEFT, and whole weights that know our tokens, where new tokens alone are
  trained; LoRA is kept or merged."""
  base = make_checkpoint(tmp_path / 'base', 'gpt2', {
      'n_layer': 2, 'n_embd': 16, 'n_head': 2, 'n_positions': 48})
  config = init_from.resolve(tiny_config(**{
      **LORA, **NEW, 'model.init_from': str(base), 'model.lora.targets': ('qkv$',)}))
  run = make_run(config, tmp_path / 'run')
  params = run.pretrained_params()
  own, frozen = lora.split(params, 'new')
  params = lora.join(filled(own), frozen)
  expected = plain(run, params)
  for kind in ('peft', 'hf'):
    export.write(run.config, params, run.tokenizer, tmp_path / kind, None, kind)
    ours = {**LORA, 'model.lora.targets': ('qkv$',)} if same else {'model.lora.rank': 1}
    new = begun(tmp_path / kind, **ours, **NEW)
    found = plain(new, new.pretrained_params())
    for path, value in expected.items():
      np.testing.assert_allclose(found[path], value, atol=1e-6, err_msg=f'{kind} {path}')
    assert init_from.untrained(new.config, new.tokenizer) == []
  other = json.loads((tmp_path / 'peft/adapter_config.json').read_text())
  (tmp_path / 'peft/adapter_config.json').write_text(json.dumps({**other, 'use_dora': True}))
  with pytest.raises(InputError, match='adapter of another program'):
    begun(tmp_path / 'peft')
  (tmp_path / 'peft/adapter_config.json').write_text(json.dumps({
      **other, 'base_model_name_or_path': '/nowhere'}))
  with pytest.raises(InputError, match="for the weights '/nowhere', which are not there"):
    begun(tmp_path / 'peft')
