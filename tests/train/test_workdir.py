"""The workdir: one run, one configuration, files that are whole or not there."""

import dataclasses
import json
import os
import pathlib
import shlex

import pytest

from latent_reasoning.errors import InputError
from latent_reasoning.train import workdir
from latent_reasoning.train.workdir import open_workdir


def test_new_folder(tiny_config, tmp_path):
  """A new folder is made, with parents, and holds the whole configuration."""
  config = tiny_config()
  made = open_workdir(tmp_path / 'a' / 'b', config, True)
  assert json.loads(made.config.read_text()) == json.loads(
      json.dumps(dataclasses.asdict(config)))
  assert made.path == tmp_path / 'a' / 'b'


def test_path_is_absolute(tiny_config, tmp_path, monkeypatch):
  """A relative path does not depend on where the process goes later."""
  monkeypatch.chdir(tmp_path)
  made = open_workdir('runs/x', tiny_config(), True)
  assert made.path == tmp_path / 'runs' / 'x'
  for name in ('config', 'metrics', 'checkpoints', 'events', 'tokenizer', 'predictions',
               'results', 'leakage', 'latency'):
    path = getattr(made, name)
    assert path.is_absolute() and path.parent == made.path


def test_commands_are_kept(tiny_config, tmp_path):
  """Each once, as a shell takes it, on a line of its own."""
  made = open_workdir(tmp_path, tiny_config(), True)
  for _ in range(2):
    made.note(['--config=a b.py:1'])
    made.note(['--question=7+2\n"x"'])
  lines = made.commands.read_text().splitlines()
  assert [shlex.split(line) for line in lines] == [
      ['python', '-m', 'latent_reasoning.main', own]
      for own in ('--config=a b.py:1', '--question=7+2 "x"')]


def test_home_is_expanded(tiny_config, tmp_path, monkeypatch):
  """~ means the home folder."""
  monkeypatch.setenv('HOME', str(tmp_path))
  assert open_workdir('~/run', tiny_config(), True).path == tmp_path / 'run'


def test_same_configuration_again(tiny_config, tmp_path):
  """The same configuration opens its folder again, and rewrites nothing."""
  first = open_workdir(tmp_path, tiny_config(), True)
  before = first.config.stat().st_mtime_ns
  assert open_workdir(tmp_path, tiny_config(), True) == first
  assert first.config.stat().st_mtime_ns == before


def begun(config, path):
  """A workdir in which a step was logged."""
  made = open_workdir(path, config, True)
  made.metrics.write_text('')
  return made


def test_another_configuration_is_refused(tiny_config, tmp_path):
  """Every key that differs is named with both values, and no other."""
  begun(tiny_config(), tmp_path)
  other = tiny_config(**{'model.embed_dim': 32, 'seed': 5, 'data.buckets.prefix': (64,)})
  with pytest.raises(InputError) as error:
    open_workdir(tmp_path, other, True)
  text = str(error.value)
  assert 'config.model.embed_dim: 16 -> 32' in text
  assert 'config.seed: 0 -> 5' in text
  assert 'config.data.buckets.prefix: [12, 20] -> [64]' in text
  assert text.count('config.') == 3 and '--workdir' in text


@pytest.mark.parametrize('key, value', [
    ('eval.blocks', 2), ('data.limit', 9), ('data.on_error', 'skip'),
    ('reasoning_decoder.steps', 9)])
def test_what_does_not_train_may_differ(tiny_config, tmp_path, key, value):
  """Such keys may differ in evaluation, where nothing is trained, and not in training."""
  begun(tiny_config(), tmp_path)
  other = tiny_config(**{key: value})
  open_workdir(tmp_path, other, False)
  with pytest.raises(InputError, match=f'config.{key}'):
    open_workdir(tmp_path, other, True)


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('key, value', [
    ('eval.sets', ('a.jsonl',)), ('train.max_to_keep', 9), ('data.test', 'a.jsonl'),
    ('model.attention', 'dense'), ('train.extend', (3,)), ('mesh.fsdp', 2)])
def test_what_changes_no_number_may_differ(tiny_config, tmp_path, training, key, value):
  """Also in training; looking at it changes nothing of the run."""
  made = begun(tiny_config(), tmp_path)
  made.tokenizer.write_text('{}')
  before = made.config.read_bytes()
  open_workdir(tmp_path, tiny_config(**{key: value}), training)
  assert made.config.read_bytes() == before and made.tokenizer.exists()
  assert not made.history.exists()


@pytest.mark.parametrize('first', [False, True])
def test_nothing_binds_before_a_step(tiny_config, tmp_path, first):
  """A look at a new folder, or a training that ended in an error at once, leaves every key
  open; a logged step binds them, of a run or of one of a comparison's."""
  open_workdir(tmp_path, tiny_config(), first).tokenizer.write_text('{}')
  other = tiny_config(**{'eval.blocks': 2, 'optim.batch_size': 2, 'seed': 9})
  made = open_workdir(tmp_path, other, not first)
  assert not made.tokenizer.exists()  # it may be of other data
  assert json.loads(made.config.read_text())['eval']['blocks'] == 2
  begun(other, tmp_path / 'rim-0')
  with pytest.raises(InputError, match='config.seed: 9 -> 0'):
    open_workdir(tmp_path, tiny_config(), True)


@pytest.mark.parametrize('key, value', [
    ('method', 'direct'), ('model.embed_dim', 32), ('rim.blocks', 2), ('seed', 1),
    ('tokenizer.pad_to', 4), ('data.name', 'files')])
def test_what_makes_the_model_may_never_differ(tiny_config, tmp_path, key, value):
  """Evaluation with another method or model is refused."""
  begun(tiny_config(), tmp_path)
  with pytest.raises(InputError, match=f'config.{key}'):
    open_workdir(tmp_path, tiny_config(**{key: value}), False)


def test_key_of_another_version(tiny_config, tmp_path):
  """A key that came later has its default in the runs before; one that is gone, or has
  another value now, is told."""
  made = begun(tiny_config(), tmp_path)
  old = json.loads(made.config.read_text())
  del old['rim']['hold_answer'], old['model']['loop']
  made.config.write_text(json.dumps(old))
  for training in (False, True):
    open_workdir(tmp_path, tiny_config(), training)
    with pytest.raises(InputError, match=r"hold_answer: '\(absent\)' -> True"):
      open_workdir(tmp_path, tiny_config(**{'rim.hold_answer': True}), training)
  old['model']['gone'] = 1
  made.config.write_text(json.dumps(old))
  with pytest.raises(InputError, match=r"config.model.gone: 1 -> '\(absent\)'"):
    open_workdir(tmp_path, tiny_config(), True)


@pytest.mark.parametrize('text', ['', '{"method": ', 'rim', '\udcff', '[]', '3'])
def test_broken_config(tiny_config, tmp_path, text):
  """A config.json that is none is named, and what to do."""
  made = open_workdir(tmp_path, tiny_config(), True)
  made.config.write_bytes(text.encode(errors='surrogateescape'))
  with pytest.raises(InputError, match='config.json'):
    open_workdir(tmp_path, tiny_config(), True)


def test_a_file_is_no_workdir(tiny_config, tmp_path):
  """A path that is a file, or below one, is an input error that names --workdir."""
  file = tmp_path / 'file'
  file.write_text('')
  for path in (file, file / 'run'):
    with pytest.raises(InputError, match='--workdir=DIR'):
      open_workdir(path, tiny_config(), True)
  assert file.read_text() == ''


def test_writes_are_atomic(tmp_path, monkeypatch):
  """A writer that dies half way leaves the old file as it was."""
  path = tmp_path / 'a.json'
  workdir.write_json(path, {'é': 1})
  before = path.read_bytes()
  assert 'é'.encode() in before

  real = pathlib.Path.write_text

  def half(self, text, **kwargs):
    real(self, text[:3], **kwargs)
    raise OSError('disk full')

  monkeypatch.setattr(pathlib.Path, 'write_text', half)
  with pytest.raises(OSError):
    workdir.write_json(path, {'other': 2})
  assert path.read_bytes() == before


def test_reader_never_sees_half_a_file(tmp_path, monkeypatch):
  """The name is given to the file only when all of it is there."""
  path, seen = tmp_path / 'a.txt', []
  real = os.replace

  def replace(source, target):
    assert pathlib.Path(source).parent == tmp_path  # else not atomic: another disk
    seen.append((pathlib.Path(source).read_text(), path.exists()))
    real(source, target)

  monkeypatch.setattr(os, 'replace', replace)
  workdir.write_text(path, 'whole')
  assert seen == [('whole', False)]
  assert [p.name for p in tmp_path.iterdir()] == ['a.txt']
