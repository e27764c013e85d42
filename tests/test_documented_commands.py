"""Every command in the README, other Markdown, docstrings and notebooks: parses, and runs.

bash itself takes the text apart, loops and quotes included, with stand-ins for the programs
that write down their arguments. A new kind of command fails here until it has a row in
`CHECKS`; a new place for commands is a line in `sources`.
"""

import ast
import functools
import importlib
import json
import pathlib
import re
import subprocess
import tomllib
import urllib.parse

import pytest
from packaging.requirements import Requirement

from latent_reasoning import config_loading, main, methods
from latent_reasoning.benchmarks import decoding, tables
from latent_reasoning.cli import latency, sweep, sweep_processes
from latent_reasoning.config import flatten
from latent_reasoning.eval import latency as eval_latency
from latent_reasoning.planning import plan

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = sorted((ROOT / '.github/results').rglob('*.md'))
PROGRAMS = ('python', 'pip', 'pytest', 'bash')
SYNOPSIS = re.compile(  # a usage, not a command
    r'(?<![.\w])\[|…|\.\.\.|--config\.key=|--config=FILE|(?<!=)\b[A-Z]{2,} --\w')
MAIN = 'python -m latent_reasoning.main'


# --- where commands stand ------------------------------------------------------------------


def sources():
  """Yields (name, Markdown or docstring) of everything that tells a reader what to type."""
  for path in [*ROOT.glob('*.md'), *ROOT.glob('launch/*.md'), *RESULTS]:
    yield path.relative_to(ROOT).as_posix(), path.read_text(encoding='utf-8')
  for folder in ('configs', 'latent_reasoning'):
    for path in sorted((ROOT / folder).rglob('*.py')):
      text = ast.get_docstring(ast.parse(path.read_text(encoding='utf-8')), clean=False)
      yield path.relative_to(ROOT).as_posix(), text or ''
  for path in sorted(ROOT.glob('notebooks/*.ipynb')):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    yield path.name, '\n\n'.join(
        ''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')


def scripts(text):
  """Yields shell text in Markdown: fenced, indented, and commands between backticks."""
  rest = re.sub(r'(?ms)^```(\w*)\n(.*?)^```', '', text)
  yield from re.findall(r'(?ms)^```sh\n(.*?)^```', text)
  yield from re.findall(
      rf'(?m)^ {{2,}}(?:{"|".join(PROGRAMS)}|launch/)\b.*(?:(?<=\\)\n.*)*', rest)
  for span in re.findall(r'`([^`]+)`', rest):
    span = ' '.join(span.split())
    if span.startswith('benchmark '):
      yield f"python -m latent_reasoning.benchmarks.tables {span.partition(' ')[2]}"
    elif span.startswith('--') and ('=' in span or ' ' in span):
      yield f'{MAIN} {span}'
    elif span.startswith(tuple(f'{p} ' for p in PROGRAMS)) or span.startswith('launch/'):
      yield span


@functools.cache
def recorder(folder: pathlib.Path):
  """A folder of stand-ins that append their arguments, NUL after each, to $CALLS."""
  text = ('#!/bin/bash\nprintf "%s\\0" "${0#./bin/}" "$@" >> "$CALLS"\n'
          'printf "\\n\\0" >> "$CALLS"\n')
  names = [f'bin/{p}' for p in PROGRAMS]
  names += [f'launch/{p.name}' for p in ROOT.glob('launch/*.sh')]
  for name in names:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
  return folder


def started(script: str, folder: pathlib.Path) -> list[list[str]]:
  """The commands that bash starts, without running any."""
  calls = folder / 'calls'
  calls.unlink(missing_ok=True)
  done = subprocess.run(['/bin/bash', '-eu'], input=script, text=True, capture_output=True,
                        cwd=recorder(folder), env={'PATH': './bin', 'CALLS': str(calls)})
  assert not done.stderr, (
      f'{done.stderr}in\n{script}\nA program that is not known here: give it a stand-in in '
      'PROGRAMS and a row in CHECKS of tests/test_documented_commands.py')
  parts = calls.read_text().split('\0')[:-1] if calls.exists() else []
  found = [[]]
  for part in parts:
    if part == '\n':
      found.append([])
    else:
      found[-1].append(part)
  return found[:-1]


@pytest.fixture(scope='module')
def commands(tmp_path_factory) -> list[tuple[str, list[str]]]:
  """(source, words) of every command, each once, in the order in which they stand."""
  folder, found = tmp_path_factory.mktemp('stand_ins'), {}
  for name, text in sources():
    for script in scripts(text):
      if not SYNOPSIS.search(script):
        for words in started(script, folder):
          found.setdefault(tuple(words), name)
  return [(name, list(words)) for words, name in found.items()]


# --- what each kind has to satisfy ---------------------------------------------------------


def main_parses(words):
  """Flags, configuration, variant and keys exist, and the mode has what it needs."""
  whole = main.flag(words, 'config') or '--mode=report' in words
  args = main.parse(['main', *words] if whole else [  # a fragment, in a text about that
      'main', '--config=configs/rim_arithmetic.py', *words])
  if args.mode == 'report':
    return
  config = config_loading.from_dict(args.config)
  methods.get(config.method)
  plan.parse_devices(args.devices)
  if config.sweep.runs:
    sweep.parse(config.sweep)
  assert config.sweep.runs or not whole or args.mode != 'compare', 'a comparison of no runs'


def benchmark_parses(words, monkeypatch):
  for name in tables.TABLES:
    monkeypatch.setitem(tables.TABLES, name, lambda args: '')
  assert tables.main(words) == 0


def paths_of(words):
  assert words and not any(w.startswith('-') for w in words), 'expected folders of runs'


def recorder_parses(words):
  assert not words, 'expected no arguments: all of it is recorded'


def latency_parses(words):
  out = [w for w in words if w.startswith('--out=')]
  assert len(out) == 1 and len(words) > 1


def pip_parses(words):
  """Every extra is in pyproject.toml, every file of constraints there, and every other
  requirement is one."""
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  verb, *rest = words
  assert verb == 'install' and rest
  rest = iter(rest)
  for word in rest:
    if word == '-c':
      assert (ROOT / (file := next(rest))).is_file(), file
    elif word.startswith('.') or word.startswith(project['name']):
      extras = re.fullmatch(rf"(?:\.|{project['name']})(?:\[([\w,-]+)\])?", word)
      assert extras, word
      unknown = set(filter(None, (extras[1] or '').split(','))) - set(
          project['optional-dependencies'])
      assert not unknown, f'pyproject.toml has no extra {unknown}'
    elif word != '-e':
      Requirement(word)


def pytest_parses(words):
  """Marks, files and names in expressions exist."""
  marks = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['pytest']['ini_options']
  files, words = [], iter(words)
  for word in words:
    if word == '-m':
      assert next(words) in [m.partition(':')[0] for m in marks['markers']]
    elif word == '-k':
      texts = ''.join(f.read_text() for f in files or ROOT.glob('tests/**/*.py'))
      for name in set(re.findall(r'\w+', next(words))) - {'and', 'or', 'not'}:
        assert re.search(rf'def test_\w*|{name}', texts) and name in texts, name
    elif not word.startswith('-'):
      files.append(ROOT / word.partition('::')[0])
      assert files[-1].exists(), word


def bash_parses(words):
  subprocess.run(['/bin/bash', '-n', ROOT / words[0]], check=True)


def launch_parses(script, words):
  """A dry run succeeds, and what stands behind -- is a command of main."""
  own, more = (words[:words.index('--')], words[words.index('--') + 1:]) if '--' in words else (
      words, [])
  done = subprocess.run([ROOT / script, *own, '--dry_run', *['--', *more] * bool(more)],
                        cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  if more:
    main_parses(more)


CHECKS = {  # first words: what the rest has to satisfy
    (*MAIN.split(),): main_parses,
    ('python', '-m', 'latent_reasoning.benchmarks.tables'): benchmark_parses,
    ('python', '-m', 'latent_reasoning.report'): paths_of,
    ('python', 'tests/test_config_files.py'): recorder_parses,
    ('python', 'tests/test_golden.py'): recorder_parses,
    ('python', '-m', 'latent_reasoning.cli.latency'): latency_parses,
    ('pip',): pip_parses, ('pytest',): pytest_parses, ('bash',): bash_parses}


def kind_of(words):
  """The first words of a row of CHECKS, and the rest."""
  for first in CHECKS:
    if tuple(words[:len(first)]) == first:
      return first, words[len(first):]
  if words[0].startswith('launch/'):
    return (words[0],), words[1:]
  pytest.fail(f"nothing here knows {' '.join(words)!r}; add a row to CHECKS of "
              'tests/test_documented_commands.py')


@pytest.mark.integration
def test_every_command_parses(commands, monkeypatch):
  monkeypatch.chdir(ROOT)
  assert len(commands) > 30
  failed = []
  for source, words in commands:
    first, rest = kind_of(words)
    try:
      if first[0].startswith('launch/'):
        launch_parses(first[0], rest)
      elif CHECKS[first] is benchmark_parses:
        with monkeypatch.context() as patch:
          benchmark_parses(rest, patch)
      else:
        CHECKS[first](rest)
    except (Exception, SystemExit) as error:
      failed.append(f"{source}: {' '.join(words)}\n    {type(error).__name__}: {error}")
  assert not failed, '\n'.join(failed)


def test_results_are_those_of_the_reports():
  """Each row of the README's results is one of a page in .github/results, and links lead on."""
  text = (ROOT / 'README.md').read_text(encoding='utf-8')
  part = text[text.index('## Results'):].partition('\n## ')[0]
  rows = [line for line in part.splitlines() if line.startswith('|')]
  known = {line for path in RESULTS for line in path.read_text(encoding='utf-8').splitlines()}
  assert len(rows) > 8 and [row for row in rows if row not in known] == []
  for source, text in sources():
    for link in re.findall(r'\]\((?!https?:|#)([^)\s]+)\)', text):
      file = (ROOT / source).parent / urllib.parse.unquote(link)
      assert file.exists(), (source, link)


def test_keys_named_alone_exist():
  """`--config.some.key` between backticks, without a value, is a key."""
  keys = flatten(config_loading.read(f'{ROOT}/configs/rim_arithmetic.py', {}))
  for source, text in sources():
    for key in re.findall(r'`--config\.([\w.]+)`', text):
      assert key in keys or any(k.startswith(f'{key}.') for k in keys), (source, key)


@pytest.mark.parametrize('script, expected', [
    ('for s in 0 1; do python -m x --seed=$s; done', [['python', '-m', 'x', '--seed=0'],
                                                      ['python', '-m', 'x', '--seed=1']]),
    ('pip install -e ".[a b]" && pytest \\\n  -k "x y"', [
        ['pip', 'install', '-e', '.[a b]'], ['pytest', '-k', 'x y']]),
    ("python -m x --q='it is \"this\"'", [['python', '-m', 'x', '--q=it is "this"']])])
def test_taken_apart_as_bash_does(tmp_path, script, expected):
  assert started(script, tmp_path) == expected


def test_what_is_wrong_is_found(tmp_path, monkeypatch):
  """An unknown program, kind, key, variant, extra and test file each fail."""
  monkeypatch.chdir(ROOT)
  with pytest.raises(AssertionError, match='A program that is not known here'):
    started('pip install x && cargo build', tmp_path)
  with pytest.raises(pytest.fail.Exception, match='add a row to CHECKS'):
    kind_of(['python', '-m', 'latent_reasoning.nosuch'])
  for check, words in ((main_parses, ['--config.optim.stepz=1']), (main_parses, ['--mode=x']),
                       (main_parses, ['--config=configs/rim_arithmetic.py:nosuch']),
                       (pip_parses, ['install', '.[nosuch]']),
                       (pytest_parses, ['tests/test_nosuch.py']),
                       (pytest_parses, ['tests/test_run.py', '-k', 'nosuch'])):
    with pytest.raises((AssertionError, ValueError)):
      check(words)


# --- and they run --------------------------------------------------------------------------

# Appended to every command of main, so that seconds do; what is asked for stays as it is.
SHORT = {
    'data.arithmetic.train_size': 64, 'data.arithmetic.valid_size': 40,
    'data.arithmetic.test_size': 40, 'data.graphs.train_size': 16, 'data.graphs.valid_size': 8,
    'data.graphs.test_size': 8, 'data.state_tracking.test_size': 8, 'data.seq_len': 16,
    'model.num_layers': 1, 'model.embed_dim': 16,
    'model.num_heads': 2, 'model.mlp_dim': 32, 'model.lora.rank': 4, 'model.dtype': 'float32',
    'optim.batch_size': 8, 'optim.stage1.steps': 2, 'train.log_every': 1,
    'train.eval_every': 0, 'train.save_every': 0, 'train.compilation_cache': '',
    'eval.batch_size': 20, 'eval.valid_problems': 4, 'eval.test_problems': 40,
    'eval.max_new_tokens': 8, 'eval.latency_repeats': 1, 'eval.leakage_rows': 2,
    'reasoning_decoder.steps': 2,
    'sweep.seeds': (0,)}


@pytest.fixture(scope='module')
def world(tmp_path_factory, make_checkpoint):
  """A folder in which what the commands call FILE, DIRECTORY and so on is there."""
  folder = tmp_path_factory.mktemp('world')
  problems = [{'question': f'{a} and {b}?', 'answer': f'It is <<{a}+{b}={a + b}>>{a + b}\n'
               f'#### {a + b}'} for a in range(8) for b in range(6)]
  both = folder / 'DIRECTORY'
  both.mkdir()
  make_checkpoint(both, 'gpt2', {'n_layer': 1, 'n_embd': 16, 'n_head': 2, 'n_positions': 640})
  for split, part in (('train', problems[:36]), ('valid', problems[36:40]),
                      ('test', problems[40:])):
    (both / f'{split}.jsonl').write_text(''.join(json.dumps(p) + '\n' for p in part))
  for name in ('GSM8K_AUG_DIRECTORY', 'GPT2_DIRECTORY', 'ID'):
    (folder / name).symlink_to(both)
  (folder / 'configs').symlink_to(ROOT / 'configs')
  (folder / 'FILE').write_text('to be or not to be, that is the question; ' * 60)
  for k, name in enumerate(('VALID.json', 'TEST.json')):
    (folder / name).write_text(json.dumps([{
        'question': f'Every a is a b. Tom is an a. Is Tom a b or {k}?', 'answer': 'Tom is a b.',
        'steps': ['Tom is an a.', 'Every a is a b.']}]))
  return folder


def shortened(words):
  """A command of main with little to do: two runs of a sweep, one device of a plan."""
  args = main.parse(['main', *words])
  if args.mode == 'report':
    return words
  keys = {**SHORT, 'optim.stage2.steps': 0 if args.config.method == 'language_model' else 2}
  if args.config.data.name.startswith('gsm8k'):
    keys['data.dir'] = 'DIRECTORY'  # not from the hub
  if args.config.sweep.runs:
    runs = {r.split()[0]: r for r in args.config.sweep.runs}
    last = 'rim' if 'rim' in runs and args.config.sweep.control != 'rim' else list(runs)[-1]
    keys['sweep.runs'] = (runs[args.config.sweep.control], runs[last])
  devices = ['--devices=1'] * ('--mode=plan' in words)
  if any(word.startswith('--target=') for word in words):  # its compiler and kernels lack
    words = [word for word in words
             if not word.startswith(('--target=', '--config.model.attention='))]
  return [*words, *devices, *(f'--config.{k}={v}' for k, v in keys.items())]


@pytest.mark.slow
@pytest.mark.usefixtures('quick_compilation')
def test_every_command_runs(commands, world, monkeypatch, capsys):
  """In the order in which they stand, so that what is asked has been trained. Of commands
  that differ in the seed alone, one; fragments, installation and tests are left to others."""
  monkeypatch.chdir(world)
  monkeypatch.setenv('PYTHONPATH', str(ROOT))  # of the processes that --mode=plan starts
  monkeypatch.setattr(tables, 'SHAPES', ((8, 2, 1, 3),))
  monkeypatch.setattr(decoding, 'SHAPES', ((1, 16, 2),))
  monkeypatch.setattr(eval_latency, 'BATCHES', (1,))

  def python(module, flags, log, environment=None):
    # In this process: importing JAX takes longer than a run.
    module = importlib.import_module(module)
    return module.main(flags if module is latency else ['main', *flags])
  monkeypatch.setattr(sweep_processes, 'python', python)
  done, failed = set(), []
  for source, words in commands:
    (*_, first), rest = kind_of(words)
    key = (first, *(re.sub(r'(--config\.seed=|-)\d+$', r'\1', w) for w in rest))
    if key in done:
      continue
    done.add(key)
    # One folder of weights and data stands for all: a workdir has one configuration.
    rest = [re.sub(r'\b(GSM8K_AUG_|GPT2_)DIRECTORY\b', 'DIRECTORY', word) for word in rest]
    rest = [re.sub(r'^(--config\.data\.path=).*', r'\1FILE', word) for word in rest]
    if first == 'latent_reasoning.main':
      whole = main.flag(rest, 'config') or main.flag(rest, 'workdir')
      if not whole and not ('--mode=report' in rest and len(rest) > 1):
        continue
      status = main.main(['main', *shortened(rest)])
    elif first == 'latent_reasoning.benchmarks.tables' and rest != ['torch']:  # compiles C++
      status = tables.main([*rest, '--repeats=1', '--batch=1'])
    elif first == 'latent_reasoning.report':
      status = importlib.import_module('latent_reasoning.report.__main__').main(
          [str(p) for w in rest for p in sorted(world.glob(w))])
    else:
      continue
    out = capsys.readouterr()
    if status:
      failed.append(f"{source}: {' '.join(words)}\n    status {status}: {out.err[-600:]}")
  assert len(done) > 25 and not failed, '\n'.join(failed)
