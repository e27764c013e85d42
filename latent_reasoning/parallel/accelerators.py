"""What accelerator a machine has, by what Linux and the vendors' tools show of it.

Nothing but the standard library is imported here: notebooks ask before JAX is installed.
"""

import contextlib
import glob
import os
import pathlib
import subprocess

GOOGLE = '0x1ae0'  # on the PCI bus, where its network cards are too
TPUS = ('0x0027', '0x0056', '0x005e', '0x0062', '0x0063', '0x006f', '0x0076')  # v2 to v7


def find(root: str = '/') -> str:
  """'A TPU (…)' or 'A GPU (…)' with where it was seen; '': neither."""
  def there(*patterns: str) -> list[str]:
    return [f'/{os.path.relpath(name, root)}' for pattern in patterns
            for name in sorted(glob.glob(os.path.join(root, pattern)))]
  # Up to v4 a TPU is /dev/accel*, from v5e on it is /dev/vfio/N, which others may use as well.
  tpus = there('dev/accel[0-9]*') or (_has_tpu(root) and there('dev/vfio/[0-9]*'))
  if tpus:
    return f'A TPU ({tpus[0]})'
  gpus = there('dev/nvidia[0-9]*', 'dev/dxg') or ['nvidia-smi'] * bool(driver())
  return f'A GPU ({gpus[0]})' if gpus else ''


def extra(root: str = '/') -> str:
  """The extra of this package for it: tpu, cuda13, cuda12 (by the driver), or ''."""
  if find(root).startswith('A TPU'):
    return 'tpu'
  version = driver()
  return version and ('cuda13' if version >= 580 else 'cuda12') or ''


def driver() -> int:
  """Version of NVIDIA's driver; 0: none that answers."""
  try:
    asked = subprocess.run(
        ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader'],
        capture_output=True, text=True, timeout=60)
    return int(asked.stdout.split('.')[0])
  except (OSError, ValueError, subprocess.SubprocessError):
    return 0


def _has_tpu(root: str) -> bool:
  """Whether the environment, or the PCI bus, names a TPU."""
  if os.environ.get('PJRT_DEVICE') == 'TPU' or any(
      name.startswith(('TPU_', 'COLAB_TPU')) for name in os.environ):
    return True
  for place in glob.glob(os.path.join(root, 'sys/bus/pci/devices/*')):
    with contextlib.suppress(OSError):
      vendor, device = (pathlib.Path(place, name).read_text().strip()
                        for name in ('vendor', 'device'))
      if vendor == GOOGLE and device in TPUS:
        return True
  return False
