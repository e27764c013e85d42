"""Exports under the two generations of transformers, each in an environment of its own.

  LATENT_REASONING_VERSIONS=1 pytest -m slow -s -n 0 tests/hf/test_export_versions.py

It makes two virtual environments and installs torch and transformers there: minutes.
"""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from llama import LLAMA

from latent_reasoning import batching, sequences
from latent_reasoning.config import RopeConfig
from latent_reasoning.hf import export, families
from latent_reasoning.models.transformer import Transformer

pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not os.environ.get('LATENT_REASONING_VERSIONS'),
    reason='installs two environments; set LATENT_REASONING_VERSIONS=1')]

SMALL_LLAMA = {**LLAMA,
         'model.num_kv_heads': 1, 'model.max_positions': 64}
ROPES = {'plain': RopeConfig(5e5, '', 1.0, 1.0, 4.0, 8192),
         'linear': RopeConfig(1e4, 'linear', 2.0, 1.0, 4.0, 8192),
         'llama3': RopeConfig(5e5, 'llama3', 8.0, 1.0, 4.0, 16)}
TOKENS = np.arange(40, dtype=np.int32)[None] % 13
SCRIPT = '''
import sys, numpy, torch, transformers
for path in sys.argv[1:]:
  model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
  with torch.no_grad():
    logits = model(torch.arange(40)[None] % 13).logits
  numpy.save(f'{path}/logits.npy', logits.float().numpy())
print(transformers.__version__)
'''


def models(tiny_config, random_params, folder):
  """Exports of tiny models, and their logits here."""
  made = {}
  for name, rope in {**ROPES, 'gpt2': None}.items():
    config = tiny_config(**(SMALL_LLAMA if rope else {'model.max_positions': 64}))
    model_config = dataclasses.replace(
        config.model, **({'rope': rope, 'head_dim': 8} if rope else {}))
    config = dataclasses.replace(config, model=model_config)
    model = Transformer(model_config, 16)
    batch = batching.collate([sequences.causal(TOKENS[0].tolist(), ())], 40, 0, 0)
    params = random_params(model, batch)
    path = folder / name
    path.mkdir()
    (path / 'config.json').write_text(json.dumps(families.hf_config(model_config, 16)))
    export._save(export.tensors(config, jax.device_get(params), 16), path / 'model.safetensors')
    hidden = model.apply({'params': params}, batch.tokens, batch.positions, batch.mask).hidden
    made[path] = np.asarray(model.apply({'params': params}, hidden, method='head'))
  return made


@pytest.mark.parametrize('version', ['transformers>=4.57,<5', 'transformers>=5'])
def test_logits(version, tiny_config, random_params, tmp_path):
  """The same, whichever way a version reads rotary positions."""
  made = models(tiny_config, random_params, tmp_path)
  env = tmp_path / 'env'
  subprocess.run([sys.executable, '-m', 'venv', env], check=True)
  pip = [env / 'bin/pip', 'install', '-q']
  if subprocess.run([*pip, 'torch==2.13.0']).returncode:
    subprocess.run([*pip, 'torch'], check=True)
  subprocess.run([*pip, version], check=True)
  done = subprocess.run([env / 'bin/python', '-c', SCRIPT, *made], check=True, text=True,
                        capture_output=True)
  for path, logits in made.items():
    found = np.load(path / 'logits.npy')
    worst = np.abs(found - logits).max() / np.abs(logits).max()
    print(done.stdout.strip(), path.name, f'largest difference {worst:.1e} of the scale')
    assert worst < 1e-5
