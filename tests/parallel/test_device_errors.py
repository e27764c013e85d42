"""What an error of JAX means, by the texts that users quote, and by real ones of the CPU."""

import dataclasses
import json
import pathlib
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parallel.test_multihost import CONFIG, SHORT

import latent_reasoning as lr
from latent_reasoning import config as config_lib
from latent_reasoning import main
from latent_reasoning.cli import evaluation
from latent_reasoning.config import Config
from latent_reasoning.errors import DeviceError, TrainingError
from latent_reasoning.eval import evaluator
from latent_reasoning.parallel import device_errors, multihost
from latent_reasoning.train import trainer

TEXTS: dict[str, list[str]] = {}
for line in (pathlib.Path(__file__).parent / 'jax_errors.txt').read_text().splitlines():
  if not line.startswith('#'):
    TEXTS.setdefault(line.partition('\t')[0], []).append(
        line.partition('\t')[2].replace('\\n', '\n'))
HUGE = (50, 10**12)  # float32: 200 TB, more than an address space


@pytest.mark.parametrize('kind, text', [(k, t) for k, texts in TEXTS.items() for t in texts])
def test_kinds(kind, text):
  """By the text, whatever class it has and whatever stands around it."""
  assert device_errors.kind(text) == kind
  assert device_errors.kind(RuntimeError(text)) == kind
  if text and not text.startswith(('ABORTED', 'DEADLINE')):
    assert device_errors.kind(f'jax.errors.JaxRuntimeError: {text}\n\nfurther lines') == kind


@pytest.mark.parametrize('text', [t for k, texts in TEXTS.items() if k for t in texts])
def test_one_line(text):
  """With what was found and what to do."""
  said = device_errors.explain(text, Config(), True)
  assert '\n' not in said and len(said) < 900
  assert device_errors.kind(text) == 'peer' or re.search(
      r'--config\.|update the|wait until|JAX_PLATFORMS|--mode=plan|another version', said)


@pytest.mark.parametrize('text, words', [
    (TEXTS['memory'][0], ['187.5 GiB were asked for']),
    (TEXTS['memory'][2], ['2.25 GiB were asked for']),
    (TEXTS['memory'][3], ['21.95 GiB were asked for', 'the device has 15.48 GiB']),
    (TEXTS['memory'][4], ['15.65 GiB were asked for', 'the device has 11.08 GiB free']),
    (TEXTS['memory'][5], ['6.48 GiB were asked for', 'the device has 6.78 GiB free']),
    (TEXTS['held'][0], ['held by process 2718466', 'kill 2718466']),
    (TEXTS['held'][3], ['by another process', 'lsof -w']),
    (TEXTS['held'][6], ['by another process', 'update the NVIDIA driver']),
    (TEXTS['kernel'][0], ['but got 96', "'cudnn'", '--config.model.attention=shared_prefix']),
    (TEXTS['driver'][0], ['update the NVIDIA driver', 'insufficient'])])
def test_what_is_said(text, words):
  config = Config().replace(**{'model.attention': 'cudnn'})
  said = device_errors.explain(text, config, True)
  assert all(word in said for word in words), said


def changed(config: Config, flags: list[str]) -> Config:
  pairs = [flag.removeprefix('--config.').split('=') for flag in shlex.split(' '.join(flags))]
  old = config_lib.flatten(config)
  return config.replace(**{key: type(old[key])(value) for key, value in pairs})


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('changes', [
    {}, {'optim.batch_size': 7}, {'optim.batch_size': 1, 'eval.batch_size': 1},
    {'optim.batch_size': 12, 'optim.grad_accum_steps': 4, 'model.remat': 'dots'},
    {'model.loss_tile': 0, 'mesh.fsdp': 2}])
def test_flags_are_keys_that_are_not_so_yet(changes, training, monkeypatch):
  """Each proposal is a change, until nothing is left to lower."""
  monkeypatch.setattr(jax, 'device_count', lambda: 4)
  config = Config().replace(**changes)
  for _ in range(40):
    flags = device_errors.lower(config, training)
    if not flags:
      break
    new = changed(config, flags)
    differ = config_lib.difference(dataclasses.asdict(config), dataclasses.asdict(new))
    assert len(differ) >= len(flags)
    assert not new.optim.batch_size % new.optim.grad_accum_steps
    config = new
  assert not flags
  assert training or config.eval.batch_size == 1
  assert 'Nothing is left' in device_errors.explain(TEXTS['memory'][0], config, training)


def test_real_ones():
  """XLA's and NumPy's own errors; who has no memory, is not asked for another one's."""
  config = Config()
  for fail in (lambda: jnp.zeros(HUGE).block_until_ready(), lambda: np.ones(HUGE)):
    with pytest.raises(DeviceError, match=r'(181\.9|364\.0) TiB were asked for where there '
                       r'are [\d.]+ \w+ of memory of'), multihost.explained(config):
      fail()


@pytest.mark.parametrize('error', [
    TrainingError('loss 5 out of memory'), RuntimeError('a bug'),
    RuntimeError(TEXTS['peer'][0]), NotImplementedError('a method'),
    RecursionError('too deep')])
def test_others_stay_what_they_are(error):
  with pytest.raises(type(error)) as found, multihost.explained(Config()):
    raise error
  assert found.value is error


@pytest.mark.parametrize('kind, status', [
    ('peer', 75), ('memory', 1), ('kernel', 1), ('driver', 1), ('compilation', 1), ('', 1)])
def test_statuses_of_several_processes(kind, status, monkeypatch, capsys):
  """Only a lost peer is worth a restart, and that not where it said why it went."""
  ended = []

  def leave(status):
    ended.append(status)
    raise SystemExit
  monkeypatch.setattr(multihost, '_place', [1, 2])
  monkeypatch.setattr(multihost.os, '_exit', leave)
  monkeypatch.setattr(multihost, '_ending', multihost.threading.Event())
  for why in ('', 'process 0: out of memory'):
    monkeypatch.setattr(multihost, '_why_ended', lambda why=why: why)
    with pytest.raises(SystemExit), multihost.explained(Config()):
      raise jax.errors.JaxRuntimeError(TEXTS[kind][0])
    err = capsys.readouterr().err
    assert err.count('error: ') == 1
    assert ('goes on from the newest checkpoint' in err) == (kind == 'peer' and not why)
  assert ended == [status, 1]


def hungry(*_, **__):
  return jax.jit(lambda: jnp.zeros(HUGE))().block_until_ready()


@pytest.fixture(scope='module')
def finished(tiny_config, make_run, tmp_path_factory, quick_compilation):
  path = tmp_path_factory.mktemp('finished') / 'run'
  trainer.train(make_run(tiny_config(**ONE), path))
  return path


ONE = {**SHORT, 'optim.stage1.steps': 2, 'optim.stage2.steps': 2}
ARGV = ['main', f'--config={CONFIG}', *(f'--config.{k}={v}' for k, v in ONE.items())]


@pytest.mark.integration
@pytest.mark.parametrize('mode, patched, flag', [
    ('train', (trainer._Loop, 'read'), 'optim.grad_accum_steps=2'),
    ('eval', (evaluation, 'score'), 'eval.batch_size=2'),
    ('generate', (evaluator.Predictor, 'texts'), 'eval.batch_size=2'),
    ('analyze', (evaluator.Predictor, '__init__'), 'eval.batch_size=2'),
    ('check_leakage', (evaluation, 'restored'), '')])
def test_out_of_memory_in_each_mode(mode, patched, flag, finished, tmp_path, monkeypatch,
                                    capsys):
  """One line, a status that nobody restarts, no traceback; in training and without."""
  path = tmp_path if mode == 'train' else finished
  if flag:
    monkeypatch.setattr(*patched, hungry)
  else:
    from latent_reasoning.eval import leakage
    monkeypatch.setattr(leakage, 'run', hungry)
    flag = 'eval.batch_size=2'
  question = ['--question=1+2+3'] if mode == 'generate' else []
  assert main.main([*ARGV, f'--mode={mode}', f'--workdir={path}', *question]) == 1
  err = capsys.readouterr().err
  assert err.count('error: ') == 1 and 'Traceback' not in err
  assert 'error: out of memory: 181.9 TiB were asked for' in err
  assert f'--config.{flag}' in err, err


@pytest.mark.integration
def test_api(finished, monkeypatch):
  """An exception with the same words, which keeps what JAX said; nothing leaves the process."""
  experiment = lr.Experiment.load(finished)
  monkeypatch.setattr(evaluator.Predictor, 'texts', hungry)
  for ask in (lambda: experiment.answer('1+2+3'), experiment.evaluate):
    with pytest.raises(DeviceError, match=r'181\.9 TiB .*config\.eval\.batch_size=2') as found:
      ask()
    assert isinstance(found.value.__cause__, RuntimeError)
  assert json.loads((finished / 'config.json').read_text())['device'] == ''
