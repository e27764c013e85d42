"""Speed, by hand: what a packed RiM row costs beside K separate passes.

  python -m latent_reasoning.benchmark

Forward and backward of the training objective over a stage-2 row (K readouts of
one question), three ways: K sequences one after another, one row with a dense
mask, one row with split attention. Prints medians and ratios.
"""

import argparse
import dataclasses
import statistics
import sys
import time

import jax
import numpy as np

from latent_reasoning import allocator, layout, objectives, pipeline
from latent_reasoning.config import ModelConfig, RimConfig
from latent_reasoning.models.gpt import GPT
from latent_reasoning.report import table

# (question, blocks, memory tokens, readout tokens)
SHAPES = ((100, 8, 2, 12), (300, 13, 2, 40))
MODEL = ModelConfig(
    layers=4, width=256, heads=4, hidden=1024, max_positions=1024, positions='learned',
    tied=True, bias=True, dtype='float32', attention='split', scan=False, remat=False)
VOCABULARY = 1024


def rows(shape: tuple[int, int, int, int], batch: int, seed: int = 0):
  """Random stage-2 rows, and the same readouts as K lists of rows of one readout."""
  question, blocks, memory, readout = shape
  rim = RimConfig(blocks, memory, blocks, 1, 'uniform', 'causal', True, 0)
  ids = layout.Symbols(0, 1, 2, 3, 4, 5, (), (), ())
  draw = np.random.default_rng(seed).integers
  packed = [layout.rim(layout.Encoded(draw(6, VOCABULARY, question).tolist(), [],
                                      draw(6, VOCABULARY, readout).tolist()),
                       2, 0.0, rim, ids) for _ in range(batch)]
  separate = [[layout.Row(row.prefix[:out.until], row.visible_until[:out.until], [out])
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


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--batch', type=int, default=4)
  parser.add_argument('--repeats', type=int, default=7)
  args = parser.parse_args(argv)
  lines = [['question, K, M, readout', 'separate ms', 'packed ms', 'split ms',
            'packed / separate', 'split / separate']]
  for shape in SHAPES:
    packed, separate = rows(shape, args.batch)
    one = pipeline.collate(packed, *pipeline.sizes(packed))
    many = [pipeline.collate(part, *pipeline.sizes(part)) for part in separate]
    times = []
    for attention, batches in (('split', many), ('packed', [one]), ('split', [one])):
      model = GPT(dataclasses.replace(MODEL, attention=attention), VOCABULARY)
      params = model.init(jax.random.key(0), one.tokens, one.positions, one.mask)['params']
      grad = jax.jit(jax.grad(
          lambda p, b, m=model: objectives.next_token(m, p, b), has_aux=True))
      times.append(1e3 * seconds(grad, [(params, b) for b in batches], args.repeats))
    base, dense, split = times
    lines.append([', '.join(map(str, shape)), *(f'{t:.0f}' for t in times),
                  f'{dense / base:.3f}', f'{split / base:.3f}'])
  print(f'forward and backward, {MODEL.layers} layers of width {MODEL.width}, batch '
        f'{args.batch}, {jax.devices()[0].device_kind}, jax {jax.__version__}\n')
  print(table(lines))
  return 0


if __name__ == '__main__':
  allocator.tune()
  sys.exit(main())
