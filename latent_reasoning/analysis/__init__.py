"""What RiM's blocks and the implicit memory hold, and whether it matters."""

import importlib
import importlib.util

_HOMES = {'value_probes': 'probing', 'trajectories': 'probing', 'lens': 'probing',
          'attention': 'probing', 'interventions': 'activation_patching',
          'collect': 'block_states'}


def __getattr__(name: str):
  if name in _HOMES:
    return getattr(importlib.import_module(f'{__name__}.{_HOMES[name]}'), name)
  if importlib.util.find_spec(f'{__name__}.{name}'):  # lr.analysis.probing, without an import
    return importlib.import_module(f'{__name__}.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
