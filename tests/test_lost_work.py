"""What must not be lost, and what must not be mixed: locks, restarts, sources, signals."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import fsspec
import numpy as np
import pytest
from parallel.test_multihost import CONFIG, SHORT

from latent_reasoning import main
from latent_reasoning.errors import InputError
from latent_reasoning.train import metrics, trainer, workdir

ROOT = pathlib.Path(__file__).resolve().parents[1]
ONE = {'model.num_layers': 1, 'train.save_every': 2, 'train.eval_every': 0,
       'optim.stage1.steps': 4, 'optim.stage2.steps': 2}


def flags(path, **changes):
  return ['main', f'--config={CONFIG}', f'--workdir={path}',
          *(f'--config.{k}={v}' for k, v in {**SHORT, **ONE, **changes}.items())]


@pytest.fixture(scope='module')
def finished(tiny_config, make_run, tmp_path_factory):
  """A finished run to be copied, never changed."""
  path = tmp_path_factory.mktemp('finished')
  run = make_run(tiny_config(**ONE), path)
  trainer.train(run)
  return path


@pytest.fixture
def again(finished, tiny_config, make_run, tmp_path):
  """Opens a copy of the finished run: again(**changes of the configuration)."""
  def make(**changes):
    if not (tmp_path / 'run').exists():
      shutil.copytree(finished, tmp_path / 'run')
    return make_run(tiny_config(**ONE, **changes), tmp_path / 'run')
  return make


def lines(run):
  return run.workdir.metrics.read_bytes().splitlines()


@pytest.mark.integration
def test_training_does_not_begin_again_by_itself(again):
  """All checkpoints damaged: refused, also the second time; then restarted where told so,
  and what is void is kept."""
  run = again()
  before = lines(run)
  for place in run.workdir.checkpoints.iterdir():
    shutil.rmtree(place / 'state')
  for _ in range(2):
    with pytest.raises(InputError, match=r'restart=True'):
      trainer.train(again())
    assert lines(run) == before
  assert len(list((run.workdir.path / 'unsound').iterdir())) == 3
  trainer.train(again(**{'train.restart': True}))
  void = run.workdir.path / 'metrics.void.jsonl'
  assert void.read_bytes().splitlines() == before
  assert len(metrics.read(run.workdir.metrics)) >= 3
  trainer.train(again())  # there are sound ones now


@pytest.mark.integration
def test_checkpoints_that_are_gone(again):
  """The folder is missing beside a log that says steps were done."""
  run = again()
  before = lines(run)
  shutil.rmtree(run.workdir.checkpoints)
  with pytest.raises(InputError, match='this run had checkpoints .*restart=True'):
    trainer.train(again())
  shutil.rmtree(run.workdir.path / 'checkpoints.seals')
  with pytest.raises(InputError, match='says that steps were done.*restart=True'):
    trainer.train(again())
  assert lines(run) == before


@pytest.mark.integration
@pytest.mark.parametrize('damage', [b'null', b'5', b'[]', b'{}', b'{"step":"x"}', b'\xff\xfe',
                                    b'{"step": 1', b'[' * 5000, b'{"step": true}'])
def test_damaged_lines_of_a_log(again, damage):
  """They block nothing, and are kept beside."""
  run = again()
  sound = lines(run)
  run.workdir.metrics.write_bytes(b'\n'.join([sound[0], damage, *sound[1:], damage]))
  assert len(metrics.read(run.workdir.metrics)) == len(sound)
  trainer.train(again())  # done already: reads the log and goes on
  assert lines(run) == sound
  assert (run.workdir.path / 'metrics.void.jsonl').read_bytes() == 2 * (damage + b'\n')


@pytest.mark.integration
def test_a_tokenizer_belongs_to_its_checkpoint(again):
  """With a permuted vocabulary, every mode refuses and `verify` says why."""
  run = again()
  held = json.loads(run.workdir.tokenizer.read_text(encoding='utf-8'))
  vocab = held['model']['vocab']
  held['model']['vocab'] = dict(zip(vocab, np.roll(list(vocab.values()), 3).tolist(),
                                    strict=True))
  run.workdir.tokenizer.write_text(json.dumps(held), encoding='utf-8')
  with pytest.raises(InputError, match='the tokenizer of the checkpoint of step 6'):
    again().restore()
  with pytest.raises(InputError, match='the tokenizer of the checkpoint'):
    next(again().kept())
  with pytest.raises(InputError, match='the tokenizer of the checkpoint'):
    trainer.train(again())
  found = again().checkpoints().verify(run.like, again().same_sources)
  assert all('tokenizer' in wrong for wrong in found.values()) and found


@pytest.mark.integration
def test_one_writer(again, tmp_path):
  """The second one gets a line that names the first; a reader is let in; a dead writer's
  lock is free."""
  run = again()
  code = ('import pathlib, sys; from latent_reasoning.train import workdir\n'
          'with workdir.locate(sys.argv[1]).writing():\n'
          '  print("held", flush=True); sys.stdin.read()')
  with subprocess.Popen([sys.executable, '-c', code, str(run.workdir.path)], text=True,
                        stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
    assert first.stdout.readline() == 'held\n'
    with pytest.raises(InputError, match=f'being written by process {first.pid} on '):
      trainer.train(again())
    assert run.restore().step == 6
    first.kill()
  trainer.train(again())
  with run.workdir.writing(), run.workdir.writing():  # one process holds it once
    pass


def test_a_lease_in_a_bucket(monkeypatch):
  """Made only where there is none, renewed, taken from a dead writer, given back."""
  files, owner = fsspec.filesystem('memory'), {'host': 'a', 'process': 1, 'since': 'now'}
  files.makedirs('/bucket/run', exist_ok=True)
  address = 'memory://bucket/run/lock.json'
  monkeypatch.setattr(workdir, 'LEASE', 0.4)
  with workdir._lease(address, owner):
    time.sleep(0.6)  # longer than a lease: it is renewed
    with pytest.raises(InputError, match='process 1 on a since now'), workdir._lease(
        address, {**owner, 'process': 2}):
      pass
  assert not files.exists('/bucket/run/lock.json')
  for held in (json.dumps({**owner, 'until': time.time() - 1}), 'not JSON', '[]'):
    files.pipe_file('/bucket/run/lock.json', held.encode())
    with workdir._lease(address, owner):
      assert files.exists('/bucket/run/lock.json')


@pytest.mark.parametrize('error, says', [
    (RuntimeError('401 Anonymous caller'), 'RuntimeError: 401 Anonymous caller.* login'),
    (FileNotFoundError('The bucket does not exist'), 'nothing is found'),
    (ImportError('Please install it'), 'needs a library'),
    (PermissionError('no access'), 'PermissionError: no access')])
def test_a_bucket_that_cannot_be_had(error, says, monkeypatch):
  """Whatever its library raises, each its own kinds: one line that names the address."""
  def refuse(*_, **__):
    raise error
  monkeypatch.setattr(fsspec.filesystem('memory'), 'pipe_file', refuse)
  with pytest.raises(InputError, match=f"--workdir is 'memory://b/run'.*{says}"):
    with workdir._lease('memory://b/run/lock.json', {}):
      pass
  monkeypatch.setattr(workdir, '_copy', refuse)
  with pytest.raises(InputError, match=f"--workdir is 's3://b/run'.*{says}"):
    workdir.Workdir(pathlib.Path('x'), 's3://b/run').pull()


@pytest.mark.parametrize('path, message', [
    ('', '--workdir= is empty'), ('~nosuchuser/x', 'home directory of nobody'),
    ('file:///tmp/x', 'expected a path on this machine'),
    ('nowhere://b/x', "--workdir is 'nowhere://b/x'; expected .*gs://")])
def test_workdirs_that_are_none(path, message):
  with pytest.raises(InputError, match=message):
    workdir.locate(path)


def start(path, *more, changes=(), **options):
  environ = {**os.environ, 'PYTHONPATH': str(ROOT), **options.pop('env', {})}
  return subprocess.Popen(
      [sys.executable, '-m', 'latent_reasoning.main', *flags(path, **dict(changes))[1:], *more],
      env=environ, **{'stdout': subprocess.DEVNULL, 'stderr': subprocess.PIPE, **options})


LONG = {'optim.stage1.steps': 3000, 'train.log_every': 1}


def wait_for_steps(path, process):
  log = path / 'metrics.jsonl'
  while process.poll() is None and not (log.exists() and log.stat().st_size):
    time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize('number', trainer.STOP)
def test_signals_of_schedulers(number, tmp_path):
  """A closed terminal, and what schedulers send before the end: saved, 128 + n."""
  with start(tmp_path, changes=LONG) as process:
    wait_for_steps(tmp_path, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
  assert process.returncode == 128 + number, err[-2000:]
  assert b'The same command resumes' in err
  assert [p for p in (tmp_path / 'checkpoints').iterdir() if p.name.isdigit()]


@pytest.mark.slow
def test_nohup_is_respected(tmp_path):
  def ignore():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
  with start(tmp_path, preexec_fn=ignore) as process:
    wait_for_steps(tmp_path, process)
    process.send_signal(signal.SIGHUP)
    assert process.wait(120) == 0


@pytest.mark.slow
@pytest.mark.parametrize('how', ['streams closed', 'reader gone', 'ASCII', 'stdin closed'])
def test_streams_that_are_gone(how, tmp_path):
  """Training ends well, whoever stopped reading what it says."""
  options, environ = {}, {}
  if how == 'streams closed':
    options = {'preexec_fn': lambda: (os.close(1), os.close(2))}
  elif how == 'ASCII':
    environ = {'LC_ALL': 'C', 'PYTHONCOERCECLOCALE': '0', 'PYTHONUTF8': '0',
               'PYTHONIOENCODING': 'ascii'}
  elif how == 'stdin closed':
    options = {'preexec_fn': lambda: os.close(0)}
  with start(tmp_path, env=environ, stdout=subprocess.PIPE, **options) as process:
    if how == 'reader gone':
      process.stdout.close()
      process.stderr.close()
      process.stdout = process.stderr = None
    _, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  assert b'Traceback' not in (err or b'') and (tmp_path / 'results.json').exists()


@pytest.mark.slow
def test_a_workdir_that_is_removed(tmp_path):
  """One line, no traceback."""
  with start(tmp_path / 'run', changes={**LONG, 'train.save_every': 50}) as process:
    wait_for_steps(tmp_path / 'run', process)
    shutil.rmtree(tmp_path / 'run', ignore_errors=True)
    _, err = process.communicate(timeout=120)
  assert process.returncode == 1 and b'Traceback' not in err, err[-3000:]
  assert err.strip().splitlines()[-1].startswith(b'error: ')


@pytest.mark.slow
def test_two_trainings_at_once(tmp_path):
  """One trains to its end, the other one says who does."""
  both = [start(tmp_path) for _ in range(2)]
  ends = [(p.communicate(timeout=300)[1], p.returncode) for p in both]
  statuses = sorted(status for _, status in ends)
  assert statuses == [0, 2], ends
  refused = next(err for err, status in ends if status)
  assert b'is being written by process' in refused and refused.count(b'error: ') == 1
  assert (tmp_path / 'results.json').exists()


@pytest.mark.slow
def test_evaluation_beside_training(tmp_path):
  """With one checkpoint kept, and saved at every step, readers neither fail nor disturb."""
  changes = {**LONG, 'train.save_every': 1, 'train.max_to_keep': 1, 'eval.checkpoint': 'last'}
  with start(tmp_path, changes=changes) as training:
    wait_for_steps(tmp_path, training)
    while not list((tmp_path / 'checkpoints').glob('[0-9]*')):
      time.sleep(0.05)
    for _ in range(2):
      with start(tmp_path, '--mode=eval', changes=changes) as reader:
        _, err = reader.communicate(timeout=120)
      assert reader.returncode == 0, err[-3000:]
    assert training.poll() is None
    training.terminate()
    assert training.wait(120) == 143
  assert not (tmp_path / 'unsound').exists()


def test_any_error_of_a_file_is_one_line(monkeypatch, capsys, tmp_path):
  def fail(*_):
    raise OSError(116, 'Stale file handle', 'x')
  monkeypatch.setattr(main, 'launch', fail)
  assert main.main(flags(tmp_path)) == 1
  err = capsys.readouterr().err
  assert err.count('\n') == 1 and 'Stale file handle' in err
