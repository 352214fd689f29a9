"""Pieces of rules: functions of arrays whose last axes are the axes of the sizes."""

import jax.numpy as jnp
from jax import Array

from optaxclip import _sharding


def count(sizes: Array) -> Array:
    """Returns a count for each size, at zero."""
    return jnp.zeros(sizes.shape, jnp.int32)


MOST = 2**30  # counts stop here, so that they never overflow


def one_more(count: Array) -> Array:
    """Adds one to the count; it goes on after the warm-up, which may change between steps."""
    return jnp.minimum(count + 1, MOST)


def is_early(count: Array, warmup: int | Array) -> Array:
    """Returns whether the warm-up still lasts; the first size always belongs to it."""
    return (count < warmup) | (count == 0)


def logarithm(sizes: Array) -> Array:
    """Returns the logarithms of the sizes; 0 where a size is zero or not finite."""
    return jnp.log(jnp.where((sizes > 0) & (sizes < jnp.inf), sizes, 1))


def rows(array: Array) -> Array:
    """Returns 0, 1, ... along the first axis, to compare with arrays of the shape of the sizes."""
    return jnp.arange(array.shape[0]).reshape(-1, *[1] * (array.ndim - 1))


def pushed(sizes: Array, last: Array) -> Array:
    """Puts new sizes in front of the last sizes `[window, ...]` and drops the oldest."""
    return jnp.concatenate([sizes[None], _sharding.mapped_as(sizes, last[:-1])])
