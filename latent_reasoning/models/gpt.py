"""A decoder: pre-norm, learned or rotary positions, optional KV cache. Two families.

x + attention(norm(x)), then x + mlp(norm(x)), a final norm and a head. The family
'gpt' is GPT-2 (Radford et al. 2019): layer norm, one fused map to queries, keys and
values, GELU. The family 'llama' (Touvron et al. 2023) is Llama, Mistral, SmolLM2 and
Qwen: root-mean-square norm, fewer heads for keys and values (Ainslie et al. 2023),
SwiGLU (Shazeer 2020), optional biases and norms of queries and keys.

Dropout is on embeddings and on what each branch adds, not on attention weights, so
that split and packed attention stay equal while training.
"""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_reasoning.config import ImmConfig, ModelConfig
from latent_reasoning.masks import Mask
from latent_reasoning.models import attention
from latent_reasoning.models import memory as memory_lib
from latent_reasoning.models.attention import Cache
from latent_reasoning.models.layers import Dense, RMSNorm, norm, rotary

EMBEDDING_STD = 0.02


class Block(nn.Module):
  """One layer.

  Returns x; its (k, v, banks), or with a cache (own_k, own_v, banks); and what later
  layers need of a shared memory. `imm` is None in a layer without memory.
  """
  config: ModelConfig
  imm: ImmConfig | None
  dropout: float
  deterministic: bool
  writer: bool = True

  @nn.compact
  def __call__(self, x_BTD: chex.Array, positions: chex.Array, mask: Mask,
               cache: Cache | None, step: chex.Array | None, banks=None, shared=None):
    c, dtype, imm = self.config, jnp.dtype(self.config.dtype), self.imm
    if cache is not None:
      banks = cache.banks
    if imm:
      memory = memory_lib.Memory(imm, c.width, dtype, c.bias, self.writer, name='memory')
      if imm.place == 'before':
        x_BTD, banks, shared = memory(x_BTD, positions, mask, banks, cache is not None, shared)
    drop = nn.Dropout(self.dropout, deterministic=self.deterministic)
    out_scale = (2 * c.layers)**-0.5  # keeps the residual stream's variance
    q, k, v = self._qkv(norm(c, name='norm_1')(x_BTD))  # [B, T, N, H]; k, v fewer heads
    if c.positions == 'rotary':
      q, k = rotary(q, positions, c.rope), rotary(k, positions, c.rope)
    if cache is None:
      y, kept = attention.IMPLEMENTATIONS[c.attention](q, k, v, mask), (k, v)
    else:
      y, kept = attention.cached(q, k, v, mask, cache, step)
    bias = c.bias if c.family == 'gpt' else c.out_bias
    y = Dense(c.width, bias, dtype, out_scale, name='out')(y.reshape(*x_BTD.shape[:2], -1))
    x_BTD = x_BTD + drop(y)

    y = norm(c, name='norm_2')(x_BTD)
    up = Dense(c.hidden, c.bias, dtype, name='up')(y)
    if c.family == 'gpt':
      y = nn.gelu(up)
    else:
      y = nn.silu(Dense(c.hidden, c.bias, dtype, name='gate')(y)) * up
    y = Dense(c.width, c.bias, dtype, out_scale, name='down')(y)
    x_BTD = x_BTD + drop(y)
    if imm and imm.place == 'after':
      x_BTD, banks, shared = memory(x_BTD, positions, mask, banks, cache is not None, shared)
    return x_BTD, (*kept, banks if imm else None), shared

  def _qkv(self, y: chex.Array) -> tuple[chex.Array, chex.Array, chex.Array]:
    """Queries, keys and values by heads, before positions."""
    c, dtype = self.config, jnp.dtype(self.config.dtype)
    size, few = c.head_size or c.width // c.heads, c.kv_heads or c.heads

    def heads(a, count):
      return a.reshape(*a.shape[:2], count, size)
    if c.family == 'gpt':
      qkv = Dense(3 * c.width, c.bias, dtype, name='qkv')(y)
      return tuple(heads(a, c.heads) for a in jnp.split(qkv, 3, axis=-1))
    q, k, v = (heads(Dense(count * size, c.qkv_bias, dtype, name=name)(y), count)
               for name, count in (('q', c.heads), ('k', few), ('v', few)))
    if c.qk_norm:
      q, k = (RMSNorm(c.norm_epsilon, dtype, name=name)(a)
              for name, a in (('q_norm', q), ('k_norm', k)))
    return q, k, v


class GPT(nn.Module):
  """Tokens in, hidden states out; `head` turns hidden states into logits.

  Attributes:
    config: sizes and switches.
    vocab: V, padded.
    dropout: rate while not deterministic.
    imm: the implicit memory; None, or without a policy: none.
  """
  config: ModelConfig
  vocab: int
  dropout: float = 0.0
  imm: ImmConfig | None = None

  def setup(self):
    c = self.config
    normal = nn.initializers.normal(EMBEDDING_STD)
    self.embedding = self.param('embedding', normal, (self.vocab, c.width), jnp.float32)
    if c.positions == 'learned':
      self.position_embedding = self.param(
          'position_embedding', normal, (c.max_positions, c.width), jnp.float32)
    if not c.tied:
      self.head_kernel = self.param('head', normal, (c.width, self.vocab), jnp.float32)
    self.norm = norm(c)

  def embed(self, tokens: chex.Array) -> chex.Array:
    """Token embeddings, without positions: [B, T] -> [B, T, D]."""
    return self.embedding[tokens].astype(jnp.dtype(self.config.dtype))

  @nn.compact
  def __call__(self, tokens: chex.Array, positions: chex.Array, mask: Mask,
               cache: Cache | None = None, step: chex.Array | None = None, *,
               embeddings: chex.Array | None = None, banks=None,
               deterministic: bool = True):
    """Runs the layers over rows, or over one token of each readout from a cache.

    Args:
      tokens, positions: int32 [B, T].
      mask: of these T positions.
      cache: keys, values and banks with a leading layer axis, to decode from; T is
        then the number of readouts K.
      step: tokens each readout has decoded before; only with a cache.
      embeddings: [B, T, D] in place of the tokens' embeddings.
      banks: of all layers, to begin a row with; None: empty.
      deterministic: no dropout.

    Returns:
      hidden states [B, T, D], normed, and (k, v, banks) of all layers: k and v
      [B, T, N, H] a layer (dropped by jit where unused), and the memory's banks at
      each readout's anchor, or at the row's end where there is no readout. With a
      cache, its own_k, own_v and banks with this token in them.
    """
    c = self.config
    chex.assert_equal_shape([tokens, positions, mask.segment])
    x = self.embed(tokens) if embeddings is None else embeddings
    if c.positions == 'learned':
      x = x + self.position_embedding[positions].astype(x.dtype)
    x = nn.Dropout(self.dropout, deterministic=deterministic)(x)
    block = nn.remat(Block, prevent_cse=not c.scan) if c.remat else Block
    imm = self.imm if self.imm and self.imm.write else None
    args = (self.dropout, deterministic)
    if c.scan:
      def body(block, x, cache, banks):
        x, kept, _ = block(x, positions, mask, cache, step, banks)
        return x, kept
      scanned = nn.scan(
          body, variable_axes={'params': 0, 'intermediates': 0},
          split_rngs={'params': True, 'dropout': True}, length=c.layers)
      x, kept = scanned(block(c, imm, *args, name='blocks'), x, cache, banks)
    else:
      layers, shared, with_memory = [], None, imm and (imm.layers or range(c.layers))
      for i in range(c.layers):
        own = imm if imm and i in with_memory else None
        writer = not (imm and imm.shared) or shared is None
        here = block(c, own, *args, writer, name=f'block_{i}')
        x, kept, told = here(x, positions, mask, cache and cache.layer(i), step,
                             banks and banks[i], shared)
        shared = told if imm and imm.shared else None
        layers.append(kept)
      kept = tuple(zip(*layers, strict=True))
    return self.norm(x), kept

  def head(self, hidden: chex.Array, kernel_DV: chex.Array | None = None) -> chex.Array:
    """Logits in float32: [..., D] -> [..., V].

    Args:
      kernel_DV: a transposed copy of the tied table; on a CPU, the transpose of
        a large table inside the decoding loop costs more than the layers.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    if kernel_DV is None:
      kernel_DV = self.embedding.T if self.config.tied else self.head_kernel
    logits = jnp.matmul(flat, kernel_DV.astype(flat.dtype),
                        preferred_element_type=jnp.float32)
    return logits.reshape(*hidden.shape[:-1], self.vocab)


def stack_layers(params: dict, layers: int) -> dict:
  """Parameters of an unscanned model as those of a scanned one."""
  rest = {k: v for k, v in params.items() if not k.startswith('block_')}
  blocks = [params[f'block_{i}'] for i in range(layers)]
  return {**rest, 'blocks': jax.tree.map(lambda *a: jnp.stack(a), *blocks)}
