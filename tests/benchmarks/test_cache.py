"""Time to the first step of a training: what is said when there is none, and a warm cache."""

import argparse
from pathlib import Path

import pytest

from latent_reasoning.benchmarks import cache
from latent_reasoning.errors import InputError

CONFIG = Path(__file__).resolve().parents[2] / 'configs/rim_arithmetic.py'


def test_no_first_step(tmp_path):
  """The command's own words are handed on."""
  with pytest.raises(InputError, match='did not come to its first step: error: --config='):
    cache.first_step(str(tmp_path / 'nowhere.py'), tmp_path, tmp_path / 'run')


@pytest.mark.slow
def test_warm_takes_at_most_half(capsys):
  found = cache.cache_table(argparse.Namespace(config=[str(CONFIG)], repeats=1))
  ratio, programs = found.splitlines()[-1].split()[3:5]
  assert int(programs) >= 2 and float(ratio) <= 0.5
