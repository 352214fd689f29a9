"""Arithmetic that must not leave the float range, and its derivatives."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from optaxclip import _validate

# Precision: leaves are measured in float32 or wider, and returned in the dtype that they had.


def wide(x: ArrayLike, least: DTypeLike = jnp.float32) -> DTypeLike:
    """The dtype in which to measure `x`: the `least` precision or wider, complex if `x` is."""
    dtype = jnp.result_type(x)
    # JAX does not promote floats of 8 bits and less.
    narrow = not jnp.issubdtype(dtype, jnp.complexfloating) and dtype.itemsize < 4
    return jnp.dtype(least) if narrow else jnp.promote_types(dtype, least)


def widen(x: ArrayLike, least: DTypeLike = jnp.float32) -> Array:
    """`x` in the `least` precision or wider, complex if it is."""
    return jnp.asarray(x).astype(wide(x, least))


def cast_like(x: Array, like: ArrayLike) -> Array:
    """`x` with the dtype of `like`."""
    return x.astype(jnp.asarray(like).dtype)


# Magnitudes


@jax.custom_jvp
def magnitude(x: Array) -> Array:
    """`|x|`, whose derivative is 0 where `x` is not finite."""
    return jnp.abs(x)


@magnitude.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (change,) = primals, tangents
    finite = jnp.isfinite(x)
    known = jnp.where(finite, x, jnp.zeros_like(x))
    change = jnp.where(finite, change, jnp.zeros_like(change))
    return jnp.abs(x), jax.jvp(jnp.abs, (known,), (change,))[1]


def positive_part(x: Array) -> Array:
    """`max(x, 0)`, the magnitude for an upper bound."""
    _validate.real(x.dtype)
    return jnp.maximum(x, 0)


def negative_part(x: Array) -> Array:
    """`max(-x, 0)`, the magnitude for a lower bound."""
    _validate.real(x.dtype)
    return jnp.maximum(-x, 0)


def finite_part(x: Array) -> Array:
    """`max(x, 0)`, and NaN for minus infinity as well."""
    return jnp.where(jnp.isfinite(x), positive_part(x), jnp.nan)


# Quotients


def share(values: Array, top: Array) -> Array:
    """`values / top`, or the values where the top is not a positive float.

    The top is only a scale, so it has no derivative.
    """
    top = jax.lax.stop_gradient(jnp.where((top > 0) & jnp.isfinite(top), top, 1))
    # A quarter of both: XLA multiplies by 1 / top, which is flushed to 0 for the largest floats.
    quarter = jnp.where(top > 1, 0.25, 1).astype(top.dtype)
    return values * quarter / (top * quarter)


@jax.custom_jvp
def factors(size: Array, target: Array) -> tuple[Array, Array]:
    """Two factors whose product is `target / size`; the first is 0 where nothing is to change.

    The quotient itself may not be a float although the result is: 1e-40 is flushed to 0 on many
    machines. Far from 1, each factor is about its root; otherwise the first is 1.
    """
    first, divisor = _first_factor(size, target)
    return first, target / divisor


@factors.defjvp
def _(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    # The quotient rule with one division where the textbook has size^2, which may overflow.
    first, divisor = _first_factor(*primals)
    second = primals[1] / divisor
    change = (tangents[1] - second * jnp.where(first > 0, first, 1) * tangents[0]) / divisor
    change = jnp.where(first > 0, change, 0).astype(second.dtype)
    return (first, second), (jnp.zeros_like(first), change)


def _first_factor(size: Array, target: Array) -> tuple[Array, Array]:
    """The first factor, and the divisor of the target for the second."""
    positive = jnp.maximum(size, jnp.finfo(size.dtype).tiny)
    near = jax.lax.clamp(positive * 2.0**-64, target, positive * 2.0**64)
    far = (target > 0) & (target != near)
    # A quotient comes last: XLA on CPU would recompute anything cheaper in each leaf's kernel.
    first = jnp.where(far, jnp.sqrt(target), target != size) / jnp.where(far, jnp.sqrt(positive), 1)
    return first, positive * jnp.where(first == 0, 1, first)


def multiply(gradient: Array, first: Array, second: Array) -> Array:
    """`gradient` times both factors, or the same bits where the first is 0."""
    return jnp.where(first == 0, gradient, gradient * first * second)


# Derivatives where something is not finite: none of them is 0 * NaN.


@jax.custom_jvp
def harmless(ok: Array, floats: Any) -> Any:
    """A tree of floats, which a derivative sees as ones wherever they are not ok.

    Ones, not zeros, because norms and the root in Adam's first step have no derivative at zero.
    """
    return floats


@harmless.defjvp
def _(primals: tuple[Array, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    (ok, floats), (_, changes) = primals, tangents
    ones = jax.tree.map(lambda x: jnp.where(ok, x, jnp.ones_like(x)), floats)
    return ones, jax.tree.map(lambda dx: jnp.where(ok, dx, jnp.zeros_like(dx)), changes)


def with_derivative_of(
    exact: Callable[..., list[Array]],
    value: Callable[..., list[Array]],
    leaves: list[Any],
) -> list[Array]:
    """`value(leaves)` with the derivative of `exact`; what is not finite has derivative 0."""
    function = jax.custom_jvp(value)

    @function.defjvp
    def _(
        primals: tuple[list[Array]], tangents: tuple[list[Array]]
    ) -> tuple[list[Array], list[Array]]:
        (leaves,), (changes,) = primals, tangents
        finite = [jnp.isfinite(x) for x in leaves]
        known = [jnp.where(ok, x, jnp.zeros_like(x)) for ok, x in zip(finite, leaves, strict=True)]
        changes = [
            jnp.where(ok, dx, jnp.zeros_like(dx)) for ok, dx in zip(finite, changes, strict=True)
        ]
        sizes, (_, moved) = exact(leaves), jax.jvp(exact, (known,), (changes,))
        moved = [
            jnp.where(jnp.isfinite(size), d, jnp.zeros_like(d))
            for size, d in zip(sizes, moved, strict=True)
        ]
        return sizes, moved

    return function(leaves)
