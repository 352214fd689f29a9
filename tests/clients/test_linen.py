"""Flax linen: `TrainState` loops, with plain parameters and with parameters in boxes of sharding
metadata.
"""

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.core import meta
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec
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

from optaxclip import telemetry

LAYERS = ("Dense_0", "Dense_1")


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.tanh(nn.Dense(8)(x)))


class Sharded(nn.Module):
    """The same with boxed kernels, and biases that are not boxed."""

    box: str

    @nn.compact
    def __call__(self, x):
        boxed = {"partitioned": nn.with_partitioning, "logical": nn.with_logical_partitioning}[
            self.box
        ]
        init = nn.initializers.lecun_normal()
        x = nn.Dense(8, kernel_init=boxed(init, ("embed", "mlp")))(x)
        return nn.Dense(1, kernel_init=boxed(init, ("mlp", None)))(nn.tanh(x))


def create(model, rule="zclip", tx=None):
    params = model.init(jax.random.key(1), jnp.zeros((1, 4)))["params"]
    return TrainState.create(
        apply_fn=model.apply, params=params, tx=optimizer(rule) if tx is None else tx
    )


@jax.jit
def train_step(state, x, y):
    loss, grads = jax.value_and_grad(lambda params: mse(state.apply_fn({"params": params}, x), y))(
        state.params
    )
    state = state.apply_gradients(grads=grads)
    metrics = {"loss": loss} | telemetry.metrics(state, state.params)
    return state, metrics | norms_by_hand({name: grads[name] for name in LAYERS})


def run(state, first=0, last=STEPS):
    xs, ys = batches()
    rows, states = [], [state]
    for step in range(first, last):
        state, metrics = train_step(state, xs[step], ys[step])
        rows.append(metrics)
        states.append(state)
    return states, rows


@pytest.mark.parametrize("rule", RULES)
def test_a_train_state_is_clipped_guarded_and_logged_by_layer(rule):
    states, rows = run(create(MLP(), rule))
    assert_clipped_and_guarded(rows, LAYERS)
    assert_same_bits(states[BAD].params, states[BAD + 1].params)
    assert all(
        np.any(a != b)
        for a, b in zip(*map(jax.tree.leaves, (states[0].params, states[BAD].params)), strict=True)
    )


@pytest.mark.parametrize("rule", RULES)
def test_a_restart_from_msgpack_is_the_same_run(rule):
    states, rows = run(create(MLP(), rule))
    saved = flax.serialization.to_bytes(states[BREAK])
    again, rest = run(flax.serialization.from_bytes(create(MLP(), rule), saved), BREAK)
    assert_same_bits(again[-1], states[-1].replace(apply_fn=again[-1].apply_fn, tx=again[-1].tx))
    assert_same_bits(rest, rows[BREAK:])


@pytest.mark.parametrize("box", ["partitioned", "logical"])
def test_boxed_parameters_have_the_numbers_and_names_of_plain_ones(box):
    states, rows = run(create(Sharded(box)))
    assert any(
        isinstance(x, meta.AxisMetadata) for x in jax.tree.leaves(states[-1].params, is_leaf=is_box)
    )
    assert_clipped_and_guarded(rows, LAYERS)
    plain = create(Sharded(box))
    plain = TrainState.create(apply_fn=plain.apply_fn, params=meta.unbox(plain.params), tx=plain.tx)
    plain_states, plain_rows = run(plain)
    assert_same_bits(meta.unbox(states[-1].params), plain_states[-1].params)
    assert_same_bits(rows, plain_rows)


def is_box(node):
    return isinstance(node, meta.AxisMetadata)


@pytest.mark.parametrize("rule", RULES)
def test_a_state_boxed_at_init_for_its_sharding_is_updated_unboxed(rule):
    """As trainers on a mesh do: the boxes say how the whole state is sharded, and are taken off
    inside `jit`.
    """
    mesh = jax.make_mesh((4, 2), ("embed", "mlp"))
    model, tx = Sharded("partitioned"), optimizer(rule)
    boxed = jax.eval_shape(lambda: create(model, tx=tx))
    specs = nn.get_partition_spec(boxed)
    momentum = optax.tree.get(specs, "mu")
    assert momentum["Dense_0"]["kernel"] == PartitionSpec("embed", "mlp")
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    shardings = jax.tree.unflatten(
        jax.tree.structure(meta.unbox(boxed)), jax.tree.leaves(shardings)
    )
    state = jax.jit(lambda: meta.unbox(create(model, tx=tx)), out_shardings=shardings)()
    assert state.params["Dense_0"]["kernel"].sharding.spec == PartitionSpec("embed", "mlp")
    boxed_rows = run(create(model, tx=tx))[1]
    xs, ys = batches()
    for step in range(3):
        grads = jax.grad(
            lambda params, step=step: mse(model.apply({"params": params}, xs[step]), ys[step])
        )(jax.device_get(state.params))
        state = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))(state, grads)
        row = telemetry.metrics(state, state.params)
        assert_row_names(row, LAYERS)
        for name in LAYERS:
            np.testing.assert_allclose(
                row[f"clip/size_before/{name}"],
                boxed_rows[step][f"clip/size_before/{name}"],
                rtol=1e-5,
            )


def test_a_sharded_state_comes_back_from_orbax(tmp_path):
    states, rows = run(create(Sharded("partitioned")))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", states[BREAK])
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: states[BREAK]))
    again, rest = run(restored, BREAK)
    assert_same_bits(again[-1], states[-1])
    assert_same_bits(rest, rows[BREAK:])
