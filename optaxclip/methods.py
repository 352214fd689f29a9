"""The published methods, one row each: a choice of scope, norm, threshold and response.

Every row also takes the keywords `response`, `nonfinite`, `sharded_over` and `record` of `clip`. A
threshold may be a number, a traced array, a schedule, a rule, or a dict by group. Put each clip
before the optimizer in a chain, on gradients averaged over the batch, unless its text names another
position.

No rule learns from NaN, infinity or zeros. A single norm ten thousand times larger or smaller than
usual is ignored (`thresholds.ignore_outliers`; `spam_clip` is the exception). Some methods can lock
themselves in at a limit that is too low; `thresholds.reset_after` is the way out.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, TypedDict, TypeVar, Unpack, cast

import jax
import jax.numpy as jnp
import optax
from jax import Array

from optaxclip import _validate, norms, responses, scopes, thresholds
from optaxclip._clip import clip
from optaxclip._heads import Parts, on_heads
from optaxclip._keep import around, keep_params
from optaxclip._numerics import finite_part, negative_part, positive_part, widen
from optaxclip._precondition import clip_after
from optaxclip._spectral import (
    by_layer,
    last_one,
    last_two,
    newton_schulz,
    on_spectra,
    on_values,
    on_whole_matrices,
)
from optaxclip._transform import only_of_weights
from optaxclip._types import Norm, Response, Scope
from optaxclip.thresholds.fixed import as_threshold, as_thresholds, negated


class Options(TypedDict, total=False):
    """The keywords of `clip` that every row takes."""

    response: Response
    nonfinite: Literal["propagate", "zero", "raise"]
    sharded_over: Any
    record: bool | Literal["full"]


Row = TypeVar("Row", bound=Callable[..., optax.GradientTransformationExtraArgs])
ABOVE = norms.linf()._replace(magnitude=positive_part)  # one-sided norms, for two bounds
BELOW = norms.linf()._replace(magnitude=negative_part)
LOGITS = norms.linf()._replace(magnitude=finite_part)


def _row(method: Row) -> Row:
    """Spells out the keywords of `clip` in the signature.

    `help` and `optax.inject_hyperparams` read them there. The default `response=None` means the
    response of the method: inject_hyperparams takes any default that is a function for a schedule.
    """
    parameters = inspect.signature(method).parameters.values()
    named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    shared = inspect.signature(clip).parameters
    response = shared["response"].replace(default=None)
    rest = [response, *(shared[name] for name in ("nonfinite", "sharded_over", "record"))]
    signature = inspect.Signature(
        [*named, *rest], return_annotation=optax.GradientTransformationExtraArgs
    )

    @functools.wraps(method)
    def row(*args: Any, **options: Any) -> optax.GradientTransformationExtraArgs:
        _validate.keywords(method.__name__, options, signature.parameters)
        if options.get("response") is None:
            options.pop("response", None)
        return method(*args, **options)

    row.__dict__["__signature__"] = signature
    return cast(Row, row)


@_row
def clip_by_value(
    limit: Any = None,
    high: Any = None,
    *,
    low: Any = None,
    scope: Scope = scopes.element(),
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Clips each element by value.

    `clip_by_value(limit)` clips at :math:`\pm c`: this is `optax.clip`, Keras `clipvalue` and
    PyTorch `clip_grad_value_`. Complex numbers are clipped by magnitude. `clip_by_value(low, high)`
    clips at both bounds. The direction of the gradient changes. Law: value clip = element scope +
    `clamp`.

    For weights, `keep_params(clip_by_value(low, high))`, zero need not be between the bounds. Then
    the reading of the bound that zero is beyond has the distance from that bound. A gradient of
    zero must stay zero, so outside of `keep_params` such a clip is refused by `init` and `update`.

    Args:
        limit: the limit; the lower bound if `high` is given.
        high: the upper bound, not negative for gradients; a number or a schedule.
        low: the lower bound by keyword, not positive for gradients; a number or a schedule. Traced
            bounds and schedules count as 0 on the other side of zero.
        scope: which elements share one limit; a rule learns it from the largest of them.
        **options: as for `clip`.

    Raises:
        TypeError: a bound is not a number, missing, or given twice; or two bounds are given for
            complex updates.
        ValueError: the limit is negative, or the bounds are in the wrong order; on `init` and
            `update`: 0 is not between the bounds of a clip of gradients.

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
    options.setdefault("response", responses.clamp)
    if low is None and high is None:
        return clip(as_thresholds(limit, name="limit"), scope, norm=norms.linf(), **options)
    _validate.not_both("limit", limit, "low", low, "pass clip_by_value(low, high), or one limit")
    low = limit if low is None else low
    sides = _side("high", high, scope, options), _side("low", low, scope, options)
    _validate.in_order(low, high)
    return optax.chain(*sides)


def _side(
    name: str, bound: Any, scope: Scope, options: Options
) -> optax.GradientTransformationExtraArgs:
    """Clips at one bound; only weights have a bound that zero is beyond."""
    sign, norm, rule = (-1, ABOVE, as_threshold) if name == "high" else (1, BELOW, negated)
    if options.get("response") is responses.clamp and not scopes.is_of_elements(scope):
        # `clamp` would cut at the other side as well
        options = {**options, "response": _cut_above if name == "high" else _cut_below}
    if not _validate.is_beyond_zero(name, bound, sign):
        return clip(rule(bound, name=name), scope, norm=norm, **options)
    distance = around(bound, clip(0.0, scope, norm=norm, **options))
    return only_of_weights(distance, lambda: _validate.zero_inside(name, bound, sign))


def _cut_above(gradient: Array, size: Array, limit: Array) -> Array:
    return jnp.minimum(gradient, limit)


def _cut_below(gradient: Array, size: Array, limit: Array) -> Array:
    return jnp.maximum(gradient, -limit)


@_row
def clip_by_norm(
    max_norm: Any,
    *,
    scope: Scope = scopes.leaf(),
    norm: Norm = norms.l2(),
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Scales each leaf down to a maximum norm, :math:`g_i \min(1, c / \|g_i\|)`.

    This is Keras `clipnorm` and `tf.clip_by_norm`. Each leaf keeps its direction; the gradient as a
    whole does not.

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
    max_norm: Any,
    *,
    scope: Scope = scopes.tree(),
    norm: Norm = norms.l2(),
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the whole gradient down to a maximum norm, :math:`g \min(1, c / \|g\|)`.

    This is `optax.clip_by_global_norm`, Keras `global_clipnorm` and PyTorch `clip_grad_norm_`. For
    PyTorch's `norm_type`, pass `norm=norms.lp(p)`. The gradient keeps its direction.

    Args:
        max_norm: the limit :math:`c`; the paper recommends half to ten times the mean norm.
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
def clip_by_block_rms(
    max_rms: Any, *, scope: Scope = scopes.leaf(), **options: Unpack[Options]
) -> optax.GradientTransformationExtraArgs:
    r"""Scales each leaf down to a maximum root mean square.

    .. math:: u_i \min(1, d / \mathrm{rms}(u_i))

    This is the update clipping of Adafactor, `optax.clip_by_block_rms`. It is meant for
    preconditioned updates: put it after the part of the optimizer that divides by second moments.

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
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""AGC: clips each unit's gradient relative to the norm of its weights.

    .. math:: g_u \min(1, \lambda \max(\|w_u\|, \epsilon) / \|g_u\|)

    Units are those of `optax.adaptive_grad_clip`, which go by the rank of a leaf. They are wrong
    for the output of attention and for embeddings; pass `axes=scopes.flax_axes` for Flax's layers.
    `update` needs the parameters. The paper leaves the last layer unclipped: give that leaf None as
    axes, or use `optax.masked`. DreamerV3 uses `scope=scopes.leaf()` with a ratio of 0.3. Known
    failure: weights that start at zero move slowly, because their limit is :math:`\lambda
    \epsilon`.

    Args:
        ratio: the share :math:`\lambda`; larger batches need a smaller one.
        floor: :math:`\epsilon`; smaller weight norms count as this large.
        axes: the axes of a unit, as for `scopes.unit`, which follows the layouts of Flax's layers.
        scope: which numbers share a norm instead of units.
        norm: which norm, of gradients and weights.
        **options: as for `clip`.

    Raises:
        TypeError: `ratio` is not a threshold, `floor` is not a number, or both `axes` and `scope`
            are given.
        ValueError: `ratio` or `floor` is negative or NaN; on `update`: the parameters are missing.

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
    _validate.static("axes", axes)
    _validate.not_both("axes", axes, "scope", scope, "pass scope=scopes.unit(axes) or axes alone")
    return clip(
        thresholds.relative_to_params(ratio, floor=floor),
        scope=scope or scopes.unit(axes),
        norm=norm,
        **options,
    )


@_row
def clip_by_trust_ratio(
    ratio: Any,
    *,
    low: Any = 0.0,
    high: Any = jnp.inf,
    scope: Scope = scopes.leaf(),
    norm: Norm = norms.l2(),
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Limits each leaf's step to a share of the norm of its weights, as LARC, LARS and LAMB do.

    .. math:: u \min(1, \eta\, \mathrm{clip}(\|w\|, \ell, h) / \|u\|)

    `update` needs the parameters. A leaf whose weights or updates are all zero stays as it is. No
    state. After `optax.scale(-learning_rate)` this is LARC's clip. With
    `response=responses.normalize` small updates grow too: before the learning rate it is LARS after
    SGD and LAMB after Adam, and equals `optax.scale_by_trust_ratio`. LAMBC is LAMB with this
    default response. Known failure: a leaf of small weights, such as a bias, moves slowly; use
    `scopes.leaf(where=...)` to leave it out, as the papers' code does.

    Args:
        ratio: the trust coefficient :math:`\eta`: 0.001 in LARS, 0.02 in apex's LARC, 1 in LAMB.
        low: :math:`\ell`; smaller weight norms count as this large, 0 in the papers.
        high: :math:`h`; larger weight norms count as this large. LAMB's paper leaves it open; 10 is
            common.
        scope: which numbers share a norm.
        norm: which norm, of updates and weights.
        **options: as for `clip`.

    Raises:
        TypeError: `ratio` is not a threshold, or `low` or `high` is not a number.
        ValueError: `ratio`, `low` or `high` is negative or NaN, or `low` is above `high`; on
            `update`: the parameters are missing.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> clip = optaxclip.clip_by_trust_ratio(0.1)
        >>> params = {"w": jnp.array([3.0, 4.0]), "b": jnp.zeros(1)}
        >>> updates = {"w": jnp.array([0.6, 0.8]), "b": jnp.array([0.2])}
        >>> clip.update(updates, clip.init(params), params)[0]
        {'b': Array([0.2], dtype=float32), 'w': Array([0.3, 0.4], dtype=float32)}

    References:
        You, Gitman and Ginsburg, [LARS](https://arxiv.org/abs/1708.03888), 2017; You et al.,
        [LAMB](https://arxiv.org/abs/1904.00962), 2019; Fong et al.,
        [LAMBC](https://arxiv.org/abs/2011.13584), 2020.
    """
    _validate.number("low", low)
    _validate.number("high", high)
    _validate.in_order(low, high)
    limit = thresholds.relative_to_params(ratio, floor=low, ceiling=high, zero="free")
    return clip(limit, scope=scope, norm=norm, **options)


@_row
def max_norm(
    limit: Any = 2.0,
    *,
    axes: Any = None,
    scope: Scope | None = None,
    norm: Norm = norms.l2(),
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Max-norm: keeps the weights of each unit within a norm, after the step.

    .. math:: p'_u \min(1, c / \|p'_u\|) - p_u, \qquad p' = p + u

    `update` needs the parameters. Put it last in a chain, after the learning rate. This is Keras
    `MaxNorm(limit)` and, with a limit of :math:`\sqrt{m}`, H2O's `max_w2` of :math:`m`. Both leave
    the bias out: pass `scope=scopes.unit(where=lambda path: "bias" not in path)`. Law: `max_norm(c,
    axes=axes)` is `keep_params(clip(c, scopes.unit(axes)))`. Known failure: momentum goes on to
    push outward.

    Args:
        limit: the limit :math:`c`, 2 in Keras; 3 to 4 in the paper.
        axes: the axes of a unit, as for `scopes.unit`, which follows the layouts of Flax's layers.
        scope: which weights share a norm instead of units.
        norm: which norm.
        **options: as for `clip`.

    Raises:
        TypeError: `limit` is not a threshold, or both `axes` and `scope` are given.
        ValueError: `limit` is negative or NaN; on `update`: the parameters are missing.

    Example:
        >>> import jax.numpy as jnp, optax, optaxclip
        >>> keep = optaxclip.max_norm(1.0)
        >>> params, updates = jnp.array([[0.6, 0.1], [0.8, 0.1]]), jnp.array([[2.4, 0.1], [3.2, 0]])
        >>> updates, _ = keep.update(updates, keep.init(params), params)
        >>> print(optax.apply_updates(params, updates))
        [[0.6 0.2]
         [0.8 0.1]]

    References:
        Srivastava et al., [Dropout](https://jmlr.org/papers/v15/srivastava14a.html), 2014.
    """
    _validate.static("axes", axes)
    _validate.not_both("axes", axes, "scope", scope, "pass scope=scopes.unit(axes) or axes alone")
    units, rules = scope or scopes.unit(axes), as_thresholds(limit, name="limit")
    return keep_params(clip(rules, units, norm=norm, **options))


@_row
def autoclip(
    q: Any = 0.1,
    *,
    window: int | None = None,
    scope: Scope = scopes.tree(),
    norm: Norm = norms.l2(),
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""AutoClip: clips at a quantile of all norms so far.

    .. math:: g \min(1, Q_q(\|g_1\|, \dots, \|g_t\|) / \|g_t\|)

    The statistic sees raw norms, the current one included. State: 8 KiB per group, exact for the
    first 1024 norms and within 1 % after that; with a window, one float per group and step in it.
    The reference code keeps every norm, NaN too.
    With the paper's quantile of 0.1, about 90 % of steps are clipped, each a little. Known failure:
    all history has the same weight, so the limit follows a late change of level slowly.

    Args:
        q: share of the norms that is not clipped; the paper recommends 0.1.
        window: how many of the last norms to remember; None for all.
        scope: which numbers share a norm.
        norm: which norm.
        **options: as for `clip`.

    Raises:
        TypeError: `q` is not a number, or `window` is not an integer.
        ValueError: `q` is not between 0 and 1, or `window` is below 1.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> clip = optaxclip.autoclip(0.5)
        >>> state = clip.init(jnp.zeros(1))
        >>> for size in 1.0, 3.0, 100.0:
        ...     updates, state = clip.update(jnp.array([size]), state)
        ...     print(updates)
        [1.]
        [2.]
        [3.]

    References:
        Seetharaman et al., [AutoClip](https://arxiv.org/abs/2007.14469), 2020.
    """
    rule = thresholds.quantile_sketch(q) if window is None else thresholds.quantile(q, window)
    return clip(rule, scope=scope, norm=norm, **options)


@_row
def quantile_clip(
    q: Any = 0.9,
    *,
    rate: Any = 0.2,
    scope: Scope = scopes.tree(),
    norm: Norm = norms.l2(),
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Clips at a limit that moves until a given share of the norms is within it.

    .. math:: c \leftarrow c\, e^{-\eta (1[s \le c] - q)}

    The limit starts at the first norm. The statistic sees whether each raw norm was within the
    limit. TensorFlow Privacy starts at 0.1 and adds noise to the share. State: three numbers per
    group. The limit follows a tenfold rise in 13 steps and a
    tenfold fall in 115. The paper clips single examples to the median; the default 0.9 is meant for
    whole gradients. Known failure: the limit keeps moving up and down by the rate.

    Args:
        q: share of the norms that is not clipped.
        rate: :math:`\eta`, 0.2 in the paper.
        scope: which numbers share a norm.
        norm: which norm.
        **options: as for `clip`.

    Raises:
        TypeError: `q` or `rate` is not a number.
        ValueError: `q` is not between 0 and 1, or `rate` is not positive.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> clip = optaxclip.quantile_clip()
        >>> state = clip.init(jnp.zeros(1))
        >>> for size in 1.0, 100.0:
        ...     updates, state = clip.update(jnp.array([size]), state)
        ...     print(updates)
        [1.]
        [0.9801987]

    References:
        Andrew, Thakkar, McMahan and Ramaswamy, [Differentially private learning with adaptive
        clipping](https://arxiv.org/abs/1905.03871), 2019.
    """
    return clip(thresholds.quantile_tracker(q, rate), scope=scope, norm=norm, **options)


@_row
def zclip(
    z: Any = 2.5,
    *,
    decay: Any = 0.97,
    warmup: Any = 25,
    max_norm: Any = None,
    option: Literal["adaptive_scaling", "mean", "percentile"] = "adaptive_scaling",
    scope: Scope = scopes.tree(),
    norm: Norm = norms.l2(),
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""ZClip: lowers a norm that is more than :math:`z_0` standard deviations above the mean.

    .. math:: z = (\|g\| - \mu) / \sigma, \qquad
        \|g\| \leftarrow \mu + z_0^2 \sigma / z \text{ if } z > z_0

    The statistic sees norms clipped at this limit only, even if `max_norm` clips further. State:
    five numbers per group. The reference code also sets `max_norm=1.0`, which decides in most runs;
    here it is off. Its `clip_factor` is `thresholds.times(factor, thresholds.zscore())`, except
    that there the averages see the factor; its `skip_update_on_spike` is `skip_spikes`. Known
    failures: there is no limit in the first 25 steps unless `max_norm` is given, and a lasting
    change by many deviations is never accepted. For the second, use
    `thresholds.reset_after(thresholds.zscore(), 50)`.

    Args:
        z: :math:`z_0`, 2.5 in the paper.
        decay: decay of mean and variance, 0.97 in the paper.
        warmup: how many norms the averages start from, 25 in the paper.
        max_norm: an additional limit, from the first step on.
        option: where a spike is lowered to: `"adaptive_scaling"` is the paper's; the reference code
            also has the `"mean"`, and `"percentile"`, the plain :math:`\mu + z_0 \sigma`.
        scope: which numbers share a norm.
        norm: which norm.
        **options: as for `clip`.

    Raises:
        TypeError: an argument is not a number, or `max_norm` is not a threshold.
        ValueError: an argument is out of range.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> clip = optaxclip.zclip(warmup=4)
        >>> state = clip.init(jnp.zeros(1))
        >>> for size in 1.0, 1.2, 0.9, 1.1, 5.0:
        ...     updates, state = clip.update(jnp.array([size]), state)
        >>> print(f"{updates[0]:.4f}")
        1.0698

    References:
        Kumar et al., [ZClip](https://arxiv.org/abs/2504.02507), 2025.
    """
    rule = thresholds.zscore(z, decay=decay, warmup=warmup, option=option)
    return clip(
        rule if max_norm is None else thresholds.at_most(rule, max_norm),
        scope=scope,
        norm=norm,
        **options,
    )


@_row
def adagc(
    factor: Any = 1.05,
    *,
    decay: Any = 0.98,
    warmup: Any = 100,
    max_norm: Any = 1.0,
    scope: Scope = scopes.leaf(),
    norm: Norm = norms.l2(),
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""AdaGC: clips each leaf at a multiple of the average of its clipped norms.

    The limit of leaf :math:`i` is :math:`\lambda \gamma_i`, where :math:`\gamma_i` averages its
    clipped norms. In the warm-up the gradient is clipped by its global norm, and :math:`\gamma_i`
    is the smallest clipped norm so far. One read of the gradients serves both. ERNIE's code has a
    factor of 1.03, 101 steps of warm-up, and the smallest raw norm. State: four numbers per leaf.
    Known failures: :math:`\gamma` rises by at most 0.1 % a step. So 40 % of steady noisy steps are
    clipped, and a tenfold change takes 2300 steps (see `thresholds.reset_after`). A leaf with zero
    gradients does not update its statistics, so its limit never becomes zero.

    Args:
        factor: :math:`\lambda`, 1.05 in the paper; a factor of 2 hardly clips.
        decay: decay of the average, 0.98 in the paper.
        warmup: how many norms of a leaf :math:`\gamma` starts from, 100 in the paper; these steps
            are clipped by the global norm.
        max_norm: the limit of the global norm in the warm-up, a number or a schedule.
        scope: which numbers share a norm after the warm-up.
        norm: which norm; the global norm is the l2 norm of these norms.
        **options: as for `clip`.

    Raises:
        TypeError: an argument is not a number, or `max_norm` is not a threshold.
        ValueError: an argument is out of range.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> clip = optaxclip.adagc(warmup=1, max_norm=5.0)
        >>> state = clip.init([jnp.zeros(1), jnp.zeros(1)])
        >>> for scale in 2.0, 0.9, 1.5:
        ...     grads = [jnp.array([3.0 * scale]), jnp.array([4.0 * scale])]
        ...     updates, state = clip.update(grads, state)
        ...     print(*updates)
        [3.] [4.]
        [2.7] [3.6]
        [3.1437] [4.1916]

    References:
        Wang et al., [AdaGC](https://arxiv.org/abs/2502.11034), 2025.
    """
    local = thresholds.ema(factor, decay=decay, warmup=warmup, start="least")
    return clip(
        thresholds.with_fallback(local, thresholds.by_global_norm(max_norm)),
        scope=scope,
        norm=norm,
        **options,
    )


@_row
def history_clip(
    deviations: Any = 3.0,
    *,
    window: int = 128,
    warmup: Any = 64,
    scope: Scope = scopes.tree(),
    norm: Norm = norms.l2(),
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Clips at mean plus deviations of the last norms, :math:`\mu + k \sigma`.

    The statistic sees raw norms, the current one excluded. A deviation counts as at least a
    thousandth of the mean, in Levanter as 1e-6. State: one float per group and step in the window.
    Levanter clips updates this way: after the preconditioner, before the learning rate.
    It also works on gradients. Known failure: one spike raises the limit until the spike leaves the
    window; a spike of 100 times the mean raises it to 28 times the mean.

    Args:
        deviations: :math:`k`, 3 in Levanter.
        window: how many norms to remember, 128 in Levanter.
        warmup: how many norms to see before there is a limit, 64 in Levanter.
        scope: which numbers share a norm.
        norm: which norm.
        **options: as for `clip`.

    Raises:
        TypeError: `deviations` is not a number, or `window` or `warmup` is not an integer.
        ValueError: an argument is out of range, such as a warm-up longer than the window.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> clip = optaxclip.history_clip(warmup=4)
        >>> state = clip.init(jnp.zeros(1))
        >>> for size in 1.0, 3.0, 1.0, 3.0, 100.0:
        ...     updates, state = clip.update(jnp.array([size]), state)
        >>> updates
        Array([5.], dtype=float32)

    References:
        Stanford CRFM, [Levanter](https://github.com/stanford-crfm/levanter),
        `clip_update_by_historical_norm`.
    """
    return clip(
        thresholds.window_zscore(deviations, window=window, warmup=warmup),
        scope=scope,
        norm=norm,
        **options,
    )


@_row
def log_norm_clip(
    deviations: Any = 2.0,
    *,
    decay: Any = 0.95,
    scope: Scope = scopes.tree(),
    norm: Norm = norms.l2(),
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Lowers outliers of the logarithm of the norm to the geometric mean.

    With :math:`m` and :math:`\sigma` the moving mean and deviation of :math:`\log \|g\|`, a norm of
    at least :math:`e^{m + k \sigma}` is set to :math:`e^m`. The statistic sees raw norms, the
    current one included. State: five numbers per group. TensorFlow's contrib starts its averages at
    zero, which makes the first steps tiny; here they start as plain averages (its option with a
    global step). Known failure: a spike widens the deviation. After a spike of 100 times the mean,
    threefold spikes pass for about thirty steps.

    Args:
        deviations: :math:`k`, 2 in TensorFlow's contrib.
        decay: decay of mean and variance, 0.95 in TensorFlow's contrib.
        scope: which numbers share a norm.
        norm: which norm.
        **options: as for `clip`.

    Raises:
        TypeError: `deviations` or `decay` is not a number.
        ValueError: `deviations` or `decay` is out of range.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> clip = optaxclip.log_norm_clip()
        >>> state = clip.init(jnp.zeros(1))
        >>> for size in 1.0, 1.1, 0.9, 1.0, 1.1, 0.9, 50.0:
        ...     updates, state = clip.update(jnp.array([size]), state)
        >>> print(f"{updates[0]:.4f}")
        1.7437

    References:
        Chorowski et al., [End-to-end continuous speech recognition using attention-based recurrent
        NN](https://arxiv.org/abs/1412.1602), 2014.
    """
    return clip(thresholds.log_zscore(deviations, decay=decay), scope=scope, norm=norm, **options)


@_row
def growth_clip(
    factor: Any = 1.01,
    *,
    scope: Scope = scopes.leaf(),
    norm: Norm = norms.l2(),
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Fira's limiter: lets the norm of a leaf grow by at most a factor per step.

    .. math:: u_t = g_t \min(1, \gamma \|u_{t-1}\| / \|g_t\|)

    The statistic is the last clipped norm :math:`\|u\|`. State: three numbers per group. Fira
    limits updates this way: after the preconditioner, before the learning rate. Known failures:
    with noisy norms the limit settles below their mean, and after a small norm it takes 231 steps
    to grow tenfold. Zeros are not observed, so the limit never sticks at zero; in Fira's code a
    zero step leaves a limit of 1e-8. After a jump by more than ten thousand times, Fira's code
    takes 926 steps and more; here the limit starts again at the tenth such norm in a row.

    Args:
        factor: :math:`\gamma`, the largest ratio of one norm to the one before; 1.01 in the paper.
        scope: which numbers share a norm.
        norm: which norm.
        **options: as for `clip`.

    Raises:
        TypeError: `factor` is not a number.
        ValueError: `factor` is negative or NaN.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> clip = optaxclip.growth_clip(2.0)
        >>> state = clip.init(jnp.zeros(1))
        >>> for size in 1.0, 100.0, 100.0:
        ...     updates, state = clip.update(jnp.array([size]), state)
        ...     print(updates)
        [1.]
        [2.]
        [4.]

    References:
        Chen et al., [Fira](https://arxiv.org/abs/2410.01623), 2024.
    """
    return clip(thresholds.growth(factor), scope=scope, norm=norm, **options)


@_row
def spam_clip(
    factor: Any = 5000.0,
    *,
    decay: Any = 0.999,
    warmup: Any = 20,
    scope: Scope = scopes.element(),
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""SPAM's spike clip: clips each element at a multiple of its root mean square.

    The limit is :math:`\sqrt{\theta v}`, where :math:`v` averages the squares of the clipped
    element. State: one buffer as large as the parameters. SPAM also resets Adam's moments every 500
    steps; `spam_clip` does not. Known failures: with 5000, an element may reach 70 times its usual
    size late in training, and 10 times after 20 steps. An element that was always zero is not
    clipped; the reference code keeps it at zero. A spike in the warm-up is learned;
    `thresholds.ignore_outliers` prevents that with three more buffers.

    Args:
        factor: :math:`\theta`, 5000 in the paper.
        decay: decay of the average, 0.999 as in Adam; the average starts at zero, uncorrected.
        warmup: the first update that is clipped, 20 in the reference code.
        scope: which elements share a limit; it is learned from the largest of them.
        **options: as for `clip`.

    Raises:
        TypeError: `factor` or `decay` is not a number, or `warmup` is not an integer.
        ValueError: an argument is out of range.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> clip = optaxclip.spam_clip(4.0, decay=0.5, warmup=3)
        >>> state = clip.init(jnp.zeros(2))
        >>> for _ in range(2):
        ...     updates, state = clip.update(jnp.array([1.0, 2.0]), state)
        >>> clip.update(jnp.array([9.0, 2.0]), state)[0]
        Array([1.7320508, 2.       ], dtype=float32)

    References:
        Huang et al., [SPAM](https://arxiv.org/abs/2501.06842), 2025.
    """
    rule = thresholds.rms_multiple(factor, decay=decay, warmup=warmup)
    return clip(
        rule, **{"scope": scope, "norm": norms.linf(), "response": responses.clamp, **options}
    )


@_row
def gradient_stabilizer(
    *,
    decay: Any = 0.6,
    square_decay: Any = 0.999,
    scope: Scope = scopes.leaf(),
    norm: Norm = norms.l2(),
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""GradientStabilizer: keeps the direction of each leaf and replaces its norm.

    .. math:: g\, \hat m / (\|g\| \sqrt{\hat v})

    :math:`m` and :math:`v` are moving averages of the norm and of its square, corrected for
    starting at zero. They see raw norms, the current one included. State: five numbers per group.
    Steady norms become 1. After them a huge spike becomes

    .. math:: (1 - \beta_1) / \sqrt{1 - \beta_2},

    12.6 with the defaults, 0.95 with Stable-SPAM's (0.7, 0.9), and 47 with its (0.85, 0.99999) for
    bfloat16. Known failure: the spike stays in the mean square. After one of 100
    times the mean, the new norms are below 0.75 for 2546 steps (67 with 0.7 and 0.9). Small
    gradients are enlarged, so use it before an optimizer that ignores scale (Adam), or tune the
    learning rate for it.

    Args:
        decay: :math:`\beta_1`, decay of the mean: 0.6 in GradientStabilizer's released code, 0.7 in
            Stable-SPAM.
        square_decay: :math:`\beta_2`, decay of the mean square: 0.999 in GradientStabilizer's
            released code, 0.9 in Stable-SPAM.
        scope: which numbers share a norm.
        norm: which norm.
        **options: as for `clip`.

    Raises:
        TypeError: `decay` or `square_decay` is not a number.
        ValueError: `decay` or `square_decay` is out of range.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> clip = optaxclip.gradient_stabilizer()
        >>> state = clip.init(jnp.zeros(1))
        >>> for size in 3.0, 3.0, 3e6:
        ...     updates, state = clip.update(jnp.array([size]), state)
        ...     print(f"{updates[0]:.3f}")
        1.000
        1.000
        0.883

    References:
        Huang et al., [Stable-SPAM](https://arxiv.org/abs/2502.17055), 2025.
    """
    rule = thresholds.mean_to_rms(decay=decay, square_decay=square_decay)
    return clip(rule, **{"scope": scope, "norm": norm, "response": responses.normalize, **options})


@_row
def clippy(
    relative: Any = 0.1,
    *,
    absolute: Any = 1e-7,
    scope: Scope = scopes.leaf(),
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Clippy: scales each leaf down until every element fits a budget set by its weight.

    .. math:: u \min(1, \min_j b_j / |u_j|), \qquad b_j = r |w_j| + a

    `update` needs the parameters :math:`w`. It limits the step itself: put it after the learning
    rate, last in a chain. No state. Known failure: one weight near zero holds back its whole leaf,
    unless :math:`a` allows the weight to move. TensorFlow Recommenders has two more options, which
    need its Adagrad accumulator and are left out: a budget that grows with :math:`1 / \sqrt{v}`,
    and an accumulator of clipped gradients.

    Args:
        relative: :math:`r`, the share of itself by which a weight may change; 0.1 in TensorFlow
            Recommenders.
        absolute: :math:`a`, added to that share; 1e-7 in TensorFlow Recommenders.
        scope: which elements share a factor.
        **options: as for `clip`.

    Raises:
        TypeError: `relative` or `absolute` is not a number.
        ValueError: `relative` or `absolute` is negative; on `update`: the parameters are missing.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> clip = optaxclip.clippy(0.1)
        >>> params, updates = jnp.array([1.0, 10.0]), jnp.array([-0.4, 0.4])
        >>> clip.update(updates, clip.init(params), params)[0]
        Array([-0.1000001,  0.1000001], dtype=float32)

    References:
        Tang et al., [Improving training stability for multitask ranking models in recommender
        systems](https://arxiv.org/abs/2302.09178), 2023.
    """
    return clip(1.0, scope=scope, norm=norms.relative_linf(relative, absolute), **options)


@_row
def scale_by_stable_adam(
    max_rms: Any = 1.0,
    *,
    b1: Any = 0.9,
    b2: Any = 0.99,
    eps: Any = 1e-6,
    weight_decay: Any = None,
    scope: Scope = scopes.leaf(),
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""StableAdamW: Adam with a smaller step where the gradient outgrows its second moment.

    .. math:: u_i = \frac{\hat m_i / (\sqrt{\hat v_i} + \epsilon) + \lambda w_i}
        {\max(1, \mathrm{RMS}_i / d)}, \qquad
        \mathrm{RMS}_i = \mathrm{rms}(g_i / \max(\sqrt{\hat v_i}, \epsilon))

    Use it in place of `optax.scale_by_adam`, before the learning rate. The statistic is Adam's
    :math:`v`, which includes the current gradient, so the only state is Adam's two buffers. RMS is
    measured on the gradient, not on the step, because momentum smooths the step; Levanter and
    Praxis measure the step, which is a weaker rule. Known failure: a
    step shrinks by at most :math:`1 / \sqrt{1 - b_2}`, 10 with the defaults.

    Args:
        max_rms: :math:`d`, 1 in the paper.
        b1: decay of the mean.
        b2: decay of the mean square.
        eps: :math:`\epsilon`; smaller roots of the mean square count as this large in the RMS.
        weight_decay: :math:`\lambda`, decoupled, and scaled down together with the step; `update`
            then needs the parameters.
        scope: which numbers share an RMS.
        **options: as for `clip`.

    Raises:
        TypeError: `max_rms` is not a threshold.
        ValueError: `max_rms` is negative or NaN.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> adam = optaxclip.scale_by_stable_adam()
        >>> state = adam.init(jnp.zeros(1))
        >>> for size in 1.0, 1.0, 1e6:
        ...     updates, state = adam.update(jnp.array([size]), state)
        >>> print(f"{state.clip.reading.size_before[0]:.3f}", state.clip.reading.size_after)
        1.723 [1.]

    References:
        Wortsman et al., [Stable and low-precision training for large-scale vision-language
        models](https://arxiv.org/abs/2304.13013), 2023.
    """

    def relative_to_second_moment(gradients: Any, states: Any) -> Any:
        variance = optax.tree_utils.tree_bias_correction(states[0].nu, b2, states[0].count)
        root = jax.tree.map(lambda v: jnp.sqrt(jnp.maximum(widen(v), eps**2)), variance)
        return jax.tree.map(lambda g, r: widen(g) / r, gradients, root)

    decayed = optax.identity() if weight_decay is None else optax.add_decayed_weights(weight_decay)
    adam = optax.chain(optax.scale_by_adam(b1, b2, eps), decayed)
    limit = clip_by_block_rms(max_rms, scope=scope, **options)
    return clip_after(adam, limit, measured=relative_to_second_moment)


def _on_spectra(
    limit: Any, scope: str, response: Response | None, options: dict[str, Any]
) -> optax.GradientTransformationExtraArgs:
    """Clips spectra, with a size for each matrix or each singular value."""
    rules = limit.values() if isinstance(limit, dict) else [limit]
    if scope == "value":
        parts = {"scope": scopes.element(), "response": response or responses.rescale}
    else:
        by_matrix = scopes.unit(last_one)
        parts = {"scope": by_matrix, "norm": norms.linf(), "response": on_values(response)}
    relative = any(rule.uses_params for rule in rules)
    return on_spectra(clip(limit, **parts, **options), uses_params=relative)


@_validate.checks_keywords
def spectral_clip(
    max_norm: Any,
    *,
    scope: Literal["matrix", "value"] = "matrix",
    axes: Callable[[str, Any], tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
    batch_axes: Any = None,
    response: Response | None = None,
    iterations: int | None = None,
    nonfinite: Literal["propagate", "zero", "raise"] = "propagate",
    sharded_over: Any = None,
    record: bool | Literal["full"] = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips the singular values of each matrix, :math:`U \min(S, c) V^\top`.

    The size of a matrix is its largest singular value :math:`\sigma`, and a rule that learns learns
    that: `spectral_clip(thresholds.ema(1.0, decay=0.9, of="raw"))` follows its average. With
    `response=responses.rescale` the whole matrix is scaled by :math:`\min(1, c / \sigma)`. With
    `response=responses.smooth` it is SPECTRA's soft clip, :math:`S / \sqrt{1 + (S / c)^2}`; the
    recipes have the rest of SPECTRA, whose code leaves vectors within the limit as they are. No
    state for a number.

    The default is a singular value decomposition, which is exact but slow on accelerators. For the
    soft clip, Newton-Schulz `iterations` need only matrix products. They are within 0.1 % while
    :math:`\|X\|_F / c` is below :math:`1.5^{\text{iterations}} / 3`. SPECTRA clips updates this
    way: after the preconditioner, before the learning rate.

    Args:
        max_norm: the limit :math:`c` of singular values.
        scope: what has a size, and learns: a `"matrix"`, or each `"value"` by its rank.
        axes: `(path, leaf) -> (row axes, column axes)`, where all others are a stack of matrices.
            By default, a kernel with Flax's names is fan-in by outputs: `[in, heads x depth]`,
            `[heads x depth, out]`, `[height x width x in, out]`. In any other leaf the last two
            axes are a matrix. A vector is a matrix of one row.
        batch_axes: axes along which a leaf is a stack of layers, as for `scopes.unit`; `axes` gets
            the shape of one layer.
        response: what to do with singular values above the limit; None cuts them. `rescale` shrinks
            the whole matrix, any other response acts on each singular value.
        iterations: number of Newton-Schulz steps, 10 in SPECTRA; None for a decomposition. Only for
            `responses.smooth`. The recorded size is then the Frobenius norm.
        nonfinite: as for `clip`, for each matrix.
        sharded_over: as for `clip`; in `jax.shard_map` every device needs whole matrices. Under
            `jit` they may be sharded.
        record: as for `clip`.

    Raises:
        TypeError: `max_norm` is not a threshold, `iterations` is not an integer, or `axes` is not a
            function of two arguments.
        ValueError: `max_norm` is negative or NaN, `scope` is another word, or `iterations` is given
            without `responses.smooth`; on `update`: a matrix is sharded over mapped axes.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> clip = optaxclip.spectral_clip(1.0)
        >>> gradient = jnp.array([[3.0, 0.0], [0.0, 0.5]])
        >>> print(clip.update(gradient, clip.init(gradient))[0])
        [[1.  0. ]
         [0.  0.5]]

    References:
        SPECTRA, [arXiv:2603.14315](https://arxiv.org/abs/2603.14315), 2026, for the soft clip;
        [arXiv:2605.11838](https://arxiv.org/abs/2605.11838), 2026, for a learned limit.
    """
    limit, axes = as_thresholds(max_norm, name="max_norm"), axes or by_layer
    _validate.option("scope", scope, ("matrix", "value"))
    _validate.function("axes", axes, "lambda path, leaf: ((0,), (1,))", takes=2)
    options = {"nonfinite": nonfinite, "sharded_over": (), "record": record}
    if iterations is not None:
        soft = newton_schulz(response or responses.rescale, iterations)
        inner = clip(limit, scopes.unit(last_two), response=soft, **options)
    else:
        inner = _on_spectra(limit, scope, response, options)
    return on_whole_matrices(inner, axes, scopes.batch_of(batch_axes), sharded_over)


@_validate.checks_keywords
def qk_clip(
    max_logit: Any = 100.0,
    *,
    alpha: Any = 0.5,
    parts: Parts | None = None,
    record: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""QK-Clip: shrinks the query and key weights of heads whose attention logits are too large.

    .. math:: \gamma_h = \tau / \max(S_h, \tau), \qquad
        W_q^h \leftarrow \gamma_h^{\alpha} W_q^h, \quad
        W_k^h \leftarrow \gamma_h^{1 - \alpha} W_k^h

    :math:`S_h` is the largest logit of head :math:`h`, :math:`q \cdot k / \sqrt{d}` before the
    softmax. The model measures it; pass it to each update, `update(grads, state, params,
    logits={"decoder/attention": [heads]})`: the largest over batch, queries, keys, microbatches and
    devices. Put it last in a chain, because it scales the weights after the step, with their
    biases. Heads of at most :math:`\tau`, and negative logits, leave the bits of their weights.
    A logit that is not finite leaves the weights of its head, and is counted. Where query heads
    share a key head, the largest of their logits counts for all of them. Scanned layers have
    logits `[layers, heads]`.

    The state is that of a clip of the logits, so `telemetry.metrics` has :math:`S` and
    :math:`\gamma S` by layer, and the share of heads. Law: `keep_params` with
    `responses.power(exponent)`, by given sizes. Known failure: it acts one step after the logits
    were seen.

    Args:
        max_logit: the limit :math:`\tau`, 100 in Kimi K2: a number or any rule.
        alpha: the share :math:`\alpha` of the queries, from 0 to 1.
        parts: `(path, leaf) -> (layer, head axis, exponent)`, or None for a leaf to leave alone.
            The exponent of :math:`\gamma` is a number, or `"query"` for :math:`\alpha` and `"key"`
            for :math:`1 - \alpha`. For fused kernels and MLA return a list, with a slice of the
            last axis as the fourth of each. The default is `scopes.flax_attention`.
        record: as for `clip`.

    Raises:
        TypeError: `max_logit` is not a threshold, or `alpha` is not a number; on `update`: there
            are no logits.
        ValueError: `max_logit` is negative, or `alpha` is not between 0 and 1; on `init`: no leaf
            is a query or key; on `update`: the parameters or the logits of a layer are missing.

    Example:
        >>> import jax.numpy as jnp, optax, optaxclip
        >>> params = {"attention": {"query": {"kernel": jnp.ones((1, 2, 1))}}}
        >>> clip = optaxclip.qk_clip(100.0)
        >>> still = optax.tree.zeros_like(params)
        >>> logits = {"attention": jnp.array([400.0, 50.0])}
        >>> updates, _ = clip.update(still, clip.init(params), params, logits=logits)
        >>> print(optax.apply_updates(params, updates)["attention"]["query"]["kernel"][0, :, 0])
        [0.5 1. ]

    References:
        Kimi Team, [Kimi K2: open agentic intelligence](https://arxiv.org/abs/2507.20534), 2025,
        algorithm 1.
    """
    _validate.number("alpha", alpha, high=1.0)
    parts = scopes.flax_attention if parts is None else parts
    _validate.function("parts", parts, "scopes.flax_attention", takes=2)
    options: Any = {"response": responses.clamp, "record": "full" if record else False}
    limit = as_threshold(max_logit, name="max_logit")
    largest = clip(limit, scopes.element(), norm=LOGITS, **options)
    return keep_params(on_heads(largest, parts, alpha))
