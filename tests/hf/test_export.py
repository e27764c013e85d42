"""Exported models answer in transformers as they do here, and come back bit for bit."""

import contextlib
import dataclasses
import io
import json
import pathlib
import re

import huggingface_hub
import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from llama import LLAMA

from latent_reasoning import experiment as run_lib
from latent_reasoning.analysis import answer_selection
from latent_reasoning.cli import block_commands, commands
from latent_reasoning.errors import InputError
from latent_reasoning.hf import eval_harness, export, families, model_card
from latent_reasoning.hf import load as pretrained
from latent_reasoning.models import lora
from latent_reasoning.train import trainer
from latent_reasoning.train.workdir import open_workdir

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
           'optim.trainable': 'new', 'optim.stage1.learning_rate': 3e-2}
SCAN = {'model.scan': True}
SOME = {'model.lora.targets': ('qkv$', 'block_1/(out|down)')}


def dress(folder, kind):
  """Gives a checkpoint's tokenizer what others have: BOS and a chat of Llama's, added tokens
  of Qwen's, some of them spelt like ours."""
  base = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  if kind == 'llama':
    base.post_processor = tokenizers.processors.TemplateProcessing(
        single='<|endoftext|> $A', special_tokens=[('<|endoftext|>', 256)])
    (folder / 'tokenizer_config.json').write_text(json.dumps({
        'chat_template': 'a', 'bos_token': '<|endoftext|>'}))
  if kind == 'qwen3':
    base.add_tokens(['<think>'])
    base.add_special_tokens(['<pad>', '<m>'])
  base.save(str(folder / 'tokenizer.json'))


@pytest.fixture(scope='module', params=['gpt2', *(
    pytest.param(kind, marks=pytest.mark.integration)
    for kind in ('gpt2, LoRA', 'llama, LoRA', 'qwen3, LoRA'))])
def trained(request, tiny_config, make_checkpoint, tmp_path_factory):
  """A RiM that began with pretrained weights, trained through both stages."""
  kind, _, adapted = request.param.partition(', ')
  folder = make_checkpoint(tmp_path_factory.mktemp('hub'), kind, START[kind], std=DISTINCT)
  dress(folder, kind)
  own = {**ADAPTED, **(SOME if kind == 'gpt2' else SCAN)} if adapted else {}
  config = pretrained.resolve(tiny_config(**own, **{
      'model.init_from': str(folder), 'tokenizer.pad_to': 8, 'data.arithmetic.train_size': 200,
      'data.arithmetic.test_size': PROBLEMS, 'eval.test_problems': 0, 'eval.batch_size': 50,
      'eval.valid_problems': 4, 'train.eval_every': 0, 'train.save_every': 0,
      'optim.stage1.steps': 6, 'optim.stage2.steps': 6}))
  run = run_lib.build(config, open_workdir(tmp_path_factory.mktemp('run'), config, True))
  trainer.train(run)
  assert commands.evaluate(run) == 0 and commands.export(run, 'hf') == 0
  return run


def snippets(card, language='python'):
  """What a card asks to be pasted."""
  return re.findall(rf'^```{language}\n(.*?)^```', card, re.DOTALL | re.MULTILINE)


def answers(run, kind):
  """What transformers says to 200 problems by the code of the card, as pasted."""
  path, said, names = run.workdir.path / 'export' / kind, [], {}
  with contextlib.chdir(path), contextlib.redirect_stdout(io.StringIO()) as out:
    exec(snippets(pathlib.Path('README.md').read_text())[0], names)
  questions = [run.splits.test[i].question for i in range(PROBLEMS)]
  predictor = run.predictor(run.restore().state.params)
  ours = [texts[-1] for texts in predictor.texts([model_card.QUESTION, 'What is 2 + 3?'])]
  said = out.getvalue()
  assert said.startswith(f'{ours[0]}\n') and f'What is 2 + 3? {ours[1]}\n' in said
  for question in (*questions[:50], ' 1  +\t2\n', '<m>1</b> <|endoftext|>', '<think>+'):
    assert names['prompt'](question)['input_ids'] == list(predictor.row(question).prefix)
  # Asked as one text, as a server is, where no question spells a special token.
  whole = f"1+ 2\n{model_card.blocks(run.config, run.tokenizer)}"
  assert names['tokenizer'](whole)['input_ids'] == list(predictor.row('1+ 2').prefix)
  parts = [names['ask'](questions[start:start + 50]) for start in range(0, PROBLEMS, 50)]
  return [text for part in parts for text in part], names['model']


@pytest.fixture(scope='module')
def own(trained):
  """What we say to them."""
  params = trained.restore().state.params
  questions = [trained.splits.test[i].question for i in range(PROBLEMS)]
  said = [texts[-1] for texts in trained.predictor(params).texts(questions)]
  assert len(set(said)) > 1
  return said


def alike(said, own) -> bool:
  """Whether the answers are the same, but where rounding chose between two tokens of nearly
  equal logits: of the 200 random models' answers, one or two on some processors."""
  return sum(a == b for a, b in zip(said, own, strict=True)) >= 0.98 * len(own)


@pytest.mark.integration
def test_same_answers(trained, own):
  assert alike(answers(trained, 'hf')[0], own)


def card_of(run):
  """What the code of the export's card defines."""
  names = {}
  with contextlib.chdir(run.workdir.path / 'export/hf'), contextlib.redirect_stdout(
      io.StringIO()):
    exec(snippets(pathlib.Path('README.md').read_text())[0], names)
  return names


@pytest.mark.integration
def test_fewer_blocks(trained):
  """How many blocks there are is a number in the prompt: with k of them, what is read here
  after block k; and reading until two answers agree stops where analysis says."""
  names, most = card_of(trained), trained.config.rim.blocks
  questions = [trained.splits.test[i].question for i in range(50)]
  by_block = list(trained.predictor(trained.restore().state.params).texts(questions))
  for k in range(1, most + 1):
    assert alike(names['ask'](questions, k), [texts[k - 1] for texts in by_block])
  assert alike(names['ask'](questions), [texts[-1] for texts in by_block])
  blocks = answer_selection.first(answer_selection.agreement(np.array(by_block)) >= 2)
  assert alike([names['ask_adaptively'](q) for q in questions[:20]],
               [(texts[k], k + 1) for texts, k in zip(by_block, blocks[:20], strict=False)])


@pytest.mark.integration
def test_analyses(trained):
  """Rules, probes and reading no more blocks than needed, of a pretrained model."""
  found = block_commands.analyzed(trained)
  results = json.loads(trained.workdir.results.read_text())
  assert found['per_block'] == pytest.approx(results['accuracy']['per_block'])
  rules = found['choice']['rules']
  assert rules['final']['accuracy'] == pytest.approx(results['accuracy']['final'])
  assert rules.keys() >= {'probe', 'most confident', 'first two that agree'}
  for one in found['choice']['adaptive'].values():
    assert 1 <= one['chosen']['blocks'] <= trained.config.rim.blocks


@pytest.mark.integration
def test_harness(trained):
  """The same accuracy by lm-evaluation-harness, by the command that the card shows."""
  lm_eval = pytest.importorskip('lm_eval', reason="pip install -e '.[eval-harness]'")
  from lm_eval.tasks import TaskManager
  name = eval_harness.name(trained.config)
  folder = trained.workdir.path / 'export/hf'
  assert ('lm_eval --model hf --model_args pretrained=. --include_path harness --tasks '
          f'{name}\n') in (folder / 'README.md').read_text()
  found = lm_eval.simple_evaluate(
      model='hf', model_args=f'pretrained={folder}', tasks=[name], limit=50, batch_size=10,
      device='cpu', bootstrap_iters=0,
      task_manager=TaskManager(include_path=str(folder / eval_harness.FOLDER)))
  lines = trained.workdir.path.joinpath('predictions.jsonl').read_text().splitlines()[:50]
  own = np.mean([json.loads(line)['correct'][-1] for line in lines])
  assert found['results'][name]['exact_match,none'] == pytest.approx(own)


@pytest.mark.integration
def test_comes_back(trained, own, tmp_path):
  """An export is read as it is, our tokens too, and answers the same, also where the rows of
  our tokens are trained alone."""
  path = trained.workdir.path / 'export/hf'
  model = dataclasses.replace(trained.config.model, init_from=str(path),
                              lora=dataclasses.replace(trained.config.model.lora, rank=0))
  optim = dataclasses.replace(trained.config.optim, trainable='all')
  own_tokens = dataclasses.replace(trained.config.tokenizer, path='')
  run = run_lib.open_run(dataclasses.replace(
      trained.config, model=model, optim=optim, tokenizer=own_tokens), tmp_path)
  assert run.tokenizer.special() == trained.tokenizer.special()
  assert run.tokenizer.encode('<m>1') == trained.tokenizer.encode('<m>1')
  questions = [trained.splits.test[i].question for i in range(PROBLEMS)]
  assert [t[-1] for t in run.predictor(run.init().params).texts(questions)] == own
  assert run_lib.reopen(tmp_path).tokenizer.known == run.tokenizer.known > run.tokenizer.size
  new = dataclasses.replace(optim, trainable='new')
  again = dataclasses.replace(run, config=dataclasses.replace(run.config, optim=new))
  params = again.init().params  # our tokens' rows are known, and are trained alone
  assert [t[-1] for t in again.predictor(params).texts(questions)] == own
  assert set(lora.split(params, 'new')[0]) >= {'new_embedding'}
  assert len(params['embedding']) == again.tokenizer.size


@pytest.mark.integration
def test_same_answers_of_an_adapter(trained, own):
  """PEFT puts LoRA and the new rows on the pretrained model; nothing else is stored."""
  peft = pytest.importorskip('peft', reason="pip install -e '.[test-hf]'")
  config, path = trained.config, trained.workdir.path / 'export/peft'
  if not config.model.lora.rank:
    with pytest.raises(InputError, match='--format=hf'):
      commands.export(trained, 'peft')
    assert not path.exists()
    return
  assert commands.export(trained, 'peft') == 0
  said, model = answers(trained, 'peft')
  assert alike(said, own) and isinstance(model, peft.PeftModel)
  values = pretrained.read_json(path / 'adapter_config.json')
  flat = jax.tree_util.tree_leaves_with_path(trained.restore().state.params)
  new = sum(a.size for p, a in flat if lora.is_new(tuple(part.key for part in p)))
  held = safetensors.numpy.load_file(path / 'adapter_model.safetensors')
  padding = trained.tokenizer.vocab_size - trained.tokenizer.used
  tables = sum('token_adapter' in name for name in held)
  assert sum(a.size for a in held.values()) == new - (
      padding * tables * config.model.embed_dim) and padding
  if config.model.fused_qkv:
    assert values['target_modules'] == ['attn.c_attn', 'transformer.h.1.attn.c_proj',
                                        'transformer.h.1.mlp.c_proj']
  loaded = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
  assert loaded.keys() == held.keys()
  for name, value in held.items():
    np.testing.assert_array_equal(loaded[name].numpy(), value)


@pytest.mark.integration
def test_the_usual_loader_of_adapters(trained, own):
  """By one call, from the directory alone, as PEFT's documentation has it."""
  peft = pytest.importorskip('peft', reason="pip install -e '.[test-hf]'")
  if not trained.config.model.lora.rank:
    pytest.skip('no adapter')
  commands.export(trained, 'peft')
  path = trained.workdir.path / 'export/peft'
  model = peft.AutoPeftModelForCausalLM.from_pretrained(path).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(path)
  rows = model.get_input_embeddings().weight.shape[0]
  assert len(tokenizer) == trained.tokenizer.used == rows
  blocks = model_card.blocks(trained.config, trained.tokenizer)
  question = f'{trained.splits.test[0].question}\n{blocks}'
  with torch.no_grad():
    out = model.generate(**tokenizer([question], return_tensors='pt'), do_sample=False,
                         max_new_tokens=trained.config.eval.max_new_tokens)
  ids = tokenizer([question])['input_ids'][0]
  assert tokenizer.decode(out[0, len(ids):], skip_special_tokens=True) == own[0]


@pytest.mark.parametrize('right, n, said', [
    (0, 4, '0.0 [0.0, 60.2] %, with its 95% interval'), (50, 100, '50.0% ± 5.0%'),
    (100, 100, '100.0 [96.4, 100.0] %, with its 95% interval')])
def test_a_card_says_how_sure_it_is(right, n, said):
  """A standard error of zero is none: few right or wrong answers have an interval."""
  share = right / n
  text = model_card._measured({
      'accuracy': {'final': share}, 'standard_error': {'final': (share * (1 - share) / n)**0.5},
      'n': n, 'dataset': 'd', 'split': 'test', 'seed': 0, 'step': 3})
  assert said in text and '--mode=eval' not in text
  assert '--mode=eval' in model_card._measured(None)


@pytest.mark.integration
def test_a_link_is_not_replaced(trained, tmp_path):
  """Nor is what it points to."""
  target, link = tmp_path / 'target', tmp_path / 'link'
  target.mkdir()
  (target / 'mine').write_text('')
  link.symlink_to(target)
  with pytest.raises(InputError, match='is a link or a file'):
    export.write(trained.config, {}, trained.tokenizer, link, None)
  assert (target / 'mine').exists()


@pytest.mark.integration
def test_round_trip(trained):
  """Out and in again: every parameter bit for bit."""
  run, params = trained, trained.restore().state.params
  path = run.workdir.path / 'export' / 'hf'
  params = lora.merge(params, run.config.model.lora)
  values = pretrained.read_json(path / 'config.json')
  again = families.model_config(values, run.config.model, 'config.json')
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


@pytest.mark.integration
def test_starts_from_the_checkpoint(trained):
  """The first state holds the pretrained weights; old ids keep their rows."""
  run = trained
  first = lora.merge(run.init().params, run.config.model.lora)  # LoRA adds nothing yet
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
  memory = trained.tokenizer.text(trained.tokenizer.memory)
  assert memory == ('<m_1>' if trained.tokenizer.size > 257 else '<m>')
  assert f'<b>{memory}</b>' * trained.config.rim.blocks in text
  assert f"'<b>{memory}</b>' * blocks" in text and 'Read after 1, 2, … blocks' in text
  for server in ('transformers serve', 'vllm serve', 'sglang.launch_server', 'llama-server'):
    assert server in text
  assert ('begins with `<|endoftext|>`' if trained.tokenizer.start else 'No BOS stands') in text
  data = huggingface_hub.ModelCard(text).data
  assert data.base_model == trained.config.model.init_from and 'rim' in data.tags


def test_chat(trained):
  """Where the base had a chat template, a chat asks the user's last message as ever."""
  path = trained.workdir.path / 'export' / 'hf'
  tokenizer = transformers.AutoTokenizer.from_pretrained(path)
  assert tokenizer.padding_side == 'left'
  assert tokenizer.pad_token == trained.tokenizer.text(trained.tokenizer.pad)
  talks = bool(trained.tokenizer.start)
  assert bool(tokenizer.chat_template) == talks
  assert len(snippets((path / 'README.md').read_text())) == 2 + talks
  if not talks:
    return
  predictor = trained.predictor(trained.restore().state.params)
  for content in ('1+2', ' 1 +\u20282\t', "{{ 'a' }}", [{'type': 'text', 'text': '1 +'},
                                                        {'type': 'text', 'text': ' 2'}]):
    text = content if isinstance(content, str) else '1 + 2'
    ids = tokenizer.apply_chat_template(
        [{'role': 'system', 'content': 'a'}, {'role': 'user', 'content': 'b'},
         {'role': 'assistant', 'content': 'c'}, {'role': 'user', 'content': content}],
        add_generation_prompt=True, return_dict=True)['input_ids']
    assert ids == list(predictor.row(text).prefix)


EVIL = ['a\nlicense: evil', '---\nlicense: evil\n---', '[x](http://x) ![](y)', '<script>',
        '```\nb', '`a` ``', """'\'\'\n\\""""", '{evil}', 'a: *b', '# c\u2028d\udcff']


@given(st.one_of(st.sampled_from(EVIL), st.text()))
def test_what_others_said_is_code(text):
  """Whatever it is, Markdown reads one span of code."""
  markdown_it = pytest.importorskip('markdown_it', reason='pip install markdown-it-py')
  found = markdown_it.MarkdownIt().parse(f'a {model_card.code(text)} b')
  assert [t.type for t in found] == ['paragraph_open', 'inline', 'paragraph_close']
  assert [t.type for t in found[1].children] == ['text', 'code_inline', 'text']
  plain = ' '.join(text.split()).encode(errors='replace').decode().replace('\0', '\ufffd')
  assert found[1].children[1].content.strip() == plain


@pytest.mark.parametrize('evil', EVIL)
def test_nothing_evil_in_a_card(tiny_config, make_run, tmp_path, evil):
  """Neither a name of weights nor results change the head or the shape of the page."""
  markdown_it = pytest.importorskip('markdown_it', reason='pip install markdown-it-py')
  run = make_run(tiny_config(), tmp_path)

  def made(kind, said):
    config = dataclasses.replace(run.config, model=dataclasses.replace(
        run.config.model, init_from=said))
    results = {'accuracy': {'final': 0.5}, 'standard_error': {'final': 0.1}, 'n': 4,
               'seed': 0, 'step': 3, 'dataset': said, 'split': said}
    text = model_card.card(config, run.tokenizer, kind, results)
    with pytest.raises(InputError, match='results.json is not what an evaluation writes'):
      model_card.card(config, run.tokenizer, kind, {**results, 'step': said})
    return huggingface_hub.ModelCard(text)
  for kind in ('hf', 'peft'):
    card, plain = made(kind, evil), made(kind, 'a')
    assert card.data.license is None and card.data.base_model == evil
    assert [t.type for t in markdown_it.MarkdownIt().parse(card.text)] == [
        t.type for t in markdown_it.MarkdownIt().parse(plain.text)]
    for snippet in snippets(card.text):
      compile(snippet, 'card', 'exec')


@pytest.mark.parametrize('changes, message', [
    ({'imm.write_policy': 'gated'}, 'a memory inside the layers'),
    ({'rim.block_attention': 'bidirectional'}, 'block_attention'),
    ({'rim.readout_sees_question': False}, 'readout_sees_question'),
    ({'model.bias': False}, 'no family of transformers .*bias=False'),
    ({'model.position_embedding': 'rotary', 'model.bias': False}, 'no family'),
    ({'model.norm': 'rms'}, 'no family'),
    ({**LLAMA, 'model.qkv_bias': True, 'model.mlp_bias': True}, 'no family'),
    ({**LLAMA, 'model.position_embedding': 'learned'}, 'no family')])
def test_what_others_have_no_code_for(tiny_config, changes, message):
  with pytest.raises(InputError, match=message):
    export.check(tiny_config(**changes))
