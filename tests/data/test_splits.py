"""Splits: found, carved, disjoint, limited and reported."""

import dataclasses
import json

import pytest

from latent_reasoning import data
from latent_reasoning.data.synthetic import split_of
from latent_reasoning.errors import InputError


def rows(prefix, count):
  return '\n'.join(f'{prefix} {i}?||<<1+1=2>> #### {i}' for i in range(count))


@pytest.fixture
def folder(tmp_path, data_config):
  """Writes files by name; returns the config that points at their folder."""
  def make(**changes):
    names = changes.pop('files')
    for name, content in names.items():
      (tmp_path / name).write_text(content)
    return dataclasses.replace(data_config, **{'dir': str(tmp_path), **changes})
  return make


def questions(split):
  return [e.question for e in split]


@pytest.mark.parametrize('valid', ['valid.txt', 'validation.x', 'VAL.json', 'dev'])
def test_files_are_found_by_stem(folder, tmp_path, valid):
  config = folder(files={
      'train.txt': rows('a', 9), valid: rows('b', 3), 'test.txt': rows('c', 4),
      'other_train.txt': rows('x', 2), 'readme.md': 'text', '.train.swp': 'text'})
  splits = data.load(config, 0)
  assert questions(splits.train) == [f'a {i}?' for i in range(9)]
  assert questions(splits.valid) == [f'b {i}?' for i in range(3)]
  assert questions(splits.test) == [f'c {i}?' for i in range(4)]
  report = json.loads(json.dumps(splits.report))
  assert report['counts'] == {'train': 9, 'valid': 3, 'test': 4}
  assert report['sources']['valid']['path'] == str(tmp_path / valid)
  assert report['sources']['train']['form'] == 'icot'
  assert report['carved'] == {}


def test_endings_count_only_where_no_stem_is_exact(folder):
  config = folder(files={'icot_train.txt': rows('a', 9), 'icot_dev.txt': rows('b', 3),
                         'icot_test.txt': rows('c', 4)})
  assert data.load(config, 0).report['counts'] == {'train': 9, 'valid': 3, 'test': 4}
  config = folder(files={'train.txt': rows('d', 9)})
  splits = data.load(config, 0)
  assert sorted(splits.report['carved']) == ['test', 'valid']
  assert {q[0] for s in (splits.train, splits.valid, splits.test)
          for q in questions(s)} == {'d'}


def test_two_candidates_are_refused_and_an_explicit_key_decides(folder, tmp_path):
  config = folder(files={'train.txt': rows('a', 9), 'val.txt': rows('b', 3),
                         'dev.txt': rows('c', 3), 'test.txt': rows('d', 3)})
  with pytest.raises(InputError, match='dev.txt, val.txt.*set config.data.valid'):
    data.load(config, 0)
  for name, first in (('dev.txt', 'c 0?'), ('val.txt', 'b 0?')):
    explicit = dataclasses.replace(config, valid=str(tmp_path / name))
    assert questions(data.load(explicit, 0).valid)[0] == first


def test_explicit_files_need_no_folder(folder, tmp_path):
  config = folder(files={'x.txt': rows('a', 9), 'y.txt': rows('b', 3), 'z': rows('c', 2)},
                  dir='', train=str(tmp_path / 'x.txt'), valid=str(tmp_path / 'y.txt'),
                  test=str(tmp_path / 'z'))
  assert data.load(config, 0).report['counts'] == {'train': 9, 'valid': 3, 'test': 2}


def test_a_single_file_is_the_training_file(folder, tmp_path):
  config = folder(files={'any.txt': rows('a', 20)}, dir=str(tmp_path / 'any.txt'))
  splits = data.load(config, 0)
  assert splits.report['carved'] == {'valid': 2, 'test': 2}
  everything = [*questions(splits.train), *questions(splits.valid), *questions(splits.test)]
  assert len(splits.train) == 16
  assert sorted(everything) == sorted(f'a {i}?' for i in range(20))


def test_carving_is_by_seed_and_leaves_test_alone(folder):
  config = folder(files={'train.txt': rows('a', 200), 'test.txt': rows('b', 30)},
                  valid_size=50)
  first, again, other = (data.load(config, seed) for seed in (1, 1, 2))
  assert questions(first.valid) == questions(again.valid)
  assert set(questions(first.valid)) != set(questions(other.valid))
  assert questions(first.test) == [f'b {i}?' for i in range(30)]
  assert len(first.valid) == 50 and len(first.train) == 150
  assert all(q.startswith('a') for q in questions(first.valid))
  assert not set(questions(first.valid)) & set(questions(first.train))
  numbers = [int(q[2:-1]) for q in questions(first.valid)]
  assert 60 < sum(numbers) / 50 < 140  # from all over the file


@pytest.mark.parametrize('size', [9, 10])
def test_too_small_a_train_split_is_not_carved(folder, size):
  config = folder(files={'train.txt': rows('a', 9), 'test.txt': rows('b', 3)},
                  valid_size=size)
  with pytest.raises(InputError, match=f'valid_size is {size}.*from 9 training problems'):
    data.load(config, 0)


def test_questions_of_two_splits_are_dropped_from_the_less_precious(folder):
  config = folder(files={
      'train.txt': rows('a', 5) + '\nIn  TEST, twice!||#### 1\nin valid||#### 1\n'
                   'all three||#### 1',
      'valid.txt': rows('b', 3) + '\nIn valid.||#### 1\nIn both?||#### 1\n'
                   'All three||#### 1',
      'test.txt': rows('c', 3) + '\nin test twice||#### 1\nin both||#### 1\n'
                  'All three!||#### 1'})
  splits = data.load(config, 0)
  assert splits.report['duplicates'] == {
      'train_valid': 1, 'train_test': 2, 'valid_test': 2}
  assert questions(splits.train) == [f'a {i}?' for i in range(5)]
  assert questions(splits.valid) == [*(f'b {i}?' for i in range(3)), 'In valid.']
  assert len(splits.test) == 6
  assert splits.report['counts'] == {'train': 5, 'valid': 4, 'test': 6}


def test_signs_and_decimal_points_tell_questions_apart(folder):
  config = folder(files={'train.txt': '7-2*5||#### 1\n1.5||#### 1\n(1+2)*3||#### 1',
                         'valid.txt': '7*2-5||#### 1\n15||#### 1\n1+(2*3)||#### 1',
                         'test.txt': '7+2*5||#### 1'})
  splits = data.load(config, 0)
  assert not any(splits.report['duplicates'].values())
  assert splits.report['counts'] == {'train': 3, 'valid': 3, 'test': 1}


def test_train_that_repeats_test_is_refused(folder):
  config = folder(files={'train.txt': rows('a', 3), 'valid.txt': rows('b', 3),
                         'test.txt': rows('a', 3)})
  with pytest.raises(InputError, match='every train problem is also in another split'):
    data.load(config, 0)


def test_limit_comes_after_carving_and_duplicates(folder):
  files = {'train.txt': rows('a', 20), 'test.txt': rows('a', 3)}
  whole = data.load(folder(files=files), 0)
  short = data.load(folder(files=files, limit=2), 0)
  assert short.report['counts'] == {'train': 2, 'valid': 2, 'test': 2}
  assert short.report['duplicates'] == whole.report['duplicates']
  assert whole.report['duplicates']['train_test'] + whole.report['duplicates'][
      'valid_test'] == 3
  assert short.train == whole.train[:2] and short.test == whole.test[:2]


def test_missing_train_file_lists_what_is_there(folder):
  config = folder(files={'valid.json': '[]', 'test.json': '[]'})
  with pytest.raises(InputError, match='no training file among: test.json, valid.json'):
    data.load(config, 0)
  with pytest.raises(InputError, match='no training file'):
    data.load(dataclasses.replace(config, dir='', test=f'{config.dir}/test.json'), 0)


def test_missing_paths(data_config, tmp_path):
  with pytest.raises(InputError, match='set --config.data.dir='):
    data.load(data_config, 0)
  with pytest.raises(InputError, match='absent: found no such file'):
    data.load(dataclasses.replace(data_config, dir=str(tmp_path / 'absent')), 0)


def test_skipped_rows_are_in_the_report(folder):
  config = folder(files={'train.txt': rows('a', 9) + '\nbroken'}, on_error='skip')
  report = data.load(config, 0).report['sources']['train']
  assert (report['read'], report['skipped']) == (9, 1)
  assert 'train.txt:10: ' in report['first_error']


def test_arithmetic(data_config):
  config = dataclasses.replace(data_config, name='arithmetic', dir='/nowhere')
  splits = data.load(config, 5)
  assert splits.report['counts'] == {'train': 300, 'valid': 100, 'test': 100}
  json.dumps(splits.report)
  for name in ('train', 'valid', 'test'):
    assert {split_of(q) for q in questions(getattr(splits, name))} == {name}
  assert data.load(config, 6).train[0] != splits.train[0]
  short = data.load(dataclasses.replace(config, limit=7), 5)
  assert list(short.test) == splits.test[:7]
  marked = data.load(dataclasses.replace(config, step_marks=True), 5)
  assert marked.train[0].steps[0] == f'<<{splits.train[0].steps[0]}>>'


def test_graphs(data_config):
  config = dataclasses.replace(data_config, name='graphs', limit=7)
  splits = data.load(config, 5)
  assert splits.report['counts'] == {'train': 7, 'valid': 7, 'test': 7}
  assert splits.train[0].question.split()[-6] == 'Is'
  assert splits.report['rules']['test'] == 'text'
  assert len({splits.train[0], splits.valid[0], splits.test[0]}) == 3


def test_load_set_is_one_file_as_it_is(folder, tmp_path):
  config = folder(files={'more.txt': 'q||#### 1\nq||#### 1'}, limit=1)
  examples, report = data.load_set(str(tmp_path / 'more.txt'), config)
  assert len(examples) == 2 == report['read']


def test_a_set_of_a_generated_task(data_config):
  """Other problems than the run's, of no training split; the same for the same seed."""
  config = dataclasses.replace(data_config, name='arithmetic')
  entry = 'min_steps=6,max_steps=7,test_size=20'
  longer, report = data.load_set(entry, config, 1)
  assert len(longer) == 20 and {len(e.steps) for e in longer} == {6, 7}
  assert report['rule'] == data.load(config, 1).report['rules']['test']
  assert list(longer) == list(data.load_set(entry, config, 1)[0])
  own = data.load_set(f'max_steps={config.arithmetic.max_steps}', config, 1)[0]
  assert list(own) == list(data.load(config, 1).test)


@pytest.mark.parametrize('name, entry, match', [
    ('arithmetic', 'max_stepz=5', 'config.data.arithmetic.max_stepz is unknown.*max_steps'),
    ('arithmetic', 'max_steps=many', 'max_steps.*many'),
    ('arithmetic', 'min_steps=9', 'below min_steps 9'),
    ('arithmetic', 'max_steps=', 'max_steps'),
    ('files', 'max_steps=9', "config.data.name is 'files', expected one of")])
def test_a_set_of_a_task_that_cannot_be(data_config, name, entry, match):
  with pytest.raises(InputError, match=match):
    data.load_set(entry, dataclasses.replace(data_config, name=name))


def test_a_set_that_is_neither_file_nor_name(data_config):
  with pytest.raises(InputError, match="has 'gsm8'; expected the path.*did you mean 'gsm8k'"):
    data.load_set('gsm8', data_config)
  with pytest.raises(InputError, match='gsm8.jsonl: found no such file'):
    data.load_set('gsm8.jsonl', data_config)


def test_problems_of_many_steps_are_left_out(folder):
  """Of every split, and counted; a split of which nothing is left is an error."""
  def lines(*steps):
    return ''.join(json.dumps({'question': f'{i} and {n}?', 'steps': ['1+1=2'] * n,
                               'answer': '2'}) + '\n' for i, n in enumerate(steps))
  files = {'train.jsonl': lines(1, 3, 2, 4), 'valid.jsonl': lines(2, 5), 'test.jsonl': lines(3)}
  splits = data.load(folder(files=files, max_steps=3), 0)
  assert [[len(e.steps) for e in s] for s in (splits.train, splits.valid, splits.test)] == [
      [1, 3, 2], [2], [3]]
  assert splits.report['left_out'] == {'train': 1, 'valid': 1, 'test': 0}
  assert splits.report['counts'] == {'train': 3, 'valid': 1, 'test': 1}
  with pytest.raises(InputError, match='max_steps is 1, and each of the 2 valid problems'):
    data.load(folder(files=files, max_steps=1), 0)


def test_rules_are_told_by_split(folder):
  config = folder(files={
      'train.json': '[{"question": "q", "steps": [], "answer": "yes"},'
                    ' {"question": "r", "steps": [], "answer": "no"},'
                    ' {"question": "s", "steps": [], "answer": "no"}]',
      'test.txt': rows('a', 2)}, valid_size=1)
  assert data.load(config, 0).report['rules'] == {
      'train': 'text', 'valid': 'text', 'test': 'numeric'}


def test_published_gsm8k_takes_its_own_test_and_carves_valid(shared_data, data_config):
  config = dataclasses.replace(data_config, name='gsm8k', dir=str(shared_data / 'gsm8k'),
                               valid_size=500)
  splits = data.load(config, 0)
  assert splits.report['counts'] == {'train': 6973, 'valid': 500, 'test': 1319}
  assert splits.report['carved'] == {'valid': 500}
  assert splits.report['sources']['test']['path'].endswith('gsm8k/test.jsonl')
  assert splits.test[0].question.startswith('Janet’s ducks lay 16 eggs')


def test_published_prosqa_lacks_train(shared_data, data_config):
  config = dataclasses.replace(data_config, dir=str(shared_data / 'prosqa'))
  with pytest.raises(InputError, match='no training file among: test.json, valid.json'):
    data.load(config, 0)
