"""What a clip saw in the backward pass, and rules that rank: both against NumPy."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import optaxclip
from optaxclip import responses, scopes, telemetry, thresholds

LIMIT, STEPS = 1.5, 6


def chain(w, h, probe, steps=STEPS, limit=LIMIT, loop=True, wrap=lambda f: f):
    """`h -> w * h` many times, with a clip after each; the last value."""

    @wrap
    def step(h, _=None):
        return optaxclip.clip_cotangent(w * h, limit, probe=probe), None

    if loop:
        return jax.lax.scan(step, h, length=steps)[0]
    for _ in range(steps):
        h, _ = step(h)
    return h


def by_hand(w, start, steps=STEPS, limit=LIMIT):
    """The four sums of one backward pass: the cotangent at each clip from the last to the first."""
    cotangent, sums = np.asarray(start, np.float64), np.zeros(4)
    for _ in range(steps):
        size = np.linalg.norm(cotangent)
        sums += [size, min(size, limit), size > limit, 1]
        cotangent = w * cotangent * min(1, limit / size)
    return sums


def sums_of(probe):
    return np.array([float(number) for number in probe])


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint, jax.jit])
def test_a_probe_sums_over_the_steps_of_a_loop(loop, wrap):
    def loss(w, probe):
        return jnp.sum(chain(w, jnp.ones(3), probe, loop=loop, wrap=wrap))

    probe = jax.jit(jax.grad(loss, argnums=1))(1.2, telemetry.probe())
    np.testing.assert_allclose(sums_of(probe), by_hand(1.2, np.ones(3)), rtol=1e-6)


def test_a_probe_sums_over_the_examples_of_a_vmap_and_changes_no_derivative():
    scales = np.array([0.1, 0.5, 2.0], np.float32)

    def loss(w, probe=None):
        ends = jax.vmap(lambda a: jnp.sum(a * chain(w, a * jnp.ones(2), probe)))(scales)
        return jnp.sum(ends)

    derivative, probe = jax.grad(loss, argnums=(0, 1))(1.1, telemetry.probe())
    expected = sum(by_hand(1.1, [a, a]) for a in scales)
    np.testing.assert_allclose(sums_of(probe), expected, rtol=1e-6)
    np.testing.assert_array_equal(derivative, jax.grad(loss)(1.1))


def test_means_stay_right_where_the_loss_is_scaled_or_nothing_went_back():
    def loss(w, probe):
        return jnp.sum(chain(w, jnp.ones(3), probe))

    probe = jax.grad(loss, argnums=1)(1.2, telemetry.probe())
    before, after, share, uses = by_hand(1.2, np.ones(3))
    averaged = jax.tree.map(lambda x: x / 8, probe)  # as a mean over devices would
    for derivative, count in [(probe, uses), (averaged, uses / 8)]:
        numbers = telemetry.probed(derivative)
        expected = {
            "probe/size_before": before / uses,
            "probe/size_after": after / uses,
            "probe/clipped_share": share / uses,
            "probe/uses": count,
        }
        assert list(numbers) == list(expected)
        np.testing.assert_allclose(list(numbers.values()), list(expected.values()), rtol=1e-6)

    unused = telemetry.probed(telemetry.probe(), prefix="lstm")
    assert np.isnan(unused["lstm/size_before"]) and unused["lstm/uses"] == 0


def test_of_many_groups_a_probe_has_the_largest_and_the_share():
    x = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.5]), "n": jnp.array([1])}

    def loss(x, probe):
        y = optaxclip.clip_cotangent(x, 1.0, scope=scopes.leaf(), probe=probe)
        return jnp.sum(y["a"] * x["a"]) + jnp.sum(y["b"])

    probe = jax.grad(loss, argnums=1, allow_int=True)(x, telemetry.probe())
    np.testing.assert_allclose(sums_of(probe), [5, 1, 0.5, 1], rtol=1e-6)


def test_a_probe_sees_nothing_in_a_tree_without_floats():
    def loss(probe):
        optaxclip.clip_cotangent({"n": jnp.array([1])}, 1.0, probe=probe)
        return 0.0

    assert not sums_of(jax.grad(loss)(telemetry.probe())).any()


@pytest.mark.parametrize("explicit", [False, True])
def test_on_devices_each_use_counts_once(explicit):
    """Examples on different devices are uses of their own; a sharded value is one use."""
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    x = jax.device_put(jnp.arange(1.0, 17.0), jax.NamedSharding(mesh, P("x")))

    def probed(sharded_over, y, probe):
        def loss(probe):
            return jnp.sum(
                y * optaxclip.clip_cotangent(y, 6.0, sharded_over=sharded_over, probe=probe)
            )

        return jax.grad(loss)(probe)

    for sharded_over, pieces in [((), np.split(np.arange(1.0, 17.0), 8)), (None, [x])]:
        run = functools.partial(probed, sharded_over)
        run = jax.shard_map(run, mesh=mesh, in_specs=(P("x"), P()), out_specs=P())
        probe = jax.jit(run)(x, telemetry.probe())
        sizes = np.array([np.linalg.norm(piece) for piece in pieces])
        expected = [sizes.sum(), np.minimum(sizes, 6).sum(), (sizes > 6).sum(), len(pieces)]
        np.testing.assert_allclose(sums_of(probe), expected, rtol=1e-6)


def test_a_threshold_can_learn_from_what_the_probe_said():
    """By hand: the limit is twice the running mean of the sizes that went back."""

    def loss(w, probe, limit):
        return jnp.sum(chain(w, jnp.ones(3), probe, limit=limit))

    @jax.jit
    def step(w, mean):
        derivatives = jax.grad(loss, argnums=(0, 1))(w, telemetry.probe(), 2 * mean)
        return telemetry.probed(derivatives[1])["probe/size_after"]

    mean = jnp.float32(0.5)
    for _ in range(30):
        mean = 0.5 * mean + 0.5 * step(1.01, mean)
    unclipped = np.linalg.norm(np.ones(3)) * np.mean(1.01 ** np.arange(STEPS))
    np.testing.assert_allclose(mean, unclipped, rtol=1e-4)
    assert step._cache_size() == 1


# Rules that rank


def ranked_by_hand(sizes, k=None, q=None):
    known = np.sort(sizes[np.isfinite(sizes) & (sizes > 0)])[::-1]
    if q is not None:
        return np.quantile(known, q) if known.size else np.inf
    return known[k - 1] if k <= known.size else np.inf


@pytest.mark.parametrize(
    "options", [{"k": 1}, {"k": 3}, {"k": 6}, {"k": 99}, {"q": 0.5}, {"q": 0.9}]
)
@pytest.mark.parametrize(
    "hurt", [{}, {0: 0.0, 4: 0.0}, {2: np.inf, 3: np.nan}, dict.fromkeys(range(8), 0.0)]
)
def test_ranked_is_the_kth_largest_or_a_quantile_of_one_block(options, hurt):
    sizes = np.abs(np.random.default_rng(0).normal(size=8)).astype(np.float32)
    sizes[list(hurt)] = list(hurt.values())
    clip = optaxclip.clip(thresholds.ranked(**options), scopes.leaf(batch_axes=0))
    updates, _ = clip.update(jnp.array(sizes), clip.init(jnp.array(sizes)))
    expected = np.minimum(sizes, ranked_by_hand(sizes.astype(np.float64), **options))
    np.testing.assert_allclose(updates, np.where(np.isfinite(sizes), expected, np.nan), rtol=1e-6)


def test_the_largest_derivatives_of_tokens_are_dropped():
    """Of derivatives `[batch, time, features]`, tokens above the third largest are dropped."""
    upstream = np.random.default_rng(1).normal(size=(2, 5, 3)).astype(np.float32)

    def loss(x):
        y = optaxclip.clip_cotangent(
            x,
            thresholds.ranked(3),
            scope=scopes.leaf(batch_axes=(0, 1)),
            response=responses.drop,
        )
        return jnp.sum(upstream * y)

    sizes = np.linalg.norm(upstream, axis=-1)
    kept = sizes <= np.sort(sizes.ravel())[-3]
    assert (~kept).sum() == 2
    np.testing.assert_allclose(
        jax.jit(jax.grad(loss))(jnp.zeros((2, 5, 3))), upstream * kept[..., None]
    )


def test_rules_without_memory_combine_in_the_backward_pass():
    rule = thresholds.at_most(thresholds.ranked(q=0.5), 2.5)
    x = jnp.array([1.0, 2.0, 3.0, 4.0, 9.0])

    def clipped(limits):
        clip = functools.partial(optaxclip.clip_cotangent, scope=scopes.leaf(batch_axes=0))
        return jax.grad(lambda y: jnp.sum(x * clip(y, limits)))(jnp.zeros(5))

    np.testing.assert_allclose(clipped(rule), [1, 2, 2.5, 2.5, 2.5])
    np.testing.assert_allclose(clipped(thresholds.ranked(2)), [1, 2, 3, 4, 4])


def test_a_dict_holds_numbers_and_rules():
    scope = scopes.group(lambda path: path)
    x = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([8.0])}

    def loss(y, limit):
        limits = {"a": limit, "b": thresholds.ranked(1)}
        y = optaxclip.clip_cotangent(y, limits, scope=scope)
        return jnp.sum(x["a"] * y["a"]) + jnp.sum(x["b"] * y["b"])

    derivative = jax.jit(jax.grad(loss))(jax.tree.map(jnp.zeros_like, x), 1.0)
    np.testing.assert_allclose(derivative["a"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(derivative["b"], [8])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: optaxclip.clip_cotangent(jnp.ones(2), 1.0, probe=jnp.zeros(4)),
            TypeError,
            "probe must be a Probe, got Array([0., 0., 0., 0.], dtype=float32); pass one such as "
            "telemetry.probe()",
        ),
        (
            lambda: thresholds.ranked(2, q=0.5),
            TypeError,
            "k and q are both given, got 2 and 0.5; pass one of them",
        ),
        (lambda: thresholds.ranked(0), ValueError, "k must be at least 1, got 0"),
        (lambda: thresholds.ranked(), TypeError, "k must be an integer, got None"),
        (lambda: thresholds.ranked(q=1.0), ValueError, "q must be"),
    ],
    ids=["probe", "both", "k", "neither", "q"],
)
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        call()
