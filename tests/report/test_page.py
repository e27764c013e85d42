"""The page: complete, self-contained, escaped, and made of damaged folders too."""

import html.parser
import json
import re
import sys

import pytest
from report.test_comparison import DAMAGE, folder, run  # noqa: F401, a fixture

from latent_reasoning import main, report
from latent_reasoning.errors import InputError
from latent_reasoning.report import page as page_module

EVIL = '<script>alert("x")</script> & "quotes" | bar'
VOID = ('meta', 'img')
DRAWN = ('path', 'use', 'rect', 'image', 'circle', 'line', 'polygon')  # of SVG, closed at once


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
  for words in ('75.0 ±12.5', '0.012', 'Final accuracy', 'Accuracy by the number of steps',
                'read after each block', 'Time at batch 1', 'Training loss by step',
                'points more than the control', 'question 3', '0.10.2', 'Keys that differ',
                'All keys of rim'):
    assert words in text, words
  assert tags.count('svg') > 6 and 'prefers-color-scheme' in text
  assert 'report.html' in capsys.readouterr().out


def test_a_blank_answer_is_called_empty(folder):  # noqa: F811
  file = folder / 'rim-0/predictions.jsonl'
  file.write_text(file.read_text().replace('["1", "7"]', '["", "7"]'))
  assert main.main(['main', '--mode=report', str(folder)]) == 0
  assert '(empty) | 7' in ' '.join(parsed(folder).text)


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
  (folder / 'accuracy.png').write_bytes(page_module.PNG + b'1')
  (folder / 'rim-0/in side.png').write_bytes(page_module.PNG + b'2')
  for _ in range(2):
    report.write([str(folder)], None, True)
    text = (folder / 'report.md').read_text()
    assert '```sh\npython -m x --a="<b>"\n```' in text and 'python -m y' not in text
    assert '![accuracy](accuracy.png)\n\n![in side](rim-0/in%20side.png)' in text
  elsewhere = folder / 'elsewhere'
  report.write([str(folder)], str(elsewhere), True)
  names = [f'{folder.name}-accuracy.png', 'rim-0-in side.png']
  assert [(elsewhere / n).read_bytes() for n in names] == [
      page_module.PNG + b'1', page_module.PNG + b'2']
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
  assert 'Damaged, missing or not there yet' in text
  assert 'rim-0' in text and 'latency.json' in text
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
    run(tmp_path / f'{name}-0', 'language_model', 0, [1, 1])
    (tmp_path / f'{name}-0/results.json').write_text(json.dumps({
        'method': 'language_model', 'seed': 0, 'causal': causal, 'loss': 1.5,
        'train': {'loss': 1.4},
        'parameters': 7}))
  report.write([str(tmp_path)], None, False)
  text = ' '.join(parsed(tmp_path).text)
  assert 'NOT CAUSAL' in text and 'reads the future' in text and '1.5000' in text
  assert 'gpt: 1.5000 nats a token' in text and 'leak: ' not in text  # what was found


def test_one_language_model(tmp_path):
  """What it is and what was found come first; no column is empty, nothing is called a mean."""
  run(tmp_path / 'imm', 'language_model', 0, [1, 1])
  (tmp_path / 'imm/results.json').write_text(json.dumps({
      'method': 'language_model', 'seed': 0, 'causal': True, 'loss': 1.5, 'about': 'A memory.',
      'train': {'loss': 1.4}, 'parameters': 7, 'memory_zeroed': {'loss': 2.5}}))
  assert main.main(['main', '--mode=report', str(tmp_path / 'imm')]) == 0
  text = ' '.join(parsed(tmp_path / 'imm').text)
  found = '1.5000 nats a token on validation text; 2.5000 once all that its memory returns'
  assert text.index('A memory.') < text.index(found) < text.index('Results')
  assert 'against control' not in text and 'mean' not in text.partition('Results')[2]


def test_an_analysis_of_a_model_that_answers_nothing(folder):  # noqa: F811
  """Where no block is ever right, a rule's share of them is null: a blank, no damage."""
  rule = {'accuracy': 0.0, 'standard_error': 0.0, 'selection': None, 'block': 3.0}
  (folder / 'rim-0/analysis.json').write_text(json.dumps(
      {'choice': {'n': 2, 'any': 0.0, 'rules': {'final': rule}}}))
  report.write([str(folder / 'rim-0')], None, False)
  text = ' '.join(parsed(folder / 'rim-0').text)
  assert 'damaged' not in text and '0.0 [0.0, 84.2]' in text


def test_one_seed_is_no_mean(folder):  # noqa: F811
  """What is called a mean is one; the columns are explained either way."""
  for paths, said in (([folder], 'mean ± standard error over seeds'),
                      ([folder / 'rim-0', folder / 'direct-0'], ', one seed. Final: ')):
    report.write([str(path) for path in paths], str(folder), False)
    text = ' '.join(parsed(folder).text)
    assert said in text and ('mean' in text.partition('Training')[0]) == (len(paths) == 1)
    assert 'tokens: generated for an answer' in text


def test_a_figure_closes_where_it_was(folder):  # noqa: F811
  """Every link within the page leads to a part that is there, once."""
  report.write([str(folder)], None, False)
  tags = parsed(folder).tags
  ids = [attrs['id'] for _, attrs in tags if 'id' in attrs]
  links = [attrs['href'][1:] for tag, attrs in tags if tag == 'a']
  assert set(links) <= set(ids) and len(links) > 6
  # A hash of its content names a marker or a clip, which several figures may have.
  twice = [i for i in set(ids) if ids.count(i) > 1]
  assert all(re.fullmatch('[mp][0-9a-f]{10}', i) for i in twice), twice


def test_one_run(folder):  # noqa: F811
  report.write([str(folder / 'rim-0')], str(folder / 'elsewhere'), False)
  assert '87.5' in ' '.join(parsed(folder / 'elsewhere').text)


def test_needs_no_jax():
  """The report is made where JAX is not installed."""
  import subprocess
  code = 'import sys; sys.modules["jax"] = None; from latent_reasoning.report import write'
  assert subprocess.run([sys.executable, '-c', code]).returncode == 0


@pytest.mark.parametrize('name', ['a.png', 'predictions.jsonl', 'commands.txt', 'metrics.jsonl',
                                  'leakage.json', 'rim-0/results.json'])
def test_links_show_no_file_of_the_machine(folder, tmp_path_factory, name):  # noqa: F811
  """A link in a run's folder could point anywhere: what it points to is not shown."""
  secret = tmp_path_factory.mktemp('elsewhere') / 'secret'
  secret.write_bytes(page_module.PNG + b'{"question": "SECRET"}\nSECRET\n')
  file = folder / name
  file.unlink(missing_ok=True)
  file.symlink_to(secret)
  for markdown in (False, True):
    report.write([str(folder)], None, markdown)
  text = (folder / 'report.html').read_text() + (folder / 'report.md').read_text()
  assert 'SECRET' not in text and 'U0VDUkVU' not in text  # nor in base64
  assert 'a link or no regular file' in text or name in ('metrics.jsonl', 'predictions.jsonl',
                                                         'leakage.json')


def test_odd_pictures(folder):  # noqa: F811
  """A folder, an empty file and another format are named, not embedded."""
  (folder / 'folder.png').mkdir()
  (folder / 'text.png').write_text('<svg onload=alert(1)>')
  (folder / 'empty.png').write_bytes(b'')
  report.write([str(folder)], None, False)
  text = (folder / 'report.html').read_text()
  for name, why in (('folder', 'a link or no'), ('text', 'no PNG'), ('empty', 'no PNG')):
    assert re.search(rf'{name}\.png: {why}', text)
  assert 'onload' not in text and 'image/png' not in text


MARKDOWN = ['[click](http://evil.example)', '![x](http://evil.example/p.png)',
            '<script>alert(1)</script>', 'https://evil.example', 'www.evil.example',
            'a@evil.example', '`code`', '**bold**', '_it_', '~~gone~~', '| a | b |',
            '\n# title\n', '[ref]: http://evil.example', '&lt;b&gt;', '\\[a](b)']


@pytest.mark.parametrize('text', MARKDOWN)
def test_nothing_in_markdown_is_live(folder, text):  # noqa: F811
  """Questions, names and commands stay the text that they are."""
  markdown_it = pytest.importorskip('markdown_it')
  run(folder / 'extra-0', text, 0, [1, 0], questions=[text, text], dataset=text)
  (folder / 'commands.txt').write_text(f'python -m x --question={text!r}\n```\n{text}\n````\n')
  report.write([str(folder)], None, True)
  page = (folder / 'report.md').read_text()
  parser = markdown_it.MarkdownIt('gfm-like', {'linkify': False, 'html': True})
  html = parser.render(page)
  for tag in ('<a ', '<img', '<script', '<em>', '<del>', '<s>'):
    assert tag not in html.replace('<strong>', ''), (tag, html)
  assert html.count('<h1>') == 1
  assert not re.search(r'(?<!&#)\b(https?://|www\.)evil', re.sub(
      r'(?s)(`{3,}).*?\n\1', '', page))


@pytest.mark.integration
@pytest.mark.parametrize('changes', [
    {'parameters': 1e308}, {'n': None}, {'seed': '(((('}, {'seed': None}, {'n': 10**400},
    {'accuracy': {'final': float('nan'), 'any': 0, 'per_block': [0]}}, {'by_steps': {'x': {}}},
    {'training': 5}, {'tokens': []}, {'dataset': 7}, {'environment': 5}, {'by_steps': None},
    {'accuracy': 5}, {'method': ['rim']}, {'trained_steps': 'x'}, {'causal': 'no'}])
def test_one_bad_value_does_not_end_the_page(folder, changes):  # noqa: F811
  """It is named, or shown as far as it means something; the rest is there."""
  run(folder / 'odd-0', 'odd', 0, [1, 0])
  file = folder / 'odd-0/results.json'
  file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
  report.write([str(folder)], None, False)
  assert '75.0 ±12.5' in (folder / 'report.html').read_text()


@pytest.mark.integration
@pytest.mark.parametrize('name, text', [
    ('metrics.jsonl', '{"step": 1, "split": "train", "loss": 1e308}\n' * 2
     + '{"step": 1, "split": "train", "loss": -1e308}\n'),
    ('metrics.jsonl', '{"step": 1e400, "split": "train"}\nnull\n5\n'),
    ('predictions.jsonl', '{"predictions": 5}\n{"correct": 3}\n{"question": {}}\n'),
    ('predictions.jsonl', '{"question": "a\u2028b", "correct": [true]}\n'),
    ('config.json', '{"sweep": {"seeds": "abc", "runs": 5}}'),
    ('config.json', '{"seed": "(("}'), ('latency.json', '{"entries": 5}'),
    ('leakage.json', '{"checks": 5}'),
    ('analysis.json', '{"choice": []}'), ('interventions.json', '{"lines": [5]}')])
def test_bad_records_do_not_end_the_page(folder, name, text):  # noqa: F811
  (folder / 'rim-0' / name).write_text(text, encoding='utf-8')
  report.write([str(folder)], None, False)
  page = (folder / 'report.html').read_text(encoding='utf-8')
  assert '75.0 ±12.5' in page
  if '\u2028' in text:
    assert 'cannot be read' not in page
