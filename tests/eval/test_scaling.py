"""Test-time scaling: what can be varied, which numbers are asked, what is read early."""

import dataclasses

import pytest

from latent_reasoning.cli import evaluation
from latent_reasoning.errors import InputError
from latent_reasoning.eval import scaling
from latent_reasoning.eval.evaluator import evaluate
from latent_reasoning.train import trainer
from latent_reasoning.train.workdir import read_object

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.mark.parametrize('changes, axes', [
    ({}, {'blocks': 3}), ({'rim.passes': 2}, {'passes': 2, 'blocks': 3}),
    ({'model.loop.count': 3}, {'loops': 3, 'blocks': 3}),
    ({'method': 'direct', 'model.loop.count': 2}, {'loops': 2}),
    ({'method': 'coconut', 'baselines.latents': 2}, {'latents': 2}),
    ({'method': 'pccot', 'baselines.latents': 4, 'baselines.rounds': 2},
     {'passes': 3, 'latents': 4})])
def test_axes(tiny_config, changes, axes):
  assert scaling.axes(tiny_config(**changes)) == axes


@pytest.mark.parametrize('method', ['direct', 'cot', 'pause'])
def test_nothing_to_vary(tiny_config, method):
  with pytest.raises(InputError, match=f'method {method} has no blocks.*such as rim'):
    scaling.axes(tiny_config(**{'method': method}))


@pytest.mark.parametrize('trained', [1, 2, 7, 8, 9, 100])
def test_numbers(trained):
  """From one to twice as many, the trained one among them, few enough to be asked."""
  found = scaling.numbers(trained)
  assert found[0] == 1 and found[-1] == 2 * trained and trained in found
  assert found == sorted(set(found)) and len(found) <= scaling.MOST + 1


def record(said, answer, steps=2):
  return {'predictions': said, 'correct': [s == answer for s in said], 'steps': steps}


def test_read_until_two_agree():
  found = scaling.until_agree([
      record(['1+2=3', '3', '3', '4'], '3'),  # read to the third, right
      record(['3', '3', '4', '4'], '4', steps=3),  # too early
      record(['1', '2', '3', '4'], '4', steps=3)])  # to the last
  assert found == {'of': 4, 'readouts': 3.0, 'final': pytest.approx(2 / 3), 'by_steps': {
      '2': {'readouts': 3.0, 'final': 1.0}, '3': {'readouts': 3.0, 'final': 0.5}}}


@pytest.fixture(scope='module')
def looped(tiny_config, make_run, tmp_path_factory):
  """Three passes over one block, with longer problems beside the test split."""
  config = tiny_config(**{
      'rim.blocks': 1, 'rim.passes': 3, 'rim.hold_answer': True, 'optim.stage1.steps': 1,
      'optim.stage2.steps': 0, 'eval.test_problems': 5, 'model.num_layers': 1,
      'eval.sets': ('min_steps=4,max_steps=4,test_size=3',)})
  run = make_run(config, tmp_path_factory.mktemp('looped'))
  trainer.train(run)
  return run


@pytest.mark.integration
def test_what_is_measured_is_what_eval_measures(looped):
  """Each number of passes as eval.passes has it, though the largest alone is asked."""
  found = evaluation.scaled(looped)
  assert read_object(looped.workdir.scaling) == found.to_dict()
  curve = found['axes']['passes']['curve']
  assert [p['count'] for p in curve] == [1, 2, 3, 4, 5, 6]
  assert curve[0]['n'] == 8 and set(curve[0]['by_steps']) >= {'4'}
  params = evaluation.restored(looped).state.params
  longest = None
  for point in reversed(curve):
    config = looped.config.replace(**{'eval.passes': point['count']})
    records = []
    for examples in (looped.test, *(examples for examples, _ in looped.sets.values())):
      records += evaluate(looped.predictor(params, config), examples, 'd', 's', 'numeric')[1]
    assert point['final'] == sum(r['correct'][-1] for r in records) / 8
    longest = longest or records
    assert [r['predictions'] for r in records] == [
        r['predictions'][:point['count']] for r in longest]
  assert found['axes']['passes']['until_agree'] == scaling.until_agree(longest)
  assert 'passes when asked' in str(found) and '3 (trained)' in str(found)
  assert found.plot().figure.axes[0].get_ylabel() == 'exact match %'


@pytest.mark.integration
@pytest.mark.parametrize('passes', [1, 3])
def test_a_number_without_positions_is_left_out(looped, passes):
  """Of blocks, as many as the model has positions for behind the longest question; read once,
  the largest number is asked alone, and says what each asked by itself does."""
  params = evaluation.restored(looped).state.params
  room = looped.config.eval.max_new_tokens + 2 * looped.config.rim.block_length
  longest = max(len(looped.tokenizer.question(e.question)) for e in looped.test)
  asked = []

  def predictor(config):
    asked.append(config.eval.blocks)
    model = dataclasses.replace(config.model, max_positions=longest + room)
    return looped.predictor(params, dataclasses.replace(config, model=model))
  config = looped.config.replace(**{'rim.blocks': 2, 'rim.passes': passes})
  found = scaling.measure(config, predictor, {'test': (looped.test, 'numeric')})['blocks']
  assert [p['count'] for p in found['curve']] == [1, 2]
  assert [n for n in asked if n] == ([4, 3, 2] if passes == 1 else [1, 2, 3])
  for point in found['curve']:
    alone = predictor(config.replace(**{'eval.blocks': point['count']}))
    records = evaluate(alone, looped.test, 'd', 's', 'numeric')[1]
    assert point['final'] == sum(r['correct'][-1] for r in records) / len(records)
