"""The door: what a configuration may say."""

import dataclasses
import pathlib
import re

import ml_collections
import pytest

from latent_reasoning import config as config_lib
from latent_reasoning.config import NOT_CAUSAL, TEXTS, difference, flatten, get
from latent_reasoning.config_loading import CHOICES, POSITIVE, SIGNED, from_dict, read
from latent_reasoning.errors import InputError

FILE = pathlib.Path(__file__).resolve().parents[1] / 'configs/rim_arithmetic.py'


@pytest.fixture
def raw(default_config) -> dict:
  """The default configuration as a nested dict, to be changed by key."""
  return default_config().to_dict()


def check(raw: dict) -> config_lib.Config:
  return from_dict(ml_collections.ConfigDict(raw))


def put(raw: dict, key: str, value) -> None:
  """Sets a dotted key."""
  *groups, last = key.split('.')
  for group in groups:
    raw = raw[group]
  raw[last] = value


def test_read(default_config):
  """A file, its variant and changed keys."""
  assert read(str(FILE), {}) == from_dict(default_config())
  found = read(f'{FILE}:3', {'optim.stage1.steps': 7, 'method': 'cot', 'imm.layers': (1,)})
  assert (found.rim.blocks, found.optim.stage1.steps, found.method) == (3, 7, 'cot')


@pytest.mark.parametrize('file, changes, message', [
    ('none.py', {}, 'none.py'), (f'{FILE}:nosuch', {}, "no variant 'nosuch'"),
    (str(FILE), {'optim.stepz': 1}, 'stepz'), (str(FILE), {'optin.steps': 1}, 'optin'),
    (str(FILE), {'seed': 'x'}, 'seed'), (str(FILE), {'seed.x': 1}, 'seed'),
    (str(FILE), {'optim.batch_size': 0}, 'config.optim.batch_size is 0')])
def test_read_names_the_mistake(file, changes, message):
  with pytest.raises(InputError, match=message):
    read(file, changes)


def test_default_config_converts(raw):
  """configs/rim_arithmetic.py is complete and sound; nothing is lost or made up."""
  frozen = check(raw)
  assert flatten(frozen) == flatten(raw)
  assert frozen.method == 'rim' and frozen.rim.blocks == frozen.rim.max_steps


def test_frozen(raw):
  """No part of a Config can be changed or is unhashable."""
  frozen = check(raw)
  hash(frozen)
  with pytest.raises(dataclasses.FrozenInstanceError):
    frozen.rim.blocks = 3


@pytest.mark.parametrize('key,near', [
    ('optim.stage1.learning_rat', 'learning_rate'), ('rim.block_token', 'block_tokens'),
    ('Seed', 'seed')])
def test_unknown_key(raw, key, near):
  """The error names the key and the nearest known one."""
  put(raw, key, 1)
  with pytest.raises(InputError, match=f"config.{key} is unknown; did you mean '{near}'"):
    check(raw)


@pytest.mark.parametrize('key', sorted({*CHOICES, *POSITIVE}))
def test_missing_key(raw, key):
  """No key has a default in the code."""
  *groups, last = key.split('.')
  group = raw
  for name in groups:
    group = group[name]
  del group[last]
  with pytest.raises(InputError, match=f'config.{re.escape(key)} is missing'):
    check(raw)


@pytest.mark.parametrize('key,value,expected', [
    ('seed', 1.0, 'int'), ('seed', '0', 'int'), ('seed', True, 'int'),
    ('model.tie_embeddings', 1, 'bool'), ('model.dtype', None, 'str'),
    ('optim.stage1.learning_rate', '1e-3', 'float'),
    ('optim.stage1.learning_rate', False, 'float'),
    ('data.buckets.prefix', 12, 'a tuple of int'), ('data.buckets.prefix', (1, 2.5), 'int'),
    ('eval.sets', 'a.jsonl', 'a tuple of str')])
def test_ill_typed(raw, key, value, expected):
  """A value of another type is an error that says both."""
  put(raw, key, value)
  with pytest.raises(InputError, match=f'config.{key} is .*expected {expected}'):
    check(raw)


def test_a_value_for_a_group(raw):
  """A group cannot be replaced by a value."""
  put(raw, 'rim', 3)
  with pytest.raises(InputError, match='config.rim is 3; expected a group of keys'):
    check(raw)


def test_whole_floats_and_lists(raw):
  """An integer for a float and a list for a tuple are what they mean."""
  put(raw, 'optim.max_grad_norm', 1)
  put(raw, 'data.buckets.count', [1, 5])
  frozen = check(raw)
  assert type(frozen.optim.max_grad_norm) is float
  assert frozen.data.buckets.count == (1, 5)


@pytest.mark.parametrize('key', CHOICES)
def test_choices(raw, key):
  """Every choice is accepted and nothing else of its type."""
  for choice in CHOICES[key]:
    if choice in TEXTS or choice in NOT_CAUSAL:  # of language modelling only
      put(raw, 'method', 'language_model')
      put(raw, 'data.name', 'text')
    put(raw, key, choice)
    if choice == 'memory':  # something must have been read
      put(raw, 'imm.write_policy', 'gated')
    if choice == 'cudnn':
      put(raw, 'model.dtype', 'bfloat16')
    if key == 'model.frozen_dtype':  # something must be frozen
      put(raw, 'optim.trainable', 'new')
    if (key, choice) != ('tokenizer.kind', 'file'):  # needs a path beside it
      assert get(check(raw), key) == choice
  put(raw, key, 7 if isinstance(CHOICES[key][0], int) else 'nothing')
  with pytest.raises(InputError, match=f'config.{key} is .*expected one of'):
    check(raw)


@pytest.mark.parametrize('key', POSITIVE)
def test_positive(raw, key):
  """What must be at least 1 may not be 0."""
  put(raw, key, 0)
  with pytest.raises(InputError, match=f'config.{key} is 0; expected at least 1'):
    check(raw)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_no_number_that_is_none(raw, value):
  """NaN and infinity are refused wherever a float stands."""
  for key, old in flatten(raw).items():
    if type(old) is float:
      put(raw, key, value)
      with pytest.raises(InputError, match=f'config.{key} is {value}'):
        check(raw)
      put(raw, key, old)
  check(raw)


def test_no_negative_numbers(raw):
  """No number in the configuration may be negative."""
  for key, value in flatten(raw).items():
    if type(value) in (int, float) and key not in SIGNED:
      put(raw, key, type(value)(-1))
      with pytest.raises(InputError, match=f'config.{key} is -1'):
        check(raw)
      put(raw, key, value)
  check(raw)


@pytest.mark.parametrize('changes,message', [
    ({'data.arithmetic.min_steps': 5, 'data.arithmetic.max_steps': 4},
     'max_steps is 4, below min_steps 5'),
    ({'data.arithmetic.operations': ''}, 'one or more of the characters'),
    ({'model.attention': 'cudnn', 'model.dtype': 'float32'}, "'cudnn', which has no float32"),
    ({'data.arithmetic.operations': '+/'}, 'one or more of the characters'),
    ({'data.buckets.prefix': (32, 12)}, 'buckets.prefix is .*increasing sizes'),
    ({'data.buckets.prefix': ()}, 'buckets.prefix is .*increasing sizes'),
    ({'data.buckets.count': (1, 1)}, 'buckets.count is .*increasing sizes'),
    ({'data.buckets.readout': (0, 1)}, 'buckets.readout is .*at least 1'),
    ({'model.embed_dim': 64, 'model.num_heads': 3}, 'width 64 is not a multiple .*heads 3'),
    ({'model.position_embedding': 'rotary', 'model.embed_dim': 12, 'model.num_heads': 4},
     'rotary .* even head size; found 3'),
    ({'optim.batch_size': 10, 'optim.grad_accum_steps': 4}, 'batch_size 10 is not a multiple'),
    ({'optim.stage1.dropout': 1.0}, 'stage1.dropout is 1.0; expected less than 1'),
    ({'optim.stage2.warmup': 1.5}, 'stage2.warmup is 1.5; expected a share'),
    ({'data.graphs.max_hops': 2}, 'min_hops 3, max_hops 2 and 28 nodes; expected min_hops <='),
    ({'data.graphs.nodes': 8}, 'max_hops 6 and 8 nodes'),
    ({'eval.checkpoint_selection': 'paper', 'method': 'language_model', 'data.name': 'text'},
     'method language_model answers no'),
    ({'tokenizer.kind': 'file'}, 'tokenizer.path is empty'),
    ({'reasoning_decoder.source': 'memory'}, "imm.write_policy is ''; expected a policy"),
    ({'reasoning_decoder.source': 'blocks', 'method': 'direct'}, 'method direct has none'),
    ({'reasoning_decoder.source': 'memory', 'method': 'language_model', 'data.name': 'text'},
     'no reasoning to say')
    ])
def test_keys_together(raw, changes, message):
  """What two keys say together must make sense."""
  for key, value in changes.items():
    put(raw, key, value)
  with pytest.raises(InputError, match=message):
    check(raw)


def test_difference(raw):
  """Each key that differs, old -> new, those ignored and equal ones left out."""
  put(raw, 'rim.blocks', 5)
  put(raw, 'data.buckets.count', (1, 5))
  old = dataclasses.asdict(check(raw))
  put(raw, 'rim.blocks', 7)
  put(raw, 'eval.samples', 8)
  put(raw, 'data.buckets.count', (1, 7))
  new = dataclasses.asdict(check(raw))
  assert difference(old, old) == []
  assert difference(old, new) == [
      'config.data.buckets.count: [1, 5] -> [1, 7]',
      'config.eval.samples: 0 -> 8', 'config.rim.blocks: 5 -> 7']
  assert difference(old, new, ('eval.', 'data.')) == ['config.rim.blocks: 5 -> 7']
  del new['seed']
  assert "config.seed: 0 -> '(absent)'" in difference(old, new)


def test_difference_after_json(raw):
  """A list read back from JSON is the tuple that was written."""
  new = dataclasses.asdict(check(raw))
  old = {**new, 'eval': {**new['eval'], 'sets': []},
         'data': {**new['data'], 'buckets': {k: list(v) for k, v in
                                             new['data']['buckets'].items()}}}
  assert difference(old, new) == []


def test_choices_and_limits_name_real_keys(raw):
  """A renamed key cannot leave its check behind."""
  known = flatten(check(raw))
  assert set(CHOICES) | set(POSITIVE) <= set(known)


def test_every_key_is_explained():
  """A key in the config file has a comment, or follows a line or two that have one.

  What a comment explained once needs none in the other stage.
  """
  silent, explained = 0, set()
  for line in FILE.read_text().splitlines():
    if 'ConfigDict()' in line or not line.strip():
      silent = 0
    elif key := re.match(r'  \w+\.(\w+) = ', line):
      if '#' in line:
        explained.add(key[1])
      silent = 0 if key[1] in explained else silent + 1
      assert silent <= 3, line


def test_config_file_says_how_to_run():
  """It opens with its command."""
  head = FILE.read_text().split('"""')[1]
  assert 'python -m latent_reasoning.main --config=configs/rim_arithmetic.py' in head


def test_no_defaults():
  """No field of a configuration has a default: it lives in the config file."""
  groups = [c for c in vars(config_lib).values() if dataclasses.is_dataclass(c)]
  assert len(groups) >= 9
  for group in groups:
    for field in dataclasses.fields(group):
      assert field.default is field.default_factory is dataclasses.MISSING, field.name
