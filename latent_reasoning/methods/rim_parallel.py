"""RiM whose blocks say their steps in parallel: ours, RiM's blocks under LOTUS's supervision.

  x m_1 … m_K y

Stage 1 has no step readouts: the states of block k, in the last of rim.passes, say the tokens
of step k at once (arXiv 2606.31779), and one readout, after the last block, the answer. Stage 2
is RiM's. Prompt and cost at inference are RiM's.
"""

from latent_reasoning.config import Config
from latent_reasoning.methods import lotus, rim
from latent_reasoning.sequences import (
  Method,
  PackedSequence,
  Readout,
  SpecialTokens,
  TokenizedExample,
)


def ground(example: TokenizedExample, progress: float, config: Config,
           ids: SpecialTokens) -> PackedSequence:
  """Stage 1: L = CE_y + w · CE_steps, each a mean over its own tokens, w baselines.step_weight.

  Token i of step k is said at place i of block k, from <b> on; </b>, behind which the answer
  is read, says none. What of a step is longer, and steps beyond the last block, have no place.
  """
  c, x = config.rim, example.question
  tokens, visible, _ = rim.with_blocks(x, c.blocks, c, ids)
  said = [[*step, *ids.newline][:c.block_length - 1] for step in example.steps[:c.blocks]]
  labels = [i for step in said for i in (*step, *[-1] * (c.block_length - len(step)))]
  labels += [-1] * (c.blocks * c.block_length - len(labels))
  return PackedSequence(
      tokens, visible,
      [Readout(len(tokens), [*example.answer, ids.end], reads=c.passes,
               visible_from=0 if c.readout_sees_question else len(x))],
      rim.loops(c.blocks, c.passes, c),
      labels)


RIM_PARALLEL = Method(
    'rim_parallel', 'Reasoning in Memory whose blocks say the tokens of their steps at once, '
    'in place of step readouts.', (ground, rim.refine), rim.prompt, lotus.loss, check=rim.check,
    passes=rim.passes, has_blocks=True)
