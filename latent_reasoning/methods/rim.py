"""Reasoning in Memory (Aichberger and Hochreiter, arXiv 2605.30343).

K blocks m_k = <b> <m> × M </b> after the question take the place of generated reasoning
steps, for a question x, steps r_1 … r_T and an answer y. Two stages: `ground`, then `refine`.

Passes over the blocks are ours (rim.passes L, sequences.Loops): the states of K blocks are
added to their embeddings and read again, L times in all, so that serial depth takes the
place of blocks. Step t is then read after block (t-1) mod K + 1 of pass ⌈t / K⌉, as each step
is after the loop of its own in RELAY (arXiv 2502.08482). L = 1 is RiM. With rim.hold_answer
the readouts behind a problem's last step predict its answer too, and reading may stop where
two in a row agree.
"""

import dataclasses
from collections.abc import Sequence

from latent_reasoning.config import Config, RimConfig
from latent_reasoning.errors import ensure
from latent_reasoning.sequences import (
  DecoderTarget,
  Loops,
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
  last, annealed = len(texts), len(texts) - 1
  blocks = rim.blocks if rim.passes > 1 or rim.hold_answer else last
  if rim.hold_answer:
    annealed = answered_after(example, rim)
    texts = [*texts[:annealed], *[example.answer] * (blocks * rim.passes - annealed)]
  kept = len(texts) - annealed  # weight 1 together: else the stage ends with no supervision
  weights = [*(anneal(rim.schedule, t, last, rim.max_steps, progress)
               for t in range(1, annealed + 1)), *[1 / kept] * kept]
  return _sequence(example, blocks, _readouts(example, blocks, texts, weights, rim, ids), rim,
                   ids)


def refine(example: TokenizedExample, progress: float, config: Config,
           ids: SpecialTokens) -> PackedSequence:
  """Stage 2: K blocks, each of whose readouts predicts the answer, the later the heavier.

    L2 = -Σ_k α_k log p(y | x, m_1 … m_k),  α_k = 2k / (K (K + 1))

  Of several passes over the blocks, it is the last one's that predict it: the same states at
  the same places cannot say a step and the answer. With rim.hold_answer it is all readouts
  behind the last step, equally.

  With rim.externalize, there is a second readout after block t while there are steps: it
  begins with the index token of t and predicts what stage 1 predicts there, with the weight
  rim.externalize_weight over their number.
  """
  rim, last = config.rim, config.rim.blocks
  weights = [2 * k / (last * (last + 1)) for k in range(1, last + 1)]
  after = (rim.passes - 1) * last
  if rim.hold_answer:
    after = answered_after(example, rim)
    weights = [1 / (rim.passes * last - after)] * (rim.passes * last - after)
  readouts = _readouts(example, last, [example.answer] * len(weights), weights, rim, ids, after)
  if rim.externalize:
    texts = step_texts(example, rim)[:last * rim.passes]
    steps = _readouts(example, last, texts, [rim.externalize_weight / len(texts)] * len(texts),
                      rim, ids)
    readouts += [dataclasses.replace(out, start=start)
                 for out, start in zip(steps, ids.steps, strict=False)]
  return _sequence(example, last, readouts, rim, ids)


def _readouts(example: TokenizedExample, blocks: int, texts: Sequence[Sequence[int]],
              weights: Sequence[float], rim: RimConfig, ids: SpecialTokens, after: int = 0
              ) -> list[Readout]:
  """A readout that predicts each text, none where its weight is 0: after each block, pass by
  pass, the first `after` of them left out."""
  first = len(example.question)
  return [Readout(first + rim.block_length * (t % blocks + 1), [*text, ids.end], weight,
                  _visible_from(example.question, rim), reads=t // blocks + 1)
          for t, (text, weight) in enumerate(zip(texts, weights, strict=True), after) if weight]


def _sequence(example: TokenizedExample, blocks: int, readouts: Sequence[Readout],
              rim: RimConfig, ids: SpecialTokens) -> PackedSequence:
  tokens, visible, _ = with_blocks(example.question, blocks, rim, ids)
  return PackedSequence(tokens, visible, readouts, loops(blocks, rim.passes, rim))


def loops(blocks: int, passes: int, rim: RimConfig) -> Loops | None:
  """The passes over some blocks; None: one."""
  return Loops(passes, blocks * rim.block_length, block=rim.block_length * (
      rim.pass_attention == 'full')) if passes > 1 else None


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


def answered_after(example: TokenizedExample, rim: RimConfig) -> int:
  """How many readouts say steps, before the first that says the answer (rim.hold_answer)."""
  return max(0, len(example.steps) - rim.readout_offset)


def step_texts(example: TokenizedExample, rim: RimConfig) -> list[Sequence[int]]:
  """The text of readout t = 1 …: r_{t+1} (r_{T+1} = y), or r_t with offset 0."""
  texts = [*example.steps, example.answer]
  return texts[1:] or texts if rim.readout_offset else texts[:-1] or texts


def prompt(question: Sequence[int], blocks: int, config: Config,
           ids: SpecialTokens) -> PackedSequence:
  """One readout after each block, pass by pass."""
  rim = config.rim
  tokens, visible, ends = with_blocks(question, blocks, rim, ids)
  first = _visible_from(question, rim)
  return PackedSequence(tokens, visible, [
      Readout(end, visible_from=first, reads=number) for number in range(1, rim.passes + 1)
      for end in ends], loops(blocks, rim.passes, rim))


def passes(config: Config) -> int:
  return config.rim.passes


def check(config: Config) -> None:
  """Raises InputError where there are too few readouts for the steps."""
  rim = config.rim
  fixed = rim.passes > 1 or rim.hold_answer  # else stage 1 has a block for each step
  room = rim.blocks * rim.passes - (rim.hold_answer and not rim.readout_offset)
  ensure(not fixed or rim.max_steps <= room,
         f'config.rim.max_steps is {rim.max_steps}, but config.rim.blocks {rim.blocks} in '
         f'config.rim.passes {rim.passes} have a readout for {room} steps; raise one of them')


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
    stages=(ground, refine), prompt=prompt, decoder_targets=decoder_targets, check=check,
    passes=passes, has_blocks=True)
