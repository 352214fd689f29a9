"""Single numbers go through the engine as one vector, equal blocks as a stack, and come out as if
each had gone alone.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import plain_lowering
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optaxclip
from optaxclip import _lowering, norms, responses, scopes, telemetry, thresholds
from optaxclip._lowering import LARGE, Blocks, unstacked
from optaxclip._measure import plan_of, sizes

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
    def step(state, scale):
        scaled = jax.tree.map(lambda x: (scale * x).astype(x.dtype), grads)
        updates, state = clip.update(scaled, state, params)
        return state, updates

    state, updates = jax.lax.scan(step, clip.init(params), jnp.array([1.0, 2.0, 0.5]))
    return jax.tree.map(lambda x: x[-1], updates), state


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

    @jax.jit
    def together_and_alone():
        alone = [run(clip_of([n]), {n: GRADS[n]}, {n: PARAMS[n]}) for n in sorted(GRADS)]
        return run(clip_of(GRADS), GRADS, PARAMS), alone

    (updates, state), each = together_and_alone()
    for k, (name, (alone, alone_state)) in enumerate(zip(sorted(GRADS), each, strict=True)):
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


# Each name of `_lowering.py` equals its plain line, and the library is right with these alone.


HERE = Path(__file__).parent
LEFT_OUT = [  # they look at programs
    "test_norms.py::test_only_large_leaves_are_measured_in_two_ways",  # counts branches
    "test_norms.py::test_equal_leaves_are_traced_once_and_so_are_equal_steps",  # counts traces
]
# All of the norms and methods; of the contract, what takes under a minute.
OF_NUMBERS = "test_norms or test_methods or odd_leaves or trees_without or on_both_sides"


def test_numbers_are_right_with_the_plain_lines_alone():
    files = [str(HERE / f"test_{name}.py") for name in ("norms", "methods", "contract")]
    left_out = [f"--deselect={HERE.name}/{name}" for name in LEFT_OUT]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "plain", "-p", "no:cacheprovider", "-x"]
        + ["-k", OF_NUMBERS, *left_out, *files],
        cwd=HERE.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 400, done.stdout[-500:]


def test_every_name_that_others_import_has_a_plain_line():
    public = {name for name, value in vars(_lowering).items() if of_module(name, value)}
    assert {name for name, value in vars(plain_lowering).items() if of_module(name, value)} == (
        public - {"group_by_type", "inverse_permutation"}
    )
    assert plain_lowering.LARGE == LARGE


def of_module(name, value):
    home = getattr(value, "__module__", "")
    return not name.startswith("_") and home in (_lowering.__name__, plain_lowering.__name__)


RANDOM = np.random.default_rng(0).normal(size=(3, LARGE + 2)).astype(np.float32)
FEW, MANY = RANDOM[:, :4], RANDOM
LEAVES = {
    "small": [FEW, FEW + 1, FEW[0]],
    "large": [MANY, FEW, MANY - 1],
    "large, overflow": [1e25 * MANY, FEW, FEW],
    "large, underflow": [1e-25 * MANY, FEW, FEW],
    "large, zero": [0 * MANY, FEW, FEW],
    "small, out of range": [1e25 * FEW, 1e-25 * FEW, 0 * FEW],
    "large bfloat16": [jnp.asarray(MANY, jnp.bfloat16), FEW, jnp.asarray(FEW, jnp.bfloat16)],
    "large float16": [jnp.asarray(MANY, jnp.float16), FEW, FEW],
    "large complex": [MANY + 2j * MANY, FEW, FEW],
    "infinite": [MANY, np.float32([1, np.inf]), FEW],
    "nan": [MANY, np.float32([1, np.nan]), FEW],
}
PLANS = {
    "groups": lambda leaves: plan_of(leaves, None, [[0, 1], [2]], None),
    "leaves": lambda leaves: plan_of(leaves, None, None, None),
    "rows": lambda leaves: plan_of(leaves, [(np.ndim(x) - 1,) for x in leaves], None, None),
}


@pytest.mark.parametrize("norm", [norms.l2(), norms.rms(), norms.l1()], ids=["l2", "rms", "l1"])
@pytest.mark.parametrize("plan", PLANS)
def test_quickest_is_the_sizes(plan, norm):
    """To the rounding of float32: the sums of a CPU, and those of a GPU, which are in float64."""
    plans = {name: PLANS[plan](leaves) for name, leaves in LEAVES.items()}

    @jax.jit
    def measured(cases):
        ways = {name: [] for name in cases}
        for name, leaves in cases.items():
            leaves = list(map(jnp.asarray, leaves))
            ways[name].append(plain_lowering.quickest(sizes, norm, plans[name], leaves))
            ways[name].append(_lowering.quickest(sizes, norm, plans[name], leaves))
            if norm.fast is not None:
                for fused in False, True:
                    in_float64 = _lowering._in_float64(sizes, norm.fast, plans[name], leaves, fused)
                    ways[name].append(in_float64)
        return ways

    for name, (plain, *others) in measured(LEAVES).items():
        for other in others:
            for x, y in zip(plain, other, strict=True):
                assert x.shape == y.shape and x.dtype == y.dtype == jnp.float32
                np.testing.assert_allclose(y, x, rtol=2e-6, err_msg=name)


def test_leaves_of_float64_and_norms_without_a_fast_way_have_one_way():
    def program(norm, leaf):
        return str(jax.make_jaxpr(lambda x: _lowering.quickest(sizes, norm, plan, [x]))(leaf))

    plan = plan_of([MANY], None, None, None)
    assert "platform_index" in program(norms.l2(), MANY)
    assert "platform_index" not in program(norms.l1(), MANY)
    with jax.enable_x64(True):
        assert "platform_index" not in program(norms.l2(), np.float64(MANY))


@pytest.mark.parametrize("height", [1, 2, 3])
@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3)])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_columns_are_slices(height, count, shape):
    stack = jnp.asarray(np.random.default_rng(0).normal(size=(height, count, *shape)), jnp.float32)
    assert_same(_lowering.columns(stack), plain_lowering.columns(stack))
    slopes = [
        jax.grad(lambda x, f=f: sum((k + 1) * (c**2).sum() for k, c in enumerate(f(x))))(stack)
        for f in (_lowering.columns, plain_lowering.columns)
    ]
    np.testing.assert_array_equal(*slopes)


@pytest.mark.parametrize("way", [lambda f: f, jax.jit, jax.vmap], ids=["eager", "jit", "vmap"])
def test_a_shared_vector_is_the_vector(way):
    vector = jnp.array([[-0.0, jnp.inf, 3.0], [jnp.nan, 1e-38, 1.0]])
    np.testing.assert_array_equal(way(_lowering.shared_vector)(vector), vector)


def test_for_each_is_a_map_over_rows():
    shapes = [(), (1,), (2, 3), (1,), (1, 1), (2, 3)]
    arrays = [jnp.full(shape, k + 2.0) for k, shape in enumerate(shapes)]
    for function, rows in (
        (jnp.sqrt, [(x,) for x in arrays]),
        (lambda x, y: x - y / 2, [(x, x * x) for x in arrays]),
        (lambda x, y, z: jnp.where(x > 4, y, z), [(x, -x, x + 1) for x in arrays]),
    ):
        for way in lambda f: f, jax.jit:
            found = way(lambda rows, f=function: _lowering.for_each(f, rows))(rows)
            assert_same(found, plain_lowering.for_each(function, rows))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (7, 3), (LARGE + 3,)])
def test_a_share_is_a_mean(shape):
    flags = jnp.asarray(np.random.default_rng(0).random(shape) < 0.3)
    for some in flags, ~flags, flags & ~flags, flags | ~flags:
        share = _lowering.share_of(some)
        assert share.shape == () and share.dtype == jnp.float32
        np.testing.assert_allclose(share, plain_lowering.share_of(some), rtol=1e-7)


@pytest.mark.parametrize(
    "numbers",
    [
        np.float32([-3, 2]),
        np.float32([[-0.0], [0.0]]),
        np.float32(-7),
        np.zeros((3, 0), np.float32),
        np.complex64([3 - 4j, -5.5]),
        np.float32([1, -np.inf]),
        np.float32([np.nan, 2]),
        np.complex64([1 + 1j * np.nan, 2]),
        jnp.bfloat16([-1, 0.5]),
        MANY,
    ],
    ids=str,
)
def test_largest_is_the_largest_magnitude(numbers):
    for way in lambda f: f, jax.jit:
        found = way(_lowering.largest)(numbers)
        expected = plain_lowering.largest(numbers)
        assert found.dtype == expected.dtype and not np.signbit(np.float32(found))
        np.testing.assert_array_equal(found, expected)


def test_traced_once_is_the_function():
    def function(power, x):
        return x**power, {"double": 2 * x}

    for inline in False, True:
        traced = _lowering.traced_once(static=0, inline=inline)(function)
        for power in 2, 3:
            x = jnp.arange(3.0)
            jax.tree.map(np.testing.assert_array_equal, traced(power, x), function(power, x))


def test_blocks_are_the_plain_list():
    """Of leaves, and of groups; also of none."""
    leaves = [jnp.full(shape, k + 1.0) for k, shape in enumerate([(3, 2), (4,), (3, 2), (4,)])]
    rows = [leaf[:1] for leaf in leaves]
    kinds = [(rows, leaves, None), ([], [], None)]
    kinds += [([jnp.array([3.0, 4.0])], (), [1, 0, np.array([[0], [1]])])]

    def change(x, y):
        return x + y, x * y

    def column(x, y, z):
        return jnp.stack([jnp.max(x), jnp.max(y), jnp.max(z), jnp.min(x)])

    for sizes_of_blocks, of_leaves, group_of in kinds:
        found = []
        for kind in Blocks, plain_lowering.Blocks:
            blocks = kind.of(sizes_of_blocks, of_leaves, group_of)
            sums, products = blocks.map(change, blocks.map(lambda x: 3 * x), outputs=2)
            twos = blocks.map(lambda x: jnp.array(2.0))
            found.append([blocks.each(), sums.each(), products.each()])
            found[-1].append(blocks.table(column, sums, twos))
            found[-1].append([tuple(map(jnp.asarray, row)) for row in blocks.per_leaf(sums)])
            assert len(found[-1][-1]) == len(group_of or sizes_of_blocks)
        jax.tree.map(np.testing.assert_array_equal, *found)


CLIPS = {
    "linf": optaxclip.clip(1.0, scopes.tree(), norm=norms.linf()),
    "l2": optaxclip.clip(1.0, scopes.tree(), norm=norms.l2()._replace(fast=None)),
    "unit": optaxclip.clip(1.0, scopes.unit(), norm=norms.linf()),
    "value": optaxclip.clip_by_value(1.0),
    "value, exact share": optaxclip.clip_by_value(1.0, record="full"),
}


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_one_number_that_is_not_finite_is_seen_in_a_large_leaf(name, bad):
    """XLA on CPU loses NaN in a maximum or minimum of 4096 numbers or more."""
    leaf = jnp.zeros((8192, 4)).at[77, 1].set(bad)
    clip = CLIPS[name]
    updates, state = jax.jit(lambda leaf: clip.update(leaf, clip.init(leaf)))(leaf)
    count = {"linf": leaf.size, "l2": leaf.size, "unit": 8192}.get(name, 1)
    assert np.isnan(updates).sum() == count
    np.testing.assert_array_equal(state.reading.measured[:2, 0], [bad, jnp.nan])
    assert state.reading.nonfinite_steps == 1


@pytest.mark.parametrize("axes", [None, (0,), (1,), (0, 1), ()])
def test_most_is_a_maximum_and_keeps_nan(axes):
    numbers = np.abs(MANY.reshape(-1, 2))
    for bad in 0, np.inf, np.nan, 3e38:
        numbers[5, 1] = bad
        expected = np.max(numbers, axes, keepdims=axes is not None)
        np.testing.assert_array_equal(
            jax.jit(_lowering.most, static_argnums=1)(numbers, axes), expected
        )
    slope = jax.grad(lambda x: _lowering.most(x, (1,)).sum())(jnp.array([[1.0, 3.0], [2.0, 0.5]]))
    np.testing.assert_array_equal(slope, [[0, 1], [1, 0]])
