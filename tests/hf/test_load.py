"""Weights of Hugging Face: the same logits as transformers, every tensor accounted for."""

import copy
import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close
from hf.test_families import LLAMA3, SMALL

from latent_reasoning import batching, sequences
from latent_reasoning.errors import InputError
from latent_reasoning.hf import export, families
from latent_reasoning.hf import load as pretrained
from latent_reasoning.models import latents
from latent_reasoning.models.transformer import Transformer, stack_layers

torch = pytest.importorskip('torch', reason='parity with PyTorch: pip install torch==2.13.0')
transformers = pytest.importorskip('transformers', reason="pip install 'transformers'")

pytestmark = pytest.mark.usefixtures('quick_compilation')

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
DEEP = {**SMALL, 'num_hidden_layers': 4, 'num_key_value_heads': 2}  # layers that differ
MODELS.update({
    'gpt2, exact GELU': ('gpt2', {**MODELS['gpt2'][1], 'activation_function': 'gelu'}),
    'gpt2, ReLU': ('gpt2', {**MODELS['gpt2'][1], 'activation_function': 'relu'}),
    'gpt2, SiLU': ('gpt2', {**MODELS['gpt2'][1], 'activation_function': 'silu'}),
    'olmo2': ('olmo2', {**SMALL, 'num_key_value_heads': 2}),
    'smollm3': ('smollm3', {**DEEP, 'no_rope_layer_interval': 2, 'use_sliding_window': True,
                            'sliding_window': 4, 'pad_token_id': 0}),
    'gpt_neox': ('gpt_neox', {**SMALL, 'rotary_pct': 0.34}),
    'gpt_neox, one after the other': ('gpt_neox', {
        **SMALL, 'use_parallel_residual': False, 'hidden_act': 'gelu_new', 'rotary_pct': 1.0}),
    'phi3': ('phi3', {**SMALL, 'num_key_value_heads': 2, 'partial_rotary_factor': 0.34,
                      'sliding_window': 5, 'pad_token_id': 0}),
    'mistral with a window': ('mistral', {**SMALL, 'num_key_value_heads': 2,
                                          'sliding_window': 4}),
    'qwen2 with windows': ('qwen2', {**DEEP, 'use_sliding_window': True, 'sliding_window': 4,
                                     'max_window_layers': 2}),
    'qwen3 with windows': ('qwen3', {**DEEP, 'head_dim': 8, 'use_sliding_window': True,
                                     'sliding_window': 4, 'layer_types': [
                                         'sliding_attention', 'full_attention'] * 2}),
    'gemma2': ('gemma2', {**DEEP, 'head_dim': 8, 'sliding_window': 4, 'pad_token_id': 0,
                          'query_pre_attn_scalar': 12, 'attn_logit_softcapping': 2.0,
                          'final_logit_softcapping': 3.0}),
    'gemma3': ('gemma3_text', {**DEEP, 'head_dim': 8, 'sliding_window': 4, 'pad_token_id': 0,
                               'sliding_window_pattern': 2, 'rope_theta': 1e5,
                               'rope_scaling': {'rope_type': 'linear', 'factor': 4.0}}),
    'llama, yarn': ('llama', {**SMALL, 'head_dim': 12, 'rope_parameters': {
        'rope_type': 'yarn', 'rope_theta': 1e4, 'factor': 4.0,
        'original_max_position_embeddings': 16}}),
    'llama, dynamic': ('llama', {**SMALL, 'rope_parameters': {
        'rope_type': 'dynamic', 'rope_theta': 1e4, 'factor': 2.0}})})
OWN = ('smollm3', 'phi3', 'mistral with a window', 'qwen2 with windows', 'gemma2', 'gemma3')


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
  config = dataclasses.replace(families.model_config(values, base, 'config.json'),
                               init_from=str(folder), **changes)
  model = Transformer(config, vocab)
  like = jax.eval_shape(model.init, jax.random.key(0), *batch([[1, 2]]))['params']
  return model, pretrained.load(config, like, tokens, jax.random.key(1), dict)


def batch(texts):
  rows = [sequences.causal(t, ()) for t in texts]
  made = batching.collate(rows, max(map(len, texts)), 0, 0)
  return made.tokens, made.positions, made.mask


@pytest.fixture
def base(tiny_config):
  return tiny_config().model


TEXTS = [[5, 1, 30, 36, 2, 2, 9, 17, 20, 21, 8], [3, 3, 35]]


@pytest.mark.integration
@pytest.mark.parametrize('name', MODELS)
def test_logits_of_transformers(name, base, tmp_path):
  """To 1e-4 with padding on the right; layer by layer where that fails."""
  theirs = make(tmp_path, name)
  model, params = ours(tmp_path, base)
  args = batch(TEXTS)
  hidden = jax.jit(lambda p: model.apply({'params': p}, *args))(params).hidden
  found = model.apply({'params': params}, hidden, method='head')
  with torch.no_grad():
    seen = theirs(torch.tensor(args[0]), attention_mask=torch.tensor(
        [[1] * 11, [1] * 3 + [0] * 8]), output_hidden_states=True)
  for b, text in enumerate(TEXTS):
    assert_close(hidden[b, :len(text)], seen.hidden_states[-1][b, :len(text)])
    assert_close(found[b, :len(text), :37], seen.logits[b, :len(text)])


@pytest.mark.integration
@pytest.mark.parametrize('name', MODELS)
def test_out_again(name, base, tmp_path):
  """What is written is what was read: transformers computes the same of it, bit for bit, and
  it comes back as the same model."""
  from safetensors.numpy import save_file
  theirs = make(tmp_path, name)
  model, params = ours(tmp_path, base)
  held = export.tensors(types.SimpleNamespace(model=model.config), jax.device_get(params), 37)
  written, again = families.hf_config(model.config, 37, pad_token_id=0), tmp_path / 'again'
  again.mkdir()
  save_file({k: np.ascontiguousarray(v) for k, v in held.items()}, again / 'model.safetensors',
            metadata={'format': 'pt'})
  (again / 'config.json').write_text(json.dumps(written))
  back = transformers.AutoModelForCausalLM.from_pretrained(again).eval()
  tokens = torch.tensor(TEXTS[:1])
  with torch.no_grad():
    assert torch.equal(back(tokens).logits, theirs(tokens).logits)
  found = dataclasses.replace(families.model_config(written, base, 'f'), init_from='')
  assert found == dataclasses.replace(model.config, init_from='')


def rows():
  """RiM's: a question, two blocks whose tokens see each other, two readouts of 6 tokens."""
  made = [sequences.PackedSequence(
      TEXTS[0][:n], [*range(1, n - 3), n - 2, n - 2, n, n],
      [sequences.Readout(until, [7, 1, 2, 30, 4, 5, 6]) for until in (n - 2, n)])
      for n in (11, 8)]
  return batching.collate(made, 12, 2, 6, 0)


@pytest.mark.integration
@pytest.mark.parametrize('name', OWN)
def test_ways_to_compute_it(name, base, tmp_path):
  """Layers that differ: one mask, one prefix, a scan over layers and a cache say the same."""
  make(tmp_path, name)
  model, params = ours(tmp_path, base)
  b, p = rows(), 12
  real = np.arange(24) >= p
  real = real | (np.arange(24) < np.array([[11], [8]]))

  def states(model, params):
    return np.asarray(jax.jit(lambda p: model.apply(
        {'params': p}, b.tokens, b.positions, b.mask).hidden)(params))[real]
  expected = states(model, params)
  dense = Transformer(dataclasses.replace(model.config, attention='dense'), 40)
  assert_close(states(dense, params), expected)
  free = dataclasses.replace(model.config, window=0, window_layers=())
  assert np.abs(states(Transformer(free, 40), params) - expected).max() > 1e-3
  scanned = Transformer(dataclasses.replace(model.config, scan=True), 40)
  stacked = stack_layers(params, model.config.num_layers)
  assert_close(states(scanned, stacked), expected)

  def decode(model, params):  # token by token, from a cache
    out = latents.read_prefix(model, params, b)
    cache, found = latents.empty_cache(out.layers, 2, 6), []
    for step in range(6):
      slots = slice(p + step, None, 6)
      one = model.apply({'params': params}, b.tokens[:, slots], b.positions[:, slots],
                        b.mask.cut(lambda a, slots=slots: a[:, slots]), cache, step)
      cache = cache.add(one.layers, step)
      found.append(one.hidden)
    return jnp.stack(found, 2)
  hidden = model.apply({'params': params}, b.tokens, b.positions, b.mask).hidden
  whole = hidden[:, p:].reshape(2, 2, 6, -1)
  for one, own in ((model, params), (scanned, stacked)):
    assert_close(jax.jit(functools.partial(decode, one))(own), whole)


@pytest.mark.parametrize('attention', ['splash', 'cudnn'])
def test_kernels_refuse(base, attention):
  """What a kernel does not compute is named."""
  for what in ({'window': 3}, {'attention_cap': 2.0}):
    model = Transformer(dataclasses.replace(base, attention=attention, **what), 16)
    with pytest.raises(InputError, match=f'a kernel that does not compute .*{[*what][0]}'):
      jax.eval_shape(model.init, jax.random.key(0), *batch([[1, 2]]))


@pytest.mark.integration
@pytest.mark.parametrize('name', ['gpt2', 'llama 3, one head, tied', 'qwen3'])
def test_padding_on_the_left(name, base, tmp_path):
  """A text whose row begins with padding, which it does not see."""
  theirs = make(tmp_path, name)
  model, params = ours(tmp_path, base)
  tokens = np.array([[0, 0, 0, *TEXTS[0]]], np.int32)
  positions = np.maximum(np.arange(14) - 3, 0)[None].astype(np.int32)
  mask = batch(tokens.tolist())[2]
  mask = mask.replace(visible_from=np.where(np.arange(14) < 3, 0, 3)[None].astype(np.int32))
  hidden = model.apply({'params': params}, tokens, positions, mask).hidden
  found = model.apply({'params': params}, hidden, method='head')
  with torch.no_grad():
    seen = theirs(torch.tensor(tokens), position_ids=torch.tensor(positions),
                  attention_mask=torch.tensor([[0] * 3 + [1] * 11]))
  assert_close(found[0, 3:, :37], seen.logits[0, 3:])


@pytest.mark.integration
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
    assert_close(half['norm']['scale'], one['norm']['scale'], tol=2.0**-size)


@pytest.mark.integration
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


def typed(dtype):
  """The numbers of a norm in a type that is none of weights'."""
  return rewrite(lambda held: held.update({NORM: held[NORM].astype(dtype)}))


def filled(value, dtype=np.float32):
  def change(held):
    held[NORM] = held[NORM].astype(dtype)
    held[NORM][3] = value
  return rewrite(change)


def in_shards(extra=(), named=None):
  """Two shards: the second has some tensors of the first once more, and the index may name
  what is in neither."""
  def damage(folder):
    from safetensors.numpy import load_file, save_file
    held = load_file(folder / 'model.safetensors')
    first, second = dict(list(held.items())[:5]), dict(list(held.items())[5:])
    for name in extra:
      second[name] = held[name] + 1
    (folder / 'model.safetensors').unlink()
    files = {'a.safetensors': first, 'b.safetensors': second}
    for file, tensors in files.items():
      save_file(tensors, folder / file)
    index = {n: f for f, tensors in reversed(files.items()) for n in tensors}
    index.update(named or {})
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': index}))
  return damage


@pytest.mark.integration
def test_the_index_decides(base, tmp_path):
  """A tensor in two shards is the one that the index names."""
  make(tmp_path / 'whole', 'llama')
  make(tmp_path / 'cut', 'llama')
  names = ['lm_head.weight', 'model.embed_tokens.weight']
  in_shards(extra=names)(tmp_path / 'cut')
  jax.tree.map(np.testing.assert_array_equal, ours(tmp_path / 'whole', base)[1],
               ours(tmp_path / 'cut', base)[1])


@pytest.mark.integration
def test_a_head_of_its_own(base, tiny_config, tmp_path):
  """config.json says tied, the file has a head: it is used, unless it is the table."""
  from safetensors.numpy import load_file, save_file
  theirs = make(tmp_path, 'llama')  # untied
  values = json.loads((tmp_path / 'config.json').read_text())
  (tmp_path / 'config.json').write_text(json.dumps({**values, 'tie_word_embeddings': True}))
  (tmp_path / 'tokenizer.json').write_text('{}')
  config = pretrained.resolve(tiny_config(**{'model.init_from': str(tmp_path)}))
  assert not config.model.tie_embeddings
  model = Transformer(config.model, 40)
  like = jax.eval_shape(model.init, jax.random.key(0), *batch([[1, 2]]))['params']
  params = pretrained.load(config.model, like, 37, jax.random.key(1), dict)
  args = batch(TEXTS[:1])
  found = model.apply({'params': params}, model.apply({'params': params}, *args).hidden,
                      method='head')
  with torch.no_grad():
    assert_close(found[0, :, :37], theirs(torch.tensor(args[0])).logits[0], tol=1e-4)
  held = load_file(tmp_path / 'model.safetensors')
  held['lm_head.weight'] = held['model.embed_tokens.weight'].copy()
  save_file(held, tmp_path / 'model.safetensors')
  config = tiny_config(**{'model.init_from': str(tmp_path)})
  assert pretrained.resolve(config).model.tie_embeddings


@pytest.mark.integration
def test_an_untied_gpt2_without_its_head(base, tmp_path):
  make(tmp_path, 'gpt2')
  values = json.loads((tmp_path / 'config.json').read_text())
  (tmp_path / 'config.json').write_text(json.dumps({**values, 'tie_word_embeddings': False}))
  with pytest.raises(InputError, match='1 tensors are missing: lm_head.weight'):
    ours(tmp_path, base)


@pytest.mark.integration
def test_padding_of_the_vocabulary(tiny_config, random_params):
  """No logit, no gradient and no probability for what is no token."""
  model = Transformer(tiny_config().model, 16, num_tokens=13)
  args = batch([[1, 2, 12]])
  params = random_params(model, types.SimpleNamespace(
      tokens=args[0], positions=args[1], mask=args[2]))

  def loss(params):
    hidden = model.apply({'params': params}, *args).hidden
    logits = model.apply({'params': params}, hidden, method='head')
    return -jax.nn.log_softmax(logits)[0, :, 3].sum(), logits
  (_, logits), grads = jax.value_and_grad(loss, has_aux=True)(params)
  assert (np.asarray(logits)[..., 13:] < -1e29).all()
  assert np.asarray(jax.nn.softmax(logits))[..., :13].sum(-1) == pytest.approx(1)
  assert not np.asarray(grads['embedding'])[13:].any()
  assert np.asarray(grads['embedding'])[:13].any(1).all()


@pytest.mark.parametrize('damage, message', [
    *((typed(t), f'1 are wrong: {NORM} .* its type is') for t in (
        'int8', 'int64', 'bool', 'complex64')),
    (filled(np.nan), f'{NORM} .*not finite'), (filled(-np.inf), f'{NORM} .*not finite'),
    (filled(1e300, np.float64), f'{NORM} .*not finite in float32'),
    (in_shards(named={'ghost': 'a.safetensors'}), 'names ghost, which the files'),
    (in_shards(named={NORM: 'a.safetensors'}), f'names {NORM}, which the files'),
    (rewrite(lambda held: held.update({NORM.removeprefix('model.'): held[NORM]})),
     'once more'),
    (index({'weight_map': ['a']}), "has no object 'weight_map'"),
    (index({'weight_map': {'a': ['b']}}), 'expected a file beside it'),
    (index([1]), 'holds a list; expected an object'),
    (lambda folder: (folder / 'config.json').write_text('[' * 100_000), 'cannot be read as'),
    (truncate, 'no sound safetensors file .* cut off'),
    (rewrite(lambda held: held.pop(NORM)), '1 tensors are missing: norm.weight'),
    (rewrite(lambda held: held.update({DOWN: np.ascontiguousarray(held[DOWN].T)})),
     r'1 are wrong: model.layers.1.mlp.down_proj.weight .*its shape is \[24, 40\]'),
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
