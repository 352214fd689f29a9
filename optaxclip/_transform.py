"""Makes a transform of `init` and `update`, and shields both from the settings of the program."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from optaxclip import _sharding, _validate

_WEIGHTS = ContextVar("weights", default=False)


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


def as_transform(name: str, value: Any) -> optax.GradientTransformationExtraArgs:
    """Makes a transform of any object with `init` and `update`.

    Its `update` gets only the extra arguments that it takes.

    Raises:
        TypeError: `value` does not have both.
    """
    _validate.transform(name, value)
    if isinstance(value, optax.GradientTransformation):
        return optax.with_extra_args_support(value)
    takes = inspect.signature(value.update).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        passed = {name: x for name, x in extra_args.items() if takes_all or name in takes}
        return value.update(updates, state, params, **passed)

    return transform(value.init, update)


@contextmanager
def of_weights() -> Iterator[None]:
    """Tells all transforms that are called inside that they get weights, not gradients.

    A context reaches through `optax.chain`, which keeps its parts in a closure.
    """
    before = _WEIGHTS.set(True)
    try:
        yield
    finally:
        _WEIGHTS.reset(before)


def only_of_weights(
    inner: optax.GradientTransformation, refuse: Callable[[], None]
) -> optax.GradientTransformationExtraArgs:
    """The transform inside `of_weights`; anywhere else `init` and `update` call `refuse` first."""
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        if not _WEIGHTS.get():
            refuse()
        return inner.init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        if not _WEIGHTS.get():
            refuse()
        return inner.update(updates, state, params, **extra_args)

    return transform(init, update)


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
