"""The README.md of an exported model: data, method, what was measured, how to ask.

What a user or data said stands in it as code, so that none of it is Markdown or HTML; the
head is written by `huggingface_hub`, so that none of it is YAML.
"""

import json
import re
from typing import Any

import tokenizers
from huggingface_hub import ModelCardData

from latent_reasoning import methods, sequences
from latent_reasoning.config import Config
from latent_reasoning.data.text import name_of
from latent_reasoning.data.tokenizers import Tokenizer
from latent_reasoning.errors import InputError
from latent_reasoning.report.tables import percent

LOAD = {
    'hf': '''from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained('.')
model = AutoModelForCausalLM.from_pretrained('.')''',
    'peft': '''from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained('.')
base = AutoModelForCausalLM.from_pretrained({base!r})
base.resize_token_embeddings({rows}, mean_resizing=False)
model = PeftModel.from_pretrained(base, '.')'''}

ABOUT = {
    'hf': 'These are whole weights.',
    'peft': 'These are LoRA maps and the rows of new tokens, to be put on the weights that '
            'training began with. `resize_token_embeddings` makes room for the new rows. A '
            'server needs whole weights (`--mode=export --format=hf`).'}

QUESTION = 'What is 1 + 2?'

ASK = '''{load}

def prompt(question{number}):  # split_special_tokens: what spells a special token is plain text
  ids = tokenizer({text}, split_special_tokens=True)['input_ids']
  return {{'input_ids': ids{blocks}}}

def ask(questions{number}):
  prompts = [prompt(q{given}) for q in questions]
  batch = tokenizer.pad(prompts, return_tensors='pt')  # on the left
  out = model.generate(**batch, max_new_tokens={most}, do_sample=False,
                       eos_token_id={end}, pad_token_id={pad})
  return tokenizer.batch_decode(out[:, batch['input_ids'].shape[1]:], skip_special_tokens=True)

question = {question!r}  # yours
print(ask([question])[0])

questions = [question, 'What is 2 + 3?', 'And 12 + 9 - 4?']  # many at once
for question, answer in zip(questions, ask(questions)):
  print(question, answer)'''

ADAPTIVE = '''

def ask_adaptively(question):  # reads another block until two answers in a row are the same
  said = [None]
  for blocks in range(1, {number} + 1):
    said.append(ask([question], blocks)[0])
    if said[-1] == said[-2]:
      break
  return said[-1], blocks'''

POST = '''import json
import urllib.request

question = {question!r}  # yours
body = {{'model': '.', 'max_tokens': {most}, 'temperature': 0,
        {asked}}}
request = urllib.request.Request('http://localhost:8000/v1/{route}', json.dumps(body).encode(),
                                 {{'Content-Type': 'application/json'}})
print(json.load(urllib.request.urlopen(request))['choices'][0]{said})'''


def blocks(config: Config, tokenizer: Tokenizer, number: int = 0) -> str:
  """What stands for the reasoning, after a question and its newline, as text.

  Args:
    config: of the run.
    tokenizer: its tokenizer.
    number: of blocks; 0: as many as in evaluation.
  """
  names, number = tokenizer.special(), number or config.eval.blocks or config.rim.blocks
  prompt = methods.get(config.method).prompt([], number, config,
                                             sequences.special_tokens(tokenizer))
  return ''.join(names[i] for i in prompt.prefix)


def number_of_blocks(config: Config, tokenizer: Tokenizer) -> int:
  """How many times one text stands for the reasoning, so that it may stand there fewer times;
  0: it is no such text."""
  number = config.eval.blocks or config.rim.blocks
  return number * (methods.get(config.method).has_blocks and blocks(config, tokenizer)
                   == number * blocks(config, tokenizer, 1))


def chat_template(config: Config, tokenizer: Tokenizer, held: dict[str, Any]) -> str:
  """A Jinja template that asks what a user said last, and reads nothing else of a chat; ''
  where no text has the ids of our prompts.

  Args:
    config: of the run.
    tokenizer: its tokenizer.
    held: tokenizer.json of the export; a chat does not use its post-processor.
  """
  ids = {name: i for i, name in tokenizer.special().items()}
  exported = tokenizers.Tokenizer.from_str(json.dumps(held))
  bos = ''.join(map(tokenizer.text, tokenizer.start))
  tail = blocks(config, tokenizer)
  expected = [*tokenizer.question(QUESTION), *(ids[t] for t in re.findall('<.+?>', tail))]
  for space in ('', ' '):  # sentencepiece puts one in front of a text, but not behind BOS
    found = exported.encode(f'{bos}{space}{QUESTION}\n{tail}', add_special_tokens=False)
    if found.ids == expected and not methods.get(config.method).is_text:
      return (
          "{%- set last = namespace(text='') -%}"
          "{%- for message in messages if message['role'] == 'user' -%}"
          "{%- set last.text = message['content'] if message['content'] is string else "
          "message['content'] | map(attribute='text') | join(' ') -%}{%- endfor -%}"
          f"{{{{ {ascii(bos + space)} + (last.text.split() | join(' ')) + "
          f"{ascii(chr(10) + tail)} }}}}")
  return ''


def code(text: Any) -> str:
  """Any text as inline code of Markdown, where nothing is a link, a tag or a line's end."""
  text = ' '.join(str(text).split()).encode(errors='replace').decode()
  fence = '`' * (1 + max(map(len, re.findall('`+', text)), default=0))
  space = ' ' * (not text or text[0] in '` ' or text[-1] in '` ')
  return f'{fence}{space}{text}{space}{fence}'


def card(config: Config, tokenizer: Tokenizer, kind: str, results: dict[str, Any] | None,
         chat: bool = False, task: str = '') -> str:
  """The model card.

  Args:
    config: of the run.
    tokenizer: its tokenizer.
    kind: of the export.
    results: results.json; None: not measured.
    chat: whether the export has a chat template.
    task: for lm-evaluation-harness, beside it; '': there is none.

  Raises:
    InputError: results that evaluation did not write.
  """
  start = config.model.init_from
  head = ModelCardData(
      tags=['latent-reasoning', config.method], pipeline_tag='text-generation',
      library_name={'hf': 'transformers', 'peft': 'peft'}[kind], base_model=start or None)
  tail, text = blocks(config, tokenizer), "' '.join(question.split()) + '\\n'"
  if methods.get(config.method).is_text:
    text = 'question' if tokenizer.start else "'\\n' + question"
  number, said = number_of_blocks(config, tokenizer), repr(tail)
  if number:
    said = f'{blocks(config, tokenizer, 1)!r} * blocks'
  more = f" + tokenizer({said}, add_special_tokens=False)['input_ids']" if tail else ''
  most = config.eval.max_new_tokens
  asked = ASK.format(
      number=f', blocks={number}' * bool(number), given=', blocks' * bool(number),
      load=LOAD[kind].format(base=start, rows=tokenizer.vocab_size), text=text, blocks=more,
      most=most, end=tokenizer.end, pad=tokenizer.pad, question=QUESTION)
  asked += ADAPTIVE.format(number=number) if number > 1 else ''
  bos = [code(tokenizer.text(i)) for i in tokenizer.start]
  begins = (f"Every text begins with {' '.join(bos)}, which the tokenizer puts there, as in "
            'training.' if bos else 'No BOS stands in front of a text, as in training.')
  return f'''---
{head.to_yaml()}
---
# {config.method} on {code(name_of(config.data))}

Trained by `latent_reasoning` with the method {code(config.method)} on the data
{code(name_of(config.data))}, seed
{config.seed}.{f' It started from {code(start)}.' * bool(start)}

## Measured

{_measured(results)}

## How to ask

The question on one line, every run of white space as one space, a newline, what stands in for
the reasoning, then greedy decoding until {code(tokenizer.special()[tokenizer.end])}. {begins}
Plain causal attention: no code of its own. {ABOUT[kind]}{_trace(config)}{_fewer(number)}

```python
{asked}
```
{_served(text, tail, most, chat) if kind == 'hf' else ''}{_harness(task)}'''


def native(config: Config, results: dict[str, Any] | None) -> str:
  """The card of an export that this package alone loads; arguments as `card`."""
  start = config.model.init_from
  head = ModelCardData(tags=['latent-reasoning', config.method], pipeline_tag='text-generation',
                       library_name='latent_reasoning', base_model=None)
  return f'''---
{head.to_yaml()}
---
# {config.method} on {code(name_of(config.data))}

Trained by `latent_reasoning` with the method {code(config.method)} on the data
{code(name_of(config.data))}, seed
{config.seed}.{f' It started from {code(start)}.' * bool(start)}
The format is that package's own: config.json has its whole configuration, model.safetensors
every parameter; no other program loads it.

## Measured

{_measured(results)}

## How to ask

```sh
python -m latent_reasoning.main --config.model.init_from=. --workdir=asked --mode=generate
```

```python
import latent_reasoning as lr
print(lr.Experiment.load('.', workdir='asked').answer({QUESTION!r}))
```
'''


def _trace(config: Config) -> str:
  return (f' The answer stands behind {code(sequences.ANSWER_MARK)}.'
          if methods.get(config.method).trace else '')


def _fewer(number: int) -> str:
  if number < 2:
    return ''
  return (f' An answer may be read after fewer of the {number} blocks: of causal attention the '
          'number of blocks in the prompt is all that there is to it, and the answer is the '
          'one that evaluation reads after that block. `ask_adaptively` reads no more of them '
          'than it takes until two answers in a row are the same.')


def _harness(task: str) -> str:
  return f'''
## lm-evaluation-harness

In this folder, with `latent_reasoning` installed with its extra `eval-harness`; other problems,
lines of JSON with question and answer, by `--metadata='{{"problems": "FILE"}}'`:

```sh
lm_eval --model hf --model_args pretrained=. --include_path harness --tasks {task}
```
''' if task else ''


def _measured(results: dict[str, Any] | None) -> str:
  if not results:
    return 'Not measured (`--mode=eval`, then `--mode=export` again, puts the result here).'
  try:
    if 'loss' in results:
      return (f"Loss {results['loss']:.4f} a token on {code(results['dataset'])} "
              f"({code(results['split'])}), checkpoint of step {results['step']:d}.")
    accuracy, error = results['accuracy']['final'], results['standard_error']['final']
    spread = f'{percent(accuracy, error, results["n"])} %, with its 95% interval'
    if '[' not in spread:
      spread = f'{accuracy:.1%} ± {error:.1%}'
    each = results['accuracy'].get('per_block', ())
    return (f"Exact match on {results['n']:,d} problems of {code(results['dataset'])} "
            f"({code(results['split'])}): {spread}, seed "
            f"{results['seed']:d}, checkpoint of step {results['step']:d}."
            + (f" Read after 1, 2, … blocks: {', '.join(f'{a:.1%}' for a in each)}."
               if len(each) > 1 else ''))
  except (KeyError, TypeError, ValueError) as error:
    raise InputError(f'results.json is not what an evaluation writes ({error!r}); evaluate '
                     'again (--mode=eval), or remove it') from None


def _served(text: str, tail: str, most: int, chat: bool) -> str:
  """How a server is asked."""
  def post(asked, route, said):
    return POST.format(question=QUESTION, most=most, asked=asked, route=route, said=said)
  found = f'''
A server with the interface of completions is asked with the same text, one of

```sh
transformers serve . --port 8000
vllm serve . --port 8000
python -m sglang.launch_server --model-path . --port 8000
llama-server -m model.gguf --port 8000
```

(the last after llama.cpp's `python convert_hf_to_gguf.py FOLDER --outfile model.gguf`, which
knows the tokenizers of pretrained models and refuses one that was trained with this model):

```python
{post(f"'prompt': {text} + {tail!r}", 'completions', "['text']")}
```
'''
  if chat:
    found += f'''
The chat template puts the last message of the user into that text, and nothing else of a chat:

```python
{post("'messages': [{'role': 'user', 'content': question}]", 'chat/completions',
      "['message']['content']")}
```
'''
  return found + '''
There a question must not hold the text of a special token such as `<m>`: it would become one.
'''
