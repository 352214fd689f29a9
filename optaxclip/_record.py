"""RECORD: what a step measured and did, as a table with four numbers for each group or leaf."""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from optaxclip import _sharding
from optaxclip._layout import Layout
from optaxclip._lowering import Blocks, largest, most, share_of, traced_once
from optaxclip._numerics import widen
from optaxclip._types import ClipState, Names, Reading

RECENT = 0.99
"""How much the share of recent steps keeps of itself in a step."""


class Recorder(NamedTuple):
    """What a clip records.

    Attributes:
        record: whether it does; `"full"` with the exact share of elements.
        cuts: whether each element is cut at its limit, so that the largest one tells the rest.
    """

    record: bool | Literal["full"]
    cuts: bool

    def unread(self) -> Any:
        """The reading where the groups are not known."""
        if not self.record:
            return optax.EmptyState()
        return Reading(jnp.zeros((4, 0)), jnp.zeros(2, jnp.int32), jnp.zeros(()))

    def first(self, layout: Layout, sizes: list[Array]) -> Any:
        """The reading before the first step, of sizes of this dtype."""
        if not self.record:
            return optax.EmptyState()
        dtype = jnp.result_type(*sizes) if sizes else jnp.float32
        nothing = jnp.zeros((4, len(layout.names)), dtype)
        share = jnp.zeros((), jnp.float32)
        return Reading(nothing, jnp.zeros(2, jnp.int32), share, Names.of(layout.names))

    def next(
        self,
        state: ClipState,
        layout: Layout,
        sizes: Blocks,
        clipped_sizes: Blocks,
        limits: Blocks,
        numbers: list[Any] | None,
    ) -> Any:
        """The reading of this step, with counts over all steps from the state before.

        `numbers` are the leaves, where their magnitudes are the sizes.
        """
        if not self.record:
            return optax.EmptyState()
        before = state.reading
        if not isinstance(before, Reading):  # from a clip that did not record
            before = self.first(layout, sizes.stacks)
        any_over = layout.is_of_elements and self.record != "full"
        if any_over:
            elements = sizes if numbers is None else sizes.like(map(widen, numbers))
            table = sizes.table(partial(_largest, self.cuts), clipped_sizes, limits, elements)
        else:
            table = sizes.table(_column, clipped_sizes, limits)
        if layout.axes is not None:
            table = _sharding.everywhere(table)
            if any_over:  # the mean over devices of "any"
                table = jnp.concatenate([table[:3], (table[3:] > 0).astype(table.dtype)])
        happened = jnp.stack([table[3] > 0, ~jnp.isfinite(table[0])]).any(1)
        counted = before.counted + happened.astype(jnp.int32)
        share = recent_share(before.recent_share, state.step, happened[0])
        measured = table.astype(before.measured.dtype)
        return Reading(measured, counted, share, Names.of(layout.names))


def recent_share(share: Array, step: Array, happened: Array) -> Array:
    """The share of recent steps in which it happened, after this step and `step` others.

    It is a moving average, corrected for its start: all steps so far count, the last ones most.
    """
    decay = jnp.asarray(RECENT, share.dtype)
    weight = (1 - decay) / (1 - decay ** (step + 1).astype(share.dtype))
    return share + jnp.minimum(weight, 1) * (happened - share)


def summary(reading: Reading) -> dict[str, Array]:
    """The numbers of the largest group, and which it is; over all groups scale and clipped share.

    Axes in front of `[4, groups]` stay, as those of `jax.vmap` over seeds.
    """
    measured = reading.measured
    if not measured.shape[-1]:  # a tree without floats: as if it had one group of size 0
        measured = jnp.pad(measured, [(0, 0)] * (measured.ndim - 1) + [(0, 1)])
    before, after, limit, share = (measured[..., i, :] for i in range(4))
    largest = jnp.argmax(before, -1)  # the first NaN, if there is one

    def of_largest(values: Array) -> Array:
        return jnp.take_along_axis(values, largest[..., None], -1)[..., 0]

    return {
        "size_before": of_largest(before),
        "size_after": of_largest(after),
        "limit": of_largest(limit),
        "scale": jnp.min(jnp.where(before == 0, 1, after / jnp.where(before == 0, 1, before)), -1),
        "clipped_share": jnp.mean(share, -1),
        "largest": largest,
    }


@traced_once()
def _column(size: Array, clipped_size: Array, limit: Array) -> Array:
    """The largest size before and after, the largest limit, and the share of sizes over it."""
    parts = [most(block) for block in (size, clipped_size, limit)]
    parts[2] = _sharding.mapped_as(parts[0], parts[2])
    return jnp.stack([*parts, share_of(_is_over(size, limit))])


@traced_once(static=0)
def _largest(cuts: bool, size: Array, clipped_size: Array, limit: Array, elements: Array) -> Array:
    """The same of a leaf of which each element is a group, with 1 for the share if any is over.

    Where one limit cuts all elements, all four follow from the largest: one reduction.
    """
    if not cuts or limit.ndim:
        column = _column(size, clipped_size, limit)
        return jnp.concatenate([column[:3], (column[3:] > 0).astype(column.dtype)])
    top = largest(elements)
    limit = _sharding.mapped_as(top, limit)
    after = jnp.where(jnp.isfinite(top), jnp.minimum(top, limit), jnp.nan)
    return jnp.stack([top, after, limit, _is_over(top, limit).astype(top.dtype)])


def _is_over(size: Array, limit: Array) -> Array:
    return jnp.isfinite(size) & (size > limit)
