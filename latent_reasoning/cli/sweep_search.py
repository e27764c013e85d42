"""The search before a comparison: of each run equally many trials, each with the whole budget
and one seed, and what is best in validation is taken. No test problem is looked at."""

import ast
import collections
import contextlib
import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from latent_reasoning.config import Config, SweepConfig, flatten
from latent_reasoning.errors import ensure

Setting = dict[str, str]  # {key: value} of a trial


def settings(config: SweepConfig, runs: Iterable[str]) -> dict[str, list[Setting]]:
  """The trials of each run, equally many; {} where nothing is searched.

  Raises:
    InputError: candidates that cannot be read, or a run that has fewer than trials.
  """
  shared, own = {}, {name: {} for name in runs}
  for text in config.search:
    name, *pairs = text.split() or ['']
    if '=' in name:
      name, pairs = '', [name, *pairs]
    ensure((name in own or not name) and pairs, f'config.sweep.search has {text!r}; expected '
           f'key=value,value …, behind the name of one of the runs {tuple(own)} where they are '
           'for it alone')
    for pair in pairs:
      key, _, values = pair.partition('=')
      found = re.split(r',(?![^()]*\))', values)  # not those of a tuple
      ensure(all(found) and len(set(found)) == len(found), f'config.sweep.search has {pair!r}; '
             'expected key=value,value … with values that differ, without spaces in them')
      Config().replace(**{key: None})  # raises for an unknown one
      (own[name] if name else shared)[key] = found
  if not config.search:
    ensure(not config.trials, f'config.sweep.trials is {config.trials}, but '
           'config.sweep.search is (), so there is nothing to try; give it candidates')
    return {}
  ensure(shared or config.trials, 'config.sweep.search has no candidates for all runs; '
         'expected some, or config.sweep.trials, the trials of each run')
  ensure(config.seeds, 'config.sweep.seeds is (); expected a seed that the trials have')
  trials = config.trials or math.prod(map(len, shared.values()))
  found = {}
  for name, its in own.items():
    grid = {**shared, **its}
    size = math.prod(map(len, grid.values()))
    ensure(size >= trials, f'config.sweep.search has {size} candidates for {name}, fewer than '
           f'the {trials} trials of each run; expected more, or fewer trials '
           '(config.sweep.trials)')
    found[name] = drawn(grid, trials)
  return found


def drawn(grid: Mapping[str, Sequence[str]], trials: int) -> list[Setting]:
  """So many of all combinations of candidates: each time the first one whose values were used
  least. More trials begin with the same."""
  rest = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
  used, found = collections.Counter(), []
  for _ in range(trials):
    one = min(rest, key=lambda setting: sum(used[pair] for pair in setting.items()))
    rest.remove(one)
    used.update(one.items())
    found.append(one)
  return found


def words(setting: Setting) -> str:
  return ', '.join(f'{key}={value}' for key, value in setting.items())


def folder(name: str, setting: Setting) -> str:
  """Where a trial is kept: by what it tries, so that other candidates are other trials."""
  return re.sub(r'[^\w=.-]', '_', '-'.join(['trial', name, *map('='.join, setting.items())]))


@dataclasses.dataclass(frozen=True)
class Found:
  """The trials of a run, and trial.json of each that has ended."""
  settings: Sequence[Setting]
  results: Sequence[dict[str, Any] | None]

  @property
  def best(self) -> int:
    """The trial of the best score, the first of equals; one that diverged is worst."""
    scores = [(r or {}).get('score') for r in self.results]
    return max(range(len(scores)), key=lambda k: (
        -math.inf if scores[k] is None else scores[k], -k))

  def lacks(self, name: str) -> str:
    """Why nothing can be chosen yet; '': it can."""
    left = [folder(name, s) for s, r in zip(self.settings, self.results, strict=True) if not r]
    if left:
      return (f'{len(left)} of its {len(self.results)} trials have no score yet, such as '
              f'{left[0]}; the same command goes on once they have (trials are the first '
              'tasks of a job array)')
    if all(r.get('score') is None for r in self.results):
      return f'all its {len(self.results)} trials diverged; expected other candidates'
    return ''


def unlike(setting: Setting, config: Mapping[str, Any] | None) -> str:
  """What a finished run was trained with in place of what is chosen now; '': with that."""
  trained = flatten(dict(config or {}))
  for key, text in setting.items():
    value = text
    with contextlib.suppress(ValueError, SyntaxError):  # a word
      value = ast.literal_eval(text)
    value = list(value) if isinstance(value, tuple) else value
    if trained.get(key, value) != value:
      return (f'it was trained with {key}={trained[key]}, and the search now chooses {text}; '
              'move its folder away to have it trained again')
  return ''


def summary(config: SweepConfig, found: Mapping[str, Found]) -> dict[str, Any]:
  """What search.json says: for each run its trials, their scores, and which was chosen."""
  return {'seed': config.seeds[0], 'budget': config.budget, 'runs': {name: {
      'chosen': None if one.lacks(name) else one.best,
      'trials': [{'set': setting, 'score': (r or {}).get('score'),
                  'trained_steps': (r or {}).get('trained_steps'),
                  'diverged': bool(r) and r.get('score') is None}
                 for setting, r in zip(one.settings, one.results, strict=True)]}
      for name, one in found.items()}}
