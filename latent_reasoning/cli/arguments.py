"""The command line: its modes, the flags that each reads, and mistakes in one line."""

import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from latent_reasoning import config as config_lib
from latent_reasoning.config import MOVED, get
from latent_reasoning.errors import InputError, nearest

# Modes of one run: the function of `cli` that does it, and the flags that it is given.
MODES: dict[str, tuple[str, ...]] = {
    'train': ('commands.train',), 'trial': ('commands.trial',), 'eval': ('commands.evaluate',),
    'generate': ('block_commands.generate', 'question', 'externalize', 'questions',
                 'answers'),
    'verbalize': ('commands.verbalize', 'question'), 'export': ('commands.export', 'format'),
    'check_leakage': ('commands.check_leakage',),
    'plot_memory': ('commands.plot_memory', 'question'),
    'scaling': ('commands.scale',), 'intervene': ('block_commands.intervene',),
    'analyze': ('block_commands.analyze',), 'latency': ('commands.latency',),
    'flops': ('commands.count',), 'verify': ('commands.verify',)}
# Modes of many runs, or of none, and the flags that they read.
WITHOUT_RUN = {'compare': (), 'report': ('folders', 'markdown'),
               'plan': ('target', 'search', 'devices', 'device_kind', 'memory_gb')}
RENAMED = {'audit': 'check_leakage', 'inside': 'analyze', 'controls': 'intervene',
           'explain': 'verbalize', 'attention': 'plot_memory'}  # since 0.1


def parse(argv: Sequence[str]) -> flags.FlagValues:
  """Parses a command line into its own flags, so that tests can call `main`.

  Raises:
    InputError: an unknown flag, config file or config key, or an ill-typed one.
  """
  values = flags.FlagValues()
  flags.DEFINE_string('workdir', None, 'folder of the run', flag_values=values)
  flags.DEFINE_enum('mode', 'train', [*MODES, *WITHOUT_RUN], 'what to do', flag_values=values)
  flags.DEFINE_string('question', None, 'text for --mode=generate, verbalize or plot_memory',
                      flag_values=values)
  flags.DEFINE_string('questions', None, 'of --mode=generate: a file, a line {"question": …} '
                      'each', flag_values=values)
  flags.DEFINE_string('answers', None, 'of --mode=generate: a new file for the answers to '
                      '--questions', flag_values=values)
  flags.DEFINE_boolean('externalize', False, 'of --mode=generate: say the steps too',
                       flag_values=values)
  flags.DEFINE_string('target', '', 'of --mode=plan: devices whose own compiler is asked, such '
                      'as tpu:v5p:2x2x1 or gpu:h100', flag_values=values)
  flags.DEFINE_boolean('search', False, 'of --mode=plan: the largest batch that fits a '
                       '--target under each model.remat, or the given one',
                       flag_values=values)
  flags.DEFINE_string('devices', '1', 'numbers of devices, of --mode=plan', flag_values=values)
  flags.DEFINE_string('device_kind', 'v5p', 'of --mode=plan: a name of hardware.PEAKS, or here',
                      flag_values=values)
  flags.DEFINE_float('memory_gb', None, 'of a device, for --mode=plan; else its kind says',
                     flag_values=values)
  flags.DEFINE_list('folders', [], 'of --mode=report; plain arguments are too',
                    flag_values=values)
  flags.DEFINE_boolean('markdown', False, 'of --mode=report: as Markdown', flag_values=values)
  flags.DEFINE_boolean('distributed', False, 'join the processes that Slurm or Cloud TPU '
                       'started', flag_values=values)
  flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0', flag_values=values)
  flags.DEFINE_integer('num_processes', None, 'that train together', flag_values=values)
  flags.DEFINE_integer('process_id', None, 'of this process, from 0', flag_values=values)
  flags.DEFINE_string('task', '', "of a config with sweep.runs: I, I/N or 'report'",
                      flag_values=values)
  flags.DEFINE_boolean('per_gpu', False, 'of a config with sweep.runs: one run on each GPU '
                       'at once', flag_values=values)
  flags.DEFINE_boolean('per_core', False, 'of a config with sweep.runs: one run on each core '
                       'of a CPU at once', flag_values=values)
  flags.DEFINE_enum('format', 'hf', ['hf', 'peft', 'native'], 'of --mode=export',
                    flag_values=values)
  flags.DEFINE_boolean('help', False, 'show this help', short_name='h', flag_values=values)
  flags.DEFINE_boolean('help_config', False, 'show every key of a configuration',
                       flag_values=values)
  _refuse_old_names(argv)
  file = flag(argv, 'config').partition(':')[0]
  if file and not pathlib.Path(file).is_file():
    raise InputError(f'--config={file} is not a file; expected a configuration such as '
                     'configs/rim_arithmetic.py, and after a colon its variant')
  sys.modules.pop('config_config', None)  # or a second file reuses the first one
  old, sys.argv = sys.argv, list(argv)  # config_flags looks for overrides there
  try:
    if saved := _saved_config(argv):
      config_flags.DEFINE_config_dict('config', saved, 'of the workdir', flag_values=values)
    else:
      config_flags.DEFINE_config_file('config', None, 'FILE.py or FILE.py:variant',
                                      flag_values=values)
    rest = values(argv)
  except Exception as error:  # the config file is the user's code: anything may come
    raise InputError(_explain(error, argv)) from None
  finally:
    sys.argv = old
  if len(rest) > 1 and values.mode != 'report':
    raise InputError(f'unexpected argument {rest[1]!r}; flags look like --name=value')
  values.folders = [*values.folders, *rest[1:]]
  asked = values.question, values.questions
  if asked != (None, None) and not values['mode'].present:
    values.mode = 'generate'  # who asks a question wants its answer
  _refuse_unread(values)
  return values


def _saved_config(argv: Sequence[str]) -> Any:
  """The configuration of the run in --workdir, where no --config is given, or that weights of
  this package bring; None: there is none, or a comparison's, whose runs are made of the
  file."""
  path, start = flag(argv, 'workdir'), flag(argv, 'config.model.init_from')
  if flag(argv, 'config') or not path or '://' in path:
    return None
  if start and not (pathlib.Path(path).expanduser() / 'config.json').exists():
    from latent_reasoning.hf import native
    found = native.find(start)
    return found and found.kind != 'peft' and ml_collections.ConfigDict(
        dataclasses.asdict(found.config)) or None
  try:
    saved = json.loads((pathlib.Path(path).expanduser() / 'config.json').read_text('utf-8'))
    if saved['sweep']['runs']:
      return None
    return ml_collections.ConfigDict(config_lib.tuples(saved))
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    return None


def _refuse_unread(values: flags.FlagValues) -> None:
  """Raises InputError for a flag that was given and that the mode does not read."""
  read = {mode: names for mode, (_, *names) in MODES.items()} | WITHOUT_RUN
  for name in sorted({name for names in read.values() for name in names}):
    if values[name].present and name not in read[values.mode]:
      modes = [f'--mode={mode}' for mode, names in read.items() if name in names]
      raise InputError(f"--{name} is not read by --mode={values.mode}; it is by "
                       f"{', '.join(modes)}")


def _refuse_old_names(argv: Sequence[str]) -> None:
  """Raises InputError for a mode or key that has another name now."""
  for i, argument in enumerate(argv):
    flag, _, value = argument.lstrip('-').partition('=')
    if flag == 'mode' and (value or ' '.join(argv[i + 1:i + 2])) in RENAMED:
      value = value or argv[i + 1]
      raise InputError(f'--mode={value} is now --mode={RENAMED[value]}')
    if argument.startswith('-') and flag.startswith('config.'):
      if flag.removeprefix('config.') in MOVED:
        raise InputError(f'{flag} is now config.{MOVED[flag.removeprefix("config.")]}')


def _explain(error: Exception, argv: Sequence[str]) -> str:
  """One line about a flag error: `config_flags` quotes whole tracebacks and reprs."""
  def whole(part):  # the key as it was typed
    return next((key[1] for key in (re.match(r'--?(config[\w.]*)', a) for a in argv)
                 if key and part in key[1].split('.')), part)
  text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
  if wrong := re.search(r'(?s)Error whilst parsing config file:\s.*\n\w*Error: (.+)', text):
    return ' '.join(wrong[1].split())
  if close := re.search(r'Did you mean "(.+?)" instead of "(.+?)"', text):
    return (f'{whole(close[2])} is unknown; did you mean '
            f"'{whole(close[2]).replace(close[2], close[1])}'? (--help_config has all keys)")
  if key := re.fullmatch(r"""["']*(\w+)["']*""", text):
    found = whole(key[1])
    return (f"{found} is unknown; {config_lib.elsewhere(found) or 'no group has such a key'} "
            '(--help_config has all keys)')
  if wrong := re.search(r"(--?config[\w.]*)=.*(?:base 10|to float): (['\"].*['\"])", text):
    kind = 'a whole number' if 'base 10' in text else 'a number'
    return f'{wrong[1]}: expected {kind}, got {wrong[2]}'
  if bare := re.search(r"flag (--\w+=.*): \('Non-boolean argument", text):
    return f'{bare[1]}: expected no value, or true or false'
  if modes := re.search(r'flag --mode=(\S+): value should be one of', text):
    return f'--mode={modes[1]} is unknown; {nearest(modes[1], [*MODES, *WITHOUT_RUN])}'
  if key := re.search(r"Unknown command line flag '([\w.]+)'", text):
    if config_lib.known(key[1]):
      return f'--{key[1]} is unknown; a key is given as --config.{key[1]}=VALUE'
    if found := config_lib.elsewhere(key[1]):
      return f'--{key[1]} is unknown; {found}, each given as --KEY=VALUE'
  if 'Traceback (most recent call last)' in text:  # of the config file: keep its end
    flag = text.partition('\n')[0].rstrip(': ')
    text = f'{flag}: {text.strip().rpartition(chr(10))[2]}'
  return f"{' '.join(text.split())} (see --help)"


def flag(argv: Sequence[str], wanted: str) -> str:
  """The text behind --wanted= (or after --wanted)."""
  for i, arg in enumerate(argv):
    name, equals, value = arg.lstrip('-').partition('=')
    if name == wanted and arg.startswith('-'):
      return value if equals else (argv[i + 1] if i + 1 < len(argv) else '')
  return ''


PLACEHOLDER = re.compile(r'[A-Z][A-Z0-9_]*')  # DIRECTORY, FILE, GSM8K_DIRECTORY


def refuse_placeholders(config, path: str | None) -> None:
  """Raises InputError where a word of the documentation stands in for a path of the user."""
  for key in ('model.init_from', 'tokenizer.path', 'data.dir', 'data.path', 'data.train',
              'data.valid', 'data.test'):
    value = get(config, key)
    if PLACEHOLDER.fullmatch(value) and not pathlib.Path(value).exists():
      raise InputError(f'config.{key} is {value!r}, which stands for a path of yours; '
                       'replace it')
  if path and PLACEHOLDER.fullmatch(path) and not pathlib.Path(path).exists():
    raise InputError(f'--workdir={path} stands for a folder of yours; replace it')
