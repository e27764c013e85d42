"""Chains of operations, generated: the data set that needs no file.

A problem is `v0 op1 v1 op2 v2 …`, evaluated strictly left to right, one step an
operation; precedence plays no part, so that every step needs the one before.
"""

import hashlib
import operator
import random
import re
from collections.abc import Sequence

from latent_reasoning.config import ArithmeticConfig
from latent_reasoning.data.example import Example
from latent_reasoning.data.synthetic import Generated
from latent_reasoning.errors import InputError

NAMES = ('Ada', 'Ben', 'Chloe', 'Dan', 'Emma', 'Finn', 'Grace', 'Hugo', 'Ines', 'Jack',
         'Kim', 'Leo', 'Mia', 'Noah', 'Olga', 'Paul')
THINGS = ('apples', 'beads', 'books', 'boxes', 'cards', 'coins', 'eggs', 'keys', 'lamps',
          'marbles', 'pens', 'shells', 'stamps', 'stones', 'tickets', 'toys')

# Opening, one sentence for each operation, question. Every sentence changes the
# running value, which may be negative: hence scores and balances, not heaps.
STORIES = (
    ('{name} begins a game with a score of {n}.',
     {'+': 'The score rises by {n}.', '-': 'The score falls by {n}.',
      '*': 'The score is multiplied by {n}.'},
     "What is {name}'s score at the end?"),
    ("A counter on {name}'s desk shows {n}.",
     {'+': 'It goes up by {n}.', '-': 'It goes down by {n}.',
      '*': 'Its reading is multiplied by {n}.'},
     'What does the counter show at the end?'),
    ('{name} keeps an account of {thing} with a balance of {n}.',
     {'+': 'Then {n} are credited.', '-': 'Then {n} are debited.',
      '*': 'Then the balance is multiplied by {n}.'},
     "What is the balance of {name}'s account in the end?"),
    ('{name} stands at {n} on a number line.',
     {'+': '{name} walks forward by {n}.', '-': '{name} walks back by {n}.',
      '*': '{name} jumps to {n} times the current position.'},
     'Where does {name} stand at the end?'),
    ('{name} writes the number {n} on a board.',
     {'+': 'Next, {n} is added to it.', '-': 'Next, {n} is subtracted from it.',
      '*': 'Next, it is multiplied by {n}.'},
     'Which number is on the board at the end?'),
    ("The tally of {thing} in {name}'s shop starts at {n}.",
     {'+': 'A delivery raises it by {n}.', '-': 'A sale lowers it by {n}.',
      '*': 'A trade makes it {n} times what it was.'},
     'How many {thing} does the tally say at last?'),
    ('A robot called {name} holds {n} in its memory.',
     {'+': 'It adds {n}.', '-': 'It subtracts {n}.', '*': 'It multiplies by {n}.'},
     'What does {name} hold in memory now?'),
)
RING = 'All counting is on a ring of {modulus}.'

_APPLY = {'+': operator.add, '-': operator.sub, '*': operator.mul}


def _chain(values: Sequence[int], symbols: Sequence[str]) -> str:
  return str(values[0]) + ''.join(f'{o}{v}' for o, v in zip(symbols, values[1:], strict=True))


class Arithmetic(Generated):
  """One split of the chains; the identity of a problem is its chain, as '7+2-5*3'."""

  def __init__(self, config: ArithmeticConfig, step_marks: bool, seed: int, split: str):
    """Makes the sequence.

    Args:
      config: the problem space and the sizes of the splits.
      step_marks: steps read <<7+2=9>> instead of 7+2=9.
      seed: of the whole data set.
      split: 'train', 'valid' or 'test'.

    Raises:
      InputError: more templates than there are, or the space is too small for
        this split to have a problem.
    """
    if config.templates > len(STORIES) + 1:
      raise InputError(f'config.data.arithmetic.templates is {config.templates}; '
                       f'expected at most {len(STORIES) + 1}')
    self._config, self._marks = config, step_marks
    m, top = config.modulus, config.max_value
    self._values = (min(top, m - 1) if m else top) + 1
    # Bits of a chain, 64 for its length and wording, 64 that keep the bias < 2^-64.
    draw = self._values.bit_length() + len(config.operations).bit_length()
    self._bytes = ((config.max_steps + 1) * draw + 64 + 64) // 8 + 1
    super().__init__(seed, split, getattr(config, f'{split}_size'))

  def normalise(self, question: str) -> str:
    """A chain without white space, as in training; a story with single spaces."""
    bare = ''.join(question.split())
    return bare if re.fullmatch(r'[\d+*-]+', bare) else super().normalise(question)

  def unlike(self, question: str) -> str:
    """How a chain differs from those of training; '' also for a story, if there are some."""
    c, chain = self._config, self.normalise(question)
    few, most = c.min_steps, c.max_steps
    count = f'{few}' if few == most else f'{few} to {most}'
    form = (f'chains of {count} operations {" ".join(c.operations)} on numbers 0 to '
            f'{self._values - 1}, such as {self[0].question!r}')
    if not re.fullmatch(r'\d+([-+*]\d+)*', chain):
      if c.templates > 1 and re.search('[A-Za-z]', chain):
        return ''
      return f'it is none of the {form}'
    values, symbols = re.findall(r'\d+', chain), re.findall(r'[-+*]', chain)
    wrong = ([f'{len(symbols)} operation' + 's' * (len(symbols) != 1)]
             * (not few <= len(symbols) <= most)
             + [f'the number {v}' for v in values if int(v) >= self._values or v != str(int(v))]
             + [f'the operation {o}' for o in dict.fromkeys(symbols) if o not in c.operations])
    return f'it has {", ".join(wrong)}; training had {form}' if wrong else ''

  def counterfactual(self, example: Example, seed: int) -> Example | None:
    """A chain with another operand; None for a story, or where no operand matters."""
    chain = example.question
    if not re.fullmatch(r'\d+([-+*]\d+)*', chain):
      return None
    values, symbols = [*map(int, re.findall(r'\d+', chain))], re.findall(r'[-+*]', chain)
    draw = random.Random(f'{seed}/{chain}')
    changes = [(i, v) for i, old in enumerate(values) for v in range(self._values) if v != old]
    for i, v in draw.sample(changes, len(changes)):
      own = [*values[:i], v, *values[i + 1:]]
      other = self._example((_chain(own, symbols), own, symbols, 0))
      if other.answer != example.answer:
        return other
    return None

  def _space(self) -> str:
    c = self._config
    return (f'chains of {c.min_steps} to {c.max_steps} operations {c.operations!r} on '
            f'0 … {self._values - 1}: the problem space is too small; enlarge '
            'config.data.arithmetic.max_steps, max_value, operations or modulus')

  def _draw(self, key: bytes):
    bits = int.from_bytes(hashlib.shake_128(key).digest(self._bytes))
    values, symbols, bits = self._cut(bits)
    chain = _chain(values, symbols)
    return chain, (chain, values, symbols, bits)

  def _cut(self, bits: int) -> tuple[list[int], list[str], int]:
    """Cuts a random number into operands, operations and what is left of it."""
    c = self._config
    bits, extra = divmod(bits, c.max_steps - c.min_steps + 1)
    values, symbols = [], []
    for _ in range(c.min_steps + extra):
      bits, v = divmod(bits, self._values)
      bits, o = divmod(bits, len(c.operations))
      values.append(v)
      symbols.append(c.operations[o])
    bits, v = divmod(bits, self._values)
    values.append(v)
    return values, symbols, bits

  def _example(self, drawn: tuple[str, list[int], list[str], int]) -> Example:
    chain, values, symbols, bits = drawn
    steps, modulus, result = [], self._config.modulus, values[0]
    for symbol, v in zip(symbols, values[1:], strict=True):
      left, result = result, _APPLY[symbol](result, v)
      if modulus:
        result %= modulus
      steps.append(f'<<{left}{symbol}{v}={result}>>' if self._marks else
                   f'{left}{symbol}{v}={result}')
    bits, template = divmod(bits, self._config.templates)
    question = self._story(template - 1, values, symbols, bits) if template else chain
    return Example(question, tuple(steps), str(result))

  def _story(self, row: int, values: list[int], symbols: list[str], bits: int) -> str:
    opening, sentences, question = STORIES[row]
    bits, name = divmod(bits, len(NAMES))
    words = {'name': NAMES[name], 'thing': THINGS[bits % len(THINGS)]}
    text = [RING.format(modulus=self._config.modulus)] if self._config.modulus else []
    text.append(opening.format(n=values[0], **words))
    text += [sentences[o].format(n=v, **words)
             for o, v in zip(symbols, values[1:], strict=True)]
    return ' '.join([*text, question.format(**words)])
