"""Checks of what limits weights in place of gradients."""

from typing import Any

import numpy as np
from jax.core import Tracer

from optaxclip._validate.arguments import is_number, static


def beyond_zero(name: str, value: Any, sign: int) -> bool:
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
    """Refuses a bound on the other side of zero, because a gradient of zero must stay zero.

    Raises:
        ValueError: always.
    """
    side = "[-inf, 0]" if sign > 0 else "[0, inf]"
    raise ValueError(
        f"{name} must be in {side}, got {value}; pass a number inside, or limit weights in place "
        "of gradients with keep_params(clip_by_value(low, high)) as the last part of the chain"
    )


def in_order(low: Any, high: Any) -> None:
    """Checks that the lower bound is not above the upper one.

    Raises:
        ValueError: it is.
    """
    known = [is_number(x)[1] and not isinstance(x, Tracer) for x in (low, high)]
    if all(known) and np.any(np.asarray(low) > np.asarray(high)):
        raise ValueError(f"low must be at most high, got {low} and {high}; swap them")


def weights_given(params: Any) -> None:
    """Checks that there are weights to keep.

    Raises:
        ValueError: `params` is None.
    """
    if params is None:
        raise ValueError(
            "keep_params limits the weights after the step, got params=None; call update(updates, "
            "state, params)"
        )
