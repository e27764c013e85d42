"""Loss and gradient in tiles beside those of whole logits."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close

from latent_reasoning.train import cross_entropy, losses

B, T, D, V = 4, 9, 8, 21


def problem(parts=(V,), dtype=jnp.float32, seed=0):
  rng = np.random.default_rng(seed)
  hidden = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
  kernels = [jnp.asarray(rng.normal(size=(D, n)), jnp.float32) for n in parts]
  targets = jnp.asarray(rng.integers(0, sum(parts), (B, T)), jnp.int32)
  weights = jnp.asarray(rng.uniform(size=(B, T)) * rng.integers(0, 2, (B, T)), jnp.float32)
  return hidden, kernels, targets, weights


def whole(hidden, kernels, targets, weights, num_tokens=0, cap=0.0):
  """The reference implementation: all logits at once."""
  kernel = jnp.concatenate(kernels, 1)
  logits = jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
  logits = cap * jnp.tanh(logits / cap) if cap else logits
  if num_tokens:
    logits = jnp.where(jnp.arange(kernel.shape[1]) < num_tokens, logits, -1e30)
  loss, sums = losses.sums_of_logits(logits, targets, weights)
  return loss, sums['correct']


def both(given, tile, num_tokens=0, scale=1.0, cap=0.0):
  """((loss, correct), gradients of hidden and kernels) in tiles, and whole."""
  hidden, kernels, targets, weights = given
  def of(function):
    def total(hidden, kernels):
      loss, correct = function(hidden, kernels)
      return scale * loss, correct
    return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(hidden, kernels)
  return (of(lambda h, k: cross_entropy.sums(h, k, targets, weights, tile, num_tokens, cap)),
          of(lambda h, k: whole(h, k, targets, weights, num_tokens, cap)))


@pytest.mark.parametrize('tile', [1, 7, B * T, 1000])
@pytest.mark.parametrize('parts', [(V,), (V - 3, 3), (1, V - 1)])
def test_whole(tile, parts):
  own, reference = both(problem(parts), tile)
  assert_close(own, reference, 1e-6)


@pytest.mark.parametrize('num_tokens', [0, V - 2])
def test_capped(num_tokens):
  """As Gemma 2 caps its logits."""
  hidden, kernels, targets, weights = problem((V - 3, 3))
  given = hidden, kernels, targets % (num_tokens or V), weights
  own, reference = both(given, 7, num_tokens, cap=2.0)
  assert_close(own, reference, 1e-6)


@pytest.mark.parametrize('tile', [5, 100])
def test_columns_without_a_token(tile):
  """They take no probability and have no gradient."""
  hidden, kernels, targets, weights = problem((16, 5))
  own, reference = both((hidden, kernels, targets % 18, weights), tile, num_tokens=18)
  assert_close(own, reference, 1e-6)
  assert (np.asarray(own[1][1][1])[:, 2:] == 0).all()


def test_scale_of_the_gradient():
  """A loss that is one term of several."""
  own, reference = both(problem(), 5, scale=-0.3)
  assert_close(own, reference, 1e-6)


def test_bfloat16():
  """Within the noise of the compute dtype."""
  own, reference = both(problem(dtype=jnp.bfloat16), 5)
  assert_close(own[0], reference[0])
  assert [a.dtype for a in jax.tree.leaves(own[1])] == [jnp.bfloat16, jnp.float32]
  assert_close(own[1], reference[1], 2**-7)  # two roundings of 2^-8


def test_ties_count_as_argmax_counts_them():
  """The first of equal logits is what a model says."""
  hidden = jnp.ones((1, 3, 1))
  kernels = [jnp.asarray([[1.0, 2.0, 2.0]]), jnp.asarray([[2.0]])]
  targets, weights = jnp.asarray([[1, 2, 3]]), jnp.ones((1, 3))
  for tile in (1, 2, 3):
    assert cross_entropy.sums(hidden, kernels, targets, weights, tile)[1] == 1


def test_weightless_tokens_are_inert():
  """Whatever their states and targets are."""
  hidden, kernels, targets, weights = problem()
  other = jnp.where(weights[..., None] > 0, hidden, 37.0), kernels, jnp.where(
      weights > 0, targets, 0), weights
  own, changed = both((hidden, kernels, targets, weights), 5)[0], both(other, 5)[0]
  assert_close(own, changed, 1e-6)


def products(jaxpr) -> list[tuple[int, ...]]:
  """Shapes of all matrix products, those of inner jaxprs too."""
  found = []
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      found.append(equation.outvars[0].aval.shape)
    for value in jax.tree.leaves(tuple(equation.params.values()),
                                 is_leaf=lambda v: hasattr(v, 'eqns') or hasattr(v, 'jaxpr')):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        found += products(inner)
  return found


def test_nothing_is_whole_and_what_is_frozen_costs_nothing():
  """No logits of all tokens; no product for the gradient of a kernel that is not trained."""
  hidden, (frozen, new), targets, weights = problem((V - 3, 3))
  def loss(hidden, new):
    return cross_entropy.sums(hidden, [frozen, new], targets, weights, 4)[0]
  found = products(jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, new).jaxpr)
  assert (D, 3) in found and (D, V - 3) not in found
  assert max(shape[0] for shape in found if shape[-1] != D or len(shape) > 2) <= max(4, D)
  found = products(jax.make_jaxpr(loss)(hidden, new).jaxpr)
  assert sorted(found) == [(4, 3), (4, V - 3)]


MESHES = [(8, 1, 1), (2, 2, 2), (1, 2, 4)]


@pytest.mark.integration
def test_on_meshes():
  """Rows over data and fsdp, the vocabulary over tensor, also where they do not divide it;
  no device ever holds a logit of another's columns."""
  script = f'''
import json, sys
sys.path.insert(0, {os.path.dirname(__file__)!r}); sys.path.insert(0, {os.path.dirname(
    os.path.dirname(__file__))!r})
import jax, numpy as np, test_cross_entropy as t
from latent_reasoning.train import cross_entropy
from latent_reasoning.parallel import sharding
from latent_reasoning.config import MeshConfig
found = []
for sizes in {MESHES}:
  mesh = sharding.make(MeshConfig(*sizes), jax.devices()[:int(np.prod(sizes))])
  for rows in (8, 3):
    t.B = rows
    for parts in ((24,), (18, 3)):
      hidden, kernels, targets, weights = t.problem(parts)
      given = hidden, kernels, targets % 20, weights
      with jax.set_mesh(mesh):
        own, _ = t.both(given, 5, 20)
        text = jax.jit(lambda h, k: cross_entropy.sums(h, k, *given[2:], 5, 20)[0]).lower(
            given[0], given[1]).compile().as_text()
      _, reference = t.both(given, 5, 20)
      gap = max(float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(b).max())
                for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(reference)))
      found.append([list(sizes), rows, list(parts), gap, 'all-gather' in text])
print(json.dumps(found))
'''
  flags = '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0'
  done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True,
                        env={**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'})
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout.splitlines()[-1])
  assert len(found) == 4 * len(MESHES)
  for sizes, rows, parts, gap, gathers in found:
    assert gap < 5e-6 and not gathers, (sizes, rows, parts, gap, gathers)
