"""Rules made of rules: one after the other, the smaller, the larger, one that gives way, one for
each group.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from optaxclip import _sharding, _validate, responses
from optaxclip._numerics import harmless, share
from optaxclip._types import Context, Threshold, ThresholdLike
from optaxclip.thresholds._blocks import count
from optaxclip.thresholds.fixed import as_threshold


def join(thresholds: Sequence[ThresholdLike], boundaries: Sequence[int | Array]) -> Threshold:
    """Uses one threshold after the other, as `optax.join_schedules` does with schedules.

    All of them learn from the first update on, and a schedule among them sees the number of all
    updates. (The schedules of `optax.join_schedules` see the number since their own boundary.)

    Args:
        thresholds: each a number, a schedule or a rule.
        boundaries: the update from which on the next threshold is used, in ascending order: one
            fewer than thresholds.

    Raises:
        TypeError: a threshold has the wrong type, or a boundary is not an integer.
        ValueError: a boundary is negative or out of order, or their number is wrong.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> from optaxclip import thresholds
        >>> warmup = thresholds.join([0.1, 1.0], boundaries=[2])
        >>> clip = optaxclip.clip(warmup, optaxclip.scopes.tree())
        >>> grads = jnp.array([3.0, 4.0])
        >>> state = clip.init(grads)
        >>> for _ in range(3):
        ...     updates, state = clip.update(grads, state)
        ...     print(updates)
        [0.06 0.08]
        [0.06 0.08]
        [0.6 0.8]
    """
    _validate.boundaries(thresholds, boundaries)

    def choose(limits: list[Array], context: Context) -> Array:
        chosen = limits[0]
        for boundary, limit in zip(boundaries, limits[1:], strict=True):
            chosen = jnp.where(context.step < boundary, chosen, limit)
        return chosen

    return _combine(thresholds, [f"thresholds[{k}]" for k in range(len(thresholds))], choose)


def at_most(threshold: Any, bound: Any) -> Threshold:
    """The smaller of two limits: `threshold`, but never above `bound`.

    Raises:
        TypeError: one of the two is not a threshold.
        ValueError: one of the two is a negative number or NaN.
    """
    return _combine(
        [threshold, bound], ["threshold", "bound"], lambda limits, context: jnp.minimum(*limits)
    )


def at_least(threshold: Any, bound: Any) -> Threshold:
    """The larger of two limits: `threshold`, but never below `bound`.

    Raises:
        TypeError: one of the two is not a threshold.
        ValueError: one of the two is a negative number or NaN.
    """
    return _combine(
        [threshold, bound], ["threshold", "bound"], lambda limits, context: jnp.maximum(*limits)
    )


def with_fallback(threshold: Any, fallback: Any) -> Threshold:
    """The first limit, and the second where the first is infinite: for groups whose rule knows too
    little yet.

    Raises:
        TypeError: one of the two is not a threshold.
        ValueError: one of the two is a negative number or NaN.
    """

    def choose(limits: list[Array], context: Context) -> Array:
        return jnp.where(limits[0] < jnp.inf, *limits)

    return _combine([threshold, fallback], ["threshold", "fallback"], choose)


def by_global_norm(threshold: Any) -> Threshold:
    r"""One factor for the whole tree: a size's share of a limit to their joint l2 norm, :math:`c_i
    = s_i \min(1, c / \|s\|)`.

    With `norms.l2()` it clips by the global norm, in the same read of the gradients, at any scope.
    In a dict of thresholds it has only its own group. Sizes that are not finite do not count.

    Args:
        threshold: for the joint norm, a number or a schedule.

    Raises:
        TypeError: it is not a threshold, or one that learns or is relative to parameters.
        ValueError: it is a negative number or NaN.
    """
    rule = as_threshold(threshold)
    _validate.memoryless("threshold", rule)

    def limit(sizes: Array, state: Any, context: Context) -> Array:
        # blocks by the axes along which they are split: two messages for each kind
        alike: dict[Any, list[Array]] = {}
        for block in context.blocks or (sizes,):
            alike.setdefault(_sharding.varying(block) or (), []).append(
                jnp.where(jnp.isfinite(block), block, 0)
            )
        tops = [
            _sharding.largest(
                jnp.max(jnp.stack([jnp.max(block, initial=0) for block in blocks])), axes
            )
            for axes, blocks in alike.items()
        ]
        top = jax.lax.stop_gradient(jnp.max(jnp.stack(tops)))  # only a scale
        parts = [
            _sharding.total(sum(jnp.sum(share(block, top) ** 2) for block in blocks), axes)
            for axes, blocks in alike.items()
        ]
        norm = jnp.sqrt(jnp.where(top > 0, sum(parts), 1))  # in tops
        return responses.rescale(sizes, top, rule.limit(top, state, context) / norm)

    return rule._replace(limit=limit)


def reset_after(threshold: Any, patience: int | Array) -> Threshold:
    """The rule, but what was over its limit so many times in a row is no spike: it starts afresh
    from there.

    Guards rules that take long to follow a lasting change, or never do. It belongs around the rule
    itself: what another limit besides cuts, as in `at_most(reset_after(rule, 50), 1.0)`, is none of
    its business.

    Args:
        threshold: a threshold, anything that `as_threshold` takes.
        patience: how many sizes in a row have to be over the limit. A rule that often clips by its
            nature needs more: the least decile clips ten in a row every few steps.

    Raises:
        TypeError: `threshold` is none, or `patience` is not an integer.
        ValueError: `threshold` is a negative number or NaN, or `patience` is below 1.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> from optaxclip import thresholds
        >>> clip = optaxclip.clip(thresholds.reset_after(thresholds.growth(1.0), patience=3), optaxclip.scopes.tree())
        >>> state = clip.init(jnp.zeros(1))
        >>> for size in 1.0, 10.0, 10.0, 10.0, 10.0:
        ...     updates, state = clip.update(jnp.array([size]), state)
        ...     print(updates)
        [1.]
        [1.]
        [1.]
        [1.]
        [10.]
    """
    rule = as_threshold(threshold)
    _validate.count("patience", patience, traced=True)

    def limit(sizes: Array, state: tuple[Any, Array], context: Context) -> Array:
        return rule.limit(sizes, state[0], context)

    def learn(
        sizes: Array, clipped_sizes: Array, state: tuple[Any, Array], context: Context
    ) -> tuple[Any, Array]:
        known, streak = state
        accepted, streak = _lasts(sizes > limit(sizes, state, context), streak, patience)
        start = _select(accepted, rule.init(sizes), known)
        learned = rule.learn(sizes, jnp.where(accepted, sizes, clipped_sizes), start, context)
        return learned, streak

    return Threshold(lambda sizes: (rule.init(sizes), count(sizes)), limit, learn, rule.uses_params)


FAR, LASTING = 1e4, 10


def ignore_outliers(rule: Threshold) -> Threshold:
    """The rule, but a size ten thousand times off the usual is no observation, unless ten in a row
    are: then it starts afresh.

    So a single 1e30, finite though it is, leaves no trace in what the rule remembers. The usual
    follows the sizes by no more than a factor of 2 a step, hence one size, however far off, hardly
    moves it. Every rule of this package that learns has this guard already, but `rms_multiple`.

    Args:
        rule: a rule that learns.

    Raises:
        TypeError: `rule` is not a rule.
    """
    _validate.part("rule", rule, Threshold, "thresholds.ema()")

    def init(sizes: Array) -> tuple[Any, Array, Array]:
        return rule.init(sizes), jnp.zeros_like(sizes), count(sizes)

    def limit(sizes: Array, state: tuple[Any, Array, Array], context: Context) -> Array:
        return rule.limit(sizes, state[0], context)

    def learn(
        sizes: Array, clipped_sizes: Array, state: tuple[Any, Array, Array], context: Context
    ) -> tuple[Any, Array, Array]:
        known, usual, streak = state
        far = (usual > 0) & ((sizes / FAR > usual) | (sizes < usual / FAR))
        accepted, streak = _lasts(far, streak, LASTING)
        ignored = far & ~accepted
        seen = jnp.where(ignored, usual, sizes)
        clipped_seen = jnp.where(ignored, usual, jnp.where(accepted, sizes, clipped_sizes))
        learned = rule.learn(
            seen, clipped_seen, _select(accepted, rule.init(sizes), known), context
        )
        moved = jnp.where((usual > 0) & ~accepted, jnp.clip(sizes, usual / 2, usual * 2), sizes)
        return _select(ignored, known, learned), jnp.where(ignored, usual, moved), streak

    return Threshold(init, limit, learn, rule.uses_params)


def _lasts(so: Array, streak: Array, needed: int | Array) -> tuple[Array, Array]:
    """Whether it is so for the last of as many steps in a row as are needed, and how many in a row
    it has been since then.
    """
    streak = jnp.where(so, streak + 1, 0)
    accepted = so & (streak >= needed)
    return accepted, jnp.where(accepted, 0, streak)


def _select(where: Array, yes: Any, no: Any) -> Any:
    """The one state or the other, for each group; with the dtypes of the second, and split over
    devices as it is.
    """

    def select(one: Any, other: Any) -> Array:
        other = jnp.asarray(other)
        return jnp.where(where, _sharding.sharded_like(jnp.asarray(one), other), other).astype(
            other.dtype
        )

    return jax.tree.map(select, yes, no)


def _combine(
    thresholds: Sequence[Any], names: Sequence[str], choose: Callable[[list[Array], Context], Array]
) -> Threshold:
    """Rules side by side, all of which learn, and a choice between their limits."""
    rules = [
        as_threshold(threshold, name=name)
        for threshold, name in zip(thresholds, names, strict=True)
    ]

    def limit(sizes: Array, states: tuple[Any, ...], context: Context) -> Array:
        return choose(
            [rule.limit(sizes, state, context) for rule, state in zip(rules, states, strict=True)],
            context,
        )

    def learn(
        sizes: Array, clipped_sizes: Array, states: tuple[Any, ...], context: Context
    ) -> tuple[Any, ...]:
        return tuple(
            rule.learn(sizes, clipped_sizes, state, context)
            for rule, state in zip(rules, states, strict=True)
        )

    return Threshold(
        lambda sizes: tuple(rule.init(sizes) for rule in rules),
        limit,
        learn,
        any(rule.uses_params for rule in rules),
    )


def side_by_side(rules: Sequence[Threshold], order: Sequence[int] | None = None) -> Threshold:
    """One rule for a block `[groups]`, made of a rule for each group; its state has theirs in this
    order.
    """
    order = range(len(rules)) if order is None else order
    place = {i: k for k, i in enumerate(order)}

    def one(block: Any, i: int) -> Any:
        return None if block is None else block[i : i + 1]

    def each(function: Callable[..., Any], context: Context, *blocks: Array) -> list[Any]:
        """`function(i, *blocks of group i, context of group i)` for every group."""
        own = [
            context._replace(param_sizes=one(context.param_sizes, i), blocks=())
            for i in range(len(rules))
        ]
        return [
            function(i, *[one(block, i) for block in blocks], own[i]) for i in range(len(rules))
        ]

    def init(sizes: Array) -> tuple[Any, ...]:
        return tuple(rules[i].init(one(sizes, i)) for i in order)

    def limit(sizes: Array, states: tuple[Any, ...], context: Context) -> Array:
        limits = each(
            lambda i, size, own: rules[i].limit(size, states[place[i]], own), context, sizes
        )
        return jnp.concatenate([jnp.broadcast_to(limit, (1,)) for limit in limits])

    def learn(
        sizes: Array, clipped_sizes: Array, states: tuple[Any, ...], context: Context
    ) -> tuple[Any, ...]:
        def learn_one(i: int, size: Array, clipped: Array, own: Context) -> Any:
            return rules[i].learn(size, clipped, states[place[i]], own)

        learned = each(learn_one, context, sizes, clipped_sizes)
        return tuple(learned[i] for i in order)

    return Threshold(init, limit, learn, any(rule.uses_params for rule in rules))


def observed(rule: Threshold) -> Threshold:
    """The rule, but a size that is zero or not finite is no observation: the state of that group
    stands. Limits are checked.

    Raises:
        TypeError: a limit is no number (on `update`).
        ValueError: limits do not belong to the sizes (on `update`).
    """

    def limit(sizes: Array, state: Any, context: Context) -> Array:
        limits = rule.limit(harmless(jnp.isfinite(sizes), sizes), state, context)
        _validate.limits(limits, sizes.shape)
        return limits

    def learn(sizes: Array, clipped_sizes: Array, state: Any, context: Context) -> Any:
        seen = jnp.isfinite(sizes) & (sizes > 0)
        learned = rule.learn(
            jnp.where(seen, sizes, 1), jnp.where(seen, clipped_sizes, 1), state, context
        )
        return _select(seen, learned, state)

    return rule._replace(limit=limit, learn=learn)
