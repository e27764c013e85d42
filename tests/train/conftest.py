"""Fixtures of tests about checkpoints."""

import pytest

from latent_reasoning.train.checkpoint import Checkpoints


@pytest.fixture
def folder(tmp_path):
  return tmp_path / 'checkpoints'


@pytest.fixture
def make(folder):
  """Makes `Checkpoints` on one folder, and closes them; `warned` gathers warnings."""
  made = []

  def make(keep=3):
    checkpoints = Checkpoints(folder, keep, make.warned.append)
    made.append(checkpoints)
    return checkpoints

  make.warned = []
  yield make
  for checkpoints in made:
    checkpoints.close()
