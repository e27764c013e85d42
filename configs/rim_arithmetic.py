"""RiM on generated chains of operations: the default job, no download.

  python -m latent_reasoning.main --config=configs/rim_arithmetic.py

Chains of one to four operations: the later the block, the more of them it can answer. Reaches
98.3, 95.3 and 96.5% at the final block (seeds 0, 1, 2; with seed 0, block by block, 46.6, 64.1,
82.2, 98.3; `direct`: 35%) in six minutes on two cores of an AMD EPYC, jax 0.10.2, 2026-11-29.

The variant is a number of operations, 2 to 8: chains of exactly so many. With 4 it reaches
99.9, 100.0 and 99.8% (seeds 0, 1, 2; 2026-11-27). The model has four layers:
`rim_arithmetic.py:5` asks for more operations than layers.
"""

import ml_collections

from latent_reasoning import config


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  if variant not in ('', *'2345678'):
    raise ValueError(f"rim_arithmetic has no variant '{variant}'; expected the number "
                     'of operations, 2 to 8')
  steps = int(variant or 4)  # at most
  question = 2 * (steps + 1)  # tokens, at least: 7+2-5*3+4 and a line's end

  c = config.default()
  c.data.arithmetic.update(min_steps=steps if variant else 1, max_steps=steps)
  c.data.buckets.prefix = (question, question + 4 * steps)
  c.data.buckets.readout = (1, 5, 6, 6 * steps + 6)  # answer, step, chain of thought
  c.data.buckets.count = (*range(1, steps + 1), 2 * steps)  # twice: externalize
  c.model.tie_embeddings = False  # learns faster here
  c.rim.update(blocks=steps, max_steps=steps)
  c.baselines.pause_tokens = 4 * steps  # as many as RiM's block tokens
  c.baselines.parts = steps + 1
  c.optim.stage1.update(steps=2800 if variant else 3400, learning_rate=3e-3, optimizer='muon')
  c.optim.stage2.steps = 1000 if variant else 1200  # muon stays below adamw here
  c.optim.stage2.learning_rate = 4e-4  # 1e-3 forgets the chain
  c.eval.update(batch_size=250, max_new_tokens=6 * steps + 10)
  return c
