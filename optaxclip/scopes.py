"""Which numbers share one size: `tree > group > leaf > unit > element`."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from optaxclip import _validate
from optaxclip._packing import columns, common
from optaxclip._sharding import Names, is_names, names_of
from optaxclip._types import Axes, Scope

AxesOf = Callable[[str, Any], int | Sequence[int] | None]


def tree() -> Scope:
    """All leaves together: one size for the whole tree."""
    return Scope(group=lambda path: "tree")


def group(name_of: Callable[[str], str | None]) -> Scope:
    """Leaves of one name together.

    Args:
        name_of: `path -> name`, with paths such as `"encoder/0/kernel"`; None means that
            the leaf is neither measured nor clipped.

    Raises:
        TypeError: `name_of` is not a function of a path, or (on `init` or `update`) what it returns is no name.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> from optaxclip import scopes
        >>> by_layer = scopes.group(lambda path: path.split("/")[0])
        >>> clip = optaxclip.clip({"body": 1.0, "head": 0.1}, scope=by_layer)
        >>> grads = {"body": {"w": jnp.array([3.0, 4.0])}, "head": {"w": jnp.array([0.05])}}
        >>> clip.update(grads, clip.init(grads))[0]
        {'body': {'w': Array([0.6, 0.8], dtype=float32)}, 'head': {'w': Array([0.05], dtype=float32)}}
    """
    _validate.function("name_of", name_of, 'lambda path: path.split("/")[0]', takes=1)
    return Scope(group=name_of)


def leaf(*, batch_axes: int | Sequence[int] | AxesOf | None = None) -> Scope:
    """Every leaf by itself.

    Args:
        batch_axes: axes along which a leaf is a stack of layers, each measured by itself
            (layers scanned over have theirs in front, `0`); or `(path, leaf) -> axes`.

    Raises:
        TypeError: `batch_axes` is neither axes nor a function that chooses some.
    """
    if batch_axes is None:
        return Scope()
    stacked = _axes_function("batch_axes", batch_axes, lambda leaf: ())

    return Scope(axes=lambda path, leaf: _rest(_normalize("batch_axes", stacked(path, leaf), path, leaf), leaf))


def unit(axes: int | Sequence[int] | AxesOf | None = None, *, batch_axes: int | Sequence[int] | AxesOf | None = None) -> Scope:
    """Every output unit by itself: the weights that feed one output share a size.

    By convention (Brock et al. 2021, with Flax's layouts) the axes measured together are those
    of the fan-in:

    | leaf | axes |
    |---|---|
    | no more than one axis longer than 1 (bias, scale, single output) | all |
    | `[in, out]`, `[in, heads, depth]` | 0 |
    | convolutions `[..., in, out]` with four axes and more | all but the last |

    Args:
        axes: the axes measured together instead; or `(path, leaf) -> axes`, where None leaves the
            leaf alone. A leaf with too few axes for a fixed choice is one unit.
        batch_axes: axes along which a leaf is a stack of layers; not counted in the conventions.

    Raises:
        TypeError: `axes` or `batch_axes` is neither axes nor a function that chooses some.
        ValueError: a function chose an axis that a leaf does not have (on `init` or `update`).

    References:
        Brock et al., [High-performance large-scale image recognition without
        normalization](https://arxiv.org/abs/2102.06171), 2021.
    """
    stacked = _axes_function("batch_axes", () if batch_axes is None else batch_axes, lambda leaf: ())
    chosen = None if axes is None else _axes_function("axes", axes, lambda leaf: tuple(range(leaf.ndim)))

    def measured_together(path: str, leaf: Any) -> Axes | None:
        if chosen is not None:
            own = chosen(path, leaf)
            return None if own is None else _normalize("axes", own, path, leaf)
        layer = _rest(_normalize("batch_axes", stacked(path, leaf), path, leaf), leaf)
        return layer if sum(leaf.shape[axis] != 1 for axis in layer) <= 1 else layer[: 1 if len(layer) < 4 else -1]

    return Scope(axes=measured_together)


def element() -> Scope:
    """Every number by itself."""
    return Scope(axes=lambda path, leaf: ())


class Layout(NamedTuple):
    """A tree of updates as a scope sees it.

    Attributes:
        treedef: structure of the tree, with None and `optax.MaskedNode` as leaves.
        leaves: all leaves.
        measured: positions of the leaves that are measured and clipped.
        gradients: those leaves.
        paths: of the gradients.
        names: of the groups; with `axes`, the paths.
        groups: for each group, which of the gradients it has; empty with `axes`.
        axes: for each gradient the axes measured together; None if leaves are measured whole.
    """

    treedef: Any
    leaves: list[Any]
    measured: list[int]
    gradients: list[Any]
    paths: list[str]
    names: list[str]
    groups: Sequence[list[int]] = ()
    axes: Sequence[Axes] | None = None

    @property
    def blocks(self) -> int:
        """How many arrays of sizes there are."""
        return 1 if self.axes is None else len(self.axes)

    @property
    def is_of_elements(self) -> bool:
        """Whether each number is a group of its own."""
        return self.axes is not None and not any(self.axes)

    def per_leaf(self, *blocks: list[Array]) -> list[Any]:
        """For each gradient its own entry of each of the blocks, together as they broadcast against it."""
        if self.axes is not None:
            return list(zip(*blocks, strict=True))
        if len(self.groups) == 1:
            return [list(common(jnp.concatenate([block[0] for block in blocks])))] * len(self.gradients)
        group_of = {k: g for g, group in enumerate(self.groups) for k in group}
        own = columns(jnp.stack([block[0] for block in blocks]))
        return [own[group_of[k]] for k in range(len(self.gradients))]

    def of(self, tree: Any) -> list[Any]:
        """The leaves of a tree of this structure that stand where the gradients do."""
        leaves = self.treedef.flatten_up_to(tree)
        return [leaves[i] for i in self.measured]

    def matching(self, params: Any) -> list[Any]:
        """The leaves of `params` that belong to the gradients.

        Raises:
            ValueError: there are no parameters, or one is missing or has another shape than its gradient.
        """
        if not self.measured:
            return []
        _validate.params_given(params)
        leaves = _validate.same_structure(params, self.treedef)
        own = [leaves[i] for i in self.measured]
        for path, param, gradient in zip(self.paths, own, self.gradients, strict=True):
            _validate.parameter(path, param, jnp.shape(gradient))
        return own

    def names_of_axes(self, sharded_over: Any) -> list[Names | None]:
        """For each gradient the mapped axes, from one choice for all or a tree of them that the updates start with.

        Raises:
            ValueError: the tree has another structure than the updates.
        """
        tree = jax.tree.unflatten(self.treedef, list(range(len(self.leaves))))
        chosen: dict[int, Any] = {}

        def choose(names: Any, part: Any) -> None:
            chosen.update(dict.fromkeys(jax.tree.leaves(part), names_of(names)))

        try:
            jax.tree.map(choose, sharded_over, tree, is_leaf=is_names)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                "sharded_over must be names of mapped axes or a tree of them that the updates start with, got "
                f"{sharded_over!r} for updates of structure {self.treedef}; give each part its names, () for none"
            ) from error
        return [chosen[i] for i in self.measured]

    def floats(self) -> Any:
        """The tree of the gradients alone, as arrays, with None for everything else."""
        leaves: list[Any] = [None] * len(self.leaves)
        for i, gradient in zip(self.measured, self.gradients, strict=True):
            leaves[i] = jnp.asarray(gradient).astype(jnp.result_type(gradient))
        return jax.tree.unflatten(self.treedef, leaves)

    def rebuild(self, gradients: list[Array]) -> Any:
        """The tree with new gradients, everything else as it was."""
        leaves = list(self.leaves)
        for i, gradient in zip(self.measured, gradients, strict=True):
            leaves[i] = None if leaves[i] is None else gradient
        return jax.tree.unflatten(self.treedef, leaves)


def lay_out(scope: Scope, tree: Any, params: Any = None) -> Layout:
    """Finds the leaves of `tree` that `scope` measures; integers, booleans, float0 and keys never are.

    Where a gradient is None though its parameter is there, it counts as zero, and stays None.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_absent)
    leaves = present = [leaf for _, leaf in flat]
    if params is not None and any(leaf is None for leaf in leaves):
        others = _validate.same_structure(params, treedef)
        present = [_zeros(other) if leaf is None else leaf for leaf, other in zip(leaves, others, strict=True)]
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
    inexact = [i for i, leaf in enumerate(present) if _is_inexact(paths[i], leaf)]
    names = {i: _group_of(scope, paths[i]) for i in inexact}
    axes = {i: () if scope.axes is None else scope.axes(paths[i], jnp.asarray(present[i])) for i in inexact}
    measured = [i for i in inexact if names[i] is not None and axes[i] is not None]
    found = [paths[i] for i in measured]
    layout = Layout(treedef, leaves, measured, [present[i] for i in measured], found, names=found)
    if scope.axes is not None:
        return layout._replace(axes=[axes[i] or () for i in measured])
    if scope.group is None:
        return layout._replace(groups=[[k] for k in range(len(measured))])
    groups: dict[str | None, list[int]] = {}
    for k, i in enumerate(measured):
        groups.setdefault(names[i], []).append(k)
    return layout._replace(groups=list(groups.values()), names=list(groups))


def _group_of(scope: Scope, path: str) -> str | None:
    """The name of a leaf's group; its path where a scope has no groups of leaves."""
    if scope.group is None:
        return path
    name = scope.group(path)
    _validate.group_name(path, name)
    return name


def _is_absent(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, optax.MaskedNode)


def _zeros(param: Any) -> Any:
    return jnp.zeros(param.shape, param.dtype) if hasattr(param, "dtype") else None


def _is_inexact(path: str, leaf: Any) -> bool:
    if _is_absent(leaf):
        return False
    _validate.leaf(path, leaf)
    return jnp.issubdtype(leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf), jnp.inexact)


def _axes_function(name: str, axes: int | Sequence[int] | AxesOf, otherwise: Callable[[Any], Axes]) -> AxesOf:
    """Axes as a function of the leaf: a fixed choice where the leaf has so many axes, else `otherwise(leaf)`."""
    if callable(axes):
        _validate.function(name, axes, "lambda path, leaf: 0", takes=2)
        return axes
    fixed = (axes,) if isinstance(axes, int) else axes
    if not isinstance(fixed, Sequence) or not all(isinstance(axis, int) and not isinstance(axis, bool) for axis in fixed):
        raise TypeError(f"{name} must be axes or a function (path, leaf) -> axes, got {axes!r}; pass one such as (0, 1)")
    needed = max((axis + 1 if axis >= 0 else -axis for axis in fixed), default=0)
    return lambda path, leaf: fixed if leaf.ndim >= needed else otherwise(leaf)


def _normalize(name: str, axes: int | Sequence[int] | None, path: str, leaf: Any) -> Axes:
    axes = () if axes is None else axes
    _validate.axes_of(name, axes, path)
    axes = tuple(axes) if isinstance(axes, Sequence) else (axes,)
    if not all(-leaf.ndim <= axis < leaf.ndim for axis in axes):
        raise ValueError(
            f"{name} chose {axes} for the leaf {path!r} of shape {leaf.shape}; "
            "return axes that it has, or None to leave it alone"
        )
    return tuple(sorted({axis % leaf.ndim for axis in axes}))


def _rest(axes: Axes, leaf: Any) -> Axes:
    return tuple(axis for axis in range(leaf.ndim) if axis not in axes)
