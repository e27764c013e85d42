"""Progress of work that takes longer than a moment: a bar on a terminal, lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import tqdm

EVERY = 10.0  # seconds between lines where there is no terminal
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
  done = 0
  print(f'{what} …', file=sys.stderr, flush=True)

  def update(count: int = 1) -> None:
    nonlocal done, last
    done, now = done + count, time.monotonic()
    if now - last > EVERY and done < total:
      last = now
      print(f'{what}: {done:,} of {total:,}, about {(now - began) / done * (total - done):.0f} '
            's left', file=sys.stderr, flush=True)
  yield update


def track(items: Iterable[T], what: str, total: int) -> Iterator[T]:
  """Yields items, and says how many of them are done."""
  with steps(what, total) as done:
    for item in items:
      yield item
      done()
