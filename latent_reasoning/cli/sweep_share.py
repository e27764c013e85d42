"""Which runs of a sweep one command does: all, those of a task of a job array, or none."""

import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
from collections.abc import Mapping

from latent_reasoning.errors import InputError, ensure

# Where engines number their tasks from 0. An Indexed Job of Kubernetes also numbers the
# processes that train one model.
ARRAY, INDEXED = 'SLURM_ARRAY_TASK_ID', 'JOB_COMPLETION_INDEX'


@dataclasses.dataclass(frozen=True)
class Slot:
  """What one run has of this machine.

  Attributes:
    gpu: identifier of a device (CUDA_VISIBLE_DEVICES); '': whatever there is.
    core: number of a CPU; None: all.
  """
  gpu: str = ''
  core: int | None = None


WHOLE = Slot()


@dataclasses.dataclass(frozen=True)
class Share:
  """What one command does of a sweep.

  Attributes:
    task: number of the first run, from 0; None: all runs.
    tasks: how many tasks share the runs: this one has every so many-th; 0: one run a task.
    report: do none, and write the table of what there is.
    slots: what takes a run each at once, a GPU or a core; (): one run at a time has all.
    joined: flags by which the processes of one run find each other.
    processes: how many these are.
  """
  task: int | None = None
  tasks: int = 0
  report: bool = False
  slots: tuple['Slot', ...] = ()
  joined: tuple[str, ...] = ()
  processes: int = 1

  def of(self, runs: int) -> range:
    """Numbers of the runs that are done here, of so many.

    Raises:
      InputError: there is no run of this task's number.
    """
    if self.report:
      return range(0)
    if self.task is None:
      return range(runs)
    ensure(self.tasks or self.task < runs, f'task {self.task} has no run: the comparison has '
           f'{runs} runs, numbered 0 to {runs - 1}; expected a job array of these, or '
           '--task=I/N to share them among N')
    return range(self.task, runs, self.tasks or runs)


def read(task: str, per_gpu: bool, joined: tuple[str, ...] = (), processes: int = 1,
         environment: Mapping[str, str] = os.environ, per_core: bool = False) -> Share:
  """The share that the command line or else an engine's variables give.

  Args:
    task: of --task: '', I, I/N or report.
    per_gpu: of --per_gpu.
    joined, processes: as in `Share`.
    environment: of the process.
    per_core: of --per_core.

  Raises:
    InputError: no such task, no GPU, or no way to pin a run to a core.
  """
  ensure(not (per_gpu and per_core), '--per_gpu and --per_core each say what a run has; '
         'expected one of them')
  slots = (tuple(Slot(gpu=one) for one in visible_gpus(environment)) if per_gpu else
           tuple(Slot(core=one) for one in cores()) if per_core else ())
  flag, what = ('--per_gpu', 'GPU') if per_gpu else ('--per_core', 'core')
  ensure(not (slots and joined), f'{flag} gives each run one {what} and one process; expected '
         'it without --distributed and --coordinator')
  if task == 'report':
    return Share(report=True)
  if not task and (number := environment.get(ARRAY, '')):
    task = number
  elif not task and not joined:
    task = environment.get(INDEXED, '')
    if not task and int(environment.get('SLURM_STEP_NUM_TASKS', '1')) > 1:  # of srun
      task = f"{environment['SLURM_PROCID']}/{environment['SLURM_STEP_NUM_TASKS']}"
  if not task:
    return Share(slots=slots, joined=joined, processes=processes)
  found = re.fullmatch(r'(\d+)(?:/(\d+))?', task)
  if not found or (found[2] and not int(found[1]) < int(found[2])):
    raise InputError(f"--task={task}; expected the number of a run from 0, I/N for every N-th "
                     "from I on, with I below N, or 'report'")
  return Share(int(found[1]), int(found[2] or 0), slots=slots, joined=joined,
               processes=processes)


def cores() -> list[int]:
  """Numbers of the CPUs that this process may run on.

  Raises:
    InputError: this system cannot pin a process to a core.
  """
  ensure(hasattr(os, 'sched_getaffinity'), '--per_core pins each run to a core, which this '
         'system has no call for; expected Linux')
  return sorted(os.sched_getaffinity(0))


def visible_gpus(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
  """Identifiers of this machine's GPUs, found without opening one.

  Raises:
    InputError: there is none.
  """
  given = environment.get('CUDA_VISIBLE_DEVICES')
  if given is not None:
    found = tuple(one.strip() for one in given.split(',') if one.strip())
  else:
    listed = ''
    if program := shutil.which('nvidia-smi'):
      listed = subprocess.run([program, '-L'], capture_output=True, text=True,
                              check=False).stdout
    count = len(re.findall(r'^GPU \d+:', listed, re.M)) or sum(
        1 for _ in pathlib.Path('/proc/driver/nvidia/gpus').glob('*'))
    found = tuple(map(str, range(count)))
  ensure(found, '--per_gpu: no GPU is seen here (nvidia-smi -L, CUDA_VISIBLE_DEVICES); '
         'expected a machine with some')
  return found
