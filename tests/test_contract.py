"""The contract: what every public transform promises, over the table in `transforms.py`."""

import functools
import inspect
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import DEFAULTS, optimized
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from jax.experimental import checkify
from transforms import CASES, KEEPERS, SCALERS, Case, expected, gather, group_size, l2, unlimited

import optaxclip
from optaxclip._lowering import LARGE

SHAPES = {"bias": (3,), "conv": (1, 2, 2, 3), "dense": (4, 3), "scale": ()}
# How far above its limit a clipped size may be: rounding of the result to its dtype, and float32
# arithmetic.
EXCESS = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 8e-3}
DTYPES = [jnp.float32, jnp.float16, jnp.bfloat16]


def each_of(cases):
    return pytest.mark.parametrize(
        "case", cases, ids=[f"{case.name}-{i}" for i, case in enumerate(cases)]
    )


each_case, each_transform = each_of(CASES), each_of(CASES + SCALERS)
each_with_a_schedule = each_of([case for case in CASES if case.schedule])
each_without_memory = each_of([case for case in CASES if not case.remembers])


def normal_tree(seed=0, scale=1.0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {
        name: (scale * jax.random.normal(key, SHAPES[name])).astype(dtype)
        for name, key in zip(SHAPES, keys, strict=True)
    }


PARAMS = normal_tree(seed=100)
TWO = ("bias", "dense")  # enough where the shape of a leaf does not matter


def update(transform, updates, params=None, steps=1):
    params = updates if params is None else params
    state = transform.init(params)
    for _ in range(steps):
        out, state = transform.update(updates, state, params)
    return out, state


@functools.cache
def program(case, scale=1.0, **options):
    """One step from the start, compiled once for each kind of tree."""
    transform = case.make(scale, **options)
    return jax.jit(lambda updates, params: update(transform, updates, params))


def leaves64(tree):
    return [
        np.asarray(leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf)
        for leaf in jax.tree.leaves(tree)
    ]


def clip_states(state):
    return [
        s
        for s in jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, optaxclip.ClipState))
        if hasattr(s, "reading")
    ]


def test_the_table_has_every_public_transform():
    def is_transform(value):
        return isinstance(value, types.FunctionType) and "GradientTransformation" in str(
            inspect.signature(value).return_annotation
        )

    public = {
        name
        for name, value in vars(optaxclip).items()
        if is_transform(value) and not name.startswith("_")
    }
    # no clips: test_guard.py; by the logits of the model: test_qk_clip.py
    assert public == {case.name for case in CASES + SCALERS + KEEPERS} | {
        "skip_nonfinite",
        "skip_spikes",
        "qk_clip",
    }
    assert len(public) >= 19


# 1, 12. True norm: equal to float64 arithmetic, whatever the dtype and however large or small the
# numbers.


@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_equals_float64_arithmetic(case: Case, dtype, scale):
    updates = normal_tree(1, scale, dtype)
    out, _ = program(case)(updates, PARAMS)
    for x, y in zip(
        leaves64(out), expected(case, leaves64(updates), leaves64(PARAMS)), strict=True
    ):
        np.testing.assert_allclose(
            x,
            y,
            rtol=max(EXCESS[jnp.dtype(dtype).name], 1e-5),
            atol=6e-8 if dtype == jnp.float16 else 1e-30,
        )


HARD = {
    "fp16-squares-overflow": [np.array([300, 1], np.float16)],
    "fp16-many": [np.full(1000, 300, np.float16)],
    "fp16-two-leaves": [np.array([60000], np.float16), np.array([60000], np.float16)],
    "fp16-squares-underflow": [np.full(10000, 1e-4, np.float16)],
    "f32-squares-overflow": [np.array([1e20, 1e20], np.float32), np.array([1.0], np.float32)],
    "f32-largest": [np.array([5e37, -5e37, 1.5e38], np.float32)],
    "f32-squares-underflow": [np.array([1e-25, -1e-25], np.float32)],
    "bf16-many-leaves": [np.ones((2,), jnp.bfloat16)] * 40,
    "bf16-one-large-leaf": [np.full(20_000, 1e-2, jnp.bfloat16)],
    "mixed-f32-fp16": [np.array([1e6], np.float32), np.array([100], np.float16)],
    "mixed-all": [
        np.array([1e30], np.float32),
        np.array([3e4], np.float16),
        np.array([1e25], jnp.bfloat16),
    ],
}


@each_case
@pytest.mark.parametrize("name", HARD)
def test_true_norm_of_hard_numbers(case: Case, name):
    updates = [jnp.asarray(x) for x in HARD[name]]
    params = [jnp.abs(x.astype(jnp.float32)) for x in updates]
    first = next(case.groups(leaves64(updates)))
    run = jax.jit(lambda u, s: update(case.make(s), u, params)[0])
    for ratio in (1e-3, 0.9, 1.1):
        size = group_size(case, first, leaves64(updates), leaves64(params))
        scale = np.float32(
            1.0
            if case.limit is unlimited
            else ratio * size / case.limit(gather(first, leaves64(params)))
        )
        out = run(updates, scale)
        want = expected(case, leaves64(updates), leaves64(params), float(scale))
        for got, x, y in zip(jax.tree.leaves(out), leaves64(out), want, strict=True):
            tolerance = max(EXCESS[got.dtype.name], 1e-5)
            np.testing.assert_allclose(
                x, y, rtol=tolerance, atol=6e-8 if got.dtype == jnp.float16 else 0
            )


# The same on both sides of every size at which the code takes another way.


def even_and_odd(leaves):
    yield from (
        [(i, ...) for i in range(first, len(leaves), 2)] for first in range(min(2, len(leaves)))
    )


BY_PARITY = Case(
    "clip",
    lambda s, **o: optaxclip.clip(s, optaxclip.scopes.group(lambda path: str(int(path) % 2)), **o),
    even_and_odd,
)
BY_SIZE = {"clip_by_global_norm", "clip_by_norm", "adaptive_grad_clip"}
WITHIN, OVER = (128, 128), (113, 145)  # shapes of LARGE and of LARGE + 1 numbers
SMALL = [(3,), (2, 3), (), (1, 2, 2, 3), (1,)]
TREES = {
    "within": [WITHIN],
    "over": [OVER],
    "within, a vector": [(LARGE,)],
    "over, a vector": [(LARGE + 1,)],
    "both": [WITHIN, OVER],
    "equal within": [WITHIN, WITHIN, WITHIN],
    "equal over": [OVER, OVER, OVER],
    "within and small": [*SMALL, WITHIN, *SMALL],
    "over and small": [*SMALL, OVER, *SMALL],
    "one small": SMALL[:1],
    "two small": SMALL[:2],
    "few small": SMALL,
    "many small": [
        SMALL[k % 5] if k % 10 else (2 + k,) for k in range(130)
    ],  # some equal, some not
    "many equal": [(2, 3)] * 130,
}


def tree_of(name, dtype, scale):
    """Leaves whose numbers are of the scale, a tenth and a hundredth of it, in turns."""
    random = np.random.default_rng(0)
    leaves = [
        scale * 10.0 ** -(k % 3) * random.normal(size=shape) for k, shape in enumerate(TREES[name])
    ]
    return [jnp.asarray(leaf, dtype) for leaf in leaves]


def trees_by_size():
    """Trees by name, dtype and scale."""
    kinds = [(name, "float32", 1.0) for name in TREES]
    for name in ("both", "over", "over and small"):
        kinds += [(name, "float32", 1e25), (name, "float32", 1e-15), (name, "bfloat16", 1.0)]
    trees = {kind: tree_of(*kind) for kind in kinds}
    for name in (
        "within and small",
        "over and small",
    ):  # beside the widest float that there is, and a Python number
        trees[name, "mixed", 1.0] = [*trees[name, "float32", 1.0], jnp.full(3, 0.3), 0.5]
    return trees


@each_of([case for case in CASES if case.name in BY_SIZE and case.norm is l2] + [BY_PARITY])
def test_on_both_sides_of_every_size_it_equals_float64_arithmetic(case: Case):
    trees = trees_by_size()
    params = jax.tree.map(lambda x: jnp.roll(x, 1), trees)
    relative = case.name == "adaptive_grad_clip"  # to the parameters, which have the same scale
    limits = {kind: np.float32(1.0 if relative else kind[-1]) for kind in trees}

    @jax.jit
    def run(trees, params, limits):
        clips = {kind: case.make(limit) for kind, limit in limits.items()}
        return {
            kind: clip.update(trees[kind], clip.init(params[kind]), params[kind])
            for kind, clip in clips.items()
        }

    for kind, (out, state) in run(trees, params, limits).items():
        assert described(state, weak=False) == described(
            jax.eval_shape(case.make(1.0).init, params[kind]), weak=False
        )
        before, after, weights = (
            leaves64(jax.tree.map(jnp.asarray, tree)) for tree in (trees[kind], out, params[kind])
        )
        for x, y, want in zip(
            before, after, expected(case, before, weights, limits[kind]), strict=True
        ):
            assert x.dtype == y.dtype
            tolerance = EXCESS["bfloat16"] if kind[1] == "bfloat16" else 2e-6
            np.testing.assert_allclose(y, want, rtol=tolerance, err_msg=str(kind))


# 2. Post-condition: within the limit, never larger than before, never another sign.


@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31 - 1), exponent=st.floats(-3, 3))
def test_within_the_limit_never_larger_never_another_sign(case: Case, dtype, seed, exponent):
    updates = normal_tree(seed, 10.0**exponent, dtype)
    out, _ = program(case)(updates, PARAMS)
    before, after, params = leaves64(updates), leaves64(out), leaves64(PARAMS)
    for x, y in zip(before, after, strict=True):
        assert (np.abs(y) <= np.abs(x)).all()
        assert (np.sign(y) * np.sign(x) >= 0).all()
    excess = 1 + EXCESS[jnp.dtype(dtype).name]
    if case.bounds is not None:
        assert all(
            (case.bounds[0] * excess <= y).all() and (y <= case.bounds[1] * excess).all()
            for y in after
        )
    else:
        for group in case.groups(after):
            assert (
                group_size(case, group, after, params)
                <= case.limit(gather(group, params)) * excess + 1e-12
            )


# 14. Any float that JAX can hold here. What is rounded to few bits is within half a spacing.


@functools.cache
def floats():
    names = [name for name in dir(jnp) if name.startswith(("float", "bfloat"))]
    kinds = {
        jnp.dtype(getattr(jnp, name))
        for name in names
        if isinstance(getattr(jnp, name), type(jnp.float32))
    }
    return sorted(filter(is_held, kinds), key=str)


def is_held(dtype):
    try:
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            return False
        doubled = jax.jit(lambda x: (2 * x.astype(jnp.float32)).astype(dtype))
        optimized(doubled.lower(jax.ShapeDtypeStruct((2,), dtype)))  # else XLA may end the process
        return True
    except jax.errors.JaxRuntimeError:  # floats of 6 bits, on a CPU
        return False


def rounded(tree, dtype):
    """The tree in a dtype; only magnitudes where it has no sign, as that of powers of two."""
    signed = jnp.finfo(dtype).min < 0
    return jax.tree.map(lambda x: (x if signed else jnp.abs(x)).astype(dtype), tree)


def test_all_floats_are_in_the_table():
    names = {str(dtype) for dtype in floats()}
    assert {
        "float8_e4m3fn",
        "float8_e5m2",
        "float4_e2m1fn",
        "float16",
        "bfloat16",
        "float32",
    } <= names and len(names) >= 12


@functools.cache
def trees_of_floats():
    tree = {name: x for name, x in normal_tree(1, 2.0).items() if name in TWO}
    return {str(dtype): rounded(tree, dtype) for dtype in floats()}


@each_case
def test_any_float_is_clipped_in_its_own_dtype(case: Case):
    transform, trees = case.make(1.0), trees_of_floats()
    params = {name: PARAMS[name] for name in TWO}

    def run(trees):
        return {
            name: transform.update(tree, transform.init(tree), params)
            for name, tree in trees.items()
        }

    # compiled fast, the zeros of floats without a negative zero become NaN
    odd = {name: tree for name, tree in trees.items() if "fnuz" in name}
    rest = {name: tree for name, tree in trees.items() if name not in odd}
    found = jax.jit(run)(rest) | jax.jit(run, compiler_options=DEFAULTS)(odd)
    assert found.keys() == trees.keys() and odd
    for name, (out, state) in found.items():
        info, updates = jnp.finfo(name), trees[name]
        assert {x.dtype for x in jax.tree.leaves(out)} == {jnp.dtype(name)}
        # between 1 and 2; below the least it is coarser
        spacing, least = (
            2.0**-info.nmant,
            float(info.smallest_normal),
        )
        before, after = (
            [np.asarray(x.astype(jnp.float32), float) for x in jax.tree.leaves(tree)]
            for tree in (updates, out)
        )
        for x, y, want in zip(before, after, expected(case, before, leaves64(params)), strict=True):
            assert (np.abs(y) <= np.abs(x)).all() and (np.sign(y) * np.sign(x) >= 0).all(), name
            np.testing.assert_allclose(
                y, want, rtol=max(0.51 * spacing, 2e-6), atol=0.51 * spacing * least, err_msg=name
            )
        jax.tree.map(
            lambda x, y: np.testing.assert_(x.dtype == y.dtype),
            state,
            jax.eval_shape(transform.init, updates),
        )


@pytest.mark.parametrize(
    "dtype",
    [jnp.int4, jnp.int8, jnp.uint4, jnp.float8_e4m3fn, jnp.float4_e2m1fn],
    ids=lambda d: d.__name__,
)
def test_quantized_weights_are_measured(dtype):
    params = {"kernel": jnp.full((3, 2), 2, dtype), "bias": jnp.ones(2), "step": jnp.int32(7)}
    grads = {"kernel": jnp.full((3, 2), 9.0), "bias": jnp.full(2, 9.0), "step": jnp.int32(0)}
    clip = optaxclip.adaptive_grad_clip(0.1)
    updates, state = jax.jit(clip.update)(grads, clip.init(params), params)
    np.testing.assert_allclose(updates["kernel"], np.full((3, 2), 0.2), rtol=1e-6)
    np.testing.assert_allclose(updates["bias"], np.full(2, 0.1), rtol=1e-6)
    assert described(state) == described(clip.init(params))


# 3. Exact no-op: within the limit, the same bits.


@each_case
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    leaf=npst.arrays(np.float32, (4, 3), elements=st.floats(-1, 1, width=32, allow_subnormal=True))
)
def test_within_the_limit_the_same_bits(case: Case, leaf):
    updates = {
        "dense": jnp.asarray(leaf),
        "half": jnp.asarray(leaf, jnp.bfloat16),
        "fp16": jnp.asarray(leaf, jnp.float16),
    }
    out, state = program(case, 1e6)(updates, jax.tree.map(jnp.ones_like, updates))
    for x, y in zip(jax.tree.leaves(updates), jax.tree.leaves(out), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    assert all(s.reading.clipped_steps == 0 for s in clip_states(state))


@each_case
def test_exactly_at_the_limit_the_same_bits(case: Case):
    updates, params = [jnp.array([3.0, 4.0])], [jnp.array([6.0, 8.0])]
    group = next(case.groups(leaves64(updates)))
    scale = group_size(case, group, leaves64(updates), leaves64(params)) / case.limit(
        gather(group, leaves64(params))
    )
    scale = (
        float(np.nextafter(np.float32(scale), np.float32(np.inf)))
        if case.norm.__name__ == "<lambda>"
        else scale
    )
    out, _ = update(
        case.make(scale if case.groups.__name__ != "each_element" else 4.0), updates, params
    )
    np.testing.assert_array_equal(out[0], [3.0, 4.0])


# 4. Same tree: structure, shapes and dtypes of updates; of the state from init on, weak types as
# well; one trace.


def is_weak(x):
    return (x if hasattr(x, "weak_type") else jnp.asarray(x)).weak_type


def described(tree, *, weak=True):
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(jnp.shape(x), jnp.result_type(x), weak and is_weak(x)) for x in leaves]


LIMITS = (1.0, jnp.float32(1.0), np.float64(1.0), jnp.bfloat16(1.0))


@each_transform
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_updates_and_state_keep_structure_shapes_and_dtypes(case: Case, dtype):
    updates = {"array": normal_tree(2, 10.0, dtype), "number": 3.0}
    for limit in LIMITS:
        transform = case.make(limit)
        init, step = transform.init, transform.update
        if (
            limit is not LIMITS[0]
        ):  # abstract, which is ten times as fast, and has types all the same
            init, step = (
                functools.partial(jax.eval_shape, init),
                functools.partial(jax.eval_shape, step),
            )
        state = init(updates)
        out, new_state = step(updates, state, updates)
        assert described(out, weak=False) == described(updates, weak=False)
        assert described(new_state) == described(state)


@each_with_a_schedule
def test_schedules_clip_bf16_gradients(case: Case):
    if case.bounds is not None or case.name == "adaptive_grad_clip":
        transform = {
            "clip_by_value": lambda c: optaxclip.clip_by_value(lambda step: -2 * c(step), c),
            "adaptive_grad_clip": lambda c: optaxclip.adaptive_grad_clip(
                lambda step: 0.1 * c(step)
            ),
        }[case.name](optax.linear_schedule(1.0, 0.5, 1))
    else:
        transform = case.make(optax.linear_schedule(1.0, 0.5, 1))
    updates = normal_tree(3, 10.0, jnp.bfloat16)
    out, _ = update(transform, updates, PARAMS, steps=2)
    want = expected(case, leaves64(updates), leaves64(PARAMS), 0.5)
    for x, y in zip(jax.tree.leaves(out), want, strict=True):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=8e-3)


@each_transform
def test_one_trace_in_a_donated_scan(case: Case):
    transform, traces = optax.chain(case.make(1.0), optax.adam(1e-3)), []

    def step(carry, seed):
        traces.append(seed)
        params, state = carry
        updates, state = transform.update(jax.tree.map(lambda p: p * seed, params), state, params)
        return (optax.apply_updates(params, updates), state), state[0]

    run = jax.jit(lambda carry, seeds: jax.lax.scan(step, carry, seeds), donate_argnums=0)
    params = normal_tree(4)
    carry = (params, transform.init(params))
    for _ in range(2):
        carry, _ = run(carry, jnp.arange(5.0, dtype=jnp.float32))
    assert len(traces) == 1
    assert all(s.step == 10 for s in clip_states(carry[1]))
    chex.assert_tree_all_finite(carry[0])


@each_transform
def test_many_limits_in_one_compilation(case: Case):
    updates = normal_tree(5, 10.0)
    limits = jnp.array([0.1, 1.0, 10.0])
    outs = jax.jit(jax.vmap(lambda limit: update(case.make(limit), updates, PARAMS)[0]))(limits)
    for i, limit in enumerate(limits):
        one, _ = update(case.make(float(limit)), updates, PARAMS)
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], outs), one, rtol=1e-6)


def test_one_step_outside_of_a_loop_needs_no_state():
    updates = normal_tree(7, 10.0)
    for clip in (
        optaxclip.clip(1.0, optaxclip.scopes.tree()),
        optaxclip.clip_by_value(1.0),
        optaxclip.adaptive_grad_clip(0.1),
    ):
        out, state = clip.update(updates, None, PARAMS)
        chex.assert_trees_all_equal(out, update(clip, updates, PARAMS)[0])
        assert state.step == 1


def test_clip_itself_takes_injected_limits():
    clip = optax.inject_hyperparams(optaxclip.clip, static_args="response")(
        threshold=1.0, scope=optaxclip.scopes.tree()
    )
    np.testing.assert_allclose(update(clip, jnp.array([3.0, 4.0]))[0], [0.6, 0.8], rtol=1e-6)


# 5. Odd leaves.


@each_transform
def test_odd_leaves_pass_or_are_clipped_and_count_nothing(case: Case):
    plain = {"a": jnp.array([30.0, 40.0]), "b": jnp.array(0.3)}
    odd = {
        "none": None,
        "masked": optax.MaskedNode(),
        "empty": jnp.zeros((0, 3)),
        "tree": {},
        "int": jnp.arange(3),
        "bool": jnp.array([True, False]),
        "float0": np.zeros((2,), jax.dtypes.float0),
        "key": jax.random.key(0),
    }
    want, _ = update(case.make(1.0), plain)
    out, state = update(case.make(1.0), {**plain, **odd})
    chex.assert_trees_all_equal({name: out[name] for name in plain}, want)
    for name, leaf in odd.items():
        assert jax.tree.structure(out[name]) == jax.tree.structure(leaf)
        assert (
            all(
                x is y
                for x, y in zip(jax.tree.leaves(out[name]), jax.tree.leaves(leaf), strict=True)
            )
            or name == "empty"
        )
    assert out["empty"].shape == (0, 3)
    assert not any(np.isnan(s.reading.measured).any() for s in clip_states(state))


@each_transform
@pytest.mark.parametrize("updates", [{}, None, [], {"none": None}, {"int": jnp.arange(2)}], ids=str)
def test_trees_without_a_float_come_back(case: Case, updates):
    transform = case.make(1.0)
    out, state = transform.update(updates, transform.init(updates), updates)
    chex.assert_trees_all_equal(out, updates)
    assert all(s.step == 1 for s in clip_states(state))


@each_case
def test_complex_numbers_are_clipped_by_magnitude(case: Case):
    updates = {"z": jnp.array([3 + 4j, 6 - 8j], jnp.complex64), "x": jnp.array([0.1], jnp.float32)}
    if case.bounds is not None:
        with pytest.raises(TypeError, match="complex64"):
            update(case.make(1.0), updates)
        return
    out, _ = update(case.make(1.0), updates)
    assert out["z"].dtype == jnp.complex64
    for x, y in zip(
        leaves64(out), expected(case, leaves64(updates), leaves64(updates)), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-5)


@each_transform
def test_a_missing_gradient_of_a_present_parameter_is_left_out(case: Case):
    params = {"a": jnp.array([1.0]), "b": jnp.array([2.0, 2.0])}
    transform = case.make(1.0)
    out, state = transform.update(
        {"a": jnp.array([5.0]), "b": None}, transform.init(params), params
    )
    assert out["b"] is None and (out["a"] == 5 if case.limit is unlimited else 0 < out["a"] < 5)
    assert described(state) == described(transform.init(params))


def test_a_missing_gradient_that_cannot_be_placed_is_an_error():
    transform = optaxclip.clip_by_norm(1.0)
    state = transform.init({"a": jnp.ones(1), "b": jnp.ones(2)})
    with pytest.raises(
        ValueError,
        match="updates has 1 groups, but state was made for 2, got .* only in state; .* params",
    ):
        transform.update({"a": jnp.ones(1), "b": None}, state)


# 6. Non-finite updates.


def poisoned(bad):
    return {"a": jnp.array([[3.0, bad], [0.0, 1.0]]), "b": jnp.array([2.0, 4.0])}


def hit_groups(case: Case, updates):
    """A mask per leaf of the numbers whose group has a bad one."""
    leaves = leaves64(updates)
    masks = [np.zeros(leaf.shape, bool) for leaf in leaves]
    for group in case.groups(leaves):
        if not np.isfinite(gather(group, leaves)).all():
            for i, index in group:
                masks[i][index] = True
    return masks


@each_transform
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_nonfinite_groups_propagate_or_become_zero(case: Case, bad, jit):
    updates = poisoned(bad)
    params = jax.tree.map(jnp.ones_like, updates)
    for policy, check in {"propagate": np.isnan, "zero": lambda x: x == 0}.items():
        out, state = (
            program(case, nonfinite=policy)(updates, params)
            if jit
            else update(case.make(1.0, nonfinite=policy), updates, params)
        )
        for leaf, mask in zip(leaves64(out), hit_groups(case, updates), strict=True):
            assert check(leaf[mask]).all() and mask.any() == (leaf.ndim == 2 or mask.all())
            assert np.isfinite(leaf[~mask]).all()
        assert sum(int(s.reading.nonfinite_steps) for s in clip_states(state)) >= 1
        assert not any(
            np.isnan(x).any() for s in clip_states(state) for x in jax.tree.leaves(s.threshold)
        )


@each_transform
def test_nonfinite_raises_through_checkify_and_names_the_group(case: Case):
    run = checkify.checkify(
        jax.jit(
            lambda u: update(case.make(1.0, nonfinite="raise"), u, jax.tree.map(jnp.ones_like, u))
        )
    )
    error, _ = run(poisoned(np.nan))
    name = "tree" if case.groups.__name__ == "whole_tree" else "a"
    with pytest.raises(checkify.JaxRuntimeError, match=f"size of '{name}' is not finite"):
        error.throw()
    error, _ = run(poisoned(1.0))
    error.throw()


@each_without_memory
def test_after_nan_and_inf_it_clips_as_before(case: Case):
    transform, params = case.make(1.0), jax.tree.map(jnp.ones_like, poisoned(1.0))
    state = transform.init(params)
    for bad in (np.nan, np.inf, 1e30, 0.0):
        _, state = transform.update(poisoned(bad), state, params)
    out, _ = transform.update(poisoned(5.0), state, params)
    chex.assert_trees_all_equal(out, update(transform, poisoned(5.0), params)[0])


@each_transform
def test_zero_gradients_stay_zero_even_at_limit_zero(case: Case):
    updates = jax.tree.map(jnp.zeros_like, PARAMS)
    for scale in (0.0, 1.0):
        chex.assert_trees_all_equal(update(case.make(scale), updates, PARAMS)[0], updates)


# 7. Traced limits that go wrong never turn descent into ascent.


@functools.cache
def of_a_traced_limit(case):
    updates = normal_tree(6, 10.0)
    return jax.jit(lambda limit: update(case.make(limit), updates, PARAMS))


@each_of([case for case in CASES if case.limit is not unlimited])
@pytest.mark.parametrize("limit", [-1.0, np.nan])
def test_a_traced_limit_that_is_negative_or_nan_gives_zero(case: Case, limit):
    if case.bounds is not None:
        return test_bounds_that_swap_sign_give_zero(limit)
    out, state = of_a_traced_limit(case)(limit)
    chex.assert_trees_all_close(
        out, jax.tree.map(jnp.zeros_like, out), rtol=0, atol=1e-36 if case.name == "clippy" else 0
    )
    assert case.name == "clippy" or all((s.reading.limit == 0).all() for s in clip_states(state))


def test_bounds_that_swap_sign_give_zero(limit=-1.0):
    updates = jnp.array([-5.0, 5.0])
    out, _ = jax.jit(lambda c: update(optaxclip.clip_by_value(-c, c), updates))(limit)
    np.testing.assert_array_equal(out, [0.0, 0.0])


# 8. Derivatives.


@each_of(
    [case for case in CASES + SCALERS if case.name != "scale_by_stable_adam"]
)  # as in Adam, see test_stable_adam.py
def test_meta_gradients_are_finite(case: Case):
    def outcome(updates, limit):
        out, _ = update(case.make(limit), updates, jax.tree.map(jnp.ones_like, updates))
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(out))

    derivative = jax.jit(jax.grad(outcome, argnums=(0, 1)))
    for value in (0.0, 1e-30, 1e-25, 1e-3, 1.0, 1e10, 1e25, 1e37):
        updates = {"a": jnp.array([[value, 0.0], [-value, value]]), "b": jnp.full((3,), value)}
        for limit in (0.0, 0.5, 1e30):
            chex.assert_tree_all_finite(derivative(updates, limit))


# A step that is not finite and is made zero has no derivative, and makes none NaN.


@pytest.mark.parametrize(
    "case",
    [case for case in CASES + SCALERS if case.name != "scale_by_stable_adam"],
    ids=lambda case: case.name,
)
def test_a_step_made_zero_leaves_the_derivative_of_all_others(case: Case):
    transform = case.make(1.0, nonfinite="zero")
    params = {name: PARAMS[name] for name in TWO}
    good = {name: x for name, x in normal_tree(3, 10.0).items() if name in TWO}
    bad = jax.tree.map(lambda x: np.full_like(x, np.nan), good)
    for x in bad.values():
        x[(0,) * x.ndim] = np.inf

    def total(scale, steps):
        def step(state, updates):
            own = jax.tree.map(
                lambda x: jnp.where(jnp.isfinite(x), scale * jnp.nan_to_num(x), x).astype(x.dtype),
                updates,
            )
            clipped, state = transform.update(own, state, params)
            return state, sum(jnp.sum(jnp.real(x) ** 2) for x in jax.tree.leaves(clipped))

        return jax.lax.scan(step, transform.init(params), steps)[1].sum()

    def slope(*steps):
        return jax.jit(jax.grad(total))(1.5, jax.tree.map(lambda *x: np.stack(x), *steps))

    found = slope(good, bad, good)
    assert jnp.isfinite(found)
    if case.name != "spam_clip":  # its warm-up counts all steps
        np.testing.assert_allclose(found, slope(good, good), rtol=1e-4, atol=1e-6)
