"""The checks pass on sound code and name what is broken in unsound code."""

import dataclasses
import itertools

import numpy as np
import pytest

from latent_reasoning import batching, methods, sequences
from latent_reasoning.data import tokenizers
from latent_reasoning.data.arithmetic import Arithmetic
from latent_reasoning.eval import decoding, leakage
from latent_reasoning.methods import rim
from latent_reasoning.models import attention, imm, latents, masks, memory_policies
from latent_reasoning.models.transformer import Transformer

pytestmark = pytest.mark.usefixtures('quick_compilation')

# Of one layer, but for RiM: there are programs to compile for each shape and model.
VARIANTS = {
    'direct': {'method': 'direct'},
    'direct_steps': {'method': 'direct_steps'},
    'cot': {'method': 'cot'},
    'pause': {'method': 'pause', 'model.position_embedding': 'rotary', 'model.scan': True,
              'model.tie_embeddings': False},
    'icot': {'method': 'icot'},
    'coconut': {'method': 'coconut', 'baselines.parts': 3, 'model.num_layers': 2},
    'coconut, mixed': {'method': 'coconut', 'baselines.parts': 3, 'model.num_layers': 2,
                       'baselines.mix_parts': True},
    'codi': {'method': 'codi', 'baselines.latents': 2, 'baselines.projection': True,
             'model.scan': True, 'model.num_layers': 2},
    'direct, loops': {'method': 'direct', 'model.loop.count': 3, 'model.loop.mix': 'add',
                      'model.loop.norm': 'final'},
    'rim, loops over layers': {'model.num_layers': 3, 'model.loop.count': 2,
                               'model.loop.layers': (1, 2), 'model.loop.mix': 'concat'},
    'cot, loops, scanned': {'method': 'cot', 'model.num_layers': 2, 'model.loop.count': 2,
                            'model.scan': True, 'model.loop.norm': 'rms'},
    'lotus': {'method': 'lotus', 'baselines.parts': 3, 'baselines.latents': 2},
    'pccot': {'method': 'pccot', 'baselines.latents': 3, 'baselines.rounds': 2,
              'baselines.projection': True},
    'rim_parallel': {'method': 'rim_parallel'},
    'rim_parallel, passes': {'method': 'rim_parallel', 'rim.passes': 2, 'rim.blocks': 2},
    'rim': {'model.num_layers': 2},
    'rim, passes': {'rim.passes': 2, 'rim.blocks': 2, 'model.num_layers': 2},
    'rim, passes, causal': {'rim.passes': 2, 'rim.blocks': 2, 'rim.pass_attention': 'causal'},
    'rim, offset 0': {'model.num_layers': 2, 'rim.readout_offset': 0},
    'rim, bidirectional': {'model.num_layers': 2, 'rim.block_attention': 'bidirectional'},
    'rim, blind': {'model.num_layers': 2, 'rim.readout_sees_question': False},
    'rim, bidirectional, blind': {'model.num_layers': 2, 'rim.readout_sees_question': False,
                                  'rim.block_attention': 'bidirectional'}}
MEMORY = {  # of two layers where layers differ
    'rim, gated': {'imm.write_policy': 'gated', 'imm.linformer_rank': 3},
    'rim, gated, shared': {'imm.write_policy': 'gated', 'imm.linformer_rank': 3,
                           'imm.shared': True,
                           'model.num_layers': 2},
    'rim, delta, twice, bidirectional': {
        'imm.write_policy': 'delta', 'imm.rounds': 2, 'imm.place': 'before',
        'rim.block_attention': 'bidirectional'},
    'cot, ring, scanned': {'method': 'cot', 'imm.write_policy': 'ring', 'imm.write_interval': 2,
                           'model.num_layers': 2, 'model.scan': True}}
SIGHT, GRADIENTS, SEPARATE, SPLIT = (
    'stage 1: one layer sees what the rule allows',
    'stage 1: no gradient from later tokens, blocks, other readouts',
    'stage 1: packed row = each readout as a sequence of its own',
    'stage 1: split attention = one dense mask')
CHECKS = {SIGHT: leakage.direct_sight, GRADIENTS: leakage.gradients,
          SEPARATE: leakage.separate, SPLIT: leakage.implementations}

fresh = itertools.count(1)


@pytest.fixture(scope='module')
def tokenizer(tiny_config, tmp_path_factory):
  path = tmp_path_factory.mktemp('tokenizer') / 'tokenizer.json'
  return tokenizers.build(tiny_config().tokenizer, lambda: ['0'], path, 3)


@pytest.fixture(scope='module')
def make(tiny_config, tokenizer, random_params):
  """Makes a Subject of two problems with 1 or 2 steps, on random weights."""
  def build(own=False, **changes) -> leakage.Subject:
    config = tiny_config(**{
        'data.arithmetic.min_steps': 1, 'data.arithmetic.max_steps': 2, 'rim.blocks': 2,
        'baselines.pause_tokens': 2, 'model.num_layers': 1, 'model.embed_dim': 8,
        'model.mlp_dim': 8,
        'eval.max_new_tokens': 3, **changes})
    problems = Arithmetic(config.data.arithmetic, False, 0, 'train')
    one = next(p for p in problems if len(p.steps) == 1)
    two = next(p for p in problems if len(p.steps) == 2)
    # Programs are cached by model: one that differs shares none with sound code.
    model = Transformer(config.model, tokenizer.vocab_size, next(fresh) / 1e6 if own else 0.0,
                config.imm, projection=config.baselines.projection)
    batch = batching.collate([sequences.causal([1, 2], ())], 2, 0, 0)
    return leakage.Subject(config, model, random_params(model, batch), tokenizer,
                           sequences.encode([one, two], tokenizer))
  return build


@pytest.mark.parametrize('variant', [
    pytest.param(variant, marks=pytest.mark.slow if k else pytest.mark.integration)
    for k, variant in enumerate(MEMORY)])
def test_sound_with_memory(make, variant):
  """With every causal policy all checks pass, those of the memory included."""
  checks = leakage.run(make(**MEMORY[variant]))
  assert len(checks) == 16
  assert [c for c in checks if not c['ok']] == []


@pytest.mark.integration
def test_leaking_memory(make, monkeypatch):
  """A bank that runs on from one readout into the next is caught."""
  def run_on(self, x, q, mask, bank):
    r, bank, _ = memory_policies.chunkwise(
        memory_policies.POLICIES['gated'], memory_policies.empty(
            (q.shape[0],), imm.slots_of(self.config, self.width), q.shape[-1]), x, q)
    return bank, r, imm.MemoryReads(r, x.beta, None)

  monkeypatch.setattr(imm.Memory, '_row', run_on)
  subject = make(own=True, **{'imm.write_policy': 'gated'})
  for name in (SIGHT, SEPARATE):
    assert not CHECKS[name](subject, subject.rows(1))[0], name


@pytest.mark.integration
def test_memory_that_reads_the_future(make):
  """The leak of the published reference is reported, by both checks."""
  subject = make(**{'method': 'language_model', 'data.name': 'text', 'data.seq_len': 8,
                    'imm.write_policy': 'sequence_mean'})
  checks = leakage.run(subject)
  assert len(checks) == 2 and not any(c['ok'] for c in checks)
  assert 'gradient' in checks[0]['found']


@pytest.mark.integration
@pytest.mark.parametrize('variant', VARIANTS)
def test_sound(make, variant):
  """All checks pass, and each has looked at something."""
  checks = leakage.run(make(**VARIANTS[variant]))
  assert len(checks) == 14 and len({c['check'] for c in checks}) == 14
  assert [c for c in checks if not c['ok']] == []
  assert not any(' of 0 ' in c['found'] for c in checks)


@pytest.mark.integration
def test_a_thought_that_sees_the_answer(make, monkeypatch):
  """A Coconut whose thoughts are computed with the answer in sight is caught."""
  sound = latents.forward_with_cache

  def leaky(model, params, batch, rng=None, embeddings=None, room=0):
    if embeddings is None:
      embeddings = model.apply({'params': params}, batch.tokens, method='embed')
    answer = embeddings[:, batch.prefix + batch.latents:].mean(1, keepdims=True)
    first = embeddings.at[:, batch.prefix - 1:batch.prefix].add(answer)
    return sound(model, params, batch, rng, first, room)
  subject = make(own=True, method='coconut', **{'baselines.parts': 3, 'model.num_layers': 2})
  assert all(leakage._check('', CHECKS[name], subject, subject.rows(1))['ok']
             for name in (SIGHT, GRADIENTS, SEPARATE))
  monkeypatch.setattr(latents, 'forward_with_cache', leaky)
  fails(make(own=True, method='coconut', **{'baselines.parts': 3, 'model.num_layers': 2}),
        SIGHT, GRADIENTS, SEPARATE)


def fails(subject: leakage.Subject, *names: str) -> None:
  """Asserts that these checks of stage 1 fail."""
  for name in names:
    found = leakage._check(name, CHECKS[name], subject, subject.rows(1))
    assert not found['ok'], found


@pytest.mark.integration
def test_a_key_too_far(make, monkeypatch):
  """Prefix queries and readouts that see one key further are seen."""
  sound = masks.sees_prefix
  monkeypatch.setattr(masks, 'sees_prefix', lambda query, keys: sound(
      query.replace(visible_until=query.visible_until + 1), keys))
  fails(make(own=True), SIGHT, GRADIENTS)


@pytest.mark.integration
def test_a_readout_that_reads_ahead(make, monkeypatch):
  """Readouts without a causal mask of their own are seen."""
  sound = attention._readouts
  monkeypatch.setattr(attention, '_readouts', lambda *args: sound(
      *args[:-2], args[-2] | True, args[-1]))
  fails(make(own=True), SIGHT, GRADIENTS, SEPARATE, SPLIT)


@pytest.mark.integration
def test_a_readout_that_reads_another(make, monkeypatch):
  """A dense mask that forgets the segments is seen."""
  def allowed(mask):
    length = mask.segment.shape[1]
    own = (mask.segment[:, None, :] != 0) & np.tri(length, dtype=bool)
    prefix = (mask.segment[:, None, :] == 0) & masks.sees_prefix(mask, length)
    return own | prefix
  monkeypatch.setattr(masks, 'allowed', allowed)
  fails(make(own=True, **{'model.attention': 'dense'}), SIGHT, GRADIENTS)


@pytest.mark.integration
def test_a_readout_that_sees_a_later_block(make, monkeypatch):
  """A method that attaches readouts to the block after their own is seen.

  Packed and separate rows are then wrong alike: only the rule, worked out from
  lengths, tells.
  """
  sound = methods.METHODS['rim']
  def late(stage):
    def sequence(example, progress, config, ids):
      row, size = stage(example, progress, config, ids), config.rim.block_tokens + 2
      return dataclasses.replace(row, readouts=[dataclasses.replace(
          out, visible_until=min(out.visible_until + size, len(row.prefix)))
          for out in row.readouts])
    return sequence
  monkeypatch.setitem(methods.METHODS, 'rim', dataclasses.replace(
      sound, stages=tuple(map(late, sound.stages))))
  fails(make(own=True), SIGHT, GRADIENTS)


@pytest.mark.parametrize('method', ['rim', 'direct_steps'])
def test_positions_that_do_not_go_on(make, monkeypatch, method):
  """Readouts that count positions along the packed row are seen, where text is."""
  sound = batching.collate
  def collate(*args, **kwargs):
    batch = sound(*args, **kwargs)
    positions = batch.positions.copy()
    positions[:, batch.prefix:] = np.arange(batch.prefix, positions.shape[1])
    return batch.replace(positions=positions)
  monkeypatch.setattr(batching, 'collate', collate)
  fails(make(own=True, method=method), SEPARATE)


@pytest.mark.integration
def test_a_decoder_at_a_wrong_position(make, monkeypatch):
  """A cached step at the position after its own is seen."""
  sound = decoding.decode_step
  def decode_step(model, params, head, batch, *args):
    return sound(model, params, head, batch.replace(positions=batch.positions + 1), *args)
  monkeypatch.setattr(decoding, 'decode_step', decode_step)
  subject = make(own=True)
  ok, found = leakage.caching(subject, subject.prompts())
  assert not ok, found


@pytest.mark.integration
def test_a_cache_that_forgets(make, monkeypatch):
  """A decoder that writes every token to the same slot is seen."""
  sound = decoding.decode_step
  monkeypatch.setattr(decoding, 'decode_step', lambda *args: sound(
      *args[:-1], 0)[:1] + (args[4],))
  subject = make(own=True)
  ok, found = leakage.caching(subject, subject.prompts())
  assert not ok, found


def test_a_special_token_that_can_be_typed(make, tokenizer):
  """A tokenizer that takes '<m>' in a question for the memory token is seen."""
  class Typed:
    def __getattr__(self, name):
      return getattr(tokenizer, name)

    def encode(self, text):
      first, *rest = (tokenizer.encode(part) for part in text.split('<m>'))
      return first + [i for part in rest for i in (tokenizer.memory, *part)]

  subject = make()
  assert leakage.typing_specials(subject)[0]
  ok, found = leakage.typing_specials(dataclasses.replace(subject, tokenizer=Typed()))
  assert not ok and found.startswith('2 special')


@pytest.mark.integration
def test_sound_externalized(make):
  """Two readouts a block in stage 2, and its decoding of steps."""
  subject = make(**{'model.num_layers': 2, 'rim.externalize': True})
  rows = subject.rows(2)
  assert [len(row.readouts) for row in rows] == [3, 4]
  for check in (leakage.direct_sight, leakage.separate, leakage.implementations):
    assert check(subject, rows)[0], check
  steps = [rim.steps_prompt(row, subject.special) for row in subject.prompts()]
  assert leakage.caching(subject, steps)[0]
