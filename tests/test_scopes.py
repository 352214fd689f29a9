import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compiling import optimized
from flax import nnx

import optaxclip
from optaxclip import norms, scopes, telemetry, thresholds
from optaxclip._layout import by_path


def random_leaves(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()
    }


@functools.cache
def compiled(scope, limit):
    clip = optaxclip.clip(limit, scope=scope)
    return jax.jit(lambda grads: clip.update(grads, clip.init(grads)))


def clipped(scope, grads, limit=0.5):
    return compiled(scope, limit)(grads)


def assert_grouped(scope, groups, grads, limit=0.5):
    expected = reference.clip(grads, groups, reference.l2, lambda places: limit)
    updates = clipped(scope, grads, limit)[0]
    assert set(updates) == set(expected)
    for name, leaf in updates.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=3e-6, err_msg=name)
    return updates


SHAPES = {
    "scale": (),
    "bias": (3,),
    "dense": (4, 3),
    "heads": (4, 2, 3),
    "conv": (2, 1, 3, 4),
    "single": (5, 1),
    "none": (0, 2),
}
GRADS = random_leaves(SHAPES)
SCOPES = {
    "tree": (scopes.tree(), reference.tree),
    "group": (scopes.group(lambda path: path[-1]), reference.group(lambda name: name[-1])),
    "leaf": (scopes.leaf(), reference.leaf),
    "unit": (scopes.unit(), reference.unit),
    "element": (scopes.element(), reference.element),
}


@pytest.mark.parametrize("name", SCOPES)
def test_the_numbers_that_share_a_size_are_those_of_the_definition(name):
    assert_grouped(*SCOPES[name], GRADS)


@pytest.mark.parametrize("name", SCOPES)
@pytest.mark.parametrize(
    "shapes",
    [{"a": ()}, {"a": (3,), "b": (3,)}, {"a": (2, 2)}, {"a": (0,)}, {"a": (1, 1), "b": ()}],
)
def test_so_they_are_in_small_trees(shapes, name):
    assert_grouped(*SCOPES[name], random_leaves(shapes), limit=0.1)


def test_from_tree_to_element_each_scope_refines_the_one_before():
    counts = [len(groups(GRADS)) for _, groups in SCOPES.values()]
    assert counts == sorted(counts) and len(set(counts)) == 5
    sizes = {
        name: float(clipped(scope, GRADS)[1].reading.size_before.max())
        for name, (scope, _) in SCOPES.items()
    }
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)


# group


def test_a_leaf_whose_group_is_none_is_neither_measured_nor_clipped():
    grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([jnp.nan, 1e30])}
    updates, state = clipped(scopes.group(lambda path: None if path == "b" else "all"), grads, 1.0)
    np.testing.assert_allclose(updates["a"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(updates["b"], grads["b"])
    assert state.reading.size_before == pytest.approx([5.0])


def test_groups_of_none_alone_leave_the_tree_as_it_is():
    updates, state = clipped(scopes.group(lambda path: None), {"a": jnp.array([3.0, 4.0])}, 1.0)
    np.testing.assert_array_equal(updates["a"], [3, 4])
    assert state.reading.size_before.shape == (0,)


class Layer(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


def test_paths_are_simple_words_between_slashes():
    seen = []
    grads = {
        "encoder": [Layer(jnp.ones(2), jnp.ones(1)), (jnp.ones(1), None)],
        "head": {1: jnp.ones(1), 2: jnp.array([1])},
    }
    clipped(scopes.group(lambda path: seen.append(path) or "all"), grads)
    # neither None nor integers
    assert set(seen) == {
        "encoder/0/kernel",
        "encoder/0/bias",
        "encoder/1/0",
        "head/1",
    }


def test_functions_of_axes_get_the_path_and_the_leaf():
    seen = []
    clipped(
        scopes.unit(lambda path, leaf: seen.append((path, leaf.shape)) or ()),
        {"a": [jnp.ones((2, 3)), jnp.ones(())]},
    )
    assert set(seen) == {("a/0", (2, 3)), ("a/1", ())}


def test_leaves_whose_paths_look_alike_are_still_two_leaves():
    grads = {"a/b": jnp.array([3.0, 4.0]), "a": {"b": jnp.array([0.3])}}
    for scope in scopes.leaf(), scopes.unit():
        updates, state = clipped(scope, grads, 1.0)
        np.testing.assert_allclose(updates["a/b"], [0.6, 0.8], rtol=1e-6)
        np.testing.assert_array_equal(updates["a"]["b"], grads["a"]["b"])
        assert sorted(state.reading.size_before.tolist()) == pytest.approx([0.3, 5.0])


# unit

CONVENTIONS = {
    (): (),
    (5,): (0,),
    (0,): (0,),
    (1, 4): (0, 1),
    (4, 1): (0, 1),
    (1, 1, 1, 4): (0, 1, 2, 3),
    (1, 1, 1, 1, 1, 4): (0, 1, 2, 3, 4, 5),
    (2, 3): (0,),
    (0, 3): (0,),
    (3, 0): (0,),
    (2, 3, 4): (0,),
    (1, 3, 4): (0,),
    (2, 2, 2, 3): (0, 1, 2),
    (1, 1, 2, 3): (0, 1, 2),
    (2, 2, 2, 3, 1): (0, 1, 2, 3),
    (1, 2, 2, 2, 3): (0, 1, 2, 3),
    (1, 2, 1, 2, 2, 3): (0, 1, 2, 3, 4),
}


@pytest.mark.parametrize("shape, axes", CONVENTIONS.items(), ids=str)
def test_units_are_those_of_the_conventions(shape, axes):
    assert scopes.unit().axes("w", jnp.zeros(shape)) == axes
    assert tuple(reference.fan_in(shape)) == axes


def test_units_of_every_rank_are_clipped_by_the_conventions():
    assert_grouped(
        scopes.unit(), reference.unit, random_leaves({str(shape): shape for shape in CONVENTIONS})
    )


@pytest.mark.parametrize(
    "axes, of_rank",
    [
        (0, {0: [], 1: [0], 2: [0], 3: [0]}),
        (-1, {0: [], 1: [0], 2: [1], 3: [2]}),
        ((0, 1), {0: [], 1: [0], 2: [0, 1], 3: [0, 1]}),
        ([1, 0], {0: [], 1: [0], 2: [0, 1], 3: [0, 1]}),
        ((-1, -2), {0: [], 1: [0], 2: [0, 1], 3: [1, 2]}),
        (2, {0: [], 1: [0], 2: [0, 1], 3: [2]}),
        ((0, 0), {0: [], 1: [0], 2: [0], 3: [0]}),
        ((), {0: [], 1: [], 2: [], 3: []}),
    ],
    ids=str,
)
def test_fixed_axes_are_measured_together_and_leaves_with_too_few_are_one_unit(axes, of_rank):
    grads = random_leaves({"scale": (), "bias": (3,), "dense": (4, 3), "heads": (4, 2, 3)})
    assert_grouped(scopes.unit(axes), reference.along(lambda shape: of_rank[len(shape)]), grads)


def test_axes_can_depend_on_the_leaf_and_none_leaves_it_alone():
    grads = random_leaves({"a": (4, 3), "b": (4, 3), "c": (4, 3)}) | {
        "d": jnp.array([jnp.nan, 3.0])
    }
    updates, state = clipped(
        scopes.unit(lambda path, leaf: {"a": 0, "b": [-1], "c": (0, 1), "d": None}[path]), grads
    )
    for name, axes in ("a", 0), ("b", 1), ("c", (0, 1)):
        leaf = np.asarray(grads[name], float)
        sizes = np.sqrt(np.sum(leaf**2, axes, keepdims=True))
        np.testing.assert_allclose(updates[name], leaf * np.minimum(1, 0.5 / sizes), rtol=3e-6)
    np.testing.assert_array_equal(updates["d"], grads["d"])
    assert state.reading.size_before.shape == (3,)


@pytest.mark.parametrize("axes", [5, (0, 2), -3])
@pytest.mark.parametrize("argument", ["axes", "batch_axes"])
def test_a_function_that_chooses_an_axis_that_is_not_there_is_told_so(argument, axes):
    scope = scopes.unit(**{argument: lambda path, leaf: axes})
    advice = (
        rf"^{argument} chose .* for the leaf 'a/w' of shape \(2, 3\); return axes that "
        "it has, or None to leave it alone$"
    )
    with pytest.raises(ValueError, match=advice):
        optaxclip.clip(1.0, scope=scope).init({"a": {"w": jnp.ones((2, 3))}})
    with pytest.raises(ValueError, match=advice):
        optaxclip.clip(1.0, scope=scope).update(
            {"a": {"w": jnp.ones((2, 3))}}, optaxclip.clip(1.0, scopes.tree()).init(jnp.ones(2))
        )


# Stacked layers


def layers(tree):
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(3)]


@pytest.mark.parametrize("scope", [scopes.leaf, scopes.unit])
@pytest.mark.parametrize(
    "batch_axes", [0, (0,), [-5], lambda path, leaf: 0], ids=["0", "(0,)", "[-5]", "function"]
)
def test_a_stack_is_clipped_like_its_layers(scope, batch_axes):
    shapes = (
        {"conv": (2, 1, 3, 4)}
        if batch_axes == [-5]
        else {name: shape for name, shape in SHAPES.items() if 0 not in shape}
    )
    stacked = random_leaves({name: (3, *shape) for name, shape in shapes.items()})
    one_layer, updates = scope(), clipped(scope(batch_axes=batch_axes), stacked)[0]
    for layer, expected in zip(layers(updates), layers(stacked), strict=True):
        unstacked = clipped(one_layer, expected)[0]
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), layer, unstacked)


@pytest.mark.parametrize("scope", [scopes.leaf, scopes.unit])
def test_stacks_can_have_two_axes_or_one_behind(scope):
    (leaf,) = random_leaves({"a": (2, 4, 3, 5)}).values()
    one_layer, updates = scope(), clipped(scope(batch_axes=(0, -1)), leaf)[0]
    for i in range(2):
        for j in range(5):
            np.testing.assert_allclose(
                updates[i, ..., j], clipped(one_layer, leaf[i, ..., j])[0], rtol=1e-6
            )


@pytest.mark.parametrize("scope", [scopes.leaf, scopes.unit])
def test_leaves_can_be_stacked_or_not(scope):
    one_layer, grads = scope(), random_leaves({"stack": (3, 4, 2), "plain": (3, 4)})
    updates = clipped(scope(batch_axes=lambda path, leaf: 0 if path == "stack" else None), grads)[0]
    np.testing.assert_allclose(updates["plain"], clipped(one_layer, grads["plain"])[0], rtol=1e-6)
    for i in range(3):
        np.testing.assert_allclose(
            updates["stack"][i], clipped(one_layer, grads["stack"][i])[0], rtol=1e-6
        )


@pytest.mark.parametrize("scope", [scopes.leaf, scopes.unit])
def test_a_leaf_without_the_fixed_batch_axis_is_no_stack(scope):
    grads = {"scale": jnp.array(3.0), "bias": jnp.array([3.0, 4.0])}
    updates = clipped(scope(batch_axes=1), grads, 1.0)[0]
    np.testing.assert_allclose(updates["bias"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(updates["scale"], 1.0, rtol=1e-6)


# Split over devices


def test_whether_a_number_is_split_does_not_depend_on_other_leaves():
    def update(grads):
        clip = optaxclip.clip(1.0, scope=scopes.unit(), sharded_over="devices")
        return clip.update(grads, clip.init(grads))[0]

    alone = {"scale": jnp.array([3.0, 4.0])}
    with_others = {**alone, "dense": jnp.ones((2, 3, 2))}
    run = jax.vmap(update, axis_name="devices")
    np.testing.assert_allclose(run(alone)["scale"], run(with_others)["scale"], rtol=1e-6)


# A model whose layers are stacked, as those that are scanned over, is clipped as the same model
# whose layers are apart.

MODEL = {"embed": (5, 2), "layers": {"kernel": (3, 4, 2), "bias": (3, 2)}}
ALIKE = {
    "fixed": lambda scope: optaxclip.clip_by_norm(6.0, scope=scope),
    "adagc": lambda scope: optaxclip.adagc(warmup=2, max_norm=40.0, scope=scope),
    "autoclip": lambda scope: optaxclip.autoclip(0.5, window=4, scope=scope),
    "agc": lambda scope: optaxclip.adaptive_grad_clip(2.0, scope=scope),
}
STACKED = {"batch_axes": lambda path, leaf: 0 if "layers" in path else None}
GRAINS = {  # of the stacked model, of the other
    "leaf": (scopes.leaf(**STACKED), scopes.leaf()),
    "unit": (scopes.unit(**STACKED), scopes.unit()),
    "group": (scopes.group(lambda path: "bias" if "bias" in path else "rest"),)
    * 2,  # the rest: some stacked, some not
}


def scanned(seed, *leading):
    """Gradients or weights whose sizes differ by leaf, layer and step."""
    rng = np.random.default_rng(seed)

    def leaf(shape):
        sizes = np.exp(1.5 * rng.normal(size=[*leading, shape[0], *[1] * (len(shape) - 1)]))
        return jnp.asarray(rng.normal(size=[*leading, *shape]) * sizes, jnp.float32)

    return jax.tree.map(leaf, MODEL, is_leaf=lambda shape: isinstance(shape, tuple))


def apart(tree, axis=0):
    return tree | {
        "layers": [
            jax.tree.map(lambda x, i=i: jnp.take(x, i, axis), tree["layers"]) for i in range(3)
        ]
    }


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("method", ALIKE)
def test_stacked_layers_are_clipped_as_if_they_were_apart(method, grain):
    def run(scope, grads, params):
        clip = ALIKE[method](scope)
        return jax.lax.scan(
            lambda state, g: clip.update(g, state, params)[::-1], clip.init(params), grads
        )[1]

    (stacked, other), grads, params = GRAINS[grain], scanned(0, 5), scanned(1)
    both = jax.jit(
        lambda: (run(stacked, grads, params), run(other, apart(grads, 1), apart(params)))
    )
    updates, expected = both()
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6), apart(updates, 1), expected
    )
    clipped = [
        np.mean(np.abs(x) < np.abs(y))
        for x, y in zip(*map(jax.tree.leaves, (updates, grads)), strict=True)
    ]
    assert 0.1 < np.mean(clipped) < 0.95  # some are, some are not


def test_many_leaves_share_the_kernels_that_take_their_factors():
    def slices(leaves):
        clip = optaxclip.clip_by_norm(1.0)
        grads = [jnp.ones(3)] * leaves
        program = optimized(jax.jit(clip.update).lower(grads, clip.init(grads))).as_text()
        return len(set(re.findall(r"slice=\{[^}]*\}", program)))

    # of the root of their number in each of two steps, and two factors
    assert slices(100) <= 2 * 10 + 2
    assert slices(101) <= 2 * 11 + 2


# Leaves that are left out, and stacks of layers in groups


WITH_OPTIONS = {
    "tree": scopes.tree,
    "group": functools.partial(scopes.group, lambda path: path[0]),
    "leaf": scopes.leaf,
    "unit": scopes.unit,
    "element": scopes.element,
}


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_leaves_that_where_refuses_are_neither_measured_nor_clipped(name):
    grads = {"a": jnp.full((2, 3), 9.0), "b": jnp.full((2, 3), jnp.nan)}
    updates, state = clipped(WITH_OPTIONS[name](where=lambda path: path != "b"), grads, 1.0)
    np.testing.assert_array_equal(updates["b"], grads["b"])
    assert float(jnp.linalg.norm(updates["a"])) < 3 and state.reading.nonfinite_steps == 0
    with pytest.raises(
        TypeError, match="^where must be a function, got .b.; pass one such as lambda path"
    ):
        WITH_OPTIONS[name](where="b")


STACKS = {
    "layers": {"w": jnp.arange(24.0).reshape(3, 2, 4) - 7, "b": jnp.array([[1.0], [9.0], [0.1]])},
    "head": jnp.array([3.0, 4.0]),
}


def in_layers(path, leaf):
    return 0 if path.startswith("layers") else None


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("norm", [norms.l2(), norms.l1(), norms.linf(), norms.rms(), norms.lp(3)])
def test_each_layer_of_a_stack_is_clipped_as_a_tree_by_itself(norm, jit):
    scope = scopes.group(lambda path: path.split("/")[0], batch_axes=in_layers)
    clip = optaxclip.clip(0.5, scope, norm=norm)
    update = jax.jit(clip.update) if jit else clip.update
    updates, state = update(STACKS, clip.init(STACKS))
    alone = optaxclip.clip(0.5, scopes.tree(), norm=norm)
    sizes = []
    for k in range(3):
        layer = jax.tree.map(lambda x, k=k: x[k], STACKS["layers"])
        expected, one = alone.update(layer, alone.init(layer))
        sizes.append(one.reading.size_before[0])
        for leaf, want in zip(*map(jax.tree.leaves, (updates["layers"], expected)), strict=True):
            np.testing.assert_allclose(leaf[k], want, rtol=1e-6)
    names = telemetry.group_names(state.reading)
    assert names == ["head", "layers/0", "layers/1", "layers/2"]
    np.testing.assert_allclose(state.reading.size_before[1:], sizes, rtol=1e-6)


def test_a_rule_learns_for_each_layer_and_a_dict_names_the_stack():
    scope = scopes.group(lambda path: path.split("/")[0], batch_axes=in_layers)
    clip = optaxclip.clip({"layers": thresholds.ema(1.0), "head": 1.0}, scope)
    state = clip.init(STACKS)
    for scale in 1.0, 2.0:
        updates, state = clip.update(jax.tree.map(lambda x, s=scale: s * x, STACKS), state)
    for leaf, want in zip(
        *map(jax.tree.leaves, (updates["layers"], STACKS["layers"])), strict=True
    ):
        np.testing.assert_allclose(leaf, want, rtol=1e-5)
    assert float(jnp.linalg.norm(updates["head"])) == pytest.approx(1)


def test_members_of_an_ensemble_share_a_norm_over_all_leaves():
    params = jax.vmap(lambda k: {"w": k * jnp.ones((2, 2)), "b": k * jnp.ones(3)})(
        jnp.arange(1.0, 5)
    )
    updates, state = clipped(scopes.tree(batch_axes=0), params, 1.0)
    assert telemetry.group_names(state.reading) == [f"tree/{k}" for k in range(4)]
    np.testing.assert_allclose(state.reading.size_before, np.sqrt(7) * np.arange(1, 5), rtol=1e-6)
    np.testing.assert_allclose(updates["w"], np.full((4, 2, 2), 1 / np.sqrt(7)), rtol=1e-6)


def test_stacks_of_other_lengths_are_refused():
    grads = {"a": jnp.ones((2, 3)), "b": jnp.ones((4, 3))}
    words = (
        "^batch_axes must give stacks of one length in the group 'tree', got .2,. and .4,.; give"
    )
    with pytest.raises(ValueError, match=words):
        clipped(scopes.tree(batch_axes=0), grads)


FLAX = {  # path: shape, axes of the fan-in
    "attention/query/kernel": ((8, 2, 4), (0,)),
    "attention/value/bias": ((2, 4), (0, 1)),
    "attention/out/kernel": ((2, 4, 8), (0, 1)),
    "attention/out/bias": ((8,), (0,)),
    "embed/embedding": ((10, 8), (1,)),
    "conv/kernel": ((3, 4, 5), (0, 1)),
    "conv2/kernel": ((3, 3, 4, 5), (0, 1, 2)),
    "lstm/hf/kernel": ((4, 4), (0,)),
    "lstm/ii/kernel": ((3, 4), (0,)),
    "dense/kernel": ((3, 4), (0,)),
    "dense/single/kernel": ((3, 1), (0,)),
    "norm/scale": ((4,), (0,)),
    "kernel": ((3, 4), (0,)),
    "temperature": ((), ()),
}


@pytest.mark.parametrize("path", FLAX)
def test_units_of_flax_layers_go_by_their_names(path):
    shape, axes = FLAX[path]
    assert scopes.flax_axes(path, jax.ShapeDtypeStruct(shape, jnp.float32)) == axes
    grads = functools.reduce(lambda x, key: {key: x}, path.split("/")[::-1], jnp.ones(shape))
    clip = optaxclip.clip_by_norm(0.5, scope=scopes.unit(scopes.flax_axes))
    (updates,) = jax.tree.leaves(clip.update(grads, None)[0])
    norms_of_units = np.sqrt(np.sum(np.asarray(updates) ** 2, axes))
    np.testing.assert_allclose(norms_of_units, np.full(norms_of_units.shape, 0.5), rtol=1e-6)
    stack = jax.tree.map(lambda x: jnp.stack([x, 3 * x]), grads)
    stacked = optaxclip.clip_by_norm(0.5, scope=scopes.unit(scopes.flax_axes, batch_axes=0))
    (of_layers,) = jax.tree.leaves(stacked.update(stack, None)[0])
    np.testing.assert_allclose(of_layers, np.stack([updates, updates]), rtol=1e-6)


def test_flax_names_its_layers_as_flax_axes_expects():
    rngs = nnx.Rngs(0)
    layers = {
        "attention": nnx.MultiHeadAttention(num_heads=2, in_features=8, rngs=rngs, decode=False),
        "embed": nnx.Embed(10, 8, rngs=rngs),
        "conv": nnx.Conv(3, 4, (3,), rngs=rngs),
        "lstm": nnx.LSTMCell(3, 4, rngs=rngs),
    }
    state = {name: nnx.state(layer, nnx.Param) for name, layer in layers.items()}
    axes = {path: scopes.flax_axes(path, leaf) for path, leaf in by_path(state).items()}
    assert axes["attention/out/kernel"] == (0, 1) and axes["attention/query/kernel"] == (0,)
    assert axes["attention/key/bias"] == (0, 1) and axes["embed/embedding"] == (1,)
    assert axes["conv/kernel"] == (0, 1) and axes["lstm/hf/kernel"] == (0,)
