"""A task for lm-evaluation-harness beside an export: our problems, our prompt, our rule.

A folder with a YAML, the functions that it names and the problems; the harness needs no
network. What a question is asked by is text, as of a server; answers are scored by
eval.answer_matching itself, so that both accuracies are of one rule.
"""

import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from latent_reasoning.config import Config
from latent_reasoning.data.example import Example
from latent_reasoning.data.tokenizers import Tokenizer
from latent_reasoning.hf import model_card
from latent_reasoning.train.workdir import write_text

FOLDER, TASK, FUNCTIONS, PROBLEMS = 'harness', 'task.yaml', 'utils.py', 'problems.jsonl'

# What a value is, JSON says, which is YAML too.
YAML = '''# lm_eval --model hf --model_args pretrained=. --include_path {folder} --tasks {task}
task: {task}
custom_dataset: !function utils.problems
test_split: test
output_type: generate_until
doc_to_text: !function utils.prompt
doc_to_target: !function utils.target
process_results: !function utils.score
num_fewshot: 0
generation_kwargs: {generation}
metric_list: [{{"metric": "exact_match", "aggregation": "mean", "higher_is_better": true}}]
metadata: {{"version": 1}}
'''

UTILS = '''"""Functions of {task}, for lm-evaluation-harness."""

import json
import pathlib

import datasets

try:
  from latent_reasoning.eval import answer_matching
except ImportError as error:
  raise SystemExit('the task {task} scores answers by the package latent_reasoning, and its '
                   f"import failed ({{error}}): in its folder, pip install -e '.[eval-harness]'"
                   ) from None

RULE, BLOCKS = {rule!r}, {blocks!r}


def problems(problems='', **others):
  """Lines {{"question": …, "answer": …}}, of the file beside this one, or of
  --metadata='{{"problems": "FILE"}}'."""
  del others  # of the harness
  file = pathlib.Path(problems) if problems else pathlib.Path(__file__).with_name({file!r})
  lines = file.read_text(encoding='utf-8').split('\\n')  # splitlines cuts at U+2028, too
  rows = [json.loads(line) for line in lines if line.strip()]
  return {{'test': datasets.Dataset.from_list([
      {{'question': row['question'], 'answers': row.get('answers') or [row['answer']]}}
      for row in rows])}}


def prompt(doc):
  return ' '.join(doc['question'].split()) + '\\n' + BLOCKS


def target(doc):
  return doc['answers'][0]


def score(doc, results):
  return {{'exact_match': float(answer_matching.correct(RULE, results[0], doc['answers']))}}
'''


def name(config: Config) -> str:
  """The task's name: the data, and how it is asked."""
  return re.sub(r'\W+', '_', f'{config.data.name}_{config.method}')


def write(config: Config, tokenizer: Tokenizer, path: pathlib.Path,
          problems: Sequence[Example], rule: str) -> None:
  """Writes the folder of a task.

  Args:
    config: of the run.
    tokenizer: its tokenizer.
    path: of the export.
    problems: that are scored.
    rule: how answers are compared (answer_matching.RULES).
  """
  folder, task = path / FOLDER, name(config)
  folder.mkdir()
  generation: dict[str, Any] = {
      'until': [tokenizer.special()[tokenizer.end]], 'do_sample': False,
      'max_gen_toks': config.eval.max_new_tokens}
  write_text(folder / TASK, YAML.format(folder=FOLDER, task=task,
                                        generation=json.dumps(generation)))
  write_text(folder / FUNCTIONS, UTILS.format(
      task=task, rule=rule, blocks=model_card.blocks(config, tokenizer), file=PROBLEMS))
  write_text(folder / PROBLEMS, ''.join(
      json.dumps({'question': e.question, 'answers': [e.answer, *e.others]},
                 ensure_ascii=False) + '\n' for e in problems))
