"""Meshes: every parameter has its place, and no loss depends on where it lies."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from close import assert_close
from jax.sharding import PartitionSpec as P
from llama import LLAMA

from latent_reasoning import methods
from latent_reasoning.errors import InputError
from latent_reasoning.parallel import sharding

SMALL_LLAMA = {**LLAMA,
         'model.num_kv_heads': 2, 'model.tie_embeddings': False, 'model.scan': True,
         'model.lora.rank': 4, 'model.lora.dropout': 0.1, 'optim.trainable': 'new'}
RUNS = {
    'rim': {'optim.stage1.dropout': 0.1, 'optim.stage2.optimizer': 'muon'},
    'gated': {'imm.write_policy': 'gated', 'imm.linformer_rank': 4, 'imm.slots': 3},
    'llama, LoRA': SMALL_LLAMA}
PEERS = {m: {'method': m} for m in methods.METHODS if m not in ('rim', 'language_model')}
PEERS['codi, projected'] = {'method': 'codi', 'baselines.projection': True}
COMMON = {'tokenizer.pad_to': 8, 'model.num_heads': 4, 'optim.batch_size': 16}


@pytest.mark.parametrize('name', RUNS)
@pytest.mark.parametrize('scan', [False, True])
def test_every_parameter_has_a_place(name, scan, tiny_config, make_run, tmp_path):
  """Of state and optimizer; matrices are cut, vectors whole."""
  run = make_run(tiny_config(**{**COMMON, **RUNS[name], 'model.scan': scan}), tmp_path)
  like, mesh = jax.eval_shape(run.fresh), sharding.make(run.config.mesh)
  state = sharding.state(run.config, like, mesh)
  assert jax.tree.structure(state) == jax.tree.structure(like)
  for (path, place), leaf in zip(jax.tree_util.tree_leaves_with_path(state.params),
                                 jax.tree.leaves(like.params), strict=True):
    cut = any(axis is not None for axis in place.spec)
    matrix = leaf.ndim - (scan and 'blocks' in jax.tree_util.keystr(path)) == 2
    gate = 'gate' in jax.tree_util.keystr(path) and 'memory' in jax.tree_util.keystr(path)
    assert cut == (matrix and not gate), path
  moments = [s.spec for s in jax.tree.leaves(state.opt_state)]
  assert any(spec != P() for spec in moments)


def test_uncovered_and_idle(tiny_config, make_run, tmp_path, monkeypatch):
  run = make_run(tiny_config(), tmp_path)
  params, mesh = jax.eval_shape(run.fresh).params, sharding.make(run.config.mesh)
  with pytest.raises(InputError, match='no rule .* covers the parameter strange/thing'):
    sharding.parameters(run.config, {**params, 'strange': {'thing': params['embedding']}}, mesh)
  monkeypatch.setattr(sharding, 'TABLE', (sharding.Rule('nowhere$', P()), *sharding.TABLE))
  with pytest.raises(InputError, match=r"place nothing in this model: \['nowhere\$'\]"):
    sharding.parameters(run.config, params, mesh)


def test_sizes_that_do_not_fit(tiny_config):
  config = tiny_config().mesh
  with pytest.raises(InputError, match='but there are 6 devices'):
    sharding.make(dataclasses.replace(config, data=-1, fsdp=4), devices=[None] * 6)
  with pytest.raises(InputError, match='at most one -1'):
    tiny_config(**{'mesh.fsdp': -1})
  with pytest.raises(InputError, match='cuts 13 into 2 parts .*pad_to'):
    mesh = jax.sharding.AbstractMesh((1, 1, 2), sharding.AXES)
    sharding._divides('embedding', (13, 4), P('tensor', 'fsdp'), mesh)


def losses(config, sizes, path, steps: int) -> list[float]:
  """Losses of the first steps on a mesh, and an answer to the first problems."""
  from latent_reasoning import experiment as run_lib
  from latent_reasoning.train import train_step as step_lib
  from latent_reasoning.train import workdir
  run = run_lib.build(config, workdir.open_workdir(path, config, True))
  count = int(np.prod(sizes))
  mesh = dict(zip(sharding.AXES, sizes, strict=True))
  run.__dict__['mesh'] = sharding.make(dataclasses.replace(config.mesh, **mesh),
                                       jax.devices()[:count])
  found = []
  with jax.set_mesh(run.mesh):
    state = run.init()
    for step in range(steps):
      moment = run.curriculum.at(step)
      if run.curriculum.begins(step):
        state = run.begin(state.params, moment.stage)
      if not moment.step:
        stepper = step_lib.make_train_step(
            run.model(run.curriculum.stage(step).dropout), run.objective,
            run.tx(moment.stage), 0, config.optim.grad_accum_steps, run.trained,
            run.placed(state))
      batch = sharding.batch(run.batches.at(step), run.mesh)
      state, sums = stepper(state, batch, run.curriculum.learning_rate(step))
      found.append(float(sums['loss'] / sums['weight']))
    if count > 1:
      cut = [a for a in jax.tree.leaves(state.params) if not a.sharding.is_fully_replicated]
      assert cut or max(sizes[1:]) == 1
    values = run.validate(state.params)[0]
  return [*found, values['final']]


SCRIPT = '''
import json, pathlib, sys, tempfile
sys.path[:0] = [{root!r}, {tests!r}]
import conftest
from parallel import test_sharding
make = conftest.tiny_config.__wrapped__(conftest.default_config.__wrapped__())
found = {{}}
for name in {names!r}:
  config = make(**{{**test_sharding.COMMON, **(test_sharding.RUNS | test_sharding.PEERS)[name],
                   **{extra!r}}})
  for sizes in {meshes!r}:
    with tempfile.TemporaryDirectory() as path:
      found[name + str(sizes)] = test_sharding.losses(config, sizes, path, {steps})
print(json.dumps(found))
'''


def on_meshes(names, meshes, stage_steps: int):
  """Losses of runs on fake devices, in a process of its own."""
  tests = pathlib.Path(__file__).resolve().parents[1]
  extra = {'optim.stage1.steps': stage_steps, 'optim.stage2.steps': stage_steps}
  script = SCRIPT.format(root=str(tests.parent), tests=str(tests), names=list(names),
                         meshes=meshes, steps=2 * stage_steps, extra=extra)
  flags = '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0'
  done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True,
                        env={**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'})
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


def agree(found, meshes):
  for key, values in found.items():
    one = found[key.partition('(')[0] + str(meshes[0])]
    print(key, 'largest relative difference',
          max(abs(a - b) / abs(b) for a, b in zip(values[:-1], one[:-1], strict=True)))
    assert_close(values[:-1], one[:-1])
    assert values[-1] == one[-1]  # accuracy of the answers


MESHES = [(1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 4, 2)]


@pytest.mark.integration
def test_no_loss_depends_on_the_mesh():
  """The short form, of one model; all of them below."""
  meshes = [MESHES[0], MESHES[2]]
  agree(on_meshes(['rim'], meshes, 2), meshes)


@pytest.mark.slow
@pytest.mark.parametrize('name', RUNS)
def test_no_loss_depends_on_the_mesh_in_20_steps(name):
  agree(on_meshes([name], MESHES, 10), MESHES)


@pytest.mark.slow
def test_every_method_on_a_mesh():
  """Losses of a few steps and the answers of validation."""
  meshes = [MESHES[0], MESHES[2]]
  agree(on_meshes(PEERS, meshes, 3), meshes)
