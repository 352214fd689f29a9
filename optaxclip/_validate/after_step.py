"""Checks of what limits weights in place of gradients."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.core import Tracer

from optaxclip._validate.arguments import is_number, static


def is_beyond_zero(name: str, value: Any, sign: int) -> bool:
    """Returns whether a bound is a finite number on the side of zero that it should not be on.

    A traced bound has no value yet, so it passes.

    Raises:
        TypeError: it is, and is an array.
    """
    _, real = is_number(value)
    if not real or isinstance(value, Tracer) or np.shape(value) != ():
        return False
    beyond = bool(0 < sign * np.asarray(value) < np.inf)
    if beyond:
        static(name, value)
    return beyond


def zero_inside(name: str, value: Any, sign: int) -> None:
    """Refuses a bound that zero is beyond, because a gradient of zero must stay zero.

    Raises:
        ValueError: it is such a bound.
    """
    if is_beyond_zero(name, value, sign):
        side = "[-inf, 0]" if sign > 0 else "[0, inf]"
        raise ValueError(
            f"{name} must be in {side}, got {value}; pass a number inside, or limit weights in "
            "place of gradients with keep_params(clip_by_value(low, high)) as the last part of the "
            "chain"
        )


def in_order(low: Any, high: Any) -> None:
    """Checks that the lower bound is not above the upper one.

    Raises:
        ValueError: it is.
    """
    known = [is_number(x)[1] and not isinstance(x, Tracer) for x in (low, high)]
    if all(known) and np.any(np.asarray(low) > np.asarray(high)):
        raise ValueError(f"low must be at most high, got {low} and {high}; swap them")


def parts(path: str, shape: tuple[int, ...], given: Any) -> None:
    """Checks what `parts` returned for one leaf.

    Raises:
        TypeError: it is no part, and no list of parts.
        ValueError: the leaf does not have the axis of the heads.
    """
    for part in given if isinstance(given, Sequence) else [given]:
        if not _is_part(part):
            raise TypeError(
                f"parts must return (layer, head axis, exponent) for {path!r}, got {part!r}; "
                'return one such as ("attention", 1, 0.5), or a list of these, each with a slice '
                "of the last axis as a fourth, or None"
            )
        if not -len(shape) <= part[1] < len(shape):
            raise ValueError(
                f"parts chose the head axis {part[1]} for {path!r} of shape {shape}; return an "
                "axis that it has, or None to leave it alone"
            )


def _is_part(part: Any) -> bool:
    if not isinstance(part, Sequence) or len(part) not in (3, 4):
        return False
    layer, axis, exponent, *columns = part
    power = exponent in ("query", "key") if isinstance(exponent, str) else is_number(exponent)[1]
    is_axis = isinstance(axis, int) and not isinstance(axis, bool)
    return (
        isinstance(layer, str) and is_axis and power and all(isinstance(c, slice) for c in columns)
    )


def has_heads(heads: Mapping[str, Any], paths: Sequence[str]) -> None:
    """Checks that there is an attention layer.

    Raises:
        ValueError: there is none.
    """
    if not heads:
        raise ValueError(
            f"parts must name the query and key weights, got None for all of {list(paths)[:8]}; "
            "pass parts=(path, leaf) -> (layer, head axis, exponent)"
        )


def logits(given: Any, heads: Mapping[str, list[int]]) -> None:
    """Checks that each layer has the largest logit of each of its heads.

    Raises:
        TypeError: `given` is not a dict.
        ValueError: a layer is missing, or has another number of heads than its weights.
    """
    layers = sorted(heads)
    example = "update(updates, state, params, logits={layer: [heads]})"
    if not isinstance(given, Mapping):
        raise TypeError(
            f"logits must be a dict with the largest logit of each head by layer, for {layers}, "
            f"got {given!r}; call {example}"
        )
    missing = [layer for layer in layers if layer not in given]
    if missing:
        raise ValueError(
            f"logits must have the layers {layers}, got {sorted(given)}; add {missing}, or pass "
            "parts that leave them alone"
        )
    for layer, counts in heads.items():
        shape = np.shape(given[layer])
        if not shape or any(n == 0 or shape[-1] % n for n in counts):
            raise ValueError(
                f"logits must be numbers by query head, got the shape {shape} for "
                f"{layer!r}, whose weights have {sorted(set(counts))} heads; take the largest over "
                "batch, queries and keys"
            )
