"""`keep_params` and `max_norm`: the weights after a step, limited by any clip."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx
from flax.training.train_state import TrainState
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip
from optaxclip import keep_params, max_norm, norms, responses, scopes, telemetry, thresholds

SHAPES = {"bias": (3,), "conv": (1, 2, 2, 3), "dense": (4, 3), "scale": ()}
# How far above its limit a size may be, by the dtype of the parameters.
EXCESS = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 8e-3}
DTYPES = [jnp.float32, jnp.float16, jnp.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
WAYS = {"eager": lambda function: function, "jit": jax.jit}


def normal_tree(seed, scale=1.0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {
        name: (scale * jax.random.normal(key, SHAPES[name])).astype(dtype)
        for name, key in zip(SHAPES, keys, strict=True)
    }


def step(transform, updates, params, state=None, **extra):
    state = transform.init(params) if state is None else state
    return transform.update(updates, state, params, **extra)


def after(transform, updates, params, **extra):
    return optax.apply_updates(params, step(transform, updates, params, **extra)[0])


CLIPS = {
    "value": optaxclip.clip_by_value(1.0),
    "box": optaxclip.clip_by_value(-0.5, 1.5),
    "box above 0": optaxclip.clip_by_value(0.25, 1.5),
    "box below 0": optaxclip.clip_by_value(-1.5, -0.25),
    "leaf": optaxclip.clip_by_norm(1.0),
    "tree": optaxclip.clip_by_global_norm(2.0),
    "unit": optaxclip.clip(1.0, scopes.unit()),
    "l1": optaxclip.clip(1.0, scopes.leaf(), norm=norms.l1()),
    "drop": optaxclip.clip_by_norm(1.0, response=responses.drop),
    "normalize": optaxclip.clip_by_norm(1.0, response=responses.normalize),
    "spectral": optaxclip.spectral_clip(1.0),
    "rule": optaxclip.growth_clip(1.01),
    "chain": optax.chain(optaxclip.clip_by_value(0.7), optaxclip.clip_by_global_norm(2.0)),
    "masked": optax.masked(optaxclip.clip_by_norm(1.0), {name: name != "bias" for name in SHAPES}),
    "optax": optax.clip_by_global_norm(1.0),
}
each_clip = pytest.mark.parametrize("name", CLIPS)
# Without a box beyond zero: such a clip can't be called outside of `keep_params`.
PLAIN = [name for name in CLIPS if "0" not in name]


# The law: u' = clip(p + u) - p, and the same bits where the clip changes nothing.


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("way", WAYS)
def test_the_step_ends_at_the_clipped_weights(name, way):
    params, updates = normal_tree(1), normal_tree(2)
    moved = optax.apply_updates(params, updates)
    clipped, wanted_state = step(CLIPS[name], moved, params)
    out, state = WAYS[way](functools.partial(step, keep_params(CLIPS[name])))(updates, params)
    chex.assert_trees_all_close(jax.tree.map(jnp.add, params, out), clipped, rtol=1e-6, atol=3e-7)
    chex.assert_trees_all_close(state, wanted_state, rtol=1e-6)
    for key, update in updates.items():
        same = np.asarray(clipped[key] == moved[key])
        np.testing.assert_array_equal(np.asarray(out[key])[same], np.asarray(update)[same])


@pytest.mark.parametrize("name", sorted(set(CLIPS) - {"normalize"}))
@each_dtype
def test_weights_within_the_limit_take_the_same_step_to_the_bit(name, dtype):
    inside = {"box above 0": 0.5, "box below 0": -0.5}.get(name, 0.05)
    params = jax.tree.map(lambda x: jnp.full_like(x, inside, dtype), normal_tree(1))
    updates = normal_tree(2, 1e-2)
    for way in WAYS.values():
        out, _ = way(functools.partial(step, keep_params(CLIPS[name])))(updates, params)
        chex.assert_trees_all_equal(out, updates)


# What others call it.

KERNEL = {"w": np.float32(2 * np.random.default_rng(0).normal(size=(5, 4)))}
MOVE = {"w": np.float32(np.random.default_rng(1).normal(size=(5, 4)))}


def partly(size, limit, rate=0.25):
    return rate * jnp.clip(size, 0.5 * limit, limit) + (1 - rate) * size


def by_unit(limit, **options):
    return keep_params(optaxclip.clip(limit, scopes.unit(0), **options))


OTHERS = {
    "keras MaxNorm": (max_norm(), reference.keras_max_norm),
    "keras MaxNorm, axes": (max_norm(1.5, axes=0), lambda w: reference.keras_max_norm(w, 1.5)),
    "keras NonNeg": (
        keep_params(optaxclip.clip_by_value(0.0, jnp.inf)),
        lambda w: w * (w >= 0),
    ),
    "keras UnitNorm": (by_unit(1.0, response=responses.normalize), reference.keras_unit_norm),
    "keras MinMaxNorm": (
        by_unit(2.0, response=functools.partial(responses.band, low=0.5)),
        lambda w: reference.keras_min_max_norm(w, 1.0, 2.0),
    ),
    "keras MinMaxNorm, rate": (
        by_unit(2.0, response=responses.from_target(partly)),
        lambda w: reference.keras_min_max_norm(w, 1.0, 2.0, rate=0.25),
    ),
    "h2o max_w2": (max_norm(3.0**0.5), lambda w: reference.h2o_max_w2(w, 3.0)),
    "wgan": (keep_params(optaxclip.clip_by_value(0.01)), lambda w: np.clip(w, -0.01, 0.01)),
    "box above 0": (
        keep_params(optaxclip.clip_by_value(0.25, 1.5)),
        lambda w: np.clip(w, 0.25, 1.5),
    ),
    "lipschitz": (
        keep_params(optaxclip.spectral_clip(1.0)),
        lambda w: (lambda u, s, v: u @ np.diag(np.minimum(s, 1)) @ v)(
            *np.linalg.svd(w, full_matrices=False)
        ),
    ),
    "adamh": (
        keep_params(
            optaxclip.clip(
                thresholds.relative_to_params(1.0, floor=0.0),
                scopes.leaf(),
                response=responses.normalize,
            )
        ),
        lambda w: w * np.linalg.norm(np.float64(KERNEL["w"])) / np.linalg.norm(w),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_it_is_what_others_call_it(name):
    transform, project = OTHERS[name]
    wanted = reference.kept_by_projection(KERNEL, MOVE, lambda moved: {"w": project(moved["w"])})
    out, _ = step(transform, MOVE, KERNEL)
    # the constraints of Keras divide by the norm and 1e-7
    np.testing.assert_allclose(out["w"], wanted["w"], rtol=2e-6, atol=1e-6)


def test_nonnegative_weights_are_those_of_optax():
    params = {"w": jnp.abs(KERNEL["w"])}
    wanted, _ = step(optax.keep_params_nonnegative(), MOVE, params)
    out, _ = step(keep_params(optaxclip.clip_by_value(0.0, jnp.inf)), MOVE, params)
    chex.assert_trees_all_equal(out, wanted)
    assert (optax.apply_updates(params, out)["w"] >= 0).all()


def test_the_bias_is_left_out_where_the_scope_says_so():
    params = {"kernel": jnp.full((4, 2), 3.0), "bias": jnp.full(2, 9.0)}
    updates = jax.tree.map(jnp.ones_like, params)
    no_bias = scopes.unit(where=lambda path: "bias" not in path)
    kept = after(max_norm(2.0, scope=no_bias), updates, params)
    np.testing.assert_allclose(kept["kernel"], np.full((4, 2), 1.0), rtol=1e-6)
    np.testing.assert_array_equal(kept["bias"], [10.0, 10.0])
    np.testing.assert_allclose(
        np.linalg.norm(after(max_norm(2.0), updates, params)["bias"]), 2.0, rtol=1e-6
    )


def test_an_injected_limit_may_be_a_schedule():
    keep = optax.inject_hyperparams(max_norm)(limit=lambda count: 4.0 / (1 + count))
    state = keep.init(KERNEL)
    for limit in 4.0, 2.0:
        out, state = jax.jit(keep.update)(MOVE, state, KERNEL)
        np.testing.assert_allclose(out["w"], step(max_norm(limit), MOVE, KERNEL)[0]["w"], rtol=1e-6)


# The post-condition: within the limit, whatever the precision and however far the weights were.

POST = {
    "unit": (optaxclip.clip(2.0, scopes.unit(0)), lambda w: np.linalg.norm(w, axis=0).max(), 2.0),
    "leaf": (optaxclip.clip_by_norm(3.0), np.linalg.norm, 3.0),
    "l1": (
        optaxclip.clip(3.0, scopes.leaf(), norm=norms.l1()),
        lambda w: np.abs(w).sum(),
        3.0,
    ),
    "value": (optaxclip.clip_by_value(0.01), lambda w: np.abs(w).max(), 0.01),
    "box": (optaxclip.clip_by_value(-2.0, 0.3), lambda w: w.max(), 0.3),
}


@pytest.mark.parametrize("name", POST)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("narrow", [False, True], ids=["float32 updates", "narrow updates"])
@each_dtype
@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31 - 1), far=st.floats(-2, 2), push=st.floats(-2, 2))
def test_the_weights_end_within_the_limit(name, way, narrow, dtype, seed, far, push):
    clip, size, limit = POST[name]
    random = np.random.default_rng(seed)
    params = jnp.asarray(10.0**far * random.normal(size=(6, 5)), dtype)
    updates = jnp.asarray(10.0**push * random.normal(size=(6, 5)), dtype if narrow else jnp.float32)
    kept = _programs(name, way)(updates, params)
    assert kept.dtype == dtype
    excess = EXCESS[jnp.dtype(dtype).name]
    tiny = 6e-8 if dtype == jnp.float16 else 1e-30
    assert size(np.asarray(kept, float)) <= limit * (1 + excess) + tiny


@functools.cache
def _programs(name, way):
    return WAYS[way](functools.partial(after, keep_params(POST[name][0])))


def test_weights_far_outside_end_inside_of_a_box_beyond_zero():
    keep = keep_params(optaxclip.clip_by_value(0.01, 0.015625))
    for dtype in DTYPES:
        params = jnp.asarray([3.0, -3.0, 700.0, -0.3], dtype)
        for _ in range(3):  # what is rounded in one step is exact in the next
            params = after(keep, jnp.full(4, 0.1, dtype), params)
        kept = np.asarray(params, float)
        bounds = np.asarray(jnp.asarray([0.01, 0.015625], dtype), float)
        np.testing.assert_array_equal(kept, np.clip(kept, *bounds))


# Boxes.


@pytest.mark.parametrize("low, high", [(0.25, 1.5), (-1.5, -0.25), (0.0, 1.0), (0.3, 0.3)])
def test_a_box_need_not_hold_zero(low, high):
    params, updates = normal_tree(1, 2.0), normal_tree(2, 2.0)
    keep = keep_params(optaxclip.clip_by_value(low, high))
    for way in WAYS.values():
        kept = way(functools.partial(after, keep))(updates, params)
        for key, moved in optax.apply_updates(params, updates).items():
            wanted = np.clip(moved, np.float32(low), np.float32(high))
            np.testing.assert_allclose(kept[key], wanted, rtol=0, atol=5e-7)


def test_the_reading_of_a_box_beyond_zero_is_the_distance():
    keep = keep_params(optaxclip.clip_by_value(0.5, 2.0))
    params = jnp.array([1.0, 0.25, 3.0])
    _, state = step(keep, jnp.zeros(3), params)
    above, below = telemetry.readings(state)
    assert above.size_before == 3 and above.limit == 2 and above.size_after == 2
    assert below.size_before == 0.25 and below.limit == 0 and below.size_after == 0
    assert above.clipped_steps == below.clipped_steps == 1


BEYOND = {
    "low": (lambda: optaxclip.clip_by_value(0.1, 1.0), r"low must be in \[-inf, 0\], got 0.1; "),
    "by name": (lambda: optaxclip.clip_by_value(low=0.1, high=1.0), "low must be in "),
    "high": (lambda: optaxclip.clip_by_value(-1, -0.1), r"high must be in \[0, inf\], got -0.1; "),
}


@pytest.mark.parametrize("name", BEYOND)
def test_gradients_are_not_put_in_a_box_without_zero(name):
    make, words = BEYOND[name]
    message = f"^{words}.*keep_params"
    clip = make()
    for alone in clip, optax.chain(clip, optax.sgd(0.1)):
        with pytest.raises(ValueError, match=message):
            alone.init(jnp.ones(3))
    state = keep_params(clip).init(jnp.ones(3))
    with pytest.raises(ValueError, match=message):
        clip.update(jnp.ones(3), state, jnp.ones(3))
    step(keep_params(clip), jnp.ones(3), jnp.ones(3))
    with pytest.raises(ValueError, match=message):  # and again afterwards
        clip.init(jnp.ones(3))


def test_a_failure_inside_leaves_no_trace():
    def fail(*args):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        keep_params(optax.GradientTransformation(fail, fail)).init(jnp.ones(3))
    with pytest.raises(ValueError, match="keep_params"):
        optaxclip.clip_by_value(0.1, 1.0).init(jnp.ones(3))


def test_bounds_are_in_order_and_static():
    with pytest.raises(ValueError, match="^low must be at most high, got 1.0 and 0.1; swap them"):
        optaxclip.clip_by_value(1.0, 0.1)
    with pytest.raises(TypeError, match="^low must be a Python value, got .*static_args=.low"):
        optaxclip.clip_by_value(jnp.array(0.1), 1.0)
    injected = optax.inject_hyperparams(optaxclip.clip_by_value, static_args=("limit", "high"))
    kept = after(keep_params(injected(0.25, 1.5)), MOVE, KERNEL)
    np.testing.assert_allclose(
        kept["w"], np.clip(KERNEL["w"] + MOVE["w"], 0.25, 1.5), rtol=0, atol=5e-7
    )


# What it asks for.


def test_the_parameters_are_needed():
    keep = max_norm(1.0)
    with pytest.raises(
        ValueError, match=r"^keep_params limits the weights .*, got params=None; call update\("
    ):
        keep.update(jnp.ones(3), keep.init(jnp.ones(3)))


@pytest.mark.parametrize("value", [None, 1.0, optaxclip.clip_by_norm, scopes.leaf()])
def test_the_clip_is_a_transform(value):
    with pytest.raises(TypeError, match="^clip must be a GradientTransformation, got "):
        keep_params(value)


def test_units_by_axes_or_by_scope():
    with pytest.raises(TypeError, match="^axes and scope are both given, got 0 and "):
        max_norm(1.0, axes=0, scope=scopes.leaf())
    with pytest.raises(ValueError, match="^limit must be in "):
        max_norm(-1.0)
    assert max_norm.__name__ == "max_norm"


# What it leaves alone.


def test_what_is_no_weight_passes():
    params = {
        "w": jnp.full((2, 2), 3.0),
        "frozen": jnp.full((2, 2), 9.0),
        "count": jnp.int32(7),
        "hidden": optax.MaskedNode(),
        "absent": None,
        "empty": jnp.zeros((0, 3)),
        "flag": jnp.array(True),
    }
    updates = params | {
        "w": jnp.ones((2, 2)),
        "frozen": None,
        "count": np.zeros((), jax.dtypes.float0),
        "empty": jnp.zeros((0, 3)),
    }
    for transform in max_norm(1.0), keep_params(optaxclip.clip_by_value(0.1, 0.5)):
        out, state = step(transform, updates, params)
        assert jax.tree.structure(out) == jax.tree.structure(updates)
        for key in ("count", "flag", "frozen", "absent", "hidden", "empty"):
            chex.assert_trees_all_equal(out[key], updates[key])
        assert (params["w"] + out["w"] <= 0.75).all()
        chex.assert_trees_all_equal_shapes_and_dtypes(state, transform.init(params))


def test_complex_weights_are_limited_by_magnitude():
    params, updates = jnp.array([3 + 4j, 0.3j]), jnp.array([3 + 4j, 0.0])
    kept = after(keep_params(optaxclip.clip_by_value(1.0)), updates, params)
    np.testing.assert_allclose(kept, [0.6 + 0.8j, 0.3j], rtol=1e-6)


def test_quantized_weights_take_the_step_as_it_is():
    params = {"w": jnp.full((3, 2), 100, jnp.int8), "b": jnp.ones(2)}
    updates = {"w": jnp.full((3, 2), 0.5), "b": jnp.full(2, 9.0)}
    out, _ = step(keep_params(optaxclip.clip_by_value(1.0)), updates, params)
    chex.assert_trees_all_equal(out, {"w": updates["w"], "b": jnp.zeros(2)})


def test_relative_means_the_weights_before_the_step():
    rule = thresholds.relative_to_params(1.0, floor=0.0)
    keep = keep_params(optaxclip.clip(rule, scopes.leaf(), response=responses.normalize))
    params, state = jnp.array([3.0, 4.0]), None
    for seed in range(5):
        out, state = step(keep, jax.random.normal(jax.random.key(seed), (2,)), params, state)
        params = optax.apply_updates(params, out)
        np.testing.assert_allclose(jnp.linalg.norm(params), 5.0, rtol=1e-6)
        np.testing.assert_allclose(state.reading.limit, [5.0], rtol=1e-6)


def test_the_reading_is_of_the_weights():
    params = updates = {"w": jnp.array([3.0, 4.0]), "b": jnp.zeros(2)}
    _, state = step(optax.chain(optax.sgd(0.0), max_norm(5.0)), updates, params)
    assert telemetry.metrics(state)["clip/size_before"] == 5
    _, state = step(optax.chain(optax.identity(), max_norm(5.0)), updates, params)
    found = telemetry.metrics(state, params)
    assert found["clip/size_before"] == 10 and found["clip/size_after"] == 5
    assert found["clip/size_before/w"] == 10 and found["clip/size_before/b"] == 0


def test_extra_arguments_reach_the_clip():
    keep = keep_params(optaxclip.clip_by_global_norm(1.0))
    params = jnp.array([3.0, 4.0])
    out, _ = step(keep, jnp.zeros(2), params, sizes=2.0)
    np.testing.assert_allclose(params + out, [1.5, 2.0], rtol=1e-6)


def test_weights_that_are_not_finite_are_counted():
    updates = {"a": jnp.array([jnp.nan, 1.0]), "b": jnp.ones(2)}
    params = jax.tree.map(jnp.ones_like, updates)
    out, state = step(max_norm(5.0), updates, params)
    assert jnp.isnan(out["a"]).all() and (out["b"] == 1).all()
    assert state.reading.nonfinite_steps == 1


# In programs.


def problem():
    x = jax.random.normal(jax.random.key(0), (64, 4))
    return x, jnp.sin(x.sum(1, keepdims=True))


def largest_unit(tree):
    return max(float(jnp.linalg.norm(w, axis=0).max()) for w in jax.tree.leaves(tree))


def run(optimizer, params, gradients):
    def one(carry, gradient):
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), updates

    return jax.jit(lambda *start: jax.lax.scan(one, start, gradients))(
        params, optimizer.init(params)
    )


def pushing(steps, seed=0):
    return {"w": -1 + 0.3 * jax.random.normal(jax.random.key(seed), (steps, 4, 3))}


def test_momentum_that_pushes_outward_stays_inside():
    optimizer = optax.chain(optax.adam(0.1), max_norm(1.0))
    params = {"w": jnp.full((4, 3), 0.1)}
    (params, state), _ = run(optimizer, params, pushing(50))
    assert largest_unit(params) <= 1 + 1e-6
    assert telemetry.metrics(state)["clip/clipped_steps"] > 30


def test_in_multi_steps_it_sees_the_real_step():
    inner = optax.chain(optax.adam(0.1), max_norm(0.5))
    gradients, params = pushing(12), {"w": jnp.full((4, 3), 0.1)}
    (found, state), updates = run(optax.MultiSteps(inner, 3), params, gradients)
    means = jax.tree.map(lambda g: g.reshape(4, 3, *g.shape[1:]).mean(1), gradients)
    (wanted, alone), _ = run(inner, params, means)
    chex.assert_trees_all_close(found, wanted, rtol=1e-5)
    assert telemetry.metrics(state)["clip/steps"] == telemetry.metrics(alone)["clip/steps"] == 4
    assert (updates["w"][:2] == 0).all() and largest_unit(found) <= 0.5 + 1e-6


def test_under_a_guard_a_bad_step_leaves_the_weights():
    optimizer = optaxclip.skip_nonfinite(optax.chain(optax.adam(0.1), max_norm(0.5)))
    gradients, params = pushing(6), {"w": jnp.full((4, 3), 0.1)}
    bad = {"w": gradients["w"].at[3].set(jnp.nan)}
    good = {"w": jnp.delete(gradients["w"], 3, axis=0)}
    (found, _), updates = run(optimizer, params, bad)
    chex.assert_trees_all_equal(found, run(optimizer, params, good)[0][0])
    assert (updates["w"][3] == 0).all()


def test_masked_leaves_move_freely():
    mask = {"w": True, "free": False}
    optimizer = optax.chain(optax.sgd(1.0), optax.masked(max_norm(0.5), mask))
    params = {"w": jnp.full((4, 3), 0.1), "free": jnp.full((4, 3), 0.1)}
    gradients = jax.tree.map(lambda w: -jnp.ones_like(w), params)
    kept = after(optimizer, gradients, params)
    np.testing.assert_allclose(kept["free"], np.full((4, 3), 1.1), rtol=1e-6)
    assert largest_unit(kept["w"]) <= 0.5 + 1e-6


def test_error_feedback_inside_remembers_the_weights_that_were_cut_off():
    keep = keep_params(optaxclip.error_feedback(optaxclip.clip_by_value(1.0)))
    params, state, found = jnp.zeros(1), None, []
    for move in 3.0, -1.0, -1.5:  # the weight without a limit would be 3, 2, 0.5
        out, state = step(keep, jnp.array([move]), params, state)
        params = optax.apply_updates(params, out)
        found.append(float(params[0]))
    assert found == [1.0, 1.0, 0.5]


def test_linen_trains_with_limited_kernels():
    x, y = problem()
    model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(1)])
    params = model.init(jax.random.key(1), x)["params"]
    tx = optax.chain(optax.adam(0.05), max_norm(0.7))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def train_step(state):
        def loss(params):
            return jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for _ in range(30):
        state = train_step(state)
    assert max(largest_unit(state.params[k]["kernel"]) for k in state.params) <= 0.7 + 1e-6
    found = telemetry.metrics(state, state.params)
    assert found["clip/clipped_steps"] > 0 and "clip/size_before/layers_0/kernel" in found


def test_nnx_trains_with_limited_kernels():
    x, y = problem()
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), jnp.tanh, nnx.Linear(8, 1, rngs=rngs))
    optimizer = nnx.Optimizer(model, optax.chain(optax.adam(0.05), max_norm(0.7)), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
        optimizer.update(model, grads)

    for _ in range(30):
        train_step(model, optimizer)
    kernels = [model.layers[0].kernel[...], model.layers[2].kernel[...]]
    assert largest_unit(kernels) <= 0.7 + 1e-6
    assert telemetry.metrics(optimizer)["clip/clipped_steps"] > 0


# Over devices.

LAYOUTS = {"by inputs": P("x", None), "by units": P(None, "x"), "by both": P("x", "y")}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_sharded_weights_are_limited_as_whole_ones(name, kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    params = {"w": jax.random.normal(jax.random.key(0), (8, 4))}
    updates = {"w": jax.random.normal(jax.random.key(1), (8, 4))}
    keep = optax.chain(max_norm(1.0), keep_params(optaxclip.clip_by_global_norm(1.5)))
    wanted, _ = step(keep, updates, params)
    sharding = NamedSharding(mesh, LAYOUTS[name])
    split = jax.device_put((updates, params), sharding)
    with jax.set_mesh(mesh):
        out, _ = jax.jit(functools.partial(step, keep))(*split)
    chex.assert_trees_all_close(out, wanted, rtol=1e-5, atol=1e-6)
    assert out["w"].sharding.is_equivalent_to(sharding, 2)


@pytest.mark.parametrize("checked", [True, False], ids=["types", "names"])
def test_in_shard_map_too(checked):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    params, updates = (jax.random.normal(jax.random.key(k), (8, 3)) for k in (0, 1))
    keep = max_norm(1.0, axes=0, sharded_over="x")
    specs = (P("x"), P("x"))
    out = jax.jit(
        jax.shard_map(
            lambda *leaves: step(keep, *leaves)[0],
            mesh=mesh,
            in_specs=specs,
            out_specs=P("x"),
            check_vma=checked,
        )
    )(updates, params)
    np.testing.assert_allclose(out, step(max_norm(1.0), updates, params)[0], rtol=1e-5, atol=1e-6)


# Derivatives.


def test_derivatives_are_finite():
    def outcome(updates, limit):
        params = jax.tree.map(jnp.ones_like, updates)
        kept = after(max_norm(limit), updates, params)
        return sum(jnp.sum(x) for x in jax.tree.leaves(kept))

    for value in (-1.0, 0.0, 1e-25, 1.0, 1e10):
        for limit in (0.0, 0.5, 1e30):
            updates = {"w": jnp.full((3, 2), value)}
            slopes = jax.jit(jax.grad(outcome, argnums=(0, 1)))(updates, limit)
            chex.assert_tree_all_finite(slopes)
    free = jax.grad(outcome)({"w": jnp.full((3, 2), 0.5)}, 1e30)
    np.testing.assert_array_equal(free["w"], np.ones((3, 2)))
