"""Versions of a checkpoint beside those here: recorded, compared, said, never refused."""

import pytest

from latent_reasoning.train import trainer, versions


def test_what_is_recorded():
  found = versions.here()
  assert {'python', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain',
          'latent_reasoning'} == found.keys()
  assert found['jax'] != 'not installed' and found['python'].startswith('3.')


def test_nothing_to_say():
  """Of the same versions, and of a checkpoint from before they were recorded."""
  assert versions.changes({'step': 3, 'versions': versions.here()}) == ''
  for meta in ({}, {'versions': None}, {'versions': {}}, {'versions': {'other': '1'}}):
    assert versions.changes({'step': 3, **meta}) == ''


@pytest.mark.parametrize('name', versions.here())
def test_a_difference_is_one_line(name):
  now = versions.here()
  said = versions.changes({'step': 3, 'versions': {**now, name: '0.0.1'}})
  assert f'{name} 0.0.1 -> {now[name]}' in said and 'step 3' in said and '\n' not in said
  assert said.count('->') == 2  # of the heading, and of the one that differs


@pytest.mark.integration
@pytest.mark.usefixtures('quick_compilation')
def test_said_where_a_training_goes_on(tiny_config, make_run, tmp_path, monkeypatch, capsys):
  """It goes on all the same, and says nothing where all is as it was."""
  run = make_run(tiny_config(**{
      'model.num_layers': 1, 'optim.stage1.steps': 1, 'optim.stage2.steps': 0,
      'train.eval_every': 0, 'eval.valid_problems': 4}), tmp_path)
  then = {**versions.here(), 'jax': '0.0.1'}
  with monkeypatch.context() as patch:
    patch.setattr(versions, 'here', lambda: then)
    trainer.train(run)
  assert 'other versions' not in capsys.readouterr().err
  assert trainer.train(run).step == 1
  said, = [line for line in capsys.readouterr().err.splitlines() if 'other versions' in line]
  assert 'jax 0.0.1 -> ' in said
