"""Sweeps: what they parse, what they run, what they survive."""

import json
import pathlib
import sys

import pytest

from latent_reasoning import report
from latent_reasoning.cli import sweep, sweep_processes
from latent_reasoning.config import SweepConfig
from latent_reasoning.errors import InputError
from latent_reasoning.parallel import multihost
from latent_reasoning.report import figures
from latent_reasoning.train.workdir import Workdir


def test_parse():
  """A name and its overrides."""
  found = sweep.parse(SweepConfig(('gpt imm.write_policy=', "off imm.ablate=('write',)"), (0,),
                                  'gpt',
                                  'steps'))
  assert found == {'gpt': ['--config.imm.write_policy='],
                   'off': ["--config.imm.ablate=('write',)"]}


@pytest.mark.parametrize('runs, control, message', [
    (('a x=1', 'a x=2'), '', 'a name of its own'), (('../a x=1',), '', 'a name of its own'),
    (('a x',), '', 'expected key=value'), (('a x=1',), 'b', 'sweep.control')])
def test_mistakes(runs, control, message):
  with pytest.raises(InputError, match=message):
    sweep.parse(SweepConfig(runs, (0,), control, 'steps'))


def result(place: pathlib.Path, loss: float, seed: int, causal: bool = True):
  """What a finished run leaves."""
  place.mkdir(parents=True, exist_ok=True)
  (place / 'results.json').write_text(json.dumps({
      'method': 'language_model', 'loss': loss, 'train': {'loss': loss - 0.1}, 'causal': causal,
      'seed': seed, 'parameters': 1000, 'memory_zeroed': {'loss': 3.0}}))
  mark = {} if causal else {'causal': False}
  (place / 'metrics.jsonl').write_text(''.join(
      json.dumps({'step': s, 'split': split, 'loss': loss, **mark}) + '\n'
      for s in (1, 2) for split in ('train', 'valid')))


def test_what_does_not_reach_a_run_is_said():
  """A run keeps what it sets itself; overriding that for all runs warns."""
  runs = {'a': ['--config.method=cot'], 'b': ['--config.optim.batch_size=8']}
  said = sweep.unreached(['--config=x.py', '--config.optim.batch_size=4', '--config.seed=1'],
                         runs)
  assert len(said) == 1 and said[0].startswith('--config.optim.batch_size=4 does not reach')
  assert 'b has 8' in said[0] and 'a has' not in said[0]
  assert sweep.unreached(['--config.optim.batch_size=8'], runs) == []


def test_runs_go_on_and_fail_apart(tmp_path, monkeypatch, capsys):
  """What is done is kept, one failure stops no other, and the status tells of it."""
  called = []
  def child(flags, place, _):
    called.append(place.name)
    assert f'--workdir={place}' in flags and '--config=c.py' in flags
    if place.name == 'bad-0':
      return 2
    result(place, 2.0, int(place.name[-1]))
    return 0
  monkeypatch.setattr(sweep_processes, 'child', child)
  config = SweepConfig(('gpt imm.write_policy=', 'bad x=1', 'good x=2'), (0, 1), 'gpt', 'steps')
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
  monkeypatch.setattr(sweep_processes, 'child', lambda *_: 130)
  config = SweepConfig(('a x=1', 'b x=2'), (0,), '', 'steps')
  assert sweep.run(config, [], Workdir(tmp_path)) == 130


def test_child_keeps_what_it_prints(tmp_path, monkeypatch):
  """The process's output and status."""
  monkeypatch.setattr(sys, 'executable', '/bin/echo')
  assert sweep_processes.child(['--config=c.py'], tmp_path / 'a-0') == 0
  assert '--config=c.py' in (tmp_path / 'a-0/log.txt').read_text()


def test_table_marks_what_reads_the_future(tmp_path):
  """Mean, standard error, the difference to the control by seed; the leak below, marked."""
  for seed, (gpt, own) in enumerate([(2.0, 1.9), (2.2, 2.2)]):
    result(tmp_path / f'gpt-{seed}', gpt, seed)
    result(tmp_path / f'leak-{seed}', 1.0, seed, causal=False)
    result(tmp_path / f'own-{seed}', own, seed)
  groups = report.find([tmp_path], ['gpt', 'leak', 'own']).groups()
  rows = report.losses({n: [f.results for f in fs] for n, fs in groups.items()}, 'gpt')
  assert [row[0] for row in rows[1:]] == ['gpt', 'own', 'leak (NOT CAUSAL)']
  assert '2.0500 ±0.1500' in rows[2] and '-2.50 ±2.50 %' in rows[2]


def test_figure(tmp_path):
  """A picture of both losses, where matplotlib is there."""
  result(tmp_path / 'gpt-0', 2.0, 0)
  result(tmp_path / 'leak-0', 1.0, 0, causal=False)
  files = figures.write(tmp_path, figures.curves(report.find([tmp_path]).groups()))
  assert [file.name for file in files] == ['training_loss.png', 'validation_loss.png']
  assert all(file.read_bytes().startswith(b'\x89PNG') for file in files)


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
  """The tables are written, and a line says what is missing."""
  monkeypatch.setitem(sys.modules, 'matplotlib', None)
  result(tmp_path / 'gpt-0', 2.0, 0)
  sweep.finish(tmp_path, ['gpt'], 'gpt')
  assert (tmp_path / 'table.md').exists()
  assert "no figure: figures need matplotlib" in capsys.readouterr().out


def answered(place: pathlib.Path, method: str, seed: int):
  """What a finished run that answers questions leaves."""
  place.mkdir(parents=True, exist_ok=True)
  (place / 'results.json').write_text(json.dumps({
      'method': method, 'seed': int(seed), 'causal': True, 'parameters': 9,
      'accuracy': {'final': 0.5, 'any': 0.5, 'per_block': [0.5]}, 'by_steps': {}}))


def test_a_comparison_ends_in_times_and_tables(tmp_path, monkeypatch, capsys):
  """Each model is timed once, in one process; a second call times nothing again."""
  called = []
  def python(module, flags, log):
    called.append((module, [pathlib.Path(f).name for f in flags]))
    (tmp_path / 'latency.json').write_text(json.dumps({'entries': [
        {'method': m, 'batch': 1, 'first_ms': 1.0, 'full_ms': 2.0, 'prefix_tokens': 3,
         'tokens': 2, 'first_flops': 1e6, 'full_flops': 1e6} for m in ('direct', 'rim')]}))
    return 0
  def child(flags, place, _):
    answered(place, *place.name.split('-'))
    return 0
  monkeypatch.setattr(sweep_processes, 'child', child)
  monkeypatch.setattr(sweep_processes, 'python', python)
  config = SweepConfig(('direct method=direct', 'rim method=rim'), (0, 1), 'direct', 'steps')
  for _ in range(2):
    assert sweep.run(config, [], Workdir(tmp_path)) == 0
  assert called == [('latent_reasoning.cli.latency', ['direct-0', 'rim-0', 'latency.json'])]
  found = json.loads((tmp_path / 'compare.json').read_text())
  assert list(found['runs']) == ['direct', 'rim'] and found['control'] == 'direct'
  assert '| rim | 0, 1 | 50.0 ±0.0 |' in (tmp_path / 'table.md').read_text()


def test_equal_flops(tmp_path, monkeypatch, capsys):
  """Every stage of a run is scaled to the control's FLOPs; what cannot be counted is not."""
  def python(module, flags, log):
    name = log.parent.name.removeprefix('flops-')
    if name == 'odd':
      return 2
    flops = {'direct': 100.0, 'rim': 400.0}[name]
    (log.parent / 'flops.json').write_text(json.dumps({'flops': flops, 'stages': [
        {'stage': 1, 'steps': 30, 'flops': flops}, {'stage': 2, 'steps': 1, 'flops': 0}]}))
    return 0
  monkeypatch.setattr(sweep_processes, 'python', python)
  config = SweepConfig(('direct a=1', 'rim b=2', 'odd c=3'), (0,), 'direct', 'flops')
  runs = sweep.scaled(config, [], sweep.parse(config), Workdir(tmp_path))
  assert runs == {
      'direct': ['--config.a=1', '--config.optim.stage1.steps=30',
                 '--config.optim.stage2.steps=1'],
      'rim': ['--config.b=2', '--config.optim.stage1.steps=8',
              '--config.optim.stage2.steps=1'],
      'odd': ['--config.c=3']}
  assert 'odd: its FLOPs could not be counted' in capsys.readouterr().err
  with pytest.raises(InputError, match="control is ''"):
    sweep.parse(SweepConfig(('a x=1',), (0,), '', 'flops'))
  with pytest.raises(InputError, match="control 'odd' could not be counted"):
    sweep.scaled(SweepConfig(('odd c=3',), (0,), 'odd', 'flops'), [],
                 {'odd': []}, Workdir(tmp_path))


@pytest.mark.parametrize('status, words', [
    (-2, 'stopped'), (143, 'stopped'), (multihost.LOST, 'stopped'), (-9, 'by SIGKILL, see'),
    (135, 'by SIGBUS, see'), (-11, 'by SIGSEGV, see'), (250, 'by signal 122, see')])
def test_how_a_run_ended(status, words, tmp_path):
  """Who stopped it is said to have stopped it; any other signal is named, with the log."""
  text = sweep._ended(status, tmp_path / 'rim-0')
  assert words in text and ('log.txt' in text) == ('see' in words)
