"""The training loop: resuming bit for bit, signals, kills, NaN, the stage switch."""

import json
import math
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from latent_reasoning import experiment as run_lib
from latent_reasoning import main
from latent_reasoning.errors import TrainingError
from latent_reasoning.train import batches, metrics, trainer
from latent_reasoning.train import train_step as step_lib

CONFIG = pathlib.Path(__file__).resolve().parents[2] / 'configs/rim_arithmetic.py'
ONE_SHAPE = {
    'data.buckets.prefix': (20,), 'data.buckets.readout': (6,), 'data.buckets.count': (3,)}
SMALL = {**ONE_SHAPE, 'model.num_layers': 1, 'optim.grad_accum_steps': 2,
         'optim.stage1.dropout': 0.1,
         'optim.stage2.dropout': 0.1, 'train.log_every': 1, 'train.save_every': 3,
         'train.eval_every': 5, 'eval.valid_problems': 4}
SWITCH, TOTAL = 8, 14  # steps of stage 1, of both


@pytest.fixture(scope='module', autouse=True)
def cache(quick_compilation, tmp_path_factory):
  """Compiled programs are shared among the runs of this file."""
  path = tmp_path_factory.mktemp('cache')
  names = ('jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs')
  old = {name: getattr(jax.config, name) for name in names}
  jax.config.update(names[0], str(path))
  jax.config.update(names[1], 0.0)
  compilation_cache.reset_cache()
  yield path
  for name, value in old.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture(scope='module', autouse=True)
def traced_once(cache):
  """Runs of this process share their traced steps; processes of their own do not.

  Of the optimizer, its kind is part of the key: no test here changes more of it than
  the learning rate, which is an argument of the step.
  """
  make, made = step_lib.make_train_step, {}

  def shared(model, objective, tx, seed, accumulate, trained, placed=None):
    kind = str(jax.tree.structure(tx.init({'kernel': jax.numpy.zeros((2, 2))})))
    key = (model, objective, seed, accumulate, trained, kind)
    if key not in made:
      made[key] = make(model, objective, tx, seed, accumulate, trained, placed)
    return made[key]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(step_lib, 'make_train_step', shared)
    yield


@pytest.fixture(scope='module')
def whole(tiny_config, make_run, tmp_path_factory):
  """Trains without a break: the state and the train lines that others must equal."""
  run = make_run(tiny_config(**SMALL), tmp_path_factory.mktemp('whole'))
  return trainer.train(run), lines(run)


def lines(run, split='train'):
  """The lines of a split, without what the clock says."""
  return [{k: v for k, v in record.items() if not k.endswith('_per_second')}
          for record in metrics.read(run.workdir.metrics) if record['split'] == split]


def assert_same(a, b):
  """Two states are equal in every bit."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


class Break(Exception):
  """Stands for whatever kills a run."""


def breaking_at(monkeypatch, step, act):
  """Calls `act` just before the batch of a global step is handed out."""
  real = batches.Batches.iterate

  def iterate(self, start):
    for at, batch in enumerate(real(self, start), start):
      if at == step:
        act()
      yield batch

  monkeypatch.setattr(batches.Batches, 'iterate', iterate)


def die():
  raise Break


@pytest.mark.integration
@pytest.mark.parametrize('at, resumes', [
    (7, 6),  # in the middle of stage 1 and of its second epoch
    (11, 10)])  # inside stage 2
def test_broken_run_equals_whole(whole, tiny_config, make_run, tmp_path, monkeypatch,
                                 capsys, at, resumes):
  """A run that dies and starts again ends in the same bits and the same lines."""
  run = make_run(tiny_config(**SMALL), tmp_path)
  with monkeypatch.context() as patch, pytest.raises(Break):
    breaking_at(patch, at, die)
    trainer.train(run)
  state = trainer.train(run)
  assert f'resuming from step {resumes}' in capsys.readouterr().err
  assert_same(state, whole[0])
  assert lines(run) == whole[1]
  assert [r['step'] for r in lines(run)] == list(range(1, TOTAL + 1))


PEERS = {**SMALL, 'baselines.parts': 2, 'baselines.latents': 1, 'train.eval_every': 0,
         'data.buckets.prefix': (20,), 'data.buckets.readout': (24,)}


@pytest.mark.integration
@pytest.mark.parametrize('changes', [
    {'method': 'coconut'}, {'method': 'coconut', 'baselines.mix_parts': True},
    {'method': 'codi', 'reasoning_decoder.source': 'latents', 'reasoning_decoder.joint': True},
    {'method': 'rim', 'imm.write_policy': 'gated'},
    pytest.param({'method': 'icot'}, marks=pytest.mark.slow),
    pytest.param({'method': 'codi', 'baselines.projection': True}, marks=pytest.mark.slow)],
    ids=lambda c: ' '.join(map(str, c.values())))
def test_peers_resume_in_the_middle_of_a_part(tiny_config, make_run, tmp_path, monkeypatch,
                                              changes):
  """Methods whose stage 1 has parts, that think, or RiM with the implicit memory: a broken run
  ends in the same bits."""
  config = tiny_config(**{**PEERS, **changes})
  run = make_run(config, tmp_path / 'whole')
  state = trainer.train(run)
  broken = make_run(config, tmp_path / 'broken')
  with monkeypatch.context() as patch, pytest.raises(Break):
    breaking_at(patch, 7, die)
    trainer.train(broken)
  assert_same(trainer.train(broken), state)
  assert lines(broken) == lines(run)


@pytest.mark.integration
@pytest.mark.parametrize('at, number', [
    (2, signal.SIGTERM), (SWITCH, signal.SIGINT), (11, signal.SIGTERM)])
def test_signalled_run_equals_whole(whole, tiny_config, make_run, tmp_path, monkeypatch, at,
                                    number):
  """A signal saves after the step at hand, also exactly at the switch of stages."""
  run = make_run(tiny_config(**SMALL), tmp_path)
  before = signal.getsignal(number)
  with monkeypatch.context() as patch, pytest.raises(trainer.Interrupted) as stop:
    breaking_at(patch, at - 1, lambda: os.kill(os.getpid(), number))
    trainer.train(run)
  assert (stop.value.signal, stop.value.step) == (number, at)
  assert signal.getsignal(number) is before
  checkpoints = run.checkpoints(writer=True)
  assert checkpoints.steps()[0] == at
  checkpoints.close()
  state = trainer.train(run)
  assert_same(state, whole[0])
  assert lines(run) == whole[1]


@pytest.mark.integration
def test_second_signal_stops_without_saving(tiny_config, make_run, tmp_path, monkeypatch):
  """Who presses Ctrl-C twice does not wait for a save."""
  run = make_run(tiny_config(**SMALL), tmp_path)

  def twice():
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    breaking_at(patch, 1, twice)
    trainer.train(run)
  assert not list(run.workdir.checkpoints.glob('[0-9]*'))


@pytest.mark.integration
def test_signal_in_last_step_ends_the_run(whole, tiny_config, make_run, tmp_path,
                                          monkeypatch):
  """After the last step there is nothing to resume: a signal there is a normal end."""
  run = make_run(tiny_config(**SMALL), tmp_path)
  with monkeypatch.context() as patch:
    breaking_at(patch, TOTAL - 1, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert_same(trainer.train(run), whole[0])


@pytest.mark.integration
def test_finished_run_is_left_alone(tiny_config, make_run, tmp_path):
  """Training a finished run again returns its state and writes nothing."""
  run = make_run(tiny_config(**SMALL, **{'optim.stage2.steps': 0,
                                         'optim.stage1.steps': 2}), tmp_path)
  state = trainer.train(run)
  before = run.workdir.metrics.read_text()
  assert_same(trainer.train(run), state)
  assert run.workdir.metrics.read_text() == before


@pytest.mark.integration
def test_optimizer_is_reset_at_the_switch_only_if_asked(whole, tiny_config, make_run,
                                                        tmp_path):
  """Adam's count shows it: steps of stage 2 alone, or of both stages."""
  run = make_run(tiny_config(**SMALL, **{'optim.stage2.reset_optimizer': False}), tmp_path)
  kept, reset = trainer.train(run), whole[0]
  assert int(reset.opt_state[1].count) == TOTAL - SWITCH
  assert int(kept.opt_state[1].count) == TOTAL
  one, two = jax.tree.leaves(reset.params), jax.tree.leaves(kept.params)
  assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(one, two, strict=True))


@pytest.mark.integration
def test_validation_and_the_best(tiny_config, make_run, tmp_path, monkeypatch):
  """Validation runs when due and at the end; checkpoints of the last stage compete."""
  finals = iter([0.9, 0.5, 0.25])
  monkeypatch.setattr(run_lib, 'evaluate', lambda *args: (
      {'accuracy': {'final': next(finals), 'any': 1.0, 'per_block': [0, 0, 0]}}, []))
  run = make_run(tiny_config(**SMALL), tmp_path)
  trainer.train(run)
  found = lines(run, 'valid')
  assert [r['step'] for r in found] == [5, 10, 14]
  assert [r['stage'] for r in found] == [1, 2, 2]
  for record in found:
    assert record['n'] == 4 and len(record['per_block']) == 3
  assert [r['final'] for r in found] == [0.9, 0.5, 0.25]
  checkpoints = run.checkpoints(writer=True)
  assert checkpoints.best() == 10  # 5 belongs to stage 1, where steps are read, not answers
  checkpoints.close()


def poison(monkeypatch, step):
  """Makes the loss of one global step NaN, by its weights."""
  real = batches.Batches.iterate

  def iterate(self, start):
    for at, batch in enumerate(real(self, start), start):
      yield batch.replace(weights=batch.weights * np.nan) if at == step else batch

  monkeypatch.setattr(batches.Batches, 'iterate', iterate)


@pytest.mark.integration
@pytest.mark.parametrize('bad, good', [(6, 6), (11, 10), (TOTAL - 1, 12)])
def test_nan_stops_and_the_run_can_go_on(whole, tiny_config, make_run, tmp_path,
                                         monkeypatch, bad, good):
  """NaN raises, names the last good checkpoint, saves nothing more, and costs nothing else.

  Also where the bad step is itself due for a save: metrics are read one step
  late, but never later than a save.
  """
  run = make_run(tiny_config(**SMALL), tmp_path)
  with monkeypatch.context() as patch, pytest.raises(TrainingError) as error:
    poison(patch, bad)
    trainer.train(run)
  text = str(error.value)
  assert text.startswith(f'step {bad + 1}: loss nan') and 'learning rate' in text
  assert f"last good checkpoint is {run.workdir.checkpoints / str(good)}." in text
  checkpoints = run.checkpoints(writer=True)
  assert checkpoints.steps()[0] == good
  checkpoints.close()
  last = metrics.read(run.workdir.metrics)[-1]
  assert (last['step'], last['loss']) == (bad + 1, 'nan')
  assert_same(trainer.train(run), whole[0])
  assert lines(run) == whole[1]


@pytest.mark.integration
def test_nothing_is_saved_after_a_bad_loss(tiny_config, make_run, tmp_path, monkeypatch):
  """With a save at every step the bad one and those after it are not saved."""
  run = make_run(tiny_config(**{**SMALL, 'train.save_every': 1, 'train.max_to_keep': 9}),
                 tmp_path)
  with pytest.raises(TrainingError):
    poison(monkeypatch, 3)
    trainer.train(run)
  assert sorted(int(p.name) for p in run.workdir.checkpoints.iterdir()) == [1, 2, 3]


BAD, FINE = math.nan, 1.0


@pytest.mark.parametrize('loss, norm, good', [
    (FINE, FINE, True), (BAD, FINE, False), (FINE, BAD, False), (math.inf, FINE, False),
    (-math.inf, FINE, False), (FINE, math.inf, False), (12.0, FINE, False),
    (11.0, 1e9, True)])
def test_which_steps_are_bad(tiny_config, make_run, tmp_path, loss, norm, good):
  """Loss or gradient not finite, or a mean loss above the limit; sums count by weight."""
  run = make_run(tiny_config(**{'train.max_loss': 11.5}), tmp_path)
  log, checkpoints = metrics.Metrics(run.workdir, 0), run.checkpoints(writer=True)
  work = trainer._Loop(run, checkpoints, log, metrics.Progress(14, 0, 2))
  sums = {'loss': 4 * loss, 'weight': 4.0, 'correct': 2.0, 'grad_norm': norm}
  work.pending = trainer._Pending(2, 1, sums, 1e-3)
  if good:
    work.read()
  else:
    with pytest.raises(TrainingError, match='no checkpoint yet'):
      work.read()
  log.close()
  checkpoints.close()
  record, = metrics.read(run.workdir.metrics)
  assert record['loss'] == (loss if math.isfinite(loss) else str(loss))
  assert not good or record['token_accuracy'] == 0.5


def test_limit_follows_the_vocabulary(tiny_config, make_run, tmp_path):
  """Without config.train.max_loss, three times the loss of a uniform guess is too much."""
  run = make_run(tiny_config(), tmp_path)
  work = trainer._Loop(run, None, None, None)
  assert work.limit == pytest.approx(3 * math.log(run.tokenizer.vocab_size))


@pytest.mark.integration
def test_exploding_loss_stops(tiny_config, make_run, tmp_path):
  """A loss above config.train.max_loss stops the run and the message names the key."""
  run = make_run(tiny_config(**SMALL, **{'train.max_loss': 0.5}), tmp_path)
  with pytest.raises(TrainingError, match=r'at most 0\.5 .*config\.train\.max_loss'):
    trainer.train(run)


def command(path, *more):
  flags = {**SMALL, 'train.compilation_cache': '', 'optim.stage1.steps': 40,
           'optim.stage2.steps': 30, 'train.save_every': 5, 'train.eval_every': 0,
           'train.log_every': 5, 'data.arithmetic.min_steps': 2,
           'data.arithmetic.max_steps': 3, 'data.arithmetic.train_size': 40,
           'data.arithmetic.valid_size': 8, 'data.arithmetic.test_size': 8,
           'tokenizer.pad_to': 1, 'model.embed_dim': 16, 'model.num_heads': 2,
           'model.mlp_dim': 32, 'model.max_positions': 48, 'rim.blocks': 3,
           'rim.block_tokens': 1, 'rim.max_steps': 3, 'optim.batch_size': 8,
           'eval.batch_size': 8, 'eval.max_new_tokens': 6}
  return ['main', f'--config={CONFIG}', f'--workdir={path}',
          *(f'--config.{k}={v}' for k, v in flags.items()), *more]


def start(path, cache):
  """Starts the command as a process of its own."""
  env = {**os.environ, 'LATENT_REASONING_KEEP_ALLOCATOR': '1',
         'JAX_COMPILATION_CACHE_DIR': str(cache), 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
         'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  return subprocess.Popen(
      [sys.executable, '-m', 'latent_reasoning.main', *command(path)[1:]], env=env,
      cwd=CONFIG.parents[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process, condition):
  """Waits until training has come somewhere."""
  deadline = time.monotonic() + 90
  while not condition():
    assert process.poll() is None, process.stderr.read()
    assert time.monotonic() < deadline, 'the process takes too long'
    time.sleep(0.01)


def finished(checkpoints):
  return checkpoints.is_dir() and [p for p in checkpoints.iterdir() if p.name.isdigit()]


def logged(path):
  file = path / 'metrics.jsonl'
  return file.exists() and len(file.read_text().splitlines())


@pytest.fixture(scope='module')
def undisturbed(cache, tmp_path_factory):
  """The last train line and the results of the command in one go."""
  path = tmp_path_factory.mktemp('undisturbed')
  assert main.main(command(path)) == 0
  return outcome(path)


def outcome(path):
  """The train lines without what is of one process, its clock and steps, and the test
  accuracy."""
  train = [r for r in metrics.read(path / 'metrics.jsonl') if r['split'] == 'train']
  for record in train:
    for name in ('steps_per_second', 'tokens_per_second', 'padding'):
      record.pop(name)
  return train, json.loads((path / 'results.json').read_text())['accuracy']


@pytest.mark.integration
def test_killed_process_equals_undisturbed(undisturbed, cache, tmp_path):
  """kill -9 at a random moment; the same command ends as if nothing had happened."""
  delay = random.SystemRandom().uniform(0, 0.4)
  process = start(tmp_path, cache)
  wait_for(process, lambda: finished(tmp_path / 'checkpoints'))
  time.sleep(delay)
  process.kill()
  process.communicate()
  assert process.returncode == -signal.SIGKILL, 'it ended before it could be killed'
  again = start(tmp_path, cache)
  _, err = again.communicate(timeout=120)
  assert again.returncode == 0, err
  assert 'resuming from step' in err
  assert outcome(tmp_path) == undisturbed, f'killed {delay} s after the first checkpoint'


@pytest.mark.integration
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_signalled_process_saves_and_resumes(undisturbed, cache, tmp_path, number):
  """Exit status 128 + n, a word on how to resume, and the same end."""
  process = start(tmp_path, cache)
  wait_for(process, lambda: logged(tmp_path))
  process.send_signal(number)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 128 + number, err
  assert 'Traceback' not in err
  assert f'stopped by {number.name} at step' in err
  assert 'The same command resumes' in err and str(tmp_path) in err
  assert main.main(command(tmp_path)) == 0
  assert outcome(tmp_path) == undisturbed


@pytest.mark.integration
def test_status_1_for_a_loss_that_exploded(tmp_path, capsys):
  """The command ends with one `error:` line and status 1."""
  assert main.main(command(tmp_path, '--config.train.max_loss=0.01')) == 1
  err = capsys.readouterr().err
  assert err.count('error: ') == 1 and 'no checkpoint yet' in err
  assert not list((tmp_path / 'checkpoints').glob('[0-9]*'))


@pytest.mark.integration
def test_assert_same_can_fail(whole):
  """The oracle of this file sees one bit."""
  state = whole[0]
  leaves, tree = jax.tree.flatten(state.params)
  leaves[0] = np.nextafter(np.asarray(leaves[0]), np.float32(9))
  with pytest.raises(AssertionError):
    assert_same(state, state.replace(params=jax.tree.unflatten(tree, leaves)))
