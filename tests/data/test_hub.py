"""Hub data through a stand-in for the library `datasets`: no network here."""

import dataclasses
import sys
import types

import pytest

from latent_reasoning import data
from latent_reasoning.data import formats, hub
from latent_reasoning.data.example import Example
from latent_reasoning.errors import InputError

CALLS = []


@pytest.fixture
def stand_in(monkeypatch):
  """Installs a library whose `load_dataset` returns, or raises, what it is given."""
  def install(result):
    def load_dataset(*args, **kwargs):
      CALLS.append((args, kwargs))
      if isinstance(result, Exception):
        raise result
      return result
    module = types.ModuleType('datasets')
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, 'datasets', module)
  CALLS.clear()
  return install


def test_gsm8k_rows_go_through_the_conversion_of_files(stand_in, data_config):
  stand_in({'train': [{'question': f'q{i}', 'answer': 'so <<1+1=2>>2\n#### 2'}
                      for i in range(5)],
            'test': [{'question': 't', 'answer': '#### 1,000'}]})
  config = dataclasses.replace(data_config, name='gsm8k', cache_dir='/cache')
  found = hub.read(config)
  assert CALLS == [(('openai/gsm8k', 'main'), {'cache_dir': '/cache'})]
  assert found['train'][0][1] == Example('q1', ('1+1=2',), '2')
  assert found['test'] == ([Example('t', (), '1000')], {
      'path': 'openai/gsm8k test', 'form': 'hub', 'rule': 'numeric', 'read': 1,
      'skipped': 0, 'first_error': ''})
  splits = data.load(config, 0)
  assert splits.report['carved'] == {'valid': 2}
  assert splits.report['counts'] == {'train': 3, 'valid': 2, 'test': 1}


@pytest.mark.parametrize('column, trace', [
    ('steps', ['<<1+1=2>>', '<<2*3=6>>']), ('steps', '<<1+1=2>> <<2*3=6>>'),
    ('cot', '<<1+1=2>> <<2*3=6>>'), ('cot', '<<1+1=2>><<2*3=6>>'),
    ('cot', '1+1=2\n2*3=6'), ('cot', ['1+1=2', '2*3=6'])])
def test_gsm8k_aug_has_steps_or_cot(stand_in, data_config, column, trace):
  row = {'question': 'q', column: trace, 'answer': '6'}
  stand_in({'train': [row], 'validation': [row], 'test': [row]})
  config = dataclasses.replace(data_config, name='gsm8k_aug', step_marks=True)
  found = hub.read(config)
  assert CALLS == [(('whynlp/gsm8k-aug', None), {'cache_dir': None})]
  assert sorted(found) == ['test', 'train', 'valid']
  for examples, _ in found.values():
    assert examples == [Example('q', ('<<1+1=2>>', '<<2*3=6>>'), '6')]


def test_a_malformed_row_is_told_by_number_or_counted(stand_in, data_config):
  stand_in({'train': [{'question': 'q', 'answer': '#### 1'}, {'question': 'q'}]})
  config = dataclasses.replace(data_config, name='gsm8k')
  with pytest.raises(InputError, match='^openai/gsm8k train row 1: found no field'):
    hub.read(config)
  _, report = hub.read(dataclasses.replace(config, on_error='skip'))['train']
  assert (report['read'], report['skipped']) == (1, 1)


def test_a_missing_library_names_the_extra(monkeypatch, data_config):
  monkeypatch.setitem(sys.modules, 'datasets', None)  # makes `import` fail
  with pytest.raises(InputError, match=r"pip install -e '.\[hf\]'"):
    hub.read(dataclasses.replace(data_config, name='gsm8k'))


@pytest.mark.parametrize('error', [
    ConnectionError('no route'), OSError('offline mode'),
    ValueError("Couldn't find cache"), RuntimeError('client has been closed')])
def test_no_connection_names_three_ways_out(stand_in, data_config, error):
  stand_in(error)
  with pytest.raises(InputError) as raised:
    data.load(dataclasses.replace(data_config, name='gsm8k_aug'), 0)
  message = str(raised.value)
  for part in ('whynlp/gsm8k-aug', str(error), '1. ', '--config.data.dir=', '2. ',
               '--config.data.cache_dir=', '3. ', 'configs/rim_arithmetic.py'):
    assert part in message
  assert raised.value.__cause__ is error


def test_a_data_set_without_a_known_train_split_is_refused(stand_in, data_config):
  stand_in({'test': [{'question': 'q', 'answer': '#### 1'}]})
  with pytest.raises(InputError, match=r"found the splits \['test'\]; expected a train"):
    data.load(dataclasses.replace(data_config, name='gsm8k'), 0)


def test_a_set_by_name_is_one_split_in_its_form(stand_in, data_config):
  stand_in({'test': [{'Body': 'A has 2', 'Question': 'And 3 more?', 'Answer': '5.0'}],
            'train': [{'Body': 'x', 'Question': 'y', 'Answer': '1'}]})
  examples, report = data.load_set('svamp', data_config)
  assert CALLS == [(('ChilleD/SVAMP', None), {'cache_dir': None})]
  assert examples == [Example('A has 2. And 3 more?', (), '5')]
  assert (report['form'], report['rule'], report['path']) == (
      'svamp', 'numeric', 'ChilleD/SVAMP test')


def test_prosqa_is_read_from_its_repository(stand_in, data_config):
  row = {'question': 'q', 'steps': ['A is b.'], 'answer': 'A is b.'}
  stand_in({'test': [row]})
  examples, report = data.load_set('prosqa', data_config)
  (reader, _), options = CALLS[0]
  assert reader == 'json' and options['data_files']['test'].endswith('/prosqa_test.json')
  assert examples[0].answer == 'A is b.' and report['rule'] == 'text'


@pytest.mark.parametrize('name', hub.SETS)
def test_sets_have_a_form_and_a_known_split(name):
  found = hub.SETS[name]
  assert found.form in formats.FORMS and found.split in hub.SPLITS


def test_a_set_without_the_library_or_with_other_splits(stand_in, monkeypatch, data_config):
  stand_in({'other': []})
  with pytest.raises(InputError, match="MATH-500 has the splits .*expected 'test'"):
    data.load_set('math500', data_config)
  monkeypatch.setitem(sys.modules, 'datasets', None)
  with pytest.raises(InputError, match=r"\.\[hf\].*config.eval.sets"):
    data.load_set('gpqa', data_config)
