"""Plans: exact where exactness is possible, and of devices that are not here."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from latent_reasoning.planning import estimate
from latent_reasoning.train import flops, hardware

pytestmark = pytest.mark.usefixtures('quick_compilation')
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize('changes', [
    {}, *(pytest.param(c, marks=pytest.mark.slow) for c in (
        {'model.lora.rank': 2, 'optim.trainable': 'new', 'model.scan': True,
         'model.frozen_dtype': 'bfloat16'},
        {'method': 'language_model', 'data.name': 'text', 'imm.write_policy': 'gated',
         'data.seq_len': 8}))])
def test_bytes_are_those_of_a_run(tiny_config, make_run, tmp_path, changes):
  """Of parameters, optimizer state and gradients, on the device there is; and its FLOPs."""
  changes = {'data.buckets.prefix': (20,), 'data.buckets.readout': (6,),
             'data.buckets.count': (3,), **changes}
  if changes.get('data.name') == 'text':
    (tmp_path / 'text').write_text('to be or not to be ' * 40)
    changes = {**changes, 'data.path': str(tmp_path / 'text')}
  run = make_run(tiny_config(**changes), tmp_path / 'run')
  state = run.init()
  size = run.tokenizer.size  # a plan without data knows no vocabulary but the configured
  config = dataclasses.replace(run.config, tokenizer=dataclasses.replace(
      run.config.tokenizer, vocab_size=size))
  if config.method == 'language_model':  # whose tokenizer has no index tokens
    config = dataclasses.replace(config, rim=dataclasses.replace(config.rim, max_steps=0))
  found = estimate.measure(config)
  training = flops.training(run)['stages'][0]
  assert found['flops'] == found['model_flops'] == training['flops'] / training['steps']
  def count(tree):
    return sum(a.nbytes for a in jax.tree.leaves(tree))
  assert found['parameter_bytes'] == count(state.params)
  assert found['optimizer_bytes'] == count(state.opt_state)
  assert found['trained'] <= found['parameters'] == sum(
      a.size for a in jax.tree.leaves(state.params))
  assert found['gradient_bytes'] == 4 * found['trained']
  assert found['temporary_bytes'] > 0 and found['activation_bytes'] > 0


def test_rows_that_no_mesh_divides(tiny_config):
  """8 rows in 3 microbatches are planned as 9."""
  config = tiny_config()
  config = dataclasses.replace(config, optim=dataclasses.replace(config.optim,
                                                                 grad_accum_steps=3))
  assert estimate.planned(config).batches.at(0).tokens.shape[0] == 9


@pytest.mark.integration
def test_known_checkpoints(tiny_config):
  """Sizes of models that one plans for without having them, as published."""
  counts = {'openai-community/gpt2': 124_439_808, 'meta-llama/Llama-3.2-1B': 1_235_814_400,
            'meta-llama/Llama-3.2-3B': 3_212_749_824, 'meta-llama/Llama-3.1-8B': 8_030_261_248,
            'HuggingFaceTB/SmolLM2-135M': 134_515_008,
            'Qwen/Qwen2.5-0.5B': 494_032_768}
  assert counts.keys() == estimate.KNOWN.keys()
  for name, count in counts.items():
    run = estimate.planned(tiny_config(**{'model.init_from': name, 'model.scan': True,
                                          'optim.trainable': 'new', 'model.lora.rank': 1}))
    params = jax.eval_shape(run.fresh).params
    own = {'new_embedding', 'new_head', 'lora_a', 'lora_b'}
    old = sum(a.size for path, a in jax.tree_util.tree_leaves_with_path(params)
              if path[-1].key not in own)
    assert old == count, name


def test_times():
  """By hand: 256 devices, of which the slowest part and the collectives add up."""
  peak = hardware.Peak((), 1e12, 1e9, 1e11, 1e10, 256, 0)
  one = {'devices': 256, 'flops': 256 * 1.2e12, 'model_flops': 256 * 0.9e12,
         'traffic_bytes': 1e10, 'expected_collectives': {'all-reduce': 1e9, 'all-gather': 1e9}}
  found = estimate.times(one, peak)
  assert found['compute'] == pytest.approx(1.2 / estimate.SHARE)
  assert found['memory'] == pytest.approx(0.1)
  assert found['collectives'] == pytest.approx(0.3)
  assert found['step'] == pytest.approx(1.2 / estimate.SHARE + 0.3)
  assert found['mfu'] == pytest.approx(0.9 / found['step'])
  assert math.isnan(estimate.times({**one, 'devices': 257}, peak)['step'])  # nothing is stated


@pytest.mark.parametrize('text, gib', [
    ('RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory '
     'required for HLO temporaries (61.80G) exceeds available HBM (31.24G). HLO module: '
     'jit_train_step.', 61.8),  # libtpu 0.0.52
    ('RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space '
     'hbm. Used 17.50G of 15.48G hbm. Exceeded hbm capacity by 2.02G.', 17.5),
    ('INTERNAL: Mosaic failed to compile TPU kernel: Used 20.0M of 16.0M vmem', None),
    ('RESOURCE_EXHAUSTED: something else', None)])
def test_what_a_compiler_refuses(text, gib):
  """For the device's memory, it says how much was asked for; anything else is an error."""
  def compile():
    raise jax.errors.JaxRuntimeError(text)
  lowered = SimpleNamespace(compile=compile)
  if gib is None:
    with pytest.raises(jax.errors.JaxRuntimeError):
      estimate._compiled(lowered)
  else:
    assert estimate._compiled(lowered) == (gib * 2**30, '', True)
