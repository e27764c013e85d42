"""Times finished runs, each on its own model, with as many tokens as it generated on
the test split.

  python -m latent_reasoning.cli.latency RUN… --out=FILE
"""

import pathlib
import sys
from collections.abc import Sequence

from latent_reasoning import experiment, methods, sequences
from latent_reasoning.errors import DeviceError, InputError
from latent_reasoning.eval.latency import Subject, in_turn, lengths
from latent_reasoning.parallel import devices, multihost
from latent_reasoning.train import profiler, workdir


def subject(path: str, name: str) -> Subject:
  """A finished run as one to be timed, by what its folder holds.

  Raises:
    InputError: it has no checkpoint or no results.
  """
  run = experiment.reopen(path)  # a folder, or in a bucket
  config = run.config
  results = workdir.read_object(run.workdir.results)
  if not results or not isinstance(results.get('tokens'), dict):
    raise InputError(f'{path}: no results.json, or a damaged one; expected the folder of a '
                     'finished run')
  if methods.get(config.method).is_text:
    raise InputError(f'{path}: method language_model answers no questions, so there is '
                     f'nothing to time')
  found = run.restore()
  if found is None:
    raise InputError(f'{path}: no checkpoint; expected the folder of a finished run')
  test = [run.splits.test[i] for i in range(min(64, len(run.splits.test)))]
  examples = sequences.encode(test, run.tokenizer)
  special = sequences.special_tokens(run.tokenizer)
  answer = lengths(examples, special)[1]
  before = max(0, round(results['tokens']['median']) - answer)
  if not methods.get(config.method).speaks_first(config):
    before = 0
  return Subject(name, config, config.method, run.model(), found.state.params, examples,
                 special, before, answer)


def main(arguments: Sequence[str]) -> int:
  paths = [a for a in arguments if not a.startswith('--out=')]
  out = next((a.partition('=')[2] for a in arguments if a.startswith('--out=')), '')
  try:
    if not paths or not out:
      raise InputError('usage: python -m latent_reasoning.cli.latency RUN… --out=FILE')
    names = [p.rpartition('/')[2] if '://' in p else pathlib.Path(p).resolve().name
             for p in paths]
    subjects = [subject(path, name.rpartition('-')[0] or name)
                for path, name in zip(paths, names, strict=True)]
  except InputError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  config = subjects[0].config
  devices.say(config)
  repeats = config.eval.latency_repeats
  try:
    with multihost.explained(config):
      entries = in_turn(subjects, repeats)
  except DeviceError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  workdir.write_json(pathlib.Path(out), {
      'entries': entries, 'repeats': repeats, 'device': profiler.machine()})
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
