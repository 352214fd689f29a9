"""A tree as a scope sees it: which leaves are measured, their paths, groups and axes."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from optaxclip import _sharding, _validate
from optaxclip._sharding import Names, is_names, names_of
from optaxclip._types import Axes, Scope

# Flax keeps fp8 statistics under this key: they replace parameters and are no gradients.
STATISTICS = "_overwrite_with_gradient"


class Layout(NamedTuple):
    """A tree of updates as a scope sees it.

    Attributes:
        treedef: structure of the tree, with None, `optax.MaskedNode` and boxes as leaves.
        nodes: what the tree has at each of its leaves: arrays, or boxes of arrays.
        measured: positions of the leaves that are measured and clipped.
        gradients: the arrays there.
        paths: of the gradients; no two are the same.
        names: of the groups; with `axes`, the paths.
        keys: for each group its key in a dict of thresholds; a layer has the key of its stack.
        groups: for each group, the positions of its units, counted over all gradients; where no
            gradient is a stack, each has one unit. Empty with `axes`.
        axes: for each gradient the axes measured together, if parts of it have sizes;
            None where leaves are measured whole, or layer by layer in groups.
        parts: for each gradient the axes measured together; all axes, except those of a stack.
        by_shape: whether `axes` go by the lengths of a leaf's axes.
    """

    treedef: Any
    nodes: list[Any]
    measured: list[int]
    gradients: list[Any]
    paths: list[str]
    names: list[str]
    keys: list[str]
    groups: Sequence[list[int]] = ()
    axes: Sequence[Axes] | None = None
    parts: Sequence[Axes] = ()
    by_shape: bool = False

    @property
    def blocks(self) -> int:
        """How many arrays of sizes there are."""
        return 1 if self.axes is None else len(self.axes)

    @property
    def is_of_elements(self) -> bool:
        """Whether each number is a group by itself."""
        return self.axes is not None and not any(self.axes)

    @property
    def others(self) -> list[Any]:
        """The arrays that are not measured."""
        rest = set(range(len(self.nodes))) - set(self.measured)
        return [value for i in sorted(rest) if hasattr(value := _inside(self.nodes[i]), "dtype")]

    @property
    def group_of(self) -> list[Any]:
        """For each gradient its group; for a stack, an array of groups."""
        group_of = {k: g for g, group in enumerate(self.groups) for k in group}
        positions, start = [], 0
        for gradient, part in zip(self.gradients, self.parts, strict=True):
            shape = [1 if axis in part else n for axis, n in enumerate(jnp.shape(gradient))]
            count = math.prod(shape)
            units = np.array([group_of[k] for k in range(start, start + count)], np.int32)
            stacked = len(part) < len(shape)
            positions.append(units.reshape(shape) if stacked else group_of[start])
            start += count
        return positions

    def of(self, tree: Any) -> list[Any]:
        """The leaves of a tree of this structure that stand where the gradients do."""
        nodes = self.treedef.flatten_up_to(tree)
        return [_inside(nodes[i]) for i in self.measured]

    def matching(self, params: Any) -> list[Any]:
        """The leaves of `params` that belong to the gradients.

        Raises:
            ValueError: there are no parameters, or one is missing or has another shape than its
                gradient.
        """
        if not self.measured:
            return []
        _validate.params_given(params)
        nodes = _validate.same_structure(params, self.treedef)
        weights = [_inside(nodes[i]) for i in self.measured]
        for path, param, gradient in zip(self.paths, weights, self.gradients, strict=True):
            _validate.parameter(path, param, jnp.shape(gradient))
        return weights

    def names_of_axes(self, sharded_over: Any) -> list[Names | None]:
        """For each gradient the mapped axes over which it is sharded.

        The argument is one choice for all leaves, or a tree of choices that is a prefix of the
        updates.

        Raises:
            ValueError: the tree has another structure than the updates.
        """
        tree = jax.tree.unflatten(self.treedef, list(range(len(self.nodes))))
        chosen: dict[int, Any] = {}

        def choose(names: Any, part: Any) -> None:
            chosen.update(dict.fromkeys(jax.tree.leaves(part), names_of(names)))

        try:
            jax.tree.map(choose, sharded_over, tree, is_leaf=is_names)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                "sharded_over must be names of mapped axes or a tree of them that the updates "
                "start with, got "
                f"{sharded_over!r} for updates of structure {self.treedef}; give each part its "
                f"names, () for none"
            ) from error
        names = [chosen[i] for i in self.measured]
        if self.by_shape:
            leaves = zip(self.paths, self.gradients, self.axes or (), names, strict=True)
            for path, leaf, axes, given in leaves:
                lengths = [jnp.shape(leaf)[axis] for axis in axes]
                short = len(axes) > 1 and sum(n != 1 for n in lengths) <= 1
                split = _sharding.varying(leaf) if given is None else _sharding.bound(given)
                _validate.units(path, jnp.shape(leaf), split or () if short else ())
        return names

    def filled(self, arrays: Iterable[Array]) -> Any:
        """A tree like the updates, of these arrays; any other array is a zero."""
        nodes = [_with_inside(node, _stand_in(_inside(node))) for node in self.nodes]
        for i, array in zip(self.measured, arrays, strict=True):
            nodes[i] = array if self.nodes[i] is None else _with_inside(self.nodes[i], array)
        return jax.tree.unflatten(self.treedef, nodes)

    def floats(self) -> Any:
        """The gradients as a tree of arrays of at least 16 bits, with a zero for anything else."""

        def array(gradient: Any) -> Array:
            dtype = jnp.result_type(gradient)
            return jnp.asarray(gradient).astype(dtype if dtype.itemsize > 1 else jnp.float32)

        return self.filled(map(array, self.gradients))

    def replaced(self, tree: Any, arrays: Iterable[Array]) -> Any:
        """The tree with these arrays in place of the gradients; boxes stay."""
        nodes = self.treedef.flatten_up_to(tree)
        for i, array in zip(self.measured, arrays, strict=True):
            nodes[i] = _with_inside(nodes[i], array)
        return jax.tree.unflatten(self.treedef, nodes)

    def rebuild(self, gradients: Iterable[Array]) -> Any:
        """The updates with new gradients; a leaf that holds no floats stays as it is."""
        nodes = list(self.nodes)
        for i, gradient in zip(self.measured, gradients, strict=True):
            nodes[i] = (
                _with_inside(nodes[i], gradient) if _is_float(_inside(nodes[i])) else nodes[i]
            )
        return jax.tree.unflatten(self.treedef, nodes)


def lay_out(scope: Scope, tree: Any, params: Any = None, *, weights: bool = False) -> Layout:
    """Finds the leaves of `tree` that `scope` measures.

    Integers, booleans, float0 and keys are not measured. Where a gradient is None though its
    parameter is there, it counts as zero, and stays None. With `weights`, integers of 8 bits and
    less among the parameters are quantized weights, which are measured as well.
    """
    keys, nodes, treedef = _flattened(tree)
    present = list(map(_inside, nodes))
    if params is not None and (weights or any(leaf is None for leaf in present)):
        others = map(_inside, _validate.same_structure(params, treedef))
        present = [
            _zeros(other)
            if leaf is None or (weights and _is_quantized(other) and not _is_float(leaf))
            else leaf
            for leaf, other in zip(present, others, strict=True)
        ]
    paths = _paths(keys)
    for path, leaf in zip(paths, present, strict=True):
        if not is_absent(leaf):
            _validate.sparse(path, leaf)
            _validate.leaf(path, leaf)
    numbers = [
        i
        for i, leaf in enumerate(present)
        if (_is_float(leaf) or (weights and _is_quantized(leaf)))
        and not _holds_statistics(keys[i])
        and (scope.where is None or scope.where(paths[i]))
    ]
    names = {i: _group_of(scope, paths[i]) for i in numbers}
    axes = {i: _axes_of(scope, paths[i], present[i]) for i in numbers}
    measured = [i for i in numbers if names[i] is not None and axes[i] is not None]
    gradients, leaf_paths = [present[i] for i in measured], [paths[i] for i in measured]
    parts = [axes[i] or () for i in measured]
    limit_keys = [(scope.key and scope.key(path)) or path for path in leaf_paths]
    layout = Layout(
        treedef, nodes, measured, gradients, leaf_paths, leaf_paths, limit_keys, parts=parts
    )
    if scope.axes is not None:
        return layout._replace(axes=parts, by_shape=scope.by_shape)
    if scope.group is None:
        return layout._replace(groups=[[k] for k in range(len(measured))])
    return _grouped(layout, [str(names[i]) for i in measured])


def _grouped(layout: Layout, names: list[str]) -> Layout:
    """The layout with groups of leaves of one name; a stack has a group for each of its layers."""
    groups: dict[tuple[str, Any], list[int]] = {}
    lengths: dict[str, Any] = {}
    start = 0
    for name, gradient, part in zip(names, layout.gradients, layout.parts, strict=True):
        stack = tuple(n for axis, n in enumerate(jnp.shape(gradient)) if axis not in part)
        if stack:
            _validate.stack(name, lengths.setdefault(name, stack), stack)
        for k, index in enumerate(np.ndindex(*stack)):
            groups.setdefault((name, index), []).append(start + k)
        start += math.prod(stack)
    full = ["/".join(map(str, (name, *index))) for name, index in groups]
    return layout._replace(
        groups=list(groups.values()), names=full, keys=[name for name, _ in groups]
    )


def _axes_of(scope: Scope, path: str, leaf: Any) -> Axes | None:
    """The axes that the scope measures together; by default all, except those of a stack."""
    leaf = jnp.asarray(leaf)
    if scope.axes is not None:
        return scope.axes(path, leaf)
    stacked = () if scope.batch is None else scope.batch(path, leaf)
    return tuple(axis for axis in range(leaf.ndim) if axis not in stacked)


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths."""
    keys, nodes, _ = _flattened(tree)
    return dict(zip(_paths(keys), map(_inside, nodes), strict=True))


def is_absent(leaf: Any) -> bool:
    """Whether nothing stands here."""
    return leaf is None or isinstance(leaf, optax.MaskedNode)


def _flattened(tree: Any) -> tuple[list[Any], list[Any], Any]:
    """Keys and nodes of the leaves, among them None, `MaskedNode` and boxes; and the structure."""

    def is_leaf(node: Any) -> bool:
        return is_absent(node) or _validate.is_sparse(node) or _is_box(node)

    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [key for key, _ in flat], [node for _, node in flat], treedef


def _is_box(node: Any) -> bool:
    """Whether a node is a box: one leaf and its metadata, such as Flax's `nnx.Param`.

    Some functions of Flax take boxes off and others leave them on, so their keys are no part of a
    path.
    """
    if isinstance(node, jax.Array | np.ndarray) or not (
        hasattr(node, "__jax_array__") or hasattr(node, "unbox")
    ):
        return False
    values = jax.tree.leaves(node, is_leaf=is_absent)
    return len(values) == 1 and values[0] is not node


def _inside(node: Any) -> Any:
    """The leaf in a box."""
    return jax.tree.leaves(node, is_leaf=is_absent)[0] if _is_box(node) else node


def _with_inside(node: Any, value: Any) -> Any:
    """The box with another leaf in it; without a box, that leaf."""
    return (
        jax.tree.unflatten(jax.tree.structure(node, is_leaf=is_absent), [value])
        if _is_box(node)
        else value
    )


def _stand_in(value: Any) -> Any:
    """A zero with as many axes, in place of an array that is not measured."""
    return value if is_absent(value) else jnp.zeros((1,) * np.ndim(value))


def _paths(keys: Sequence[Any]) -> list[str]:
    """A path for each leaf, `encoder/0/kernel`, and no two the same.

    Leaves whose short paths are equal get longer ones.
    """
    paths = [jax.tree_util.keystr(key, simple=True, separator="/") for key in keys]
    for spell in (_escaped, jax.tree_util.keystr):
        count = Counter(paths)
        paths = [
            spell(key) if count[path] > 1 else path for key, path in zip(keys, paths, strict=True)
        ]
    return paths


def _escaped(key: Any) -> str:
    """As JSON pointers spell it (RFC 6901): `~1` for a slash within a key, `~0` for a tilde."""
    parts = (jax.tree_util.keystr((part,), simple=True) for part in key)
    return "/".join(part.replace("~", "~0").replace("/", "~1") for part in parts)


def _holds_statistics(key: Any) -> bool:
    return any(jax.tree_util.keystr((part,), simple=True) == STATISTICS for part in key)


def _group_of(scope: Scope, path: str) -> str | None:
    """The name of a leaf's group; its path where a scope has no groups of leaves."""
    if scope.group is None:
        return path
    name = scope.group(path)
    _validate.group_name(path, name)
    return name


def _zeros(param: Any) -> Any:
    if not hasattr(param, "dtype"):
        return None
    return jnp.zeros(param.shape, jnp.float32 if _is_quantized(param) else param.dtype)


def _is_float(leaf: Any) -> bool:
    return not is_absent(leaf) and jnp.issubdtype(_dtype(leaf), jnp.inexact)


def _is_quantized(leaf: Any) -> bool:
    return (
        hasattr(leaf, "dtype")
        and jnp.issubdtype(leaf.dtype, jnp.integer)
        and leaf.dtype.itemsize == 1
    )


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
