"""What devices can do at most: what times are planned from, and MFU is a share of.

Public figures of the vendors (Google's pages on TPU v4, v5e, v5p and v6e, NVIDIA's data
sheets of the SXM boards), of one device. Of CPUs vendors state none: `measured` times this
machine, and a log there has no MFU.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp

from latent_reasoning.errors import InputError, nearest


@dataclasses.dataclass(frozen=True)
class Peak:
  kinds: tuple[str, ...]  # what JAX calls it: beginnings of device_kind
  flops: float  # FLOP/s of dense products of bfloat16, without sparsity
  memory: float  # bytes
  bandwidth: float  # of the memory, bytes/s
  link: float  # bytes/s out of a device, over all its links to others of its pod
  pod: int  # devices so linked
  network: float  # bytes/s out of a device beyond the pod; 0: not stated


PEAKS = {
    'v4': Peak(('TPU v4',), 275e12, 34e9, 1200e9, 300e9, 4096, 0),
    'v5e': Peak(('TPU v5 lite', 'TPU v5e'), 197e12, 16e9, 819e9, 200e9, 256, 3.1e9),
    'v5p': Peak(('TPU v5',), 459e12, 95e9, 2765e9, 600e9, 8960, 6.2e9),
    'v6e': Peak(('TPU v6',), 918e12, 32e9, 1638e9, 400e9, 256, 12.5e9),
    'A100': Peak(('NVIDIA A100-SXM4-80GB',), 312e12, 80e9, 2039e9, 300e9, 8, 25e9),
    'A100-40GB': Peak(('NVIDIA A100-SXM4-40GB',), 312e12, 40e9, 1555e9, 300e9, 8, 25e9),
    'H100': Peak(('NVIDIA H100 80GB HBM3',), 989e12, 80e9, 3350e9, 450e9, 8, 50e9),
    'H200': Peak(('NVIDIA H200',), 989e12, 141e9, 4800e9, 450e9, 8, 50e9),
    'RTX4090': Peak(('NVIDIA GeForce RTX 4090',), 165e12, 24e9, 1008e9, 32e9, 8, 0)}
HERE = 'here'


def of(device_kind: str) -> Peak | None:
  """The figures of what JAX calls a device, None where there are none."""
  return next((peak for peak in PEAKS.values() if device_kind.startswith(peak.kinds)), None)


def named(name: str) -> Peak:
  """The figures of a name of `PEAKS`, or of this machine; InputError for another."""
  if name == HERE:
    return measured()
  known = {one.lower(): peak for one, peak in PEAKS.items()}
  if name.lower() not in known:
    raise InputError(f'--device_kind={name} is unknown; {nearest(name, (*PEAKS, HERE))}')
  return known[name.lower()]


def measured(size: int = 1536, repeats: int = 5) -> Peak:
  """The best of some matrix products and copies in float32 on the first device here.

  Its collectives are copies in memory, and so is the bandwidth of its links.
  """
  def best(function, a) -> float:
    times = []
    for _ in range(repeats + 1):  # the first one compiles
      began = time.perf_counter()
      jax.block_until_ready(function(a))
      times.append(time.perf_counter() - began)
    return min(times)
  square, long = jnp.ones((size, size)), jnp.ones(2**26)
  flops = 2 * size**3 / best(jax.jit(lambda a: a @ a), square)
  bandwidth = 2 * long.nbytes / best(jax.jit(lambda a: a + 1), long)  # read and written
  memory = (jax.devices()[0].memory_stats() or {}).get('bytes_limit', 0.0)
  return Peak((), flops, memory, bandwidth, bandwidth / 2, 1 << 30, 0)
