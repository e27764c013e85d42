"""The recipes on pretrained weights, by command, from tiny checkpoints of each architecture."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from latent_reasoning import config_loading, main
from latent_reasoning import experiment as run_lib
from latent_reasoning.hf import load as pretrained
from latent_reasoning.models import lora
from latent_reasoning.train import workdir

torch = pytest.importorskip('torch', reason="pip install -e '.[test-hf]'")
transformers = pytest.importorskip('transformers',
                                   reason="pip install -e '.[test-hf]'")

ROOT = pathlib.Path(__file__).resolve().parents[1]
SIZES = {'hidden_size': 64, 'intermediate_size': 160, 'num_hidden_layers': 2,
         'num_attention_heads': 8, 'max_position_embeddings': 1024}
LLAMA = {**SIZES, 'tie_word_embeddings': True, 'rope_parameters': {
    'rope_type': 'llama3', 'rope_theta': 500_000.0, 'factor': 32.0, 'low_freq_factor': 1.0,
    'high_freq_factor': 4.0, 'original_max_position_embeddings': 256}}
# {variant: (architecture, sizes)}, in the ratios of the weights that it is for
CHECKPOINTS = {
    '': ('gpt2', {'n_layer': 2, 'n_embd': 64, 'n_head': 4, 'n_positions': 1024}),
    'llama1b': ('llama', {**LLAMA, 'num_key_value_heads': 2, 'head_dim': 8}),
    'llama3b': ('llama', {**LLAMA, 'hidden_size': 48, 'num_attention_heads': 6,
                          'num_key_value_heads': 2, 'head_dim': 16}),
    'qwen': ('qwen2', {**SIZES, 'num_attention_heads': 7, 'num_key_value_heads': 1,
                       'hidden_size': 56, 'tie_word_embeddings': True})}


def flags(recipe, folder, **changes):
  return ['main', f'--config={ROOT}/configs/{recipe}', f'--workdir={folder}',
          *(f'--{key}={value}' for key, value in changes.items())]


def command(recipe, folder, **changes):
  """Runs a command as a user does; returns what it printed."""
  done = subprocess.run(
      [sys.executable, '-m', 'latent_reasoning.main', *flags(recipe, folder, **changes)[1:]],
      cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  return done.stdout


def short(steps):
  """Keys that make a run short."""
  keys = {'optim.batch_size': 8, 'optim.stage1.steps': steps, 'optim.stage2.steps': steps,
          'eval.batch_size': 8, 'eval.valid_problems': 8, 'eval.test_problems': 8,
          'eval.max_new_tokens': 16, 'train.log_every': 1, 'train.compilation_cache': '',
          'model.lora.rank': 8, 'model.dtype': 'float32'}
  return {f'config.{key}': value for key, value in keys.items()}


@pytest.mark.slow
@pytest.mark.usefixtures('quick_compilation')
@pytest.mark.parametrize('method', ['language_model', 'rim'])
def test_memory_on_pretrained_weights(make_checkpoint, tmp_path, capsys, method):
  """Only a memory and LoRA learn: at first they change nothing, and the rest never changes."""
  weights = make_checkpoint(tmp_path / 'hub', *CHECKPOINTS[''])
  (tmp_path / 'text').write_text('to be or not to be, that is the question; ' * 40)
  recipe, keys = ('rim_arithmetic.py', {
      'data.arithmetic.train_size': 64, 'data.arithmetic.valid_size': 8,
      'data.arithmetic.test_size': 8, 'data.arithmetic.min_steps': 2,
      'data.arithmetic.max_steps': 2, 'rim.blocks': 2,
      'data.buckets.prefix': (64,), 'data.buckets.readout': (16,),
      'data.buckets.count': (3,), 'rim.max_steps': 3}) if method == 'rim' else (
          'imm_shakespeare.py', {'data.name': 'text', 'data.path': tmp_path / 'text',
                                 'data.seq_len': 16})
  keys = {**short(3), 'config.model.init_from': weights, 'config.optim.trainable': 'new',
          'config.model.lora.dropout': 0.0, 'config.optim.stage1.dropout': 0.0,
          'config.optim.stage2.dropout': 0.0, **{f'config.{k}': v for k, v in keys.items()}}
  first = {}
  for write in ('', 'gated'):
    own = {'config.imm.write_policy': write, 'config.imm.ablate': ('norm',),
           'config.imm.out_scale': 0.0, 'config.imm.chunk': 16}
    run = tmp_path / f'run_{write}'
    assert main.main(flags(recipe, run, **keys, **own)) == 0
    lines = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
    first[write] = lines[0]['loss']
  assert first['gated'] == pytest.approx(first[''], rel=1e-6)
  config = pretrained.resolve(config_loading.from_dict(main.parse(
      flags(recipe, run, **keys, **own)).config))
  built = run_lib.build(config, workdir.open_workdir(run, config, False))
  last = built.restore().state.params
  (own, before), (learnt, after) = (lora.split(p, 'new') for p in (built.init().params, last))
  jax.tree.map(np.testing.assert_array_equal, before, after)
  grown = [np.abs(a - b).max() for a, b in zip(
      jax.tree.leaves(own), jax.tree.leaves(learnt), strict=True)]
  assert 'memory' in learnt['block_0'] and max(grown) > 0


@pytest.mark.slow
@pytest.mark.parametrize('variant', list(CHECKPOINTS))
def test_gsm8k(shared_data, make_checkpoint, tmp_path, variant):
  """Both stages, evaluation and export of each variant of configs/rim_gsm8k.py."""
  data, run = shared_data / 'gsm8k', tmp_path / 'run'
  texts = (data / 'train.jsonl').read_text().splitlines()[:500]
  weights = make_checkpoint(tmp_path / 'hub', *CHECKPOINTS[variant], texts, 512, 520)
  recipe = 'rim_gsm8k.py' + (f':{variant}' if variant else '')
  keys = {**short(20), 'config.data.name': 'gsm8k', 'config.data.dir': data,
          'config.model.init_from': weights, 'config.data.buckets.prefix': (192,),
          'config.data.buckets.readout': (48,), 'config.data.buckets.count': (8,)}
  assert 'rim on gsm8k/test, 8 problems' in command(recipe, run, **keys)
  assert json.loads((run / 'results.json').read_text())['step'] == 40
  lines = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
  losses = [line['loss'] for line in lines if line['split'] == 'train']
  assert {line['stage'] for line in lines} == {1, 2} and losses[-1] < losses[0]
  for kind in ('hf', 'peft'):
    command(recipe, run, mode='export', format=kind, **keys)
  export = run / 'export'
  whole = transformers.AutoModelForCausalLM.from_pretrained(export / 'hf')
  tokens = transformers.AutoTokenizer.from_pretrained(export / 'hf')('1+1\n<b><m></b>',
                                                                     return_tensors='pt')
  logits = whole(**tokens).logits
  assert logits.shape[-1] == whole.config.vocab_size and logits.isfinite().all()
  peft = pytest.importorskip('peft', reason="pip install -e '.[test-hf]'")
  base = transformers.AutoModelForCausalLM.from_pretrained(weights)
  base.resize_token_embeddings(whole.config.vocab_size, mean_resizing=False)
  adapted = peft.PeftModel.from_pretrained(base, export / 'peft')
  # llama1b and llama3b were trained on weights rounded to bfloat16, which 'hf' holds.
  torch.testing.assert_close(adapted(**tokens).logits, logits, atol=2e-2, rtol=0)
