"""The training loop: curriculum, validation, checkpoints, and every way to stop."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax

from latent_reasoning import report
from latent_reasoning.errors import Diverged, InputError
from latent_reasoning.models import imm, lora
from latent_reasoning.parallel import multihost, programs, sharding
from latent_reasoning.progress import slow
from latent_reasoning.train import curriculum as curriculum_lib
from latent_reasoning.train import flops, resume, versions, workdir
from latent_reasoning.train import loggers as loggers_lib
from latent_reasoning.train import train_step as step_lib
from latent_reasoning.train.curriculum import StageProgress
from latent_reasoning.train.metrics import Metrics, Progress
from latent_reasoning.train.profiler import Profile, Speed
from latent_reasoning.train.train_step import TrainState

if TYPE_CHECKING:
  from latent_reasoning.experiment import Experiment

# Sums of a step that are logged in a way of their own; a method's others are logged by name.
OWN_SUMS = ('loss', 'weight', 'correct', 'grad_norm', 'memory_grad_norm', 'decoder_loss',
            'decoder_weight', 'decoder_correct')


class Interrupted(Exception):
  """Training stopped on a signal; everything done is saved.

  Attributes:
    signal: its number.
    step: where the run goes on.
  """

  def __init__(self, number: int, step: int):
    super().__init__(f'stopped by {signal.Signals(number).name} at step {step}')
    self.signal, self.step = number, step


STOP = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


class Signals:
  """Turns the first signal of `STOP`, or SIGINT, into a request; the second stops at once.

  With several processes, one of `STOP` to any of them is a request to all, and SIGINT stops.
  What the process was started to ignore, as nohup does with SIGHUP, it goes on ignoring.
  """

  def __init__(self):
    self.received: int | None = None
    self._old: dict[int, Any] = {}

  def asked(self, step: int) -> int | None:
    """The signal that asks to stop after a step, the same in all processes."""
    if multihost.count() > 1:
      return signal.SIGTERM if multihost.preempted(step) else None
    return self.received

  def __enter__(self):
    several = multihost.count() > 1  # JAX listens to SIGTERM, and tells the others
    for number in STOP[1:] if several else (signal.SIGINT, *STOP):
      if signal.getsignal(number) is not signal.SIG_IGN:
        self._old[number] = signal.signal(
            number, self._pass_on if several else self._handle)
    return self

  def _pass_on(self, number, frame):
    os.kill(os.getpid(), signal.SIGTERM)

  def _handle(self, number, frame):
    if self.received:
      raise KeyboardInterrupt
    self.received = number
    with contextlib.suppress(OSError):  # perhaps the terminal is gone
      os.write(2, b'\nsaving after this step; once more to stop without saving\n')

  def __exit__(self, *_):
    if multihost.count() > 1:
      signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number, old in self._old.items():
      signal.signal(number, old)


@dataclasses.dataclass
class _Pending:
  """Metrics of a step, still on the device: read one step late, so that the
  host prepares the next batch while the device works."""
  step: int
  stage: int
  sums: dict[str, Any]
  learning_rate: float
  work: tuple[int, int, float] = (0, 0, 0.0)  # profiler.Speed
  watched: dict[str, float] = dataclasses.field(default_factory=dict)


def _limit(run) -> str:
  """Says which stages config.optim.max_epochs made shorter."""
  asked = [stage.steps for stage in run.curriculum.stages]
  if not run.config.optim.max_epochs or all(
      n <= length for n, length in zip(asked, run.curriculum.lengths, strict=True)):
    return ''
  return (f' (not {tuple(asked)}: at most {run.config.optim.max_epochs:g} passes over '
          f'{len(run.splits.train):,} problems, config.optim.max_epochs)')


def train(run: 'Experiment', loggers: Sequence[loggers_lib.Logger] = ()) -> TrainState:
  """Trains to the end of the curriculum, from the newest sound checkpoint if any.

  Args:
    run: what to train.
    loggers: that take its numbers, beside those of config.train.

  Returns:
    the final state, saved.

  Raises:
    Diverged: the loss is not finite or too large.
    DeviceError: out of memory, say.
    Interrupted: after SIGINT or SIGTERM, saved.
  """
  programs.listen()
  with multihost.explained(run.config, True), run.workdir.writing(), run.on_mesh():
    return _train(run, loggers)


def _train(run: 'Experiment', loggers: Sequence[loggers_lib.Logger]) -> TrainState:
  config, curriculum = run.config, run.curriculum
  run.require_data()
  loggers_lib.check(config)
  lost = run.workdir.lost_checkpoints()
  begins_again = InputError(
      f'{lost}, and none is sound in {run.workdir.checkpoints}; training would begin again. '
      'Bring one back, or give --config.train.restart=True (what is logged is kept in '
      'metrics.void.jsonl)') if lost and not config.train.restart else None
  if begins_again and not run.workdir.checkpoints.exists():
    raise begins_again  # before there is an empty folder
  checkpoints = run.checkpoints(writer=True)
  restored = checkpoints.restore(run.like)
  changed = []
  if restored:
    changed = same(run, restored.meta)
  elif begins_again:
    raise begins_again
  with programs.called('the initial parameters'):
    state = restored.state if restored else run.init()
  start = int(state.step)
  loggers = multihost.primary_first(lambda: loggers_lib.more(config, run.workdir, loggers))
  run.follow(restored and restored.meta)
  metrics = Metrics(run.workdir, start, config.causal, loggers)
  progress = Progress(curriculum.total, start, config.train.log_every, config.causal)
  loop = _Loop(run, checkpoints, metrics, progress)
  if restored:
    loop.scores = list(restored.meta.get('parts', {}).get('scores', ()))
    loop.final = list(restored.meta.get('stopping', {}).get('scores', ()))
  profile = Profile(run.workdir.profile, config.train.profile_steps, start, curriculum.total,
                    progress.say)
  progress.say(report.data(run.splits.report))
  count, own = (sum(a.size for a in jax.tree.leaves(part)) for part in (
      state.params, lora.split(state.params, run.trained)[0]))
  part = f', {own:,} of them trained' * (own < count)
  stages = ' + '.join(f'{steps:,}' for steps in curriculum.lengths if steps)
  progress.say(f'{run.trains}: {count:,} parameters{part}, {stages} steps{_limit(run)}, '
               f'files in {run.workdir.path}')
  workdir.record_changes(run.workdir, config, start)
  progress.say(loop.will_compile())
  if restored:
    for line in (f'resuming from step {start}', versions.changes(restored.meta),
                 *resume.said(config, changed)):
      if line:
        progress.say(line)
  if curriculum.added and start < curriculum.total:
    progress.say(curriculum.extension)
  try:
    with multihost.explained(config, True), Signals() as signals, profile:
      return loop.run_from(state, start, signals, profile)
  finally:
    loop.watch.stop()
    progress.close()
    metrics.close()
    checkpoints.close()


def same(run: 'Experiment', meta: dict[str, Any]) -> list[str]:
  """What of the configuration changed since a checkpoint, as it may (train.resume).

  Raises:
    InputError: configuration, data, tokenizer or pretrained weights are not the run's.
  """
  run.same_sources(meta)
  theirs = meta['config']
  ours = json.loads(json.dumps(dataclasses.asdict(run.config)))
  found, refused = resume.changes(theirs, ours)
  if refused:
    raise resume.refusal(f'the checkpoint of step {meta["step"]} is', refused, theirs, ours)
  resume.check_extend(theirs['train'].get('extend', ()), ours['train']['extend'], meta['step'],
                      run.curriculum.total - sum(run.curriculum.added))
  if changed := [s for s, hashed in run.fingerprint.items() if meta['data'].get(s) != hashed]:
    raise InputError(
        f'the data changed since the checkpoint of step {meta["step"]} was saved: '
        f'{", ".join(changed)} hold other problems than then; restore the files, or train in '
        'another --workdir=DIR')
  return found


class _Loop:
  """What the steps share: where metrics go, and the step that is in flight."""

  def __init__(self, run: 'Experiment', checkpoints, metrics: Metrics, progress: Progress):
    self.run, self.checkpoints = run, checkpoints
    self.metrics, self.progress = metrics, progress
    self.speed = Speed(run)
    self.limit = run.config.train.max_loss or 3 * math.log(run.tokenizer.vocab_size)
    self.pending: _Pending | None = None
    self.timer = (time.monotonic(), 0)  # when, and predictions since
    self.warned: set[str] = set()
    self.scores: list[float] = []  # of the validations since this part began
    self.final: list[float] = []  # of those of what is asked at inference
    self.watch = multihost.Watch(run.config.train.peer_timeout)
    self.shapes: set[Any] = set()  # of batches, by stage: each is a program of its own
    self.expected = {stage: run.batches.shapes(stage)
                     for stage, steps in enumerate(run.curriculum.lengths, 1) if steps}

  def will_compile(self) -> str:
    """Says how many programs the run will compile."""
    stages = ', '.join(f'{n} in stage {stage}' for stage, n in self.expected.items())
    widths = 1 if self.run.batches.method.is_text else len(self.run.config.data.buckets.prefix)
    return (f'programs to compile: at most about {sum(self.expected.values())} training steps '
            f'({stages}), one for each shape of a batch when its first one comes, and '
            f'{widths} to validate and test')

  def name(self, stage: int, batch) -> str:
    """What the training step of a batch is called while it is compiled."""
    shapes = flops.shapes(batch)
    self.shapes.add((stage, shapes))
    rows, length = jax.tree.leaves(batch)[0].shape[:2]  # its tokens, or what a decoder reads
    what = f'{rows} x {length} tokens'
    if getattr(batch, 'slots', 0):
      what += f' for {self.run.config.optim.batch_size} problems'
    return (f'training step {len(self.shapes)} of about {sum(self.expected.values())} (stage '
            f'{stage}, {what})')

  def run_from(self, state: TrainState, start: int, signals: Signals,
               profile: Profile) -> TrainState:
    config, steppers = self.run.config, {}
    for step, batch in self.batches(start):
      curriculum = self.run.curriculum
      moment, stage = curriculum.at(step), curriculum.stage(step)
      if curriculum.resets(step):
        fresh = self.run.begin(state.params, moment.stage)
        state = dataclasses.replace(state, opt_state=fresh.opt_state)
      if moment.stage not in steppers:
        if step > start and steppers:
          self.read()  # what the last stage's last step was comes first
          other = '' if self.run.batches.method.is_text else (
              ', which predicts other tokens: its loss does not compare with that before')
          self.progress.say(f'step {step + 1} begins stage {moment.stage}{other}')
        steppers = {moment.stage: step_lib.make_train_step(
            self.run.model(stage.dropout), self.run.objective,
            self.run.tx(moment.stage), config.seed, config.optim.grad_accum_steps,
            self.run.trained, self.run.placed(state))}
      rate = curriculum.learning_rate(step)
      profile.at(step, state)
      work = self.speed.work(moment.stage, state, batch)
      batch = sharding.batch(batch, self.run.mesh)
      with programs.called(self.name(moment.stage, batch)):
        state, sums = steppers[moment.stage](state, batch, rate)
      self.read()
      stop = signals.asked(step + 1)
      logs = _due(step + 1, config.train.log_every)
      self.pending = _Pending(step + 1, moment.stage, sums, rate, work,
                              self.run.watch(state.params, batch) if logs else {})
      last = step + 1 == curriculum.total
      accuracy, final = None, False
      if last or _due(step + 1, config.train.eval_every):
        self.read()
        accuracy = self.validate(state, step + 1, moment)
        # Only such checkpoints compete, and only their scores say that nothing improves.
        if final := curriculum.final(step):
          last = self.stalls(step + 1, accuracy) or last
      if not last and curriculum.parts > 1:
        self.parts(step + 1, accuracy)
      if last or stop or accuracy is not None or _due(
          step + 1, config.train.save_every):
        self.read()  # nothing is saved after a loss that was not looked at
        self.checkpoints.save(
            state, accuracy if final else None, stage=moment.stage, method=config.method,
            curriculum=curriculum.lengths, config=dataclasses.asdict(config),
            parts={'starts': self.run.curriculum.starts or (), 'scores': self.scores},
            stopping={'ended': self.run.curriculum.ended, 'scores': self.final},
            data=self.run.fingerprint, sources=self.run.sources)
        self.run.workdir.push()
      if stop and not last:
        self.checkpoints.wait()
        raise Interrupted(stop, step + 1)
    self.checkpoints.wait()
    return state

  def batches(self, step: int) -> Iterator[tuple[int, Any]]:
    """Every step from one on with its batch; those made ahead of a part are made again."""
    while step < self.run.curriculum.total:
      curriculum = self.run.curriculum
      for batch in self.run.batches.iterate(step):
        yield step, batch
        step += 1
        if self.run.curriculum is not curriculum:
          break

  def stalls(self, step: int, accuracy: float) -> bool:
    """Ends the training at a step where validation has not improved for long enough."""
    self.final.append(accuracy)
    patience, curriculum = self.run.config.optim.patience, self.run.curriculum
    if step == curriculum.total or not curriculum_lib.stalled(self.final, patience):
      return False
    self.run.batches.curriculum = dataclasses.replace(curriculum, ended=step)
    why = ('validation has every problem right' if max(self.final) >= 1 else
           f'the last {patience} validations were no better')
    self.progress.say(f'training ends at step {step} of at most {curriculum.total}: {why} '
                      '(config.optim.patience)')
    return True

  def parts(self, step: int, accuracy: float | None) -> None:
    """Begins the next part of stage 1 at a step where the one before it has converged, and
    logs every part that begins there."""
    curriculum = self.run.curriculum
    before, now = curriculum.at(step - 1), curriculum.at(step)
    if curriculum.starts is not None and accuracy is not None and now.stage == 1:
      self.scores.append(accuracy)
      if now.part < curriculum.parts - 1 and curriculum_lib.converged(
          self.scores, self.run.config.baselines):
        self.run.batches.curriculum = curriculum.with_part(step)
        now, self.scores = self.run.curriculum.at(step), []
    if now.stage == 1 and now.part > before.part:
      self.read()
      self.metrics.write(step, 1, 'part', part=now.part)
      self.progress.say(f'step {step + 1} begins part {now.part} of stage 1, of '
                        f'{curriculum.parts}: other tokens are predicted')

  def read(self) -> None:
    """Reads the metrics of the step in flight, checks and logs them."""
    if not self.pending:
      return
    p, self.pending = self.pending, None
    self.watch.beat()
    sums = {k: float(v) for k, v in jax.device_get(p.sums).items()}
    loss = sums['loss'] / sums['weight']
    if not (math.isfinite(loss) and math.isfinite(sums['grad_norm'])) or loss > self.limit:
      self.metrics.write(p.step, p.stage, 'train', loss=loss, grad_norm=sums['grad_norm'])
      self.checkpoints.wait()
      good = self.checkpoints.steps()
      way = (f'the last good checkpoint is {self.checkpoints.path / str(good[0])}' if good
             else 'there was no checkpoint yet')
      raise Diverged(
          f'step {p.step}: loss {loss:.4g}, gradient norm {sums["grad_norm"]:.4g}; a finite '
          f'loss of at most {self.limit:.4g} was expected (config.train.max_loss). Training '
          f'stopped and {way}. Lower the learning rate or config.optim.max_grad_norm in a new '
          f'workdir')
    self.timer = (self.timer[0], self.timer[1] + 1)
    self.speed.add(p.work)
    if _due(p.step, self.run.config.train.log_every) or p.step == self.run.curriculum.total:
      began, steps = self.timer
      self.timer = (time.monotonic(), 0)
      seconds = max(1e-9, self.timer[0] - began)
      self.metrics.write(
          p.step, p.stage, 'train', loss=loss, token_accuracy=sums['correct'] / sums['weight'],
          grad_norm=sums['grad_norm'], learning_rate=p.learning_rate,
          steps_per_second=steps / seconds, **self.speed.take(seconds),
          **({'decoder_loss': sums['decoder_loss'] / max(1.0, sums['decoder_weight']),
              'decoder_token_accuracy': sums['decoder_correct'] / max(
                  1.0, sums['decoder_weight'])} if 'decoder_loss' in sums else {}),
          **{k: v / sums['weight'] for k, v in sums.items() if k not in OWN_SUMS},
          **({'memory_grad_norm': sums['memory_grad_norm']} if p.watched else {}), **p.watched)
      self.warn({**sums, **p.watched})
    self.progress.update(p.step, p.stage, loss, self.speed.text)

  def warn(self, found: dict[str, float]) -> None:
    """Says each failure signature of the memory once."""
    if 'read_entropy' not in found:
      return
    slots = imm.slots_of(self.run.config.imm, self.run.config.model.embed_dim)
    for text in imm.warnings(found, slots):
      if text not in self.warned:
        self.warned.add(text)
        self.progress.say(f'warning: {text}')

  def validate(self, state: TrainState, step: int, moment: StageProgress) -> float:
    """Logs the validation and returns its score; in a part of stage 1, as that is trained."""
    of_part = moment.stage == 1 and self.run.curriculum.parts > 1
    with multihost.explained(self.run.config), slow(f'step {step} validation',
                                                    self.progress.say):
      values, score, words = self.run.validate(state.params, moment.part if of_part else None)
    programs.keep_few()
    self.metrics.write(step, moment.stage, 'valid', **values)
    self.progress.say(f'step {step} validation {words}')
    return score


def _due(step: int, every: int) -> bool:
  return bool(every) and step % every == 0
