"""Rows of every method, written out by hand."""

import dataclasses
import math

import numpy as np
import pytest

from latent_reasoning import methods, sequences
from latent_reasoning.data import tokenizers
from latent_reasoning.data.example import Example
from latent_reasoning.errors import InputError
from latent_reasoning.methods import icot, rim
from latent_reasoning.sequences import Readout, TokenizedExample

# <b> = 92, <m> = 93, </b> = 94; a block with one memory token is 92 93 94.
IDS = sequences.SpecialTokens(pad=90, end=91, block_open=92, memory=93, block_close=94,
                              pause=95, steps=(96, 97, 98), newline=(10,), answer=(10, 35))
BLOCK = [92, 93, 94]
QUESTION, STEPS, ANSWER = [1, 2], [[3, 4], [5, 6], [7]], [8, 9]


def example(steps: int = 3) -> TokenizedExample:
  return TokenizedExample(QUESTION, STEPS[:steps], ANSWER)


@pytest.fixture
def config(tiny_config):
  """A Config: K = 3 blocks with M = 1."""
  return tiny_config()


def with_rim(config, **changes):
  return dataclasses.replace(config, rim=dataclasses.replace(config.rim, **changes))


def train(name, config, steps=3, stage=1, progress=0.0):
  return methods.METHODS[name].sequence(example(steps), stage, progress, config, IDS)


def check(row, prefix, readouts, visible=None):
  """Compares a row with lists."""
  assert list(row.prefix) == prefix
  assert list(row.visible_until) == (visible or list(range(1, len(prefix) + 1)))
  assert [dataclasses.replace(r, out=list(r.out)) for r in row.readouts] == readouts


@pytest.mark.parametrize('steps,offset,outs', [
    (3, 1, [[5, 6, 91], [7, 91], [8, 9, 91]]),  # r_2, r_3, y
    (3, 0, [[3, 4, 91], [5, 6, 91], [7, 91]]),  # r_1, r_2, r_3
    (1, 1, [[8, 9, 91]]),
    (1, 0, [[3, 4, 91]]),
    (0, 1, [[8, 9, 91]]),  # no step: one block, then the answer
    (0, 0, [[8, 9, 91]])])
def test_rim_stage_1(config, steps, offset, outs):
  """Block t hangs r_{t+1}, or with offset 0 r_t, off its last token."""
  config = with_rim(config, readout_offset=offset)
  check(train('rim', config, steps), [1, 2] + BLOCK * len(outs),
        [Readout(2 + 3 * t, out) for t, out in enumerate(outs, 1)])


def test_rim_stage_2(config):
  """Every one of K blocks predicts the answer, whatever the number of steps."""
  for steps in (0, 1, 3):
    check(train('rim', config, steps, stage=2, progress=0.5), [1, 2] + BLOCK * 3,
          [Readout(2 + 3 * k, [8, 9, 91], k / 6) for k in (1, 2, 3)])


@pytest.mark.parametrize('passes', [1, 4])
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('steps', [0, 1, 3])
def test_answers_that_are_held(config, steps, offset, passes):
  """Behind the last step's readout each says the answer, in both stages; their weights are 1
  together, and those of steps vanish with the stage."""
  config = with_rim(config, blocks=4 // passes, passes=passes, readout_offset=offset,
                    hold_answer=True)
  said = [[3, 4, 91], [5, 6, 91], [7, 91]][offset:steps]
  before, held = len(said), 4 - len(said)
  for stage, progress, annealed in ((1, 0.0, 1.0), (1, 0.75, 0.25), (2, 0.5, None)):
    row = train('rim', config, steps, stage, progress)
    first = before if annealed is None else 0
    outs = [*said, *[[8, 9, 91]] * held][first:]
    assert [list(out.out) for out in row.readouts] == outs
    assert [out.weight for out in row.readouts] == pytest.approx(
        [*[annealed] * (before - first), *[1 / held] * held])
    assert [(out.visible_until, out.reads) for out in row.readouts] == [
        (2 + 3 * (t % (4 // passes) + 1), t // (4 // passes) + 1) for t in range(first, 4)]
    assert list(row.prefix) == [1, 2] + BLOCK * (4 // passes)


def test_answers_that_are_held_need_a_readout(config):
  for offset, most in ((1, 3), (0, 2)):
    fits = {'blocks': 3, 'hold_answer': True, 'readout_offset': offset}
    rim.check(with_rim(config, max_steps=most, **fits))
    with pytest.raises(InputError, match=f'have a readout for {most} steps'):
      rim.check(with_rim(config, max_steps=most + 1, **fits))


@pytest.mark.parametrize('blocks', [1, 2, 3, 8])
def test_answer_weights(config, blocks):
  """α_k = 2k / (K (K + 1)), which sums to 1."""
  row = train('rim', with_rim(config, blocks=blocks), stage=2)
  weights = [out.weight for out in row.readouts]
  assert sum(weights) == pytest.approx(1)
  assert weights == pytest.approx([2 * k / (blocks * (blocks + 1))
                                   for k in range(1, blocks + 1)])


def test_block_tokens(config):
  """A block is <b>, M memory tokens, </b>; M = 0 leaves the brackets."""
  for m in (0, 2):
    row = train('rim', with_rim(config, block_tokens=m), steps=2)
    block = [92] + [93] * m + [94]
    assert list(row.prefix) == [1, 2] + block * 2
    assert [out.visible_until for out in row.readouts] == [2 + len(block), 2 + 2 * len(block)]


def test_bidirectional_block(config):
  """Each token of a block sees to its block's end; the question stays causal."""
  both = with_rim(config, block_attention='bidirectional')
  check(train('rim', both, steps=2), [1, 2] + BLOCK * 2,
        [Readout(5, [5, 6, 91]), Readout(8, [8, 9, 91])],
        visible=[1, 2, 5, 5, 5, 8, 8, 8])


def test_blind_readouts(config):
  """A readout that may not see the question begins to see behind it."""
  blind = with_rim(config, readout_sees_question=False)
  for stage in (1, 2):
    assert [out.visible_from for out in train('rim', blind, stage=stage).readouts] == [2, 2, 2]
  prompt = rim.prompt(QUESTION, 3, blind, IDS)
  assert [out.visible_from for out in prompt.readouts] == [2, 2, 2]


@pytest.mark.parametrize('stage', [1, 2])
def test_direct(config, stage):
  """x y."""
  check(train('direct', config, stage=stage), [1, 2], [Readout(2, [8, 9, 91])])


@pytest.mark.parametrize('stage', [1, 2])
def test_pause(config, stage):
  """x, P pause tokens, y."""
  check(train('pause', config, stage=stage), [1, 2, 95, 95, 95], [Readout(5, [8, 9, 91])])


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('stage, progress', [(1, 0.0), (1, 0.75), (2, 0.0)])
def test_pause_steps(config, stage, progress, offset):
  """`direct_steps` with its readouts moved behind P pause tokens."""
  config = with_rim(config, readout_offset=offset)
  row, plain = (train(name, config, stage=stage, progress=progress)
                for name in ('pause_steps', 'direct_steps'))
  check(row, [1, 2, 95, 95, 95],
        [dataclasses.replace(out, visible_until=5) for out in plain.readouts])
  assert len(plain.readouts) > 1 if stage == 1 else len(plain.readouts) == 1


@pytest.mark.parametrize('steps,out', [
    (3, [3, 4, 10, 5, 6, 10, 7, 10, 35, 8, 9, 91]),
    (1, [3, 4, 10, 35, 8, 9, 91]),
    (0, [10, 35, 8, 9, 91])])
def test_cot(config, steps, out):
  """x, steps line by line, the marked answer."""
  check(train('cot', config, steps), [1, 2], [Readout(2, out)])


@pytest.mark.parametrize('steps,offset,outs', [
    (3, 1, [[5, 6, 91], [7, 91]]),  # y hangs off the question itself
    (3, 0, [[3, 4, 91], [5, 6, 91], [7, 91]]),
    (1, 1, []), (1, 0, [[3, 4, 91]]), (0, 1, []), (0, 0, [])])
def test_direct_steps_stage_1(config, steps, offset, outs):
  """Step readouts begin with an index token behind the question; then the answer."""
  config = with_rim(config, readout_offset=offset)
  auxiliary = [Readout(2, out, start=96 + t) for t, out in enumerate(outs)]
  check(train('direct_steps', config, steps), [1, 2], [*auxiliary, Readout(2, [8, 9, 91])])


def test_direct_steps_stage_2(config):
  """Without step readouts it is `direct`."""
  assert train('direct_steps', config, stage=2) == train('direct', config, stage=2)


def test_inputs_are_the_output_moved_by_one():
  """The first token is predicted at the anchor, or from the start token."""
  assert Readout(2, [8, 9, 91]).inputs == [8, 9]
  assert Readout(2, [8, 9, 91], start=96).inputs == [96, 8, 9]
  assert Readout(2).inputs == []


@pytest.mark.parametrize('schedule,tau', [
    ('uniform', [1, 1, 1]), ('linear', [1 / 6, 2 / 6, 3 / 6]),
    ('relative', [1 / 3, 2 / 3, 1])])
def test_anneal(schedule, tau):
  """λ_t falls from 1 in a line and is 0 from τ_t on (T = 3, T_max = 6)."""
  for t in (1, 2, 3):
    values = [rim.anneal(schedule, t, 3, 6, s / 60) for s in range(60)]
    assert values[0] == 1
    assert all(a >= b for a, b in zip(values, values[1:], strict=False))
    assert values == pytest.approx([max(0, 1 - s / 60 / tau[t - 1]) for s in range(60)])
    assert all((v > 0) == (s / 60 < tau[t - 1] - 1e-9) for s, v in enumerate(values))


@pytest.mark.parametrize('schedule', ['linear', 'relative'])
def test_anneal_earliest_first(schedule):
  """At every moment an earlier step weighs less, until both weigh nothing."""
  for progress in (0.05, 0.2, 0.5, 0.9):
    values = [rim.anneal(schedule, t, 4, 5, progress) for t in (1, 2, 3, 4)]
    assert all(a < b or a == b == 0 for a, b in zip(values, values[1:], strict=False))


@pytest.mark.parametrize('schedule', ['uniform', 'linear', 'relative'])
@pytest.mark.parametrize('name', ['rim', 'direct_steps'])
def test_final_readout_keeps_its_weight(config, name, schedule):
  """The answer weighs 1 all along; the others are weighed by λ_t."""
  config = with_rim(config, schedule=schedule, max_steps=5)
  for progress in (0.0, 0.1, 0.15, 0.99):
    *others, last = train(name, config, progress=progress).readouts
    assert last.weight == 1 and list(last.out) == [8, 9, 91]
    expected = [rim.anneal(schedule, t, 3, 5, progress) for t in (1, 2)]
    assert [out.weight for out in others] == [w for w in expected if w]


def test_weightless_readouts_vanish(config):
  """Step supervision that has ended costs nothing; its blocks stay."""
  config = with_rim(config, schedule='relative')
  check(train('rim', config, progress=0.5), [1, 2] + BLOCK * 3,
        [Readout(8, [7, 91], 0.25), Readout(11, [8, 9, 91])])
  check(train('rim', config, progress=0.9), [1, 2] + BLOCK * 3, [Readout(11, [8, 9, 91])])


@pytest.mark.parametrize('attention', ['causal', 'bidirectional'])
@pytest.mark.parametrize('name', methods.METHODS)
def test_prompt_is_the_prefix_of_training(config, name, attention):
  """What is decoded hangs where stage 2 trained it, and sees the same."""
  config = with_rim(config, block_attention=attention)
  row = train(name, config, stage=2)
  prompt = methods.get(name).prompt(QUESTION, config.rim.blocks, config, IDS)
  check(prompt, list(row.prefix), [dataclasses.replace(out, out=[], weight=1.0)
                                   for out in row.readouts], list(row.visible_until))
  assert list(prompt.readouts[-1].out) == []


def test_prompt_with_another_number_of_blocks(config):
  """The number of blocks is free at inference."""
  for blocks in (1, 5):
    row = rim.prompt(QUESTION, blocks, config, IDS)
    assert list(row.prefix) == QUESTION + BLOCK * blocks
    assert [out.visible_until for out in row.readouts] == [2 + 3 * k for k in range(1,
                                                                                    blocks + 1)]


def test_encode_by_piece(tiny_config, tmp_path):
  """Question with its newline, steps and answer are tokenized apart."""
  t = tokenizers.build(tiny_config().tokenizer, lambda: ['1+2=3'], tmp_path / 't.json', 3)
  encoded, other = sequences.encode(
      [Example('1+2', ('1+2=3', '3'), '3'), Example('4', (), '4')], t)
  assert t.decode(encoded.question) == '1+2\n'
  assert [t.decode(s) for s in encoded.steps] == ['1+2=3', '3']
  assert t.decode(encoded.answer) == '3'
  assert (t.decode(other.question), list(other.steps)) == ('4\n', [])


def test_symbols(tiny_config, tmp_path):
  """All ids that methods add are special, distinct and below the vocabulary's size."""
  t = tokenizers.build(tiny_config().tokenizer, lambda: ['1'], tmp_path / 't.json', 3)
  s = sequences.special_tokens(t)
  special = [s.pad, s.end, s.block_open, s.memory, s.block_close, s.pause, *s.steps]
  assert len(s.steps) == 3 and len(set(special)) == len(special)
  assert all(t.size <= i < t.vocab_size for i in special)
  assert t.decode(s.newline) == '\n' and t.decode(s.answer) == '\n####'


def test_unknown_method():
  """The error names the nearest method, and all."""
  with pytest.raises(InputError, match="unknown; did you mean 'direct_steps'"):
    methods.get('direct_step')
  with pytest.raises(InputError, match='known: coconut, .*, pause_steps, pccot, rim'):
    methods.get('xyz')


def peers(config, **changes):
  return dataclasses.replace(
      config, baselines=dataclasses.replace(config.baselines, **changes))


TRACES = {0: [3, 4, 10, 5, 6, 10, 7, 10, 35, 8, 9, 91], 1: [5, 6, 10, 7, 10, 35, 8, 9, 91],
          2: [7, 10, 35, 8, 9, 91], 3: [10, 35, 8, 9, 91]}  # with the first n steps gone
BARE = {**TRACES, 3: [8, 9, 91]}  # without baselines.keep_mark


def test_icot_removes_tokens(config):
  """In part i of stage 1 the first i·d tokens are gone, all beyond a number, the mark never."""
  trace, rest = TRACES[0][:7], TRACES[3]
  for size, beyond, parts in ((2, 0, 4), (3, 0, 4), (2, 3, 3), (2, 4, 4), (1, 2, 4),
                              (8, 39, 4)):
    own = peers(config, parts=4, smoothing=0.0, remove_tokens=size, remove_all_beyond=beyond)
    count = methods.get('icot').parts(own)
    assert count == parts
    for part in range(count):
      gone = part * size
      left = [] if beyond and gone > beyond else trace[gone:]
      for progress in (part / count, (part + 0.9) / count):
        check(train('icot', own, progress=progress), [1, 2], [Readout(2, left + rest)])
    assert not beyond or (count - 1) * size > beyond or count == 4
    check(train('icot', own, stage=2), [1, 2], [Readout(2, rest)])
  check(train('icot', own, 0, stage=2), [1, 2], [Readout(2, rest)])


def test_parts_by_progress():
  """Part p begins at p / parts, whatever rounding does to it."""
  for parts in range(1, 60):
    assert [icot.passed(p / parts, parts) for p in range(parts)] == [*range(parts)]
    assert icot.passed(1 - 1e-6, parts) == parts - 1


def test_removal_smoothing(config):
  """o more tokens are gone, P(o >= n) = exp(-λ n), before the first removal, too."""
  config = peers(config, parts=4, smoothing=0.5, remove_tokens=2, remove_all_beyond=0)
  def gone(draw, progress, config=config):
    row = methods.get('icot').sequence(dataclasses.replace(example(), draw=draw), 1, progress,
                                       config, IDS)
    return len(TRACES[0]) - len(row.readouts[0].out)
  assert [gone(draw, 0.0) for draw in (0.0, 0.39, 0.40, 0.63, 0.64)] == [0, 0, 1, 1, 2]
  assert [gone(draw, 0.25) for draw in (0.0, 0.39, 0.40, 0.63, 0.64)] == [2, 2, 3, 3, 4]
  draws = (np.arange(4000) + 0.5) / 4000
  found = np.array([gone(draw, 0.0) for draw in draws])
  for n in range(1, 5):
    assert (found >= n).mean() == pytest.approx(math.exp(-0.5 * n), abs=1e-3)


def test_icot_by_steps(config):
  """Ours: in part i the first i steps are gone, smoothed by steps from part 1 on."""
  own = peers(config, parts=4, smoothing=0.0, removal='steps', keep_mark=False)
  for part in range(4):
    for progress in (part / 4, part / 4 + 0.2):
      check(train('icot', own, progress=progress), [1, 2], [Readout(2, BARE[part])])
  for steps in (0, 3):
    check(train('icot', own, steps, stage=2), [1, 2], [Readout(2, [8, 9, 91])])
  own = peers(own, smoothing=0.5)
  def gone(draw, progress):
    row = methods.get('icot').sequence(dataclasses.replace(example(), draw=draw), 1, progress,
                                       own, IDS)
    return next(n for n, out in BARE.items() if list(row.readouts[0].out) == out)
  assert [gone(draw, 0.25) for draw in (0.0, 0.39, 0.40, 0.63, 0.64)] == [1, 1, 2, 2, 3]
  assert gone(0.99, 0.0) == 0


@pytest.mark.parametrize('keep_mark', [True, False])
def test_coconut(config, keep_mark):
  """n·c latents stand between brackets for n steps, also where there are fewer steps."""
  config = peers(config, parts=4, latents=2, keep_mark=keep_mark)
  outs = TRACES if keep_mark else BARE
  for part in range(4):
    check(train('coconut', config, progress=part / 4), [1, 2, 92],
          [Readout(3, outs[part], start=94, latents=2 * part)])
  check(train('coconut', config, 1, progress=0.5), [1, 2, 92],
        [Readout(3, outs[3], start=94, latents=4)])
  check(train('coconut', config, stage=2), [1, 2, 92],
        [Readout(3, outs[3], start=94, latents=6)])
  check(methods.METHODS['coconut'].prompt([1, 2], 9, config, IDS), [1, 2, 92],
        [Readout(3, [], start=94, latents=6)])


def test_coconut_is_asked_as_a_part_trains(config):
  """The prompt of a part has its latents, and no other's."""
  config, method = peers(config, parts=4, latents=2), methods.METHODS['coconut']
  for part in range(4):
    row = train('coconut', config, progress=part / 4)
    prompt = method.prompt(QUESTION, 3, method.asks(config, part), IDS)
    check(prompt, list(row.prefix), [dataclasses.replace(row.readouts[0], out=[])])


def test_codi(config):
  """The student has latents; its teacher is the chain of thought but for its last step."""
  for keep_mark, mark in ((True, [10, 35]), (False, [])):
    own = peers(config, latents=2, keep_mark=keep_mark)
    for stage in (1, 2):
      check(train('codi', own, stage=stage), [1, 2, 92],
            [Readout(3, [*mark, 8, 9, 91], start=94, latents=2, mark=len(mark))])
    check(methods.METHODS['codi'].teacher(example(), 0.0, own, IDS), [1, 2],
          [Readout(2, [3, 4, 10, 5, 6, 10, 35, 8, 9, 91])])
  assert Readout(3, [8, 9, 91], start=94, latents=2).inputs == [94, 94, 94, 8, 9]


def test_rim_externalized(config):
  """Stage 2 keeps the step readouts, behind the answers; off and in stage 1, nothing."""
  on = with_rim(config, externalize=True, externalize_weight=0.6)
  row, plain = train('rim', on, stage=2), train('rim', config, stage=2)
  check(row, list(plain.prefix), [
      *(dataclasses.replace(r, out=list(r.out)) for r in plain.readouts),
      Readout(5, [5, 6, 91], pytest.approx(0.2), start=96),
      Readout(8, [7, 91], pytest.approx(0.2), start=97),
      Readout(11, [8, 9, 91], pytest.approx(0.2), start=98)])
  assert row.readouts[3].inputs == [96, 5, 6]
  assert train('rim', on) == train('rim', config)


def test_externalized_with_fewer_steps_than_blocks(config):
  """There is one step readout a step, and one for a problem without steps."""
  on = with_rim(config, externalize=True)
  assert [r.start for r in train('rim', on, 2, stage=2).readouts[3:]] == [96, 97]
  assert [r.start for r in train('rim', on, 0, stage=2).readouts[3:]] == [96]
  few = with_rim(on, blocks=1)
  assert [r.start for r in train('rim', few, 3, stage=2).readouts[1:]] == [96]


def test_steps_prompt(config):
  """The prompt that asks for steps: the same blocks, an index token each."""
  row = rim.prompt(QUESTION, 2, config, IDS)
  asked = rim.steps_prompt(row, IDS)
  assert asked.prefix == row.prefix
  assert asked.readouts == [Readout(5, start=96), Readout(8, start=97)]
