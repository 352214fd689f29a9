"""Blocks of one number each, joined to a vector: on a chip, an operation on one number costs as much as on a thousand."""

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
    """Which of several blocks are joined: packed, there is first a vector of those, and then the others.

    Attributes:
        shapes: of the blocks.
        joined: positions of those of one number, the same on all devices; none where there are not several.
        others: positions of the rest.
    """

    shapes: list[tuple[int, ...]]
    joined: list[int]
    others: list[int]

    @property
    def order(self) -> np.ndarray:
        """Of each block, its place in what is packed, each number of the vector by itself."""
        return np.argsort([*self.joined, *self.others])

    def pack(self, blocks: Sequence[Array]) -> list[Array]:
        """The same numbers in fewer blocks."""
        vector = [jnp.concatenate([blocks[k].reshape(1) for k in self.joined])] if self.joined else []
        return vector + [blocks[k] for k in self.others]

    def unpack(self, *packed: list[Array]) -> list[list[Array]]:
        """Each list of packed blocks as it was."""
        if not self.joined:
            return list(packed)
        of_joined = zip(*rows(jnp.stack([blocks[0] for blocks in packed], axis=1)), strict=True)
        unpacked = []
        for blocks, numbers in zip(packed, of_joined, strict=True):
            found = dict(zip(self.others, blocks[1:], strict=True))
            found |= {k: number.reshape(self.shapes[k]) for k, number in zip(self.joined, numbers, strict=True)}
            unpacked.append([found[k] for k in range(len(self.shapes))])
        return unpacked


@functools.partial(jax.jit, inline=True)
def common(vector: Array) -> Array:
    """The same vector, of two numbers or more; on a GPU what is done to many equal leaves with one of these is joined.

    XLA joins kernels of one shape if they read an array in common, be it as small as this. A single number, or what can
    be traced back to one, does not count.
    """
    barrier = jax.lax.optimization_barrier
    return jax.lax.platform_dependent(vector, cuda=barrier, rocm=barrier, default=lambda vector: vector)


def packing_of(blocks: Sequence[Array]) -> Packing:
    """How these blocks, and others of their shapes, are packed."""
    single = [k for k, block in enumerate(blocks) if block.size == 1 and not _sharding.varying(block)]
    alike = [k for k in single if blocks[k].dtype == blocks[single[0]].dtype]
    joined = alike if len(alike) > 1 else []
    return Packing([block.shape for block in blocks], joined, sorted(set(range(len(blocks))) - set(joined)))


def alike(blocks: Sequence[Any], kinds: Sequence[Hashable] | None = None) -> tuple[list[list[int]], np.ndarray]:
    """Positions of blocks (trees of arrays) of one type and one kind, and of each block its place in these positions joined.

    On a CPU it takes XLA as long to compile what is done to a stack of them as to one. What is large is by itself, as is what
    an explicit mesh splits.
    """
    found: dict[Hashable, list[int]] = {}
    for k, block in enumerate(blocks):
        arrays, structure = jax.tree.flatten(block)
        alone = any(x.size > LARGE or _sharding.is_explicit(x) for x in arrays)
        found.setdefault(k if alone else (kinds and kinds[k], structure, *map(jax.typeof, arrays)), []).append(k)
    return list(found.values()), np.argsort([k for own in found.values() for k in own])


@jax.jit
def rows(stack: Array) -> list[Array]:
    """The rows of a stack `[rows, ...]`, one by one."""
    count, *shape = stack.shape

    # XLA on CPU compiles a kernel anew for every leaf that takes a slice of its own, and one kernel for all equal leaves if
    # their places are an array of numbers that differ: so each row is taken with the next.
    def gathered(stack: Array) -> list[Array]:
        numbers = jax.lax.GatherDimensionNumbers(tuple(range(1, stack.ndim)), collapsed_slice_dims=(0,), start_index_map=(0,))
        gather = functools.partial(jax.lax.gather, dimension_numbers=numbers, slice_sizes=(1, *shape), mode="promise_in_bounds")
        return [gather(stack, np.array([[k], [(k + 1) % count]]))[0] for k in range(count)]

    def sliced(stack: Array) -> list[Array]:
        return [row.reshape(shape) for row in jax.lax.split(stack, [1] * count)]

    return sliced(stack) if count < 2 else jax.lax.platform_dependent(stack, cpu=gathered, default=sliced)
