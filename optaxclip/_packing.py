"""Small blocks joined to larger ones: on a chip, an operation on one number costs as much as on a
thousand.
"""

import functools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optaxclip import _sharding

LARGE = 2**14  # numbers in a leaf, from where on a CPU it matters how often they are read


class Packing(NamedTuple):
    """Which of several blocks are one, so that what is done to each is done to all of them at once.

    Attributes:
        shapes: of the blocks.
        own: of each packed block, the positions of those in it. Several of one number each are a
            vector, other equal ones a stack with one more axis; after these there are those that
            are by themselves.
    """

    shapes: list[tuple[int, ...]]
    own: list[list[int]]

    @property
    def order(self) -> np.ndarray:
        """Of each block, its place in those that are packed, one after the other."""
        return places(self.own)

    @property
    def several(self) -> int:
        """How many packed blocks hold more than one."""
        return sum(len(own) > 1 for own in self.own)

    def pack(self, blocks: Sequence[Array]) -> list[Array]:
        """The same numbers in fewer blocks; what broadcasts against a block that is not alone is
        spread over it.
        """
        return [
            self._joined([blocks[k] for k in own], [self.shapes[k] for k in own])
            for own in self.own
        ]

    def unpack(self, *packed: list[Array]) -> list[list[Array]]:
        """Each list of packed blocks as it was."""
        unpacked: list[list[Any]] = [[None] * len(self.shapes) for _ in packed]
        for own, *together in zip(self.own, *packed, strict=True):
            blocks_of = [together] if len(own) == 1 else columns(jnp.stack(together))
            for k, blocks in zip(own, blocks_of, strict=True):
                for found, block in zip(unpacked, blocks, strict=True):
                    found[k] = block if len(own) == 1 else block.reshape(self.shapes[k])
        return unpacked

    @staticmethod
    def _joined(blocks: list[Array], shapes: list[tuple[int, ...]]) -> Array:
        if len(blocks) == 1:
            return blocks[0]
        blocks = [
            jnp.broadcast_to(block, shape) for block, shape in zip(blocks, shapes, strict=True)
        ]
        return (
            jnp.concatenate([block.reshape(1) for block in blocks])
            if blocks[0].size == 1
            else jnp.stack(blocks)
        )


@functools.partial(jax.jit, inline=True)
def common(vector: Array) -> Array:
    """The same vector, of two numbers or more; on a GPU what is done to many equal leaves with one
    of these is joined.

    XLA joins kernels of one shape if they read an array in common, be it as small as this. A single
    number, or what can be traced back to one, does not count.
    """
    barrier = jax.lax.optimization_barrier
    return jax.lax.platform_dependent(
        vector, cuda=barrier, rocm=barrier, default=lambda vector: vector
    )


def packing_of(blocks: Sequence[Array], leaves: Sequence[Any] = ()) -> Packing:
    """How blocks, and others of their shapes, are packed.

    Those of one number are joined if it is the same on all devices; and, where the leaves are given
    that these are sizes of, equal blocks, of leaves that are not large.
    """
    found: dict[Hashable, list[int]] = {}
    for k in (
        np.concatenate(alike(leaves)).tolist() if leaves else range(len(blocks))
    ):  # in the order of stacks of leaves
        block = blocks[k]
        single = block.size == 1 and not _sharding.varying(block)
        small = (
            leaves
            and block.size < jnp.size(leaves[k]) <= LARGE
            and not _sharding.is_explicit(block)
        )
        found.setdefault(block.dtype if single else jax.typeof(block) if small else k, []).append(k)
    return Packing(
        [block.shape for block in blocks], sorted(found.values(), key=lambda own: len(own) == 1)
    )


def alike(blocks: Sequence[Any], kinds: Sequence[Hashable] | None = None) -> list[list[int]]:
    """Positions of blocks (trees of arrays) of one type and one kind.

    On a CPU it takes XLA as long to compile what is done to a stack of them as to one. What is
    large is by itself, as is what an explicit mesh splits.
    """
    found: dict[Hashable, list[int]] = {}
    for k, block in enumerate(blocks):
        arrays, structure = jax.tree.flatten(block)
        alone = any(jnp.size(x) > LARGE or _sharding.is_explicit(x) for x in arrays)
        found.setdefault(
            k if alone else (kinds and kinds[k], structure, *map(jax.typeof, arrays)), []
        ).append(k)
    return list(found.values())


def places(own: Sequence[Sequence[int]]) -> np.ndarray:
    """Of each block, its place in these positions, one after the other."""
    return np.argsort([k for positions in own for k in positions])


def stacked(blocks: Sequence[Any], own: Sequence[Sequence[int]]) -> list[Any]:
    """For each list of positions, the blocks that stand there as one, with one more axis in front."""
    return [
        jax.tree.map(lambda *arrays: jnp.stack(arrays), *[blocks[k] for k in positions])
        for positions in own
    ]


@jax.jit
def columns(stack: Array) -> list[Array]:
    """The columns of a stack `[rows, columns, ...]`, one by one."""
    height, count, *shape = stack.shape

    # XLA on CPU compiles a kernel anew for every leaf that takes a slice of its own, and one kernel
    # for all equal leaves if their places are an array of numbers that differ: if there is one row,
    # each column is taken with the next.
    def gathered(stack: Array) -> list[Array]:
        numbers = jax.lax.GatherDimensionNumbers(
            tuple(range(1, stack.ndim - 1)), collapsed_slice_dims=(0,), start_index_map=(0,)
        )
        gather = functools.partial(
            jax.lax.gather,
            dimension_numbers=numbers,
            slice_sizes=(1, *shape),
            mode="promise_in_bounds",
        )
        flat = stack.reshape(-1, *shape)
        if height == 1:
            return [gather(flat, np.array([[k], [(k + 1) % count]]))[:1] for k in range(count)]
        rows = np.arange(height)[:, None] * count
        return [gather(flat, rows + k) for k in range(count)]

    def sliced(stack: Array) -> list[Array]:
        return [
            column.reshape(height, *shape) for column in jax.lax.split(stack, [1] * count, axis=1)
        ]

    return (
        sliced(stack)
        if count < 2
        else jax.lax.platform_dependent(stack, cpu=gathered, default=sliced)
    )
