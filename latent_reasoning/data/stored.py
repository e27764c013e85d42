"""Large data sets as they were read, and their tokens, kept on disk and mapped into memory.

Reading, comparing and tokenizing a few hundred thousand problems takes minutes, each time the
same. What came of it is kept in the user's cache, in a folder whose name is a hash of the
files' contents, of the configuration and of the code that reads: whatever changes one of them
has another folder. Problems and tokens are looked up there one by one, so that a run holds none
but those of its batches.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import operator
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from latent_reasoning import progress
from latent_reasoning.config import DataConfig
from latent_reasoning.data import example, storage
from latent_reasoning.data.example import Example
from latent_reasoning.data.tokenizers import Tokenizer

LARGE = 16 << 20  # bytes of files from which on it pays
CHUNK = 20_000  # problems that are tokenized at once
LATER = ('buckets', 'sort_window', 'packing', 'too_long', 'cache_dir')  # change no problem


class Stored(Sequence[Example]):
  """The problems of one split, in a folder; with `tokens`, those of each as well.

  Args:
    folder: where they are.
    index: which of them, int [N]; None: all.
    tokens: the folder of their tokens, made by `tokenized`; None: none yet.
  """

  def __init__(self, folder: pathlib.Path, index: np.ndarray | None = None,
               tokens: pathlib.Path | None = None):
    self._folder, self._index, self._tokens = folder, index, tokens
    self._text = np.memmap(folder / 'text.bin', np.uint8, 'r')
    self._ends = np.load(folder / 'ends.npy', mmap_mode='r')
    if tokens:
      self._ids = np.load(tokens / 'ids.npy', mmap_mode='r')
      self._pieces = np.load(tokens / 'pieces.npy', mmap_mode='r')  # where each begins
      self._first = np.load(tokens / 'first.npy', mmap_mode='r')  # piece of each problem

  def __len__(self) -> int:
    return len(self._ends) - 1 if self._index is None else len(self._index)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    i = self._place(index)
    return example.of(*json.loads(self._text[self._ends[i]:self._ends[i + 1]].tobytes()))

  def _place(self, index: int) -> int:
    i = operator.index(index)
    i += len(self) if i < 0 else 0
    if not 0 <= i < len(self):
      raise IndexError(f'problem {index} of {len(self)}')
    return i if self._index is None else int(self._index[i])

  def subset(self, index: Iterable[int]) -> 'Stored':
    """Those of these numbers."""
    return Stored(self._folder, np.asarray([self._place(i) for i in index], np.int64),
                  self._tokens)

  def fingerprint(self) -> str:
    """A hash of the problems, that of their list."""
    found = hashlib.blake2b(b'[', digest_size=16)
    for k, problem in enumerate(self):
      found.update(f"{', ' * (k > 0)}{problem!r}".encode())
    found.update(b']')
    return found.hexdigest()

  def pieces(self, index: int) -> tuple[list[int], list[list[int]], list[int]]:
    """The token ids of a problem: question, steps, answer."""
    i = self._place(index)
    at = self._pieces[self._first[i]:self._first[i + 1] + 1]
    question, *steps, answer = [self._ids[a:b].tolist() for a, b in itertools.pairwise(at)]
    return question, steps, answer

  def lengths(self) -> list[list[int]]:
    """How many tokens question, steps and answer of each problem have."""
    sizes, first = np.diff(self._pieces).tolist(), self._first.tolist()
    places = range(len(first) - 1) if self._index is None else self._index.tolist()
    return [sizes[first[i]:first[i + 1]] for i in places]

  def characters(self) -> list[int]:
    """How many characters question and steps of each problem have together."""
    found = np.load(self._folder / 'characters.npy')
    return (found if self._index is None else found[self._index]).tolist()

  @property
  def has_tokens(self) -> bool:
    return self._tokens is not None

  def tokenized(self, tokenizer: Tokenizer) -> 'Stored':
    """The same with the tokens of a tokenizer, made now if they are not there yet."""
    target = self._folder / f'tokens-{tokenizer.fingerprint}'
    made = target.is_dir() or _made(target, lambda place: _tokenize(
        Stored(self._folder), tokenizer, place))
    return Stored(self._folder, self._index, target) if made else self


def _tokenize(problems: Stored, tokenizer: Tokenizer, place: pathlib.Path) -> None:
  pieces, first, total = [[0]], [[0]], 0
  ids = (place / 'ids.npy').open('wb')
  with ids, progress.steps(f'tokenizing {len(problems):,} problems, once for this tokenizer, '
                           f'into {place.parent}', len(problems)) as done:
    written = []
    for start in range(0, len(problems), CHUNK):
      chunk = problems[start:start + CHUNK]
      rows = tokenizer.examples([(e.question, e.steps, e.answer) for e in chunk])
      flat = [piece for question, steps, answer in rows for piece in (question, *steps, answer)]
      ends = np.cumsum([len(piece) for piece in flat]) + total
      pieces.append(ends)
      first.append(np.cumsum([2 + len(e.steps) for e in chunk]) + first[-1][-1])
      written.append(np.fromiter(itertools.chain.from_iterable(flat), np.int32))
      total = int(ends[-1])
      done(len(chunk))
    np.save(ids, np.concatenate(written))
  np.save(place / 'pieces.npy', np.concatenate(pieces).astype(np.int64))
  np.save(place / 'first.npy', np.concatenate(first).astype(np.int64))


def keep(folder: pathlib.Path | None, train: Sequence[Example],
         rest: dict[str, Any]) -> Sequence[Example]:
  """Writes training problems and what else was read; the problems, from there where that could
  be done.

  Args:
    folder: of `place`; None: nothing is kept.
    rest: of JSON, as `found` returns it.
  """
  def write(place: pathlib.Path) -> None:
    lines = [json.dumps(dataclasses.astuple(e), ensure_ascii=False).encode() for e in train]
    (place / 'text.bin').write_bytes(b''.join(lines))
    np.save(place / 'ends.npy', np.cumsum([0, *map(len, lines)]))
    np.save(place / 'characters.npy', np.array([e.characters for e in train], np.int64))
    (place / 'rest.json').write_text(json.dumps(rest), encoding='utf-8')
  return Stored(folder) if folder and _made(folder, write) else train


def found(folder: pathlib.Path | None) -> tuple[Stored, dict[str, Any]] | None:
  """What `keep` wrote there; None: nothing."""
  if not folder or not folder.is_dir():
    return None
  return Stored(folder), json.loads((folder / 'rest.json').read_text(encoding='utf-8'))


def place(config: DataConfig, seed: int, files: dict[str, pathlib.Path] | None = None,
          versions: Any = None) -> pathlib.Path | None:
  """The folder of a data set.

  Args:
    files: those that are read, by split.
    versions: what says the same of a data set of the hub.

  Returns:
    None where the files are small, or one is not there.
  """
  if versions is None:
    paths = sorted((files or {}).items())
    if not paths or not all(path.is_file() for _, path in paths) or sum(
        path.stat().st_size for _, path in paths) < LARGE:
      return None
    versions = [(split, _content(path)) for split, path in paths]
  kept = {k: v for k, v in dataclasses.asdict(config).items() if k not in LATER}
  name = hashlib.blake2b(repr((kept, seed, versions, _code())).encode(), digest_size=16)
  return storage.cache() / 'problems' / name.hexdigest()


def _content(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


@functools.cache
def _code() -> str:
  """A hash of the modules that make problems of files."""
  return hashlib.blake2b(b''.join(path.read_bytes() for path in sorted(
      pathlib.Path(__file__).parent.glob('*.py'))), digest_size=16).hexdigest()


def _made(target: pathlib.Path, write: Callable[[pathlib.Path], None]) -> bool:
  """Makes a folder that is there whole or not at all; False, and a line, where the disk does
  not let it."""
  temporary = None
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix='.', dir=target.parent))
    write(temporary)
    try:
      os.rename(temporary, target)
    except OSError:
      if not target.is_dir():  # another process was first
        raise
    return True
  except OSError as error:
    print(f'warning: {target} cannot be written ({error.strerror or error}), so the data is '
          'read and tokenized again each time; free space, or name another folder with the '
          'environment XDG_CACHE_HOME', file=sys.stderr)
    return False
  finally:
    if temporary:
      shutil.rmtree(temporary, ignore_errors=True)
