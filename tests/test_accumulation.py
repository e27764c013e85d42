"""No loss depends on how a batch is cut: into microbatches, over devices, or not at all."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from close import assert_close
from llama import LLAMA

from latent_reasoning import methods
from latent_reasoning.parallel import sharding
from latent_reasoning.train import train_step as step_lib

CASES = {name: {'method': name} for name in methods.METHODS if name != 'language_model'}
CASES |= {
    'codi, projected': {'method': 'codi', 'baselines.projection': True},
    'coconut, mixed': {'method': 'coconut', 'baselines.mix_parts': True},
    **{f'{name}, SIM-CoT': {'method': name, 'reasoning_decoder.source': 'latents',
                            'reasoning_decoder.joint': True, 'baselines.latents': 2}
       for name in ('coconut', 'codi')},
    'codi, KaVa': {'method': 'codi', 'baselines.latents': 2, 'baselines.kv_weight': 1.0},
    'packed': {'data.packing': True, 'data.sort_window': 1},
    'auxiliary': {'aux.align': 0.3, 'aux.smooth': 0.2},
    'reasoning decoder': {'reasoning_decoder.source': 'blocks',
                          'reasoning_decoder.joint': True},
    'externalized': {'rim.externalize': True, 'optim.stage1.steps': 0,
                     'data.buckets.count': (1, 3, 6)},
    'scanned Llama': {
        **LLAMA,
        'model.num_kv_heads': 2, 'model.scan': True, 'aux.align': 0.3},
    'gated memory': {'imm.write_policy': 'gated', 'imm.linformer_rank': 4}}
COMMON = {'tokenizer.pad_to': 8, 'model.num_heads': 4, 'optim.batch_size': 8,
          'data.sort_window': 4, 'optim.weight_decay': 0.0, 'optim.max_grad_norm': 0.0}
MESH = (2, 2, 2)


def step_of(config, path, sizes=(1, 1, 1)) -> dict[str, list[float]]:
  """Terms of the first step, its gradient's norm, and a print of what it makes of the
  parameters. Stage 1's last part, where methods have their continuous thoughts."""
  from latent_reasoning import experiment as run_lib
  from latent_reasoning.train import workdir
  run = run_lib.build(config, workdir.open_workdir(path, config, True))
  run.__dict__['mesh'] = sharding.make(config.mesh, jax.devices()[:1]) if sizes == (
      1, 1, 1) else jax.make_mesh(sizes, sharding.AXES, axis_types=(
          jax.sharding.AxisType.Auto,) * 3)
  with jax.set_mesh(run.mesh):
    state, at = run.init(), max(0, run.curriculum.lengths[0] - 1)
    batch = sharding.batch(run.batches.at(at), run.mesh)
    # Plain descent shows a gradient as it is; Adam divides noise by noise where it is 0.
    import optax
    tx = optax.scale(-1.0)
    state = step_lib.start(state.params, tx, run.trained)
    stepper = step_lib.make_train_step(
        run.model(), run.objective, tx, 0, config.optim.grad_accum_steps, run.trained)
    new, sums = stepper(state, batch, 1.0)
    sums = {k: float(v) for k, v in jax.device_get(sums).items()}
    prints = [float(np.linalg.norm(np.asarray(a, np.float64)))
              for a in jax.tree.leaves(jax.device_get(new.params))]
  return {**{k: [v] for k, v in sums.items()}, 'parameters': prints}


def agree(one, other, what):
  assert one.keys() == other.keys()
  for name, values in one.items():
    assert_close(other[name], values, tol=2e-5, err_msg=f'{what}: {name}')


def check(name, tiny_config, tmp_path, parts):
  config = {**COMMON, **CASES[name]}
  whole = step_of(tiny_config(**config), tmp_path / '1')
  assert whole['grad_norm'][0] > 0
  for n in parts:
    cut = step_of(tiny_config(**config, **{'optim.grad_accum_steps': n}), tmp_path / str(n))
    agree(whole, cut, f'{name} in {n} parts')


@pytest.mark.integration
@pytest.mark.parametrize('name', ['rim', 'codi', 'auxiliary'])
def test_microbatches(name, tiny_config, tmp_path, quick_compilation):
  """The short form; all of them below. Parts of one row are the hardest."""
  check(name, tiny_config, tmp_path, [8])


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_all_microbatches(name, tiny_config, tmp_path, quick_compilation):
  check(name, tiny_config, tmp_path, [2, 8])


@pytest.mark.integration
@pytest.mark.parametrize('name', ['codi', 'auxiliary'])
def test_a_batch_of_one(name, tiny_config, tmp_path, quick_compilation):
  """Statistics of one row: finite, and with a gradient."""
  found = step_of(tiny_config(**{**COMMON, **CASES[name], 'optim.batch_size': 1}), tmp_path)
  assert np.isfinite([v for values in found.values() for v in values]).all()
  assert found['grad_norm'][0] > 0


SCRIPT = '''
import json, pathlib, sys, tempfile
sys.path[:0] = [{root!r}, {tests!r}]
import conftest, test_accumulation as t
make = conftest.tiny_config.__wrapped__(conftest.default_config.__wrapped__())
found = {{}}
for name in {names!r}:
  for sizes in ((1, 1, 1), t.MESH):
    for parts in {parts!r}:
      config = make(**{{**t.COMMON, 'optim.batch_size': 16, **t.CASES[name],
                       'optim.grad_accum_steps': parts}})
      with tempfile.TemporaryDirectory() as path:
        found[json.dumps([name, sizes, parts])] = t.step_of(config, path, sizes)
print(json.dumps(found))
'''


def on_mesh(names, parts):
  """Steps on one device and on a mesh of eight fake ones, in a process of its own."""
  tests = os.path.dirname(os.path.abspath(__file__))
  script = SCRIPT.format(root=os.path.dirname(tests), tests=tests, names=list(names),
                         parts=list(parts))
  flags = '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0'
  done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True,
                        env={**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'})
  assert done.returncode == 0, done.stderr[-3000:]
  found = {tuple(map(str, json.loads(k))): v for k, v in
           json.loads(done.stdout.splitlines()[-1]).items()}
  for name in names:
    whole = found[name, '[1, 1, 1]', '1']
    for key, values in found.items():
      if key[0] == name:
        agree(whole, values, key)


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_microbatches_on_a_mesh(name):
  on_mesh([name], [1, 2])
