"""Where the numbers of a training go beside metrics.jsonl: one interface, two loggers of it.

TensorBoard is always one, Weights & Biases where config.train.wandb names a project, and
`Experiment.train(loggers=[…])` takes any object with the methods of `Logger`.
"""

import dataclasses
import importlib
import importlib.util
import netrc
import os
import secrets
import sys
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from latent_reasoning.config import Config
from latent_reasoning.errors import InputError, ensure
from latent_reasoning.parallel import multihost
from latent_reasoning.train.workdir import Workdir, read_object, write_json


class Logger(Protocol):
  """Takes numbers by name, such as train/loss; of several processes, the first has one."""

  def log(self, values: Mapping[str, float], step: int) -> None:
    """After a restart, steps since the checkpoint come again."""

  def close(self) -> None:
    """Once, when training ends, is interrupted or fails."""


class Guarded:
  """A logger whose failure is said once and costs no training.

  Raises:
    InputError: what is given is no `Logger`.
  """

  def __init__(self, logger: Logger):
    for name in ('log', 'close'):
      ensure(callable(getattr(logger, name, None)), f'{logger!r} is no logger: expected an '
             'object with the methods log(values, step) and close()')
    self._logger, self._name = logger, type(logger).__name__

  def log(self, values: Mapping[str, float], step: int) -> None:
    self._do('log', values, step)

  def close(self) -> None:
    self._do('close')

  def _do(self, method: str, *arguments) -> None:
    if self._logger is None:
      return
    try:
      getattr(self._logger, method)(*arguments)
    except Exception as error:  # noqa: BLE001 it is another's code, perhaps over a network
      self._logger = None
      _say(f'warning: the logger {self._name} failed ({_line(error)}) and is left out from '
           'here on; metrics.jsonl has everything')


class TensorBoard:
  """Events in the folder of the run."""

  def __init__(self, path: str, step: int):
    # tensorboardX imports torch where that is installed, for seconds, and has no need of it.
    loaded = 'torch' in sys.modules
    if not loaded:
      sys.modules['torch'] = None
    try:
      import tensorboardX
    finally:
      if not loaded:
        del sys.modules['torch']
    self._writer = tensorboardX.SummaryWriter(path, purge_step=step + 1)

  def log(self, values: Mapping[str, float], step: int) -> None:
    for name, value in values.items():
      self._writer.add_scalar(name, value, step)

  def close(self) -> None:
    self._writer.close()


class WeightsAndBiases:
  """A run of Weights & Biases, whose id the workdir keeps: started again, it goes on.

  Without a key, or where the service cannot be reached, it is kept here to be sent later.
  Steps are a value of their own, since the service drops those that it has had.
  """

  def __init__(self, config: Config, workdir: Workdir):
    wandb = importlib.import_module('wandb')
    held = read_object(workdir.wandb) or {}
    if not isinstance(held.get('id'), str):
      held = {'id': secrets.token_hex(4)}
      write_json(workdir.wandb, held)
    wanted = {'project': config.train.wandb, 'id': held['id'], 'resume': 'allow',
              'name': workdir.path.name, 'dir': str(workdir.path),
              'config': dataclasses.asdict(config)}
    offline = (f'; the run is kept in {workdir.path / "wandb"}: `wandb sync` with a folder '
               'offline-run-… there sends it')
    if 'WANDB_MODE' in os.environ:
      self._run = wandb.init(**wanted)
    elif not has_key(wandb):
      _say('Weights & Biases has no key here (WANDB_API_KEY, or `wandb login`)' + offline)
      self._run = wandb.init(**wanted, mode='offline')
    else:
      try:
        self._run = wandb.init(**wanted)
      except Exception as error:  # noqa: BLE001 a key that is refused, no network
        _say(f'warning: Weights & Biases cannot be used ({_line(error)}){offline}')
        wandb.teardown()  # its service holds the id for the run that did not come about
        self._run = wandb.init(**wanted, mode='offline')
    self._run.define_metric('step')
    self._run.define_metric('*', step_metric='step')

  def log(self, values: Mapping[str, float], step: int) -> None:
    self._run.log({**values, 'step': step})

  def close(self) -> None:
    self._run.finish()


def has_key(wandb: Any) -> bool:
  """Whether the library can log in: by the environment, or a login kept in ~/.netrc."""
  if os.environ.get('WANDB_API_KEY') or os.environ.get('WANDB_IDENTITY_TOKEN_FILE'):
    return True
  host = urllib.parse.urlparse(
      os.environ.get('WANDB_BASE_URL') or wandb.Settings().base_url).hostname
  try:
    kept = netrc.netrc(os.path.expanduser(os.environ.get('NETRC', '~/.netrc')))
  except (OSError, netrc.NetrcParseError):
    return False
  return host in kept.hosts


def check(config: Config) -> None:
  """Raises InputError, before anything is computed, where a logger's library is missing."""
  if config.train.wandb and 'wandb' not in sys.modules and (
      importlib.util.find_spec('wandb') is None):
    raise InputError(f'config.train.wandb is {config.train.wandb!r}, and its library is not '
                     "installed: pip install -e '.[wandb]', or --config.train.wandb=''")


def more(config: Config, workdir: Workdir, own: Sequence[Logger] = ()) -> list[Guarded]:
  """The loggers beside TensorBoard: the user's own, and what the configuration names."""
  own = [Guarded(logger) for logger in own]
  if not multihost.is_primary():
    return []
  if config.train.wandb:
    try:
      own.append(Guarded(WeightsAndBiases(config, workdir)))
    except Exception as error:  # noqa: BLE001 the library's own kinds
      raise InputError(f'config.train.wandb is {config.train.wandb!r}, and Weights & Biases '
                       f'cannot be started: {_line(error)}; expected a project that it '
                       "accepts, or --config.train.wandb=''") from None
  return own


def _line(error: Exception) -> str:
  return f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)
