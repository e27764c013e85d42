"""A pre-norm decoder with an optional KV cache; config.model chooses its parts.

x + attention(norm(x)), then x + mlp(norm(x)), a final norm and a head. The defaults are
GPT-2 (Radford et al. 2019): layer norm, one fused map to queries, keys and values, GELU,
learned positions. A Llama (Touvron et al. 2023) has root-mean-square norms, SwiGLU
(Shazeer 2020), rotary positions and fewer heads for keys and values (Ainslie et al. 2023).
A family of pretrained models is such a choice (hf). What layers do not have in common is in
layers.own.

Layers may be passed several times (config.model.loop): s_0 = e, s_l = f(mix(e, s_(l-1))), with
f those layers and e what the first of them was given. Of 'add' and 'concat' the first loop
reads e alone.

Dropout is on embeddings and on what each branch adds, not on attention weights, so
that shared-prefix and dense attention stay equal while training.
"""

import dataclasses
import functools
from typing import Any

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from latent_reasoning.config import Config, ImmConfig, ModelConfig
from latent_reasoning.errors import ensure
from latent_reasoning.models import attention
from latent_reasoning.models import imm as memory_lib
from latent_reasoning.models.attention import Cache
from latent_reasoning.models.layers import (
  ATTENDED,
  DENSE,
  LOW_RANK,
  Dense,
  LatentProjection,
  Own,
  RMSNorm,
  by_batch,
  norm,
  rotary,
)
from latent_reasoning.models.layers import own as own_of
from latent_reasoning.models.masks import Mask

EMBEDDING_STD = 0.02
REMAT = {  # what the backward pass is given of a layer, beside its input
    'dots': jax.checkpoint_policies.save_only_these_names(DENSE, LOW_RANK, ATTENDED),
    'full': jax.checkpoint_policies.nothing_saveable}
ACTIVATIONS = {'gelu': functools.partial(nn.gelu, approximate=False), 'gelu_tanh': nn.gelu,
               'relu': nn.relu, 'silu': nn.silu}
MANY = 8  # rows from which, on a CPU, the table times them beats them times its transpose


@flax.struct.dataclass
class LayerOutput:
  """What a layer computes.

  Attributes:
    hidden: the residual stream behind it, [B, T, D].
    queries: [B, T, N, H], with their positions.
    keys, values: [B, T, M, H]; with a cache as it has them, [B, K, M, R, H].
    banks: of the memory, one a round, at each readout's anchor, or at the sequence's end
      where there is no readout. None without memory.
    reads: what the prefix read of the memory, imm.MemoryReads, one a round. None without.

  Of a whole model each is a tuple over layers, as often as they are passed, or an array with
  a leading layer axis where the layers are scanned. What nobody uses is dropped by jit.
  """
  hidden: Any
  queries: Any
  keys: Any
  values: Any
  banks: Any = None
  reads: Any = None


@flax.struct.dataclass
class Output:
  """What the model returns: final hidden states [B, T, D], normed, and those of its layers."""
  hidden: chex.Array
  layers: LayerOutput


class Block(nn.Module):
  """One layer. Returns its output, and what later layers need of a shared memory.

  Attributes:
    imm: the implicit memory; None in a layer without.
    writer: whether the layer writes to the memory; else it reads what another one wrote.
    inspect: whether the memory returns what it attended to.
  """
  config: ModelConfig
  imm: ImmConfig | None
  dropout: float
  deterministic: bool
  writer: bool = True
  inspect: bool = False

  @nn.compact
  def __call__(self, x_BTD: chex.Array, positions: chex.Array, mask: Mask,
               cache: Cache | None, step: chex.Array | None, banks=None, shared=None,
               own: Own = Own()):  # noqa: B008 it is frozen
    c, dtype, imm = self.config, jnp.dtype(self.config.dtype), self.imm
    reads = None
    if cache is not None:
      banks = cache.banks
    if imm:
      memory = memory_lib.Memory(imm, c.embed_dim, dtype, c.bias, self.writer, self.inspect,
                                 name='memory')
      if imm.place == 'before':
        x_BTD, banks, reads, shared = memory(x_BTD, positions, mask, banks, cache is not None,
                                             shared)
    drop = nn.Dropout(self.dropout, deterministic=self.deterministic)
    out_scale = (2 * c.num_layers)**-0.5  # keeps the residual stream's variance
    x_read = x_BTD  # [B, T, D], what the MLP reads too where both are parallel
    q, k, v = self._qkv(self._norm('before', 'norm_1', x_BTD))  # [B, T, N, H]; k, v fewer heads
    if c.position_embedding == 'rotary':
      q, k = (rotary(a, positions, c.rope, own.turns) for a in (q, k))
    if c.attention_scale:  # attention divides by sqrt(H)
      q = (q * (c.attention_scale * q.shape[-1]**0.5)).astype(dtype)
    seen, capped = mask.replace(window=own.window), {'cap': c.attention_cap} if (
        c.attention_cap) else {}
    if cache is None:
      y = attention.IMPLEMENTATIONS[c.attention](q, k, v, seen, **capped)
    else:
      y, (k, v) = attention.cached(q, k, v, seen, cache, step, **capped)
    y = checkpoint_name(y, ATTENDED)
    y = self._dense(c.embed_dim, c.bias or c.out_bias, 'out', out_scale)(
        y.reshape(*x_BTD.shape[:2], -1))
    x_BTD = x_BTD + drop(self._norm('after', 'post_norm_1', y))

    y = self._norm('before', 'norm_2', x_read if c.parallel else x_BTD)
    y = self._dense(c.embed_dim, c.bias or c.mlp_bias, 'down', out_scale)(self._mlp(y))
    x_BTD = x_BTD + drop(self._norm('after', 'post_norm_2', y))
    if imm and imm.place == 'after':
      x_BTD, banks, reads, shared = memory(x_BTD, positions, mask, banks, cache is not None,
                                           shared)
    x_BTD = by_batch(x_BTD)
    return LayerOutput(x_BTD, q, k, v, banks if imm else None, reads), shared

  def _dense(self, features: int, bias: bool, name: str, scale: float = 1.0) -> Dense:
    return Dense(features, bias, jnp.dtype(self.config.dtype), scale, self.config.lora,
                 self.deterministic, name=name)

  def _norm(self, place: str, name: str, y: chex.Array) -> chex.Array:
    """The norm at a place; nothing where the model has none there."""
    return norm(self.config, name=name)(y) if self.config.norm_place in (place, 'both') else y

  def _mlp(self, y: chex.Array) -> chex.Array:
    """The hidden layer of the MLP, [B, T, F]."""
    c, bias = self.config, self.config.bias or self.config.mlp_bias
    act = ACTIVATIONS[c.nonlinearity]
    if c.fused_mlp:
      gate, up = jnp.split(self._dense(2 * c.mlp_dim, bias, 'gate_up')(y), 2, axis=-1)
      return act(gate) * up
    up = self._dense(c.mlp_dim, bias, 'up')(y)
    return act(self._dense(c.mlp_dim, bias, 'gate')(y)) * up if c.mlp == 'swiglu' else act(up)

  def _qkv(self, y: chex.Array) -> tuple[chex.Array, chex.Array, chex.Array]:
    """Queries, keys and values by heads, before positions."""
    c, dtype = self.config, jnp.dtype(self.config.dtype)
    size, few = c.head_dim or c.embed_dim // c.num_heads, c.num_kv_heads or c.num_heads

    def heads(a, count):
      return a.reshape(*a.shape[:2], count, size)
    bias = c.bias or c.qkv_bias
    counts = (c.num_heads, few, few)
    if c.fused_qkv:
      qkv = self._dense(sum(counts) * size, bias, 'qkv')(y)
      ends = [c.num_heads * size, (c.num_heads + few) * size]
      return tuple(map(heads, jnp.split(qkv, ends, axis=-1), counts))
    q, k, v = (self._dense(count * size, bias, name)(y)
               for name, count in zip('qkv', counts, strict=True))
    together = c.qk_norm_over == 'heads'
    if not together:
      q, k = heads(q, c.num_heads), heads(k, few)
    if c.qk_norm:
      q, k = (RMSNorm(c.norm_epsilon, dtype, c.norm == 'rms_zero_centered', name=name)(a)
              for name, a in (('q_norm', q), ('k_norm', k)))
    if together:
      q, k = heads(q, c.num_heads), heads(k, few)
    return q, k, heads(v, few)


class Transformer(nn.Module):
  """Tokens in, hidden states out; `head` turns hidden states into logits.

  Attributes:
    config: sizes and switches.
    vocab: V, padded.
    dropout: rate while not deterministic.
    imm: the implicit memory; None, or without a policy: none.
    pretrained_vocab: rows of the vocabulary from here on are parameters of their own, so
      that they can be trained alone; 0: one table.
    projection: whether latents go through an MLP of their own (`latent_input`).
    num_tokens: entries of the vocabulary that a token has; those behind it fill it up to a
      size that a mesh divides, are never predicted and get no gradient. 0: all.
  """
  config: ModelConfig
  vocab: int
  dropout: float = 0.0
  imm: ImmConfig | None = None
  pretrained_vocab: int = 0
  projection: bool = False
  num_tokens: int = 0

  @property
  def needs_rng(self) -> bool:
    """Whether training draws random numbers."""
    lora = self.config.lora
    return self.dropout > 0 or (lora.rank > 0 and lora.dropout > 0)

  def setup(self):
    c = self.config
    attention.require(c)
    normal = nn.initializers.normal(EMBEDDING_STD)
    known = self.pretrained_vocab or self.vocab
    new = self.vocab - known
    self.embedding = self.param('embedding', normal, (known, c.embed_dim), jnp.float32)
    if new:
      self.new_embedding = self.param('new_embedding', normal, (new, c.embed_dim), jnp.float32)
    if c.position_embedding == 'learned':
      self.position_embedding = self.param(
          'position_embedding', normal, (c.max_positions, c.embed_dim), jnp.float32)
    if not c.tie_embeddings:
      self.head_kernel = self.param('head', normal, (c.embed_dim, known), jnp.float32)
      if new:
        self.new_head = self.param('new_head', normal, (c.embed_dim, new), jnp.float32)
    self.norm = norm(c)
    if c.loop.count > 1 and c.loop.mix == 'concat':
      self.loop = self.param('loop', lambda _, shape: jnp.eye(*shape, -shape[1]),
                             (2 * c.embed_dim, c.embed_dim))
    if self.projection:
      self.thought = LatentProjection(c.embed_dim, jnp.dtype(c.dtype))

  def latent_input(self, hidden: chex.Array) -> chex.Array:
    """The input after a hidden state [..., D] that no token is made of."""
    return self.thought(hidden) if self.projection else hidden

  def embed(self, tokens: chex.Array) -> chex.Array:
    """Token embeddings, without positions: [B, T] -> [B, T, D]."""
    dtype = jnp.dtype(self.config.dtype)
    if self.config.scale_embeddings:
      scale = jnp.asarray(self.config.embed_dim**0.5, dtype)
      return scale * self._rows(tokens, dtype)
    return self._rows(tokens, dtype)

  def _rows(self, tokens: chex.Array, dtype: jnp.dtype) -> chex.Array:
    """Rows of the tables."""
    if not self.pretrained_vocab:
      return self.embedding[tokens].astype(dtype)
    old = self.embedding[jnp.minimum(tokens, self.pretrained_vocab - 1)].astype(dtype)
    new = self.new_embedding[jnp.maximum(tokens - self.pretrained_vocab, 0)].astype(dtype)
    return jnp.where(tokens[..., None] < self.pretrained_vocab, old, new)

  def inputs(self, tokens: chex.Array, positions: chex.Array) -> chex.Array:
    """What the first layer reads, but for dropout: [B, T] -> [B, T, D]."""
    return self._with_positions(self.embed(tokens), positions)

  def _with_positions(self, x: chex.Array, positions: chex.Array) -> chex.Array:
    if self.config.position_embedding != 'learned':
      return x
    return x + self.position_embedding[positions].astype(x.dtype)

  @nn.compact
  def __call__(self, tokens: chex.Array, positions: chex.Array, mask: Mask,
               cache: Cache | None = None, step: chex.Array | None = None, *,
               embeddings: chex.Array | None = None, banks=None,
               deterministic: bool = True, inspect: bool = False) -> Output:
    """Runs the layers over rows, or over some tokens of each readout from a cache.

    Args:
      tokens, positions: int32 [B, T].
      mask: of these T positions.
      cache: keys, values and banks with a leading layer axis, to decode from; T is
        then K·R, the next R tokens of each of its K readouts (R is 1 with memory).
      step: tokens each readout has decoded before; only with a cache.
      embeddings: [B, T, D] in place of the tokens' embeddings.
      banks: of all layers, to begin a row with; None: empty.
      deterministic: no dropout.
      inspect: what is read of a memory has its attention over slots (imm.MemoryReads).
    """
    c = self.config
    chex.assert_equal_shape([tokens, positions, mask.segment])
    x = self.embed(tokens) if embeddings is None else embeddings
    if self.is_initializing():
      self.latent_input(x)  # its parameters are made here
    x = self._with_positions(x, positions)
    x = by_batch(nn.Dropout(self.dropout, deterministic=deterministic)(x))
    block = Block if c.remat == 'none' else nn.remat(
        Block, prevent_cse=not c.scan, policy=REMAT[c.remat])
    imm = self.imm if self.imm and self.imm.write_policy else None
    args, e, constants = (self.dropout, deterministic), None, own_of(c)
    if constants.window is not None:
      mask = mask.replace(positions=positions, key_positions=(
          positions if cache is None else mask.key_positions))
    if c.scan:
      def body(block, x, cache, banks, constants):
        out, _ = block(x, positions, mask, cache, step, banks, None, constants)
        return out.hidden, out
      scanned = nn.scan(body, variable_axes={'params': 0},
                        split_rngs={'params': True, 'dropout': True}, length=c.num_layers)
      blocks, found = block(c, imm, *args, inspect=inspect, name='blocks'), []
      for start in range(0, c.depth, c.num_layers):
        e, x = (x, x) if e is None else (e, self.again(x, e))
        own = cache if c.depth == c.num_layers else jax.tree.map(
            lambda a, start=start: a[start:start + c.num_layers], cache)
        x, layers = scanned(blocks, x, own, banks, constants)
        found.append(layers)
      if len(found) > 1:
        layers = jax.tree.map(lambda *a: jnp.concatenate(a), *found)
    else:
      layers, shared, with_memory = [], None, imm and (imm.layers or range(c.num_layers))
      blocks = {}
      for place, i in enumerate(c.order):
        if i == (c.loop.layers or (0,))[0]:
          e, x = (x, x) if e is None else (e, self.again(x, e))
        own = imm if imm and i in with_memory else None
        writer = not (imm and imm.shared) or shared is None
        if i not in blocks:
          blocks[i] = block(c, own, *args, writer, inspect, name=f'block_{i}')
        out, writes = blocks[i](x, positions, mask, cache and cache.layer(place), step,
                                banks and banks[i], shared, constants.layer(i))
        shared = writes if imm and imm.shared else None
        x = out.hidden
        layers.append(out)
      layers = LayerOutput(**{field.name: tuple(getattr(one, field.name) for one in layers)
                              for field in dataclasses.fields(LayerOutput)})
    return Output(self.norm(x), layers)

  def again(self, s: chex.Array, e: chex.Array) -> chex.Array:
    """What a loop reads: of the state [B, T, D] that the last one left, and its input."""
    loop = self.config.loop
    if loop.norm == 'final':
      s = self.norm(s)
    elif loop.norm == 'rms':
      square = jnp.mean(s.astype(jnp.float32)**2, axis=-1, keepdims=True)
      s = (s * jax.lax.rsqrt(square + self.config.norm_epsilon)).astype(s.dtype)
    if loop.mix == 'add':
      return e + s
    if loop.mix == 'replace':
      return s
    both = jnp.concatenate([s, e], axis=-1)
    return both @ self.loop.astype(both.dtype)

  def kernels(self) -> list[chex.Array]:
    """The head by parts [D, n]: of known tokens, and of new ones."""
    if self.config.tie_embeddings:
      return [self.embedding.T] + ([self.new_embedding.T] if self.pretrained_vocab else [])
    return [self.head_kernel] + ([self.new_head] if self.pretrained_vocab else [])

  def head(self, hidden: chex.Array, kernel_DV: chex.Array | None = None) -> chex.Array:
    """Logits in float32: [..., D] -> [..., V].

    Args:
      kernel_DV: a transposed copy of the tied table; on a CPU, the transpose of
        a large table inside the decoding loop costs more than the layers.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    tied = self.config.tie_embeddings and not self.pretrained_vocab
    if kernel_DV is not None and tied and len(flat) >= MANY:
      logits = jnp.matmul(self.embedding.astype(flat.dtype), flat.T,
                          preferred_element_type=jnp.float32).T
      return self._of_tokens(logits, hidden.shape[:-1])
    kernels = self.kernels() if kernel_DV is None else [kernel_DV]
    parts = [jnp.matmul(flat, kernel.astype(flat.dtype), preferred_element_type=jnp.float32)
             for kernel in kernels]
    logits = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
    return self._of_tokens(logits, hidden.shape[:-1])

  def _of_tokens(self, logits: chex.Array, shape: tuple[int, ...]) -> chex.Array:
    """Logits in the shape of their hidden states, where no token is at no probability."""
    if cap := self.config.logit_cap:
      logits = cap * jnp.tanh(logits / cap)
    if self.num_tokens and self.num_tokens < self.vocab:
      logits = jnp.where(jnp.arange(self.vocab) < self.num_tokens, logits, attention.NEGATIVE)
    return logits.reshape(*shape, self.vocab)


def check(config: Config) -> None:
  """Raises InputError where loops over layers are asked for that cannot be."""
  c, loop, asked = config.model, config.model.loop, config.eval.loops
  if max(loop.count, asked) == 1 or not asked and loop.count == 1:
    return
  own = loop.layers or (0, 0)
  ensure(len(own) == 2 and 0 <= own[0] <= own[1] < c.num_layers,
         f'config.model.loop.layers is {loop.layers}; expected (first, last) of '
         f'layers 0 to {c.num_layers - 1}, or ()')
  ensure(not (c.scan and loop.layers), 'config.model.scan stacks all layers, and '
         f'config.model.loop.layers {loop.layers} repeats some; expected one of them off')
  ensure(not config.imm.write_policy, 'an implicit memory (config.imm.write_policy '
         f"'{config.imm.write_policy}') has one bank a layer, and config.model.loop passes "
         "layers several times; expected ''")
  ensure(loop.mix != 'concat' or loop.count > 1 or asked <= 1, 'config.eval.loops is '
         f"{asked}, but the model was made with config.model.loop.count 1 and has no 'concat' "
         "map; expected config.model.loop.mix 'replace' or 'add'")


def parameter_count(config: ModelConfig, vocab: int) -> int:
  """About how many parameters a model has, without making any: norms and biases left out."""
  c = config
  size, few = c.head_dim or c.embed_dim // c.num_heads, c.num_kv_heads or c.num_heads
  attended = c.embed_dim * size * (2 * c.num_heads + 2 * few)
  mlp = (3 if c.mlp == 'swiglu' else 2) * c.embed_dim * c.mlp_dim
  tables = vocab * (1 if c.tie_embeddings
                    else 2) + (c.position_embedding == 'learned') * c.max_positions
  return c.num_layers * (attended + mlp) + tables * c.embed_dim


def stack_layers(params: dict, layers: int) -> dict:
  """Parameters of an unscanned model as those of a scanned one."""
  rest = {k: v for k, v in params.items() if not k.startswith('block_')}
  blocks = [params[f'block_{i}'] for i in range(layers)]
  return {**rest, 'blocks': jax.tree.map(lambda *a: jnp.stack(a), *blocks)}
