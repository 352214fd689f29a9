import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import optaxclip
from optaxclip import Context, Threshold, scopes, thresholds
from optaxclip.thresholds import fixed
from optaxclip.thresholds.combine import observed, side_by_side

SIZES = jnp.array([0.5, 2.0])
COUNTING = Threshold(
    jnp.zeros_like,
    lambda sizes, state, context: state,
    lambda sizes, clipped, state, context: state + 1,
)
# The sum of sizes and of clipped sizes so far; the limit is one more than the former.
ADDING = Threshold(
    init=lambda sizes: jnp.zeros((2, *sizes.shape)),
    limit=lambda sizes, state, context: 1 + state[0],
    learn=lambda sizes, clipped_sizes, state, context: state + jnp.stack([sizes, clipped_sizes]),
)


def limits(rule, step=0, sizes=SIZES, params=None, state=None):
    state = rule.init(sizes) if state is None else state
    return np.broadcast_to(
        rule.limit(sizes, state, Context(jnp.asarray(step), params)), sizes.shape
    ).tolist()


def run(clip, stream, params=None):
    """States after each of the updates in `stream`."""
    states = [clip.init(stream[0])]
    for updates in stream:
        states.append(clip.update(updates, states[-1], params)[1])
    return states[1:]


def test_a_constant_is_the_same_for_all():
    for value in 1.5, np.float64(1.5), np.float32(1.5), jnp.array(1.5), np.array(1.5):
        assert limits(fixed.constant(value)) == limits(fixed.constant(value), step=9) == [1.5, 1.5]
    assert limits(fixed.constant(2)) == [2, 2]
    assert limits(fixed.constant(0)) == [0, 0]
    assert limits(fixed.constant(float("inf"))) == [np.inf, np.inf]


def test_a_schedule_gets_the_number_of_completed_updates():
    assert [limits(fixed.scheduled(lambda step: 10.0 - step), step)[0] for step in range(3)] == [
        10,
        9,
        8,
    ]
    clip = optaxclip.clip(lambda step: 10.0 - step, scopes.tree())
    states = run(clip, [jnp.array([30.0, 40.0])] * 3)
    assert [state.reading.limit.tolist() for state in states] == [[10], [9], [8]]


@pytest.mark.parametrize("bad", [-1.0, float("nan"), -float("inf")])
def test_a_scheduled_or_traced_limit_that_is_no_limit_counts_as_zero(bad):
    grads = jnp.array([3.0, 4.0])
    for threshold in (
        (lambda step: bad),
        thresholds.at_most(lambda step: bad, 1.0),
        thresholds.relative_to_params(lambda step: bad),
    ):
        clip = optaxclip.clip(threshold, scopes.tree())
        updates, state = clip.update(grads, clip.init(grads), grads)
        np.testing.assert_array_equal(updates, [0, 0])
        assert state.reading.limit.tolist() == [0]

    def update(limit):
        clip = optaxclip.clip(limit, scopes.tree())
        return clip.update(grads, clip.init(grads))[0]

    np.testing.assert_array_equal(jax.jit(update)(bad), [0, 0])


def test_a_relative_limit_is_a_share_of_the_parameters_and_of_no_less_than_the_floor():
    params = jnp.array([3.0, 1e-4])
    assert limits(thresholds.relative_to_params(0.5), params=params) == pytest.approx([1.5, 5e-4])
    assert limits(thresholds.relative_to_params(0.5, floor=0.2), params=params) == pytest.approx(
        [1.5, 0.1]
    )
    assert limits(thresholds.relative_to_params(0.5, floor=0), params=params) == pytest.approx(
        [1.5, 5e-5]
    )
    assert limits(
        thresholds.relative_to_params(lambda step: 0.1 * step), 5, params=params
    ) == pytest.approx([1.5, 5e-4])
    assert limits(
        thresholds.relative_to_params(thresholds.join([0.1, 0.5], [3])), 3, params=params
    ) == pytest.approx([1.5, 5e-4])


def test_a_relative_limit_asks_for_parameters_and_passes_that_on():
    relative = thresholds.relative_to_params(0.5)
    assert relative.uses_params and not fixed.constant(1.0).uses_params
    for rule in (
        thresholds.at_most(1.0, relative),
        thresholds.join([relative, 1.0], [2]),
        side_by_side([COUNTING, relative]),
    ):
        assert rule.uses_params
    assert not thresholds.at_least(1.0, 2.0).uses_params
    assert observed(relative).uses_params


def test_a_relative_rule_learns_what_its_ratio_learns():
    rule = thresholds.relative_to_params(COUNTING)
    state = rule.learn(SIZES, SIZES, rule.init(SIZES), Context(jnp.array(0), SIZES))
    assert limits(rule, params=jnp.array([3.0, 4.0]), state=state) == [3, 4]


def test_switch_changes_the_rule_after_that_many_updates():
    rule = thresholds.join([0.1, lambda step: 1.0 * step], [2])
    assert [limits(rule, step)[0] for step in range(4)] == pytest.approx([0.1, 0.1, 2, 3])
    assert [limits(thresholds.join([0.1, 1.0], [0]), step)[0] for step in range(2)] == [1, 1]


def test_both_sides_of_a_switch_learn_from_the_first_step():
    clip = optaxclip.clip(thresholds.join([COUNTING, ADDING], [2]), scopes.tree())
    states = run(clip, [jnp.array([3.0, 4.0])] * 3)
    assert [state.reading.limit.item() for state in states] == [0, 1, 11]
    assert [state.threshold[0].item() for state in states] == [1, 2, 3]
    np.testing.assert_allclose(
        [state.threshold[1][:, 0] for state in states], [[5, 0], [10, 1], [15, 6]]
    )


def test_at_most_is_the_smaller_and_at_least_the_larger():
    rising = fixed.scheduled(lambda step: 1.0 * step)
    assert [limits(thresholds.at_most(rising, 1.5), step)[0] for step in range(4)] == [
        0,
        1,
        1.5,
        1.5,
    ]
    assert [limits(thresholds.at_least(rising, 1.5), step)[0] for step in range(4)] == [
        1.5,
        1.5,
        2,
        3,
    ]
    assert limits(thresholds.at_most(thresholds.at_least(rising, 1.0), 2.0), 3) == [2, 2]
    for combine in thresholds.at_most, thresholds.at_least:
        assert limits(combine(ADDING, COUNTING), sizes=SIZES) == limits(
            combine(COUNTING, ADDING), sizes=SIZES
        )
        (state,) = run(
            optaxclip.clip(combine(COUNTING, ADDING), scopes.tree()), [jnp.array([0.3, 0.4])]
        )
        assert state.threshold[0].item() == 1 and state.threshold[1][0].item() == pytest.approx(0.5)


def test_rules_learn_the_raw_and_the_clipped_size():
    states = run(optaxclip.clip(ADDING, scopes.tree()), [jnp.array([3.0, 4.0])] * 2)
    assert [state.reading.limit.item() for state in states] == pytest.approx([1, 6])
    np.testing.assert_allclose(
        [state.threshold[:, 0] for state in states], [[5, 1], [10, 6]], rtol=1e-6
    )


def test_what_is_meant_by_a_threshold():
    rule = fixed.constant(1.0)
    assert fixed.as_threshold(rule) is rule
    for one in 1.0, np.float32(1), jnp.array(1.0), lambda step: 1.0, optax.constant_schedule(1.0):
        assert limits(fixed.as_threshold(one)) == [1, 1]
        assert limits(fixed.as_thresholds(one)) == [1, 1]
    several = fixed.as_thresholds({"a": 1.0, "b": lambda step: 2.0, "c": rule})
    assert {name: limits(rule) for name, rule in several.items()} == {
        "a": [1, 1],
        "b": [2, 2],
        "c": [1, 1],
    }


def test_a_lower_bound_is_a_limit_of_the_other_sign():
    assert limits(fixed.negated(-2.0, name="low")) == [2, 2]
    assert limits(fixed.negated(0, name="low")) == [0, 0]
    assert limits(fixed.negated(-float("inf"), name="low")) == [np.inf, np.inf]
    assert limits(fixed.negated(lambda step: -1.0 - step, name="low"), step=2) == [3, 3]


# What is no observation


@pytest.mark.parametrize("bad", [0.0, jnp.nan, jnp.inf])
@pytest.mark.parametrize("shape", [(3,), (1, 3), (3, 1, 1)])
def test_a_size_that_is_zero_or_not_finite_leaves_its_state_and_no_other(bad, shape):
    rule = observed(ADDING)
    sizes = jnp.array([1.0, bad, 2.0]).reshape(shape)
    state = rule.learn(sizes, sizes / 2, rule.init(sizes) + 7, Context(jnp.array(0)))
    np.testing.assert_array_equal(state[0].ravel(), [8, 7, 9])
    np.testing.assert_array_equal(state[1].ravel(), [7.5, 7, 8])


def test_a_rule_is_not_even_shown_what_is_no_observation():
    remembering = COUNTING._replace(
        learn=lambda sizes, clipped, state, context: state + jnp.sum(jnp.log(sizes * clipped))
    )
    sizes = jnp.array([1.0, 0.0, jnp.nan, jnp.inf])
    state = observed(remembering).learn(sizes, sizes, jnp.zeros(4), Context(jnp.array(0)))
    np.testing.assert_array_equal(state, [0, 0, 0, 0])


def test_a_learned_state_keeps_its_dtype():
    integers = COUNTING._replace(
        init=lambda sizes: jnp.zeros(sizes.shape, jnp.int32),
        learn=lambda s, c, state, context: state + s,
    )
    assert (
        observed(integers).learn(SIZES, SIZES, integers.init(SIZES), Context(jnp.array(0))).dtype
        == jnp.int32
    )


@pytest.mark.parametrize("scope", [scopes.leaf(), scopes.unit(), scopes.element()])
@pytest.mark.parametrize("bad", [0.0, jnp.nan, jnp.inf])
def test_in_every_scope_what_is_no_observation_leaves_the_state(bad, scope):
    clip = optaxclip.clip(COUNTING, scope=scope)
    good = {"a": jnp.ones((2, 2)), "b": jnp.ones(3)}
    states = run(clip, [good, {"a": jnp.full((2, 2), bad), "b": jnp.ones(3)}, good])
    counts = [
        [int(x) for x in jax.tree.leaves(state.threshold) for x in np.unique(x)] for state in states
    ]
    assert counts == ([[1], [1, 2], [2, 3]] if scope.axes is None else [[1, 1], [1, 2], [2, 3]])


# Limits by group

GRADS = {"body": {"a": jnp.array([3.0]), "b": jnp.array([4.0])}, "head": jnp.array([6.0, 8.0])}
BY_LAYER = scopes.group(lambda path: path.split("/")[0])


def test_a_dict_gives_each_group_its_limit():
    clip = optaxclip.clip({"head": lambda step: 2.0 + step, "body": 1.0}, scope=BY_LAYER)
    state = clip.init(GRADS)
    for head in 0.2, 0.3:
        updates, state = clip.update(GRADS, state)
        np.testing.assert_allclose(updates["body"]["b"], [0.8], rtol=1e-6)
        np.testing.assert_allclose(updates["head"], head * GRADS["head"], rtol=1e-6)


def test_rules_in_a_dict_learn_each_from_its_own_group():
    clip = optaxclip.clip(
        {"body": ADDING, "head": thresholds.join([COUNTING, ADDING], [1])}, scope=BY_LAYER
    )
    states = run(clip, [GRADS, {**GRADS, "head": jnp.zeros(2)}, GRADS])
    body, (count, total) = states[-1].threshold
    np.testing.assert_allclose(body[:, 0], [15, 1 + 5 + 5], rtol=1e-6)
    assert count.tolist() == [2] and total[0].tolist() == [20]
    assert [state.reading.limit.tolist() for state in states] == [[1, 0], [6, 11], [11, 11]]


def test_relative_limits_in_a_dict_see_the_parameters_of_their_own_group():
    params = {
        "body": {"a": jnp.array([0.3]), "b": jnp.array([0.4])},
        "head": jnp.array([100.0, 0.0]),
    }
    clip = optaxclip.clip(
        {"body": thresholds.relative_to_params(2.0), "head": thresholds.relative_to_params(0.05)},
        scope=BY_LAYER,
    )
    (state,) = run(clip, [GRADS], params)
    np.testing.assert_allclose(state.reading.limit, [1.0, 5.0], rtol=1e-6)
    clip = optaxclip.clip(
        {"body": 7.0, "head": thresholds.relative_to_params(0.05)}, scope=BY_LAYER
    )
    np.testing.assert_allclose(run(clip, [GRADS], params)[0].reading.limit, [7.0, 5.0], rtol=1e-6)


@pytest.mark.parametrize("scope", [scopes.leaf(), scopes.unit(), scopes.element()])
def test_a_dict_goes_by_path_in_scopes_of_leaves_and_finer(scope):
    clip = optaxclip.clip({"body/a": 1.0, "body/b": ADDING, "head": 2.0}, scope=scope)
    (state,) = run(clip, [GRADS])
    np.testing.assert_allclose(state.reading.limit, [1, 1, 2])
    np.testing.assert_allclose(jax.tree.leaves(state.threshold)[0].ravel(), [4, 1])


def test_groups_without_a_limit_and_limits_without_a_group_are_named():
    advice = r"no limit for the groups \['head'\]; add one for each, float\('inf'\) for no limit"
    with pytest.raises(ValueError, match=advice):
        optaxclip.clip({"body": 1.0}, scope=BY_LAYER).init(GRADS)
    advice = (
        r"limits for \['haed'\], but the tree has only the groups \['body', 'head'\]; "
        "remove or rename them"
    )
    with pytest.raises(ValueError, match=advice):
        optaxclip.clip({"body": 1.0, "haed": 1.0}, scope=BY_LAYER).init(GRADS)
    with pytest.raises(ValueError, match=r"only the groups \['tree'\]"):
        optaxclip.clip({"body": 1.0}, scopes.tree()).init(GRADS)
    assert optaxclip.clip({"tree": 1.0}, scopes.tree()).init(GRADS).reading.limit.shape == (1,)


def test_side_by_side_keeps_the_order():
    rule = side_by_side([fixed.constant(1.0), COUNTING, thresholds.relative_to_params(0.5)])
    sizes, params = jnp.array([5.0, 6.0, 7.0]), jnp.array([1.0, 2.0, 4.0])
    state = rule.learn(sizes, sizes, rule.init(sizes), Context(jnp.array(0), params))
    assert limits(rule, sizes=sizes, params=params, state=state) == [1, 1, 2]


# What is no spike, since it lasts: `reset_after`

HOLDING = thresholds.growth(1.0)  # nothing may be larger than what was let through before


def clipped(clip, sizes, params=None):
    """Updates of one step after the other, for gradients with one number in each group: `[steps,
    groups]`.
    """
    sizes = np.float32(sizes).reshape(len(sizes), -1)
    groups = [f"{i}" for i in range(sizes.shape[1])]
    state, update, rows = (
        clip.init({name: jnp.zeros(1) for name in groups}),
        jax.jit(clip.update),
        [],
    )
    for row in sizes:
        updates, state = update(dict(zip(groups, row[:, None], strict=True)), state, params)
        rows.append([updates[name].item() for name in groups])
    return np.array(rows).squeeze()


def reset_after(rule, patience, **options):
    return optaxclip.clip(
        thresholds.reset_after(rule, patience), **{"scope": scopes.tree(), **options}
    )


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_what_was_over_the_limit_so_many_times_in_a_row_is_let_through_from_then_on(patience):
    assert clipped(reset_after(HOLDING, patience), [1, *[10] * 8]).tolist() == [1] * (
        1 + patience
    ) + [10] * (8 - patience)


def test_only_sizes_in_a_row_count():
    clip = reset_after(HOLDING, 3)
    assert clipped(clip, [1, *[10, 10, 1] * 4]).tolist() == [1] * 13
    assert clipped(clip, [1, 10, 10, 1, 10, 10, 10, 10, 10, 1]).tolist() == [
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        10,
        10,
        1,
    ]
    assert clipped(clip, [1, 10, 10, 10, 10, 100, 100, 100, 100]).tolist() == [
        1,
        1,
        1,
        1,
        10,
        10,
        10,
        10,
        100,
    ]


def test_a_size_at_the_limit_is_not_over_it():
    clip = reset_after(2.0, 3)
    state = run(clip, [jnp.array([2.0])] * 5)[-1]
    assert state.threshold[1].tolist() == [0]
    assert [state.threshold[1].item() for state in run(clip, [jnp.array([2.1])] * 5)] == [
        1,
        2,
        0,
        1,
        2,
    ]


def test_what_is_no_observation_neither_counts_nor_breaks_the_row():
    sizes = clipped(reset_after(HOLDING, 3), [1, 10, 0, 10, np.nan, np.inf, 10, 0, 10])
    np.testing.assert_array_equal(sizes, [1, 1, 0, 1, np.nan, np.nan, 1, 0, 10])


@pytest.mark.parametrize("scope", [scopes.leaf(), scopes.unit()])
def test_each_group_has_its_own_patience(scope):
    sizes = np.array(
        [[1, 1, 1], [10, 10, 1], [10, 10, 1], [10, 1, 10], [10, 10, 10], [10, 10, 10], [10, 10, 10]]
    )
    expected = [[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1], [10, 1, 1], [10, 1, 1], [10, 1, 10]]
    assert clipped(reset_after(HOLDING, 3, scope=scope), sizes).tolist() == expected


def test_the_rule_starts_afresh_from_the_raw_size():
    clip = reset_after(ADDING, 2)
    states = run(clip, [jnp.array([size]) for size in (3.0, 9.0, 30.0, 50.0)])
    np.testing.assert_allclose([state.reading.limit.item() for state in states], [1, 4, 10, 40])
    # The second and the fourth are each the second in a row that was over the limit.
    known = [state.threshold[0][:, 0].tolist() for state in states]
    assert known == [[3, 1], [9, 9], [39, 19], [50, 50]]


def test_what_a_patient_rule_knows_has_the_dtypes_of_its_start():
    for rule in (
        thresholds.zscore(warmup=1),
        thresholds.quantile(0.5, 3),
        thresholds.quantile_sketch(0.5),
    ):
        clip = reset_after(rule, 1)
        states = run(clip, [jnp.array([size]) for size in (1.0, 1.0, 50.0, 50.0)])
        kinds = [
            jax.tree.map(lambda x: (x.shape, x.dtype), state.threshold)
            for state in (clip.init(jnp.zeros(1)), *states)
        ]
        assert all(kind == kinds[0] for kind in kinds)


def test_patience_takes_any_threshold_and_any_rule_takes_patience():
    sizes = [1, *[10] * 5]
    patience = thresholds.reset_after(HOLDING, 2)
    for threshold, expected in (
        (thresholds.reset_after(2.0, 2), [1, 2, 2, 2, 2, 2]),
        (thresholds.reset_after(lambda step: 2.0 + step, 2), [1, 3, 4, 5, 6, 7]),
        (thresholds.reset_after(thresholds.at_most(HOLDING, 5.0), 2), [1, 1, 1, 5, 5, 5]),
        (thresholds.at_most(patience, 5.0), [1, 1, 1, 5, 5, 5]),
        (thresholds.at_least(patience, 4.0), [1, 4, 4, 10, 10, 10]),
        (
            thresholds.reset_after(thresholds.join([0.5, HOLDING], [2]), 3),
            [0.5, 0.5, 0.5, 10, 10, 10],
        ),
        (thresholds.join([0.5, patience], [2]), [0.5, 0.5, 0.5, 10, 10, 10]),
        (thresholds.reset_after(patience, 9), [1, 1, 1, 10, 10, 10]),
        ({"0": patience}, [1, 1, 1, 10, 10, 10]),
    ):
        assert clipped(optaxclip.clip(threshold, scope=scopes.leaf()), sizes).tolist() == expected


def test_a_patient_rule_sees_the_parameters_if_its_own_does():
    assert (
        thresholds.reset_after(thresholds.relative_to_params(0.5), 2).uses_params
        and not thresholds.reset_after(1.0, 2).uses_params
    )
    clip = optaxclip.clip(
        thresholds.reset_after(thresholds.relative_to_params(HOLDING), 2), scope=scopes.leaf()
    )
    assert clipped(clip, [3, 10, 10, 10], {"0": jnp.array([2.0])}).tolist() == [3, 6, 10, 10]


# What is no observation, unless it lasts: `ignore_outliers`

FACTS = thresholds.ignore_outliers(
    ADDING._replace(limit=lambda sizes, state, context: jnp.full_like(sizes, 0.5))
)


LEARN = jax.jit(lambda sizes, state: FACTS.learn(sizes, sizes / 2, state, Context(jnp.array(0))))


def learned(sizes):
    """States after each of the sizes `[steps, groups]`, all clipped to half of them."""
    sizes = np.float32(sizes).reshape(len(sizes), -1)
    states = [FACTS.init(jnp.asarray(sizes[0]))]
    for size in sizes:
        states.append(LEARN(size, states[-1]))
    return [jax.tree.map(np.asarray, state) for state in states[1:]]


@pytest.mark.parametrize(
    "size, far",
    [
        (1e4, False),
        (1.01e4, True),
        (1e30, True),
        (3e38, True),
        (1e-4, False),
        (0.99e-4, True),
        (1e-30, True),
    ],
)
def test_far_is_more_than_ten_thousand_times_off(size, far):
    before, after = learned([1, size])
    assert (after[0][0, 0] == before[0][0, 0]) == far
    assert after[2].item() == int(far)


def test_the_first_size_is_never_far():
    for size in 1e-30, 1.0, 1e30:
        ((known, usual, streak),) = learned([size])
        assert known[:, 0].tolist() == [np.float32(size), np.float32(size) / 2]
        assert usual.item() == np.float32(size) and streak.item() == 0


@pytest.mark.parametrize("far", [1e6, 1e-6])
def test_what_is_far_changes_nothing_until_it_is_ten_in_a_row(far):
    states = learned([1, 2, *[far] * 9, 2, *[far] * 12])
    for known, usual, _ in states[2:11]:
        np.testing.assert_array_equal(known, states[1][0])
        np.testing.assert_array_equal(usual, states[1][1])
    assert [streak.item() for *_, streak in states] == [
        0,
        0,
        *range(1, 10),
        0,
        *range(1, 10),
        0,
        0,
        0,
    ]
    np.testing.assert_allclose([known[:, 0] for known, *_ in states[19:21]], [[5, 2.5]] * 2)
    # With the tenth it starts afresh, from the raw size; the next ones are ordinary again, and
    # clipped.
    np.testing.assert_allclose(
        [known[:, 0] / far for known, *_ in states[21:]], [[1, 1], [2, 1.5], [3, 2]], rtol=1e-6
    )


def test_what_is_far_is_so_for_each_group():
    sizes = np.ones((12, 3))
    sizes[1:, 0], sizes[1:11:2, 1] = 1e6, 1e6
    known, usual, streak = learned(sizes)[-1]
    np.testing.assert_allclose(known[0], [2e6, 7, 12])
    assert streak.tolist() == [0, 0, 0] and usual.tolist() == [1e6, 1, 1]


def test_the_usual_follows_by_a_factor_of_two_at_most():
    sizes = [1, 100, 100, 3, 1e-2, 1e-2, 0.5]
    assert [usual.item() for _, usual, _ in learned(sizes)] == [1, 2, 4, 3, 1.5, 0.75, 0.5]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    ordinary=st.lists(st.floats(0.5, 2, width=32), min_size=2, max_size=12),
    far=st.lists(
        st.lists(st.sampled_from([1e-30, 1e-6, 1e6, 1e30]), max_size=9), min_size=12, max_size=12
    ),
)
def test_a_stream_teaches_the_same_without_what_is_far(ordinary, far):
    stream = [[size, *outliers] for size, outliers in zip(ordinary, far, strict=False)]
    (*known, _), (*expected, _) = learned(np.concatenate(stream))[-1], learned(ordinary)[-1]
    np.testing.assert_array_equal(known[0], expected[0])
    np.testing.assert_array_equal(known[1], expected[1])


def test_a_plausible_rule_has_the_limit_and_the_needs_of_its_own():
    rule = thresholds.ignore_outliers(thresholds.relative_to_params(COUNTING))
    assert rule.uses_params and not FACTS.uses_params
    state = rule.learn(SIZES, SIZES, rule.init(SIZES), Context(jnp.array(0), SIZES))
    assert limits(rule, params=jnp.array([3.0, 4.0]), state=state) == [3, 4]


# One factor for all: `by_global_norm`

LEAVES = {"a": np.float32([[3, -4], [1, 0]]), "b": np.float32([12, 0.1, 7]), "c": np.float32(2)}


def scaled(scale):
    return jax.tree.map(lambda x: jnp.asarray(scale * x), LEAVES)


@pytest.mark.parametrize(
    "threshold",
    [0.0, 1.0, 14.5, 15.0, 1e6, optax.constant_schedule(3.0), float("inf")],
    ids=lambda x: str(x)[:9],
)
@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e3, 1e30])
def test_jointly_the_leaves_are_clipped_by_the_global_norm(threshold, scale):
    limit = threshold if callable(threshold) else threshold * scale
    jointly, globally = (
        optaxclip.clip(thresholds.by_global_norm(limit), scope=scopes.leaf()),
        optaxclip.clip_by_global_norm(limit),
    )
    grads = scaled(scale)
    updates, expected = (clip.update(grads, clip.init(grads))[0] for clip in (jointly, globally))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), updates, expected)


@pytest.mark.parametrize(
    "scope",
    [scopes.unit(), scopes.element(), scopes.leaf(batch_axes=0)],
    ids=["unit", "element", "0"],
)
def test_at_scopes_finer_than_a_leaf_there_is_one_factor_too(scope):
    grads = {"w": jnp.array([[3.0, 1.0], [0.0, 4.0]]), "v": jnp.array([[1.0, 0.0], [0.0, 3.0]])}
    clip = optaxclip.clip(thresholds.by_global_norm(2.0), scope=scope)
    updates, _ = clip.update(grads, clip.init(grads))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y / 3, rtol=1e-6), updates, grads)


def test_groups_of_a_dict_that_are_joint_share_one_norm():
    grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([8.0])}
    clip = optaxclip.clip(
        {"a": thresholds.by_global_norm(1.0), "b": thresholds.by_global_norm(2.0)},
        scope=scopes.leaf(),
    )
    updates, _ = clip.update(grads, clip.init(grads))
    norm = np.sqrt(3**2 + 4**2 + 8**2)
    np.testing.assert_allclose(updates["a"], np.array([3.0, 4.0]) / norm, rtol=1e-6)
    np.testing.assert_allclose(updates["b"], [8 * 2 / norm], rtol=1e-6)


def test_no_array_is_made_when_a_rule_is_looked_at(monkeypatch):
    monkeypatch.setattr(jnp, "zeros", None)
    # an array would start JAX, before its devices are chosen
    assert not thresholds.by_global_norm(1.0).uses_params


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_groups_that_are_not_finite_do_not_enter_the_joint_norm(bad):
    grads = {"a": jnp.array([3.0, 4.0]), "bad": jnp.array([1.0, bad]), "c": jnp.array([12.0])}
    clip = optaxclip.clip(thresholds.by_global_norm(1.3), scope=scopes.leaf())
    updates, _ = clip.update(grads, clip.init(grads))
    np.testing.assert_allclose(updates["a"], [0.3, 0.4], rtol=1e-6)
    np.testing.assert_allclose(updates["c"], [1.2], rtol=1e-6)
    assert np.isnan(updates["bad"]).all()


@pytest.mark.parametrize(
    "sizes",
    [
        [3e30, 4e30],
        [3e-30, 4e-30],
        [3e-37, 4e-37],
        [1.5e38, 2e38],
        [3e30, 4e-30],
        [0, 5],
        [0, 5e-30],
        [0, 0],
        [0, 3e38],
    ],
)
def test_joint_norms_are_right_to_the_ends_of_the_float_range(sizes):
    joint = np.hypot(*np.float64(sizes))
    for apply in lambda f: f, jax.jit:
        for share in 0.1, 0.9, 1.1:
            rule = thresholds.by_global_norm(share * joint)
            found = apply(lambda sizes, rule=rule: rule.limit(sizes, (), Context(jnp.array(0))))(
                jnp.float32(sizes)
            )
            np.testing.assert_allclose(
                np.float64(found), min(share, 1) * np.float64(sizes), rtol=1e-6
            )


def test_a_joint_norm_that_is_no_float_is_clipped_all_the_same():
    grads = {"a": jnp.array([3e38]), "b": jnp.array([3e38])}
    clip = optaxclip.clip(thresholds.by_global_norm(1.0), scope=scopes.leaf())
    updates, _ = clip.update(grads, clip.init(grads))
    np.testing.assert_allclose([updates["a"], updates["b"]], np.full((2, 1), 0.5**0.5), rtol=1e-6)


@pytest.mark.parametrize(
    "rule",
    [thresholds.ema(), thresholds.relative_to_params(1.0), thresholds.at_most(1.0, COUNTING)],
)
def test_what_is_applied_jointly_may_not_learn_or_use_the_parameters(rule):
    with pytest.raises(
        TypeError,
        match="^threshold must be the same for all groups, got a rule that .*; pass a number or",
    ):
        thresholds.by_global_norm(rule)


def test_a_fallback_stands_in_where_a_rule_has_no_limit_yet():
    own = thresholds.ema(1.5, decay=0.5, warmup=2, start="least")
    clip = optaxclip.clip(
        thresholds.with_fallback(own, thresholds.by_global_norm(5.0)), scope=scopes.leaf()
    )
    stream = np.array([[6, 8], [1, 4], [3, 4.5], [30, 40]])
    # At most 5 jointly: 3 and 4, then 1 and 4, which are the least; then 1.5 times the averages, of
    # what is clipped.
    np.testing.assert_allclose(
        clipped(clip, stream), [[3, 4], [1, 4], [1.5, 4.5], [1.875, 6.375]], rtol=1e-6
    )


def test_a_leaf_that_wakes_late_falls_back_until_it_has_been_seen_often_enough():
    clip = optaxclip.clip(
        thresholds.with_fallback(thresholds.ema(warmup=2), thresholds.by_global_norm(5.0)),
        scope=scopes.leaf(),
    )
    stream = np.array([[1, 0], [1, 0], [1, 0], [1, 3e3], [1, 3], [1, 3e3]])
    np.testing.assert_allclose(clipped(clip, stream)[:, 1], [0, 0, 0, 5, 3, 1.05 * 4], rtol=1e-6)


def test_a_finite_limit_needs_no_fallback():
    assert limits(thresholds.with_fallback(1.0, 0.5)) == [1, 1]
    assert limits(thresholds.with_fallback(float("inf"), 0.5)) == [0.5, 0.5]
    assert limits(thresholds.with_fallback(float("inf"), float("inf"))) == [np.inf, np.inf]


# Arguments of rules that learn and of rules made of rules

NOT_NEGATIVE = [(-0.5, ValueError, r"must be in \[0, inf\], got -0\.5; pass a number inside")]
POSITIVE = [(0.0, ValueError, r"must be in \(0, inf\), got 0\.0; pass a number inside")]
SHARE = [
    (x, ValueError, rf"must be in \(0, 1\), got {x}; pass a number inside")
    for x in (0.0, 1.0, -0.1, 1.5)
]
NUMBER = [
    (np.nan, ValueError, r"must be in [\[\(]0, (inf|1)[\]\)], got nan; pass a number inside"),
    (np.ones(2), ValueError, r"must be one number, got an array of shape \(2,\); give groups"),
    ("0.5", TypeError, r"must be a real number, got '0\.5' \(str\); pass a float such as 1\.0"),
    (True, TypeError, r"must be a real number, got True \(bool\); pass a float such as 1\.0"),
]
COUNT = [
    (1.5, TypeError, r"must be an integer, got 1\.5 \(float\); pass a count such as 1"),
    (True, TypeError, r"must be an integer, got True \(bool\); pass a count such as 1"),
    (None, TypeError, r"must be an integer, got None \(NoneType\); pass a count such as 1"),
    (-1, ValueError, r"must be at least [01], got -1; pass a larger count"),
]
AT_LEAST_ONE = [*COUNT, (0, ValueError, "must be at least 1, got 0; pass a larger count")]
LIMIT = [
    *NUMBER,
    *NOT_NEGATIVE,
    (None, TypeError, r"must be a real number, got None \(NoneType\); pass a float such as 1\.0"),
]
ARGUMENTS = {
    thresholds.ema: {
        "factor": [*NUMBER, *NOT_NEGATIVE],
        "decay": [*NUMBER, *SHARE],
        "warmup": AT_LEAST_ONE,
        "start": [
            ("min", ValueError, "must be one of 'mean', 'least', got 'min'; choose one of these")
        ],
        "of": [
            ("all", ValueError, "must be one of 'clipped', 'raw', got 'all'; choose one of these")
        ],
    },
    thresholds.zscore: {
        "z": [*NUMBER, *NOT_NEGATIVE],
        "decay": [*NUMBER, *SHARE],
        "warmup": AT_LEAST_ONE,
        "option": [
            (
                "median",
                ValueError,
                "must be one of 'adaptive_scaling', 'mean', 'percentile', got 'median'; choose one",
            )
        ],
    },
    thresholds.log_zscore: {"deviations": [*NUMBER, *NOT_NEGATIVE], "decay": [*NUMBER, *SHARE]},
    thresholds.window_zscore: {
        "deviations": [*NUMBER, *NOT_NEGATIVE],
        "window": AT_LEAST_ONE,
        "warmup": [
            *AT_LEAST_ONE,
            (129, ValueError, "must be at most 128, got 129; pass a smaller count"),
        ],
    },
    thresholds.growth: {"factor": [*NUMBER, *NOT_NEGATIVE]},
    thresholds.rms_multiple: {
        "factor": [*NUMBER, *NOT_NEGATIVE],
        "decay": [*NUMBER, *SHARE],
        "warmup": COUNT,
    },
    thresholds.mean_to_rms: {"decay": [*NUMBER, *SHARE], "square_decay": [*NUMBER, *SHARE]},
    thresholds.quantile: {"q": [*NUMBER, *SHARE], "window": AT_LEAST_ONE},
    thresholds.quantile_sketch: {"q": [*NUMBER, *SHARE]},
    thresholds.quantile_tracker: {
        "q": [*NUMBER, *SHARE],
        "rate": [*NUMBER, *POSITIVE],
        "initial": [*NUMBER, *POSITIVE],
    },
    thresholds.join: {
        "thresholds": [
            (
                "1.0",
                TypeError,
                r"must be a list, got '1\.0' \(str\); pass one such as \[0\.1, 1\.0\]",
            )
        ],
        "boundaries": [
            (2, TypeError, r"must be a list, got 2 \(int\); pass one such as \[1000\]"),
            (
                [1, 2],
                ValueError,
                "must be one fewer than thresholds, got 2 for 2; pass the step at which each",
            ),
        ],
    },
    thresholds.at_most: {"threshold": LIMIT, "bound": LIMIT},
    thresholds.at_least: {"threshold": LIMIT, "bound": LIMIT},
    thresholds.with_fallback: {"threshold": LIMIT, "fallback": LIMIT},
    thresholds.times: {"factor": LIMIT, "threshold": LIMIT},
    thresholds.by_global_norm: {"threshold": LIMIT},
    thresholds.reset_after: {"threshold": LIMIT, "patience": AT_LEAST_ONE},
    thresholds.ignore_outliers: {
        "rule": [("1.0", TypeError, r"must be a (Threshold|real number), got '1\.0'.*; pass ")]
    },
}
REQUIRED = {
    "q": 0.5,
    "window": 128,
    "thresholds": [1.0, 2.0],
    "boundaries": [2],
    "threshold": 1.0,
    "bound": 2.0,
    "patience": 3,
    "fallback": 2.0,
    "factor": 2.0,
}
NEEDS_NO_CHECK = {"lagged"}  # true or false, whatever it is


def arguments(make, **given):
    """The arguments that a function requires, and those given."""
    required = {p.name for p in inspect.signature(make).parameters.values() if p.default is p.empty}
    return {**{name: value for name, value in REQUIRED.items() if name in required}, **given}


@pytest.mark.parametrize(
    "make, name, value, error, words",
    [
        (make, name, *one)
        for make, names in ARGUMENTS.items()
        for name, all in names.items()
        for one in all
    ],
    ids=lambda x: getattr(x, "__name__", None) or str(x)[:12],
)
def test_every_argument_of_a_rule_is_checked_when_it_is_made(make, name, value, error, words):
    with pytest.raises(error, match=f"^{name} {words}"):
        make(**arguments(make, **{name: value}))


def test_no_argument_of_a_rule_that_learns_is_left_out_above():
    made = {
        function
        for module in (thresholds.moments, thresholds.ranks, thresholds.combine)
        for name, function in vars(module).items()
        if inspect.isfunction(function)
        and function.__module__ == module.__name__
        and hasattr(thresholds, name)
    }
    assert made == set(ARGUMENTS)
    for make, names in ARGUMENTS.items():
        assert set(inspect.signature(make).parameters) - NEEDS_NO_CHECK == set(names), make


NUMBERS = [
    (make, name)
    for make, names in ARGUMENTS.items()
    for name, all in names.items()
    if all[: len(NUMBER)] == NUMBER
]


@pytest.mark.parametrize("make, name", NUMBERS, ids=lambda x: getattr(x, "__name__", x))
def test_a_number_may_be_traced(make, name):
    def limit(value):
        rule = make(**arguments(make, **{name: value}))
        state = rule.learn(SIZES, SIZES, rule.init(SIZES), Context(jnp.array(0)))
        return jnp.broadcast_to(rule.limit(10 * SIZES, state, Context(jnp.array(30))), SIZES.shape)

    np.testing.assert_allclose(jax.jit(limit)(0.25), limit(0.25), rtol=1e-6)


@pytest.mark.parametrize(
    "make, name", [one for one in NUMBERS if one[1] in ("factor", "z", "deviations")]
)
def test_an_infinite_multiple_never_clips_and_a_multiple_of_zero_is_never_nan(make, name):
    sizes = [1.0, 1.1, 0.9, 50.0, 2e3, 1.0]
    small = {"warmup": 1} if "warmup" in inspect.signature(make).parameters else {}
    assert (
        clipped(
            optaxclip.clip(make(**arguments(make, **{name: float("inf")}, **small)), scopes.tree()),
            sizes,
        ).tolist()
        == np.float32(sizes).tolist()
    )
    assert np.isfinite(
        clipped(
            optaxclip.clip(make(**arguments(make, **{name: 0.0}, **small)), scopes.tree()), sizes
        )
    ).all()


def test_every_threshold_and_boundary_that_is_joined_is_checked():
    with pytest.raises(TypeError, match=r"^thresholds\[1\] must be a real number, got 'a'"):
        thresholds.join([1.0, "a"], [2])
    with pytest.raises(
        ValueError, match=r"^boundaries must be in ascending order, got \[3, 2\]; sort them"
    ):
        thresholds.join([1.0, 2.0, 3.0], [3, 2])
    with pytest.raises(
        ValueError, match="^boundaries must be one fewer than thresholds, got 0 for 0"
    ):
        thresholds.join([], [])


def test_any_number_of_thresholds_can_be_joined():
    rule = thresholds.join([1.0, 2.0, lambda step: 1.0 * step, 5.0], boundaries=[2, 4, 6])
    assert [limits(rule, step)[0] for step in range(8)] == [1, 1, 2, 2, 4, 5, 5, 5]
    assert limits(thresholds.join([3.0], []), 9) == [3, 3]


def test_an_average_of_raw_sizes_follows_a_change_that_one_of_clipped_sizes_does_not():
    sizes = [1.0] * 20 + [10.0] * 60
    steps = {
        of: clipped(optaxclip.clip(thresholds.ema(1.1, decay=0.9, of=of), scopes.tree()), sizes)
        for of in ("raw", "clipped")
    }
    average, expected = 1.0, []
    for size in sizes:
        expected.append(min(size, 1.1 * average))
        average = 0.9 * average + 0.1 * size
    np.testing.assert_allclose(steps["raw"], expected, rtol=1e-5)
    assert steps["raw"][-1] == 10 and steps["clipped"][-1] < 3
