"""The reasoning decoder of a run: resumes, leaves the model alone, is scored and timed."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from latent_reasoning import methods, sequences
from latent_reasoning.analysis import verbalizer
from latent_reasoning.analysis.verbalizer import Verbalizer
from latent_reasoning.cli import commands
from latent_reasoning.errors import InputError
from latent_reasoning.eval import decoding
from latent_reasoning.train import trainer

pytestmark = pytest.mark.usefixtures('quick_compilation')

SMALL = {'model.num_layers': 1, 'optim.stage1.steps': 2, 'optim.stage2.steps': 0,
         'data.buckets.prefix': (20,), 'data.buckets.readout': (6,), 'data.buckets.count': (3,),
         'eval.valid_problems': 4, 'eval.test_problems': 6,
         'reasoning_decoder.source': 'blocks',
         'reasoning_decoder.steps': 4}


@pytest.fixture(scope='module')
def trained(tiny_config, make_run, tmp_path_factory):
  """A run that was trained for two steps, with a reasoning decoder still to come."""
  run = make_run(tiny_config(**SMALL), tmp_path_factory.mktemp('trained'))
  return run, trainer.train(run).params


def leaves_equal(one, other):
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.integration
def test_frozen_resumes(trained, tmp_path):
  """Stopped half-way and started again, it ends in the same parameters."""
  run, params = trained
  whole = dataclasses.replace(verbalizer.frozen(run, params),
                              workdir=dataclasses.replace(run.workdir, path=tmp_path / 'a'))
  (tmp_path / 'a').mkdir()
  (tmp_path / 'b').mkdir()
  done = trainer.train(whole)
  parted = dataclasses.replace(whole, workdir=dataclasses.replace(
      run.workdir, path=tmp_path / 'b'))
  seen = []

  class Stop(Exception):
    pass

  class Cut:  # batches that end with a crash after the checkpoint of step... 4 is the last
    def __getattr__(self, name):
      return getattr(whole.batches, name)

    def iterate(self, step):
      for number, batch in enumerate(whole.batches.iterate(step), step):
        if number == 3 and not seen:
          seen.append(number)
          raise Stop
        yield batch
  every = dataclasses.replace(run.config, train=dataclasses.replace(run.config.train,
                                                                    save_every=2))
  parted = dataclasses.replace(parted, config=every, batches=Cut())
  with pytest.raises(Stop):
    trainer.train(parted)
  again = trainer.train(parted)
  assert int(again.step) == 4
  leaves_equal(again.params, done.params)


@pytest.mark.integration
def test_explain(trained, capsys):
  """By command: trains once, scores against a foreign memory, times, and answers."""
  run, params = trained
  before = jax.tree.map(np.asarray, params)
  assert commands.verbalize(run, None) == 0
  found = json.loads(run.workdir.verbalized.read_text())
  assert found['n'] == sum(part['n'] for part in found['by_text'].values()) > 6
  assert 0 <= found['accuracy'] <= 1 and found['foreign']['n'] == found['n']
  assert [c['batch'] for c in found['cost']] == [1, 32]
  assert all(c['on_ms'] > 0 and c['off_ms'] > 0 for c in found['cost'])
  assert "another problem's memory" in capsys.readouterr().out
  assert commands.verbalize(run, '1+2-3') == 0
  out = capsys.readouterr().out.splitlines()
  assert sum(line.startswith('blocks ') for line in out) == 3  # one a block
  leaves_equal(run.restore().state.params, before)
  run.workdir.reasoning_decoder.base.write_text('{"step": 1}')
  with pytest.raises(InputError, match='verbalizes another checkpoint'):
    commands.verbalize(run, None)


@pytest.mark.integration
def test_off_costs_nothing(trained):
  """Answering compiles to the same program with a decoder trained jointly and without."""
  run, params = trained
  row = run.predictor(params).row('1+2-3')
  from latent_reasoning.eval.evaluator import prompt_batch
  batch = prompt_batch([row], run.config)
  def text(params):
    return decoding.generate.lower(
        run.model(), params, decoding.head_kernel(run.model(), params), batch,
        jax.random.key(0), 1.0, end=1, pad=0, max_tokens=3).compile().as_text()
  own = verbalizer.frozen(run, params).init().params
  def program(text):  # without the metadata of its arguments' names
    return [line.split(', metadata')[0] for line in text.splitlines() if '= ' in line]
  assert program(text(params)) == program(text({**params, 'explicit': own}))


@pytest.mark.slow
def test_joint(tiny_config, make_run, tmp_path, capsys):
  """Trained with the model, it is kept in its checkpoint and used by --mode=verbalize."""
  run = make_run(tiny_config(**{**SMALL, 'reasoning_decoder.source': 'memory',
                                'reasoning_decoder.joint': True,
                                'imm.write_policy': 'gated', 'train.log_every': 1}), tmp_path)
  trainer.train(run)
  last = json.loads(run.workdir.metrics.read_text().splitlines()[-2])
  assert last['decoder_loss'] > 0 and 0 <= last['decoder_token_accuracy'] <= 1
  assert commands.verbalize(run, None) == 0
  assert json.loads(run.workdir.verbalized.read_text())['joint']
  assert not run.workdir.reasoning_decoder.path.exists()
  assert commands.evaluate(run) == 0


@pytest.mark.integration
def test_score(trained, monkeypatch):
  """Exact text counts, nothing else; a foreign memory is another problem's."""
  run, params = trained
  own = Verbalizer(run, params, verbalizer.frozen(run, params).init().params)
  examples = [run.splits.test[i] for i in range(5)]  # more than a batch
  texts = {}
  for example in examples:
    source = own.source(own.batch([example]))
    for vectors, step in zip(np.asarray(source), example.steps, strict=False):
      texts[vectors.round(3).tobytes()] = step

  def say(source, max_tokens):
    return [texts.get(np.asarray(s).round(3).tobytes(), 'nothing') for s in source]

  monkeypatch.setattr(own, 'say', say)
  found = verbalizer.score(own, examples)
  assert found['n'] == sum(len(e.steps) for e in examples)
  other = verbalizer.score(own, examples, foreign=True)
  assert other['accuracy'] < found['accuracy'] and found['accuracy'] > 0.9
  assert found['samples'][0]['meant'] == examples[0].steps[0]


@pytest.mark.integration
def test_needs_a_source(trained):
  run, _ = trained
  none = dataclasses.replace(run.config, reasoning_decoder=dataclasses.replace(
      run.config.reasoning_decoder, source=''))
  with pytest.raises(InputError, match="expected 'blocks' for RiM"):
    commands.verbalize(dataclasses.replace(run, config=none), None)


@pytest.mark.integration
def test_layout_of_pause_and_cot(trained):
  """Whatever the prompt, its last token is what the trace is read out of."""
  run, _ = trained
  example = sequences.TokenizedExample([8, 9], [[12]], [9])
  ids = sequences.special_tokens(run.tokenizer)
  pause = methods.get('pause')
  row = pause.sequence(example, 1, 0.0, run.config, ids)
  target, = pause.decoder_targets(example, row, run.config, ids)
  assert target.at == [len(row.prefix) - 1] and target.text == [12, ids.end]
