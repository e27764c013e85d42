"""Every method on ProsQA, paths through a graph described in words, one command.

  python -m latent_reasoning.main --mode=compare --config=configs/compare_prosqa.py \\
      --config.eval.sets='("VALID.json","TEST.json")'

Trained on generated graphs, scored on them and on the published files of ProsQA
(facebookresearch/coconut, data/). The recipe of rim_prosqa.py for every method, seeds 0,
1, 2: for a GPU. An answer names one of two classes, so a guess is right half of the time.
Variants:

  :letters   graphs of twelve nodes in letters, three or four hops (not run yet)
  :searched  as :letters, searched and stopped like compare_arithmetic.py:searched (not run yet)
  :short     fewer steps, two seeds: hours on two cores
  :smoke     the whole path in minutes; its numbers mean nothing
  :controls  the controls of compare_arithmetic.py
"""

import pathlib
import runpy

import ml_collections

HERE = pathlib.Path(__file__)
base = runpy.run_path(str(HERE.with_name('rim_prosqa.py')))['get_config']
methods = runpy.run_path(str(HERE.with_name('compare_arithmetic.py')))


def letters() -> ml_collections.ConfigDict:
  """Graphs for a model of four layers and width 64."""
  c = methods['base']('4')
  c.data.name = 'graphs'
  c.data.graphs.update(wording='letters', nodes=12, min_hops=3, max_hops=4)
  c.baselines.remove_tokens = 3  # an edge and a line's end
  c.eval.max_new_tokens = 24
  return c


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  if variant not in ('', 'letters', 'searched', 'short', 'smoke', 'controls'):
    raise ValueError(f"compare_prosqa has no variant '{variant}'; expected letters, searched, "
                     'short, smoke or controls')
  c = letters() if variant in ('letters', 'searched') else base()
  c.sweep.runs = methods['CONTROLS' if variant == 'controls' else 'METHODS']
  c.sweep.seeds = (0, 1, 2)
  c.sweep.control = 'direct'
  if variant == 'short':
    c.sweep.seeds = (0, 1)
    c.optim.stage1.steps, c.optim.stage2.steps = 1500, 500
  elif variant == 'smoke':
    c.sweep.seeds = (0,)
    c.model.update(num_layers=2, embed_dim=32, mlp_dim=64)
    c.optim.batch_size = 8
    c.optim.stage1.steps, c.optim.stage2.steps = 10, 10
    c.train.update(log_every=2, eval_every=10, save_every=0)
    c.data.graphs.test_size = 32
    c.eval.update(batch_size=16, valid_problems=16, test_problems=32, latency_repeats=3)
  if variant == 'searched':
    methods['_searched'](c, 5000)
  elif variant != 'controls':
    c.sweep.runs = methods['_longer_parts'](c)
  return c
