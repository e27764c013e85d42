"""The Python interface: configurations by name, experiments, results that show themselves.

  import latent_reasoning as lr
  experiment = lr.Experiment(lr.load_config('rim_arithmetic'), workdir='runs/rim')
  experiment.train()
  experiment.evaluate()
  experiment.answer('7+2-5*3+4').by_block
"""

import dataclasses
import functools
import pathlib
import re
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from latent_reasoning import config_loading, experiment, report
from latent_reasoning.analysis import block_states
from latent_reasoning.cli import allocator, block_commands, commands, evaluation, latency
from latent_reasoning.config import Config
from latent_reasoning.data import questions
from latent_reasoning.data.example import Example
from latent_reasoning.errors import InputError, ensure, nearest
from latent_reasoning.eval import answer_matching
from latent_reasoning.eval.latency import in_turn
from latent_reasoning.hf import native
from latent_reasoning.parallel import devices, multihost, programs
from latent_reasoning.report.result import Result
from latent_reasoning.train import trainer
from latent_reasoning.train.loggers import Logger
from latent_reasoning.train.workdir import read_object


def shipped() -> dict[str, pathlib.Path]:
  """The configuration files that come with the package, by name."""
  here = pathlib.Path(__file__).parent
  for folder in (here / 'configs', here.parent / 'configs'):  # installed, or a checkout
    if found := {f.stem: f for f in sorted(folder.glob('*.py')) if f.stem != '__init__'}:
      return found
  return {}


def load_config(name: str, **changes: Any) -> Config:
  """A configuration by name or file.

  Args:
    name: of a shipped one, such as 'rim_arithmetic', or a file FILE.py; either with a
      variant behind a colon, such as 'rim_arithmetic:5'.
    **changes: dotted keys, as in `**{'optim.batch_size': 64}`.

  Raises:
    InputError: no such configuration, variant or key, or a value that a key cannot have.
  """
  stem, _, variant = name.partition(':')
  if not stem.endswith('.py'):
    if stem not in (known := shipped()):
      raise InputError(f'there is no configuration {stem!r}; {nearest(stem, known)}, or a '
                       'file FILE.py')
    stem = str(known[stem])
  return config_loading.read(f'{stem}:{variant}' if variant else stem, changes)


@dataclasses.dataclass(frozen=True)
class Answer:
  """What a model says to a question.

  Attributes:
    question: as it was asked.
    text: all that was generated last, a chain of thought included.
    answer: what is read out of it.
    by_block: RiM's text after each block, the last of which is `text`; else that alone.
  """
  question: str
  text: str
  answer: str
  by_block: tuple[str, ...]

  def __str__(self) -> str:
    return self.answer


def _computes(method: Callable) -> Callable:
  """A method whose errors of devices are DeviceErrors of one line, as on the command line."""
  @functools.wraps(method)
  def wrapped(self, *args, **kwargs):
    with multihost.explained(self.config):
      return method(self, *args, **kwargs)
  return wrapped


_open: set[int] = set()  # experiments that somebody holds, by number


def _dropped(number: int) -> None:
  """Forgets the compiled programs with the last experiment; another one may need its own."""
  _open.discard(number)
  if not _open:
    programs.release_soon()


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Experiment(experiment.Experiment):
  """A configuration in a folder: train it, evaluate it, ask it, look into it.

  What computes raises DeviceError where memory, a kernel or the driver is not enough. When
  the last experiment of a process is dropped or closed, the programs compiled for it go too.

  Args:
    config: of `load_config`, or its name.
    workdir: the folder of its files, new or begun; None: runs/<method>.

  Raises:
    InputError: the folder holds another configuration, or data or weights are not there.
  """

  def __init__(self, config: Config | str, workdir: str | pathlib.Path | None = None,
               **parts: Any):
    if not parts:  # with them, `dataclasses.replace` puts one together
      allocator.tune_here()
      config = load_config(config) if isinstance(config, str) else config
      config = config_loading.from_dict(dataclasses.asdict(config))
      opened = experiment.open_run(config, workdir or pathlib.Path('runs') / config.method)
      config, workdir, parts = opened.config, opened.workdir, _parts(opened)
    for name, value in {'config': config, 'workdir': workdir, **parts}.items():
      object.__setattr__(self, name, value)
    devices.say(config, once=True)
    number = max(_open, default=0) + 1
    _open.add(number)
    object.__setattr__(self, '_finalizer', weakref.finalize(self, _dropped, number))

  def close(self) -> None:
    """Forgets the parameters that answer, and what was compiled, as when it is dropped; used
    again, both come back."""
    self.__dict__.pop('_predictor', None)
    self._finalizer()

  @classmethod
  def load(cls, path: str | pathlib.Path,
           workdir: str | pathlib.Path | None = None) -> 'Experiment':
    """The experiment that a folder holds; or one that has the weights of an export
    (`export('native')`), here or on the hub, in a folder of its own.

    Args:
      path: of the folder, or a hub id.
      workdir: of the files of an export's experiment; None: runs/<name>.
    """
    if (source := _exported(path)) is not None:
      config = source.config.replace(**{'model.init_from': str(path)})
      parts = [p for p in source.path.absolute().parts if p not in ('export', 'native')]
      found = experiment.open_run(
          config, workdir or pathlib.Path('runs') / f'{parts[-1]}-loaded', asking=True)
      return cls(found.config, found.workdir, **_parts(found))
    ensure(workdir is None, f'{path} holds no export, which workdir= is for; expected one of '
           "export('native')")
    found = experiment.reopen(path)
    return cls(found.config, found.workdir, **_parts(found))

  @_computes
  def train(self, loggers: Sequence[Logger] = ()) -> Result:
    """Trains to the end, from the newest checkpoint where there is one; the loss curves.

    Args:
      loggers: objects of yours with log(values, step) and close(), beside TensorBoard and
        what config.train names.
    """
    with self.workdir.writing():
      trainer.train(self, loggers)
    self.__dict__.pop('_predictor', None)
    return Result({'metrics': _found(self).folders[0].metrics},
                  lambda: f'{self.curriculum.total} steps; files in {self.workdir.path}',
                  self._curves)

  def _curves(self, _: Result) -> Any:
    return report.learning(_found(self).folders[0])

  @_computes
  def evaluate(self) -> Result:
    """Scores the test split and config.eval.sets; writes results.json."""
    with self.on_mesh():
      found = evaluation.scored(self)
    return Result(found, lambda: evaluation.scores(found), self._curves)

  @property
  def results(self) -> Result:
    """What results.json has of the last `evaluate`, or of training by the command line.

    Raises:
      InputError: nothing was evaluated yet.
    """
    file = evaluation.files(self)[0]
    found = read_object(file)
    ensure(found, f'there are no results in {file}; .evaluate() scores the test split')
    return Result(found, lambda: evaluation.scores(found), self._curves)

  @functools.cached_property
  def _predictor(self):
    return self.predictor(evaluation.restored(self).state.params)

  @functools.cached_property
  def _questions(self):
    return questions.of(self.splits, self.tokenizer)

  @_computes
  def answer(self, question: str | Sequence[str]) -> Answer | list[Answer]:
    """Answers a question, or each of several; warns of one unlike those of training.

    Raises:
      InputError: no text, an empty question, or one longer than the model's positions.
    """
    several = [question] if isinstance(question, str) else question
    ensure(isinstance(several, Sequence) and all(isinstance(one, str) for one in several),
           f'expected a question, or a list of them, as text; found {question!r:.200}')
    asked = [self._questions.normalise(one) for one in several]
    for one in asked:
      ensure(one, 'the question is empty; expected text')
      if found := self._questions.unlike(one):
        warnings.warn(found, stacklevel=3)  # of who calls, past `_computes`
      commands.check_fits(self._predictor, one)
    answers = [Answer(one, texts[-1], answer_matching.extract(texts[-1]), tuple(texts))
               for one, texts in zip(asked, self._predictor.texts(asked), strict=True)]
    return answers[0] if isinstance(question, str) else answers

  @_computes
  def block_states(self, problems: str | Sequence[str | Example] = 'test'
                   ) -> block_states.BlockActivations:
    """States, answers and confidence at each block.

    Args:
      problems: 'valid' or 'test', or problems of your own: questions, or examples, whose
        steps and answers may be empty where nobody knows them.

    Raises:
      InputError: another split, or a method without blocks.
    """
    rules, most = self.splits.report['rules'], self.config.eval.test_problems or None
    if problems in ('valid', 'test'):
      examples = self.test if problems == 'test' else self.splits.valid[:most]
      return block_states.collect(self._predictor, examples, rules[problems])
    if isinstance(problems, str) or not problems:
      raise InputError(f"expected 'valid', 'test' or a list of questions; found {problems!r}")
    examples = [Example(self._questions.normalise(one), (), '') if isinstance(one, str) else one
                for one in problems]
    return block_states.collect(self._predictor, examples, rules['test'])

  @_computes
  def slot_reads(self, text: str) -> Result:
    """Which slots of the implicit memory each token of a text reads."""
    return commands.slot_reads(self, text)

  @_computes
  def check_leakage(self) -> Result:
    """Whether anything attends to what it must not, by gradient; writes leakage.json."""
    found = commands.leakage_checks(self)
    return Result(found, lambda: report.leakage(found['checks']))

  @_computes
  def latency(self) -> Result:
    """Time to the first answer token and to the full answer; writes latency.json."""
    found = commands.latencies(self)
    return Result(found, lambda: report.latency(found))

  @_computes
  def flops(self) -> Result:
    """What training costs, counted before it; writes flops.json."""
    return commands.counted(self)

  @_computes
  def verify(self) -> Result:
    """What is wrong with each checkpoint, by step: '' where it is sound."""
    return commands.verified(self)

  @_computes
  def scaling(self) -> Result:
    """Accuracy by passes, loops, continuous thoughts or blocks when asked, on the test split
    and config.eval.sets; writes scaling.json."""
    return evaluation.scaled(self)

  @_computes
  def intervene(self) -> Result:
    """Answers when the states of latents are zeroed, their mean, or another question's, and
    whether the latents do the work; writes interventions.json."""
    return block_commands.intervened(self)

  @_computes
  def analyze(self) -> Result:
    """What RiM's blocks hold: rules for choosing one, probes, the logit lens, attention;
    writes analysis.json, the states and a figure of each."""
    return block_commands.analyzed(self)

  @_computes
  def verbalize(self, question: str | None = None) -> Result | list[str]:
    """What the reasoning decoder says of a question, a text a block or memory; or its
    accuracy on the test split. It is trained first where there is none yet."""
    own = commands.trained_verbalizer(self)
    if question is not None:
      return own.verbalize(question)
    found = commands.verbalized(self, own)
    return Result(found, lambda: report.verbalized(found))

  @_computes
  def export(self, kind: str = 'hf') -> pathlib.Path:
    """Writes a directory that transformers ('hf'), PEFT ('peft') or `Experiment.load`
    ('native') loads."""
    if kind not in ('hf', 'peft', 'native'):
      raise InputError(f"an export is 'hf', 'peft' or 'native'; found {kind!r}")
    return commands.exported(self, kind)

  def __repr__(self) -> str:
    return (f"{self.config.method} on {self.splits.report['name']}, {self.steps_trained():,} "
            f'of {self.curriculum.total:,} steps trained, in {self.workdir.path}')

  def _repr_html_(self) -> str:
    return Result({}, self.__repr__)._repr_html_()


def _exported(path: str | pathlib.Path) -> native.Source | None:
  """The export at a path or hub id, where it is one of this package's own format.

  Raises:
    InputError: it is a model of others, which has no configuration of an experiment.
  """
  here = pathlib.Path(path).expanduser()
  if here.is_dir() and not (here / 'config.json').is_file():
    return None  # `reopen` says so
  if not here.is_dir() and (here.exists() or not re.fullmatch(r'[\w.-]+/[\w.-]+', str(path))
                            or here.parent.is_dir()):
    return None
  found = native.find(str(path))
  ensure(found, f'{path} holds a model and no experiment; give it to one, which need not be '
         "trained: Experiment(load_config('rim_gsm8k', **{'model.init_from': "
         f'{str(path)!r}}}), workdir)')
  return found if found.kind == 'native' else None


def _parts(opened: experiment.Experiment) -> dict[str, Any]:
  return {f.name: getattr(opened, f.name) for f in dataclasses.fields(experiment.Experiment)
          if f.name not in ('config', 'workdir')}


def _found(*experiments: Experiment) -> Any:
  return report.find([one.workdir.path for one in experiments])


def compare(*experiments: Experiment | str | pathlib.Path) -> Result:
  """Accuracy, cost and time of several experiments, or folders of them, side by side.

  Each is evaluated where its folder has no results yet, and then they are timed in turn.

  Raises:
    InputError: fewer than two, or two of one name.
  """
  experiments = [one if isinstance(one, experiment.Experiment) else Experiment.load(one)
                 for one in experiments]
  found = _found(*experiments)
  names = [folder.name for folder in found.folders]
  if len(set(names)) < max(2, len(experiments)):
    raise InputError(f'expected two or more experiments in folders of unlike names; found '
                     f"{', '.join(names) or 'none'}")
  for one in experiments:
    if not one.workdir.results.exists():
      one.evaluate()
  config = experiments[0].config
  with multihost.explained(config):
    entries = in_turn([latency.subject(one.workdir.path, name)
                       for one, name in zip(experiments, names, strict=True)],
                      config.eval.latency_repeats)
  summary = report.summarize(dataclasses.replace(
      _found(*experiments), latency={'entries': entries}))
  title, rows = report.document(summary)[0]
  return Result(summary, lambda: f'{title}\n\n{report.table(rows)}',
                report.accuracy_and_time)
