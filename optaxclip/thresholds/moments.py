"""Rules that remember averages of the sizes: their mean, their deviation, the last size.

All arithmetic is relative or in logarithms, so a rule behaves the same at every scale. A deviation
counts as at least a thousandth of the mean: sizes that hardly vary have no spikes.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from optaxclip import _validate
from optaxclip._naming import named
from optaxclip._numerics import share
from optaxclip._types import Context, Threshold
from optaxclip.thresholds import _blocks
from optaxclip.thresholds.combine import ignore_outliers

LEAST_DEVIATION = 1e-3
STARTS = ("mean", "least")
OPTIONS = ("adaptive_scaling", "mean", "percentile")


class Moments(NamedTuple):
    """Count, mean and standard deviation of the sizes: arrays of their shape.

    Attributes:
        seen: int32, how many sizes.
        mean: mean of the sizes.
        deviation: their standard deviation; it overflows no sooner than the sizes.
    """

    seen: Array
    mean: Array
    deviation: Array


class LogMoments(NamedTuple):
    """Count, mean and variance of the logarithms of the sizes: arrays of their shape.

    Attributes:
        seen: int32, how many sizes.
        mean: mean of the logarithms.
        variance: variance of the logarithms.
    """

    seen: Array
    mean: Array
    variance: Array


@named("thresholds")
def ema(
    factor: float | Array = 1.05,
    *,
    decay: float | Array = 0.98,
    warmup: int | Array = 1,
    start: Literal["mean", "least"] = "mean",
    of: Literal["clipped", "raw"] = "clipped",
) -> Threshold:
    r"""Learns the clipped size: the limit is a multiple of its exponential moving average.

    .. math:: c = \lambda \gamma, \qquad
        \gamma \leftarrow \beta \gamma + (1 - \beta) \min(s, \lambda \gamma)

    The average starts as the mean or the minimum of the first sizes, which are not limited. It
    grows by at most a factor of :math:`\beta + (1 - \beta) \lambda` per step; with the defaults it
    takes 693 steps to double. With `of="raw"` it averages :math:`s` itself, so it follows a lasting
    change in about :math:`1 / (1 - \beta)` steps.

    Args:
        factor: :math:`\lambda`, how many times the average a size may be.
        decay: :math:`\beta`.
        warmup: how many sizes the average starts from, at least one.
        start: whether it starts as the `"mean"` or the `"least"` of these sizes.
        of: whether to average `"clipped"` or `"raw"` sizes.

    Raises:
        TypeError: `factor` or `decay` is not a number, or `warmup` is not an integer.
        ValueError: a number is out of range, or `start` or `of` is another word.

    References:
        Wang et al., [AdaGC](https://arxiv.org/abs/2502.11034), 2025, with `start="least"`.
    """
    _validate.number("factor", factor)
    _validate.number("decay", decay, high=1.0, exclusive=True)
    _validate.count("warmup", warmup, traced=True)
    _validate.option("start", start, STARTS)
    _validate.option("of", of, ("clipped", "raw"))

    def limit(sizes: Array, state: tuple[Array, Array], context: Context) -> Array:
        count, average = state
        return jnp.where(_blocks.is_early(count, warmup), jnp.inf, factor * average)

    def learn(
        sizes: Array, clipped_sizes: Array, state: tuple[Array, Array], context: Context
    ) -> tuple[Array, Array]:
        count, average = state
        seen = sizes if of == "raw" else clipped_sizes
        mean = average + (seen - average) / (count + 1)
        least = jnp.where(count == 0, seen, jnp.minimum(average, seen))
        moved = decay * average + (1 - decay) * seen
        first = mean if start == "mean" else least
        return _blocks.one_more(count), jnp.where(_blocks.is_early(count, warmup), first, moved)

    return ignore_outliers(
        Threshold(lambda sizes: (_blocks.count(sizes), jnp.zeros_like(sizes)), limit, learn)
    )


@named("thresholds")
def zscore(
    z: float | Array = 2.5,
    *,
    decay: float | Array = 0.97,
    warmup: int | Array = 25,
    option: Literal["adaptive_scaling", "mean", "percentile"] = "adaptive_scaling",
) -> Threshold:
    r"""Learns the size clipped at this limit: larger spikes get lower limits.

    .. math:: z = (s - \mu) / \sigma, \qquad
        c = \mu + z_0^2 \sigma / z \text{ if } z > z_0 \text{, else } \infty

    A size more than :math:`z_0` standard deviations above the mean is a spike. :math:`\mu` and
    :math:`\sigma^2` start as the mean and variance of the first sizes, which are not limited; then
    they are moving averages. Sizes may have either sign. Known failure: a lasting change by many
    deviations is never accepted; see `reset_after`.

    Args:
        z: :math:`z_0`, the number of deviations above the mean at which a spike begins.
        decay: decay of the averages.
        warmup: how many sizes the averages start from, at least one.
        option: the limit of a spike: `"adaptive_scaling"` as above, the `"mean"` :math:`\mu`, or
            `"percentile"`, which is the plain :math:`\mu + z_0 \sigma` (the reference code's word).

    Raises:
        TypeError: `z` or `decay` is not a number, or `warmup` is not an integer.
        ValueError: a number is out of range, or `option` is another word.

    References:
        Kumar et al., [ZClip](https://arxiv.org/abs/2504.02507), 2025.
    """
    _validate.number("z", z)
    _validate.number("decay", decay, high=1.0, exclusive=True)
    _validate.count("warmup", warmup, traced=True)
    _validate.option("option", option, OPTIONS)

    def limit(sizes: Array, state: Moments, context: Context) -> Array:
        unit = _unit(jnp.maximum(jnp.abs(state.mean), state.deviation))
        size, mean, deviation = (share(x, unit) for x in (sizes, state.mean, state.deviation))
        deviation = jnp.maximum(deviation, LEAST_DEVIATION * jnp.abs(mean))
        early, above = _blocks.is_early(state.seen, warmup), size - mean
        if option == "percentile":
            return jnp.where(early, jnp.inf, (mean + z * deviation) * unit)
        spike = ~early & (above > z * deviation)
        over = (z * deviation) ** 2 / jnp.where(spike, above, 1)
        return jnp.where(spike, (mean if option == "mean" else mean + over) * unit, jnp.inf)

    def learn(sizes: Array, clipped_sizes: Array, state: Moments, context: Context) -> Moments:
        cut = jnp.minimum(sizes, limit(sizes, state, context))
        early = _blocks.is_early(state.seen, warmup)
        mean = jnp.where(state.seen > 0, state.mean, cut)
        weight = jnp.where(early, 1 / (state.seen + 1), 1 - decay)
        offset = cut - mean
        # the paper's moving variance takes both deviations from the new mean; in the warm-up the
        # variance is exact
        new = weight * (1 - weight) * jnp.where(early, 1, 1 - weight)
        deviation = _root_of_squares(1 - weight, state.deviation, new, offset)
        return Moments(_blocks.one_more(state.seen), mean + weight * offset, deviation)

    return ignore_outliers(Threshold(_nothing(Moments), limit, learn, signed=True))


@named("thresholds")
def log_zscore(deviations: float | Array = 2.0, *, decay: float | Array = 0.95) -> Threshold:
    r"""Learns the raw size's logarithm: outliers are set to the geometric mean.

    .. math:: \log s \ge m + k \sigma \;\Rightarrow\; c = e^m \text{, else } \infty

    :math:`m` and :math:`\sigma` are the mean and deviation of the logarithms, by exponential moving
    averages that include the current size. For the first :math:`1 / (1 - \beta)` sizes they are
    plain averages instead, where :math:`\beta` is the decay.

    Args:
        deviations: :math:`k`. Among fewer than :math:`k^2 + 1` sizes none can be that many
            deviations above the mean.
        decay: :math:`\beta`, decay of the averages.

    Raises:
        TypeError: `deviations` or `decay` is not a number.
        ValueError: `deviations` or `decay` is out of range.

    References:
        Chorowski et al., [End-to-end continuous speech recognition using attention-based recurrent
        NN](https://arxiv.org/abs/1412.1602), 2014; `adaptive_clipping_fn` of TensorFlow's contrib.
    """
    _validate.number("deviations", deviations)
    _validate.number("decay", decay, high=1.0, exclusive=True)

    def learn(
        sizes: Array, clipped_sizes: Array, state: LogMoments, context: Context
    ) -> LogMoments:
        weight = jnp.maximum(1 - decay, 1 / (state.seen + 1)).astype(sizes.dtype)
        offset = _blocks.logarithm(sizes) - state.mean
        variance = (1 - weight) * (state.variance + weight * offset**2)
        return LogMoments(_blocks.one_more(state.seen), state.mean + weight * offset, variance)

    def limit(sizes: Array, state: LogMoments, context: Context) -> Array:
        now = learn(sizes, sizes, state, context)
        # TensorFlow's contrib has the same floor, a deviation of 1e-4
        trigger = now.mean + deviations * jnp.sqrt(jnp.maximum(now.variance, 1e-8))
        return jnp.where(_blocks.logarithm(sizes) >= trigger, jnp.exp(now.mean), jnp.inf)

    return ignore_outliers(Threshold(_nothing(LogMoments), limit, learn))


@named("thresholds")
def window_zscore(
    deviations: float | Array = 3.0, *, window: int = 128, warmup: int | Array = 64
) -> Threshold:
    r"""Learns the raw size: the limit is mean plus deviations of the last sizes.

    .. math:: c = \mu + k \sigma

    The window excludes the current size. Sizes may have either sign. Known failure: one spike
    raises the limit until the spike leaves the window.

    Args:
        deviations: :math:`k`.
        window: how many of the last sizes to remember, each a float per group.
        warmup: how many sizes to see before there is a limit, at most `window`.

    Raises:
        TypeError: `deviations` is not a number, or `window` or `warmup` is not an integer.
        ValueError: an argument is out of range.
    """
    _validate.number("deviations", deviations)
    _validate.count("window", window)
    _validate.count("warmup", warmup, high=window, traced=True)

    def limit(sizes: Array, state: tuple[Array, Array], context: Context) -> Array:
        count, last = state
        n, unit = jnp.maximum(count, 1), _unit(jnp.max(jnp.abs(last), 0))
        last = share(last, unit)
        mean = jnp.sum(last / n, 0)  # slots that are not filled yet hold zeros
        squares = jnp.where(_blocks.rows(last) < count, last - mean, 0) ** 2
        variance = jnp.maximum(jnp.sum(squares / n, 0), (LEAST_DEVIATION * mean) ** 2)
        early = _blocks.is_early(count, jnp.minimum(warmup, window))
        return jnp.where(early, jnp.inf, (mean + deviations * _root(variance)) * unit)

    def learn(
        sizes: Array, clipped_sizes: Array, state: tuple[Array, Array], context: Context
    ) -> tuple[Array, Array]:
        count, last = state
        return jnp.minimum(count + 1, window), _blocks.pushed(sizes, last)

    return ignore_outliers(
        Threshold(
            lambda sizes: (_blocks.count(sizes), jnp.zeros((window, *sizes.shape), sizes.dtype)),
            limit,
            learn,
            signed=True,
        )
    )


@named("thresholds")
def growth(factor: float | Array = 1.01) -> Threshold:
    r"""Learns the clipped size: the limit is a multiple of it, :math:`c = \gamma s_{t-1}`.

    The first size is not limited. Known failure: after a small gradient it takes :math:`\ln r / \ln
    \gamma` steps to grow by a factor of :math:`r`, which is 231 steps for tenfold.

    Args:
        factor: :math:`\gamma`, the largest ratio of one size to the one before.

    Raises:
        TypeError: `factor` is not a number.
        ValueError: `factor` is negative or NaN.

    References:
        Chen et al., [Fira](https://arxiv.org/abs/2410.01623), 2024.
    """
    _validate.number("factor", factor)
    return ignore_outliers(
        Threshold(
            init=jnp.zeros_like,
            limit=lambda sizes, last, context: jnp.where(last > 0, factor * last, jnp.inf),
            learn=lambda sizes, clipped_sizes, last, context: clipped_sizes,
        )
    )


@named("thresholds")
def rms_multiple(
    factor: float | Array = 5000.0, *, decay: float | Array = 0.999, warmup: int | Array = 20
) -> Threshold:
    r"""Learns the clipped size: the limit is a multiple of its root mean square.

    .. math:: c = \sqrt{\theta v}, \qquad v \leftarrow \beta v + (1 - \beta) \min(s, c)^2

    :math:`v` starts at zero and is not corrected for that. Where it is zero there is no limit. The
    state is :math:`\sqrt v`, one float per size; it over- or underflows no sooner than the sizes.

    Args:
        factor: :math:`\theta`.
        decay: :math:`\beta`.
        warmup: the first update that has a limit; there is none before it.

    Raises:
        TypeError: `factor` or `decay` is not a number, or `warmup` is not an integer.
        ValueError: an argument is out of range.

    References:
        Huang et al., [SPAM](https://arxiv.org/abs/2501.06842), 2025.
    """
    _validate.number("factor", factor)
    _validate.number("decay", decay, high=1.0, exclusive=True)
    _validate.count("warmup", warmup, low=0, traced=True)

    def limit(sizes: Array, root: Array, context: Context) -> Array:
        return jnp.where(
            (context.step + 1 >= warmup) & (root > 0), jnp.sqrt(factor) * root, jnp.inf
        )

    return Threshold(
        init=jnp.zeros_like,
        limit=limit,
        learn=lambda sizes, clipped_sizes, root, context: _mean_square_root(
            root, clipped_sizes, decay
        ),
    )


@named("thresholds")
def mean_to_rms(*, decay: float | Array = 0.6, square_decay: float | Array = 0.999) -> Threshold:
    r"""Learns the raw size: its mean over its root mean square, :math:`c = \hat m / \sqrt{\hat v}`.

    Both are moving averages that include the current size, corrected for starting at zero. The
    limit has no unit: it is 1 for steady sizes. At a huge spike it is

    .. math:: (1 - \beta_1) / \sqrt{1 - \beta_2},

    12.6 with the defaults. It is meant for the response `normalize`.

    Args:
        decay: :math:`\beta_1`, decay of the mean :math:`m`.
        square_decay: :math:`\beta_2`, decay of the mean square :math:`v`.

    Raises:
        TypeError: `decay` or `square_decay` is not a number.
        ValueError: `decay` or `square_decay` is out of range.

    References:
        Huang et al., [Stable-SPAM](https://arxiv.org/abs/2502.17055), 2025.
    """
    _validate.number("decay", decay, high=1.0, exclusive=True)
    _validate.number("square_decay", square_decay, high=1.0, exclusive=True)

    def learn(
        sizes: Array, clipped_sizes: Array, state: tuple[Array, Array, Array], context: Context
    ) -> tuple[Array, Array, Array]:
        count, mean, root = state
        mean = jnp.asarray(decay * mean + (1 - decay) * sizes)
        return _blocks.one_more(count), mean, _mean_square_root(root, sizes, square_decay)

    def limit(sizes: Array, state: tuple[Array, Array, Array], context: Context) -> Array:
        count, mean, root = learn(sizes, sizes, state, context)

        def weight(decay: float | Array) -> Array:
            return -jnp.expm1(count * jnp.log(jnp.asarray(decay, sizes.dtype)))

        known = root > 0
        # divide both by the root first, so that the derivative does not overflow
        ratio = share(mean, root) / jnp.where(known, share(root, root), 1)
        return jnp.where(known, ratio * jnp.sqrt(weight(square_decay)) / weight(decay), jnp.inf)

    return ignore_outliers(
        Threshold(
            lambda sizes: (_blocks.count(sizes), jnp.zeros_like(sizes), jnp.zeros_like(sizes)),
            limit,
            learn,
        )
    )


def _nothing(kind: Callable[..., Any]) -> Callable[[Array], Any]:
    """Returns the `init` of a rule that remembers such moments."""
    return lambda sizes: kind(_blocks.count(sizes), jnp.zeros_like(sizes), jnp.zeros_like(sizes))


def _unit(top: Array) -> Array:
    """Returns the largest magnitude as a unit to compute in; 1 where all are zero."""
    return jax.lax.stop_gradient(jnp.where(top > 0, top, 1))  # only a scale


def _mean_square_root(root: Array, size: Array, decay: float | Array) -> Array:
    """Returns the root of the moving average of squares."""
    return _root_of_squares(decay, root, 1 - decay, size)


def _root_of_squares(a: Any, x: Array, b: Any, y: Array) -> Array:
    """Returns `sqrt(a x^2 + b y^2)`, without a square that over- or underflows."""
    unit = _unit(jnp.maximum(jnp.abs(x), jnp.abs(y)))
    return unit * _root(a * share(x, unit) ** 2 + b * share(y, unit) ** 2)


def _root(square: Array) -> Array:
    """Returns the square root, whose derivative at 0 is 0, not infinity."""
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)
