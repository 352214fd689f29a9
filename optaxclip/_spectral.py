"""Clipping in the basis of a matrix: its singular values are the numbers that are clipped."""

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
    """The axes of one matrix in a leaf: the last two, and all of a vector."""
    del path
    return tuple(range(max(leaf.ndim - 2, 0), leaf.ndim))


def on_spectra(
    clip: optax.GradientTransformationExtraArgs, *, uses_params: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Gives the clip the singular values `[..., k]` of each leaf in place of it, and makes matrices
    of what it returns.

    Parameters are decomposed only if the clip uses them; otherwise it gets zeros of the right
    shapes.
    """

    def no_values(tree: Any) -> Any:
        layout = lay_out(scopes.leaf(), tree)
        matrices = map(_matrices, layout.gradients)
        return layout.rebuild(
            [jnp.zeros((*x.shape[:-2], min(x.shape[-2:])), x.real.dtype) for x in matrices]
        )

    def values(tree: Any) -> Any:
        layout = lay_out(scopes.leaf(), tree)
        return layout.rebuild(
            [s for _, s, _ in _decomposed(list(map(_matrices, layout.gradients)))]
        )

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del extra_args
        layout = lay_out(scopes.leaf(), updates, params)
        matrices = list(map(_matrices, layout.gradients))
        parts = _decomposed(matrices)
        weights = None if params is None else values(params) if uses_params else no_values(params)
        clipped, state = clip.update(layout.rebuild([part[1] for part in parts]), state, weights)
        new = [
            part[1] if s is None else s for part, s in zip(parts, layout.of(clipped), strict=True)
        ]
        out = [_recompose(x, *part, s) for x, part, s in zip(matrices, parts, new, strict=True)]
        back = [
            cast_like(x.reshape(jnp.shape(like)), like)
            for x, like in zip(out, layout.gradients, strict=True)
        ]
        return layout.rebuild(back), state

    return optax.GradientTransformationExtraArgs(
        lambda params: clip.init(no_values(params)), update
    )


def on_whole_matrices(
    clip: optax.GradientTransformationExtraArgs, sharded_over: Any
) -> optax.GradientTransformationExtraArgs:
    """The clip, for leaves of which every device has all, since a part of a matrix has other
    singular values.

    On an explicit mesh they are gathered for it; within `shard_map` a leaf that is split is an
    error.
    """

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        layout = lay_out(scopes.leaf(), updates, params)
        for path, leaf, names in zip(
            layout.paths, layout.gradients, layout.names_of_axes(sharded_over), strict=True
        ):
            _validate.not_split(
                path,
                _sharding.split_axes(
                    "sharded_over", _sharding.all_bound("sharded_over", names), leaf
                ),
            )
        whole, weights = (
            jax.tree.map(lambda x: _sharding.unsharded(x, 2), tree) for tree in (updates, params)
        )
        clipped, state = clip.update(whole, state, weights, **extra_args)
        return jax.tree.map(_sharding.sharded_like, clipped, updates), state

    return optax.GradientTransformationExtraArgs(clip.init, update)


def newton_schulz(response: Response, iterations: int) -> Response:
    r"""The response `smooth` on the singular values of matrices, by products of matrices alone.

    .. math:: (I + X X^\top / c^2)^{-1/2} X

    Newton's coupled iteration for the inverse root, after Schulz: :math:`Y \leftarrow Y T`,
    :math:`Z \leftarrow T Z` with :math:`T = (3 I - Z Y) / 2` takes :math:`Z` to :math:`A^{-1/2}`
    from :math:`Y = A`, :math:`Z = I`, if no eigenvalue of :math:`A` is above 1. Below, each step
    takes a small one 2.25 times nearer to 1.

    Raises:
        TypeError: `iterations` is not an integer.
        ValueError: it is below 1, or the response is another than `smooth`.
    """
    _validate.count("iterations", iterations)
    _validate.option(
        "response, with iterations,", getattr(response, "__name__", response), [smooth.__name__]
    )

    def clipped(gradient: Array, size: Array, limit: Array) -> Array:
        del size
        x, c = _matrices(gradient), _matrices(limit)
        wide = x.shape[-2] <= x.shape[-1]
        x = x if wide else _transposed(x)
        c = jnp.where(c < jnp.inf, c, 1)
        top = jnp.maximum(jnp.max(abs(x), (-2, -1), keepdims=True, initial=0), c)
        x, wanted = share(x, top), share(c, top)
        one = jnp.eye(x.shape[-2], dtype=x.dtype)
        a = wanted**2 * one + _product(x, _transposed(x))
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
    """Frobenius norms of matrices whose elements are of a moderate size."""
    return jnp.sqrt(jnp.sum(abs(a) ** 2, (-2, -1), keepdims=True))


def _matrices(x: Any) -> Array:
    """`[..., rows, columns]`, in float32 or wider; a vector is one row."""
    x = widen(x)
    return x if x.ndim >= 2 else x.reshape(1, -1)


def _transposed(x: Array) -> Array:
    return jnp.conj(jnp.swapaxes(x, -1, -2))


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")  # on TPU the default is bfloat16


def _decomposed(matrices: list[Array]) -> list[tuple[Array, Array, Array]]:
    """`_decompose` of each, one after the other."""
    parts = []
    for x in matrices:
        if parts:
            # On CPU two decompositions of batches at a time can wait for each other for ever. So
            # each waits for the one before, by a zero that is made of it.
            x = x + (jnp.max(parts[-1][1], initial=0) > jnp.inf).astype(x.dtype)
        parts.append(_decompose(x))
    return parts


def _decompose(x: Array) -> tuple[Array, Array, Array]:
    """U, S and V^H, where S alone has a derivative, and is NaN if an element of the matrix is not
    finite.
    """
    top = jnp.max(abs(x), (-2, -1), keepdims=True, initial=0)
    ok = jnp.isfinite(top)
    unit = jnp.where(ok & (top > 0), top, 1)
    u, s, vh = jnp.linalg.svd(
        jax.lax.stop_gradient(share(jnp.where(ok, x, 0), top)), full_matrices=False
    )
    return u, _values(x, u, jnp.where(ok[..., 0], s * unit[..., 0], jnp.nan), vh), vh


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
    """The matrix with new singular values; the same bits where all are the same; NaN or zeros where
    the clip says so.
    """
    finite, same = (what.all(-1)[..., None, None] for what in (jnp.isfinite(s), s == new))
    changed = jnp.where(
        finite, _product(u * new[..., None, :], vh), jnp.max(new, -1, initial=0)[..., None, None]
    )
    return jnp.where(same, x, changed)


@_recompose.defjvp
def _recompose_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    # A function of the singular values has divided differences for a derivative: of it between two
    # of them for the symmetric part of what moves, of its odd continuation for the other part, and
    # its slope on the diagonal. Where two of them are equal the quotient new / s takes the place of
    # the slope, which is not known here.
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
