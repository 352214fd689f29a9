"""Which numbers share one size: `tree > group > leaf > unit > element`."""

from collections.abc import Callable, Sequence
from typing import Any

from optaxclip import _validate
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
        TypeError: `name_of` is not a function of a path, or (on `init` or `update`) what it returns
            is no name.

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

    return Scope(
        axes=lambda path, leaf: _rest(
            _normalize("batch_axes", stacked(path, leaf), path, leaf), leaf
        )
    )


def unit(
    axes: int | Sequence[int] | AxesOf | None = None,
    *,
    batch_axes: int | Sequence[int] | AxesOf | None = None,
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
            leaf alone. A leaf with too few axes for a fixed choice is one unit.
        batch_axes: axes along which a leaf is a stack of layers; not counted in the conventions.

    Raises:
        TypeError: `axes` or `batch_axes` is neither axes nor a function that chooses some.
        ValueError: a function chose an axis that a leaf does not have (on `init` or `update`).

    References:
        Brock et al., [High-performance large-scale image recognition without
        normalization](https://arxiv.org/abs/2102.06171), 2021.
    """
    stacked = _axes_function(
        "batch_axes", () if batch_axes is None else batch_axes, lambda leaf: ()
    )
    chosen = (
        None if axes is None else _axes_function("axes", axes, lambda leaf: tuple(range(leaf.ndim)))
    )

    def measured_together(path: str, leaf: Any) -> Axes | None:
        if chosen is not None:
            own = chosen(path, leaf)
            return None if own is None else _normalize("axes", own, path, leaf)
        layer = _rest(_normalize("batch_axes", stacked(path, leaf), path, leaf), leaf)
        return (
            layer
            if sum(leaf.shape[axis] != 1 for axis in layer) <= 1
            else layer[: 1 if len(layer) < 4 else -1]
        )

    return Scope(axes=measured_together)


def element() -> Scope:
    """Every number by itself."""
    return Scope(axes=lambda path, leaf: ())


def _axes_function(
    name: str, axes: int | Sequence[int] | AxesOf, otherwise: Callable[[Any], Axes]
) -> AxesOf:
    """Axes as a function of the leaf: a fixed choice where the leaf has so many axes, else
    `otherwise(leaf)`.
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


def _rest(axes: Axes, leaf: Any) -> Axes:
    return tuple(axis for axis in range(leaf.ndim) if axis not in axes)
