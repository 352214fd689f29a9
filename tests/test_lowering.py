"""Single numbers go through the engine as one vector, equal blocks as a stack, and come out as if
each had gone alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optaxclip
from optaxclip import norms, responses, scopes, telemetry, thresholds
from optaxclip._lowering import LARGE, Blocks, unstacked

BIASES = {
    "small": jnp.array([0.1, -0.2]),
    "large": jnp.array([30.0, 40.0]),
    "zero": jnp.zeros(3),
    "infinite": jnp.array([jnp.inf, 1.0]),
    "huge": jnp.array([3e38, 1e38]),
    "half": jnp.array([3.0, 4.0], jnp.bfloat16),
    "complex": jnp.array([3.0 + 4.0j]),
}
KERNEL = jnp.arange(6.0).reshape(2, 3)
GRADS = {
    "kernel": KERNEL,
    "kernel too": 9 * KERNEL,
    "kernel with nan": KERNEL.at[0, 1].set(jnp.nan),
    **BIASES,
    "other": jnp.ones((4, 2)),
    "scalar": jnp.array(-7.0),
}
PARAMS = jax.tree.map(lambda x: jnp.full_like(x, 2), GRADS)
MESH = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
RULES = {
    "constant": 1.0,
    "relative": thresholds.relative_to_params(0.5, floor=1e-3),
    "schedule": lambda step: 2.0 - step,
    "learned": thresholds.ema(1.5, decay=0.5),
    "by name": {name: 0.5 + k for k, name in enumerate(sorted(GRADS))},
}


def run(clip, grads, params):
    state = clip.init(params)
    for scale in 1.0, 2.0, 0.5:
        updates, state = clip.update(
            jax.tree.map(lambda x, scale=scale: (scale * x).astype(x.dtype), grads), state, params
        )
    return updates, state


@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
@pytest.mark.parametrize(
    "response", [responses.rescale, responses.smooth, responses.clamp], ids=lambda r: r.__name__
)
@pytest.mark.parametrize("rule", RULES)
def test_each_leaf_is_clipped_as_it_would_be_alone(rule, response, nonfinite):
    def clip_of(names):
        threshold = RULES[rule]
        own = (
            {name: threshold[name] for name in names} if isinstance(threshold, dict) else threshold
        )
        return optaxclip.clip(own, scope=scopes.unit(), response=response, nonfinite=nonfinite)

    updates, state = jax.jit(lambda: run(clip_of(GRADS), GRADS, PARAMS))()
    for k, name in enumerate(sorted(GRADS)):
        alone, alone_state = jax.jit(
            lambda n=name: run(clip_of([n]), {n: GRADS[n]}, {n: PARAMS[n]})
        )()
        np.testing.assert_allclose(updates[name], alone[name], rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(
            state.reading.measured[:, k],
            alone_state.reading.measured[:, 0],
            rtol=1e-6,
            err_msg=name,
        )
        trees, others = (
            jax.tree.leaves(x.threshold, is_leaf=lambda x: isinstance(x, dict))
            for x in (state, alone_state)
        )
        for tree, other in zip(trees, others, strict=True):
            np.testing.assert_allclose(tree[name], other[name], rtol=1e-6)
        assert updates[name].dtype == GRADS[name].dtype and updates[name].shape == GRADS[name].shape


def assert_same(arrays, others):
    assert [x.shape for x in arrays] == [x.shape for x in others]
    jax.tree.map(np.testing.assert_array_equal, list(arrays), list(others))


def test_numbers_of_one_precision_are_one_vector_and_come_back_in_order():
    sizes = [jnp.ones((1, 2)), jnp.full((1, 1), 3.0), jnp.array(4.0)]
    sizes += [jnp.ones(1, jnp.bfloat16), jnp.full(1, 5.0)]
    blocks = Blocks.of(sizes)
    assert blocks.members == [[1, 2, 4], [0], [3]]
    np.testing.assert_array_equal(blocks.stacks[0], [3, 4, 5])
    assert_same(blocks.each(), sizes)
    table = blocks.table(lambda x: jnp.full(4, jnp.max(x), jnp.float32))
    np.testing.assert_array_equal(table, [[1, 3, 4, 1, 5]] * 4)


def test_equal_sizes_of_small_leaves_are_a_stack_and_come_back():
    shapes = [(2, 3), (5,), (2, 3), (LARGE, 3), (LARGE, 3), (4, 3), (5,)]
    leaves = [jnp.full(shape, k) for k, shape in enumerate(shapes)]
    sizes = [leaf[:1] for leaf in leaves]
    blocks = Blocks.of(sizes, leaves)
    assert blocks.members == [[0, 2, 5], [1, 6], [3], [4]]
    assert [x.shape for x in blocks.stacks] == [(3, 1, 3), (2,), (1, 3), (1, 3)]
    assert_same(blocks.each(), sizes)
    for arrays, factor in zip(unstacked(blocks, blocks.map(lambda x: 2 * x)), (1, 2), strict=True):
        assert_same(arrays, [factor * size for size in sizes])
    # What broadcasts against a block of a stack is broadcast to it; a block alone keeps it.
    spread = blocks.like([jnp.array(float(k)) for k in range(7)])
    np.testing.assert_array_equal(spread.stacks[0][:, 0], [[k] * 3 for k in (0, 2, 5)])
    assert spread.stacks[2].shape == ()


@pytest.mark.parametrize("alone", [False, True])
def test_map_is_a_map_over_blocks(alone):
    """Of stacks, or of each block if an argument is not the same for all."""
    leaves = [jnp.full((3, 2), k, jnp.float32) for k in (1, 4, 2)] + [jnp.ones(LARGE + 1)]
    sizes = [leaf[:1] for leaf in leaves]
    blocks, factors = Blocks.of(sizes, leaves), [2.0] * 4
    if alone:
        factors = [jnp.array(k) for k in (2.0, 3.0, 5.0, 7.0)]
    product, total = blocks.map(lambda x, f, y: (f * x, x + y), factors, blocks, outputs=2)
    assert_same(product.each(), [f * x for f, x in zip(factors, sizes, strict=True)])
    assert_same(total.each(), [x + x for x in sizes])
    seen = []
    blocks.map(lambda x, f: seen.append(x.shape) or x, factors)
    assert seen == ([(1, 2)] * 3 + [(1,)] if alone else [(3, 1, 2), (1,)])


def test_a_state_of_one_block_is_no_argument_for_all():
    states = [(), (jnp.ones(2),)]
    blocks = Blocks.of([jnp.ones((1, 2))] * 2, [jnp.ones((3, 2))] * 2)
    seen = []
    blocks.map(lambda x, state: seen.append(x.shape) or x, states)
    assert seen == [(1, 2), (1, 2)]


def test_sizes_of_groups_are_one_vector_and_each_leaf_finds_its_own():
    blocks = Blocks.of([jnp.array([3.0, 4.0])], group_of=[1, 0, 1])
    pairs = blocks.per_leaf(blocks.map(lambda x: 10 * x))
    assert [tuple(map(float, pair)) for pair in pairs] == [(4, 40), (3, 30), (4, 40)]
    np.testing.assert_array_equal(blocks.table(lambda x: jnp.stack([x, -x])), [[3, 4], [-3, -4]])


def test_numbers_that_are_their_own_sizes_are_not_copied():
    leaves = [jnp.ones((2, 3))] * 2
    assert Blocks.of(leaves, leaves).members == [[0], [1]]


def test_one_number_stays_where_it_is():
    sizes = [jnp.ones((1, 2)), jnp.ones((1, 1))]
    blocks = Blocks.of(sizes)
    assert blocks.stacks == sizes and blocks.each() == sizes


def test_what_differs_between_devices_is_not_joined_with_what_does_not():
    clip = optaxclip.clip(1.0, scope=scopes.unit(), sharded_over={"own": (), "a": (), "b": ()})
    grads = {"own": jnp.arange(8.0), "a": jnp.array([3.0, 4.0]), "b": jnp.array([5.0])}
    specs = {"own": P("x"), "a": P(), "b": P()}

    def step(grads):
        return clip.update(grads, clip.init(grads))[0]

    mapped = jax.shard_map(step, mesh=MESH, in_specs=(specs,), out_specs=specs)
    # JAX refuses these specs if `a` and `b` are of one vector with `own`
    updates = jax.jit(mapped)(grads)
    np.testing.assert_allclose(updates["own"], np.minimum(grads["own"], 1))
    np.testing.assert_allclose(updates["a"], [0.6, 0.8], rtol=1e-6)


def test_a_vector_of_sizes_leaves_the_names_of_a_reading_in_their_order():
    clip = optaxclip.clip(100.0, scope=scopes.unit(), norm=norms.l1())
    units = jnp.array([[1.0, 0.5], [0.0, 0.5]])
    grads = {"a": jnp.array([1.0]), "b": 2 * units, "c": jnp.array([3.0]), "d": 4 * units}
    reading = clip.update(grads, clip.init(grads))[1].reading
    sizes = dict(zip(telemetry.group_names(reading), reading.size_before.tolist(), strict=True))
    assert sizes == {"a": 1, "b": 2, "c": 3, "d": 4}
