"""What `skip_spikes` watches: the gradient norm, the loss or both, with one limit for each."""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from optaxclip import _validate
from optaxclip._types import Context, Threshold
from optaxclip.thresholds.combine import observed, restarted
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
        rule: state of the threshold; with `watch="both"` a dict of states.
        streak: int32 scalar, spikes in a row up to now.
    """

    size: Any
    limit: Any
    rule: Any
    streak: Array


class Watcher(NamedTuple):
    """The rule for each number that is watched, which is a block of one size.

    Attributes:
        rules: by the name of the number.
        patience: the most spikes in a row that are skipped.
    """

    rules: dict[str, Threshold]
    patience: int

    @property
    def uses_params(self) -> bool:
        """Whether some limit is relative to the parameters."""
        return any(rule.uses_params for rule in self.rules.values())

    def first(self, dtype: Any) -> Watch:
        """Returns what it knows before the first step."""
        sizes, limits = ({name: jnp.zeros((1,), dtype) for name in self.rules} for _ in range(2))
        states = {name: rule.init(sizes[name]) for name, rule in self.rules.items()}
        return self._watch(sizes, limits, states, jnp.zeros((), jnp.int32))

    def next(
        self, before: Watch, sizes: dict[str, Array], finite: Array, context: Context
    ) -> tuple[Array, Watch]:
        """Returns whether to accept these sizes, and what it knows after them.

        `finite` is whether the sizes and the gradients are; spikes are not counted otherwise.
        """
        known = before.rule if len(self.rules) > 1 else dict.fromkeys(self.rules, before.rule)
        limits, over, learned = {}, {}, {}
        for name, rule in self.rules.items():
            limit = jnp.asarray(rule.limit(sizes[name], known[name], context), sizes[name].dtype)
            limits[name] = jnp.broadcast_to(limit, (1,))
            over[name] = ~(sizes[name] <= limits[name])  # a limit that is NaN accepts nothing
        spike = functools.reduce(jnp.logical_or, [is_over[0] for is_over in over.values()])
        streak = jnp.where(spike, optax.safe_increment(before.streak), 0)
        streak = jnp.where(finite, streak, before.streak)
        lasts = streak > self.patience
        for name, rule in self.rules.items():
            size, cut = sizes[name], jnp.minimum(sizes[name], limits[name])
            restarts = over[name] & lasts
            learned[name] = restarted(rule, restarts, size, cut, known[name], context)
        return lasts | ~spike, self._watch(sizes, limits, learned, jnp.where(lasts, 0, streak))

    def _watch(self, sizes: Any, limits: Any, states: Any, streak: Array) -> Watch:
        sizes, limits = ({name: x[0] for name, x in block.items()} for block in (sizes, limits))
        if len(self.rules) > 1:
            return Watch(sizes, limits, states, streak)
        (size,), (limit,), (state,) = sizes.values(), limits.values(), states.values()
        return Watch(size, limit, state, streak)


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
        labels = {name: (f"threshold[{name!r}]", threshold[name]) for name in names}
    else:
        labels = dict.fromkeys(names, ("threshold", threshold))
    rules = {name: _rule(*labels[name], name, watch) for name in names}
    return Watcher(rules, MOST if patience is None else min(patience, MOST))


def _rule(label: str, threshold: Any, name: str, watch: str) -> Threshold:
    """Makes the rule for one number; a loss may be zero or negative, and so may its limit."""
    is_loss = name == "loss"
    rule = as_threshold(threshold, name=label, low=-math.inf if is_loss else 0.0)
    if is_loss:
        _validate.not_relative(label, rule, watch)
        _validate.signed(label, rule)

    def learn(sizes: Array, clipped_sizes: Array, state: Any, context: Context) -> Any:
        # the limit in place of a size that exceeds it
        return rule.learn(clipped_sizes, clipped_sizes, state, context)

    return observed(rule._replace(learn=learn), zeros=is_loss)
