"""The task beside an export: what its functions ask and score is what our evaluator does."""

import json
import runpy
import sys
import types

import pytest
import tokenizers

from latent_reasoning import methods, sequences
from latent_reasoning.data.example import Example
from latent_reasoning.eval import answer_matching
from latent_reasoning.hf import eval_harness


@pytest.fixture
def task(tiny_config, make_run, tmp_path, monkeypatch):
  """(run, folder of the task, what its functions are)."""
  monkeypatch.setitem(sys.modules, 'datasets', types.SimpleNamespace(
      Dataset=types.SimpleNamespace(from_list=list)))
  run = make_run(tiny_config(), tmp_path / 'run')
  problems = [*run.splits.test[:3], Example('  “{x}”\n of\u2028 1\\2?', (), '1,000', ('999',))]
  eval_harness.write(run.config, run.tokenizer, tmp_path, problems, 'numeric')
  folder = tmp_path / eval_harness.FOLDER
  return run, problems, folder


def functions(folder):
  return runpy.run_path(str(folder / eval_harness.FUNCTIONS))


def test_asks_and_scores(task, tmp_path):
  run, problems, folder = task
  own = functions(folder)
  found = own['problems'](version=1)['test']
  assert [d['question'] for d in found] == [e.question for e in problems]
  exported = tokenizers.Tokenizer.from_str(json.dumps(run.tokenizer.to_json()))
  method, special = methods.get(run.config.method), sequences.special_tokens(run.tokenizer)
  for doc, example in zip(found[:3], problems, strict=False):
    asked = exported.encode(own['prompt'](doc)).ids
    row = method.prompt(run.tokenizer.question(doc['question']), run.config.rim.blocks,
                        run.config, special)
    assert asked == list(row.prefix)
    assert own['target'](doc) == example.answer
  for said in ('1000', 'so #### 999', '1', ''):
    right = answer_matching.correct('numeric', said, ('1,000', '999'))
    assert own['score'](found[3], [said]) == {'exact_match': float(right)}
  other = tmp_path / 'other.jsonl'
  other.write_text('{"question": "2+3", "answer": "5"}\n\n')
  assert own['problems'](problems=str(other))['test'] == [{'question': '2+3', 'answers': ['5']}]


def test_names_its_functions(task):
  yaml = pytest.importorskip('yaml')
  run, _, folder = task
  loader = type('Loader', (yaml.SafeLoader,), {})
  loader.add_constructor('!function', lambda loader, node: loader.construct_scalar(node))
  found = yaml.load((folder / eval_harness.TASK).read_text(), loader)
  assert found['task'] == eval_harness.name(run.config) == 'arithmetic_rim'
  assert found['generation_kwargs'] == {'until': ['<end>'], 'do_sample': False,
                                        'max_gen_toks': run.config.eval.max_new_tokens}
  own = functions(folder)
  for key in ('custom_dataset', 'doc_to_text', 'doc_to_target', 'process_results'):
    assert callable(own[found[key].removeprefix('utils.')])


def test_without_the_package(task, monkeypatch):
  """One clear line."""
  monkeypatch.setitem(sys.modules, 'latent_reasoning.eval', None)
  with pytest.raises(SystemExit, match=r"scores answers by the package latent_reasoning.*"
                     r"pip install -e '.\[eval-harness\]'") as error:
    functions(task[2])
  assert '\n' not in str(error.value)
