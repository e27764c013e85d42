"""Programs that are compiled: counted, said, no reason to give up on, and released."""

import threading
import time

import jax
import jax.monitoring
import pytest
from parallel.test_multihost import SHORT

import latent_reasoning as lr
from latent_reasoning.parallel import multihost, programs
from latent_reasoning.train import flops, metrics, trainer


def slowly(seconds: float):
  """A function that takes some seconds to be traced, for the first time."""
  def function(x):
    time.sleep(seconds)
    return x + 1
  return jax.jit(function)


@pytest.fixture
def given_up(monkeypatch):
  """Set where a watch ends its process; this one is one of two, whose store is not there."""
  found = threading.Event()
  monkeypatch.setattr(multihost, '_place', [0, 2])
  monkeypatch.setattr(multihost, 'exit_lost', lambda reason: found.set())
  return found


def test_compiling_is_no_hang(given_up):
  """A compilation of several times the patience; what is no compilation, is waited for
  patience long."""
  watch = multihost.Watch(0.8)
  watch.beat()
  slowly(3.0)(1)
  watch.stop()
  assert not given_up.is_set()
  watch.beat()
  assert given_up.wait(60)
  watch.stop()


def test_compiling_elsewhere_is_no_hang(given_up, monkeypatch):
  """Signs of life that change; those of a process that is gone do not."""
  signs, ended = iter(range(10**9)), threading.Event()
  monkeypatch.setattr(multihost, '_compiling_elsewhere', lambda: [
      ('1', str(next(signs)) if not ended.is_set() else 'last')])
  watch = multihost.Watch(0.8)
  watch.beat()
  assert not given_up.wait(3.0)
  ended.set()
  assert given_up.wait(60)
  watch.stop()


def test_counts_and_says(monkeypatch, capsys):
  """Each program once, and by its name those that take long."""
  programs.listen()
  programs.listen()
  monkeypatch.setattr(programs, 'NOTICE', 0.0)
  before = programs.count()
  double = jax.jit(lambda x: 2 * x)
  with programs.called('the step'):
    double(1.5)
    double(2.5)
    double(jax.numpy.ones(3))
  err = capsys.readouterr().err
  assert err.count('compiled the step in 0 s') == programs.count() - before >= 2
  assert not programs.compiling()
  with pytest.raises(ZeroDivisionError):
    jax.jit(lambda x: x / (1 // 0))(1)
  assert not programs.compiling()


@pytest.mark.parametrize('held, gone', [(40_000, True), (30_000, False)])
def test_few_maps(held, gone, monkeypatch):
  """Half of what a process may have is too much, whoever holds them."""
  programs.listen()
  monkeypatch.setattr(programs, 'maps', lambda: held)
  monkeypatch.setattr(programs, 'most_maps', lambda: 65_530)
  released = []
  monkeypatch.setattr(programs, 'release', lambda: released.append(1))
  programs._compilations.looked = programs.count()
  programs.keep_few()
  assert not released  # nothing new
  programs._compilations.looked -= programs.EVERY
  programs.keep_few()
  assert bool(released) == gone


def test_maps():
  assert 0 < programs.maps() < programs.most_maps()


@pytest.mark.parametrize('changes', [
    {}, {'method': 'cot'}, {'method': 'icot'}, {'method': 'coconut'},
    {'method': 'coconut', 'baselines.mix_parts': True},
    {'method': 'coconut', 'baselines.mix_parts': True, 'baselines.latents': 3,
     'optim.batch_size': 2, 'data.buckets.readout': ()},
    {'method': 'codi', 'baselines.latents': 2}, {'optim.batch_size': 1},
    {'reasoning_decoder.source': 'blocks', 'reasoning_decoder.joint': True},
    {'method': 'coconut', 'reasoning_decoder.source': 'latents',
     'reasoning_decoder.joint': True}])
def test_number_of_programs(changes, tiny_config, make_run, tmp_path):
  """As many as there are shapes of batches at most, and of one shape one."""
  run = make_run(tiny_config(**{'optim.stage1.steps': 30, 'optim.stage2.steps': 30, **changes}),
                 tmp_path)
  for stage in (1, 2):
    steps = range(30 * (stage - 1), 30 * stage)
    met = {flops.shapes(run.batches.at(step)) for step in steps}
    assert len(met) <= run.batches.shapes(stage) <= 30


@pytest.mark.integration
def test_what_is_said_is_what_is_compiled(tiny_config, make_run, tmp_path, monkeypatch, capsys,
                                          quick_compilation):
  """Training steps of two stages: no more than said, each named when it comes."""
  monkeypatch.setattr(programs, 'NOTICE', 0.0)
  trainer.train(make_run(tiny_config(**SHORT), tmp_path))
  err = capsys.readouterr().err
  assert 'at most about 2 training steps (1 in stage 1, 1 in stage 2)' in err
  for step in (1, 2):
    assert err.count(f'compiled training step {step} of about 2 (stage {step}, ') == 1
  assert 'training step 3' not in err


@pytest.mark.integration
def test_dropped_experiments_hold_no_programs(tiny_config, tmp_path, quick_compilation):
  """Ten models of unlike sizes, trained, scored and asked in one process: after the first
  few, each leaves as many memory maps as the one before."""
  left, held = [], []
  for i in range(10):
    config = tiny_config(**{**SHORT, 'optim.stage1.steps': 2, 'optim.stage2.steps': 2,
                            'model.embed_dim': 16 + 4 * i})
    experiment = lr.Experiment(config, tmp_path / str(i))
    experiment.train()
    experiment.evaluate()
    experiment.answer('1+2')
    held.append(programs.maps())
    if i % 2:
      experiment.close()
      left.append(programs.maps())  # with an experiment that nobody dropped
    del experiment
    left.append(programs.maps())
  one = held[0] - left[0]  # of a model
  assert one > 100, (held, left)
  assert max(left) - left[1] < one and max(held) - held[1] < one, (held, left)


@pytest.mark.integration
def test_training_goes_on_without_its_programs(tiny_config, make_run, tmp_path, monkeypatch,
                                               quick_compilation):
  """Where the maps run out, programs are forgotten and compiled again; the losses stay."""
  released, release = [], programs.release
  monkeypatch.setattr(programs, 'EVERY', 1)
  monkeypatch.setattr(programs, 'release', lambda: released.append(1) or release())
  losses = []
  for held in (0, programs.most_maps()):
    monkeypatch.setattr(programs, 'maps', lambda held=held: held)
    path = tmp_path / str(held)
    trainer.train(make_run(tiny_config(**{
        **SHORT, 'optim.stage1.steps': 4, 'optim.stage2.steps': 4,
        'train.eval_every': 3}), path))
    losses.append([r['loss'] for r in metrics.read(path / 'metrics.jsonl') if 'loss' in r])
    assert bool(released) == bool(held)
  assert losses[0] == losses[1] and len(losses[0]) == 8
