"""Tables in plain text."""

import collections
import math
import statistics
from collections.abc import Sequence
from typing import Any

from scipy import stats

from latent_reasoning.errors import InputError


def table(rows: Sequence[Sequence[Any]]) -> str:
  """Aligns rows of cells under the first one, which is the header."""
  cells = [[str(cell) for cell in row] for row in rows]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  lines = ['  '.join(cell.rjust(w) if i else cell.ljust(w)
                     for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip()
           for row in cells]
  return '\n'.join([lines[0], '  '.join('-' * w for w in widths), *lines[1:]])


FEW = 4


def percent(share: float | None, error: float | None = None, n: int = 0) -> str:
  """'93.2' or '93.2 ±0.8', in percent; '' for a share of nothing: NaN, null in JSON.

  Args:
    error: its standard error.
    n: of how many problems it is a share. With fewer than `FEW` of them right, or wrong, a
      standard error means nothing (0 of 3: ±0.0); '0.0 [0.0, 70.8]' has the exact interval of
      95% in its place (Clopper and Pearson, Biometrika 1934).
  """
  if share is None or math.isnan(share):
    return ''
  text = f'{100 * share:.1f}'
  if n and error is not None and min(right := round(n * share), n - right) < FEW:
    low, high = stats.binomtest(right, n).proportion_ci()
    return f'{text} [{100 * low:.1f}, {100 * high:.1f}]'
  return text + ('' if error is None else f' ±{100 * error:.1f}')


def or_empty(text: str) -> str:
  """A text of the model; where it is blank, it is said to be."""
  return text if text.strip() else '(empty)'


def results(found: dict[str, Any]) -> str:
  """The accuracy of one result of `evaluate.summarize`, in words and two tables."""
  accuracy, error = found['accuracy'], found['standard_error']
  header, row = ['answer read at'], ['accuracy %']
  blocks = accuracy['per_block']
  if len(blocks) > 1:
    header += [f'block {k}' for k in range(1, len(blocks) + 1)]
    row += [percent(a) for a in blocks]
  for name in [n for n in accuracy if n != 'per_block' and (n != 'any' or len(blocks) > 1)]:
    header.append(name)
    row.append(percent(accuracy[name], error[name], found['n']))
  steps = [['steps', *found['by_steps']],
           ['problems', *(g['n'] for g in found['by_steps'].values())],
           ['final %', *(percent(g['final']) for g in found['by_steps'].values())]]
  note = f", {found['too_long']} too long for the model" if found['too_long'] else ''
  legend = 'final: after the last block; any: after at least one of them; ' * (len(blocks) > 1)
  few = f'[low, high]: 95% interval, where fewer than {FEW} are right, or wrong'
  legend += '; '.join(text for mark, text in (('±', '±: standard error'), ('[', few))
                      if mark in ' '.join(row))
  overlap = ''.join(
      f"\n{name} {percent(one['mean'], one['standard_error'] if found['n'] > 1 else None)} %"
      for name, one in found.get('overlap', {}).items())
  return (f"{found['method']} on {found['dataset']}/{found['split']}, {found['n']} problems"
          f"{note}, compared by rule {found['rule']}\n\n{table([header, row])}\n\n{legend}\n\n"
          f'{table(steps)}{overlap}')


def paper(found: dict[str, Any]) -> str:
  """The result of `checkpoint_selection.paper` in a line, and one for each other set."""
  chosen = ', '.join(f'{step} ({n})' for step, n in zip(
      found['steps'], found['chosen'], strict=True))
  lines = [f"protocol paper: final {percent(found['accuracy'], found['standard_error'])} % of "
           f"{found['scored_items']} test items, mean and standard error over {found['cuts']} "
           f"cuts; {found['selection_items']} items chose among the checkpoints of steps "
           f'(times) {chosen}']
  lines += [f"protocol paper, {name}: final {percent(one['accuracy'], one['standard_error'])} "
            f"% of {one['n']}" for name, one in found['sets'].items()]
  return '\n'.join(lines)


def contamination(found: dict[str, Any]) -> str:
  """The result of `contamination.measure` in one line."""
  said = '; '.join(
      f"{name}: {one['exact']} of {one['n']} exact, {one['numbers_masked']} but for their "
      f"numbers, {percent(one['ngram_share'])} % of 8-grams"
      for name, one in found['sets'].items())
  part = 'all' if found['read'] == found['train'] else f"a sample, {found['read']:,}"
  return f"test questions in the training data ({part} of {found['train']:,} read): {said}"


def text(found: dict[str, Any]) -> str:
  """The losses of one result of `cli.evaluation.scored` for text."""
  mark = '' if found['causal'] else '  NOT CAUSAL: no language-modelling loss'
  rows = [['split', 'tokens', 'loss', 'next token right %'],
          *([name, f"{part['tokens']:,}", f"{part['loss']:.4f}{mark}",
             percent(part['token_accuracy'])] for name, part in (
                 ('train', found['train']), ('valid', found),
                 *([('valid, memory zeroed', found['memory_zeroed'])]
                   if 'memory_zeroed' in found else [])))]
  return (f"{found['memory'] or 'no'} memory, {found['parameters']:,} parameters, whole "
          f'splits\n\n{table(rows)}')


def data(found: dict[str, Any]) -> str:
  """The report of `data.load` in one line."""
  notes = [f"{split} {count:,}" + (' carved from train' if split in found.get('carved', {})
                                   else '') for split, count in found['counts'].items()]
  notes += [f'{count} duplicates dropped ({pair})'
            for pair, count in found.get('duplicates', {}).items() if count]
  notes += [f"{source['skipped']} malformed lines skipped in {source['path']}"
            for source in found.get('sources', {}).values() if source.get('skipped')]
  if most := sum(found.get('left_out', {}).values()):
    notes.append(f'{most:,} of too many steps left out')
  if found.get('too_long'):
    notes.append(f"{found['too_long']} of train too long, dropped")
  return f"{found['name']}: {', '.join(notes)}"


def latency(found: dict[str, Any]) -> str:
  """The table of --mode=latency."""
  rows = [['batch', 'method', 'prefix', 'tokens', 'first token ms', '±', 'full answer ms', '±',
           'first vs direct', 'first MFLOP', 'full MFLOP']]
  for entry in found['entries']:
    rows.append([
        entry['batch'], entry['method'], entry['prefix_tokens'], entry['tokens'],
        f"{entry['first_ms']:.3f}", f"{entry['first_spread_ms'] / 2:.3f}",
        f"{entry['full_ms']:.3f}", f"{entry['full_spread_ms'] / 2:.3f}",
        f"{entry['first_vs_direct']:.2f}", f"{entry['first_flops'] / 1e6:.1f}",
        f"{entry['full_flops'] / 1e6:.1f}"])
  one = {e['method']: e for e in found['entries'] if e['batch'] == 1}
  said = ''
  if 'direct' in one:
    said = '\n\nAt batch 1 ' + ', '.join(
        f"{name} begins its answer after {e['first_vs_direct']:.2f} times direct's time"
        for name, e in one.items() if name != 'direct') + '.'
  return (f'{table(rows)}\n\nprefix: tokens read before the first is generated; tokens: '
          'generated, the end token included; ±: half of the interquartile range over the '
          f'runs; first vs direct: first token against that of direct at the same batch{said}')


def verbalized_rows(found: dict[str, Any]) -> list[list[Any]]:
  """Accuracy of a reasoning decoder by text, beside what it says of other problems."""
  foreign = found['foreign']
  return [['text', 'said right %', "from another problem's memory %", 'texts'], *(
      [name, percent(part['accuracy']), percent(other['accuracy']), part['n']]
      for name, part, other in (
          *((number, part, foreign['by_text'][number])
            for number, part in found['by_text'].items()), ('all', found, foreign)))]


def verbalized(found: dict[str, Any]) -> str:
  """Accuracy and cost of a reasoning decoder."""
  times = [['batch', 'answer ms, not explained', 'answer and explanation ms'],
           *([c['batch'], f"{c['off_ms']:.2f}", f"{c['on_ms']:.2f}"] for c in found['cost'])]
  how = 'trained jointly' if found['joint'] else 'trained on the frozen model'
  example = found['samples'][0] if found['samples'] else None
  said = (f"\n\n{example['question']!r}: meant {example['meant']!r}, said {example['said']!r}"
          if example else '')
  return (f"reasoning decoder of {found['source']}, {found['parameters']:,} parameters, {how}, "
          f'exact match\n\n{table(verbalized_rows(found))}\n\n{table(times)}{said}')


def interventions(found: dict[str, Any]) -> list[list[Any]]:
  """Rows of `activation_patching.interventions`: what becomes of the answer."""
  rows = [['final answer, with', 'problems', 'accuracy %', 'answer changed %',
           "became the donor's %", 'by chance %']]
  for line in found['lines']:
    rows.append([line['name'], line['n'], percent(
        line['accuracy'], line['standard_error'], line['n']) if line['n'] else '', *(
            percent(line[key]) if key in line else ''
            for key in ('changed', 'donor', 'chance'))])
  return rows


INTERVENED = (
    'States: keys and values of blocks, pause tokens or latents, in all layers. Donor: the '
    "problem whose states are put in (transplanted, another question's), of as long a question "
    "but for 'any length'; its column is of donors with another answer, and chance is what "
    "another's donor says. Mean states: of each place, over all problems. Filler: pause tokens "
    'in place of latents')

VERDICT = {  # whether at least or at most the threshold is asked, and what is counted
    'necessity': (True, 'right answers lost with the mean states of all problems'),
    'sufficiency': (True, "answers that become another problem's with its states"),
    'selectivity': (False, 'answers changed by states of a problem with the same answer'),
    'following': (True, 'right answers that are the new ones where a fact is changed')}


def _holds(name: str, one: dict[str, Any]) -> str:
  """'yes' or 'no' where all of the interval says so."""
  if one['share'] is None:
    return 'no problems'
  low, high = one['low'] >= one['threshold'], one['high'] < one['threshold']
  if not VERDICT[name][0]:
    low, high = one['high'] <= one['threshold'], one['low'] > one['threshold']
  return 'yes' if low else 'no' if high else 'unclear'


def verdict(found: dict[str, Any]) -> list[list[Any]]:
  """Rows of the verdict of `latent_interventions.tests`, with exact 95% intervals."""
  rows = [['test', '% [95%]', 'asked %', 'holds', 'problems', 'what it is']]
  for name, one in found['verdict'].items():
    least, words = VERDICT[name]
    rows.append([name, '' if one['share'] is None else
                 f"{percent(one['share'])} [{percent(one['low'])}, {percent(one['high'])}]",
                 f"{'≥' if least else '≤'} {100 * one['threshold']:g}", _holds(name, one),
                 one['n'], words])
  noise = found['noise']
  drawn = f"of {noise['draws']} answers under noise of {noise['size']:g} times a state's norm"
  for name, key, words in (('Pass', 'pass', 'one is right'),
                           ('Maj', 'majority', 'the most frequent is right')):
    rows.append([f"{name}@{noise['draws']}", percent(noise[key]), '', '', found['n'],
                 f'{drawn}, {words}'])
  return rows


def verdict_words(found: dict[str, Any]) -> str:
  """The verdict of `latent_interventions.tests` in a sentence."""
  said = {name: _holds(name, one) for name, one in found['verdict'].items()}
  listed = [', '.join(name for name, holds in said.items() if holds == what)
            for what in ('no', 'unclear')]
  if listed[0]:
    right = next(iter(found.get('lines', ())), {}).get('accuracy')
    little = '' if right is None or right >= 0.5 else (
        f' But it answers {percent(right)}% right, so that there is little work to be done.')
    return (f"The latents of {found['method']} do not do all of the work: {listed[0]} "
            f"{'fail' if ',' in listed[0] else 'fails'}.{little}")
  if set(said.values()) != {'yes'}:
    left = ', '.join(name for name in said if said[name] != 'yes')
    return (f"Whether the latents of {found['method']} do the work, these problems do not "
            f'decide: {left} may hold or not (what is asked is of arXiv 2608.27265, of '
            'following ours).')
  return f"The latents of {found['method']} do the work: {', '.join(said)} hold."


def choice(found: dict[str, Any]) -> list[list[Any]]:
  """Rows of `answer_selection.compare`: how good the answer is that a rule takes."""
  rows = [['answer of', 'accuracy %', '% right where some block is', 'mean block']]
  rows += [[name, percent(r['accuracy'], r['standard_error'], found['n']),
            percent(r['selection']), f"{r['block']:.2f}"] for name, r in found['rules'].items()]
  return [*rows, ['any (no rule knows it)', percent(found['any']), '', '']]


def leakage(checks: Sequence[dict[str, Any]]) -> str:
  """One line a check."""
  width = max(len(c['check']) for c in checks)
  return '\n'.join(f"{'ok  ' if c['ok'] else 'FAIL'}  {c['check'].ljust(width)}  {c['found']}"
                   for c in checks)


def compare(found: Sequence[dict[str, Any]]) -> str:
  """A Markdown table of results of one data set: mean ± standard error over seeds."""
  sets = {(f['dataset'], f['split'], f['n']) for f in found}
  if len(sets) != 1:
    raise InputError(f'these runs were scored on different problems: {sorted(sets)}; '
                     'compare runs of one data set')
  groups = collections.defaultdict(list)
  for one in found:
    groups[one['method'], bool(one['causal'])].append(one)
  lines = ['| method | seeds | final % | any % | by block % | steps | checkpoint |',
           '|---|---|---|---|---|---|---|']
  for (method, causal), runs in sorted(groups.items(), key=lambda g: _mean(g[1], 'final')):
    blocks = [_over([r['accuracy']['per_block'][k] for r in runs])
              for k in range(len(runs[0]['accuracy']['per_block']))]
    several = len(blocks) > 1
    cells = [method + ('' if causal else ' (NOT CAUSAL)'),
             ', '.join(str(r['seed']) for r in sorted(runs, key=lambda r: r['seed'])),
             _over([r['accuracy']['final'] for r in runs], error=True),
             _over([r['accuracy']['any'] for r in runs], error=True) if several else '',
             ', '.join(blocks) if several else '',
             ', '.join(sorted({str(r['trained_steps']) for r in runs})), runs[0]['checkpoint']]
    lines.append(f"| {' | '.join(cells)} |")
  return '\n'.join(lines)


def losses(done: dict[str, Sequence[dict[str, Any]]], control: str) -> list[list[str]]:
  """Rows of losses of language models by run: mean ± standard error over seeds.

  What reads the future stands below the others, marked; its losses are no
  language-modelling losses.

  Args:
    done: results.json of each seed, by run.
    control: the run that others are compared with, seed by seed.
  """
  rows = [['run', 'parameters', 'seeds', 'train loss', 'valid loss',
           'against control, valid', 'memory zeroed, valid']]
  for name, runs in sorted(done.items(), key=lambda item: not item[1][0]['causal']):
    mark = '' if runs[0]['causal'] else ' (NOT CAUSAL)'
    against = _against(runs, done, control) if name != control else []
    zeroed = [run['memory_zeroed']['loss'] for run in runs if run.get('memory_zeroed')]
    rows.append([name + mark, f"{runs[0]['parameters']:,}",
                 ', '.join(str(run.get('seed', '?')) for run in runs),
                 spread([run['train']['loss'] for run in runs]),
                 spread([run['loss'] for run in runs]),
                 spread(against, '{:+.2f}') + ' %' if against else '',
                 spread(zeroed) if zeroed else ''])
  return rows


def lowest_loss(done: dict[str, Sequence[dict[str, Any]]], control: str) -> str:
  """What the losses say, in a sentence; arguments as `losses`. '' where none is causal."""
  causal = {name: runs for name, runs in done.items() if runs[0]['causal']}
  if not causal:
    return ''
  best = min(causal, key=lambda name: statistics.mean(run['loss'] for run in causal[name]))
  runs = causal[best]
  text = f"{best}: {spread([run['loss'] for run in runs])} nats a token on validation text"
  if len(causal) > 1:
    text += f', the lowest of {len(causal)} runs that do not read the future'
  if against := _against(runs, done, control) if best != control else []:
    text += f"; {spread(against, '{:+.2f}')} % against {control}"
  if zeroed := [run['memory_zeroed']['loss'] for run in runs if run.get('memory_zeroed')]:
    text += f'; {spread(zeroed)} once all that its memory returns is set to zero'
  return f'{text}.'


def _against(runs, done, control: str) -> list[float]:
  """By how many percent losses are above those of the control, seed by seed."""
  base = {run.get('seed'): run['loss'] for run in done.get(control, ()) if run['loss']}
  return [100 * (run['loss'] / base[run.get('seed')] - 1) for run in runs
          if run.get('seed') in base]


def markdown(rows: Sequence[Sequence[Any]]) -> str:
  """Rows as a Markdown table, the first one its header."""
  lines = ['| ' + ' | '.join(str(c).replace('|', '\\|').replace('\n', ' ') for c in row) + ' |'
           for row in rows]
  return '\n'.join([lines[0], '|' + '---|' * len(rows[0]), *lines[1:]])


def spread(values: Sequence[float], form: str = '{:.4f}') -> str:
  """'1.8012 ±0.0031': the mean and, of several, its standard error."""
  text = form.format(statistics.mean(values))
  if len(values) > 1:
    digits = form.replace('+', '')
    text += ' ±' + digits.format(statistics.stdev(values) / math.sqrt(len(values)))
  return text


def _mean(runs: Sequence[dict[str, Any]], name: str) -> float:
  return statistics.mean(r['accuracy'][name] for r in runs)


def _over(shares: Sequence[float], error: bool = False) -> str:
  """Mean over seeds in percent, with its standard error if there are several."""
  if not error or len(shares) < 2:
    return percent(statistics.mean(shares))
  return percent(statistics.mean(shares), statistics.stdev(shares) / math.sqrt(len(shares)))
