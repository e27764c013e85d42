"""Training FLOPs: of matrix products, counted in the program that is traced.

XLA's own analysis counts the body of a loop once, so it is wrong wherever layers,
microbatches or chunks are scanned. Here a body counts as often as it runs, and the count
is the same on every device. Elementwise work is left out.
"""

import dataclasses
import math
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from latent_reasoning.models import attention
from latent_reasoning.train import train_step as step_lib

if TYPE_CHECKING:
  from latent_reasoning.experiment import Experiment

SAMPLED = 16  # steps of a stage whose shapes are looked at


def of_jaxpr(jaxpr) -> float:
  """FLOPs of the matrix products of a jaxpr: 2 · batch · rows · columns · contracted.

  The dearest branch of a `cond` counts. Of a `while`, whose length no one knows ahead,
  one pass counts; training has none.
  """
  total = 0.0
  for equation in jaxpr.eqns:
    name, given = equation.primitive.name, equation.params
    if name == 'dot_general':
      (contracted, _), _ = given['dimension_numbers']
      left = equation.invars[0].aval.shape
      total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(
          left[i] for i in contracted)
      continue
    inner = [of_jaxpr(sub) for sub in jax.tree.leaves(
        [_jaxprs(value) for value in given.values()], is_leaf=lambda x: hasattr(x, 'eqns'))]
    if inner:
      total += max(inner) if name == 'cond' else sum(inner) * given.get('length', 1)
  return total


def _jaxprs(value: Any) -> list:
  """The jaxprs among an equation's parameters."""
  if isinstance(value, (tuple, list)):
    return [found for one in value for found in _jaxprs(one)]
  value = getattr(value, 'jaxpr', value)  # of a ClosedJaxpr
  return [value] if hasattr(value, 'eqns') else []


def of_step(run: 'Experiment', stage: int, state, batch, remat: bool = True) -> float:
  """FLOPs of a training step, forward, backward and update.

  Args:
    state, batch: arrays, of which the shapes count.
    remat: also count what model.remat does a second time; False: the model's FLOPs, of
      which MFU is a share. Attention counts as 'split' where a kernel does it.
  """
  model = run.model(run.curriculum.stages[stage - 1].dropout)
  model = model.clone(config=dataclasses.replace(
      attention.without_kernel(model.config), loss_tile=0))  # the same products, on all devices
  if not remat:
    model = model.clone(config=dataclasses.replace(model.config, remat='none'))
  step = step_lib.make_train_step(model, run.objective, run.tx(stage), run.config.seed,
                                  run.config.optim.grad_accum_steps, run.trained)
  given = jax.eval_shape(lambda *a: a, state, batch)
  return of_jaxpr(jax.make_jaxpr(step)(*given, 1.0).jaxpr)


def shapes(batch) -> Hashable:
  """What the FLOPs of a stage's step depend on."""
  return jax.tree.structure(batch), *(a.shape for a in jax.tree.leaves(batch))


def training(run: 'Experiment') -> dict[str, Any]:
  """FLOPs of a whole training, forward, backward and update.

  Steps of a stage differ in their static sizes only; `SAMPLED` of them, evenly spaced,
  stand for all.

  Returns:
    {'flops', 'epochs': passes over the training split, 'stages': [{'stage', 'steps',
    'flops'}, …]}.
  """
  curriculum, stages, first = run.curriculum, [], 0
  for number, steps in enumerate(curriculum.taken, 1):
    if not steps:
      continue
    state = jax.eval_shape(lambda number=number: run.fresh(number))
    known, costs = {}, []
    for at in np.unique(np.linspace(first, first + steps - 1, SAMPLED).astype(int)):
      batch = run.batches.at(int(at))
      if shapes(batch) not in known:
        known[shapes(batch)] = of_step(run, number, state, batch)
      costs.append(known[shapes(batch)])
    stages.append({'stage': number, 'steps': steps, 'flops': steps * float(np.mean(costs))})
    first += steps
  return {'flops': sum(s['flops'] for s in stages),
          'epochs': curriculum.total / curriculum.per_epoch, 'stages': stages}
