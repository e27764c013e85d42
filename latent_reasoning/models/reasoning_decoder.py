"""The reasoning decoder: a small transformer that says as text what a memory holds.

It reads a few vectors, projected to its width, in place of a prompt: the hidden
states of a RiM block, what the memory of each IMM layer returned at some
positions (arXiv 2502.21030 has it as an option, for inspection), or the inputs of continuous
thoughts. Trained jointly out of those, it is the auxiliary decoder of SIM-CoT (arXiv
2509.20317), which begins as a copy of the model and is as deep; ours begins fresh, with
reasoning_decoder.num_layers. It is beside the model:
where nobody asks for it, nothing of it is computed.
"""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_reasoning.config import ModelConfig
from latent_reasoning.errors import InputError
from latent_reasoning.models import imm, latents, masks
from latent_reasoning.models.transformer import Dense, Output, Transformer


def hidden_and_source(model, params, batch, kind: str, rng: chex.PRNGKey | None = None):
  """Runs a model over rows and picks what its texts are to be read out of.

  Args:
    model: as models.transformer.Transformer.
    params: its parameters.
    batch: sequences with `decoder_targets`.
    kind: 'blocks', 'memory' or 'latents', as config.reasoning_decoder.source.
    rng: for dropout; None: deterministic.

  Returns:
    hidden states [B, L, D], and the source [B·C, S·n, E] of C texts a row, n vectors
    of width E a position.
  """
  out = latents.forward(model, params, batch, rng)
  return out.hidden, source(model, params, batch, kind, out)


def source(model, params, batch, kind: str, out: Output) -> chex.Array:
  """The source, as `hidden_and_source`, of what a model computed of rows."""
  layers = ([one.retrieved for one in imm.reads_of(out.layers)] if kind == 'memory'
            else [out.hidden])
  vectors = jnp.stack(layers, axis=2)  # [B, P, n, E]
  at = batch.decoder_targets.at
  if batch.latents:  # the first is read at its anchor, the prefix's end; padding is behind it
    end = batch.anchors[:, :1, None]
    at = jnp.where(at > end, at - end - 1 + batch.prefix, at)
  rows = jnp.arange(at.shape[0])[:, None, None]
  picked = vectors[rows, at]  # [B, C, S, n, E]
  if kind == 'latents':
    picked = model.apply({'params': params}, picked, method='latent_input')
  return picked.reshape(at.shape[0] * at.shape[1], -1, picked.shape[-1])


class ReasoningDecoder(nn.Module):
  """Source vectors and text so far in, hidden states out.

  Attributes:
    config: of the model that it belongs to; its width, heads and dtype are the same.
    vocab: V, padded.
    layers: how many of its own.
    dropout: rate while not deterministic.
  """
  config: ModelConfig
  vocab: int
  layers: int
  dropout: float = 0.0
  num_tokens: int = 0  # as of models.transformer.Transformer: all

  @property
  def needs_rng(self) -> bool:
    """Whether training draws random numbers."""
    return self.dropout > 0

  def setup(self):
    dtype = jnp.dtype(self.config.dtype)
    self.project = Dense(self.config.embed_dim, True, dtype)
    self.norm = nn.LayerNorm(dtype=dtype)
    self.decoder = self.transformer()

  def transformer(self) -> Transformer:
    """The decoder by itself, to generate with."""
    none = dataclasses.replace(self.config.lora, rank=0)
    own = dataclasses.replace(self.config, num_layers=self.layers, scan=False, lora=none)
    return Transformer(own, self.vocab, self.dropout, parent=None)

  def read(self, source: chex.Array) -> chex.Array:
    """[B, S, E] as embeddings [B, S, D]."""
    return self.project(self.norm(source))

  def __call__(self, source: chex.Array, tokens: chex.Array, positions: chex.Array, mask,
               deterministic: bool = True) -> chex.Array:
    """Hidden states [B, S + R, D] over the source and R tokens, causal.

    Args:
      source: [B, S, E].
      tokens, positions: int32 [B, S + R]; of the first S, positions alone count.
      mask: of them.
    """
    if tokens.shape[1] > self.config.max_positions:
      raise InputError(
          f'the reasoning decoder needs {tokens.shape[1]} positions, {source.shape[1]} of them '
          'for what it reads; raise config.model.max_positions, which has '
          f'{self.config.max_positions}')
    own = self.decoder.embed(tokens[:, source.shape[1]:])
    return self.decoder(
        tokens, positions, mask, deterministic=deterministic,
        embeddings=jnp.concatenate([self.read(source), own], axis=1)).hidden

  def head(self, hidden: chex.Array) -> chex.Array:
    return self.decoder.head(hidden)

  def kernels(self) -> list[chex.Array]:
    return self.decoder.kernels()


def init(decoder: ReasoningDecoder, kind: str, model, params, batch, rng: chex.PRNGKey):
  """Fresh parameters of a decoder for the source that `kind` names; shapes only count."""
  first = jax.tree.map(lambda a: a[:1], batch)
  source = jax.eval_shape(lambda p: hidden_and_source(model, p, first, kind)[1], params)
  length = source.shape[1] + 1
  place = jnp.arange(length)[None]
  return jax.jit(decoder.init)(rng, jnp.zeros((1, *source.shape[1:]), source.dtype), place,
                               place, masks.plain(1, length))['params']
