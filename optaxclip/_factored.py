r"""Norms and weighted sums of per-example gradients from factors, without computing gradients.

The gradient of a matrix is a product of the layer's inputs and of the cotangents of its outputs,
summed over the positions where the matrix was used, :math:`G = \sum_t u_t v_t^T`. Its norm needs
only products of rows with rows, :math:`|G|^2 = \sum_{t,s} (u_t \cdot u_s)(v_t \cdot v_s)`, and the
weighted sum over a batch is one product for all examples. Where the factors have fewer numbers than
the gradient, both take less memory and less work.

To find factors, it traces the gradient of one example to a program and runs that program again. A
matrix product, a convolution or a sum over rows then returns its factors, and computes numbers only
when another operation needs them. So this works for models of any library, and an operation without
a rule is computed as usual.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from optaxclip._factor_rules import OPERATIONS, Rule, compute, rule
from optaxclip._factors import (
    Carried,
    Lazy,
    Product,
    Term,
    array,
    einsum,
    outlines,
    wide,
    without_zero_weights,
)
from optaxclip._jax import Literal, context


def factored_grad(
    loss: Callable[..., Any], params: Any, *example: Any
) -> tuple[Any, list[Array | tuple[Term, ...]]]:
    """Returns `loss(params, *example)`, and its gradients by the leaves of `params`.

    A gradient is an array, or the terms of its sum.

    Args:
        loss: returns a scalar, and another tree.
        params: floats.
        example: other arguments.
    """
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    program, shape = jax.make_jaxpr(value_and_grad, return_shape=True)(params, *example)
    outs = _run(program.jaxpr, program.consts, jax.tree.leaves((params, example)))
    treedef = jax.tree.structure(shape[0])  # of the loss and the other tree, which come first
    value = jax.tree.unflatten(treedef, list(map(array, outs[: treedef.num_leaves])))
    return value, [x.terms if _is_factored(x) else array(x) for x in outs[treedef.num_leaves :]]


def squares(gradient: Array | tuple[Term, ...]) -> Array:
    """Returns the sum of squares of one example's gradient, in float32 or wider."""
    if isinstance(gradient, Array):
        x = gradient.astype(wide(gradient))
        return jnp.sum((x * jnp.conj(x)).real)
    terms, total = _aligned([term.factors() for term in gradient]) or [], jnp.zeros((), jnp.float32)
    # |sum of terms|^2: every pair counts twice, except a term with itself
    for i, a in enumerate(terms):
        for j, b in enumerate(terms[: i + 1]):
            total += (1 if i == j else 2) * _inner(a, b)
    return jnp.maximum(total, 0)  # rounding makes it negative where terms cancel


def weighted_sum(gradient: Array | tuple[Term, ...], weights: Array) -> Array:
    """Returns the weighted sum of the gradients of examples; each array has the examples in front.

    A gradient with the weight 0 may be NaN.
    """
    if isinstance(gradient, tuple):
        return functools.reduce(jnp.add, (term.multiply(weights) for term in gradient))
    x = without_zero_weights(gradient, weights).astype(wide(gradient))
    return jnp.tensordot(weights.astype(wide(gradient)), x, 1)


def _is_factored(x: Any) -> bool:
    short = isinstance(x, Lazy) and bool(x.terms) and x.is_short()
    return short and _aligned(outlines(x.terms)) is not None


def _aligned(terms: list[Product]) -> list[Product] | None:
    """Exchanges factors so that all left factors have the same axes of the result.

    Returns None if that is not possible.
    """
    first = next((term for term in terms if term.row_axis is not None), terms[0])
    lefts = first.axes_of_left()
    # axes that both factors have must be the same in all terms, because they stay until the end
    common = [set(term.axes_of_left()) & set(term.right_axes) for term in terms]
    if any(axes != common[0] for axes in common):
        return None
    turned = [
        term if term.axes_of_left() == lefts or term.row_axis is not None else term.exchanged()
        for term in terms
    ]
    return turned if all(term.axes_of_left() == lefts for term in turned) else None


def _inner(a: Product, b: Product) -> Array:
    """Returns the inner product of two products whose left factors have the same axes."""
    # b's summed axes get new names: every position of a meets every position of b
    names = {axis: axis - 1000 for axis in (*b.left_axes, *b.right_axes) if axis < 0}
    lefts = tuple(names.get(axis, axis) for axis in b.left_axes)
    rights = tuple(names.get(axis, axis) for axis in b.right_axes)
    # axes that left and right share stay until both are multiplied
    shared = [axis for axis in a.left_axes if axis < 0 or axis in a.right_axes]
    out = tuple(dict.fromkeys([*shared, *names.values()]))
    if a.row_axis is None and b.row_axis is None:
        left = einsum(a.left, a.left_axes, b.left, lefts, out, "highest")
    elif b.row_axis is None:
        return _inner(b, a)
    elif a.row_axis is None:
        # the product with a one-hot matrix picks rows
        at, axes = a.left_axes.index(b.row_axis), list(a.left_axes)
        axes[at : at + 1] = lefts
        left = jnp.transpose(jnp.take(a.left, b.left, at), [axes.index(axis) for axis in out])
    else:
        # two one-hot rows have the product 1 if their indices are equal
        left = jnp.equal(a.left[(...,) + (None,) * b.left.ndim], b.left)
    return jnp.sum(left * einsum(a.right, a.right_axes, b.right, rights, out, "highest"))


# Running a program


def _run(program: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Runs a program; arguments and outputs are arrays or `Lazy`."""
    variables = [*program.constvars, *program.invars]
    values: dict[Any, Any] = dict(zip(variables, [*consts, *args], strict=True))

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else values[v]

    for equation in program.eqns:
        # the mesh and the precision under which the equation was traced
        with context(equation):
            outs = _outputs(equation, list(map(read, equation.invars)))
        values.update(zip(equation.outvars, outs, strict=True))
    return list(map(read, program.outvars))


def _outputs(equation: Any, inputs: list[Any]) -> Sequence[Any]:
    known = _RULES.get(equation.primitive.name)
    outs = known.outputs(inputs, equation) if known and known.knows(equation.params) else None
    return compute(equation, inputs) if outs is None else outs


def _inlined(inputs: list[Any], equation: Any) -> Sequence[Any] | None:
    inner = equation.params["call_jaxpr" if "call_jaxpr" in equation.params else "jaxpr"]
    return _run(inner.jaxpr, inner.consts, inputs) if hasattr(inner, "consts") else None


def _recomputed(inputs: list[Any], equation: Any) -> Sequence[Any] | None:
    """Runs the second computation of a checkpointed function."""
    if not hasattr(equation.params["jaxpr"], "eqns"):
        return None
    # the barrier keeps the compiler from merging it with the first computation
    inputs = jax.lax.optimization_barrier(list(map(array, inputs)))
    return _run(equation.params["jaxpr"], (), inputs)


def _scan(inputs: list[Any], equation: Any) -> Sequence[Any] | None:
    """Runs a loop whose sums in the carry, and rows in the outputs, may be factors.

    The loop stacks the factors of all its steps instead.
    """
    options, body, ends = equation.params, equation.params["jaxpr"], _ends(equation)
    if ends is None:
        return None
    first, end = ends
    start, consts = inputs[first:end], list(map(array, inputs[:first]))
    sums, rows = _short(body, first, end)
    sums = {i for i in sums if isinstance(start[i], Lazy)}
    computed = [i for i in range(end - first) if i not in sums]  # carried as arrays
    carry = body.jaxpr.invars[first:end]

    def step(arrays: list[Any], xs: list[Any]) -> tuple[list[Any], Any]:
        rest = iter(arrays)
        # a sum starts each step without terms, so its terms are those that the step adds
        given = [_no_terms(v.aval) if i in sums else next(rest) for i, v in enumerate(carry)]
        outs = _run(body.jaxpr, body.consts, [*consts, *given, *xs])
        terms = {i: [term.factors() for term in outs[i].terms] for i in sums | rows}
        others = [array(x) for i, x in enumerate(outs) if i >= end - first and i not in rows]
        return [array(outs[i]) for i in computed], (terms, others)

    begin = [jnp.asarray(array(start[i]), carry[i].aval.dtype) for i in computed]
    xs, length = list(map(array, inputs[end:])), options["length"]
    loop = jax.lax.scan(step, begin, xs, length, options["reverse"], options["unroll"])
    last, (terms, others) = loop
    arrays = iter([*last, *others])

    def output(i: int, like: Any) -> Any:
        if i not in terms:
            return next(arrays)
        stacked = [term.stacked(length, i in sums) for term in terms[i]]
        return _sum_of([*start[i].terms, *stacked] if i in sums else stacked, like)

    return [output(i, v.aval) for i, v in enumerate(equation.outvars)]


def _ends(equation: Any) -> tuple[int, int] | None:
    """Returns where in the inputs of a loop the constants end, and where the carry ends.

    Returns None if the inputs have another order. It reads shapes, because the names of the
    parameters differ between versions of JAX.
    """
    body = getattr(equation.params["jaxpr"], "jaxpr", None)
    if body is None:
        return None

    def sliced(outer: Sequence[Any], inner: Sequence[Any]) -> list[bool]:
        return [v.aval.ndim > w.aval.ndim for v, w in zip(outer, inner, strict=True)]

    def types(variables: Sequence[Any]) -> list[Any]:
        return [(v.aval.shape, v.aval.dtype) for v in variables]

    xs, ys = sliced(equation.invars, body.invars), sliced(equation.outvars, body.outvars)
    end, carry = len(xs) - sum(xs), len(ys) - sum(ys)
    ordered = xs == sorted(xs) and ys == sorted(ys) and carry <= end
    same_types = types(body.invars[end - carry : end]) == types(body.outvars[:carry])
    return (end - carry, end) if ordered and same_types else None


def _short(body: Any, first: int, end: int) -> tuple[set[int], set[int]]:
    """Returns which outputs of a loop's body are short sums in the carry, and which short rows.

    A sum in the carry is the carried value plus factors. The loop may not use it otherwise.
    """
    sums: set[int] = set()
    rows: set[int] = set()
    carry = body.jaxpr.invars[first:end]

    def probe(args: list[Array]) -> None:
        used: set[int] = set()

        def ask(i: int) -> Array:  # an operation needs the numbers of this carried value
            used.add(i)
            return args[first + i]

        given = [Lazy([Carried(i)], functools.partial(ask, i), v.aval) for i, v in enumerate(carry)]
        outs = _run(body.jaxpr, body.consts, [*args[:first], *given, *args[end:]])
        for i, x in enumerate(outs):
            terms = x.terms if isinstance(x, Lazy) else ()
            carried = [term for term in terms if isinstance(term, Carried)]
            rest = [term for term in terms if not isinstance(term, Carried)]
            added = Lazy(rest, lambda x=x: array(x), x)
            short = bool(added.terms) and added.is_short()
            if i < end - first and carried == [Carried(i)] and short:
                sums.add(i)
            elif i >= end - first and not carried and short and not added.adds_rows():
                rows.add(i)
            else:
                array(x)  # the loop will compute it, which may use carried values
        sums.difference_update(used)

    # shapes suffice to see where factors go; nothing is computed
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in body.jaxpr.invars]
    jax.eval_shape(probe, shapes)
    return sums, rows


def _sum_of(terms: Sequence[Term], like: Any) -> Lazy:
    def total() -> Array:
        zeros = jnp.zeros(like.shape)
        return sum((term.multiply() for term in terms), zeros).astype(like.dtype)

    return Lazy(terms, total, like)


def _no_terms(like: Any) -> Lazy:
    return Lazy([], lambda: jnp.zeros(like.shape, like.dtype), like)


_CALL = (
    "name inline donated_invars keep_unused ctx_mesh compiler_options_kvs in_layouts out_layouts "
    "in_shardings out_shardings"
)
_CHECKPOINT = "differentiated policy prevent_cse"
_RULES: dict[str, Rule] = {
    **OPERATIONS,
    "jit": rule(_inlined, "jaxpr", _CALL),
    "pjit": rule(_inlined, "jaxpr", _CALL),
    "closed_call": rule(_inlined, "call_jaxpr"),
    "checkpoint": rule(_recomputed, "jaxpr", _CHECKPOINT),
    "remat2": rule(_recomputed, "jaxpr", _CHECKPOINT),
    "scan": rule(
        _scan,
        "jaxpr length reverse unroll",
        "num_consts num_carry linear _split_transpose ft_in ft_out",
    ),
}
