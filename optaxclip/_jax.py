"""The parts of JAX that are private or that change between versions.

No other module uses these parts, and `tests/test_jax_parts.py` tests each separately. When a new
version of JAX changes one, that test names it, and only this file needs the fix. Tested on JAX
0.8.2, 0.10.2 and 0.12.0.
"""

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax import Array
from jax.extend import core
from jax.sharding import Sharding
from jax.typing import ArrayLike

# 0.8.2 to 0.12.0: constants in a jaxpr; replaces `jax.core.Literal`, which is gone since 0.4.36.
Literal = core.Literal

# A traced program, a program with its constants, and the function that runs it. The programs are
# two classes on 0.8.2 and 0.10.2, one class on 0.12.0.
Jaxpr, ClosedJaxpr, jaxpr_as_fun = core.Jaxpr, core.ClosedJaxpr, core.jaxpr_as_fun


# 0.8.2 to 0.12.0: `ctx.manager` restores the mesh and the options of an equation; there is no
# public way.
def context(equation: Any) -> AbstractContextManager[Any]:
    """Returns the context in which an equation of a jaxpr was traced."""
    return equation.ctx.manager


# 0.8.2 returns functions and options, 0.10.2 and 0.12.0 options alone; `jax.core.eval_jaxpr` runs
# whole jaxprs only.
def bind(equation: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    """Runs one equation of a jaxpr and returns its outputs."""
    parts = equation.primitive.get_bind_params(equation.params)
    functions, options = parts if isinstance(parts, tuple) else ((), parts)
    with context(equation):
        out = equation.primitive.bind(*functions, *inputs, **options)
    return out if equation.primitive.multiple_results else [out]


# 0.8.2 to 0.12.0: replaces `jax.experimental.enable_x64`, which is gone since 0.10.
def float64() -> AbstractContextManager[Any]:
    """Allows float64 inside the context, even in a program that has float64 turned off."""
    return jax.enable_x64(True)


# 0.8.2 to 0.12.0: `aval.weak_type`, for which there is no function.
def is_weakly_typed(x: ArrayLike) -> bool:
    """Returns whether `x` adopts the dtype of other arrays, like a Python number."""
    return bool(jax.typeof(x).weak_type)


# `vma` on 0.8.2, `mat.varying` on 0.10.2 and 0.12.0.
def varying(x: Any) -> frozenset[Hashable]:
    """Returns the mesh axes of `shard_map` over which `x` varies, by its type."""
    type_of_x = jax.typeof(x)
    return frozenset(type_of_x.mat.varying if hasattr(type_of_x, "mat") else type_of_x.vma)


# In `jax.core` on 0.8.2, in `jax.extend.core` on 0.10.2 and 0.12.0. Only errors use it, so it may
# be missing.
def axis_names() -> tuple[Hashable, ...]:
    """Returns the axes that `shard_map`, `pmap` and `vmap` map at this point."""
    name = "unsafe_get_axis_names_DO_NOT_USE"
    names = getattr(core, name, None) or getattr(getattr(jax, "core", None), name, None)
    return tuple(names()) if names else tuple(jax.sharding.get_abstract_mesh().manual_axes)


# A string that begins "<axis 0x" on 0.8.2, one constant on 0.10.2 and 0.12.0; there is no public
# way to ask.
def is_nameless(axis: Hashable) -> bool:
    """Returns whether JAX made up this axis for a `pmap` without `axis_name`.

    No collective can name such an axis.
    """
    return str(axis).startswith(("<axis 0x", "_internal_pmap_axis_name"))


# 0.8.2 to 0.12.0: replaces `jax.lax.pvary`, which is gone since 0.10.
def vary(x: Array, axes: Sequence[Hashable]) -> Array:
    """Marks `x` as varying over axes of `shard_map` over which it did not vary."""
    return jax.lax.pcast(x, tuple(axes), to="varying")


# 0.8.2 to 0.12.0: replaces `jax.sharding.reshard`, the same function under its older name.
def reshard(x: Any, sharding: Sharding) -> Any:
    """Changes the sharding of `x` on an explicit mesh."""
    return jax.reshard(x, sharding)
