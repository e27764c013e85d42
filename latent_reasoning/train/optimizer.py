"""AdamW or Muon, clipped; the learning rate comes from the curriculum, per step."""

import jax
import optax

from latent_reasoning.config import OptimConfig

# Names of the matrices. By name, because scanned layers stack vectors into matrices.
INNER = ('kernel',)
DECAYED = (*INNER, 'head')


def decayed(params: dict) -> dict:
  """Which parameters decay: matrices inside the layers and the head.

  Biases, norms (vectors) and embedding tables do not.
  """
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)


def inner(params: dict) -> dict:
  """The axes of the matrices that Muon makes orthogonal; None for other parameters."""
  axes = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
  return jax.tree_util.tree_map_with_path(
      lambda path, _: axes if path[-1].key in INNER else None, params)


def build(config: OptimConfig, optimizer: str = 'adamw') -> optax.GradientTransformation:
  """Returns the update rule for a learning rate of 1.

  Muon (Jordan et al. 2024) moves the matrices inside the layers along the nearest
  orthogonal matrix of their momentum, and everything else as Nesterov's Adam does.

  `step.train_step` scales the update, so that a schedule needs no state of its
  own and a stage can start with a fresh optimizer and a fresh schedule.
  """
  if optimizer == 'muon':  # which scales by -1, the others follow below
    rule = optax.chain(
        optax.contrib.muon(
            config.muon_scale, adam_learning_rate=1.0, adam_b1=config.beta1,
            adam_b2=config.beta2, eps=config.epsilon, muon_weight_dimension_numbers=inner),
        optax.scale(-1.0))
  else:
    rule = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
  return optax.chain(
      (optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm
       else optax.identity()), rule,
      optax.add_decayed_weights(config.weight_decay, decayed),
      optax.scale(-1.0))
