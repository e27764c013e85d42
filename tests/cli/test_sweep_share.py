"""Sweeps that engines share: tasks of job arrays, GPUs of a machine, buckets, processes."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import conftest
import pytest

from latent_reasoning import main
from latent_reasoning.cli import sweep, sweep_processes, sweep_share
from latent_reasoning.cli.sweep_share import Share, Slot
from latent_reasoning.config import SweepConfig
from latent_reasoning.errors import InputError
from latent_reasoning.parallel import multihost
from latent_reasoning.train.workdir import Workdir

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = SweepConfig(('a x=1', 'b x=2', 'c x=3'), (0, 1), '', 'steps')
JOINED = ('--coordinator=h:1', '--num_processes=4', '--process_id=2')


def finished(place: pathlib.Path):
  place.mkdir(parents=True, exist_ok=True)
  (place / 'results.json').write_text(json.dumps({
      'method': 'language_model', 'loss': 2.0, 'train': {'loss': 1.9}, 'causal': True,
      'seed': 0, 'parameters': 10, 'memory_zeroed': {'loss': 3.0}}))


@pytest.fixture(name='trained')
def stand_in(monkeypatch):
  """Runs that end at once; what was trained, in order."""
  called = []
  def child(flags, place, _):
    called.append(place.name)
    finished(place)
    return 0
  monkeypatch.setattr(sweep_processes, 'child', child)
  return called


@pytest.mark.parametrize('task, joined, environment, runs', [
    ('', (), {}, [0, 1, 2, 3, 4, 5]), ('4', (), {}, [4]), ('1/4', (), {}, [1, 5]),
    ('7/9', (), {}, []), ('report', (), {}, []),
    ('', (), {'SLURM_ARRAY_TASK_ID': '3'}, [3]),
    ('', (), {'JOB_COMPLETION_INDEX': '5'}, [5]),
    ('2', (), {'SLURM_ARRAY_TASK_ID': '3', 'JOB_COMPLETION_INDEX': '5'}, [2]),
    # processes that train each run together, also in a job array
    ('', JOINED, {'JOB_COMPLETION_INDEX': '2'}, [0, 1, 2, 3, 4, 5]),
    ('', ('--distributed',), {'SLURM_ARRAY_TASK_ID': '3', 'SLURM_STEP_NUM_TASKS': '8',
                              'SLURM_PROCID': '1'}, [3]),
    # processes that do not
    ('', (), {'SLURM_STEP_NUM_TASKS': '4', 'SLURM_PROCID': '1'}, [1, 5]),
    ('', (), {'SLURM_NTASKS': '4', 'SLURM_PROCID': '0'}, [0, 1, 2, 3, 4, 5])])
def test_a_task_has_its_runs(task, joined, environment, runs):
  share = sweep_share.read(task, False, joined, environment=environment)
  assert list(share.of(6)) == runs and share.joined == (() if share.report else joined)


@pytest.mark.parametrize('total', range(1, 9))
@pytest.mark.parametrize('tasks', range(1, 9))
def test_tasks_have_each_run_once(total, tasks):
  shares = [sweep_share.read(f'{i}/{tasks}', False, environment={}) for i in range(tasks)]
  assert sorted(i for share in shares for i in share.of(total)) == list(range(total))


@pytest.mark.parametrize('task, message', [
    ('x', 'expected the number of a run'), ('-1', 'expected the number'),
    ('3/3', 'with I below N'), ('1/0', 'with I below N'), ('6', 'task 6 has no run.*0 to 5')])
def test_mistakes(task, message):
  with pytest.raises(InputError, match=message):
    sweep_share.read(task, False, environment={}).of(6)


def test_gpus_are_counted_without_opening_one(tmp_path, monkeypatch):
  """By the variable, or by the driver's own program."""
  gpus = sweep_share.visible_gpus
  assert gpus({'CUDA_VISIBLE_DEVICES': '2, GPU-7,'}) == ('2', 'GPU-7')
  with pytest.raises(InputError, match='no GPU is seen'):
    gpus({'CUDA_VISIBLE_DEVICES': ''})
  program = tmp_path / 'nvidia-smi'
  program.write_text('#!/bin/sh\necho "GPU 0: H100 (UUID: 1)"; echo "GPU 1: H100"; echo x\n')
  program.chmod(0o755)
  monkeypatch.setenv('PATH', f'{tmp_path}{os.pathsep}{os.environ["PATH"]}')
  assert gpus({}) == ('0', '1')
  with pytest.raises(InputError, match='--per_gpu gives each run one GPU and one process'):
    sweep_share.read('', True, JOINED, environment={})


def test_the_last_task_makes_the_report(tmp_path, trained, capsys):
  """In any order; one that is done again adds nothing."""
  for task in (2, 0):
    assert sweep.run(CONFIG, [], Workdir(tmp_path), Share(task, 3)) == 0
    assert 'have no results yet' in capsys.readouterr().err
  assert trained == ['c-0', 'c-1', 'a-0', 'a-1'] and not (tmp_path / 'table.md').exists()
  assert sweep.run(CONFIG, [], Workdir(tmp_path), Share(1, 3)) == 0
  assert trained[4:] == ['b-0', 'b-1']
  assert '| a |' in (tmp_path / 'table.md').read_text()
  assert sweep.run(CONFIG, [], Workdir(tmp_path), Share(1, 3)) == 0 and len(trained) == 6


def test_a_last_command_makes_the_report_of_what_there_is(tmp_path, trained, capsys):
  sweep.run(CONFIG, [], Workdir(tmp_path), Share(0))
  assert sweep.run(CONFIG, [], Workdir(tmp_path), Share(report=True)) == 0
  assert trained == ['a-0'] and '| a |' in (tmp_path / 'table.md').read_text()


def test_tasks_do_not_wait_for_each_other(tmp_path, trained, capsys):
  """The folder of the sweep has one writer; a task writes there for the report only."""
  holder = subprocess.Popen(
      [sys.executable, '-c', 'import fcntl, sys, time; f = open(sys.argv[1], "a");'
       'fcntl.flock(f, fcntl.LOCK_EX); print("held", flush=True); time.sleep(60)',
       str(tmp_path / '.lock')], stdout=subprocess.PIPE, text=True)
  try:
    assert holder.stdout.readline() == 'held\n'
    for task in range(6):
      assert sweep.run(CONFIG, [], Workdir(tmp_path), Share(task)) == 0
    assert len(trained) == 6 and 'no report from here' in capsys.readouterr().err
    with pytest.raises(InputError, match='is being written'):
      sweep.run(CONFIG, [], Workdir(tmp_path))
  finally:
    holder.kill()
    holder.communicate()


def test_a_task_counts_flops_of_its_run_and_the_control(tmp_path, trained, monkeypatch):
  """Another task may count the same in the same moment: its file is as good."""
  counted = []
  def python(module, flags, log, environment=None):
    counted.append(log.parent.name)
    (log.parent / 'flops.json').write_text('{"flops": 1.0, "stages": []}')
    return 1
  monkeypatch.setattr(sweep_processes, 'python', python)
  config = SweepConfig(CONFIG.runs, (0,), 'a', 'flops')
  assert sweep.run(config, [], Workdir(tmp_path), Share(2)) == 0
  assert counted == ['flops-a', 'flops-c'] and trained == ['c-0']
  with pytest.raises(InputError, match='one process counts'):
    sweep.run(config, [], Workdir(tmp_path), Share(joined=JOINED, processes=4))


def test_each_gpu_has_a_run(tmp_path, monkeypatch):
  """Two at once, each with a device of its own, and the next one where one is free."""
  meet, seen = threading.Barrier(2, timeout=60), []
  def child(flags, place, slot):
    seen.append(slot.gpu)
    meet.wait()
    finished(place)
    return 0
  monkeypatch.setattr(sweep_processes, 'child', child)
  assert sweep.run(CONFIG, [], Workdir(tmp_path), Share(slots=(Slot('0'), Slot('GPU-1')))) == 0
  assert sorted(seen) == ['0'] * 3 + ['GPU-1'] * 3 and (tmp_path / 'table.md').exists()


@pytest.mark.skipif(not hasattr(os, 'sched_getaffinity'), reason='of Linux')
def test_each_core_has_a_run(tmp_path, monkeypatch):
  """Each process may run on one core alone; this one, and what follows, on all as before."""
  program = tmp_path / 'python'
  program.write_text(f'#!{sys.executable}\nimport os\n'
                     'print(*os.sched_getaffinity(0), os.environ["JAX_PLATFORMS"])\n')
  program.chmod(0o755)
  monkeypatch.setattr(sys, 'executable', str(program))
  before = os.sched_getaffinity(0)
  share = sweep_share.read('', False, environment={}, per_core=True)
  assert {slot.core for slot in share.slots} == before
  sweep.run(SweepConfig(CONFIG.runs, (0,), '', 'steps'), [], Workdir(tmp_path), share)
  said = [(tmp_path / f'{name}-0/log.txt').read_text().split() for name in 'abc']
  assert all(int(core) in before and rest == ['cpu'] for core, *rest in said)
  assert os.sched_getaffinity(0) == before or len(before) == 1
  with pytest.raises(InputError, match='--per_core gives each run one core and one process'):
    sweep_share.read('', False, JOINED, environment={}, per_core=True)
  with pytest.raises(InputError, match='expected one of them'):
    sweep_share.read('', True, environment={}, per_core=True)
  monkeypatch.delattr(os, 'sched_getaffinity')
  with pytest.raises(InputError, match='expected Linux'):
    sweep_share.read('', False, environment={}, per_core=True)


def test_the_device_reaches_the_process(tmp_path, monkeypatch):
  program = tmp_path / 'python'
  program.write_text('#!/bin/sh\necho "on $CUDA_VISIBLE_DEVICES"\nexit 3\n')
  program.chmod(0o755)
  monkeypatch.setattr(sys, 'executable', str(program))
  config = SweepConfig(('a x=1', 'b x=1'), (0,), '', 'steps')
  assert sweep.run(config, [], Workdir(tmp_path), Share(slots=(Slot('4'), Slot('5')))) == 1
  assert {(tmp_path / f'{n}-0/log.txt').read_text() for n in 'ab'} == {'on 4\n', 'on 5\n'}


@pytest.mark.parametrize('slots', [(), (Slot('0'), Slot('1'))])
def test_a_signal_reaches_all_that_runs(tmp_path, monkeypatch, slots):
  """They save; nothing new begins, and the status is the signal's."""
  program = tmp_path / 'python'
  program.write_text('#!/usr/bin/env bash\ntrap "echo saved; exit 143" TERM\necho begun\n'
                     'for ((i = 0; i < 600; i++)); do sleep 0.1; done\n')
  program.chmod(0o755)
  monkeypatch.setattr(sys, 'executable', str(program))
  logs = [tmp_path / f'{name}-0/log.txt' for name in 'abc']
  def ask():
    deadline = time.monotonic() + 60
    while sum(f.exists() and 'begun' in f.read_text() for f in logs) < max(1, len(slots)):
      if time.monotonic() > deadline:
        break
      time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)
  threading.Thread(target=ask, daemon=True).start()
  config = SweepConfig(CONFIG.runs, (0,), '', 'steps')
  assert sweep.run(config, [], Workdir(tmp_path), Share(slots=slots)) == 143
  texts = [f.read_text() for f in logs if f.exists()]
  assert len(texts) == max(1, len(slots)) and all('saved' in text for text in texts)


def test_a_lost_process_ends_the_sweep(tmp_path, monkeypatch):
  """With the status on which the launchers start it again; no run of it has failed."""
  monkeypatch.setattr(sweep_processes, 'child', lambda *_: multihost.LOST)
  assert sweep.run(CONFIG, [], Workdir(tmp_path), Share(joined=JOINED)) == multihost.LOST


def test_a_sweep_in_a_bucket(tmp_path, monkeypatch, capsys):
  """Runs are sent there, found there by whoever comes next, and so is the report."""
  bucket, called = tmp_path / 'bucket/sweep', []
  def child(flags, place, _):
    address = next(f.partition('=')[2] for f in flags if f.startswith('--workdir='))
    called.append(address)
    place.mkdir(parents=True, exist_ok=True)
    (place / 'log.txt').write_text('done')
    finished(pathlib.Path(address))  # as `Workdir.push` brings it
    return 0
  monkeypatch.setattr(sweep_processes, 'child', child)
  for host in range(2):
    for _ in range(2):
      place = Workdir(tmp_path / f'host{host}', str(bucket))
      assert sweep.run(CONFIG, [], place, Share(host, 2)) == 0
  assert called == [f'{bucket}/{n}' for n in ('a-0', 'c-0', 'b-1', 'b-0', 'a-1', 'c-1')]
  assert (bucket / 'a-0/log.txt').read_text() == 'done'
  assert '| a |' in (bucket / 'table.md').read_text()
  assert not (bucket / 'lock.json').exists()


ARGV = ['main', '--config=configs/compare_arithmetic.py', '--mode=compare']


@pytest.fixture(name='no_device')
def closed(monkeypatch):
  """Fails whoever asks JAX for a device."""
  import jax
  from jax._src import xla_bridge
  def refuse(*_, **__):
    raise AssertionError('a device was opened')
  for module, names in ((jax, ('devices', 'local_devices')), (
      xla_bridge, ('get_backend', 'backends', 'devices', 'local_devices'))):
    for name in names:
      monkeypatch.setattr(module, name, refuse)


def test_the_parent_opens_no_device(tmp_path, monkeypatch, no_device, capsys):
  """The runs need it; only they get the flags by which processes join."""
  flags = []
  def child(given, place, _):
    flags.append(given)
    return 2
  monkeypatch.setattr(sweep_processes, 'child', child)
  monkeypatch.setattr(multihost, 'start', lambda *_: pytest.fail('joined'))
  monkeypatch.setattr(multihost, '_place', [0, 1])
  small = "--config.sweep.runs=('a method=rim',)"
  assert main.main([*ARGV, small, '--config.sweep.control=', '--config.sweep.seeds=(0,)',
                    f'--workdir={tmp_path}/s', '--coordinator=h:1', '--num_processes=2',
                    '--process_id=0']) == 1
  assert {'--coordinator=h:1', '--num_processes=2', '--process_id=0'} <= set(flags[0])
  assert 'FAILED: a-0' in capsys.readouterr().err
  # one that is not the first writes nothing of the sweep
  assert main.main([*ARGV, small, '--config.sweep.control=', '--config.sweep.seeds=(0,)',
                    f'--workdir={tmp_path}/t', '--coordinator=h:1', '--num_processes=2',
                    '--process_id=1']) == 1
  assert not [f.name for f in (tmp_path / 't').iterdir() if f.is_file()]


def test_the_index_of_a_process_that_is_not_joined(monkeypatch):
  """As Slurm or Cloud TPU say it."""
  monkeypatch.setattr(multihost, '_place', [0, 1])
  monkeypatch.setenv('SLURM_PROCID', '3')
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '8')
  assert multihost.stand_for(None, None) == 8 and multihost.index() == 3
  monkeypatch.delenv('SLURM_PROCID')
  monkeypatch.delenv('SLURM_STEP_NUM_TASKS')
  monkeypatch.setenv('TPU_WORKER_ID', '1')
  monkeypatch.setenv('TPU_WORKER_HOSTNAMES', 'a,b,c,d')
  assert multihost.stand_for(None, None) == 4 and multihost.index() == 1
  assert not multihost.is_primary() and multihost.count() == 1


@pytest.mark.parametrize('flag', ['--task=1', '--per_gpu', '--per_core'])
def test_flags_of_sweeps_are_of_sweeps(tmp_path, capsys, flag):
  argv = ['main', '--config=configs/rim_arithmetic.py', f'--workdir={tmp_path}/w', flag]
  assert main.main(argv) == 2
  error = capsys.readouterr().err
  assert 'of a config with sweep.runs' in error and error.count('\n') == 1


@pytest.mark.integration
def test_two_processes_train_each_run_of_a_sweep(tmp_path):
  """For real: each run is trained once, by both; one table."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  changes = {**conftest.TINY, 'model.num_layers': 1, 'optim.stage1.steps': 4,
             'optim.stage2.steps': 2, 'train.eval_every': 0, 'eval.contamination': False,
             'sweep.runs': ('direct method=direct', 'rim method=rim'), 'sweep.seeds': (0,),
             'sweep.control': '', 'sweep.budget': 'steps'}
  env = {**os.environ, 'LATENT_REASONING_KEEP_ALLOCATOR': '1', 'JAX_PLATFORMS': 'cpu',
         'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
  started = [subprocess.Popen(
      [sys.executable, '-m', 'latent_reasoning.main', *ARGV[1:], f'--workdir={tmp_path}/s',
       f'--coordinator=127.0.0.1:{port}', '--num_processes=2', f'--process_id={i}',
       *(f'--config.{k}={v}' for k, v in changes.items())], cwd=ROOT, env=env, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for i in range(2)]
  said = [process.communicate(timeout=600)[0] for process in started]
  assert [p.returncode for p in started] == [0, 0], said
  assert 'written to' in said[0] and 'written to' not in said[1]
  for name in ('direct-0', 'rim-0'):
    assert json.loads((tmp_path / f's/{name}/results.json').read_text())['method'] == name[:-2]
    steps = [json.loads(line) for line in
             (tmp_path / f's/{name}/metrics.jsonl').read_text().splitlines()]
    assert len({(r['step'], r['split']) for r in steps}) == len(steps)
