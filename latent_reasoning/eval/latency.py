"""How long an answer takes.

`measure` holds direct, chain of thought and RiM on the same weights against each other:
time depends on shapes, not on what the weights say, so one model and one decoder serve
all, and a chain of thought is as long as the data's own.
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import chex
import jax
import numpy as np

from latent_reasoning import batching, methods, progress, sequences
from latent_reasoning.config import Config
from latent_reasoning.eval import decoding
from latent_reasoning.train import profiler
from latent_reasoning.train import train_step as step_lib

METHODS = ('direct', 'rim', 'cot')
BATCHES = (1, 32)


@dataclasses.dataclass(frozen=True)
class Subject:
  """One model asked in one method's way.

  Attributes:
    name: of its entries.
    method: a name of methods.METHODS.
    before: tokens it generates before its answer.
    answer: tokens of the answer, the end token included.
  """
  name: str
  config: Config
  method: str
  model: Any
  params: Any
  examples: Sequence[sequences.TokenizedExample]
  special: sequences.SpecialTokens
  before: int
  answer: int


def measure(config: Config, model, params, tokenizer,
            examples: Sequence[sequences.TokenizedExample]) -> dict[str, Any]:
  """Times every method at every batch size on the same weights.

  Args:
    examples: real problems; their median lengths are the tokens generated.

  Returns:
    {'entries': [...], 'trace_tokens', 'answer_tokens', 'repeats', 'device'}.
  """
  special = sequences.special_tokens(tokenizer)
  trace, answer = lengths(examples, special)
  subjects = [Subject(name, config, name, model, params, examples, special,
                      trace if methods.get(name).trace else 0, answer) for name in METHODS]
  entries = in_turn(subjects, config.eval.latency_repeats)
  for entry in entries:
    direct = next(e for e in entries
                  if e['method'] == 'direct' and e['batch'] == entry['batch'])
    entry['first_vs_direct'] = entry['first_ms'] / direct['first_ms']
    entry['full_vs_direct'] = entry['full_ms'] / direct['full_ms']
  return {'entries': entries, 'trace_tokens': trace, 'answer_tokens': answer,
          'repeats': config.eval.latency_repeats, 'device': profiler.machine(),
          'dtype': config.model.dtype}


def in_turn(subjects: Sequence[Subject], repeats: int) -> list[dict[str, Any]]:
  """Times every subject at every batch size.

  Time to first answer token: prefill, and decoding up to the first token that
  belongs to the answer. Full answer: up to its end token. Medians and interquartile ranges
  over `repeats` runs of compiled programs, or up to `MOST` times as many until the medians
  are settled; the subjects take turns, so that a slow moment of the machine falls on all.
  """
  rng, entries = step_lib.key(0, step_lib.SAMPLE), []
  heads = [decoding.head_kernel(s.model, s.params) for s in subjects]
  for batch_size in BATCHES:
    programs = {}
    for subject, head in progress.track(
        zip(subjects, heads, strict=True), f'compiling {len(subjects)} methods at batch '
        f'{batch_size}', len(subjects)):
      batch = jax.device_put(prompt(subject.config, subject.method, subject.examples,
                                    batch_size, subject.special))
      for kind, tokens in (('first', subject.before + 1),
                           ('full', subject.before + subject.answer)):
        # Compiled ahead, so that looking a program up is no part of the time.
        compiled = decoding.generate.lower(
            subject.model, subject.params, head, batch, rng, 1.0, end=-1,
            pad=subject.special.pad, max_tokens=tokens).compile()
        programs[subject.name, kind] = (subject.params, head, batch, compiled)
    times = _timed(programs, rng, repeats, f'timing {len(subjects)} methods at batch '
                   f'{batch_size}')
    for subject in subjects:
      params, head, batch, _ = programs[subject.name, 'full']
      tokens = subject.before + subject.answer
      prefill, step = flops(subject.model, params, head, batch, tokens)
      first, full = (times[subject.name, kind] for kind in ('first', 'full'))
      entries.append({
          'method': subject.name, 'batch': batch_size, 'prefix_tokens': batch.prefix,
          'tokens': tokens,
          # A first token is no later than the answer that it begins, whatever noise says.
          'first_ms': min(statistics.median(first), statistics.median(full)),
          'full_ms': statistics.median(full),
          'first_spread_ms': _spread(first), 'full_spread_ms': _spread(full),
          'runs': len(full), 'first_flops': prefill + subject.before * step,
          'full_flops': prefill + (tokens - 1) * step})
  return entries


MOST = 5  # times as many runs as asked for, at most
SETTLED = 0.02  # error of a median, as a share of it


def _timed(programs: dict, rng: chex.PRNGKey, repeats: int, what: str) -> dict:
  """Milliseconds of each run of each program, in turn, until the medians are settled."""
  times = {key: [] for key in programs}
  # All first tokens, then all answers: each run finds the caches as another model left them.
  turns = sorted(programs.items(), key=lambda item: item[0][1])
  with progress.steps(what, repeats) as done:
    for repeat in range(-1, MOST * repeats):
      for key, (params, head, batch, compiled) in turns:
        began = time.perf_counter()
        jax.block_until_ready(compiled(params, head, batch, rng, 1.0))
        if repeat >= 0:  # the first one warms up
          times[key].append(1e3 * (time.perf_counter() - began))
      if 0 <= repeat < repeats:
        done()
      if repeat + 1 >= repeats and all(map(settled, times.values())):
        break
  return times


def _spread(times: Sequence[float]) -> float:
  """The interquartile range; 0 of a single run."""
  low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (0.0, 0.0, 0.0)
  return high - low


def settled(times: Sequence[float]) -> bool:
  """Whether the standard error of a median is small, for a normal spread."""
  error = 1.25 * _spread(times) / 1.35 / len(times)**0.5
  return error <= SETTLED * statistics.median(times)


def lengths(examples: Sequence[sequences.TokenizedExample], special: sequences.SpecialTokens
            ) -> tuple[int, int]:
  """Median tokens of a chain of thought with its answer mark, and of an answer
  with its end token."""
  traces = [sum(map(len, e.steps)) + len(special.newline) * max(0, len(e.steps) - 1)
            + len(special.answer) for e in examples]
  answers = [len(e.answer) + 1 for e in examples]
  return round(statistics.median(traces)), round(statistics.median(answers))


def prompt(config: Config, name: str, examples: Sequence[sequences.TokenizedExample], size: int,
           special: sequences.SpecialTokens) -> batching.Batch:
  """Prompts of one method, headline readout only, at their own length.

  No buckets here: padding would hide what a method's prompt costs.
  """
  rows, config = [], sequences.at_inference(config)
  for example in (list(examples) * size)[:size]:
    row = methods.get(name).prompt(example.question, config.eval.blocks or config.rim.blocks,
                                   config, special)
    rows.append(dataclasses.replace(row, readouts=row.readouts[-1:]))
  return batching.collate(rows, *batching.sizes(rows), special.pad)


def flops(model, params, head, batch, tokens: int) -> tuple[float, float]:
  """FLOPs of the prefill and of one decoding step, by XLA's cost analysis."""
  def prefill(params, head, batch):
    return decoding.prefill(model, params, head, batch, tokens - 1)

  def step(params, head, batch, cache):
    return decoding.decode_step(model, params, head, batch, cache, batch.anchors, 0)

  first = jax.jit(prefill).lower(params, head, batch).compile()
  _, cache = jax.eval_shape(prefill, params, head, batch)
  one = jax.jit(step).lower(params, head, batch, cache).compile()
  return tuple(float(np.sum(c.cost_analysis()['flops'])) for c in (first, one))
