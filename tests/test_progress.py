"""Long work says what begins and how far it is; a terminal has a bar."""

import io

from latent_reasoning import progress


def test_lines(monkeypatch, capsys):
  """Without a terminal: a line at once, and others at intervals; none at the end."""
  clock = iter(range(0, 1000, 4))
  monkeypatch.setattr(progress.time, 'monotonic', lambda: next(clock))
  assert list(progress.track('abcdef', 'six letters', 6)) == list('abcdef')
  assert capsys.readouterr().err.splitlines() == [
      'six letters …', 'six letters: 3 of 6, about 12 s left']


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
