"""Stepwise internalization of a chain of thought (Deng et al., arXiv 2405.14838)."""

import math
from collections.abc import Sequence

from latent_reasoning.config import Config
from latent_reasoning.sequences import (
  Method,
  PackedSequence,
  Readout,
  SpecialTokens,
  TokenizedExample,
  causal,
  lines,
  question_prompt,
)


def passed(progress: float, parts: int) -> int:
  """How many parts of stage 1 have passed."""
  return min(parts - 1, int(progress * parts + 1e-9))  # 1/49 · 49 is below 1


def rest(trace: Sequence[int], example: TokenizedExample, config: Config,
         ids: SpecialTokens) -> list[int]:
  """What is left of the steps, and the answer behind its mark; with no step and without
  baselines.keep_mark, it stands alone."""
  mark = ids.answer if trace or config.baselines.keep_mark else ()
  return [*trace, *mark, *example.answer, ids.end]


def parts(config: Config) -> int:
  """Parts of stage 1: the last is the first in which everything is gone, if any."""
  b = config.baselines
  if b.removal == 'steps' or not b.remove_all_beyond:
    return b.parts
  return min(b.parts, b.remove_all_beyond // b.remove_tokens + 2)


def internalize(example: TokenizedExample, progress: float, config: Config,
                ids: SpecialTokens) -> PackedSequence:
  """Stage 1: a chain of thought whose first n tokens are removed, baselines.remove_tokens
  more in each part, all where that is beyond remove_all_beyond: L = -log p(c_{n+1} … c_C y | x)
  of a chain c_1 … c_C.

  Removal smoothing: o more are gone, in the first part too, P(o) ∝ exp(-λ o),
  o = floor(-log(1 - u) / λ). Ours, baselines.removal 'steps': whole steps, one more in each
  part, and smoothed from the second on.
  """
  b, x = config.baselines, example.question
  part = passed(progress, parts(config))
  more = int(-math.log1p(-example.draw) / b.smoothing) if b.smoothing else 0
  if b.removal == 'steps':
    trace = lines(example.steps[part + more if part else 0:], ids)
  else:
    gone = part * b.remove_tokens
    trace = lines(example.steps, ids)[gone + more:]
    trace = [] if b.remove_all_beyond and gone > b.remove_all_beyond else trace
  return causal(x, [Readout(len(x), rest(trace, example, config, ids))])


def answer(example: TokenizedExample, progress: float, config: Config,
           ids: SpecialTokens) -> PackedSequence:
  """Stage 2: no step is left."""
  x = example.question
  return causal(x, [Readout(len(x), rest([], example, config, ids))])


ICOT = Method(
    'icot', 'iCoT: a chain of thought is removed part by part, from its beginning (arXiv '
    '2405.14838).', (internalize, answer), question_prompt, marked=True, parts=parts)
