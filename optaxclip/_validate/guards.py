"""Checks of what guards and monitors watch."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp


def watched(name: str, thresholds: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuses a dict of thresholds that does not have one for the norm and one for the loss.

    Raises:
        ValueError: only one of the two is watched, or the keys are not `"norm"` and `"loss"`.
    """
    if len(names) == 1:
        raise ValueError(
            f'{name} is a dict, got it with watch="{names[0]}"; pass watch="both", or one threshold'
        )
    if set(thresholds) != set(names):
        raise ValueError(
            f"{name} must have the keys 'norm' and 'loss', got {sorted(thresholds, key=str)}; pass "
            "a threshold for each, float('inf') for no limit"
        )


def signed(name: str, rule: Any) -> None:
    """Refuses a rule that cannot learn from a loss that is zero or negative.

    Raises:
        ValueError: `rule` does not take sizes of either sign.
    """
    if not rule.signed:
        raise ValueError(
            f"{name} must take a loss of either sign, got {rule!r}, which needs positive sizes; "
            "pass a number, a schedule, thresholds.zscore(4.0), thresholds.window_zscore(6.0) or "
            "thresholds.quantile(0.99, 1000), or set signed=True if a rule of yours does"
        )


def not_relative(name: str, rule: Any, watched: str) -> None:
    """Refuses a rule that is relative to the parameters, for a loss.

    Raises:
        ValueError: `rule` is relative to the parameters.
    """
    if rule.uses_params:
        raise ValueError(
            f'{name} is relative to the parameters, got it with watch="{watched}"; pass '
            'watch="norm" or another rule'
        )


def loss(value: Any, watched: str = "loss") -> None:
    """Checks that the watched loss is one number.

    Raises:
        ValueError: the loss is missing, or is an array of more than one number.
    """
    if value is None:
        raise ValueError(
            f'watch="{watched}" needs the loss, got none; call update(updates, state, params, '
            "value=loss)"
        )
    if jnp.shape(value) != ():
        raise ValueError(
            f"value must be one number, got an array of shape {jnp.shape(value)}; pass the mean of "
            "the loss"
        )
