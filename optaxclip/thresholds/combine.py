"""Rules made of rules: one after the other, the smaller, the larger, one for each group."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from optaxclip import _validate
from optaxclip._types import Context, Threshold
from optaxclip.thresholds.fixed import as_threshold


def switch(steps: int, before: Any, after: Any) -> Threshold:
    """One rule for the first steps, another from then on; both learn from the first step.

    Args:
        steps: number of updates that `before` rules.
        before: a threshold, anything that `as_threshold` takes.
        after: a threshold.

    Raises:
        TypeError: `steps` is not an integer, or a threshold is none.
        ValueError: `steps` is negative.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> from optaxclip import thresholds
        >>> clip = optaxclip.clip(thresholds.switch(2, 0.1, 1.0))
        >>> grads = jnp.array([3.0, 4.0])
        >>> state = clip.init(grads)
        >>> for _ in range(3):
        ...     updates, state = clip.update(grads, state)
        ...     print(updates)
        [0.06 0.08]
        [0.06 0.08]
        [0.6 0.8]
    """
    _validate.count("steps", steps, low=0)
    return _combine([before, after], ["before", "after"], lambda limits, context: jnp.where(context.step < steps, *limits))


def at_most(threshold: Any, bound: Any) -> Threshold:
    """The smaller of two limits: `threshold`, but never above `bound`.

    Raises:
        TypeError: one of the two is not a threshold.
        ValueError: one of the two is a negative number or NaN.
    """
    return _combine([threshold, bound], ["threshold", "bound"], lambda limits, context: jnp.minimum(*limits))


def at_least(threshold: Any, bound: Any) -> Threshold:
    """The larger of two limits: `threshold`, but never below `bound`.

    Raises:
        TypeError: one of the two is not a threshold.
        ValueError: one of the two is a negative number or NaN.
    """
    return _combine([threshold, bound], ["threshold", "bound"], lambda limits, context: jnp.maximum(*limits))


def _combine(thresholds: Sequence[Any], names: Sequence[str], choose: Callable[[list[Array], Context], Array]) -> Threshold:
    """Rules side by side, all of which learn, and a choice between their limits."""
    rules = [as_threshold(threshold, name=name) for threshold, name in zip(thresholds, names, strict=True)]

    def limit(sizes: Array, states: tuple[Any, ...], context: Context) -> Array:
        return choose([rule.limit(sizes, state, context) for rule, state in zip(rules, states, strict=True)], context)

    def learn(sizes: Array, clipped_sizes: Array, states: tuple[Any, ...], context: Context) -> tuple[Any, ...]:
        return tuple(rule.learn(sizes, clipped_sizes, state, context) for rule, state in zip(rules, states, strict=True))

    return Threshold(
        lambda sizes: tuple(rule.init(sizes) for rule in rules), limit, learn, any(rule.uses_params for rule in rules)
    )


def side_by_side(rules: Sequence[Threshold]) -> Threshold:
    """One rule for a block `[groups]`, made of a rule for each group, in their order."""

    def one(block: Any, i: int) -> Any:
        return None if block is None else block[i : i + 1]

    def each(function: Callable[..., Any], context: Context, *blocks: Array) -> list[Any]:
        """`function(i, *blocks of group i, context of group i)` for every group."""
        own = [context._replace(param_sizes=one(context.param_sizes, i)) for i in range(len(rules))]
        return [function(i, *[one(block, i) for block in blocks], own[i]) for i in range(len(rules))]

    def init(sizes: Array) -> tuple[Any, ...]:
        return tuple(rule.init(one(sizes, i)) for i, rule in enumerate(rules))

    def limit(sizes: Array, states: tuple[Any, ...], context: Context) -> Array:
        limits = each(lambda i, size, own: rules[i].limit(size, states[i], own), context, sizes)
        return jnp.concatenate([jnp.broadcast_to(limit, (1,)) for limit in limits])

    def learn(sizes: Array, clipped_sizes: Array, states: tuple[Any, ...], context: Context) -> tuple[Any, ...]:
        return tuple(
            each(lambda i, size, clipped, own: rules[i].learn(size, clipped, states[i], own), context, sizes, clipped_sizes)
        )

    return Threshold(init, limit, learn, any(rule.uses_params for rule in rules))


def observed(rule: Threshold) -> Threshold:
    """The rule, but a size that is zero or not finite is no observation: the state of that group stands."""

    def learn(sizes: Array, clipped_sizes: Array, state: Any, context: Context) -> Any:
        seen = jnp.isfinite(sizes) & (sizes > 0)
        learned = rule.learn(jnp.where(seen, sizes, 1), jnp.where(seen, clipped_sizes, 1), state, context)
        return jax.tree.map(lambda new, old: jnp.where(seen, new, old).astype(old.dtype), learned, state)

    return rule._replace(learn=learn)
