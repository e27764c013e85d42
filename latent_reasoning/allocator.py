"""glibc's allocator, set for training on a CPU.

JAX on a CPU takes and frees large arrays at every step. glibc backs them with
small pages and gives them back, and the page faults cost up to half of a step.
glibc reads its settings when a process starts, so `tune` starts it again.
"""

import os
import sys

SETTINGS = {
    'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1',  # huge pages: most of the gain
    'MALLOC_MMAP_MAX_': '0',
    'MALLOC_TRIM_THRESHOLD_': '17179869184',
    'MALLOC_TOP_PAD_': '268435456',
}
KEEP = 'LATENT_REASONING_KEEP_ALLOCATOR'


def tune() -> None:
  """Starts this process again with `SETTINGS`, once.

  Only on Linux with glibc, and not where the user chose settings or an
  allocator, or set LATENT_REASONING_KEEP_ALLOCATOR.
  """
  if any(name in os.environ for name in (*SETTINGS, KEEP, 'LD_PRELOAD')):
    return
  if sys.platform.startswith('linux') and 'CS_GNU_LIBC_VERSION' in os.confstr_names:
    os.environ.update(SETTINGS)
    os.execv(sys.executable, sys.orig_argv)
