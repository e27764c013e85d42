"""Problems: generated chains, local files and hub data sets, in three splits."""

from latent_reasoning.data.example import Example
from latent_reasoning.data.splits import Splits, load, load_or_stand_in, load_set

__all__ = ['Example', 'Splits', 'load', 'load_or_stand_in', 'load_set']
