"""The devices of this process: what they are, whether they are those that were asked for."""

import contextlib
import glob
import os
import pathlib
import shutil
import subprocess
import sys

import jax

from latent_reasoning.config import Config
from latent_reasoning.errors import DeviceError, InputError
from latent_reasoning.parallel import device_errors

RELAY = 'LATENT_REASONING_WARN_TO'  # descriptor of a sweep's own standard error, in its runs
GOOGLE = '0x1ae0'  # on the PCI bus, where its network cards are too
TPUS = ('0x0027', '0x0056', '0x005e', '0x0062', '0x0063', '0x006f', '0x0076')  # v2 to v7
_said: set[str] = set()  # in this process


def require(wanted: str) -> None:
  """Opens the devices.

  Args:
    wanted: config.device.

  Raises:
    InputError: JAX has none, or others than those wanted.
    DeviceError: they are held, or their driver is too old.
  """
  try:
    found = jax.default_backend()
  except (RuntimeError, AssertionError) as error:  # JAX asserts that there is one
    raise _not_there(error) from None
  if wanted and found != wanted:
    why = why_not(wanted) or f"JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS', '')!r}"
    raise InputError(
        f"config.device is '{wanted}', but JAX runs on {found} here ({why}); mend that, or run "
        f'on what there is with --config.device={found}'
        + (', or set JAX_PLATFORMS=cpu' if wanted == 'cpu' else ''))


def _not_there(error: BaseException) -> Exception:
  if device_errors.kind(error) in ('held', 'driver', 'memory'):
    return DeviceError(_at_start(str(error)))
  platforms, text = os.environ.get('JAX_PLATFORMS', ''), ' '.join(str(error).split())
  return InputError(f'JAX_PLATFORMS is {platforms!r}, and JAX has no such device here'
                    f"{f' ({text})' if text else ''}; expected 'cpu', or none, to take what "
                    'there is')


def _at_start(text: str) -> str:
  if device_errors.kind(text) == 'memory':  # nothing of ours is there yet: another's is
    text = f'already in use by another process: {text}'
  return device_errors.explain(text, Config())


def why_not(backend: str) -> str:
  """What JAX says of a backend that it does not have; '' where it has it."""
  try:
    jax.devices(backend)
  except (RuntimeError, AssertionError) as error:
    text = ' '.join(str(error).split())
    return _at_start(text) if device_errors.kind(text) in (
        'held', 'driver', 'memory') else text
  return ''


def describe(config: Config) -> str:
  """Backend, kind and number of the devices, precision and version, in one line."""
  found = jax.devices()
  kinds = ', '.join(sorted({d.device_kind for d in found}))
  processes = f' in {jax.process_count()} processes' if jax.process_count() > 1 else ''
  frozen = (f', frozen parameters {config.model.frozen_dtype}'
            if config.optim.trainable == 'new' else '')
  products = jax.config.jax_default_matmul_precision or 'default'
  return (f"{jax.default_backend()}: {len(found)} device{'s' * (len(found) != 1)} of kind "
          f'{kinds}{processes}; computes in {config.model.dtype}{frozen} (matrix products: '
          f'{products} precision); jax {jax.__version__}')


def fallback() -> str:
  """In capitals, that JAX took the processors where there is an accelerator; else ''."""
  if jax.default_backend() != 'cpu' or 'cpu' in os.environ.get('JAX_PLATFORMS', '').split(','):
    return ''  # the user's own choice
  seen = accelerators()
  if not seen:
    return ''
  backend = 'tpu' if 'TPU' in seen else 'gpu'
  return (f'WARNING: RUNNING ON THE CPU, THOUGH THIS MACHINE HAS {seen}. {why_not(backend)}. '
          f"Install JAX for it (pip install -e '.[{backend}]'), free it, or set "
          'JAX_PLATFORMS=cpu where the CPU is meant')


def accelerators() -> str:
  """What the system shows of accelerators, whether JAX uses them or not; '': nothing."""
  if found := glob.glob('/dev/accel*'):
    return f'A TPU ({found[0]})'
  if (found := glob.glob('/dev/vfio/[0-9]*')) and _has_tpu():  # any device may lie there
    return f'A TPU ({found[0]})'
  if found := glob.glob('/dev/nvidia[0-9]*') or glob.glob('/dev/dxg'):
    return f'A GPU ({found[0]})'
  return 'A GPU (nvidia-smi)' if shutil.which('nvidia-smi') and _lists_gpus() else ''


def _has_tpu() -> bool:
  """Whether the environment, or the PCI bus, names a TPU."""
  if os.environ.get('PJRT_DEVICE') == 'TPU' or any(
      name.startswith(('TPU_', 'COLAB_TPU')) for name in os.environ):
    return True
  for file in glob.glob('/sys/bus/pci/devices/*'):
    with contextlib.suppress(OSError):
      vendor, device = (pathlib.Path(file, name).read_text().strip()
                        for name in ('vendor', 'device'))
      if vendor == GOOGLE and device in TPUS:
        return True
  return False


def _lists_gpus() -> bool:
  try:
    listed = subprocess.run(['nvidia-smi', '-L'], capture_output=True, text=True, timeout=10)
  except (OSError, subprocess.SubprocessError):
    return False
  return 'GPU 0' in listed.stdout


def say(config: Config, once: bool = False) -> None:
  """Prints what the run computes on, and in capitals where that is the wrong place.

  Args:
    config: of the run.
    once: not where this process has said it already.
  """
  line, warning = describe(config), fallback()
  if once and line in _said:
    return
  _said.add(line)
  for text in filter(None, (warning, line)):
    print(text, file=sys.stderr, flush=True)
  if warning and (parent := os.environ.get(RELAY, '')).isdecimal():  # whose log nobody reads
    with contextlib.suppress(OSError):
      os.write(int(parent), f'{warning}\n'.encode())
