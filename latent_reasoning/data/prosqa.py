"""Graph reasoning in the wording of ProsQA, generated (Coconut, arXiv 2412.06769).

  Every terpus is a brimpus. Tom is a terpus. … Is Tom a lempus or scrompus?
  qc,tq, … :t?ls         the same in letters, an edge a pair, for small models

A directed acyclic graph grows node by node, as in the paper's appendix. Nodes 0 and 1
are the two persons of interest. Each further node draws Poisson(parents) parents among
what only 0 reaches, among what only 1 reaches, or among all nodes, the deeper the
likelier; nodes without parents are persons too, nodes without any edge are left out.
The question is about the person with the deepest leaf that only it reaches; the wrong
option is a leaf which only the other person reaches, so both options look alike and
only one can be reached. Steps are a shortest path.
"""

import hashlib
import math
import random
import re
from collections.abc import Callable

from latent_reasoning.config import GraphConfig
from latent_reasoning.data.example import Example
from latent_reasoning.data.synthetic import Generated
from latent_reasoning.errors import InputError, ensure

LETTERS = 'abcdefghijklmnopqrstuvwxyz'
# The words of the published files, each about equally frequent there.
NAMES = ('Alex', 'Bob', 'Carol', 'Davis', 'Eva', 'Fae', 'Gabriel', 'Jack', 'Max', 'Oliver',
         'Polly', 'Rex', 'Sally', 'Sam', 'Stella', 'Tom', 'Wren')
CONCEPTS = tuple(
    [f'{start}mpus' for start in (
        'bo', 'boo', 'bri', 'du', 'fo', 'gri', 'gwo', 'i', 'jo', 'le', 'nu', 'qui', 're',
        'ro', 'scro', 'shu', 'ti', 'tu', 'vu', 'wu', 'yi', 'yu', 'zu')]
    + [f'{start}rpus' for start in (
        'cho', 'ge', 'go', 'ke', 'lo', 'ro', 'ste', 'sto', 'te', 'wo', 'ye', 'zho')]
    + [f'{start}lpus' for start in ('fe', 'hi', 'je')])

# Of new nodes: below person 0 alone, below person 1 alone; the rest below anyone. Fitted,
# like the weight of depth, to the published files.
BELOW = (0.35, 0.45)
DEPTH_WEIGHT = 1.5

Edges = list[tuple[int, int]]


class Graphs(Generated):
  """One split; the identity of a problem is its graph, whatever it is named."""

  def __init__(self, config: GraphConfig, seed: int, split: str):
    """Makes the sequence.

    Raises:
      InputError: more concepts than there are words for, fewer than a graph may need,
        more nodes than letters, or a space without a problem for this split.
    """
    if config.wording == 'letters':
      ensure(config.nodes <= len(LETTERS), f'config.data.graphs.nodes is {config.nodes}; '
             f"expected at most {len(LETTERS)} where wording is 'letters'")
    elif not config.nodes - 2 <= config.concepts <= len(CONCEPTS):
      raise InputError(f'config.data.graphs.concepts is {config.concepts}; expected '
                       f'{config.nodes - 2} (config.data.graphs.nodes - 2) to {len(CONCEPTS)}')
    self._config = config
    super().__init__(seed, split, getattr(config, f'{split}_size'))

  def _space(self) -> str:
    c = self._config
    return (f'graphs of {c.nodes} nodes with {c.min_hops} to {c.max_hops} hops: there are '
            'too few; enlarge config.data.graphs.nodes, or lower min_hops')

  def _draw(self, key: bytes):
    c = self._config
    draw = random.Random(int.from_bytes(hashlib.blake2b(key).digest())).random
    edges, below = grow(c.nodes, c.parents, draw)
    persons = {a for a, _ in edges} - {b for _, b in edges}
    enough = self._config.wording == 'letters' or len(persons) <= len(NAMES)
    found = ask(edges, below, draw) if enough else None
    if found is None or not c.min_hops <= len(found[0]) - 1 <= c.max_hops:
      return None
    path, wrong = found
    return identity(edges, path[0], path[-1], wrong), (edges, path, wrong, draw)

  def counterfactual(self, example: Example, seed: int) -> Example:
    """The graph with its two options in each other's place, so that the other one is right."""
    if self._config.wording == 'letters':
      facts, question = example.question.split(':')
      one, other = question[-2:]
      table = str.maketrans(one + other, other + one)
      return Example(f'{facts.translate(table)}:{question}', tuple(
          step.translate(table) for step in example.steps), example.answer.translate(table))
    facts, _, question = example.question.rpartition('. ')
    options = re.fullmatch(r'Is \w+ an? (\w+) or (\w+)\?', question).groups()
    return Example(f'{_exchanged(facts, *options)}. {question}',
                   tuple(_exchanged(step, *options) for step in example.steps),
                   _exchanged(example.answer, *options))

  def _example(self, drawn: tuple[Edges, list[int], int, Callable[[], float]]) -> Example:
    edges, path, wrong, draw = drawn
    if self._config.wording == 'letters':
      letters = _shuffled(LETTERS, draw)
      options = ''.join(_shuffled((letters[path[-1]], letters[wrong]), draw))
      facts = ','.join(letters[a] + letters[b] for a, b in _shuffled(edges, draw))
      return Example(f'{facts}:{letters[path[0]]}?{options}', tuple(
          letters[a] + letters[b] for a, b in zip(path, path[1:], strict=False)),
          letters[path[-1]])
    children = {b for _, b in edges}
    names, concepts = _shuffled(NAMES, draw), _shuffled(CONCEPTS[:self._config.concepts], draw)
    word = {node: (concepts if node in children else names).pop()
            for node in sorted({n for edge in edges for n in edge})}

    def fact(a: int, b: int) -> str:
      return f"{f'Every {word[a]}' if a in children else word[a]} is a {word[b]}."

    options = _shuffled((word[path[-1]], word[wrong]), draw)
    question = f'Is {word[path[0]]} a {options[0]} or {options[1]}?'
    return Example(' '.join([*(fact(*e) for e in _shuffled(edges, draw)), question]),
                   tuple(fact(a, b) for a, b in zip(path, path[1:], strict=False)),
                   f'{word[path[0]]} is a {word[path[-1]]}.')


def _exchanged(text: str, one: str, other: str) -> str:
  return re.sub(rf'\b({one}|{other})\b', lambda m: other if m[1] == one else one, text)


def grow(nodes: int, parents: float, draw: Callable[[], float]) -> tuple[Edges, list[int]]:
  """Returns edges (a, b), a < b, and for each node 1, 2 or 3: below 0, 1 or both; 0: neither.

  Args:
    nodes: how many.
    parents: mean of a node's number of parents, before it is cut to what there is.
    draw: returns uniform numbers in [0, 1).
  """
  edges, below, depth = [], [1, 2], [0, 0]
  for node in range(2, nodes):
    count, kind = _poisson(parents, draw), draw()
    group = 1 if kind < BELOW[0] else 2 if kind < sum(BELOW) else None
    candidates = [n for n in range(node) if group is None or below[n] == group]
    # Weighted, without replacement: the largest u^(1/w) (Efraimidis and Spirakis 2006).
    order = sorted(candidates, key=lambda n: draw() ** (1 / (1 + DEPTH_WEIGHT * depth[n])))
    chosen = order[len(order) - min(count, len(order)):]
    edges += [(parent, node) for parent in chosen]
    below.append(0)
    for parent in chosen:
      below[node] |= below[parent]
    depth.append(1 + min((depth[p] for p in chosen), default=-1))
  return edges, below


def ask(edges: Edges, below: list[int],
        draw: Callable[[], float]) -> tuple[list[int], int] | None:
  """Returns a shortest path from a person to the right option, and the wrong option.

  None: one of the persons has no leaf of its own.
  """
  leaves = sorted({b for _, b in edges} - {a for a, _ in edges})
  own = [[leaf for leaf in leaves if below[leaf] == person + 1] for person in (0, 1)]
  if not all(own):
    return None
  ways = [_ways(edges, person) for person in (0, 1)]
  hops = [[len(way[leaf]) for leaf in mine] for way, mine in zip(ways, own, strict=True)]
  lead = max(hops[1]) - max(hops[0])
  person = int(lead > 0 or lead == 0 and draw() < 0.5)
  right = [leaf for leaf, n in zip(own[person], hops[person], strict=True)
           if n == max(hops[person])]
  wrong = own[1 - person]
  return ways[person][right[int(draw() * len(right))]], wrong[int(draw() * len(wrong))]


def _ways(edges: Edges, start: int) -> dict[int, list[int]]:
  """A shortest path from `start` to each node it reaches, breadth first."""
  after = {}
  for a, b in edges:
    after.setdefault(a, []).append(b)
  ways, queue = {start: [start]}, [start]
  for node in queue:
    for other in after.get(node, ()):
      if other not in ways:
        ways[other] = [*ways[node], other]
        queue.append(other)
  return ways


def identity(edges: Edges, person: int, right: int, wrong: int) -> str:
  """A text which two problems share if they differ in names and order alone.

  Three rounds of Weisfeiler-Leman refinement: graphs that differ rarely share it, which
  only puts both into one split.
  """
  labels = {n: '' for edge in edges for n in edge}
  labels |= {person: 'p', right: 'r', wrong: 'w'}
  before, after = {n: [] for n in labels}, {n: [] for n in labels}
  for a, b in edges:
    before[b].append(a)
    after[a].append(b)
  for _ in range(3):
    labels = {n: hashlib.blake2b(repr((
        labels[n], sorted(labels[m] for m in before[n]), sorted(labels[m] for m in after[n])
    )).encode(), digest_size=8).hexdigest() for n in labels}
  return ' '.join(sorted(labels.values()))


def _poisson(mean: float, draw: Callable[[], float]) -> int:
  count, product, end = 0, draw(), math.exp(-mean)
  while product > end:
    count, product = count + 1, product * draw()
  return count


def _shuffled(items, draw: Callable[[], float]) -> list:
  # Of the standard library, only `random()` is the same in every version.
  return sorted(items, key=lambda _: draw())
