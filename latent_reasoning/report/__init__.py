"""Tables, figures and pages of runs. Needs no JAX."""

from latent_reasoning.report.comparison import document, mcnemar, summarize
from latent_reasoning.report.figures import (
  accuracy_and_time,
  adapters,
  comparison_figures,
  figure,
  learning,
  slots,
)
from latent_reasoning.report.mask_plots import leak, mask
from latent_reasoning.report.page import write
from latent_reasoning.report.runs import find
from latent_reasoning.report.tables import (
  audit,
  choice,
  compare,
  contamination,
  controls,
  data,
  explicit,
  latency,
  losses,
  markdown,
  paper,
  percent,
  results,
  table,
  text,
)

__all__ = ['accuracy_and_time', 'adapters', 'audit', 'choice', 'compare',
           'comparison_figures', 'contamination', 'controls', 'data', 'document', 'explicit',
           'figure', 'find', 'latency', 'leak', 'learning', 'losses', 'markdown', 'mask',
           'mcnemar', 'paper', 'percent', 'results', 'slots', 'summarize', 'table', 'text',
           'write']
