"""Every method on generated chains of operations, one command.

  python -m latent_reasoning.main --mode=compare --config=configs/compare_arithmetic.py

Chains of 2 to 4 operations; model, steps, learning rates, data, decoder and evaluator are
those of rim_arithmetic.py for every method, seeds 0, 1, 2. What a method needs beside
that stands in its run below. Ends in compare.json, table.md and figures; resumes.
Variants:

  :short     1,300 steps
  :four      chains of exactly four, as many as layers: where memory decides
  :searched  as :four, more methods, each until validation improves no more, at learning rates
             (and what its paper searches) found in as many trials as any other's
  :searched_smoke  its whole path on a toy, three methods
  :smoke     the whole path on a toy, in minutes; its numbers mean nothing
  :controls  what of RiM matters: step supervision, stages, schedules, what readouts see
  :length    chains of 2, 4 and 6 operations, a model for each
  :depth     1, 2, 4 and 6 layers, chains of 4
  :width     width 32, 64 and 128, chains of 4
  :blocks    1, 2, 4, 6 and 8 blocks of RiM, and as many pause tokens, chains of 4
  :scale     54 thousand to 6.3 million parameters
"""

import pathlib
import runpy

import ml_collections

base = runpy.run_path(str(pathlib.Path(__file__).with_name('rim_arithmetic.py')))['get_config']

MAPPED = ('direct', 'direct_steps', 'pause_steps', 'rim', 'cot')
METHODS = (*(f'{name} method={name}' for name in (
    'direct', 'direct_steps', 'cot', 'pause', 'icot', 'coconut')),
           'codi method=codi baselines.latents=4 baselines.projection=True',
           'rim method=rim')
PARTS = ('icot', 'coconut')  # whose stage 1 is a curriculum of its own

CONTROLS = (
    'direct method=direct', 'direct_steps method=direct_steps',
    'pause method=pause',  # as many pause tokens as RiM has block tokens
    'pause_steps method=pause_steps',  # and RiM's step supervision
    'rim method=rim',  # its annealing is uniform
    'rim_linear rim.schedule=linear', 'rim_relative rim.schedule=relative',
    'rim_one_stage optim.stage1.steps=0 optim.stage2.steps=2600 optim.stage2.optimizer=muon '
    'optim.stage2.learning_rate=3e-3',
    # The optimizer's state can only be kept where both stages have the same optimizer.
    'rim_muon optim.stage2.optimizer=muon',
    'rim_no_reset optim.stage2.optimizer=muon optim.stage2.reset_optimizer=False',
    'rim_blind rim.readout_sees_question=False', 'rim_offset_0 rim.readout_offset=0')

# Without shorter chains to begin from, step supervision alone does not get there.
FOUR = ('direct', 'direct_steps', 'pause_steps', 'coconut', 'rim', 'cot')

# Until validation improves no more: how long, and in how many trials each method is tuned.
# What two stages predict alike is one stage; step supervision is the first half.
RIVALS = (
    'coconut_mixed method=coconut baselines.mix_parts=True',
    'sim_cot method=coconut baselines.latents=2 reasoning_decoder.source=latents '
    'reasoning_decoder.joint=True reasoning_decoder.weight=1.0',
    'kava method=codi baselines.latents=4 baselines.projection=True baselines.kv_weight=1.0',
    'pccot method=pccot baselines.latents=8', 'lotus method=lotus baselines.latents=4',
    # RiM's block in four passes, and blocks under LOTUS's supervision: places for 7+2=9, end.
    'rim_1x4 method=rim rim.blocks=1 rim.passes=4',
    'rim_parallel method=rim_parallel rim.block_tokens=5')
ONE_STAGE = ('direct', 'pause', 'cot', 'codi', 'icot', 'coconut', 'coconut_mixed', 'sim_cot',
             'kava', 'pccot', 'lotus')
SEARCHED = (*METHODS, *RIVALS, 'pause_steps method=pause_steps')
SEARCH = ('optim.stage1.learning_rate=1e-3,3e-3,6e-3',
          *(f'{name} optim.stage2.learning_rate=2e-4,4e-4,1e-3'
            for name in ('direct_steps', 'pause_steps', 'rim', 'rim_1x4')),
          'icot baselines.smoothing=2.0,4.0', 'coconut baselines.latents=1,2',
          *(f'{name} baselines.distill_weight=1.0,5.0,20.0' for name in ('codi', 'pccot')),
          'kava baselines.kv_weight=0.3,1.0,3.0',
          *(f'{name} baselines.step_weight=0.05,0.5' for name in ('lotus', 'rim_parallel')))

SIZES = {'tiny': (2, 32, 4), 'small': (4, 64, 4), 'medium': (6, 128, 8), 'large': (8, 256, 8)}


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  if variant not in VARIANTS:
    raise ValueError(f"compare_arithmetic has no variant '{variant}'; expected one of "
                     f'{VARIANTS[1:]}')
  c = base('4')
  c.optim.stage1.steps, c.optim.stage2.steps = 1800, 800
  if variant in ('', 'short', 'smoke', 'controls'):
    c.data.arithmetic.min_steps = 2
  c.sweep.runs = METHODS
  c.sweep.seeds = (0, 1, 2)
  c.sweep.control = 'direct'
  if variant == 'short':
    c.optim.stage1.steps, c.optim.stage2.steps = 800, 500
    c.train.eval_every = c.train.save_every = 250
    c.data.arithmetic.test_size = 1_000
  elif variant == 'smoke':
    _smoke(c)
  elif variant in ('searched', 'searched_smoke'):
    _searched(c, 5000)
    if variant == 'searched_smoke':
      _smoke(c)
      _searched(c, 50, ('direct', 'coconut', 'rim'))
    return c
  elif variant == 'four':
    c.sweep.runs = tuple(f'{name} method={name}' for name in FOUR)
  c.sweep.runs = _longer_parts(c)
  if variant == 'controls':
    c.sweep.runs = CONTROLS
  elif variant in VARIED:
    c.sweep.control = ''  # each size has its own
    c.sweep.runs = VARIED[variant](c)
  return c


def _mapped(name: str, methods: tuple[str, ...], values: dict) -> tuple[str, ...]:
  """Runs of some methods with each of {value: overrides}."""
  return tuple(f'{method}_{name}_{value} method={method} {more}'
               for value, more in values.items() for method in methods)


VARIED = {
    'length': lambda c: _mapped('length', MAPPED, {n: _chain(n, c) for n in (2, 4, 6)}),
    'depth': lambda c: _mapped('layers', MAPPED, {
        n: f'model.num_layers={n}' for n in (1, 2, 4, 6)}),
    'width': lambda c: _mapped('width', MAPPED, {
        n: f'model.embed_dim={n} model.mlp_dim={4 * n}' for n in (32, 64, 128)}),
    'blocks': lambda c: _mapped('blocks', ('rim', 'pause_steps'), {
        n: f'rim.blocks={n} baselines.pause_tokens={4 * n}' for n in (1, 2, 4, 6, 8)}),
    'scale': lambda c: _mapped('size', MAPPED, {
        size: f'model.num_layers={layers} model.embed_dim={width} model.num_heads={heads} '
        f'model.mlp_dim={4 * width}' for size, (layers, width, heads) in SIZES.items()})}
VARIANTS = ('', 'short', 'four', 'searched', 'searched_smoke', 'smoke', 'controls', *VARIED)


def _longer_parts(c: ml_collections.ConfigDict) -> tuple[str, ...]:
  """The methods, where those with parts have nine tenths of the same steps for them, at a
  constant rate: each part begins anew, and goes on until it is learned."""
  total = c.optim.stage1.steps + c.optim.stage2.steps
  own = (f' optim.stage1.steps={total * 9 // 10} optim.stage2.steps={total - total * 9 // 10} '
         f'optim.stage1.schedule=constant train.eval_every={max(5, total // 26)} '
         'baselines.part_accuracy=0.95 baselines.part_patience=8')
  return tuple(run + own * (run.split()[0] in PARTS) for run in c.sweep.runs)


def _searched(c: ml_collections.ConfigDict, most: int, names: tuple[str, ...] = ()) -> None:
  """At most so many steps at a constant rate, until validation improves no more, at what is
  best in three trials of each method; of those named alone, in two."""
  c.train.eval_every = c.train.save_every = most // 25
  c.optim.patience = 3 if names else 6
  c.optim.stage1.update(steps=most // 2, schedule='constant')
  c.optim.stage2.update(steps=most - most // 2, schedule='constant')
  parts = ' baselines.part_accuracy=0.95 baselines.part_patience=4'
  one = f' optim.stage1.steps={most} optim.stage2.steps=0'
  c.sweep.runs = tuple(run + one * (run.split()[0] in ONE_STAGE) + parts * (
      run.split()[0] in (*PARTS, 'coconut_mixed', 'sim_cot', 'lotus')) for run in SEARCHED
      if not names or run.split()[0] in names)
  c.sweep.search = tuple(entry for entry in SEARCH
                         if not names or '=' in entry.split()[0] or entry.split()[0] in names)
  c.sweep.trials = 2 if names else 3
  c.sweep.budget = 'patience'


def _chain(steps: int, c: ml_collections.ConfigDict) -> str:
  """All that a chain of another length changes, as overrides."""
  new, old = (config.to_dict() for config in (base(str(steps)), c))
  keys = [('data', 'arithmetic'), ('rim',), ('baselines',), ('eval',)]
  kept = ('test_size',)  # as in this config
  found = []
  for path in keys:
    one, other = new, old
    for name in path:
      one, other = one[name], other[name]
    found += [f"{'.'.join(path)}.{k}={str(v).replace(' ', '')}" for k, v in one.items()
              if v != other[k] and k not in kept and not isinstance(v, dict)]
  return ' '.join(found)


def _smoke(c: ml_collections.ConfigDict) -> None:
  """One seed of a toy model, a few steps."""
  c.model.update(num_layers=2, embed_dim=32, mlp_dim=64)
  c.optim.stage1.steps, c.optim.stage2.steps = 30, 20
  c.train.update(log_every=5, eval_every=20, save_every=0)
  c.data.arithmetic.test_size = 64
  c.eval.update(batch_size=32, valid_problems=32, latency_repeats=5)
  c.sweep.seeds = (0,)
