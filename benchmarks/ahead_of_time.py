"""The compiler's figures for one optimizer step on a chip or on many, ahead of time: no device is
needed, a compiler is.

The compiler for TPU is `libtpu`. That for NVIDIA needs no driver and little of CUDA:
`jax-cuda12-plugin` and `jax-cuda12-pjrt` of the version of `jax`, installed with `--no-deps`, and
`nvidia-cuda-nvcc-cu12`.
"""

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
    """Of one chip: bytes and temporary memory in units of its parameters in float32, how many
    kernels run, and messages.

    Messages are the program's collective operations, each counted once, those of branches and loops
    as well.
    """

    units: float
    temporary: float
    kernels: int
    messages: int


def measure(rounds: int, quick: bool) -> Iterator[Row]:
    """Rows for GPT-2 on one chip of each kind, for many tiny leaves, and for Llama on a mesh;
    quick, one layer on one kind.

    Args:
        rounds: not used, since compilers do not vary.
        quick: whether to be.
    """
    del rounds
    kinds = ["v5e", "v6e"] * peers.installed("TPU") + ["h100"] * peers.installed("H100")
    model, methods = (trees.gpt2(1), QUICK) if quick else (trees.gpt2(), list(METHODS))
    title, figures = trees.described("GPT-2", model), ["units", "temporary", "kernels"]
    yield from _rows(
        title, methods, kinds[:1] if quick else kinds, figures, lambda o, kind: cost(o, model, kind)
    )
    if quick:
        return
    many = trees.tiny()
    title = trees.described("tiny leaves", many)
    yield from _rows(
        title,
        QUICK,
        [kind for kind in kinds if kind != "v6e"],
        ["kernels"],
        lambda o, kind: cost(o, many, kind),
    )
    if peers.installed("TPU"):
        large, mesh = trees.llama(), mesh_of(MESH, chips=16)
        title = f"{trees.described('TinyLlama', large)} split over 16 chips"
        yield from _rows(
            title,
            methods,
            [MESH],
            [*figures, "messages"],
            lambda o, _: cost_on_mesh(o, large, mesh),
        )


def _rows(
    title: str,
    methods: list[str],
    kinds: list[str],
    figures: list[str],
    cost_of: Callable[..., Cost],
) -> Iterator[Row]:
    for method in methods:
        for kind in kinds:
            for library, optimizer in METHODS[method].optimizers.items():
                found = cost_of(optimizer, kind)._asdict()
                for figure in figures:
                    limit = METHODS[method].units if figure == "units" else None
                    yield Row(
                        f"{FIGURES[figure]}, {title}",
                        method,
                        f"{kind} {library}",
                        found[figure],
                        limit=limit,
                    )


def mesh_of(topology: str, **axes: int) -> Mesh:
    """The chips of a topology as a mesh.

    Args:
        topology: kind and shape, such as `"v5e:4x4"`, `"v6e:4x4"`, `"v5p:2x2x4"`; for NVIDIA
            machines x GPUs, `"h100:2x8"`.
        **axes: names and lengths of the mesh's axes.
    """
    kind, shape = topology.split(":")
    if kind == "h100":
        described = topologies.get_topology_desc(
            platform="cuda", target_config=H100, topology=f"1x{shape}"
        )
    else:
        alone = {"chips_per_host_bounds": (1, 1, 1)} if set(shape) == {"1", "x"} else {}
        described = topologies.get_topology_desc(topology, "tpu", **alone)
    return Mesh(np.array(described.devices).reshape(*axes.values()), tuple(axes))


def longest_split(shape: tuple[int, ...]) -> PartitionSpec:
    """A leaf's longest axis, its first if there are several, split over all chips."""
    return PartitionSpec(
        *("chips" if axis == shape.index(max(shape)) else None for axis in range(len(shape)))
    )


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
    return _cost(compiled_step(optimizer), optimizer, params, lambda leaf: chip)


def cost_on_mesh(
    optimizer: optax.GradientTransformation,
    params: Any,
    mesh: Mesh,
    spec_of: Callable[[tuple[int, ...]], PartitionSpec] = longest_split,
    *,
    mapped: bool = False,
) -> Cost:
    """The cost of one step to each chip, with parameters, gradients and moments split over a mesh
    (FSDP, ZeRO).

    Args:
        optimizer: the whole chain; its state is what `init` makes of the whole parameters.
        params: shapes of the whole parameters.
        mesh: from `mesh_of`.
        spec_of: of a leaf's shape, how it is split. What has the shape of a parameter is split as
            that is, the rest of the state is on all chips.
        mapped: whether the step runs in `jax.shard_map`, on each chip's parts, in place of
            `jax.jit` on the whole.

    Returns:
        The cost, where one unit is the size of a chip's part of the parameters.
    """
    shapes = {leaf.shape for leaf in jax.tree.leaves(params)}

    def spec(leaf: Any) -> PartitionSpec:
        return spec_of(leaf.shape) if leaf.shape in shapes else PartitionSpec()

    program = compiled_step(optimizer)
    if mapped:
        own, state = (
            jax.tree.map(spec, tree) for tree in (params, jax.eval_shape(optimizer.init, params))
        )
        parts = jax.shard_map(
            step(optimizer), mesh=mesh, in_specs=(own, state, own), out_specs=(own, state)
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

    compiled = program.lower(
        *map(placed, (params, jax.eval_shape(optimizer.init, params), params))
    ).compile()
    unit = sum(
        4 * math.prod(sharding_of(leaf).shard_shape(leaf.shape)) for leaf in jax.tree.leaves(params)
    )
    temporary = getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0)
    text = compiled.as_text() or ""
    moved = list(traffic(text))
    return Cost(sum(moved) / unit, temporary / unit, len(moved), messages(text))
