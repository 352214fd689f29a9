"""What `skip_spikes` watches: the gradient norm, the loss or both, with one limit for each."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from optaxclip import _validate
from optaxclip._types import Context, Threshold
from optaxclip.thresholds.combine import observed, restarted, side_by_side
from optaxclip.thresholds.fixed import as_threshold

MOST = 2**31 - 1
"""The largest count that an int32 holds; counts stop here."""

WATCHED = {"norm": ("norm",), "loss": ("loss",), "both": ("norm", "loss")}


class Watch(NamedTuple):
    """What `skip_spikes` watched in the last step.

    Attributes:
        size: float scalar, the gradient norm or the loss; with `watch="both"` a dict of the two,
            `{"norm": ..., "loss": ...}`.
        limit: its limit; with `watch="both"` a dict like `size`.
        rule: state of the threshold.
        streak: int32 scalar, spikes in a row up to now.
    """

    size: Any
    limit: Any
    rule: Any
    streak: Array


class Watcher(NamedTuple):
    """The rule for the numbers that are watched, which are one block `[watched]`.

    Attributes:
        names: what each number is.
        rule: the rule for the block.
        patience: the most spikes in a row that are skipped.
    """

    names: tuple[str, ...]
    rule: Threshold
    patience: int

    def first(self, dtype: Any) -> Watch:
        """Returns what it knows before the first step."""
        sizes, limits = jnp.zeros((2, len(self.names)), dtype)
        streak = jnp.zeros((), jnp.int32)
        return Watch(self._named(sizes), self._named(limits), self.rule.init(sizes), streak)

    def block(self, watch: Watch, norm: Any, loss: Any) -> Array:
        """Returns those of the two that are watched, in the dtype of the state."""
        dtype, numbers = jax.tree.leaves(watch.size)[0].dtype, {"norm": norm, "loss": loss}
        return jnp.stack([jnp.asarray(numbers[name], dtype) for name in self.names])

    def next(
        self, before: Watch, sizes: Array, finite: Array, context: Context
    ) -> tuple[Array, Watch]:
        """Returns whether to accept these sizes, and what it knows after them.

        `finite` is whether the sizes and the gradients are; spikes are not counted otherwise.
        """
        limits = self.rule.limit(sizes, before.rule, context)
        limits = jnp.broadcast_to(jnp.asarray(limits, sizes.dtype), sizes.shape)
        over = ~(sizes <= limits)  # a limit that is NaN accepts nothing
        longer = optax.safe_increment(before.streak)
        streak = jnp.where(finite, jnp.where(over.any(), longer, 0), before.streak)
        lasts = streak > self.patience
        cut = jnp.minimum(sizes, limits)
        learned = restarted(self.rule, over & lasts, sizes, cut, before.rule, context)
        watch = Watch(self._named(sizes), self._named(limits), learned, jnp.where(lasts, 0, streak))
        return lasts | ~over.any(), watch

    def _named(self, numbers: Array) -> Any:
        one, *others = numbers
        return dict(zip(self.names, numbers, strict=True)) if others else one


def watcher(threshold: Any, watch: str, patience: int | None) -> Watcher:
    """Makes the watcher of the arguments of `skip_spikes`.

    Raises:
        TypeError: `threshold` is not a threshold, or `patience` is not an integer.
        ValueError: an argument is out of range, or a threshold cannot be that of a loss.
    """
    _validate.option("watch", watch, WATCHED)
    if patience is not None:
        _validate.count("patience", patience)
    names = WATCHED[watch]
    if isinstance(threshold, Mapping):
        _validate.watched("threshold", threshold, names)
        each = ((f"threshold[{name!r}]", threshold[name], (name,)) for name in names)
        rule = side_by_side([_rule(*one, watch) for one in each])
    else:
        rule = _rule("threshold", threshold, names, watch)
    may_be_zero = np.array([name == "loss" for name in names])
    rule = observed(_learning_limits(rule), zeros=may_be_zero)
    return Watcher(names, rule, MOST if patience is None else min(patience, MOST))


def _rule(label: str, threshold: Any, names: tuple[str, ...], watch: str) -> Threshold:
    """Makes a rule for these numbers; the loss may be negative, and so may its limit."""
    low = -math.inf if names == ("loss",) else 0.0
    rule = as_threshold(threshold, name=label, low=low)
    if "loss" in names:
        _validate.not_relative(label, rule, watch)
        _validate.signed(label, rule)
    return rule


def _learning_limits(rule: Threshold) -> Threshold:
    """Lets the rule learn the limit instead of a size that exceeds it."""

    def learn(sizes: Array, clipped_sizes: Array, state: Any, context: Context) -> Any:
        return rule.learn(clipped_sizes, clipped_sizes, state, context)

    return rule._replace(learn=learn)
