"""What a training tells of its speed: tokens a second, MFU, a trace of some steps."""

import os
import pathlib
import platform
import re
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

import jax

from latent_reasoning.train import flops, hardware
from latent_reasoning.train.train_step import TrainState

if TYPE_CHECKING:
  from latent_reasoning.experiment import Experiment


def machine() -> str:
  """The accelerator, or the processor and how many cores of it may be used."""
  kind = jax.devices()[0].device_kind
  if kind != 'cpu':
    return kind
  info = pathlib.Path('/proc/cpuinfo')  # of Linux; platform.processor() is empty there
  text = info.read_text(encoding='utf-8') if info.exists() else ''
  name = re.search(r'model name\s*:\s*(.+)', text)
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  return (f'{name[1] if name else platform.processor() or platform.machine()}, {cores} core'
          + 's' * (cores != 1))


class Speed:
  """Adds up what steps did, and divides it by the time they took.

  Attributes:
    text: the last speeds in words.
  """

  def __init__(self, run: 'Experiment'):
    self._run = run
    self._peak = hardware.of(jax.devices()[0].device_kind)
    self._flops: dict[Hashable, float] = {}  # of a step, by stage and shapes
    self._tokens, self._places, self._done = 0, 0, 0.0
    self.text = ''

  def work(self, stage: int, state: TrainState, batch) -> tuple[int, int, float]:
    """Tokens of a step that are no padding, all of its places, and the model's FLOPs.

    FLOPs are counted once a shape, by tracing the step anew, and where a peak is known: 0
    elsewhere.
    """
    tokens = batch.real(self._run.tokenizer.pad), batch.places
    if not self._peak:
      return *tokens, 0.0
    key = stage, flops.shapes(batch)
    if key not in self._flops:
      whole = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), batch)
      self._flops[key] = flops.of_step(self._run, stage, state, whole, remat=False)
    return *tokens, self._flops[key]

  def add(self, work: tuple[int, int, float]) -> None:
    self._tokens += work[0]
    self._places += work[1]
    self._done += work[2]

  def take(self, seconds: float) -> dict[str, float]:
    """Of all that was added since: 'tokens_per_second' over all devices, 'padding', the share
    of places without a token, and 'mfu', the model's FLOPs as a share of the peak of all
    devices, where that is known."""
    tokens, places, done = self._tokens, self._places, self._done
    self._tokens, self._places, self._done = 0, 0, 0.0
    found = {'tokens_per_second': tokens / seconds, 'padding': 1 - tokens / max(1, places)}
    self.text = f"{found['tokens_per_second']:,.0f} tokens/s"
    if found['padding']:
      self.text += f" ({found['padding']:.0%} padding)"
    if self._peak:
      found['mfu'] = done / seconds / jax.device_count() / self._peak.flops
      self.text += f" MFU {found['mfu']:.1%}"
    return found


class Profile:
  """A trace by `jax.profiler` of some steps, after the first ones of a process.

  Args:
    path: the folder, which TensorBoard's profile plugin, xprof and Perfetto read.
    steps: how many; 0: none.
    start, total: the step that the process begins with, and that of the end.
    say: prints a line.
  """

  AFTER = 10  # steps, by which everything has been compiled

  def __init__(self, path: pathlib.Path, steps: int, start: int, total: int,
               say: Callable[[str], None]):
    self._path, self._say = path, say
    self._first = max(start, min(start + self.AFTER, total - steps)) if steps else -1
    self._last = self._first + steps
    self._running = False

  def at(self, step: int, state: TrainState) -> None:
    """Begins or ends before a step, of which this is the state."""
    if step == self._first:
      jax.block_until_ready(state)
      jax.profiler.start_trace(self._path)
      self._running = True
    elif step == self._last:
      jax.block_until_ready(state)
      self.close()

  def __enter__(self) -> 'Profile':
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def close(self) -> None:
    if self._running:
      self._running = False
      jax.profiler.stop_trace()
      self._say(f'profile from step {self._first + 1} on in {self._path}')
