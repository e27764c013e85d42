"""Fixtures of tests about checkpoints and runs that are broken off."""

import itertools

import pytest

from latent_reasoning import experiment
from latent_reasoning.train import batches, trainer
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


class Break(Exception):
  """Stands for whatever kills a run."""


@pytest.fixture
def resumed(make_run, monkeypatch):
  """Trains a run that is killed before a step, then as another process would: resumed(config,
  path, at) -> (run, state)."""
  def make(config, path, at):
    run, real, killed = make_run(config, path), batches.Batches.iterate, itertools.count()

    def iterate(self, start):
      for step, batch in enumerate(real(self, start), start):
        if step == at and not next(killed):
          raise Break
        yield batch
    with monkeypatch.context() as patch:
      patch.setattr(batches.Batches, 'iterate', iterate)
      with pytest.raises(Break):
        trainer.train(run)
      run = experiment.build(config, run.workdir)
      return run, trainer.train(run)
  return make
