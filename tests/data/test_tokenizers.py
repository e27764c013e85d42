"""Tokenizers: round trips, unreachable special ids, determinism, errors."""

import dataclasses
import json
import pathlib

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from latent_reasoning.config import TokenizerConfig
from latent_reasoning.data import tokenizers as ours
from latent_reasoning.errors import InputError

INDEX_TOKENS = 3
LITERALS = (*ours.SPECIAL, '<step_1>', '<step_3>', '<unk>', '<|endoftext|>', '[CLS]')
TEXTS = ['7+2=9 and 9-5=4', 'Ada has 12 apples; café “naïve” 12345',
         'the the the score rises by 31', *LITERALS * 5]


def config(kind='char', **changes):
  return dataclasses.replace(
      TokenizerConfig(kind=kind, path='', add_bos='auto', vocab_size=300, at_least=0,
                      pad_to=64), **changes)


def gpt2_like(path: pathlib.Path) -> pathlib.Path:
  """A file with specials, padding, truncation and a template of its own."""
  base = tokenizers.Tokenizer(models.BPE())
  base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  base.decoder = decoders.ByteLevel()
  base.train_from_iterator(TEXTS, trainers.BpeTrainer(
      vocab_size=320, show_progress=False, special_tokens=['<|endoftext|>', '[CLS]'],
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  base.post_processor = processors.TemplateProcessing(
      single='[CLS] $A', special_tokens=[('[CLS]', base.token_to_id('[CLS]'))])
  base.enable_padding(length=50)
  base.enable_truncation(max_length=60)
  base.save(str(path))
  return path


@pytest.fixture(scope='module')
def built(tmp_path_factory):
  """A tokenizer of each kind."""
  folder = tmp_path_factory.mktemp('tokenizers')
  given_file = gpt2_like(folder / 'given.json')
  return {kind: ours.build(config(kind, path=str(given_file)), lambda: TEXTS,
                           folder / kind / 'tokenizer.json', INDEX_TOKENS)
          for kind in ('char', 'bpe', 'file')}


KINDS = pytest.mark.parametrize('kind', ['char', 'bpe', 'file'])
# UTF-8 has no lone surrogates; the data's door refuses them.
UNICODE = st.text(st.characters(exclude_categories=['Cs']))
ADVERSARIAL = st.lists(st.one_of(st.sampled_from(LITERALS), UNICODE)).map(''.join)


@KINDS
@given(text=ADVERSARIAL)
def test_no_text_produces_a_special_id(built, kind, text):
  t = built[kind]
  assert all(0 <= i < t.size for i in t.encode(text))


@pytest.mark.parametrize('literal', LITERALS)
@KINDS
def test_the_spelling_of_a_special_is_plain_text(built, kind, literal):
  t = built[kind]
  ids = t.encode(f'a{literal}b')
  assert len(ids) > 3 and max(ids) < t.size
  assert t.decode(ids) == f'a{literal}b'
  bare = t.encode(literal)
  assert len(bare) > 1, 'one token would be the special itself'


@pytest.mark.parametrize('kind', ['bpe', 'file'])
@given(text=ADVERSARIAL)
def test_bytes_round_trip_any_text(built, kind, text):
  assert built[kind].decode(built[kind].encode(text)) == text


@given(text=st.text(st.sampled_from([*map(chr, range(32, 127)), '\n', 'é', '“'])))
@example(text='\n\n  \n')
def test_characters_round_trip_one_token_each(built, text):
  t = built['char']
  assert t.decode(t.encode(text)) == text
  assert len(t.encode(text)) == len(text)


def test_an_unknown_character_is_one_token_that_no_known_text_has(built):
  t = built['char']
  unknown = t.encode('\u4e16')
  assert len(unknown) == 1 and unknown[0] not in t.encode('<unk>' + ''.join(TEXTS))
  assert t.encode('a\u4e16b') == [*t.encode('a'), *unknown, *t.encode('b')]


@pytest.mark.parametrize('kind', ['char', 'bpe'])
@given(digits=st.text('0123456789', min_size=1))
def test_a_digit_is_a_token(built, kind, digits):
  ids = built[kind].encode(digits)
  assert len(ids) == len(digits)
  assert ids == [i for d in digits for i in built[kind].encode(d)]


@KINDS
@given(texts=st.lists(UNICODE, max_size=4))
def test_a_batch_is_its_texts(built, kind, texts):
  assert built[kind].encode_batch(texts) == [built[kind].encode(t) for t in texts]


@KINDS
def test_special_ids_lie_above_the_base_vocabulary(built, kind):
  t = built[kind]
  ids = [t.pad, t.end, t.block_open, t.memory, t.block_close, t.pause,
         *(t.step(i) for i in range(1, INDEX_TOKENS + 1))]
  assert ids == [*range(t.size, t.size + len(ours.SPECIAL) + INDEX_TOKENS)]
  assert ids[-1] < t.vocab_size < ids[-1] + 1 + 64 and t.vocab_size % 64 == 0
  for wrong in (0, INDEX_TOKENS + 1):
    with pytest.raises(InputError, match=f'found step {wrong}; expected 1 to 3'):
      t.step(wrong)


@KINDS
def test_special_and_padding_ids_have_no_text(built, kind):
  t = built[kind]
  ids = t.encode('7+2')
  marked = [t.block_open, t.memory, ids[0], t.step(1), *ids[1:], t.end, t.pad,
            t.vocab_size - 1]
  assert t.decode(marked) == '7+2'


def test_a_file_s_template_padding_and_truncation_are_off(built):
  t = built['file']
  assert t.encode('') == []
  assert len(t.encode('~')) == 1
  assert len(t.encode('~' * 100)) == 100


@pytest.mark.parametrize('kind', ['char', 'bpe'])
def test_building_is_deterministic(built, kind, tmp_path):
  texts = [f'{t} {i}' for i in range(50) for t in TEXTS]
  for name in ('a', 'b'):
    ours.build(config(kind, vocab_size=400), lambda: texts, tmp_path / name, 0)
  assert (tmp_path / 'a').read_bytes() == (tmp_path / 'b').read_bytes()


def test_the_order_of_texts_does_not_change_characters(tmp_path):
  for name, texts in (('a', TEXTS), ('b', TEXTS[::-1])):
    ours.build(config(), lambda texts=texts: texts, tmp_path / name, 0)
  assert (tmp_path / 'a').read_bytes() == (tmp_path / 'b').read_bytes()


@KINDS
def test_what_was_saved_is_loaded_and_not_remade(built, kind, tmp_path):
  path = tmp_path / 'deep' / 'tokenizer.json'
  built[kind].save(path)
  before = path.read_bytes()
  assert [p.name for p in path.parent.iterdir()] == ['tokenizer.json']

  def texts():
    raise AssertionError('training texts were asked for')
  loaded = ours.build(config('bpe', path='/nowhere'), texts, path, INDEX_TOKENS)
  assert path.read_bytes() == before
  text = 'Ada has 12 <pad> <|endoftext|>'
  assert loaded.encode(text) == built[kind].encode(text)
  assert loaded.size == built[kind].size


def test_a_given_file_asks_for_no_texts_and_is_kept(built, tmp_path):
  source = gpt2_like(tmp_path / 'source.json')
  path = tmp_path / 'work' / 'tokenizer.json'
  t = ours.build(config('file', path=str(source)), None, path, 0)
  source.unlink()
  assert ours.build(config('file', path=str(source)), None, path, 0).size == t.size


def test_bpe_has_at_most_the_entries_asked_for(built, tmp_path):
  assert 256 < built['bpe'].size <= 300
  with pytest.raises(InputError, match='vocab_size is 255; expected at least 256'):
    ours.build(config('bpe', vocab_size=255), lambda: TEXTS, tmp_path / 't', 0)
  assert not (tmp_path / 't').exists()


@pytest.mark.parametrize('content, phrase', [
    (None, 'No such file'), ('{"a":', 'found no tokenizer'), ('{"a": 1}', 'no tokenizer'),
    (b'\xff\xfe', 'not UTF-8')])
def test_a_bad_file_is_named(tmp_path, content, phrase):
  path = tmp_path / 'given.json'
  if content is not None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(InputError, match=phrase) as error:
    ours.build(config('file', path=str(path)), None, tmp_path / 'out', 0)
  assert str(error.value).startswith(f'{path}: ')
  assert 'set config.tokenizer.path' in str(error.value)
  if content is not None:
    with pytest.raises(InputError, match='delete it'):
      ours.build(config(), None, path, 0)


@pytest.mark.parametrize('token', ['<pad>', '<step_2>'])
@pytest.mark.parametrize('added', [True, False])
def test_a_special_whose_spelling_is_taken_gets_another(tmp_path, token, added):
  """Out and in again under the new spelling, too."""
  vocabulary = {'a': 0, '<m>': 1} if added else {'a': 0, '<m>': 1, token: 2}
  base = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token='a'))
  if added:
    base.add_special_tokens([token])
  base.save(str(tmp_path / 'given.json'))
  t = ours.build(config('file', path=str(tmp_path / 'given.json')), None, tmp_path / 'out',
                 INDEX_TOKENS)
  names = t.special()
  assert names[t.memory] == '<m_1>' and token not in names.values()
  assert f'{token[:-1]}_1>' in names.values() and t.size == 3 and t.known == 3
  (tmp_path / 'export.json').write_text(json.dumps(t.to_json()))
  for steps in (INDEX_TOKENS - 1, INDEX_TOKENS, INDEX_TOKENS + 2):
    again = ours.build(config('file', path=str(tmp_path / 'export.json')), None,
                       tmp_path / f'again_{steps}', steps)
    assert again.size == 3 and again.known == 9 + min(steps, INDEX_TOKENS)
    assert list(again.special().values())[:9] == list(names.values())[:6 + steps]
    assert len(again.special()) == 6 + steps


def test_added_tokens_never_match_in_text(tmp_path):
  """Special or not, single words or not, entries of the vocabulary as well or not."""
  vocabulary = {c: i for i, c in enumerate(['?', '<think>', *'<>thinkabc '])}
  pieces = [('?', 0.0), ('<think>', 0.0), *((c, -2.0) for c in '<thi> abcnk')]
  for model in (models.WordLevel(vocabulary, unk_token='?'), models.Unigram(pieces, unk_id=0)):
    base = tokenizers.Tokenizer(model)
    base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    base.add_tokens(['<think>', tokenizers.AddedToken('<tool_call>', single_word=True), 'c'])
    base.add_special_tokens(['<s>', '?'])
    base.save(str(tmp_path / 'given.json'))
    t = ours.build(config('file', path=str(tmp_path / 'given.json')), None,
                   tmp_path / type(model).__name__, 0)
    added = {base.token_to_id(a) for a in ('<think>', '<tool_call>', '<s>', 'c')}
    for text in ('<think>', 'a <think> b', 'a<tool_call>', '<tool_call> c', '<s>', 'c <s>c'):
      ids = t.encode(text)
      assert ids and added.isdisjoint(ids) and max(ids) < t.size
      assert t.examples([(text, ('a', text), text)]) == [
          (t.question(text), [t.encode('a'), ids], ids)]
    assert t.encode('ac') == t.encode('a?'), 'a character that is an added token is unknown'
    exported = tokenizers.Tokenizer.from_str(json.dumps(t.to_json()))
    exported.encode_special_tokens = True  # split_special_tokens of transformers
    assert exported.encode('a <tool> <b>').ids == t.encode('a <tool> <b>')


@pytest.mark.parametrize('text', ['1 + 2', ' 1 +\t2\n', '\u20281\xa0+\r\n2\x1f'])
def test_a_question_is_on_one_line(built, text):
  t = built['char']
  assert t.question(text) == t.encode('1 + 2\n')
  for empty in ('', ' \n\u2003'):
    with pytest.raises(InputError, match='question is empty'):
      t.question(empty)


def with_template(path, template='[CLS] $A [SEP]', **settings):
  """A checkpoint's folder: its tokenizer, and what its configuration says of it."""
  path.mkdir()
  base = tokenizers.Tokenizer.from_file(str(gpt2_like(path / 'tokenizer.json')))
  base.add_special_tokens(['[SEP]'])
  tokens = [(t, base.token_to_id(t)) for t in ('[CLS]', '[SEP]')]
  base.post_processor = processors.Sequence([
      processors.ByteLevel(), processors.TemplateProcessing(single=template,
                                                            special_tokens=tokens)])
  base.save(str(path / 'tokenizer.json'))
  (path / 'tokenizer_config.json').write_text(json.dumps(
      {'tokenizer_class': 'PreTrainedTokenizerFast', **settings}))
  return path


BOS = {'bos_token': '[CLS]'}


@pytest.mark.parametrize('template, settings, add_bos, expected', [
    ('[CLS] $A [SEP]', {}, 'auto', ['[CLS]']), ('[CLS] $A', {}, 'false', []),
    ('[CLS] [SEP] $A', {}, 'auto', ['[CLS]', '[SEP]']), ('$A [SEP]', {}, 'auto', []),
    ('$A', BOS, 'auto', []), ('$A', BOS, 'true', ['[CLS]']),
    ('$A', {'bos_token': {'content': '[SEP]'}}, 'true', ['[SEP]']),
    ('$A', {**BOS, 'add_bos_token': True}, 'auto', []),
    ('[CLS] $A', {**BOS, 'add_bos_token': False}, 'auto', ['[CLS]']),
    ('[CLS] $A', {'bos_token': '[SEP]'}, 'true', ['[CLS]'])])
def test_bos_is_what_the_checkpoint_puts_in_front(tmp_path, template, settings, add_bos,
                                                  expected):
  """By its post-processor, as in transformers 5; kept, exported and read again."""
  folder = with_template(tmp_path / 'from', template, **settings)
  given = config('file', path=str(folder), add_bos=add_bos)
  for path in (tmp_path / 'tokenizer.json',) * 2:  # made, then kept
    t = ours.build(given, None, path, 0)
    assert [t.text(i) for i in t.start] == expected
  assert t.question('1') == [*t.start, *t.encode('1\n')]
  (tmp_path / 'export.json').write_text(json.dumps(t.to_json()))
  again = ours.build(config('file', path=str(tmp_path / 'export.json')), None,
                     tmp_path / 'again', 0)
  assert again.start == t.start and again.question('1') == t.question('1')
  if add_bos == 'auto':
    transformers = pytest.importorskip('transformers', reason="pip install -e '.[test-hf]'")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)('1\n')['input_ids']
    assert theirs[:len(t.question('1'))] == t.question('1')


def test_no_bos_to_add(tmp_path):
  folder = with_template(tmp_path / 'from', '$A')
  with pytest.raises(InputError, match='no file beside .* names a BOS'):
    ours.build(config('file', path=str(folder), add_bos='true'), None, tmp_path / 't', 0)
  with pytest.raises(InputError, match="add_bos is 'true', but the tokenizer puts no BOS"):
    ours.build(config('char', add_bos='true'), lambda: TEXTS, tmp_path / 't', 0)


def test_ids_with_gaps_leave_room_below_the_specials(tmp_path):
  base = tokenizers.Tokenizer(models.WordLevel({'a': 0, 'b': 90}, unk_token='a'))
  base.save(str(tmp_path / 'given.json'))
  t = ours.build(config('file', path=str(tmp_path / 'given.json')), None,
                 tmp_path / 'out', 0)
  assert (t.size, t.pad, t.vocab_size) == (91, 91, 128)


def test_a_saved_file_is_a_plain_tokenizer_json(built, tmp_path):
  built['char'].save(tmp_path / 't.json')
  vocabulary = json.loads((tmp_path / 't.json').read_text())['model']['vocab']
  assert not set(ours.SPECIAL) & vocabulary.keys()
  assert sorted(vocabulary.values()) == [*range(built['char'].size)]
  characters = sorted(vocabulary, key=vocabulary.get)[1:]
  assert characters == sorted({'\n', *map(chr, range(32, 127)), *''.join(TEXTS)})
