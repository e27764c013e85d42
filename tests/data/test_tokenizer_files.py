"""Tokenizers of others: each form as its own library reads it; a bad file is one error."""

import copy
import json
import pathlib
import random
import resource
import subprocess
import sys
import time

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from latent_reasoning.config import TokenizerConfig
from latent_reasoning.data import tokenizer_files
from latent_reasoning.data import tokenizers as ours
from latent_reasoning.errors import InputError

TEXTS = ['Natalia sold 48/2 = 24 clips in May.', 'Ada has 12 apples; café 12345', 'the the'] * 9


def build(source, folder, **changes):
  changes = {'add_bos': 'auto', **changes}
  config = TokenizerConfig('file', str(source), vocab_size=0, at_least=0, pad_to=1, **changes)
  return ours.build(config, None, folder / 'kept' / 'tokenizer.json', 3)


def bpe():
  """A small byte-level BPE."""
  base = tokenizers.Tokenizer(models.BPE())
  base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  base.decoder = decoders.ByteLevel()
  base.train_from_iterator(TEXTS, trainers.BpeTrainer(
      vocab_size=280, show_progress=False, special_tokens=['<|endoftext|>'],
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  return base


PLAIN = {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': [],
         'normalizer': None, 'pre_tokenizer': None, 'post_processor': None, 'decoder': None,
         'model': {'type': 'WordLevel', 'vocab': {'a': 0, 'b': 1}, 'unk_token': 'a'}}


def model(**changes):
  return {'model': {**PLAIN['model'], **changes}}


def split(regex):
  return {'pre_tokenizer': {'type': 'Split', 'pattern': {'Regex': regex},
                            'behavior': 'Isolated', 'invert': False}}


def replaced(*pairs):
  return {'normalizer': {'type': 'Sequence', 'normalizers': [
      {'type': 'Replace', 'pattern': {'String': a}, 'content': b} for a, b in pairs]}}


UNIGRAM = {'type': 'Unigram', 'unk_id': 0, 'vocab': [['?', 0.0], ['a' * 1_000_000, -1.0]]}
ADDED = {'id': 7, 'content': 'zz', 'single_word': False, 'lstrip': False, 'rstrip': False,
         'normalized': False, 'special': True}


@pytest.mark.integration
@pytest.mark.parametrize('changes, message', [
    (model(vocab={'a': 0, 'b': 2**31}), "'b' has the id 2147483648; ids go .* to 4,194,303"),
    (model(vocab={'a': 0, 'b': 2**32 - 1}), "'b' has the id 4294967295"),
    (model(vocab={'a': 0, 'b': -1}), "'b' has the id -1"),
    (model(vocab={'a': 0, 'b': 2**70}), 'ids go from 0'),
    (model(vocab={'a': 0, 'b': 1.5}), 'ids go from 0'),
    (model(vocab={}), 'vocabulary is empty'),
    (model(vocab={'a' * 5000: 0}), '5,000 characters; at most 4,096'),
    ({'model': UNIGRAM}, '1,000,000 characters'), (model(unk_token='c'), 'Missing'),
    ({'added_tokens': [{**ADDED, 'id': 2**31}]}, "'zz' has the id 2147483648"),
    (model(vocab={'a': 0, 'b': 1, 'c': 1}), "'b' and 'c' have the same id 1"),
    ({'added_tokens': [ADDED]}, "'zz' has the id 7 in its file, where"),
    (split('(a+)+$'), 'retry-limit-in-match'), (split('(a|b|ab)*c'), 'retry-limit-in-match'),
    (split('(x+x+)+y'), 'retry-limit-in-match'),
    (split('(' * 9), 'Oniguruma error'),
    # Grows in few steps: in many, a slow machine comes to the bound on time first.
    (replaced(*[('', 'a' * 300)] * 8), 'more than 1.7 GB'),
    (model(vocab=[0]), 'found no tokenizer'), ({'model': 3}, 'found no tokenizer'),
    ({'padding': {'strategy': {'Fixed': 2**40}, 'direction': 'Right', 'pad_id': 0,
                  'pad_type_id': 0, 'pad_token': 'a', 'pad_to_multiple_of': None}}, '')])
def test_bounds(tmp_path, changes, message):
  """Nothing is built before it is known to be small and to end."""
  path = tmp_path / 'given.json'
  path.write_text(json.dumps({**PLAIN, **changes}))
  began = time.monotonic()
  if not message:  # what is never used does no harm
    assert build(path, tmp_path).encode('ab') == [0]
  else:
    with pytest.raises(InputError, match=message):
      build(path, tmp_path)
    assert not (tmp_path / 'kept').exists()
  assert time.monotonic() - began < 10


@pytest.mark.integration
def test_bounds_keep_memory(tmp_path):
  """The largest of them, in a process of its own: a child counts its parent's memory too."""
  given = {**PLAIN, **replaced(*[('', 'a' * 300)] * 8)}
  (tmp_path / 'given.json').write_text(json.dumps(given))
  code = f'''
import pathlib, resource, sys
sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
import test_tokenizer_files as here
folder = pathlib.Path({str(tmp_path)!r})
try:
  here.build(folder / 'given.json', folder)
except here.InputError as error:
  assert 'more than 1.7 GB' in str(error), error
  print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
'''
  found = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True,
                         text=True)
  assert 0 < int(found.stdout) < 2e6  # KiB


@pytest.mark.slow  # 8 s of computing
def test_a_file_that_takes_for_ever(tmp_path):
  path = tmp_path / 'given.json'
  path.write_text(json.dumps({**PLAIN, **replaced(*[('a', 'aa')] * 40)}))
  with pytest.raises(InputError, match='takes more than 8 s'):
    build(path, tmp_path)


@pytest.mark.parametrize('text', [
    '[' * 100_000, json.dumps(PLAIN)[:-1] + ',"x":' + '[' * 100_000 + ']' * 100_000 + '}',
    json.dumps(PLAIN).replace('"a"', '[' * 100_000 + ']' * 100_000, 1), '', 'null', '"a"', '\0',
    json.dumps({**PLAIN, **model(vocab={'\ud800': 0, 'a': 1})})],
    ids=('brackets', 'brackets behind', 'brackets within', 'empty', 'null', 'a string', 'a '
                                                                                        'zero',
         'half a character'))
def test_no_tokenizer(tmp_path, text):
  path = tmp_path / 'given.json'
  path.write_text(text)
  with pytest.raises(InputError, match='found no tokenizer that can be used'):
    build(path, tmp_path)


def test_too_large_a_file(tmp_path):
  with (tmp_path / 'given.json').open('wb') as file:
    file.truncate(1 << 33)
  with pytest.raises(InputError, match='has 8,589,934,592 bytes, more than 67,108,864'):
    build(tmp_path / 'given.json', tmp_path)


def test_a_panic_on_a_text_is_an_input_error(tmp_path):
  """What no trial saw; lone surrogates, too."""
  path = tmp_path / 'given.json'
  path.write_text(json.dumps({**PLAIN, **split('(x1|x|1)*Z')}))
  t = build(path, tmp_path)
  for text in ('x1' * 60 + '!Z', 'a\ud800'):
    with pytest.raises(InputError, match='the tokenizer cannot read'):
      t.encode(text)
  assert t.encode('ab') == [0]


def test_dropout_is_off(tmp_path):
  """A text has one encoding, in training as in an export."""
  held = json.loads(bpe().to_str())
  held['model']['dropout'] = 0.5
  (tmp_path / 'given.json').write_text(json.dumps(held))
  t = build(tmp_path / 'given.json', tmp_path)
  assert len({tuple(t.encode('Natalia sold clips')) for _ in range(9)}) == 1
  assert t.to_json()['model']['dropout'] is None


def folder_of(path, kind, model_type):
  """A checkpoint with the old files of a tokenizer alone."""
  path.mkdir(exist_ok=True)
  if model_type:
    (path / 'config.json').write_text(json.dumps({'model_type': model_type}))
  if kind == 'bpe':
    bpe().model.save(str(path))
    return
  sentencepiece = pytest.importorskip('sentencepiece', reason="pip install -e '.[hf]'")
  if model_type:
    (path / 'tokenizer_config.json').write_text('{"add_bos_token": true, "bos_token": "<s>"}')
  (path / 'text').write_text('\n'.join(TEXTS))
  sentencepiece.SentencePieceTrainer.train(
      input=str(path / 'text'), model_prefix=str(path / 'tokenizer'), vocab_size=310,
      model_type=kind.removeprefix('sentencepiece '), byte_fallback=True, minloglevel=2,
      normalization_rule_name='identity', hard_vocab_limit=False)


@pytest.mark.parametrize('kind, model_type, bos', [
    ('bpe', 'gpt2', []), ('bpe', 'qwen2', []), ('bpe', '', []),
    ('sentencepiece bpe', 'llama', ['<s>']), ('sentencepiece bpe', '', ['<s>'])])
def test_old_files(tmp_path, kind, model_type, bos):
  """vocab.json with merges.txt, tokenizer.model: a folder of them, or one by name."""
  transformers = pytest.importorskip('transformers', reason="pip install -e '.[hf]'")
  folder_of(tmp_path / 'from', kind, model_type)
  t = build(tmp_path / 'from', tmp_path)
  assert [t.text(i) for i in t.start] == bos
  name = 'vocab.json' if kind == 'bpe' else 'tokenizer.model'
  assert build(tmp_path / 'from' / name, tmp_path / 'again').to_json() == t.to_json()
  if model_type:
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'from')
    for text in (*TEXTS[:2], '3.5 <s>'):
      assert t.question(text) == theirs(f'{text}\n', split_special_tokens=True).input_ids
  assert t.decode(t.encode('Ada sold 12 “clips”')) == 'Ada sold 12 “clips”'
  if bos:
    (tmp_path / 'export.json').write_text(json.dumps(t.to_json()))
    exported = tokenizers.Tokenizer.from_file(str(tmp_path / 'export.json'))
    assert exported.encode('Ada sold\n<m>').ids == [*t.question('Ada sold'), t.memory]


def test_old_files_that_nobody_reads_right(tmp_path, monkeypatch):
  pytest.importorskip('transformers', reason="pip install -e '.[hf]'")
  folder_of(tmp_path / 'a', 'sentencepiece unigram', 'llama')
  with pytest.raises(InputError, match='transformers .* reads .* sentencepiece as'):
    build(tmp_path / 'a', tmp_path)
  folder_of(tmp_path / 'b', 'bpe', 'gpt2')
  for damage, message in (('[]', 'found no vocabulary'), ('{"a": 4294967295}', 'ids go from'),
                          ('{"a": 0}', 'found no tokenizer')):
    (tmp_path / 'b/vocab.json').write_text(damage)
    with pytest.raises(InputError, match=message):
      build(tmp_path / 'b', tmp_path)
  (tmp_path / 'b/merges.txt').unlink()
  with pytest.raises(InputError, match='no merges.txt'):
    build(tmp_path / 'b', tmp_path)
  (tmp_path / 'b/vocab.json').unlink()
  with pytest.raises(InputError, match='has no tokenizer.json, tokenizer.model'):
    build(tmp_path / 'b', tmp_path)


def test_a_missing_library_is_named(tmp_path, monkeypatch):
  folder_of(tmp_path / 'a', 'bpe', 'gpt2')
  def absent(name):
    raise ImportError(f'No module named {name!r}', name=name)
  monkeypatch.setattr(tokenizer_files.importlib, 'import_module', absent)
  with pytest.raises(InputError, match=r"needs a library, transformers: pip .* '.\[hf\]'"):
    build(tmp_path / 'a', tmp_path)


# --- fuzzing ------------------------------------------------------------------

EXTREME = [None, True, -1, 0, 1, 2**31, 2**32 - 1, 2**64, 1.5, 1e308, '', 'a', '<s>', '(a+)+$',
           '(a*)*b', '[', '\\', '\ud800', 'Ġ' * 300, [], {}, [[]], {'a': 0},
           {'Regex': '(a+)+$'},
           {'type': 'Split', 'pattern': {'Regex': '(.*a){20}'}, 'behavior': 'Removed',
            'invert': True}, {'type': 'ByteLevel'}, {'type': 'Metaspace', 'replacement': '▁',
                                                     'prepend_scheme': 'first', 'split': True}]


def nodes(value, path=()):
  """The paths of all values in a JSON value."""
  yield path
  pairs = value.items() if isinstance(value, dict) else (
      enumerate(value) if isinstance(value, list) else ())
  for key, inner in pairs:
    yield from nodes(inner, (*path, key))


def mutate(draw, held, paths):
  """Text of a tokenizer.json with some damage: of bytes, or of its values."""
  if draw.random() < 0.3:
    text = bytearray(json.dumps(held).encode())
    for _ in range(draw.randint(1, 4)):
      at = draw.randrange(len(text))
      kind = draw.randrange(4)
      if kind == 0:
        text[at] ^= 1 << draw.randrange(8)
      elif kind == 1:
        del text[at:at + draw.randint(1, 40)]
      elif kind == 2:
        text[at:at] = text[at:at + draw.randint(1, 40)] * draw.randint(1, 50)
      else:
        text[at:at] = draw.choice([b'[' * 2000, b'\xff', b'"', b'9' * 40, b'-', b'{"a":'])
    return bytes(text)
  held = copy.deepcopy(held)
  for _ in range(draw.randint(1, 3)):
    path = draw.choice(paths)
    inner = held
    try:
      for key in path[:-1]:
        inner = inner[key]
      if path and draw.random() < 0.3:
        del inner[path[-1]]
      elif path:
        inner[path[-1]] = copy.deepcopy(draw.choice(EXTREME))
      else:
        held = copy.deepcopy(draw.choice(EXTREME))
    except (KeyError, IndexError, TypeError):
      continue  # another mutation took it
  return json.dumps(held).encode()


def kinds():
  """Tokenizers of every model and most parts."""
  word_piece = tokenizers.Tokenizer(models.WordPiece(
      {'[UNK]': 0, '[CLS]': 1, 'a': 2, '##b': 3, '1': 4}, unk_token='[UNK]'))
  word_piece.normalizer = tokenizers.normalizers.BertNormalizer()
  word_piece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  word_piece.decoder = decoders.WordPiece()
  word_piece.add_special_tokens(['[CLS]'])
  word_piece.post_processor = tokenizers.processors.TemplateProcessing(
      single='[CLS] $A', special_tokens=[('[CLS]', 1)])
  unigram = tokenizers.Tokenizer(models.Unigram(
      [('<unk>', 0.0), *((c, -2.0) for c in '▁abc'),
       *((f'<0x{b:02X}>', -9.0) for b in range(256))], unk_id=0, byte_fallback=True))
  unigram.pre_tokenizer = pre_tokenizers.Metaspace()
  unigram.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
  return [json.loads(base.to_str()) for base in (bpe(), word_piece, unigram)] + [
      {**PLAIN, **split('a|b'), **replaced(('a', 'b'))}]


@pytest.mark.parametrize('count', [60, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutations(tmp_path, count):
  """A mutated file is used or refused: no other error, 2 GB at most, 10 s at most each."""
  draw, whole = random.Random(count), kinds()
  paths = [list(nodes(held)) for held in whole]
  refused, slowest = 0, 0.0
  for i in range(count):
    which = draw.randrange(len(whole))
    # Most values are entries of a vocabulary: the others are as likely together.
    own = [p for p in paths[which] if draw.random() < 0.5 or p[:2] != ('model', 'vocab')]
    short = [p for p in own if len(p) < 3 or p[0] != 'model']
    (tmp_path / 'given.json').write_bytes(mutate(draw, whole[which], draw.choice([own, short])))
    began = time.monotonic()
    try:
      t = build(tmp_path / 'given.json', tmp_path / str(i))
      t.decode(t.question('Ada has 12 <m> [CLS] apples\n'))
      tokenizers.Tokenizer.from_str(json.dumps(t.to_json()))
    except InputError as error:
      refused += 1
      assert len(str(error)) < 2000
    slowest = max(slowest, time.monotonic() - began)
  most = max(resource.getrusage(who).ru_maxrss / 1e6 for who in (
      resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
  print(f'\n{count} mutations: {refused} refused, the slowest {slowest:.1f} s, {most:.2f} GB')
  assert 0 < refused < count and slowest < 10 and most < 2
