"""Files of llama.cpp (GGUF): opened by the package `gguf`, and the tokenizer in them.

Read is byte-level BPE, whose pre-tokenizer a file says by a name alone; what each name splits
is llama.cpp's table (src/llama-vocab.cpp), and in the words of the library `tokenizers` what
the models' own tokenizer.json have.
"""

import dataclasses
import functools
import pathlib
from typing import Any

from latent_reasoning.errors import InputError, ensure

MAGIC = b'GGUF'
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # of tokenizer.ggml.token_type


@dataclasses.dataclass(frozen=True)
class GgufFile:
  """What a file holds.

  Attributes:
    values: the metadata, by key.
    tensors: of gguf.GGUFReader, by llama.cpp's names; mapped, not read.
  """
  values: dict[str, Any]
  tensors: dict[str, Any]


def opened(path: pathlib.Path) -> GgufFile:
  """A sound file, all of whose tensors can be dequantized.

  Raises:
    InputError: the library is missing, or the file is none, cut off, in parts, or quantized
      in a way that the library does not know.
  """
  try:
    found = path.stat()
  except OSError as error:
    raise InputError(f'{path} cannot be read, {error.strerror}; expected a GGUF file') from None
  return _opened(path, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=2)  # thousands of tokens are parsed one by one
def _opened(path: pathlib.Path, size: int, changed: int) -> GgufFile:
  del size, changed  # another file is read again
  with path.open('rb') as file:
    start = file.read(len(MAGIC))
  ensure(start == MAGIC, f'{path} is no GGUF: it begins with {start!r}, not {MAGIC!r}; '
         'expected one, or a directory with config.json and *.safetensors')
  gguf = library(path)
  try:
    reader = gguf.GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
  except Exception as error:  # it checks little, and raises what comes
    why = ' '.join(str(error).split())[:200] or type(error).__name__
    if 'GGMLQuantizationType' in why:
      raise InputError(_unknown(path, f'a number of its own ({why})')) from None
    raise InputError(f'{path} is no sound GGUF ({why}); it may be cut off: download it '
                     'again') from None
  parts = values.get('split.count', 0)
  ensure(parts in (0, 1), f'{path} is one of {parts} parts of a model; expected one file: '
         'llama-gguf-split --merge')
  for kind in {tensor.tensor_type: tensor for tensor in tensors.values()}.values():
    try:
      gguf.quants.dequantize(kind.data.reshape(-1, kind.data.shape[-1])[:1], kind.tensor_type)
    except NotImplementedError:
      raise InputError(_unknown(path, kind.tensor_type.name)) from None
  return GgufFile(values, tensors)


def library(path: pathlib.Path) -> Any:
  """The package gguf; InputError where it is missing."""
  try:
    import gguf
  except ImportError as error:
    raise InputError(f'{path} needs a library, {error.name}: pip install -e '
                     "'.[gguf]'") from None
  return gguf


def _unknown(path: pathlib.Path, kind: str) -> str:
  return (f'{path} is quantized by {kind}, which the package gguf cannot dequantize; expected '
          'F32, F16, BF16, Q8_0, Q4_K_M or the like; get such a file, or a newer gguf')


# --- its tokenizer ------------------------------------------------------------


def _level(use_regex: bool) -> dict[str, Any]:
  return {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True,
          'use_regex': use_regex}


def _split(digits: str) -> list[dict[str, Any]]:
  """The expression of Llama 3 and Qwen 2, which differ in how many digits make a token."""
  pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits
             + r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+')
  return [{'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated',
           'invert': False}, _level(False)]


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
  """What tokenizer.ggml.pre names.

  Attributes:
    parts: the pre-tokenizers, as tokenizer.json has them.
    nfc: whether text is composed first.
    whole: whether a word that is an entry is one token, whatever merges say.
    bos: whether BOS is put in front where the file does not say.
  """
  parts: list[dict[str, Any]]
  nfc: bool = False
  whole: bool = False
  bos: bool = False


PRE = {
    'gpt-2': PreTokenizer([_level(True)]),
    'smollm': PreTokenizer([{'type': 'Digits', 'individual_digits': True}, _level(True)]),
    'llama-bpe': PreTokenizer(_split(r'\p{N}{1,3}'), whole=True, bos=True),
    'qwen2': PreTokenizer(_split(r'\p{N}'), nfc=True)}


def tokenizer(path: pathlib.Path, add_bos: bool) -> tuple[dict[str, Any], dict[str, int]]:
  """A tokenizer.json without post-processor, and {BOS: its id} where a text begins with it.

  Args:
    path: of a GGUF.
    add_bos: begins with it whatever the file says.

  Raises:
    InputError: as `opened`, or its kind or pre-tokenizer is not known here.
  """
  values = opened(path).values
  def get(name, default=None):
    return values.get(f'tokenizer.ggml.{name}', default)
  remedy = 'give its tokenizer.json with --config.tokenizer.path=FILE'
  kind, pre = get('model'), get('pre')
  ensure(kind == 'gpt2', f"{path} has a tokenizer of the kind {kind!r}; read is 'gpt2', which "
         f'is byte-level BPE; {remedy}')
  ensure(pre in PRE, f'{path} has a tokenizer with the pre-tokenizer {pre!r}; known are '
         f'{tuple(PRE)}; {remedy}')
  pre, tokens, merges = PRE[pre], get('tokens'), get('merges')
  ensure(isinstance(tokens, list) and isinstance(merges, list),
         f'{path} has no lists tokenizer.ggml.tokens and merges; {remedy}')
  kinds = get('token_type') or [NORMAL] * len(tokens)
  ensure(len(kinds) == len(tokens), f'{path} has {len(tokens):,} tokens, but the kinds of '
         f'{len(kinds):,}; {remedy}')
  entries = {token: i for i, (token, k) in enumerate(zip(tokens, kinds, strict=True))
             if k != UNUSED}  # llama.cpp's converter fills the table up with those
  flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
  held = {
      'version': '1.0', 'truncation': None, 'padding': None,
      'added_tokens': [{'id': i, 'content': token, **flags, 'special': kinds[i] == CONTROL}
                       for token, i in entries.items() if kinds[i] in (CONTROL, USER_DEFINED)],
      'normalizer': {'type': 'NFC'} if pre.nfc else None,
      'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': pre.parts},
      'post_processor': None, 'decoder': _level(True),
      'model': {'type': 'BPE', 'dropout': None, 'unk_token': None,
                'continuing_subword_prefix': None, 'end_of_word_suffix': None,
                'fuse_unk': False, 'byte_fallback': False, 'ignore_merges': pre.whole,
                'vocab': entries, 'merges': [merge.split(' ', 1) for merge in merges]}}
  bos = get('bos_token_id')
  begins = (add_bos or get('add_bos_token', pre.bos)) and isinstance(bos, int) and (
      0 <= bos < len(tokens) and kinds[bos] != UNUSED)
  return held, {tokens[bos]: bos} if begins else {}
