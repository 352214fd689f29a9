"""What a rule has learned heals: after any poison it clips as before, at once or after the number
of steps stated here.

A rule sees gradients of log-normal sizes (deviation 0.1) among which there is a poison. At every
step two more are tried out, from which it does not learn: one of the usual size, and a spike of 100
times that.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from precision import float64

import optaxclip
from optaxclip import Threshold, responses, scopes, thresholds

STEPS, LATER, SPIKE = 160, 60, 100.0
AFRESH = 9  # sizes far off the usual that are ignored; with the tenth in a row a rule starts afresh


def noise(seed, steps=STEPS):
    return np.exp(0.1 * np.random.default_rng(seed).normal(size=steps))


# The rules


class Rule(NamedTuple):
    rule: Threshold
    knows: int  # how many ordinary sizes it has to have seen until it clips spikes
    after_spike: int = 0  # how many steps until it clips a second spike like the first
    patience: int = 30  # sizes over the limit in a row that noise does not make
    # how many until it clips spikes after a fall to a tenth; None: all history weighs the same
    after_fall: int | None = 80
    keeps: float = 0.75  # what is left of a gradient of the usual size, at least
    spike: float = 3.0  # what is left of a spike, in usual sizes, at most
    scopes: tuple[str, ...] = ("tree", "leaf", "unit")
    response: Callable = responses.rescale
    guarded: bool = True  # whether sizes far off the usual are ignored


# A window of raw sizes remembers a spike until it has left (40 steps), or until a second one is
# again no tenth of it (19). The ratio of mean to root mean square goes by the longer of its
# averages. The second moment is one number for each element and has no guard: it learns what it
# lets through, which is little once it has a limit.
RULES = {
    "ema": Rule(thresholds.ema(), knows=1),
    "ema from the least": Rule(
        thresholds.ema(start="least", warmup=20), knows=20, patience=60, scopes=("leaf",)
    ),
    "zscore": Rule(thresholds.zscore(), knows=25),
    "log_zscore": Rule(thresholds.log_zscore(), knows=5, scopes=("leaf", "unit")),
    "window_zscore": Rule(
        thresholds.window_zscore(window=40, warmup=20),
        knows=20,
        after_spike=40,
        scopes=("tree", "unit"),
    ),
    # It follows the smaller of noisy sizes.
    "growth": Rule(thresholds.growth(), knows=1, keeps=0.6, scopes=("leaf", "unit")),
    "quantile 0.5": Rule(thresholds.quantile(0.5, 20), knows=2, scopes=("leaf",)),
    "quantile 0.9": Rule(thresholds.quantile(0.9, 20), knows=10, after_spike=19),
    "quantile lagged": Rule(thresholds.quantile(0.9, 20, lagged=True), knows=20, scopes=("unit",)),
    "quantile_sketch 0.5": Rule(
        thresholds.quantile_sketch(0.5), knows=2, after_fall=None, scopes=("tree",)
    ),
    "quantile_sketch 0.9": Rule(
        thresholds.quantile_sketch(0.9), knows=10, after_fall=None, scopes=("leaf",)
    ),
    "quantile_tracker": Rule(thresholds.quantile_tracker(), knows=1, scopes=("tree", "unit")),
    "mean_to_rms": Rule(
        thresholds.mean_to_rms(decay=0.7, square_decay=0.9),
        knows=1,
        after_spike=70,
        response=responses.normalize,
        scopes=("leaf", "unit"),
    ),
    "rms_multiple": Rule(
        thresholds.rms_multiple(4.0, decay=0.9), knows=20, scopes=("element",), guarded=False
    ),
    "rms_multiple with a guard": Rule(
        thresholds.ignore_outliers(thresholds.rms_multiple(4.0, decay=0.9)),
        knows=20,
        scopes=("element",),
    ),
}
each_rule = pytest.mark.parametrize("name", RULES)
each_rule_and_scope = pytest.mark.parametrize(
    "name, scope", [(name, scope) for name in RULES for scope in RULES[name].scopes]
)


# The poisons


class Poison(NamedTuple):
    sizes: np.ndarray  # of every step; what is not finite is one bad element
    end: int  # the first ordinary step afterwards
    level: float  # the usual size from there on
    needs: Callable[[Rule], int]  # how many ordinary steps a rule may need until it is healed
    guard: bool  # whether that takes the guard against sizes far off the usual


def stream(start, poison=(), level=1.0, needs=None, guard=False):
    """Ordinary steps, but for the poison from `start` on, and with another usual size after it."""
    sizes, end = noise(0), start + len(poison)
    sizes[start:end] = poison
    sizes[end:] *= level
    return Poison(sizes, end, level, needs or (lambda rule: max(rule.knows - start, 0)), guard)


def afresh(rule):
    return AFRESH + rule.knows


def at_all_times(poisons, needs=None, guard=False):
    """Each of the poisons as the first gradients of all, early (before the end of a warm-up), and
    later.
    """
    for name, poison in poisons.items():
        for when, start in {"first": 0, "early": 3, "later": LATER}.items():
            yield (
                f"{name}, {when}",
                stream(start, poison, needs=needs and needs(start), guard=guard),
            )


NOT_SEEN = {
    "NaN": [np.nan],
    "inf": [np.inf],
    "-inf": [-np.inf],
    "zero": [0.0],
    "a subnormal": [1e-40],
}
NOT_SEEN |= {
    "30 zeros": [0.0] * 30,
    "40 zeros": [0.0] * 40,
    "NaN and zero in turns": [np.nan, 0.0] * 15,
}
IGNORED = {f"{size:g}": [size] for size in (1e6, 1e12, 1e30, 1e38, 1e-6, 1e-12, 1e-30)}
IGNORED |= {"9 of 1e30": [1e30] * 9, "1e30 at every other step": [1e30, 1.0] * 15}
ACCEPTED = {"10 of 1e30": [1e30] * 10, "30 of 1e12": [1e12] * 30, "30 of 1e-12": [1e-12] * 30}

POISONS = {
    "none": stream(LATER),
    **dict(at_all_times(NOT_SEEN)),
    # The first size of all has nothing to be compared with: it becomes the usual one.
    **dict(at_all_times(IGNORED, needs=lambda start: None if start else afresh, guard=True)),
    **dict(at_all_times(ACCEPTED, needs=lambda start: afresh, guard=True)),
    **{
        f"{level:g} times as large for good": stream(LATER, [], level, afresh, True)
        for level in (3e4, 3e-5, 1e12, 1e-12)
    },
    **{f"{level:g} throughout": stream(0, [], level) for level in (1e-25, 1e-12, 1e12, 1e36)},
    "no noise": stream(0)._replace(sizes=np.ones(STEPS)),
    "the same spike before": stream(LATER, [SPIKE], needs=lambda rule: rule.after_spike),
}


# Streams through a rule, all at once

DIRECTION = np.float32([2, 1, 1, 2, 1, 2])  # of the whole tree, in one row
POISONED = {
    "tree": [1, 1, 1, 1, 1, 1],
    "leaf": [1, 1, 1, 1, 0, 0],
    "unit": [1, 0, 1, 0, 1, 0],
    "element": [1, 0, 0, 0, 0, 0],
}


def two_leaves(row):
    return {"a": row[:4].reshape(2, 2), "b": row[4:]}


def two_units(row):
    return row.reshape(3, 2)


class Outcome(NamedTuple):
    """For each stream and step the gradient, then the two tried out: a spike, and one of the usual
    size.

    Attributes:
        grads: `[streams, steps, 3, numbers]`.
        updates: of the same shape.
        clean: `[streams, steps]`, whether the state has no NaN, and no infinity but where it was
            infinite from the start.
    """

    grads: np.ndarray
    updates: np.ndarray
    clean: np.ndarray


def gradients(sizes, levels, poisoned, dtype=np.float32):
    """Gradients of the sizes, and two of the levels: in what is poisoned, with ordinary ones
    elsewhere.
    """
    levels = np.broadcast_to(levels, sizes.shape)
    sizes = np.stack([sizes, SPIKE * levels, levels], -1)
    own = np.where(np.isfinite(sizes), sizes, 1)[..., None] / np.linalg.norm(DIRECTION[poisoned])
    grads = DIRECTION * np.where(poisoned, own, noise(1, sizes.shape[1])[:, None, None])
    grads[..., 0] = np.where(np.isfinite(sizes), grads[..., 0], sizes)
    return grads.astype(dtype)


def is_clean(start, state):
    pairs = zip(jax.tree.leaves(start), jax.tree.leaves(state), strict=True)
    return jnp.array([((abs(x) < jnp.inf) | (old == x)).all() for old, x in pairs]).all()


def run(clip, grads, tree):
    start = clip.init(tree(grads[0, 0, 0]))

    def step(state, rows):
        updates, states = jax.vmap(lambda row: clip.update(tree(row), state))(rows)
        state = jax.tree.map(lambda x: x[0], states)  # nothing is learned from what is tried out
        numbers = jnp.concatenate(
            [x.reshape(3, -1).astype(grads.dtype) for x in jax.tree.leaves(updates)], 1
        )
        return state, (numbers, is_clean(start, state))

    updates, clean = jax.jit(jax.vmap(lambda grads: jax.lax.scan(step, start, grads)[1]))(grads)
    return Outcome(grads, np.asarray(updates), np.asarray(clean))


@functools.cache
def outcome(name, scope):
    rule, poisoned = RULES[name], np.array(POISONED[scope], bool)
    sizes, levels = (
        np.stack([one.sizes for one in POISONS.values()]),
        np.array([[one.level] for one in POISONS.values()]),
    )
    clip = optaxclip.clip(
        rule.rule, scope=getattr(scopes, scope)(), response=rule.response, record=False
    )
    return run(
        clip,
        gradients(sizes, levels, poisoned),
        two_leaves if scope in ("tree", "leaf") else two_units,
    )


def left_of(updates, levels, rule):
    """What is left of the spike and of the gradient of the usual size, in usual sizes; a normalized
    one has size 1.
    """
    levels = np.ones(1) if rule.response is responses.normalize else np.reshape(levels, -1)
    return np.linalg.norm(updates[:, 1:] / levels[:, None, None], axis=-1).T


def healed_after(rule, spikes, ordinary):
    """How many steps it takes until both are as they should be, and remain so."""
    bad = np.nonzero(~((spikes <= rule.spike) & (ordinary >= rule.keeps)))[0]
    return 0 if len(bad) == 0 else int(bad[-1]) + 1


def steps_needed(name, scope):
    """For each poison, how many ordinary steps it takes afterwards."""
    updates = outcome(name, scope).updates * POISONED[scope]
    pairs = zip(POISONS.items(), updates, strict=True)
    return {
        poison: healed_after(RULES[name], *left_of(seen[one.end :], one.level, RULES[name]))
        for (poison, one), seen in pairs
    }


@each_rule_and_scope
def test_after_any_poison_a_rule_clips_spikes_and_leaves_ordinary_gradients_alone(name, scope):
    rule, late = RULES[name], {}
    for poison, steps in steps_needed(name, scope).items():
        one = POISONS[poison]
        assert one.needs(rule) <= STEPS - one.end - 20, "too few steps follow"
        if steps > one.needs(rule) and (rule.guarded or not one.guard):
            late[poison] = f"{steps} steps instead of {one.needs(rule)}"
    assert late == {}


@each_rule_and_scope
def test_no_poison_leaves_nan_or_infinity_in_a_state(name, scope):
    clean = outcome(name, scope).clean
    assert clean.shape == (len(POISONS), STEPS)
    assert [poison for poison, ok in zip(POISONS, clean, strict=True) if not ok.all()] == []


@each_rule_and_scope
def test_finite_gradients_give_finite_updates_that_are_not_larger_whatever_was_before(name, scope):
    grads, updates, _ = outcome(name, scope)
    finite = np.isfinite(grads).all(-1)
    grads, updates = grads[finite], updates[finite]
    assert np.isfinite(updates).all() and (np.sign(updates) * np.sign(grads) >= 0).all()
    assert RULES[name].response is responses.normalize or (abs(updates) <= abs(grads)).all()


@pytest.mark.parametrize(
    "name, scope",
    [(name, scope) for name in RULES for scope in RULES[name].scopes if scope != "tree"],
)
def test_what_is_not_poisoned_is_not_touched_by_it(name, scope):
    elsewhere = outcome(name, scope).updates[..., np.array(POISONED[scope]) == 0]
    assert elsewhere.shape[-1] >= 2 and (elsewhere > 0).all()
    # To rounding, because a compiled loop over the poisons rounds its last few otherwise than those
    # that fill a vector.
    np.testing.assert_allclose(
        elsewhere, np.broadcast_to(elsewhere[:1], elsewhere.shape), rtol=1e-6
    )


@each_rule
def test_the_state_keeps_its_structure_shapes_and_dtypes(name):
    def described(state):
        leaves, treedef = jax.tree.flatten(state)
        return treedef, [(x.shape, x.dtype, x.weak_type) for x in leaves]

    scope = getattr(scopes, RULES[name].scopes[-1])()
    clip = optaxclip.clip(RULES[name].rule, scope=scope, response=RULES[name].response)
    for wide, context in (np.float32, contextlib.nullcontext()), (np.float64, float64()):
        with context:
            grads = {
                "half": jnp.ones((2, 2), jnp.float16),
                "bf16": jnp.ones(3, jnp.bfloat16),
                "wide": jnp.ones((), wide),
            }
            state = jax.eval_shape(clip.init, grads)
            assert described(jax.eval_shape(clip.update, grads, state)[1]) == described(state)


def test_a_sketch_heals_as_well_when_it_has_more_than_the_first_1024_sizes():
    rule, long, short = RULES["quantile_sketch 0.9"], 1100, 60
    middle = [[], [np.nan], [0.0] * 9, [1e30], [1e-30], [1e30] * 9, [1e30] * 12]
    sizes = np.stack(
        [
            np.concatenate([noise(0, long), poison, noise(1, short + 12)])[: long + 12 + short]
            for poison in middle
        ]
    )
    sizes, levels = (
        np.concatenate([sizes, 1e12 * sizes[:1], 1e-12 * sizes[:1]]),
        np.array([[1.0]] * 7 + [[1e12], [1e-12]]),
    )
    clip = optaxclip.clip(rule.rule, scopes.tree(), record=False)
    seen = run(clip, gradients(sizes, levels, np.ones(6, bool)), two_units)
    assert seen.clean.all()
    for poison, updates, level in zip([*middle, [], []], seen.updates, levels, strict=True):
        needs = afresh(rule) if len(poison) > 9 else 0
        assert healed_after(rule, *left_of(updates[long + len(poison) :], level, rule)) <= needs


# Other precisions: three rules that keep different things

SPOT_CHECKS = ["ema", "zscore", "quantile 0.9"]


def spot_check(name, poisons, tree, dtype):
    rule, poisoned = RULES[name], np.ones(6, bool)
    grads = gradients(
        np.stack([one.sizes for one in poisons]),
        np.array([[one.level] for one in poisons]),
        poisoned,
        dtype,
    )
    seen = run(optaxclip.clip(rule.rule, scope=scopes.leaf(), record=False), grads, tree)
    assert seen.clean.all()
    for i, one in enumerate(poisons):
        for part in slice(0, 4), slice(4, 6):  # every leaf is a group
            own = (
                seen.updates[i, one.end :, :, part]
                * np.linalg.norm(DIRECTION)
                / np.linalg.norm(DIRECTION[part])
            )
            assert healed_after(rule, *left_of(own, one.level, rule)) <= one.needs(rule)


@pytest.mark.parametrize("name", SPOT_CHECKS)
def test_gradients_of_16_bits_heal_a_rule_as_well(name):
    def narrow(row):
        return {
            "bf16": jnp.asarray(row[:4], jnp.bfloat16),
            "half": jnp.asarray(row[4:], jnp.float16),
        }

    single = [[np.nan], [np.inf], [-np.inf], [0.0], [6e4], [1e-6], [0.0] * 30]
    poisons = [stream(LATER, poison) for poison in single]
    poisons += [
        stream(0, [np.nan] * 5),
        stream(0, [6e4] * 5, needs=afresh),
        stream(LATER, [1e-6] * 30, needs=afresh),
    ]
    spot_check(name, poisons, narrow, np.float32)


@pytest.mark.parametrize("name", SPOT_CHECKS)
def test_gradients_of_64_bits_heal_a_rule_as_well(name):
    single = [[np.nan], [np.inf], [0.0], [1e100], [1e300], [1e-100], [1e-300]]
    poisons = [stream(LATER, poison) for poison in single]
    poisons += [
        stream(0, [1e300], needs=afresh),
        stream(LATER, [1e-200] * 30, needs=afresh),
        stream(0, [], 1e200),
    ]
    with float64():
        spot_check(name, poisons, two_leaves, np.float64)


# Lasting changes

BEFORE, DURING = 120, 200  # steps at the first level, and at each of the others
RATIOS = np.array([[3.0], [10.0]])
# Others of their kind are tested.
VARIANTS = {"quantile 0.5", "quantile lagged", "quantile_sketch 0.9", "rms_multiple with a guard"}


@functools.cache
def up_and_down(name, patience):
    """What is left of spikes and ordinary gradients, and the factor of the stream's own, while the
    level rises and falls.
    """
    rule = RULES[name]
    steps = np.arange(BEFORE + 2 * DURING)
    levels = np.where((steps >= BEFORE) & (steps < BEFORE + DURING), RATIOS, 1.0)
    threshold = rule.rule if patience is None else thresholds.reset_after(rule.rule, patience)
    scope = scopes.element() if rule.scopes == ("element",) else scopes.tree()
    clip = optaxclip.clip(threshold, scope=scope, response=rule.response, record=False)
    seen = run(clip, gradients(noise(2, len(steps)) * levels, levels, np.ones(6, bool)), two_units)
    factors = seen.updates[:, :, 0, 0] / seen.grads[:, :, 0, 0]
    return [
        (*left_of(updates, level, rule), own)
        for updates, level, own in zip(seen.updates, levels, factors, strict=True)
    ]


@pytest.mark.parametrize("name", [name for name in RULES if name not in VARIANTS])
def test_with_patience_a_lasting_change_is_accepted_both_ways(name):
    rule, up, down = RULES[name], slice(BEFORE, BEFORE + DURING), slice(BEFORE + DURING, None)
    # The limit of this rule has no unit, so that no size is over it or under it; it follows by
    # itself.
    patience = None if rule.response is responses.normalize else rule.patience
    for ratio, (spikes, ordinary, factors) in zip(
        RATIOS.ravel(), up_and_down(name, patience), strict=True
    ):
        assert healed_after(rule, spikes[60:BEFORE], ordinary[60:BEFORE]) == 0
        assert healed_after(rule, spikes[up], ordinary[up]) <= rule.patience + rule.knows
        if rule.after_fall is None:
            assert (ordinary[down] >= rule.keeps).all() and (spikes[down] < 1.2 * ratio).all()
        else:
            assert healed_after(rule, spikes[down], ordinary[down]) <= rule.after_fall
        if patience is not None:
            means = [
                np.mean(factors[end - 50 : end])
                for end in (BEFORE, BEFORE + DURING, BEFORE + 2 * DURING)
            ]
            assert min(means) > means[0] - 0.05


def test_without_patience_zscore_never_accepts_a_lasting_change_to_three_times_the_level():
    for ratio, (_, ordinary, _) in zip(RATIOS.ravel(), up_and_down("zscore", None), strict=True):
        assert (ordinary[BEFORE : BEFORE + DURING] < 1.2 / ratio).all()


# Defects of today's libraries


def through(clip, sizes, tree=lambda size: size * jnp.array([0.6, 0.8])):
    """Sizes after clipping, one after the other, and the last state."""

    def step(state, size):
        updates, state = clip.update(tree(size), state)
        return state, jax.tree.map(jnp.linalg.norm, updates)

    state, sizes = jax.jit(lambda sizes: jax.lax.scan(step, clip.init(tree(sizes[0])), sizes))(
        jnp.float32(sizes)
    )
    return sizes, state


def test_zclip_after_nan_clips_spikes_where_the_reference_lets_them_pass_for_ever():
    sizes, state = through(optaxclip.zclip(), [*noise(0, 40), np.nan, np.inf, 1e6, 100, 1])
    np.testing.assert_array_equal(np.isnan(sizes[40:42]), True)
    assert (sizes[42:44] < 1.3).all() and sizes[44] == pytest.approx(1)
    assert state.reading.nonfinite_steps == 2


# A deviation counts as a thousandth of the mean at least, and as 1e-4 in logarithms.
@pytest.mark.parametrize(
    "make, more",
    [(optaxclip.zclip, 1.002), (optaxclip.history_clip, 1.002), (optaxclip.log_norm_clip, 1.0001)],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_constant_size_and_a_little_more_are_no_spike(make, more):
    levels = np.float32([1.0, 1.7, 3.3, 7.77, 1000.0])
    stream = np.r_[np.ones(200), 1 + 1e-7, more, 1.0, 100.0]
    sizes = jax.vmap(lambda level: through(make(), level * stream)[0])(levels) / levels[:, None]
    np.testing.assert_allclose(sizes[:, :-1], np.broadcast_to(stream[:-1], (5, 203)), rtol=1e-6)
    assert (sizes[:, -1] < 1.3).all()


def test_autoclip_after_nan_goes_on_where_the_reference_says_nan_for_ever():
    for clip in optaxclip.autoclip(), optaxclip.autoclip(0.9, window=20):
        sizes, _ = through(clip, [*noise(0, 30), np.nan, *noise(1, 30), 100.0])
        assert np.isnan(sizes[30]) and np.isfinite(sizes[31:]).all()
        assert (sizes[31:-1] > 0.6).all() and sizes[-1] < 1.5


def test_history_clip_after_nan_clips_three_large_ones_where_levanter_clips_none():
    sizes, _ = through(optaxclip.history_clip(), [*noise(0, 80), np.nan, 1e6, 1e6, 1e6, 1.0])
    assert (sizes[81:84] < 1.5).all() and sizes[84] == pytest.approx(1)


def test_stabilize_gradient_after_nan_goes_on_where_the_reference_says_nan_for_ever():
    sizes, _ = through(
        optaxclip.gradient_stabilizer(), [*noise(0, 30), np.nan, np.inf, 1e30, *noise(1, 30)]
    )
    np.testing.assert_allclose(sizes[33:], 1, atol=0.2)


def test_adagc_and_a_zero_gradient_in_warm_up_where_another_library_ends_with_limit_zero():
    sizes, _ = through(optaxclip.adagc(warmup=20), np.where(np.arange(60) == 5, 0, noise(0, 60)))
    assert sizes[5] == 0 and (sizes[20:] > 0.6).all()


def test_adagc_and_a_leaf_whose_gradients_come_only_after_warm_up():
    late = np.where(np.arange(60) < 20, 0, noise(0, 60))
    sizes = np.stack([noise(1, 60), late], 1)
    sizes[-1, 1] = 100.0
    sizes, _ = through(
        optaxclip.adagc(warmup=10, max_norm=2.0),
        sizes,
        lambda both: {"used": both[:1], "unused": both[1:]},
    )
    assert (sizes["unused"][:20] == 0).all() and (sizes["unused"][20:] >= 0.6 * late[20:]).all()
    assert sizes["unused"][-1] < 1.3 and (sizes["used"] > 0.6).all()


def test_growth_after_zero_goes_on_where_the_reference_starts_from_1e_8():
    sizes, _ = through(optaxclip.growth_clip(), [1.0, 0.0, 0.0, 1.0])
    np.testing.assert_allclose(sizes, [1, 0, 0, 1], rtol=1e-6)


LEVEL_SHIFTS = {
    "zclip with patience": optaxclip.clip(
        thresholds.reset_after(thresholds.zscore(), 30), scopes.tree()
    ),
    "history_clip": optaxclip.history_clip(),
    "log_norm_clip": optaxclip.log_norm_clip(),
    "quantile_clip": optaxclip.quantile_clip(),
    "ema times 5": optaxclip.clip(thresholds.ema(5.0), scopes.tree()),
}


@pytest.mark.parametrize("clip", LEVEL_SHIFTS.values(), ids=list(LEVEL_SHIFTS))
def test_ten_times_the_size_for_good_is_accepted_where_others_drop_all_later_steps(clip):
    stream = noise(0, 200) * np.where(np.arange(200) < 100, 1, 10)
    sizes, _ = through(clip, stream)
    np.testing.assert_allclose(sizes[150:].mean(), stream[150:].mean(), rtol=0.03)


@pytest.mark.parametrize("scope", [scopes.tree(), scopes.leaf(), scopes.unit(), scopes.element()])
def test_a_rule_learns_the_limit_of_what_a_response_drops_and_not_zero(scope):
    last = Threshold(
        init=lambda sizes: jnp.full_like(sizes, jnp.inf),
        limit=lambda sizes, state, context: 2 * state,
        learn=lambda sizes, clipped_sizes, state, context: clipped_sizes,
    )
    clip = optaxclip.clip(last, scope=scope, response=responses.drop)
    grads = {"a": jnp.array([[3.0, 0.0], [4.0, 2.0]]), "b": jnp.array(1.0)}
    state = clip.init(grads)
    passed = []
    for scale in 1.0, 5.0, 2.0:
        updates, state = clip.update(jax.tree.map(lambda x, scale=scale: scale * x, grads), state)
        passed.append(bool(updates["a"][0, 0] == scale * 3))
    assert passed == [True, False, True]
