"""Mutated files end in one clear error or are read; never in a traceback, for long or in
memory. 10,000 each: pytest -m slow tests/test_fuzz.py"""

import json
import resource
import time

import numpy as np
import pytest
from report.test_comparison import run as write_run

from latent_reasoning.data import formats
from latent_reasoning.errors import InputError
from latent_reasoning.hf import families
from latent_reasoning.hf import load as pretrained
from latent_reasoning.report import page as page_lib
from latent_reasoning.report import runs
from latent_reasoning.train import metrics

VALUES = [None, True, -1, 0, 1, 1.5, 2**31, 10**30, float('nan'), float('inf'), '', 'x',
          '\u2028', [], {}, [[]], {'a': 1}, '12', '../x', [1, 'a', None]]
ROW = {'question': 'Two and three?', 'steps': ['2+3=5', '5*2=10'], 'answer': '10'}
CONFIG = {'model_type': 'llama', 'num_hidden_layers': 2, 'hidden_size': 8,
          'intermediate_size': 8, 'num_attention_heads': 2, 'num_key_value_heads': 1,
          'head_dim': 4, 'vocab_size': 16, 'rms_norm_eps': 1e-5, 'max_position_embeddings': 32,
          'tie_word_embeddings': True, 'rope_theta': 1e4, 'layer_types': ['full_attention'],
          'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0,
                           'high_freq_factor': 4.0, 'original_max_position_embeddings': 16}}


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
  """A few random changes of bytes, or of values where it is JSON."""
  if rng.random() < 0.6:
    try:
      value = json.loads(content)
      for _ in range(rng.integers(1, 4)):
        value = _changed(value, rng)
      return json.dumps(value).encode()
    except ValueError:
      pass
  content = bytearray(content)
  for _ in range(rng.integers(1, 8)):
    at = int(rng.integers(len(content) + 1))
    kind = rng.integers(5)
    if kind == 0 and content:
      content[at % len(content)] = int(rng.integers(256))
    elif kind == 1:
      content[at:at] = bytes(rng.choice(list(b'{}[]",:0123456789eE-+.\\\xff\n '), 3).tolist())
    elif kind == 2:
      del content[at:at + int(rng.integers(1, 20))]
    elif kind == 3:
      content[at:at] = content[at:at + int(rng.integers(1, 40))]
    else:
      content[at:at] = b'[' * int(rng.integers(1, 5000))
  return bytes(content)


def _changed(value, rng):
  """A JSON value with one value or key in it changed."""
  if isinstance(value, dict) and value and rng.random() < 0.8:
    key = list(value)[rng.integers(len(value))]
    kind = rng.integers(4)
    if kind == 0:
      return {k: v for k, v in value.items() if k != key}
    if kind == 1:
      return {**value, str(VALUES[rng.integers(len(VALUES))]): value[key]}
    return {**value, key: _changed(value[key], rng)}
  if isinstance(value, list) and value and rng.random() < 0.8:
    i = rng.integers(len(value))
    return [*value[:i], _changed(value[i], rng), *value[i + 1:]]
  return VALUES[rng.integers(len(VALUES))]


@pytest.fixture(scope='module')
def targets(data_config, tiny_config, tmp_path_factory):
  """{kind: (a sound file's content, its reader)}."""
  from safetensors.numpy import save
  folder = tmp_path_factory.mktemp('fuzz')

  def data_line(content):
    (folder / 'rows.jsonl').write_bytes(content)
    formats.read(folder / 'rows.jsonl', data_config)

  def config_json(content):
    (folder / 'config.json').write_bytes(content)
    values = pretrained.read_json(folder / 'config.json')
    families.model_config(values, tiny_config().model, 'config.json')

  def header(content):
    size = int.from_bytes(tensors[:8], 'little')
    (folder / 'model.safetensors').write_bytes(
        len(content).to_bytes(8, 'little') + content + tensors[8 + size:])
    for tensor in pretrained.tensors(folder).values():
      if tensor.dtype in pretrained.FLOATS:
        tensor.read()
  tensors = save({'a': np.ones((2, 3), np.float32), 'b': np.ones(4, np.float16)})
  size = int.from_bytes(tensors[:8], 'little')


  def of_run(name):
    page = tmp_path_factory.mktemp('page')
    for seed in (0, 1):
      write_run(page / f'rim-{seed}', 'rim', seed, [1, 0, 1, 0])

    def read(content):
      (page / f'rim-0/{name}').write_bytes(content)
      found = runs.find([page])
      page_lib.render_html(page_lib.build(found, [page]))
      if found.problems:
        raise InputError(found.problems[0])
    return (page / f'rim-0/{name}').read_bytes(), read

  def log(content):
    (folder / 'metrics.jsonl').write_bytes(content)
    whole = content.count(b'\n') + 1
    if len(metrics.read(folder / 'metrics.jsonl')) < whole - 1:
      raise InputError('lines are damaged')
  record = b'{"step": 1, "stage": 1, "split": "train", "loss": 1.5, "steps_per_second": 2.0}'
  return {'metrics.jsonl': (record + b'\n' + record.replace(b'1,', b'2,'), log),
          **{name: of_run(name) for name in PAGE},
          'data line': (json.dumps(ROW).encode() + b'\n', data_line),
          'config.json': (json.dumps(CONFIG).encode(), config_json),
          'safetensors header': (tensors[8:8 + size], header)}


PAGE = ('results.json', 'predictions.jsonl')  # of a run, as the page reads them
KINDS = ('data line', 'config.json', 'safetensors header', 'metrics.jsonl', *PAGE)


def run(target, count, capsys):
  """Reads mutations of a sound file; says how many were refused."""
  content, read = target
  read(content)
  refused, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  for seed in range(count):
    changed, began = mutate(content, np.random.default_rng(seed)), time.monotonic()
    try:
      read(changed)
    except InputError as error:
      refused += 1
      assert str(error) and len(str(error)) < 5000
    assert time.monotonic() - began < 10, changed[:200]
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
  assert grown < 2 * 2**20, f'{grown} KiB'  # kibibytes
  assert 0 < refused
  capsys.readouterr()  # its warnings
  return refused


@pytest.mark.parametrize('kind', [  # a page and its figures are written of each mutation
    pytest.param(kind, marks=pytest.mark.integration) if kind in PAGE else kind
    for kind in KINDS])
def test_some(kind, targets, capsys):
  run(targets[kind], 200, capsys)


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_ten_thousand(kind, targets, capsys):
  print(kind, run(targets[kind], 10_000, capsys), 'of 10,000 refused')
