"""Rules built from rules: `join at_most with_fallback times by_global_norm reset_after`."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optaxclip import _sharding, _validate, responses
from optaxclip._naming import named
from optaxclip._numerics import harmless, share
from optaxclip._types import Context, Threshold, ThresholdLike
from optaxclip.thresholds._blocks import count
from optaxclip.thresholds.fixed import as_threshold


@named("thresholds")
def join(thresholds: Sequence[ThresholdLike], boundaries: Sequence[int | Array]) -> Threshold:
    """Switches from one threshold to the next at given updates, like `optax.join_schedules`.

    All thresholds learn from the first update on. A schedule among them sees the number of all
    updates; with `optax.join_schedules` it would see the number since its boundary.

    Args:
        thresholds: each a number, a schedule or a rule.
        boundaries: the update at which each next threshold begins, in ascending order: one fewer
            than thresholds.

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


@named("thresholds")
def at_most(threshold: Any, bound: Any) -> Threshold:
    """The smaller of two limits: `threshold`, but never above `bound`.

    Raises:
        TypeError: `threshold` or `bound` is not a threshold.
        ValueError: `threshold` or `bound` is a negative number or NaN.
    """
    return _combine(
        [threshold, bound], ["threshold", "bound"], lambda limits, context: jnp.minimum(*limits)
    )


@named("thresholds")
def at_least(threshold: Any, bound: Any) -> Threshold:
    """The larger of two limits: `threshold`, but never below `bound`.

    Raises:
        TypeError: `threshold` or `bound` is not a threshold.
        ValueError: `threshold` or `bound` is a negative number or NaN.
    """
    return _combine(
        [threshold, bound], ["threshold", "bound"], lambda limits, context: jnp.maximum(*limits)
    )


@named("thresholds")
def with_fallback(threshold: Any, fallback: Any) -> Threshold:
    """Uses `fallback` where the limit of `threshold` is infinite.

    A rule in its warm-up has no limit yet; the fallback limits those groups.

    Raises:
        TypeError: `threshold` or `fallback` is not a threshold.
        ValueError: `threshold` or `fallback` is a negative number or NaN.
    """

    def choose(limits: list[Array], context: Context) -> Array:
        return jnp.where(limits[0] < jnp.inf, *limits)

    return _combine([threshold, fallback], ["threshold", "fallback"], choose)


@named("thresholds")
def times(factor: ThresholdLike, threshold: ThresholdLike) -> Threshold:
    """A multiple of a limit: `times(3.0, quantile(0.5, window=100))` is three running medians.

    An infinite limit stays infinite. The rule learns as it does alone, from the sizes before and
    after this larger or smaller limit.

    Args:
        factor: by how much to multiply: a number, a schedule or a rule.
        threshold: the limit that is multiplied.

    Raises:
        TypeError: `factor` or `threshold` is not a threshold.
        ValueError: `factor` or `threshold` is a negative number or NaN.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> from optaxclip import thresholds
        >>> medians = thresholds.times(3.0, thresholds.quantile(0.5, window=100))
        >>> clip = optaxclip.clip(medians, optaxclip.scopes.tree())
        >>> state = clip.init(jnp.zeros(1))
        >>> for size in 1.0, 1.0, 1.0, 100.0:
        ...     updates, state = clip.update(jnp.array([size]), state)
        >>> updates
        Array([3.], dtype=float32)
    """

    def product(limits: list[Array], context: Context) -> Array:
        infinite = limits[1] == jnp.inf  # 0 times infinity is NaN
        return jnp.where(infinite, jnp.inf, limits[0] * jnp.where(infinite, 1, limits[1]))

    # three times a negative limit would be lower, not higher
    return _combine([factor, threshold], ["factor", "threshold"], product)._replace(signed=False)


@named("thresholds")
def by_global_norm(threshold: Any) -> Threshold:
    r"""Limits the joint l2 norm of all groups, which are scaled by one factor.

    .. math:: c_i = s_i \min(1, c / \|s\|)

    With `norms.l2()` it clips by the global norm at any scope, with the same read of the gradients.
    In a dict of thresholds, all groups that have this rule share one norm, and each has its limit
    :math:`c`; with `inf` a group is measured and not clipped. Sizes that are not finite do not
    count.

    Args:
        threshold: the limit :math:`c` of the joint norm, a number or a schedule.

    Raises:
        TypeError: `threshold` is not a threshold, or it learns or is relative to the parameters.
        ValueError: `threshold` is a negative number or NaN.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> from optaxclip import scopes
        >>> from optaxclip.thresholds import by_global_norm
        >>> limits = {"body": by_global_norm(1.0), "head": by_global_norm(jnp.inf)}
        >>> clip = optaxclip.clip(limits, scopes.group(lambda path: path))
        >>> grads = {"body": jnp.array([3.0]), "head": jnp.array([4.0])}
        >>> updates, _ = clip.update(grads, None)
        >>> print(updates["body"], updates["head"])
        [0.6] [4.]
    """
    rule = as_threshold(threshold)
    _validate.memoryless("threshold", rule)

    def limit(sizes: Array, state: Any, context: Context) -> Array:
        # group the blocks by the mapped axes they are sharded over: two all-reduces per group
        by_axes: dict[Any, list[Array]] = {}
        for block in context.blocks or (sizes,):
            finite = jnp.where(jnp.isfinite(block), block, 0)
            by_axes.setdefault(_sharding.varying(block) or (), []).append(finite)
        tops = []
        for axes, blocks in by_axes.items():
            top = jnp.max(jnp.stack([jnp.max(block, initial=0) for block in blocks]))
            tops.append(_sharding.largest(top, axes))
        # scale by the largest size, so that no square over- or underflows; it needs no derivative
        top = jax.lax.stop_gradient(jnp.max(jnp.stack(tops)))
        squares = [
            _sharding.total(sum(jnp.sum(share(block, top) ** 2) for block in blocks), axes)
            for axes, blocks in by_axes.items()
        ]
        norm = jnp.sqrt(jnp.where(top > 0, sum(squares), 1))  # in units of the largest size
        most = rule.limit(top, state, context)
        infinite = most == jnp.inf  # NaN is not, and counts as 0
        scaled = responses.rescale(sizes, top, jnp.where(infinite, 1, most) / norm)
        return jnp.where(infinite, jnp.inf, scaled)

    return rule._replace(limit=limit, joint=True, signed=False)


@named("thresholds")
def reset_after(threshold: Any, patience: int | Array) -> Threshold:
    """Resets the rule after `patience` clipped steps in a row.

    It treats the new level as normal instead of as a spike, for rules that follow a lasting change
    slowly or never. Wrap the rule itself. In `at_most(reset_after(rule, 50), 1.0)`, steps that only
    the bound 1.0 clips do not count.

    Args:
        threshold: a number, a schedule or a rule.
        patience: how many sizes in a row must exceed the limit. A rule that often clips needs more:
            with the lowest decile as the limit, ten in a row exceed it every few steps.

    Raises:
        TypeError: `threshold` is not a threshold, or `patience` is not an integer.
        ValueError: `threshold` is a negative number or NaN, or `patience` is below 1.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> from optaxclip import scopes, thresholds
        >>> rule = thresholds.reset_after(thresholds.growth(1.0), patience=3)
        >>> clip = optaxclip.clip(rule, scopes.tree())
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
        return restarted(rule, accepted, sizes, clipped_sizes, known, context), streak

    def init(sizes: Array) -> tuple[Any, Array]:
        return rule.init(sizes), count(sizes)

    return rule._replace(init=init, limit=limit, learn=learn)


def restarted(
    rule: Threshold, where: Array, sizes: Array, clipped_sizes: Array, state: Any, context: Context
) -> Any:
    """Learns these sizes; where it restarts, from nothing and as if nothing had been clipped."""
    start = _select(where, rule.init(sizes), state)
    return rule.learn(sizes, jnp.where(where, sizes, clipped_sizes), start, context)


FAR, LASTING = 1e4, 10  # how many times off the usual size, and how many in a row


@named("thresholds")
def ignore_outliers(rule: Threshold) -> Threshold:
    """Hides single outliers from a rule: sizes ten thousand times off the usual.

    A single finite 1e30 leaves no trace in the state of the rule. After ten outliers in a row the
    rule restarts at the new level. The usual size follows the sizes by at most a factor of 2
    per step, so one outlier hardly moves it. Sizes of either sign count by magnitude, and zeros are
    no outliers. Every rule of this package that learns already has this guard, except
    `rms_multiple`.

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
        size = jnp.abs(sizes)
        far = (usual > 0) & (size > 0) & ((size / FAR > usual) | (size < usual / FAR))
        accepted, streak = _lasts(far, streak, LASTING)
        ignored = far & ~accepted
        seen, clipped_seen = (jnp.where(ignored, usual, x) for x in (sizes, clipped_sizes))
        learned = restarted(rule, accepted, seen, clipped_seen, known, context)
        moved = jnp.where((usual > 0) & ~accepted, jnp.clip(size, usual / 2, usual * 2), size)
        kept = ignored | (size == 0)  # a zero says nothing about the scale
        return _select(ignored, known, learned), jnp.where(kept, usual, moved), streak

    return rule._replace(init=init, limit=limit, learn=learn)


def _lasts(holds: Array, streak: Array, needed: int | Array) -> tuple[Array, Array]:
    """Returns whether the condition has now held for `needed` steps in a row, and the new streak.

    The streak restarts at zero when it has.
    """
    streak = jnp.where(holds, streak + 1, 0)
    accepted = holds & (streak >= needed)
    return accepted, jnp.where(accepted, 0, streak)


def _select(where: Array, yes: Any, no: Any) -> Any:
    """Selects one of two states for each group, with the dtypes and sharding of `no`."""

    def select(one: Any, other: Any) -> Array:
        other = jnp.asarray(other)
        one = _sharding.sharded_like(jnp.asarray(one), other)
        return jnp.where(where, one, other).astype(other.dtype)

    return jax.tree.map(select, yes, no)


def _combine(
    thresholds: Sequence[Any], names: Sequence[str], choose: Callable[[list[Array], Context], Array]
) -> Threshold:
    """Runs rules side by side: all of them learn, and `choose` combines their limits."""
    rules = [
        as_threshold(threshold, name=name)
        for threshold, name in zip(thresholds, names, strict=True)
    ]

    def limit(sizes: Array, states: tuple[Any, ...], context: Context) -> Array:
        pairs = zip(rules, states, strict=True)
        return choose([rule.limit(sizes, state, context) for rule, state in pairs], context)

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
        joint=any(rule.joint for rule in rules),
        signed=all(rule.signed for rule in rules),
    )


def side_by_side(rules: Sequence[Threshold], order: Sequence[int] | None = None) -> Threshold:
    """Makes one rule for sizes `[groups]` from a rule for each group.

    Its state is the tuple of their states, in this order; without memory it is `()`, whose
    structure does not depend on the number of groups.
    """
    order = range(len(rules)) if order is None else order
    position = {i: k for k, i in enumerate(order)}

    def one(block: Any, i: int) -> Any:
        return None if block is None else block[i : i + 1]

    def each(function: Callable[..., Any], context: Context, *blocks: Array) -> list[Any]:
        """Calls `function(i, *blocks of group i, context of group i)` for every group."""
        results, joint = [], [i for i, rule in enumerate(rules) if rule.joint]
        together = (blocks[0][np.array(joint)],) if joint else ()
        for i, rule in enumerate(rules):
            of_group = context._replace(
                param_sizes=one(context.param_sizes, i), blocks=together if rule.joint else ()
            )
            results.append(function(i, *[one(block, i) for block in blocks], of_group))
        return results

    def init(sizes: Array) -> tuple[Any, ...]:
        states = tuple(rules[i].init(one(sizes, i)) for i in order)
        return states if jax.tree.leaves(states) else ()

    def limit(sizes: Array, states: tuple[Any, ...], context: Context) -> Array:
        def limit_one(i: int, size: Array, context: Context) -> Array:
            return rules[i].limit(size, states[position[i]] if states else (), context)

        limits = each(limit_one, context, sizes)
        return jnp.concatenate([jnp.broadcast_to(limit, (1,)) for limit in limits])

    def learn(
        sizes: Array, clipped_sizes: Array, states: tuple[Any, ...], context: Context
    ) -> tuple[Any, ...]:
        def learn_one(i: int, size: Array, clipped: Array, context: Context) -> Any:
            return rules[i].learn(size, clipped, states[position[i]], context)

        learned = each(learn_one, context, sizes, clipped_sizes)
        return tuple(learned[i] for i in order)

    uses_params, signed = any(rule.uses_params for rule in rules), all(r.signed for r in rules)
    return Threshold(init, limit, learn, uses_params, signed=signed)


def observed(rule: Threshold, *, zeros: bool = False) -> Threshold:
    """Keeps the state of a group whose size is zero or not finite, and checks the limits.

    With `zeros`, numbers that are zero or negative count like any other: a loss may be so.

    Raises:
        TypeError: a limit is not a number (on `update`).
        ValueError: limits do not broadcast against the sizes (on `update`).
    """

    def limit(sizes: Array, state: Any, context: Context) -> Array:
        limits = rule.limit(harmless(jnp.isfinite(sizes), sizes), state, context)
        _validate.limits(limits, sizes.shape)
        return limits

    def learn(sizes: Array, clipped_sizes: Array, state: Any, context: Context) -> Any:
        seen = jnp.isfinite(sizes) & (zeros | (sizes > 0))
        learned = rule.learn(
            jnp.where(seen, sizes, 1), jnp.where(seen, clipped_sizes, 1), state, context
        )
        return _select(seen, learned, state)

    return rule._replace(limit=limit, learn=learn)
