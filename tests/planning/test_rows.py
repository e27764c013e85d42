"""The rows of a plan: real ones where the data are here, else the largest of a method."""

import json

import pytest

from latent_reasoning import methods
from latent_reasoning.errors import InputError
from latent_reasoning.planning import estimate, plan, rows
from latent_reasoning.train import hardware


@pytest.mark.parametrize('method', [m for m in methods.METHODS if m != 'language_model'])
def test_rows_are_those_that_a_method_reaches(tiny_config, make_run, tmp_path, method):
  """No batch has longer rows, and none is a chain of thought's readout times RiM's count."""
  config = tiny_config(method=method, **{
      'data.buckets.prefix': (12, 24), 'data.buckets.readout': (2, 12, 40),
      'data.buckets.count': (1, 2, 4), 'optim.batch_size': 4})
  planned = rows.largest(config)
  run = make_run(config, tmp_path)
  for step in range(run.curriculum.total):
    assert run.batches.at(step).tokens.shape[1] <= planned.tokens.shape[1]
  assert planned.tokens.shape[1] <= 24 + max(40, 4 * 12)
  later = (planned.loops.passes - 1) * planned.loops.size if planned.loops else 0
  assert planned.prefix - later == 24 and (planned.teacher is not None) == (
      method in ('codi', 'pccot'))


def test_no_problem_fits(tiny_config):
  with pytest.raises(InputError, match='a row needs'):
    rows.largest(tiny_config(**{'data.buckets.prefix': (2,)}))


def test_rows_of_real_batches(tiny_config, make_run, tmp_path):
  """Every width of the training's batches is seen, with its share; the widest is planned."""
  config = tiny_config(**{'optim.stage1.steps': 8, 'optim.stage2.steps': 6})
  run = make_run(config, tmp_path)
  widths = [run.batches.at(step).tokens.shape[1] for step in range(14)]
  _, planned, seen = rows.of(config)
  assert dict(seen) == pytest.approx({w: widths.count(w) / 14 for w in set(widths)})
  assert planned.tokens.shape[1] == max(widths) <= rows.largest(config).tokens.shape[1]
  shown = estimate.planned(config)
  assert list(shown.seen) == seen and shown.batches.at(0).tokens.shape == (8, max(widths))


def test_several_problems_in_a_row(tiny_config):
  """The rows of the largest batch, as many as its problems take; with more problems than a
  sample has, as many more."""
  config = tiny_config(**{'data.packing': True, 'data.arithmetic.min_steps': 1})
  _, planned, _ = rows.of(config)
  assert planned.slots and len(planned.tokens) < 8
  assert estimate.planned(config).batches.at(0).tokens.shape == planned.tokens.shape
  wide = config.replace(**{'optim.batch_size': 2048, 'data.arithmetic.train_size': 4000})
  sample = len(rows.of(wide)[1].tokens)
  assert len(estimate.planned(wide).batches.at(0).tokens) == sample * 2048 // rows.MOST


def test_rows_of_files(tiny_config, tmp_path):
  """A question of three tokens among buckets of 64: what no data reach is not planned."""
  lines = [{'question': f'{a}+{b}', 'steps': [], 'answer': str(a + b)}
           for a in range(5) for b in range(4)]
  (tmp_path / 'train.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  config = tiny_config(**{'method': 'direct', 'data.name': 'files', 'data.dir': str(tmp_path),
                          'data.buckets.prefix': (6, 64), 'data.valid_size': 2,
                          'optim.batch_size': 2})
  assert rows.of(config)[1].prefix == 6 and rows.largest(config).prefix == 64


@pytest.mark.parametrize('changes', [
    {'data.name': 'gsm8k'}, {'data.name': 'files', 'data.dir': 'nowhere'},
    {'model.init_from': 'openai-community/gpt2'}, {'optim.batch_size': 4000}])
def test_without_data_it_is_the_largest(tiny_config, changes):
  """Nothing is fetched to plan, and no data are no error."""
  config = tiny_config(**{'data.valid_size': 2, **changes})
  _, planned, seen = rows.of(config)
  assert seen == [] and planned.tokens.shape == rows.largest(config).tokens.shape


def test_the_table_says_what_was_seen(tiny_config):
  one = {'devices': 1, 'mesh': {'data': 1, 'fsdp': 1, 'tensor': 1}, 'rows': [8, 40],
         'problems': 8, 'rows_seen': [[22, 0.25], [40, 0.75]], 'parameters': 10,
         'trained': 10, 'flops': 1e9, 'model_flops': 1e9, 'collectives': {},
         'expected_collectives': {}, 'unknown_loops': 0, 'refused': False,
         'traffic_bytes': 1e6, 'seconds_to_plan': 1.0,
         **{f'{part}_bytes': 1 for part in ('parameter', 'optimizer', 'gradient', 'temporary',
                                            'activation', 'total')}}
  text = plan.table([one], 'H100', hardware.named('H100'), 80)
  assert 'rows of 40 tokens, the largest of real batches (22 tokens 25%, 40 tokens 75%)' in text
  assert '3 of them for the 8 problems of a batch' in plan.table(
      [{**one, 'rows': [3, 40]}], 'H100', hardware.named('H100'), 80)
  assert 'real batches' not in plan.table([{**one, 'rows_seen': []}], 'H100',
                                          hardware.named('H100'), 80)
