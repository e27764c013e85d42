"""Tables, figures and pages of runs. Needs no JAX."""

from latent_reasoning.report import scaling
from latent_reasoning.report.comparison import document, mcnemar, searches, summarize
from latent_reasoning.report.figures import accuracy_and_time, adapters, learning, slots
from latent_reasoning.report.mask_plots import leak, mask
from latent_reasoning.report.page import write
from latent_reasoning.report.runs import find
from latent_reasoning.report.tables import (
  INTERVENED,
  choice,
  compare,
  contamination,
  data,
  interventions,
  latency,
  leakage,
  losses,
  markdown,
  or_empty,
  paper,
  percent,
  results,
  table,
  text,
  verbalized,
  verdict,
  verdict_words,
)

__all__ = ['INTERVENED', 'accuracy_and_time', 'adapters', 'choice', 'compare',
           'contamination', 'interventions', 'leakage', 'data',
           'document', 'verbalized', 'verdict', 'verdict_words',
           'find', 'latency', 'leak', 'learning', 'losses', 'markdown', 'mask',
           'mcnemar', 'or_empty', 'paper', 'percent', 'results', 'scaling', 'searches', 'slots',
           'summarize', 'table', 'text', 'write']
