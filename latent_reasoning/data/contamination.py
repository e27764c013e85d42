"""What of the test questions stands in the training data already.

Three measures, from strict to loose: the same question after normalisation; the same with
every number masked; and the share of a test set's 8-grams of words that occur in the
training questions or steps. Training data is streamed once: only what is looked for is
held in memory.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from latent_reasoning.data.example import Example
from latent_reasoning.data.splits import normal
from latent_reasoning.data.stored import Stored

WORDS = 8  # of an n-gram
SAMPLED = 2_000  # generated problems that are read; of files, all are

_NUMBER = re.compile(r'\d+(?:[.,]\d+)*')


def masked(text: str) -> str:
  """A normalised question with every number as '#'."""
  return _NUMBER.sub('#', text)


def grams(text: str) -> Iterator[str]:
  """The n-grams of words of a normalised text; none of a shorter one."""
  words = text.split()
  return (' '.join(words[i:i + WORDS]) for i in range(len(words) - WORDS + 1))


def measure(train: Sequence[Example], sets: Mapping[str, Sequence[Example]]) -> dict[str, Any]:
  """Compares training data with test sets.

  Args:
    train: what was trained on. A sequence that is generated lazily (no list, tuple or
      `Stored`) is sampled: its first `SAMPLED` problems are read.
    sets: test problems by name.

  Returns:
    train problems, how many of them were `read`, and by set: n, `exact` and
    `numbers_masked`, counts of test questions; ngram_share, in [0, 1]; ngrams, how many
    different ones there are; `short`, how many questions are too short to have one.
  """
  whole = isinstance(train, (list, tuple, Stored))
  read = len(train) if whole else min(SAMPLED, len(train))
  normals = {name: [normal(e.question) for e in examples] for name, examples in sets.items()}
  masks = {name: [masked(q) for q in questions] for name, questions in normals.items()}
  pieces = {name: {g for q in questions for g in grams(q)}
            for name, questions in normals.items()}
  wanted = (set().union(*normals.values()), set().union(*masks.values()),
            set().union(*pieces.values()))
  exact, alike, found = set(), set(), set()
  for i in range(read):
    example = train[i]
    question = normal(example.question)
    exact.update({question} & wanted[0])
    alike.update({masked(question)} & wanted[1])
    for text in (question, *map(normal, example.steps)):
      found.update(g for g in grams(text) if g in wanted[2])
  return {
      'train': len(train), 'read': read, 'sets': {name: {
          'n': len(questions), 'exact': sum(q in exact for q in questions),
          'numbers_masked': sum(q in alike for q in masks[name]),
          'ngram_share': len(pieces[name] & found) / max(1, len(pieces[name])),
          'ngrams': len(pieces[name]),
          'short': sum(len(q.split()) < WORDS for q in questions)}
          for name, questions in normals.items()}}
