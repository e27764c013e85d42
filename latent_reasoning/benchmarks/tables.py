"""Speed, by hand: medians and ratios.

  python -m latent_reasoning.benchmarks.tables [rows] [memory] [layer] [torch] [decode] [cache]

rows: forward and backward of the training objective over a stage-2 RiM row (K
readouts of one question), three ways: K sequences one after another, one row with
a dense mask, one sequence with shared-prefix attention.
memory: the `gated` recurrence, chunkwise beside token by token: time and XLA's
temporary memory.
layer: a GPT layer with and without the whole gated memory of rank width / 8.
torch: a training step of the GPT beside nanoGPT's architecture in PyTorch (needs
torch), one process each, on the same shapes and threads.
decode: greedy decoding with a cache beside `transformers.generate` (needs transformers),
on the same GPT-2 weights, prompts and threads.
cache: time from a command to the first step of its training, with an empty folder of
compiled programs and with a full one, of --config=FILE ... (rim_arithmetic).
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.util
import os
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from latent_reasoning import batching, sequences
from latent_reasoning.benchmarks import cache, decoding
from latent_reasoning.cli import allocator
from latent_reasoning.config import Config, ImmConfig, ModelConfig, RimConfig
from latent_reasoning.errors import InputError, nearest
from latent_reasoning.eval import language_modeling
from latent_reasoning.methods import language_model
from latent_reasoning.methods.rim import refine
from latent_reasoning.models import memory_policies
from latent_reasoning.models.transformer import Transformer
from latent_reasoning.report import table
from latent_reasoning.train import losses, profiler
from latent_reasoning.train import train_step as step_lib

# (question, blocks, memory tokens, readout tokens)
SHAPES = ((100, 8, 2, 12), (300, 13, 2, 40))
MODEL = ModelConfig(embed_dim=256, mlp_dim=1024, max_positions=1024)
VOCABULARY = 1024


def rows(shape: tuple[int, int, int, int], batch: int, seed: int = 0):
  """Random stage-2 rows, and the same readouts as K lists of rows of one readout."""
  question, blocks, memory, readout = shape
  config = Config(rim=RimConfig(blocks=blocks, block_tokens=memory, max_steps=blocks))
  ids = sequences.SpecialTokens(0, 1, 2, 3, 4, 5, (), (), ())
  draw = np.random.default_rng(seed).integers
  packed = [refine(sequences.TokenizedExample(
      draw(6, VOCABULARY, question).tolist(), [], draw(6, VOCABULARY, readout).tolist()),
      0.0, config, ids) for _ in range(batch)]
  separate = [[sequences.PackedSequence(row.prefix[:(n := out.visible_until)],
                                        row.visible_until[:n], [out])
               for row in packed for out in row.readouts[k:k + 1]] for k in range(blocks)]
  return packed, separate


def seconds(function, arguments, repeats: int) -> float:
  """Median time of calling `function` with each of the arguments in turn."""
  times = []
  for repeat in range(-1, repeats):
    began = time.perf_counter()
    for own in arguments:
      jax.block_until_ready(function(*own))
    if repeat >= 0:  # the first one compiled
      times.append(time.perf_counter() - began)
  return statistics.median(times)


def rows_table(args) -> str:
  lines = [['question, K, M, readout', 'separate ms', 'dense ms', 'shared prefix ms',
            'dense / separate', 'shared prefix / separate']]
  for shape in SHAPES:
    packed, separate = rows(shape, args.batch)
    one = batching.collate(packed, *batching.sizes(packed))
    many = [batching.collate(part, *batching.sizes(part)) for part in separate]
    times = []
    for attention, batches in (
        ('shared_prefix', many), ('dense', [one]), ('shared_prefix', [one])):
      model = Transformer(dataclasses.replace(MODEL, attention=attention), VOCABULARY)
      params = model.init(jax.random.key(0), one.tokens, one.positions, one.mask)['params']
      grad = jax.jit(jax.grad(
          lambda p, b, m=model: losses.next_token(m, p, b), has_aux=True))
      times.append(1e3 * seconds(grad, [(params, b) for b in batches], args.repeats))
    base, dense, split = times
    lines.append([', '.join(map(str, shape)), *(f'{t:.0f}' for t in times),
                  f'{dense / base:.3f}', f'{split / base:.3f}'])
  return (f'{MODEL.num_layers} layers of width {MODEL.embed_dim}, batch {args.batch}\n\n'
          f'{table(lines)}')


def memory_table(args) -> str:
  """The recurrence alone, full rank: batch, length, width, slots."""
  policy = memory_policies.POLICIES['gated']
  lines = [['batch, length, width, slots', 'pass', 'recurrent ms', 'chunkwise ms', 'faster',
            'recurrent MiB', 'chunkwise MiB', 'smaller']]
  for shape in ((8, 256, 256, 16), (4, 1024, 512, 23)):
    batch, length, width, slots = shape
    keys = jax.random.split(jax.random.key(0), 5)
    s, q, up = (jax.random.normal(k, (batch, length, width)) * width**-0.25 for k in keys[:3])
    w = jax.nn.softmax(jax.random.normal(keys[3], (batch, length, slots)))
    beta = jax.nn.sigmoid(jax.random.normal(keys[4], (batch, length)))
    on, start = jnp.ones((batch, length), bool), jnp.zeros((batch, length), bool)

    def total(s, w, beta, q, run, on=on, start=start, up=up, shape=shape):
      bank = memory_policies.empty((shape[0],), shape[3], shape[2])
      r, _, _ = run(policy, bank, memory_policies.MemoryWrites(s, w, beta, on, start), q)
      return jnp.sum(r * up)

    for name, wrap in (('forward', lambda f: f), ('forward, backward',
                                                  lambda f: jax.grad(f, (0, 1, 2, 3)))):
      found = []
      for run in (memory_policies.recurrent, memory_policies.chunkwise):
        compiled = jax.jit(wrap(functools.partial(total, run=run))).lower(
            s, w, beta, q).compile()
        mib = compiled.memory_analysis().temp_size_in_bytes / 2**20
        found.append((1e3 * seconds(compiled, [(s, w, beta, q)], args.repeats), mib))
      (slow, large), (fast, small) = found
      lines.append([', '.join(map(str, shape)), name, f'{slow:.1f}', f'{fast:.1f}',
                    f'{slow / fast:.2f}', f'{large:.0f}', f'{small:.0f}',
                    f'{large / small:.1f}'])
  return table(lines)


def layer_table(args) -> str:
  """One layer, forward and backward, with and without memory."""
  lines = [['width, length', 'layer ms', 'with memory ms', 'more']]
  for width, length in ((256, 256), (512, 512)):
    config = dataclasses.replace(MODEL, num_layers=1, embed_dim=width, mlp_dim=4 * width)
    imm = ImmConfig(write_policy='gated', linformer_rank=width // 8)
    ids = np.random.default_rng(0).integers(VOCABULARY, size=(args.batch, length + 1))
    batch, times, calls = language_modeling.rows(ids.astype(np.int32)), [[], []], []
    for own in (None, imm):
      model = Transformer(config, VOCABULARY, imm=own)
      params = model.init(jax.random.key(0), batch.tokens, batch.positions,
                          batch.mask)['params']
      x = jnp.asarray(np.random.default_rng(1).normal(size=(args.batch, length, width)),
                      jnp.float32)

      def total(p, x, m=model, b=batch):
        return jnp.sum(m.apply({'params': p}, b.tokens, b.positions, b.mask,
                               embeddings=x).hidden**2)
      calls.append(functools.partial(jax.jit(jax.grad(total, (0, 1))), params, x))
    for repeat in range(-1, 3 * args.repeats):  # in turn: slow moments fall on both
      for call, own in zip(calls, times, strict=True):
        began = time.perf_counter()
        jax.block_until_ready(call())
        if repeat >= 0:
          own.append(1e3 * (time.perf_counter() - began))
    plain, more = map(statistics.median, times)
    lines.append([f'{width}, {length}', f'{plain:.1f}', f'{more:.1f}',
                  f'{100 * (more / plain - 1):+.1f} %'])
  return f'one layer, batch {args.batch}\n\n{table(lines)}'


TORCH_SHAPES = ((4, 128, 64, 12, 4), (6, 384, 256, 8, 6))  # layers, width, length, batch, heads


def jax_step(shape: tuple[int, ...], repeats: int) -> float:
  """Milliseconds of a training step of this package's GPT with AdamW."""
  layers, width, length, size, heads = shape
  config = dataclasses.replace(MODEL, num_layers=layers, embed_dim=width,
                               num_heads=heads, mlp_dim=4 * width, bias=False)
  ids = np.random.default_rng(0).integers(65, size=(size, length + 1)).astype(np.int32)
  batch, model = language_modeling.rows(ids), Transformer(config, 65)
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(0.9, 0.99),
                   optax.add_decayed_weights(0.1), optax.scale(-1.0))
  stepper = step_lib.make_train_step(model, language_model.next_token, tx, 0, 1)
  state, times = step_lib.init(model, tx, batch, 0), []
  for repeat in range(-3, repeats):
    began = time.perf_counter()
    state, sums = stepper(state, batch, 1e-3)
    jax.block_until_ready((state, sums))
    if repeat >= 0:
      times.append(1e3 * (time.perf_counter() - began))
  return statistics.median(times)


def torch_step(shape: tuple[int, ...], repeats: int, compiled: bool) -> float:
  """The same step of nanoGPT's architecture, from stock PyTorch modules."""
  import torch
  from torch import nn
  from torch.nn import functional
  torch.set_num_threads(os.cpu_count() or 1)
  torch.manual_seed(0)
  layers, width, length, size, heads = shape

  class Layer(nn.Module):

    def __init__(self):
      super().__init__()
      self.norm_1, self.norm_2 = (nn.LayerNorm(width, bias=False) for _ in range(2))
      self.qkv = nn.Linear(width, 3 * width, bias=False)
      self.out = nn.Linear(width, width, bias=False)
      self.up = nn.Linear(width, 4 * width, bias=False)
      self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
      q, k, v = (a.view(*x.shape[:2], heads, -1).transpose(1, 2)
                 for a in self.qkv(self.norm_1(x)).split(width, dim=2))
      y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
      x = x + self.out(y.transpose(1, 2).reshape(x.shape))
      y = functional.gelu(self.up(self.norm_2(x)), approximate='tanh')
      return x + self.down(y)

  class Model(nn.Module):

    def __init__(self):
      super().__init__()
      self.token, self.place = nn.Embedding(65, width), nn.Embedding(length, width)
      self.layers = nn.Sequential(*(Layer() for _ in range(layers)))
      self.norm = nn.LayerNorm(width, bias=False)

    def forward(self, ids, targets):
      x = self.layers(self.token(ids) + self.place.weight)
      logits = self.norm(x) @ self.token.weight.T
      return functional.cross_entropy(logits.view(-1, 65), targets.reshape(-1))

  plain = Model()
  model = torch.compile(plain) if compiled else plain
  rule = torch.optim.AdamW(plain.parameters(), 1e-3, (0.9, 0.99), weight_decay=0.1)
  ids = torch.randint(65, (size, length + 1))
  times = []
  for repeat in range(-3, repeats):
    began = time.perf_counter()
    rule.zero_grad(set_to_none=True)
    loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    rule.step()
    loss.item()
    if repeat >= 0:
      times.append(1e3 * (time.perf_counter() - began))
  return statistics.median(times)


def torch_table(args) -> str:
  if importlib.util.find_spec('torch') is None:
    raise InputError("torch is not installed; pip install -e '.[torch]'")
  lines = [['layers, width, length, batch, heads', 'torch eager ms', 'torch compiled ms',
            'jax ms', 'faster than the better']]
  for number, shape in enumerate(TORCH_SHAPES):
    found = [float(subprocess.run(
        [sys.executable, '-m', 'latent_reasoning.benchmarks.tables', 'one', '--repeats',
         str(5 * args.repeats), '--one', f'{kind} {number}'], check=True, capture_output=True,
        text=True).stdout.split()[-1]) for kind in ('eager', 'compiled', 'jax')]
    lines.append([', '.join(map(str, shape)), *(f'{t:.1f}' for t in found),
                  f'{min(found[:2]) / found[2]:.2f}'])
  return table(lines)


def one(args) -> str:
  """One kind of step, for a process of its own."""
  kind, number = args.one.split()
  shape = TORCH_SHAPES[int(number)]
  if kind == 'jax':
    return str(jax_step(shape, args.repeats))
  return str(torch_step(shape, args.repeats, kind == 'compiled'))


TABLES = {'rows': rows_table, 'memory': memory_table, 'layer': layer_table,
          'torch': torch_table, 'decode': functools.partial(
              decoding.decode_table, base=MODEL),
          'cache': cache.cache_table, 'one': one}


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('what', nargs='*', help=f"of {', '.join(list(TABLES)[:-1])}; else rows")
  parser.add_argument('--batch', type=int, default=4)
  parser.add_argument('--repeats', type=int, default=7)
  parser.add_argument('--config', nargs='+', default=['configs/rim_arithmetic.py'])
  parser.add_argument('--one', default='', help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  try:
    for name in (names := args.what or ['rows']):
      if name not in TABLES:
        raise InputError(f'there is no benchmark {name!r}; {nearest(name, list(TABLES)[:-1])}')
    for name in names:
      found = TABLES[name](args)
      if name != 'one':
        print(f'{name}, {profiler.machine()}, jax {jax.__version__}, '
              f'{datetime.date.today().isoformat()}\n')
      print(found, flush=True)
  except InputError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  allocator.tune()
  sys.exit(main())
