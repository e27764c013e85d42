"""What the rows of a plan are: those of real batches where the data are here, or the largest
that the method reaches."""

import collections
import dataclasses
import itertools
import pathlib
import tempfile

import numpy as np

from latent_reasoning import batching, data, methods, sequences
from latent_reasoning.config import Config
from latent_reasoning.data import splits, tokenizers
from latent_reasoning.errors import InputError, ensure
from latent_reasoning.hf import init_from as pretrained
from latent_reasoning.train import batches as batches_lib
from latent_reasoning.train import curriculum

SAMPLED = 48  # batches, evenly over the curriculum
MOST = 256  # rows of each


def of(config: Config) -> tuple[Config, batching.Batch, list[tuple[int, float]]]:
  """The configuration with buckets, the batch whose rows take most, or a row, and [(tokens of
  a row, share of the batches)]: empty where no data are here.

  Raises:
    InputError: neither the configuration nor data say buckets, or no problem fits them.
  """
  if methods.get(config.method).is_text:
    return config, text(config), []
  config, seen = real(config)
  if not seen:
    return config, largest(config), []
  count = collections.Counter()
  for batch in seen:
    count[batch.tokens.shape[1]] += 1 / len(seen)
  most = max(seen, key=_tokens)
  return config, most, sorted(count.items())


def _tokens(batch: batching.Batch) -> int:
  teacher = batch.teacher.tokens.shape[1] if batch.teacher else 0
  return batch.tokens.shape[1] + teacher


def real(config: Config) -> tuple[Config, list[batching.Batch]]:
  """The configuration with buckets, and a sample of the batches of a training; none where data
  or tokenizer are not on this machine, or no problem fits the buckets."""
  start, d = config.model.init_from, config.data
  here = d.name in splits.GENERATED or any((d.dir, d.train))
  if not here or (start and not pathlib.Path(start).is_dir()):
    return config, []
  sampled = dataclasses.replace(config, optim=dataclasses.replace(
      config.optim, batch_size=min(MOST, config.optim.batch_size)))
  try:
    sampled = pretrained.resolve(sampled)
    train = data.load(config.data, config.seed).train
    with tempfile.TemporaryDirectory() as folder:
      tokenizer = tokenizers.build(sampled.tokenizer, lambda: batches_lib.texts(train),
                                   pathlib.Path(folder) / 'tokenizer.json',
                                   sampled.rim.max_steps)
    method = methods.get(sampled.method)
    sampled = batches_lib.sized(sampled, method, train, tokenizer)
    train = batches_lib.fitting(sampled, method, train, tokenizer)
    parts = method.parts(sampled) if method.parts else 1
    batches = batches_lib.Batches(sampled, method, train, tokenizer,
                                  curriculum.build(sampled.optim, len(train), parts))
  except InputError:
    return config, []
  config = dataclasses.replace(config, data=dataclasses.replace(
      config.data, buckets=sampled.data.buckets))
  total = batches.curriculum.total
  return config, [batches.at(step)
                  for step in sorted({k * total // SAMPLED for k in range(SAMPLED)})]


def text(config: Config) -> batching.Batch:
  ints = np.zeros((1, config.data.seq_len), np.int32)
  return batching.Batch(ints, ints, ints, ints.astype(np.float32), ints, ints, ints,
                        ints[:, :0], config.data.seq_len, causal_prefix=True)


def largest(config: Config) -> batching.Batch:
  """One row, the largest that the method makes of a problem that fills the buckets: its
  question the longest prefix, its chain of thought the longest readout, in as many steps as
  rim.max_steps and the readouts of a row allow.

  Raises:
    InputError: no problem fits the buckets.
  """
  method, buckets = methods.get(config.method), config.data.buckets
  ensure(buckets.prefix and buckets.count and buckets.readout,
         'config.data.buckets are (), which only the data and its tokenizer can fill; expected '
         'the sizes to plan with, such as --config.data.buckets.prefix="(256,)" '
         '--config.data.buckets.readout="(128,)" --config.data.buckets.count="(8,)"')
  ids = dict.fromkeys((f.name for f in dataclasses.fields(sequences.SpecialTokens)), 0)
  ids = sequences.SpecialTokens(**{**ids, 'steps': (0,) * config.rim.max_steps,
                                   'newline': (0,), 'answer': (0, 0)})
  found, why = None, None
  for count in range(max(1, config.rim.max_steps), 0, -1):
    step = (0,) * max(1, (buckets.readout[-1] - len(ids.answer) - 2) // count - 1)
    for stage, progress in itertools.product((1, 2), (0.0, 0.5, 1 - 1e-6)):
      def row(question, step=step, count=count, stage=stage, progress=progress):
        example = sequences.TokenizedExample((0,) * question, [step] * count, (0,))
        made = [method.sequence(example, stage, progress, config, ids)]
        return made + [teach(example, progress, config, ids) for teach in (
            method.teacher,) if teach]
      longer = buckets.prefix[-1] - max(len(one.prefix) for one in row(1))
      try:
        batches = [batching.bucketed([one], buckets) for one in row(max(1, 1 + longer))]
      except InputError as error:
        why = error
        continue
      if found is None or batches[0].tokens.size > found[0].tokens.size:
        found = batches
    if found:
      return found[0].replace(teacher=found[1]) if method.teacher else found[0]
  raise why
