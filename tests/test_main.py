"""The command: help, mistakes, the default workdir, and a whole small run."""

import dataclasses
import json
import os
import pathlib
import shlex
import subprocess
import sys

import pytest

from latent_reasoning import config as config_lib
from latent_reasoning import main
from latent_reasoning.cli import allocator, sweep
from latent_reasoning.errors import InputError
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
  for mode in main.MODES | dict.fromkeys(main.WITHOUT_RUN):
    assert f'\n  {mode} ' in out
  assert out.count('python -m latent_reasoning.main --config=configs/') >= 3
  assert call('-h') == 0


def test_help_config(capsys):
  """Every key, without a config file."""
  assert call('--help_config') == 0
  out = capsys.readouterr().out
  assert '--config.optim.batch_size=64' in out and '--config.imm.write_policy' in out


FLAGS = {'question': '=x', 'externalize': '', 'format': '=hf', 'devices': '=4',
         'device_kind': '=v5p', 'memory_gb': '=1', 'markdown': ''}


@pytest.mark.parametrize('flag', FLAGS)
def test_a_flag_that_the_mode_does_not_read(flag, capsys):
  """Every mode takes its own flags and refuses the others, naming those that read them."""
  readers = {mode for mode, (_, *names) in main.MODES.items() if flag in names}
  readers |= {mode for mode, names in main.WITHOUT_RUN.items() if flag in names}
  assert readers
  for mode in [*main.MODES, *main.WITHOUT_RUN]:
    argv = ['main', '--config=configs/rim_arithmetic.py', f'--mode={mode}',
            f'--{flag}{FLAGS[flag]}']
    if mode in readers:
      assert main.parse(argv).mode == mode
    else:
      with pytest.raises(InputError, match=rf'--{flag} is not read by --mode={mode}; it is by '
                         rf'.*--mode={sorted(readers)[0]}'):
        main.parse(argv)


def test_a_question_alone_asks():
  """Without a mode, --question is --mode=generate, and never a training."""
  assert main.parse(['main', '--config=configs/rim_arithmetic.py', '--question=1+2']
                    ).mode == 'generate'


def test_renamed_modes_are_modes():
  assert set(main.RENAMED.values()) <= set(main.MODES)
  assert not set(main.RENAMED) & set(main.MODES)


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
    args = main.parse(['main', *command.replace('"', '').replace(
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


@pytest.mark.parametrize('argv, text', [
    (['main', '--config=a.py:b'], 'a.py:b'), (['main', '--config', 'a.py'], 'a.py'),
    (['main', '-config=a.py'], 'a.py'), (['main', '--config.seed=1'], ''), (['main'], '')])
def test_config_argument(argv, text):
  """The config's own text, in every way a flag can be written."""
  assert main.flag(argv, 'config') == text


def test_parse_leaves_the_process_alone():
  """Two command lines in one process do not see each other, nor change sys.argv."""
  before = list(sys.argv)
  one = main.parse(['main', f'--config={CONFIG}', '--config.seed=1', '--mode=eval'])
  two = main.parse(['main', f'--config={CONFIG}'])
  assert (one.config.seed, one.mode) == (1, 'eval')
  assert (two.config.seed, two.mode, two.workdir) == (0, 'train', None)
  assert sys.argv == before


@pytest.fixture
def execv(monkeypatch):
  """Records what the process would be replaced by, in a clean environment."""
  calls = []
  monkeypatch.setattr(os, 'execv', lambda *args: calls.append(args))
  environment = {k: v for k, v in os.environ.items()
                 if k not in (*allocator.SETTINGS, allocator.KEEP, 'LD_PRELOAD')}
  monkeypatch.setattr(os, 'environ', environment)
  return calls


@pytest.mark.skipif('CS_GNU_LIBC_VERSION' not in os.confstr_names, reason='glibc only')
def test_allocator_starts_again_once(execv):
  """The same command again, with the settings; then no more."""
  allocator.tune()
  assert execv == [(sys.executable, sys.orig_argv)]
  assert os.environ['GLIBC_TUNABLES'] == allocator.SETTINGS['GLIBC_TUNABLES']
  allocator.tune()
  assert len(execv) == 1


@pytest.mark.skipif('CS_GNU_LIBC_VERSION' not in os.confstr_names, reason='glibc only')
def test_allocator_of_a_process_that_runs(execv, monkeypatch):
  """glibc accepts the settings, and nothing starts again; the user's are kept."""
  libc, said = allocator.ctypes.CDLL(None), []
  class Library:
    mallopt = staticmethod(lambda number, value: said.append((number, value)))
  monkeypatch.setattr(allocator.ctypes, 'CDLL', lambda name: Library)
  allocator.tune_here()
  assert dict(said) == allocator.RUNNING and execv == []
  assert libc.mallopt(*said[2]) == 1  # M_TOP_PAD alone: what is set stays set in this process
  os.environ[allocator.KEEP] = '1'
  allocator.tune_here()
  assert len(said) == len(allocator.RUNNING)


@pytest.mark.parametrize('name', [*allocator.SETTINGS, allocator.KEEP, 'LD_PRELOAD'])
def test_allocator_of_the_user_is_kept(execv, name):
  """Where anything is set already, nothing is changed."""
  os.environ[name] = 'x'
  allocator.tune()
  assert execv == [] and os.environ[name] == 'x'


@pytest.mark.parametrize('whole', [False, pytest.param(True, marks=pytest.mark.slow)])
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


def test_the_workdir_alone(tmp_path, monkeypatch, capsys):
  """A run that is there is opened without its --config; keys are overridden as ever."""
  saved = dataclasses.asdict(config_lib.Config())
  saved['optim']['stage1']['steps'] = 7
  (tmp_path / 'config.json').write_text(json.dumps(saved))
  args = main.parse(['main', f'--workdir={tmp_path}', '--config.eval.blocks=3', '--mode=eval'])
  assert args.config.optim.stage1.steps == 7 and args.config.eval.blocks == 3
  assert args.config.data.buckets.prefix == config_lib.Config().data.buckets.prefix
  with pytest.raises(InputError, match="did you mean 'config.eval.blocks'"):
    main.parse(['main', f'--workdir={tmp_path}', '--config.eval.blockz=3'])
  saved['sweep']['runs'] = ['rim method=rim']  # a comparison is made of its file
  for text in (json.dumps(saved), '[]', '{', 'null', '{"sweep": 1}'):
    (tmp_path / 'config.json').write_text(text)
    assert main.main(['main', f'--workdir={tmp_path}', '--mode=eval']) == 2
    assert 'no configuration; give one with --config=FILE' in capsys.readouterr().err


@pytest.mark.parametrize('argv, message', [
    (['--mode=analyse'], "did you mean 'analyze'"),
    (['--optim.stage1.steps=3'], 'given as --config.optim.stage1.steps=VALUE'),
    (['--help_config=optim'], 'expected no value')])
def test_near_misses(argv, message, capsys):
  assert main.main(['main', *argv]) == 2
  assert message in capsys.readouterr().err


def test_help_of_a_config_file(capsys):
  """What it trains and its variants; its values beside the defaults."""
  file = str(CONFIG.with_name('compare_arithmetic.py'))
  assert main.main(['main', f'--config={file}', '--help']) == 0
  assert ':smoke' in capsys.readouterr().out
  assert main.main(['main', f'--config={CONFIG}', '--help_config']) == 0
  out = capsys.readouterr().out
  assert "optimizer='muon' ('adamw' | 'muon'); the default is 'adamw'" in out
