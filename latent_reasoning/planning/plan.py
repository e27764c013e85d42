"""--mode=plan: a process for each number of devices, target or batch, and what they found."""

import functools
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any

from latent_reasoning.config import ModelConfig
from latent_reasoning.errors import InputError
from latent_reasoning.planning import targets
from latent_reasoning.planning.estimate import GIB, SHARE, times
from latent_reasoning.report import markdown
from latent_reasoning.train import hardware

CHILD = 'LATENT_REASONING_PLAN'  # set in the process that has the fake devices
REMAT = typing.get_args(typing.get_type_hints(ModelConfig)['remat'])
MOST_ROWS = 1 << 16  # of a search
MOST_COMPILED = 10  # batches, of a policy


class _Failed(Exception):
  """A process that measures ended with a status; it said why."""


def _measured(argv: Sequence[str], environment: dict[str, str], *more: str) -> dict[str, Any]:
  """`measure` of a command line in a process of its own."""
  child = subprocess.run(
      [sys.executable, '-m', 'latent_reasoning.main', *argv[1:], *more], stdout=subprocess.PIPE,
      text=True, env={**os.environ, CHILD: '1', **environment})
  if child.returncode:
    raise _Failed(child.returncode)
  return json.loads(child.stdout.splitlines()[-1])


def run(argv: Sequence[str], devices: Sequence[int], kind: str, memory_gb: float | None,
        target: str = '', searched: int = 0, remat: str = '') -> int:
  """Measures for a target, or on each number of devices, each in a process; prints tables.

  Args:
    searched: the batch to begin a search with, for a target; 0: none.
    remat: the policy to search with; '': all.
  """
  if searched and not target:
    raise InputError('--search asks the compiler of a --target, such as gpu:h100; give one')
  try:
    if target:
      kind = targets.parse(target).kind
      environments = [targets.ENVIRONMENT]
    else:
      flags = os.environ.get('XLA_FLAGS', '')
      environments = [{'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS':
                       f'{flags} --xla_force_host_platform_device_count={count}'.strip()}
                      for count in devices]
    peak = hardware.named(kind)
    memory_gb = memory_gb or peak.memory / 1e9
    if searched:
      def measured(remat, rows):
        print(f'{target}: remat {remat}, {rows:,} problems …', file=sys.stderr, flush=True)
        return _measured(argv, environments[0], f'--config.model.remat={remat}',
                         f'--config.optim.batch_size={rows}')
      print(search(measured, searched, peak, memory_gb, target, (remat,) if remat else REMAT))
      return 0
    found = []
    names = [target] if target else [f'{count} devices, faked by this CPU' for count in devices]
    for own, name in zip(environments, names, strict=True):
      print(f'compiling a training step for {name} …', file=sys.stderr, flush=True)
      found.append(_measured(argv, own))
  except _Failed as error:
    return error.args[0]
  print(table(found, kind, peak, memory_gb, target))
  return 0


def largest_batch(measured: Callable[[int], dict[str, Any]], start: int, limit: float
                  ) -> dict[str, Any] | None:
  """What is measured of the largest batch that fits, to within a sixteenth of it or the least
  that the mesh divides; None: not even that fits.

  Bytes grow about linearly in rows, from those of parameters, optimizer and gradients: what is
  measured says where the limit is reached, and only what lies there is compiled.

  Args:
    measured: problems, or the next number that the mesh divides -> `measure`.
    limit: bytes of a device.
  """
  found, rows = {}, start
  while rows and rows not in found and len(found) < MOST_COMPILED:
    one = measured(rows)
    found[one['problems']] = one
    rows = _next_rows(found, one['problems'], one['row_unit'], limit)
  return max((one for one in found.values() if fits(one, limit)), default=None,
             key=lambda one: one['problems'])


def _next_rows(found: dict[int, dict[str, Any]], last: int, unit: int, limit: float) -> int:
  """How many rows to compile after these; 0: the limit is known."""
  low = max((rows for rows, one in found.items() if fits(one, limit)), default=0)
  high = min((rows for rows, one in found.items() if not fits(one, limit)),
             default=MOST_ROWS + unit)
  one = found[last]
  sizes = {0: one['total_bytes'] - one['temporary_bytes']} | {
      rows: one['total_bytes'] for rows, one in found.items()}
  a, b = sorted(sorted(sizes, key=lambda rows: abs(sizes[rows] - limit))[:2])
  slope = (sizes[b] - sizes[a]) / (b - a)
  guess = max(0, int(a + (limit - sizes[a]) / slope)) if slope > 0 else 2 * last
  guess = min(guess, 8 * low) if low else guess
  step = max(unit, (1 << max(0, guess.bit_length() - 5)) // unit * unit)
  if low and (high - low <= step or sizes[low] + slope * step > limit):
    return 0  # the next would not fit
  guess = (guess if guess < high else (low + high) // 2) // step * step
  return next((rows for rows in (guess, low + step, low + unit) if low < rows < high), 0)


def fits(one: dict[str, Any], limit: float) -> bool:
  return not one['refused'] and one['total_bytes'] < limit


def search(measured: Callable[[str, int], dict[str, Any]], start: int, peak: hardware.Peak,
           memory_gb: float, target: str, policies: Sequence[str] = REMAT) -> str:
  """The largest batch that fits under each config.model.remat, and the flags of the fastest."""
  rows, best = [['remat', 'problems', 'GiB', 'TFLOP a device', 'step ms', 'tokens/s']], None
  for remat in policies:
    one = largest_batch(functools.partial(measured, remat), start, memory_gb * 1e9)
    start = one['problems'] if one else start  # the next one keeps less
    if one is None:
      rows.append([remat, 'none fits', *[''] * 4])
      continue
    step = times(one, peak)['step']
    speed = math.prod(one['rows']) / step
    rows.append([remat, f"{one['problems']:,}", f"{one['total_bytes'] / GIB:.1f}",
                 f"{one['flops'] / one['devices'] / 1e12:.3g}", f'{1e3 * step:.3g}',
                 f'{speed:.3g}'])
    if best is None or speed > 1.02 * best[0]:  # what recomputes less, unless it is slower
      best = speed, remat, one['problems']
  flags = 'nothing fits; expected a larger target, or config.optim.grad_accum_steps'
  if best:
    flags = (f'fastest by the written model: --config.model.remat={best[1]} '
             f'--config.optim.batch_size={best[2]}')
  return (f"{markdown(rows)}\n\nlargest batches that fit {memory_gb:g} GB by {target}'s "
          f'compiler ({versions(target)}), to within a sixteenth; {flags}')


def table(found: Sequence[dict[str, Any]], kind: str, peak: hardware.Peak,
          memory_gb: float, target: str = '') -> str:
  """Markdown: GiB and milliseconds per device and step."""
  compiler = f"{target}'s compiler" if target else 'XLA on a CPU, an upper bound'
  parts = ('parameter', 'optimizer', 'gradient', 'temporary', 'activation', 'total')
  memory = [['devices (data × fsdp × tensor)', 'parameters', 'optimizer', 'gradients',
             'temporaries', 'activations, model', 'sum', f'fits {memory_gb:g} GB']]
  speed = [['devices', 'rows', 'TFLOP', 'sent', 'sent, model', 'compute ms', 'memory ms',
            'collectives ms', 'step ms', 'tokens/s', 'MFU %']]
  for one in found:
    t = times(one, peak)
    memory.append([
        f"{one['devices']} ({' × '.join(str(n) for n in one['mesh'].values())})",
        *(f"{one[f'{part}_bytes'] / GIB:.2f}" for part in parts),
        'yes' if fits(one, memory_gb * 1e9) else 'NO'])
    speed.append([
        str(one['devices']), str(one['rows'][0]), f"{one['flops'] / one['devices'] / 1e12:.3g}",
        *('' if one[key] is None else f'{sum(one[key].values()) / GIB:.3g}'
          for key in ('collectives', 'expected_collectives')),
        *(f'{1e3 * t[part]:.3g}' for part in ('compute', 'memory', 'collectives', 'step')),
        f"{math.prod(one['rows']) / t['step']:.3g}", f"{100 * t['mfu']:.1f}"])
  seen = found[0].get('rows_seen')
  shapes = ', the largest of real batches (' + ', '.join(
      f'{tokens} tokens {share:.0%}' for tokens, share in seen) + ')' if seen else ''
  one, loops = found[0], sum(one['unknown_loops'] for one in found)
  many = 'config.optim.batch_size of them'
  if one['problems'] != one['rows'][0]:
    many = f"{one['rows'][0]} of them for the {one['problems']} problems of a batch"
  took = ', '.join(f"{one['seconds_to_plan']:.0f}" for one in found)
  return '\n\n'.join([
      f"{one['parameters']:,} parameters, {one['trained']:,} trained; rows of {one['rows'][1]} "
      f'tokens{shapes}, {many} or the next number that the mesh '
      f'divides. GiB per device; temporaries are those of {compiler}', markdown(memory),
      f'{kind}: peak {peak.flops / 1e12:.3g} TFLOP/s, of which matrix products reach '
      f'{SHARE:.0%}; memory {peak.bandwidth / 1e9:.0f} GB/s; links {peak.link / 1e9:.0f} GB/s '
      f'among {peak.pod} devices, {peak.network / 1e9:.3g} GB/s beyond. Per device and step, '
      f'GiB sent are those of {compiler}, and by a model. step = max(compute, memory) + '
      'collectives, as if nothing were hidden; tokens with padding', markdown(speed),
      (f'Compiled for {target} in {took} s ({versions(target)})' if target else
       'Compiled for as many fake devices of this CPU, attention as shared_prefix, in '
       f'{took} s')
      + (f'; {loops} loops do not say how often they run, and count once' if loops else '')])


def versions(target: str) -> str:
  """Of JAX and a target's compiler, where it is installed."""
  package = {'tpu': 'libtpu', 'gpu': 'jax-cuda13-plugin'}[targets.parse(target).platform]
  found = []
  for name in ('jax', package):
    try:
      found.append(f'{name} {importlib.metadata.version(name)}')
    except importlib.metadata.PackageNotFoundError:
      continue
  return ', '.join(found)


def parse_devices(text: str) -> list[int]:
  try:
    counts = [int(part) for part in text.split(',')]
  except ValueError:
    counts = []
  if not counts or min(counts) < 1:
    raise InputError(f'--devices={text}; expected numbers of at least 1, such as 1,4,64')
  return counts
