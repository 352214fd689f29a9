"""Float64 for a test: JAX has moved the switch between the versions that are supported."""

import jax


def float64():
    return jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64()
