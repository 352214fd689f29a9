"""Clipping the singular values of matrices."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from optaxclip import _sharding, _validate, scopes
from optaxclip._layout import Layout, lay_out
from optaxclip._lowering import most
from optaxclip._numerics import cast_like, share, widen
from optaxclip._rules import is_placeholder
from optaxclip._types import Axes, Response
from optaxclip.responses import clamp, rescale, smooth

MatrixAxes = Callable[[str, Any], tuple[Axes, Axes]]


def last_two(path: str, leaf: Any) -> Axes:
    """Returns the axes of one matrix `[..., rows, columns]`."""
    del path
    return leaf.ndim - 2, leaf.ndim - 1


def last_one(path: str, leaf: Any) -> Axes:
    """Returns the axis of one spectrum `[..., k]`."""
    del path
    return (leaf.ndim - 1,)


def by_layer(path: str, leaf: Any) -> tuple[Axes, Axes]:
    """Returns the axes of the rows and of the columns, by the names of Flax's layers.

    A kernel of three axes or more is a matrix of fan-in by outputs, a bias or scale is one row. In
    all other leaves the last two axes are a matrix, and the ones before are a stack.
    """
    every, name = tuple(range(leaf.ndim)), path.split("/")[-1]
    if leaf.ndim < 2 or name in ("bias", "scale"):
        return (), every
    if name != "kernel":
        return every[-2:-1], every[-1:]
    rows = scopes.flax_axes(path, leaf)
    return rows, every[len(rows) :]


def on_values(response: Response | None) -> Response:
    """The response on the spectrum of a matrix, whose size is the largest singular value.

    None cuts singular values at the limit, `rescale` shrinks the matrix as a whole, and any other
    response sees each singular value.
    """
    if response is None or response is rescale:
        return response or clamp

    def on_each(values: Array, size: Array, limit: Array) -> Array:
        del size
        return response(values, jnp.abs(values), limit)

    return on_each


def on_spectra(
    clip: optax.GradientTransformationExtraArgs, *, uses_params: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Applies the clip to the singular values `[..., k]` of matrices `[..., rows, columns]`.

    It decomposes parameters only if the clip uses them; otherwise the clip gets zeros of the same
    shapes.
    """

    def no_values(tree: Any) -> Any:
        layout = lay_out(scopes.leaf(), tree)
        matrices = map(widen, layout.gradients)
        shapes = [((*x.shape[:-2], min(x.shape[-2:])), x.real.dtype) for x in matrices]
        return layout.rebuild([jnp.zeros(*shape) for shape in shapes])

    def values(tree: Any) -> Any:
        layout = lay_out(scopes.leaf(), tree)
        parts = _decomposed(list(map(widen, layout.gradients)))
        return layout.rebuild([s for _, s, _ in parts])

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        layout = lay_out(scopes.leaf(), updates, params)
        matrices = list(map(widen, layout.gradients))
        parts = _decomposed(matrices)
        weights = None if params is None else values(params) if uses_params else no_values(params)
        spectra = [s for _, s, _ in parts]
        clipped, state = clip.update(layout.rebuild(spectra), state, weights, **extra_args)
        out = []
        leaves = zip(matrices, parts, layout.of(clipped), layout.gradients, strict=True)
        for x, (u, s, vh), new, like in leaves:
            out.append(cast_like(_recompose(x, u, s, vh, s if new is None else new), like))
        return layout.rebuild(out), state

    return optax.GradientTransformationExtraArgs(
        lambda params: clip.init(no_values(params)), update
    )


class Matrices(NamedTuple):
    """Which axes of a leaf are rows, which are columns; all others are a stack of matrices."""

    rows: Axes
    columns: Axes
    shape: tuple[int, ...]

    @property
    def order(self) -> Axes:
        """The axes of the leaf: first those of the stack, then rows, then columns."""
        matrix = self.rows + self.columns
        return tuple(k for k in range(len(self.shape)) if k not in matrix) + matrix

    def taken(self, leaf: Array) -> Array:
        """Returns `[..., rows, columns]`."""
        lengths = [math.prod(self.shape[k] for k in axes) for axes in (self.rows, self.columns)]
        stack = len(self.shape) - len(self.rows) - len(self.columns)
        moved = jnp.transpose(leaf, self.order)
        return moved.reshape(*moved.shape[:stack], *lengths)

    def put_back(self, matrices: Array) -> Array:
        """Returns the leaf."""
        moved = matrices.reshape([self.shape[k] for k in self.order])
        return jnp.transpose(moved, [self.order.index(k) for k in range(len(self.shape))])


def on_whole_matrices(
    clip: optax.GradientTransformationExtraArgs,
    axes: MatrixAxes,
    batch: Callable[[str, Any], Axes],
    sharded_over: Any,
) -> optax.GradientTransformationExtraArgs:
    """Shows the clip whole matrices `[..., rows, columns]`: a shard has other singular values.

    On an explicit mesh the matrices are gathered first. Inside `shard_map` a sharded leaf is an
    error.
    """

    def matrices_of(path: str, leaf: Any) -> Matrices:
        rest = scopes.rest_of(batch(path, leaf), leaf)
        chosen = axes(path, scopes.with_axes(leaf, rest))
        _validate.matrix_axes(path, chosen, len(rest))
        rows, columns = (tuple(rest[k] for k in one) for one in chosen)
        return Matrices(rows, columns, jnp.shape(leaf))

    def views(layout: Layout) -> list[Matrices]:
        leaves = zip(layout.paths, layout.gradients, strict=True)
        return [matrices_of(path, jnp.asarray(leaf)) for path, leaf in leaves]

    def taken(layout: Layout) -> Any:
        pairs = zip(views(layout), layout.gradients, strict=True)
        return layout.rebuild([_gathered(view, jnp.asarray(leaf)) for view, leaf in pairs])

    def of_params(params: Any) -> Any:
        return params if is_placeholder(params) else taken(lay_out(scopes.leaf(), params))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        layout = lay_out(scopes.leaf(), updates, params)
        names = layout.names_of_axes(sharded_over)
        for path, leaf, of_leaf in zip(layout.paths, layout.gradients, names, strict=True):
            bound = _sharding.all_bound("sharded_over", of_leaf)
            _validate.not_split(path, _sharding.split_axes("sharded_over", bound, leaf))
        weights = None if params is None else of_params(params)
        clipped, state = clip.update(taken(layout), state, weights, **extra_args)
        parts = zip(views(layout), layout.of(clipped), layout.gradients, strict=True)
        out = [
            like if x is None else _sharding.sharded_like(view.put_back(x), like)
            for view, x, like in parts
        ]
        return layout.rebuild(out), state

    return optax.GradientTransformationExtraArgs(
        lambda params: clip.init(of_params(params)), update
    )


def _gathered(view: Matrices, leaf: Array) -> Array:
    """The matrices of a leaf, on an explicit mesh with rows and columns on every device."""
    stack = view.order == tuple(range(leaf.ndim)) and len(view.rows) == len(view.columns) == 1
    return view.taken(_sharding.unsharded(leaf, 2 if stack else leaf.ndim))


def newton_schulz(response: Response, iterations: int) -> Response:
    r"""Applies the response `smooth` to singular values, by matrix products alone.

    .. math:: (I + X X^\top / c^2)^{-1/2} X

    This is the coupled Newton-Schulz iteration for the inverse square root: :math:`Y \leftarrow Y
    T`, :math:`Z \leftarrow T Z` with :math:`T = (3 I - Z Y) / 2`. From :math:`Y = A`, :math:`Z =
    I`, :math:`Z` converges to :math:`A^{-1/2}` if no eigenvalue of :math:`A` is above 1. Each step
    multiplies small eigenvalues of :math:`Z Y` by 2.25.

    Raises:
        TypeError: `iterations` is not an integer.
        ValueError: `iterations` is below 1, or the response is not `smooth`.
    """
    _validate.count("iterations", iterations)
    _validate.option(
        "response, with iterations,", getattr(response, "__name__", response), [smooth.__name__]
    )

    def clipped(gradient: Array, size: Array, limit: Array) -> Array:
        del size
        x, c = widen(gradient), widen(limit)
        wide = x.shape[-2] <= x.shape[-1]
        x = x if wide else _transposed(x)  # the smaller of X X^T and X^T X
        c = jnp.where(c < jnp.inf, c, 1)
        # scale by the largest element, so that no product over- or underflows
        top = jnp.maximum(most(abs(x), (-2, -1)), c)
        x, scaled_limit = share(x, top), share(c, top)
        one = jnp.eye(x.shape[-2], dtype=x.dtype)
        a = scaled_limit**2 * one + _product(x, _transposed(x))
        # two upper bounds of the eigenvalues of A; dividing by one brings them to at most 1
        largest_row = most(jnp.sum(abs(a), -1, keepdims=True), (-2,))
        bound = jax.lax.stop_gradient(jnp.minimum(largest_row, _frobenius(a)))
        bound = jnp.where(bound > 0, bound, 1)
        y, z = a / bound, jnp.broadcast_to(one, a.shape)
        for _ in range(iterations):
            t = (3 * one - _product(z, y)) / 2
            y, z = _product(y, t), _product(t, z)
        out = _product(z, x) * (c / jnp.sqrt(bound))
        out = out if wide else _transposed(out)
        return jnp.where(limit < jnp.inf, out, gradient)

    return clipped


def _frobenius(a: Array) -> Array:
    """Returns Frobenius norms; the elements must be of moderate size, since it squares them."""
    return jnp.sqrt(jnp.sum(abs(a) ** 2, (-2, -1), keepdims=True))


def _transposed(x: Array) -> Array:
    return jnp.conj(jnp.swapaxes(x, -1, -2))


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")  # on TPU the default is bfloat16


def _decomposed(matrices: list[Array]) -> list[tuple[Array, Array, Array]]:
    """Decomposes the matrices one after the other."""
    parts = []
    for x in matrices:
        if parts:
            # On CPU, two batched decompositions at the same time can deadlock. Adding a zero that
            # is computed from the last result makes each decomposition wait for the one before.
            x = x + (most(parts[-1][1]) > jnp.inf).astype(x.dtype)
        parts.append(_decompose(x))
    return parts


def _decompose(x: Array) -> tuple[Array, Array, Array]:
    """Returns U, S and V^H of each matrix.

    Only S has a derivative. S is NaN if an element of the matrix is not finite.
    """
    top = most(abs(x), (-2, -1))
    ok = jnp.isfinite(top)
    unit = jnp.where(ok & (top > 0), top, 1)
    # the largest element becomes 1, so that nothing over- or underflows in the decomposition
    scaled = jax.lax.stop_gradient(share(jnp.where(ok, x, 0), top))
    u, s, vh = jnp.linalg.svd(scaled, full_matrices=False)
    s = jnp.where(ok[..., 0], s * unit[..., 0], jnp.nan)
    return u, _values(x, u, s, vh), vh


@jax.custom_jvp
def _values(x: Array, u: Array, s: Array, vh: Array) -> Array:
    del x, u, vh
    return s


@_values.defjvp
def _values_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    _, u, s, vh = primals
    moved = _product(_product(_transposed(u), tangents[0]), _transposed(vh))
    return s, jnp.diagonal(moved, axis1=-2, axis2=-1).real


@jax.custom_jvp
def _recompose(x: Array, u: Array, s: Array, vh: Array, new: Array) -> Array:
    """Builds the matrix with new singular values.

    A matrix whose singular values are all unchanged keeps its bits. One that was not finite becomes
    NaN or zero, as the clip made its singular values.
    """
    finite, same = (holds.all(-1)[..., None, None] for holds in (jnp.isfinite(s), s == new))
    fill = most(new, (-1,))[..., None]  # NaN or 0
    changed = jnp.where(finite, _product(u * new[..., None, :], vh), fill)
    return jnp.where(same, x, changed)


@_recompose.defjvp
def _recompose_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    # The derivative of a function f of singular values consists of divided differences. With
    # M = U^H dX V, the symmetric part of M is multiplied by (f(a) - f(b)) / (a - b) and the
    # antisymmetric part by (f(a) + f(b)) / (a + b), for each pair a, b of singular values. The
    # diagonal moves by `dnew`. Where a = b the first quotient would be the slope of f, which is not
    # known here, so f(b) / b takes its place.
    x, u, s, vh, new = primals
    dx, *_, dnew = tangents
    ratio = jnp.where(s > 0, new / jnp.where(s > 0, s, 1), 1)
    rows, columns = s[..., :, None], s[..., None, :]
    apart = abs(rows - columns) > 1e-6 * most(s, (-1,))[..., None]
    slope = (new[..., :, None] - new[..., None, :]) / jnp.where(apart, rows - columns, 1)
    between = jnp.where(apart, slope, ratio[..., None, :]) * (1 - jnp.eye(s.shape[-1]))
    odd = (new[..., :, None] + new[..., None, :]) / jnp.where(rows + columns > 0, rows + columns, 1)
    odd = jnp.where(rows + columns > 0, odd, 1)
    left, right = _transposed(u), _transposed(vh)
    moved = _product(_product(left, dx), right)
    symmetric, rest = (moved + _transposed(moved)) / 2, (moved - _transposed(moved)) / 2
    inner = between * symmetric + odd * rest + dnew[..., None, :] * jnp.eye(s.shape[-1])
    beside = _product(u * ratio[..., None, :], _product(left, dx) - _product(moved, vh))
    below = _product((_product(dx, right) - _product(u, moved)) * ratio[..., None, :], vh)
    tangent = (_product(_product(u, inner), vh) + beside + below).astype(x.dtype)
    finite = jnp.isfinite(s).all(-1)[..., None, None]
    return _recompose(x, u, s, vh, new), jnp.where(finite, tangent, jnp.zeros_like(tangent))
