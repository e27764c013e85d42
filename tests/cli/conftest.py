"""Runs that the tests of commands share."""

import pytest

from latent_reasoning.train import trainer


@pytest.fixture(scope='module')
def trained(tiny_config, make_run, tmp_path_factory):
  """A run that was trained for two steps."""
  config = tiny_config(**{
      'model.num_layers': 1, 'optim.stage1.steps': 2, 'optim.stage2.steps': 0,
      'data.buckets.prefix': (20,), 'data.buckets.readout': (6,),
      'data.buckets.count': (3,),
      'eval.valid_problems': 4, 'eval.test_problems': 6})
  run = make_run(config, tmp_path_factory.mktemp('trained'))
  trainer.train(run)
  return run


@pytest.fixture
def fresh(tiny_config, make_run, tmp_path):
  return make_run(tiny_config(), tmp_path)
