"""Which numbers share one size: `tree > group > leaf > unit > element`."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax

from optaxclip import _validate
from optaxclip._naming import named
from optaxclip._types import Axes, Scope

__all__ = [
    "tree",
    "group",
    "leaf",
    "unit",
    "element",
    "flax_axes",
    "flax_attention",
]


def __dir__() -> list[str]:
    return __all__


AxesOf = Callable[[str, Any], int | Sequence[int] | None]
Where = Callable[[str], bool]
BatchAxes = int | Sequence[int] | AxesOf


@named("scopes")
def tree(*, where: Where | None = None, batch_axes: BatchAxes | None = None) -> Scope:
    """All leaves together: one size for the whole tree.

    With a tree of limits, such as `{"encoder": 1.0, "head": {"w": 0.5, "b": 0.1}}`, all leaves
    under a limit share one size. Leaves under none of its keys are the group `"tree"`.

    Args:
        where: `path -> bool`. Leaves that it refuses are neither measured nor clipped.
        batch_axes: axes along which leaves are stacks, of layers that are scanned over or of
            members of an ensemble; or `(path, leaf) -> axes`. Each index has a size, joint
            over the leaves. Leaves without these axes are one more group.

    Raises:
        TypeError: `where` is not a function of a path, or `batch_axes` are no axes.
        ValueError: on `init` or `update`: stacks have different lengths.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> from optaxclip import scopes, telemetry
        >>> layers = scopes.tree(batch_axes=lambda path, leaf: 0 if "layers" in path else None)
        >>> clip = optaxclip.clip_by_global_norm(1.0, scope=layers)
        >>> grads = {"layers": jnp.array([[3.0, 4.0], [0.3, 0.4]]), "head": jnp.array([2.0])}
        >>> updates, state = clip.update(grads, None)
        >>> print(updates["layers"], updates["head"])
        [[0.6 0.8]
         [0.3 0.4]] [1.]
        >>> telemetry.group_names(state.reading)
        ['tree', 'tree/0', 'tree/1']
    """
    return _groups(_whole, where, batch_axes)


@named("scopes")
def group(
    name_of: Callable[[str], str | None],
    *,
    where: Where | None = None,
    batch_axes: BatchAxes | None = None,
) -> Scope:
    """Leaves of one name together.

    Args:
        name_of: `path -> name`, with paths such as `"encoder/0/kernel"`; None means that
            the leaf is neither measured nor clipped.
        where: as for `tree`.
        batch_axes: as for `tree`, in each group; the layers of the stacks in group `"layers"` are
            the groups `"layers/0"`, `"layers/1"`, ... In a dict of thresholds `"layers"` stands for
            all of them.

    Raises:
        TypeError: `name_of` or `where` is not a function of a path, `batch_axes` are no axes, or
            (on `init` or `update`) `name_of` returns something other than a name.
        ValueError: on `init` or `update`: stacks of one group have different lengths.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> from optaxclip import scopes
        >>> by_layer = scopes.group(lambda path: path.split("/")[0])
        >>> clip = optaxclip.clip({"body": 1.0, "head": 0.1}, scope=by_layer)
        >>> grads = {"body": {"w": jnp.array([3.0, 4.0])}, "head": {"w": jnp.array([0.05])}}
        >>> updates, _ = clip.update(grads, clip.init(grads))
        >>> print(updates["body"]["w"], updates["head"]["w"])
        [0.6 0.8] [0.05]
    """
    _validate.function("name_of", name_of, 'lambda path: path.split("/")[0]', takes=1)
    return _groups(name_of, where, batch_axes)


@named("scopes")
def leaf(*, where: Where | None = None, batch_axes: BatchAxes | None = None) -> Scope:
    """Every leaf by itself.

    Args:
        where: as for `tree`.
        batch_axes: axes along which a leaf is a stack of layers, each measured by itself
            (layers that are scanned over have theirs in front, `0`); or `(path, leaf) -> axes`.

    Raises:
        TypeError: `where` is not a function of a path, or `batch_axes` are no axes.
    """
    _check_where(where)
    if batch_axes is None:
        return Scope(where=where)
    stacked = batch_of(batch_axes)
    return Scope(axes=lambda path, leaf: rest_of(stacked(path, leaf), leaf), where=where)


@named("scopes")
def unit(
    axes: int | Sequence[int] | AxesOf | None = None,
    *,
    where: Where | None = None,
    batch_axes: BatchAxes | None = None,
) -> Scope:
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
            leaf alone, such as `scopes.flax_axes`. A leaf with too few axes for a fixed choice is
            one unit.
        where: as for `tree`.
        batch_axes: axes along which a leaf is a stack of layers; not counted in the conventions,
            nor by a function that chooses axes: it gets the shape of one layer.

    Raises:
        TypeError: `axes` or `batch_axes` is neither axes nor a function that chooses some, or
            `where` is not a function of a path.
        ValueError: on `init` or `update`: a function chose an axis that a leaf does not have; or
            the convention would go by the length of one device's part of a leaf.

    References:
        Brock et al., [High-performance large-scale image recognition without
        normalization](https://arxiv.org/abs/2102.06171), 2021.
    """
    _check_where(where)
    stacked = batch_of(batch_axes)
    if axes is None:
        return Scope(
            axes=lambda path, leaf: _fan_in(rest_of(stacked(path, leaf), leaf), leaf),
            where=where,
            by_shape=True,
        )
    chosen = _axes_function("axes", axes, lambda leaf: tuple(range(leaf.ndim)))

    def measured_together(path: str, leaf: Any) -> Axes | None:
        layer = rest_of(stacked(path, leaf) if callable(axes) else (), leaf)
        one = leaf if len(layer) == leaf.ndim else with_axes(leaf, layer)
        given = chosen(path, one)
        return None if given is None else _of_layer(_normalize("axes", given, path, one), layer)

    return Scope(axes=measured_together, where=where)


@named("scopes")
def element(*, where: Where | None = None, batch_axes: BatchAxes | None = None) -> Scope:
    """Every number by itself.

    Args:
        where: as for `tree`.
        batch_axes: accepted like everywhere, and of no effect: nothing is finer than an element.

    Raises:
        TypeError: `where` is not a function of a path, or `batch_axes` are no axes.
    """
    _check_where(where)
    batch_of(batch_axes)
    return Scope(axes=_no_axes, where=where)


def flax_axes(path: str, leaf: Any) -> Axes:
    """The axes of the fan-in of Flax's layers, by the names of the layer and of the parameter.

    For `unit(axes=scopes.flax_axes)`. The convention of `unit` goes by rank, so it takes one head
    of the output of attention for the fan-in, and one feature of all words for a word.

    | the path ends with | shape | axes measured together |
    |---|---|---|
    | `embedding` | `[words, features]` | 1: each word |
    | `query/kernel`, `key/kernel`, `value/kernel` | `[in, heads, depth]` | 0 |
    | `out/kernel` of rank 3 | `[heads, depth, out]` | 0, 1 |
    | `kernel` of a dense or recurrent layer | `[in, out]` | 0 |
    | any other `kernel`: convolutions | `[..., in, out]` | all but the last |
    | anything else: `bias`, `scale` | any | all |

    Args:
        path: such as `"encoder/attention/query/kernel"`.
        leaf: the parameter or gradient, or its shape.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> from optaxclip import scopes
        >>> scopes.flax_axes("attention/out/kernel", jnp.zeros((8, 64, 512)))
        (0, 1)
        >>> agc = optaxclip.adaptive_grad_clip(axes=scopes.flax_axes)
    """
    layer, name = ["", *path.split("/")][-2:]
    every = tuple(range(leaf.ndim))
    if name == "embedding" and leaf.ndim == 2:
        return (1,)
    if name != "kernel" or leaf.ndim < 2:
        return every
    if leaf.ndim == 2 or layer in ("query", "key", "value"):
        return (0,)
    return every[:-1]


def with_axes(leaf: Any, axes: Axes) -> jax.ShapeDtypeStruct:
    """The shape of a leaf without the other axes."""
    return jax.ShapeDtypeStruct([leaf.shape[axis] for axis in axes], leaf.dtype)


def _of_layer(axes: Axes, layer: Axes) -> Axes:
    """Axes of one layer, counted in the stack, whose other axes these are."""
    return tuple(layer[axis] for axis in axes)


def divided(scope: Scope, keys: Collection[str]) -> Scope:
    """Returns the scope of a clip that has a limit for each of these keys.

    A key is the beginning of paths, and stands for the subtree there. `tree` makes each of these
    subtrees a group, and one more of the leaves under no key. Scopes without groups of leaves find
    their limit by the longest key. The groups of `group` have names, which are the keys.
    """

    def key_of(path: str) -> str | None:
        parts = path.split("/")
        heads = ("/".join(parts[:count]) for count in range(len(parts), 0, -1))
        return next((head for head in heads if head in keys), None)

    if scope.group is _whole:
        return scope._replace(group=lambda path: key_of(path) or _whole(path))
    return scope if scope.group else scope._replace(key=key_of)


def is_of_elements(scope: Scope) -> bool:
    """Returns whether each number is a group, as `element` has it."""
    return getattr(scope, "axes", None) is _no_axes  # `clip` refuses what is no scope


def _no_axes(path: str, leaf: Any) -> Axes:
    """The axes that are measured together: none."""
    return ()


def is_whole(scope: Scope) -> bool:
    """Returns whether all leaves are one group, or one for each index of a stack."""
    return scope.group is _whole


def _whole(path: str) -> str:
    """The name of the group of all leaves."""
    return "tree"


def flax_attention(path: str, leaf: Any) -> tuple[str, int, str] | None:
    """Finds the query and key weights of Flax's attention layers, for `qk_clip(parts=...)`.

    These are the kernels `[in, heads, depth]` and biases `[heads, depth]` of `query` and `key` in
    `MultiHeadAttention`, in linen and in NNX, also with stacks of layers in front.

    Args:
        path: such as `"encoder/attention/query/kernel"`.
        leaf: the array there.

    Returns:
        `("encoder/attention", axis of the heads, "query")`, or `"key"` in the place of `"query"`,
        whose exponents follow `alpha`; None for any other leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> from optaxclip import scopes
        >>> scopes.flax_attention("encoder/attention/query/kernel", jnp.zeros((16, 4, 8)))
        ('encoder/attention', 1, 'query')
        >>> scopes.flax_attention("encoder/attention/out/kernel", jnp.zeros((4, 8, 16)))
    """
    *layer, side, kind = ["", *path.split("/")]
    least = {"kernel": 3, "bias": 2}.get(kind)
    if side not in ("query", "key") or least is None or leaf.ndim < least:
        return None
    return "/".join(layer[1:]), leaf.ndim - 2, side


def _groups(
    name_of: Callable[[str], str | None], where: Where | None, batch_axes: BatchAxes | None
) -> Scope:
    _check_where(where)
    batch = None if batch_axes is None else batch_of(batch_axes)
    return Scope(group=name_of, where=where, batch=batch)


def _check_where(where: Where | None) -> None:
    if where is not None:
        _validate.function("where", where, 'lambda path: "norm" not in path', takes=1)


def _fan_in(layer: Axes, leaf: Any) -> Axes:
    """The axes of the fan-in among those of one layer, by convention."""
    if sum(leaf.shape[axis] != 1 for axis in layer) <= 1:
        return layer
    return layer[:1] if len(layer) < 4 else layer[:-1]


def batch_of(batch_axes: BatchAxes | None) -> Callable[[str, Any], Axes]:
    """The axes of a stack, counted from the front; `()` for None."""
    batch_axes = () if batch_axes is None else batch_axes
    stacked = _axes_function("batch_axes", batch_axes, lambda leaf: ())
    return lambda path, leaf: _normalize("batch_axes", stacked(path, leaf), path, leaf)


def _axes_function(
    name: str, axes: int | Sequence[int] | AxesOf, otherwise: Callable[[Any], Axes]
) -> AxesOf:
    """Axes as a function of the leaf.

    A leaf that has too few axes for a fixed choice gets `otherwise(leaf)`.
    """
    if callable(axes):
        _validate.function(name, axes, "lambda path, leaf: 0", takes=2)
        return axes
    fixed = (axes,) if isinstance(axes, int) else axes
    if not isinstance(fixed, Sequence) or not all(
        isinstance(axis, int) and not isinstance(axis, bool) for axis in fixed
    ):
        raise TypeError(
            f"{name} must be axes or a function (path, leaf) -> axes, got {axes!r}; pass one such "
            f"as (0, 1)"
        )
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


def rest_of(axes: Axes, leaf: Any) -> Axes:
    """The other axes of a leaf."""
    return tuple(axis for axis in range(leaf.ndim) if axis not in axes)
