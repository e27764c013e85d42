r"""From an example to a packed sequence: what a method reads, predicts and may see.

Every method has the same shape. A sequence is a *prefix* (the question, and what a method
puts after it) and *readouts* attached to the prefix. A readout sees the prefix up to its own
anchor and its own earlier tokens, never another readout. RiM stage 1 with T = 2 steps
(Aichberger and Hochreiter, arXiv 2605.30343):

  prefix    x x x <b> <m> <m> </b> <b> <m> <m> </b>
                               |                 |
  readouts                     '- r_2 <end>      '- y <end>

`direct` is the same sequence without blocks; chain of thought is `direct` with a longer
readout. The first token of a readout is predicted at its anchor, the last prefix token it
sees, so that training equals decoding. Latents (the continuous thoughts of Coconut and CODI)
stand in a readout before its first token; what they read is no token, but the hidden state
before them (models.latents).

This module needs no JAX. Each file of `methods` has the sequences of one family of methods.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from latent_reasoning.config import Config
from latent_reasoning.data.example import Example

ANSWER_MARK = '####'  # stands before the answer in a chain of thought


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
  """Token ids that a method adds to an example."""
  pad: int
  end: int
  block_open: int
  memory: int
  block_close: int
  pause: int
  steps: tuple[int, ...]  # index tokens <step_1> …
  newline: tuple[int, ...]  # text between the steps of a chain of thought
  answer: tuple[int, ...]  # text before its answer


@dataclasses.dataclass(frozen=True)
class TokenizedExample:
  """Token ids of one example."""
  question: Sequence[int]
  steps: Sequence[Sequence[int]]
  answer: Sequence[int]
  draw: float = 0.0  # in [0, 1), of the training step


@dataclasses.dataclass(frozen=True)
class Readout:
  """Text that is attached to the prefix.

  `out` is predicted token by token and ends with the end token; it is empty
  when decoding. With `start`, that token is given as the readout's first input
  and `out` is predicted from it; without, `out[0]` is predicted at the anchor.
  Latents come before `start`.
  """
  visible_until: int  # sees prefix[visible_from:visible_until], where its positions go on
  out: Sequence[int] = ()
  weight: float = 1.0  # of each of its tokens in the loss
  visible_from: int = 0
  start: int | None = None
  latents: int = 0
  reads: int = 1  # which pass over the end of the prefix (Loops), from 1
  mark: int = 0  # of its tokens, those of the answer's mark that it begins with
  mixed: bool = False  # whether others of its batch may have other numbers of latents

  @property
  def inputs(self) -> list[int]:
    """The tokens that stand in the row: `out` moved by one. What stands at a latent is
    not read."""
    start = [] if self.start is None else [self.start] * (self.latents + 1)
    return start + list(self.out[:-1])


@dataclasses.dataclass(frozen=True)
class Loops:
  """Several passes over the last tokens of a prefix, whose hidden states are inputs again.

    h^1 = f(e),  h^l = f(mix(e, h^(l-1))),  l = 2 … passes

  e are the tokens' embeddings, h final (normed) hidden states and f the model. What stands
  before these tokens is read once; positions are the same in every pass, and no pass sees
  keys and values of another.

  Attributes:
    passes: L.
    size: how many tokens, n.
    mix: what a pass reads, 'add': e + h, or 'replace': h.
    shift: h of the position itself, or of the one 1 before.
    block: tokens of a block; from the second pass on, a token sees all of the other blocks.
      0: it sees in every pass what it sees in the first.
  """
  passes: int
  size: int
  mix: str = 'add'
  shift: int = 0
  block: int = 0


@dataclasses.dataclass(frozen=True)
class PackedSequence:
  prefix: Sequence[int]
  visible_until: Sequence[int]  # for each prefix token: sees prefix[:visible_until]
  readouts: Sequence[Readout]
  loops: Loops | None = None  # over its end
  labels: Sequence[int] = ()  # what the last pass's places predict, -1 for nothing


@dataclasses.dataclass(frozen=True)
class DecoderTarget:
  """Reasoning that a reasoning decoder should say."""
  at: Sequence[int]  # positions that it is read out of, of the prefix and then the readout
  text: Sequence[int]  # ends with the end token


def at_inference(config: Config) -> Config:
  """The configuration whose prompts are those that are asked: config.eval.passes and latents in
  place of what was trained."""
  asked = config.eval
  return config.replace(**{
      **({'rim.passes': asked.passes, 'baselines.rounds': asked.passes - 1}
         if asked.passes else {}),
      **({'baselines.latents': asked.latents} if asked.latents else {})})


Stage = Callable[[TokenizedExample, float, Config, SpecialTokens], PackedSequence]


def special_tokens(tokenizer) -> SpecialTokens:
  """Returns the ids of a `tokenizers.Tokenizer`."""
  t = tokenizer
  return SpecialTokens(
      t.pad, t.end, t.block_open, t.memory, t.block_close, t.pause,
      tuple(t.step(i) for i in range(1, t.index_tokens + 1)),
      tuple(t.encode('\n')), tuple(t.encode('\n' + ANSWER_MARK)))


def encode(examples: Sequence[Example], tokenizer) -> list[TokenizedExample]:
  """Tokenizes piece by piece, so that no token spans question, step and answer."""
  return [TokenizedExample(tokenizer.question(e.question), tokenizer.encode_batch(e.steps),
                           *tokenizer.encode_batch([e.answer])) for e in examples]


def causal(tokens: Sequence[int], readouts: Sequence[Readout]) -> PackedSequence:
  """A causal prefix with readouts."""
  return PackedSequence(tokens, range(1, len(tokens) + 1), readouts)


def lines(steps: Sequence[Sequence[int]], ids: SpecialTokens) -> list[int]:
  """Steps line by line."""
  return [i for step in steps for i in (*ids.newline, *step)][len(ids.newline):]


def chain_of_thought(steps: Sequence[Sequence[int]], answer: Sequence[int],
                     ids: SpecialTokens) -> list[int]:
  """Steps line by line, then the marked answer."""
  return [*lines(steps, ids), *ids.answer, *answer, ids.end]


def question_prompt(question: Sequence[int], blocks: int, config: Config,
                    ids: SpecialTokens) -> PackedSequence:
  """The question alone."""
  return causal(question, [Readout(len(question))])


def chain_targets(example: TokenizedExample, row: PackedSequence, config: Config,
                  ids: SpecialTokens) -> list[DecoderTarget]:
  """Without blocks, a reasoning decoder says all steps out of the prefix's last token."""
  if not example.steps:
    return []
  return [DecoderTarget([len(row.prefix) - 1], [*lines(example.steps, ids), ids.end])]


@dataclasses.dataclass(frozen=True)
class Method:
  """How one method trains and answers.

  Attributes:
    name: config.method.
    about: what it does, in a sentence for readers of its results.
    stages: what a sequence is in each stage of the curriculum, (example, progress in [0, 1),
      config, ids) -> PackedSequence.
    prompt: (question ids, blocks, config, ids) -> PackedSequence whose readouts are to be
      decoded, the headline answer last.
    loss: config -> a loss as `train.losses.next_token`; None: that one. Of a method with
      latents also with another in place of that one, for what it says of its own sequences.
    decoder_targets: (example, sequence, config, ids) -> what a reasoning decoder should say.
    decoder_mean: 'tokens' or 'texts', over which the loss of one that is trained jointly is a
      mean; '': as the method's own.
    teacher: as a stage, of the sequences that this method learns from in its loss.
    check: config -> None; raises InputError for what the method cannot do.
    trace: whether its answer comes after a generated chain of thought.
    marked: whether its answer comes after its mark, unless not baselines.keep_mark.
    parts: config -> how many stage 1 has (train.curriculum); None: it is one.
    resets_epochs: whether its published recipe begins each epoch with a new optimizer state.
    passes: config -> over the end of its prefix, at most (Loops); None: one.
    has_latents: whether it has continuous thoughts, hidden states that are inputs.
    has_blocks: whether its prefix has memory blocks, each with a readout.
    counts: the key that says how many pause tokens or latents it has, of `config`.
    is_text: whether it models plain text and answers no questions.
  """
  name: str
  about: str
  stages: tuple[Stage, Stage]
  prompt: Callable[[Sequence[int], int, Config, SpecialTokens], PackedSequence]
  loss: Callable[[Config], Any] | None = None
  decoder_targets: Callable[..., list[DecoderTarget]] = chain_targets
  decoder_mean: str = ''
  teacher: Stage | None = None
  check: Callable[[Config], None] | None = None
  trace: bool = False
  marked: bool = False
  parts: Callable[[Config], int] | None = None
  resets_epochs: bool = False
  passes: Callable[[Config], int] | None = None
  has_latents: bool = False
  has_blocks: bool = False
  counts: str = ''
  is_text: bool = False

  def sequence(self, example: TokenizedExample, stage: int, progress: float, config: Config,
               ids: SpecialTokens) -> PackedSequence:
    """A training sequence of a stage, 1 or 2."""
    return self.stages[stage - 1](example, progress, config, ids)

  def asks(self, config: Config, part: int) -> Config:
    """The configuration whose prompts are those of a part of stage 1."""
    return config.replace(**{'baselines.parts': part + 1})

  def speaks_first(self, config: Config) -> bool:
    """Whether it generates tokens before the answer's own."""
    return self.trace or self.marked and config.baselines.keep_mark
