"""Parameters of another run's checkpoint, without the model that they are of."""

import re
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from latent_reasoning.errors import InputError, TrainingError
from latent_reasoning.train import attempts, checkpoint, hashes, seals
from latent_reasoning.train.checkpoint import Checkpoints


def parameters(path: epath.PathLike, best: bool) -> tuple[dict[tuple[str, ...], np.ndarray],
                                                          dict[str, Any]]:
  """The parameters of a run by their paths, on the host, verified by their hashes.

  Shapes and types are those that the checkpoint says of itself. Of optimizer states nothing
  is read.

  Args:
    path: of the folder of checkpoints.
    best: the best by validation accuracy, where one was measured; else the newest.

  Returns:
    the parameters, and the checkpoint's metadata.

  Raises:
    InputError: there is no checkpoint, or it is unsound.
    TrainingError: it could not be read.
  """
  found = Checkpoints(path, writer=False)
  try:
    step = (found.best() if best else None) or next(iter(found.steps()), None)
    if step is None:
      raise InputError(f'there is no checkpoint in {path} to begin with; train that run first')
    return _read(found, step)
  except attempts.Unreadable as error:
    raise TrainingError(f'checkpoint {step} of {path} could not be read: {error}') from None
  finally:
    found.close()


def _read(found: Checkpoints, step: int):
  def unsound(why: str) -> InputError:
    return InputError(f'checkpoint {step} of {found.path} is unsound ({why}); nothing can '
                      'begin with it')
  broken, reason = found._attempt(step, lambda: seals.broken(found.path, step))
  meta = None if broken is None or broken else found._meta(step)[0]
  if meta is None or meta.get('format') != checkpoint.FORMAT:
    raise unsound(broken or reason or 'its metadata cannot be read, or are of another version')
  like = {}
  for name, text in meta['arrays'].items():
    parts = re.findall(r"\['(.*?)'\]", name)
    if parts[:1] == ['params']:
      kind, _, shape = text.rpartition(' ')[0].partition('[')
      inner = like
      for part in parts[:-1]:
        inner = inner.setdefault(part, {})
      inner[parts[-1]] = jax.ShapeDtypeStruct(
          tuple(map(int, re.findall(r'\d+', shape))), jax.numpy.dtype(kind))
  options = jax.tree.map(lambda a: ocp.RestoreArgs(restore_type=np.ndarray), like)
  tree, reason = found._attempt(step, lambda: found._manager.restore(
      step, args=ocp.args.Composite(state=ocp.args.PyTreeRestore(
          item=like, restore_args=options, partial_restore=True)))['state'])
  if tree is None:
    raise unsound(reason)
  out = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    name = jax.tree_util.keystr(path)
    if hashes.describe({'params': leaf})["['params']"] != meta['arrays'][name]:
      raise unsound(f'the hash of {name} differs')
    out[tuple(key.key for key in path[1:])] = leaf
  return out, meta
