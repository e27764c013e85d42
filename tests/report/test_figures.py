"""Figures: what stands in them, read back from matplotlib; how they look on a page."""

import pathlib
import re

import numpy as np
import pytest

from latent_reasoning import report
from latent_reasoning.report import block_plots, comparison, figures, style
from latent_reasoning.report.runs import Folder

CHANGED = {'lines': [{'name': 'untouched', 'n': 4, 'accuracy': 0.5},
                     {'name': 'swapped', 'n': 4, 'accuracy': 0.5, 'donor': 0.2, 'chance': 0.1}]}
RULES = {'n': 9, 'any': 0.75, 'rules': {'final': {'accuracy': 0.02, 'standard_error': 0.1},
                                        'probe': {'accuracy': 0.5, 'standard_error': 0.1}}}
METRICS = [{'step': s, 'stage': 1 + (s > 2), 'split': split, 'loss': 1.0, 'final': 0.5}
           for s in (1, 2, 3) for split in ('train', 'valid')]


def labels(axis):
  return [text.get_text() for text in axis.texts]


def test_learning():
  """A loss a stage, an accuracy a block, and a line where the stage changes."""
  metrics = [{'step': s, 'stage': 1 + (s > 2), 'split': 'train', 'loss': 1.0 / s}
             for s in (1, 2, 3, 4)]
  metrics += [{'step': s, 'stage': 1 + (s > 2), 'split': 'valid', 'per_block': [0.25, 0.1 * s]}
              for s in (2, 4)]
  left, right = report.learning(
      Folder('rim', pathlib.Path(), {}, {}, metrics, [], {})).figure.axes
  assert [line.get_xydata().tolist() for line in left.lines[:2]] == [
      [[1, 1], [2, 0.5]], [[3, 1 / 3], [4, 0.25]]]
  assert left.lines[2].get_xdata() == [2, 2] and labels(left) == ['stage 2']
  assert right.lines[1].get_ydata() == pytest.approx([20, 40])
  assert right.lines[1].get_label() == 'block 2 (final)'
  assert not left.get_legend() and not right.get_legend()  # outside, where no curve is
  assert [text.get_text() for text in left.figure.legends[0].texts] == [
      'block 1', 'block 2 (final)']


def test_all_of_a_figure_is_on_its_paper():
  """Of a few panels and of many, no text is cut off at an edge."""
  one = {'place': 2, 'moved': np.full(4, 0.5), 'tokens': list('abcd'), 'causal': True,
         'p': (0.5, 0.25)}
  points = np.arange(48.0).reshape(8, 3, 2)
  for picture in (report.leak({'gpt': one}, 'q'), report.leak(dict.fromkeys('abcd', one), 'q'),
                  report.slots('abc', np.ones((1, 3, 4)) / 4, ['layer 1'], True),
                  block_plots.trajectories({'points': points, 'explained': (0.5, 0.25),
                                            'means': points[:2]}, [1000, 3000],
                                           np.array(list('12345678'))),
                  block_plots.interventions(CHANGED), block_plots.block_choice(RULES)):
    figure = picture.figure
    with style.style():
      figure.draw_without_rendering()
      paper, used = figure.bbox, figure.get_tightbbox().transformed(
          figure.dpi_scale_trans)
    assert paper.x0 - 3 <= used.x0 and used.x1 <= paper.x1 + 3, picture
    assert paper.y0 - 3 <= used.y0 and used.y1 <= paper.y1 + 3, picture


def test_learning_before_any_validation():
  found = report.learning(Folder('rim', pathlib.Path(), {}, {}, [
      {'step': 1, 'stage': 1, 'split': 'train', 'loss': 1.0}], [], {}))
  assert not found.figure.axes[1].lines
  assert found.figure.axes[0].lines[0].get_marker() == 'o'  # a single point can be seen


def test_accuracy_and_time():
  """Bars wear their numbers; what reads the future says so."""
  def run(final, causal, *ms):
    return {'causal': causal, 'method': 'x', 'final': {'mean': final, 'error': None},
            'latency': [
        {'batch': b, 'first_ms': b * ms[0], 'full_ms': b * ms[1]} for b in (32, 1)]}
  left, right = report.accuracy_and_time({'runs': {
      'direct': run(0.25, True, 1.5, 2.5), 'odd': run(1.0, False, 3, 4)}}).figure.axes
  assert labels(left) == ['25.0', '100.0'] and labels(right) == ['1.50', '3.00', '2.50', '4.00']
  assert [t.get_text() for t in left.get_yticklabels()] == ['direct', 'odd (NOT CAUSAL)']


def test_adapters():
  """A layer that has no adapter is empty."""
  axis = report.adapters({'qkv': {0: 0.5, 2: 0.25}, 'up': {1: 0.125}}).figure.axes[0]
  assert labels(axis) == ['0.50', '0.25', '0.12']
  assert axis.images[0].get_array().shape == (2, 3)


def test_controls():
  """Lines without problems are left out; only donors have a second number."""
  left, right = block_plots.interventions({'lines': [
      {'name': 'untouched', 'n': 4, 'accuracy': 1.0},
      {'name': 'block 1 transplanted', 'n': 4, 'accuracy': 0.5, 'donor': 0.25, 'chance': 0.1},
      {'name': 'block 2 transplanted', 'n': 0, 'accuracy': None}]}).figure.axes
  assert labels(left) == ['100.0', '50.0'] and labels(right) == ['', '25.0']


def summary(**finals):
  return {'control': 'direct', 'runs': {name: {
      'causal': True, 'method': name, 'seeds': [0], 'final': {'mean': final, 'error': None},
      'per_block': [], 'by_steps': {}, 'parameters': None, 'against': {}, 'scaling': {},
      'serial_layers': None,
      'sizes': dict.fromkeys(comparison.SIZES),
      'latency': [{'batch': 1, 'first_ms': 1.0, 'full_ms': 1.0 + k / 100}]}
      for k, (name, final) in enumerate(finals.items())}}


def test_a_method_has_one_colour():
  """Whatever else is drawn beside it, and none is given twice."""
  one = style.colours({'rim': 'rim', 'direct': 'direct'})
  other = style.colours({'a': 'direct', 'b': 'pause', 'ours': 'rim', 'x': 'new', 'y': 'new'})
  assert one['rim'] == other['ours'] and one['direct'] == other['a']
  assert len(set(other.values())) == 5
  many = style.colours({f'blocks_{k}': 'rim' for k in range(9)})
  assert len(set(many.values())) == 9


@pytest.mark.parametrize('finals', [
    {'direct': 0.44, 'direct_steps': 0.441, 'pause_steps': 0.442, 'rim': 0.99, 'cot': 0.991},
    {f'run_with_a_long_name_{k}': 0.5 for k in range(8)}])
def test_names_beside_points_do_not_overlap(finals):
  chart = next(c for c in figures.comparison(summary(**finals)) if c.name == 'by_latency')
  with style.style():
    chart.picture.figure.draw_without_rendering()
  boxes = [text.get_window_extent() for text in chart.picture.figure.axes[0].texts]
  assert len(boxes) == len(finals)
  for i, one in enumerate(boxes):
    assert not any(one.overlaps(other) for other in boxes[:i])


@pytest.mark.parametrize('pictures', [
    lambda: [chart.picture for chart in figures.comparison(summary(rim=0.5, direct=0.25))],
    lambda: [chart.picture for chart in figures.curves({'rim': [Folder(
        'rim', pathlib.Path(), {}, {}, METRICS, [], {})]})],
    lambda: [block_plots.interventions(CHANGED)],
    lambda: [block_plots.block_choice(RULES)]])
def test_a_dark_page_has_no_black_ink_and_no_white_paper(pictures):
  """Text, lines and what lies under labels follow the colours of the page."""
  found = [picture.svg() for picture in pictures()]
  assert found and not [s for svg in found for s in re.findall(
      r'#(?:000000|ffffff|fff|000)\b|\b(?:black|white)\b', svg)]


def test_the_stage_is_marked_in_curves():
  """By a line that is no line of the grid, with its name."""
  chart, *_ = figures.curves({'rim': [Folder('rim', pathlib.Path(), {}, {}, METRICS, [], {})]})
  axis = chart.picture.figure.axes[0]
  assert labels(axis) == ['stage 2'] and axis.lines[-1].get_color() == style.INK


def test_legend_of_adaptive_reading_is_outside():
  one = {'curve': [{'blocks': b, 'accuracy': 0.25 * b} for b in (1, 2)],
         'chosen': {'blocks': 1.5, 'accuracy': 0.4}}
  figure = block_plots.adaptive({'fixed number': one, 'agreement': one}, [0.1, 0.2]).figure
  with style.style():
    figure.draw_without_rendering()
  assert not any(axis.get_legend() for axis in figure.axes)
  outside = figure.legends[0].get_window_extent()
  assert not any(outside.overlaps(axis.get_window_extent()) for axis in figure.axes)


def test_names_of_means_do_not_overlap():
  """Means that lie on each other, as those of a model that has learned little."""
  found = {'points': np.zeros((6, 4, 2)) + np.arange(24).reshape(6, 4, 1),
           'means': np.full((2, 4, 2), 0.1) + 1e-4 * np.arange(4)[:, None],
           'explained': (0.6, 0.2)}
  figure = block_plots.trajectories(found, [5, 9], np.array(list('123123'))).figure
  with style.style():
    figure.draw_without_rendering()
  last, first = figure.axes[-1], figure.axes[0]
  boxes = [text.get_window_extent() for text in last.texts]
  assert sorted(labels(last)) == ['block 1', 'block 2', 'block 3', 'block 4']
  assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
  assert np.ptp(last.get_xlim()) < np.ptp(first.get_xlim()) / 100  # a scale of its own
  for low, high in (first.get_xlim(), first.get_ylim()):
    assert low < found['points'].min() and high > found['points'].max()
  assert {(*a.get_xlim(), *a.get_ylim()) for a in figure.axes[:-1]} == {
      (*first.get_xlim(), *first.get_ylim())}


def test_probes_of_steps_that_few_problems_have():
  """The rest is drawn, and no 'nan' stands anywhere."""
  accuracy = np.stack([np.full((2, 3), 0.5), np.full((2, 3), np.nan)])
  found = {'accuracy': accuracy, 'commonest': np.array([0.25, np.nan])}
  titles = [axis.get_title() for axis in block_plots.probes(found).figure.axes]
  assert titles == ['result of step 1\n(commonest value: 25%)',
                    'result of step 2\n(too few problems)']


def test_svg_of_a_page():
  """No name, no address, no style of its own: many stand on one page, in its colours; text
  is text, and what spells markup or mathematics stays what it is."""
  evil = '<script>$x$ & "y" -->'
  found = figures.comparison(summary(**{evil: 0.5, 'rim': 0.25}))[0].picture.svg()
  assert found.startswith('<svg viewBox=') and found.rstrip().endswith('</svg>')
  assert not re.search(r'http|<style|<metadata|<script|<!--', found)
  assert 'currentColor' in found and style.INK not in found
  assert '&lt;script&gt;$x$ &amp;' in found
