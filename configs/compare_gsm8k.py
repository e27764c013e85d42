"""Every method on GSM8K, one command.

  python -m latent_reasoning.main --mode=compare --config=configs/compare_gsm8k.py \\
      --config.data.dir=GSM8K_AUG_DIRECTORY --config.model.init_from=GPT2_DIRECTORY

GPT-2 with LoRA on GSM8K-Aug, the recipe of rim_gsm8k.py for every method, seeds 0, 1, 2:
for a GPU. Without the directories, both come from the hub (extra `hf`). Variants:

  :smollm2   SmolLM2-135M on GSM8K itself, with LOTUS in place of CODI and iCoT: for a GPU
  :smollm2_short  the same on problems of at most three steps, direct, CoT and RiM, seed 0:
             rim_gsm8k.py:smollm2_short for each, for two cores (not run yet)

and from scratch on GSM8K itself, in a small model whose accuracy is near zero:

  :short     rim_gsm8k.py:tiny for every method: the path, and the costs
  :smoke     the whole path in a few minutes
  :controls  the controls of compare_arithmetic.py that this recipe can express, on GPT-2
"""

import pathlib
import runpy

import ml_collections

HERE = pathlib.Path(__file__)
base = runpy.run_path(str(HERE.with_name('rim_gsm8k.py')))['get_config']
SMOLLM2 = ('direct method=direct', 'cot method=cot', 'rim method=rim',
           'direct_steps method=direct_steps', 'pause_steps method=pause_steps',
           'lotus method=lotus', 'coconut method=coconut')
METHODS = runpy.run_path(str(HERE.with_name('compare_arithmetic.py')))['METHODS']

CONTROLS = (
    'direct method=direct', 'direct_steps method=direct_steps', 'pause method=pause',
    'pause_steps method=pause_steps', 'rim method=rim',  # its annealing is relative
    'rim_uniform rim.schedule=uniform', 'rim_linear rim.schedule=linear',
    'rim_one_stage optim.stage1.epochs=0.0 optim.stage2.epochs=8.0 '
    'optim.stage2.learning_rate=3e-4',
    'rim_no_reset optim.stage2.reset_optimizer=False',
    'rim_blind rim.readout_sees_question=False', 'rim_offset_0 rim.readout_offset=0')


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  if variant not in ('', 'short', 'smoke', 'controls', 'smollm2', 'smollm2_short'):
    raise ValueError(f"compare_gsm8k has no variant '{variant}'; expected short, smoke, "
                     'controls, smollm2 or smollm2_short')
  c = base('tiny' if variant in ('short', 'smoke') else variant.replace('controls', ''))
  if variant in ('', 'smollm2'):  # continuous thoughts cannot be packed; equal for all
    c.data.update(packing=False, sort_window=16)
  c.sweep.runs = {'controls': CONTROLS, 'smollm2': SMOLLM2,
                  'smollm2_short': SMOLLM2[:3]}.get(variant, METHODS)
  c.sweep.seeds = (0, 1, 2)
  c.sweep.control = 'direct'
  if variant == 'smollm2_short':
    c.sweep.seeds = (0,)
  if variant == 'smoke':
    c.sweep.seeds = (0,)
    c.data.limit = 400
    c.model.update(num_layers=2, embed_dim=32, mlp_dim=64)
    c.optim.stage1.steps, c.optim.stage2.steps = 10, 10
    c.train.update(log_every=2, eval_every=10, save_every=0)
    c.eval.update(batch_size=16, valid_problems=16, test_problems=32, latency_repeats=3)
  return c
