"""The README.md of an exported model: data, method, what was measured, how to ask."""

from typing import Any

from latent_reasoning.config import Config
from latent_reasoning.tokenizers import Tokenizer

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
            'training began with. `resize_token_embeddings` makes room for the new rows.'}


def prompt(config: Config) -> str:
  """What stands behind a question, as text."""
  blocks = config.eval.blocks or config.rim.blocks
  tail = {'rim': f"<b>{'<m>' * config.rim.block_tokens}</b>" * blocks,
          **dict.fromkeys(('pause', 'pause_steps'), '<pause>' * config.rim.pause_tokens)}
  return '\n' + tail.get(config.method, '')


def load(config: Config, tokenizer: Tokenizer, kind: str) -> str:
  """The lines of Python that make `tokenizer` and `model`."""
  return LOAD[kind].format(base=config.model.init_from, rows=tokenizer.vocab_size)


def card(config: Config, tokenizer: Tokenizer, kind: str,
         results: dict[str, Any] | None) -> str:
  """The model card.

  Args:
    config: of the run.
    tokenizer: its tokenizer.
    kind: of the export.
    results: results.json; None: not measured.
  """
  if results:
    accuracy, n = results['accuracy']['final'], results['n']
    measured = (f"Exact match on {n:,} problems of `{results['dataset']}` "
                f"({results['split']}): {accuracy:.1%} ± "
                f"{results['standard_error']['final']:.1%}, seed {results['seed']}, "
                f"checkpoint of step {results['step']}.")
  else:
    measured = 'Not measured.'
  start, head = config.model.init_from, f'tags: [latent-reasoning, {config.method}]'
  if kind == 'peft':
    head += f'\nlibrary_name: peft\nbase_model: {start}'
  return f'''---
{head}
---
# {config.method} on {config.data.name}

Trained by `latent_reasoning` with the method `{config.method}` on the data
`{config.data.name}`, seed {config.seed}.{f' It started from `{start}`.' if start else ''}

## Measured

{measured}

## How to ask

The question, what stands in for the reasoning, then greedy decoding until `<end>`. Plain
causal attention: no code of its own. {ABOUT[kind]}

```python
{load(config, tokenizer, kind)}
question = '…'  # yours
prompt = question + {prompt(config)!r}
ids = tokenizer(prompt, return_tensors='pt')
out = model.generate(**ids, max_new_tokens={config.eval.max_tokens}, do_sample=False,
                     eos_token_id={tokenizer.end}, pad_token_id={tokenizer.pad})
print(tokenizer.decode(out[0, ids['input_ids'].shape[1]:], skip_special_tokens=True))
```

A question must not hold the text of a special token such as `<m>`: here, as everywhere in
`transformers`, it would become one.
'''
