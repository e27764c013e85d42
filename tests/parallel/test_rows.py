"""Evaluation, decoding and analysis on a mesh: cut by rows, equal to one device's."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from close import assert_close
from jax.sharding import PartitionSpec as P

from latent_reasoning import config as config_lib
from latent_reasoning.parallel import sharding

SMALL = {'tokenizer.pad_to': 8, 'model.num_heads': 4, 'optim.batch_size': 8,
         'data.arithmetic.test_size': 10, 'eval.max_new_tokens': 4}
CASES = {  # 4, 3, 1 and 5 problems at a time, on 4 × 2 devices: padded, fewer than devices
    'rim': {'eval.batch_size': 4, 'eval.samples': 2},
    'rim, scanned': {'eval.batch_size': 3, 'model.scan': True},
    'coconut': {'method': 'coconut', 'baselines.parts': 3, 'eval.batch_size': 1},
    'gated': {'eval.batch_size': 5, 'imm.write_policy': 'gated', 'imm.linformer_rank': 4,
              'imm.slots': 3}}
ANALYSED = {'rim': {'eval.batch_size': 5, 'reasoning_decoder.source': 'blocks',
                    'reasoning_decoder.joint': True}}
TEXT = {'method': 'language_model', 'data.name': 'text', 'data.seq_len': 8, 'data.path': '',
        'optim.stage2.steps': 0, 'eval.batch_size': 3}


def run_of(config, path, sizes):
  """A run on a mesh, its parameters there, and the same on one device."""
  from latent_reasoning import experiment
  from latent_reasoning.train import workdir
  mesh = dict(zip(sharding.AXES, sizes, strict=True))
  run = experiment.build(dataclasses.replace(config, mesh=dataclasses.replace(
      config.mesh, **mesh)), workdir.open_workdir(path, config, True))
  with run.on_mesh():
    params = run.init().params
  rng = np.random.default_rng(0)  # wider than fresh ones: no two tokens are nearly alike
  params = jax.tree.map(lambda a: jax.device_put(
      (np.asarray(a) + rng.normal(0, 0.2, a.shape)).astype(a.dtype), a.sharding), params)
  assert sharding.mesh_of(params) is run.mesh
  one = jax.device_get(params)
  assert sharding.mesh_of(one) is None
  return run, params, one


def answers(run, params) -> list:
  from latent_reasoning.eval.evaluator import evaluate
  return evaluate(run.predictor(params), run.test, 'arithmetic', 'test', 'numeric')[1]


def shapes(run, params, rows: int) -> dict:
  """What each device holds while a predictor answers: rows that come in, rows that go out, and
  those of the program's cache."""
  from latent_reasoning.eval import decoding
  predictor, seen, generate = run.predictor(params), [], decoding.generate

  def spy(*args, **kwargs):
    out = generate(*args, **kwargs)
    seen.append((args, kwargs, out))
    return out
  decoding.generate = spy
  predictor.generate([predictor.row(e.question) for e in run.test][:rows])
  decoding.generate = generate
  (args, kwargs, out), batch = seen[0], seen[0][0][3]
  with jax.set_mesh(run.mesh):
    text = generate.lower(*args, **kwargs).compile().as_text()
  width = run.config.model.embed_dim // run.config.model.num_heads
  count, room = batch.anchors.shape[1], decoding.given(batch) + kwargs['max_tokens'] - 1
  own = re.compile(rf'f32\[(\d+),{count},(\d+),{room},{width}\]')  # [B, K, M, S, H]
  held = [[s.data.shape[0] for s in a.addressable_shards] for a in (batch.tokens, out)]
  return {'rows': len(batch.tokens), 'inputs': held[0], 'shards': held[1],
          'cache': sorted({int(size) for size, _ in own.findall(text)})}


def analysed(run, params) -> dict:
  """What analysis finds, as numbers and texts."""
  from latent_reasoning.analysis import activation_patching, block_states, probing, verbalizer
  predictor = run.predictor({k: v for k, v in params.items() if k != 'reasoning_decoder'})
  rule = run.splits.report['rules']['test']
  seen = block_states.collect(predictor, run.test, rule)
  own = verbalizer.Verbalizer(run, predictor.params, params['reasoning_decoder'])
  attention = probing.attention(predictor, run.test)
  return {
      'states': seen.states.tolist(), 'confidence': seen.confidence.tolist(),
      'predictions': seen.predictions.tolist(),
      'budget': block_states.by_budget(predictor, run.test, rule),
      'lens': {k: v.tolist() for k, v in probing.lens(predictor, seen).items()},
      'attention': [attention[k].tolist() for k in ('question', 'blocks', 'readouts')],
      'edits': activation_patching.interventions(predictor, run.test, rule)['lines'],
      'verbalized': verbalizer.score(own, run.test)}


def losses(run, params) -> dict:
  from latent_reasoning.eval import language_modeling
  said = language_modeling.generate(run.config, run.model(), params, run.tokenizer, 'the', 9)
  return {'loss': run.loss(params, 'valid'), 'said': said}


SCRIPT = '''
import json, pathlib, sys, tempfile
sys.path[:0] = [{root!r}, {tests!r}]
import conftest, jax
jax.config.update('jax_cpu_enable_async_dispatch', False)  # fake devices wait for each other
from parallel import test_rows as own
make = conftest.tiny_config.__wrapped__(conftest.default_config.__wrapped__())
found = {{}}
for name, changes in {cases!r}.items():
  with tempfile.TemporaryDirectory() as path:
    if 'data.path' in changes:
      changes['data.path'] = path + '/text.txt'
      pathlib.Path(changes['data.path']).write_text('the cat sat on the mat; ' * 30)
    run, cut, one = own.run_of(make(**{{**own.SMALL, **changes}}), path + '/run', {sizes!r})
    found[name] = [getattr(own, {what!r})(run, params) for params in (cut, one)]
    if {what!r} == 'answers':
      found[name].append([own.shapes(run, cut, rows) for rows in (1, 5, 8)])
print(json.dumps(found))
'''


@functools.cache
def on_devices(what: str, sizes: tuple[int, int, int], cases: str) -> dict:
  """What a function of this file finds on a mesh and on one device, in a process of its own."""
  tests = pathlib.Path(__file__).resolve().parents[1]
  script = SCRIPT.format(root=str(tests.parent), tests=str(tests), what=what, sizes=sizes,
                         cases=json.loads(cases))
  flags = '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0'
  done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True,
                        env={**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'})
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.integration
@pytest.mark.parametrize('name', CASES)
def test_answers(name):
  """Greedy and sampled answers, verdicts and cache: as on one device, and each has its rows."""
  found = on_devices('answers', (2, 2, 2), json.dumps(CASES))[name]
  cut, one, per_device = found
  assert cut == one and len(cut) == 10
  for rows, found in zip((1, 5, 8), per_device, strict=True):
    whole = -(-rows // 4) * 4
    assert found['rows'] == whole and found['inputs'] == [whole // 4] * 8
    assert found['shards'] == [whole // 4] * 8, found
    assert found['cache'] == [whole // 4], found  # and never the whole batch's


@pytest.mark.integration
def test_analysis():
  """States, attention, interventions and texts of a reasoning decoder."""
  cut, one = on_devices('analysed', (2, 4, 1), json.dumps(ANALYSED))['rim']
  for name in ('states', 'confidence', 'attention'):
    for a, b in zip(cut.pop(name), one.pop(name), strict=True):
      assert_close(a, b)
  assert cut == one


@pytest.mark.integration
def test_text():
  """The loss of a whole split, whose blocks no number divides, and a continuation."""
  cut, one = on_devices('losses', (8, 1, 1), json.dumps({'text': TEXT}))['text']
  assert_close(cut.pop('loss'), one.pop('loss'))
  assert cut == one


def test_lengthened():
  """The last row is repeated up to a multiple; scalars stay."""
  mesh = jax.sharding.AbstractMesh((2, 3, 1), sharding.AXES)
  for rows, whole in ((1, 6), (5, 6), (6, 6), (7, 12)):
    tree = {'a': np.arange(rows), 'b': np.ones((rows, 2)), 'scale': np.float32(3)}
    found = sharding.lengthened(tree, mesh)
    assert found['a'].tolist() == [*range(rows), *[rows - 1] * (whole - rows)]
    assert found['b'].shape == (whole, 2) and found['scale'] == 3


def test_one_device():
  """Without a mesh a call is only a call."""
  params = {'a': np.ones(3)}
  assert sharding.by_rows(lambda x, y: (x, y), params, 1, 2) == (1, 2)
  mesh = sharding.make(config_lib.MeshConfig(), jax.devices()[:1])
  place = jax.sharding.NamedSharding(mesh, P())
  assert sharding.mesh_of({'a': jax.device_put(np.ones(3), place)}) is None
