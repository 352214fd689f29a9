"""Error feedback: what a clip cuts off today is added to the gradient of tomorrow, and nothing is
lost.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from precision import float64

import optaxclip
from optaxclip import responses, scopes

CLIPS = {
    "value": optaxclip.clip_by_value(1.0),
    "two bounds": optaxclip.clip_by_value(-2.0, 1.0),
    "leaf norm": optaxclip.clip_by_norm(1.0),
    "global norm": optaxclip.clip_by_global_norm(lambda step: 1.0 + step),
    "limit 0": optaxclip.clip_by_global_norm(0.0),
    "no limit": optaxclip.clip_by_global_norm(float("inf")),
    "smooth": optaxclip.clip_by_norm(1.0, response=responses.smooth),
    "zero": optaxclip.clip_by_norm(1.0, response=responses.drop),
    "zclip": optaxclip.zclip(warmup=2),
    "growth": optaxclip.growth_clip(1.5),
    "autoclip": optaxclip.autoclip(0.5, window=4),
    "normalized": optaxclip.gradient_stabilizer(),
    "chain": optax.chain(optaxclip.clip_by_value(2.0), optaxclip.clip_by_global_norm(1.0)),
    "carried twice": optaxclip.error_feedback(optaxclip.clip_by_value(1.0)),
    "optax": optax.clip_by_global_norm(1.0),
}
each_clip = pytest.mark.parametrize("name", CLIPS)
some_clips = pytest.mark.parametrize("name", ["value", "global norm", "zclip", "chain"])
STEPS = 8


def tree(row):
    return {"a": row[..., :4].reshape(*row.shape[:-1], 2, 2), "b": row[..., 4]}


@functools.cache
def through(name, decay=1.0, dtype=jnp.float32):
    """Compiled: the updates and what was carried after each of the gradients `[steps, 5]`, in
    float64.
    """
    clip = optaxclip.error_feedback(CLIPS[name], decay=decay)

    def step(state, grads):
        updates, state = clip.update(grads, state)
        return state, (updates, state.memory)

    @jax.jit
    def run(stream):
        start = clip.init(jax.tree.map(lambda x: x[0], stream))
        return jax.lax.scan(step, start, stream)[1]

    def wide(tree):
        return np.concatenate(
            [np.asarray(x, np.float64).reshape(len(x), -1) for x in jax.tree.leaves(tree)], 1
        )

    return lambda stream: [
        wide(seen) for seen in run(jax.tree.map(lambda x: jnp.asarray(x, dtype), tree(stream)))
    ]


def gradients(limit, **options):
    return npst.arrays(
        np.float32, (STEPS, 5), elements=st.floats(-limit, limit, width=32, **options)
    )


# Nothing is lost


@each_clip
@settings(max_examples=40, deadline=None, derandomize=True)
@given(stream=gradients(100))
def test_the_updates_so_far_and_what_is_carried_add_up_to_the_gradients_so_far(name, stream):
    assert_nothing_is_lost(stream, *through(name)(stream))


@some_clips
@settings(max_examples=40, deadline=None, derandomize=True)
@given(stream=gradients(100))
def test_they_do_in_16_bits_where_what_rounding_cuts_off_is_carried_too(name, stream):
    stream = np.asarray(jnp.asarray(stream, jnp.bfloat16), np.float32)
    assert_nothing_is_lost(stream, *through(name, dtype=jnp.bfloat16)(stream))


def assert_nothing_is_lost(stream, updates, carried):
    assert np.isfinite(updates).all() and np.isfinite(carried).all()
    sums = np.cumsum(np.float64(stream), 0)
    scale = np.max(np.cumsum(abs(stream) + abs(updates), 0) + abs(carried), initial=1e-30)
    np.testing.assert_allclose(np.cumsum(updates, 0) + carried, sums, rtol=0, atol=1e-6 * scale)


@each_clip
def test_carries_as_its_equations_say(name):
    stream = np.float32(np.random.default_rng(0).normal(size=(STEPS, 5)) * 3)
    clip, before = CLIPS[name], np.zeros(5)
    state, update = clip.init(tree(jnp.zeros(5))), jax.jit(clip.update)
    for grads, updates, carried in zip(stream, *through(name, 0.5)(stream), strict=True):
        total = grads + before
        out, state = update(tree(np.float32(total)), state)
        expected = np.append(np.ravel(out["a"]), out["b"])
        before = 0.5 * (total - expected)
        np.testing.assert_allclose(updates, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(carried, before, rtol=1e-4, atol=1e-5)


@some_clips
def test_without_a_share_to_carry_over_it_is_the_clip_alone(name):
    stream = np.float32(np.random.default_rng(1).normal(size=(STEPS, 5)) * 3)
    state, update = CLIPS[name].init(tree(jnp.zeros(5))), jax.jit(CLIPS[name].update)
    for grads, updates, carried in zip(stream, *through(name, 0.0)(stream), strict=True):
        out, state = update(tree(grads), state)
        np.testing.assert_allclose(updates, np.append(np.ravel(out["a"]), out["b"]), rtol=1e-6)
        assert not carried.any()


@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__
)
def test_where_nothing_is_cut_off_the_gradients_are_the_same_bits_and_nothing_is_carried(dtype):
    grads = jnp.array([-0.0, 0.0, 1.5, -3e-5, 6e-8, 100.0], dtype)
    clip = optaxclip.error_feedback(optaxclip.clip_by_global_norm(1e4))
    state = clip.init(grads)
    for _ in range(3):
        updates, state = clip.update(grads, state)
        assert np.asarray(updates).tobytes() == np.asarray(grads).tobytes()
        np.testing.assert_array_equal(state.memory, np.zeros(6))


def test_clipping_only_delays():
    clip = optaxclip.error_feedback(optaxclip.clip_by_value(1.0))
    state, seen = clip.init(jnp.zeros(3)), []
    for grads in [[5.5, -2.0, 0.5], *[[0, 0, 0]] * 6]:
        updates, state = clip.update(jnp.array(grads, jnp.float32), state)
        seen.append(updates.tolist())
    assert np.transpose(seen).tolist() == [
        [1, 1, 1, 1, 1, 0.5, 0],
        [-1, -1, 0, 0, 0, 0, 0],
        [0.5, 0, 0, 0, 0, 0, 0],
    ]
    assert not state.memory.any()


def test_what_rounding_to_16_bits_cuts_off_is_carried():
    clip = optaxclip.error_feedback(optaxclip.clip_by_global_norm(1.0))
    grads = jnp.array([3.0, 4.01], jnp.bfloat16)
    updates, state = clip.update(grads, clip.init(grads))
    assert updates.dtype == jnp.bfloat16 and state.memory.dtype == jnp.float32
    np.testing.assert_array_equal(
        updates.astype(jnp.float32) + state.memory, grads.astype(jnp.float32)
    )


def test_what_is_carried_grows_by_what_is_over_the_limit_and_a_decay_bounds_it():
    for decay, expected in (
        (1.0, [2, 4, 6, 8, 10, 12]),
        (0.5, [1, 1.5, 1.75, 1.875, 1.9375, 1.96875]),
        (0.0, [0] * 6),
    ):
        clip = optaxclip.error_feedback(optaxclip.clip_by_value(1.0), decay=decay)
        state, seen = clip.init(jnp.zeros(1)), []
        for _ in range(6):
            _, state = clip.update(jnp.array([3.0]), state)
            seen.append(state.memory.item())
        assert seen == expected


def test_the_rule_inside_sees_the_sums():
    clip = optaxclip.error_feedback(optaxclip.clip_by_global_norm(1.0))
    state, sizes = clip.init(jnp.zeros(2)), []
    for _ in range(3):
        _, state = clip.update(jnp.array([3.0, 4.0]), state)
        sizes.append(state.clip.reading.size_before.item())
    assert sizes == pytest.approx([5, 9, 13])


# Gradients that are not finite


@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "scope", [scopes.tree(), scopes.leaf(), scopes.element()], ids=["tree", "leaf", "element"]
)
def test_what_is_not_finite_does_not_get_into_what_is_carried(nonfinite, bad, scope):
    clip = optaxclip.error_feedback(optaxclip.clip_by_norm(1.0, scope=scope, nonfinite=nonfinite))
    grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([6.0])}
    state, update = clip.init(grads), jax.jit(clip.update)
    _, before = update(grads, state)
    updates, after = update({**grads, "a": jnp.array([3.0, bad])}, before)
    assert np.isfinite(np.concatenate(jax.tree.leaves(after.memory))).all()
    assert after.memory["a"][1] == before.memory["a"][1]
    for name in grads:
        kept = np.isfinite(updates[name])
        total = grads[name] + before.memory[name] - jnp.where(kept, updates[name], 0)
        # where the update is NaN, this step is left out
        expected = np.where(kept, total, before.memory[name])
        fine = np.isfinite({"a": [3.0, bad], "b": [6.0]}[name])
        np.testing.assert_allclose(after.memory[name][fine], expected[fine], rtol=1e-6)
    updates, _ = update(grads, after)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))


def test_other_groups_do_not_notice():
    clip = optaxclip.error_feedback(optaxclip.clip_by_norm(1.0))
    good = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([6.0])}
    states = [clip.update(good, clip.init(good))[1]] * 2
    for grads in {**good, "a": jnp.array([np.nan, 1.0])}, good, good:
        (one, states[0]), (other, states[1]) = (
            clip.update(grads, states[0]),
            clip.update(good, states[1]),
        )
        np.testing.assert_array_equal(one["b"], other["b"])
        np.testing.assert_array_equal(states[0].memory["b"], states[1].memory["b"])


def test_a_sum_that_overflows_is_left_out():
    clip = optaxclip.error_feedback(optaxclip.clip_by_value(1.0))
    state = clip.init(jnp.zeros(2))
    for _ in range(3):
        updates, state = clip.update(jnp.array([3e38, 2.0]), state)
        assert np.isfinite(state.memory).all() and updates[1] == 1
    updates, _ = clip.update(jnp.array([-3e38, 0.0]), state)
    assert np.isfinite(updates).all()


@pytest.mark.parametrize("name", ["value", "global norm"])
def test_half_precision_gradients_stay_finite_when_more_is_carried_than_they_can_hold(name):
    clip = optaxclip.error_feedback(CLIPS[name])
    grads = jnp.array([6e4, -1e4], jnp.float16)
    state, update = clip.init(grads), jax.jit(clip.update)
    for _ in range(6):
        updates, state = update(grads, state)
        assert (
            updates.dtype == jnp.float16
            and np.isfinite(updates).all()
            and np.isfinite(state.memory).all()
        )
        assert updates[0] > 0 > updates[1]


# Leaves of all kinds


def odd(float_leaf=3.0):
    return {
        "array": jnp.array([[3.0, -4.0]]),
        "scalar": jnp.array(2.0),
        "number": float_leaf,
        "half": jnp.array([5.0], jnp.float16),
        "complex": jnp.array([3 + 4j]),
        "empty": jnp.zeros((0, 3)),
        "none": None,
        "masked": optax.MaskedNode(),
        "tree": {},
        "int": jnp.arange(3),
        "bool": jnp.array([True, False]),
        "float0": np.zeros(2, jax.dtypes.float0),
        "key": jax.random.key(0),
    }


def described(tree, *, weak=True):
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [
        (jnp.shape(x), jnp.result_type(x), weak and jnp.asarray(x).weak_type) for x in leaves
    ]


def test_what_is_no_float_passes_through_and_a_zero_is_carried_for_it():
    clip = optaxclip.error_feedback(optaxclip.clip_by_value(1.0))
    grads = odd()
    state = clip.init(grads)
    floats = {"array", "scalar", "number", "half", "complex", "empty"}
    others = [x for name in grads.keys() - floats for x in jax.tree.leaves(state.memory[name])]
    assert others and all(x.size == 1 and x == 0 for x in others)
    assert jax.tree.structure(state.memory) == jax.tree.structure(grads)
    for _ in range(2):
        updates, state = clip.update(grads, state)
        for name, leaf in grads.items():
            assert jax.tree.structure(updates[name]) == jax.tree.structure(leaf)
            if name not in floats:
                assert all(
                    x is y
                    for x, y in zip(
                        jax.tree.leaves(updates[name]), jax.tree.leaves(leaf), strict=True
                    )
                )
    np.testing.assert_allclose(updates["complex"], [0.6 + 0.8j], rtol=1e-6)
    assert (
        updates["array"].tolist() == [[1, -1]]
        and updates["scalar"] == updates["number"] == updates["half"][0] == 1
    )
    assert (
        state.memory["array"].tolist() == [[4, -6]]
        and state.memory["scalar"] == 2
        and state.memory["number"] == 4
    )
    assert updates["empty"].shape == state.memory["empty"].shape == (0, 3)


@pytest.mark.parametrize("updates", [{}, None, [], {"none": None}, {"int": jnp.arange(2)}], ids=str)
def test_trees_without_a_float_come_back(updates):
    clip = optaxclip.error_feedback(optaxclip.clip_by_value(1.0))
    out, state = clip.update(updates, clip.init(updates))
    assert jax.tree.structure(out) == jax.tree.structure(updates) and all(
        x == 0 for x in jax.tree.leaves(state.memory)
    )


def test_updates_and_state_keep_structure_shapes_and_dtypes():
    grads = {key: leaf for key, leaf in odd().items() if key != "key"}
    for decay in (
        1,
        np.float64(0.5),
        np.float32(0.5),
        jnp.float32(0.5),
        jnp.bfloat16(0.5),
        np.array(0.5),
    ):
        clip = optaxclip.error_feedback(optaxclip.clip_by_value(1.0), decay=decay)
        start = clip.init(grads)
        updates, state = clip.update(grads, start)
        assert described(updates, weak=False) == described(grads, weak=False)
        assert described(state) == described(start)


def test_state_keeps_its_dtypes_in_64_bits_whatever_the_dtype_of_decay():
    with float64():
        for decay in 0.5, np.float64(0.5), jnp.float64(0.5), np.float32(0.5):
            clip = optaxclip.error_feedback(optaxclip.clip_by_value(1.0), decay=decay)
            grads = {
                "wide": jnp.array([3.0]),
                "single": jnp.array([3.0], jnp.float32),
                "bf16": jnp.array([3.0], jnp.bfloat16),
            }
            start = clip.init(grads)
            updates, state = clip.update(grads, start)
            assert described(updates, weak=False) == described(grads, weak=False)
            assert described(state) == described(start)
            assert [x.dtype for x in jax.tree.leaves(state.memory)] == [
                jnp.float32,
                jnp.float32,
                jnp.float64,
            ]


def test_a_gradient_that_is_missing_waits_and_what_is_carried_of_it_stays():
    params = {"a": jnp.ones(1), "b": jnp.ones(2)}
    clip = optaxclip.error_feedback(optaxclip.clip_by_norm(1.0))
    _, state = clip.update(
        {"a": jnp.array([2.0]), "b": jnp.array([3.0, 4.0])}, clip.init(params), params
    )
    for _ in range(2):
        updates, state = clip.update({"a": jnp.array([2.0]), "b": None}, state, params)
        assert updates["b"] is None and updates["a"] == 1
        np.testing.assert_allclose(state.memory["b"], [2.4, 3.2], rtol=1e-6)
    assert state.memory["a"] == 3
    updates, state = clip.update({"a": None, "b": jnp.zeros(2)}, state, params)
    np.testing.assert_allclose(updates["b"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(state.memory["b"], [1.8, 2.4], rtol=1e-6)


def test_a_decay_goes_for_a_missing_gradient_too():
    params = {"a": jnp.ones(1)}
    clip = optaxclip.error_feedback(optaxclip.clip_by_norm(1.0), decay=0.5)
    _, state = clip.update({"a": jnp.array([9.0])}, clip.init(params), params)
    assert state.memory["a"] == 4
    _, state = clip.update({"a": None}, state, params)
    assert state.memory["a"] == 2


# In a training loop


@some_clips
def test_one_trace_in_a_donated_scan(name):
    optimizer, traces = optax.chain(optaxclip.error_feedback(CLIPS[name]), optax.sgd(0.1)), []

    def step(carry, scale):
        traces.append(scale)
        params, state = carry
        updates, state = optimizer.update(jax.tree.map(lambda p: scale * p, params), state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry, scales: jax.lax.scan(step, carry, scales)[0], donate_argnums=0)
    params = tree(jnp.arange(1.0, 6.0))
    carry = params, optimizer.init(params)
    described_before = described(carry)
    for _ in range(2):
        carry = run(carry, jnp.linspace(0, 2, 5))
        assert described(carry) == described_before
    assert len(traces) == 1
    assert np.isfinite(np.concatenate([np.ravel(x) for x in jax.tree.leaves(carry[0])])).all()


def test_its_state_is_one_buffer_as_large_as_the_parameters():
    for dtype in jnp.float32, jnp.bfloat16:
        params = {
            "w": jnp.ones((30, 20), dtype),
            "b": jnp.ones(20, dtype),
            "step": jnp.arange(1000),
        }
        for clip in optaxclip.clip_by_value(1.0, record=False), optax.clip(1.0):
            state = optaxclip.error_feedback(clip).init(params)
            floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
            shapes = [(20,), (1,), (30, 20)]  # a zero in place of the integers
            assert [(x.shape, x.dtype) for x in floats] == [
                (shape, jnp.float32) for shape in shapes
            ]


def test_limits_relative_to_parameters_and_other_arguments_reach_the_clip():
    params, grads = jnp.array([3.0, 4.0]), jnp.array([6.0, 8.0])
    clip = optaxclip.error_feedback(optaxclip.adaptive_grad_clip(0.1))
    updates, _ = clip.update(grads, clip.init(params), params)
    np.testing.assert_allclose(updates, [0.3, 0.4], rtol=1e-6)
    clip = optaxclip.error_feedback(optaxclip.clip(1.0, scopes.tree()))
    updates, state = clip.update(
        grads, clip.init(params), params, measured=jnp.array([0.0, 2.0]), unknown=3
    )
    np.testing.assert_array_equal(updates, [3, 4])
    np.testing.assert_array_equal(state.memory, [3, 4])


def test_the_share_that_is_carried_over_may_be_traced_and_injected():
    def carried(decay):
        clip = optaxclip.error_feedback(optaxclip.clip_by_value(1.0), decay=decay)
        return clip.update(jnp.array([3.0]), clip.init(jnp.zeros(1)))[1].memory

    np.testing.assert_allclose(
        jax.jit(jax.vmap(carried))(jnp.array([0.0, 0.5, 1.0]))[:, 0], [0, 1, 2]
    )
    clip = optax.inject_hyperparams(optaxclip.error_feedback, static_args="clip")(
        optaxclip.clip_by_value(1.0), decay=lambda s: 1 / (1 + s)
    )
    state, seen = clip.init(jnp.zeros(1)), []
    for _ in range(3):
        _, state = clip.update(jnp.array([3.0]), state)
        seen.append(state.inner_state.memory.item())
    assert seen == pytest.approx([2, 4 / 2, 4 / 3])


# Refusals


@pytest.mark.parametrize(
    "clip", [1.0, None, optaxclip.clip_by_value, "value"], ids=lambda x: str(x)[:9]
)
def test_what_is_no_transform_is_refused(clip):
    words = (
        f"^clip must be a GradientTransformation, got {re.escape(repr(clip))}; pass one "
        r"such as optaxclip\.clip_by_value"
    )
    with pytest.raises(TypeError, match=words):
        optaxclip.error_feedback(clip)


@pytest.mark.parametrize(
    "decay, error, words",
    [
        (-0.1, ValueError, r"must be in \[0, 1\], got -0\.1; pass a number inside"),
        (1.5, ValueError, r"must be in \[0, 1\], got 1\.5; pass a number inside"),
        (np.nan, ValueError, r"must be in \[0, 1\], got nan; pass a number inside"),
        (np.ones(2), ValueError, r"must be one number, got an array of shape \(2,\); give groups"),
        ("1", TypeError, r"must be a real number, got '1' \(str\); pass a float such as 1\.0"),
        (
            None,
            TypeError,
            r"must be a real number, got None \(NoneType\); pass a float such as 1\.0",
        ),
        (True, TypeError, r"must be a real number, got True \(bool\); pass a float such as 1\.0"),
    ],
    ids=str,
)
def test_what_is_no_share_is_refused(decay, error, words):
    with pytest.raises(error, match=f"^decay {words}"):
        optaxclip.error_feedback(optaxclip.clip_by_value(1.0), decay=decay)


def test_updates_of_another_tree_are_refused():
    clip = optaxclip.error_feedback(optax.clip(1.0))
    state = clip.init({"a": jnp.ones(1), "b": jnp.ones(2)})
    words = (
        "^updates has another structure than the tree that state was made for, got .*; "
        "call init on a tree .*"
    )
    with pytest.raises(ValueError, match=words):
        clip.update({"a": jnp.ones(1)}, state)


def test_a_missing_gradient_leaves_what_is_carried_for_it():
    clip = optaxclip.error_feedback(optax.clip(1.0))
    _, state = clip.update(
        {"a": jnp.ones(1), "b": jnp.full(2, 3.0)}, clip.init({"a": jnp.ones(1), "b": jnp.ones(2)})
    )
    updates, state = clip.update({"a": jnp.ones(1), "b": None}, state)
    assert (
        updates["b"] is None
        and updates["a"].tolist() == [1]
        and state.memory["b"].tolist() == [2, 2]
    )


# The estimate of Clip21


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_estimate_follows_its_equation(dtype):
    stream = np.asarray(np.random.default_rng(0).normal(size=(STEPS, 5)) * 3, np.float64)
    clip = optaxclip.error_feedback(optaxclip.clip_by_global_norm(1.0), mode="estimate")
    state, estimate = clip.init(tree(jnp.zeros(5, dtype))), np.zeros(5)
    for row in stream:
        grads = tree(jnp.asarray(row, dtype))
        updates, state = clip.update(grads, state)
        flat = [
            np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(t)])
            for t in (grads, updates)
        ]
        step = flat[0] - estimate
        estimate = estimate + step * min(1, 1 / np.linalg.norm(step))
        np.testing.assert_allclose(flat[1], estimate, atol=1e-5 if dtype == jnp.float32 else 0.05)
        assert jax.tree.leaves(updates)[0].dtype == dtype


def test_an_estimate_reaches_a_constant_gradient():
    clip = optaxclip.error_feedback(optaxclip.clip_by_global_norm(1.0), mode="estimate")
    grads, state = jnp.array([3.0, 4.0]), clip.init(jnp.zeros(2))
    for _ in range(6):
        updates, state = clip.update(grads, state)
    np.testing.assert_allclose(updates, grads, rtol=1e-6)


def test_an_estimate_forgets_a_step_that_is_not_finite():
    clip = optaxclip.error_feedback(optaxclip.clip_by_value(1.0), mode="estimate")
    _, before = clip.update(jnp.array([1.0, 2.0]), clip.init(jnp.zeros(2)))
    updates, after = clip.update(jnp.array([jnp.nan, 2.0]), before)
    assert np.isnan(updates[0]) and updates[1] == 2
    np.testing.assert_array_equal(after.memory, [1, 2])


def test_an_estimate_has_no_decay():
    with pytest.raises(
        ValueError,
        match=re.escape('decay needs mode="residual", got decay=0.5 without it; leave it out'),
    ):
        optaxclip.error_feedback(optaxclip.clip_by_value(1.0), mode="estimate", decay=0.5)
