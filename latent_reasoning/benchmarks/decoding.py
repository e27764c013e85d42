"""Decoding beside `transformers.generate`: the same GPT-2 weights, prompts and threads."""

import dataclasses
import os
import pathlib
import statistics
import tempfile
import time

import jax
import numpy as np

from latent_reasoning import batching, sequences
from latent_reasoning.config import ModelConfig
from latent_reasoning.errors import InputError
from latent_reasoning.eval import decoding
from latent_reasoning.hf import families
from latent_reasoning.hf import load as pretrained
from latent_reasoning.models.transformer import Transformer
from latent_reasoning.report import table

SHAPES = ((4, 128, 4), (12, 768, 12))  # layers, width, heads
BATCHES = (1, 16)
VOCABULARY, PROMPT, NEW = 50257, 64, 64


def theirs(path: pathlib.Path, shape: tuple[int, int, int]):
  """Random GPT-2 weights of transformers, kept at `path`."""
  import torch
  import transformers
  torch.set_num_threads(os.cpu_count() or 1)
  torch.manual_seed(0)
  layers, width, heads = shape
  model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
      n_layer=layers, n_embd=width, n_head=heads, bos_token_id=None, eos_token_id=None,
      pad_token_id=0)).eval()
  model.save_pretrained(path)

  def run(ids: np.ndarray, new: int) -> np.ndarray:
    ids = torch.from_numpy(ids).long()
    with torch.inference_mode():
      out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                           max_new_tokens=new, min_new_tokens=new, eos_token_id=None)
    return out[:, ids.shape[1]:].numpy()
  return run


def ours(path: pathlib.Path, base: ModelConfig, ids: np.ndarray):
  """The same weights here; programs are compiled ahead, one for a number of tokens."""
  values = pretrained.values(path)
  config = families.model_config(values, base, 'config.json')
  config = dataclasses.replace(config, init_from=str(path))
  model, size = Transformer(config, VOCABULARY), ids.shape[1]
  batch = jax.device_put(batching.collate(
      [sequences.causal(row, [sequences.Readout(size)]) for row in ids.tolist()], size, 1, 1))
  like = jax.eval_shape(model.init, jax.random.key(0), batch.tokens, batch.positions,
                        batch.mask)['params']
  params = pretrained.load(config, like, VOCABULARY, jax.random.key(0), dict)
  head, rng = decoding.head_kernel(model, params), jax.random.key(0)
  programs = {new: decoding.generate.lower(
      model, params, head, batch, rng, 1.0, end=-1, pad=0, max_tokens=new).compile()
      for new in (1, NEW)}

  def run(new: int) -> np.ndarray:
    return np.asarray(programs[new](params, head, batch, rng, 1.0))[:, 0]
  return run


def decode_table(args, base: ModelConfig) -> str:
  """Greedy, in turn; medians."""
  try:
    import transformers  # noqa: F401 said here, in one line
  except ImportError:
    raise InputError("transformers is not installed; pip install -e '.[test-hf]'"
                     ) from None
  lines = [['layers, width', 'batch', 'transformers tokens/s', 'ours', 'faster',
            'transformers first ms', 'ours', 'faster', 'same tokens']]
  for shape in SHAPES:
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder)
      hf = theirs(path, shape)
      for size in BATCHES:
        ids = np.random.default_rng(0).integers(VOCABULARY, size=(size, PROMPT))
        own = ours(path, base, ids)
        calls = {(name, new): call for new in (1, NEW) for name, call in (
            ('hf', lambda new=new, ids=ids, hf=hf: hf(ids, new)),
            ('own', lambda new=new, own=own: own(new)))}
        times = {key: [] for key in calls}
        for repeat in range(-1, args.repeats):  # in turn: slow moments fall on both
          said = {}
          for key, call in calls.items():
            began = time.perf_counter()
            said[key] = call()
            if repeat >= 0:  # the first one warms up
              times[key].append(time.perf_counter() - began)
        found = {key: statistics.median(own) for key, own in times.items()}
        first = [1e3 * found[name, 1] for name in ('hf', 'own')]
        speed = [size * NEW / found[name, NEW] for name in ('hf', 'own')]
        same = np.mean((said['hf', NEW] == said['own', NEW]).all(axis=1))
        lines.append([f'{shape[0]}, {shape[1]}', str(size), *(f'{s:.1f}' for s in speed),
                      f'{speed[1] / speed[0]:.2f}', *(f'{t:.1f}' for t in first),
                      f'{first[0] / first[1]:.2f}', f'{same:.0%}'])
  return (f'{PROMPT} tokens of prompt, {NEW} new ones, vocabulary {VOCABULARY}, '
          f'{os.cpu_count()} threads\n\n{table(lines)}')
