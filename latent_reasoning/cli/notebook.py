"""For notebooks, Colab's above all: what is installed under a live kernel, and files that last.

Nothing but the standard library is imported here: it runs before anything is installed.
"""

import importlib
import importlib.metadata
import json
import pathlib
import subprocess
import sys

from latent_reasoning.errors import InputError
from latent_reasoning.parallel import accelerators

# Packages with compiled parts or a state of their own: exchanged below a kernel that has them
# loaded, they break in ways that name another cause.
FRAGILE = ('numpy', 'scipy', 'ml_dtypes', 'jaxlib', 'jax', 'flax', 'optax')
MOUNT = '/content/drive'  # of Google Drive


def install(extras: str = 'notebooks') -> None:
  """Installs what the package needs; to be called again at any time.

  numpy, and whatever else this kernel has loaded, stay as they are, and JAX is one that goes
  with them. Where there is none, they are exchanged and the kernel is started again.

  Args:
    extras: of the package; a GPU's or TPU's is added where this machine has one.

  Raises:
    InputError: pip fails; or the kernel has to start again, and could not be made to.
  """
  wanted = f'latent_reasoning[{",".join(filter(None, (extras, accelerators.extra())))}]'
  numpy = [f'numpy=={version}'] if (version := _installed('numpy')) else []
  loaded = [f'{name}=={_installed(name)}' for name in FRAGILE if name in sys.modules
            and name != 'numpy' and _installed(name)]
  for held in dict.fromkeys(((*numpy, *loaded), (*numpy,), ())):  # as much as goes
    if not (failed := _pip(wanted, *held)):
      break
  else:
    raise InputError(f'pip install {wanted!r} failed: {failed}')
  importlib.invalidate_caches()
  if changed := exchanged():
    _start_again(f'{", ".join(changed)} on the disk is not what this kernel has loaded')


def _pip(*wanted: str) -> str:
  """What is wrong with an installation; ''."""
  done = subprocess.run([sys.executable, '-m', 'pip', 'install', '--quiet', *wanted],
                        capture_output=True, text=True)
  said = [line for line in done.stderr.splitlines() if line.strip()] or ['no word of it']
  return ' '.join(said[-3:])[:500] if done.returncode else ''


def _installed(name: str) -> str:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return ''


def _commit() -> str:
  """Of the repository that the package was installed from; '': from elsewhere."""
  try:
    text = importlib.metadata.distribution('latent_reasoning').read_text('direct_url.json')
    return json.loads(text or '{}').get('vcs_info', {}).get('commit_id', '')
  except (importlib.metadata.PackageNotFoundError, ValueError):
    return ''


_LOADED = _commit()  # as this module was loaded


def exchanged() -> list[str]:
  """What was installed in another version since this kernel loaded it."""
  found = [f'{name} {installed} (loaded: {loaded})' for name in FRAGILE
           if (installed := _installed(name)) and (loaded := getattr(
               sys.modules.get(name), '__version__', installed)) != installed]
  if (now := _commit()) != _LOADED:
    found.append(f'latent_reasoning {now[:8]} (loaded: {_LOADED[:8]})')
  return found


def _start_again(why: str) -> None:
  """Ends the kernel so that it is started again, and with InputError what runs of the cell."""
  kernel = getattr(_shell(), 'kernel', None)
  if kernel is None:
    raise InputError(f'{why}; start Python again and run it again')
  kernel.do_shutdown(True)  # after this cell, and then it is started again
  raise InputError(f'{why}. The kernel restarts now, by itself: wait for it, and run the cells '
                   'again, from the first on')


def _shell():
  ipython = sys.modules.get('IPython')
  return ipython and ipython.get_ipython()


def folder(name: str, drive: bool = False) -> pathlib.Path:
  """The folder of what a notebook makes.

  Args:
    name: of it, below the folder here.
    drive: of Colab: on Google Drive instead, below latent_reasoning/. It outlives the machine:
      after a disconnect, the same cells go on from the newest checkpoint.

  Raises:
    InputError: this is not Colab, or Drive cannot be had.
  """
  if not drive:
    return pathlib.Path(name)
  try:
    colab = importlib.import_module('google.colab.drive')
  except ImportError:
    raise InputError(f'folder({name!r}, drive=True) is for Colab, and this is not; expected a '
                     'path here that lasts, without drive=True') from None
  try:
    colab.mount(MOUNT)  # where it is mounted it stays so
    place = pathlib.Path(MOUNT) / 'MyDrive' / 'latent_reasoning' / name
    place.mkdir(parents=True, exist_ok=True)
  except Exception as error:  # noqa: BLE001 its own kinds: a refusal, a time that ran out
    raise InputError(f'Google Drive cannot be had ({" ".join(str(error).split())[:200]}); '
                     'allow it in the window that opens, or leave out drive=True') from None
  return place
