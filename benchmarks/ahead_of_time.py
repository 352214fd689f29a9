"""The compiler's figures for one optimizer step on a TPU, ahead of time: no device is needed, `libtpu` is.

Bytes are counted from the scheduled program: each operand that a kernel reads from main memory once, and
each result that it writes once. Buffers that the compiler keeps on chip are free, and an asynchronous copy
onto the chip counts as one read.
"""

import math
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

WIDTHS = {
    "f64": 8,
    "s64": 8,
    "u64": 8,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "s8": 1,
    "u8": 1,
    "pred": 1,
}
NO_KERNEL = {
    "parameter",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "constant",
    "after-all",
    "copy-done",
    "slice-done",
    "async-done",
    "opt-barrier",
}


class Cost(NamedTuple):
    """Bytes and temporary memory in units of the parameters in float32, and how many kernels run."""

    units: float
    temporary: float
    kernels: int


def gpt2(layers: int = 12, width: int = 768) -> dict[str, Any]:
    """The parameters of GPT-2 as shapes: 124 million in 148 leaves."""
    block = {
        **{f"ln{i}_{name}": (width,) for i in (1, 2) for name in ("scale", "bias")},
        **{"qkv": (width, 3 * width), "qkv_bias": (3 * width,), "out": (width, width), "out_bias": (width,)},
        **{"up": (width, 4 * width), "up_bias": (4 * width,), "down": (4 * width, width), "down_bias": (width,)},
    }
    shapes = {"wte": (50257, width), "wpe": (1024, width), "ln_scale": (width,), "ln_bias": (width,)}
    tree = {**shapes, **{f"block{i}": block for i in range(layers)}}
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), tree, is_leaf=lambda x: isinstance(x, tuple))


def step_of(optimizer: optax.GradientTransformation) -> Any:
    """`(params, state, grads) -> (params, state)`, jitted, with parameters and state donated."""

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def cost(optimizer: optax.GradientTransformation, params: Any, kind: str = "v5e") -> Cost:
    """The cost of one step, with parameters and state donated.

    Args:
        optimizer: the whole chain.
        params: shapes of the parameters, as `jax.ShapeDtypeStruct`.
        kind: of TPU, one with single-chip topologies such as `"v5e"` and `"v6e"`.

    Returns:
        The cost, where one unit is the size of the parameters.
    """
    chip = topologies.get_topology_desc(f"{kind}:1x1", "tpu", chips_per_host_bounds=(1, 1, 1)).devices[0]

    def on_chip(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(chip)), tree)

    arguments = map(on_chip, (params, jax.eval_shape(optimizer.init, params), params))
    compiled = step_of(optimizer).lower(*arguments).compile()
    unit = sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    temporary = getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0)
    moved = list(_traffic(compiled.as_text() or ""))
    return Cost(sum(moved) / unit, temporary / unit, len(moved))


def _traffic(program: str) -> Iterator[int]:
    """Bytes to and from main memory of each kernel in the program's entry computation."""
    entry = program[program.index("\nENTRY ") :]
    results: dict[str, str] = {}
    for line in entry.splitlines():
        match = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$", line)
        if not match:
            continue
        name, result, operation, rest = match.groups()
        results[name] = result
        if operation in NO_KERNEL:
            continue
        operands = set(re.findall(r"%([\w.\-]+)", rest.split("), ")[0])) & results.keys()
        if operation == "copy-start":
            yield sum(map(_bytes, _arrays(result)[:2]))
        elif operation == "slice-start":
            part = _arrays(result)[1]
            yield _bytes(re.sub(r"S\(\d+\)", "", part)) + _bytes(part)
        else:
            yield _bytes(result) + sum(_bytes(results[operand]) for operand in operands)


def _arrays(text: str) -> list[str]:
    return re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", text)


def _bytes(text: str) -> int:
    """Size of the arrays in `text` that live in main memory; `S(1)` and the like are on chip."""
    off_chip = [array for array in _arrays(text) if not re.search(r"S\([1-9]\)", array)]
    parsed = [array.split("{")[0].rstrip("]").split("[") for array in off_chip]
    return sum(WIDTHS.get(dtype, 0) * math.prod(int(n) for n in shape.split(",") if n) for dtype, shape in parsed)
