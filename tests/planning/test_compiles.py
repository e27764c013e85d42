"""What the compilers of a TPU and a GPU say of training steps: slow, where they are installed.

Each step is compiled in a process of its own, as libtpu is told before JAX is imported. One
row is 160 places of prefix and 8 readouts of 32, numbers that no other array has.
"""

import importlib.util
import json
import math
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from latent_reasoning import methods
from latent_reasoning.models import memory_policies
from latent_reasoning.planning import targets

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = ROOT / '.github/results/plans.md'
PREFIX, COUNT, READOUT = 160, 8, 32
SMALL = {'model.init_from': 'openai-community/gpt2', 'data.buckets.prefix': (PREFIX,),
         'data.buckets.count': (COUNT,), 'data.buckets.readout': (READOUT,),
         'data.seq_len': PREFIX, 'model.loss_tile': 512, 'model.remat': 'full',
         'optim.batch_size': 16, 'mesh.data': 1, 'mesh.fsdp': -1}
TARGETS = {'tpu:v5e:2x2': 'splash', 'gpu:h100': 'cudnn'}
CHANGES = {  # of RiM with the target's kernel
    **{name: {'method': name} for name in methods.METHODS},
    **{policy: {'imm.write_policy': policy} for policy in memory_policies.POLICIES},
    **{f'remat {policy}': {'model.remat': policy} for policy in ('none', 'dots')},
    'shared_prefix': {'model.attention': 'shared_prefix'},
    'bidirectional blocks': {'rim.block_attention': 'bidirectional'},
    'passes': {'rim.passes': 2}}
KNOWN, WIDTH = 50_257, 768  # GPT-2's table; new tokens are parameters of their own
SCRIPT = '''
import json, sys
from latent_reasoning import api
from latent_reasoning.planning import estimate
target, keys = json.loads(sys.argv[1])
keys = {key: tuple(one) if isinstance(one, list) else one for key, one in keys.items()}
print(json.dumps(estimate.measure(api.load_config('rim_gsm8k', **keys), target, True)))
'''

GENERATE = '''
import dataclasses, json, sys
import jax, numpy as np
from latent_reasoning import api, batching, sequences
from latent_reasoning.eval import decoding
from latent_reasoning.planning import estimate, targets
target, keys, rows, blocks, tokens, sample = json.loads(sys.argv[1])
keys = {key: tuple(one) if isinstance(one, list) else one for key, one in keys.items()}
device = jax.sharding.SingleDeviceSharding(targets.parse(target).devices()[0])
run = estimate.planned(api.load_config('rim_gsm8k', **keys), [*device.device_set])
def shapes(tree):
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), tree)
model, params = run.model(0.0), shapes(jax.eval_shape(run.fresh).params)
prompt = sequences.causal([1] * 160, [sequences.Readout(160)] * blocks)
batch = shapes(batching.collate([prompt] * rows, 160, blocks, 1))
head, rng = shapes((jax.eval_shape(lambda p: decoding.head_kernel(model, p), params),
                    jax.eval_shape(lambda: jax.random.key(0))))
with jax.set_mesh(run.mesh):
  compiled = decoding.generate.lower(
      model, params, head, batch, rng, 1.0, end=2, pad=0, max_tokens=tokens,
      sample=sample).compile()
memory = compiled.memory_analysis()
_, cache = jax.eval_shape(lambda p, h, b: decoding.prefill(model, p, h, b, tokens - 1), params,
                          head, batch)
print(json.dumps({
    'temporaries': memory.temp_size_in_bytes, 'loops': compiled.as_text().count(' while('),
    'cache': sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache))}))
'''


def needs_compiler(target: str) -> None:
  package, extra = targets.EXTRAS[target.partition(':')[0]]
  if importlib.util.find_spec(package) is None:
    pytest.skip(f"{package} is not installed: pip install -e '.[{extra}]'")


def run(target: str, *argv: str) -> str:
  env = {**os.environ, **targets.ENVIRONMENT, 'PYTHONPATH': str(ROOT)}
  done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=env,
                        cwd=ROOT)
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


@pytest.mark.parametrize('target', TARGETS)
@pytest.mark.parametrize('what', CHANGES)
def test_compiles(target, what):
  """A training step compiles, and neither all logits nor a mask of whole rows are in it."""
  needs_compiler(target)
  keys = {**SMALL, 'model.attention': TARGETS[target], **CHANGES[what]}
  found = json.loads(run(target, '-c', SCRIPT, json.dumps([target, keys])).splitlines()[-1])
  assert not found['refused']
  rows, length = found['rows']
  method, kernel = keys.get('method', 'rim'), keys['model.attention']
  tokens = rows // found['devices'] * (length if methods.get(method).is_text else
                                       length - PREFIX + found['readouts'])
  shapes = [(one.partition('[')[0], [int(n) for n in re.findall(r'\d+', one.partition('[')[2])])
            for one in found['shapes']]
  assert any(max(dims) >= KNOWN // 4 for _, dims in shapes)  # the head is there
  assert tokens > keys['model.loss_tile']
  logits = [dims for kind, dims in shapes if kind == 'f32' and max(dims) >= KNOWN
            and keys['model.loss_tile'] < math.prod(dims) // max(dims) != WIDTH]
  assert not logits, logits
  square = {length} if length > PREFIX else set()
  if kernel in TARGETS.values() and what not in ('bidirectional blocks', 'passes'):
    square |= {PREFIX, -(-PREFIX // 128) * 128}  # and as splash attention pads it
  whole = [dims for _, dims in shapes if any(dims.count(n) > 1 for n in square)]
  assert not whole, whole


@pytest.mark.parametrize('sample', [False, True])
@pytest.mark.parametrize('target', TARGETS)
def test_decoding_compiles(target, sample):
  """Greedy and sampled; the cache, most of what there is, is there once: steps change it in
  place. A first token is the same program without the loop."""
  needs_compiler(target)
  keys = {**SMALL, 'model.attention': TARGETS[target], 'model.remat': 'none'}
  first, full = (json.loads(run(target, '-c', GENERATE, json.dumps(
      [target, keys, 32, 8, tokens, sample])).splitlines()[-1]) for tokens in (1, 256))
  assert full['temporaries'] < 1.25 * full['cache'] + first['temporaries']


def temporaries(text: str) -> float | None:
  """GiB, in the table that a plan prints; None: there is no such table."""
  found = re.search(r'.*\| temporaries \|.*\n.*\n.*', text)
  if not found:
    return None
  heads, _, cells = (line.split('|') for line in found[0].splitlines())
  return float(cells[heads.index(' temporaries ')])


def published() -> list:
  """(command, GiB of temporaries) of the page's training steps."""
  found = []
  for part in PAGE.read_text().split('\n## ')[1:]:
    command = re.search(r'```sh\n(.+)\n```', part)[1]
    if gib := temporaries(part):
      found.append(pytest.param(shlex.split(command), gib, id=part.splitlines()[0]))
  return found


@pytest.mark.parametrize('command, gib', published())
def test_memory_is_as_published(command, gib):
  """The page's table, to within 10%, by its own command."""
  target = next(a.partition('=')[2] for a in command if a.startswith('--target='))
  needs_compiler(target)
  assert temporaries(run(target, *command[1:])) == pytest.approx(gib, rel=0.1)
