"""RiM under parallel step supervision: its rows, and its loss by hand."""

import jax
import numpy as np
import pytest
from close import assert_close
from toy import EXAMPLES, IDS

from latent_reasoning import batching, sequences
from latent_reasoning.eval import leakage, one_by_one
from latent_reasoning.methods import rim, rim_parallel
from latent_reasoning.methods.rim_parallel import RIM_PARALLEL
from latent_reasoning.models import latents
from latent_reasoning.models.transformer import Transformer

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.mark.parametrize('passes', [1, 2])
def test_rows(tiny_config, passes):
  """Blocks of <b> <m> <m> </b>: a step of four tokens loses one and its newline."""
  config = tiny_config(**{'rim.blocks': 2, 'rim.block_tokens': 2, 'rim.passes': passes,
                          'rim.max_steps': 2})
  long, short = (rim_parallel.ground(e, 0.3, config, IDS) for e in EXAMPLES)
  assert long.prefix == [1, 2, 3, 22, 23, 23, 24, 22, 23, 23, 24]
  assert long.labels == [4, 5, 10, -1, 6, 7, 8, -1] and len(long.readouts) == 1
  assert short.labels == [5, 5, 10, -1, -1, -1, -1, -1]
  assert (long.loops.passes if long.loops else 1) == passes == long.readouts[0].reads
  assert RIM_PARALLEL.sequence(EXAMPLES[0], 2, 0.0, config, IDS) == rim.refine(
      EXAMPLES[0], 0.0, config, IDS)


@pytest.mark.integration
@pytest.mark.parametrize('passes', [1, 2])
@pytest.mark.parametrize('stage', [1, 2])
def test_loss_by_hand(tiny_config, random_params, stage, passes):
  """Both means over their own tokens; stage 2 is RiM's loss, without step labels."""
  config = tiny_config(**{'method': 'rim_parallel', 'rim.blocks': 2, 'rim.passes': passes,
                          'rim.max_steps': 2, 'rim.block_tokens': 2, 'model.num_layers': 1})
  model = Transformer(config.model, 32)
  two = batching.collate([sequences.causal([1, 2], ())], 2, 0, 0)
  subject = leakage.Subject(config, model, random_params(model, two), None, EXAMPLES)
  rows = [RIM_PARALLEL.sequence(e, stage, 0.0, config, IDS) for e in EXAMPLES]
  batch = batching.collate(rows, *batching.sizes(rows))
  total, sums = RIM_PARALLEL.loss(config)(model, subject.params, batch)
  hidden = latents.forward(model, subject.params, batch).hidden
  logits = model.apply({'params': subject.params}, hidden, method='head')
  logs = np.asarray(jax.nn.log_softmax(logits), np.float64)
  said = []
  for b, row in enumerate(rows):
    stop = batch.prefix if row.loops else len(row.prefix)
    said += [logs[b, stop - len(row.labels) + i, label]
             for i, label in enumerate(row.labels) if label >= 0]
  assert len(said) == (9 if stage == 1 else 0)
  readouts = [out for row in rows for out in row.readouts]
  spoken = [(out.weight * found.sum(), out.weight * len(out.out)) for out, found in zip(
      readouts, one_by_one.by_readout(subject, batch, rows), strict=True)]
  expected = -sum(a for a, _ in spoken) / sum(n for _, n in spoken)
  if said:
    expected -= config.baselines.step_weight * np.mean(said)
  assert_close(float(total / sums['weight']), expected)


