"""Norms of each layer before and after clipping. Without a clip each of 20 runs is NaN after five
or six steps, with one none.

A 20-25-1 ReLU network learns 1000 examples of an unscaled target (variance 23 300) with SGD 0.07,
momentum 0.8, batches of 128. Means over the last of 50 epochs, medians of 20 runs (seed 0); 20
seconds of one CPU core, most of it compilation:

| clipping | loss | norm of hidden weights' gradient, before and after | of output weights' |
|---|---|---|---|
| value 1 | 92 | 70, 16.5 | 348, 4.5 |
| leaf norm 2 | 16.7 | 91, 2 | 149, 2 |
| global norm 2 | 1.6 | 22, 1.7 | 11.9, 0.81 |

Two mistakes of the tutorials that print this are repaired: targets `[batch]` against predictions
`[batch, 1]` make a matrix of errors, so nothing is learned (loss 23 280), and "norms without
clipping" are read after the clip. Nor do norms tell a threshold: if limited to its median norm in
the first run of leaf norm 2, each leaf learns nothing (loss 23 310).
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from matplotlib.figure import Figure
from report import command_line, quartiles, save
from sklearn.datasets import make_regression
from tensorboardX import SummaryWriter
from tqdm import tqdm

from optaxclip import clip_by_global_norm, clip_by_norm, clip_by_value, scopes, telemetry

BATCH, BATCHES = 128, 8  # the last batch of the 1000 examples has 104
MONITOR, WEIGHTS = telemetry.monitor(scope=scopes.leaf()), ("hidden/kernel", "output/kernel")
CLIPS = {  # with its limit, if it is one of norms, and what it does
    "none": (optax.identity(), np.nan, "nothing cut"),
    "value 1": (clip_by_value(1.0), np.nan, "each number cut at 1"),
    "leaf norm 2": (clip_by_norm(2.0), 2.0, "each array by itself"),
    "global norm 2": (clip_by_global_norm(2.0), 2.0, "all arrays together"),
}


class Network(nnx.Module):
    """20 inputs, 25 ReLU units, 1 output."""

    def __init__(self, rngs: nnx.Rngs):
        linear = partial(
            nnx.Linear,
            kernel_init=nnx.initializers.xavier_uniform(),
            bias_init=nnx.initializers.constant(0.01),
        )
        self.hidden, self.output = linear(20, 25, rngs=rngs), linear(25, 1, rngs=rngs)


GRAPHDEF, _ = nnx.split(nnx.eval_shape(lambda: Network(nnx.Rngs(0))))
DATA = make_regression(1000, 20, noise=0.1, random_state=1)
# targets [1000, 1], as the predictions
X, Y = (jnp.asarray(array, jnp.float32).reshape(1000, -1) for array in DATA)


def mse(params: Any, rows: Array) -> Array:
    """Mean squared error of a batch; rows of -1 fill it up and do not count."""
    network = nnx.merge(GRAPHDEF, params)
    return jnp.mean(
        (network.output(nnx.relu(network.hidden(X[rows]))) - Y[rows]) ** 2, where=rows[:, None] >= 0
    )


def numbers(opt_state: Any, params: Any) -> dict[str, Array]:
    """The norm of each leaf before and after, and everything that the clip itself tells: none of it
    depends on the other.
    """
    before, clip, after, _ = opt_state
    found = telemetry.metrics(clip, params)
    for name, monitor in ("norm_before", before), ("norm_after", after):
        sizes = telemetry.metrics(monitor, params, prefix=name)
        found |= {
            key.replace("/size_before", ""): sizes[key]
            for key in sizes
            if key.startswith(f"{name}/size_before/")
        }
    return found


def start(steps: int, key: Array) -> tuple[Any, Array]:
    """First parameters and the rows of every step `[steps, 128]` of a run: every example once an
    epoch, in another order.
    """
    orders = jax.vmap(lambda key: jax.random.permutation(key, len(X)))(
        jax.random.split(key, -(-steps // BATCHES))
    )
    filled = jnp.pad(orders, ((0, 0), (0, BATCH * BATCHES - len(X))), constant_values=-1)
    return nnx.split(Network(nnx.Rngs(key)))[1], filled.reshape(-1, BATCH)[:steps]


def train(clip: Any, params: Any, rows: Array) -> tuple[Any, dict[str, Array]]:
    """Parameters and optimizer state at the end of a run; loss and numbers of every step `[steps]`."""
    optimizer = optax.chain(MONITOR, clip, MONITOR, optax.sgd(0.07, momentum=0.8))

    def step(carry: Any, rows: Array) -> tuple[Any, dict[str, Array]]:
        params, opt_state = carry
        loss, grads = jax.value_and_grad(mse)(params, rows)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), {"loss": loss} | numbers(
            opt_state, params
        )

    return jax.lax.scan(step, (params, optimizer.init(params)), rows)


def write_events(folder: Path, told: dict[str, np.ndarray]) -> None:
    """For TensorBoard: a curve per number, of the first run, as long as it is finite; replaces
    those of an earlier program.
    """
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as writer:
        for tag, values in told.items():
            for step in np.flatnonzero(np.isfinite(values[0])):
                writer.add_scalar(tag, values[0, step], int(step) + 1)


def draw(panels: Any, told: dict[str, np.ndarray], limit: float) -> None:
    """One column of the picture: the norms of both weights before and after, and the loss."""
    steps = np.arange(1, told["loss"].shape[1] + 1)
    for panel, leaf in zip(panels, WEIGHTS, strict=False):
        before, after = (quartiles(told[f"norm_{when}/{leaf}"])[1] for when in ("before", "after"))
        panel.fill_between(steps, before, after, color="lightgray", label="cut off")
        # colours that colour-blind
        panel.loglog(steps, before, color="#D55E00", linewidth=2.5, label="before clipping")
        # readers can tell apart
        panel.loglog(steps, after, color="#0072B2", linewidth=1.5, label="after clipping")
        panel.axhline(limit, color="black", linestyle=":", label="limit of the norm")
        panel.set_ylim(0.3, 1e4)  # without clipping it leaves the picture
    panels[2].loglog(steps, quartiles(told["loss"])[1], color="black")
    panels[2].set(ylim=(0.5, 1e6), xlabel="step")


def main() -> None:
    """Trains with one clip after the other, from the same start."""
    parser = command_line(
        "Norms of each layer before and after clipping.", "results/monitor_norms", epochs=False
    )
    parser.add_argument(
        "--epochs", type=int, default=50, help="8 steps each, unless --steps says how many"
    )
    options = parser.parse_args()
    keys = jax.random.split(jax.random.key(options.seed), options.seeds)
    params, order = jax.jit(jax.vmap(partial(start, options.steps or options.epochs * BATCHES)))(
        keys
    )
    figure, rows, bar = (
        Figure((13, 8.5), layout="constrained"),
        {},
        tqdm(CLIPS.items(), unit="clip"),
    )
    axes = figure.subplots(3, len(CLIPS), sharex=True, sharey="row", squeeze=False)
    bar.write(
        f"{'clipping':14}{'loss':>8}{'hidden: before':>16}{'after':>7}{'output: before':>16}{'after':>7}{'NaN':>6}"
    )
    for column, (name, (clip, limit, does)) in zip(axes.T, bar, strict=True):
        _, told = jax.device_get(jax.jit(jax.vmap(partial(train, clip)))(params, order))
        nan = np.isnan(told["loss"])
        # ReLU makes gradients of 0 from NaN
        told = {tag: np.where(nan, np.nan, values) for tag, values in told.items()}
        write_events(Path(options.out) / "events" / name.replace(" ", "_"), told)
        # means over the last epoch
        final = {tag: quartiles(values[:, -BATCHES:].mean(1)) for tag, values in told.items()}
        rows[name] = {
            "nan_share": nan.any(1).mean(),
            "steps_before_nan": (~nan).sum(1),
            "quartiles": final,
        }
        norms = "".join(
            f"{final[f'norm_before/{leaf}'][1]:16.4g}{final[f'norm_after/{leaf}'][1]:7.3g}"
            for leaf in WEIGHTS
        )
        bar.write(f"{name:14}{final['loss'][1]:8.4g}{norms}{nan.any(1).mean():6.0%}")
        draw(column, told, limit)
        end = (
            f"NaN in {nan.any(1).mean():.0%} of runs"
            if nan.any()
            else f"final loss {final['loss'][1]:.3g}"
        )
        column[0].set_title(f"{name}: {does}\n{end}", fontsize="medium")
    for panel, label in zip(
        axes[:, 0], [*(f"norm of the gradient\nof {leaf}" for leaf in WEIGHTS), "loss"], strict=True
    ):
        panel.set_ylabel(label)
    figure.suptitle(
        f"What clipping cuts off the gradient, and what becomes of the loss (medians of "
        f"{options.seeds} runs)"
    )
    figure.legend(*axes[0, -1].get_legend_handles_labels(), loc="outside lower right", ncols=4)
    save(options.out, {"options": vars(options), "rows": rows}, norms=figure)
    print(f"and in {options.out}/events each step of the first run, for `tensorboard --logdir`")


if __name__ == "__main__":
    main()
