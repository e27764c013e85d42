"""How long an answer takes: direct, chain of thought and RiM on the same weights.

Time depends on shapes, not on what the weights say, so all methods run on one
model and one decoder and differ only in their prompt and in how many tokens come
before the answer. A chain of thought is as long as the data's own.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from latent_reasoning import decode, layout, pipeline
from latent_reasoning import step as step_lib
from latent_reasoning.config import Config

METHODS = ('direct', 'rim', 'cot')
BATCHES = (1, 32)


def measure(config: Config, model, params, tokenizer,
            examples: Sequence[layout.Encoded],
            progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
  """Times every method at every batch size.

  Time to first answer token: prefill, and decoding up to the first token that
  belongs to the answer. Full answer: up to its end token. Medians over
  `eval.latency_repeats` runs of compiled programs; the methods take turns, so
  that a slow moment of the machine falls on all of them.

  Args:
    examples: real problems; their median lengths are the tokens generated.

  Returns:
    {'entries': [...], 'trace_tokens', 'answer_tokens', 'repeats', 'device'}.
  """
  symbols = layout.symbols(tokenizer)
  trace, answer = lengths(examples, symbols)
  head, rng = decode.head_kernel(model, params), step_lib.key(0, step_lib.SAMPLE)
  entries = []
  for batch_size in BATCHES:
    programs = {}
    for name in METHODS:
      before = trace if layout.method(name).trace else 0
      batch = jax.device_put(prompt(config, name, examples, batch_size, symbols))
      for kind, tokens in (('first', before + 1), ('full', before + answer)):
        # Compiled ahead, so that looking a program up is no part of the time.
        compiled = decode.generate.lower(
            model, params, head, batch, rng, 1.0, end=-1, pad=symbols.pad,
            max_tokens=tokens).compile()
        programs[name, kind] = (batch, tokens, compiled)
    times = {key: [] for key in programs}
    for repeat in range(-1, config.eval.latency_repeats):
      for key, (batch, _, compiled) in programs.items():
        began = time.perf_counter()
        jax.block_until_ready(compiled(params, head, batch, rng, 1.0))
        if repeat >= 0:  # the first one warms up
          times[key].append(1e3 * (time.perf_counter() - began))
      progress(f'batch {batch_size}: run {repeat + 1} of {config.eval.latency_repeats}')
    for name in METHODS:
      batch, tokens, _ = programs[name, 'full']
      prefill, step = flops(model, params, head, batch, tokens)
      first = programs[name, 'first'][1]
      entries.append({
          'method': name, 'batch': batch_size, 'prefix_tokens': batch.prefix,
          'tokens': tokens,
          'first_ms': statistics.median(times[name, 'first']),
          'full_ms': statistics.median(times[name, 'full']),
          'first_flops': prefill + (first - 1) * step,
          'full_flops': prefill + (tokens - 1) * step})
    direct = next(e for e in entries if e['method'] == 'direct' and e['batch'] == batch_size)
    for entry in entries[-len(METHODS):]:
      entry['first_vs_direct'] = entry['first_ms'] / direct['first_ms']
      entry['full_vs_direct'] = entry['full_ms'] / direct['full_ms']
  return {'entries': entries, 'trace_tokens': trace, 'answer_tokens': answer,
          'repeats': config.eval.latency_repeats, 'device': jax.devices()[0].device_kind,
          'dtype': config.model.dtype}


def lengths(examples: Sequence[layout.Encoded], symbols: layout.Symbols) -> tuple[int, int]:
  """Median tokens of a chain of thought with its answer mark, and of an answer
  with its end token."""
  traces = [sum(map(len, e.steps)) + len(symbols.newline) * max(0, len(e.steps) - 1)
            + len(symbols.answer) for e in examples]
  answers = [len(e.answer) + 1 for e in examples]
  return round(statistics.median(traces)), round(statistics.median(answers))


def prompt(config: Config, name: str, examples: Sequence[layout.Encoded], size: int,
           symbols: layout.Symbols) -> pipeline.Batch:
  """Prompts of one method, headline readout only, at their own length.

  No buckets here: padding would hide what a method's prompt costs.
  """
  rows = []
  for example in (list(examples) * size)[:size]:
    row = layout.method(name).prompt(example.question, config.eval.blocks or
                                     config.rim.blocks, config.rim, symbols)
    rows.append(layout.Row(row.prefix, row.visible_until, row.readouts[-1:]))
  return pipeline.collate(rows, *pipeline.sizes(rows), symbols.pad)


def flops(model, params, head, batch, tokens: int) -> tuple[float, float]:
  """FLOPs of the prefill and of one decoding step, by XLA's cost analysis."""
  def prefill(params, head, batch):
    return decode.prefill(model, params, head, batch, tokens - 1)

  def step(params, head, batch, cache):
    return decode.decode_step(model, params, head, batch, cache, batch.anchors, 0)

  first = jax.jit(prefill).lower(params, head, batch).compile()
  _, cache = jax.eval_shape(prefill, params, head, batch)
  one = jax.jit(step).lower(params, head, batch, cache).compile()
  return tuple(float(np.sum(c.cost_analysis()['flops'])) for c in (first, one))
