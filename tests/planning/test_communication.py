"""Collectives: a program written by hand, and real ones on four fake devices."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from latent_reasoning.planning import communication

# What XLA writes, cut down: a loop of 5 runs in a loop that does not say how often it runs.
HLO = '''
HloModule jit_step, entry_computation_layout={()->f32[]}

%inner (p: f32[8]) -> f32[32] {
  %p = f32[8]{0} parameter(0)
  ROOT %all-gather.1 = f32[32]{0} all-gather(%p), dimensions={0}, metadata={op_name="a = b("}
}

%outer (p: bf16[4,3]) -> bf16[4,3] {
  %p.1 = (s32[], bf16[4,3]{1,0}) parameter(0)
  %while.1 = (s32[], /*index=1*/f32[8]) while(%t), body=%inner, x={"known_trip_count":{"n":"5"}}
  ROOT %all-reduce.1 = (bf16[4,3]{1,0}, pred[7]) all-reduce(%x, %y), to_apply=%add
  %x = bf16[4,3]{1,0} copy(%p.1)
  %y = pred[7]{0} constant({...})
}

ENTRY %main (q: f32[16]) -> f32[4] {
  %q = f32[16]{0} parameter(0)
  %while.2 = (s32[]) while(%q), condition=%no, body=%outer
  %call.1 = f32[] call(%q), to_apply=%inner
  ROOT %reduce-scatter.1 = f32[4]{0} reduce-scatter(%q), to_apply=%add
}
'''


def test_by_hand():
  """Loops multiply; an all-gather counts what it makes, the others what they take."""
  found, unknown = communication.of_hlo(HLO)
  assert found == {'all-gather': (5 + 1) * 32 * 4, 'all-reduce': 4 * 3 * 2 + 7,
                   'reduce-scatter': 16 * 4}
  assert unknown == 1


MESHES = {'data': (4, 1, 1), 'fsdp': (1, 4, 1), 'tensor': (1, 1, 4)}
SCRIPT = '''
import dataclasses, json, sys, tempfile
sys.path[:0] = [{root!r}, {tests!r}]
import conftest, jax
from latent_reasoning.planning import estimate
tiny = conftest.tiny_config.__wrapped__(conftest.default_config.__wrapped__())
make_run = conftest.make_run.__wrapped__()
def count(tree):
  return sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(tree))
for name, (data, fsdp, tensor) in {meshes!r}.items():
  config = tiny(**{{'mesh.data': data, 'mesh.fsdp': fsdp, 'mesh.tensor': tensor,
                   'model.tie_embeddings': False, 'model.scan': name != 'data',
                   'model.num_heads': 4,
                   'tokenizer.pad_to': 32}})
  with tempfile.TemporaryDirectory() as path:
    run = make_run(config, path)
    with jax.set_mesh(run.mesh):
      state = run.init()
  known = dataclasses.replace(config.tokenizer, vocab_size=run.tokenizer.size)
  found = estimate.measure(dataclasses.replace(config, tokenizer=known))
  found['real'] = count(state.params), count(state.opt_state)
  print(json.dumps([name, found]))
'''


@pytest.fixture(scope='module')
def found():
  """Plans for four fake devices, in a process that has them: {mesh: estimate.measure}."""
  tests = pathlib.Path(__file__).resolve().parents[1]
  script = SCRIPT.format(root=str(tests.parent), tests=str(tests), meshes=MESHES)
  flags = '--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0'
  done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True,
                        env={**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'})
  assert done.returncode == 0, done.stderr[-3000:]
  return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith('["'))


SCALARS = 200  # bytes at most, of sums and norms


@pytest.mark.slow
@pytest.mark.parametrize('mesh', MESHES)
def test_bytes_are_those_of_a_state(found, mesh):
  """Which lies on four devices."""
  assert [found[mesh]['parameter_bytes'], found[mesh]['optimizer_bytes']] == found[mesh]['real']
  assert found[mesh]['gradient_bytes'] == found[mesh]['parameter_bytes']  # float32, all


@pytest.mark.slow
def test_data_reduces_the_gradients(found):
  """Once, and nothing else; the model says so exactly."""
  one = found['data']
  assert one['collectives'].keys() == one['expected_collectives'].keys() == {'all-reduce'}
  assert one['expected_collectives']['all-reduce'] == one['gradient_bytes']
  assert 0 < one['collectives']['all-reduce'] - one['gradient_bytes'] < SCALARS


@pytest.mark.slow
def test_fsdp_gathers_twice_and_reduces_once(found):
  """Matrices of layers forward and backward, others once. A CPU reduces gradients whole where
  the model reduces and scatters them."""
  one = found['fsdp']
  real, model = one['collectives'], one['expected_collectives']
  assert one['unknown_loops'] == 0
  assert real['all-gather'] == model['all-gather']
  whole = model['reduce-scatter'] + model['all-reduce']
  assert 0 <= real['all-reduce'] + real.get('reduce-scatter', 0) - whole < SCALARS


@pytest.mark.slow
def test_tensor_reduces_activations(found):
  """Two a layer and direction; the vocabulary's head adds its own."""
  real, model = (found['tensor'][key] for key in ('collectives', 'expected_collectives'))
  assert model.keys() == {'all-reduce'}
  assert model['all-reduce'] <= real['all-reduce'] < 2 * model['all-reduce']


@pytest.mark.slow
def test_flops_do_not_depend_on_the_mesh(found):
  assert len({one['flops'] for one in found.values()}) == 1
