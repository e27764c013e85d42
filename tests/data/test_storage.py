"""Files at addresses: copied once, anew when they change, and read as those here are."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import fsspec
import jax
import jax.numpy as jnp
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from jax.experimental.compilation_cache import compilation_cache

from latent_reasoning import experiment
from latent_reasoning.data import formats, splits, storage, text, tokenizer_files
from latent_reasoning.errors import InputError
from latent_reasoning.hf import load as pretrained

ROWS = [{'question': f'{n} and 1?', 'steps': [f'{n}+1={n + 1}'], 'answer': f'{n + 1}'}
        for n in range(8)]


def lines(rows):
  return '\n'.join(map(json.dumps, rows))


@pytest.fixture(params=['memory', 'file'])
def bucket(request, tmp_path, monkeypatch):
  """Writes files: bucket(name, text) returns the address; `bucket.fetched` are copied ones."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  kind = {'memory': MemoryFileSystem, 'file': LocalFileSystem}[request.param]
  root = f'memory://{tmp_path.name}' if request.param == 'memory' else f'file://{tmp_path}/far'
  fetched, get = [], kind.get_file

  def counted(self, path, *args, **options):
    fetched.append(path.rpartition('/')[2])
    return get(self, path, *args, **options)
  monkeypatch.setattr(kind, 'get_file', counted)

  def write(name, content=None):
    address = f'{root}/{name}'
    if content is not None:
      files, path = fsspec.url_to_fs(address)
      files.makedirs(path.rpartition('/')[0], exist_ok=True)
      files.pipe_file(path, content.encode() if isinstance(content, str) else content)
    return address.rstrip('/')
  write.fetched = fetched
  return write


def test_a_file_is_copied_once_and_anew_when_it_changes(bucket):
  address = bucket('d/a.txt', 'one')
  first = storage.fetch(address, 'key')
  assert first.read_text() == 'one' and first.name == 'a.txt'
  assert storage.fetch(address, 'key') == first and bucket.fetched == ['a.txt']
  bucket('d/a.txt', 'two')  # as long, in the same second
  second = storage.fetch(address, 'key')
  assert second.read_text() == 'two' and first.read_text() == 'one'
  assert bucket.fetched == ['a.txt'] * 2


def test_a_folder_has_what_is_wanted(bucket):
  for name in ('config.json', 'a.safetensors', 'optimizer.pt', 'deep/b.safetensors'):
    bucket(f'm/{name}', name)
  folder = storage.fetch(bucket('m/'), 'key', ('*.safetensors', 'config.json'))
  assert sorted(p.name for p in folder.iterdir()) == ['a.safetensors', 'config.json']
  assert sorted(storage.names(bucket('m/'), 'key')) == [
      'a.safetensors', 'config.json', 'optimizer.pt']
  assert storage.names(bucket('m/config.json'), 'key') is None
  bucket('m/a.safetensors', 'other weights')
  again = storage.fetch(bucket('m/'), 'key', ('*.safetensors', 'config.json'))
  assert (again / 'a.safetensors').read_text() == 'other weights'


def test_two_addresses_are_two_copies(bucket):
  one, two = bucket('x/train.txt', 'same'), bucket('y/train.txt', 'same')
  assert storage.fetch(one, 'key') != storage.fetch(two, 'key')


def test_a_copy_is_whole_or_not_there(bucket, monkeypatch, tmp_path):
  """A fetch that breaks off leaves nothing that a later one could take for the file."""
  address = bucket('d/a.txt', 'abc')
  kind = type(fsspec.url_to_fs(address)[0])
  real = kind.get_file
  for raised, message in ((None, '1 bytes of 3'), (OSError('reset'), 'OSError: reset')):
    def broken(self, path, here, *args, error=raised, **options):
      pathlib.Path(here).write_text('a')
      if error:
        raise error
    monkeypatch.setattr(kind, 'get_file', broken)
    with pytest.raises(InputError, match=message):
      storage.fetch(address, 'key')
    monkeypatch.setattr(kind, 'get_file', real)
  assert not [p for p in (tmp_path / 'cache').rglob('*') if p.is_file() and p.name != '.lock']
  assert storage.fetch(address, 'key').read_text() == 'abc'


@pytest.mark.parametrize('name', ['..', '.', 'a\0b', '../x'])
def test_a_name_cannot_lead_out_of_the_copy(bucket, monkeypatch, name, tmp_path):
  """What a storage lists is not trusted: an object may be called anything."""
  bucket('m/config.json', '{}')
  address = bucket('m/')

  class Hostile(type(fsspec.url_to_fs(address)[0])):
    def ls(self, path, detail=True, **_):
      return [{'name': f'{path}/x\\..\\{name}' if name == '../x' else f'{path}/d//{name}',
               'type': 'file', 'size': 1}]

    def get_file(self, path, here, *args, **options):
      pathlib.Path(here).write_text('x')
  real = storage._open
  monkeypatch.setattr(storage, '_open', lambda a: (Hostile(), real(a)[1]))
  if name == '../x':  # a name with backslashes is one name here
    storage.fetch(address, 'key', ('*',))
  else:
    with pytest.raises(InputError, match='expected the name of a file'):
      storage.fetch(address, 'key', ('*',))
  assert all((tmp_path / 'cache') in p.resolve().parents for p in tmp_path.rglob('x*'))


@pytest.mark.parametrize('address, message', [
    ('memory://nothing/here', 'nothing is found'), ('file:///nothing/here', 'nothing is found'),
    ('gs://b/x', r"pip install -e '\.\[gcs\]'"), ('s3://b/x', r"pip install -e '\.\[s3\]'"),
    ('nosuch://b/x', 'no kind of address')])
def test_what_cannot_be_had_is_one_line(address, message, monkeypatch):
  """A missing object, library, or kind of storage; the key is named."""
  for library in ('gcsfs', 's3fs'):
    monkeypatch.setitem(sys.modules, library, None)
  for ask in (storage.fetch, storage.names):
    with pytest.raises(InputError, match=message) as error:
      ask(address, 'config.data.dir')
    assert '\n' not in str(error.value) and 'config.data.dir' in str(error.value)


def test_no_rights_and_no_network(bucket, monkeypatch):
  """Libraries raise kinds of their own; each ends in one line."""
  address = bucket('a.txt', 'x')

  class HttpError(Exception):
    pass
  for raised in (PermissionError('403'), HttpError('401,\n no login'), OSError('DNS')):
    def refuse(*_, error=raised, **__):
      raise error
    monkeypatch.setattr(MemoryFileSystem, 'info', refuse)
    monkeypatch.setattr(LocalFileSystem, 'info', refuse)
    with pytest.raises(InputError, match='could not be used') as error:
      storage.fetch(address, 'config.data.train')
    assert '\n' not in str(error.value) and type(raised).__name__ in str(error.value)


def test_no_room_for_a_copy(bucket, monkeypatch, tmp_path):
  (tmp_path / 'cache').write_text('a file, where the folder should be')
  with pytest.raises(InputError, match='XDG_CACHE_HOME'):
    storage.fetch(bucket('a.txt', 'x'), 'key')


def test_a_path_is_itself(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  assert storage.fetch('~/a', 'key') == tmp_path / 'a' == storage.fetch(tmp_path / 'a', 'key')
  assert storage.inside('gs://b/d/', 'x') == 'gs://b/d/x'
  assert storage.inside(tmp_path, 'x') == tmp_path / 'x'


def test_data_files(bucket, data_config):
  """A file by address, and what its report and its errors call it."""
  address = bucket('d/train.jsonl', lines(ROWS))
  examples, report = formats.read(address, data_config)
  assert len(examples) == 8 and report['path'] == address
  with pytest.raises(InputError, match=f'{address}2.*nothing is found'):
    formats.read(f'{address}2', data_config)
  with pytest.raises(InputError, match=f'{bucket("d/empty", " ")}: found an empty file'):
    formats.read(bucket('d/empty', ' '), data_config)
  with pytest.raises(InputError, match='found a directory'):
    formats.read(bucket('d/'), data_config)


def test_a_folder_of_splits(bucket, data_config):
  """Found by their stems, and only what is needed is copied; a set for evaluation too."""
  for name, rows in {'train.jsonl': ROWS[:6], 'my_test.jsonl': ROWS[7:], '.hidden': [],
                     'test.jsonl': ROWS[6:7], 'notes.md': [], 'big.tar': []}.items():
    bucket(f'd/{name}', lines(rows))
  found = splits.load(dataclasses.replace(data_config, dir=bucket('d/')), 0)
  assert (len(found.train), len(found.test)) == (4, 1)
  assert sorted(bucket.fetched) == ['test.jsonl', 'train.jsonl']
  assert len(splits.load_set(bucket('d/my_test.jsonl', lines(ROWS[7:])), data_config)[0]) == 1
  alone = dataclasses.replace(data_config, train=bucket('d/train.jsonl', lines(ROWS)))
  assert len(splits.load(alone, 0).train) == 4
  bucket('two/train.txt', 'x'), bucket('two/train.jsonl', 'x')
  with pytest.raises(InputError, match='found 2 files for train'):
    splits.load(dataclasses.replace(data_config, dir=bucket('two/')), 0)


def test_plain_text(bucket, data_config):
  address = bucket('t.txt', 'abc ' * 100)
  found = text.load(dataclasses.replace(data_config, name='text', path=address))
  assert len(found.train) == 360


def test_a_tokenizer(bucket):
  """In a folder, or a file, whose neighbours come along: they name its BOS."""
  held = {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': [],
          'normalizer': None, 'pre_tokenizer': None, 'post_processor': None, 'decoder': None,
          'model': {'type': 'WordLevel', 'vocab': {'a': 0, 'b': 1}, 'unk_token': 'a'}}
  file = bucket('t/tokenizer.json', json.dumps(held))
  bucket('t/tokenizer_config.json', json.dumps({'bos_token': 'b'}))
  bucket('t/model.safetensors', 'large')
  for path in (file, bucket('t/')):
    made = json.loads(tokenizer_files.read(path, 'true'))
    assert made['post_processor']['special_tokens']['b']['ids'] == [1]
  assert 'model.safetensors' not in bucket.fetched
  with pytest.raises(InputError, match='config.tokenizer.path'):
    tokenizer_files.read(bucket('none/'), 'auto')


def test_pretrained_weights(bucket, tiny_config, tmp_path):
  """Their directory by address: sizes, tokenizer, hash; pickles are not fetched."""
  from safetensors.flax import save
  values = {'architectures': ['GPT2LMHeadModel'], 'model_type': 'gpt2', 'n_layer': 1,
            'n_embd': 16, 'n_head': 2, 'n_positions': 48, 'vocab_size': 20,
            'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5}
  bucket('m/config.json', json.dumps(values))
  bucket('m/model.safetensors', save({'wte.weight': jnp.ones((20, 16))}))
  bucket('m/pytorch_model.bin', 'pickle')
  start = bucket('m/')
  config = pretrained.resolve(tiny_config(**{'model.init_from': start}))
  assert (config.model.num_layers, config.tokenizer.at_least) == (1, 20)
  assert config.tokenizer.path == start  # nothing of this machine goes into a run's config
  assert list(pretrained.tensors(pretrained.directory(start))) == ['wte.weight']
  before = pretrained.fingerprint(start)
  assert before == pretrained.fingerprint(start) and 'pytorch_model.bin' not in bucket.fetched
  bucket('m/model.safetensors', save({'wte.weight': jnp.zeros((20, 16))}))
  assert pretrained.fingerprint(start) != before
  bucket('m/model.safetensors.index.json',
         json.dumps({'weight_map': {'wte.weight': '../../secret.safetensors'}}))
  with pytest.raises(InputError, match='expected a file beside it'):
    pretrained.fingerprint(start)


class Bucket(MemoryFileSystem):
  """A stand-in for Google's storage, to all libraries of this process."""
  protocol = ('gs', 'gcs')
  store, pseudo_dirs = {}, ['']

  @classmethod
  def _strip_protocol(cls, path):
    return MemoryFileSystem._strip_protocol(path.replace('gs://', '/').replace('gcs://', '/'))


@pytest.fixture
def google():
  from fsspec.registry import _registry
  old = {name: _registry.get(name) for name in Bucket.protocol}
  for name in Bucket.protocol:
    fsspec.register_implementation(name, Bucket, clobber=True)
  Bucket.store.clear()
  yield Bucket()
  for name, kind in old.items():
    _registry.pop(name, None)
    if kind:
      _registry[name] = kind


@pytest.fixture
def programs():
  """The compilation cache of this process, put back afterwards."""
  names = ('jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs',
           'jax_persistent_cache_min_entry_size_bytes')
  old = {name: getattr(jax.config, name) for name in names}
  compilation_cache.reset_cache()
  yield
  for name, value in old.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def test_compiled_programs_in_a_bucket(google, programs, tiny_config, tmp_path, monkeypatch):
  """They go to the bucket, no folder `gs:` is made, and another start finds them there."""
  monkeypatch.chdir(tmp_path)
  config = tiny_config(**{'train.compilation_cache': 'gs://bucket/programs'})
  experiment._keep_programs(config)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)

  def program():
    return jax.jit(lambda x: jnp.sin(x) * 17 + 4)(jnp.arange(5.0)).block_until_ready()
  program()
  kept = [name for name in google.store if name.startswith('/bucket/programs/')]
  assert any('cache' in name for name in kept) and not list(tmp_path.iterdir())
  jax.clear_caches()
  compilation_cache.reset_cache()
  hits = []
  jax.monitoring.register_event_listener(
      lambda event, **_: hits.append(event) if 'cache_hits' in event else None)
  program()
  assert hits and kept == [n for n in google.store if n.startswith('/bucket/programs/')]


@pytest.mark.parametrize('address, message', [
    ('memory://b/x', 'a bucket that JAX can write to'), ('s3://b/x', r"'\.\[s3\]'"),
    ('hf://b', 'config.train.compilation_cache')])
def test_a_cache_that_cannot_be(address, message, programs, tiny_config, monkeypatch):
  """Said before anything is compiled, not as a warning at each program."""
  monkeypatch.setitem(sys.modules, 's3fs', None)
  with pytest.raises(InputError, match=message):
    experiment._keep_programs(tiny_config(**{'train.compilation_cache': address}))


def test_a_cache_at_a_file_address_is_a_folder(programs, tiny_config, tmp_path):
  experiment._keep_programs(tiny_config(**{'train.compilation_cache': f'file://{tmp_path}/c'}))
  assert jax.config.jax_compilation_cache_dir == f'{tmp_path}/c'


def test_two_that_fetch_at_once_without_a_lock(bucket, monkeypatch, tmp_path):
  """On a file system that has none, the second to be ready takes the copy of the first."""
  address, kind = bucket('d/a.txt', 'x'), type(fsspec.url_to_fs(bucket('d/a.txt'))[0])
  counted = kind.get_file

  def beside(self, path, here, *args, **options):
    counted(self, path, here, *args, **options)
    if len(bucket.fetched) < 2:
      storage.fetch(address, 'key')  # the other one, meanwhile
  monkeypatch.setattr(kind, 'get_file', beside)

  def refuse(*_):
    raise OSError('no locks')
  monkeypatch.setattr(storage.fcntl, 'flock', refuse)
  assert storage.fetch(address, 'key').read_text() == 'x' and len(bucket.fetched) == 2


@pytest.mark.integration
def test_of_processes_at_once_one_fetches(tmp_path):
  """Eight that start together on a machine: one copy, read by all."""
  (tmp_path / 'far').mkdir()
  (tmp_path / 'far/a.txt').write_text('x' * 100_000)
  script = (
      'import sys, time\nfrom fsspec.implementations.local import LocalFileSystem as L\n'
      'from latent_reasoning.data import storage\nget = L.get_file\n'
      'def slow(*a, **k):\n  print("fetched"); time.sleep(0.5); return get(*a, **k)\n'
      'L.get_file = slow\n'
      f'found = storage.fetch("file://{tmp_path}/far/a.txt", "key")\n'
      'assert len(found.read_text()) == 100_000\n')
  many = [subprocess.Popen([sys.executable, '-c', script], stdout=subprocess.PIPE, text=True,
                           env={**os.environ, 'XDG_CACHE_HOME': str(tmp_path / 'cache')})
          for _ in range(8)]
  said = [process.communicate()[0] for process in many]
  assert all(process.returncode == 0 for process in many) and said.count('fetched\n') == 1
