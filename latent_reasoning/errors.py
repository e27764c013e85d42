"""The one error a user's mistake ends in, and checks at the boundary."""

import difflib
import pathlib
import re
from collections.abc import Iterable


class InputError(ValueError):
  """Bad input at the boundary: a config, a data line, a tokenizer, a file, a flag.

  The message says what was found, what was expected and what to do. `main`
  prints it without a traceback and exits with status 2. What was found may be long: of a
  piece without spaces, the beginning is kept.
  """

  def __init__(self, message: str):
    super().__init__(re.sub(r'(\S{200})\S{100,}', r'\1…', message))


class TrainingError(RuntimeError):
  """Training cannot go on (a NaN, an exploding loss); names the way back."""


class Diverged(TrainingError):
  """The loss or its gradient is not finite or too large; the same again would end there."""


class DeviceError(RuntimeError):
  """The devices cannot do what was asked: their memory, a kernel, their driver, who holds them
  (parallel.device_errors). Names what to lower or to mend; the same again would fail again."""


def nearest(name: str, known: Iterable[str]) -> str:
  """Returns 'did you mean …' for a misspelt `name`, then all known names."""
  known = sorted(known)
  close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
  hint = f"did you mean '{close[0]}'? " if close else ''
  return f"{hint}known: {', '.join(known)}"


def ensure(condition: object, message: str) -> None:
  """Raises InputError with a message unless a condition holds."""
  if not condition:
    raise InputError(message)


def local_path(text: str | pathlib.Path, key: str) -> pathlib.Path:
  """A path on this machine, with a leading ~ as the home directory.

  Raises:
    InputError: an address such as file://, a home directory that is not there, or no path;
      names the `key` that it is the value of.
  """
  text = str(text)
  ensure('://' not in text, f'{key} is {text!r}, an address; expected a path on this machine'
         + (f', such as {text.partition("://")[2]}' if text.startswith('file://') else ''))
  ensure('\0' not in text, f'{key} is {text!r}; expected a path, without a null character')
  try:
    return pathlib.Path(text).expanduser()
  except RuntimeError:
    raise InputError(f'{key} is {text!r}; {re.split(r"[/]", text)[0]} is the home directory of '
                     'nobody here; expected a path') from None
