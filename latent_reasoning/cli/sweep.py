"""Several runs by one command: one after another, each a process and a folder of its own.

Each trains for its own steps, or for as many FLOPs as the control. At the end their models
are timed in turn in one process, and compared (report.comparison). A run that fails is named
at the end and stops no other. Starting again goes on: what has results is kept, what was cut
off resumes.
"""

import functools
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from latent_reasoning import report
from latent_reasoning.config import SweepConfig
from latent_reasoning.errors import InputError
from latent_reasoning.parallel import devices
from latent_reasoning.report import figures
from latent_reasoning.train.workdir import Workdir, read_object, write_json, write_text


def parse(config: SweepConfig) -> dict[str, list[str]]:
  """Returns {name: ['--config.key=value', …]} of `sweep.runs`.

  Raises:
    InputError: a run without a name of its own, or a key without a value.
  """
  found = {}
  for text in config.runs:
    name, *pairs = text.split() or ['']
    if not re.fullmatch(r'\w+', name) or name in found:
      raise InputError(f'config.sweep.runs has {text!r}; expected a name of its own made '
                       "of letters, digits and '_', then key=value pairs")
    for pair in pairs:
      if not re.match(r'[a-z_0-9.]+=', pair):
        raise InputError(f'config.sweep.runs has {pair!r} in {name!r}; expected key=value, '
                         'without spaces in it')
    found[name] = [f'--config.{pair}' for pair in pairs]
  if config.control and config.control not in found:
    raise InputError(f'config.sweep.control is {config.control!r}; expected one of the runs '
                     f'{tuple(found)}')
  if config.budget == 'flops' and not config.control:
    raise InputError("config.sweep.budget is 'flops', but config.sweep.control is '': there "
                     'are no FLOPs to be equal to; name a run')
  return found


def run(config: SweepConfig, flags: Sequence[str], workdir: Workdir) -> int:
  """Trains and evaluates every run with every seed, then prints and writes the table.

  Args:
    config: what to run.
    flags: --config and its overrides, as the user gave them.
    workdir: of the sweep; its runs are folders in it.

  Returns:
    0, or 1 if a run failed, or what a signal asked for.
  """
  with workdir.writing():
    return _run(config, flags, workdir)


def _run(config: SweepConfig, flags: Sequence[str], workdir: Workdir) -> int:
  runs, failed = parse(config), []
  for line in unreached(flags, runs):
    print(f'warning: {line}', file=sys.stderr)
  if config.budget == 'flops':
    runs = scaled(config, flags, runs, workdir)
  jobs = [(name, seed) for seed in config.seeds for name in runs]
  began, done_here = time.monotonic(), 0
  for number, (name, seed) in enumerate(jobs, 1):
    place = workdir.path / f'{name}-{seed}'
    if read_object(place / 'results.json'):  # of a killed writer there may be a part
      continue
    left = ''
    if done_here:
      rest = sum(not read_object(workdir.path / f'{n}-{s}' / 'results.json')
                 for n, s in jobs)
      left = f', about {(time.monotonic() - began) / done_here * rest / 60:.0f} min left'
    print(f'run {number} of {len(jobs)}: {name}, seed {seed}{left}; log in {place}/log.txt',
          file=sys.stderr, flush=True)
    status = _child([*flags, *runs[name], f'--config.seed={seed}', *_ALONE,
                     f'--workdir={place}', '--mode=train'], place)
    if status >= 128 or status < 0:
      print(f'stopped; the same command goes on with {name}, seed {seed}', file=sys.stderr)
      return status if status > 0 else 128 - status
    if status:
      failed.append(f'{name}-{seed} (status {status}, see {place}/log.txt)')
    done_here += 1
  finish(workdir.path, tuple(runs), config.control)
  for one in failed:
    print(f'FAILED: {one}', file=sys.stderr)
  return 1 if failed else 0


def unreached(flags: Sequence[str], runs: dict[str, list[str]]) -> list[str]:
  """Says of each override of all runs in which of them it does not hold."""
  found = []
  for override in flags:
    key, _, value = override.partition('=')
    own = {name: one.partition('=')[2] for name, ones in runs.items() for one in ones
           if one.partition('=')[0] == key and one.partition('=')[2] != value}
    if own:
      listed = ', '.join(f'{name} has {its}' for name, its in own.items())
      found.append(f'{override} does not reach runs that set the key themselves: {listed}. '
                   'Give config.sweep.runs, too, to compare like with like')
  return found


def finish(path: pathlib.Path, names: Sequence[str], control: str) -> None:
  """Times what was trained, then prints and writes tables and figures."""
  found = report.find([path], names, control)
  done = {n: [f.results for f in fs if f.results] for n, fs in found.groups().items()}
  done = {n: results for n, results in done.items() if results}
  if done and all('accuracy' in r for results in done.values() for r in results):
    if {e['method'] for e in found.latency.get('entries', ())} != set(done):
      print('timing the answers of each model in turn', file=sys.stderr, flush=True)
      first = [next(str(f.path) for f in fs if f.results) for n, fs in found.groups().items()
               if n in done]
      if _python('latent_reasoning.cli.latency', [*first, f'--out={path}/latency.json'],
                 path / 'latency.log'):
        print(f'FAILED: timing, see {path}/latency.log', file=sys.stderr)
      found = report.find([path], names, control)
    summary = report.summarize(found)
    write_json(path / 'compare.json', summary)
    text = '\n\n'.join(f'**{title}**\n\n{report.markdown(rows)}'
                       for title, rows in report.document(summary))
    charts = functools.partial(figures.comparison, summary)
  else:
    text = report.markdown(report.losses(done, found.control)) if done else (
        'no run has finished')
    charts = functools.partial(figures.curves, found.groups())
  write_text(path / 'table.md', text + '\n')
  print(f'{text}\n\nwritten to {path}/table.md')
  try:
    drawn = figures.write(path, charts()) if done else []
    if drawn:
      print(f"figures: {', '.join(f.name for f in drawn)}; all on one page with "
            f'--mode=report {path}')
  except InputError as error:
    print(f'no figure: {error}')


def scaled(config: SweepConfig, flags: Sequence[str], runs: dict[str, list[str]],
           workdir: Workdir) -> dict[str, list[str]]:
  """Runs with their stages lengthened or shortened to the control's training FLOPs.

  Raises:
    InputError: FLOPs could not be counted.
  """
  counted = {}
  for name in runs:
    place = workdir.path / f'flops-{name}'
    if not (place / 'flops.json').exists():
      place.mkdir(parents=True, exist_ok=True)
      if status := _python('latent_reasoning.main', [
          *flags, *runs[name], *_ALONE, f'--workdir={place}', '--mode=flops'],
          place / 'log.txt'):
        print(f'{name}: its FLOPs could not be counted (status {status}, see '
              f'{place}/log.txt); it trains for its own steps', file=sys.stderr)
        continue
    if found := read_object(place / 'flops.json'):
      counted[name] = found
  if config.control not in counted:
    raise InputError(f'the FLOPs of config.sweep.control {config.control!r} could not be '
                     f'counted; see {workdir.path}/flops-{config.control}/log.txt')
  longer = {}
  for name, own in runs.items():
    more = []
    if name in counted:
      factor = counted[config.control]['flops'] / counted[name]['flops']
      more = [f"--config.optim.stage{s['stage']}.steps={max(1, round(factor * s['steps']))}"
              for s in counted[name]['stages']]
    longer[name] = [*own, *more]
  return longer


_ALONE = ('--config.sweep.runs=()', '--config.sweep.control=',
          '--config.sweep.budget=steps')  # what makes one run of a sweep's config


def _child(flags: Sequence[str], place: pathlib.Path) -> int:
  """Runs one training with what it prints kept in its folder."""
  place.mkdir(parents=True, exist_ok=True)
  return _python('latent_reasoning.main', flags, place / 'log.txt')


def _python(module: str, flags: Sequence[str], log: pathlib.Path) -> int:
  """Runs one process; passes signals on. Returns its status."""
  with log.open('a', encoding='utf-8') as log, os.fdopen(os.dup(2), 'wb') as ours:
    child = subprocess.Popen(
        [sys.executable, '-m', module, *flags], stdout=log, stderr=log, start_new_session=True,
        pass_fds=(ours.fileno(),), env={**os.environ, devices.RELAY: str(ours.fileno())})
    old = {n: signal.signal(n, lambda number, _: child.send_signal(number))
           for n in (signal.SIGINT, signal.SIGTERM)}
    try:
      return child.wait()
    finally:
      for number, handler in old.items():
        signal.signal(number, handler)
