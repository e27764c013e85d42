"""Data sets and weights from the Hugging Face hub, by its optional libraries.

Of several processes one asks it. Rows of data go from there to the others; weights are read
from the cache of the machine, and where another machine's has none, one process downloads the
same commit there.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, TypeVar

from latent_reasoning.config import DataConfig
from latent_reasoning.data import formats
from latent_reasoning.data.example import Example
from latent_reasoning.errors import InputError

T = TypeVar('T')


class Shared:
  """What the hub said to the first of several processes, for the others
  (parallel.multihost.primary_first).

  Attributes:
    values: by question, as JSON may hold it; None: this process asks for itself.
    first: whether this process is the one that asks.
  """
  values: dict[str, Any] | None = None
  first = True


shared = Shared()


def ask_once(question: str, ask: Callable[[], T]) -> T:
  """What `ask` returns, or what it returned in the first of several processes."""
  if shared.values is None:
    return ask()
  if shared.first:
    shared.values[question] = ask()
  return shared.values[question] if question in shared.values else ask()


# Name: (repository, its configuration or None).
REPOSITORIES = {'gsm8k': ('openai/gsm8k', 'main'), 'gsm8k_aug': ('whynlp/gsm8k-aug', None)}



@dataclasses.dataclass(frozen=True)
class EvalSet:
  """Where an evaluation set is, and the form of its rows (files.FORMS)."""
  repository: str
  name: str | None  # of its configuration
  split: str
  form: str
  file: str = ''  # a URL, where the repository is the library's reader of a file


SETS = {
    'gsm8k': EvalSet('openai/gsm8k', 'main', 'test', 'gsm8k'),
    'gsm_hard': EvalSet('reasoning-machines/gsm-hard', None, 'train', 'gsm_hard'),
    'svamp': EvalSet('ChilleD/SVAMP', None, 'test', 'svamp'),
    'multiarith': EvalSet('ChilleD/MultiArith', None, 'test', 'multiarith'),
    'asdiv': EvalSet('EleutherAI/asdiv', 'asdiv', 'validation', 'asdiv'),
    'prosqa': EvalSet('json', None, 'test', 'coconut', 'https://raw.githubusercontent.com/'
                      'facebookresearch/coconut/main/data/prosqa_test.json'),
    'math': EvalSet('DigitalLearningGmbH/MATH-lighteval', 'default', 'test', 'math'),
    'math500': EvalSet('HuggingFaceH4/MATH-500', None, 'test', 'math'),
    'gpqa': EvalSet('Idavidrein/gpqa', 'gpqa_main', 'train', 'gpqa'),
    'gpqa_diamond': EvalSet('Idavidrein/gpqa', 'gpqa_diamond', 'train', 'gpqa'),
}

SPLITS = {'train': 'train', 'validation': 'valid', 'valid': 'valid', 'test': 'test'}


def listed(config: DataConfig) -> tuple[dict[str, Any], Any]:
  """The rows of a data set by split, downloaded or from the cache, and what says of which
  version they are; None: nothing does.

  Raises:
    InputError: the library is missing or the hub cannot be reached.
  """
  repository, name = REPOSITORIES[config.name]
  found = rows(repository, name, config, '--config.data.dir=…')
  versions = [(split, getattr(data, '_fingerprint', None)) for split, data in found.items()]
  return found, versions if all(version for _, version in versions) else None


def read(config: DataConfig, found: dict[str, Any] | None = None
         ) -> dict[str, tuple[list[Example], dict]]:
  """The examples of a data set.

  Args:
    found: its rows, as `listed` returns them; None: those.

  Returns:
    {'train' | 'valid' | 'test': (examples, report as of `formats.read`)}, for the
    splits that the data set has.

  Raises:
    InputError: the library is missing, the hub cannot be reached, or a row is
      malformed.
  """
  examples = {}
  for split, data in (found or listed(config)[0]).items():
    path = f'{REPOSITORIES[config.name][0]} {split}'
    numbered = ((f'{path} row {i}', row) for i, row in enumerate(data))
    examples[split] = formats.collect(numbered, config, path, 'hub')
  return examples


def read_set(name: str, config: DataConfig) -> tuple[list[Example], dict]:
  """Downloads one of `SETS`, or finds it in the cache; raises as `read`."""
  found = SETS[name]
  source = {'data_files': {found.split: found.file}} if found.file else {}
  data = rows(found.repository, found.name, config, "--config.eval.sets='(\"PATH\",)'",
              **source)
  split = SPLITS[found.split]
  if split not in data:
    raise InputError(f"{found.repository} has the splits {sorted(data)}; expected "
                     f"'{found.split}'; give a local file in config.eval.sets")
  path = f'{found.file or found.repository} {found.split}'
  return formats.collect(((f'{path} row {i}', row) for i, row in enumerate(data[split])),
                         config, path, found.form)


def rows(repository: str, name: str | None, config: DataConfig, local: str,
         **options: Any) -> dict[str, Any]:
  """As `ask`, of several processes by one."""
  def listed():
    found = ask(repository, name, config, local, **options)
    return found if shared.values is None else {s: list(found[s]) for s in found}
  return ask_once(json.dumps([repository, name, options]), listed)


def ask(repository: str, name: str | None, config: DataConfig, local: str,
        **options: Any) -> dict[str, Any]:
  """Returns {'train' | 'valid' | 'test': rows} of the splits that there are.

  Args:
    repository, name: of the hub, and its configuration.
    config: cache_dir is read.
    local: the flag that gives a local copy, for the error.
    **options: of `datasets.load_dataset`.

  Raises:
    InputError: the library is missing or the hub cannot be reached.
  """
  try:
    import datasets  # only who asks for hub data needs it
  except ImportError as e:
    raise InputError(
        f'{repository} without a local path needs the library `datasets`, which is not '
        "installed; pip install -e '.[hf]', or give a local path with "
        f'{local}') from e
  try:
    data = datasets.load_dataset(repository, name, cache_dir=config.cache_dir or None,
                                 **options)
  # The library raises what its own libraries raise, some of it plain Exception.
  except Exception as e:
    raise InputError(
        f'{repository} could not be loaded, {type(e).__name__}: {e}; expected the hub or '
        f'a cached copy. Three ways out: 1. give a local file or directory with {local}; '
        '2. go online once, or name the cache that holds it with '
        '--config.data.cache_dir=…; 3. use the embedded data with '
        '--config=configs/rim_arithmetic.py') from e
  return {SPLITS[split]: data[split] for split in data if split in SPLITS}


_snapshots: dict[str, pathlib.Path] = {}  # of this process: one repository is one commit


def snapshot(repository: str, **options: Any) -> pathlib.Path:
  """The folder of a repository's files, downloaded or found in the cache.

  Args:
    repository: of the hub.
    **options: of `huggingface_hub.snapshot_download`.

  Raises:
    ImportError: there is no such library; and whatever it raises.
  """
  found = _snapshots.get(repository)
  if found is None or not found.is_dir():
    _snapshots.pop(repository, None)
    import huggingface_hub  # only who asks the hub needs it
    def download(**more):
      return pathlib.Path(huggingface_hub.snapshot_download(repository, **options, **more))
    def ask():
      _snapshots[repository] = place = download()
      commit = place.name if place.parent.name == 'snapshots' else None
      return [commit, sorted(file.name for file in place.iterdir())]
    commit, names = ask_once(f'snapshot {repository}', ask)
    if repository not in _snapshots:
      _snapshots[repository] = _same(download, commit, names)
  return _snapshots[repository]


def _same(download: Callable[..., pathlib.Path], commit: str | None,
          names: list[str]) -> pathlib.Path:
  """The commit that the first process has: from this machine's cache, else by one of its
  processes from the hub."""
  lock = pathlib.Path(tempfile.gettempdir()) / f'latent_reasoning-hub-{os.getuid()}.lock'
  with lock.open('a') as held:
    with contextlib.suppress(OSError):  # no locks here: each asks for itself
      fcntl.flock(held, fcntl.LOCK_EX)
    try:
      place = download(revision=commit, local_files_only=True)
      if all((place / name).exists() for name in names):
        return place
    except Exception:  # noqa: BLE001, S110 versions of the library differ in what they raise
      pass
    return download(revision=commit)
