"""RiM on GSM8K: the paper's recipe on pretrained weights (arXiv 2605.30343).

  python -m latent_reasoning.main --config=configs/rim_gsm8k.py \\
      --config.data.dir=GSM8K_AUG_DIRECTORY --config.model.init_from=GPT2_DIRECTORY

Without the directories, both come from the hub (extra `hf`). GPT-2, LoRA of rank 128,
all else frozen but the new tokens. Variants: `llama1b`, `llama3b` and `qwen` begin with
other weights; `tiny`, from scratch, runs the same code on the 7,473 problems of GSM8K
itself, on a laptop. Learning rates, dropout and LoRA's targets are ours, the paper does
not publish them. `tiny` shows the path, not a result: 2% of 256 test
problems after 10 minutes on one busy core (AMD EPYC, jax 0.10.2, 2026-11-21, seed 0);
loss 4.14 to 1.80 in stage 1, 1.95 to 1.59 in stage 2.
"""

import ml_collections

PRETRAINED = {
    '': 'openai-community/gpt2', 'llama1b': 'meta-llama/Llama-3.2-1B',
    'llama3b': 'meta-llama/Llama-3.2-3B', 'qwen': 'Qwen/Qwen2.5-0.5B', 'tiny': ''}


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  if variant not in PRETRAINED:
    raise ValueError(f"rim_gsm8k has no variant '{variant}'; known: "
                     f"{', '.join(filter(None, PRETRAINED))}")
  c = ml_collections.ConfigDict()
  # rim | direct | direct_steps | cot | pause | pause_steps | icot | coconut | codi
  c.method = 'rim'
  c.seed = 0  # of parameters, data and order

  c.data = data = ml_collections.ConfigDict()
  data.name = 'gsm8k_aug'  # arithmetic | graphs | gsm8k | gsm8k_aug | files
  data.path = ''  # a text file, for method lm
  data.block = 64  # tokens of a row of text
  data.dir = ''  # file or directory of the data; '': generated, or from the hub
  data.train = ''  # file of one split, where dir does not name it
  data.valid = ''
  data.test = ''
  data.cache_dir = ''  # where hub downloads are kept; '': the library's default
  data.steps = 'equations'  # equations | sentences, of OpenAI's GSM8K
  data.step_marks = False  # <<3+4=7>> instead of 3+4=7
  data.on_error = 'raise'  # raise | skip a malformed line
  data.too_long = 'drop'  # raise | drop a row that no bucket holds
  data.valid_size = 500  # carved from train, where there is no valid split
  data.limit = 0  # first N problems of each split; 0: all
  data.sort_window = 16  # batches whose rows are sorted by length together

  data.arithmetic = arithmetic = ml_collections.ConfigDict()
  arithmetic.min_steps = 1  # of generated problems only
  arithmetic.max_steps = 8
  arithmetic.modulus = 0  # of every result; 0: none
  arithmetic.max_value = 9  # operands are 0 … this
  arithmetic.operations = '+-*'
  arithmetic.templates = 8  # wordings; 1: the terse expression alone
  arithmetic.train_size = 1_000_000  # problems of each split, disjoint
  arithmetic.valid_size = 2_000
  arithmetic.test_size = 2_000

  data.graphs = graphs = ml_collections.ConfigDict()
  graphs.min_hops = 3  # of generated graph problems only: steps to the answer
  graphs.max_hops = 6
  graphs.nodes = 28  # drawn; those without an edge are left out
  graphs.parents = 1.5  # of a node, on average
  graphs.concepts = 38  # words for them
  graphs.train_size = 1_000_000  # problems of each split, disjoint
  graphs.valid_size = 2_000
  graphs.test_size = 2_000

  data.buckets = buckets = ml_collections.ConfigDict()
  buckets.prefix = (128, 256, 384)  # static sizes of question and blocks
  buckets.readout = (16, 32, 128)  # of one readout: answer, step, chain of thought
  buckets.count = (2, 4, 8, 13, 16)  # readouts in a row

  c.tokenizer = tokenizer = ml_collections.ConfigDict()
  tokenizer.kind = 'bpe'  # char | bpe | file
  tokenizer.path = ''  # tokenizer.json, for kind file or in place of a checkpoint's own
  tokenizer.add_bos = 'auto'  # as the tokenizer's post-processor says | true | false
  tokenizer.vocab_size = 16_384  # of a trained bpe
  tokenizer.at_least = 0  # entries of the vocabulary; set from pretrained weights
  tokenizer.pad_to = 128  # vocabulary padded to a multiple

  c.model = model = ml_collections.ConfigDict()
  model.init_from = PRETRAINED.get(variant, PRETRAINED[''])  # a directory or hub id, which
  # sets the sizes; '': from scratch, of the sizes here
  model.family = 'gpt'  # gpt | llama (also Mistral, Qwen, SmolLM2)
  model.layers = 12
  model.width = 768
  model.heads = 12
  model.kv_heads = 0  # of keys and values, family llama; 0: as many
  model.head_size = 0  # family llama; 0: width / heads
  model.hidden = 3072  # width of the MLP
  model.max_positions = 1024
  model.positions = 'learned'  # learned | rotary
  model.tied = True  # head = transposed embedding table
  model.bias = True
  model.qkv_bias = False  # family llama, as Qwen2
  model.out_bias = False  # family llama, of attention's output
  model.qk_norm = False  # family llama: queries and keys are normed, as in Qwen3
  model.norm_epsilon = 1e-6
  model.dtype = 'bfloat16'  # compute dtype; parameters are float32
  model.attention = 'split'  # split | packed (the slow oracle) | cudnn (GPU) | splash (TPU)
  model.scan = True  # scan over stacked layers: faster to compile
  model.remat = False  # recompute layers in the backward pass
  model.frozen_dtype = 'float32'  # float32 | bfloat16, of parameters that are not trained

  model.rope = rope = ml_collections.ConfigDict()  # of rotary positions
  rope.base = 10_000.0
  rope.scaling = ''  # '' | linear | llama3
  rope.factor = 1.0
  rope.low = 1.0  # of llama3
  rope.high = 4.0
  rope.original = 8192

  model.lora = lora = ml_collections.ConfigDict()  # of dense layers
  lora.rank = 128  # 0: none
  lora.alpha = 256.0  # scaled by alpha / rank
  lora.dropout = 0.1
  lora.targets = ('.',)  # patterns of paths such as block_3/qkv; '.': all

  c.rim = rim = ml_collections.ConfigDict()
  rim.blocks = 8  # K, in stage 2 and at inference
  rim.block_tokens = 2  # M
  rim.max_steps = 13  # T_max
  rim.readout_offset = 1  # block t predicts step t+1; 0: step t
  rim.schedule = 'relative'  # uniform | linear | relative annealing of steps
  rim.block_attention = 'causal'  # causal | bidirectional inside a block
  rim.readout_sees_question = True
  rim.externalize = False  # step readouts in stage 2 too, for --externalize
  rim.externalize_weight = 1.0  # of a row's step readouts together; its answers have 1
  rim.pause_tokens = 32  # of method pause: as many as RiM's block tokens

  rim.peers = peers = ml_collections.ConfigDict()  # of icot, coconut and codi
  peers.parts = 4  # of stage 1; in part i, i steps are gone (icot, coconut)
  peers.smoothing = 4.0  # icot: o more steps removed, P(o) ∝ exp(-smoothing·o); 0: none
  peers.thoughts = 2  # continuous: coconut, for each step gone; codi, in all
  peers.projection = False  # an MLP between a thought and the next input, as codi has
  peers.teacher = 1.0  # codi: weight of the chain of thought's loss
  peers.distil = 1.0  # codi: weight of the distance of hidden states

  c.imm = imm = ml_collections.ConfigDict()
  imm.write = ''  # '' | prefix_mean | ring | gated | delta | sequence_mean (not causal)
  imm.slots = 0  # 0: round(sqrt(width))
  imm.rank = 0  # of f_write, f_query and g; 0: full
  imm.layers = ()  # which have a bank, from 0; (): all
  imm.shared = False  # one bank: the first of them writes, all read
  imm.rounds = 1  # writes and reads of a token in a layer
  imm.every = 1  # only each n-th token writes
  imm.place = 'after'  # after | before attention and MLP
  imm.off = ()  # mechanisms off: write, query, read, norm
  imm.out_scale = 1.0  # of g's initial matrix
  imm.gate_bias = 0.0  # initial
  imm.implementation = 'chunked'  # chunked | naive (the slow oracle)
  imm.chunk = 16  # tokens in a chunk

  c.explicit = explicit = ml_collections.ConfigDict()
  explicit.source = ''  # '' | blocks | memory: what a decoder of the reasoning reads
  explicit.joint = False  # trained with the model; else later, by --mode=explain
  explicit.layers = 1  # of that decoder
  explicit.weight = 0.3  # in the loss, where joint
  explicit.steps = 1000  # of its own training, where not joint
  explicit.learning_rate = 1e-3

  c.aux = aux = ml_collections.ConfigDict()  # auxiliary losses on RiM's blocks
  aux.align = 0.0  # weight: the last block's state finds the answer among the batch's
  aux.temperature = 0.1  # of that contrast
  aux.smooth = 0.0  # weight: changes from block to block should not turn

  c.optim = optim = ml_collections.ConfigDict()
  optim.trained = 'new'  # all | new: LoRA, rows of new tokens and memory; the rest frozen
  optim.batch_size = 128
  optim.accumulate = 1  # microbatches of a step
  optim.muon_scale = 2.0  # learning rate of matrices under muon, as a multiple of the stage's
  optim.beta1 = 0.9
  optim.beta2 = 0.999
  optim.epsilon = 1e-8
  optim.weight_decay = 0.0  # on matrices
  optim.clip = 1.0  # global gradient norm; 0: off

  optim.stage1 = stage1 = ml_collections.ConfigDict()
  stage1.steps = 0  # 0: count epochs
  stage1.epochs = 6.0
  stage1.learning_rate = 3e-4
  stage1.schedule = 'constant'  # constant | cosine
  stage1.warmup = 0.04  # share of the stage
  stage1.dropout = 0.05
  stage1.optimizer = 'adamw'  # adamw | muon, for the matrices inside the layers
  stage1.reset_optimizer = True  # where a part of it begins (icot, coconut)

  optim.stage2 = stage2 = ml_collections.ConfigDict()
  stage2.steps = 0  # 0: count epochs
  stage2.epochs = 2.0
  stage2.learning_rate = 1e-4  # lowered at the switch
  stage2.schedule = 'constant'
  stage2.warmup = 0.04
  stage2.dropout = 0.1  # raised at the switch
  stage2.optimizer = 'adamw'
  stage2.reset_optimizer = True

  c.mesh = mesh = ml_collections.ConfigDict()  # devices along each axis; -1: all the rest
  mesh.data = -1  # cuts the batch
  mesh.fsdp = 1  # cuts batch and parameters, which layers gather
  mesh.tensor = 1  # cuts heads, hidden width and vocabulary

  c.train = train = ml_collections.ConfigDict()
  train.log_every = 50
  train.eval_every = 2000  # validation and checkpoint
  train.save_every = 500  # checkpoint
  train.keep = 3  # newest checkpoints, beside the best
  train.restart = False  # begin again where checkpoints were and none is sound
  train.max_loss = 0.0  # a larger loss stops the run; 0: 3 ln(vocabulary)
  train.compilation_cache = '~/.cache/latent_reasoning'  # '': none
  train.prefetch = 2  # batches made ahead in a thread
  train.peer_timeout = 600  # seconds without a step, compiling too: a process is lost
  train.profile_steps = 0  # traced into the folder profile after the first ten; 0: none

  c.eval = evaluation = ml_collections.ConfigDict()
  evaluation.batch_size = 64
  evaluation.valid_problems = 500  # per validation
  evaluation.test_problems = 0  # 0: all
  evaluation.blocks = 0  # at inference; 0: rim.blocks
  evaluation.max_tokens = 128  # a readout may generate
  evaluation.samples = 0  # pass@k
  evaluation.temperature = 1.0
  evaluation.top_k = 0  # most probable tokens that samples are drawn from; 0: all
  evaluation.checkpoint = 'best'  # best (validation accuracy) | last
  evaluation.sets = ()  # more test sets: files, or names such as svamp and math500
  evaluation.protocol = 'validation'  # validation | paper (16 cuts of the test split)
  evaluation.contamination = True  # look for test questions in the training data
  evaluation.latency_repeats = 50  # timed runs an entry
  evaluation.audit_rows = 8  # real rows a check

  c.sweep = sweep = ml_collections.ConfigDict()
  sweep.runs = ()  # 'name key=value …', one run each; (): no sweep
  sweep.seeds = (0, 1, 2)
  sweep.control = ''  # name of the run that others are compared with
  sweep.budget = 'steps'  # steps | flops: each run's, or scaled to the control's FLOPs

  if variant == 'tiny':
    _tiny(c)
  elif variant in ('llama1b', 'llama3b'):
    c.model.remat, c.model.frozen_dtype = True, 'bfloat16'
  return c


def _tiny(c: ml_collections.ConfigDict) -> None:
  """GSM8K itself on two cores: both stages of the same code, in minutes."""
  c.data.name = 'gsm8k'
  c.data.buckets.update(prefix=(160, 384), readout=(32, 128), count=(3, 8))
  c.tokenizer.vocab_size = 1024
  c.tokenizer.pad_to = 8
  c.model.update(layers=4, width=64, heads=4, hidden=256, max_positions=640,
                 dtype='float32', scan=False)
  c.model.lora.rank, c.optim.trained = 0, 'all'
  c.optim.batch_size = 16
  c.optim.stage1.update(steps=300, epochs=0.0, learning_rate=2e-3)
  c.optim.stage2.update(steps=300, epochs=0.0, learning_rate=1e-3)
  c.train.update(log_every=20, eval_every=150, save_every=50)
  c.eval.update(valid_problems=128, test_problems=256, max_tokens=64)
