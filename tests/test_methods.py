import inspect
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import optaxclip
from optaxclip import norms, responses, scopes
from optaxclip.thresholds import fixed

SHAPES = {"scale": (), "bias": (3,), "dense": (4, 3), "conv": (2, 1, 3, 4), "single": (5, 1)}
OF_P = {1: reference.l1, 2: reference.l2, 3: reference.lp(3), math.inf: reference.linf}


def random_tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        name: np.asarray(scale * rng.normal(size=shape), np.float32)
        for name, shape in SHAPES.items()
    }


def compiled(clip):
    return jax.jit(lambda grads, params=None: clip.update(grads, clip.init(grads), params)[0])


def update(clip, grads, params=None):
    return compiled(clip)(grads, params)


def with_limit(make):
    return jax.jit(lambda grads, params, limit: update(make(limit), grads, params))


def assert_close(updates, expected, rtol=1e-5):
    assert set(updates) == set(expected)
    for name, leaf in updates.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=rtol, err_msg=name)


def row(make, definition):
    """A row of the library with its one limit, and the same in NumPy: `(grads, params, limit) ->
    updates`.
    """
    return make, definition


def global_clip(threshold, scope=None, **options):
    return optaxclip.clip(threshold, scope or scopes.tree(), **options)


global_clip.__signature__ = inspect.signature(optaxclip.clip)


ROWS = {
    "clip": row(global_clip, lambda g, w, c: reference.clip_by_global_norm(g, c)),
    "clip_by_value": row(optaxclip.clip_by_value, lambda g, w, c: reference.clip_by_value(g, c)),
    "clip_by_norm": row(optaxclip.clip_by_norm, lambda g, w, c: reference.clip_by_norm(g, c)),
    "clip_by_global_norm": row(
        optaxclip.clip_by_global_norm, lambda g, w, c: reference.clip_by_global_norm(g, c)
    ),
    "clip_by_block_rms": row(
        optaxclip.clip_by_block_rms, lambda g, w, c: reference.clip_by_block_rms(g, c)
    ),
    "adaptive_grad_clip": row(
        optaxclip.adaptive_grad_clip, lambda g, w, c: reference.adaptive_grad_clip(g, w, c)
    ),
}
each_row = pytest.mark.parametrize("make, definition", ROWS.values(), ids=list(ROWS))
FIRST = {
    "global_clip": "threshold",
    "clip": "threshold",
    "clip_by_value": "limit",
    "clip_by_block_rms": "max_rms",
    "adaptive_grad_clip": "ratio",
}


@each_row
def test_rows_agree_with_their_definition(make, definition):
    apply = with_limit(make)
    for seed in range(3):
        grads, params = random_tree(seed, 10.0**seed), random_tree(100 + seed)
        for limit in 0.01, 0.3, 2.0, 1e6:
            assert_close(apply(grads, params, limit), definition(grads, params, limit))


@each_row
def test_a_number_or_a_schedule_or_a_rule_is_the_same_limit(make, definition):
    grads, params = random_tree(0), random_tree(1)
    expected = definition(grads, params, 0.3)
    for limit in np.float64(0.3), lambda step: 0.3, fixed.constant(0.3):
        assert_close(update(make(limit), grads, params), expected)


@each_row
def test_a_schedule_goes_by_the_step(make, definition):
    grads, params = random_tree(0), random_tree(1)
    clip = make(optax.linear_schedule(0.3, 0.1, 2))
    state, step = clip.init(params), jax.jit(clip.update)
    for limit in 0.3, 0.2, 0.1, 0.1:
        updates, state = step(grads, state, params)
        assert_close(updates, definition(grads, params, limit))


@each_row
def test_a_sweep_over_limits_compiles_once_and_equals_a_loop(make, definition):
    grads, params, traces = random_tree(0), random_tree(1), []

    @jax.jit
    def sweep(limits):
        traces.append(limits)
        return jax.vmap(lambda limit: update(make(limit), grads, params))(limits)

    for limits in np.float32([0.1, 0.5, 3]), np.float32([0.2, 0.4, 1e9]):
        swept = sweep(limits)
        for i, limit in enumerate(limits):
            assert_close(
                {name: leaf[i] for name, leaf in swept.items()},
                definition(grads, params, float(limit)),
            )
            assert_close(
                {name: leaf[i] for name, leaf in swept.items()},
                update(make(limit), grads, params),
                rtol=1e-6,
            )
    assert len(traces) == 1


@each_row
@pytest.mark.parametrize("dtype, rtol", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_limits_can_be_injected_as_numbers_and_schedules(make, definition, dtype, rtol):
    grads, params = (
        jax.tree.map(lambda x: jnp.asarray(x, dtype), random_tree(seed)) for seed in range(2)
    )
    wide = [
        {name: np.asarray(leaf, np.float32) for name, leaf in tree.items()}
        for tree in (grads, params)
    ]
    name = FIRST.get(make.__name__, "max_norm")
    injected = optax.inject_hyperparams(make, static_args="response" if make is global_clip else ())
    scheduled, number = injected(lambda step: 0.5 - 0.25 * step), injected(**{name: 0.5})
    states, steps = (
        [scheduled.init(params), number.init(params)],
        [jax.jit(scheduled.update), jax.jit(number.update)],
    )
    for limit in 0.5, 0.25:
        states[1].hyperparams[name] = jnp.asarray(limit, dtype)
        for i, step in enumerate(steps):
            before = jax.tree.map(lambda x: x.dtype, states[i])
            updates, states[i] = step(grads, states[i], params)
            assert jax.tree.map(lambda x: x.dtype, states[i]) == before
            assert {leaf.dtype for leaf in updates.values()} == {jnp.dtype(dtype)}
            assert float(states[i].hyperparams[name]) == limit
            assert_close(
                {k: np.asarray(leaf, float) for k, leaf in updates.items()},
                definition(*wide, limit),
                rtol,
            )


def test_both_bounds_and_the_floor_can_be_injected():
    grads, params = random_tree(0), {name: 0 * leaf for name, leaf in random_tree(1).items()}
    for arguments in (
        {"limit": -0.5, "high": 0.25},
        {"low": -0.5, "high": 0.25},
        {"low": lambda s: -0.5, "high": lambda s: 0.25},
    ):
        clip = optax.inject_hyperparams(optaxclip.clip_by_value)(**arguments)
        assert_close(update(clip, grads, params), reference.clip_between(grads, -0.5, 0.25))
    clip = optax.inject_hyperparams(optaxclip.adaptive_grad_clip)(0.5, floor=0.1)
    assert_close(update(clip, grads, params), reference.adaptive_grad_clip(grads, params, 0.5, 0.1))


# Each row's own arguments


@pytest.mark.parametrize("p", OF_P)
def test_norm_chooses_the_norm(p):
    leaf, tree, agc = (
        compiled(make(0.1, norm=norms.lp(p)))
        for make in (
            optaxclip.clip_by_norm,
            optaxclip.clip_by_global_norm,
            optaxclip.adaptive_grad_clip,
        )
    )
    for seed in range(3):
        grads, params = random_tree(seed), random_tree(100 + seed)
        assert_close(leaf(grads), reference.clip_by_norm(grads, 0.1, OF_P[p]))
        assert_close(tree(grads), reference.clip_by_global_norm(grads, 0.1, OF_P[p]))
        assert_close(
            agc(grads, params), reference.adaptive_grad_clip(grads, params, 0.1, norm=OF_P[p])
        )


def test_scope_chooses_the_scope():
    grads, params = random_tree(0), random_tree(1)
    expected = reference.clip(grads, reference.unit, reference.l2, lambda places: 0.5)
    for make in optaxclip.clip_by_norm, optaxclip.clip_by_global_norm, global_clip:
        assert_close(update(make(0.5, scope=scopes.unit()), grads), expected)
    expected = reference.clip(grads, reference.tree, reference.rms, lambda places: 0.5)
    assert_close(update(optaxclip.clip_by_block_rms(0.5, scope=scopes.tree()), grads), expected)
    expected = reference.clip(grads, reference.unit, reference.rms, lambda places: 0.5)
    assert_close(update(optaxclip.clip_by_block_rms(0.5, scope=scopes.unit()), grads), expected)
    expected = reference.adaptive_grad_clip(grads, params, 0.3, groups=reference.leaf)
    assert_close(
        update(optaxclip.adaptive_grad_clip(0.3, scope=scopes.leaf()), grads, params), expected
    )


@pytest.mark.parametrize("name", ["rescale", "smooth", "drop", "normalize", "band"])
def test_response_chooses_the_response(name):
    grads, params = random_tree(0), random_tree(1)
    response, limit = {"response": getattr(responses, name)}, lambda places: 0.9
    for make, groups, norm in (
        (optaxclip.clip_by_norm, reference.leaf, reference.l2),
        (optaxclip.clip_by_global_norm, reference.tree, reference.l2),
        (optaxclip.clip_by_block_rms, reference.leaf, reference.rms),
        (optaxclip.clip_by_value, reference.element, reference.linf),
    ):
        expected = reference.clip(grads, groups, norm, limit, getattr(reference, name))
        assert_close(update(make(0.9, **response), grads, params), expected)


def test_rows_without_arguments_have_the_defaults_of_the_paper():
    grads, params = random_tree(0), {**random_tree(1), "bias": np.zeros(3, np.float32)}
    expected = reference.adaptive_grad_clip(grads, params, ratio=0.01, floor=1e-3)
    assert_close(update(optaxclip.adaptive_grad_clip(), grads, params), expected)
    assert reference.l2([expected["bias"]]) == pytest.approx(1e-5)


def test_agc_takes_axes_and_a_floor():
    grads, params = random_tree(0), random_tree(1)
    last = reference.along(
        lambda shape: range(max(len(shape) - 1, 0)) if len(shape) > 1 else range(len(shape))
    )
    chosen = optaxclip.adaptive_grad_clip(
        0.1, axes=lambda path, leaf: range(leaf.ndim - 1) if leaf.ndim > 1 else range(leaf.ndim)
    )
    assert_close(
        update(chosen, grads, params), reference.adaptive_grad_clip(grads, params, 0.1, groups=last)
    )
    expected = reference.adaptive_grad_clip(grads, params, 0.1, floor=2.0)
    assert_close(update(optaxclip.adaptive_grad_clip(0.1, floor=2.0), grads, params), expected)
    unclipped = optaxclip.adaptive_grad_clip(
        0.1, axes=lambda path, leaf: None if path == "dense" else 0 if leaf.ndim else ()
    )
    assert_close(
        {"dense": update(unclipped, grads, params)["dense"]}, {"dense": grads["dense"]}, rtol=0
    )


def test_values_can_be_cut_at_two_bounds():
    traced = jax.jit(lambda grads, low, high: update(optaxclip.clip_by_value(low, high), grads))
    grads = random_tree(0)
    for low, high in (-0.5, 0.25), (0, 0.5), (-0.5, 0), (-math.inf, 0.1), (-0.1, math.inf), (0, 0):
        expected = reference.clip_between(grads, low, high)
        assert_close(update(optaxclip.clip_by_value(low, high), grads), expected, rtol=1e-7)
        assert_close(traced(grads, np.float32(low), np.float32(high)), expected, rtol=1e-7)
    for clip in (
        optaxclip.clip_by_value(high=0.25, low=-0.5),
        optaxclip.clip_by_value(lambda step: -0.5, lambda step: 0.25),
    ):
        assert_close(update(clip, grads), reference.clip_between(grads, -0.5, 0.25), rtol=1e-7)


def test_values_within_two_bounds_come_back_bit_for_bit():
    grads = jnp.array([-0.0, 1e-45, -2.0, 1.0, 0.3])
    updates = update(optaxclip.clip_by_value(-2.0, 1.0), grads)
    assert np.asarray(updates).tobytes() == np.asarray(grads).tobytes()


@pytest.mark.parametrize("scope", [scopes.tree(), scopes.leaf(), scopes.unit()])
def test_two_bounds_are_two_bounds_at_any_scope(scope):
    grads = {"a": np.float32([[3.0, -1.5], [0.2, -7.0]]), "b": np.float32([-1.9, 0.5])}
    clip = optaxclip.clip_by_value(-2.0, 1.0, scope=scope)
    assert_close(update(clip, grads), reference.clip_between(grads, -2.0, 1.0), rtol=1e-7)


def test_complex_values_are_cut_by_magnitude():
    grads = {"a": np.array([3 + 4j, 0.3j, -1e20], np.complex64)}
    assert_close(update(optaxclip.clip_by_value(1.0), grads), reference.clip_by_value(grads, 1.0))


def test_the_direction_of_complex_gradients_is_kept():
    grads = {"a": np.array([3 + 4j, 12], np.complex64)}
    assert_close(
        update(optaxclip.clip_by_global_norm(1.0), grads), reference.clip_by_global_norm(grads, 1.0)
    )


# The oracle

CASES = json.loads((pathlib.Path(__file__).parent / "oracles" / "o01_static.json").read_text())[
    "cases"
]
ORACLE_ROWS = {
    "value": lambda c: optaxclip.clip_by_value(c["c"]),
    "leaf_l2": lambda c: optaxclip.clip_by_norm(c["c"]),
    "leaf_linf": lambda c: optaxclip.clip_by_norm(c["c"], norm=norms.linf()),
    "leaf_l1": lambda c: optaxclip.clip_by_norm(c["c"], norm=norms.l1()),
    "block_rms": lambda c: optaxclip.clip_by_block_rms(c["d"]),
    "agc_unit_IO": lambda c: optaxclip.adaptive_grad_clip(c["clipping"], floor=c["eps"]),
    "agc_unit_OI": lambda c: optaxclip.adaptive_grad_clip(c["clipping"], floor=c["eps"], axes=1),
    "agc_leaf": lambda c: optaxclip.adaptive_grad_clip(
        c["clipping"], floor=c["pmin"], scope=scopes.leaf()
    ),
    "agc_rank3": lambda c: optaxclip.adaptive_grad_clip(c["clipping"], floor=c["eps"]),
    "agc_rank4": lambda c: optaxclip.adaptive_grad_clip(c["clipping"], floor=c["eps"]),
    "agc_rank5": lambda c: optaxclip.adaptive_grad_clip(c["clipping"], floor=c["eps"]),
    "global_p1.0": lambda c: optaxclip.clip_by_global_norm(c["c"], norm=norms.lp(float(c["p"]))),
    "global_p2.0": lambda c: optaxclip.clip_by_global_norm(c["c"], norm=norms.lp(float(c["p"]))),
    "global_pinf": lambda c: optaxclip.clip_by_global_norm(c["c"], norm=norms.lp(float(c["p"]))),
    "zero_tree": lambda c: optaxclip.clip_by_global_norm(c["c"]),
}
CASES = [case for case in CASES if case["name"].rpartition("_")[0] in ORACLE_ROWS]


def arrays(tree):
    return {name: np.float32(leaf) for name, leaf in tree.items()}


def test_the_oracle_has_cases_for_every_row():
    assert {case["name"].rpartition("_")[0] for case in CASES} == set(ORACLE_ROWS) and len(
        CASES
    ) == 27


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_rows_agree_with_the_oracle(case):
    clip = ORACLE_ROWS[case["name"].rpartition("_")[0]](case["config"])
    grads, params = arrays(case["grads"]), arrays(case["params"]) if "params" in case else None
    updates, state = clip.update(grads, clip.init(grads), params)
    assert_close(updates, arrays(case["expected"]))
    if "norm" in case:
        assert state.reading.size_before.tolist() == pytest.approx([case["norm"]], rel=1e-6)
    if "unit_norms" in case:
        assert float(state.reading.size_before[0]) == pytest.approx(
            np.max(case["unit_norms"]), rel=1e-6
        )


# Optax

OPTAX_ROWS = {
    "clip": (optax.clip, optaxclip.clip_by_value),
    "clip_by_block_rms": (optax.clip_by_block_rms, optaxclip.clip_by_block_rms),
    "clip_by_global_norm": (optax.clip_by_global_norm, optaxclip.clip_by_global_norm),
    "adaptive_grad_clip": (optax.adaptive_grad_clip, optaxclip.adaptive_grad_clip),
}


@pytest.mark.parametrize("theirs, ours", OPTAX_ROWS.values(), ids=list(OPTAX_ROWS))
def test_rows_agree_with_optax(theirs, ours):
    apply, expect = with_limit(ours), with_limit(theirs)
    for seed in range(3):
        for limit in 0.01, 0.3, 100.0:
            args = random_tree(seed), random_tree(100 + seed), limit
            assert_close(apply(*args), expect(*args))


def test_agc_agrees_with_optax_for_another_floor_and_with_numpy_for_other_axes():
    grads, params = {"a": random_tree(0)["conv"]}, {"a": random_tree(1)["conv"]}
    theirs = update(optax.adaptive_grad_clip(0.1, eps=0.5), grads, params)
    assert_close(update(optaxclip.adaptive_grad_clip(0.1, floor=0.5), grads, params), theirs)
    for axes in (0,), (0, 1, 2), (3,), (1, 2, 3):
        ours = update(optaxclip.adaptive_grad_clip(0.1, floor=0.5, axes=axes), grads, params)
        groups = reference.along(lambda shape, axes=axes: axes)
        assert_close(
            ours, reference.adaptive_grad_clip(grads, params, 0.1, floor=0.5, groups=groups)
        )


SPIKES = {"a": np.float32([500, 5]), "b": np.float32([300, 3])}
WEIGHTS = {"a": np.float32([1, 2]), "b": np.float32([3, 4])}


def test_a_high_value_limit_changes_nothing_and_a_low_one_is_reached_everywhere():
    assert_close(update(optaxclip.clip_by_value(1e6), SPIKES), SPIKES, rtol=0)
    assert_close(update(optaxclip.clip_by_value(1.0), SPIKES), {"a": [1, 1], "b": [1, 1]}, rtol=0)


@pytest.mark.parametrize(
    "make, sizes",
    [
        (
            optaxclip.clip_by_block_rms,
            lambda tree: [reference.rms([leaf]) for leaf in tree.values()],
        ),
        (optaxclip.clip_by_norm, lambda tree: [reference.l2([leaf]) for leaf in tree.values()]),
        (optaxclip.clip_by_global_norm, lambda tree: [reference.l2(tree.values())]),
        (
            optaxclip.adaptive_grad_clip,
            lambda tree: [reference.l2([tree[k]]) / reference.l2([WEIGHTS[k]]) for k in tree],
        ),
    ],
)
def test_clipping_again_to_ever_lower_limits_equals_clipping_once(make, sizes):
    again, apply = SPIKES, with_limit(make)
    for i in range(1, 51):
        again = apply(again, WEIGHTS, 1 / i)
        assert sizes(again) == pytest.approx([1 / i] * len(sizes(again)), rel=2e-6)
        assert_close(again, apply(SPIKES, WEIGHTS, 1 / i))


def test_units_of_a_kernel_of_five_axes_are_its_output_channels():
    grads, params = (
        {"a": np.full((2, 2, 2, 3, 4), 2, np.float32)},
        {"a": np.ones((2, 2, 2, 3, 4), np.float32)},
    )
    for axes in None, (0, 1, 2, 3), (0, 1, 2), (3, 4), -1:
        clipped = update(optaxclip.adaptive_grad_clip(0.5, axes=axes), grads, params)
        assert_close(clipped, {"a": np.full((2, 2, 2, 3, 4), 0.5)})
    assert_close(update(optaxclip.adaptive_grad_clip(2.0), grads, params), grads, rtol=0)


def test_per_example_clipping_is_the_global_row_under_vmap():
    grads = {
        "a": np.float32([[0, -0.5], [3, 4], [5, 6], [0, 0]]),
        "b": np.float32([[0], [5], [-3], [0]]),
    }
    clipped = jax.vmap(lambda example: update(optaxclip.clip_by_global_norm(1.0), example))(grads)
    factors = np.array([1, 50**-0.5, 70**-0.5, 1])[:, None]
    assert_close(clipped, {name: factors * leaf for name, leaf in grads.items()})


@pytest.mark.parametrize("name", ROWS)
def test_rows_say_in_their_signature_which_keywords_they_take(name):
    parameters = inspect.signature(getattr(optaxclip, name)).parameters
    assert {"nonfinite", "sharded_over", "record", "scope"} <= set(parameters)
    assert next(iter(parameters)) == FIRST.get(name, "max_norm")


@each_row
def test_rows_pass_on_the_keywords_of_clip(make, definition):
    grads, params = {"a": jnp.array([jnp.nan, 1.0])}, {"a": jnp.ones(2)}
    clip = make(1.0, nonfinite="zero", record=False)
    updates, state = clip.update(grads, clip.init(params), params)
    assert updates["a"][0] == 0 and state.reading == optax.EmptyState()
    split = make(1.0, sharded_over="i")
    halves = jax.vmap(lambda g, w: update(split, {"a": g}, {"a": w})["a"], axis_name="i")
    together = update(make(1.0), {"a": np.float32([3, 4, 0, 12])}, {"a": np.ones(4, np.float32)})[
        "a"
    ]
    np.testing.assert_allclose(
        halves(np.float32([[3, 4], [0, 12]]), np.ones((2, 2), np.float32)).ravel(),
        together,
        rtol=1e-6,
    )
