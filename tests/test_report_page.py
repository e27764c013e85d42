"""The page: complete, self-contained, escaped, and made of damaged folders too."""

import html.parser
import json
import re
import sys

import pytest
from test_report_comparison import DAMAGE, folder, run  # noqa: F401, a fixture

from latent_reasoning import main, report
from latent_reasoning.errors import InputError
from latent_reasoning.report import svg

EVIL = '<script>alert("x")</script> & "quotes" | bar'
VOID = ('meta', 'img')


class Parser(html.parser.HTMLParser):
  """Collects tags, and checks that they are balanced."""

  def __init__(self):
    super().__init__()
    self.tags, self.open, self.text = [], [], []

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_data(self, data):
    self.text.append(data)


def parsed(path):
  parser = Parser()
  parser.feed((path / 'report.html').read_text())
  assert parser.open == []
  return parser


def test_page(folder, capsys):  # noqa: F811
  """Tables, charts and examples are there; nothing is fetched, no script runs."""
  assert main.main(['main', '--mode=report', str(folder)]) == 0
  page = parsed(folder)
  tags = [t for t, _ in page.tags]
  assert 'script' not in tags and 'link' not in tags
  for _, attrs in page.tags:
    for name, value in attrs.items():
      assert not re.match(r'\s*(https?:)?//', value or ''), (name, value)
      assert name != 'src' or value.startswith('data:')
  text = ' '.join(page.text)
  for words in ('75.0 ±12.5', '0.012', 'Final accuracy', 'Accuracy by number of steps',
                'Accuracy read after each block', 'Latency at batch 1', 'Training loss',
                'question 3', '0.10.2', 'Keys that differ', 'All keys of rim'):
    assert words in text, words
  assert tags.count('svg') > 6 and 'prefers-color-scheme' in text
  assert 'report.html' in capsys.readouterr().out


def test_markdown_has_the_same_numbers(folder, capsys):  # noqa: F811
  assert main.main(['main', '--mode=report', '--markdown', str(folder)]) == 0
  text = (folder / 'report.md').read_text()
  assert text in capsys.readouterr().out
  assert '| rim | 0, 1 | 75.0 ±12.5 |' in text and '**By block, %**' in text


def test_commands_and_pictures_in_markdown(folder):  # noqa: F811
  """The folder's commands, not those of its runs; pictures beside the page where it lies
  elsewhere, links where it lies with them, and the same when it is made again."""
  (folder / 'commands.txt').write_text('python -m x --a="<b>"\n')
  (folder / 'rim-0/commands.txt').write_text('python -m y\n')
  (folder / 'accuracy.png').write_bytes(b'1')
  (folder / 'rim-0/in side.png').write_bytes(b'2')
  for _ in range(2):
    report.write([str(folder)], None, True)
    text = (folder / 'report.md').read_text()
    assert '```sh\npython -m x --a="<b>"\n```' in text and 'python -m y' not in text
    assert '![accuracy](accuracy.png)\n\n![in side](rim-0/in%20side.png)' in text
  elsewhere = folder / 'elsewhere'
  report.write([str(folder)], str(elsewhere), True)
  names = [f'{folder.name}-accuracy.png', 'rim-0-in side.png']
  assert [(elsewhere / n).read_bytes() for n in names] == [b'1', b'2']
  assert names[0] in (elsewhere / 'report.md').read_text()
  report.write([str(folder)], None, False)
  assert 'python -m x --a="<b>"' in ' '.join(parsed(folder).text)


@pytest.mark.parametrize('markdown', [False, True])
def test_everything_is_escaped(folder, markdown):  # noqa: F811
  """A question, a name of a figure or a value of a config cannot become markup."""
  run(folder / 'evil-0', EVIL, 0, [1] * 8, [EVIL] * 8, dataset='toy', checkpoint=EVIL,
      environment={EVIL: EVIL})
  (folder / 'rim-0' / '<img src=x onerror=y>.png').write_bytes(b'\x89PNG')
  report.write([str(folder)], None, markdown)
  text = (folder / ('report.md' if markdown else 'report.html')).read_text()
  assert '<script' not in text and '<img src=x' not in text
  assert '&lt;script&gt;' in text
  if not markdown:
    assert ''.join(parsed(folder).text).count(EVIL) >= 4


@pytest.mark.parametrize('name', DAMAGE)
def test_damaged_folders_are_reported(folder, name, capsys):  # noqa: F811
  """What cannot be read is named on the page; the rest is there."""
  DAMAGE[name](folder / 'rim-0')
  (folder / 'latency.json').write_text('{"entries": ')
  assert report.write([str(folder)], None, False) == 0
  text = ' '.join(parsed(folder).text)
  assert 'Damaged or missing' in text and 'rim-0' in text and 'latency.json' in text
  assert 'direct' in text and 'latency.json' in capsys.readouterr().err


def test_nothing_to_report(tmp_path):
  with pytest.raises(InputError, match='no folder given'):
    report.write([], None, False)
  with pytest.raises(InputError, match='nothing to report: .*no such folder'):
    report.write([str(tmp_path / 'none')], None, False)
  assert main.main(['main', '--mode=report', str(tmp_path)]) == 2


def test_losses_and_the_future(tmp_path):
  """Language models have losses; what reads the future says so, and why."""
  for name, causal in (('gpt', True), ('leak', False)):
    run(tmp_path / f'{name}-0', 'lm', 0, [1, 1])
    (tmp_path / f'{name}-0/results.json').write_text(json.dumps({
        'method': 'lm', 'seed': 0, 'causal': causal, 'loss': 1.5, 'train': {'loss': 1.4},
        'parameters': 7}))
  report.write([str(tmp_path)], None, False)
  text = ' '.join(parsed(tmp_path).text)
  assert 'NOT CAUSAL' in text and 'reads the future' in text and '1.5000' in text


def test_one_run(folder):  # noqa: F811
  report.write([str(folder / 'rim-0')], str(folder / 'elsewhere'), False)
  assert '87.5' in ' '.join(parsed(folder / 'elsewhere').text)


def test_needs_no_jax():
  """The report is made where JAX is not installed."""
  import subprocess
  code = 'import sys; sys.modules["jax"] = None; from latent_reasoning.report import write'
  assert subprocess.run([sys.executable, '-c', code]).returncode == 0


@pytest.mark.parametrize('low, high, expected', [
    (0, 100, [0, 20, 40, 60, 80, 100]), (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    (2.1, 3.9, [2.5, 3.0, 3.5]), (5, 5, [5])])
def test_ticks(low, high, expected):
  """Round numbers inside the range."""
  assert svg.ticks(low, high) == pytest.approx(expected)


def test_charts_of_nothing():
  assert svg.lines('t', [], 'x', 'y') == svg.bars('t', [], [], 'x') == ''
  assert svg.lines('t', [svg.Series('a', 0, [(1, float('nan'), None)])], 'x', 'y') == ''
