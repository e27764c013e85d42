r"""From an example to a row: what each method reads, predicts and may see.

Every method has the same shape. A row is a *prefix* (the question, and what a
method puts behind it) and *readouts* that hang off the prefix. A readout sees
the prefix up to its own anchor and its own earlier tokens, never another
readout. RiM stage 1 with T = 2 steps (Aichberger and Hochreiter, arXiv 2605.30343):

  prefix    x x x <b> <m> <m> </b> <b> <m> <m> </b>
                               |                 |
  readouts                     '- r_2 <end>      '- y <end>

`direct` is the same row without blocks; chain of thought is `direct` with a
longer readout. The first token of a readout is predicted at its anchor, the
last prefix token it sees, so that training equals decoding. Continuous thoughts
(Coconut, CODI) stand in a readout before its first token; what they read is no
token, but the hidden state before them (thoughts).

This module needs no JAX. A method is one row of `METHODS`; the docstring of its function
has its loss and its source, for a question x, steps r_1 … r_T and an answer y.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

from latent_reasoning.config import RimConfig
from latent_reasoning.data.example import Example
from latent_reasoning.errors import InputError, nearest

ANSWER_MARK = '####'  # stands before the answer in a chain of thought


@dataclasses.dataclass(frozen=True)
class Symbols:
  """Token ids that a layout adds to an example."""
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
class Encoded:
  """Token ids of one example."""
  question: Sequence[int]
  steps: Sequence[Sequence[int]]
  answer: Sequence[int]
  draw: float = 0.0  # in [0, 1), of the training step


@dataclasses.dataclass(frozen=True)
class Readout:
  """Text that hangs off the prefix.

  `out` is predicted token by token and ends with the end token; it is empty
  when decoding. With `start`, that token is given as the readout's first input
  and `out` is predicted from it; without, `out[0]` is predicted at the anchor.
  Thoughts come before `start`.
  """
  until: int  # sees prefix[since:until]; its positions go on from `until`
  out: Sequence[int] = ()
  weight: float = 1.0  # of each of its tokens in the loss
  since: int = 0
  start: int | None = None
  thoughts: int = 0

  @property
  def inputs(self) -> list[int]:
    """The tokens that stand in the row: `out` moved by one. What stands at a thought is
    not read."""
    start = [] if self.start is None else [self.start] * (self.thoughts + 1)
    return start + list(self.out[:-1])


@dataclasses.dataclass(frozen=True)
class Row:
  prefix: Sequence[int]
  visible_until: Sequence[int]  # for each prefix token: sees prefix[:visible_until]
  readouts: Sequence[Readout]


@dataclasses.dataclass(frozen=True)
class Told:
  """Reasoning that an explicit decoder should say."""
  at: Sequence[int]  # prefix positions that it is read out of
  text: Sequence[int]  # ends with the end token


@dataclasses.dataclass(frozen=True)
class Method:
  """How one method trains and answers.

  Attributes:
    train: (example, stage, progress, rim, symbols) -> Row.
    prompt: (question ids, blocks, rim, symbols) -> Row whose readouts are to be
      decoded, the headline answer last.
    objective: name in losses.OBJECTIVES.
    trace: whether its answer comes after a generated chain of thought.
    parts: whether stage 1 has `baselines.parts` (curriculum).
    teacher: as `train`, of the rows that this method learns from in objective 'codi'.
    thinks: whether it has continuous thoughts.
  """
  train: Callable[[Encoded, int, float, RimConfig, Symbols], Row]
  prompt: Callable[[Sequence[int], int, RimConfig, Symbols], Row]
  objective: str = 'next_token'
  trace: bool = False
  parts: bool = False
  teacher: Callable[[Encoded, int, float, RimConfig, Symbols], Row] | None = None
  thinks: bool = False


def symbols(tokenizer) -> Symbols:
  """Returns the ids of a `tokenizers.Tokenizer`."""
  t = tokenizer
  return Symbols(
      t.pad, t.end, t.block_open, t.memory, t.block_close, t.pause,
      tuple(t.step(i) for i in range(1, t.index_tokens + 1)),
      tuple(t.encode('\n')), tuple(t.encode('\n' + ANSWER_MARK)))


def encode(examples: Sequence[Example], tokenizer) -> list[Encoded]:
  """Tokenizes piece by piece, so that no token spans question, step and answer."""
  return [Encoded(tokenizer.question(e.question), tokenizer.encode_batch(e.steps),
                  *tokenizer.encode_batch([e.answer])) for e in examples]


def anneal(schedule: str, t: int, steps: int, max_steps: int, progress: float) -> float:
  """Weight λ_t(s) of the readout after block t.

  λ_t = max(0, 1 - (s / S) / τ_t), τ_t = 1 | t / T_max | t / T.
  """
  tau = {'uniform': 1, 'linear': t / max_steps, 'relative': t / steps}[schedule]
  return max(0.0, 1 - progress / tau)


def plain(tokens: Sequence[int], readouts: Sequence[Readout]) -> Row:
  """A causal prefix with readouts."""
  return Row(tokens, range(1, len(tokens) + 1), readouts)


def with_blocks(question: Sequence[int], blocks: int, rim: RimConfig,
                ids: Symbols) -> tuple[list[int], list[int], list[int]]:
  """Returns question and blocks: tokens, visible_until, and the end of each block."""
  block = [ids.block_open] + [ids.memory] * rim.block_tokens + [ids.block_close]
  tokens = list(question) + block * blocks
  ends = [len(question) + len(block) * k for k in range(1, blocks + 1)]
  visible = list(range(1, len(tokens) + 1))
  if rim.block_attention == 'bidirectional':
    for end in ends:
      visible[end - len(block):end] = [end] * len(block)
  return tokens, visible, ends


def _since(question: Sequence[int], rim: RimConfig) -> int:
  return 0 if rim.readout_sees_question else len(question)


def _steps_after(example: Encoded, rim: RimConfig) -> list[Sequence[int]]:
  """The text of readout t = 1 …: r_{t+1} (r_{T+1} = y), or r_t with offset 0."""
  texts = [*example.steps, example.answer]
  return texts[1:] or texts if rim.readout_offset else texts[:-1] or texts


def rim(example: Encoded, stage: int, progress: float, rim: RimConfig,
        ids: Symbols) -> Row:
  """Reasoning in Memory, its losses as rows. Block m_k = <b> <m> × M </b>.

  Stage 1, one block a step, λ annealed from 1 to 0, the last one stays 1:
    L1 = -Σ_t λ_t(s) log p(r_{t+1} | x, m_1 … m_t),  r_{T+1} = y  (offset 1)
    L1 = -Σ_t λ_t(s) log p(r_t | x, m_1 … m_t)                    (offset 0)
  Stage 2, K blocks:
    L2 = -Σ_k α_k log p(y | x, m_1 … m_k),  α_k = 2k / (K (K + 1))

  With rim.externalize, stage 2 has a second readout after block t while there are steps:
  it begins with the index token of t and says what stage 1 reads there, with the weight
  rim.externalize_weight over their number.
  """
  if stage == 1:
    texts = _steps_after(example, rim)
    last = len(texts)
    # The final readout keeps weight 1: else the stage ends with no supervision.
    weights = [1.0 if t == last else anneal(rim.schedule, t, last, rim.max_steps, progress)
               for t in range(1, last + 1)]
  else:
    last = rim.blocks
    texts = [example.answer] * last
    weights = [2 * k / (last * (last + 1)) for k in range(1, last + 1)]
  tokens, visible, ends = with_blocks(example.question, last, rim, ids)
  since = _since(example.question, rim)
  readouts = [Readout(end, [*text, ids.end], weight, since)
              for end, text, weight in zip(ends, texts, weights, strict=True) if weight]
  if stage == 2 and rim.externalize:
    said = _steps_after(example, rim)[:last]
    weight = rim.externalize_weight / len(said)
    readouts += [Readout(end, [*text, ids.end], weight, since, start)
                 for end, text, start in zip(ends, said, ids.steps, strict=False)]
  return Row(tokens, visible, readouts)


def rim_prompt(question: Sequence[int], blocks: int, rim: RimConfig, ids: Symbols) -> Row:
  """One readout after each block."""
  tokens, visible, ends = with_blocks(question, blocks, rim, ids)
  since = _since(question, rim)
  return Row(tokens, visible, [Readout(end, since=since) for end in ends])


def steps_prompt(row: Row, ids: Symbols) -> Row:
  """A prompt of RiM for the steps that rim.externalize trains, in place of answers."""
  return dataclasses.replace(row, readouts=[
      dataclasses.replace(out, start=start)
      for out, start in zip(row.readouts, ids.steps, strict=False)])


def direct(example: Encoded, stage: int, progress: float, rim: RimConfig,
           ids: Symbols) -> Row:
  """x y, the answer right after the question: L = -log p(y | x)."""
  x = example.question
  return plain(x, [Readout(len(x), [*example.answer, ids.end])])


def direct_steps(example: Encoded, stage: int, progress: float, rim: RimConfig,
                 ids: Symbols) -> Row:
  """`direct` with RiM's step readouts as an auxiliary loss, and no memory: a control of ours.

    L = -log p(y | x) - Σ_{t<T} λ_t(s) log p(r_{t+1} | x, <step_t>)  (offset 1)

  Readout t starts with an index token of its own and sees the question only.
  It is annealed like RiM's and gone in stage 2.
  """
  return _with_steps(example.question, example, stage, progress, rim, ids)


def _with_steps(x: Sequence[int], example: Encoded, stage: int, progress: float,
                rim: RimConfig, ids: Symbols) -> Row:
  """The answer after a prefix, in stage 1 the steps beside it."""
  readouts = []
  if stage == 1:
    texts = _steps_after(example, rim)
    last = len(texts)
    for t, text in enumerate(texts, 1):
      weight = anneal(rim.schedule, t, last, rim.max_steps, progress)
      is_answer = t == last and (rim.readout_offset or not example.steps)
      if weight and not is_answer:
        readouts.append(Readout(len(x), [*text, ids.end], weight, start=ids.steps[t - 1]))
  return plain(x, [*readouts, Readout(len(x), [*example.answer, ids.end])])


def cot(example: Encoded, stage: int, progress: float, rim: RimConfig,
        ids: Symbols) -> Row:
  """Chain of thought (Wei et al., arXiv 2201.11903): the steps line by line, then the marked
  answer. L = -log p(r_1 … r_T y | x).
  """
  x = example.question
  return plain(x, [Readout(len(x), _trace(example.steps, example.answer, ids))])


def _trace(steps: Sequence[Sequence[int]], answer: Sequence[int], ids: Symbols) -> list[int]:
  """Steps line by line, then the marked answer."""
  out = [i for step in steps for i in (*ids.newline, *step)][len(ids.newline):]
  return [*out, *ids.answer, *answer, ids.end]


def question_prompt(question: Sequence[int], blocks: int, rim: RimConfig,
                    ids: Symbols) -> Row:
  """The question alone."""
  return plain(question, [Readout(len(question))])


def told(name: str, example: Encoded, row: Row, rim: RimConfig, ids: Symbols) -> list[Told]:
  """What a row's memory should tell: step t out of block t; without blocks, all steps
  out of the prefix's last token."""
  if not example.steps:
    return []
  if name != 'rim':
    trace = [i for step in example.steps for i in (*ids.newline, *step)][len(ids.newline):]
    return [Told([len(row.prefix) - 1], [*trace, ids.end])]
  first, size = len(example.question), rim.block_tokens + 2
  blocks = range(first, len(row.prefix), size)
  return [Told(range(at, at + size), [*step, ids.end])
          for at, step in zip(blocks, example.steps, strict=False)]


def pause(example: Encoded, stage: int, progress: float, rim: RimConfig,
          ids: Symbols) -> Row:
  """Pause tokens (Goyal et al., arXiv 2310.02226): L = -log p(y | x, <pause> × P)."""
  x = [*example.question, *[ids.pause] * baselines.pause_tokens]
  return plain(x, [Readout(len(x), [*example.answer, ids.end])])


def pause_steps(example: Encoded, stage: int, progress: float, rim: RimConfig,
                ids: Symbols) -> Row:
  """`direct_steps` behind P pause tokens: RiM's supervision without its blocks."""
  x = [*example.question, *[ids.pause] * baselines.pause_tokens]
  return _with_steps(x, example, stage, progress, rim, ids)


def pause_prompt(question: Sequence[int], blocks: int, rim: RimConfig,
                 ids: Symbols) -> Row:
  """The question and its pause tokens."""
  x = [*question, *[ids.pause] * baselines.pause_tokens]
  return plain(x, [Readout(len(x))])


def _gone(stage: int, progress: float, rim: RimConfig) -> int:
  """How many parts of stage 1 have passed; in stage 2, all."""
  parts = baselines.parts
  return parts if stage == 2 else min(parts - 1, int(progress * parts))


def _rest(example: Encoded, gone: int, ids: Symbols) -> list[int]:
  """What is still said of a chain of thought; an answer alone stands without its mark."""
  steps = example.steps[gone:]
  return (_trace(steps, example.answer, ids) if steps else [*example.answer, ids.end])


def icot(example: Encoded, stage: int, progress: float, rim: RimConfig,
         ids: Symbols) -> Row:
  """Stepwise internalization (Deng et al., arXiv 2405.14838): `cot` whose first steps are
  removed, one more in each part of stage 1, and in stage 2 all: with n steps gone,
  L = -log p(r_{n+1} … r_T y | x).

  Removal smoothing: o more are gone, P(o) ∝ exp(-λ o), o = floor(-log(1 - u) / λ).
  """
  x, gone = example.question, _gone(stage, progress, rim)
  if baselines.smoothing and 0 < gone:
    gone += int(-math.log1p(-example.draw) / baselines.smoothing)
  rest = _rest(example, gone if stage == 1 else len(example.steps), ids)
  return plain(x, [Readout(len(x), rest)])


def coconut(example: Encoded, stage: int, progress: float, rim: RimConfig,
            ids: Symbols) -> Row:
  """Chain of continuous thought (Hao et al., arXiv 2412.06769).

  x <b> h … h </b> r_{n+1} … r_T y in part n of stage 1: n steps are gone and n·c thoughts
  stand for them, also where a problem has fewer steps. In stage 2 no step is left.

    L = -log p(r_{n+1} … r_T y | x, h_1 … h_{n·c})
  """
  x, gone = [*example.question, ids.block_open], _gone(stage, progress, rim)
  rest = _rest(example, gone if stage == 1 else len(example.steps), ids)
  thoughts = min(gone, baselines.parts - 1) * baselines.latents
  return plain(x, [Readout(len(x), rest, start=ids.block_close, thoughts=thoughts)])


def coconut_prompt(question: Sequence[int], blocks: int, rim: RimConfig, ids: Symbols) -> Row:
  """The question and all thoughts."""
  x, thoughts = [*question, ids.block_open], (baselines.parts - 1) * baselines.latents
  return plain(x, [Readout(len(x), start=ids.block_close, thoughts=thoughts)])


def codi(example: Encoded, stage: int, progress: float, rim: RimConfig,
         ids: Symbols) -> Row:
  """The student of CODI (Shen et al., arXiv 2502.21074): x <b> h … h </b> y.

  Its teacher is `codi_teacher` in the same model; losses.codi says what it teaches.
  """
  x = [*example.question, ids.block_open]
  return plain(x, [Readout(len(x), [*example.answer, ids.end], start=ids.block_close,
                           thoughts=baselines.latents)])


def codi_teacher(example: Encoded, stage: int, progress: float, rim: RimConfig,
                 ids: Symbols) -> Row:
  """A chain of thought without its last step, whose result is the answer: else the state
  that is taught would copy it instead of working it out."""
  x = example.question
  return plain(x, [Readout(len(x), _trace(example.steps[:-1], example.answer, ids))])


def codi_prompt(question: Sequence[int], blocks: int, rim: RimConfig, ids: Symbols) -> Row:
  """The question and its thoughts."""
  x = [*question, ids.block_open]
  return plain(x, [Readout(len(x), start=ids.block_close, thoughts=baselines.latents)])


METHODS = {
    'direct': Method(direct, question_prompt),
    'direct_steps': Method(direct_steps, question_prompt),
    'cot': Method(cot, question_prompt, trace=True),
    'pause': Method(pause, pause_prompt),
    'icot': Method(icot, question_prompt, parts=True),
    'coconut': Method(coconut, coconut_prompt, parts=True, thinks=True),
    'codi': Method(codi, codi_prompt, 'codi', teacher=codi_teacher, thinks=True),
    'pause_steps': Method(pause_steps, pause_prompt),
    'rim': Method(rim, rim_prompt),
    # Plain text; the audit reads its second half as an answer to the first.
    'lm': Method(direct, question_prompt, objective='language_model'),
}


def method(name: str) -> Method:
  """Returns a row of `METHODS`; raises InputError for an unknown name."""
  if name not in METHODS:
    raise InputError(f"config.method '{name}' is unknown; {nearest(name, METHODS)}")
  return METHODS[name]
