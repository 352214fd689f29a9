"""Equinox: modules as parameters, with functions and integers among their leaves."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from programs import (
    BAD,
    BREAK,
    RULES,
    STEPS,
    assert_clipped_and_guarded,
    assert_row_names,
    assert_same_bits,
    batches,
    mse,
    norms_by_hand,
    optimizer,
)

from optaxclip import scopes, telemetry

LAYERS = ("encoder/layers/0", "encoder/layers/1", "head")


class Model(eqx.Module):
    encoder: eqx.nn.MLP
    head: eqx.nn.Linear
    norm: eqx.nn.LayerNorm | None
    scale: float = 0.5  # a number that is no array

    def __init__(self, key):
        keys = jax.random.split(key)
        self.encoder = eqx.nn.MLP(4, 8, 8, 1, jnp.tanh, final_activation=jnp.tanh, key=keys[0])
        self.head = eqx.nn.Linear(8, 1, key=keys[1])
        self.norm = None

    def __call__(self, x):
        return self.scale * self.head(self.encoder(x))


def create(rule):
    model, tx = Model(jax.random.key(1)), optimizer(rule)
    return model, tx.init(eqx.filter(model, eqx.is_array)), tx


@eqx.filter_value_and_grad
def loss_fn(model, x, y):
    return mse(jax.vmap(model)(x), y)


@eqx.filter_jit
def train_step(model, opt_state, tx, x, y):
    loss, grads = loss_fn(model, x, y)
    updates, opt_state = tx.update(grads, opt_state, eqx.filter(model, eqx.is_array))
    encoder = grads.encoder.layers
    layers = {"encoder/layers/0": encoder[0], "encoder/layers/1": encoder[1], "head": grads.head}
    metrics = {"loss": loss} | telemetry.metrics(opt_state, model) | norms_by_hand(layers)
    return eqx.apply_updates(model, updates), opt_state, metrics


def run(model, opt_state, tx, first=0, last=STEPS):
    xs, ys = batches()
    rows, states = [], [(model, opt_state)]
    for step in range(first, last):
        model, opt_state, metrics = train_step(model, opt_state, tx, xs[step], ys[step])
        rows.append(metrics)
        states.append((model, opt_state))
    return states, rows


def arrays(tree):
    return jax.tree.leaves(eqx.filter(tree, eqx.is_array))


@pytest.mark.parametrize("rule", RULES)
def test_a_module_is_clipped_guarded_and_logged_by_layer(rule):
    states, rows = run(*create(rule))
    assert_clipped_and_guarded(rows, LAYERS)
    assert_same_bits(arrays(states[BAD][0]), arrays(states[BAD + 1][0]))


@pytest.mark.parametrize("rule", RULES)
def test_a_restart_from_serialised_leaves_is_the_same_run(rule, tmp_path):
    states, rows = run(*create(rule))
    eqx.tree_serialise_leaves(tmp_path / "state.eqx", states[BREAK])
    model, opt_state, tx = create(rule)
    model, opt_state = eqx.tree_deserialise_leaves(tmp_path / "state.eqx", (model, opt_state))
    again, rest = run(model, opt_state, tx, BREAK)
    assert_same_bits(arrays(again[-1]), arrays(states[-1]))
    assert_same_bits(rest, rows[BREAK:])


class Counted(eqx.Module):
    linear: eqx.nn.Linear
    calls: jax.Array  # an array that is no parameter: its gradient is None


@pytest.mark.parametrize("rule", RULES)
def test_an_integer_array_changes_nothing_whether_it_is_filtered_out_or_not(rule):
    model = Counted(eqx.nn.Linear(4, 1, key=jax.random.key(1)), jnp.zeros((), jnp.int32))
    clip = RULES[rule](scope=scopes.leaf())
    xs, ys = batches()
    _, grads = eqx.filter_value_and_grad(lambda model: mse(jax.vmap(model.linear)(xs[0]), ys[0]))(
        model
    )
    assert grads.calls is None
    rows = []
    for kept in eqx.is_array, eqx.is_inexact_array:
        params = eqx.filter(model, kept)
        updates, state = clip.update(grads, clip.init(params), params)
        rows.append((arrays(updates), telemetry.metrics(state, params)))
        assert_row_names(rows[-1][1], ("linear/weight", "linear/bias"))
    assert_same_bits(*rows)
