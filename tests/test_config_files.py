"""Every config file in every variant: sound, as recorded, and its runs parse.

  python tests/test_config_files.py   # records golden/configs.json again

The record says what each variant changes of the defaults, and the defaults: whoever edits a
base sees in it what becomes of all that build on it.
"""

import json
import pathlib
import re
import runpy

import ml_collections
import pytest

from latent_reasoning import methods
from latent_reasoning.cli import sweep
from latent_reasoning.config import Config, flatten
from latent_reasoning.config_loading import from_dict
from latent_reasoning.train import curriculum

FILES = sorted((pathlib.Path(__file__).resolve().parents[1] / 'configs').glob('*.py'))
VARIANTS = {'compare_arithmetic': ('short', 'four', 'smoke', 'controls', 'length', 'depth',
                                   'width', 'blocks', 'scale', 'searched', 'searched_smoke'),
            'compare_depth': ('controls', 'long', 'mixed', 'permutations', 'hops', 'variables',
                              'registers', 'smoke'),
            'compare_gsm8k': ('short', 'smoke', 'controls', 'smollm2', 'smollm2_short'),
            'compare_prosqa': ('letters', 'searched', 'short', 'smoke', 'controls'),
            'rim_arithmetic': tuple('2345678'),
            'rim_gsm8k': ('tiny', 'llama1b', 'llama3b', 'qwen', 'smollm2', 'smollm2_short'),
            'imm_shakespeare': ('replication', 'replication_128', 'replication_256',
                                'replication_full', 'controls', 'slots', 'mechanisms',
                                'initialisation')}
CASES = [(f, v) for f in FILES for v in ('', *VARIANTS.get(f.stem, ()))]
COMPARISONS = [f for f in FILES if f.stem.startswith('compare_')]


def load(path, variant):
  return runpy.run_path(str(path))['get_config'](variant)


RECORD = pathlib.Path(__file__).parent / 'golden/configs.json'


def effective() -> dict:
  """{'defaults': every key, file:variant: what it changes of them}."""
  defaults, found = flatten(Config()), {}
  for path, variant in CASES:
    own = flatten(from_dict(load(path, variant)))
    found[f'{path.stem}:{variant}'] = {k: v for k, v in own.items() if v != defaults[k]}
  return {'defaults': defaults, **found}


def test_as_recorded():
  """A change of a default or of a config file shows in the record."""
  assert json.loads(RECORD.read_text()) == json.loads(json.dumps(effective()))


def test_there_are_some():
  assert VARIANTS.keys() <= {f.stem for f in FILES} and len(COMPARISONS) == 4


@pytest.mark.parametrize('path, variant', CASES, ids=lambda v: getattr(v, 'stem', v))
def test_loads(path, variant):
  """Each variant is a whole configuration."""
  frozen = from_dict(load(path, variant))
  assert not frozen.sweep.runs or len(sweep.parse(frozen.sweep)) == len(frozen.sweep.runs)


@pytest.mark.parametrize('path, variant', CASES, ids=lambda v: getattr(v, 'stem', v))
def test_runs_change_keys_that_exist(path, variant):
  """Every override of a run names a key, and with it the config is sound."""
  config = load(path, variant)
  known = flatten(from_dict(config))
  if not config.sweep.runs:
    return
  for name, flags in sweep.parse(from_dict(config).sweep).items():
    changed = ml_collections.ConfigDict(config.to_dict())
    for flag in flags:
      key, _, value = flag.removeprefix('--config.').partition('=')
      assert key in known, (name, key)
      old = changed
      for part in key.split('.')[:-1]:
        old = old[part]
      last = key.split('.')[-1]
      old[last] = value if isinstance(old[last], str) else eval(value)  # literals
    from_dict(changed)


@pytest.mark.parametrize('path', COMPARISONS, ids=lambda p: p.stem)
def test_comparison(path):
  """Opens with its command, names its variants; an unknown one is refused."""
  head = path.read_text().split('"""')[1]
  assert f'--mode=compare --config=configs/{path.name}' in head
  for variant in VARIANTS[path.stem]:
    assert re.search(rf'^  :{variant}\b', head, re.MULTILINE), variant
  with pytest.raises(ValueError, match='has no variant'):
    load(path, 'nosuch')
  config = from_dict(load(path, ''))
  runs = {r.split()[0] for r in config.sweep.runs}
  assert config.sweep.seeds == (0, 1, 2) and config.sweep.control in runs
  assert (runs > {'rim_8x1', 'rim_4x2', 'rim_2x4', 'rim_1x8'} if path.stem == 'compare_depth'
          else runs > {'direct', 'direct_steps', 'cot', 'pause', 'rim'})


@pytest.mark.parametrize('steps', (2, 4, 6))
def test_lengths_are_rim_arithmetic(steps):
  """A chain of n operations in `:length` is that of rim_arithmetic.py:n."""
  path, = (f for f in FILES if f.stem == 'compare_arithmetic')
  config = load(path, 'length')
  runs = sweep.parse(from_dict(config).sweep)
  found = dict(f.removeprefix('--config.').split('=') for f in runs[f'rim_length_{steps}'])
  like = flatten(from_dict(load(path.with_name('rim_arithmetic.py'), str(steps))))
  merged = {**flatten(from_dict(config)), **{k: eval(v) for k, v in found.items()
                                             if k != 'method'}}
  for key in ('data.arithmetic.min_steps', 'data.arithmetic.max_steps', 'rim.blocks',
              'rim.max_steps', 'baselines.pause_tokens', 'eval.max_new_tokens'):
    assert merged[key] == like[key], key
  for key in ('prefix', 'readout', 'count'):
    assert list(merged[f'data.buckets.{key}']) == like[f'data.buckets.{key}']


def test_methods_of_the_comparisons_exist():
  """Those that this version has are rows of the table."""
  assert {'direct', 'direct_steps', 'cot', 'pause', 'pause_steps', 'rim'} <= set(
      methods.METHODS)


@pytest.mark.parametrize('name', ['compare_arithmetic', 'compare_prosqa'])
@pytest.mark.parametrize('method', ['icot', 'coconut'])
def test_parts_have_a_constant_rate(name, method):
  """The last part of stage 1 learns as fast as the first, and parts go on until learned."""
  path, = (f for f in FILES if f.stem == name)
  config = from_dict(load(path, ''))
  flags, = (f for n, f in sweep.parse(config.sweep).items() if n == method)
  changes = dict(f.removeprefix('--config.').split('=', 1) for f in flags)
  numbers = {k: v if k in ('method', 'optim.stage1.schedule') else float(v)
             for k, v in changes.items()}
  numbers.update({k: int(v) for k, v in numbers.items() if k.endswith(('steps', 'patience',
                                                                       'every'))})
  config = config.replace(**numbers)
  total = curriculum.build(config.optim, 1_000_000)
  peak, (one, _) = config.optim.stage1.learning_rate, total.lengths
  assert [total.learning_rate(s) for s in range(one // 10, one, one // 50)] == [
      pytest.approx(peak)] * len(range(one // 10, one, one // 50))
  assert config.baselines.part_accuracy and 10 * config.train.eval_every < one


if __name__ == '__main__':
  RECORD.write_text(json.dumps(effective(), indent=1, ensure_ascii=False) + '\n')
