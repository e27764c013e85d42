"""Use of a tokenizer.json in a process of its own, where its memory and time are bounded.

A tokenizer.json is a program: a regular expression may search for ever, a replacement grow
without bound, and what the library allocates or overflows ends the process. `tokenizer_files`
runs this file as a script with the text as its input; it imports nothing of the package.
"""

import json
import os
import sys
from typing import Any

SECONDS, BYTES = 8, 1_700_000_000  # of computing; of address space
MOST_ID, MOST_CHARACTERS = 1 << 22, 4096  # of a vocabulary; of one entry
ASCII = ''.join(map(chr, range(32, 127)))
# Runs, and behind them what does not belong to them: there an expression begins to search.
PROBES = ['', 'Ada has 12 apples; café “naïve” 漢字 🙂 e\u0301\u200b\u00a0 3.5*4 = 14\n',
          *(run + end for run in (*(c * 64 for c in ASCII), 'ab' * 40, 'a1' * 40, 'word ' * 40)
            for end in ('!' + ASCII, '\n' + ASCII, '!'))]


def entries(held: dict[str, Any]) -> dict[str, int]:
  """Ids of a tokenizer.json by their text, those of added tokens included."""
  vocabulary = held['model']['vocab']
  if isinstance(vocabulary, list):  # of Unigram: [text, score] each
    vocabulary = {piece[0]: i for i, piece in enumerate(vocabulary)}
  return {**vocabulary, **{t['content']: t['id'] for t in held.get('added_tokens') or ()}}


def bounds(found: dict[str, int]) -> None:
  """Raises ValueError for a vocabulary that is empty, that has an id twice, or whose entries or
  ids are too large."""
  if not found:
    raise ValueError('the vocabulary is empty')
  others = {}
  for text, i in found.items():
    if type(i) is not int or not 0 <= i < MOST_ID:
      raise ValueError(f'the entry {text[:60]!r} has the id {i!r}; ids go from 0 to '
                       f'{MOST_ID - 1:,}')
    if others.setdefault(i, text) != text:
      raise ValueError(f'the entries {others[i][:60]!r} and {text[:60]!r} have the same id {i}')
    if len(text) > MOST_CHARACTERS:
      raise ValueError(f'the entry {text[:60]!r}… has {len(text):,} characters; at most '
                       f'{MOST_CHARACTERS:,}')


def use(text: str) -> None:
  """All that the package asks of a tokenizer."""
  import tokenizers
  try:
    found = entries(json.loads(text))
  except RecursionError:
    raise ValueError('its JSON is too deep') from None
  except (TypeError, KeyError, AttributeError, IndexError):
    found = None  # the library says it better
  if found is not None:
    bounds(found)
  base = tokenizers.Tokenizer.from_str(text)
  if not base.get_vocab_size(with_added_tokens=False):
    raise ValueError('the vocabulary is empty')
  base.no_padding()
  base.no_truncation()
  base.encode('a')
  base.encode_special_tokens = True
  for probe in PROBES:
    base.decode(base.encode(probe, add_special_tokens=False).ids)
  base.to_str()


def main() -> int:
  """0, or 1 with the reason on standard output."""
  import resource
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
  resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
  try:
    use(sys.stdin.buffer.read().decode())
  except BaseException as error:  # a panic of its Rust is no Exception
    print(' '.join(f'{error}'.split())[:300] or type(error).__name__)
    return 1
  return 0


if __name__ == '__main__':
  status = main()
  sys.stdout.flush()
  os._exit(status)  # to free a tokenizer may take long, or overflow the stack
