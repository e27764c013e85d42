"""GSM8K and GSM8K-Aug from the Hugging Face hub, by its optional library."""

from typing import Any

from latent_reasoning.config import DataConfig
from latent_reasoning.data import files
from latent_reasoning.data.example import Example
from latent_reasoning.errors import InputError

# Name: (repository, its configuration or None).
REPOSITORIES = {'gsm8k': ('openai/gsm8k', 'main'), 'gsm8k_aug': ('whynlp/gsm8k-aug', None)}

SPLITS = {'train': 'train', 'validation': 'valid', 'valid': 'valid', 'test': 'test'}


def read(config: DataConfig) -> dict[str, tuple[list[Example], dict]]:
  """Downloads a data set, or finds it in the cache.

  Returns:
    {'train' | 'valid' | 'test': (examples, report as of `files.read`)}, for the
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
    found[split] = files.collect(numbered, _convert, config, path, 'hub')
  return found


def rows(repository: str, name: str | None, config: DataConfig, local: str,
         streaming: bool = False) -> dict[str, Any]:
  """Returns {'train' | 'valid' | 'test': rows} of the splits that there are.

  Args:
    repository, name: of the hub, and its configuration.
    config: name and cache_dir are read.
    local: the flag that gives a local copy, for the error.
    streaming: read over the network row by row, not kept.

  Raises:
    InputError: the library is missing or the hub cannot be reached.
  """
  try:
    import datasets  # only who asks for hub data needs it
  except ImportError as e:
    raise InputError(
        f"config.data.name '{config.name}' without a local path needs the library "
        "`datasets`, which is not installed; pip install 'latent_reasoning[hf]', or "
        f'give a local path with {local}') from e
  try:
    data = datasets.load_dataset(repository, name, cache_dir=config.cache_dir or None,
                                 **({'streaming': True} if streaming else {}))
  # The library raises what its own libraries raise, some of it plain Exception.
  except Exception as e:
    raise InputError(
        f'{repository} could not be loaded, {type(e).__name__}: {e}; expected the hub or '
        f'a cached copy. Three ways out: 1. give a local file or directory with {local}; '
        '2. go online once, or name the cache that holds it with '
        '--config.data.cache_dir=…; 3. use the embedded data with '
        '--config=configs/rim_arithmetic.py') from e
  return {SPLITS[split]: data[split] for split in data if split in SPLITS}


def _convert(row: dict[str, Any], config: DataConfig) -> Example:
  """Converts a row by its columns: steps or cot, else OpenAI's two."""
  trace = row.get('steps', row.get('cot'))
  if trace is None:
    return files.from_gsm8k(row, config)
  if isinstance(trace, str):  # a line holds equations, or one sentence
    trace = trace.split('\n')
  return files.from_steps({**row, 'steps': trace}, config)
