"""The files of one run, and the rule that a run has one configuration."""

import dataclasses
import json
import os
import pathlib
import re
import shlex
from collections.abc import Sequence
from typing import Any

from etils import epath

from latent_reasoning import config as config_lib
from latent_reasoning import distributed
from latent_reasoning.config import Config
from latent_reasoning.errors import InputError

# Keys that say where it runs and how it is watched, not what it is.
PLACE = ('mesh.', 'train.compilation_cache', 'train.peer_timeout', 'train.profile_steps')
# Keys that may differ from the trained run where nothing is trained.
FREE = (*PLACE, 'eval.', 'train.', 'data.dir', 'data.train', 'data.valid', 'data.test',
        'data.limit', 'data.on_error', 'data.cache_dir', 'model.attention', 'model.remat',
        'explicit.', 'sweep.')


@dataclasses.dataclass(frozen=True)
class Workdir:
  """Paths of a run's files; `path` is absolute, and here.

  A run in a bucket, `remote`, has its checkpoints there, and copies of its other files:
  they are fetched when it is opened, and brought at each checkpoint and at the end.
  """
  path: pathlib.Path
  remote: str = ''

  config = property(lambda self: self.path / 'config.json')
  metrics = property(lambda self: self.path / 'metrics.jsonl')
  checkpoints = property(lambda self: epath.Path(self.remote or self.path) / 'checkpoints')
  events = property(lambda self: self.path / 'events')
  profile = property(lambda self: self.path / 'profile')
  tokenizer = property(lambda self: self.path / 'tokenizer.json')
  predictions = property(lambda self: self.path / 'predictions.jsonl')
  results = property(lambda self: self.path / 'results.json')
  audit = property(lambda self: self.path / 'audit.json')
  latency = property(lambda self: self.path / 'latency.json')
  flops = property(lambda self: self.path / 'flops.json')
  explicit = property(lambda self: Workdir(  # a run of its own
      self.path / 'explicit', self.remote and f'{self.remote}/explicit'))
  base = property(lambda self: self.path / 'base.json')  # what that one reads
  explained = property(lambda self: self.path / 'explicit.json')
  controls = property(lambda self: self.path / 'controls.json')
  inside = property(lambda self: self.path / 'inside.json')
  commands = property(lambda self: self.path / 'commands.txt')

  def note(self, argv: Sequence[str]) -> None:
    """Keeps the arguments of `main` that made what is here, each command once."""
    command = ' '.join(shlex.join(['python', '-m', 'latent_reasoning.main', *argv]).split())
    old = self.commands.read_text(encoding='utf-8') if self.commands.exists() else ''
    if command not in old.splitlines():
      write_text(self.commands, f'{old}{command}\n')

  def pull(self) -> None:
    """Fetches what lies in the bucket."""
    if self.remote:
      _copy(epath.Path(self.remote), epath.Path(self.path))

  def push(self) -> None:
    """Brings what lies here to the bucket; of several processes, one does."""
    if self.remote and distributed.writes():
      _copy(epath.Path(self.path), epath.Path(self.remote))


def _copy(source: epath.Path, target: epath.Path) -> None:
  """Copies the files of a run's folder and of its events; nothing that is half written."""
  for folder in ('.', 'events'):
    place = source / folder
    if place.exists():
      (target / folder).mkdir(parents=True, exist_ok=True)
      for file in place.iterdir():
        if not file.is_dir() and not file.name.startswith('.'):
          file.copy(target / folder / file.name, overwrite=True)


def open_workdir(path: str | pathlib.Path, config: Config, training: bool,
                 free: tuple[str, ...] = FREE) -> Workdir:
  """Makes the folder, or checks that its run has this configuration.

  Args:
    path: of the folder, or a bucket's (gs://…).
    config: of the run.
    training: whether it may be trained on, where every key must be the same.
    free: keys that may differ otherwise.

  Raises:
    InputError: the folder holds a run of another configuration, or cannot be
      written; names the keys that differ.
  """
  remote = str(path).rstrip('/') if '://' in str(path) else ''
  here = pathlib.Path('runs') / re.sub(r'\W+', '_', remote) if remote else pathlib.Path(path)
  workdir = Workdir(here.expanduser().absolute(), remote)
  try:
    workdir.path.mkdir(parents=True, exist_ok=True)
    workdir.pull()
    if not workdir.config.exists():
      write_json(workdir.config, dataclasses.asdict(config))
      return workdir
    old = json.loads(workdir.config.read_text())
    if not isinstance(old, dict):
      raise ValueError(f'found {type(old).__name__}, expected an object')
  except (OSError, ImportError) as error:
    raise InputError(f'cannot use {remote or workdir.path} as a workdir: {error}; give a '
                     'folder that can be written with --workdir=DIR (gs://… needs pip install '
                     "-e '.[gcs]')") from None
  except ValueError as error:
    raise InputError(f'{workdir.config} is not valid JSON ({error}); restore it, or give '
                     'another --workdir=DIR') from None
  new = json.loads(json.dumps(dataclasses.asdict(config)))
  # Nothing binds where no step was logged, of a run or of those of a comparison: a first try
  # may have ended in an error that asks for another configuration.
  begun = workdir.metrics.exists() or any(workdir.path.glob('*/metrics.jsonl'))
  trains_on = training and workdir.metrics.exists()
  changed = config_lib.difference(old, new, PLACE if trains_on else free)
  if changed and begun:
    listed = '\n  '.join(changed)
    raise InputError(
        f'{workdir.path} holds a run of another configuration; these keys differ '
        f'(there -> here):\n  {listed}\nGive the keys as they were, or another '
        '--workdir=DIR')
  if old != new and (training or not begun):
    workdir.tokenizer.unlink(missing_ok=True)  # it may be of the data looked at
    write_json(workdir.config, dataclasses.asdict(config))
  return workdir


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes atomically: a reader sees the old file or the new one."""
  write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + '\n')


def write_text(path: pathlib.Path, text: str) -> None:
  """As `write_json`; of several processes, one writes."""
  if not distributed.writes():
    return
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  temporary.write_text(text, encoding='utf-8')
  os.replace(temporary, path)
