"""The notebooks: clean, alike where they should be, and (slow) run from top to bottom."""

import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FIGURES = {'bring_your_own_model': 2, 'imm_shakespeare': 3, 'inside_the_blocks': 4,
           'rim_quickstart': 3}
PATHS = [ROOT / 'notebooks' / f'{name}.ipynb' for name in FIGURES]
SHORT = 'SHORT = False'  # the one parameter


def code(path):
  cells = json.loads(path.read_text(encoding='utf-8'))['cells']
  return [c for c in cells if c['cell_type'] == 'code']


def test_there_are_no_others():
  assert sorted((ROOT / 'notebooks').glob('*.ipynb')) == PATHS


@pytest.mark.parametrize('path', PATHS, ids=lambda p: p.stem)
def test_is_clean(path):
  """No outputs, counts or metadata of whoever ran it last; ids of its own; text between."""
  notebook = json.loads(path.read_text(encoding='utf-8'))
  assert notebook['nbformat'] == 4
  assert notebook['metadata'].keys() == {'kernelspec', 'language_info'}
  ids = [cell['id'] for cell in notebook['cells']]
  assert len(ids) == len(set(ids)) and notebook['cells'][0]['cell_type'] == 'markdown'
  assert all(cell['metadata'] == {} for cell in notebook['cells'])
  for cell in code(path):
    assert cell['outputs'] == [] and cell['execution_count'] is None
    compile(re.sub(r'(?m)^( *)%.*', r'\1pass', ''.join(cell['source'])), cell['id'], 'exec')
  nbformat = pytest.importorskip('nbformat', reason="pip install '.[notebooks]'")
  nbformat.validate(nbformat.read(path, as_version=4))


@pytest.mark.parametrize('path', PATHS, ids=lambda p: p.stem)
def test_parameter_and_installation(path):
  """One short cell, which all share; it installs nothing unless asked to."""
  first, *others = (''.join(c['source']) for c in code(path))
  assert first.startswith(SHORT) and not any(SHORT in text for text in others)
  assert first == ''.join(code(PATHS[0])[0]['source']) and first.count('\n') < 5
  assert "REPOSITORY = ''" in first and '%pip' in first


@pytest.mark.slow
@pytest.mark.parametrize('path', PATHS, ids=lambda p: p.stem)
def test_runs(path, tmp_path, monkeypatch):
  """Shortened, in an empty folder; its figures are there and small."""
  nbclient = pytest.importorskip('nbclient', reason="pip install '.[notebooks]'")
  nbformat = pytest.importorskip('nbformat')
  if path.stem == 'bring_your_own_model':
    pytest.importorskip('transformers', reason="pip install '.[test-hf]'")
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  notebook = nbformat.read(path, as_version=4)
  for cell in notebook.cells:
    cell.source = cell.source.replace(SHORT, 'SHORT = True')
  nbclient.NotebookClient(notebook, timeout=300, kernel_name='python3',
                          resources={'metadata': {'path': str(tmp_path)}}).execute()
  outputs = [out for c in notebook.cells if c.cell_type == 'code' for out in c.outputs]
  drawn = [out for out in outputs if 'image/png' in out.get('data', {})]
  assert len(drawn) == FIGURES[path.stem]
  assert len(json.dumps(outputs)) < 2_000_000
