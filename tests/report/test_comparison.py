"""Comparisons: tests, means, tables and figures by hand; damage that is named."""

import json
import math
import sys

import pytest

from latent_reasoning import report
from latent_reasoning.errors import InputError
from latent_reasoning.report import comparison, figures, runs


@pytest.mark.parametrize('b, c, p', [
    (0, 0, 1.0), (5, 5, 1.0), (1, 0, 1.0), (0, 5, 0.0625), (6, 0, 0.03125),
    (2, 8, 0.109375),  # 2 (1 + 10 + 45) / 1024
    (6, 16, 0.052478790283203125)])  # binom.test(6, 22) of R: 0.05248
def test_mcnemar(b, c, p):
  """The exact binomial test, both sides alike."""
  assert report.mcnemar(b, c) == pytest.approx(p, rel=1e-12)
  assert report.mcnemar(c, b) == report.mcnemar(b, c)


@pytest.mark.integration
def test_mcnemar_of_many():
  """Thousands of problems: near the normal approximation with continuity correction."""
  z = (abs(3100 - 2900) - 1) / math.sqrt(6000)
  assert report.mcnemar(3100, 2900) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.02)


def run(place, method, seed, correct, questions=None, **results):
  """What a finished run leaves; `correct` by problem, of 2 and 3 steps in turn."""
  place.mkdir(parents=True)
  steps = [2 + i % 2 for i in range(len(correct))]
  def share(which):
    return sum(which) / len(which)
  config = {'method': method, 'seed': seed, 'data': {'name': 'toy'}}
  records = [{
      'dataset': 'toy', 'split': 'test', 'index': i, 'steps': s, 'answer': '7',
      'question': questions[i] if questions else f'question {i}', 'predictions': ['1', '7'],
      'correct': [False, bool(c)]} for i, (c, s) in enumerate(zip(correct, steps, strict=True))]
  found = {
      'method': method, 'dataset': 'toy', 'split': 'test', 'n': len(correct), 'seed': seed,
      'causal': True, 'accuracy': {'final': share(correct), 'any': share(correct),
                                   'per_block': [0.0, share(correct)]},
      'by_steps': {str(s): {'n': 1, 'final': share(
          [c for c, t in zip(correct, steps, strict=True) if t == s])} for s in (2, 3)},
      'parameters': 1234, 'trained_steps': 50, 'tokens': {'mean': 2.0 + seed, 'median': 2},
      'training': {'seconds': 10.0 * (1 + seed), 'flops': 2e12, 'stages': []},
      'environment': {'jax': '0.10.2', 'device': 'cpu'}, **results}
  (place / 'config.json').write_text(json.dumps(config))
  (place / 'results.json').write_text(json.dumps(found))
  (place / 'predictions.jsonl').write_text(
      ''.join(json.dumps(r) + '\n' for r in records))
  (place / 'metrics.jsonl').write_text(''.join(
      json.dumps({'step': s, 'stage': 1, 'split': split, 'loss': 2.0 / s, 'final': 0.1 * s})
      + '\n' for s in (1, 2, 3) for split in ('train', 'valid')))


@pytest.fixture
def folder(tmp_path):
  """direct and rim, two seeds, eight problems."""
  run(tmp_path / 'direct-0', 'direct', 0, [1, 1, 0, 0, 0, 0, 0, 0])
  run(tmp_path / 'direct-1', 'direct', 1, [1, 0, 0, 0, 0, 0, 0, 0])
  run(tmp_path / 'rim-0', 'rim', 0, [0, 1, 1, 1, 1, 1, 1, 1])
  run(tmp_path / 'rim-1', 'rim', 1, [1, 1, 1, 1, 1, 0, 0, 0])
  (tmp_path / 'config.json').write_text(json.dumps({'sweep': {
      'runs': ['rim method=rim', 'direct method=direct'], 'control': 'direct'}}))
  (tmp_path / 'latency.json').write_text(json.dumps({'device': 'a cpu', 'entries': [
      {'method': name, 'batch': b, 'first_ms': 1.5 * b, 'full_ms': 2.5 * b, 'tokens': 2,
       'prefix_tokens': 9, 'first_flops': 1e6, 'full_flops': 2e6}
      for name in ('direct', 'rim') for b in (1, 32)]}))
  return tmp_path


def test_summary_by_hand(folder):
  """Means, standard errors and the paired test, worked out by hand."""
  found = report.find([folder])
  assert found.problems == [] and found.control == 'direct'
  summary = report.summarize(found)
  assert list(summary['runs']) == ['rim', 'direct']  # the config's order
  rim = summary['runs']['rim']
  # 7/8 and 5/8: mean 0.75, standard deviation 0.25 / sqrt 2, error 0.125
  assert rim['final'] == {'mean': 0.75, 'error': pytest.approx(0.125)}
  assert rim['by_steps']['2'] == {'mean': 0.75, 'error': pytest.approx(0.0)}
  assert rim['by_steps']['3'] == {'mean': 0.75, 'error': pytest.approx(0.25)}
  # seed 0: rim alone right on 2 … 7, direct alone on 0; seed 1: rim alone on 1 … 4
  assert rim['against'] == {
      '0': {'better': 6, 'worse': 1, 'p': 0.125}, '1': {'better': 4, 'worse': 0, 'p': 0.125},
      'pooled': {'better': 10, 'worse': 1, 'p': pytest.approx(24 / 2048)}}
  assert summary['runs']['direct']['against'] == {}
  assert rim['training_seconds'] == {'mean': 15.0, 'error': pytest.approx(5.0)}
  json.dumps(summary, allow_nan=False)


def test_tables_hold_the_numbers(folder):
  """A row a run, and only columns with something in them."""
  summary = report.summarize(report.find([folder]))
  tables = dict(report.document(summary))
  head, rim, direct = tables['Final accuracy and cost']
  row = dict(zip(head, rim, strict=True))
  assert row == {
      'run': 'rim', 'seeds': '0, 1', 'final %': '75.0 ±12.5', 'any %': '75.0 ±12.5',
      'p against control': '0.012', 'parameters': '1,234', 'steps': '50',
      'tokens': '2.5 ±0.5', 'first token ms': '1.50', 'full answer ms': '2.50',
      'training TFLOP': '2', 'training s': '15 ±5'}
  assert dict(zip(head, direct, strict=True))['p against control'] == 'control'
  assert tables["Against direct, McNemar's exact test"] == [
      ['run', 'right, control wrong', 'wrong, control right', 'p, all seeds', 'p, seed 0',
       'p, seed 1'], ['rim', '10', '1', '0.012', '0.125', '0.125']]
  assert len(tables['Latency, each on its own model']) == 1 + 4


def test_training_and_search_are_said(folder):
  """Epochs, trained parameters, passes, steps of each part; what was tried, and chosen."""
  for seed, parts in enumerate(([3, 4], [4, 6])):
    file = folder / f'rim-{seed}/results.json'
    found = json.loads(file.read_text())
    found.update(trained=1000, passes=5)
    found['training'].update(epochs=1.0 + seed, parts=parts)
    file.write_text(json.dumps(found))
  trials = [{'set': {'a.b': '1', 'c': 'x'}, 'score': 0.25, 'diverged': False},
            {'set': {'a.b': '2', 'c': 'y'}, 'score': None, 'diverged': True}]
  runs = {'rim': {'chosen': 0, 'trials': trials},
          'direct': {'chosen': None, 'trials': trials[1:]}}
  (folder / 'search.json').write_text(json.dumps(
      {'seed': 0, 'budget': 'patience', 'runs': runs}))
  found = report.find([folder])
  assert found.problems == []
  summary = report.summarize(found)
  tables = dict(report.document(summary))
  head, rim, direct = tables['Training']
  assert dict(zip(head, rim, strict=True)) == {
      'run': 'rim', 'trained parameters': '1,000', 'epochs': '1.5 ±0.5',
      'steps of each part': '4 + 5'}
  assert direct[1:] == ['', '', '']
  head, rim, _ = tables['Final accuracy and cost']
  assert rim[head.index('passes')] == '5'
  assert tables['Search, 2 trials of each run with seed 0, by validation %'] == [
      ['run', 'searched', 'validation of each trial', 'chosen'],
      ['rim', 'a.b / c', '1 / x: 25.0, 2 / y: diverged', '1 / x'],
      ['direct', 'a.b / c', '2 / y: diverged', '']]
  said = comparison.fairness(found.search)
  assert 'validation improves no more' in said and 'no test problem' in said
  assert comparison.fairness({}) == '' and 'tried' not in comparison.fairness(
      {'budget': 'epochs'})
  json.dumps(summary, allow_nan=False)


def test_compute_and_scaling_are_said(folder):
  """What is computed before the answer, and accuracy by what is computed when asked."""
  def point(count, final):
    return {'count': count, 'n': 8, 'final': final, 'standard_error': 0.1,
            'by_steps': {'2': {'final': final}}}
  for seed, accuracy in enumerate((0.25, 0.75)):
    file = folder / f'rim-{seed}/results.json'
    file.write_text(json.dumps({**json.loads(file.read_text()), 'passes': 2,
                                'serial_layers': 8, 'token_layers': 96.5}))
    (folder / f'rim-{seed}/scaling.json').write_text(json.dumps({'axes': {'passes': {
        'trained': 2, 'curve': [point(1, 0.5), point(2, accuracy), point(3 + seed, 0.0)],
        'until_agree': {'of': 4, 'readouts': 2.0 + seed, 'final': accuracy}}}}))
  found = report.find([folder])
  assert found.problems == []
  summary = report.summarize(found)
  tables = dict(report.document(summary))
  assert tables['Compute before the first token of the answer'] == [
      ['run', 'passes', 'serial layers', 'token-layers'], ['rim', '2', '8', '96'],
      ['direct', '', '', '']]
  assert tables['By passes when asked, %'] == [
      ['run', 'trained with', '1', '2', 'readouts until two agree', 'of', 'right there'],
      ['rim', '2', '50.0 ±0.0', '50.0 ±25.0', '2.50 ±0.50', '4 ±0', '50.0 ±25.0']]
  assert 'by_passes' in [chart.name for chart in figures.comparison(summary)]
  json.dumps(summary, allow_nan=False)


@pytest.mark.parametrize('wrong', [
    {}, {'axes': []}, {'axes': {'passes': {'trained': 2}}}, {'axes': {'<b>': {
        'trained': 1, 'curve': []}}}, {'axes': {'passes': {'trained': 2, 'curve': [{}]}}}])
def test_odd_scaling_is_named(folder, wrong):
  (folder / 'rim-0/scaling.json').write_text(json.dumps(wrong))
  found = report.find([folder])
  assert any('scaling.json' in problem for problem in found.problems)
  assert report.summarize(found)['runs']['rim']['scaling'] == {}


@pytest.mark.parametrize('search', [
    '{', '[]', '{"seed": 0}', '{"seed": 0, "budget": "steps", "runs": []}',
    '{"seed": 0, "budget": "steps", "runs": {"rim": {"trials": [], "chosen": 0}}}',
    '{"seed": 0, "budget": "steps", "runs": {"rim": {"trials": [{"set": 3}]}}}'])
def test_a_damaged_search_is_named(folder, search):
  (folder / 'search.json').write_text(search)
  found = report.find([folder])
  assert len(found.problems) == 1 and 'search.json' in found.problems[0]
  assert [t for t, _ in report.document(report.summarize(found)) if 'Search' in t] == []


@pytest.mark.parametrize('commits, said', [
    (('1a', '1a', '1a', '1a'), 0), (('', '', '', ''), 0), (('1a', '1a', '2b', '1a+'), 1)])
def test_results_of_several_commits_are_named(folder, commits, said):
  """Runs of one table are of one commit, or the page says that they are not."""
  for place, commit in zip(sorted(folder.glob('*-[01]')), commits, strict=True):
    result = json.loads((place / 'results.json').read_text())
    result['environment']['commit'] = commit
    (place / 'results.json').write_text(json.dumps(result))
  problems = report.find([folder]).problems
  assert len(problems) == said
  assert all('3 commits' in p and '1a, 1a+, 2b' in p for p in problems)


def test_other_problems_are_not_paired(folder):
  """Runs that were asked other questions have no paired test."""
  run(folder / 'cot-0', 'cot', 0, [1] * 8, [f'another {i}' for i in range(8)])
  assert report.summarize(report.find([folder]))['runs']['cot']['against'] == {}


def test_not_causal_is_marked_and_last(folder):
  run(folder / 'aaa-0', 'aaa', 0, [1] * 8, causal=False)
  summary = report.summarize(report.find([folder]))
  assert list(summary['runs'])[-1] == 'aaa'
  assert comparison.headline(summary)[-1][0] == 'aaa (NOT CAUSAL)'


def test_runs_of_their_own(folder):
  """Folders of runs given one by one are grouped by name, their control is direct."""
  found = report.find([folder / 'rim-0', folder / 'rim-1', folder / 'direct-1'])
  assert {n: len(f) for n, f in found.groups().items()} == {'rim': 2, 'direct': 1}
  assert found.control == 'direct'
  assert list(report.summarize(found)['runs']['rim']['against']) == ['1', 'pooled']


DAMAGE = {
    'no results': lambda p: (p / 'results.json').unlink(),
    'cut results': lambda p: (p / 'results.json').write_text('{"method": "ri'),
    'a list': lambda p: (p / 'results.json').write_text('[]'),
    'other results': lambda p: (p / 'results.json').write_text('{"accuracy": {"final": "x"}}'),
    'odd tokens': lambda p: (p / 'results.json').write_text(json.dumps(
        {**json.loads((p / 'results.json').read_text()), 'tokens': 3})),
    'binary': lambda p: (p / 'results.json').write_bytes(b'\xff\xfe\x00'),
    'no config': lambda p: (p / 'config.json').unlink(),
    'bad metrics': lambda p: (p / 'metrics.jsonl').write_text('{"step": 1}\n{"st\n7\n'),
    'no predictions': lambda p: (p / 'predictions.jsonl').unlink(),
    'bad predictions': lambda p: (p / 'predictions.jsonl').write_text('[1]\nx\n')}


@pytest.mark.parametrize('name', DAMAGE)
def test_damage_is_named(folder, name):
  """One damaged run is named and takes no other with it."""
  DAMAGE[name](folder / 'rim-0')
  found = report.find([folder])
  assert any('rim-0' in problem for problem in found.problems)
  summary = report.summarize(found)
  assert summary['runs']['direct']['seeds'] == [0, 1] and 1 in summary['runs']['rim']['seeds']


def test_odd_times_are_named(folder):
  """Entries of latency.json that are not whole are left out, all of them."""
  (folder / 'latency.json').write_text('{"entries": [{"method": "rim", "batch": 1}]}')
  found = report.find([folder])
  assert found.latency == {} and any(
      'latency.json: entries[0].prefix_tokens, which is missing' in p for p in found.problems)


def test_curve(folder):
  """Mean over seeds; values that are no numbers are left out."""
  with (folder / 'rim-0/metrics.jsonl').open('a') as file:
    file.write(json.dumps({'step': 4, 'split': 'train', 'loss': 'nan'}) + '\n')
  found = report.find([folder]).groups()['rim']
  assert runs.curve(found, 'train', 'loss') == [(1, 2.0), (2, 1.0), (3, pytest.approx(2 / 3))]


def test_figures(folder):
  charts = figures.comparison(report.summarize(report.find([folder])))
  files = figures.write(folder, charts)
  assert [f.name for f in files] == ['by_latency.png', 'latency.png', 'by_steps.png',
                                     'by_block.png']
  assert all(f.read_bytes().startswith(b'\x89PNG') for f in files)


def test_without_matplotlib(folder, monkeypatch):
  monkeypatch.setitem(sys.modules, 'matplotlib', None)
  with pytest.raises(InputError, match=r"figures need matplotlib; .*\[report\]"):
    figures.comparison(report.summarize(report.find([folder])))


def sized(folder, name, method, **keys):
  """A run whose configuration has these keys."""
  run(folder / f'{name}-0', method, 0, [1, 0, 1, 0], parameters=keys.pop('parameters', 1234))
  config = {'method': method, 'seed': 0, **{
      part: {key: value for at, value in keys.items() for group, key in [at.split('_', 1)]
             if group == part} for part in ('model', 'rim')}}
  (folder / f'{name}-0/config.json').write_text(json.dumps(config))


def test_what_was_varied(tmp_path):
  """One key of the configuration, by method; several are the number of parameters."""
  for method in ('rim', 'direct'):
    for layers in (4, 1, 2):
      sized(tmp_path, f'{method}_{layers}', method, model_num_layers=layers,
            parameters=100 * layers)
  label, lines = comparison.varied(report.summarize(report.find([tmp_path])))
  assert label == 'layers'
  assert lines['rim'] == [(1, 'rim_1'), (2, 'rim_2'), (4, 'rim_4')]
  sized(tmp_path, 'rim_wide', 'rim', model_num_layers=9, model_embed_dim=7, parameters=50)
  label, lines = comparison.varied(report.summarize(report.find([tmp_path])))
  assert label == 'parameters' and lines['rim'][0] == (50, 'rim_wide')
  charts = figures.comparison(report.summarize(report.find([tmp_path])))
  assert 'varied' in [chart.name for chart in charts]


@pytest.mark.parametrize('passes', [(1, 1, 1), (4, 2, 1)])
def test_blocks_and_passes(tmp_path, passes):
  """Blocks alone are a line; blocks of which each is passed over less are two things."""
  for blocks, number in zip((1, 2, 4), passes, strict=True):
    sized(tmp_path, f'rim_{blocks}', 'rim', rim_blocks=blocks)
    path = tmp_path / f'rim_{blocks}-0/results.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), 'passes': number}))
  found = comparison.varied(report.summarize(report.find([tmp_path])))
  assert (found and found[0]) == ('blocks' if len({*passes}) == 1 else None)


def test_nothing_was_varied(folder):
  """Methods alone, or two runs alike in size: there is no line to draw."""
  assert comparison.varied(report.summarize(report.find([folder]))) is None
  run(folder / 'other-0', 'rim', 0, [1] * 8)
  assert comparison.varied(report.summarize(report.find([folder]))) is None
