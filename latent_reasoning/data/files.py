"""Data files, recognised by what is in them.

| form     | what a row is                                        | known from          |
|----------|------------------------------------------------------|---------------------|
| gsm8k    | JSON: question, answer (`<<3*4=12>>` …, `#### 12`)   | openai/gsm8k        |
| icot     | text: `question||<<3*4=12>> <<12+1=13>> #### 13`     | GSM8K-Aug, iCoT     |
| coconut  | an item, question, steps, answer, of one JSON list   | Coconut, ProsQA     |
| steps    | JSON: question, steps, answer                        | own data            |
| gsm_hard | JSON: input, target                                  | reasoning-machines  |

JSON rows but Coconut's stand one on a line. Other keys are ignored.
"""

import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from latent_reasoning.config import DataConfig
from latent_reasoning.data.example import Example, make, normalise, number
from latent_reasoning.errors import InputError

KNOWN = ("JSON lines with question and answer (GSM8K), with question, steps and answer, "
         'or with input and target (GSM-Hard); a JSON list of question, steps and answer '
         "(Coconut, ProsQA); or lines 'question||<<3+4=7>> #### 7' (iCoT, GSM8K-Aug)")

_ANNOTATION = re.compile(r'<<((?:(?!<<|>>).)*)>>', re.DOTALL)
_EQUATION = re.compile(r'(?=.*\d)[-+*/^%().,$\d\s]+=[-+*/^%().,$\d\s]+')


def from_gsm8k(row: Any, config: DataConfig) -> Example:
  """Converts OpenAI's form: steps are equations, or lines without annotations."""
  question, answer = _text(row, 'question'), _text(row, 'answer')
  if '####' not in answer:
    raise InputError(f"found an answer without '####', {_short(answer)}; expected it to "
                     "end in '#### 7', or a field 'steps' beside the answer")
  body, _, answer = answer.rpartition('####')
  equations, bare = _annotations(body)
  if config.steps == 'sentences':
    return make(question, bare.split('\n'), answer)
  return make(question, [_mark(e, config) for e in equations], answer)


def from_icot(line: str, config: DataConfig) -> Example:
  """Converts a line of the iCoT form."""
  question, bars, rest = line.rpartition('||')
  if not bars:
    raise InputError(f"found a line without '||', {_short(line)}; expected "
                     "'question||<<3+4=7>> #### 7'")
  if '####' not in rest:
    raise InputError(f"found a line without '####' after '||', {_short(rest)}; expected "
                     "'question||<<3+4=7>> #### 7'")
  body, _, answer = rest.rpartition('####')
  equations, bare = _annotations(body)
  if bare.strip():
    raise InputError(f'found text outside << >>, {_short(bare)}; expected equations '
                     "alone between '||' and '####'")
  return make(question, [_mark(e, config) for e in equations], answer)


def from_steps(row: Any, config: DataConfig) -> Example:
  """Converts question, steps and answer; a step may be an equation or a sentence."""
  question, steps = _text(row, 'question'), _field(row, 'steps')
  if not isinstance(steps, list) or not all(isinstance(s, str) for s in steps):
    raise InputError(f'found steps {_short(steps)}; expected a list of strings')
  rendered = []
  for step in steps:
    equations, bare = _annotations(step)
    if equations and not bare.strip():
      rendered += [_mark(e, config) for e in equations]
    else:
      rendered.append(_mark(bare, config) if _EQUATION.fullmatch(bare) else bare)
  return make(question, rendered, _value(row, 'answer'))


def from_target(row: Any, config: DataConfig) -> Example:
  """Converts input and target, which have no steps."""
  del config
  return make(_text(row, 'input'), (), _value(row, 'target'))


CONVERTERS = {'gsm8k': from_gsm8k, 'icot': from_icot, 'coconut': from_steps,
              'steps': from_steps, 'gsm_hard': from_target}


def read(path: str | pathlib.Path, config: DataConfig) -> tuple[list[Example], dict]:
  """Reads one file of any known form.

  Args:
    path: the file; a leading ~ is the home directory.
    config: `steps`, `step_marks` and `on_error` are used.

  Returns:
    The examples in the file's order, and a report: path, form, read (examples),
    skipped (malformed rows) and first_error (the message of the first of those).

  Raises:
    InputError: no such file, an unknown form, no usable row, or, unless
      config.on_error is 'skip', a malformed row.
  """
  path = pathlib.Path(path).expanduser()
  if path.is_dir():
    raise InputError(f'{path}: found a directory; expected a file; name one inside it')
  try:
    content = path.read_bytes()
  except FileNotFoundError as e:
    raise InputError(f'{path}: found no such file; expected a data file; check '
                     'config.data.dir, train, valid and test') from e
  except OSError as e:
    raise InputError(f'{path}: cannot be read, {e.strerror}; expected a readable '
                     'file; check its permissions') from e
  content = content.removeprefix(b'\xef\xbb\xbf')
  if not content.strip():
    raise InputError(f'{path}: found an empty file; expected {KNOWN}')
  if content.lstrip().startswith(b'['):
    return collect(_items(path, content), from_steps, config, str(path), 'coconut')
  lines = [(f'{path}:{n}', line.strip())
           for n, line in enumerate(content.split(b'\n'), 1) if line.strip()]
  form = _recognise(path, lines)
  parse = _decode if form == 'icot' else lambda line: _json(_decode(line))
  return collect(lines, lambda line, c: CONVERTERS[form](parse(line), c), config,
                 str(path), form)


def collect(rows: Iterable[tuple[str, Any]], convert: Callable[[Any, DataConfig], Example],
            config: DataConfig, path: str, form: str) -> tuple[list[Example], dict]:
  """Converts rows, each with its place, under config.on_error; see `read`."""
  examples, skipped, first = [], 0, ''
  for place, row in rows:
    try:
      examples.append(convert(row, config))
    except InputError as e:
      if config.on_error != 'skip':
        raise InputError(f"{place}: {e}; correct it, or set config.data.on_error='skip'"
                         ) from e
      skipped, first = skipped + 1, first or f'{place}: {e}'
  if not examples:
    raise InputError(f'{path}: found no usable row, {skipped} malformed, the first '
                     f'{first or "absent"}; expected at least one; correct the file')
  return examples, {'path': path, 'form': form, 'read': len(examples),
                    'skipped': skipped, 'first_error': first}


def _recognise(path: pathlib.Path, lines: list[tuple[str, bytes]]) -> str:
  if 2 * sum(line.startswith(b'{') for _, line in lines) < len(lines):
    if any(b'||' in line or b'####' in line for _, line in lines):
      return 'icot'
    raise InputError(f'{path}: found an unrecognised form, {_short(lines[0][1])}; '
                     f'expected {KNOWN}; convert the file to one of them')
  error, keys = '', None
  for place, line in lines:
    try:
      row = _json(_decode(line))
    except InputError as e:
      error = error or f'{place}: {e}; correct it'
      continue
    if not isinstance(row, dict):
      continue
    keys = keys or sorted(row)
    for form, known in (('steps', {'question', 'steps'}), ('gsm8k', {'question'}),
                        ('gsm_hard', {'input'})):
      if known <= row.keys():
        return form
  if keys is None and error:
    raise InputError(error)
  raise InputError(f'{path}: found an unrecognised form, JSON with the keys {keys}; '
                   f'expected {KNOWN}; rename the fields')


def _items(path: pathlib.Path, content: bytes) -> Iterator[tuple[str, Any]]:
  """Yields the items of a JSON list, each with the line on which it begins."""
  try:
    text = content.decode()
  except UnicodeDecodeError as e:
    line = content.count(b'\n', 0, e.start) + 1
    raise InputError(f'{path}:{line}: {_not_utf8(e)}; convert the file') from e
  decoder, space, line, counted = json.JSONDecoder(), re.compile(r'\s*'), 1, 0
  at = space.match(text, text.index('[') + 1).end()
  while text[at:at + 1] != ']' or counted:  # the list may be empty
    line, counted = line + text.count('\n', counted, at), at
    try:
      item, at = decoder.raw_decode(text, at)
    except (ValueError, RecursionError) as e:
      raise InputError(f'{path}:{line}: found invalid JSON, {e}; expected an item of a '
                       'JSON list; correct the file') from e
    yield f'{path}:{line}', item
    at = space.match(text, at).end()
    if text[at:at + 1] == ']':
      break
    if text[at:at + 1] != ',':
      line += text.count('\n', counted, at)
      raise InputError(f"{path}:{line}: found {_short(text[at:at + 40])} after an item; "
                       "expected ',' or ']'; correct the file")
    at = space.match(text, at + 1).end()
  if text[at + 1:].strip():
    line += text.count('\n', counted, at)
    raise InputError(f'{path}:{line}: found text after the JSON list; expected its end; '
                     'correct the file')


def _decode(line: bytes) -> str:
  try:
    return line.decode()
  except UnicodeDecodeError as e:
    raise InputError(_not_utf8(e)) from e


def _not_utf8(error: UnicodeDecodeError) -> str:
  return f'found the byte {error.object[error.start]:#04x}; expected UTF-8 text'


def _json(line: str) -> Any:
  try:
    return json.loads(line)
  except (ValueError, RecursionError) as e:
    raise InputError(f'found invalid JSON, {e}; expected one JSON object on the line'
                     ) from e


def _field(row: Any, key: str) -> Any:
  if not isinstance(row, dict):
    raise InputError(f'found {_short(row)}; expected a JSON object, {{"{key}": …}}')
  if key not in row:
    raise InputError(f"found no field '{key}' among {sorted(row)}; expected it")
  return row[key]


def _text(row: Any, key: str) -> str:
  value = _field(row, key)
  if not isinstance(value, str):
    raise InputError(f"found {_short(value)} as '{key}'; expected a string")
  return value


def _value(row: Any, key: str) -> str:
  value = _field(row, key)
  if isinstance(value, bool) or not isinstance(value, (str, int, float)):
    raise InputError(f"found {_short(value)} as '{key}'; expected a string or a number")
  return number(value)


def _annotations(text: str) -> tuple[list[str], str]:
  """Returns the equations between << and >>, and the text without them."""
  equations = [normalise(e) for e in _ANNOTATION.findall(text)]
  bare = _ANNOTATION.sub('', text)
  for mark in ('<<', '>>'):
    if mark in bare:
      raise InputError(f"found '{mark}' without its partner in {_short(text)}; expected "
                       'annotations such as <<3+4=7>>')
  if '' in equations:
    raise InputError(f'found an empty <<>> in {_short(text)}; expected an equation in it')
  return equations, bare


def _mark(equation: str, config: DataConfig) -> str:
  equation = normalise(equation)
  return f'<<{equation}>>' if config.step_marks else equation


def _short(value: Any) -> str:
  text = value.decode(errors='replace') if isinstance(value, bytes) else value
  text = repr(text)
  return text if len(text) <= 60 else f'{text[:57]}…'
