"""The plain line of each name in `optaxclip/_lowering.py`.

This module imports nothing of the library, so it can replace `_lowering.py` before the library is
imported. `python -m pytest -p plain` does that, with this folder on `PYTHONPATH`.
"""

import jax.numpy as jnp

LARGE = 2**14  # tests make leaves of this size; nothing here depends on it


def traced_once(static=(), inline=False):
    return lambda function: function


def quickest(sizes, norm, plan, leaves):
    return sizes(norm, plan, leaves)


def columns(stack):
    return [stack[:, k] for k in range(stack.shape[1])]


def shared_vector(vector):
    return vector


class Blocks:
    """A list of arrays. `stacks` is that list; of leaves measured whole it is one vector."""

    def __init__(self, arrays, group_of=None):
        self.stacks, self.group_of = list(arrays), group_of
        self.members = [[k] for k in range(len(self.stacks))]
        self.shapes = [jnp.shape(x) for x in self.stacks]

    @classmethod
    def of(cls, sizes, leaves=(), group_of=None):
        return cls(sizes, group_of)

    def like(self, arrays):
        return Blocks(arrays, self.group_of)

    def each(self):
        return self.stacks

    def map(self, function, *others, outputs=0):
        others = [other.each() if isinstance(other, Blocks) else other for other in others]
        results = list(map(function, self.stacks, *others))
        if outputs:
            return tuple(self.like(row[k] for row in results) for k in range(outputs))
        return self.like(results)

    def per_leaf(self, *others):
        columns = [blocks.each() for blocks in (self, *others)]
        if self.group_of is None:
            return list(zip(*columns, strict=True))
        vectors = [jnp.broadcast_to(vector, self.shapes[0]) for (vector,) in columns]
        return [tuple(vector[group] for vector in vectors) for group in self.group_of]

    def table(self, column, *others):
        columns = [blocks.each() for blocks in (self, *others)]
        if self.group_of is not None:
            columns = [list(jnp.broadcast_to(x, self.shapes[0])) for (x,) in columns]
        blocks = list(zip(*columns, strict=True))
        if not blocks:
            return jnp.zeros((4, 0))
        return jnp.stack([column(*block) for block in blocks], axis=1)


def unstacked(*blocks_of):
    return [blocks.each() for blocks in blocks_of]


def for_each(function, rows):
    return [function(*row) for row in rows]


def largest(x):
    return jnp.max(jnp.abs(x), initial=0)


def most(x, axes=None):
    return jnp.max(x, axes, keepdims=axes is not None, initial=0)


def share_of(flags):
    return jnp.mean(flags) if flags.size else jnp.zeros(())
