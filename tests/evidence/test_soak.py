"""A hundred thousand steps of an LSTM, of which one in a hundred has a gradient that is NaN,
infinite, 1e30 or zero.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import optaxclip
from optaxclip import telemetry, thresholds

STEPS, SEEDS, LENGTH, BATCH = 100_000, 4, 6, 8
FINE, NAN, INFINITE, HUGE, ZERO = range(5)
RATE = optax.cosine_decay_schedule(3e-3, STEPS)
OPTIMIZERS = {
    "not finite": optaxclip.skip_nonfinite(optax.chain(optaxclip.autoclip(0.5), optax.adam(RATE))),
    "spikes": optaxclip.skip_spikes(
        optax.chain(optaxclip.clip_by_norm(1.0), optax.adam(RATE)), thresholds.ema(1e4)
    ),
}
SKIPPED = {"not finite": (NAN, INFINITE), "spikes": (NAN, INFINITE, HUGE)}


class Network(nn.Module):
    """Reads numbers, of which two are marked, and tells their sum."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.RNN(nn.OptimizedLSTMCell(8))(x)[:, -1])[:, 0]


def draw(key):
    """A batch `[BATCH, LENGTH, 2]` of numbers and marks, and the sums."""
    numbers, first, second = jax.random.split(key, 3)
    numbers = jax.random.uniform(numbers, (BATCH, LENGTH))
    half = LENGTH // 2
    at = [
        jax.random.randint(first, BATCH, 0, half),
        jax.random.randint(second, BATCH, half, LENGTH),
    ]
    marks = sum(jax.nn.one_hot(i, LENGTH) for i in at)
    return jnp.stack([numbers, marks], -1), jnp.sum(numbers * marks, 1)


def loss(params, x, y):
    return jnp.mean((Network().apply(params, x) - y) ** 2)


def inject(kind, key, grads):
    """The gradients with one element replaced, or all zero."""
    flat, unravel = jax.flatten_util.ravel_pytree(grads)
    sign = jax.random.rademacher(key, ())
    value = jnp.array([0, jnp.nan, jnp.inf, 1e30, 0])[kind] * sign
    poisoned = flat.at[jax.random.randint(key, (), 0, flat.size)].set(value)
    return unravel(jnp.where(kind == FINE, flat, jnp.where(kind == ZERO, 0, poisoned)))


@functools.partial(jax.jit, static_argnums=0)
def train(name, seed, share):
    """The final loss, the parameters, the optimizer's state and what was injected, for one seed."""
    optimizer = OPTIMIZERS[name]
    start, kinds, test, stream = jax.random.split(jax.random.key(seed), 4)
    kind = jax.random.randint(kinds, STEPS, NAN, ZERO + 1)
    kinds = jnp.where(jax.random.uniform(start, STEPS) < share, kind, FINE)
    params = Network().init(start, draw(test)[0])

    def step(carry, now):
        params, state = carry
        kind, key = now
        grads = inject(kind, key, jax.grad(loss)(params, *draw(key)))
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(
        step, (params, optimizer.init(params)), (kinds, jax.random.split(stream, STEPS))
    )
    tests = jax.vmap(draw)(jax.random.split(test, 100))
    return jnp.mean(jax.vmap(lambda x, y: loss(params, x, y))(*tests)), params, state, kinds


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_hundred_thousand_steps(name):
    seeds = jnp.tile(jnp.arange(SEEDS), 2)
    losses, params, state, kinds = jax.vmap(functools.partial(train, name))(
        seeds, jnp.repeat(jnp.array([0.0, 0.01]), SEEDS)
    )
    kinds, (clean, poisoned) = np.asarray(kinds), np.split(np.asarray(losses), 2)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert max(clean) < 1e-4  # it has learned: 1/6 is the loss of the mean
    assert np.median(poisoned) <= max(clean) and max(poisoned) <= max(clean) + 2 * (
        max(clean) - min(clean)
    )

    injected = np.stack([(kinds == kind).sum(1) for kind in range(5)])
    assert (injected[1:, SEEDS:] > 200).all() and not injected[1:, :SEEDS].any()
    found = telemetry.metrics(state)
    skipped = injected[list(SKIPPED[name])].sum(0)
    np.testing.assert_array_equal(found["clip/skipped_steps"], skipped)
    np.testing.assert_array_equal(found["clip/steps"], STEPS - skipped)
    np.testing.assert_array_equal(state.steps, STEPS)
    assert not found["clip/nonfinite_steps"].any()
    if name == "not finite":  # every other size, and no 1e30, is known to the rule
        sketch = [
            leaf
            for leaf in jax.tree.leaves(state.inner[0].threshold)
            if leaf.ndim == 3 and leaf.dtype == jnp.int32
        ][0]
        np.testing.assert_array_equal(sketch.max((1, 2)), injected[FINE])
