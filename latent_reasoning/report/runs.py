"""What folders of runs hold, read with care: what is damaged is named, not raised."""

import dataclasses
import json
import pathlib
import re
import statistics
from collections.abc import Iterable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Folder:
  """One run. What could not be read is empty, and `Found.problems` says why."""
  name: str  # shared by the seeds of a run
  path: pathlib.Path
  config: dict[str, Any]
  results: dict[str, Any]
  metrics: list[dict[str, Any]]
  predictions: list[dict[str, Any]]  # of the test split
  latency: dict[str, Any]  # of --mode=latency, if it was run

  @property
  def causal(self) -> bool:
    return bool(self.results.get('causal', True)) and all(
        r.get('causal', True) for r in self.metrics)

  @property
  def seed(self) -> Any:
    return self.results.get('seed', self.config.get('seed', '?'))


@dataclasses.dataclass(frozen=True)
class Found:
  """The runs of some folders; `latency` holds what a comparison timed, by run."""
  folders: list[Folder]
  control: str
  latency: dict[str, Any]
  problems: list[str]

  def groups(self) -> dict[str, list[Folder]]:
    """Runs by name, what reads the future last."""
    groups = {}
    for folder in self.folders:
      groups.setdefault(folder.name, []).append(folder)
    return dict(sorted(groups.items(), key=lambda g: not all(f.causal for f in g[1])))


def find(paths: Iterable[str | pathlib.Path], names: Sequence[str] = (),
         control: str = '') -> Found:
  """Reads runs, or comparisons: folders of runs called NAME-SEED.

  Args:
    paths: the folders.
    names: of the runs, in the order wanted; others follow.
    control: the run that others are held against; '': as the comparison's own config
      says, or else the first of method direct.
  """
  folders, problems, latency = [], [], {}
  for path in map(pathlib.Path, paths):
    if not path.is_dir():
      problems.append(f'{path}: no such folder')
      continue
    inside = sorted(p for p in path.iterdir() if p.is_dir() and re.fullmatch(r'\w+-\d+', p.name)
                    and any((p / f'{n}.json').exists() for n in ('config', 'results')))
    if inside:
      own = path / 'config.json'  # of a comparison; runs may also have come one by one
      config = read_json(own, problems) if own.exists() else {}
      sweep = config.get('sweep') if isinstance(config.get('sweep'), dict) else {}
      control = control or sweep.get('control', '')
      order = [*names, *(r.split()[0] for r in sweep.get('runs', ()))]
      place = {name: i for i, name in reversed(list(enumerate(order)))}
      problems += [f'{path}/{name}-{seed}: missing, though the comparison asks for it'
                   for name in place for seed in sweep.get('seeds', ())
                   if path / f'{name}-{seed}' not in inside]
      inside.sort(key=lambda p: (place.get(p.name.rpartition('-')[0], len(order)), p.name))
      if (path / 'latency.json').exists():
        latency.update(_timed(path / 'latency.json', problems))
    folders += [_folder(one, problems) for one in inside or [path]]
  if not control:
    control = next((f.name for f in folders if f.results.get('method') == 'direct'), '')
  return Found(folders, control, latency, problems)


def _folder(path: pathlib.Path, problems: list[str]) -> Folder:
  config, results = (read_json(path / f'{n}.json', problems) for n in ('config', 'results'))
  if results and not _sound(results):
    problems.append(f'{path}/results.json: neither accuracy nor losses in it')
    results = {}
  texts = config.get('method') == 'lm'
  predictions = [] if texts else [
      r for r in read_lines(path / 'predictions.jsonl', problems)
      if r.get('dataset') == results.get('dataset', r.get('dataset'))]
  seed = results.get('seed', config.get('seed', r'\d+'))
  name = re.sub(f'-{seed}$', '', path.resolve().name)
  metrics = [r for r in read_lines(path / 'metrics.jsonl', problems)
             if isinstance(r.get('step'), int) and r.get('split') in ('train', 'valid')]
  timed = path / 'latency.json'
  return Folder(name, path, config, results, metrics, predictions,
                read_json(timed, problems) if timed.exists() else {})


TIMED = ('batch', 'prefix_tokens', 'tokens', 'first_ms', 'full_ms', 'first_flops',
         'full_flops')


def _timed(path: pathlib.Path, problems: list[str]) -> dict[str, Any]:
  """latency.json of a comparison; {} where an entry is not whole."""
  found = read_json(path, problems)
  try:
    if all(isinstance(e[key], (int, float)) for e in found.get('entries', ()) for key in TIMED):
      return found
    raise TypeError
  except (KeyError, TypeError):
    problems.append(f'{path}: an entry is not whole; left out')
  return {}


def _sound(results: dict[str, Any]) -> bool:
  """Whether the tables find in it what they read."""
  try:
    if 'loss' in results:
      return all(isinstance(v, (int, float)) for v in (
          results['loss'], results['train']['loss'], results['parameters'])) and (
              'causal' in results)
    accuracy = results['accuracy']
    return all(isinstance(v, (int, float)) for v in (
        accuracy['final'], accuracy['any'], *accuracy['per_block'],
        *(g['final'] for g in results['by_steps'].values()), *map(float, results['by_steps']),
        results.get('parameters', 0), results.get('trained_steps', 0),
        results.get('tokens', {'mean': 0})['mean'],
        *(results.get('training', dict.fromkeys(('seconds', 'flops'), 0))[k]
          for k in ('seconds', 'flops'))))
  except (KeyError, TypeError, AttributeError, ValueError):
    return False


def curve(folders: Sequence[Folder], split: str, value: str) -> list[tuple[int, float]]:
  """(step, mean over seeds) of a logged value; what is not a number is left out."""
  points = {}
  for folder in folders:
    for record in folder.metrics:
      if record['split'] == split and isinstance(record.get(value), (int, float)):
        points.setdefault(record['step'], []).append(record[value])
  return [(step, statistics.mean(values)) for step, values in sorted(points.items())]


def read_json(path: pathlib.Path, problems: list[str]) -> dict[str, Any]:
  """The object of a file; {} and one more problem where there is none."""
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
    if not isinstance(value, dict):
      raise ValueError(f'found {type(value).__name__}, expected an object')
    return value
  except FileNotFoundError:
    problems.append(f'{path}: missing')
  except (OSError, ValueError, RecursionError) as error:
    problems.append(f'{path}: {error}')
  return {}


def read_lines(path: pathlib.Path, problems: list[str]) -> list[dict[str, Any]]:
  """The objects of a file of JSON lines, without the lines that are none."""
  try:
    lines = path.read_text(encoding='utf-8').splitlines()
  except FileNotFoundError:
    problems.append(f'{path}: missing')
    return []
  except (OSError, ValueError) as error:
    problems.append(f'{path}: {error}')
    return []
  found, bad = [], 0
  for line in lines:
    try:
      value = json.loads(line)
      found += [value] if isinstance(value, dict) else []
      bad += not isinstance(value, dict)
    except (ValueError, RecursionError):
      bad += 1
  if bad:
    problems.append(f'{path}: {bad} of {len(lines)} lines cannot be read; left out')
  return found
