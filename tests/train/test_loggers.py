"""Loggers beside metrics.jsonl: which numbers they get, how they fail, Weights & Biases."""

import json
import sys
import types

import pytest

from latent_reasoning import experiment, main
from latent_reasoning.errors import InputError
from latent_reasoning.parallel import multihost
from latent_reasoning.train import loggers, trainer, workdir
from latent_reasoning.train.metrics import Metrics
from latent_reasoning.train.workdir import Workdir

pytestmark = pytest.mark.usefixtures('quick_compilation')


class Recorder:
  def __init__(self, fails=''):
    self.logged, self.closed, self.fails = [], 0, fails

  def log(self, values, step):
    if self.fails == 'log':
      raise ConnectionError('no\nroute')
    self.logged.append((step, dict(values)))
    values.clear()  # what it does with them is its own affair

  def close(self):
    self.closed += 1
    if self.fails == 'close':
      raise RuntimeError('late')


@pytest.fixture
def wandb(monkeypatch):
  """A stand-in for the library: its runs, by the arguments they were made with."""
  runs = []

  class Run:
    def __init__(self, **given):
      self.given, self.logged, self.metrics, self.finished = given, [], [], 0

    def define_metric(self, name, step_metric=None):
      self.metrics.append((name, step_metric))

    def log(self, values):
      self.logged.append(values)

    def finish(self):
      self.finished += 1

  def init(**given):
    if given['id'] in module.tried:
      raise RuntimeError('run ID is in use')
    if module.refuses and given.get('mode') != 'offline':
      module.tried.append(given['id'])
      raise module.refuses
    runs.append(Run(**given))
    return runs[-1]
  module = types.ModuleType('wandb')
  module.init, module.runs, module.refuses = init, runs, None
  module.teardown = lambda: module.tried.clear()
  module.Settings = lambda: types.SimpleNamespace(base_url='https://api.wandb.ai')
  module.tried = []
  monkeypatch.setitem(sys.modules, 'wandb', module)
  monkeypatch.setenv('WANDB_API_KEY', 'k' * 40)
  for name in ('WANDB_MODE', 'WANDB_BASE_URL', 'WANDB_IDENTITY_TOKEN_FILE', 'NETRC'):
    monkeypatch.delenv(name, raising=False)
  return module


def test_each_gets_the_numbers(tmp_path):
  """By split and name; text, such as a loss that is not finite, is no number."""
  one, two = Recorder(), Recorder()
  log = Metrics(Workdir(tmp_path), 0, True, [one, two])
  log.write(3, 1, 'train', loss=1.5, list_of=[1], other=float('nan'))
  log.write(3, 1, 'valid', final=0.5)
  log.close()
  assert one.logged == two.logged == [(3, {'train/loss': 1.5}), (3, {'valid/final': 0.5})]
  assert one.closed == two.closed == 1 and list((tmp_path / 'events').iterdir())


def test_what_reads_the_future_says_so(tmp_path):
  own = Recorder()
  log = Metrics(Workdir(tmp_path), 0, False, [own])
  log.write(1, 1, 'train', loss=1.5)
  log.close()
  assert own.logged == [(1, {'NOT_CAUSAL/train/loss': 1.5})]


@pytest.mark.parametrize('fails', ['log', 'close'])
def test_a_logger_that_fails_costs_nothing(tmp_path, tiny_config, capsys, fails):
  """It is said once, in one line; the others and the files go on."""
  broken, own = Recorder(fails), Recorder()
  place = Workdir(tmp_path)
  log = Metrics(place, 0, True, loggers.more(tiny_config(), place, [broken, own]))
  for step in (1, 2, 3):
    log.write(step, 1, 'train', loss=1.0)
  log.close()
  said = capsys.readouterr().err
  assert said.count('\n') == said.count('the logger Recorder failed') == 1
  assert len(own.logged) == 3 and len(place.metrics.read_text().splitlines()) == 3


@pytest.mark.parametrize('given', [print, object(), types.SimpleNamespace(log=print), 'wandb'])
def test_what_is_no_logger(tiny_config, tmp_path, given):
  with pytest.raises(InputError, match=r'log\(values, step\) and close\(\)'):
    loggers.more(tiny_config(), Workdir(tmp_path), [given])


def test_the_same_run_goes_on(wandb, tiny_config, tmp_path):
  """Its id lies in the workdir; another workdir is another run."""
  config = tiny_config(**{'train.wandb': 'project'})
  for place in (tmp_path / 'a', tmp_path / 'a', tmp_path / 'b'):
    place.mkdir(exist_ok=True)
    loggers.more(config, Workdir(place))[0].close()
  a, again, b = (run.given for run in wandb.runs)
  assert a == again and a['id'] != b['id'] and [r.finished for r in wandb.runs] == [1] * 3
  assert a['project'] == 'project' and a['resume'] == 'allow' and 'mode' not in a
  assert a['config']['method'] == 'rim' and a['dir'] == str(tmp_path / 'a')
  for text in ('{"id', '[]', '{"id": 3}'):  # cut off, or another thing
    (tmp_path / 'a/wandb.json').write_text(text)
    loggers.more(config, Workdir(tmp_path / 'a'))
    kept = json.loads((tmp_path / 'a/wandb.json').read_text())['id']
    assert wandb.runs[-1].given['id'] == kept != a['id']


def test_steps_that_come_again_are_not_dropped(wandb, tiny_config, tmp_path):
  """The service ignores a step of its own that is no larger than the last."""
  one, = loggers.more(tiny_config(**{'train.wandb': 'p'}), Workdir(tmp_path))
  for step in (4, 5, 3):
    one.log({'train/loss': 1.0}, step)
  run, = wandb.runs
  assert [values['step'] for values in run.logged] == [4, 5, 3]
  assert ('*', 'step') in run.metrics


def test_without_a_key_it_is_offline(wandb, tiny_config, tmp_path, monkeypatch, capsys):
  """One line; a login in ~/.netrc is a key, and WANDB_MODE is the user's word."""
  config, place = tiny_config(**{'train.wandb': 'p'}), Workdir(tmp_path)
  monkeypatch.delenv('WANDB_API_KEY')
  monkeypatch.setenv('HOME', str(tmp_path))
  loggers.more(config, place)
  said = capsys.readouterr().err
  assert said.count('\n') == 1 and 'WANDB_API_KEY' in said and 'wandb sync' in said
  assert wandb.runs[-1].given['mode'] == 'offline'
  monkeypatch.setenv('WANDB_MODE', 'disabled')
  loggers.more(config, place)
  assert 'mode' not in wandb.runs[-1].given
  monkeypatch.delenv('WANDB_MODE')
  (tmp_path / '.netrc').write_text('machine api.wandb.ai login user password x\n')
  loggers.more(config, place)
  assert 'mode' not in wandb.runs[-1].given and not capsys.readouterr().err
  monkeypatch.setenv('WANDB_BASE_URL', 'https://wandb.example.org/')
  assert not loggers.has_key(wandb)
  (tmp_path / '.netrc').write_text('machine\n{')
  assert not loggers.has_key(wandb)


def test_a_service_that_refuses(wandb, tiny_config, tmp_path, capsys):
  """A requeued job is not ended by an outage: it logs offline, and says why."""
  wandb.refuses = RuntimeError('401\n  invalid key')
  loggers.more(tiny_config(**{'train.wandb': 'p'}), Workdir(tmp_path))
  said = capsys.readouterr().err
  assert said.count('\n') == 1 and '401 invalid key' in said
  assert wandb.runs[-1].given['mode'] == 'offline'


def test_a_project_that_cannot_be(wandb, tiny_config, tmp_path, monkeypatch):
  def init(**_):
    raise ValueError('bad name')
  monkeypatch.setattr(wandb, 'init', init)
  with pytest.raises(InputError, match="config.train.wandb is 'p'.*bad name"):
    loggers.more(tiny_config(**{'train.wandb': 'p'}), Workdir(tmp_path))


def test_a_missing_library_names_the_extra(monkeypatch, tmp_path, capsys):
  """Before anything is trained."""
  monkeypatch.delitem(sys.modules, 'wandb', raising=False)
  monkeypatch.setattr(loggers.importlib.util, 'find_spec', lambda name: None)
  status = main.main(['main', '--config=configs/rim_arithmetic.py', '--config.train.wandb=p',
                      f'--workdir={tmp_path}/run', '--config.train.compilation_cache='])
  said = capsys.readouterr().err
  assert status == 2 and "pip install -e '.[wandb]'" in said and not said.count('step ')


def test_only_the_first_process_logs(wandb, tiny_config, tmp_path, monkeypatch):
  monkeypatch.setattr(multihost, '_place', [1, 2])
  config = tiny_config(**{'train.wandb': 'p'})
  assert loggers.more(config, Workdir(tmp_path), [Recorder()]) == []
  assert not wandb.runs and not (tmp_path / 'wandb.json').exists()


@pytest.mark.integration
def test_a_training(wandb, tiny_config, tmp_path):
  """Stopped and started again: one run, steps and names as in metrics.jsonl; where it logs
  is no part of what the run is."""
  changes = {'model.num_layers': 1, 'optim.stage1.steps': 4, 'optim.stage2.steps': 0,
             'data.buckets.prefix': (20,), 'data.buckets.readout': (6,),
             'data.buckets.count': (3,), 'train.log_every': 1, 'train.save_every': 2,
             'train.eval_every': 0, 'eval.valid_problems': 4}

  class Stops(Recorder):
    def log(self, values, step):
      super().log(values, step)
      if step == 3:
        raise KeyboardInterrupt

  def run(**more):
    config = tiny_config(**changes, **more)
    return experiment.build(config, workdir.open_workdir(tmp_path / 'run', config, True))
  stops, own = Stops(), Recorder()
  with pytest.raises(KeyboardInterrupt):
    trainer.train(run(**{'train.wandb': 'p'}), [stops])
  assert stops.closed == 1
  trainer.train(run(**{'train.wandb': 'other'}), [own])
  first, second = wandb.runs
  assert first.given['id'] == second.given['id'] and first.finished == second.finished == 1
  assert [values['step'] for values in first.logged] == [1, 2]
  assert [step for step, values in own.logged if 'train/loss' in values] == [3, 4]
  records = [json.loads(line) for line in
             (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
  assert [r['loss'] for r in records if r['split'] == 'train'][-1] == [
      values['train/loss'] for values in second.logged if 'train/loss' in values][-1]
