"""Logs of a run: metrics.jsonl, the loggers beside it, and a line or bar to watch."""

import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import tqdm

from latent_reasoning.parallel import multihost
from latent_reasoning.train.loggers import Logger, TensorBoard
from latent_reasoning.train.workdir import Workdir, write_text


def plain(value: Any) -> Any:
  """Device scalars as Python numbers; what is not finite as text, for strict JSON."""
  value = float(value) if hasattr(value, 'dtype') else value
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  return value


class Metrics:
  """Writes one JSON object a line: step, stage, split, values; its numbers to `loggers` too.

  Lines past the step that a run resumes from, and lines that are damaged, go to the file
  beside it whose name has `void`, so that this one never holds a step twice and nothing is
  lost.
  """

  def __init__(self, workdir: Workdir, step: int, causal: bool = True,
               loggers: Sequence[Logger] = ()):
    self._mark = {} if causal else {'causal': False}  # beside every such number
    if not multihost.is_primary():
      return
    self._path = workdir.metrics
    if self._path.exists():
      _keep_until(self._path, step)
    self._file = self._path.open('a', encoding='utf-8')
    self._loggers = [TensorBoard(str(workdir.events), step), *loggers]

  def write(self, step: int, stage: int, split: str, **values: Any) -> None:
    if not multihost.is_primary():
      return
    values = {k: plain(v) for k, v in values.items()}
    record = {'step': step, 'stage': stage, 'split': split, **self._mark, **values}
    self._file.write(json.dumps(record) + '\n')
    self._file.flush()
    prefix = 'NOT_CAUSAL/' if self._mark else ''
    numbers = {f'{prefix}{split}/{name}': value for name, value in values.items()
               if isinstance(value, (int, float))}
    for logger in self._loggers:
      logger.log(dict(numbers), step)

  def close(self) -> None:
    if not multihost.is_primary():
      return
    self._file.close()
    for logger in self._loggers:
      logger.close()


def _keep_until(path: pathlib.Path, step: int) -> None:
  """Moves what is not of a step up to `step` to the file beside."""
  kept, void = [], []
  for line in path.read_bytes().split(b'\n'):
    record = _record(line)
    (kept if record and record['step'] <= step else void).append(line + b'\n')
  void = [line for line in void if line.strip()]
  if void:
    with path.with_name(f'{path.stem}.void{path.suffix}').open('ab') as file:
      file.writelines(void)
    write_text(path, b''.join(kept).decode())


def _record(line: bytes) -> dict[str, Any] | None:
  """One line of metrics.jsonl; None where it is damaged or cut off by a killed writer."""
  try:
    found = json.loads(line)
  except (ValueError, RecursionError):
    return None
  sound = (isinstance(found, dict) and type(found.get('step')) is int
           and type(found.get('stage')) is int and isinstance(found.get('split'), str))
  return found if sound else None


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The records of metrics.jsonl; what is damaged is left out."""
  return [r for line in path.read_bytes().split(b'\n') if (r := _record(line))]


def seconds(records: Sequence[dict[str, Any]]) -> float:
  """Training time, compilation, validation and checkpoints included.

  What was trained twice, because a run was killed and went on from a checkpoint, counts
  once; the time between the two processes does not.
  """
  total, before = 0.0, 0
  for record in records:
    speed = record.get('steps_per_second')
    if record['split'] == 'train' and isinstance(speed, (int, float)) and speed > 0:
      total += (record['step'] - before) / speed
      before = record['step']
  return total


SILENT = 30.0  # seconds after which a line comes before its step


class Progress:
  """A bar on a terminal or in a notebook; elsewhere a plain line every `every` steps, or where
  steps are slow."""

  def __init__(self, total: int, start: int, every: int, causal: bool = True, stream=None):
    self._mark = '' if causal else ' (NOT CAUSAL)'  # beside every such loss
    self._total, self._start, self._every = total, start, every
    self._stream = stream or (sys.stderr if multihost.is_primary() else open(os.devnull, 'w'))
    self._began = self._last = time.monotonic()
    self._bar = None
    notebook = type(self._stream).__module__.startswith('ipykernel')  # its output is kept
    if notebook or self._stream.isatty():
      self._bar = tqdm.tqdm(total=total, initial=start, unit='step', file=self._stream,
                            dynamic_ncols=not notebook, mininterval=2 if notebook else 0.1)

  def update(self, step: int, stage: int, loss: float, speed: str = '') -> None:
    """Shows that `step` steps are done, and what the loop says of its speed."""
    if self._bar:
      self._bar.set_description(f'stage {stage}', refresh=False)
      self._bar.set_postfix_str(f'loss={loss:.4f}{self._mark} {speed}', refresh=False)
      self._bar.update(step - self._bar.n)
      return
    now = time.monotonic()
    if step % self._every == 0 or step == self._total or now - self._last > SILENT:
      self._last = now
      rate = (step - self._start) / max(1e-9, now - self._began)
      left = (self._total - step) / max(1e-9, rate)
      pace = f'{rate:.1f} steps/s' if rate >= 0.5 else f'{1 / max(1e-9, rate):.1f} s a step'
      self.say(f'step {step}/{self._total} stage {stage} loss {loss:.4f}{self._mark} '
               f'{pace} {left:.0f} s left {speed}'.rstrip())

  def say(self, text: str) -> None:
    """Prints a line without tearing the bar."""
    if self._bar:
      self._bar.write(text, file=self._stream)
    else:
      print(text, file=self._stream, flush=True)

  def close(self) -> None:
    if self._bar:
      self._bar.close()
