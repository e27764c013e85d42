"""Several runs by one command, each a process and a folder of its own: one after another, one
on each GPU, or one by each task of a job array (`cli.sweep_share`).

Each trains for its own steps, or for as many FLOPs as the control. At the end their models
are timed in turn in one process, and compared (report.comparison). A run that fails is named
at the end and stops no other. Starting again goes on: what has results is kept, what was cut
off resumes. This process itself opens no device: the runs need them.
"""

import concurrent.futures
import contextlib
import functools
import os
import pathlib
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from latent_reasoning import report
from latent_reasoning.cli.sweep_share import Share
from latent_reasoning.config import SweepConfig
from latent_reasoning.errors import InputError, ensure
from latent_reasoning.parallel import devices, multihost
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


def run(config: SweepConfig, flags: Sequence[str], workdir: Workdir,
        share: Share | None = None) -> int:
  """Trains and evaluates every run with every seed, then prints and writes the table.

  Args:
    config: what to run.
    flags: --config and its overrides, as the user gave them.
    workdir: of the sweep; its runs are folders in it.
    share: what of it is done here; None: all. Who does a part writes the table if nothing
      is left to do.

  Returns:
    0, or 1 if a run failed, or what a signal asked for.
  """
  runs, share = parse(config), share or Share()
  jobs = [(name, seed) for seed in config.seeds for name in runs]
  mine = share.of(len(jobs))
  whole = len(mine) == len(jobs)
  with workdir.writing() if whole else contextlib.nullcontext():
    for line in unreached(flags, runs):
      print(f'warning: {line}', file=sys.stderr)
    if config.budget == 'flops' and mine:
      ensure(not share.joined, "config.sweep.budget is 'flops', which one process counts; "
             "expected 'steps' where several train one model, or one process a run (--task)")
      own = {config.control, *(jobs[i][0] for i in mine)}
      runs |= scaled(config, flags, {n: runs[n] for n in runs if n in own}, workdir)
    status, failed = _train(flags, runs, jobs, mine, workdir, share)
    if not status and multihost.is_primary():
      _report(config, tuple(runs), jobs, workdir, whole or share.report,
              timed=share.processes == 1)
  for one in failed:
    print(f'FAILED: {one}', file=sys.stderr)
  return status or int(bool(failed))


def _train(flags: Sequence[str], runs: dict[str, list[str]], jobs: Sequence[tuple[str, int]],
           mine: Sequence[int], workdir: Workdir, share: Share) -> tuple[int, list[str]]:
  """Runs those of `mine` that have no results, as many at once as there are `share.gpus`.

  Returns:
    the status of what stopped it, or 0; and the runs that failed.
  """
  began, done_here, failed, stopped = time.monotonic(), [], [], []
  free = queue.SimpleQueue()
  for gpu in share.gpus or ('',):
    free.put({'environment': {'CUDA_VISIBLE_DEVICES': gpu}} if gpu else {})

  def train(number: int) -> None:
    name, seed = jobs[number]
    place = _place(workdir, f'{name}-{seed}')
    if stopped or _results(place):
      return
    left = ''
    if done_here:
      rest = sum(not _results(_place(workdir, f'{n}-{s}')) for n, s in (jobs[i] for i in mine))
      minutes = (time.monotonic() - began) / len(done_here) * rest / 60
      left = f', about {minutes:.0f} min left'
    print(f'run {number + 1} of {len(jobs)}: {name}, seed {seed}{left}; log in {place.path}/'
          'log.txt', file=sys.stderr, flush=True)
    slot = free.get()
    try:
      status = 0 if stopped else _child([
          *flags, *runs[name], f'--config.seed={seed}', *_ALONE, *share.joined,
          f'--workdir={place.remote or place.path}', '--mode=train'], place.path, **slot)
    finally:
      free.put(slot)
    place.push()  # its log
    if status >= 128 or status < 0 or status == multihost.LOST:
      print(f'stopped; the same command goes on with {name}, seed {seed}', file=sys.stderr)
      stopped.append(status if status > 0 else 128 - status)
    elif status:
      failed.append(f'{name}-{seed} (status {status}, see {place.path}/log.txt)')
    done_here.append(number)
  if len(share.gpus) < 2:
    for number in mine:
      train(number)
  else:
    with _passing_on(stopped), concurrent.futures.ThreadPoolExecutor(len(share.gpus)) as pool:
      list(pool.map(train, mine))
  return (stopped[0] if stopped else 0), failed


def _report(config: SweepConfig, names: Sequence[str], jobs: Sequence[tuple[str, int]],
            workdir: Workdir, asked: bool, timed: bool) -> None:
  """Writes the table where the files are; for a part of the runs only if it is the last."""
  left = [f'{n}-{s}' for n, s in jobs if not _results(_place(workdir, f'{n}-{s}'))]
  if left and not asked:
    print(f"{len(left)} of {len(jobs)} runs have no results yet ({', '.join(left[:3])}"
          f"{' …' if len(left) > 3 else ''}). Who ends the last of them makes the report; "
          '--task=report makes it of what is there', file=sys.stderr)
    return
  with contextlib.ExitStack() as stack:
    try:
      stack.enter_context(workdir.writing())
    except InputError as error:  # two ended at once
      print(f'no report from here: {error}', file=sys.stderr)
      return
    if workdir.remote:
      workdir.pull()
      for name, seed in jobs:
        _place(workdir, f'{name}-{seed}').pull()
    finish(workdir.path, names, config.control, workdir.remote, timed)
    workdir.push()


def _place(workdir: Workdir, name: str) -> Workdir:
  """The folder of a run in that of its sweep, which may be in a bucket."""
  return Workdir(workdir.path / name, workdir.remote and f'{workdir.remote}/{name}')


def _results(place: Workdir) -> dict[str, Any] | None:
  """What a run ended in, once it has; of a killed writer there may be a part."""
  if not place.remote:
    return read_object(place.results)
  file = epath.Path(place.remote) / 'results.json'
  return read_object(file.read_text()) if file.exists() else None


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


def finish(path: pathlib.Path, names: Sequence[str], control: str, remote: str = '',
           timed: bool = True) -> None:
  """Times what was trained, then prints and writes tables and figures.

  Args:
    path: of the sweep, here.
    names: of the runs, in their order.
    control: which of them the others are compared with.
    remote: the bucket's folder, where their checkpoints are.
    timed: whether one process has the devices, for the times of answers.
  """
  found = report.find([path], names, control)
  done = {n: [f.results for f in fs if f.results] for n, fs in found.groups().items()}
  done = {n: results for n, results in done.items() if results}
  if done and all('accuracy' in r for results in done.values() for r in results):
    lacking = {e['method'] for e in found.latency.get('entries', ())} != set(done)
    if lacking and not timed:
      print('the answers are not timed: that is for one process, with --task=report',
            file=sys.stderr)
    elif lacking:
      print('timing the answers of each model in turn', file=sys.stderr, flush=True)
      first = [next(f'{remote}/{f.path.name}' if remote else str(f.path)
                    for f in fs if f.results)
               for n, fs in found.groups().items() if n in done]
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
    place = _place(workdir, f'flops-{name}')
    place.pull()
    if not read_object(place.flops):
      place.path.mkdir(parents=True, exist_ok=True)
      status = _python('latent_reasoning.main', [
          *flags, *runs[name], *_ALONE, f'--workdir={place.remote or place.path}',
          '--mode=flops'], place.path / 'log.txt')
      place.pull()
    if found := read_object(place.flops):  # perhaps another task's
      counted[name] = found
    else:
      print(f'{name}: its FLOPs could not be counted (status {status}, see '
            f'{place.path}/log.txt); it trains for its own steps', file=sys.stderr)
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


_running: set[subprocess.Popen] = set()


def _child(flags: Sequence[str], place: pathlib.Path,
           environment: Mapping[str, str] | None = None) -> int:
  """Runs one training with what it prints kept in its folder; of several processes that
  train it together, each keeps its own."""
  place.mkdir(parents=True, exist_ok=True)
  log = 'log.txt' if multihost.is_primary() else f'log-{multihost.index()}.txt'
  return _python('latent_reasoning.main', flags, place / log, environment)


def _python(module: str, flags: Sequence[str], log: pathlib.Path,
            environment: Mapping[str, str] | None = None) -> int:
  """Runs one process; passes signals on. Returns its status."""
  here = threading.current_thread() is threading.main_thread()
  with log.open('a', encoding='utf-8') as log, os.fdopen(os.dup(2), 'wb') as ours, (
      _passing_on([]) if here else contextlib.nullcontext()):
    child = subprocess.Popen(
        [sys.executable, '-m', module, *flags], stdout=log, stderr=log, start_new_session=True,
        pass_fds=(ours.fileno(),), env={**os.environ, **(environment or {}),
                                        devices.RELAY: str(ours.fileno())})
    _running.add(child)
    try:
      return child.wait()
    finally:
      _running.discard(child)


@contextlib.contextmanager
def _passing_on(asked: list[int]):
  """Sends SIGINT and SIGTERM to what runs, and notes the status that they ask for."""
  def handle(number, _):
    asked.append(128 + number)
    for child in list(_running):
      child.send_signal(number)
  old = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)
