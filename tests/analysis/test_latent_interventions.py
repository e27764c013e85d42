"""Interventions on latents of every method: what must change nothing, and what something."""

import re

import jax
import numpy as np
import pytest

from latent_reasoning import methods, report
from latent_reasoning.analysis import latent_interventions
from latent_reasoning.data.example import Example
from latent_reasoning.errors import InputError

pytestmark = pytest.mark.usefixtures('quick_compilation')
QUESTIONS = ['1+2*3', '4-1+2', '5*5+1', '7+0*0']  # of one length
CASES = {
    'rim': {}, 'rim, scanned': {'model.scan': True, 'rim.block_attention': 'bidirectional'},
    'pause': {'method': 'pause', 'baselines.pause_tokens': 3},
    'coconut': {'method': 'coconut', 'baselines.parts': 3},
    'codi': {'method': 'codi', 'baselines.latents': 3, 'model.scan': True},
    'pccot': {'method': 'pccot', 'baselines.latents': 3, 'baselines.rounds': 2},
    'lotus': {'method': 'lotus', 'baselines.parts': 3, 'baselines.latents': 2},
    'rim_parallel': {'method': 'rim_parallel'}}


@pytest.fixture(scope='module', params=[
    pytest.param(case, marks=pytest.mark.integration) for case in CASES])
def predictor(request, tiny_config, make_run, tmp_path_factory):
  config = tiny_config(**{'model.num_layers': 2, 'eval.max_new_tokens': 4,
                          **CASES[request.param]})
  run = make_run(config, tmp_path_factory.mktemp('run'))
  return run.predictor(jax.tree.map(lambda a: 6 * a, run.init().params))


@pytest.fixture(scope='module')
def own(predictor):
  lengths = [len(predictor.tokenizer.question(q)) for q in QUESTIONS]
  rows = [predictor.row(q) for q in QUESTIONS]
  return latent_interventions.asked(predictor, rows, lengths, 4)


def said(predictor, own, edit=None):
  return np.asarray(predictor.generate(own.rows, edit=edit))[:, 0]


def test_states_that_are_their_own_change_nothing(predictor, own):
  """Answers are those of ordinary decoding, and so are those of states put back where they
  were; what is put in is what is read."""
  plain = np.asarray(predictor.generate([predictor.row(q) for q in QUESTIONS]))[:, -1]
  np.testing.assert_array_equal(said(predictor, own), plain)
  assert len(np.unique(plain)) > 3
  np.testing.assert_array_equal(said(predictor, own, own.edit('swap')), plain)


def test_others_states_change_something(predictor, own):
  plain = said(predictor, own)
  changes = {'zero': own.edit('zero'), 'noise': own.edit('noise'), 'mean': own.edit('mean'),
             'swap': own.edit('swap', row=np.array([2, 3, 0, 1])),
             'order': own.edit('swap', order=np.tile(np.roll(np.arange(own.at.shape[1]), 1),
                                                     (4, 1)))}
  found = {name: said(predictor, own, edit) for name, edit in changes.items()}
  same = [name for name, tokens in found.items() if (tokens == plain).all()]
  assert not {'zero', 'noise', 'swap'} & {*same} and len(same) < 2, same


def test_parts_and_layers(predictor, own):
  """A change of no layer changes nothing; keys and values of both layers are all of it."""
  plain, whole = said(predictor, own), said(predictor, own, own.edit('zero'))
  np.testing.assert_array_equal(said(predictor, own, own.edit('zero', layer=7)), plain)
  one = [said(predictor, own, own.edit('zero', layer=layer)) for layer in (0, 1)]
  keys, values = (said(predictor, own, own.edit('zero', parts=p)) for p in 'kv')
  assert any((a != whole).any() for a in (*one, keys, values))
  assert any((a != plain).any() for a in (*one, keys, values))


@pytest.mark.integration
def test_whole(predictor):
  """Every line and every part of the verdict is of all problems, in a table and a sentence."""
  examples = [Example(q, (), str(i)) for i, q in enumerate(QUESTIONS * 2)]
  found = latent_interventions.tests(
      predictor, examples, 'numeric', lambda e, seed: Example(e.question[::-1], (), '3'))
  lines = {line['name']: line for line in found['lines']}
  assert lines['latents untouched']['changed'] == 0 and lines['zeros']['n'] == 8
  assert set(found['verdict']) == {'necessity', 'sufficiency', 'selectivity', 'following'}
  for one in found['verdict'].values():
    assert one['share'] is None or 0 <= one['low'] <= one['share'] <= one['high'] <= 1
  rows = report.verdict(found)
  assert [row[0] for row in rows[-2:]] == ['Pass@8', 'Maj@8'] and len(rows) == 7
  found['method'] = 'rim'
  assert report.verdict_words(found)


@pytest.mark.parametrize('share, low, high, words', [
    (0.9, 0.8, 0.95, 'do the work'), (0.1, 0.05, 0.2, 'not do all'), (0.5, 0.4, 0.6, 'decide')])
def test_verdict(share, low, high, words):
  """By the whole interval; a share of changes that should be few is read the other way."""
  found = {'method': 'rim', 'n': 10, 'noise': {'size': 1, 'draws': 8, 'pass': 1, 'majority': 1},
           'verdict': {'necessity': {'share': share, 'low': low, 'high': high, 'n': 9,
                                     'threshold': 0.5}}}
  assert words in report.verdict_words(found)
  found['verdict'] = {'selectivity': {'share': 1 - share, 'low': 1 - high, 'high': 1 - low,
                                      'n': 9, 'threshold': 0.5}}
  assert words in report.verdict_words(found)


def test_what_is_undecided():
  """The tests whose intervals have what is asked are named; one that fails is said alone."""
  one = {'share': 0.5, 'low': 0.4, 'high': 0.6, 'n': 9, 'threshold': 0.5}
  good, bad = ({**one, 'low': at, 'high': at} for at in (0.9, 0.1))
  found = {'method': 'rim', 'verdict': {'necessity': good, 'sufficiency': one}}
  assert 'decide: sufficiency may hold' in report.verdict_words(found)
  found['verdict']['following'] = bad
  text = report.verdict_words(found)
  assert 'following fails' in text and 'sufficiency' not in text
  for lines, little in (([], False), ([{'accuracy': 0.9}], False), ([{'accuracy': 0.2}], True)):
    said = report.verdict_words({**found, 'lines': lines})
    assert said.startswith(text) and ('answers 20.0% right' in said) == little


def test_share():
  """Exact intervals, and nothing is no share."""
  assert latent_interventions.share([], 0.5)['share'] is None
  one = latent_interventions.share([True] * 10, 0.5)
  assert one['share'] == one['high'] == 1 and one['low'] == pytest.approx(0.025 ** 0.1)


@pytest.mark.parametrize('changes, words', [
    ({'method': 'cot'}, 'no blocks, pause tokens or latents; expected one that has: rim, '),
    ({'rim.passes': 2}, 'could be read again'),
    ({'method': 'icot'}, 'no blocks, pause tokens or latents'),
    ({'imm.write_policy': 'gated'}, 'banks would carry'),
    ({'rim.readout_sees_question': False}, 'cannot be read again')])
def test_refused(tiny_config, changes, words):
  with pytest.raises(InputError, match=re.escape(words)):
    latent_interventions.require(tiny_config(**changes))


def test_every_method_with_latents_is_known():
  """What a prompt adds to a question is counted by a key, or is blocks."""
  plain = ('direct', 'direct_steps', 'cot', 'icot', 'language_model')
  assert {name for name, one in methods.METHODS.items()
          if not (one.has_blocks or one.counts)} == {*plain}
