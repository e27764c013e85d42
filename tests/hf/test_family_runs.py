"""RiM on each family of pretrained models: trained with LoRA, planned by shape, out again."""

import jax
import jax.numpy as jnp
import pytest
from close import assert_close

from latent_reasoning import experiment as run_lib
from latent_reasoning.cli import commands
from latent_reasoning.hf import load as pretrained
from latent_reasoning.models import masks
from latent_reasoning.parallel import sharding
from latent_reasoning.planning import estimate
from latent_reasoning.train import trainer
from latent_reasoning.train.workdir import open_workdir

torch = pytest.importorskip('torch', reason='parity with PyTorch: pip install torch==2.13.0')
transformers = pytest.importorskip('transformers', reason="pip install 'transformers'")

torch.set_num_threads(1)  # tiny models: more threads only wait for each other
pytestmark = [pytest.mark.usefixtures('quick_compilation'), pytest.mark.integration]

SIZES = {'hidden_size': 16, 'intermediate_size': 24, 'num_hidden_layers': 2,
         'num_attention_heads': 4, 'max_position_embeddings': 48, 'pad_token_id': 0}
FEW = {**SIZES, 'num_key_value_heads': 2}
LOCAL = {**FEW, 'head_dim': 8, 'sliding_window': 4,
         'layer_types': ['sliding_attention', 'full_attention']}
FAMILIES = {  # sizes, and whether layers are scanned
    'olmo2': (FEW, False),
    'smollm3': ({**FEW, 'no_rope_layer_interval': 2}, True),
    'gpt_neox': ({**SIZES, 'rotary_pct': 0.5}, False),
    'phi3': ({**FEW, 'sliding_window': 5}, False),
    'mistral': ({**FEW, 'sliding_window': 4}, True),
    'gemma2': ({**LOCAL, 'query_pre_attn_scalar': 12, 'final_logit_softcapping': 5.0}, True),
    'gemma3_text': (LOCAL, True)}


@pytest.mark.parametrize('kind', [kind if kind in ('smollm3', 'gemma2') else pytest.param(
    kind, marks=pytest.mark.slow) for kind in FAMILIES])
def test_rim(kind, tiny_config, make_checkpoint, tmp_path):
  """Logits behind the blocks are those of transformers, with the export and the adapter."""
  peft = pytest.importorskip('peft', reason="pip install -e '.[test-hf]'")
  sizes, scan = FAMILIES[kind]
  folder = make_checkpoint(tmp_path / 'hub', kind, sizes, std=0.3)
  config = pretrained.resolve(tiny_config(**{
      'model.init_from': str(folder), 'model.scan': scan, 'model.lora.rank': 3,
      'optim.trainable': 'new', 'optim.stage1.learning_rate': 3e-2, 'model.loss_tile': 8,
      'eval.valid_problems': 2, 'train.eval_every': 0, 'train.save_every': 0,
      'optim.stage1.steps': 3, 'optim.stage2.steps': 2}))
  plan = estimate.planned(config)
  sharding.state(plan.config, jax.eval_shape(plan.fresh), plan.mesh)
  run = run_lib.build(config, open_workdir(tmp_path / 'run', config, True))
  trainer.train(run)
  params, model = run.restore().state.params, run.model(0.0)
  tokens = jnp.asarray([run.predictor(params).row('1+2').prefix])
  size = tokens.shape[1]
  hidden = model.apply({'params': params}, tokens, jnp.arange(size)[None],
                       masks.plain(1, size)).hidden
  logits = model.apply({'params': params}, hidden, method='head')[..., :run.tokenizer.used]
  for written, load in (('hf', transformers.AutoModelForCausalLM),
                        ('peft', peft.AutoPeftModelForCausalLM)):
    assert commands.export(run, written) == 0
    theirs = load.from_pretrained(run.workdir.path / 'export' / written).eval()
    with torch.no_grad():
      assert_close(logits, theirs(torch.tensor(tokens.tolist())).logits, tol=1e-4)
