"""The published methods, one row each: a choice of scope, norm, threshold and response.

Every row takes the keywords of `clip` besides its own (`response`, `nonfinite`, `sharded_over`,
`record`), and a threshold in any of its forms: a number, a traced array, a schedule, a rule, or a
dict by group. Unless its text says otherwise, each belongs before the optimizer in a chain, on
gradients averaged over the batch.

What learns never learns from NaN, infinity or zeros, nor from a lone size ten thousand times off
the usual (`thresholds.ignore_outliers`); a method that can lock itself in has its way out in
`thresholds.reset_after`.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaxclip import _validate, norms, responses, scopes, thresholds
from optaxclip._clip import clip
from optaxclip._numerics import negative_part, positive_part, widen
from optaxclip._precondition import clip_after
from optaxclip._spectral import matrix_axes, newton_schulz, on_spectra, on_whole_matrices
from optaxclip._types import Norm, Response, Scope
from optaxclip.thresholds.fixed import as_threshold, as_thresholds, negated

Row = Callable[..., optax.GradientTransformationExtraArgs]
ABOVE = norms.linf()._replace(magnitude=positive_part)  # one-sided norms, for two bounds
BELOW = norms.linf()._replace(magnitude=negative_part)


def _row(method: Row) -> Row:
    """Spells out the keywords of `clip` in the signature, for `help` and for
    `optax.inject_hyperparams`.

    There, `response=None` stands for the row's own response: inject_hyperparams takes any function
    for a schedule.
    """
    own = [p for p in inspect.signature(method).parameters.values() if p.kind is not p.VAR_KEYWORD]
    shared = inspect.signature(clip).parameters
    rest = [
        shared["response"].replace(default=None),
        *(shared[name] for name in ("nonfinite", "sharded_over", "record")),
    ]
    signature = inspect.Signature(
        [*own, *rest], return_annotation=optax.GradientTransformationExtraArgs
    )

    @functools.wraps(method)
    def row(*args: Any, **options: Any) -> optax.GradientTransformationExtraArgs:
        _validate.keywords(method.__name__, options, signature.parameters)
        if options.get("response") is None:
            options.pop("response", None)
        return method(*args, **options)

    row.__dict__["__signature__"] = signature
    return row


@_row
def clip_by_value(
    limit: Any = None,
    high: Any = None,
    *,
    low: Any = None,
    scope: Scope = scopes.element(),
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Cuts each element: `clip_by_value(limit)` at :math:`\pm c`, `clip_by_value(low, high)` at
    both bounds.

    The first is `optax.clip`, Keras `clipvalue` and PyTorch `clip_grad_value_`; complex numbers are
    cut by magnitude. The direction of the gradient changes. Law: value clip = element scope +
    `clamp`.

    Args:
        limit: the limit; or the lower bound, if two are given.
        high: the upper bound, not negative; a number or a schedule.
        low: the lower bound by keyword, not positive; a number or a schedule.
        scope: which elements share one limit, where a rule learns it from their largest.
        **options: as for `clip`.

    Raises:
        TypeError: a bound is not a number, missing, or given twice; or two bounds are given for
            complex updates.
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
    above = clip(as_threshold(high, name="high"), norm=ABOVE, **options)
    below = clip(negated(limit if low is None else low, name="low"), norm=BELOW, **options)
    return optax.chain(above, below)


@_row
def clip_by_norm(
    max_norm: Any, *, scope: Scope = scopes.leaf(), norm: Norm = norms.l2(), **options: Any
) -> optax.GradientTransformationExtraArgs:
    r"""Shrinks each leaf whose norm is too large, :math:`g_i \min(1, c / \|g_i\|)`.

    Keras `clipnorm` and `tf.clip_by_norm`. Each leaf keeps its direction; the whole gradient does
    not.

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
def clip_by_block_rms(
    max_rms: Any, *, scope: Scope = scopes.leaf(), **options: Any
) -> optax.GradientTransformationExtraArgs:
    r"""Shrinks each leaf whose root mean square is too large, :math:`u_i \min(1, d /
    \mathrm{rms}(u_i))`.

    The update clipping of Adafactor, `optax.clip_by_block_rms`: meant for preconditioned updates,
    so after the part of the optimizer that divides by second moments.

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
    r"""AGC: shrinks each unit relative to its weights, :math:`g_u \min(1, \lambda \max(\|w_u\|,
    \epsilon) / \|g_u\|)`.

    `update` needs the parameters. The paper leaves the last layer unclipped: give that leaf None as
    axes, or use `optax.masked`. With `scope=scopes.leaf()` and a ratio of 0.3 it is DreamerV3's
    form. Known failure: what starts at zero moves slowly, since its limit is :math:`\lambda
    \epsilon`.

    Args:
        ratio: the share :math:`\lambda`; the larger the batch, the smaller it has to be.
        floor: :math:`\epsilon`, the least that a weight norm counts.
        axes: of a unit, as for `scopes.unit`, whose conventions are those of Flax's layers.
        scope: which numbers share a norm instead of units.
        norm: which norm, of gradients and weights.
        **options: as for `clip`.

    Raises:
        TypeError: `ratio` is not a threshold, or `floor` not a number; or both axes and scope are
            given.
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
    _validate.static("axes", axes)
    _validate.not_both("axes", axes, "scope", scope, "pass scope=scopes.unit(axes) or axes alone")
    return clip(
        thresholds.relative_to_params(ratio, floor=floor),
        scope=scope or scopes.unit(axes),
        norm=norm,
        **options,
    )


@_row
def autoclip(
    q: Any = 0.1,
    *,
    window: int | None = None,
    scope: Scope = scopes.tree(),
    norm: Norm = norms.l2(),
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""AutoClip: a quantile of all norms so far is the limit, :math:`g \min(1, Q_q(\|g_1\|, \dots,
    \|g_t\|) / \|g_t\|)`.

    The statistic sees raw norms, the current one included. State: 8 KiB for each group, exact for
    the first 1024 norms and then within 1 %; with a window, a float for each step in it. With the
    paper's tenth about 90 % of steps are clipped, a little. Known failure: all history weighs the
    same, so a level that changes late is followed late.

    Args:
        q: share of the norms that is not clipped; 0.1 is the paper's advice.
        window: how many norms are remembered instead of all.
        scope: which numbers share a norm.
        norm: which norm.
        **options: as for `clip`.

    Raises:
        TypeError: `q` is not a number, or `window` not an integer.
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
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips at a limit that moves until a share of the norms is within it, :math:`c \leftarrow c
    e^{-\eta (1[s \le c] - q)}`.

    The statistic sees whether raw norms were within. State: three numbers for each group; it
    follows a tenfold rise in 13 steps, a fall in 115. The paper clips examples to the median; 0.9
    is for whole gradients. Known failure: the limit wavers by the rate. It starts at the first
    norm.

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
    scope: Scope = scopes.tree(),
    norm: Norm = norms.l2(),
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""ZClip: a norm :math:`z > z_0` deviations above the mean is set to :math:`\mu + z_0^2 \sigma
    / z`.

    The statistic sees norms cut at its own limit, whatever else limits them. State: five numbers
    for each group. The reference code sets `max_norm=1.0` besides, which in most runs decides; here
    it is off. Known failures: no limit in the first 25 steps, unless `max_norm` is given; and a
    lasting change by many deviations is never accepted, for which there is
    `thresholds.reset_after(thresholds.zscore(), 50)`.

    Args:
        z: :math:`z_0`, 2.5 in the paper.
        decay: of mean and variance, 0.97 in the paper.
        warmup: how many norms they start from, 25 in the paper.
        max_norm: a limit besides, from the first step on.
        scope: which numbers share a norm.
        norm: which norm.
        **options: as for `clip`.

    Raises:
        TypeError: an argument is not a number, or `max_norm` not a threshold.
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
    rule = thresholds.zscore(z, decay=decay, warmup=warmup)
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
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaGC: each leaf is limited to :math:`\lambda \gamma_i`, where :math:`\gamma_i` averages its
    clipped norms.

    At first all is clipped by the global norm, and :math:`\gamma_i` is its least clipped norm; one
    read of the gradients serves both. The statistic sees clipped norms. State: four numbers for
    each leaf. Known failures: :math:`\gamma` rises by 0.1 % a step at most, so 40 % of steady noisy
    steps are clipped, and a tenfold change takes 2300 steps (`thresholds.reset_after`). A leaf
    without gradients is not observed: no limit is zero.

    Args:
        factor: :math:`\lambda`; 1.05 is the paper's, 2 hardly clips.
        decay: of the average, 0.98 in the paper.
        warmup: how many norms of a leaf :math:`\gamma` starts from, which are clipped globally; 100
            in the paper.
        max_norm: the limit to the global norm for those, a number or a schedule.
        scope: which numbers share a norm after those.
        norm: which norm; the global one is the l2 norm of these.
        **options: as for `clip`.

    Raises:
        TypeError: an argument is not a number, or `max_norm` not a threshold.
        ValueError: an argument is out of range.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> clip = optaxclip.adagc(warmup=1, max_norm=5.0)
        >>> state = clip.init([jnp.zeros(1), jnp.zeros(1)])
        >>> for scale in 2.0, 0.9, 1.5:
        ...     updates, state = clip.update([jnp.array([3.0 * scale]), jnp.array([4.0 * scale])], state)
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
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips at :math:`\mu + k \sigma` of the last norms, the current one excluded.

    The statistic sees raw norms. State: a float for each step in the window and group. Levanter
    clips updates by it: after the preconditioner, before the learning rate; it serves gradients as
    well. Known failure: one spike raises the limit until it leaves the window, of 100 times the
    mean to 28 times.

    Args:
        deviations: :math:`k`, 3 in Levanter.
        window: how many norms are remembered, 128 there.
        warmup: how many there must be before there is a limit, 64 there.
        scope: which numbers share a norm.
        norm: which norm.
        **options: as for `clip`.

    Raises:
        TypeError: `deviations` is not a number, or one of the others not an integer.
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
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Sets a norm whose logarithm is :math:`k` deviations above its mean to the geometric mean
    :math:`e^m`.

    The statistic sees raw norms, the current one included. State: five numbers for each group.
    TensorFlow's contrib starts its averages at zero, which crushes the first steps; here they start
    as plain averages (its option with a global step). Known failure: a spike widens what counts as
    usual, of 100 times the mean so much that for some thirty steps a threefold one passes.

    Args:
        deviations: :math:`k`, 2 in TensorFlow's contrib.
        decay: of mean and variance, 0.95 there.
        scope: which numbers share a norm.
        norm: which norm.
        **options: as for `clip`.

    Raises:
        TypeError: one of the two is not a number.
        ValueError: one of the two is out of range.

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
    factor: Any = 1.01, *, scope: Scope = scopes.leaf(), norm: Norm = norms.l2(), **options: Any
) -> optax.GradientTransformationExtraArgs:
    r"""Fira's limiter: no leaf grows by more than a factor a step, :math:`g_t \min(1, \gamma
    \|u_{t-1}\| / \|g_t\|)`.

    The statistic sees clipped norms :math:`\|u\|`, in fact the last of them. State: three numbers
    for each group. Fira limits an update by it, so after the preconditioner, before the learning
    rate. Known failures: with noisy norms it settles below their mean, and after a small one it
    takes 231 steps to climb tenfold. Zeros are not observed, so it is never stuck at zero.

    Args:
        factor: :math:`\gamma`, how many times the last norm the next may be; 1.01 in the paper.
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
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""SPAM's spike clip: cuts each element at :math:`\sqrt{\theta v}`, where :math:`v` averages
    its squares.

    The statistic sees clipped elements. State: one buffer as large as the parameters, besides what
    the optimizer has. SPAM also resets Adam's moments every 500 steps; that is not part of this.
    Known failure: 5000 lets an element be 70 times its usual size in the end, 10 times after 20
    steps. An element that was always zero is not clipped; and a spike in the warm-up is learned
    (`thresholds.ignore_outliers`, for three more buffers).

    Args:
        factor: :math:`\theta`, 5000 in the paper.
        decay: of the average, which starts at zero and is not corrected for that; 0.999 as in Adam.
        warmup: updates without a limit, 20 in the reference code.
        scope: which elements share a limit, learned from their largest.
        **options: as for `clip`.

    Raises:
        TypeError: `factor` or `decay` is not a number, or `warmup` not an integer.
        ValueError: an argument is out of range.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> clip = optaxclip.spam_clip(4.0, decay=0.5, warmup=2)
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
    decay: Any = 0.7,
    square_decay: Any = 0.9,
    scope: Scope = scopes.leaf(),
    norm: Norm = norms.l2(),
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""GradientStabilizer: keeps the direction and replaces the norm, :math:`g\, \hat m / (\|g\|
    \sqrt{\hat v})`.

    :math:`m` and :math:`v` average the norm and its square, corrected for starting at zero; the
    statistic sees raw norms, the current one included. State: five numbers for each group. The new
    norm is about 1 whatever the old one was: 0.95 at a huge spike, 1.41 at most. Known failure:
    after one of 100 times the mean, norms stay below three quarters for 70 steps. Small gradients
    are enlarged, and it belongs before an optimizer that ignores scale (Adam), or with a learning
    rate found for it.

    Args:
        decay: of the mean, 0.7 in the paper (0.85 in bfloat16).
        square_decay: of the mean square, 0.9 in the paper (0.99999 in bfloat16).
        scope: which numbers share a norm.
        norm: which norm.
        **options: as for `clip`.

    Raises:
        TypeError: one of the two is not a number.
        ValueError: one of the two is out of range.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> clip = optaxclip.gradient_stabilizer()
        >>> state = clip.init(jnp.zeros(1))
        >>> for size in 3.0, 3.0, 3e6:
        ...     updates, state = clip.update(jnp.array([size]), state)
        ...     print(f"{updates[0]:.3f}")
        1.000
        1.000
        0.752

    References:
        Huang et al., [Stable-SPAM](https://arxiv.org/abs/2502.17055), 2025.
    """
    rule = thresholds.mean_to_rms(decay=decay, square_decay=square_decay)
    return clip(rule, **{"scope": scope, "norm": norm, "response": responses.normalize, **options})


@_row
def clippy(
    relative: Any = 0.1, *, absolute: Any = 1e-7, scope: Scope = scopes.leaf(), **options: Any
) -> optax.GradientTransformationExtraArgs:
    r"""Clippy: shrinks each leaf until no element of it is over its own budget, :math:`u \min(1,
    \min_j b_j / |u_j|)`.

    :math:`b_j = r |w_j| + a` for an element of a parameter :math:`w_j`, so `update` needs the
    parameters. It is about the step itself: after the learning rate, last in a chain. No state.
    Known failure: one weight near zero holds back its whole leaf, unless :math:`a` allows it to
    move.

    Args:
        relative: :math:`r`, the share of itself by which a weight may change; 0.1 in TensorFlow
            Recommenders.
        absolute: :math:`a`, how much more it may change; 1e-7 there.
        scope: which elements share a factor.
        **options: as for `clip`.

    Raises:
        TypeError: one of the two is not a number.
        ValueError: one of the two is negative; on `update`: the parameters are missing.

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
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""StableAdamW: Adam whose step shrinks where the gradient is larger than its second moment
    knows.

    .. math:: u_i = \frac{\hat m_i / (\sqrt{\hat v_i} + \epsilon) + \lambda w_i}{\max(1, \mathrm{RMS}_i / d)}, \qquad
        \mathrm{RMS}_i = \mathrm{rms}(g_i / \max(\sqrt{\hat v_i}, \epsilon))

    In place of `optax.scale_by_adam`, before the learning rate. The statistic is Adam's :math:`v`,
    which includes the current gradient: no state besides Adam's two buffers. RMS is measured on the
    gradient and not on the step, which momentum smooths. Known failure: at most :math:`1 / \sqrt{1
    - b_2}` is ever cut, 10 with these defaults.

    Args:
        max_rms: :math:`d`, 1 in the paper.
        b1: decay of the mean.
        b2: decay of the mean square.
        eps: least root of the mean square that counts.
        weight_decay: :math:`\lambda`, decoupled and shrunk alike; `update` then needs the
            parameters.
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


@_validate.checks_keywords
def spectral_clip(
    max_norm: Any,
    *,
    response: Response | None = None,
    iterations: int | None = None,
    nonfinite: str = "propagate",
    sharded_over: Any = None,
    record: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips the singular values of each matrix, :math:`U \min(S, c) V^\top`: by value, in its own
    basis.

    With `response=responses.smooth` it is SPECTRA's soft clip, :math:`S / \sqrt{1 + (S / c)^2}`.
    Leading axes are batches, a vector is a matrix of one row. No state. A singular value
    decomposition is exact and slow on accelerators; for the soft clip so many Newton-Schulz
    `iterations` take only products of matrices, and are within 0.1 % while :math:`\|X\|_F / c` is
    below :math:`1.5^{\text{iterations}} / 3`. SPECTRA clips updates by it: after the
    preconditioner, before the learning rate.

    Args:
        max_norm: the limit :math:`c` to singular values.
        response: what happens to singular values that are larger; `responses.rescale` if None.
        iterations: of Newton and Schulz instead of a decomposition, 10 in SPECTRA; for
            `responses.smooth`. What is recorded as the size is then the Frobenius norm.
        nonfinite: as for `clip`, by matrix.
        sharded_over: as for `clip`; a matrix may not be split (under `jit` it may).
        record: as for `clip`.

    Raises:
        TypeError: `max_norm` is not a threshold, or `iterations` not an integer.
        ValueError: `max_norm` is negative or NaN, or `iterations` is given without
                `responses.smooth`; on `update`: a matrix is split along mapped axes.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> clip = optaxclip.spectral_clip(1.0)
        >>> gradient = jnp.array([[3.0, 0.0], [0.0, 0.5]])
        >>> print(clip.update(gradient, clip.init(gradient))[0])
        [[1.  0. ]
         [0.  0.5]]

    References:
        SPECTRA, [arXiv:2603.14315](https://arxiv.org/abs/2603.14315), 2026, for the soft clip.
    """
    limit, response = as_thresholds(max_norm, name="max_norm"), response or responses.rescale
    options = {"nonfinite": nonfinite, "sharded_over": (), "record": record}
    if iterations is None:
        rules = limit.values() if isinstance(limit, dict) else [limit]
        values = clip(limit, scope=scopes.element(), response=response, **options)
        relative = any(rule.uses_params for rule in rules)
        return on_whole_matrices(on_spectra(values, uses_params=relative), sharded_over)
    soft = newton_schulz(response, iterations)
    by_matrix = clip(limit, scope=scopes.unit(matrix_axes), response=soft, **options)
    return on_whole_matrices(by_matrix, sharded_over)
