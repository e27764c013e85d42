"""Latency: entries that can be compared, and lengths that come from the data."""

import json

import numpy as np
import pytest

from latent_reasoning import methods, sequences
from latent_reasoning.eval import latency

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture(scope='module')
def run(tiny_config, make_run, tmp_path_factory):
  config = tiny_config(**{'model.max_positions': 64, 'model.num_layers': 1})
  return make_run(config, tmp_path_factory.mktemp('run'))


@pytest.fixture(scope='module')
def examples(run):
  return sequences.encode([run.splits.train[i] for i in range(9)], run.tokenizer)


@pytest.fixture(scope='module')
def measured(run, examples):
  return latency.measure(run.config, run.model(), run.init().params, run.tokenizer, examples)


def entry(measured, method, batch):
  found, = [e for e in measured['entries'] if (e['method'], e['batch']) == (method, batch)]
  return found


@pytest.mark.integration
def test_every_entry_is_there(measured):
  """Each method at each batch size, with positive times and FLOPs; all plain JSON."""
  pairs = {(e['method'], e['batch']) for e in measured['entries']}
  assert pairs == {(m, b) for m in ('direct', 'rim', 'cot') for b in (1, 32)}
  assert len(measured['entries']) == 6
  for e in measured['entries']:
    for name in ('first_ms', 'full_ms', 'first_flops', 'full_flops', 'first_vs_direct',
                 'full_vs_direct'):
      assert e[name] > 0, (e, name)
    assert e['full_flops'] >= e['first_flops'] and e['full_ms'] >= e['first_ms']
    assert e['runs'] >= 2 and e['full_spread_ms'] >= 0
  json.dumps(measured, allow_nan=False)
  assert measured['repeats'] == 2


def test_runs_until_the_medians_are_settled(monkeypatch):
  """Calm times end after the runs that were asked for, noisy ones go on, and not for ever."""
  def runs(noise):
    clock, drawn = [0.0], np.random.default_rng(0)
    monkeypatch.setattr(latency.time, 'perf_counter', lambda: clock[0])

    def program(*_):
      clock[0] += 1e-3 * (1 + noise * drawn.random())
    return {key: len(times) for key, times in latency._timed(
        {'one': (0, 0, 0, program), 'two': (0, 0, 0, program)}, None, 20, '').items()}
  assert runs(0.0) == {'one': 20, 'two': 20}
  assert 20 < runs(0.3)['one'] < 20 * latency.MOST
  assert runs(1.9)['one'] == 20 * latency.MOST


@pytest.mark.integration
@pytest.mark.parametrize('batch', [1, 32])
def test_prefix_of_rim(run, measured, batch):
  """RiM reads the question and K blocks of M + 2 tokens; the others the question."""
  k, m = run.config.rim.blocks, run.config.rim.block_tokens
  direct = entry(measured, 'direct', batch)['prefix_tokens']
  assert entry(measured, 'rim', batch)['prefix_tokens'] == direct + k * (m + 2)
  assert entry(measured, 'cot', batch)['prefix_tokens'] == direct


@pytest.mark.integration
@pytest.mark.parametrize('batch', [1, 32])
def test_tokens_generated(measured, batch):
  """A chain of thought comes before the answer; RiM and direct answer at once."""
  trace, answer = measured['trace_tokens'], measured['answer_tokens']
  assert entry(measured, 'cot', batch)['tokens'] == trace + answer
  for method in ('direct', 'rim'):
    assert entry(measured, method, batch)['tokens'] == answer
    # One token from the prefill: the first answer token needs no decoding step.
    assert entry(measured, method, batch)['first_flops'] < entry(
        measured, 'cot', batch)['first_flops']


@pytest.mark.integration
@pytest.mark.parametrize('batch', [1, 32])
def test_flops_of_decoding(measured, batch):
  """Decoding a chain of thought costs more than decoding RiM's answer."""
  def decoding(method):
    e = entry(measured, method, batch)
    return e['full_flops'] - e['first_flops']

  trace, answer = measured['trace_tokens'], measured['answer_tokens']
  assert decoding('rim') > 0
  full = {m: entry(measured, m, batch)['full_flops'] for m in ('rim', 'cot')}
  first = {m: entry(measured, m, batch)['first_flops'] for m in ('rim', 'cot')}
  # All that cot does after its prefill, by one step's cost, beside RiM's.
  step = decoding('cot') / (answer - 1)
  assert full['cot'] - first['cot'] + trace * step > decoding('rim')
  assert entry(measured, 'rim', batch)['first_flops'] > entry(
      measured, 'direct', batch)['first_flops']


@pytest.mark.integration
def test_ratios(measured):
  """`vs direct` is the ratio of the times, 1 for direct itself."""
  for batch in (1, 32):
    direct = entry(measured, 'direct', batch)
    assert direct['first_vs_direct'] == direct['full_vs_direct'] == 1
    rim = entry(measured, 'rim', batch)
    assert rim['first_vs_direct'] == pytest.approx(rim['first_ms'] / direct['first_ms'])
    assert rim['full_vs_direct'] == pytest.approx(rim['full_ms'] / direct['full_ms'])


@pytest.mark.integration
def test_flops_grow_with_the_batch(measured):
  """32 rows cost between 16 and 64 times one row."""
  for method in ('direct', 'rim', 'cot'):
    ratio = (entry(measured, method, 32)['full_flops']
             / entry(measured, method, 1)['full_flops'])
    assert 16 < ratio < 64, (method, ratio)


def test_lengths(run):
  """Median tokens of steps, newlines and mark, and of an answer with its end token."""
  special = sequences.special_tokens(run.tokenizer)
  assert len(special.newline) == 1 and len(special.answer) == 5  # '\\n####'
  examples = [sequences.TokenizedExample([1], [[1] * 5, [1] * 7], [1]),  # 5 + 1 + 7 + 5 = 18, 2
              sequences.TokenizedExample([1], [[1] * 3], [1, 1, 1]),  # 3 + 5 = 8, 4
              sequences.TokenizedExample([1], [], [1, 1])]  # 5, 3
  assert latency.lengths(examples, special) == (8, 3)


def test_lengths_are_those_of_the_training_row(run, examples):
  """Trace and answer together are the tokens that chain of thought is trained on."""
  special = sequences.special_tokens(run.tokenizer)
  for example in examples:
    row = methods.get('cot').sequence(example, 2, 0.0, run.config, special)
    assert sum(latency.lengths([example], special)) == len(row.readouts[0].out)


def test_prompt_has_the_headline_only(run, examples):
  """One readout, the last one, however many blocks there are; rows repeat to fill up."""
  special = sequences.special_tokens(run.tokenizer)
  batch = latency.prompt(run.config, 'rim', examples[:2], 5, special)
  assert batch.anchors.shape == (5, 1)
  question = len(examples[0].question)
  blocks = run.config.rim.blocks * (run.config.rim.block_tokens + 2)
  assert batch.anchors[0, 0] == question + blocks - 1
  assert (batch.tokens[0] == batch.tokens[2]).all()
