"""Several runs by one command, each a process and a folder of its own: one after another, one
on each GPU, or one by each task of a job array (`cli.sweep_share`).

Each trains for its own steps, or for as many FLOPs or epochs as the control. Where something is
searched (`cli.sweep_search`), trials come first. At the end their models
are timed in turn in one process, and compared (report.comparison). A run that fails is named
at the end and stops no other. Starting again goes on: what has results is kept, what was cut
off resumes. This process itself opens no device: the runs need them.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import pathlib
import queue
import re
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from latent_reasoning import report
from latent_reasoning.cli import sweep_processes, sweep_search
from latent_reasoning.cli.sweep_share import WHOLE, Share
from latent_reasoning.config import SweepConfig
from latent_reasoning.errors import InputError, ensure
from latent_reasoning.parallel import multihost
from latent_reasoning.report import comparison, figures
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
  if config.budget in SCALED and not config.control:
    raise InputError(f'config.sweep.budget is {config.budget!r}, but config.sweep.control is '
                     f"'': there are no {SCALED[config.budget]} to be equal to; name a run")
  return found


@dataclasses.dataclass(frozen=True)
class Job:
  """One training.

  Attributes:
    run: its name in sweep.runs.
    folder: its own, in that of the sweep.
    about: seed or trial, in words.
    flags: what makes it this run.
    mode: 'train', or 'trial' of a search.
    same: the folder of a trial that was this very training; '': there is none.
  """
  run: str
  folder: str
  about: str
  flags: Sequence[str]
  mode: str = 'train'
  same: str = ''

  def result(self, workdir: Workdir) -> dict[str, Any] | None:
    """What it ended in, once it has."""
    return _results(_place(workdir, self.folder), END[self.mode])


SCALED = {'flops': 'FLOPs', 'epochs': 'epochs'}  # budgets that the control's training sets
END = {'train': 'results.json', 'trial': 'trial.json'}  # what a finished training leaves


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
  search = sweep_search.settings(config, runs)
  count = sum(map(len, search.values()))  # of trials, which are numbered first
  total = count + len(runs) * len(config.seeds)
  mine = share.of(total)
  whole = len(mine) == total
  with workdir.writing() if whole else contextlib.nullcontext():
    for line in unreached(flags, runs):
      print(f'warning: {line}', file=sys.stderr)
    for key, value in (('budget', config.budget in SCALED), ('search', search)):
      ensure(not (share.joined and value and mine), f'config.sweep.{key} is '
             f'{getattr(config, key)!r}, which one process counts; expected the default where '
             'several train one model, or one process a run (--task)')
    order = [*(name for name in search for _ in search[name]), *list(runs) * len(config.seeds)]
    more = {name: [[f'--config.{key}={value}' for key, value in setting.items()]
                   for setting in search.get(name, ({},))] for name in runs}
    if config.budget in SCALED and mine:
      more |= _budgets(config, flags, runs, {order[i]: more[order[i]] for i in mine}, workdir)
    trials = [Job(name, sweep_search.folder(name, setting),
                  f'trial of {sweep_search.words(setting)}',
                  [*runs[name], *own, f'--config.seed={config.seeds[0]}'], 'trial')
              for name in search
              for setting, own in zip(search[name], more[name], strict=True)]
    status, failed = _train(flags, trials, [i for i in mine if i < count], 0, total, workdir,
                            share)
    found = {name: sweep_search.Found(search[name], [
        job.result(workdir) for job in trials if job.run == name]) for name in search}
    best = {name: found[name].best if name in found else 0 for name in runs}
    seeds = [Job(name, f'{name}-{seed}', f'seed {seed}', [
        *runs[name], *more[name][best[name]], f'--config.seed={seed}'],
        same=sweep_search.folder(name, search[name][best[name]]) * (
            seed == config.seeds[0]) if name in found else '')
        for seed in config.seeds for name in runs]
    ready = []
    for i in () if status else [i for i in mine if i >= count]:
      job = seeds[i - count]
      wrong = ''
      if job.run in found and not (wrong := found[job.run].lacks(job.run)):
        wrong = sweep_search.unlike(search[job.run][found[job.run].best], job.result(
            workdir) and _results(_place(workdir, job.folder), 'config.json'))
      if wrong:
        failed.append(f'{job.folder}: {wrong}')
      else:
        ready.append(i)
    if not status:
      status, wrong = _train(flags, seeds, ready, count, total, workdir, share)
      failed += wrong
    if not status and multihost.is_primary():
      _report(config, tuple(runs), seeds, workdir, whole or share.report,
              timed=share.processes == 1, search=found)
  for one in failed:
    print(f'FAILED: {one}', file=sys.stderr)
  return status or int(bool(failed))


def _budgets(config: SweepConfig, flags: Sequence[str], runs: dict[str, list[str]],
             more: dict[str, list[list[str]]], workdir: Workdir) -> dict[str, list[list[str]]]:
  """Further overrides of trials, with the steps of the control's budget. Trials that differ
  in learning rates alone cost the same, and are counted once."""
  def costs(flags):
    return tuple(f for f in flags if not f.partition('=')[0].endswith('learning_rate'))
  kinds, known = {config.control: runs[config.control]}, {}
  for name, settings in more.items():
    for k, own in enumerate(settings):
      one = [*runs[name], *own]
      known[name, k] = next((kind for kind, other in kinds.items() if costs(other) == costs(
          one)), f'{name}-{k}' if own else name)
      kinds.setdefault(known[name, k], one)
  longer = scaled(config, flags, kinds, workdir)
  return {name: [[*own, *longer[known[name, k]][len(kinds[known[name, k]]):]]
                 for k, own in enumerate(settings)] for name, settings in more.items()}


def _train(flags: Sequence[str], jobs: Sequence[Job], mine: Sequence[int], first: int,
           total: int, workdir: Workdir, share: Share) -> tuple[int, list[str]]:
  """Runs those of `mine` that have no results, as many at once as there are `share.slots`.

  Args:
    mine: numbers of jobs among the `total`, of which the first of `jobs` has number `first`.

  Returns:
    the status of what stopped it, or 0; and the runs that failed.
  """
  began, done_here, failed, stopped = time.monotonic(), [], [], []
  free = queue.SimpleQueue()
  for slot in share.slots or (WHOLE,):
    free.put(slot)

  def train(number: int) -> None:
    job = jobs[number - first]
    place = _place(workdir, job.folder)
    if stopped or job.result(workdir):
      return
    left = ''
    if done_here:
      rest = sum(not jobs[i - first].result(workdir) for i in mine)
      minutes = (time.monotonic() - began) / len(done_here) * rest / 60
      left = f', about {minutes:.0f} min left'
    print(f'run {number + 1} of {total}: {job.run}, {job.about}{left}; log in {place.path}/'
          'log.txt', file=sys.stderr, flush=True)
    if job.same and not workdir.remote:
      _begin_as(workdir.path / job.same, place.path)
    slot = free.get()
    try:
      status = 0 if stopped else sweep_processes.child([
          *flags, *job.flags, *_ALONE, *share.joined,
          f'--workdir={place.remote or place.path}', f'--mode={job.mode}'], place.path, slot)
    finally:
      free.put(slot)
    place.push()  # its log
    if status >= 128 or status < 0 or status == multihost.LOST:
      print(f'{_ended(status, place.path)}; the same command goes on with {job.run}, '
            f'{job.about}', file=sys.stderr)
      stopped.append(status if status > 0 else 128 - status)
    elif status:
      failed.append(f'{job.folder} (status {status}, see {place.path}/log.txt)')
    done_here.append(number)
  if len(share.slots) < 2:
    for number in mine:
      train(number)
  else:
    pool = concurrent.futures.ThreadPoolExecutor(len(share.slots))
    with sweep_processes.passing_on(stopped), pool:
      list(pool.map(train, mine))
  return (stopped[0] if stopped else 0), failed


def _ended(status: int, path: pathlib.Path) -> str:
  """How a run ended that did not end by itself."""
  number = -status if status < 0 else status - 128
  if status == multihost.LOST or number in (signal.SIGINT, signal.SIGTERM):
    return 'stopped'
  name = next((one.name for one in signal.Signals if one == number), f'signal {number}')
  return f'{path.name} was ended by {name}, see {path}/log.txt'


def _begin_as(trial: pathlib.Path, place: pathlib.Path) -> None:
  """Gives a run that is not there yet the files of a trial with its settings and seed: it is
  trained, and only has to be scored."""
  if trial.is_dir() and not (place / 'config.json').exists():
    shutil.copytree(trial, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns(
        '.lock', 'log*.txt', 'commands.txt', 'trial.json', 'wandb*'))


def _report(config: SweepConfig, names: Sequence[str], jobs: Sequence[Job],
            workdir: Workdir, asked: bool, timed: bool,
            search: Mapping[str, sweep_search.Found]) -> None:
  """Writes the table where the files are; for a part of the runs only if it is the last."""
  left = [job.folder for job in jobs if not job.result(workdir)]
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
      for job in jobs:
        _place(workdir, job.folder).pull()
    if search:
      write_json(workdir.path / 'search.json', sweep_search.summary(config, search))
    finish(workdir.path, names, config.control, workdir.remote, timed)
    workdir.push()


def _place(workdir: Workdir, name: str) -> Workdir:
  """The folder of a run in that of its sweep, which may be in a bucket."""
  return Workdir(workdir.path / name, workdir.remote and f'{workdir.remote}/{name}')


def _results(place: Workdir, name: str) -> dict[str, Any] | None:
  """What a run ended in, once it has; of a killed writer there may be a part."""
  if not place.remote:
    return read_object(place.path / name)
  file = epath.Path(place.remote) / name
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
      if sweep_processes.python('latent_reasoning.cli.latency', [
          *first, f'--out={path}/latency.json'], path / 'latency.log'):
        print(f'FAILED: timing, see {path}/latency.log', file=sys.stderr)
      found = report.find([path], names, control)
    summary = report.summarize(found)
    write_json(path / 'compare.json', summary)
    text = '\n\n'.join(f'**{title}**\n\n{report.markdown(rows)}'
                       for title, rows in report.document(summary))
    charts = functools.partial(figures.comparison, summary)
    legend = f'{comparison.explained(found, summary)}\n\n'
  else:
    text = '\n\n'.join([
        report.markdown(report.losses(done, found.control)) if done else 'no run has finished',
        *(f'**{title}**\n\n{report.markdown(rows)}'
          for title, rows in report.searches(found.search))])
    charts, legend = functools.partial(figures.curves, found.groups()), ''
  write_text(path / 'table.md', text + '\n')
  print(f'{text}\n\n{legend}written to {path}/table.md')
  try:
    drawn = figures.write(path, charts()) if done else []
    if drawn:
      print(f"figures: {', '.join(f.name for f in drawn)}; all on one page with "
            f'--mode=report {path}')
  except InputError as error:
    print(f'no figure: {error}')


def scaled(config: SweepConfig, flags: Sequence[str], runs: dict[str, list[str]],
           workdir: Workdir) -> dict[str, list[str]]:
  """Runs with their stages lengthened or shortened to the control's training FLOPs,
  or its epochs.

  Raises:
    InputError: those of the control could not be counted.
  """
  counted, what = {}, SCALED[config.budget]
  for name in runs:
    place = _place(workdir, f'flops-{name}')
    place.pull()
    if not read_object(place.flops):
      place.path.mkdir(parents=True, exist_ok=True)
      status = sweep_processes.python('latent_reasoning.main', [
          *flags, *runs[name], *_ALONE, f'--workdir={place.remote or place.path}',
          '--mode=flops'], place.path / 'log.txt')
      place.pull()
    if found := read_object(place.flops):  # perhaps another task's
      counted[name] = found
    else:
      print(f'{name}: its {what} could not be counted (status {status}, see '
            f'{place.path}/log.txt); it trains for its own steps', file=sys.stderr)
  if config.control not in counted:
    raise InputError(f'the {what} of config.sweep.control {config.control!r} could not be '
                     f'counted; see {workdir.path}/flops-{config.control}/log.txt')
  longer = {}
  for name, own in runs.items():
    more = []
    if name in counted:
      factor = counted[config.control][config.budget] / counted[name][config.budget]
      more = [f"--config.optim.stage{s['stage']}.steps={max(1, round(factor * s['steps']))}"
              for s in counted[name]['stages']]
    longer[name] = [*own, *more]
  return longer


_ALONE = ('--config.sweep.runs=()', '--config.sweep.control=', '--config.sweep.budget=steps',
          '--config.sweep.search=()', '--config.sweep.trials=0')  # one run of a sweep's config
