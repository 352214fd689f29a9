"""Trains a sharded transformer that clips, skips bad steps, and restarts bit for bit.

Parameters are bfloat16, the optimizer is float32. It learns bytes of text, and gives the same
losses on every mesh (they differ by at most 0.005). Rows of the batch and of matrices are sharded
over "fsdp", heads and hidden units over "tensor". The clip sees the mean gradient of two
micro-batches; the guard wraps the accumulation. With `--bad-step 100`, one gradient has a NaN on
the last device only, and all devices skip it. It takes a minute and a half.
"""

import argparse
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.lax import with_sharding_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from report import save
from tqdm import tqdm

from optaxclip import adagc, clip_by_global_norm, skip_nonfinite, telemetry, zclip

TEXT = np.frombuffer("\n".join(topics[name] for name in sorted(topics)).encode(), np.uint8)
WIDTH, HEADS, BLOCKS, LENGTH, BATCH, RATE = 64, 8, 2, 64, 16, 3e-3
CLIPS = {
    "adagc": adagc,
    "zclip": zclip,
    "global": partial(clip_by_global_norm, 1.0),
    "none": partial(clip_by_global_norm, float("inf")),  # only measures
}
# matrices into and out of heads and hidden units; all other parameters are replicated
INTO, OUT_OF = PartitionSpec("fsdp", "tensor"), PartitionSpec("tensor", "fsdp")
SPLIT = dict.fromkeys(["attend", "up", "head"], INTO)
SPLIT |= dict.fromkeys(["join", "down", "bytes"], OUT_OF)


class Block(nnx.Module):
    """Causal attention, then a network for each position; keeps `[batch, length, WIDTH]`."""

    def __init__(self, rows: NamedSharding, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, use_bias=False, param_dtype=jnp.bfloat16, rngs=rngs)
        norm = partial(nnx.RMSNorm, WIDTH, param_dtype=jnp.bfloat16, rngs=rngs)
        self.rows, self.norm, self.norm_too = rows, norm(), norm()
        self.attend, self.join = linear(WIDTH, 3 * WIDTH), linear(WIDTH, WIDTH)
        self.up, self.down = linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Keeps activations sharded by rows, so that the compiler gathers weights instead."""
        heads = jnp.split(self.attend(self.norm(x)).reshape(*x.shape[:2], HEADS, -1), 3, axis=-1)
        attended = jax.nn.dot_product_attention(*heads, is_causal=True).reshape(x.shape)
        x = with_sharding_constraint(x + self.join(attended), self.rows)
        hidden = jax.nn.gelu(self.up(self.norm_too(x)))
        return with_sharding_constraint(x + self.down(hidden), self.rows)


class Transformer(nnx.Module):
    """A transformer from bytes `[batch, length]` to logits of the next `[batch, length, 256]`."""

    def __init__(self, rows: NamedSharding, rngs: nnx.Rngs):
        self.rows, self.bytes = rows, nnx.Embed(256, WIDTH, param_dtype=jnp.bfloat16, rngs=rngs)
        self.blocks = nnx.Sequential(*[Block(rows, rngs) for _ in range(BLOCKS)])
        self.head = nnx.Linear(WIDTH, 256, use_bias=False, param_dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, text: jax.Array) -> jax.Array:
        """Predicts each next byte from the bytes before it; there is no positional encoding."""
        return self.head(self.blocks(with_sharding_constraint(self.bytes(text), self.rows)))


def programs(options: Any, mesh: Mesh) -> tuple[Any, Any]:
    """Compiles the functions `() -> state` and `state -> state` of one micro-batch.

    Both return a state that is sharded over the mesh.
    """
    clipped = optax.chain(CLIPS[options.clip](), optax.adamw(RATE))
    # inside of MultiSteps the guard would come too late
    optimizer = skip_nonfinite(optax.MultiSteps(clipped, 2).gradient_transformation())
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    key, batches = jax.random.split(jax.random.key(options.seed))
    graph, _ = nnx.split(nnx.eval_shape(lambda: Transformer(rows, nnx.Rngs(0))))
    cast = optax.tree_utils.tree_cast

    def init() -> Any:
        params = nnx.state(Transformer(rows, nnx.Rngs(key)))
        weights = cast(params, jnp.float32)  # the parameters are their roundings
        state = {"params": params, "weights": weights, "optimizer": optimizer.init(weights)}
        return {**state, "seen": jnp.zeros((options.steps, 3))}

    def step(state: Any) -> Any:
        done, weights = state["optimizer"].steps, state["weights"]
        batch = with_sharding_constraint(some_text(jax.random.fold_in(batches, done)), rows)
        value, grads = jax.value_and_grad(loss, 1)(graph, state["params"], batch)
        if options.bad_step:
            grads = spoiled(grads, done + 1 == options.bad_step)
        grads = cast(grads, jnp.float32)
        updates, optimizer_state = optimizer.update(grads, state["optimizer"], weights)
        weights, metrics = optax.apply_updates(weights, updates), telemetry.metrics(optimizer_state)
        numbers = jnp.stack([value, metrics["clip/size_before"], metrics["clip/limit"]])
        params, seen = cast(weights, jnp.bfloat16), state["seen"].at[done].set(numbers)
        return {"params": params, "weights": weights, "optimizer": optimizer_state, "seen": seen}

    shardings = shardings_of(jax.eval_shape(init), mesh)
    steps = jax.jit(step, out_shardings=shardings, donate_argnums=0)
    return jax.jit(init, out_shardings=shardings), steps


def some_text(key: jax.Array) -> jax.Array:
    """Draws a batch of pieces of the text, `[BATCH, LENGTH + 1]`."""
    starts = jax.random.randint(key, (BATCH, 1), 0, len(TEXT) - LENGTH)
    return jnp.asarray(TEXT)[starts + jnp.arange(LENGTH + 1)].astype(jnp.int32)


def loss(graph: Any, params: Any, text: jax.Array) -> jax.Array:
    """Returns nats per byte."""
    logits = nnx.merge(graph, params)(text[:, :-1]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()


def spoiled(grads: Any, now: jax.Array) -> Any:
    """Puts a NaN in the last corner of each matrix, which only the last device holds."""
    bad = jnp.where(now, jnp.nan, 0).astype(jnp.bfloat16)
    return jax.tree.map(lambda g: g.at[-1, -1].add(bad) if g.ndim == 2 else g, grads)


def shardings_of(state: Any, mesh: Mesh) -> Any:
    """Returns the sharding of every leaf, by its path: the optimizer's state has the same names."""

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        specs = (spec for name, spec in SPLIT.items() if name in names)
        return NamedSharding(mesh, next(specs, PartitionSpec()))

    return jax.tree_util.tree_map_with_path(sharding, state)


def train(options: Any, mesh: str, bar: tqdm) -> dict[str, Any]:
    """Trains, or resumes from the last checkpoint.

    At the end it trains once more from the checkpoint before the last, and compares the bits.
    """
    shape = [int(size) for size in mesh.split(",")]
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    init, step = programs(options, Mesh(devices, ("fsdp", "tensor")))
    run = f"mesh{mesh}-{options.clip}-bad{options.bad_step}-seed{options.seed}-steps{options.steps}"
    folder = Path(options.out, "checkpoints", run).resolve()
    keep = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder, options=keep) as checkpoints:
        state, last = init(), checkpoints.latest_step() or 0
        state = checkpoints.restore(last, args=ocp.args.StandardRestore(state)) if last else state
        bar.update(last)
        for done in range(last + 1, options.steps + 1):
            state = jax.block_until_ready(step(state))
            bar.update()
            if done % -(-options.steps // 4) == 0 or done == options.steps:
                checkpoints.save(done, args=ocp.args.StandardSave(state))
        restart = checkpoints.all_steps()[0]
        again = checkpoints.restore(restart, args=ocp.args.StandardRestore(state))
    for _ in range(restart, options.steps):
        again = jax.block_until_ready(step(again))
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True)
    same = all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)
    curves = dict(zip(("loss", "norm", "limit"), np.array(state["seen"]).T, strict=True))
    metrics = telemetry.metrics(state["optimizer"])
    counts = {name: int(metrics[f"clip/{name}_steps"]) for name in ("clipped", "skipped")}
    return {**curves, "restart": restart, "same_bits": same, **counts}


def main() -> None:
    """Trains on each mesh, and prints a row for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add, meshes = parser.add_argument, ["1,1", "8,1", "4,2"]
    add("--mesh", nargs="+", default=meshes, help="devices along fsdp and along tensor")
    add("--clip", choices=CLIPS, default="adagc", help="of the accumulated gradients")
    add("--bad-step", type=int, help="this micro-batch has a NaN in its gradients")
    add("--steps", type=int, default=400, help="micro-batches, with four checkpoints")
    add("--seed", type=int, default=0, help="of all random numbers")
    add("--out", default="results/fsdp_transformer", help="folder for checkpoints and numbers")
    options = parser.parse_args()
    rows, bar = {}, tqdm(total=options.steps * len(options.mesh))
    bar.write("mesh       loss  furthest    norm   limit  clipped  skipped  restart  same bits")
    for mesh in options.mesh:
        row = rows[mesh] = train(options, mesh, bar)
        furthest = np.abs(row["loss"] - rows[options.mesh[0]]["loss"]).max()
        losses = f"{row['loss'][-20:].mean():8.4f}{furthest:10.1e}"
        sizes = f"{row['norm'][-1]:8.3f}{row['limit'][-1]:8.3f}"
        counts = f"{row['clipped']:9}{row['skipped']:9}{row['restart']:9}"
        bar.write(f"{mesh:7}{losses}{sizes}{counts}{'yes' if row['same_bits'] else 'no':>11}")
    bar.close()
    save(options.out, {"options": vars(options), "meshes": rows})


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)  # simulated, where there is no accelerator
    main()
