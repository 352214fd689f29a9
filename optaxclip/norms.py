r"""How large an array is: `l2 l1 linf lp rms relative_linf zeros`.

Every norm is exact where its squares or powers leave the float range: the l2 norm of
float32 `[3e20, 4e20]` is `5e20`, not `inf`, and that of `[3e-25, 4e-25]` is `5e-25`, not 0.
Leaves of 16 bits and less are measured in float32.

Laws, for each norm here except `zeros`: the size of zeros and of an empty array is 0, complex
numbers count by magnitude, `size(c x) = |c| size(x)`, the size of a whole is the size of the sizes
of its parts, and derivatives are finite, at zero too.

A norm is three pure functions (`Norm`): `partials` reduces the magnitudes of one leaf to a few
numbers, `join` combines these over leaves and devices, `root` makes a size of them.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from optaxclip import _validate
from optaxclip._lowering import most
from optaxclip._naming import named, shown
from optaxclip._numerics import magnitude, share
from optaxclip._types import Axes, Join, Norm, Partials

__all__ = [
    "l2",
    "rms",
    "l1",
    "linf",
    "lp",
    "relative_linf",
    "zeros",
]


def __dir__() -> list[str]:
    return __all__


# Each norm is made once: equal norms are the same object, so a program that uses one is traced
# once.


@named("norms", once=True)
def l2() -> Norm:
    r"""Euclidean norm, :math:`\sqrt{\sum |x|^2}`.

    Reads the array once and is right for every size up to the largest float, as long as the
    elements that matter are above `1e-29` in float32.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> clip = optaxclip.clip(jnp.inf, optaxclip.scopes.tree(), norm=optaxclip.norms.l2())
        >>> clip.update(jnp.array([3e20, 4e20]), None)[1].reading.size_before
        Array([5.e+20], dtype=float32)
    """

    # Squares of floats span twice the exponents that floats have, so one sum cannot hold them all.
    # Two can, where H is half of the largest exponent (64 in float32):
    #   near = sum (x 2^(H-28))^2  finite for norms below 2^28; until then it loses nothing
    #                              above 2^(28-2H),
    #   far  = sum (x 2^-(H+1))^2  finite for every norm that is a float; loses elements below 4.
    # `far` counts only once `near` overflows. The norm is then above 2^27, and even 2^30 elements
    # of 4 are less than 2^-20 of its square: the two ranges overlap by enough, and one pass over
    # the array makes both sums. The caps square to infinity like everything above them. They keep
    # derivatives finite, and they keep XLA from pulling the scales out of the squares, where x^2
    # is infinite and the scale squared is 0.
    def scales(dtype: DTypeLike) -> tuple[float, float]:
        half = jnp.finfo(dtype).maxexp // 2
        return 2.0 ** (half - 28), 2.0 ** -(half + 1)

    def partials(x: Array, axes: Axes) -> tuple[Array, ...]:
        cap = 2.0 ** (jnp.finfo(x.dtype).maxexp // 2)
        return tuple(_sum(_capped(x * scale, cap) ** 2, axes) for scale in scales(x.dtype))

    def root(near: Array, far: Array) -> Array:
        enough = jnp.isfinite(near)
        unit = jnp.where(enough, *(1 / scale for scale in scales(near.dtype))).astype(near.dtype)
        return _root(jnp.where(enough, near, far), 2) * unit

    return Norm(partials, _add, root, fast=_plain_l2())


@functools.cache
def _plain_l2() -> Norm:
    """The textbook's formula; exact in float64 for all numbers in float32."""

    def signed(x: Array) -> Array:
        return jnp.abs(x) if jnp.iscomplexobj(x) else x  # a square needs no more

    return Norm(
        partials=lambda x, axes: (_sum(x**2, axes),),
        join=_add,
        root=lambda total: _root(total, 2),
        magnitude=signed,
    )


@named("norms", once=True)
def rms() -> Norm:
    r"""Root mean square, :math:`\sqrt{\sum |x|^2 / n}`; 0 for an empty array.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> clip = optaxclip.clip(jnp.inf, optaxclip.scopes.tree(), norm=optaxclip.norms.rms())
        >>> clip.update(jnp.array([1.0, 7.0]), None)[1].reading.size_before
        Array([5.], dtype=float32)
    """
    return _per_element(l2())._replace(fast=_per_element(_plain_l2()))


def _per_element(squares: Norm) -> Norm:
    """The root of a mean in place of a sum: the count is one more partial."""

    def partials(x: Array, axes: Axes) -> tuple[Array, ...]:
        sums = squares.partials(x, axes)
        return *sums, jnp.full_like(sums[0], math.prod(x.shape[axis] for axis in axes))

    def root(*sums_and_count: Array) -> Array:
        *sums, count = sums_and_count
        return squares.root(*(total / jnp.maximum(count, 1) for total in sums))

    return squares._replace(partials=partials, root=root)


@named("norms", once=True)
def l1() -> Norm:
    r"""Sum of magnitudes, :math:`\sum |x|`."""
    return Norm(lambda x, axes: (_sum(x, axes),), _add, lambda total: total)


@named("norms", once=True)
def linf() -> Norm:
    r"""Largest magnitude, :math:`\max |x|`."""
    return Norm(
        partials=lambda x, axes: (_max(x, axes),),
        join=lambda tops, total, largest: largest(tops),
        root=lambda top: top,
    )


def lp(p: float) -> Norm:
    r"""The p-norm, :math:`(\sum |x|^p)^{1/p}`, for any :math:`p \ge 1`, `inf` included.

    Powers other than 1, 2 and `inf` read the array twice: once for its largest magnitude, once
    for the sum of powers relative to it.

    Args:
        p: the power, at least 1.

    Raises:
        TypeError: `p` is not a number.
        ValueError: `p` is below 1.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> clip = optaxclip.clip(jnp.inf, optaxclip.scopes.tree(), norm=optaxclip.norms.lp(3))
        >>> clip.update(jnp.array([3.0, 4.0, 5.0]), None)[1].reading.size_before
        Array([6.], dtype=float32)
    """
    _validate.number("p", p, low=1.0)
    if p in (1, 2, math.inf):
        return {1: l1, 2: l2, math.inf: linf}[p]()
    power = int(p) if float(p).is_integer() else p

    def relative(total: Any, top: Any, whole: Any) -> Any:
        return total * share(top, whole) ** power

    def partials(x: Array, axes: Axes) -> tuple[Array, Array]:
        top = jax.lax.stop_gradient(_max(x, axes))  # only a scale: the size does not depend on it
        return top, _sum(share(x, top) ** power, axes)

    def join(tops_and_totals: Partials, total: Join, largest: Join) -> Partials:
        tops, totals = tops_and_totals
        top = largest(tops)
        return top, total(jax.tree.map(relative, totals, tops, top))

    return Norm(
        partials, join, lambda top, total: top * _root(total, power), name=f"norms.lp({shown(p)})"
    )


@named("norms")
def relative_linf(relative: ArrayLike, absolute: ArrayLike) -> Norm:
    r"""Largest element relative to its parameter, :math:`\max |x| / (r |w| + a)`.

    Args:
        relative: :math:`r`, how large an element may be relative to its parameter :math:`w`.
        absolute: :math:`a`, how much larger it may be. Where :math:`r |w| + a` is 0, the size of an
            element other than 0 is the largest float.

    Raises:
        TypeError: one of the two is not a number.
        ValueError: one of the two is negative.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> norm = optaxclip.norms.relative_linf(0.1, 1e-7)
        >>> clip = optaxclip.clip(1.0, optaxclip.scopes.tree(), norm=norm)
        >>> x, w = jnp.array([0.2, 0.1]), jnp.array([1.0, 0.25])
        >>> clip.update(x, None, w)[1].reading.size_before
        Array([3.999984], dtype=float32)
    """
    _validate.number("relative", relative)
    _validate.number("absolute", absolute)

    finite = isinstance(relative, int | float) and math.isfinite(relative)

    def relative_magnitude(x: Array, w: Array) -> Array:
        part_of_param = relative * abs(w)
        if not finite:
            part_of_param = jnp.where(w == 0, 0, part_of_param)  # inf * 0 is NaN
        allowed = part_of_param + absolute
        part = magnitude(x) / jnp.where(allowed > 0, allowed, jnp.finfo(allowed.dtype).tiny)
        largest = jnp.finfo(part.dtype).max
        return jnp.where(jnp.isfinite(x), jnp.minimum(part, largest), magnitude(x))

    return linf()._replace(magnitude=relative_magnitude, uses_params=True)


@named("norms", once=True)
def zeros() -> Norm:
    r"""Share of numbers that are exactly zero, :math:`\frac{1}{n} \sum 1[x = 0]`.

    It is meant for `telemetry.monitor`: dead units and tokens without gradients show as zeros. No
    response makes it smaller, so do not clip by it. It is 0 for an empty array, and NaN where a
    number is NaN.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> monitor = optaxclip.telemetry.monitor(norm=optaxclip.norms.zeros())
        >>> grads = {"w": jnp.array([0.0, 0.0, 3.0]), "b": jnp.array([-1.0])}
        >>> _, state = monitor.update(grads, monitor.init(grads))
        >>> print(optaxclip.telemetry.metrics(state)["monitor/size_before"])
        0.5
    """

    def is_zero(x: Array) -> Array:
        return jnp.where(jnp.isnan(x), jnp.nan, x == 0).astype(jnp.abs(x).dtype)

    return _per_element(l1())._replace(magnitude=is_zero)


def _sum(values: Array, axes: Axes) -> Array:
    return jnp.sum(values, axes, keepdims=True)


def _max(values: Array, axes: Axes) -> Array:
    return most(values, axes)


def _capped(x: Array, cap: float) -> Array:
    """`min(x, cap)`, in which XLA on CPU would lose NaN."""
    return jnp.where(x > cap, cap, x)


def _add(sums: Partials, total: Join, largest: Join) -> Partials:
    del largest
    return total(sums)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _root(total: Array, p: float) -> Array:
    """The p-th root, whose derivative at 0 is 0, not infinity."""
    return jnp.sqrt(total) if p == 2 else total ** (1 / p)


@_root.defjvp
def _(p: float, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (total,), (change,) = primals, tangents
    root, positive = _root(total, p), total > 0
    return root, jnp.where(positive, change * (root / jnp.where(positive, total, 1) / p), 0)
