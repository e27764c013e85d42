r"""Data files, recognised by what is in them.

| form       | what a row is                                        | rule      | known from   |
|------------|------------------------------------------------------|-----------|--------------|
| gsm8k      | question, answer (`<<3*4=12>>` …, `#### 12`)         | numeric   | openai/gsm8k |
| icot       | text: `question||<<3*4=12>> <<12+1=13>> #### 13`     | numeric   | GSM8K-Aug    |
| coconut    | an item, question, steps, answer, of one JSON list   | *         | ProsQA       |
| steps      | question, steps, answer                              | *         | own data     |
| gsm_hard   | input, target (a number)                             | close     | GSM-Hard     |
| pairs      | input, target (text, or a list of right ones)        | free_text | text to text |
| svamp      | Body, Question, Answer                               | numeric   | SVAMP        |
| multiarith | question, final_ans                                  | numeric   | MultiArith   |
| asdiv      | body, question, answer (`9 (apples)`)                | numeric   | ASDiv        |
| math       | problem, solution (`\boxed{…}`), perhaps answer      | latex     | MATH         |
| gpqa       | Question, Correct Answer, Incorrect Answer 1, 2, 3   | letter    | GPQA         |

The rule says how answers are compared (eval.answer_matching; close: numeric_close);
*: numeric where some answer is a number, else text. A row is a JSON object, one on a line or
an item of one list, but for iCoT's. Other keys are ignored.
"""

import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from latent_reasoning.config import DataConfig
from latent_reasoning.data import storage
from latent_reasoning.data.example import Example, is_number, make, normalise, number
from latent_reasoning.errors import InputError

KNOWN = ('JSON lines, or a JSON list, with question and answer (GSM8K), question, steps and '
         'answer (ProsQA), input and target (GSM-Hard, text), Body, Question and Answer '
         '(SVAMP), question and final_ans (MultiArith), body, question and answer (ASDiv), '
         'problem and solution (MATH) or Question and Correct Answer (GPQA); or lines '
         "'question||<<3+4=7>> #### 7' (iCoT, GSM8K-Aug)")

# The form of a JSON row is the first whose keys it has.
KEYS = (('steps', {'question', 'steps'}), ('svamp', {'Body', 'Question'}),
        ('gpqa', {'Question', 'Correct Answer'}), ('multiarith', {'question', 'final_ans'}),
        ('asdiv', {'body', 'question'}), ('math', {'problem', 'solution'}),
        ('gsm8k', {'question'}), ('gsm_hard', {'input'}))
LETTERS = 'ABCD'

_ANNOTATION = re.compile(r'<<((?:(?!<<|>>).)*)>>', re.DOTALL)
_EQUATION = re.compile(r'(?=.*\d)[-+*/^%().,$\d\s]+=[-+*/^%().,$\d\s]+')


def from_gsm8k(row: Any, config: DataConfig) -> Example:
  """Converts OpenAI's form: steps are equations, or lines without annotations."""
  question, answer = _text(row, 'question'), _text(row, 'answer')
  if '####' not in answer:
    raise InputError(f"found an answer without '####', {_short(answer)}; expected it to "
                     "end in '#### 7', or a field 'steps' beside the answer, [] where there "
                     'are none')
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
  """Converts input and target, a number or text, which have no steps."""
  del config
  return make(_text(row, 'input'), (), _value(row, 'target'))


def from_columns(row: Any, config: DataConfig) -> Example:
  """Converts a hub's row by its columns: steps or cot, else OpenAI's two."""
  trace = row.get('steps', row.get('cot'))
  if trace is None:
    return from_gsm8k(row, config)
  if isinstance(trace, str):  # a line holds equations, or one sentence
    trace = trace.split('\n')
  return from_steps({**row, 'steps': trace}, config)


def from_pair(row: Any, config: DataConfig) -> Example:
  """Converts input and target, where target may be a list of right answers."""
  del config
  targets = _field(row, 'target')
  targets = targets if isinstance(targets, list) else [targets]
  if not targets:
    raise InputError("found no 'target' in the list; expected at least one")
  first, *others = [_value({'target': t}, 'target') for t in targets]
  return make(_text(row, 'input'), (), first, others)


def from_svamp(row: Any, config: DataConfig) -> Example:
  """Converts Body, Question and Answer; SVAMP's bodies may lack their full stop."""
  del config
  body = _text(row, 'Body').strip()
  body += '' if body.endswith(('.', '?', '!', ',')) else '.'
  return make(f"{body} {_text(row, 'Question')}", (), _value(row, 'Answer'))


def from_multiarith(row: Any, config: DataConfig) -> Example:
  """Converts question and final_ans."""
  del config
  return make(_text(row, 'question'), (), _value(row, 'final_ans'))


def from_asdiv(row: Any, config: DataConfig) -> Example:
  """Converts body, question and answer, a number and its unit in brackets: `9 (apples)`."""
  del config
  answer = _value(row, 'answer').strip()
  if unit := re.fullmatch(r'([^()\s][^()]*?)\s*\([^()\d]*\)', answer):
    answer = unit[1]
  return make(f"{_text(row, 'body')} {_text(row, 'question')}", (), answer)


def from_math(row: Any, config: DataConfig) -> Example:
  """Converts problem and solution; the answer is a field or the last \\boxed{…}."""
  solution = _text(row, 'solution')
  steps = solution.split('\n') if config.steps == 'sentences' else ()
  answer = _value(row, 'answer') if row.get('answer') is not None else _boxed(solution)
  return make(_text(row, 'problem'), steps, answer)


def _boxed(text: str) -> str:
  """What stands in the last \\boxed{…}, braces inside included."""
  _, found, rest = text.rpartition('\\boxed{')
  depth = 1
  for i, character in enumerate(rest):
    depth += (character == '{') - (character == '}')
    if not depth:
      return rest[:i]
  what = 'an unclosed' if found else 'no'
  raise InputError(f"found {what} '\\boxed{{' in {_short(text)}; expected the answer in it, "
                   "or a field 'answer'")


def from_gpqa(row: Any, config: DataConfig) -> Example:
  """Converts a question with one right and three wrong options to four lettered ones.

  Their order is that of a hash of the question, so it is the same in every file and run.
  """
  del config
  question = _text(row, 'Question')
  options = [_value(row, key) for key in (
      'Correct Answer', *(f'Incorrect Answer {i}' for i in (1, 2, 3)))]
  order = sorted(range(4), key=lambda i: hashlib.blake2b(
      f'{i}/{normalise(question)}'.encode(errors='replace'), digest_size=8).digest())
  lettered = [f'({letter}) {options[i]}' for letter, i in zip(LETTERS, order, strict=True)]
  return make(' '.join([question, *lettered]), (), LETTERS[order.index(0)])


# Form: (converter, rule of its answers; '': by content).
FORMS = {
    'gsm8k': (from_gsm8k, 'numeric'), 'icot': (from_icot, 'numeric'),
    'coconut': (from_steps, ''), 'steps': (from_steps, ''),
    'gsm_hard': (from_target, 'numeric_close'), 'pairs': (from_pair, 'free_text'),
    'svamp': (from_svamp, 'numeric'), 'multiarith': (from_multiarith, 'numeric'),
    'asdiv': (from_asdiv, 'numeric'), 'math': (from_math, 'latex'),
    'gpqa': (from_gpqa, 'letter'), 'hub': (from_columns, 'numeric')}


def read(path: str | pathlib.Path, config: DataConfig) -> tuple[list[Example], dict]:
  """Reads one file of any known form.

  Args:
    path: the file, or its address (data.storage); a leading ~ is the home directory.
    config: `steps`, `step_marks` and `on_error` are used.

  Returns:
    The examples in the file's order, and a report: path, form, rule (how answers are
    compared), read (examples), skipped (malformed rows) and first_error (the message of
    the first of those).

  Raises:
    InputError: no such file, an unknown form, no usable row, or, unless
      config.on_error is 'skip', a malformed row.
  """
  file = storage.fetch(path, 'a data file')
  path = path if storage.is_address(path) else file
  if file.is_dir():
    raise InputError(f'{path}: found a directory; expected a file; name one inside it')
  try:
    content = file.read_bytes()
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
    items = _items(path, content)
    first = list(itertools.islice(items, 1))
    form = next((form_of(row) for _, row in first), '')
    return collect(itertools.chain(first, items), config, str(path),
                   'coconut' if form in ('', 'steps') else form)
  lines = [(f'{path}:{n}', line.strip())
           for n, line in enumerate(content.split(b'\n'), 1) if line.strip()]
  form = _recognise(path, lines)
  parse = _decode if form == 'icot' else lambda line: _json(_decode(line))
  return collect(lines, config, str(path), form, parse=parse)


def collect(rows: Iterable[tuple[str, Any]], config: DataConfig, path: str, form: str,
            parse: Callable[[Any], Any] = lambda row: row) -> tuple[list[Example], dict]:
  """Parses and converts rows, each with its place, under config.on_error; see `read`."""
  convert, rule = FORMS[form]
  examples, skipped, first = [], 0, ''
  for place, row in rows:
    try:
      examples.append(convert(parse(row), config))
    except InputError as e:
      if config.on_error != 'skip':
        raise InputError(f"{place}: {e}; correct it, or set config.data.on_error='skip'"
                         ) from e
      skipped, first = skipped + 1, first or f'{place}: {e}'
  if not examples:
    raise InputError(f'{path}: found no usable row, {skipped} malformed, the first '
                     f'{first or "absent"}; expected at least one; correct the file')
  rule = rule or ('numeric' if any(is_number(e.answer) for e in examples) else 'text')
  return examples, {'path': path, 'form': form, 'rule': rule, 'read': len(examples),
                    'skipped': skipped, 'first_error': first}


def form_of(row: Any) -> str:
  """The form of a JSON row by its keys; '' for none."""
  if not isinstance(row, dict):
    return ''
  form = next((form for form, keys in KEYS if keys <= row.keys()), '')
  target = row.get('target')
  if form == 'gsm_hard' and 'code' not in row and (
      isinstance(target, list) or isinstance(target, str) and not is_number(target.strip())):
    return 'pairs'
  return form


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
    if form := form_of(row):
      return form
    keys = keys or (sorted(row) if isinstance(row, dict) else None)
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
  decoder = json.JSONDecoder(object_pairs_hook=_unique)
  space, line, counted = re.compile(r'\s*'), 1, 0
  at = space.match(text, text.index('[') + 1).end()
  while text[at:at + 1] != ']' or counted:  # the list may be empty
    line, counted = line + text.count('\n', counted, at), at
    try:
      item, at = decoder.raw_decode(text, at)
    except InputError as e:
      raise InputError(f'{path}:{line}: {e}; correct the file') from None
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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """A JSON object whose keys differ: of two values of one key, one would be lost."""
  row = dict(pairs)
  if len(row) < len(pairs):
    twice = next(k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i]))
    raise InputError(f"found the key '{twice}' twice in one object; expected it once")
  return row


def _json(line: str) -> Any:
  try:
    return json.loads(line, object_pairs_hook=_unique)
  except (ValueError, RecursionError) as e:
    why = f'{e.msg} at character {e.colno}' if isinstance(e, json.JSONDecodeError) else e
    raise InputError(f'found invalid JSON, {why}; expected one JSON object on the line'
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
