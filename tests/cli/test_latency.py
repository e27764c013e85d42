"""Timing of finished runs."""

import json

import pytest

from latent_reasoning.cli import latency
from latent_reasoning.eval import latency as eval_latency
from latent_reasoning.train import trainer


@pytest.mark.integration
def test_a_finished_run_is_timed(tiny_config, make_run, tmp_path, monkeypatch, capsys):
  """From its folder alone, with as many tokens as its chains of thought had."""
  config = tiny_config(**{
      'method': 'cot', 'model.num_layers': 1, 'model.max_positions': 64,
      'optim.stage1.steps': 1, 'optim.stage2.steps': 0, 'eval.valid_problems': 4})
  run = make_run(config, tmp_path / 'cot-0')
  place = [str(tmp_path / 'cot-0'), f'--out={tmp_path}/latency.json']
  assert latency.main(place) == 2 and 'results.json' in capsys.readouterr().err
  run.workdir.results.write_text('{"tokens": {"median": 9}}')
  assert latency.main(place) == 2 and 'no checkpoint' in capsys.readouterr().err
  trainer.train(run)
  monkeypatch.setattr(eval_latency, 'BATCHES', (1,))
  assert latency.main(place) == 0
  found = json.loads((tmp_path / 'latency.json').read_text())
  entry, = found['entries']
  assert (entry['method'], entry['batch'], entry['tokens']) == ('cot', 1, 9)
  assert entry['full_ms'] > 0 and found['repeats'] == 2
  assert latency.main([]) == 2
