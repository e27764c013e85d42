"""What a run computes on: said first, refused where it is another, and in capitals."""

import os

import jax
import pytest
from parallel.test_device_errors import TEXTS
from parallel.test_multihost import CONFIG, SHORT

from latent_reasoning import main
from latent_reasoning.cli import sweep_processes
from latent_reasoning.config import Config
from latent_reasoning.errors import DeviceError, InputError
from latent_reasoning.parallel import accelerators, devices
from latent_reasoning.train import workdir


@pytest.mark.parametrize('wanted', ['gpu', 'tpu'])
def test_required_device(wanted, tmp_path, capsys):
  """Another backend than the one that JAX has: one line, nothing is made."""
  assert main.main(['main', f'--config={CONFIG}', f'--config.device={wanted}',
                    f'--workdir={tmp_path}/run']) == 2
  err = capsys.readouterr().err
  assert err.count('\n') == 1 and f"config.device is '{wanted}', but JAX runs on cpu" in err
  assert '--config.device=cpu' in err and not (tmp_path / 'run').exists()


def test_required_device_of_the_api(tiny_config, make_run, tmp_path):
  with pytest.raises(InputError, match="config.device is 'tpu', but"):
    make_run(tiny_config(device='tpu'), tmp_path)
  assert make_run(tiny_config(device='cpu'), tmp_path / 'cpu').config.device == 'cpu'


@pytest.mark.parametrize('plugin', ['libtpu', 'jax_cuda12_plugin', 'jax_cuda13_plugin', ''])
@pytest.mark.parametrize('device', ['', 'A GPU (/dev/nvidia0)'])
@pytest.mark.parametrize('platforms', ['', 'cpu,tpu'])
def test_plugins_to_plan_with(plugin, device, platforms, monkeypatch):
  """Where the machine has no device, they are not asked; a device, or what the user says, is
  left alone."""
  said = []
  monkeypatch.setattr(devices.importlib.util, 'find_spec', lambda name: name == plugin or None)
  monkeypatch.setattr(accelerators, 'find', lambda: device)
  monkeypatch.setattr(jax.config, 'update', lambda *change: said.append(change))
  monkeypatch.setenv('JAX_PLATFORMS', platforms)
  monkeypatch.setattr(type(jax.config), 'jax_platforms', '')
  for wanted in ('gpu', 'tpu', '', 'cpu'):
    if wanted in ('', 'cpu'):
      devices.require('cpu' * (wanted == 'cpu'))
    else:
      with pytest.raises(InputError):
        devices.require(wanted)
      assert not said
  quiet = bool(plugin) and not device and not platforms
  assert said == [('jax_platforms', 'cpu')] * 2 * quiet


@pytest.mark.parametrize('value', ['cuda', 'TPU', 'gpus'])
def test_unknown_device(value, capsys):
  assert main.main(['main', f'--config={CONFIG}', f'--config.device={value}']) == 2
  err = capsys.readouterr().err
  assert err.count('\n') == 1 and 'config.device' in err and 'tpu' in err


def test_a_run_may_move(tiny_config, tmp_path):
  """The key says where a run is, not what it is: it may be another one on resume."""
  place = workdir.open_workdir(tmp_path, tiny_config(device=''), True)
  place.metrics.write_text('{}\n')
  workdir.open_workdir(tmp_path, tiny_config(device='cpu'), True)


@pytest.mark.parametrize('text, error, words', [
    (TEXTS['held'][0], DeviceError, 'held by process 2718466'),
    (TEXTS['held'][3], DeviceError, 'held by another process'),
    ("Unable to initialize backend 'cuda': INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory",
     DeviceError, 'held by another process'),
    (TEXTS['driver'][0], DeviceError, 'update the NVIDIA driver'),
    ("Unknown backend 'tpu'. Available backends are ['cpu']", InputError, "expected 'cpu'"),
    ('', InputError, "expected 'cpu'")])
def test_devices_that_do_not_open(text, error, words, monkeypatch, capsys):
  """One line with what to do; status 1 of a device, 2 of a name."""
  def fail(*_):
    raise AssertionError if not text else RuntimeError(text)
  monkeypatch.setattr(jax, 'default_backend', fail)
  with pytest.raises(error, match=words):
    devices.require('')
  assert main.main(['main', f'--config={CONFIG}']) == (1 if error is DeviceError else 2)
  err = capsys.readouterr().err
  assert err.count('\n') == 1 and words in err


def test_description(tiny_config, monkeypatch):
  """Backend, kind, how many, precision, version; on one line."""
  said = devices.describe(tiny_config(**{'model.dtype': 'bfloat16'}))
  assert said.startswith(f'cpu: {jax.device_count()} device') and 'kind cpu' in said
  assert 'computes in bfloat16' in said and f'jax {jax.__version__}' in said
  assert '\n' not in said
  frozen = tiny_config(**{'optim.trainable': 'new', 'model.frozen_dtype': 'bfloat16',
                          'model.lora.rank': 2})
  assert 'frozen parameters bfloat16' in devices.describe(frozen)


@pytest.fixture
def with_accelerator(monkeypatch):
  """A machine that shows a TPU, on which JAX took the processors."""
  monkeypatch.setattr(accelerators, 'find', lambda root='/': 'A TPU (/dev/accel0)')
  monkeypatch.delenv('JAX_PLATFORMS', raising=False)


def test_fallback_in_capitals(with_accelerator, monkeypatch, capsys):
  """With the reason that JAX gives; the user's own choice is no fallback."""
  devices.say(Config())
  warning, line = capsys.readouterr().err.splitlines()
  assert warning.startswith('WARNING: RUNNING ON THE CPU, THOUGH THIS MACHINE HAS A TPU')
  assert "pip install -e '.[tpu]'" in warning and line.startswith('cpu: ')
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  devices.say(Config())
  assert 'WARNING' not in capsys.readouterr().err
  monkeypatch.setenv('JAX_PLATFORMS', '')
  monkeypatch.setattr(jax, 'devices', lambda *_: (_ for _ in ()).throw(
      RuntimeError(f"Backend 'tpu' failed to initialize: {TEXTS['held'][0]}")))
  assert 'held by process 2718466' in devices.fallback()


def test_a_sweep_says_it_of_its_runs(tmp_path, monkeypatch, capfd):
  """What a run warns of is on the sweep's own standard error, not in its log alone."""
  code = ('import os\nfrom latent_reasoning.config import Config\n'
          'from latent_reasoning.parallel import devices\n'
          "devices.accelerators.find = lambda root='/': 'A GPU (/dev/nvidia0)'\n"
          'devices.say(Config())\n')
  (tmp_path / 'child.py').write_text(code)
  monkeypatch.delenv('JAX_PLATFORMS', raising=False)
  monkeypatch.setenv('PYTHONPATH', f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
  assert sweep_processes.python('child', [], tmp_path / 'log.txt') == 0
  log, err = (tmp_path / 'log.txt').read_text(), capfd.readouterr().err
  assert log.splitlines()[0] == err.strip() and 'RUNNING ON THE CPU, THOUGH' in err
  assert log.splitlines()[1].startswith('cpu: ')


@pytest.mark.integration
def test_the_first_line_of_a_run(tmp_path, quick_compilation, capsys):
  """Of training, and of what looks at it; nothing else of JAX is opened before."""
  flags = ['main', f'--config={CONFIG}', f'--workdir={tmp_path}', *(
      f'--config.{k}={v}' for k, v in {**SHORT, 'optim.stage1.steps': 2,
                                       'optim.stage2.steps': 2}.items())]
  for mode in ('train', 'flops', 'verify'):
    assert main.main([*flags, f'--mode={mode}']) == 0
    err = capsys.readouterr().err.splitlines()
    assert err[0].startswith('cpu: ') and sum(line.startswith('cpu: ') for line in err) == 1
