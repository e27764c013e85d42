"""One tokenizer for all kinds: characters, trained byte-level BPE, or a given file.

Our special tokens lie above the base vocabulary, at ids that the base tokenizer
does not know, so no text can produce one, not even its literal spelling.
"""

import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from latent_reasoning.config import TokenizerConfig
from latent_reasoning.errors import InputError, local_path

SPECIAL = ('<pad>', '<end>', '<b>', '<m>', '</b>', '<pause>')

# Two characters at least, so that no character is spelt like it.
UNKNOWN = '<unk>'

BYTES = 256  # entries that a byte-level vocabulary begins with


class Tokenizer:
  """Text to ids below `size`, beside special ids from `size` on.

  Attributes:
    size: entries of the base vocabulary.
    known: entries that weights with this tokenizer know: `size`, or with our special
      tokens, where the file is of an exported model.
    index_tokens: how many <step_t> there are.
    vocab_size: base and special entries, padded to a multiple of `pad_to`.
    pad, end, block_open, memory, block_close, pause: ids of `SPECIAL`.
  """

  def __init__(self, base: tokenizers.Tokenizer, index_tokens: int, pad_to: int,
               at_least: int = 0):
    """Wraps `base`, and switches off what it would do beyond its vocabulary.

    Raises:
      InputError: the base vocabulary has an entry spelt like a special token, and is no
        tokenizer that `export` wrote.
    """
    ours = (*SPECIAL, *(f'<step_{t + 1}>' for t in range(index_tokens)))
    self._kept, base = base, _without(base, ours)
    vocabulary = base.get_vocab(with_added_tokens=True)
    for token in ours:
      if token in vocabulary:
        raise InputError(
            f"the tokenizer already has an entry '{token}'; expected none spelt like "
            'our special tokens; rename the entry in its tokenizer.json')
    base.no_padding()
    base.no_truncation()
    base.encode_special_tokens = True  # its own specials are plain text, too
    self._base = base
    # Steps and answers repeat: looking one up is a hundred times faster.
    self._known = functools.lru_cache(1 << 14)(lambda text: tuple(self.encode(text)))
    self.size = max(vocabulary.values()) + 1  # ids may have gaps
    self.known = self.size + len(ours) * (self._kept is not base)
    self.index_tokens = index_tokens
    used = max(self.size + len(SPECIAL) + index_tokens, at_least)
    self.vocab_size = -(-used // pad_to) * pad_to
    (self.pad, self.end, self.block_open, self.memory, self.block_close,
     self.pause) = range(self.size, self.size + len(SPECIAL))

  @functools.cached_property
  def fingerprint(self) -> str:
    """A hash of what the tokenizer does."""
    return hashlib.blake2b(f'{self._base.to_str()} {self.special()}'.encode(),
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
    """Returns ids, all below `size`."""
    return self._base.encode(text, add_special_tokens=False).ids

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of each text."""
    return [list(self._known(t)) for t in texts]

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of `ids`; special and padding ids have none."""
    return self._base.decode([int(i) for i in ids if i < self.size])

  def special(self) -> dict[int, str]:
    """The special tokens by id."""
    names = (*SPECIAL, *(f'<step_{t + 1}>' for t in range(self.index_tokens)))
    return dict(enumerate(names, self.size))

  def to_json(self) -> str:
    """The base tokenizer as the text of a tokenizer.json."""
    return self._base.to_str()

  def save(self, path: str | pathlib.Path) -> None:
    """Writes the tokenizer that was given as a tokenizer.json, whole or not at all."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    temporary.write_text(self._kept.to_str(), encoding='utf-8')
    os.replace(temporary, path)


def _without(base: tokenizers.Tokenizer, ours: Sequence[str]) -> tokenizers.Tokenizer:
  """A tokenizer without our special tokens, if they stand where `export` puts them."""
  at = [base.token_to_id(t) for t in ours]
  first = at[0]
  if first is None or at != list(range(first, first + len(ours))):
    return base
  text = json.loads(base.to_str())
  text['added_tokens'] = [t for t in text['added_tokens'] if t['content'] not in ours
                          and not re.fullmatch(r'<step_\d+>', t['content'])]
  stripped = tokenizers.Tokenizer.from_str(json.dumps(text))
  last = max(stripped.get_vocab(with_added_tokens=True).values())
  return stripped if last + 1 == first else base


def build(config: TokenizerConfig, texts: Callable[[], Iterable[str]],
          path: str | pathlib.Path, index_tokens: int) -> Tokenizer:
  """Returns the tokenizer kept at `path`, or makes it and keeps it there.

  Args:
    config: what to make.
    texts: returns the training texts; called only where they are needed.
    path: tokenizer.json of the working directory; what is there is never remade.
    index_tokens: how many <step_t> tokens to have.

  Raises:
    InputError: a file that is missing or no tokenizer, a vocabulary too small for
      bytes, or a base entry spelt like a special token.
  """
  path = pathlib.Path(path)
  if path.exists():
    base = _read(path, 'delete it, and it is made again')
  elif config.kind == 'file':
    base = _read(local_path(config.path, 'config.tokenizer.path'),
                 'set config.tokenizer.path to a tokenizer.json')
  else:
    base = {'char': _characters, 'bpe': _bpe}[config.kind](config, texts())
  tokenizer = Tokenizer(base, index_tokens, config.pad_to, config.at_least)
  if not path.exists():
    tokenizer.save(path)
  return tokenizer


def _read(path: pathlib.Path, remedy: str) -> tokenizers.Tokenizer:
  try:
    text = path.read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError) as e:
    reason = getattr(e, 'strerror', None) or 'not UTF-8 text'
    raise InputError(f'{path}: cannot be read, {reason}; expected a tokenizer.json; '
                     f'{remedy}') from e
  try:
    return tokenizers.Tokenizer.from_str(text)
  except Exception as e:  # the library raises nothing narrower
    raise InputError(f'{path}: found no tokenizer, {e}; expected a tokenizer.json of '
                     f'the library `tokenizers`; {remedy}') from e


def _characters(config: TokenizerConfig, texts: Iterable[str]) -> tokenizers.Tokenizer:
  """Every character of printable ASCII, the newline and the texts is an entry."""
  del config
  characters = {'\n', *map(chr, range(32, 127))}.union(*texts)
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
