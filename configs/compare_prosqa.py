"""Every method on ProSQA, paths through a graph told in words, one command.

  python -m latent_reasoning.main --mode=compare --config=configs/compare_prosqa.py \\
      --config.data.dir=PROSQA_DIRECTORY --config.model.init_from=GPT2_DIRECTORY

PROSQA_DIRECTORY holds prosqa_train.json, prosqa_valid.json and prosqa_test.json of
Coconut's repository (facebookresearch/coconut, data/). The recipe of rim_gsm8k.py for
every method, seeds 0, 1, 2: for a GPU. An answer names one of two classes, so a guess is
right half of the time. Variants, each from scratch in a small model:

  :short     minutes a run on two cores
  :smoke     the whole path; --config.data.train=FILE serves where there is no training file
  :controls  the controls of compare_gsm8k.py, on GPT-2
"""

import pathlib
import runpy

import ml_collections

HERE = pathlib.Path(__file__)
base = runpy.run_path(str(HERE.with_name('compare_gsm8k.py')))['get_config']


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  if variant not in ('', 'short', 'smoke', 'controls'):
    raise ValueError(f"compare_prosqa has no variant '{variant}'; expected short, smoke or "
                     'controls')
  c = base(variant)
  small = variant in ('short', 'smoke')
  c.data.name = 'files'
  c.data.valid_size = 100  # where there is no file of it
  # A question has 220 to 320 tokens of a vocabulary made for it, more of GPT-2's.
  c.data.buckets.update(prefix=(256, 384) if small else (384, 512, 640),
                        readout=(8, 64) if small else (16, 128), count=(1, 6))
  c.rim.update(blocks=6, max_steps=6, pause_tokens=24)
  c.tokenizer.vocab_size = 512 if small else c.tokenizer.vocab_size
  c.eval.max_tokens = 64 if small else 128
  return c
