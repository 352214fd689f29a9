import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip
from optaxclip import Context, Threshold, scopes, thresholds
from optaxclip.thresholds.combine import observed, side_by_side

SIZES = jnp.array([0.5, 2.0])
COUNTING = Threshold(jnp.zeros_like, lambda sizes, state, context: state, lambda sizes, clipped, state, context: state + 1)
# The sum of sizes and of clipped sizes so far; the limit is one more than the former.
ADDING = Threshold(
    init=lambda sizes: jnp.zeros((2, *sizes.shape)),
    limit=lambda sizes, state, context: 1 + state[0],
    learn=lambda sizes, clipped_sizes, state, context: state + jnp.stack([sizes, clipped_sizes]),
)


def limits(rule, step=0, sizes=SIZES, params=None, state=None):
    state = rule.init(sizes) if state is None else state
    return np.broadcast_to(rule.limit(sizes, state, Context(jnp.asarray(step), params)), sizes.shape).tolist()


def run(clip, stream, params=None):
    """States after each of the updates in `stream`."""
    states = [clip.init(stream[0])]
    for updates in stream:
        states.append(clip.update(updates, states[-1], params)[1])
    return states[1:]


def test_a_constant_is_the_same_for_all():
    for value in 1.5, np.float64(1.5), np.float32(1.5), jnp.array(1.5), np.array(1.5):
        assert limits(thresholds.constant(value)) == limits(thresholds.constant(value), step=9) == [1.5, 1.5]
    assert limits(thresholds.constant(2)) == [2, 2]
    assert limits(thresholds.constant(0)) == [0, 0]
    assert limits(thresholds.constant(float("inf"))) == [np.inf, np.inf]


def test_a_schedule_gets_the_number_of_completed_updates():
    assert [limits(thresholds.scheduled(lambda step: 10.0 - step), step)[0] for step in range(3)] == [10, 9, 8]
    clip = optaxclip.clip(lambda step: 10.0 - step)
    states = run(clip, [jnp.array([30.0, 40.0])] * 3)
    assert [state.reading.limit.tolist() for state in states] == [[10], [9], [8]]


@pytest.mark.parametrize("bad", [-1.0, float("nan"), -float("inf")])
def test_a_scheduled_or_traced_limit_that_is_no_limit_counts_as_zero(bad):
    grads = jnp.array([3.0, 4.0])
    for threshold in (lambda step: bad), thresholds.at_most(lambda step: bad, 1.0), thresholds.relative(lambda step: bad):
        clip = optaxclip.clip(threshold)
        updates, state = clip.update(grads, clip.init(grads), grads)
        np.testing.assert_array_equal(updates, [0, 0])
        assert state.reading.limit.tolist() == [0]

    def update(limit):
        clip = optaxclip.clip(limit)
        return clip.update(grads, clip.init(grads))[0]

    np.testing.assert_array_equal(jax.jit(update)(bad), [0, 0])


def test_a_relative_limit_is_a_share_of_the_parameters_and_of_no_less_than_the_floor():
    params = jnp.array([3.0, 1e-4])
    assert limits(thresholds.relative(0.5), params=params) == pytest.approx([1.5, 5e-4])
    assert limits(thresholds.relative(0.5, floor=0.2), params=params) == pytest.approx([1.5, 0.1])
    assert limits(thresholds.relative(0.5, floor=0), params=params) == pytest.approx([1.5, 5e-5])
    assert limits(thresholds.relative(lambda step: 0.1 * step), 5, params=params) == pytest.approx([1.5, 5e-4])
    assert limits(thresholds.relative(thresholds.switch(3, 0.1, 0.5)), 3, params=params) == pytest.approx([1.5, 5e-4])


def test_a_relative_limit_asks_for_parameters_and_passes_that_on():
    relative = thresholds.relative(0.5)
    assert relative.uses_params and not thresholds.constant(1.0).uses_params
    for rule in thresholds.at_most(1.0, relative), thresholds.switch(2, relative, 1.0), side_by_side([COUNTING, relative]):
        assert rule.uses_params
    assert not thresholds.at_least(1.0, 2.0).uses_params
    assert observed(relative).uses_params


def test_a_relative_rule_learns_what_its_ratio_learns():
    rule = thresholds.relative(COUNTING)
    state = rule.learn(SIZES, SIZES, rule.init(SIZES), Context(jnp.array(0), SIZES))
    assert limits(rule, params=jnp.array([3.0, 4.0]), state=state) == [3, 4]


def test_switch_changes_the_rule_after_that_many_updates():
    rule = thresholds.switch(2, 0.1, lambda step: 1.0 * step)
    assert [limits(rule, step)[0] for step in range(4)] == pytest.approx([0.1, 0.1, 2, 3])
    assert [limits(thresholds.switch(0, 0.1, 1.0), step)[0] for step in range(2)] == [1, 1]


def test_both_sides_of_a_switch_learn_from_the_first_step():
    clip = optaxclip.clip(thresholds.switch(2, COUNTING, ADDING))
    states = run(clip, [jnp.array([3.0, 4.0])] * 3)
    assert [state.reading.limit.item() for state in states] == [0, 1, 11]
    assert [state.rules[0][0].item() for state in states] == [1, 2, 3]
    np.testing.assert_allclose([state.rules[0][1][:, 0] for state in states], [[5, 0], [10, 1], [15, 6]])


def test_at_most_is_the_smaller_and_at_least_the_larger():
    rising = thresholds.scheduled(lambda step: 1.0 * step)
    assert [limits(thresholds.at_most(rising, 1.5), step)[0] for step in range(4)] == [0, 1, 1.5, 1.5]
    assert [limits(thresholds.at_least(rising, 1.5), step)[0] for step in range(4)] == [1.5, 1.5, 2, 3]
    assert limits(thresholds.at_most(thresholds.at_least(rising, 1.0), 2.0), 3) == [2, 2]
    for combine in thresholds.at_most, thresholds.at_least:
        assert limits(combine(ADDING, COUNTING), sizes=SIZES) == limits(combine(COUNTING, ADDING), sizes=SIZES)
        (state,) = run(optaxclip.clip(combine(COUNTING, ADDING)), [jnp.array([0.3, 0.4])])
        assert state.rules[0][0].item() == 1 and state.rules[0][1][0].item() == pytest.approx(0.5)


def test_rules_learn_the_raw_and_the_clipped_size():
    states = run(optaxclip.clip(ADDING), [jnp.array([3.0, 4.0])] * 2)
    assert [state.reading.limit.item() for state in states] == pytest.approx([1, 6])
    np.testing.assert_allclose([state.rules[0][:, 0] for state in states], [[5, 1], [10, 6]], rtol=1e-6)


def test_what_is_meant_by_a_threshold():
    rule = thresholds.constant(1.0)
    assert thresholds.as_threshold(rule) is rule
    for one in 1.0, np.float32(1), jnp.array(1.0), lambda step: 1.0, optax.constant_schedule(1.0):
        assert limits(thresholds.as_threshold(one)) == [1, 1]
        assert limits(thresholds.as_thresholds(one)) == [1, 1]
    several = thresholds.as_thresholds({"a": 1.0, "b": lambda step: 2.0, "c": rule})
    assert {name: limits(rule) for name, rule in several.items()} == {"a": [1, 1], "b": [2, 2], "c": [1, 1]}


def test_a_lower_bound_is_a_limit_of_the_other_sign():
    assert limits(thresholds.negated(-2.0, name="low")) == [2, 2]
    assert limits(thresholds.negated(0, name="low")) == [0, 0]
    assert limits(thresholds.negated(-float("inf"), name="low")) == [np.inf, np.inf]
    assert limits(thresholds.negated(lambda step: -1.0 - step, name="low"), step=2) == [3, 3]


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
    remembering = COUNTING._replace(learn=lambda sizes, clipped, state, context: state + jnp.sum(jnp.log(sizes * clipped)))
    sizes = jnp.array([1.0, 0.0, jnp.nan, jnp.inf])
    state = observed(remembering).learn(sizes, sizes, jnp.zeros(4), Context(jnp.array(0)))
    np.testing.assert_array_equal(state, [0, 0, 0, 0])


def test_a_learned_state_keeps_its_dtype():
    integers = COUNTING._replace(
        init=lambda sizes: jnp.zeros(sizes.shape, jnp.int32), learn=lambda s, c, state, context: state + s
    )
    assert observed(integers).learn(SIZES, SIZES, integers.init(SIZES), Context(jnp.array(0))).dtype == jnp.int32


@pytest.mark.parametrize("scope", [scopes.leaf(), scopes.unit(), scopes.element()])
@pytest.mark.parametrize("bad", [0.0, jnp.nan, jnp.inf])
def test_in_every_scope_what_is_no_observation_leaves_the_state(bad, scope):
    clip = optaxclip.clip(COUNTING, scope=scope)
    good = {"a": jnp.ones((2, 2)), "b": jnp.ones(3)}
    states = run(clip, [good, {"a": jnp.full((2, 2), bad), "b": jnp.ones(3)}, good])
    counts = [[int(x) for rule in state.rules for x in np.unique(rule)] for state in states]
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
    clip = optaxclip.clip({"body": ADDING, "head": thresholds.switch(1, COUNTING, ADDING)}, scope=BY_LAYER)
    states = run(clip, [GRADS, {**GRADS, "head": jnp.zeros(2)}, GRADS])
    body, (count, total) = states[-1].rules[0]
    np.testing.assert_allclose(body[:, 0], [15, 1 + 5 + 5], rtol=1e-6)
    assert count.tolist() == [2] and total[0].tolist() == [20]
    assert [state.reading.limit.tolist() for state in states] == [[1, 0], [6, 11], [11, 11]]


def test_relative_limits_in_a_dict_see_the_parameters_of_their_own_group():
    params = {"body": {"a": jnp.array([0.3]), "b": jnp.array([0.4])}, "head": jnp.array([100.0, 0.0])}
    clip = optaxclip.clip({"body": thresholds.relative(2.0), "head": thresholds.relative(0.05)}, scope=BY_LAYER)
    (state,) = run(clip, [GRADS], params)
    np.testing.assert_allclose(state.reading.limit, [1.0, 5.0], rtol=1e-6)
    clip = optaxclip.clip({"body": 7.0, "head": thresholds.relative(0.05)}, scope=BY_LAYER)
    np.testing.assert_allclose(run(clip, [GRADS], params)[0].reading.limit, [7.0, 5.0], rtol=1e-6)


@pytest.mark.parametrize("scope", [scopes.leaf(), scopes.unit(), scopes.element()])
def test_a_dict_goes_by_path_in_scopes_of_leaves_and_finer(scope):
    clip = optaxclip.clip({"body/a": 1.0, "body/b": ADDING, "head": 2.0}, scope=scope)
    (state,) = run(clip, [GRADS])
    np.testing.assert_allclose(state.reading.limit, [1, 1, 2])
    np.testing.assert_allclose(jax.tree.leaves(state.rules)[0].ravel(), [4, 1])


def test_groups_without_a_limit_and_limits_without_a_group_are_named():
    advice = r"no limit for the groups \['head'\]; add one for each, float\('inf'\) for no limit"
    with pytest.raises(ValueError, match=advice):
        optaxclip.clip({"body": 1.0}, scope=BY_LAYER).init(GRADS)
    advice = r"limits for \['haed'\], but the tree has only the groups \['body', 'head'\]; remove or rename them"
    with pytest.raises(ValueError, match=advice):
        optaxclip.clip({"body": 1.0, "haed": 1.0}, scope=BY_LAYER).init(GRADS)
    with pytest.raises(ValueError, match=r"only the groups \['tree'\]"):
        optaxclip.clip({"body": 1.0}).init(GRADS)
    assert optaxclip.clip({"tree": 1.0}).init(GRADS).reading.limit.shape == (1,)


def test_side_by_side_keeps_the_order():
    rule = side_by_side([thresholds.constant(1.0), COUNTING, thresholds.relative(0.5)])
    sizes, params = jnp.array([5.0, 6.0, 7.0]), jnp.array([1.0, 2.0, 4.0])
    state = rule.learn(sizes, sizes, rule.init(sizes), Context(jnp.array(0), params))
    assert limits(rule, sizes=sizes, params=params, state=state) == [1, 1, 2]
