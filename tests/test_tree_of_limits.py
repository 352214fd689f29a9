"""A tree of limits: each subtree of the updates under a number has that limit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip
from optaxclip import clip, norms, per_example, responses, scopes, telemetry, thresholds

LIMITS = {"encoder": 1.0, "head": {"w": 0.5, "b": 0.1}}


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


UPDATES = {
    "encoder": {"0": {"w": normal(8, 16), "b": normal(8)}, "1": {"w": normal(16, 8)}},
    "head": {"w": normal(8, 4), "b": normal(4)},
}
FLAT = {
    "/".join(key.key for key in path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(UPDATES)
}


def limit_of(path):
    return {"encoder": 1.0, "head/w": 0.5, "head/b": 0.1}[
        path if path.startswith("head") else "encoder"
    ]


def subtree(path):
    return path if path.startswith("head") else "encoder"


GROUPS = {
    "tree": (scopes.tree(), reference.group(subtree)),
    "leaf": (scopes.leaf(), reference.leaf),
    "unit": (scopes.unit(), reference.unit),
    "element": (scopes.element(), reference.element),
}


def flat(tree):
    return dict(zip(FLAT, jax.tree.leaves(tree), strict=True))


def wanted(updates, groups):
    return reference.clip(
        {name: np.asarray(leaf, np.float64) for name, leaf in updates.items()},
        groups,
        reference.l2,
        lambda places: limit_of(places[0][0]),
        reference.rescale,
    )


def close(got, want):
    for name, leaf in want.items():
        np.testing.assert_allclose(got[name], leaf, rtol=2e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("scope", GROUPS)
def test_each_size_has_the_limit_of_its_subtree(scope):
    ours, groups = GROUPS[scope]
    by_tree = clip(LIMITS, ours)
    got, state = jax.jit(by_tree.update)(UPDATES, by_tree.init(UPDATES))
    close(flat(got), wanted(FLAT, groups))
    by_path = clip({"encoder": 1.0, "head/w": 0.5, "head/b": 0.1}, ours)
    same, _ = jax.jit(by_path.update)(UPDATES, by_path.init(UPDATES))
    assert all(map(np.array_equal, jax.tree.leaves(got), jax.tree.leaves(same)))
    names = telemetry.group_names(state.reading)
    assert names == (["encoder", "head/b", "head/w"] if scope == "tree" else list(FLAT))


@pytest.mark.parametrize("scope", ["tree", "leaf"])
def test_sharded_updates_have_the_same_limits(scope):
    ours, groups = GROUPS[scope]
    mesh = jax.make_mesh((8,), ("x",))
    split = jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, P("x" if len(x) % 8 == 0 else None))),
        UPDATES,
    )
    transform = clip(LIMITS, ours)
    with jax.set_mesh(mesh):
        got, _ = jax.jit(lambda updates: transform.update(updates, None))(split)
    close(flat(got), wanted(FLAT, groups))
    specs = jax.tree.map(lambda x: x.sharding.spec, split)
    mapped = jax.shard_map(
        lambda updates: transform.update(updates, None)[0],
        mesh=mesh,
        in_specs=(specs,),
        out_specs=specs,
    )
    close(flat(jax.jit(mapped)(split)), wanted(FLAT, groups))


def test_rows_take_a_tree_of_limits():
    for row, scope in ("clip_by_global_norm", "tree"), ("clip_by_norm", "leaf"):
        transform = getattr(optaxclip, row)(LIMITS)
        got, _ = transform.update(UPDATES, transform.init(UPDATES))
        close(flat(got), wanted(FLAT, GROUPS[scope][1]))
    got, _ = optaxclip.clip_by_value(LIMITS).update(UPDATES, None)
    close(
        flat(got), {name: np.clip(x, -limit_of(name), limit_of(name)) for name, x in FLAT.items()}
    )


def test_lists_and_keys_with_slashes_have_limits_too():
    updates = {"layers": [np.float32([3.0, 4.0]), np.float32([0.0, 5.0])], "a/b": {"w": np.ones(4)}}
    layers = {0: optax.constant_schedule(1.0), 1: thresholds.growth(2.0)}
    limits = {"layers": layers, "a/b": 1.0}
    transform = clip(limits, scopes.tree())
    state = transform.init(updates)
    for factor in 1.0, 10.0:
        got, state = transform.update(jax.tree.map(lambda x, f=factor: f * x, updates), state)
    np.testing.assert_allclose(got["layers"][0], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(got["layers"][1], [0.0, 10.0], rtol=1e-6)
    np.testing.assert_allclose(got["a/b"]["w"], 0.5, rtol=1e-6)


EMA = thresholds.ema(2.0)


@pytest.mark.parametrize("scope", GROUPS)
def test_trainers_find_what_is_shaped_like_parameters(scope):
    rules = {"encoder": EMA, "head": EMA if scope in ("unit", "element") else 0.5}
    transform = clip(LIMITS if scope == "leaf" else rules, GROUPS[scope][0])
    state = transform.init(UPDATES)
    marked = optax.tree.map_params(transform, lambda x: x, state)
    assert jax.tree.structure(marked) == jax.tree.structure(state)


def test_the_leaves_under_no_key_are_one_group():
    transform = clip({"head": {"w": 0.5}, "tree": 1.0}, scopes.tree())
    got, state = transform.update(UPDATES, transform.init(UPDATES))
    assert telemetry.group_names(state.reading) == ["tree", "head/w"]
    groups = reference.group(lambda path: path if path == "head/w" else "tree")
    want = reference.clip(
        {name: np.asarray(leaf, np.float64) for name, leaf in FLAT.items()},
        groups,
        reference.l2,
        lambda places: 0.5 if places[0][0] == "head/w" else 1.0,
        reference.rescale,
    )
    close(flat(got), want)


def test_groups_keep_their_names():
    by_layer = scopes.group(lambda path: path.split("/")[0])
    got, state = clip({"encoder": 1.0, "head": 0.5}, by_layer).update(UPDATES, None)
    assert telemetry.group_names(state.reading) == ["encoder", "head"]
    with pytest.raises(ValueError, match=r"^threshold has limits for \['head/b', 'head/w'\], but"):
        clip(LIMITS, by_layer).init(UPDATES)
    close(
        flat(clip(LIMITS, scopes.group(subtree)).update(UPDATES, None)[0]),
        wanted(FLAT, GROUPS["tree"][1]),
    )


def test_stacks_of_layers_have_the_limit_of_their_subtree():
    updates = {"layers": {"w": 3 * np.ones((2, 4), np.float32)}, "head": np.ones(4, np.float32)}
    scope = scopes.tree(batch_axes=lambda path, leaf: 0 if "layers" in path else None)
    got, state = clip({"layers": 1.0, "head": 4.0}, scope).update(updates, None)
    np.testing.assert_allclose(got["layers"]["w"], 0.5, rtol=1e-6)
    np.testing.assert_array_equal(got["head"], updates["head"])
    assert telemetry.group_names(state.reading) == ["head", "layers/0", "layers/1"]


def test_a_cotangent_has_a_tree_of_limits():
    def loss(x):
        x = optaxclip.clip_cotangent(x, LIMITS)
        return sum(jax.tree.leaves(jax.tree.map(lambda a, g: jnp.sum(a * g), x, UPDATES)))

    close(flat(jax.jit(jax.grad(loss))(UPDATES)), wanted(FLAT, GROUPS["tree"][1]))


def each(params, x):
    """A loss whose gradients are the examples."""
    return sum(jax.tree.leaves(jax.tree.map(lambda p, g: jnp.sum(p * g), params, x)))


@pytest.mark.parametrize("scope", GROUPS)
def test_each_example_has_the_limits_of_its_subtrees(scope):
    batch = jax.tree.map(lambda x: np.stack([x, 0.01 * x, -2 * x]), UPDATES)
    examples = [flat(jax.tree.map(lambda x, i=i: x[i], batch)) for i in range(3)]
    each_wanted = [wanted(one, GROUPS[scope][1]) for one in examples]
    want = {name: sum(one[name] for one in each_wanted) for name in FLAT}
    options = {"scope": GROUPS[scope][0], "reduce": "sum"}
    got, _ = per_example.aggregate(LIMITS, **options).update(batch, None)
    close(flat(got), want)
    for size in None, 1:
        clipped = per_example.clipped_grad(each, LIMITS, microbatch=size, **options)
        (_, seen), got = jax.jit(clipped)(UPDATES, batch)
        close(flat(got), want)
        assert seen.limits.shape == ((3,) if scope == "tree" else (5,))
        names = ["encoder", "head/b", "head/w"] if scope == "tree" else list(FLAT)
        assert telemetry.group_names(seen.state.reading) == names


def test_factors_serve_a_tree_of_limits():
    def loss(params, x):
        return jnp.sum(jnp.tanh(x @ params["encoder"]["w"]) @ params["head"]["w"])

    params = {"encoder": {"w": normal(20, 30)}, "head": {"w": normal(30, 20)}}
    limits = {"encoder": 1.0, "head": {"w": 0.5}}
    ours = per_example.clipped_grad(loss, limits)
    assert set(ours.plan(params, normal(4, 20)).values()) == {"factors"}
    stored = per_example.aggregate(limits)
    gradients = jax.vmap(jax.grad(loss), (None, 0))(params, normal(4, 20))
    got, want = ours(params, normal(4, 20))[1], stored.update(gradients, None)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_wrong_trees_of_limits_are_refused():
    with pytest.raises(
        ValueError, match=r"^threshold\['head'\]\['w'\] must be in \[0, inf\], got -1"
    ):
        clip({"head": {"w": -1.0}}, scopes.tree())
    with pytest.raises(TypeError, match=r"^threshold\['a'\]\['w'\] must be a real number, got 'x'"):
        clip({"a": {"w": "x"}}, scopes.tree())
    with pytest.raises(
        ValueError, match=r"^threshold has two limits for 'a/b', got it as a key .*; keep one$"
    ):
        clip({"a/b": 1.0, "a": {"b": 1.0}}, scopes.tree())
    with pytest.raises(
        ValueError,
        match=r"^threshold has limits for \['head'\], and only the groups \['tree'\] .*; add one",
    ):
        clip({"head": 1.0}, scopes.tree()).init(UPDATES)
    with pytest.raises(ValueError, match=r"^threshold has limits for \['haed'\], but the tree has"):
        clip({"haed": 1.0, "tree": 1.0}, scopes.tree()).init(UPDATES)
    for scope in scopes.leaf(), scopes.element():
        with pytest.raises(ValueError, match=r"no limit for the groups \['encoder/0/b', 'enc"):
            clip({"head": 1.0}, scope).init(UPDATES)


def test_a_scope_that_was_not_called_is_refused():
    calls = {
        "clip": lambda: clip(LIMITS, scopes.leaf),
        "cotangent": lambda: optaxclip.clip_cotangent(UPDATES, LIMITS, scope=scopes.leaf),
        "examples": lambda: per_example.aggregate(LIMITS, scope=scopes.leaf),
    }
    for call in calls.values():
        with pytest.raises(TypeError, match="^scope must be a Scope, got <function leaf"):
            call()


def test_normalized_subtrees_and_other_norms():
    got, _ = clip(LIMITS, scopes.tree(), norm=norms.l1(), response=responses.normalize).update(
        UPDATES, None
    )
    assert sum(np.abs(x).sum() for x in jax.tree.leaves(got["encoder"])) == pytest.approx(
        1, rel=1e-5
    )
    assert np.abs(got["head"]["b"]).sum() == pytest.approx(0.1, rel=1e-5)
