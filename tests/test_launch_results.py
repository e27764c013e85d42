"""launch/results.sh: which commands make each page, and what a failed one leaves."""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = ('default', 'comparison', 'mixed', 'depth', 'lengths', 'variables', 'permutations',
         'memory', 'speed', 'plans', 'robustness')


def results(*argv, root=ROOT, **environment):
  return subprocess.run(['bash', str(root / 'launch/results.sh'), *argv], text=True,
                        capture_output=True, env={**os.environ, **environment}, timeout=600)


@pytest.fixture
def checkout(tmp_path):
  """A repository of the script and nothing else, and a stand-in for python on PATH."""
  (tmp_path / 'launch').mkdir()
  for name in ('results.sh', 'common.sh'):
    shutil.copy(ROOT / 'launch' / name, tmp_path / 'launch')
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs/a.py').write_text('')
  for argv in (['init'], ['add', '.'], ['commit', '-m', 'first']):
    subprocess.run(['git', '-C', tmp_path, '-c', 'user.name=n', '-c', 'user.email=e', *argv],
                   check=True, capture_output=True)
  (tmp_path / 'bin').mkdir()
  program = tmp_path / 'bin/python'
  program.write_text('#!/bin/sh\necho "$@" >> calls\necho measured\nexit ${STATUS:-0}\n')
  program.chmod(0o755)
  return tmp_path


def path(checkout):
  return {'PATH': f"{checkout / 'bin'}:{os.environ['PATH']}"}


def test_dry_run_names_every_page_and_runs_nothing(checkout):
  for chosen in ((), PAGES[:2], PAGES[-1:]):
    shown = results(*chosen, '--dry_run', root=checkout, **path(checkout))
    assert shown.returncode == 0, shown.stderr
    assert [line[4:] for line in shown.stderr.splitlines() if line.startswith('--- ')] == list(
        chosen or PAGES)
    commands = [shlex.split(line) for line in shown.stdout.splitlines() if '```' not in line]
    assert commands and all(c[:2] == ['python', '-m'] for c in commands)
  assert not (checkout / 'calls').exists() and not (checkout / '.github').exists()


@pytest.mark.parametrize('argv, said', [
    (('tables',), "unknown page 'tables'; known: default"), (('--pages=speed',), '--pages'),
    (('memory', '--text=nothing.txt'), '--text=nothing.txt is no file'),
    (('speed', 'extra', '--short'), "unknown page 'extra'")])
def test_a_mistake_is_one_line(checkout, argv, said):
  found = results(*argv, root=checkout, **path(checkout))
  assert found.returncode == 2 and said in found.stderr
  assert found.stderr.count('\n') == 1 and not (checkout / 'calls').exists()


def test_a_page_is_of_a_commit(checkout):
  """Changes that were not committed are refused, but for a short try."""
  (checkout / 'configs/a.py').write_text('changed')
  found = results('speed', root=checkout, **path(checkout))
  assert found.returncode == 2 and 'not committed' in found.stderr
  assert results('speed', '--short', root=checkout, **path(checkout)).returncode == 0
  page = (checkout / 'build/results/speed.md').read_text()
  assert '+, ' in page and 'measured' in page and not (checkout / '.github').exists()


def test_a_failed_command_leaves_the_old_page(checkout):
  """And ends the script with its status."""
  assert results('speed', root=checkout, **path(checkout)).returncode == 0
  page = checkout / '.github/results/speed.md'
  old = page.read_text()
  assert old.startswith('# Speed') and 'commit ' in old
  assert results('speed', root=checkout, STATUS='3', **path(checkout)).returncode == 3
  assert page.read_text() == old


@pytest.mark.slow
def test_all_pages_in_short(tmp_path):
  """Every page but those of other extras is really made."""
  pages = 'default', 'comparison', 'depth', 'memory', 'speed'
  found = results(*pages, '--short', '--per_core', f'--out={tmp_path}',
                  f'--runs={tmp_path}/runs', f'--text={ROOT / "README.md"}',
                  PATH=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
  assert found.returncode == 0, found.stderr[-3000:]
  for page in ('default/report.md', 'comparison/report.md', 'depth/report.md',
               'memory/report.md', 'speed.md'):
    assert (tmp_path / page).stat().st_size > 500
