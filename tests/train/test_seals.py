"""Seals: every file of a checkpoint is known."""

import shutil

import jax.numpy as jnp
import pytest
from train.test_checkpoint import assert_same, flip_bit, like, saved, state

from latent_reasoning.train.checkpoint import Checkpoints


@pytest.mark.integration
def test_every_file_is_sealed(make, folder):
  """A bit flipped in any file, a file cut or gone: found, whatever the file is for."""
  saved(make, 1, 2).close()
  files = sorted(p.relative_to(folder / '2') for p in (folder / '2').rglob('*')
                 if p.is_file() and p.stat().st_size)
  assert len(files) > 5
  for number, name in enumerate(files):
    place = folder.with_name(f'copy{number}')
    shutil.copytree(folder, place)
    shutil.copytree(folder.with_name('checkpoints.seals'),
                    folder.with_name(f'copy{number}.seals'))
    data = bytearray((place / '2' / name).read_bytes())
    data[len(data) // 2] ^= 1 << number % 8
    (place / '2' / name).write_bytes(data)
    checkpoints = Checkpoints(place, warn=make.warned.append)
    assert checkpoints.restore(like()).step == 1
    assert f'its file {name} is not as it was written' in make.warned[-1]
    checkpoints.close()


def test_unsealed(make, folder):
  """A writer killed before the seal: the checkpoint is believed by its own hashes."""
  saved(make, 1, 2).close()
  shutil.rmtree(folder.with_name('checkpoints.seals'))
  assert_same(make().restore(like()).state, state(2))
  flip_bit(folder, 2)
  assert make().restore(like()).step == 1


def test_seals_follow_the_checkpoints(make, folder):
  """One of each there is; a step saved again has a new one."""
  checkpoints = saved(make, 1, 2, 3, keep=2)
  seals = folder.with_name('checkpoints.seals')
  assert sorted(p.name for p in seals.iterdir()) == ['2.json', '3.json']
  old = (seals / '3.json').read_text()
  shutil.rmtree(folder / '3')
  checkpoints.close()
  again = make()
  again.save(state(3).replace(step=jnp.asarray(3, jnp.int32), params=state(4).params))
  again.wait()
  assert (seals / '3.json').read_text() != old
  assert make().restore(like()).step == 3 and make.warned == []
