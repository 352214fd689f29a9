"""How far one example can move the sum of clipped gradients."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from optaxclip import _validate, norms, responses, scopes
from optaxclip._batches import is_float
from optaxclip._examples import Parts
from optaxclip._layout import Layout, lay_out
from optaxclip._types import Context, Threshold

BOUNDED = ("rescale", "smooth", "drop", "normalize", "band", "automatic", "psac")
TIMES = {"add_or_remove": 1, "replace": 2}


def sensitivity(parts: Parts, neighbors: str, params: Any, state: Any) -> Array:
    """Returns the largest l2 norm by which one example changes the sum.

    Raises:
        ValueError: `neighbors` is another word, or the sensitivity is not known.
    """
    _validate.option("neighbors", neighbors, TIMES)
    _check(parts)
    layout = None if params is None else lay_out(parts.scope, params)
    known = layout is not None or _groups_are_known(parts)
    _validate.sensitivity("params", known, parts.scope)
    free = [] if layout is None else list(filter(is_float, layout.others))
    _validate.sensitivity("scope", not free, f"{len(free)} without")
    with jax.ensure_compile_time_eval():  # a number also under `jit`, if the limits are numbers
        squares = [count * limit**2 for count, limit in _limits(parts, layout, state)]
        return TIMES[neighbors] * jnp.sqrt(sum(squares, jnp.zeros(())))


def _check(parts: Parts) -> None:
    """Refuses parts with which one example is not bounded."""
    response = getattr(parts.response, "func", parts.response)
    bounded = any(response is getattr(responses, name) for name in BOUNDED)
    limits = parts.threshold
    rules = limits.values() if isinstance(limits, dict) else [limits]
    relative = [rule for rule in rules if rule.uses_params]
    _validate.sensitivity("reduce", parts.reduce == "sum", parts.reduce)
    _validate.sensitivity("norm", parts.norm == norms.l2(), parts.norm)
    _validate.sensitivity("response", bounded, parts.response)
    _validate.sensitivity("threshold", not relative, relative)
    counts = parts.rule is not None and parts.rule.expected is None
    _validate.sensitivity("expected", not counts, None)


def _groups_are_known(parts: Parts) -> bool:
    """Whether the groups are known without the parameters."""
    by_name = parts.scope.group is not None and isinstance(parts.threshold, dict)
    whole = by_name or scopes.is_whole(parts.scope)
    return whole and parts.scope.batch is None and parts.scope.where is None


def _limits(parts: Parts, layout: Layout | None, state: Any) -> Iterator[tuple[int, Array]]:
    """Returns for each group, or for the equal groups of a leaf, their number and their limit."""
    limits = parts.threshold
    keys = list(limits) if isinstance(limits, dict) else ["tree"]
    counts = [1] * len(keys)
    if layout is not None:
        keys = layout.keys
        counts = [1] * len(keys) if layout.axes is None else _counts(layout)
    step = jnp.zeros((), jnp.int32) if state is None else state.step
    if parts.rule is not None:
        learned = parts.rule.init(len(keys)) if state is None else state.threshold
        each = jnp.broadcast_to(parts.rule.limit(learned, Context(step)), (len(keys),))
    else:
        of_key = functools.cache(lambda key: _limit(_rule(limits, key), step))
        each = list(map(of_key, keys))
    yield from zip(counts, each, strict=True)


def _rule(limits: Any, key: str) -> Threshold:
    return limits[key] if isinstance(limits, dict) else limits


def _limit(rule: Threshold, step: Array) -> Array:
    """Returns the limit of a rule without memory, which may not depend on sizes."""
    sizes = jnp.array([1e-3, 1e3])  # far from each other
    limits = jnp.broadcast_to(rule.limit(sizes, rule.init(sizes), Context(step)), (2,))
    same = isinstance(limits, Tracer) or limits[0] == limits[1]
    _validate.sensitivity("threshold", bool(same), rule)
    return jnp.where(limits[0] >= 0, limits[0], 0)


def _counts(layout: Layout) -> list[int]:
    """Returns how many groups each leaf holds."""
    return [
        math.prod(n for axis, n in enumerate(np.shape(leaf)) if axis not in axes)
        for leaf, axes in zip(layout.gradients, layout.axes or (), strict=True)
    ]
