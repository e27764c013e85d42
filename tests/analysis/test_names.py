"""lr.analysis finds its modules and the functions of them by name, always the same ones."""

import sys
import types

import pytest

from latent_reasoning import analysis


def test_by_name():
  for name in analysis.__dir__():
    assert getattr(analysis, name) is getattr(analysis, name)
  assert callable(analysis.value_probes) and isinstance(analysis.probing, types.ModuleType)
  with pytest.raises(AttributeError, match=r"no attribute 'probe'; .*value_probes"):
    _ = analysis.probe


def test_a_function_called_as_its_module(monkeypatch):
  """It stays the function, although importing the module leaves the module there."""
  module = types.ModuleType('latent_reasoning.analysis.agreement')
  module.agreement = lambda: 'found'

  def imported(name):
    monkeypatch.setitem(vars(analysis), 'agreement', module)
    return module
  monkeypatch.setitem(sys.modules, module.__name__, module)
  monkeypatch.setitem(analysis._HOMES, 'agreement', 'agreement')
  monkeypatch.setattr(analysis, 'importlib', types.SimpleNamespace(import_module=imported))
  assert [analysis.agreement() for _ in range(2)] == ['found'] * 2
