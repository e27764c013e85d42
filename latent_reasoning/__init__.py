"""latent_reasoning: reasoning inside a language model, in JAX/Flax.

Dimensions, the same letters in every einsum and array name:

  B batch        T query position    S key position     L row length
  D model width  N heads             H head size        F hidden width of the MLP
  V vocabulary   P prefix length     K readouts         R tokens of one readout

An ambiguous array wears its shape, as in `x_BTD`. The modules, each of which
imports only from its left:

  errors, config | tokenizers, data | curriculum | layout | masks | pipeline | models |
  pretrained | objectives | adapt, optim | step | checkpoint, metrics, workdir | decode |
  answers, evaluate | blocks, choose | inside, intervene | text | memory_state | run, loop |
  explicit, export | audit, latency, benchmark | report, figures_blocks, sweep | modes |
  modes_blocks | main
"""

__version__ = '0.1.0'
