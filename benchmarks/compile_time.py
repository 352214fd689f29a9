"""How long JAX takes to trace a step and XLA to compile it, as ratios to Optax's global norm with
Adam on the same tree.

Each is done in fresh caches, all in turn. Tracing is from the Python functions to a program for
XLA, `init` included.
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

TREES = {  # with how often each is measured in a round: what takes a fraction of a second is disturbed the most
    "10 tiny leaves": (lambda: trees.tiny(10), METHODS, 5),
    "200 tiny leaves": (lambda: trees.tiny(200), METHODS, 1),
    "GPT-2 (148 leaves)": (
        trees.gpt2,
        METHODS,
        1,
    ),  # leaves are large, which on a CPU are measured in two ways
    "2000 tiny leaves": (trees.tiny, FEW, 1),
}
QUICK = {"10 tiny leaves": (lambda: trees.tiny(10), FEW, 1)}


def measure(rounds: int, quick: bool) -> Iterator[Row]:
    """Rows of two tables for each tree; for a few methods and the first tree, to be quick."""
    for name, (make, methods, often) in (QUICK if quick else TREES).items():
        yield from _rows(name, make(), list(methods), rounds * often)


def _rows(name: str, tree: Any, methods: list[str], rounds: int) -> Iterator[Row]:
    times = cold(
        {row: _measure(optimizer, tree) for row, optimizer in chosen(methods).items()}, rounds
    )
    for i, what in enumerate(["Trace", "Compile"]):
        title = f"{what} time over that of Optax's global norm, {name}"
        for (method, library), seconds in times.items():
            yield Row(
                title, method, library, *spread(seconds[:, i] / times["global norm", "Optax"][:, i])
            )


def _measure(optimizer: optax.GradientTransformation, tree: Any) -> Callable[[], np.ndarray]:
    """Seconds to trace, and to compile."""

    def measure() -> np.ndarray:
        start = time.perf_counter()
        lowered = compiled_step(optimizer).lower(tree, jax.eval_shape(optimizer.init, tree), tree)
        traced = time.perf_counter()
        lowered.compile()
        return np.diff([start, traced, time.perf_counter()])

    return measure
