"""The methods: each file has the sequences, stages, prompt and loss of one family.

To add one, write a file with its `Method` and name it here.
"""

from latent_reasoning.config import Config
from latent_reasoning.errors import InputError, ensure, nearest
from latent_reasoning.methods.baselines import COT, DIRECT, DIRECT_STEPS, PAUSE, PAUSE_STEPS
from latent_reasoning.methods.coconut import COCONUT
from latent_reasoning.methods.codi import CODI
from latent_reasoning.methods.icot import ICOT
from latent_reasoning.methods.language_model import LANGUAGE_MODEL
from latent_reasoning.methods.lotus import LOTUS
from latent_reasoning.methods.pccot import PCCOT
from latent_reasoning.methods.rim import RIM
from latent_reasoning.methods.rim_parallel import RIM_PARALLEL
from latent_reasoning.sequences import Method, at_inference

METHODS = {method.name: method for method in (
    RIM, DIRECT, DIRECT_STEPS, COT, PAUSE, PAUSE_STEPS, ICOT, COCONUT, CODI, PCCOT, LOTUS,
    RIM_PARALLEL, LANGUAGE_MODEL)}


def get(name: str) -> Method:
  """The method of a name; InputError for an unknown one."""
  if name not in METHODS:
    raise InputError(f"config.method '{name}' is unknown; {nearest(name, METHODS)}")
  return METHODS[name]


def check(config: Config) -> Method:
  """The method of a configuration; InputError where other keys ask of it what it has not."""
  method, aux, decoder = get(config.method), config.aux, config.reasoning_decoder
  with_blocks = ', '.join(name for name, one in METHODS.items() if one.has_blocks)
  for key, used in (('reasoning_decoder.source=blocks', decoder.source == 'blocks'),
                    ('aux.align and smooth', aux.align or aux.smooth),
                    ('rim.externalize', config.rim.externalize)):
    ensure(not used or method.has_blocks, f'config.{key} is of memory blocks, and method '
           f'{method.name} has none; expected one that has: {with_blocks}')
  thinking = [name for name, one in METHODS.items() if one.has_latents and not one.passes]
  ensure(decoder.source != 'latents' or method.name in thinking,
         'config.reasoning_decoder.source=latents is of continuous thoughts, and method '
         f'{method.name} has none that follow one another; expected one of '
         f'{", ".join(thinking)}')
  joint = bool(decoder.source) and decoder.joint
  ensure(not (joint and (aux.align or aux.smooth)), 'config.aux.align and smooth cannot be '
         'trained with config.reasoning_decoder.joint; expected one of them')
  ensure(not (method.loss and (joint and not method.has_latents or aux.align or aux.smooth)),
         f'method {method.name} has a loss of its own, which config.aux and '
         'config.reasoning_decoder.joint would replace; expected neither with it')
  ensure(not (method.has_latents and config.imm.write_policy), f'method {method.name} has '
         "continuous thoughts, which no memory reads; expected config.imm.write_policy ''")
  passes = method.passes(at_inference(config)) if method.passes else 1
  for key, used in (('imm.write_policy', config.imm.write_policy),
                    ('reasoning_decoder.source', decoder.source),
                    ('aux.align and smooth', aux.align or aux.smooth)):
    ensure(passes == 1 or not used, f'config.{key} goes with one pass over latents or blocks, '
           f'and there are {passes}; expected one of them off')
  for why, used in (
      (f'method {method.name} has texts and no problems', method.is_text),
      (f'method {method.name} has continuous thoughts', method.has_latents),
      ('there are several passes over latents or blocks', passes > 1),
      ('a memory (config.imm.write_policy) goes from one token to the next',
       config.imm.write_policy),
      ('config.reasoning_decoder.joint says one text of each readout', joint),
      ('config.aux compares the problems of a batch', aux.align or aux.smooth)):
    ensure(not (config.data.packing and used), 'config.data.packing puts several problems in '
           f'a row, but {why}; expected config.data.packing False')
  if method.check:
    method.check(config)
  return method
