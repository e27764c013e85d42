"""Accelerators are found by what Linux and the vendors' tools show of them."""

import os
import types

import pytest

from latent_reasoning.parallel import accelerators

PCI = 'sys/bus/pci/devices/0000:05'


def on_the_bus(vendor, device):
  return {f'{PCI}/vendor': f'{vendor}\n', f'{PCI}/device': f'{device}\n'}


TPU, NETWORK = on_the_bus('0x1ae0', '0x0062'), on_the_bus('0x1ae0', '0x0042')


@pytest.mark.parametrize('files, environ, driver, said, extra', [
    ({}, {}, None, '', ''),
    ({'dev/accel0': ''}, {}, None, 'A TPU (/dev/accel0)', 'tpu'),
    ({'dev/accel0': '', 'dev/nvidia0': ''}, {}, '580.1', 'A TPU (/dev/accel0)', 'tpu'),
    ({'dev/accel': ''}, {}, None, '', ''),
    # At /dev/vfio other things may be, too.
    ({'dev/vfio/0': '', **TPU}, {}, None, 'A TPU (/dev/vfio/0)', 'tpu'),
    ({'dev/vfio/0': ''}, {'TPU_WORKER_ID': '0'}, None, 'A TPU (/dev/vfio/0)', 'tpu'),
    ({'dev/vfio/0': ''}, {'COLAB_TPU_1VM': '1'}, None, 'A TPU (/dev/vfio/0)', 'tpu'),
    ({'dev/vfio/7': ''}, {'PJRT_DEVICE': 'TPU'}, None, 'A TPU (/dev/vfio/7)', 'tpu'),
    ({'dev/vfio/0': ''}, {'PJRT_DEVICE': 'CPU'}, None, '', ''),
    ({'dev/vfio/0': ''}, {}, None, '', ''),
    ({'dev/vfio/0': '', **NETWORK}, {}, None, '', ''),
    ({'dev/vfio/0': '', f'{PCI}/vendor': '0x1ae0\n'}, {}, None, '', ''),
    ({'dev/vfio/12': '', **on_the_bus('0x10de', '0x0062')}, {}, None, '', ''),
    ({'dev/vfio/vfio': '', **TPU}, {}, None, '', ''),
    # Of a GPU the driver says what it can run; without its tool, nothing is known of it.
    ({'dev/nvidia3': ''}, {}, '550.54.15', 'A GPU (/dev/nvidia3)', 'cuda12'),
    ({'dev/nvidia3': ''}, {}, None, 'A GPU (/dev/nvidia3)', ''),
    ({'dev/dxg': ''}, {}, '600.1', 'A GPU (/dev/dxg)', 'cuda13'),
    ({}, {}, '579.99', 'A GPU (nvidia-smi)', 'cuda12'),
    ({}, {}, '580.65.06\n580.65.06', 'A GPU (nvidia-smi)', 'cuda13'),
    ({}, {}, 'NVIDIA-SMI has failed', '', ''), ({}, {}, 'No devices were found', '', ''),
    ({}, {}, '', '', '')])
def test_find(files, environ, driver, said, extra, tmp_path, monkeypatch):
  for name in [n for n in os.environ if n.startswith(('TPU_', 'PJRT', 'COLAB_TPU'))]:
    monkeypatch.delenv(name)
  for name, value in environ.items():
    monkeypatch.setenv(name, value)
  for name, text in files.items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)

  def run(argv, **_):
    if driver is None:
      raise FileNotFoundError(argv[0])
    return types.SimpleNamespace(stdout=driver)
  monkeypatch.setattr(accelerators.subprocess, 'run', run)
  assert accelerators.find(str(tmp_path)) == said
  assert accelerators.extra(str(tmp_path)) == extra
