"""PCCoT (Wu et al., arXiv 2506.18582): CODI's latents, all refined at once in T Jacobi passes.

  x <b> m … m </b> #### y

c memory tokens stand for latents in a first pass. In each of T more, the input of a latent is
the hidden state of the place before it in the last pass, of <b> for the first (sequences.Loops
with shift 1); the answer sees the last pass. As many passes as latents compute what one latent
after another computes, CODI's; none is `pause`.
"""

import functools
from collections.abc import Sequence

from latent_reasoning.config import Config
from latent_reasoning.errors import ensure
from latent_reasoning.methods import codi
from latent_reasoning.methods.icot import rest
from latent_reasoning.sequences import (
  Loops,
  Method,
  PackedSequence,
  Readout,
  SpecialTokens,
  TokenizedExample,
)


def student(example: TokenizedExample, progress: float, config: Config,
            ids: SpecialTokens) -> PackedSequence:
  """The latents and the marked answer, in both stages; taught as CODI's."""
  return _row(example.question, rest([], example, config, ids), config, ids)


def _row(question: Sequence[int], out: Sequence[int], config: Config,
         ids: SpecialTokens) -> PackedSequence:
  b, count = config.baselines, passes(config)
  tokens = [*question, ids.block_open, *[ids.memory] * b.latents]
  return PackedSequence(tokens, range(1, len(tokens) + 1), [
      Readout(len(tokens), out, start=ids.block_close, reads=count,
              mark=len(ids.answer) * b.keep_mark)],
      Loops(count, b.latents, 'replace', shift=1) if count > 1 else None)


def passes(config: Config) -> int:
  """T + 1; baselines.rounds T, 3 as published."""
  return 1 + (3 if config.baselines.rounds < 0 else config.baselines.rounds)


def check(config: Config) -> None:
  """Raises InputError where keys and values are to be taught to no pass."""
  ensure(not config.baselines.kv_weight or passes(config) > 1,
         'config.baselines.kv_weight teaches the latents of a later pass, and '
         'config.baselines.rounds is 0; expected rounds above 0, or kv_weight 0')


def prompt(question: Sequence[int], blocks: int, config: Config,
           ids: SpecialTokens) -> PackedSequence:
  """The question and its latents."""
  return _row(question, (), config, ids)


PCCOT = Method(
    'pccot', 'PCCoT: continuous thoughts that are refined in parallel, in a few passes, and '
    'distilled from the chain of thought of the same model (arXiv 2506.18582).',
    (student, student), prompt, functools.partial(codi.loss, from_layer=1),
    teacher=codi.teacher, check=check, marked=True, passes=passes, has_latents=True,
    counts='baselines.latents')
