"""Plain text to model: one file, or a hub data set by name, in nanoGPT's splits."""

import dataclasses
import pathlib

from latent_reasoning.config import DataConfig
from latent_reasoning.data import hub, storage
from latent_reasoning.errors import InputError

# Name: (repository, its configuration, most characters read of a streamed one).
REPOSITORIES = {
    'shakespeare': ('karpathy/tiny_shakespeare', None, 0),
    'wikitext': ('Salesforce/wikitext', 'wikitext-103-raw-v1', 0),
    'c4': ('allenai/c4', 'en', 200_000_000),
}
TRAIN_SHARE = 0.9  # nanoGPT: the first nine tenths train, the rest validates


@dataclasses.dataclass(frozen=True)
class Text:
  """Training and validation text, and how they came about."""
  train: str
  valid: str
  report: dict


def load(config: DataConfig) -> Text:
  """Reads the text that `config` names.

  Raises:
    InputError: no such file, no text in it, or the hub cannot be reached.
  """
  if config.path:
    train, valid = _cut(_read(config.path))
    source = config.path
  elif config.name == 'text':
    raise InputError("config.data.name is 'text' but config.data.path is empty; expected "
                     'a text file; set --config.data.path=FILE, or config.data.name to one '
                     f'of {tuple(REPOSITORIES)}')
  else:
    repository, name, most = REPOSITORIES[config.name]
    splits = hub.ask_once(f'text {repository}', lambda: {
        k: _join(rows, most) for k, rows in hub.ask(
            repository, name, config, '--config.data.path=FILE',
            **({'streaming': True} if most else {})).items()})
    if 'train' not in splits:
      raise InputError(f'{repository} has the splits {sorted(splits)}; expected train')
    train, valid = ((splits['train'], splits['valid']) if splits.get('valid')
                    else _cut(splits['train']))
    source = repository
  if config.limit:
    train, valid = train[:config.limit], valid[:config.limit]
  for split, text in (('training', train), ('validation', valid)):
    if len(text) < 2:
      raise InputError(f'{source}: the {split} split has {len(text)} characters; expected '
                       'a longer text')
  return Text(train, valid, {
      'name': name_of(config), 'counts': {'train': len(train), 'valid': len(valid)},
      'unit': 'characters', 'sources': {'all': {'path': source}}})


def name_of(config: DataConfig) -> str:
  """What the data are called: the file of a text of one's own, or the data set."""
  return pathlib.PurePath(config.path).name or config.name


def _read(path: str) -> str:
  file = storage.fetch(path, 'config.data.path')
  try:
    return file.read_text(encoding='utf-8')
  except UnicodeDecodeError as error:
    raise InputError(f'{file}: byte {error.start} is not UTF-8; expected a text file; '
                     'convert it, for example with iconv') from None
  except OSError as error:
    raise InputError(f'{file}: cannot be read, {error.strerror}; expected a text file; '
                     'check config.data.path') from None


def _cut(text: str) -> tuple[str, str]:
  at = int(len(text) * TRAIN_SHARE)
  return text[:at], text[at:]


def _join(rows, most: int) -> str:
  """The rows' text, of a streamed data set up to `most` characters."""
  parts, size = [], 0
  for row in rows:
    parts.append(row['text'])
    size += len(parts[-1])
    if most and size >= most:
      break
  return '\n'.join(parts)
