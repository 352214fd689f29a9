"""Measures the wall time of an optimizer step on the default device.

Times are ratios to the bare optimizer of the same library.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import peers, trees
from benchmarks.optimizers import FEW, METHODS, READS_AND_WRITES, chosen, compiled_step
from benchmarks.report import Row
from benchmarks.timing import spread, timed

# On CPU, GPT-2 has two layers and 4000 words, because every row keeps a copy of parameters and
# moments in memory.
TREES = {
    "GPT-2": (
        lambda: trees.gpt2() if jax.default_backend() == "gpu" else trees.gpt2(2, vocabulary=4000),
        METHODS,
    ),
    "ResNet-50": (trees.resnet50, METHODS),
    "tiny leaves": (trees.tiny, FEW),
}
QUICK = {"GPT-2": (lambda: trees.gpt2(1, vocabulary=1000), FEW)}


def measure(rounds: int, quick: bool) -> Iterator[Row]:
    """Yields rows of a table for each tree; quick: a few methods on one small tree."""
    for name, (make, methods) in (QUICK if quick else TREES).items():
        yield from _rows(name, make(), list(methods), rounds)


def _rows(name: str, tree: Any, methods: list[str], rounds: int) -> Iterator[Row]:
    title = f"Step time over the bare optimizer's, {trees.described(name, tree)}"
    times = timed(_steps(trees.noise(tree, 0.1), trees.noise(tree, 0.01), methods), rounds)
    for (method, library), seconds in times.items():
        bare = times["none", "Optax" if library == "optaxclip" else library]
        limit = METHODS[method].units / READS_AND_WRITES
        yield Row(title, method, library, *spread(seconds / bare), limit)


def _steps(params: Any, grads: Any, methods: list[str]) -> dict[tuple[str, str], Callable[[], Any]]:
    """Returns steps by method and library, each on a copy of parameters and state."""
    on_device = jax.tree.map(jnp.array, grads)
    steps = {
        row: step_of(optimizer, params, on_device) for row, optimizer in chosen(methods).items()
    }
    for library, make in ("torch", peers.torch_steps), ("Keras", peers.keras_steps):
        if peers.installed(library):
            for method, step in make(params, grads, methods).items():
                steps[method, library] = step
    return steps


def step_of(optimizer: optax.GradientTransformation, params: Any, grads: Any) -> Callable[[], Any]:
    """Returns a step on its own copy of parameters and state; gradients are on the device."""
    params = jax.tree.map(jnp.array, params)
    held = [params, optimizer.init(params)]
    compiled = compiled_step(optimizer).lower(*held, grads).compile()

    def step() -> Any:
        held[:] = compiled(*held, grads)
        return held

    return step
