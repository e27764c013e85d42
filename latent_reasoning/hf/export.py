"""A trained model as a directory that `transformers` and other engines load as it is.

Whole weights ('hf'), or an adapter for the weights that training began with ('peft').
What is written is plain causal attention: a question, K blocks, greedy decoding until
the end token. What needs code of its own (a memory inside the layers, attention inside
a block in both directions) is refused.
"""

import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import chex
import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from latent_reasoning import methods
from latent_reasoning.config import Config
from latent_reasoning.data import gguf_file
from latent_reasoning.data.example import Example
from latent_reasoning.data.tokenizers import Tokenizer
from latent_reasoning.errors import InputError
from latent_reasoning.hf import eval_harness, families, model_card, native
from latent_reasoning.hf import load as pretrained
from latent_reasoning.models import lora
from latent_reasoning.train.workdir import write_json, write_text


def check(config: Config) -> None:
  """Raises InputError where a model is none that others have code for."""
  rim, said = config.rim, []
  if config.imm.write_policy:
    said.append(f"config.imm.write_policy '{config.imm.write_policy}', a memory inside the "
                f"layers")
  if methods.get(config.method).has_latents:
    said.append(f'continuous thoughts (method {config.method})')
  if methods.get(config.method).has_blocks and rim.block_attention != 'causal':
    said.append(f"config.rim.block_attention '{rim.block_attention}'")
  if methods.get(config.method).has_blocks and rim.passes > 1:
    said.append(f'config.rim.passes {rim.passes}, of which the later read hidden states')
  if config.model.loop.count > 1:
    said.append(f'config.model.loop.count {config.model.loop.count}, layers passed several '
                'times')
  if not rim.readout_sees_question:
    said.append('config.rim.readout_sees_question=False')
  if said:
    raise InputError(f"the model has {'; '.join(said)}: no other engine has code for it. "
                     'Only plain causal models can be exported for others; --format=native '
                     'writes it for this package')
  families.find(config.model)


def tensors(config: Config, params: dict, tokens: int) -> dict[str, np.ndarray]:
  """All weights by the names of files; tables have the rows of `tokens` tokens."""
  model = config.model
  found = {}
  for theirs, (name, layer) in families.names(model).items():
    value = _at(config, params, name.ours, layer)
    value = name.write(value)
    found[_full(config, theirs)] = value[:tokens] if name.ours[-1] in TABLES else value
  return found


TABLES = ('embedding', 'head')  # parameters with a row a token


def _at(config: Config, params: dict, ours: tuple[str, ...], layer: int | None):
  """One parameter, of one layer; None: there is none."""
  path = [part.format(layer) for part in ours]
  stacked = config.model.scan and layer is not None
  if stacked:
    path[0] = 'blocks'
  for part in path:
    if part not in params:
      return None
    params = params[part]
  return np.asarray(params[layer] if stacked else params)


def _full(config: Config, theirs: str) -> str:
  """A name with the prefix that it has in files."""
  family = families.find(config.model)
  return theirs if theirs == family.head else family.prefix + theirs


def adapter(config: Config, params: dict,
            tokens: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """What was trained beside the frozen weights, as PEFT names it, and its configuration.

  Rows of new tokens are PEFT's "trainable tokens": they replace rows of the resized
  tables, which are not stored. A tied head follows its table there.

  Raises:
    InputError: there is no LoRA, or more than it was trained.
  """
  model, lora = config.model, config.model.lora
  if model.init_from and native.find(model.init_from):
    raise InputError(f'an adapter is for weights that PEFT loads; found '
                     f'config.model.init_from {model.init_from!r}, of this package. Expected '
                     '--format=hf or native')
  if model.init_from and pretrained.directory(model.init_from).is_file():
    raise InputError(f'an adapter is for weights that PEFT loads; found config.model.init_from '
                     f'{model.init_from!r}, a GGUF. Expected --format=hf or native')
  if not (model.init_from and lora.rank and config.optim.trainable == 'new'):
    raise InputError(
        f"an adapter is LoRA on pretrained weights; found config.model.init_from "
        f"{model.init_from!r}, config.model.lora.rank {lora.rank} and config.optim.trainable "
        f"'{config.optim.trainable}'. Expected weights to start from, a rank above 0 and "
        f"'new'; "
        'or export whole weights with --format=hf')
  found, modules, rows = {}, {}, {}
  for theirs, (name, layer) in families.names(model).items():
    if name.ours[-1] in TABLES:
      new = _at(config, params, (f'new_{name.ours[-1]}',), None)
      known = _at(config, params, name.ours, None)
      if new is not None:
        axis = name.ours[-1] == 'head'
        module = 'lm_head' if axis else _full(config, theirs).removesuffix('.weight')
        first = known.shape[axis]
        rows[module.rpartition('.')[2]] = list(range(first, tokens))
        found[f'{module}.token_adapter.trainable_tokens_delta'] = (
            new.T if axis else new)[:tokens - first]
    elif name.ours[-1] == 'kernel':
      a, b = (_at(config, params, (*name.ours[:-1], f'lora_{x}'), layer) for x in 'ab')
      if a is not None:
        module = _full(config, theirs).removesuffix('.weight')
        modules.setdefault(name.theirs.partition('{}.')[2].removesuffix('.weight'), []).append(
            module)
        found[f'{module}.lora_A.weight'], found[f'{module}.lora_B.weight'] = a.T, name.order(
            b).T
  targets = []  # by kind where all layers have it
  for kind, own in modules.items():
    targets += [kind] if len(own) == model.num_layers else own
  return {f'base_model.model.{name}': a for name, a in found.items()}, {
      'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'inference_mode': True,
      'base_model_name_or_path': model.init_from, 'r': lora.rank, 'lora_alpha': lora.alpha,
      'lora_dropout': lora.dropout, 'bias': 'none',
      'fan_in_fan_out': families.find(model).conv1d,
      'target_modules': targets, 'trainable_token_indices': rows or None}


def tokenizer_files(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
  """tokenizer.json with our special tokens at their ids, and its configuration.

  In front of a text stands what stood there in training, BOS or nothing; nothing behind it.
  """
  held, names = tokenizer.to_json(), tokenizer.special()
  bos = [tokenizer.text(i) for i in tokenizer.start]
  chat = {}
  start = config.model.init_from
  if start and not native.find(start) and _talks(pretrained.directory(start)):
    found = model_card.chat_template(config, tokenizer, held)
    chat = {'chat_template': found} if found else {}
  return {
      'tokenizer.json': held,
      'tokenizer_config.json': {
          'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': names[tokenizer.end],
          'pad_token': names[tokenizer.pad], **({'bos_token': bos[0]} if bos else {}),
          'add_bos_token': bool(bos), 'padding_side': 'left',
          'model_max_length': config.model.max_positions,
          'clean_up_tokenization_spaces': False, **chat}}


def _talks(folder: pathlib.Path) -> bool:
  """Whether a checkpoint has a chat template."""
  if folder.is_file():
    return 'tokenizer.chat_template' in gguf_file.opened(folder).values
  settings = folder / 'tokenizer_config.json'
  return (folder / 'chat_template.jinja').is_file() or (
      settings.is_file() and bool(pretrained.read_json(settings).get('chat_template')))


def write(config: Config, params: chex.ArrayTree, tokenizer: Tokenizer, path: pathlib.Path,
          results: dict[str, Any] | None, kind: str = 'hf', step: int = 0,
          problems: tuple[Sequence[Example], str] | None = None) -> None:
  """Writes the directory, whole or not at all, and reads its weights back.

  Args:
    config: of the run.
    params: its parameters.
    tokenizer: its tokenizer.
    path: of the new directory; one that is there is replaced.
    results: results.json, for the model card; None: not measured.
    kind: 'hf', whole weights; 'peft', an adapter; 'native', what this package alone reads
      (hf.native), of any method.
    step: that the parameters were trained for.
    problems: what a task for lm-evaluation-harness scores, and its rule; None: no task.

  Raises:
    InputError: the model is none that others have code for, or no adapter.
  """
  if kind != 'native':
    check(config)
  if path.is_symlink() or path.exists() and not path.is_dir():
    raise InputError(f'{path} is a link or a file, which an export would replace; move it away')
  ids = {'bos_token_id': next(iter(tokenizer.start), None), 'eos_token_id': tokenizer.end,
         'pad_token_id': tokenizer.pad}
  if kind == 'peft':
    file = 'adapter_model.safetensors'
    weights, values = adapter(config, jax.device_get(params), tokenizer.used)
    files = {'adapter_config.json': values}
  elif kind == 'native':
    file = 'model.safetensors'
    weights = native.tensors(jax.device_get(params))
    files = {'config.json': native.values(config, step)}
  else:
    file = 'model.safetensors'
    weights = tensors(config, jax.device_get(lora.merge(params, config.model.lora)),
                      tokenizer.used)
    files = {
        'config.json': families.hf_config(config.model, tokenizer.used, **ids),
        'generation_config.json': {
            'do_sample': False, 'max_new_tokens': config.eval.max_new_tokens, **ids}}
  files.update(tokenizer_files(config, tokenizer))
  chat = 'chat_template' in files['tokenizer_config.json']
  making = path.with_name(f'.{path.name}.tmp')
  shutil.rmtree(making, ignore_errors=True)
  making.mkdir(parents=True)
  _save(weights, making / file)
  for name, value in files.items():
    write_json(making / name, value)
  task = ''
  if problems and kind == 'hf' and not methods.get(config.method).is_text:
    eval_harness.write(config, tokenizer, making, *problems)
    task = eval_harness.name(config)
  write_text(making / 'README.md', model_card.native(config, results) if kind == 'native' else
             model_card.card(config, tokenizer, kind, results, chat, task))
  shutil.rmtree(path, ignore_errors=True)
  making.rename(path)


def _save(weights: dict[str, np.ndarray], file: pathlib.Path) -> None:
  """Writes tensors and reads them back."""
  # Contiguous: safetensors writes the memory of other arrays, in the wrong order.
  weights = {name: np.ascontiguousarray(a) for name, a in weights.items()}
  save_file(weights, file, metadata={'format': 'pt'})
  back = load_file(file)
  wrong = [name for name, value in weights.items() if not np.array_equal(back[name], value)]
  if wrong or back.keys() != weights.keys():
    raise RuntimeError(f'{file}: read back, {wrong} differ from what was written')
