"""The implicit memory in a small GPT on tiny Shakespeare, in nanoGPT's setting.

  python -m latent_reasoning.main --config=configs/imm_shakespeare.py \\
      --config.data.path=FILE

FILE is a text; without it, Shakespeare comes from the hub (extra `hf`). Each variant
but the first is a sweep over seeds, ends in a table and a figure, and resumes:

  :replication           GPT and every write policy, blocks of 64
  :replication_128, :replication_256   the same, longer blocks
  :controls              the GPT with as many parameters, and with as much time
  :slots                 N in 1 … 64, rank in 4 … full
  :mechanisms            write, query, low rank, norm, write per token: off one at a time
  :initialisation        what the paper leaves unspecified
  :replication_full      all block sizes, five seeds, 5,000 steps: for a GPU
"""

import ml_collections

from latent_reasoning import config

GPT, GATED = 'gpt imm.write_policy=', 'gated imm.write_policy=gated'
POLICIES = (GPT, *(f'{name} imm.write_policy={name}' for name in (
    'prefix_mean', 'ring', 'gated', 'delta', 'sequence_mean')))


def _blocks(*sizes: int) -> tuple[str, ...]:
  """Every policy at each block size."""
  return tuple(f'{run.split()[0]}_{size} {run.split()[1]} data.seq_len={size}'
               for size in sizes for run in POLICIES)


SWEEPS = {
    'replication': POLICIES,
    'replication_128': _blocks(128),
    'replication_256': _blocks(256),
    'replication_full': _blocks(64, 128, 256),
    # 13.9k parameters a layer are an MLP wider by 54; on two cores a step of gated takes as
    # long as 1.2 of the GPT alone.
    'controls': (GPT, GATED, 'delta imm.write_policy=delta',
                 'gpt_as_large imm.write_policy= model.mlp_dim=566',
                 'gpt_as_long imm.write_policy= optim.stage1.steps=2400'),
    'slots': (GPT, *(f'slots_{n} imm.slots={n}' for n in (1, 2, 4, 8, 16, 32, 64)),
              *(f'rank_{r} imm.linformer_rank={r}' for r in (4, 8, 16, 32, 64)),
              'rank_full imm.linformer_rank=0'),
    'mechanisms': (GPT, GATED, "no_write imm.ablate=('write',)",
                   "no_query imm.ablate=('query',)", "no_norm imm.ablate=('norm',)",
                   'full_rank imm.linformer_rank=0', 'write_every_16 imm.write_interval=16'),
    'initialisation': (GPT, GATED, 'out_zero imm.out_scale=0.0',
                       'gate_low imm.gate_bias=-2.0', 'gate_high imm.gate_bias=2.0',
                       'before imm.place=before', 'two_rounds imm.rounds=2',
                       'shared imm.shared=True', 'last_layer imm.layers=(3,)'),
}


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  if variant and variant not in SWEEPS:
    raise ValueError(f"imm_shakespeare has no variant '{variant}'; known: "
                     f"{', '.join(SWEEPS)}")

  c = config.default()
  c.method = 'language_model'
  c.data.name = 'shakespeare'
  c.data.arithmetic.min_steps = 1
  c.model.update(embed_dim=128, mlp_dim=512, max_positions=256, bias=False)
  c.imm.update(write_policy='gated', linformer_rank=16)  # embed_dim / 8
  c.optim.update(batch_size=12, weight_decay=0.1)
  c.optim.stage1.update(steps=2000, warmup=0.05)
  c.optim.stage2.learning_rate = 0.0  # there is one stage alone
  c.train.update(log_every=100, save_every=1000)
  c.eval.update(batch_size=128, max_new_tokens=300, temperature=0.8, top_k=40,
                checkpoint='last')
  c.sweep.update(runs=SWEEPS.get(variant, ()), control='gpt')
  if variant == 'replication_full':
    c.sweep.seeds = (0, 1, 2, 3, 4)
    c.optim.stage1.steps = 5000
  elif variant in ('slots', 'mechanisms', 'initialisation'):  # an hour on two cores
    c.optim.stage1.steps = 1000
  if variant in ('replication_128', 'replication_256'):
    c.sweep.control = f"gpt_{variant.rpartition('_')[2]}"
  elif variant == 'replication_full':
    c.sweep.control = ''  # each block size has its own

  return c
