"""Running programs that JAX has traced, one equation at a time."""

from collections.abc import Sequence
from typing import Any


def bind(equation: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    """The outputs of one equation."""
    parts = equation.primitive.get_bind_params(equation.params)
    functions, options = parts if isinstance(parts, tuple) else ((), parts)  # by the version of JAX
    with equation.ctx.manager:
        out = equation.primitive.bind(*functions, *inputs, **options)
    return out if equation.primitive.multiple_results else [out]
