"""What of a begun run may change: every key of the configuration, classified on purpose."""

import dataclasses
import json

import pytest

from latent_reasoning.config import Config, flatten
from latent_reasoning.errors import InputError
from latent_reasoning.train import resume, workdir

# Every key. A new one must be put here: where a change of it makes other numbers than those
# that the run began with, beyond rounding, it is refused.
KINDS = {
    'free': '''
        data.cache_dir device eval.batch_size eval.checkpoint eval.checkpoint_selection
        eval.contamination eval.latency_repeats eval.leakage_rows eval.samples eval.sets
        eval.temperature eval.test_problems eval.top_k imm.chunk imm.implementation
        mesh.data mesh.fsdp mesh.tensor model.attention model.loss_tile model.remat
        optim.grad_accum_steps sweep.budget sweep.control sweep.runs sweep.search
        sweep.seeds sweep.trials
        train.compilation_cache train.eval_every train.log_every train.max_loss
        train.max_to_keep train.peer_timeout train.prefetch train.profile_steps train.restart
        train.save_every train.wandb''',
    'hashed': '''
        data.dir data.path data.test data.train data.valid model.init_from tokenizer.path''',
    'lifted': 'train.extend',
    'refused': '''
        aux.align aux.smooth aux.temperature baselines.distill_weight baselines.latents
        baselines.keep_mark baselines.kv_importance baselines.kv_weight
        baselines.mix_parts baselines.part_accuracy baselines.part_patience baselines.parts
        baselines.pause_tokens baselines.projection baselines.removal
        baselines.remove_all_beyond baselines.remove_tokens baselines.reset
        baselines.rounds baselines.smoothing
        baselines.step_weight eval.latents eval.loops eval.passes model.loop.count
        model.loop.layers model.loop.mix model.loop.norm rim.pass_attention rim.passes
        baselines.teacher_weight data.arithmetic.max_steps data.arithmetic.max_value
        data.arithmetic.min_steps data.arithmetic.modulus data.arithmetic.operations
        data.arithmetic.templates data.arithmetic.test_size data.arithmetic.train_size
        data.arithmetic.valid_size data.buckets.count data.buckets.prefix data.buckets.readout
        data.graphs.concepts data.graphs.max_hops data.graphs.min_hops data.graphs.nodes
        data.graphs.parents data.graphs.test_size data.graphs.train_size
        data.graphs.valid_size data.graphs.wording data.limit data.max_steps data.name
        data.on_error data.packing data.seq_len
        data.state_tracking.length data.state_tracking.live data.state_tracking.max_steps
        data.state_tracking.min_steps data.state_tracking.task data.state_tracking.test_size
        data.state_tracking.train_size data.state_tracking.valid_size
        data.sort_window data.step_marks data.steps data.too_long data.valid_size
        eval.blocks eval.max_new_tokens eval.valid_problems imm.ablate imm.gate_bias
        imm.layers imm.linformer_rank imm.out_scale imm.place imm.rounds imm.shared imm.slots
        imm.write_interval imm.write_policy method model.activation model.attention_cap
        model.attention_scale model.bias model.dtype model.embed_dim
        model.frozen_dtype model.fused_mlp model.fused_qkv model.head_dim model.logit_cap
        model.lora.alpha model.lora.dropout
        model.lora.rank model.lora.targets model.max_positions model.mlp model.mlp_bias
        model.mlp_dim model.no_rope_layers model.norm model.norm_epsilon model.norm_place
        model.num_heads model.num_kv_heads
        model.num_layers model.out_bias model.parallel model.position_embedding model.qk_norm
        model.qk_norm_over model.qkv_bias model.rope.fraction model.rope.local_base
        model.rope.multiplier model.scale_embeddings model.window model.window_layers
        model.rope.base model.rope.factor model.rope.high model.rope.low model.rope.original
        model.rope.scaling model.scan model.tie_embeddings optim.batch_size optim.beta1
        optim.beta2 optim.epsilon optim.max_epochs optim.max_grad_norm optim.muon_scale
        optim.patience
        optim.stage1.dropout optim.stage1.epochs optim.stage1.learning_rate
        optim.stage1.optimizer optim.stage1.reset_optimizer optim.stage1.schedule
        optim.stage1.steps optim.stage1.warmup optim.stage2.dropout optim.stage2.epochs
        optim.stage2.learning_rate optim.stage2.optimizer optim.stage2.reset_optimizer
        optim.stage2.schedule optim.stage2.steps optim.stage2.warmup optim.trainable
        optim.weight_decay reasoning_decoder.joint reasoning_decoder.learning_rate
        reasoning_decoder.num_layers reasoning_decoder.source reasoning_decoder.steps
        reasoning_decoder.weight rim.block_attention rim.block_tokens rim.blocks
        rim.externalize rim.externalize_weight rim.hold_answer rim.max_steps rim.readout_offset
        rim.readout_sees_question rim.schedule seed tokenizer.add_bos tokenizer.at_least
        tokenizer.kind tokenizer.pad_to tokenizer.vocab_size'''}


def test_every_key():
  """Each key is of one kind, and none is forgotten."""
  table = [(key, name) for name, keys in KINDS.items() for key in keys.split()]
  assert sorted(table) == sorted((key, resume.kind(key)) for key in flatten(Config()))


def plain(config):
  return json.loads(json.dumps(dataclasses.asdict(config)))


def test_changes():
  """What may change and what may not, apart, each with both values."""
  new = Config().replace(**{'model.remat': 'full', 'data.dir': '/x', 'train.extend': (5,),
                            'seed': 3, 'data.valid_size': 7})
  allowed, refused = resume.changes(plain(Config()), plain(new))
  assert sorted(allowed) == ["config.data.dir: '' -> '/x'",
                             "config.model.remat: 'none' -> 'full'",
                             'config.train.extend: [] -> [5]']
  assert refused == ['config.data.valid_size: 500 -> 7', 'config.seed: 0 -> 3']
  assert resume.changes(plain(new), plain(new)) == ([], [])


@pytest.mark.parametrize('steps, more', [
    ({'optim.stage2.steps': 12}, 4), ({'optim.stage2.steps': 7}, 0), ({'seed': 1}, 0),
    ({'optim.stage1.steps': 12}, 0)])
def test_the_key_that_lifts_it(steps, more):
  """Who gives the last stage more steps is told how many `train.extend` takes."""
  old = Config().replace(**{'optim.stage1.steps': 5, 'optim.stage2.steps': 8})
  old, new = plain(old), plain(old.replace(**steps))
  text = str(resume.refusal('x', resume.changes(old, new)[1], old, new))
  assert next(iter(steps)) in text
  assert (f'--config.train.extend={more}' in text) == bool(more)
  assert more or 'extend' not in text


def test_extended_once_more():
  """What a run was extended by stands before what is asked for now."""
  old = Config().replace(**{'optim.stage2.steps': 8, 'train.extend': (5,)})
  new = plain(old.replace(**{'optim.stage2.steps': 12}))
  assert 'train.extend=5,4,' in str(resume.refusal('x', [], plain(old), new))


def test_one_stage():
  """The last stage is the first one where there is no second."""
  old = Config().replace(**{'optim.stage1.steps': 5, 'optim.stage2.steps': 0})
  new = plain(old.replace(**{'optim.stage1.steps': 9}))
  assert 'train.extend=4' in str(resume.refusal('x', [], plain(old), new))


@pytest.mark.parametrize('old, new, step, fine', [
    ((), (5,), 10, True), ((5,), (5, 2), 13, True), ((5,), (5, 2), 15, True),
    ((5,), (9,), 10, True), ((5,), (), 10, True), ((5,), (9,), 11, False),
    ((5,), (), 11, False), ((5, 2), (5, 3), 15, True), ((5, 2), (5, 3), 16, False),
    ((5, 2), (5, 2, 1), 17, True), ((5, 2), (4, 3), 12, False)])
def test_steps_that_are_done_keep_their_rate(old, new, step, fine):
  """Of ten steps, extended: an entry may change until a step of it is done."""
  if fine:
    resume.check_extend(old, new, step, 10)
  else:
    with pytest.raises(InputError, match='train.extend'):
      resume.check_extend(old, new, step, 10)


def test_what_is_said():
  """One line, and one more where the noise of dropout is another."""
  change = ['config.optim.grad_accum_steps: 1 -> 2', "config.model.remat: 'none' -> 'full'"]
  assert resume.said(Config(), []) == []
  assert resume.said(Config(), change) == ['changed since: ' + '; '.join(change)]
  for key in ('optim.stage2.dropout', 'model.lora.dropout'):
    assert 'masks' in resume.said(Config().replace(**{key: 0.1}), change)[1]
    assert len(resume.said(Config().replace(**{key: 0.1}), change[1:])) == 1


def test_record(tiny_config, tmp_path):
  """What may change becomes the run's, with a line of history; nothing else ever does."""
  made = workdir.open_workdir(tmp_path, tiny_config(), True)
  workdir.record_changes(made, tiny_config(), 4)
  workdir.record_changes(made, tiny_config(**{'seed': 9, 'model.remat': 'full'}), 4)
  assert not made.history.exists()
  new = tiny_config(**{'model.remat': 'full'})
  for _ in range(2):
    workdir.record_changes(made, new, 4)
  workdir.record_changes(made, tiny_config(), 6)
  lines = [json.loads(line) for line in made.history.read_text().splitlines()]
  assert [(one['step'], one['changed']) for one in lines] == [
      (4, ["config.model.remat: 'none' -> 'full'"]),
      (6, ["config.model.remat: 'full' -> 'none'"])]
  assert json.loads(made.config.read_text()) == plain(tiny_config())


@pytest.mark.parametrize('key, said', [('eval.valid_problems', True), ('seed', False)])
def test_why_validation_stays(key, said):
  """Who lowers what is validated is told what it is for."""
  old, new = plain(Config()), plain(Config().replace(**{key: 7}))
  text = str(resume.refusal('x', resume.changes(old, new)[1], old, new))
  assert key in text and ('which checkpoint is the best' in text) == said
