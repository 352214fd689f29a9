"""Trains one model in multiple processes that clip by one norm and skip the same steps.

Each process stands for a host of a cluster. It holds some rows of every matrix and batch, and
communicates with the others only through `jax.distributed`. In one step a single process gets a NaN
in its rows; all processes skip the step. The result is compared with a run in one process.
"""

import argparse
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import optaxclip
from optaxclip import telemetry

BATCH, WIDTH = 32, 64
OPTIMIZER = optaxclip.skip_nonfinite(
    optax.chain(optaxclip.clip_by_global_norm(0.5), optax.sgd(0.1, momentum=0.9))
)
MODEL = nn.Sequential([nn.Dense(WIDTH), nn.tanh, nn.Dense(WIDTH), nn.tanh, nn.Dense(1)])


def batches(seed: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns inputs `[steps, BATCH, WIDTH]` and targets `[steps, BATCH]`.

    The last row of the middle step has a NaN.
    """
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((steps, BATCH, WIDTH), np.float32)
    y = np.sin(x.sum(-1))
    x[steps // 2, -1, 0] = np.nan
    return x, y


def shard(tree: Any, mesh: Mesh) -> Any:
    """Shards arrays over the processes by rows; replicates arrays that do not divide evenly."""

    def place(x: np.ndarray) -> jax.Array:
        even = x.ndim and x.shape[0] % mesh.size == 0
        sharding = NamedSharding(mesh, PartitionSpec("hosts") if even else PartitionSpec())
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree)


def train(seed: int, steps: int) -> dict[str, Any]:
    """Trains; returns the parameters as one vector, and the counts of the clip and the guard."""
    mesh = Mesh(np.array(jax.devices()), ("hosts",))
    x, y = batches(seed, steps)
    start = jax.device_get(MODEL.init(jax.random.key(seed), x[0, :1]))
    params, opt_state = shard(start, mesh), shard(jax.device_get(OPTIMIZER.init(start)), mesh)

    @jax.jit
    def step(params: Any, opt_state: Any, x: jax.Array, y: jax.Array) -> Any:
        def mse(params: Any) -> jax.Array:
            predicted: Any = MODEL.apply(params, x)
            return jnp.mean((predicted[:, 0] - y) ** 2)

        grads = jax.grad(mse)(params)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for batch in zip(x, y, strict=True):
        params, opt_state = step(params, opt_state, *shard(batch, mesh))
    metrics = telemetry.metrics(opt_state).items()
    counts = {name: float(x) for name, x in metrics if "steps" in name or "before" in name}
    whole = multihost_utils.process_allgather(params, tiled=True)
    vector = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(whole)])
    return {"params": vector.tolist(), **counts}


def main() -> None:
    """Starts the processes, and compares their results with a run in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2, help="how many")
    parser.add_argument("--steps", type=int, default=40, help="of training")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--out", default="results/multi_process", help="folder for the results")
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    if options.process is not None:
        jax.distributed.initialize(options.address, options.processes, options.process)
        results = json.dumps(train(options.seed, options.steps))
        (folder / f"process{options.process}.json").write_text(results)
        return
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, __file__, *sys.argv[1:], "--address", address]
    running = [subprocess.Popen([*command, "--process", str(i)]) for i in range(options.processes)]
    reference = train(options.seed, options.steps)
    if any([process.wait() for process in running]):
        raise SystemExit("a process failed; its error is above")
    head = f"{'':12}{'skipped':>9}{'clipped':>9}{'last norm':>11}"
    print(f"{head}{'furthest parameter from one process':>38}")
    for i in range(options.processes):
        row = json.loads((folder / f"process{i}.json").read_text())
        apart = np.max(np.abs(np.subtract(row["params"], reference["params"])))
        counts = f"{row['clip/skipped_steps']:9.0f}{row['clip/clipped_steps']:9.0f}"
        print(f"{f'process {i}':12}{counts}{row['clip/size_before']:11.4f}{apart:38.1e}")


if __name__ == "__main__":
    main()
