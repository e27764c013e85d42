"""On the machines that train: launch/worker.sh and the Slurm job, run for real."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
from test_launch import MAIN, NASTY, ROOT, TPU, stand_ins  # noqa: F401, a fixture

linux = pytest.mark.skipif(sys.platform != 'linux', reason='training machines run Linux')


def python_calls(world):
  file = world.path / 'home/latent_reasoning/.venv/bin/calls'
  return [json.loads(line)[1:] for line in file.read_text().splitlines()]


@linux
@pytest.mark.parametrize('script, flags, flag', [
    ('tpu_vm', TPU, ['--distributed']), ('gpu', ('--host=box',), [])])
def test_arguments_arrive_unchanged(world, script, flags, flag):
  """Through ssh, a shell and the worker, at main.py; nothing in them is executed."""
  world.answer(gcloud={'ssh': ['execute']}, ssh={'': ['execute']})
  done = world.launch(script, 'run', *flags, '--', *MAIN, *NASTY)
  assert done.returncode == 0, done.stderr
  assert python_calls(world) == [['-m', 'latent_reasoning.main', *flag, *MAIN, *NASTY]]
  assert not list(world.path.rglob('EXECUTED'))


def worker(world, *argv, start=subprocess.run, **options):
  return start(['launch/worker.sh', *argv], cwd=world.path / 'home/latent_reasoning', text=True,
               env=world.environ(), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
               stdout=subprocess.PIPE, **options)


@linux
@pytest.mark.parametrize('statuses, tries, done, starts', [
    ([0], 5, 0, 1), ([75, 143, 137, 0], 5, 0, 4), ([134, 139, 0], 5, 0, 3), ([1], 5, 1, 1),
    ([2], 5, 2, 1), ([130], 5, 130, 1), ([75], 3, 75, 3), ([75], 1, 75, 1)])
def test_the_worker_starts_again_what_resumes(world, statuses, tries, done, starts):
  python = world.path / 'home/latent_reasoning/.venv/bin'
  (python / 'answers').write_text(json.dumps([['python', statuses]]))
  (python / 'saves').write_text('runs/rim')
  command = ('.venv/bin/python', '-m', 'latent_reasoning.main', *NASTY)
  ended = worker(world, 'run', 'train', str(tries), *command, timeout=60)
  assert ended.returncode == done, ended.stderr
  assert python_calls(world) == [list(command[1:])] * starts


@pytest.mark.integration
@linux
def test_the_worker_outlives_its_connection(world):
  """Killed while it shows a run, it leaves the run alone; another follows to its end."""
  runs = world.path / 'home/latent_reasoning/runs'
  command = ('bash', '-c', 'echo begun; while [ ! -e runs/end ]; do sleep 0.05; done;'
             ' echo ended; exit 3')
  with worker(world, 'run', 'train', '1', *command, start=subprocess.Popen) as first:
    assert first.stdout.readline() == 'begun\n'
    follower = worker(world, 'run', 'train', '1', *command, start=subprocess.Popen)
    assert follower.stdout.readline() == 'begun\n'
    first.kill()
    (runs / 'end').touch()
    out, err = follower.communicate(timeout=60)
    assert (out, follower.returncode) == ('ended\n', 3) and 'following' in err
  again = worker(world, 'run', 'train', '1', 'echo', 'anew')  # not the log of the first
  assert (again.stdout, again.returncode) == ('anew\n', 0)
  assert (runs / 'train.log').read_text() == 'begun\nended\nanew\n'


@linux
def test_the_worker_stops_what_it_runs(world):
  """One SIGTERM, which the command may answer in its own time; it is not started again."""
  command = ('bash', '-c', 'trap "echo saving; sleep 0.3; exit 143" TERM; echo begun;'
             ' while :; do sleep 0.05; done')
  with worker(world, 'run', 'train', '5', *command, start=subprocess.Popen) as run:
    assert run.stdout.readline() == 'begun\n'
    stopped = worker(world, 'stop', 'train', timeout=60)
    out, _ = run.communicate(timeout=60)
  assert out.count('saving\n') == 1  # its shell may also say that its sleep was terminated
  assert (run.returncode, stopped.returncode) == (143, 0)
  assert 'status 143' in stopped.stderr
  assert 'does not run' in worker(world, 'stop', 'train').stderr


@linux
def test_two_starts_at_once_are_one(world):
  """Started twice in the same moment, the job runs once."""
  runs = world.path / 'home/latent_reasoning/runs'
  command = ('bash', '-c', 'echo $$ >> runs/starts; while [ ! -e runs/end ]; do sleep 0.05;'
             ' done')
  started = [worker(world, 'run', 'train', '1', *command, start=subprocess.Popen)
             for _ in range(4)]
  time.sleep(1.0)
  (runs / 'end').touch()
  assert [p.wait(60) for p in started] == [0] * 4
  for p in started:
    p.communicate()
  assert len((runs / 'starts').read_text().split()) == 1


@linux
def test_stop_leaves_others_alone(world):
  """A number in a file may be another process's by now: also another job of the worker."""
  home = world.path / 'home/latent_reasoning'
  (home / 'runs').mkdir(exist_ok=True)
  command = ('bash', '-c', 'while [ ! -e runs/end ]; do sleep 0.05; done')
  other = worker(world, 'run', 'other', '1', *command, start=subprocess.Popen)
  while not (home / 'runs/other.pid').exists() or not (
      home / 'runs/other.pid').read_text().strip():
    time.sleep(0.05)
  with subprocess.Popen(['sleep', '60']) as mine:
    for pid in (mine.pid, int((home / 'runs/other.pid').read_text()), 'x', ''):
      (home / 'runs/train.pid').write_text(f'{pid}\n')
      assert 'does not run' in worker(world, 'stop', 'train', timeout=60).stderr
    assert mine.poll() is None and other.poll() is None
    mine.kill()
  (home / 'runs/end').touch()
  assert other.wait(60) == 0
  other.communicate()


def test_the_worker_installs(world):
  """Python and the extras, by uv."""
  assert worker(world, 'install', 'tpu,hf').returncode == 0
  assert world.calls() == [
      ['uv', 'venv', '--python', '3.12', '--allow-existing', '.venv'],
      ['uv', 'pip', 'install', '--python', '.venv', '-c', 'launch/constraints.txt', '-e',
       '.[tpu,hf]']]


def slurm_job(world, statuses, **environ):
  """Runs what sbatch is given, as Slurm would."""
  world.answer(srun={'': statuses})
  world.launch('slurm', 'run', '--nodes=2', '--gpus_per_node=8', '--tries=3', '--', *MAIN,
               *NASTY)
  submitted, = world.calls('sbatch')
  assert '--signal=TERM@120' in submitted and '--requeue' in submitted
  script = submitted.index('launch/slurm_job.sh')
  copy = world.path / 'slurm_script'  # Slurm runs a copy, in the folder of the submission
  shutil.copy(ROOT / submitted[script], copy)
  world.forget()
  return subprocess.run(['bash', copy, *submitted[script + 1:]], check=False,
                        cwd=world.path / 'home/latent_reasoning', timeout=60,
                        env=world.environ(SLURM_JOB_ID='7', **environ))


@pytest.mark.parametrize('status, restarts, requeued', [
    (0, '', False), (1, '', False), (2, '', False), (75, '', True), (143, '', True),
    (137, '1', True), (134, '1', True), (75, '2', False)])
def test_a_slurm_job_goes_back_to_the_queue(world, status, restarts, requeued):
  """While it resumes, --tries starts at most; srun gets the command unchanged."""
  environ = {'SLURM_RESTART_COUNT': restarts} if restarts else {}
  assert slurm_job(world, [status], **environ).returncode == status
  assert world.calls() == [
      ['srun', '--kill-on-bad-exit=0', '.venv/bin/python', '-m', 'latent_reasoning.main',
       '--distributed', *MAIN, *NASTY],
      *([['scontrol', 'requeue', '7']] if requeued else [])]


def test_a_slurm_job_passes_on_its_cpus(world):
  slurm_job(world, [0], SLURM_CPUS_PER_TASK='4')
  assert world.calls('srun')[0][2] == '--cpus-per-task=4'


def test_a_cancelled_slurm_job_stays_cancelled(world):
  """scancel ends the job's shell with SIGTERM, and with it the way back to the queue."""
  (world.path / 'bin/srun').write_text('#!/bin/sh\necho begun; sleep 0.5; exit 143\n')
  with subprocess.Popen(
      ['bash', 'launch/slurm_job.sh', '3', 'python'], cwd=ROOT, stdout=subprocess.PIPE,
      text=True, env=world.environ(SLURM_JOB_ID='7')) as job:
    assert job.stdout.readline() == 'begun\n'
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == -signal.SIGTERM
  time.sleep(0.1)
  assert world.calls('scontrol') == []
