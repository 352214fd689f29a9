"""The compiler's figures for one optimizer step on a chip or on many, ahead of time: no device is needed, a compiler is.

Bytes are counted from the scheduled program: each operand that a kernel reads from main memory once, and
each result that it writes once. Buffers that the compiler keeps on chip are free, and an asynchronous copy
onto the chip counts as one read.

The compiler for TPU is `libtpu`. That for NVIDIA needs no driver and little of CUDA: `jax-cuda12-plugin` and
`jax-cuda12-pjrt` of the version of `jax`, installed with `--no-deps`, and `nvidia-cuda-nvcc-cu12`. Then
`python -m benchmarks.ahead_of_time v5e h100` prints what a step of GPT-2 costs on one chip of these kinds.
"""

import argparse
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

import optaxclip

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # it asks the driver

H100 = """
  platform_name: "CUDA"
  device_description_str: "NVIDIA H100 80GB HBM3"
  runtime_version { major: 12 minor: 9 }
  dnn_version_info { major: 9 minor: 8 }
  gpu_device_info {
    cuda_compute_capability { major: 9 }
    core_count: 132
    fpus_per_core: 128
    clock_rate_ghz: 1.98
    device_memory_size: 84929347584
    memory_bandwidth: 3352320000000
    l2_cache_size: 52428800
    threads_per_warp: 32
    threads_per_block_limit: 1024
    threads_per_core_limit: 2048
    registers_per_block_limit: 65536
    registers_per_core_limit: 65536
    shared_memory_per_block: 49152
    shared_memory_per_block_optin: 232448
    shared_memory_per_core: 233472
    block_dim_limit_x: 2147483647
    block_dim_limit_y: 65535
    block_dim_limit_z: 65535
  }
"""

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
    "all-reduce-done",
    "all-gather-done",
    "collective-permute-done",
    "opt-barrier",
}
COLLECTIVE = re.compile(r" (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


class Cost(NamedTuple):
    """Of one chip: bytes and temporary memory in units of its parameters in float32, how many kernels run, and messages.

    Messages are the program's collective operations, each counted once, those of branches and loops as well.
    """

    units: float
    temporary: float
    kernels: int
    messages: int


def gpt2(layers: int = 12, width: int = 768, vocabulary: int = 50257) -> dict[str, Any]:
    """The parameters of GPT-2 as shapes: 124 million in 148 leaves."""
    block = {
        **{f"ln{i}_{name}": (width,) for i in (1, 2) for name in ("scale", "bias")},
        **{"qkv": (width, 3 * width), "qkv_bias": (3 * width,), "out": (width, width), "out_bias": (width,)},
        **{"up": (width, 4 * width), "up_bias": (4 * width,), "down": (4 * width, width), "down_bias": (width,)},
    }
    shapes = {"wte": (vocabulary, width), "wpe": (1024, width), "ln_scale": (width,), "ln_bias": (width,)}
    tree = {**shapes, **{f"block{i}": block for i in range(layers)}}
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), tree, is_leaf=lambda x: isinstance(x, tuple))


def mesh_of(topology: str, **axes: int) -> Mesh:
    """The chips of a topology as a mesh.

    Args:
        topology: kind and shape, such as `"v5e:4x4"`, `"v6e:4x4"`, `"v5p:2x2x4"`; for NVIDIA machines x GPUs, `"h100:2x8"`.
        **axes: names and lengths of the mesh's axes.
    """
    kind, shape = topology.split(":")
    if kind == "h100":
        described = topologies.get_topology_desc(platform="cuda", target_config=H100, topology=f"1x{shape}")
    else:
        alone = {"chips_per_host_bounds": (1, 1, 1)} if set(shape) == {"1", "x"} else {}
        described = topologies.get_topology_desc(topology, "tpu", **alone)
    return Mesh(np.array(described.devices).reshape(*axes.values()), tuple(axes))


def longest_split(shape: tuple[int, ...]) -> PartitionSpec:
    """A leaf's longest axis, its first if there are several, split over all chips."""
    return PartitionSpec(*("chips" if axis == shape.index(max(shape)) else None for axis in range(len(shape))))


def step_of(optimizer: optax.GradientTransformation) -> Any:
    """`(params, state, grads) -> (params, state)`, jitted, with parameters and state donated."""
    return jax.jit(_step(optimizer), donate_argnums=(0, 1))


def cost(optimizer: optax.GradientTransformation, params: Any, kind: str = "v5e") -> Cost:
    """The cost of one step on one chip, with parameters and state donated.

    Args:
        optimizer: the whole chain.
        params: shapes of the parameters, as `jax.ShapeDtypeStruct`.
        kind: of chip: `"v5e"`, `"v5p"`, `"v6e"`, `"h100"`.

    Returns:
        The cost, where one unit is the size of the parameters.
    """
    chip = SingleDeviceSharding(mesh_of(f"{kind}:1x1", chips=1).devices.item())
    return _cost(step_of(optimizer), optimizer, params, lambda leaf: chip)


def cost_on_mesh(
    optimizer: optax.GradientTransformation,
    params: Any,
    mesh: Mesh,
    spec_of: Callable[[tuple[int, ...]], PartitionSpec] = longest_split,
    *,
    mapped: bool = False,
) -> Cost:
    """The cost of one step to each chip, with parameters, gradients and moments split over a mesh (FSDP, ZeRO).

    Args:
        optimizer: the whole chain; its state is what `init` makes of the whole parameters.
        params: shapes of the whole parameters.
        mesh: from `mesh_of`.
        spec_of: of a leaf's shape, how it is split. What has the shape of a parameter is split as that is, the rest of
            the state is on all chips.
        mapped: whether the step runs in `jax.shard_map`, on each chip's parts, in place of `jax.jit` on the whole.

    Returns:
        The cost, where one unit is the size of a chip's part of the parameters.
    """
    shapes = {leaf.shape for leaf in jax.tree.leaves(params)}

    def spec(leaf: Any) -> PartitionSpec:
        return spec_of(leaf.shape) if leaf.shape in shapes else PartitionSpec()

    step = step_of(optimizer)
    if mapped:
        own, state = (jax.tree.map(spec, tree) for tree in (params, jax.eval_shape(optimizer.init, params)))
        parts = jax.shard_map(_step(optimizer), mesh=mesh, in_specs=(own, state, own), out_specs=(own, state))
        step = jax.jit(parts, donate_argnums=(0, 1))
    return _cost(step, optimizer, params, lambda leaf: NamedSharding(mesh, spec(leaf)))


def _step(optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def _cost(step: Any, optimizer: optax.GradientTransformation, params: Any, sharding_of: Callable[[Any], Sharding]) -> Cost:
    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(x)), tree)

    compiled = step.lower(*map(placed, (params, jax.eval_shape(optimizer.init, params), params))).compile()
    unit = sum(4 * math.prod(sharding_of(leaf).shard_shape(leaf.shape)) for leaf in jax.tree.leaves(params))
    temporary = getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0)
    program = compiled.as_text() or ""
    moved = list(_traffic(program))
    return Cost(sum(moved) / unit, temporary / unit, len(moved), len(COLLECTIVE.findall(program)))


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


def main() -> None:
    """Prints the cost of a few optimizers on one chip of each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+", help="of chips: v5e, v5p, v6e, h100")
    parser.add_argument("--layers", type=int, default=12, help="of GPT-2")
    options = parser.parse_args()
    adam, clip = optax.adam(1e-3), optaxclip.clip_by_global_norm(1.0)
    theirs = optax.chain(optax.clip_by_global_norm(1.0), adam)
    rows = {
        "adam": adam,
        "optax: clip_by_global_norm": theirs,
        "clip_by_global_norm": optax.chain(clip, adam),
        "adagc": optax.chain(optaxclip.adagc(), adam),
        "adaptive_grad_clip": optax.chain(optaxclip.adaptive_grad_clip(0.01), adam),
        "optax: apply_if_finite": optax.apply_if_finite(theirs, 10),
        "skip_nonfinite": optaxclip.skip_nonfinite(optax.chain(clip, adam)),
    }
    print(f"{'':28}{'kind':>6}{'units':>8}{'temporary':>11}{'kernels':>9}")
    for name, optimizer in rows.items():
        for kind in options.kinds:
            found = cost(optimizer, gpt2(options.layers), kind)
            print(f"{name:28}{kind:>6}{found.units:8.3f}{found.temporary:11.3f}{found.kernels:9}", flush=True)


if __name__ == "__main__":
    main()
