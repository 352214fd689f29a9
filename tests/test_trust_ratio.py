"""Steps relative to the weights (LARS, LARC, LAMB), and rules built from other rules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip
from optaxclip import responses, scopes, testing, thresholds
from optaxclip.thresholds import by_global_norm, relative_to_params

PARAMS = {
    "w": np.float32([[3, 4], [0, 12]]),  # norm 13
    "small": np.float32([0.01, 0.02]),
    "zero": np.zeros(3, np.float32),
    "idle": np.float32([1, 1]),
}
GRADS = {
    "w": np.float32([[0.3, -0.4], [1.2, 0]]),
    "small": np.float32([-0.5, 2.0]),
    "zero": np.float32([0.5, 1, 2]),
    "idle": np.zeros(2, np.float32),
}


def trust(g, w, ratio, low=0.0, high=np.inf, clips=True):
    """The papers' formula: u eta phi(|w|) / |u|, at most u with `clips`."""
    size, weight = np.linalg.norm(g.astype(float)), np.linalg.norm(w.astype(float))
    if size == 0 or weight == 0:
        return g
    factor = ratio * min(max(weight, low), high) / size
    return g * (min(factor, 1) if clips else factor)


@pytest.mark.parametrize("response", [None, responses.normalize])
@pytest.mark.parametrize(
    "options", [{}, {"low": 0.1}, {"high": 2.0}, {"low": 0.1, "high": 0.5}], ids=str
)
def test_steps_are_a_share_of_the_weights(options, response):
    clip = optaxclip.clip_by_trust_ratio(0.05, response=response, **options)
    updates, _ = clip.update(GRADS, clip.init(PARAMS), PARAMS)
    for name, g in GRADS.items():
        expected = trust(g, PARAMS[name], 0.05, clips=response is None, **options)
        np.testing.assert_allclose(updates[name], expected, rtol=2e-6)
    for name in ("zero", "idle"):
        np.testing.assert_array_equal(updates[name], GRADS[name])


@pytest.mark.parametrize("coefficient", [1.0, 0.001])
def test_it_is_optax_scale_by_trust_ratio(coefficient):
    ours = optaxclip.clip_by_trust_ratio(coefficient, response=responses.normalize)
    theirs = optax.scale_by_trust_ratio(trust_coefficient=coefficient)
    updates, _ = ours.update(GRADS, ours.init(PARAMS), PARAMS)
    expected, _ = theirs.update(GRADS, theirs.init(PARAMS), PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), updates, expected)


def test_it_is_the_clip_of_apex_larc_after_the_learning_rate():
    lr, eta = 0.1, 0.02
    larc = optax.chain(optax.scale(-lr), optaxclip.clip_by_trust_ratio(eta))
    updates, _ = larc.update(GRADS, larc.init(PARAMS), PARAMS)
    for name, g in GRADS.items():
        size, weight = (np.linalg.norm(x[name].astype(float)) for x in (GRADS, PARAMS))
        local = eta * weight / size if size and weight else np.inf  # apex leaves both zeros alone
        np.testing.assert_allclose(updates[name], -lr * g * min(local / lr, 1), rtol=2e-6)


def test_parameters_that_are_zero_are_free_or_at_the_floor():
    clip = optaxclip.clip(relative_to_params(0.1, floor=1e-3), scopes.leaf())
    np.testing.assert_allclose(
        np.linalg.norm(clip.update(GRADS, None, PARAMS)[0]["zero"]), 1e-4, rtol=1e-5
    )
    free = optaxclip.clip(relative_to_params(0.1, zero="free"), scopes.leaf())
    np.testing.assert_array_equal(free.update(GRADS, None, PARAMS)[0]["zero"], GRADS["zero"])
    with pytest.raises(ValueError, match="zero must be one of 'floor', 'free', got 'no'"):
        relative_to_params(0.1, zero="no")
    with pytest.raises(ValueError, match=r"high must be in \[0, inf\], got -1"):
        optaxclip.clip_by_trust_ratio(0.1, high=-1)
    with pytest.raises(ValueError, match="low must be in"):
        optaxclip.clip_by_trust_ratio(0.1, low=-1)


def test_half_precision_weights_bound_a_half_precision_step():
    params, grads = (
        jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), t) for t in (PARAMS, GRADS)
    )
    clip = optaxclip.clip_by_trust_ratio(0.05)
    updates, _ = clip.update(grads, clip.init(params), params)
    assert updates["w"].dtype == jnp.bfloat16
    norm = np.linalg.norm(np.asarray(updates["w"], float))
    assert norm == pytest.approx(0.05 * 13, rel=8e-3)


# One joint norm, a limit for each group

GROUPS = {"body": np.float32([3.0]), "head": np.float32([4.0]), "muon": np.float32([12.0])}


def by_name(path):
    return path.split("/")[0]


@pytest.mark.parametrize("way", ["group", "leaf", "unit"])
def test_groups_that_say_by_global_norm_share_one_norm(way):
    limits = {"body": 1.0, "head": 0.5, "muon": jnp.inf}
    rules = {name: by_global_norm(limit) for name, limit in limits.items()}
    scope = {"group": scopes.group(by_name), "leaf": scopes.leaf(), "unit": scopes.unit()}[way]
    clip = optaxclip.clip(rules, scope)
    updates, state = jax.jit(clip.update)(GROUPS, clip.init(GROUPS))
    for name, g in GROUPS.items():
        np.testing.assert_allclose(updates[name], g * min(1, limits[name] / 13), rtol=1e-6)
    np.testing.assert_array_equal(updates["muon"], GROUPS["muon"])
    np.testing.assert_allclose(state.reading.limit, [3 / 13, 2 / 13, np.inf], rtol=1e-6)


def test_groups_with_other_rules_are_not_in_the_joint_norm():
    rules = {"body": by_global_norm(1.0), "head": by_global_norm(1.0), "muon": 6.0}
    updates, _ = optaxclip.clip(rules, scopes.group(by_name)).update(GROUPS, None)
    expected = {"body": 3 / 5, "head": 4 / 5, "muon": 6}
    for name, value in expected.items():
        np.testing.assert_allclose(updates[name], [value], rtol=1e-6)
    alone = {"body": by_global_norm(1.0), "head": 2.0, "muon": thresholds.ema()}
    updates, _ = optaxclip.clip(alone, scopes.group(by_name)).update(GROUPS, None)
    np.testing.assert_allclose(updates["body"], [1], rtol=1e-6)


def test_a_rule_around_the_joint_norm_keeps_it_joint():
    early = thresholds.with_fallback(thresholds.ema(2.0, warmup=5), by_global_norm(1.0))
    rules = {"body": early, "head": thresholds.at_most(by_global_norm(1.0), 9.0), "muon": jnp.inf}
    updates, _ = optaxclip.clip(rules, scopes.group(by_name)).update(GROUPS, None)
    np.testing.assert_allclose(updates["body"], [3 / 5], rtol=1e-6)
    np.testing.assert_allclose(updates["head"], [4 / 5], rtol=1e-6)


def test_layers_of_a_stack_share_the_joint_norm_as_well():
    grads = {"layers": np.float32([[3.0], [4.0]]), "head": np.float32([12.0])}
    rules = {"layers": by_global_norm(1.0), "head": by_global_norm(jnp.inf)}
    stacked = scopes.group(by_name, batch_axes=lambda path, leaf: 0 if path == "layers" else None)
    updates, _ = optaxclip.clip(rules, stacked).update(grads, None)
    np.testing.assert_allclose(updates["layers"], grads["layers"] / 13, rtol=1e-6)
    np.testing.assert_array_equal(updates["head"], grads["head"])


@pytest.mark.parametrize("where", ["jit", "shard_map"])
@pytest.mark.parametrize("scope", ["group", "unit"])
def test_a_joint_norm_is_that_of_all_devices(where, scope):
    grads = {"a": jnp.arange(16.0).reshape(8, 2), "b": jnp.ones(3), "c": jnp.arange(8.0)}
    rules = {
        name: by_global_norm(limit) for name, limit in zip("abc", (1.0, 0.5, jnp.inf), strict=True)
    }
    parts = scopes.group(by_name) if scope == "group" else scopes.unit(-1)
    P = jax.sharding.PartitionSpec
    specs = {"a": P("x"), "b": P(), "c": P("x")}
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    names = {"a": (), "b": (), "c": ("x",)} if scope == "unit" else None
    in_map = optaxclip.clip(rules, parts, sharded_over=names)

    if where == "jit":
        placed = {k: jax.sharding.NamedSharding(mesh, spec) for k, spec in specs.items()}
        updates = jax.jit(
            lambda g: optaxclip.clip(rules, parts).update(g, None)[0], in_shardings=(placed,)
        )(grads)
    else:
        updates = jax.jit(
            jax.shard_map(
                lambda g: in_map.update(g, None)[0], mesh=mesh, in_specs=(specs,), out_specs=specs
            )
        )(grads)
    norm = np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in grads.values()))
    for name, limit in zip("abc", (1.0, 0.5, np.inf), strict=True):
        np.testing.assert_allclose(updates[name], grads[name] * min(1, limit / norm), rtol=1e-5)


# A multiple of a rule


def test_times_is_a_multiple_of_a_running_median():
    sizes = np.float32(np.exp(np.random.default_rng(0).normal(size=60)))
    clip = optaxclip.clip(thresholds.times(2.0, thresholds.quantile(0.5, 9)), scopes.tree())
    state = clip.init(sizes[:1])
    for t, size in enumerate(sizes):
        updates, state = clip.update(sizes[t : t + 1], state)
        limit = 2 * np.median(sizes[max(t - 8, 0) : t + 1])
        np.testing.assert_allclose(updates, [min(size, limit)], rtol=1e-5)


def test_times_obeys_the_laws_of_rules_and_keeps_no_limit_infinite():
    testing.check_threshold(thresholds.times(2.0, thresholds.ema()))
    clip = optaxclip.clip(thresholds.times(0.0, thresholds.zscore()), scopes.tree())
    updates, state = clip.update(jnp.array([7.0]), None)
    np.testing.assert_array_equal(updates, [7.0])
    slow = jax.grad(
        lambda f: (
            optaxclip.clip(thresholds.times(f, thresholds.ema()), scopes.tree())
            .update(jnp.array([7.0]), None)[0]
            .sum()
        )
    )
    assert slow(2.0) == 0
    with pytest.raises(ValueError, match="factor must be in"):
        thresholds.times(-1.0, 1.0)


# Rules that see the extra arguments of an update


def test_a_limit_may_follow_the_loss():
    """metaseq: g min(1, (average / loss)^4), for one step."""

    def limit(sizes, state, context):
        return sizes * jnp.minimum(1, (state / context.extra["value"]) ** 4)

    def learn(sizes, clipped, state, context):
        return 0.9 * state + 0.1 * context.extra["value"]

    rule = optaxclip.Threshold(lambda sizes: jnp.ones_like(sizes), limit, learn)
    optimizer = optax.chain(optaxclip.clip(rule, scopes.tree()), optax.scale(-1.0))
    state, average = optimizer.init(jnp.zeros(2)), 1.0
    step = jax.jit(lambda g, s, loss: optimizer.update(g, s, value=loss))
    for loss in (0.9, 2.0, 1.0):
        updates, state = step(jnp.array([3.0, 4.0]), state, loss)
        factor = min(1, (average / loss) ** 4)
        np.testing.assert_allclose(updates, [-3 * factor, -4 * factor], rtol=1e-5)
        average = 0.9 * average + 0.1 * loss


def test_a_limit_may_follow_a_cosine():
    """The limit falls to a tenth where a step turns against the last one."""

    def limit(sizes, state, context):
        return jnp.where(context.extra["cosine"] < 0, 0.1, 1.0).astype(sizes.dtype)

    rule = optaxclip.Threshold(
        lambda sizes: (), limit, lambda sizes, clipped, state, context: state
    )
    clip = optaxclip.clip({"a": rule, "b": 2.0}, scopes.group(lambda path: path))
    grads = {"a": jnp.array([5.0]), "b": jnp.array([5.0])}
    for cosine, expected in (0.5, 1.0), (-0.5, 0.1):
        updates, _ = clip.update(grads, None, cosine=jnp.array(cosine))
        np.testing.assert_allclose(updates["a"], [expected], rtol=1e-6)
        np.testing.assert_allclose(updates["b"], [2.0], rtol=1e-6)


@pytest.mark.parametrize("head, slope", [(jnp.inf, 0.0), (0.5, 0.0)])
def test_a_limit_that_binds_in_a_joint_norm_leaves_no_slope(head, slope):
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    rules = {"a": by_global_norm(1.0), "b": by_global_norm(head)}
    clip = optaxclip.clip(rules, scopes.group(lambda path: path))

    def scaled(z):
        return clip.update(jax.tree.map(lambda x: x * z, grads), None)[0]["a"].sum()

    np.testing.assert_allclose(jax.grad(scaled)(1.0), slope, atol=1e-6)


def test_the_bounds_of_the_weight_norm_are_in_order():
    with pytest.raises(ValueError, match="^low must be at most high, got 3.0 and 1.0; swap them$"):
        optaxclip.clip_by_trust_ratio(1.0, low=3.0, high=1.0)
