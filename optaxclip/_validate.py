"""The words of every refusal: which argument, what it was, and what to do."""

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optaxclip._types import Threshold

P, R = ParamSpec("P"), TypeVar("R")


def number(
    name: str, value: Any, *, low: float = 0.0, high: float = math.inf, exclusive: bool = False, others: str = ""
) -> None:
    """Refuses all but one real number from `low` to `high` (`exclusive`: the ends not allowed either).

    A traced number cannot be looked at and passes. What may stand there besides, `others`, is a part of the advice.

    Raises:
        TypeError: `value` is not a real number.
        ValueError: it is an array of several numbers, NaN, or out of range.
    """
    array = isinstance(value, jax.Array | np.ndarray)
    real = jnp.isrealobj(value) and value.dtype != bool if array else isinstance(value, numbers.Real)
    if not real or isinstance(value, bool | np.bool_):
        raise TypeError(
            f"{name} must be a real number, got {value!r} ({type(value).__name__}); pass a float such as 1.0{others}"
        )
    if array and value.shape != ():
        raise ValueError(
            f"{name} must be one number, got an array of shape {value.shape}; give groups limits of their own "
            "with a dict and scopes.group, or try several at once with jax.vmap"
        )
    if isinstance(value, Tracer):
        return
    if not (low < value < high if exclusive else low <= value <= high):
        bounds = f"({low:g}, {high:g})" if exclusive else f"[{low:g}, {high:g}]"
        raise ValueError(f"{name} must be in {bounds}, got {value}; pass a number inside")


def returned(name: str, value: Any) -> None:
    """Refuses what a function of the step returned, if it is no number.

    Raises:
        TypeError: `value` is something else, such as a rule: then the function makes rules, and was not called.
    """
    if not _is_array(value):
        raise TypeError(
            f"{name} must return a number for each step, got {value!r}; pass a schedule such as "
            "optax.linear_schedule(1.0, 0.1, 1000), or a rule that was made, such as thresholds.ema(2.0)"
        )


def count(name: str, value: Any, *, low: int = 1, high: int | None = None) -> None:
    """Refuses all but an integer of at least `low`, and at most `high` if that is given.

    Raises:
        TypeError: `value` is not an integer.
        ValueError: it is below `low` or above `high`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"{name} must be an integer, got {value!r} ({type(value).__name__}); pass a count such as {max(low, 1)}"
        )
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}; pass a larger count")
    if high is not None and int(value) > high:
        raise ValueError(f"{name} must be at most {high}, got {value}; pass a smaller count")


def memoryless(name: str, rule: Any) -> None:
    """Refuses a rule that learns, or that needs the parameters.

    Raises:
        TypeError: `rule` does.
    """
    if rule.uses_params or _remembers(rule):
        does = "uses the parameters" if rule.uses_params else "learns"
        raise TypeError(f"{name} must be the same for all groups, got a rule that {does}; pass a number or a schedule")


def without_memory(name: str, rule: Any) -> None:
    """Refuses a rule that learns from one size at a time, where a step has many.

    Raises:
        TypeError: `rule` does.
    """
    if _remembers(rule):
        raise TypeError(
            f"{name} must not learn from single sizes, got {rule!r}; pass a number, a schedule, or a rule for batches such as "
            "per_example.quantile(0.5)"
        )


def batch(name: str, tree: Any) -> int:
    """Refuses arrays that do not have the examples of one batch along their first axis; returns how many they are.

    Raises:
        ValueError: there is no array, one has no axes, or they differ in length.
    """
    shapes = {jax.tree_util.keystr(path): jnp.shape(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    lengths = {shape[:1] for shape in shapes.values()}
    if len(lengths) != 1 or () in lengths:
        raise ValueError(
            f"{name} must be arrays whose first axis is that of the examples, got shapes {shapes}; pass whole batches"
        )
    return next(iter(shapes.values()))[0]


def mask(name: str, value: Any, size: int) -> None:
    """Refuses all but one truth value for each example.

    Raises:
        ValueError: `value` has another shape or dtype.
    """
    if jnp.shape(value) != (size,) or jnp.result_type(value) != jnp.dtype(bool):
        raise ValueError(
            f"{name} must be bool of shape ({size},), got {jnp.result_type(value)} of shape {jnp.shape(value)}; "
            "pass True for each example that is there"
        )


def divided(name: str, value: int, size: int) -> int:
    """Refuses microbatches that do not make up the batch; returns how many they are.

    Raises:
        ValueError: `value` does not divide `size`.
    """
    if size % value:
        raise ValueError(
            f"{name} must divide the batch, got {value} for {size} examples; pass another, or pad and mask the batch"
        )
    return size // value


def no_functions(name: str, values: Any) -> None:
    """Refuses schedules and rules where there are neither steps nor memory.

    Raises:
        TypeError: a function is among the values.
    """
    if any(map(callable, jax.tree.leaves(values))):
        advice = "a backward pass has neither steps nor memory, so pass a number such as schedule(step)"
        raise TypeError(f"{name} must be a number, got {values!r}; {advice}")


def absolute(name: str, norm: Any) -> None:
    """Refuses a norm that measures relative to the parameters, where there are none.

    Raises:
        TypeError: `norm` does.
    """
    if norm.uses_params:
        raise TypeError(f"{name} must not be relative to parameters, got {norm!r}; pass one such as norms.l2()")


def scope_given(scope: Any) -> None:
    """Refuses to choose a scope for the user.

    Raises:
        TypeError: `scope` is None.
    """
    if scope is None:
        raise TypeError(
            "clip() needs a scope: scopes.tree() for the global norm, scopes.element() for values "
            "(optax.clip is optaxclip.clip_by_value)"
        )


def renamed(function: str, keywords: dict[str, Any]) -> None:
    """Refuses `axis_name`, by its old name and its old meaning.

    Raises:
        TypeError: it is among the keywords.
    """
    if "axis_name" in keywords:
        raise TypeError(
            f"{function}() got axis_name={keywords['axis_name']!r}; the argument is sharded_over: the mapped axes over which "
            "each leaf is sharded, or sharded_over=() for gradients that pmean made equal on all devices"
        )


def checks_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """The function, with keywords of old names refused."""

    @functools.wraps(function)
    def checked(*args: P.args, **keywords: P.kwargs) -> R:
        renamed(function.__name__, keywords)
        return function(*args, **keywords)

    return checked


def option(name: str, value: Any, options: Iterable[str | bool]) -> None:
    """Refuses all but one of the `options`.

    Raises:
        ValueError: `value` is another one.
    """
    if value not in options:
        words = ", ".join(repr(word) for word in options)
        raise ValueError(f"{name} must be one of {words}, got {value!r}; choose one of these")


def part(name: str, value: Any, kind: type, example: str) -> None:
    """Refuses all but a part of the type `kind`.

    Raises:
        TypeError: `value` is something else, such as a part that was not called.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {value!r}; pass one such as {example}")


def transform(name: str, value: Any) -> None:
    """Refuses all but an optimizer: something with functions `init` and `update`.

    Raises:
        TypeError: `value` is something else, such as a function that makes optimizers and was not called.
    """
    has_both = callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))
    if not has_both or isinstance(value, type):
        raise TypeError(
            f"{name} must be a GradientTransformation, got {value!r}; "
            "pass one such as optax.adam(1e-3), or anything with its init and update"
        )


def function(name: str, value: Any, example: str, *, takes: int | None = None) -> None:
    """Refuses what cannot be called, or not with as many arguments as it `takes`.

    Raises:
        TypeError: `value` is not callable, or takes other arguments.
    """
    if not isinstance(value, Callable):
        raise TypeError(f"{name} must be a function, got {value!r}; pass one such as {example}")
    if takes is None:
        return
    try:
        signature = inspect.signature(value)
    except ValueError:  # some of what is built in has none
        return
    try:
        signature.bind(*range(takes))
    except TypeError as error:
        many = "one argument" if takes == 1 else f"{takes} arguments"
        raise TypeError(f"{name} must take {many}, got a function of {signature}; pass one such as {example}") from error


def rule(name: str, value: Any) -> None:
    """Refuses all but a rule, of functions that take what they will be given.

    Raises:
        TypeError: `value` is no `Threshold`, or one of its functions takes other arguments.
    """
    part(name, value, Threshold, "thresholds.ema(2.0)")
    function(f"{name}.init", value.init, "lambda sizes: ...", takes=1)
    function(f"{name}.limit", value.limit, "lambda sizes, state, context: ...", takes=3)
    function(f"{name}.learn", value.learn, "lambda sizes, clipped_sizes, state, context: ...", takes=4)


def limits(value: Any, shape: tuple[int, ...]) -> None:
    """Refuses what a rule gave as the limits of sizes of this shape, if they are no numbers or do not belong to them.

    Raises:
        TypeError: `value` is no array and no number.
        ValueError: it does not broadcast against the sizes.
    """
    advice = "return one for each size, or one for all"
    if not _is_array(value):
        raise TypeError(f"limit must return numbers that broadcast against the sizes, {shape}, but got {value!r}; {advice}")
    if not _broadcasts(jnp.shape(value), shape):
        raise ValueError(
            f"limit must return numbers that broadcast against the sizes, {shape}, but got shape {jnp.shape(value)}; {advice}"
        )


def response(value: Any, shape: tuple[int, ...]) -> None:
    """Refuses what a response made of a gradient of this shape, if it is something else.

    Raises:
        TypeError: `value` is no array, or has another shape.
    """
    if not _is_array(value) or jnp.shape(value) != shape:
        found = f"shape {jnp.shape(value)}" if _is_array(value) else repr(value)
        raise TypeError(
            f"response must return a gradient of the same shape, {shape}, but got {found}; return one such as gradient * factor"
        )


def state(value: Any, kind: type) -> None:
    """Refuses a state that another transform made.

    Raises:
        TypeError: `value` is not of the type `kind`.
    """
    if not isinstance(value, kind):
        raise TypeError(
            f"state must be the {kind.__name__} that init returned, got {type(value).__name__}; "
            "pass the state of this very transform (a chain has a tuple of states, and is updated as a whole)"
        )


def group_name(path: str, name: Any) -> None:
    """Refuses a name of a group that cannot be one.

    Raises:
        TypeError: `name` is not hashable.
    """
    if not isinstance(name, Hashable):
        raise TypeError(
            f"name_of must return a name for {path!r}, got {name!r}; return a string, or None to leave the leaf alone"
        )


def axes_of(name: str, axes: Any, path: str) -> None:
    """Refuses what a function chose as the axes of a leaf, if it is something else.

    Raises:
        TypeError: `axes` is neither an integer nor several.
    """
    several = axes if isinstance(axes, Sequence) else (axes,)
    if not all(isinstance(axis, numbers.Integral) and not isinstance(axis, bool) for axis in several):
        raise TypeError(f"{name} must return axes for {path!r}, got {axes!r}; return an integer, several in a tuple, or None")


def leaf(path: str, value: Any) -> None:
    """Refuses a leaf of a tree that is neither an array nor a number.

    Raises:
        TypeError: `value` is something else.
    """
    if not isinstance(value, numbers.Number) and not hasattr(value, "dtype") and not hasattr(value, "__jax_array__"):
        raise TypeError(
            f"updates must be a tree of arrays, got {value!r} at {path!r}; take it out, or hide it with optax.masked"
        )


def names(given: Iterable[str], found: Iterable[str]) -> None:
    """Refuses a dict of limits whose keys are not exactly the groups of the tree.

    Raises:
        ValueError: a group has no limit, or a limit has no group.
    """
    given, found = set(given), set(found)
    if given - found:
        raise ValueError(
            f"threshold has limits for {sorted(given - found)}, but the tree has only the groups {sorted(found)}; "
            "remove or rename them"
        )
    if found - given:
        raise ValueError(
            f"threshold has no limit for the groups {sorted(found - given)}; add one for each, float('inf') for no limit"
        )


def params_given(params: Any) -> None:
    """Refuses to go on without parameters where a limit depends on them.

    Raises:
        ValueError: `params` is None.
    """
    if params is None:
        raise ValueError("this threshold is relative to the parameters, got params=None; call update(updates, state, params)")


def whole(name: str, shape: tuple[int, ...], axes: tuple[Any, ...]) -> None:
    """Refuses to guess which of a leaf's own axes the mapped axes split.

    Raises:
        ValueError: the leaf is split.
    """
    if axes:
        raise ValueError(
            f"{name} must be given for a scope finer than a leaf, where a leaf of shape {shape} is split along {axes}, "
            "got None; pass those mapped axes along which the numbers that share a size are split, () for none, "
            "or a tree of such choices"
        )


def not_relative(name: str, rule: Any, watched: str) -> None:
    """Refuses a rule that needs the parameters where there is nothing of theirs to measure.

    Raises:
        ValueError: `rule` does.
    """
    if rule.uses_params:
        raise ValueError(
            f'{name} is relative to the parameters, got it with watch="{watched}"; pass watch="norm" or another rule'
        )


def not_split(path: str, axes: tuple[Any, ...]) -> None:
    """Refuses to decompose a part of a matrix.

    Raises:
        ValueError: it is split along mapped axes.
    """
    if axes:
        raise ValueError(
            f"updates has at {path!r} a matrix that is split along {axes}, of which no device knows the singular values; "
            "clip under jit, or gather it first with jax.lax.all_gather"
        )


def not_mapped(name: str, axes: tuple[Any, ...]) -> None:
    """Refuses scopes finer than a leaf for examples that are spread over mapped axes.

    Raises:
        ValueError: there are such axes.
    """
    if axes:
        raise ValueError(
            f"{name} must not be finer than a leaf in a shard_map or pmap over {axes}, got one that is; "
            "clip the examples under jit, or by leaves"
        )


def one_run(name: str, runs: tuple[int, ...]) -> None:
    """Refuses to mix the memories of several runs.

    Raises:
        ValueError: the state has leading axes.
    """
    if runs:
        raise ValueError(
            f"{name} must be of one run, got one that is vmapped over {runs}; "
            f"pass one of them with jax.tree.map(lambda x: x[0], {name})"
        )


def same_on_all(name: str, axes: tuple[Any, ...] | None) -> None:
    """Refuses a number that differs between devices, by which each would decide otherwise.

    Raises:
        ValueError: it is known to vary along mapped axes.
    """
    if axes:
        raise ValueError(f"{name} must be the same on all devices, got one that varies along {axes}; pass jax.lax.pmean of it")


def loss(value: Any) -> None:
    """Refuses to watch a loss that is missing, or is several numbers.

    Raises:
        ValueError: it is.
    """
    if value is None:
        raise ValueError('watch="loss" needs the loss, got none; call update(updates, state, params, value=loss)')
    if jnp.shape(value) != ():
        raise ValueError(f"value must be one number, got an array of shape {jnp.shape(value)}; pass the mean of the loss")


def same_structure(params: Any, treedef: Any) -> list[Any]:
    """Refuses parameters that are no tree like the updates, to the leaves of these; returns what stands where those do.

    Raises:
        ValueError: the structure differs.
    """
    try:
        return treedef.flatten_up_to(params)
    except (ValueError, TypeError) as error:
        updates = jax.tree.unflatten(treedef, range(treedef.num_leaves))
        found, expected = (
            {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)} for tree in (params, updates)
        )
        raise ValueError(
            f"params has another structure than updates, got {sorted(found - expected)[:3]} in params alone and "
            f"{sorted(expected - found)[:3]} in updates alone; pass the params that these are updates of"
        ) from error


def parameter(path: str, param: Any, shape: tuple[int, ...]) -> None:
    """Refuses a parameter that cannot be the one of a gradient of this shape.

    Raises:
        ValueError: it is missing or has another shape.
    """
    found = None if param is None or isinstance(param, tuple) else jnp.shape(param)
    if found != shape:
        was = "nothing" if found is None else f"shape {found}"
        raise ValueError(
            f"params has {was} at {path!r}, where updates has shape {shape}; pass the params that these are updates of"
        )


def same_blocks(given: int, known: int) -> None:
    """Refuses updates that have other groups than the tree that the state was made for.

    Raises:
        ValueError: their numbers differ.
    """
    if given != known:
        raise ValueError(
            f"updates has {given} groups, but state was made for {known}; call init on a tree with the same leaves, "
            "or update(updates, state, params) if some gradients are None"
        )


def not_both(first: str, one: Any, second: str, other: Any, advice: str) -> None:
    """Refuses two arguments that exclude each other.

    Raises:
        TypeError: neither is None.
    """
    if one is not None and other is not None:
        raise TypeError(f"{first} and {second} are both given, got {one!r} and {other!r}; {advice}")


def real(dtype: Any) -> None:
    """Refuses complex updates where numbers are ordered.

    Raises:
        TypeError: `dtype` is complex.
    """
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"bounds that differ by sign need real updates, got {dtype}; "
            "cut complex numbers by magnitude with clip_by_value(limit)"
        )


def _remembers(rule: Any) -> bool:
    """Whether a rule has a state; found without an array, which would start JAX, perhaps before its devices are chosen."""
    return bool(jax.tree.leaves(jax.eval_shape(rule.init, jax.ShapeDtypeStruct((1,), jnp.float32))))


def _is_array(value: Any) -> bool:
    """Whether it is an array or a real number."""
    return isinstance(value, jax.Array | np.ndarray | np.generic | numbers.Real)


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether an array of this shape has one number for each of an array of the other."""
    try:
        return np.broadcast_shapes(shape, to) == to
    except ValueError:
        return False
