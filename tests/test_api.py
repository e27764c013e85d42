"""The Python interface: by name, as objects, shown."""

import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import numpy as np
import pytest
from close import assert_close

import latent_reasoning as lr
from latent_reasoning import config as config_lib
from latent_reasoning.analysis import mask_plots
from latent_reasoning.data import example as data_example
from latent_reasoning.errors import InputError
from latent_reasoning.report import style
from latent_reasoning.report.result import Result

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_load_config():
  """By name, with a variant, with changed keys; the same as the file."""
  found = lr.load_config('rim_arithmetic:3', **{'optim.batch_size': 8})
  assert (found.rim.blocks, found.optim.batch_size) == (3, 8)
  assert lr.load_config('rim_prosqa') == lr.load_config(str(ROOT / 'configs/rim_prosqa.py'))


@pytest.mark.parametrize('name, changes, message', [
    ('rim_arithmetik', {}, "did you mean 'rim_arithmetic'"),
    ('rim_arithmetic:9', {}, "no variant '9'"), ('none.py', {}, 'none.py'),
    ('rim_arithmetic', {'optim.batch_siz': 3}, 'batch_siz'),
    ('rim_arithmetic', {'optim.batch_size': 0}, 'expected at least 1')])
def test_load_config_names_the_mistake(name, changes, message):
  with pytest.raises(InputError, match=message):
    lr.load_config(name, **changes)


def test_replace():
  """Dotted keys; the rest stays, and so does the old one."""
  old = lr.load_config('rim_arithmetic')
  new = old.replace(method='cot', **{'optim.stage1.steps': 3, 'optim.batch_size': 2})
  assert (new.method, new.optim.stage1.steps, new.optim.batch_size) == ('cot', 3, 2)
  changed = config_lib.difference(config_lib.flatten(old), config_lib.flatten(new))
  assert len(changed) == 3 and old.method == 'rim'
  for key, message in {'optim.stage1.stepz': "stepz is unknown; did you mean 'steps'",
                       'optin.batch_size': "did you mean 'optim'",
                       'seed.x': 'config.seed.x is unknown',
                       'model.width': 'is now config.model.embed_dim'}.items():
    with pytest.raises(InputError, match=message):
      old.replace(**{key: 1})


def test_groups_are_replaced_key_by_key():
  """A dict names some keys of a group; the others stay."""
  old = lr.load_config('rim_arithmetic')
  new = old.replace(optim={'batch_size': 3, 'stage2.steps': 5}, model={'lora': {'rank': 2}})
  assert (new.optim.batch_size, new.optim.stage2.steps, new.model.lora.rank) == (3, 5, 2)
  assert new.optim.stage1 == old.optim.stage1
  assert lr.load_config('rim_arithmetic', optim={'batch_size': 3}) == old.replace(
      **{'optim.batch_size': 3})
  with pytest.raises(InputError, match="optim.batchsize is unknown; did you mean 'batch_size'"):
    old.replace(optim={'batchsize': 3})


def test_a_config_shows_what_differs():
  assert repr(config_lib.Config()) == ''
  changed = config_lib.Config().replace(seed=3, **{'rim.blocks': 2})
  assert repr(changed) == 'seed=3, rim.blocks=2'


def test_no_run_there(tmp_path):
  for path in (tmp_path, tmp_path / 'nothing'):
    with pytest.raises(InputError, match='found no config.json in it; expected the folder'):
      lr.Experiment.load(path)
  for name in ('b', 'a'):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'config.json').write_text('{}')
  with pytest.raises(InputError, match=f'; there are {tmp_path}/a, {tmp_path}/b$'):
    lr.Experiment.load(tmp_path)


def test_names_that_are_not_there():
  """Say which are; each once."""
  with pytest.raises(AttributeError, match="attribute 'evaluate'; there are load_config"):
    lr.evaluate  # noqa: B018
  assert len(set(dir(lr))) == len(dir(lr))


def test_importing_is_light():
  """The name alone loads no JAX."""
  code = "import sys, latent_reasoning; assert 'jax' not in sys.modules; dir(latent_reasoning)"
  subprocess.run([sys.executable, '-c', code], check=True)


def test_result_shows_itself(tmp_path):
  """What a question said is text in HTML; a figure is a PNG; no figure is said."""
  found = Result({'a': 1}, lambda: '<script>a & b</script>')
  assert found._repr_html_() == '<pre>&lt;script&gt;a &amp; b&lt;/script&gt;</pre>'
  assert found.to_dict() == {'a': 1} and json.dumps(found) == '{"a": 1}'
  with pytest.raises(ValueError, match='no figure'):
    found.plot()
  @style.drawing
  def draw(result):
    figure, axis = style.canvas(2, 1)
    axis.set_title(f"value {result['a']}")
    return figure
  assert repr(Result({'a': 1}, lambda: 'a table')) == 'a table' and repr(
      Result({'a': 1})) == "{'a': 1}"
  picture = Result({'a': 7}, draw=draw).plot(tmp_path / 'x.png')
  assert (tmp_path / 'x.png').read_bytes() == picture._repr_png_() and 'save' in repr(picture)
  for name in ('nowhere/x.png', 'x.nonsense'):
    with pytest.raises(InputError, match='cannot write a figure to .*expected a file such as'):
      picture.save(tmp_path / name)
  assert picture._repr_png_() == picture.save(tmp_path / 'y.png').read_bytes()
  assert 'value 7' in picture.save(tmp_path / 'y.svg').read_text()


def test_every_package_is_installed():
  """pyproject.toml names the packages one by one."""
  named = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['setuptools']['packages']
  there = {'.'.join(p.parent.relative_to(ROOT).parts)
           for p in (ROOT / 'latent_reasoning').rglob('__init__.py')}
  assert set(named) == there | {'latent_reasoning.configs'}


@pytest.fixture(scope='module')
def trained(tiny_config, tmp_path_factory):
  experiment = lr.Experiment(tiny_config(), tmp_path_factory.mktemp('runs') / 'rim')
  assert 'metrics' in experiment.train()
  return experiment


@pytest.mark.integration
def test_experiment(trained, capsys):
  """Trained, scored, asked, looked into, checked, written, and found again."""
  scores = trained.evaluate()
  assert 0 <= scores['accuracy']['final'] <= 1 and 'final' in str(scores)
  assert scores.plot()._repr_png_().startswith(b'\x89PNG')
  assert json.loads(trained.workdir.results.read_text())['step'] == scores['step'] == 14
  assert trained.results == scores and str(trained.results) == str(scores)
  answer = trained.answer('1+2-3')
  assert len(answer.by_block) == 3 and answer.text == answer.by_block[-1]
  assert [a.question for a in trained.answer(['1+2', '3*4'])] == ['1+2', '3*4']
  with pytest.raises(InputError, match='empty'):
    trained.answer('  ')
  states = trained.block_states('valid')
  probes = lr.analysis.value_probes(states)
  assert probes['accuracy'].shape[1] == 3 and 'fitted on' in str(probes)
  assert probes.plot()._repr_png_().startswith(b'\x89PNG')
  assert trained.check_leakage()['ok']
  assert trained.intervene()['blocks'] == 3
  assert (trained.export('hf') / 'model.safetensors').is_file()
  again = lr.Experiment.load(trained.workdir.path)
  assert again.config == trained.config and again.answer('1+2-3') == answer
  assert again.results == scores and '<pre>' in again.results._repr_html_()
  assert repr(again).startswith('rim on arithmetic, 14 of 14 steps trained, in ')
  assert 'rim on arithmetic' in again._repr_html_()


@pytest.mark.integration
def test_analyze(trained):
  """A result with a table and a figure, of what --mode=analyze writes."""
  found = trained.analyze()
  assert found['n'] == len(trained.test) and len(found['per_block']) == found['blocks']
  assert 'block 1' in str(found) and '<pre>' in found._repr_html_()
  assert found.plot()._repr_png_().startswith(b'\x89PNG')
  assert trained.workdir.analysis.exists()


@pytest.mark.integration
def test_block_states_of_own_problems(trained):
  """Of questions, and of examples: the states of the split; without an answer none is right."""
  split = trained.block_states('test')
  examples = [trained.test[i] for i in split.index[:4]]
  for known in (True, False):
    own = trained.block_states(examples if known else [e.question for e in examples])
    np.testing.assert_allclose(own.states, split.states[:4], rtol=1e-5, atol=1e-5)
    assert (own.predictions == split.predictions[:4]).all()
    assert (own.correct == (split.correct[:4] & known)).all()
    assert (own.answer_token == np.where(known, split.answer_token[:4], -1)).all()
    assert np.isnan(own.values).all() == (not known)
  bare = data_example.Example(examples[0].question, (), '')
  plot = mask_plots.row(trained, bare)
  assert plot['tokens'][0] == examples[0].question[0]


@pytest.mark.integration
def test_checkpoints_and_cost(trained):
  found = trained.verify()
  assert 14 in found and not any(found.values()) and 'checkpoint 14: sound' in str(found)
  assert trained.flops()['flops'] > 0 and 'stage 1: ' in str(trained.flops())
  with pytest.raises(InputError, match='there are no slots'):
    trained.slot_reads('1+2')


@pytest.mark.integration
def test_verbalize(trained):
  with pytest.raises(InputError, match="reasoning_decoder.source is ''"):
    trained.verbalize('1+2')


@pytest.mark.integration
def test_compare(trained, tmp_path):
  """Side by side, with times; alone, or twice the same, is refused."""
  other = lr.Experiment(trained.config.replace(
      method='direct', **{'optim.stage1.steps': 2, 'optim.stage2.steps': 0}),
      tmp_path / 'direct')
  other.train()
  found = lr.compare(trained, other)
  assert 'rim' in str(found) and 'direct' in found._repr_html_()
  assert found.plot()._repr_png_().startswith(b'\x89PNG')
  assert lr.compare(trained.workdir.path, str(other.workdir.path)).keys() == found.keys()
  with pytest.raises(InputError, match='two or more'):
    lr.compare(trained, trained)


@pytest.mark.integration
def test_results_before_there_are_any(trained, tmp_path):
  """Words that say how to get them; the same of a file that is damaged."""
  new = lr.Experiment(trained.config, tmp_path / 'new')
  for text in (None, '{"accuracy": '):
    if text:
      new.workdir.results.write_text(text)
    with pytest.raises(InputError, match=r'no results in .*results.json; \.evaluate'):
      new.results  # noqa: B018


@pytest.mark.integration
def test_wrong_use(trained, tmp_path):
  for wrong in (7, None, ['1+2', 7]):
    with pytest.raises(InputError, match=re.escape(f'list of them, as text; found {wrong!r}')):
      trained.answer(wrong)
  for wrong in ('tset', []):
    with pytest.raises(InputError, match=re.escape(f"a list of questions; found {wrong!r}")):
      trained.block_states(wrong)
  with pytest.raises(InputError, match="'hf', 'peft' or 'native'; found 'onnx'"):
    trained.export('onnx')
  with pytest.raises(InputError, match='expected at least 1'):
    lr.Experiment(trained.config.replace(**{'optim.batch_size': 0}), tmp_path)


@pytest.mark.integration
def test_on_several_devices(tiny_config, tmp_path):
  """Training through the interface has the losses of one device, its loss in tiles."""
  keys = {'optim.batch_size': 8, 'tokenizer.pad_to': 8, 'model.loss_tile': 16,
          'optim.stage1.steps': 3, 'optim.stage2.steps': 0, 'train.log_every': 1,
          'train.eval_every': 0, 'mesh.data': 2, 'mesh.fsdp': 1, 'mesh.tensor': 2}
  one = lr.Experiment(tiny_config(**{**keys, 'mesh.data': 1, 'mesh.tensor': 1}),
                      tmp_path / 'one')
  one.train()
  script = f'''
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
import conftest, jax, latent_reasoning as lr
jax.config.update('jax_cpu_enable_async_dispatch', False)  # fake devices wait for each other
make = conftest.tiny_config.__wrapped__(conftest.default_config.__wrapped__())
lr.Experiment(make(**{keys!r}), {str(tmp_path / 'four')!r}).train()
'''
  flags = '--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0'
  done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True,
                        env={**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'})
  assert done.returncode == 0, done.stderr[-3000:]
  losses = [[json.loads(line)['loss'] for line in (
      tmp_path / name / 'metrics.jsonl').read_text().splitlines() if '"train"' in line]
      for name in ('one', 'four')]
  assert len(losses[0]) == 3
  assert_close(losses[1], losses[0])
