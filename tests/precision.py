"""Float64 for a test."""

import jax


def float64():
    return jax.enable_x64(True)
