"""Proof on real rows that nothing is seen that must not be.

What may be seen is worked out here from the lengths of question, blocks and
readouts alone, not from the vectors that `batching` and `masks` compute, so that
a mistake in those shows up as a difference.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_reasoning import batching, methods, progress, sequences
from latent_reasoning.batching import Batch
from latent_reasoning.config import Config, LoopConfig
from latent_reasoning.data import tokenizers
from latent_reasoning.eval import decoding, one_by_one
from latent_reasoning.eval.evaluator import prompt_batch
from latent_reasoning.methods import rim
from latent_reasoning.models import latents, reasoning_decoder
from latent_reasoning.train import train_step as step_lib

TOLERANCE = {'float32': 2e-4, 'bfloat16': 0.2, 'float16': 0.05}  # on log-probabilities


@dataclasses.dataclass(frozen=True)
class Subject:
  """What is checked."""
  config: Config
  model: Any  # without dropout
  params: Any
  tokenizer: tokenizers.Tokenizer
  examples: Sequence[sequences.TokenizedExample]

  @property
  def special(self) -> sequences.SpecialTokens:
    return sequences.special_tokens(self.tokenizer)

  def rows(self, stage: int) -> list[sequences.PackedSequence]:
    """Training rows of a stage, at its beginning: no readout is annealed away. Of a method
    whose stage 1 has parts, the last, where it has its latents; what is drawn for a problem
    is another for each, 0 for the first."""
    method = methods.get(self.config.method)
    parts = method.parts(self.config) if method.parts else 1
    progress = (parts - 1) / parts
    return [method.sequence(dataclasses.replace(e, draw=i / len(self.examples)), stage,
                            progress, self.config, self.special)
            for i, e in enumerate(self.examples)]

  def prompts(self) -> list[sequences.PackedSequence]:
    method = methods.get(self.config.method)
    return [method.prompt(e.question, self.config.rim.blocks, self.config, self.special)
            for e in self.examples]


def run(subject: Subject) -> list[dict[str, Any]]:
  """Runs all checks; returns {'check', 'ok', 'found'} of each."""
  checks = _checks(subject)
  return [_check(name, check, subject, *args) for name, check, *args in progress.track(
      checks, f'{len(checks)} leakage checks', len(checks))]


def _checks(subject: Subject) -> list[tuple]:
  """(name, check, arguments behind the subject) of each check that applies."""
  if not subject.config.causal:
    rows = subject.rows(1)
    return [('one layer sees what the rule allows', direct_sight, rows),
            ('no gradient from later tokens', gradients, rows)]
  checks = []
  for stage in (1, 2):
    rows = subject.rows(stage)
    checks += [
        (f'stage {stage}: one layer sees what the rule allows', direct_sight, rows),
        (f'stage {stage}: no gradient from later tokens, blocks, other readouts', gradients,
         rows),
        (f'stage {stage}: packed row = each readout as a sequence of its own', separate, rows),
        (f'stage {stage}: {fast(subject)} attention = one dense mask', implementations, rows),
        *([(f'stage {stage}: memory by chunks = token by token', memories, rows)]
          if subject.config.imm.write_policy else []),
        (f'stage {stage}: padded = unpadded', padding, rows),
        (f'stage {stage}: batch of 1 = batch of {len(rows)}', batch_size, rows)]
  if subject.config.reasoning_decoder.source == 'latents':
    checks.append(('what is said of latents is read out of the question alone', decoder_sources,
                   subject.rows(2)))
  return [*checks, ('cached decoding = uncached', caching, subject.prompts()),
          *([('cached decoding of steps = uncached', caching, [
              rim.steps_prompt(row, subject.special) for row in subject.prompts()])]
            if subject.config.rim.externalize else []),
          ('special tokens cannot be typed', typing_specials)]


def _check(name: str, check, *args) -> dict[str, Any]:
  ok, found = check(*args)
  return {'check': name, 'ok': bool(ok), 'found': found}


def expected_mask(config: Config, row: sequences.PackedSequence, question: int,
                  batch: Batch) -> np.ndarray:
  """Returns bool [L, L]: which keys a query may attend to, from lengths alone.

  Readout k of a RiM sequence is attached to block k, and so is its second one, which
  comes after all the first, and the only one to the last block where blocks say their steps
  themselves; the readouts of every other method are attached to the end of
  the prefix. What stands at a latent is seen by none. Of several passes over the blocks, a
  later one reads states of the one before, and so all that these have seen.
  """
  p, count = batch.prefix, batch.anchors.shape[1]
  length = batch.tokens.shape[1]
  size = config.rim.block_length
  n = len(row.prefix)
  has_blocks = methods.get(config.method).has_blocks
  blocks = max(1, (n - question) // size)

  def block(j):  # 0 for the question, and for pause tokens
    return 1 + (j - question) // size if has_blocks and j >= question else 0

  may = np.zeros((length, length), bool)
  for i in range(n):
    for j in range(n):
      within = config.rim.block_attention == 'bidirectional' and block(j) > 0
      may[i, j] = j <= i or (within and block(i) == block(j))
  for k in range(min(count, len(row.readouts))):
    start = p + k * ((length - p) // count)
    for i in range(len(row.readouts[k].inputs)):
      for j in range(n):
        blind = has_blocks and not config.rim.readout_sees_question and block(j) == 0
        may[start + i, j] = not blind and (
            not has_blocks or bool(row.labels) or block(j) <= k % blocks + 1)
      may[start + i, start + row.readouts[k].latents:start + i + 1] = True
  return _passed(may, row, batch) if row.loops else may


def _passed(may: np.ndarray, row: sequences.PackedSequence, batch: Batch) -> np.ndarray:
  """`expected_mask` with the places of later passes, of that of a first pass."""
  loops, n, count = row.loops, len(row.prefix), batch.anchors.shape[1]
  size, begin = loops.size, n - loops.size
  own = may[begin:n, begin:n].copy()
  if loops.block:
    block = np.arange(size) // loops.block
    own |= block[:, None] != block
  states, read = may[begin - loops.shift:n].copy(), {}  # by what was each, and each input
  for number in range(2, loops.passes + 1):
    at = batch.prefix - (loops.passes + 1 - number) * size
    read[number] = states[:size].copy()
    if loops.mix == 'add':
      read[number][np.arange(size), at + np.arange(size)] = True
    found = own @ read[number]
    found[:, :begin] = True
    may[at:at + size] = found
    states = np.concatenate([may[begin - loops.shift:begin], found])
  length = (len(may) - batch.prefix) // count
  for k, out in enumerate(row.readouts):
    if out.reads > 1:
      own = may[batch.prefix + k * length:batch.prefix + (k + 1) * length]  # a view
      seen = own[:len(out.inputs), begin:n].copy()
      own[:, begin:n] = False
      own[:len(out.inputs)] |= seen @ read[out.reads]
  return may


def _real(row: sequences.PackedSequence, batch: Batch) -> np.ndarray:
  """Positions of a batch's row that hold tokens, not padding."""
  p, count = batch.prefix, batch.anchors.shape[1]
  r = (batch.tokens.shape[1] - p) // count
  places = list(range(len(row.prefix)))
  if row.loops:
    places += range(p - (row.loops.passes - 1) * row.loops.size, p)
  for k, out in enumerate(row.readouts):
    places += range(p + k * r, p + k * r + len(out.inputs))
  return np.array(places)


def _influence(model, params, batch: Batch) -> np.ndarray:
  """Returns [L, L]: size of the gradient of hidden state i by input embedding j."""
  inputs = model.apply({'params': params}, batch.tokens, method='embed')
  direction = jax.random.normal(step_lib.key(0, step_lib.LEAKAGE), inputs.shape[-1:])

  def outputs(embeddings):
    hidden = latents.forward(model, params, batch, embeddings=embeddings).hidden
    return (hidden[0].astype(jnp.float32) @ direction)

  _, vjp = jax.vjp(outputs, inputs)
  rows = jax.lax.map(lambda e: jnp.abs(vjp(e)[0][0].astype(jnp.float32)).max(-1),
                     jnp.eye(batch.tokens.shape[1]))
  return rows


_influence = jax.jit(_influence, static_argnums=0)


def _single(rows: Sequence[sequences.PackedSequence], index: int) -> Batch:
  """One row in the shape that serves all of them, so that one compilation does."""
  return batching.collate([rows[index]], *batching.sizes(rows))


def _compare(subject: Subject, rows, model, params, expected):
  """Counts pairs (query, key) of real tokens whose influence is not as expected."""
  wrong, pairs, first = 0, 0, ''
  for index, (row, example) in enumerate(zip(rows, subject.examples, strict=True)):
    batch = _single(rows, index)
    influence = np.asarray(_influence(model, params, batch))
    may = expected_mask(subject.config, row, len(example.question), batch)
    real = _real(row, batch)
    bad = expected(influence, may)[np.ix_(real, real)]
    pairs += bad.size
    wrong += int(bad.sum())
    if bad.any() and not first:
      i, j = real[np.argwhere(bad)[0]]
      first = f'; first: row {index}, query {i}, key {j}, gradient {influence[i, j]:.2g}'
  return not wrong, f'{wrong} of {pairs:,} pairs wrong{first}'


def direct_sight(subject: Subject, rows):
  """In a model of one layer, the gradient is the mask: nonzero exactly where legal."""
  config = dataclasses.replace(subject.config.model, num_layers=1, loop=LoopConfig())
  imm = subject.config.imm
  model = subject.model.clone(
      config=config, imm=dataclasses.replace(imm, layers=(0,) if imm.layers else ()))
  # Shapes of parameters do not depend on the row's length: two tokens compile fast.
  two = batching.collate([sequences.causal(rows[0].prefix[:2], ())], 2, 0, 0)
  params = jax.jit(model.init)(step_lib.key(1, step_lib.LEAKAGE), two.tokens, two.positions,
                               two.mask)['params']
  return _compare(subject, rows, model, params,
                  lambda influence, may: (influence > 0) != may)


def gradients(subject: Subject, rows):
  """Through all layers, no gradient may arrive from what no path of legal steps reaches."""
  def illegal(influence, may):
    reach = may.copy()
    passes = max(rows[0].loops.passes if rows[0].loops else 1, 1)
    for _ in range((passes * subject.config.model.depth).bit_length()):
      reach |= (reach.astype(np.float32) @ reach.astype(np.float32)) > 0
    silent = not (influence[reach] > 0).any()  # a check on no gradient proves nothing
    return ((influence > 0) & ~reach) | silent

  return _compare(subject, rows, subject.model, subject.params, illegal)


@functools.partial(jax.jit, static_argnums=0)
def _source_influence(model, params, batch: Batch) -> np.ndarray:
  """Returns [C, L]: size of the gradient of what text c is said of by input embedding j."""
  inputs = model.apply({'params': params}, batch.tokens, method='embed')
  direction = jax.random.normal(step_lib.key(0, step_lib.LEAKAGE), inputs.shape[-1:])

  def sources(embeddings):
    out = latents.forward(model, params, batch, embeddings=embeddings)
    return reasoning_decoder.source(model, params, batch, 'latents', out).sum(1) @ direction
  return jnp.abs(jax.jacrev(sources)(inputs)[:, 0]).max(-1)


def decoder_sources(subject: Subject, rows):
  """A text is read out of the question by way of its latents: no gradient from what stands
  behind them, which is the text itself or the answer."""
  method, wrong, count = methods.get(subject.config.method), 0, 0
  for index, (row, example) in enumerate(zip(rows, subject.examples, strict=True)):
    texts = batching.collate_decoder_targets([method.decoder_targets(
        example, row, subject.config, subject.special)])
    batch = _single(rows, index).replace(decoder_targets=texts)
    influence = np.asarray(_source_influence(subject.model, subject.params, batch))
    influence = influence[texts.weights[0].any(-1)]
    wrong += int(((influence[:, batch.prefix:] > 0).any(1) | ~(influence > 0).any(1)).sum())
    count += len(influence)
  return bool(count) and not wrong, f'{wrong} of {count} texts wrong'


def _agree(subject: Subject, a: Sequence[np.ndarray], b: Sequence[np.ndarray]):
  worst = max(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True))
  tolerance = TOLERANCE[subject.config.model.dtype]
  return worst <= tolerance, f'largest difference {worst:.2g} (at most {tolerance:g})'


def separate(subject: Subject, rows):
  """Each readout of a packed row, and the same tokens as a sequence of their own.

  With causal blocks that see everything before them, that is a plain causal sequence. The
  other variants have no causal equal; they are compared to a row of one readout.
  """
  config = subject.config
  packed = one_by_one.by_readout(subject, batching.collate(rows, *batching.sizes(rows)), rows)
  if rows[0].readouts[0].latents:
    return _agree(subject, packed, [one_by_one.latents_of(subject, row) for row in rows])
  if rows[0].loops:
    return _agree(subject, packed, [
        one for row in rows for one in one_by_one.pass_by_pass(subject, row)])
  causal = not methods.get(config.method).has_blocks or (
      config.rim.block_attention == 'causal' and config.rim.readout_sees_question)
  alone = []
  for row in rows:
    for out in row.readouts:
      if causal:
        alone.append((sequences.causal([*row.prefix[:out.visible_until], *out.inputs], ()),
                      out))
      else:
        n = out.visible_until
        cut = sequences.PackedSequence(row.prefix[:n], row.visible_until[:n], (out,))
        alone.append((cut, out))
  if not causal:
    own = [row for row, _ in alone]
    batch = batching.collate(own, *batching.sizes(own))
    return _agree(subject, packed, one_by_one.by_readout(subject, batch, own))
  length = max(len(row.prefix) for row, _ in alone)
  batch = batching.collate([row for row, _ in alone], length, 0, 0)
  logits = np.asarray(one_by_one.all_log_probabilities(subject.model, subject.params, batch))
  found = []
  for b, (row, out) in enumerate(alone):
    at = np.arange(len(row.prefix) - len(out.out), len(row.prefix))
    found.append(logits[b, at, np.array(out.out)])
  return _agree(subject, packed, found)


def fast(subject: Subject) -> str:
  """The attention that is configured, or 'shared_prefix' where that is the reference."""
  name = subject.config.model.attention
  return 'shared_prefix' if name == 'dense' else name


def implementations(subject: Subject, rows):
  batch = batching.collate(rows, *batching.sizes(rows))
  models = [subject.model.clone(config=dataclasses.replace(subject.config.model, attention=a))
            for a in (fast(subject), 'dense')]
  return _agree(subject, *(one_by_one.by_readout(subject, batch, rows, m) for m in models))


def memories(subject: Subject, rows):
  batch = batching.collate(rows, *batching.sizes(rows))
  models = [subject.model.clone(imm=dataclasses.replace(subject.config.imm, implementation=i))
            for i in ('chunkwise', 'recurrent')]
  return _agree(subject, *(one_by_one.by_readout(subject, batch, rows, m) for m in models))


def padding(subject: Subject, rows):
  p, k, r = batching.sizes(rows)
  tight = one_by_one.by_readout(subject, batching.collate(rows, p, k, r), rows)
  wide = batching.collate(rows, p + 5, k + 2, r + 3, pad=subject.special.pad)
  return _agree(subject, tight, one_by_one.by_readout(subject, wide, rows))


def batch_size(subject: Subject, rows):
  shape = batching.sizes(rows)
  together = one_by_one.by_readout(subject, batching.collate(rows, *shape), rows)
  alone = [found for row in rows
           for found in one_by_one.by_readout(subject, batching.collate([row], *shape), [row])]
  return _agree(subject, together, alone)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _prefill(model, params, head, batch, room):
  return decoding.prefill(model, params, head, batch, room)


@functools.partial(jax.jit, static_argnums=0)
def _decode_step(model, params, head, batch, cache, tokens, step):
  return decoding.decode_step(model, params, head, batch, cache, tokens, step)


def caching(subject: Subject, rows):
  """Greedy decoding of the prompts, against a full forward pass over what it said."""
  tokens = min(8, subject.config.eval.max_new_tokens)
  batch = prompt_batch(rows, subject.config, subject.special.pad)
  head = decoding.head_kernel(subject.model, subject.params)
  logits, cache = _prefill(subject.model, subject.params, head, batch, tokens)
  said, spoken = [], []
  for step in range(tokens):
    said.append(np.asarray(logits.argmax(-1)))
    spoken.append(np.asarray(jax.nn.log_softmax(logits)))
    if step + 1 < tokens:
      logits, cache = _decode_step(subject.model, subject.params, head, batch, cache,
                                   jnp.asarray(said[-1]), step)
  said, spoken = np.stack(said, -1), np.stack(spoken, -2)  # [B, K, T], [B, K, T, V]
  full = [dataclasses.replace(row, readouts=[
      dataclasses.replace(out, out=said[b, k].tolist()) for k, out in enumerate(row.readouts)])
      for b, row in enumerate(rows)]
  uncached = one_by_one.by_readout(subject, batching.collate(full, *batching.sizes(full)), full)
  cached = [np.take_along_axis(spoken[b, k], said[b, k][:, None], -1)[:, 0]
            for b, row in enumerate(rows) for k in range(len(row.readouts))]
  return _agree(subject, cached, uncached)


def typing_specials(subject: Subject):
  """A question that spells every special token holds none of them."""
  t = subject.tokenizer
  names = t.special().values()
  ids = t.encode(' '.join(names) + ''.join(names))
  special = [i for i in ids if i >= t.size]
  return not special, f'{len(special)} special among {len(ids)} tokens of {len(names)} names'
