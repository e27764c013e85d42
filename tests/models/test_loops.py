"""Several passes over the end of a prefix, tied to whole sequences, one a pass and readout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close
from toy import IDS

from latent_reasoning import batching, methods, sequences
from latent_reasoning.eval import leakage, one_by_one
from latent_reasoning.methods import rim
from latent_reasoning.models import latents
from latent_reasoning.models.transformer import Transformer
from latent_reasoning.sequences import Loops, PackedSequence, Readout
from latent_reasoning.train import losses

pytestmark = pytest.mark.usefixtures('quick_compilation')

EXAMPLES = [sequences.TokenizedExample([1, 2, 3], [[4, 5], [6, 7], [1, 2, 3], [4]], [8]),
            sequences.TokenizedExample([3, 1, 2, 9, 4], [[5, 5], [7]], [9, 1])]
VOCABULARY = 32
LLAMA = {'model.position_embedding': 'rotary', 'model.norm': 'rms', 'model.mlp': 'swiglu',
         'model.num_kv_heads': 1, 'model.bias': False, 'model.fused_qkv': False}
ARMS = {  # blocks, passes, and what else differs
    'one block': (1, 4, {}), 'blocks that see each other': (2, 2, {}),
    'causal blocks': (2, 2, {'rim.pass_attention': 'causal'}),
    'bidirectional inside': (2, 3, {'rim.block_attention': 'bidirectional'}),
    'blind readouts': (2, 2, {'rim.readout_sees_question': False}),
    'scanned layers': (2, 2, {'model.scan': True, 'model.num_layers': 2}),
    'llama': (2, 2, LLAMA)}


@pytest.fixture
def make(tiny_config, random_params):
  def build(blocks, passes, more, method='rim'):
    config = tiny_config(**{'method': method, 'rim.blocks': blocks, 'rim.passes': passes,
                            'rim.max_steps': 4, 'model.num_layers': 1, **more})
    model = Transformer(config.model, VOCABULARY)
    two = batching.collate([sequences.causal([1, 2], ())], 2, 0, 0)
    return leakage.Subject(config, model, random_params(model, two), None, EXAMPLES)
  return build


def rows(subject, stage):
  return [methods.get('rim').sequence(e, stage, 0.0, subject.config, IDS) for e in EXAMPLES]


def check(subject, own, extra=(0, 0, 0)):
  """Packed, cached and padded = pass by pass, readout by readout."""
  sizes = [a + b for a, b in zip(batching.sizes(own), extra, strict=True)]
  packed = one_by_one.by_readout(subject, batching.collate(own, *sizes, pad=20), own)
  alone = [one for row in own for one in one_by_one.pass_by_pass(subject, row)]
  assert len(packed) == sum(len(row.readouts) for row in own)
  for a, b in zip(packed, alone, strict=True):
    assert_close(a, b)


@pytest.mark.integration
@pytest.mark.parametrize('arm', ARMS)
def test_equals_pass_by_pass(make, arm):
  subject = make(*ARMS[arm])
  for stage, extra in ((1, (0, 0, 0)), (2, (3, 1, 2))):
    check(subject, rows(subject, stage), extra)


@pytest.mark.integration
@pytest.mark.parametrize('mix', ['add', 'replace'])
@pytest.mark.parametrize('shift', [0, 1])
@pytest.mark.parametrize('block', [0, 2])
def test_other_operators(make, mix, shift, block):
  """LOTUS adds a state of the position itself, PCCoT replaces by the one before."""
  subject = make(2, 1, {})
  own = [PackedSequence([*e.question, 22, 23, 23, 25, 25], range(1, len(e.question) + 6), [
      Readout(len(e.question) + 5, [*e.answer, 21], start=24, reads=3),
      Readout(len(e.question) + 4, [7, 21], start=26, reads=1)],
      Loops(3, 4, mix, shift, block)) for e in EXAMPLES]
  check(subject, own, (2, 0, 1))


def test_one_pass_is_the_plain_model(make):
  """No loops at all, to the bit: the same arrays reach the same program."""
  with_key, without = make(2, 1, {}), make(2, 1, {'rim.pass_attention': 'causal'})
  for stage in (1, 2):
    a, b = (batching.collate(own, *batching.sizes(own)) for own in (
        rows(with_key, stage), rows(without, stage)))
    assert a.loops is None and jax.tree.structure(a) == jax.tree.structure(b)
    assert all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@pytest.mark.integration
def test_replaced_without_attention_to_it_is_a_deeper_model(make):
  """L passes that replace, over k layers = a plain model of L·k layers with copied weights,
  where nothing stands before the tokens that are read again but one token that they do not
  see, and the norm between is the model's own."""
  subject = make(2, 1, {'model.position_embedding': 'rotary'})
  model, params = subject.model, subject.params
  tokens = [5, 6, 7, 8]
  row = PackedSequence([1, *tokens], [1, 2, 3, 4, 5], [Readout(5, [9], reads=3)],
                       Loops(3, 4, 'replace'))
  batch = batching.collate([row], *batching.sizes([row]))
  batch = dataclasses.replace(batch, visible_from=np.where(  # blind to the first token
      np.arange(batch.tokens.shape[1]) > 0, 1, 0)[None])
  hidden = latents.forward(model, params, batch).hidden[:, batch.prefix - 4:batch.prefix]
  x = model.apply({'params': params}, np.array([tokens]), method='embed')
  places = np.arange(1, 5)[None]
  plain = batching.collate([sequences.causal(tokens, ())], 4, 0, 0)
  for _ in range(3):
    x = model.apply({'params': params}, plain.tokens, places, plain.mask, embeddings=x).hidden
  assert_close(hidden, x)


@pytest.mark.integration
def test_no_path_from_later_tokens(make):
  """In no pass does a state depend on a block that it may not see, nor a readout on another;
  and every state depends on all that it may."""
  for arm in ('one block', 'blocks that see each other', 'causal blocks'):
    subject = make(*ARMS[arm])
    for stage in (1, 2):
      own = rows(subject, stage)
      ok, found = leakage.gradients(subject, own)
      assert ok, found
      ok, found = leakage.direct_sight(subject, own)
      assert ok, found


@pytest.mark.integration
def test_gradient_equals_pass_by_pass(make):
  """Through all passes: nothing is detached. By differences of the reference."""
  subject = make(1, 4, {})
  own = rows(subject, 1)[:1]
  batch = batching.collate(own, *batching.sizes(own))
  grads = jax.grad(lambda p: losses.next_token(subject.model, p, batch)[0])(subject.params)
  direction = jax.tree.map(lambda a: jax.random.normal(jax.random.key(a.size), a.shape),
                           subject.params)

  def loss(t):
    moved = jax.tree.map(lambda a, d: a + t * d, subject.params, direction)
    found = one_by_one.pass_by_pass(dataclasses.replace(subject, params=moved), own[0])
    return -sum(float(out.weight * one.sum(dtype=np.float64)) for out, one in zip(
        own[0].readouts, found, strict=True))
  step = 1e-3
  slope = (loss(step) - loss(-step)) / (2 * step)
  ours = sum(jax.tree.leaves(jax.tree.map(lambda g, d: jnp.vdot(g, d), grads, direction)))
  assert_close(float(ours), slope, 1e-2)


def test_steps_stand_at_their_pass(make):
  """Step t after block (t-1) mod K + 1 of pass ⌈t / K⌉, the answer in the last."""
  subject = make(2, 2, {})
  ground, refine = (rows(subject, stage)[0] for stage in (1, 2))
  ends = [len(EXAMPLES[0].question) + k * subject.config.rim.block_length for k in (1, 2)]
  assert [(r.visible_until, r.reads, list(r.out)) for r in ground.readouts] == [
      (ends[0], 1, [6, 7, 21]), (ends[1], 1, [1, 2, 3, 21]), (ends[0], 2, [4, 21]),
      (ends[1], 2, [8, 21])]
  assert [(r.visible_until, r.reads, list(r.out)) for r in refine.readouts] == [
      (ends[0], 2, [8, 21]), (ends[1], 2, [8, 21])]
  assert ground.prefix == refine.prefix and ground.loops == refine.loops == Loops(
      2, 2 * subject.config.rim.block_length, block=subject.config.rim.block_length)
  prompt = rim.prompt([1, 2], 2, subject.config, IDS)
  assert [r.reads for r in prompt.readouts] == [1, 1, 2, 2]


def test_positions_are_those_of_the_first_pass(make):
  own = rows(make(2, 3, {}), 1)
  p, k, r = batching.sizes(own)
  batch = batching.collate(own, p + 1, k, r)
  size = own[0].loops.size
  for b, row in enumerate(own):
    begin = len(row.prefix) - size
    for at in (p + 1, p + 1 + size):
      assert np.array_equal(batch.positions[b, at:at + size], np.arange(begin, begin + size))
      assert np.array_equal(batch.tokens[b, at:at + size], row.prefix[begin:])
  assert batch.prefix == p + 1 + 2 * size
