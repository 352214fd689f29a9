"""A transformer split over devices: bfloat16 parameters, float32 optimizer, clipped, guarded,
restarted bit for bit.

It learns bytes of text, on every mesh the same (losses differ by 0.005 at most): rows of the batch
and of matrices are split along "fsdp", heads and hidden units along "tensor". Gradients of two
micro-batches make one that is clipped, and the guard is around that: with `--bad-step 100`, one has
NaN on the last device alone, and all leave it out. It takes a minute and a half.
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
    "none": telemetry.monitor,
}
# heads and hidden units
INTO, OUT_OF = (
    PartitionSpec("fsdp", "tensor"),
    PartitionSpec("tensor", "fsdp"),
)
SPLIT = {
    "attend": INTO,
    "up": INTO,
    "head": INTO,
    "join": OUT_OF,
    "down": OUT_OF,
    "bytes": OUT_OF,
}  # else whole everywhere


class Block(nnx.Module):
    """Attention to what came before, then a network for each position, `[batch, length, WIDTH]` to
    the same.
    """

    def __init__(self, rows: NamedSharding, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, use_bias=False, param_dtype=jnp.bfloat16, rngs=rngs)
        norm = partial(nnx.RMSNorm, WIDTH, param_dtype=jnp.bfloat16, rngs=rngs)
        self.rows, self.norm, self.norm_too = rows, norm(), norm()
        self.attend, self.join = linear(WIDTH, 3 * WIDTH), linear(WIDTH, WIDTH)
        self.up, self.down = linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Says that activations stay split by rows, so that the compiler gathers weights instead."""
        heads = jnp.split(self.attend(self.norm(x)).reshape(*x.shape[:2], HEADS, -1), 3, axis=-1)
        attended = jax.nn.dot_product_attention(*heads, is_causal=True).reshape(x.shape)
        x = with_sharding_constraint(x + self.join(attended), self.rows)
        return with_sharding_constraint(
            x + self.down(jax.nn.gelu(self.up(self.norm_too(x)))), self.rows
        )


class Transformer(nnx.Module):
    """Bytes `[batch, length]` to logits of the next ones `[batch, length, 256]`."""

    def __init__(self, rows: NamedSharding, rngs: nnx.Rngs):
        self.rows, self.bytes = rows, nnx.Embed(256, WIDTH, param_dtype=jnp.bfloat16, rngs=rngs)
        self.blocks = nnx.Sequential(*[Block(rows, rngs) for _ in range(BLOCKS)])
        self.head = nnx.Linear(WIDTH, 256, use_bias=False, param_dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, text: jax.Array) -> jax.Array:
        """Each from the bytes up to there; that there are more of them for later ones is all that
        tells the place.
        """
        return self.head(self.blocks(with_sharding_constraint(self.bytes(text), self.rows)))


def programs(options: Any, mesh: Mesh) -> tuple[Any, Any]:
    """The compiled functions `() -> state` and `state -> state` of one micro-batch, with the state
    split over the mesh.
    """
    accumulated = optax.MultiSteps(
        optax.chain(CLIPS[options.clip](), optax.adamw(RATE)), 2
    ).gradient_transformation()
    optimizer = skip_nonfinite(accumulated)  # inside of MultiSteps it would come too late
    rows, text, cast = (
        NamedSharding(mesh, PartitionSpec("fsdp")),
        jnp.asarray(TEXT),
        optax.tree_utils.tree_cast,
    )
    key, batches = jax.random.split(jax.random.key(options.seed))
    graph, _ = nnx.split(nnx.eval_shape(lambda: Transformer(rows, nnx.Rngs(0))))

    def init() -> Any:
        params = nnx.state(Transformer(rows, nnx.Rngs(key)))
        weights = cast(params, jnp.float32)  # of which the parameters are the roundings
        return dict(
            params=params,
            weights=weights,
            optimizer=optimizer.init(weights),
            seen=jnp.zeros((options.steps, 3)),
        )

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        # the same in the state of the optimizer
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        return NamedSharding(
            mesh, next((spec for name, spec in SPLIT.items() if name in names), PartitionSpec())
        )

    def loss(params: Any, text: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params)(text[:, :-1]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()

    def step(state: Any) -> Any:
        done, weights = state["optimizer"].steps, state["weights"]
        starts = jax.random.randint(
            jax.random.fold_in(batches, done), (BATCH, 1), 0, len(text) - LENGTH
        )
        batch = with_sharding_constraint(
            text[starts + jnp.arange(LENGTH + 1)].astype(jnp.int32), rows
        )
        value, grads = jax.value_and_grad(loss)(state["params"], batch)
        # in the last corner of matrices
        bad = jnp.where(done + 1 == options.bad_step, jnp.nan, 0).astype(jnp.bfloat16)
        grads = jax.tree.map(
            lambda g: g.at[-1, -1].add(bad) if options.bad_step and g.ndim == 2 else g, grads
        )
        updates, optimizer_state = optimizer.update(
            cast(grads, jnp.float32), state["optimizer"], weights
        )
        weights, found = optax.apply_updates(weights, updates), telemetry.metrics(optimizer_state)
        seen = (
            state["seen"]
            .at[done]
            .set(jnp.stack([value, found["clip/size_before"], found["clip/limit"]]))
        )
        return dict(
            params=cast(weights, jnp.bfloat16),
            weights=weights,
            optimizer=optimizer_state,
            seen=seen,
        )

    places = jax.tree_util.tree_map_with_path(sharding, jax.eval_shape(init))
    return jax.jit(init, out_shardings=places), jax.jit(
        step, out_shardings=places, donate_argnums=0
    )


def train(options: Any, mesh: str, bar: tqdm) -> dict[str, Any]:
    """Trains, or goes on from the last checkpoint; and from the one before again, to the same bits
    or not.
    """
    shape = [int(size) for size in mesh.split(",")]
    init, step = programs(
        options, Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), ("fsdp", "tensor"))
    )
    run = f"mesh{mesh}-{options.clip}-bad{options.bad_step}-seed{options.seed}-steps{options.steps}"
    keep = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager(
        Path(options.out, "checkpoints", run).resolve(), options=keep
    ) as checkpoints:
        state, last = init(), checkpoints.latest_step() or 0
        state = checkpoints.restore(last, args=ocp.args.StandardRestore(state)) if last else state
        bar.update(last)
        for done in range(last + 1, options.steps + 1):
            state = jax.block_until_ready(step(state))
            bar.update()
            if done % -(-options.steps // 4) == 0 or done == options.steps:
                checkpoints.save(done, args=ocp.args.StandardSave(state))
        again = checkpoints.restore(
            restart := checkpoints.all_steps()[0], args=ocp.args.StandardRestore(state)
        )
    for _ in range(restart, options.steps):
        again = jax.block_until_ready(step(again))
    same = jax.tree.map(
        lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), state, again
    )
    (loss, norm, limit), found = np.array(state["seen"]).T, telemetry.metrics(state["optimizer"])
    counts = {name: int(found[f"clip/{name}_steps"]) for name in ("clipped", "skipped")}
    return dict(
        loss=loss, norm=norm, limit=limit, restart=restart, same_bits=jax.tree.all(same), **counts
    )


def main() -> None:
    """Trains on each mesh, and prints a row for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--mesh",
        nargs="+",
        default=["1,1", "8,1", "4,2"],
        help="devices along fsdp and along tensor",
    )
    parser.add_argument(
        "--clip", choices=CLIPS, default="adagc", help="of the accumulated gradients"
    )
    parser.add_argument("--bad-step", type=int, help="this micro-batch has a NaN in its gradients")
    parser.add_argument(
        "--steps", type=int, default=400, help="micro-batches, with four checkpoints"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument(
        "--out", default="results/fsdp_transformer", help="folder for checkpoints and numbers"
    )
    options = parser.parse_args()
    rows, bar = {}, tqdm(total=options.steps * len(options.mesh))
    bar.write("mesh       loss  furthest    norm   limit  clipped  skipped  restart  same bits")
    for mesh in options.mesh:
        row = rows[mesh] = train(options, mesh, bar)
        furthest = np.abs(row["loss"] - rows[options.mesh[0]]["loss"]).max()
        numbers = f"{row['loss'][-20:].mean():8.4f}{furthest:10.1e}{row['norm'][-1]:8.3f}{row['limit'][-1]:8.3f}"
        counts = f"{row['clipped']:9}{row['skipped']:9}{row['restart']:9}{'yes' if row['same_bits'] else 'no':>11}"
        bar.write(f"{mesh:7}{numbers}{counts}")
    bar.close()
    save(options.out, {"options": vars(options), "meshes": rows})


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)  # simulated, where there is no accelerator
    main()
