"""--mode=generate --questions=FILE: a file of questions in, a line with each answer out."""

import contextlib
import functools
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from latent_reasoning import progress
from latent_reasoning.cli import commands
from latent_reasoning.cli.evaluation import restored
from latent_reasoning.data import questions as questions_lib
from latent_reasoning.errors import InputError, ensure, local_path
from latent_reasoning.eval import answer_matching, language_modeling
from latent_reasoning.experiment import Experiment

OURS = ('line', 'answer', 'text', 'by_block')  # keys of an answer


def read(path: pathlib.Path) -> dict[int, dict[str, Any]]:
  """The lines of a file of questions, by their numbers: {"question": "…"}, perhaps with keys
  of its own, or "…".

  Raises:
    InputError: it cannot be read, or a line is no question; names the line.
  """
  try:
    lines = path.read_bytes().removeprefix(b'\xef\xbb\xbf').split(b'\n')
  except OSError as error:
    raise InputError(f'--questions={path} cannot be read: {error.strerror}; expected a file '
                     'with a line {"question": "…"} for each') from None
  found = {}
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
      raise _wrong(path, number, f'no JSON ({str(error)[:100]})') from None
    row = {'question': row} if isinstance(row, str) else row
    if not isinstance(row, dict) or not isinstance(row.get('question'), str):
      raise _wrong(path, number, 'no question')
    if not row['question'].strip():
      raise _wrong(path, number, 'an empty question')
    found[number] = row
  ensure(found, f'--questions={path} holds no question; expected a line {{"question": "…"}} '
         'for each')
  return found


def _wrong(path: pathlib.Path, number: int, what: str) -> InputError:
  return InputError(f'--questions={path}, line {number}: found {what}; expected an object such '
                    'as {"question": "2+3"}, or a text in quotes. Nothing was answered; mend '
                    'the line')


def answer(run: Experiment, asked: str, answers: str | None) -> int:
  """Answers every question of a file.

  A line of the answers has the keys of its question's line, one of them that is named as ours
  with 'given_' in front; its number 'line'; 'answer', what is read out of 'text', all that was
  generated; and of a method with blocks 'by_block', the text after each. Lines are written as
  they come, so that what stops the command loses none of them.

  Args:
    asked: the file of questions.
    answers: a file that is not there yet; None: the output.

  Raises:
    InputError: a line that is no question, or too long for the model; a file that is there.
  """
  commands.require_causal(run)
  path, rows = local_path(asked, '--questions'), read(local_path(asked, '--questions'))
  target = None if answers is None else local_path(answers, '--answers')
  if target and (target.is_dir() or target.exists() and target.stat().st_size):
    raise InputError(f'--answers={target} is there already, and is not written over; give '
                     'another file, or move it away')
  texts = _texts(run, path, rows)
  with contextlib.ExitStack() as stack:
    out = sys.stdout
    if target:
      target.parent.mkdir(parents=True, exist_ok=True)
      out = stack.enter_context(target.open('w', encoding='utf-8'))
    done = stack.enter_context(progress.steps(f'{len(rows):,} questions', len(rows)))
    for (number, row), said in zip(rows.items(), texts, strict=True):
      theirs = {f'given_{key}' if key in OURS else key: value for key, value in row.items()}
      line = {**theirs, 'line': number, 'answer': answer_matching.extract(said[-1]),
              'text': said[-1], **({'by_block': said} if len(said) > 1 else {})}
      out.write(json.dumps(line, ensure_ascii=False) + '\n')
      out.flush()
      done(1)
  if target:
    print(f'{len(rows):,} answers written to {target}')
  return 0


def _texts(run: Experiment, path: pathlib.Path, rows: dict[int, dict[str, Any]]
           ) -> Iterator[list[str]]:
  """The texts of the readouts of each question; checks them all before the first."""
  params = restored(run).state.params
  if run.batches.method.is_text:
    say = functools.partial(language_modeling.generate, run.config, run.model(), params,
                            run.tokenizer)
    return ([say(row['question'], run.config.eval.max_new_tokens)] for row in rows.values())
  known, predictor = (questions_lib.of(run.splits, run.tokenizer),
                      run.predictor(params))
  asked, unlike = [], []
  for number, row in rows.items():
    try:
      asked.append(known.normalise(row['question']))
      commands.check_fits(predictor, asked[-1])
    except InputError as error:
      raise InputError(f'--questions={path}, line {number}: {error}') from None
    if found := known.unlike(asked[-1]):
      unlike.append((number, found))
  if unlike:
    number, found = unlike[0]
    more = f' (as of {len(unlike) - 1:,} more questions)' * (len(unlike) > 1)
    print(f'warning: line {number}: {found}{more}', file=sys.stderr)
  return predictor.texts(asked)
