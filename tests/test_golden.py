"""Golden numbers: what every method and write policy computes stays as it was.

  python tests/test_golden.py [CASE ...]   # records golden/numbers.json again

A case trains a small model for 20 steps in each stage; its losses, the predictions of 50
problems and the verdicts of the leakage checks were recorded once. On the same machine the
numbers are equal bit for bit; on another processor, which sums in another order, they are
equal up to rounding that grows with the steps.
"""

import contextlib
import gc
import io
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from llama import LLAMA

FILE = pathlib.Path(__file__).parent / 'golden/numbers.json'
BASE = {'data.arithmetic.test_size': 50, 'eval.batch_size': 10, 'optim.stage1.steps': 20,
        'optim.stage2.steps': 20, 'train.log_every': 1, 'train.eval_every': 0,
        'train.save_every': 0, 'baselines.latents': 1, 'baselines.parts': 2}
TEXT = {'method': 'language_model', 'data.name': 'text', 'data.seq_len': 16,
        'optim.stage2.steps': 0,
        'model.max_positions': 32}
CASES = {
    **{name: {'method': name} for name in (
        'rim', 'direct', 'direct_steps', 'cot', 'pause', 'pause_steps', 'icot', 'coconut',
        'codi')},
    'codi_projection': {'method': 'codi', 'baselines.latents': 2,
                        'baselines.projection': True},
    'rim_offset0': {'rim.readout_offset': 0, 'rim.schedule': 'relative'},
    'rim_bidirectional': {'rim.block_attention': 'bidirectional', 'rim.schedule': 'linear'},
    'rim_blind': {'rim.readout_sees_question': False},
    'rim_externalize': {'rim.externalize': True, 'data.buckets.count': (1, 3, 6)},
    'rim_decoder': {'reasoning_decoder.source': 'blocks', 'reasoning_decoder.joint': True},
    'rim_aux': {'aux.align': 0.5, 'aux.smooth': 0.1},
    'rim_llama': {**LLAMA, 'model.num_kv_heads': 1},
    'rim_scan': {'model.scan': True, 'model.remat': 'full', 'optim.grad_accum_steps': 2},
    'rim_dense': {'model.attention': 'dense'},
    'rim_muon': {'optim.stage1.optimizer': 'muon', 'optim.stage2.optimizer': 'muon'},
    'rim_lora': {'model.lora.rank': 2, 'optim.stage1.dropout': 0.1},
    **{f'imm_{policy}': {'imm.write_policy': policy, 'imm.linformer_rank': 4}
       for policy in ('prefix_mean', 'ring', 'gated', 'delta')},
    'imm_recurrent': {'imm.write_policy': 'delta', 'imm.shared': True, 'imm.rounds': 2,
                      'imm.implementation': 'recurrent'},
    'imm_decoder': {'imm.write_policy': 'gated', 'reasoning_decoder.source': 'memory',
                    'reasoning_decoder.joint': True},
    'text': TEXT, 'text_gated': {**TEXT, 'imm.write_policy': 'gated', 'imm.linformer_rank': 4},
    'text_sequence_mean': {**TEXT, 'imm.write_policy': 'sequence_mean'}}


def named(case: str) -> str:
  """A case on another version of JAX than 0.10, where one whose rounding grows has a record of
  its own, made by the commit before: LoRA's first steps make 6e-4 of 4e-8."""
  import jax
  version = '.'.join(jax.__version__.split('.')[:2])
  return case if version == '0.10' else f'{case}, jax {version}'


def record(make, case: str, folder: pathlib.Path) -> dict:
  """Trains a case in `folder` and returns its numbers."""
  from latent_reasoning import experiment
  from latent_reasoning.cli import commands
  from latent_reasoning.train import trainer, workdir
  text = folder / 'text.txt'
  text.write_text('the cat sat on the mat and the dog on the log; ' * 60)
  config = make(**{**BASE, 'data.path': str(text) if 'text' in case else '', **CASES[case]})
  run = experiment.build(config, workdir.open_workdir(folder / 'run', config, training=True))
  with contextlib.redirect_stdout(io.StringIO()):
    trainer.train(run)
    commands.evaluate(run)
    commands.check_leakage(run)
  lines = [json.loads(line) for line in run.workdir.metrics.read_text().splitlines()]
  predictions = run.workdir.predictions.read_text().splitlines() if (
      run.workdir.predictions.exists()) else []
  checked = json.loads(run.workdir.leakage.read_text())
  return {
      'losses': [line['loss'] for line in lines if line['split'] == 'train'],
      'predictions': [json.loads(line)['predictions'] for line in predictions],
      'sound': {check['check']: check['ok'] for check in checked['checks']}}


@pytest.mark.integration
@pytest.mark.usefixtures('quick_compilation')
@pytest.mark.parametrize('case', CASES)
def test_golden(tiny_config, tmp_path, case):
  """Losses, predictions and verdicts are the recorded ones."""
  numbers = json.loads(FILE.read_text())
  expected = numbers.get(named(case), numbers[case])
  found = record(tiny_config, case, tmp_path)
  import jax
  jax.clear_caches()  # a process holds so many programs only
  gc.collect()
  # The first loss is one forward pass; each step multiplies what rounding did before it.
  np.testing.assert_allclose(found['losses'][0], expected['losses'][0], rtol=1e-6)
  np.testing.assert_allclose(found['losses'], expected['losses'], rtol=2e-4)
  assert found['sound'] == expected['sound']
  same = np.mean([a == b for a, b in zip(found['predictions'], expected['predictions'],
                                         strict=True)] or [1.0])
  assert same >= 0.9, f'{same:.0%} of the predictions are the recorded ones'


def main(cases: list[str]) -> None:
  """Records each case in a process of its own: a process holds so many programs only."""
  if len(cases) != 1:
    for case in cases or CASES:
      subprocess.run([sys.executable, __file__, case], check=True)
    return
  import conftest
  import jax
  jax.config.update('jax_disable_most_optimizations', True)
  make = conftest.tiny_config.__wrapped__(conftest.default_config.__wrapped__())
  with tempfile.TemporaryDirectory() as folder:
    found = record(make, cases[0], pathlib.Path(folder))
  numbers = json.loads(FILE.read_text()) if FILE.exists() else {}
  numbers[named(cases[0])] = found
  print(cases[0], found['losses'][0], found['losses'][-1], flush=True)
  FILE.parent.mkdir(exist_ok=True)
  FILE.write_text('{\n' + ',\n'.join(
      f'{json.dumps(case)}: {json.dumps(one)}' for case, one in numbers.items()) + '\n}\n')


if __name__ == '__main__':
  main(sys.argv[1:])
