"""Targets by name, and mistakes in them."""

import pathlib
import re

import pytest

from latent_reasoning import main
from latent_reasoning.errors import InputError
from latent_reasoning.planning import targets
from latent_reasoning.train import hardware

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize('text, kind, topology', [
    ('tpu:v5p:2x2x1', 'v5p', 'v5p:2x2x1'), ('tpu:v5e:2x2', 'v5e', 'v5e:2x2'),
    ('gpu:h100', 'H100', '1x1x1'), ('gpu:a100-40gb:8', 'A100-40GB', '1x1x8')])
def test_parse(text, kind, topology):
  found = targets.parse(text)
  assert (found.kind, found.topology) == (kind, topology)


def test_every_target_has_figures():
  """Peaks to plan with, and of a GPU a description whose memory is that of its peak."""
  for kind in targets.TPUS.values():
    assert kind in hardware.PEAKS
  for gpu in targets.GPUS.values():
    peak = hardware.PEAKS[gpu.peak]
    assert gpu.memory == pytest.approx(peak.memory, rel=0.08)
    assert gpu.bandwidth == pytest.approx(peak.bandwidth, rel=0.01)
    assert gpu.name.startswith(peak.kinds) and f'core_count: {gpu.cores}' in gpu.proto()


@pytest.mark.parametrize('text, message', [
    ('tpu', "'' is unknown"), ('v5p', 'expected tpu:KIND:TOPOLOGY'), ('', 'expected tpu:KIND'),
    ('tpu:v5q:2x2', "did you mean 'v5p'"), ('gpu:h1000', "did you mean 'h100'"),
    ('tpu:v5e', "found the topology ''; expected one such as tpu:v5e:2x2"),
    ('tpu:v5p:4', "found the topology '4'; expected one such as tpu:v5p:2x2x1"),
    ('tpu:v5p:0x2x1', 'found the topology'), ('gpu:h100:0', "found '0' behind the kind"),
    ('gpu:h100:2x2', "found '2x2' behind the kind")])
def test_mistakes(text, message):
  with pytest.raises(InputError, match=re.escape(message)):
    targets.parse(text)


@pytest.mark.parametrize('text, extra', [('tpu:v5e:2x2', 'plan-tpu'), ('gpu:h100', 'plan-gpu')])
def test_without_a_compiler(text, extra, monkeypatch):
  monkeypatch.setattr(targets.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(InputError, match=rf"pip install -e '.\[{extra}\]'"):
    targets.parse(text).devices()


def test_by_command(capsys):
  """A mistake is one line, before anything is compiled."""
  config = f"--config={ROOT / 'configs/rim_arithmetic.py'}"
  assert main.main(['main', config, '--mode=plan', '--target=gpu:none']) == 2
  assert capsys.readouterr().err.startswith("error: --target=gpu:none: 'none' is unknown")
