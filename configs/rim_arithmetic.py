"""RiM on generated chains of operations: the default job, no download.

  python -m latent_reasoning.main --config=configs/rim_arithmetic.py

Reaches 95 to 100% at the final block (`direct`: 30 to 31%), seeds 0, 1, 2, in under
six minutes on two cores (Intel Xeon 2.5 GHz, jax 0.10.2 and 0.12.0, 2026-11-21).

The variant is the number of operations, four without one; the model has four
layers: `rim_arithmetic.py:5` asks for more operations than layers.
"""

import ml_collections


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  if variant not in ('', *'2345678'):
    raise ValueError(f"rim_arithmetic has no variant '{variant}'; expected the number "
                     'of operations, 2 to 8')
  steps = int(variant or 4)
  question = 2 * (steps + 1)  # tokens, at least: 7+2-5*3+4 and a line's end

  c = ml_collections.ConfigDict()
  # rim | direct | direct_steps | cot | pause | pause_steps | icot | coconut | codi
  c.method = 'rim'
  c.seed = 0  # of parameters, data and order

  c.data = data = ml_collections.ConfigDict()
  data.name = 'arithmetic'  # arithmetic | graphs | gsm8k | gsm8k_aug | files
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
  data.too_long = 'raise'  # raise | drop a row that no bucket holds
  data.valid_size = 500  # carved from train, where there is no valid split
  data.limit = 0  # first N problems of each split; 0: all
  data.sort_window = 1  # batches whose rows are sorted by length together

  data.arithmetic = arithmetic = ml_collections.ConfigDict()
  arithmetic.min_steps = steps  # fewest operations
  arithmetic.max_steps = steps  # most operations
  arithmetic.modulus = 10  # of every result; 0: none
  arithmetic.max_value = 9  # operands are 0 … this
  arithmetic.operations = '+-*'
  arithmetic.templates = 1  # wordings; 1: the terse expression alone
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
  buckets.prefix = (question, question + 4 * steps)  # static sizes of question and blocks
  buckets.readout = (1, 5, 6, 6 * steps + 6)  # of one readout: answer, step, chain of thought
  buckets.count = (*range(1, steps + 1), 2 * steps)  # readouts in a row; twice: externalize

  c.tokenizer = tokenizer = ml_collections.ConfigDict()
  tokenizer.kind = 'char'  # char | bpe | file
  tokenizer.path = ''  # tokenizer.json, for kind file or in place of a checkpoint's own
  tokenizer.add_bos = 'auto'  # as the tokenizer's post-processor says | true | false
  tokenizer.vocab_size = 0  # of a trained bpe
  tokenizer.at_least = 0  # entries of the vocabulary; set from pretrained weights
  tokenizer.pad_to = 8  # vocabulary padded to a multiple

  c.model = model = ml_collections.ConfigDict()
  model.init_from = ''  # pretrained weights: a directory or hub id, which sets the sizes
  model.family = 'gpt'  # gpt | llama (also Mistral, Qwen, SmolLM2)
  model.layers = 4
  model.width = 64
  model.heads = 4
  model.kv_heads = 0  # of keys and values, family llama; 0: as many
  model.head_size = 0  # family llama; 0: width / heads
  model.hidden = 256  # width of the MLP
  model.max_positions = 128
  model.positions = 'learned'  # learned | rotary
  model.tied = False  # head = transposed embedding table; untied learns faster here
  model.bias = True
  model.qkv_bias = False  # family llama, as Qwen2
  model.out_bias = False  # family llama, of attention's output
  model.qk_norm = False  # family llama: queries and keys are normed, as in Qwen3
  model.norm_epsilon = 1e-6
  model.dtype = 'float32'  # compute dtype; parameters are float32
  model.attention = 'split'  # split | packed (the slow oracle) | cudnn (GPU) | splash (TPU)
  model.scan = False  # scan over stacked layers: faster to compile
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
  lora.rank = 0  # 0: none
  lora.alpha = 256.0  # scaled by alpha / rank
  lora.dropout = 0.0
  lora.targets = ('.',)  # patterns of paths such as block_3/qkv; '.': all

  c.rim = rim = ml_collections.ConfigDict()
  rim.blocks = steps  # K, in stage 2 and at inference
  rim.block_tokens = 2  # M
  rim.max_steps = steps  # T_max
  rim.readout_offset = 1  # block t predicts step t+1; 0: step t
  rim.schedule = 'uniform'  # uniform | linear | relative annealing of steps
  rim.block_attention = 'causal'  # causal | bidirectional inside a block
  rim.readout_sees_question = True
  rim.externalize = False  # step readouts in stage 2 too, for --externalize
  rim.externalize_weight = 1.0  # of a row's step readouts together; its answers have 1
  rim.pause_tokens = 4 * steps  # of method pause: as many as RiM's block tokens

  rim.peers = peers = ml_collections.ConfigDict()  # of icot, coconut and codi
  peers.parts = steps + 1  # of stage 1; in part i, i steps are gone (icot, coconut)
  peers.smoothing = 4.0  # icot: o more steps removed, P(o) ∝ exp(-smoothing·o); 0: none
  peers.thoughts = 1  # continuous: coconut, for each step gone; codi, in all
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
  optim.trained = 'all'  # all | new: LoRA, rows of new tokens and memory; the rest frozen
  optim.batch_size = 64
  optim.accumulate = 1  # microbatches of a step
  optim.muon_scale = 2.0  # learning rate of matrices under muon, as a multiple of the stage's
  optim.beta1 = 0.9
  optim.beta2 = 0.99
  optim.epsilon = 1e-8
  optim.weight_decay = 0.0  # on matrices
  optim.clip = 1.0  # global gradient norm; 0: off

  optim.stage1 = stage1 = ml_collections.ConfigDict()
  stage1.steps = 1800  # 0: count epochs
  stage1.epochs = 0.0
  stage1.learning_rate = 3e-3
  stage1.schedule = 'cosine'  # constant | cosine
  stage1.warmup = 0.04  # share of the stage
  stage1.dropout = 0.0
  stage1.optimizer = 'muon'  # adamw | muon, for the matrices inside the layers
  stage1.reset_optimizer = True  # where a part of it begins (icot, coconut)

  optim.stage2 = stage2 = ml_collections.ConfigDict()
  stage2.steps = 800
  stage2.epochs = 0.0
  stage2.learning_rate = 4e-4  # 1e-3 forgets the chain
  stage2.schedule = 'cosine'
  stage2.warmup = 0.04
  stage2.dropout = 0.0
  stage2.optimizer = 'adamw'  # muon stays below it here
  stage2.reset_optimizer = True

  c.mesh = mesh = ml_collections.ConfigDict()  # devices along each axis; -1: all the rest
  mesh.data = -1  # cuts the batch
  mesh.fsdp = 1  # cuts batch and parameters, which layers gather
  mesh.tensor = 1  # cuts heads, hidden width and vocabulary

  c.train = train = ml_collections.ConfigDict()
  train.log_every = 50
  train.eval_every = 500  # validation and checkpoint
  train.save_every = 500  # checkpoint
  train.keep = 3  # newest checkpoints, beside the best
  train.restart = False  # begin again where checkpoints were and none is sound
  train.max_loss = 0.0  # a larger loss stops the run; 0: 3 ln(vocabulary)
  train.compilation_cache = '~/.cache/latent_reasoning'  # '': none
  train.prefetch = 2  # batches made ahead in a thread
  train.peer_timeout = 600  # seconds without a step, compiling too: a process is lost
  train.profile_steps = 0  # traced into the folder profile after the first ten; 0: none

  c.eval = evaluation = ml_collections.ConfigDict()
  evaluation.batch_size = 250
  evaluation.valid_problems = 500  # per validation
  evaluation.test_problems = 0  # 0: all
  evaluation.blocks = 0  # at inference; 0: rim.blocks
  evaluation.max_tokens = 6 * steps + 10  # a readout may generate
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

  return c
