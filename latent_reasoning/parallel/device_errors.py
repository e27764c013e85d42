"""What an error of JAX means: memory, a kernel, the compiler, a driver, a held device, a peer.

JAX raises one class for all of it (JaxRuntimeError, a RuntimeError), so that only its text
tells. The texts are those of XLA, libtpu, CUDA, cuDNN, NCCL and Gloo, as users quote them
in the issues of jax-ml/jax and openxla/xla.
"""

import os
import re

import jax

from latent_reasoning.config import Config

# Of each kind a pattern of its texts, in the order in which they are asked: an old driver also
# fails to compile, and who waits for a process without memory sees it leave.
KINDS = {
    'driver': r'driver version is insufficient|InsufficientDriver|UNSUPPORTED_PTX_VERSION|'
              r'UnsupportedPtxVersion|compiled with an unsupported toolchain|'
              r'Unsupported \.version|unsupported display driver|DRIVER_MISMATCH|'
              r'Outdated [\w ]+ installation found|source was compiled with: [\d.]+|'
              r'driver is older than|driver.{0,40}too old',
    'held': r'already in used? by|libtpu_lockfile|(?:/dev/(?:accel|vfio)\S*|TPU).{0,80}'
            r'(?:Device or resource busy|is busy)|CUDA_ERROR_DEVICE_UNAVAILABLE|'
            r'DevicesUnavailable|devices? (?:is|are) busy or unavailable|'
            r'DevicePrimaryCtxRetain.{0,40}OUT_OF_MEMORY|'
            r'Could not create cudnn handle|DNN library initialization failed|'
            r'library was not initialized|library cublas was not initialized|'
            r'CUBLAS_STATUS_NOT_INITIALIZED|CUDNN_STATUS_NOT_INITIALIZED',
    'kernel': r'head dim|head_dim|mla requires cudnn|requires cuDNN version|'
              r'requires a GPU with at least|[Oo]nly support.{0,30}(?:Ampere|Hopper)|'
              r'Require at least (?:Ampere|Hopper)|cuDNN is not detected|'
              r'No execution plans support the graph|CUDNN_STATUS_NOT_SUPPORTED|'
              r'CUDNN_STATUS_ARCH_MISMATCH|Unsupported sequence length|'
              r'no kernel image is available|[Nn]o registered implementation|'
              r'custom call target.{0,80}not (?:registered|found)|'
              r'memory space (?:vmem|smem)|Mosaic (?:failed|kernel)|'
              r'Unable to load any of \{?libcudnn|CUDA_ERROR_NO_BINARY_FOR_GPU|'
              r'cudnn_frontend|cuDNN Frontend error',
    'memory': r'RESOURCE_EXHAUSTED(?!.{0,40}message larger)|[Rr]esource exhausted|'
              r'(?i:out of memory)|OUT_OF_MEMORY|STATUS_ALLOC_FAILED|MemoryAllocation|'
              r'[Ff]ailed to alloc(?:ate)? |Unable to allocate [\d.]+ [KMGT]?i?B',
    'compilation': r'compile permanent error|[Ff]ailed to compile|[Cc]ompilation fail|'
                   r'[Cc]ompile fail|LLVM compilation|ptxas (?:exited|fatal|error)|'
                   r'during compilation|XLA:TPU compile|HLO verification|MLIR.{0,40}fail',
    'peer': r'heartbeat|coordination (?:service|agent)|CoordinationService|[Ss]ocket closed|'
            r'[Bb]roken pipe|(?i:connection (?:closed|reset|refused|aborted))|Connect timeout|'
            r'[Rr]ead timeout|Gloo \w+ failed|NCCL operation.{0,60}failed|ncclRemoteError|'
            r'remote process exited|network error|another task died|'
            r'[Tt]asks? (?:is|are|has|have) (?:unhealthy|failed|died)|'
            r'[Bb]arrier (?:timed|failed)|halted unexpectedly|[Ss]lice health|preempted|'
            r'^(?:UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED)\b'}
PATTERNS = {kind: re.compile(text, re.DOTALL) for kind, text in KINDS.items()}
SIZE = r'(\d[\d.,]*)\s*(bytes|[KMGTP]?i?B|[KMGTP])(?![\w.]*\w)'
ASKED = re.compile(rf'(?:allocat\w*|alloc|reserve|Used|request for)\s+{SIZE}')
HAS = re.compile(rf'(?:of {SIZE} hbm|There (?:are|is) {SIZE} free)')


def kind(error: BaseException | str) -> str:
  """A name of `KINDS`; '': none that is known."""
  if isinstance(error, MemoryError):
    return 'memory'
  text = str(error)
  return next((name for name, pattern in PATTERNS.items() if pattern.search(text)), '')


def explain(error: BaseException | str, config: Config, training: bool = False) -> str:
  """One line: what was found, what was expected, what to do.

  Args:
    error: or its text, of a kind that is known.
    config: what runs; the flags that are proposed are not in it yet.
    training: whether a training step failed, else an evaluation or an answer.
  """
  found = kind(error)
  text = ' '.join(str(error).split())
  said = f'({text[:200]}{"…" if len(text) > 200 else ""})'
  if found == 'memory':
    flags = ' '.join(lower(config, training))
    return (f'out of memory: {asked(text)} where {available(text)}. '
            + (f'Expected less; add one or more of: {flags}' if flags else
               'Nothing is left to lower; expected a smaller model, shorter sequences '
               '(config.data.buckets), or devices with more memory (--mode=plan)'))
  if found == 'driver':
    return (f'the driver or a library is too old, or not of the version that JAX was built for '
            f'{said}; update the NVIDIA driver (nvidia-smi names it), or install a JAX for an '
            "older CUDA (pip install 'jax[cuda12]'), in an environment without another cuDNN "
            'in LD_LIBRARY_PATH')
  if found == 'held':
    pid = re.search(r'pid (\d+)', text)
    who = f'by process {pid[1]}' if pid else 'by another process, it seems'
    end = f'kill {pid[1]}' if pid else (
        'nvidia-smi, or sudo lsof -w /dev/accel* /dev/vfio/*, names it')
    other = ('. If nothing holds it, the library is too new for its driver: update the NVIDIA '
             'driver') if re.search('(?i)dnn|cublas', text) else ''
    return (f'the device is held {who} {said}; wait until that one ends, or end it '
            f'({end}). If it is gone, remove /tmp/libtpu_lockfile. Beside a training on the '
            'same machine: JAX_PLATFORMS=cpu, or on a GPU XLA_PYTHON_CLIENT_PREALLOCATE=false '
            f'for both{other}')
  if found == 'kernel':
    way = ('--config.model.attention=shared_prefix' if config.model.attention in (
        'cudnn', 'splash') else 'another JAX, made for it (pip install -U jax), or '
        'JAX_PLATFORMS=cpu')
    return ("this device has no such kernel, of config.model.attention "
            f"'{config.model.attention}' {said}; give {way}")
  if found == 'compilation':
    ways = [] if config.model.scan else ['--config.model.scan=True']
    if config.model.attention in ('cudnn', 'splash'):
      ways.insert(0, '--config.model.attention=shared_prefix')
    return (f'XLA could not compile a program {said}; try '
            f"{' or '.join([*ways, 'another version of jax'])}, and report it with this line")
  return f'another process was lost {said}'


def asked(text: str) -> str:
  """What was asked for, in words."""
  found = ASKED.search(text)
  return f'{size(found[1], found[2])} were asked for' if found else (
      f'({text[:160]})' if text else 'more was asked for')


def available(text: str) -> str:
  """What there is, by the devices themselves, by XLA's words, or of the machine."""
  if found := HAS.search(text):
    number, unit = (group for group in found.groups() if group)
    return (f"the device has {size(number, unit)}{' free' if 'free' in found[0] else ''}")
  total, where = memory()
  return f'there are {size(str(total))} of {where}{_in_use()}'


def memory() -> tuple[int, str]:
  """Bytes of this process's devices, or of the machine where they are its processors."""
  stats = [d.memory_stats() or {} for d in jax.local_devices()]
  if limits := [s['bytes_limit'] for s in stats if 'bytes_limit' in s]:
    return sum(limits), f'memory of {len(limits)} devices'
  return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'), 'memory of this machine'


def _in_use() -> str:
  """What is taken of it, in words; '' where nobody counts."""
  used = [(d.memory_stats() or {}).get('bytes_in_use') for d in jax.local_devices()]
  return '' if None in used else f', {size(str(sum(used)))} of it in use'


def size(number: str, unit: str = 'bytes') -> str:
  """Bytes in words: '187.5 GiB'; XLA's K, M, G and T are powers of 1024."""
  power = 'KMGTP'.find(unit[:1]) + 1
  count = float(number.replace(',', '')) * 1024**power
  for name in ('bytes', 'KiB', 'MiB', 'GiB'):
    if count < 1024:
      return f'{count:,.4g} {name}'
    count /= 1024
  return f'{count:,.1f} TiB'


def lower(config: Config, training: bool) -> list[str]:
  """Flags that lower the memory, the first of which cost least; none that already holds."""
  flags = []
  if training:
    size, parts = config.optim.batch_size, config.optim.grad_accum_steps
    if more := next((n for n in range(2 * parts, size + 1) if size % n == 0), 0):
      flags.append(f'--config.optim.grad_accum_steps={more}')
    if config.model.remat != 'full':
      flags.append('--config.model.remat='
                   f"{'dots' if config.model.remat == 'none' else 'full'}")
    if not 0 < config.model.loss_tile <= 512:
      flags.append(f'--config.model.loss_tile={512 if config.model.loss_tile else 4096}')
  elif config.eval.batch_size > 1:
    flags.append(f'--config.eval.batch_size={config.eval.batch_size // 2}')
  if jax.device_count() > 1 and config.mesh.fsdp == 1:
    flags.append('--config.mesh.data=1 --config.mesh.fsdp=-1')
  if training and not flags and config.optim.batch_size > 1:
    half = config.optim.batch_size // 2
    flags.append(f'--config.optim.batch_size={half}')
    if half % config.optim.grad_accum_steps:
      flags.append(f'--config.optim.grad_accum_steps={half}')
  return flags
