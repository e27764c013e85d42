"""The implicit memory in a model: exact, cached = plain, scanned = unrolled, watched."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close

from latent_reasoning import batching, sequences
from latent_reasoning.eval import decoding
from latent_reasoning.methods import rim
from latent_reasoning.models import imm, memory_policies
from latent_reasoning.models.memory_policies import POLICIES
from latent_reasoning.models.transformer import Transformer, stack_layers

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture(scope='module')
def rim_batch(tiny_config):
  """Two RiM rows of different length in a batch, and their prompts."""
  ids = sequences.SpecialTokens(0, 1, 2, 3, 4, 5, (), (6,), (6, 7))
  config = tiny_config()
  found = [sequences.TokenizedExample([8, 9, 10, 11][:n], [[12, 13], [14]], [9])
           for n in (2, 4)]
  rows = [rim.ground(e, 0.0, config, ids) for e in found]
  prompts = [rim.prompt(e.question, 2, config, ids) for e in found]
  return batching.collate(rows, *batching.sizes(rows)), prompts


VARIANTS = {
    'prefix_mean': {'imm.write_policy': 'prefix_mean'},
    'low rank': {'imm.write_policy': 'gated', 'imm.linformer_rank': 3},
    'shared, twice, one layer': {'imm.write_policy': 'delta', 'imm.linformer_rank': 3,
                                 'imm.shared': True,
                                 'imm.rounds': 2},
    'some layers, seldom': {'imm.write_policy': 'ring', 'imm.layers': (1,),
                            'imm.write_interval': 2,
                            'imm.place': 'before', 'imm.ablate': ('norm',)}}


@pytest.mark.integration
@pytest.mark.parametrize('variant', VARIANTS)
def test_gpt_with_memory(tiny_config, rim_batch, random_params, variant):
  """In a model: naive = chunked over a RiM row, and cached decoding = a plain sequence."""
  batch, prompts = rim_batch
  config = tiny_config(**VARIANTS[variant])
  model = Transformer(config.model, 16, imm=config.imm)
  params = random_params(model, batch)
  slow = model.clone(imm=dataclasses.replace(config.imm, implementation='recurrent'))
  apply = jax.jit(lambda m, p, b: m.apply({'params': p}, b.tokens, b.positions, b.mask).hidden,
                  static_argnums=0)
  assert_close(apply(model, params, batch), apply(slow, params, batch))
  prompt = batching.collate(prompts, batching.sizes(prompts)[0], 2, 1)
  head, said = decoding.head_kernel(model, params), []
  logits, cache = jax.jit(decoding.prefill, static_argnums=(0, 4))(
      model, params, head, prompt, 3)
  heard = [logits]
  for step in range(3):
    said.append(np.asarray(logits.argmax(-1), np.int32))
    logits, cache = jax.jit(decoding.decode_step, static_argnums=0)(
        model, params, head, prompt, cache, said[-1], step)
    heard.append(logits)
  plain, places = [], []
  for b, row in enumerate(prompts):
    for k, out in enumerate(row.readouts):
      plain.append(sequences.causal(
          [*row.prefix[:out.visible_until], *(int(t[b, k]) for t in said)], ()))
      places.append((b, k, out.visible_until))
  alone = batching.collate(plain, max(len(row.prefix) for row in plain), 0, 0)
  logits = model.apply({'params': params}, apply(model, params, alone), method='head')
  for i, (b, k, until) in enumerate(places):
    for step in range(4):
      assert_close(logits[i, until - 1 + step], heard[step][b, k])


@pytest.mark.integration
def test_scanned_layers(tiny_config, rim_batch, random_params):
  """Scanned and rematerialised layers with a bank each are the unrolled ones."""
  batch, _ = rim_batch
  config = tiny_config(**{'imm.write_policy': 'gated', 'imm.linformer_rank': 3})
  model = Transformer(config.model, 16, imm=config.imm)
  params = random_params(model, batch)
  scanned = model.clone(config=dataclasses.replace(config.model, scan=True, remat='full'))
  one, two = (
      jax.jit(lambda p, m=m: m.apply({'params': p}, batch.tokens, batch.positions,
                                     batch.mask).hidden)(p)
      for m, p in ((model, params), (scanned, stack_layers(params, 2))))
  assert_close(one, two)
  # What is read of the memory has the same order: layer by layer, round by round.
  maps = [imm.attention(m.clone(imm=dataclasses.replace(config.imm, rounds=2)), p, batch)
          for m, p in ((model, params), (scanned, stack_layers(params, 2)))]
  assert maps[0].shape[0] == 4 and np.abs(maps[0][0] - maps[0][1]).max() > 1e-4
  assert_close(*maps)


@pytest.mark.integration
def test_low_rank_is_exact(tiny_config):
  """The R-wide bank reads what the D-wide bank of W_up s would, queried by q itself."""
  config = tiny_config(**{'imm.write_policy': 'gated', 'imm.linformer_rank': 3,
                          'imm.ablate': ('norm',)})
  layer = imm.Memory(config.imm, 8, jnp.float32, False)
  h = np.random.default_rng(0).normal(size=(1, 9, 8)).astype(np.float32)
  batch = batching.collate([sequences.causal(range(9), ())], 9, 0, 0)
  params = layer.init(jax.random.key(0), h, batch.positions, batch.mask, None, False)['params']
  found, *_ = layer.apply({'params': params}, h, batch.positions, batch.mask, None, False)
  k = {name: np.asarray(p['kernel']) for name, p in params.items()}
  x, _ = layer.apply({'params': params}, h, batch.positions, k['write_up'], method='project')
  wide = x.replace(s=x.s @ k['write_up'])
  q = h @ k['query'] @ k['query_up'] * 8**-0.5
  bank = memory_policies.empty((1,), x.w.shape[-1], 8)
  r, _, _ = memory_policies.recurrent(POLICIES['gated'], bank, wide, q)
  assert_close(found, h + r @ k['out'] @ k['out_up'])


@pytest.mark.integration
@pytest.mark.parametrize('off', ['write', 'read'])
def test_switched_off(tiny_config, rim_batch, random_params, off):
  """Without writes, or without reads, nothing but the norm is left of the memory."""
  batch, _ = rim_batch
  config = tiny_config(**{'imm.write_policy': 'gated', 'imm.ablate': (off, 'norm')})
  model = Transformer(config.model, 16, imm=config.imm)
  params = random_params(model, batch)
  bare = {k: {n: v for n, v in p.items() if n != 'memory'} if k.startswith('block_') else p
          for k, p in params.items()}
  found = model.apply({'params': params}, batch.tokens, batch.positions, batch.mask).hidden
  plain = model.clone(imm=None).apply({'params': bare}, batch.tokens, batch.positions,
                                      batch.mask).hidden
  assert_close(found, plain)


@pytest.mark.integration
def test_banks_between_segments(tiny_config, random_params):
  """A model that is given the banks of a first part remembers it: memory = in one row."""
  config = tiny_config(**{'imm.write_policy': 'gated'})
  model = Transformer(config.model, 16, imm=config.imm)
  row = batching.collate([sequences.causal(range(3, 9), ())], 6, 0, 0)
  params = random_params(model, row)
  mask = row.mask.replace(until=np.full((1, 1), 6, np.int32))
  @jax.jit
  def apply(mask, banks=None):
    return model.apply({'params': params}, row.tokens, row.positions, mask, banks=banks)
  without = apply(mask)
  banks = jax.tree.map(lambda a: a[:, 0], without.layers.banks)
  assert np.abs(apply(mask, banks).hidden - without.hidden).max() > 1e-3


@pytest.mark.integration
def test_watched(tiny_config, random_params):
  """Entropy, slot use and gate of a fresh and of a collapsed memory, and its warnings."""
  config = tiny_config(**{'imm.write_policy': 'gated', 'imm.slots': 4})
  model = Transformer(config.model, 16, imm=config.imm)
  batch = batching.collate([sequences.causal(range(3, 9), ())] * 2, 6, 0, 0)
  params = random_params(model, batch)
  found = {k: float(v) for k, v in imm.usage(model, params, batch).items()}
  assert 0 < found['read_entropy'] <= 1 and 0.25 <= found['top_slot'] <= 1
  assert 0 < found['write_gate'] < 1
  assert imm.usage(model.clone(imm=None), params, batch) == {}
  blind = model.clone(imm=dataclasses.replace(config.imm, ablate=('query',)))
  uniform = {k: float(v) for k, v in imm.usage(blind, params, batch).items()}
  assert_close([uniform['read_entropy'], uniform['top_slot']], [1, 0.25])
  assert 'reads all slots alike' in imm.warnings(uniform, 4)[0]
  assert imm.warnings({**found, 'memory_grad_norm': 0.0}, 4)
  assert imm.warnings({'read_entropy': 0.5, 'top_slot': 0.6}, 4) == []
