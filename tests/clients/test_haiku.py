"""Haiku: parameters in a dict of dicts, whose keys have slashes and tildes of their own."""

import functools
import pickle

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from programs import (
    BAD,
    BREAK,
    RULES,
    STEPS,
    assert_clipped_and_guarded,
    assert_same_bits,
    batches,
    mse,
    norms_by_hand,
    optimizer,
)

import optaxclip
from optaxclip import telemetry

LAYERS = ("mlp/~/linear_0", "mlp/~/linear_1", "head/~/linear")


class Head(hk.Module):
    def __init__(self):
        super().__init__(name="head")
        self.linear = hk.Linear(1)

    def __call__(self, x):
        return self.linear(x)


model = hk.without_apply_rng(
    hk.transform(lambda x: Head()(hk.nets.MLP([8, 8], activation=jnp.tanh)(x)))
)


def create(rule):
    params, tx = model.init(jax.random.key(1), jnp.zeros((1, 4))), optimizer(rule)
    return tx, (params, tx.init(params))


@functools.partial(jax.jit, static_argnums=0)
def train_step(tx, state, x, y):
    params, opt_state = state
    loss, grads = jax.value_and_grad(lambda params: mse(model.apply(params, x), y))(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    metrics = {"loss": loss} | telemetry.metrics(opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), metrics | norms_by_hand(grads)


def run(tx, state, first=0, last=STEPS):
    xs, ys = batches()
    rows, states = [], [state]
    for step in range(first, last):
        state, metrics = train_step(tx, state, xs[step], ys[step])
        rows.append(metrics)
        states.append(state)
    return states, rows


@pytest.mark.parametrize("rule", RULES)
def test_modules_are_clipped_guarded_and_logged_by_their_own_names(rule):
    states, rows = run(*create(rule))
    assert set(states[0][0]) == set(LAYERS)
    assert_clipped_and_guarded(rows, LAYERS)
    assert_same_bits(states[BAD][0], states[BAD + 1][0])


@pytest.mark.parametrize("rule", RULES)
def test_a_restart_from_a_pickle_is_the_same_run(rule):
    tx, start = create(rule)
    states, rows = run(tx, start)
    again, rest = run(tx, pickle.loads(pickle.dumps(jax.device_get(states[BREAK]))), BREAK)
    assert_same_bits(again[-1], states[-1])
    assert_same_bits(rest, rows[BREAK:])


def test_a_state_of_modules_stays_out_of_the_clip():
    """Batch statistics are in a tree of their own, which the guard does not see: the program keeps
    the old ones.
    """
    net = hk.without_apply_rng(
        hk.transform_with_state(
            lambda x: hk.Linear(1)(hk.BatchNorm(True, True, 0.9)(x, is_training=True))
        )
    )
    xs, ys = batches()
    params, statistics = net.init(jax.random.key(1), xs[0])
    tx = optaxclip.skip_nonfinite(optax.chain(optaxclip.clip_by_norm(0.1), optax.sgd(0.1)))
    opt_state, skipped = tx.init(params), 0

    def loss_fn(params, statistics, x, y):
        prediction, statistics = net.apply(params, statistics, x)
        return mse(prediction, y), statistics

    for step in range(BAD + 1):
        grads, new = jax.grad(loss_fn, has_aux=True)(params, statistics, xs[step], ys[step])
        updates, opt_state = tx.update(grads, opt_state, params)
        now = telemetry.metrics(opt_state)["clip/skipped_steps"]
        statistics = jax.tree.map(
            lambda new, old, taken=now == skipped: jnp.where(taken, new, old), new, statistics
        )
        params, skipped = optax.apply_updates(params, updates), now
    assert skipped == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((params, statistics)))
    row = telemetry.metrics(opt_state, params)
    assert {"clip/limit/linear/w", "clip/limit/linear/b", "clip/limit/batch_norm/scale"} < set(row)
