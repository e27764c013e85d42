"""Tables, figures and pages of runs. Needs no JAX."""

from latent_reasoning.report.figures import figure, slots
from latent_reasoning.report.tables import (
  audit,
  compare,
  data,
  explicit,
  latency,
  percent,
  results,
  sweep,
  table,
  text,
)

__all__ = ['audit', 'compare', 'data', 'explicit', 'figure', 'latency', 'percent', 'results',
           'slots', 'sweep', 'table', 'text']
