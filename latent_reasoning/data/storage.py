"""Files by path or address: a bucket's (gs://, s3://), a hub's (hf://), whatever fsspec has.

What lies at an address is copied once a machine into a folder here, whose name is a hash of
the address and of what the storage says of its state (etag, size, time): while nothing
changes there it is not fetched again, and what changed is.
"""

import contextlib
import fcntl
import fnmatch
import hashlib
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from latent_reasoning.errors import InputError, ensure, local_path

EXTRAS = {'gs': 'gcs', 'gcs': 'gcs', 's3': 's3', 's3a': 's3', 'hf': 'hf'}  # by scheme
for _library in ('gcsfs', 's3fs'):  # they log the traceback of what they raise
  logging.getLogger(_library).setLevel(logging.CRITICAL)


def is_address(text: str | pathlib.Path) -> bool:
  return '://' in str(text)


def library(address: Any) -> str:
  """What has to be installed for an address, in brackets; '': nothing, or nobody knows."""
  scheme, found, _ = str(address).partition('://')
  extra = EXTRAS.get(scheme) if found else None
  return f" ({scheme}://… needs pip install -e '.[{extra}]')" if extra else ''


def cache() -> pathlib.Path:
  """This package's folder in the user's cache, wherever the system has it."""
  base = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return pathlib.Path(base).expanduser() / 'latent_reasoning'


def copies() -> pathlib.Path:
  """The folder of copies."""
  return cache() / 'copies'


def fetch(text: str | pathlib.Path, key: str, wanted: Sequence[str] = ()) -> pathlib.Path:
  """The path on this machine of a file or folder by its path or address.

  Args:
    text: a path, which is returned as `local_path` has it, or an address.
    key: what it is the value of, for errors.
    wanted: patterns of names: the files of a folder at an address that are fetched, or, of a
      file, which of those beside it come along.

  Raises:
    InputError: nothing is there, its library is missing, or it cannot be read or kept.
  """
  if not is_address(text):
    return local_path(text, key)
  address = str(text).rstrip('/')
  with reading(address, key):
    files, path = _open(address)
    found = files.info(path)
    if is_file := found['type'] != 'directory':
      parent, name = path.rpartition('/')[::2]
      entries = {_plain(name, address): found}
      path = parent if wanted else ''
    if path:
      listed = _listing(files, path, address)
      entries = {n: e for n, e in listed.items() if (is_file and n == name) or any(
          fnmatch.fnmatchcase(n, pattern) for pattern in wanted)}
  version = _hash([address, *([n, *sorted(map(str, e.items()))] for n, e in
                              sorted(entries.items()))])
  target = copies() / _hash(address) / version
  if not target.is_dir():
    with _keeping(address, target.parent):
      _copy(files, entries, target, address, key)
  return target / name if is_file else target


def names(text: str | pathlib.Path, key: str) -> list[str] | None:
  """The names of the files in a folder by its path or address; None where it is no folder.

  Raises:
    InputError: as `fetch`, of an address.
  """
  if not is_address(text):
    place = local_path(text, key)
    return [p.name for p in place.iterdir() if p.is_file()] if place.is_dir() else None
  address = str(text).rstrip('/')
  with reading(address, key):
    files, path = _open(address)
    if files.info(path)['type'] != 'directory':
      return None
    return list(_listing(files, path, address))


def inside(text: str | pathlib.Path, name: str) -> str | pathlib.Path:
  """A file of a folder by its path or address."""
  return f'{str(text).rstrip("/")}/{name}' if is_address(text) else pathlib.Path(text) / name


def folder(text: str, key: str) -> Any:
  """A folder by its path or address, as an `epath.Path`, whether it is there or not.

  Raises:
    InputError: an address that `etils` does not know.
  """
  from etils import epath
  text = text.removeprefix('file://')
  if not is_address(text):
    return epath.Path(local_path(text, key))
  ensure(text.partition('://')[0] in ('gs', 's3', 'az'), f'{key} is {text!r}; expected a path '
         "on this machine, or the address of a bucket that JAX can write to (gs://, s3://, az://)")
  return epath.Path(text)


def shared_folder(text: str, key: str) -> str:
  """Makes a folder where there is none, for a library that has paths through `etils`.

  Raises:
    InputError: of an address that cannot be used, as `fetch`, or that `etils` does not know.
  """
  place = folder(text, key)
  if is_address(str(place)):
    with reading(text, key):
      place.mkdir(parents=True, exist_ok=True)
  return str(place)


def _open(address: str) -> tuple[Any, str]:
  import fsspec  # of etils' epath
  files, path = fsspec.url_to_fs(address)
  files.invalidate_cache()  # what was there when it was last asked
  return files, path


def _listing(files: Any, path: str, address: str) -> dict[str, dict]:
  """What the storage says of each file in a folder, by its name."""
  return {_plain(entry['name'].rstrip('/').rpartition('/')[2], address): entry
          for entry in files.ls(path, detail=True)
          if entry['type'] != 'directory' and entry['name'].rstrip('/') != path.rstrip('/')}


def _plain(name: str, address: str) -> str:
  """The name of a file; one that would lead out of the folder of its copy is refused."""
  ensure(name not in ('', '.', '..') and not set(name) & set('/\\\0'),
         f'{address}: found the name {name!r}; expected the name of a file in that folder')
  return name


def _copy(files: Any, entries: dict[str, dict], target: pathlib.Path, address: str,
          key: str) -> None:
  """Copies files into a folder that is there whole or not at all; one process does."""
  with (target.parent / '.lock').open('w') as lock:
    with contextlib.suppress(OSError):  # a file system without locks: each fetches its own
      fcntl.flock(lock, fcntl.LOCK_EX)
    if target.is_dir():  # while this one waited
      return
    temporary = pathlib.Path(tempfile.mkdtemp(prefix='.', dir=target.parent))
    try:
      for name, entry in entries.items():
        with reading(address, key):
          files.get_file(entry['name'], str(temporary / name))
        here, there = (temporary / name).stat().st_size, entry.get('size')
        ensure(there in (None, here), f'{address}: {name} came with {here:,} bytes of '
               f'{there:,}; it may be being written: wait, and start again')
      try:
        temporary.rename(target)
      except OSError:
        if not target.is_dir():  # another, without that lock, was first
          raise
    finally:
      shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _keeping(address: str, folder: pathlib.Path) -> Iterator[None]:
  """Turns an error of this machine's disk into one line."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    yield
  except OSError as error:
    raise InputError(f'{address} cannot be copied to {folder}: {error.strerror or error}; free '
                     'space, or name another folder with the environment XDG_CACHE_HOME'
                     ) from None


@contextlib.contextmanager
def reading(address: str, key: str) -> Iterator[None]:
  """Turns what the library of a storage raises, each its own kinds, into one line."""
  scheme = address.partition('://')[0]
  extra = (f"pip install -e '.[{EXTRAS[scheme]}]'" if scheme in EXTRAS
           else f'the library that fsspec names for {scheme}://')
  try:
    yield
  except InputError:
    raise
  except ImportError as error:
    raise InputError(f'{key} is {address!r}, an address that needs a library '
                     f'({_line(error)}): {extra}') from None
  except FileNotFoundError:
    raise InputError(f'{key} is {address!r}, an address where nothing is found; expected a '
                     'path here, or the address of what is there and this account may see'
                     ) from None
  except Exception as error:  # noqa: BLE001
    if 'Protocol not known' in str(error):
      why = f'{scheme}:// is no kind of address that fsspec knows'
    else:
      why = f'it could not be used, {type(error).__name__}: {_line(error)}'
    raise InputError(f'{key} is {address!r}, an address, but {why}; expected a path here, or '
                     'an address that this account may use (check its spelling, the login and '
                     'its rights)') from None


def _line(error: Exception) -> str:
  return ' '.join(str(error).split())[:300]


def _hash(value: Any) -> str:
  return hashlib.blake2b(repr(value).encode(), digest_size=12).hexdigest()
