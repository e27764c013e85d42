"""The command of plans: processes, searches, numbers of devices."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from latent_reasoning.errors import InputError
from latent_reasoning.planning import plan
from latent_reasoning.train import hardware

ROOT = Path(__file__).resolve().parents[2]


def step_of(rows, per_row=1e9, flops=1e12, fixed=2e9, unit=1, refuses=float('inf')):
  rows = -(-rows // unit) * unit
  total = fixed + per_row * rows
  return {'rows': [rows, 10], 'problems': rows, 'total_bytes': total,
          'temporary_bytes': total - 0.5 * fixed, 'row_unit': unit,
          'refused': total > refuses, 'devices': 1, 'flops': rows * flops,
          'model_flops': rows * 1e12, 'traffic_bytes': 1.0, 'expected_collectives': {}}


@pytest.mark.parametrize('unit', [1, 4, 8])
@pytest.mark.parametrize('start', [1, 3, 8, 64, 5000])
def test_largest_batch(start, unit):
  """To within a sixteenth or what the mesh divides, by few compilations."""
  for limit in (30.5, 900.0):
    asked = []

    def measured(rows, asked=asked):
      asked.append(rows)
      return step_of(rows, unit=unit)
    found = plan.largest_batch(measured, start, limit * 1e9)
    assert found['total_bytes'] < limit * 1e9
    more = max(unit, found['rows'][0] / 16)
    assert found['total_bytes'] + more * 1e9 >= limit * 1e9
    assert len(asked) <= 5 and len(asked) == len(set(asked))
  assert plan.largest_batch(functools.partial(step_of, unit=unit), start, 2.5e9) is None


@pytest.mark.parametrize('power', [0.8, 1.3])
def test_largest_batch_where_bytes_are_not_linear(power):
  def measured(rows):
    return step_of(rows) | {'total_bytes': 2e9 + 1e9 * rows**power}
  found = plan.largest_batch(measured, 128, 300e9)['rows'][0]
  assert found**power < 298 <= (1.07 * found + 1)**power


def test_what_a_compiler_refuses_does_not_fit():
  """Whatever memory is said to be there."""
  found = plan.largest_batch(functools.partial(step_of, refuses=20e9), 64, 30.5e9)
  assert 17 <= found['rows'][0] <= 18


def test_search():
  """The policy of the most tokens a second; of equals, what recomputes least."""
  peak = hardware.Peak((), 1e15, 30.5e9, 1e12, 1e10, 8, 0)

  def measured(remat, rows):
    return step_of(rows, {'none': 40e9, 'dots': 1e9, 'full': 0.1e9}[remat],
                   {'none': 1e12, 'dots': 1.005e12, 'full': 1.27e12}[remat])
  text = plan.search(measured, 8, peak, 30.5, 'gpu:h100')
  for row in ('| none | none fits |', '| dots | 28 |', '| full | 272 |'):
    assert row in text
  assert text.endswith('--config.model.remat=dots --config.optim.batch_size=28')
  assert 'nothing fits' in plan.search(measured, 8, peak, 1.0, 'gpu:h100')
  with pytest.raises(InputError, match='--search asks the compiler of a --target'):
    plan.run([], [1], 'v5p', None, '', 8)


@pytest.mark.slow
def test_on_fake_devices():
  """By command: what 4 devices hold is a quarter of what one does."""
  done = subprocess.run(
      [sys.executable, '-m', 'latent_reasoning.main', '--mode=plan', '--devices=1,4',
       '--memory_gb=1', '--config=configs/rim_arithmetic.py', '--config.mesh.data=1',
       '--config.mesh.fsdp=-1', '--config.tokenizer.pad_to=8', '--config.model.num_layers=1'],
      capture_output=True, text=True, cwd=ROOT,
      env={**os.environ, 'XLA_FLAGS': '--xla_backend_optimization_level=0'})
  assert done.returncode == 0, done.stderr
  rows = [[cell.strip() for cell in line.split('|')[1:-1]]
          for line in done.stdout.splitlines() if line.startswith('|')]
  (one, four), (first, second) = rows[2:4], rows[6:]
  assert one[0] == '1 (1 × 1 × 1)' and four[0] == '4 (1 × 4 × 1)'
  assert one[-1] == four[-1] == 'yes'
  assert float(first[2]) == pytest.approx(4 * float(second[2]), rel=0.01)  # FLOPs
  assert first[3:5] == ['0', '0'] and float(second[4]) > 0  # bytes that are sent


def test_devices():
  assert plan.parse_devices('1,4,64') == [1, 4, 64]
  for text in ('', 'four', '0', '1,,2'):
    with pytest.raises(InputError, match='expected numbers of at least 1'):
      plan.parse_devices(text)
