"""Rules: how the results of JAX's operations are made of factors."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optaxclip._factors import Carried, Convolution, Lazy, Product, array
from optaxclip._jax import bind

# parameters of another structure than expected raise one of these
UNREADABLE = (AttributeError, IndexError, KeyError, TypeError, ValueError)

Outputs = Callable[[list[Any], Any], Sequence[Any] | None]
"""`(inputs, equation) -> outputs`, arrays or `Lazy`; None if the operation must be computed."""

Terms = Callable[[list[Any], Any], Sequence[Any] | None]
"""`(inputs, equation) -> terms` of the only output; None, also for a term, to compute it."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the outputs of an operation are made of factors.

    The parameters of JAX's operations are not a public interface. A rule applies only to the
    parameters that it was written for; otherwise the operation is computed, which costs memory but
    is always right.

    Attributes:
        outputs: `(inputs, equation) -> outputs`; None for an operation that must be computed.
        needed: the parameters that it reads.
        others: parameters that may be there and do not affect the factors.
    """

    outputs: Outputs
    needed: frozenset[str] = frozenset()
    others: frozenset[str] = frozenset()

    def knows(self, options: dict[str, Any]) -> bool:
        """Returns whether the rule was written for these parameters."""
        return self.needed <= options.keys() <= self.needed | self.others


def rule(outputs: Outputs, needed: str = "", others: str = "") -> Rule:
    """Makes a rule, with the names of parameters as words."""
    return Rule(outputs, frozenset(needed.split()), frozenset(others.split()))


def compute(equation: Any, inputs: list[Any]) -> Sequence[Any]:
    """Computes the operation from arrays."""
    return bind(equation, list(map(array, inputs)))


def _terms(make: Terms, needed: str = "", others: str = "", *, by_terms: bool = False) -> Rule:
    """Makes the rule of an operation with one output from a function that returns its terms.

    With `by_terms`, its numbers come from its only term.
    """

    def numbers(terms: Sequence[Any], inputs: list[Any], equation: Any) -> Array:
        if by_terms:
            return terms[0].multiply().astype(equation.outvars[0].aval.dtype)
        return compute(equation, inputs)[0]

    def outputs(inputs: list[Any], equation: Any) -> Sequence[Any] | None:
        try:
            terms = make(inputs, equation)
        except UNREADABLE:
            return None
        if terms is None or any(term is None for term in terms):
            return None
        value = functools.partial(numbers, terms, inputs, equation)
        return [Lazy(terms, value, equation.outvars[0].aval)]

    return rule(outputs, needed, others)


def _is_real(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _dot(inputs: list[Any], equation: Any) -> list[Any] | None:
    (left, right), out = map(array, inputs), equation.outvars[0].aval
    if not _is_real(out):  # norms of complex products would need conjugates
        return None
    (left_sums, right_sums), (left_common, right_common) = equation.params["dimension_numbers"]
    count = len(left_common)

    def named(x: Array, sums: Sequence[int], common: Sequence[int], start: int) -> tuple[int, ...]:
        # the result has the common axes first, then the free axes of left, then those of right
        names = {axis: -1 - i for i, axis in enumerate(sums)}
        names |= {axis: i for i, axis in enumerate(common)}
        free = [axis for axis in range(x.ndim) if axis not in names]
        names |= {axis: start + i for i, axis in enumerate(free)}
        return tuple(names[axis] for axis in range(x.ndim))

    lefts = named(left, left_sums, left_common, count)
    rights = named(right, right_sums, right_common, left.ndim - len(left_sums))
    return [Product(left, right, lefts, rights, out.shape)]


def _convolution(inputs: list[Any], equation: Any) -> list[Any] | None:
    (left, right), options, out = map(array, inputs), equation.params, equation.outvars[0].aval
    grouped = options["feature_group_count"] != 1 or options["batch_group_count"] != 1
    if grouped or not _is_real(out):
        return None
    numbers = options["dimension_numbers"]
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "precision")
    # bring both arrays to channels first, and remember how JAX orders the axes of the result
    order = [0] * out.ndim
    for axis, at in enumerate(numbers.out_spec):
        order[at] = axis
    left, right = jnp.transpose(left, numbers.lhs_spec), jnp.transpose(right, numbers.rhs_spec)
    kept = tuple((name, options[name]) for name in names)
    return [Convolution(left, right, kept, tuple(order), out.shape)]


def _add_rows(inputs: list[Any], equation: Any) -> list[Any] | None:
    """Adds rows to a table by index: the gradient of an embedding."""
    table, (index, rows) = inputs[0], map(array, inputs[1:])
    numbers, out = equation.params["dimension_numbers"], equation.outvars[0].aval
    # only the form that JAX makes for `table[indices]`: whole rows, indexed along the first axis
    simple = (
        isinstance(table, Lazy)
        and _is_real(out)
        and numbers.inserted_window_dims == (0,)
        and numbers.scatter_dims_to_operand_dims == (0,)
        and numbers.update_window_dims == tuple(range(rows.ndim - out.ndim + 1, rows.ndim))
        and not numbers.operand_batching_dims
        and rows.shape[rows.ndim - out.ndim + 1 :] == out.shape[1:]
    )
    if not simple:
        return None
    index = index[..., 0]
    inside = (index >= 0) & (index < out.shape[0])
    if equation.params["mode"] != jax.lax.GatherScatterMode.CLIP:
        # JAX drops rows outside of the table; adding zeros does the same
        rows = jnp.where(inside[(...,) + (None,) * (rows.ndim - index.ndim)], rows, 0)
    positions = tuple(range(-index.ndim, 0))
    index = jnp.clip(index, 0, out.shape[0] - 1)
    axes = (*positions, *range(1, out.ndim))
    return [*table.terms, Product(index, rows, positions, axes, out.shape, 0)]


def _add(inputs: list[Any], equation: Any) -> list[Any] | None:
    a, b = inputs
    # with a plain array the sum has no factors for one of its terms
    both = isinstance(a, Lazy) and isinstance(b, Lazy) and a.shape == b.shape
    return [*a.terms, *b.terms] if both else None


def _broadcast(inputs: list[Any], equation: Any) -> list[Any] | None:
    x, shape = inputs[0], equation.outvars[0].aval.shape
    if isinstance(x, Lazy):
        if math.prod(x.shape) != math.prod(shape):
            return None
        old = equation.params["broadcast_dimensions"]
        new = [axis for axis in range(len(shape)) if axis not in old]
        return _each(x, lambda term: _expanded(term, new))
    # backward passes start their sums from a literal zero, which is a sum of no terms
    is_zero = not isinstance(x, Array) and np.ndim(x) == 0 and np.asarray(x) == 0
    return [] if is_zero else None


def _each(x: Any, change: Callable[[Any], Any]) -> list[Any] | None:
    """Changes every term; None for a sum that a loop carries, whose terms are not known."""
    known = isinstance(x, Lazy) and not any(isinstance(term, Carried) for term in x.terms)
    return [change(term) for term in x.terms] if known else None


def _transposed(inputs: list[Any], equation: Any) -> list[Any] | None:
    return _each(inputs[0], lambda term: term.transposed(equation.params["permutation"]))


def _converted(inputs: list[Any], equation: Any) -> list[Any] | None:
    # factors keep their dtype: sums are computed in float32 or wider anyway
    return _each(inputs[0], lambda term: term) if _is_real(equation.outvars[0].aval) else None


def _times(inputs: list[Any], equation: Any) -> list[Any] | None:
    x, factor = inputs if isinstance(inputs[0], Lazy) else inputs[::-1]
    return _each(x, lambda term: term.scaled(factor)) if _is_number(factor) else None


def _divided(inputs: list[Any], equation: Any) -> list[Any] | None:
    x, divisor = inputs
    return _each(x, lambda term: term.scaled(1 / divisor)) if _is_number(divisor) else None


def _is_number(x: Any) -> bool:
    return not isinstance(x, Lazy) and np.ndim(x) == 0


def _negative(inputs: list[Any], equation: Any) -> list[Any] | None:
    return _each(inputs[0], lambda term: term.scaled(-1))


def _reshaped(inputs: list[Any], equation: Any) -> list[Any] | None:
    """Removes and adds axes of length 1; other shapes must be computed."""
    (x, *_), shape = inputs, equation.outvars[0].aval.shape
    if not isinstance(x, Lazy) or [n for n in x.shape if n != 1] != [n for n in shape if n != 1]:
        return None
    old = [axis for axis, n in enumerate(x.shape) if n == 1]
    new = [axis for axis, n in enumerate(shape) if n == 1]
    return _each(x, lambda term: _expanded(_squeezed(term, old), new))


def _sliced(inputs: list[Any], equation: Any) -> list[Any] | None:
    x, options = inputs[0], equation.params
    if not isinstance(x, Lazy) or options["strides"] is not None:
        return None
    # axes that are kept whole need no change, so a sliced convolution may stay one
    ends = zip(options["start_indices"], options["limit_indices"], strict=True)
    parts = [(axis, *end) for axis, end in enumerate(ends) if end != (0, x.shape[axis])]
    return _each(x, lambda term: functools.reduce(_slice, parts, term))


# Some changes need a product: a convolution becomes one. None stays None.


def _slice(term: Any, where: tuple[int, int, int]) -> Any:
    return term and term.factors().sliced(*where)


def _squeezed(term: Any, axes: Sequence[int]) -> Any:
    for axis in sorted(axes, reverse=True):
        term = term and term.factors().squeezed(axis)
    return term


def _expanded(term: Any, axes: Sequence[int]) -> Any:
    for axis in sorted(axes):
        term = term and term.factors().expanded(axis)
    return term


def _parts(inputs: list[Any], equation: Any) -> Sequence[Any] | None:
    """Splits an array into parts, or a stack into its members."""
    axis, sizes = equation.params["axis"], equation.params.get("sizes")

    def change(term: Any, where: tuple[int, int, int]) -> Any:
        return _slice(term, where) if sizes else _squeezed(_slice(term, where), [axis])

    outs = functools.cache(lambda: compute(equation, inputs))  # once for all outputs
    try:
        ends = itertools.accumulate(sizes or [1] * len(equation.outvars), initial=0)
        made = [
            _each(inputs[0], functools.partial(change, where=(axis, *pair)))
            for pair in itertools.pairwise(ends)
        ]
    except UNREADABLE:
        return None
    if any(terms is None or None in terms for terms in made):
        return None
    return [
        Lazy(terms or (), lambda i=i: outs()[i], v.aval)
        for i, (terms, v) in enumerate(zip(made, equation.outvars, strict=True))
    ]


_DOT = "precision preferred_element_type out_sharding"

OPERATIONS: dict[str, Rule] = {
    "split": rule(_parts, "axis sizes"),
    "unstack": rule(_parts, "axis"),
    "dot_general": _terms(_dot, "dimension_numbers", _DOT),
    "conv_general_dilated": _terms(
        _convolution,
        "dimension_numbers window_strides padding lhs_dilation rhs_dilation precision "
        "feature_group_count batch_group_count",
        _DOT,
        by_terms=True,
    ),
    "scatter-add": _terms(
        _add_rows,
        "dimension_numbers mode",
        "indices_are_sorted unique_indices update_jaxpr update_consts out_sharding",
    ),
    "add": _terms(_add),
    "add_any": _terms(_add),
    "broadcast_in_dim": _terms(_broadcast, "broadcast_dimensions shape", "sharding"),
    "transpose": _terms(_transposed, "permutation"),
    "convert_element_type": _terms(_converted, "new_dtype", "weak_type sharding"),
    "mul": _terms(_times, "", "out_dtype"),
    "div": _terms(_divided),
    "neg": _terms(_negative),
    "reshape": _terms(_reshaped, "new_sizes", "dimensions sharding"),
    "squeeze": _terms(_reshaped, "dimensions"),
    "reduce_sum": _terms(_reshaped, "axes", "out_sharding"),
    "slice": _terms(_sliced, "start_indices limit_indices strides"),
    "copy": _terms(_converted),
}
# An operation with other parameters, or without a rule, is computed: slower, never wrong.
"""By name of the operation. `_factored` adds calls and loops, whose programs it must run."""
