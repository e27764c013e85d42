"""latent_reasoning: reasoning inside a language model, in JAX/Flax.

Dimensions, the same letters in every einsum and array name:

  B batch        T query position    S key position     L row length
  D model width  N heads             H head size        F hidden width of the MLP
  V vocabulary   P prefix length     K readouts         R tokens of one readout

An ambiguous array wears its shape, as in `x_BTD`. The rooms, each of which imports only from
those before it (tests/test_imports.py):

  errors, config, config_loading | data | report (reads files alone) | sequences | batching |
  models | parallel | train | hf | eval | experiment | planning | analysis | cli |
  benchmarks | main
"""

__version__ = '0.1.0'
