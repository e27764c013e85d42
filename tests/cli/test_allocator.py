"""The allocator of C is tuned, by starting once more or as the process runs."""

import os
import sys

import pytest

from latent_reasoning.cli import allocator


@pytest.fixture
def execv(monkeypatch):
  """Records what the process would be replaced by, in a clean environment."""
  calls = []
  monkeypatch.setattr(os, 'execv', lambda *args: calls.append(args))
  environment = {k: v for k, v in os.environ.items()
                 if k not in (*allocator.SETTINGS, allocator.KEEP, 'LD_PRELOAD')}
  monkeypatch.setattr(os, 'environ', environment)
  return calls


@pytest.mark.skipif('CS_GNU_LIBC_VERSION' not in os.confstr_names, reason='glibc only')
def test_starts_again_once(execv):
  """The same command again, with the settings; then no more."""
  allocator.tune()
  assert execv == [(sys.executable, sys.orig_argv)]
  assert os.environ['GLIBC_TUNABLES'] == allocator.SETTINGS['GLIBC_TUNABLES']
  allocator.tune()
  assert len(execv) == 1


@pytest.mark.skipif('CS_GNU_LIBC_VERSION' not in os.confstr_names, reason='glibc only')
def test_of_a_process_that_runs(execv, monkeypatch):
  """glibc accepts the settings, and nothing starts again; the user's are kept."""
  libc, said = allocator.ctypes.CDLL(None), []
  class Library:
    mallopt = staticmethod(lambda number, value: said.append((number, value)))
  monkeypatch.setattr(allocator.ctypes, 'CDLL', lambda name: Library)
  allocator.tune_here()
  assert dict(said) == allocator.RUNNING and execv == []
  assert libc.mallopt(*said[2]) == 1  # M_TOP_PAD alone: what is set stays set in this process
  os.environ[allocator.KEEP] = '1'
  allocator.tune_here()
  assert len(said) == len(allocator.RUNNING)


@pytest.mark.parametrize('name', [*allocator.SETTINGS, allocator.KEEP, 'LD_PRELOAD'])
def test_of_the_user_is_kept(execv, name):
  """Where anything is set already, nothing is changed."""
  os.environ[name] = 'x'
  allocator.tune()
  assert execv == [] and os.environ[name] == 'x'
