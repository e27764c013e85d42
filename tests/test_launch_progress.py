"""Launch scripts start again what gets on, and end what does not."""

import json
import subprocess

import pytest
from test_launch import (  # noqa: F401, a fixture
  MAIN,
  ROUND,
  TPU,
  bucket,
  stand_ins,
  verbs,
)
from test_launch_accounts import home, program
from test_launch_worker import linux, python_calls, slurm_job, worker


@linux
@pytest.mark.parametrize('where', [(), ('--workdir=runs/rim',), ('--workdir=elsewhere/',)])
@pytest.mark.parametrize('statuses, starts', [([75], 2), ([143, 134], 2), ([137], 2), ([1], 1),
                                              ([76], 1), ([9], 1)])
def test_the_worker_ends_what_does_not_get_on(world, where, statuses, starts):
  """After two starts that saved nothing, with what the log said last; out of memory, a
  status of its own, after one."""
  python = home(world) / '.venv/bin'
  (python / 'answers').write_text(json.dumps([['python', statuses]]))
  command = ('.venv/bin/python', '-m', 'latent_reasoning.main', *where)
  ended = worker(world, 'run', 'train', '9', *command, timeout=60)
  assert len(python_calls(world)) == starts
  assert ended.returncode == (statuses[-1] if starts > 1 else statuses[0])
  assert ('saved no new checkpoint' in ended.stdout) == (starts == 2)


@linux
def test_progress_is_a_new_checkpoint_of_this_run(world):
  """Neither what is half written nor what another run saves; a comparison's results count."""
  program(world, 'python', 'n=$(($(cat runs/n 2>/dev/null || echo 0) + 1)); echo $n > runs/n\n'
          'echo "start $n"; PATH=/bin:/usr/bin\n'
          'mkdir -p w/checkpoints/$n.orbax-checkpoint-tmp other/checkpoints/$n\n'
          '[ $n != 2 ] || mkdir -p w/checkpoints/200\n'
          '[ $n != 3 ] || { mkdir -p w/rim-0; touch w/rim-0/results.json; }\n'
          'exit 75', 'home/latent_reasoning/.venv/bin')
  ended = worker(world, 'run', 'train', '9', '.venv/bin/python', '--workdir=w', timeout=60)
  assert ended.returncode == 75
  assert (home(world) / 'runs/n').read_text() == '5\n'  # 1 nothing, 2 and 3 something, 4 and 5
  assert ended.stdout.rpartition('saved no new')[2].count('start 5\n') == 1  # the last lines


@pytest.mark.parametrize('listed, statuses, rounds', [
    ([bucket(0)], [75], 2), ([bucket(3)], [75], 2),
    ([bucket(1), bucket(2), bucket(2)], [75], 3), ([bucket(1), bucket(1), bucket(2)], [75], 4),
    ([1], [75], 5)])  # gcloud cannot list it: what is not known ends nothing
def test_tpu_all_ends_what_does_not_get_on(world, listed, statuses, rounds):
  world.answer(gcloud={'storage ls': listed, 'tail -n': ['the last words\n'],
                       'queued-resources list': ['rim\tACTIVE\n'],
                       'tpu-vm list': ['rim\tREADY\n'], 'main': statuses})
  ended = world.launch('tpu_vm', 'all', *TPU, '--tries=5', '--', *MAIN)
  assert verbs(world)[:3 * rounds] == ROUND * rounds and ended.returncode == 75
  assert verbs(world)[3 * rounds:] == ([] if rounds == 5 else ['ssh'])
  assert ('the last words' in ended.stderr) == (rounds < 5)


def test_a_preemption_is_no_start_without_progress(world):
  states = ['ACTIVE', 'ACTIVE', *('SUSPENDED', 'SUSPENDED', 'ACTIVE') * 3]
  world.answer(gcloud={'storage ls': [bucket(1)], 'tpu-vm list': ['rim\tREADY\n'],
                       'queued-resources list': [f'rim\t{s}\n' for s in states],
                       'main': [75, 75, 75, 0]})
  ended = world.launch('tpu_vm', 'all', *TPU, '--', *MAIN)
  assert ended.returncode == 0 and verbs(world).count('run') == 4, ended.stderr


def test_a_slurm_job_that_does_not_get_on_leaves_the_queue(world):
  """Two starts of one job, over a requeue; a checkpoint between them begins a new count."""
  world.answer(gcloud={'storage ls': [bucket(1)]})
  for restarts, requeued in (('0', True), ('1', False)):
    ended = slurm_job(world, [75], SLURM_RESTART_COUNT=restarts)
    assert ended.returncode == 75
    assert (['scontrol', 'requeue', '7'] in world.calls()) == requeued
  assert not list((home(world) / 'runs').glob('.7*'))
  program(world, 'srun', '/bin/mkdir -p w/checkpoints/$SLURM_RESTART_COUNT; exit 143')
  for restarts in range(4):
    world.forget()
    done = subprocess.run(['bash', 'launch/slurm_job.sh', '9', 'python', '--workdir=w'],
                          cwd=home(world), timeout=60, check=False, env=world.environ(
                              SLURM_JOB_ID='8', SLURM_RESTART_COUNT=str(restarts)))
    assert done.returncode == 143
    assert ['scontrol', 'requeue', '8'] in world.calls()


def test_an_empty_bucket_is_not_an_unknown_one(world):
  """gcloud fails on both; only the first says that nothing matched."""
  script = ('. launch/common.sh; workdir=gs://b/w/; begin python; again 75 python; '
            'again 75 python || echo ended')
  for says, ended in (('ERROR: One or more URLs matched no objects.', True),
                      ('ERROR: not logged in', False)):
    program(world, 'gcloud', f'echo "{says}" >&2; exit 1')
    program(world, 'python', 'exit 1')
    done = subprocess.run(['bash', '-c', f'last_lines() {{ :; }}; {script}'], cwd=home(world),
                          env=world.environ(), capture_output=True, text=True, timeout=60)
    assert (done.stdout == 'ended\n') == ended, done.stderr
  program(world, 'python', 'echo gs://b/w/checkpoints/$RANDOM$RANDOM')  # where gcloud is not
  done = subprocess.run(['bash', '-c', script], cwd=home(world), env=world.environ(),
                        capture_output=True, text=True, timeout=60)
  assert done.stdout == '', done.stderr
