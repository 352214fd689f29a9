"""Clipping the singular values of matrices."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from optaxclip import _sharding, _validate, scopes
from optaxclip._layout import lay_out
from optaxclip._numerics import cast_like, share, widen
from optaxclip._types import Axes, Response
from optaxclip.responses import smooth


def matrix_axes(path: str, leaf: Any) -> Axes:
    """Returns the axes of one matrix in a leaf: the last two, or the one of a vector."""
    del path
    return tuple(range(max(leaf.ndim - 2, 0), leaf.ndim))


def on_spectra(
    clip: optax.GradientTransformationExtraArgs, *, uses_params: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Applies the clip to the singular values `[..., k]` of each leaf.

    It decomposes parameters only if the clip uses them; otherwise the clip gets zeros of the same
    shapes.
    """

    def no_values(tree: Any) -> Any:
        layout = lay_out(scopes.leaf(), tree)
        matrices = map(_matrices, layout.gradients)
        shapes = [((*x.shape[:-2], min(x.shape[-2:])), x.real.dtype) for x in matrices]
        return layout.rebuild([jnp.zeros(*shape) for shape in shapes])

    def values(tree: Any) -> Any:
        layout = lay_out(scopes.leaf(), tree)
        parts = _decomposed(list(map(_matrices, layout.gradients)))
        return layout.rebuild([s for _, s, _ in parts])

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del extra_args
        layout = lay_out(scopes.leaf(), updates, params)
        matrices = list(map(_matrices, layout.gradients))
        parts = _decomposed(matrices)
        weights = None if params is None else values(params) if uses_params else no_values(params)
        spectra = [s for _, s, _ in parts]
        clipped, state = clip.update(layout.rebuild(spectra), state, weights)
        out = []
        leaves = zip(matrices, parts, layout.of(clipped), layout.gradients, strict=True)
        for x, (u, s, vh), new, like in leaves:
            matrix = _recompose(x, u, s, vh, s if new is None else new)
            out.append(cast_like(matrix.reshape(jnp.shape(like)), like))
        return layout.rebuild(out), state

    return optax.GradientTransformationExtraArgs(
        lambda params: clip.init(no_values(params)), update
    )


def on_whole_matrices(
    clip: optax.GradientTransformationExtraArgs, sharded_over: Any
) -> optax.GradientTransformationExtraArgs:
    """Makes sure that the clip sees whole matrices: a shard has other singular values.

    On an explicit mesh the matrices are gathered first. Inside `shard_map` a sharded leaf is an
    error.
    """

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        layout = lay_out(scopes.leaf(), updates, params)
        names = layout.names_of_axes(sharded_over)
        for path, leaf, of_leaf in zip(layout.paths, layout.gradients, names, strict=True):
            bound = _sharding.all_bound("sharded_over", of_leaf)
            _validate.not_split(path, _sharding.split_axes("sharded_over", bound, leaf))

        def gathered(tree: Any) -> Any:
            return jax.tree.map(lambda x: _sharding.unsharded(x, 2), tree)

        clipped, state = clip.update(gathered(updates), state, gathered(params), **extra_args)
        return jax.tree.map(_sharding.sharded_like, clipped, updates), state

    return optax.GradientTransformationExtraArgs(clip.init, update)


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
        x, c = _matrices(gradient), _matrices(limit)
        wide = x.shape[-2] <= x.shape[-1]
        x = x if wide else _transposed(x)  # the smaller of X X^T and X^T X
        c = jnp.where(c < jnp.inf, c, 1)
        # scale by the largest element, so that no product over- or underflows
        top = jnp.maximum(jnp.max(abs(x), (-2, -1), keepdims=True, initial=0), c)
        x, scaled_limit = share(x, top), share(c, top)
        one = jnp.eye(x.shape[-2], dtype=x.dtype)
        a = scaled_limit**2 * one + _product(x, _transposed(x))
        # two upper bounds of the eigenvalues of A; dividing by one brings them to at most 1
        largest_row = jnp.max(jnp.sum(abs(a), -1, keepdims=True), -2, keepdims=True, initial=0)
        bound = jax.lax.stop_gradient(jnp.minimum(largest_row, _frobenius(a)))
        bound = jnp.where(bound > 0, bound, 1)
        y, z = a / bound, jnp.broadcast_to(one, a.shape)
        for _ in range(iterations):
            t = (3 * one - _product(z, y)) / 2
            y, z = _product(y, t), _product(t, z)
        out = _product(z, x) * (c / jnp.sqrt(bound))
        out = (out if wide else _transposed(out)).reshape(gradient.shape)
        return jnp.where(limit < jnp.inf, out, gradient)

    return clipped


def _frobenius(a: Array) -> Array:
    """Returns Frobenius norms; the elements must be of moderate size, since it squares them."""
    return jnp.sqrt(jnp.sum(abs(a) ** 2, (-2, -1), keepdims=True))


def _matrices(x: Any) -> Array:
    """Returns `[..., rows, columns]` in float32 or wider; a vector is one row."""
    x = widen(x)
    return x if x.ndim >= 2 else x.reshape(1, -1)


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
            x = x + (jnp.max(parts[-1][1], initial=0) > jnp.inf).astype(x.dtype)
        parts.append(_decompose(x))
    return parts


def _decompose(x: Array) -> tuple[Array, Array, Array]:
    """Returns U, S and V^H of each matrix.

    Only S has a derivative. S is NaN if an element of the matrix is not finite.
    """
    top = jnp.max(abs(x), (-2, -1), keepdims=True, initial=0)
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
    fill = jnp.max(new, -1, initial=0)[..., None, None]  # NaN or 0
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
    apart = abs(rows - columns) > 1e-6 * jnp.max(s, -1, initial=0)[..., None, None]
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
