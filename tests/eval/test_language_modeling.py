"""Language modelling: batches, whole-split loss, continuations, and what is refused."""

import json
import types

import jax
import numpy as np
import pytest
from close import assert_close

from latent_reasoning import report
from latent_reasoning.cli import commands
from latent_reasoning.errors import InputError
from latent_reasoning.eval import language_modeling
from latent_reasoning.methods import language_model
from latent_reasoning.train import metrics, trainer

pytestmark = pytest.mark.usefixtures('quick_compilation')

LM = {'method': 'language_model', 'data.name': 'text', 'data.seq_len': 8,
      'imm.write_policy': 'gated',
      'model.num_layers': 1, 'model.max_positions': 16, 'optim.stage1.steps': 4,
      'optim.stage2.steps': 0, 'train.eval_every': 2, 'train.save_every': 0,
      'eval.batch_size': 3, 'eval.max_new_tokens': 12, 'eval.top_k': 5}
WORDS = 'to be or not to be, that is the question. ' * 6


@pytest.fixture(scope='module')
def file(tmp_path_factory):
  path = tmp_path_factory.mktemp('text') / 'words.txt'
  path.write_text(WORDS)
  return str(path)


@pytest.fixture(scope='module')
def make(tiny_config, make_run, file, tmp_path_factory):
  def build(**changes):
    config = tiny_config(**{**LM, 'data.path': file, **changes})
    return make_run(config, tmp_path_factory.mktemp('language_model'))
  return build


@pytest.fixture(scope='module')
def trained(make):
  run = make()
  trainer.train(run)
  return run


def test_batches(make):
  """Crops of the training text, each token predicting its next; a function of the step."""
  run = make()
  batch = run.batches.at(3)
  assert batch.tokens.shape == (8, 8) and batch.anchors.shape == (8, 0)
  for row, target in zip(batch.tokens, batch.targets, strict=True):
    said = run.tokenizer.decode([*row, target[-1]])
    assert said in WORDS and list(row[1:]) == list(target[:-1])
  np.testing.assert_array_equal(batch.tokens, make().batches.at(3).tokens)
  assert not np.array_equal(batch.tokens, run.batches.at(2).tokens)


@pytest.mark.integration
@pytest.mark.parametrize('length', [2, 9, 10, 25, 31])
def test_loss_of_a_whole_split(make, length):
  """Every token but the first counts once, however blocks and batches fall."""
  run = make()
  params, ids = run.init().params, run.splits.train[:length]
  found = language_modeling.loss(run.model(), params, ids, 8, 3)
  total, count = 0.0, 0
  for start in range(0, length - 1, 8):
    part = language_modeling.rows(ids[None, start:start + 9])
    _, sums = language_model.next_token(run.model(), params, part)
    total, count = total + float(sums['loss']), count + float(sums['weight'])
  assert found['tokens'] == count == length - 1
  assert_close(found['loss'], total / count)


@pytest.mark.integration
def test_results(trained, capsys):
  """results.json has the losses of whole splits, says causal, and a sample is printed."""
  assert commands.evaluate(trained) == 0
  found = json.loads(trained.workdir.results.read_text())
  assert found['causal'] is True and found['memory'] == 'gated'
  assert found['tokens'] == len(trained.splits.valid) - 1
  assert found['memory_zeroed']['loss'] != found['loss']
  valid = [r for r in metrics.read(trained.workdir.metrics) if r['split'] == 'valid']
  assert valid[-1]['loss'] == found['loss'] and 'causal' not in valid[-1]
  assert 'whole splits' in capsys.readouterr().out


@pytest.mark.integration
def test_generate(trained, capsys):
  """A continuation keeps its prompt, is longer than the positions, and follows the seed."""
  assert commands.generate(trained, 'to be') == 0
  said = capsys.readouterr().out
  assert said.startswith('to be')
  run, params = trained, trained.restore().state.params
  long, again = (language_modeling.generate(
      run.config, run.model(), params, run.tokenizer, 'to be', 40)
                 for _ in range(2))
  assert long == again and len(long) == 45
  with pytest.raises(InputError, match='prompt is empty'):
    language_modeling.generate(run.config, run.model(), params, run.tokenizer, '', 4)


@pytest.mark.integration
@pytest.mark.parametrize('changes, banks', [
    ({}, ['layer 1', 'layer 2', 'layer 3']),
    ({'imm.layers': (2, 0)}, ['layer 1', 'layer 3']),
    ({'imm.layers': (1,), 'imm.rounds': 2}, ['layer 2, round 1', 'layer 2, round 2'])])
def test_banks_are_called_by_their_layers(make, monkeypatch, changes, banks):
  run = make(**{'model.num_layers': 3, **changes})
  monkeypatch.setattr(commands, 'restored', lambda run: types.SimpleNamespace(state=run.init()))
  found = commands.slot_reads(run, 'to be')
  assert found['banks'] == banks and len(found['reads']) == len(banks)
  panels = found.plot().figure.axes
  assert [a.get_ylabel() for a in panels][:len(banks)] == [f'{bank}\nslot' for bank in banks]


@pytest.mark.integration
def test_attention(trained, make, capsys, monkeypatch):
  """A picture of slots, a panel a layer; clear words where there is nothing to draw."""
  pytest.importorskip('matplotlib')
  drawn = {}
  sound = report.slots

  def slots(tokens, maps, banks, causal):
    drawn.update(tokens=tokens, maps=maps)
    return sound(tokens, maps, banks, causal)
  monkeypatch.setattr(report, 'slots', slots)
  assert commands.plot_memory(trained, 'to be $x$') == 0
  assert 'slots.png' in capsys.readouterr().out
  assert (trained.workdir.path / 'slots.png').read_bytes().startswith(b'\x89PNG')
  assert drawn['tokens'] == list('to be $x$')
  layers = trained.config.model.num_layers
  assert drawn['maps'].shape[:2] == (layers, 9)
  assert_close(drawn['maps'].sum(-1), 1)
  with pytest.raises(InputError, match='no text to read'):
    commands.plot_memory(trained, None)
  with pytest.raises(InputError, match='a shorter text'):
    commands.plot_memory(trained, 'to be' * 40)
  with pytest.raises(InputError, match='no slots to attend to'):
    commands.plot_memory(make(**{'imm.write_policy': ''}), 'to be')


def test_halves(make):
  """What the leakage checks read: crops of the text, cut in two."""
  run = make()
  for half in language_modeling.halves(run.splits.train, 8, 5, 0):
    assert run.tokenizer.decode([*half.question, *half.answer]) in WORDS
    assert len(half.question) == 4 and len(half.answer) == 3
  with pytest.raises(InputError, match='at least 4'):
    language_modeling.halves(run.splits.train, 2, 5, 0)


@pytest.mark.integration
def test_reading_the_future(make, capsys):
  """It trains, is marked wherever its loss stands, fails the leakage checks, says nothing."""
  run = make(**{'imm.write_policy': 'sequence_mean'})
  trainer.train(run)
  warned = [line for line in capsys.readouterr().err.splitlines() if 'loss' in line]
  assert warned and all('NOT CAUSAL' in line for line in warned)
  assert all(r['causal'] is False for r in metrics.read(run.workdir.metrics))
  assert commands.evaluate(run) == 0
  out = capsys.readouterr().out
  assert 'NOT CAUSAL' in out and 'cannot generate' in out
  assert json.loads(run.workdir.results.read_text())['causal'] is False
  assert commands.check_leakage(run) == 1
  with pytest.raises(InputError, match='reads the future'):
    commands.generate(run, 'to be')


@pytest.mark.parametrize('changes, message', [
    ({'method': 'direct'}, "method is 'direct' with config.data.name"),
    ({'data.seq_len': 17}, 'above config.model.max_positions'),
    ({'data.path': ''}, 'config.data.path is empty'),
    ({'data.seq_len': 16, 'data.limit': 12}, 'the training text has')])
def test_mistakes(make, changes, message):
  with pytest.raises(InputError, match=message):
    make(**changes)


@pytest.mark.parametrize('method', ['rim', 'cot', 'direct'])
def test_methods_refuse_the_future(tiny_config, method):
  """Nothing that answers may be trained on a memory that sees its answers."""
  with pytest.raises(InputError, match='reads the future'):
    tiny_config(**{'method': method, 'imm.write_policy': 'sequence_mean'})


@pytest.mark.integration
def test_top_k(make):
  """With k = 1, sampling takes the likeliest token, whatever the temperature."""
  run = make(**{'eval.top_k': 1, 'eval.temperature': 5.0})
  params = jax.tree.map(lambda a: 4 * a, run.init().params)
  hot = language_modeling.generate(run.config, run.model(), params, run.tokenizer, 'to', 9)
  cold = make(**{'eval.temperature': 0.0})
  assert hot == language_modeling.generate(
      cold.config, run.model(), params, run.tokenizer, 'to', 9)
