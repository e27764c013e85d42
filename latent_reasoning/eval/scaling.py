"""Test-time scaling: accuracy by how much a trained model computes when it is asked.

The parameters stay as they are, and there are more or fewer passes, loops, continuous thoughts
or blocks than in training (config.eval.passes, loops, latents, blocks).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from latent_reasoning import methods
from latent_reasoning.config import Config
from latent_reasoning.data.example import Example
from latent_reasoning.errors import InputError
from latent_reasoning.eval.evaluator import Predictor, evaluate, summarize

MOST = 16  # numbers of an axis that are asked


def axes(config: Config) -> dict[str, int]:
  """What a model may have more or less of than in training: {key of config.eval: as trained}.

  Raises:
    InputError: there is nothing.
  """
  method = methods.get(config.method)
  found = {
      'loops': config.model.loop.count if config.model.loop.count > 1 else 0,
      'passes': method.passes(config) if method.passes else 0,
      'latents': config.baselines.latents if method.counts == 'baselines.latents' else 0,
      'blocks': config.rim.blocks if method.has_blocks else 0}
  if method.has_blocks and found['passes'] == 1:
    found['passes'] = 0  # a second pass would read what it never saw
  found = {name: count for name, count in found.items() if count}
  if not found:
    raise InputError(f'method {config.method} has no blocks, passes or continuous thoughts, '
                     'and config.model.loop.count is 1, so nothing can be computed more often; '
                     'expected a method with some, such as rim')
  return found


def numbers(trained: int) -> list[int]:
  """From 1 to twice as many as trained; of many, evenly spaced ones and the trained one."""
  most = 2 * trained
  return sorted({trained, *np.linspace(1, most, min(most, MOST)).round().astype(int).tolist()})


def measure(config: Config, predictor: Callable[[Config], Predictor],
            sets: Mapping[str, tuple[Sequence[Example], str]],
            progress: Callable[[], None] = lambda: None) -> dict[str, Any]:
  """Accuracy at each number of what can be varied, one axis at a time.

  Args:
    config: of the run.
    predictor: makes the model that is asked, of a configuration.
    sets: problems, and how their answers are compared, by name.
    progress: called after each of `evaluations`, of which there may be fewer.

  Returns:
    {axis: {'trained', 'curve': [{'count', 'n', 'final', 'standard_error', 'by_steps'}, …],
    'until_agree': of a `nested` axis, at the largest number}}, see `until_agree`. A number
    for which the model has no positions is left out.
  """
  found = {}
  for axis, trained in axes(config).items():
    counts, asked = numbers(trained), {}
    for count in reversed(counts) if nested(config, axis) else counts:
      model = predictor(config.replace(**{f'eval.{axis}': count, 'eval.samples': 0}))
      records = [record for name, (examples, rule) in sets.items()
                 for record in evaluate(model, examples, name, 'test', rule)[1]]
      progress()
      fits = not any(record['too_long'] for record in records)
      if fits:
        asked[count] = records
      if fits == nested(config, axis):
        break  # the fewer are in it, or what is left is longer
    curve, most = [], max(asked, default=0)
    for count in counts[:counts.index(most) + 1] if asked else ():
      result = summarize(asked.get(count) or _cut(asked[most], most, count), config, '', 'test',
                         '')
      curve.append({'count': count, 'n': result['n'], 'final': result['accuracy']['final'],
                    'standard_error': result['standard_error']['final'],
                    'by_steps': result['by_steps']})
    found[axis] = {'trained': trained, 'curve': curve}
    if asked and nested(config, axis):
      found[axis]['until_agree'] = until_agree(asked[most])
  return found


def nested(config: Config, axis: str) -> bool:
  """Whether the readouts of a smaller number are the first ones of a larger: of passes over
  blocks, and of blocks that are read once, where nothing reads the future."""
  return methods.get(config.method).has_blocks and config.causal and (
      axis == 'passes' or axis == 'blocks' and config.rim.passes == 1)


def evaluations(config: Config) -> int:
  """How often the problems are asked, at most where the model has positions for all."""
  return sum(1 if nested(config, axis) else len(numbers(trained))
             for axis, trained in axes(config).items())


def _cut(records: Sequence[dict[str, Any]], of: int, count: int) -> list[dict[str, Any]]:
  """The records of a smaller number, out of those of a larger."""
  return [{**record, **{key: record[key][:len(record[key]) * count // of]
                        for key in ('predictions', 'correct')}} for record in records]


def until_agree(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Reads readouts in turn until one says the same as the one before, or to the last.

  Returns:
    'of' readouts; mean 'readouts' that were read, and 'final', the share that is right there;
    'by_steps': the two by a problem's number of steps. Nothing was fitted.
  """
  read, right = [], []
  for record in records:
    said = record['predictions']
    at = next((k for k in range(1, len(said)) if said[k] == said[k - 1]), len(said) - 1)
    read.append(at + 1)
    right.append(record['correct'][at])
  steps = np.array([record['steps'] for record in records])
  read, right = np.array(read), np.array(right)
  return {'of': len(records[0]['predictions']), 'readouts': float(read.mean()),
          'final': float(right.mean()),
          'by_steps': {str(s): {'readouts': float(read[steps == s].mean()),
                                'final': float(right[steps == s].mean())}
                       for s in sorted(set(steps.tolist()))}}
