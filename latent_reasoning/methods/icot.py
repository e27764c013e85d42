"""Stepwise internalization of a chain of thought (Deng et al., arXiv 2405.14838)."""

import math

from latent_reasoning.config import Config
from latent_reasoning.sequences import (
  Method,
  PackedSequence,
  Readout,
  SpecialTokens,
  TokenizedExample,
  causal,
  chain_of_thought,
  question_prompt,
)


def passed(progress: float, config: Config) -> int:
  """How many parts of stage 1 have passed."""
  parts = config.baselines.parts
  return min(parts - 1, int(progress * parts))


def rest(example: TokenizedExample, gone: int, ids: SpecialTokens) -> list[int]:
  """What a chain of thought still says; an answer alone stands without its mark."""
  steps = example.steps[gone:]
  return (chain_of_thought(steps, example.answer, ids) if steps
          else [*example.answer, ids.end])


def internalize(example: TokenizedExample, progress: float, config: Config,
                ids: SpecialTokens) -> PackedSequence:
  """Stage 1: a chain of thought whose first steps are removed, one more in each part. With n
  steps gone, L = -log p(r_{n+1} … r_T y | x).

  Removal smoothing: o more are gone, P(o) ∝ exp(-λ o), o = floor(-log(1 - u) / λ).
  """
  x, gone = example.question, passed(progress, config)
  if config.baselines.smoothing and 0 < gone:
    gone += int(-math.log1p(-example.draw) / config.baselines.smoothing)
  return causal(x, [Readout(len(x), rest(example, gone, ids))])


def answer(example: TokenizedExample, progress: float, config: Config,
           ids: SpecialTokens) -> PackedSequence:
  """Stage 2: no step is left."""
  x = example.question
  return causal(x, [Readout(len(x), rest(example, len(example.steps), ids))])


ICOT = Method(
    'icot', 'iCoT: the steps of a chain of thought are removed part by part (arXiv '
    '2405.14838).', (internalize, answer), question_prompt, parts=True)
