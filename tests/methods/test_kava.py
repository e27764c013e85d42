"""KaVa's loss: latents' keys and values against those kept of the chain of thought."""

import jax
import numpy as np
import pytest

from latent_reasoning import batching, methods, sequences
from latent_reasoning.eval import one_by_one
from latent_reasoning.models import latents
from latent_reasoning.models.transformer import Transformer

pytestmark = pytest.mark.usefixtures('quick_compilation')

IDS = sequences.SpecialTokens(20, 21, 22, 23, 24, 25, (26, 27, 28), (10,), (10, 11))
EXAMPLES = [sequences.TokenizedExample([1, 2, 3], [[4, 5, 9], [6, 7, 7, 1], [3]], [8]),
            sequences.TokenizedExample([3, 1, 2, 9, 4], [[5, 2], [1]], [9, 1]),
            sequences.TokenizedExample([3, 1], [[5]], [2])]  # of which no step is left
STEPS = [len([4, 5, 9, 10, 6, 7, 7, 1]), len([5, 2]), 0]
COUNT = 3  # latents
SHARE = 0.4


@pytest.fixture
def world(tiny_config, random_params):
  """Makes (objective, model, parameters, batch): grouped heads, rotary or learned places."""
  def make(more=0, **changes):
    config = tiny_config(**{'method': 'codi', 'baselines.latents': COUNT,
                            'baselines.kv_importance': SHARE, 'model.fused_qkv': False,
                            'model.num_kv_heads': 1, **changes})
    method, model = methods.get('codi'), Transformer(config.model, 32)
    def collate(stage, more):
      rows = [stage(e, 0.0, config, IDS) for e in EXAMPLES]
      return batching.collate(rows, *(n + more for n in batching.sizes(rows)))
    batch = collate(method.stages[0], more).replace(teacher=collate(method.teacher, more))
    return method.loss(config), model, random_params(model, batch), batch
  return make


def kept(q, k, steps, inputs, share=SHARE):
  """Which are kept of a row, a layer and a head of keys [T, H], with queries [T, G, H]."""
  if not steps:
    return []
  importance = np.zeros(steps)
  for j in range(steps, inputs):
    for g in range(q.shape[1]):
      logits = k[:steps] @ q[j, g] / np.sqrt(k.shape[1])
      shares = np.exp(logits - logits.max())
      importance += shares / shares.sum() / q.shape[1] / (inputs - steps)
  unit = k[:steps] / np.linalg.norm(k[:steps], axis=1, keepdims=True)
  unlike = np.exp(-(unit @ unit.T).mean(1))
  score = share * importance + (1 - share) * unlike / unlike.sum()
  return sorted(np.argsort(-score)[:COUNT])


forward = jax.jit(latents.forward, static_argnums=0)


def by_hand(model, params, batch, steps):
  """L_KV with one row at a time, each a plain pass; a latent by a pass of its own."""
  pairs, alone = [], {0: False, 1: False}  # whether either score alone keeps others
  for b, n in enumerate(steps):
    teacher = jax.tree.map(lambda a, b=b: a[b:b + 1], batch.teacher)
    layers = forward(model, params, teacher).layers
    queries, keys, values = ([np.asarray(a, np.float64)[0, teacher.prefix:] for a in one]
                             for one in (layers.queries, layers.keys, layers.values))
    inputs = int((teacher.weights > 0).sum()) - 1
    prefix = len(EXAMPLES[b].question) + 1
    tokens = [*batch.tokens[b, :prefix], *batch.tokens[b, batch.prefix:]]
    row = batching.collate([sequences.causal(tokens, ())], 40, 0, 0)
    embeddings = model.apply({'params': params}, row.tokens, method='embed')
    for place in range(prefix - 1, prefix - 1 + COUNT):
      embeddings = one_by_one._next_thought(model, params, row, embeddings, place)
    student = forward(model, params, row, None, embeddings).layers
    for layer in range(len(keys)):
      given = queries[layer], keys[layer][:, 0], n, inputs
      at = kept(*given)
      alone = {share: found or kept(*given, share) != at for share, found in alone.items()}
      for m, i in enumerate(at):
        pairs.append((layer, 0, keys[layer][i, 0],
                      np.asarray(student.keys[layer])[0, prefix + m, 0]))
        pairs.append((layer, 1, values[layer][i, 0],
                      np.asarray(student.values[layer])[0, prefix + m, 0]))
  assert all(alone.values()), 'the case does not tell the two scores apart'
  total = []
  for layer in range(2):
    for kind in range(2):
      taught, own = (np.stack([p[i] for p in pairs if p[:2] == (layer, kind)]) for i in (2, 3))
      d = np.abs(taught - own)
      total.append((np.where(d < 1, d**2 / 2, d - 0.5)).mean() / taught.std())
  return np.mean(total)


evaluate = jax.jit(lambda objective, model, params, batch: objective(model, params, batch),
                   static_argnums=(0, 1))


@pytest.mark.integration
@pytest.mark.parametrize('place', [pytest.param('learned', marks=pytest.mark.slow), 'rotary'])
def test_by_hand(world, place):
  """Scores, choice, order and distance, of rows with more, fewer and no steps; padded, too."""
  objective, model, params, batch = world(2, **{
      'baselines.kv_weight': 0.5, 'model.position_embedding': place})
  loss, sums = evaluate(objective, model, params, batch)
  expected = by_hand(model, params, batch, STEPS)
  weight = float(sums['weight'])
  assert float(sums['kv_distance']) / weight == pytest.approx(expected, rel=1e-3)
  assert float(loss) == pytest.approx(float(
      sums['loss'] + sums['teacher_loss'] + sums['distance'] + 0.5 * sums['kv_distance']),
      rel=1e-5)
  objective, *_ = world(2, **{'model.position_embedding': place})  # off
  plain, without = evaluate(objective, model, params, batch)
  assert 'kv_distance' not in without
  assert float(loss - plain) == pytest.approx(0.5 * expected * weight, rel=1e-3)


@pytest.mark.integration
def test_teaches_the_student_alone(world):
  """No gradient into tokens that the teacher alone reads; latents' way in has one."""
  objective, model, params, batch = world(**{'baselines.kv_weight': 1.0})
  grads = jax.jit(jax.grad(lambda p: objective(model, p, batch)[1]['kv_distance']))(params)
  embedding = np.asarray(grads['embedding'])
  assert not embedding[[5, 6, 7]].any() and embedding[[1, 2, 3, IDS.block_open]].any(-1).all()
