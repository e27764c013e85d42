"""Weights of Hugging Face: the same logits as transformers, every tensor accounted for."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_reasoning import hf_format, layout, pipeline, pretrained
from latent_reasoning.errors import InputError
from latent_reasoning.models.gpt import GPT, stack_layers

torch = pytest.importorskip('torch', reason='parity with PyTorch: pip install torch==2.13.0')
transformers = pytest.importorskip('transformers', reason="pip install 'transformers'")

pytestmark = pytest.mark.usefixtures('quick_compilation')

SMALL = {'hidden_size': 24, 'intermediate_size': 40, 'num_hidden_layers': 2,
         'num_attention_heads': 4, 'vocab_size': 37, 'max_position_embeddings': 64}
LLAMA3 = {'rope_type': 'llama3', 'rope_theta': 5e5, 'factor': 8.0, 'low_freq_factor': 1.0,
          'high_freq_factor': 4.0, 'original_max_position_embeddings': 16}
MODELS = {
    'gpt2': ('gpt2', {'n_layer': 2, 'n_embd': 24, 'n_head': 4, 'n_positions': 32,
                      'vocab_size': 37}),
    'gpt2, narrow MLP': ('gpt2', {'n_layer': 3, 'n_embd': 16, 'n_head': 2, 'n_inner': 24,
                                  'n_positions': 32, 'vocab_size': 37,
                                  'layer_norm_epsilon': 1e-3}),
    'llama': ('llama', {**SMALL}),
    'llama 2 of 4 heads, biases': ('llama', {
        **SMALL, 'num_key_value_heads': 2, 'attention_bias': True, 'mlp_bias': True}),
    'llama 3, one head, tied': ('llama', {
        **SMALL, 'num_key_value_heads': 1, 'tie_word_embeddings': True,
        'rope_parameters': LLAMA3}),
    'llama, linear, head size': ('llama', {
        **SMALL, 'head_dim': 10, 'rope_parameters': {
            'rope_type': 'linear', 'rope_theta': 1e4, 'factor': 2.0}}),
    'mistral': ('mistral', {**SMALL, 'num_key_value_heads': 2, 'sliding_window': 64}),
    'qwen2': ('qwen2', {**SMALL, 'num_key_value_heads': 2}),
    'qwen2 tied': ('qwen2', {**SMALL, 'num_key_value_heads': 1, 'tie_word_embeddings': True}),
    'qwen3': ('qwen3', {**SMALL, 'num_key_value_heads': 2, 'head_dim': 8}),
    'qwen3 with biases': ('qwen3', {**SMALL, 'num_key_value_heads': 4, 'head_dim': 6,
                                    'attention_bias': True, 'tie_word_embeddings': True})}


def make(folder, name, **changes):
  """A tiny random model of transformers, saved."""
  kind, sizes = MODELS[name]
  torch.manual_seed(0)
  config = transformers.AutoConfig.for_model(kind, **sizes, **changes)
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  with torch.no_grad():  # biases and norms begin at 0 and 1: nothing could be mistaken
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn(parameter.shape))
  model.save_pretrained(folder, max_shard_size=changes.pop('max_shard_size', '5GB'))
  return model


def ours(folder, base, tokens=37, vocab=40, **changes):
  """The same by `pretrained`: (model, params)."""
  values = pretrained.read_json(folder / 'config.json')
  config = dataclasses.replace(hf_format.model_config(values, base, 'config.json'),
                               init_from=str(folder), **changes)
  model = GPT(config, vocab)
  like = jax.eval_shape(model.init, jax.random.key(0), *batch([[1, 2]]))['params']
  return model, pretrained.load(config, like, tokens, jax.random.key(1), dict)


def batch(texts):
  rows = [layout.plain(t, ()) for t in texts]
  made = pipeline.collate(rows, max(map(len, texts)), 0, 0)
  return made.tokens, made.positions, made.mask


@pytest.fixture
def base(tiny_config):
  return tiny_config().model


TEXTS = [[5, 1, 30, 36, 2, 2, 9, 17, 20, 21, 8], [3, 3, 35]]


@pytest.mark.parametrize('name', MODELS)
def test_logits_of_transformers(name, base, tmp_path):
  """To 1e-4 with padding on the right; layer by layer where that fails."""
  theirs = make(tmp_path, name)
  model, params = ours(tmp_path, base)
  args = batch(TEXTS)
  hidden, _ = jax.jit(lambda p: model.apply({'params': p}, *args))(params)
  found = model.apply({'params': params}, hidden, method='head')
  with torch.no_grad():
    seen = theirs(torch.tensor(args[0]), attention_mask=torch.tensor(
        [[1] * 11, [1] * 3 + [0] * 8]), output_hidden_states=True)
  for b, text in enumerate(TEXTS):
    np.testing.assert_allclose(hidden[b, :len(text)],
                               seen.hidden_states[-1][b, :len(text)], atol=1e-4)
    np.testing.assert_allclose(found[b, :len(text), :37], seen.logits[b, :len(text)], atol=1e-4)


@pytest.mark.parametrize('name', ['gpt2', 'llama 3, one head, tied', 'qwen3'])
def test_padding_on_the_left(name, base, tmp_path):
  """A text whose row begins with padding, which it does not see."""
  theirs = make(tmp_path, name)
  model, params = ours(tmp_path, base)
  tokens = np.array([[0, 0, 0, *TEXTS[0]]], np.int32)
  positions = np.maximum(np.arange(14) - 3, 0)[None].astype(np.int32)
  mask = batch(tokens.tolist())[2]
  mask = mask.replace(visible_from=np.where(np.arange(14) < 3, 0, 3)[None].astype(np.int32))
  hidden, _ = model.apply({'params': params}, tokens, positions, mask)
  found = model.apply({'params': params}, hidden, method='head')
  with torch.no_grad():
    seen = theirs(torch.tensor(tokens), position_ids=torch.tensor(positions),
                  attention_mask=torch.tensor([[0] * 3 + [1] * 11]))
  np.testing.assert_allclose(found[0, 3:, :37], seen.logits[0, 3:], atol=1e-4)


@pytest.mark.parametrize('name', ['gpt2', 'qwen3'])
def test_shards_scan_and_types(name, base, tmp_path):
  """Sharded, of another type on disk, or scanned: the same parameters."""
  model = make(tmp_path / 'whole', name)
  model.save_pretrained(tmp_path / 'cut', max_shard_size='10KB')
  assert len(list((tmp_path / 'cut').glob('*.safetensors'))) > 1
  one, cut = (ours(tmp_path / folder, base)[1] for folder in ('whole', 'cut'))
  jax.tree.map(np.testing.assert_array_equal, one, cut)
  _, stacked = ours(tmp_path / 'cut', base, scan=True)
  jax.tree.map(np.testing.assert_array_equal, stack_layers(one, 2), stacked)
  for kind, size in ((torch.bfloat16, 8), (torch.float16, 11)):
    copy.deepcopy(model).to(kind).save_pretrained(tmp_path / 'half')
    _, half = ours(tmp_path / 'half', base)
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(half))
    np.testing.assert_allclose(half['norm']['scale'], one['norm']['scale'], rtol=2.0**-size)


def test_new_rows(base, tmp_path):
  """Rows of the vocabulary that the checkpoint does not know: its mean, plus noise, by key."""
  make(tmp_path, 'qwen2')
  _, params = ours(tmp_path, base, tokens=33, vocab=48)
  table, head = params['embedding'], params['head'].T
  for rows in (table, head):
    known, new = rows[:33], rows[33:]
    spread = known.std(0)
    assert (np.abs(new - known.mean(0)) < 0.5 * spread).all()
    assert len(np.unique(np.asarray(new), axis=0)) == 15
  _, again = ours(tmp_path, base, tokens=33, vocab=48)
  np.testing.assert_array_equal(again['embedding'], table)


def test_old_spellings(base):
  """Rotary positions as transformers 4 wrote them are those of version 5."""
  new = {**SMALL, 'model_type': 'llama', 'rms_norm_eps': 1e-5, 'rope_parameters': LLAMA3}
  old = {**SMALL, 'model_type': 'llama', 'rms_norm_eps': 1e-5, 'rope_theta': 5e5,
         'rope_scaling': {k: v for k, v in LLAMA3.items() if k != 'rope_theta'}}
  assert (hf_format.model_config(new, base, 'a')
          == hf_format.model_config(old, base, 'b'))
  old['rope_scaling']['type'] = old['rope_scaling'].pop('rope_type')
  assert (hf_format.model_config(new, base, 'a')
          == hf_format.model_config(old, base, 'b'))


@pytest.mark.parametrize('changes, message', [
    ({'model_type': 'bert'}, "model_type is 'bert'; expected one of"),
    ({'partial_rotary_factor': 0.5}, "the key 'partial_rotary_factor' .* is not supported"),
    ({'hidden_act': 'gelu'}, "hidden_act is 'gelu'; supported"),
    ({'layer_types': ['full_attention', 'sliding_attention']}, 'layer_types has'),
    ({'rope_parameters': {'rope_type': 'yarn', 'factor': 4.0}}, "of type 'yarn'; supported"),
    ({'rope_parameters': {'rope_type': 'llama3', 'factor': 4.0}}, "'llama3' without"),
    ({'use_sliding_window': True}, 'use_sliding_window is True'),
    ({'rms_norm_eps': None, 'num_hidden_layers': None}, 'num_hidden_layers is missing')])
def test_unsupported_configuration(base, changes, message):
  """What a config.json says that we cannot do is named, not ignored."""
  values = {**SMALL, 'model_type': 'llama', 'rms_norm_eps': 1e-5, **changes}
  values = {k: v for k, v in values.items() if v is not None}
  with pytest.raises(InputError, match=message):
    hf_format.model_config(values, base, 'config.json')


def truncate(folder):
  file = folder / 'model.safetensors'
  file.write_bytes(file.read_bytes()[:-100])


def rewrite(change):
  """Applies a change to the tensors of a file."""
  def damage(folder):
    from safetensors.numpy import load_file, save_file
    held = load_file(folder / 'model.safetensors')
    change(held)
    save_file(held, folder / 'model.safetensors')
  return damage


def pickle(folder):
  (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')


def index(weight_map):
  def damage(folder):
    (folder / 'model.safetensors.index.json').write_text(json.dumps(weight_map))
  return damage


NORM, DOWN = 'model.norm.weight', 'model.layers.1.mlp.down_proj.weight'


@pytest.mark.parametrize('damage, message', [
    (truncate, 'no sound safetensors file .* cut off'),
    (rewrite(lambda held: held.pop(NORM)), '1 tensors are missing: norm.weight'),
    (rewrite(lambda held: held.update({DOWN: np.ascontiguousarray(held[DOWN].T)})),
     r'1 have another shape: model.layers.1.mlp.down_proj.weight .*found \[24, 40\]'),
    (rewrite(lambda held: held.update(extra=np.zeros(3, np.float32))), '1 are surplus: extra'),
    (pickle, 'pytorch_model.bin is a pickle, .* never read'),
    (index({'weight_map': {'a': '../elsewhere.safetensors'}}), 'expected a file beside it'),
    (index({'weight_map': {'a': 'absent.safetensors'}}), 'absent.safetensors is missing'),
    (index({'weights': {}}), "has no object 'weight_map'"),
    (lambda folder: (folder / 'config.json').unlink(), 'config.json does not exist'),
    (lambda folder: (folder / 'config.json').write_text('{'), 'cannot be read as JSON')])
def test_damaged_checkpoint(base, tmp_path, damage, message):
  """Each kind of damage is one clear error."""
  make(tmp_path, 'llama')
  damage(tmp_path)
  with pytest.raises(InputError, match=message):
    ours(tmp_path, base)


def test_no_such_checkpoint():
  with pytest.raises(InputError, match='is no directory here'):
    pretrained.directory('../nowhere/to be found')
