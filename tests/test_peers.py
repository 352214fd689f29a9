"""Defects of clipping in today's libraries, each as our right answer; where `docs/sharp_edges.md`
names one of Optax, Optax's answer too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from precision import float64

import optaxclip
from optaxclip import norms, scopes


def ours(updates, clip=None, params=None):
    clip = optaxclip.clip_by_global_norm(1.0) if clip is None else clip
    return clip.update(updates, clip.init(updates if params is None else params), params)[0]


def theirs(updates, clip=None, params=None):
    clip = optax.clip_by_global_norm(1.0) if clip is None else clip
    return clip.update(updates, clip.init(updates), params)[0]


def norm64(tree):
    return np.sqrt(
        sum(np.sum(np.abs(np.asarray(x, np.float64)) ** 2) for x in jax.tree.leaves(tree))
    )


# Low precision, overflow, underflow

OVERFLOWING = {
    "fp16 [300, 1]": [jnp.array([300, 1], jnp.float16)],
    "fp16 1000 x 300": [jnp.full(1000, 300, jnp.float16)],
    "fp16 two leaves of 60000": [jnp.array([60000], jnp.float16)] * 2,
    "f32 1e20 and another leaf": [jnp.array([1e20, 1e20]), jnp.array([1.0])],
}


@pytest.mark.parametrize("name", OVERFLOWING)
def test_optax_zeroes_gradients_whose_squares_overflow_and_we_clip_them(name):
    updates = OVERFLOWING[name]
    assert norm64(theirs(updates)) == 0
    assert norm64(ours(updates)) == pytest.approx(
        1, rel=2e-3 if updates[0].dtype == jnp.float16 else 1e-6
    )


def test_optax_lets_tiny_fp16_gradients_through_and_we_clip_them():
    updates = jnp.full(10000, 1e-4, jnp.float16)  # norm 0.01
    assert norm64(theirs(updates, optax.clip_by_global_norm(1e-3))) == pytest.approx(1e-2, rel=1e-2)
    assert norm64(ours(updates, optaxclip.clip_by_global_norm(1e-3))) == pytest.approx(
        1e-3, rel=1e-2
    )


def test_optax_adds_bf16_leaves_in_bf16_and_we_in_float32():
    updates = [jnp.ones((), jnp.bfloat16)] * 3000  # norm 54.77
    assert norm64(theirs(updates)) > 3
    clip = optaxclip.clip_by_global_norm(1.0)
    out, state = clip.update(updates, clip.init(updates))
    assert norm64(out) == pytest.approx(1, rel=8e-3)
    assert state.reading.size_before[0] == pytest.approx(np.sqrt(3000), rel=1e-6)


def test_optax_misses_tiny_float32_gradients_and_we_clip_them():
    updates = jnp.array([1e-25, 1e-25])
    assert norm64(theirs(updates, optax.clip_by_global_norm(1e-30))) > 1e-26
    assert norm64(ours(updates, optaxclip.clip_by_global_norm(1e-30))) == pytest.approx(
        1e-30, rel=1e-6
    )


def test_optax_zeroes_the_fp16_part_of_a_large_gradient_and_we_clip_it():
    updates = {"wide": jnp.array([1e6]), "half": jnp.array([100], jnp.float16)}
    assert theirs(updates)["half"] == 0
    assert ours(updates)["half"][0] == pytest.approx(1e-4, rel=1e-3)


def test_float64_gradients_of_1e200_are_clipped_to_their_true_norm():
    with float64():
        out = ours(np.array([3e200, 4e200]))
        np.testing.assert_allclose(out, [0.6, 0.8], rtol=1e-14)


def test_300_draws_stay_within_the_limit_up_to_rounding():
    draws = jax.random.normal(jax.random.key(0), (300, 50)) * 10
    out = np.asarray(jax.vmap(ours)(draws), np.float64)
    assert (np.linalg.norm(out, axis=1) <= 1 + 1e-6).all()


def test_a_gradient_just_below_the_limit_is_not_touched():
    updates = jnp.array([9e-7])
    np.testing.assert_array_equal(ours(updates, optaxclip.clip_by_global_norm(1e-6)), updates)


# Non-finite numbers, zeros and bad thresholds


def test_optax_gives_nan_and_zeros_for_one_infinity_and_we_nan_for_the_whole_group():
    updates = {"a": jnp.array([np.inf, 0.5]), "b": jnp.array([1.0])}
    assert theirs(updates)["b"] == 0
    assert all(np.isnan(x).all() for x in jax.tree.leaves(ours(updates)))
    zero = ours(updates, optaxclip.clip_by_global_norm(1.0, nonfinite="zero"))
    assert norm64(zero) == 0


@pytest.mark.parametrize("name", ["clip_by_global_norm", "clip_by_block_rms"])
def test_optax_gives_nan_for_zeros_at_threshold_zero_and_we_zeros(name):
    updates = jnp.zeros(3)
    assert np.isnan(theirs(updates, getattr(optax, name)(0.0))).all()
    np.testing.assert_array_equal(ours(updates, getattr(optaxclip, name)(0.0)), updates)


def test_optax_ascends_on_a_negative_threshold_and_we_refuse_it():
    updates = jnp.array([3.0, 4.0])
    np.testing.assert_allclose(
        theirs(updates, optax.clip_by_global_norm(-1.0)), [-0.6, -0.8], rtol=1e-6
    )
    with pytest.raises(ValueError, match=r"max_norm must be in \[0, inf\], got -1.0"):
        optaxclip.clip_by_global_norm(-1.0)
    np.testing.assert_array_equal(
        jax.jit(lambda c: ours(updates, optaxclip.clip_by_global_norm(c)))(-1.0), [0, 0]
    )


@pytest.mark.parametrize("threshold", ["1.0", None])
def test_optax_fails_late_and_darkly_on_what_is_no_number_and_we_at_once(threshold):
    clip = optax.clip_by_global_norm(threshold)
    with pytest.raises(TypeError):
        theirs(jnp.ones(2), clip)
    with pytest.raises(TypeError, match="max_norm must be a real number, got"):
        optaxclip.clip_by_global_norm(threshold)


def test_an_infinite_threshold_clips_nothing_and_says_nan_of_infinity():
    clip = optaxclip.clip_by_global_norm(np.inf)
    np.testing.assert_array_equal(ours(jnp.array([1e30]), clip), jnp.array([1e30]))
    assert np.isnan(ours(jnp.array([np.inf, 1.0]), clip)).all()


# Leaves, dtypes, tracing


def test_optax_fails_on_integer_and_float0_leaves_and_we_pass_them_through():
    for odd in (jnp.arange(2), np.zeros(2, jax.dtypes.float0)):
        updates = {"w": jnp.array([3.0, 4.0]), "odd": odd}
        with pytest.raises((TypeError, ValueError)):
            theirs(updates)
        out = ours(updates)
        assert out["odd"] is odd
        np.testing.assert_allclose(out["w"], [0.6, 0.8], rtol=1e-6)


def test_optax_fails_on_python_floats_and_we_do_not():
    with pytest.raises((AttributeError, ValueError)):
        theirs({"x": 3.0, "y": 4.0})
    assert ours({"x": 3.0, "y": 4.0}) == {"x": pytest.approx(0.6), "y": pytest.approx(0.8)}


def test_optax_cannot_schedule_the_norm_of_bf16_gradients_and_we_can():
    updates = jnp.array([3.0, 4.0], jnp.bfloat16)
    with pytest.raises(TypeError):
        jax.jit(lambda c: theirs(updates, optax.clip_by_global_norm(c)))(jnp.float32(1))
    out = jax.jit(lambda c: ours(updates, optaxclip.clip_by_global_norm(c)))(jnp.float32(1))
    assert out.dtype == jnp.bfloat16


def test_optax_promotes_bf16_gradients_by_the_threshold_and_we_keep_the_dtype():
    updates, limit = jnp.array([3.0, 4.0], jnp.bfloat16), jnp.float32(1)
    for name in ("clip_by_block_rms",):
        assert theirs(updates, getattr(optax, name)(limit)).dtype == jnp.float32
    for clip in (optaxclip.clip_by_value, optaxclip.clip_by_block_rms, optaxclip.clip_by_norm):
        assert ours(updates, clip(limit)).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["clip_by_global_norm", "clip_by_block_rms"])
def test_optax_has_nan_meta_gradients_at_zero_and_ours_are_finite(name):
    assert np.isnan(
        jax.grad(lambda g: theirs(g, getattr(optax, name)(1.0)).sum())(jnp.zeros(2))
    ).all()
    assert np.isfinite(
        jax.grad(lambda g: ours(g, getattr(optaxclip, name)(1.0)).sum())(jnp.zeros(2))
    ).all()


def test_complex_numbers_are_clipped_by_value_too():
    np.testing.assert_allclose(
        ours(jnp.array([3 + 4j, 0.1j]), optaxclip.clip_by_value(1.0)), [0.6 + 0.8j, 0.1j], rtol=1e-6
    )


# AGC


def test_optax_agc_fails_on_rank_6_and_ours_goes_by_output_units():
    params = jnp.ones((1, 2, 1, 2, 1, 3))
    with pytest.raises(ValueError):
        theirs(params, optax.adaptive_grad_clip(0.01), params)
    out = ours(params, optaxclip.adaptive_grad_clip(0.01), params)
    np.testing.assert_allclose(out, 0.01 * params, rtol=1e-5)


def test_axes_given_for_kernels_do_not_break_biases():
    params = {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)}
    out = ours(params, optaxclip.adaptive_grad_clip(0.01, axes=(0, 1, 2)), params)
    np.testing.assert_allclose(out["bias"], 0.01, rtol=1e-5)
    np.testing.assert_allclose(out["kernel"], 0.01, rtol=1e-5)


def test_one_input_of_four_outputs_is_four_units_if_asked():
    params, grads = jnp.ones((1, 4)), jnp.array([[1.0, 2.0, 3.0, 0.001]])
    out = ours(grads, optaxclip.adaptive_grad_clip(0.01, axes=0), params)
    np.testing.assert_allclose(out, [[0.01, 0.01, 0.01, 0.001]], rtol=1e-5)


def test_agc_with_a_missing_gradient_of_a_present_parameter():
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    clip = optaxclip.adaptive_grad_clip(0.01)
    out, _ = clip.update({"a": jnp.ones(2), "b": None}, clip.init(params), params)
    assert out["b"] is None
    np.testing.assert_allclose(out["a"], 0.01, rtol=1e-5)


def test_all_layers_keep_their_share_if_one_explodes_alone_in_its_group():
    grads = {"huge": jnp.array([1e6]), "calm": jnp.array([0.5])}
    assert ours(grads)["calm"] < 1e-6
    assert ours(grads, optaxclip.clip_by_global_norm(1.0, scope=scopes.leaf()))["calm"] == 0.5


def test_the_norm_types_of_pytorch():
    grads = [jnp.array([1.0, -2.0]), jnp.array([2.0])]
    for p, size in {1: 5.0, 2: 3.0, 3: 17 ** (1 / 3), np.inf: 2.0}.items():
        out = ours(grads, optaxclip.clip_by_global_norm(1.0, norm=norms.lp(p)))
        np.testing.assert_allclose(out[0], np.array([1.0, -2.0]) / size, rtol=1e-6)


def test_in_shard_map_the_norm_is_that_of_all_parts():
    mesh, gradient = jax.make_mesh((8,), ("x",)), jnp.arange(1.0, 17.0)

    def clipped(clip):
        run = jax.shard_map(
            lambda part: clip({"w": part})["w"],
            mesh=mesh,
            in_specs=jax.P("x"),
            out_specs=jax.P("x"),
        )
        return jax.jit(run)(jax.device_put(gradient, jax.NamedSharding(mesh, jax.P("x"))))

    pairs = gradient.reshape(8, 2)
    alone = pairs / jnp.linalg.norm(pairs, axis=1, keepdims=True)
    np.testing.assert_allclose(clipped(theirs), alone.ravel(), rtol=1e-6)
    np.testing.assert_allclose(clipped(ours), gradient / jnp.linalg.norm(gradient), rtol=1e-6)
