"""Reasoning inside a language model: train, evaluate, ask, check, time, look into.

  python -m latent_reasoning.main --config=FILE[:variant] [--workdir=DIR]
      [--mode=MODE] [--config.key=value ...]

Modes:
  train          train (or resume), then evaluate on the test split; the default. A config
                 with sweep.runs trains them all and ends in a comparison
  trial          train (or resume), and end with the best score in validation, in trial.json,
                 as a search does (sweep.search); no test problem is looked at
  eval           evaluate the workdir's checkpoint on the test split and eval.sets
  generate       answer --question="...", questions typed at a prompt, or a file of them:
                 --questions=FILE [--answers=FILE], a line {"question": "..."} each; with
                 --externalize (of a model trained with config.rim.externalize) also each
                 block's step
  verbalize      turn what the memory holds into text, of --question="...", or of the test
                 split with accuracy and cost; trains a small decoder for it
                 (config.reasoning_decoder)
  analyze        RiM's blocks: which one answers, what their states hold, where they attend
  intervene      answers when the states of blocks, pause tokens or latents are zeroed, their
                 mean, noise, or another question's; whether the latents do the work
  scaling        accuracy by passes, loops, continuous thoughts or blocks when asked, to twice
                 as many as trained; on problems of eval.sets too
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
                 with --per_gpu one on each GPU at once, with --per_core one on each core of a
                 CPU, where small models train faster so. A task of a job array takes one run,
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
import importlib
import json
import os
import pathlib
import re
import sys
from collections.abc import Sequence

from absl import flags, logging

from latent_reasoning.cli import allocator, streams
from latent_reasoning.cli.arguments import MODES, flag, parse, refuse_placeholders
from latent_reasoning.errors import DeviceError, InputError, TrainingError

TRAINING = ('train', 'trial')
TOGETHER = (*TRAINING, 'eval')  # modes of several processes
FRESH = ('check_leakage', 'latency', 'flops')  # modes that need no checkpoint


def default_workdir(config_flag: str, method: str) -> pathlib.Path:
  """runs/<config>-<variant>-<method>, without a variant that was not given."""
  file, _, variant = config_flag.partition(':')
  parts = [pathlib.Path(file).stem, variant, method]
  name = '-'.join(re.sub(r'[^\w.]+', '_', part) for part in parts if part)
  return pathlib.Path('runs') / name


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
    print('stopped without saving; the same command goes on from the newest checkpoint, or '
          'begins again where there is none', file=sys.stderr)
    return 130


def launch(args: flags.FlagValues, config_flag: str, argv: Sequence[str]) -> int:
  """Opens the workdir, builds the run and hands it to its mode."""
  from latent_reasoning import config_loading, experiment, methods
  from latent_reasoning.cli import restarts
  from latent_reasoning.parallel import devices, multihost
  from latent_reasoning.train import workdir
  logging.set_verbosity(logging.WARNING)
  config = config_loading.from_dict(args.config)
  refuse_placeholders(config, args.workdir)
  methods.check(config)
  if args.mode == 'plan':  # of a run that has no folder and need not have its weights
    return plan(args, config, argv)
  path = default_workdir(config_flag, config.method) if args.workdir is None else args.workdir
  if args.mode == 'compare' and not config.sweep.runs:
    raise InputError('config.sweep.runs is (), so there is nothing to compare; expected a '
                     'config with runs, such as configs/compare_arithmetic.py')
  if config.sweep.runs and args.mode in ('train', 'compare'):
    return _sweep(args, config, config_flag, argv, path)
  if args.task or args.per_gpu or args.per_core:
    raise InputError('--task, --per_gpu and --per_core are of a config with sweep.runs, in '
                     '--mode=train or --mode=compare')
  if args.mode in TRAINING and not args.process_id:
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
  training = args.mode in TRAINING
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
  share = sweep_share.read(args.task, args.per_gpu, joined, processes,
                           per_core=args.per_core)
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


if __name__ == '__main__':
  allocator.tune()
  streams.keep()
  status = main(sys.argv)
  from latent_reasoning.parallel import multihost
  multihost.finish(status)
