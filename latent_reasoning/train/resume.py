"""What of a begun run may change when it goes on.

A key is one of four. What changes no number beyond rounding is free (`FREE`). What names files
is free where they hold the same (`HASHED`): a checkpoint keeps hashes of them. `train.extend`
lifts the end of the run. All others would make another run, and are refused by name.
"""

from collections.abc import Sequence
from typing import Any

from latent_reasoning import config as config_lib
from latent_reasoning.config import Config
from latent_reasoning.errors import InputError

# A name that ends in a dot is a group.
FREE = (
    'device', 'mesh.', 'optim.grad_accum_steps', 'model.remat', 'model.loss_tile',
    'model.attention', 'imm.implementation', 'imm.chunk', 'data.cache_dir', 'sweep.',
    'train.log_every', 'train.eval_every', 'train.save_every', 'train.max_to_keep',
    'train.restart', 'train.max_loss', 'train.compilation_cache', 'train.prefetch',
    'train.peer_timeout', 'train.profile_steps', 'train.wandb',
    # Not those of validation, which chooses among checkpoints: it would compare unlike numbers.
    'eval.batch_size', 'eval.test_problems', 'eval.samples', 'eval.temperature', 'eval.top_k',
    'eval.checkpoint', 'eval.sets', 'eval.checkpoint_selection', 'eval.contamination',
    'eval.latency_repeats', 'eval.leakage_rows')
HASHED = ('data.dir', 'data.path', 'data.train', 'data.valid', 'data.test', 'tokenizer.path',
          'model.init_from')
LIFTED = ('train.extend',)


def kind(key: str) -> str:
  """'free', 'hashed', 'lifted' or 'refused'."""
  for name, keys in (('free', FREE), ('hashed', HASHED), ('lifted', LIFTED)):
    if any(key.startswith(one) if one.endswith('.') else key == one for one in keys):
      return name
  return 'refused'


def changes(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], list[str]]:
  """What differs between two configurations, 'config.key: old -> new': what may, and what is
  refused."""
  found = {'refused': []}
  for line in config_lib.difference(old, new):
    found.setdefault(kind(line.partition(':')[0].removeprefix('config.')), []).append(line)
  refused = found.pop('refused')
  return [line for lines in found.values() for line in lines], refused


def refusal(what: str, refused: Sequence[str], old: dict[str, Any], new: dict[str, Any]
            ) -> InputError:
  """The error that names the keys, and the one that lifts it where there is one."""
  listed = '\n  '.join(refused)
  more = _more_steps(old, new)
  extend = ','.join(map(str, [*old.get('train', {}).get('extend', ()), more]))
  lifted = (f'. More steps of the last stage are had with --config.train.extend={extend}, and '
            'its own as they were') if more else ''
  kept = ('. What is validated says which checkpoint is the best one, and so cannot change'
          * any('config.eval.' in line for line in refused))
  return InputError(
      f'{what} of another configuration; these keys differ (there -> here):\n  {listed}\n'
      f'Give the keys as they were, or another --workdir=DIR{lifted}{kept}')


def _more_steps(old: dict[str, Any], new: dict[str, Any]) -> int:
  """Steps that the last stage has more here than there; 0: not more, or epochs count."""
  try:
    before, now = ([group['optim'][stage]['steps'] for stage in ('stage1', 'stage2')]
                   for group in (old, new))
    last = 1 if any(before[1:]) or old['optim']['stage2']['epochs'] else 0
    return max(0, now[last] - before[last]) if before[last] else 0
  except (KeyError, TypeError):  # of another version
    return 0


def check_extend(old: Sequence[int], new: Sequence[int], step: int, total: int) -> None:
  """Raises InputError where steps that are done had another learning rate than they have now.

  Args:
    old, new: train.extend of the checkpoint, and of now.
    step: of the checkpoint.
    total: steps without what is added.
  """
  begun = sum(step > total + sum(old[:i]) for i in range(len(old)))
  if list(new[:begun]) != list(old[:begun]):
    added = ','.join(map(str, old))
    raise InputError(
        f'config.train.extend is {tuple(new)}, but the run was extended by {tuple(old)}, of '
        f'which {step - total:,} steps are done at their learning rate; expected these '
        f'entries first, and further ones behind them: --config.train.extend={added},N')


def said(config: Config, changed: Sequence[str]) -> list[str]:
  """What a training that goes on says of the changes, in one line, and what they mean."""
  lines = [f"changed since: {'; '.join(changed)}"] * bool(changed)
  stages = config.optim.stage1, config.optim.stage2
  if any('grad_accum_steps' in line for line in changed) and (
      config.model.lora.dropout or any(stage.dropout for stage in stages)):
    lines.append('dropout draws its masks by microbatch: others from here on than without '
                 'the change')
  return lines
