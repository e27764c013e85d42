"""Training until validation improves no more: where it ends, also when resumed."""

import dataclasses

import pytest

from latent_reasoning import experiment as run_lib
from latent_reasoning.cli import evaluation
from latent_reasoning.errors import InputError
from latent_reasoning.train import curriculum, metrics, trainer

SMALL = {'method': 'direct', 'model.num_layers': 1, 'data.buckets.prefix': (20,),
         'data.buckets.readout': (6,), 'data.buckets.count': (1,), 'optim.stage1.steps': 3,
         'optim.stage2.steps': 12, 'optim.patience': 2, 'train.log_every': 1,
         'train.save_every': 0, 'train.eval_every': 2, 'eval.valid_problems': 4}
PARTS = {'method': 'coconut', 'baselines.parts': 2, 'data.buckets.readout': (28,),
         'optim.stage1.steps': 14, 'optim.stage2.steps': 0, 'baselines.part_patience': 1}


@pytest.fixture
def scores(monkeypatch, quick_compilation):
  """Validation says what the test wants, in turn; then 0."""
  said = []

  def validate(self, params, part=None):
    count = sum(r['split'] == 'valid' for r in metrics.read(self.workdir.metrics))
    accuracy = said[count] if count < len(said) else 0.0
    return {'final': accuracy}, accuracy, 'said'
  monkeypatch.setattr(run_lib.Experiment, 'validate', validate)
  return said


def lines(run):
  return [{k: v for k, v in r.items() if not k.endswith('_per_second')}
          for r in metrics.read(run.workdir.metrics)]


CASES = [
    # validations after 2 (stage 1), 4, 6 … steps: the best is the third
    ({}, [0.9, 0.1, 0.3], 10), ({'optim.patience': 0}, [0.9], 15),
    ({}, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], 15),
    # nothing is better than all right, in the last stage and in a part
    ({}, [1.0, 0.1, 1.0], 6), ({'optim.patience': 0}, [1.0, 1.0], 15),
    ({**PARTS, 'baselines.part_patience': 3}, [1.0, 0.1, 0.3], 10),
    # a part of one validation without a better one, then the last part: from 4 on
    (PARTS, [0.9, 0.8, 0.1, 0.2], 12)]


@pytest.mark.integration
@pytest.mark.parametrize('changes, said, end', CASES)
def test_it_ends_where_validation_improves_no_more(tiny_config, make_run, tmp_path, scores,
                                                   changes, said, end):
  """By the last stage, or the last part, alone; whoever opens the run later knows."""
  scores[:] = said
  run = make_run(tiny_config(**{**SMALL, **changes}), tmp_path)
  state = trainer.train(run)
  assert int(state.step) == run.curriculum.total == end
  assert [r['step'] for r in lines(run)][-1] == end
  later = run_lib.build(run.config, run.workdir)
  best = later.restore()
  assert best.step < end or end == 15 or max(said) == 1
  assert later.curriculum == run.curriculum and sum(later.curriculum.taken) == end
  cost = evaluation.training(later, best.step)
  assert sum(s['steps'] for s in cost['stages']) == end and cost['epochs'] == end / 5
  if changes is PARTS:
    assert cost['parts'] == (4, 8)
  again = trainer.train(run_lib.build(run.config, run.workdir))
  assert int(again.step) == end  # nothing is trained beyond


@pytest.mark.integration
@pytest.mark.parametrize('changes, said, end', [CASES[0], CASES[-1]])
def test_resumed_run_equals_whole(tiny_config, make_run, tmp_path, resumed, scores,
                                  changes, said, end):
  """Killed before each of its last validations, and before the step of the last: the same end
  and the same bits."""
  import jax
  import numpy as np
  scores[:] = said
  config = tiny_config(**{**SMALL, **changes})
  whole = make_run(config, tmp_path / 'whole')
  state = trainer.train(whole)
  for at in (5, end - 3, end - 1):
    run, again = resumed(config, tmp_path / str(at), at)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
      np.testing.assert_array_equal(a, b)
    assert lines(run) == lines(whole)
    assert run.curriculum == whole.curriculum


@pytest.mark.parametrize('changes, message', [
    ({'train.eval_every': 0}, 'eval_every is 0'), ({'train.extend': (3,)}, 'train.extend'),
    ({'sweep.budget': 'patience', 'optim.patience': 0}, "budget is 'patience'")])
def test_mistakes(tiny_config, changes, message):
  with pytest.raises(InputError, match=message):
    tiny_config(**{**SMALL, **changes})


@pytest.mark.parametrize('lengths, parts, starts', [
    ((6, 4), 1, None), ((0, 7), 1, None), ((9, 0), 3, None), ((9, 0), 3, (2, 5)),
    ((8, 3), 3, (4,))])
def test_taken_and_final(tiny_config, lengths, parts, starts):
  """Steps of stages and parts add up wherever the end is; rates are those of the whole."""
  stages = tuple(dataclasses.replace(s, learning_rate=i + 1.0) for i, s in enumerate(
      (tiny_config().optim.stage1, tiny_config().optim.stage2)))
  whole = curriculum.Curriculum(stages, lengths, parts, starts)
  assert whole.taken == lengths
  first = next(s for s in range(whole.total) if whole.final(s))
  assert all(whole.final(s) == (s >= first) for s in range(whole.total))
  assert first == (lengths[0] if lengths[1] else (starts or (0, 6))[1] if parts > 1 else 0)
  for end in range(first + 1, whole.total):
    cut = dataclasses.replace(whole, ended=end)
    assert cut.total == sum(cut.taken) == end
    assert sum(cut.part_steps) == cut.taken[0]
    for step in range(end):
      assert cut.learning_rate(step) == whole.learning_rate(step)
      assert cut.at(step) == whole.at(step) and cut.final(step) == whole.final(step)
    with pytest.raises(IndexError):
      for step in range(sum(lengths) + 1):
        cut.at(step)
