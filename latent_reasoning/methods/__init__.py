"""The methods: each file has the sequences, stages, prompt and loss of one family.

To add one, write a file with its `Method` and name it here.
"""

from latent_reasoning.errors import InputError, nearest
from latent_reasoning.methods.baselines import COT, DIRECT, DIRECT_STEPS, PAUSE, PAUSE_STEPS
from latent_reasoning.methods.coconut import COCONUT
from latent_reasoning.methods.codi import CODI
from latent_reasoning.methods.icot import ICOT
from latent_reasoning.methods.language_model import LANGUAGE_MODEL
from latent_reasoning.methods.rim import RIM
from latent_reasoning.sequences import Method

METHODS = {method.name: method for method in (
    RIM, DIRECT, DIRECT_STEPS, COT, PAUSE, PAUSE_STEPS, ICOT, COCONUT, CODI, LANGUAGE_MODEL)}


def get(name: str) -> Method:
  """The method of a name; InputError for an unknown one."""
  if name not in METHODS:
    raise InputError(f"config.method '{name}' is unknown; {nearest(name, METHODS)}")
  return METHODS[name]
