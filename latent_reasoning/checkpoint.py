"""Checkpoints through orbax: asynchronous, hashed, with a way back.

Orbax judges a checkpoint complete by its name and keeps no checksum of array
data, so each one carries a hash per array in its metadata. `restore` verifies
them and falls back to the newest sound checkpoint; an unsound one is set aside,
never deleted.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers

from latent_reasoning.errors import InputError
from latent_reasoning.step import TrainState


def _tree(state: TrainState) -> dict[str, Any]:
  return {'step': state.step, 'params': state.params, 'opt_state': state.opt_state}


def _hash(data) -> str:
  return hashlib.blake2b(data, digest_size=16).hexdigest()


def describe(tree: Any, hashed: bool = True) -> dict[str, str]:
  """Returns {path: 'dtype[shape] hash'} of every array."""
  described = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    text = f'{np.dtype(leaf.dtype)}{list(leaf.shape)}'
    if hashed:
      text = f'{text} {_hash(np.ascontiguousarray(leaf))}'
    described[jax.tree_util.keystr(path)] = text
  return described


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
  """The checkpoints of one run, one writer at a time.

  Args:
    path: absolute folder; made if needed.
    keep: newest ones kept, beside the best by validation accuracy.
    warn: told, in words, of a checkpoint that was set aside.
  """

  def __init__(self, path: pathlib.Path, keep: int = 3,
               warn: Callable[[str], None] = logging.warning):
    self.path, self.warn = path, warn
    self._accuracy: dict[int, float] = {}
    policies = checkpoint_managers
    self._manager = ocp.CheckpointManager(
        path, options=ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([
                policies.LatestN(keep), _Best(self._accuracy)]),
            enable_async_checkpointing=True))
    for step in self.steps():
      meta = self._meta(step)
      if meta and meta.get('accuracy') is not None:
        self._accuracy[step] = meta['accuracy']

  def steps(self) -> list[int]:
    """Steps that have a checkpoint, newest first."""
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
            'arrays': describe(jax.device_get(tree))}
    meta['hash'] = _hash(json.dumps(meta, sort_keys=True).encode())
    if accuracy is not None:
      self._accuracy[step] = accuracy
    self._manager.save(step, force=True, args=ocp.args.Composite(
        state=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave(meta)))

  def wait(self) -> None:
    """Blocks until the last save is on disk."""
    self._manager.wait_until_finished()

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
    """
    steps = self.steps() if step is None else [step]
    for candidate in steps:
      own = like(candidate) if callable(like) else like
      found, reason = self._try(own, candidate)
      if found:
        return found
      if step is not None:
        raise InputError(f'checkpoint {step} of {self.path} is unsound ({reason}); take '
                         'the newest sound one with --config.eval.checkpoint=last')
      aside = self._set_aside(candidate)
      self.warn(f'checkpoint {candidate} of {self.path} is unsound ({reason}); it was '
                f'moved to {aside} and the one before it is used')
    if steps:
      raise InputError(f'no sound checkpoint in {self.path} (last reason: {reason}); '
                       'start again in another --workdir=DIR')
    return None

  def _try(self, like: TrainState, step: int) -> tuple[Restored | None, str]:
    meta = self._meta(step)
    if not meta:
      return None, 'its metadata cannot be read, or its hash differs'
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _tree(like))
    expected = describe(abstract, hashed=False)
    saved = {path: text.rsplit(' ', 1)[0] for path, text in meta['arrays'].items()}
    if expected != saved:
      wrong = sorted(k for k in expected.keys() | saved.keys()
                     if expected.get(k) != saved.get(k))
      raise InputError(
          f'checkpoint {step} of {self.path} does not hold this model: {wrong[0]} is '
          f'{saved.get(wrong[0], "absent")}, expected {expected.get(wrong[0], "absent")} '
          f'({len(wrong)} such arrays); use the configuration it was trained with')
    try:
      tree = self._manager.restore(
          step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))['state']
    except Exception as error:  # noqa: BLE001 orbax raises many kinds for a damaged file
      return None, f'{type(error).__name__}: {str(error).splitlines()[0][:200]}'
    damaged = [path for path, text in describe(jax.device_get(tree)).items()
               if meta['arrays'][path] != text]
    if damaged:
      return None, f'the hash of {damaged[0]} differs, {len(damaged)} arrays in all'
    return Restored(TrainState(**tree), step, meta), ''

  def _meta(self, step: int) -> dict[str, Any] | None:
    try:
      meta = self._manager.restore(
          step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))['meta']
      written = meta.pop('hash')
    except Exception:  # noqa: BLE001 as above
      return None
    sound = written == _hash(json.dumps(meta, sort_keys=True).encode())
    return meta if sound else None

  def _set_aside(self, step: int) -> pathlib.Path:
    aside = self.path.parent / 'unsound' / str(step)
    aside.parent.mkdir(exist_ok=True)
    number = 0
    while aside.exists():
      number += 1
      aside = aside.with_name(f'{step}.{number}')
    (self.path / str(step)).rename(aside)
    self._accuracy.pop(step, None)
    self._manager.reload()
    return aside

  def close(self) -> None:
    self._manager.close()
