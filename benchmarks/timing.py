"""Wall time, as ratios within one run.

All that is compared runs in one process, in turn, so what disturbs one disturbs all; a step follows
one of its own kind, as in training, because what others leave in caches and allocators is not its
cost.
"""

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

Key = TypeVar("Key")


class Spread(NamedTuple):
    """Median and quartiles."""

    value: float
    low: float
    high: float


def timed(steps: Mapping[Key, Callable[[], Any]], rounds: int) -> dict[Key, np.ndarray]:
    """Seconds that each step takes, `[rounds]`."""
    return interleaved(
        {key: lambda step=step: _seconds(step) for key, step in steps.items()}, rounds
    )


def interleaved(measures: Mapping[Key, Callable[[], Any]], rounds: int) -> dict[Key, np.ndarray]:
    """What each function returns, `[rounds, ...]`, when all are called in turn."""
    values = [[measure() for measure in measures.values()] for _ in range(rounds)]
    return dict(zip(measures, np.moveaxis(np.array(values), 0, 1), strict=True))


def cold(measures: Mapping[Key, Callable[[], Any]], rounds: int) -> dict[Key, np.ndarray]:
    """The same, each in fresh caches. What is done once in a process is no one's, so the first is
    called before all.
    """

    def fresh(measure: Callable[[], Any]) -> Any:
        jax.clear_caches()
        gc.collect()  # what others left is not to be collected at this one's expense
        return measure()

    fresh(next(iter(measures.values())))
    return interleaved(
        {key: lambda measure=measure: fresh(measure) for key, measure in measures.items()}, rounds
    )


def spread(values: np.ndarray) -> Spread:
    """Of values over rounds."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return Spread(median, low, high)


def _seconds(step: Callable[[], Any]) -> float:
    jax.block_until_ready(step())
    start = time.perf_counter()
    jax.block_until_ready(step())
    return time.perf_counter() - start
