"""RiM on GSM8K: the paper's recipe on pretrained weights (arXiv 2605.30343).

  python -m latent_reasoning.main --config=configs/rim_gsm8k.py \\
      --config.data.dir=GSM8K_AUG_DIRECTORY --config.model.init_from=GPT2_DIRECTORY

Without the directories, both come from the hub (extra `hf`). GPT-2, LoRA of rank 128,
all else frozen but the new tokens. Variants: `llama1b`, `llama3b` and `qwen` begin with
other weights; `smollm2`, with SmolLM2-135M, learns the 7,473 problems of GSM8K itself;
`smollm2_short` those of at most three steps, for two cores (not run yet). `tiny`,
from scratch, runs the same code on GSM8K itself, on a laptop. Learning rates, dropout and
LoRA's targets are ours, the paper does not publish them. `tiny` shows the path, not a
result: 2% of 256 test problems after 10 minutes on one busy core (AMD EPYC, jax 0.10.2,
2026-11-21, seed 0); loss 4.14 to 1.80 in stage 1, 1.95 to 1.59 in stage 2.
"""

import ml_collections

from latent_reasoning import config

PRETRAINED = {
    '': 'openai-community/gpt2', 'llama1b': 'meta-llama/Llama-3.2-1B',
    'llama3b': 'meta-llama/Llama-3.2-3B', 'qwen': 'Qwen/Qwen2.5-0.5B',
    'smollm2': 'HuggingFaceTB/SmolLM2-135M', 'smollm2_short': 'HuggingFaceTB/SmolLM2-135M',
    'tiny': ''}


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  if variant not in PRETRAINED:
    raise ValueError(f"rim_gsm8k has no variant '{variant}'; known: "
                     f"{', '.join(filter(None, PRETRAINED))}")
  c = config.default()
  c.data.update(name='gsm8k_aug', too_long='drop', packing=True)
  c.data.arithmetic.update(min_steps=1, max_steps=8, modulus=0, templates=8)
  c.data.buckets.update(prefix=(128, 256, 384), readout=(16, 32, 128), count=(2, 4, 8, 13, 16))
  c.tokenizer.update(kind='bpe', vocab_size=16_384, pad_to=128)  # of a model from scratch
  c.model.init_from = PRETRAINED[variant]  # sets the sizes; these are GPT-2's
  c.model.update(num_layers=12, embed_dim=768, num_heads=12, mlp_dim=3072, max_positions=1024,
                 dtype='bfloat16', scan=True)
  c.model.lora.update(rank=128, dropout=0.1)
  c.rim.update(blocks=8, max_steps=13, schedule='relative')
  c.baselines.update(pause_tokens=32, latents=2)
  c.optim.update(trainable='new', batch_size=128, beta2=0.999)
  c.optim.stage1.update(epochs=6.0, learning_rate=3e-4, schedule='constant', dropout=0.05)
  # The switch: a lower rate, more dropout.
  c.optim.stage2.update(epochs=2.0, learning_rate=1e-4, schedule='constant', dropout=0.1)
  c.train.eval_every = 2000
  if variant == 'tiny':
    _tiny(c)
  elif variant in ('smollm2', 'smollm2_short'):
    c.data.name = 'gsm8k'
    c.train.eval_every = 200
    if variant == 'smollm2_short':
      _three_steps(c)
  elif variant in ('llama1b', 'llama3b'):
    c.model.update(remat='full', frozen_dtype='bfloat16')
  return c


def _three_steps(c: ml_collections.ConfigDict) -> None:
  """Problems of at most three steps, for two cores."""
  c.data.max_steps = 3
  c.data.buckets.update(prefix=(136,), readout=(24, 72), count=(1, 4))
  c.model.dtype = 'float32'
  c.rim.update(blocks=4, max_steps=3)
  c.baselines.update(pause_tokens=16, latents=1, parts=4)
  c.optim.batch_size = 16
  c.optim.stage1.update(steps=400, epochs=0.0)
  c.optim.stage2.update(steps=150, epochs=0.0)
  c.train.update(log_every=10, eval_every=100, save_every=50)
  c.eval.update(batch_size=32, valid_problems=64, test_problems=400, max_new_tokens=80)


def _tiny(c: ml_collections.ConfigDict) -> None:
  """GSM8K itself on two cores: both stages of the same code, in minutes."""
  c.data.update(name='gsm8k', packing=False, sort_window=16)
  c.data.buckets.update(prefix=(160, 384), readout=(32, 128), count=(3, 8))
  c.tokenizer.update(vocab_size=1024, pad_to=8)
  c.model.update(num_layers=4, embed_dim=64, num_heads=4, mlp_dim=256, max_positions=640,
                 dtype='float32', scan=False)
  c.model.lora.rank, c.optim.trainable = 0, 'all'
  c.optim.update(batch_size=16, max_epochs=30)  # of own data, which may be a few problems
  c.optim.stage1.update(steps=300, epochs=0.0, learning_rate=2e-3)
  c.optim.stage2.update(steps=300, epochs=0.0, learning_rate=1e-3)
  c.train.update(log_every=20, eval_every=150, save_every=50)
  c.eval.update(valid_problems=128, test_problems=256, max_new_tokens=64)
