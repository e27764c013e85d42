"""What a checkpoint was written with, beside what reads it."""

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

PACKAGES = ('latent_reasoning', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain')


def here() -> dict[str, str]:
  """Of Python, and of the packages that training depends on."""
  found = {'python': platform.python_version()}
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # a checkout on PYTHONPATH, say
      found[name] = 'not installed'
  return found


def changes(meta: Mapping[str, Any]) -> str:
  """In one line, what differs from the versions that a checkpoint's metadata name; ''.

  It is no reason to refuse one: what it holds is hashed, and its shapes are compared.
  """
  then, now = meta.get('versions'), here()
  if not isinstance(then, dict):
    return ''
  differ = [f'{name} {then[name]} -> {now[name]}' for name in now
            if name in then and then[name] != now[name]]
  return (f'the checkpoint of step {meta.get("step")} was written with other versions (there '
          f'-> here: {", ".join(differ)}); its numbers may go on differently in the last digits'
          if differ else '')
