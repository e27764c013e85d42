"""The command line: every mode has its flags, and a near miss is named."""

import dataclasses
import json
import pathlib
import sys

import pytest

from latent_reasoning import config as config_lib
from latent_reasoning import main
from latent_reasoning.cli import arguments
from latent_reasoning.errors import InputError

CONFIG = pathlib.Path(__file__).resolve().parents[2] / 'configs/rim_arithmetic.py'
FLAGS = {'question': '=x', 'externalize': '', 'format': '=hf', 'devices': '=4',
         'device_kind': '=v5p', 'memory_gb': '=1', 'markdown': ''}


@pytest.mark.parametrize('flag', FLAGS)
def test_a_flag_that_the_mode_does_not_read(flag, capsys):
  """Every mode takes its own flags and refuses the others, naming those that read them."""
  readers = {mode for mode, (_, *names) in arguments.MODES.items() if flag in names}
  readers |= {mode for mode, names in arguments.WITHOUT_RUN.items() if flag in names}
  assert readers
  for mode in [*arguments.MODES, *arguments.WITHOUT_RUN]:
    argv = ['main', '--config=configs/rim_arithmetic.py', f'--mode={mode}',
            f'--{flag}{FLAGS[flag]}']
    if mode in readers:
      assert arguments.parse(argv).mode == mode
    else:
      with pytest.raises(InputError, match=rf'--{flag} is not read by --mode={mode}; it is by '
                         rf'.*--mode={sorted(readers)[0]}'):
        arguments.parse(argv)


def test_a_question_alone_asks():
  """Without a mode, --question is --mode=generate, and never a training."""
  assert arguments.parse(['main', '--config=configs/rim_arithmetic.py', '--question=1+2']
                    ).mode == 'generate'


def test_renamed_modes_are_modes():
  assert set(arguments.RENAMED.values()) <= set(arguments.MODES)
  assert not set(arguments.RENAMED) & set(arguments.MODES)


@pytest.mark.parametrize('argv, text', [
    (['main', '--config=a.py:b'], 'a.py:b'), (['main', '--config', 'a.py'], 'a.py'),
    (['main', '-config=a.py'], 'a.py'), (['main', '--config.seed=1'], ''), (['main'], '')])
def test_config_argument(argv, text):
  """The config's own text, in every way a flag can be written."""
  assert arguments.flag(argv, 'config') == text


def test_parse_leaves_the_process_alone():
  """Two command lines in one process do not see each other, nor change sys.argv."""
  before = list(sys.argv)
  one = arguments.parse(['main', f'--config={CONFIG}', '--config.seed=1', '--mode=eval'])
  two = arguments.parse(['main', f'--config={CONFIG}'])
  assert (one.config.seed, one.mode) == (1, 'eval')
  assert (two.config.seed, two.mode, two.workdir) == (0, 'train', None)
  assert sys.argv == before


def test_the_workdir_alone(tmp_path, monkeypatch, capsys):
  """A run that is there is opened without its --config; keys are overridden as ever."""
  saved = dataclasses.asdict(config_lib.Config())
  saved['optim']['stage1']['steps'] = 7
  (tmp_path / 'config.json').write_text(json.dumps(saved))
  args = arguments.parse(
      ['main', f'--workdir={tmp_path}', '--config.eval.blocks=3', '--mode=eval'])
  assert args.config.optim.stage1.steps == 7 and args.config.eval.blocks == 3
  assert args.config.data.buckets.prefix == config_lib.Config().data.buckets.prefix
  with pytest.raises(InputError, match="did you mean 'config.eval.blocks'"):
    arguments.parse(['main', f'--workdir={tmp_path}', '--config.eval.blockz=3'])
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
