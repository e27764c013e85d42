"""The training batches of one run: a pure function of (seed, step), run ahead by grain.

`Batches.at(step)` is random access, so the position of a run in its data is the
step itself: resuming needs no iterator state, and any number of processes sees
the same order. Every process lays out the whole batch, which is small, and puts its part of
it on its own devices (sharding.batch), whatever the mesh.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import grain
import numpy as np

from latent_reasoning import sequences
from latent_reasoning.batching import Batch, bucketed, collate_decoder_targets, fit, sizes
from latent_reasoning.config import BucketConfig, Config
from latent_reasoning.data.example import Example
from latent_reasoning.data.stored import Stored
from latent_reasoning.data.synthetic import Generated
from latent_reasoning.errors import InputError
from latent_reasoning.train import packing

if TYPE_CHECKING:
  from latent_reasoning.train.curriculum import Curriculum

SHAPED = 1000  # problems whose rows say what shapes there are
SAMPLED = 2000  # generated problems that are checked, or read for a vocabulary


class Stepwise:
  """Batches by step: `at` is random access; `iterate` runs it ahead."""

  def shapes(self, stage: int) -> int:
    """How many static shapes the batches of a stage have at most; each is a program."""
    return 1

  def iterate(self, step: int) -> Iterator[Batch]:
    """Yields the batches from a step to the end, made ahead in a thread."""
    data = grain.MapDataset.range(step, self.curriculum.total).map(self.at)
    ahead = self.config.train.prefetch
    options = grain.ReadOptions(num_threads=min(1, ahead), prefetch_buffer_size=ahead)
    return iter(data.to_iter_dataset(options))


class Batches(Stepwise):
  """The training batches of one run.

  Args:
    config: the whole configuration.
    method: of `methods`.
    examples: the training split.
    tokenizer: a `tokenizers.Tokenizer`.
    curriculum: says stage and progress of a step.
    decoder_targets: whether batches carry what a reasoning decoder should say.
    unit: says, with several problems in a row, what the number of rows is a multiple of.
  """

  def __init__(self, config: Config, method: sequences.Method, examples: Sequence[Example],
               tokenizer, curriculum: 'Curriculum', decoder_targets: bool = False,
               unit: Callable[[], int] = lambda: 1):
    self.decoder_targets = decoder_targets
    self.config, self.curriculum = config, curriculum
    self.examples, self.tokenizer = examples, tokenizer
    self.method = method
    self.special = sequences.special_tokens(tokenizer)
    # A run reads one epoch and one window at a time.
    self._order = functools.lru_cache(2)(self._order)
    self._window = functools.lru_cache(2)(self._window)
    self.packer = None
    if config.data.packing and not decoder_targets:
      self.packer = packing.Packer(
          self._sample, config.optim.batch_size,
          method.parts(config) if method.parts else packing.QUARTERS,
          config.data.buckets.prefix[-1], config.model.embed_dim, unit, self.special.pad)

  def _order(self, stage: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((self.config.seed, stage, epoch)).permutation(
        len(self.examples))

  def _window(self, stage: int, epoch: int, window: int
              ) -> list[list[sequences.TokenizedExample]]:
    """Batches whose rows are alike in length, in random order."""
    size, span = self.config.optim.batch_size, self.config.data.sort_window
    stop = len(self.examples) // size * size
    index = self._order(stage, epoch)[:stop][window * span * size:(window + 1) * span * size]
    encoded = encode(self.examples, index, self.tokenizer)
    if span > 1:
      encoded.sort(key=lambda e: (len(e.steps), len(e.question) + sum(map(len, e.steps))))
    batches = [encoded[i:i + size] for i in range(0, len(encoded), size)]
    order = np.random.default_rng((self.config.seed, stage, epoch, window)).permutation(
        len(batches))
    return [batches[i] for i in order]

  def shapes(self, stage: int) -> int:
    """As `Stepwise.shapes`, by a sample of the problems."""
    if self.packer:
      return min(self.packer.shapes(stage), self.curriculum.lengths[stage - 1])
    index = np.linspace(0, len(self.examples) - 1, min(SHAPED, len(self.examples))).astype(int)
    encoded = encode(self.examples, index, self.tokenizer)
    if self.method.parts:  # four draws of each, evenly spaced over all
      encoded = [dataclasses.replace(e, draw=(i * 0.618 + j) / 4 % 1)
                 for i, e in enumerate(encoded) for j in range(4)]
    parts = self.method.parts(self.config) if self.method.parts and stage == 1 else 1
    found = [{self._size(e, stage, part / parts) for e in encoded} for part in range(parts)]
    if self.config.optim.batch_size > 1:
      found = [_joined(rows) for rows in found]
    return min(len(set().union(*found)), self.curriculum.lengths[stage - 1])

  def _size(self, encoded: sequences.TokenizedExample, stage: int,
            progress: float) -> tuple[int, ...]:
    """The static sizes of a batch of such rows."""
    buckets = self.config.data.buckets
    rows = [self.method.sequence(encoded, stage, progress, self.config, self.special)]
    extra = ()
    if self.decoder_targets:
      texts = collate_decoder_targets([
          self.method.decoder_targets(encoded, rows[0], self.config, self.special)])
      extra = (*texts.at.shape, texts.targets.shape[-1])
    if self.method.teacher:
      rows.append(self.method.teacher(encoded, progress, self.config, self.special))
    sized = []
    for row in rows:
      p, k, r = sizes([row])
      sized += [fit(p, buckets.prefix, 'prefix'), fit(k, buckets.count, 'count'),
                fit(r, buckets.readout, 'readout'), row.loops.passes if row.loops else 1,
                max((o.latents for o in row.readouts), default=0)]
    return *sized, *extra

  def at(self, step: int) -> Batch:
    """Returns the batch of a global step: one static shape."""
    moment = self.curriculum.at(step)
    epoch, place = divmod(moment.step, len(self.examples) // self.config.optim.batch_size)
    window, place = divmod(place, self.config.data.sort_window)
    encoded = self._window(moment.stage, epoch, window)[place]
    if self.method.parts:
      draws = np.random.default_rng((self.config.seed, step)).random(len(encoded))
      encoded = [dataclasses.replace(e, draw=float(d))
                 for e, d in zip(encoded, draws, strict=True)]
    rows = [self.method.sequence(e, moment.stage, moment.progress, self.config, self.special)
            for e in encoded]
    if self.packer:
      return self.packer.batch(rows, moment.stage, moment.progress)
    batch = bucketed(rows, self.config.data.buckets, self.special.pad)
    if self.method.teacher:
      batch = batch.replace(teacher=bucketed(
          [self.method.teacher(e, moment.progress, self.config, self.special)
           for e in encoded], self.config.data.buckets, self.special.pad))
    if self.decoder_targets:
      texts = collate_decoder_targets([
          self.method.decoder_targets(e, row, self.config, self.special)
          for e, row in zip(encoded, rows, strict=True)])
      if self.method.decoder_mean and (total := batch.weights.sum()):  # 0 of prompts
        texts = texts.mean(self.method.decoder_mean, total)
      return batch.replace(decoder_targets=texts)
    return batch

  def _sample(self, stage: int, progress: float) -> list[sequences.PackedSequence]:
    """The sequences of a few batches, by which `packer` chooses its shapes."""
    index = self._order(stage, 0)[:packing.SAMPLED * self.config.optim.batch_size]
    return [self.method.sequence(e, stage, progress, self.config, self.special)
            for e in encode(self.examples, index, self.tokenizer)]


def _joined(rows: set[tuple[int, ...]]) -> set[tuple[int, ...]]:
  """The sizes that batches of such rows can have: the largest of each, in every mixture."""
  more = rows
  while more:
    rows = rows | more
    more = {tuple(map(max, a, b)) for a in more for b in rows} - rows
  return rows


def encode(examples: Sequence[Example], index: Sequence[int],
           tokenizer) -> list[sequences.TokenizedExample]:
  """The tokens of examples of these numbers."""
  if isinstance(examples, Stored) and examples.has_tokens:
    return [sequences.TokenizedExample(*examples.pieces(i)) for i in index]
  return sequences.encode([examples[i] for i in index], tokenizer)


def usable(config: Config, method: sequences.Method, examples: Sequence[Example],
           tokenizer) -> Sequence[Example]:
  """Returns the examples whose rows fit the buckets in every stage.

  Raises:
    InputError: a row does not fit and config.data.too_long is 'raise', or so few fit that
      there is no batch.
  """
  ids = sequences.special_tokens(tokenizer)
  lengths = _lengths(examples, tokenizer)

  def error(these: list[int]) -> InputError | None:
    """What is wrong with the row of the longest question, steps and answer of these."""
    question, steps, answer = zip(*(lengths[i] for i in these), strict=True)
    longest = sequences.TokenizedExample(
        [0] * max(question), [[0] * max(k) for k in zip(*steps, strict=True)],
        [0] * max(answer))
    try:
      check(config, every_sequence(config, method, longest, ids), len(steps[0]))
    except InputError as found:
      return found
    return None

  def rejected(these: list[int]) -> list[int]:
    """Those that do not fit. No row is longer than that of a longer example, so that many
    are seen to fit by one."""
    if not error(these):
      return []
    half = len(these) // 2
    return rejected(these[:half]) + rejected(these[half:]) if half else these
  alike = collections.defaultdict(list)
  for i, (question, steps, _) in enumerate(lengths):
    alike[len(steps), question < 2].append(i)
  out = sorted(i for these in alike.values() for i in rejected(
      sorted(these, key=lambda i: lengths[i][0] + sum(lengths[i][1]))))
  if not out:
    return examples
  first = error(out[:1])
  if config.data.too_long == 'raise':
    raise InputError(f"{first}, or leave such problems out with config.data.too_long="
                     f"'drop'. The problem: {examples[out[0]].question[:80]!r}")
  if len(examples) - len(out) < config.optim.batch_size:
    raise InputError(
        f'{len(out):,} of {len(examples):,} training problems are too long, '
        f'the first of them because {first}; what is left is less than '
        f'config.optim.batch_size {config.optim.batch_size}')
  left = set(out)
  kept = [i for i in range(len(examples)) if i not in left]
  return examples.subset(kept) if isinstance(examples, Stored) else [examples[i] for i in kept]


def _lengths(examples: Sequence[Example],
             tokenizer) -> list[tuple[int, tuple[int, ...], int]]:
  """How many tokens question, each step and answer of each example have."""
  if isinstance(examples, Stored) and examples.has_tokens:
    return [(row[0], tuple(row[1:-1]), row[-1]) for row in examples.lengths()]
  rows = tokenizer.examples([(e.question, e.steps, e.answer) for e in examples])
  return [(len(question), tuple(map(len, steps)), len(answer))
          for question, steps, answer in rows]


def every_sequence(config: Config, method: sequences.Method,
                   encoded: sequences.TokenizedExample, ids: sequences.SpecialTokens
                   ) -> list[sequences.PackedSequence]:
  """The sequences that an example has in the course of training, each length once."""
  parts = method.parts(config) if method.parts else 1
  moments = [(1, part / parts) for part in range(parts)] + [(2, 0.0)]
  own = [method.sequence(encoded, *moment, config, ids) for moment in moments]
  return own + ([method.teacher(encoded, 0.0, config, ids)] if method.teacher else [])


def check(config: Config, rows: Sequence[sequences.PackedSequence], steps: int) -> None:
  """Raises InputError where a training row cannot be laid out."""
  if steps > config.rim.max_steps:
    raise InputError(f'a problem has {steps} steps, more than config.rim.max_steps '
                     f'{config.rim.max_steps}; raise it')
  for row in rows:
    if any(out.start is None and out.visible_until < 2 for out in row.readouts):
      raise InputError('a question is one token long, but position 0 never predicts; '
                       'expected at least two tokens')
    p, k, r = sizes([row])
    buckets = config.data.buckets
    fit(p, buckets.prefix, 'prefix')
    fit(k, buckets.count, 'count')
    fit(r, buckets.readout, 'readout')
    last = _last(row)
    if last > config.model.max_positions:
      raise InputError(f'a row needs {last} positions, more than config.model.max_positions '
                       f'{config.model.max_positions}{window(config)}')


def window(config: Config) -> str:
  """What has set the positions of a pretrained model, for errors."""
  return (f', which {config.model.init_from}/config.json says by max_position_embeddings or '
          'sliding_window: expected shorter texts, fewer blocks, or a model with a longer '
          'window' if config.model.init_from else '')


MOMENTS = (0.0, 0.25, 0.5, 0.75, 1 - 1e-6)  # of stage 1, whose readouts may be annealed away


def buckets(config: Config, method: sequences.Method,
            encoded: Sequence[sequences.TokenizedExample], ids: sequences.SpecialTokens,
            sampled: bool) -> Config:
  """The configuration with the buckets that it does not state: the largest row of each moment
  of training, of the method and of its teacher.

  Args:
    encoded: training problems; rows longer than the model's positions do not count.
    sampled: whether there are others, for which a bucket a quarter larger is added.
  """
  stated = config.data.buckets
  if stated.prefix and stated.readout and stated.count:
    return config
  parts = method.parts(config) if method.parts else 0
  moments = [(1, part / parts) for part in range(parts)] or [(1, s) for s in MOMENTS]
  found = {'prefix': set(), 'count': set(), 'readout': set()}
  for moment in [*moments, (2, 0.0)]:
    for rows in zip(*(_rows(config, method, e, moment, ids) for e in encoded), strict=True):
      fitting = [row for row in rows if _last(row) <= config.model.max_positions]
      for sizes_of, size in zip(found.values(), sizes(fitting or rows), strict=True):
        sizes_of.add(size)
  if sampled:
    for name in ('prefix', 'readout'):
      found[name].add(-(-max(found[name]) * 5 // 32) * 8)
  return dataclasses.replace(config, data=dataclasses.replace(config.data, buckets=BucketConfig(
      **{name: getattr(stated, name) or tuple(sorted(own)) for name, own in found.items()})))


def _rows(config: Config, method: sequences.Method, encoded: sequences.TokenizedExample,
          moment: tuple[int, float], ids: sequences.SpecialTokens
          ) -> list[sequences.PackedSequence]:
  """The row of a method at a moment (stage, progress), and its teacher's."""
  own = [method.sequence(encoded, *moment, config, ids)]
  return own + ([method.teacher(encoded, moment[1], config, ids)] if method.teacher else [])


def _last(row: sequences.PackedSequence) -> int:
  """Positions that a row needs."""
  return max(len(row.prefix), *(o.visible_until + len(o.inputs) for o in row.readouts))


def sized(config: Config, method: sequences.Method, train: Sequence[Example],
          tokenizer) -> Config:
  """The configuration with the buckets that it does not state, by a sample of the problems."""
  index = _sample(train)
  return buckets(config, method, encode(train, index, tokenizer),
                 sequences.special_tokens(tokenizer), sampled=len(index) < len(train))


def _sample(train: Sequence[Example]) -> Sequence[int]:
  """Numbers of the training problems by which sizes are chosen: the longest, of generated ones
  the first."""
  index = range(len(train))
  if len(train) > SAMPLED and not isinstance(train, Generated):
    long = (train.characters() if isinstance(train, Stored) else
            [e.characters for e in train])
    index = sorted(index, key=lambda i: -long[i])
  return index[:SAMPLED]


def fitting(config: Config, method: sequences.Method, train: Sequence[Example],
            tokenizer) -> Sequence[Example]:
  """Returns the training problems whose rows fit; generated ones must all fit."""
  if not isinstance(train, Generated):
    return usable(config, method, train, tokenizer)
  sample = [train[i] for i in range(min(SAMPLED, len(train)))]
  if len(usable(config, method, sample, tokenizer)) < len(sample):
    raise InputError("config.data.too_long is 'drop', but generated problems are never "
                     'dropped; enlarge config.data.buckets')
  return train


def texts(train: Sequence[Example]):
  """Yields the text of the training split, of generated problems a sample."""
  most = SAMPLED if isinstance(train, Generated) else None
  for example in itertools.islice(train, most):
    yield '\n'.join([example.question, *example.steps,
                     f'{sequences.ANSWER_MARK}{example.answer}'])
