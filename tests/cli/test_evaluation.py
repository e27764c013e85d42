"""What --mode=eval writes: results, predictions, sets, protocols."""

import copy
import dataclasses
import json
import subprocess

import jax
import numpy as np
import pytest

from latent_reasoning import experiment as run_lib
from latent_reasoning.cli import commands, evaluation
from latent_reasoning.errors import InputError
from latent_reasoning.train import trainer, workdir
from latent_reasoning.train.checkpoint import Restored
from latent_reasoning.train.train_step import TrainState

pytestmark = pytest.mark.usefixtures('quick_compilation')


def test_evaluate_writes_results_and_predictions(trained, capsys):
  """results.json and predictions.jsonl agree with each other and with the data."""
  assert commands.evaluate(trained) == 0
  result = json.loads(trained.workdir.results.read_text())
  lines = trained.workdir.predictions.read_text().splitlines()
  records = [json.loads(line) for line in lines]
  assert len(records) == result['n'] == 6
  assert [r['question'] for r in records] == [trained.splits.test[i].question
                                              for i in range(6)]
  final = sum(r['correct'][-1] for r in records) / 6
  assert result['accuracy']['final'] == final
  assert len(result['accuracy']['per_block']) == result['blocks'] == 3
  assert (result['step'], result['seed'], result['split']) == (2, 0, 'test')
  assert result['environment']['jax'] and result['parameters'] > 0
  assert result['training']['seconds'] > 0 and result['training']['flops'] > 0
  assert [s['steps'] for s in result['training']['stages']] == [2]
  assert 1 <= result['tokens']['mean'] <= trained.config.eval.max_new_tokens
  out = capsys.readouterr().out
  assert 'rim on arithmetic/test, 6 problems' in out and str(trained.workdir.results) in out


@pytest.mark.parametrize('changes, passes, serial, tokens', [
    ({'method': 'direct'}, 1, 2, lambda q: 2 * q),
    ({'rim.passes': 2}, 2, 4, lambda q: 2 * (q + 9 * 2)),  # three blocks of three tokens
    ({'rim.passes': 2, 'eval.passes': 3}, 3, 6, lambda q: 2 * (q + 9 * 3)),
    ({'model.loop.count': 3, 'model.loop.layers': (1, 1)}, 1, 4, lambda q: 4 * (q + 9)),
    ({'model.loop.count': 3, 'eval.loops': 2}, 1, 4, lambda q: 4 * (q + 9)),
    ({'method': 'coconut', 'baselines.latents': 2, 'baselines.parts': 3}, 5, 10,
     lambda q: 2 * (q + 1 + 4)),  # <b>, then two thoughts for each of two steps
    ({'method': 'cot'}, 1, 2 * 7, lambda q: 2 * (q + 6))])  # '7', a line, '####', then '3'
def test_compute_before_the_answer(tiny_config, make_run, tmp_path, changes, passes, serial,
                                   tokens):
  """Passes, layers one after another and token-layers, counted by hand."""
  run = make_run(tiny_config(**{'data.arithmetic.max_steps': 2, **changes}), tmp_path)
  params = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), jax.eval_shape(run.fresh).params)
  said = '7\n####3' if changes.get('method') == 'cot' else '3'
  records = [{'question': '1+2-3', 'predictions': [said]}] * 2
  found = evaluation.compute(run, Restored(TrainState(0, params, None), 0, {}), records)
  asked = len(run.tokenizer.question('1+2-3'))
  assert found == {'passes': passes, 'serial_layers': serial, 'token_layers': tokens(asked)}


def test_commit_of_what_was_measured(tmp_path, monkeypatch):
  """The checkout's own, marked where a file of it was changed; none of an installed package."""
  def git(*argv):
    subprocess.run(['git', '-C', str(tmp_path), '-c', 'user.name=n', '-c', 'user.email=e',
                    *argv], check=True, capture_output=True)
  module = tmp_path / 'latent_reasoning' / 'cli' / 'evaluation.py'
  module.parent.mkdir(parents=True)
  module.write_text('')
  monkeypatch.setattr(evaluation, '__file__', str(module))
  assert evaluation.commit() == ''
  git('init')
  assert evaluation.commit() == ''  # nothing was committed yet
  git('add', '.')
  git('commit', '-m', 'first')
  first = evaluation.commit()
  assert len(first) >= 7 and int(first, 16)
  module.write_text('changed')
  assert evaluation.commit() == f'{first}+'
  monkeypatch.setenv('PATH', '')
  assert evaluation.commit() == ''


def test_another_evaluation_leaves_the_result_of_the_run(trained, capsys):
  """With other keys than the run's, files of its own hold what was scored."""
  workdir.write_json(trained.workdir.config, dataclasses.asdict(trained.config))
  trained.workdir.results.unlink(missing_ok=True)
  commands.evaluate(trained)
  before = trained.workdir.results.read_bytes(), trained.workdir.predictions.read_bytes()
  other = dataclasses.replace(trained, config=trained.config.replace(
      **{'eval.test_problems': 2, 'eval.batch_size': 2}))
  capsys.readouterr()
  commands.evaluate(other)
  file = trained.workdir.path / 'results-test_problems=2.json'
  assert str(file) in capsys.readouterr().out and json.loads(file.read_text())['n'] == 2
  assert len((file.parent / 'predictions-test_problems=2.jsonl').read_text().split()) >= 2
  assert before == (trained.workdir.results.read_bytes(),
                    trained.workdir.predictions.read_bytes())
  same = dataclasses.replace(trained, config=trained.config.replace(
      **{'eval.batch_size': 2}))
  commands.evaluate(same)
  assert str(trained.workdir.results) in capsys.readouterr().out


def test_an_unfinished_training_is_said(trained, capsys):
  """Evaluating its checkpoint warns of how far it is."""
  evaluation.restored(trained)
  assert 'not finished' not in capsys.readouterr().err
  longer = dataclasses.replace(trained.curriculum, lengths=(2, 3))
  batches = copy.copy(trained.batches)
  batches.curriculum = longer
  evaluation.restored(dataclasses.replace(trained, batches=batches))
  assert 'checkpoint is of step 2 of 5, in stage 1' in capsys.readouterr().err


def test_evaluate_more_sets(trained, tmp_path, capsys):
  """eval.sets are scored beside the test split, under the names of their files."""
  more = tmp_path / 'hard.jsonl'
  more.write_text('{"question": "1+2", "steps": [], "answer": "3"}\n' * 3)
  config = dataclasses.replace(
      trained.config, eval=dataclasses.replace(trained.config.eval, sets=(str(more),)))
  assert commands.evaluate(run_lib.build(config, trained.workdir)) == 0
  result = json.loads(trained.workdir.results.read_text())
  other, = result['sets']
  assert (other['dataset'], other['n']) == ('hard', 3)
  records = [json.loads(line) for line in
             trained.workdir.predictions.read_text().splitlines()]
  assert [r['dataset'] for r in records] == ['arithmetic'] * 6 + ['hard'] * 3
  assert 'rim on hard/test, 3 problems' in capsys.readouterr().out


def test_tokens(trained):
  """Characters of the last readout and its end token; never more than were allowed."""
  most = trained.config.eval.max_new_tokens
  records = [{'predictions': t} for t in (['123', '7'], ['', '12'], [], ['1' * 99])]
  assert evaluation.tokens(trained, records) == {'mean': (2 + 3 + most) / 3, 'median': 3}
  assert evaluation.tokens(trained, [{'predictions': []}]) == {'mean': 0, 'median': 0}


@pytest.mark.integration
def test_evaluate_reports_contamination(trained, tmp_path, capsys):
  """Test questions in the training data are counted; the key switches it off."""
  more = tmp_path / 'seen.jsonl'
  question = trained.splits.train[3].question
  more.write_text(json.dumps({'question': question, 'steps': [], 'answer': '3'}))
  def evaluated(**changes):
    config = dataclasses.replace(trained.config, eval=dataclasses.replace(
        trained.config.eval, sets=(str(more),), **changes))
    assert commands.evaluate(run_lib.build(config, trained.workdir)) == 0
    return json.loads(trained.workdir.results.read_text()), capsys.readouterr().out
  result, out = evaluated()
  found = result['contamination']
  assert found['read'] == found['train'] == 40
  assert found['sets']['test']['exact'] == 0 and found['sets']['test']['n'] == 6
  assert found['sets'][str(more)]['exact'] == 1
  assert 'test questions in the training data (all of 40 read): test: 0 of 6' in out
  result, out = evaluated(contamination=False)
  assert 'contamination' not in result and 'training data' not in out


def test_evaluate_names_the_protocol(trained, monkeypatch, capsys):
  """By default accuracy is labelled validation; rule and protocol are in the file."""
  assert commands.evaluate(trained) == 0
  result = json.loads(trained.workdir.results.read_text())
  assert (result['protocol'], result['rule']) == ('validation', 'numeric')
  assert 'paper' not in result
  out = capsys.readouterr().out
  assert 'protocol validation: checkpoint of step 2' in out and 'paper' not in out


@pytest.mark.integration
def test_evaluate_by_the_papers_protocol(tiny_config, make_run, tmp_path, monkeypatch, capsys):
  """Every kept checkpoint is scored, that of the validation protocol once."""
  from latent_reasoning.eval import checkpoint_selection
  monkeypatch.setattr(checkpoint_selection, 'SELECTION', 5)
  more = tmp_path / 'hard.jsonl'
  more.write_text('{"question": "1+2", "steps": [], "answer": "3"}\n' * 3)
  config = tiny_config(**{
      'model.num_layers': 1, 'optim.stage1.steps': 4, 'optim.stage2.steps': 0,
      'data.buckets.prefix': (20,), 'data.buckets.readout': (6,),
      'data.buckets.count': (3,), 'train.save_every': 2, 'train.eval_every': 0,
      'eval.valid_problems': 4, 'eval.test_problems': 9, 'eval.checkpoint_selection': 'paper',
      'eval.sets': (str(more),)})
  run = make_run(config, tmp_path / 'run')
  trainer.train(run)
  scored, own = [], evaluation.score
  def counted(predictor, examples, *args):
    scored.append(len(examples))
    return own(predictor, examples, *args)
  monkeypatch.setattr(evaluation, 'score', counted)
  assert commands.evaluate(run) == 0
  result = json.loads(run.workdir.results.read_text())
  paper = result['paper']
  assert paper['steps'] == [2, 4] and sum(paper['chosen']) == 16
  assert paper['scored_items'] == 4 and paper['sets'][str(more)]['n'] == 3
  assert sorted(scored) == [3, 3, 9, 9]
  assert (result['protocol'], paper['protocol']) == ('validation', 'paper')
  out = capsys.readouterr().out
  assert 'protocol paper: final' in out and 'steps (times) 2 (' in out


def test_the_papers_protocol_needs_enough_test_problems(tiny_config, make_run, tmp_path):
  """An error before anything is trained."""
  with pytest.raises(InputError, match='found 12 test items, expected at least 265'):
    make_run(tiny_config(**{'eval.checkpoint_selection': 'paper'}), tmp_path)


def test_a_file_named_after_a_split_is_told_by_its_folder(trained, tmp_path):
  """prosqa/valid.json is prosqa, split valid."""
  (tmp_path / 'prosqa').mkdir()
  more = tmp_path / 'prosqa/valid.json'
  more.write_text('[{"question": "1+2", "steps": ["A is b."], "answer": "A is b."}]')
  config = dataclasses.replace(
      trained.config, eval=dataclasses.replace(trained.config.eval, sets=(str(more),)))
  assert commands.evaluate(run_lib.build(config, trained.workdir)) == 0
  other, = json.loads(trained.workdir.results.read_text())['sets']
  assert (other['dataset'], other['split'], other['rule']) == ('prosqa', 'valid', 'text')
