"""Language modelling on plain text, for the implicit memory's own experiments."""

import chex

from latent_reasoning.batching import Batch
from latent_reasoning.methods.baselines import direct
from latent_reasoning.sequences import Method, question_prompt
from latent_reasoning.train.losses import under_head


def next_token(model, params, batch: Batch, rng: chex.PRNGKey | None = None):
  """Next-token loss at every position of rows of text. As losses.next_token."""
  rngs = None if rng is None else {'dropout': rng}
  hidden = model.apply({'params': params}, batch.tokens, batch.positions, batch.mask,
                       deterministic=rng is None, rngs=rngs).hidden
  return under_head(model, params, hidden, batch.targets, batch.weights)


# The leakage check reads the second half of a text as an answer to the first.
LANGUAGE_MODEL = Method(
    'language_model', 'Plain text: the next token of each.', (direct, direct), question_prompt,
    lambda config: next_token, is_text=True)
