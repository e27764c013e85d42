"""Long work says what begins and how far it is; a terminal has a bar."""

import io
import time

import pytest

from latent_reasoning import progress


def test_lines(monkeypatch, capsys):
  """Without a terminal: a line at once, and others at intervals; none at the end."""
  clock = iter(range(0, 1000, 4))
  monkeypatch.setattr(progress.time, 'monotonic', lambda: next(clock))
  assert list(progress.track('abcdef', 'six letters', 6)) == list('abcdef')
  assert capsys.readouterr().err.splitlines() == [
      'six letters …', 'six letters: 3 of 6, about 12 s left']


def test_no_rate_of_what_compiles(monkeypatch, capsys):
  """The first of many takes as long as its compilation: what is left is told by the others."""
  clock = iter([0, 300, 301, 312, 323])
  monkeypatch.setattr(progress.time, 'monotonic', lambda: next(clock))
  with progress.steps('problems', 2000) as done:
    for count in (1, 1, 20, 20):
      done(count)
  assert capsys.readouterr().err.splitlines() == [
      'problems …', 'problems: 1 of 2,000', 'problems: 22 of 2,000, about 1130 s left',
      'problems: 42 of 2,000, about 1098 s left']


def test_bar(monkeypatch):
  """On a terminal the same is a bar, which leaves nothing behind."""
  class Terminal(io.StringIO):
    def isatty(self):
      return True
  stream = Terminal()
  monkeypatch.setattr(progress.sys, 'stderr', stream)
  with progress.steps('work', 3) as done:
    done()
    done(2)
  assert 'work' in stream.getvalue() and '…' not in stream.getvalue()


@pytest.mark.parametrize('seconds, least', [(0.0, 0), (0.5, 2)])
def test_slow(monkeypatch, capsys, seconds, least):
  """What is soon done says nothing; what is not, that it goes on, ever more rarely, and
  nothing once it is over, also by an error."""
  monkeypatch.setattr(progress, 'SILENT', 0.05)
  said = []
  with pytest.raises(ZeroDivisionError), progress.slow('writing', said.append):
    time.sleep(seconds)
    1 / 0  # noqa: B018
  count = len(said)
  assert least <= count <= 4 * least and all(text.startswith('writing: ') for text in said)
  time.sleep(0.1)
  assert len(said) == count
  with progress.slow('writing'):
    time.sleep(seconds)
  assert ('writing: ' in capsys.readouterr().err) == bool(least)
