"""Of several processes one asks the hub: its libraries are stand-ins that count."""

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
import types

import pytest

from latent_reasoning.data import hub, text
from latent_reasoning.errors import InputError
from latent_reasoning.parallel import multihost

# A library of one repository; its cache is a folder, and each question to the hub is a line.
LIBRARY = '''
import os, pathlib
ROOT = pathlib.Path(os.environ['HUB'])
def ask(what):
  with open(ROOT / 'asked', 'a') as file:
    file.write(f"{os.environ['HF_HOME']} {what}\\n")
def snapshot_download(name, *, revision=None, local_files_only=False, **_):
  place = pathlib.Path(os.environ['HF_HOME']) / 'snapshots' / (revision or 'c0ffee')
  if local_files_only:
    if not place.is_dir():
      raise FileNotFoundError(name)
    return str(place)
  ask(f'weights {revision}')
  place.mkdir(parents=True, exist_ok=True)
  for file in ('config.json', 'model.safetensors'):
    (place / file).write_text('whole')
  return str(place)
def load_dataset(name, *_, **__):
  ask('data')
  return {'train': [{'question': f'q{i}', 'answer': '#### 1'} for i in range(9)]}
'''
PROGRAM = '''
import dataclasses, json, sys
from latent_reasoning.config import DataConfig
from latent_reasoning.data import hub, splits
from latent_reasoning.hf import load
from latent_reasoning.parallel import multihost
address, count, index = sys.argv[1:4]
multihost.start(address, int(count), int(index), False, 100)
config = DataConfig(**json.loads(sys.argv[4]))
def weights():
  return load.directory('org/model')
def data():
  return splits.load(config, 0).train
place = multihost.primary_first(weights, hub.shared)
train = multihost.primary_first(data, hub.shared)
assert load.directory('org/model') == place  # whoever needs it later asks nobody
print(json.dumps([str(place), [e.question for e in train]]))
multihost.finish(0)
'''


@pytest.mark.integration
@pytest.mark.parametrize('hosts', [('a', 'a'), ('a', 'b'), ('a', 'b', 'b')])
def test_the_hub_is_asked_by_one_process(tmp_path, data_config, hosts):
  """Of data once in all; of weights once a machine, where nothing is shared. A machine's old
  cache is not taken for the commit that the first process has."""
  for name in ('huggingface_hub', 'datasets'):
    (tmp_path / 'lib').mkdir(exist_ok=True)
    (tmp_path / f'lib/{name}.py').write_text(LIBRARY)
  (tmp_path / 'b/snapshots/0dd').mkdir(parents=True)
  (tmp_path / 'b/snapshots/c0ffee').mkdir()  # cut off while it was downloaded
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  config = json.dumps(dataclasses.asdict(dataclasses.replace(
      data_config, name='gsm8k', arithmetic=None, graphs=None, buckets=None)))
  path = os.pathsep.join([str(tmp_path / 'lib'), os.environ.get('PYTHONPATH', '')])
  started = [subprocess.Popen(
      [sys.executable, '-c', PROGRAM, f'127.0.0.1:{port}', str(len(hosts)), str(i), config],
      env={**os.environ, 'PYTHONPATH': path, 'HUB': str(tmp_path), 'JAX_PLATFORMS': 'cpu',
           'HF_HOME': str(tmp_path / host), 'TMPDIR': str(tmp_path / 'lib')},
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
      for i, host in enumerate(hosts)]
  ended = [process.communicate(timeout=300) for process in started]
  assert [p.returncode for p in started] == [0] * len(hosts), ended
  found = [json.loads(out.splitlines()[-1]) for out, _ in ended]
  places = [str(tmp_path / host / 'snapshots/c0ffee') for host in hosts]
  assert [place for place, _ in found] == places
  assert all(questions == found[0][1] != [] for _, questions in found)
  asked = (tmp_path / 'asked').read_text().splitlines()
  expected = [f'{tmp_path}/a weights None', f'{tmp_path}/a data']
  expected += [f'{tmp_path}/b weights c0ffee'] * ('b' in hosts)
  assert sorted(asked) == sorted(expected)


@pytest.fixture(name='asked')
def stand_ins(monkeypatch, tmp_path):
  """Both libraries in this process, and what they were asked."""
  asked = []
  def snapshot_download(name, **options):
    asked.append((name, options.get('revision'), options.get('local_files_only', False)))
    place = tmp_path / 'snapshots' / (options.get('revision') or 'c0ffee')
    if options.get('local_files_only') and not place.is_dir():
      raise FileNotFoundError(name)
    place.mkdir(parents=True, exist_ok=True)
    (place / 'config.json').write_text('{}')
    return str(place)
  def load_dataset(name, *_, **options):
    asked.append((name, options.get('streaming', False)))
    return {'train': ({'text': 'x' * 9} for _ in range(9))}
  monkeypatch.setitem(sys.modules, 'huggingface_hub',
                      types.SimpleNamespace(snapshot_download=snapshot_download))
  monkeypatch.setitem(sys.modules, 'datasets', types.SimpleNamespace(load_dataset=load_dataset))
  monkeypatch.setattr(hub, '_snapshots', {})
  return asked


def test_one_process_asks_once(asked, tmp_path):
  """For weights that are looked at many times; again where the cache is gone."""
  places = {hub.snapshot('org/model') for _ in range(5)}
  assert places == {tmp_path / 'snapshots/c0ffee'} and len(asked) == 1
  (tmp_path / 'snapshots/c0ffee/config.json').unlink()
  (tmp_path / 'snapshots/c0ffee').rmdir()
  assert hub.snapshot('org/model').is_dir() and len(asked) == 2


def told(monkeypatch, ask):
  """What a process that is not the first gets after the first has asked."""
  def in_process(index, values):
    monkeypatch.setattr(multihost, '_place', [index, 2])
    sent = []
    def broadcast(value):
      if isinstance(value, dict):
        sent.append(json.loads(json.dumps(value)))
        return values if index else value
      return value
    monkeypatch.setattr(multihost, 'broadcast', broadcast)
    return multihost.primary_first(ask, hub.shared), sent[-1]
  first, sent = in_process(0, None)
  hub._snapshots.clear()
  return first, in_process(1, sent)[0]


def test_streamed_text_goes_to_the_others(asked, data_config, monkeypatch):
  """As much of it as is read, not the whole data set; with nothing asked by them."""
  monkeypatch.setitem(text.REPOSITORIES, 'c4', ('allenai/c4', 'en', 30))
  config = dataclasses.replace(data_config, name='c4')
  first, second = told(monkeypatch, lambda: text.load(config))
  assert first == second and asked == [('allenai/c4', True)]
  assert hub.shared.values is None and hub.shared.first


def test_the_others_take_the_commit_of_the_first(asked, monkeypatch):
  first, second = told(monkeypatch, lambda: hub.snapshot('org/model'))
  assert first == second
  assert asked == [('org/model', None, False), ('org/model', 'c0ffee', True)]


def test_a_run_asks_through_the_first(monkeypatch, tmp_path, tiny_config):
  """For its weights, and for its data."""
  from latent_reasoning import experiment
  made = []
  def primary_first(make, shared=None):
    found = make()
    made.append((type(found).__name__, shared))
    return found
  monkeypatch.setattr(multihost, 'primary_first', primary_first)
  experiment.open_run(tiny_config(), tmp_path / 'run')
  assert made == [('Config', hub.shared), ('Workdir', None), ('Experiment', hub.shared)]


def test_a_failure_leaves_nothing_behind(monkeypatch):
  """The next question is asked anew."""
  monkeypatch.setattr(multihost, '_place', [0, 2])
  monkeypatch.setattr(multihost, 'broadcast', lambda value: value)
  def fail():
    raise InputError('no route')
  with pytest.raises(InputError, match='no route'):
    multihost.primary_first(fail, hub.shared)
  assert hub.shared.values is None and hub.shared.first
  assert isinstance(hub.ask_once('x', lambda: pathlib.Path('y')), pathlib.Path)
