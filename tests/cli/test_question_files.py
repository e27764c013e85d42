"""A file of questions in, answers out: nothing is lost, and a bad line is named."""

import json

import pytest

from latent_reasoning import main
from latent_reasoning.cli import block_commands, commands, question_files
from latent_reasoning.errors import InputError

pytestmark = pytest.mark.usefixtures('quick_compilation')

GOOD = '{"question": "1+2-3", "id": 7, "answer": "0"}\n\n"4*5+6"\r\n{"question": "7-8+9"}'


@pytest.fixture
def asked(tmp_path):
  """Writes a file of questions."""
  def make(text):
    (tmp_path / 'asked.jsonl').write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(tmp_path / 'asked.jsonl')
  return make


def test_answers(trained, asked, tmp_path, capsys):
  """A line each, in order, by number, with the keys of the question's line; those that one
  question alone gets."""
  target = tmp_path / 'new/answers.jsonl'
  assert block_commands.generate(trained, None, False, asked(GOOD), str(target)) == 0
  assert '3 answers written' in capsys.readouterr().out
  found = [json.loads(line) for line in target.read_text().splitlines()]
  assert [(one['line'], one['question']) for one in found] == [
      (1, '1+2-3'), (3, '4*5+6'), (4, '7-8+9')]
  assert found[0]['id'] == 7 and found[0]['given_answer'] == '0'
  predictor = trained.predictor(trained.restore().state.params)
  for one in found:
    assert one['by_block'] == commands.answers(predictor, one['question'])
    assert one['text'] == one['by_block'][-1]
  before = target.read_bytes()
  with pytest.raises(InputError, match='is there already'):
    block_commands.generate(trained, None, False, asked(GOOD), str(target))
  assert target.read_bytes() == before
  assert block_commands.generate(trained, None, False, asked(GOOD)) == 0
  assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == found


@pytest.mark.parametrize('bad, message', [
    ('{"question": ', 'no JSON'), ('5', 'no question'), ('[]', 'no question'),
    ('{"question": 3}', 'no question'), ('{"q": "1+2"}', 'no question'),
    ('{"question": "  "}', 'an empty question'), ('""', 'an empty question'),
    (b'\xff\xfe', 'no JSON'), ('[' * 9000, 'no JSON'), ('1+2-3', 'no JSON')])
def test_a_bad_line(asked, bad, message):
  """The error names the line."""
  line = bad if isinstance(bad, bytes) else bad.encode()
  with pytest.raises(InputError, match=f'line 3: found {message}'):
    question_files.read(question_files.local_path(asked(b'"1+2"\n\n' + line + b'\n"3+4"'), ''))


def test_files_that_are_none(asked, tmp_path):
  for path, message in ((asked('\n \n'), 'holds no question'), (tmp_path, 'cannot be read'),
                        (tmp_path / 'none', 'cannot be read')):
    with pytest.raises(InputError, match=message):
      question_files.read(question_files.local_path(path, ''))


def test_a_mark_of_utf_8(asked):
  found = question_files.read(question_files.local_path(asked(b'\xef\xbb\xbf"1+2"'), ''))
  assert found == {1: {'question': '1+2'}}


def test_a_question_too_long(trained, asked, tmp_path):
  """Before anything is answered, with its line."""
  long = '1+' * 60 + '1'
  target = tmp_path / 'answers.jsonl'
  with pytest.raises(InputError, match='line 2: the question takes'):
    block_commands.generate(trained, None, False, asked(f'"1+2-3"\n"{long}"'), str(target))
  assert not target.exists()


def test_what_was_answered_is_kept(trained, asked, tmp_path, monkeypatch):
  """An error on the way, as of a device: the lines before it are in the file."""
  from latent_reasoning.eval import evaluator
  def texts(self, questions):
    yield ['a']
    raise MemoryError
  monkeypatch.setattr(evaluator.Predictor, 'texts', texts)
  target = tmp_path / 'answers.jsonl'
  with pytest.raises(MemoryError):
    block_commands.generate(trained, None, False, asked(GOOD), str(target))
  assert [json.loads(line)['text'] for line in target.read_text().splitlines()] == ['a']


def test_flags(trained, asked):
  """A file alone means generate; flags that contradict it, or lack it, say so."""
  assert main.parse(['main', '--questions=x']).mode == 'generate'
  for args, message in ((('1+1', False, 'x'), 'read alone'), ((None, True, 'x'), 'read alone'),
                        ((None, False, None, 'y'), 'needs the file')):
    with pytest.raises(InputError, match=message):
      block_commands.generate(trained, *args)
  with pytest.raises(InputError, match='--answers is not read by --mode=eval'):
    main.parse(['main', '--mode=eval', '--answers=x'])
