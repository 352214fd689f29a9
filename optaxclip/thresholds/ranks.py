"""Rules that remember ranks: which share of the sizes is smaller, whatever their scale."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from optaxclip import _validate
from optaxclip._types import Context, Threshold
from optaxclip.thresholds import _blocks
from optaxclip.thresholds.combine import ignore_outliers


def quantile(q: float | Array, window: int, *, lagged: bool = False) -> Threshold:
    r"""Learns the raw size: a quantile of the last ones, :math:`c = Q_q(s_{t-w+1}, \dots, s_t)`.

    As `numpy.quantile`, with linear interpolation. The current size is among them, so the first is
    never clipped.

    Args:
        q: share of the sizes that are smaller, between 0 and 1.
        window: how many are remembered, each a float per group.
        lagged: leave the current size out, and set no limit before the window is full.

    Raises:
        TypeError: `q` is not a number, or `window` not an integer.
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
        found = _interpolated(lambda rank: _take(ordered, rank), q, count)
        return jnp.where(count < window, jnp.inf, found) if lagged else found

    return ignore_outliers(Threshold(init, limit, learn))


class Sketch(NamedTuple):
    """Ranks of a whole history, in arrays that end in the block's shape.

    Attributes:
        first: `[1024, ...]`, the first sizes in ascending order, `inf` where there is none yet.
        origin: logarithm of the size at the middle of the bins.
        counts: int32 `[1024, ...]`, how many sizes were in this bin or a lower one.
    """

    first: Array
    origin: Array
    counts: Array


FIRST, BINS = 1024, 1024
WIDTH = 2 * math.log(1.01)  # of a bin, in logarithms: its middle is within 1 % of all of it


def middle(origin: Any, number: Any) -> Any:
    """Logarithm of the middle of the bin with this number, from 0."""
    return origin + (number - BINS // 2 + 0.5) * WIDTH


def quantile_sketch(q: float | Array) -> Threshold:
    r"""Learns the raw size: a quantile of the whole history, :math:`c = Q_q(s_1, \dots, s_t)`.

    Exact (as `numpy.quantile`) for the first 1024 sizes, later within 1 % of the two sizes that it
    is interpolated from, if they are within a factor of 26 000 of the middle of the bins. That
    starts as the first size and follows the quantile; what is further off counts in the last bin. 8
    KiB for each group: 1024 floats and 1024 logarithmic bins of integers, which are halved before
    they overflow, first after :math:`2^{30}` sizes.

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


def quantile_tracker(
    q: float | Array = 0.9, rate: float | Array = 0.2, *, initial: float | Array | None = None
) -> Threshold:
    r"""Learns whether the raw size was within the limit: it moves until a share :math:`q` of them
    are.

    .. math:: c \leftarrow c \exp(-\eta (1[s \le c] - q))

    One float for each group. The current size is not known to the limit, but for the first, which
    it starts from.

    Args:
        q: share of the sizes that are to be within, between 0 and 1.
        rate: :math:`\eta`; the limit rises by :math:`e^{\eta q}` or falls by :math:`e^{\eta (1 -
            q)}` a step.
        initial: where the limit starts instead of at the first size.

    Raises:
        TypeError: one of them is not a number.
        ValueError: `q` is not between 0 and 1, or one of the others is not positive.

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
    """What `remember` knows, in arrays that end in the block's shape.

    Attributes:
        last: `[window, ...]`, the last sizes, newest first, 0 where there is none yet.
        sketch: ranks of all sizes.
    """

    last: Array
    sketch: Sketch


def remember(window: int) -> Threshold:
    r"""Learns the raw size, sets no limit, :math:`c = \infty`: the last sizes, and a sketch of all
    as in `quantile_sketch`.

    Args:
        window: how many of the last sizes are remembered, each a float per group.

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
    """The sketch of one more size."""
    first, origin, counts = sketch
    logarithm = _blocks.logarithm(sizes)
    origin = jnp.where(counts[-1] == 0, logarithm, origin)
    bin_of = jnp.clip(jnp.floor((logarithm - origin) / WIDTH) + BINS // 2, 0, BINS - 1).astype(
        jnp.int32
    )
    counts = jnp.where(counts[-1] < 2**30, counts, counts // 2) + (bin_of <= _rows(counts))
    below = jnp.concatenate([jnp.zeros_like(first[:1]), first[:-1]])
    return Sketch(jnp.maximum(below, jnp.minimum(first, sizes)), origin, counts)


def _centred(sketch: Sketch, q: float | Array) -> Sketch:
    """Moves the bins by one if the quantile has left their middle half; at the ends two bins become
    one.
    """
    first, origin, counts = sketch
    lean = _bin(counts, jnp.asarray(q * (counts[-1] - 1), jnp.int32)) - BINS // 2
    up = jnp.concatenate([counts[1:], counts[-1:]])
    down = jnp.concatenate([jnp.zeros_like(counts[:1]), counts[:-2], counts[-1:]])
    above, under = lean > BINS // 4, lean < -BINS // 4
    moved = jnp.where(above, up, jnp.where(under, down, counts))
    return Sketch(first, origin + WIDTH * (above.astype(origin.dtype) - under), moved)


def _bin(counts: Array, rank: Array) -> Array:
    """The bin of the size with this rank, from 0."""
    return jnp.minimum(jnp.sum(counts <= rank, 0, dtype=jnp.int32), BINS - 1)


def _interpolated(size_at: Callable[[Array], Array], q: float | Array, count: Array) -> Array:
    """The quantile between the two sizes next to its rank."""
    last = jnp.maximum(count - 1, 0)
    rank = q * last
    lower = jnp.clip(jnp.floor(rank).astype(jnp.int32), 0, last)
    below, above = size_at(lower), size_at(jnp.minimum(lower + 1, last))
    return below + (rank - lower) * (above - below)


def _take(ordered: Array, rank: Array) -> Array:
    """The size with this rank, from 0."""
    return jnp.sum(jnp.where(_rows(ordered) == rank, ordered, 0), 0)


def _rows(array: Array) -> Array:
    """Numbers 0, 1, ... along the first axis, to compare with arrays of the block's shape."""
    return jnp.arange(array.shape[0]).reshape(-1, *[1] * (array.ndim - 1))
