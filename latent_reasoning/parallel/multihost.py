"""Several processes that train one model: how they meet, agree, write, and notice a loss.

Every process runs the same program on the same batches (single program, multiple data).
Process 0 writes logs and results, all of them write their part of a checkpoint. A process
that is lost ends the others with the status `LOST`, and the same command goes on from the
newest checkpoint. A process that fails in another way ends them all with the status `FAILED`
and says why in each: a restart would fail again. With one process all of this does nothing.
"""

import contextlib
import json
import os
import re
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

from latent_reasoning.config import Config
from latent_reasoning.errors import DeviceError, InputError, TrainingError
from latent_reasoning.parallel import programs

T = TypeVar('T')
LOST = 75  # exit status: another process was lost or hangs (sysexits' EX_TEMPFAIL)
FAILED = 1  # out of memory, a kernel or a driver that is not there, an error of XLA
# Keys of the store that the processes share, in process 0: why all end, and who compiles.
ENDED, COMPILING = 'latent_reasoning/ended', 'latent_reasoning/compiling'
TICK = 1.0  # seconds between two looks at it
_place = [0, 1]  # index of this process, and how many there are
_ending = threading.Event()  # this process ends by itself, and says why


def start(coordinator: str | None, processes: int | None, process: int | None, detect: bool,
          patience: float) -> None:
  """Joins the other processes; before JAX is asked for anything else.

  Args:
    coordinator: HOST:PORT where process 0 can be reached.
    processes: how many there are.
    process: which one this is, from 0.
    detect: whether Slurm or Cloud TPU say all that instead.
    patience: seconds without a sign after which a process counts as lost.

  Raises:
    InputError: some of the three are missing, or the others could not be reached.
  """
  given = (coordinator, processes, process)
  if all(value is None for value in given) and not detect:
    return
  if not detect and any(value is None for value in given):
    raise InputError('of --coordinator, --num_processes and --process_id some are missing; '
                     'give all three, or --distributed alone under Slurm or on Cloud TPU')
  if not detect and not (re.fullmatch(r'.+:\d+', coordinator) and 0 <= process < processes):
    raise InputError(f'--coordinator={coordinator} --num_processes={processes} --process_id='
                     f'{process}; expected HOST:PORT, and a process_id from 0, below their '
                     'number')
  import jax

  from latent_reasoning.parallel import devices
  try:
    # JAX aborts without a word of ours, so `Watch` has to be first to run out of patience.
    jax.distributed.initialize(*given, heartbeat_timeout_seconds=int(patience) + 30,
                               shutdown_timeout_seconds=60)
  except (RuntimeError, ValueError, TypeError) as error:
    raise InputError(f'the processes could not join: {str(error).splitlines()[0]}; check '
                     'that --coordinator is HOST:PORT of process 0, open to all, or that '
                     '--distributed runs under Slurm or on Cloud TPU') from None
  devices.require('')  # or what it says of a device that is held would be a traceback
  _place[:] = jax.process_index(), jax.process_count()
  threading.Thread(target=_listen, daemon=True).start()


def count() -> int:
  return _place[1]


def index() -> int:
  return _place[0]


def stand_for(process: int | None, processes: int | None) -> int:
  """Takes the place of the process that this one will start in its stead, without joining
  the others: it does what only one may do if that one would.

  Args:
    process, processes: index and number, where they were given; None: as Slurm or Cloud TPU
      say.

  Returns:
    how many there will be.
  """
  if process is None:
    process = int(_declared(('SLURM_PROCID', 'TPU_WORKER_ID'), 'agent-worker-number', '0'))
    processes = len(_declared(('TPU_WORKER_HOSTNAMES',), 'worker-network-endpoints',
                              '1').split(','))
    processes = int(os.environ.get('SLURM_STEP_NUM_TASKS', processes))
  _place[0] = process
  return processes


def _declared(names: tuple[str, ...], attribute: str, default: str) -> str:
  """The first of some variables, or an attribute of Google's metadata server."""
  if found := next((os.environ[n] for n in names if n in os.environ), ''):
    return found
  if any(name.startswith('SLURM_') for name in os.environ):
    return default
  request = urllib.request.Request(
      f'http://metadata.google.internal/computeMetadata/v1/instance/attributes/{attribute}',
      headers={'Metadata-Flavor': 'Google'})
  try:
    with urllib.request.urlopen(request, timeout=5) as answer:
      return answer.read().decode()
  except OSError:  # not on Google's machines
    return default


def is_primary() -> bool:
  """Whether this process writes what only one may write."""
  return _place[0] == 0


def broadcast(value: T) -> T:
  """The value of process 0, which JSON must hold, in all."""
  if count() == 1:
    return value
  from jax.experimental import multihost_utils as utils
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  size = int(utils.broadcast_one_to_all(np.int32(len(data))))
  padded = np.zeros(size, np.uint8)
  padded[:len(data)] = data[:size]
  return json.loads(bytes(np.asarray(utils.broadcast_one_to_all(padded), np.uint8)))


def all_processes(true: bool) -> bool:
  """Whether it is true in all processes."""
  if count() == 1:
    return true
  from jax.experimental import multihost_utils as utils
  return bool(np.all(utils.process_allgather(np.int32(true))))


def primary_first(make: Callable[[], T], shared: Any = None) -> T:
  """What `make` returns, in process 0 before it is called in the others.

  Args:
    make: what is done.
    shared: where `make` keeps in process 0 what the others need not find out again
      (`values`, `first`; data.hub.Shared).

  Raises:
    InputError: in all of them, where it does in process 0.
  """
  if count() == 1:
    return make()
  found, reason = None, ''
  if shared:
    shared.values, shared.first = {}, is_primary()
  try:
    if is_primary():
      try:
        found = make()
      except InputError as error:
        reason = str(error)
    if reason := broadcast(reason):
      raise InputError(reason)
    if shared:
      shared.values = broadcast(shared.values)
    return found if is_primary() else make()
  finally:
    if shared:
      shared.values, shared.first = None, True


def fetch(array: Any) -> np.ndarray:
  """The whole array in every process, wherever its parts lie."""
  if count() == 1 or array.is_fully_addressable or array.is_fully_replicated:
    return np.asarray(array)
  from jax.experimental import multihost_utils as utils
  return np.asarray(utils.process_allgather(array, tiled=True))


def preempted(step: int) -> bool:
  """Whether all processes should save now and stop, because one was sent SIGTERM.

  True at the same step in all; must be asked at every step, in order.
  """
  from jax.experimental import multihost_utils as utils
  return utils.reached_preemption_sync_point(step)


def check_shared(path) -> None:
  """Raises InputError unless all processes see one folder, which must be there."""
  if count() == 1:
    return
  token = path / f'.seen-{broadcast(os.getpid())}'
  if is_primary():
    token.write_text('')
  broadcast(0)  # it is written now
  seen = all_processes(token.exists())
  if is_primary():
    token.unlink()
  if not seen:
    raise InputError(f'{path} is not one folder to all {count()} processes, but each writes '
                     'its part of a checkpoint; expected a shared disk or a bucket, such as '
                     '--workdir=gs://…')


class Watch:
  """Ends this process where nothing moves: the other hangs, and no error will come.

  Time in which a program is compiled, here or in another process, does not count.

  Args:
    patience: seconds from one `beat` to the next, from the first on; longer than the
      longest step, validation or save.
  """

  def __init__(self, patience: float):
    self._patience, self._last, self._signs = patience, None, None
    if count() > 1:
      programs.listen()
      threading.Thread(target=self._run, daemon=True).start()

  def beat(self) -> None:
    self._last, self._signs = time.monotonic(), None

  def stop(self) -> None:
    self._last = None

  def _run(self):
    while True:
      time.sleep(min(TICK, self._patience / 4))
      if programs.compiling():
        _tell_compiling()
        if self._last is not None:
          self.beat()
      if self._last is None:
        continue
      idle = time.monotonic() - self._last
      if idle > self._patience / 2:
        signs = _compiling_elsewhere()
        if self._signs not in (None, signs):
          self.beat()
          idle = 0.0
        self._signs = signs
      if self._last is not None and idle > self._patience:
        exit_lost(f'no step was finished within config.train.peer_timeout '
                  f'{self._patience:g} s: another process hangs or is gone')


@contextlib.contextmanager
def explained(config: Config, training: bool = False) -> Iterator[None]:
  """Turns an error of JAX whose kind is known into one line.

  Of several processes, this one ends at once, before anything else waits for one that is gone:
  with the status `LOST` where another one was lost, and else all of them with status 1, for
  the same would happen again.

  Args:
    config: what runs.
    training: as `device_errors.explain`.

  Raises:
    DeviceError: with that line.
  """
  try:
    yield
  except (DeviceError, TrainingError):
    raise
  except (RuntimeError, MemoryError) as error:
    from latent_reasoning.parallel import device_errors  # imports JAX
    found, several = device_errors.kind(error), count() > 1
    if several and found == 'peer':
      exit_lost(device_errors.explain(error, config, training))
    if several and not found and type(error).__name__ in ('JaxRuntimeError', 'XlaRuntimeError'):
      traceback.print_exc()
      exit_all(f'JAX failed: {str(error)[:200]}')
    if not found or found == 'peer':
      raise
    text = device_errors.explain(error, config, training)
    if several:
      exit_all(text)
    raise DeviceError(text) from error


def _store() -> Any:
  """The key-value store of the processes; None: they are not, or no more, joined."""
  from jax._src import distributed  # JAX has no public way to it
  return distributed.global_state.client


def _ask(question: Callable[[Any], T], default: T, seconds: float = TICK) -> T:
  """What the store says to a question; the default where process 0 does not answer soon:
  JAX aborts who waits longer for it."""
  found = [default]

  def ask():
    with contextlib.suppress(Exception):  # it is gone, or has no such key
      found[0] = question(_store())
  thread = threading.Thread(target=ask, daemon=True)
  thread.start()
  thread.join(seconds)
  return found[0]


def _tell_compiling() -> None:
  """Says to the others that this process lives; they see that the value changes."""
  _ask(lambda store: store.key_value_set(f'{COMPILING}/{_place[0]}', str(time.time_ns()),
                                         allow_overwrite=True), None)


def _compiling_elsewhere() -> list[tuple[str, str]]:
  return _ask(lambda store: sorted(store.key_value_dir_get(COMPILING)), [])


def _why_ended() -> str:
  """Why another process ended all of them; '': none did."""
  return _ask(lambda store: store.key_value_try_get(ENDED), '')


def _listen() -> None:
  while _store() is not None and not _ending.is_set():
    if reason := _why_ended():
      hard_exit(FAILED, reason)
    time.sleep(TICK)


def exit_all(reason: str) -> None:
  """Ends this process with the status `FAILED`, and the others, which say the reason too."""
  _ending.set()
  _ask(lambda store: store.key_value_set(ENDED, f'process {_place[0]}: {reason}'), None,
       5 * TICK)
  if is_primary():
    time.sleep(3 * TICK)  # it holds what the others read
  hard_exit(FAILED, reason)


def exit_lost(reason: str) -> None:
  """Ends this process with the status `LOST`, or as another one that failed has asked for."""
  if why := _why_ended():
    hard_exit(FAILED, why)
  hard_exit(LOST, f'{reason}. The same command, in every process, goes on from the newest '
            'checkpoint')


def hard_exit(status: int, reason: str = '') -> None:
  """Ends this process at once: nothing may wait for processes that are gone."""
  if reason:
    print(f'error: {reason}', file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def finish(status: int) -> None:
  """Ends the program: together with the others where all went well or was saved, and at
  once where not, before what was left half done tells of it in tracebacks."""
  if count() > 1 and status in (0, 143):
    import jax
    _ending.set()
    jax.distributed.shutdown()
  hard_exit(status)
