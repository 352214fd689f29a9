"""Arithmetic that must not leave the float range."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def share(values: Array, top: Array) -> Array:
    """`values / top`, where the top is a positive float; otherwise the values. The top is only a
    scale, without derivative.
    """
    top = jax.lax.stop_gradient(jnp.where((top > 0) & jnp.isfinite(top), top, 1))
    # A quarter of both, because the compiler multiplies by 1 / top, which is flushed to 0 for the
    # largest floats.
    quarter = jnp.where(top > 1, 0.25, 1).astype(top.dtype)
    return values * quarter / (top * quarter)


@jax.custom_jvp
def harmless(ok: Array, floats: Any) -> Any:
    """A tree of floats itself; but where they are not ok, they are ones to a derivative, which
    would be 0 * NaN otherwise.

    Ones, not zeros, since much has no derivative at zero: norms, and the root in the first step of
    Adam. Where nobody asks for a derivative it costs nothing.
    """
    return floats


@harmless.defjvp
def _(primals: tuple[Array, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    (ok, floats), (_, changes) = primals, tangents
    ones = jax.tree.map(lambda x: jnp.where(ok, x, jnp.ones_like(x)), floats)
    return ones, jax.tree.map(lambda dx: jnp.where(ok, dx, jnp.zeros_like(dx)), changes)
