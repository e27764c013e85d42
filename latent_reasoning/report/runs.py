"""What folders of runs hold, read with care: what is damaged is named, not raised."""

import dataclasses
import json
import os
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
  scaling: dict[str, Any] = dataclasses.field(default_factory=dict)  # of --mode=scaling

  @property
  def causal(self) -> bool:
    return bool(self.results.get('causal', True)) and all(
        r.get('causal', True) for r in self.metrics)

  @property
  def seed(self) -> Any:
    return self.results.get('seed', self.config.get('seed', '?'))


@dataclasses.dataclass(frozen=True)
class Found:
  """The runs of some folders; `latency` holds what a comparison timed, by run, and `search`
  its budget and what it tried before (cli.sweep_search.summary)."""
  folders: list[Folder]
  control: str
  latency: dict[str, Any]
  problems: list[str]
  search: dict[str, Any] = dataclasses.field(default_factory=dict)

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
    control: the run that others are compared with; '': as the comparison's own config
      says, or else the first of method direct.
  """
  folders, problems, latency, search = [], [], {}, {}
  for path in map(pathlib.Path, paths):
    if not path.is_dir():
      problems.append(f'{path}: no such folder')
      continue
    inside = sorted(p for p in path.iterdir() if p.is_dir() and re.fullmatch(r'\w+-\d+', p.name)
                    and any((p / f'{n}.json').exists() for n in ('config', 'results')))
    if inside:
      own = path / 'config.json'  # of a comparison; runs may also have come one by one
      config = read_json(own, problems, _CONFIG) if own.exists() else {}
      sweep = config.get('sweep') or {}
      control = control or sweep.get('control') or ''
      order = [*names, *(r.split()[0] for r in sweep.get('runs') or () if r.split())]
      place = {name: i for i, name in reversed(list(enumerate(order)))}
      problems += [f'{path}/{name}-{seed}: not trained yet, though the comparison asks for it'
                   for name in place for seed in sweep.get('seeds') or ()
                   if path / f'{name}-{seed}' not in inside]
      inside.sort(key=lambda p: (place.get(p.name.rpartition('-')[0], len(order)), p.name))
      search |= {'budget': sweep['budget']} if sweep.get('budget') else {}
      if (path / 'search.json').exists():
        search |= read_json(path / 'search.json', problems, _SEARCH)
      if (path / 'latency.json').exists():
        latency.update(read_json(path / 'latency.json', problems, _TIMED))
    folders += [_folder(one, problems) for one in inside or [path]]
  made_by = {str(e['commit']) for f in folders if isinstance(
      e := f.results.get('environment'), dict) and e.get('commit')}
  if len(made_by) > 1:
    problems.append(f'results of {len(made_by)} commits stand side by side: '
                    f"{', '.join(sorted(made_by))}")
  if not control:
    control = next((f.name for f in folders if f.results.get('method') == 'direct'), '')
  return Found(folders, control, latency, problems, search)


def below(paths: Iterable[str | pathlib.Path]) -> str:
  """Folders with runs inside those given, to suggest them."""
  found = sorted({str(file.parent) for path in map(pathlib.Path, paths) if path.is_dir()
                  for file in path.glob('*/config.json')})
  return f'; there are {", ".join(found[:5])}' if found else ''


# --- what files may hold: shapes of JSON, checked before anything is shown ----------


def _number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e18


def _whole(value: Any) -> bool:
  return isinstance(value, int) and _number(value)


def _of(kind: type):
  return lambda value: isinstance(value, kind)


# A dict has these keys, those with a ? perhaps; '*' is any key; a list has items of one shape.
_RESULTS = {
    'accuracy': {'final': _number, 'any': _number, 'per_block': [_number]},
    'by_steps?': {'*': {'final': _number}}, 'n?': _whole, 'method?': _of(str),
    'seed?': _whole, 'dataset?': _of(str), 'split?': _of(str), 'parameters?': _whole,
    'trained_steps?': _number, 'tokens?': {'mean': _number},
    'training?': {'seconds': _number, 'flops': _number, 'epochs?': _number,
                  'parts?': [_number]}, 'trained?': _whole, 'passes?': _whole,
    'serial_layers?': _number, 'token_layers?': _number,
    'causal?': _of(bool)}
_LOSSES = {'loss': _number, 'train': {'loss': _number}, 'parameters': _whole,
           'causal': _of(bool), 'seed?': _whole, 'memory_zeroed?': {'loss': _number},
           'method?': _of(str)}
_CONFIG = {'method?': _of(str), 'seed?': _whole,
           'sweep?': {'control?': _of(str), 'runs?': [_of(str)], 'seeds?': [_whole],
                     'budget?': _of(str)}}
_SCALING = {'axes': lambda value: isinstance(value, dict) and not any(wrong(one, {
    'trained': _whole, 'curve': [{
        'count': _whole, 'n': _whole, 'final': _number, 'standard_error': _number,
        'by_steps': {'*': {'final': _number}}}],
    'until_agree?': dict.fromkeys(('of', 'readouts', 'final'), _number)})
    for one in value.values()) and set(value) <= {'loops', 'passes', 'latents', 'blocks'}}
_METRIC = {'step': _whole, 'split': _of(str)}
_PREDICTION = {'question?': _of(str), 'answer?': _of(str), 'predictions?': [_of(str)],
               'correct?': [_of(bool)], 'index?': _whole, 'dataset?': _of(str)}
_TRIALS = {'chosen?': _whole, 'trials': [{'set': _of(dict), 'score?': _number,
                                           'diverged': _of(bool)}]}
_SEARCH = {'seed': _whole, 'budget': _of(str), 'runs': lambda value: isinstance(
    value, dict) and all(not wrong(one, _TRIALS) and (one.get('chosen') or 0) in range(
        len(one['trials'])) for one in value.values())}
_TIMED = {'entries?': [{'method': _of(str), 'first_vs_direct?': _number, **dict.fromkeys(
    ('batch', 'prefix_tokens', 'tokens', 'first_ms', 'full_ms', 'first_flops', 'full_flops'),
    _number)}]}


def wrong(value: Any, shape: Any, where: str = '') -> str:
  """Where a value is not of a shape; '': it is."""
  if callable(shape):
    return '' if shape(value) else where or 'its value'
  if isinstance(shape, list):
    if not isinstance(value, list):
      return where or 'its value'
    return next(filter(None, (wrong(v, shape[0], f'{where}[{i}]')
                              for i, v in enumerate(value))), '')
  if not isinstance(value, dict):
    return where or 'its value'
  for key, own in shape.items():
    name, optional = key.removesuffix('?'), key.endswith('?')
    if name == '*':
      bad = next((k for k in value if not re.fullmatch(r'\d{1,9}(\.\d+)?', k)), None)
      found = f'{where}.{bad}' if bad is not None else next(filter(None, (
          wrong(v, own, f'{where}.{k}') for k, v in value.items())), '')
    elif name not in value:
      found = '' if optional else f'{where}.{name}, which is missing'
    else:
      found = wrong(value[name], own, f'{where}.{name}') if not (
          optional and value[name] is None) else ''
    if found:
      return found.lstrip('.')
  return ''


def _folder(path: pathlib.Path, problems: list[str]) -> Folder:
  config = read_json(path / 'config.json', problems, _CONFIG)
  results = read_json(path / 'results.json', problems)
  if results and (bad := wrong(results, _LOSSES if 'loss' in results else _RESULTS)):
    problems.append(f'{path}/results.json: {bad} is not as it should be; left out')
    results = {}
  results = {k: v for k, v in results.items() if v is not None}
  texts = config.get('method') == 'language_model'
  predictions = [] if texts else [
      r for r in read_lines(path / 'predictions.jsonl', problems, _PREDICTION)
      if r.get('dataset') == results.get('dataset', r.get('dataset'))]
  seed = results.get('seed', config.get('seed'))
  name = re.sub(rf'-{r"[0-9]+" if seed is None else seed}$', '', path.resolve().name)
  metrics = [r for r in read_lines(path / 'metrics.jsonl', problems, _METRIC)
             if r['split'] in ('train', 'valid')]
  timed, scaled = (read_json(file, problems, shape) if file.exists() else {}
                   for file, shape in ((path / 'latency.json', _TIMED),
                                       (path / 'scaling.json', _SCALING)))
  return Folder(name, path, config, results, metrics, predictions, timed, scaled)


def curve(folders: Sequence[Folder], split: str, value: str) -> list[tuple[int, float]]:
  """(step, mean over seeds) of a logged value; what is not a number is left out."""
  points = {}
  for folder in folders:
    for record in folder.metrics:
      if record['split'] == split and _number(record.get(value)):
        points.setdefault(record['step'], []).append(record[value])
  return [(step, statistics.mean(values)) for step, values in sorted(points.items())]


LARGEST = 1 << 28  # bytes of a file that is read


def content(path: pathlib.Path, problems: list[str]) -> bytes | None:
  """The bytes of a regular file inside its folder; None, and one more problem, otherwise:
  a link could show any file of this machine."""
  try:
    if path.is_symlink() or not path.is_file():
      problems.append(f'{path}: ' + ('missing' if not os.path.lexists(path) else
                                     'a link or no regular file; left out'))
    elif path.stat().st_size > LARGEST:
      problems.append(f'{path}: larger than {LARGEST >> 20} MiB; left out')
    else:
      return path.read_bytes()
  except OSError as error:
    problems.append(f'{path}: {error.strerror}')
  return None


def read_json(path: pathlib.Path, problems: list[str], shape: Any = None) -> dict[str, Any]:
  """The object of a file; {} and one more problem where there is none, or one of another
  shape."""
  data = content(path, problems)
  if data is None:
    return {}
  try:
    value = json.loads(data)
    if not isinstance(value, dict):
      raise ValueError(f'found {type(value).__name__}, expected an object')
  except (ValueError, RecursionError) as error:
    problems.append(f'{path}: {error}')
    return {}
  if shape and (bad := wrong(value, shape)):
    problems.append(f'{path}: {bad} is not as it should be; left out')
    return {}
  return {k: v for k, v in value.items() if v is not None}


def read_lines(path: pathlib.Path, problems: list[str], shape: Any) -> list[dict[str, Any]]:
  """The objects of a file of JSON lines that are of a shape."""
  data = content(path, problems)
  lines = [line for line in (data or b'').split(b'\n') if line.strip()]
  found = []
  for line in lines:
    try:
      value = json.loads(line)
      if not wrong(value, shape):
        found.append(value)
    except (ValueError, RecursionError):
      continue
  if bad := len(lines) - len(found):
    problems.append(f'{path}: {bad} of {len(lines)} lines cannot be read; left out')
  return found
