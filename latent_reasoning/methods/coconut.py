"""Chain of continuous thought (Hao et al., arXiv 2412.06769): x <b> h … h </b> …, where each
latent h reads the hidden state before it.

Improved Coconut (arXiv 2602.22441) is a switch, baselines.mix_parts: what has been learned is
not forgotten, for a problem of part k takes the sequence of a part i <= k. It is drawn for each
problem of a step (TokenizedExample.draw), so that a batch has rows with i·c latents each
(models.latents).

SIM-CoT (arXiv 2509.20317) is one, too: reasoning_decoder.source 'latents' and joint, with
λ = reasoning_decoder.weight (1 in the paper):

  L = L_answer + λ · mean over texts of Σ_t -log q(s_k,t | z_k, s_k,<t)

z_k are the inputs of the k-th c latents and s_k is step k, or the answer where there is none.
The published mean is over groups of c latents, then over problems, which is the same where
problems have equally many. Inference has no q.
"""

import dataclasses
from collections.abc import Sequence

from latent_reasoning.config import Config
from latent_reasoning.methods.icot import passed, rest
from latent_reasoning.sequences import (
  DecoderTarget,
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
  return _of_part(example, passed(progress, config.baselines.parts), config, ids)


def answer(example: TokenizedExample, progress: float, config: Config,
           ids: SpecialTokens) -> PackedSequence:
  """Stage 2, the part behind those of stage 1: no step is left."""
  return _of_part(example, config.baselines.parts, config, ids)


def _of_part(example: TokenizedExample, part: int, config: Config,
             ids: SpecialTokens) -> PackedSequence:
  """The sequence of a part, or of one that is drawn in its place."""
  b, steps = config.baselines, len(example.steps)
  taken = drawn(example.draw, part) if b.mix_parts else part
  last = taken == b.parts
  row = _sequence(example, steps if last else taken, _all(config) if last else
                  taken * b.latents, config, ids)
  return dataclasses.replace(row, readouts=[
      dataclasses.replace(out, mixed=b.mix_parts) for out in row.readouts])


def drawn(draw: float, part: int) -> int:
  """The part i <= k that a problem of part k takes, P(i) ∝ i + 1; k itself for a draw of 0,
  which is what rows are checked and measured by."""
  left = (1 - draw) * (part + 1) * (part + 2) / 2
  return next(i for i in range(part + 1) if left <= (i + 1) * (i + 2) / 2)


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


def decoder_targets(example: TokenizedExample, row: PackedSequence, config: Config,
                    ids: SpecialTokens) -> list[DecoderTarget]:
  """Step k out of the inputs of its latents; the answer behind the last step."""
  c, count = config.baselines.latents, row.readouts[0].latents
  return said([*example.steps, *[example.answer] * count], row, c, ids)


def said(texts: Sequence[Sequence[int]], row: PackedSequence, c: int,
         ids: SpecialTokens) -> list[DecoderTarget]:
  """A text out of each c latents of a row. The input of a latent is the state before it."""
  first, count = len(row.prefix) - 1, row.readouts[0].latents
  return [DecoderTarget(range(at, at + c), [*text, ids.end])
          for at, text in zip(range(first, first + count, c), texts, strict=False)]


COCONUT = Method(
    'coconut', 'Coconut: hidden states are fed back as continuous thoughts, one after another, '
    'in place of steps (arXiv 2412.06769).', (internalize, answer), prompt,
    decoder_targets=decoder_targets, decoder_mean='texts', marked=True,
    parts=lambda config: config.baselines.parts, resets_epochs=True, has_latents=True,
    counts='baselines.latents')
