"""Reasoning inside a language model: train, evaluate, ask, check, time, look into.

  python -m latent_reasoning.main --config=FILE[:variant] [--workdir=DIR]
      [--mode=MODE] [--config.key=value ...]

Modes:
  train          train (or resume), then evaluate on the test split; the default. A config
                 with sweep.runs trains them all and ends in a comparison
  eval           evaluate the workdir's checkpoint on the test split and eval.sets
  generate       answer --question="...", questions typed at a prompt, or a file of them:
                 --questions=FILE [--answers=FILE], a line {"question": "..."} each; with
                 --externalize (of a model trained with config.rim.externalize) also each
                 block's step
  verbalize      turn what the memory holds into text, of --question="...", or of the test
                 split with accuracy and cost; trains a small decoder for it
                 (config.reasoning_decoder)
  analyze        RiM's blocks: which one answers, what their states hold, where they attend
  intervene      RiM's blocks: answers when they are zeroed, swapped or taken from elsewhere
  plot_memory    draw which slots of the implicit memory each token of --question="..." reads
  check_leakage  prove by gradient that nothing attends to what it must not; exit status 1
                 if it does
  latency        time to first answer token and to the full answer, of every method
  export         write a directory that transformers loads (--format=hf); LoRA and new tokens
                 as an adapter that PEFT puts on the pretrained weights (--format=peft); or
                 what this package alone loads, of every method (--format=native)
  verify         check every checkpoint of the workdir; exit status 1 if one is unsound
  flops          count the training FLOPs of the configuration; trains nothing
  plan           bytes, FLOPs, collectives and time of a training step on devices that are not
                 here: of a --target such as tpu:v5p:2x2x1 or gpu:h100, by its own compiler
                 (extras plan-tpu, plan-gpu), or an upper bound for --devices=1,4,64 of a
                 --device_kind; do they fit --memory_gb. --search: the largest batch that does
  compare        train a config's sweep.runs one after another, then time and compare them;
                 with --per_gpu one on each GPU at once. A task of a job array takes one run,
                 by its number (of Slurm, of a Kubernetes Indexed Job, or --task=I from 0);
                 --task=I/N every N-th from I on. Who ends the last run makes the report,
                 --task=report what there is
  report         one HTML page of the folders given, of runs or comparisons:
                 --mode=report DIR ... [--workdir=DIR] [--markdown]; needs no --config

Three commands to start with:
  python -m latent_reasoning.main --config=configs/rim_arithmetic.py
  python -m latent_reasoning.main --config=configs/rim_arithmetic.py --mode=generate \\
      --question="7+2-5*3+4"
  python -m latent_reasoning.main --config=configs/rim_arithmetic.py --config.method=direct

A workdir (runs/<config>-<variant>-<method> unless given) holds config.json,
metrics.jsonl, checkpoints/, events/ (TensorBoard), predictions.jsonl and
results.json. Starting again in it resumes, also with other keys where they change no number
(config.mesh, model.remat, optim.grad_accum_steps, intervals; kept in history.jsonl), and with
--config.train.extend=N for more steps of the last stage; it may be in a bucket (gs://…). A run
that is there is opened by --workdir alone. --help_config prints every key with its value and
meaning, and --config=FILE --help what a file trains and its variants.

eval and generate need no training where --config.model.init_from names weights, of the hub,
of another run or of an export, and --workdir a new folder; those of --format=native bring
their configuration, so that they need no --config either.

Several processes train one model, where the mesh (config.mesh) spans their devices:
--distributed under Slurm or on Cloud TPU, elsewhere --coordinator=HOST:PORT
--num_processes=N --process_id=I. They need one folder for checkpoints.

Exit status: 0 done, 1 failed check, training error, or devices that cannot do it (out of
memory, held by another process, a kernel or driver that is not there), 2 a mistake in the
command or its input, 75 another process was lost (134 where JAX noticed first), 128 + n
stopped by signal n, saved. After 75, 134 and 143 (SIGTERM) the same command goes on; after
1 and 2 it would fail again.
"""

import ast
import contextlib
import dataclasses
import importlib
import json
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import ml_collections
from absl import flags, logging
from ml_collections import config_flags

from latent_reasoning import config as config_lib
from latent_reasoning.cli import allocator
from latent_reasoning.config import MOVED, get
from latent_reasoning.errors import DeviceError, InputError, TrainingError, nearest


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


def default_workdir(config_flag: str, method: str) -> pathlib.Path:
  """runs/<config>-<variant>-<method>, without a variant that was not given."""
  file, _, variant = config_flag.partition(':')
  parts = [pathlib.Path(file).stem, variant, method]
  name = '-'.join(re.sub(r'[^\w.]+', '_', part) for part in parts if part)
  return pathlib.Path('runs') / name


def flag(argv: Sequence[str], wanted: str) -> str:
  """The text behind --wanted= (or after --wanted)."""
  for i, arg in enumerate(argv):
    name, equals, value = arg.lstrip('-').partition('=')
    if name == wanted and arg.startswith('-'):
      return value if equals else (argv[i + 1] if i + 1 < len(argv) else '')
  return ''


def plan(args, config, argv: Sequence[str]) -> int:
  """Measures in child processes with the devices; such a child prints JSON."""
  from latent_reasoning.planning import estimate
  from latent_reasoning.planning import plan as planner
  if planner.CHILD in os.environ:
    print(json.dumps(estimate.measure(config, args.target)))
    return 0
  return planner.run(argv, planner.parse_devices(args.devices), args.device_kind,
                     args.memory_gb, args.target, args.search and config.optim.batch_size,
                     flag(argv, 'config.model.remat') and config.model.remat)


# Modes of one run: the function of `cli` that does it, and the flags that it is given.
MODES: dict[str, tuple[str, ...]] = {
    'train': ('commands.train',), 'eval': ('commands.evaluate',),
    'generate': ('block_commands.generate', 'question', 'externalize', 'questions',
                 'answers'),
    'verbalize': ('commands.verbalize', 'question'), 'export': ('commands.export', 'format'),
    'check_leakage': ('commands.check_leakage',),
    'plot_memory': ('commands.plot_memory', 'question'),
    'intervene': ('block_commands.intervene',), 'analyze': ('block_commands.analyze',),
    'latency': ('commands.latency',), 'flops': ('commands.count',),
    'verify': ('commands.verify',)}
TOGETHER = ('train', 'eval')  # modes of several processes
FRESH = ('check_leakage', 'latency', 'flops')  # modes that need no checkpoint
# Modes of many runs, or of none, and the flags that they read.
WITHOUT_RUN = {'compare': (), 'report': ('folders', 'markdown'),
               'plan': ('target', 'search', 'devices', 'device_kind', 'memory_gb')}
RENAMED = {'audit': 'check_leakage', 'inside': 'analyze', 'controls': 'intervene',
           'explain': 'verbalize', 'attention': 'plot_memory'}  # since 0.1


def call(mode: str, run, args: flags.FlagValues) -> int:
  """Runs a mode of `MODES`."""
  path, *names = MODES[mode]
  module, _, function = path.partition('.')
  module = importlib.import_module(f'latent_reasoning.cli.{module}')
  return getattr(module, function)(run, *(getattr(args, name) for name in names))


def main(argv: Sequence[str]) -> int:
  """Runs one command; returns its exit status."""
  try:
    args = parse(argv)
    file = flag(argv, 'config').partition(':')[0]
    if args.help:
      own = file and ast.get_docstring(ast.parse(pathlib.Path(file).read_text('utf-8')))
      print(own or __doc__)
      return 0
    if args.help_config:
      from latent_reasoning import config_loading
      print(config_loading.help_text(config_loading.from_dict(args.config) if args.config
                                     else None))
      return 0
    if args.mode == 'report':
      from latent_reasoning import report
      return report.write(args.folders, args.workdir, args.markdown)
    if args.config is None:
      found = f', and {args.workdir} has no config.json of one' if args.workdir else ''
      raise InputError('no configuration; give one with --config=FILE, for example '
                       '--config=configs/rim_arithmetic.py, or the --workdir of a run'
                       f'{found} (see --help)')
    return launch(args, flag(argv, 'config'), argv)
  except InputError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  except (TrainingError, DeviceError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  except OSError as error:
    print(f'error: a file could not be read or written: {error}. Free space or mend the disk, '
          'and the same command goes on from the newest checkpoint', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print('stopped without saving; the same command goes on from the newest checkpoint',
          file=sys.stderr)
    return 130


def launch(args: flags.FlagValues, config_flag: str, argv: Sequence[str]) -> int:
  """Opens the workdir, builds the run and hands it to its mode."""
  from latent_reasoning import config_loading, experiment, methods
  from latent_reasoning.cli import restarts
  from latent_reasoning.parallel import devices, multihost
  from latent_reasoning.train import workdir
  logging.set_verbosity(logging.WARNING)
  config = config_loading.from_dict(args.config)
  _refuse_placeholders(config, args.workdir)
  methods.check(config)
  if args.mode == 'plan':  # of a run that has no folder and need not have its weights
    return plan(args, config, argv)
  path = default_workdir(config_flag, config.method) if args.workdir is None else args.workdir
  if args.mode == 'compare' and not config.sweep.runs:
    raise InputError('config.sweep.runs is (), so there is nothing to compare; expected a '
                     'config with runs, such as configs/compare_arithmetic.py')
  if config.sweep.runs and args.mode in ('train', 'compare'):
    return _sweep(args, config, config_flag, argv, path)
  if args.task or args.per_gpu:
    raise InputError('--task and --per_gpu are of a config with sweep.runs, in --mode=train or '
                     '--mode=compare')
  if args.mode == 'train' and not args.process_id:
    restarts.check(str(path))
  multihost.start(args.coordinator, args.num_processes, args.process_id,
                  args.distributed, config.train.peer_timeout)
  devices.require(config.device)
  if multihost.count() > 1 and args.mode not in TOGETHER:
    raise InputError(f'--mode={args.mode} is for one process; expected one of {TOGETHER} '
                     f'with {multihost.count()}')
  if not multihost.is_primary():
    sys.stdout = open(os.devnull, 'w')
  from latent_reasoning.train import trainer
  training = args.mode == 'train'
  with contextlib.ExitStack() as stack:
    stack.enter_context(workdir.nothing_left(path))
    if training:  # before anything is written there
      multihost.primary_first(lambda: stack.enter_context(workdir.locate(path).writing()))
    built = experiment.open_run(config, path, training, args.mode == 'generate')
    computes = (training or args.mode in FRESH or built.config.model.init_from
                or built.steps_trained())  # else the mode asks for a training first
    if computes and multihost.is_primary():
      devices.say(built.config)
    if training:  # of a training that is killed, too
      built.workdir.note(argv[1:])
    try:
      stack.enter_context(multihost.explained(built.config))
      stack.enter_context(built.on_mesh())
      status = call(args.mode, built, args)
      if not status:
        built.workdir.note(argv[1:])
      built.workdir.push()
      return status
    except trainer.Interrupted as stop:
      built.workdir.push()
      print(f'{stop}; saved in {built.workdir.path}. The same command resumes.',
            file=sys.stderr)
      return 128 + stop.signal


def _sweep(args: flags.FlagValues, config, config_flag: str, argv: Sequence[str],
           path) -> int:
  """Hands a config with several runs to `cli.sweep`; opens no device, which the runs need."""
  import jax

  from latent_reasoning.cli import sweep, sweep_share
  from latent_reasoning.hf import init_from as pretrained
  from latent_reasoning.parallel import multihost
  from latent_reasoning.train import workdir
  names = ('coordinator', 'num_processes', 'process_id')
  joined = (*('--distributed',) * args.distributed,
            *(f'--{name}={args[name].value}' for name in names if args[name].present))
  processes = multihost.stand_for(args.process_id, args.num_processes) if joined else 1
  share = sweep_share.read(args.task, args.per_gpu, joined, processes)
  own = [a for a in argv[1:] if re.match(r'--?config\.(?!sweep\.)', a)]  # each run is alone
  platforms = jax.config.jax_platforms
  jax.config.update('jax_platforms', 'cpu')  # should weights be looked at
  try:
    place = workdir.open_workdir(path, pretrained.resolve(config), True)
  finally:
    jax.config.update('jax_platforms', platforms)
  place.note(argv[1:])
  place.push()
  if not multihost.is_primary():
    sys.stdout = open(os.devnull, 'w')
  return sweep.run(config.sweep, [f'--config={config_flag}', *own], place, share)


PLACEHOLDER = re.compile(r'[A-Z][A-Z0-9_]*')  # DIRECTORY, FILE, GSM8K_DIRECTORY


def _refuse_placeholders(config, path: str | None) -> None:
  """Raises InputError where a word of the documentation stands in for a path of the user."""
  for key in ('model.init_from', 'tokenizer.path', 'data.dir', 'data.path', 'data.train',
              'data.valid', 'data.test'):
    value = get(config, key)
    if PLACEHOLDER.fullmatch(value) and not pathlib.Path(value).exists():
      raise InputError(f'config.{key} is {value!r}, which stands for a path of yours; '
                       'replace it')
  if path and PLACEHOLDER.fullmatch(path) and not pathlib.Path(path).exists():
    raise InputError(f'--workdir={path} stands for a folder of yours; replace it')


class _Stream:
  """A standard stream that outlives who reads it: a terminal or pipe that is gone is no
  reason to stop a training, and what a locale cannot spell is written as an escape."""

  def __init__(self, stream):
    self._stream = stream
    if hasattr(stream, 'reconfigure'):
      stream.reconfigure(errors='backslashreplace')

  def __getattr__(self, name):
    return getattr(self._stream, name)

  def write(self, text):
    with contextlib.suppress(OSError, ValueError):
      return self._stream.write(text)
    return len(text)

  def flush(self):
    with contextlib.suppress(OSError, ValueError):
      self._stream.flush()


def keep_streams() -> None:
  """Makes the standard streams ones that cannot fail; they may have been closed."""
  for name in ('stdout', 'stderr'):
    setattr(sys, name, _Stream(getattr(sys, name) or open(os.devnull, 'w')))  # noqa: SIM115
  if sys.stdin is None:
    sys.stdin = open(os.devnull)  # noqa: SIM115
  elif hasattr(sys.stdin, 'reconfigure'):
    sys.stdin.reconfigure(errors='replace')


if __name__ == '__main__':
  allocator.tune()
  keep_streams()
  status = main(sys.argv)
  from latent_reasoning.parallel import multihost
  multihost.finish(status)
