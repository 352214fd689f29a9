"""Every number that a row takes may be injected: as a number, an array, a schedule, and changed
between steps.
"""

import functools
import inspect
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip
from optaxclip import methods, responses, scopes, thresholds

PARAMS = {"w": jnp.array([[3.0, 1.0, -2.0], [4.0, 0.5, 1.0]]), "b": jnp.array([0.5, -1.0, 2.0])}
SPIKE = 5
# of the gradients of one step after the other
SCALES = jnp.array([1.0, 1.5, 0.8, 1.2, 1.0, 40.0, 2.0])
GRADS = jax.vmap(lambda scale: jax.tree.map(lambda p: scale * (0.3 + jnp.sin(7 * p)), PARAMS))(
    SCALES
)
# For each row: what is given besides, and for each number that it takes one that makes a
# difference.
ROWS = {
    "clip_by_value": ({"limit": 1.0}, {"limit": 0.5}),
    "clip_by_value of two": ({"limit": -0.5, "high": 0.25}, {"limit": -0.1, "high": 0.1}),
    "clip_by_value between bounds": ({"low": -0.5, "high": 0.25}, {"low": -0.1, "high": 0.1}),
    "clip_by_norm": ({"max_norm": 1.0}, {"max_norm": 0.5}),
    "clip_by_global_norm": ({"max_norm": 1.0}, {"max_norm": 0.5}),
    "clip_by_block_rms": ({"max_rms": 1.0}, {"max_rms": 0.5}),
    "adaptive_grad_clip": ({}, {"ratio": 0.1, "floor": 2.5}),
    "clip_by_trust_ratio": ({"ratio": 0.1, "high": 9.0}, {"ratio": 0.05, "low": 2.5, "high": 2.6}),
    "autoclip": ({}, {"q": 0.5}),
    "autoclip of the last": ({"window": 3}, {"q": 0.5}),
    "quantile_clip": ({}, {"q": 0.5, "rate": 0.4}),
    "zclip": ({"warmup": 3}, {"z": 3, "decay": 0.5, "warmup": 5, "max_norm": 1.0}),
    "adagc": ({"warmup": 3}, {"factor": 2, "decay": 0.5, "warmup": 5, "max_norm": 2.0}),
    "history_clip": ({"window": 7, "warmup": 3}, {"deviations": 1.0, "warmup": 6}),
    "log_norm_clip": ({}, {"deviations": 1.0, "decay": 0.5}),
    "growth_clip": ({}, {"factor": 2}),
    "spam_clip": (
        {"factor": 4.0, "decay": 0.5, "warmup": 3},
        {"factor": 2.0, "decay": 0.9, "warmup": 7},
    ),
    "max_norm": ({}, {"limit": 0.5}),
    "gradient_stabilizer": ({}, {"decay": 0.5, "square_decay": 0.8}),
    "clippy": ({}, {"relative": 0.3, "absolute": 0.2}),
    "scale_by_stable_adam": (
        {"weight_decay": 0.1},
        {"max_rms": 0.5, "b1": 0.5, "b2": 0.9, "eps": 0.1, "weight_decay": 0.5},
    ),
    "spectral_clip": ({"max_norm": 1.0}, {"max_norm": 0.5}),
    "spectral_clip by products": (
        {"max_norm": 1.0, "iterations": 5, "response": responses.smooth},
        {"max_norm": 0.5},
    ),
}
STATIC = ("window", "iterations", "response", "axes", "batch_axes", "option")
SHARED = {"scope", "norm", "response", "nonfinite", "sharded_over", "record"}
EACH = [(row, name) for row, (_, numbers) in ROWS.items() for name in numbers]


def row_of(name):
    return getattr(optaxclip, name.split()[0])


def inject(row, **options):
    static = [name for name in STATIC if name in inspect.signature(row_of(row)).parameters]
    return optax.inject_hyperparams(row_of(row), static_args=static, **options)


def trained(transform, grads=GRADS):
    """The updates and the states of all steps, from one compiled scan."""

    def step(state, gradient):
        updates, state = transform.update(gradient, state, PARAMS)
        return state, (updates, state)

    return jax.jit(lambda grads: jax.lax.scan(step, transform.init(PARAMS), grads)[1])(grads)


def at(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


class Rising(optax.schedules.StatefulSchedule):
    """Up to a number, in two steps that it counts itself."""

    def __init__(self, value):
        self.value = value

    def init(self):
        return jnp.zeros(())

    def update(self, state, **extra_args):
        return jnp.minimum(state + 1, 2)

    def __call__(self, state, **extra_args):
        return self.value * (1 - (2 - state) / 8)


FORMS = {
    "NumPy array": np.asarray,
    "array": jnp.asarray,
    "array of floats": lambda value: jnp.asarray(value, jnp.float32),
    "schedule": lambda value: lambda step: value,
    "schedule of arrays": lambda value: lambda step: jnp.asarray(value, jnp.float32),
}


def test_the_table_has_every_number_of_every_row():
    rows = {
        name
        for name, value in vars(methods).items()
        if inspect.isfunction(value) and value.__module__ == methods.__name__
    }
    # qk_clip needs the logits of a model: test_qk_clip.py
    rows = {name for name in rows if not name.startswith("_") and name != "qk_clip"}
    taken = {
        name: {x for row, (_, numbers) in ROWS.items() if row.split()[0] == name for x in numbers}
        for name in rows
    }
    for name in rows:
        assert taken[name] == set(inspect.signature(row_of(name)).parameters) - SHARED - set(
            STATIC
        ), name


@functools.cache
def trained_as_given(row):
    return trained(row_of(row)(**ROWS[row][0]))[0]


@pytest.mark.parametrize("row, name", EACH)
def test_a_number_is_the_same_given_or_injected(row, name):
    given, value = ROWS[row][0], ROWS[row][1][name]
    wanted, _ = trained(row_of(row)(**given | {name: value}))
    assert any(
        not np.allclose(wanted[leaf], trained_as_given(row)[leaf], rtol=1e-3) for leaf in PARAMS
    )
    updates, states = trained(inject(row)(**given | {name: value}))
    chex.assert_trees_all_close(updates, wanted, rtol=1e-5, atol=1e-6)
    before, gradient = jax.tree.map(lambda x: x[SPIKE - 1], states), at(GRADS, SPIKE)
    for form, convert in FORMS.items():
        injected = inject(row)(**given | {name: convert(value)})
        state = injected.init(PARAMS)._replace(inner_state=before.inner_state)
        updates, state = injected.update(gradient, state, PARAMS)
        chex.assert_trees_all_close(
            updates, at(wanted, SPIKE), rtol=1e-5, atol=1e-6, custom_message=form
        )
        np.testing.assert_allclose(state.hyperparams[name], value, rtol=1e-6)


@pytest.mark.parametrize("row, name", EACH)
def test_a_number_may_change_between_steps(row, name):
    given, value = ROWS[row][0], ROWS[row][1][name]
    moving = inject(row)(**given | {name: Rising(value)})
    fixed = inject(row)(**given | {name: value})
    for injected in moving, fixed:
        state, update = (
            injected.init(PARAMS),
            jax.jit(injected.update) if injected is moving else injected.update,
        )
        for i in range(3):
            now = value * (1 - (2 - i) / 8)
            if injected is fixed:
                state.hyperparams[name] = now  # as a user does, with a float where an integer was
            wanted, inner = row_of(row)(**given | {name: jnp.asarray(now)}).update(
                at(GRADS, i), state.inner_state, PARAMS
            )
            updates, state = update(at(GRADS, i), state, PARAMS)
            chex.assert_trees_all_close(
                (updates, state.inner_state), (wanted, inner), rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("row", [row for row in ROWS if " " not in row])
def test_rows_are_injected_with_their_own_defaults(row):
    needed = {
        name: 1.0
        for name in ("limit", "max_norm", "max_rms", "ratio")
        if name in ROWS[row][1] and row not in ("zclip", "adagc", "adaptive_grad_clip")
    }
    injected = optax.inject_hyperparams(
        row_of(row), static_args="window" if row == "history_clip" else ()
    )(**needed)
    wanted, _ = trained(row_of(row)(**needed))
    chex.assert_trees_all_close(trained(injected)[0], wanted, rtol=1e-5, atol=1e-6)
    state = injected.init(PARAMS)
    for i in range(2):
        updates, new = injected.update(at(GRADS, i), state, PARAMS)
        chex.assert_trees_all_close(updates, at(wanted, i), rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        state = new


@pytest.mark.parametrize("row", [row for row in ROWS if " " not in row])
def test_a_response_is_injected_as_a_static_argument(row):
    injected = optax.inject_hyperparams(
        row_of(row), static_args=["response", *(["window"] if row == "history_clip" else [])]
    )
    given = ROWS[row][0] | {
        name: value
        for name, value in ROWS[row][1].items()
        if name in ("limit", "max_norm", "max_rms")
    }
    both = [make(**given, response=responses.drop) for make in (injected, row_of(row))]
    updates, wanted = (
        transform.update(at(GRADS, SPIKE), transform.init(PARAMS), PARAMS)[0] for transform in both
    )
    chex.assert_trees_all_close(updates, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "row, given",
    [
        ("history_clip", {"window": 4, "warmup": 2}),
        ("autoclip", {"window": 4}),
        ("spectral_clip", {"max_norm": 1.0, "iterations": 4}),
        ("adaptive_grad_clip", {"axes": 0}),
    ],
)
def test_what_decides_about_shapes_is_refused_with_what_to_say(row, given):
    (name,) = set(given) & set(STATIC)
    for value in given[name], jnp.asarray(given[name]), np.asarray(given[name]):
        injected = optax.inject_hyperparams(
            row_of(row), static_args="response" if row == "spectral_clip" else ()
        )
        transform = injected(
            **given
            | {name: value}
            | ({"response": responses.smooth} if row == "spectral_clip" else {})
        )
        for init in transform.init, jax.jit(transform.init):
            words = f'with optax.inject_hyperparams pass static_args="{name}"'
            with pytest.raises(
                TypeError, match=f"^{name} must be a Python value, got .*{re.escape(words)}(\n|$)"
            ):
                init(PARAMS)


def test_counts_of_rules_and_of_what_is_made_of_rules_may_be_injected():
    def make(steps, patience, warmup):
        rule = thresholds.reset_after(thresholds.ema(1.1, warmup=warmup), patience)
        return optaxclip.clip(thresholds.join([rule, 1.0], [steps]), scopes.tree())

    wanted, _ = trained(make(5, 2, 1))
    for counts in (5, 2, 1), (5.0, 2.0, 1.0):
        updates, _ = trained(optax.inject_hyperparams(make)(*counts))
        chex.assert_trees_all_close(updates, wanted, rtol=1e-6)
    for other in (6, 2, 1), (5, 1, 1), (5, 2, 4):
        assert not np.allclose(trained(make(*other))[0]["w"], wanted["w"])


@pytest.mark.parametrize("warmup", [0, -3, 1e9, float("nan")])
@pytest.mark.parametrize("row", ["zclip", "adagc", "history_clip", "spam_clip"])
def test_a_traced_warm_up_of_any_size_neither_stops_training_nor_spoils_it(row, warmup):
    def run(warmup):
        return trained(
            row_of(row)(warmup=warmup, **({"window": 4} if row == "history_clip" else {}))
        )[0]

    updates = jax.jit(run)(warmup)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))
    chex.assert_trees_all_equal_comparator(
        lambda u, g: bool((np.sign(u) == np.sign(g)).all()),
        lambda u, g: f"{u} for {g}",
        updates,
        GRADS,
    )
    if (
        row == "history_clip" and warmup == 1e9
    ):  # counts as the whole window, which is full before the spike
        assert np.abs(updates["w"][5]).max() < 0.5 * np.abs(GRADS["w"][5]).max()


def test_numbers_that_16_bits_round_away_are_refused_with_what_to_say():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    with pytest.raises(
        ValueError,
        match=r"^decay must be in \(0, 1\), got 1.*; .* pass hyperparam_dtype=jnp.float32$",
    ):
        optax.inject_hyperparams(optaxclip.spam_clip)().init(params)
    state = optax.inject_hyperparams(optaxclip.spam_clip, hyperparam_dtype=jnp.float32)().init(
        params
    )
    assert state.hyperparams["decay"] == np.float32(0.999)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("row", [row for row in ROWS if " " not in row])
def test_the_dtype_of_what_is_injected_leaves_states_and_updates_as_they_are(row, dtype):
    given = ROWS[row][0] | ROWS[row][1]
    injected, plain = inject(row, hyperparam_dtype=dtype)(**given), row_of(row)(**given)
    state, params = injected.init(PARAMS), PARAMS
    updates, new = injected.update(params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state.inner_state, plain.init(params))
    assert {jnp.asarray(x).dtype for x in state.hyperparams.values()} <= {
        jnp.dtype(dtype),
        jnp.dtype(jnp.int32),
    }
