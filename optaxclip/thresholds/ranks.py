"""Rules that remember ranks: which share of the sizes is smaller than a given size."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from optaxclip import _validate
from optaxclip._naming import named
from optaxclip._types import Context, Threshold
from optaxclip.thresholds import _blocks
from optaxclip.thresholds.combine import ignore_outliers


@named("thresholds")
def quantile(q: float | Array, window: int, *, lagged: bool = False) -> Threshold:
    r"""Learns the raw size: a quantile of the last ones, :math:`c = Q_q(s_{t-w+1}, \dots, s_t)`.

    It interpolates linearly, like `numpy.quantile`. The window includes the current size, so the
    first size is never clipped. Sizes may have either sign.

    Args:
        q: share of the sizes that are smaller, between 0 and 1.
        window: how many sizes to remember, each a float per group.
        lagged: whether to exclude the current size, and to set no limit before the window is full.

    Raises:
        TypeError: `q` is not a number, or `window` is not an integer.
        ValueError: `q` is not between 0 and 1, or `window` is below 1.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> from optaxclip import thresholds
        >>> clip = optaxclip.clip(thresholds.quantile(0.5, window=3), optaxclip.scopes.tree())
        >>> state = clip.init(jnp.zeros(1))
        >>> for size in 1.0, 3.0, 100.0, 2.0:
        ...     updates, state = clip.update(jnp.array([size]), state)
        ...     print(updates)
        [1.]
        [2.]
        [3.]
        [2.]
    """
    _validate.number("q", q, high=1.0, exclusive=True)
    _validate.count("window", window)

    def init(sizes: Array) -> tuple[Array, Array]:
        return _blocks.count(sizes), jnp.full((window, *sizes.shape), jnp.inf, sizes.dtype)

    def learn(
        sizes: Array, clipped_sizes: Array, state: tuple[Array, Array], context: Context
    ) -> tuple[Array, Array]:
        count, last = state
        return jnp.minimum(count + 1, window), _blocks.pushed(sizes, last)

    def limit(sizes: Array, state: tuple[Array, Array], context: Context) -> Array:
        count, last = state if lagged else learn(sizes, sizes, state, context)
        ordered = jnp.sort(last, 0)
        limits = _interpolated(lambda rank: _take(ordered, rank), q, count)
        return jnp.where(count < window, jnp.inf, limits) if lagged else limits

    return ignore_outliers(Threshold(init, limit, learn, signed=True))


class Sketch(NamedTuple):
    """Ranks of a whole history, in arrays whose last axes are the axes of the sizes.

    Attributes:
        first: `[1024, ...]`, the first sizes in ascending order; `inf` in empty slots.
        origin: logarithm of the size at the middle of the bins.
        counts: int32 `[1024, ...]`, how many sizes were in this bin or a lower one.
    """

    first: Array
    origin: Array
    counts: Array


FIRST, BINS = 1024, 1024
WIDTH = 2 * math.log(1.01)  # of a bin, in logarithms: every size in it is within 1 % of its middle


def middle(origin: Any, number: Any) -> Any:
    """Returns the logarithm of the middle of a bin; bins are numbered from 0."""
    return origin + (number - BINS // 2 + 0.5) * WIDTH


@named("thresholds")
def quantile_sketch(q: float | Array) -> Threshold:
    r"""Learns the raw size: a quantile of the whole history, :math:`c = Q_q(s_1, \dots, s_t)`.

    The first 1024 sizes are kept, so the quantile is exact (like `numpy.quantile`). After that it
    is within 1 % of the two sizes that it is interpolated from. Sizes are counted in logarithmic
    bins. The middle of the bins starts at the first size and follows the quantile. A size more than
    a factor of 26 000 from the middle counts in the outermost bin. State: 8 KiB per group, 1024
    floats and 1024 integers. The counts are halved before they overflow, first after :math:`2^{30}`
    sizes.

    Args:
        q: share of the sizes that are smaller, between 0 and 1.

    Raises:
        TypeError: `q` is not a number.
        ValueError: `q` is not between 0 and 1.

    References:
        Masson, Rim and Lee, [DDSketch](https://arxiv.org/abs/1908.10693), 2019, for the bins.
    """
    _validate.number("q", q, high=1.0, exclusive=True)

    def learn(sizes: Array, clipped_sizes: Array, state: Sketch, context: Context) -> Sketch:
        return _centred(_with(state, sizes), q)

    def limit(sizes: Array, state: Sketch, context: Context) -> Array:
        first, origin, counts = learn(sizes, sizes, state, context)
        exact = _interpolated(lambda rank: _take(first, rank), q, jnp.minimum(counts[-1], FIRST))

        def rounded(rank: Array) -> Array:
            return jnp.exp(middle(origin, _bin(counts, rank)))

        return jnp.where(counts[-1] <= FIRST, exact, _interpolated(rounded, q, counts[-1]))

    return ignore_outliers(Threshold(_empty, limit, learn))


@named("thresholds")
def quantile_tracker(
    q: float | Array = 0.9, rate: float | Array = 0.2, *, initial: float | Array | None = None
) -> Threshold:
    r"""Learns whether the raw size was within the limit, and moves the limit accordingly.

    .. math:: c \leftarrow c \exp(-\eta (1[s \le c] - q))

    The limit settles where a share :math:`q` of the sizes is within it. State: one float per group.
    The limit starts at the first size; after that it does not depend on the current size.

    Args:
        q: share of the sizes that shall be within the limit, between 0 and 1.
        rate: :math:`\eta`; per step the limit rises by a factor of :math:`e^{\eta q}` or falls by
            :math:`e^{\eta (1 - q)}`.
        initial: the first limit; None for the first size.

    Raises:
        TypeError: an argument is not a number.
        ValueError: `q` is not between 0 and 1, or `rate` or `initial` is not positive.

    References:
        Andrew, Thakkar, McMahan and Ramaswamy, [Differentially private learning with adaptive
        clipping](https://arxiv.org/abs/1905.03871), 2019.
    """
    _validate.number("q", q, high=1.0, exclusive=True)
    _validate.number("rate", rate, exclusive=True)
    if initial is not None:
        _validate.number("initial", initial, exclusive=True)

    def limit(sizes: Array, level: Array, context: Context) -> Array:
        return jnp.where(level > 0, level, sizes if initial is None else initial)

    def learn(sizes: Array, clipped_sizes: Array, level: Array, context: Context) -> Array:
        level = limit(sizes, level, context)
        return level * jnp.exp(-rate * ((sizes <= level) - q))

    return ignore_outliers(Threshold(jnp.zeros_like, limit, learn))


class History(NamedTuple):
    """State of `remember`, in arrays whose last axes are the axes of the sizes.

    Attributes:
        last: `[window, ...]`, the last sizes, newest first; 0 in empty slots.
        sketch: ranks of all sizes.
    """

    last: Array
    sketch: Sketch


def remember(window: int) -> Threshold:
    r"""Learns the raw size and sets no limit, :math:`c = \infty`.

    The state holds the last sizes, and a sketch of all sizes as in `quantile_sketch`.

    Args:
        window: how many of the last sizes to remember, each a float per group.

    Raises:
        TypeError: `window` is not an integer.
        ValueError: `window` is below 1.
    """
    _validate.count("window", window)

    def learn(sizes: Array, clipped_sizes: Array, state: History, context: Context) -> History:
        return History(_blocks.pushed(sizes, state.last), _centred(_with(state.sketch, sizes), 0.5))

    return Threshold(
        init=lambda sizes: History(jnp.zeros((window, *sizes.shape), sizes.dtype), _empty(sizes)),
        limit=lambda sizes, state, context: jnp.full_like(sizes, jnp.inf),
        learn=learn,
    )


def _empty(sizes: Array) -> Sketch:
    first = jnp.full((FIRST, *sizes.shape), jnp.inf, sizes.dtype)
    return Sketch(first, jnp.zeros_like(sizes), jnp.zeros((BINS, *sizes.shape), jnp.int32))


def _with(sketch: Sketch, sizes: Array) -> Sketch:
    """Adds one size to the sketch."""
    first, origin, counts = sketch
    logarithm = _blocks.logarithm(sizes)
    origin = jnp.where(counts[-1] == 0, logarithm, origin)
    bin_of = jnp.floor((logarithm - origin) / WIDTH) + BINS // 2
    bin_of = jnp.clip(bin_of, 0, BINS - 1).astype(jnp.int32)
    counts = jnp.where(counts[-1] < 2**30, counts, counts // 2) + (bin_of <= _blocks.rows(counts))
    # inserts the size into the sorted array; one that is larger than all of a full array drops out
    below = jnp.concatenate([jnp.zeros_like(first[:1]), first[:-1]])
    return Sketch(jnp.maximum(below, jnp.minimum(first, sizes)), origin, counts)


def _centred(sketch: Sketch, q: float | Array) -> Sketch:
    """Moves the bins by one if the quantile has left their middle half.

    At the end that is cut off, two bins become one.
    """
    first, origin, counts = sketch
    lean = _bin(counts, jnp.asarray(q * (counts[-1] - 1), jnp.int32)) - BINS // 2
    up = jnp.concatenate([counts[1:], counts[-1:]])
    down = jnp.concatenate([jnp.zeros_like(counts[:1]), counts[:-2], counts[-1:]])
    above, under = lean > BINS // 4, lean < -BINS // 4
    moved = jnp.where(above, up, jnp.where(under, down, counts))
    return Sketch(first, origin + WIDTH * (above.astype(origin.dtype) - under), moved)


def _bin(counts: Array, rank: Array) -> Array:
    """Returns the bin of the size with this rank; ranks are counted from 0."""
    return jnp.minimum(jnp.sum(counts <= rank, 0, dtype=jnp.int32), BINS - 1)


def _interpolated(size_at: Callable[[Array], Array], q: float | Array, count: Array) -> Array:
    """Interpolates the quantile between the two sizes next to its rank."""
    last = jnp.maximum(count - 1, 0)
    rank = q * last
    lower = jnp.clip(jnp.floor(rank).astype(jnp.int32), 0, last)
    below, above = size_at(lower), size_at(jnp.minimum(lower + 1, last))
    return below + (rank - lower) * (above - below)


def _take(ordered: Array, rank: Array) -> Array:
    """Returns the size with this rank, counted from 0."""
    return jnp.sum(jnp.where(_blocks.rows(ordered) == rank, ordered, 0), 0)
