"""What clipping each example costs on top of a plain gradient, by the compiler's figures on CPU."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from optaxclip import per_example


class Perceptron(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (1024, 1024):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class Reader(nn.Module):
    @nn.compact
    def __call__(self, places):
        return nn.Dense(100)(nn.RNN(nn.OptimizedLSTMCell(128))(nn.Embed(100, 128)(places)))


def figures(model, *batch):
    """Of a plain step, of ours, and of gradients that are stored for each example: flops, and bytes of temporary memory."""

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()

    def plain(params, *batch):
        return jax.value_and_grad(lambda params: jax.vmap(loss, (None, 0, 0))(params, *batch).mean())(params)

    def stored(params, *batch):
        gradients = jax.vmap(jax.grad(loss), (None, 0, 0))(params, *batch)
        return optax.per_example_global_norm_clip(jax.tree.leaves(gradients), 1.0)

    params = jax.eval_shape(model.init, jax.random.key(0), batch[0][0])
    found = []
    for step in plain, per_example.clipped_grad(loss, 1.0), stored:
        compiled = jax.jit(lambda *args, step=step: step(*args)).lower(params, *batch).compile()
        found.append((compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes))
    return found


def test_a_perceptron():
    plain, ours, stored = figures(Perceptron(), jnp.zeros((256, 784)), jnp.zeros(256, int))
    assert ours[0] < 1.05 * plain[0]
    assert ours[1] < 2 * plain[1]
    assert stored[1] > 100 * plain[1]


def test_an_lstm():
    plain, ours, stored = figures(Reader(), jnp.zeros((256, 64), int), jnp.zeros((256, 64), int))
    assert ours[1] < 1.6 * plain[1] < stored[1]
