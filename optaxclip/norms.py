r"""How large an array is: `l2 l1 linf lp rms relative_linf`.

Every norm is exact where its squares or powers would leave the float range: the
size of float32 `[3e20, 4e20]` is `5e20`, not `inf`, and that of `[3e-25, 4e-25]` is
`5e-25`, not 0. Leaves of 16 bits are measured in float32, so are their joint sizes.

Laws, for each norm here: a size is 0 for zeros and for an empty array, complex
numbers count by magnitude, `size(c x) = |c| size(x)`, the size of a whole is the size
of the sizes of its parts, and derivatives are finite, at zero too.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from optaxclip import _jax, _sharding, _validate
from optaxclip._numerics import share
from optaxclip._packing import LARGE, alike, common, packing_of, places, stacked
from optaxclip._sharding import Names
from optaxclip._types import Axes, Join, Norm, Partials


def l2() -> Norm:
    r"""Euclidean norm, :math:`\sqrt{\sum |x|^2}`.

    Reads the array once and is right for every size up to the largest float, as long as the
    elements that matter are above `1e-29` in float32.

    Example:
        >>> import jax.numpy as jnp
        >>> from optaxclip import norms
        >>> norms.measure(norms.l2(), [jnp.array([3e20, 4e20])])
        [Array([5.e+20], dtype=float32)]
    """
    return _l2()


def l1() -> Norm:
    r"""Sum of magnitudes, :math:`\sum |x|`."""
    return _l1()


def linf() -> Norm:
    r"""Largest magnitude, :math:`\max |x|`."""
    return _linf()


def lp(p: float) -> Norm:
    r"""The p-norm, :math:`(\sum |x|^p)^{1/p}`, for any :math:`p \ge 1`, `inf` included.

    Powers other than 1, 2 and `inf` read the array twice: once for its largest
    magnitude, once for the sum of powers relative to it.

    Args:
        p: the power, at least 1.

    Raises:
        TypeError: `p` is not a number.
        ValueError: `p` is below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from optaxclip import norms
        >>> norms.measure(norms.lp(3), [jnp.array([3.0, 4.0, 5.0])])
        [Array([6.], dtype=float32)]
    """
    _validate.number("p", p, low=1.0)
    if p in (1, 2, math.inf):
        return {1: l1, 2: l2, math.inf: linf}[p]()
    power = int(p) if float(p).is_integer() else p

    def partials(magnitudes: Array, axes: Axes) -> tuple[Array, Array]:
        # only a scale: the size does not depend on it
        top = jax.lax.stop_gradient(_max(magnitudes, axes))
        return top, _sum(share(magnitudes, top) ** power, axes)

    def join(partials: Partials, total: Join, largest: Join) -> Partials:
        tops, totals = partials
        top = largest(tops)
        return top, total(
            jax.tree.map(
                lambda own, part, whole: own * share(part, whole) ** power, totals, tops, top
            )
        )

    return Norm(partials, join, lambda top, total: top * _root(total, power))


def rms() -> Norm:
    r"""Root mean square, :math:`\sqrt{\sum |x|^2 / n}`; 0 for an empty array.

    Example:
        >>> import jax.numpy as jnp
        >>> from optaxclip import norms
        >>> norms.measure(norms.rms(), [jnp.array([1.0, 7.0])])
        [Array([5.], dtype=float32)]
    """
    return _rms()


def upper() -> Norm:
    r"""Largest positive value, :math:`\max(x, 0)`: a one-sided `linf`, for bounds that differ by
    sign.
    """
    return linf()._replace(magnitude=_above)


def lower() -> Norm:
    r"""Largest negative value, :math:`\max(-x, 0)`: a one-sided `linf`, for bounds that differ by
    sign.
    """
    return linf()._replace(magnitude=_below)


def relative_linf(relative: ArrayLike, absolute: ArrayLike) -> Norm:
    r"""Largest share of what each element may be, :math:`\max |x| / (r |w| + a)`, where :math:`w`
    is its parameter.

    Args:
        relative: :math:`r`, the share of its parameter that an element may be.
        absolute: :math:`a`, how much more it may be. Where both give nothing, the largest float is
            the share.

    Raises:
        TypeError: one of the two is not a number.
        ValueError: one of the two is negative.

    Example:
        >>> import jax.numpy as jnp
        >>> from optaxclip import norms
        >>> x, w = jnp.array([0.2, 0.1]), jnp.array([1.0, 0.25])
        >>> norms.measure(norms.relative_linf(0.1, 1e-7), [x], params=[w])
        [Array([3.999984], dtype=float32)]
    """
    _validate.number("relative", relative)
    _validate.number("absolute", absolute)

    def magnitude(x: Array, w: Array) -> Array:
        allowed = relative * abs(w) + absolute
        part = _absolute(x) / jnp.where(allowed > 0, allowed, jnp.finfo(allowed.dtype).tiny)
        return jnp.where(
            jnp.isfinite(x), jnp.minimum(part, jnp.finfo(part.dtype).max), _absolute(x)
        )

    return linf()._replace(magnitude=magnitude, uses_params=True)


def measure(
    norm: Norm,
    leaves: Sequence[ArrayLike],
    *,
    params: Sequence[ArrayLike] | None = None,
    axes: Sequence[Axes] | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    axis_names: Sequence[Names | None] | None = None,
) -> list[Array]:
    """Measures arrays, in as few kernels as there can be.

    Args:
        norm: how to measure.
        leaves: arrays of floats or complex numbers, of any precision.
        params: their parameters, for norms that use them.
        axes: for each leaf the axes that are measured together; None measures whole leaves.
        groups: without axes, positions of the leaves that are measured jointly; None measures each
            alone.
        axis_names: for each leaf the mapped axes along which what is measured together is split, or
            None for a leaf whose type tells. (A leaf of which parts are measured is then an error
            if it is split: the type does not tell which axis.)

    Returns:
        Sizes, in float32 or wider: a list of one vector `[groups]`; with `axes`, a list of one
        array per leaf, in which those axes have length 1 (without any, every element has its own
        size).

    Example:
        >>> import jax.numpy as jnp
        >>> from optaxclip import norms
        >>> leaves = [jnp.array([3e20]), jnp.array([4e20])]
        >>> norms.measure(norms.l2(), leaves, groups=[[0, 1]])
        [Array([5.e+20], dtype=float32)]
        >>> norms.measure(norms.l1(), [jnp.array([[1.0, -2.0], [3.0, 4.0]])], axes=[(1,)])
        [Array([[3.],
               [7.]], dtype=float32)]
    """

    def magnitudes() -> list[Array]:
        operands = (
            zip(leaves, params, strict=True)
            if norm.uses_params and params is not None
            else zip(leaves, strict=True)
        )
        magnitude = _absolute if norm.magnitude is jnp.abs else norm.magnitude
        return [magnitude(*map(widen, operand)) for operand in operands]

    for names in axis_names or ():
        _sharding.all_bound("sharded_over", names)
    if axes is not None and not any(axes):
        return magnitudes()
    if axes is None and not leaves:
        return [jnp.zeros((0,))]
    parts = axes or [tuple(range(jnp.ndim(leaf))) for leaf in leaves]
    split = _split(leaves, parts, axis_names)
    if axes is None:
        groups = (
            tuple(map(tuple, groups))
            if groups is not None
            else tuple((k,) for k in range(len(leaves)))
        )
    if (
        norm.magnitude is not jnp.abs
    ):  # it may close over traced numbers, which the caches of what is compiled must not keep
        leaves, norm = magnitudes(), norm._replace(magnitude=_itself)
    if axes is None:
        leaves = _alike(leaves)
    return _measured(norm, tuple(parts), None if axes else groups, tuple(split), list(leaves))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), inline=True)
def _measured(
    norm: Norm,
    parts: Sequence[Axes],
    groups: Sequence[Axes] | None,
    split: Sequence[Names],
    leaves: list[ArrayLike],
) -> list[Array]:
    exact = functools.partial(_sizes, norm, parts, groups, split)
    if norm.fast is None or any(split) or _widest(leaves) == jnp.float64:
        return _differentiable(exact, exact, leaves)
    in_float64 = functools.partial(
        _in_float64, norm.fast, parts, groups, split, joined=groups is not None
    )

    in_parts = _in_float32 if any(jnp.size(leaf) > LARGE for leaf in leaves) else _in_float64
    on_cpu = functools.partial(_by_stacks, functools.partial(in_parts, norm.fast), parts, groups)

    # Float64 holds the squares of all numbers in float32. A GPU waits for the leaves, whatever it
    # computes from them. A CPU takes twice as long for sums in float64, so where leaves are large
    # it tries float32 first; a branch that is not taken is free there. A TPU has no float64.
    # Derivatives are always those of `exact`: where float64 is switched off, JAX cannot
    # differentiate what is computed in it.
    def measured(leaves: list[ArrayLike]) -> list[Array]:
        return jax.lax.platform_dependent(
            leaves, cpu=on_cpu, cuda=in_float64, rocm=in_float64, default=exact
        )

    return _differentiable(measured, exact, leaves)


def _differentiable(
    measured: Callable[..., list[Array]], exact: Callable[..., list[Array]], leaves: list[Any]
) -> list[Array]:
    """`measured(leaves)`, with the derivative of `exact`; a size that is not finite has none, and
    none of it is 0 * NaN.
    """
    function = jax.custom_jvp(measured)

    @function.defjvp
    def _(
        primals: tuple[list[Array]], tangents: tuple[list[Array]]
    ) -> tuple[list[Array], list[Array]]:
        (leaves,), (changes,) = primals, tangents
        finite = [jnp.isfinite(x) for x in leaves]
        known = [jnp.where(ok, x, jnp.zeros_like(x)) for ok, x in zip(finite, leaves, strict=True)]
        changes = [
            jnp.where(ok, dx, jnp.zeros_like(dx)) for ok, dx in zip(finite, changes, strict=True)
        ]
        sizes, (_, moved) = exact(leaves), jax.jvp(exact, (known,), (changes,))
        return sizes, [
            jnp.where(jnp.isfinite(size), d, jnp.zeros_like(d))
            for size, d in zip(sizes, moved, strict=True)
        ]

    return function(leaves)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 5), inline=True)
def _sizes(
    norm: Norm,
    parts: Sequence[Axes],
    groups: Sequence[Axes] | None,
    split: Sequence[Names],
    leaves: list[ArrayLike],
    least: DTypeLike = jnp.float32,
    one: Array | None = None,
) -> list[Array]:
    """Sizes, in the precision of the leaves or the `least`, whichever is wider. `one` joins
    kernels, and changes no number.
    """
    moments_of = _partials_of_parts if groups is None else _partials_of_leaf
    partials = [
        moments_of(norm, part, leaf, least, one) for part, leaf in zip(parts, leaves, strict=True)
    ]
    if (
        groups is not None
    ):  # one vector for each moment, so that all that follows is a few tiny kernels
        vectors = [jnp.concatenate(values) for values in zip(*partials, strict=True)]
        partials = [_joined(norm, [_once(vector, split) for vector in vectors], groups)]
        split = [_union(split)]
    columns = list(map(list, zip(*_joined_across(norm, partials, split), strict=True)))
    root = jax.jit(norm.root, inline=True)  # of equal blocks it is traced once
    if len(columns) == 1:
        return list(map(root, *columns))
    packing = packing_of(columns[0])  # a root of several partials is many operations
    return packing.unpack(list(map(root, *map(packing.pack, columns))))[0]


# Compiled, so that equal leaves are traced once; and parts of leaves inlined, of which XLA on a TPU
# makes fewer kernels then.


@functools.partial(jax.jit, static_argnums=(0, 1, 3), inline=True)
def _partials_of_parts(
    norm: Norm, axes: Axes, leaf: ArrayLike, least: DTypeLike, one: Array | None
) -> tuple[Array, ...]:
    magnitudes = norm.magnitude(widen(leaf, least))
    return norm.partials(magnitudes if one is None else magnitudes * one, axes)


@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def _partials_of_leaf(
    norm: Norm, axes: Axes, leaf: ArrayLike, least: DTypeLike, one: Array | None
) -> tuple[Array, ...]:
    """The same as vectors."""
    return tuple(map(jnp.ravel, _partials_of_parts(norm, axes, leaf, least, one)))


def _by_stacks(
    sizes_of: Callable[..., list[Array]],
    parts: Sequence[Axes],
    groups: Sequence[Axes] | None,
    leaves: list[Array],
) -> list[Array]:
    """Sizes by a function of parts, groups, split axes and leaves, that is given stacks of equal
    leaves if they are not large.

    XLA takes as long to compile what is done to a stack as to one leaf, and on a CPU it costs
    nothing to copy what is small.
    """
    own = alike(leaves, parts)
    place = places(own)
    parts = tuple(tuple(axis + 1 for axis in parts[stack[0]]) for stack in own)
    groups = groups and tuple(tuple(sorted(place[list(group)].tolist())) for group in groups)
    sizes = sizes_of(parts, groups, ((),) * len(own), stacked(leaves, own))
    if groups is not None:
        return sizes
    # of which the compiler sees that they are a stack
    of_leaves = [row for stack in sizes for row in _slices(stack)]
    return [of_leaves[k] for k in place]


def _slices(stack: Array) -> list[Array]:
    shape = stack.shape[1:]
    flat = stack.ravel() if math.prod(shape) == 1 else stack
    return [row.reshape(shape) for row in jax.lax.split(flat, [1] * len(stack))]


def _in_float64(
    norm: Norm,
    parts: Sequence[Axes],
    groups: Sequence[Axes] | None,
    split: Sequence[Names],
    leaves: list[ArrayLike],
    *,
    joined: bool = False,
) -> list[Array]:
    """Sizes by a norm that is `fast`; with the kernels of equal leaves `joined`, on a GPU, by a
    number in common.
    """
    with _jax.float64():
        one = common(jnp.ones(2))[0] if joined else None
        return [
            size.astype(jnp.float32)
            for size in _sizes(norm, parts, groups, split, leaves, jnp.float64, one)
        ]


def _in_float32(
    norm: Norm,
    parts: Sequence[Axes],
    groups: Sequence[Axes] | None,
    split: Sequence[Names],
    leaves: list[ArrayLike],
) -> list[Array]:
    """The same where float32 is exact, which is seen afterwards; else in float64."""
    sizes = _sizes(norm, parts, groups, split, leaves)
    # Squares of what is a 2^-30th of such a size are floats, and what is less adds nothing.
    exact = [
        (size == jax.lax.clamp(size.dtype.type(2.0**-30), size, jnp.finfo(size.dtype).max)).all()
        for size in stacked(sizes, alike(sizes))
    ]
    in_float64 = functools.partial(_in_float64, norm, parts, groups, split)
    return jax.lax.cond(jnp.array(exact).all(), lambda _: sizes, in_float64, leaves)


def _split(
    leaves: Sequence[ArrayLike], parts: Sequence[Axes], axis_names: Sequence[Names | None] | None
) -> list[Names]:
    """For each leaf the mapped axes along which what is measured together is split."""
    split = []
    for leaf, part, given in zip(leaves, parts, axis_names or [None] * len(leaves), strict=True):
        own = _sharding.split_axes("sharded_over", given, leaf) if part else ()
        if given is None and len(part) < jnp.ndim(leaf):
            _validate.whole("sharded_over", jnp.shape(leaf), own)
        split.append(own)
    return split


def _union(split: Sequence[Names]) -> Names:
    return tuple(dict.fromkeys(axis for axes in split for axis in axes))


def _once(vector: Array, split: Sequence[Names]) -> Array:
    """Partials of leaves `[leaves]`, where those that several devices have are counted on one of
    them only.
    """
    if len(set(split)) <= 1:
        return vector
    axes = _union(split)
    return jnp.stack([_sharding.once(vector[k], own, axes) for k, own in enumerate(split)])


def _joined_across(
    norm: Norm, partials: list[tuple[Array, ...]], split: Sequence[Names]
) -> list[tuple[Array, ...]]:
    """Partials of the whole from those of what is here, for each block; one message for all blocks
    that are split alike.
    """
    joined = list(partials)
    kinds = [
        (axes, _sharding.varying(block[0])) for axes, block in zip(split, partials, strict=True)
    ]
    for kind in dict.fromkeys(kind for kind in kinds if kind[0]):
        axes, own = kind[0], [k for k, other in enumerate(kinds) if other == kind]
        total, largest = (
            functools.partial(join, axes=axes) for join in (_sharding.total, _sharding.largest)
        )
        columns = tuple(map(list, zip(*[partials[k] for k in own], strict=True)))
        for k, *values in zip(own, *norm.join(columns, total, largest), strict=True):
            joined[k] = tuple(values)
    return joined


def _joined(norm: Norm, partials: Sequence[Array], groups: Sequence[Axes]) -> tuple[Array, ...]:
    """Partials of groups `[groups]` from those of their leaves `[leaves]`."""
    if groups == tuple((k,) for k in range(len(partials[0]))):
        return tuple(partials)

    absent = len(partials[0])  # position of a zero, which adds nothing
    members = np.full((len(groups), max(map(len, groups))), absent)
    for i, group in enumerate(groups):
        members[i, : len(group)] = group

    def over_members(function: Callable[..., Array]) -> Join:
        return lambda tree: jax.tree.map(lambda x: function(x, 1, keepdims=True), tree)

    members = tuple(jnp.take(jnp.pad(values, (0, 1)), members, mode="clip") for values in partials)
    return tuple(x[:, 0] for x in norm.join(members, over_members(jnp.sum), over_members(jnp.max)))


def _widest(leaves: Sequence[ArrayLike]) -> DTypeLike:
    """The real type that all of them can be measured in."""
    return jnp.finfo(jnp.result_type(*map(wide, leaves))).dtype


def _alike(leaves: Sequence[ArrayLike]) -> Sequence[ArrayLike]:
    """Leaves that are measured together, all in float64 if some are: what they are scaled by
    depends on the precision.
    """
    widest = _widest(leaves)
    if widest == jnp.float32:
        return leaves
    return [widen(leaf, widest) for leaf in leaves]


def wide(x: ArrayLike, least: DTypeLike = jnp.float32) -> DTypeLike:
    """The dtype that `x` is measured in: the `least` precision or wider, complex if `x` is."""
    dtype = jnp.result_type(x)
    # JAX promotes no floats of 8 bits and less
    narrow = not jnp.issubdtype(dtype, jnp.complexfloating) and dtype.itemsize < 4
    return jnp.dtype(least) if narrow else jnp.promote_types(dtype, least)


def widen(x: ArrayLike, least: DTypeLike = jnp.float32) -> Array:
    """`x` in the `least` precision or wider, complex if it is."""
    return jnp.asarray(x).astype(wide(x, least))


def cast_like(x: Array, like: ArrayLike) -> Array:
    """`x` with the dtype of `like`."""
    return x.astype(jnp.asarray(like).dtype)


# Norms are made once, so that equal ones are known by their equality, and a program that uses one
# is traced once.


@functools.cache
def _l1() -> Norm:
    return Norm(lambda m, axes: (_sum(m, axes),), _add, lambda total: total)


@functools.cache
def _linf() -> Norm:
    return Norm(
        lambda m, axes: (_max(m, axes),),
        lambda partials, total, largest: largest(partials),
        lambda top: top,
    )


@functools.cache
def _rms() -> Norm:
    def relative(squares: Norm) -> Norm:
        def partials(magnitudes: Array, axes: Axes) -> tuple[Array, ...]:
            sums = squares.partials(magnitudes, axes)
            return *sums, jnp.full_like(sums[0], math.prod(magnitudes.shape[axis] for axis in axes))

        def root(*sums_and_count: Array) -> Array:
            *sums, count = sums_and_count
            return squares.root(*(total / jnp.maximum(count, 1) for total in sums))

        return squares._replace(
            partials=partials, root=root, fast=squares.fast and relative(squares.fast)
        )

    return relative(l2())


@functools.cache
def _l2() -> Norm:
    # Squares of floats span twice the exponents that floats have, so one sum cannot hold them all. Two can, where H
    # is half of the largest exponent (64 in float32):
    #   near = sum (x 2^(H-28))^2   finite for norms below 2^28 / up to there nothing above 2^(28-2H) is lost,
    #   far  = sum (x 2^-(H+1))^2   finite for every norm that is a float; loses only elements below 4.
    # `far` counts only once `near` overflows. The norm is then above 2^27, and even 2^30 elements of 4 are less than
    # 2^-20 of its square: the two ranges overlap by enough, and both sums are made in one pass over the array.
    # The caps square to infinity like what is above them. They keep derivatives finite, and they keep the compiler
    # from pulling the scales out of the squares, where x^2 is infinite and the scale squared is 0.
    def scales(dtype: DTypeLike) -> tuple[float, float]:
        half = jnp.finfo(dtype).maxexp // 2
        return 2.0 ** (half - 28), 2.0 ** -(half + 1)

    def partials(magnitudes: Array, axes: Axes) -> tuple[Array, ...]:
        cap = 2.0 ** (jnp.finfo(magnitudes.dtype).maxexp // 2)
        return tuple(
            _sum(jnp.minimum(magnitudes * scale, cap) ** 2, axes)
            for scale in scales(magnitudes.dtype)
        )

    def root(near: Array, far: Array) -> Array:
        enough = jnp.isfinite(near)
        unit = jnp.where(enough, *(1 / scale for scale in scales(near.dtype))).astype(near.dtype)
        return _root(jnp.where(enough, near, far), 2) * unit

    def signed(x: Array) -> Array:
        return jnp.abs(x) if jnp.iscomplexobj(x) else x  # a square needs no more

    squares = Norm(
        lambda m, axes: (_sum(m**2, axes),), _add, lambda total: _root(total, 2), magnitude=signed
    )
    return Norm(partials, _add, root, fast=squares)


@jax.custom_jvp
def _absolute(x: Array) -> Array:
    """The magnitude, without a derivative where it is not finite."""
    return jnp.abs(x)


@_absolute.defjvp
def _absolute_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (change,) = primals, tangents
    finite = jnp.isfinite(x)
    known, change = (jnp.where(finite, value, jnp.zeros_like(value)) for value in (x, change))
    return jnp.abs(x), jax.jvp(jnp.abs, (known,), (change,))[1]


def _itself(x: Array) -> Array:
    return x


def _above(x: Array) -> Array:
    return jnp.maximum(_ordered(x), 0)


def _below(x: Array) -> Array:
    return jnp.maximum(-_ordered(x), 0)


def _ordered(x: Array) -> Array:
    _validate.real(x.dtype)
    return x


def _sum(values: Array, axes: Axes) -> Array:
    return jnp.sum(values, axes, keepdims=True)


def _max(values: Array, axes: Axes) -> Array:
    return jnp.max(values, axes, keepdims=True, initial=0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _root(total: Array, p: float) -> Array:
    """The p-th root, with derivative 0 at 0 instead of infinity."""
    return jnp.sqrt(total) if p == 2 else total ** (1 / p)


@_root.defjvp
def _root_jvp(p: float, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (total,), (change,) = primals, tangents
    root, positive = _root(total, p), total > 0
    return root, jnp.where(positive, change * (root / jnp.where(positive, total, 1) / p), 0)


def _add(partials: Partials, total: Join, largest: Join) -> Partials:
    del largest
    return total(partials)
