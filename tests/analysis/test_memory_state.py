"""Memory across segments: carried, isolated, bounded, saved, rolled back."""

import jax
import numpy as np
import pytest
from close import assert_close

from latent_reasoning import batching, sequences
from latent_reasoning.analysis import memory_state
from latent_reasoning.analysis.memory_state import MemoryState
from latent_reasoning.errors import InputError
from latent_reasoning.eval import language_modeling
from latent_reasoning.models.transformer import Transformer

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture(scope='module')
def made(tiny_config, random_params):
  """A small model whose last layer has a bank, and parameters."""
  config = tiny_config(**{'imm.write_policy': 'gated', 'imm.linformer_rank': 3,
                          'imm.layers': (1,)})
  model = Transformer(config.model, 16, imm=config.imm)
  params = random_params(model, batching.collate([sequences.causal([1, 2], ())], 2, 0, 0))
  return model, params


@pytest.fixture(scope='module')
def reader(made):
  """Reads segments: (tokens, state) -> (logits, state)."""
  return lambda tokens, state=None: memory_state.read(*made, tokens, state)


def segments(count, batch=2, length=6):
  return np.random.default_rng(0).integers(16, size=(count, batch, length)).astype(np.int32)


def assert_same(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.integration
def test_it_remembers(reader):
  """The second segment reads the first through the memory, and only through it."""
  first, second = segments(2)
  _, state = reader(first)
  with_memory, _ = reader(second, state)
  without, _ = reader(second)
  assert np.abs(with_memory - without).max() > 1e-3
  zeros = jax.tree.map(np.zeros_like, state)
  assert_close(reader(second, zeros)[0], without)


def test_isolated(reader):
  """What one sequence read changes no bit of another's output or memory."""
  first, second = segments(2)
  other = first.copy()
  other[1] = 15 - other[1]
  (_, a), (_, b) = reader(first), reader(other)
  (said_a, a), (said_b, b) = reader(second, a), reader(second, b)
  np.testing.assert_array_equal(said_a[0], said_b[0])
  assert_same(jax.tree.map(lambda x: x[0], a.banks), jax.tree.map(lambda x: x[0], b.banks))
  assert np.abs(said_a[1] - said_b[1]).max() > 0


@pytest.mark.integration
def test_bounded_over_many_segments(made, reader):
  """However often a text is read, no slot outgrows the largest write."""
  model, params = made
  words = segments(1)[0]
  batch = language_modeling.rows(np.pad(words, ((0, 0), (0, 1))))
  _, seen = model.apply({'params': params}, batch.tokens, batch.positions, batch.mask,
                        capture_intermediates=lambda _, name: name == 'project')
  (writes, _), = seen['intermediates']['block_1']['memory']['project']
  largest = np.linalg.norm(writes.s, axis=-1).max(1)
  state = None
  for _ in range(40):
    before, (_, state) = state, reader(words, state)
    assert (np.asarray(state.norms()) <= largest * (1 + 1e-5)).all()
  assert np.asarray(state.norms() > 0.1 * largest).all()  # it holds something
  assert np.asarray(state.drift(before)).max() < 0.1  # and settles


def test_roll_back_and_reset(reader):
  """An old state is as good as new; a reset sequence has forgotten, its neighbour not."""
  first, second, third = segments(3)
  _, snapshot = reader(first)
  said, after = reader(second, snapshot)
  reader(third, after)
  assert_same(reader(second, snapshot), (said, after))
  reset = after.reset(np.array([True, False]))
  np.testing.assert_array_equal(reset.norms()[0], 0)
  assert_same(jax.tree.map(lambda x: x[1], reset.banks),
              jax.tree.map(lambda x: x[1], after.banks))
  assert_close(reader(third, reset)[0][0], reader(third)[0][0])
  assert float(after.drift(after).max()) == 0 and float(after.drift(snapshot).min()) > 0


def test_save_and_load(reader, tmp_path):
  """Through a file and back, bit for bit; another batch or no file is one error."""
  _, state = reader(segments(1)[0])
  state.save(tmp_path / 'state.safetensors')
  assert_same(MemoryState.load(tmp_path / 'state.safetensors', state), state)
  _, larger = reader(segments(1, batch=3)[0])
  with pytest.raises(InputError, match='of the same model and batch'):
    MemoryState.load(tmp_path / 'state.safetensors', larger)
  for path in (tmp_path / 'none', tmp_path):
    with pytest.raises(InputError, match='cannot be read as a memory state'):
      MemoryState.load(path, state)


def test_no_memory(tiny_config):
  """A model without memory has nothing to carry."""
  with pytest.raises(InputError, match='no memory'):
    memory_state.read(Transformer(tiny_config().model, 16), {}, segments(1)[0])
