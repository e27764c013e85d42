"""Processes that train one model: two real ones over loopback, and what becomes of losses."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import conftest
import pytest
from llama import LLAMA

from latent_reasoning import main
from latent_reasoning.errors import InputError
from latent_reasoning.parallel import multihost
from latent_reasoning.train import metrics

CONFIG = pathlib.Path(__file__).resolve().parents[2] / 'configs/rim_arithmetic.py'
ONE_SHAPE = {**conftest.TINY, 'data.buckets.prefix': (20,), 'data.buckets.readout': (6,),
             'data.buckets.count': (3,)}
SHORT = {**ONE_SHAPE, 'model.num_layers': 1, 'optim.stage1.dropout': 0.1,
         'optim.stage2.dropout': 0.1, 'optim.stage1.steps': 10, 'optim.stage2.steps': 10,
         'train.log_every': 1, 'train.save_every': 4, 'train.eval_every': 0,
         'train.peer_timeout': 120, 'eval.contamination': False, 'tokenizer.pad_to': 8}
RUNS = {
    'rim': {'model.num_layers': 2},
    'gated': {'model.num_layers': 2, 'imm.write_policy': 'gated', 'imm.linformer_rank': 4,
              'imm.slots': 3},
    'llama': {**LLAMA,
              'model.num_kv_heads': 2, 'model.tie_embeddings': False, 'model.lora.rank': 4,
              'model.lora.dropout': 0.1, 'optim.trainable': 'new'}}
MAIN = '''
import sys
from latent_reasoning import main
from latent_reasoning.parallel import multihost
multihost.finish(main.main(['main', *sys.argv[1:]]))
'''
FSDP = {'mesh.data': 1, 'mesh.fsdp': -1}


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('cache')


class Group:
  """Some processes of one command; stderr of each is in a file beside the workdir.

  `before` is Python that each runs before `main`, `process` being its index.
  """

  def __init__(self, path, cache, count=2, mode='train', stderr=None, before='', **changes):
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      port = free.getsockname()[1]
    env = {**os.environ, 'LATENT_REASONING_KEEP_ALLOCATOR': '1', 'JAX_PLATFORMS': 'cpu',
           'JAX_COMPILATION_CACHE_DIR': str(cache), 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
           'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
    self.path, self.processes, self.files = path, [], []
    for i in range(count):
      place = [f'--coordinator=127.0.0.1:{port}', f'--num_processes={count}',
               f'--process_id={i}'] if count > 1 else []
      self.files.append(stderr or path.with_name(f'{path.name}.{i}.err'))
      self.processes.append(subprocess.Popen(
          [sys.executable, *(['-c', f'process = {i}\n{before}\n{MAIN}'] if before else
                             ['-m', 'latent_reasoning.main']), f'--config={CONFIG}',
           f'--workdir={path}', f'--mode={mode}', *place,
           *(f'--config.{k}={v}' for k, v in {**SHORT, **changes}.items())],
          env=env, cwd=CONFIG.parents[1], stdout=subprocess.DEVNULL,
          stderr=self.files[-1].open('w')))

  def errors(self) -> str:
    return '\n'.join(f.read_text() for f in self.files)

  def reaches(self, step: int) -> None:
    """Waits until a step is in the log."""
    deadline = time.monotonic() + 400
    while not any(r['step'] >= step for r in records(self.path)):
      assert all(p.poll() is None for p in self.processes), self.errors()
      assert time.monotonic() < deadline, self.errors()
      time.sleep(0.02)

  def statuses(self) -> list[int]:
    try:
      return [p.wait(timeout=600) for p in self.processes]
    finally:
      for process in self.processes:
        process.kill()


def records(path):
  file = path / 'metrics.jsonl'
  return metrics.read(file) if file.exists() else []


def losses(path) -> list[float]:
  return [r['loss'] for r in records(path) if r['split'] == 'train']


def ended_well(*args, **kwargs) -> list[float]:
  group = Group(*args, **kwargs)
  assert group.statuses() == [0] * len(group.processes), group.errors()
  return losses(group.path)


@pytest.mark.integration
def test_two_processes_equal_one(cache, tmp_path):
  """Losses, one writer, SIGTERM to one of them, going on, and the other number of them."""
  alone = ended_well(tmp_path / 'one', cache, 1)
  group = Group(tmp_path / 'two', cache, **FSDP)
  group.reaches(5)
  group.processes[1].send_signal(signal.SIGTERM)
  assert group.statuses() == [143, 143], group.errors()
  done = len(losses(group.path))
  assert 5 <= done < 20
  both = ended_well(tmp_path / 'two', cache, **FSDP)
  assert f'resuming from step {done}' in group.files[0].read_text()
  assert both == pytest.approx(alone, rel=1e-5) and len(both) == 20
  steps = [r['step'] for r in records(group.path) if r['split'] == 'train']
  assert steps == list(range(1, 21))  # one writer
  assert 'step' not in group.files[1].read_text()
  results = [json.loads((tmp_path / name / 'results.json').read_text())['accuracy']
             for name in ('one', 'two')]
  assert results[0] == results[1]
  answers = [(tmp_path / name / 'predictions.jsonl').read_text() for name in ('one', 'two')]
  assert answers[0] == answers[1] and len(answers[0].splitlines()) == 12
  one = Group(tmp_path / 'two', cache, 1, 'verify')  # another mesh, another number
  assert one.statuses() == [0], one.errors()


@pytest.mark.slow
@pytest.mark.parametrize('name', RUNS)
@pytest.mark.parametrize('mesh', [{}, FSDP], ids=['data', 'fsdp'])
def test_losses_on_two_processes(name, mesh, cache, tmp_path):
  """Over 20 steps, stage 1 to 2, within 1e-5 of one process."""
  alone = ended_well(tmp_path / 'one', cache, 1, **RUNS[name])
  both = ended_well(tmp_path / 'two', cache, **RUNS[name], **mesh)
  worst = max(abs(a / b - 1) for a, b in zip(both, alone, strict=True))
  print(f'{name} {mesh}: largest relative difference of 20 losses {worst:.1e}')
  assert worst < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize('lost', [0, 1])
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGSTOP])
def test_lost_peer(number, lost, cache, tmp_path):
  """One dies or hangs: the other ends by itself, and the same command goes on."""
  alone = ended_well(tmp_path / 'one', cache, 1)
  ended_well(tmp_path / 'two', cache, **{'optim.stage2.steps': 1})  # compiled before the clock
  shutil.rmtree(tmp_path / 'two')
  group = Group(tmp_path / 'two', cache, **{'train.peer_timeout': 20})
  group.reaches(9)
  group.processes[lost].send_signal(number)
  began = time.monotonic()
  left = group.processes[1 - lost].wait(timeout=300)
  print(f'process {lost} got {number.name}: the other ended with status {left} after '
        f'{time.monotonic() - began:.1f} s')
  group.processes[lost].kill()
  said = group.files[1 - lost].read_text()
  if left == -signal.SIGABRT:  # JAX's own end of who cannot reach process 0
    assert (number, lost) == (signal.SIGKILL, 0) and 'another task died' in said, said
  else:
    assert left == multihost.LOST and 'goes on from the newest checkpoint' in said, said
  assert ended_well(tmp_path / 'two', cache) == pytest.approx(alone, rel=1e-5)


# At the third step one of them wants 200 TB of one device.
HUNGRY = '''
from latent_reasoning.train import trainer
def read(self, whole=trainer._Loop.read):
  if process == HUNGRY and self.pending and self.pending.step == 3:
    import jax
    jax.jit(lambda: jax.numpy.zeros((50, 10**12)))().block_until_ready()
  whole(self)
trainer._Loop.read = read
'''


@pytest.mark.integration
@pytest.mark.parametrize('hungry', [0, 1])
def test_out_of_memory_is_no_lost_peer(hungry, cache, tmp_path):
  """One process wants more than there is: both end with status 1, which nobody restarts, and
  both say what was asked for and what to lower."""
  group = Group(tmp_path / 'run', cache, before=HUNGRY.replace('HUNGRY', str(hungry)),
                **{'train.peer_timeout': 60})
  assert group.statuses() == [1, 1], group.errors()
  for i, file in enumerate(group.files):
    said, = [line for line in file.read_text().splitlines() if line.startswith('error: ')]
    assert said.startswith('error: out of memory: 181.9 TiB were asked for' if i == hungry else
                           f'error: process {hungry}: out of memory: 181.9 TiB')
    assert '--config.optim.grad_accum_steps=2' in said
    assert 'newest checkpoint' not in said and 'Traceback' not in file.read_text()


# The training step of stage 2 takes one of them much longer to compile than the others.
SLOW = '''
import jax.monitoring, time
from latent_reasoning.parallel import programs
seen = []
def slow(event, value, fun_name='', **_):
  if event == programs.BACKEND and 'train_step' in fun_name:
    seen.append(event)
    if len(seen) == 2 and process in WHO:
      time.sleep(12)
def listen(whole=programs.listen):
  if not seen:
    whole()
    jax.monitoring.register_scalar_listener(slow)
    seen.append('')
programs.listen = listen
seen.clear()
'''.replace('len(seen) == 2', 'len(seen) == 3')  # one stands for the listener


@pytest.mark.integration
@pytest.mark.parametrize('who', [(0,), (0, 1)])
def test_compilation_longer_than_the_timeout(who, cache, tmp_path):
  """It is no lost peer, neither here nor in who waits for it."""
  group = Group(tmp_path / 'run', cache, before=SLOW.replace('WHO', str(who)),
                **{'train.peer_timeout': 5})
  assert group.statuses() == [0, 0], group.errors()
  said = group.files[0].read_text()
  assert 'programs to compile: at most about 2 training steps (1 in stage 1, 1 in' in said
  assert 'compiled training step 2 of about 2 (stage 2, 8 x' in said
  assert 'compiled' not in group.files[1].read_text()


@pytest.mark.slow
def test_two_processes_fall_back(cache, tmp_path):
  """A damaged newest checkpoint is found by both, and both use the one before."""
  alone = ended_well(tmp_path / 'two', cache, **FSDP)
  newest = tmp_path / 'two/checkpoints/20'
  for file in newest.rglob('*'):
    if file.is_file() and file.parent.name == 'd':
      data = bytearray(file.read_bytes())
      data[len(data) // 2] ^= 1
      file.write_bytes(data)
  (tmp_path / 'two/results.json').unlink()
  group = Group(tmp_path / 'two', cache, **FSDP)
  assert group.statuses() == [0, 0], group.errors()
  assert 'checkpoint 20' in group.files[0].read_text()
  assert losses(tmp_path / 'two') == pytest.approx(alone, rel=1e-6)
  assert [p.name for p in (tmp_path / 'two/unsound').iterdir()] == ['20']


@pytest.mark.parametrize('flags, words', [
    (['--coordinator=127.0.0.1:1'], 'some are missing'),
    (['--num_processes=2', '--process_id=0'], 'some are missing'),
    (['--coordinator=127.0.0.1', '--num_processes=1', '--process_id=0'], 'expected HOST:PORT'),
    (['--coordinator=127.0.0.1:1', '--num_processes=2', '--process_id=2'], 'from 0, below')])
def test_mistakes(flags, words, capsys):
  """One line, status 2, and no folder."""
  assert main.main(['main', f'--config={CONFIG}', *flags]) == 2
  err = capsys.readouterr().err
  assert err.count('error: ') == 1 and words in err


def test_alone():
  """With one process there is nothing to agree on."""
  assert multihost.broadcast([1]) == [1] and multihost.all_processes(False) is False
  assert multihost.primary_first(lambda: 3) == 3 and multihost.is_primary()


def test_one_process_alone_fails(monkeypatch):
  """What process 0 finds wrong is an error in all."""
  monkeypatch.setattr(multihost, '_place', [1, 2])
  monkeypatch.setattr(multihost, 'broadcast', lambda value: 'no such file')
  with pytest.raises(InputError, match='no such file'):
    multihost.primary_first(lambda: pytest.fail('it must not be called'))
