"""What RiM's blocks and the implicit memory hold, and whether it matters."""

import importlib
import importlib.util
import pkgutil

_HOMES = {'value_probes': 'probing', 'trajectories': 'probing', 'lens': 'probing',
          'attention': 'probing', 'interventions': 'activation_patching',
          'collect': 'block_states'}


def __getattr__(name: str):
  if name in _HOMES:  # also where it is called as its module, which the import would leave here
    globals()[name] = getattr(importlib.import_module(f'{__name__}.{_HOMES[name]}'), name)
    return globals()[name]
  if importlib.util.find_spec(f'{__name__}.{name}'):  # lr.analysis.probing, without an import
    return importlib.import_module(f'{__name__}.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}; its modules and '
                       f"functions: {', '.join(__dir__())}")


def __dir__() -> list[str]:
  return sorted({*_HOMES, *(found.name for found in pkgutil.iter_modules(__path__))})
