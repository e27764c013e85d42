"""Several processes that train one model: how they meet, agree, write, and notice a loss.

Every process runs the same program on the same batches (single program, multiple data).
Process 0 writes logs and results, all of them write their part of a checkpoint. A process
that is lost ends the others with the status `LOST`, and the same command goes on from the
newest checkpoint. With one process all of this does nothing.
"""

import contextlib
import json
import os
import re
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from latent_reasoning.errors import InputError

T = TypeVar('T')
LOST = 75  # exit status: another process was lost or hangs (sysexits' EX_TEMPFAIL)
_place = [0, 1]  # index of this process, and how many there are


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
  try:
    # JAX aborts without a word of ours, so `Watch` has to be first to run out of patience.
    jax.distributed.initialize(*given, heartbeat_timeout_seconds=int(patience) + 30,
                               shutdown_timeout_seconds=60)
  except (RuntimeError, ValueError, TypeError) as error:
    raise InputError(f'the processes could not join: {str(error).splitlines()[0]}; check '
                     'that --coordinator is HOST:PORT of process 0, open to all, or that '
                     '--distributed runs under Slurm or on Cloud TPU') from None
  _place[:] = jax.process_index(), jax.process_count()


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

  Args:
    patience: seconds from one `beat` to the next, from the first on; longer than the
      longest step with its compilation, validation or save.
  """

  def __init__(self, patience: float):
    self._patience, self._last = patience, None
    if count() > 1:
      threading.Thread(target=self._run, daemon=True).start()

  def beat(self) -> None:
    self._last = time.monotonic()

  def stop(self) -> None:
    self._last = None

  def _run(self):
    while True:
      time.sleep(min(1.0, self._patience / 4))
      if self._last is not None and time.monotonic() - self._last > self._patience:
        hard_exit(LOST, f'no step was finished within config.train.peer_timeout '
                  f'{self._patience:g} s: another process hangs or is gone')


@contextlib.contextmanager
def exit_on_peer_loss():
  """Ends this process where an error of JAX's says that another one is gone, before
  anything else waits for that one."""
  import jax
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if count() == 1:
      raise
    hard_exit(LOST, f'another process was lost ({str(error)[:200]})')


def hard_exit(status: int, reason: str = '') -> None:
  """Ends this process at once: nothing may wait for processes that are gone."""
  if reason:
    print(f'error: {reason}. The same command, in every process, goes on from the newest '
          'checkpoint', file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def finish(status: int) -> None:
  """Ends the program: together with the others where all went well or was saved, and at
  once where not, before what was left half done tells of it in tracebacks."""
  if count() > 1 and status in (0, 143):
    import jax
    jax.distributed.shutdown()
  hard_exit(status)
