"""The words of every refusal: which argument, what it was, and what to do."""

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
    """Refuses all but one real number from `low` to `high` (`exclusive`: the ends not allowed
    either).

    A traced number cannot be looked at and passes. What may stand there besides, `others`, is a
    part of the advice.

    Raises:
        TypeError: `value` is not a real number.
        ValueError: it is an array of several numbers, NaN, or out of range.
    """
    array, real = _is_number(value)
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
            f"of their own "
            "with a dict and scopes.group, or try several at once with jax.vmap"
        )
    if isinstance(value, Tracer):
        return
    # which needs no operation, and so can be looked at under `jit`
    value = np.asarray(value)[()] if array else value
    if not (low < value < high if exclusive else low <= value <= high):
        bounds = f"({low:g}, {high:g})" if exclusive else f"[{low:g}, {high:g}]"
        advice = "pass a number inside"
        if (
            array and value.dtype.itemsize < 4
        ):  # 0.999 is 1 in bfloat16, and injected numbers get the dtype of the parameters
            advice += f" that {value.dtype} has not rounded; with optax.inject_hyperparams pass hyperparam_dtype=jnp.float32"
        raise ValueError(f"{name} must be in {bounds}, got {value}; {advice}")


def returned(name: str, value: Any) -> None:
    """Refuses what a function of the step returned, if it is no number.

    Raises:
        TypeError: `value` is something else, such as a rule: then the function makes rules, and was
            not called.
    """
    if not _is_array(value):
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
    made = getattr(value, "func", value)  # of a functools.partial
    package, module = ([*str(getattr(made, "__module__", "")).split("."), ""])[:2]
    if package != __package__ or module not in RULES or "." in made.__qualname__:
        return
    function, parameters = f"{module}.{made.__name__}", inspect.signature(value).parameters.values()
    needs = any(p.default is p.empty and p.kind is not p.VAR_KEYWORD for p in parameters)
    raise TypeError(
        f"{name} must be a threshold, got a function: {function} was not called; pass "
        f"{function}({'...' if needs else ''})"
    )


def only_with(name: str, value: Any, default: Any, where: str, holds: bool) -> None:
    """Refuses an argument that has no meaning here, unless it has its default.

    Raises:
        ValueError: it has another value.
    """
    if not holds and isinstance(value, int | float) and value != default:
        raise ValueError(f"{name} needs {where}, got {name}={value!r} without it; leave it out")


def boundaries(thresholds: Any, boundaries: Any) -> None:
    """Refuses boundaries that are not counts in ascending order, one fewer than thresholds.

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
            f"{len(thresholds)}; "
            "pass the step at which each threshold but the first begins"
        )
    for k, boundary in enumerate(boundaries):
        count(f"boundaries[{k}]", boundary, low=0, traced=True)
    known = [boundary for boundary in boundaries if not isinstance(boundary, Tracer)]
    if sorted(known) != known:
        raise ValueError(
            f"boundaries must be in ascending order, got {boundaries}; sort them, and the "
            f"thresholds with them"
        )


def count(
    name: str, value: Any, *, low: int = 1, high: int | None = None, traced: bool = False
) -> None:
    """Refuses all but an integer of at least `low`, and at most `high` if that is given.

    With `traced` one number in an array passes as well, of any real dtype, because schedules make
    floats: such a count may only be compared. Without it the count decides about shapes.

    Raises:
        TypeError: `value` is not an integer, or an array where it must not be one.
        ValueError: it is an array of several numbers, below `low`, or above `high`.
    """
    array, real = _is_number(value)
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
            f"jax.vmap"
        )
    if isinstance(value, Tracer):
        return
    value = np.asarray(value)[()] if array else value
    if not value >= low:
        raise ValueError(f"{name} must be at least {low}, got {value}; pass a larger count")
    if high is not None and value > high:
        raise ValueError(f"{name} must be at most {high}, got {value}; pass a smaller count")


def static(name: str, value: Any) -> None:
    """Refuses an array, as `optax.inject_hyperparams` makes of every number, where a Python value
    is needed.

    Raises:
        TypeError: `value` is an array.
    """
    if isinstance(value, jax.Array | np.ndarray):
        raise TypeError(
            f"{name} must be a Python value, got {value!r}; convert it, or with "
            f"optax.inject_hyperparams pass "
            f'static_args="{name}"'
        )


def memoryless(name: str, rule: Any) -> None:
    """Refuses a rule that learns, or that needs the parameters.

    Raises:
        TypeError: `rule` does.
    """
    if rule.uses_params or _remembers(rule):
        does = "uses the parameters" if rule.uses_params else "learns"
        raise TypeError(
            f"{name} must be the same for all groups, got a rule that {does}; pass a number or a "
            f"schedule"
        )


def without_memory(name: str, rule: Any) -> None:
    """Refuses a rule that learns from one size at a time, where a step has many.

    Raises:
        TypeError: `rule` does.
    """
    if _remembers(rule):
        raise TypeError(
            f"{name} must not learn from single sizes, got {rule!r}; pass a number, a schedule, or "
            f"a rule for batches such as "
            "per_example.quantile(0.5)"
        )


def batch(name: str, tree: Any) -> int:
    """Refuses arrays that do not have the examples of one batch along their first axis; returns how
    many they are.

    Raises:
        ValueError: there is no array, one has no axes, or they differ in length.
    """
    shapes = {
        jax.tree_util.keystr(path): jnp.shape(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    lengths = {shape[:1] for shape in shapes.values()}
    if len(lengths) != 1 or () in lengths:
        raise ValueError(
            f"{name} must be arrays whose first axis is that of the examples, got shapes {shapes}; "
            f"pass whole batches"
        )
    return next(iter(shapes.values()))[0]


def mask(name: str, value: Any, size: int) -> None:
    """Refuses all but one truth value for each example.

    Raises:
        ValueError: `value` has another shape or dtype.
    """
    if jnp.shape(value) != (size,) or jnp.result_type(value) != jnp.dtype(bool):
        raise ValueError(
            f"{name} must be bool of shape ({size},), got {jnp.result_type(value)} of shape "
            f"{jnp.shape(value)}; "
            "pass True for each example that is there"
        )


def divided(name: str, value: int, size: int) -> int:
    """Refuses microbatches that do not make up the batch; returns how many they are.

    Raises:
        ValueError: `value` does not divide `size`.
    """
    if size % value:
        raise ValueError(
            f"{name} must divide the batch, got {value} for {size} examples; pass another, or pad "
            f"and mask the batch"
        )
    return size // value


def no_functions(name: str, values: Any) -> None:
    """Refuses schedules and rules where there are neither steps nor memory.

    Raises:
        TypeError: a function is among the values.
    """
    if any(map(callable, jax.tree.leaves(values))):
        advice = (
            "a backward pass has neither steps nor memory, so pass a number such as schedule(step)"
        )
        raise TypeError(f"{name} must be a number, got {values!r}; {advice}")


def absolute(name: str, norm: Any) -> None:
    """Refuses a norm that measures relative to the parameters, where there are none.

    Raises:
        TypeError: `norm` does.
    """
    if norm.uses_params:
        raise TypeError(
            f"{name} must not be relative to parameters, got {norm!r}; pass one such as norms.l2()"
        )


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
            f"{function}() got axis_name={keywords['axis_name']!r}; the argument is sharded_over: "
            f"the mapped axes over which "
            "each leaf is sharded, or sharded_over=() for gradients that pmean made equal on all "
            "devices"
        )


def keywords(function: str, given: dict[str, Any], known: Iterable[str]) -> None:
    """Refuses keywords that a function does not have, in its own name.

    Raises:
        TypeError: one of those given is not known.
    """
    renamed(function, given)
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError(
            f"{function}() got an unexpected keyword argument {unknown[0]!r}; it takes "
            f"{', '.join(known)}"
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
        raise TypeError(
            f"{name} must be a {kind.__name__}, got {value!r}; pass one such as {example}"
        )


def transform(name: str, value: Any) -> None:
    """Refuses all but an optimizer: something with functions `init` and `update`.

    Raises:
        TypeError: `value` is something else, such as a function that makes optimizers and was not
            called.
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
        raise TypeError(
            f"{name} must take {many}, got a function of {signature}; pass one such as {example}"
        ) from error


def rule(name: str, value: Any) -> None:
    """Refuses all but a rule, of functions that take what they will be given.

    Raises:
        TypeError: `value` is no `Threshold`, or one of its functions takes other arguments.
    """
    part(name, value, Threshold, "thresholds.ema(2.0)")
    function(f"{name}.init", value.init, "lambda sizes: ...", takes=1)
    function(f"{name}.limit", value.limit, "lambda sizes, state, context: ...", takes=3)
    function(
        f"{name}.learn", value.learn, "lambda sizes, clipped_sizes, state, context: ...", takes=4
    )


def limits(value: Any, shape: tuple[int, ...]) -> None:
    """Refuses what a rule gave as the limits of sizes of this shape, if they are no numbers or do
    not belong to them.

    Raises:
        TypeError: `value` is no array and no number.
        ValueError: it does not broadcast against the sizes.
    """
    advice = "return one for each size, or one for all"
    if not _is_array(value):
        raise TypeError(
            f"limit must return numbers that broadcast against the sizes, {shape}, but got "
            f"{value!r}; {advice}"
        )
    if not _broadcasts(jnp.shape(value), shape):
        raise ValueError(
            f"limit must return numbers that broadcast against the sizes, {shape}, but got shape "
            f"{jnp.shape(value)}; {advice}"
        )


def response(value: Any, shape: tuple[int, ...]) -> None:
    """Refuses what a response made of a gradient of this shape, if it is something else.

    Raises:
        TypeError: `value` is no array, or has another shape.
    """
    if not _is_array(value) or jnp.shape(value) != shape:
        found = f"shape {jnp.shape(value)}" if _is_array(value) else repr(value)
        raise TypeError(
            f"response must return a gradient of the same shape, {shape}, but got {found}; return "
            f"one such as gradient * factor"
        )


def state(value: Any, kind: type) -> None:
    """Refuses a state that another transform made, or that a checkpoint has lost the type of.

    Raises:
        TypeError: `value` is not of the type `kind`.
    """
    if isinstance(value, kind):
        return
    plain = (
        value is None
        or isinstance(value, Mapping | list)
        or (type(value) is tuple and not any(map(_is_named, value)))
    )
    if plain or type(value).__name__ == "EmptyState":
        advice = (
            "restore with the state of init as the target, or start from init if the checkpoint "
            "has no such state "
            "(the order is update(updates, state, params))"
        )
    else:
        advice = "pass the state of this very transform (a chain has a tuple of states, and is updated as a whole)"
    raise TypeError(
        f"state must be the {kind.__name__} that init returned, got {type(value).__name__}; "
        f"{advice}"
    )


def not_a_transform(name: str, value: Any) -> None:
    """Refuses an optimizer where its state is meant.

    Raises:
        TypeError: `value` is one.
    """
    if isinstance(value, optax.GradientTransformation | optax.MultiSteps):
        raise TypeError(
            f"{name} must be a state, got the {type(value).__name__} that makes it; pass the state "
            f"that init or update returned"
        )


def group_name(path: str, name: Any) -> None:
    """Refuses a name of a group that cannot be one.

    Raises:
        TypeError: `name` is not hashable.
    """
    if not isinstance(name, Hashable):
        raise TypeError(
            f"name_of must return a name for {path!r}, got {name!r}; return a string, or None to "
            f"leave the leaf alone"
        )


def axes_of(name: str, axes: Any, path: str) -> None:
    """Refuses what a function chose as the axes of a leaf, if it is something else.

    Raises:
        TypeError: `axes` is neither an integer nor several.
    """
    several = axes if isinstance(axes, Sequence) else (axes,)
    if not all(
        isinstance(axis, numbers.Integral) and not isinstance(axis, bool) for axis in several
    ):
        raise TypeError(
            f"{name} must return axes for {path!r}, got {axes!r}; return an integer, several in a "
            f"tuple, or None"
        )


def leaf(path: str, value: Any) -> None:
    """Refuses a leaf of a tree that is neither an array nor a number.

    Raises:
        TypeError: `value` is something else.
    """
    if (
        not isinstance(value, numbers.Number)
        and not hasattr(value, "dtype")
        and not hasattr(value, "__jax_array__")
    ):
        raise TypeError(
            f"updates must be a tree of arrays, got {value!r} at {path!r}; take it out, or hide it "
            f"with optax.masked"
        )


def sparse(path: str, value: Any) -> None:
    """Refuses a sparse array, whose numbers are no elements: several of one index are added up
    later.

    Raises:
        TypeError: `value` is one.
    """
    if is_sparse(value):
        raise TypeError(
            f"updates must be a tree of dense arrays, got a {type(value).__name__} at {path!r}; "
            f"pass its todense(), "
            "or clip the data of its sum_duplicates()"
        )


def names(given: Iterable[str], found: Iterable[str]) -> None:
    """Refuses a dict of limits whose keys are not exactly the groups of the tree.

    Raises:
        ValueError: a group has no limit, or a limit has no group.
    """
    given, found = set(given), set(found)
    if given - found:
        raise ValueError(
            f"threshold has limits for {sorted(given - found)}, but the tree has only the groups "
            f"{sorted(found)}; "
            "remove or rename them"
        )
    if found - given:
        raise ValueError(
            f"threshold has no limit for the groups {sorted(found - given)}; add one for each, "
            f"float('inf') for no limit"
        )


def params_given(params: Any) -> None:
    """Refuses to go on without parameters where a limit depends on them.

    Raises:
        ValueError: `params` is None.
    """
    if params is None:
        raise ValueError(
            "this threshold is relative to the parameters, got params=None; call update(updates, "
            "state, params)"
        )


def whole(name: str, shape: tuple[int, ...], axes: tuple[Any, ...]) -> None:
    """Refuses to guess which of a leaf's own axes the mapped axes split.

    Raises:
        ValueError: the leaf is split.
    """
    if axes:
        raise ValueError(
            f"{name} must be given for a scope finer than a leaf, where a leaf of shape {shape} is "
            f"split along {axes}, "
            "got None; pass those mapped axes along which the numbers that share a size are split, "
            "() for none, "
            "or a tree of such choices"
        )


def units(path: str, shape: tuple[int, ...], axes: tuple[Any, ...] | None) -> None:
    """Refuses to guess the units of one device's part of a leaf.

    Raises:
        ValueError: the leaf is sharded.
    """
    if axes or axes is None:
        raise ValueError(
            f"scope must say what a unit of the leaf {path!r} is, whose part here has the shape "
            f"{shape}: a length of 1 may be one device's share of a longer axis; "
            "pass scopes.unit(axes=...), such as axes=0"
        )


def stack(name: str, lengths: tuple[int, ...], other: tuple[int, ...]) -> None:
    """Refuses stacks of different lengths in one group.

    Raises:
        ValueError: the lengths differ.
    """
    if lengths != other:
        raise ValueError(
            f"batch_axes must give stacks of one length in the group {name!r}, got {lengths} and "
            f"{other}; give each its own group, or return None for a leaf that is no stack"
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
            f"updates has at {path!r} a matrix that is split along {axes}, of which no device "
            f"knows the singular values; "
            "clip under jit, or gather it first with jax.lax.all_gather"
        )


def mapped(name: str, missing: tuple[Any, ...], axes: tuple[Any, ...]) -> None:
    """Refuses names of axes that are not mapped where they are used.

    Raises:
        ValueError: a name is `missing` among the `axes` that are mapped.
    """
    if not missing:
        return
    advice = f"pass some of {axes}, or () if every device has the whole of each leaf"
    if not axes:
        advice = f"call this in shard_map, pmap or vmap with this axis_name, or leave {name} out, which is right under jit"
    raise ValueError(
        f"{name} must name mapped axes, got {missing} where {axes or 'none'} are mapped; {advice}"
    )


def tracked(name: str, given: Any, axes: tuple[Any, ...]) -> None:
    """Refuses to guess whether gradients are sharded.

    Raises:
        ValueError: nothing is `given`.
    """
    if given is None:
        raise ValueError(
            f"{name} must be given where JAX does not track what differs between devices (pmap, or "
            f"shard_map with "
            f"check_vma=False), got None; pass those of {axes} over which each leaf is sharded or, "
            f"for gradients that "
            f"pmean made equal on all devices, {name}=()"
        )


def not_mapped(name: str, axes: tuple[Any, ...]) -> None:
    """Refuses scopes finer than a leaf for examples that are spread over mapped axes.

    Raises:
        ValueError: there are such axes.
    """
    if axes:
        raise ValueError(
            f"{name} must not be finer than a leaf in a shard_map or pmap over {axes}, got one "
            f"that is; "
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
        raise ValueError(
            f"{name} must be the same on all devices, got one that varies along {axes}; pass "
            f"jax.lax.pmean of it"
        )


def loss(value: Any) -> None:
    """Refuses to watch a loss that is missing, or is several numbers.

    Raises:
        ValueError: it is.
    """
    if value is None:
        raise ValueError(
            'watch="loss" needs the loss, got none; call update(updates, state, params, value=loss)'
        )
    if jnp.shape(value) != ():
        raise ValueError(
            f"value must be one number, got an array of shape {jnp.shape(value)}; pass the mean of "
            f"the loss"
        )


def same_structure(params: Any, treedef: Any) -> list[Any]:
    """Refuses parameters that are no tree like the updates, to the leaves of these; returns what
    stands where those do.

    Raises:
        ValueError: the structure differs.
    """
    try:
        return treedef.flatten_up_to(params)
    except (ValueError, TypeError) as error:
        updates = jax.tree.unflatten(treedef, range(treedef.num_leaves))
        found, expected = (
            {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
            for tree in (params, updates)
        )
        raise ValueError(
            f"params has another structure than updates, got {sorted(found - expected)[:3]} in "
            f"params alone and "
            f"{sorted(expected - found)[:3]} in updates alone; pass the params that these are "
            f"updates of"
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
            f"params has {was} at {path!r}, where updates has shape {shape}; pass the params that "
            f"these are updates of"
        )


def same_groups(given: Sequence[str], known: Sequence[str] | None) -> None:
    """Refuses updates whose groups are not those of the state; `known` is None where a state does
    not tell.

    Raises:
        ValueError: a group is missing, is new, or stands at another place.
    """
    if known is not None and list(given) != list(known):
        new, gone = (
            [name for name in these if name not in those][:3]
            for these, those in ((given, known), (known, given))
        )
        how = (
            f"{new} only in updates and {gone} only in state"
            if new or gone
            else "the same ones in another order"
        )
        raise ValueError(
            f"updates has {len(given)} groups, but state was made for {len(known)}, got {how}; "
            f"call init on a tree with the "
            "same leaves, or update(updates, state, params) if some gradients are None"
        )


def state_tree(treedef: Any, tree: Any) -> None:
    """Refuses a state whose trees are not like the updates.

    Raises:
        ValueError: the structure differs.
    """
    try:
        treedef.flatten_up_to(tree)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"updates has another structure than the tree that state was made for, got {treedef}; "
            f"call init on a tree with the "
            "same leaves, or update(updates, state, params) if some gradients are None"
        ) from error


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


def _is_number(value: Any) -> tuple[bool, bool]:
    """Whether it is an array, and whether it is real: booleans and complex numbers are not."""
    array = isinstance(value, jax.Array | np.ndarray)
    if array:
        return True, jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(
            value.dtype, jnp.integer
        )
    return False, isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)


def _is_named(value: Any) -> bool:
    """Whether it is a NamedTuple, as states are, or a chain of them."""
    return hasattr(value, "_fields") or (isinstance(value, tuple) and any(map(_is_named, value)))


def is_sparse(value: Any) -> bool:
    """Whether it is a sparse array."""
    # of JAX, SciPy and others, none of which need be imported
    return hasattr(type(value), "todense")


def _remembers(rule: Any) -> bool:
    """Whether a rule has a state; found without an array, which would start JAX, perhaps before its
    devices are chosen.
    """
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
