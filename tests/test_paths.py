"""A leaf has one name: the same string in `init`, `update` and `metrics`, whatever holds it and
whether it is in a box.

`metrics` gives each name the numbers of its own leaf: leaf k of every tree here has the norm k + 1.
"""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import flax.struct
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optaxclip
from optaxclip import scopes, telemetry


class Layer(NamedTuple):
    kernel: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    kernel: Any
    value: Any  # a name like that of a box's only field


@flax.struct.dataclass
class Struct:
    kernel: Any
    rate: float = flax.struct.field(pytree_node=False, default=0.1)


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)])
        self.value = nnx.Param(jnp.ones(2))  # a parameter, and no box


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="out")(nn.Dense(2, kernel_init=boxed_init)(x))


boxed_init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", None))
ONE = jnp.ones(2)


def partitioned(x):
    return nn.Partitioned(x, names=(None,) * x.ndim)


def logical(x):
    return nn.LogicallyPartitioned(x, names=(None,) * x.ndim)


def linen(boxed=True):
    params = Linen().init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    return params if boxed else nn.unbox(params)


def nnx_state(boxed=True):
    state = nnx.state(MLP(nnx.Rngs(0)), nnx.Param)
    return state if boxed else jax.tree.map(lambda box: box[...], state, is_leaf=is_variable)


def is_variable(node):
    return isinstance(node, nnx.Variable)


def haiku():
    net = hk.transform(lambda x: hk.nets.MLP([2, 3])(x))
    return net.init(jax.random.key(0), jnp.ones((1, 2)))


def equinox():
    return eqx.filter(eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0)), eqx.is_array)


def half_boxed(box):
    return {"a": {"kernel": box(ONE), "bias": ONE}, "b": box(ONE)}


HALF = {"a": {"bias": ONE, "kernel": ONE}, "b": ONE}
# What `init` gets, what `update` gets, and the names of the leaves in the order of both.
TREES = {
    "dicts": ({"b": ONE, "a": {"w": ONE}}, None, ["a/w", "b"]),
    "integer keys": ({"a": {0: ONE, 1: ONE}}, None, ["a/0", "a/1"]),
    "lists and tuples": (
        {"layers": [ONE, (ONE, ONE)]},
        None,
        ["layers/0", "layers/1/0", "layers/1/1"],
    ),
    "NamedTuples": ([Layer(ONE, ONE), Layer(ONE, None)], None, ["0/kernel", "0/bias", "1/kernel"]),
    "dataclasses": ({"enc": Block(ONE, ONE)}, None, ["enc/kernel", "enc/value"]),
    "flax.struct": ({"enc": Struct(ONE), "head": Struct(ONE)}, None, ["enc/kernel", "head/kernel"]),
    "a leaf called value": ({"a": {"value": ONE}, "value": ONE}, None, ["a/value", "value"]),
    "equinox": (
        equinox(),
        None,
        ["layers/0/weight", "layers/0/bias", "layers/1/weight", "layers/1/bias"],
    ),
    "haiku": (
        haiku(),
        None,
        ["mlp/~/linear_0/b", "mlp/~/linear_0/w", "mlp/~/linear_1/b", "mlp/~/linear_1/w"],
    ),
}
LINEN = ["Dense_0/bias", "Dense_0/kernel", "out/bias", "out/kernel"]
NNX = ["layers/0/bias", "layers/0/kernel", "layers/1/bias", "layers/1/kernel", "value"]
for first in (True, False):
    for then in (True, False):
        when = f"boxed at init: {first}, at update: {then}"
        TREES |= {
            f"linen, {when}": (linen(first), linen(then), LINEN),
            f"nnx, {when}": (nnx_state(first), nnx_state(then), NNX),
            f"nnx in a list, {when}": (
                [nnx_state(first), ONE],
                [nnx_state(then), ONE],
                [*(f"0/{name}" for name in NNX), "1"],
            ),
        }
        for box in (partitioned, logical):
            TREES[f"some leaves {box.__name__}, {when}"] = (
                half_boxed(box) if first else HALF,
                half_boxed(box) if then else HALF,
                ["a/bias", "a/kernel", "b"],
            )


def of_norms(tree, scale=1.0):
    """The tree with leaf k of norm k + 1."""
    leaves, treedef = jax.tree.flatten(tree)
    leaves = [jnp.full_like(x, scale * (k + 1) / np.sqrt(x.size)) for k, x in enumerate(leaves)]
    return jax.tree.unflatten(treedef, leaves)


@pytest.fixture(params=TREES)
def trees(request):
    params, grads, names = TREES[request.param]
    return params, of_norms(params if grads is None else grads), names


def sizes(metrics, key="size_before"):
    start = f"clip/{key}/"
    return {
        name.removeprefix(start): float(x) for name, x in metrics.items() if name.startswith(start)
    }


def test_a_group_is_asked_for_by_the_same_strings_in_init_and_update(trees):
    params, grads, names = trees
    asked = []
    clip = optaxclip.clip(1.0, scopes.group(lambda path: asked.append(path) or path))
    state = jax.eval_shape(clip.init, params)
    in_init, asked[:] = sorted(set(asked)), []
    jax.eval_shape(clip.update, grads, state)
    assert in_init == sorted(set(asked)) == sorted(names)


def test_axes_and_filters_are_asked_for_by_the_same_strings(trees):
    params, grads, names = trees
    asked = []
    clip = optaxclip.clip(
        1.0, scopes.unit(axes=lambda path, leaf: asked.append((path, leaf.shape)) or 0)
    )
    state = jax.eval_shape(clip.init, params)
    in_init, asked[:] = sorted(set(asked)), []
    jax.eval_shape(clip.update, grads, state)
    assert in_init == sorted(set(asked))
    assert [path for path, _ in in_init] == sorted(names)


@pytest.mark.parametrize("scope", [scopes.leaf(), scopes.unit(), scopes.element()])
def test_metrics_have_each_name_once_with_its_own_numbers(trees, scope):
    params, grads, names = trees
    clip = optaxclip.clip(0.5, scope)
    updates, state = clip.update(grads, clip.init(params))
    found, by_grads = (sizes(telemetry.metrics(state, tree)) for tree in (params, grads))
    assert list(found) == names and found == by_grads
    for k, (name, leaf) in enumerate(zip(names, jax.tree.leaves(grads), strict=True)):
        if scope.axes is None:
            np.testing.assert_allclose(found[name], k + 1, rtol=1e-6)
        else:  # of the largest unit or element
            assert 0 < found[name] <= (k + 1) * (1 + 1e-6)
        if scope.axes is not None and not scope.axes("", leaf):
            np.testing.assert_allclose(found[name], (k + 1) / np.sqrt(leaf.size), rtol=1e-6)
    assert jax.tree.structure(updates) == jax.tree.structure(grads)


def test_a_limit_by_name_is_that_of_its_own_leaf(trees):
    params, grads, names = trees
    limits = {name: 0.1 * (len(names) - k) for k, name in enumerate(names)}
    clip = optaxclip.clip(limits, scopes.group(lambda path: path))
    state = clip.init(params)
    for _ in range(2):
        updates, state = clip.update(grads, state)
    for name, leaf in zip(names, jax.tree.leaves(updates), strict=True):
        np.testing.assert_allclose(jnp.linalg.norm(leaf), limits[name], rtol=1e-6)
    found = sizes(telemetry.metrics(state, params), "limit")
    assert list(found) == names
    np.testing.assert_allclose(list(found.values()), list(limits.values()), rtol=1e-6)


@pytest.mark.parametrize("depth", [1, 2])
def test_groups_of_layers_have_the_joint_norm_of_their_leaves(trees, depth):
    params, grads, names = trees
    scope = scopes.group(lambda path: "/".join(path.split("/")[:depth]))
    clip = optaxclip.clip(1.0, scope)
    _, state = clip.update(grads, clip.init(params))
    expected = {}
    for k, name in enumerate(names):
        group = "/".join(name.split("/")[:depth])
        expected[group] = np.hypot(expected.get(group, 0), k + 1)
    if len(expected) > 1:  # of a single group no names are told
        found = sizes(telemetry.metrics(state, params))
        assert list(found) == list(expected)
        np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-6)
    else:
        np.testing.assert_allclose(
            telemetry.metrics(state, params)["clip/size_before"], *expected.values(), rtol=1e-6
        )


def test_names_are_those_that_nnx_optimizer_gives(scale=3.0):
    model = MLP(nnx.Rngs(0))
    tx = optax.chain(optaxclip.clip(0.5, scopes.group(lambda path: path)), optax.adam(1e-3))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(2):
        optimizer.update(model, of_norms(nnx.state(model, nnx.Param), scale))
    found = sizes(telemetry.metrics(optimizer, nnx.state(model, nnx.Param)))
    assert list(found) == NNX
    np.testing.assert_allclose(list(found.values()), scale * np.arange(1, len(NNX) + 1), rtol=1e-6)


CLOSE = {
    "slash in a key": ({"a/b": {"w": ONE}, "a": {"b/w": 2 * ONE}}, 2),
    "slash and a dict": ({"a/b": ONE, "a": {"b": 2 * ONE}}, 2),
    "three alike": ({"a/b/c": ONE, "a/b": {"c": 2 * ONE}, "a": {"b/c": 3 * ONE}}, 3),
    "a list and a key": ({"w": [ONE], "w/0": 2 * ONE}, 2),
    "a box beside a key called value": ({"w": partitioned(ONE), "w/value": 2 * ONE}, 2),
    "an empty key": ({"": {"a": ONE}, "/a": 2 * ONE}, 2),
}


@pytest.mark.parametrize(
    "scope", [scopes.leaf(), scopes.group(lambda path: path), scopes.element()]
)
@pytest.mark.parametrize("name", CLOSE)
def test_two_leaves_never_share_a_name(name, scope):
    tree, leaves = CLOSE[name]
    clip = optaxclip.clip(1e-3, scope)
    _, state = clip.update(tree, clip.init(tree))
    found = sizes(telemetry.metrics(state, tree))
    assert len(found) == leaves
    norm = jnp.max if scope.axes is not None else jnp.linalg.norm
    np.testing.assert_allclose(
        sorted(found.values()), sorted(map(norm, jax.tree.leaves(tree))), rtol=1e-6
    )


def test_a_state_of_other_names_is_refused():
    """Two trees with as many leaves: what was learned for one leaf is not another's."""
    clip = optaxclip.adagc()
    state = clip.init({"enc": ONE, "head": ONE})
    with pytest.raises(ValueError, match="head"):
        clip.update({"enc": ONE, "tail": ONE}, state)
