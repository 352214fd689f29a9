"""Names of parts for people: `thresholds.ema(2.0)` in place of functions at addresses."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.core import Tracer

F = TypeVar("F", bound=Callable[..., Any])


def named(module: str, *, once: bool = False) -> Callable[[F], F]:
    """A decorator for functions that make a part, which gives the part its call as a name.

    Args:
        module: where the function is.
        once: whether equal calls return the same part.
    """

    def decorate(make: F) -> F:
        def call(*args: Any, **keywords: Any) -> Any:
            texts = [*map(shown, args), *(f"{k}={shown(v)}" for k, v in keywords.items())]
            name = f"{module}.{getattr(make, '__name__', 'part')}({', '.join(texts)})"
            return make(*args, **keywords)._replace(name=name)

        called = functools.cache(call) if once else call

        @functools.wraps(make)
        def made(*args: Any, **keywords: Any) -> Any:
            return called(*args, **keywords)

        return cast(F, made)

    return decorate


def shown(value: Any) -> str:
    """A value as a person would write it, in a few words."""
    if isinstance(value, Tracer):
        return f"<traced {value.dtype}>"
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        one = is_known(value) and np.size(value) == 1
        return str(value) if one else f"{value.dtype}{list(np.shape(value))}"
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        inside = ", ".join(map(shown, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    if callable(value) and not hasattr(value, "_fields"):
        return str(getattr(value, "__name__", type(value).__name__))
    return repr(value)


def is_known(value: Any) -> bool:
    """Whether the numbers of this array can be read."""
    if isinstance(value, Tracer) or not isinstance(value, jax.Array | np.ndarray | np.generic):
        return False
    return not (isinstance(value, jax.Array) and value.is_deleted())


def numbers(value: Any) -> str:
    """Up to eight numbers of an array; its type if there are more, or if they are not known."""
    if not is_known(value) or np.size(value) > 8:
        if hasattr(value, "dtype") and hasattr(value, "shape"):
            return f"{value.dtype}{list(value.shape)}"
        return repr(value)
    array = np.asarray(value)
    if array.dtype.kind not in "biuc":  # such as bfloat16, which NumPy cannot format
        array = array.astype(float)
    return np.array2string(array, precision=4, separator=", ")
