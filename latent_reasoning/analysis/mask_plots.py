"""What positions see, collected for figures: the mask of a row, and what a leak does."""

import functools
from typing import Any

import jax
import numpy as np

from latent_reasoning import batching, methods, sequences
from latent_reasoning.data.example import Example
from latent_reasoning.errors import InputError
from latent_reasoning.experiment import Experiment
from latent_reasoning.models import masks


def row(run: Experiment, example: Example, stage: int = 1) -> dict[str, Any]:
  """A training row at the beginning of a stage, without padding.

  Returns:
    {'allowed': bool [L, L], whether query i may see key j; 'tokens': what stands at each
    position; 'predicts': what each has to predict, '' for nothing; 'parts': [(name, start,
    stop)] of question, blocks and readouts}.
  """
  config, tokenizer = run.config, run.tokenizer
  encoded, = sequences.encode([example], tokenizer)
  method, special = methods.get(config.method), sequences.special_tokens(tokenizer)
  laid = method.sequence(encoded, stage, 0.0, config, special)
  prefix, count, width = batching.sizes([laid])
  batch = batching.collate([laid], prefix, count, width, special.pad)
  if laid.loops:
    raise InputError('a plot of a mask shows one pass over the blocks; expected '
                     '--config.rim.passes=1')
  parts, real = _parts(config, laid, len(encoded.question)), list(range(prefix))
  for k, out in enumerate(laid.readouts):
    start = prefix + k * width
    if out.inputs:  # one that is a single token is predicted in the prefix alone
      parts.append((f'readout {k + 1}', len(real), len(real) + len(out.inputs)))
      real += range(start, start + len(out.inputs))
  allowed = np.asarray(masks.allowed(batch.mask))[0][np.ix_(real, real)]
  special = tokenizer.special()

  def name(token):
    return special.get(int(token)) or tokenizer.decode([token])
  return {'allowed': allowed, 'tokens': [name(t) for t in batch.tokens[0, real]],
          'predicts': [name(t) if w else '' for t, w in zip(
              batch.targets[0, real], batch.weights[0, real], strict=True)],
          'parts': parts}


def _parts(config, laid: sequences.PackedSequence, question: int) -> list[tuple[str, int, int]]:
  parts, n = [('question', 0, question)], len(laid.prefix)
  if methods.get(config.method).has_blocks:
    size = config.rim.block_length
    return parts + [(f'block {k + 1}', at, at + size)
                    for k, at in enumerate(range(question, n, size))]
  return parts + [('after it', question, n)] * (n > question)


def prediction_shift(run: Experiment, params, text: str, place: int,
                     other: str) -> dict[str, Any]:
  """How far each next-token prediction moves when one later token is another.

  Args:
    run: of method language_model.
    text: what is read.
    place: the token that is changed, from 1.
    other: text of one token, what stands there instead.

  Returns:
    {'tokens': T texts, 'place', 'moved': [T], total variation between the predictions after
    each token, 'p': the probability of the token at `place`, just before it, with it there
    and with `other` there, 'causal': whether the model calls itself so, and so has zeros
    before `place`}.
  """
  ids, new = run.tokenizer.encode(text), run.tokenizer.encode(other)
  if not 1 <= place < len(ids) or len(new) != 1 or new[0] == ids[place]:
    raise InputError(f'found place {place} of {len(ids)} tokens and {other!r} for it; expected '
                     f'a place from 1 to {len(ids) - 1} and one token that is another')
  changed = [*ids[:place], *new, *ids[place + 1:]]
  p = np.asarray(_predictions(run.model(), params, batching.collate(
      [sequences.causal(ids, ()), sequences.causal(changed, ())], len(ids), 0, 0)), np.float64)
  return {'tokens': [run.tokenizer.decode([i]) for i in ids], 'place': place,
          'moved': 0.5 * np.abs(p[0] - p[1]).sum(-1),
          'p': p[:, place - 1, ids[place]].tolist(), 'causal': run.config.causal}


@functools.partial(jax.jit, static_argnums=0)
def _predictions(model, params, batch):
  hidden = model.apply({'params': params}, batch.tokens, batch.positions, batch.mask).hidden
  return jax.nn.softmax(model.apply({'params': params}, hidden, method='head'))
