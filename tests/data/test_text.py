"""Plain text: files, splits, hub data sets."""

import dataclasses
import sys
import types

import pytest

from latent_reasoning.data import text
from latent_reasoning.errors import InputError


@pytest.fixture
def config(data_config):
  return dataclasses.replace(data_config, name='text')


def test_file(config, tmp_path):
  """The first nine tenths train, the rest validates, nothing is lost."""
  file = tmp_path / 'a.txt'
  file.write_text('0123456789' * 3)
  found = text.load(dataclasses.replace(config, path=str(file)))
  assert found.train == '0123456789' * 2 + '0123456'
  assert found.train + found.valid == '0123456789' * 3
  assert found.report['counts'] == {'train': 27, 'valid': 3}


def test_a_file_is_called_by_its_own_name(config, tmp_path):
  """Whatever data set the configuration would have taken without it."""
  file = tmp_path / 'novel.txt'
  file.write_text('to be or not to be')
  for name in ('text', 'shakespeare', 'c4'):
    own = dataclasses.replace(config, name=name, path=str(file))
    assert text.load(own).report['name'] == text.name_of(own) == 'novel.txt'
  assert text.name_of(dataclasses.replace(config, name='c4')) == 'c4'


def test_shakespeare(config, shared_data):
  """The public file splits as nanoGPT splits it."""
  path = shared_data / 'tinyshakespeare/input.txt'
  found = text.load(dataclasses.replace(config, path=str(path)))
  assert (len(found.train), len(found.valid)) == (1_003_854, 111_540)


@pytest.mark.parametrize('content, message', [
    (b'\xff\xfe', 'byte 0 is not UTF-8'), (b'', 'characters; expected a longer text'),
    (b'ab', 'characters; expected a longer text')])
def test_no_text(config, tmp_path, content, message):
  """Bytes that are no text, and too little of it."""
  file = tmp_path / 'a.txt'
  file.write_bytes(content)
  with pytest.raises(InputError, match=message):
    text.load(dataclasses.replace(config, path=str(file)))


def test_no_file(config, tmp_path):
  """A path that is none, a folder, and none at all."""
  for path in (tmp_path / 'none.txt', tmp_path):
    with pytest.raises(InputError, match='cannot be read'):
      text.load(dataclasses.replace(config, path=str(path)))
  with pytest.raises(InputError, match='config.data.path is empty'):
    text.load(config)


def test_hub(config, monkeypatch):
  """A name loads from the hub, its own validation split kept; C4 is streamed in part."""
  asked = []
  def load_dataset(repository, name, **options):
    asked.append((repository, options.get('streaming', False)))
    return {'train': ({'text': 'x' * 15} for _ in range(9)),
            'validation': [{'text': 'yes'}, {'text': 'no'}]}
  monkeypatch.setitem(sys.modules, 'datasets', types.SimpleNamespace(
      load_dataset=load_dataset))
  monkeypatch.setitem(text.REPOSITORIES, 'c4', ('allenai/c4', 'en', 30))
  found = text.load(dataclasses.replace(config, name='c4'))
  assert len(found.train) == 31 and found.valid == 'yes\nno'
  assert asked == [('allenai/c4', True)]


def test_hub_without_library(config, monkeypatch):
  """The error names the extra and the way around it."""
  monkeypatch.setitem(sys.modules, 'datasets', None)
  with pytest.raises(InputError, match=r"\.\[hf\].*--config.data.path=FILE"):
    text.load(dataclasses.replace(config, name='shakespeare'))
