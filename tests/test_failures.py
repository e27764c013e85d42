"""What becomes of a run when something fails: each test really does it.

The long ones print the figures of the README's reliability table:
  pytest -m slow -s -n 0 tests/test_failures.py
"""

import dataclasses
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from parallel.test_multihost import CONFIG, SHORT, Group, losses, records

from latent_reasoning import main
from latent_reasoning.errors import InputError
from latent_reasoning.train import metrics, trainer, workdir
from latent_reasoning.train.checkpoint import Checkpoints

LONG = {'optim.stage1.steps': 300, 'optim.stage2.steps': 200, 'train.save_every': 5,
        'optim.stage2.optimizer': 'muon'}
KILLS, TERMS, DAMAGES = 50, 20, 100
GRACE = 30.0  # seconds that a cloud leaves a machine after SIGTERM


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('cache')


def newest(path):
  """The newest checkpoint's step and what it holds: type, shape and hash of each array."""
  folder = path / 'checkpoints'
  step = max(int(p.name) for p in folder.iterdir() if p.name.isdigit())
  return step, json.loads((folder / f'{step}/meta/metadata').read_text())['arrays']


def small(tiny_config, **changes):
  one_shape = {k: v for k, v in SHORT.items() if k.startswith('data.buckets')}
  return tiny_config(**{**one_shape, 'model.num_layers': 1, 'train.save_every': 2,
                        'train.eval_every': 0, **changes})


@pytest.mark.slow
def test_file_too_large(cache, tmp_path):
  """A write that the system refuses: one line, status 1, what was saved is kept."""
  limit = 8_000  # bytes of a file; checkpoints are larger, logs and results are not
  old = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))  # children inherit it
  try:
    group = Group(tmp_path / 'run', cache, 1)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
  assert group.statuses() == [1], group.errors()
  assert 'Traceback' not in group.errors(), group.errors()
  err = group.errors().strip().splitlines()[-1]
  assert err.startswith('error: ') and 'could not be saved' in err and 'free space' in err
  again = Group(tmp_path / 'run', cache, 1)
  assert again.statuses() == [0], again.errors()
  assert len(losses(again.path)) == 20


@pytest.mark.integration
def test_full_log(tmp_path, monkeypatch, capsys, quick_compilation):
  """No space left for metrics.jsonl is one line and status 1; nothing passes in silence."""
  if not os.path.exists('/dev/full'):
    pytest.skip('no /dev/full here')

  def full(self, *args):
    real(self, *args)
    self._file.close()
    self._file = open('/dev/full', 'a')  # noqa: SIM115
  real = metrics.Metrics.__init__
  monkeypatch.setattr(metrics.Metrics, '__init__', full)
  assert main.main(['main', f'--config={CONFIG}', f'--workdir={tmp_path}', *(
      f'--config.{k}={v}' for k, v in SHORT.items())]) == 1
  err = capsys.readouterr().err
  assert err.count('error: ') == 1 and 'No space left' in err and 'Traceback' not in err


@pytest.mark.slow
def test_full_disk(cache, tmp_path):
  """A file system of 300 KB: checkpoints fill it, and after mending training goes on."""
  disk = tmp_path / 'disk'
  disk.mkdir()
  mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=300k', 'tmpfs', str(disk)],
                           capture_output=True)
  if mounted.returncode:
    pytest.skip('only root can mount a small disk')
  try:
    many = {'train.max_to_keep': 50, 'train.save_every': 1}
    group = Group(disk / 'run', cache, 1, stderr=tmp_path / 'err', **many)
    assert group.statuses() == [1], group.errors()
    lines = group.errors().strip().splitlines()
    assert [line for line in lines if line.startswith('error: ')] == lines[-1:]
    assert 'Traceback' not in group.errors(), group.errors()
    found = [p for p in (disk / 'run/checkpoints').iterdir() if p.name.isdigit()]
    subprocess.run(['mount', '-o', 'remount,size=30m', str(disk)], check=True)
    again = Group(disk / 'run', cache, 1, stderr=tmp_path / 'again', **many)
    assert again.statuses() == [0], again.errors()
    assert found and 'resuming from step' in again.errors()
    assert len(losses(again.path)) == 20
  finally:
    subprocess.run(['umount', str(disk)], check=True)


@pytest.mark.integration
def test_unwritable(cache, tmp_path):
  """A workdir inside a file is told at the door."""
  (tmp_path / 'file').write_text('')
  group = Group(tmp_path / 'file/run', cache, 1, stderr=tmp_path / 'err')
  assert group.statuses() == [2]
  assert 'cannot use' in (tmp_path / 'err').read_text()


@pytest.mark.integration
def test_data_that_changed(tiny_config, make_run, tmp_path, quick_compilation):
  """The same paths hold other problems than when the run began: an error, nothing lost."""
  def write(name, numbers):
    lines = [json.dumps({'question': f'{a}+{b}', 'steps': [f'{a}+{b}={a + b}'],
                         'answer': str(a + b)}) for a, b in numbers]
    (tmp_path / f'{name}.jsonl').write_text('\n'.join(lines) + '\n')
  for name, start in (('train', 1), ('valid', 4), ('test', 7)):
    write(name, [(a, b) for a in range(start, start + 3) for b in range(9)])
  config = small(tiny_config, **{
      'data.name': 'files', 'data.dir': str(tmp_path), 'optim.stage2.steps': 6})
  state = trainer.train(make_run(config, tmp_path / 'run'))
  again = trainer.train(make_run(config, tmp_path / 'run'))  # unchanged: it resumes
  assert int(again.step) == int(state.step)
  write('train', [(a, b) for a in range(1, 4) for b in range(1, 9)])
  with pytest.raises(InputError, match='data changed since .*: train hold'):
    trainer.train(make_run(config, tmp_path / 'run'))
  assert newest(tmp_path / 'run')[0] == int(state.step)


@pytest.mark.integration
def test_a_machine_that_is_gone(tiny_config, make_run, tmp_path, quick_compilation):
  """A run in a bucket (here a folder) goes on elsewhere; it knows its configuration."""
  def on(machine, **changes):
    run = make_run(small(tiny_config, **changes), tmp_path / machine)
    place = workdir.Workdir(run.workdir.path, str(tmp_path / 'bucket'))
    place.pull()
    return dataclasses.replace(run, workdir=place)
  first = trainer.train(on('a'))
  assert not (tmp_path / 'a/checkpoints').exists()
  lines = (tmp_path / 'bucket/metrics.jsonl').read_text()
  shutil.rmtree(tmp_path / 'a')
  again = trainer.train(on('b'))
  assert int(again.step) == int(first.step) and len(lines) > 100
  assert (tmp_path / 'b/metrics.jsonl').read_text() == lines
  with pytest.raises(InputError, match='stage2.learning_rate: .* -> 0.5'):
    trainer.train(on('c', **{'optim.stage2.learning_rate': 0.5}))


@pytest.mark.parametrize('scheme, library, extra', [
    ('gs', 'gcsfs', 'gcs'), ('s3', 's3fs', 's3')])
def test_bucket_without_its_library(scheme, library, extra, tmp_path, capsys, monkeypatch):
  """An address needs an extra, which the error names; no folder for its copies is left."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setitem(sys.modules, library, None)
  assert main.main(['main', f'--config={CONFIG}', f'--workdir={scheme}://nowhere/run']) == 2
  error, = re.findall('error: .*', capsys.readouterr().err)
  assert f"{scheme}://nowhere/run" in error and f".[{extra}]" in error
  assert not any((tmp_path / 'runs').iterdir())


@pytest.mark.slow
def test_fifty_kills(cache, tmp_path):
  """SIGKILL at random moments, saves included: the end has the same bits."""
  began = time.monotonic()
  whole = Group(tmp_path / 'whole', cache, 1, **LONG)
  assert whole.statuses() == [0], whole.errors()
  saving, steps, done, runs = 0, [], 0, 0
  chance = random.SystemRandom()
  while done < KILLS:
    group = Group(tmp_path / f'run{runs}', cache, 1, **LONG)
    before = len(records(group.path))
    deadline = time.monotonic() + 400
    while (len(records(group.path)) <= before and done % 5  # each fifth: while it starts
           and group.processes[0].poll() is None):
      assert time.monotonic() < deadline
      time.sleep(0.01)
    # Long enough to come forward, short enough that many fit into a run.
    time.sleep(chance.uniform(0, 0.5 if done % 5 else 6.0))
    saving += bool(list((group.path / 'checkpoints').glob('*tmp*')))
    group.processes[0].kill()
    if (statuses := group.statuses()) == [-signal.SIGKILL]:
      done += 1
      steps.append(max((r['step'] for r in records(group.path)), default=0))
    else:  # it ended before: another one, for the rest
      assert statuses == [0], group.errors()
      assert newest(group.path) == newest(tmp_path / 'whole')
      runs += 1
  again = Group(tmp_path / f'run{runs}', cache, 1, **LONG)
  assert again.statuses() == [0], again.errors()
  same = newest(again.path) == newest(tmp_path / 'whole')
  print(f'\n{done} SIGKILLs, {saving} of them during a save, at steps {steps}, in {runs + 1} '
        f'runs; final parameters and optimizer state bit-identical: {same}; '
        f'{time.monotonic() - began:.0f} s')
  assert same
  assert losses(again.path) == losses(whole.path)


@pytest.mark.slow
def test_twenty_terms(cache, tmp_path):
  """SIGTERM at random moments: saved within the grace period, and the same bits."""
  whole = Group(tmp_path / 'whole', cache, 1, **LONG)
  assert whole.statuses() == [0], whole.errors()
  seconds, chance = [], random.SystemRandom()
  for _ in range(TERMS):
    group = Group(tmp_path / 'run', cache, 1, **LONG)
    before = len(records(group.path))
    while len(records(group.path)) <= before:
      assert group.processes[0].poll() is None, group.errors()
      time.sleep(0.01)
    time.sleep(chance.uniform(0, 0.3))
    began = time.monotonic()
    group.processes[0].send_signal(signal.SIGTERM)
    assert group.statuses() == [143], group.errors()
    seconds.append(time.monotonic() - began)
  again = Group(tmp_path / 'run', cache, 1, **LONG)
  assert again.statuses() == [0], again.errors()
  same = newest(tmp_path / 'run') == newest(tmp_path / 'whole')
  print(f'\n{TERMS} SIGTERMs: ended saved with status 143 after {np.median(seconds):.2f} s, at '
        f'most {max(seconds):.2f} s; final state bit-identical: {same}')
  assert same and max(seconds) < GRACE


def damage(folder, chance: random.Random) -> str:
  """Flips a bit, cuts, or removes something of a checkpoint; returns what."""
  files = sorted(p for p in folder.rglob('*') if p.is_file())
  file = chance.choice([p for p in files if p.stat().st_size])
  kind = chance.choice(('bit', 'bit', 'cut', 'file', 'item'))
  data = bytearray(file.read_bytes())
  if kind == 'bit':
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)
  elif kind == 'cut':
    file.write_bytes(data[:chance.randrange(len(data))])
  elif kind == 'file':
    file.unlink()
  else:
    shutil.rmtree(chance.choice([p for p in folder.iterdir() if p.is_dir()]))
  return kind


@pytest.mark.slow
def test_random_damage(tiny_config, make_run, tmp_path):
  """Of the newest checkpoint: always found, and the one before restored as it was."""
  run = make_run(small(tiny_config), tmp_path / 'run')
  trainer.train(run)
  step, _ = newest(tmp_path / 'run')
  arrays = json.loads((tmp_path / f'run/checkpoints/{step - 2}/meta/metadata').read_text())
  kinds, warned, recovered = [], [], 0
  for seed in range(DAMAGES):
    place = tmp_path / str(seed)
    shutil.copytree(tmp_path / 'run/checkpoints', place / 'checkpoints')
    shutil.copytree(tmp_path / 'run/checkpoints.seals', place / 'checkpoints.seals')
    kinds.append(damage(place / f'checkpoints/{step}', random.Random(seed)))
    checkpoints = Checkpoints(place / 'checkpoints', warn=warned.append)
    found = checkpoints.restore(run.like)
    checkpoints.close()
    recovered += found.step == step - 2 and found.meta['arrays'] == arrays['arrays']
    shutil.rmtree(place)
  print(f'\n{DAMAGES} random corruptions {({k: kinds.count(k) for k in sorted(set(kinds))})}: '
        f'{len(warned)} detected, {recovered} recovered from the checkpoint before')
  assert len(warned) == recovered == DAMAGES
