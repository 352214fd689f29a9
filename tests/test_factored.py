"""Gradients as factors: norms and sums are those of gradients that are stored for each example,
whatever the model.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import optaxclip
from optaxclip import _factored, per_example

BATCH = 4


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def tokens(*shape, high=40, low=0, seed=0):
    return np.random.default_rng([seed, *shape]).integers(low, high, shape)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()


def paths_of(params):
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]


def check(loss, params, *batch, factored, rtol=1e-5):
    """Compares with the stored gradients in float64, and the paths of the leaves that are factors
    with `factored`.
    """
    weights = np.random.default_rng(0).uniform(size=len(batch[0])).astype(np.float32)
    paths, found = paths_of(params), set()

    @jax.jit
    def run(params, *batch):
        stored = jax.vmap(jax.grad(loss), (None, *[0] * len(batch)))(params, *batch)
        gradients = jax.vmap(
            lambda *one: _factored.factored_grad(lambda *args: (loss(*args), None), params, *one)[1]
        )(*batch)
        found.update(path for path, x in zip(paths, gradients, strict=True) if isinstance(x, tuple))
        squares = [jax.vmap(_factored.squares)(x) for x in gradients]
        return (
            jax.tree.leaves(stored),
            squares,
            [_factored.weighted_sum(x, weights) for x in gradients],
        )

    for path, stored, squares, total in zip(paths, *run(params, *batch), strict=True):
        wide = np.asarray(stored.astype(jnp.float32), np.float64).reshape(len(weights), -1)
        want = (wide**2).sum(1)
        assert want.max() > 0, path
        np.testing.assert_allclose(
            squares, want, rtol=rtol, atol=rtol * 1e-3 * want.max(), err_msg=path
        )
        want = weights.astype(np.float64) @ wide
        assert total.shape == stored.shape[1:] and total.dtype == jnp.float32
        np.testing.assert_allclose(
            np.ravel(total), want, rtol=rtol, atol=rtol * np.abs(want).max(), err_msg=path
        )
    assert found == set(factored)


def matrices(params):
    return [path for path in paths_of(params) if "kernel" in path or "embedding" in path]


# One weight `w`, or two, in `sum(sin(output(params, x)))`: the shape of x, and which weights are
# factors


ONE = {
    "vector": ((32,), lambda p, x: x @ p["w"], "w"),
    "matrix": ((2, 32), lambda p, x: x @ p["w"], "w"),
    "three axes": ((2, 3, 32), lambda p, x: x @ p["w"], "w"),
    "from the left": ((32, 3), lambda p, x: p["w"] @ x, "w"),
    "too many positions": ((16, 32), lambda p, x: x @ p["w"], ""),
    "transposed": ((2, 32), lambda p, x: x @ p["w"].T, "w"),
    "shared": ((2, 32), lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], "w"),
    "shared three times": (
        (2, 32),
        lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"]) @ p["w"],
        "w",
    ),
    "shared, transposed": ((2, 32), lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, "w"),
    "shared, transposed twice": (
        (2, 32),
        lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"].T) @ p["w"]) @ p["w"].T,
        "w",
    ),
    "scaled": ((2, 32), lambda p, x: x @ (0.3 * p["w"]), "w"),
    "scaled by data": ((2, 32), lambda p, x: x @ (jnp.max(x) * p["w"]), "w"),
    "negated": ((2, 32), lambda p, x: x @ -p["w"], "w"),
    "divided": ((2, 32), lambda p, x: x @ (p["w"] / 3), "w"),
    "divided by data": ((2, 32), lambda p, x: x @ (p["w"] / (1 + jnp.max(x))), "w"),
    "unit axes": ((2, 32), lambda p, x: x @ jnp.squeeze(p["w"][None, :, None], (0, 2)), "w"),
    "reshaped": ((2, 32), lambda p, x: x @ p["w"].reshape(16, 64).reshape(32, 32), ""),
    "sliced": ((2, 32), lambda p, x: x @ p["w"][:, :24], ""),
    "split": (
        (2, 32),
        lambda p, x: sum(
            i * jnp.sin(x @ part) for i, part in enumerate(jnp.split(p["w"], 2, 1), 1)
        ),
        "",
    ),
    "vmap": ((3, 32), lambda p, x: jax.vmap(lambda t: jnp.cos(t @ p["w"]))(x), "w"),
    "map": ((3, 32), lambda p, x: jax.lax.map(lambda t: jnp.cos(t @ p["w"]), x), "w"),
    "jit": ((2, 32), lambda p, x: jax.jit(lambda w, x: x @ w)(p["w"], x), "w"),
    "fori_loop": (
        (2, 32),
        lambda p, x: jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"]), x),
        "w",
    ),
    "cond": ((2, 32), lambda p, x: jax.lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x @ p["w"]), "w"),
    "gradient": ((2, 32), lambda p, x: jax.grad(lambda x: jnp.sum(jnp.sin(x @ p["w"])))(x), "w"),
    "functions of data": (
        (2, 32),
        lambda p, x: jax.nn.relu(optaxclip.clip_cotangent(x, 1.0)) @ p["w"],
        "w",
    ),
    "clipped backward": (
        (2, 32),
        lambda p, x: optaxclip.clip_cotangent(jnp.sin(x @ p["w"]), 0.1),
        "w",
    ),
    "weight decay": ((2, 32), lambda p, x: jnp.append(x @ p["w"], 0.1 * jnp.sum(p["w"] ** 2)), ""),
    "complex": (
        (2, 32),
        lambda p, x: jnp.abs(
            jax.lax.complex(x, 1 - x) @ jax.lax.complex(p["w"], jnp.zeros((32, 32), jnp.float32))
        ),
        "",
    ),
}
TWO = {
    "concatenated": ((2, 32), lambda p, x: x @ jnp.concatenate([p["w"], p["v"]], 1), "wv"),
    "concatenated below": ((2, 64), lambda p, x: x @ jnp.concatenate([p["w"], p["v"]]), "wv"),
    "stacked": (
        (2, 32),
        lambda p, x: jnp.einsum("td,kdf->ktf", x, jnp.stack([p["w"], p["v"]])),
        "wv",
    ),
    "sum": ((2, 32), lambda p, x: x @ (p["w"] + 2 * p["v"]), "wv"),
    "product": ((2, 32), lambda p, x: x @ (p["w"] @ p["v"]), ""),
    "one in two places": ((2, 32), lambda p, x: (x @ p["w"]) @ p["v"] @ p["w"], "wv"),
}
EXPERTS = {
    "experts": (lambda p, x: jnp.einsum("etd,edf->etf", x, p["w"]), "w"),
    "experts, transposed": (lambda p, x: jnp.einsum("etf,edf->etd", x, p["w"]), "w"),
    "experts, shared": (
        lambda p, x: jnp.einsum(
            "etf,egf->etg", jnp.tanh(jnp.einsum("etd,edf->etf", x, p["w"])), p["w"]
        ),
        "w",
    ),
    "experts and one of them": (
        lambda p, x: jnp.einsum("etd,edf->etf", x, p["w"]) + jnp.sin(x[0] @ p["w"][0]),
        "",
    ),
}


def check_output(output, params, *batch, factored):
    check(lambda p, *one: jnp.sum(jnp.sin(output(p, *one))), params, *batch, factored=factored)


@pytest.mark.parametrize("name", ONE)
def test_products_of_one_weight(name):
    shape, output, factored = ONE[name]
    check_output(
        output, {"w": normal(32, 32) / 6}, normal(BATCH, *shape, seed=2), factored=factored
    )


@pytest.mark.parametrize("name", TWO)
def test_products_of_two_weights(name):
    shape, output, factored = TWO[name]
    params = {"v": normal(32, 32) / 6, "w": normal(32, 32, seed=1) / 6}
    check_output(output, params, normal(BATCH, *shape, seed=2), factored=factored)


@pytest.mark.parametrize("name", EXPERTS)
def test_products_with_common_axes(name):
    output, factored = EXPERTS[name]
    check_output(
        output, {"w": normal(3, 32, 32) / 6}, normal(BATCH, 3, 2, 32, seed=2), factored=factored
    )


OPERATIONS = {
    "transposed": lambda w, n: w.T,
    "with a unit axis": lambda w, n: jnp.squeeze(w.reshape(1, *w.shape), 0),
    "without a unit axis": lambda w, n: jnp.squeeze(w[:, None], 1),
    "scaled": lambda w, n: 0.7 * w,
    "negated": lambda w, n: -w,
    "divided": lambda w, n: w / 1.3,
    "beside itself": lambda w, n: jnp.concatenate([w, 2 * w], n % 2),
    "sliced": lambda w, n: jax.lax.slice_in_dim(w, n, w.shape[n % 2] - 2, axis=n % 2),
}
steps = st.lists(
    st.tuples(st.sampled_from(list(OPERATIONS)), st.integers(0, 3)), max_size=3
).filter(lambda chain: sum(name == "beside itself" for name, _ in chain) <= 1)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(steps, steps)
def test_chains_of_operations_on_two_uses_of_a_weight(one, two):
    x = normal(BATCH, 2, 100)

    def output(p, x):
        results = []
        for scale, chain in (1.0, one), (1.3, two):  # equal ones would cancel where one is negated
            w = p["w"]
            for name, n in chain:
                w = OPERATIONS[name](w, n)
            results.append(scale * jnp.sin(x[:, : len(w)] @ w).ravel())
        return jnp.concatenate(results)

    whole = all(name != "sliced" for name, _ in one + two)  # the gradient of a slice is padded
    check_output(output, {"w": normal(40, 36) / 6}, x, factored="w" if whole else "")


# Loops


def loop(p, x):
    return jax.lax.scan(
        lambda h, t: (jnp.tanh(h @ p["w"] + t), None), jnp.zeros(32, jnp.float32), x
    )[0]


def decaying(p, x):
    return jax.lax.scan(
        lambda h, t: (h * 0.9 + t @ p["w"], None), jnp.zeros(32, jnp.float32), x, reverse=True
    )[0]


def nested(p, x):
    """A row after the other."""

    def row(h, ts):
        return jax.lax.scan(lambda h, t: (jnp.tanh(h @ p["w"] + t), None), h, ts)

    return jax.lax.scan(row, jnp.zeros(32, jnp.float32), x.reshape(2, 2, 32))[0]


def layers(p, x, wrap=lambda body: body):
    return jax.lax.scan(wrap(lambda h, w: (jnp.tanh(h @ w), None)), x, p["w"])[0]


def layers_over_time(p, x):
    def layer(h, w):
        return jax.lax.scan(
            lambda state, t: (jnp.tanh(state @ w + t),) * 2, jnp.zeros(32, jnp.float32), h
        )[1], None

    return jax.lax.scan(layer, x, p["w"])[0]


@pytest.mark.parametrize("output", [loop, decaying, nested])
def test_loops_over_time(output):
    check_output(output, {"w": normal(32, 32) / 6}, normal(BATCH, 4, 32, seed=2), factored="w")


LAYERS = {
    "plain": layers,
    "computed again": lambda p, x: layers(p, x, jax.checkpoint),
    "over time": layers_over_time,
}


@pytest.mark.parametrize("name", LAYERS)
def test_loops_over_layers(name):
    check_output(
        LAYERS[name], {"w": normal(3, 32, 32) / 6}, normal(BATCH, 4, 32, seed=2), factored="w"
    )


def dropped_out(p, x, key):
    def step(carry, t):
        h, key = carry
        key, own = jax.random.split(key)
        return (jnp.tanh(h @ p["w"] + t) * jax.random.bernoulli(own, 0.5, h.shape), key), None

    return jax.lax.scan(step, (jnp.zeros(32, jnp.float32), key), x)[0][0]


def dropped_out_again(p, x, key):
    layer = jax.checkpoint(
        lambda h, key: jnp.tanh(h @ p["w"]) * jax.random.bernoulli(key, 0.5, h.shape)
    )
    return layer(layer(x, key), key)


@pytest.mark.parametrize("output", [dropped_out, dropped_out_again])
def test_random_keys(output):
    x, keys = normal(BATCH, 3, 32, seed=2), jax.random.split(jax.random.key(0), BATCH)
    check_output(output, {"w": normal(32, 32) / 6}, x, keys, factored="w")


# Gradients that are handed over: what is taken for factors, and what is not


@jax.custom_vjp
def handed(param, gradient):
    """Zero, with this gradient for the parameter."""
    return 0.0 * jnp.sum(param * gradient)


handed.defvjp(
    lambda param, gradient: (0.0, gradient),
    lambda gradient, flowed: (flowed * gradient, jnp.zeros_like(gradient)),
)


def outer(a, b):
    return a[:, None] @ b[None]


def zeros():
    return jnp.zeros((32, 32), jnp.float32)


def accumulated(body, start=lambda x: zeros(), **options):
    return lambda x: jax.lax.scan(body, start(x), x, **options)


def both(x):
    return zeros(), zeros()


def inner_sum(c, t):
    return jax.lax.scan(lambda c, s: (c + outer(s, t), None), c, jnp.stack([t, 2 * t]))[0], None


def inner_rows(c, t):
    return c + outer(t, t), jax.lax.scan(lambda n, s: (n, outer(s, t)), 0, jnp.stack([t, 2 * t]))[1]


# What a loop carries away and what it gives out, and which of the two, `a` and `b`, are factors.
ACCUMULATED = {
    "sum": (accumulated(lambda c, t: (c + outer(t, t), None)), "a"),
    "sum from the left": (accumulated(lambda c, t: (outer(t, t) + c, None)), "a"),
    "sum of two": (
        accumulated(lambda c, t: (c + outer(t, t) - 2 * outer(t, 1 - t), None)),
        "",
    ),  # `sub` asks for numbers
    "sum and rows": (accumulated(lambda c, t: (c + outer(t, t), outer(t, -t))), "ab"),
    "reversed": (accumulated(lambda c, t: (c + outer(t, t), outer(t, 1 - t)), reverse=True), "ab"),
    "started": (
        accumulated(lambda c, t: (c + outer(t, t), None), lambda x: outer(x[0], x[1])),
        "a",
    ),
    "started with numbers": (
        accumulated(lambda c, t: (c + outer(t, t), None), lambda x: jnp.sin(outer(x[0], x[1]))),
        "",
    ),
    "not changed": (accumulated(lambda c, t: (c, None), lambda x: outer(x[0], x[1])), "a"),
    "replaced": (accumulated(lambda c, t: (outer(t, t), None)), ""),
    "decayed": (accumulated(lambda c, t: (c * 0.9 + outer(t, t), None)), ""),
    "negated": (accumulated(lambda c, t: (-c + outer(t, t), None)), ""),
    "doubled": (accumulated(lambda c, t: (c + c + outer(t, t), None)), ""),
    "transposed": (accumulated(lambda c, t: (c.T + outer(t, 1 - t), None)), ""),
    "read": (accumulated(lambda c, t: (c + outer(t, t) * (1 + c[0, 0]), None)), ""),
    "emitted before": (accumulated(lambda c, t: (c + outer(t, t), c)), ""),
    "emitted after": (accumulated(lambda c, t: (c + outer(t, t),) * 2), ""),
    "nested": (accumulated(inner_sum), "a"),
    "nested rows": (accumulated(inner_rows), "ab"),
}
CROSSED = {
    "each its own": (lambda c, t: ((c[0] + outer(t, t), c[1] + outer(t, 1 - t)), None), "ab"),
    "exchanged": (lambda c, t: ((c[1] + outer(t, t), c[0]), None), ""),
    "one to the other": (lambda c, t: ((c[0] + outer(t, t), c[1] + c[0]), None), ""),
    "one to both": (lambda c, t: ((c[0] + outer(t, t), c[0] + outer(t, 1 - t)), None), ""),
}


def check_handed(given, factored):
    like = jax.eval_shape(given, jnp.zeros((3, 32), jnp.float32))
    params = {
        name: np.zeros(x.shape, np.float32)
        for name, x in zip("ab", like, strict=True)
        if x is not None
    }
    x = normal(BATCH, 3, 32)
    check(
        lambda p, x: sum(map(handed, p.values(), (y for y in given(x) if y is not None))),
        params,
        x,
        factored=factored,
    )


@pytest.mark.parametrize("name", ACCUMULATED)
def test_only_plain_sums_and_rows_of_loops_are_factors(name):
    check_handed(*ACCUMULATED[name])


@pytest.mark.parametrize("name", CROSSED)
def test_only_sums_of_their_own_are_factors(name):
    body, factored = CROSSED[name]
    check_handed(lambda x: jax.lax.scan(body, both(x), x)[0], factored)


SHAPED = {
    "longer": (lambda x: jnp.broadcast_to(x[:1, :2] @ normal(2, 32), (30, 32)), ""),
    "with unit axes": (
        lambda x: jax.lax.broadcast_in_dim(outer(x[0], x[1]), (1, 32, 1, 32), (1, 3)),
        "a",
    ),
    "without unit axes": (
        lambda x: outer(x[0], x[1])[:, None].reshape(32, 32, 1)[..., 0].reshape(32, 32),
        "a",
    ),
    "part": (lambda x: outer(x[0], x[1])[3:30, 2:], "a"),
    "every second": (lambda x: outer(x[0], x[1])[::2], ""),
    "reversed": (lambda x: outer(x[0], x[1])[::-1], ""),
    "half of a split": (lambda x: jnp.split(outer(x[0], x[1]), 2, 1)[1], "a"),
    "sum over an axis": (lambda x: jnp.sum(outer(x[0], x[1]).reshape(32, 4, 8), 1), ""),
    "times numbers": (lambda x: outer(x[0], x[1]) * (1 + x[1]), ""),
    "times itself": (lambda x: outer(x[0], x[1]) * outer(x[0], x[1]), ""),
    "of numbers and factors": (lambda x: outer(x[0], x[1]) + jnp.cos(outer(x[0], x[1])), ""),
    "differently shared": (
        lambda x: outer(x[0], x[1]) + jnp.einsum("i,ij->ij", x[0], outer(x[1], x[2])),
        "",
    ),
}


@pytest.mark.parametrize("name", SHAPED)
def test_shapes_of_products(name):
    given, factored = SHAPED[name]
    check_handed(lambda x: (given(x), None), factored)


def test_what_cancels_is_not_below_zero():
    x = normal(200, 32)
    shrunk = [np.nextafter(np.float32(1), np.float32(0)), np.float32(1)]

    def both_uses(x, share):
        terms = _factored.factored_grad(
            lambda p, x: (handed(p, outer(x, x) + -(outer(x, x) * share)), None), zeros(), x
        )[1]
        return _factored.squares(terms[0])

    squares = np.concatenate(
        [jax.jit(jax.vmap(both_uses, (0, None)))(x, share) for share in shrunk]
    )
    assert (squares >= 0).all() and squares.max() < 1e-5 * np.sum(x[0] ** 2) ** 2


# Rows of a table

PLACES = {
    "inside": (tokens(BATCH, 5, high=6), {}),
    "several axes": (tokens(BATCH, 2, 3), {}),
    "negative": (tokens(BATCH, 5, low=-40), {}),
    "outside, wrapped": (tokens(BATCH, 5, low=-90, high=90), {"mode": "wrap"}),
    "outside, the next": (tokens(BATCH, 5, low=-90, high=90), {"mode": "clip"}),
    "outside, filled": (tokens(BATCH, 5, low=-90, high=90), {"mode": "fill", "fill_value": 0.0}),
    "bytes": (tokens(BATCH, 5).astype(np.uint8), {}),
}


@pytest.mark.parametrize("name", PLACES)
def test_rows_of_a_table(name):
    places, options = PLACES[name]
    output = lambda p, i: jnp.take(p["w"], i, axis=0, **options)  # noqa: E731
    check_output(output, {"w": normal(40, 32)}, places, factored="w")
    check_output(output, {"w": normal(40, 4, 8)}, places, factored="w")


ROWS = {
    "one": (tokens(BATCH), lambda p, i: p["w"][i], ""),  # as it happens, written as a slice
    "columns": (tokens(BATCH, 3, high=32), lambda p, i: p["w"][:, i], ""),
    "elements": (tokens(BATCH, 3, high=32), lambda p, i: p["w"][i, i], ""),
    "one-hot": (
        tokens(BATCH, 3),
        lambda p, i: jax.nn.one_hot(i, 40, dtype=jnp.float32) @ p["w"],
        "w",
    ),
    "twice": (tokens(BATCH, 3), lambda p, i: p["w"][i] + jnp.cos(p["w"][i + 1]), "w"),
    "tied": (tokens(BATCH, 3), lambda p, i: jnp.tanh(p["w"][i]) @ p["w"].T, "w"),
    "tied the other way": (
        tokens(BATCH, 3),
        lambda p, i: (p["w"] @ p["w"][i].T, p["w"][i])[0],
        "w",
    ),
    "twice and tied": (tokens(BATCH, 2), lambda p, i: (p["w"][i] * p["w"][i + 1]) @ p["w"].T, "w"),
    "scaled and transposed": (
        tokens(BATCH, 3),
        lambda p, i: (2 * p["w"].T)[:, None].squeeze(1).T[i],
        "w",
    ),
    "in a loop": (
        tokens(BATCH, 3),
        lambda p, i: jax.lax.scan(
            lambda h, k: (jnp.sin(h + p["w"][k[None]]), None), jnp.zeros((1, 32), jnp.float32), i
        )[0],
        "w",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_other_uses_of_tables(name):
    places, output, factored = ROWS[name]
    check_output(output, {"w": normal(40, 32)}, places, factored=factored)


def test_a_loop_over_tables():
    def tables(p, i, tied):
        def body(h, w):
            return jnp.tanh((h + w[i]) @ w.T @ w if tied else h + w[i]), None

        return jax.lax.scan(body, jnp.zeros((3, 32), jnp.float32), p["w"])[0]

    for tied in False, True:
        check_output(
            lambda p, i, tied=tied: tables(p, i, tied),
            {"w": normal(3, 40, 32) / 9},
            tokens(BATCH, 3),
            factored="",
        )


# Convolutions


CONVOLUTIONS = {
    "same": ((7, 7), {"kernel_size": (3, 3)}),
    "valid": ((7, 7), {"kernel_size": (3, 3), "padding": "VALID"}),
    "strides": ((7, 7), {"kernel_size": (3, 3), "strides": 2}),
    "strides with a rest": ((8, 7), {"kernel_size": (3, 2), "strides": (3, 2), "padding": "VALID"}),
    "dilated": ((7, 7), {"kernel_size": (3, 3), "kernel_dilation": 2, "padding": "VALID"}),
    "dilated input": (
        (5, 5),
        {"kernel_size": (3, 3), "input_dilation": 2, "strides": 2, "padding": 1},
    ),
    "padded": ((5, 5), {"kernel_size": (3, 3), "padding": ((2, 0), (1, 3)), "strides": 2}),
    "circular": ((7, 7), {"kernel_size": (3, 3), "padding": "CIRCULAR", "strides": 2}),
    "one axis": ((12,), {"kernel_size": 4, "strides": 2}),
    "causal": ((12,), {"kernel_size": (4,), "padding": "CAUSAL", "kernel_dilation": 2}),
    "grouped": ((3, 3), {"kernel_size": (3, 3), "feature_group_count": 2, "padding": "VALID"}),
    "each channel": ((3, 3), {"kernel_size": (3, 3), "feature_group_count": 96}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    space, options = CONVOLUTIONS[name]
    model, x = nn.Conv(96, **options), normal(3, *space, 96)
    params = model.init(jax.random.key(0), x[0])
    check_output(
        model.apply,
        params,
        x,
        factored=[] if "feature_group_count" in options else matrices(params),
    )


def test_a_convolution_of_groups_of_rows():
    def output(p, x):
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", batch_group_count=2, dimension_numbers=dimensions
        )

    check_output(output, {"w": normal(3, 3, 32, 96) / 9}, normal(3, 2, 4, 4, 32), factored="")


def test_a_transposed_convolution():
    model, x = nn.ConvTranspose(64, (3, 3), strides=(2, 2)), normal(3, 3, 3, 64)
    params = model.init(jax.random.key(0), x[0])
    check_output(model.apply, params, x, factored=matrices(params))


# Models


class Perceptron(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (32, 24):
            x = nn.relu(nn.Dense(width)(nn.LayerNorm()(x)))
        return nn.Dense(10)(nn.RMSNorm()(x))


class Reader(nn.Module):
    cell: nn.RNNCellBase

    @nn.compact
    def __call__(self, places):
        return nn.Dense(40)(nn.RNN(self.cell)(nn.Embed(40, 24)(places)))


class ReaderX(nnx.Module):
    def __init__(self, cell, rngs):
        self.embed, self.loop = nnx.Embed(40, 24, rngs=rngs), nnx.RNN(cell(24, 32, rngs=rngs))
        self.out = nnx.Linear(32, 40, rngs=rngs)

    def __call__(self, places):
        return self.out(self.loop(self.embed(places)[None])[0])


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.before, self.between = nnx.LayerNorm(width, rngs=rngs), nnx.RMSNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.up, self.down = (
            nnx.Linear(width, 4 * width, rngs=rngs),
            nnx.Linear(4 * width, width, rngs=rngs),
        )

    def __call__(self, x):
        x += self.attention(self.before(x), mask=nnx.make_causal_mask(jnp.ones(len(x))))
        return x + self.down(nnx.gelu(self.up(self.between(x))))


class Transformer(nnx.Module):
    def __init__(self, width, rngs):
        self.embed, self.block = nnx.Embed(90, width, rngs=rngs), Block(width, rngs)

    def __call__(self, places):
        return self.embed.attend(self.block(self.embed(places)))


def linen(model, x, loss=cross_entropy):
    params = model.init(jax.random.key(0), x[0])
    return lambda p, x, y: loss(model.apply(p, x), y), params


def stateless(model):
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, x, y):
        copies = jax.tree.map(lambda leaf: leaf, (params, rest))  # variables of this trace
        return cross_entropy(nnx.merge(graph, *copies)(x), y)

    return loss, params


def test_a_perceptron():
    x, y = normal(BATCH, 20), tokens(BATCH, high=10)
    loss, params = linen(Perceptron(), x)
    check(loss, params, x, y, factored=matrices(params))
    plan = per_example.clipped_grad(loss, 1.0).plan(params, x, y)
    assert plan == {
        path: "factors" if path in matrices(params) else "stored" for path in paths_of(params)
    }


@pytest.mark.parametrize("cell", [nn.OptimizedLSTMCell, nn.LSTMCell, nn.GRUCell])
def test_recurrent_cells(cell):
    places = tokens(3, 6)
    loss, params = linen(Reader(cell(32)), places)
    check(loss, params, places[:, :-1], places[:, 1:], factored=matrices(params))


@pytest.mark.parametrize("cell", [nnx.OptimizedLSTMCell, nnx.LSTMCell, nnx.GRUCell, nnx.SimpleCell])
def test_recurrent_cells_of_nnx(cell):
    places = tokens(3, 6)
    loss, params = stateless(ReaderX(cell, nnx.Rngs(0)))
    check(loss, params, places[:, :-1], places[:, 1:], factored=matrices(params))


def test_a_transformer_with_tied_embeddings():
    places = tokens(3, 6, high=90)
    loss, params = stateless(Transformer(32, nnx.Rngs(0)))
    check(loss, params, places[:, :-1], places[:, 1:], factored=matrices(params))


def test_low_precision():
    x, y = normal(BATCH, 20), tokens(BATCH, high=10)
    model = Perceptron()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.init(jax.random.key(0), x[0]))
    loss = lambda p, x, y: cross_entropy(model.apply(p, x.astype(jnp.bfloat16)), y)  # noqa: E731
    # gradients that are stored are rounded to bfloat16
    check(loss, params, x, y, factored=matrices(params), rtol=2**-7)


# Parameters of operations, which JAX may change in any version


def every_operation(p, x, places):
    """Uses each operation with a rule; the gradients by `w`, `kernel` and `table` are factors."""
    mixed = jnp.squeeze(jnp.concatenate(jnp.split(p["mixed"], 2, 1), 1)[None], 0).T.reshape(
        1, 64, 64
    )[0]
    mixed = (-mixed / 3 * 2).astype(jnp.bfloat16).astype(jnp.float32)
    h = jax.checkpoint(lambda h: jnp.sin(h @ mixed) @ mixed)(jax.jit(jnp.sin)(x @ mixed))
    h = jax.lax.scan(lambda h, t: (jnp.tanh(h @ p["w"] + t), None), h[0], h)[0]
    h = (
        h[None] @ jnp.concatenate([mixed, jnp.sin(mixed)], 1)[:, :64]
        + jnp.stack([h, h]) @ jnp.stack([mixed, mixed])[1]
    )
    image = jax.lax.conv_general_dilated(
        x[None], p["kernel"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    )
    return h.sum(0) + image.sum((0, 1)) + jnp.tanh(p["table"][places]).sum(0)


def operations(program):
    for equation in program.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
        ):
            yield from operations(getattr(value, "jaxpr", value)) if hasattr(value, "eqns") else ()


def all_operations():
    shapes = {"w": (64, 64), "mixed": (64, 64), "kernel": (3, 64, 64), "table": (40, 64)}
    p = {name: normal(*shape) / 9 for name, shape in shapes.items()}
    loss = lambda p, x, places: jnp.sum(every_operation(p, x, places) ** 2)  # noqa: E731
    return p, loss, jax.make_jaxpr(jax.value_and_grad(loss))(p, normal(2, 64), tokens(3))


def test_every_operation_that_has_a_rule_has_the_parameters_that_are_known():
    """If this fails on a new JAX, gradients through what it names are stored: bring its rule up to
    date.
    """
    found = {}
    for equation in operations(all_operations()[2].jaxpr):
        rule = _factored._RULES.get(equation.primitive.name)
        if rule:
            found.setdefault(
                equation.primitive.name, rule.knows(equation.params) or sorted(equation.params)
            )
    unknown = {name: options for name, options in found.items() if options is not True}
    assert not unknown, (
        f"jax {jax.__version__} has other parameters, and gradients are stored for each example: "
        f"{unknown}"
    )
    assert set(_factored._RULES) - set(found) <= {
        "pjit",
        "jit",
        "closed_call",
        "checkpoint",
        "remat2",
        "unstack",
        "copy",
    }


def gradients_of_all(monkeypatch, **rules):
    """The gradients of two examples as shapes: `stored` arrays, or terms; with these rules in place
    of the usual.
    """
    p, loss, _ = all_operations()
    for name, rule in rules.items():
        monkeypatch.setitem(_factored._RULES, name, rule)

    def both(*one):
        return _factored.factored_grad(lambda *args: (loss(*args), None), p, *one)[1]

    found = jax.eval_shape(jax.vmap(both), normal(2, 2, 64), tokens(2, 3))
    return {name for name, x in zip(sorted(p), found, strict=True) if isinstance(x, tuple)}


@pytest.mark.parametrize("name", sorted(_factored._RULES))
def test_an_operation_with_other_parameters_is_computed(monkeypatch, name):
    rule = _factored._RULES[name]
    known = rule.needed | rule.others
    options = dict.fromkeys(rule.needed)
    assert rule.knows(options) and rule.knows(dict.fromkeys(known))
    assert not rule.knows(options | {"new": None})
    assert not any(
        rule.knows(dict.fromkeys(known - {gone} | {gone + "_renamed"})) for gone in rule.needed
    )
    factored = gradients_of_all(monkeypatch)
    changed = gradients_of_all(
        monkeypatch, **{name: dataclasses.replace(rule, needed=rule.needed | {"renamed"})}
    )
    assert factored == {"kernel", "table", "w"} and changed <= factored
    if name in LOST:
        assert changed == factored - LOST[name]


LOST = {
    "dot_general": {"w"},
    "scan": {"w"},
    "conv_general_dilated": {"kernel"},
    "scatter-add": {"table"},
}


@pytest.mark.parametrize(
    "name",
    [
        "dot_general",
        "conv_general_dilated",
        "scatter-add",
        "scan",
        "jit",
        "remat2",
        "split",
        "slice",
        "transpose",
    ],
)
def test_parameters_of_another_structure_are_not_read(monkeypatch, name):
    rule = _factored._RULES[name]

    def outputs(inputs, equation):
        other = types.SimpleNamespace(
            **{key: getattr(equation, key) for key in ("primitive", "invars", "outvars", "ctx")}
        )
        other.params = {key: object() for key in equation.params}
        return rule.outputs(inputs, other)

    changed = gradients_of_all(monkeypatch, **{name: dataclasses.replace(rule, outputs=outputs)})
    assert changed == {"kernel", "table", "w"} - LOST.get(name, changed ^ {"kernel", "table", "w"})


def test_all_is_right_where_nothing_is_known(monkeypatch):
    p, loss, _ = all_operations()
    for name in _factored._RULES:
        monkeypatch.setitem(_factored._RULES, name, _factored.Rule(None, frozenset({"renamed"})))
    check(loss, p, normal(BATCH, 2, 64), tokens(BATCH, 3), factored=(), rtol=2**-7)


# The gradients of kernels that are stored: a product for each offset of the kernel


STORED_KERNELS = {
    "strides": {"window_strides": (2, 1), "padding": [(1, 2), (0, 3)]},
    "cut": {"window_strides": (1, 2), "padding": [(-1, 2), (1, -2)]},
    "dilated": {"rhs_dilation": (2, 3), "padding": "SAME", "window_strides": (1, 1)},
    "transposed": {"lhs_dilation": (2, 3), "padding": [(2, 1), (0, 2)], "window_strides": (1, 2)},
    "channels first": {"window_strides": (2, 2), "padding": "VALID"},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", STORED_KERNELS)
def test_gradients_of_kernels_by_their_offsets(case, dtype):
    specs = ("NCHW", "OIHW", "NCHW") if case == "channels first" else ("NHWC", "HWIO", "NHWC")
    options = {**STORED_KERNELS[case], "dimension_numbers": specs}
    rng = np.random.default_rng(0)
    shape, kernel = (
        ((2, 11, 12), (3, 2, 3, 2))
        if case == "channels first"
        else (
            (11, 12, 2),
            (3, 2, 2, 3),
        )
    )
    x = jnp.asarray(rng.normal(size=(4, *shape)), dtype)
    params = {"kernel": jnp.asarray(rng.normal(size=kernel) / 4, dtype)}

    def loss(params, x):
        out = jax.lax.conv_general_dilated(x[None], params["kernel"], **options)
        return (
            jnp.sum(jnp.tanh(out.astype(jnp.float32)) * jnp.arange(out.size).reshape(out.shape))
            / 50
        )

    clipped = per_example.clipped_grad(loss, np.inf, reduce="sum")
    assert clipped.plan(params, x) == {"kernel": "stored"}
    (_, seen), got = jax.jit(clipped)(params, x)
    each = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, x)["kernel"].astype(jnp.float32)
    tolerance = 2e-5 if dtype == "float32" else 3e-2
    np.testing.assert_allclose(
        np.asarray(got["kernel"], float),
        each.sum(0),
        rtol=tolerance,
        atol=tolerance * float(jnp.abs(each).max()),
    )
    sizes = jnp.sqrt(jnp.sum(each**2, (1, 2, 3, 4)))
    np.testing.assert_allclose(seen.sizes[:, 0], sizes, rtol=tolerance)


def test_no_convolution_has_a_group_for_each_example_and_loops_have_fast_ones():
    def loss(params, x):
        dimensions = ("NHWC", "HWIO", "NHWC")
        for name in "ab":
            x = jax.lax.conv_general_dilated(
                x[None], params[name], (1, 1), "SAME", dimension_numbers=dimensions
            )[0]
        return jnp.sum(jnp.tanh(x))

    params = {"a": jnp.ones((3, 3, 2, 4)), "b": jnp.ones((3, 3, 4, 2))}
    for size in None, 4:
        clipped = per_example.clipped_grad(loss, 1.0, microbatch=size)
        assert set(clipped.plan(params, jnp.ones((8, 9, 9, 2))).values()) == {"stored"}
        text = jax.jit(clipped).lower(params, jnp.ones((8, 9, 9, 2))).as_text()
        lines = [line for line in text.splitlines() if "stablehlo.convolution" in line]
        assert len(lines) == 3  # forward twice, and back to the first output
        assert all("feature_group_count = 1 :" in line for line in lines)
        assert all("[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" in line for line in lines)
