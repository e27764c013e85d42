"""Tokenizers of others: read from the files there are, and tried before they are used.

| files                  | read by                                            |
|------------------------|----------------------------------------------------|
| tokenizer.json         | `tokenizers`                                       |
| tokenizer.model        | `transformers`, compared with `sentencepiece`      |
| vocab.json, merges.txt | `transformers`                                     |
| FILE.gguf              | gguf_file                                          |
"""

import hashlib
import importlib
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import tokenizers

from latent_reasoning.data import gguf_file, storage, tokenizer_trial
from latent_reasoning.errors import InputError

MOST_BYTES = 64 << 20  # of a tokenizer.json; the largest that we know has 33 MB
KNOWN = 'tokenizer.json', 'tokenizer.model', 'vocab.json'  # the first that is there is read
# What is read of a folder at an address: those, and what stands beside them.
FILES = (*KNOWN, 'merges.txt', 'tokenizer_config.json', 'special_tokens_map.json',
         'config.json')
# Where nothing says whose tokenizer the old files are.
FALLBACK = {'tokenizer.model': 'LlamaTokenizerFast', 'vocab.json': 'GPT2TokenizerFast'}
ALLOCATOR = 'MALLOC_', 'GLIBC_'  # of this process, where it reserves address space
COMPARED = ('Ada has 12 apples; café “naïve” 漢字 🙂 3.5*4 = 14\n', '<s> <think>[INST] a_b\n')


def read(path: str, add_bos: str) -> str:
  """The text of a tokenizer.json.

  Args:
    path: a folder, or one of the files above, by path or address.
    add_bos: config.tokenizer.add_bos; with 'true', it puts BOS in front of a text.

  Raises:
    InputError: there is none, it is none, a library is missing, or no BOS is named.
  """
  given = storage.fetch(path, 'config.tokenizer.path', FILES)
  file = given
  if given.is_dir():
    file = next((given / name for name in KNOWN if (given / name).is_file()), None)
    if file is None:
      raise InputError(f'{given} has no tokenizer.json, tokenizer.model, or vocab.json with '
                       'merges.txt; expected one of them, or another folder or file in '
                       '--config.tokenizer.path=…')
  if file.name in FALLBACK:
    text = _convert(file)
  elif file.suffix == '.gguf':
    text = _of_gguf(file, add_bos)
  else:
    text = checked(file, 'set config.tokenizer.path to a tokenizer.json')
  return _with_bos(text, file) if add_bos == 'true' else text


def checked(path: pathlib.Path, remedy: str) -> str:
  """The text of a tokenizer.json that was tried.

  Raises:
    InputError: it cannot be read or used; ends with the remedy.
  """
  expected = f'expected a tokenizer.json of the library `tokenizers`; {remedy}'
  try:
    if path.stat().st_size > MOST_BYTES:
      raise InputError(f'{path}: has {path.stat().st_size:,} bytes, more than {MOST_BYTES:,}; '
                       f'{expected}')
    text = path.read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError) as error:
    reason = getattr(error, 'strerror', None) or 'not UTF-8 text'
    raise InputError(f'{path}: cannot be read, {reason}; {expected}') from error
  if reason := _try(text):
    raise InputError(f'{path}: found no tokenizer that can be used, {reason}; {expected}')
  return text


_tried: dict[bytes, str] = {}


def _try(text: str) -> str:
  """Why a tokenizer.json cannot be used; ''. Each text is tried once in a process."""
  key = hashlib.blake2b(text.encode(errors='surrogateescape')).digest()
  if key not in _tried:
    try:
      done = subprocess.run(
          [sys.executable, '-P', tokenizer_trial.__file__], input=text.encode(),
          capture_output=True, timeout=10 * tokenizer_trial.SECONDS,
          env={**{k: v for k, v in os.environ.items() if not k.startswith(ALLOCATOR)},
               'TOKENIZERS_PARALLELISM': 'false', 'RUST_BACKTRACE': '0'})
      reason = done.stdout.decode(errors='replace').strip()
      status = done.returncode
    except subprocess.TimeoutExpired:
      status, reason = -24, ''
    if status in (-24, -9):  # SIGXCPU, SIGKILL
      reason = f'it takes more than {tokenizer_trial.SECONDS} s to read and use'
    elif status < 0:
      reason = (f'it takes more than {tokenizer_trial.BYTES / 1e9:.1f} GB to read and use, or '
                'overflows the stack')
    _tried[key] = (reason or 'the library failed') if status else ''
  return _tried[key]


def _convert(file: pathlib.Path) -> str:
  """A tokenizer.json from a tokenizer.model, or from vocab.json and merges.txt."""
  if file.name == 'vocab.json':
    if not file.with_name('merges.txt').is_file():
      raise InputError(f'{file} has no merges.txt beside it; expected both, or tokenizer.json')
    try:
      tokenizer_trial.bounds(json.loads(file.read_text(encoding='utf-8')))
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
      raise InputError(f'{file}: found no vocabulary, {error}; expected an object of ids by '
                       'text') from None
  try:
    transformers = importlib.import_module('transformers')
    if file.name == 'tokenizer.model':
      sentencepiece = importlib.import_module('sentencepiece')
      importlib.import_module('google.protobuf')
    named = [f for f in ('config.json', 'tokenizer_config.json') if file.with_name(f).is_file()]
    kind = 'AutoTokenizer' if named else FALLBACK[file.name]
    # Versions differ in this default; Llama itself has True.
    bos = {'add_bos_token': _beside(file, 'tokenizer_config.json').get('add_bos_token', True)}
    made = getattr(transformers, kind).from_pretrained(
        str(file.parent), local_files_only=True,
        **(bos if file.name == 'tokenizer.model' else {})).backend_tokenizer
    if file.name == 'tokenizer.model':
      theirs = sentencepiece.SentencePieceProcessor(model_file=str(file))
      made.encode_special_tokens = True
      for text in COMPARED:
        ids = made.encode(text, add_special_tokens=False).ids
        if ids != theirs.encode(text):
          raise InputError(
              f'{file}: transformers {transformers.__version__} reads {text!r} as {ids}, '
              f'sentencepiece as {theirs.encode(text)}; expected a sound tokenizer.json')
  except ImportError as error:
    raise InputError(f'{file} needs a library, {error.name or error}: pip install -e '
                     "'.[hf]', or a tokenizer.json beside it") from None
  except InputError:
    raise
  except Exception as error:  # they raise what they like
    reason = ' '.join(str(error).split())[:300]
    raise InputError(f'{file}: found no tokenizer that transformers can read, {reason}; '
                     'expected a tokenizer.json') from None
  text = made.to_str()
  if reason := _try(text):
    raise InputError(f'{file}: found no tokenizer that can be used, {reason}; expected a '
                     'tokenizer.json')
  return text


def _of_gguf(file: pathlib.Path, add_bos: str) -> str:
  """A tokenizer.json from the metadata of a GGUF."""
  held, bos = gguf_file.tokenizer(file, add_bos == 'true')
  text = json.dumps({**held, 'post_processor': template(bos)}, ensure_ascii=False)
  if reason := _try(text):
    raise InputError(f'{file}: found no tokenizer that can be used, {reason}; give its '
                     'tokenizer.json with --config.tokenizer.path=FILE')
  return text


def begins(base: tokenizers.Tokenizer) -> list[int]:
  """The ids that its post-processor puts in front of a text."""
  found = base.encode('a')
  count = (found.special_tokens_mask + [0]).index(0)
  return found.ids[:count]


def template(tokens: dict[str, int]) -> dict[str, Any] | None:
  """The post-processor that puts tokens in front of a text; None: there are none."""
  if not tokens:
    return None
  def line(*sequences):
    return [part for kind, letter in enumerate(sequences) for part in (
        *({'SpecialToken': {'id': t, 'type_id': kind}} for t in tokens),
        {'Sequence': {'id': letter, 'type_id': kind}})]
  return {'type': 'TemplateProcessing', 'single': line('A'), 'pair': line('A', 'B'),
          'special_tokens': {t: {'id': t, 'ids': [i], 'tokens': [t]}
                             for t, i in tokens.items()}}


def _with_bos(text: str, file: pathlib.Path) -> str:
  """A tokenizer.json that puts BOS in front: its own, or the one that files beside it name."""
  if begins(tokenizers.Tokenizer.from_str(text)):
    return text
  held = json.loads(text)
  found = tokenizer_trial.entries(held)
  for name in ('tokenizer_config.json', 'special_tokens_map.json'):
    token = _beside(file, name).get('bos_token')
    token = token.get('content') if isinstance(token, dict) else token
    if isinstance(token, str) and token in found:
      break
  else:
    number = _beside(file, 'config.json').get('bos_token_id')
    token = next((t for t, i in found.items() if type(number) is int and i == number), None)
    if token is None:
      raise InputError(
          f"config.tokenizer.add_bos is 'true', but no file beside {file} names a BOS that it "
          "has; expected bos_token in tokenizer_config.json, or add_bos 'auto' or 'false'")
  held['post_processor'] = template({token: found[token]})
  return json.dumps(held, ensure_ascii=False)


def _beside(file: pathlib.Path, name: str) -> dict[str, Any]:
  """A JSON object beside a file; {} where there is none."""
  path = file.with_name(name)
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    return {}
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(f'{path}: found no JSON, {error}; restore it') from None
  if not isinstance(found, dict):
    raise InputError(f'{path}: found a {type(found).__name__}; expected an object')
  return found
