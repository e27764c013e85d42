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
from latent_reasoning.eval import decoding
from latent_reasoning.eval.evaluator import prompt_batch
from latent_reasoning.methods import rim
from latent_reasoning.models import latents
from latent_reasoning.train import losses
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
    whose stage 1 has parts, the last, where it has its latents."""
    method = methods.get(self.config.method)
    parts = method.parts(self.config) if method.parts else 1
    progress = (parts - 1) / parts
    return [method.sequence(e, stage, progress, self.config, self.special)
            for e in self.examples]

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
  comes after all the first; the readouts of every other method are attached to the end of
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
            block(j) <= k % blocks + 1 if has_blocks else True)
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


def _log_probabilities(model, params, batch: Batch):
  """Log-probabilities of the targets, [B, K + K·R], and their weights."""
  at, targets, weights = losses.predictions(batch)
  hidden = latents.forward(model, params, batch).hidden
  hidden = jnp.take_along_axis(hidden, at[..., None], axis=1)
  logits = jax.nn.log_softmax(model.apply({'params': params}, hidden, method='head'))
  return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], weights


_log_probabilities = jax.jit(_log_probabilities, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _all_log_probabilities(model, params, batch: Batch, embeddings=None):
  """Log-probabilities at every position, [B, L, V]."""
  hidden = model.apply({'params': params}, batch.tokens, batch.positions, batch.mask,
                          embeddings=embeddings).hidden
  return jax.nn.log_softmax(model.apply({'params': params}, hidden, method='head'))


def _by_readout(subject: Subject, batch: Batch, rows, model=None) -> list[np.ndarray]:
  """Log-probabilities of each readout's tokens, over all rows in turn."""
  values, _ = _log_probabilities(model or subject.model, subject.params, batch)
  values, count = np.asarray(values), batch.anchors.shape[1]
  r = (batch.tokens.shape[1] - batch.prefix) // count
  found = []
  for b, row in enumerate(rows):
    for k, out in enumerate(row.readouts):
      own = values[b, count + k * r + out.latents:count + k * r + len(out.inputs)]
      found.append(own if out.start is not None else np.append(values[b, k], own))
  return found


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
  if methods.get(config.method).has_latents:
    packed = _by_readout(subject, batching.collate(rows, *batching.sizes(rows)), rows)
    return _agree(subject, packed, [one_by_one(subject, row) for row in rows])
  if rows[0].loops:
    packed = _by_readout(subject, batching.collate(rows, *batching.sizes(rows)), rows)
    return _agree(subject, packed, [one for row in rows for one in pass_by_pass(subject, row)])
  causal = not methods.get(config.method).has_blocks or (
      config.rim.block_attention == 'causal' and config.rim.readout_sees_question)
  packed = _by_readout(subject, batching.collate(rows, *batching.sizes(rows)), rows)
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
    return _agree(subject, packed, _by_readout(subject, batch, own))
  length = max(len(row.prefix) for row, _ in alone)
  batch = batching.collate([row for row, _ in alone], length, 0, 0)
  logits = np.asarray(_all_log_probabilities(subject.model, subject.params, batch))
  found = []
  for b, (row, out) in enumerate(alone):
    at = np.arange(len(row.prefix) - len(out.out), len(row.prefix))
    found.append(logits[b, at, np.array(out.out)])
  return _agree(subject, packed, found)


@functools.partial(jax.jit, static_argnums=0)
def _next_thought(model, params, batch: Batch, embeddings, place):
  """The embeddings with a latent put after the hidden state that it is, plain forward."""
  hidden = model.apply({'params': params}, batch.tokens, batch.positions, batch.mask,
                          embeddings=embeddings).hidden
  latent = model.apply({'params': params}, hidden[:, place], method='latent_input')
  return jax.lax.dynamic_update_index_in_dim(embeddings, latent, place + 1, 1)


def one_by_one(subject: Subject, row: sequences.PackedSequence) -> np.ndarray:
  """Log-probabilities of a row with latents: no cache, no batch, no padding, each latent
  by a pass over all of the row as one plain causal sequence."""
  model, params, out = subject.model, subject.params, row.readouts[0]
  tokens = [*row.prefix, *out.inputs]
  batch = batching.collate([sequences.causal(tokens, ())], len(tokens), 0, 0)
  embeddings = model.apply({'params': params}, batch.tokens, method='embed')
  for place in range(len(row.prefix) - 1, len(row.prefix) - 1 + out.latents):
    embeddings = _next_thought(model, params, batch, embeddings, place)
  logits = _all_log_probabilities(model, params, batch, embeddings)[0]
  at = np.arange(len(tokens) - len(out.out), len(tokens))
  return np.asarray(logits)[at, np.array(out.out)]


def pass_by_pass(subject: Subject, row: sequences.PackedSequence) -> list[np.ndarray]:
  """Log-probabilities of the readouts of a row with several passes: no cache, no batch, no
  padding. Each pass over the end of the prefix, and each readout behind it, is a sequence
  of its own that is read whole."""
  model, params, loops, n = subject.model, subject.params, row.loops, len(row.prefix)
  begin, place = n - loops.size, np.arange(n)
  embed = functools.partial(model.apply, {'params': params}, method='embed')
  first = embed(jnp.asarray([row.prefix]))
  later = np.array(row.visible_until)
  unseen = np.zeros((2, n), int)
  if loops.block:  # blocks see each other, as far as into themselves
    ends = begin + (1 + np.arange(loops.size) // loops.block) * loops.block
    unseen[:, begin:] = later[begin:], ends
    later = np.where(place < begin, later, n)

  def read(embeddings, number, out=None):
    more = len(out.inputs) if out else 0
    behind = np.arange(n, n + more)
    vectors = [np.append(row.visible_until if number == 1 else later, behind + 1)]
    vectors += [np.append(np.zeros(n, int) if number == 1 else a, behind * 0 + edge)
                for a, edge in zip(unseen, (out.visible_until if out else 0, n), strict=True)]
    until, unseen_from, unseen_until = (jnp.asarray(a[None]) for a in vectors)
    zeros = jnp.zeros_like(until)
    hides = zeros.at[:, n:].set(out.visible_from if out else 0)
    mask = batching.Mask(zeros, hides, until, zeros[:, :0], n + more, 0, unseen_from,
                         unseen_until)
    positions = np.append(place, (out.visible_until if out else 0) + behind - n)
    if more:
      embeddings = jnp.concatenate([embeddings, embed(jnp.asarray([out.inputs]))], axis=1)
    return model.apply({'params': params}, zeros, jnp.asarray(positions[None]), mask,
                       embeddings=embeddings).hidden

  inputs = [first]
  for number in range(1, loops.passes):
    hidden = read(inputs[-1], number)[:, begin - loops.shift:n - loops.shift]
    if loops.shift:  # what stands before these tokens is read once
      hidden = hidden.at[:, 0].set(read(first, 1)[:, begin - 1])
    hidden = (hidden + first[:, begin:] if loops.mix == 'add' else
              model.apply({'params': params}, hidden, method='latent_input'))
    inputs.append(jnp.concatenate([first[:, :begin], hidden], axis=1))
  found = []
  for out in row.readouts:
    hidden = read(inputs[out.reads - 1], out.reads, out)
    logits = jax.nn.log_softmax(model.apply({'params': params}, hidden, method='head'))[0]
    at = [*range(n, n + len(out.inputs))]
    at = [out.visible_until - 1, *at] if out.start is None else at[len(at) - len(out.out):]
    found.append(np.asarray(logits)[at, np.array(out.out)])
  return found


def fast(subject: Subject) -> str:
  """The attention that is configured, or 'shared_prefix' where that is the reference."""
  name = subject.config.model.attention
  return 'shared_prefix' if name == 'dense' else name


def implementations(subject: Subject, rows):
  batch = batching.collate(rows, *batching.sizes(rows))
  models = [subject.model.clone(config=dataclasses.replace(subject.config.model, attention=a))
            for a in (fast(subject), 'dense')]
  return _agree(subject, *(_by_readout(subject, batch, rows, m) for m in models))


def memories(subject: Subject, rows):
  batch = batching.collate(rows, *batching.sizes(rows))
  models = [subject.model.clone(imm=dataclasses.replace(subject.config.imm, implementation=i))
            for i in ('chunkwise', 'recurrent')]
  return _agree(subject, *(_by_readout(subject, batch, rows, m) for m in models))


def padding(subject: Subject, rows):
  p, k, r = batching.sizes(rows)
  tight = _by_readout(subject, batching.collate(rows, p, k, r), rows)
  wide = batching.collate(rows, p + 5, k + 2, r + 3, pad=subject.special.pad)
  return _agree(subject, tight, _by_readout(subject, wide, rows))


def batch_size(subject: Subject, rows):
  shape = batching.sizes(rows)
  together = _by_readout(subject, batching.collate(rows, *shape), rows)
  alone = [found for row in rows
           for found in _by_readout(subject, batching.collate([row], *shape), [row])]
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
  uncached = _by_readout(subject, batching.collate(full, *batching.sizes(full)), full)
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
