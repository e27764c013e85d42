"""A trained model as a directory that `transformers` and other engines load as it is.

What is written is plain causal attention: a question, K blocks, greedy decoding until
the end token. What needs code of its own (a memory inside the layers, attention inside
a block in both directions) is refused.
"""

import json
import pathlib
import shutil
from typing import Any

import chex
import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from latent_reasoning import adapt, hf_format, layout
from latent_reasoning.config import Config
from latent_reasoning.errors import InputError
from latent_reasoning.tokenizers import Tokenizer
from latent_reasoning.workdir import write_json, write_text


def check(config: Config) -> None:
  """Raises InputError where a model is none that others have code for."""
  model, rim = config.model, config.rim
  said = []
  if config.imm.write:
    said.append(f"config.imm.write '{config.imm.write}', a memory inside the layers")
  if layout.method(config.method).thinks:
    said.append(f'continuous thoughts (method {config.method})')
  if config.method == 'rim' and rim.block_attention != 'causal':
    said.append(f"config.rim.block_attention '{rim.block_attention}'")
  if not rim.readout_sees_question:
    said.append('config.rim.readout_sees_question=False')
  if model.family == 'gpt' and (model.positions != 'learned' or not model.bias):
    said.append('a GPT without biases or with rotary positions, which is not GPT-2')
  if model.family == 'llama' and model.positions != 'rotary':
    said.append(f"config.model.positions '{model.positions}' in family llama")
  if said:
    raise InputError(f"the model has {'; '.join(said)}: no other engine has code for it. "
                     'Only plain causal models can be exported')


def tensors(config: Config, params: dict) -> dict[str, np.ndarray]:
  """All weights by the names of files, contiguous: safetensors writes other arrays wrongly."""
  model = config.model
  found = {}
  for theirs, (name, layer) in hf_format.names(model).items():
    path = [part.format(layer) for part in name.ours]
    if model.scan and layer is not None:
      path[0] = 'blocks'
    value = params
    for part in path:
      value = value[part]
    value = np.asarray(value[layer] if model.scan and layer is not None else value)
    full = theirs if theirs.startswith('lm_head') else hf_format.PREFIX[model.family] + theirs
    found[full] = np.ascontiguousarray(value.T if name.transposed else value)
  return found


def tokenizer_files(tokenizer: Tokenizer, positions: int) -> dict[str, Any]:
  """tokenizer.json with our special tokens at their ids, and its configuration.

  Nothing is put before or behind a text, as in training.
  """
  base = json.loads(tokenizer.to_json())
  base['post_processor'] = None
  base['truncation'] = base['padding'] = None
  flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
  base['added_tokens'] += [
      {'id': i, 'content': content, **flags, 'special': True}
      for i, content in tokenizer.special().items()]
  names = {i: content for i, content in tokenizer.special().items()}
  return {
      'tokenizer.json': base,
      'tokenizer_config.json': {
          'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': names[tokenizer.end],
          'pad_token': names[tokenizer.pad], 'model_max_length': positions,
          'clean_up_tokenization_spaces': False}}


def write(config: Config, params: chex.ArrayTree, tokenizer: Tokenizer, path: pathlib.Path,
          results: dict[str, Any] | None) -> None:
  """Writes the directory, whole or not at all, and reads its weights back.

  Args:
    config: of the run.
    params: its parameters.
    tokenizer: its tokenizer.
    path: of the new directory; one that is there is replaced.
    results: results.json, for the model card; None: not measured.

  Raises:
    InputError: the model is none that others have code for.
  """
  check(config)
  making = path.with_name(f'.{path.name}.tmp')
  shutil.rmtree(making, ignore_errors=True)
  making.mkdir(parents=True)
  weights = tensors(config, jax.device_get(adapt.merge(params, config.model.lora)))
  save_file(weights, making / 'model.safetensors', metadata={'format': 'pt'})
  back = load_file(making / 'model.safetensors')
  wrong = [name for name, value in weights.items() if not np.array_equal(back[name], value)]
  if wrong or back.keys() != weights.keys():
    raise RuntimeError(f'{making}: read back, {wrong} differ from what was written')
  ids = {'bos_token_id': None, 'eos_token_id': tokenizer.end, 'pad_token_id': tokenizer.pad}
  write_json(making / 'config.json', hf_format.hf_config(
      config.model, tokenizer.vocab_size, **ids))
  write_json(making / 'generation_config.json', {
      'do_sample': False, 'max_new_tokens': config.eval.max_tokens, **ids})
  for name, value in tokenizer_files(tokenizer, config.model.max_positions).items():
    write_json(making / name, value)
  write_text(making / 'README.md', card(config, results))
  shutil.rmtree(path, ignore_errors=True)
  making.rename(path)


def prompt(config: Config) -> str:
  """What stands behind a question, as text."""
  blocks = config.eval.blocks or config.rim.blocks
  tail = {'rim': f"<b>{'<m>' * config.rim.block_tokens}</b>" * blocks,
          **dict.fromkeys(('pause', 'pause_steps'), '<pause>' * config.rim.pause_tokens)}
  return '\n' + tail.get(config.method, '')


def card(config: Config, results: dict[str, Any] | None) -> str:
  """The model card: data, method, what was measured, how to ask."""
  if results:
    accuracy, n = results['accuracy']['final'], results['n']
    measured = (f"Exact match on {n:,} problems of `{results['dataset']}` "
                f"({results['split']}): {accuracy:.1%} ± "
                f"{results['standard_error']['final']:.1%}, seed {results['seed']}, "
                f"checkpoint of step {results['step']}.")
  else:
    measured = 'Not measured.'
  start = f' It started from `{config.model.init_from}`.' if config.model.init_from else ''
  return f'''---
tags: [latent-reasoning, {config.method}]
---
# {config.method} on {config.data.name}

Trained by `latent_reasoning` with the method `{config.method}` on the data
`{config.data.name}`, seed {config.seed}.{start}

## Measured

{measured}

## How to ask

The question, what stands in for the reasoning, then greedy decoding until `<end>`. Plain
causal attention: no code of its own.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained('.')
model = AutoModelForCausalLM.from_pretrained('.')
prompt = question + {prompt(config)!r}
ids = tokenizer(prompt, return_tensors='pt')
out = model.generate(**ids, max_new_tokens={config.eval.max_tokens})
print(tokenizer.decode(out[0, ids['input_ids'].shape[1]:], skip_special_tokens=True))
```

A question must not hold the text of a special token such as `<m>`: here, as everywhere in
`transformers`, it would become one.
'''
