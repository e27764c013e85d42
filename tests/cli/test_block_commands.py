"""--mode=analyze, --mode=intervene and --externalize: files, tables, mistakes."""

import dataclasses
import json

import pytest

from latent_reasoning.cli import block_commands, commands
from latent_reasoning.errors import InputError
from latent_reasoning.train import trainer

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture(scope='module')
def trained(tiny_config, make_run, tmp_path_factory):
  """A run of two stages with steps kept alive and auxiliary losses, of four steps."""
  config = tiny_config(**{
      'model.num_layers': 1, 'optim.stage1.steps': 2, 'optim.stage2.steps': 2,
      'data.buckets.prefix': (20,), 'data.buckets.readout': (6,), 'data.buckets.count': (6,),
      'data.arithmetic.valid_size': 40, 'rim.externalize': True, 'aux.align': 0.1,
      'aux.smooth': 0.1, 'train.save_every': 2, 'train.eval_every': 0,
      'eval.valid_problems': 4, 'eval.test_problems': 40, 'eval.batch_size': 12})
  run = make_run(config, tmp_path_factory.mktemp('trained'))
  trainer.train(run)
  return run


@pytest.mark.integration
def test_auxiliary_losses_are_logged(trained):
  lines = [json.loads(line) for line in trained.workdir.metrics.read_text().splitlines()]
  values = [line for line in lines if line['split'] == 'train']
  assert values and all(v['aux_align'] > 0 and 0 <= v['aux_smooth'] <= 2 for v in values)


@pytest.mark.integration
def test_inside(trained, capsys):
  """Every figure, the states of both splits, and numbers that JSON can hold."""
  assert block_commands.analyze(trained) == 0
  names = ('block_choice.png', 'adaptive.png', 'trajectories.png', 'probes.png', 'lens.png',
           'attention.png', 'blocks_valid.npz', 'blocks_test.npz')
  assert all((trained.workdir.path / name).stat().st_size > 1000 for name in names)
  def no_nan(text):
    raise ValueError(text)
  found = json.loads(trained.workdir.analysis.read_text(), parse_constant=no_nan)
  assert found['step'] == 4 and len(found['trajectories']['means']) == 2
  assert found['choice']['rules']['final']['accuracy'] == found['per_block'][-1]
  assert found['by_budget'][1:4] == pytest.approx(found['per_block'])
  out = capsys.readouterr().out
  for words in ('no rule can choose better', 'The best rule', 'blocks are read',
                'analysis.txt'):
    assert words in out
  assert len(out.splitlines()) < 25
  tables = (trained.workdir.path / 'analysis.txt').read_text()
  for words in ('any (no rule knows it)', 'AUROC', 'mean blocks', 'linear probe', 'lens'):
    assert words in tables


@pytest.mark.integration
def test_controls(trained, capsys):
  assert block_commands.intervene(trained) == 0
  found = json.loads(trained.workdir.interventions.read_text())
  assert found['lines'][0]['name'] == 'untouched' and found['step'] == 4
  assert 'block 3 transplanted' in capsys.readouterr().out


@pytest.mark.integration
def test_aloud(trained, capsys):
  """A line a block with its step and answer; the answer is that of plain generation."""
  assert commands.generate(trained, '1+2-3', block_commands.decode_steps) == 0
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[:2] for line in lines[2:5]] == [['block', str(k)] for k in (1, 2, 3)]
  assert 'more for the steps' in lines[-1]
  commands.generate(trained, '1+2-3')
  assert lines[-2] == capsys.readouterr().out.splitlines()[-1]


@pytest.mark.integration
def test_aloud_needs_training_for_it(trained):
  rim = dataclasses.replace(trained.config.rim, externalize=False)
  other = dataclasses.replace(trained, config=dataclasses.replace(trained.config, rim=rim))
  with pytest.raises(InputError, match='--config.rim.externalize'):
    commands.generate(other, '1+2-3', block_commands.decode_steps)
