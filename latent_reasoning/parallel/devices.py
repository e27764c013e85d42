"""The devices of this process: what they are, whether they are those that were asked for."""

import contextlib
import importlib.util
import os
import sys

import jax

from latent_reasoning.config import Config
from latent_reasoning.errors import DeviceError, InputError
from latent_reasoning.parallel import accelerators, device_errors

RELAY = 'LATENT_REASONING_WARN_TO'  # descriptor of a sweep's own standard error, in its runs
_said: set[str] = set()  # in this process


def require(wanted: str) -> None:
  """Opens the devices.

  Args:
    wanted: config.device.

  Raises:
    InputError: JAX has none, or others than those wanted.
    DeviceError: they are held, or their driver is too old.
  """
  if wanted in ('', 'cpu'):
    _quiet()
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


def _quiet() -> None:
  """Leaves the plugins alone that are there to plan with (extras plan-tpu, plan-gpu), where the
  machine has no device of theirs: each says so in a page of errors, and computes nothing."""
  if os.environ.get('JAX_PLATFORMS') or jax.config.jax_platforms:
    return
  plugins = ('libtpu', 'jax_cuda12_plugin', 'jax_cuda13_plugin')
  if any(map(importlib.util.find_spec, plugins)) and not accelerators.find():
    jax.config.update('jax_platforms', 'cpu')


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
  seen = accelerators.find()
  if not seen:
    return ''
  backend = 'tpu' if 'TPU' in seen else 'gpu'
  extra = accelerators.extra() or backend
  return (f'WARNING: RUNNING ON THE CPU, THOUGH THIS MACHINE HAS {seen}. {why_not(backend)}. '
          f"Install JAX for it (pip install -e '.[{extra}]'), free it, or set "
          'JAX_PLATFORMS=cpu where the CPU is meant')


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
