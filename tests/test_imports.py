"""The order of the rooms: each imports only from those before it, and from itself."""

import ast
import pathlib

import pytest

import latent_reasoning

ROOT = pathlib.Path(latent_reasoning.__file__).parent
ROOMS = ('errors', 'progress', 'config', 'config_loading', 'data', 'report', 'sequences',
         'batching', 'models', 'parallel', 'train', 'methods', 'hf', 'eval', 'experiment',
         'planning', 'analysis', 'cli', 'benchmarks', 'api', 'main')
MODULES = {'.'.join(p.relative_to(ROOT).with_suffix('').parts): p for p in ROOT.rglob('*.py')
           if p.parent != ROOT or not p.stem.startswith('__')}


def imported(tree: ast.AST):
  """What a module imports from the package, inside functions too; not for type checkers."""
  for node in ast.iter_child_nodes(tree):
    if isinstance(node, ast.If) and getattr(node.test, 'id', '') == 'TYPE_CHECKING':
      continue
    if isinstance(node, ast.Import):
      yield from (a.name.removeprefix('latent_reasoning.') for a in node.names
                  if a.name.startswith('latent_reasoning.'))
    elif isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == (
        'latent_reasoning'):
      inner = node.module.removeprefix('latent_reasoning').lstrip('.')
      yield from (f'{inner}.{a.name}'.lstrip('.') for a in node.names)
    else:
      yield from imported(node)


def wrong(module: str, source: str) -> list[str]:
  """Imports of a module from its own room's right; the room is its name's first part."""
  here = ROOMS.index(module.split('.')[0])
  return [name for name in imported(ast.parse(source))
          if ROOMS.index(name.split('.')[0]) > here]


@pytest.mark.parametrize('module', sorted(MODULES))
def test_one_direction(module):
  assert not wrong(module, MODULES[module].read_text(encoding='utf-8'))


def test_a_step_back_is_seen():
  source = '''
from typing import TYPE_CHECKING
if TYPE_CHECKING:
  from latent_reasoning.experiment import Experiment
def late():
  from latent_reasoning import batching, experiment
  import latent_reasoning.models.imm
'''
  assert wrong('models.layers', source) == ['experiment']
  assert wrong('config', source) == ['batching', 'experiment', 'models.imm']
