"""RiM on ProsQA: trained on generated graphs, evaluated on the published problems.

  python -m latent_reasoning.main --config=configs/rim_prosqa.py \\
      --config.eval.sets='("VALID.json","TEST.json")'

with valid.json and test.json of ProsQA (facebookresearch/coconut, data/prosqa_*.json),
whose training file is not needed: data.graphs draws problems of the same distribution,
38 nonce words, 3 to 6 hops. A tiny GPT from scratch; the sizes are ours and were not
tuned: no training to the end was run, so no accuracy is claimed. For a GPU: a step takes
seconds on two cores. The rest is rim_arithmetic.py.
"""

import pathlib
import runpy

import ml_collections

base = runpy.run_path(str(pathlib.Path(__file__).with_name('rim_arithmetic.py')))['get_config']


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  if variant:
    raise ValueError(f"rim_prosqa has no variant '{variant}'; it has none at all")
  c = base()
  c.data.name = 'graphs'
  c.data.buckets.update(prefix=(352, 576), readout=(8, 64), count=(1, 4, 6))
  c.tokenizer.update(kind='bpe', vocab_size=512)
  c.model.update(embed_dim=128, num_heads=8, mlp_dim=512, max_positions=640)
  c.rim.update(blocks=6, max_steps=6)
  c.baselines.update(pause_tokens=24, parts=7)
  c.optim.batch_size = 32
  c.optim.stage1.update(steps=10_000, learning_rate=1e-3)
  c.optim.stage2.steps = 4_000
  c.train.eval_every = 1000
  c.eval.update(batch_size=100, max_new_tokens=64)
  return c
