"""Checks of threshold rules where not every rule makes sense."""

from typing import Any, cast

import jax

from optaxclip._types import Context


def memoryless(name: str, rule: Any) -> None:
    """Refuses a rule that learns, or that needs the parameters.

    Raises:
        TypeError: `rule` learns or needs the parameters.
    """
    if rule.uses_params or _remembers(rule):
        does = "uses the parameters" if rule.uses_params else "learns"
        raise TypeError(
            f"{name} must be the same for all groups, got a rule that {does}; pass a number or a "
            "schedule"
        )


def without_memory(name: str, rule: Any) -> None:
    """Refuses a rule that learns, where a step has the sizes of a whole batch.

    Raises:
        TypeError: `rule` learns.
    """
    if _remembers(rule):
        raise TypeError(
            f"{name} must not learn from single sizes, got {rule!r}; pass a number, a schedule, or "
            "a rule for batches such as per_example.quantile(0.5)"
        )


def no_functions(name: str, values: Any) -> None:
    """Refuses schedules in a backward pass.

    Raises:
        TypeError: a function is among the values.
    """
    if any(map(callable, jax.tree.leaves(values))):
        raise TypeError(
            f"{name} must be a number, got {values!r}; "
            "a backward pass has neither steps nor memory, so pass a number such as schedule(step)"
        )


def in_backward_pass(name: str, rule: Any) -> None:
    """Refuses a rule that learns, or needs the parameters or the step, in a backward pass.

    Raises:
        TypeError: `rule` does one of these.
    """
    if rule.uses_params or _remembers(rule) or _asks_for_step(rule):
        raise TypeError(
            f"{name} must be a number or a rule such as thresholds.ranked(8), got {rule!r}; "
            "a backward pass has neither steps nor memory, so pass a number such as schedule(step)"
        )


def absolute(name: str, norm: Any) -> None:
    """Refuses a norm that is relative to the parameters, where there are no parameters.

    Raises:
        TypeError: `norm` is relative to the parameters.
    """
    if norm.uses_params:
        raise TypeError(
            f"{name} must not be relative to parameters, got {norm!r}; pass one such as norms.l2()"
        )


def _asks_for_step(rule: Any) -> bool:
    context = Context(step=cast(Any, None))
    size = jax.ShapeDtypeStruct((1,), "float32")
    try:
        jax.eval_shape(lambda sizes: rule.limit(sizes, rule.init(sizes), context), size)
    except Exception:  # whatever a schedule raises when it is called with None
        return True
    return False


def _remembers(rule: Any) -> bool:
    """Returns whether a rule has a state.

    It uses shapes only: making an array would initialize JAX before the user chose devices.
    """
    sizes = jax.ShapeDtypeStruct((1,), "float32")
    return bool(jax.tree.leaves(jax.eval_shape(rule.init, sizes)))
