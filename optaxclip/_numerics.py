"""Arithmetic that must not leave the float range."""

import jax
import jax.numpy as jnp
from jax import Array


def share(values: Array, top: Array) -> Array:
    """`values / top`, where the top is a positive float; otherwise the values. The top is only a scale, without derivative."""
    top = jax.lax.stop_gradient(jnp.where((top > 0) & jnp.isfinite(top), top, 1))
    # A quarter of both, because the compiler multiplies by 1 / top, which is flushed to 0 for the largest floats.
    quarter = jnp.where(top > 1, 0.25, 1).astype(top.dtype)
    return values * quarter / (top * quarter)
