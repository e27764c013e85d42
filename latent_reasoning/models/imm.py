r"""The Implicit Memory Module (arXiv 2502.21030): a bank of slots inside a layer.

  s_t = f_write(h_t)                       q_t = f_query(h_t)
  M_t = write(M_{t-1}, s_t)                M_0 = 0, [N, R]   (models.memory_policies)
  a_t = softmax(M_t q_t / sqrt(D))         r_t = Σ_i a_t[i] M_t[i]
  h_t ← LayerNorm(h_t + g(r_t))

Maps are linear, so with f_write = W_up W_down of rank R the bank holds the R-wide
W_down h alone: the query becomes W_upᵀ q and the read-out g(W_up r), exactly.
"""

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from latent_reasoning.config import NOT_CAUSAL, ImmConfig
from latent_reasoning.models.masks import Mask
from latent_reasoning.models.memory_policies import (
  IMPLEMENTATIONS,
  POLICIES,
  MemoryBank,
  MemoryWrites,
  empty,
  read,
  store,
  whole_mean,
)


@flax.struct.dataclass
class MemoryReads:
  """What the prefix of a sequence, P tokens, read of the memory.

  Attributes:
    retrieved: r, float32 [B, P, R].
    beta: the gate with which each token wrote, [B, P].
    attention: shares of the slots, [B, P, N]; None where nobody inspects.
  """
  retrieved: chex.Array
  beta: chex.Array | None
  attention: chex.Array | None


class Matrix(nn.Module):
  """A parameter [D, F] named as in a dense layer."""
  shape: tuple[int, int]
  scale: float = 1.0

  @nn.compact
  def __call__(self) -> chex.Array:
    return self.param('kernel', nn.initializers.normal(self.scale * self.shape[0]**-0.5),
                      self.shape, jnp.float32)


class Gate(nn.Module):
  """Parameters of a gate, a kernel [D, 1] and a bias [1]."""
  width: int
  bias: float  # initial

  @nn.compact
  def __call__(self) -> tuple[chex.Array, chex.Array]:
    return (self.param('kernel', nn.initializers.lecun_normal(), (self.width, 1), jnp.float32),
            self.param('bias', nn.initializers.constant(self.bias), (1,), jnp.float32))


class Memory(nn.Module):
  """Writes to a bank, reads from it and integrates what it read.

  Attributes:
    config: policy, sizes and switches.
    width: D.
    dtype: of the dense maps; the bank is float32.
    bias: in the norm.
    writer: whether this layer writes; else it reads what another one wrote.
    inspect: whether reads have their attention over slots.
  """
  config: ImmConfig
  width: int
  dtype: jnp.dtype
  bias: bool
  writer: bool = True
  inspect: bool = False

  def setup(self):
    c, d = self.config, self.width
    rank, out = c.linformer_rank or d, c.out_scale
    low = c.linformer_rank > 0
    if self.writer:
      self.write = Matrix((d, rank))
      if POLICIES[c.write_policy].gated:
        self.address = Matrix((d, slots_of(c, d)))
        self.gate = Gate(d, c.gate_bias)
    self.write_up = Matrix((rank, d)) if low else None
    self.query = Matrix((d, rank))
    self.query_up = Matrix((rank, d)) if low else None
    self.out = Matrix((d, rank), 1.0) if low else Matrix((d, d), out)
    self.out_up = Matrix((rank, d), out) if low else None
    self.norm = None if 'norm' in c.ablate else nn.LayerNorm(use_bias=self.bias,
                                                             dtype=self.dtype)

  def project(self, h: chex.Array, positions: chex.Array,
              up: chex.Array | None) -> tuple[MemoryWrites | None, chex.Array]:
    """What each token of [B, T, D] writes, and its query in the bank's own space, scaled.

    One matrix product over all maps: reading h once is what counts.
    """
    c, shape = self.config, h.shape[:-1]
    query = self.query()
    if up is not None:  # W_upᵀ f_query(h), by the product of the maps
      query = query @ (self.query_up() @ up.T)
    kernels, gated = [query], self.writer and POLICIES[c.write_policy].gated
    if self.writer:
      kernels.append(self.write())
    if gated:
      gate, bias = self.gate()
      kernels += [self.address(), gate]
    ends = np.cumsum([k.shape[1] for k in kernels])
    q, *rest = jnp.split(self._apply(h, jnp.concatenate(kernels, axis=1)), ends[:-1], axis=-1)
    q = jnp.zeros_like(q) if 'query' in c.ablate else q * self.width**-0.5
    if not self.writer:
      return None, q
    if gated:
      w, beta = jax.nn.softmax(rest[1], axis=-1), jax.nn.sigmoid(rest[2][..., 0] + bias)
    else:
      w, beta = jnp.zeros((*shape, slots_of(c, self.width)), jnp.float32), jnp.ones(shape)
    valid = (positions + 1) % c.write_interval == 0
    if 'write' in c.ablate:
      valid = jnp.zeros_like(valid)
    return MemoryWrites(rest[0], w, beta, valid, jnp.zeros(shape, bool)), q

  def _apply(self, x: chex.Array, kernel: chex.Array) -> chex.Array:
    """x W over flattened leading dimensions, out in float32."""
    y = x.reshape(-1, x.shape[-1]).astype(self.dtype) @ kernel.astype(self.dtype)
    return y.reshape(*x.shape[:-1], -1).astype(jnp.float32)

  def __call__(self, h: chex.Array, positions: chex.Array, mask: Mask,
               banks: tuple[MemoryBank, ...] | None, decoding: bool,
               shared: tuple | None = None):
    """Writes, reads and integrates, `rounds` times.

    Args:
      h: [B, T, D], a row, or one token of each of K readouts while decoding.
      positions: int32 [B, T].
      mask: of the T positions.
      banks: one a round: to begin with [B, N, R] (None: empty); while decoding
        the readouts' own [B, K, N, R].
      decoding: whether T are K readouts.
      shared: where another layer writes, what it returned last.

    Returns:
      h; the banks: forks [B, K, N, R] that readouts begin with, and after the row
      where there are none; the reads of each round, None while decoding; and what layers
      that share the bank need.
    """
    c, kept, reads, writes = self.config, [], [], []
    for i in range(c.rounds):
      if not self.writer:
        x, up, written = shared[i]
        _, q = self.project(h, positions, up)
      else:
        up = self.write_up() if c.linformer_rank else None
        x, q = self.project(h, positions, up)
      if decoding:
        bank = (store(POLICIES[c.write_policy], banks[i], x.s, x.w, x.beta, x.valid)
                if self.writer else written)
        r, _ = read(bank.slots, q)
      else:
        bank, r, found = self._row(x, q, mask, banks[i] if banks else None)
        reads.append(found)
      kept.append(bank)
      writes.append((x, up, bank))
      h = self._integrate(h, jnp.zeros_like(r) if 'read' in c.ablate else r, up)
    return h, tuple(kept), None if decoding else tuple(reads), tuple(writes)

  def _integrate(self, h: chex.Array, r: chex.Array, up: chex.Array | None) -> chex.Array:
    """LayerNorm(h + g(W_up r))."""
    out = self.out() if up is None else (up @ self.out()) @ self.out_up()
    g = self._apply(r, out)
    h = h + g.astype(h.dtype)
    return h if self.norm is None else self.norm(h)

  def _row(self, x: MemoryWrites, q: chex.Array, mask: Mask, bank: MemoryBank | None):
    """A prefix, and readouts that each go on from a copy of the bank at their anchor."""
    c, p, count = self.config, mask.prefix, mask.count
    policy, batch = POLICIES[c.write_policy], q.shape[0]
    if bank is None:
      bank = empty((batch,), slots_of(c, self.width), q.shape[-1])
    if c.write_policy in NOT_CAUSAL:
      r, a = whole_mean(bank, x, q)
      return bank, r, MemoryReads(r, x.beta, a)
    run = IMPLEMENTATIONS[c.implementation]
    until = mask.until if mask.until.shape[1] else None
    own, own_q = jax.tree.map(lambda y: y[:, :p], (x, q))
    r, forks, a = run(policy, bank, own, own_q, until, size=c.chunk, watch=self.inspect)
    reads = MemoryReads(r, own.beta, a)
    if not count:
      return forks, r, reads
    own, own_q = jax.tree.map(
        lambda y: y[:, p:].reshape(batch * count, -1, *y.shape[2:]), (x, q))
    start = jax.tree.map(lambda y: y.reshape(batch * count, *y.shape[2:]), forks)
    r_own, _, _ = run(policy, start, own, own_q, size=c.chunk)
    return forks, jnp.concatenate([r, r_own.reshape(batch, -1, r.shape[-1])], axis=1), reads


def slots_of(config: ImmConfig, width: int) -> int:
  """N: round(sqrt(D)) unless given."""
  return config.slots or round(width**0.5)


def reads_of(layers) -> list[MemoryReads]:
  """The reads of each layer with memory and each round, in order (transformer.LayerOutput)."""
  if isinstance(layers.hidden, tuple):
    return [one for rounds in layers.reads if rounds for one in rounds]
  return [jax.tree.map(lambda a: a[i], one)  # noqa: B023
          for i in range(len(layers.hidden)) for one in layers.reads or ()]


def attention(model, params, batch) -> chex.Array:
  """Which slots the tokens of prefixes read: [layers and rounds, B, P, N]."""
  return jnp.stack([one.attention for one in _inspected(model, params, batch)])


def _inspected(model, params, batch) -> list[MemoryReads]:
  return reads_of(model.apply({'params': params}, batch.tokens, batch.positions, batch.mask,
                              inspect=True).layers)


def usage(model, params, batch) -> dict[str, chex.Array]:
  """What a batch's prefixes did with the memory: the paper's failure signatures.

  Returns:
    float32 scalars, means over tokens, layers and rounds: 'read_entropy' as a share of
    log N (1: reads are uniform), 'top_slot', the share of the most read slot, and
    'write_gate'. Empty without memory.
  """
  reads = _inspected(model, params, batch)
  if not reads:
    return {}
  a = jnp.stack([one.attention for one in reads])  # [..., B, T, N]
  slots = a.shape[-1]
  entropy = -jnp.sum(a * jnp.log(jnp.maximum(a, 1e-30)), axis=-1).mean()
  return {'read_entropy': entropy / jnp.log(max(slots, 2)),
          'top_slot': a.mean((-3, -2)).max(-1).mean(),
          'write_gate': jnp.stack([one.beta for one in reads]).mean()}


def warnings(found: dict[str, float], slots: int) -> list[str]:
  """The failure signatures in words, of `usage` and the gradient's norm."""
  said = []
  if slots > 1 and found['read_entropy'] > 0.999:
    said.append('the memory reads all slots alike (entropy of log N): it cannot choose')
  if slots > 1 and found['top_slot'] > 0.99:
    said.append('one slot of the memory takes nearly all reads')
  if found.get('memory_grad_norm', 1.0) < 1e-7:
    said.append('almost no gradient reaches the memory')
  return said
