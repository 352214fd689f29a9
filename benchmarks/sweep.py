"""Measures a sweep over thresholds: under `jax.vmap` in one program, or one after the other.

A threshold is an argument of one compiled program, or a Python number, which needs a program for
each value. Each run trains a regression by SGD with momentum. Times with compilation start with
fresh caches, like a new process.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import optaxclip
from benchmarks.report import Row
from benchmarks.timing import cold, spread

THRESHOLDS = np.geomspace(0.01, 100, 16).astype(np.float32)
STEPS, BATCH, WIDTH = 300, 32, 25
CLIPS = {"optaxclip": optaxclip.clip_by_global_norm, "Optax": optax.clip_by_global_norm}


def measure(rounds: int, quick: bool) -> Iterator[Row]:
    """Yields rows of two tables; quick: for two thresholds."""
    thresholds = jnp.array(THRESHOLDS[::8] if quick else THRESHOLDS)
    measures = {
        (way, library): _measure(start, clip, thresholds)
        for way, start in WAYS.items()
        for library, clip in CLIPS.items()
    }
    times = cold(measures, rounds)
    reference = times[next(iter(times))]
    for i, what in enumerate(["with compilation", "without"]):
        title = f"Time of a sweep over {len(thresholds)} thresholds, {what}, over the first line's"
        for (way, library), seconds in times.items():
            yield Row(title, way, library, *spread(seconds[:, i] / reference[:, i]))


def run(clip: Callable[[Any], optax.GradientTransformation], threshold: Any) -> Array:
    """Trains a multilayer perceptron with one hidden layer, and returns its last loss."""
    optimizer = optax.chain(clip(threshold), optax.sgd(0.01, momentum=0.9))
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (STEPS, BATCH, 20))
    params = {
        "hidden": jax.random.normal(keys[1], (20, WIDTH)) / 3,
        "out": jax.random.normal(keys[2], (WIDTH,)) / 3,
    }

    def loss(params: Any, x: Array) -> Array:
        return jnp.mean((jax.nn.relu(x @ params["hidden"]) @ params["out"] - x.sum(1)) ** 2)

    def step(carry: Any, x: Array) -> Any:
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, x)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    return jax.lax.scan(step, (params, optimizer.init(params)), x)[1][-1]


def vmapped(clip: Any, thresholds: Array) -> Callable[[], Any]:
    """Runs all thresholds in one program."""
    program = jax.jit(jax.vmap(lambda threshold: run(clip, threshold)))
    return lambda: program(thresholds)


def called(clip: Any, thresholds: Array) -> Callable[[], Any]:
    """Runs one program once for each threshold."""
    program = jax.jit(lambda threshold: run(clip, threshold))
    return lambda: [program(threshold) for threshold in thresholds]


def compiled(clip: Any, thresholds: Array) -> Callable[[], Any]:
    """Compiles a program for each threshold."""
    numbers = map(float, thresholds)
    programs = [jax.jit(lambda number=number: run(clip, number)) for number in numbers]
    return lambda: [program() for program in programs]


WAYS = {
    "one program, under vmap": vmapped,
    "one program, called in turn": called,
    "a program for each threshold": compiled,
}


def _measure(start: Callable[..., Any], clip: Any, thresholds: Array) -> Callable[[], np.ndarray]:
    """Returns a function that measures the seconds with compilation, and without."""

    def measure() -> np.ndarray:
        sweep, times = start(clip, thresholds), [time.perf_counter()]
        for _ in range(2):
            jax.block_until_ready(sweep())
            times.append(time.perf_counter())
        return np.diff(times)

    return measure
