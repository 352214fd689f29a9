"""Pieces that rules are made of: arrays that end in the shape of a block of sizes."""

import jax.numpy as jnp
from jax import Array

from optaxclip import _sharding


def count(sizes: Array) -> Array:
    """A count for each size, at zero."""
    return jnp.zeros(sizes.shape, jnp.int32)


MOST = 2**30  # counts stop here, so that they never overflow


def one_more(count: Array) -> Array:
    """The count and one. It does not stop at the warm-up, which may change between steps."""
    return jnp.minimum(count + 1, MOST)


def is_early(count: Array, warmup: int | Array) -> Array:
    """Whether a warm-up of so many sizes lasts; it has one size at least."""
    return (count < warmup) | (count == 0)


def logarithm(sizes: Array) -> Array:
    """The logarithm; 0 for what is no observation."""
    return jnp.log(jnp.where((sizes > 0) & (sizes < jnp.inf), sizes, 1))


def pushed(sizes: Array, last: Array) -> Array:
    """The last sizes `[window, ...]`, newest first, with these in front and without the oldest."""
    return jnp.concatenate([sizes[None], _sharding.mapped_as(sizes, last[:-1])])
