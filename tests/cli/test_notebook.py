"""Notebooks: installing under a live kernel, the devices of a machine, files that last."""

import json
import os
import pathlib
import subprocess
import sys
import time
import tomllib
import types

import pytest

import latent_reasoning as lr
from latent_reasoning.cli import notebook
from latent_reasoning.errors import InputError
from latent_reasoning.parallel import accelerators

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def kernel(monkeypatch):
  """A kernel that has numpy 2.0.2 loaded, and pip: kernel.pip(arguments) is its status."""
  state = types.SimpleNamespace(installed={'numpy': '2.0.2'}, calls=[], restarts=[],
                                pip=lambda wanted: 0)

  def run(argv, **_):
    assert argv[:5] == [sys.executable, '-m', 'pip', 'install', '--quiet']
    state.calls.append(argv[5:])
    status = state.pip(argv[5:])
    return types.SimpleNamespace(returncode=status, stderr='a\nERROR: no way\n' * bool(status))
  for name in notebook.FRAGILE:
    monkeypatch.delitem(sys.modules, name, raising=False)
  monkeypatch.setitem(sys.modules, 'numpy', types.SimpleNamespace(__version__='2.0.2'))
  monkeypatch.setattr(notebook.subprocess, 'run', run)
  monkeypatch.setattr(notebook, '_installed', lambda name: state.installed.get(name, ''))
  monkeypatch.setattr(accelerators, 'extra', lambda: '')
  shell = types.SimpleNamespace(kernel=types.SimpleNamespace(do_shutdown=state.restarts.append))
  monkeypatch.setattr(notebook, '_shell', lambda: shell)
  return state


def test_the_loaded_numpy_is_held(kernel):
  """Again and again, with what is loaded by then, too."""
  notebook.install()
  assert kernel.calls == [['latent_reasoning[notebooks]', 'numpy==2.0.2']]
  kernel.installed.update(jax='0.10.2', flax='0.12.8')
  sys.modules['jax'] = types.SimpleNamespace(__version__='0.10.2')
  notebook.install()
  assert kernel.calls[1:] == [['latent_reasoning[notebooks]', 'numpy==2.0.2', 'jax==0.10.2']]
  assert not kernel.restarts


def test_a_numpy_that_does_not_go_is_exchanged_and_the_kernel_restarts(kernel):
  """Said in words, and done; a cell that follows does not run on half a numpy."""
  def pip(wanted):
    if 'numpy==2.0.2' in wanted:
      return 1
    kernel.installed['numpy'] = '2.5.5'
    return 0
  kernel.pip = pip
  with pytest.raises(InputError, match='numpy 2.5.5 .loaded: 2.0.2..*run the cells again'):
    notebook.install()
  assert kernel.restarts == [True]
  sys.modules['numpy'].__version__ = '2.5.5'  # it has started again
  kernel.pip = lambda wanted: 0
  notebook.install()
  assert kernel.restarts == [True]


def test_an_old_jax_goes_before_numpy_does(kernel):
  """A kernel with a JAX that is too old keeps its numpy, and starts again for JAX."""
  kernel.installed['jax'] = '0.7.2'
  sys.modules['jax'] = types.SimpleNamespace(__version__='0.7.2')

  def pip(wanted):
    if 'jax==0.7.2' in wanted:
      return 1
    kernel.installed['jax'] = '0.10.2'
    return 0
  kernel.pip = pip
  with pytest.raises(InputError, match='jax 0.10.2'):
    notebook.install()
  assert kernel.calls[-1] == ['latent_reasoning[notebooks]', 'numpy==2.0.2']


def test_outside_of_a_kernel_it_is_said_alone(kernel, monkeypatch):
  monkeypatch.setattr(notebook, '_shell', lambda: None)
  kernel.installed['numpy'] = '2.1.0'
  with pytest.raises(InputError, match='start Python again'):
    notebook.install()


def test_what_pip_says(kernel):
  kernel.pip = lambda wanted: 1
  with pytest.raises(InputError, match=r"'latent_reasoning\[notebooks\]' failed: .*no way"):
    notebook.install()
  assert len(kernel.calls) == 2 and not kernel.restarts


def test_another_commit_of_the_package_restarts(kernel, monkeypatch):
  """The cell, run again, may have installed another version of what is loaded."""
  monkeypatch.setattr(notebook, '_commit', lambda: 'fedcba987654')
  with pytest.raises(InputError, match='latent_reasoning fedcba98'):
    notebook.install()
  assert kernel.restarts == [True]


def test_the_extra_of_the_device(kernel, monkeypatch):
  monkeypatch.setattr(accelerators, 'extra', lambda: 'cuda12')
  notebook.install('notebooks,hf')
  assert kernel.calls[0][0] == 'latent_reasoning[notebooks,hf,cuda12]'


def test_its_extras_are_there():
  extras = tomllib.loads(
      (ROOT / 'pyproject.toml').read_text('utf-8'))['project']['optional-dependencies']
  assert {'notebooks', 'tpu', 'cuda12', 'cuda13'} <= extras.keys()


@pytest.fixture
def drive(monkeypatch, tmp_path):
  """A stand-in for Google Drive."""
  module = types.ModuleType('google.colab.drive')
  module.mounted = []
  module.mount = module.mounted.append
  for name in ('google', 'google.colab'):
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
  monkeypatch.setitem(sys.modules, 'google.colab.drive', module)
  monkeypatch.setattr(notebook, 'MOUNT', str(tmp_path))
  return module


def test_a_folder_on_drive(drive, tmp_path):
  """The same one again, after the machine was lost."""
  place = lr.notebook.folder('runs/x', drive=True)
  assert place == tmp_path / 'MyDrive/latent_reasoning/runs/x' and place.is_dir()
  assert lr.notebook.folder('runs/x', drive=True) == place
  assert drive.mounted == [str(tmp_path)] * 2
  assert lr.notebook.folder('runs/x') == pathlib.Path('runs/x') and len(drive.mounted) == 2


def test_no_drive(drive, monkeypatch):
  def refuse(_):
    raise ValueError('mount\nfailed')
  drive.mount = refuse
  with pytest.raises(InputError, match='mount failed'):
    notebook.folder('x', drive=True)
  monkeypatch.setitem(sys.modules, 'google.colab.drive', None)
  with pytest.raises(InputError, match='is for Colab'):
    notebook.folder('x', drive=True)


def test_it_needs_nothing_that_is_not_installed_yet():
  """It installs numpy and JAX, so it may import neither."""
  script = ('import sys\nfor name in ("numpy", "jax", "etils", "absl", "ml_collections"):\n'
            '  sys.modules[name] = None\n'
            'import latent_reasoning as lr\nlr.notebook.install, lr.notebook.folder')
  subprocess.run([sys.executable, '-c', script], check=True, cwd=ROOT)


@pytest.mark.integration
def test_a_real_kernel_ends_to_be_started_again():
  """After the cell, whose message is there; a front end then starts it again."""
  client = pytest.importorskip('jupyter_client', reason="pip install -e '.[notebooks]'")
  manager, kernel = client.manager.start_new_kernel(
      kernel_name='python3', env={**os.environ, 'PYTHONPATH': str(ROOT)})
  try:
    reply = kernel.execute_interactive(
        'from latent_reasoning.cli import notebook\nnotebook._pip = lambda *w: ""\n'
        'import sys, types\nsys.modules["numpy"] = types.SimpleNamespace(__version__="1")\n'
        'notebook.install()', timeout=60, output_hook=lambda message: None)
    assert 'run the cells again' in reply['content']['evalue']
    until = time.monotonic() + 30
    while manager.is_alive() and time.monotonic() < until:
      time.sleep(0.1)
    assert not manager.is_alive()
  finally:
    kernel.stop_channels()
    manager.shutdown_kernel(now=True)


def test_the_first_cell_again(tmp_path, monkeypatch):
  """Twice, in a folder that holds a clone: pip and `install` alone, nothing is cloned here."""
  cells = json.loads((ROOT / 'notebooks/rim_quickstart.ipynb').read_text('utf-8'))['cells']
  first = next(''.join(c['source']) for c in cells if c['cell_type'] == 'code')
  (tmp_path / 'latent_reasoning').mkdir()
  monkeypatch.chdir(tmp_path)
  done = []
  monkeypatch.setattr(notebook, 'install', lambda: done.append('install'))
  code = first.replace("REPOSITORY = ''", "REPOSITORY = 'https://example.org/x'").replace(
      '%pip install', 'pip("install').replace('"git+{REPOSITORY}"', 'git+" + REPOSITORY)')
  names = {'pip': done.append}
  for _ in range(2):
    exec(compile(code, 'cell', 'exec'), names)
  assert done == ['install --quiet --no-deps git+https://example.org/x', 'install'] * 2
  assert [p.name for p in tmp_path.iterdir()] == ['latent_reasoning']
  exec(compile(first.replace('%pip', 'pip #'), 'cell', 'exec'), names)  # no address: nothing
  assert len(done) == 4


@pytest.mark.integration
@pytest.mark.usefixtures('quick_compilation')
def test_a_training_goes_on_after_a_disconnect(drive, tiny_config, monkeypatch, capsys):
  """The same cell, on another machine: from the newest checkpoint on Drive."""
  class Disconnects:
    def log(self, values, step):
      if step == 3:
        raise KeyboardInterrupt

    def close(self):
      pass

  def cell(machine, *loggers):
    folder = pathlib.Path(notebook.MOUNT) / machine
    folder.mkdir()
    monkeypatch.chdir(folder)
    config = tiny_config(**{
        'model.num_layers': 1, 'optim.stage1.steps': 4, 'optim.stage2.steps': 0,
        'train.log_every': 1, 'train.save_every': 2, 'train.eval_every': 0,
        'data.buckets.prefix': (20,), 'data.buckets.readout': (6,), 'data.buckets.count': (3,),
        'eval.valid_problems': 4})
    experiment = lr.Experiment(config, lr.notebook.folder('runs/x', drive=True))
    experiment.train(loggers)
    assert not list(folder.iterdir())
    return experiment
  with pytest.raises(KeyboardInterrupt):
    cell('machine1', Disconnects())
  assert cell('machine2').steps_trained() == 4
  assert 'resuming from step 2' in capsys.readouterr().err
