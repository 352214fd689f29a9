"""Pieces that rules are made of: arrays that end in the shape of a block of sizes."""

import jax.numpy as jnp
from jax import Array


def count(sizes: Array) -> Array:
    """A count for each size, at zero."""
    return jnp.zeros(sizes.shape, jnp.int32)


def logarithm(sizes: Array) -> Array:
    """The logarithm; 0 for what is no observation."""
    return jnp.log(jnp.where((sizes > 0) & (sizes < jnp.inf), sizes, 1))


def pushed(sizes: Array, last: Array) -> Array:
    """The last sizes `[window, ...]`, newest first, with these in front and without the oldest."""
    return jnp.concatenate([sizes[None], last[:-1]])
