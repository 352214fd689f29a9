"""A skipped step has never been: zero updates, and the same bits inside."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify

import optaxclip
from optaxclip import skip_nonfinite, telemetry

PARAMS = {"w": jnp.ones((3, 4)), "b": jnp.zeros(4)}
SCHEDULE = optax.exponential_decay(0.1, 1, 0.5)
INNER = {
    "sgd with a schedule": optax.sgd(SCHEDULE, momentum=0.9),
    "adam": optax.adam(1e-2),
    "weight decay": optax.chain(optaxclip.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1)),
    "adaptive clip": optax.chain(optaxclip.adagc(warmup=3), optax.lion(1e-3)),
    "sketch": optax.chain(optaxclip.autoclip(), optax.rmsprop(1e-2)),
    "factored": optax.adafactor(1e-2),
    "no state": optax.sgd(0.1),
    "stable adam": optax.chain(optaxclip.scale_by_stable_adam(), optax.scale(-0.1)),
    "carry": optax.chain(optaxclip.carry(optaxclip.clip_by_value(0.1)), optax.sgd(0.1)),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
    "micro-batches": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
}
each_inner = pytest.mark.parametrize("name", INNER)


def gradients(seed, bad=None):
    rng = np.random.default_rng(seed)
    grads = {name: jnp.asarray(rng.standard_normal(p.shape), jnp.float32) for name, p in PARAMS.items()}
    return grads if bad is None else {**grads, "b": grads["b"].at[1].set(bad)}


@each_inner
def test_a_run_with_bad_steps_is_the_run_without_them(name):
    inner = INNER[name]
    guarded = skip_nonfinite(inner)
    update, plain = jax.jit(guarded.update), jax.jit(inner.update)
    state, expected = guarded.init(PARAMS), inner.init(PARAMS)
    for i, bad in enumerate([np.nan, None, None, np.inf, -np.inf, None, np.nan, None, None]):
        before = state.inner
        updates, state = update(gradients(i, bad), state, PARAMS)
        if bad is None:
            want, expected = plain(gradients(i), expected, PARAMS)
            chex.assert_trees_all_close((updates, state.inner), (want, expected), rtol=1e-6, atol=1e-7)
        else:
            chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
            chex.assert_trees_all_equal(state.inner, before)
    assert (state.steps, state.skipped_steps, state.consecutive) == (9, 4, 0)


@each_inner
def test_the_state_keeps_its_types_in_a_donated_scan(name):
    guarded = skip_nonfinite(INNER[name])

    def step(state, scale):
        updates, state = guarded.update(jax.tree.map(lambda g: g * scale, gradients(0)), state, PARAMS)
        return state, updates

    run = jax.jit(lambda state, scales: jax.lax.scan(step, state, scales), donate_argnums=0)
    state, updates = run(guarded.init(PARAMS), jnp.array([1.0, jnp.nan, jnp.inf, 1e-3]))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, guarded.init(PARAMS))
    assert not any(np.isnan(leaf).any() for leaf in jax.tree.leaves((state, updates)))
    assert state.skipped_steps == 2


def test_without_jit_it_does_the_same():
    guarded = skip_nonfinite(optax.adam(1e-2))
    state = guarded.init(PARAMS)
    for bad in None, np.nan:
        eager = guarded.update(gradients(1, bad), state, PARAMS)
        chex.assert_trees_all_close(eager, jax.jit(guarded.update)(gradients(1, bad), state, PARAMS), rtol=1e-6)


def run_micro_batches(steps, bad_ones):
    state, total = steps.init(PARAMS), jax.tree.map(jnp.zeros_like, PARAMS)
    for i, bad in enumerate(bad_ones):
        updates, state = steps.update(gradients(i, bad), state, PARAMS)
        total = jax.tree.map(jnp.add, total, updates)
    return total, state


def test_around_micro_batches_the_bad_one_is_left_out():
    steps = skip_nonfinite(optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation())
    total, _ = run_micro_batches(steps, [None, np.nan, None])
    want = jax.tree.map(lambda x, y: -(x + y) / 2, gradients(0), gradients(2))
    chex.assert_trees_all_close(total, want, rtol=1e-5, atol=1e-6)


def test_inside_of_micro_batches_it_keeps_nan_from_the_weights_but_cannot_mend_what_accumulates():
    steps = optax.MultiSteps(skip_nonfinite(optax.sgd(1.0)), 2)
    total, state = run_micro_batches(steps, [None, None, np.nan, None, None, None])
    chex.assert_trees_all_close(
        total, jax.tree.map(lambda x, y: -(x + y) / 2, gradients(0), gradients(1)), rtol=1e-5, atol=1e-6
    )
    assert state.inner_opt_state.skipped_steps == 2 and np.isnan(state.acc_grads["b"]).any()


@pytest.mark.parametrize("size", [3e38, 1e30, 1e-30, 0.0])
def test_large_finite_gradients_are_not_skipped(size):
    guarded = skip_nonfinite(optax.chain(optaxclip.clip(1.0), optax.sgd(1.0)))
    updates, state = guarded.update(jnp.full(1, size), guarded.init(jnp.zeros(1)))
    assert state.skipped_steps == 0
    np.testing.assert_allclose(updates, [-min(size, 1.0)], rtol=1e-6)


def test_a_norm_that_no_float_can_hold_is_skipped():
    guarded = skip_nonfinite(optax.sgd(1.0))
    updates, state = guarded.update(jnp.full(100, 3e38), guarded.init(jnp.zeros(100)))
    assert state.skipped_steps == 1 and not updates.any()


def test_odd_leaves_and_half_precision_pass():
    params = {
        "half": jnp.ones(3, jnp.bfloat16),
        "none": None,
        "masked": optax.MaskedNode(),
        "int": jnp.arange(2),
        "none too": {},
    }
    guarded = skip_nonfinite(optaxclip.clip(1.0))
    for bad in False, True:
        grads = {**params, "half": jnp.full(3, jnp.nan if bad else 2.0, jnp.bfloat16)}
        updates, state = guarded.update(grads, guarded.init(params), params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        assert state.skipped_steps == bad and updates["int"].tolist() == ([0, 0] if bad else [0, 1])


def test_extra_arguments_are_passed_on():
    seen = []

    def update(updates, state, params=None, *, value, **extra_args):
        seen.append(value)
        return updates, state

    guarded = skip_nonfinite(optax.GradientTransformationExtraArgs(lambda params: (), update))
    guarded.update(PARAMS, guarded.init(PARAMS), PARAMS, value=3.0)
    assert seen == [3.0]


def test_too_many_in_a_row_raise_under_checkify_and_are_skipped_elsewhere():
    guarded = skip_nonfinite(optax.adam(1e-2), max_consecutive=2)
    state = guarded.init(PARAMS)
    checked = checkify.checkify(jax.jit(functools.partial(guarded.update, params=PARAMS)))
    for bad, fails in (np.nan, False), (np.nan, False), (None, False), (np.nan, False), (np.inf, False), (np.nan, True):
        error, (updates, state) = checked(gradients(0, bad), state)
        if fails:
            with pytest.raises(checkify.JaxRuntimeError, match="3 steps in a row were not finite; look at what makes"):
                error.throw()
        else:
            error.throw()
    for _ in range(3):
        updates, state = jax.jit(guarded.update)(gradients(0, np.nan), state, PARAMS)
        assert not any(leaf.any() for leaf in jax.tree.leaves(updates))
    assert (state.consecutive, state.skipped_steps) == (6, 8)


def test_skipped_steps_are_in_the_metrics():
    guarded = skip_nonfinite(optax.chain(optaxclip.clip(1.0), optax.sgd(1.0)))
    state = guarded.init(PARAMS)
    for bad in None, np.nan, None:
        _, state = guarded.update(gradients(0, bad), state, PARAMS)
    found = telemetry.metrics(optax.chain(optax.identity(), guarded).init(PARAMS))
    assert found["clip/skipped_steps"] == 0
    found = telemetry.metrics(state)
    assert (found["clip/skipped_steps"], found["clip/steps"], found["clip/nonfinite_steps"]) == (1, 2, 0)


def test_what_it_refuses():
    with pytest.raises(
        TypeError, match=r"inner must be a GradientTransformation, got 1.0; pass one such as optax.adam\(1e-3\)"
    ):
        skip_nonfinite(1.0)
    with pytest.raises(TypeError, match="max_consecutive must be an integer, got 2.5"):
        skip_nonfinite(optax.sgd(1.0), max_consecutive=2.5)
    with pytest.raises(ValueError, match="max_consecutive must be at least 1, got 0; pass a larger count"):
        skip_nonfinite(optax.sgd(1.0), max_consecutive=0)


def test_the_compiled_step_copies_no_moments():
    def copies(optimizer):
        def step(params, state, grads):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        params = {"w": jnp.ones((64, 64))}
        run = jax.jit(step, donate_argnums=(0, 1))
        return run.lower(params, optimizer.init(params), params).compile().as_text().count("f32[64,64]{1,0} copy(")

    def plainly(inner):
        def update(updates, state, params=None):
            ok = jnp.isfinite(jnp.sum(jnp.abs(updates["w"])))
            new, inner_state = inner.update(updates, state, params)
            return jax.tree.map(lambda x: jnp.where(ok, x, 0), new), jax.tree.map(
                lambda x, y: jnp.where(ok, x, y), inner_state, state
            )

        return optax.GradientTransformation(inner.init, update)

    assert copies(skip_nonfinite(optax.adam(1e-3))) == copies(optax.adam(1e-3)) == 0
    assert copies(plainly(optax.adam(1e-3))) > 0  # the obvious form does
