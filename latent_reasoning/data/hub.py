"""Training data and evaluation sets from the Hugging Face hub, by its optional library."""

import dataclasses
from typing import Any

from latent_reasoning.config import DataConfig
from latent_reasoning.data import formats
from latent_reasoning.data.example import Example
from latent_reasoning.errors import InputError

# Name: (repository, its configuration or None).
REPOSITORIES = {'gsm8k': ('openai/gsm8k', 'main'), 'gsm8k_aug': ('whynlp/gsm8k-aug', None)}



@dataclasses.dataclass(frozen=True)
class EvalSet:
  """Where an evaluation set is, and the form of its rows (files.FORMS)."""
  repository: str
  name: str | None  # of its configuration
  split: str
  form: str
  file: str = ''  # a URL, where the repository is the library's reader of a file


SETS = {
    'gsm8k': EvalSet('openai/gsm8k', 'main', 'test', 'gsm8k'),
    'gsm_hard': EvalSet('reasoning-machines/gsm-hard', None, 'train', 'gsm_hard'),
    'svamp': EvalSet('ChilleD/SVAMP', None, 'test', 'svamp'),
    'multiarith': EvalSet('ChilleD/MultiArith', None, 'test', 'multiarith'),
    'asdiv': EvalSet('EleutherAI/asdiv', 'asdiv', 'validation', 'asdiv'),
    'prosqa': EvalSet('json', None, 'test', 'coconut', 'https://raw.githubusercontent.com/'
                      'facebookresearch/coconut/main/data/prosqa_test.json'),
    'math': EvalSet('DigitalLearningGmbH/MATH-lighteval', 'default', 'test', 'math'),
    'math500': EvalSet('HuggingFaceH4/MATH-500', None, 'test', 'math'),
    'gpqa': EvalSet('Idavidrein/gpqa', 'gpqa_main', 'train', 'gpqa'),
    'gpqa_diamond': EvalSet('Idavidrein/gpqa', 'gpqa_diamond', 'train', 'gpqa'),
}

SPLITS = {'train': 'train', 'validation': 'valid', 'valid': 'valid', 'test': 'test'}


def read(config: DataConfig) -> dict[str, tuple[list[Example], dict]]:
  """Downloads a data set, or finds it in the cache.

  Returns:
    {'train' | 'valid' | 'test': (examples, report as of `formats.read`)}, for the
    splits that the data set has.

  Raises:
    InputError: the library is missing, the hub cannot be reached, or a row is
      malformed.
  """
  repository, name = REPOSITORIES[config.name]
  found = {}
  for split, data in rows(repository, name, config, '--config.data.dir=…').items():
    path = f'{repository} {split}'
    numbered = ((f'{path} row {i}', row) for i, row in enumerate(data))
    found[split] = formats.collect(numbered, config, path, 'hub')
  return found


def read_set(name: str, config: DataConfig) -> tuple[list[Example], dict]:
  """Downloads one of `SETS`, or finds it in the cache; raises as `read`."""
  found = SETS[name]
  source = {'data_files': {found.split: found.file}} if found.file else {}
  data = rows(found.repository, found.name, config, "--config.eval.sets='(\"PATH\",)'",
              **source)
  split = SPLITS[found.split]
  if split not in data:
    raise InputError(f"{found.repository} has the splits {sorted(data)}; expected "
                     f"'{found.split}'; give a local file in config.eval.sets")
  path = f'{found.file or found.repository} {found.split}'
  return formats.collect(((f'{path} row {i}', row) for i, row in enumerate(data[split])),
                         config, path, found.form)


def rows(repository: str, name: str | None, config: DataConfig, local: str,
         **options: Any) -> dict[str, Any]:
  """Returns {'train' | 'valid' | 'test': rows} of the splits that there are.

  Args:
    repository, name: of the hub, and its configuration.
    config: cache_dir is read.
    local: the flag that gives a local copy, for the error.
    **options: of `datasets.load_dataset`.

  Raises:
    InputError: the library is missing or the hub cannot be reached.
  """
  try:
    import datasets  # only who asks for hub data needs it
  except ImportError as e:
    raise InputError(
        f'{repository} without a local path needs the library `datasets`, which is not '
        "installed; pip install -e '.[hf]', or give a local path with "
        f'{local}') from e
  try:
    data = datasets.load_dataset(repository, name, cache_dir=config.cache_dir or None,
                                 **options)
  # The library raises what its own libraries raise, some of it plain Exception.
  except Exception as e:
    raise InputError(
        f'{repository} could not be loaded, {type(e).__name__}: {e}; expected the hub or '
        f'a cached copy. Three ways out: 1. give a local file or directory with {local}; '
        '2. go online once, or name the cache that holds it with '
        '--config.data.cache_dir=…; 3. use the embedded data with '
        '--config=configs/rim_arithmetic.py') from e
  return {SPLITS[split]: data[split] for split in data if split in SPLITS}
