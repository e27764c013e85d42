"""Several runs by one command: one after another, each a process and a folder of its own.

A run that fails is told at the end and stops no other. Starting again goes on: what
has results is kept, what was cut off resumes.
"""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from latent_reasoning import report
from latent_reasoning.config import SweepConfig
from latent_reasoning.errors import InputError
from latent_reasoning.workdir import Workdir, write_text


def parse(config: SweepConfig) -> dict[str, list[str]]:
  """Returns {name: ['--config.key=value', …]} of `sweep.runs`.

  Raises:
    InputError: a run without a name of its own, or a key without a value.
  """
  found = {}
  for text in config.runs:
    name, *pairs = text.split()
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
  runs, failed = parse(config), []
  jobs = [(name, seed) for seed in config.seeds for name in runs]
  began, done_here = time.monotonic(), 0
  for number, (name, seed) in enumerate(jobs, 1):
    place = workdir.path / f'{name}-{seed}'
    if (place / 'results.json').exists():
      continue
    left = ''
    if done_here:
      rest = sum(not (workdir.path / f'{n}-{s}' / 'results.json').exists() for n, s in jobs)
      left = f', about {(time.monotonic() - began) / done_here * rest / 60:.0f} min left'
    print(f'run {number} of {len(jobs)}: {name}, seed {seed}{left}; log in {place}/log.txt',
          file=sys.stderr, flush=True)
    status = _child([*flags, *runs[name], f'--config.seed={seed}', '--config.sweep.runs=()',
                     "--config.sweep.control=''", f'--workdir={place}', '--mode=train'], place)
    if status >= 128 or status < 0:
      print(f'stopped; the same command goes on with {name}, seed {seed}', file=sys.stderr)
      return status if status > 0 else 128 - status
    if status:
      failed.append(f'{name}-{seed} (status {status}, see {place}/log.txt)')
    done_here += 1
  table = report.sweep(workdir.path, list(runs), config.seeds, config.control)
  write_text(workdir.path / 'table.md', table + '\n')
  print(f'{table}\n\nwritten to {workdir.path}/table.md')
  figure = report.figure(workdir.path, list(runs), config.seeds)
  print(f'figure in {figure}' if figure else
        "no figure: matplotlib is missing (pip install 'latent_reasoning[report]')")
  for one in failed:
    print(f'FAILED: {one}', file=sys.stderr)
  return 1 if failed else 0


def _child(flags: Sequence[str], place) -> int:
  """Runs one process with what it prints kept in its folder; passes signals on."""
  place.mkdir(parents=True, exist_ok=True)
  with (place / 'log.txt').open('a', encoding='utf-8') as log:
    child = subprocess.Popen([sys.executable, '-m', 'latent_reasoning.main', *flags],
                             stdout=log, stderr=log, start_new_session=True)
    old = {n: signal.signal(n, lambda number, _: child.send_signal(number))
           for n in (signal.SIGINT, signal.SIGTERM)}
    try:
      return child.wait()
    finally:
      for number, handler in old.items():
        signal.signal(number, handler)
