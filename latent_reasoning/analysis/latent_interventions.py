"""Do the latents do the work? Interventions on their states, the same for every method.

Latents are the blocks of RiM, pause tokens, the latents of LOTUS and PCCoT (of their last
pass), and the continuous thoughts of Coconut and CODI. Their keys and values are changed in
the cache that the answer is read from. Papers that doubt latent reasoning ask for these
controls: the mean state of a place, since zeros lie off the manifold (arXiv 2607.20952);
another question's states (interchange); necessity, sufficiency and selectivity (arXiv
2608.27265), of which we have the names and thresholds alone, so that how each is counted
here is ours; and whether the answer follows where one fact of the question is changed (arXiv
2607.06648).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from latent_reasoning import methods, sequences
from latent_reasoning.analysis import activation_patching
from latent_reasoning.analysis.activation_patching import donors, line_of, reread
from latent_reasoning.config import Config
from latent_reasoning.data.example import Example
from latent_reasoning.errors import InputError
from latent_reasoning.eval import answer_matching
from latent_reasoning.eval.evaluator import Predictor, prefix_width
from latent_reasoning.models.attention import Cache

DRAWS, NOISE = 8, 0.5  # of Pass@k and Maj@k, and the noise on a state in shares of its norm


@flax.struct.dataclass
class Edit:
  """What stands in a cache in place of the states of each row's n latents.

  Attributes:
    at: int32 [B, n], their places: of the prefix, or of a readout's own.
    row: int32 [B], 'swap': the row whose states come instead.
    order: int32 [B, n], 'swap': and of which of its latents.
    weight: float32 [B], of each row in 'mean'.
    layer: int32, which; -1: all.
    size: float32, 'jitter': the noise added, in shares of a state's norm.
    seed: int32, of 'noise' and 'jitter'.
    kind: 'zero', 'mean' over rows, 'noise' of a state's norm, 'jitter' or 'swap'.
    own: whether latents stand in the readout.
    parts: 'kv', 'k' or 'v'.
  """
  at: chex.Array
  row: chex.Array
  order: chex.Array
  weight: chex.Array
  layer: chex.Array
  size: chex.Array
  seed: chex.Array
  kind: str = flax.struct.field(pytree_node=False)
  own: bool = flax.struct.field(pytree_node=False)
  parts: str = flax.struct.field(pytree_node=False, default='kv')

  def __call__(self, cache: Cache) -> Cache:
    where = 'own' if self.own else 'prefix'
    return cache.replace(**{
        name: self._layers(getattr(cache, name), number) for number, name in enumerate(
            (f'{where}_k', f'{where}_v')) if name[-1] in self.parts})

  def _layers(self, layers, part: int):
    found = [self._changed(a, layer, jax.random.fold_in(jax.random.key(self.seed),
                                                        2 * layer + part))
             for layer, a in enumerate(layers)]
    return tuple(found) if isinstance(layers, tuple) else jnp.stack(found)

  def _changed(self, a: chex.Array, layer: int, rng: chex.PRNGKey) -> chex.Array:
    """Of one layer, [B, M, P, H], or of the only readout, [B, 1, M, S, H]."""
    states, rows = a[:, 0] if self.own else a, jnp.arange(len(a))[:, None]
    old = states[rows, :, self.at].astype(jnp.float32)  # [B, n, M, H]
    new = jnp.where((self.layer < 0) | (self.layer == layer), self._instead(old, rng), old)
    states = states.at[rows, :, self.at].set(new.astype(a.dtype))
    return states[:, None] if self.own else states

  def _instead(self, old: chex.Array, rng: chex.PRNGKey) -> chex.Array:
    if self.kind == 'zero':
      return jnp.zeros_like(old)
    if self.kind == 'mean':
      weight = self.weight[:, None, None, None]
      return jnp.broadcast_to(jnp.sum(weight * old, 0) / jnp.sum(self.weight), old.shape)
    if self.kind == 'swap':
      return jnp.take_along_axis(old[self.row], self.order[:, :, None, None], axis=1)
    noise = jax.random.normal(rng, old.shape)
    noise *= (jnp.linalg.norm(old, axis=-1, keepdims=True)
              / jnp.linalg.norm(noise, axis=-1, keepdims=True))
    return noise if self.kind == 'noise' else old + self.size * noise


@dataclasses.dataclass(frozen=True)
class Asked:
  """Prompts of a batch whose answers are read behind their latents."""
  rows: list[sequences.PackedSequence]
  at: np.ndarray  # [B, n]
  own: bool
  real: int  # rows that are no filling

  def edit(self, kind: str, row: np.ndarray | None = None, order: np.ndarray | None = None,
           layer: int = -1, parts: str = 'kv', seed: int = 0) -> Edit:
    size, n = self.at.shape
    return Edit(self.at.astype(np.int32),
                np.asarray(np.arange(size) if row is None else row, np.int32),
                np.asarray(np.tile(np.arange(n), (size, 1)) if order is None else order,
                           np.int32),
                np.float32(np.arange(size) < self.real), np.int32(layer), np.float32(NOISE),
                np.int32(seed), kind, self.own, parts)


def require(config: Config) -> None:
  """Raises InputError where there are no latents, or something else carries what they hold."""
  method = methods.get(config.method)
  with_latents = ', '.join(name for name, one in methods.METHODS.items()
                           if one.has_blocks or one.counts)
  if not (method.has_blocks or method.counts):
    raise InputError(f'method {config.method} has no blocks, pause tokens or latents; expected '
                     f'one that has: {with_latents}')
  if config.imm.write_policy:
    raise InputError("config.imm.write_policy is set, and its banks would carry what the "
                     "latents' keys and values do not; expected ''")
  if method.has_blocks and config.rim.passes > 1:
    raise InputError(f'there are {config.rim.passes} passes over the blocks, and what the '
                     'answer is read from in the last is no token that could be read again; '
                     'expected config.rim.passes 1 and config.eval.passes 0')
  if method.has_blocks and not config.rim.readout_sees_question:
    raise InputError('config.rim.readout_sees_question is False: only the `</b>` a readout '
                     'is attached to sees the question, and it cannot be read again; expected '
                     'True')


def asked(predictor: Predictor, prompts: Sequence[sequences.PackedSequence],
          lengths: Sequence[int], real: int) -> Asked:
  """Prompts that keep their last readout, which sees nothing of latents but their states.

  Args:
    prompts: of the method.
    lengths: tokens of their questions.
    real: how many are no filling.
  """
  last = prompts[0].readouts[-1]
  if last.latents:
    rows = [dataclasses.replace(r, readouts=r.readouts[-1:]) for r in prompts]
    return Asked(rows, np.tile(np.arange(last.latents), (len(rows), 1)), True, real)
  rows = [reread(r, r.prefix[-1]) if last.start is None else
          dataclasses.replace(r, readouts=r.readouts[-1:]) for r in prompts]
  loops, width = prompts[0].loops, prefix_width(rows, predictor.config)
  if loops:  # of the last pass
    start = np.full(len(rows), width + (loops.passes - 2) * loops.size)
    return Asked(rows, start[:, None] + np.arange(loops.size), False, real)
  count = len(prompts[0].prefix) - lengths[0]
  return Asked(rows, np.array(lengths)[:, None] + np.arange(count), False, real)


def tests(predictor: Predictor, examples: Sequence[Example], rule: str,
          alter: Callable[[Example, int], Example | None] | None = None) -> dict[str, Any]:
  """What becomes of the answers when latents are changed, and the verdict.

  Donors are in the same batch, of a question of the same length.

  Args:
    rule: how answers are compared (answer_matching.RULES).
    alter: (problem, seed) -> the problem with one fact changed and another answer, of
      generated problems; None: nobody knows.

  Returns:
    {'n', 'latents', 'lines': as `activation_patching.interventions`, 'verdict': {name:
    {'share', 'low', 'high', 'n', 'threshold'}}, 'noise': {'size', 'draws', 'pass',
    'majority'}}. Necessity is the share of right answers that are no longer right with the
    mean states of all problems; sufficiency that of answers that become another one's, whose
    states come instead; selectivity that of answers that change where states come from a
    problem of the same answer; following, of right answers, that of new right ones where a
    fact is changed.
  """
  require(predictor.config)
  layers = predictor.config.model.num_layers
  found: dict[str, list] = {}
  drawn, alike_pairs, total, count = [], [], 0, 0
  for part in activation_patching.parts(
      predictor, examples, rule, f'{10 + layers + DRAWS} interventions on latents'):
    n, lengths, truth, say = len(part.truth), part.lengths, part.truth, part.say
    total += n
    own = asked(predictor, part.prompts, lengths, n)
    size, count = own.at.shape
    if not count:
      raise InputError(f'method {predictor.config.method} has no latents here: '
                       f'{predictor.method.counts or "rim.blocks"} is 0; expected more')

    def changed(kind, own=own, say=say, **how):
      return say(own.rows, own.edit(kind, **how))

    itself = np.arange(size)
    plain = say(own.rows)
    alike = np.append(donors(lengths[:n]), itself[n:])
    same = np.append(donors([*zip(lengths[:n], plain, strict=True)], seed=2), itself[n:])
    order = np.tile(np.roll(np.arange(count), 1), (size, 1))
    lines = {'latents untouched': (plain, itself), 'zeros': (changed('zero'), itself),
             'mean states of all problems': (changed('mean'), itself),
             'noise of the same norm': (changed('noise'), itself),
             **({'its own latents in another order': (changed('swap', order=order), itself)}
                if count > 1 else {}),
             "another question's states": (changed('swap', row=alike), alike),
             "another question's keys": (changed('swap', row=alike, parts='k'), alike),
             "another question's values": (changed('swap', row=alike, parts='v'), alike),
             **{f'mean states, layer {layer + 1}': (changed('mean', layer=layer), itself)
                for layer in range(layers)}}
    if not own.own and not part.prompts[0].loops:
      pause = predictor.special.pause
      lines['filler of the same length'] = say([dataclasses.replace(
          row, prefix=[*row.prefix[:length], *[pause] * count],
          readouts=[dataclasses.replace(o, start=pause) for o in row.readouts])
          for row, length in zip(own.rows, lengths, strict=True)]), itself
    for name, (said, other) in lines.items():
      other, swaps = other[:n], name.startswith('another')
      found.setdefault(name, []).extend(
          (said[b], truth[b], plain[b], plain[other[b]] if swaps else None)
          for b in range(n) if not swaps or other[b] != b)
    said = changed('swap', row=same)
    alike_pairs += [said[b] != plain[b] for b in range(n) if same[b] != b]
    draws = np.stack([changed('jitter', seed=seed) for seed in range(DRAWS)])
    drawn += [(truth[b], draws[:, b]) for b in range(n)]
  means, swapped = found['mean states of all problems'], found["another question's states"]
  apart = [said == donor for said, _, plain, donor in swapped if donor != plain]
  return {
      'n': total, 'latents': count,
      'lines': [line_of(name, records) for name, records in found.items()],
      'verdict': {
          'necessity': share([said != right for said, right, plain, _ in means
                              if plain == right], 0.5),
          'sufficiency': share(apart, 0.8),
          'selectivity': share(alike_pairs, 0.25),
          **({'following': share(following(predictor, examples, rule, alter), 0.5)}
             if alter else {})},
      'noise': {'size': NOISE, 'draws': DRAWS,
                'pass': float(np.mean([right in said for right, said in drawn])),
                'majority': float(np.mean([right == _most(said) for right, said in drawn]))}}


def following(predictor: Predictor, examples: Sequence[Example], rule: str,
              alter: Callable[[Example, int], Example | None]) -> list[bool]:
  """Of the problems that are answered rightly: whether the answer is the new right one after
  one fact of the question is changed."""
  pairs = [(e, other) for i, e in enumerate(examples) if (other := alter(e, i))]

  def right(own):
    texts = predictor.texts([e.question for e in own])
    return [bool(t) and answer_matching.correct(rule, t[-1], (e.answer, *e.others))
            for e, t in zip(own, texts, strict=True)]
  before, after = (right(own) for own in zip(*pairs, strict=True)) if pairs else ([], [])
  return [new for old, new in zip(before, after, strict=True) if old]


def share(hits: Sequence[bool], threshold: float) -> dict[str, Any]:
  """A share with its exact 95% interval (Clopper and Pearson); None of nothing."""
  n, k = len(hits), int(np.sum(hits))
  if not n:
    return {'share': None, 'low': None, 'high': None, 'n': 0, 'threshold': threshold}
  ends = stats.binomtest(k, n).proportion_ci(0.95, 'exact')
  return {'share': k / n, 'low': float(ends.low), 'high': float(ends.high), 'n': n,
          'threshold': threshold}


def _most(said: np.ndarray) -> str:
  values, counts = np.unique(said, return_counts=True)
  return values[counts.argmax()]
