"""Fixtures that several test files share."""

import os
import pathlib

import pytest

from latent_reasoning.config import ArithmeticConfig, BucketConfig, DataConfig


@pytest.fixture
def data_config() -> DataConfig:
  """A DataConfig to be changed with `dataclasses.replace`."""
  return DataConfig(
      name='files', dir='', train='', valid='', test='', cache_dir='', steps='equations',
      step_marks=False, on_error='raise', too_long='raise', valid_size=2, limit=0,
      sort_window=1,
      arithmetic=ArithmeticConfig(
          min_steps=1, max_steps=4, modulus=10, max_value=9, operations='+-*',
          templates=1, train_size=300, valid_size=100, test_size=100),
      buckets=BucketConfig(prefix=(64,), readout=(16,), count=(4,)))


@pytest.fixture
def shared_data() -> pathlib.Path:
  """The folder of public data sets, beside the checkout or named by the environment."""
  beside = pathlib.Path(__file__).resolve().parents[1] / '../shared/data'
  path = pathlib.Path(os.environ.get('LATENT_REASONING_DATA', beside))
  if not path.is_dir():
    pytest.skip(f'no public data at {path}; set LATENT_REASONING_DATA')
  return path
