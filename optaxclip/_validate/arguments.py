"""Checks of the arguments of functions that make clips, and of what these functions return."""

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optaxclip._types import Threshold

P = ParamSpec("P")
R = TypeVar("R")
RULES = ("thresholds", "per_example")  # modules whose functions make rules


def number(
    name: str,
    value: Any,
    *,
    low: float = 0.0,
    high: float = math.inf,
    exclusive: bool = False,
    others: str = "",
) -> None:
    """Checks that `value` is one real number from `low` to `high`.

    With `exclusive` the ends are not allowed. A traced number has no value yet, so it passes.
    `others` names what else the argument may be, as a part of the advice.

    Raises:
        TypeError: `value` is not a real number.
        ValueError: `value` is an array of more than one number, NaN, or out of range.
    """
    array, real = is_number(value)
    if not real:
        advice = f"pass a float such as 1.0{others}"
        if value is None and low <= 0:  # what a configuration says for "off"
            off = "-inf" if low < 0 else "inf"
            advice += f'; float("{off}") as a threshold means no clipping'
        raise TypeError(
            f"{name} must be a real number, got {value!r} ({type(value).__name__}); {advice}"
        )
    if array and value.shape != ():
        raise ValueError(
            f"{name} must be one number, got an array of shape {value.shape}; give groups limits "
            "of their own with a dict and scopes.group, or try several at once with jax.vmap"
        )
    if isinstance(value, Tracer):
        return
    # NumPy, because an operation of JAX on a concrete array would be traced under `jit`
    value = np.asarray(value)[()] if array else value
    if not (low < value < high if exclusive else low <= value <= high):
        bounds = f"({low:g}, {high:g})" if exclusive else f"[{low:g}, {high:g}]"
        advice = "pass a number inside"
        if array and value.dtype.itemsize < 4:
            # 0.999 is 1 in bfloat16, and injected numbers get the dtype of the parameters
            advice += (
                f" that {value.dtype} has not rounded; with optax.inject_hyperparams pass "
                "hyperparam_dtype=jnp.float32"
            )
        raise ValueError(f"{name} must be in {bounds}, got {value}; {advice}")


def returned(name: str, value: Any) -> None:
    """Checks that a schedule returned a number.

    Raises:
        TypeError: `value` is something else. If it is a rule, the user passed the function that
            makes rules without calling it.
    """
    if not is_array(value):
        raise TypeError(
            f"{name} must return a number for each step, got {value!r}; pass a schedule such as "
            "optax.linear_schedule(1.0, 0.1, 1000), or a rule that was made, such as "
            "thresholds.ema(2.0)"
        )


def called(name: str, value: Any) -> None:
    """Refuses the function that makes a rule in place of the rule; it would pass for a schedule.

    Raises:
        TypeError: `value` is a function of `optaxclip.thresholds` or `optaxclip.per_example`.
    """
    made = getattr(value, "func", value)  # looks inside a functools.partial
    package, module = ([*str(getattr(made, "__module__", "")).split("."), ""])[:2]
    if package != __name__.split(".")[0] or module not in RULES or "." in made.__qualname__:
        return
    function, parameters = f"{module}.{made.__name__}", inspect.signature(value).parameters.values()
    needs = any(p.default is p.empty and p.kind is not p.VAR_KEYWORD for p in parameters)
    raise TypeError(
        f"{name} must be a threshold, got a function: {function} was not called; pass "
        f"{function}({'...' if needs else ''})"
    )


def only_with(name: str, value: Any, default: Any, where: str, holds: bool) -> None:
    """Refuses an argument that needs another one, unless it has its default.

    Raises:
        ValueError: the argument has another value and `holds` is False.
    """
    if not holds and isinstance(value, int | float) and value != default:
        raise ValueError(f"{name} needs {where}, got {name}={value!r} without it; leave it out")


def boundaries(thresholds: Any, boundaries: Any) -> None:
    """Checks that boundaries are counts in ascending order, one fewer than thresholds.

    Raises:
        TypeError: one of the two is not a sequence, or a boundary is not an integer.
        ValueError: a boundary is negative or out of order, or their number is wrong.
    """
    for name, value, example in (
        ("thresholds", thresholds, "[0.1, 1.0]"),
        ("boundaries", boundaries, "[1000]"),
    ):
        if not isinstance(value, list | tuple):
            raise TypeError(
                f"{name} must be a list, got {value!r} ({type(value).__name__}); pass one such as "
                f"{example}"
            )
    if not thresholds or len(boundaries) != len(thresholds) - 1:
        raise ValueError(
            f"boundaries must be one fewer than thresholds, got {len(boundaries)} for "
            f"{len(thresholds)}; pass the step at which each threshold but the first begins"
        )
    for k, boundary in enumerate(boundaries):
        count(f"boundaries[{k}]", boundary, low=0, traced=True)
    known = [boundary for boundary in boundaries if not isinstance(boundary, Tracer)]
    if sorted(known) != known:
        raise ValueError(
            f"boundaries must be in ascending order, got {boundaries}; sort them, and the "
            "thresholds with them"
        )


def count(
    name: str, value: Any, *, low: int = 1, high: int | None = None, traced: bool = False
) -> None:
    """Checks that `value` is an integer of at least `low` and at most `high`.

    With `traced`, a scalar array of any real dtype passes too, because schedules return floats. The
    library only compares with such a count. Without `traced` the count decides shapes.

    Raises:
        TypeError: `value` is not an integer, or is an array without `traced`.
        ValueError: `value` is an array of more than one number, below `low`, or above `high`.
    """
    array, real = is_number(value)
    if not real or not (array or isinstance(value, numbers.Integral)):
        raise TypeError(
            f"{name} must be an integer, got {value!r} ({type(value).__name__}); pass a count such "
            f"as {max(low, 1)}"
        )
    if not traced:
        static(name, value)
    shape = getattr(value, "shape", ())
    if shape != ():
        raise ValueError(
            f"{name} must be one count, got an array of shape {shape}; try several at once with "
            "jax.vmap"
        )
    if isinstance(value, Tracer):
        return
    value = np.asarray(value)[()] if array else value
    if not value >= low:
        raise ValueError(f"{name} must be at least {low}, got {value}; pass a larger count")
    if high is not None and value > high:
        raise ValueError(f"{name} must be at most {high}, got {value}; pass a smaller count")


def static(name: str, value: Any) -> None:
    """Refuses an array where a Python value is needed.

    `optax.inject_hyperparams` makes an array of every number.

    Raises:
        TypeError: `value` is an array.
    """
    if isinstance(value, jax.Array | np.ndarray):
        raise TypeError(
            f"{name} must be a Python value, got {value!r}; convert it, or with "
            f'optax.inject_hyperparams pass static_args="{name}"'
        )


def scope_given(scope: Any) -> None:
    """Checks that the user chose a scope.

    Raises:
        TypeError: `scope` is None.
    """
    if scope is None:
        raise TypeError(
            "clip() needs a scope: scopes.tree() for the global norm, scopes.element() for values "
            "(optax.clip is optaxclip.clip_by_value)"
        )


def renamed(function: str, keywords: dict[str, Any]) -> None:
    """Refuses the keyword `axis_name`, which is now `sharded_over`.

    Raises:
        TypeError: `axis_name` is among the keywords.
    """
    if "axis_name" in keywords:
        raise TypeError(
            f"{function}() got axis_name={keywords['axis_name']!r}; the argument is sharded_over: "
            "the mapped axes over which each leaf is sharded, or sharded_over=() for gradients "
            "that pmean made equal on all devices"
        )


def keywords(function: str, given: dict[str, Any], known: Iterable[str]) -> None:
    """Refuses keywords that a function does not have.

    Raises:
        TypeError: a keyword is not known.
    """
    renamed(function, given)
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError(
            f"{function}() got an unexpected keyword argument {unknown[0]!r}; it takes "
            f"{', '.join(known)}"
        )


def checks_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a function refuse keywords of old names."""

    @functools.wraps(function)
    def checked(*args: P.args, **keywords: P.kwargs) -> R:
        renamed(function.__name__, keywords)
        return function(*args, **keywords)

    return checked


def option(name: str, value: Any, options: Iterable[str | bool]) -> None:
    """Checks that `value` is one of the `options`.

    Raises:
        ValueError: `value` is not one of the `options`.
    """
    if value not in options:
        words = ", ".join(repr(word) for word in options)
        raise ValueError(f"{name} must be one of {words}, got {value!r}; choose one of these")


def part(name: str, value: Any, kind: type, example: str) -> None:
    """Checks that a part of a clip has the type `kind`.

    Raises:
        TypeError: `value` has another type, such as the function that makes the part.
    """
    if not isinstance(value, kind):
        raise TypeError(
            f"{name} must be a {kind.__name__}, got {value!r}; pass one such as {example}"
        )


def transform(name: str, value: Any) -> None:
    """Checks that `value` is an optimizer: it has functions `init` and `update`.

    Raises:
        TypeError: `value` is something else, such as a function that makes optimizers.
    """
    has_both = callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))
    if not has_both or isinstance(value, type):
        raise TypeError(
            f"{name} must be a GradientTransformation, got {value!r}; "
            "pass one such as optax.adam(1e-3), or anything with its init and update"
        )


def function(name: str, value: Any, example: str, *, takes: int | None = None) -> None:
    """Checks that `value` is a function that can be called with `takes` arguments.

    Raises:
        TypeError: `value` is not callable, or takes other arguments.
    """
    if not isinstance(value, Callable):
        raise TypeError(f"{name} must be a function, got {value!r}; pass one such as {example}")
    if takes is None:
        return
    try:
        signature = inspect.signature(value)
    except ValueError:  # some built-in functions have no signature
        return
    try:
        signature.bind(*range(takes))
    except TypeError as error:
        many = "one argument" if takes == 1 else f"{takes} arguments"
        raise TypeError(
            f"{name} must take {many}, got a function of {signature}; pass one such as {example}"
        ) from error


def rule(name: str, value: Any) -> None:
    """Checks that `value` is a rule whose functions take the right number of arguments.

    Raises:
        TypeError: `value` is not a `Threshold`, or one of its functions takes other arguments.
    """
    part(name, value, Threshold, "thresholds.ema(2.0)")
    function(f"{name}.init", value.init, "lambda sizes: ...", takes=1)
    function(f"{name}.limit", value.limit, "lambda sizes, state, context: ...", takes=3)
    learn = "lambda sizes, clipped_sizes, state, context: ..."
    function(f"{name}.learn", value.learn, learn, takes=4)


def not_relative(name: str, rule: Any, watched: str) -> None:
    """Refuses a rule that is relative to the parameters, for a loss.

    Raises:
        ValueError: `rule` is relative to the parameters.
    """
    if rule.uses_params:
        raise ValueError(
            f'{name} is relative to the parameters, got it with watch="{watched}"; pass '
            'watch="norm" or another rule'
        )


def loss(value: Any) -> None:
    """Checks that the watched loss is one number.

    Raises:
        ValueError: the loss is missing, or is an array of more than one number.
    """
    if value is None:
        raise ValueError(
            'watch="loss" needs the loss, got none; call update(updates, state, params, value=loss)'
        )
    if jnp.shape(value) != ():
        raise ValueError(
            f"value must be one number, got an array of shape {jnp.shape(value)}; pass the mean of "
            "the loss"
        )


def not_both(first: str, one: Any, second: str, other: Any, advice: str) -> None:
    """Refuses two arguments that exclude each other.

    Raises:
        TypeError: both are given.
    """
    if one is not None and other is not None:
        raise TypeError(f"{first} and {second} are both given, got {one!r} and {other!r}; {advice}")


def is_number(value: Any) -> tuple[bool, bool]:
    """Returns whether it is an array, and whether it is real; booleans are not real."""
    if isinstance(value, jax.Array | np.ndarray):
        real = (jnp.floating, jnp.integer)
        return True, any(jnp.issubdtype(value.dtype, kind) for kind in real)
    return False, isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)


def is_array(value: Any) -> bool:
    """Returns whether it is an array or a real number."""
    return isinstance(value, jax.Array | np.ndarray | np.generic | numbers.Real)
