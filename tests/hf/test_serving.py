"""Exports as others use them: loaded by name, pasted from the card, asked through a server.

  LATENT_REASONING_MODEL=DIRECTORY pytest -m slow -n 0 -s tests/hf/test_serving.py

does it by command with a real model too, on GSM8K; DIRECTORY has its Hugging Face files.
"""

import contextlib
import io
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import tokenizers

torch = pytest.importorskip('torch', reason='parity with PyTorch: pip install torch==2.13.0')
transformers = pytest.importorskip('transformers', reason="pip install -e '.[test-hf]'")
peft = pytest.importorskip('peft', reason="pip install -e '.[test-hf]'")
for needed in ('fastapi', 'uvicorn'):
  pytest.importorskip(needed, reason="pip install 'transformers[serving]'")

pytestmark = pytest.mark.slow  # starts a server, and trains
QUESTIONS = 50
LORA = {'model.lora.rank': 8, 'model.lora.alpha': 16.0, 'optim.trainable': 'new',
        'model.dtype': 'float32', 'eval.test_problems': QUESTIONS, 'eval.contamination': False,
        'eval.max_new_tokens': 16, 'eval.valid_problems': 4, 'train.eval_every': 0,
        'train.save_every': 0}
TINY = {**LORA, 'tokenizer.pad_to': 8, 'optim.stage1.steps': 4, 'optim.stage2.steps': 4,
        'optim.stage1.learning_rate': 1e-3, 'data.arithmetic.train_size': 400,
        'data.arithmetic.valid_size': 50, 'data.arithmetic.test_size': 100,
        'rim.block_tokens': 1, 'train.compilation_cache': ''}
REAL = {**LORA, 'optim.batch_size': 4, 'eval.batch_size': 10, 'optim.stage1.steps': 20,
        'optim.stage2.steps': 20, 'data.name': 'gsm8k', 'data.limit': 600, 'data.valid_size': 8,
        # Slow enough that answers stay unlike: after so few steps at more, all are one number.
        'optim.stage1.learning_rate': 2e-5, 'optim.stage2.learning_rate': 1e-5}


@pytest.fixture(scope='module', params=['tiny', 'real'])
def trained(request, make_checkpoint, tmp_path_factory):
  """A folder that commands trained, evaluated and exported from."""
  if request.param == 'real':
    folder = os.environ.get('LATENT_REASONING_MODEL', '')
    if not pathlib.Path(folder, 'config.json').is_file():
      pytest.skip('set LATENT_REASONING_MODEL to a folder of pretrained weights')
    changes = {**REAL, 'data.dir': request.getfixturevalue('gsm8k'), 'model.init_from': folder}
  else:
    folder = make_checkpoint(tmp_path_factory.mktemp('hub'), 'llama', {
        'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 2,
        'num_attention_heads': 4, 'max_position_embeddings': 128}, std=0.3)
    base = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
    base.post_processor = tokenizers.processors.TemplateProcessing(
        single='<|endoftext|> $A', special_tokens=[('<|endoftext|>', 256)])
    base.save(str(folder / 'tokenizer.json'))
    (folder / 'chat_template.jinja').write_text("{{ messages[0]['content'] }}")
    changes = {**TINY, 'model.init_from': str(folder)}
  file = {'tiny': 'rim_arithmetic', 'real': 'rim_gsm8k'}[request.param]
  configs = pathlib.Path(__file__).resolve().parents[2] / 'configs'
  path = tmp_path_factory.mktemp('run')
  command = [sys.executable, '-m', 'latent_reasoning.main', f'--config={configs / file}.py',
             f'--workdir={path}', *(f'--config.{k}={v}' for k, v in changes.items())]
  for more in ([], ['--mode=export'], ['--mode=export', '--format=peft']):
    subprocess.run([*command, *more], check=True)
  return path


@pytest.fixture(scope='session')
def gsm8k(tmp_path_factory):
  beside = pathlib.Path(__file__).resolve().parents[2] / '../shared/data'
  path = pathlib.Path(os.environ.get('LATENT_REASONING_DATA', beside)) / 'gsm8k'
  if not path.is_dir():
    pytest.skip(f'no GSM8K at {path}; set LATENT_REASONING_DATA')
  return path


@pytest.fixture(scope='module')
def own(trained):
  """{question: what our decoder says}."""
  lines = (trained / 'predictions.jsonl').read_text().splitlines()
  found = {r['question']: r['predictions'][-1] for r in map(json.loads, lines)}
  assert len(found) == QUESTIONS and len(set(found.values())) > 5
  return found


def snippets(folder):
  return re.findall(r'^```python\n(.*?)^```', (folder / 'README.md').read_text(),
                    re.DOTALL | re.MULTILINE)


def asked(ask, own):
  """What is said to all questions, some at a time; and how many answers are ours."""
  questions, said = list(own), []
  for start in range(0, QUESTIONS, 10):
    said += ask(questions[start:start + 10])
  same = sum(a == own[q] for q, a in zip(questions, said, strict=True))
  print(f'{same} of {QUESTIONS} answers are those of our decoder')
  assert same == QUESTIONS


@pytest.mark.parametrize('kind', ['hf', 'peft'])
def test_pasted(trained, own, kind):
  """The card's code, in the folder of the export."""
  names = {}
  with contextlib.chdir(trained / 'export' / kind):
    exec(snippets(pathlib.Path())[0], names)
  asked(names['ask'], own)


def test_adapter_by_name(trained, own):
  """The usual loader of adapters; the rest is of the card."""
  folder, names = trained / 'export' / 'peft', {}
  with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
    exec(snippets(folder)[0], names)
  names['model'] = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
  asked(names['ask'], own)


@pytest.fixture(scope='module')
def server(trained):
  """The address of `transformers serve .` in the export's folder."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  with open(trained / 'server.log', 'w') as log:
    process = subprocess.Popen(
        [str(pathlib.Path(sys.executable).with_name('transformers')), 'serve', '.', '--port',
         str(port)], cwd=trained / 'export' / 'hf', stdout=log, stderr=log)
  try:
    for _ in range(240):
      with contextlib.suppress(OSError):
        urllib.request.urlopen(f'http://localhost:{port}/health')
        break
      assert process.poll() is None, (trained / 'server.log').read_text()
      time.sleep(0.5)
    yield f'localhost:{port}'
  finally:
    process.terminate()
    process.wait()


@pytest.mark.parametrize('number', [1, 2], ids=['completions', 'chat'])
def test_served(trained, own, server, number):
  """The card's code for a server, completions and chat, but for the question and the port."""
  code = snippets(trained / 'export' / 'hf')[number].replace('localhost:8000', server)
  line = re.search(r'^question = .*  # yours$', code, re.MULTILINE)[0]

  def ask(questions):
    said = []
    for question in questions:
      spread = question.replace(' ', ' \t', 1) + '\n'
      with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code.replace(line, f'question = {spread!r}'), {})
      said.append(out.getvalue().removesuffix('\n'))
    return said
  asked(ask, own)
