"""Measures wall time for ratios within one run.

Everything that is compared runs in one process, in turn, so a disturbance affects all of it. Each
measured step follows a step of the same program, as in training: the state in which another program
leaves caches and allocators does not count.
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
    """Returns the seconds that each step takes, `[rounds]`."""
    measures = {key: lambda step=step: _seconds(step) for key, step in steps.items()}
    return interleaved(measures, rounds)


def interleaved(measures: Mapping[Key, Callable[[], Any]], rounds: int) -> dict[Key, np.ndarray]:
    """Calls all functions in turn, and returns the results of each, `[rounds, ...]`."""
    values = [[measure() for measure in measures.values()] for _ in range(rounds)]
    return dict(zip(measures, np.moveaxis(np.array(values), 0, 1), strict=True))


def cold(measures: Mapping[Key, Callable[[], Any]], rounds: int) -> dict[Key, np.ndarray]:
    """Calls all functions in turn with fresh caches, and returns the results, `[rounds, ...]`.

    One function is called once before, so that work done once per process is not measured.
    """

    def fresh(measure: Callable[[], Any]) -> Any:
        jax.clear_caches()
        gc.collect()  # collects the garbage of the functions before, outside of the measurement
        return measure()

    fresh(next(iter(measures.values())))
    starts = {key: lambda measure=measure: fresh(measure) for key, measure in measures.items()}
    return interleaved(starts, rounds)


def spread(values: np.ndarray) -> Spread:
    """Returns the median and the quartiles of values over rounds."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return Spread(median, low, high)


def _seconds(step: Callable[[], Any]) -> float:
    jax.block_until_ready(step())
    start = time.perf_counter()
    jax.block_until_ready(step())
    return time.perf_counter() - start
