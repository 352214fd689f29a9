"""Clipping in the backward pass: the value passes, and derivatives are those of back-propagation by
hand that clips.
"""

import contextlib
import functools
import re
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from precision import float64

import optaxclip
from optaxclip import norms, responses, scopes, thresholds
from optaxclip._backward import clip_activation_grad, clip_cotangent
from optaxclip.thresholds import fixed

BY_VALUE = {"scope": scopes.element(), "response": responses.clamp}
PER_EXAMPLE = {"scope": scopes.leaf(batch_axes=0)}
PARTS = {
    "tree norm": {},
    "leaf norm": {"scope": scopes.leaf()},
    "per example": PER_EXAMPLE,
    "value": BY_VALUE,
    "soft, by mean": {"norm": norms.rms(), "response": responses.smooth},
    "dropped": {"scope": scopes.unit(), "norm": norms.l1(), "response": responses.drop},
}
each_choice = pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)


@functools.cache
def compiled(parts):
    def run(x, cotangent, threshold):
        y, pull = jax.vjp(lambda x: clip_cotangent(x, threshold, **dict(parts)), x)
        return y, pull(cotangent)[0]

    return jax.jit(run)


def cotangent_through(x, cotangent, threshold, **parts):
    """The value, and what comes back to `x` where `cotangent` arrives."""
    return compiled(tuple(parts.items()))(x, cotangent, threshold)


def random(*shape, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=shape)


def tree(seed=0, scale=1.0):
    return {
        "a": jnp.float32(random(3, 2, seed=seed, scale=scale)),
        "b": [jnp.float32(random(3, seed=seed + 1, scale=scale))],
    }


def same_bits(x, y):
    leaves, others = jax.tree.leaves(x), jax.tree.leaves(y)
    assert jax.tree.structure(x) == jax.tree.structure(y)
    return all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(leaves, others, strict=True)
    )


def assert_close(x, y, **tolerance):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, **(tolerance or {"rtol": 1e-6})), x, y
    )


# The value passes, and the derivative is one step of clip


@each_choice
@pytest.mark.parametrize("limit", [0.0, 0.3, 1.0, 1e6, np.inf])
def test_the_value_is_the_same_bits_and_the_derivative_one_step_of_clip(parts, limit):
    x, cotangent = tree(0), tree(10)
    y, back = cotangent_through(x, cotangent, limit, **parts)
    clip = optaxclip.clip(limit, **{"scope": scopes.tree(), **parts})
    assert same_bits(x, y)
    assert_close(
        back, jax.jit(lambda cotangent: clip.update(cotangent, clip.init(x))[0])(cotangent)
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    cotangent=npst.arrays(np.float32, (4, 3), elements=st.floats(-1e3, 1e3, width=32)),
    limit=st.floats(0, 100, width=32),
)
def test_equals_numpy_by_value_by_norm_and_per_example(cotangent, limit):
    wide = cotangent.astype(np.float64)

    def scaled(axes):
        size = np.sqrt(np.sum(wide**2, axis=axes, keepdims=True))
        return wide * np.minimum(1, limit / np.where(size > 0, size, 1))

    for parts, expected in (
        ({}, scaled((0, 1))),
        (PER_EXAMPLE, scaled(1)),
        (BY_VALUE, np.clip(wide, -limit, limit)),
    ):
        _, back = cotangent_through(jnp.zeros((4, 3), jnp.float32), cotangent, limit, **parts)
        np.testing.assert_allclose(back, expected, rtol=1e-5, atol=1e-30)


@each_choice
def test_within_the_limit_the_derivative_is_the_same_bits(parts):
    if parts.get("response") is responses.smooth:
        return  # acts within the limit, too
    x, y = tree(0), jnp.float32(random(3, 2, seed=4))

    def loss(x, threshold):
        x = x if threshold is None else clip_cotangent(x, threshold, **parts)
        return jnp.sum(jnp.tanh(x["a"]) * y) + jnp.sum(jnp.exp(x["b"][0])) ** 2

    plain = jax.jit(jax.grad(lambda x: loss(x, None)))(x)
    clipping = jax.jit(jax.grad(loss))
    assert same_bits(clipping(x, 1e3), plain) and same_bits(clipping(x, jnp.inf), plain)
    assert not same_bits(clipping(x, 0.1), plain)


def test_what_is_computed_further_back_is_computed_from_the_clipped_derivative():
    def loss(w, z):
        return jnp.sum(jnp.array([30.0, 40.0]) * clip_cotangent(w * z, 1.0) ** 2)

    w, z = jnp.array([1.0, 0.5]), jnp.array([2.0, 3.0])
    arriving = np.array([30.0, 40.0]) * 2 * np.array([2.0, 1.5])
    through = arriving / np.linalg.norm(arriving)
    assert_close(jax.grad(loss, (0, 1))(w, z), (through * z, through * w))


def test_a_parameter_used_many_times_has_in_time_clipped_terms_and_under_vmap_a_clipped_sum():
    scales = jnp.arange(1.0, 11.0)

    def in_time(w):
        return jax.lax.scan(
            lambda total, scale: (total + scale * clip_cotangent(w, 3.0), None), 0.0, scales
        )[0]

    def mapped(w):
        return jnp.sum(jax.vmap(lambda scale: scale * clip_cotangent(w, 3.0))(scales))

    assert jax.grad(in_time)(1.0) == 1 + 2 + 8 * 3
    assert jax.grad(mapped)(1.0) == 3  # of 55


# Pytrees


def odd():
    return {
        "array": jnp.array([[3.0, -4.0]]),
        "half": jnp.array([5.0], jnp.float16),
        "complex": jnp.array([3 + 4j]),
        "number": 2.0,
        "empty": jnp.zeros((0, 3)),
        "none": None,
        "masked": optax.MaskedNode(),
        "int": jnp.arange(3),
        "bool": True,
        "key": jax.random.key(0),
    }


@pytest.mark.parametrize(
    "wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["eager", "jit", "remat"]
)
def test_leaves_that_are_no_floats_pass(wrap):
    x = odd()
    y = wrap(lambda x: clip_cotangent(x, 1.0, **BY_VALUE))(x)
    assert jax.tree.structure(y) == jax.tree.structure(x)
    assert all(
        jnp.all(a == b) and jnp.result_type(a) == jnp.result_type(b)
        for a, b in zip(*map(jax.tree.leaves, (y, x)), strict=True)
    )

    def loss(x):
        x = wrap(lambda x: clip_cotangent(x, 1.0, **BY_VALUE))(x)
        total = (
            jnp.sum(3 * x["array"]) + jnp.sum(4 * x["half"].astype(jnp.float32)) - 2 * x["number"]
        )
        return total + jnp.sum((x["complex"] * jnp.conj(x["complex"])).real) + jnp.sum(x["int"])

    grads = jax.grad(loss, allow_int=True)(x)
    assert jax.tree.structure(grads) == jax.tree.structure(x)
    assert (
        grads["array"].tolist() == [[1, 1]]
        and grads["number"] == -1
        and grads["half"] == jnp.ones(1, jnp.float16)
    )
    np.testing.assert_allclose(grads["complex"], [0.6 - 0.8j], rtol=1e-6)
    assert grads["half"].dtype == jnp.float16 and grads["empty"].shape == (0, 3)
    assert all(grads[name].dtype == jax.dtypes.float0 for name in ("int", "bool", "key"))


@pytest.mark.parametrize("x", [None, {}, [], {"none": None}, {"int": jnp.arange(2)}], ids=str)
def test_trees_without_a_float_come_back(x):
    assert same_bits(clip_cotangent(x, 1.0), x)


def test_a_number_keeps_its_weak_type():
    assert jax.grad(lambda x: jnp.float32(jnp.bfloat16(3) * clip_cotangent(x, 1.0)))(2.0) == 1
    assert (
        jax.eval_shape(lambda x: jnp.bfloat16(3) * clip_cotangent(x, 1.0), 2.0).dtype
        == jnp.bfloat16
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@each_choice
def test_16_bits_are_measured_in_32_and_kept(parts, dtype):
    x = {"x": jnp.ones((2, 300), dtype)}
    cotangent = {"x": jnp.asarray(random(2, 300, scale=300.0), dtype)}
    y, back = cotangent_through(x, cotangent, 10.0, **parts)
    assert y["x"].dtype == back["x"].dtype == dtype
    _, expected = cotangent_through(
        {"x": jnp.ones((2, 300), jnp.float32)}, jax.tree.map(jnp.float32, cotangent), 10.0, **parts
    )
    assert_close(jax.tree.map(jnp.float32, back), expected, rtol=8e-3, atol=1e-6)


@pytest.mark.parametrize(
    "limit", [1, np.int32(1), np.float64(1), np.array(1.0), jnp.array(1), jnp.bfloat16(1)], ids=repr
)
def test_any_number_is_a_threshold(limit):
    def back(limit):
        return jax.grad(lambda x: jnp.vdot(jnp.array([3.0, 4.0]), clip_cotangent(x, limit)))(
            jnp.zeros(2)
        )

    np.testing.assert_allclose(back(limit), [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(back(10**12), [3, 4])  # no int32


def test_groups_have_limits_of_their_own():
    x = {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(1)}
    cotangent = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.3, 0.4]), "c": jnp.array([7.0])}
    scope = scopes.group(lambda path: None if path == "c" else path)
    for limits in {"a": 1.0, "b": 0.1}, types.MappingProxyType({"b": jnp.float32(0.1), "a": 1}):
        (back,) = jax.vjp(lambda x: clip_cotangent(x, limits, scope=scope), x)[1](cotangent)
        assert_close(back, {"a": [0.6, 0.8], "b": [0.06, 0.08], "c": [7.0]})


def test_groups_may_have_traced_limits_with_derivatives():
    x = {"a": jnp.ones(2), "b": jnp.ones(2)}
    scope = scopes.group(lambda path: path)

    @jax.jit
    def total(limits):
        grads = jax.grad(
            lambda x: jnp.sum(clip_cotangent(x, limits, scope=scope)["a"] * jnp.array([3.0, 4.0]))
        )(x)
        return jnp.sum(grads["a"]) + jnp.sum(grads["b"])

    assert_close(jax.value_and_grad(total)({"a": 2.0, "b": 1.0}), (2.8, {"a": 1.4, "b": 0.0}))


# Numbers that are not finite, and thresholds that are traced


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_makes_its_group_nan(bad):
    x = jnp.zeros((2, 2))
    cotangent = jnp.array([[3.0, bad], [6.0, 8.0]])
    assert np.isnan(cotangent_through(x, cotangent, 1.0)[1]).all()
    nan = np.nan
    np.testing.assert_allclose(
        cotangent_through(x, cotangent, 1.0, **PER_EXAMPLE)[1], [[nan, nan], [0.6, 0.8]], rtol=1e-6
    )
    np.testing.assert_array_equal(
        cotangent_through(x, cotangent, 1.0, **BY_VALUE)[1], [[1, nan], [1, 1]]
    )


@pytest.mark.parametrize("limit", [-1.0, np.nan])
@pytest.mark.parametrize("parts", [{}, BY_VALUE], ids=["norm", "value"])
def test_a_traced_limit_that_is_no_limit_counts_as_0(limit, parts):
    back = jax.jit(
        lambda limit: cotangent_through(jnp.ones(2), jnp.array([3.0, -4.0]), limit, **parts)[1]
    )(limit)
    np.testing.assert_array_equal(back, [0, 0])


def test_squares_may_overflow():
    _, back = cotangent_through(jnp.ones(2), jnp.array([3e30, 4e30]), 1.0)
    np.testing.assert_allclose(back, [0.6, 0.8], rtol=1e-6)


# Under transformations


def rnn_loss(params, x, threshold, parts, wrap=lambda f: f):
    """A plain recurrent network whose carry is clipped at each step, with a loss at each step."""

    def step(h, x):
        h = clip_cotangent(
            jnp.tanh(x @ params["in"] + h @ params["rec"] + params["bias"]), threshold, **parts
        )
        return h, jnp.sum(h**2 * params["out"])

    return jnp.sum(jax.lax.scan(wrap(step), jnp.zeros((x.shape[1], 4)), x)[1])


def rnn(seed=0, scale=1.0):
    shapes = {"in": (3, 4), "rec": (4, 4), "bias": (4,), "out": (4,)}
    return {
        name: scale * random(*shape, seed=seed + i)
        for i, (name, shape) in enumerate(shapes.items())
    }


def rnn_by_hand(params, x, clip):
    """Loss and derivatives of `rnn_loss` by back-propagation through time, and how often what
    arrives was clipped.
    """
    steps, batch, _ = x.shape
    hs = [np.zeros((batch, 4))]
    for t in range(steps):
        hs.append(np.tanh(x[t] @ params["in"] + hs[-1] @ params["rec"] + params["bias"]))
    grads = {name: np.zeros_like(value) for name, value in params.items()}
    dx, binding, dh = np.zeros_like(x), [], np.zeros((batch, 4))
    for t in reversed(range(steps)):
        grads["out"] += np.sum(hs[t + 1] ** 2, 0)
        arriving = dh + 2 * hs[t + 1] * params["out"]
        through = clip(arriving)
        binding.append((through != arriving).mean())
        dz = through * (1 - hs[t + 1] ** 2)
        grads["in"] += x[t].T @ dz
        grads["rec"] += hs[t].T @ dz
        grads["bias"] += dz.sum(0)
        dx[t], dh = dz @ params["in"].T, dz @ params["rec"].T
    return sum(np.sum(h**2 * params["out"]) for h in hs[1:]), (grads, dx), binding[::-1]


def by_norm(limit, axes):
    def clip(ct):
        size = np.sqrt(np.sum(ct**2, axis=axes, keepdims=True))
        return np.where(size > limit, ct * limit / size, ct)

    return clip


BY_HAND = {
    "value": (BY_VALUE, lambda limit: lambda ct: np.clip(ct, -limit, limit)),
    "norm": ({}, lambda limit: by_norm(limit, (0, 1))),
    "per example": (PER_EXAMPLE, lambda limit: by_norm(limit, 1)),
}
WRAPS = {"plain": lambda f: f, "remat": jax.checkpoint, "jit": jax.jit}


LIMITS = {"value": 1.0, "norm": 4.0, "per example": 2.0}


def inputs():
    """Weights, and inputs `[time, batch, features]` that grow, so that a limit binds at some steps
    and not at others.
    """
    return rnn(3, scale=0.5), random(9, 5, 3, seed=7) * np.linspace(0.2, 3, 9)[:, None, None]


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("name", BY_HAND)
def test_a_scanned_network_equals_back_propagation_through_time_by_hand(name, wrap):
    (parts, by_hand), limit, (params, x) = BY_HAND[name], LIMITS[name], inputs()
    loss, expected, binding = rnn_by_hand(params, x, by_hand(limit))
    assert min(binding) <= 0.4 and max(binding) >= 0.6
    with float64():
        run = jax.jit(
            jax.value_and_grad(lambda *arguments: rnn_loss(*arguments, parts, WRAPS[wrap]), (0, 1))
        )
        value, grads = run(params, x, limit)
    np.testing.assert_allclose(value, loss, rtol=1e-12)
    assert_close(grads, expected, rtol=1e-9, atol=1e-12)
    for other in (
        (lambda ct: ct),
        *(hand(LIMITS[name]) for other, (_, hand) in BY_HAND.items() if other != name),
    ):
        assert np.abs(rnn_by_hand(params, x, other)[1][0]["rec"] - expected[0]["rec"]).max() > 1e-2


@pytest.mark.parametrize("limit", [0.5, 2.0, 1e9])
def test_vmap_clips_each_example_by_its_own_size(limit):
    x, scale = tree(5), jnp.array([0.1, 1.0, 30.0])

    def loss(x, scale):
        x = clip_cotangent(x, limit)
        return scale * (jnp.sum(jnp.sin(x["a"])) + jnp.sum(x["b"][0] ** 2))

    back = jax.jit(jax.grad(lambda x: jnp.sum(jax.vmap(loss)(x, scale))))(x)
    a, b = np.cos(x["a"]) * scale[:, None], 2 * np.asarray(x["b"][0]) * scale
    factor = np.minimum(1, limit / np.sqrt(np.sum(a**2, 1) + b**2))
    assert_close(back, {"a": factor[:, None] * a, "b": [factor * b]}, rtol=1e-5)


@pytest.mark.parametrize("context", [False, True])
@each_choice
def test_vmap_clips_each_example_on_an_explicit_mesh(parts, context):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"))
    x = {
        "a": random(8, 3, 2, seed=1).astype(np.float32),
        "b": random(8, 5, seed=2).astype(np.float32),
    }

    def loss(x):
        x = clip_cotangent(x, 0.5, **({} if parts is PER_EXAMPLE else parts))
        return jnp.sum(jnp.sin(x["a"])) + jnp.sum(x["b"] ** 2)

    back = jax.grad(lambda x: jnp.sum(jax.vmap(loss)(x)))
    split = jax.device_put(x, jax.NamedSharding(mesh, jax.P("fsdp")))
    with jax.set_mesh(mesh) if context else contextlib.nullcontext():
        got = jax.jit(back)(split)
    assert_close(got, jax.jit(back)(x), rtol=1e-5)
    assert got["a"].sharding.is_equivalent_to(split["a"].sharding, 3)


def test_a_batch_axis_clips_each_leaf_of_each_example_as_a_loop_does():
    cotangent = tree(6, scale=2.0)
    _, back = cotangent_through(tree(0), cotangent, 1.0, **PER_EXAMPLE)
    for leaf, clipped_leaf in zip(jax.tree.leaves(cotangent), jax.tree.leaves(back), strict=True):
        for example, clipped_example in zip(leaf, clipped_leaf, strict=True):
            size = np.linalg.norm(example)
            np.testing.assert_allclose(clipped_example, example * min(1, 1 / size), rtol=1e-6)


def test_a_sweep_over_thresholds_is_one_program():
    x, cotangent, limits = tree(0), tree(10), jnp.array([0.1, 1.0, 10.0])
    swept = jax.jit(jax.vmap(lambda limit: cotangent_through(x, cotangent, limit)[1]))(limits)
    for i, limit in enumerate(limits):
        assert_close(
            jax.tree.map(lambda leaf: leaf[i], swept), cotangent_through(x, cotangent, limit)[1]
        )


def test_one_trace_whatever_the_limit():
    traces = []

    @jax.jit
    def back(x, limit):
        traces.append(limit)
        return jax.grad(lambda x: jnp.sum(clip_cotangent(x, limit) ** 2))(x)

    assert [back(jnp.array([3.0, 4.0]), limit).tolist() for limit in (5.0, 0.0, np.inf)] == [
        [3, 4],
        [0, 0],
        [6, 8],
    ]
    assert len(traces) == 1


# Second derivatives: those of the clipped backward pass


def curved(x, limit, parts):
    y = clip_cotangent(jnp.sin(x), limit, **parts)
    return jnp.sum(y**3 + jnp.prod(y)) + jnp.sum(jnp.exp(x))


SECOND = {
    "reverse over reverse": lambda grad, x, v: jax.grad(lambda x: jnp.vdot(v, grad(x)))(x),
    "of a jitted one": lambda grad, x, v: jax.grad(lambda x: jnp.vdot(v, jax.jit(grad)(x)))(x),
    "of remat": lambda grad, x, v: jax.grad(lambda x: jnp.vdot(v, jax.checkpoint(grad)(x)))(x),
    "forward over reverse": lambda grad, x, v: jax.jacfwd(lambda x: jnp.vdot(v, grad(x)))(x),
}


@pytest.mark.parametrize("name", ["tree norm", "per example", "value", "soft, by mean"])
@pytest.mark.parametrize("how", SECOND)
def test_second_derivatives_are_the_slopes_of_the_clipped_gradient(name, how):
    v, h = random(3, 2, seed=2), 1e-6

    def grad(limit):
        return jax.grad(lambda x: curved(x, limit, PARTS[name]))

    with float64():
        x, around = random(3, 2, seed=1), h * np.eye(6).reshape(6, 3, 2)
        second = jax.jit(lambda x, limit: SECOND[how](grad(limit), x, v))
        slopes = jax.jit(
            lambda x, limit: jax.vmap(
                lambda d: jnp.vdot(v, grad(limit)(x + d) - grad(limit)(x - d)) / (2 * h)
            )(around)
        )
        for limit in 0.3, 0.9, 1e6:
            np.testing.assert_allclose(
                second(x, limit), slopes(x, limit).reshape(3, 2), rtol=1e-6, atol=1e-8
            )


def test_hessians_where_the_limit_binds_and_where_not():
    x = jnp.array([0.5, 2.0])
    for hessian in jax.hessian, lambda f: jax.jacrev(jax.jacrev(f)):
        found = jax.jit(hessian(lambda x: jnp.sum(clip_cotangent(x, 5.0, **BY_VALUE) ** 3)))(x)
        # 3 x^2 is 0.75, and 12 cut to 5
        np.testing.assert_allclose(found, [[3, 0], [0, 0]], rtol=1e-6)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: clip_cotangent(x, 1.0), (x,), (x,))


@pytest.mark.parametrize("wrap", WRAPS)
def test_the_derivative_by_the_threshold(wrap):
    x, ct, v = jnp.array([0.3, -0.2]), np.array([3.0, 4.0]), np.array([0.7, -0.2])

    def by_limit(**parts):
        def change(limit):
            return jnp.vdot(
                v,
                WRAPS[wrap](jax.grad(lambda x: jnp.vdot(ct, clip_cotangent(x, limit, **parts))))(x),
            )

        return jax.jit(jax.vmap(jax.grad(change)))

    np.testing.assert_allclose(by_limit()(jnp.array([2.0, 6.0])), [v @ ct / 5, 0], rtol=1e-6)
    np.testing.assert_allclose(
        by_limit(**BY_VALUE)(jnp.array([2.0, 3.5])), [v.sum(), v[1]], rtol=1e-6
    )
    # the value does not depend on it
    assert jax.grad(lambda limit: jnp.sum(clip_cotangent(x, limit)))(1.0) == 0


@pytest.mark.parametrize("name", BY_HAND)
def test_the_derivative_by_the_threshold_through_a_scanned_network(name):
    (parts, by_hand), limit, (params, x) = BY_HAND[name], LIMITS[name], inputs()
    with float64():
        found = float(
            jax.jit(jax.grad(lambda c: jnp.sum(jax.grad(rnn_loss)(params, x, c, parts)["rec"])))(
                limit
            )
        )
    low, high = (
        rnn_by_hand(params, x, by_hand(limit + h))[1][0]["rec"].sum() for h in (-1e-6, 1e-6)
    )
    assert abs(found) > 1e-2
    np.testing.assert_allclose(found, (high - low) / 2e-6, rtol=1e-5)


def test_second_derivatives_are_finite_at_a_zero_gradient():
    second = jax.jit(jax.hessian(lambda x: jnp.sum(clip_cotangent(x, 0.5) ** 2)))(jnp.zeros(2))
    np.testing.assert_allclose(second, 2 * np.eye(2))


# Cells of Flax, by hand


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


class Hand:
    """One cell in NumPy: `forward` keeps what `backward` needs, and `cut` notes where it clips."""

    def __init__(self, gate_limit, activation_limit):
        self.limits, self.cuts = (gate_limit, activation_limit), {}

    def cut(self, name, derivative, activation=False):
        limit = self.limits[activation]
        self.cuts.setdefault(name, []).append((np.abs(derivative) > limit).mean())
        return np.clip(derivative, -limit, limit)


class LSTM(Hand):
    gates = "ifgo"

    def forward(self, carry, zx, zh):
        c, _ = carry
        zi, zf, zg, zo = np.split(zx + zh, 4, -1)
        i, f, g, o = sigmoid(zi), sigmoid(zf), np.tanh(zg), sigmoid(zo)
        new = f * c + i * g
        return (new, o * np.tanh(new)), (c, i, f, g, o, np.tanh(new))

    def backward(self, kept, dcarry):
        c, i, f, g, o, out = kept
        dc, dh = dcarry
        dc = dc + self.cut("cell", dh * o * (1 - out**2), activation=True)
        dz = [
            self.cut("i", dc * g * i * (1 - i)),
            self.cut("f", dc * c * f * (1 - f)),
            self.cut("g", dc * i * (1 - g**2), activation=True),
            self.cut("o", dh * out * o * (1 - o)),
        ]
        return (dc * f, 0), np.concatenate(dz, -1), np.concatenate(dz, -1)


class GRU(Hand):
    gates = "rzn"

    def forward(self, carry, zx, zh):
        (h,) = carry
        (xr, xz, xn), (hr, hz, hn) = np.split(zx, 3, -1), np.split(zh, 3, -1)
        r, z = sigmoid(xr + hr), sigmoid(xz + hz)
        n = np.tanh(xn + r * hn)
        return ((1 - z) * n + z * h,), (h, hn, r, z, n)

    def backward(self, kept, dcarry):
        h, hn, r, z, n = kept
        (dh,) = dcarry
        dn = self.cut("n", dh * (1 - z) * (1 - n**2), activation=True)
        dr, dz = self.cut("r", dn * hn * r * (1 - r)), self.cut("z", dh * (h - n) * z * (1 - z))
        return (dh * z,), np.concatenate([dr, dz, dn], -1), np.concatenate([dr, dz, dn * r], -1)


class Simple(Hand):
    gates = ("",)

    def forward(self, carry, zx, zh):
        h = np.tanh(zx + zh)
        return (h,), h

    def backward(self, h, dcarry):
        dz = self.cut("z", dcarry[0] * (1 - h**2), activation=True)
        return (0,), dz, dz


def through_time(hand, wx, wh, x, weights):
    """Derivatives of `sum(outputs * weights)` by both kernels and by the inputs `[time, batch,
    features]`.
    """
    carry, kept = (np.zeros((x.shape[1], len(wh))),) * (2 if isinstance(hand, LSTM) else 1), []
    for now in x:
        before = carry[-1]
        carry, keep = hand.forward(carry, now @ wx, before @ wh)
        kept.append((before, keep))
    dcarry, dx, dwx, dwh = (0,) * len(carry), [], np.zeros_like(wx), np.zeros_like(wh)
    for now, weight, (before, keep) in reversed(list(zip(x, weights, kept, strict=True))):
        dcarry, dzx, dzh = hand.backward(keep, (*dcarry[:-1], dcarry[-1] + weight))
        dwx, dwh = dwx + now.T @ dzx, dwh + before.T @ dzh
        dcarry, dx = (*dcarry[:-1], dcarry[-1] + dzh @ wh.T), [dzx @ wx.T, *dx]
    return dwx, dwh, np.stack(dx)


def kernels(params, gates):
    """Both kernels of a cell, with its gates side by side, from the many ways that Flax stores
    them.
    """
    if "dense_i" in params:
        return params["dense_i"]["kernel"], params["dense_h"]["kernel"]
    names = {
        side: [
            next(name for name in (side + gate, side + gate + "_") if name in params)
            for gate in gates
        ]
        for side in "ih"
    }
    return tuple(
        np.concatenate([params[name]["kernel"] for name in names[side]], -1) for side in "ih"
    )


def linen_cell(kind, functions):
    cell = getattr(nn, kind)(4, dtype=jnp.float64, param_dtype=jnp.float64, **functions)
    carry = jax.tree.map(jnp.zeros_like, cell.initialize_carry(jax.random.key(0), (5, 3)))
    params = cell.init(jax.random.key(0), carry, jnp.zeros((5, 3)))["params"]

    def apply(params, x):
        return jax.lax.scan(lambda carry, x: cell.apply({"params": params}, carry, x), carry, x)[1]

    return params, apply, lambda params: params


def nnx_cell(kind, functions):
    cell = getattr(nnx, kind)(
        3, 4, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **functions
    )
    carry = jax.tree.map(jnp.zeros_like, cell.initialize_carry((5, 3), rngs=nnx.Rngs(0)))
    graphdef, params, rest = nnx.split(nnx.RNN(cell, time_major=True), nnx.Param, ...)

    def apply(params, x):
        return nnx.merge(graphdef, params, rest)(x, initial_carry=carry)

    return params, apply, lambda params: nnx.to_pure_dict(params)["cell"]


CELLS = {
    "LSTMCell": (LSTM, 0.03, 0.3),
    "OptimizedLSTMCell": (LSTM, 0.03, 0.3),
    "GRUCell": (GRU, 0.05, 0.5),
    "SimpleCell": (Simple, None, 1.0),
}


@pytest.mark.parametrize("make", [linen_cell, nnx_cell], ids=["linen", "nnx"])
@pytest.mark.parametrize("kind", CELLS)
def test_a_cell_equals_back_propagation_through_time_by_hand(kind, make):
    hand_cell, *limits = CELLS[kind]
    hand = hand_cell(*limits)
    plain = {"gate_fn": nnx.sigmoid, "activation_fn": nnx.tanh}
    functions = {
        name: clip_activation_grad(f, c)
        for (name, f), c in zip(plain.items(), limits, strict=True)
        if c is not None
    }
    x, weights = random(6, 5, 3, seed=2), random(6, 5, 4, seed=3, scale=2.0)
    with float64():
        params, apply, cell = make(kind, functions)
        params = jax.tree.map(lambda p: 1.5 * p, params)
        grads, dx = jax.jit(
            jax.grad(lambda params, x: jnp.sum(apply(params, x) * weights), (0, 1))
        )(params, x)
        _, unclipped, _ = make(kind, {})
        np.testing.assert_array_equal(jax.jit(apply)(params, x), jax.jit(unclipped)(params, x))
    expected = through_time(hand, *map(np.asarray, kernels(cell(params), hand.gates)), x, weights)
    for found, want in zip((*kernels(cell(grads), hand.gates), dx), expected, strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-9, atol=1e-12)
    for (
        name,
        shares,
    ) in (
        hand.cuts.items()
    ):  # every limit binds for some elements, at some steps more than at others
        assert (
            len(shares) == 6
            and 0.01 < np.mean(shares) < 0.9
            and max(shares) < 1
            and len(set(shares)) > 1
        ), name


def test_without_a_binding_limit_a_cell_has_its_plain_gradients():
    x, carry = jnp.ones((5, 3)), (jnp.ones((5, 4)), jnp.ones((5, 4)))

    def grads(limit):
        wrap = (lambda f: f) if limit is None else lambda f: clip_activation_grad(f, limit)
        cell = nn.OptimizedLSTMCell(4, gate_fn=wrap(nn.sigmoid), activation_fn=wrap(nn.tanh))
        params = cell.init(jax.random.key(0), carry, x)
        return jax.grad(lambda params: jnp.sum(cell.apply(params, carry, x)[1] ** 2))(params)

    assert same_bits(grads(1e3), grads(None)) and same_bits(grads(jnp.inf), grads(None))
    assert not same_bits(grads(1e-3), grads(None))


# The activation function


def test_an_activation_clips_what_comes_out_of_it_backwards_not_what_goes_in():
    z = jnp.array([0.0, 3.0, -0.5])
    back = jax.grad(
        lambda z: jnp.sum(jnp.array([1.5, 40.0, -1.5]) * clip_activation_grad(jnp.tanh, 1.0)(z))
    )(z)
    expected = np.clip(np.array([1.5, 40.0, -1.5]) * (1 - np.tanh(z) ** 2), -1, 1)
    np.testing.assert_allclose(back, expected, rtol=1e-4)
    assert expected[1] < 1 < 1.5  # the derivative by the output would have been cut there


def test_activations_of_equal_arguments_are_equal():
    one, same, also = (
        clip_activation_grad(nn.tanh, 10.0),
        clip_activation_grad(nn.tanh, 10.0),
        clip_activation_grad(nn.tanh, np.float32(10)),
    )
    assert one == same == also and hash(one) == hash(same) == hash(also)
    assert (
        one != clip_activation_grad(nn.tanh, 1.0)
        and one != clip_activation_grad(nn.sigmoid, 10.0)
        and one != nn.tanh
    )
    assert len({one, same, also, clip_activation_grad(nn.relu, 10.0)}) == 2


def test_modules_of_equal_arguments_are_equal_and_compiled_once():
    def linen_module(limit):
        return nn.OptimizedLSTMCell(
            4,
            gate_fn=clip_activation_grad(nn.sigmoid, limit),
            activation_fn=clip_activation_grad(nn.tanh, limit),
        )

    def nnx_module(limit):
        functions = {
            "gate_fn": clip_activation_grad(nn.sigmoid, limit),
            "activation_fn": clip_activation_grad(nn.tanh, limit),
        }
        return nnx.OptimizedLSTMCell(3, 4, rngs=nnx.Rngs(0), **functions)

    assert linen_module(1.0) == linen_module(1.0) != linen_module(2.0)
    for make, jit in (
        (linen_module, functools.partial(jax.jit, static_argnums=0)),
        (nnx_module, nnx.jit),
    ):
        traces = []

        @jit
        def run(module, x):
            traces.append(module)
            return x

        for limit, count in (1.0, 1), (1.0, 1), (2.0, 2):
            run(make(limit), jnp.ones(2))
            assert len(traces) == count


def test_an_activation_keeps_its_name_and_documentation():
    function = clip_activation_grad(nn.sigmoid, 1.0)
    assert (
        function.__name__ == "sigmoid"
        and function.__doc__ == nn.sigmoid.__doc__
        and function.__wrapped__ is nn.sigmoid
    )
    assert not hasattr(clip_activation_grad(nn.relu, 1.0), "jvp")  # of the function itself
    z = jnp.array([-1.0, 2.0])
    np.testing.assert_array_equal(function(z), nn.sigmoid(z))
    for nameless in functools.partial(nn.leaky_relu, negative_slope=0.1), lambda z: 2 * z, nn.relu:
        np.testing.assert_array_equal(clip_activation_grad(nameless, 1.0)(z), nameless(z))


@pytest.mark.parametrize("make", ["linen", "nnx"])
def test_a_sweep_over_limits_of_an_activation_is_one_program(make):
    x, carry = jnp.ones((5, 3)), (jnp.ones((5, 4)), jnp.ones((5, 4)))

    def total(grads):
        return sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(grads))

    def size(limit):
        functions = {
            "gate_fn": clip_activation_grad(nn.sigmoid, limit),
            "activation_fn": clip_activation_grad(nn.tanh, limit),
        }
        if make == "linen":
            cell = nn.OptimizedLSTMCell(4, **functions)
            params = cell.init(jax.random.key(0), carry, x)
            return total(jax.grad(lambda params: jnp.sum(cell.apply(params, carry, x)[1]))(params))
        graphdef, params = nnx.split(nnx.OptimizedLSTMCell(3, 4, rngs=nnx.Rngs(0), **functions))
        return total(
            jax.grad(lambda params: jnp.sum(nnx.merge(graphdef, params)(carry, x)[1]))(params)
        )

    limits = [0.0, 1e-3, 1e-2, 10.0]
    swept = jax.jit(jax.vmap(size))(jnp.array(limits))
    np.testing.assert_allclose(swept, [jax.jit(size)(limit) for limit in limits], rtol=1e-5)
    assert swept[0] == 0 and (np.diff(swept) > 0).all()


# What is refused, and where: at the call, also if nothing is differentiated

RULES = [
    optax.linear_schedule(1.0, 0.1, 10),
    fixed.scheduled(optax.linear_schedule(1.0, 0.1, 10)),
    thresholds.zscore(),
    thresholds.relative_to_params(0.1),
    {"tree": thresholds.ema()},
    {"tree": lambda step: 1.0},
]


@pytest.mark.parametrize(
    "threshold",
    RULES,
    ids=["schedule", "rule of a schedule", "learns", "relative", "in a dict", "schedule in a dict"],
)
def test_a_threshold_that_needs_steps_memory_or_parameters_is_refused(threshold):
    message = (
        "^threshold must be a number( or a rule such as .*)?, got .*; "
        r"a backward pass has neither steps nor memory, so pass .* schedule\(step\)$"
    )
    with pytest.raises(TypeError, match=message):
        clip_cotangent(jnp.ones(2), threshold)


REFUSED = [
    (
        {"threshold": "1.0"},
        TypeError,
        "threshold must be a real number, got '1.0' (str); pass a float such as 1.0",
    ),
    ({"threshold": None}, TypeError, "threshold must be a real number, got None"),
    ({"threshold": True}, TypeError, "threshold must be a real number, got True"),
    ({"threshold": 1j}, TypeError, "threshold must be a real number, got 1j"),
    (
        {"threshold": -1.0},
        ValueError,
        "threshold must be in [0, inf], got -1.0; pass a number inside",
    ),
    ({"threshold": np.nan}, ValueError, "threshold must be in [0, inf], got nan"),
    (
        {"threshold": jnp.ones(2)},
        ValueError,
        "threshold must be one number, got an array of shape (2,)",
    ),
    ({"threshold": {"tree": -1.0}}, ValueError, "threshold['tree'] must be in [0, inf], got -1.0"),
    ({"threshold": {"tree": None}}, TypeError, "threshold['tree'] must be a real number, got None"),
    (
        {"threshold": {"body": 1.0}},
        ValueError,
        "threshold has limits for ['body'], but the tree has only the groups ['tree']",
    ),
    (
        {"threshold": {}},
        ValueError,
        "threshold has no limit for the groups ['tree']; add one for each",
    ),
    ({"scope": scopes.leaf}, TypeError, "scope must be a Scope, got <function leaf"),
    ({"norm": norms.l2}, TypeError, "norm must be a Norm, got <function l2"),
    (
        {"norm": norms.relative_linf(0.1, 1e-3)},
        TypeError,
        "norm must not be relative to parameters, got norms.relative_linf(",
    ),
    (
        {"response": "rescale"},
        TypeError,
        "response must be a function, got 'rescale'; pass one such as responses.rescale",
    ),
]


@pytest.mark.parametrize(
    "arguments, error, message", REFUSED, ids=[message[:40] for *_, message in REFUSED]
)
def test_bad_arguments_are_refused_at_the_call(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        clip_cotangent(jnp.ones(2), **{"threshold": 1.0} | arguments)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (
            (1.0, 1.0),
            TypeError,
            "activation must be a function, got 1.0; pass one such as jax.nn.tanh",
        ),
        (
            (jnp.tanh, "1"),
            TypeError,
            "limit must be a real number, got '1' (str); pass a float such as 1.0",
        ),
        (
            (jnp.tanh, {"tree": 1.0}),
            TypeError,
            "limit must be a real number, got {'tree': 1.0} (dict)",
        ),
        ((jnp.tanh, lambda step: 1.0), TypeError, "limit must be a real number, got <function"),
        ((jnp.tanh, -1.0), ValueError, "limit must be in [0, inf], got -1.0; pass a number inside"),
        ((jnp.tanh, np.nan), ValueError, "limit must be in [0, inf], got nan"),
        (
            (jnp.tanh, np.ones(2)),
            ValueError,
            "limit must be one number, got an array of shape (2,)",
        ),
    ],
)
def test_bad_arguments_of_an_activation_are_refused_when_it_is_made(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        clip_activation_grad(*arguments)
