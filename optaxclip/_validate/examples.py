"""Checks of batches of examples: their arrays, masks, weights and centers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

# What the sensitivity needs: of which argument, in which words, and what to do.
SENSITIVITY = {
    "reduce": ("reduce='sum'", "the divisor of a mean depends on who is in the batch"),
    "norm": ("norm=norms.l2()", "limits of another norm do not bound the l2 norm"),
    "response": (
        "a response that keeps sizes within the limit",
        "pass one such as responses.rescale",
    ),
    "threshold": (
        "limits that depend on neither sizes nor parameters",
        "pass numbers, schedules, or per_example.quantile(expected=...)",
    ),
    "expected": (
        "a limit whose learning does not depend on the number of examples",
        "pass per_example.quantile(expected=...)",
    ),
    "params": ("the parameters, to count the groups", "pass params=params"),
    "scope": ("a limit for every leaf", "choose a scope that leaves none alone"),
}


def batch(name: str, tree: Any) -> int:
    """Checks that the first axis of all arrays is the batch; returns its length.

    Raises:
        ValueError: there is no array, an array has no axes, or the lengths differ.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    shapes = {jax.tree_util.keystr(path): jnp.shape(x) for path, x in leaves}
    lengths = {shape[:1] for shape in shapes.values()}
    if len(lengths) != 1 or () in lengths:
        raise ValueError(
            f"{name} must be arrays whose first axis is that of the examples, got shapes {shapes}; "
            "pass whole batches"
        )
    return next(iter(shapes.values()))[0]


def mask(name: str, value: Any, size: int) -> None:
    """Checks that a mask is one boolean for each example.

    Raises:
        ValueError: `value` has another shape or dtype.
    """
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    if shape != (size,) or dtype != jnp.dtype(bool):
        raise ValueError(
            f"{name} must be bool of shape ({size},), got {dtype} of shape {shape}; pass True for "
            "each example that is there"
        )


def weights(name: str, value: Any, size: int) -> None:
    """Checks that weights are one number for each example, and not negative.

    Raises:
        TypeError: `value` are no real numbers.
        ValueError: `value` has another shape, or a number in it is negative or NaN.
    """
    advice = "pass one for each example, such as the number of its samples"
    value = value if hasattr(value, "dtype") else np.asarray(value)
    real = any(jnp.issubdtype(jnp.result_type(value), kind) for kind in (jnp.floating, jnp.integer))
    if not real:
        raise TypeError(
            f"{name} must be real numbers, got {jnp.result_type(value)}; {advice}, and a mask for "
            "what is no example"
        )
    if jnp.shape(value) != (size,):
        raise ValueError(f"{name} must have shape ({size},), got {jnp.shape(value)}; {advice}")
    if not isinstance(value, Tracer) and not (np.asarray(value) >= 0).all():
        raise ValueError(f"{name} must not be negative or NaN, got {value}; {advice}")


def center(value: Any, like: Any) -> None:
    """Checks that a center is a tree like the gradient.

    Raises:
        ValueError: it has another structure, or other shapes.
    """
    advice = "pass a tree like the result, such as the last one"
    structures = jax.tree.structure(value), jax.tree.structure(like)
    if structures[0] != structures[1]:
        raise ValueError(
            f"center must have the structure of the gradient, {structures[1]}, got "
            f"{structures[0]}; {advice}"
        )
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(like), jax.tree.leaves(value), strict=True
    ):
        is_float = jnp.issubdtype(jnp.result_type(one), jnp.inexact)
        if is_float and jnp.shape(one) != jnp.shape(other):
            raise ValueError(
                f"center has shape {jnp.shape(other)} at {jax.tree_util.keystr(path)}, where the "
                f"gradient has shape {jnp.shape(one)}; {advice}"
            )


def divided(name: str, value: int, size: int) -> int:
    """Checks that microbatches divide the batch; returns how many there are.

    Raises:
        ValueError: `value` does not divide `size`.
    """
    if size % value:
        raise ValueError(
            f"{name} must divide the batch, got {value} for {size} examples; pass another, or pad "
            "and mask the batch"
        )
    return size // value


def sensitivity(part: str, holds: bool, value: Any) -> None:
    """Refuses what makes the contribution of an example unknown.

    Raises:
        ValueError: `holds` is False.
    """
    needs, advice = SENSITIVITY[part]
    if not holds:
        raise ValueError(f"sensitivity() needs {needs}, got {value!r}; {advice}")


def reduction(reduce: str, centered: bool, axes: Any) -> None:
    """Refuses a sum around a center, and a mean over the kept of parts of leaves.

    Raises:
        ValueError: `reduce` does not go with the other arguments.
    """
    if reduce == "sum" and centered:
        raise ValueError(
            "reduce must be 'mean' or 'kept' with a center or iterate, got 'sum'; a center is "
            "added to a mean"
        )
    if reduce == "kept" and axes is not None:
        raise ValueError(
            "reduce='kept' counts examples by group of whole leaves, got a finer scope; pass "
            "scopes.tree(), scopes.group() or scopes.leaf()"
        )
