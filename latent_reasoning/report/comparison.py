"""What runs of several methods and seeds say together."""

import statistics
from collections.abc import Sequence
from typing import Any

from scipy import stats

from latent_reasoning.report import scaling
from latent_reasoning.report.runs import Folder, Found

# Keys of a configuration that a comparison may vary within a method.
SIZES = {'operations': 'data.arithmetic.max_steps', 'layers': 'model.num_layers',
         'width': 'model.embed_dim', 'blocks': 'rim.blocks'}


def mcnemar(only_first: int, only_second: int) -> float:
  """Two-sided exact McNemar test: p of a split as uneven as this one among the problems
  that one of two alone answers rightly, were both as good."""
  n = only_first + only_second
  return float(stats.binomtest(only_first, n).pvalue) if n else 1.0


def paired(one: Folder, other: Folder) -> tuple[int, int] | None:
  """Problems that `one` alone, and that `other` alone, answers rightly.

  None where the two were not asked the same problems.
  """
  first, second = ({r.get('index'): r for r in f.predictions} for f in (one, other))
  if not first or first.keys() != second.keys() or any(
      first[i].get('question') != second[i].get('question') for i in first):
    return None
  pairs = [(right(first[i]), right(second[i])) for i in first]
  return sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)


def right(record: dict[str, Any]) -> bool:
  """Whether the headline answer, the last one, is right."""
  return bool((record.get('correct') or [False])[-1])


def summarize(found: Found) -> dict[str, Any]:
  """Mean and standard error over seeds of all that the runs report, by run.

  'against' is the paired test against the control, by seed, and pooled: all problems of
  all seeds together. Pooled, it says whether these trained models differ, not whether
  another seed would.
  """
  groups = found.groups()
  base = {f.seed: f for f in groups.get(found.control, ()) if f.predictions}
  runs = {}
  for name, members in groups.items():
    done = [f for f in members if 'accuracy' in f.results]
    if not done:
      continue
    results, against = [f.results for f in done], {}
    for folder in done if name != found.control else ():
      counts = paired(folder, base[folder.seed]) if folder.seed in base else None
      if counts:
        against[str(folder.seed)] = _test(counts)
    if against:
      against['pooled'] = _test(tuple(sum(t[k] for t in against.values())
                                      for k in ('better', 'worse')))
    steps = sorted({s for r in results for s in r.get('by_steps', {})}, key=float)
    blocks = min(len(r['accuracy'].get('per_block', ())) for r in results)
    runs[name] = {
        'method': results[0].get('method', name), 'seeds': [f.seed for f in done],
        'causal': all(f.causal for f in done), 'n': results[0].get('n'),
        'final': over([r['accuracy']['final'] for r in results]),
        'any': over([r['accuracy']['any'] for r in results]),
        'per_block': [over([r['accuracy']['per_block'][k] for r in results])
                      for k in range(blocks)],
        'by_steps': {s: over([r['by_steps'][s]['final'] for r in results
                              if s in r.get('by_steps', ())]) for s in steps},
        'parameters': results[0].get('parameters'), 'trained': results[0].get('trained'),
        **{key: results[0].get(key) for key in ('passes', 'serial_layers', 'token_layers')},
        'scaling': scaled([f.scaling['axes'] for f in done if f.scaling]),
        'epochs': over([r['training']['epochs'] for r in results
                        if r.get('training', {}).get('epochs')]),
        'parts': [over(steps) for steps in zip(*(
            r['training']['parts'] for r in results if r.get('training', {}).get('parts')),
                                               strict=False)],
        'sizes': {label: _get(done[0].config, key) for label, key in SIZES.items()},
        'tokens': over([r['tokens']['mean'] for r in results if 'tokens' in r]),
        'trained_steps': sorted({r.get('trained_steps') for r in results} - {None}),
        'training_seconds': over([r['training']['seconds'] for r in results
                                  if 'training' in r]),
        'training_flops': over([r['training']['flops'] for r in results if 'training' in r]),
        'latency': [e for e in found.latency.get('entries', ()) if e.get('method') == name],
        'against': against}
  return {'control': found.control, 'runs': runs, 'search': found.search}


def scaled(members: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Accuracy by what the models compute when asked, over seeds: {axis: {'trained', 'curve':
  [(number, mean and standard error), …]}}."""
  found = {}
  for axis in sorted(set.intersection(*map(set, members)) if members else ()):
    curves = [{p['count']: p['final'] for p in one[axis]['curve']} for one in members]
    counts = sorted(set.intersection(*map(set, curves)))
    found[axis] = {'trained': members[0][axis]['trained'], 'curve': [
        (count, over([curve[count] for curve in curves])) for count in counts]}
    early = [one[axis]['until_agree'] for one in members if 'until_agree' in one[axis]]
    found[axis]['until_agree'] = {key: over([one[key] for one in early])
                                  for key in ('of', 'readouts', 'final')} if early else {}
  return found


def _get(config: dict[str, Any], key: str) -> Any:
  for part in key.split('.'):
    config = config.get(part) if isinstance(config, dict) else None
  return config


def varied(summary: dict[str, Any]) -> tuple[str, dict[str, list[tuple[float, str]]]] | None:
  """What the runs of a method differ in, if it is one thing: its label, and by method the
  (value, run) pairs in order. Where several of `SIZES` differ, the length of chains, which
  sets the number of blocks too, or else the number of parameters. Blocks are not one thing
  where passes over them differ too."""
  runs = summary['runs']
  differ = [label for label in SIZES
            if len({str(r['sizes'][label]) for r in runs.values()}) > 1]
  label = ('' if not differ else differ[0] if len(differ) == 1 or 'operations' in differ else
           'parameters')
  lines = {}
  for name, run in runs.items():
    value = run['parameters'] if label == 'parameters' else run['sizes'].get(label)
    if isinstance(value, (int, float)):
      lines.setdefault(mark(run['method'], run), []).append((value, name))
  own = [{x for x, _ in points} for points in lines.values()]
  if max(map(len, own), default=0) < 2 or any(
      len(x) < len(points) for x, points in zip(own, lines.values(), strict=True)):
    return None
  if label == 'blocks' and any(len({runs[name]['passes'] for _, name in points}) > 1
                               for points in lines.values()):
    return None
  return label, {method: sorted(points) for method, points in lines.items()}


def over(values: Sequence[float]) -> dict[str, float] | None:
  """Mean and standard error (None of one value alone)."""
  if not values:
    return None
  error = float(stats.sem(values)) if len(values) > 1 else None
  return {'mean': statistics.mean(values), 'error': error}


def _test(counts: tuple[int, int]) -> dict[str, Any]:
  return {'better': counts[0], 'worse': counts[1], 'p': mcnemar(*counts)}


def finding(summary: dict[str, Any]) -> str:
  """What the runs say, in a sentence or two: the best against the control, in accuracy and
  in time; '' where nothing was scored."""
  runs = {name: run for name, run in summary['runs'].items() if run['causal']}
  if not runs:
    return ''
  def accuracy(name):
    return f"{name} answers {share(runs[name]['final'])}% right"
  best, control = max(runs, key=lambda name: runs[name]['final']['mean']), summary['control']
  text = accuracy(best) + (f" of {runs[best]['n']:,} problems" if runs[best]['n'] else '')
  if control in runs and best != control:
    gain = 100 * (runs[best]['final']['mean'] - runs[control]['final']['mean'])
    pooled = runs[best]['against'].get('pooled')
    text += (f", {gain:.1f} points more than the control: {accuracy(control)}"
             + (f' (p {probability(pooled["p"])})' if pooled else ''))
  text += '.'
  others = [name for name in runs if name not in (best, control)]
  if others and len(others) < 12:
    text += ' Others: ' + ', '.join(
        f"{name} {share(runs[name]['final'])}" for name in sorted(
            others, key=lambda name: -runs[name]['final']['mean'])) + '.'
  blocks = runs[best]['per_block']
  if len(blocks) > 1:
    text += (' Read after each block, its answers are right in '
             + ', '.join(share({**block, 'error': None}) for block in blocks) + '%.')
  times = {name: next((e for e in run['latency'] if e['batch'] == 1), None)
           for name, run in runs.items()}
  if best != control and times[best] and times.get(control):
    ratio = times[best]['full_ms'] / times[control]['full_ms']
    text += f" {best}'s full answer takes {ratio:.2f} times as long as the control's."
  return text


def explained(found: Found, summary: dict[str, Any]) -> str:
  """What the numbers of the tables are."""
  sets = sorted({f"{r['n']:,} problems of {r['dataset']}/{r['split']}" for r in (
      f.results for f in found.folders) if 'accuracy' in r and 'n' in r and 'dataset' in r
      and 'split' in r})
  several = any(len(run['seeds']) > 1 for run in summary['runs'].values())
  text = (f"Exact match on {' and on '.join(sets)}, "
          + ('mean ± standard error over seeds' if several else 'one seed')
          + '. Final: the answer, read after the last block where there are blocks; any: some '
          'block is right, though no rule knows which; steps: of training; tokens: generated '
          'for an answer.')
  if len(sets) > 1:
    text += ' These runs were scored on different problems: their accuracies do not compare.'
  if any(r['against'] for r in summary['runs'].values()):
    text += (f" p is of McNemar's exact test against {summary['control']} on the same "
             'problems, all seeds pooled: whether these trained models differ, not whether '
             'other seeds would.')
  if any(r['latency'] for r in summary['runs'].values()):
    text += (' Latencies are medians at batch 1, each on its own model, measured in turn'
             f" on {found.latency.get('device', 'one machine')}.")
  if any(r['passes'] for r in summary['runs'].values()):
    text += (' Passes are those of the model, one after another, before its first token; '
             'serial layers all that follow one another until then, token-layers tokens times '
             'layers.')
  text += fairness(found.search)
  if any(r['training_flops'] for r in summary['runs'].values()):
    text += (' Training FLOPs are of matrix products; training seconds include compilation '
             'and validation.')
  return text


BUDGETS = {'steps': 'for its own steps', 'flops': "for the control's FLOPs",
           'epochs': "for the control's passes over the training problems",
           'patience': 'until validation improves no more, its own steps at most'}


def fairness(search: dict[str, Any]) -> str:
  """Which budget the runs have, and how their settings were found, in sentences."""
  text = ''
  if budget := BUDGETS.get(search.get('budget')):
    text += f' Budget: each run trains {budget}.'
  if search.get('runs'):
    text += (' Before, each run was tried equally often, each time with this budget and one '
             'seed, and all its seeds have what was best in validation; no test problem was '
             'looked at. A trial that diverged counts as the worst.')
  return text


# Tables: rows of cells, the first one the header. ------------------------------------


def mark(name: str, run: dict[str, Any]) -> str:
  return name if run['causal'] else f'{name} (NOT CAUSAL)'


def share(value: dict[str, float] | None) -> str:
  """'93.2 ±0.8', in percent."""
  return number(value and {k: v and 100 * v for k, v in value.items()}, '.1f')


def number(value: dict[str, float] | None, form: str) -> str:
  """A mean and, of several, its standard error; '' for nothing."""
  if value is None:
    return ''
  error = '' if value['error'] is None else f" ±{value['error']:{form}}"
  return f"{value['mean']:{form}}{error}"


def probability(p: float) -> str:
  if p < 1e-300:
    return '<1e-300'
  return f'{p:.1g}' if p < 0.001 else f'{p:.3f}'


def document(summary: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
  """All tables with something in them: (title, rows)."""
  titled = [('Final accuracy and cost', headline(summary)), ('Training', training(summary)),
            *searches(summary.get('search', {})),
            ('By number of steps, final %', by_steps(summary)),
            ('By block, %', by_block(summary)), *by_axis(summary),
            ('Compute before the first token of the answer', compute(summary)),
            (f"Against {summary['control']}, McNemar's exact test", tests(summary)),
            ('Latency, each on its own model', times(summary))]
  return [(title, rows) for title, rows in titled if len(rows) > 1 and len(rows[0]) > 1]


def headline(summary: dict[str, Any]) -> list[list[str]]:
  """Accuracy, significance and cost, a row a run."""
  rows = [['run', 'seeds', 'final %', 'any %', 'p against control', 'parameters', 'steps',
           'passes', 'tokens', 'first token ms', 'full answer ms', 'training TFLOP',
           'training s']]
  for name, run in summary['runs'].items():
    one = next((e for e in run['latency'] if e['batch'] == 1), {})
    flops = run['training_flops']
    pooled = run['against'].get('pooled')
    rows.append([
        mark(name, run), ', '.join(map(str, run['seeds'])), share(run['final']),
        share(run['any']) if len(run['per_block']) > 1 else '',
        'control' if name == summary['control'] else probability(pooled['p']) if pooled else '',
        f"{run['parameters']:,}" if run['parameters'] else '',
        ', '.join(map(str, run['trained_steps'])), str(run['passes'] or ''),
        number(run['tokens'], '.1f'),
        f"{one['first_ms']:.2f}" if one else '', f"{one['full_ms']:.2f}" if one else '',
        f"{flops['mean'] / 1e12:.3g}" if flops else '',
        number(run['training_seconds'], '.0f')])
  return dropped(rows)


def training(summary: dict[str, Any]) -> list[list[str]]:
  """How long each run was trained, and how much of it."""
  return dropped([['run', 'trained parameters', 'epochs', 'steps of each part'], *(
      [mark(name, run), f"{run['trained']:,}" if run['trained'] else '',
       number(run['epochs'], '.3g'), ' + '.join(f"{part['mean']:.0f}" for part in run['parts'])]
      for name, run in summary['runs'].items())])


def compute(summary: dict[str, Any]) -> list[list[str]]:
  """What each run computes before it answers; a chain of thought's tokens included."""
  return dropped([['run', 'passes', 'serial layers', 'token-layers'], *(
      [mark(name, run), str(run['passes'] or ''), *(
          f'{run[key]:,.0f}' if run[key] else '' for key in ('serial_layers', 'token_layers'))]
      for name, run in summary['runs'].items())])


def searches(search: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
  """What was tried of each run, what it scored, and what was chosen: title and rows."""
  rows = [['run', 'searched', 'validation of each trial', 'chosen']]
  for name, run in search.get('runs', {}).items():
    trials, chosen = run['trials'], run.get('chosen')
    tried = [' / '.join(map(str, one['set'].values())) for one in trials]
    rows.append([name, ' / '.join(trials[0]['set']) if trials else '', ', '.join(
        f'{setting}: {_score(one)}' for setting, one in zip(tried, trials, strict=True)),
                 '' if chosen is None else tried[chosen]])
  count = max((len(run['trials']) for run in search.get('runs', {}).values()), default=0)
  return [(f"Search, {count} trials of each run with seed {search['seed']}, by validation %",
           rows)] if count else []


def _score(trial: dict[str, Any]) -> str:
  score = trial.get('score')
  if score is None:
    return 'diverged' if trial['diverged'] else '?'
  return f'{100 * score:.1f}' if score >= 0 else f'loss {-score:.4f}'


def by_steps(summary: dict[str, Any]) -> list[list[str]]:
  """Final accuracy by the number of a problem's steps."""
  steps = sorted({s for run in summary['runs'].values() for s in run['by_steps']}, key=float)
  if len(steps) < 2:  # the final accuracy once more
    return []
  return [['run', *(f'{s} steps' for s in steps)],
          *([mark(name, run), *(share(run['by_steps'].get(s)) for s in steps)]
            for name, run in summary['runs'].items())]


def by_block(summary: dict[str, Any]) -> list[list[str]]:
  """Accuracy read after each block, of the methods that have several."""
  runs = {n: r for n, r in summary['runs'].items() if len(r['per_block']) > 1}
  if len(summary['runs']) < 2:  # the finding says it
    return []
  most = max((len(r['per_block']) for r in runs.values()), default=0)
  return [['run', *(f'block {k}' for k in range(1, most + 1))],
          *([mark(name, run), *map(share, run['per_block']),
             *[''] * (most - len(run['per_block']))] for name, run in runs.items())]


def by_axis(summary: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
  """Accuracy by what was computed when asked (eval.scaling): title and rows of each axis."""
  found = []
  for axis in sorted({axis for run in summary['runs'].values() for axis in run['scaling']}):
    runs = {mark(n, r): r['scaling'][axis] for n, r in summary['runs'].items()
            if axis in r['scaling']}
    counts = sorted({count for one in runs.values() for count, _ in one['curve']})
    early = any(one['until_agree'] for one in runs.values())
    rows = [['run', 'trained with', *map(str, counts),
             *['readouts until two agree', 'of', 'right there'] * early]]
    for name, one in runs.items():
      curve, until = dict(one['curve']), one['until_agree']
      rows.append([name, str(one['trained']), *(share(curve.get(c)) for c in counts), *(
          [number(until.get('readouts'), '.2f'), number(until.get('of'), '.0f'),
           share(until.get('final'))] if early else [])])
    found.append((f'By {scaling.NAMES[axis]} when asked, %', rows))
  return found


def tests(summary: dict[str, Any]) -> list[list[str]]:
  """McNemar's exact test against the control, pooled and by seed."""
  runs = {n: r for n, r in summary['runs'].items() if r['against']}
  seeds = sorted({s for r in runs.values() for s in r['against']} - {'pooled'}, key=float)
  rows = [['run', 'right, control wrong', 'wrong, control right', 'p, all seeds',
           *(f'p, seed {s}' for s in seeds)]]
  for name, run in runs.items():
    own = run['against']
    rows.append([mark(name, run), str(own['pooled']['better']), str(own['pooled']['worse']),
                 probability(own['pooled']['p']),
                 *(probability(own[s]['p']) if s in own else '' for s in seeds)])
  return rows


def times(summary: dict[str, Any]) -> list[list[str]]:
  """Latency of each run's own model."""
  rows = [['run', 'batch', 'prefix tokens', 'tokens', 'first token ms', 'full answer ms',
           'first MFLOP', 'full MFLOP']]
  for name, run in summary['runs'].items():
    rows += [[mark(name, run), str(e['batch']), str(e['prefix_tokens']), str(e['tokens']),
              f"{e['first_ms']:.2f}", f"{e['full_ms']:.2f}", f"{e['first_flops'] / 1e6:.1f}",
              f"{e['full_flops'] / 1e6:.1f}"] for e in run['latency']]
  return rows


def dropped(rows: list[list[str]]) -> list[list[str]]:
  """Without columns that are empty in every row."""
  keep = [k for k in range(len(rows[0])) if any(row[k] for row in rows[1:])]
  return [[row[k] for k in keep] for row in rows]
