"""Logs: lines of JSON that resume cleanly, events, and a bar or lines to watch."""

import io
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from latent_reasoning.train import metrics
from latent_reasoning.train.metrics import Metrics, Progress
from latent_reasoning.train.workdir import Workdir


@pytest.fixture
def workdir(tmp_path):
  return Workdir(tmp_path)


def write(workdir, start, *steps, **values):
  log = Metrics(workdir, start)
  for step in steps:
    log.write(step, 1, 'train', loss=float(step), **values)
  log.close()


def steps(workdir):
  return [r['step'] for r in metrics.read(workdir.metrics)]


def strict(text):
  """Parses JSON as the standard has it: no NaN, no Infinity."""
  def refuse(constant):
    raise ValueError(constant)
  return json.loads(text, parse_constant=refuse)


def test_one_object_a_line(workdir):
  """Step, stage, split and values, in this order; lists are kept."""
  log = Metrics(workdir, 0)
  log.write(3, 2, 'valid', final=0.5, per_block=[0.25, 0.5], n=4)
  text = workdir.metrics.read_text()  # before closing: a reader need not wait
  log.close()
  assert text == ('{"step": 3, "stage": 2, "split": "valid", "final": 0.5, '
                  '"per_block": [0.25, 0.5], "n": 4}\n')


def test_lines_after_the_resumed_step_are_dropped(workdir):
  """Going back to step 3 forgets 4 and 5, keeps 3, and goes on with 4."""
  write(workdir, 0, 1, 2, 3, 4, 5)
  write(workdir, 3, 4)
  assert steps(workdir) == [1, 2, 3, 4]
  write(workdir, 0)
  assert steps(workdir) == []


def test_old_lines_are_not_changed(workdir):
  """Resuming leaves the lines it keeps byte for byte."""
  write(workdir, 0, 1, 2, rate=1e-17, name='é')
  before = workdir.metrics.read_bytes()
  write(workdir, 2)
  assert workdir.metrics.read_bytes() == before


@pytest.mark.parametrize('tail', ['{"step": 3, "sta', '{', '"', '{"step": 3, "x": 1.'])
def test_last_line_that_was_cut_off(workdir, tail):
  """A killed writer leaves half a line: it is left out, and the next is whole."""
  write(workdir, 0, 1, 2)
  with workdir.metrics.open('a') as file:
    file.write(tail)
  assert steps(workdir) == [1, 2]
  write(workdir, 2, 3)
  assert steps(workdir) == [1, 2, 3]
  for line in workdir.metrics.read_text().splitlines():
    strict(line)


def test_what_is_not_finite_is_text(workdir):
  """nan and inf are written as strings, so that every JSON reader reads the file."""
  log = Metrics(workdir, 0)
  log.write(1, 1, 'train', a=math.nan, b=math.inf, c=-math.inf, d=jnp.float32(math.nan))
  log.close()
  record = strict(workdir.metrics.read_text())
  assert [record[k] for k in 'abcd'] == ['nan', 'inf', '-inf', 'nan']


def test_device_scalars_become_numbers(workdir):
  """JAX and NumPy scalars are plain numbers in the file."""
  log = Metrics(workdir, 0)
  log.write(1, 1, 'train', a=jnp.float32(0.5), b=np.float64(0.25), c=np.int32(3))
  log.close()
  record = strict(workdir.metrics.read_text())
  assert (record['a'], record['b'], record['c']) == (0.5, 0.25, 3)


def test_events_are_written(workdir):
  """TensorBoard finds a file with the scalars' names."""
  write(workdir, 0, 1)
  file, = workdir.events.iterdir()
  data = file.read_bytes()
  assert b'train/loss' in data


class Stream(io.StringIO):
  def __init__(self, terminal):
    super().__init__()
    self.isatty = lambda: terminal


def test_plain_lines_where_there_is_no_terminal():
  """A line every `every` steps and one at the end, without control characters."""
  stream = Stream(False)
  progress = Progress(7, 0, 3, stream=stream)
  for step in range(1, 8):
    progress.update(step, 1, 0.5)
  progress.say('word')
  progress.close()
  text = stream.getvalue()
  found = text.splitlines()
  assert [line.split(' stage')[0] for line in found] == ['step 3/7', 'step 6/7', 'step 7/7',
                                                         'word']
  assert all('loss 0.5000' in line and 'steps/s' in line for line in found[:3])
  assert '\r' not in text and '\x1b' not in text


def test_rate_counts_from_where_it_resumed(monkeypatch):
  """After resuming at 100, two steps in two seconds are one a second."""
  now = iter([10.0, 12.0])
  monkeypatch.setattr(metrics.time, 'monotonic', lambda: next(now))
  stream = Stream(False)
  progress = Progress(200, 100, 2, stream=stream)
  progress.update(102, 1, 0.5)
  assert '1.0 steps/s 98 s left' in stream.getvalue()


def test_slow_steps_are_not_silent(monkeypatch):
  """A line comes before its step where there was none for long, with the seconds of a step."""
  now = iter([0.0, 20.0, 40.0, 60.0, 80.0])
  monkeypatch.setattr(metrics.time, 'monotonic', lambda: next(now))
  stream = Stream(False)
  progress = Progress(50, 0, 25, stream=stream)
  for step in range(1, 5):
    progress.update(step, 1, 0.5)
  found = stream.getvalue().splitlines()
  assert [line.split(' stage')[0] for line in found] == ['step 2/50', 'step 4/50']
  assert '20.0 s a step 960 s left' in found[0]


class Notebook(Stream):
  __module__ = 'ipykernel.iostream'


@pytest.mark.parametrize('stream', [Stream(True), Notebook(False)],
                         ids=['terminal', 'notebook'])
def test_bar(stream):
  """A bar with the count, the stage and the loss; lines go above it."""
  progress = Progress(10, 4, 3, stream=stream)
  for step in range(5, 11):
    progress.update(step, 2, 0.25)
  progress.say('word')
  progress.close()
  text = stream.getvalue()
  assert '\r' in text and '10/10' in text and 'word\n' in text
  assert 'loss=0.2500' in text and 'stage 2' in text


def test_seconds():
  """Steps over steps a second, interval by interval; validation lines count nothing."""
  def line(step, rate, split='train'):
    return {'step': step, 'split': split, 'steps_per_second': rate}
  records = [line(50, 10.0), line(50, 1.0, 'valid'), line(100, 25.0), line(130, 5.0)]
  assert metrics.seconds(records) == pytest.approx(5 + 2 + 6)
  assert metrics.seconds([]) == 0


def test_seconds_after_resuming(workdir):
  """What was trained twice counts once: its lines are dropped when the run goes on."""
  write(workdir, 0, 10, 20, 30, steps_per_second=10.0)
  whole = metrics.seconds(metrics.read(workdir.metrics))
  write(workdir, 15, 20, 30, steps_per_second=10.0)
  assert metrics.seconds(metrics.read(workdir.metrics)) == pytest.approx(whole) == 3
