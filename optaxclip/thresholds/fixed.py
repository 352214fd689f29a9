"""Rules without memory: a constant, a schedule, a share of the parameters' size."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from optaxclip import _validate
from optaxclip._naming import named, shown
from optaxclip._types import Context, Threshold


def constant(value: ArrayLike) -> Threshold:
    """The same limit for every group at every step.

    Args:
        value: the limit, not negative. A traced number counts as 0 where it is negative or NaN.
            `float("inf")` never clips.

    Raises:
        TypeError: `value` is not a number.
        ValueError: `value` is negative, NaN, or more than one number.
    """
    _validate.number("threshold", value)
    rule = memoryless(lambda sizes, context: jnp.asarray(value, sizes.dtype))
    return rule._replace(name=shown(value))


def scheduled(schedule: Callable[[Array], Any]) -> Threshold:
    """A limit that depends on the step, for example any Optax schedule.

    Args:
        schedule: `step -> limit`; a limit that is negative or NaN counts as 0.

    Raises:
        TypeError: `schedule` is not a function, or does not return a number.

    Example:
        >>> import jax.numpy as jnp, optax, optaxclip
        >>> clip = optaxclip.clip_by_global_norm(optax.exponential_decay(5.0, 1, 0.5))
        >>> grads = jnp.array([3.0, 4.0])
        >>> state = clip.init(grads)
        >>> for _ in range(3):
        ...     updates, state = clip.update(grads, state)
        ...     print(updates)
        [3. 4.]
        [1.5 2. ]
        [0.75 1.  ]
    """
    _validate.called("schedule", schedule)
    _validate.function("schedule", schedule, "optax.linear_schedule(1.0, 0.1, 1000)", takes=1)

    def limit(sizes: Array, context: Context) -> Array:
        value = schedule(context.step)
        _validate.returned("schedule", value)
        return jnp.asarray(value, sizes.dtype)

    return memoryless(limit)._replace(name=shown(schedule))


@named("thresholds")
def relative_to_params(ratio: Any, *, floor: ArrayLike = 1e-3) -> Threshold:
    r"""A share of the size of the parameters, :math:`\lambda \max(\|w\|, \epsilon)`.

    The parameters are measured by the scope and norm of the clip; `update` needs them.

    Args:
        ratio: the share :math:`\lambda`: a number, a schedule or a rule.
        floor: :math:`\epsilon`; smaller parameters count as this large, because a parameter that
            starts at zero could never move otherwise.

    Raises:
        TypeError: `floor` is not a number.
        ValueError: `floor` is negative or NaN.
    """
    _validate.number("floor", floor)
    share = as_threshold(ratio, name="ratio")

    def limit(sizes: Array, state: Any, context: Context) -> Array:
        return share.limit(sizes, state, context) * jnp.maximum(context.param_sizes, floor).astype(
            sizes.dtype
        )

    return share._replace(limit=limit, uses_params=True)


@named("thresholds")
def ranked(k: int | None = None, *, q: float | Array | None = None) -> Threshold:
    r"""Remembers nothing: the limit is the k-th largest size of the block, or its quantile `q`.

    .. math:: c = s_{(k)} \qquad \text{or} \qquad c = Q_q(s_1, \dots, s_n)

    It compares the sizes of one step with each other, so the scope has to give many: the units of a
    leaf, or the examples and tokens of a batch. Sizes that are zero or not finite are left out; if
    fewer than `k` remain, nothing is clipped. With `responses.drop`, all that is larger than the
    k-th is dropped. In `jax.shard_map`, units that are sharded are compared on each device.

    Args:
        k: rank of the size that is the limit; 1 is the largest, which clips nothing.
        q: in place of `k`, the share of the sizes that are smaller, between 0 and 1. It
            interpolates linearly, like `numpy.quantile`.

    Raises:
        TypeError: both `k` and `q` are given, or `k` is not an integer, or `q` is not a number.
        ValueError: `k` is below 1, or `q` is not between 0 and 1.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> from optaxclip import scopes, thresholds
        >>> clip = optaxclip.clip(thresholds.ranked(2), scopes.leaf(batch_axes=0))
        >>> updates, _ = clip.update(jnp.array([1.0, 9.0, 3.0, 2.0]), None)
        >>> updates
        Array([1., 3., 3., 2.], dtype=float32)
    """
    _validate.not_both("k", k, "q", q, "pass one of them")
    if q is None:
        _validate.count("k", k)
    else:
        _validate.number("q", q, high=1.0, exclusive=True)

    def limit(sizes: Array, context: Context) -> Array:
        known = jnp.isfinite(sizes) & (sizes > 0)
        if q is not None:
            top = jnp.nanquantile(jnp.where(known, sizes, jnp.nan), q).astype(sizes.dtype)
        elif k is None or k > sizes.size:
            top = jnp.zeros((), sizes.dtype)
        else:
            top = jax.lax.top_k(jnp.ravel(jnp.where(known, sizes, 0)), k)[0][-1]
        return jnp.broadcast_to(jnp.where(top > 0, top, jnp.inf), sizes.shape)

    return memoryless(limit)


def as_threshold(threshold: Any, *, name: str = "threshold") -> Threshold:
    """Makes a rule of anything that a user may pass as a threshold.

    Args:
        threshold: a number or scalar array, traced or not (`constant`), a function of the step
            (`scheduled`), or a rule.
        name: the name of the argument, for error messages.

    Raises:
        TypeError: `threshold` has another type.
        ValueError: `threshold` is a negative number, NaN, or more than one number.
    """
    if isinstance(threshold, Threshold):
        _validate.rule(name, threshold)
        return threshold
    if isinstance(threshold, Callable):
        _validate.called(name, threshold)
        return scheduled(threshold)
    _validate.number(name, threshold, others=", a schedule, or a rule such as thresholds.ema(2.0)")
    return constant(threshold)


def as_thresholds(threshold: Any, *, name: str = "threshold") -> Threshold | dict[str, Threshold]:
    """Like `as_threshold`; a dict from group name to thresholds becomes a dict of rules.

    Raises:
        TypeError: one of them is not a threshold.
        ValueError: one of them is a negative number, NaN, or more than one number.
    """
    if isinstance(threshold, Mapping):
        return {
            group: as_threshold(one, name=f"{name}[{group!r}]") for group, one in threshold.items()
        }
    return as_threshold(threshold, name=name)


def negated(bound: Any, *, name: str) -> Threshold:
    """Makes the rule for how far below zero a value may be, from a lower bound.

    Raises:
        TypeError: `bound` is neither a number nor a schedule.
        ValueError: `bound` is positive or NaN.
    """
    if isinstance(bound, Callable):
        _validate.called(name, bound)
        below = scheduled(bound)
        return below._replace(
            limit=lambda sizes, state, context: -below.limit(sizes, state, context)
        )
    _validate.number(name, bound, low=-math.inf, high=0.0)
    return constant(-bound)


def memoryless(limit: Callable[[Array, Context], Array]) -> Threshold:
    """A rule without a state, from its limit."""
    return Threshold(
        init=lambda sizes: (),
        limit=lambda sizes, state, context: limit(sizes, context),
        learn=lambda sizes, clipped_sizes, state, context: state,
    )
