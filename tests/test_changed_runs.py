"""A run that goes on with another configuration: what is free, recorded, lifted, refused."""

import json
import shutil

import jax
import numpy as np
import pytest

from latent_reasoning.errors import InputError
from latent_reasoning.train import trainer

ONE = {'model.num_layers': 1, 'train.save_every': 2, 'train.eval_every': 0,
       'optim.stage1.steps': 4, 'optim.stage2.steps': 2, 'rim.max_steps': 3}

pytestmark = [pytest.mark.usefixtures('quick_compilation'), pytest.mark.integration]


@pytest.fixture(scope='module')
def finished(tiny_config, make_run, tmp_path_factory):
  """A finished run to be copied, and its parameters."""
  path = tmp_path_factory.mktemp('finished')
  return path, params(trainer.train(make_run(tiny_config(**ONE), path)))


def params(state):
  return {jax.tree_util.keystr(path): np.asarray(leaf)
          for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


@pytest.fixture
def again(finished, tiny_config, make_run, tmp_path):
  """Opens a copy of the run, of a given number of steps: again(step, **changes)."""
  def make(step, **changes):
    path = tmp_path / 'run'
    if not path.exists():
      shutil.copytree(finished[0], path)
      for place in (path / 'checkpoints').iterdir():
        if int(place.name) > step:
          shutil.rmtree(place)
    return make_run(tiny_config(**{**ONE, **changes}), path)
  return make


def test_what_changes_no_number(again, finished, capsys):
  """Stage 2, that ran out of memory, goes on in smaller parts: the numbers are those of the
  unbroken run, to rounding, and the change is said, and kept."""
  changes = {'optim.grad_accum_steps': 4, 'model.remat': 'full', 'model.loss_tile': 7,
             'model.attention': 'dense', 'train.save_every': 1, 'train.max_to_keep': 1,
             'train.log_every': 1, 'eval.batch_size': 2}
  run = again(4, **changes)
  state = params(trainer.train(run))
  for name, expected in finished[1].items():
    np.testing.assert_allclose(state[name], expected, rtol=1e-3, atol=2e-5, err_msg=name)
  said = [line for line in capsys.readouterr().err.splitlines()
          if line.startswith('changed since: ')]
  assert len(said) == 1 and 'optim.grad_accum_steps: 1 -> 4' in said[0]
  history, = map(json.loads, run.workdir.history.read_text().splitlines())
  assert history['step'] == 4
  assert sorted(one.partition(':')[0] for one in history['changed']) == sorted(
      f'config.{key}' for key in changes)
  saved = json.loads(run.workdir.config.read_text())
  assert saved['model']['remat'] == 'full' and saved['optim']['grad_accum_steps'] == 4
  trainer.train(again(4, **changes))  # done, and nothing more to record
  assert len(run.workdir.history.read_text().splitlines()) == 1


def test_more_steps_of_the_last_stage(again, tiny_config, make_run, tmp_path, capsys):
  """Extended at its end, or on the way: bit for bit the run that had them from its start."""
  extend = {'train.extend': (3,)}
  unbroken = make_run(tiny_config(**{**ONE, **extend}), tmp_path / 'unbroken')
  expected = params(trainer.train(unbroken))
  capsys.readouterr()
  for step in (6, 2):
    found = params(trainer.train(again(step, **extend)))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)
    err = capsys.readouterr().err
    assert 'train.extend: [] -> [3]' in err and err.count('extended by 3 steps') == 1
    if step == 6:
      with pytest.raises(InputError, match='extended by .3,., of which 3 steps are done'):
        trainer.train(again(6, **{'train.extend': (4,)}))
      shutil.rmtree(tmp_path / 'run')


def test_what_changes_numbers(again):
  """Refused by name, with the key that lifts it; nothing of the run is touched."""
  before = (again(6).workdir.config.read_bytes(), again(6).workdir.metrics.read_bytes())
  with pytest.raises(InputError) as error:
    again(6, **{'optim.stage2.steps': 5, 'model.remat': 'full'})
  text = str(error.value)
  assert 'config.optim.stage2.steps: 2 -> 5' in text and 'train.extend=3' in text
  assert 'model.remat' not in text
  with pytest.raises(InputError, match=r'config.optim.batch_size: 8 -> 4\n'):
    again(6, **{'optim.batch_size': 4})
  run = again(6)
  assert before == (run.workdir.config.read_bytes(), run.workdir.metrics.read_bytes())


def test_the_checkpoint_has_its_own_say(again):
  """Where config.json was exchanged, the checkpoint's configuration refuses."""
  run = again(6)
  config = json.loads(run.workdir.config.read_text())
  config['optim']['batch_size'] = 4
  run.workdir.config.write_text(json.dumps(config))
  with pytest.raises(InputError, match='the checkpoint of step 6 is of another configuration'):
    trainer.train(again(6, **{'optim.batch_size': 4}))
