"""One tokenizer for all kinds: characters, trained byte-level BPE, or a given file.

Our special tokens lie above the base vocabulary, at ids that the base tokenizer
does not know, so no text can produce one, not even its literal spelling; nor can it
produce an added token of the base.
"""

import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from latent_reasoning.config import TokenizerConfig
from latent_reasoning.data import tokenizer_files, tokenizer_trial
from latent_reasoning.data.example import normalise
from latent_reasoning.errors import InputError

SPECIAL = ('<pad>', '<end>', '<b>', '<m>', '</b>', '<pause>')

ASCII = ('\n', *map(chr, range(32, 127)))  # printable
# Two characters at least, so that no character is spelt like it.
UNKNOWN = '<unk>'

BYTES = 256  # entries that a byte-level vocabulary begins with


class Tokenizer:
  """Text to ids below `size`, beside special ids from `size` on.

  Attributes:
    size: entries of the base vocabulary.
    known: entries that weights with this tokenizer know: `size`, or with our special
      tokens, where the file is of an exported model.
    start: what every question begins with: BOS, where the checkpoint puts one; or ().
    index_tokens: how many <step_t> there are.
    vocab_size: base and special entries, padded to a multiple of `pad_to`.
    pad, end, block_open, memory, block_close, pause: ids of `SPECIAL`.
  """

  def __init__(self, text: str, index_tokens: int, pad_to: int, at_least: int = 0,
               add_bos: str = 'auto'):
    """Reads `text`, a tokenizer.json, and switches off what it would do beyond its vocabulary.

    Raises:
      InputError: an added token contradicts the vocabulary, or there is no BOS to add.
    """
    self._kept = text
    held, names = _plain(text)
    base = tokenizers.Tokenizer.from_str(json.dumps(held))
    base.encode_special_tokens = True  # its own specials are plain text, too
    for token in held['added_tokens']:
      if base.token_to_id(token['content']) != token['id']:
        raise InputError(
            f"the tokenizer's added token {token['content']!r} has the id {token['id']} in its "
            f"file, where the vocabulary has room for {base.token_to_id(token['content'])}; "
            'expected ids that follow it; mend tokenizer.json')
    vocabulary = tokenizer_trial.entries(held)
    self._base = base
    self.start = [] if add_bos == 'false' else tokenizer_files.begins(base)
    if add_bos == 'true' and not self.start:
      raise InputError("config.tokenizer.add_bos is 'true', but the tokenizer puts no BOS in "
                       "front of a text; expected 'auto' or 'false'")
    model = held['model']
    self._unknown = vocabulary.get(model.get('unk_token'), model.get('unk_id'))
    self._added = {t['id'] for t in held['added_tokens']} - {self._unknown}
    # Steps and answers repeat: looking one up is a hundred times faster.
    self._known = functools.lru_cache(1 << 14)(lambda text: tuple(self.encode(text)))
    self.size = max(vocabulary.values()) + 1  # ids may have gaps
    self.known = self.size + min(len(names), len(SPECIAL) + index_tokens)
    for name in (*SPECIAL, *(f'<step_{t + 1}>' for t in range(index_tokens)))[len(names):]:
      names.append(next(spelt for spelt in _spellings(name) if spelt not in vocabulary))
    self.index_tokens = index_tokens
    self._names = names[:len(SPECIAL) + index_tokens]
    used = max(self.size + len(self._names), at_least)
    self.vocab_size = -(-used // pad_to) * pad_to
    (self.pad, self.end, self.block_open, self.memory, self.block_close,
     self.pause) = range(self.size, self.size + len(SPECIAL))

  @functools.cached_property
  def fingerprint(self) -> str:
    """A hash of what the tokenizer does."""
    return hashlib.blake2b(f'{self._base.to_str()} {self.special()} {self.start}'.encode(),
                           digest_size=16).hexdigest()

  @property
  def used(self) -> int:
    """Ids from here on are of no token: they fill the vocabulary up."""
    return self.size + len(SPECIAL) + self.index_tokens

  def step(self, t: int) -> int:
    """Returns the id of index token <step_t>, t from 1."""
    if not 1 <= t <= self.index_tokens:
      raise InputError(f'found step {t}; expected 1 to {self.index_tokens}; raise '
                       'config.rim.max_steps')
    return self.size + len(SPECIAL) + t - 1

  def encode(self, text: str) -> list[int]:
    """Returns ids, all below `size`, none of an added token.

    Raises:
      InputError: the library cannot read the text.
    """
    try:
      found = self._base.encode(text, add_special_tokens=False)
    except BaseException as error:
      raise _failed(error, f'cannot read {text[:60]!r}') from None
    return self._plainly(text, found)

  def _plainly(self, text: str, found: tokenizers.Encoding) -> list[int]:
    """The ids of a text without added tokens."""
    if self._added.isdisjoint(found.ids):
      return found.ids
    # An added token that is an entry of the vocabulary as well: its characters say the same.
    ids = []
    for i, (begin, stop) in zip(found.ids, found.offsets, strict=True):
      if i not in self._added:
        ids.append(i)
      elif stop - begin > 1:
        ids += [j for character in text[begin:stop] for j in self.encode(character)]
      elif self._unknown is not None:
        ids.append(self._unknown)
      else:
        raise InputError(f'the tokenizer has {text[begin:stop]!r} as an added token alone, '
                         'which no text may hold; leave it out')
    return ids

  def question(self, text: str) -> list[int]:
    """Returns the ids that every sequence begins with: BOS where there is one, the question
    on one line with every run of white space as one space, a newline.

    Raises:
      InputError: an empty question.
    """
    line = normalise(text)
    if not line:
      raise InputError('the question is empty; expected text')
    return [*self.start, *self._known(f'{line}\n')]

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of each text."""
    return [list(self._known(t)) for t in texts]

  def examples(self, examples: Sequence[tuple[str, Sequence[str], str]]
               ) -> list[tuple[list[int], list[list[int]], list[int]]]:
    """The ids of question, steps and answer of each of many examples, on all cores; as
    `question` and `encode_batch` return them.

    Raises:
      InputError: the library cannot read a text.
    """
    asked = [f'{normalise(question)}\n' for question, _, _ in examples]
    rest = [text for _, steps, answer in examples for text in (*steps, answer)]
    texts = list(dict.fromkeys([*asked, *rest]))
    try:
      found = self._base.encode_batch(texts, add_special_tokens=False)
    except BaseException as error:
      raise _failed(error, f'cannot read one of {len(texts):,} texts') from None
    ids = dict(zip(texts, map(self._plainly, texts, found), strict=True))
    return [([*self.start, *ids[line]], [ids[step] for step in steps], ids[answer])
            for line, (_, steps, answer) in zip(asked, examples, strict=True)]

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of `ids`; special and padding ids have none."""
    ids = [int(i) for i in ids if i < self.size]
    try:
      return self._base.decode(ids)
    except BaseException as error:
      raise _failed(error, f'has no text for {ids[:20]}') from None

  def text(self, i: int) -> str:
    """Returns how an id is spelt, a special one's too."""
    return self.special().get(i) or self._base.id_to_token(i)

  def special(self) -> dict[int, str]:
    """The special tokens by id; one whose spelling was taken has a number behind it."""
    return dict(enumerate(self._names, self.size))

  def to_json(self) -> dict[str, Any]:
    """The tokenizer.json of an export: our tokens at their ids, BOS as in training.

    All added tokens are special, so that `split_special_tokens` makes each plain text.
    """
    held = _plain(self._kept)[0]
    flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
    held['added_tokens'] += [{'id': i, 'content': name, **flags, 'special': True}
                             for i, name in self.special().items()]
    held['post_processor'] = tokenizer_files.template({self.text(i): i for i in self.start})
    return held

  def save(self, path: str | pathlib.Path) -> None:
    """Writes the tokenizer that was given as a tokenizer.json, whole or not at all."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    temporary.write_text(self._kept, encoding='utf-8')
    os.replace(temporary, path)


def _failed(error: BaseException, what: str) -> BaseException:
  """An error of the library as ours; a panic of its Rust is no Exception."""
  if isinstance(error, Exception) or type(error).__name__ == 'PanicException':
    return InputError(f'the tokenizer {what}: {" ".join(str(error).split())[:300]}; expected '
                      'text in UTF-8, and a sound tokenizer.json')
  return error


def _spellings(name: str) -> Iterator[str]:
  """<m>, <m_1>, <m_2> …"""
  yield name
  yield from (f'{name[:-1]}_{k}>' for k in itertools.count(1))


def _plain(text: str) -> tuple[dict[str, Any], list[str]]:
  """A tokenizer.json that does nothing beyond its vocabulary, without our special tokens, and
  the names of those in it."""
  held = json.loads(text)
  held['added_tokens'], names = _without_ours(held)
  for token in held['added_tokens']:
    token['special'] = True  # or it would match in text
  held['truncation'] = held['padding'] = None
  if 'dropout' in held['model']:
    held['model']['dropout'] = None  # a text has one encoding
  return held, names


def _without_ours(held: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
  """Added tokens without our special ones, and the names of those, [] where there are none:
  they end the vocabulary where `export` wrote it."""
  added = sorted(held.get('added_tokens') or (), key=lambda t: t['id'])
  steps = len(added)
  while steps and re.fullmatch(r'<step_\d+(_\d+)?>', added[steps - 1]['content']):
    steps -= 1
  first = max(0, steps - len(SPECIAL))
  ours = added[first:]
  at = tokenizer_trial.entries({**held, 'added_tokens': added[:first]})
  size = max(at.values(), default=-1) + 1
  if steps - first == len(SPECIAL) and all(
      re.fullmatch(rf'{name[:-1]}(_\d+)?>', token['content'])
      for name, token in zip(SPECIAL, added[first:steps], strict=True)) and (
          [t['id'] for t in ours] == list(range(size, size + len(ours)))):
    return added[:first], [t['content'] for t in ours]
  return added, []


def build(config: TokenizerConfig, texts: Callable[[], Iterable[str]],
          path: str | pathlib.Path, index_tokens: int) -> Tokenizer:
  """Returns the tokenizer kept at `path`, or makes it and keeps it there.

  Args:
    config: what to make.
    texts: returns the training texts; called only where they are needed.
    path: tokenizer.json of the working directory; what is there is never remade.
    index_tokens: how many <step_t> tokens to have.

  Raises:
    InputError: a file that is missing or no tokenizer, or a vocabulary too small for bytes.
  """
  path = pathlib.Path(path)
  if path.exists():
    text = tokenizer_files.checked(path, 'delete it, and it is made again')
  elif config.kind == 'file':
    text = tokenizer_files.read(config.path, config.add_bos)
  else:
    text = {'char': _characters, 'bpe': _bpe}[config.kind](config, texts()).to_str()
  tokenizer = Tokenizer(text, index_tokens, config.pad_to, config.at_least, config.add_bos)
  if not path.exists():
    tokenizer.save(path)
  return tokenizer


def _characters(config: TokenizerConfig, texts: Iterable[str]) -> tokenizers.Tokenizer:
  """Every character of printable ASCII, the newline and the texts is an entry."""
  del config
  characters = set(ASCII).union(*texts)
  vocabulary = {c: i for i, c in enumerate([UNKNOWN, *sorted(characters)])}
  base = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
  base.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r'[\s\S]'), 'isolated')
  base.decoder = decoders.Fuse()  # without one, tokens are joined by spaces
  return base


def _bpe(config: TokenizerConfig, texts: Iterable[str]) -> tokenizers.Tokenizer:
  """Byte-level BPE in which every digit is a token of its own."""
  if config.vocab_size < BYTES:
    raise InputError(f'config.tokenizer.vocab_size is {config.vocab_size}; expected at '
                     f'least {BYTES}, one entry for each byte')
  base = tokenizers.Tokenizer(models.BPE())
  base.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False)])
  base.decoder = decoders.ByteLevel()
  base.train_from_iterator(texts, trainers.BpeTrainer(
      vocab_size=config.vocab_size, show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  return base
