"""Figures of masks: the mask of a row as drawn by hand, leaks where they are."""

import jax
import numpy as np
import pytest

from latent_reasoning import report
from latent_reasoning.analysis import mask_plots
from latent_reasoning.data.example import Example
from latent_reasoning.errors import InputError

pytestmark = pytest.mark.usefixtures('quick_compilation')
ONE_LAYER = {'model.num_layers': 1}
TEXT = 'to be or not'


def test_row_of_rim(tiny_config, make_run, tmp_path):
  """Tokens, targets, parts and mask of a short row, by hand."""
  run = make_run(tiny_config(**ONE_LAYER), tmp_path)
  found = mask_plots.row(run, Example('1+2', ('1+2=3', '3-1=2'), '2'))
  assert found['tokens'] == [*'1+2\n', *['<b>', '<m>', '</b>'] * 2, *'3-1=2', '2']
  assert found['parts'] == [('question', 0, 4), ('block 1', 4, 7), ('block 2', 7, 10),
                            ('readout 1', 10, 15), ('readout 2', 15, 16)]
  assert found['predicts'] == [*[''] * 6, '3', '', '', '2', *'-1=2', '<end>', '<end>']
  expected = np.tril(np.ones((16, 16), bool))
  expected[10:15, 7:10] = False  # the first readout sees no second block,
  expected[15, 10:15] = False  # and none sees another
  np.testing.assert_array_equal(found['allowed'], expected)


@pytest.mark.parametrize('method', ['direct', 'cot', 'pause'])
def test_row_of_others(tiny_config, make_run, tmp_path, method):
  """Causal, and every token of the row in one part."""
  run = make_run(tiny_config(method=method, **ONE_LAYER), tmp_path)
  found = mask_plots.row(run, Example('1+2', ('1+2=3', '3-1=2'), '2'))
  n = len(found['tokens'])
  np.testing.assert_array_equal(found['allowed'], np.tril(np.ones((n, n), bool)))
  assert [p[1:] for p in found['parts']] == list(zip(
      [0, *(p[2] for p in found['parts'][:-1])], [p[2] for p in found['parts']], strict=True))
  assert found['parts'][-1][2] == n and found['predicts'][-1] == '<end>'


@pytest.fixture(scope='module')
def texts(tiny_config, make_run, tmp_path_factory):
  """Makes a language model's run with a write policy, and parameters larger than fresh ones."""
  file = tmp_path_factory.mktemp('text') / 'file'
  file.write_text('to be or not to be, that is the question. ' * 6)

  def make(write):
    run = make_run(tiny_config(**{
        'method': 'language_model', 'data.name': 'text', 'data.path': str(file),
        'data.seq_len': 12,
        'imm.write_policy': write, 'optim.stage2.steps': 0, **ONE_LAYER}),
        tmp_path_factory.mktemp('run'))
    return run, jax.tree.map(lambda a: 2 * a, run.init().params)
  return make


@pytest.mark.integration
@pytest.mark.parametrize('write', ['', 'gated', 'prefix_mean', 'sequence_mean'])
def test_moved(texts, write):
  """Predictions before the changed token move where the future is read, and only there;
  those from it on always do."""
  run, params = texts(write)
  found = mask_plots.prediction_shift(run, params, TEXT, 7, 'x')
  assert ''.join(found['tokens']) == TEXT and found['causal'] == run.config.causal
  before, after = found['moved'][:7], found['moved'][7:]
  assert (after > 1e-3).any() and (found['moved'] <= 1).all()
  if found['causal']:
    assert (before == 0).all() and found['p'][0] == found['p'][1]
  else:
    assert before.max() > 1e-3 and found['p'][0] != found['p'][1]


@pytest.mark.parametrize('place, other', [(0, 'x'), (12, 'x'), (3, 'xy'), (1, 'o')])
def test_what_cannot_be_changed(texts, place, other):
  run, params = texts('')
  with pytest.raises(InputError, match='one token that is another'):
    mask_plots.prediction_shift(run, params, TEXT, place, other)


@pytest.mark.integration
def test_figures(tiny_config, make_run, tmp_path, texts):
  """Both are drawn, also of tokens that mean something to matplotlib."""
  run = make_run(tiny_config(**ONE_LAYER), tmp_path / 'run')
  row = mask_plots.row(run, Example('$1+2$', ('1+2=3', '3-1=2'), '2'))
  found = {name: mask_plots.prediction_shift(*texts(name), 'to be $r no', 7, '$')
           for name in ('gated', 'sequence_mean')}
  for picture in (report.mask(row), report.leak(found, '$')):
    assert picture._repr_png_().startswith(b'\x89PNG')
