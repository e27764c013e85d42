"""Stage, progress and learning rate of every step."""

import dataclasses

import pytest

from latent_reasoning.config import OptimConfig
from latent_reasoning.errors import InputError
from latent_reasoning.train import curriculum


@pytest.fixture
def make(tiny_config):
  """Builds a Curriculum for a number of problems, from dotted keys of optim."""
  def build(examples=40, **changes):
    config = tiny_config(**{f'optim.{key}': value for key, value in changes.items()})
    return curriculum.build(config.optim, examples)
  return build


def test_stages(make):
  """Steps are counted through stage 1 and then stage 2; progress starts anew."""
  c = make(**{'stage1.steps': 4, 'stage2.steps': 3})
  assert c.lengths == (4, 3) and c.total == 7
  moments = [c.at(s) for s in range(7)]
  assert [m.stage for m in moments] == [1] * 4 + [2] * 3
  assert [m.step for m in moments] == [0, 1, 2, 3, 0, 1, 2]
  assert [m.progress for m in moments] == pytest.approx([0, .25, .5, .75, 0, 1/3, 2/3])
  assert c.stage(3) is c.stages[0] and c.stage(4) is c.stages[1]


def test_past_the_end(make):
  """There is no moment after the last."""
  c = make(**{'stage1.steps': 4, 'stage2.steps': 3})
  with pytest.raises(IndexError, match='step 7 is past the last one, 6'):
    c.at(7)


def test_begins(make):
  """A stage begins once, and the first one does not count."""
  c = make(**{'stage1.steps': 4, 'stage2.steps': 3})
  assert [s for s in range(c.total) if c.begins(s)] == [4]


def test_parts(make):
  """Parts of stage 1 begin like stages, at equal distances; stage 2 has none."""
  c = dataclasses.replace(make(**{'stage1.steps': 9, 'stage2.steps': 3}), parts=4)
  begin = [s for s in range(c.total) if c.begins(s)]
  assert begin == [3, 5, 7, 9]
  assert [int(c.at(s).progress * 4) for s in (2, 3, 4, 5, 8)] == [0, 1, 1, 2, 3]


def test_parts_that_converge(make):
  """Parts begin where they are said to; stage 2 where it always does."""
  c = dataclasses.replace(make(**{'stage1.steps': 9, 'stage2.steps': 3}), parts=4, starts=())
  assert [s for s in range(c.total) if c.begins(s)] == [9]
  assert {c.at(s).progress for s in range(9)} == {0}
  c = c.with_part(2).with_part(3)
  assert c.starts == (2, 3) and [s for s in range(c.total) if c.begins(s)] == [2, 3, 9]
  assert [c.at(s).part for s in range(12)] == [0, 0, 1, *[2] * 6, 0, 0, 0]
  assert [c.at(s).progress for s in (1, 2, 8, 10)] == [0, 0.25, 0.5, pytest.approx(1 / 3)]
  assert [c.learning_rate(s) for s in range(12)] == [
      dataclasses.replace(c, starts=None).learning_rate(s) for s in range(12)]


@pytest.mark.parametrize('scores, accuracy, patience, done', [
    ([0.2], 0.9, 0, False), ([0.2, 0.9], 0.9, 0, True), ([0.2, 0.1], 0.0, 0, False),
    ([0.2], 0.0, 1, False), ([0.2, 0.2], 0.0, 1, True), ([0.2, 0.3, 0.25], 0.9, 2, False),
    ([0.2, 0.3, 0.25, 0.3], 0.9, 2, True), ([0.2, 0.3, 0.25, 0.31], 0.9, 2, False)])
def test_converged(tiny_config, scores, accuracy, patience, done):
  """Right enough, or not better than the best for as many validations."""
  b = tiny_config(**{'baselines.part_accuracy': accuracy,
                     'baselines.part_patience': patience}).baselines
  assert curriculum.converged(scores, b) == done


def test_resets(make, tiny_config):
  """The optimizer begins anew with a stage, a part and, for Coconut, an epoch of a stage."""
  keys = {'stage1.steps': 12, 'stage2.steps': 9, 'batch_size': 8}
  c = dataclasses.replace(make(**keys), parts=3)
  assert [s for s in range(c.total) if c.resets(s)] == [4, 8, 12]
  c = dataclasses.replace(c, epoch=5)
  assert [s for s in range(c.total) if c.resets(s)] == [4, 5, 8, 10, 12, 17]
  kept = make(**keys, **{'stage1.reset_optimizer': False, 'stage2.reset_optimizer': False})
  assert not any(dataclasses.replace(kept, parts=3, epoch=5).resets(s) for s in range(21))
  optim = tiny_config(**{f'optim.{k}': v for k, v in keys.items()}).optim
  assert curriculum.build(optim, 43, 2, reset_epochs=True).epoch == 5
  assert curriculum.build(optim, 43, 2).epoch == 0


@pytest.mark.parametrize('one,two', [(0, 3), (4, 0)])
def test_a_stage_without_steps(make, one, two):
  """A stage of no steps is skipped, and nothing begins."""
  c = make(**{'stage1.steps': one, 'stage2.steps': two, 'stage1.epochs': 0.0,
              'stage2.epochs': 0.0})
  stage = 1 if one else 2
  assert {c.at(s).stage for s in range(c.total)} == {stage}
  assert c.at(c.total - 1).step == c.total - 1
  assert not any(c.begins(s) for s in range(c.total))


@pytest.mark.parametrize('epochs,steps', [(1.0, 5), (2.0, 10), (0.5, 3), (0.01, 1)])
def test_epochs(make, epochs, steps):
  """An epoch is as many steps as whole batches fit; a part of a step is a step."""
  c = make(43, **{'batch_size': 8, 'stage1.steps': 0, 'stage1.epochs': epochs})
  assert c.lengths[0] == steps


def test_steps_rule_over_epochs(make):
  """Epochs count only where steps is 0."""
  assert make(**{'stage1.steps': 3, 'stage1.epochs': 9.0}).lengths[0] == 3


def test_warmup_then_constant(make):
  """The rate rises in a line from lr / n to lr, and stays."""
  c = make(**{'stage1.steps': 10, 'stage1.warmup': 0.4, 'stage1.learning_rate': 0.8,
              'stage1.schedule': 'constant'})
  rates = [c.learning_rate(s) for s in range(10)]
  assert rates == pytest.approx([0.2, 0.4, 0.6] + [0.8] * 7)


def test_no_warmup(make):
  """Without warm-up the first step has the whole rate."""
  c = make(**{'stage1.warmup': 0.0, 'stage1.learning_rate': 0.5})
  assert c.learning_rate(0) == 0.5


def test_cosine(make):
  """After the warm-up: a half cosine from lr, by lr / 2 half way, to nearly 0."""
  c = make(**{'stage2.steps': 110, 'stage2.warmup': 10 / 110, 'stage2.learning_rate': 1.0,
              'stage2.schedule': 'cosine'})
  start = c.lengths[0]
  rates = [c.learning_rate(start + s) for s in range(110)]
  assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
  assert rates[10] == 1 and rates[60] == pytest.approx(0.5)
  assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
  assert 0 < rates[-1] < 1e-3


def test_warmup_alone(make):
  """A stage may be all warm-up, of either schedule."""
  for schedule in ('constant', 'cosine'):
    c = make(**{'stage1.steps': 4, 'stage1.warmup': 1.0, 'stage1.learning_rate': 1.0,
                'stage1.schedule': schedule})
    assert [c.learning_rate(s) for s in range(4)] == pytest.approx([.25, .5, .75, 1])


def test_each_stage_has_its_own_schedule(make):
  """Stage 2 warms up again, to a rate of its own."""
  c = make(**{'stage1.steps': 4, 'stage2.steps': 4, 'stage1.warmup': 0.5,
              'stage2.warmup': 0.5, 'stage1.learning_rate': 1.0,
              'stage2.learning_rate': 0.1, 'stage1.schedule': 'constant',
              'stage2.schedule': 'constant'})
  assert [c.learning_rate(s) for s in range(8)] == pytest.approx(
      [0.5, 1, 1, 1, 0.05, 0.1, 0.1, 0.1])


def test_too_few_problems(make):
  """Fewer problems than a batch is an error that says both numbers."""
  with pytest.raises(InputError, match='has 7 problems, fewer than .*batch_size 8'):
    make(7, batch_size=8)


def test_no_steps(make):
  """A curriculum without a step is an error."""
  with pytest.raises(InputError, match='no training step'):
    make(**{'stage1.steps': 0, 'stage2.steps': 0, 'stage1.epochs': 0.0,
            'stage2.epochs': 0.0})


def test_frozen(make):
  """A curriculum is a value."""
  with pytest.raises(dataclasses.FrozenInstanceError):
    make().lengths = (1, 1)


def test_passes_are_limited(tiny_config):
  """A few problems of one's own are not trained on a thousand times."""
  config = tiny_config(**{'optim.batch_size': 4, 'optim.stage1.steps': 300,
                          'optim.stage2.steps': 10, 'optim.max_epochs': 20.0})
  assert curriculum.build(config.optim, 13).lengths == (60, 10)
  assert curriculum.build(config.optim, 10_000).lengths == (300, 10)


@pytest.mark.parametrize('schedule', ['cosine', 'constant'])
def test_extended(make, schedule):
  """What was is as it was; the steps added are of the last stage, at its last progress; a
  cosine begins again over each entry, a constant rate stays; nothing begins."""
  keys = {'stage1.steps': 4, 'stage2.steps': 10, 'stage2.schedule': schedule,
          'stage2.warmup': 0.2, 'stage2.learning_rate': 0.5}
  c = make(**keys)
  more = curriculum.build(_optim(c), 40, extend=(6, 5))
  assert (more.total, more.lengths) == (25, (4, 21))
  assert [more.learning_rate(s) for s in range(14)] == [c.learning_rate(s) for s in range(14)]
  assert [more.at(s) for s in range(14)] == [c.at(s) for s in range(14)]
  assert {more.at(s).stage for s in range(14, 25)} == {2}
  assert [more.at(s).step for s in range(14, 25)] == list(range(10, 21))
  assert {more.at(s).progress for s in range(14, 25)} == {c.at(13).progress}
  assert [s for s in range(25) if more.begins(s)] == [4]
  rates = [more.learning_rate(s) for s in range(14, 25)]
  if schedule == 'constant':
    assert rates == pytest.approx([0.5] * 11)
  else:
    alone = [make(**{**keys, 'stage2.steps': n}) for n in (6, 5)]
    assert rates == [one.learning_rate(4 + s) for one in alone
                     for s in range(one.total - 4)]
  assert ('stays 0.5' if schedule == 'constant' else 'once more') in more.extension
  assert '6 + 5' in more.extension


def _optim(c):
  return OptimConfig(batch_size=8, stage1=c.stages[0], stage2=c.stages[1])


def test_one_stage_extended(make):
  """Parts of a stage 1 that is the last one do not begin again behind its end."""
  c = make(**{'stage1.steps': 9, 'stage2.steps': 0, 'stage2.epochs': 0.0})
  more = curriculum.build(_optim(c), 40, 4, (7,))
  assert more.lengths == (16, 0) and more.total == 16
  assert [s for s in range(16) if more.begins(s)] == [3, 5, 7]
  assert {more.at(s).stage for s in range(16)} == {1}
