"""Large data sets kept on disk: the same problems, tokens and batches as from their files."""

import dataclasses
import hashlib
import json

import jax
import numpy as np
import pytest

from latent_reasoning import data, methods, sequences
from latent_reasoning.data import example, formats, hub, stored, tokenizers
from latent_reasoning.train import batches, curriculum


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.setattr(stored, 'LARGE', 1)
  monkeypatch.setattr(stored, 'CHUNK', 4)  # the last one is not full
  return tmp_path / 'cache/latent_reasoning/problems'


@pytest.fixture
def config(tmp_path, data_config):
  """Fifteen problems of one to three steps, one of them twice, in three files."""
  folder = tmp_path / 'files'
  folder.mkdir()
  def lines(name, count):
    return ''.join(json.dumps({
        'question': f'{name} “{i}”\u2028of {i % 14}?', 'steps': [f'{i}+{k}={i + k}' for k in
                                                              range(1 + i % 3)],
        'answer': str(i)}, ensure_ascii=False) + '\n' for i in range(count))
  (folder / 'train.jsonl').write_text(lines('a', 15) + lines('c', 1), encoding='utf-8')
  (folder / 'valid.jsonl').write_text(lines('b', 3), encoding='utf-8')
  (folder / 'test.jsonl').write_text(lines('c', 4), encoding='utf-8')
  return dataclasses.replace(data_config, dir=str(folder))


@pytest.fixture
def read(monkeypatch):
  """Names of the files that were read."""
  seen, real = [], formats.read
  monkeypatch.setattr(formats, 'read', lambda path, config: (
      seen.append(path.stem), real(path, config))[1])
  return seen


@pytest.fixture
def plainly(config, monkeypatch):
  """The splits as they are without what is kept."""
  with monkeypatch.context() as other:
    other.setattr(stored, 'LARGE', 1 << 40)
    found = data.load(config, 0)
  assert isinstance(found.train, list)
  return found


def test_the_same_problems(config, plainly, read):
  """Read once; from then on looked up."""
  first = data.load(config, 0)
  assert sorted(read) == ['test', 'train', 'valid']
  second = data.load(config, 0)
  assert len(read) == 3
  for found in (first, second):
    assert isinstance(found.train, stored.Stored)
    assert [*found.train] == plainly.train and found.report == plainly.report
    assert (found.valid, found.test) == (plainly.valid, plainly.test)
    assert found.train[-2] == plainly.train[-2] and found.train[2:5] == plainly.train[2:5]
    assert found.train.fingerprint() == hashlib.blake2b(
        repr(plainly.train).encode(), digest_size=16).hexdigest()
    some = found.train.subset([3, 1, -1])
    assert [*some] == [plainly.train[i] for i in (3, 1, -1)]
    assert [*some.subset([1])] == [plainly.train[1]] and len(some) == 3
    with pytest.raises(IndexError):
      found.train[len(plainly.train)]


@pytest.mark.parametrize('change', ['file', 'key', 'seed', 'code'])
def test_what_changes_is_read_again(config, read, monkeypatch, change):
  data.load(config, 0)
  seed = 0
  if change == 'file':
    path = f'{config.dir}/valid.jsonl'
    with open(path, 'a') as file:
      file.write('{"question": "d?", "steps": [], "answer": "5"}\n')
  elif change == 'key':
    config = dataclasses.replace(config, max_steps=3)
  elif change == 'seed':
    seed = 1
  else:
    monkeypatch.setattr(stored, '_code', lambda: 'of another version')
  found = data.load(config, seed)
  assert len(read) == 6
  assert len(found.valid) == 3 + (change == 'file')
  data.load(dataclasses.replace(config, sort_window=7), seed)  # another order of the same
  assert len(read) == 6


def test_of_the_hub(monkeypatch, data_config, tmp_path):
  """By what the library says of the version of its rows."""
  class Rows(list):
    _fingerprint = 'one'
  rows = Rows({'question': f'q {i}?', 'answer': f'<<1+{i}={i + 1}>> #### {i + 1}'}
              for i in range(12))
  monkeypatch.setattr(hub, 'ask', lambda *args, **options: {'train': rows, 'test': rows[:2]})
  config = dataclasses.replace(data_config, name='gsm8k')
  assert isinstance(data.load(config, 0).train, list)  # no version of the test rows is said
  monkeypatch.setattr(hub, 'ask', lambda *args, **options: {'train': rows})
  first = data.load(config, 0)
  monkeypatch.setattr(formats, 'collect', None)
  again = data.load(config, 0)
  assert [*again.train] == [*first.train] and again.test == first.test
  Rows._fingerprint = 'another'
  with pytest.raises(TypeError):
    data.load(config, 0)


def test_a_disk_that_does_not_let_it(config, plainly, tmp_path, capsys):
  """Goes on without, and says it."""
  (tmp_path / 'cache').mkdir()
  (tmp_path / 'cache/latent_reasoning').write_text('a file')
  found = data.load(config, 0)
  assert found.train == plainly.train
  assert 'cannot be written' in capsys.readouterr().err


def test_cut_off(config, cache, plainly, monkeypatch):
  """What was not written whole is not there."""
  monkeypatch.setattr(json, 'dumps', lambda *args, **kwargs: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    data.load(config, 0)
  assert not list(cache.iterdir())
  monkeypatch.undo()
  assert [*data.load(config, 0).train] == plainly.train


@pytest.fixture
def tokenizer(tiny_config, tmp_path, plainly):
  return tokenizers.build(tiny_config().tokenizer, lambda: batches.texts(plainly.train),
                          tmp_path / 'tokenizer.json', 3)


def test_tokens(config, cache, plainly, tokenizer):
  """Those of each problem, made once for a tokenizer."""
  train = data.load(config, 0).train
  assert not train.has_tokens
  for found in (train.tokenized(tokenizer), data.load(config, 0).train.tokenized(tokenizer)):
    expected = sequences.encode(plainly.train, tokenizer)
    assert [sequences.TokenizedExample(*found.pieces(i))
            for i in range(len(found))] == expected
    assert found.lengths() == [[*map(len, (e.question, *e.steps, e.answer))] for e in expected]
    assert found.characters() == [e.characters for e in plainly.train]
    some = found.subset([4, 2])
    assert some.pieces(1) == found.pieces(2) and some[1] == plainly.train[2]
    assert some.lengths()[1] == found.lengths()[2]
    assert some.characters()[0] == plainly.train[4].characters
  assert len(list(cache.glob('*/tokens-*'))) == 1


@pytest.mark.parametrize('method', ['rim', 'cot'])
def test_the_same_batches(config, plainly, tokenizer, tiny_config, method):
  changed = tiny_config(**{'method': method, 'optim.batch_size': 4, 'data.sort_window': 2,
                           'data.too_long': 'drop', 'data.buckets.prefix': (32,),
                           'data.buckets.readout': (24,)})
  def made(train):
    own = methods.get(method)
    kept = batches.fitting(changed, own, train, tokenizer)
    return batches.Batches(changed, own, kept, tokenizer,
                           curriculum.build(changed.optim, len(kept)))
  ours, theirs = made(data.load(config, 0).train.tokenized(tokenizer)), made(plainly.train)
  assert ours.shapes(1) == theirs.shapes(1)
  assert ours.examples[0] == theirs.examples[0] and len(ours.examples) == len(theirs.examples)
  for step in (0, 3, ours.curriculum.total - 1):
    jax.tree.map(np.testing.assert_array_equal, ours.at(step), theirs.at(step))


def test_a_run(config, tiny_config, make_run, tmp_path):
  """Trains from what is kept, and is told apart from other problems."""
  changed = tiny_config(**{'data.name': 'files', 'data.dir': config.dir, 'optim.batch_size': 4,
                           'data.buckets.prefix': (48,), 'rim.max_steps': 3})
  run = make_run(changed, tmp_path / 'run')
  assert run.batches.examples.has_tokens and run.fingerprint.keys() == {
      'train', 'valid', 'test'}
  again = make_run(changed, tmp_path / 'again')
  assert again.fingerprint == run.fingerprint
  with open(f'{config.dir}/train.jsonl', 'a') as file:
    file.write('{"question": "d?", "steps": [], "answer": "5"}\n')
  other = make_run(changed, tmp_path / 'other')
  assert other.fingerprint['train'] != run.fingerprint['train']


def test_an_example_as_json_holds_it():
  one = example.Example('q', ('a', 'b'), '1', ('2',))
  assert example.of(*json.loads(json.dumps(dataclasses.astuple(one)))) == one
