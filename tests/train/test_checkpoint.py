"""Checkpoints: exact, kept by rule, and every kind of damage survived."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from latent_reasoning.errors import InputError, TrainingError
from latent_reasoning.train import checkpoint, hashes
from latent_reasoning.train.checkpoint import Checkpoints
from latent_reasoning.train.train_step import TrainState

TX = optax.scale_by_adam()


def state(step: int, width: int = 64) -> TrainState:
  """Random arrays, other ones for each step, in several types."""
  rng = np.random.default_rng(step)
  params = {'layer': {'kernel': jnp.asarray(rng.normal(size=(3, width)), jnp.float32),
                      'half': jnp.asarray(rng.normal(size=(5,)), jnp.bfloat16)},
            'table': jnp.asarray(rng.normal(size=(width, width)), jnp.float32)}
  return TrainState(jnp.asarray(step, jnp.int32), params, TX.init(params))


def like(width: int = 64):
  return jax.eval_shape(lambda: state(1, width))


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype and x.shape == y.shape
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def saved(make, *steps, keep=9):
  """Checkpoints with these steps on disk."""
  checkpoints = make(keep)
  for step in steps:
    checkpoints.save(state(step))
  checkpoints.wait()
  return checkpoints


@pytest.mark.integration
def test_restores_every_bit_and_type(make):
  """Values, types and the optimizer's structure come back, and what was said of them."""
  checkpoints = make()
  checkpoints.save(state(7), 0.25, stage=2, method='rim')
  checkpoints.wait()
  found = make().restore(like())
  assert_same(found.state, state(7))
  assert found.state.params['layer']['half'].dtype == ml_dtypes.bfloat16
  assert (found.step, found.meta['accuracy']) == (7, 0.25)
  assert (found.meta['stage'], found.meta['method']) == (2, 'rim')
  assert make.warned == []


def test_no_checkpoint_yet(make):
  """Before the first save there is nothing, which is no error."""
  checkpoints = make()
  assert checkpoints.restore(like()) is None
  assert checkpoints.best() is None
  assert checkpoints.steps() == []


def test_restores_a_given_step(make):
  """An older step comes back if asked for; the newest without asking."""
  checkpoints = saved(make, 1, 2)
  assert_same(checkpoints.restore(like(), 1).state, state(1))
  assert_same(checkpoints.restore(like()).state, state(2))


def test_keeps_the_newest_and_the_best(make):
  """The newest `keep` and the best by accuracy stay; others go."""
  checkpoints = make(keep=2)
  for step, accuracy in [(1, 0.2), (2, 0.9), (3, 0.5), (4, None), (5, None), (6, None)]:
    checkpoints.save(state(step), accuracy)
  checkpoints.wait()
  assert checkpoints.steps() == [6, 5, 2]
  assert checkpoints.best() == 2


def test_best_is_the_latest_of_equals(make):
  """Of equal accuracies the latest is best, and it is kept."""
  checkpoints = make(keep=1)
  for step, accuracy in [(1, 0.5), (2, 0.5), (3, 0.1)]:
    checkpoints.save(state(step), accuracy)
  checkpoints.wait()
  assert checkpoints.best() == 2 and checkpoints.steps() == [3, 2]


def test_best_survives_starting_again(make):
  """A resumed run keeps the best checkpoint of the run before."""
  checkpoints = make(keep=1)
  for step, accuracy in [(1, 0.5), (2, 0.1)]:
    checkpoints.save(state(step), accuracy)
  checkpoints.close()
  again = make(keep=1)
  for step, accuracy in [(3, 0.2), (4, None)]:
    again.save(state(step), accuracy)
    again.wait()
  assert again.best() == 1 and again.steps() == [4, 1]


def test_best_is_never_one_set_aside(make, folder):
  """An unsound checkpoint loses its claim, also when its step is saved again."""
  checkpoints = make()
  for step, accuracy in [(1, 0.1), (2, 0.9)]:
    checkpoints.save(state(step), accuracy)
  checkpoints.wait()
  flip_bit(folder, 2)
  assert checkpoints.restore(like()).step == 1
  checkpoints.save(state(2))
  checkpoints.wait()
  assert checkpoints.best() == 1


def test_save_is_asynchronous_and_takes_a_copy(make):
  """What training does to its donated arrays afterwards does not reach the file."""
  checkpoints = make()
  ahead = jax.jit(lambda s: s.replace(step=s.step + 1,
                                      params=jax.tree.map(lambda a: a * 2, s.params)),
                  donate_argnums=0)
  now = state(5)
  checkpoints.save(now)
  for _ in range(20):
    now = ahead(now)
  jax.block_until_ready(now)
  checkpoints.wait()
  assert_same(make().restore(like()).state, state(5))
  assert make.warned == []


def array_files(folder: pathlib.Path, step: int) -> list[pathlib.Path]:
  """The files that hold array data, largest first."""
  found = [p for p in (folder / str(step) / 'state').rglob('*')
           if p.is_file() and p.parent.name == 'd']
  return sorted(found, key=lambda p: p.stat().st_size, reverse=True)


def flip_bit(folder, step):
  """One bit in the middle of the largest file of array data."""
  file = array_files(folder, step)[0]
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)


def truncate(folder, step):
  file = array_files(folder, step)[0]
  file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


def remove_arrays(folder, step):
  for file in array_files(folder, step):
    file.unlink()


def empty(folder, step):
  shutil.rmtree(folder / str(step))
  (folder / str(step)).mkdir()


def remove_metadata(folder, step):
  (folder / str(step) / 'meta' / 'metadata').unlink()


def cut_metadata(folder, step):
  file = folder / str(step) / 'meta' / 'metadata'
  file.write_text(file.read_text()[:40])


def change_metadata(folder, step):
  """Still JSON, but another step is the best one."""
  file = folder / str(step) / 'meta' / 'metadata'
  meta = json.loads(file.read_text())
  file.write_text(json.dumps({**meta, 'accuracy': 1.0}))


def remove_state(folder, step):
  shutil.rmtree(folder / str(step) / 'state')


def swap_arrays(folder, step):
  """The arrays of another checkpoint: sound files, wrong content."""
  shutil.rmtree(folder / str(step) / 'state')
  shutil.copytree(folder / '1' / 'state', folder / str(step) / 'state')


DAMAGE = [flip_bit, truncate, remove_arrays, empty, remove_metadata, cut_metadata,
          change_metadata, remove_state, swap_arrays]


@pytest.mark.integration
@pytest.mark.parametrize('damage', DAMAGE)
def test_damage_is_found_and_the_one_before_used(make, folder, damage):
  """The damaged one is set aside, in words; training can save at that step again."""
  saved(make, 1, 2, 3).close()
  damage(folder, 3)
  checkpoints = make()
  found = checkpoints.restore(like())
  assert found.step == 2
  assert_same(found.state, state(2))
  warning, = make.warned
  aside = folder.parent / 'unsound' / '3'
  assert 'checkpoint 3' in warning and str(aside) in warning
  assert aside.is_dir() and not (folder / '3').exists()
  assert checkpoints.steps() == [2, 1]
  checkpoints.save(state(3))
  checkpoints.wait()
  assert_same(make().restore(like()).state, state(3))
  assert len(make.warned) == 1


def test_two_damaged_ones(make, folder):
  """Falling back goes on until one is sound; nothing set aside is overwritten."""
  saved(make, 1, 2, 3).close()
  flip_bit(folder, 3)
  empty(folder, 2)
  assert make().restore(like()).step == 1
  again = saved(make, 3)
  again.close()
  flip_bit(folder, 3)
  assert make().restore(like()).step == 1
  names = sorted(p.name for p in (folder.parent / 'unsound').iterdir())
  assert names == ['2', '3', '3.1']


@pytest.mark.parametrize('seed', range(6))
def test_a_flipped_bit_never_passes(make, folder, seed):
  """A bit flipped anywhere in the array files is harmless or found, never believed."""
  saved(make, 1, 2).close()
  rng = np.random.default_rng(seed)
  files = array_files(folder, 2)
  file = files[rng.integers(len(files))]
  data = bytearray(file.read_bytes())
  data[rng.integers(len(data))] ^= 1 << rng.integers(8)
  file.write_bytes(data)
  found = make().restore(like())
  assert_same(found.state, state(found.step))


def test_no_sound_checkpoint(make, folder):
  """With all of them damaged there is an error that names the folder."""
  saved(make, 1, 2).close()
  flip_bit(folder, 1)
  truncate(folder, 2)
  with pytest.raises(InputError, match=f'no sound checkpoint in {folder}'):
    make().restore(like())


def test_a_damaged_step_that_was_asked_for(make, folder):
  """A step asked for by number is not replaced by another one, nor moved."""
  saved(make, 1, 2).close()
  flip_bit(folder, 1)
  with pytest.raises(InputError):
    make().restore(like(), 1)
  assert (folder / '1').is_dir()
  assert make().restore(like()).step == 2


def test_another_model_is_an_error_and_no_damage(make, folder):
  """Another width is told by the array's name and both shapes; nothing is moved."""
  saved(make, 1).close()
  with pytest.raises(InputError) as error:
    make().restore(like(width=32))
  text = str(error.value)
  assert "['params']['layer']['kernel']" in text or "['layer']['kernel']" in text
  assert '[3, 64]' in text and '[3, 32]' in text
  assert (folder / '1').is_dir() and make.warned == []


def test_another_type_is_an_error(make):
  """A checkpoint is not cast in silence."""
  saved(make, 1).close()
  half = jax.eval_shape(lambda: state(1).replace(params=jax.tree.map(
      lambda a: a.astype(jnp.float16), state(1).params)))
  with pytest.raises(InputError, match='expected float16'):
    make().restore(half)


def test_another_optimizer_is_an_error(make):
  """Arrays that are absent here or there are named."""
  saved(make, 1).close()
  other = jax.eval_shape(lambda: state(1).replace(opt_state={'more': jnp.zeros(2)}))
  with pytest.raises(InputError, match='absent'):
    make().restore(other)


def test_copy_under_another_step(make, folder):
  """It is set aside before anything is asked of a step that the configuration may not have."""
  saved(make, 1, 2).close()
  shutil.copytree(folder / '1', folder / '60')
  def abstract(step):
    assert step <= 2, step
    return like()
  checkpoints = make()
  assert checkpoints.verify(abstract) == {
      60: 'it is a copy of the checkpoint of step 1', 2: '', 1: ''}
  assert checkpoints.restore(abstract).step == 2
  assert 'checkpoint 60' in make.warned[-1] and (folder.parent / 'unsound/60').exists()


def test_unfinished_save_is_not_seen(make, folder):
  """What a killed writer leaves behind is no checkpoint, and does not block its step."""
  saved(make, 1).close()
  shutil.copytree(folder / '1', folder / '2.orbax-checkpoint-tmp')
  checkpoints = make()
  assert checkpoints.steps() == [1]
  assert checkpoints.restore(like()).step == 1
  checkpoints.save(state(2))
  checkpoints.wait()
  assert checkpoints.steps() == [2, 1]


def test_hashes_lie_beside_the_arrays(make, folder):
  """Type, shape and hash of each array are in the metadata, in plain JSON."""
  saved(make, 1).close()
  meta = json.loads((folder / '1' / 'meta' / 'metadata').read_text())
  assert meta['arrays'] == hashes.describe(checkpoint._tree(state(1)))
  kernel = next(v for k, v in meta['arrays'].items() if k.endswith("['table']"))
  kind, digest = kernel.split(' ', 2)[0], kernel.rsplit(' ', 1)[1]
  assert kind.startswith('float32[64') and len(digest) == 32


def test_a_save_that_failed(make, folder, monkeypatch):
  """Orbax's own error becomes one of ours, which names the newest complete step."""
  checkpoints = saved(make, 1, 2)
  monkeypatch.setattr(checkpoints._manager, 'save', lambda *a, **k: 1 / 0)
  with pytest.raises(TrainingError, match='ZeroDivisionError.*complete one is of step 2;'):
    checkpoints.save(state(3))
  assert_same(make().restore(like()).state, state(2))


def test_verify(make, folder):
  """What is wrong with each, the newest first; nothing is moved."""
  checkpoints = saved(make, 1, 2, 3)
  flip_bit(folder, 2)
  found = checkpoints.verify(lambda step: like())
  assert list(found) == [3, 2, 1] and not found[3] and not found[1]
  assert 'not as it was written' in found[2] and (folder / '2').is_dir()


def test_only_a_writer_moves(make):
  """A reader skips what is unsound and leaves it."""
  saved = make()
  saved.save(state(1))
  saved.save(state(2))
  saved.close()
  file = next((saved.path / '2/meta').iterdir())
  file.write_bytes(b'{}')
  reader = Checkpoints(saved.path, 3, make.warned.append, writer=False)
  assert reader.restore(like()).step == 1
  assert reader.steps() == [2, 1] and 'unsound' in make.warned[-1]
  assert 'moved' not in make.warned[-1]
  with pytest.raises(InputError, match='unsound'):
    reader.restore(like(), 2)
  reader.close()
  writer = make()
  assert writer.restore(like()).step == 1 and writer.steps() == [1]


def test_a_reader_beside_a_writer(make):
  """With one checkpoint kept, the one that a reader is about to read may be gone."""
  writer = make(keep=1)
  writer.save(state(1))
  writer.wait()
  reader = Checkpoints(writer.path, 1, make.warned.append, writer=False)
  tried, real = [], reader._try

  def late(like, step):  # the writer goes on in between
    if not tried:
      writer.save(state(2))
      writer.wait()
    tried.append(step)
    return real(like, step)
  reader._try = late
  assert_same(reader.restore(like()).state, state(2))
  assert tried == [1, 2] and make.warned == []


def test_a_reader_makes_nothing(tmp_path):
  reader = Checkpoints(tmp_path / 'none', writer=False)
  assert reader.restore(like()) is None and reader.best() is None
  reader.close()
  assert not (tmp_path / 'none').exists()


def test_another_format(make, monkeypatch):
  """A checkpoint of an older version is refused with a sentence, and stays."""
  saved = make()
  monkeypatch.setattr(checkpoint, 'FORMAT', 1)
  saved.save(state(1))
  saved.close()
  monkeypatch.undo()
  again = make()
  with pytest.raises(InputError, match='has the format 1 of another version .* reads format'):
    again.restore(like())
  assert again.steps() == [1]
