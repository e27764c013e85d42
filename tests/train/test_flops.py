"""Training FLOPs: by hand, beside XLA's count, and in loops that XLA counts once."""

import jax
import jax.numpy as jnp
import pytest

from latent_reasoning.train import flops
from latent_reasoning.train import train_step as step_lib

A, B = jnp.zeros((3, 5)), jnp.zeros((5, 7))


def counted(function, *arguments) -> float:
  return flops.of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_by_hand():
  """2 · rows · columns · contracted; batches multiply; the rest is free."""
  assert counted(lambda a, b: a @ b, A, B) == 2 * 3 * 7 * 5
  assert counted(lambda a, b: jnp.tanh(a).sum() + b.sum(), A, B) == 0
  batch = jnp.zeros((4, 3, 5))
  assert counted(lambda a, b: jnp.einsum('btd,bsd->bts', a, b), batch, batch) == 2 * 4 * 9 * 5


def test_loops_and_branches():
  """A scanned body counts as often as it runs, nested ones too; of branches the dearest."""
  def body(a, _):
    return jax.lax.scan(lambda x, _: (x @ jnp.ones((5, 5)), None), a, length=3)[0], None
  assert counted(lambda a: jax.lax.scan(body, a, length=11)[0], A) == 33 * 2 * 3 * 5 * 5
  def branches(a):
    return jax.lax.cond(a[0, 0] > 0, lambda x: x, lambda x: x @ jnp.ones((5, 5)), a)
  assert counted(branches, A) == 2 * 3 * 5 * 5
  assert counted(jax.jit(jax.checkpoint(lambda a, b: a @ b)), A, B) == 2 * 3 * 7 * 5


@pytest.mark.integration
def test_near_xla(tiny_config, make_run, tmp_path, quick_compilation):
  """A step without loops: what XLA counts, less the elementwise work."""
  run = make_run(tiny_config(**{'model.embed_dim': 64, 'model.mlp_dim': 256}), tmp_path)
  step = step_lib.make_train_step(run.model(), run.objective, run.tx(2), 0, 1)
  given = jax.eval_shape(lambda: run.fresh(2)), run.batches.at(10), 1.0
  whole = step.lower(*given).compile().cost_analysis()['flops']
  assert 0.8 * whole < counted(step, *given) < whole


@pytest.mark.integration
@pytest.mark.parametrize('method', ['rim', 'direct', 'cot'])
def test_training(tiny_config, make_run, tmp_path, method):
  """Stages add up; scanned layers and microbatches change nothing; more steps cost more."""
  def count(**changes):
    name = '-'.join(changes) or 'base'
    return flops.training(make_run(tiny_config(method=method, **changes), tmp_path / name))
  base = count()
  assert [s['steps'] for s in base['stages']] == [8, 6]
  assert base['flops'] == sum(s['flops'] for s in base['stages']) > 0
  assert count(**{'model.scan': True})['flops'] == base['flops']
  assert count(**{'optim.grad_accum_steps': 2})['flops'] == base['flops']
  more = count(**{'optim.stage2.steps': 12})
  assert more['stages'][1]['flops'] == pytest.approx(2 * base['stages'][1]['flops'])


def test_a_stage_without_steps(tiny_config, make_run, tmp_path):
  """It is left out, and the next one keeps its number."""
  run = make_run(tiny_config(**{'optim.stage1.steps': 0}), tmp_path)
  assert [(s['stage'], s['steps']) for s in flops.training(run)['stages']] == [(2, 6)]
