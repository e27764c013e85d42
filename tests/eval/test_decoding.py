"""Cached decoding beside a loop of full forward passes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close

from latent_reasoning import batching, methods, sequences
from latent_reasoning.eval import decoding
from latent_reasoning.models.transformer import Transformer
from latent_reasoning.sequences import PackedSequence

pytestmark = pytest.mark.usefixtures('quick_compilation')

VOCAB, TOKENS = 24, 5
IDS = sequences.SpecialTokens(16, 17, 18, 19, 20, 21, (22,), (10,), (11,))
QUESTIONS = [[1, 2, 3, 4], [5, 6], [9, 8, 7]]  # of different length: padded
PREFIX = 16

VARIANTS = {
    'rim': {},
    'rim, every other switch': {
        'model.position_embedding': 'rotary', 'model.scan': True, 'model.tie_embeddings': False,
        'rim.block_attention': 'bidirectional', 'rim.readout_sees_question': False},
    'cot': {'method': 'cot', 'model.scan': True},
    'direct': {'method': 'direct', 'model.position_embedding': 'rotary',
               'model.tie_embeddings': False}}


@dataclasses.dataclass(frozen=True)
class Case:
  config: object
  model: Transformer
  params: dict
  head: jax.Array

  def rows(self, blocks: int = 3) -> list[PackedSequence]:
    prompt = methods.get(self.config.method).prompt
    return [prompt(q, blocks, self.config, IDS) for q in QUESTIONS]

  def generate(self, rows, end=-1, seed=0, temperature=1.0, sample=False, tokens=TOKENS):
    """Decodes rows of any number of readouts."""
    batch = batching.collate(rows, PREFIX, len(rows[0].readouts), 1)
    return np.asarray(decoding.generate(
        self.model, self.params, self.head, batch, jax.random.key(seed), temperature,
        end=end, pad=IDS.pad, max_tokens=tokens, sample=sample))


@pytest.fixture(scope='module')
def make(tiny_config, random_params):
  """Makes a Case from a row of VARIANTS; each only once."""
  @functools.cache
  def build(variant):
    config = tiny_config(**VARIANTS[variant])
    model = Transformer(config.model, VOCAB)
    batch = batching.collate([sequences.causal([1, 2], ())], 2, 0, 0)
    params = random_params(model, batch, std=0.4)
    return Case(config, model, params, decoding.head_kernel(model, params))
  return build


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, batch):
  hidden = model.apply({'params': params}, batch.tokens, batch.positions, batch.mask).hidden
  return model.apply({'params': params}, hidden, method='head')


def uncached(case: Case, rows) -> np.ndarray:
  """Greedy: the whole row again for each token."""
  said = [[[] for _ in row.readouts] for row in rows]
  for step in range(TOKENS):
    full = [PackedSequence(row.prefix, row.visible_until, [
        dataclasses.replace(out, out=[*said[b][k], 0])
        for k, out in enumerate(row.readouts)]) for b, row in enumerate(rows)]
    batch = batching.collate(full, PREFIX, len(rows[0].readouts), TOKENS)
    found = np.asarray(logits(case.model, case.params, batch))
    for b, row in enumerate(rows):
      for k, out in enumerate(row.readouts):
        at = PREFIX + k * TOKENS + step - 1 if step else out.visible_until - 1
        said[b][k].append(int(found[b, at].argmax()))
  return np.array(said)


@pytest.mark.integration
@pytest.mark.parametrize('variant', VARIANTS)
def test_greedy_is_uncached_argmax(make, variant):
  """Every readout of every prompt says what full forward passes say."""
  case = make(variant)
  rows = case.rows()
  found = case.generate(rows)
  assert found.shape == (3, 3 if case.config.method == 'rim' else 1, TOKENS)
  np.testing.assert_array_equal(found, uncached(case, rows))
  assert len(np.unique(found)) > 3  # a constant would prove little


def test_readouts_of_one_prefill(make):
  """K readouts from one prefix say what each says from a prefill of its own.

  The prefill of readout k ends at block k: a later block is no part of it.
  """
  case = make('rim')
  rows = case.rows()
  together = case.generate(rows)
  for k in range(3):
    cut = []
    for row in rows:
      out = row.readouts[k]
      cut.append(PackedSequence(row.prefix[:out.visible_until],
                                row.visible_until[:out.visible_until], [out]))
    np.testing.assert_array_equal(case.generate(cut)[:, 0], together[:, k])


def test_free_number_of_blocks(make):
  """With more or fewer blocks than trained, the blocks in common say the same."""
  case = make('rim')
  three = case.generate(case.rows())
  for blocks in (1, 4):
    found = case.generate(case.rows(blocks))
    assert found.shape == (3, blocks, TOKENS)
    common = min(blocks, 3)
    np.testing.assert_array_equal(found[:, :common], three[:, :common])


def test_rows_are_independent(make):
  """A prompt's answer does not depend on its neighbours or its place."""
  case = make('rim')
  rows = case.rows()
  found = case.generate(rows)
  np.testing.assert_array_equal(case.generate([rows[2], rows[0], rows[1]]),
                                found[[2, 0, 1]])
  np.testing.assert_array_equal(case.generate([rows[1]] * 3), found[[1, 1, 1]])


@pytest.mark.integration
def test_end(make):
  """A readout stops at its end token, is padded after it, and stops no other."""
  case = make('rim')
  free = case.generate(case.rows())
  # Said by some readout before its last token, and not by every readout.
  end = next(t for t in np.unique(free[:, :, 1:-1]) if not (free == t).any(-1).all())
  found = case.generate(case.rows(), end=int(end))
  stopped = 0
  for said, kept in zip(free.reshape(-1, TOKENS), found.reshape(-1, TOKENS), strict=True):
    stop = np.flatnonzero(said == end)
    length = stop[0] + 1 if stop.size else TOKENS
    np.testing.assert_array_equal(kept[:length], said[:length])
    assert (kept[length:] == IDS.pad).all()
    stopped += length < TOKENS
  assert 0 < stopped < found.shape[0] * found.shape[1]


@pytest.mark.integration
def test_sampling(make):
  """At temperature 0+ it is greedy; of its key alone; other keys, other samples."""
  case = make('rim')
  draw = functools.partial(case.generate, case.rows(), sample=True)
  np.testing.assert_array_equal(draw(temperature=1e-6), case.generate(case.rows()))
  one = draw(temperature=2.0)
  np.testing.assert_array_equal(one, draw(temperature=2.0))
  assert (one != draw(temperature=2.0, seed=1)).any()


@pytest.mark.integration
@pytest.mark.parametrize('temperature', [1.0, 3.0])
def test_distribution(make, temperature):
  """Samples of one readout come as often as softmax(logits / temperature) says."""
  case, count = make('rim'), 500
  row = case.rows()[0]
  out = row.readouts[-1]
  many = PackedSequence(row.prefix, row.visible_until, [out] * count)
  drawn = case.generate([many], sample=True, temperature=temperature, tokens=1).ravel()
  batch = batching.collate([dataclasses.replace(row, readouts=[out])] * 3, PREFIX, 1, 1)
  scores = np.asarray(logits(case.model, case.params, batch))[0, out.visible_until - 1]
  expected = jax.nn.softmax(jnp.asarray(scores) / temperature)
  found = np.bincount(drawn, minlength=VOCAB) / count
  # Total variation; of 500 draws from 24 tokens it is about 0.05.
  assert np.abs(found - expected).sum() / 2 < 0.12
  assert len(np.unique(drawn)) > 3


def test_two_samples_of_one_readout_differ(make):
  """Readouts of the same prefix draw by themselves."""
  case = make('rim')
  rows = [PackedSequence(r.prefix, r.visible_until, [r.readouts[-1]] * 3) for r in case.rows()]
  found = case.generate(rows, sample=True, temperature=3.0)
  assert (found[:, 0] != found[:, 1]).any() and (found[0] != found[1]).any()


def test_head_kernel(make):
  """A [D, V] head, whether tied or not."""
  for variant in ('rim', 'rim, every other switch'):
    case = make(variant)
    expected = (case.params['embedding'].T if case.config.model.tie_embeddings
                else case.params['head'])
    np.testing.assert_array_equal(case.head, expected)


def test_likeliest():
  """argmax, the first of equals, also where all are equal."""
  logits = np.random.default_rng(0).integers(5, size=(3, 40, 17)).astype(np.float32)
  logits[0, 0] = -np.inf
  np.testing.assert_array_equal(decoding.most_probable(jnp.asarray(logits)), logits.argmax(-1))


def test_head_of_few_and_many(make):
  """The table times many rows is what the rows of few times its transpose are."""
  case = make('rim')
  assert case.model.config.tie_embeddings
  rows = np.random.default_rng(0).normal(size=(2, 9, 16)).astype(np.float32)
  def head(hidden, *kernel):
    return case.model.apply({'params': case.params}, hidden, *kernel, method='head')
  plain = head(rows)
  assert_close(head(rows, case.head), plain)
  assert_close(head(rows[:1, :3], case.head), plain[:1, :3])
