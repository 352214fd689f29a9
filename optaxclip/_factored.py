r"""Gradients of one example, kept as factors whose product is never computed.

The gradient of a matrix is a product: of what came into the layer and of what flowed back to its
output, summed over the positions where the matrix was used, :math:`G = \sum_t u_t v_t^T`. Its norm
needs only products of rows with rows, :math:`|G|^2 = \sum_{t,s} (u_t \cdot u_s)(v_t \cdot v_s)`,
and the weighted sum over a batch is one product for all examples. Where the factors are fewer
numbers than the gradient, both are less memory and less work.

To find factors, the program that JAX traces for the gradient of one example is run again, but what
a matrix product, a convolution or a sum over rows returns is remembered as factors until something
asks for its numbers. So it does not matter with what a model is written, and what is not known here
is computed as ever.
"""

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

from optaxclip._jax import Literal, bind, context

_fixed = functools.partial(dataclasses.field, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Product:
    """A product of two factors, summed over the axes that are not in the result.

    Attributes:
        left: a factor; if `chosen`, integers instead: which row of the result each row of `right`
            is added to.
        right: the other factor.
        left_axes: for each axis of the left factor, which axis of the result it is; negative where
            it is summed over.
        right_axes: the same for the right factor.
        shape: of the result.
        chosen: the axis of the result that the integers count along.
    """

    left: Array
    right: Array
    left_axes: tuple[int, ...] = _fixed()
    right_axes: tuple[int, ...] = _fixed()
    shape: tuple[int, ...] = _fixed()
    chosen: int | None = _fixed(default=None)

    def factors(self) -> "Product":
        """Itself."""
        return self

    def multiply(self, weights: Array | None = None) -> Array:
        """The product; with weights `[examples]`, the weighted sum over examples, which both
        factors have in front.
        """
        left, right, lefts, rights = self.left, self.right, self.left_axes, self.right_axes
        if weights is not None:
            left, right = _without(left, weights), _weighted(right, weights)
            lefts, rights = ((min(*lefts, *rights, 0) - 1, *axes) for axes in (lefts, rights))
        if self.chosen is None:
            return _einsum(left, lefts, right, rights, tuple(range(len(self.shape))))
        others = [axis for axis in range(len(self.shape)) if axis != self.chosen]
        rows = jnp.transpose(right, [rights.index(axis) for axis in (*lefts, *others)])
        rows = rows.reshape(left.size, *(self.shape[axis] for axis in others)).astype(_wide(right))
        table = jnp.zeros((self.shape[self.chosen], *rows.shape[1:]), rows.dtype)
        return jnp.moveaxis(table.at[left.reshape(-1)].add(rows), 0, self.chosen)

    def transposed(self, order: Sequence[int]) -> "Product":
        """Factors of the transposed product."""
        shape = tuple(self.shape[axis] for axis in order)
        return self._renamed({old: new for new, old in enumerate(order)}, shape)

    def scaled(self, factor: Any) -> "Product":
        """Factors of a multiple."""
        return dataclasses.replace(self, right=self.right * factor)

    def without(self, axis: int) -> "Product | None":
        """Factors of the product without an axis of length 1."""
        if axis == self.chosen:
            return None
        rest = [other for other in range(len(self.shape)) if other != axis]
        names = {old: new for new, old in enumerate(rest)}
        kept = dataclasses.replace(
            self,
            left=_squeezed(self.left, self.left_axes, axis),
            right=_squeezed(self.right, self.right_axes, axis),
            left_axes=tuple(other for other in self.left_axes if other != axis),
            right_axes=tuple(other for other in self.right_axes if other != axis),
        )
        return kept._renamed(names, tuple(self.shape[other] for other in rest))

    def with_axis(self, axis: int) -> "Product":
        """Factors of the product with a new axis of length 1."""
        renamed = self._renamed(
            {old: old + (old >= axis) for old in range(len(self.shape))},
            (*self.shape[:axis], 1, *self.shape[axis:]),
        )
        return dataclasses.replace(
            renamed, right=self.right[None], right_axes=(axis, *renamed.right_axes)
        )

    def part(self, axis: int, start: int, end: int) -> "Product | None":
        """Factors of the part of the product that is between two places of an axis."""
        if axis == self.chosen:
            return None
        left, right = (
            jax.lax.slice_in_dim(x, start, end, axis=axes.index(axis)) if axis in axes else x
            for x, axes in ((self.left, self.left_axes), (self.right, self.right_axes))
        )
        shape = (*self.shape[:axis], end - start, *self.shape[axis + 1 :])
        return dataclasses.replace(self, left=left, right=right, shape=shape)

    def stacked(self, length: int, summed: bool) -> "Product":
        """Both factors have got an axis in front: it is summed over, or the first of the result."""
        if summed:
            new = min(*self.left_axes, *self.right_axes, 0) - 1
            return dataclasses.replace(
                self, left_axes=(new, *self.left_axes), right_axes=(new, *self.right_axes)
            )
        moved = self._renamed(
            {old: old + 1 for old in range(len(self.shape))}, (length, *self.shape)
        )
        return dataclasses.replace(
            moved, left_axes=(0, *moved.left_axes), right_axes=(0, *moved.right_axes)
        )

    def exchanged(self) -> "Product":
        """The same with left and right exchanged."""
        return Product(self.right, self.left, self.right_axes, self.left_axes, self.shape)

    def owned(self) -> frozenset[int]:
        """The axes of the result that belong to the left factor."""
        return frozenset(
            axis for axis in (*self.left_axes, self.chosen) if axis is not None and axis >= 0
        )

    def _renamed(self, names: dict[int, int], shape: tuple[int, ...]) -> "Product":
        lefts, rights = (
            tuple(names.get(axis, axis) for axis in axes)
            for axes in (self.left_axes, self.right_axes)
        )
        chosen = None if self.chosen is None else names[self.chosen]
        return dataclasses.replace(
            self, left_axes=lefts, right_axes=rights, shape=shape, chosen=chosen
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Convolution:
    """A convolution of two arrays, of which one is the gradient with respect to the kernel if the
    other flowed back.

    Attributes:
        left: `[channels, summed, *space]`.
        right: `[channels, summed, *positions]`.
        options: as of `jax.lax.conv_general_dilated`.
        order: for each axis of the result, which of `[left channels, right channels, *kernel]` it
            is.
        shape: of the result.
    """

    left: Array
    right: Array
    options: tuple[tuple[str, Any], ...] = _fixed()
    order: tuple[int, ...] = _fixed()
    shape: tuple[int, ...] = _fixed()

    def factors(self) -> Product:
        """As a product: the left factor is every patch that the positions see."""
        options, shape = (
            dict(self.options),
            tuple(self.shape[self.order.index(axis)] for axis in range(len(self.shape))),
        )
        kernel = shape[2:]
        channels, summed, *space = self.left.shape
        steps, strides = options["window_strides"], options["rhs_dilation"]
        positions = self.right.shape[2:]
        padding = []
        for size, inside, length, count, step, stride, (low, _) in zip(
            space,
            options["lhs_dilation"],
            kernel,
            positions,
            steps,
            strides,
            options["padding"],
            strict=True,
        ):
            padding.append(
                (
                    low,
                    (count - 1) * stride
                    + (length - 1) * step
                    + 1
                    - ((size - 1) * inside + 1)
                    - low,
                )
            )
        patches = jax.lax.conv_general_dilated_patches(
            self.left.reshape(channels * summed, 1, *space),
            kernel,
            strides,
            padding,
            lhs_dilation=options["lhs_dilation"],
            rhs_dilation=steps,
        )
        left = patches.reshape(channels, summed, *kernel, *positions)
        sums = tuple(range(-len(positions) - 1, 0))  # the summed axis and the positions
        lefts, rights = (0, sums[0], *range(2, len(self.shape)), *sums[1:]), (1, *sums)
        plain = Product(left, self.right, lefts, rights, shape)
        return plain.transposed(self.order)

    def multiply(self, weights: Array | None = None) -> Array:
        """The result; with weights `[examples]`, the weighted sum over examples, which both arrays
        have in front.
        """
        left, right = self.left, self.right
        if weights is not None:
            left, right = (_merged(x) for x in (_without(left, weights), _weighted(right, weights)))
        ndim = len(self.shape)
        numbers = jax.lax.ConvDimensionNumbers(*[tuple(range(ndim))] * 3)
        found = jax.lax.conv_general_dilated(
            left,
            right,
            dimension_numbers=numbers,
            preferred_element_type=_wide(right),
            **dict(self.options),
        )
        return jnp.transpose(found, self.order)

    def transposed(self, order: Sequence[int]) -> "Convolution":
        """That of the transposed result."""
        new = tuple(self.order[axis] for axis in order)
        return dataclasses.replace(self, order=new, shape=tuple(self.shape[axis] for axis in order))

    def scaled(self, factor: Any) -> "Convolution":
        """That of a multiple."""
        return dataclasses.replace(self, right=self.right * factor)


Term = Product | Convolution


@dataclasses.dataclass(frozen=True)
class Carried:
    """What a loop has summed up so far, in its carry of this number."""

    number: int


class Lazy:
    """An array that is the sum of terms, and is computed when it is asked for."""

    def __init__(self, terms: Sequence[Any], compute: Callable[[], Array], like: Any) -> None:
        self.terms, self.shape, self.dtype = tuple(terms), tuple(like.shape), like.dtype
        self.value = functools.cache(compute)

    def is_short(self) -> bool:
        """Whether the factors are fewer numbers than the array."""
        return sum(x.left.size + x.right.size for x in _outlines(self.terms)) < math.prod(
            self.shape
        )

    def is_chosen(self) -> bool:
        """Whether rows are added to it by their places: such terms cannot be stacked, only summed."""
        return any(isinstance(term, Product) and term.chosen is not None for term in self.terms)


def factored_grad(
    loss: Callable[..., Any], params: Any, *example: Any
) -> tuple[Any, list[Array | tuple[Term, ...]]]:
    """What `loss(params, *example)` returns, and its gradients by the leaves of `params`: arrays,
    or the terms of their sum.

    Args:
        loss: returns a scalar, and another tree.
        params: floats.
        example: other arguments.
    """
    compute = jax.value_and_grad(loss, has_aux=True)
    program, shape = jax.make_jaxpr(compute, return_shape=True)(params, *example)
    outs = _run(program.jaxpr, program.consts, jax.tree.leaves((params, example)))
    treedef = jax.tree.structure(shape[0])
    value = jax.tree.unflatten(treedef, list(map(_array, outs[: treedef.num_leaves])))
    return value, [x.terms if _is_factored(x) else _array(x) for x in outs[treedef.num_leaves :]]


def squares(gradient: Array | tuple[Term, ...]) -> Array:
    """The sum of squares of one example's gradient, in float32 or wider."""
    if isinstance(gradient, Array):
        wide = gradient.astype(_wide(gradient))
        return jnp.sum((wide * jnp.conj(wide)).real)
    terms = _alike([term.factors() for term in gradient]) or []
    pairs = [
        (a, b, 1 if i == j else 2)
        for i, a in enumerate(terms)
        for j, b in enumerate(terms[: i + 1])
    ]
    total = sum((count * _inner(a, b) for a, b, count in pairs), jnp.zeros((), jnp.float32))
    return jnp.maximum(total, 0)  # below 0 by rounding, where terms cancel


def weighted_sum(gradient: Array | tuple[Term, ...], weights: Array) -> Array:
    """The weighted sum of gradients of examples, which every array has in front; what has the
    weight 0 may be NaN.
    """
    if isinstance(gradient, tuple):
        return functools.reduce(jnp.add, (term.multiply(weights) for term in gradient))
    return jnp.tensordot(
        weights.astype(_wide(gradient)), _without(gradient, weights).astype(_wide(gradient)), 1
    )


def _is_factored(x: Any) -> bool:
    return (
        isinstance(x, Lazy)
        and bool(x.terms)
        and x.is_short()
        and _alike(_outlines(x.terms)) is not None
    )


def _outlines(terms: Sequence[Term]) -> list[Product]:
    """The factors of terms as shapes."""
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
        terms,
        is_leaf=lambda x: isinstance(x, Array),
    )
    return [jax.eval_shape(lambda term: term.factors(), term) for term in shapes]


def _alike(terms: list[Product]) -> list[Product] | None:
    """The same terms with left factors that have the same axes of the result; None if that can't
    be.
    """
    first = next((term for term in terms if term.chosen is not None), terms[0])
    common = [set(term.owned()) & set(term.right_axes) for term in terms]
    if any(axes != common[0] for axes in common):
        return None
    turned = [
        term if term.owned() == first.owned() or term.chosen is not None else term.exchanged()
        for term in terms
    ]
    return turned if all(term.owned() == first.owned() for term in turned) else None


def _inner(a: Product, b: Product) -> Array:
    """The inner product of two products whose left factors have the same axes."""
    # other positions
    names = {axis: axis - 1000 for axis in (*b.left_axes, *b.right_axes) if axis < 0}
    lefts, rights = (
        tuple(names.get(axis, axis) for axis in axes) for axes in (b.left_axes, b.right_axes)
    )
    out = tuple(
        dict.fromkeys(
            [*(axis for axis in a.left_axes if axis < 0 or axis in a.right_axes), *names.values()]
        )
    )
    if a.chosen is None and b.chosen is None:
        left = _einsum(a.left, a.left_axes, b.left, lefts, out, "highest")
    elif b.chosen is None:
        return _inner(b, a)
    elif a.chosen is None:
        at, own = a.left_axes.index(b.chosen), list(a.left_axes)
        own[at : at + 1] = lefts
        left = jnp.transpose(jnp.take(a.left, b.left, at), [own.index(axis) for axis in out])
    else:
        left = jnp.equal(a.left[(...,) + (None,) * b.left.ndim], b.left)
    return jnp.sum(left * _einsum(a.right, a.right_axes, b.right, rights, out, "highest"))


def _einsum(
    x: Array,
    x_axes: tuple[int, ...],
    y: Array,
    y_axes: tuple[int, ...],
    out: tuple[int, ...],
    precision: Any = None,
) -> Array:
    names = {axis: chr(ord("a") + i) for i, axis in enumerate(dict.fromkeys((*x_axes, *y_axes)))}
    words = ["".join(names[axis] for axis in axes) for axes in (x_axes, y_axes, out)]
    x, y = map(_promotable, (x, y))
    return jnp.einsum(
        "{},{}->{}".format(*words), x, y, precision=precision, preferred_element_type=_wide(x, y)
    )


def _wide(*arrays: Array) -> Any:
    # JAX promotes no floats of 8 bits
    return jnp.result_type(jnp.float32, *[x.dtype for x in arrays if x.dtype.itemsize > 1])


def _promotable(x: Array) -> Array:
    return x if x.dtype.itemsize > 1 else x.astype(jnp.float32)


def _without(x: Array, weights: Array) -> Array:
    """`x`, with zeros where the weight is 0."""
    return jnp.where(weights.reshape(-1, *[1] * (x.ndim - 1)) != 0, x, 0)


def _weighted(x: Array, weights: Array) -> Array:
    return (_without(x, weights) * weights.reshape(-1, *[1] * (x.ndim - 1))).astype(x.dtype)


def _merged(x: Array) -> Array:
    """`[examples, channels, summed, ...]` as `[channels, examples * summed, ...]`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _squeezed(x: Array, axes: tuple[int, ...], axis: int) -> Array:
    return jnp.squeeze(x, axes.index(axis)) if axis in axes else x


# Running a program

# what parameters of another structure raise
_UNREADABLE = (
    AttributeError,
    IndexError,
    KeyError,
    TypeError,
    ValueError,
)


def _run(program: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """The outputs of a program, each an array or `Lazy`, for arguments that may be either."""
    values: dict[Any, Any] = dict(
        zip([*program.constvars, *program.invars], [*consts, *args], strict=True)
    )

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else values[v]

    for equation in program.eqns:
        with context(equation):
            outs = _outputs(equation, list(map(read, equation.invars)))
        values.update(zip(equation.outvars, outs, strict=True))
    return list(map(read, program.outvars))


def _outputs(equation: Any, inputs: list[Any]) -> Sequence[Any]:
    rule = _RULES.get(equation.primitive.name)
    outs = rule.outputs(inputs, equation) if rule and rule.knows(equation.params) else None
    return _bind(equation, inputs) if outs is None else outs


def _bind(equation: Any, inputs: list[Any]) -> Sequence[Any]:
    return bind(equation, list(map(_array, inputs)))


def _array(x: Any) -> Any:
    return x.value() if isinstance(x, Lazy) else x


def _scan(inputs: list[Any], equation: Any) -> Sequence[Any] | None:
    """A loop, of which sums in the carry and rows in the outputs are made of factors if these are
    short.
    """
    options, body, ends = equation.params, equation.params["jaxpr"], _ends(equation)
    if ends is None:
        return None
    first, end = ends
    consts, start, xs = (
        list(map(_array, inputs[:first])),
        inputs[first:end],
        list(map(_array, inputs[end:])),
    )
    length = options["length"]
    sums, rows = _short(body, first, end)
    sums = {i for i in sums if isinstance(start[i], Lazy)}

    def step(carry: list[Any], x: list[Any]) -> tuple[list[Any], Any]:
        kept = iter(carry)
        given = [
            _nothing(v.aval) if i in sums else next(kept)
            for i, v in enumerate(body.jaxpr.invars[first:end])
        ]
        outs = _run(body.jaxpr, body.consts, [*consts, *given, *x])
        terms = {i: [term.factors() for term in outs[i].terms] for i in sums | rows}
        carried = [_array(x) for i, x in enumerate(outs[: end - first]) if i not in sums]
        return carried, (
            terms,
            [_array(x) for i, x in enumerate(outs) if i >= end - first and i not in rows],
        )

    others = [i for i in range(end - first) if i not in sums]
    begin = [jnp.asarray(_array(start[i]), body.jaxpr.invars[first + i].aval.dtype) for i in others]
    carried, (terms, ys) = jax.lax.scan(
        step, begin, xs, length, options["reverse"], options["unroll"]
    )
    arrays = iter([*carried, *ys])

    def result(i: int, like: Any) -> Any:
        if i not in terms:
            return next(arrays)
        own = [term.stacked(length, i in sums) for term in terms[i]]
        own = [*start[i].terms, *own] if i in sums else own
        return Lazy(
            own,
            lambda: sum((term.multiply() for term in own), jnp.zeros(like.shape)).astype(
                like.dtype
            ),
            like,
        )

    return [result(i, v.aval) for i, v in enumerate(equation.outvars)]


def _ends(equation: Any) -> tuple[int, int] | None:
    """Where in the inputs of a loop the constants end, and where the carry does; None if they are
    in another order.

    Shapes tell it in every version of JAX, the parameters do not.
    """
    body = getattr(equation.params["jaxpr"], "jaxpr", None)
    if body is None:
        return None

    def sliced(outer: Sequence[Any], inner: Sequence[Any]) -> list[bool]:
        return [v.aval.ndim > own.aval.ndim for v, own in zip(outer, inner, strict=True)]

    xs, ys = sliced(equation.invars, body.invars), sliced(equation.outvars, body.outvars)
    end, carry = len(xs) - sum(xs), len(ys) - sum(ys)
    kinds = [
        [(v.aval.shape, v.aval.dtype) for v in vs]
        for vs in (body.invars[end - carry : end], body.outvars[:carry])
    ]
    ordered = xs == sorted(xs) and ys == sorted(ys) and carry <= end and kinds[0] == kinds[1]
    return (end - carry, end) if ordered else None


def _short(body: Any, first: int, end: int) -> tuple[set[int], set[int]]:
    """Of the outputs of a loop's body, which are sums of what was carried and short factors, and
    which are short factors.
    """
    sums: set[int] = set()
    rows: set[int] = set()

    def probe(args: list[Array]) -> None:
        used: set[int] = set()

        def ask(i: int) -> Array:
            used.add(i)
            return args[first + i]

        given = [
            Lazy([Carried(i)], functools.partial(ask, i), v.aval)
            for i, v in enumerate(body.jaxpr.invars[first:end])
        ]
        outs = _run(body.jaxpr, body.consts, [*args[:first], *given, *args[end:]])
        for i, x in enumerate(outs):
            terms = x.terms if isinstance(x, Lazy) else ()
            carried = [term for term in terms if isinstance(term, Carried)]
            rest = Lazy(
                [term for term in terms if not isinstance(term, Carried)], lambda x=x: _array(x), x
            )
            if i < end - first and carried == [Carried(i)] and rest.terms and rest.is_short():
                sums.add(i)
            elif (
                i >= end - first
                and terms
                and not carried
                and rest.is_short()
                and not rest.is_chosen()
            ):
                rows.add(i)
            else:
                _array(x)
        sums.difference_update(used)

    jax.eval_shape(
        probe, [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in body.jaxpr.invars]
    )
    return sums, rows


def _nothing(like: Any) -> Lazy:
    return Lazy([], lambda: jnp.zeros(like.shape, like.dtype), like)


# What the results of operations are made of: terms; None, also among them, for what is to be
# computed


def _is_real(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _dot(inputs: list[Any], equation: Any) -> list[Any] | None:
    (left, right), out = map(_array, inputs), equation.outvars[0].aval
    if not _is_real(out):
        return None
    (left_sums, right_sums), (left_common, right_common) = equation.params["dimension_numbers"]
    count = len(left_common)

    def named(x: Array, sums: Sequence[int], common: Sequence[int], start: int) -> tuple[int, ...]:
        names = {axis: -1 - i for i, axis in enumerate(sums)} | {
            axis: i for i, axis in enumerate(common)
        }
        free = [axis for axis in range(x.ndim) if axis not in names]
        names |= {axis: start + i for i, axis in enumerate(free)}
        return tuple(names[axis] for axis in range(x.ndim))

    lefts = named(left, left_sums, left_common, count)
    rights = named(right, right_sums, right_common, left.ndim - len(left_sums))
    return [Product(left, right, lefts, rights, out.shape)]


def _convolution(inputs: list[Any], equation: Any) -> list[Any] | None:
    (left, right), options, out = map(_array, inputs), equation.params, equation.outvars[0].aval
    if (
        options["feature_group_count"] != 1
        or options["batch_group_count"] != 1
        or not _is_real(out)
    ):
        return None
    numbers = options["dimension_numbers"]
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "precision")
    order = [0] * out.ndim
    for axis, at in enumerate(numbers.out_spec):
        order[at] = axis
    left, right = jnp.transpose(left, numbers.lhs_spec), jnp.transpose(right, numbers.rhs_spec)
    return [
        Convolution(
            left, right, tuple((name, options[name]) for name in names), tuple(order), out.shape
        )
    ]


def _add_rows(inputs: list[Any], equation: Any) -> list[Any] | None:
    """Rows that are added to those of a table, as an embedding's gradient is made."""
    table, (place, rows) = inputs[0], map(_array, inputs[1:])
    numbers, out = equation.params["dimension_numbers"], equation.outvars[0].aval
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
    place = place[..., 0]
    inside = (place >= 0) & (place < out.shape[0])
    if equation.params["mode"] != jax.lax.GatherScatterMode.CLIP:
        rows = jnp.where(inside[(...,) + (None,) * (rows.ndim - place.ndim)], rows, 0)
    positions = tuple(range(-place.ndim, 0))
    place = jnp.clip(place, 0, out.shape[0] - 1)
    return [
        *table.terms,
        Product(place, rows, positions, (*positions, *range(1, out.ndim)), out.shape, 0),
    ]


def _add(inputs: list[Any], equation: Any) -> list[Any] | None:
    a, b = inputs
    both = isinstance(a, Lazy) and isinstance(b, Lazy) and a.shape == b.shape
    return [*a.terms, *b.terms] if both else None


def _broadcast(inputs: list[Any], equation: Any) -> list[Any] | None:
    x, shape = inputs[0], equation.outvars[0].aval.shape
    if isinstance(x, Lazy):
        new = [
            axis
            for axis in range(len(shape))
            if axis not in equation.params["broadcast_dimensions"]
        ]
        return (
            _each(x, lambda term: _with_axes(term, new))
            if math.prod(x.shape) == math.prod(shape)
            else None
        )
    # a literal zero
    return [] if not isinstance(x, Array) and np.ndim(x) == 0 and np.asarray(x) == 0 else None


def _each(x: Any, change: Callable[[Any], Any]) -> list[Any] | None:
    known = isinstance(x, Lazy) and not any(isinstance(term, Carried) for term in x.terms)
    return [change(term) for term in x.terms] if known else None


def _transposed(inputs: list[Any], equation: Any) -> list[Any] | None:
    return _each(inputs[0], lambda term: term.transposed(equation.params["permutation"]))


def _converted(inputs: list[Any], equation: Any) -> list[Any] | None:
    return _each(inputs[0], lambda term: term) if _is_real(equation.outvars[0].aval) else None


def _times(inputs: list[Any], equation: Any) -> list[Any] | None:
    x, factor = inputs if isinstance(inputs[0], Lazy) else inputs[::-1]
    return (
        _each(x, lambda term: term.scaled(factor))
        if not isinstance(factor, Lazy) and np.ndim(factor) == 0
        else None
    )


def _divided(inputs: list[Any], equation: Any) -> list[Any] | None:
    x, divisor = inputs
    return (
        _each(x, lambda term: term.scaled(1 / divisor))
        if not isinstance(divisor, Lazy) and np.ndim(divisor) == 0
        else None
    )


def _negative(inputs: list[Any], equation: Any) -> list[Any] | None:
    return _each(inputs[0], lambda term: term.scaled(-1))


def _reshaped(inputs: list[Any], equation: Any) -> list[Any] | None:
    """Without and with axes of length 1; other shapes are to be computed."""
    (x, *_), shape = inputs, equation.outvars[0].aval.shape
    if not isinstance(x, Lazy) or [n for n in x.shape if n != 1] != [n for n in shape if n != 1]:
        return None
    old = [axis for axis, n in enumerate(x.shape) if n == 1]
    new = [axis for axis, n in enumerate(shape) if n == 1]
    return _each(x, lambda term: _with_axes(_without_axes(term, old), new))


def _sliced(inputs: list[Any], equation: Any) -> list[Any] | None:
    x, options = inputs[0], equation.params
    if not isinstance(x, Lazy) or options["strides"] is not None:
        return None
    ends = zip(options["start_indices"], options["limit_indices"], strict=True)
    parts = [(axis, *end) for axis, end in enumerate(ends) if end != (0, x.shape[axis])]
    return _each(x, lambda term: functools.reduce(_part, parts, term))


def _part(term: Any, where: tuple[int, int, int]) -> Any:
    return term and term.factors().part(*where)


def _without_axes(term: Any, axes: Sequence[int]) -> Any:
    for axis in sorted(axes, reverse=True):
        term = term and term.factors().without(axis)
    return term


def _with_axes(term: Any, axes: Sequence[int]) -> Any:
    for axis in sorted(axes):
        term = term and term.factors().with_axis(axis)
    return term


def _inlined(inputs: list[Any], equation: Any) -> Sequence[Any] | None:
    inner = equation.params["call_jaxpr" if "call_jaxpr" in equation.params else "jaxpr"]
    return _run(inner.jaxpr, inner.consts, inputs) if hasattr(inner, "consts") else None


def _computed_again(inputs: list[Any], equation: Any) -> Sequence[Any] | None:
    """What is computed again to save memory; the barrier keeps the compiler from merging it with
    the first computation.
    """
    if not hasattr(equation.params["jaxpr"], "eqns"):
        return None
    return _run(
        equation.params["jaxpr"], (), jax.lax.optimization_barrier(list(map(_array, inputs)))
    )


def _parts(inputs: list[Any], equation: Any) -> Sequence[Any] | None:
    """What an array is split into, or is a stack of."""
    axis, sizes = equation.params["axis"], equation.params.get("sizes")

    def change(term: Any, where: tuple[int, int, int]) -> Any:
        return _part(term, where) if sizes else _without_axes(_part(term, where), [axis])

    outs = functools.cache(lambda: _bind(equation, inputs))
    try:
        ends = itertools.accumulate(sizes or [1] * len(equation.outvars), initial=0)
        made = [
            _each(inputs[0], functools.partial(change, where=(axis, *ends)))
            for ends in itertools.pairwise(ends)
        ]
    except _UNREADABLE:
        return None
    if any(terms is None or None in terms for terms in made):
        return None
    return [
        Lazy(terms or (), lambda i=i: outs()[i], v.aval)
        for i, (terms, v) in enumerate(zip(made, equation.outvars, strict=True))
    ]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the outputs of an operation are made of factors, for the parameters that the operation is
    known with.

    The parameters of JAX's operations are no public interface. With any others the operation is
    computed as ever, which costs memory and never a result.

    Attributes:
        outputs: `(inputs, equation) -> outputs`; None for an operation that is to be computed.
        needed: the parameters that it reads.
        others: parameters that may be there, and change nothing about the factors.
    """

    outputs: Callable[[list[Any], Any], Sequence[Any] | None]
    needed: frozenset[str] = frozenset()
    others: frozenset[str] = frozenset()

    def knows(self, options: dict[str, Any]) -> bool:
        """Whether these are parameters that it is written for."""
        return self.needed <= options.keys() <= self.needed | self.others


def _rule(
    outputs: Callable[[list[Any], Any], Sequence[Any] | None], needed: str = "", others: str = ""
) -> Rule:
    return Rule(outputs, frozenset(needed.split()), frozenset(others.split()))


def _terms(
    make: Callable[[list[Any], Any], list[Any] | None], needed: str = "", others: str = ""
) -> Rule:
    """The rule of an operation with one output, of which `make` returns the terms; None, also among
    them, to compute it.
    """

    def outputs(inputs: list[Any], equation: Any) -> Sequence[Any] | None:
        try:
            terms = make(inputs, equation)
        except _UNREADABLE:
            return None
        if terms is None or any(term is None for term in terms):
            return None
        return [Lazy(terms, lambda: _bind(equation, inputs)[0], equation.outvars[0].aval)]

    return _rule(outputs, needed, others)


_CALL = "name inline donated_invars keep_unused ctx_mesh compiler_options_kvs in_layouts out_layouts in_shardings out_shardings"
_DOT = "precision preferred_element_type out_sharding"

_RULES: dict[str, Rule] = {
    "jit": _rule(_inlined, "jaxpr", _CALL),
    "pjit": _rule(_inlined, "jaxpr", _CALL),
    "closed_call": _rule(_inlined, "call_jaxpr"),
    "checkpoint": _rule(_computed_again, "jaxpr", "differentiated policy prevent_cse"),
    "remat2": _rule(_computed_again, "jaxpr", "differentiated policy prevent_cse"),
    "scan": _rule(
        _scan,
        "jaxpr length reverse unroll",
        "num_consts num_carry linear _split_transpose ft_in ft_out",
    ),
    "split": _rule(_parts, "axis sizes"),
    "unstack": _rule(_parts, "axis"),
    "dot_general": _terms(_dot, "dimension_numbers", _DOT),
    "conv_general_dilated": _terms(
        _convolution,
        "dimension_numbers window_strides padding lhs_dilation rhs_dilation precision "
        "feature_group_count batch_group_count",
        _DOT,
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
