"""Exported models answer in transformers as they do here, and come back bit for bit."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from latent_reasoning import adapt, export, hf_format, loop, model_card, modes, pretrained
from latent_reasoning import run as run_lib
from latent_reasoning.errors import InputError
from latent_reasoning.workdir import open_workdir

torch = pytest.importorskip('torch', reason='parity with PyTorch: pip install torch==2.13.0')
transformers = pytest.importorskip('transformers', reason="pip install 'transformers'")

torch.set_num_threads(1)  # tiny models: more threads only wait for each other
pytestmark = pytest.mark.usefixtures('quick_compilation')

SIZES = {'hidden_size': 16, 'intermediate_size': 24, 'num_hidden_layers': 2,
         'num_attention_heads': 4, 'max_position_embeddings': 48}
START = {
    'gpt2': {'n_layer': 2, 'n_embd': 16, 'n_head': 2, 'n_positions': 48},
    'llama': {**SIZES, 'num_key_value_heads': 2},
    'qwen3': {**SIZES, 'num_key_value_heads': 1, 'head_dim': 6, 'tie_word_embeddings': True}}
PROBLEMS = 200
DISTINCT = 0.3  # standard deviation of weights: no two tokens alike


ADAPTED = {'model.lora.rank': 3, 'model.lora.alpha': 7.0, 'model.lora.dropout': 0.1,
           'optim.trained': 'new', 'optim.stage1.learning_rate': 3e-2}
SCAN = {'model.scan': True}
SOME = {'model.lora.targets': ('qkv$', 'block_1/(out|down)')}


@pytest.fixture(scope='module', params=[
    'gpt2', 'gpt2, LoRA', 'llama, LoRA', 'qwen3, LoRA'])
def trained(request, tiny_config, make_checkpoint, tmp_path_factory):
  """A RiM that began with pretrained weights, trained through both stages."""
  kind, _, adapted = request.param.partition(', ')
  folder = make_checkpoint(tmp_path_factory.mktemp('hub'), kind, START[kind], std=DISTINCT)
  own = {**ADAPTED, **(SOME if kind == 'gpt2' else SCAN)} if adapted else {}
  config = pretrained.resolve(tiny_config(**own, **{
      'model.init_from': str(folder), 'tokenizer.pad_to': 8, 'data.arithmetic.train_size': 200,
      'data.arithmetic.test_size': PROBLEMS, 'eval.test_problems': 0, 'eval.batch_size': 50,
      'eval.valid_problems': 4, 'train.eval_every': 0, 'train.save_every': 0,
      'optim.stage1.steps': 6, 'optim.stage2.steps': 6}))
  run = run_lib.build(config, open_workdir(tmp_path_factory.mktemp('run'), config, True))
  loop.train(run)
  assert modes.evaluate(run) == 0 and modes.export(run, 'hf') == 0
  return run


def answers(run, kind):
  """What transformers says to 200 problems, prompted with the text of the card."""
  path, said = run.workdir.path / 'export' / kind, []
  lines = model_card.load(run.config, run.tokenizer, kind).replace("'.'", 'path')
  assert model_card.load(run.config, run.tokenizer, kind) in (path / 'README.md').read_text()
  names = {'path': path}
  exec(lines, names)
  model, tokenizer = names['model'].eval(), names['tokenizer']
  tail, answerer = model_card.prompt(run.config), run.answerer(run.restore().state.params)
  questions = [run.splits.test[i].question for i in range(PROBLEMS)]
  tokenizer.padding_side = 'left'
  for start in range(0, PROBLEMS, 50):
    part = questions[start:start + 50]
    ids = tokenizer([q + tail for q in part], return_tensors='pt', padding=True)
    for question, row, seen in zip(part, ids['input_ids'], ids['attention_mask'], strict=True):
      prompt = answerer.row(question).prefix
      assert row[seen > 0].tolist() == list(prompt)
    with torch.no_grad():
      out = model.generate(**ids, max_new_tokens=run.config.eval.max_tokens, do_sample=False,
                           eos_token_id=run.tokenizer.end, pad_token_id=run.tokenizer.pad)
    said += tokenizer.batch_decode(out[:, ids['input_ids'].shape[1]:], skip_special_tokens=True)
  return said, model


@pytest.fixture(scope='module')
def own(trained):
  """What we say to them."""
  params = trained.restore().state.params
  questions = [trained.splits.test[i].question for i in range(PROBLEMS)]
  said = [texts[-1] for texts in trained.answerer(params).texts(questions)]
  assert len(set(said)) > 1
  return said


def alike(said, own) -> bool:
  """Whether the answers are the same, but where rounding chose between two tokens of nearly
  equal logits: of the 200 random models' answers, one or two on some processors."""
  return sum(a == b for a, b in zip(said, own, strict=True)) >= 0.98 * len(own)


def test_same_answers(trained, own):
  assert alike(answers(trained, 'hf')[0], own)


def test_comes_back(trained, own, tmp_path):
  """An export is read as it is, our tokens too, and answers the same; its weights have no
  new rows to train alone."""
  path = trained.workdir.path / 'export/hf'
  model = dataclasses.replace(trained.config.model, init_from=str(path),
                              lora=dataclasses.replace(trained.config.model.lora, rank=0))
  optim = dataclasses.replace(trained.config.optim, trained='all')
  run = run_lib.open_run(dataclasses.replace(trained.config, model=model, optim=optim),
                         tmp_path)
  assert run.tokenizer.special() == trained.tokenizer.special()
  assert run.tokenizer.encode('<m>1') == trained.tokenizer.encode('<m>1')
  questions = [trained.splits.test[i].question for i in range(PROBLEMS)]
  assert [t[-1] for t in run.answerer(run.init().params).texts(questions)] == own
  assert run_lib.reopen(tmp_path).tokenizer.known == run.tokenizer.known > run.tokenizer.size
  new = dataclasses.replace(optim, trained='new')
  again = dataclasses.replace(run, config=dataclasses.replace(run.config, optim=new))
  with pytest.raises(InputError, match="trained='all'"):
    again.init()


def test_same_answers_of_an_adapter(trained, own):
  """PEFT puts LoRA and the new rows on the pretrained model; nothing else is stored."""
  peft = pytest.importorskip('peft', reason="pip install -e '.[test-hf]'")
  config, path = trained.config, trained.workdir.path / 'export/peft'
  if not config.model.lora.rank:
    with pytest.raises(InputError, match='--format=hf'):
      modes.export(trained, 'peft')
    assert not path.exists()
    return
  assert modes.export(trained, 'peft') == 0
  said, model = answers(trained, 'peft')
  assert alike(said, own) and isinstance(model, peft.PeftModel)
  values = pretrained.read_json(path / 'adapter_config.json')
  flat = jax.tree_util.tree_leaves_with_path(trained.restore().state.params)
  new = sum(a.size for p, a in flat if adapt.is_new(tuple(part.key for part in p)))
  held = safetensors.numpy.load_file(path / 'adapter_model.safetensors')
  padding = trained.tokenizer.vocab_size - trained.tokenizer.used
  tables = sum('token_adapter' in name for name in held)
  assert sum(a.size for a in held.values()) == new - (
      padding * tables * config.model.width) and padding
  if config.model.family == 'gpt':
    assert values['target_modules'] == ['attn.c_attn', 'transformer.h.1.attn.c_proj',
                                        'transformer.h.1.mlp.c_proj']
  loaded = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
  assert loaded.keys() == held.keys()
  for name, value in held.items():
    np.testing.assert_array_equal(loaded[name].numpy(), value)


def test_the_usual_loader_of_adapters(trained, own):
  """By one call, from the directory alone, as PEFT's documentation has it."""
  peft = pytest.importorskip('peft', reason="pip install -e '.[test-hf]'")
  if not trained.config.model.lora.rank:
    pytest.skip('no adapter')
  modes.export(trained, 'peft')
  path = trained.workdir.path / 'export/peft'
  model = peft.AutoPeftModelForCausalLM.from_pretrained(path).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(path)
  rows = model.get_input_embeddings().weight.shape[0]
  assert len(tokenizer) == trained.tokenizer.used == rows
  question = trained.splits.test[0].question + model_card.prompt(trained.config)
  with torch.no_grad():
    out = model.generate(**tokenizer([question], return_tensors='pt'), do_sample=False,
                         max_new_tokens=trained.config.eval.max_tokens)
  ids = tokenizer([question])['input_ids'][0]
  assert tokenizer.decode(out[0, len(ids):], skip_special_tokens=True) == own[0]


def test_a_link_is_not_replaced(trained, tmp_path):
  """Nor is what it points to."""
  target, link = tmp_path / 'target', tmp_path / 'link'
  target.mkdir()
  (target / 'mine').write_text('')
  link.symlink_to(target)
  with pytest.raises(InputError, match='is a link or a file'):
    export.write(trained.config, {}, trained.tokenizer, link, None)
  assert (target / 'mine').exists()


def test_round_trip(trained):
  """Out and in again: every parameter bit for bit."""
  run, params = trained, trained.restore().state.params
  path = run.workdir.path / 'export' / 'hf'
  params = adapt.merge(params, run.config.model.lora)
  values = pretrained.read_json(path / 'config.json')
  again = hf_format.model_config(values, run.config.model, 'config.json')
  assert dataclasses.replace(again, init_from='') == dataclasses.replace(
      run.config.model, init_from='')
  like = jax.eval_shape(lambda: params)
  back = pretrained.load(dataclasses.replace(again, init_from=str(path)), like,
                         values['vocab_size'], jax.random.key(0), dict)
  real = run.tokenizer.used  # rows behind it are of no token, and stay here
  assert values['vocab_size'] == real < run.tokenizer.vocab_size

  def same(path, a, b):
    name = path[-1].key
    cut = {'embedding': np.s_[:real], 'head': np.s_[:, :real]}.get(name, ...)
    np.testing.assert_array_equal(a[cut], b[cut])
  jax.tree_util.tree_map_with_path(same, params, back)


def test_starts_from_the_checkpoint(trained):
  """The first state holds the pretrained weights; old ids keep their rows."""
  run = trained
  first = adapt.merge(run.init().params, run.config.model.lora)  # LoRA adds nothing yet
  held = pretrained.load(run.config.model, jax.eval_shape(lambda: first), run.tokenizer.size,
                         jax.random.key(9), dict)
  np.testing.assert_array_equal(first['norm']['scale'], held['norm']['scale'])
  known = run.tokenizer.size
  np.testing.assert_array_equal(first['embedding'][:known], held['embedding'][:known])
  assert run.tokenizer.vocab_size % 8 == 0 and run.tokenizer.vocab_size >= 260
  assert not np.array_equal(first['embedding'][known:], held['embedding'][known:])  # by key


def test_card(trained):
  """What it was trained on, what was measured, how to ask."""
  text = (trained.workdir.path / 'export' / 'hf' / 'README.md').read_text()
  found = json.loads(trained.workdir.results.read_text())
  assert f"{found['accuracy']['final']:.1%}" in text and 'arithmetic' in text
  assert '<b><m></b>' * trained.config.rim.blocks in text


@pytest.mark.parametrize('changes, message', [
    ({'imm.write': 'gated'}, 'a memory inside the layers'),
    ({'rim.block_attention': 'bidirectional'}, 'block_attention'),
    ({'rim.readout_sees_question': False}, 'readout_sees_question'),
    ({'model.bias': False}, 'not GPT-2'), ({'model.positions': 'rotary'}, 'not GPT-2')])
def test_what_others_have_no_code_for(tiny_config, changes, message):
  with pytest.raises(InputError, match=message):
    export.check(tiny_config(**changes))


def test_a_tokenizer_with_our_tokens(tiny_config, make_run, make_checkpoint, tmp_path):
  """A tokenizer that already has <m> is refused."""
  folder = make_checkpoint(tmp_path, 'gpt2', START['gpt2'])
  base = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  base.add_tokens(['<m>'])
  base.save(str(folder / 'tokenizer.json'))
  with pytest.raises(InputError, match="already has an entry '<m>'"):
    make_run(pretrained.resolve(tiny_config(**{'model.init_from': str(folder)})),
             tmp_path / 'run')
