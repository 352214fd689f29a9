"""Checks of mapped axes, and of which array axes they shard."""

from typing import Any


def whole(name: str, shape: tuple[int, ...], axes: tuple[Any, ...]) -> None:
    """Refuses to guess which array axes of a leaf are sharded over the mapped axes.

    Raises:
        ValueError: the leaf is sharded.
    """
    if axes:
        raise ValueError(
            f"{name} must be given for a scope finer than a leaf, where a leaf of shape {shape} is "
            f"split along {axes}, got None; pass those mapped axes along which the numbers that "
            "share a size are split, () for none, or a tree of such choices"
        )


def units(path: str, shape: tuple[int, ...], axes: tuple[Any, ...]) -> None:
    """Refuses to guess the units of one device's part of a leaf.

    Raises:
        ValueError: the leaf is sharded.
    """
    if axes:
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


def not_split(path: str, axes: tuple[Any, ...]) -> None:
    """Refuses a sharded matrix: no device can compute its singular values.

    Raises:
        ValueError: the matrix is sharded over mapped axes.
    """
    if axes:
        raise ValueError(
            f"updates has at {path!r} a matrix that is split along {axes}, of which no device "
            "knows the singular values; clip under jit, or gather it first with "
            "jax.lax.all_gather"
        )


def mapped(name: str, missing: tuple[Any, ...], axes: tuple[Any, ...]) -> None:
    """Refuses names of axes that are not mapped at this point.

    Raises:
        ValueError: a name is `missing` among the mapped `axes`.
    """
    if not missing:
        return
    advice = f"pass some of {axes}, or () if every device has the whole of each leaf"
    if not axes:
        advice = (
            f"call this in shard_map, pmap or vmap with this axis_name, or leave {name} out, "
            "which is right under jit"
        )
    raise ValueError(
        f"{name} must name mapped axes, got {missing} where {axes or 'none'} are mapped; {advice}"
    )


def tracked(name: str, given: Any, axes: tuple[Any, ...]) -> None:
    """Refuses to guess whether gradients are sharded.

    Raises:
        ValueError: `given` is None.
    """
    if given is None:
        raise ValueError(
            f"{name} must be given where JAX does not track what differs between devices (pmap, or "
            f"shard_map with check_vma=False), got None; pass those of {axes} over which each leaf "
            f"is sharded or, for gradients that pmean made equal on all devices, {name}=()"
        )


def not_mapped(name: str, axes: tuple[Any, ...]) -> None:
    """Refuses scopes finer than a leaf for examples inside `shard_map` and `pmap`.

    Raises:
        ValueError: there are mapped axes.
    """
    if axes:
        raise ValueError(
            f"{name} must not be finer than a leaf in a shard_map or pmap over {axes}, got one "
            "that is; clip the examples under jit, or by leaves"
        )


def one_run(name: str, runs: tuple[int, ...]) -> None:
    """Refuses a state that is vmapped over runs, because runs must not be mixed.

    Raises:
        ValueError: the state has leading axes.
    """
    if runs:
        raise ValueError(
            f"{name} must be of one run, got one that is vmapped over {runs}; "
            f"pass one of them with jax.tree.map(lambda x: x[0], {name})"
        )


def same_on_all(name: str, axes: tuple[Any, ...] | None) -> None:
    """Refuses a number that varies over devices, because devices would decide differently.

    Raises:
        ValueError: the number varies over mapped axes.
    """
    if axes:
        raise ValueError(
            f"{name} must be the same on all devices, got one that varies along {axes}; pass "
            "jax.lax.pmean of it"
        )
