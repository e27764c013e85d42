"""Figures that no other test draws: what stands in them, read back from matplotlib."""

import pathlib

import pytest

from latent_reasoning import report
from latent_reasoning.report import block_plots, figures
from latent_reasoning.report.runs import Folder

pytest.importorskip('matplotlib')


@pytest.fixture
def drawn(monkeypatch, tmp_path):
  """Keeps the axes of the figure that is saved, instead of saving it."""
  kept = []
  def save(pyplot, drawing, file):
    drawing.tight_layout()
    kept.extend(drawing.axes)
    pyplot.close(drawing)
    return file
  for module in (figures, block_plots):
    monkeypatch.setattr(module, 'save', save)
  return kept


def labels(axis):
  return [text.get_text() for text in axis.texts]


def test_learning(drawn, tmp_path):
  """A loss a stage, an accuracy a block, and a line where the stage changes."""
  metrics = [{'step': s, 'stage': 1 + (s > 2), 'split': 'train', 'loss': 1.0 / s}
             for s in (1, 2, 3, 4)]
  metrics += [{'step': s, 'stage': 1 + (s > 2), 'split': 'valid', 'per_block': [0.25, 0.1 * s]}
              for s in (2, 4)]
  report.learning(tmp_path, Folder('rim', pathlib.Path(), {}, {}, metrics, [], {}))
  left, right = drawn
  assert [line.get_xydata().tolist() for line in left.lines[:2]] == [
      [[1, 1], [2, 0.5]], [[3, 1 / 3], [4, 0.25]]]
  assert left.lines[2].get_xdata() == [2, 2] and labels(left) == ['stage 2 ']
  assert right.lines[1].get_ydata() == pytest.approx([20, 40])
  assert right.lines[1].get_label() == 'block 2 (final)'


def test_learning_before_any_validation(drawn, tmp_path):
  report.learning(tmp_path, Folder('rim', pathlib.Path(), {}, {}, [
      {'step': 1, 'stage': 1, 'split': 'train', 'loss': 1.0}], [], {}))
  assert not drawn[1].lines


def test_accuracy_and_time(drawn, tmp_path):
  """Bars wear their numbers; what reads the future says so."""
  def run(final, causal, *ms):
    return {'causal': causal, 'final': {'mean': final, 'error': None}, 'latency': [
        {'batch': b, 'first_ms': b * ms[0], 'full_ms': b * ms[1]} for b in (32, 1)]}
  report.accuracy_and_time(tmp_path, {'runs': {
      'direct': run(0.25, True, 1.5, 2.5), 'odd': run(1.0, False, 3, 4)}})
  left, right = drawn
  assert labels(left) == ['25.0', '100.0'] and labels(right) == ['1.50', '3.00', '2.50', '4.00']
  assert [t.get_text() for t in left.get_yticklabels()] == ['direct', 'odd (NOT CAUSAL)']


def test_adapters(drawn, tmp_path):
  """A layer that has no adapter is empty."""
  report.adapters(tmp_path, {'qkv': {0: 0.5, 2: 0.25}, 'up': {1: 0.125}})
  assert labels(drawn[0]) == ['0.50', '0.25', '0.12']
  assert drawn[0].images[0].get_array().shape == (2, 3)


def test_controls(drawn, tmp_path):
  """Lines without problems are left out; only donors have a second number."""
  block_plots.interventions(tmp_path, {'lines': [
      {'name': 'untouched', 'n': 4, 'accuracy': 1.0},
      {'name': 'block 1 transplanted', 'n': 4, 'accuracy': 0.5, 'donor': 0.25, 'chance': 0.1},
      {'name': 'block 2 transplanted', 'n': 0, 'accuracy': None}]})
  assert labels(drawn[0]) == ['100.0', '50.0'] and labels(drawn[1]) == ['', '25.0']
