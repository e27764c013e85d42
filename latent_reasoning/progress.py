"""Progress of work that takes longer than a moment: a bar on a terminal, lines elsewhere."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import tqdm

EVERY = 10.0  # seconds between lines where there is no terminal
SILENT = 15.0  # seconds after which what has said nothing is said to go on, then twice as many
T = TypeVar('T')


@contextlib.contextmanager
def steps(what: str, total: int) -> Iterator[Callable[..., None]]:
  """Says on stderr what begins, and how far it is each time the yielded function is called
  with a number of steps that are done (1 without one)."""
  if sys.stderr.isatty():
    with tqdm.tqdm(total=total, desc=what, leave=False, dynamic_ncols=True) as bar:
      yield lambda count=1: bar.update(count) and None
    return
  began = last = time.monotonic()
  done = warm = 0  # the first took compiling, too: no rate is known before the second
  print(f'{what} …', file=sys.stderr, flush=True)

  def update(count: int = 1) -> None:
    nonlocal done, last, warm, began
    done, now = done + count, time.monotonic()
    if now - last > EVERY and done < total:
      last = now
      left = (f', about {(now - began) / (done - warm) * (total - done):.0f} s left' if warm
              else '')
      print(f'{what}: {done:,} of {total:,}{left}', file=sys.stderr, flush=True)
    if not warm:
      warm, began = done, now
  yield update


def track(items: Iterable[T], what: str, total: int) -> Iterator[T]:
  """Yields items, and says how many of them are done."""
  with steps(what, total) as done:
    for item in items:
      yield item
      done()


@contextlib.contextmanager
def slow(what: str, say: Callable[[str], None] | None = None) -> Iterator[None]:
  """Says that something goes on, where it takes longer than a moment and has no steps to be
  counted, such as one compiled call.

  Args:
    say: prints a line; None: on stderr.
  """
  say = say or (lambda text: tqdm.tqdm.write(text, file=sys.stderr))
  began, over = time.perf_counter(), threading.Event()

  def tell():
    wait = SILENT
    while not over.wait(wait):
      wait *= 2
      say(f'{what}: {time.perf_counter() - began:.0f} s so far …')
  thread = threading.Thread(target=tell, daemon=True)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join()
