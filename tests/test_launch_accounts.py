"""Launch scripts for real accounts: secrets, rights, networks, queues, tasks, restarts."""

import base64
import json
import os
import re
import shlex
import signal
import subprocess
import time

import pytest
from test_launch import (  # noqa: F401, a fixture
  KUBE,
  MAIN,
  SCRIPTS,
  TPU,
  active,
  stand_ins,
  verbs,
)
from test_launch_worker import linux

TOKEN = "hf_s3cret 'x' \"y\" $Z `w`"
GPUS = ('--nodes=2', '--gpus_per_node=8')
FLAGS = {'tpu_vm': TPU, 'slurm': GPUS, 'gpu': ('--host=box',), 'kubernetes': KUBE}
NEEDED = {'tpu_vm': ('create',), 'kubernetes': ('stop', '--name=rim')}


def home(world):
  return world.path / 'home/latent_reasoning'


def launch(world, script, *argv, **environ):
  """As `world.launch`, of the copy of the checkout, where it may write."""
  return subprocess.run([home(world) / f'launch/{script}.sh', *argv], cwd=home(world),
                        env=world.environ(**environ), timeout=60, stdin=subprocess.DEVNULL,
                        capture_output=True, text=True)


def program(world, name, text, folder='bin'):
  """Puts a shell script where a stand-in was."""
  file = world.path / folder / name
  file.write_text(f'#!/usr/bin/env bash\n{text}\n')
  file.chmod(0o755)


@pytest.mark.parametrize('script', [s for s in SCRIPTS if s != 'worker'])
def test_help_names_every_flag(world, script):
  """By the list that an unknown flag is answered with."""
  known = launch(world, script, SCRIPTS[script][0], '--nosuch=1').stderr
  flags = re.findall(r' --(\w+)', known.partition('known:')[2].partition('(see')[0])
  shown = launch(world, script, '--help').stdout
  assert len(flags) > 5 and not [f for f in flags if f'--{f}' not in shown]


@pytest.mark.parametrize('line, says', [
    ('slurm run --account --nodes=2', '--account without a value; expected --account=VALUE'),
    ('slurm run --account= --nodes=2', '--account= is empty; expected --account=VALUE'),
    ('slurm run --nodes=2 --gpus-per-node=8 --array=all -- --config=x', '--array=all'),
    ('tpu_vm create --service-account --name=rim', '--service-account without a value'),
    ('tpu_vm all --name=rim --zone=z --type=v6e-8 --tasks=0 -- --config=x --workdir=gs://b/w',
     '--tasks=0'),
    ('tpu_vm run --name=rim --zone=z --tasks=2 -- --config=x', '--tasks is of all'),
    ('tpu_vm run --name=rim --zone=z --delete-when-done -- --config=x --workdir=runs/x',
     'would not last'),
    ('gpu run --env -- --config=x', '--env without a value'),
    ('gpu run --env=NO_SUCH_VARIABLE -- --config=x', 'NO_SUCH_VARIABLE is not set here'),
    ('gpu run --env=a-b=1 -- --config=x', '--env=a-b: expected NAME'),
    ('gpu run --envs=TOKEN=hf_1 -- --config=x', 'unknown flag --envs;'),
    ('kubernetes run --toleration=a:b --name=rim', '--toleration=a:b'),
    ('kubernetes run --secret=A_B --name=rim', "'A_B' is no name"),
    ('kubernetes run --queue --name=rim', '--queue without a value'),
    ('kubernetes run --shm=much --name=rim', '--shm=much'),
])
def test_mistakes_are_one_line(world, line, says):
  script, *argv = shlex.split(line)
  done = launch(world, script, *argv)
  assert done.returncode == 2 and world.calls() == []
  assert done.stderr.count('\n') == 1 and says in done.stderr and 'hf_1' not in done.stderr


# --- variables ------------------------------------------------------------------


RECORD = 'printf %s "$TOKEN/$PLAIN" > {}/got; printf "%s\\n" "$@" >> {}/argv'


def given(world):
  return (world.path / 'got').read_text()


@linux
@pytest.mark.parametrize('script', ['gpu', 'tpu_vm'])
def test_env_reaches_a_remote_machine_out_of_sight(world, script):
  """As a file of mode 600 or through a pipe, gone once read; in no command, log or file."""
  record = RECORD.format(world.path, world.path)
  program(world, 'python', record, 'home/latent_reasoning/.venv/bin')
  program(world, 'gcloud', f'printf "%s\\n" "$@" >> {world.path}/argv\n'
          'case "$*" in *" scp "*) cp "$5" "$HOME/${6#*:}"; stat -c %a "$5" > $HOME/mode ;;\n'
          '*" ssh "*) for a; do case $a in --command=*) cd "$HOME"; sh -c "${a#*=}" ;; esac;'
          ' done ;; esac')
  program(world, 'ssh', f'printf "%s\\n" "$@" >> {world.path}/argv\ncd $HOME; sh -c "$2"\n'
          'stat -c %a latent_reasoning/runs/*.env > mode || true')
  done = launch(world, script, 'run', *FLAGS[script], '--env=TOKEN', '--env=PLAIN=a b', '--',
                *MAIN, TOKEN=TOKEN)
  assert done.returncode == 0, done.stderr
  assert given(world) == f'{TOKEN}/a b'
  assert (home(world).parent / 'mode').read_text().split()[:1] in (['600'], [])
  assert 's3cret' not in (world.path / 'argv').read_text() + done.stdout + done.stderr
  left = [f for f in world.path.rglob('*') if f.is_file() and f.name != 'got' and
          b's3cret' in f.read_bytes()]
  assert left == []


@linux
def test_who_ends_the_launcher_leaves_no_secret(world):
  """Killed while it sends it: the file is gone, and the TPU is said to run."""
  program(world, 'gcloud', f'case "$*" in *.env*) echo "$5" > {world.path}/new;'
          f' mv {world.path}/new {world.path}/sent; exec sleep 60 ;; esac')
  with subprocess.Popen([home(world) / 'launch/tpu_vm.sh', 'run', *TPU, '--env=A=1', '--',
                         *MAIN], env=world.environ(), stderr=subprocess.PIPE, text=True,
                        start_new_session=True) as launcher:
    while not (world.path / 'sent').exists():
      assert launcher.poll() is None
      time.sleep(0.05)
    sent = (world.path / 'sent').read_text().strip()
    assert os.path.exists(sent)
    os.killpg(launcher.pid, signal.SIGTERM)
    said = launcher.communicate(timeout=60)[1]
  assert launcher.returncode != 0 and 'rim still runs' in said
  assert not os.path.exists(sent)


@linux
def test_env_of_a_local_run(world):
  program(world, 'python', RECORD.format(world.path, world.path),
          'home/latent_reasoning/.venv/bin')
  assert launch(world, 'gpu', 'run', '--env=TOKEN', '--env=PLAIN=p', '--', *MAIN,
                TOKEN=TOKEN).returncode == 0
  assert given(world) == f'{TOKEN}/p'


def test_env_of_slurm_is_exported_by_name(world):
  program(world, 'sbatch', RECORD.format(world.path, world.path))
  done = launch(world, 'slurm', 'run', *GPUS, '--env=TOKEN', '--env=PLAIN=p', '--', *MAIN,
                TOKEN=TOKEN)
  assert done.returncode == 0 and given(world) == f'{TOKEN}/p'
  argv = (world.path / 'argv').read_text()
  assert '--export=ALL,TOKEN,PLAIN\n' in argv and 's3cret' not in argv


def test_env_of_kubernetes_is_a_secret(world):
  yaml = pytest.importorskip('yaml')
  argv = (*KUBE, '--env=TOKEN', '--env=PLAIN=p', '--secret=wandb')
  assert launch(world, 'kubernetes', 'run', *argv, '--', *MAIN,
                TOKEN=TOKEN + '\nline').returncode == 0
  made, secret = yaml.safe_load_all((world.path / 'bin/stdin').read_text())
  pod = made['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']
  names = [source['secretRef']['name'] for source in pod['containers'][0]['envFrom']]
  assert names == ['wandb', 'rim-env'] and secret['metadata'] == {'name': 'rim-env'}
  assert (secret['kind'], secret['apiVersion']) == ('Secret', 'v1')
  assert {k: base64.b64decode(v).decode() for k, v in secret['data'].items()} == {
      'TOKEN': TOKEN + '\nline', 'PLAIN': 'p'}
  assert 's3cret' not in json.dumps(world.calls())
  launch(world, 'kubernetes', 'stop', '--name=rim')
  assert world.calls('kubectl')[-1] == ['kubectl', 'delete', 'secret', 'rim-env',
                                        '--ignore-not-found']


@pytest.mark.parametrize('script, command', [
    ('tpu_vm', 'all'), ('tpu_vm', 'run'), ('slurm', 'run'), ('gpu', 'run'),
    ('kubernetes', 'print'), ('kubernetes', 'run')])
def test_a_dry_run_keeps_secrets(world, script, command):
  done = launch(world, script, command, *FLAGS[script], '--env=TOKEN', '--env=B=s3cret',
                '--dry-run', '--', *MAIN, TOKEN=TOKEN)
  assert done.returncode == 0, done.stderr
  assert world.calls() == [] and 's3cret' not in done.stdout + done.stderr
  encoded = base64.b64encode(TOKEN.encode()).decode()
  assert encoded[:12] not in done.stdout


# --- Cloud TPU ------------------------------------------------------------------


@pytest.mark.parametrize('flags, created, reached', [
    ((), [], []),
    (('--service-account=me@p.iam', '--network=n', '--subnetwork=s'),
     ['--service-account=me@p.iam', '--network=n', '--subnetwork=s'], []),
    (('--internal_ip',), ['--internal-ips'], ['--internal-ip']),
    (('--tunnel-through-iap',), [], ['--tunnel-through-iap']),
    (('--tunnel_through_iap', '--internal-ip'), ['--internal-ips'], ['--tunnel-through-iap'])])
def test_tpu_flags_reach_gcloud(world, flags, created, reached):
  """What a TPU is made with, and how every connection goes; gcloud takes one way of the two."""
  active(world)
  assert world.launch('tpu_vm', 'all', *TPU, *flags, '--', *MAIN).returncode == 0
  create, = (c for c in world.calls('gcloud') if 'create' in c)
  assert [f for f in create if f in created] == created
  assert not created or set(create[-len(created) - 1:-1]) == set(created)
  for call in world.calls('gcloud'):
    if call[3] == 'tpu-vm' and call[4] in ('ssh', 'scp'):
      assert [f for f in call if f in ('--internal-ip', '--tunnel-through-iap')] == reached


@linux
def test_hosts_meet_at_an_open_port(world):
  """8476, not jax's own default; --env has another."""
  program(world, 'python', f'echo "$JAX_COORDINATOR_PORT" >> {world.path}/ports',
          'home/latent_reasoning/.venv/bin')
  world.answer(gcloud={'ssh': ['execute']})
  launch(world, 'tpu_vm', 'run', *TPU, '--', *MAIN)
  (home(world) / 'runs/rim.env').write_bytes(b'JAX_COORDINATOR_PORT=9999\0')  # as sent by --env
  launch(world, 'tpu_vm', 'run', *TPU, '--', *MAIN)
  assert (world.path / 'ports').read_text().split() == ['8476', '9999']


@pytest.mark.parametrize('command, status, deleted', [
    ('all', 0, True), ('all', 1, True), ('resume', 0, True), ('run', 2, True),
    ('run', 255, False)])
def test_a_tpu_that_is_done_is_deleted_or_said_to_run(world, command, status, deleted):
  """Not after a lost connection: the training goes on. Without the flag, how to delete it."""
  active(world, main=[status])
  world.answer(gcloud={'list': ['rim\tACTIVE\n'], 'tpu-vm list': ['rim\tREADY\n'],
                       'main': [status]})
  ended = world.launch('tpu_vm', command, *TPU, '--delete-when-done', '--', *MAIN)
  assert ended.returncode == status
  assert ('delete' in verbs(world)) == deleted
  assert ('rim still runs' in ended.stderr) != deleted
  world.forget()
  ended = world.launch('tpu_vm', command, *TPU, '--project=p', '--', *MAIN)
  assert 'delete' not in verbs(world) and ended.returncode == status
  line = ended.stderr.splitlines()[-1]
  assert 'not known here' in line
  assert line.endswith('launch/tpu_vm.sh delete --name=rim --zone=z --project=p')


def test_nothing_runs_where_none_was_made(world):
  world.answer(gcloud={'create': [1]})
  assert 'still runs' not in world.launch('tpu_vm', 'create', *TPU).stderr


def test_tasks_are_tpus_by_name(world):
  """Each its own TPU, name and share of the runs, at once; the secret stays out of all."""
  world.answer(gcloud={'queued-resources list': ['rim-0\tACTIVE\nrim-1\tACTIVE\n'],
                       'tpu-vm list': ['rim-0\tREADY\nrim-1\tREADY\n'], 'rim-1 main': [2]})
  (home(world) / 'runs').mkdir(exist_ok=True)
  done = launch(world, 'tpu_vm', 'all', *TPU, '--tasks=2', '--env=TOKEN=s3cret', '--', *MAIN)
  assert done.returncode == 2 and 'rim-1 ended with status 2' in done.stderr
  trained = [c for c in world.calls('gcloud') if 'worker.sh run' in ' '.join(c)]
  found = {c[5]: re.search(r'--task=(\S+)"?$', next(a for a in c if 'worker.sh' in a))[1]
           for c in trained}
  assert found == {'rim-0': '0/2', 'rim-1': '1/2'}
  assert 's3cret' not in json.dumps(world.calls()) + (
      home(world) / 'runs/rim-0.log').read_text()
  world.forget()
  assert launch(world, 'tpu_vm', 'delete', *TPU, '--tasks=2').returncode == 0
  assert sorted(c[5] for c in world.calls('gcloud')) == ['rim-0', 'rim-1']


# --- Slurm, Kubernetes -----------------------------------------------------------


def test_slurm_flags_reach_sbatch(world):
  launch(world, 'slurm', 'run', *GPUS, '--account=a', '--qos=q', '--array=0-17%4', '--', *MAIN)
  submitted, = world.calls('sbatch')
  for flag in ('--account=a', '--qos=q', '--array=0-17%4',
               '--output=runs/latent-reasoning-%A_%a.log'):
    assert flag in submitted
  world.forget()
  launch(world, 'slurm', 'run', *GPUS, '--', *MAIN)
  submitted, = world.calls('sbatch')
  assert '--output=runs/latent-reasoning-%j.log' in submitted
  assert not [f for f in submitted if re.match('--(account|qos|array|export)', f)]


def pods(world, *flags):
  yaml = pytest.importorskip('yaml')
  shown = launch(world, 'kubernetes', 'print', *KUBE, *flags, '--', *MAIN)
  assert shown.returncode == 0, shown.stderr
  made = yaml.safe_load(shown.stdout)
  spec = made['spec']
  if made['kind'] == 'JobSet':
    spec = spec['replicatedJobs'][0]['template']['spec']
  return made, spec, spec['template']['spec']


@pytest.mark.parametrize('tasks', [(), ('--tasks=9',)])
def test_kubernetes_flags_reach_the_pods(world, tasks):
  made, _, pod = pods(world, *tasks, '--service-account=trainer', '--queue=research',
                      '--secret=hub', '--shm=16Gi', '--toleration=nvidia.com/gpu',
                      '--toleration=pool=a:NoSchedule')
  assert made['metadata']['labels'] == {'kueue.x-k8s.io/queue-name': 'research'}
  assert pod['serviceAccountName'] == 'trainer'
  assert pod['tolerations'] == [
      {'key': 'nvidia.com/gpu', 'operator': 'Exists'},
      {'key': 'pool', 'operator': 'Equal', 'value': 'a', 'effect': 'NoSchedule'}]
  container, = pod['containers']
  assert container['envFrom'] == [{'secretRef': {'name': 'hub'}}]
  assert container['volumeMounts'] == [{'name': 'shm', 'mountPath': '/dev/shm'}]
  assert pod['volumes'] == [
      {'name': 'shm', 'emptyDir': {'medium': 'Memory', 'sizeLimit': '16Gi'}}]


def test_kubernetes_without_flags(world):
  """No label, right or secret is made up; /dev/shm is in memory all the same."""
  made, _, pod = pods(world)
  assert 'labels' not in made['metadata'] and 'serviceAccountName' not in pod
  assert 'tolerations' not in pod and 'envFrom' not in pod['containers'][0]
  assert pod['volumes'][0]['emptyDir'] == {'medium': 'Memory'}


def test_a_comparison_is_an_indexed_job(world):
  """A task a pod, by index; a mistake ends its index only, and starts are counted by it."""
  made, spec, pod = pods(world, '--tasks=9')
  assert (made['apiVersion'], made['kind']) == ('batch/v1', 'Job')
  assert (spec['completions'], spec['parallelism'], spec['completionMode']) == (9, 4, 'Indexed')
  rule, = spec['podFailurePolicy']['rules']
  assert (rule['action'], rule['onExitCodes']['values']) == ('FailIndex', [1, 2])
  assert pod['containers'][0]['args'][:2] == ['--task=$(JOB_COMPLETION_INDEX)/9', MAIN[0]]
  start, = pod['containers'][0]['env']
  assert 'job-index-failure-count' in start['valueFrom']['fieldRef']['fieldPath']
  launch(world, 'kubernetes', 'stop', '--name=rim', '--tasks=9')
  assert ['kubectl', 'delete', 'job', 'rim'] in world.calls()


def test_names_of_the_image_are_pinned():
  """Where a script or its help installs, it is with the tested set."""
  folder = os.path.join(os.path.dirname(__file__), '..', 'launch')
  for file in sorted(os.listdir(folder)):
    if file.endswith('.sh'):
      with open(os.path.join(folder, file), encoding='utf-8') as opened:
        for line in opened:
          if 'pip install' in line:
            assert '-c launch/constraints.txt' in line, (file, line)
