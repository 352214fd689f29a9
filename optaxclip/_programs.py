"""Running programs that JAX has traced, one equation at a time."""

from collections.abc import Callable, Sequence
from typing import Any

from optaxclip._jax import Literal, bind


def has_side_effects(program: Any) -> bool:
    """Whether it prints, calls back, checks or writes; to name a mapped axis is an effect to JAX,
    but none of these.
    """
    return any(type(effect).__name__ != "NamedAxisEffect" for effect in program.effects)


def run(
    program: Any,
    constants: Sequence[Any],
    inputs: Sequence[Any],
    choices: Sequence[Callable[[Any], Any]],
) -> list[Any]:
    """The outputs of a program, each replaced by what its choice makes of it.

    An output that an equation computes is replaced there, so that the equations after it see what
    was chosen.
    """
    computed = {v for equation in program.eqns for v in equation.outvars}
    outs = list(zip(program.outvars, choices, strict=True))
    early = {v: choose for v, choose in outs if not isinstance(v, Literal) and v in computed}
    values: dict[Any, Any] = dict(
        zip([*program.constvars, *program.invars], [*constants, *inputs], strict=True)
    )

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else values[v]

    for equation in program.eqns:
        for v, x in zip(
            equation.outvars, bind(equation, list(map(read, equation.invars))), strict=True
        ):
            values[v] = early[v](x) if v in early else x
    chosen = {id(choose) for choose in early.values()}
    return [read(v) if id(choose) in chosen else choose(read(v)) for v, choose in outs]
