"""Depth against width: K blocks of RiM in L passes, K · L the number of operations.

  python -m latent_reasoning.main --mode=compare --config=configs/compare_depth.py

Chains of exactly eight operations and a model of two layers, so that neither a layer nor a
block alone has room for them. Steps, learning rates, step labels, readouts, data and decoder
are those of rim_arithmetic.py for every arm; (8, 1) is RiM, (1, 8) one block in eight passes.
On 2026-11-30 (seeds 0, 1, 2; a core of an AMD EPYC a run, jax 0.10.2): (8, 1) 35.1%, (4, 2)
36.2, (2, 4) 38.8, (1, 8) 99.6, a chain of thought 100.0. What lacks here is serial depth; the
middle gains little in these steps. Of the variants `mixed`, `variables` and `registers` were
run, with seed 0. The last two no arm learns in these steps, a chain of thought neither (5.2 and
0.2%, RiM 5.9 and 0.1, one block 6.1 and 0.8), so they decide nothing yet:

  :controls      depth that is not shared (8 layers), depth of all tokens (a trunk looped four
                 times), blocks that do not see each other from the second pass on
  :long          4,000 steps of stage 1, in place of 1,800
  :mixed         chains of two to eight, their answers held behind the last step, and rotary
                 positions, to ask longer ones than trained: --mode=scaling of a run with
                 '--config.eval.sets=("min_steps=9,max_steps=12",)'
  :permutations  words of eight letters over S5, bound by depth (data.state_tracking)
  :hops          eight hops in a text of 32 letters, bound by depth
  :variables     eight assignments to four variables, all of which are asked
  :registers     the same by numbers, each variable twice: bound by memory, less by depth
  :smoke         the whole path on a toy, in minutes; its numbers mean nothing
"""

import pathlib
import runpy

import ml_collections

base = runpy.run_path(str(pathlib.Path(__file__).with_name('rim_arithmetic.py')))['get_config']

ARMS = tuple(f'rim_{k}x{8 // k} rim.blocks={k} rim.passes={8 // k}' for k in (8, 4, 2, 1))
METHODS = (*ARMS, *(f'{name} method={name}' for name in ('direct_steps', 'cot')))
CONTROLS = (
    'rim_8x1', 'direct method=direct', 'pause_steps method=pause_steps',
    'rim_layers_8 model.num_layers=8', 'rim_trunk_4 model.loop.count=4',
    *(f'{arm.replace(" ", "_causal ", 1)} rim.pass_attention=causal' for arm in ARMS[1:3]))
TASKS = ('permutations', 'hops', 'variables', 'registers')


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  if variant not in ('', 'controls', 'long', 'mixed', 'smoke', *TASKS):
    raise ValueError(f"compare_depth has no variant '{variant}'; expected controls, long, "
                     f'mixed, smoke or one of {TASKS}')
  c = base('8')
  c.model.num_layers = 2
  c.optim.stage1.steps, c.optim.stage2.steps = 1800, 600
  c.train.update(eval_every=300, save_every=300)
  c.sweep.runs = CONTROLS if variant == 'controls' else METHODS
  c.sweep.control = 'rim_8x1'
  if variant == 'long':
    c.optim.stage1.steps, c.train.eval_every = 4000, 500
    c.sweep.runs = ARMS
  if variant == 'mixed':
    c.data.arithmetic.min_steps = 2
    c.model.position_embedding = 'rotary'
    c.rim.hold_answer = True
    c.sweep.runs = ('rim rim.hold_answer=False', *METHODS)
    c.sweep.control = 'rim'
  if variant in TASKS:
    c.data.name = 'state_tracking'
    c.data.state_tracking.update(task=variant, min_steps=8, max_steps=8, live=4, length=32)
  if variant == 'smoke':
    c.sweep.seeds = (0,)
    c.model.update(embed_dim=32, mlp_dim=64)
    c.optim.stage1.steps, c.optim.stage2.steps = 20, 10
    c.train.update(log_every=5, eval_every=10, save_every=0)
    c.data.arithmetic.test_size = 64
    c.eval.update(batch_size=32, valid_problems=32, latency_repeats=5)
  return c
