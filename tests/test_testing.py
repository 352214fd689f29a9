"""The checks for parts of others pass ours, and say of each broken one what is broken."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transforms import CASES, SCALERS

from optaxclip import Scope, Threshold, scopes, testing, thresholds
from optaxclip.thresholds import fixed

RULES = {
    "constant": fixed.constant(1.0),
    "scheduled": fixed.scheduled(optax.linear_schedule(1.0, 2.0, 3)),
    "relative": thresholds.relative_to_params(0.1),
    "at_most": thresholds.at_most(1.0, thresholds.ema(2.0)),
    "at_least": thresholds.at_least(1.0, thresholds.growth(1.1)),
    "switch": thresholds.join([1.0, thresholds.rms_multiple(2.0)], [3]),
    "patient": thresholds.reset_after(thresholds.zscore(), 3),
    "ema": thresholds.ema(2.0),
    "zscore": thresholds.zscore(),
    "log_zscore": thresholds.log_zscore(),
    "window_zscore": thresholds.window_zscore(),
    "growth": thresholds.growth(1.1),
    "rms_multiple": thresholds.rms_multiple(2.0),
    "quantile": thresholds.quantile(0.5, 4),
    "quantile_sketch": thresholds.quantile_sketch(0.5),
    "quantile_tracker": thresholds.quantile_tracker(0.5, 0.2),
}
SCOPES = [
    scopes.tree(),
    scopes.leaf(),
    scopes.leaf(batch_axes=0),
    scopes.unit(),
    scopes.element(),
    scopes.group(lambda p: p[0]),
]
# its moments take NaN, as those of Adam do
OURS = [case for case in CASES + SCALERS if case.name != "scale_by_stable_adam"]


@pytest.mark.parametrize("name", RULES)
def test_our_rules_pass(name):
    testing.check_threshold(RULES[name])


@pytest.mark.parametrize(
    "scope", SCOPES, ids=["tree", "leaf", "stacked", "unit", "element", "group"]
)
def test_our_scopes_pass(scope):
    testing.check_scope(scope)


@pytest.mark.parametrize("case", OURS, ids=[f"{case.name}-{i}" for i, case in enumerate(OURS)])
def test_our_transforms_pass(case):
    testing.check_transform(case.make(1.0), shrinks=case in CASES and case.name != "error_feedback")


def keep(sizes, clipped_sizes, state, context):
    return state


def limit(sizes, state, context):
    return state


def grow(sizes, clipped_sizes, state, context):
    return jnp.concatenate([state, sizes[None]])


BROKEN_RULES = {
    (
        "every array of the state must end in the shape of the sizes, .*3.*, but all of "
        "it is \\(\\).*zeros_like"
    ): Threshold(lambda sizes: jnp.zeros(()), limit, keep),
    "init must use only shape and dtype of the sizes, but .* depends on them": Threshold(
        lambda sizes: sizes, limit, keep
    ),
    (
        "limit must return numbers that broadcast against the sizes, .*, but got shape "
        ".*return one for each"
    ): Threshold(jnp.ones_like, lambda sizes, state, context: jnp.ones((7, *sizes.shape)), keep),
    (
        "limit must return numbers that broadcast against the sizes, .*, but got "
        "None; return one for each"
    ): Threshold(jnp.ones_like, lambda sizes, state, context: None, keep),
    "a rule must be a program for any numbers, but .*; choose with jnp.where": Threshold(
        jnp.ones_like, lambda sizes, state, context: state if context.step < 3 else 2 * state, keep
    ),
    "learn must return a state as init does, .*float32.*, but returned .*int32.*astype": Threshold(
        jnp.ones_like, limit, lambda sizes, clipped, state, context: jnp.ones_like(state, jnp.int32)
    ),
    (
        "learn must return a state as init does, .*, but returned .*keep the "
        "structure and every shape"
    ): Threshold(
        lambda sizes: jnp.ones((5, *sizes.shape)), lambda sizes, state, context: state[0], grow
    ),
    (
        "a limit must be at least 0, and inf .*, but before anything was learned limits "
        "were .*nan.*; return jnp.inf"
    ): Threshold(lambda sizes: sizes * jnp.nan, limit, keep),
    (
        "a limit must be at least 0, and inf .*, but after the sizes .*1.0, 3.0.* limits "
        "were .*-1.*; return jnp.inf"
    ): Threshold(
        jnp.ones_like,
        lambda sizes, state, context: jnp.where(context.step < 2, state, -state),
        keep,
    ),
    (
        "groups must not know of each other, but the limit of one was .* alone and .* "
        "beside others; .*elementwise"
    ): Threshold(jnp.ones_like, limit, lambda sizes, clipped, state, context: state + sizes.sum(0)),
    "jit must change nothing, but a limit was 1.0 without it and 2.0 with it": Threshold(
        jnp.ones_like,
        lambda sizes, state, context: state * (1 + isinstance(sizes, jax.core.Tracer)),
        keep,
    ),
    (
        "limits must have finite derivatives, but those by the sizes .* were "
        ".*(nan|inf).*; guard roots"
    ): Threshold(jnp.ones_like, lambda sizes, state, context: jnp.sqrt(sizes - sizes), keep),
}


@pytest.mark.parametrize("words", BROKEN_RULES)
def test_a_broken_rule_is_told_what_is_broken(words):
    with pytest.raises(AssertionError, match=words):
        testing.check_threshold(BROKEN_RULES[words])


def forgetful():
    names = iter("abcdefghijklmnopqrstuvwxyz")
    return Scope(group=lambda path: next(names))


BROKEN_SCOPES = {
    (
        "a scope must find the same groups every time, but found .*'a'.* and then "
        ".*'e'.*decide by path"
    ): forgetful(),
    (
        "the groups of .* must be the same under jit, but it became .* instead of .*decide by shape"
    ): Scope(
        axes=lambda path, leaf: () if isinstance(leaf, jax.core.Tracer) else tuple(range(leaf.ndim))
    ),
}


@pytest.mark.parametrize("words", BROKEN_SCOPES)
def test_a_broken_scope_is_told_what_is_broken(words):
    with pytest.raises(AssertionError, match=words):
        testing.check_scope(BROKEN_SCOPES[words])


def stateless(change):
    return optax.stateless(lambda updates, params: jax.tree.map(change, updates))


def of_floats(change):
    return stateless(lambda x: change(x) if jnp.issubdtype(x.dtype, jnp.inexact) and x.size else x)


def remembering(learn, *, dtype=jnp.float32):
    """Adds a memory to the updates, and learns from them."""

    def update(updates, state, params=None):
        return jax.tree.map(
            lambda x: x * jnp.where(state == state, 1, state).astype(x.dtype), updates
        ), learn(updates, state)

    return optax.GradientTransformation(lambda params: jnp.zeros((), dtype), update)


def only_floats(x):
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(x.dtype)
    return x


BROKEN_TRANSFORMS = {
    (
        "updates must keep structure, shapes, dtypes and weak types, .*bfloat16.*, but "
        "became .*float32.*cast back"
    ): of_floats(lambda x: x.astype(jnp.float32)),
    (
        "the state must keep structure, shapes, dtypes and weak types, .*int32.*, "
        "but became .*float32"
    ): remembering(lambda updates, state: state + 1.5, dtype=jnp.int32),
    "what is no float must pass, but there was TypeError.*; leave it alone": stateless(only_floats),
    "what is no float must pass, but .*integer.* became float32.* from int32": stateless(
        lambda x: x * x.dtype.type(1) * 0.5
    ),
    "an empty array must count nothing, but beside one there was NaN at": remembering(
        lambda updates, state: (
            state + sum(jnp.mean(x) for x in jax.tree.leaves(updates)).astype(jnp.float32)
        )
    ),
    (
        "what is no float must count nothing, but beside it .* became .* instead of "
        ".*; do not measure it"
    ): optax.stateless(
        lambda updates, params: jax.tree.map(
            lambda x: (
                x / len(jax.tree.leaves(updates)) if jnp.issubdtype(x.dtype, jnp.inexact) else x
            ),
            updates,
        )
    ),
    "zeros must stay zeros, but .* became .*; guard a quotient by a size of 0": of_floats(
        lambda x: x + 1
    ),
    "jit must change nothing, but .* was .* without it and .* with it": of_floats(
        lambda x: x * (0.5 if isinstance(x, jax.core.Tracer) else 0.25)
    ),
    (
        "no number may become larger or change its sign, but .* was .* and became "
        ".*; pass shrinks=False"
    ): of_floats(lambda x: -x),
    (
        "what is not finite must not be learned, but a step after nan there was NaN at "
        ".*; keep the old state"
    ): remembering(
        lambda updates, state: state + jnp.sum(jax.tree.leaves(updates)[0]).astype(jnp.float32) * 0
    ),
}


@pytest.mark.parametrize("words", BROKEN_TRANSFORMS)
def test_a_broken_transform_is_told_what_is_broken(words):
    with pytest.raises(AssertionError, match=words):
        testing.check_transform(BROKEN_TRANSFORMS[words])


def test_what_enlarges_may_be_checked_as_such():
    testing.check_transform(of_floats(lambda x: -2 * x), shrinks=False)


def test_a_tree_of_your_own():
    with pytest.raises(AssertionError, match="odd"):
        testing.check_transform(
            of_floats(lambda x: x.astype(jnp.float32) if x.shape == (7,) else x),
            {"odd": jnp.ones(7), "even": jnp.ones(8)},
        )
    testing.check_scope(scopes.unit(axes=1), {"odd": jnp.ones((7, 2))})


@pytest.mark.parametrize(
    ("check", "name"),
    [
        (testing.check_threshold, "rule"),
        (testing.check_scope, "scope"),
        (testing.check_transform, "transform"),
    ],
)
def test_what_is_no_part_is_refused(check, name):
    with pytest.raises(TypeError, match=f"{name} must be a"):
        check(np.ones(1))
