"""What each name of `optaxclip/_lowering.py` buys: figures with it and without it.

Run this when JAX changes. A name whose figures are the same without it can go. The library is
imported anew for each name, with the plain line from `tests/plain_lowering.py` in its place.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optaxclip
from benchmarks import ahead_of_time, compile_time, peers, step_time, trees
from benchmarks.optimizers import ADAM, THEIRS
from benchmarks.report import Row, unique
from benchmarks.timing import cold, spread, timed

MODULE = "optaxclip._lowering"
PLAIN = Path(__file__).parents[1] / "tests/plain_lowering.py"
WHOLE = "with all"
# the table of `_lowering.py`; each with the names that go with it
NAMES = {
    "quickest": ("quickest",),
    "shared_vector": ("shared_vector",),
    "Blocks": ("Blocks", "unstacked", "for_each"),
    "columns": ("columns",),
    "largest": ("largest",),
    "most": ("most",),
    "share_of": ("share_of",),
    "traced_once": ("traced_once",),
}
CLIPS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "global norm": lambda library: library.clip_by_global_norm(1.0),
    "leaf norm": lambda library: library.clip_by_norm(1.0),
    "AGC, by unit": lambda library: library.adaptive_grad_clip(0.01),
    "value": lambda library: library.clip_by_value(0.01),
    "value, exact share": lambda library: library.clip_by_value(0.01, record="full"),
}
QUICK = ["global norm", "AGC, by unit", "value, exact share"]
NORMS = ["global norm", "leaf norm", "AGC, by unit"]
DEVICES = {"v5e": "TPU", "h100": "H100"}  # and the peer that has its compiler

Optimizers = dict[tuple[str, str], optax.GradientTransformation]  # by line and column


def measure(rounds: int, quick: bool) -> Iterator[Row]:
    """Yields rows of a table for steps, tracing, compiling and the kernels of each device.

    Args:
        rounds: how often each step is timed; tracing and compiling a third as often.
        quick: whether to measure few clips on small models.
    """
    libraries = {WHOLE: optaxclip} | {f"without {name}": made_without(name) for name in NAMES}
    optimizers: Optimizers = {
        (line, column): optax.chain(CLIPS[column](library), ADAM)
        for column in (QUICK if quick else CLIPS)
        for line, library in libraries.items()
    }
    model = trees.gpt2(1, vocabulary=1000) if quick else trees.gpt2(2, vocabulary=4000)
    yield from _steps(optimizers, model, rounds)
    yield from _compiling(optimizers, trees.tiny(20 if quick else 200), max(1, rounds // 3))
    yield from _kernels(optimizers, trees.gpt2(1) if quick else trees.gpt2())


def made_without(name: str) -> Any:
    """Returns the library, imported anew, with the plain line in place of this name."""
    kept = {key: sys.modules.pop(key) for key in list(sys.modules) if _of_library(key)}
    finder = _Finder(NAMES[name])
    sys.meta_path.insert(0, finder)
    try:
        return importlib.import_module("optaxclip")
    finally:
        sys.meta_path.remove(finder)
        for key in filter(_of_library, list(sys.modules)):
            del sys.modules[key]
        sys.modules.update(kept)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds `_lowering.py`, and has it loaded with some plain lines."""

    def __init__(self, names: tuple[str, ...]):
        self.names = names

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if fullname == MODULE and spec is not None and spec.origin is not None:
            spec.loader = _Loader(fullname, spec.origin, self.names)
            return spec
        return None


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, fullname: str, path: str, names: tuple[str, ...]):
        super().__init__(fullname, path)
        self.names = names

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        plain = _plain_lines()
        vars(module).update({name: getattr(plain, name) for name in self.names})


def _plain_lines() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plain_lowering", PLAIN)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _of_library(module: str) -> bool:
    return module.partition(".")[0] == "optaxclip"


def _steps(optimizers: Optimizers, tree: Any, rounds: int) -> Iterator[Row]:
    title = f"Step time over bare Adam's, {trees.described('GPT-2', tree)}"
    params, grads = trees.noise(tree, 0.1), trees.noise(tree, 0.01)
    grads = jax.tree.map(jnp.asarray, grads)
    for column in unique(
        column for _, column in optimizers
    ):  # one after the other: each step keeps parameters and moments
        own = {line: one for (line, other), one in optimizers.items() if other == column}
        steps = {line: step_time.step_of(one, params, grads) for line, one in own.items()}
        times = timed({"bare": step_time.step_of(ADAM, params, grads)} | steps, rounds)
        for line in own:
            yield Row(title, line, column, *spread(times[line] / times["bare"]))


def _compiling(optimizers: Optimizers, tree: Any, rounds: int) -> Iterator[Row]:
    reference = {("Optax", "global norm"): THEIRS}
    measures = {
        row: compile_time.measure_of(one, tree) for row, one in (reference | optimizers).items()
    }
    times = cold(measures, rounds)
    for i, what in enumerate(["Trace", "Compile"]):
        title = f"{what} time over that of Optax's global norm, "
        title += trees.described("tiny leaves", tree)
        for line, column in optimizers:
            ratio = times[line, column][:, i] / times["Optax", "global norm"][:, i]
            yield Row(title, line, column, *spread(ratio))


def _kernels(optimizers: Optimizers, tree: Any) -> Iterator[Row]:
    for device, peer in DEVICES.items():
        if peers.installed(peer):
            title = f"Kernels on {device}, {trees.described('GPT-2', tree)}"
            for (line, column), one in optimizers.items():
                if column in NORMS:
                    kernels = ahead_of_time.cost(one, tree, device).kernels
                    yield Row(title, line, column, kernels)
