"""Fixtures that several test files share."""

import gc
import importlib.util
import os
import pathlib
import sys

import pytest

from latent_reasoning.config import (
  ArithmeticConfig,
  BucketConfig,
  Config,
  DataConfig,
  GraphConfig,
)
from latent_reasoning.config_loading import from_dict


@pytest.fixture(scope='session')
def data_config() -> DataConfig:
  """A DataConfig to be changed with `dataclasses.replace`."""
  return DataConfig(
      name='files', path='', seq_len=8, dir='', train='', valid='', test='', cache_dir='',
      steps='equations',
      step_marks=False, on_error='raise', too_long='raise', valid_size=2, limit=0,
      sort_window=1,
      arithmetic=ArithmeticConfig(
          min_steps=1, max_steps=4, modulus=10, max_value=9, operations='+-*',
          templates=1, train_size=300, valid_size=100, test_size=100),
      graphs=GraphConfig(
          min_hops=3, max_hops=6, nodes=28, parents=1.5, concepts=38, train_size=300,
          valid_size=100, test_size=100),
      buckets=BucketConfig(prefix=(64,), readout=(16,), count=(4,)))


@pytest.fixture
def shared_data() -> pathlib.Path:
  """The folder of public data sets, beside the checkout or named by the environment."""
  beside = pathlib.Path(__file__).resolve().parents[1] / '../shared/data'
  path = pathlib.Path(os.environ.get('LATENT_REASONING_DATA', beside))
  if not path.is_dir():
    pytest.skip(f'no public data at {path}; set LATENT_REASONING_DATA')
  return path


# A small world in which every method fits: 2 or 3 operations, 2 layers of width 16.
TINY = {
    'data.arithmetic.min_steps': 2, 'data.arithmetic.max_steps': 3,
    'data.arithmetic.train_size': 40, 'data.arithmetic.valid_size': 12,
    'data.arithmetic.test_size': 12,
    'data.buckets.prefix': (12, 20), 'data.buckets.readout': (1, 6, 24),
    'data.buckets.count': (1, 3), 'tokenizer.pad_to': 1,
    'model.num_layers': 2, 'model.embed_dim': 16, 'model.num_heads': 2, 'model.mlp_dim': 32,
    'model.max_positions': 48, 'model.position_embedding': 'learned',
    'model.tie_embeddings': True,
    'model.bias': True, 'model.scan': False, 'model.remat': 'none',
    'rim.blocks': 3, 'rim.block_tokens': 1, 'rim.max_steps': 3, 'baselines.pause_tokens': 3,
    'rim.readout_offset': 1, 'rim.schedule': 'uniform', 'rim.block_attention': 'causal',
    'rim.readout_sees_question': True,
    'imm.chunk': 4, 'optim.stage1.optimizer': 'adamw', 'optim.stage2.optimizer': 'adamw',
    'optim.batch_size': 8, 'optim.grad_accum_steps': 1,
    'optim.stage1.steps': 8, 'optim.stage2.steps': 6,
    'optim.stage1.dropout': 0.0, 'optim.stage2.dropout': 0.0,
    'train.log_every': 2, 'train.eval_every': 4, 'train.save_every': 4,
    'train.compilation_cache': '',
    'eval.batch_size': 4, 'eval.valid_problems': 8, 'eval.max_new_tokens': 6,
    'eval.latency_repeats': 2, 'eval.leakage_rows': 3}


@pytest.fixture(scope='session')
def default_config():
  """`get_config` of configs/rim_arithmetic.py, found beside this folder."""
  path = pathlib.Path(__file__).resolve().parents[1] / 'configs/rim_arithmetic.py'
  spec = importlib.util.spec_from_file_location('rim_arithmetic', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config


@pytest.fixture(scope='session')
def tiny_config(default_config):
  """Makes a small frozen Config: tiny_config(**{'method': 'cot', 'rim.blocks': 2})."""
  def make(**changes) -> Config:
    config = default_config()
    config.update_from_flattened_dict({**TINY, **changes})
    return from_dict(config)
  return make


@pytest.fixture(scope='session')
def make_run():
  """Builds the `Experiment` of a Config in a new folder: make_run(config, tmp_path)."""
  def make(config: Config, path):
    from latent_reasoning import experiment
    from latent_reasoning.train import workdir  # imports JAX, which few fixtures need
    return experiment.build(config, workdir.open_workdir(path, config, training=True))
  return make


@pytest.fixture(scope='session')
def random_params():
  """Parameters of a model from NumPy: random_params(model, batch, std=0.2, seed=0).

  Quicker than `init`, which compiles; larger, so that no two tokens are nearly alike.
  """
  def make(model, batch, std: float = 0.2, seed: int = 0):
    import jax
    import numpy as np
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch.tokens, batch.positions,
                            batch.mask)['params']
    def draw(path, leaf):
      mean = 1.0 if path[-1].key == 'scale' else 0.0  # of a norm
      return jax.numpy.asarray(rng.normal(mean, std, leaf.shape).astype(leaf.dtype))
    return jax.tree_util.tree_map_with_path(draw, shapes)
  return make


@pytest.fixture(scope='session')
def make_checkpoint():
  """A random checkpoint as a hub would hold it: make_checkpoint(folder, kind, sizes).

  Its byte-level BPE is trained on `texts` and has `tokens` entries, its table has `rows`.
  """
  torch = pytest.importorskip('torch', reason="pip install -e '.[test-hf]'")
  transformers = pytest.importorskip('transformers',
                                     reason="pip install -e '.[test-hf]'")

  def make(folder, kind, sizes, texts=('1+2',), tokens=256, rows=260, std=0.02):
    import tokenizers
    base = tokenizers.Tokenizer(tokenizers.models.BPE())
    base.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = tokenizers.decoders.ByteLevel()
    base.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=tokens, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    base.add_special_tokens(['<|endoftext|>'])
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, vocab_size=rows, initializer_range=std,
                                               **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    base.save(str(folder / 'tokenizer.json'))
    return folder
  return make


@pytest.fixture(scope='module')
def quick_compilation():
  """Compiles without most optimizations: of tiny models, compiling takes all the time."""
  import jax
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(autouse=True, scope='module')
def few_programs():
  """Forgets what was compiled for a file of tests: each program takes some of the memory maps
  that a process may have (vm.max_map_count), and a worker without one left dies."""
  yield
  if 'jax' in sys.modules:
    import jax
    jax.clear_caches()
    gc.collect()
