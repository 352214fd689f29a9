"""What clipping each example costs on top of a plain gradient, by the compiler's figures on CPU:
rows of the benchmark.
"""

import jax
from compiling import optimized

from benchmarks.per_example import MODELS, counted, rows_of


def figures(title):
    """Of a plain step, of ours, and of gradients that are stored for each example: flops, and bytes
    of temporary memory.
    """
    model, make_batch = MODELS[title]
    batch = make_batch()
    params = jax.eval_shape(model.init, jax.random.key(0), batch[0][0])
    found, rows = [], rows_of(model)
    for name in "plain", "clipped_grad", "optax":
        cost = counted(optimized(jax.jit(rows[name]).lower(params, *batch)))
        found.append((cost["flops"], cost["temporary memory"]))
    return found


def test_a_perceptron():
    plain, ours, stored = figures("MLP")
    assert ours[0] < 1.05 * plain[0]
    assert ours[1] < 2 * plain[1]
    assert stored[1] > 100 * plain[1]


def test_an_lstm():
    plain, ours, stored = figures("LSTM")
    assert ours[1] < 1.6 * plain[1] < stored[1]
