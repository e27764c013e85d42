"""The files of one run, and the rule that a run has one configuration."""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import pathlib
import re
import shlex
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from latent_reasoning import config as config_lib
from latent_reasoning.config import Config
from latent_reasoning.data import storage
from latent_reasoning.errors import InputError, ensure, local_path
from latent_reasoning.parallel import multihost
from latent_reasoning.train import copied, resume

# Keys that may differ from the trained run where nothing is trained (else: train.resume).
FREE = (*resume.HASHED, 'device', 'mesh.', 'eval.', 'train.', 'data.limit', 'data.on_error',
        'data.cache_dir', 'model.attention', 'model.remat', 'model.loss_tile',
        'reasoning_decoder.', 'sweep.')


@dataclasses.dataclass(frozen=True)
class Workdir:
  """Paths of a run's files; `path` is absolute, and here.

  A run in a bucket, `remote`, has its checkpoints there, and copies of its other files:
  they are fetched when it is opened, and brought at each checkpoint and at the end.
  """
  path: pathlib.Path
  remote: str = ''

  lock = property(lambda self: self.path / '.lock')
  config = property(lambda self: self.path / 'config.json')
  metrics = property(lambda self: self.path / 'metrics.jsonl')
  checkpoints = property(lambda self: epath.Path(self.remote or self.path) / 'checkpoints')
  events = property(lambda self: self.path / 'events')
  profile = property(lambda self: self.path / 'profile')
  wandb = property(lambda self: self.path / 'wandb.json')  # the id of its run
  tokenizer = property(lambda self: self.path / 'tokenizer.json')
  predictions = property(lambda self: self.path / 'predictions.jsonl')
  results = property(lambda self: self.path / 'results.json')
  trial = property(lambda self: self.path / 'trial.json')
  scaling = property(lambda self: self.path / 'scaling.json')
  leakage = property(lambda self: self.path / 'leakage.json')
  latency = property(lambda self: self.path / 'latency.json')
  flops = property(lambda self: self.path / 'flops.json')
  reasoning_decoder = property(lambda self: Workdir(  # a run of its own
      self.path / 'reasoning_decoder',
      self.remote and f'{self.remote}/reasoning_decoder'))
  base = property(lambda self: self.path / 'base.json')  # what that one reads
  verbalized = property(lambda self: self.path / 'verbalized.json')
  interventions = property(lambda self: self.path / 'interventions.json')
  analysis = property(lambda self: self.path / 'analysis.json')
  commands = property(lambda self: self.path / 'commands.txt')
  history = property(lambda self: self.path / 'history.jsonl')  # of changes

  def note(self, argv: Sequence[str]) -> None:
    """Keeps the arguments of `main` that made what is here, each command once."""
    command = ' '.join(shlex.join(['python', '-m', 'latent_reasoning.main', *argv]).split())
    old = (self.commands.read_text(encoding='utf-8', errors='replace')
           if self.commands.exists() else '')
    if command not in old.splitlines():
      write_text(self.commands, f'{old}{command}\n')

  def lost_checkpoints(self) -> str:
    """What says that the run had checkpoints, where the folder of them may hold none; ''."""
    place = self.checkpoints
    aside, seals = place.parent / 'unsound', place.with_name(f'{place.name}.seals')
    if aside.exists() and any(aside.iterdir()):
      return f'checkpoints of this run were set aside in {aside}'
    if seals.exists() and any(f.name.endswith('.json') for f in seals.iterdir()):
      return f'this run had checkpoints (by {seals})'
    logged = copied.logged(self.metrics)
    if not place.exists() and self.metrics.exists() and self.metrics.stat().st_size:
      return f'{self.metrics} says that steps were done'
    train = (read_object(self.config) or {}).get('train') or {}
    due = copied.saved_by(train.get('save_every', 0), train.get('eval_every', 0))
    if logged > due:  # before, a run may have been killed without any
      beside = copied.left(place)
      return f'{self.metrics} says that {logged:,} steps were done' + (
          f', and {beside}' if beside else '')
    return ''

  @contextlib.contextmanager
  def writing(self):
    """Holds the folder for one writer; of several processes, the first holds it for all.

    The lock is the system's, so that it is gone with the process that held it, and names it.
    In a bucket it is a lease, an object that is made only where there is none.

    Raises:
      InputError: another process writes there; names it.
    """
    if not multihost.is_primary() or self.path in _writing:
      yield
      return
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      self.lock.touch()
    except OSError as error:
      raise _cannot_use(self.remote or self.path, error) from None
    owner = {'host': socket.gethostname(), 'process': os.getpid(),
             'since': datetime.datetime.now().isoformat(timespec='seconds')}
    with (_lease(f'{self.remote}/lock.json', owner) if self.remote else contextlib.nullcontext(
    )), _file_lock(self.lock, owner, self.remote or self.path):
      _writing.add(self.path)
      try:
        yield
      finally:
        _writing.discard(self.path)

  def pull(self) -> None:
    """Fetches what lies in the bucket."""
    if self.remote:
      with storage.reading(self.remote, '--workdir'):
        _copy(epath.Path(self.remote), epath.Path(self.path))

  def push(self) -> None:
    """Brings what lies here to the bucket; of several processes, one does."""
    if self.remote and multihost.is_primary():
      _copy(epath.Path(self.path), epath.Path(self.remote))


def _cannot_use(place: Any, error: Exception) -> InputError:
  return InputError(f'cannot use {place} as a workdir: {error}; give a folder that can be '
                    f'written with --workdir=DIR{storage.library(place)}')


_writing: set[pathlib.Path] = set()  # folders whose lock this process holds


def _copy(source: epath.Path, target: epath.Path) -> None:
  """Copies the files of a run's folder and of its events; nothing that is half written."""
  for folder in ('.', 'events'):
    place = source / folder
    if place.exists():
      (target / folder).mkdir(parents=True, exist_ok=True)
      for file in place.iterdir():
        if not file.is_dir() and not file.name.startswith('.'):
          file.copy(target / folder / file.name, overwrite=True)


def locate(path: str | pathlib.Path) -> Workdir:
  """The workdir of a path or a bucket's address, whether it is there or not."""
  ensure(str(path), '--workdir= is empty; expected a folder')
  remote = str(path).rstrip('/') if '://' in str(path) and not str(path).startswith(
      'file://') else ''
  if remote:
    storage.folder(remote, '--workdir')  # refuses what no library of checkpoints can use
  here = (pathlib.Path('runs') / re.sub(r'\W+', '_', remote) if remote
          else local_path(path, '--workdir'))
  return Workdir(here.absolute(), remote)


OPENED = ('config.json', 'tokenizer.json', 'commands.txt')  # before anything is found


@contextlib.contextmanager
def nothing_left(path: str | pathlib.Path) -> Iterator[None]:
  """Removes a folder that was not there before and in which nothing was found, where a
  mistake ends what was to be done in it."""
  folder = locate(path).path  # of one in a bucket, the copy here
  fresh = not os.path.lexists(folder)
  try:
    yield
  except InputError:
    if fresh and folder.is_dir() and all(
        file.name in OPENED if file.is_file() else not any(file.iterdir())
        for file in folder.iterdir() if not file.name.startswith('.')):
      shutil.rmtree(folder, ignore_errors=True)
    raise


def open_workdir(path: str | pathlib.Path, config: Config, training: bool,
                 free: tuple[str, ...] = FREE) -> Workdir:
  """Makes the folder, or checks that its run has this configuration.

  Args:
    path: of the folder, or a bucket's (gs://…).
    config: of the run.
    training: whether it may be trained on, where `resume` says what may differ; config.json
      is changed when the training goes on.
    free: keys that may differ otherwise.

  Raises:
    InputError: the folder holds a run of another configuration, or cannot be
      written; names the keys that differ.
  """
  workdir, remote = locate(path), locate(path).remote
  try:
    workdir.path.mkdir(parents=True, exist_ok=True)
    workdir.pull()
    if not workdir.config.exists():
      write_json(workdir.config, dataclasses.asdict(config))
      return workdir
    old = json.loads(workdir.config.read_text(encoding='utf-8'))
    if not isinstance(old, dict):
      raise ValueError(f'found {type(old).__name__}, expected an object')
  except (OSError, ImportError) as error:
    raise _cannot_use(remote or workdir.path, error) from None
  except (ValueError, RecursionError) as error:
    raise InputError(f'{workdir.config} is not valid JSON ({error}); restore it, or give '
                     'another --workdir=DIR') from None
  new = json.loads(json.dumps(dataclasses.asdict(config)))
  # Nothing binds where no step was logged, of a run or of those of a comparison: a first try
  # may have ended in an error that asks for another configuration.
  begun = workdir.metrics.exists() or any(workdir.path.glob('*/metrics.jsonl'))
  trains_on = training and workdir.metrics.exists()
  changed = resume.changes(old, new)[1] if trains_on else config_lib.difference(old, new, free)
  if changed and begun:
    raise resume.refusal(f'{workdir.path} holds a run', changed, old, new)
  if old != new and not trains_on and (training or not begun):
    workdir.tokenizer.unlink(missing_ok=True)  # it may be of the data looked at
    write_json(workdir.config, dataclasses.asdict(config))
  return workdir


def record_changes(workdir: Workdir, config: Config, step: int) -> None:
  """Makes a configuration that differs in what may be changed (`resume`) the run's own:
  config.json, and a line of history.jsonl with the step from which it holds."""
  old, new = read_object(workdir.config), json.loads(json.dumps(dataclasses.asdict(config)))
  changed, refused = resume.changes(old or new, new)
  if changed and not refused and multihost.is_primary():
    line = {'step': step, 'date': datetime.datetime.now().isoformat(timespec='seconds'),
            'changed': changed}
    with workdir.history.open('a', encoding='utf-8') as file:
      file.write(json.dumps(line, ensure_ascii=False) + '\n')
    write_json(workdir.config, new)


@contextlib.contextmanager
def _file_lock(path: pathlib.Path, owner: dict[str, Any], place: Any):
  with path.open('a+', encoding='utf-8') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise _held(place, file.read()) from None
    except OSError as error:  # a file system without locks
      print(f'warning: {place} cannot be locked ({error.strerror}); take care that nothing '
            'else trains there', file=sys.stderr)
    file.truncate(0)
    file.write(json.dumps(owner))
    file.flush()
    try:
      yield
    finally:
      with contextlib.suppress(OSError):
        file.truncate(0)


LEASE = 120.0  # seconds that a lease in a bucket holds; it is renewed at a quarter of them


@contextlib.contextmanager
def _lease(address: str, owner: dict[str, Any]):
  import fsspec  # of etils' epath
  place = address.rpartition('/')[0]

  def write(mode: str) -> None:
    text = json.dumps({**owner, 'until': time.time() + LEASE}).encode()
    files.pipe_file(path, text, mode=mode)
  with storage.reading(place, '--workdir'):  # its library, its account, the bucket itself
    files, path = fsspec.url_to_fs(address)
    if '://' not in address:
      pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
      write('create')  # fails where there is one: in one request, by its generation
    except FileExistsError:
      held = read_object(files.cat_file(path).decode(errors='replace')) or {}
      until = held.get('until')
      if isinstance(until, (int, float)) and until > time.time():
        raise _held(place, json.dumps(held)) from None
      files.rm_file(path)  # its holder is gone
      try:
        write('create')
      except FileExistsError:
        raise _held(place, '') from None
  done = threading.Event()

  def renew():
    while not done.wait(LEASE / 4):
      with contextlib.suppress(OSError):
        write('overwrite')
  thread = threading.Thread(target=renew, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()
    with contextlib.suppress(OSError):
      files.rm_file(path)


def _held(place: Any, text: str) -> InputError:
  held = read_object(text) or {}
  who = (f"process {held.get('process')} on {held.get('host')} since {held.get('since')}"
         if held else 'another process')
  return InputError(f'{place} is being written by {who}; wait for it, stop it, or give another '
                    '--workdir=DIR')


def read_object(text: str | pathlib.Path) -> dict[str, Any] | None:
  """A JSON object by its text or file; None where it is absent, cut off or another thing."""
  try:
    if isinstance(text, pathlib.Path):
      text = text.read_text(encoding='utf-8')
    found = json.loads(text)
  except (FileNotFoundError, ValueError, RecursionError):
    return None
  return found if isinstance(found, dict) else None


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes atomically: a reader sees the old file or the new one."""
  write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + '\n')


def write_text(path: pathlib.Path, text: str) -> None:
  """As `write_json`; of several processes, one writes."""
  if not multihost.is_primary():
    return
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  temporary.write_text(text, encoding='utf-8')
  os.replace(temporary, path)
