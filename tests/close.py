"""Comparisons that mean the same on every processor.

Processors sum in other orders, so what is computed twice differs by some roundings of the
largest numbers involved, not of each result: bounds are relative to the scale of what is
compared, the largest size in it.
"""

import jax
import numpy as np

FLOAT32 = 1e-5  # some 80 roundings of 2^-23: sums of hundreds of terms, a few layers deep


def assert_close(actual, expected, tol: float = FLOAT32, err_msg: str = '') -> None:
  """Compares arrays or trees of them, each leaf by its own scale.

  Args:
    tol: largest difference as a share of the largest size in `expected`. A bound above
      `FLOAT32` needs a reason beside it.
  """
  def leaf(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape or not b.shape or not a.shape, (a.shape, b.shape)
    assert np.isfinite(a).all() and np.isfinite(b).all(), err_msg
    scale = np.abs(b).max(initial=0.0)
    worst = np.abs(a - b).max(initial=0.0)
    assert worst <= tol * scale or worst == 0, (
        f'{err_msg} largest difference {worst:.3g}, {worst / max(scale, 1e-300):.2g} of the '
        f'scale {scale:.3g}; at most {tol:g}')
  if isinstance(actual, (list, float)):
    actual, expected = np.asarray(actual), np.asarray(expected)
  jax.tree.map(leaf, actual, expected)
