"""Sweeps: what they parse, what they run, what they survive."""

import json
import pathlib
import sys

import pytest

from latent_reasoning import report, sweep
from latent_reasoning.config import SweepConfig
from latent_reasoning.errors import InputError
from latent_reasoning.workdir import Workdir


def test_parse():
  """A name and its overrides."""
  found = sweep.parse(SweepConfig(('gpt imm.write=', "off imm.off=('write',)"), (0,), 'gpt'))
  assert found == {'gpt': ['--config.imm.write='], 'off': ["--config.imm.off=('write',)"]}


@pytest.mark.parametrize('runs, control, message', [
    (('a x=1', 'a x=2'), '', 'a name of its own'), (('../a x=1',), '', 'a name of its own'),
    (('a x',), '', 'expected key=value'), (('a x=1',), 'b', 'sweep.control')])
def test_mistakes(runs, control, message):
  with pytest.raises(InputError, match=message):
    sweep.parse(SweepConfig(runs, (0,), control))


def result(place: pathlib.Path, loss: float, seed: int, causal: bool = True):
  """What a finished run leaves."""
  place.mkdir(parents=True, exist_ok=True)
  (place / 'results.json').write_text(json.dumps({
      'method': 'lm', 'loss': loss, 'train': {'loss': loss - 0.1}, 'causal': causal,
      'seed': seed, 'parameters': 1000, 'memory_zeroed': {'loss': 3.0}}))
  mark = {} if causal else {'causal': False}
  (place / 'metrics.jsonl').write_text(''.join(
      json.dumps({'step': s, 'split': split, 'loss': loss, **mark}) + '\n'
      for s in (1, 2) for split in ('train', 'valid')))


def test_runs_go_on_and_fail_apart(tmp_path, monkeypatch, capsys):
  """What is done is kept, one failure stops no other, and the status tells of it."""
  called = []
  def child(flags, place):
    called.append(place.name)
    assert f'--workdir={place}' in flags and '--config=c.py' in flags
    if place.name == 'bad-0':
      return 2
    result(place, 2.0, int(place.name[-1]))
    return 0
  monkeypatch.setattr(sweep, '_child', child)
  config = SweepConfig(('gpt imm.write=', 'bad x=1', 'good x=2'), (0, 1), 'gpt')
  result(tmp_path / 'gpt-0', 1.9, 0)
  assert sweep.run(config, ['--config=c.py'], Workdir(tmp_path)) == 1
  assert called == ['bad-0', 'good-0', 'gpt-1', 'bad-1', 'good-1']
  text = capsys.readouterr()
  assert 'FAILED: bad-0' in text.err and '| good |' in text.out
  assert (tmp_path / 'table.md').read_text() in text.out
  called.clear()
  assert sweep.run(config, ['--config=c.py'], Workdir(tmp_path)) == 1
  assert called == ['bad-0']


def test_a_signal_stops_the_sweep(tmp_path, monkeypatch):
  """A run stopped by a signal is no failure: the same command goes on with it."""
  monkeypatch.setattr(sweep, '_child', lambda flags, place: 130)
  config = SweepConfig(('a x=1', 'b x=2'), (0,), '')
  assert sweep.run(config, [], Workdir(tmp_path)) == 130


def test_child_keeps_what_it_prints(tmp_path, monkeypatch):
  """The process's output and status."""
  monkeypatch.setattr(sys, 'executable', '/bin/echo')
  assert sweep._child(['--config=c.py'], tmp_path / 'a-0') == 0
  assert '--config=c.py' in (tmp_path / 'a-0/log.txt').read_text()


def test_table_marks_what_reads_the_future(tmp_path):
  """Mean, standard error, the difference to the control by seed; the leak below, marked."""
  for seed, (gpt, own) in enumerate([(2.0, 1.9), (2.2, 2.2)]):
    result(tmp_path / f'gpt-{seed}', gpt, seed)
    result(tmp_path / f'leak-{seed}', 1.0, seed, causal=False)
    result(tmp_path / f'own-{seed}', own, seed)
  lines = report.sweep(tmp_path, ['gpt', 'leak', 'own'], [0, 1], 'gpt').splitlines()
  assert [line.split('|')[1].strip() for line in lines[2:]] == [
      'gpt', 'own', 'leak **(NOT CAUSAL)**']
  assert '2.0500 ±0.1500' in lines[3] and '-2.50 ±2.50 %' in lines[3]


def test_figure(tmp_path):
  """A picture of both losses, where matplotlib is there."""
  pytest.importorskip('matplotlib')
  result(tmp_path / 'gpt-0', 2.0, 0)
  result(tmp_path / 'leak-0', 1.0, 0, causal=False)
  file = report.figure(tmp_path, ['gpt', 'leak'], [0])
  assert file.read_bytes().startswith(b'\x89PNG') and file.stat().st_size > 5000


def test_without_matplotlib(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'matplotlib', None)
  assert report.figure(tmp_path, ['gpt'], [0]) is None
