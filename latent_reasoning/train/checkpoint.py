"""Checkpoints through orbax: asynchronous, hashed, with a way back.

Orbax judges a checkpoint complete by its name and keeps no checksum of array
data, so each one carries a hash per array in its metadata. A hash is worked out on
the devices and does not depend on where the parts of an array lie, so a checkpoint
is verified on any mesh and by any number of processes. Beside the checkpoints lies a
seal of each: sizes of its files, and hashes of the small ones, for what no array shows.

Damage is what hashes and decoders say of bytes that could be read. An error of reading (a
disk, a network, too little memory) is tried again, then reported, and changes nothing. Only a
writer, training, sets an unsound checkpoint aside, never deletes it, and falls back to the
newest sound one; a reader beside it skips what is unsound, and what the writer has removed.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import checkpoint_managers

from latent_reasoning.data import storage
from latent_reasoning.errors import InputError, TrainingError
from latent_reasoning.parallel import multihost
from latent_reasoning.train import attempts, copied, hashes, seals, versions
from latent_reasoning.train.train_step import TrainState

FORMAT = 4  # of what a checkpoint holds; one of another is refused


# Orbax logs the traceback of a failed save beside raising it; the raise becomes our error.
logging.get_absl_logger().addFilter(
    lambda record: record.levelno < logging.ERROR or 'orbax' not in record.pathname)


def _without_echo(raised, hook=sys.unraisablehook):
  # Threads that write a checkpoint's files say this, file by file, after a save has failed.
  if str(raised.exc_value) != 'Event loop is closed':
    hook(raised)


sys.unraisablehook = _without_echo


def _tree(state: TrainState) -> dict[str, Any]:
  return {'step': state.step, 'params': state.params, 'opt_state': state.opt_state}


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  """Shape, type and place; without a place of its own, the one device here, or orbax asks
  for the devices that saved it."""
  place = getattr(leaf, 'sharding', None) or SingleDeviceSharding(jax.devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


@dataclasses.dataclass(frozen=True)
class Restored:
  state: TrainState
  step: int
  meta: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Best(checkpoint_managers.PreservationPolicy):
  """Keeps the best by accuracy. Orbax's own forgets it when a run starts again."""
  accuracy: dict[int, float]  # by step

  def should_preserve(self, checkpoints, *, context):
    best = _best(self.accuracy, [c.step for c in checkpoints])
    return [c.step == best for c in checkpoints]


def _best(accuracy: dict[int, float], steps: Iterable[int]) -> int | None:
  """The step of the best accuracy, the latest of equals."""
  scored = [(accuracy[step], step) for step in steps if step in accuracy]
  return max(scored)[1] if scored else None


class Checkpoints:
  """The checkpoints of one run, one writer at a time; of several processes, all call.

  Args:
    path: absolute folder, or a bucket's; made if needed.
    keep: newest ones kept, beside the best by validation accuracy.
    warn: called with what is wrong with a checkpoint that is unsound.
    writer: whether it may save, and set aside what is unsound.

  Raises:
    InputError: the folder cannot be used.
  """

  def __init__(self, path: epath.PathLike, keep: int = 3,
               warn: Callable[[str], None] = logging.warning, writer: bool = True):
    self.path, self.warn, self._writer = epath.Path(path), warn, writer
    self._accuracy: dict[int, float] = {}
    self.ended = 0  # after how many steps training ended early, as a checkpoint says
    self._manager = None
    policies = checkpoint_managers
    try:
      if not writer and not self.path.exists():
        return
      self.path.mkdir(parents=True, exist_ok=True)
    except (OSError, ImportError) as error:
      raise InputError(f'cannot use {path} for checkpoints: {error}; give another '
                       f'--workdir=DIR{storage.library(path)}') from None
    multihost.check_shared(self.path)
    self._manager = ocp.CheckpointManager(
        self.path, options=ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([
                policies.LatestN(keep), _Best(self._accuracy)]),
            read_only=not writer, enable_async_checkpointing=writer))
    if writer and multihost.broadcast(multihost.is_primary() and copied.commit(
        self.path, self.steps(), warn)):
      self._manager.reload()
    for step in self.steps():
      with contextlib.suppress(attempts.Unreadable):  # reported where it is asked for
        meta = self._meta(step)[0]
        if meta and meta.get('accuracy') is not None:
          self._accuracy[step] = meta['accuracy']
        self.ended = self.ended or (meta or {}).get('stopping', {}).get('ended', 0)

  def steps(self) -> list[int]:
    """Steps that have a checkpoint, newest first."""
    if self._manager is None:
      return []
    if not self._writer:
      self._manager.reload()
    return sorted(self._manager.all_steps(), reverse=True)

  def save(self, state: TrainState, accuracy: float | None = None, **meta: Any) -> None:
    """Starts saving; returns once the state is copied off the device.

    Args:
      state: what to save, under its own step.
      accuracy: on validation data at this step, if measured.
      **meta: JSON values kept beside it.
    """
    step = int(state.step)
    tree = _tree(state)
    meta = {**meta, 'step': step, 'accuracy': accuracy,
            'processes': multihost.count(), 'versions': versions.here(), 'format': FORMAT,
            'arrays': hashes.describe(tree)}
    meta = json.loads(json.dumps(meta))  # as it will be read
    meta['hash'] = hashes.digest(json.dumps(meta, sort_keys=True).encode())
    if accuracy is not None:
      self._accuracy[step] = accuracy
    self.wait()
    if multihost.is_primary():
      seals.path(self.path, step).unlink(missing_ok=True)  # of an earlier one of this step
    with self._saving():
      self._manager.save(step, force=True, args=ocp.args.Composite(
          state=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave(meta)))

  def wait(self) -> None:
    """Blocks until the last save is on disk."""
    if self._manager is None or not self._writer:
      return
    with self._saving():
      self._manager.wait_until_finished()
      if multihost.is_primary():
        seals.write(self.path, self.steps())

  def _attempt(self, step: int, read: Callable[[], Any]) -> tuple[Any, str]:
    return attempts.attempt(self.path / str(step), read)

  @contextlib.contextmanager
  def _saving(self):
    """Turns what a save ends in, perhaps an earlier one's, into one error."""
    try:
      yield
    except jax.errors.JaxRuntimeError:  # of a lost process
      raise
    except Exception as error:  # noqa: BLE001 orbax raises many kinds, a full disk's too
      self._manager = None  # it would wait for that save again
      complete = [int(p.name) for p in self.path.iterdir() if p.name.isdigit()
                  ] if self.path.exists() else []
      raise TrainingError(
          f'a checkpoint could not be saved in {self.path}: {type(error).__name__}: '
          f'{str(error).strip().splitlines()[0][:300]}. '
          + (f'The newest complete one is of step {max(complete)}' if complete else
             'There is no complete one yet')
          + '; free space or mend the folder, and the same command goes on') from None

  def best(self) -> int | None:
    """The step of the best validation accuracy, the latest of equals."""
    return _best(self._accuracy, self.steps())

  def restore(self, like: TrainState | Callable[[int], TrainState],
              step: int | None = None) -> Restored | None:
    """Restores a step, or the newest sound one.

    Args:
      like: a state, or its `jax.eval_shape`, of the configured model; or a function
        of the step that returns it, where stages differ in their optimizer.
      step: exactly this one; None: the newest, falling back to older ones.

    Returns:
      None if there is no checkpoint yet.

    Raises:
      InputError: the arrays saved are not those of the model, or no checkpoint
        is sound.
      TrainingError: one could not be read, and nothing was changed.
    """
    tried, reason = set(), ''
    while steps := multihost.broadcast([s for s in (
        self.steps() if step is None else [step]) if s not in tried]):
      candidate = steps[0]
      tried.add(candidate)
      found, reason, unreadable = None, '', ''
      try:
        found, reason = self._try(like if callable(like) else lambda _: like, candidate)
      except attempts.Unreadable as error:
        unreadable = str(error)
      if not multihost.all_processes(not unreadable):
        raise TrainingError(
            f'checkpoint {candidate} of {self.path} could not be read in {attempts.TRIES} '
            f'tries ({unreadable or "by another process"}); nothing was changed. Mend the disk '
            'or free memory, and the same command goes on')
      if multihost.all_processes(found is not None):
        return found
      reason = reason or 'another process could not read it'
      if step is not None:
        raise InputError(f'checkpoint {step} of {self.path} is unsound ({reason}); take '
                         'the newest sound one with --config.eval.checkpoint=last')
      if self._writer:
        aside = self._set_aside(candidate)
        self.warn(f'checkpoint {candidate} of {self.path} is unsound ({reason}); it was '
                  f'moved to {aside} and the one before it is used')
      elif (self.path / str(candidate)).exists():  # else its writer has removed it
        self.warn(f'checkpoint {candidate} of {self.path} is unsound ({reason}); the one '
                  'before it is used')
    if tried:
      raise InputError(f'no sound checkpoint in {self.path} (last reason: {reason}); '
                       'start again in another --workdir=DIR, or in this one with '
                       '--config.train.restart=True')
    return None

  def _try(self, like: Callable[[int], TrainState], step: int
           ) -> tuple[Restored | None, str]:
    """The checkpoint, or None and what is wrong with it; raises as `_attempt`."""
    broken, reason = self._attempt(step, lambda: seals.broken(self.path, step))
    if broken is None or broken:
      return None, broken or reason
    meta, reason = self._meta(step)
    if not meta:
      return None, reason or 'its metadata cannot be read, or its hash differs'
    if meta.get('format') != FORMAT:
      raise InputError(
          f'checkpoint {step} of {self.path} has the format {meta.get("format", 1)} of another '
          f'version of latent_reasoning; this one reads format {FORMAT}. Use the version that '
          f"wrote it ({meta.get('versions', {}).get('latent_reasoning', 'unknown')}), or train "
          'again in another --workdir=DIR')
    if meta['step'] != step:
      return None, f'it is a copy of the checkpoint of step {meta["step"]}'
    abstract = jax.tree.map(_abstract, _tree(like(step)))
    expected = hashes.describe(abstract, hashed=False)
    saved = {path: text.rsplit(' ', 1)[0] for path, text in meta['arrays'].items()}
    if expected != saved:
      wrong = sorted(k for k in expected.keys() | saved.keys()
                     if expected.get(k) != saved.get(k))
      raise InputError(
          f'checkpoint {step} of {self.path} does not hold this model: {wrong[0]} is '
          f'{saved.get(wrong[0], "absent")}, expected {expected.get(wrong[0], "absent")} '
          f'({len(wrong)} such arrays); use the configuration it was trained with')
    tree, reason = self._attempt(step, lambda: self._manager.restore(
        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))['state'])
    if tree is None:
      return None, reason
    damaged = [path for path, text in hashes.describe(tree).items()
               if meta['arrays'][path] != text]
    if damaged:
      return None, f'the hash of {damaged[0]} differs, {len(damaged)} arrays in all'
    return Restored(TrainState(**tree), step, meta), ''

  def _meta(self, step: int) -> tuple[dict[str, Any] | None, str]:
    """The metadata of a step, or None and what is wrong with it."""
    meta, reason = self._attempt(step, lambda: self._manager.restore(
        step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))['meta'])
    if not isinstance(meta, dict) or not meta.keys() >= {'hash', 'step', 'arrays'}:
      return None, reason
    written = meta.pop('hash')
    same = written == hashes.digest(json.dumps(meta, sort_keys=True).encode())
    return (meta if same else None), ''

  def _set_aside(self, step: int) -> epath.Path:
    folder, number = self.path.parent / 'unsound', 0
    aside = folder / str(step)
    if multihost.is_primary():
      folder.mkdir(exist_ok=True)
      while aside.exists():
        number += 1
        aside = folder / f'{step}.{number}'
      (self.path / str(step)).rename(aside)
      seals.path(self.path, step).unlink(missing_ok=True)
    aside = epath.Path(multihost.broadcast(str(aside)))
    self._accuracy.pop(step, None)
    self._manager.reload()
    return aside

  def verify(self, like: Callable[[int], TrainState],
             check: Callable[[dict[str, Any]], None] = lambda meta: None) -> dict[int, str]:
    """What is wrong with each checkpoint, by step, the newest first; '': nothing.

    Args:
      check: raises InputError where the metadata of a sound one do not fit what is here.
    """
    found = {}
    for step in self.steps():
      try:
        restored, found[step] = self._try(like, step)
        if restored:
          check(restored.meta)
      except (InputError, attempts.Unreadable) as error:
        found[step] = str(error)
    return found

  def close(self) -> None:
    if self._manager:
      with self._saving():
        self._manager.close()
