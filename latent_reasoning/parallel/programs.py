"""Compiled programs of this process: which one is being compiled, said, counted, released.

JAX tells of each trace, lowering and compilation when it begins and when it ends
(jax.monitoring). Each compiled program holds memory maps, of which Linux gives a process
vm.max_map_count (65,530); beyond, XLA crashes.
"""

import contextlib
import gc
import pathlib
import sys
import threading
from collections.abc import Iterator

import tqdm

COMPILE = '/jax/core/compile/'  # events of jaxpr_trace, jaxpr_to_mlir_module, backend_compile
BACKEND = f'{COMPILE}backend_compile_duration'
NOTICE = 3.0  # seconds of a compilation that is worth a line at its end
LONG = 30.0  # and one while it lasts
MAPS = 65_530  # Linux's default of vm.max_map_count
EVERY = 16  # programs between two looks at the maps, which take milliseconds


class _Compilations:
  """What JAX reported: how many events are open, and how many programs were made."""

  def __init__(self):
    self.open, self.count, self.looked = 0, 0, 0
    self.due = False  # that all are forgotten
    self.label = ''
    self.lock = threading.Lock()
    self.listening = False
    self.timer: threading.Timer | None = None

  def begins(self, event: str, value: float, fun_name: str = '', **_) -> None:
    if not event.startswith(COMPILE):
      return
    with self.lock:
      self.open += 1
    if event == BACKEND:
      self.timer = threading.Timer(LONG, say, [
          f'compiling {self.label or fun_name} for {LONG:.0f} s now …'])
      self.timer.daemon = True
      self.timer.start()

  def ends(self, event: str, seconds: float, fun_name: str = '', **_) -> None:
    if not event.startswith(COMPILE):
      return
    with self.lock:
      self.open = max(0, self.open - 1)
    if event == BACKEND:
      self.count += 1
      if self.timer:
        self.timer.cancel()
      if seconds >= NOTICE:
        say(f'compiled {self.label or fun_name} in {seconds:.0f} s')


_compilations = _Compilations()


def say(text: str) -> None:
  """Prints a line on standard error without tearing a bar; of several processes, one does."""
  import jax
  if jax.process_index() == 0:
    tqdm.tqdm.write(text, file=sys.stderr)


def listen() -> None:
  """Follows JAX's compilations from now on."""
  if not _compilations.listening:
    import jax.monitoring
    jax.monitoring.register_scalar_listener(_compilations.begins)
    jax.monitoring.register_event_duration_secs_listener(_compilations.ends)
    _compilations.listening = True


def compiling() -> bool:
  """Whether something is being traced, lowered or compiled now."""
  return _compilations.open > 0


def count() -> int:
  """Programs that were compiled, or read from the compilation cache, since `listen`."""
  return _compilations.count


@contextlib.contextmanager
def called(label: str) -> Iterator[None]:
  """Names what is compiled within it."""
  old, _compilations.label = _compilations.label, label
  try:
    yield
  finally:
    _compilations.label = old


def maps() -> int:
  """Memory maps of this process; 0 where the system does not say."""
  try:
    with open('/proc/self/maps', 'rb') as file:
      return sum(1 for _ in file)
  except OSError:
    return 0


def most_maps() -> int:
  """How many it may have."""
  try:
    return int(pathlib.Path('/proc/sys/vm/max_map_count').read_text())
  except (OSError, ValueError):
    return MAPS


def release() -> None:
  """Forgets all compiled programs of this process; what is used again is compiled again, or
  read from the compilation cache."""
  import jax
  _compilations.due = False
  jax.clear_caches()
  gc.collect()


def release_soon() -> None:
  """Forgets them now, or, where this is called in the midst of a compilation (by the garbage
  collector), at the next `keep_few`."""
  if compiling():
    _compilations.due = True
  else:
    release()


def keep_few() -> None:
  """Forgets all of them where they hold half of the maps that there may be; to be called
  between programs, by whoever may run many."""
  if _compilations.due:
    release()
  elif _compilations.count - _compilations.looked >= EVERY:
    _compilations.looked = _compilations.count
    if maps() > most_maps() // 2:
      release()
