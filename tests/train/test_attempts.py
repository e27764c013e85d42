"""What cannot be read is not damaged."""

import errno

import orbax.checkpoint as ocp
import pytest
from train.test_checkpoint import assert_same, like, state

from latent_reasoning.errors import TrainingError
from latent_reasoning.train import attempts


@pytest.fixture
def failing(monkeypatch):
  """Makes reads fail: failing(error, times); returns how often they did."""
  monkeypatch.setattr(attempts, 'WAIT', 0.01)
  def make(error, times, bytes_too=True):
    count = [0]

    def fail():
      if count[0] < times:
        count[0] += 1
        raise error
    real = ocp.CheckpointManager.restore

    def restore(self, step, *args, **kwargs):
      fail()
      return real(self, step, *args, **kwargs)
    monkeypatch.setattr(ocp.CheckpointManager, 'restore', restore)
    if bytes_too:
      through = attempts._read_through

      def read(folder):
        if 0 < count[0] <= times and isinstance(error, OSError):
          raise error
        through(folder)
      monkeypatch.setattr(attempts, '_read_through', read)
    return count
  return make


def test_a_read_that_fails_once(make, failing):
  """An error that passes is tried again, and nothing is said or moved."""
  saved = make()
  saved.save(state(1))
  saved.save(state(2))
  saved.close()
  again = make()
  failing(OSError(errno.EIO, 'Input/output error'), 1)
  assert_same(again.restore(like()).state, state(2))
  assert again.steps() == [2, 1] and make.warned == []


@pytest.mark.parametrize('error', [
    OSError(errno.EIO, 'Input/output error'), MemoryError(),
    ValueError('RESOURCE_EXHAUSTED: Cannot allocate memory')], ids=['EIO', 'memory', 'XLA'])
def test_a_read_that_keeps_failing(make, failing, error):
  """Every try failed: told in one line, and every checkpoint is where it was, for good."""
  saved = make()
  saved.save(state(1))
  saved.close()
  again = make()
  count = failing(error, 10**6)
  for _ in range(2):
    with pytest.raises(TrainingError, match='could not be read in 3 tries .*nothing was cha'):
      again.restore(like())
  assert again.steps() == [1] and make.warned == [] and count[0] >= 6
  assert not (again.path.parent / 'unsound').exists()
