"""Starting a training: time to the first step, with and without compiled programs kept."""

import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from latent_reasoning.errors import InputError
from latent_reasoning.report import table


def first_step(config: str, cache: pathlib.Path, workdir: pathlib.Path) -> float:
  """Seconds from the start of a process until it has read the loss of its first step."""
  command = [sys.executable, '-m', 'latent_reasoning.main', f'--config={config}',
             f'--workdir={workdir}', f'--config.train.compilation_cache={cache}',
             '--config.train.log_every=1']
  began, said = time.perf_counter(), []
  with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
    for line in process.stderr:
      said.append(line)
      if line.startswith('step 1/'):
        process.kill()  # the rest of the training is not asked for
        return time.perf_counter() - began
  raise InputError(f'--config={config} did not come to its first step: {"".join(said)[-500:]}')


def cache_table(args) -> str:
  """Cold: an empty folder for compiled programs. Warm: the same folder again. In turn."""
  lines = [['config', 'cold s', 'warm s', 'warm / cold', 'programs', 'MiB']]
  for config in args.config:
    times = {'cold': [], 'warm': []}
    for repeat in range(args.repeats):
      with tempfile.TemporaryDirectory() as folder:
        cache = pathlib.Path(folder) / 'cache'
        for kind, own in times.items():
          own.append(first_step(config, cache, pathlib.Path(folder) / kind))
        files = [f for f in cache.iterdir() if f.name.endswith('-cache')]
        size = sum(f.stat().st_size for f in files)
      print(f'{config}, run {repeat + 1} of {args.repeats}', file=sys.stderr)
    cold, warm = (statistics.median(own) for own in times.values())
    lines.append([config, f'{cold:.2f}', f'{warm:.2f}', f'{warm / cold:.2f}',
                  str(len(files)), f'{size / 2**20:.1f}'])
  return f'medians of {args.repeats}\n\n{table(lines)}'
