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
from latent_reasoning.report import comparison, runs, svg, tables
from latent_reasoning.report.comparison import mark, right

EXAMPLES = 3  # right and wrong predictions shown of each run
DRAWN = ('accuracy.png', 'by_steps.png', 'by_latency.png', 'by_parameters.png', 'losses.png')
# The page has charts of its own instead.
NOT_CAUSAL = ('NOT CAUSAL: {} reads the future that it is asked to predict. Its losses are no '
              'language-modelling losses and compare with nothing.')
Rows = Sequence[Sequence[Any]]


class Page:
  """Sections of tables, texts and charts, written once and rendered twice."""

  def __init__(self, title: str):
    self.html = [f'<h1>{escape(title)}</h1>']
    self.plain = [f'# {_plain(title)}']
    self.pictures: list[pathlib.Path] = []

  def section(self, title: str) -> None:
    self.html.append(f'<h2>{escape(title)}</h2>')
    self.plain.append(f'## {_plain(title)}')

  def text(self, text: str, kind: str = '') -> None:
    self.html.append(f'<p class="{kind}">{escape(text)}</p>')
    self.plain.append(_plain(text))

  def table(self, rows: Rows, caption: str = '') -> None:
    """The first row is the header; a table of a header alone is left out."""
    if len(rows) < 2:
      return
    head, *body = [[escape(str(cell)) for cell in row] for row in rows]
    number = [all(_numeric(row[k]) for row in rows[1:]) for k in range(len(head))]
    def line(cells, tag):
      return '<tr>' + ''.join(
          f"<{tag}{' class=n' if n else ''}>{c}</{tag}>" for c, n in
          zip(cells, number, strict=True)) + '</tr>'
    self.html.append(
        '<div class="scroll" tabindex="0"><table>'
        + (f'<caption>{escape(caption)}</caption>' if caption else '')
        + f"<thead>{line(head, 'th')}</thead><tbody>"
        + ''.join(line(row, 'td') for row in body) + '</tbody></table></div>')
    self.plain.append((f'**{_plain(caption)}**\n\n' if caption else '') + tables.markdown(
        [[_plain(str(c)) for c in row] for row in rows]))

  def charts(self, charts: Sequence[str]) -> None:
    """Figures side by side; HTML alone has them."""
    if any(charts):
      self.html.append(f"<div class=charts>{''.join(charts)}</div>")

  def details(self, title: str, text: str) -> None:
    self.html.append(f'<details><summary>{escape(title)}</summary><div class="scroll">'
                     f'<pre>{escape(text)}</pre></div></details>')

  def commands(self, lines: Sequence[str]) -> None:
    """Commands as they are typed; a line is one command."""
    self.html.append(f'<div class="scroll"><pre>{escape(chr(10).join(lines))}</pre></div>')
    fence = '`' * max(3, 1 + max(map(len, re.findall('`+', ' '.join(lines))), default=0))
    self.plain.append('\n'.join([f'{fence}sh', *lines, fence]))


def write(paths: Sequence[str], where: str | None, markdown: bool) -> int:
  """Writes report.html, or prints and writes report.md, in `where` or the first folder.

  Raises:
    InputError: no folder given, none with a run in it, or one that cannot be written.
  """
  if not paths:
    raise InputError('no folder given; usage: python -m latent_reasoning.main --mode=report '
                     'DIR … with folders of runs or comparisons')
  found = runs.find(paths)
  if not any(f.config or f.results or f.metrics for f in found.folders):
    raise InputError('nothing to report: ' + '; '.join(found.problems[:4])
                     + '. Expected folders of runs or comparisons')
  page = build(found, [pathlib.Path(p) for p in paths])
  folder = pathlib.Path(where or next(p for p in paths if pathlib.Path(p).is_dir()))
  file = folder / ('report.md' if markdown else 'report.html')
  text = html(page)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if markdown:
      text = '\n\n'.join([*page.plain, *_linked(page.pictures, folder, bool(where))]) + '\n'
    file.write_text(text, encoding='utf-8')
  except OSError as error:
    raise InputError(f'cannot write {file}: {error}; name another folder with --workdir=DIR'
                     ) from None
  if markdown:
    print(text)
  for problem in found.problems:
    print(f'warning: {problem}', file=sys.stderr)
  print(f'written to {file}', file=sys.stderr if markdown else sys.stdout)
  return 0


def build(found: runs.Found, paths: Sequence[pathlib.Path]) -> Page:
  """The page of what was found in some folders."""
  page = Page(', '.join(p.resolve().name for p in paths))
  page.text(f'{len(found.folders)} runs, reported {datetime.date.today().isoformat()} by '
            'latent_reasoning', 'quiet')
  if found.problems:
    page.text(f'{len(found.problems)} files or folders are damaged or missing: see the end.',
              'warning')
  if not all(f.causal for f in found.folders):
    page.text(NOT_CAUSAL.format(', '.join(dict.fromkeys(
        f.name for f in found.folders if not f.causal))), 'warning')
  summary, groups = comparison.summarize(found), found.groups()
  losses = {n: [f.results for f in fs if 'loss' in f.results] for n, fs in groups.items()}
  losses = {n: r for n, r in losses.items() if r}
  page.section('Results')
  if losses:
    page.table(tables.losses(losses, found.control), 'Losses, nats a token')
  others = []
  if summary['runs']:
    page.text(_explained(found, summary))
    headline, *others = comparison.document(summary)
    page.table(headline[1], headline[0])
  elif not losses:
    page.text('No run has results yet.')
  page.charts([*_accuracy(summary), *_curves(groups)])
  if summary['runs'] and others:
    page.section('In detail')
    for title, rows in others:
      page.table(rows, title)
  _one_model(page, found)
  _figures(page, [*paths, *(f.path for f in found.folders if f.path not in paths)],
           found.problems)
  _predictions(page, groups)
  _configuration(page, groups)
  _origin(page, found, paths)
  if found.problems:
    page.section('Damaged or missing')
    page.table([['file or folder: what is wrong'], *([p] for p in found.problems)])
  return page


def _explained(found: runs.Found, summary: dict[str, Any]) -> str:
  """What the numbers of the tables are."""
  sets = sorted({f"{r['n']:,} problems of {r['dataset']}/{r['split']}" for r in (
      f.results for f in found.folders) if 'accuracy' in r and 'n' in r and 'dataset' in r
      and 'split' in r})
  text = f"Exact match on {' and on '.join(sets)}, mean ± standard error over seeds."
  if len(sets) > 1:
    text += ' These runs were scored on different problems: their accuracies do not compare.'
  if any(r['against'] for r in summary['runs'].values()):
    text += (f" p is of McNemar's exact test against {summary['control']} on the same "
             'problems, all seeds pooled: whether these trained models differ, not whether '
             'other seeds would.')
  if any(r['latency'] for r in summary['runs'].values()):
    text += (' Latencies are medians at batch 1, each on its own model, measured in turn'
             f" on {found.latency.get('device', 'one machine')}.")
  if any(r['training_flops'] for r in summary['runs'].values()):
    text += (' Training FLOPs are of matrix products; training seconds include compilation '
             'and validation.')
  return text


def _accuracy(summary: dict[str, Any]) -> list[str]:
  """Bars of accuracy and latency, lines by steps and by block."""
  named = {mark(n, r): r for n, r in summary['runs'].items()}
  if not named:
    return []
  def series(points):
    return [svg.Series(n, i, points(r), r['causal'])
            for i, (n, r) in enumerate(named.items())]

  def percent(value):
    return 100 * value['mean'], 100 * (value['error'] or 0)

  charts = [svg.bars('Final accuracy', [svg.Series('final', 0, [
      (i, *percent(r['final'])) for i, r in enumerate(named.values())])], list(named),
      'exact match %', top=100)]
  if len({s for r in named.values() for s in r['by_steps']}) > 1:
    charts.append(svg.lines('Accuracy by number of steps', series(
        lambda r: [(float(s), *percent(v)) for s, v in r['by_steps'].items()]),
        'steps of a problem', 'final %', top=100))
  blocks = [s for s in series(lambda r: [
      (k, *percent(v)) for k, v in enumerate(r['per_block'], 1)]) if len(s.points) > 1]
  if blocks:
    charts.append(svg.lines('Accuracy read after each block', blocks, 'block', 'right %',
                            top=100))
  timed = {n: next(e for e in r['latency'] if e['batch'] == 1)
           for n, r in named.items() if any(e['batch'] == 1 for e in r['latency'])}
  if timed:
    charts.append(svg.bars('Latency at batch 1', [
        svg.Series(label, k, [(i, e[key], None) for i, e in enumerate(timed.values())])
        for k, (label, key) in enumerate((('first answer token', 'first_ms'),
                                          ('full answer', 'full_ms')))],
        list(timed), 'ms, median', '.2f'))
    charts.append(svg.lines('Accuracy against latency', [
        svg.Series(s.name, s.number, [(timed[s.name]['full_ms'], *percent(
            named[s.name]['final']))], s.causal) for s in series(lambda r: [])
        if s.name in timed], 'full answer ms, batch 1', 'final %', top=100))
  if len({r['parameters'] for r in named.values()} - {None}) > 2:
    charts.append(svg.lines('Accuracy against size', series(
        lambda r: [(r['parameters'], *percent(r['final']))] if r['parameters'] else []),
        'parameters', 'final %', top=100))
  return charts


def _curves(groups: dict[str, list[runs.Folder]]) -> list[str]:
  """Training loss and validation by step."""
  charts = []
  for title, split, value, label in (
      ('Training loss', 'train', 'loss', 'nats'), ('Validation loss', 'valid', 'loss', 'nats'),
      ('Validation accuracy', 'valid', 'final', 'final %')):
    series = []
    for number, (name, folders) in enumerate(groups.items()):
      causal = all(f.causal for f in folders)
      scale = 100 if value == 'final' else 1
      series.append(svg.Series(
          name if causal else f'{name} (NOT CAUSAL)', number,
          [(s, scale * v, None) for s, v in runs.curve(folders, split, value)], causal))
    charts.append(svg.lines(f'{title}, mean over seeds', series, 'training step', label,
                            100 if value == 'final' else None, dots=split == 'valid'))
  return charts


def _one_model(page: Page, found: runs.Found) -> None:
  """What other modes found of single runs: times, leakage checks, blocks."""
  for folder in found.folders:
    def of(name, folder=folder):
      file = folder.path / f'{name}.json'
      return runs.read_json(file, found.problems) if file.exists() else {}
    try:
      rows = [['method', 'batch', 'first token ms', 'full answer ms', 'first vs direct']]
      rows += [[e['method'], e['batch'], f"{e['first_ms']:.2f}", f"{e['full_ms']:.2f}",
                f"{e['first_vs_direct']:.2f}"] for e in folder.latency.get('entries') or ()
               if e.get('first_vs_direct') is not None]
      page.table(rows, f'Latency of every method on the weights of {folder.name}')
      if leakage := of('leakage'):
        page.table([['check', '', 'found'], *([c['check'], 'ok' if c['ok'] else 'FAIL',
                                               c['found']] for c in leakage['checks'])],
                   f"Leakage checks of {folder.name}, {leakage['weights']}")
      if analysis := of('analysis'):
        page.table(tables.choice(analysis['choice']), f'Which block answers, {folder.name}')
      if interventions := of('interventions'):
        page.table(tables.interventions(interventions), f'Blocks changed, {folder.name}')
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
      page.text(f'{folder.path}: latency, leakage, analysis or interventions is damaged '
                f'({type(error).__name__})', 'warning')


PNG = b'\x89PNG\r\n\x1a\n'  # how such a file begins


def _figures(page: Page, paths: Sequence[pathlib.Path], problems: list[str]) -> None:
  """Pictures found in the folders, inside the page; Markdown links them."""
  held = {f: runs.content(f, problems) for path in paths if path.is_dir()
          for f in sorted(path.glob('*.png'))}
  for file in [f for f, data in held.items() if data is not None and not data.startswith(PNG)]:
    problems.append(f'{file}: no PNG; left out')
    held[file] = None
  page.pictures = [f for f, data in held.items() if data is not None]
  files = [f for f in page.pictures if f.name not in DRAWN]
  if files:
    page.html.append('<h2>Figures</h2>')
    page.charts([
        f'<figure><figcaption>{escape(f.parent.name)}/{escape(f.name)}</figcaption><img alt='
        f'"{escape(f.stem)}" src="data:image/png;base64,'
        f'{base64.b64encode(held[f]).decode()}"></figure>' for f in files])


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
                _short(r.get('answer')), _short(' | '.join(map(str, r.get('predictions') or
                                                               ['too long'])))]
               for r in chosen]
  if len(rows) > 1:
    page.section('Predictions')
    page.text(f'The first {EXAMPLES} wrong and right answers of the first seed of each run; '
              'answers read after several blocks are parted by |.')
    page.table(rows)


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
  if lines:
    page.commands(lines)
  page.table([columns, *([one.get(k, '') for k in columns] for one in known)])


def _numeric(cell: Any) -> bool:
  """Whether a cell is empty, or a number, perhaps with its error and unit."""
  return re.fullmatch(r'|control|[-+]?[\d.,]+(e-?\d+)?( ±[\d.]+)?( %)?', str(cell)) is not None


def _plain(text: str) -> str:
  """Text that Markdown takes for nothing but text: no HTML, links, pictures or emphasis."""
  text = re.sub(r'([\\`*\[\]~])', r'\\\1', escape(' '.join(text.split()), quote=False))
  text = re.sub(r'(?<![^\W_])_|_(?![^\W_])', r'\_', text)
  return re.sub(r'://|(?<=www)\.|@', lambda m: ''.join(f'&#{ord(c)};' for c in m[0]), text)


def _short(value: Any) -> str:
  text = str(value)
  return text if len(text) <= 300 else f'{text[:299]}…'


def html(page: Page) -> str:
  title = escape(page.plain[0].removeprefix('# '), quote=False)
  return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title><style>{STYLE}</style></head>
<body><main>{''.join(page.html)}</main></body></html>
"""


STYLE = """
:root{color-scheme:light dark;--text:#1b1e23;--quiet:#5b626d;--back:#fff;--panel:#f5f6f8;
--edge:#d8dce2;--warn:#8a3b00;--warnback:#fff3e3;--grey:#80868f;--c0:#0b66b0;--c1:#c8500a;
--c2:#00805c;--c3:#b0478a;--c4:#a87400;--c5:#3d9fd8;--c6:#7a4fc9;--c7:#7c5a3a}
@media (prefers-color-scheme:dark){:root{--text:#e6e8ec;--quiet:#a2a9b4;--back:#14171b;
--panel:#1d2126;--edge:#3a414a;--warn:#ffc78a;--warnback:#3a2812;--grey:#979da6;--c0:#62aef0;
--c1:#ff935c;--c2:#3ecf9f;--c3:#e58cc4;--c4:#e6b84d;--c5:#8fd3ff;--c6:#b79af5;--c7:#c9a584}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1240px;margin:0 auto;padding:20px 16px 60px}
h1{font-size:24px;margin:8px 0 0;overflow-wrap:anywhere}
h2{font-size:18px;margin:36px 0 8px;padding-top:8px;border-top:1px solid var(--edge)}
p{max-width:76ch;margin:8px 0 12px;overflow-wrap:anywhere}
.quiet{color:var(--quiet);margin-top:2px}
.warning{color:var(--warn);background:var(--warnback);padding:8px 12px;border-radius:6px}
.scroll{overflow-x:auto;margin:12px 0;width:fit-content;max-width:100%;
border:1px solid var(--edge);border-radius:6px}
table{border-collapse:collapse;width:max-content;font-size:13.5px}
caption{text-align:left;font-weight:600;padding:8px 10px;position:sticky;left:0}
th,td{padding:5px 10px;text-align:left;vertical-align:top;border-top:1px solid var(--edge)}
td:not(.n){max-width:46ch;overflow-wrap:break-word;white-space:pre-line}
thead th{background:var(--panel);font-weight:600;vertical-align:bottom}
th:first-child,td:first-child{position:sticky;left:0;background:var(--panel);z-index:1;
max-width:30ch}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
th.n{white-space:normal;max-width:12ch;overflow-wrap:anywhere}
.charts{display:grid;gap:16px;grid-template-columns:repeat(auto-fit,minmax(min(100%,380px),1fr));
align-items:start;margin:16px 0}
figure{margin:0;padding:10px;background:var(--panel);border-radius:6px;min-width:0}
figcaption{font-weight:600;font-size:14px;margin-bottom:6px}
figure>svg{display:block;width:100%;max-width:600px;height:auto;font-size:13px}
figure>img{display:block;max-width:100%;height:auto;background:#fff;border-radius:4px}
svg text{fill:var(--text)}
.line{fill:none;stroke-width:2}.error{stroke-width:1.5}
.whisker{stroke:var(--text);stroke-width:1.5}.grid{stroke:var(--edge);stroke-width:1}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:13px;margin-top:6px}
.legend span{display:inline-flex;align-items:center;gap:6px}
details{margin:8px 0}summary{cursor:pointer;overflow-wrap:anywhere}
pre{margin:0;padding:10px;font:12.5px/1.45 ui-monospace,Menlo,Consolas,monospace}
"""
