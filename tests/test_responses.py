import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

import optaxclip
from optaxclip import norms, responses, scopes

NAMES = ("rescale", "clamp", "smooth", "drop", "normalize", "band", "automatic", "psac")
RESPONSES = {name: getattr(responses, name) for name in NAMES}
RESPONSES |= {"power_half": responses.power(0.5)}  # more of them in test_qk_clip.py
KEEPING = {name: response for name, response in RESPONSES.items() if name != "clamp"}
LOCAL = {name: RESPONSES[name] for name in ("rescale", "clamp", "smooth", "drop")}
WAYS = {"eager": lambda function: function, "jit": jax.jit}
ORACLE_NAMES = {
    "hard": "rescale",
    "skip": "drop",
    "sqrt": "smooth",
    "normalize": "normalize",
    "band": "band",
}
CASES = json.loads((pathlib.Path(__file__).parent / "oracles" / "o10_response.json").read_text())[
    "cases"
]
CASES = [case for case in CASES if case["config"].get("kind") in ORACLE_NAMES]

quick = settings(deadline=None, max_examples=40, derandomize=True)
positive = st.floats(-12, 12).map(lambda exponent: float(np.float32(10.0**exponent)))
vectors = st.lists(
    st.floats(-1e3, 1e3, width=32).map(lambda x: x if abs(x) > 1e-3 else 0.0),
    min_size=3,
    max_size=3,
)
jitted = {name: jax.jit(response) for name, response in RESPONSES.items()}


def bits(x):
    return np.asarray(x).tobytes()


def l2(x):
    return float(np.linalg.norm(np.asarray(x, float)))


def clip_leaf(response, gradient, limit):
    norm = norms.linf() if response is responses.clamp else norms.l2()
    clip = optaxclip.clip(limit, scopes.tree(), norm=norm, response=response)
    return clip.update(gradient, clip.init(gradient))[0]


def test_the_oracle_has_every_kind_that_we_have():
    assert (
        sorted({case["config"]["kind"] for case in CASES}) == sorted(ORACLE_NAMES)
        and len(CASES) == 10
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_clipped_sizes_agree_with_the_oracle(case):
    response, limit = (
        RESPONSES[ORACLE_NAMES[case["config"]["kind"]]],
        np.float32(case["config"]["c"]),
    )
    if case["config"]["kind"] == "band":
        # the oracle's is absolute
        response = functools.partial(response, low=case["config"]["lo"] / limit)
    sizes, factors, expected = (
        np.float32(case[key]) for key in ("sizes", "factors", "clipped_sizes")
    )
    if (
        case["config"]["kind"] == "skip"
    ):  # the oracle drops what is at its limit, we only what is above
        factors, expected = (
            np.where(sizes == limit, 1, factors),
            np.where(sizes == limit, sizes, expected),
        )
    np.testing.assert_allclose(response(sizes, sizes, limit), expected, rtol=1e-6)
    gradients = sizes[:, None] * np.float32([0.6, -0.8])
    np.testing.assert_allclose(
        response(gradients, sizes[:, None], limit), factors[:, None] * gradients, rtol=1e-6
    )


@pytest.mark.parametrize("name", RESPONSES)
@quick
@given(vectors, positive)
def test_results_are_those_of_the_formulas(name, values, limit):
    gradient, size = np.float32(values), np.float32(np.linalg.norm(values))
    expected = [getattr(reference, name)(x, float(size), limit) for x in gradient.tolist()]
    np.testing.assert_allclose(jitted[name](gradient, size, np.float32(limit)), expected, rtol=2e-6)


def test_clamp_cuts_where_the_size_is_above_the_limit():
    gradient = jnp.array([-3.0, 0.5, 2.0])
    np.testing.assert_array_equal(
        responses.clamp(gradient, jnp.array(3.0), jnp.array(1.0)), [-1, 0.5, 1]
    )
    np.testing.assert_array_equal(
        responses.clamp(gradient, jnp.array(1.0), jnp.array(1.0)), gradient
    )


def test_clamp_cuts_complex_numbers_by_magnitude():
    gradient = jnp.array([3 + 4j, 0.3j, 0, -3e20 + 4e20j])
    clipped = responses.clamp(gradient, jnp.abs(gradient), jnp.array(1.0))
    np.testing.assert_allclose(clipped, [0.6 + 0.8j, 0.3j, 0, -0.6 + 0.8j], rtol=1e-6)


def test_smooth_shrinks_what_is_at_its_limit_to_its_root_of_a_half():
    assert responses.smooth(*jnp.array([2.0, 2.0, 2.0])) == pytest.approx(2 * 0.5**0.5, rel=1e-6)


def test_zero_keeps_what_is_at_its_limit():
    gradient = jnp.array([0.6, 0.8])
    np.testing.assert_array_equal(
        responses.drop(gradient, jnp.array(1.0), jnp.array(1.0)), gradient
    )
    np.testing.assert_array_equal(
        responses.drop(gradient, jnp.array(1.0), jnp.array(0.999)), [0, 0]
    )


@pytest.mark.parametrize("low", [0.0, 0.25, 1.0])
def test_band_takes_its_lower_end_as_a_share_of_the_limit(low):
    band = functools.partial(responses.band, low=low)
    for size, expected in (
        (1e-3, max(1e-3, 2 * low)),
        (1.0, max(1.0, 2 * low)),
        (2.0, 2.0),
        (50.0, 2.0),
    ):
        gradient = size * jnp.array([0.6, 0.8])
        assert l2(band(gradient, jnp.float32(size), jnp.float32(2))) == pytest.approx(
            expected, rel=1e-6
        )
        assert l2(clip_leaf(band, gradient, 2.0)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("gamma", [1e-3, 0.01, 1.0])
def test_automatic_gives_almost_the_limit_and_enlarges_at_most_by_limit_over_gamma(gamma):
    automatic = functools.partial(responses.automatic, gamma=gamma)
    for size in 1e-12, 1e-3, 1.0, 1e12:
        gradient = np.float32([0.6 * size, -0.8 * size])
        clipped = automatic(gradient, np.float32(size), np.float32(2))
        assert l2(clipped) == pytest.approx(2 * size / (size + gamma), rel=2e-6)
        assert l2(clipped) <= 2 / gamma * size * (1 + 1e-6)


@pytest.mark.parametrize("r", [1e-3, 0.1])
def test_psac_weighs_what_is_small_less_than_automatic_does(r):
    psac = functools.partial(responses.psac, r=r)
    weights = [
        l2(psac(np.float32([s]), np.float32(s), np.float32(1))) / s
        for s in (1e-6, 1e-3, r**0.5 - r, 1.0, 1e3)
    ]
    # of a gradient of size 0: c, not c / gamma
    assert weights[0] == pytest.approx(1, rel=1e-2 if r == 0.1 else 1.1e-3)
    assert max(weights) == pytest.approx(1 / (2 * r**0.5 - r), rel=1e-6)  # at sqrt(r) - r
    assert weights[-1] == pytest.approx(1e-3, rel=1e-6)


# The laws, as the module states them.


@pytest.mark.parametrize("limit", [0.0, 1e-10, 1.0, 1e30, jnp.inf])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", RESPONSES)
def test_a_zero_gradient_stays_zero(name, way, limit):
    for gradient in jnp.array([0.0, -0.0, 0.0]), jnp.zeros(3, jnp.complex64):
        clipped = WAYS[way](RESPONSES[name])(gradient, jnp.array(0.0), jnp.array(limit))
        assert bits(clipped) == bits(gradient)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", RESPONSES)
def test_an_infinite_limit_changes_nothing(name, way):
    alone, in_clip = (
        WAYS[way](RESPONSES[name]),
        WAYS[way](lambda g: clip_leaf(RESPONSES[name], g, float("inf"))),
    )
    for scale in 1e-40, 1e-20, 1.0, 1e38:
        gradient = np.float32([0.6, -0.8, -0.0, 1e-45]) * np.float32(scale)
        assert bits(alone(gradient, np.float32(scale), np.float32(np.inf))) == bits(gradient)
        assert bits(in_clip(gradient)) == bits(gradient)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["rescale", "clamp", "drop", "band"])
def test_what_is_within_its_limit_comes_back_bit_for_bit(name, way, dtype):
    tiny = jnp.finfo(dtype).smallest_subnormal
    gradient = jnp.array([tiny, -0.0, 0.0, 1.0, -3 * tiny, 1 / 3], dtype)
    assert bits(gradient[:1]) != bits(jnp.zeros(1, dtype))
    clipped = WAYS[way](lambda g: clip_leaf(RESPONSES[name], g, 1.5))(gradient)
    assert clipped.dtype == dtype and bits(clipped) == bits(gradient)


@pytest.mark.parametrize("name", RESPONSES)
def test_a_limit_of_zero_gives_zero(name):
    gradient = jnp.array([3.0, -4.0, 0.0])
    for size in 5.0, 5e-20, 5e37:
        clipped = RESPONSES[name](gradient * size / 5, jnp.float32(size), jnp.array(0.0))
        np.testing.assert_array_equal(clipped, 0.0, err_msg=str(size))


@pytest.mark.parametrize("name", RESPONSES)
@quick
@given(vectors, positive)
def test_derivatives_are_finite(name, values, limit):
    size = np.float32(np.linalg.norm(values))
    for slope in SLOPES[name](np.float32(values), size, np.float32(limit)):
        assert np.isfinite(slope).all()


SLOPES = {
    name: jax.jit(
        jax.grad(lambda g, s, c, response=response: response(g, s, c).sum(), argnums=(0, 1, 2))
    )
    for name, response in RESPONSES.items()
}


@pytest.mark.parametrize("name", RESPONSES)
@pytest.mark.parametrize(
    "size, limit",
    [(0, 0), (0, 1), (1, 0), (1, 1), (0, np.inf), (1, np.inf), (1e38, 1), (1e30, 1e-10)],
)
def test_derivatives_are_finite_at_the_edges(name, size, limit):
    gradient = np.float32([0.6, -0.8, 0]) * np.float32(size)
    for slope in SLOPES[name](gradient, np.float32(size), np.float32(limit)):
        assert np.isfinite(slope).all()


def test_the_derivative_of_rescale_is_the_projection_off_the_gradient():
    def clipped(x):
        return responses.rescale(x, jnp.linalg.norm(x), jnp.array(1.0))

    x = np.array([3.0, 4.0])
    expected = (np.eye(2) - np.outer(x, x) / 25) / 5
    np.testing.assert_allclose(jax.jacobian(clipped)(jnp.float32(x)), expected, rtol=1e-5)


@pytest.mark.parametrize("name", LOCAL)
@quick
@given(vectors, positive)
def test_rescale_clamp_smooth_and_zero_never_enlarge(name, values, limit):
    clipped = jitted[name](
        np.float32(values), np.float32(np.linalg.norm(values)), np.float32(limit)
    )
    assert (np.abs(clipped) <= np.abs(np.float32(values))).all()


@pytest.mark.parametrize("name", RESPONSES)
@quick
@given(vectors, positive)
def test_signs_are_kept(name, values, limit):
    clipped = np.asarray(
        jitted[name](np.float32(values), np.float32(np.linalg.norm(values)), np.float32(limit))
    )
    assert (clipped * np.sign(values) >= 0).all()


@pytest.mark.parametrize("name", KEEPING)
@quick
@given(vectors, positive)
def test_all_but_clamp_keep_the_direction_and_give_the_size_that_they_tell(name, values, limit):
    gradient, size, limit = (
        np.float32(values),
        np.float32(np.linalg.norm(values)),
        np.float32(limit),
    )
    clipped, told = jitted[name](gradient, size, limit), float(jitted[name](size, size, limit))
    assert l2(clipped) == pytest.approx(told, rel=2e-6)
    np.testing.assert_allclose(
        np.asarray(clipped, float) * size, gradient.astype(float) * told, rtol=3e-6
    )


@pytest.mark.parametrize("name", KEEPING)
def test_a_response_to_a_size_is_its_target(name):
    sizes, limits = jnp.array([0, 1e-20, 0.2, 0.9, 1, 1.1, 5, 1e38]), jnp.array(1.0)
    target = KEEPING[name].target(sizes, limits)
    np.testing.assert_allclose(KEEPING[name](sizes, sizes, limits), target, rtol=1e-6)
    expected = [getattr(reference, name)(float(size), float(size), 1.0) for size in sizes]
    np.testing.assert_allclose(target, expected, rtol=1e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "size, limit",
    [(1e38, 1), (3e38, 1e-5), (1e30, 1e-10), (1e38, 1e-25), (1e30, 1e-30), (1e-25, 1e-28)],
)
@pytest.mark.parametrize("name", KEEPING)
def test_ratios_that_no_float_can_hold_clip_correctly(name, size, limit, way):
    gradient = np.float32([0.6 * size, -0.8 * size])
    expected = [getattr(reference, name)(float(x), size, limit) for x in gradient]
    clipped = WAYS[way](RESPONSES[name])(gradient, np.float32(size), np.float32(limit))
    np.testing.assert_allclose(clipped, expected, rtol=1e-5, atol=1e-38)
    whole = WAYS[way](lambda g: clip_leaf(RESPONSES[name], g, limit))(gradient)
    np.testing.assert_allclose(whole, expected, rtol=1e-5, atol=1e-38)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size, limit", [(1e-25, 1), (1e-10, 1e30), (1e-25, 1e35)])
@pytest.mark.parametrize("name", ["normalize", "band"])
def test_what_is_tiny_can_be_made_large(name, size, limit, way):
    gradient = np.float32([0.6 * size, -0.8 * size])
    expected = [getattr(reference, name)(float(x), size, limit) for x in gradient]
    clipped = WAYS[way](RESPONSES[name])(gradient, np.float32(size), np.float32(limit))
    np.testing.assert_allclose(clipped, expected, rtol=1e-5)
    slope = jax.grad(lambda limit: RESPONSES[name](gradient, np.float32(size), limit)[0])(
        np.float32(limit)
    )
    assert slope == pytest.approx(0.6 if name == "normalize" else 0.3, rel=1e-5)


@pytest.mark.parametrize("name", RESPONSES)
@pytest.mark.parametrize("scope", [scopes.tree(), scopes.leaf(), scopes.unit(), scopes.element()])
def test_sizes_after_clipping_are_those_of_the_result(scope, name):
    grads = {"a": jnp.array([[3.0, 0.4], [4.0, 0.2]]), "b": jnp.array([0.3])}
    norm = norms.linf() if name == "clamp" else norms.l2()
    clip = optaxclip.clip(1.0, scope=scope, norm=norm, response=RESPONSES[name])
    updates, state = clip.update(grads, clip.init(grads))
    measured = clip.update(updates, clip.init(updates))[1].reading
    np.testing.assert_allclose(state.reading.size_after, measured.size_before, rtol=1e-6)
    most = 5.1**0.5 if name == "power_half" else 1
    assert (state.reading.size_after <= most * (1 + 1e-6)).all()


NORMS = {
    "l1": (norms.l1(), reference.l1),
    "l2": (norms.l2(), reference.l2),
    "linf": (norms.linf(), reference.linf),
    "rms": (norms.rms(), reference.rms),
    "lp": (norms.lp(3), reference.lp(3)),
}
SCOPES = {
    "tree": (scopes.tree(), reference.tree),
    "group": (scopes.group(lambda path: path[0]), reference.group(lambda name: name[0])),
    "leaf": (scopes.leaf(), reference.leaf),
    "unit": (scopes.unit(), reference.unit),
    "element": (scopes.element(), reference.element),
}
LEAVES = {
    "a": np.array([3.0, 4.0], np.float32),
    "b": np.array([5.0], np.float32),
    "b2": np.array([[0.5, -2.0, 0.1], [1.5, 0.2, -0.1]], np.float32),
}


def sign(gradient, size, limit):
    """A response that changes the direction, and says nothing of the size after it."""
    return jnp.where(size > limit, jnp.sign(gradient) * limit / 10, gradient)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("norm", NORMS)
def test_the_size_that_is_recorded_is_that_of_the_result(scope, norm):
    parts, measure = (SCOPES[scope][0], NORMS[norm][0]), NORMS[norm][1]

    @functools.partial(jax.jit, static_argnums=0)
    def run(response, limit):
        clip = optaxclip.clip(limit, parts[0], norm=parts[1], response=response)
        return clip.update(LEAVES, None)

    for name, response in {**RESPONSES, "sign": sign}.items():
        if name == "clamp" and norm != "linf" and scope != "element":
            with pytest.raises(ValueError, match="clamp cuts elements, so the norm must be"):
                run(response, 1.0)
            continue
        for limit in 1.0, 4.5:
            updates, state = jax.device_get(run(response, limit))
            after = [
                (places[0][0], measure([updates[leaf][i] for leaf, i in places]))
                for places in SCOPES[scope][1](updates)
            ]
            if scope in ("unit", "element"):  # the reading has the largest of each leaf
                after = [(leaf, max(size for of, size in after if of == leaf)) for leaf in LEAVES]
            recorded = state.reading.size_after
            np.testing.assert_allclose(recorded, [size for _, size in after], rtol=2e-6)
            assert (recorded <= limit * (1 + 1e-6)).all() or name in ("sign", "power_half")
