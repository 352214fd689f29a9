"""A skipped step has never been: zero updates, and the same bits inside."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import optimized
from jax.experimental import checkify, io_callback

import optaxclip
from optaxclip import _programs, skip_nonfinite, skip_spikes, telemetry, thresholds

PARAMS = {"w": jnp.ones((3, 4)), "b": jnp.zeros(4)}
SCHEDULE = optax.exponential_decay(0.1, 1, 0.5)
INNER = {
    "sgd with a schedule": optax.sgd(SCHEDULE, momentum=0.9),
    "adam": optax.adam(1e-2),
    "weight decay": optax.chain(
        optaxclip.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1)
    ),
    "adaptive clip": optax.chain(optaxclip.adagc(warmup=3), optax.lion(1e-3)),
    "sketch": optax.chain(optaxclip.autoclip(), optax.rmsprop(1e-2)),
    "factored": optax.adafactor(1e-2),
    "no state": optax.sgd(0.1),
    "stable adam": optax.chain(optaxclip.scale_by_stable_adam(), optax.scale(-0.1)),
    "error_feedback": optax.chain(
        optaxclip.error_feedback(optaxclip.clip_by_value(0.1)), optax.sgd(0.1)
    ),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
    "micro-batches": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
}
each_inner = pytest.mark.parametrize("name", INNER)


def gradients(seed, bad=None):
    rng = np.random.default_rng(seed)
    grads = {
        name: jnp.asarray(rng.standard_normal(p.shape), jnp.float32) for name, p in PARAMS.items()
    }
    return grads if bad is None else {**grads, "b": grads["b"].at[1].set(bad)}


def run_beside_the_plain_one(inner, guarded, bads):
    """The guard's state after gradients of which some are bad: on the others it does what `inner`
    does, which sees no more.
    """
    update, plain = jax.jit(guarded.update), jax.jit(inner.update)
    state, expected = guarded.init(PARAMS), inner.init(PARAMS)
    for i, bad in enumerate(bads):
        before = state.inner
        updates, state = update(gradients(i, bad), state, PARAMS)
        if bad is None:
            want, expected = plain(gradients(i), expected, PARAMS)
            chex.assert_trees_all_close(
                (updates, state.inner), (want, expected), rtol=1e-6, atol=1e-7
            )
        else:
            chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
            chex.assert_trees_all_equal(state.inner, before)
    return state


@each_inner
def test_a_run_with_bad_steps_is_the_run_without_them(name):
    inner = INNER[name]
    bads = [np.nan, None, None, np.inf, -np.inf, None, np.nan, None, None]
    state = run_beside_the_plain_one(inner, skip_nonfinite(inner), bads)
    assert (state.steps, state.skipped_steps, state.consecutive) == (9, 4, 0)


@each_inner
def test_the_state_keeps_its_types_in_a_donated_scan(name):
    guarded = skip_nonfinite(INNER[name])

    def step(state, scale):
        updates, state = guarded.update(
            jax.tree.map(lambda g: g * scale, gradients(0)), state, PARAMS
        )
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
        chex.assert_trees_all_close(
            eager, jax.jit(guarded.update)(gradients(1, bad), state, PARAMS), rtol=1e-6
        )


class Hostile(NamedTuple):
    """A state of what a selection may stumble over."""

    constant: jax.Array  # becomes a constant
    total: jax.Array
    total_again: jax.Array  # the same array as `total` after a step
    this: jax.Array  # these two
    that: jax.Array  # change places
    key: jax.Array
    raw_key: jax.Array
    nested: Any
    nothing: None = None


NESTED = optax.chain(optax.trace(0.9), optax.contrib.reduce_on_plateau(patience=1))


def hostile(effect=lambda total: total):
    """An optimizer with such a state; `effect` is called with the sum of all gradients."""

    def init(params):
        zero, keys = jnp.zeros((), jnp.float32), [jax.random.key(1), jax.random.PRNGKey(1)]
        return Hostile(jnp.array(True), zero, zero, zero + 1, zero + 2, *keys, NESTED.init(params))

    @jax.jit
    def update(updates, state, params=None, *, value, **extra_args):
        total = effect(state.total + sum(jnp.sum(g) for g in jax.tree.leaves(updates)))
        key, part = jax.random.split(state.key)
        raw_key, _ = jax.random.split(state.raw_key)
        updates = jax.tree.map(lambda g: jax.nn.relu(g) + jax.random.normal(part, g.shape), updates)
        updates, nested = NESTED.update(updates, state.nested, params, value=value)
        return updates, Hostile(False, total, total, state.that, state.this, key, raw_key, nested)

    return optax.GradientTransformationExtraArgs(init, update)


def raw(state):
    def data(x):
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return jax.tree.map(data, state)


def test_the_slope_by_a_learning_rate_is_right_over_a_skipped_step_outside_of_jit_too():
    params = {"w": jnp.array([1.0, 0.0])}

    def end(rate, grads):
        optimizer, p = optaxclip.skip_nonfinite(optax.adam(rate)), params
        state = optimizer.init(p)
        for g in grads:
            updates, state = optimizer.update({"w": jnp.array([g, 0.0])}, state, p)
            p = optax.apply_updates(p, updates)
        return p["w"].sum()

    slope = jax.grad(end)(0.1, (1.0, jnp.nan, 2.0))
    np.testing.assert_allclose(slope, jax.grad(end)(0.1, (1.0, 2.0)), rtol=1e-6)


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("guard", [skip_nonfinite, lambda inner: skip_spikes(inner, 100.0)])
def test_whatever_a_state_holds_a_bad_step_leaves_no_trace(guard, nested, jit):
    inner = hostile()
    if not nested:  # its steps stand in the program of the guard
        inner = inner._replace(update=inner.update.__wrapped__)
    guarded = guard(inner)
    update = jax.jit(guarded.update) if jit else guarded.update
    state, want = guarded.init(PARAMS), inner.init(PARAMS)
    for i, bad in enumerate([np.nan, None, np.inf, None]):
        before = state.inner
        updates, state = update(gradients(i, bad), state, PARAMS, value=1.0)
        if bad is None:
            expected, want = jax.jit(inner.update)(gradients(i), want, PARAMS, value=1.0)
            chex.assert_trees_all_close(
                (updates, raw(state.inner)), (expected, raw(want)), rtol=1e-6, atol=1e-6
            )
        else:
            chex.assert_trees_all_equal(
                (updates, raw(state.inner)), (jax.tree.map(jnp.zeros_like, PARAMS), raw(before))
            )
    chex.assert_trees_all_equal_shapes_and_dtypes(state, guarded.init(PARAMS))


def test_side_effects_happen_once_and_see_what_they_would_without_a_guard(capfd):
    seen = []

    def effect(total):
        total = jax.pure_callback(lambda x: np.asarray(x), total, total)
        jax.debug.print("total {}", total)
        io_callback(lambda x: seen.append(float(x)), None, total, ordered=True)
        return total

    inner = hostile(effect)
    guarded = skip_nonfinite(inner._replace(update=inner.update.__wrapped__))
    state, update = guarded.init(PARAMS), jax.jit(guarded.update)
    for bad in None, np.nan:
        _, state = update(gradients(0, bad), state, PARAMS, value=1.0)
    jax.effects_barrier()
    np.testing.assert_array_equal(seen, [state.inner.total, np.nan])
    assert capfd.readouterr().out.count("total") == 2


def test_an_update_is_traced_once_and_may_look_at_what_is_known():
    calls = []

    def update(updates, state, params=None):
        calls.append(None)
        return (updates if state < 3 else jax.tree.map(jnp.negative, updates)), state + 1

    guarded = skip_nonfinite(optax.GradientTransformation(lambda params: np.int32(2), update))
    state = guarded.init(PARAMS)
    updates, _ = jax.jit(lambda grads: guarded.update(grads, state))(gradients(0))
    chex.assert_trees_all_equal(updates, gradients(0))
    for expected in (
        gradients(0),
        jax.tree.map(jnp.negative, gradients(0)),
    ):  # without jit all is known
        updates, state = guarded.update(gradients(0), state)
        chex.assert_trees_all_equal(updates, expected)
    assert len(calls) == 3


def test_what_is_no_array_stays_and_what_is_new_in_a_state_is_zero_after_a_skipped_step():
    def measure(
        updates, state, params=None
    ):  # as `optax.monitor`: the state holds nothing before its first step
        return updates, {"norm": jnp.linalg.norm(updates["w"])}

    guarded = skip_nonfinite(optax.GradientTransformation(lambda params: {"norm": None}, measure))
    for run in guarded.update, jax.jit(guarded.update):
        _, state = run(gradients(0, np.nan), guarded.init(PARAMS))
        assert state.inner == {"norm": 0.0}
        _, after = run(gradients(1), state)
        np.testing.assert_allclose(
            after.inner["norm"], np.linalg.norm(gradients(1)["w"]), rtol=1e-6
        )
        _, state = run(gradients(2, np.nan), after)
        assert state.inner == after.inner

    def count(updates, state, params=None):
        return updates, {
            "name": state["name"],
            "calls": state["calls"] + 1,
            "word": state["word"] + "!",
        }

    guarded = skip_nonfinite(
        optax.GradientTransformation(lambda params: {"name": print, "calls": 0, "word": "a"}, count)
    )
    state = guarded.init(PARAMS)
    for bad in None, np.nan, None:
        _, state = guarded.update(gradients(0, bad), state)
    assert state.inner == {"name": print, "calls": 2, "word": "a!!"}


def test_weak_types_of_a_state_stay():
    inner = optax.GradientTransformation(
        lambda params: jnp.asarray(1.0), lambda u, s, p=None: (u, s * 0.5)
    )
    guarded = skip_nonfinite(inner)
    state = guarded.init(PARAMS)
    assert state.inner.weak_type and jax.jit(guarded.update)(PARAMS, state)[1].inner.weak_type


class Plain:
    """An optimizer that is no GradientTransformation."""

    def init(self, params):
        return ()

    def update(self, updates, state, params=None, *, factor=1.0):
        return jax.tree.map(lambda g: g * factor, updates), state


def test_anything_with_init_and_update_is_guarded():
    steps = optax.MultiSteps(optax.sgd(1.0), 2)
    total, _ = run_micro_batches(skip_nonfinite(steps), [None, np.nan, None])
    want = jax.tree.map(lambda x, y: -(x + y) / 2, gradients(0), gradients(2))
    chex.assert_trees_all_close(total, want, rtol=1e-5, atol=1e-6)
    plateau = optax.MultiSteps(optax.contrib.reduce_on_plateau(), 1)
    guard = skip_spikes(plateau, 100.0, watch="loss")
    _, state = guard.update(PARAMS, guard.init(PARAMS), PARAMS, value=3.0)
    assert state.inner.inner_opt_state.best_value == 3.0  # which it is told
    guard = skip_spikes(Plain(), 100.0, watch="loss")
    updates, _ = guard.update(PARAMS, guard.init(PARAMS), PARAMS, value=3.0, factor=2.0)
    chex.assert_trees_all_equal(updates, jax.tree.map(lambda p: 2.0 * p, PARAMS))
    for no_optimizer in optax.adam, optax.MultiSteps, Plain, optax, None:
        with pytest.raises(
            TypeError, match="inner must be a GradientTransformation, got .*; pass one such as"
        ):
            skip_nonfinite(no_optimizer)


STEPS = jnp.arange(4)
DIFFERENTIATED = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(1e-2),
    "prints": optax.chain(
        optax.stateless(lambda u, p: jax.debug.callback(lambda: None) or u), optax.adam(1e-2)
    ),
    "clip": optax.chain(optaxclip.clip(0.5, optaxclip.scopes.tree()), optax.adamw(1e-2)),
    "learns": optax.chain(optaxclip.zclip(warmup=1), optax.sgd(0.1)),
}


@functools.cache
def slopes(name):
    """Programs of the steps, the bad one and weights: the derivative without a guard, and of each
    guard backward and forward.
    """
    inner = DIFFERENTIATED[name]

    def after(optimizer, steps, bad, weight):
        def step(carry, i):
            params, state = carry
            grads = jax.tree.map(
                lambda p: weight + jnp.sin(3 * p + i) + jnp.where(i == bad, jnp.nan, 0), params
            )
            value = -sum(jnp.sum(jnp.cos(x)) for x in jax.tree.leaves(params))
            updates, state = optimizer.update(grads, state, params, value=value)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (PARAMS, optimizer.init(PARAMS)), steps)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(params))

    def program(derivative, optimizer):
        run = functools.partial(after, optimizer)
        return jax.jit(jax.vmap(derivative(run, argnums=2), (None, None, 0)))

    both = {"norm": thresholds.growth(100.0), "loss": thresholds.zscore(1e4, warmup=1)}
    guards = skip_nonfinite(inner), skip_spikes(inner, both, watch="both")
    return program(jax.grad, inner), [
        program(derivative, guarded) for guarded in guards for derivative in (jax.grad, jax.jacfwd)
    ]


@pytest.mark.parametrize("bad", [0, 2])
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_the_derivative_over_a_skipped_step_is_that_of_a_run_without_it(name, bad):
    bare, guarded = slopes(name)
    weights = jnp.array([0.3, 1.0])
    want = bare(STEPS[STEPS != bad], bad, weights)
    assert np.abs(want).min() > 1e-3
    for slope in guarded:
        np.testing.assert_allclose(slope(STEPS, bad, weights), want, rtol=1e-4)


@pytest.mark.parametrize("jit", [True, False])
def test_no_derivative_enters_a_skipped_step_by_the_state(jit):
    """An optimizer whose state is multiplied by the gradient: the derivative of a skipped step
    would be 0 * NaN.
    """
    inner = optax.GradientTransformation(
        lambda params: jnp.ones(3), lambda u, s, p=None: (u * s, u * s)
    )
    guarded = skip_nonfinite(inner)
    update = jax.jit(guarded.update) if jit else guarded.update

    def after(weight):
        state, total = guarded.init(jnp.ones(3)), 0.0
        for bad in False, True, False:
            updates, state = update(weight + jnp.arange(3.0) + jnp.where(bad, jnp.nan, 0), state)
            total += jnp.sum(updates)
        return total

    want = sum(1 + 2 * (0.5 + i) for i in range(3))
    np.testing.assert_allclose([jax.grad(after)(0.5), jax.jacfwd(after)(0.5)], want, rtol=1e-6)


def test_what_is_looked_at_has_no_derivative():
    guarded = skip_spikes(optax.sgd(1.0), thresholds.growth(2.0))
    state = guarded.init(jnp.ones(2))
    assert not jax.grad(lambda grads: guarded.update(grads, state)[1].watch.size)(jnp.ones(2)).any()


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
        total,
        jax.tree.map(lambda x, y: -(x + y) / 2, gradients(0), gradients(1)),
        rtol=1e-5,
        atol=1e-6,
    )
    assert state.inner_opt_state.skipped_steps == 2 and np.isnan(state.acc_grads["b"]).any()


def test_the_whole_set_of_micro_batches_is_left_out_if_their_mean_is_guarded():
    guarded = skip_nonfinite(optax.sgd(1.0))
    state, done = guarded.init(PARAMS), []
    for bads in [None, np.nan], [None, None]:
        micro = [gradients(i, bad) for i, bad in enumerate(bads)]
        updates, state = guarded.update(
            jax.tree.map(lambda *g: sum(g) / len(g), *micro), state, PARAMS
        )
        done.append(any(u.any() for u in jax.tree.leaves(updates)))
    assert done == [False, True] and state.skipped_steps == 1


@pytest.mark.parametrize("size", [3e38, 1e30, 1e-30, 0.0])
def test_large_finite_gradients_are_not_skipped(size):
    guarded = skip_nonfinite(
        optax.chain(optaxclip.clip(1.0, optaxclip.scopes.tree()), optax.sgd(1.0))
    )
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
    guarded = skip_nonfinite(optaxclip.clip(1.0, optaxclip.scopes.tree()))
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
    for bad, fails in (
        (np.nan, False),
        (np.nan, False),
        (None, False),
        (np.nan, False),
        (np.inf, False),
        (np.nan, True),
    ):
        error, (updates, state) = checked(gradients(0, bad), state)
        if fails:
            with pytest.raises(
                checkify.JaxRuntimeError,
                match="3 steps in a row were not finite; look at what makes",
            ):
                error.throw()
        else:
            error.throw()
    for _ in range(3):
        updates, state = jax.jit(guarded.update)(gradients(0, np.nan), state, PARAMS)
        assert not any(leaf.any() for leaf in jax.tree.leaves(updates))
    assert (state.consecutive, state.skipped_steps) == (6, 8)


def test_skipped_steps_are_in_the_metrics():
    guarded = skip_nonfinite(
        optax.chain(optaxclip.clip(1.0, optaxclip.scopes.tree()), optax.sgd(1.0))
    )
    state = guarded.init(PARAMS)
    for bad in None, np.nan, None:
        _, state = guarded.update(gradients(0, bad), state, PARAMS)
    found = telemetry.metrics(optax.chain(optax.identity(), guarded).init(PARAMS))
    assert found["clip/skipped_steps"] == 0
    found = telemetry.metrics(state)
    assert (found["clip/skipped_steps"], found["clip/steps"], found["clip/nonfinite_steps"]) == (
        1,
        2,
        0,
    )


# skip_spikes: the same, for what is over a threshold.


def by_size(guard, sizes, **extra_args):
    """Of updates of these norms, which steps are done."""
    params, done = {"w": jnp.zeros(2), "b": jnp.zeros(1)}, []
    state = guard.init(params)
    update = jax.jit(guard.update)
    for i, size in enumerate(sizes):
        grads = {"w": jnp.array([0.6 * size, 0.0]), "b": jnp.array([0.8 * size])}
        extra = {name: jnp.asarray(values[i]) for name, values in extra_args.items()}
        updates, state = update(grads, state, params, **extra)
        done.append(bool(updates["b"] != 0))
    return done, state


@each_inner
def test_a_run_with_spikes_is_the_run_without_them(name):
    inner = INNER[name]
    bads = [30.0, None, None, np.inf, 1e30, None, np.nan, None, -40.0]
    state = run_beside_the_plain_one(inner, skip_spikes(inner, 20.0), bads)
    assert (state.steps, state.skipped_steps, state.consecutive) == (9, 5, 1)


def test_the_state_of_skip_spikes_keeps_its_types_in_a_donated_scan():
    guarded = skip_spikes(optax.adam(1e-2), thresholds.zscore(3.0, warmup=2), watch="loss")

    def step(state, loss):
        updates, state = guarded.update(gradients(0), state, PARAMS, value=loss)
        return state, updates["b"].any()

    run = jax.jit(lambda state, losses: jax.lax.scan(step, state, losses), donate_argnums=0)
    losses = jnp.array([1.0, 1.01, 0.99, 5.0, jnp.nan, 1.0], jnp.bfloat16)
    state, done = run(guarded.init(PARAMS), losses)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, guarded.init(PARAMS))
    assert done.tolist() == [True, True, True, False, False, True] and state.skipped_steps == 2


RULES = {  # each knows after 40 sizes near 1 that 8 is a spike
    "number": 4.0,
    "array": jnp.float32(4.0),
    "schedule": optax.constant_schedule(4.0),
    "ema": thresholds.ema(3.0),
    "zscore": thresholds.zscore(4.0),
    "log_zscore": thresholds.log_zscore(4.0),
    "window_zscore": thresholds.window_zscore(4.0, window=32, warmup=16),
    "growth": thresholds.growth(3.0),
    "quantile": thresholds.quantile(0.95, 100),
    "quantile_sketch": thresholds.quantile_sketch(0.95),
    "at_most": thresholds.at_most(thresholds.ema(3.0), 10.0),
    "patient": thresholds.reset_after(thresholds.ema(3.0), 50),
    "relative": thresholds.relative_to_params(4.0, floor=1.0),
}
# rules that take a loss of either sign
SIGNED = {"number", "array", "schedule", "zscore", "window_zscore", "quantile"}


@pytest.mark.parametrize("watch", ["norm", "loss"])
@pytest.mark.parametrize("name", RULES)
def test_with_any_rule_a_spike_is_skipped_and_in_the_end_a_new_level_accepted(name, watch):
    if watch == "loss" and name not in SIGNED:
        return check_that_it_is_refused_for_the_loss(name)
    rng = np.random.default_rng(0)
    sizes = np.exp(0.02 * rng.standard_normal(120)).astype(np.float32)
    sizes[50] = sizes[60] = 8.0
    sizes[70:] *= 8.0
    guard = skip_spikes(optax.sgd(1.0), RULES[name], watch=watch, patience=5)
    seen = (
        {"sizes": sizes} if watch == "norm" else {"sizes": np.ones(120, np.float32), "value": sizes}
    )
    done, state = by_size(guard, **seen)
    assert not (done[50] or done[60] or done[70])
    assert sum(done[20:50]) > 20 and sum(done[51:60]) > 5  # a quantile skips some by its nature
    assert any(done[71:76])
    learns = name not in ("number", "array", "schedule", "relative")
    # every sixth, where nothing is learned
    assert sum(done[90:]) > 24 if learns else sum(done[76:]) == 44 // 6
    assert state.skipped_steps == done.count(False)


def check_that_it_is_refused_for_the_loss(name):
    message = "threshold must take a loss of either sign, got thresholds.*, which needs positive"
    if name == "relative":
        message = 'threshold is relative to the parameters, got it with watch="loss"; pass watch='
    for watch in "loss", "both":
        with pytest.raises(ValueError, match=message.replace('"loss"', f'"{watch}"')):
            skip_spikes(optax.sgd(1.0), RULES[name], watch=watch)
    with pytest.raises(ValueError, match=r"threshold\['loss'\] "):
        skip_spikes(optax.sgd(1.0), {"norm": 1.0, "loss": RULES[name]}, watch="both")


@pytest.mark.parametrize("limit", [0.5, 5.0])
def test_it_never_skips_more_spikes_in_a_row_than_its_patience(limit):
    done, _ = by_size(skip_spikes(optax.sgd(1.0), limit, patience=3), [1.0] * 12)
    assert done == ([False, False, False, True] * 3 if limit < 1 else [True] * 12)


@pytest.mark.parametrize("patience", [2**31 - 2, 2**31 - 1, 2**31, 2**40, 10**30, None])
def test_patience_may_be_any_count_or_without_end(patience):
    done, state = by_size(
        skip_spikes(optax.sgd(1.0), thresholds.growth(1.1), patience=patience),
        [1.0, *[9.0] * 20, 1.0],
    )
    assert done == [True, *[False] * 20, True]
    done, _ = by_size(skip_nonfinite(optax.sgd(1.0), max_consecutive=patience), [1.0, np.nan])
    assert done == [True, False]


def test_counts_end_at_the_largest_integer():
    guard = skip_spikes(optax.sgd(1.0), 1.0, patience=None)
    most = jnp.array(2**31 - 1)
    state = guard.init(jnp.zeros(1))._replace(steps=most, skipped_steps=most, consecutive=most)
    _, state = guard.update(jnp.full(1, 9.0), state)
    assert (state.steps, state.skipped_steps, state.consecutive) == (most, most, most)


def test_what_is_not_finite_is_never_done_however_long_it_lasts_and_leaves_the_patience_alone():
    sizes = [1.0, 9.0, np.nan, np.inf, np.nan, 9.0, np.nan, 9.0, 9.0, *[np.nan] * 9]
    done, state = by_size(skip_spikes(optax.sgd(1.0), 5.0, patience=3), sizes)
    assert [i for i, was in enumerate(done) if was] == [0, 8]
    assert state.consecutive == 9
    for watch, other in ("norm", np.ones(7)), ("both", np.array([1, 1, 1, np.nan, 1, 1, 1])):
        guard = skip_spikes(optax.sgd(1.0), 5.0, watch=watch, patience=3)
        done, _ = by_size(guard, [9.0, np.nan, 9.0, np.nan, 9.0, 9.0, 9.0], value=other)
        assert [i for i, was in enumerate(done) if was] == [5]


def test_a_gradient_that_is_not_finite_is_skipped_whatever_the_loss_and_the_other_way_round():
    guard = skip_spikes(optax.sgd(1.0), 5.0, watch="loss")
    done, _ = by_size(
        guard, [1.0, np.nan, np.inf, 1.0, 1.0, 1.0], loss=[1.0, 1.0, 1.0, np.nan, -np.inf, 9.0]
    )
    assert done == [True, False, False, False, False, False]


# A loss of either sign

MOMENTS = {
    "zscore": thresholds.zscore(4.0),
    "window_zscore": thresholds.window_zscore(4.0, window=32, warmup=16),
    "reset_after": thresholds.reset_after(thresholds.zscore(4.0), 50),
    "ignore_outliers": thresholds.ignore_outliers(thresholds.zscore(4.0)),
    "at_most": thresholds.at_most(thresholds.zscore(4.0), jnp.inf),
    "join": thresholds.join([jnp.inf, thresholds.zscore(4.0)], boundaries=[30]),
    "with_fallback": thresholds.with_fallback(thresholds.zscore(4.0), jnp.inf),
}


@pytest.mark.parametrize("level", [-3000.0, -1.0, 0.0, 1.0])
@pytest.mark.parametrize("scale", [1e-20, 0.01, 1e20])
@pytest.mark.parametrize("name", MOMENTS)
def test_a_spike_of_a_loss_of_any_sign_is_skipped_and_in_the_end_a_new_level_accepted(
    name, scale, level
):
    noise = np.random.default_rng(0).standard_normal(120)
    noise[50] = noise[60] = 30.0
    noise[80:] += 300.0
    losses = np.float32(scale * (noise + level))
    if level == -3000.0:  # its deviation is a thousandth of it, at least
        losses[[50, 60]] += np.float32(20 * scale)
    guard = skip_spikes(optax.sgd(1.0), MOMENTS[name], watch="loss", patience=5)
    done, state = by_size(guard, np.ones(120, np.float32), value=losses)
    assert [k for k, was in enumerate(done) if not was] == [50, 60, 80, 81, 82, 83, 84]
    assert np.isfinite(jax.tree.leaves(state.watch.size)).all()


@pytest.mark.parametrize("name", MOMENTS)
def test_a_loss_that_is_exactly_zero_is_an_observation(name):
    losses = np.zeros(60, np.float32)
    losses[1::2], losses[50] = 0.1, 5.0
    done, _ = by_size(
        skip_spikes(optax.sgd(1.0), MOMENTS[name], watch="loss"), np.ones(60), value=losses
    )
    assert [k for k, was in enumerate(done) if not was] == [50]
    losses[:] = 0.0  # all of them: what rises above it is a spike
    losses[50] = 1e-6
    done, _ = by_size(
        skip_spikes(optax.sgd(1.0), MOMENTS[name], watch="loss"), np.ones(60), value=losses
    )
    assert [k for k, was in enumerate(done) if not was] == [50]


def test_a_run_of_zeros_does_not_make_an_outlier_of_what_follows():
    last = optaxclip.Threshold(jnp.zeros_like, lambda *_: jnp.inf, lambda x, *_: x, signed=True)
    rule = thresholds.ignore_outliers(last)
    state = rule.init(jnp.zeros(1))
    for size in 1.0, *[0.0] * 60, -1.5:
        size = jnp.array([size])
        state = rule.learn(size, size, state, None)
    assert rule.signed and state[0] == -1.5


def test_a_quantile_of_losses_may_be_negative():
    losses = -10.0 + np.float32(np.random.default_rng(1).standard_normal(80))
    losses[60] = -1.0
    guard = skip_spikes(optax.sgd(1.0), thresholds.quantile(0.95, 100, lagged=False), watch="loss")
    done, state = by_size(guard, np.ones(80), value=losses)
    assert not done[60] and sum(done) > 65 and state.watch.limit < -7


def test_the_fixed_limit_of_a_loss_may_be_negative():
    for threshold in -5.0, np.float32(-5), lambda step: -5.0:
        guard = skip_spikes(optax.sgd(1.0), threshold, watch="loss")
        assert by_size(guard, [1.0] * 3, value=[-9.0, -4.0, -5.0])[0] == [True, False, True]
    guard = skip_spikes(optax.sgd(1.0), {"norm": 2.0, "loss": -5.0}, watch="both")
    done, _ = by_size(guard, [1.0, 1.0, 3.0], value=[-9.0, -4.0, -9.0])
    assert done == [True, False, False]
    for watch, threshold, name in (
        ("norm", -5.0, "threshold"),
        ("both", -5.0, "threshold"),
        ("both", {"norm": -5.0, "loss": 1.0}, r"threshold\['norm'\]"),
    ):
        with pytest.raises(ValueError, match=rf"{name} must be in \[0, inf\], got -5.0; pass a"):
            skip_spikes(optax.sgd(1.0), threshold, watch=watch)


def test_a_rule_of_your_own_says_that_it_takes_either_sign():
    rule = optaxclip.Threshold(
        init=lambda sizes: sizes,
        limit=lambda sizes, last, context: last + 1.0,
        learn=lambda sizes, clipped_sizes, last, context: clipped_sizes,
    )
    with pytest.raises(
        ValueError, match=r"got Threshold\(\), which needs .*set signed=True if a r"
    ):
        skip_spikes(optax.sgd(1.0), rule, watch="loss")
    guard = skip_spikes(optax.sgd(1.0), rule._replace(signed=True), watch="loss")
    done, _ = by_size(guard, [1.0] * 4, value=[-3.0, 0.0, -2.5, -1.0])
    assert done == [True, False, True, False]


def test_a_rule_sees_the_extra_arguments_of_the_update():
    rule = thresholds.zscore()._replace(
        limit=lambda sizes, state, context: 2.0 * context.extra["value"]
    )
    done, _ = by_size(skip_spikes(optax.sgd(1.0), rule), [1.0, 5.0], value=[1.0, 2.0])
    assert done == [True, False]


@pytest.mark.parametrize(
    "rule",
    [
        thresholds.ranked(2),
        thresholds.by_global_norm(1.0),
        thresholds.times(3.0, thresholds.quantile(0.5, 9)),
    ],
)
def test_a_rule_that_multiplies_or_compares_the_sizes_of_a_step_is_refused_for_a_loss(rule):
    with pytest.raises(ValueError, match="threshold must take a loss of either sign, got"):
        skip_spikes(optax.sgd(1.0), rule, watch="loss")


# Both: the norm and the loss


def test_of_both_a_spike_of_either_is_skipped():
    guard = skip_spikes(optax.sgd(1.0), {"norm": 3.0, "loss": 4.0}, watch="both", patience=None)
    sizes = [1.0, 3.5, 1.0, 3.5, np.nan, 1.0, 1.0, 1.0]
    losses = [4.0, 1.0, 4.5, 4.5, 1.0, np.nan, -9.0, -np.inf]
    done, state = by_size(guard, sizes, value=losses)
    assert done == [True, False, False, False, False, False, True, False]
    assert state.watch.limit == {"norm": 3.0, "loss": 4.0} and state.watch.size["norm"] == 1.0
    assert state.skipped_steps == 6 and state.consecutive == 1
    done, _ = by_size(
        skip_spikes(optax.sgd(1.0), 3.0, watch="both"), [1, 1, 4, 2], loss=[1, 4, 1, 2]
    )
    assert done == [True, False, False, True]


@pytest.mark.parametrize("kind", ["one rule", "a dict"])
def test_olmo_skips_six_deviations_of_the_loss_or_of_the_norm(kind):
    rng = np.random.default_rng(3)
    norms, losses = np.float32(1 + 0.1 * rng.random(300)), np.float32(-2 + 0.1 * rng.random(300))
    norms[[90, 280]], losses[[90, 150]], losses[20], norms[285] = 9.0, 3.0, 0.5, 1.12
    rule = thresholds.window_zscore(6.0, window=128, warmup=64)
    threshold = rule if kind == "one rule" else {"norm": rule, "loss": rule}
    guard = skip_spikes(optax.sgd(1.0), threshold, watch="both", patience=None)
    done, _ = by_size(guard, norms, value=losses)
    kept = {"norm": [], "loss": []}  # as here, a spike is remembered as its limit
    for k, (norm, loss) in enumerate(zip(norms, losses, strict=True)):
        fine = True
        for size, past in (norm, kept["norm"]), (loss, kept["loss"]):
            last = np.float64(past[-128:])
            limit = last.mean() + 6 * last.std() if len(last) >= 64 else np.inf
            fine &= bool(size <= limit)
            past.append(min(size, limit))
        assert done[k] == fine, k
    assert [k for k, was in enumerate(done) if not was] == [90, 150, 280]


def test_megatron_skips_what_is_over_a_fixed_norm_for_ever():
    guard = skip_spikes(optax.sgd(1.0), 5.0, patience=None)
    done, state = by_size(guard, [1.0, *[9.0] * 40, 5.0])
    assert done == [True, *[False] * 40, True] and state.consecutive == 0


def test_of_both_no_more_spikes_in_a_row_are_skipped_than_the_patience():
    guard = skip_spikes(optax.sgd(1.0), {"norm": 2.0, "loss": 2.0}, watch="both", patience=3)
    spikes = np.array([9.0, 9.0, 1.0, 1.0, 1.0, 9.0, 9.0, 9.0, 1.0, 9.0])
    others = np.array([1.0, 1.0, 9.0, 9.0, 1.0, 1.0, 1.0, 9.0, 9.0, 9.0])
    done, _ = by_size(guard, spikes, value=others)
    assert [k for k, was in enumerate(done) if was] == [3, 4, 8]
    # the one that was over its limit restarts from there, and the other goes on
    guard = skip_spikes(optax.sgd(1.0), MOMENTS["zscore"], watch="both", patience=3)
    steady = np.float32(1 + 0.01 * np.random.default_rng(0).standard_normal(80))
    done, state = by_size(guard, steady, value=np.where(np.arange(80) < 60, steady, 9 * steady))
    assert [k for k, was in enumerate(done) if not was] == [60, 61, 62]
    for name, level, seen in ("norm", 1.0, 80), ("loss", 9.0, 80 - 63):
        moments, usual, _ = state.watch.rule[name]
        np.testing.assert_allclose(usual, [level], rtol=0.1)
        assert moments.seen == seen


@each_inner
def test_with_both_watched_a_run_with_spikes_is_the_run_without_them(name):
    inner = INNER[name]
    guard = skip_spikes(inner, {"norm": 20.0, "loss": thresholds.zscore(3.0)}, watch="both")
    told = guard._replace(update=functools.partial(guard.update, value=jnp.float32(-1.0)))
    state = run_beside_the_plain_one(inner, told, [30.0, None, np.inf, None, np.nan, None, -40.0])
    assert (state.steps, state.skipped_steps, state.consecutive) == (7, 4, 1)


def test_the_state_of_both_keeps_its_types_in_a_donated_scan_over_seeds():
    rule = thresholds.window_zscore(3.0, window=8, warmup=2)
    guarded = skip_spikes(optax.adam(1e-2), {"norm": 1e3, "loss": rule}, watch="both")

    def step(state, loss):
        updates, state = guarded.update(gradients(0), state, PARAMS, value=loss)
        return state, updates["b"].any()

    run = jax.jit(
        jax.vmap(lambda state, losses: jax.lax.scan(step, state, losses)), donate_argnums=0
    )
    losses = jnp.array([[-1.0, -1.01, -1.0, 5.0, jnp.nan, -1.0], [0.0] * 6], jnp.bfloat16)
    start = jax.vmap(lambda _: guarded.init(PARAMS))(losses)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), start)
    start = jax.tree.map(lambda x: x.copy(), start)
    state, done = run(start, losses)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert done[0].tolist() == [True, True, True, False, False, True] and done[1].all()


def test_what_was_watched_of_both_is_in_the_metrics():
    guard = skip_spikes(optax.sgd(1.0), {"norm": 3.0, "loss": -1.0}, watch="both")
    _, state = by_size(guard, [2.0], value=[-4.0])
    found = {key: float(value) for key, value in telemetry.metrics(state).items()}
    assert found["clip/watched/norm"] == 2 and found["clip/watched_limit/norm"] == 3
    assert found["clip/watched/loss"] == -4 and found["clip/watched_limit/loss"] == -1
    before = telemetry.metrics(guard.init(PARAMS))
    assert set(before) == set(found) and np.isnan(before["clip/watched/loss"])


# Leaves that are not looked at


GUARDS = {
    "skip_nonfinite": lambda inner, **o: skip_nonfinite(inner, **o),
    "norm": lambda inner, **o: skip_spikes(inner, 10.0, **o),
    "loss": lambda inner, **o: skip_spikes(inner, 10.0, watch="loss", **o),
    "both": lambda inner, **o: skip_spikes(inner, thresholds.zscore(), watch="both", **o),
}


@pytest.mark.parametrize("name", GUARDS)
def test_what_where_refuses_skips_nothing_and_is_passed_on(name):
    guard = GUARDS[name](optax.sgd(1.0), where=lambda path: not path.startswith("b"))
    update = jax.jit(guard.update)
    for bad in np.nan, np.inf, 1e30:
        updates, state = update(gradients(0, bad), guard.init(PARAMS), PARAMS, value=1.0)
        assert state.skipped_steps == 0 and not np.isfinite(updates["b"][1]) or bad == 1e30
        chex.assert_trees_all_equal(updates, jax.tree.map(jnp.negative, gradients(0, bad)))
        swapped = {"w": gradients(0)["w"].at[0, 0].set(np.nan), "b": gradients(0)["b"]}
        _, state = update(swapped, state, PARAMS, value=1.0)
        assert state.skipped_steps == 1
    guard = GUARDS[name](optax.sgd(1.0), where=lambda path: False)
    _, state = guard.update(gradients(0, np.nan), guard.init(PARAMS), PARAMS, value=1.0)
    assert state.skipped_steps == 0
    with pytest.raises(TypeError, match="where must be a function, got 'w'; pass one such as"):
        GUARDS[name](optax.sgd(1.0), where="w")


def test_a_limit_relative_to_the_parameters_is_of_those_that_are_looked_at():
    rule = {"norm": thresholds.relative_to_params(2.0), "loss": jnp.inf}
    guard = skip_spikes(optax.sgd(1.0), rule, watch="both", where=lambda path: path == "w")
    _, state = guard.update(PARAMS, guard.init(PARAMS), PARAMS, value=-3.0)
    np.testing.assert_allclose(state.watch.limit["norm"], 2 * np.sqrt(12), rtol=1e-6)
    np.testing.assert_allclose(state.watch.size["norm"], np.sqrt(12), rtol=1e-6)


def test_the_schedule_of_a_threshold_counts_the_steps_that_were_done():
    guard = skip_spikes(optax.sgd(1.0), lambda step: jnp.where(step < 2, 10.0, 2.0), patience=100)
    done, _ = by_size(guard, [1.0, 20.0, 20.0, 5.0, 5.0, 1.0])
    assert done == [True, False, False, True, False, True]


def test_a_share_of_the_parameters_is_measured_as_the_gradients_are():
    guard = skip_spikes(optax.sgd(1.0), thresholds.relative_to_params(2.0))
    params = {"w": jnp.array([3.0, 0.0]), "b": jnp.array([4.0]), "n": jnp.array(7)}
    for size, done in (9.9, True), (10.1, False):
        grads = {"w": jnp.array([0.0, 0.6 * size]), "b": jnp.array([0.8 * size]), "n": jnp.array(0)}
        updates, state = guard.update(grads, guard.init(params), params)
        assert bool(updates["b"]) == done
        np.testing.assert_allclose(state.watch.limit, 10.0, rtol=1e-6)
    with pytest.raises(
        ValueError,
        match=r"relative to the parameters, got params=None; call update\(updates, state, params\)",
    ):
        guard.update(params, guard.init(params))


def test_the_loss_is_passed_on_by_either_name():
    seen = []

    def update(updates, state, params=None, **extra_args):
        seen.append(extra_args)
        return updates, state

    guard = skip_spikes(
        optax.GradientTransformationExtraArgs(lambda params: (), update), 5.0, watch="loss"
    )
    state = guard.init(PARAMS)
    guard.update(PARAMS, state, PARAMS, value=1.0)
    guard.update(PARAMS, state, PARAMS, loss=1.0, other=2)
    assert seen == [{"value": 1.0}, {"loss": 1.0, "other": 2}]
    plateau = optax.chain(optax.sgd(1.0), optax.contrib.reduce_on_plateau(patience=1))
    guard = skip_spikes(plateau, 5.0, watch="loss")
    state = jax.eval_shape(
        lambda: guard.update(PARAMS, guard.init(PARAMS), PARAMS, value=jnp.float32(1.0))[1]
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(state, guard.init(PARAMS))


def test_guards_in_guards_and_what_they_looked_at_are_in_the_metrics():
    inner = optax.chain(optaxclip.clip(1.0, optaxclip.scopes.tree()), optax.sgd(1.0))
    guard = skip_nonfinite(skip_spikes(skip_spikes(inner, 5.0), 3.0, watch="loss"))
    done, state = by_size(guard, [1.0, np.nan, 1.0, 4.0, 9.0], value=[2.0, 1.0, 8.0, 2.5, 2.0])
    assert done == [True, False, False, True, False]
    found = {
        name: float(value)
        for name, value in telemetry.metrics(optax.chain(guard).init(PARAMS)).items()
    }
    assert (
        found["clip/skipped_steps"] == 0
        and np.isnan([found["clip/watched_0"], found["clip/watched_limit_1"]]).all()
    )
    found = {name: float(value) for name, value in telemetry.metrics(state).items()}
    assert found["clip/skipped_steps"] == 3 and found["clip/steps"] == 2
    watched = [found[f"clip/watched{name}"] for name in ("_0", "_limit_0", "_1", "_limit_1")]
    np.testing.assert_allclose(watched, [2.0, 3.0, 9.0, 5.0], rtol=1e-6)
    _, state = by_size(skip_spikes(inner, 5.0), [1.0, 9.0])
    found = telemetry.metrics(state)
    assert (found["clip/watched"], found["clip/watched_limit"], found["clip/skipped_steps"]) == (
        9.0,
        5.0,
        1,
    )


def test_seeds_skip_each_for_itself():
    guard = skip_spikes(optax.sgd(1.0), thresholds.growth(2.0))
    params = jnp.zeros((3, 2))
    state = jax.vmap(guard.init)(params)
    for sizes in [1.0, 1.0, 1.0], [1.0, 3.0, np.nan]:
        grads = jnp.array(sizes)[:, None] * jnp.array([[0.6, 0.8]])
        updates, state = jax.vmap(guard.update)(grads, state, params)
    assert updates.any(axis=1).tolist() == [True, False, False]
    assert telemetry.metrics(state)["clip/skipped_steps"].tolist() == [0, 1, 1]


def test_what_skip_spikes_refuses():
    sgd = optax.sgd(1.0)
    with pytest.raises(TypeError, match="inner must be a GradientTransformation, got 1.0"):
        skip_spikes(1.0, 1.0)
    with pytest.raises(TypeError, match="threshold must be"):
        skip_spikes(sgd, "1.0")
    with pytest.raises(ValueError, match="threshold must be .*, got -1.0"):
        skip_spikes(sgd, -1.0)
    with pytest.raises(
        ValueError,
        match="watch must be one of 'norm', 'loss', 'both', got 'gradient'; choose one of these",
    ):
        skip_spikes(sgd, 1.0, watch="gradient")
    for watch in "norm", "loss":
        with pytest.raises(
            ValueError, match=f'threshold is a dict, got it with watch="{watch}"; pass watch="both"'
        ):
            skip_spikes(sgd, {"norm": 1.0, "loss": 1.0}, watch=watch)
    for keys in {"norm": 1.0}, {"norm": 1.0, "loss": 1.0, "value": 1.0}, {}:
        with pytest.raises(
            ValueError,
            match=r"threshold must have the keys 'norm' and 'loss', got \[.*\]; pass a",
        ):
            skip_spikes(sgd, keys, watch="both")
    with pytest.raises(TypeError, match=r"threshold\['loss'\] must be a real number, got 'one'"):
        skip_spikes(sgd, {"norm": 1.0, "loss": "one"}, watch="both")
    with pytest.raises(ValueError, match='watch="both" needs the loss, got none; call update'):
        guard = skip_spikes(sgd, 1.0, watch="both")
        guard.update(PARAMS, guard.init(PARAMS), PARAMS)
    with pytest.raises(TypeError, match="patience must be an integer, got 2.5"):
        skip_spikes(sgd, 1.0, patience=2.5)
    with pytest.raises(ValueError, match="patience must be at least 1, got 0; pass a larger count"):
        skip_spikes(sgd, 1.0, patience=0)
    guard = skip_spikes(sgd, 1.0, watch="loss")
    with pytest.raises(
        ValueError,
        match=(
            r'watch="loss" needs the loss, got none; call update\(updates, state, '
            r"params, value=loss\)"
        ),
    ):
        guard.update(PARAMS, guard.init(PARAMS), PARAMS)
    with pytest.raises(
        ValueError,
        match=r"value must be one number, got an array of shape \(3,\); pass the mean of the loss",
    ):
        guard.update(PARAMS, guard.init(PARAMS), PARAMS, value=jnp.ones(3))


def test_what_it_refuses():
    with pytest.raises(
        TypeError,
        match=(
            "inner must be a GradientTransformation, got 1.0; pass one such "
            r"as optax.adam\(1e-3\)"
        ),
    ):
        skip_nonfinite(1.0)
    with pytest.raises(TypeError, match="max_consecutive must be an integer, got 2.5"):
        skip_nonfinite(optax.sgd(1.0), max_consecutive=2.5)
    with pytest.raises(
        ValueError, match="max_consecutive must be at least 1, got 0; pass a larger count"
    ):
        skip_nonfinite(optax.sgd(1.0), max_consecutive=0)


def test_the_compiled_step_copies_no_moments():
    def copies(optimizer):
        def step(params, state, grads):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        params = {"w": jnp.ones((64, 64))}
        run = jax.jit(step, donate_argnums=(0, 1))
        program = optimized(run.lower(params, optimizer.init(params), params))
        return program.as_text().count("f32[64,64]{1,0} copy(")

    def plainly(inner):
        def update(updates, state, params=None):
            ok = jnp.isfinite(jnp.sum(jnp.abs(updates["w"])))
            new, inner_state = inner.update(updates, state, params)
            return jax.tree.map(lambda x: jnp.where(ok, x, 0), new), jax.tree.map(
                lambda x, y: jnp.where(ok, x, y), inner_state, state
            )

        return optax.GradientTransformation(inner.init, update)

    assert copies(skip_nonfinite(optax.adam(1e-3))) == copies(optax.adam(1e-3)) == 0
    assert copies(skip_spikes(optax.adam(1e-3), thresholds.zscore(3.0))) == 0
    assert copies(plainly(optax.adam(1e-3))) > 0  # the obvious form does


def test_where_jax_moved_what_the_walk_looks_at_the_plain_selection_is_made(monkeypatch):
    guarded = skip_nonfinite(optax.adam(0.1))
    state = guarded.init(PARAMS)
    expected = jax.jit(guarded.update)(gradients(0), state, PARAMS)
    calls = []

    def moved(*args):
        calls.append(args)
        raise AttributeError("get_bind_params")

    monkeypatch.setattr(_programs, "bind", moved)
    updates, after = jax.jit(lambda grads: guarded.update(grads, state, PARAMS))(gradients(0))
    chex.assert_trees_all_close((updates, after), expected, rtol=1e-6)
    updates, after = jax.jit(lambda grads: guarded.update(grads, state, PARAMS))(
        gradients(0, np.nan)
    )
    chex.assert_trees_all_equal(
        (updates, after.inner), (jax.tree.map(jnp.zeros_like, PARAMS), state.inner)
    )
    assert len(calls) == 2
