r"""How tokens write to a bank of N slots: the recurrences of the implicit memory.

The paper (arXiv 2502.21030) leaves open how a token writes. The policies, with n_t
writes so far, slot shares w_t = softmax over slots, a gate β_t in (0, 1) and
u_t = β_t w_t; M_0 = 0:

  sequence_mean  slot 0 ← mean of s over the whole sequence      NOT CAUSAL
  prefix_mean    slot 0 ← mean of s_1 … s_t
  ring           slot (n_t - 1) mod N ← s_t
  gated          M_t[i] = (1 - u_t[i]) M_{t-1}[i] + u_t[i] s_t
  delta          M_t[i] = M_{t-1}[i] + u_t[i] (s_t - M_{t-1}ᵀ w_t)

`gated` is close to gated slot attention (arXiv 2409.07146), `delta` to the delta rule of
linear attention and its form by chunks (arXiv 2406.06484).

Every causal policy has two implementations that are equal: `recurrent`, one token
after another, and `chunkwise`, matrix products over chunks of tokens.
"""

import dataclasses
from collections.abc import Callable

import chex
import flax.struct
import jax
import jax.numpy as jnp

from latent_reasoning.config import ImmConfig
from latent_reasoning.errors import InputError

MAX_SHARE = 1 - 1e-4  # of a slot overwritten by one token: keeps log(1 - u) above -9.3


@flax.struct.dataclass
class MemoryBank:
  """What a sequence remembers.

  Attributes:
    slots: float32 [..., N, R].
    count: int32 [...], writes so far.
  """
  slots: chex.Array
  count: chex.Array


@flax.struct.dataclass
class MemoryWrites:
  """What the tokens of sequences write.

  Attributes:
    s: float32 [B, T, R].
    w: float32 [B, T, N], shares of the slots.
    beta: float32 [B, T], gate.
    valid: bool [B, T]; False writes nothing.
    start: bool [B, T]; True empties the bank before this token.
  """
  s: chex.Array
  w: chex.Array
  beta: chex.Array
  valid: chex.Array
  start: chex.Array

  @property
  def u(self) -> chex.Array:
    """[B, T, N], share of each slot that a token overwrites."""
    return jnp.minimum(self.beta[..., None] * self.w, MAX_SHARE) * self.valid[..., None]


def empty(batch: tuple[int, ...], slots: int, rank: int) -> MemoryBank:
  """Zeros: the bank at the start of every sequence."""
  return MemoryBank(jnp.zeros((*batch, slots, rank), jnp.float32), jnp.zeros(batch, jnp.int32))


def read(slots: chex.Array, q: chex.Array) -> tuple[chex.Array, chex.Array]:
  """Softmax over slots: [..., N, R], [..., R] -> r [..., R], a [..., N]."""
  a = jax.nn.softmax(jnp.einsum('...NR,...R->...N', slots, q), axis=-1)
  return jnp.einsum('...N,...NR->...R', a, slots), a


# --- one token ---------------------------------------------------------------


def _mean_write(bank: MemoryBank, s, w, beta):
  n = bank.count + 1
  mean = bank.slots[..., 0, :] + (s - bank.slots[..., 0, :]) / n[..., None]
  return MemoryBank(bank.slots.at[..., 0, :].set(mean), n)


def _ring_write(bank: MemoryBank, s, w, beta):
  here = jax.nn.one_hot(bank.count % bank.slots.shape[-2], bank.slots.shape[-2])[..., None]
  return MemoryBank(jnp.where(here > 0, s[..., None, :], bank.slots), bank.count + 1)


def _gated_write(bank: MemoryBank, s, w, beta):
  u = jnp.minimum(beta[..., None] * w, MAX_SHARE)[..., None]
  return MemoryBank((1 - u) * bank.slots + u * s[..., None, :], bank.count + 1)


def _delta_write(bank: MemoryBank, s, w, beta):
  u = jnp.minimum(beta[..., None] * w, MAX_SHARE)[..., None]
  held = jnp.einsum('...N,...NR->...R', w, bank.slots)
  return MemoryBank(bank.slots + u * (s - held)[..., None, :], bank.count + 1)


# --- a chunk of C tokens, as matrix products ----------------------------------


@dataclasses.dataclass(frozen=True)
class _Marks:
  """Segments inside a chunk."""
  carried: chex.Array  # float [B, C]: the bank from before the chunk still counts
  within: chex.Array  # bool [B, C, C]: key j is of t's segment and not after t
  number: chex.Array  # int [B, C]: writes in t's segment up to and with t

  @classmethod
  def of(cls, bank: MemoryBank, x: MemoryWrites) -> '_Marks':
    segment = jnp.cumsum(x.start, axis=1)
    within = (segment[:, :, None] == segment[:, None, :]) & jnp.tril(
        jnp.ones((x.s.shape[1],) * 2, bool))
    carried = segment == 0
    number = (jnp.einsum('BTS,BS->BT', within.astype(jnp.int32), x.valid.astype(jnp.int32))
              + jnp.where(carried, bank.count[:, None], 0))
    return cls(carried.astype(jnp.float32), within, number)


def _mean_chunk(bank: MemoryBank, x: MemoryWrites, q):
  marks, slots = _Marks.of(bank, x), bank.slots.shape[-2]
  n = jnp.maximum(marks.number, 1)[..., None].astype(jnp.float32)
  before = marks.carried * bank.count[:, None]
  total = (before[..., None] * bank.slots[:, None, 0]
           + (marks.within * x.valid[:, None]) @ x.s)
  mean = total / n
  # The other slots are zeros, with logits of 0: N is only a bias.
  logits = jnp.sum(mean * q, -1, keepdims=True)
  a = jax.nn.softmax(jnp.pad(logits, ((0, 0), (0, 0), (0, slots - 1))), axis=-1)
  last = bank.slots.at[:, 1:].mul(marks.carried[:, -1, None, None])
  return MemoryBank(last.at[:, 0].set(mean[:, -1]), marks.number[:, -1]), a[..., :1] * mean, a


def _ring_chunk(bank: MemoryBank, x: MemoryWrites, q):
  """Attention to a band: the last N writes, in the chunk or still in the bank."""
  marks, slots = _Marks.of(bank, x), bank.slots.shape[-2]
  number = marks.number
  # The write that each slot of the carried bank holds; empty ones count backwards from 0.
  held = bank.count[:, None] - (bank.count[:, None] - 1 - jnp.arange(slots)) % slots
  old = (marks.carried[..., None] > 0) & (number[..., None] - held[:, None] < slots)
  new = (marks.within & x.valid[:, None]
         & (number[:, :, None] - number[:, None, :] < slots))
  free = slots - old.sum(-1) - new.sum(-1)  # slots still zero after a restart
  logits = jnp.concatenate([
      jnp.where(old, jnp.einsum('BTR,BNR->BTN', q, bank.slots), -jnp.inf),
      jnp.where(new, jnp.einsum('BTR,BSR->BTS', q, x.s), -jnp.inf),
      jnp.log(free[..., None].astype(jnp.float32))], axis=-1)
  p = jax.nn.softmax(logits, axis=-1)
  p_old, p_new = p[..., :slots], p[..., slots:-1]
  r = jnp.einsum('BTN,BNR->BTR', p_old, bank.slots) + p_new @ x.s
  at = jax.nn.one_hot((number - 1) % slots, slots)  # the slot that a token wrote
  a = p_old + jnp.einsum('BTS,BSN->BTN', p_new, at)
  # Zero slots after a restart share what is left.
  zero = ~(old | (jnp.einsum('BTS,BSN->BTN', new.astype(jnp.float32), at) > 0))
  a = a + jnp.where(zero, p[..., -1:] / jnp.maximum(free, 1)[..., None], 0)
  newest = (new[:, -1, :, None] * at).transpose(0, 2, 1)  # [B, N, C]
  after = jnp.where(old[:, -1, :, None], bank.slots, newest @ x.s)
  return MemoryBank(after, number[:, -1]), r, a


def _gated_chunk(bank: MemoryBank, x: MemoryWrites, q):
  """Decay products in log space, centred at mid-chunk; exponents stay under 80 at C = 16.

  With G = cumsum log(1 - U), ρ = G at mid-chunk (no gradient) and ⊙ by element:

    a = softmax(exp(G-ρ) ⊙ (tril(Q Sᵀ) (exp(ρ-G) ⊙ U)) + exp(G) ⊙ (Q M_0ᵀ))
    r = (a ⊙ exp G) M_0 + tril((a ⊙ exp(G-ρ)) (exp(ρ-G) ⊙ U)ᵀ) S
    M_C = diag(exp G_C) M_0 + (exp(G_C-G) ⊙ U)ᵀ S
  """
  marks, u = _Marks.of(bank, x), x.u
  g = jnp.cumsum(jnp.log1p(-u), axis=1)  # [B, C, N]
  centre = jax.lax.stop_gradient(g[:, g.shape[1] // 2, None])
  rise, fall = jnp.exp(centre - g) * u, jnp.exp(g - centre)
  whole = jnp.exp(g) * marks.carried[..., None]
  scores = jnp.where(marks.within, q @ x.s.mT, 0)
  a = jax.nn.softmax(fall * (scores @ rise) + whole * (q @ bank.slots.mT), axis=-1)
  r = (a * whole) @ bank.slots + jnp.where(marks.within, (a * fall) @ rise.mT, 0) @ x.s
  left = jnp.exp(g[:, -1:] - g) * u * marks.within[:, -1, :, None]
  slots = whole[:, -1, :, None] * bank.slots + left.mT @ x.s
  return MemoryBank(slots, marks.number[:, -1]), r, a


def _delta_chunk(bank: MemoryBank, x: MemoryWrites, q):
  """The WY form: what each token really adds, by one triangular system a chunk.

    (I + tril(W Uᵀ, -1)) V = S - W M_0,  M_t = M_0 + Σ_{j ≤ t} u_j v_jᵀ
    a = softmax(Q M_0ᵀ + tril(Q Vᵀ) U),  r = a M_0 + tril(a Uᵀ) V
  """
  marks, u = _Marks.of(bank, x), x.u
  size = x.s.shape[1]
  carried = marks.carried[..., None]
  below = marks.within & ~jnp.eye(size, dtype=bool)
  system = jnp.eye(size) + jnp.where(below, x.w @ u.mT, 0)
  v = jax.scipy.linalg.solve_triangular(
      system, x.s - carried * (x.w @ bank.slots), lower=True, unit_diagonal=True)
  scores = jnp.where(marks.within, q @ v.mT, 0)
  a = jax.nn.softmax(carried * (q @ bank.slots.mT) + scores @ u, axis=-1)
  r = carried * (a @ bank.slots) + jnp.where(marks.within, a @ u.mT, 0) @ v
  left = u * marks.within[:, -1, :, None]
  slots = marks.carried[:, -1, None, None] * bank.slots + left.mT @ v
  return MemoryBank(slots, marks.number[:, -1]), r, a


@dataclasses.dataclass(frozen=True)
class Policy:
  """How a token writes.

  Attributes:
    write: (bank, s, w, beta) -> bank, one token.
    chunk: (bank, writes, q) -> (bank, r, a), C tokens; None: one token after another.
    gated: whether it uses w and beta; else w is 0 and beta 1.
    longest_chunk: tokens of a chunk beyond which float32 overflows; 0: any number.
  """
  write: Callable
  chunk: Callable | None = None
  gated: bool = False
  longest_chunk: int = 0


# By the names of config.imm.write_policy, which says which of them are not causal.
POLICIES = {
    'sequence_mean': Policy(_mean_write, _mean_chunk),
    'prefix_mean': Policy(_mean_write, _mean_chunk),
    'ring': Policy(_ring_write, _ring_chunk),
    'gated': Policy(_gated_write, _gated_chunk, gated=True, longest_chunk=16),
    'delta': Policy(_delta_write, _delta_chunk, gated=True),
}


def check(imm: ImmConfig) -> None:
  """Raises InputError for a chunk that is longer than the policy's arithmetic allows."""
  most = POLICIES[imm.write_policy].longest_chunk if imm.write_policy else 0
  if most and imm.implementation == 'chunkwise' and imm.chunk > most:
    raise InputError(f'config.imm.chunk is {imm.chunk}; expected at most {most} for '
                     f'{imm.write_policy}')


# --- whole sequences ----------------------------------------------------------


def store(policy: Policy, bank: MemoryBank, s, w, beta, valid) -> MemoryBank:
  """One token writes, where `valid`.

  Args:
    bank: [..., N, R]. s: [..., R]. w: [..., N]. beta, valid: [...].
  """
  written = policy.write(bank, s, w, beta)
  return jax.tree.map(
      lambda new, old: jnp.where(valid.reshape(valid.shape + (1,) * (new.ndim - valid.ndim)),
                                 new, old), written, bank)


def recurrent(policy: Policy, bank: MemoryBank, x: MemoryWrites, q: chex.Array,
              until: chex.Array | None = None, size: int = 0, watch: bool = False):
  """One token after another: the reference of `chunkwise`. Same arguments and result."""
  del size
  def body(bank, token):
    (s, w, beta, valid, start), q = token
    bank = jax.tree.map(
        lambda a: jnp.where(start.reshape(-1, *(1,) * (a.ndim - 1)), 0, a), bank)
    bank = store(policy, bank, s, w, beta, valid)
    r, a = read(bank.slots, q)
    return bank, (r, a if watch else None, bank if until is not None else None)

  time_first = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0),
                            ((x.s, x.w, x.beta, x.valid, x.start), q))
  last, (r, a, banks) = jax.lax.scan(body, bank, time_first)
  forks = last
  if until is not None:
    rows = jnp.arange(q.shape[0])[:, None]
    forks = jax.tree.map(lambda a: a[until - 1, rows], banks)
  return jnp.moveaxis(r, 0, 1), forks, (jnp.moveaxis(a, 0, 1) if watch else None)


def chunkwise(policy: Policy, bank: MemoryBank, x: MemoryWrites, q: chex.Array,
              until: chex.Array | None = None, size: int = 16, watch: bool = False):
  """The same by chunks of `size` tokens.

  Only the banks between chunks are kept for the backward pass.

  Args:
    policy: one that is causal.
    bank: to begin with, [B, N, R].
    x: writes of T tokens.
    q: float32 [B, T, R], scaled.
    until: int32 [B, K] >= 1, or None.
    watch: return what was attended to.

  Returns:
    r [B, T, R]; the bank after all tokens, or with `until`, after that many:
    [B, K, N, R]; and a [B, T, N] where watched.
  """
  if policy.chunk is None:
    return recurrent(policy, bank, x, q, until, size, watch)
  batch, length = q.shape[:2]
  size = min(size, length)
  pieces = -(-length // size)

  def cut(a):  # [B, T, ...] -> [pieces, B, size, ...]; zeros are not valid
    a = jnp.pad(a, ((0, 0), (0, pieces * size - length), *((0, 0),) * (a.ndim - 2)))
    return jnp.moveaxis(a.reshape(batch, pieces, size, *a.shape[2:]), 1, 0)

  @jax.checkpoint
  def body(bank, piece):
    after, r, a = policy.chunk(bank, *piece)
    return after, (r, a if watch else None, bank if until is not None else None)

  cut_x, cut_q = jax.tree.map(cut, (x, q))
  # Unrolled, or a CPU spends a quarter of the forward pass on the loop itself.
  last, (r, a, banks) = jax.lax.scan(body, bank, (cut_x, cut_q), unroll=4)
  r, a = jax.tree.map(
      lambda y: jnp.moveaxis(y, 0, 1).reshape(batch, pieces * size, -1)[:, :length], (r, a))
  if until is None:
    return r, last, a
  # From the bank before the chunk that holds the token, on to that token.
  piece, rows = (until - 1) // size, jnp.arange(batch)[:, None]
  own = jax.tree.map(lambda a: a[piece, rows].reshape(-1, *a.shape[2:]), (banks, cut_x))
  so_far = jnp.arange(size) < (until - piece * size).reshape(-1, 1)
  before, part = own
  part = part.replace(valid=part.valid & so_far, start=part.start & so_far)
  forks, _, _ = policy.chunk(before, part, jnp.zeros_like(part.s))
  return r, jax.tree.map(lambda f: f.reshape(*until.shape, *f.shape[1:]), forks), a


def whole_mean(bank: MemoryBank, x: MemoryWrites, q: chex.Array) -> chex.Array:
  """`sequence_mean`: every token reads the mean over its whole segment, future included."""
  segment = jnp.cumsum(x.start, axis=1)
  together = (segment[:, :, None] == segment[:, None, :]) & x.valid[:, None]
  mean = together @ x.s / jnp.maximum(together.sum(-1, keepdims=True), 1)
  logits = jnp.sum(mean * q, -1, keepdims=True)
  slots = bank.slots.shape[-2]
  a = jax.nn.softmax(jnp.pad(logits, ((0, 0), (0, 0), (0, slots - 1))), axis=-1)
  return a[..., :1] * mean, a


IMPLEMENTATIONS = {'chunkwise': chunkwise, 'recurrent': recurrent}
