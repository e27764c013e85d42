"""The search before a comparison: as many trials of each run, chosen in validation alone."""

import json
import math
import os
import pathlib
import subprocess
import sys

import conftest
import pytest

from latent_reasoning import report
from latent_reasoning.cli import commands, sweep, sweep_processes, sweep_search
from latent_reasoning.cli.sweep_share import Share, Slot
from latent_reasoning.config import SweepConfig
from latent_reasoning.errors import Diverged, InputError, TrainingError
from latent_reasoning.train import trainer
from latent_reasoning.train.workdir import Workdir

ROOT = pathlib.Path(__file__).resolve().parents[2]
RATE, PARTS = 'optim.stage1.learning_rate', 'baselines.parts'
SEARCH = (f'{RATE}=1,2,3', f'b {PARTS}=4,5')
CONFIG = SweepConfig(('a seed=7', 'b seed=8'), (3, 4), 'a', 'steps', SEARCH)


@pytest.mark.parametrize('trials', range(1, 13))
@pytest.mark.parametrize('grid', [
    {'x': '1234', 'y': 'abc'}, {'x': '12', 'y': 'ab', 'z': 'tuv'}, {'x': '0123456789ab'}])
def test_drawn_has_each_value_about_equally_often(grid, trials):
  """Other combinations each time; more trials begin with the same; all of them in the end."""
  found = sweep_search.drawn(grid, trials)
  assert len({tuple(one.items()) for one in found}) == trials
  assert found == sweep_search.drawn(grid, 12)[:trials]
  for key, values in grid.items():
    counts = [sum(one[key] == value for one in found) for value in values]
    assert max(counts) - min(counts) <= 1


def test_settings_are_equally_many():
  """As the shared candidates make, whatever a run has beside them; its own stand in for
  shared ones of the key; values may be tuples."""
  found = sweep_search.settings(CONFIG, ('a', 'b'))
  assert found == {
      'a': [{RATE: '1'}, {RATE: '2'}, {RATE: '3'}],
      'b': [{RATE: '1', PARTS: '4'}, {RATE: '2', PARTS: '5'}, {RATE: '3', PARTS: '4'}]}
  own = SweepConfig(seeds=(0,), search=(f'{RATE}=1,2', f'b {RATE}=7,8,9',
                                        'a imm.layers=(0,),(1,2)'), trials=2)
  assert sweep_search.settings(own, ('a', 'b')) == {
      'a': [{RATE: '1', 'imm.layers': '(0,)'}, {RATE: '2', 'imm.layers': '(1,2)'}],
      'b': [{RATE: '7'}, {RATE: '8'}]}
  assert sweep_search.settings(SweepConfig(), ('a',)) == {}


@pytest.mark.parametrize('search, trials, message', [
    ((f'{RATE}=1,1',), 0, 'values that differ'), ((f'{RATE}=',), 0, 'values that differ'),
    ((f'{RATE}=1,,2',), 0, 'values that differ'), (('c x=1',), 0, r"runs \('a', 'b'\)"),
    (('a',), 0, 'expected key=value'), (('',), 0, 'expected key=value'),
    (('optim.lr=1,2',), 0, 'learning_rate'), ((f'a {RATE}=1,2',), 0, 'no candidates for all'),
    ((f'{RATE}=1,2',), 3, '2 candidates for a, fewer than the 3 trials'),
    ((f'{RATE}=1,2,3', f'b {RATE}=1,2'), 0, '2 candidates for b, fewer than the 3'),
    ((), 3, 'nothing to try')])
def test_mistakes(search, trials, message):
  with pytest.raises(InputError, match=message):
    sweep_search.settings(SweepConfig(seeds=(0,), search=search, trials=trials), ('a', 'b'))


def test_folders_are_of_settings():
  """Others have others, and none is taken for a run of the comparison."""
  folder = sweep_search.folder('b', {RATE: '1e-3', 'imm.layers': '(1,2)'})
  assert folder == f'trial-b-{RATE}=1e-3-imm.layers=_1_2_'


@pytest.mark.parametrize('scores, best', [
    ([0.1, 0.3, 0.2], 1), ([0.3, 0.3], 0), ([None, 0.0], 1), ([-2.0, -1.5, None], 1)])
def test_best(scores, best):
  """The first of the best; what diverged is worst, also beside a score of 0."""
  found = sweep_search.Found([{}] * len(scores), [{'score': s} for s in scores])
  assert found.best == best and found.lacks('x') == ''


class Trained:
  """Stands in for trainings: trials have the scores of `scores` by folder, or the status."""

  def __init__(self, monkeypatch, **scores):
    self.flags, self.scores = {}, scores
    monkeypatch.setattr(sweep_processes, 'child', self.child)

  def child(self, flags, place, _):
    self.flags[place.name] = flags
    place.mkdir(parents=True, exist_ok=True)
    if place.name.startswith('trial-'):
      assert '--mode=trial' in flags and '--config.seed=3' in flags
      score = self.scores.get(place.name.partition('=')[2], 0.0)
      if isinstance(score, int):
        return score
      (place / 'trial.json').write_text(json.dumps(
          {'score': None if math.isnan(score) else score, 'trained_steps': 5}))
      return 0
    assert '--mode=train' in flags
    (place / 'results.json').write_text(json.dumps({
        'method': 'language_model', 'loss': 2.0, 'train': {'loss': 1.9}, 'causal': True,
        'seed': int(place.name[-1]), 'parameters': 10}))
    return 0

  def rates(self, folder):
    return [f.partition('=')[2] for f in self.flags[folder] if RATE in f]


def test_seeds_are_trained_at_what_validation_chose(tmp_path, monkeypatch, capsys):
  """Trials first, with the first seed; a diverged one is worst; all seeds have the best; the
  table says it; a second call trains nothing."""
  trained = Trained(monkeypatch, **{'1': 0.2, '2': 0.4, '3': math.nan,
                                    f'1-{PARTS}=4': -3.0, f'2-{PARTS}=5': -2.5,
                                    f'3-{PARTS}=4': -2.25})
  assert sweep.run(CONFIG, ['--config=c.py'], Workdir(tmp_path)) == 0
  assert len(trained.flags) == 10 and [f[0] for f in trained.flags][6:] == ['a', 'b'] * 2
  assert [trained.rates(f'{name}-{seed}') for name in 'ab' for seed in (3, 4)] == [
      ['2'], ['2'], ['3'], ['3']]
  assert f'--config.{PARTS}=4' in trained.flags['b-4'] and (
      '--config.seed=8' in trained.flags['b-4']
      and trained.flags['b-4'].index('--config.seed=8') < trained.flags['b-4'].index(
          '--config.seed=4'))
  assert all('--config.sweep.search=()' in f and '--config.sweep.trials=0' in f
             for f in trained.flags.values())
  text = capsys.readouterr().out
  assert 'Search, 3 trials of each run with seed 3' in text
  assert f'| a | {RATE} | 1: 20.0, 2: 40.0, 3: diverged | 2 |' in text
  assert f'| b | {RATE} / {PARTS} | 1 / 4: loss 3.0000, ' in text
  found = report.find([tmp_path])
  assert [f.path.name for f in found.folders] == ['a-3', 'a-4', 'b-3', 'b-4']
  assert found.search['runs']['b']['chosen'] == 2
  assert not [problem for problem in found.problems if 'search.json' in problem]
  trained.flags.clear()
  assert sweep.run(CONFIG, ['--config=c.py'], Workdir(tmp_path)) == 0 and not trained.flags


def test_the_first_seed_begins_as_its_trial(tmp_path, monkeypatch):
  """It is that training; another seed, or a run that has begun, is left alone."""
  trained = Trained(monkeypatch, **{'2': 0.4})
  child = trained.child
  def keeping(flags, place, slot):
    if place.name.startswith('trial-'):
      place.mkdir(parents=True)
      (place / 'config.json').write_text(place.name)
      (place / 'log.txt').write_text('long')
    return child(flags, place, slot)
  monkeypatch.setattr(sweep_processes, 'child', keeping)
  (tmp_path / 'b-3').mkdir(parents=True)
  (tmp_path / 'b-3/config.json').write_text('begun')
  assert sweep.run(CONFIG, [], Workdir(tmp_path)) == 0
  assert (tmp_path / 'a-3/config.json').read_text() == f'trial-a-{RATE}=2'
  assert sorted(f.name for f in (tmp_path / 'a-3').iterdir()) == ['config.json', 'results.json']
  assert (tmp_path / 'b-3/config.json').read_text() == 'begun'
  assert not (tmp_path / 'a-4/config.json').exists()


def test_other_candidates_are_other_trials(tmp_path, monkeypatch):
  """What was tried is not tried again, and what was not is."""
  trained = Trained(monkeypatch)
  one = SweepConfig(('a x=1',), (3,), '', 'steps', (f'{RATE}=1,2',))
  assert sweep.run(one, [], Workdir(tmp_path)) == 0
  trained.flags.clear()
  more = SweepConfig(('a x=1',), (3,), '', 'steps', (f'{RATE}=2,4',))
  sweep.run(more, [], Workdir(tmp_path))
  assert list(trained.flags) == [f'trial-a-{RATE}=4']


def test_more_candidates_after_the_seeds(tmp_path, monkeypatch, capsys):
  """What was trained at another choice than the table would say is named, and not trained."""
  trained = Trained(monkeypatch, **{'1e-3': 0.1, '2e-3': 0.5})
  def config(rates):
    return SweepConfig(('a x=1',), (3,), '', 'steps', (f'{RATE}={rates}',))
  for rates, status in (('1e-3', 0), ('1e-3,9', 0), ('1e-3,9,2e-3', 1)):
    trained.flags.clear()
    assert sweep.run(config(rates), [], Workdir(tmp_path)) == status
    (tmp_path / 'a-3/config.json').write_text(json.dumps(
        {'optim': {'stage1': {'learning_rate': 0.001}}}))
  assert list(trained.flags) == [f'trial-a-{RATE}=2e-3']
  assert f'a-3: it was trained with {RATE}=0.001, and the search now chooses 2e-3' in (
      capsys.readouterr().err)


@pytest.mark.parametrize('text, value, same', [
    ('1e-3', 0.001, True), ('muon', 'muon', True), ('adamw', 'muon', False), ('2', 2, True),
    ('(0,1)', [0, 1], True), ('(0,)', [0, 1], False), ('True', False, False)])
def test_unlike(text, value, same):
  assert (sweep_search.unlike({'a.b': text}, {'a': {'b': value}}) == '') == same
  assert sweep_search.unlike({'a.b': text}, None) == ''


@pytest.mark.parametrize('failed', [
    {'1': 2}, {'1': math.nan, '2': math.nan, '3': math.nan}, {'3': 1}])
def test_a_run_without_its_trials_is_not_trained(tmp_path, monkeypatch, capsys, failed):
  """A trial that failed otherwise than by diverging is tried again; others go on."""
  trained = Trained(monkeypatch, **failed)
  assert sweep.run(CONFIG, [], Workdir(tmp_path)) == 1
  error = capsys.readouterr().err
  assert 'FAILED: a-3: ' in error and {'b-3', 'b-4'} < set(trained.flags)
  assert not {'a-3', 'a-4'} & set(trained.flags)
  trained.scores.clear()
  if math.nan not in failed.values():
    assert sweep.run(CONFIG, [], Workdir(tmp_path)) == 0
    assert {'a-3', 'a-4'} <= set(trained.flags)
  else:
    assert 'all its 3 trials diverged' in error


def test_a_signal_ends_the_search(tmp_path, monkeypatch):
  trained = Trained(monkeypatch, **{'2': 130})
  assert sweep.run(CONFIG, [], Workdir(tmp_path)) == 130
  assert list(trained.flags) == [f'trial-a-{RATE}=1', f'trial-a-{RATE}=2']


def test_tasks_have_trials_first(tmp_path, monkeypatch, capsys):
  """A task of a seed says what it waits for; in any order, each is done once."""
  trained = Trained(monkeypatch)
  assert sweep.run(CONFIG, [], Workdir(tmp_path), Share(6)) == 1  # a-3
  error = capsys.readouterr().err
  assert '3 of its 3 trials have no score yet' in error and 'first tasks' in error
  assert not trained.flags
  for task in (2, 0, 1):
    assert sweep.run(CONFIG, [], Workdir(tmp_path), Share(task)) == 0
  assert sweep.run(CONFIG, [], Workdir(tmp_path), Share(6)) == 0
  assert list(trained.flags)[3:] == ['a-3']
  statuses = [sweep.run(CONFIG, [], Workdir(tmp_path), Share(i, 2)) for i in (0, 1, 0)]
  assert statuses[1:] == [0, 0] and len(trained.flags) == 10
  assert (tmp_path / 'table.md').exists() and (tmp_path / 'search.json').exists()
  with pytest.raises(InputError, match='task 10 has no run'):
    sweep.run(CONFIG, [], Workdir(tmp_path), Share(10))


def test_each_gpu_has_a_trial(tmp_path, monkeypatch):
  """All trials end before a seed begins."""
  trained = Trained(monkeypatch, **{'2': 0.5})
  assert sweep.run(CONFIG, [], Workdir(tmp_path), Share(slots=(Slot('0'), Slot('1')))) == 0
  names = list(trained.flags)
  assert all(n.startswith('trial-') for n in names[:6]) and len(names) == 10
  assert trained.rates('a-4') == ['2']


def test_processes_of_one_model_do_not_search(tmp_path, monkeypatch):
  Trained(monkeypatch)
  with pytest.raises(InputError, match=r"config\.sweep\.search is .*one process counts"):
    sweep.run(CONFIG, [], Workdir(tmp_path), Share(joined=('--distributed',), processes=2))


@pytest.mark.parametrize('budget', ['flops', 'epochs'])
def test_trials_have_the_budget(tmp_path, monkeypatch, budget):
  """Those that differ in learning rates alone are counted once; others each for itself."""
  trained, counted = Trained(monkeypatch), []

  def python(module, flags, log, environment=None):
    counted.append(log.parent.name)
    cost = 4.0 if f'--config.{PARTS}=5' in flags else 2.0 if (
        f'--config.{PARTS}=4' in flags) else 1.0
    (log.parent / 'flops.json').write_text(json.dumps({
        budget: cost, 'stages': [{'stage': 1, 'steps': 40}]}))
    return 0
  monkeypatch.setattr(sweep_processes, 'python', python)
  config = SweepConfig(CONFIG.runs, (3,), 'a', budget, SEARCH)
  assert sweep.run(config, [], Workdir(tmp_path)) == 0
  steps = {name: f.partition('=')[2] for name, flags in trained.flags.items() for f in flags
           if 'stage1.steps' in f}
  assert list(steps.values()) == ['40'] * 3 + ['20', '10', '20'] + ['40', '20']
  assert counted == ['flops-a', 'flops-b-0', 'flops-b-1']


@pytest.mark.parametrize('error, score', [(None, 0.25), (Diverged('step 3: loss nan'), None)])
def test_a_trial_ends_in_its_score(tmp_path, monkeypatch, capsys, error, score):
  """That of the checkpoint that would be tested, or none; no test problem is scored."""
  class Run:
    workdir, curriculum = Workdir(tmp_path), type('C', (), {'total': 8})
    config = type('C', (), {'seed': 3})

    def __getattr__(self, name):
      raise AssertionError(name)

  def train(run):
    if error:
      raise error
  monkeypatch.setattr(trainer, 'train', train)
  monkeypatch.setattr(commands.evaluation, 'restored', lambda run: type('R', (), {
      'meta': {'accuracy': 0.25}, 'step': 6}))
  assert commands.trial(Run()) == 0
  found = json.loads((tmp_path / 'trial.json').read_text())
  assert found['score'] == score and found['seed'] == 3
  assert ('loss nan' in found.get('error', '')) == bool(error)
  monkeypatch.setattr(trainer, 'train', lambda run: (_ for _ in ()).throw(TrainingError('x')))
  with pytest.raises(TrainingError):  # a full disk, say, is no score
    commands.trial(Run())


@pytest.mark.integration
def test_the_searched_comparison(tmp_path):
  """The whole path of compare_arithmetic.py:searched_smoke: each method in two trials until
  it stops improving, then at what was found; one table. A second call trains nothing."""
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
  groups = ('model.', 'data.arithmetic.t', 'data.arithmetic.v', 'optim.batch_size')
  tiny = {k: v for k, v in conftest.TINY.items()
          if k.startswith(groups) and k != 'model.max_positions'}
  command = [sys.executable, '-m', 'latent_reasoning.main', '--mode=compare',
             '--config=configs/compare_arithmetic.py:searched_smoke',
             f'--workdir={tmp_path}/s', '--config.eval.latency_repeats=2',
             *(f'--config.{k}={v}' for k, v in tiny.items())]
  def call():
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True,
                          timeout=3000)
  done = call()
  assert done.returncode == 0, done.stdout + done.stderr
  found = report.summarize(report.find([tmp_path / 's']))
  assert list(found['runs']) == ['direct', 'coconut', 'rim']
  for name, run in found['runs'].items():
    search = found['search']['runs'][name]
    assert [len(one['set']) for one in search['trials']] == [1 + (name != 'direct')] * 2
    assert run['epochs']['mean'] > 0 and run['trained'] == run['parameters']
    chosen = search['trials'][search['chosen']]
    trial = tmp_path / 's' / sweep_search.folder(name, chosen['set'])
    assert json.loads((trial / 'trial.json').read_text())['score'] == chosen['score']
    assert not (trial / 'results.json').exists()
    saved = json.loads((tmp_path / f's/{name}-0/results.json').read_text())
    # the same configuration and seed, trained once more
    assert saved['validation_accuracy'] == chosen['score']
    assert saved['trained_steps'] == chosen['trained_steps']
  coconut = found['runs']['coconut']
  assert sum(part['mean'] for part in coconut['parts']) == coconut['trained_steps'][0]
  assert coconut['passes'] > found['runs']['direct']['passes'] == 1
  table = (tmp_path / 's/table.md').read_text()
  assert 'steps of each part' in table and 'Search, 2 trials' in table
  again = call()
  assert again.returncode == 0 and 'run 1' not in again.stderr
