"""Mapped axes and explicit meshes: which leaves they shard, and all-reduces over the parts."""

import functools
import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from optaxclip import _jax, _validate

Names = tuple[Hashable, ...]
"""Names of mapped axes."""


def is_names(value: Any) -> bool:
    """Whether this is one name, a tuple of names, or None, and not a container of such."""
    containers = isinstance(value, dict | list) or (
        isinstance(value, tuple) and not all(isinstance(n, str) for n in value)
    )
    return not containers


def names_of(value: Any) -> Names | None:
    """One name or more as a tuple; None stays None."""
    return value if value is None or isinstance(value, tuple) else (value,)


def manual_axes() -> Names:
    """The axes of the `shard_map` or `pmap` around this code.

    A `pmap` without `axis_name` does not count. Its axis has no name, so no collective can use it
    and each device has whole gradients.
    """
    axes = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(axis for axis in axes if not _jax.is_nameless(axis))


def bound(names: Names | None) -> Names | None:
    """Of the names, those of axes that are mapped here."""
    return names and tuple(filter(_is_bound, names))


def all_bound(name: str, names: Names | None) -> Names | None:
    """The names, which the argument `name` gave.

    Raises:
        ValueError: one of them is no axis that is mapped here.
    """
    missing = tuple(axis for axis in names or () if not _is_bound(axis))
    _validate.mapped(
        name, missing, tuple(axis for axis in _jax.axis_names() if not _jax.is_nameless(axis))
    )
    return names


def varying(x: Any) -> Names | None:
    """The axes along which a value differs between devices; None where its type does not tell.

    It is None with `check_vma=False` and in `pmap`. On JAX 0.8.2, 0.10.2 and 0.12.0 `pmap` is a
    `shard_map` with `check_vma=False`: the mesh, its axis types, the types of values, the kind of
    trace, the name stack and the trace context are equal. So code inside cannot tell whether
    gradients are whole, as usual in `pmap`, or sharded, and must ask. Two sorts of `pmap` can be
    recognized. There gradients count as whole, as Optax has them: a `pmap` without `axis_name` (see
    `manual_axes`), and any `pmap` on 0.8.2 with `jax_pmap_shmap_merge=False`.
    """
    axes = manual_axes()
    tracked = bool(axes) and bool(_jax.varying(jax.lax.axis_index(axes[0])))
    return tuple(axis for axis in axes if axis in _jax.varying(x)) if tracked or not axes else None


def split_axes(name: str, given: Names | None, x: Any) -> Names:
    """Of the axes that are given, or of all, those along which `x` is split.

    Raises:
        ValueError: none are given, and JAX does not know.
    """
    known = varying(x)
    if known is None:
        _validate.tracked(name, given, manual_axes())
    if given is None or known is None:
        return given or known or ()
    manual = manual_axes()
    return tuple(axis for axis in given if axis in known or axis not in manual)


def unsharded(x: Any, last: int) -> Any:
    """`x` with its last axes unsharded; nothing to do without an explicit mesh."""
    spec = _spec(x)
    return _split(x, spec[: max(len(spec) - last, 0)], x) if any(spec) else x


def is_explicit(x: Any) -> bool:
    """Whether an explicit mesh splits `x`."""
    return any(_spec(x))


def zeros_beside(leaf: Any, shape: jax.ShapeDtypeStruct) -> Array:
    """Zeros of this shape, sharded as the leaf along the axes of equal length."""
    if isinstance(leaf, Tracer):
        return sharded_like(jnp.zeros_like(shape), shape)
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding) or len(sharding.spec) > len(shape.shape):
        return jnp.zeros(shape.shape, shape.dtype)
    lengths = zip(sharding.spec, jnp.shape(leaf), shape.shape, strict=False)  # a spec may be short
    spec = PartitionSpec(*[axes if length == kept else None for axes, length, kept in lengths])
    return jax.lax.full(shape.shape, 0, shape.dtype, sharding=NamedSharding(sharding.mesh, spec))


def placed(state: Any, sizes: Array) -> Any:
    """The state of a block, sharded as its sizes; its arrays end in their shape."""

    def place(x: Any) -> Any:
        x = jnp.asarray(x)
        if isinstance(sizes, Tracer) or not isinstance(sizes.sharding, NamedSharding):
            return x + sizes.astype(x.dtype)  # zeros
        spec = PartitionSpec(*[None] * (x.ndim - sizes.ndim), *sizes.sharding.spec)
        return jax.device_put(x, NamedSharding(sizes.sharding.mesh, spec))

    return jax.tree.map(place, state)


def sharded_like(x: Any, like: Any) -> Any:
    """`x`, on an explicit mesh split over it as `like` is."""
    return _split(x, _spec(like), like) if any(_spec(like)) else x


def beside(state: Any, sizes: Array) -> Any:
    """The same for a traced state, on an explicit mesh."""
    spec_of_sizes = _spec(sizes)

    def place(x: Any) -> Any:
        spec = (None,) * (jnp.ndim(x) - len(spec_of_sizes)) + spec_of_sizes
        return _split(x, spec, sizes) if _spec(x) != spec else x

    return jax.tree.map(place, state) if any(spec_of_sizes) else state


def split_as(like: Any, tree: Any) -> Any:
    """The tree, on an explicit mesh split over it as another of its structure is."""

    def split(old: Any, new: Any) -> Any:
        return (
            _split(new, _spec(old) or (None,) * new.ndim, new)
            if any(_spec(new)) and _spec(new) != _spec(old)
            else new
        )

    return jax.tree.map(split, like, tree)


def varying_as(like: Any, tree: Any) -> Any:
    """The tree, typed as varying along every axis along which something in `like` varies.

    The derivative by what is the same on all devices is a sum over them; by this it is not.
    """
    axes = {axis: None for x in jax.tree.leaves(like) for axis in varying(x) or ()}

    def vary(x: Any) -> Any:
        missing = tuple(axis for axis in axes if axis not in (varying(x) or ()))
        return _jax.vary(x, missing) if missing else x

    return jax.tree.map(vary, tree)


def explicit_mesh(tree: Any) -> Any:
    """The explicit mesh that an array of the tree is on, or None."""
    meshes = [
        getattr(_sharding_of(x), "mesh", None)
        for x in jax.tree.leaves(tree)
        if isinstance(x, Array)
    ]
    return next((mesh for mesh in meshes if getattr(mesh, "explicit_axes", ())), None)


def compiled_on_mesh(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled if its arrays are on an explicit mesh.

    Some operations do not run there one by one.
    """
    compiled = jax.jit(function)

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        here = any(
            isinstance(x, Array) and not isinstance(x, Tracer) for x in jax.tree.leaves(args)
        )
        return (compiled if here and explicit_mesh(args) is not None else function)(*args)

    return run


def batch_axes(batch: Any) -> Any:
    """The mesh axes that shard the first axis of the first sharded array, or None."""
    return next((spec[0] for x in jax.tree.leaves(batch) if any((spec := _spec(x))[:1])), None)


def on_mesh(mesh: Any, *spec: Any) -> NamedSharding | None:
    """Split over an explicit mesh like this; None without one."""
    return None if mesh is None else NamedSharding(mesh, PartitionSpec(*spec))


def spec_on(mesh: Any, x: Any) -> tuple[Any, ...]:
    """Of each axis, how the explicit mesh splits it; all None for what is on no mesh."""
    return tuple(_spec(x)) if mesh is not None and isinstance(x, Array) else (None,) * jnp.ndim(x)


def parts_of(mesh: Any, axes: Any) -> int:
    """How many parts what is split along these axes of the mesh has."""
    return math.prod(mesh.shape[axis] for axis in names_of(axes) or ())


def resharded(tree: Any, out: Any) -> Any:
    """The tree, sharded as `out`, a prefix tree of shardings; None leaves a part as it is."""
    return jax.tree.map(
        lambda to, part: part if to is None else _jax.reshard(part, to),
        out,
        tree,
        is_leaf=lambda x: x is None,
    )


def automatic(mesh: Any, function: Callable[..., Any], out: Any, *args: Any) -> Any:
    """`function(*args)`, where the compiler chooses how to split what lies between.

    JAX refuses some operations along explicit axes, such as a product that sums over one.

    Args:
        mesh: the explicit mesh; without one the function is only called.
        function: closes over no array.
        out: how to split the result, a tree of shardings that it starts with.
        args: trees of arrays.
    """
    if mesh is None:
        return function(*args)
    return jax.sharding.auto_axes(function, axes=mesh.explicit_axes, out_sharding=out)(*args)


def mapped_as(like: Array, x: Array) -> Array:
    """`x` in the shape of `like`, and mapped by `jax.vmap` if `like` is.

    The compiler drops the selection.

    On an explicit mesh JAX refuses to stack what is mapped with what is not.
    """
    return jnp.where(True, x, like)


def gathered(x: Array, axes: Names) -> Array:
    """`[n, ...]` of every device one after the other, the same on all of them."""
    if not axes:
        return x
    # A sum, because of what `jax.lax.all_gather` returns JAX does not know that it is the same on
    # all.
    parts = jnp.zeros(
        (jax.lax.psum(1, axes), *x.shape), jnp.int32 if x.dtype == jnp.dtype(bool) else x.dtype
    )
    parts = parts.at[jax.lax.axis_index(axes)].set(x.astype(parts.dtype))
    parts = jax.lax.psum(parts, axes)
    return parts.reshape(-1, *x.shape[1:]).astype(x.dtype)


def once(x: Array, sharded: Names, axes: Names) -> Array:
    """`x` on the first of the devices that hold it, and zero on the others.

    Args:
        x: sharded over the axes `sharded`.
        sharded: some of `axes`.
        axes: over which sums or maxima are about to be taken.
    """
    copies = [axis for axis in axes if axis not in sharded]
    first = functools.reduce(
        jnp.logical_and, (jax.lax.axis_index(axis) == 0 for axis in copies), jnp.array(True)
    )
    return jnp.where(first, x, 0) if copies else x


def total(tree: Any, axes: Names) -> Any:
    """The sum over mapped axes of each array, all in one message."""
    leaves, treedef = jax.tree.flatten(tree)
    if not leaves or not axes:
        return tree
    vector = jax.lax.psum(jnp.concatenate([jnp.ravel(leaf) for leaf in leaves]), axes)
    ends = itertools.accumulate((leaf.size for leaf in leaves), initial=0)
    parts = [
        vector[i:j].reshape(leaf.shape)
        for (i, j), leaf in zip(itertools.pairwise(ends), leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, parts)


def largest(tree: Any, axes: Names) -> Any:
    """The maximum over mapped axes of each array."""
    return jax.tree.map(lambda x: _largest(x, axes), tree) if axes else tree


def everywhere(parts: Array) -> Array:
    """Of parts `[4, leaves]`, three maxima and a mean share, made those of the whole mesh."""
    axes = manual_axes()
    if not axes:
        return parts
    # Collectives take only what varies along all of their axes, and adding such a zero makes it so.
    parts = parts + sum(jax.lax.axis_index(axis) * 0.0 for axis in axes)
    return jnp.concatenate([jax.lax.pmax(parts[:3], axes), jax.lax.pmean(parts[3:], axes)])


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _largest(x: Array, axes: Names) -> Array:
    return jax.lax.pmax(x, axes)


@_largest.defjvp
def _largest_jvp(
    axes: Names, primals: Sequence[Array], tangents: Sequence[Array]
) -> tuple[Array, Array]:
    """The derivative of a maximum is that of the element that it is; JAX has none for `pmax`."""
    (x,), (dx,) = primals, tangents
    top = _largest(x, axes)
    here = (x == top).astype(dx.dtype)
    return top, jax.lax.psum(here * dx, axes) / jax.lax.psum(here, axes)


def _is_bound(name: Hashable) -> bool:
    try:
        jax.lax.axis_size(name)
    except (
        NameError,
        TypeError,
        ValueError,
    ):  # no such axis; a set, for one; a number, an axis of an array to JAX
        return False
    return True


def _split(x: Any, spec: tuple[Any, ...], like: Any) -> Any:
    """`x`, sharded over the explicit mesh of `like`, which need not be the context's."""
    return _jax.reshard(x, NamedSharding(_sharding_of(like).mesh, PartitionSpec(*spec)))


def _spec(x: Any) -> tuple[Any, ...]:
    """Of each axis, how an explicit mesh splits it; all None on other meshes."""
    return tuple(getattr(_sharding_of(x), "spec", ()))


def _sharding_of(x: Any) -> Any:
    return getattr(jax.typeof(x) if isinstance(x, Array) else x, "sharding", None)
