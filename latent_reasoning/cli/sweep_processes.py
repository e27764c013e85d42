"""The processes of a sweep: what each prints is kept, and signals are passed on to it."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence

from latent_reasoning.cli.sweep_share import WHOLE, Slot
from latent_reasoning.parallel import devices, multihost

_running: set[subprocess.Popen] = set()


def child(flags: Sequence[str], place: pathlib.Path, slot: Slot = WHOLE) -> int:
  """Runs one training with what it prints kept in its folder; of several processes that
  train it together, each keeps its own."""
  place.mkdir(parents=True, exist_ok=True)
  log = 'log.txt' if multihost.is_primary() else f'log-{multihost.index()}.txt'
  environment = {'CUDA_VISIBLE_DEVICES': slot.gpu} if slot.gpu else {}
  if slot.core is not None:
    os.sched_setaffinity(0, {slot.core})  # of this thread, and of the process that it starts
    environment['JAX_PLATFORMS'] = 'cpu'
  return python('latent_reasoning.main', flags, place / log, environment)


def python(module: str, flags: Sequence[str], log: pathlib.Path,
           environment: Mapping[str, str] | None = None) -> int:
  """Runs one process; passes signals on. Returns its status."""
  here = threading.current_thread() is threading.main_thread()
  with log.open('a', encoding='utf-8') as log, os.fdopen(os.dup(2), 'wb') as ours, (
      passing_on([]) if here else contextlib.nullcontext()):
    process = subprocess.Popen(
        [sys.executable, '-m', module, *flags], stdout=log, stderr=log, start_new_session=True,
        pass_fds=(ours.fileno(),), env={**os.environ, **(environment or {}),
                                        devices.RELAY: str(ours.fileno())})
    _running.add(process)
    try:
      return process.wait()
    finally:
      _running.discard(process)


@contextlib.contextmanager
def passing_on(asked: list[int]):
  """Sends SIGINT and SIGTERM to what runs, and notes the status that they ask for."""
  def handle(number, _):
    asked.append(128 + number)
    for process in list(_running):
      process.send_signal(number)
  old = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)
