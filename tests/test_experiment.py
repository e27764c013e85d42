"""What a configuration builds."""

import dataclasses

import jax
import numpy as np
import pytest
from llama import LLAMA

from latent_reasoning import config_loading, methods, sequences
from latent_reasoning import experiment as run_lib
from latent_reasoning.data.example import Example
from latent_reasoning.errors import InputError
from latent_reasoning.models.transformer import parameter_count
from latent_reasoning.train import batches as batches_lib
from latent_reasoning.train import losses

pytestmark = pytest.mark.usefixtures('quick_compilation')
ONE_LAYER = {'model.num_layers': 1, 'model.embed_dim': 8, 'model.num_heads': 1,
             'model.mlp_dim': 8}


@pytest.fixture(scope='module')
def built(tiny_config, make_run, tmp_path_factory):
  return make_run(tiny_config(**ONE_LAYER), tmp_path_factory.mktemp('run'))


@pytest.mark.parametrize('changes, message', [
    ({'method': 'nothing'}, "'nothing' is unknown"),
    ({'method': 'direct', 'reasoning_decoder.source': 'blocks'}, 'direct has none; .*: rim'),
    ({'method': 'cot', 'aux.align': 0.1}, r'aux.align and smooth .* cot has none'),
    ({'method': 'pause', 'rim.externalize': True}, 'rim.externalize .* pause has none'),
    ({'aux.smooth': 0.1, 'reasoning_decoder.source': 'blocks', 'reasoning_decoder.joint': True},
     'expected one of them')])
def test_what_a_method_has_not(tiny_config, changes, message):
  with pytest.raises(InputError, match=message):
    methods.check(tiny_config(**changes))


@pytest.mark.parametrize('changes', [
    {'aux.align': 0.1},
    {'reasoning_decoder.source': 'blocks', 'reasoning_decoder.joint': True}])
def test_a_loss_of_its_own_is_not_lost(tiny_config, monkeypatch, changes):
  """A variant of RiM with a loss trains it, or says that something would take its place."""
  variant = dataclasses.replace(methods.get('rim'), name='variant',
                                loss=lambda config: losses.next_token)
  monkeypatch.setitem(methods.METHODS, 'variant', variant)
  config = tiny_config()
  assert methods.check(config.replace(method='variant')) is variant
  assert methods.check(config.replace(**changes)).name == 'rim'
  with pytest.raises(InputError, match='variant has a loss of its own'):
    methods.check(config.replace(method='variant', **changes))


def test_every_method_is_in_the_help():
  """config.method lists them by hand."""
  text = config_loading.help_text()
  line = text[text.index('--config.method='):].splitlines()[1]
  assert line.partition(': ')[2].split(' | ') == list(methods.METHODS)


def test_parts_fit_together(built):
  """Curriculum, data, vocabulary and model agree with the configuration."""
  assert built.curriculum.lengths == (8, 6)
  assert (len(built.splits.train), len(built.splits.test)) == (40, 12)
  state = built.init()
  assert int(state.step) == 0
  assert state.params['embedding'].shape == (built.tokenizer.vocab_size, 8)
  assert built.workdir.tokenizer.exists()


@pytest.mark.integration
def test_init_is_a_function_of_the_seed(built):
  """The same seed gives the same bits, another seed others."""
  one, two = built.init(), built.init()
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
    assert (np.asarray(a) == np.asarray(b)).all()
  config = dataclasses.replace(built.config, seed=1)
  other = dataclasses.replace(built, config=config).init()
  assert (other.params['embedding'] != one.params['embedding']).any()


def test_opened_again(tiny_config, tmp_path):
  """A folder is opened by its configuration, or reopened by what it holds."""
  config = tiny_config(**ONE_LAYER)
  run = run_lib.open_run(config, tmp_path / 'run')
  again = run_lib.reopen(tmp_path / 'run')
  assert again.config == run.config == config and again.workdir == run.workdir
  run.workdir.metrics.write_text('')  # it has begun
  with pytest.raises(InputError, match='config.seed: 0 -> 1'):
    run_lib.open_run(dataclasses.replace(config, seed=1), tmp_path / 'run')
  with pytest.raises(InputError, match='expected the folder of a'):
    run_lib.reopen(tmp_path)


def test_nothing_to_restore(built):
  """Before training there is no checkpoint, which is no error."""
  assert built.restore() is None


@pytest.mark.integration
def test_restore_best_or_last(tiny_config, make_run, tmp_path):
  """eval.checkpoint picks; where nothing was validated, the newest counts as best."""
  run = make_run(tiny_config(**ONE_LAYER), tmp_path)
  state = run.init()

  def save(step, accuracy):
    checkpoints = run.checkpoints(writer=True)
    checkpoints.save(state.replace(step=state.step + step), accuracy, sources=run.sources)
    checkpoints.close()

  def restored(which):
    config = dataclasses.replace(
        run.config, eval=dataclasses.replace(run.config.eval, checkpoint=which))
    return dataclasses.replace(run, config=config).restore().step

  save(1, None)
  assert restored('best') == 1
  save(2, 0.75)
  save(3, 0.5)
  assert (restored('best'), restored('last')) == (2, 3)


@pytest.mark.integration
def test_damaged_best_names_a_way_out(tiny_config, make_run, tmp_path):
  """Where the best checkpoint is damaged, and others are not, the error says so."""
  run = make_run(tiny_config(**ONE_LAYER), tmp_path)
  state = run.init()
  checkpoints = run.checkpoints(writer=True)
  for step, accuracy in [(1, 0.75), (2, 0.5)]:
    checkpoints.save(state.replace(step=state.step + step), accuracy, sources=run.sources)
  checkpoints.close()
  files = (run.workdir.checkpoints / '1' / 'state' / 'ocdbt.process_0' / 'd').iterdir()
  for file in files:
    file.unlink()
  with pytest.raises(InputError, match='config.eval.checkpoint=last'):
    run.restore()


def test_objective_is_that_of_the_method(built):
  """The loss is the method's own, or the weighted next-token loss."""
  method = built.batches.method
  assert built.objective is losses.next_token and method.loss is None
  made = []
  other = dataclasses.replace(method, loss=lambda config: made.append(config) or len)
  built.batches.method = other
  try:
    assert built.objective is len and made == [built.config]
  finally:
    built.batches.method = method


@pytest.fixture
def files(tmp_path):
  """A folder with three splits; one training problem has five steps."""
  for split, count in [('train', 12), ('valid', 3), ('test', 3)]:
    lines = [f'{{"question": "{split} {i}", "steps": ["1+{i}={i + 1}", "2"], '
             f'"answer": "{i}"}}' for i in range(count)]
    if split == 'train':
      lines.append('{"question": "long", "steps": ["1", "2", "3", "4", "5"], '
                   '"answer": "1"}')
    (tmp_path / f'{split}.jsonl').write_text('\n'.join(lines) + '\n')
  return tmp_path


def test_rows_too_long_are_dropped_or_named(tiny_config, make_run, files, tmp_path):
  """'raise' names the problem and the key; 'drop' trains on the others."""
  keys = {**ONE_LAYER, 'data.name': 'files', 'data.dir': str(files),
          'data.buckets.prefix': (32,)}
  with pytest.raises(InputError, match="config.rim.max_steps.*'long'"):
    make_run(tiny_config(**keys), tmp_path / 'a')
  run = make_run(tiny_config(**keys, **{'data.too_long': 'drop'}), tmp_path / 'b')
  assert len(run.splits.train) == 12
  assert 'long' not in [e.question for e in run.splits.train]
  assert len(run.batches.examples) == 12


def test_generated_problems_must_fit(tiny_config, make_run, tmp_path):
  """Generated problems are never dropped in silence."""
  keys = {**ONE_LAYER, 'data.buckets.prefix': (8,)}
  for choice in ('raise', 'drop'):
    with pytest.raises(InputError, match='config.data.buckets'):
      make_run(tiny_config(**keys, **{'data.too_long': choice}), tmp_path / choice)


def test_texts_hold_question_steps_and_answer(built):
  """A vocabulary is made from all that a model reads and writes, mark included."""
  example = Example('1+2', ('1+2=3',), '3')
  assert list(batches_lib.texts([example])) == ['1+2\n1+2=3\n####3']
  assert len(list(batches_lib.texts(built.splits.train))) == 40


@pytest.mark.parametrize('changes, message', [
    ({'model.num_layers': 10**9}, 'parameters, which take'), ({'model.embed_dim': 10**9,
     'model.num_heads': 1}, 'parameters, which take'),
    ({'model.mlp_dim': 10**13}, 'parameters, which take'),
    ({'model.max_positions': 10**12}, 'parameters, which take'),
    ({'tokenizer.pad_to': 10**12}, 'parameters, which take'),
    ({'rim.blocks': 10**9}, 'config.rim.blocks is 1000000000'),
    ({'eval.blocks': 10**9}, 'config.eval.blocks is 1000000000'),
    ({'rim.max_steps': 10**9}, 'config.rim.max_steps is 1000000000'),
    ({'method': 'pause', 'baselines.pause_tokens': 10**9}, 'config.baselines.pause_tokens is'),
    ({'method': 'codi', 'baselines.latents': 10**9}, 'config.baselines.latents is'),
    ({'rim.blocks': 10**9, 'model.max_positions': 10**12, 'model.position_embedding': 'rotary',
      'model.embed_dim': 2, 'model.num_heads': 1}, 'config.rim.blocks is')])
def test_what_no_memory_holds(tiny_config, make_run, tmp_path, changes, message):
  """Refused by an estimate, before anything is made."""
  with pytest.raises(InputError, match=message):
    make_run(tiny_config(**changes), tmp_path)


def test_parameters_by_estimate(tiny_config, make_run, tmp_path):
  """Norms and biases apart, they are those that are made."""
  for changes in ({}, {'model.tie_embeddings': False}, {
      **LLAMA,
      'model.num_kv_heads': 1}):
    run = make_run(tiny_config(**changes), tmp_path / str(len(changes)))
    made = sum(a.size for a in jax.tree.leaves(jax.eval_shape(run.fresh).params))
    assert parameter_count(run.config.model, run.tokenizer.vocab_size) == pytest.approx(
        made, rel=0.06)


UNSTATED = {'data.buckets.prefix': (), 'data.buckets.readout': (), 'data.buckets.count': ()}


@pytest.mark.parametrize('method', [m for m in methods.METHODS if m != 'language_model'])
def test_buckets_follow_from_method_and_data(tiny_config, make_run, tmp_path, method):
  """Without any stated, no batch is larger than the largest row of its moment in the data."""
  config = tiny_config(**{**ONE_LAYER, **UNSTATED, 'method': method, 'baselines.parts': 2,
                          'rim.schedule': 'relative', 'optim.stage1.steps': 6,
                          'optim.stage2.steps': 2})
  run = make_run(config, tmp_path)
  found, ids, own = run.config.data.buckets, run.batches.special, run.batches.method
  encoded = sequences.encode([run.splits.train[i] for i in range(40)], run.tokenizer)
  for step in range(run.curriculum.total):
    batch, moment = run.batches.at(step), run.curriculum.at(step)
    rows = [own.sequence(e, moment.stage, 0.5 * (moment.progress >= 0.5), run.config, ids)
            for e in encoded]
    for made, like in ((batch, rows), (batch.teacher, own.teacher and [
        own.teacher(e, moment.progress, run.config, ids) for e in encoded])):
      if made is not None:
        later = (made.loops.passes - 1) * made.loops.size if made.loops else 0
        assert made.prefix - later == max(len(row.prefix) for row in like)
        assert made.anchors.shape[1] <= max(len(row.readouts) for row in like)
        assert made.tokens.shape[1] <= made.prefix + made.anchors.shape[1] * max(
            len(out.inputs) for row in like for out in row.readouts)
  assert make_run(config, tmp_path / 'again').config == run.config
  stated = make_run(tiny_config(**{**ONE_LAYER, 'method': method}), tmp_path / 'stated')
  assert stated.config == tiny_config(**{**ONE_LAYER, 'method': method})
  assert all(sizes == tuple(sorted(set(sizes))) for sizes in (found.prefix, found.count))


def test_buckets_of_the_default_job(make_run, default_config, tmp_path, monkeypatch):
  """Coconut's and CODI's prefix is one token more than the question, not RiM's blocks."""
  monkeypatch.setattr(batches_lib, 'SAMPLED', 60)
  expected = {'rim': {26}, 'direct': {10}, 'coconut': {11}, 'codi': {11}}
  for method, prefixes in expected.items():
    config = default_config()
    config.method = method
    run = make_run(config_loading.from_dict(config), tmp_path / method)
    steps = range(0, run.curriculum.total, 400)
    batches = [run.batches.at(step) for step in steps]
    assert {b.prefix for b in batches} == prefixes, method
    assert {b.teacher.prefix for b in batches if b.teacher} <= {10}
    longest = max(b.tokens.shape[1] for b in batches)
    print(method, longest)
    assert longest <= {'rim': 26 + 4 * 6, 'direct': 12, 'coconut': 11 + 31 + 4, 'codi': 24}[
        method]


def test_a_row_beyond_the_sample_has_a_bucket(tiny_config, make_run, tmp_path, monkeypatch):
  """Sizes are chosen by some problems; a few that are longer train too."""
  monkeypatch.setattr(batches_lib, 'SAMPLED', 1)
  run = make_run(tiny_config(**{**ONE_LAYER, **UNSTATED, 'method': 'cot'}), tmp_path)
  longest = max(len(e.question) for e in run.batches.examples) + 1
  assert max(run.config.data.buckets.prefix) >= longest
  for step in range(run.curriculum.total):
    assert run.batches.at(step).prefix in run.config.data.buckets.prefix
