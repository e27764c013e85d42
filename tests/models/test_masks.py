"""Masks, drawn."""

import inspect

import numpy as np
import pytest

from latent_reasoning import batching, sequences
from latent_reasoning.methods import rim
from latent_reasoning.models import masks
from latent_reasoning.sequences import PackedSequence, Readout

# Question q q, two blocks of one memory token, readouts a and b of two tokens.
LETTERS = 'qq<m><m>aabb'

CAUSAL = """
             q q < m > < m > a a b b
      q      1
      q      1 1
      <      1 1 1
      m      1 1 1 1
      >      1 1 1 1 1
      <      1 1 1 1 1 1
      m      1 1 1 1 1 1 1
      >      1 1 1 1 1 1 1 1
      a      1 1 1 1 1       1
      a      1 1 1 1 1       1 1
      b      1 1 1 1 1 1 1 1     1
      b      1 1 1 1 1 1 1 1     1 1
"""

BIDIRECTIONAL = """
             q q < m > < m > a a b b
      q      1
      q      1 1
      <      1 1 1 1 1
      m      1 1 1 1 1
      >      1 1 1 1 1
      <      1 1 1 1 1 1 1 1
      m      1 1 1 1 1 1 1 1
      >      1 1 1 1 1 1 1 1
      a      1 1 1 1 1       1
      a      1 1 1 1 1       1 1
      b      1 1 1 1 1 1 1 1     1
      b      1 1 1 1 1 1 1 1     1 1
"""

BLIND = """
             q q < m > < m > a a b b
      q      1
      q      1 1
      <      1 1 1
      m      1 1 1 1
      >      1 1 1 1 1
      <      1 1 1 1 1 1
      m      1 1 1 1 1 1 1
      >      1 1 1 1 1 1 1 1
      a          1 1 1       1
      a          1 1 1       1 1
      b          1 1 1 1 1 1     1
      b          1 1 1 1 1 1     1 1
"""


def draw(may: np.ndarray) -> str:
  lines = [' ' * 13 + ' '.join(LETTERS)]
  for letter, row in zip(LETTERS, may, strict=True):
    cells = ' '.join('1' if cell else ' ' for cell in row)
    lines.append(f'      {letter}      {cells}'.rstrip())
  return '\n' + '\n'.join(lines) + '\n'


def make_row(config) -> PackedSequence:
  """The row of the drawing: a question of two tokens and two steps."""
  ids = sequences.SpecialTokens(90, 91, 92, 93, 94, 95, (96, 97, 98), (10,), (35,))
  example = sequences.TokenizedExample([1, 2], [[3, 4], [5, 6]], [7, 8])
  return rim.ground(example, 0.0, config, ids)


@pytest.mark.parametrize('changes,drawing', [
    ({}, CAUSAL),
    ({'rim.block_attention': 'bidirectional'}, BIDIRECTIONAL),
    ({'rim.readout_sees_question': False}, BLIND)])
def test_drawing(tiny_config, changes, drawing):
  """A real row sees what is drawn: causal, bidirectional and blind to the question."""
  batch = batching.collate([make_row(tiny_config(**changes))], 8, 2, 2)
  assert draw(np.asarray(masks.allowed(batch.mask))[0]) == drawing


def test_docstring():
  """The drawing in the docstring is the one tested here."""
  lines = [line.strip() for line in inspect.getdoc(masks.allowed).splitlines()]
  drawn = [line.strip() for line in CAUSAL.strip('\n').splitlines()]
  first = lines.index(drawn[0])
  assert lines[first:first + len(drawn)] == drawn


@pytest.mark.integration
@pytest.mark.parametrize('variant', ['causal', 'bidirectional'])
def test_padding(tiny_config, variant):
  """Padding changes nothing for real tokens, sees no more than position 0 of the prefix."""
  row = make_row(tiny_config(**{'rim.block_attention': variant}))
  tight = np.asarray(masks.allowed(batching.collate([row], 8, 2, 2).mask))[0]
  # 3 more in the prefix, a third readout, 2 more in each readout.
  wide = np.asarray(masks.allowed(batching.collate([row], 11, 3, 4).mask))[0]
  real = np.array([*range(8), 11, 12, 15, 16])
  np.testing.assert_array_equal(wide[np.ix_(real, real)], tight)
  fake = np.setdiff1d(np.arange(len(wide)), real)
  assert not wide[np.ix_(real, fake)].any()
  for i in (8, 9, 10):  # padding of the prefix
    assert np.flatnonzero(wide[i]).tolist() == [0]
  for i in range(19, 23):  # a readout that is not there
    assert np.flatnonzero(wide[i]).tolist() == [0, *range(19, i + 1)]
  assert wide.any(axis=1).all()  # a softmax over nothing is a mean over everything


def test_part(tiny_config):
  """A part of a mask is the mask of these queries."""
  mask = batching.collate([make_row(tiny_config())], 8, 2, 2).mask
  sees = np.asarray(masks.sees_prefix(mask, 8))
  np.testing.assert_array_equal(masks.sees_prefix(mask.part(3, 10), 8), sees[:, 3:10])


def test_visible_from_and_until():
  """A readout sees prefix[visible_from:visible_until], no other readout of that prefix."""
  row = sequences.causal([5] * 6, [Readout(4, [1, 2], visible_from=2), Readout(4, [1, 2],
                                                                               visible_from=0)])
  may = np.asarray(masks.allowed(batching.collate([row], 6, 2, 1).mask))[0]
  assert np.flatnonzero(may[6]).tolist() == [2, 3, 6]
  assert np.flatnonzero(may[7]).tolist() == [0, 1, 2, 3, 7]
