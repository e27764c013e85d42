"""One page of runs: HTML that needs nothing else, or the same tables as Markdown.

  python -m latent_reasoning.main --mode=report DIR… [--workdir=DIR] [--markdown]

Everything that comes from data, configs or users is escaped; what cannot be read is named.
"""

import base64
import datetime
import json
import os
import pathlib
import re
import shutil
import sys
import urllib.parse
from collections.abc import Sequence
from html import escape
from typing import Any

from latent_reasoning.config import flatten
from latent_reasoning.errors import InputError
from latent_reasoning.report import block_plots, comparison, figures, runs, style, tables
from latent_reasoning.report.comparison import right
from latent_reasoning.report.style import Chart

EXAMPLES = 3  # right and wrong predictions shown of each run
NOT_CAUSAL = ('NOT CAUSAL: {} reads the future that it is asked to predict. Its losses are no '
              'language-modelling losses and compare with nothing.')
# Of what analyses draw, in the order in which it is read.
CAPTIONS = {
    'block_choice': 'Which block answers: exact match of each rule for choosing one, with '
                    'standard errors. Dashed: some block is right, which no rule knows.',
    'adaptive': 'Accuracy against the blocks read, when reading stops at a score (left), and '
                'for a fixed number of blocks at inference (right).',
    'scaling': 'Accuracy by what the model computes when asked; dotted: as in training.',
    'probes': 'How often a linear probe of the state at </b> reads the result of each step, by '
              'block and layer, on held-out problems.',
    'lens': 'What the head says of the state at </b> of each block and layer: how often its '
            'top token begins the true next step, and the true answer.',
    'trajectories': 'Final states at </b> of each block on the two principal axes of all of '
                    'them, coloured by the true answer.',
    'attention': 'Where blocks and readouts attend, layer by layer: means over heads and '
                 'problems of one length.',
    'mask': 'One training sequence: which position may attend to which, and what it predicts.',
    'slots': 'One text: which slots of the memory each token reads; a column a token, a row a '
             'slot, a panel a layer. The shares of a token add up to 1.',
    'adapters': 'How much LoRA adds to each matrix, as a share of the size of its weight.',
    'leak': 'One text: how far each prediction moves when one token is changed.'}
Rows = Sequence[Sequence[Any]]


class Page:
  """Sections of tables, texts and charts, collected once and rendered twice."""

  def __init__(self, title: str):
    self.title = title
    self.items: list[dict[str, Any]] = []
    self.pictures: list[pathlib.Path] = []  # that Markdown links

  def _add(self, kind: str, **values: Any) -> None:
    self.items.append({'kind': kind, **values})

  def section(self, title: str) -> None:
    """A heading."""
    self._add('section', text=title)

  def text(self, text: str, look: str = '') -> None:
    """A paragraph; `look` is '', 'finding', 'quiet' or 'warning'."""
    self._add('text', text=text, look=look)

  def table(self, rows: Rows, caption: str = '', folded: str = '') -> None:
    """The first row is the header; a table of a header alone is left out. One that is
    `folded` opens from that title."""
    if len(rows) > 1:
      self._add('table', rows=rows, caption=caption, folded=folded, numbers=[
          all(_numeric(row[k]) for row in rows[1:]) for k in range(len(rows[0]))])

  def charts(self, charts: Sequence[Chart], wide: bool = False) -> None:
    """Figures side by side, or each as wide as the page; HTML alone has them."""
    if charts:
      self._add('charts', charts=charts, wide=wide)

  def details(self, title: str, text: str, fenced: bool = False) -> None:
    """A folded text; Markdown has it only where it is `fenced`, as commands."""
    self._add('details', title=title, text=text, fenced=fenced)


def render_html(page: Page) -> str:
  """The page as HTML; jinja2 escapes what stands in it."""
  style.require()
  import jinja2
  import markupsafe
  here = pathlib.Path(__file__).parent

  def picture(chart: Chart) -> markupsafe.Markup:
    if not isinstance(chart.picture, bytes):
      return markupsafe.Markup(chart.picture.svg())
    data = base64.b64encode(chart.picture).decode()
    return markupsafe.Markup('<img alt="{}" src="data:image/png;base64,{}">').format(
        chart.name, data)
  return jinja2.Environment(autoescape=True).from_string(
      (here / 'page.html').read_text(encoding='utf-8')).render(
          title=page.title, items=page.items, picture=picture,
          style=markupsafe.Markup((here / 'page.css').read_text(encoding='utf-8')))


def render_markdown(page: Page) -> list[str]:
  """The paragraphs of the page as Markdown, without figures."""
  found = [f'# {_plain(page.title)}']
  for item in page.items:
    if item['kind'] == 'section':
      found.append(f"## {_plain(item['text'])}")
    elif item['kind'] == 'text':
      found.append(_plain(item['text']))
    elif item['kind'] == 'table':
      caption = f"**{_plain(item['caption'])}**\n\n" if item['caption'] else ''
      found.append(caption + tables.markdown(
          [[_plain(str(cell)) for cell in row] for row in item['rows']]))
    elif item['kind'] == 'details' and item['fenced']:
      fence = '`' * max(3, 1 + max(map(len, re.findall('`+', item['text'])), default=0))
      found.append(f"{fence}sh\n{item['text']}\n{fence}")
  return found


def write(paths: Sequence[str], where: str | None, markdown: bool) -> int:
  """Writes report.html, or prints and writes report.md, in `where` or the first folder.

  Raises:
    InputError: no folder given, none with a run in it, one that cannot be written, or for
      HTML, matplotlib or jinja2 is missing.
  """
  if not paths:
    raise InputError('no folder given; usage: python -m latent_reasoning.main --mode=report '
                     'DIR … with folders of runs or comparisons')
  found = runs.find(paths)
  if not any(f.config or f.results or f.metrics for f in found.folders):
    raise InputError('nothing to report: ' + '; '.join(found.problems[:4])
                     + f'. Expected folders of runs or comparisons{runs.below(paths)}')
  if not markdown:
    style.require()
  page = build(found, [pathlib.Path(p) for p in paths], drawn=not markdown)
  folder = pathlib.Path(where or next(p for p in paths if pathlib.Path(p).is_dir()))
  file = folder / ('report.md' if markdown else 'report.html')
  text = '' if markdown else render_html(page)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if markdown:
      text = '\n\n'.join([*render_markdown(page),
                          *_linked(page.pictures, folder, bool(where))]) + '\n'
    file.write_text(text, encoding='utf-8')
  except OSError as error:
    raise InputError(f'cannot write {file}: {error}; name another folder with --workdir=DIR'
                     ) from None
  if markdown:
    print(text)
  for problem in found.problems:
    print(f'warning: {problem}', file=sys.stderr)
  print(f'written to {file}', file=sys.stderr if markdown else sys.stdout)
  return int(not all(pathlib.Path(path).is_dir() for path in paths))


def build(found: runs.Found, paths: Sequence[pathlib.Path], drawn: bool = True) -> Page:
  """The page of what was found in some folders.

  Args:
    drawn: with figures, which need matplotlib.
  """
  page = Page(', '.join(p.resolve().name for p in paths))
  summary, groups = comparison.summarize(found), found.groups()
  losses = {n: [f.results for f in fs if 'loss' in f.results] for n, fs in groups.items()}
  losses = {n: r for n, r in losses.items() if r}
  about = {f.name: f.results['about'] for f in found.folders
           if isinstance(f.results.get('about'), str)}
  if len(about) == 1:
    page.text(*about.values())
  for finding in (comparison.finding(summary), tables.lowest_loss(losses, found.control)):
    if finding:
      page.text(finding, 'finding')
  count = len(found.folders)
  page.text(f'{count} run{"s" * (count != 1)}, reported {datetime.date.today().isoformat()} by '
            'latent_reasoning.', 'quiet')
  if found.problems:
    page.text(f'Not all is as it should be ({len(found.problems)} of files and folders): see '
              'the end.', 'warning')
  if not all(f.causal for f in found.folders):
    page.text(NOT_CAUSAL.format(', '.join(dict.fromkeys(
        f.name for f in found.folders if not f.causal))), 'warning')
  page.section('Results')
  if losses:
    page.table(comparison.dropped(tables.losses(losses, found.control)),
               'Losses of whole splits, nats a token')
  others = []
  if summary['runs']:
    page.text(comparison.explained(found, summary))
    headline, *others = comparison.document(summary)
    page.table(headline[1], headline[0])
  elif not losses:
    page.text('No run has results yet.')
  if drawn:
    page.charts(figures.comparison(summary))
    if curves := figures.curves(groups):
      page.section('Training')
      page.charts(curves)
  if others or len(about) > 1:
    page.section('In detail')
    if len(about) > 1:
      page.table([['run', 'what it does'], *about.items()], folded='What each run does')
    for title, rows in others:  # what a figure shows opens from its title
      folded = title if drawn and title.startswith('By ') else ''
      page.table(rows, '' if folded else title, folded)
  for folder in found.folders:
    _one_model(page, folder, found.problems, drawn)
  _figures(page, [*paths, *(f.path for f in found.folders if f.path not in paths)],
           found.problems)
  _predictions(page, groups)
  _configuration(page, groups)
  _origin(page, found, paths)
  if found.problems:
    page.section('Damaged, missing or not there yet')
    page.table([['file or folder: what is wrong'], *([p] for p in found.problems)])
  return page


def _one_model(page: Page, folder: runs.Folder, problems: list[str], drawn: bool) -> None:
  """What other modes found of a single run: times, leakage checks, blocks, texts."""
  name, before = folder.name, len(page.items)

  def of(kind: str) -> dict[str, Any]:
    file = folder.path / f'{kind}.json'
    return runs.read_json(file, problems) if file.exists() else {}
  for kind, show in (
      ('latency', lambda f: page.table(
          [['method', 'batch', 'first token ms', 'full answer ms', 'first vs direct'],
           *([e['method'], e['batch'], f"{e['first_ms']:.2f}", f"{e['full_ms']:.2f}",
              f"{e['first_vs_direct']:.2f}"] for e in folder.latency.get('entries') or ()
             if e.get('first_vs_direct') is not None)],
          f'Latency of every method on the weights of {name}')),
      ('leakage', lambda f: page.table(
          [['check', '', 'found'], *([c['check'], 'ok' if c['ok'] else 'FAIL', c['found']]
                                     for c in f['checks'])],
          f"Leakage checks of {name}, {f['weights']}")),
      ('analysis', lambda f: page.table(tables.choice(f['choice']),
                                        f'Which block answers, {name}')),
      ('interventions', lambda f: _interventions(page, f, name, drawn)),
      ('verbalized', lambda f: page.table(
          tables.verbalized_rows(f),
          f"What the reasoning decoder says of {f['source']}, exact match, {name}"))):
    try:
      if found := of(kind):
        show(found)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
      page.text(f'{folder.path / kind}.json is damaged ({type(error).__name__})', 'warning')
  if len(page.items) > before:
    page.items.insert(before, {'kind': 'section', 'text': f'Inside {name}'})


def _interventions(page: Page, found: dict[str, Any], name: str, drawn: bool) -> None:
  page.table(tables.interventions(found), f'Latents changed, {name}')
  page.text(f'{tables.INTERVENED}.')
  if 'verdict' in found:
    page.table(tables.verdict(found), f'Do the latents do the work? {name}')
    page.text(tables.verdict_words(found))
  if drawn:
    page.charts([Chart('interventions', 'What becomes of the answer when latents are changed, '
                       "and how often it becomes that of the donor's question.",
                       block_plots.interventions(found))], wide=True)


PNG = b'\x89PNG\r\n\x1a\n'  # how such a file begins


def _figures(page: Page, paths: Sequence[pathlib.Path], problems: list[str]) -> None:
  """Pictures found in the folders, inside the page; Markdown links them."""
  held = {f: runs.content(f, problems) for path in paths if path.is_dir()
          for f in sorted(path.glob('*.png'))}
  for file in [f for f, data in held.items() if data is not None and not data.startswith(PNG)]:
    problems.append(f'{file}: no PNG; left out')
    held[file] = None
  page.pictures = [f for f, data in held.items() if data is not None]
  drawn = {chart.name for item in page.items if item['kind'] == 'charts'
           for chart in item['charts']}
  order = {name: i for i, name in enumerate(CAPTIONS)}
  files = sorted((f for f in page.pictures if f.stem not in drawn),
                 key=lambda f: order.get(f.stem, len(order)))
  if files:
    page.section('Figures')
    page.charts([Chart(f.stem, f'{f.parent.name}: {CAPTIONS.get(f.stem, f.name)}', held[f])
                 for f in files], wide=True)


def _linked(pictures: Sequence[pathlib.Path], folder: pathlib.Path, copied: bool) -> list[str]:
  """Pictures in Markdown that lies in a folder, with copies of them beside it if asked."""
  found = []
  for file in pictures:
    name = os.path.relpath(file, folder)
    if copied and name != file.name:
      name = f'{file.resolve().parent.name}-{file.name}'
      shutil.copyfile(file, folder / name)
    alt = _plain(file.stem)
    found.append(f'![{alt}]({urllib.parse.quote(pathlib.Path(name).as_posix())})')
  return ['## Figures', *found] if found else []


def _predictions(page: Page, groups: dict[str, list[runs.Folder]]) -> None:
  """The first right and wrong answers of each run's first seed."""
  rows = [['run', '', 'question', 'expected', 'said']]
  for name, folders in groups.items():
    records = next((f.predictions for f in folders if f.predictions), [])
    for wanted in (False, True):
      chosen = [r for r in records if right(r) == wanted][:EXAMPLES]
      rows += [[name, 'right' if wanted else 'wrong', _short(r.get('question')),
                _short(r.get('answer')), _short(' | '.join(map(tables.or_empty, r.get(
                    'predictions') or ['too long'])))]
               for r in chosen]
  if len(rows) > 1:
    page.section('Predictions')
    page.text(f'The first {EXAMPLES} wrong and right answers of the first seed of each run; '
              'answers read after several blocks are parted by |.')
    page.table(rows, folded=f'{len(rows) - 1} answers')


def _configuration(page: Page, groups: dict[str, list[runs.Folder]]) -> None:
  """What differs between runs as a table, then all of it."""
  configs = {n: flatten(next((f.config for f in fs if f.config), {})) for n, fs in
             groups.items()}
  configs = {n: c for n, c in configs.items() if c}
  if not configs:
    return
  page.section('Configuration')
  keys = sorted({k for c in configs.values() for k in c if k != 'seed'})
  differing = [k for k in keys if len({str(c.get(k)) for c in configs.values()}) > 1]
  if differing:
    page.table([['run', *differing],
                *([n, *(c.get(k, '') for k in differing)] for n, c in configs.items())],
               'Keys that differ')
  for name, config in configs.items():
    page.details(f'All keys of {name}',
                 '\n'.join(f'{k} = {json.dumps(v, ensure_ascii=False)}'
                           for k, v in config.items()))


def _origin(page: Page, found: runs.Found, paths: Sequence[pathlib.Path]) -> None:
  """Where each number comes from: commands, folder, seed, checkpoint, versions, machine."""
  known = [{'folder': f.path.name, 'seed': f.seed, 'step': f.results.get('step', ''),
            'checkpoint': f.results.get('checkpoint', ''),
            **(f.results['environment'] if isinstance(f.results.get('environment'), dict)
               else {})} for f in found.folders]
  columns = list(dict.fromkeys(k for one in known for k in one))
  page.section('Where this comes from')
  files = [path / 'commands.txt' for path in paths]  # of comparisons, not of their runs
  lines = [line for file in files if file.exists()
           for line in (runs.content(file, found.problems) or b'').decode(
               errors='replace').split('\n') if line]
  asked = [line for line in lines if '--question' in line]
  if lines := list(dict.fromkeys(line for line in lines if line not in asked)):
    page.details(f'{len(lines)} commands' + f', and {len(asked)} that asked a question' * bool(
        asked), '\n'.join(lines), fenced=True)
  page.table([columns, *([one.get(k, '') for k in columns] for one in known)],
             folded='Checkpoints, versions and machines')


def _numeric(cell: Any) -> bool:
  """Whether a cell is empty, or a number, perhaps with its error and unit."""
  return re.fullmatch(r'|control|[-+]?[\d.,]+(e-?\d+)?( ±[\d.]+| \[[\d., ]+\])?( %)?',
                      str(cell)) is not None


def _plain(text: str) -> str:
  """Text that Markdown takes for nothing but text: no HTML, links, pictures or emphasis."""
  text = re.sub(r'([\\`*\[\]~])', r'\\\1', escape(' '.join(text.split()), quote=False))
  text = re.sub(r'(?<![^\W_])_|_(?![^\W_])', r'\_', text)
  return re.sub(r'://|(?<=www)\.|@', lambda m: ''.join(f'&#{ord(c)};' for c in m[0]), text)


def _short(value: Any) -> str:
  text = str(value)
  return text if len(text) <= 300 else f'{text[:299]}…'
