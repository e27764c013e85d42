"""Generated graphs: right, deterministic, disjoint, and like the published problems."""

import collections
import dataclasses
import json
import re
import statistics

import pytest

from latent_reasoning.config import GraphConfig
from latent_reasoning.data import formats, prosqa
from latent_reasoning.data.example import Example
from latent_reasoning.data.prosqa import Graphs
from latent_reasoning.data.synthetic import split_of
from latent_reasoning.errors import InputError

CONFIG = GraphConfig(min_hops=3, max_hops=6, nodes=28, parents=1.5, concepts=38,
                     train_size=400, valid_size=100, test_size=100)


def replaced(**changes):
  return dataclasses.replace(CONFIG, **changes)


@dataclasses.dataclass
class Read:
  """A problem read by a parser that shares nothing with the generator."""
  edges: list
  person: str
  options: tuple
  right: str
  wrong: str
  after: dict
  before: dict


def read(example: Example) -> Read:
  *facts, question = re.split(r'(?<=\.) ', example.question)
  edges = [re.fullmatch(r'(?:Every )?(\w+) is a (\w+)\.', f).groups() for f in facts]
  person, *options = re.fullmatch(r'Is (\w+) a (\w+) or (\w+)\?', question).groups()
  right = re.fullmatch(rf'{person} is a (\w+)\.', example.answer)[1]
  wrong, = set(options) - {right}
  after, before = collections.defaultdict(set), collections.defaultdict(set)
  for a, b in edges:
    after[a].add(b)
    before[b].add(a)
  for fact, (a, _) in zip(facts, edges, strict=True):
    assert fact.startswith('Every ') == a.islower()
  return Read(edges, person, tuple(options), right, wrong, after, before)


def distances(problem: Read, start: str) -> dict[str, int]:
  found, queue = {start: 0}, [start]
  for node in queue:
    for other in problem.after[node]:
      if other not in found:
        found[other] = found[node] + 1
        queue.append(other)
  return found


@pytest.mark.parametrize('config, seed', [
    (CONFIG, 0), (CONFIG, 2**40), (replaced(min_hops=1, max_hops=2, nodes=8, concepts=6), 1)])
def test_steps_lead_to_the_right_option_and_nothing_to_the_wrong_one(config, seed):
  for example in Graphs(config, seed, 'train')[:150]:
    problem = read(example)
    assert len(set(problem.edges)) == len(problem.edges)
    reached = distances(problem, problem.person)
    assert config.min_hops <= len(example.steps) <= config.max_hops
    assert reached[problem.right] == len(example.steps), 'not a shortest path'
    assert problem.wrong not in reached
    node = problem.person
    for step in example.steps:
      a, b = re.fullmatch(r'(?:Every )?(\w+) is a (\w+)\.', step).groups()
      assert a == node and b in problem.after[a] and step in example.question
      node = b
    assert node == problem.right
    # Neither option gives itself away: both are leaves, and some person reaches each.
    others = {n for n in problem.after if n[0].isupper()} - {problem.person}
    assert not problem.after[problem.right] and not problem.after[problem.wrong]
    assert any(problem.wrong in distances(problem, other) for other in others)
    # Persons have no parents, concepts have.
    assert all(bool(problem.before[n]) == n.islower() for e in problem.edges for n in e)


def test_no_cycles():
  for example in Graphs(CONFIG, 3, 'valid')[:50]:
    problem = read(example)
    for node in list(problem.after):
      assert node not in set().union(
          *(distances(problem, child) for child in problem.after[node]))


def test_the_first_problem_stays_what_it_was():
  # A change of the generator changes every published number; it must be meant.
  tiny = replaced(min_hops=2, max_hops=2, nodes=7, concepts=5)
  assert Graphs(tiny, 0, 'train')[0] == Example(
      'Every brimpus is a boompus. Every boompus is a dumpus. Every brimpus is a dumpus. '
      'Fae is a fompus. Fae is a bompus. Every fompus is a bompus. Carol is a brimpus. '
      'Is Carol a dumpus or bompus?',
      ('Carol is a brimpus.', 'Every brimpus is a dumpus.'), 'Carol is a dumpus.')


def test_item_depends_on_seed_split_and_index_alone():
  first, again = (Graphs(CONFIG, 3, 'train') for _ in range(2))
  assert first[7] == again[7] == Graphs(replaced(train_size=8), 3, 'train')[-1]
  assert first[:20] == again[:20] != Graphs(CONFIG, 4, 'train')[:20]
  assert len(set(first[:50])) == 50 and len(first) == 400
  with pytest.raises(IndexError):
    first[400]


def relabelled(edges, order):
  return [(order[a], order[b]) for a, b in edges]


def test_identity_is_of_the_graph_and_the_question():
  edges = [(0, 2), (2, 3), (1, 4), (3, 5), (0, 4), (4, 6)]
  order = [6, 3, 0, 5, 2, 1, 4]
  same = prosqa.identity(relabelled(edges, order)[::-1], order[0], order[5], order[6])
  assert prosqa.identity(edges, 0, 5, 6) == same
  assert prosqa.identity(edges, 0, 6, 5) != same
  assert prosqa.identity(edges, 1, 5, 6) != same
  assert prosqa.identity([*edges[:-1], (3, 6)], 0, 5, 6) != same


def test_splits_are_disjoint_across_seeds_and_names():
  config = replaced(min_hops=1, max_hops=3, nodes=8, concepts=6)
  seen = {}
  for seed in (0, 1):
    for split in ('train', 'valid', 'test'):
      for example in Graphs(config, seed, split)[:100]:
        problem = read(example)
        identity = prosqa.identity(problem.edges, problem.person, problem.right,
                                   problem.wrong)
        assert split_of(identity) == split
        assert seen.setdefault(identity, split) == split
  assert len(seen) < 500, 'no graph came twice, so nothing was tested'


def test_a_space_without_problems_is_refused_at_the_door():
  with pytest.raises(InputError, match='no train problem.*too few; enlarge'):
    Graphs(replaced(min_hops=9, max_hops=9, nodes=12), 0, 'train')


@pytest.mark.parametrize('concepts', [25, 39])
def test_there_must_be_words_for_all_nodes(concepts):
  with pytest.raises(InputError, match=f'concepts is {concepts}; expected 26 .* to 38'):
    Graphs(replaced(concepts=concepts), 0, 'train')


def measures(examples):
  """What could tell two sources of problems apart, or give answers away."""
  rows = [(e, read(e)) for e in examples]
  def mean(f):
    return statistics.mean(f(e, p) for e, p in rows)
  def parents(p, node):
    return len(p.before[node])
  return {
      'sentences': mean(lambda e, p: len(p.edges)),
      'nodes': mean(lambda e, p: len({n for edge in p.edges for n in edge})),
      'persons': mean(lambda e, p: sum(n[0].isupper() for n in list(p.after)
                                       if p.after[n])),
      'hops': mean(lambda e, p: len(e.steps)),
      **{f'{n} hops': mean(lambda e, p, n=n: len(e.steps) == n) for n in (3, 4, 5, 6)},
      'reached': mean(lambda e, p: len(distances(p, p.person))),
      'right first': mean(lambda e, p: p.options[0] == p.right),
      'facts of the person': mean(lambda e, p: len(p.after[p.person])),
      'leaves': mean(lambda e, p: sum(not p.after[n] for n in list(p.before)
                                      if p.before[n])),
      # Shortcuts: share of problems where the guess is right, ties as halves.
      'fewer parents': mean(lambda e, p: _beats(parents(p, p.wrong), parents(p, p.right))),
      'said earlier': mean(lambda e, p: _beats(e.question.index(f'a {p.wrong}.'),
                                               e.question.index(f'a {p.right}.'))),
      'farther from its persons': mean(lambda e, p: _beats(_depth(p, p.right),
                                                           _depth(p, p.wrong)))}


def _beats(a, b):
  return (a > b) + (a == b) / 2


def _depth(problem, node):
  return min(distances(problem, n)[node] for n in list(problem.after)
             if n[0].isupper() and node in distances(problem, n))


def published(shared_data, data_config):
  return [e for name in ('valid', 'test')
          for e in formats.read(shared_data / f'prosqa/{name}.json', data_config)[0]]


def test_statistics_are_those_of_the_published_files(shared_data, data_config):
  ours = measures(Graphs(CONFIG, 0, 'train')[:400])
  theirs = measures(published(shared_data, data_config))
  print(json.dumps({k: (round(theirs[k], 3), round(ours[k], 3)) for k in ours}))
  for name, value in ours.items():
    # Shares of 400 and 800 problems vary by 0.03; the rest by less than a fortieth.
    assert value == pytest.approx(theirs[name], rel=0.05, abs=0.08), name


def test_words_are_those_of_the_published_files(shared_data, data_config):
  words = {w for e in published(shared_data, data_config)
           for edge in read(e).edges for w in edge}
  assert words == {*prosqa.NAMES, *prosqa.CONCEPTS}
  assert len(prosqa.CONCEPTS) == 38 == len(set(prosqa.CONCEPTS))


def read_letters(example: Example) -> Read:
  facts, person, one, other = re.fullmatch(r'([a-z,]+):([a-z])\?([a-z])([a-z])',
                                           example.question).groups()
  edges, right = [tuple(pair) for pair in facts.split(',')], example.answer
  after, before = collections.defaultdict(set), collections.defaultdict(set)
  for a, b in edges:
    after[a].add(b)
    before[b].add(a)
  wrong, = {one, other} - {right}
  return Read(edges, person, (one, other), right, wrong, after, before)


def test_letters():
  """Each problem, its counterfactual too: the steps lead to the right option, a shortest way,
  and nothing leads to the wrong one."""
  graphs = Graphs(replaced(wording='letters', nodes=14, min_hops=2, max_hops=4), 0, 'test')
  for i, example in enumerate(graphs[:40]):
    other = graphs.counterfactual(example, i)
    assert read_letters(other).right == read_letters(example).wrong
    for one in (example, other):
      problem = read_letters(one)
      assert all(b in problem.after[a] for a, b in one.steps)
      assert [a for a, _ in one.steps] == [problem.person, *(b for _, b in one.steps[:-1])]
      reached = distances(problem, problem.person)
      assert reached[problem.right] == len(one.steps) and problem.wrong not in reached
  with pytest.raises(InputError, match='at most 26'):
    Graphs(replaced(wording='letters', nodes=27), 0, 'test')


def test_counterfactual():
  """The other option is reached, by as many steps, and the first one is not any more."""
  graphs = Graphs(CONFIG, 0, 'test')
  for i, example in enumerate(graphs[:40]):
    old, other = read(example), graphs.counterfactual(example, i)
    new = read(other)
    assert new.options == old.options and (new.right, new.wrong) == (old.wrong, old.right)
    reached = distances(new, new.person)
    assert reached[new.right] == len(other.steps) and new.wrong not in reached
    assert other.steps[-1].endswith(f' a {new.right}.')
