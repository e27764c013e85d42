"""The three splits of a run: found or carved, disjoint, reported."""

import dataclasses
import hashlib
import pathlib
import re
import sys
from collections.abc import Sequence

from latent_reasoning import config_loading
from latent_reasoning.config import Config, DataConfig
from latent_reasoning.data import example, formats, hub, storage, stored
from latent_reasoning.data.arithmetic import Arithmetic
from latent_reasoning.data.example import Example
from latent_reasoning.data.prosqa import Graphs
from latent_reasoning.data.state_tracking import StateTracking
from latent_reasoning.errors import InputError, ensure, local_path, nearest

# Stems of files by split; also, after '_', endings of stems.
STEMS = {'train': ('train',), 'valid': ('valid', 'validation', 'val', 'dev'),
         'test': ('test',)}

# What two spellings of one question may differ in. Signs and decimal points stay:
# they tell 7-2 from 7+2 and 1.5 from 15.
_PUNCTUATION = re.compile(r'[^\w\s+\-*/=<>%^().]|_|\.(?!\d)')


@dataclasses.dataclass(frozen=True)
class Splits:
  """Training, validation and test problems, and how they came about.

  `report` is made for JSON: name; counts by split; rules, how answers are compared
  (eval.answer_matching), by split; sources, the report of `formats.read` by split; carved,
  {split: problems taken from train}; and duplicates, {'train_valid' | 'train_test' |
  'valid_test': problems dropped from the first of the two because the second asks the same},
  and left_out, by split, where config.max_steps leaves some out.
  """
  train: Sequence[Example]
  valid: Sequence[Example]
  test: Sequence[Example]
  report: dict


def load(config: DataConfig, seed: int) -> Splits:
  """Returns the splits that `config` names.

  A missing validation or test split is carved from train by `seed`; nothing is
  ever taken from test. Questions asked in two splits are dropped from the one
  less precious: train before valid before test.

  Raises:
    InputError: files missing, ambiguous, malformed, or too small to carve from.
  """
  if config.name in GENERATED:
    return _generated(config, seed)
  local = any((config.dir, config.train, config.valid, config.test))
  if config.name == 'files' and not local:
    raise InputError("config.data.name is 'files' but config.data.dir and train are "
                     'empty; expected a path; set --config.data.dir=…')
  if local:
    paths, rows = _resolve(config), None
    folder = stored.place(config, seed, {
        split: storage.fetch(path, 'a data file') for split, path in paths.items()})
  else:
    rows, versions = hub.listed(config)
    folder = versions and stored.place(config, seed, versions=versions)
  if kept := stored.found(folder):
    train, rest = kept
    return Splits(train, *([example.of(*row) for row in rest[s]] for s in ('valid', 'test')),
                  report=rest['report'])
  found = ({split: formats.read(path, config) for split, path in paths.items()} if local
           else hub.read(config, rows))
  if 'train' not in found:
    raise InputError(f'found the splits {sorted(found)}; expected a train split')
  sets = {split: examples for split, (examples, _) in found.items()}
  carved = {}
  for split in ('valid', 'test'):
    if split not in sets:
      sets[split], sets['train'] = _carve(sets['train'], split, config.valid_size, seed)
      carved[split] = len(sets[split])
  duplicates = _drop_duplicates(sets)
  left_out = {}
  if most := config.max_steps:
    for split, examples in sets.items():
      sets[split] = [e for e in examples if len(e.steps) <= most]
      left_out[split] = len(examples) - len(sets[split])
      ensure(sets[split], f'config.data.max_steps is {most}, and each of the {len(examples):,} '
             f'{split} problems has more steps; raise it')
  if config.limit:
    sets = {split: examples[:config.limit] for split, examples in sets.items()}
  report = {
      'name': config.name, 'counts': {s: len(sets[s]) for s in STEMS},
      'rules': {s: found.get(s, found['train'])[1]['rule'] for s in STEMS},
      'sources': {split: report for split, (_, report) in found.items()},
      'carved': carved, 'duplicates': duplicates,
      **({'left_out': left_out} if left_out else {})}
  sets['train'] = stored.keep(folder, sets['train'], {
      'report': report, **{s: [dataclasses.astuple(e) for e in sets[s]]
                           for s in ('valid', 'test')}})
  return Splits(**sets, report=report)


def load_or_stand_in(config: DataConfig, seed: int, count: int) -> Splits:
  """As `load`; where a model is only asked, and the data cannot be loaded, that is said, and
  `count` problems give shapes alone; report['absent'] has the error."""
  try:
    return load(config, seed)
  except InputError as error:
    print(f'warning: no data to compare questions with ({error})', file=sys.stderr)
    return Splits([Example('1', ('1',), '1')] * count, [], [], {
        'absent': str(error), 'rules': dict.fromkeys(STEMS, 'text')})


def load_set(entry: str, config: DataConfig, seed: int = 0) -> tuple[Sequence[Example], dict]:
  """Returns one more evaluation set, and the report of `formats.read`.

  Args:
    entry: a name of `hub.SETS`, the path or address of a file, or of a generated task what
      its test problems differ in, such as 'min_steps=9,max_steps=12'.
    config: as for `formats.read` and `hub.read`.
    seed: of what is generated.

  Raises:
    InputError: as those, or none of these.
  """
  if re.fullmatch(r'\w+=[^,/\\]*(,\w+=[^,/\\]*)*', entry):
    return _generated_set(entry, config, seed)
  if entry in hub.SETS:
    return hub.read_set(entry, config)
  if not re.search(r'[./\\]', entry) and not local_path(entry, 'config.eval.sets').exists():
    raise InputError(f'config.eval.sets has {entry!r}; expected the path of a file or the '
                     f'name of a set; {nearest(entry, hub.SETS)}')
  return formats.read(entry, config)


# Generated by (its group of keys, config.data.step_marks, seed, split), and how answers are
# compared.
GENERATED = {
    'arithmetic': (Arithmetic, 'numeric'),
    'graphs': (lambda config, marks, seed, split: Graphs(config, seed, split), 'text'),
    'state_tracking': (lambda config, marks, seed, split: StateTracking(config, seed, split),
                       'text')}


def _generated(config: DataConfig, seed: int) -> Splits:
  c = getattr(config, config.name)
  if config.limit:
    c = dataclasses.replace(c, **{
        f'{s}_size': min(getattr(c, f'{s}_size'), config.limit) for s in STEMS})
  make, rule = GENERATED[config.name]
  sets = {s: make(c, config.step_marks, seed, s) for s in STEMS}
  return Splits(**sets, report={
      'name': config.name, 'counts': {s: len(sets[s]) for s in STEMS},
      'rules': dict.fromkeys(STEMS, rule),
      'sources': {}, 'carved': {}, 'duplicates': {}})


def _generated_set(entry: str, config: DataConfig, seed: int) -> tuple[Sequence[Example], dict]:
  if config.name not in GENERATED:
    raise InputError(f'config.eval.sets has {entry!r}, keys of a generated task; '
                     f'config.data.name is {config.name!r}, expected one of {tuple(GENERATED)}')
  pairs = [pair.split('=') for pair in entry.split(',')]
  other = config_loading.from_dict(dataclasses.asdict(Config(data=config).replace(**{
      f'data.{config.name}.{key}': int(value) if value.isdigit() else value
      for key, value in pairs}))).data
  make, rule = GENERATED[config.name]
  return make(getattr(other, config.name), config.step_marks, seed, 'test'), {'rule': rule}


def _resolve(config: DataConfig) -> dict[str, str | pathlib.Path]:
  """Returns the files, by path or address, of the splits that there are files for."""
  paths = {s: _place(getattr(config, s), f'config.data.{s}')
           for s in STEMS if getattr(config, s)}
  listing = []
  if config.dir:
    place, found = _place(config.dir, 'config.data.dir'), storage.names(
        config.dir, 'config.data.dir')
    if found is not None:
      listing = sorted(pathlib.PurePath(n) for n in found if not n.startswith('.'))
      paths = {split: storage.inside(place, name.name) for split, name in
               _by_stem(listing, paths, config.dir).items()} | paths
    elif storage.is_address(place) or place.exists() or 'train' not in paths:
      paths.setdefault('train', place)  # formats.read refuses a missing file
    else:
      raise InputError(f'{place}: found no such file or directory; check config.data.dir')
  if 'train' not in paths:
    there = ', '.join(p.name for p in listing) or 'no files'
    raise InputError(
        f'{config.dir or "config.data"}: found no training file among: {there}; expected '
        "a file whose name without ending is 'train' or ends in '_train'; rename it or "
        'set config.data.train')
  return paths


def _place(text: str, key: str) -> str | pathlib.Path:
  return text if storage.is_address(text) else local_path(text, key)


def _by_stem(listing: list[pathlib.PurePath], given: dict[str, str | pathlib.Path],
             place: str) -> dict[str, pathlib.PurePath]:
  exact = {s: [p for p in listing if p.stem.lower() in stems]
           for s, stems in STEMS.items()}
  ends = {s: [p for p in listing
              if p.stem.lower().endswith(tuple(f'_{stem}' for stem in stems))]
          for s, stems in STEMS.items()}
  candidates = exact if any(exact.values()) else ends
  for split, paths in candidates.items():
    if len(paths) > 1 and split not in given:
      names = ', '.join(p.name for p in paths)
      raise InputError(f'{place}: found {len(paths)} files for {split}: {names}; '
                       f'expected one; set config.data.{split} to the one meant')
  return {split: paths[0] for split, paths in candidates.items() if paths}


def _carve(train: list[Example], split: str, size: int,
           seed: int) -> tuple[list[Example], list[Example]]:
  """Takes `size` problems out of train; returns them, shuffled, and the rest.

  The order is that of a hash, so that no library's generator can change it.
  """
  if not 0 < size < len(train):
    raise InputError(
        f'config.data.valid_size is {size}, to be carved as {split} from {len(train)} '
        f'training problems; expected 1 to {len(train) - 1}; change it, or set '
        f'config.data.{split} to a file')
  order = sorted(range(len(train)), key=lambda i: hashlib.blake2b(
      f'{seed}/{split}/{i}'.encode(), digest_size=16).digest())
  return [train[i] for i in order[:size]], [train[i] for i in sorted(order[size:])]


def normal(question: str) -> str:
  """A question without what two spellings of it may differ in: case, spaces, punctuation."""
  return ' '.join(_PUNCTUATION.sub('', question.lower()).split())


def _drop_duplicates(sets: dict[str, list[Example]]) -> dict[str, int]:
  """Makes the splits disjoint in place; returns how many of each pair met."""
  dropped, seen = {}, {'test': {normal(e.question) for e in sets['test']}}
  for split in ('valid', 'train'):
    keys = [normal(e.question) for e in sets[split]]
    for other, questions in seen.items():
      dropped[f'{split}_{other}'] = sum(k in questions for k in keys)
    kept = [i for i, k in enumerate(keys) if not any(k in q for q in seen.values())]
    if not kept:
      raise InputError(f'every {split} problem is also in another split; expected '
                       f'others; set config.data.{split} to another file')
    sets[split] = [sets[split][i] for i in kept]
    seen[split] = {keys[i] for i in kept}
  return dropped
