"""Jobs that a launcher starts again: what counts as getting on."""

import json

import pytest

from latent_reasoning import main
from latent_reasoning.cli import restarts
from latent_reasoning.errors import TrainingError


def start(path, number):
  restarts.check(str(path), {restarts.START: str(number)})


def save(path, step):
  (path / 'checkpoints' / str(step)).mkdir(parents=True)


def test_two_starts_without_a_checkpoint_are_the_last(tmp_path):
  start(tmp_path, 0)
  start(tmp_path, 1)  # the first saved nothing
  with pytest.raises(TrainingError, match='2 starts in a row saved no new checkpoint'):
    start(tmp_path, 2)
  start(tmp_path, 0)  # begun anew by its user


def test_a_checkpoint_begins_a_new_count(tmp_path):
  """Also where a start came to nothing before it could look, and where old ones go."""
  for number in range(9):
    start(tmp_path, 2 * number)
    if number % 2:
      save(tmp_path, number)
      for old in (tmp_path / 'checkpoints').iterdir():
        if old.name != str(number):
          old.rmdir()
  save(tmp_path, '12.orbax-checkpoint-tmp')
  start(tmp_path, 20)
  with pytest.raises(TrainingError):
    start(tmp_path, 21)


def test_who_is_started_by_hand_is_not_counted(tmp_path):
  for value in ('', 'x', '-1'):
    for _ in range(4):
      restarts.check(str(tmp_path / 'w'), {restarts.START: value})
      restarts.check(str(tmp_path / 'w'), {})
  assert not (tmp_path / 'w').exists()


def test_a_damaged_note_is_no_reason_to_end(tmp_path):
  for text in ('', '[]', '{"start": 0'):
    (tmp_path / 'starts.json').write_text(text)
    start(tmp_path, 1)


def test_a_bucket_that_cannot_be_used_is_for_others_to_name(monkeypatch):
  for error in (ImportError('gcsfs'), PermissionError('no'), RuntimeError('no account')):
    def refuse(*_, error=error):
      raise error
    monkeypatch.setattr(restarts, 'saved', refuse)
    start('gs://bucket/run', 1)


def test_what_is_saved(tmp_path, capsys):
  """Of a run, and of the runs of a comparison with what they ended in."""
  save(tmp_path, 10)
  save(tmp_path / 'rim-0', 20)
  (tmp_path / 'rim-1').mkdir()
  (tmp_path / 'rim-1/results.json').write_text('{}')
  (tmp_path / 'trial-rim-x=1').mkdir()
  (tmp_path / 'trial-rim-x=1/trial.json').write_text('{}')
  assert restarts.main([str(tmp_path)]) == 0
  assert capsys.readouterr().out.splitlines() == [
      f'{tmp_path}/{name}' for name in ('checkpoints/10', 'rim-0/checkpoints/20',
                                        'rim-1/results.json', 'trial-rim-x=1/trial.json')]
  assert restarts.saved(str(tmp_path / 'none')) == []


def test_the_command_line_ends_it_before_any_device(tmp_path, monkeypatch, capsys):
  """With status 1, which no launcher restarts."""
  from latent_reasoning.parallel import multihost
  monkeypatch.setattr(multihost, 'start', lambda *_: pytest.fail('the processes were joined'))
  (tmp_path / 'starts.json').write_text(json.dumps({'start': 3, 'fruitless': 1, 'saved': []}))
  monkeypatch.setenv(restarts.START, '4')
  argv = ['main', '--config=configs/rim_arithmetic.py', f'--workdir={tmp_path}']
  assert main.main(argv) == 1
  error = capsys.readouterr().err
  assert error.startswith('error: 2 starts in a row') and error.count('\n') == 1
