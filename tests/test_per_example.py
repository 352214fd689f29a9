"""Clipping each example by itself: equal to NumPy in float64 on gradients that are stored for each
example.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip
from optaxclip import norms, per_example, responses, scopes, telemetry, thresholds
from optaxclip.per_example import aggregate, clipped_grad


def compiled(function, *args, **options):
    return jax.jit(lambda args: function(*args, **options))(args)


SHAPES = {"b1": (8,), "b2": (3,), "w1": (6, 8), "w2": (8, 3)}
BATCH = 6


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


PARAMS = {name: normal(*shape) / 2 for name, shape in SHAPES.items()}
X, Y = (
    normal(BATCH, 6, seed=1),
    normal(BATCH, 3, seed=2) * np.float32([[0.1], [1], [3], [1], [0.3], [10]]),
)


def loss(params, x, y):
    return (
        jnp.sum((jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"] - y) ** 2)
        / 2
    )


@jax.jit
def stored(params, x, y):
    return jax.vmap(jax.grad(loss), (None, 0, 0))(params, x, y)


def examples(gradients):
    """One tree in float64 for each example."""
    wide = {name: np.asarray(leaf, np.float64) for name, leaf in gradients.items()}
    return [
        {name: leaf[i] for name, leaf in wide.items()}
        for i in range(len(next(iter(wide.values()))))
    ]


def sizes_of(each, groups, norm):
    return np.array(
        [[norm([one[name][i] for name, i in places]) for places in groups(one)] for one in each]
    )


def expected(each, groups, norm, limit_of, response=reference.rescale):
    """The sum of what each example is clipped to."""
    clipped = [reference.clip(one, groups, norm, limit_of, response) for one in each]
    return {name: sum(one[name] for one in clipped) for name in each[0]}


def close(got, want, rtol=1e-5):
    assert set(got) == set(want)
    for name, leaf in want.items():
        np.testing.assert_allclose(
            got[name], leaf, rtol=rtol, atol=rtol * np.abs(leaf).max(), err_msg=name
        )


EACH = examples(stored(PARAMS, X, Y))
SIZES = sizes_of(EACH, reference.tree, reference.l2)[:, 0]
LIMIT = float(np.median(SIZES))


def layer(path):
    return path[1]


SCOPES = {
    "tree": (scopes.tree(), reference.tree),
    "group": (scopes.group(layer), reference.group(layer)),
    "leaf": (scopes.leaf(), reference.leaf),
    "unit": (scopes.unit(), reference.unit),
    "element": (scopes.element(), reference.element),
}
NORMS = {
    name: (getattr(norms, name)(), getattr(reference, name)) for name in ("l2", "l1", "linf", "rms")
}
RESPONSES = {
    name: (getattr(responses, name), getattr(reference, name))
    for name in ("rescale", "clamp", "smooth", "drop", "normalize", "band", "automatic", "psac")
}
RESPONSES["low band"] = tuple(
    functools.partial(module.band, low=0.2) for module in (responses, reference)
)
RESPONSES["gamma"] = tuple(
    functools.partial(module.automatic, gamma=0.5) for module in (responses, reference)
)
PAIRS = [(norm, "rescale") for norm in NORMS] + [
    ("linf" if response == "clamp" else "l2", response)
    for response in RESPONSES
    if response != "rescale"
]
FEW = [("l2", "rescale"), ("l1", "rescale"), ("rms", "rescale"), ("linf", "clamp"), ("l2", "band")]


def test_the_batch_is_worth_clipping():
    assert SIZES.max() > 5 * SIZES.min() and (SIZES > LIMIT).sum() == 3


@pytest.mark.parametrize("scope", SCOPES)
def test_each_example_is_clipped_by_itself(scope):
    ours, groups = SCOPES[scope]
    limits = {norm: float(np.median(sizes_of(EACH, groups, NORMS[norm][1]))) for norm in NORMS}
    per_group = {norm: {"1": limit, "2": limit / 2} for norm, limit in limits.items()}
    given = {norm: per_group[norm] if scope == "group" else limit for norm, limit in limits.items()}

    def limit_of(norm):
        return lambda places: per_group[norm][places[0][0][1]] if scope == "group" else limits[norm]

    @jax.jit
    def run(params, x, y):
        out = {}
        for norm, response in PAIRS if scope == "tree" else FEW:
            function = clipped_grad(
                loss, given[norm], scope=ours, norm=NORMS[norm][0], response=RESPONSES[response][0]
            )
            out[norm, response] = function(params, x, y)
        return out

    for (norm, response), ((mean, seen), got) in run(PARAMS, X, Y).items():
        total = expected(EACH, groups, NORMS[norm][1], limit_of(norm), RESPONSES[response][1])
        close(got, {name: leaf / BATCH for name, leaf in total.items()})
        sizes = sizes_of(EACH, groups, NORMS[norm][1])
        over = sizes > np.array([limit_of(norm)(places) for places in groups(EACH[0])])
        if scope in ("unit", "element"):  # one number for each leaf
            leaves = np.array([places[0][0] for places in groups(EACH[0])])
            sizes, over = (
                np.stack([x[:, leaves == name].max(1) for name in SHAPES], 1) for x in (sizes, over)
            )
        np.testing.assert_allclose(seen.sizes, sizes, rtol=1e-5)
        np.testing.assert_array_equal(seen.clipped, over)
        losses = jax.vmap(loss, (None, 0, 0))(PARAMS, X, Y)
        np.testing.assert_allclose(seen.losses, losses, rtol=1e-6)
        assert mean == pytest.approx(float(np.mean(losses)), rel=1e-6)
        assert seen.counted.all() and seen.dropped == 0 and seen.aux is None


def test_factors_are_for_l2_whole_leaves_and_kept_directions():
    def kinds(**options):
        return set(clipped_grad(loss, 1.0, **options).plan(PARAMS, X, Y).values())

    plan = clipped_grad(loss, 1.0).plan(PARAMS, X, Y)
    assert plan == {"b1": "stored", "b2": "stored", "w1": "factors", "w2": "factors"}
    for options in (
        {"scope": scopes.leaf()},
        {"norm": norms.lp(2)},
        {"response": RESPONSES["low band"][0]},
    ):
        assert kinds(**options) == {"stored", "factors"}
    for options in (
        {"scope": scopes.unit()},
        {"norm": norms.l1()},
        {"norm": norms.rms()},
        {"norm": norms.linf(), "response": responses.clamp},
    ):
        assert kinds(**options) == {"stored"}
    for relative in (
        thresholds.relative_to_params(0.1),
        thresholds.at_most(thresholds.relative_to_params(0.1), 1.0),
    ):
        assert set(clipped_grad(loss, relative).plan(PARAMS, X, Y).values()) == {"stored"}


def test_an_example_moves_the_sum_by_no_more_than_the_limit():
    x, y = normal(400, 6, seed=3), 10 * normal(400, 3, seed=4)
    function = jax.jit(
        jax.vmap(lambda x, y: clipped_grad(loss, 0.7, reduce="sum")(PARAMS, x[None], y[None])[1])
    )
    moved = np.array([reference.l2(list(one.values())) for one in examples(function(x, y))])
    assert (moved <= 0.7 * (1 + 1e-6)).all() and np.median(moved) > 0.699999


def test_what_is_within_the_limit_is_the_plain_gradient():
    (value, seen), got = jax.jit(clipped_grad(loss, np.inf))(PARAMS, X, Y)
    want = jax.value_and_grad(lambda params: jnp.mean(jax.vmap(loss, (None, 0, 0))(params, X, Y)))(
        PARAMS
    )
    assert value == pytest.approx(float(want[0]), rel=1e-6) and not seen.clipped.any()
    close(got, want[1], 1e-6)


def test_a_limit_of_zero_gives_zeros():
    for scope in scopes.tree(), scopes.unit():
        (_, seen), got = compiled(clipped_grad(loss, 0.0, scope=scope), PARAMS, X, Y)
        assert (
            all((leaf == 0).all() for leaf in got.values())
            and seen.counted.all()
            and seen.clipped.all()
        )


def test_an_example_without_a_gradient_is_counted():
    x, y = np.zeros_like(X[:2]), np.zeros_like(Y[:2])
    params = {name: np.zeros_like(leaf) for name, leaf in PARAMS.items()}
    for response in responses.rescale, responses.automatic:
        (value, seen), got = compiled(clipped_grad(loss, 1.0, response=response), params, x, y)
        assert value == 0 and all((leaf == 0).all() for leaf in got.values())
        assert seen.counted.all() and not seen.clipped.any() and (seen.sizes == 0).all()


def test_one_example_is_a_batch():
    (value, seen), got = compiled(clipped_grad(loss, 0.1), PARAMS, X[:1], Y[:1])
    close(got, expected(EACH[:1], reference.tree, reference.l2, lambda places: 0.1))
    assert seen.sizes.shape == (1, 1) and value == seen.losses[0]


def test_leaves_that_the_scope_leaves_alone_are_summed_as_they_are():
    def name(path):
        return None if path == "w2" else path

    _, got = compiled(clipped_grad(loss, 0.1, scope=scopes.group(name), reduce="sum"), PARAMS, X, Y)
    close(got, expected(EACH, reference.group(name), reference.l2, lambda places: 0.1))
    np.testing.assert_allclose(got["w2"], sum(one["w2"] for one in EACH), rtol=1e-5)


# Microbatches, masks, what is not finite


OPTIONS = {"factors": {}, "stored": {"scope": scopes.unit()}}


@pytest.mark.parametrize(
    "options, size", [("factors", 1), ("factors", 2), ("factors", 6), ("stored", 2)]
)
def test_microbatches_change_nothing(options, size):
    mask = np.array([True, True, False, True, True, True])

    def run(size):
        def with_aux(params, x, y):
            return loss(params, x, y), {"x": x, "total": x.sum()}

        function = clipped_grad(with_aux, LIMIT, has_aux=True, microbatch=size, **OPTIONS[options])
        return jax.jit(
            lambda *batch: function(PARAMS, *batch, mask=mask, state=function.init(PARAMS))
        )(X, Y)

    whole, parts = run(None), run(size)
    assert jax.tree.structure(whole) == jax.tree.structure(parts)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        # sums in another order
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=2e-7 * np.max(np.abs(b), initial=0.5))
    np.testing.assert_array_equal(parts[0][1].aux["x"], X)


BAD = {"nan": np.nan, "inf": np.inf}


@pytest.mark.parametrize("options, size", [("factors", None), ("factors", 2), ("stored", None)])
def test_what_stands_where_the_mask_is_false_has_no_influence(options, size):
    mask = np.array([True, False, True, True, False, True])
    function = clipped_grad(loss, LIMIT, microbatch=size, **OPTIONS[options])
    run = jax.jit(lambda x, y: function(PARAMS, x, y, mask=mask))
    (value, seen), got = run(X, Y)
    there = [one for one, real in zip(EACH, mask, strict=True) if real]
    groups = reference.unit if options == "stored" else reference.tree
    total = expected(there, groups, reference.l2, lambda places: LIMIT)
    close(got, {name: leaf / 4 for name, leaf in total.items()})
    assert value == pytest.approx(np.mean(np.asarray(seen.losses)[mask]), rel=1e-6)
    np.testing.assert_array_equal(seen.counted, mask)
    assert seen.dropped == 0
    for bad in np.nan, np.inf, 1e30:
        (other_value, other), same = run(
            np.where(mask[:, None], X, bad), np.where(mask[:, None], Y, bad)
        )
        assert other_value == value and other.dropped == 0
        for name in SHAPES:
            assert np.asarray(same[name]).tobytes() == np.asarray(got[name]).tobytes()
        for a, b in zip(jax.tree.leaves(seen.state), jax.tree.leaves(other.state), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("bad", BAD)
def test_an_example_that_is_not_finite_counts_as_zero(options, bad):
    function = clipped_grad(loss, LIMIT, **OPTIONS[options])
    x, mask = X.copy(), np.array([True, True, True, False, True, True])
    y = Y.copy()
    x[1], x[4, 2], y[3] = BAD[bad], BAD[bad], BAD[bad]
    (value, seen), got = jax.jit(lambda x, y: function(PARAMS, x, y, mask=mask))(x, y)
    there = [EACH[i] for i in (0, 2, 5)]
    groups = reference.unit if options == "stored" else reference.tree
    total = expected(there, groups, reference.l2, lambda places: LIMIT)
    close(got, {name: leaf / 5 for name, leaf in total.items()})
    np.testing.assert_array_equal(seen.counted, [True, False, True, False, False, True])
    assert seen.dropped == 2 and seen.state.reading.nonfinite_steps == 1
    assert np.isfinite(seen.state.reading.measured).all()
    assert value == pytest.approx(np.sum(np.asarray(seen.losses)[[0, 2, 5]]) / 5, rel=1e-6)


def test_a_leaf_that_is_left_alone_is_not_let_through_either_if_it_is_not_finite():
    def one_leaf(params, x):
        return jnp.sum(params["a"] * x[0]) + jnp.sum(params["b"] * x[1])

    params, x = (
        {"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)},
        np.float32([[1, 1], [1, np.nan], [2, 1]]),
    )
    for norm in norms.l2(), norms.l1():
        scope = scopes.group(lambda path: None if path == "b" else path)
        (_, seen), got = compiled(
            clipped_grad(one_leaf, 1e3, scope=scope, norm=norm, reduce="sum"), params, x
        )
        np.testing.assert_array_equal(got["a"], [3, 3])
        np.testing.assert_array_equal(got["b"], [2, 2])
        assert seen.dropped == 1
    clip = aggregate(1e3, scope=scope, reduce="sum")
    updates = {"a": np.ones((3, 2), np.float32), "b": np.float32([[1], [np.inf], [1]]), "n": None}
    out, _ = compiled(clip.update, updates, None)
    assert out["b"] == 2 and (out["a"] == 2).all() and out["n"] is None


def test_all_masked_is_a_step_of_zeros():
    function = clipped_grad(loss, per_example.quantile(0.5, initial=LIMIT))
    (value, seen), got = compiled(function, PARAMS, X, Y, mask=np.zeros(BATCH, bool))
    assert value == 0 and all((leaf == 0).all() for leaf in got.values())
    assert seen.state.step == 1 and seen.dropped == 0 and not seen.counted.any()
    np.testing.assert_array_equal(seen.state.threshold, np.float32([LIMIT]))
    assert (seen.state.reading.measured == 0).all() and (seen.state.reading.counted == 0).all()


def test_squares_hold_sizes_from_1e_18_to_1e18():
    def linear(w, x):  # every column of the gradient is x
        return jnp.sum(x @ w)

    w, x = np.zeros((24, 24), np.float32), normal(3, 24)
    for scale in np.float32([1e-17, 1e17]):
        (_, seen), got = compiled(clipped_grad(linear, 0.5 * scale, reduce="sum"), w, scale * x)
        sizes = float(scale) * np.linalg.norm(x.astype(float), axis=1) * 24**0.5
        np.testing.assert_allclose(seen.sizes[:, 0], sizes, rtol=1e-6)
        want = sum(
            0.5 * float(scale) * one / np.linalg.norm(one) / 24**0.5 for one in x.astype(float)
        )
        np.testing.assert_allclose(
            got, np.repeat(want[:, None], 24, 1), rtol=1e-5, atol=1e-6 * scale
        )
    x = np.float32([[1e20], [1e-3], [1e-25]]) * np.ones((3, 24), np.float32)
    (_, seen), got = compiled(clipped_grad(linear, 1.0, reduce="sum"), w, x)
    assert seen.dropped == 1 and seen.sizes[2] == 0
    np.testing.assert_allclose(got, 1e-3, rtol=1e-6)


# Thresholds over time


def batches(steps):
    return normal(steps, BATCH, 6, seed=5), 3 * normal(steps, BATCH, 3, seed=6)


def run_through(function, *stream, **options):
    """What is seen of each step, with the parameters as they are."""
    step = jax.jit(
        lambda state, batch, options: function(PARAMS, *batch, state=state, **options)[0][1]
    )
    state, found = compiled(function.init, PARAMS), []
    for t in range(len(stream[0])):
        seen = step(
            state, [x[t] for x in stream], {name: value[t] for name, value in options.items()}
        )
        assert jax.tree.structure(seen.state) == jax.tree.structure(state)
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(seen.state)] == [
            (x.shape, x.dtype) for x in jax.tree.leaves(state)
        ]
        state, found = seen.state, [*found, seen]
    return found


@pytest.mark.parametrize("scope", ["tree", "unit"])
def test_schedules_follow_the_step(scope):
    function = clipped_grad(loss, optax.exponential_decay(1.0, 1, 0.5), scope=SCOPES[scope][0])
    found = run_through(function, *batches(4))
    np.testing.assert_allclose(
        [seen.state.reading.limit for seen in found],
        [[0.5**t] * (1 if scope == "tree" else 4) for t in range(4)],
    )
    assert [int(seen.state.step) for seen in found] == [1, 2, 3, 4]


@pytest.mark.parametrize("scope", ["tree", "group", "leaf"])
def test_quantile_is_the_recursion_of_andrew(scope):
    ours, groups = SCOPES[scope]
    q, rate, initial, steps = 0.7, 0.4, 0.3, 8
    x, y = batches(steps)
    mask = np.random.default_rng(7).uniform(size=(steps, BATCH)) < 0.8
    x[2, 1] = np.nan
    mask[2, 1], mask[4] = True, False
    function = clipped_grad(loss, per_example.quantile(q, rate=rate, initial=initial), scope=ours)
    found = run_through(function, x, y, mask=mask)
    limits = np.full(len(groups(EACH[0])), initial)
    for t, seen in enumerate(found):
        counted = mask[t] & np.isfinite(x[t]).all(1)
        np.testing.assert_array_equal(seen.counted, counted)
        sizes = sizes_of(
            [
                one
                for one, real in zip(examples(stored(PARAMS, x[t], y[t])), counted, strict=True)
                if real
            ],
            groups,
            reference.l2,
        )
        if len(sizes):
            np.testing.assert_allclose(seen.state.reading.limit, limits, rtol=1e-5)
            limits = limits * np.exp(-rate * ((sizes <= limits).mean(0) - q))
        np.testing.assert_allclose(seen.state.threshold, limits, rtol=1e-5)
    assert (limits != initial).all()


def test_quantile_finds_its_quantile():
    clip = aggregate(per_example.quantile(0.8, rate=0.5, initial=100.0))
    sizes = np.random.default_rng(0).uniform(1, 2, (200, 50, 1)).astype(np.float32)
    state, _ = jax.lax.scan(
        lambda state, sizes: (clip.update(sizes, state)[1], None), clip.init(np.zeros(1)), sizes
    )
    assert state.threshold == pytest.approx(1.8, abs=0.05)


def test_noise_is_normal_new_at_each_step_and_the_same_for_the_same_seed():
    sigma, rate, count = 3.0, 0.2, 40
    # all within; none within
    sizes, counted, limits = (
        jnp.ones((count, 2)),
        jnp.arange(count) < 30,
        jnp.array([2.0, 0.5]),
    )

    def noise(seed, steps=2000):
        rule = per_example.quantile(0.5, rate=rate, noise=sigma, seed=seed)
        learn = lambda step: rule.learn(sizes, counted, limits, limits, optaxclip.Context(step))  # noqa: E731
        shares = (
            0.5
            - np.log(np.asarray(jax.jit(jax.vmap(learn))(jnp.arange(steps)), float) / limits) / rate
        )
        return 30 * (shares - 0.5) - np.array([15, -15])

    drawn = np.stack([noise(seed) for seed in range(3)])
    np.testing.assert_allclose(drawn.mean((0, 1)), 0, atol=4 * sigma / 6000**0.5)
    np.testing.assert_allclose(drawn.std((0, 1)), sigma, rtol=0.04)
    assert (abs(np.corrcoef(drawn.transpose(0, 2, 1).reshape(6, -1)) - np.eye(6)) < 0.1).all()
    np.testing.assert_array_equal(noise(1), drawn[1])


LARGEST = per_example.BatchThreshold(
    lambda groups: jnp.ones(()),
    lambda state, context: state / (1 + context.step),
    lambda sizes, counted, limits, state, context: jnp.where(counted[:, None], sizes, 0).max(),
)


def test_a_rule_of_ones_own():
    x, y = batches(3)
    found = run_through(clipped_grad(loss, LARGEST, scope=scopes.leaf()), x, y)
    top = [
        sizes_of(examples(stored(PARAMS, x[t], y[t])), reference.leaf, reference.l2).max()
        for t in range(3)
    ]
    np.testing.assert_allclose(
        [seen.state.reading.limit[0] for seen in found], [1, top[0] / 2, top[1] / 3], rtol=1e-5
    )
    assert all((seen.state.reading.limit == seen.state.reading.limit[0]).all() for seen in found)


def test_readings_are_means_over_the_examples_that_count():
    y = Y.copy()
    y[0] = np.nan
    mask = np.array([True, True, True, True, True, False])
    function = clipped_grad(loss, LIMIT, scope=scopes.leaf())
    (_, seen), _ = compiled(function, PARAMS, X, y, mask=mask)
    reading = seen.state.reading
    sizes = sizes_of(EACH[1:5], reference.leaf, reference.l2)
    np.testing.assert_allclose(reading.size_before, sizes.mean(0), rtol=1e-5)
    np.testing.assert_allclose(reading.size_after, np.minimum(sizes, LIMIT).mean(0), rtol=1e-5)
    np.testing.assert_allclose(reading.clipped_share, (sizes > LIMIT).mean(0))
    np.testing.assert_allclose(reading.limit, LIMIT)
    assert (reading.clipped_steps, reading.nonfinite_steps) == (1, 1)
    metrics = telemetry.metrics(((), seen.state), PARAMS)
    assert metrics["clip/steps"] == 1 and metrics["clip/nonfinite_steps"] == 1
    assert metrics["clip/size_before/w1"] == pytest.approx(sizes[:, 2].mean(), rel=1e-5)
    assert metrics["clip/clipped_share"] == pytest.approx((sizes > LIMIT).mean())
    (_, seen), _ = compiled(clipped_grad(loss, np.inf), PARAMS, X, Y)
    assert (seen.state.reading.clipped_steps, seen.state.reading.nonfinite_steps) == (0, 0)


# Transformations around it


def test_a_training_loop_in_scan():
    function = clipped_grad(loss, per_example.quantile(0.5), microbatch=3)
    optimizer = optax.adam(0.1)

    def step(carry, batch):
        params, moments, state = carry
        (value, seen), gradients = function(params, *batch, state=state)
        updates, moments = optimizer.update(gradients, moments)
        return (optax.apply_updates(params, updates), moments, seen.state), value

    start, stream = (
        (jax.tree.map(jnp.asarray, PARAMS), optimizer.init(PARAMS), function.init(PARAMS)),
        batches(5),
    )
    looped, values = jax.jit(lambda start, stream: jax.lax.scan(step, start, stream))(start, stream)
    carry, one = start, jax.jit(step)
    for t in range(5):
        carry, value = one(carry, [x[t] for x in stream])
        assert value == pytest.approx(float(values[t]), rel=1e-5)
    for a, b in zip(jax.tree.leaves(looped), jax.tree.leaves(carry), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_vmap_over_runs_and_limits():
    limits = jnp.array([0.1, 1.0, 10.0])
    runs = {name: jnp.stack([leaf, 2 * leaf, -leaf]) for name, leaf in PARAMS.items()}
    _, got = jax.jit(jax.vmap(lambda params, limit: clipped_grad(loss, limit)(params, X, Y)))(
        runs, limits
    )
    for k, limit in enumerate(limits):
        params = {name: leaf[k] for name, leaf in runs.items()}
        total = expected(
            examples(stored(params, X, Y)),
            reference.tree,
            reference.l2,
            lambda places, limit=limit: float(limit),
        )
        close(
            {name: leaf[k] for name, leaf in got.items()},
            {name: leaf / BATCH for name, leaf in total.items()},
        )


def test_a_loss_of_batches_of_one():
    def batched(params, x, y):
        assert x.shape == (1, 6) and y.shape == (1, 3)
        return jax.vmap(loss, (None, 0, 0))(params, x, y).mean(), x.sum()

    (value, seen), got = compiled(
        clipped_grad(batched, LIMIT, keep_batch_axis=True, has_aux=True), PARAMS, X, Y
    )
    (plain, _), want = compiled(clipped_grad(loss, LIMIT), PARAMS, X, Y)
    assert value == pytest.approx(float(plain), rel=1e-6)
    close(got, want, 1e-6)
    np.testing.assert_allclose(seen.aux, X.sum(1), rtol=1e-6)


@pytest.mark.parametrize(
    "scope, size", [("tree", None), ("tree", 1), ("unit", None), ("unit", 500)]
)
def test_low_precision_is_summed_in_float32(scope, size):
    def linear(params, x):
        return jnp.sum(x @ params["w"]) + jnp.sum(params["b"])

    params = {"b": jnp.zeros(8, jnp.bfloat16), "w": jnp.zeros((8, 8), jnp.bfloat16)}
    function = clipped_grad(linear, 1e3, scope=SCOPES[scope][0], reduce="sum", microbatch=size)
    _, got = jax.jit(function)(params, jnp.ones((1000, 8), jnp.bfloat16))
    for leaf in got.values():
        # a sum in bfloat16 would stay at 256
        assert leaf.dtype == jnp.bfloat16 and (leaf == 1000).all()


def test_parameters_may_be_any_arrays():
    def linear(params, x):
        return jnp.sum(params["double"] * x) + params["number"] * x[0]

    for norm in norms.l2(), norms.l1():
        params, x = {"double": np.ones(2), "number": 1.0}, np.float32([[3, 4], [0, 1]])
        function = clipped_grad(linear, 1e3, norm=norm, reduce="sum")
        _, got = jax.jit(lambda x: function(params, x))(x)
        np.testing.assert_array_equal(got["double"], [3, 5])
        assert got["double"].dtype == jnp.ones(2).dtype and got["number"] == 3


@pytest.mark.parametrize("options, size", [("factors", None), ("factors", 4), ("stored", 4)])
def test_a_batch_over_devices(options, size):
    x, y, mask = normal(32, 6, seed=8), 3 * normal(32, 3, seed=9), np.arange(32) != 5
    devices = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    function = clipped_grad(loss, per_example.quantile(0.5), microbatch=size, **OPTIONS[options])

    def run(batch, mask):
        return function(PARAMS, *batch, mask=mask, state=function.init(PARAMS))

    want = jax.jit(run)((x, y), mask)
    split = jax.device_put(((x, y), mask), NamedSharding(devices, P("x")))
    got = jax.jit(run)(*split)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_accumulated_gradients_are_those_of_one_batch():
    optimizer, function = optax.MultiSteps(optax.sgd(1.0), 3), clipped_grad(loss, LIMIT)
    step = jax.jit(
        lambda state, *batch: optimizer.update(function(PARAMS, *batch)[1], state, PARAMS)
    )
    updates, state = {}, optimizer.init(PARAMS)
    for i in range(0, BATCH, 2):
        updates, state = step(state, X[i : i + 2], Y[i : i + 2])
    _, whole = compiled(function, PARAMS, X, Y)
    close(updates, {name: -leaf for name, leaf in whole.items()}, 1e-6)


# The transform for gradients that are there already


@pytest.mark.parametrize(
    "scope, reduce", [("tree", "sum"), ("tree", "mean"), ("group", "mean"), ("unit", "sum")]
)
def test_aggregate_is_the_same_on_given_gradients(scope, reduce):
    ours, groups = SCOPES[scope]
    limit = float(np.median(sizes_of(EACH, groups, reference.l2)))
    threshold = {"1": limit, "2": limit} if scope == "group" else limit
    mask = np.array([True, True, False, True, True, True])
    clip = aggregate(threshold, scope=ours, reduce=reduce)
    got, state = jax.jit(lambda g: clip.update(g, clip.init(PARAMS), mask=mask))(
        stored(PARAMS, X, Y)
    )
    there = [one for one, real in zip(EACH, mask, strict=True) if real]
    total = expected(there, groups, reference.l2, lambda places: limit)
    close(got, {name: leaf / (5 if reduce == "mean" else 1) for name, leaf in total.items()})
    (_, seen), same = compiled(
        clipped_grad(loss, threshold, scope=ours, reduce=reduce), PARAMS, X, Y, mask=mask
    )
    close(got, same)
    np.testing.assert_allclose(state.reading.measured, seen.state.reading.measured, rtol=1e-5)


def test_aggregate_in_a_chain_with_and_without_state():
    gradients = stored(PARAMS, X, Y)
    optimizer = optax.chain(aggregate(per_example.quantile(0.5, initial=LIMIT)), optax.sgd(1.0))
    state = compiled(optimizer.init, PARAMS)
    updates, state = compiled(optimizer.update, gradients, state, PARAMS)
    _, want = compiled(clipped_grad(loss, LIMIT), PARAMS, X, Y)
    close(updates, {name: -leaf for name, leaf in want.items()}, 1e-6)
    assert telemetry.metrics(state)["clip/steps"] == 1
    close(compiled(aggregate(LIMIT).update, gradients, None)[0], want, 1e-6)


@pytest.mark.parametrize("relative", ["threshold", "norm"])
def test_limits_relative_to_the_parameters(relative):
    gradients = stored(PARAMS, X, Y)
    if relative == "threshold":
        clip = aggregate(thresholds.relative_to_params(0.2), scope=scopes.leaf(), reduce="sum")
        want = [
            reference.adaptive_grad_clip(one, PARAMS, 0.2, groups=reference.leaf) for one in EACH
        ]
        by_loss = clipped_grad(
            loss, thresholds.relative_to_params(0.2), scope=scopes.leaf(), reduce="sum"
        )
    else:
        options = {"scope": scopes.leaf(), "norm": norms.relative_linf(0.1, 1e-7), "reduce": "sum"}
        clip, by_loss = aggregate(1.0, **options), clipped_grad(loss, 1.0, **options)
        want = [reference.clippy(one, PARAMS) for one in EACH]
    want = {name: sum(one[name] for one in want) for name in SHAPES}
    close(compiled(clip.update, gradients, None, PARAMS)[0], want)
    close(compiled(by_loss, PARAMS, X, Y)[1], want)
    with pytest.raises(
        ValueError, match="relative to the parameters" if relative == "threshold" else "params"
    ):
        compiled(clip.update, gradients, clip.init(PARAMS))


def test_aggregate_leaves_other_leaves_alone_and_keeps_dtypes():
    updates = {
        "half": jnp.full((3, 2), 4.0, jnp.bfloat16),
        "none": None,
        "count": jnp.arange(3),
        "wide": np.float32([[3], [0], [4]]),
    }
    clip = aggregate(5.0, scope=scopes.leaf(), reduce="sum")
    params = {
        "half": jnp.zeros(2, jnp.bfloat16),
        "none": None,
        "count": jnp.array(0),
        "wide": np.zeros(1, np.float32),
    }
    out, state = compiled(clip.update, updates, clip.init(params))
    assert (
        out["none"] is None
        and out["count"] == 0
        and out["half"].dtype == jnp.bfloat16
        and out["wide"].dtype == np.float32
    )
    np.testing.assert_allclose(np.asarray(out["half"], float), 3 * 5 / 2**0.5, rtol=2**-8)
    np.testing.assert_array_equal(out["wide"], [7])
    assert telemetry.group_names(state.reading) == ["half", "wide"]


def test_optax_has_the_same_where_gradients_are_finite_and_not_zero():
    gradients = stored(PARAMS, X, Y)
    leaves, treedef = jax.tree.flatten(gradients)

    @jax.jit
    def ours(limit):
        clip = aggregate(limit / 2, scope=scopes.leaf(), reduce="sum")  # of four layers
        return clipped_grad(loss, limit, reduce="sum")(PARAMS, X, Y), clip.update(gradients, None)[
            0
        ]

    for limit in 0.5, LIMIT, 1e3:
        ((_, seen), whole), by_layer = ours(limit)
        theirs, clipped = optax.per_example_global_norm_clip(leaves, limit)
        close(whole, jax.tree.unflatten(treedef, theirs))
        assert clipped == seen.clipped.sum()
        theirs, _ = optax.per_example_layer_norm_clip(leaves, limit)
        close(by_layer, jax.tree.unflatten(treedef, theirs))


def test_one_nan_makes_all_of_a_sum_nan_in_optax_and_here_counts_as_zero():
    gradients = [np.float32([[3, 4], [np.nan, 0], [0, 0.5]])]
    assert np.isnan(optax.per_example_global_norm_clip(gradients, 1.0)[0][0]).any()
    clip = aggregate(1.0, reduce="sum")
    np.testing.assert_allclose(compiled(clip.update, gradients, None)[0][0], [0.6, 1.3], rtol=1e-6)


def test_half_precision_overflows_in_optax_and_here_not():
    gradients = [jnp.array([[300, 1], [0, 0]], jnp.float16)]
    assert (optax.per_example_global_norm_clip(gradients, 1.0)[0][0] == 0).all()
    clip = aggregate(1.0, reduce="sum")
    assert reference.l2(compiled(clip.update, gradients, None)[0]) == pytest.approx(1, rel=2e-3)


def test_wrong_arguments_are_refused():
    with pytest.raises(
        TypeError,
        match=r"^threshold must not learn from single sizes, got .*per_example.quantile\(0.5\)$",
    ):
        aggregate(thresholds.ema())
    with pytest.raises(TypeError, match=r"^threshold must not learn from single sizes"):
        clipped_grad(loss, {"1": 1.0, "2": thresholds.growth()}, scope=scopes.group(layer))
    with pytest.raises(
        ValueError, match=r"^reduce must be one of 'mean', 'sum', 'kept', got 'max'"
    ):
        aggregate(1.0, reduce="max")
    with pytest.raises(
        TypeError, match=r"^loss_fn must be a function, got 3; pass one such as lambda params, x, y"
    ):
        clipped_grad(3, 1.0)
    with pytest.raises(ValueError, match=r"^microbatch must be at least 1, got 0"):
        clipped_grad(loss, 1.0, microbatch=0)
    with pytest.raises(
        ValueError, match=r"^microbatch must divide the batch, got 4 for 6 examples"
    ):
        compiled(clipped_grad(loss, 1.0, microbatch=4), PARAMS, X, Y)
    with pytest.raises(
        ValueError,
        match=r"^batch must be arrays whose first axis is that of the examples, got shapes",
    ):
        compiled(clipped_grad(loss, 1.0), PARAMS, X, Y[:3])
    with pytest.raises(
        ValueError, match=r"^updates must be arrays whose first axis is that of the examples"
    ):
        aggregate(1.0).update({}, None)
    with pytest.raises(
        ValueError, match=r"^mask must be bool of shape \(6,\), got float32 of shape \(6,\)"
    ):
        compiled(clipped_grad(loss, 1.0), PARAMS, X, Y, mask=np.ones(6, np.float32))
    with pytest.raises(ValueError, match="^threshold has limits for"):
        compiled(clipped_grad(loss, {"a": 1.0}), PARAMS, X, Y)
    for name, options in {
        "q": {"q": 1.0},
        "rate": {"rate": 0.0},
        "initial": {"initial": 0.0},
        "noise": {"noise": -1.0},
    }.items():
        with pytest.raises(ValueError, match=f"^{name} must be in "):
            per_example.quantile(**options)
    with pytest.raises(TypeError, match="^seed must be an integer"):
        per_example.quantile(seed=0.5)


# Explicit meshes, made as users make them


def dense(p, x, y):
    return jnp.sum((jnp.tanh(x @ p["hidden"]) @ p["out"] + p["bias"] - y) ** 2)


def convolution(p, x, y):
    dimensions = ("NHWC", "HWIO", "NHWC")
    h = jax.lax.conv_general_dilated(
        x[None], p["kernel"], (1, 1), "SAME", dimension_numbers=dimensions
    )
    return jnp.sum((jnp.tanh(h).mean((0, 1, 2)) - y) ** 2)


def embedding(p, places, y):
    return jnp.sum((jnp.tanh(p["table"][places]).sum(0) @ p["out"] - y) ** 2)


def recurrent(p, x, y):
    def step(carry, t):
        h, cell = carry
        forget, use, out, new = jnp.split(t @ p["in"] + h @ p["again"], 4)
        cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(use) * jnp.tanh(new)
        return (jax.nn.sigmoid(out) * jnp.tanh(cell), cell), None

    (h, _), _ = jax.lax.scan(step, (jnp.zeros(16),) * 2, x)
    return jnp.sum((h @ p["out"] - y) ** 2)


MODELS = {
    "dense": (dense, {"hidden": (16, 32), "out": (32, 8), "bias": (8,)}, normal(8, 16)),
    "convolution": (convolution, {"kernel": (3, 3, 16, 8)}, normal(8, 5, 5, 16)),
    "embedding": (
        embedding,
        {"table": (40, 16), "out": (16, 8)},
        np.random.default_rng(0).integers(0, 40, (8, 5)),
    ),
    "recurrent": (recurrent, {"in": (16, 64), "again": (16, 64), "out": (16, 8)}, normal(8, 5, 16)),
}
WAYS = {
    "plain": {},
    "sum": {"reduce": "sum"},
    "microbatches": {"microbatch": 4},
    "microbatches of fewer than devices": {"microbatch": 2},
    "by leaf, clamped": {
        "scope": scopes.leaf(),
        "norm": norms.linf(),
        "response": responses.clamp,
    },
    "by unit": {"scope": scopes.unit()},
    "by l1": {"norm": norms.l1(), "response": responses.automatic},
    "with aux": {"keep_batch_axis": True, "has_aux": True, "microbatch": 4},
}
CALLED = [("eager", False), ("eager", True), ("jit", False), ("jit", True)]
each_call = pytest.mark.parametrize(
    "call, context", CALLED, ids=[f"{call}, in={inside}" for call, inside in CALLED]
)


def user_mesh():
    return jax.make_mesh((4, 2), ("fsdp", "tp"))


def put(tree, *spec):
    return jax.device_put(tree, NamedSharding(user_mesh(), P(*spec)))


def within(context, run, *args, call="jit"):
    with jax.set_mesh(user_mesh()) if context else contextlib.nullcontext():
        return (jax.jit(run) if call == "jit" else run)(*args)


def same_tree(got, want, rtol=3e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5)


def on_devices(model, way, call, context, split_out=False, threshold=0.5):
    loss, shapes, x = MODELS[model]
    params = {name: normal(*shape) / 4 for name, shape in shapes.items()}
    batch, mask = (x, normal(8, 8, seed=2)), np.arange(8) != 3

    def with_aux(params, *batch):
        return jax.vmap(loss, (None, 0, 0))(params, *batch).mean(), {"x": batch[0][0]}

    function = clipped_grad(with_aux if way == "with aux" else loss, threshold, **WAYS[way])

    def run(params, batch):
        return function(params, *batch, mask=mask)

    want = jax.jit(run)(params, batch)
    placed = put(params)
    if split_out:
        placed["out"] = put(params["out"], None, "tp")
    got = within(context, run, placed, put(batch, "fsdp"), call=call)
    same_tree(got, want)
    for name, leaf in placed.items():
        assert got[1][name].sharding.is_equivalent_to(leaf.sharding, leaf.ndim), name


@pytest.mark.parametrize("way", WAYS)
def test_an_explicit_mesh_changes_nothing(way):
    on_devices("dense", way, "jit", True, split_out=True)


@each_call
@pytest.mark.parametrize("model", MODELS)
def test_any_model_on_an_explicit_mesh(model, call, context):
    on_devices(model, "plain", call, context)


def test_a_limit_that_learns_on_an_explicit_mesh():
    function = clipped_grad(dense, per_example.quantile(0.5), microbatch=4)
    params = {name: normal(*shape) / 4 for name, shape in MODELS["dense"][1].items()}
    batch = (normal(8, 16), normal(8, 8, seed=2))

    def run(params, batch):
        state = function.init(params)
        for _ in range(2):
            (_, seen), gradients = function(params, *batch, state=state)
            state = seen.state
        return gradients, seen

    same_tree(within(True, run, put(params), put(batch, "fsdp")), jax.jit(run)(params, batch))


@each_call
@pytest.mark.parametrize("scope", SCOPES)
def test_aggregate_on_an_explicit_mesh(scope, call, context):
    clip = aggregate({"1": 1.0, "2": 0.5} if scope == "group" else 0.5, scope=SCOPES[scope][0])
    gradients = {
        name: np.resize(leaf, (8, *leaf.shape[1:])) for name, leaf in stored(PARAMS, X, Y).items()
    }
    gradients["count"] = np.arange(8)

    def run(gradients):
        return clip.update(gradients, None, mask=np.arange(8) != 2)

    split = put(gradients, "fsdp") | {"w1": put(gradients["w1"], "fsdp", None, "tp")}
    same_tree(within(context, run, split, call=call), jax.jit(run)(gradients))


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
def test_vmap_of_update_on_an_explicit_mesh(scope, context):
    clip = optaxclip.clip({"1": 1.0, "2": 0.5} if scope == "group" else 0.5, scope=SCOPES[scope][0])
    gradients = {
        name: np.resize(leaf, (8, *leaf.shape[1:])) for name, leaf in stored(PARAMS, X, Y).items()
    }
    one = clip.init(PARAMS)
    several = jax.tree.map(lambda x: np.stack([x] * 8), one)

    def run(gradients, several):
        in_all = jax.vmap(clip.update, (0, None))(gradients, one)
        return in_all, jax.vmap(clip.update)(gradients, several)

    got = within(context, run, put(gradients, "fsdp"), put(several, "fsdp"))
    same_tree(got, jax.jit(run)(gradients, several))


ROWS = {
    name: getattr(optaxclip, name)()
    for name in ("zclip", "history_clip", "quantile_clip", "autoclip", "spam_clip")
}
ROWS["by leaf"] = optaxclip.clip(
    {"w1": 0.5, "w2": thresholds.ema(), "b1": 1.0, "b2": 1.0}, scopes.leaf()
)


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("row", ROWS)
def test_rules_that_learn_under_vmap_on_an_explicit_mesh(row, context):
    gradients = {
        name: np.resize(leaf, (8, *leaf.shape[1:])) for name, leaf in stored(PARAMS, X, Y).items()
    }
    state = ROWS[row].init(PARAMS)

    def run(gradients):
        return jax.vmap(ROWS[row].update, (0, None))(gradients, state)

    same_tree(within(context, run, put(gradients, "fsdp")), jax.jit(run)(gradients))


# Empty batches, and leaves that are no floats


@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_a_batch_of_no_examples_gives_zeros_and_teaches_nothing(reduce, size):
    for rule in per_example.quantile(0.5, initial=LIMIT), LARGEST:
        function = clipped_grad(loss, rule, reduce=reduce, microbatch=size)
        state = function.init(PARAMS)
        for wrap in (lambda f: f), jax.jit:
            x, y, mask = X[:0], Y[:0], np.zeros(0, bool)
            (value, seen), got = wrap(
                lambda x, y, mask: function(PARAMS, x, y, mask=mask, state=state)
            )(x, y, mask)
            assert value == 0 and {name: leaf.shape for name, leaf in got.items()} == SHAPES
            assert not any(leaf.any() for leaf in got.values())
            assert seen.losses.shape == seen.counted.shape == (
                0,
            ) and seen.sizes.shape == seen.clipped.shape == (0, 1)
            assert (
                seen.state.step == 1
                and seen.limits.shape == (1,)
                and (seen.state.reading.counted == 0).all()
            )
            np.testing.assert_array_equal(seen.state.threshold, state.threshold)
    assert function.plan(PARAMS, x, y) == function.plan(PARAMS, X, Y)


def test_an_empty_batch_of_keys_and_of_gradients():
    def noisy(params, x, key):
        return jnp.sum(params * x * jax.random.uniform(key))

    keys = jax.random.split(jax.random.key(0), 3)[:0]
    (value, _), got = compiled(clipped_grad(noisy, 1.0), jnp.ones(2), jnp.ones((0, 2)), keys)
    assert value == 0 and got.tolist() == [0, 0]
    out, state = compiled(
        aggregate(LARGEST).update, {"a": jnp.ones((0, 2)), "n": jnp.zeros(0, int)}, None
    )
    assert (
        out["a"].tolist() == [0, 0] and out["n"] == 0 and state.step == 1 and state.threshold == 1
    )


def test_leaves_that_are_no_floats_have_no_gradient():
    params = {**PARAMS, "count": np.int32(3), "key": jax.random.key(0), "flag": True, "none": None}
    for options in {}, {"microbatch": 2}, {"norm": norms.l1()}, {"scope": scopes.unit()}:
        (_, seen), got = compiled(clipped_grad(loss, LIMIT, **options), params, X, Y)
        (_, plain), want = compiled(clipped_grad(loss, LIMIT, **options), PARAMS, X, Y)
        for name in "count", "key", "flag":
            assert got.pop(name).dtype == jax.dtypes.float0
        assert got.pop("none") is None
        close(got, want)
        np.testing.assert_array_equal(seen.sizes, plain.sizes)
    assert set(clipped_grad(loss, LIMIT).plan(params, X, Y)) == set(PARAMS)


def test_aggregate_passes_keys_and_float0():
    keys = jax.random.split(jax.random.key(0), 3)
    updates = {
        "a": np.ones((3, 2), np.float32),
        "key": keys,
        "zero": np.zeros((3, 2), jax.dtypes.float0),
    }
    out, _ = aggregate(1.0).update(updates, None)
    assert (
        jnp.all(out["key"] == keys[0])
        and out["zero"].dtype == jax.dtypes.float0
        and out["zero"].shape == (2,)
    )
    np.testing.assert_allclose(out["a"], 0.5**0.5, rtol=1e-6)


def test_a_module_of_nnx_with_dropout():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.linear, self.dropout = nnx.Linear(6, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.linear(x))

    net = Net(nnx.Rngs(0))
    function = clipped_grad(lambda net, x, y: jnp.sum((net(x) - y) ** 2), 0.1)
    graph, params, rest = nnx.split(net, nnx.Param, ...)

    def merged(params, x, y):
        # variables of this trace
        copy = nnx.merge(graph, *jax.tree.map(lambda leaf: leaf, (params, rest)))
        return jnp.sum((copy(x) - y) ** 2)

    _, whole = function(net, X, Y)
    (_, seen), want = clipped_grad(merged, 0.1)(params, X, Y)
    assert seen.clipped.any()
    same_tree(nnx.state(whole, nnx.Param), want)


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"]
)
def test_any_float_is_measured_in_float32_and_given_back_in_its_own(dtype):
    def linear(params, x):
        return jnp.sum(x @ params["w"].astype(jnp.float32)) + jnp.sum(
            params["b"].astype(jnp.float32) * x[0]
        )

    params = {"w": jnp.ones((6, 8), dtype), "b": jnp.ones(8, dtype)}
    for options in {}, {"norm": norms.l1()}, {"scope": scopes.unit()}:
        (_, seen), got = compiled(
            clipped_grad(linear, np.inf, reduce="sum", **options),
            params,
            np.ones((1, 6), np.float32),
        )
        assert all(
            leaf.dtype == dtype and (leaf == jnp.ones((), dtype)).all() for leaf in got.values()
        )
        assert seen.sizes.dtype == np.float32
    size = 56**0.5
    assert compiled(clipped_grad(linear, np.inf), params, np.ones((1, 6), np.float32))[0][1].sizes[
        0, 0
    ] == pytest.approx(size)
    out, _ = compiled(aggregate(2.0).update, jnp.ones((3, 4), dtype), None)
    assert out.dtype == dtype and (out == jnp.ones((), dtype)).all()


def test_an_axis_that_is_not_mapped_is_named():
    run = {
        "clipped_grad": lambda axes: clipped_grad(loss, 1.0, sharded_over=axes)(PARAMS, X, Y),
        "aggregate": lambda axes: aggregate(1.0, sharded_over=axes).update(
            {"a": jnp.ones((3, 2))}, None
        ),
    }
    for call in run.values():
        with pytest.raises(
            ValueError,
            match=r"^sharded_over must name mapped axes, got \('x',\) where none are mapped",
        ):
            call("x")
        with pytest.raises(
            ValueError,
            match=r"^sharded_over must name mapped axes, got \('x',\) where \('y',\) are mapped",
        ):
            jax.vmap(lambda _: call(("y", "x")), axis_name="y")(jnp.ones(2))
