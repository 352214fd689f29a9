"""Runs a traced program (a jaxpr) one equation at a time."""

from collections.abc import Callable, Sequence
from typing import Any

from optaxclip._jax import Literal, bind


def has_side_effects(program: Any) -> bool:
    """Returns whether a program prints, calls back, checks or writes.

    JAX also lists the use of a mapped axis as an effect; that one does no harm.
    """
    return any(type(effect).__name__ != "NamedAxisEffect" for effect in program.effects)


def run(
    program: Any,
    constants: Sequence[Any],
    inputs: Sequence[Any],
    choices: Sequence[Callable[[Any], Any]],
) -> list[Any]:
    """Runs a program and applies a choice to each of its outputs.

    An output is chosen right after the equation that computes it, and later equations use the
    chosen value.
    """
    computed = {v for equation in program.eqns for v in equation.outvars}
    outs = list(zip(program.outvars, choices, strict=True))
    early = {v: choose for v, choose in outs if not isinstance(v, Literal) and v in computed}
    variables = [*program.constvars, *program.invars]
    values: dict[Any, Any] = dict(zip(variables, [*constants, *inputs], strict=True))

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else values[v]

    for equation in program.eqns:
        results = bind(equation, list(map(read, equation.invars)))
        for v, x in zip(equation.outvars, results, strict=True):
            values[v] = early[v](x) if v in early else x
    # the other outputs are inputs, constants, or repeat a variable that another output chose
    chosen = {id(choose) for choose in early.values()}
    return [read(v) if id(choose) in chosen else choose(read(v)) for v, choose in outs]
