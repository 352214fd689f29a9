"""Measures how long JAX takes to trace a step, and XLA to compile it.

Times are ratios to Adam with Optax's clip by global norm on the same tree. Every measurement starts
with fresh caches. Tracing turns the Python functions into a program for XLA, `init` included.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax

from benchmarks import trees
from benchmarks.optimizers import FEW, METHODS, chosen, compiled_step
from benchmarks.report import Row
from benchmarks.timing import cold, spread

# The last number is how often a round measures the tree: short times vary the most. The leaves of
# GPT-2 are large; on CPU the clip has two ways to measure a large leaf, which both are compiled.
TREES = {
    "10 tiny leaves": (lambda: trees.tiny(10), METHODS, 5),
    "200 tiny leaves": (lambda: trees.tiny(200), METHODS, 1),
    "GPT-2 (148 leaves)": (trees.gpt2, METHODS, 1),
    "2000 tiny leaves": (trees.tiny, FEW, 1),
}
QUICK = {"10 tiny leaves": (lambda: trees.tiny(10), FEW, 1)}


def measure(rounds: int, quick: bool) -> Iterator[Row]:
    """Yields rows of two tables for each tree; quick: a few methods on the first tree."""
    for name, (make, methods, often) in (QUICK if quick else TREES).items():
        yield from _rows(name, make(), list(methods), rounds * often)


def _rows(name: str, tree: Any, methods: list[str], rounds: int) -> Iterator[Row]:
    measures = {row: measure_of(optimizer, tree) for row, optimizer in chosen(methods).items()}
    times = cold(measures, rounds)
    reference = times["global norm", "Optax"]
    for i, what in enumerate(["Trace", "Compile"]):
        title = f"{what} time over that of Optax's global norm, {name}"
        for (method, library), seconds in times.items():
            yield Row(title, method, library, *spread(seconds[:, i] / reference[:, i]))


def measure_of(optimizer: optax.GradientTransformation, tree: Any) -> Callable[[], np.ndarray]:
    """Returns a function that measures the seconds to trace and to compile."""

    def measure() -> np.ndarray:
        start = time.perf_counter()
        lowered = compiled_step(optimizer).lower(tree, jax.eval_shape(optimizer.init, tree), tree)
        traced = time.perf_counter()
        lowered.compile()
        return np.diff([start, traced, time.perf_counter()])

    return measure
