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
