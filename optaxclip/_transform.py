"""Makes a transform of `init` and `update`, and shields both from the settings of the program."""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from optaxclip import _sharding


def transform(
    init: Callable[..., Any], update: Callable[..., Any]
) -> optax.GradientTransformationExtraArgs:
    """A transform that works the same whatever the mesh and the promotion rules around it are.

    * On an explicit mesh JAX wants that mesh as the context of much that is mapped by `jax.vmap`.
    * A state in `jax.lax.scan` must be mapped from the start if a step maps it.
    * Counts and float32 numbers meet bfloat16 numbers here, which
      `jax_numpy_dtype_promotion="strict"` and `jax_numpy_rank_promotion="raise"` refuse.
    """

    @functools.wraps(init)
    def shielded_init(params: Any) -> Any:
        with _settings(params):
            return _mapped_with(params, init(params))

    @functools.wraps(update)
    def shielded_update(*args: Any, **keywords: Any) -> Any:
        with _settings(args):
            return update(*args, **keywords)

    return optax.GradientTransformationExtraArgs(shielded_init, shielded_update)


def _settings(args: Any) -> ExitStack:
    stack = ExitStack()
    stack.enter_context(jax.numpy_dtype_promotion("standard"))
    stack.enter_context(jax.numpy_rank_promotion("allow"))
    mesh = _sharding.explicit_mesh([x for x in jax.tree.leaves(args) if isinstance(x, Tracer)])
    if mesh is not None and jax.sharding.get_abstract_mesh().empty:
        stack.enter_context(jax.sharding.use_abstract_mesh(mesh))
    return stack


def _mapped_with(params: Any, state: Any) -> Any:
    """The state, mapped by `jax.vmap` as traced parameters on an explicit mesh are."""
    leaves = [x for x in jax.tree.leaves(params) if isinstance(x, Tracer)]
    leaves = [x for x in leaves if x.size and jnp.issubdtype(x.dtype, jnp.inexact)]
    if _sharding.explicit_mesh(leaves) is None:
        return state
    like = jnp.max(jnp.abs(leaves[0]))  # the compiler drops it: nothing reads its value

    def mapped(x: Any) -> Any:
        if not isinstance(x, jax.Array) or not jnp.issubdtype(x.dtype, jnp.number):
            return x
        return _sharding.mapped_as(like.astype(x.dtype), x)

    return jax.tree.map(mapped, state)
