"""Flax NNX: `nnx.Optimizer` in `nnx.jit`, and the functional loop on split states."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from programs import (
    BAD,
    BREAK,
    RULES,
    STEPS,
    assert_clipped_and_guarded,
    assert_row_names,
    assert_same_bits,
    batches,
    layer,
    mse,
    norms_by_hand,
    optimizer,
)

from optaxclip import scopes, telemetry

LAYERS = ("layers/0", "layers/1", "head")


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)])
        # statistics are no parameters
        self.norm = nnx.BatchNorm(8, use_bias=False, use_scale=False, rngs=rngs)
        self.head = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        for linear in self.layers:
            x = jnp.tanh(linear(x))
        return self.head(x)


def create(rule="zclip"):
    model = MLP(nnx.Rngs(1))
    return model, nnx.Optimizer(model, optimizer(rule), wrt=nnx.Param)


def loss_fn(model, x, y):
    return mse(model(x), y)


def by_hand(grads):
    return norms_by_hand(
        {"layers/0": grads["layers"][0], "layers/1": grads["layers"][1], "head": grads["head"]}
    )


@nnx.jit
def train_step(model, optimizer, x, y):
    loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
    optimizer.update(model, grads)
    metrics = {"loss": loss} | telemetry.metrics(optimizer, nnx.state(model, nnx.Param))
    return metrics | by_hand(grads)


def run(model, optimizer, first=0, last=STEPS):
    xs, ys = batches()
    return [train_step(model, optimizer, xs[step], ys[step]) for step in range(first, last)]


@pytest.mark.parametrize("rule", RULES)
def test_an_optimizer_is_clipped_guarded_and_logged_by_layer(rule):
    model, optimizer = create(rule)
    rows = run(model, optimizer, 0, BAD)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    rows += run(model, optimizer, BAD, BAD + 1)
    assert_same_bits(before, nnx.state(model, nnx.Param))
    rows += run(model, optimizer, BAD + 1)
    assert_clipped_and_guarded(rows, LAYERS)


@pytest.mark.parametrize("rule", RULES)
def test_split_states_give_the_same_run(rule):
    model, optimizer = create(rule)
    rows = run(model, optimizer)
    graphdef, state = nnx.split(create(rule))

    @jax.jit
    def step(state, x, y):
        model, optimizer = nnx.merge(graphdef, state)
        metrics = train_step(model, optimizer, x, y)
        return nnx.state((model, optimizer)), metrics

    for x, y, row in zip(*batches(), rows, strict=True):
        state, metrics = step(state, x, y)
        assert_same_bits(metrics, row)
    assert_same_bits(state, nnx.state((model, optimizer)))


def unboxed(state):
    return jax.tree.map(
        lambda box: box[...], state, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )


@pytest.mark.parametrize("init", [True, False])
@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_names_do_not_depend_on_the_boxes_of_a_split_state(rule, init, update):
    graphdef, params, rest = nnx.split(MLP(nnx.Rngs(1)), nnx.Param, ...)
    xs, ys = batches()
    grads = jax.grad(lambda params: loss_fn(nnx.merge(graphdef, params, rest), xs[0], ys[0]))(
        params
    )
    clip = RULES[rule](scope=scopes.group(layer))
    state = clip.init(params if init else unboxed(params))
    updates, state = clip.update(grads if update else unboxed(grads), state)
    assert jax.tree.structure(updates) == jax.tree.structure(grads if update else unboxed(grads))
    row = telemetry.metrics(state, params)
    assert_row_names(row, LAYERS)
    for name, norm in by_hand(grads).items():
        np.testing.assert_allclose(
            row[f"clip/size_before/{name.removeprefix('norm/')}"], norm, rtol=1e-6
        )


@pytest.mark.parametrize("rule", RULES)
def test_a_restart_from_orbax_is_the_same_run(rule, tmp_path):
    model, optimizer = create(rule)
    rows = run(model, optimizer, 0, BREAK)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state((model, optimizer)))
        checkpointer.wait_until_finished()
        again = create(rule)
        target = jax.eval_shape(lambda: nnx.state(again))
        nnx.update(again, checkpointer.restore(tmp_path / "state", target))
    rows = run(model, optimizer, BREAK)
    assert_same_bits(run(*again, BREAK), rows)
    assert_same_bits(nnx.state(again), nnx.state((model, optimizer)))
