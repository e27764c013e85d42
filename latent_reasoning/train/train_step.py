"""One training step: a frozen state goes in, a frozen state comes out."""

from collections.abc import Callable
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import optax

from latent_reasoning.batching import Batch
from latent_reasoning.models import lora
from latent_reasoning.train.losses import BatchLoss

# What a random key is for; folded into the seed together with the step.
INIT, DROPOUT, SAMPLE, LEAKAGE, DECODER = range(5)


@flax.struct.dataclass
class TrainState:
  step: chex.Array  # int32 scalar, steps done
  params: Any
  opt_state: Any


def key(seed: int, purpose: int, step: int | chex.Array = 0) -> chex.PRNGKey:
  """The random key of (seed, purpose, step)."""
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), step)


def init(model, tx: optax.GradientTransformation, batch: Batch, seed: int,
         trained: str = 'all') -> TrainState:
  """A fresh state; the batch gives shapes only."""
  variables = jax.jit(model.init)(key(seed, INIT), batch.tokens[:1], batch.positions[:1],
                                  jax.tree.map(lambda a: a[:1], batch.mask))
  params = variables['params']
  return start(params, tx, trained)


def start(params, tx: optax.GradientTransformation, trained: str = 'all') -> TrainState:
  """The state before the first step; optimizer state is of what is trained (models.lora)."""
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(lora.split(params, trained)[0]))


def make_train_step(model, objective: Callable, tx: optax.GradientTransformation,
                    seed: int, accumulate: int, trained: str = 'all',
                    placed: TrainState | None = None) -> Callable:
  """Returns the jitted (state, batch, learning rate) -> (state, metrics).

  The state is donated. Gradients of the weighted sum add up over `accumulate`
  microbatches and are divided once by the total weight, and a loss that compares the problems
  of a batch (losses.BatchLoss) sees the whole of it, so that accumulation does not change
  the loss. Metrics are sums and stay on the device. Nothing but what
  is `trained` (models.lora) has a gradient. On a mesh, the state stays as `placed` (sharding).
  """
  use_dropout = model.needs_rng

  def micro(own, frozen, batch, rng, *whole):
    def loss(own):
      return objective(model, lora.join(own, frozen) if frozen else own, batch, rng, *whole)
    return jax.grad(loss, has_aux=True)(own)

  def train_step(state: TrainState, batch: Batch, learning_rate: chex.Array):
    rng = key(seed, DROPOUT, state.step) if use_dropout else None
    params, frozen = lora.split(state.params, trained)
    if accumulate == 1:
      grads, sums = micro(params, frozen, batch, rng)
    else:
      cut = jax.tree.map(lambda a: a.reshape(accumulate, -1, *a.shape[1:]), batch)
      parts, size = (jnp.arange(accumulate), cut), jax.tree.leaves(cut)[0].shape[1]

      def key_of(i):
        return None if rng is None else jax.random.fold_in(rng, i)

      def whole(i):  # what a part needs to know of the others
        return (statistics, i * size) if statistics is not None else ()

      def body(total, part):
        i, rows = part
        return jax.tree.map(jnp.add, total, micro(
            params, frozen, rows, key_of(i), *whole(i))), None

      statistics = None
      if isinstance(objective, BatchLoss):
        found = jax.lax.map(lambda part: objective.statistics(
            model, state.params, part[1], key_of(part[0])), parts)
        statistics = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), found)
      first = jax.tree.map(lambda a: a[0], cut)
      zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype),
                           jax.eval_shape(micro, params, frozen, first, rng, *whole(0)))
      (grads, sums), _ = jax.lax.scan(body, zeros, parts)
    grads = jax.tree.map(lambda g: g / sums['weight'], grads)
    updates, opt_state = tx.update(grads, state.opt_state, params)
    params = jax.tree.map(lambda p, u: p + learning_rate * u, params, updates)
    metrics = {**sums, 'grad_norm': optax.tree.norm(grads)}
    memory = [g for path, g in jax.tree_util.tree_leaves_with_path(grads)
              if any(key.key == 'memory' for key in path)]
    if memory:
      metrics['memory_grad_norm'] = optax.tree.norm(memory)
    params = lora.join(params, frozen) if frozen else params
    return TrainState(state.step + 1, params, opt_state), metrics

  out = {} if placed is None else {'out_shardings': (placed, None)}
  return jax.jit(train_step, donate_argnums=0, **out)
