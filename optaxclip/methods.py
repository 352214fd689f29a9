"""The published methods, one row each: a choice of scope, norm, threshold and response.

Every row takes the keywords of `clip` besides its own (`response`, `nonfinite`, `axis_name`,
`record`), and a threshold in any of its forms: a number, a traced array, a schedule, a rule, or a
dict by group. Each belongs before the optimizer in a chain, on gradients averaged over the batch.
"""

import inspect
from collections.abc import Callable
from typing import Any

import optax

from optaxclip import _validate, norms, responses, scopes
from optaxclip._clip import clip
from optaxclip._types import Norm, Scope
from optaxclip.thresholds import as_threshold, as_thresholds, negated, relative

Row = Callable[..., optax.GradientTransformationExtraArgs]


def _row(method: Row) -> Row:
    """Spells out the keywords of `clip` in the signature, for `help` and for `optax.inject_hyperparams`."""
    own = [p for p in inspect.signature(method).parameters.values() if p.kind is not p.VAR_KEYWORD]
    rest = [inspect.signature(clip).parameters[name] for name in ("nonfinite", "axis_name", "record")]
    method.__dict__["__signature__"] = inspect.Signature([*own, *rest], return_annotation=optax.GradientTransformationExtraArgs)
    return method


@_row
def clip_by_value(
    limit: Any = None, high: Any = None, *, low: Any = None, scope: Scope = scopes.element(), **options: Any
) -> optax.GradientTransformationExtraArgs:
    r"""Cuts each element: `clip_by_value(limit)` at :math:`\pm c`, `clip_by_value(low, high)` at both bounds.

    The first is `optax.clip`, Keras `clipvalue` and PyTorch `clip_grad_value_`; complex numbers are cut
    by magnitude. The direction of the gradient changes. Law: value clip = element scope + `clamp`.

    Args:
        limit: the limit; or the lower bound, if two are given.
        high: the upper bound, not negative; a number or a schedule.
        low: the lower bound by keyword, not positive; a number or a schedule.
        scope: which elements share one limit, where a rule learns it from their largest.
        **options: as for `clip`.

    Raises:
        TypeError: a bound is not a number, missing, or given twice; or two bounds are given for complex updates.
        ValueError: the limit is negative, or 0 is not between the bounds.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> grads = jnp.array([-3.0, 0.5, 2.0])
        >>> for clip in optaxclip.clip_by_value(1.0), optaxclip.clip_by_value(-2.0, 1.0):
        ...     print(clip.update(grads, clip.init(grads))[0])
        [-1.   0.5  1. ]
        [-2.   0.5  1. ]

    References:
        Mikolov, Statistical language models based on neural networks, PhD thesis, Brno, 2012.
    """
    options = {"response": responses.clamp, "scope": scope, **options}
    if low is None and high is None:
        return clip(as_thresholds(limit, name="limit"), norm=norms.linf(), **options)
    _validate.not_both("limit", limit, "low", low, "pass clip_by_value(low, high), or one limit")
    above = clip(as_threshold(high, name="high"), norm=norms.upper(), **options)
    below = clip(negated(limit if low is None else low, name="low"), norm=norms.lower(), **options)
    return optax.chain(above, below)


@_row
def clip_by_norm(
    max_norm: Any, *, scope: Scope = scopes.leaf(), norm: Norm = norms.l2(), **options: Any
) -> optax.GradientTransformationExtraArgs:
    r"""Shrinks each leaf whose norm is too large, :math:`g_i \min(1, c / \|g_i\|)`.

    Keras `clipnorm` and `tf.clip_by_norm`. Each leaf keeps its direction; the whole gradient does not.

    Args:
        max_norm: the limit :math:`c`.
        scope: which numbers share a norm.
        norm: which norm.
        **options: as for `clip`.

    Raises:
        TypeError: `max_norm` is not a threshold.
        ValueError: `max_norm` is negative or NaN.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> clip = optaxclip.clip_by_norm(1.0)
        >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}
        >>> clip.update(grads, clip.init(grads))[0]
        {'b': Array([0.5], dtype=float32), 'w': Array([0.6, 0.8], dtype=float32)}
    """
    return clip(as_thresholds(max_norm, name="max_norm"), scope=scope, norm=norm, **options)


@_row
def clip_by_global_norm(
    max_norm: Any, *, scope: Scope = scopes.tree(), norm: Norm = norms.l2(), **options: Any
) -> optax.GradientTransformationExtraArgs:
    r"""Shrinks the whole gradient if its norm is too large, :math:`g \min(1, c / \|g\|)`.

    `optax.clip_by_global_norm`, Keras `global_clipnorm`, and PyTorch `clip_grad_norm_`, whose
    `norm_type` is `norm=norms.lp(p)` here. The gradient keeps its direction.

    Args:
        max_norm: the limit :math:`c`; half to ten times the mean norm is the paper's advice.
        scope: which numbers share a norm.
        norm: which norm.
        **options: as for `clip`.

    Raises:
        TypeError: `max_norm` is not a threshold.
        ValueError: `max_norm` is negative or NaN.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> clip = optaxclip.clip_by_global_norm(3.0)
        >>> grads = {"w": jnp.array([2.0, 4.0]), "b": jnp.array([4.0])}
        >>> clip.update(grads, clip.init(grads))[0]["b"]
        Array([2.], dtype=float32)

    References:
        Pascanu, Mikolov and Bengio, [On the difficulty of training recurrent neural
        networks](https://arxiv.org/abs/1211.5063), 2013.
    """
    return clip(as_thresholds(max_norm, name="max_norm"), scope=scope, norm=norm, **options)


@_row
def clip_by_block_rms(max_rms: Any, *, scope: Scope = scopes.leaf(), **options: Any) -> optax.GradientTransformationExtraArgs:
    r"""Shrinks each leaf whose root mean square is too large, :math:`u_i \min(1, d / \mathrm{rms}(u_i))`.

    The update clipping of Adafactor, `optax.clip_by_block_rms`: meant for preconditioned updates, so
    after the part of the optimizer that divides by second moments.

    Args:
        max_rms: the limit :math:`d`, 1 in the paper.
        scope: which numbers share a root mean square.
        **options: as for `clip`.

    Raises:
        TypeError: `max_rms` is not a threshold.
        ValueError: `max_rms` is negative or NaN.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> clip = optaxclip.clip_by_block_rms(1.0)
        >>> updates = jnp.array([2.0, 2.0, 2.0, 2.0])
        >>> clip.update(updates, clip.init(updates))[0]
        Array([1., 1., 1., 1.], dtype=float32)

    References:
        Shazeer and Stern, [Adafactor](https://arxiv.org/abs/1804.04235), 2018.
    """
    return clip(as_thresholds(max_rms, name="max_rms"), scope=scope, norm=norms.rms(), **options)


@_row
def adaptive_grad_clip(
    ratio: Any = 0.01,
    *,
    floor: Any = 1e-3,
    axes: Any = None,
    scope: Scope | None = None,
    norm: Norm = norms.l2(),
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""AGC: shrinks each unit relative to its weights, :math:`g_u \min(1, \lambda \max(\|w_u\|, \epsilon) / \|g_u\|)`.

    `update` needs the parameters. The paper leaves the last layer unclipped: give that leaf None as axes,
    or use `optax.masked`. With `scope=scopes.leaf()` and a ratio of 0.3 it is DreamerV3's form.
    Known failure: what starts at zero moves slowly, since its limit is :math:`\lambda \epsilon`.

    Args:
        ratio: the share :math:`\lambda`; the larger the batch, the smaller it has to be.
        floor: :math:`\epsilon`, the least that a weight norm counts.
        axes: of a unit, as for `scopes.unit`, whose conventions are those of Flax's layers.
        scope: which numbers share a norm instead of units.
        norm: which norm, of gradients and weights.
        **options: as for `clip`.

    Raises:
        TypeError: `ratio` is not a threshold, or `floor` not a number; or both axes and scope are given.
        ValueError: one of them is negative or NaN; on `update`: the parameters are missing.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> clip = optaxclip.adaptive_grad_clip(0.1)
        >>> params, grads = jnp.array([[3.0, 1.0], [4.0, 1.0]]), jnp.array([[3.0, 0.1], [4.0, 0.1]])
        >>> clip.update(grads, clip.init(params), params)[0]
        Array([[0.3, 0.1],
               [0.4, 0.1]], dtype=float32)

    References:
        Brock, De, Smith and Simonyan, [High-performance large-scale image recognition without
        normalization](https://arxiv.org/abs/2102.06171), 2021.
    """
    _validate.not_both("axes", axes, "scope", scope, "pass scope=scopes.unit(axes) or axes alone")
    return clip(relative(ratio, floor=floor), scope=scope or scopes.unit(axes), norm=norm, **options)
