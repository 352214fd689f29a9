"""Weights, the mean of what is kept, centers and iterations: equal to NumPy in float64, by factors
and stored, in microbatches, with masks, and over devices.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optaxclip import norms, per_example, responses, scopes
from optaxclip.per_example import aggregate, clipped_grad

SHAPES = {"a": (20, 16), "b": (16,), "c": (16, 20)}
BATCH = 16


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


PARAMS = {name: normal(*shape) / 4 for name, shape in SHAPES.items()}
X = normal(BATCH, 20, seed=1)
Y = normal(BATCH, 20, seed=2) * np.float32([0.1, 1, 3, 10] * 4)[:, None]
X[6] = np.nan
MASK = np.arange(BATCH) != 3
WEIGHTS = np.float32([0.5, 3, 1, 7, 0, 2, 1, 4] * 2)
CENTER = {name: 0.3 * normal(*shape, seed=3) for name, shape in SHAPES.items()}


def loss(params, x, y):
    return jnp.sum((jnp.tanh(x @ params["a"] + params["b"]) @ params["c"] - y) ** 2) / 40


GRADIENTS = jax.device_get(jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))(PARAMS, X, Y))
EXAMPLES = [
    {name: np.asarray(leaf[i], np.float64) for name, leaf in GRADIENTS.items()}
    for i in range(BATCH)
]
LIMIT = float(np.nanmedian([reference.l2(list(one.values())) for one in EXAMPLES]))
LOSSES = np.asarray(jax.vmap(loss, (None, 0, 0))(PARAMS, X, Y), np.float64)

# How it is called, beside the limit: options of the function, options of the call
WAYS = {
    "weights": ({}, {"weights": WEIGHTS}),
    "weights, sum": ({"reduce": "sum"}, {"weights": WEIGHTS}),
    "kept": ({"reduce": "kept"}, {}),
    "kept, drop": ({"reduce": "kept", "response": responses.drop}, {"weights": WEIGHTS}),
    "center": ({}, {"center": CENTER}),
    "iterate": ({"iterate": 3}, {"weights": WEIGHTS}),
    "kept around a center": (
        {"reduce": "kept", "response": responses.drop, "iterate": 2},
        {"center": CENTER},
    ),
}
SCOPES = {"tree": (scopes.tree(), reference.tree), "leaf": (scopes.leaf(), reference.leaf)}
each_way = pytest.mark.parametrize("way", WAYS)
each_scope = pytest.mark.parametrize("scope", SCOPES)


def wanted(way, scope):
    made, called = WAYS[way]
    response = reference.drop if made.get("response") is responses.drop else reference.rescale
    options = {name: made[name] for name in made if name != "response"}
    limit = LIMIT / (1 if scope == "tree" else 2)
    return reference.aggregate(
        EXAMPLES, SCOPES[scope][1], lambda places: limit, response, mask=MASK, **options, **called
    )


def made(make, way, scope, *args, **options):
    limit = LIMIT / (1 if scope == "tree" else 2)
    return make(*args, limit, scope=SCOPES[scope][0], **WAYS[way][0], **options)


def close(got, want, rtol=2e-5):
    assert set(got) == set(want)
    for name, leaf in want.items():
        np.testing.assert_allclose(
            got[name], leaf, rtol=rtol, atol=rtol * np.abs(leaf).max(), err_msg=name
        )


@each_way
@each_scope
@pytest.mark.parametrize("size", [None, 4])
def test_gradients_are_those_of_numpy(way, scope, size):
    function = made(clipped_grad, way, scope, loss, microbatch=size)
    call = WAYS[way][1]
    (value, seen), got = jax.jit(lambda x, y, call: function(PARAMS, x, y, mask=MASK, **call))(
        X, Y, call
    )
    close(got, wanted(way, scope))
    counted = MASK & np.isfinite(LOSSES)
    np.testing.assert_array_equal(seen.counted, counted)
    weights, reduce = call.get("weights", np.ones(BATCH)), WAYS[way][0].get("reduce", "mean")
    total = np.sum((weights * LOSSES)[counted])
    divisor = {"mean": weights[MASK].sum(), "kept": weights[counted].sum(), "sum": 1}[reduce]
    assert value == pytest.approx(total / divisor, rel=1e-5)


@each_way
@each_scope
def test_given_gradients_are_those_of_numpy(way, scope):
    clip = made(aggregate, way, scope)
    got, state = jax.jit(lambda g, call: clip.update(g, clip.init(PARAMS), mask=MASK, **call))(
        GRADIENTS, WAYS[way][1]
    )
    close(got, wanted(way, scope))
    assert state.step == 1 and state.reading.nonfinite_steps == 1


@each_way
def test_stored_gradients_give_the_same_as_factors(way):
    call = WAYS[way][1]
    by_factors = made(clipped_grad, way, "tree", loss)
    stored = made(clipped_grad, way, "tree", loss, norm=norms.l2()._replace(name="another"))
    centered = "iterate" in WAYS[way][0]
    plan = by_factors.plan(PARAMS, X, Y)
    assert plan["a"] == ("stored" if centered else "factors")
    assert set(stored.plan(PARAMS, X, Y).values()) == {"stored"}
    (value, seen), got = by_factors(PARAMS, X, Y, mask=MASK, **call)
    (same, also), want = stored(PARAMS, X, Y, mask=MASK, **call)
    close(got, jax.device_get(want))
    assert value == pytest.approx(float(same), rel=1e-6)
    np.testing.assert_array_equal(seen.clipped, also.clipped)


@each_way
@pytest.mark.parametrize("kind", ["explicit", "mapped", "mapped, microbatches"])
def test_over_devices(way, kind):
    call, size = WAYS[way][1], 2 if "microbatches" in kind else None
    mesh = jax.make_mesh((8,), ("x",))
    options = {} if kind == "explicit" else {"sharded_over": "x", "microbatch": size and 1}
    function = made(clipped_grad, way, "tree", loss, **options)
    clip = made(aggregate, way, "tree", **{k: v for k, v in options.items() if k != "microbatch"})
    rows = {name: value for name, value in call.items() if name == "weights"}
    rest = {name: value for name, value in call.items() if name == "center"}

    def run(x, y, gradients, mask, rows, rest):
        (value, _), got = function(PARAMS, x, y, mask=mask, **rows, **rest)
        return value, got, clip.update(gradients, None, mask=mask, **rows, **rest)[0]

    args = X, Y, GRADIENTS, MASK, rows
    if kind == "explicit":
        with jax.set_mesh(mesh):
            split = jax.device_put(args, NamedSharding(mesh, P("x")))
            value, got, given = jax.jit(run)(*split, rest)
    else:
        mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
        mapped = jax.shard_map(run, mesh=mesh, in_specs=(P("x"),) * 5 + (P(),), out_specs=P())
        value, got, given = jax.jit(mapped)(*args, rest)
    close(got, wanted(way, "tree"))
    close(given, wanted(way, "tree"))
    plain = made(clipped_grad, way, "tree", loss)
    assert value == pytest.approx(float(plain(PARAMS, X, Y, mask=MASK, **call)[0][0]), rel=1e-5)


def test_the_weights_of_clients_make_federated_averaging():
    updates, samples = normal(5, 12, seed=4), np.array([10, 200, 30, 1, 59])
    out, _ = aggregate(np.inf).update(updates, None, weights=samples)
    np.testing.assert_allclose(
        out, np.average(updates, axis=0, weights=samples), rtol=2e-6, atol=1e-7
    )
    out, _ = aggregate(1.0).update(updates, None, weights=samples)
    unit = updates / np.maximum(1, np.linalg.norm(updates, axis=1, keepdims=True))
    np.testing.assert_allclose(out, np.average(unit, axis=0, weights=samples), rtol=2e-6, atol=1e-7)


def test_weights_that_sum_to_less_than_one_and_to_nothing():
    updates = normal(4, 3, seed=5)
    for reduce in "mean", "kept":
        clip = aggregate(np.inf, reduce=reduce)
        out, _ = clip.update(updates, None, weights=np.full(4, 0.01, np.float32))
        np.testing.assert_allclose(out, updates.mean(0), rtol=1e-5)
        out, _ = clip.update(updates, None, weights=np.zeros(4))
        np.testing.assert_array_equal(out, 0)


def test_a_traced_weight_that_is_negative_or_nan_counts_as_zero():
    updates = normal(3, 4, seed=6)
    run = jax.jit(lambda weights: aggregate(np.inf).update(updates, None, weights=weights)[0])
    np.testing.assert_allclose(run(np.float32([1, -5, np.nan])), updates[0], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int32"])
def test_weights_of_any_numbers(dtype):
    updates = normal(3, 4, seed=6)
    weights = jnp.array([1, 2, 3], dtype)
    out, _ = aggregate(np.inf).update(updates, None, weights=weights)
    np.testing.assert_allclose(out, np.average(updates, axis=0, weights=[1, 2, 3]), rtol=1e-6)


def test_what_all_drop_is_zero():
    updates = {"a": normal(4, 3), "b": 0.01 * normal(4, 3, seed=7)}
    scope = scopes.leaf()
    clip = aggregate(0.1, scope=scope, response=responses.drop, reduce="kept")
    out, _ = clip.update(updates, None)
    np.testing.assert_array_equal(out["a"], 0)
    np.testing.assert_allclose(out["b"], updates["b"].mean(0), rtol=1e-5, atol=1e-9)


def test_leaves_in_no_group_are_divided_by_the_finite_examples():
    updates = {"a": np.float32([[3], [0.1], [np.nan]]), "b": np.float32([[1], [2], [3]])}
    scope = scopes.group(lambda path: None if path == "b" else path)
    clip = aggregate(1.0, scope=scope, response=responses.drop, reduce="kept")
    out, _ = clip.update(updates, None)
    np.testing.assert_allclose([out["a"][0], out["b"][0]], [0.1, 1.5], rtol=1e-6)


def test_kept_layers_of_a_stack():
    updates = np.float32([[[3, 0], [0.1, 0]], [[0.2, 0], [0.3, 0]]])  # [examples, layers, 2]
    scope = scopes.tree(batch_axes=0)
    clip = aggregate(1.0, scope=scope, response=responses.drop, reduce="kept")
    out, _ = clip.update(updates, None)
    np.testing.assert_allclose(out[:, 0], [0.2, 0.2], rtol=1e-6)


@pytest.mark.parametrize("limit", [1.0, per_example.quantile(0.5)], ids=["number", "rule"])
def test_layers_of_a_stack_are_clipped_by_themselves(limit):
    def linear(params, x):
        return jnp.sum(x[:, None, :] @ params)

    params, x = np.zeros((2, 6, 6), np.float32), normal(4, 2, 6, seed=9)
    scope = scopes.tree(batch_axes=0)
    (_, seen), got = clipped_grad(linear, limit, scope=scope, reduce="sum")(params, x)
    sizes = np.linalg.norm(x, axis=2) * 6**0.5
    np.testing.assert_allclose(seen.sizes, sizes, rtol=1e-5)
    want = (x / np.maximum(sizes, 1)[..., None]).sum(0)
    np.testing.assert_allclose(got, np.repeat(want[..., None], 6, 2), rtol=1e-5, atol=1e-6)


# Karimireddy, He and Jaggi, Learning from history for Byzantine robust optimization, 2021


def workers():
    honest = 3 + 0.1 * normal(8, 4, seed=8)
    return np.concatenate([honest, np.full((2, 4), 1e6, np.float32)]), honest.mean(0)


@pytest.mark.parametrize("limit, steps", [(1.0, 40), (10.0, 5)])
def test_centered_clipping_withstands_two_workers_of_ten(limit, steps):
    gradients, truth = workers()
    assert np.linalg.norm(gradients.mean(0) - truth) == pytest.approx(4e5, rel=1e-3)
    out, _ = aggregate(limit, iterate=steps).update(gradients, None)
    # at rest the honest pull as much as the two: 8 |v - mean| = 2 tau
    assert np.linalg.norm(out - truth) == pytest.approx(2 * limit / 8, rel=0.03)


def test_one_step_from_a_center_near_the_truth():
    gradients, truth = workers()
    out, _ = aggregate(1.0).update(gradients, None, center=truth)
    assert np.linalg.norm(out - truth) == pytest.approx(0.2, rel=1e-3)  # 2 tau / 10


def test_a_center_that_is_passed_on_is_another_iteration():
    gradients, _ = workers()
    two, _ = aggregate(1.0, iterate=2).update(gradients, None)
    one, _ = aggregate(1.0).update(gradients, None)
    np.testing.assert_array_equal(aggregate(1.0).update(gradients, None, center=one)[0], two)


def test_a_limit_learns_from_the_distances_to_the_center():
    gradients, truth = workers()
    clip = aggregate(per_example.quantile(0.5, initial=5.0), iterate=2)
    _, state = clip.update(gradients, None, center=truth)
    within = (np.linalg.norm(gradients - truth, axis=1) <= 5).mean()
    assert state.threshold[0] == pytest.approx(5 * np.exp(-0.2 * (within - 0.5)), rel=1e-5)


def test_no_examples_leave_the_center():
    clip = aggregate(1.0, iterate=2)
    out, _ = clip.update({"a": np.zeros((0, 3), np.float32)}, None, center={"a": np.ones(3)})
    np.testing.assert_array_equal(out["a"], 1)
    function = clipped_grad(loss, LIMIT)
    (value, _), got = function(PARAMS, X[:0], Y[:0], center=CENTER, weights=WEIGHTS[:0])
    assert value == 0
    close(got, CENTER, 1e-7)


def test_a_center_beside_leaves_that_are_no_floats():
    updates = {"a": normal(3, 2), "n": np.arange(3), "none": None}
    clip = aggregate(0.1, iterate=2)
    out, _ = clip.update(updates, None, center={"a": np.ones(2), "n": np.int32(0), "none": None})
    alone, _ = clip.update({"a": updates["a"]}, None, center={"a": np.ones(2)})
    np.testing.assert_array_equal(out["a"], alone["a"])
    params = {**PARAMS, "count": np.int32(3)}
    function = clipped_grad(loss, LIMIT)
    got = function(params, X, Y, center={**CENTER, "count": 0})[1]
    again = function(params, X, Y, center=got)[1]
    assert again.pop("count").dtype == jax.dtypes.float0
    got.pop("count")
    close(again, jax.device_get(function(PARAMS, X, Y, center=got)[1]), 1e-6)


def test_low_precision_is_centered_in_float32():
    updates, center = jnp.full((3, 2), 1.0, jnp.bfloat16), jnp.full(2, 0.999, jnp.float32)
    _, state = aggregate(1.0).update(updates, None, center=center)
    assert state.reading.size_before[0] == pytest.approx(0.001 * 2**0.5, rel=1e-3)


def test_wrong_options_are_refused():
    mean = aggregate(1.0)
    updates = {"a": np.ones((3, 2), np.float32)}

    def call(clip=mean, **options):
        return clip.update(updates, None, **options)

    with pytest.raises(ValueError, match=r"^weights must have shape \(3,\), got \(2,\); pass one"):
        call(weights=np.ones(2))
    with pytest.raises(
        TypeError, match=r"^weights must be real numbers, got bool; pass one .*mask"
    ):
        call(weights=np.ones(3, bool))
    for bad in -1.0, np.nan:
        with pytest.raises(ValueError, match=r"^weights must not be negative or NaN, got \["):
            call(weights=np.array([1.0, bad, 1.0]))
    with pytest.raises(
        ValueError, match=r"^center must have the structure of the gradient, .*, got"
    ):
        call(center=np.ones(2))
    with pytest.raises(
        ValueError,
        match=r"^center has shape \(3, 2\) at \['a'\], where the gradient has shape \(2,\);",
    ):
        call(center=updates)
    with pytest.raises(
        ValueError, match=r"^center has shape \(1,\) at \['a'\], where the gradient has .*20"
    ):
        clipped_grad(loss, 1.0)(PARAMS, X, Y, center={**CENTER, "a": np.ones(1)})
    message = r"^reduce must be 'mean' or 'kept' with a center or iterate, got 'sum'; a center is"
    for make in aggregate, functools.partial(clipped_grad, loss):
        with pytest.raises(ValueError, match=message):
            make(1.0, reduce="sum", iterate=2)
        with pytest.raises(ValueError, match=r"^reduce='kept' counts examples by group of whole"):
            make(1.0, reduce="kept", scope=scopes.unit())
        with pytest.raises(ValueError, match=r"^iterate must be at least 1, got 0"):
            make(1.0, iterate=0)
    with pytest.raises(ValueError, match=message):
        call(aggregate(1.0, reduce="sum"), center={"a": np.ones(2)})
    with pytest.raises(ValueError, match=message):
        clipped_grad(loss, 1.0, reduce="sum")(PARAMS, X, Y, center=CENTER)
