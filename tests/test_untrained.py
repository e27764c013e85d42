"""Scoring and asking without training: weights of a run, an export, a folder or the hub."""

import dataclasses
import json
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_reasoning import api, main
from latent_reasoning.cli import evaluation
from latent_reasoning.errors import InputError
from latent_reasoning.hf import export, init_from
from latent_reasoning.train.train_step import TrainState

pytestmark = pytest.mark.usefixtures('quick_compilation')

ONE = {'model.num_layers': 1, 'eval.test_problems': 3, 'method': 'coconut',
       'baselines.projection': True, 'data.buckets.readout': (6, 24)}


@pytest.fixture(scope='module')
def source(tiny_config, make_run, tmp_path_factory):
  """A Coconut that was never trained, with a checkpoint; and its export."""
  path = tmp_path_factory.mktemp('source')
  run = make_run(tiny_config(**ONE), path / 'run')
  like, rng = jax.eval_shape(run.fresh), np.random.default_rng(0)
  params, moments = (jax.tree.map(lambda a: jnp.asarray(
      0.3 * rng.normal(size=a.shape), a.dtype), part) for part in (like.params, like.opt_state))
  checkpoints = run.checkpoints(writer=True)
  checkpoints.save(TrainState(np.int32(14), params, moments), config=dataclasses.asdict(
      run.config), data={}, sources=run.sources)
  checkpoints.wait()
  checkpoints.close()
  export.write(run.config, params, run.tokenizer, path / 'export', None, 'native', 14)
  return path


@pytest.mark.integration
@pytest.mark.parametrize('kind', ['run', 'export'])
def test_commands(source, tmp_path, capsys, kind):
  """eval and generate in a new folder, without a configuration and without training; the
  result says what it is of, and nothing of a training is there."""
  own = ['main', f'--workdir={tmp_path / "new"}', f'--config.model.init_from={source / kind}']
  assert main.main([*own, '--mode=eval']) == 0
  said = capsys.readouterr()
  assert 'not trained here' in said.out
  assert said.err.count('nothing was trained in') == 1 and 'untrained new' not in said.err
  result = json.loads((tmp_path / 'new/results.json').read_text())
  assert (result['step'], result['trained_steps'], result['checkpoint']) == (0, 0, 'init_from')
  assert result['method'] == 'coconut' and result['training']['flops'] == 0
  assert not (tmp_path / 'new/checkpoints').exists()
  assert not (tmp_path / 'new/metrics.jsonl').exists()
  (tmp_path / 'asked').write_text('"1+2-3"\n')
  assert main.main([*own, f'--questions={tmp_path / "asked"}']) == 0
  line = json.loads(capsys.readouterr().out)
  expected = api.Experiment.load(source / 'run').answer('1+2-3')
  assert line['text'] == expected.text
  assert main.main([*own, '--question=1+2-3']) == 0
  assert f'answer: {expected.answer}'.rstrip() in capsys.readouterr().out


def test_the_tokens_that_are_new(source, tiny_config, make_run, tmp_path, capsys):
  """Another method than that of the weights: its tokens are named, in one line, once."""
  config = init_from.resolve(tiny_config(**{
      **ONE, 'method': 'rim', 'model.init_from': str(source / 'export')}))
  run = make_run(config, tmp_path / 'rim')
  for _ in range(2):
    found = evaluation.restored(run)
  assert found.step == 0 and found.state.params['embedding'].shape[1] == 16
  err = capsys.readouterr().err
  assert err.count('untrained new tokens: <m>\n') == 1


def test_what_was_lost_is_not_untrained(source, tiny_config, make_run, tmp_path):
  """A run whose checkpoints are gone is not scored by the weights that it began with."""
  config = init_from.resolve(tiny_config(**{**ONE, 'model.init_from': str(source / 'export')}))
  run = make_run(config, tmp_path / 'run')
  run.workdir.metrics.write_text('{"step": 5, "stage": 1, "split": "train"}\n')
  with pytest.raises(InputError, match='steps were done, and none can be read'):
    evaluation.restored(run)
  run.workdir.checkpoints.mkdir()  # was killed before its first checkpoint
  with pytest.raises(InputError, match='there is no checkpoint'):
    evaluation.restored(run)


def test_from_the_hub(source, monkeypatch, tmp_path):
  """An export is found by a hub id, by `load` and without a configuration."""
  monkeypatch.chdir(tmp_path)
  asked = []
  monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda name, **_: (
      asked.append(name), source / 'export')[1])
  loaded = api.Experiment.load('somebody/coconut')
  assert asked and set(asked) == {'somebody/coconut'}
  assert (loaded.config.method, loaded.config.model.init_from) == (
      'coconut', 'somebody/coconut')
  assert loaded.workdir.path.parent == tmp_path / 'runs'
  parsed = main.parse(['main', '--mode=eval', '--workdir=x',
                       '--config.model.init_from=somebody/coconut'])
  assert parsed.config.method == 'coconut'


def test_load_of_others(source, tmp_path):
  """A run is opened where it lies; what is neither says so."""
  assert api.Experiment.load(source / 'run').workdir.path == source / 'run'
  with pytest.raises(InputError, match='holds no export'):
    api.Experiment.load(source / 'run', workdir=tmp_path)
  for path in (tmp_path, tmp_path / 'none', tmp_path / 'a/b'):
    with pytest.raises(InputError, match='no config.json|holds no|no directory'):
      api.Experiment.load(path)
  for values in ({'model_type': 'gpt2', 'n_layer': 1}, {'model_type': 'whatever'}, {}):
    (tmp_path / 'config.json').write_text(json.dumps(values))
    with pytest.raises(InputError, match='no experiment; give it to one.*model.init_from'):
      api.Experiment.load(tmp_path)


@pytest.mark.integration
def test_shared_without_its_data(source, tmp_path, capsys):
  """Where the data of the training are not, it can be asked, and nothing else."""
  shutil.copytree(source / 'export', tmp_path / 'export')
  values = json.loads((tmp_path / 'export/config.json').read_text())
  values['config']['data'].update(name='files', dir='/nowhere')
  (tmp_path / 'export/config.json').write_text(json.dumps(values))
  loaded = api.Experiment.load(tmp_path / 'export', tmp_path / 'asked')
  assert 'no data to compare questions with' in capsys.readouterr().err
  expected = api.Experiment.load(source / 'export', tmp_path / 'other').answer('1+2-3')
  assert loaded.answer('1+2-3') == expected
  for what in (loaded.evaluate, loaded.train, loaded.analyze):
    with pytest.raises(InputError, match='nowhere|blocks'):
      what()
  with pytest.raises(InputError, match='/nowhere'):
    api.Experiment(loaded.config, tmp_path / 'new')
