"""Checkpoints that came by hand: complete, but without what says so.

On a bucket orbax takes a folder for a checkpoint by the file `COMMIT` in it; one that is copied
there from a disk, or by a program that leaves it out, has none. Its seal says whether it is
complete. Without either nobody can tell it from a save that was killed: it is not read.
"""

import json
from collections.abc import Callable, Iterable

from etils import epath

from latent_reasoning.train import seals
from latent_reasoning.train.seals import COMMIT, OURS


def numbered(path: epath.Path) -> list[int]:
  """Steps of which there is a folder, complete or not."""
  names = [p.name for p in path.iterdir()] if path.exists() else []
  return sorted(int(name) for name in names if name.isdigit())


def commit(path: epath.Path, listed: Iterable[int], warn: Callable[[str], None]) -> bool:
  """Commits what orbax does not list and a seal says is complete; whether there was any.

  Args:
    path: of the folder of checkpoints.
    listed: steps that orbax takes for checkpoints.
    warn: called with what is not read, and why.
  """
  found = False
  for step in sorted(set(numbered(path)) - set(listed)):
    if not seals.path(path, step).exists():
      continue  # a save that was killed looks like it
    if wrong := seals.broken(path, step):
      warn(f'{path / str(step)} has no {COMMIT} and is not complete ({wrong}); it is not read. '
           'Copy it again')
    else:
      place = path / str(step)
      for folder in (*(p for p in place.iterdir() if p.is_dir()), place):  # the whole at last
        if not (folder / COMMIT).exists():
          (folder / COMMIT).write_text(f'{OURS}{path.name}.seals/{step}.json\n')
      found = True
  return found


def left(path: epath.Path) -> str:
  """What lies in a folder of checkpoints beside any, in a sentence; ''."""
  names = sorted(p.name for p in path.iterdir()) if path.exists() else []
  if not names:
    return ''
  listed = ', '.join(names[:3]) + ' …' * (len(names) > 3)
  return (f'{path} holds {listed}, saves that did not end or that were copied without '
          f'{COMMIT} and their seals (checkpoints.seals/)')


def logged(metrics: epath.Path) -> int:
  """The last step that a log has; 0."""
  last = 0
  for line in metrics.read_bytes().splitlines() if metrics.exists() else ():
    try:
      found = json.loads(line)['step']
    except (ValueError, KeyError, TypeError, RecursionError):
      continue
    last = max(last, found) if type(found) is int else last
  return last


def saved_by(save_every: int, eval_every: int) -> float:
  """The step after which a run has a checkpoint for certain: its second one, before which the
  first is waited for. Infinite where only the end has one."""
  every = [n for n in (save_every, eval_every) if n > 0]
  if not every:
    return float('inf')
  first = min(every)
  return min((first // n + 1) * n for n in every)
