"""The update rule beside AdamW in NumPy."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from close import assert_close

from latent_reasoning import batching, sequences
from latent_reasoning.models.transformer import Transformer
from latent_reasoning.train import optimizer

PARAMS = {'layer': {'kernel': np.array([[0.5, -1.0], [2.0, 0.25]], np.float32),
                    'bias': np.array([1.0, -2.0], np.float32)}}


def gradients(step: int):
  """Of global norm about 0.1, 1, 10, …, so that clipping changes their mix."""
  rng = np.random.default_rng(step)
  return jax.tree.map(
      lambda a: (0.05 * 10**step * rng.normal(size=a.shape)).astype(np.float32), PARAMS)


def adamw(config, steps: int):
  """Parameters after some steps at learning rate 0.1, in float64."""
  params = {k: v.astype(np.float64) for k, v in PARAMS['layer'].items()}
  m, v = ({k: 0.0 for k in params} for _ in range(2))
  for t in range(1, steps + 1):
    grads = gradients(t - 1)['layer']
    norm = np.sqrt(sum((g.astype(np.float64)**2).sum() for g in grads.values()))
    scale = min(1, config.max_grad_norm / norm) if config.max_grad_norm else 1
    for k in params:
      g = grads[k].astype(np.float64) * scale
      m[k] = config.beta1 * m[k] + (1 - config.beta1) * g
      v[k] = config.beta2 * v[k] + (1 - config.beta2) * g**2
      update = m[k] / (1 - config.beta1**t) / (
          np.sqrt(v[k] / (1 - config.beta2**t)) + config.epsilon)
      decay = config.weight_decay * params[k] if k == 'kernel' else 0
      params[k] = params[k] - 0.1 * (update + decay)
  return params


def run(config, steps: int):
  """The same through `optim.build`, as `step.train_step` applies it."""
  tx = optimizer.build(config)
  params, state = PARAMS, tx.init(PARAMS)
  for t in range(steps):
    updates, state = tx.update(gradients(t), state, params)
    params = jax.tree.map(lambda p, u: p + np.float32(0.1) * u, params, updates)
  return params['layer']


@pytest.mark.integration
@pytest.mark.parametrize('clip,decay', [(1.0, 0.1), (0.0, 0.0), (0.0, 0.1)])
def test_adamw(tiny_config, clip, decay):
  """Four steps: clipped by global norm, or with clip 0 not at all; decay on kernels."""
  config = dataclasses.replace(tiny_config().optim, max_grad_norm=clip, weight_decay=decay)
  found, expected = run(config, 4), adamw(config, 4)
  for name in expected:
    assert_close(found[name], expected[name], tol=1e-4)


def test_clipping_matters(tiny_config):
  """The oracle itself tells clipped from unclipped."""
  config = tiny_config().optim
  with_clip, without = (adamw(dataclasses.replace(config, max_grad_norm=c), 4) for c in (1.0,
                                                                                         0.0))
  assert not np.allclose(with_clip['kernel'], without['kernel'], rtol=1e-2)


@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.parametrize('tied', [False, True])
def test_what_decays(tiny_config, scan, tied):
  """Matrices inside the layers and the head; no bias, norm or embedding table."""
  config = tiny_config(**{'model.scan': scan, 'model.tie_embeddings': tied})
  model = Transformer(config.model, 8)
  batch = batching.collate([sequences.causal([1, 2], ())], 2, 0, 0)
  params = jax.eval_shape(model.init, jax.random.key(0), batch.tokens, batch.positions,
                          batch.mask)['params']
  decays = {'/'.join(k.key for k in path) for path, yes in
            jax.tree_util.tree_leaves_with_path(optimizer.decayed(params)) if yes}
  blocks = ['blocks'] if scan else ['block_0', 'block_1']
  expected = {f'{b}/{name}/kernel' for b in blocks for name in ('qkv', 'out', 'up', 'down')}
  assert decays == expected | (set() if tied else {'head'})


def muon_updates(config, params, grads):
  """The update of one step under muon."""
  tx = optimizer.build(dataclasses.replace(config, max_grad_norm=0.0, weight_decay=0.0), 'muon')
  return tx.update(grads, tx.init(params), params)[0]


@pytest.mark.integration
def test_muon_makes_matrices_orthogonal(tiny_config):
  """Kernels move against the gradient, nearly orthogonal; the rest as in NAdam."""
  config = tiny_config().optim
  draw = np.random.default_rng(0).normal
  params = {'qkv': {'kernel': draw(size=(8, 16)), 'bias': draw(size=16)},
            'head': draw(size=(8, 5)), 'embedding': draw(size=(5, 8))}
  params, grads = (jax.tree.map(lambda a: draw(size=a.shape).astype(np.float32), params)
                   for _ in range(2))
  found = muon_updates(config, params, grads)
  kernel = np.asarray(found['qkv']['kernel'])
  # Newton and Schulz's iteration leaves singular values between about 0.7 and 1.2,
  # and wide matrices are scaled by sqrt(outputs / inputs).
  size = np.linalg.svd(kernel, compute_uv=False) / (config.muon_scale * 2**0.5)
  assert size.min() > 0.5 and size.max() < 1.3
  assert np.sum(kernel * grads['qkv']['kernel']) < 0
  tx = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon, nesterov=True)
  adam = jax.tree.map(np.negative, tx.update(grads, tx.init(params), params)[0])
  for path in (('qkv', 'bias'), ('head',), ('embedding',)):
    a, b = found, adam
    for key in path:
      a, b = a[key], b[key]
    assert_close(a, b)


@pytest.mark.integration
def test_muon_of_scanned_layers(tiny_config):
  """Stacked kernels are made orthogonal layer by layer."""
  config, rng = tiny_config().optim, np.random.default_rng(1)
  layers = [{'kernel': rng.normal(size=(6, 10)).astype(np.float32)} for _ in range(3)]
  stacked = {'kernel': np.stack([a['kernel'] for a in layers])}
  together = muon_updates(config, stacked, stacked)['kernel']
  for one, found in zip(layers, together, strict=True):
    assert_close(muon_updates(config, one, one)['kernel'], found, tol=1e-4)
