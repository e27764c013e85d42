"""AdamW with clipping; the learning rate comes from the curriculum, per step."""

import jax
import optax

from latent_reasoning.config import OptimConfig


def decayed(params: dict) -> dict:
  """Which parameters decay: matrices inside the layers and the head.

  Biases, norms (vectors) and embedding tables do not. By name, because scanned
  layers stack vectors into matrices.
  """
  def decays(path, _):
    return path[-1].key in ('kernel', 'head')
  return jax.tree_util.tree_map_with_path(decays, params)


def build(config: OptimConfig) -> optax.GradientTransformation:
  """Returns the update rule for a learning rate of 1.

  `step.train_step` scales the update, so that a schedule needs no state of its
  own and a stage can start with a fresh optimizer and a fresh schedule.
  """
  return optax.chain(
      optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
      optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
      optax.add_decayed_weights(config.weight_decay, decayed),
      optax.scale(-1.0))
