"""Checks of arguments that do not fit each other."""

from typing import Any


def bounds_elements(norm: Any, holds: bool) -> None:
    """Refuses the response `clamp` with a norm that does not bound elements.

    Raises:
        ValueError: `holds` is False.
    """
    if not holds:
        raise ValueError(
            "response=responses.clamp cuts elements, so the norm must be norms.linf(), got "
            f"{norm!r}; pass norm=norms.linf(), scope=scopes.element(), or another response"
        )


def matrix_axes(path: str, axes: Any, ndim: int) -> None:
    """Checks that a function chose axes for the rows and the columns of a matrix.

    Raises:
        TypeError: it returned something else.
        ValueError: a leaf does not have one of the axes, or an axis is in both.
    """
    pair = isinstance(axes, tuple | list) and len(axes) == 2
    if not pair or not all(
        isinstance(one, tuple) and all(isinstance(k, int) for k in one) for one in axes
    ):
        raise TypeError(
            f"axes must return (row axes, column axes), got {axes!r} for the leaf {path!r}; return "
            "two tuples such as ((0,), (1, 2))"
        )
    both = axes[0] + axes[1]
    if len(set(both)) < len(both) or not all(0 <= k < ndim for k in both):
        raise ValueError(
            f"axes must be different axes from 0 to {ndim - 1}, got {axes} for the leaf {path!r}; "
            "count them from the front, without those of batch_axes"
        )
