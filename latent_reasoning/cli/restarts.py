"""Whether a job that is started again and again gets on.

As a program it prints what is safe in a workdir, its argument, which the launchers compare
before and after a start (launch/common.sh). On Kubernetes nothing outlives a pod that could:
there `check` does so, by a note in the workdir.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence

from etils import epath

from latent_reasoning.errors import TrainingError
from latent_reasoning.train.workdir import read_object

START = 'LATENT_REASONING_START'  # how many starts of the job failed before this one
FRUITLESS = 2  # starts in a row that end a job


def saved(path: str) -> list[str]:
  """Checkpoints and results in a workdir and, of a comparison, in those of its runs."""
  place = epath.Path(path)
  runs = [place, *(f for f in place.iterdir() if f.is_dir())] if place.exists() else []
  steps = [f for run in runs if (run / 'checkpoints').exists()
           for f in (run / 'checkpoints').iterdir() if f.name.isdigit()]
  ends = [run / name for run in runs[1:] for name in ('results.json', 'trial.json')]
  return sorted(map(str, (*steps, *(end for end in ends if end.exists()))))


def check(path: str, environment: Mapping[str, str] = os.environ) -> None:
  """Counts the starts in a row that saved nothing new; where no launcher says by `START`
  that it starts again by itself, nothing.

  Args:
    path: of the workdir, here or in a bucket.
    environment: where `START` may be.

  Raises:
    TrainingError: there were two.
  """
  number = environment.get(START, '')
  if not number.isdigit():
    return
  try:
    note, now = epath.Path(path) / 'starts.json', saved(path)
    old = (read_object(note.read_text()) if note.exists() else None) or {}
    fruitless = 0
    if 0 <= old.get('start', -1) < int(number) and not set(now) - set(old.get('saved', ())):
      fruitless = old.get('fruitless', 0) + 1
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps({'start': int(number), 'fruitless': fruitless, 'saved': now}))
  except Exception:  # noqa: BLE001 a bucket's library: who opens the workdir says what is wrong
    return
  if fruitless >= FRUITLESS:
    raise TrainingError(
        f'{fruitless} starts in a row saved no new checkpoint in {path}, so this is not one '
        'more. What the last one said is in its log; save sooner '
        '(--config.train.save_every), or mend it and start the job anew')


def main(arguments: Sequence[str]) -> int:
  print('\n'.join(saved(arguments[0])))
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
