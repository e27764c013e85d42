"""What cannot be read apart from what is damaged: a read is tried again.

Damage is what is said of bytes that could be read. An error of a disk, of a network or of too
little memory says nothing of what a file holds.
"""

import time
from collections.abc import Callable
from typing import Any

from etils import epath

TRIES = 3  # of reading, before an error is reported
WAIT = 0.5  # seconds before the second of them, then twice as long


class Unreadable(Exception):
  """A checkpoint could not be read, which says nothing of what it holds."""


def _memory(error: BaseException) -> bool:
  """Whether an error is of too little memory, as Python, XLA or tensorstore say it."""
  return isinstance(error, MemoryError) or any(
      text in str(error) for text in ('Cannot allocate memory', 'RESOURCE_EXHAUSTED',
                                      'bad_alloc', 'Out of memory'))


def _read_through(folder: epath.Path) -> None:
  """Reads every byte of a folder's files; raises OSError where that fails."""
  for file in folder.iterdir():
    if file.is_dir():
      _read_through(file)
    else:
      with file.open('rb') as opened:
        while opened.read(1 << 24):
          pass


def attempt(folder: epath.Path, read: Callable[[], Any]) -> tuple[Any, str]:
  """What reads a part of a folder, or None and why it is damaged.

  Raises:
    Unreadable: it could not be read, again and again, or there is too little memory: the
      bytes may be sound.
  """
  wait, damaged = WAIT, 0
  for number in range(1, TRIES + 1):
    try:
      return read(), ''
    except Exception as error:  # noqa: BLE001 orbax raises many kinds for a damaged file
      reason = f'{type(error).__name__}: {(str(error).splitlines() or [""])[0][:200]}'
      try:
        if _memory(error):
          raise OSError(reason)
        _read_through(folder)
        damaged += 1  # its bytes can be read, but make no checkpoint
      except (OSError, MemoryError) as cause:
        if not folder.exists():
          return None, 'it is gone'
        reason = f'{cause}'
      if damaged == 2:
        return None, reason
    if number < TRIES:
      time.sleep(wait)
      wait *= 2
  raise Unreadable(reason)
