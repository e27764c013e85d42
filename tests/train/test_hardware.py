"""Peak figures: by JAX's names of devices, by ours, and measured."""

import pytest

from latent_reasoning.errors import InputError
from latent_reasoning.train import hardware


@pytest.mark.parametrize('kind, name', [
    ('TPU v4', 'v4'), ('TPU v5 lite', 'v5e'), ('TPU v5', 'v5p'), ('TPU v5p', 'v5p'),
    ('TPU v6 lite', 'v6e'), ('TPU v6e', 'v6e'), ('NVIDIA A100-SXM4-80GB', 'A100'),
    ('NVIDIA H100 80GB HBM3', 'H100'), ('NVIDIA H200', 'H200')])
def test_kinds_of_jax(kind, name):
  assert hardware.of(kind) is hardware.named(name)


def test_unknown():
  """A log goes on without MFU; a plan asks for a known name."""
  assert hardware.of('cpu') is None
  assert hardware.of('NVIDIA H100 PCIe') is None  # slower than the board we know
  with pytest.raises(InputError, match="did you mean 'H200'.*here"):
    hardware.named('h20')


def test_measured():
  """A machine of our day does more than a billion of either a second."""
  found = hardware.measured(size=256, repeats=2)
  assert 1e9 < found.flops < 1e16 and 1e8 < found.bandwidth < 1e14
