"""Checkpoints that were copied by hand, cut off, or left half written."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from latent_reasoning.errors import InputError
from latent_reasoning.train import copied, trainer
from latent_reasoning.train.checkpoint import Checkpoints
from latent_reasoning.train.train_step import TrainState
from latent_reasoning.train.workdir import Workdir

TX = optax.scale_by_adam()


def state(step):
  params = {'table': jnp.asarray(np.random.default_rng(step).normal(size=(8, 9)), jnp.float32)}
  return TrainState(jnp.asarray(step, jnp.int32), params, TX.init(params))


def like():
  return jax.eval_shape(lambda: state(1))


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """Checkpoints of steps 1 and 2, to be copied."""
  path = tmp_path_factory.mktemp('made')
  checkpoints = Checkpoints(path / 'checkpoints', 9)
  for step in (1, 2):
    checkpoints.save(state(step))
  checkpoints.wait()
  checkpoints.close()
  return path


@pytest.fixture
def bucket(monkeypatch, tmp_path, made):
  """A copy on what orbax takes for a bucket: there a checkpoint is one by its commit file."""
  from orbax.checkpoint._src.path import gcs_utils
  monkeypatch.setattr(gcs_utils, 'is_gcs_path', lambda path: str(path).startswith(
      str(tmp_path)))
  shutil.copytree(made, tmp_path / 'run')
  return tmp_path / 'run'


def uncommit(folder):
  for file in folder.rglob(copied.COMMIT):
    file.unlink()


def opened(run, warned=None, writer=True):
  return Checkpoints(run / 'checkpoints', 9, (warned if warned is not None else []).append,
                     writer)


def test_without_the_commit_file(bucket):
  """Sealed and complete: read, all of it, by a writer; a reader changes nothing."""
  uncommit(bucket / 'checkpoints')
  reader = opened(bucket, writer=False)
  assert reader.steps() == [] and not list((bucket / 'checkpoints').rglob(copied.COMMIT))
  checkpoints = opened(bucket)
  assert checkpoints.steps() == [2, 1]
  found = checkpoints.restore(like())
  assert found.step == 2
  np.testing.assert_array_equal(found.state.params['table'], state(2).params['table'])
  checkpoints.close()
  assert opened(bucket).verify(lambda _: like()) == {2: '', 1: ''}


def test_with_the_commit_file_left_out_on_a_disk(made, tmp_path):
  """From a bucket to a disk, where the file means nothing: sound with it and without."""
  shutil.copytree(made, tmp_path / 'run')
  uncommit(tmp_path / 'run/checkpoints')
  assert opened(tmp_path / 'run').verify(lambda _: like()) == {2: '', 1: ''}


@pytest.mark.parametrize('damage', ['cut off', 'a file gone', 'empty'])
def test_sealed_and_not_complete(bucket, damage):
  """Said, not read, not touched; the one before it is used."""
  uncommit(bucket / 'checkpoints')
  place = bucket / 'checkpoints/2'
  if damage == 'empty':
    shutil.rmtree(place)
    place.mkdir()
  else:
    file = max((f for f in place.rglob('*') if f.is_file()), key=lambda f: f.stat().st_size)
    file.unlink() if damage == 'a file gone' else file.write_bytes(file.read_bytes()[:-9])
  before = sorted(place.rglob('*'))
  warned = []
  checkpoints = opened(bucket, warned)
  assert checkpoints.restore(like()).step == 1
  assert len(warned) == 1 and 'checkpoints/2 has no commit_success.txt' in warned[0]
  assert sorted(place.rglob('*')) == before


def test_neither_seal_nor_commit_file(bucket):
  """It may be a save that was killed: left alone."""
  uncommit(bucket / 'checkpoints/2')
  (bucket / 'checkpoints.seals/2.json').unlink()
  warned = []
  checkpoints = opened(bucket, warned)
  assert checkpoints.restore(like()).step == 1 and not warned
  assert not list((bucket / 'checkpoints/2').rglob(copied.COMMIT))


def test_a_seal_is_missing(bucket):
  """The hashes within say whether it is sound."""
  shutil.rmtree(bucket / 'checkpoints.seals')
  assert opened(bucket).restore(like()).step == 2
  file = max((f for f in (bucket / 'checkpoints/2').rglob('*') if f.is_file()),
             key=lambda f: f.stat().st_size)
  file.write_bytes(file.read_bytes()[:-9])
  shutil.rmtree(bucket / 'checkpoints.seals', ignore_errors=True)
  assert opened(bucket).restore(like()).step == 1


def log(path, *steps, save=100, every=250, noise=b''):
  """A folder whose log has these steps."""
  path.mkdir(parents=True, exist_ok=True)
  (path / 'config.json').write_text(json.dumps({
      'train': {'save_every': save, 'eval_every': every}}))
  (path / 'metrics.jsonl').write_bytes(noise + b''.join(
      json.dumps({'step': step, 'stage': 1, 'split': 'train'}).encode() + b'\n'
      for step in steps))
  return Workdir(path)


@pytest.mark.parametrize('steps, save, every, lost', [
    ((50,), 100, 250, False), ((50, 150), 100, 250, False), ((150, 200), 100, 250, False),
    ((150, 201), 100, 250, True), ((150, 251), 0, 250, False), ((501,), 0, 250, True),
    ((10**9,), 0, 0, False), ((151,), 100, 150, True), ((150,), 100, 150, False)])
@pytest.mark.parametrize('inside', [(), ('7.orbax-checkpoint-tmp-1',), ('100', '200')])
def test_a_log_that_says_more(tmp_path, steps, save, every, lost, inside):
  """An empty folder, temporary ones alone, or uncommitted ones: lost only where a checkpoint
  must have been complete; a run that was killed before it begins again by itself."""
  run = log(tmp_path, *steps, save=save, every=every, noise=b'{"step": true}\n[\n\xff\n')
  (tmp_path / 'checkpoints').mkdir()
  for name in inside:
    (tmp_path / 'checkpoints' / name).mkdir()
  found = run.lost_checkpoints()
  assert bool(found) == lost
  if lost:
    assert f'{max(steps):,} steps were done' in found
    assert all(name in found for name in inside)


@pytest.mark.integration
@pytest.mark.parametrize('how', ['empty', 'temporary', 'copied without seals'])
def test_training_does_not_begin_again(tiny_config, make_run, tmp_path, monkeypatch, how):
  """One sentence; neither log nor folders change."""
  config = tiny_config(**{'model.num_layers': 1, 'train.save_every': 1, 'train.eval_every': 0,
                          'optim.stage1.steps': 3, 'optim.stage2.steps': 0})
  run = make_run(config, tmp_path / 'run')
  trainer.train(run)
  before, place = run.workdir.metrics.read_bytes(), epath.Path(run.workdir.checkpoints)
  shutil.rmtree(tmp_path / 'run/checkpoints.seals')
  if how == 'copied without seals':
    from orbax.checkpoint._src.path import gcs_utils
    monkeypatch.setattr(gcs_utils, 'is_gcs_path', lambda path: 'checkpoints' in str(path))
    uncommit(tmp_path / 'run/checkpoints')
  else:
    for one in place.iterdir():
      one.rename(place / f'{one.name}.orbax-checkpoint-tmp') if how == 'temporary' else (
          one.rmtree())
  names = sorted(p.name for p in place.iterdir())
  with pytest.raises(InputError, match='says that 3 steps were done.*restart=True'):
    trainer.train(make_run(config, tmp_path / 'run'))
  assert run.workdir.metrics.read_bytes() == before
  assert sorted(p.name for p in place.iterdir()) == names


def test_orbax_still_asks_for_that_file():
  """The name is orbax's own."""
  from orbax.checkpoint._src.path import atomicity_types
  assert atomicity_types.COMMIT_SUCCESS_FILE == copied.COMMIT
