"""Where a training step stands: its stage, its part, its progress, its learning rate.

All of it is a function of the step alone, so resuming restores it for free; but for the steps
at which parts of stage 1 began, where each goes on until it has converged, and the one at
which the last stage ended, where nothing improved any more: those are fields of the
curriculum, and of every checkpoint.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
import optax

from latent_reasoning.config import BaselinesConfig, OptimConfig, StageConfig
from latent_reasoning.errors import InputError


@dataclasses.dataclass(frozen=True)
class StageProgress:
  """One training step seen from its stage."""
  stage: int  # 1, 2
  step: int  # steps since the stage began
  steps: int  # length of the stage, without what is added to it
  part: int = 0  # of stage 1, from 0
  parts: int = 0  # how many there are, where they are not equally long

  @property
  def progress(self) -> float:
    """s / S of the annealing schedules, in [0, 1), or n / N in part n of N that are not equally
    long; steps added have that of the last."""
    return (self.part / self.parts if self.parts else
            min(self.step, self.steps - 1) / self.steps)


@dataclasses.dataclass(frozen=True)
class Curriculum:
  """Stages, and the parts of stage 1 of methods that change in its course.

  Attributes:
    stages: their configuration.
    lengths: steps of each.
    parts: how many parts stage 1 has.
    starts: steps at which parts 1, 2, … have begun; None: all parts are equally long.
    epoch: steps after which the optimizer state begins anew; 0: never.
    added: steps of the last stage that extend it, each time.
    ended: steps after which the last stage ended before its length; 0: it has not.
    per_epoch: steps of a pass over the training split.
  """
  stages: tuple[StageConfig, ...]
  lengths: tuple[int, ...]
  parts: int = 1
  starts: tuple[int, ...] | None = None
  epoch: int = 0
  added: tuple[int, ...] = ()
  ended: int = 0
  per_epoch: int = 1

  @property
  def total(self) -> int:
    return self.ended or sum(self.lengths)

  @property
  def taken(self) -> tuple[int, ...]:
    """Steps that are taken of each stage."""
    before = (sum(self.lengths[:i]) for i in range(len(self.lengths)))
    return tuple(max(0, min(n, self.total - start))
                 for n, start in zip(self.lengths, before, strict=True))

  @property
  def part_steps(self) -> tuple[int, ...]:
    """Steps that are taken of each part of stage 1."""
    parts = [self.at(step).part for step in range(self.taken[0])]
    return tuple(parts.count(part) for part in range(self.parts))

  def final(self, step: int) -> bool:
    """Whether a step trains what is asked at inference: RiM's stage 1 reads steps, not
    answers, out of blocks, and a part before the last leaves steps to be said."""
    moment, last = self.at(step), max(i for i, n in enumerate(self.lengths, 1) if n)
    return moment.stage == last and (moment.stage > 1 or moment.part == self.parts - 1)

  def at(self, step: int) -> StageProgress:
    """Returns the moment of a global step in 0 … total - 1."""
    start = 0
    for stage, length in enumerate(self.lengths, 1):
      if step < start + length:
        own = length - sum(self.added) * (start + length == sum(self.lengths))
        moment = StageProgress(stage, step - start, own)
        if stage > 1:
          return moment
        if self.starts is None:  # 1/49 · 49 is below 1
          return dataclasses.replace(moment, part=int(moment.progress * self.parts + 1e-9))
        part = sum(start <= step for start in self.starts)
        return dataclasses.replace(moment, part=part, parts=self.parts)
      start += length
    raise IndexError(f'step {step} is past the last one, {self.total - 1}')

  def with_part(self, step: int) -> 'Curriculum':
    """The same with a part that begins at a step."""
    return dataclasses.replace(self, starts=(*(self.starts or ()), step))

  def stage(self, step: int) -> StageConfig:
    return self.stages[self.at(step).stage - 1]

  def begins(self, step: int) -> bool:
    """Whether a stage, or a part of stage 1, begins at this step, other than the first."""
    moment = self.at(step)
    if moment.stage > 1 or not moment.step:
      return step > 0 and moment.step == 0
    return moment.part > self.at(step - 1).part

  def resets(self, step: int) -> bool:
    """Whether a new optimizer state begins at this step, other than the first."""
    moment = self.at(step)
    anew = bool(self.epoch) and moment.step > 0 and moment.step % self.epoch == 0
    return self.stage(step).reset_optimizer and (anew or self.begins(step))

  def learning_rate(self, step: int) -> float:
    """Linear warm-up from lr / n, then constant, or a half cosine towards 0.

    Steps that extend a cosine stage are a warm restart (Loshchilov and Hutter, SGDR, arXiv
    1608.03983): warm-up and cosine over them, so that a rate depends on the step alone, not
    on when the run was extended.
    """
    moment, stage = self.at(step), self.stage(step)
    steps, place = moment.steps, moment.step
    for more in self.added:
      if place < steps:
        break
      steps, place = more, place - steps
      if stage.schedule == 'constant':
        stage = dataclasses.replace(stage, warmup=0.0)
    return float(_rates(stage, steps)[place])

  @property
  def extension(self) -> str:
    """What is added to the last stage, and how its learning rate goes on, in words."""
    stage = self.stages[self.at(self.total - 1).stage - 1]
    how = (f'stays {stage.learning_rate:g}' if stage.schedule == 'constant' else
           f'warms up to {stage.learning_rate:g} and falls to 0 (cosine) once more over them')
    return (f"the last stage is extended by {' + '.join(f'{n:,}' for n in self.added)} steps; "
            f'the learning rate {how}')


@functools.lru_cache(maxsize=4)
def _rates(stage: StageConfig, steps: int) -> np.ndarray:
  """The learning rate of each step of a stage."""
  peak, warmup = stage.learning_rate, round(stage.warmup * steps)
  after = (optax.constant_schedule(peak) if stage.schedule == 'constant' else
           optax.cosine_decay_schedule(peak, max(1, steps - warmup)))
  rising = optax.linear_schedule(peak / max(1, warmup), peak, max(1, warmup - 1))
  schedule = optax.join_schedules([rising, after], [warmup])
  return np.broadcast_to(np.asarray(schedule(np.arange(steps))), (steps,))


def converged(scores: Sequence[float], config: BaselinesConfig) -> bool:
  """Whether a part of stage 1 is done, by the scores of its validations."""
  return bool(config.part_accuracy and scores[-1] >= config.part_accuracy) or stalled(
      scores, config.part_patience)


def stalled(scores: Sequence[float], patience: int) -> bool:
  """Whether the last `patience` scores are no better than the best before, or that is an
  accuracy of 1, which none can be better than; 0: never."""
  best = max(range(len(scores)), key=lambda i: (scores[i], -i))  # the first of the best
  return bool(patience) and (len(scores) - 1 - best >= patience or scores[best] >= 1)


def build(config: OptimConfig, examples: int, parts: int = 1, extend: tuple[int, ...] = (),
          reset_epochs: bool = False) -> Curriculum:
  """Turns epochs into steps, at most config.max_epochs a stage; a partial batch at an epoch's
  end is not trained on. The last stage has `extend` steps more.

  Args:
    parts: of stage 1, equally long.
    reset_epochs: whether each epoch begins with a new optimizer state.

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
  last = max(i for i, length in enumerate(lengths) if length)
  lengths = tuple(n + sum(extend) * (i == last) for i, n in enumerate(lengths))
  return Curriculum(stages, lengths, parts, epoch=per_epoch * reset_epochs, added=extend,
                    per_epoch=per_epoch)
