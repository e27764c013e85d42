"""The command: help, mistakes, the default workdir, and a whole small run."""

import json
import os
import pathlib
import shlex
import subprocess
import sys

import pytest

from latent_reasoning import main
from latent_reasoning.cli import arguments, sweep
from latent_reasoning.eval import latency, leakage

pytestmark = pytest.mark.usefixtures('quick_compilation')
CONFIG = pathlib.Path(__file__).resolve().parents[1] / 'configs/rim_arithmetic.py'
TINY = [
    '--config.model.num_layers=1', '--config.model.embed_dim=16', '--config.model.num_heads=2',
    '--config.model.mlp_dim=32', '--config.model.max_positions=64',
    '--config.data.arithmetic.min_steps=2', '--config.data.arithmetic.max_steps=2',
    '--config.data.arithmetic.train_size=32', '--config.data.arithmetic.valid_size=8',
    '--config.data.arithmetic.test_size=6', '--config.data.buckets.prefix=(16,)',
    '--config.data.buckets.readout=(6,)', '--config.data.buckets.count=(2,)',
    '--config.rim.blocks=2', '--config.rim.block_tokens=1', '--config.rim.max_steps=2',
    '--config.optim.batch_size=8', '--config.optim.stage1.steps=4',
    '--config.optim.stage2.steps=3', '--config.train.log_every=1',
    '--config.train.eval_every=0', '--config.train.save_every=0',
    '--config.train.compilation_cache=', '--config.eval.batch_size=4',
    '--config.eval.valid_problems=4', '--config.eval.max_new_tokens=6',
    '--config.eval.latency_repeats=1', '--config.eval.leakage_rows=2']


def call(*argv):
  return main.main(['main', *map(str, argv)])


def test_help(capsys):
  """--help explains the modes, gives three commands to start with, and succeeds."""
  assert call('--help') == 0
  out = capsys.readouterr().out
  for mode in arguments.MODES | dict.fromkeys(arguments.WITHOUT_RUN):
    assert f'\n  {mode} ' in out
  assert out.count('python -m latent_reasoning.main --config=configs/') >= 3
  assert call('-h') == 0


def test_help_config(capsys):
  """Every key, without a config file."""
  assert call('--help_config') == 0
  out = capsys.readouterr().out
  assert '--config.optim.batch_size=64' in out and '--config.imm.write_policy' in out


def test_help_promises_only_flags_that_exist(capsys):
  """Every --flag the help names is accepted by the parser."""
  call('--help')
  out = capsys.readouterr().out
  if '--helpfull' in out:
    assert call('--helpfull') == 0


def test_the_first_command_needs_no_arguments_but_the_config():
  """The commands in the help parse, and their config files exist."""
  lines = main.__doc__.replace('\\\n', '').splitlines()
  commands = [line.split('main ')[1] for line in lines
              if line.startswith('  python') and 'configs/' in line]
  assert len(commands) >= 3
  for command in commands:
    args = arguments.parse(['main', *command.replace('"', '').replace(
        'configs/', f'{CONFIG.parent}/').split()])
    assert args.config.method


def broken(text):
  def write(folder):
    path = folder / 'broken.py'
    path.write_text(text)
    return [f'--config={path}']
  return write


def given(*argv):
  return lambda folder: [f'--config={CONFIG}', f'--workdir={folder / "run"}', *TINY, *argv]


def file_as_workdir(folder):
  (folder / 'file').write_text('')
  return [f'--config={CONFIG}', *TINY, f'--workdir={folder / "file"}']


MISTAKES = {  # name: (command line, what the message has to say)
    'no config': (lambda folder: ['--mode=train'], ['--config']),
    'no config at all': (lambda folder: [], ['--config']),
    'config without value': (lambda folder: ['--config'], ['--config']),
    'missing config': (lambda folder: [f'--config={folder}/none.py'], ['none.py']),
    'folder as config': (lambda folder: [f'--config={folder}'], ['config']),
    'syntax error': (broken('def get_config(:\n'), ['broken.py', 'line 1']),
    'no get_config': (broken('x = 1\n'), ['get_config']),
    'no module': (broken('import no_such_module\n'), ['no_such_module']),
    'failing config': (broken('def get_config():\n  return 1 / 0\n'), ['division by zero']),
    'undefined name': (broken('x = y\n'), ["'y' is not defined"]),
    'unknown variant': (
        lambda folder: [f'--config={CONFIG}:nosuch', f'--workdir={folder}/run'],
        ['nosuch']),
    'nothing to compare': (given('--mode=compare'), ['sweep.runs', 'compare_arithmetic']),
    'nothing to report': (lambda folder: ['--mode=report'], ['no folder given']),
    'report of nothing': (lambda folder: ['--mode=report', f'{folder}/none'],
                          ['no such folder']),
    'unknown mode': (given('--mode=trian'), ['trian', 'train', 'eval', 'generate']),
    'renamed mode': (given('--mode=audit'), ['--mode=audit is now --mode=check_leakage']),
    'renamed mode, apart': (given('--mode', 'inside'), ['is now --mode=analyze']),
    'renamed key': (given('--config.model.width=3'),
                    ['config.model.width is now config.model.embed_dim']),
    'renamed value': (given('--config.method=lm'), ['config.method=lm is now language_model']),
    'unknown flag': (given('--wrkdir=x'), ['wrkdir', 'workdir']),
    'argument': (given('extra'), ['extra']),
    'unknown key': (given('--config.optim.batchsize=3'), [
        "config.optim.batchsize is unknown; did you mean 'config.optim.batch_size'"]),
    'a key like no other': (given('--config.optim.xyzzy=3'),
                            ['config.optim.xyzzy is unknown']),
    'a key of another group': (given('--config.lr=3'), [
        'config.lr is unknown; there are', 'config.optim.stage1.learning_rate']),
    'a key as a flag': (given('--steps=3'),
                        ['--steps is unknown', 'config.optim.stage1.steps']),
    'a workdir that is not there': (
        lambda folder: ['--mode=generate', f'--workdir={folder}/nowhere', '--question=1+2'],
        ['no configuration', 'nowhere has no config.json']),
    'a placeholder': (given('--config.data.dir=MY_DIRECTORY'), [
        "config.data.dir is 'MY_DIRECTORY', which stands for a path of yours"]),
    'a placeholder as workdir': (lambda folder: [f'--config={CONFIG}', '--workdir=DIR'], [
        '--workdir=DIR stands for a folder of yours']),
    'unknown group': (given('--config.optin.batch_size=3'), ['optin', 'optim']),
    'ill-typed': (given('--config.optim.batch_size=abc'),
                  ["config.optim.batch_size: expected a whole number, got 'abc'"]),
    'ill-typed number': (given('--config.optim.stage1.learning_rate=fast'), [
        "config.optim.stage1.learning_rate: expected a number, got 'fast'"]),
    'ill-typed boolean': (given('--config.model.scan=maybe'),
                          ['config.model.scan', 'maybe']),
    'value for a group': (given('--config.optim=3'), ['config.optim']),
    'out of range': (given('--config.optim.batch_size=0'), ['config.optim.batch_size']),
    'unknown method': (given('--config.method=rmi'),
                       ['rmi', "did you mean 'rim'", 'direct']),
    'missing set': (given('--config.eval.sets=("nosuch.jsonl",)'), ['nosuch.jsonl']),
    'eval first': (given('--mode=eval'), ['no checkpoint', '--mode=train']),
    'generate first': (given('--mode=generate', '--question=1+1'), ['no checkpoint']),
    'workdir is a file': (file_as_workdir, ['file', '--workdir'])}


@pytest.mark.parametrize('name', MISTAKES)
def test_mistake(name, tmp_path, monkeypatch, capsys):
  """A mistake ends in one `error:` message that says what was found, and status 2."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.delitem(sys.modules, 'config_config', raising=False)  # that of other tests
  make, words = MISTAKES[name]
  assert call(*make(tmp_path)) == 2
  out, err = capsys.readouterr()
  assert err.count('error: ') == 1 and err.startswith('error: '), (out, err)
  assert 'Traceback' not in out + err
  for word in words:
    assert word in err, err
  assert not (tmp_path / 'run').is_dir(), 'a mistake leaves no folder'
  assert '\\n' not in err and "\\'" not in err, f'a repr, not a sentence: {err}'


def test_a_folder_that_was_there_stays(tmp_path, capsys):
  """Only what a mistake itself made is taken away."""
  for name in ('notes.txt', 'config.json'):
    folder = tmp_path / name
    folder.mkdir()
    (folder / 'notes.txt').write_text('mine')
    assert call(f'--config={CONFIG}', f'--workdir={folder}', '--mode=eval') == 2
    assert (folder / 'notes.txt').read_text() == 'mine'


@pytest.mark.integration
def test_no_such_device(tmp_path):
  """JAX_PLATFORMS of a device that is not there is one line."""
  done = subprocess.run(
      [sys.executable, '-m', 'latent_reasoning.main', f'--config={CONFIG}',
       f'--workdir={tmp_path}/run'], capture_output=True, text=True, cwd=tmp_path,
      env={**os.environ, 'JAX_PLATFORMS': 'gpu', 'LATENT_REASONING_KEEP_ALLOCATOR': '1'})
  assert done.returncode == 2, done.stderr
  error, = done.stderr.splitlines()
  assert error.startswith("error: JAX_PLATFORMS is 'gpu', and JAX has no such device here")


def test_mistake_from_the_shell(tmp_path):
  """The process itself exits with status 2 and without a traceback."""
  done = subprocess.run(
      [sys.executable, '-m', 'latent_reasoning.main', f'--config={CONFIG}', '--mode=trian'],
      capture_output=True, text=True, cwd=tmp_path,
      env={**os.environ, 'LATENT_REASONING_KEEP_ALLOCATOR': '1'})
  assert done.returncode == 2 and done.stderr.startswith('error: ') and not done.stdout


@pytest.mark.parametrize('flag, method, name', [
    ('configs/rim_arithmetic.py', 'rim', 'rim_arithmetic-rim'),
    ('configs/gsm8k.py:small', 'cot', 'gsm8k-small-cot'),
    ('/a/b.py:x=1,y/z', 'direct_steps', 'b-x_1_y_z-direct_steps')])
def test_default_workdir(flag, method, name):
  """runs/<config>-<variant>-<method>."""
  assert main.default_workdir(flag, method) == pathlib.Path('runs') / name


@pytest.mark.parametrize('whole', [pytest.param(False, marks=pytest.mark.integration),
                                   pytest.param(True, marks=pytest.mark.slow)])
def test_sequence(tmp_path, monkeypatch, capsys, whole):
  """train, eval, generate, check_leakage and latency, in the default workdir, and their files.

  Short of the whole, the leakage check runs two of its own, and the clock one batch size.
  """
  if not whole:
    monkeypatch.setattr(leakage, 'run', lambda subject: [
        leakage._check('cached', leakage.caching, subject, subject.prompts()),
        leakage._check('specials', leakage.typing_specials, subject)])
    monkeypatch.setattr(latency, 'BATCHES', (1,))
  monkeypatch.chdir(tmp_path)
  base = [f'--config={CONFIG}', *TINY]
  folder = tmp_path / 'runs' / 'rim_arithmetic-rim'
  assert call(*base) == 0
  assert 'rim on arithmetic/test, 6 problems' in capsys.readouterr().out
  for name in ('config.json', 'metrics.jsonl', 'tokenizer.json', 'predictions.jsonl',
               'results.json'):
    assert (folder / name).is_file(), name
  assert list((folder / 'events').iterdir()) and (folder / 'checkpoints' / '7').is_dir()
  assert not list(folder.glob('*.tmp')) and not list(folder.glob('.*.tmp'))

  result = json.loads((folder / 'results.json').read_text())
  assert (result['method'], result['dataset']) == ('rim', 'arithmetic')
  assert [result[k] for k in ('split', 'n', 'seed', 'step')] == ['test', 6, 0, 7]
  accuracy = result['accuracy']
  assert accuracy['final'] == accuracy['per_block'][-1] <= accuracy['any'] <= 1
  assert len(accuracy['per_block']) == 2
  assert result['by_steps']['2']['n'] == 6
  records = [json.loads(line) for line in
             (folder / 'predictions.jsonl').read_text().splitlines()]
  assert [r['index'] for r in records] == list(range(6))
  assert all(len(r['predictions']) == 2 for r in records)
  train = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
  assert [r['step'] for r in train if r['split'] == 'train'] == list(range(1, 8))
  assert [r['stage'] for r in train if r['split'] == 'train'] == [1] * 4 + [2] * 3

  before = (folder / 'predictions.jsonl').read_text()
  assert call(*base, '--mode=eval', '--config.eval.batch_size=6') == 0
  assert (folder / 'predictions.jsonl').read_text() == before
  assert call(*base, '--mode=eval', '--config.rim.blocks=1') == 2
  assert 'config.rim.blocks: 2 -> 1' in capsys.readouterr().err

  assert call(*base, '--mode=generate', '--question=1+2+3') == 0
  assert capsys.readouterr().out.splitlines()[-1].startswith('answer: ')
  assert call(*base, '--mode=generate', '--question=') == 2
  assert 'the question is empty' in capsys.readouterr().err

  assert call(*base, '--mode=check_leakage') == 0
  found = json.loads((folder / 'leakage.json').read_text())
  assert found['ok'] and found['weights'] == 'checkpoint of step 7'
  assert 'all checks passed' in capsys.readouterr().out

  assert call(*base, '--mode=latency') == 0
  found = json.loads((folder / 'latency.json').read_text())
  assert {e['method'] for e in found['entries']} == {'direct', 'rim', 'cot'}
  assert 'first token ms' in capsys.readouterr().out
  lines = (folder / 'commands.txt').read_text().splitlines()
  assert len(lines) == len(set(lines)) and lines[0].endswith(shlex.join(base))
  assert any(line.endswith('--mode=check_leakage') for line in lines)


@pytest.mark.parametrize('mode', ['train', 'compare'])
def test_runs_of_a_comparison_are_alone(tmp_path, monkeypatch, mode):
  """The user's overrides reach every run, but those of the comparison do not."""
  started = []
  monkeypatch.setattr(sweep, 'run', lambda config, flags, place, share: started.append(
      (config.runs, config.seeds, flags)) or 0)
  monkeypatch.setattr(sys, 'argv', ['main'])
  assert call(f'--config={CONFIG}', *TINY, "--config.sweep.runs=('a method=rim',)",
              '--config.sweep.seeds=(3,)', f'--workdir={tmp_path}', f'--mode={mode}') == 0
  (runs, seeds, flags), = started
  assert runs == ('a method=rim',) and seeds == (3,)
  assert flags == [f'--config={CONFIG}', *TINY]


@pytest.mark.slow
def test_the_default_job_learns(tmp_path, capsys):
  """The README's first command ends where its config says, block by block better: minutes."""
  assert call(f'--config={CONFIG}', f'--workdir={tmp_path}/run') == 0
  found = json.loads((tmp_path / 'run/results.json').read_text())
  assert found['accuracy']['final'] >= 0.95
  by_block = found['accuracy']['per_block']
  assert by_block == sorted(by_block) and by_block[0] < 0.6


def test_help_of_a_config_file(capsys):
  """What it trains and its variants; its values beside the defaults."""
  file = str(CONFIG.with_name('compare_arithmetic.py'))
  assert main.main(['main', f'--config={file}', '--help']) == 0
  assert ':smoke' in capsys.readouterr().out
  assert main.main(['main', f'--config={CONFIG}', '--help_config']) == 0
  out = capsys.readouterr().out
  assert "optimizer='muon' ('adamw' | 'muon'); the default is 'adamw'" in out
