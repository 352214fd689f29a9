import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from precision import float64

import optaxclip
from optaxclip import norms
from optaxclip._lowering import LARGE
from optaxclip._measure import measure
from optaxclip.methods import ABOVE, BELOW

NORMS = {
    "l2": norms.l2(),
    "l2 of accelerators": norms.l2()._replace(fast=None),
    "l1": norms.l1(),
    "linf": norms.linf(),
    "lp": norms.lp(3),
    "fractional": norms.lp(1.5),
}
REFERENCES = {
    "l2": reference.l2,
    "l2 of accelerators": reference.l2,
    "l2 of large leaves": reference.l2,
    "l1": reference.l1,
    "linf": reference.linf,
    "lp": reference.lp(3),
    "fractional": reference.lp(1.5),
    "rms": reference.rms,
}
WAYS = {
    "eager": lambda function: function,
    "jit": jax.jit,
    "constant": lambda function: lambda leaves: jax.jit(lambda: function(leaves))(),
    "vmap": lambda function: (
        lambda leaves: jax.tree.map(
            lambda x: x[1],
            jax.vmap(function)(jax.tree.map(lambda x: jnp.stack([jnp.zeros_like(x), x]), leaves)),
        )
    ),
}
quick = settings(deadline=None, max_examples=25, derandomize=True)
numbers = st.floats(-1e3, 1e3, width=32).map(lambda x: x if abs(x) > 1e-3 else 0.0)


def size(norm, leaves):
    return measure(norm, leaves, groups=[list(range(len(leaves)))])[0][0]


def enlarged(leaf):
    """With so many zeros that a CPU measures it in float32 first."""
    return jnp.append(jnp.ravel(leaf), jnp.zeros(LARGE, jnp.result_type(leaf)))


SIZES = {name: functools.partial(size, norm) for name, norm in NORMS.items()}
SIZES |= {"l2 of large leaves": lambda leaves: size(norms.l2(), list(map(enlarged, leaves)))}


def recorded_sizes(norm, leaves):
    clip = optaxclip.clip(jnp.inf, optaxclip.scopes.tree(), norm=norm)
    return clip.update(leaves, clip.init(leaves))[1].reading.size_before


def floats(sizes):
    return {name: float(size) for name, size in sizes.items()}


def all_sizes(leaves):
    sizes = {name: measured(leaves) for name, measured in SIZES.items()}
    return {**sizes, "rms": recorded_sizes(norms.rms(), leaves)[0]}


def true_sizes(leaves):
    return {name: norm(leaves) for name, norm in REFERENCES.items()}


def random_leaves(dtype, seed=0):
    rng = np.random.default_rng(seed)
    real, imaginary = (rng.normal(size=(2, n)) for n in (5, 5))
    values = real + 1j * imaginary if jnp.issubdtype(dtype, jnp.complexfloating) else real
    return [
        jnp.asarray(values, dtype),
        jnp.asarray(values[0, :3] * 7, dtype),
        jnp.asarray(values[0, 0], dtype),
    ]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64])
def test_sizes_are_those_of_the_formulas(dtype, way):
    leaves = random_leaves(dtype)
    assert floats(WAYS[way](all_sizes)(leaves)) == pytest.approx(true_sizes(leaves), rel=2e-6)


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_sizes_of_float64_have_its_precision(dtype):
    with float64():
        leaves = random_leaves(dtype)
        sizes = all_sizes(leaves)
        assert {x.dtype for x in sizes.values()} == {jnp.dtype("float64")}
        assert floats(sizes) == pytest.approx(true_sizes(leaves), rel=1e-14)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64])
def test_sizes_are_float32(dtype):
    assert {x.dtype for x in all_sizes([jnp.ones(2, dtype)]).values()} == {jnp.dtype("float32")}


EXTREMES = {
    "squares overflow": [np.float32([3e20, 4e20])],
    "across leaves": [np.float32([1e20, 1e20]), np.float32([1.0])],
    "near the largest float": [np.float32([1e38, 1e38])],
    "largest float": [np.float32([3.4e38, 0, 1])],
    "at the switch": [np.float32([2.0**28, 2.0**27, 3.0])],
    "squares underflow": [np.float32([1e-25, 1e-25])],
    "smaller": [np.float32([3e-29, 4e-29])],
    "huge and tiny": [np.float32([1e30, 1e-30]), np.float32([1e-30])],
    "float16": [np.float16([300, 1])],
    "many float16": [np.full(1000, 300, np.float16)],
    "float16 of one float16": [np.float16([60000]), np.float16([60000])],
    "small float16": [np.full(10000, 1e-4, np.float16)],
    "mixed": [np.float32([1e6]), np.float16([100])],
    "bfloat16": [np.asarray([1e38, 1e38], jnp.bfloat16)],
    "complex": [np.complex64([3e20 + 4e20j, 0])],
}


@functools.cache
def extreme_sizes(way):
    return WAYS[way](lambda cases: {name: all_sizes(leaves) for name, leaves in cases.items()})(
        jax.tree.map(jnp.asarray, EXTREMES)
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", EXTREMES)
def test_sizes_are_right_where_powers_overflow_or_underflow(case, way):
    assert floats(extreme_sizes(way)[case]) == pytest.approx(true_sizes(EXTREMES[case]), rel=2e-6)


@pytest.mark.parametrize("scale", [1e200, 1e-200, 1e308])
def test_sizes_of_float64_are_right_where_powers_overflow_or_underflow(scale):
    with float64():
        leaves = [jnp.array([0.3 * scale, 0.4 * scale])]
        for way in "eager", "jit":
            assert floats(WAYS[way](all_sizes)(leaves)) == pytest.approx(
                true_sizes(leaves), rel=1e-12
            )


@pytest.mark.parametrize("first, second", [(3.0, 4.0), (3e-25, 4e-25), (3e20, 4e20), (1.0, 1e100)])
def test_precisions_may_be_mixed(first, second):
    with float64():
        leaves = [jnp.array([first], jnp.float32), jnp.array([second], jnp.float64)]
        assert floats(all_sizes(leaves)) == pytest.approx(true_sizes(leaves), rel=1e-6)


@pytest.mark.parametrize("way", ["eager", "jit"])
@pytest.mark.parametrize("norm", [norms.l2(), norms.rms()])
def test_sizes_of_all_magnitudes_may_be_measured_at_once(norm, way):
    tops = np.float32([1e-30, 1e-25, 1e-10, 1, 2.0**27, 2.0**28, 1e12, 1e18, 1e20, 1e37])
    rows = np.outer(tops, np.float32([3, 4]))
    expected = np.linalg.norm(np.float64(rows), axis=1) / (1 if norm == norms.l2() else 2**0.5)
    by_row = WAYS[way](lambda x: measure(norm, [x], axes=[(1,)]))
    by_leaf = WAYS[way](lambda x: measure(norm, list(x)))
    np.testing.assert_allclose(by_row(jnp.asarray(rows))[0][:, 0], expected, rtol=2e-6)
    np.testing.assert_allclose(by_leaf(jnp.asarray(rows))[0], expected, rtol=2e-6)
    large = jax.vmap(enlarged)(rows[1:])
    expected = expected[1:] * (1 if norm == norms.l2() else (2 / large.shape[1]) ** 0.5)
    np.testing.assert_allclose(by_row(large)[0][:, 0], expected, rtol=2e-6)
    np.testing.assert_allclose(by_leaf(large)[0], expected, rtol=2e-6)


def test_large_leaves_may_be_joined_with_small_ones():
    for first, second in (
        (3.0, 4.0),
        (3e20, 4e20),
        (3e-25, 4e-25),
        (3.0, 1e-30),
        (3e20, 0.0),
        (0.0, 4e-25),
    ):
        leaves = [enlarged(jnp.array([first])), jnp.array([second]), jnp.array([5.0])]
        for groups in [[0, 1], [2]], [[2], [1, 0]]:
            by_name = dict(
                zip(
                    map(len, groups),
                    measure(norms.l2(), leaves, groups=groups)[0],
                    strict=True,
                )
            )
            assert floats(by_name) == pytest.approx({1: 5, 2: np.hypot(first, second)}, rel=1e-6)


@pytest.mark.parametrize("groups", [None, [[0, 3], [5, 1], [4, 2]], [[2, 4], [0], [1, 3, 5]]])
@pytest.mark.parametrize("way", WAYS)
def test_leaves_of_several_shapes_are_of_their_own_groups(way, groups):
    random = np.random.default_rng(0)
    leaves = [
        random.normal(scale=10.0**k, size=shape).astype(np.float32)
        for k, shape in enumerate([2, 3, 2, (2, 3), 3, 2])
    ]
    expected = [
        np.sqrt(sum(np.sum(leaves[k].astype(float) ** 2) for k in group))
        for group in groups or [[k] for k in range(6)]
    ]
    for some in leaves, [*leaves[:-1], enlarged(leaves[-1])]:
        found = WAYS[way](lambda x: measure(norms.l2(), x, groups=groups)[0])(some)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_only_large_leaves_are_measured_in_two_ways():
    def branches(leaves):
        return str(jax.make_jaxpr(lambda leaves: measure(norms.l2(), leaves))(leaves)).count(
            "cond["
        )

    small, large = [jnp.ones(3)] * 2, [jnp.ones(LARGE + 1)] * 2
    assert branches(small + large) == branches(large)
    assert branches(large) - branches(small) == 1


def test_the_joint_size_of_many_bfloat16_leaves_is_not_rounded():
    many = [jnp.ones((), jnp.bfloat16)] * 600  # a sum in bfloat16 stays at 256
    assert float(size(norms.l2(), many)) == pytest.approx(math.sqrt(600), rel=1e-6)
    assert float(size(norms.l1(), many)) == 600


@pytest.mark.parametrize("way", ["eager", "jit"])
def test_large_leaves_are_summed_precisely(way):
    bfloat16 = jnp.full(10**7, 1e-2, jnp.bfloat16)
    assert float(WAYS[way](lambda x: size(norms.l2(), x))([bfloat16])) == pytest.approx(
        31.654, rel=1e-4
    )
    ones = [jnp.ones(2**25)]
    for norm, expected in (norms.l2(), 2**12.5), (norms.l1(), 2**25), (norms.lp(3), 2 ** (25 / 3)):
        assert float(WAYS[way](lambda x, norm=norm: size(norm, x))(ones)) == pytest.approx(
            expected, rel=1e-5
        )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "leaves",
    [
        [jnp.zeros(3)],
        [jnp.array([-0.0])],
        [jnp.zeros(())],
        [jnp.zeros(0)],
        [jnp.zeros((3, 0)), jnp.zeros(2)],
    ],
)
def test_the_size_of_nothing_is_zero(leaves, way):
    assert WAYS[way](all_sizes)(leaves) == dict.fromkeys(REFERENCES, 0)


def test_no_leaves_have_no_sizes_and_one_number_is_its_own_magnitude():
    assert [x.shape for x in measure(norms.l2(), [])] == [(0,)]
    assert floats(all_sizes([jnp.array(-3.0)])) == pytest.approx(
        dict.fromkeys(REFERENCES, 3), rel=1e-6
    )
    assert floats(all_sizes([jnp.zeros(0), jnp.array([-3.0])])) == pytest.approx(
        dict.fromkeys(REFERENCES, 3), rel=1e-6
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "value, test", [(jnp.nan, np.isnan), (jnp.inf, np.isinf), (-jnp.inf, np.isinf)]
)
def test_what_is_not_finite_makes_the_size_so(value, test, way):
    leaves = [jnp.array([1.0, value]), jnp.array([1.0])]
    assert {
        name: bool(test(x)) for name, x in WAYS[way](all_sizes)(leaves).items()
    } == dict.fromkeys(REFERENCES, True)


def test_one_sided_norms_see_one_side():
    leaves = [jnp.array([-3.0, 2.0]), jnp.array([-1.0])]
    assert (size(ABOVE, leaves), size(BELOW, leaves)) == (2, 3)
    assert (size(ABOVE, [jnp.array(-1.0)]), size(BELOW, [jnp.array(1.0)])) == (0, 0)
    assert np.isnan(size(ABOVE, [jnp.array([jnp.nan, 1])])) and np.isnan(
        size(BELOW, [jnp.array([jnp.nan, 1])])
    )


jitted_sizes = jax.jit(all_sizes)


@quick
@given(st.lists(numbers, min_size=4, max_size=4), st.integers(-20, 20), st.sampled_from([-1, 1]))
def test_sizes_are_homogeneous(values, exponent, sign):
    values, scale = np.float32(values), np.float32(sign * 10.0**exponent)
    one, scaled = jitted_sizes([values]), jitted_sizes([scale * values])
    assert floats(scaled) == pytest.approx(
        {name: abs(float(scale)) * float(x) for name, x in one.items()}, rel=3e-6
    )


@settings(quick, max_examples=6, phases=[Phase.generate])  # each compiles: no shrinking
@given(
    st.lists(numbers, min_size=5, max_size=5), st.permutations(range(5)), st.sets(st.integers(1, 4))
)
def test_the_size_of_a_whole_is_that_of_its_parts_for_any_partition(values, order, cuts):
    cuts = [0, *sorted(cuts), 5]
    groups = [order[i:j] for i, j in zip(cuts, cuts[1:], strict=False)]
    parts = measured_by_all([np.float32([x]) for x in values], groups)
    wholes = {name: size(NORMS[name], [sizes]) for name, sizes in parts.items()}
    for name in NORMS:
        norm = REFERENCES[name]
        np.testing.assert_allclose(
            parts[name], [norm([values[k] for k in group]) for group in groups], rtol=3e-6
        )
        np.testing.assert_allclose(wholes[name], norm(values), rtol=3e-6)


def measured_by_all(leaves, groups):
    return jax.jit(
        lambda leaves: {k: measure(norm, leaves, groups=groups)[0] for k, norm in NORMS.items()}
    )(leaves)


def test_groups_are_in_the_order_given_and_need_not_have_all_leaves():
    leaves = [jnp.array([1.0]), jnp.array([2.0]), jnp.array([3.0])]
    for groups, expected in ([[2], [0], [1]], [3, 1, 2]), ([[1]], [2]), ([[2, 0], [1]], [4, 2]):
        np.testing.assert_array_equal(measure(norms.l1(), leaves, groups=groups)[0], expected)


def test_parts_of_any_shape_add_up():
    values = jnp.arange(24.0) - 7
    parts = [
        values[:1].reshape(()),
        values[1:13].reshape(3, 4),
        values[13:13],
        values[13:].reshape(1, 11),
    ]
    assert floats(all_sizes(parts)) == pytest.approx(true_sizes([values]), rel=2e-6)


def analytic(x):
    l2, l3, l15 = (np.sum(np.abs(x) ** p) ** (1 / p) for p in (2, 3, 1.5))
    powers = {
        "l2": x / l2,
        "l2 of accelerators": x / l2,
        "l2 of large leaves": x / l2,
        "lp": (np.abs(x) / l3) ** 2 * np.sign(x),
        "fractional": (np.abs(x) / l15) ** 0.5 * np.sign(x),
    }
    return {**powers, "l1": np.sign(x), "linf": np.sign(x) * (np.abs(x) == np.abs(x).max())}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30, 2.0**27])
def test_derivatives_are_those_of_the_formulas(scale, way):
    x = np.array([3.0, -4.0, 12.0])
    slopes = WAYS[way](
        lambda x: {name: jax.grad(lambda x, f=f: f([x]))(x) for name, f in SIZES.items()}
    )
    for name, slope in slopes(jnp.float32(scale * x)).items():
        np.testing.assert_allclose(slope, analytic(x)[name], rtol=3e-6, err_msg=name)


def test_the_derivative_of_a_complex_size_points_along_it():
    slope = jax.grad(lambda x: size(norms.l2(), [x]))(jnp.array([3j, 4.0]))
    np.testing.assert_allclose(slope, [-0.6j, 0.8], rtol=1e-6)  # JAX's convention: the conjugate


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64, jnp.float16])
def test_derivatives_at_zero_are_finite(dtype, way):
    slopes = WAYS[way](
        lambda x: {name: jax.grad(lambda x, f=f: f([x]))(x) for name, f in SIZES.items()}
    )
    for name, slope in slopes(jnp.zeros(3, dtype)).items():
        assert np.isfinite(slope).all(), name
    partly = slopes(jnp.array([0, 2, 0], dtype))
    assert {
        name: np.isfinite(slope).all() and slope[1] == 1 for name, slope in partly.items()
    } == dict.fromkeys(SIZES, True)


def test_whole_powers_are_the_norms_of_that_name():
    leaves = random_leaves(jnp.float32)
    for p, norm in (
        (1, norms.l1()),
        (2, norms.l2()),
        (math.inf, norms.linf()),
        (np.float32(2), norms.l2()),
    ):
        assert size(norms.lp(p), leaves) == size(norm, leaves)
        assert size(norms.lp(p), [jnp.float32([1e38, 1e38])]) == size(
            norm, [jnp.float32([1e38, 1e38])]
        )


@quick
@given(st.lists(numbers, min_size=4, max_size=4))
def test_norms_of_higher_power_are_not_larger(values):
    sizes = floats(jitted_sizes([np.float32(values)]))
    ordered = [sizes[name] for name in ("l1", "fractional", "l2", "lp", "linf")]
    assert all(
        larger >= smaller * (1 - 1e-6)
        for larger, smaller in zip(ordered, ordered[1:], strict=False)
    )


def test_axes_measure_along_them_and_keep_their_place():
    leaf = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)
    for name, norm in NORMS.items():
        for axes in (0,), (1,), (0, 2), (0, 1, 2), ():
            (sizes,) = measure(norm, [leaf], axes=[axes])
            expected = np.moveaxis(leaf, axes, range(-len(axes), 0)).reshape(
                *np.delete(leaf.shape, axes), -1
            )
            expected = np.apply_along_axis(lambda x, name=name: REFERENCES[name]([x]), -1, expected)
            assert sizes.shape == tuple(
                1 if axis in axes else n for axis, n in enumerate(leaf.shape)
            )
            np.testing.assert_allclose(
                np.squeeze(sizes, axes), expected, rtol=2e-6, err_msg=f"{name} {axes}"
            )


def test_a_unit_is_measured_right_beside_others_of_any_size():
    small = jnp.float32([[3e20, 3, 3e-25], [4e20, 4, 4e-25]])
    for leaf in small, jnp.pad(small, ((0, LARGE), (0, 0))):
        for way in "eager", "jit", "vmap":
            (sizes,) = WAYS[way](lambda leaves: measure(norms.l2(), leaves, axes=[(0,)]))([leaf])
            np.testing.assert_allclose(sizes, [[5e20, 5, 5e-25]], rtol=1e-6)


def test_equal_leaves_are_traced_once_and_so_are_equal_steps():
    seen = []

    def partials(magnitudes, axes):
        seen.append(magnitudes.shape)
        return (jnp.sum(magnitudes, axes, keepdims=True),)

    norm = norms.l1()._replace(partials=partials)
    clip = optaxclip.clip(1.0, optaxclip.scopes.tree(), norm=norm)
    grads = [jnp.ones(3)] * 20 + [jnp.ones((2, 2))] * 20
    state = clip.init(grads)
    for _ in range(3):
        _, state = clip.update(grads, state)
    assert len(seen) == 2 and set(seen) == {(3,), (2, 2)}


def test_norms_of_one_name_are_one():
    for name in "l2", "l1", "linf", "rms":
        assert getattr(norms, name)() == getattr(norms, name)(), name


def test_a_norm_of_traced_numbers_is_not_kept():
    params = jnp.ones(3)
    with jax.checking_leaks():
        optimizer = optax.inject_hyperparams(optaxclip.clippy)(
            relative=optax.linear_schedule(0.1, 0.2, 10)
        )
        updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    np.testing.assert_allclose(updates, 0.1, rtol=1e-5)


# The share of zeros


@pytest.mark.parametrize("way", WAYS)
def test_the_share_of_zeros_is_that_of_all_numbers_of_a_group(way):
    leaves = [
        jnp.array([[0.0, -0.0, 1.0], [2.0, jnp.inf, 0.0]]),
        jnp.array([0, 1 + 1j], jnp.complex64),
        jnp.zeros(4, jnp.bfloat16),
        jnp.array(3.0, jnp.float16),
        jnp.zeros((0, 3)),
    ]
    measured = WAYS[way](lambda leaves: measure(norms.zeros(), leaves, groups=[[0, 1, 2], [3, 4]]))
    np.testing.assert_allclose(measured(leaves)[0], [8 / 12, 0], rtol=1e-6)
    each = WAYS[way](lambda leaves: measure(norms.zeros(), leaves))(leaves)[0]
    np.testing.assert_allclose(each, [0.5, 0.5, 1, 0, 0], rtol=1e-6)


def test_the_share_of_zeros_by_unit_of_nan_and_of_many():
    rows = jnp.array([[0.0, 1.0], [jnp.nan, 0.0], [0.0, 0.0]])
    found = measure(norms.zeros(), [rows], axes=[(1,)])[0].ravel()
    np.testing.assert_array_equal(found, [0.5, np.nan, 1])
    assert measure(norms.zeros(), [jnp.zeros(2**25)])[0] == 1  # more than float32 can count
    assert not jax.grad(lambda x: size(norms.zeros(), [x]))(jnp.array([0.0, 1.0])).any()
