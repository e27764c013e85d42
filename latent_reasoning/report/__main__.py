"""Prints results.json of runs as one Markdown table: python -m latent_reasoning.report RUN…

A row a method, mean and standard error over seeds.
"""

import pathlib
import sys
from collections.abc import Sequence

from latent_reasoning import report
from latent_reasoning.errors import InputError
from latent_reasoning.report import runs


def main(paths: Sequence[str]) -> int:
  try:
    found = []
    for path in paths:
      file = pathlib.Path(path) / 'results.json'
      problems: list[str] = []
      results = runs.read_json(file, problems, runs._RESULTS)
      if not results:
        raise InputError(f'{problems[0]}; give workdirs of finished runs')
      found.append(results)
    if not found:
      raise InputError('no run given; usage: python -m latent_reasoning.report RUN…')
    print(report.compare(found))
  except InputError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
