"""Chain of continuous thought (Hao et al., arXiv 2412.06769): x <b> h … h </b> …, where each
latent h reads the hidden state before it."""

from collections.abc import Sequence

from latent_reasoning.config import Config
from latent_reasoning.methods.icot import passed, rest
from latent_reasoning.sequences import (
  Method,
  PackedSequence,
  Readout,
  SpecialTokens,
  TokenizedExample,
  causal,
  lines,
)


def internalize(example: TokenizedExample, progress: float, config: Config,
                ids: SpecialTokens) -> PackedSequence:
  """Part n of stage 1: n steps are gone and n·c latents stand for them, also where a problem
  has fewer steps.

    L = -log p(r_{n+1} … r_T y | x, h_1 … h_{n·c})

  The answer has its mark in every part, and in stage 2 (baselines.keep_mark).
  """
  gone = passed(progress, config.baselines.parts)
  return _sequence(example, gone, gone * config.baselines.latents, config, ids)


def answer(example: TokenizedExample, progress: float, config: Config,
           ids: SpecialTokens) -> PackedSequence:
  """Stage 2: no step is left."""
  return _sequence(example, len(example.steps), _all(config), config, ids)


def _all(config: Config) -> int:
  return (config.baselines.parts - 1) * config.baselines.latents


def _sequence(example: TokenizedExample, gone: int, latents: int, config: Config,
              ids: SpecialTokens) -> PackedSequence:
  x, trace = [*example.question, ids.block_open], lines(example.steps[gone:], ids)
  return causal(x, [Readout(len(x), rest(trace, example, config, ids), start=ids.block_close,
                            latents=latents)])


def prompt(question: Sequence[int], blocks: int, config: Config,
           ids: SpecialTokens) -> PackedSequence:
  """The question and all latents."""
  x = [*question, ids.block_open]
  return causal(x, [Readout(len(x), start=ids.block_close, latents=_all(config))])


COCONUT = Method(
    'coconut', 'Coconut: hidden states are fed back as continuous thoughts, one after another, '
    'in place of steps (arXiv 2412.06769).', (internalize, answer), prompt, marked=True,
    parts=lambda config: config.baselines.parts, resets_epochs=True, has_latents=True)
