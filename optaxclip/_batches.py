"""Batches of examples: masks, weights, microbatches, and which leaves are floats."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from optaxclip import _sharding, _validate
from optaxclip._numerics import widen


class Present(NamedTuple):
    """Which examples there are, and how much each counts.

    Attributes:
        mask: bool `[batch]`, False where there is no example.
        weights: `[batch]`; None if all count the same.
    """

    mask: Any
    weights: Any = None

    def weighed(self, of: Array, factors: Array | float = 1.0) -> Array:
        """Returns the factors times the weights of the examples `of`, a bool `[batch]`; else 0."""
        return jnp.where(of, factors if self.weights is None else factors * self.weights, 0)

    def total(self, of: Array) -> Array:
        """Returns the number of the examples `of`, or the sum of their weights."""
        return jnp.sum(of if self.weights is None else self.weighed(of))


def present(mask: Any, weights: Any, size: int) -> Present:
    """Checks and returns who is there: everybody without a mask."""
    if mask is not None:
        _validate.mask("mask", mask, size)
    if weights is not None:
        _validate.weights("weights", weights, size)
        weights = widen(weights)
        weights = jnp.where(weights >= 0, weights, 0)  # where it is traced, never ascent
    return Present(np.ones(size, bool) if mask is None else mask, weights)


def nobody() -> Present:
    """Returns a batch of one example that does not count."""
    return Present(np.zeros(1, bool))


def at_least_one(x: Any) -> Any:
    """Returns the array; for an empty batch, a batch of one example of zeros."""
    if x.shape[0]:
        return x
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = jax.random.key_data(x)
        zeros = jnp.zeros((1, *data.shape[1:]), data.dtype)
        return jax.random.wrap_key_data(zeros, impl=jax.random.key_impl(x))
    return np.zeros((1, *x.shape[1:]), x.dtype)


def like_one(x: Any) -> Any:
    """Returns zeros of the shape and dtype of one example's gradient."""
    return jnp.zeros(x.shape[1:], x.dtype) if is_float(x) else x


def aligned(mesh: Any, batch: Any, present: Present) -> tuple[Any, Present]:
    """Returns the arrays and who is there, all with the same sharding along the batch axis."""
    axes = _sharding.batch_axes(batch)

    def align(x: Any) -> Any:
        spec = _sharding.spec_on(mesh, x)
        if spec[0] == axes:
            return x
        return _sharding.resharded(x, _sharding.on_mesh(mesh, axes, *spec[1:]))

    batch = jax.tree.map(align, batch)
    each = jax.tree.map(lambda x: align(jnp.asarray(x)), present)
    return batch, _sharding.varying_as(batch, each)


def parted(mesh: Any, tree: Any, count: int) -> Any:
    """Reshapes `[batch, ...]` to `[count, rest, ...]`.

    Every microbatch takes rows from all over the batch. So if the batch is sharded over devices,
    each device has a share of every microbatch.
    """

    def part(x: Any) -> Any:
        return jnp.moveaxis(x.reshape(len(x) // count, count, *x.shape[1:]), 1, 0)

    def change(x: Any) -> Any:
        axes, *rest = _sharding.spec_on(mesh, x)
        even = mesh is not None and len(x) // count % _sharding.parts_of(mesh, axes) == 0
        out = _sharding.on_mesh(mesh, None, axes if even else None, *rest)
        return _sharding.automatic(mesh, part, out, x)

    return jax.tree.map(change, tree)


def joined(mesh: Any, tree: Any) -> Any:
    """Reshapes `[count, rest, ...]` to `[batch, ...]`."""

    def join(x: Any) -> Any:
        return jnp.moveaxis(x, 0, 1).reshape(math.prod(x.shape[:2]), *x.shape[2:])

    def change(x: Any) -> Any:
        out = _sharding.on_mesh(mesh, *_sharding.spec_on(mesh, x)[1:])
        return _sharding.automatic(mesh, join, out, x)

    return jax.tree.map(change, tree)


def floats_of(tree: Any, like: Any) -> list[Any]:
    """Returns the leaves of a tree that stand where `like` has floats."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True)
    return [leaf for leaf, one in pairs if is_float(one)]


def tree_of(params: Any, floats: Sequence[Any], other: Callable[[Any], Any]) -> Any:
    """Replaces the floats of `params` by `floats`, and every other leaf by `other(leaf)`."""
    remaining = iter(floats)
    return jax.tree.map(lambda x: next(remaining) if is_float(x) else other(x), params)


def masked(x: Any) -> Any:
    """Returns a leaf that no clip measures."""
    return optax.MaskedNode()


def no_gradient(x: Any) -> Any:
    """Returns the gradient of a leaf without floats, like `jax.grad` with `allow_int=True`."""
    return np.zeros(jnp.shape(x), jax.dtypes.float0)


def is_float(x: Any) -> bool:
    """Returns whether a leaf holds floats or complex numbers."""
    return jnp.issubdtype(x.dtype if hasattr(x, "dtype") else jnp.result_type(x), jnp.inexact)
