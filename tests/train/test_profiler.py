"""Speed and traces: what the log says of a short training, by hand."""

import dataclasses
import io
import os

import jax
import numpy as np
import pytest

from latent_reasoning.train import flops, hardware, metrics, trainer
from latent_reasoning.train.profiler import Profile, Speed, machine

pytestmark = pytest.mark.usefixtures('quick_compilation')
PEAK = dataclasses.replace(hardware.PEAKS['v4'], kinds=('cpu',), flops=1e9)


@pytest.fixture(scope='module')
def trained(tiny_config, make_run, tmp_path_factory, quick_compilation):
  """A run with a trace, on a device whose peak is known."""
  config = tiny_config(**{
      'optim.stage1.steps': 6, 'optim.stage2.steps': 0, 'train.eval_every': 0,
      'train.save_every': 0, 'model.remat': 'full', 'train.profile_steps': 2,
      'data.buckets.prefix': (20,), 'data.buckets.readout': (6,), 'data.buckets.count': (3,)})
  run = make_run(config, tmp_path_factory.mktemp('run'))
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(hardware.PEAKS, 'cpu', PEAK)
    state = trainer.train(run)
  return run, state, [r for r in metrics.read(run.workdir.metrics) if r['split'] == 'train']


def test_machine(monkeypatch):
  """A processor has a name and the cores that this process may use; an accelerator a name."""
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {3, 5}, raising=False)
  name, _, cores = machine().rpartition(', ')
  assert name and cores == '2 cores'
  kind = type('Device', (), {'device_kind': 'TPU v4'})
  monkeypatch.setattr(jax, 'devices', lambda: [kind])
  assert machine() == 'TPU v4'


@pytest.mark.integration
def test_tokens_are_real(trained):
  """Those that are no padding, of every step."""
  run, _, lines = trained
  pad = run.tokenizer.pad
  counts = [int(np.sum(run.batches.at(step).tokens != pad)) for step in range(6)]
  assert 0 < counts[0] < run.batches.at(0).tokens.size
  for line, own in zip(lines, (counts[:2], counts[2:4], counts[4:]), strict=True):
    seconds = 2 / line['steps_per_second']
    assert line['tokens_per_second'] == pytest.approx(sum(own) / seconds)
    assert line['padding'] == pytest.approx(1 - sum(own) / 2 / run.batches.at(0).tokens.size)


@pytest.mark.integration
def test_mfu(trained):
  """Of the model's FLOPs: what remat does twice counts once."""
  run, state, lines = trained
  once, twice = (flops.of_step(run, 1, state, run.batches.at(5), remat)
                 for remat in (False, True))
  assert once < twice
  seconds = 2 / lines[-1]['steps_per_second']
  assert lines[-1]['mfu'] == pytest.approx(
      2 * once / seconds / PEAK.flops / jax.device_count())


@pytest.mark.integration
def test_no_mfu_without_a_peak(trained):
  """On a CPU: nothing is traced for it, and nothing is said."""
  run, state, _ = trained
  speed = Speed(run)
  speed.add(speed.work(1, state, run.batches.at(0)))
  assert speed.take(1.0).keys() == {'tokens_per_second', 'padding'} and 'MFU' not in speed.text


@pytest.mark.integration
def test_a_trace_is_written(trained):
  run, _, _ = trained
  assert list(run.workdir.profile.rglob('*.xplane.pb'))


@pytest.mark.parametrize('start, total, first', [
    (0, 100, 10), (50, 100, 60), (0, 12, 9), (98, 100, 98)])
def test_where_a_trace_begins(monkeypatch, tmp_path, start, total, first):
  """After ten steps of the process, or as late as it can; it ends with the training."""
  at, said = [], io.StringIO()
  monkeypatch.setattr(jax.profiler, 'start_trace', lambda _: at.append(step))
  monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: at.append(step))
  profile = Profile(tmp_path, 3, start, total, said.write)
  for step in range(start, total):  # noqa: B007 read by the lambdas
    profile.at(step, None)
  profile.close()
  assert at == [first, min(first + 3, total - 1)]
  assert f'step {first + 1} ' in said.getvalue()
