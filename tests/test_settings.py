"""Every public transform works with the settings of JAX that make other code fail."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_conformance import MONITORS, TRANSFORMS

import optaxclip
from optaxclip import scopes

GRADS = {"kernel": jnp.arange(12.0).reshape(4, 3) - 5, "bias": jnp.ones(3, jnp.bfloat16)}
EVERY = {**TRANSFORMS, **MONITORS}
SETTINGS = [
    jax.numpy_dtype_promotion("strict"),
    jax.numpy_rank_promotion("raise"),
    jax.debug_nans(True),
    jax.checking_leaks(),
]


@pytest.mark.parametrize("name", EVERY)
def test_settings_change_nothing(name):
    transform = EVERY[name]()

    @jax.jit
    def run(grads):
        state = transform.init(grads)
        updates, state = transform.update(grads, state, grads, value=jnp.array(1.0))
        return transform.update(updates, state, grads, value=jnp.array(1.0))[0]

    expected = run(GRADS)
    with contextlib.ExitStack() as stack:
        for setting in SETTINGS:
            stack.enter_context(setting)
        jax.tree.map(np.testing.assert_array_equal, run(GRADS), expected)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    "name",
    ["clip_by_global_norm", "clip_by_value", "adaptive_grad_clip", "skip_nonfinite", "zclip"],
)
def test_many_seeds_scan_over_parameters_on_an_explicit_mesh(name, inside):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    params = {"w": np.arange(16.0).reshape(2, 8) - 5}
    maker = getattr(optaxclip, name)
    transform = maker(optax.adam(0.1)) if name == "skip_nonfinite" else None
    if transform is None:
        clip = maker() if name in ("adaptive_grad_clip", "zclip") else maker(1.0)
        transform = optax.chain(clip, optax.sgd(0.1))

    def train(params):
        def step(carry, _):
            updates, state = transform.update(carry[0], carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(step, (params, transform.init(params)), None, length=2)[0][0]

    expected = jax.jit(jax.vmap(train))(params)
    placed = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("x", "y"))), params)
    if inside:
        with jax.set_mesh(mesh):
            out = jax.jit(jax.vmap(train))(placed)
    else:
        out = jax.jit(jax.vmap(train))(placed)
    np.testing.assert_allclose(out["w"], expected["w"], rtol=1e-6)


@pytest.mark.parametrize("check", [True, False])
def test_units_of_one_device_s_part_are_not_guessed(check):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)

    def clipped(grads, axes=None, **options):
        clip = optaxclip.clip(1.0, scopes.unit(axes), **options)
        return clip.update(grads, clip.init(grads))[0]

    def over_devices(function, grads, spec):
        mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check)
        return mapped(grads)

    words = "^scope must say what a unit of the leaf .* is, whose part here has the shape"
    with pytest.raises(ValueError, match=words):
        over_devices(lambda g: clipped(g, sharded_over="x"), weights.T, P("x"))
    if check:
        with pytest.raises(ValueError, match=words):
            over_devices(clipped, weights, P(None, "x"))
    out = over_devices(lambda g: clipped(g, 0, sharded_over=()), weights, P(None, "x"))
    np.testing.assert_allclose(np.linalg.norm(out, axis=0), 1, rtol=1e-5)
    out = over_devices(lambda g: clipped(g, 0, sharded_over="x"), weights.T, P("x"))
    np.testing.assert_allclose(np.linalg.norm(out, axis=0), 1, rtol=1e-5)
