"""glibc's allocator, set for training on a CPU.

JAX on a CPU takes and frees large arrays at every step. glibc backs them with
small pages and gives them back, and the page faults cost up to half of a step.
glibc reads its settings when a process starts, so `tune` starts it again; `tune_here` is
for a process that cannot be, such as a notebook's.
"""

import ctypes
import os
import sys

SETTINGS = {
    'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1',  # huge pages: most of the gain
    'MALLOC_MMAP_MAX_': '0',
    'MALLOC_TRIM_THRESHOLD_': '17179869184',
    'MALLOC_TOP_PAD_': '268435456',
}
# For a process that runs, by the numbers of malloc.h: (M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD,
# M_ARENA_MAX). Huge pages cannot be had so; one arena for all threads keeps what is freed.
RUNNING = {-4: 0, -1: 2**31 - 1, -2: 1 << 28, -8: 1}
KEEP = 'LATENT_REASONING_KEEP_ALLOCATOR'


def tune() -> None:
  """Starts this process again with `SETTINGS`, once.

  Only on Linux with glibc, and not where the user chose settings or an
  allocator, or set LATENT_REASONING_KEEP_ALLOCATOR.
  """
  if _may():
    os.environ.update(SETTINGS)
    os.execv(sys.executable, sys.orig_argv)


def tune_here() -> None:
  """Sets what can be set while a process runs, under the conditions of `tune`."""
  if _may():
    libc = ctypes.CDLL(None)
    for number, value in RUNNING.items():
      libc.mallopt(number, value)


def _may() -> bool:
  return (not any(name in os.environ for name in (*SETTINGS, KEEP, 'LD_PRELOAD'))
          and sys.platform.startswith('linux') and 'CS_GNU_LIBC_VERSION' in os.confstr_names)
