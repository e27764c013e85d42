"""Sixty kinds of failure, each really injected, in one table: what was seen, what was lost.

  pytest -m slow -s -n 0 tests/test_sixty_kinds.py

A kind gets a copy of a run that was interrupted between its stages, does its harm, and gives
the same command as before. All is well where the command ends as it should, in words, and the
run then goes on to the parameters of the undisturbed one.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from parallel.test_multihost import CONFIG, SHORT

ROOT = pathlib.Path(__file__).resolve().parents[1]
SMALL = {**SHORT, 'model.num_layers': 1, 'train.save_every': 2, 'train.eval_every': 0,
         'optim.stage1.steps': 6, 'optim.stage2.steps': 4}
EIO = r'''
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
static int left = -2;
static int hit(int fd) {
  char link[64], path[4096];
  if (left == -2) left = getenv("EIO_TIMES") ? atoi(getenv("EIO_TIMES")) : 0;
  if (!left) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  if (n < 0) return 0;
  path[n] = 0;
  if (!strstr(path, "/checkpoints/") || !strstr(path, "/state/")) return 0;
  if (left > 0) left--;
  errno = EIO;
  return 1;
}
#define WRAP(name, args, call) ssize_t name args { \
  static ssize_t (*real) args; if (!real) real = dlsym(RTLD_NEXT, #name); \
  return hit(fd) ? -1 : real call; }
WRAP(read, (int fd, void *b, size_t n), (fd, b, n))
WRAP(pread, (int fd, void *b, size_t n, off_t o), (fd, b, n, o))
WRAP(pread64, (int fd, void *b, size_t n, off64_t o), (fd, b, n, o))
'''


def command(path, *more, changes=None, **options):
  """Runs the command of a run; returns (status, last line of stderr, all of it)."""
  argv = [sys.executable, '-m', 'latent_reasoning.main', f'--config={CONFIG}',
          f'--workdir={path}', *(f'--config.{k}={v}' for k, v in {**SMALL, **(changes or {})
                                                                   }.items()), *more]
  done = subprocess.run(argv, capture_output=True, timeout=300, env={
      **os.environ, 'PYTHONPATH': str(ROOT), **options.pop('env', {})}, **options)
  err = done.stderr.decode(errors='replace')
  return done.returncode, (err.strip().splitlines() or [''])[-1], err


def newest(path):
  folder = path / 'checkpoints'
  step = max(int(p.name) for p in folder.iterdir() if p.name.isdigit())
  return step, json.loads((folder / f'{step}/meta/metadata').read_text())['arrays']


@pytest.fixture(scope='module')
def interrupted(tmp_path_factory):
  """(a run stopped at step 8 of 10, the arrays of the undisturbed end)."""
  whole, cut = (tmp_path_factory.mktemp(name) for name in ('whole', 'cut'))
  assert command(whole)[0] == 0
  shutil.copytree(whole, cut, dirs_exist_ok=True)
  shutil.rmtree(cut / 'checkpoints/10')
  (cut / 'checkpoints.seals/10.json').unlink()
  (cut / 'results.json').unlink()
  (cut / 'predictions.jsonl').unlink()
  return cut, newest(whole)[1]


def edit(path, change):
  """Changes a JSON file."""
  held = json.loads(path.read_text(encoding='utf-8'))
  change(held)
  path.write_text(json.dumps(held), encoding='utf-8')


def each(path, what):
  for place in (path / 'checkpoints').iterdir():
    if place.name.isdigit():
      what(place)


def state_files(place):
  return [f for f in place.rglob('*') if f.is_file() and '/state/' in str(f)]


def flip(path, all_of_them=False):
  """One bit of the newest checkpoint's largest file, or of every checkpoint's."""
  places = sorted((p for p in (path / 'checkpoints').iterdir() if p.name.isdigit()),
                  key=lambda p: int(p.name))
  for place in places if all_of_them else places[-1:]:
    file = max(state_files(place), key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def damage_log(line):
  def harm(path):
    file = path / 'metrics.jsonl'
    lines = file.read_bytes().splitlines()
    file.write_bytes(b'\n'.join([lines[0], line, *lines[1:], line]))
  return harm


def write(name, content):
  return lambda path: (path / name).write_bytes(content)


def permuted(path):
  def change(held):
    vocab = held['model']['vocab']
    held['model']['vocab'] = dict(zip(vocab, np.roll(list(vocab.values()), 3).tolist(),
                                      strict=True))
  edit(path / 'tokenizer.json', change)


# Kinds that the same command survives: it goes on, and ends as if nothing had been.
GOES_ON = {
    'EIO of the newest checkpoint, once': ('env', {'EIO_TIMES': '1'}),
    'one bit of the newest checkpoint': flip,
    'newest checkpoint without its state': lambda p: shutil.rmtree(p / 'checkpoints/8/state'),
    'newest checkpoint without metadata': lambda p: shutil.rmtree(p / 'checkpoints/8/meta'),
    'newest checkpoint an empty folder': lambda p: [shutil.rmtree(p / 'checkpoints/8'), (
        p / 'checkpoints/8').mkdir()],
    'step 6 copied as 60': lambda p: shutil.copytree(p / 'checkpoints/6', p / 'checkpoints/60'),
    'step 6 linked as 60': lambda p: (p / 'checkpoints/60').symlink_to(p / 'checkpoints/6'),
    'a seal cut off': write('checkpoints.seals/8.json', b'{"a'),
    'a seal of another type': write('checkpoints.seals/8.json', b'[1]'),
    'seals gone': lambda p: shutil.rmtree(p / 'checkpoints.seals'),
    **{f'log with a line {line[:20]!r}': damage_log(line) for line in (
        b'null', b'5', b'[]', b'{}', b'{"step":"x"}', b'\xff\xfe\xfa', b'{"step": 1', b'""',
        b'{"step": 1e400, "stage": 1, "split": "train"}', b'[' * 100_000)},
    'log gone': lambda p: (p / 'metrics.jsonl').unlink(),
    'results.json half written': write('results.json', b'{"accuracy": {"fin'),
    'results.json of 10^5 brackets': write('results.json', b'[' * 100_000),
    'predictions.jsonl not UTF-8': write('predictions.jsonl', b'\xff\xfe\n'),
    'a lock of a dead process': write('.lock', b'{"host": "x", "process": 1}'),
    'a lock that is not JSON': write('.lock', b'\xff\x00{'),
    'a temporary file of a killed writer': write('.results.json.77.tmp', b'{'),
    'an unfinished checkpoint': lambda p: (
        p / 'checkpoints/9.orbax-checkpoint-tmp').mkdir(),
    'events gone': lambda p: shutil.rmtree(p / 'events'),
    'commands.txt not UTF-8': write('commands.txt', b'\xff\xfe\n')}

# Kinds that are refused in one line (status 2, or 1 of a disk), and touch nothing.
REFUSED = {
    'EIO of every checkpoint, always': (('env', {'EIO_TIMES': '-1'}), 1, 'could not be read'),
    'too little memory to read': (('memory', 0), 1, ''),
    'one bit of every checkpoint': (lambda p: flip(p, True), 2, 'restart=True'),
    'checkpoints gone beside a log': (lambda p: [shutil.rmtree(p / n) for n in (
        'checkpoints', 'checkpoints.seals')], 2, 'steps were done'),
    'checkpoints gone, seals there': (lambda p: shutil.rmtree(p / 'checkpoints'), 2,
                                      'had checkpoints'),
    'tokenizer permuted': (permuted, 2, 'the tokenizer of the checkpoint'),
    'tokenizer empty': (write('tokenizer.json', b''), 2, 'tokenizer.json'),
    'tokenizer of 10^5 brackets': (write('tokenizer.json', b'[' * 100_000), 2, 'tokenizer'),
    'tokenizer with an id of 2^31': (lambda p: edit(p / 'tokenizer.json', lambda t: t['model'][
        'vocab'].update({'é': 2**31})), 2, '2147483648'),
    'config.json half written': (write('config.json', b'{"method": "ri'), 2, 'config.json'),
    'config.json a list': (write('config.json', b'[]'), 2, 'config.json'),
    'config.json of 10^5 brackets': (write('config.json', b'{"a":' * 100_000), 2,
                                     'config.json'),
    'config.json of other sizes': (lambda p: edit(
        p / 'config.json', lambda c: c['model'].update(embed_dim=32)), 2,
                                   'config.model.embed_dim'),
    'another format of checkpoints': (lambda p: each(p, lambda place: edit(
        place / 'meta/metadata', lambda m: m.update(format=1))), 2, '')}

# Kinds of the command itself: {name: (flags, what it says)}.
MISTAKES = {
    'workdir empty': (['--workdir='], 'is empty'),
    'workdir of nobody': (['--workdir=~nosuchuser/x'], 'home directory of nobody'),
    'workdir an address': (['--workdir=file:///x'], 'on this machine'),
    'data of nobody': (['--config.data.name=files', '--config.data.dir=~nosuchuser/x'],
                       'home directory of nobody'),
    'data an address': (['--config.data.name=files', '--config.data.dir=file:///x'],
                        'an address'),
    'a sweep without a name': (["--config.sweep.runs=('',)"], 'a name of its own'),
    'layers of 10^9': (['--config.model.num_layers=1000000000'], 'GiB in training'),
    'width of 10^9': (['--config.model.embed_dim=1000000000', '--config.model.num_heads=1'],
                      'GiB in training'),
    'blocks of 10^9': (['--config.rim.blocks=1000000000'], 'config.rim.blocks'),
    'steps of 10^9': (['--config.rim.max_steps=1000000000'], 'config.rim.max_steps')}

SIGNALS = ('SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGUSR2', 'SIGXCPU', 'SIGINT')
seen: list[tuple[str, str, str]] = []


def resume(path, end):
  """Whether the same command now goes on to the undisturbed end."""
  status, _, err = command(path)
  return status == 0 and newest(path) == (10, end), err


@pytest.fixture(scope='module')
def shim(tmp_path_factory):
  """A library that makes reads of checkpoints fail with EIO."""
  folder = tmp_path_factory.mktemp('shim')
  (folder / 'eio.c').write_text(EIO)
  made = subprocess.run(['gcc', '-shared', '-fPIC', '-o', folder / 'eio.so', folder / 'eio.c',
                         '-ldl'], capture_output=True, text=True)
  if made.returncode:
    pytest.skip(f'no C compiler: {made.stderr[:200]}')
  return str(folder / 'eio.so')


def harm(how, path, shim):
  """Does the harm to a run, or returns the environment that will."""
  if callable(how):
    how(path)
    return {}
  kind, value = how
  if kind == 'env':
    return {'env': {**value, 'LD_PRELOAD': shim}}
  limit = 1 << 31  # of address space: JAX starts, but has no room for what it reads

  def small():
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  return {'preexec_fn': small}


@pytest.mark.slow
@pytest.mark.parametrize('name', GOES_ON)
def test_goes_on(name, interrupted, shim, tmp_path):
  cut, end = interrupted
  shutil.copytree(cut, tmp_path / 'run', symlinks=True)
  options = harm(GOES_ON[name], tmp_path / 'run', shim)
  status, last, err = command(tmp_path / 'run', **options)
  assert status == 0 and 'Traceback' not in err, err[-3000:]
  lost = '' if newest(tmp_path / 'run') == (10, end) else 'ANOTHER END'
  seen.append((name, 'goes on', lost or 'nothing'))
  assert not lost


@pytest.mark.slow
@pytest.mark.parametrize('name', REFUSED)
def test_refused(name, interrupted, shim, tmp_path):
  """And the files are what they were: put right, the run goes on."""
  cut, end = interrupted
  how, expected, says = REFUSED[name]
  shutil.copytree(cut, tmp_path / 'run')
  options = harm(how, tmp_path / 'run', shim)
  log = (tmp_path / 'run/metrics.jsonl').read_bytes()
  for _ in range(2):  # the second time, too
    status, last, err = command(tmp_path / 'run', **options)
    assert status != 0 and (not says or says in err), err[-3000:]
    if how != ('memory', 0):  # there a process may restore, and end in a step after that
      assert status == expected and 'Traceback' not in err, err[-3000:]
      assert re.search('^error: ', err, re.M)
      assert (tmp_path / 'run/metrics.jsonl').read_bytes() == log
    assert not (tmp_path / 'run/unsound').exists() or callable(how)
  if not callable(how):
    goes_on, err = resume(tmp_path / 'run', end)
    assert goes_on, err[-3000:]
  seen.append((name, f'refused, {last[:60]}…' if last else 'refused', 'nothing'))


@pytest.mark.slow
@pytest.mark.parametrize('name', MISTAKES)
def test_mistakes(name, tmp_path):
  flags, says = MISTAKES[name]
  status, last, err = command(tmp_path / 'run', *flags)
  assert status == 2 and 'Traceback' not in err and says in last, err[-2000:]
  assert last.startswith('error: ')
  seen.append((name, last[:70] + '…', 'nothing'))


@pytest.mark.slow
@pytest.mark.parametrize('name', SIGNALS)
def test_signals(name, tmp_path):
  """Saved; the same command goes on."""
  number = getattr(signal, name)
  long = {'optim.stage1.steps': 2000, 'train.log_every': 1}
  argv = [sys.executable, '-m', 'latent_reasoning.main', f'--config={CONFIG}',
          f'--workdir={tmp_path}', *(f'--config.{k}={v}' for k, v in {**SMALL, **long}.items())]
  with subprocess.Popen(argv, env={**os.environ, 'PYTHONPATH': str(ROOT)},
                        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
    log = tmp_path / 'metrics.jsonl'
    while process.poll() is None and not (log.exists() and log.stat().st_size):
      time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
  assert process.returncode == 128 + number, err[-2000:]
  step = newest(tmp_path)[0]
  assert re.search(rb'stopped by \w+ at step %d' % step, err)
  seen.append((name, f'saved, status {process.returncode}', 'nothing'))


@pytest.mark.slow
def test_table(capsys):
  """The kinds that this session ran."""
  with capsys.disabled():
    print('\n| kind | seen | lost |\n|---|---|---|')
    for name, what, lost in seen:
      print(f'| {name} | {what} | {lost} |')
    print(f'{len(seen)} kinds')
