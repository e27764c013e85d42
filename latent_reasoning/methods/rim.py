"""Reasoning in Memory (Aichberger and Hochreiter, arXiv 2605.30343).

K blocks m_k = <b> <m> × M </b> after the question take the place of generated reasoning
steps, for a question x, steps r_1 … r_T and an answer y. Two stages: `ground`, then `refine`.
"""

import dataclasses
from collections.abc import Sequence

from latent_reasoning.config import Config, RimConfig
from latent_reasoning.sequences import (
  DecoderTarget,
  Method,
  PackedSequence,
  Readout,
  SpecialTokens,
  TokenizedExample,
)


def ground(example: TokenizedExample, progress: float, config: Config,
           ids: SpecialTokens) -> PackedSequence:
  """Stage 1: one block a step, whose readout predicts the next step.

  λ is annealed from 1 to 0 with the progress s of the stage, the last one stays 1:
    L1 = -Σ_t λ_t(s) log p(r_{t+1} | x, m_1 … m_t),  r_{T+1} = y  (rim.readout_offset 1)
    L1 = -Σ_t λ_t(s) log p(r_t | x, m_1 … m_t)                    (rim.readout_offset 0)
  """
  rim, texts = config.rim, step_texts(example, config.rim)
  last = len(texts)
  # The final readout keeps weight 1: else the stage ends with no supervision.
  weights = [1.0 if t == last else anneal(rim.schedule, t, last, rim.max_steps, progress)
             for t in range(1, last + 1)]
  return _sequence(example, texts, weights, rim, ids)


def refine(example: TokenizedExample, progress: float, config: Config,
           ids: SpecialTokens) -> PackedSequence:
  """Stage 2: K blocks, each of whose readouts predicts the answer, the later the heavier.

    L2 = -Σ_k α_k log p(y | x, m_1 … m_k),  α_k = 2k / (K (K + 1))

  With rim.externalize, there is a second readout after block t while there are steps: it
  begins with the index token of t and predicts what stage 1 predicts there, with the weight
  rim.externalize_weight over their number.
  """
  rim, last = config.rim, config.rim.blocks
  weights = [2 * k / (last * (last + 1)) for k in range(1, last + 1)]
  row = _sequence(example, [example.answer] * last, weights, rim, ids)
  if not rim.externalize:
    return row
  texts = step_texts(example, rim)[:last]
  weight = rim.externalize_weight / len(texts)
  return dataclasses.replace(row, readouts=[*row.readouts, *(
      dataclasses.replace(out, out=[*text, ids.end], weight=weight, start=start)
      for out, text, start in zip(row.readouts, texts, ids.steps, strict=False))])


def _sequence(example: TokenizedExample, texts: Sequence[Sequence[int]],
              weights: Sequence[float], rim: RimConfig, ids: SpecialTokens) -> PackedSequence:
  """One block for each text, which its readout predicts; none where its weight is 0."""
  tokens, visible, ends = with_blocks(example.question, len(texts), rim, ids)
  first = _visible_from(example.question, rim)
  return PackedSequence(tokens, visible, [
      Readout(end, [*text, ids.end], weight, first)
      for end, text, weight in zip(ends, texts, weights, strict=True) if weight])


def anneal(schedule: str, t: int, steps: int, max_steps: int, progress: float) -> float:
  """Weight λ_t(s) of the readout after block t.

  λ_t = max(0, 1 - (s / S) / τ_t), τ_t = 1 | t / T_max | t / T.
  """
  tau = {'uniform': 1, 'linear': t / max_steps, 'relative': t / steps}[schedule]
  return max(0.0, 1 - progress / tau)


def with_blocks(question: Sequence[int], blocks: int, rim: RimConfig,
                ids: SpecialTokens) -> tuple[list[int], list[int], list[int]]:
  """Returns question and blocks: tokens, visible_until, and the end of each block."""
  block = [ids.block_open] + [ids.memory] * rim.block_tokens + [ids.block_close]
  tokens = list(question) + block * blocks
  ends = [len(question) + len(block) * k for k in range(1, blocks + 1)]
  visible = list(range(1, len(tokens) + 1))
  if rim.block_attention == 'bidirectional':
    for end in ends:
      visible[end - len(block):end] = [end] * len(block)
  return tokens, visible, ends


def _visible_from(question: Sequence[int], rim: RimConfig) -> int:
  return 0 if rim.readout_sees_question else len(question)


def step_texts(example: TokenizedExample, rim: RimConfig) -> list[Sequence[int]]:
  """The text of readout t = 1 …: r_{t+1} (r_{T+1} = y), or r_t with offset 0."""
  texts = [*example.steps, example.answer]
  return texts[1:] or texts if rim.readout_offset else texts[:-1] or texts


def prompt(question: Sequence[int], blocks: int, config: Config,
           ids: SpecialTokens) -> PackedSequence:
  """One readout after each block."""
  tokens, visible, ends = with_blocks(question, blocks, config.rim, ids)
  first = _visible_from(question, config.rim)
  return PackedSequence(tokens, visible, [Readout(end, visible_from=first) for end in ends])


def steps_prompt(row: PackedSequence, ids: SpecialTokens) -> PackedSequence:
  """A prompt for the steps that rim.externalize trains, in place of answers."""
  return dataclasses.replace(row, readouts=[
      dataclasses.replace(out, start=start)
      for out, start in zip(row.readouts, ids.steps, strict=False)])


def decoder_targets(example: TokenizedExample, row: PackedSequence, config: Config,
                    ids: SpecialTokens) -> list[DecoderTarget]:
  """Step t out of block t."""
  first, size = len(example.question), config.rim.block_length
  return [DecoderTarget(range(at, at + size), [*step, ids.end])
          for at, step in zip(range(first, len(row.prefix), size), example.steps, strict=False)]


RIM = Method(
    'rim', 'Reasoning in Memory: fixed blocks of special tokens stand in for generated steps, '
    'and the answer is read behind the last one in one forward pass (arXiv 2605.30343).',
    stages=(ground, refine), prompt=prompt, decoder_targets=decoder_targets, has_blocks=True)
