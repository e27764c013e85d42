"""Several problems in a row: nothing is lost, nothing is seen, nothing else changes."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama import LLAMA
from test_accumulation import agree, step_of

from latent_reasoning import batching, methods, sequences
from latent_reasoning.api import load_config
from latent_reasoning.errors import InputError
from latent_reasoning.models import masks
from latent_reasoning.sequences import Readout
from latent_reasoning.train import packing

PREFIX, READOUT = 12, 6


@st.composite
def sequence(draw) -> sequences.PackedSequence:
  """Any that fits; its tokens are all one, by which they are known again."""
  own = draw(st.integers(1, 99))
  n = draw(st.integers(2, PREFIX))
  readouts = []
  for _ in range(draw(st.integers(1, 4))):
    start = draw(st.none() | st.just(own))
    length = draw(st.integers(1, READOUT + (start is None) - 1))
    readouts.append(Readout(draw(st.integers(2, n)), [own] * length, start=start))
  return sequences.causal([own] * n, readouts)


several = st.lists(sequence(), min_size=1, max_size=9)
shapes = st.builds(packing.Shape, st.integers(PREFIX, 40), st.integers(1, 4),
                   st.integers(READOUT, 20), st.integers(4, 12))


def told(row: sequences.PackedSequence) -> tuple:
  return (*row.prefix, *((o.visible_until, *o.out, o.start) for o in row.readouts))


@settings(max_examples=60, deadline=None)
@given(several, shapes)
def test_each_has_its_place(rows, shape):
  """Every sequence stands in one row, no place is taken twice, no readout is cut in two."""
  shape = shape.holding(rows)
  packed = packing.pack(rows, shape)
  assert sorted(map(str, (told(p.row) for row in packed for p in row))) == sorted(
      map(str, map(told, rows)))
  for row in packed:
    prefixes = [i for p in row for i in range(p.start, p.start + len(p.row.prefix))]
    assert len(set(prefixes)) == len(prefixes) and max(prefixes) < shape.prefix
    parts = [range(at, at + len(out.inputs)) for p in row
             for at, out in zip(p.readouts, p.row.readouts, strict=True) if out.inputs]
    places = [i for part in parts for i in part]
    assert len(set(places)) == len(places)
    assert not places or max(places) < shape.slots * shape.readout
    assert all(part[0] // shape.readout == part[-1] // shape.readout for part in parts)
    assert sum(len(p.row.readouts) for p in row) <= shape.anchors


@settings(max_examples=30, deadline=None)
@given(several)
def test_no_problem_sees_another(rows):
  """What a token may see are tokens of its own problem, as many as without packing; positions
  are as without packing too."""
  rows = [dataclasses.replace(  # tokens of one number are of one problem
      row, prefix=[i] * len(row.prefix), readouts=[dataclasses.replace(
          o, out=[i] * len(o.out), start=o.start and i) for o in row.readouts])
          for i, row in enumerate(rows, 1)]
  shape = packing.Shape(30, 3, 14, 12).holding(rows)
  packed = packing.pack(rows, shape)
  packed += [[]] * (9 - len(packed))  # rows of padding; one shape, so that JAX compiles once
  batch = batching.lay_out(packed, shape.prefix, shape.slots, shape.readout, shape.anchors,
                           shared=True)
  assert batch.causal_prefix and batch.slots == shape.slots
  seen = np.asarray(masks.allowed(batch.mask))
  for i, row in enumerate(rows, 1):
    (b,) = {*np.nonzero(batch.tokens == i)[0]}
    own = batch.tokens[b] == i
    assert not seen[b][own][:, ~own].any()
    places = sorted([*range(len(row.prefix)), *(
        o.visible_until + t for o in row.readouts for t in range(len(o.inputs)))])
    assert sorted(seen[b][own].sum(-1) - 1) == places == sorted(batch.positions[b][own])
  assert batch.weights.sum() == pytest.approx(
      batching.collate(rows, *batching.sizes(rows)).weights.sum())


def test_too_small():
  """A sequence that no row holds is an error here; `holding` makes room for it."""
  row = sequences.causal([1] * 9, [Readout(9, [1] * 5), Readout(9, [1] * 5)])
  small = packing.Shape(8, 1, 4, 1)
  with pytest.raises(ValueError, match='no room'):
    packing.pack([row], small)
  assert small.holding([row]) == packing.Shape(16, 1, 8, 2)
  assert len(packing.pack([row], small.holding([row]))) == 1


def test_little_is_padding():
  """Problems as unequal as those of GSM8K: at most 15% of the places are padding, where a
  problem a row leaves more than half."""
  rng = np.random.default_rng(0)
  def one():
    n = int(np.clip(rng.lognormal(4.4, 0.45), 20, 300))
    steps = int(np.clip(round(n / 25 + rng.normal(0, 1.2)), 1, 8))  # more in longer problems
    return sequences.causal([1] * n, [Readout(n, [1] * int(rng.integers(4, 40)))
                                      for _ in range(steps)])
  batches = [[one() for _ in range(128)] for _ in range(6)]
  shape = packing.choose(batches[:4], 304, 768)
  for batch in batches[4:]:
    real = sum(len(r.prefix) + sum(len(o.inputs) for o in r.readouts) for r in batch)
    p, k, r = batching.sizes(batch)
    assert 1 - real / (len(batch) * (p + k * r)) > 0.5
    wide = shape.holding(batch)
    assert 1 - real / (len(packing.pack(batch, wide)) * wide.tokens) < 0.15


CASES = {
    'rim': {}, 'rim, stage 2': {'optim.stage1.steps': 0}, 'direct': {'method': 'direct'},
    'direct_steps': {'method': 'direct_steps'}, 'cot': {'method': 'cot'},
    'pause': {'method': 'pause'}, 'pause_steps': {'method': 'pause_steps'},
    'icot': {'method': 'icot'}, 'rim_parallel': {'method': 'rim_parallel'},
    'bidirectional': {'rim.block_attention': 'bidirectional',
                      'rim.readout_sees_question': False},
    'externalized': {'rim.externalize': True, 'optim.stage1.steps': 0,
                     'data.buckets.count': (1, 3, 6)},
    'dense': {'model.attention': 'dense'}, 'two microbatches': {'optim.grad_accum_steps': 2},
    'loops': {'model.loop.count': 2},
    'scanned Llama': {**LLAMA, 'model.num_kv_heads': 2, 'model.scan': True},
    'window': {**LLAMA, 'model.window': 4}}
PLAIN = {'tokenizer.pad_to': 8, 'optim.weight_decay': 0.0, 'optim.max_grad_norm': 0.0}


def compare(name, tiny_config, tmp_path):
  config = {**PLAIN, **CASES[name]}
  alone, packed = (step_of(tiny_config(**config, **{'data.packing': packing}), tmp_path / str(
      packing)) for packing in (False, True))
  assert alone['grad_norm'][0] > 0
  agree(alone, packed, name)


def test_packed_is_separate(tiny_config, tmp_path, quick_compilation):
  """Loss, gradient and what is right are those of a problem a row."""
  compare('rim', tiny_config, tmp_path)


@pytest.mark.integration
@pytest.mark.parametrize('name', [name for name in CASES if name != 'rim'])
def test_all_packed_are_separate(name, tiny_config, tmp_path, quick_compilation):
  compare(name, tiny_config, tmp_path)


CAN = ('rim', 'direct', 'direct_steps', 'cot', 'pause', 'pause_steps', 'icot', 'rim_parallel')


@pytest.mark.parametrize('method', methods.METHODS)
def test_who_can(tiny_config, method):
  """Each method packs, and is compared above, or says why it does not."""
  text = {'data.name': 'shakespeare'} if methods.get(method).is_text else {}
  config = tiny_config(**{'method': method, 'data.packing': True, **text})
  if method in CAN:
    assert methods.check(config).name == method and method in CASES
  else:
    with pytest.raises(InputError, match='config.data.packing False'):
      methods.check(config)


@pytest.mark.parametrize('changes, why', [
    ({'rim.passes': 2}, 'several passes'), ({'imm.write_policy': 'ring'}, 'memory'),
    ({'aux.align': 0.1}, 'aux'), ({'data.sort_window': 2}, 'sort_window 1'),
    ({'reasoning_decoder.source': 'blocks', 'reasoning_decoder.joint': True}, 'decoder')])
def test_what_cannot(tiny_config, changes, why):
  with pytest.raises(InputError, match=why):
    methods.check(tiny_config(**{'data.packing': True, **changes}))


@pytest.mark.parametrize('unit', [1, 3])
def test_batches(tiny_config, make_run, tmp_path, unit):
  """Each batch has its problems, once, in as many rows as devices and microbatches divide, and
  in few shapes; `at` is random access."""
  changes = {'optim.batch_size': 12, 'optim.grad_accum_steps': unit,
             'data.arithmetic.min_steps': 1, 'data.buckets.count': (1, 3)}
  one, other = (make_run(tiny_config(**changes, **{'data.packing': packing}), tmp_path / str(
      packing)).batches for packing in (False, True))
  seen, sizes = set(), np.zeros(2)
  for step in range(one.curriculum.total):
    alone, packed = one.at(step), other.at(step)
    assert len(packed.tokens) % unit == 0 and len(packed.tokens) < 12
    assert packed.real(one.special.pad) == alone.real(one.special.pad)
    assert packed.weights.sum() == pytest.approx(alone.weights.sum())
    sizes += packed.tokens.size, alone.tokens.size
    seen.add((one.curriculum.at(step).stage, packed.tokens.shape))
  assert sizes[0] < sizes[1]
  again = other.at(3)
  other.at(9)
  assert all(map(np.array_equal, [again.tokens, again.segment], [
      other.at(3).tokens, other.at(3).segment]))
  assert len(seen) <= sum(other.shapes(stage) for stage in (1, 2)) + 1


@pytest.mark.integration
@pytest.mark.parametrize('method', ['rim', 'cot', 'direct'])
def test_real_problems(shared_data, make_run, tmp_path, method):
  """The recipe on GSM8K: at most 15% of its tokens are padding, in both stages."""
  changes = {'method': method, 'data.name': 'gsm8k', 'data.dir': str(shared_data / 'gsm8k'),
             'data.packing': True, 'data.sort_window': 1, 'model.init_from': '',
             'model.lora.rank': 0, 'optim.trainable': 'all', 'tokenizer.vocab_size': 4096}
  batches = make_run(load_config('rim_gsm8k', **changes), tmp_path).batches
  first = batches.curriculum.lengths[0]
  for start in (0, first * 3 // 5, first):
    found = [batches.at(step) for step in range(start, start + 8)]
    real = sum(batch.real(batches.special.pad) for batch in found)
    assert 1 - real / sum(batch.tokens.size for batch in found) < 0.15


def test_order_of_rows():
  """The same sequences in another order take as many rows: packing sorts them."""
  rng = np.random.default_rng(0)
  rows = [sequences.causal([i + 1] * int(rng.integers(2, 12)), [Readout(2, [1, 2])])
          for i in range(20)]
  shape = packing.Shape(24, 1, 12, 12)
  sizes = {len(packing.pack([rows[i] for i in rng.permutation(20)], shape))
           for _ in range(5)}
  least = sum(len(row.prefix) for row in rows) / 24
  assert max(sizes) <= np.ceil(least) + 1
  assert sum(map(len, itertools.chain(packing.pack(rows, shape)))) == 20
