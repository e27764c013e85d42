"""What is installed: bounds that were tested, the set that CI pins, extras, the licence."""

import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['project']
EXTRAS = PROJECT['optional-dependencies']
CORE = {r.name: r for r in map(Requirement, PROJECT['dependencies'])}
BOUND = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'grain')
LINES = [line for line in (ROOT / 'launch/constraints.txt').read_text('utf-8').splitlines()
         if line and not line.startswith('#')]
PINS = [Requirement(line) for line in LINES]


def pinned(python):
  """{name: version} for a version of Python; a name has one."""
  found = {}
  for pin in PINS:
    if pin.marker is None or pin.marker.evaluate({**default_environment(),
                                                  'python_version': python}):
      assert pin.name not in found, pin.name
      specifier, = pin.specifier
      assert specifier.operator == '=='
      found[pin.name] = Version(specifier.version)
  return found


@pytest.mark.parametrize('name', BOUND)
def test_upper_bounds_are_those_that_were_tested(name):
  """The next minor version of the newest that is pinned is the first that is refused."""
  newest = max(pinned(python)[name] for python in ('3.11', '3.12'))
  allowed, following = CORE[name].specifier, f'{newest.major}.{newest.minor + 1}'
  assert newest in allowed and following not in allowed
  assert f'{newest.major}.{newest.minor}.999' in allowed


@pytest.mark.parametrize('python', ['3.11', '3.12', '3.13'])
def test_the_pinned_set_fits(python):
  """It has every dependency, within its bounds."""
  pins = pinned(python)
  for requirement in map(Requirement, [*PROJECT['dependencies'], *EXTRAS['test'],
                                       *EXTRAS['report']]):
    if requirement.name != PROJECT['name']:
      name = re.sub(r'[-_.]+', '-', requirement.name.lower())
      assert pins[name] in requirement.specifier, requirement


def test_the_pinned_set_names_no_place():
  """Versions alone: no address, no index, no folder; and no tool that builds are made with,
  since pip applies it inside of builds as well."""
  assert all(re.fullmatch(r"[a-z0-9-]+==[a-z0-9.]+(; python_version (<|>=) '3\.12')?", line)
             for line in LINES)
  assert not {'pip', 'setuptools', 'wheel', PROJECT['name']} & {pin.name for pin in PINS}


def test_ci_installs_it_by_the_commands_of_the_readme():
  text = (ROOT / '.ci/run').read_text('utf-8')
  assert re.search(r'export .*PIP_CONSTRAINT=\$PWD/launch/constraints\.txt', text)
  assert text.index('PIP_CONSTRAINT') < text.index('eval "$TRAIN')


def test_extras():
  """One for each kind of device, by the names of JAX; none has bounds of its own for it."""
  for extra, wanted in {'cuda12': 'cuda12', 'cuda13': 'cuda13', 'tpu': 'tpu'}.items():
    requirement, = map(Requirement, EXTRAS[extra])
    assert (requirement.name, requirement.extras) == ('jax', {wanted})
    assert not requirement.specifier
  assert {'wandb', 'gcs', 's3', 'hf', 'gpu'} <= EXTRAS.keys()
  for requirements in EXTRAS.values():
    for requirement in map(Requirement, requirements):
      if requirement.name == PROJECT['name']:
        assert requirement.extras <= EXTRAS.keys()


def test_an_extra_that_an_error_names_is_there():
  for file in (ROOT / 'latent_reasoning').rglob('*.py'):
    for named in re.findall(r"'\.\[([\w,-]+)\]'", file.read_text('utf-8')):
      assert set(named.split(',')) <= EXTRAS.keys(), (file, named)


def test_the_licence_is_an_spdx_expression():
  """A table is refused from February 2027 on; so are classifiers of a licence beside it."""
  assert PROJECT['license'] == 'Apache-2.0'
  assert not [c for c in PROJECT.get('classifiers', ()) if c.startswith('License')]


def test_imports_from_the_folder_that_holds_the_clone(tmp_path):
  """There a folder has the package's name; as a path entry, the installed one comes first."""
  (tmp_path / 'latent_reasoning').symlink_to(ROOT)
  script = 'import latent_reasoning; print(latent_reasoning.load_config)'
  done = subprocess.run([sys.executable, '-c', script], cwd=tmp_path, capture_output=True,
                        text=True)
  assert done.returncode == 0 and 'load_config' in done.stdout, done.stderr


@pytest.mark.integration
def test_a_build_beside_the_pinned_set(tmp_path):
  """pip reads PIP_CONSTRAINT inside an isolated build, too."""
  done = subprocess.run(
      [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--quiet', '--wheel-dir', tmp_path,
       str(ROOT)], capture_output=True, text=True, cwd=tmp_path, env={
           **os.environ, 'PIP_CONSTRAINT': str(ROOT / 'launch/constraints.txt')})
  if 'No matching distribution found for setuptools' in done.stderr:
    pytest.skip('no package index here')
  assert done.returncode == 0, done.stderr
  assert len(list(tmp_path.glob('*.whl'))) == 1
