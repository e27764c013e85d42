"""Standard streams that a training outlives."""

import contextlib
import os
import sys


class _Stream:
  """A standard stream that outlives who reads it: a terminal or pipe that is gone is no
  reason to stop a training, and what a locale cannot spell is written as an escape."""

  def __init__(self, stream):
    self._stream = stream
    if hasattr(stream, 'reconfigure'):
      stream.reconfigure(errors='backslashreplace')

  def __getattr__(self, name):
    return getattr(self._stream, name)

  def write(self, text):
    with contextlib.suppress(OSError, ValueError):
      return self._stream.write(text)
    return len(text)

  def flush(self):
    with contextlib.suppress(OSError, ValueError):
      self._stream.flush()


def keep() -> None:
  """Makes the standard streams ones that cannot fail; they may have been closed."""
  for name in ('stdout', 'stderr'):
    setattr(sys, name, _Stream(getattr(sys, name) or open(os.devnull, 'w')))  # noqa: SIM115
  if sys.stdin is None:
    sys.stdin = open(os.devnull)  # noqa: SIM115
  elif hasattr(sys.stdin, 'reconfigure'):
    sys.stdin.reconfigure(errors='replace')
