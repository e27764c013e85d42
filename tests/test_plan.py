"""Plans: exact where exactness is possible, and of devices that are not here."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from latent_reasoning import plan
from latent_reasoning.errors import InputError

pytestmark = pytest.mark.usefixtures('quick_compilation')
ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize('changes', [
    {}, {'model.lora.rank': 2, 'optim.trained': 'new', 'model.scan': True,
         'model.frozen_dtype': 'bfloat16'},
    {'method': 'lm', 'data.name': 'text', 'imm.write': 'gated', 'data.block': 8}])
def test_bytes_are_those_of_a_run(tiny_config, make_run, tmp_path, changes):
  """Of parameters, optimizer state and gradients, on the device there is."""
  if changes.get('data.name') == 'text':
    (tmp_path / 'text').write_text('to be or not to be ' * 40)
    changes = {**changes, 'data.path': str(tmp_path / 'text')}
  run = make_run(tiny_config(**changes), tmp_path / 'run')
  state = run.init()
  size = run.tokenizer.size  # a plan without data knows no vocabulary but the configured
  config = dataclasses.replace(run.config, tokenizer=dataclasses.replace(
      run.config.tokenizer, vocab_size=size))
  if config.method == 'lm':  # whose tokenizer has no index tokens
    config = dataclasses.replace(config, rim=dataclasses.replace(config.rim, max_steps=0))
  found = plan.measure(config)
  def count(tree):
    return sum(a.nbytes for a in jax.tree.leaves(tree))
  assert found['parameter_bytes'] == count(state.params)
  assert found['optimizer_bytes'] == count(state.opt_state)
  assert found['trained'] <= found['parameters'] == sum(
      a.size for a in jax.tree.leaves(state.params))
  assert found['gradient_bytes'] == 4 * found['trained']
  assert found['temporary_bytes'] > 0 and found['activation_bytes'] > 0


def test_known_checkpoints(tiny_config):
  """Sizes of models that one plans for without having them, as published."""
  counts = {'openai-community/gpt2': 124_439_808, 'meta-llama/Llama-3.2-1B': 1_235_814_400,
            'meta-llama/Llama-3.2-3B': 3_212_749_824, 'meta-llama/Llama-3.1-8B': 8_030_261_248,
            'Qwen/Qwen2.5-0.5B': 494_032_768}
  assert counts.keys() == plan.KNOWN.keys()
  for name, count in counts.items():
    run = plan.planned(tiny_config(**{'model.init_from': name, 'model.scan': True,
                                      'optim.trained': 'new', 'model.lora.rank': 1}))
    params = jax.eval_shape(run.fresh).params
    own = {'new_embedding', 'new_head', 'lora_a', 'lora_b'}
    old = sum(a.size for path, a in jax.tree_util.tree_leaves_with_path(params)
              if path[-1].key not in own)
    assert old == count, name


def test_on_fake_devices():
  """By command: what 4 devices hold is a quarter of what one does."""
  done = subprocess.run(
      [sys.executable, '-m', 'latent_reasoning.main', '--mode=plan', '--devices=1,4',
       '--memory_gb=1', '--config=configs/rim_arithmetic.py', '--config.mesh.data=1',
       '--config.mesh.fsdp=-1', '--config.tokenizer.pad_to=8'],
      capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 0, done.stderr
  one, four = [line.split('|')[1:-1] for line in done.stdout.splitlines()[-2:]]
  assert one[0].strip() == '1 (1 × 1 × 1)' and four[0].strip() == '4 (1 × 4 × 1)'
  assert one[-1].strip() == four[-1].strip() == 'yes'


def test_devices():
  assert plan.parse_devices('1,4,64') == [1, 4, 64]
  for text in ('', 'four', '0', '1,,2'):
    with pytest.raises(InputError, match='expected numbers of at least 1'):
      plan.parse_devices(text)
