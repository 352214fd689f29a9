"""Rules that remember averages of the sizes: their mean, their deviation, the last one.

All arithmetic is relative to the mean or in logarithms, so that a rule does the same at every
scale, and a deviation never counts as less than a thousandth of the mean: what hardly varies has no
spikes.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from optaxclip import _validate
from optaxclip._numerics import share
from optaxclip._types import Context, Threshold
from optaxclip.thresholds import _blocks
from optaxclip.thresholds.combine import ignore_outliers

LEAST_DEVIATION = 1e-3
STARTS = ("mean", "least")


class Moments(NamedTuple):
    """Arrays of the block's shape.

    Attributes:
        seen: int32, how many sizes.
        mean: of the sizes, or of their logarithms.
        variance: of the sizes divided by their mean, or of their logarithms.
    """

    seen: Array
    mean: Array
    variance: Array


def ema(
    factor: float | Array = 1.05,
    *,
    decay: float | Array = 0.98,
    warmup: int | Array = 1,
    start: Literal["mean", "least"] = "mean",
    of: Literal["clipped", "raw"] = "clipped",
) -> Threshold:
    r"""Learns the clipped size: a multiple of its exponential moving average, :math:`c = \lambda
    \gamma`.

    .. math:: \gamma \leftarrow \beta \gamma + (1 - \beta) \min(s, \lambda \gamma)

    The average starts as the mean or the least of the first sizes, which are not limited here. It
    rises by no more than :math:`\beta + (1 - \beta) \lambda` a step: 693 steps to double with the
    defaults. With `of="raw"` it averages :math:`s` itself, so it follows a lasting change in about
    :math:`1 / (1 - \beta)` steps.

    Args:
        factor: :math:`\lambda`, how many times the average a size may be.
        decay: :math:`\beta`.
        warmup: how many sizes the average starts from, at least one.
        start: `"mean"` or `"least"` of them.
        of: which sizes the average is of, `"clipped"` or `"raw"`.

    Raises:
        TypeError: `factor` or `decay` is not a number, or `warmup` not an integer.
        ValueError: one of them is out of range, or `start` or `of` is another word.

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


def zscore(
    z: float | Array = 2.5, *, decay: float | Array = 0.97, warmup: int | Array = 25
) -> Threshold:
    r"""Learns the size cut at its own limit: what is over :math:`z_0` deviations is a spike, and
    the higher the lower cut.

    .. math:: z = (s - \mu) / \sigma, \qquad c = \mu + z_0^2 \sigma / z \text{ if } z > z_0 \text{, else } \infty

    :math:`\mu` and :math:`\sigma^2` are those of the first sizes, which are not limited, then
    moving averages. Known failure: a lasting change by many deviations is never accepted; see
    `reset_after`.

    Args:
        z: :math:`z_0`, deviations above the mean from which on a size is a spike.
        decay: of the averages.
        warmup: how many sizes they start from, at least one.

    Raises:
        TypeError: `z` or `decay` is not a number, or `warmup` not an integer.
        ValueError: one of them is out of range.

    References:
        Kumar et al., [ZClip](https://arxiv.org/abs/2504.02507), 2025.
    """
    _validate.number("z", z)
    _validate.number("decay", decay, high=1.0, exclusive=True)
    _validate.count("warmup", warmup, traced=True)

    def limit(sizes: Array, state: Moments, context: Context) -> Array:
        mean = jnp.where(state.seen > 0, state.mean, 1)
        deviation = _deviation(state.variance)
        score = (sizes / mean - 1) / deviation
        spike = ~_blocks.is_early(state.seen, warmup) & (score > z)
        return jnp.where(
            spike, mean * (1 + z * z * deviation / jnp.where(spike, score, 1)), jnp.inf
        )

    def learn(sizes: Array, clipped_sizes: Array, state: Moments, context: Context) -> Moments:
        cut = jnp.minimum(sizes, limit(sizes, state, context))
        early, mean = (
            _blocks.is_early(state.seen, warmup),
            jnp.where(state.seen > 0, state.mean, cut),
        )
        weight = jnp.where(early, 1 / (state.seen + 1), 1 - decay)
        offset = cut / mean - 1
        growth = 1 + weight * offset
        # The paper's moving variance is about the new mean on both sides; that of the first sizes
        # is the exact one.
        square = offset**2 * (1 - weight) * jnp.where(early, 1, 1 - weight)
        variance = ((1 - weight) * state.variance + weight * square) / growth**2
        return Moments(_blocks.one_more(state.seen), mean * growth, variance)

    return ignore_outliers(Threshold(_no_moments, limit, learn))


def log_zscore(deviations: float | Array = 2.0, *, decay: float | Array = 0.95) -> Threshold:
    r"""Learns the raw size's logarithm: a size :math:`k` deviations above its mean goes back to the
    geometric mean.

    .. math:: \log s \ge m + k \sigma \;\Rightarrow\; c = e^m \text{, else } \infty

    :math:`m` and :math:`\sigma` are moving averages that include the current size, and plain ones
    as long as those weigh it more (the first `1 / (1 - decay)` sizes).

    Args:
        deviations: :math:`k`; with fewer than :math:`k^2 + 1` sizes seen, none can be so many
            deviations off.
        decay: of the averages.

    Raises:
        TypeError: one of the two is not a number.
        ValueError: one of the two is out of range.

    References:
        Chorowski et al., [End-to-end continuous speech recognition using attention-based recurrent
        NN](https://arxiv.org/abs/1412.1602), 2014; `adaptive_clipping_fn` of TensorFlow's contrib.
    """
    _validate.number("deviations", deviations)
    _validate.number("decay", decay, high=1.0, exclusive=True)

    def learn(sizes: Array, clipped_sizes: Array, state: Moments, context: Context) -> Moments:
        weight = jnp.maximum(1 - decay, 1 / (state.seen + 1)).astype(sizes.dtype)
        offset = _blocks.logarithm(sizes) - state.mean
        variance = (1 - weight) * (state.variance + weight * offset**2)
        return Moments(_blocks.one_more(state.seen), state.mean + weight * offset, variance)

    def limit(sizes: Array, state: Moments, context: Context) -> Array:
        now = learn(sizes, sizes, state, context)
        # The original's floor, a deviation of 1e-4.
        trigger = now.mean + deviations * jnp.sqrt(jnp.maximum(now.variance, 1e-8))
        return jnp.where(_blocks.logarithm(sizes) >= trigger, jnp.exp(now.mean), jnp.inf)

    return ignore_outliers(Threshold(_no_moments, limit, learn))


def window_zscore(
    deviations: float | Array = 3.0, *, window: int = 128, warmup: int | Array = 64
) -> Threshold:
    r"""Learns the raw size: so many deviations above the mean of the last ones, :math:`c = \mu + k
    \sigma`.

    The current size is not among them. Known failure: one spike raises the limit until it leaves
    the window.

    Args:
        deviations: :math:`k`.
        window: how many of the last sizes are remembered, each a float per group.
        warmup: how many there must be before there is a limit, at most `window`.

    Raises:
        TypeError: `deviations` is not a number, or one of the others not an integer.
        ValueError: one of them is out of range.
    """
    _validate.number("deviations", deviations)
    _validate.count("window", window)
    _validate.count("warmup", warmup, high=window, traced=True)

    def limit(sizes: Array, state: tuple[Array, Array], context: Context) -> Array:
        count, last = state
        n = jnp.maximum(count, 1)
        mean = jnp.where(count > 0, jnp.sum(last / n, 0), 1)
        # zeros are places not yet filled
        variance = jnp.sum(jnp.where(last > 0, last / mean - 1, 0) ** 2, 0) / n
        early = _blocks.is_early(count, jnp.minimum(warmup, window))
        return jnp.where(early, jnp.inf, mean * (1 + deviations * _deviation(variance)))

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
        )
    )


def growth(factor: float | Array = 1.01) -> Threshold:
    r"""Learns the clipped size: no more than a multiple of the last one, :math:`c = \gamma
    \|g_{t-1}\|`.

    The first is not limited. Known failure: after a small gradient it takes :math:`\ln r / \ln
    \gamma` steps to grow by :math:`r` again, 231 to tenfold.

    Args:
        factor: :math:`\gamma`, how many times the last size the next may be.

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


def rms_multiple(
    factor: float | Array = 5000.0, *, decay: float | Array = 0.999, warmup: int | Array = 20
) -> Threshold:
    r"""Learns the clipped size: so many times its mean square, :math:`c = \sqrt{\theta v}`.

    .. math:: v \leftarrow \beta v + (1 - \beta) \min(s, c)^2

    :math:`v` starts at zero and is not corrected for that. It is one float for each size and is
    kept as its root, which leaves the float range no sooner than the sizes do. Where it is zero
    there is no limit.

    Args:
        factor: :math:`\theta`.
        decay: :math:`\beta`.
        warmup: number of updates without a limit.

    Raises:
        TypeError: `factor` or `decay` is not a number, or `warmup` not an integer.
        ValueError: one of them is out of range.

    References:
        Huang et al., [SPAM](https://arxiv.org/abs/2501.06842), 2025.
    """
    _validate.number("factor", factor)
    _validate.number("decay", decay, high=1.0, exclusive=True)
    _validate.count("warmup", warmup, low=0, traced=True)

    def limit(sizes: Array, root: Array, context: Context) -> Array:
        return jnp.where((context.step >= warmup) & (root > 0), jnp.sqrt(factor) * root, jnp.inf)

    return Threshold(
        init=jnp.zeros_like,
        limit=limit,
        learn=lambda sizes, clipped_sizes, root, context: _mean_square_root(
            root, clipped_sizes, decay
        ),
    )


def mean_to_rms(*, decay: float | Array = 0.7, square_decay: float | Array = 0.9) -> Threshold:
    r"""Learns the raw size: its mean over its root mean square, :math:`c = \hat m / \sqrt{\hat v}`.

    Both are moving averages that include the current size, corrected for starting at zero. The
    limit has no unit: it is 1 for steady sizes; with the defaults 0.95 at a huge spike, and 1.41 at
    most. It is meant for the response `normalize`.

    Args:
        decay: of the mean :math:`m`.
        square_decay: of the mean square :math:`v`.

    Raises:
        TypeError: one of the two is not a number.
        ValueError: one of the two is out of range.

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
        # shares, so that derivatives stay floats
        ratio = share(mean, root) / jnp.where(known, share(root, root), 1)
        return jnp.where(known, ratio * jnp.sqrt(weight(square_decay)) / weight(decay), jnp.inf)

    return ignore_outliers(
        Threshold(
            lambda sizes: (_blocks.count(sizes), jnp.zeros_like(sizes), jnp.zeros_like(sizes)),
            limit,
            learn,
        )
    )


def _no_moments(sizes: Array) -> Moments:
    return Moments(_blocks.count(sizes), jnp.zeros_like(sizes), jnp.zeros_like(sizes))


def _deviation(variance: Array) -> Array:
    return jnp.sqrt(jnp.maximum(variance, LEAST_DEVIATION**2))


def _mean_square_root(root: Array, size: Array, decay: float | Array) -> Array:
    """Root of the moving average of squares, which are taken relative to the larger, so that none
    leaves the float range.
    """
    top = jax.lax.stop_gradient(jnp.maximum(root, size))  # only a scale
    mean = decay * share(root, top) ** 2 + (1 - decay) * share(size, top) ** 2
    return top * jnp.sqrt(jnp.where(top > 0, mean, 1))
