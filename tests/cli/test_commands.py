"""The modes other than training: what they print, write and return."""

import io
import json
import types

import pytest

from latent_reasoning import methods, sequences
from latent_reasoning.cli import commands
from latent_reasoning.errors import InputError

pytestmark = pytest.mark.usefixtures('quick_compilation')


class Said:
  """A predictor whose answers are given."""

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


def test_a_blank_text_is_called_empty(tiny_config):
  """Of a block, and of the answer."""
  lines = commands.reply(Said(tiny_config(), ['', ' ', '3']), '1+2').splitlines()
  assert lines == ['after block 1: (empty)', 'after block 2: (empty)', 'after block 3: 3',
                   'answer: 3']


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
  """Questions are answered line by line; a bad one is an error and the next one answered."""
  typed = io.StringIO('\n1+2-3\n' + '1+' * 40 + '1\n4*5+6\n')
  monkeypatch.setattr('sys.stdin', typed)
  assert commands.generate(trained, None) == 0
  out, err = capsys.readouterr()
  assert out.count('answer: ') == 2 and 'question>' not in out
  lines = out.splitlines()  # what was piped in stands before what is said to it
  asked = [lines.index(f'question: {q}') for q in ('1+2-3', '1+' * 40 + '1', '4*5+6')]
  assert asked[0] == 0 and asked == sorted(asked)
  assert lines[asked[1] - 1].startswith('answer: ') and asked[2] == asked[1] + 1
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


@pytest.mark.integration
def test_flops_before_training(fresh, capsys):
  """Counted without a checkpoint, and written."""
  assert commands.count(fresh) == 0
  found = json.loads(fresh.workdir.flops.read_text())
  assert [s['steps'] for s in found['stages']] == [8, 6]
  assert f"training: {found['flops']:.4g} FLOPs" in capsys.readouterr().out
  assert not fresh.workdir.metrics.exists()


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
