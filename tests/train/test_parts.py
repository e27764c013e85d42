"""Parts of stage 1: asked as they are trained, until they have converged, also when resumed."""


import pytest

from latent_reasoning import experiment as run_lib
from latent_reasoning.train import batches, metrics, trainer

pytestmark = pytest.mark.usefixtures('quick_compilation')

SMALL = {'method': 'coconut', 'baselines.parts': 3, 'model.num_layers': 1,
         'data.buckets.prefix': (20,), 'data.buckets.readout': (28,),
         'data.buckets.count': (1,), 'optim.stage1.steps': 12, 'optim.stage2.steps': 3,
         'train.log_every': 1, 'train.save_every': 0, 'train.eval_every': 2,
         'eval.valid_problems': 4}


@pytest.fixture
def scores(monkeypatch):
  """Validation says what the test wants: scores[part] in turn; `asked` has what was asked."""
  said, asked = {}, []

  def validate(self, params, part=None):
    asked.append(part)
    step = sum(r['split'] == 'valid' for r in metrics.read(self.workdir.metrics))
    accuracy = said.get(step, 0.0)
    return {'final': accuracy}, accuracy, 'said'
  monkeypatch.setattr(run_lib.Experiment, 'validate', validate)
  return said, asked


def lines(run, *splits):
  return [{k: v for k, v in r.items() if not k.endswith('_per_second')}
          for r in metrics.read(run.workdir.metrics) if r['split'] in splits]


def begun(run) -> list[tuple[int, int]]:
  return [(r['part'], r['step']) for r in lines(run, 'part')]


@pytest.mark.integration
def test_a_part_goes_on_until_it_is_right(tiny_config, make_run, tmp_path, scores):
  """Parts begin behind the validation that ends the one before; the log has where; batches
  are those of the part; each validation asks as its part trains, stage 2 as at inference."""
  said, asked = scores
  said.update({1: 0.9, 4: 0.95})  # the second and the fifth validation, after 4 and 10 steps
  run = make_run(tiny_config(**SMALL, **{'baselines.part_accuracy': 0.9}), tmp_path)
  latents, real = {}, batches.Batches.at

  class Spy(batches.Batches):
    def at(self, step):
      batch = real(self, step)
      latents[step] = batch.latents
      return batch
  run.batches.__class__ = Spy
  trainer.train(run)
  assert begun(run) == [(1, 4), (2, 10)] and run.curriculum.starts == (4, 10)
  assert [latents[s] for s in range(15)] == [0] * 4 + [1] * 6 + [2] * 5
  assert asked == [0, 0, 1, 1, 1, 2, None, None]
  saved = run.restore().meta['parts']
  assert saved == {'starts': [4, 10], 'scores': []}


@pytest.mark.integration
def test_patience_and_equal_parts(tiny_config, make_run, tmp_path, scores):
  """Without a better validation for some time the next part comes; off, they are equal."""
  said, asked = scores
  run = make_run(tiny_config(**SMALL, **{'baselines.part_patience': 2}), tmp_path / 'a')
  trainer.train(run)
  assert begun(run) == [(1, 6), (2, 12)][:1]  # stage 2 begins at 12
  run = make_run(tiny_config(**SMALL), tmp_path / 'b')
  trainer.train(run)
  assert begun(run) == [(1, 4), (2, 8)] and run.curriculum.starts is None
  assert asked[-8:] == [0, 0, 1, 1, 2, 2, None, None]


@pytest.mark.integration
@pytest.mark.parametrize('changes', [{}, {'method': 'icot', 'baselines.remove_tokens': 3}])
def test_resumed_run_equals_whole(tiny_config, make_run, tmp_path, resumed, changes):
  """Killed before, at and behind the beginning of a part: the same parts and the same bits."""
  import jax
  import numpy as np
  config = tiny_config(**{**SMALL, 'baselines.part_patience': 1, **changes})
  whole = make_run(config, tmp_path / 'whole')
  state = trainer.train(whole)
  assert len(begun(whole)) == 2
  for at in (3, begun(whole)[0][1], begun(whole)[1][1] + 1):
    run, again = resumed(config, tmp_path / str(at), at)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
      np.testing.assert_array_equal(a, b)
    assert lines(run, 'train', 'valid', 'part') == lines(whole, 'train', 'valid', 'part')
    assert run.curriculum == whole.curriculum


@pytest.mark.integration
def test_a_part_that_is_learned_is_seen(tiny_config, make_run, tmp_path, monkeypatch):
  """Validation decodes with the part's latents and scores its answers."""
  seen = []
  real = run_lib.Predictor.generate

  def generate(self, rows, *args, **kwargs):
    seen.append({row.readouts[0].latents for row in rows})
    return real(self, rows, *args, **kwargs)
  monkeypatch.setattr(run_lib.Predictor, 'generate', generate)
  run = make_run(tiny_config(**SMALL, **{'baselines.latents': 2}), tmp_path)
  params = run.init().params
  for part in (0, 1, 2, None):
    values, _, words = run.validate(params, part)
    assert values.get('part') == part and ('as part' in words) == (part is not None)
  assert seen == [{0}, {2}, {4}, {4}]
