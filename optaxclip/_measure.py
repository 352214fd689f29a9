"""MEASURE: partials of leaves -> of groups -> over devices -> sizes."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from optaxclip import _lowering, _sharding, _validate
from optaxclip._lowering import traced_once
from optaxclip._numerics import magnitude, wide, widen, with_derivative_of
from optaxclip._sharding import Names
from optaxclip._types import Axes, Join, Norm


class Plan(NamedTuple):
    """Which numbers are measured together; static in a compiled program.

    Attributes:
        axes: for each leaf, the axes that are measured together. The other axes number its units.
        groups: for each group, the positions of its units, counted over all leaves in their order;
            None if each leaf keeps a block, with those axes of length 1.
        split: for each leaf, the mapped axes over which what is measured together is sharded.
    """

    axes: tuple[Axes, ...]
    groups: tuple[tuple[int, ...], ...] | None
    split: tuple[Names, ...]

    def stacked(self, members: list[list[int]], leaves: Sequence[ArrayLike]) -> "Plan":
        """The plan for stacks of equal leaves, one for each list of members."""
        axes = tuple(tuple(axis + 1 for axis in self.axes[group[0]]) for group in members)
        groups = self.groups
        if groups is not None:
            counts = self.units(leaves)
            starts = np.cumsum([0, *counts])
            units = [starts[k] + i for group in members for k in group for i in range(counts[k])]
            position = np.argsort(units)
            groups = tuple(tuple(sorted(position[list(group)].tolist())) for group in groups)
        return Plan(axes, groups, ((),) * len(members))

    def units(self, leaves: Sequence[ArrayLike]) -> list[int]:
        """How many units each leaf has."""
        return [
            math.prod(n for axis, n in enumerate(jnp.shape(leaf)) if axis not in axes)
            for leaf, axes in zip(leaves, self.axes, strict=True)
        ]


def measure(
    norm: Norm,
    leaves: Sequence[ArrayLike],
    params: Sequence[ArrayLike] | None = None,
    axes: Sequence[Axes] | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    sharded_over: Sequence[Names | None] | None = None,
) -> list[Array]:
    """Computes the sizes of groups of leaves.

    Args:
        norm: how to measure.
        leaves: arrays of floats or complex numbers, of any precision.
        params: their parameters, for norms that use them.
        axes: for each leaf the axes that are measured together; None measures whole leaves.
        groups: for each group the positions of the leaves that share a norm; with axes, of their
            units, counted over all leaves. None measures each leaf, or with axes each unit, alone.
        sharded_over: for each leaf the mapped axes over which what is measured together is sharded,
            or None to read them from the leaf's type. (The type says over which mesh axes a leaf
            varies, not which array axes they shard. So a leaf of which parts are measured
            needs the names.)

    Returns:
        Sizes, in float32 or wider: one vector `[groups]`; with axes and no groups, one array for
        each leaf, in which those axes have length 1. (Without any axes, every element has a size.)

    Example:
        >>> import jax.numpy as jnp
        >>> from optaxclip import norms
        >>> from optaxclip._measure import measure
        >>> leaves = [jnp.array([3e20]), jnp.array([4e20])]
        >>> measure(norms.l2(), leaves, groups=[[0, 1]])
        [Array([5.e+20], dtype=float32)]
        >>> measure(norms.l1(), [jnp.array([[1.0, -2.0], [3.0, 4.0]])], axes=[(1,)])
        [Array([[3.],
               [7.]], dtype=float32)]
    """
    for names in sharded_over or ():
        _sharding.all_bound("sharded_over", names)
    in_blocks = axes is not None and groups is None
    if in_blocks and not any(axes or ()):
        return magnitudes(norm, leaves, params)
    if not leaves:
        return [] if in_blocks else [jnp.zeros((0,))]
    plan = plan_of(leaves, axes, groups, sharded_over)
    if norm.magnitude is not jnp.abs:
        # It may close over traced numbers, which the cache of compiled programs must not keep.
        leaves = magnitudes(norm, leaves, params)
        norm = norm._replace(magnitude=_itself, uses_params=False)
    if not in_blocks:
        leaves = promoted_together(leaves)
    return _measured(norm, plan, list(leaves))


@traced_once(static=(0, 1), inline=True)
def _measured(norm: Norm, plan: Plan, leaves: list[ArrayLike]) -> list[Array]:
    # `sizes` has the derivatives: JAX cannot differentiate float64 where it is switched off.
    quickest = partial(_lowering.quickest, sizes, norm, plan)
    return with_derivative_of(partial(sizes, norm, plan), quickest, leaves)


@traced_once(static=(0, 1), inline=True)
def sizes(norm: Norm, plan: Plan, leaves: list[ArrayLike]) -> list[Array]:
    """MEASURE, in its four steps."""
    partials, split = partials_of_leaves(norm, plan, leaves), plan.split
    if plan.groups is not None:
        partials, split = [partials_of_groups(norm, plan, leaves, partials)], [union(plan.split)]
    partials = partials_over_devices(norm, partials, split)
    return _lowering.for_each(norm.root, partials)


def partials_of_leaves(norm: Norm, plan: Plan, leaves: list[ArrayLike]) -> list[tuple[Array, ...]]:
    """The partials of each leaf: as arrays, or as one vector of its units for the groups."""
    of_leaf = _partials if plan.groups is None else _partials_in_vectors
    return [of_leaf(norm, axes, leaf) for axes, leaf in zip(plan.axes, leaves, strict=True)]


@traced_once(static=(0, 1), inline=True)
def _partials(norm: Norm, axes: Axes, leaf: ArrayLike) -> tuple[Array, ...]:
    return norm.partials(norm.magnitude(widen(leaf)), axes)


@traced_once(static=(0, 1))
def _partials_in_vectors(norm: Norm, axes: Axes, leaf: ArrayLike) -> tuple[Array, ...]:
    return tuple(map(jnp.ravel, _partials(norm, axes, leaf)))


def partials_of_groups(
    norm: Norm, plan: Plan, leaves: list[ArrayLike], partials: list[tuple[Array, ...]]
) -> tuple[Array, ...]:
    """Vectors `[groups]`, one for each partial, so that all that follows is a few tiny kernels."""
    counts = plan.units(leaves)
    vectors = [jnp.concatenate(values) for values in zip(*partials, strict=True)]
    vectors = [_once(vector, plan.split, counts) for vector in vectors]
    if plan.groups == tuple((k,) for k in range(sum(counts))):
        return tuple(vectors)

    absent = sum(counts)  # position of a zero, which adds nothing
    members = np.full((len(plan.groups or ()), max(map(len, plan.groups or ()))), absent)
    for i, group in enumerate(plan.groups or ()):
        members[i, : len(group)] = group

    def over_members(function: Callable[..., Array]) -> Join:
        return lambda tree: jax.tree.map(lambda x: function(x, 1, keepdims=True), tree)

    rows = tuple(jnp.take(jnp.pad(values, (0, 1)), members, mode="clip") for values in vectors)
    joined = norm.join(rows, over_members(jnp.sum), over_members(jnp.max))
    return tuple(x[:, 0] for x in joined)


def partials_over_devices(
    norm: Norm, partials: list[tuple[Array, ...]], split: Sequence[Names]
) -> list[tuple[Array, ...]]:
    """The partials of whole blocks, of which each device has a part.

    Blocks that are sharded over the same axes share one all-reduce.
    """
    joined = list(partials)
    keys = [(axes, _sharding.varying(row[0])) for axes, row in zip(split, partials, strict=True)]
    for key in dict.fromkeys(key for key in keys if key[0]):
        members = [k for k, other in enumerate(keys) if other == key]
        total, largest = (partial(f, axes=key[0]) for f in (_sharding.total, _sharding.largest))
        columns = tuple(map(list, zip(*[partials[k] for k in members], strict=True)))
        for k, *values in zip(members, *norm.join(columns, total, largest), strict=True):
            joined[k] = tuple(values)
    return joined


def magnitudes(
    norm: Norm, leaves: Sequence[ArrayLike], params: Sequence[ArrayLike] | None
) -> list[Array]:
    """How large each element is."""
    of_element = magnitude if norm.magnitude is jnp.abs else norm.magnitude
    operands: Any = [leaves] if params is None or not norm.uses_params else [leaves, params]
    return [of_element(*map(widen, operand)) for operand in zip(*operands, strict=True)]


def plan_of(
    leaves: Sequence[ArrayLike],
    axes: Sequence[Axes] | None,
    groups: Sequence[Sequence[int]] | None,
    sharded_over: Sequence[Names | None] | None,
) -> Plan:
    """The plan for these leaves, whole or by axes; arguments as for `measure`."""
    parts = tuple(axes or [tuple(range(jnp.ndim(leaf))) for leaf in leaves])
    split = []
    for leaf, part, given in zip(leaves, parts, sharded_over or [None] * len(leaves), strict=True):
        names = _sharding.split_axes("sharded_over", given, leaf) if part else ()
        if given is None and len(part) < jnp.ndim(leaf):
            _validate.whole("sharded_over", jnp.shape(leaf), names)
        split.append(names)
    if axes is not None and groups is None:
        return Plan(parts, None, tuple(split))
    groups = groups if groups is not None else [[k] for k in range(len(leaves))]
    return Plan(parts, tuple(map(tuple, groups)), tuple(split))


def union(split: Sequence[Names]) -> Names:
    """All axes over which some leaf is sharded."""
    return tuple(dict.fromkeys(axis for axes in split for axis in axes))


def _once(vector: Array, split: Sequence[Names], counts: list[int]) -> Array:
    """Partials of units, in which a replicated leaf counts on one device only."""
    if len(set(split)) <= 1:
        return vector
    axes = union(split)
    by_unit = [names for names, n in zip(split, counts, strict=True) for _ in range(n)]
    return jnp.stack([_sharding.once(vector[k], names, axes) for k, names in enumerate(by_unit)])


def promoted_together(leaves: Sequence[ArrayLike]) -> Sequence[ArrayLike]:
    """Leaves that share a norm, all in float64 if one is: their scale depends on the precision."""
    widest = jnp.finfo(jnp.result_type(*map(wide, leaves))).dtype
    return leaves if widest == jnp.float32 else [widen(leaf, widest) for leaf in leaves]


def _itself(x: Array) -> Array:
    return x
