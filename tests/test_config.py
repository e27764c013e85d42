"""The boundary: what a configuration may say."""

import dataclasses
import pathlib
import re
import typing

import ml_collections
import pytest

from latent_reasoning import config as config_lib
from latent_reasoning.config import NOT_CAUSAL, TEXTS, Config, difference, flatten, get
from latent_reasoning.config_loading import from_dict, help_text, read
from latent_reasoning.errors import InputError


def fields(cls: type = config_lib.Config, prefix: str = ''):
  """(key, type, field) of every key."""
  hints = typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    if dataclasses.is_dataclass(hints[field.name]):
      yield from fields(hints[field.name], f'{prefix}{field.name}.')
    else:
      yield f'{prefix}{field.name}', hints[field.name], field


CHOICES = {key: typing.get_args(hint) for key, hint, _ in fields()
           if typing.get_origin(hint) is typing.Literal}
POSITIVE = [key for key, _, field in fields() if field.metadata['at_least'] == 1]
SIGNED = [key for key, _, field in fields() if field.metadata['at_least'] < 0]
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


@pytest.mark.parametrize('change, said', [
    (lambda c: setattr(c.optim, 'batch_size', 32), r"\{'optim.batch_size': 32\}"),
    (lambda c: setattr(c, 'method', 'cot'), r"\{'method': 'cot'\}"),
    (lambda c: c.__setitem__('rim.blocks', 2), r"\{'rim.blocks': 2\}"),
    (lambda c: setattr(c.rim, 'colour', 2), 'cannot set colour')])
def test_a_change_in_place_says_how_to_change(raw, change, said):
  with pytest.raises(dataclasses.FrozenInstanceError, match=f'config.replace.*{said}|{said}'):
    change(check(raw))


@pytest.mark.parametrize('name, keys', [
    ('lr', ('optim.stage1.learning_rate', 'optim.stage2.learning_rate')),
    ('optim.steps', ('optim.stage1.steps', 'optim.stage2.steps')), ('seed', ('seed',)),
    ('model.blocks', ('rim.blocks', 'eval.blocks')), ('xyzzy', ())])
def test_keys_of_other_groups(name, keys):
  """Who knows a key's last part finds the whole."""
  said = config_lib.elsewhere(name)
  assert bool(said) == bool(keys) and all(f'config.{key}' in said for key in keys)
  if name != 'seed':
    with pytest.raises(InputError, match='is unknown') as error:
      config_lib.Config().replace(**{name: 1})
    assert said in str(error.value)


@pytest.mark.parametrize('key,near', [
    ('optim.stage1.learning_rat', 'learning_rate'), ('rim.block_token', 'block_tokens'),
    ('Seed', 'seed')])
def test_unknown_key(raw, key, near):
  """The error names the key and the nearest known one."""
  put(raw, key, 1)
  with pytest.raises(InputError, match=f"config.{key} is unknown; did you mean '{near}'"):
    check(raw)


@pytest.mark.parametrize('old, new', sorted(config_lib.MOVED.items()))
def test_renamed_key(old, new):
  """An old key is refused with the name that it, or its group, has now."""
  raw = 1
  for name in reversed(old.split('.')):
    raw = {name: raw}
  with pytest.raises(InputError, match=r'config\.[\w.]+ is now config\.([\w.]+)') as error:
    from_dict(raw)
  said = str(error.value).partition(' is now ')[2]
  assert f'config.{new}'.startswith(said)
  for one in re.findall(r'config\.([\w.]+)', said):
    assert any(key == one or key.startswith(f'{one}.') for key, *_ in fields())


@pytest.mark.parametrize('key, old', sorted(config_lib.MOVED_VALUES))
def test_renamed_value(raw, key, old):
  put(raw, key, old)
  new = config_lib.MOVED_VALUES[key, old]
  with pytest.raises(InputError, match=f'config.{key}={old} is now {new}'):
    check(raw)


def test_a_key_that_is_not_given_has_its_default():
  found = from_dict({'optim': {'batch_size': 7}, 'seed': 3})
  expected = config_lib.Config()
  expected = dataclasses.replace(expected, seed=3, optim=dataclasses.replace(
      expected.optim, batch_size=7))
  assert found == expected == from_dict(dataclasses.asdict(expected))


def test_default_is_locked_and_typed():
  config = config_lib.default()
  with pytest.raises(AttributeError, match='num_layer'):
    config.model.num_layer = 3
  with pytest.raises(TypeError):
    config.model.num_layers = 'four'
  assert from_dict(config) == config_lib.Config()


def test_help_names_every_key():
  """With its default, its values and its meaning."""
  text = help_text()
  for key, hint, field in fields():
    assert f'--config.{key}={field.default!r}' in text
    assert field.metadata['meaning'] and field.metadata['meaning'] in text
    assert all(repr(v) in text for v in typing.get_args(hint) if v is not Ellipsis
               and not isinstance(v, type))


@pytest.mark.parametrize('key,value,expected', [
    ('seed', 1.0, 'int'), ('seed', '0', 'int'), ('seed', True, 'int'),
    ('model.tie_embeddings', 1, 'bool'), ('data.dir', None, 'str'),
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
    if choice == 'patience':
      put(raw, 'optim.patience', 2)
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
  """What must be at least 1 may not be 0, nor an item of it."""
  put(raw, key, (0,) if isinstance(flatten(Config())[key], list) else 0)
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
    ({'data.buckets.prefix': (0,)}, 'buckets.prefix is .*increasing sizes'),
    ({'data.buckets.count': (1, 1)}, 'buckets.count is .*increasing sizes'),
    ({'data.buckets.readout': (0, 1)}, 'buckets.readout is .*at least 1'),
    ({'model.embed_dim': 64, 'model.num_heads': 3}, 'embed_dim 64 is not a multiple '
                                                    '.*num_heads 3'),
    ({'model.position_embedding': 'rotary', 'model.embed_dim': 12, 'model.num_heads': 4},
     'rotary .* even head size; found 3'),
    ({'optim.batch_size': 10, 'optim.grad_accum_steps': 4}, 'batch_size 10 is not a multiple'),
    ({'baselines.part_patience': 2, 'train.eval_every': 0}, 'eval_every is 0, and parts .*end'),
    ({'baselines.part_accuracy': 1.5}, 'part_accuracy is 1.5; expected a share'),
    ({'optim.stage1.dropout': 1.0}, 'stage1.dropout is 1.0; expected less than 1'),
    ({'optim.stage2.warmup': 1.5}, 'stage2.warmup is 1.5; expected a share'),
    ({'data.graphs.max_hops': 2}, 'min_hops 3, max_hops 2 and 28 nodes; expected min_hops <='),
    ({'data.graphs.nodes': 8}, 'max_hops 6 and 8 nodes'),
    ({'eval.checkpoint_selection': 'paper', 'method': 'language_model', 'data.name': 'text'},
     'method language_model answers no'),
    ({'tokenizer.kind': 'file'}, 'tokenizer.path is empty'),
    ({'reasoning_decoder.source': 'memory'}, "imm.write_policy is ''; expected a policy"),
    ({'aux.align': 0.1, 'aux.temperature': 0.0}, 'temperature is 0'),
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


def test_config_file_says_how_to_run():
  """It opens with its command."""
  head = FILE.read_text().split('"""')[1]
  assert 'python -m latent_reasoning.main --config=configs/rim_arithmetic.py' in head
