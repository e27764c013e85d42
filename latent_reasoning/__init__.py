"""latent_reasoning: reasoning inside a language model, in JAX/Flax.

Dimensions, the same letters in every einsum and array name:

  B batch        T query position    S key position     L row length
  D model width  N heads             H head size        F hidden width of the MLP
  V vocabulary   P prefix length     K readouts         R tokens of one readout

An ambiguous array wears its shape, as in `x_BTD`. The modules, each of which
imports only from its left:

  errors, distributed, config, config_check | tokenizers, data | curriculum | layout |
  masks | pipeline | models | thoughts | hf_format, pretrained | objectives | adapt,
  optim, sharding | step | checkpoint, metrics, workdir | decode | answers, protocol,
  evaluate | blocks, choose, inside, intervene | text | memory_state | run | flops, peaks,
  performance | loop | explicit, export | collectives, plan | sight, audit, latency,
  benchmark | report (needs config alone), sweep | contamination | modes, modes_blocks | main
"""

__version__ = '0.1.0'
