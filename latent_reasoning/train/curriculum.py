"""Where a training step stands: its stage, its progress, its learning rate.

All of it is a function of the step alone, so resuming restores it for free.
"""

import dataclasses
import functools
import math

import numpy as np
import optax

from latent_reasoning.config import OptimConfig, StageConfig
from latent_reasoning.errors import InputError


@dataclasses.dataclass(frozen=True)
class StageProgress:
  """One training step seen from its stage."""
  stage: int  # 1, 2
  step: int  # steps since the stage began
  steps: int  # length of the stage

  @property
  def progress(self) -> float:
    """s / S of the annealing schedules, in [0, 1)."""
    return self.step / self.steps


@dataclasses.dataclass(frozen=True)
class Curriculum:
  stages: tuple[StageConfig, ...]
  lengths: tuple[int, ...]  # steps of each stage
  parts: int = 1  # equal ones of stage 1, of methods that change in its course

  @property
  def total(self) -> int:
    return sum(self.lengths)

  def at(self, step: int) -> StageProgress:
    """Returns the moment of a global step in 0 … total - 1."""
    start = 0
    for stage, length in enumerate(self.lengths, 1):
      if step < start + length:
        return StageProgress(stage, step - start, length)
      start += length
    raise IndexError(f'step {step} is past the last one, {self.total - 1}')

  def stage(self, step: int) -> StageConfig:
    return self.stages[self.at(step).stage - 1]

  def begins(self, step: int) -> bool:
    """Whether a stage, or a part of stage 1, begins at this step, other than the first."""
    moment = self.at(step)
    if moment.stage > 1 or not moment.step:
      return step > 0 and moment.step == 0
    part, before = (int(s / moment.steps * self.parts) for s in (moment.step, moment.step - 1))
    return part > before

  def learning_rate(self, step: int) -> float:
    """Linear warm-up from lr / n, then constant, or a half cosine towards 0."""
    moment = self.at(step)
    return float(_rates(self.stage(step), moment.steps)[moment.step])


@functools.lru_cache(maxsize=4)
def _rates(stage: StageConfig, steps: int) -> np.ndarray:
  """The learning rate of each step of a stage."""
  peak, warmup = stage.learning_rate, round(stage.warmup * steps)
  after = (optax.constant_schedule(peak) if stage.schedule == 'constant' else
           optax.cosine_decay_schedule(peak, max(1, steps - warmup)))
  rising = optax.linear_schedule(peak / max(1, warmup), peak, max(1, warmup - 1))
  schedule = optax.join_schedules([rising, after], [warmup])
  return np.broadcast_to(np.asarray(schedule(np.arange(steps))), (steps,))


def build(config: OptimConfig, examples: int, parts: int = 1) -> Curriculum:
  """Turns epochs into steps, at most config.max_epochs a stage; a partial batch at an epoch's
  end is not trained on.

  Raises:
    InputError: no stage has a step, or there are fewer examples than a batch.
  """
  per_epoch = examples // config.batch_size
  if not per_epoch:
    raise InputError(
        f'the training split has {examples} problems, fewer than '
        f'config.optim.batch_size {config.batch_size}; lower the batch size')
  stages = (config.stage1, config.stage2)
  lengths = tuple(s.steps or math.ceil(s.epochs * per_epoch) for s in stages)
  if config.max_epochs:
    lengths = tuple(min(n, math.ceil(config.max_epochs * per_epoch)) for n in lengths)
  if not sum(lengths):
    raise InputError('no training step: set config.optim.stage1.steps or .epochs, or '
                     'those of stage2, above 0')
  return Curriculum(stages, lengths, parts)
