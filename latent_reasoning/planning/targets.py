"""Devices that are not here, as XLA's own compilers know them: TPU topologies and GPUs.

A target is `tpu:v5p:2x2x1`, the topology as Google writes it, or `gpu:h100`, `gpu:h100:8` for
as many in one host. Compilers come with the extras plan-tpu (libtpu) and plan-gpu (the CUDA
plug-in of JAX); neither needs its device. GPUs are described by public figures: NVIDIA's
data sheets and the tuning guides of CUDA.
"""

import dataclasses
import importlib.util
import re
from collections.abc import Sequence
from typing import Any

from latent_reasoning.errors import InputError, nearest

# Before JAX is imported: libtpu is not to look for a TPU, nor to ask a metadata server.
ENVIRONMENT = {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_ID': '0',
               'TPU_ACCELERATOR_TYPE': 'v5p-8', 'TPU_WORKER_HOSTNAMES': 'localhost'}
TPUS = {'v4': 'v4', 'v5e': 'v5e', 'v5p': 'v5p', 'v6e': 'v6e'}  # and their names in `hardware`
EXTRAS = {'tpu': ('libtpu', 'plan-tpu'), 'gpu': ('jax_cuda13_plugin', 'plan-gpu')}


@dataclasses.dataclass(frozen=True)
class Gpu:
  """What XLA asks of a GPU: XLA's GpuTargetConfigProto, of one device."""
  name: str
  peak: str  # in `hardware.PEAKS`
  capability: tuple[int, int]
  cores: int
  memory: int  # bytes
  bandwidth: int  # bytes/s
  clock: float  # GHz
  l2: int
  fpus: int = 128
  threads: int = 2048  # a core at most
  shared: int = 233_472  # bytes a core; a block may have 1 KiB less

  def proto(self) -> str:
    return f'''
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared} threads_per_core_limit: {self.threads}
  core_count: {self.cores} fpus_per_core: {self.fpus} block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {self.bandwidth}
  l2_cache_size: {self.l2} clock_rate_ghz: {self.clock} device_memory_size: {self.memory}
  shared_memory_per_block_optin: {self.shared - 1024}
  cuda_compute_capability {{ major: {self.capability[0]} minor: {self.capability[1]} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{self.name}"
'''


GPUS = {
    'h100': Gpu('NVIDIA H100 80GB HBM3', 'H100', (9, 0), 132, 84_978_434_048,
                3_352_320_000_000, 1.98, 52_428_800),
    'h200': Gpu('NVIDIA H200', 'H200', (9, 0), 132, 150_754_820_096, 4_800_000_000_000, 1.98,
                62_914_560),
    'a100-40gb': Gpu('NVIDIA A100-SXM4-40GB', 'A100-40GB', (8, 0), 108, 42_298_834_944,
                     1_555_200_000_000, 1.41, 41_943_040, fpus=64, shared=167_936),
    'rtx4090': Gpu('NVIDIA GeForce RTX 4090', 'RTX4090', (8, 9), 128, 25_393_692_672,
                   1_008_096_000_000, 2.52, 75_497_472, threads=1536, shared=102_400)}


@dataclasses.dataclass(frozen=True)
class Target:
  """A parsed target.

  Attributes:
    kind: its device, a name of `hardware.PEAKS`.
  """
  text: str
  platform: str
  kind: str
  topology: str

  def devices(self) -> Sequence[Any]:
    """Its devices, to make a mesh of; nothing can be put on them.

    Raises:
      InputError: the compiler is not installed, or knows no such topology.
    """
    package, extra = EXTRAS[self.platform]
    if importlib.util.find_spec(package) is None:
      raise InputError(f"--target={self.text} needs the compiler of its platform: pip install "
                       f"-e '.[{extra}]'; without, --devices and --device_kind give an upper "
                       'bound')
    from jax.experimental import topologies
    try:
      if self.platform == 'tpu':
        return topologies.get_topology_desc(platform='tpu', topology_name=self.topology).devices
      gpu = GPUS[self.text.split(':')[1]]
      return topologies.get_topology_desc(
          '', 'cuda', target_config=gpu.proto(), topology=self.topology).devices
    except Exception as error:  # of whatever kind the compiler raises
      reason = ' '.join(str(error).split())[:200]
      raise InputError(f'--target={self.text}: {reason}; expected a topology such as '
                       'tpu:v5e:2x2, tpu:v5p:2x2x1 or gpu:h100:8') from None


def parse(text: str) -> Target:
  """Reads `tpu:KIND:TOPOLOGY`, `gpu:KIND` or `gpu:KIND:COUNT`; InputError for others."""
  platform, _, rest = text.partition(':')
  kind, _, shape = rest.partition(':')
  known = {'tpu': TPUS, 'gpu': GPUS}.get(platform)
  if known is None:
    raise InputError(f'--target={text}; expected tpu:KIND:TOPOLOGY, such as tpu:v5p:2x2x1, or '
                     'gpu:KIND, such as gpu:h100')
  if kind not in known:
    raise InputError(f'--target={text}: {kind!r} is unknown; {nearest(kind, known)}')
  if platform == 'gpu':
    if not re.fullmatch(r'[1-9]\d*', shape or '1'):
      raise InputError(f'--target={text}: found {shape!r} behind the kind; expected how many '
                       f'GPUs in one host, such as gpu:{kind}:8')
    return Target(text, platform, GPUS[kind].peak, f'1x1x{shape or 1}')
  if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*){1,2}', shape):
    raise InputError(f'--target={text}: found the topology {shape!r}; expected one such as '
                     f"tpu:{kind}:{'2x2' if kind in ('v5e', 'v6e') else '2x2x1'}")
  return Target(text, platform, TPUS[kind], f'{kind}:{shape}')

