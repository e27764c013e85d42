"""Seals: beside the checkpoints, what files each has, with their sizes and hashes.

They lie in a folder of their own, NAME.seals/STEP.json beside NAME/STEP.
"""

import json
from collections.abc import Sequence

from etils import epath

from latent_reasoning.train.hashes import digest

SMALL = 1 << 20  # bytes up to which a file is hashed
COMMIT = 'commit_success.txt'  # by which orbax takes a bucket's folder for a checkpoint
OURS = 'complete by '  # how such a file of ours begins


def path(checkpoints: epath.Path, step: int) -> epath.Path:
  """The seal of a step, whether it is there or not."""
  return checkpoints.with_name(f'{checkpoints.name}.seals') / f'{step}.json'


def write(checkpoints: epath.Path, steps: Sequence[int]) -> None:
  """Writes the seals that are missing, and removes those of checkpoints that are gone."""
  folder = path(checkpoints, 0).parent
  folder.mkdir(exist_ok=True)
  for step in steps:
    if not path(checkpoints, step).exists():
      text = json.dumps(contents(checkpoints / str(step)))
      temporary = folder / f'.{step}.tmp'
      temporary.write_text(text, encoding='utf-8')
      temporary.replace(path(checkpoints, step))
  for seal in folder.glob('*.json'):
    if seal.stem.isdigit() and int(seal.stem) not in steps:
      seal.unlink(missing_ok=True)


def broken(checkpoints: epath.Path, step: int) -> str:
  """What differs from a seal; '': nothing, or the writer was killed before it sealed."""
  try:
    sealed = json.loads(path(checkpoints, step).read_text(encoding='utf-8'))
  except (FileNotFoundError, ValueError):
    return ''
  if not isinstance(sealed, dict):
    return ''
  folder = checkpoints / str(step)
  found = contents(folder)
  wrong = sorted(f for f in sealed.keys() | found.keys() if sealed.get(f) != found.get(f)
                 and not _may_differ(folder / f, f in sealed))
  if not wrong:
    return ''
  return f'its file {wrong[0]} is ' + (
      'not as it was written' if wrong[0] in found else 'gone')


def contents(folder: epath.Path) -> dict[str, str]:
  """{file: 'size hash'} of a folder, without the hash where a file is not `SMALL`."""
  found = {}
  for file in sorted(folder.iterdir()):
    if file.is_dir():
      found.update({f'{file.name}/{k}': v for k, v in contents(file).items()})
    else:
      size = file.stat().length
      found[file.name] = f'{size} {digest(file.read_bytes())}' if size <= SMALL else str(size)
  return found


def _may_differ(file: epath.Path, sealed: bool) -> bool:
  """Whether a file need not be as a seal says: a commit file that a copy left out, that came
  where the seal was made without one, or that `copied.commit` wrote."""
  if file.name != COMMIT:
    return False
  return not sealed or not file.exists() or file.read_bytes().startswith(OURS.encode())
