"""Costs of one optimizer step on TPUs and GPUs, from compiled programs; needs no device.

The TPU compiler is in the package `libtpu`. The NVIDIA compiler needs no driver and little of CUDA:
install `jax-cuda12-plugin` and `jax-cuda12-pjrt` of the version of `jax` with `--no-deps`, and
`nvidia-cuda-nvcc-cu12`.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from benchmarks import peers, trees
from benchmarks.optimizers import METHODS, compiled_step, step
from benchmarks.report import Row
from benchmarks.traffic import messages, traffic

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
MESH = "v5e:4x4"
QUICK = ["none", "global norm", "global norm, skip NaN"]
FIGURES = {
    "units": "Bytes from and to main memory",
    "temporary": "Temporary memory",
    "kernels": "Kernels",
    "messages": "Messages",
}


class Cost(NamedTuple):
    """The cost of a step to one device.

    Attributes:
        units: bytes from and to main memory, in units of the device's parameters in float32.
        temporary: temporary memory, in the same units.
        kernels: how many kernels run.
        messages: how many collective operations the program has; each counts once, also in branches
            and loops.
    """

    units: float
    temporary: float
    kernels: int
    messages: int


def measure(rounds: int, quick: bool) -> Iterator[Row]:
    """Yields rows for GPT-2 and many tiny leaves on one device, and for Llama on a mesh.

    Args:
        rounds: not used, because compiled programs do not vary.
        quick: whether to measure only one layer of GPT-2 on one device.
    """
    del rounds
    devices = ["v5e", "v6e"] * peers.installed("TPU") + ["h100"] * peers.installed("H100")
    model, methods = (trees.gpt2(1), QUICK) if quick else (trees.gpt2(), list(METHODS))
    title, figures = trees.described("GPT-2", model), ["units", "temporary", "kernels"]
    some = devices[:1] if quick else devices
    yield from _rows(title, methods, some, figures, lambda o, device: cost(o, model, device))
    if quick:
        return
    many = trees.tiny()
    title = trees.described("tiny leaves", many)
    some = [device for device in devices if device != "v6e"]
    yield from _rows(title, QUICK, some, ["kernels"], lambda o, device: cost(o, many, device))
    if peers.installed("TPU"):
        large, mesh = trees.llama(), mesh_of(MESH, chips=16)
        title = f"{trees.described('TinyLlama', large)} split over 16 chips"
        figures = [*figures, "messages"]
        yield from _rows(title, methods, [MESH], figures, lambda o, _: cost_on_mesh(o, large, mesh))


def _rows(
    title: str,
    methods: list[str],
    devices: list[str],
    figures: list[str],
    cost_of: Callable[..., Cost],
) -> Iterator[Row]:
    for method, device in itertools.product(methods, devices):
        for library, optimizer in METHODS[method].optimizers.items():
            costs, column = cost_of(optimizer, device)._asdict(), f"{device} {library}"
            for figure in figures:
                limit = METHODS[method].units if figure == "units" else None
                table = f"{FIGURES[figure]}, {title}"
                yield Row(table, method, column, costs[figure], limit=limit)


def mesh_of(topology: str, **axes: int) -> Mesh:
    """Returns the devices of a topology as a mesh.

    Args:
        topology: kind and shape, such as `"v5e:4x4"`, `"v6e:4x4"`, `"v5p:2x2x4"`; for NVIDIA it is
            machines x GPUs, such as `"h100:2x8"`.
        **axes: names and lengths of the mesh's axes.
    """
    kind, shape = topology.split(":")
    if kind == "h100":
        described = topologies.get_topology_desc(
            platform="cuda", target_config=H100, topology=f"1x{shape}"
        )
    else:
        single = {"chips_per_host_bounds": (1, 1, 1)} if set(shape) == {"1", "x"} else {}
        described = topologies.get_topology_desc(topology, "tpu", **single)
    return Mesh(np.array(described.devices).reshape(*axes.values()), tuple(axes))


def longest_split(shape: tuple[int, ...]) -> PartitionSpec:
    """Shards the longest axis of a leaf over all devices; the first of equally long axes."""
    longest = shape.index(max(shape)) if shape else None
    return PartitionSpec(*("chips" if axis == longest else None for axis in range(len(shape))))


def cost(optimizer: optax.GradientTransformation, params: Any, kind: str = "v5e") -> Cost:
    """Returns the cost of one step on one device, with parameters and state donated.

    Args:
        optimizer: the whole chain.
        params: shapes of the parameters, as `jax.ShapeDtypeStruct`.
        kind: kind of device: `"v5e"`, `"v5p"`, `"v6e"` or `"h100"`.

    Returns:
        The cost, where one unit is the size of the parameters.
    """
    chip = SingleDeviceSharding(mesh_of(f"{kind}:1x1", chips=1).devices.item())
    return _cost(compiled_step(optimizer), optimizer, params, lambda leaf: chip)


def cost_on_mesh(
    optimizer: optax.GradientTransformation,
    params: Any,
    mesh: Mesh,
    spec_of: Callable[[tuple[int, ...]], PartitionSpec] = longest_split,
    *,
    mapped: bool = False,
) -> Cost:
    """Returns the cost of one step to each device of a mesh, with sharded parameters (FSDP, ZeRO).

    Args:
        optimizer: the whole chain; its state is `init` of the whole parameters.
        params: shapes of the whole parameters.
        mesh: from `mesh_of`.
        spec_of: `shape of a leaf -> how it is sharded`. Arrays of the state with the shape of a
            parameter are sharded like it; the others are replicated.
        mapped: whether the step runs in `jax.shard_map` on each device's shards, instead of in
            `jax.jit` on whole arrays.

    Returns:
        The cost, where one unit is the size of a device's shards of the parameters.
    """
    shapes = {leaf.shape for leaf in jax.tree.leaves(params)}

    def spec(leaf: Any) -> PartitionSpec:
        return spec_of(leaf.shape) if leaf.shape in shapes else PartitionSpec()

    program = compiled_step(optimizer)
    if mapped:
        specs = jax.tree.map(spec, params)
        state = jax.tree.map(spec, jax.eval_shape(optimizer.init, params))
        parts = jax.shard_map(
            step(optimizer), mesh=mesh, in_specs=(specs, state, specs), out_specs=(specs, state)
        )
        program = jax.jit(parts, donate_argnums=(0, 1))
    return _cost(program, optimizer, params, lambda leaf: NamedSharding(mesh, spec(leaf)))


def _cost(
    program: Any,
    optimizer: optax.GradientTransformation,
    params: Any,
    sharding_of: Callable[[Any], Sharding],
) -> Cost:
    def placed(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(x)), tree
        )

    state = jax.eval_shape(optimizer.init, params)
    compiled = program.lower(*map(placed, (params, state, params))).compile()
    shards = [sharding_of(leaf).shard_shape(leaf.shape) for leaf in jax.tree.leaves(params)]
    unit = 4 * sum(map(math.prod, shards))  # bytes of float32
    temporary = getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0)
    text = compiled.as_text() or ""
    moved = list(traffic(text))
    return Cost(sum(moved) / unit, temporary / unit, len(moved), messages(text))
