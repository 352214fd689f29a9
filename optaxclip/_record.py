"""RECORD, the last part of the engine: what a step measured and did, as a table with four numbers
for each group or leaf.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optaxclip import _sharding, norms
from optaxclip._layout import Layout
from optaxclip._packing import Packing, alike, places, stacked
from optaxclip._types import Names, Reading


def unread() -> Reading:
    """The reading where nothing is known of the groups."""
    return Reading(jnp.zeros((4, 0)), jnp.zeros(2, jnp.int32))


def nothing_read(layout: Layout, sizes: list[Array]) -> Reading:
    """The reading before the first step, of sizes of this kind."""
    dtype = jnp.result_type(*sizes) if sizes else jnp.float32
    counted = jnp.zeros(2, jnp.int32)
    return Reading(jnp.zeros((4, len(layout.names)), dtype), counted, Names.of(layout.names))


def record_step(
    reading: Reading,
    layout: Layout,
    packing: Packing,
    sizes: list[Array],
    clipped_sizes: list[Array],
    limits: list[Array],
    numbers: list[Any] | None = None,
) -> Reading:
    """What this step did; and what is counted over all steps, from the reading before.

    Args:
        reading: of the step before.
        layout: of the updates.
        packing: of the three that follow.
        sizes: before clipping.
        clipped_sizes: after it.
        limits: what they may be.
        numbers: of each leaf, where every number is a group and is cut at its limit.
    """
    blocks = list(zip(sizes, clipped_sizes, limits, strict=True))
    several = 1 if layout.axes is None else packing.several
    joined = [jax.vmap(_column, out_axes=1)(*block) for block in blocks[:several]]
    own = (
        [numbers[k] for (k,) in packing.own[several:]]
        if numbers
        else [None] * len(blocks[several:])
    )
    order = np.arange(len(layout.names)) if layout.axes is None else packing.order
    measured = _read(joined, list(map(_source, blocks[several:], own)), order)
    if layout.axes is not None:
        measured = _sharding.everywhere(measured)
    counted = jnp.stack([measured[3] > 0, ~jnp.isfinite(measured[0])]).any(1).astype(jnp.int32)
    return Reading(
        measured.astype(reading.measured.dtype), reading.counted + counted, Names.of(layout.names)
    )


def _source(block: tuple[Array, ...], numbers: Any) -> tuple[Array, ...]:
    """What a block is read from: sizes before and after and limits; or, where there is one limit,
    the numbers themselves.

    XLA on CPU would store the magnitudes of the numbers, and those after clipping.
    """
    limit = block[-1]
    if numbers is None or not jnp.size(numbers) or jnp.iscomplexobj(numbers) or limit.ndim:
        return block
    return norms.widen(numbers), limit


def _read(joined: list[Array], sources: list[tuple[Array, ...]], order: np.ndarray) -> Array:
    """A table `[4, blocks]`: columns that there are, and columns read from the sources, put in
    order.
    """

    def one_by_one(joined: list[Array], sources: list[Any]) -> Array:
        return _table(joined + [_column(*source)[:, None] for source in sources], order)

    def by_stacks(joined: list[Array], sources: list[Any]) -> Array:
        own = alike(sources)
        first = len(order) - len(sources)
        found = np.append(np.arange(first), first + places(own))
        return _table(
            joined + [jax.vmap(_column, out_axes=1)(*stack) for stack in stacked(sources, own)],
            found[order],
        )

    if not sources:
        return _table(joined, order)
    return jax.lax.platform_dependent(joined, sources, cpu=by_stacks, default=one_by_one)


def _table(columns: list[Array], order: np.ndarray) -> Array:
    """`[4, columns]` from several tables, in this order."""
    if not columns:
        return jnp.zeros((4, 0))
    table = jnp.concatenate(columns, axis=1)
    return table if (order == np.arange(len(order))).all() else table[:, order]


@jax.jit  # so that sources that are equal are traced once
def _column(*source: Array) -> Array:
    """Four numbers: the largest size before and after, the largest limit, and the share of what is
    over it.
    """
    if len(source) == 2:
        numbers, limit = source
        size = jnp.abs(numbers)
        top = jnp.max(jnp.maximum(numbers, -numbers))
        limit = _sharding.mapped_as(top, limit)
        largest = [top, jnp.where(jnp.isfinite(top), jnp.minimum(top, limit), jnp.nan), limit]
    else:
        size, clipped_size, limit = source
        largest = [
            jnp.max(block, initial=0)
            for block in (size, clipped_size, _sharding.mapped_as(size, limit))
        ]
    # Through int8, because XLA adds converted booleans one by one on CPU.
    share = _is_over(size, limit).astype(jnp.int8).sum(dtype=jnp.float32) / max(size.size, 1)
    return jnp.stack([*largest, share])


def _is_over(size: Array, limit: Array) -> Array:
    return jnp.isfinite(size) & (size > limit)
