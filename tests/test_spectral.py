"""Clipping of singular values, against float64 decompositions in NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import Literal
from precision import float64

import optaxclip
from optaxclip import responses, thresholds

SHAPES = [(4, 3), (3, 4), (5, 5), (1, 6), (2, 6, 3), (2, 3, 2, 4), (7,), ()]


def hard(s, c):
    return np.minimum(s, c)


def soft(s, c):
    return s / np.sqrt(1 + (s / c) ** 2)


FORMS = {
    "hard": ({}, hard),
    "soft": ({"response": responses.smooth}, soft),
    "soft-products": ({"response": responses.smooth, "iterations": 12}, soft),
    "zero": ({"response": responses.drop}, lambda s, c: np.where(s > c, 0, s)),
    "normalize": ({"response": responses.normalize}, lambda s, c: np.where(s > 0, c, s)),
}


def clipped(x, limit, **options):
    clip = optaxclip.spectral_clip(limit, **options)
    return clip.update(x, clip.init(x))


def reference(x, limit, response):
    matrices = np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64)
    u, s, vh = np.linalg.svd(
        matrices if matrices.ndim > 1 else matrices.reshape(1, -1), full_matrices=False
    )
    return ((u * response(s, limit)[..., None, :]) @ vh).reshape(np.shape(x))


def random(shape, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    real = rng.standard_normal(shape)
    return (
        real + 1j * rng.standard_normal(shape) if np.issubdtype(dtype, np.complexfloating) else real
    ).astype(dtype)


def largest(x):
    return np.linalg.norm(np.atleast_2d(np.asarray(x, np.float64)), 2, axis=(-2, -1)).max()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_a_float64_decomposition_at_every_scale(form, shape):
    options, response = FORMS[form]
    run = jax.jit(lambda x, limit: clipped(x, limit, **options)[0])
    for scale in 1e-30, 1e-3, 1.0, 1e30:
        x = random(shape) * np.float32(scale)
        for share in 0.1, 0.7, 2.0:
            limit = np.float32(share * largest(x))
            want = reference(x, np.float64(limit), response)
            np.testing.assert_allclose(
                run(x, limit), want, rtol=0, atol=3e-6 * max(np.abs(want).max(), 1e-37)
            )


@pytest.mark.parametrize("form", ["hard", "soft", "soft-products"])
def test_the_largest_floats_are_clipped_as_well(form):
    options, response = FORMS[form]
    run = jax.jit(lambda x: clipped(x, 1e38, **options)[0])
    np.testing.assert_allclose(
        jnp.diag(run(jnp.diag(jnp.array([3e38, 5e37])))),
        response(np.array([3e38, 5e37]), 1e38),
        rtol=1e-5,
    )


@pytest.mark.parametrize("form", ["hard", "soft"])
def test_complex_matrices_keep_their_basis(form):
    options, response = FORMS[form]
    x = random((4, 3), 1, np.complex64)
    out, _ = clipped(x, 1.5, **options)
    assert out.dtype == jnp.complex64
    np.testing.assert_allclose(out, reference(x, 1.5, response), atol=3e-6)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31 - 1), share=st.floats(1.0, 3.0))
def test_within_the_limit_the_same_bits(seed, share):
    x = random((4, 3), seed)
    out, state = clipped(x, np.float32(share * largest(x) * (1 + 1e-5)))
    assert np.asarray(out).tobytes() == x.tobytes()
    assert state.reading.clipped_steps == 0


def test_matrices_in_a_leaf_are_clipped_by_themselves():
    x = np.stack([np.eye(2), 5 * np.eye(2)]).astype(np.float32)
    out, state = clipped(x, 2.0)
    np.testing.assert_allclose(out, [np.eye(2), 2 * np.eye(2)], rtol=1e-6)
    np.testing.assert_allclose(state.reading.size_before, [5.0], rtol=1e-6)
    np.testing.assert_allclose(state.reading.size_after, [2.0], rtol=1e-6)
    np.testing.assert_allclose(state.reading.clipped_share, [0.5])  # one of two matrices
    for record, share in (True, 1), ("full", 0.5):  # some singular value was; a half of them
        reading = clipped(x, 2.0, scope="value", record=record)[1].reading
        np.testing.assert_allclose(reading.clipped_share, [share])


def test_a_vector_is_clipped_by_its_norm_without_a_jump_at_the_limit():
    for norm in 0.5, 0.999, 1.0, 1.001, 5.0:
        for options in (
            {},
            {"response": responses.smooth},
            {"response": responses.smooth, "iterations": 10},
        ):
            out, _ = clipped(jnp.array([0.6, 0.8]) * norm, 1.0, **options)
            want = soft(norm, 1.0) if options else min(norm, 1.0)
            np.testing.assert_allclose(out, np.array([0.6, 0.8]) * want, rtol=2e-6)


@pytest.mark.parametrize("iterations", [8, 10, 15])
def test_products_are_within_a_thousandth_up_to_the_stated_norm(iterations):
    def error(x):
        out, _ = clipped(x, 1.0, response=responses.smooth, iterations=iterations)
        assert largest(out) <= 1.0
        s = np.linalg.svd(x.astype(np.float64), compute_uv=False)
        want = reference(x, 1.0, soft)
        return np.linalg.norm(out - want, 2) / want.max(), np.abs(
            np.linalg.svd(out, compute_uv=False) / soft(s, 1.0) - 1
        ).max()

    rotation = np.linalg.qr(random((4, 4), 5))[0]
    for matrix in (
        np.diag([1.0, 0.3, 0.1, 0.05]),
        rotation * [1.0, 0.5, 0.1, 0.05],
        random((4, 9), 6),
    ):
        top = 1.5**iterations / 3
        assert max(error((matrix / np.linalg.norm(matrix) * top).astype(np.float32))) < 1e-3
    # beyond, the claim would be false
    assert max(error(np.diag([4 * top, 2.0, 1.0, 0.1]).astype(np.float32))) > 0.1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    "options", [{}, {"response": responses.smooth, "iterations": 5}], ids=["svd", "products"]
)
def test_a_bad_element_spoils_its_own_matrix(bad, options):
    x = random((2, 3, 3))
    x[0, 1, 2] = bad
    for policy, check in {"propagate": np.isnan, "zero": lambda out: out == 0}.items():
        out, state = clipped(x, 1.0, nonfinite=policy, **options)
        assert check(np.asarray(out[0])).all()
        np.testing.assert_allclose(out[1], clipped(x[1], 1.0, **options)[0], rtol=1e-5, atol=1e-6)
        assert state.reading.nonfinite_steps == 1


@pytest.mark.parametrize("shape", [(4, 3), (3, 4), (3, 3)], ids=str)
@pytest.mark.parametrize("form", ["hard", "soft", "soft-products"])
def test_derivatives_are_those_of_finite_differences(form, shape):
    with float64():
        x, direction = (
            jnp.asarray(random(shape, 2, np.float64)),
            jnp.asarray(random(shape, 3, np.float64)),
        )

        def out(x):
            return clipped(x, 1.0, **FORMS[form][0])[0]

        moved = jax.jvp(out, (x,), (direction,))[1]
        near = (out(x + 1e-6 * direction) - out(x - 1e-6 * direction)) / 2e-6
        np.testing.assert_allclose(moved, near, atol=1e-7)
        pulled = jax.grad(lambda x: jnp.vdot(out(x), direction))(x)
        np.testing.assert_allclose(
            jnp.vdot(pulled, direction), jnp.vdot(direction, moved), rtol=1e-10
        )


def test_limits_may_be_schedules_rules_and_relative_to_the_weights_spectrum():
    x = jnp.diag(jnp.array([4.0, 0.5]))
    clip = optaxclip.spectral_clip(optax.linear_schedule(3.0, 1.0, 2))
    state = clip.init(x)
    for limit in 3.0, 2.0, 1.0:
        out, state = clip.update(x, state)
        np.testing.assert_allclose(jnp.diag(out), [limit, 0.5], rtol=1e-6)
    clip = optaxclip.spectral_clip(thresholds.relative_to_params(0.5))
    out, _ = clip.update(x, clip.init(x), jnp.diag(jnp.array([6.0, 2.0])))
    np.testing.assert_allclose(jnp.diag(out), [3.0, 0.5], rtol=1e-6)


def test_iterations_are_for_the_smooth_response():
    with pytest.raises(
        ValueError,
        match="response, with iterations, must be one of 'smooth', got 'rescale'; choose one",
    ):
        optaxclip.spectral_clip(1.0, iterations=10)
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        optaxclip.spectral_clip(1.0, response=responses.smooth, iterations=0)
    with pytest.raises(TypeError, match="max_norm must be a real number, got 'big'"):
        optaxclip.spectral_clip("big")


def test_it_stands_in_a_chain_with_empty_and_odd_leaves():
    params = {
        "w": jnp.ones((3, 2)),
        "empty": jnp.zeros((0, 3)),
        "none": None,
        "half": jnp.ones((2, 2), jnp.bfloat16),
    }
    optimizer = optax.chain(optax.scale_by_adam(), optaxclip.spectral_clip(0.1), optax.scale(-1.0))
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    assert (
        largest(updates["w"]) <= 0.1 * (1 + 1e-6)
        and largest(updates["half"].astype(jnp.float32)) <= 0.1 * 1.008
    )


def test_matrices_are_decomposed_one_after_the_other():
    clip = optaxclip.spectral_clip(1.0)
    grads = [jnp.ones((2, 3)), jnp.ones((3, 2)), jnp.ones((4, 2, 2))]
    program = jax.make_jaxpr(lambda grads: clip.update(grads, clip.init(grads))[0])(grads)
    made_of, found = {}, []  # of each variable, the decompositions that it is made of
    for equation in program.jaxpr.eqns:
        before = {
            i for x in equation.invars if not isinstance(x, Literal) for i in made_of.get(x, ())
        }
        if equation.primitive.name == "svd" or "svd" in str(equation.params.get("jaxpr", "")):
            found.append(before)
            before = before | {len(found) - 1}
        made_of.update(dict.fromkeys(equation.outvars, before))
    assert found == [set(), {0}, {0, 1}]


# A size for each matrix


def of_spectrum(values, seed=0):
    """A matrix with these singular values."""
    u, v = (np.linalg.qr(random((len(values),) * 2, seed + k))[0] for k in range(2))
    return np.float32(u * values @ v)


def spectrum(x):
    return np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)


@pytest.mark.parametrize(
    "rule",
    [thresholds.ema(1.0, decay=0.9, of="raw"), thresholds.quantile(0.85, 100)],
    ids=["ema", "quantile"],
)
def test_a_rule_learns_the_largest_singular_value(rule):
    first, second = of_spectrum([4.0, 2.0, 1.0]), of_spectrum([4.0, 3.9, 3.8], 5)
    clip = optaxclip.spectral_clip(rule)
    _, state = clip.update(first, clip.init(first))
    out, state = clip.update(second, state)
    np.testing.assert_allclose(spectrum(out), [4.0, 3.9, 3.8], rtol=1e-5)
    out, state = clip.update(2 * second, state)
    top = 4.0 if rule.name.startswith("thresholds.ema") else np.quantile([4.0, 4.0, 8.0], 0.85)
    np.testing.assert_allclose(spectrum(out), np.minimum([8.0, 7.8, 7.6], top), rtol=1e-5)
    by_rank = optaxclip.spectral_clip(rule, scope="value")
    _, state = by_rank.update(first, by_rank.init(first))
    out, _ = by_rank.update(second, state)
    assert spectrum(out)[1] < 3.9


def test_each_matrix_of_a_stack_learns_for_itself():
    stack = np.stack([of_spectrum([1.0, 0.5]), of_spectrum([8.0, 2.0])])
    clip = optaxclip.spectral_clip(thresholds.ema(1.0, of="raw"))
    _, state = clip.update({"w": stack}, clip.init({"w": stack}))
    np.testing.assert_allclose(state.threshold[1]["w"].ravel(), [1, 8], rtol=1e-6)
    out, _ = clip.update({"w": 2 * stack}, state)
    np.testing.assert_allclose(spectrum(out["w"]), [[1, 1], [8, 4]], rtol=1e-5)


def test_rescale_shrinks_the_whole_matrix_to_its_spectral_norm():
    x = of_spectrum([4.0, 2.0, 1.0])
    out, state = clipped(x, 2.0, response=responses.rescale)
    np.testing.assert_allclose(out, x / 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.reading.size_after, [2.0], rtol=1e-6)
    same, _ = clipped(x, 4.1, response=responses.rescale)
    np.testing.assert_array_equal(same, x)


def test_the_record_tells_the_largest_singular_value_that_is_left():
    x = of_spectrum([4.0, 2.0, 1.0])
    for response, left in {
        responses.drop: 2.0,
        responses.normalize: 3.0,
        responses.smooth: soft(4.0, 3.0),
        None: 3.0,
    }.items():
        out, state = clipped(x, 3.0, response=response)
        np.testing.assert_allclose(state.reading.size_after, [left], rtol=1e-5)
        np.testing.assert_allclose(spectrum(out)[0], left, rtol=1e-5)


LAYERS = {  # path: shape, the matrices in it
    ("query", "kernel"): ((5, 2, 3), lambda x: x.reshape(1, 5, 6)),
    ("out", "kernel"): ((2, 3, 5), lambda x: x.reshape(1, 6, 5)),
    ("conv", "kernel"): ((2, 2, 3, 4), lambda x: x.reshape(1, 12, 4)),
    ("query", "bias"): ((2, 3), lambda x: x.reshape(1, 1, 6)),
    ("dense", "kernel"): ((5, 4), lambda x: x[None]),
    ("stack", "w"): ((2, 5, 4), lambda x: x),
}


@pytest.mark.parametrize("options", [{}, {"response": responses.smooth, "iterations": 12}], ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids="/".join)
def test_matrices_are_those_of_the_layers(layer, options):
    shape, matrices = LAYERS[layer]
    x = random(shape, dtype=np.float32).astype(np.float32)
    clip = optaxclip.spectral_clip(1.0, **options)
    tree = {layer[0]: {layer[1]: x}}
    out, _ = clip.update(tree, clip.init(tree))
    expected = soft if options else hard
    got = matrices(np.asarray(out[layer[0]][layer[1]]))
    np.testing.assert_allclose(got, reference(matrices(x), 1.0, expected), rtol=2e-3, atol=1e-4)


def test_axes_and_stacks_may_be_chosen():
    x = random((3, 2, 5, 2), dtype=np.float32).astype(np.float32)
    clip = optaxclip.spectral_clip(
        1.0, axes=lambda path, leaf: ((2,), (0, 1)), batch_axes=lambda path, leaf: 1
    )
    out, _ = clip.update(x, clip.init(x))
    for k in range(2):  # [3, 5, 2] with the last axis as rows
        matrix = np.moveaxis(x[:, k], 2, 0).reshape(2, 15)
        got = np.moveaxis(np.asarray(out)[:, k], 2, 0).reshape(2, 15)
        np.testing.assert_allclose(got, reference(matrix, 1.0, hard), rtol=1e-5, atol=1e-6)
    layers = {"query": {"kernel": np.stack([np.ones((4, 2, 2)), 3 * np.ones((4, 2, 2))])}}
    clip = optaxclip.spectral_clip(1.0, batch_axes=0)
    out, state = clip.update(layers, clip.init(layers))
    np.testing.assert_allclose(out["query"]["kernel"], np.full((2, 4, 2, 2), 1 / 4), rtol=1e-5)
    with pytest.raises(TypeError, match="axes must return .row axes, column axes., got 0"):
        optaxclip.spectral_clip(1.0, axes=lambda path, leaf: 0).init(x)
    with pytest.raises(ValueError, match="scope must be one of 'matrix', 'value', got 'leaf'"):
        optaxclip.spectral_clip(1.0, scope="leaf")


@pytest.mark.parametrize("options", [{}, {"response": responses.smooth, "iterations": 3}], ids=str)
def test_a_nan_in_a_large_matrix_is_seen(options):
    x = random((80, 80)).astype(np.float32)
    x[79, 78] = np.nan
    assert np.isnan(clipped(x, 1.0, **options)[0]).all()
    out, state = clipped(x, 1.0, nonfinite="zero", **options)
    assert not np.any(out) and state.reading.nonfinite_steps == 1


def test_a_joint_norm_counts_what_is_finite_in_a_large_block():
    grads = np.ones((1, 5000), np.float32)
    grads[0, 7] = np.nan
    clip = optaxclip.clip(thresholds.by_global_norm(1.0), optaxclip.scopes.unit(0))
    out, state = clip.update(grads, clip.init(grads))
    np.testing.assert_array_equal(np.isnan(out), np.isnan(grads))
    np.testing.assert_allclose(np.nansum(np.square(out)), 1, rtol=1e-5)


def test_on_an_explicit_mesh_layers_are_clipped_as_on_one_device():
    mesh = jax.make_mesh((2,), ("x",))
    spec = jax.sharding.PartitionSpec
    tree = {
        str(k): {layer[0]: {layer[1]: np.float32(random(shape, k))}}
        for k, (layer, (shape, _)) in enumerate(LAYERS.items())
    }
    clip = optaxclip.spectral_clip(thresholds.ema(0.5))
    expected, _ = clip.update(tree, clip.update(tree, clip.init(tree))[1])

    def place(x):
        axis = next((k for k, n in enumerate(x.shape) if n % 2 == 0), None)
        parts = ["x" if k == axis else None for k in range(x.ndim)]
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec(*parts)))

    split = jax.tree.map(place, tree)
    with jax.set_mesh(mesh):
        step = jax.jit(clip.update)
        out, state = step(split, step(split, clip.init(split))[1])
    chex.assert_trees_all_close(jax.device_get(out), expected, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_equal(
        jax.tree.map(lambda x: x.sharding, out), jax.tree.map(lambda x: x.sharding, split)
    )
