"""The modes other than training: what they print, write and return."""

import copy
import dataclasses
import io
import json
import types

import pytest

from latent_reasoning import experiment as run_lib
from latent_reasoning import methods, sequences
from latent_reasoning.cli import commands
from latent_reasoning.errors import InputError
from latent_reasoning.train import trainer, workdir

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture(scope='module')
def trained(tiny_config, make_run, tmp_path_factory):
  """A run that was trained for two steps."""
  config = tiny_config(**{
      'model.num_layers': 1, 'optim.stage1.steps': 2, 'optim.stage2.steps': 0,
      'data.buckets.prefix': (20,), 'data.buckets.readout': (6,),
      'data.buckets.count': (3,),
      'eval.valid_problems': 4, 'eval.test_problems': 6})
  run = make_run(config, tmp_path_factory.mktemp('trained'))
  trainer.train(run)
  return run


@pytest.fixture
def fresh(tiny_config, make_run, tmp_path):
  return make_run(tiny_config(), tmp_path)


class Said:
  """An answerer that says what it is told."""

  def __init__(self, config, texts, method='rim', fits=True):
    self.config, self.said, self.room = config, texts, fits
    self.method = methods.METHODS[method]

  def row(self, question):
    return types.SimpleNamespace(prefix=range(len(question)))

  def fits(self, row):
    return self.room

  def texts(self, questions):
    yield self.said


def test_reply_block_by_block(tiny_config):
  """RiM's reply shows each block, the headline last."""
  said = Said(tiny_config(), ['1', '2', '3'])
  assert commands.reply(said, '1+2').splitlines() == [
      'after block 1: 1', 'after block 2: 2', 'after block 3: 3', 'answer: 3']


def test_reply_of_direct(tiny_config):
  """One readout is one line."""
  assert commands.reply(Said(tiny_config(), ['3'], 'direct'), '1+2') == 'answer: 3'


def test_reply_of_a_chain_of_thought(tiny_config):
  """The chain is shown, then the answer without its mark."""
  said = Said(tiny_config(), ['1+2=3\n####3'], 'cot')
  assert commands.reply(said, '1+2').splitlines() == ['1+2=3', '####3', 'answer: 3']


def test_question_too_long(tiny_config):
  """The error says how many positions there are and what to do."""
  said = Said(tiny_config(), ['3'], fits=False)
  with pytest.raises(InputError, match='takes 50 positions.*48. Ask a shorter'):
    commands.reply(said, '1' * 50)


@pytest.mark.integration
def test_typed_questions(trained, monkeypatch, capsys):
  """Questions are answered line by line; a bad one is told and the next one answered."""
  typed = io.StringIO('\n1+2-3\n' + '1+' * 40 + '1\n4*5+6\n')
  monkeypatch.setattr('sys.stdin', typed)
  assert commands.generate(trained, None) == 0
  out, err = capsys.readouterr()
  assert out.count('answer: ') == 2 and 'question>' not in out
  assert err.count('error: ') == 1 and 'Ask a shorter question' in err


def test_one_question(trained, capsys):
  """--question answers once, with a line a block and the answer."""
  assert commands.generate(trained, '1+2-3') == 0
  found = capsys.readouterr().out.splitlines()
  names = [line.split(':')[0] for line in found]
  assert names == ['after block 1', 'after block 2', 'after block 3', 'answer']


@pytest.mark.parametrize('mode', [commands.evaluate, lambda run: commands.generate(run, '1+1')])
def test_no_checkpoint(fresh, mode):
  """What needs a checkpoint says that there is none, and how to get one."""
  with pytest.raises(InputError, match='no checkpoint in .*--mode=train'):
    mode(fresh)


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
  """Whoever reads its checkpoint is told how far it is."""
  commands.restored(trained)
  assert 'not finished' not in capsys.readouterr().err
  longer = dataclasses.replace(trained.curriculum, lengths=(2, 3))
  batches = copy.copy(trained.batches)
  batches.curriculum = longer
  commands.restored(dataclasses.replace(trained, batches=batches))
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
  assert commands.tokens(trained, records) == {'mean': (2 + 3 + most) / 3, 'median': 3}
  assert commands.tokens(trained, [{'predictions': []}]) == {'mean': 0, 'median': 0}


@pytest.mark.integration
def test_flops_before_training(fresh, capsys):
  """Counted without a checkpoint, and written."""
  assert commands.count(fresh) == 0
  found = json.loads(fresh.workdir.flops.read_text())
  assert [s['steps'] for s in found['stages']] == [8, 6]
  assert f"training: {found['flops']:.4g} FLOPs" in capsys.readouterr().out
  assert not fresh.workdir.metrics.exists()


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
  scored, own = [], commands.score
  def counted(predictor, examples, *args):
    scored.append(len(examples))
    return own(predictor, examples, *args)
  monkeypatch.setattr(commands, 'score', counted)
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
  """Told before anything is trained."""
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


@pytest.mark.parametrize('ok', [True, False])
def test_leakage_status(trained, monkeypatch, capsys, ok):
  """One failed check makes the status 1; the file holds every check either way."""
  checks = [{'check': 'a', 'ok': True, 'found': 'fine'},
            {'check': 'b', 'ok': ok, 'found': 'something'}]
  monkeypatch.setattr(commands.leakage, 'run', lambda subject: checks)
  assert commands.check_leakage(trained) == (0 if ok else 1)
  written = json.loads(trained.workdir.leakage.read_text())
  assert written['ok'] is ok and written['checks'] == checks
  assert written['weights'] == 'checkpoint of step 2' and written['rows'] == 3
  assert ('LEAKAGE FOUND' in capsys.readouterr().out) is not ok


def test_leakage_without_a_checkpoint(fresh, monkeypatch, capsys):
  """Fresh weights can be checked, and it says so."""
  monkeypatch.setattr(commands.leakage, 'run',
                      lambda subject: [{'check': 'a', 'ok': True, 'found': ''}])
  assert commands.check_leakage(fresh) == 0
  assert 'fresh weights' in capsys.readouterr().out


def test_latency_is_written(trained, monkeypatch, capsys):
  """The table is printed and everything measured is in latency.json."""
  entry = {'method': 'rim', 'batch': 1, 'prefix_tokens': 15, 'tokens': 2, 'first_ms': 1.25,
           'full_ms': 2.5, 'first_spread_ms': 0.1, 'full_spread_ms': 0.1,
           'first_vs_direct': 1.0, 'full_vs_direct': 1.0,
           'first_flops': 1e6, 'full_flops': 2e6}
  measured = {'entries': [entry], 'trace_tokens': 20, 'answer_tokens': 2, 'repeats': 2,
              'device': 'toy', 'dtype': 'float32'}
  monkeypatch.setattr(commands.latency_lib, 'measure', lambda *args: dict(measured))
  assert commands.latency(trained) == 0
  written = json.loads(trained.workdir.latency.read_text())
  assert written['entries'] == [entry] and written['environment']['jax']
  out = capsys.readouterr().out
  assert '1.250' in out and '20 tokens' in out


def test_real_rows_are_drawn_by_seed(trained):
  """The rows of leakage checks and latency are training problems, the same each time."""
  one, two = commands._real(trained, 5), commands._real(trained, 5)
  assert one == two and len(one) == 5
  assert len(commands._real(trained, 1000)) == len(trained.splits.train)
  everything = sequences.encode([trained.splits.train[i] for i in range(40)],
                                trained.tokenizer)
  assert all(e in everything for e in one)


