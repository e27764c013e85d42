"""latent_reasoning: reasoning inside a language model, in JAX/Flax.

  load_config(name, **keys)   a configuration of `configs`, with some keys changed
  Experiment(config, workdir) train, evaluate, answer, block_states, analyze, intervene,
                              check_leakage, latency, export …; Experiment.load(workdir)
  compare(*experiments)       their accuracies and times side by side
  analysis                    value_probes and the like, of what block_states returns

  import latent_reasoning as lr
  experiment = lr.Experiment(lr.load_config('rim_arithmetic'), workdir='runs/rim')

What is found shows itself as text, plots with .plot('FILE.png') and has its numbers in
.to_dict().

Dimensions, the same letters in every einsum and array name:

  B batch        T query position    S key position     L row length
  D model width  N heads             H head size        F hidden width of the MLP
  V vocabulary   P prefix length     K readouts         R tokens of one readout

An ambiguous array wears its shape, as in `x_BTD`. The rooms, each of which imports only from
those before it (tests/test_imports.py):

  errors, config, config_loading | data | report (reads files alone) | sequences | batching |
  models | parallel | train | methods | hf | eval | experiment | planning | analysis | cli |
  benchmarks | api | main
"""

import importlib

__version__ = '0.1.0'
_INTERFACE = ('load_config', 'Experiment', 'Answer', 'compare')


def __getattr__(name: str):
  if name in _INTERFACE:
    return getattr(importlib.import_module('latent_reasoning.api'), name)
  if name in ('analysis', 'api'):
    return importlib.import_module(f'latent_reasoning.{name}')
  if name == 'notebook':
    return importlib.import_module('latent_reasoning.cli.notebook')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}; there are '
                       f"{', '.join(_INTERFACE)}, analysis and notebook")


def __dir__() -> list[str]:
  return sorted({*globals(), *_INTERFACE, 'analysis', 'notebook'})
