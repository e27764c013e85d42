"""A GGUF is the checkpoint that it was made of: parameters, sizes and tokens.

  LATENT_REASONING_MODEL=DIRECTORY pytest -m slow -n 0 tests/hf/test_gguf.py

compares the tokens of a real SmolLM2's files, too.
"""

import dataclasses
import json
import os
import pathlib
import sys

import jax
import numpy as np
import pytest
import tokenizers
from hf.test_families import LLAMA3, SMALL

from latent_reasoning import experiment
from latent_reasoning.data import gguf_file, tokenizer_files
from latent_reasoning.data.tokenizers import Tokenizer
from latent_reasoning.errors import InputError
from latent_reasoning.hf import export, families
from latent_reasoning.hf import gguf as gguf_lib
from latent_reasoning.hf import load as pretrained
from latent_reasoning.models import layers
from latent_reasoning.models.transformer import Transformer

gguf = pytest.importorskip('gguf', reason="pip install -e '.[gguf]'")
Kind = gguf.GGMLQuantizationType

ROWS = 37
LIKE = {**SMALL, 'hidden_size': 32, 'intermediate_size': 64, 'num_key_value_heads': 2,
        'vocab_size': ROWS, 'rms_norm_eps': 1e-5}
MODELS = {
    'llama': LIKE,
    'llama, tied': {**LIKE, 'num_key_value_heads': 1, 'tie_word_embeddings': True,
                    'rope_theta': 1e5},
    'llama, biases': {**LIKE, 'attention_bias': True, 'mlp_bias': True},
    'llama 3': {**LIKE, 'rope_parameters': {
        **LLAMA3, 'original_max_position_embeddings': 8192}},
    'qwen2': {**LIKE, 'tie_word_embeddings': True}, 'qwen3': {**LIKE, 'head_dim': 10},
    'gpt2': {'n_layer': 2, 'n_embd': 32, 'n_head': 2, 'n_positions': 48, 'vocab_size': ROWS}}
TEXTS = ('Ada has 12 apples; she’ll buy 345.\n\n', 'café “naïve” 漢字 e\u0301 3.5*4 = 14\n',
         '<|endoftext|> a  b', '1000+2345-  7')


def model_of(name, base):
  kind = name.partition(' ')[0].strip(',')
  return kind, families.model_config({'model_type': kind, **MODELS[name]}, base, 'config.json')


def shapes(model, vocab=40):
  rows = np.zeros((1, 2), np.int32)
  from latent_reasoning import batching, sequences
  batch = batching.collate([sequences.causal([1, 2], ())], 2, 0, 0)
  return jax.eval_shape(Transformer(model, vocab).init, jax.random.key(0), rows,
                        batch.positions, batch.mask)['params']


def bpe():
  """A tokenizer as SmolLM's: digits alone, byte-level BPE, control tokens first."""
  base = tokenizers.Tokenizer(tokenizers.models.BPE())
  base.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
      tokenizers.pre_tokenizers.Digits(individual_digits=True),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
  base.decoder = tokenizers.decoders.ByteLevel()
  base.train_from_iterator(['she has apples and a 12 345 banana apples'] * 3,
                           tokenizers.trainers.BpeTrainer(
      vocab_size=290, show_progress=False, special_tokens=['<|endoftext|>', '<|im_start|>'],
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
  return json.loads(base.to_str())


def write_tokenizer(writer, held, pre='smollm', tokens_of='gpt2', **more):
  """The metadata that llama.cpp's converter makes of a tokenizer.json."""
  special = {t['id'] for t in held['added_tokens']}
  entries = {**held['model']['vocab'], **{t['content']: t['id'] for t in held['added_tokens']}}
  writer.add_tokenizer_model(tokens_of)
  if pre:
    writer.add_tokenizer_pre(pre)
  tokens = [t for t, _ in sorted(entries.items(), key=lambda item: item[1])]
  writer.add_token_list([*tokens, '[PAD]'])
  writer.add_token_types([*(3 if i in special else 1 for i in range(len(tokens))), 5])
  writer.add_token_merges([m if isinstance(m, str) else ' '.join(m)
                           for m in held['model']['merges']])
  writer.add_bos_token_id(1)
  for key, value in more.items():
    writer.add_bool(f'tokenizer.ggml.{key}', value)


def weights_of(config, seed=0, rows=ROWS):
  """Random parameters, and the same by the names of Hugging Face."""
  rng = np.random.default_rng(seed)
  params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32),
                        shapes(config.model, rows + 3))
  return params, export.tensors(config, params, rows)


def write(path, kind, model, weights, held=None, quantized=None, extra=(), pre='smollm',
          **more):
  """A GGUF as llama.cpp's converter writes it."""
  writer = gguf.GGUFWriter(path, kind)
  writer.add_context_length(model.max_positions)
  writer.add_embedding_length(model.embed_dim)
  writer.add_block_count(model.num_layers)
  writer.add_feed_forward_length(model.mlp_dim)
  writer.add_head_count(model.num_heads)
  if kind == 'gpt2':
    writer.add_layer_norm_eps(model.norm_epsilon)
  else:
    writer.add_head_count_kv(model.num_kv_heads)
    writer.add_layer_norm_rms_eps(model.norm_epsilon)
    writer.add_rope_freq_base(model.rope.base)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
  for key, value in extra:
    writer.add_uint32(key, value)
  write_tokenizer(writer, held or bpe(), pre, **more)
  if model.rope.scaling == 'llama3':
    half = model.head_dim // 2
    plain = layers.frequencies(half, type(model.rope)(model.rope.base))
    writer.add_tensor('rope_freqs.weight', np.asarray(
        plain / layers.frequencies(half, model.rope), np.float32))
  arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
  names = gguf.get_tensor_name_map(arch, model.num_layers)
  for name, value in weights.items():
    if kind == 'llama' and ('q_proj' in name or 'k_proj' in name):
      heads = model.num_heads if 'q_proj' in name else model.num_kv_heads
      value = value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
    if kind == 'gpt2' and value.ndim == 2 and '.h.' in name:
      value = value.T
    value = np.ascontiguousarray(value)
    theirs = names.get_name(name, ('.weight', '.bias'))
    if quantized and value.ndim == 2:
      writer.add_tensor(theirs, gguf.quants.quantize(value, quantized), raw_dtype=quantized)
    else:
      writer.add_tensor(theirs, value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.fixture
def made(tiny_config, tmp_path):
  """made(name) -> (config, params, path of a GGUF)."""
  def make(name, **changes):
    kind, model = model_of(name, tiny_config().model)
    config = tiny_config().replace(**{'model': model})
    params, weights = weights_of(config)
    return config, params, write(tmp_path / 'a.gguf', kind, model, weights, **changes)
  return make


def loaded(path, model):
  return pretrained.load(model, shapes(model), ROWS, jax.random.key(1), dict)


@pytest.mark.parametrize('name', MODELS)
def test_sizes_and_parameters(name, made, tiny_config):
  """As of the files of Hugging Face, bit for bit; the maps' shapes, too."""
  config, params, path = made(name)
  found = pretrained.resolve(tiny_config(**{'model.init_from': str(path)}))
  assert found.model == dataclasses.replace(config.model, init_from=str(path))
  assert found.tokenizer.path == str(path) and found.tokenizer.at_least == ROWS
  back = loaded(path, found.model)
  for leaf, value in jax.tree_util.tree_leaves_with_path(params):
    name = leaf[-1].key
    cut = {'embedding': np.s_[:ROWS], 'head': np.s_[:, :ROWS]}.get(name, ...)
    at = back
    for part in leaf:
      at = at[part.key]
    np.testing.assert_array_equal(at[cut], value[cut], err_msg=str(leaf))
  for tensor in gguf_lib.tensors(path).values():
    assert tensor.read().shape == tensor.shape and tensor.dtype in pretrained.FLOATS


@pytest.mark.parametrize('kind, share', [('Q8_0', 0.01), ('Q4_1', 0.1), ('BF16', 0.01)])
def test_quantized(made, tiny_config, kind, share):
  """Dequantized by the package: near, and not the same."""
  config, params, path = made('llama', quantized=getattr(Kind, kind))
  model = pretrained.resolve(tiny_config(**{'model.init_from': str(path)})).model
  back = loaded(path, model)
  one, other = (np.asarray(p['block_1']['q']['kernel']) for p in (params, back))
  assert 0 < np.abs(one - other).max() < share * np.abs(one).max()


def same_tokens(held, text, texts):
  """Both give the same tokens, those of their own special tokens' spellings, too."""
  one, other = (Tokenizer(t, 3, 1) for t in (json.dumps(held), text))
  assert one.size == other.size and one.start == other.start
  for sample in texts:
    assert one.encode(sample) == other.encode(sample), sample
    assert other.decode(other.encode(sample)) == one.decode(one.encode(sample))


def test_tokens(made):
  """As of its tokenizer.json; digits alone."""
  held = bpe()
  path = made('llama', held=held)[2]
  same_tokens(held, tokenizer_files.read(str(path), 'auto'), TEXTS)
  found = Tokenizer(tokenizer_files.read(str(path), 'auto'), 3, 1)
  assert len(found.encode('345')) == 3 and not found.start
  assert Tokenizer(tokenizer_files.read(str(path), 'true'), 3, 1, add_bos='true').start == [1]


@pytest.mark.parametrize('pre, bos', [('llama-bpe', [1]), ('qwen2', []), ('gpt-2', [])])
def test_pre_tokenizers(made, pre, bos):
  """Split as transformers' own: Llama 3 up to three digits, Qwen 2 one by one."""
  path = made('llama', pre=pre)[2]
  text = tokenizer_files.read(str(path), 'auto')
  assert Tokenizer(text, 3, 1).start == bos
  split = tokenizers.Tokenizer.from_str(text).pre_tokenizer.pre_tokenize_str(
      "she'll buy 12345  pears\n")
  words = {'llama-bpe': ['123', '45'], 'qwen2': list('12345'), 'gpt-2': ['Ġ12345']}[pre]
  said = [word for word, _ in split]
  assert said[:2] == ['she', "'ll"]
  assert all(word in said for word in words)


def test_bos_as_the_file_says(made):
  path = made('llama', add_bos_token=True)[2]
  assert Tokenizer(tokenizer_files.read(str(path), 'auto'), 3, 1).start == [1]


def cut(path):
  path.write_bytes(path.read_bytes()[:-40])


def cut_early(path):
  path.write_bytes(path.read_bytes()[:300])


def renamed(old, new):
  def change(path):
    held = path.read_bytes()
    assert len(old) == len(new) and old in held
    path.write_bytes(held.replace(old, new))
  return change


def typed(number):
  """Another number for the type of a tensor."""
  def change(path):
    held = bytearray(path.read_bytes())
    at = held.index(b'output_norm.weight') + len(b'output_norm.weight') + 4 + 8
    held[at:at + 4] = number.to_bytes(4, 'little')
    path.write_bytes(held)
  return change


@pytest.mark.parametrize('damage, message', [
    (cut, 'no sound GGUF .*cut off'), (cut_early, 'no sound GGUF .*cut off'),
    (lambda path: path.write_bytes(b''), 'is no GGUF: it begins with'),
    (lambda path: path.write_text('{"a": 1}'), 'is no GGUF: it begins with'),
    (lambda path: path.unlink(), 'is no file here; expected the path of a GGUF'),
    (typed(250), 'quantized by a number of its own'),
    (typed(Kind.Q8_K.value), 'no sound GGUF|cannot dequantize'),
    (renamed(b'architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama',
             b'architecture\x08\0\0\0\x05\0\0\0\0\0\0\0mamba'), "of the architecture 'mamba'"),
    (renamed(b'token_embd.weight', b'token_embe.weight'), 'no tensor token_embd'),
    (renamed(b'blk.1.ffn_up.weight', b'blk.1.ffn_op.weight'),
     'missing: layers.1.mlp.up_proj.weight; 1 are surplus: blk.1.ffn_op.weight')])
def test_damage(made, tiny_config, damage, message):
  config, _, path = made('llama')
  damage(path)
  with pytest.raises(InputError, match=message) as error:
    model = pretrained.resolve(tiny_config(**{'model.init_from': str(path)})).model
    loaded(path, model)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('changes, message', [
    ({'pre': 'tekken'}, "pre-tokenizer 'tekken'; known are .*config.tokenizer.path"),
    ({'pre': ''}, 'pre-tokenizer None'),
    ({'tokens_of': 'llama'}, "tokenizer of the kind 'llama'; read is 'gpt2'")])
def test_unknown_tokenizers(made, changes, message):
  path = made('llama', **changes)[2]
  with pytest.raises(InputError, match=message):
    tokenizer_files.read(str(path), 'auto')


@pytest.mark.parametrize('extra, message', [
    ([('llama.expert_count', 8)], 'num_local_experts is 8'),
    ([('llama.residual_scale', 2)], 'metadata llama.residual_scale 2'),
    ([('split.count', 3)], 'one of 3 parts .*llama-gguf-split')])
def test_what_is_not_computed(made, tiny_config, extra, message):
  path = made('llama', extra=extra)[2]
  with pytest.raises(InputError, match=message):
    pretrained.resolve(tiny_config(**{'model.init_from': str(path)}))


def test_without_the_library(made, tiny_config, monkeypatch):
  path = made('llama')[2]
  gguf_file._opened.cache_clear()
  monkeypatch.setitem(sys.modules, 'gguf', None)
  with pytest.raises(InputError, match=r"needs a library, gguf: pip install -e '.\[gguf\]'"):
    pretrained.resolve(tiny_config(**{'model.init_from': str(path)}))


def test_no_adapter(made, tiny_config):
  """PEFT finds no model at a GGUF."""
  path = made('llama')[2]
  config = tiny_config(**{'model.init_from': str(path), 'model.lora.rank': 2,
                          'optim.trainable': 'new'})
  with pytest.raises(InputError, match='a GGUF. Expected --format=hf or native'):
    export.adapter(config, {}, 40)


@pytest.mark.integration
def test_a_run_begins_with_it(tiny_config, tmp_path):
  """From the file alone: sizes, tokenizer and weights; it answers, and is exported whole."""
  kind, model = model_of('llama, tied', tiny_config().model)
  config = tiny_config().replace(**{'model': model})
  held = bpe()
  weights = weights_of(config, rows=300)[1]
  path = write(tmp_path / 'a.gguf', kind, model, weights, held)
  run = experiment.open_run(tiny_config(**{
      'model.init_from': str(path), 'model.lora.rank': 2, 'optim.trainable': 'new'}),
      tmp_path / 'run')
  params = run.init().params
  assert run.tokenizer.size == len(held['model']['vocab'])
  np.testing.assert_array_equal(params['embedding'], weights['model.embed_tokens.weight'][
      :run.tokenizer.size])
  assert len(next(run.predictor(params).texts(['1+2']))) == run.config.rim.blocks
  export.write(run.config, params, run.tokenizer, tmp_path / 'export', None)
  again = experiment.open_run(tiny_config(**{'model.init_from': str(tmp_path / 'export')}),
                              tmp_path / 'again')
  np.testing.assert_array_equal(
      again.init().params['block_1']['q']['kernel'], params['block_1']['q']['kernel'])


@pytest.mark.slow
def test_tokens_of_smollm2(shared_data, tmp_path):
  folder = pathlib.Path(os.environ.get('LATENT_REASONING_MODEL', ''))
  if not (folder / 'tokenizer.json').is_file() or folder == pathlib.Path():
    pytest.skip('set LATENT_REASONING_MODEL to a folder of SmolLM2')
  held = json.loads((folder / 'tokenizer.json').read_text())
  writer = gguf.GGUFWriter(tmp_path / 'a.gguf', 'llama')
  write_tokenizer(writer, held)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  lines = next((shared_data / 'gsm8k').glob('*test*.jsonl')).read_text().splitlines()[:300]
  same_tokens(held, tokenizer_files.read(str(tmp_path / 'a.gguf'), 'auto'),
              [*TEXTS, *(text for line in lines for text in json.loads(line).values())])
