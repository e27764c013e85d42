"""RiM on generated chains of two to four operations: the default job, no download.

  python -m latent_reasoning.main --config=configs/rim_arithmetic.py

Reaches 98.0% at the final block and 37.4, 59.2, 81.4% before, in 291 s of two idle cores of an
AMD EPYC (seed 0, jax 0.10.2; 2026-11-30); on one core, which sums in another order, 97.0%,
where `direct` is at 35.5% in as many steps. Chains of exactly four (`:4`,
2,800 and 1,000 steps): 99.9, 100.0 and 99.8% (seeds 0, 1, 2; 2026-11-27).

The variant is a number of operations, from 2 to 8, that every chain has: `rim_arithmetic.py:5`
asks for more operations than the model's four layers. With chains of one operation among
them, `direct` learns to multiply (65.2% of chains of one to four, seed 0; 2026-11-29).
"""

import ml_collections

from latent_reasoning import config


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  if variant not in ('', *'2345678'):
    raise ValueError(f"rim_arithmetic has no variant '{variant}'; expected a number of "
                     'operations, 2 to 8')
  steps = int(variant or 4)  # at most

  c = config.default()
  c.data.arithmetic.update(min_steps=int(variant or 2), max_steps=steps)
  c.model.tie_embeddings = False  # learns faster here
  c.rim.update(blocks=steps, max_steps=steps)
  c.baselines.pause_tokens = 4 * steps  # as many as RiM's block tokens
  c.baselines.update(parts=steps + 1, remove_tokens=6)  # 7+2=9 and a line's end
  c.optim.stage1.update(steps=2800 if variant else 3400, learning_rate=3e-3, optimizer='muon')
  c.optim.stage2.steps = 1000 if variant else 1200  # muon stays below adamw here
  c.optim.stage2.learning_rate = 4e-4  # 1e-3 forgets the chain
  c.eval.update(batch_size=250, max_new_tokens=6 * steps + 10)
  return c
