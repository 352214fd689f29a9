"""StableAdamW, against its equations in NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip


def reference(gradients, params, b1=0.9, b2=0.99, eps=1e-6, max_rms=1.0, weight_decay=0.0):
    """Updates of one leaf, before the learning rate, for a list of gradients at constant
    parameters.
    """
    m, v, updates = 0.0, 0.0, []
    for t, gradient in enumerate(np.asarray(gradients, np.float64), 1):
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        debiased_m, debiased_v = m / (1 - b1**t), v / (1 - b2**t)
        rms = np.sqrt(np.mean(gradient**2 / np.maximum(debiased_v, eps**2)))
        step = debiased_m / (np.sqrt(debiased_v) + eps) + weight_decay * params
        updates.append(step / max(1.0, rms / max_rms))
    return np.array(updates)


def spiky(shape, steps=200, seed=0):
    rng = np.random.default_rng(seed)
    scale = np.where(rng.random(steps) < 0.05, 50.0, 1.0) * np.exp(0.5 * rng.standard_normal(steps))
    return (scale.reshape(-1, *[1] * len(shape)) * rng.standard_normal((steps, *shape))).astype(
        np.float32
    )


def run(optimizer, gradients, params):
    def step(state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return state, (updates, state.clip.reading.clipped_share)

    return jax.jit(lambda state: jax.lax.scan(step, state, gradients))(optimizer.init(params))[1]


@pytest.mark.parametrize(
    "options",
    [{}, {"b1": 0.8, "b2": 0.95, "eps": 1e-3, "max_rms": 2.0}, {"weight_decay": 0.1}],
    ids=str,
)
def test_equals_its_equations_leaf_by_leaf(options):
    params = {"a": np.ones((4, 3), np.float32), "b": np.full((5,), 2.0, np.float32)}
    gradients = {"a": spiky((4, 3)), "b": spiky((5,), seed=1)}
    updates, share = run(optaxclip.scale_by_stable_adam(**options), gradients, params)
    for name in params:
        want = reference(gradients[name], params[name].astype(np.float64), **options)
        np.testing.assert_allclose(updates[name], want, rtol=1e-4, atol=1e-5)
    assert 0.02 < share.mean() < 0.9  # both branches are seen


def test_where_nothing_is_cut_it_is_adam():
    gradients, params = {"a": spiky((4, 3))}, {"a": np.ones((4, 3), np.float32)}
    updates, share = run(optaxclip.scale_by_stable_adam(100.0, eps=1e-8), gradients, params)
    adam = optax.scale_by_adam(0.9, 0.99, 1e-8)
    state = adam.init(params)
    assert (share == 0).all()
    for i in range(50):
        want, state = adam.update({"a": gradients["a"][i]}, state)
        np.testing.assert_allclose(updates["a"][i], want["a"], rtol=1e-5, atol=1e-6)


def test_its_state_is_that_of_adam_and_a_few_numbers():
    params = {"w": jnp.zeros((100, 100))}
    state = optaxclip.scale_by_stable_adam().init(params)
    assert sum(x.nbytes for x in jax.tree.leaves(state)) - 2 * params["w"].nbytes < 100


def test_the_first_step_and_a_spike():
    adam = optaxclip.scale_by_stable_adam()
    params = jnp.zeros(4)
    update, state = jax.jit(adam.update), adam.init(params)
    updates, state = update(jnp.array([1.0, -2.0, 3.0, 4.0]), state)
    np.testing.assert_allclose(updates, [1, -1, 1, 1], rtol=1e-5)
    for _ in range(1000):
        updates, state = update(jnp.ones(4), state)
    updates, state = update(jnp.full(4, 1e6), state)
    # most that is cut
    np.testing.assert_allclose(state.clip.reading.size_before, [1 / np.sqrt(1 - 0.99)], rtol=1e-3)


def test_derivatives_are_finite_as_far_as_those_of_adam_are():
    def outcome(gradient):
        adam = optaxclip.scale_by_stable_adam()
        return jnp.sum(adam.update(gradient, adam.init(gradient))[0])

    assert np.isfinite(jax.grad(outcome)(jnp.array([1.0, -2.0, 1e-3]))).all()


def test_a_chain_trains_half_precision_weights():
    params = {"w": jnp.ones((3,), jnp.bfloat16), "step": jnp.arange(2)}
    optimizer = optax.chain(optaxclip.scale_by_stable_adam(weight_decay=0.1), optax.scale(-0.1))
    state = optimizer.init(params)
    updates, new_state = optimizer.update(
        {"w": jnp.ones((3,), jnp.bfloat16), "step": jnp.arange(2)}, state, params
    )
    assert updates["w"].dtype == jnp.bfloat16
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)


def test_what_it_refuses():
    with pytest.raises(ValueError, match=r"max_rms must be in \[0, inf\], got -1.0"):
        optaxclip.scale_by_stable_adam(-1.0)
    with pytest.raises(ValueError, match="requires the current value of parameters"):
        adam = optaxclip.scale_by_stable_adam(weight_decay=0.1)
        adam.update(jnp.ones(2), adam.init(jnp.ones(2)))
