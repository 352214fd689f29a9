"""Rules that learn against their published equations: long streams of trees, one compiled scan for
each case.
"""

import functools
import json
import math
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

import optaxclip
from optaxclip import Context, scopes, thresholds

SHAPES = {"bias": (3,), "dense": (4, 3), "scale": ()}
STEPS = 1300
SCOPES = {
    "tree": (scopes.tree(), reference.tree),
    "leaf": (scopes.leaf(), reference.leaf),
    "unit": (scopes.unit(), reference.unit),
    "element": (scopes.element(), reference.element),
}


def random_stream(seed, deviation, scale):
    """Log-normal sizes with spikes of 30 to 100 times, of a leaf or of all; noisy ones triple on
    the way.
    """
    rng = np.random.default_rng(seed)

    def spikes(share):
        return np.where(rng.random(STEPS) < share, rng.uniform(30, 100, STEPS), 1)

    common = scale * np.exp(0.8 * deviation * rng.normal(size=STEPS)) * spikes(0.01)
    if deviation > 0.3:
        common[700:] *= 3
    if deviation == 1:
        common[19] *= 50
    stream = {}
    for name, shape in SHAPES.items():
        level = common * np.exp(0.6 * deviation * rng.normal(size=STEPS)) * spikes(0.005)
        signs = rng.choice([-1, 1], (STEPS, *shape))
        stream[name] = np.float32(
            signs * rng.uniform(0.5, 1.5, signs.shape) * level.reshape(-1, *[1] * len(shape))
        )
    return stream


STREAMS = [
    random_stream(*of)
    for of in [(26, 0.1, 1), (5, 0.5, 1), (4, 0.5, 1e25), (9, 1, 1e-22), (1, 1, 1)]
]


@functools.cache
def measured(i, scope, norm):
    return reference.measured(STREAMS[i], SCOPES[scope][1], norm)


def scan(clip):
    """Compiled: the updates of a stream, what was read at each step, and the last state."""

    @jax.jit
    def run(stream, params=None):
        def step(state, grads):
            updates, state = clip.update(grads, state, params)
            return state, (updates, getattr(state, "reading", None))

        state, (updates, reading) = jax.lax.scan(
            step, clip.init(jax.tree.map(lambda x: x[0], stream)), stream
        )
        return updates, reading, state

    return run


def follow(clip, sizes):
    """Sizes after clipping and limits, of a gradient of one number."""
    updates, reading, _ = scan(clip)(np.float32(sizes))
    return np.float64(updates), np.float64(reading.limit[:, 0])


def noisy(steps, deviation=0.1, seed=0):
    return np.exp(deviation * np.random.default_rng(seed).normal(size=steps))


class Method(NamedTuple):
    make: Callable
    rule: Callable  # limits from sizes, both [steps, groups]
    scope: str = "tree"  # by default
    norm: Callable = reference.l2
    response: Callable = reference.rescale
    rtol: np.ndarray | float = 1e-4


def row(make, rule, *rest, **options):
    """A row of the library and its equations, given the same options."""
    rule = functools.partial(rule, **options)
    return Method(
        functools.partial(make, **options),
        rule if rule.func is reference.adagc else reference.each(rule),
        *rest,
    )


def of_rule(threshold, rule, **options):
    return Method(
        functools.partial(optaxclip.clip, threshold, scope=scopes.tree()),
        reference.each(functools.partial(rule, **options)),
    )


BY_ELEMENT = "element", reference.linf, reference.clamp
TO_A_NORM = "leaf", reference.l2, reference.normalize
EXACT_AT_FIRST = (
    "tree",
    reference.l2,
    reference.rescale,
    np.where(np.arange(STEPS) < 1024, 1e-4, 0.0101),
)
METHODS = {
    "autoclip": row(optaxclip.autoclip, reference.autoclip, *EXACT_AT_FIRST),
    "autoclip, window": row(optaxclip.autoclip, reference.autoclip, q=0.3, window=77),
    "lagged quantile": of_rule(
        thresholds.quantile(0.95, 50, lagged=True), reference.lagged_quantile, q=0.95, window=50
    ),
    "quantile_clip": row(optaxclip.quantile_clip, reference.quantile_clip),
    "quantile_clip, median": row(
        optaxclip.quantile_clip, reference.quantile_clip, q=0.5, rate=0.05
    ),
    "quantile_clip, from 3": of_rule(
        thresholds.quantile_tracker(initial=3.0), reference.quantile_clip, initial=3.0
    ),
    "zclip": row(optaxclip.zclip, reference.zclip),
    "zclip, max_norm": row(optaxclip.zclip, reference.zclip, max_norm=4.0),
    "zclip, mean": row(optaxclip.zclip, reference.zclip, option="mean"),
    "zclip, percentile": row(optaxclip.zclip, reference.zclip, option="percentile"),
    "zclip, quick": row(optaxclip.zclip, reference.zclip, z=3.0, decay=0.9, warmup=7),
    "adagc": row(optaxclip.adagc, reference.adagc, "leaf"),
    "adagc, wide": row(
        optaxclip.adagc, reference.adagc, "leaf", factor=1.5, decay=0.9, warmup=33, max_norm=6.0
    ),
    "ema": of_rule(thresholds.ema(2.0, decay=0.95), reference.relative_ema),
    "history_clip": row(optaxclip.history_clip, reference.history_clip),
    "history_clip, short": row(
        optaxclip.history_clip, reference.history_clip, deviations=1.5, window=20, warmup=5
    ),
    "log_norm_clip": row(optaxclip.log_norm_clip, reference.log_norm_clip),
    "log_norm_clip, quick": row(
        optaxclip.log_norm_clip, reference.log_norm_clip, deviations=1.5, decay=0.8
    ),
    "growth_clip": row(optaxclip.growth_clip, reference.growth_clip, "leaf"),
    "growth_clip, wide": row(optaxclip.growth_clip, reference.growth_clip, "leaf", factor=1.5),
    "spam_clip": row(optaxclip.spam_clip, reference.spam_clip, *BY_ELEMENT),
    "spam_clip, narrow": row(
        optaxclip.spam_clip, reference.spam_clip, *BY_ELEMENT, factor=9.0, decay=0.95, warmup=3
    ),
    "gradient_stabilizer": row(
        optaxclip.gradient_stabilizer, reference.gradient_stabilizer, *TO_A_NORM
    ),
    "gradient_stabilizer, quick": row(
        optaxclip.gradient_stabilizer,
        reference.gradient_stabilizer,
        *TO_A_NORM,
        decay=0.7,
        square_decay=0.9,
    ),
}
CASES = [(name, None) for name in METHODS]
CASES += [
    (name, scope)
    for name in METHODS
    for scope in ("tree", "leaf")
    if "," not in name and METHODS[name].scope != scope
]
CASES += [(name, "unit") for name in ("ema", "growth_clip")]


def assert_close_at_every_step(updates, expected, rtol):
    errors = [
        np.abs(updates[name] / expected[name] - 1).reshape(STEPS, -1).max(1) for name in SHAPES
    ]
    error = np.max(errors, 0)
    assert (error <= rtol).all(), (
        f"{error.max():.1e} at step {np.argmax(error)}, first at {np.argmax(~(error <= rtol))}"
    )


@pytest.mark.parametrize("name, scope", CASES)
def test_clips_as_its_equations_say(name, scope):
    method = METHODS[name]
    own = scope or method.scope
    run = scan(method.make() if scope is None else method.make(scope=SCOPES[scope][0]))
    changed = []
    for i, stream in enumerate(STREAMS):
        updates, _, _ = run(stream)
        expected = reference.learned(
            stream, measured(i, own, method.norm), method.rule, method.response
        )
        assert_close_at_every_step(updates, expected, method.rtol)
        changed.append(np.mean(expected["dense"] != stream["dense"]))
    assert 0 < np.mean(changed) < 1 or method.response is reference.normalize


# Methods that look at elements


def each_step(stream):
    return [{name: leaf[t] for name, leaf in stream.items()} for t in range(STEPS)]


def assert_trees_close(updates, expected, atol=0.0):
    for name in SHAPES:
        np.testing.assert_allclose(
            updates[name], [tree[name] for tree in expected], rtol=1e-4, atol=atol
        )


@pytest.mark.parametrize("scope", [None, "tree"])
@pytest.mark.parametrize("options", [{}, {"relative": 0.3, "absolute": 0.05}])
def test_clippy_is_one_factor_until_no_element_is_over_its_budget(scope, options):
    rng = np.random.default_rng(7)
    params = {name: np.float32(rng.uniform(10, 40, shape)) for name, shape in SHAPES.items()}
    params["bias"][:2] = 0, -params["bias"][1]
    run = scan(
        optaxclip.clippy(**options)
        if scope is None
        else optaxclip.clippy(**options, scope=SCOPES[scope][0])
    )
    groups = SCOPES[scope or "leaf"][1]
    for i in 0, 4:
        stream = {**STREAMS[i], "bias": STREAMS[i]["bias"].copy()}
        stream["bias"][100:, 0] = 0
        updates, reading, _ = run(stream, params)
        assert_trees_close(
            updates,
            [
                reference.clippy(grads, params, groups=groups, **options)
                for grads in each_step(stream)
            ],
        )
        assert 0 < np.mean(reading.clipped_share) < 1


@pytest.mark.parametrize("options", [{}, {"decay": 0.9}])
@pytest.mark.parametrize("name", ["clip_by_value", "clip_by_norm", "clip_by_global_norm"])
def test_carry_adds_tomorrow_what_is_cut_off_today(name, options):
    run = scan(optaxclip.error_feedback(getattr(optaxclip, name)(1.7), **options))
    clip = functools.partial(
        getattr(reference, name), **{"limit" if name == "clip_by_value" else "max_norm": 1.7}
    )
    for i in 0, 4:
        # float32 keeps no more digits of a sum
        stream = {name: np.clip(leaf, -8, 8) for name, leaf in STREAMS[i].items()}
        updates, _, state = run(stream)
        assert_trees_close(
            updates, reference.u_clip(each_step(stream), clip, **options), atol=1.7e-4
        )
        for leaf in SHAPES if not options else ():
            missing = np.sum(stream[leaf], 0, float) - np.sum(updates[leaf], 0, float)
            np.testing.assert_allclose(state.memory[leaf], missing, atol=1e-3)
    assert np.abs(state.memory["dense"]).max() > 1


# Published numbers

ORACLE = json.loads((pathlib.Path(__file__).parent / "oracles" / "adaptive.json").read_text())[
    "cases"
]
ORACLE_RULES = {
    "zclip": lambda max_norm=math.inf, **options: thresholds.at_most(
        thresholds.zscore(**options), max_norm
    ),
    "lagged": lambda max_norm=math.inf, **options: thresholds.at_most(
        thresholds.quantile(**options, lagged=True), max_norm
    ),
    "autoclip": lambda q, window: (
        thresholds.quantile_sketch(q) if window is None else thresholds.quantile(q, window)
    ),
    "quantile_tracker": thresholds.quantile_tracker,
}


@pytest.mark.parametrize("case", ORACLE, ids=lambda case: case["name"])
def test_rules_agree_with_the_oracle(case):
    sizes = np.float32(case["sizes"])
    clip = optaxclip.clip(ORACLE_RULES[case["rule"]](**case["config"]), scope=scopes.leaf())
    updates, reading, _ = scan(clip)(list(sizes.T))
    np.testing.assert_allclose(reading.limit, case["thresholds"], rtol=2e-5)
    np.testing.assert_allclose(np.stack(updates, 1) / sizes, case["factors"], rtol=2e-5)


# Quantiles


def through(rule, sizes, state=None):
    """The last state of a rule, and its limits."""
    context = Context(jnp.array(0))

    def step(state, size):
        return rule.learn(size, size, state, context), rule.limit(size, state, context)

    return jax.lax.scan(
        step, rule.init(sizes[0]) if state is None else state, jnp.asarray(sizes, jnp.float32)
    )


@functools.partial(jax.jit, static_argnums=(2, 3))
def windowed(q, sizes, window, lagged):
    return through(thresholds.quantile(q, window, lagged=lagged), sizes)[1]


@jax.jit
def sketched(q, sizes, state=None):
    return through(thresholds.quantile_sketch(q), sizes, state)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    sizes=st.lists(st.floats(0.125, 100, width=32), min_size=12, max_size=12),
    q=st.integers(1, 999).map(lambda n: n / 1000),
    window=st.sampled_from([1, 4, 12]),
    lagged=st.booleans(),
)
def test_a_quantile_is_that_of_numpy(sizes, q, window, lagged):
    expected = (reference.lagged_quantile if lagged else reference.autoclip)(sizes, q, window)
    np.testing.assert_allclose(
        windowed(q, np.float32(sizes), window, lagged), expected, rtol=1e-6, atol=1e-6 * max(sizes)
    )


def test_a_sketch_that_has_counted_to_two_to_the_thirty_halves_its_counts_and_keeps_its_quantile():
    sizes = noisy(2500, 0.5)
    (sketch, *rest), _ = sketched(0.3, sizes)
    counts = sketch.counts * (2**30 // 2500)
    before = 2**30 - int(counts[-1])  # so many sizes until they are halved
    assert 1000 < before < 2000
    (sketch, *_), limits = sketched(
        0.3, noisy(2500, 0.5, seed=1), (sketch._replace(counts=counts), *rest)
    )
    np.testing.assert_allclose(limits, np.quantile(sizes, 0.3), rtol=0.0101)
    assert sketch.counts.dtype == jnp.int32 and int(sketch.counts[-1]) == 2**29 + 2500 - before
    assert (np.diff(sketch.counts, prepend=0) >= 0).all()


@pytest.mark.parametrize("q, end", [(0.9, 1e9), (0.1, 1e-9)])
def test_the_bins_of_a_sketch_follow_its_quantile_over_six_decades(q, end):
    sizes = np.float32(noisy(5000) * end ** np.linspace(0, 1, 5000))
    _, limits = sketched(q, sizes)
    expected = np.array([np.quantile(sizes[: t + 1], q) for t in range(1024, 5000, 10)])
    assert np.abs(np.log(limits[1024::10] / expected)).max() < math.log(1.0101)
    assert abs(math.log10(limits[-1])) > 6


def test_a_sketch_tells_sizes_within_26_000_of_the_middle_of_its_bins_and_the_rank_of_all():
    doubling = 2.0 ** np.arange(35)
    parts = noisy(2000), doubling[:15], [25_000] * 200, doubling[15:], [1e9] * 200
    sizes = np.concatenate(parts)
    state, _ = sketched(0.5, sizes)
    for q in 0.1, 0.5, 0.9:
        assert float(sketched(q, [1.0], state)[1][0]) == pytest.approx(
            np.quantile(sizes, q), rel=0.0101
        )


# What the docstrings say in numbers


def test_rows_remember_as_many_numbers_as_they_say_and_a_sketch_8_kib_for_each_group():
    numbers = {
        "zclip": 5,
        "adagc": 4,
        "history_clip": 128 + 3,
        "log_norm_clip": 5,
        "growth_clip": 3,
    }
    for name, count in {
        **numbers,
        "quantile_clip": 3,
        "spam_clip": 7,
        "gradient_stabilizer": 5,
        "clippy": 0,
    }.items():
        state = jax.eval_shape(getattr(optaxclip, name)().init, jnp.ones(7)).threshold
        assert sum(array.size for array in jax.tree.leaves(state)) == count, name
    state = jax.eval_shape(
        optaxclip.autoclip(scope=scopes.leaf()).init, [jnp.ones((9, 9)), jnp.ones(5)]
    ).threshold
    assert (
        2 * 8192
        < sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(state))
        <= 2 * 8.3 * 1024
    )


def test_an_average_of_clipped_sizes_doubles_in_693_steps_and_is_tenfold_in_2300():
    _, limits = follow(optaxclip.clip(thresholds.ema(), scopes.tree()), [1] + [100] * 2400)
    np.testing.assert_allclose(limits[[1, 694, 2304]], [1.05, 2.1, 10.5], rtol=2e-3)


def test_a_limit_to_growth_is_tenfold_after_231_steps_and_settles_below_noisy_sizes():
    run = scan(optaxclip.growth_clip())
    assert float(run(np.float32([1] + [100] * 999))[0][231]) == pytest.approx(10, rel=5e-3)
    sizes = np.float32(noisy(1000))
    assert np.mean(run(sizes)[0][200:]) < 0.95 * np.mean(sizes)


def test_a_stabilized_size_is_1_when_steady_and_at_a_huge_spike_095_and_at_most_141():
    run = scan(optaxclip.gradient_stabilizer(decay=0.7, square_decay=0.9))

    def last(sizes):
        return float(run(np.float32([1] * (400 - len(sizes)) + [*sizes]))[0][-1])

    assert last([]) == pytest.approx(1, rel=1e-5)
    assert [last([spike]) for spike in (3, 10, 1e4, 1e8)] == pytest.approx(
        [1.193, 1.121, 0.949, 0.949], abs=1e-3
    )
    assert max(last([1e3] * steps) for steps in range(1, 20)) == pytest.approx(1.300, abs=2e-3)
    # the most: 1.406
    assert last((9 / 7) ** np.arange(60)) == pytest.approx(
        math.sqrt(0.9 / (1 - 0.49 / 0.9)), rel=2e-3
    )
    assert max(np.abs(run(np.float32(noisy(400, 2, seed)))[0]).max() for seed in range(20)) < 1.406


@pytest.mark.parametrize(
    "decay, square_decay, steady, spike, below",
    # after 200 000 steady steps a spike of 1000, and for how many steps one of 100 is felt
    [
        (0.7, 0.9, 400, 0.951, 67),
        (0.6, 0.999, 10_000, 12.66, 2546),
        (0.85, 1 - 1e-5, 200_000, 42.6, 0),
    ],
)
def test_a_spike_is_stabilized_to_what_the_decays_say(decay, square_decay, steady, spike, below):
    clip = optaxclip.gradient_stabilizer(decay=decay, square_decay=square_decay, record=False)
    run = scan(clip)
    steps = np.ones(steady + 3000, np.float32)
    steps[steady] = 1000
    assert float(run(steps)[0][steady]) == pytest.approx(spike, rel=5e-3)
    limit = (1 - decay) / math.sqrt(1 - square_decay)
    assert abs(spike / limit - 1) < 0.003 or steady == 200_000  # not yet in its steady state
    steps[steady] = 100
    assert np.sum(run(steps)[0][steady:] < 0.75) == pytest.approx(below, abs=3)


def test_a_tracker_moves_by_its_rate_and_follows_a_tenfold_rise_in_13_steps_and_a_fall_in_115():
    _, limits = follow(optaxclip.quantile_clip(), [1] + [100] * 13 + [1e-2] * 120)
    moves = np.diff(np.log(limits))
    np.testing.assert_allclose(moves, [-0.02] + [0.18] * 13 + [-0.02] * 119, atol=1e-5)
    assert limits[14] / limits[1] > 10 > limits[13] / limits[1]
    assert limits[14] / limits[130] > 10 > limits[14] / limits[129]


def test_a_tenth_as_limit_clips_90_percent_of_steps_a_little():
    sizes = noisy(1000)
    clipped, limits = follow(optaxclip.autoclip(), sizes)
    assert np.mean(sizes > limits) == pytest.approx(0.9, abs=0.02)
    assert np.mean(clipped / sizes) > 0.85 and limits[0] == np.float32(sizes[0])


def test_adagc_clips_two_in_five_steady_noisy_steps_and_with_factor_2_none():
    sizes = np.float32(noisy(4000))
    for factor, share in (1.05, 0.42), (2.0, 0.0):
        _, limits = follow(optaxclip.adagc(factor), sizes)
        assert np.mean(sizes[1000:] > limits[1000:]) == pytest.approx(share, abs=0.03)


def test_one_spike_of_100_raises_the_limit_from_history_to_28_means_for_the_length_of_the_window():
    sizes = noisy(400)
    sizes[200] = 100
    _, limits = follow(optaxclip.history_clip(), sizes)
    np.testing.assert_allclose(limits[201:329], 27.9, rtol=0.01)
    assert (
        limits[200] < 1.4 > limits[329]
        and np.isinf(limits[:64]).all()
        and np.isfinite(limits[64:]).all()
    )


def test_after_a_spike_log_norms_let_a_threefold_size_pass_for_some_twenty_steps():
    run = scan(optaxclip.log_norm_clip())
    for gap, passes in (20, True), (40, False), (-10, False):
        sizes = np.float32(noisy(300))
        sizes[200], sizes[200 + gap] = 100, 3
        updates = run(sizes)[0]
        assert updates[200] < 1.6 and (updates[200 + gap] == 3) == passes


def test_no_log_norm_is_two_deviations_off_among_fewer_than_five():
    run = scan(optaxclip.log_norm_clip())
    for sizes, clipped in ([1, 1.1, 0.9, 50, 1, 1], False), ([1, 1.1, 0.9, 1, 1, 50], True):
        assert (np.max(run(np.float32(sizes))[0]) < 2) == clipped


def test_a_lasting_change_by_many_deviations_is_never_accepted_by_zclip_but_by_its_patient_form():
    sizes = noisy(3000) * np.where(np.arange(3000) < 300, 1, 10)
    assert follow(optaxclip.zclip(), sizes)[0].max() < 2
    accepted, _ = follow(
        optaxclip.clip(thresholds.reset_after(thresholds.zscore(), 50), scopes.tree()), sizes
    )
    assert accepted[300:349].max() < 2 and np.mean(accepted[400:] == np.float32(sizes[400:])) > 0.9


def test_what_hardly_varies_has_a_deviation_of_a_thousandth_or_in_logs_of_a_ten_thousandth():
    sizes = [1.0] * 100 + [1.01]
    assert follow(optaxclip.history_clip(), sizes)[1][-1] == pytest.approx(1.003, rel=1e-6)
    assert follow(optaxclip.zclip(), sizes)[1][-1] == pytest.approx(
        1 + 2.5**2 * 1e-3 / 10, rel=1e-6
    )
    run = scan(optaxclip.log_norm_clip())
    for last, clipped in (1.0002, False), (1.00023, True):  # 2e-4 / 0.95: it is in the mean, too
        assert (float(run(np.float32([1.0] * 100 + [last]))[0][-1]) < 1.0001) == clipped


def test_growth_starts_again_at_the_tenth_norm_after_a_huge_jump():
    clipped, _ = follow(optaxclip.growth_clip(), [1.0] * 5 + [2e4] * 12)
    # the ninth such norm is still held back, the one after the tenth is free
    assert clipped[5 + 8] < 1.2 and clipped[5 + 10] == pytest.approx(2e4)
    below, _ = follow(optaxclip.growth_clip(), [1.0] * 5 + [0.9e4] * 12)
    assert below[-1] < 1.2


def test_spam_clips_from_the_20th_update_on():
    for spike, clipped in (19, False), (20, True):
        sizes = [1.0] * (spike - 1) + [500.0]
        last = math.sqrt(5000 * (1 - 0.999 ** (spike - 1))) if clipped else 500
        assert follow(optaxclip.spam_clip(), sizes)[0][-1] == pytest.approx(last, rel=1e-5)


def test_spam_lets_an_element_be_70_times_its_usual_size():
    assert follow(optaxclip.spam_clip(decay=0.9), [1.0] * 200 + [90.0])[0][-1] == pytest.approx(
        70.7, rel=1e-3
    )
