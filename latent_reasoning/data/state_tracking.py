"""State tracking, generated: tasks bound by serial depth, and two by what must be held.

  permutations  abba          five objects, a exchanges the first two, b moves the last one to
                              the front; words over S5, whose word problem is complete for NC1
  hops          3:cabcadbca   p-hop induction (Sanford et al., arXiv 2402.09268): from the
                              last letter to the one behind its last occurrence, p times
  variables     351:a+b,c*a   the values of a, b, c …, then assignments modulo 10: a becomes
                              a + b; the answer is all values in the end, so that all are live
  registers     351:a+2,c*3   the same, but each is changed by numbers, and equally often: of
                              m registers and n assignments, n / m follow on each other
"""

import hashlib
import random
import re
from collections.abc import Sequence
from typing import Any

from latent_reasoning.config import StateTrackingConfig
from latent_reasoning.data.example import Example
from latent_reasoning.data.synthetic import Generated

LETTERS, DIGITS = 'abcdefghijklmnopqrstuvwxyz', '0123456789'
_APPLY = {'+': lambda a, b: a + b, '-': lambda a, b: a - b, '*': lambda a, b: a * b}
Solved = tuple[list[str], str]  # steps and answer


def permutations(question: str) -> Solved:
  state, steps = '12345', []
  for letter in question:
    state = state[1] + state[0] + state[2:] if letter == 'a' else state[-1] + state[:-1]
    steps.append(state)
  return steps, state


def hops(question: str) -> Solved | None:
  """None: a letter has not occurred before."""
  count, text = question.split(':')
  at, steps = len(text) - 1, []
  for _ in range(int(count)):
    at = text.rfind(text[at], 0, at) + 1
    if not at:
      return None
    steps.append(text[at])
  return steps, steps[-1]


def variables(question: str) -> Solved:
  values, assignments = question.split(':')
  held, steps = dict(zip(LETTERS, map(int, values), strict=False)), []
  for one, symbol, other in assignments.split(','):
    held[one] = _APPLY[symbol](held[one], held[other] if other in held else int(other)) % 10
    steps.append(f'{one}={held[one]}')
  return steps, ''.join(map(str, held.values()))


SOLVE = {'permutations': permutations, 'hops': hops, 'variables': variables,
         'registers': variables}
FACTS = {  # what of a question may be changed, and into what
    'permutations': (r'[ab]', 'ab'), 'hops': (r'(?<![\d:])[a-z]', ''),
    'variables': (r'\d', DIGITS), 'registers': (r'\d', DIGITS)}


class StateTracking(Generated):
  """One split; the identity of a problem is its question."""

  def __init__(self, config: StateTrackingConfig, seed: int, split: str):
    """Makes the sequence.

    Raises:
      InputError: the space is too small for this split to have a problem.
    """
    self._config = config
    super().__init__(seed, split, getattr(config, f'{split}_size'))

  def _draw(self, key: bytes) -> tuple[str, str] | None:
    c, draw = self._config, random.Random(int.from_bytes(hashlib.blake2b(key).digest()))
    count = draw.randint(c.min_steps, c.max_steps)

    def some(options: Sequence[str], n: int) -> str:
      return ''.join(draw.choices(options, k=n))
    if c.task == 'permutations':
      question = some('ab', count)
    elif c.task == 'hops':
      question = f'{count}:{some(LETTERS[:c.live], c.length)}'
    elif c.task == 'variables':
      names = LETTERS[:c.live]
      question = f'{some(DIGITS, c.live)}:' + ','.join(
          some(names, 1) + some('+-*', 1) + some(names, 1) for _ in range(count))
    else:
      changed = draw.sample([LETTERS[i % c.live] for i in range(count)], count)
      question = f'{some(DIGITS, c.live)}:' + ','.join(
          one + some('+-*', 1) + some(DIGITS, 1) for one in changed)
    return (question, question) if SOLVE[c.task](question) else None

  def _example(self, drawn: Any) -> Example:
    steps, answer = SOLVE[self._config.task](drawn)
    return Example(drawn, tuple(steps), answer)

  def counterfactual(self, example: Example, seed: int) -> Example | None:
    """With another letter, or another value at first; None where none matters."""
    task, question = self._config.task, example.question
    pattern, options = FACTS[task]
    places = [m.start() for m in re.finditer(pattern, question.partition(':')[0] if
                                             options == DIGITS else question)]
    changes = [(i, other) for i in places
               for other in options or LETTERS[:self._config.live] if other != question[i]]
    for i, other in random.Random(f'{seed}/{question}').sample(changes, len(changes)):
      changed = f'{question[:i]}{other}{question[i + 1:]}'
      if (found := SOLVE[task](changed)) and found[1] != example.answer:
        return Example(changed, tuple(found[0]), found[1])
    return None

  def _space(self) -> str:
    return (f'problems of config.data.state_tracking.task {self._config.task!r}: there are too '
            'few; enlarge max_steps, live or length')
