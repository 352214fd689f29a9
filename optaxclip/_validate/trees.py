"""Checks of trees and states: what `init` and `update` get, and what parts make of it."""

import numbers
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip._validate.arguments import is_array, is_number


def limits(value: Any, shape: tuple[int, ...]) -> None:
    """Checks that the limits of a rule are numbers that broadcast against the sizes.

    Raises:
        TypeError: `value` is neither an array nor a number.
        ValueError: `value` does not broadcast against the sizes.
    """
    advice = "return one for each size, or one for all"
    if not is_array(value):
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
    """Checks that a response returned a gradient of the same shape.

    Raises:
        TypeError: `value` is not an array, or has another shape.
    """
    if not is_array(value) or jnp.shape(value) != shape:
        got = f"shape {jnp.shape(value)}" if is_array(value) else repr(value)
        raise TypeError(
            f"response must return a gradient of the same shape, {shape}, but got {got}; return "
            "one such as gradient * factor"
        )


def state(value: Any, kind: type) -> None:
    """Refuses the state of another transform, and a state that lost its type in a checkpoint.

    Raises:
        TypeError: `value` does not have the type `kind`.
    """
    if isinstance(value, kind):
        return
    plain = value is None or isinstance(value, Mapping | list)
    plain = plain or (type(value) is tuple and not any(map(_is_named, value)))
    if plain or type(value).__name__ == "EmptyState":
        advice = (
            "restore with the state of init as the target, or start from init if the checkpoint "
            "has no such state (the order is update(updates, state, params))"
        )
    else:
        advice = (
            "pass the state of this very transform (a chain has a tuple of states, and is updated "
            "as a whole)"
        )
    raise TypeError(
        f"state must be the {kind.__name__} that init returned, got {type(value).__name__}; "
        f"{advice}"
    )


def not_a_transform(name: str, value: Any) -> None:
    """Refuses an optimizer where its state is needed.

    Raises:
        TypeError: `value` is an optimizer.
    """
    if isinstance(value, optax.GradientTransformation | optax.MultiSteps):
        raise TypeError(
            f"{name} must be a state, got the {type(value).__name__} that makes it; pass the state "
            "that init or update returned"
        )


def group_name(path: str, name: Any) -> None:
    """Checks that the name of a group can be a key of a dict.

    Raises:
        TypeError: `name` is not hashable.
    """
    if not isinstance(name, Hashable):
        raise TypeError(
            f"name_of must return a name for {path!r}, got {name!r}; return a string, or None to "
            "leave the leaf alone"
        )


def axes_of(name: str, axes: Any, path: str) -> None:
    """Checks that a function returned axes of a leaf.

    Raises:
        TypeError: `axes` is neither an integer nor a sequence of integers.
    """

    def is_axis(axis: Any) -> bool:
        return isinstance(axis, numbers.Integral) and not isinstance(axis, bool)

    if not all(map(is_axis, axes if isinstance(axes, Sequence) else (axes,))):
        raise TypeError(
            f"{name} must return axes for {path!r}, got {axes!r}; return an integer, several in a "
            "tuple, or None"
        )


def leaf(path: str, value: Any) -> None:
    """Checks that a leaf of a tree is an array or a number.

    Raises:
        TypeError: `value` is something else.
    """
    is_array = hasattr(value, "dtype") or hasattr(value, "__jax_array__")
    if not isinstance(value, numbers.Number) and not is_array:
        raise TypeError(
            f"updates must be a tree of arrays, got {value!r} at {path!r}; take it out, or hide it "
            "with optax.masked"
        )


def sparse(path: str, value: Any) -> None:
    """Refuses sparse arrays: their stored numbers are not elements, since indices may repeat.

    Raises:
        TypeError: `value` is sparse.
    """
    if is_sparse(value):
        raise TypeError(
            f"updates must be a tree of dense arrays, got a {type(value).__name__} at {path!r}; "
            "pass its todense(), or clip the data of its sum_duplicates()"
        )


def names(given: Iterable[str], groups: Iterable[str]) -> None:
    """Checks that the keys of a dict of limits are the groups of the tree.

    Raises:
        ValueError: a group has no limit, or a limit has no group.
    """
    given, groups = set(given), set(groups)
    if given - groups:
        raise ValueError(
            f"threshold has limits for {sorted(given - groups)}, but the tree has only the groups "
            f"{sorted(groups)}; remove or rename them"
        )
    if groups - given:
        if given and groups - given == {"tree"}:
            raise ValueError(
                f"threshold has limits for {sorted(given)}, and only the groups ['tree'] (the "
                "leaves under no key) have none; add one for each, float('inf') for no limit"
            )
        raise ValueError(
            f"threshold has no limit for the groups {sorted(groups - given)}; add one for each, "
            "float('inf') for no limit"
        )


def params_given(params: Any, reason: str = "this threshold is relative to the parameters") -> None:
    """Checks that parameters are given where something depends on them.

    Raises:
        ValueError: `params` is None.
    """
    if params is None:
        raise ValueError(f"{reason}, got params=None; call update(updates, state, params)")


def one_source(measured: Any) -> None:
    """Refuses a tree to measure beside sizes that are given.

    Raises:
        ValueError: there is one.
    """
    if measured is not None:
        raise ValueError(
            f"sizes and measured are both given, got measured={type(measured).__name__}; "
            "pass the sizes, or the tree to measure"
        )


def given_sizes(sizes: Any, names: Sequence[str]) -> None:
    """Refuses sizes that are not one number for each of these groups.

    Raises:
        TypeError: they are no numbers.
        ValueError: there is not one for each group.
    """
    if isinstance(sizes, Mapping):
        if set(sizes) != set(names):
            raise ValueError(
                f"sizes must have one number for each of the groups {sorted(names)}, got "
                f"{sorted(sizes)}; add or remove groups"
            )
        for name, size in sizes.items():
            if not is_number(size)[1] or np.shape(size):
                raise TypeError(
                    f"sizes must have a real number for each group, got {size!r} for {name!r}; "
                    "pass its norm"
                )
        return
    if not all(is_number(size)[1] for size in jax.tree.leaves(sizes)) or sizes is None:
        raise TypeError(
            f"sizes must be numbers, got {sizes!r}; pass a number, a dict by group or an array"
        )
    shape = np.shape(sizes)
    if shape != (len(names),) and not (shape == () and len(names) < 2):
        raise ValueError(
            f"sizes must be one number for each of the {len(names)} groups, got the shape "
            f"{shape}; telemetry.group_names has their order"
        )


def given_block(path: str, size: Any, shape: Sequence[int]) -> None:
    """Refuses sizes that do not belong to a leaf.

    Raises:
        TypeError: they are no numbers.
        ValueError: they do not broadcast against the sizes of the leaf.
    """
    if not is_number(size)[1]:
        raise TypeError(f"sizes must be arrays, got {size!r} at {path!r}; pass a tree of numbers")
    if not _broadcasts(np.shape(size), tuple(shape)):
        raise ValueError(
            f"sizes must broadcast against the sizes of each leaf, got the shape {np.shape(size)} "
            f"for {path!r}, whose sizes have the shape {tuple(shape)}; keep the axes measured "
            "together with length 1"
        )


def same_structure(params: Any, treedef: Any) -> list[Any]:
    """Checks that parameters have the structure of the updates; returns their leaves.

    Raises:
        ValueError: the structures differ.
    """
    try:
        return treedef.flatten_up_to(params)
    except (ValueError, TypeError) as error:
        updates = jax.tree.unflatten(treedef, range(treedef.num_leaves))
        in_params, in_updates = _paths(params), _paths(updates)
        raise ValueError(
            f"params has another structure than updates, got {sorted(in_params - in_updates)[:3]} "
            f"in params alone and {sorted(in_updates - in_params)[:3]} in updates alone; pass the "
            "params that these are updates of"
        ) from error


def parameter(path: str, param: Any, shape: tuple[int, ...]) -> None:
    """Checks that a parameter has the shape of its gradient.

    Raises:
        ValueError: the parameter is missing or has another shape.
    """
    got = None if param is None or isinstance(param, tuple) else jnp.shape(param)
    if got != shape:
        was = "nothing" if got is None else f"shape {got}"
        raise ValueError(
            f"params has {was} at {path!r}, where updates has shape {shape}; pass the params that "
            "these are updates of"
        )


def same_groups(given: Sequence[str], known: Sequence[str] | None) -> None:
    """Checks that updates have the groups of the state; `known` is None if the state has no names.

    Raises:
        ValueError: a group is missing or new, or the order differs.
    """
    if known is not None and list(given) != list(known):
        new = [name for name in given if name not in known][:3]
        gone = [name for name in known if name not in given][:3]
        how = "the same ones in another order"
        if new or gone:
            how = f"{new} only in updates and {gone} only in state"
        raise ValueError(
            f"updates has {len(given)} groups, but state was made for {len(known)}, got {how}; "
            "call init on a tree with the same leaves, or update(updates, state, params) if some "
            "gradients are None"
        )


def state_tree(treedef: Any, tree: Any) -> None:
    """Checks that a tree in a state has the structure of the updates.

    Raises:
        ValueError: the structures differ.
    """
    try:
        treedef.flatten_up_to(tree)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"updates has another structure than the tree that state was made for, got {treedef}; "
            "call init on a tree with the same leaves, or update(updates, state, params) if some "
            "gradients are None"
        ) from error


def real(dtype: Any) -> None:
    """Refuses complex updates for bounds that differ by sign.

    Raises:
        TypeError: `dtype` is complex.
    """
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"bounds that differ by sign need real updates, got {dtype}; "
            "cut complex numbers by magnitude with clip_by_value(limit)"
        )


def _is_named(value: Any) -> bool:
    """Returns whether it is a NamedTuple, like a state, or a chain of NamedTuples."""
    return hasattr(value, "_fields") or (isinstance(value, tuple) and any(map(_is_named, value)))


def is_sparse(value: Any) -> bool:
    """Returns whether it is a sparse array of JAX, SciPy or another library."""
    return hasattr(type(value), "todense")  # by method, so that no library need be imported


def _paths(tree: Any) -> set[str]:
    """Returns the paths of the leaves of a tree."""
    return {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Returns whether an array of one shape broadcasts against another shape without growing it."""
    try:
        return np.broadcast_shapes(shape, to) == to
    except ValueError:
        return False
