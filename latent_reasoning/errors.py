"""The one error a user's mistake ends in."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
  """Bad input at the door: a config, a data line, a tokenizer, a file, a flag.

  The message says what was found, what was expected and what to do. `main`
  prints it without a traceback and exits with status 2.
  """


class TrainingError(RuntimeError):
  """Training cannot go on (a NaN, an exploding loss); names the way back."""


def nearest(name: str, known: Iterable[str]) -> str:
  """Returns 'did you mean …' for a misspelt `name`, then all known names."""
  known = sorted(known)
  close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
  hint = f"did you mean '{close[0]}'? " if close else ''
  return f"{hint}known: {', '.join(known)}"
