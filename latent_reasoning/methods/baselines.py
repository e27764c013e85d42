"""Direct answers, chain of thought and pause tokens, and their controls with step supervision.

For a question x, steps r_1 … r_T and an answer y.
"""

from collections.abc import Sequence

from latent_reasoning.config import Config
from latent_reasoning.methods.rim import anneal, step_texts
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


def direct(example: TokenizedExample, progress: float, config: Config,
           ids: SpecialTokens) -> PackedSequence:
  """x y, the answer right after the question: L = -log p(y | x)."""
  return _answer(example.question, example, ids)


def _answer(x: Sequence[int], example: TokenizedExample, ids: SpecialTokens) -> PackedSequence:
  return causal(x, [Readout(len(x), [*example.answer, ids.end])])


def direct_steps(example: TokenizedExample, progress: float, config: Config,
                 ids: SpecialTokens) -> PackedSequence:
  """Stage 1 of `direct` with RiM's step readouts as an auxiliary loss and no memory: a
  control of ours. Stage 2 is `direct`.

    L = -log p(y | x) - Σ_{t<T} λ_t(s) log p(r_{t+1} | x, <step_t>)  (rim.readout_offset 1)

  Readout t starts with an index token of its own and sees the question only. It is annealed
  like RiM's.
  """
  return _with_steps(example.question, example, progress, config, ids)


def _with_steps(x: Sequence[int], example: TokenizedExample, progress: float, config: Config,
                ids: SpecialTokens) -> PackedSequence:
  """The answer after a prefix, and the steps beside it."""
  rim, readouts = config.rim, []
  texts = step_texts(example, rim)
  last = len(texts)
  for t, text in enumerate(texts, 1):
    weight = anneal(rim.schedule, t, last, rim.max_steps, progress)
    is_answer = t == last and (rim.readout_offset or not example.steps)
    if weight and not is_answer:
      readouts.append(Readout(len(x), [*text, ids.end], weight, start=ids.steps[t - 1]))
  return causal(x, [*readouts, Readout(len(x), [*example.answer, ids.end])])


def cot(example: TokenizedExample, progress: float, config: Config,
        ids: SpecialTokens) -> PackedSequence:
  """Chain of thought (Wei et al., arXiv 2201.11903): the steps line by line, then the marked
  answer. L = -log p(r_1 … r_T y | x).
  """
  x = example.question
  return causal(x, [Readout(len(x), chain_of_thought(example.steps, example.answer, ids))])


def _paused(question: Sequence[int], config: Config, ids: SpecialTokens) -> list[int]:
  return [*question, *[ids.pause] * config.baselines.pause_tokens]


def pause(example: TokenizedExample, progress: float, config: Config,
          ids: SpecialTokens) -> PackedSequence:
  """Pause tokens (Goyal et al., arXiv 2310.02226): L = -log p(y | x, <pause> × P)."""
  return _answer(_paused(example.question, config, ids), example, ids)


def pause_steps(example: TokenizedExample, progress: float, config: Config,
                ids: SpecialTokens) -> PackedSequence:
  """Stage 1 of `direct_steps` after P pause tokens: RiM's supervision without its blocks.
  Stage 2 is `pause`."""
  return _with_steps(_paused(example.question, config, ids), example, progress, config, ids)


def pause_prompt(question: Sequence[int], blocks: int, config: Config,
                 ids: SpecialTokens) -> PackedSequence:
  """The question and its pause tokens."""
  x = _paused(question, config, ids)
  return causal(x, [Readout(len(x))])


DIRECT = Method('direct', 'The answer alone: no reasoning, trained or generated.',
                (direct, direct), question_prompt)
DIRECT_STEPS = Method(
    'direct_steps', 'The answer alone, after a first stage that also predicts each step from '
    'the question: the supervision of RiM without its blocks.', (direct_steps, direct),
    question_prompt)
COT = Method('cot', 'Chain of thought: the steps are generated before the answer.',
             (cot, cot), question_prompt, trace=True)
PAUSE = Method('pause', 'Pause tokens behind the question, then the answer (arXiv '
               '2310.02226).', (pause, pause), pause_prompt, counts='baselines.pause_tokens')
PAUSE_STEPS = Method(
    'pause_steps', 'Pause tokens, whose first stage also predicts each step: the supervision '
    'and the tokens of RiM without its blocks.', (pause_steps, pause), pause_prompt,
    counts='baselines.pause_tokens')
