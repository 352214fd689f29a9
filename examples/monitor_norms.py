"""Logs each layer's norm before and after clipping.

Without clipping, all 20 runs reach NaN within six steps; with any clip, none do. A 20-25-1 ReLU
network learns 1000 examples of an unscaled target (variance 23 300) with SGD 0.07, momentum 0.8,
batches of 128. Means over the last of 50 epochs, medians of 20 runs (seed 0); 20 seconds of one CPU
core, most of it compilation:

| clipping | loss | norm of hidden weights' gradient, before and after | of output weights' |
|---|---|---|---|
| value 1 | 92 | 70, 16.5 | 348, 4.5 |
| leaf norm 2 | 16.7 | 91, 2 | 149, 2 |
| global norm 2 | 1.6 | 22, 1.7 | 11.9, 0.81 |

This corrects two mistakes of tutorials that print such norms. Targets `[batch]` against predictions
`[batch, 1]` broadcast to a matrix of errors, so the network learns nothing (loss 23 280). And their
"norms without clipping" are read after the clip. Norms do not suggest a threshold either: with each
leaf limited to its median norm in the first run of leaf norm 2, the network learns nothing (loss
23 310).
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
# the clip, its limit of the norm (NaN if it has none), and what it does
CLIPS = {
    "none": (optax.identity(), np.nan, "nothing cut"),
    "value 1": (clip_by_value(1.0), np.nan, "each number cut at 1"),
    "leaf norm 2": (clip_by_norm(2.0), 2.0, "each array by itself"),
    "global norm 2": (clip_by_global_norm(2.0), 2.0, "all arrays together"),
}


class Network(nnx.Module):
    """A network with 20 inputs, 25 ReLU units and 1 output."""

    def __init__(self, rngs: nnx.Rngs):
        kernel, bias = nnx.initializers.xavier_uniform(), nnx.initializers.constant(0.01)
        linear = partial(nnx.Linear, kernel_init=kernel, bias_init=bias)
        self.hidden, self.output = linear(20, 25, rngs=rngs), linear(25, 1, rngs=rngs)


GRAPHDEF, _ = nnx.split(nnx.eval_shape(lambda: Network(nnx.Rngs(0))))
DATA = make_regression(1000, 20, noise=0.1, random_state=1)
# targets [1000, 1], as the predictions
X, Y = (jnp.asarray(array, jnp.float32).reshape(1000, -1) for array in DATA)


def mse(params: Any, rows: Array) -> Array:
    """Returns the mean squared error of a batch; rows of -1 fill it up and do not count."""
    network = nnx.merge(GRAPHDEF, params)
    predicted = network.output(nnx.relu(network.hidden(X[rows])))
    return jnp.mean((predicted - Y[rows]) ** 2, where=rows[:, None] >= 0)


def numbers(opt_state: Any, params: Any) -> dict[str, Array]:
    """Returns each leaf's norm before and after the clip, and the metrics of the clip.

    The two monitors measure independently of the clip.
    """
    before, clip, after, _ = opt_state
    logged = telemetry.metrics(clip, params)
    for name, monitor in ("norm_before", before), ("norm_after", after):
        for key, size in telemetry.metrics(monitor, params).items():
            if key.startswith("monitor/size_before/"):
                logged[key.replace("monitor/size_before", name)] = size
    return logged


def start(steps: int, key: Array) -> tuple[Any, Array]:
    """Returns the first parameters of a run, and the rows of its batches `[steps, 128]`.

    Every epoch has each example once, in a new order.
    """
    keys = jax.random.split(key, -(-steps // BATCHES))
    orders = jax.vmap(lambda key: jax.random.permutation(key, len(X)))(keys)
    filled = jnp.pad(orders, ((0, 0), (0, BATCH * BATCHES - len(X))), constant_values=-1)
    return nnx.split(Network(nnx.Rngs(key)))[1], filled.reshape(-1, BATCH)[:steps]


def train(clip: Any, params: Any, rows: Array) -> tuple[Any, dict[str, Array]]:
    """Trains one run; returns its last state, and the loss and numbers of every step `[steps]`."""
    optimizer = optax.chain(MONITOR, clip, MONITOR, optax.sgd(0.07, momentum=0.8))

    def step(carry: Any, rows: Array) -> tuple[Any, dict[str, Array]]:
        params, opt_state = carry
        loss, grads = jax.value_and_grad(mse)(params, rows)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        logged = {"loss": loss} | numbers(opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), logged

    return jax.lax.scan(step, (params, optimizer.init(params)), rows)


def write_events(folder: Path, logged: dict[str, np.ndarray]) -> None:
    """Writes the finite numbers of the first run for TensorBoard, and deletes older events."""
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as writer:
        for tag, values in logged.items():
            for step in np.flatnonzero(np.isfinite(values[0])):
                writer.add_scalar(tag, values[0, step], int(step) + 1)


def draw(panels: Any, logged: dict[str, np.ndarray], limit: float) -> None:
    """Draws a column of the plot: the norms of both weights before and after, and the loss."""
    steps = np.arange(1, logged["loss"].shape[1] + 1)
    for panel, leaf in zip(panels, WEIGHTS, strict=False):
        norms = (logged[f"norm_{when}/{leaf}"] for when in ("before", "after"))
        before, after = (quartiles(norm)[1] for norm in norms)
        panel.fill_between(steps, before, after, color="lightgray", label="cut off")
        # colour-blind readers can distinguish these colours
        panel.loglog(steps, before, color="#D55E00", linewidth=2.5, label="before clipping")
        panel.loglog(steps, after, color="#0072B2", linewidth=1.5, label="after clipping")
        panel.axhline(limit, color="black", linestyle=":", label="limit of the norm")
        panel.set_ylim(0.3, 1e4)  # without clipping the norm grows beyond the plot
    panels[2].loglog(steps, quartiles(logged["loss"])[1], color="black")
    panels[2].set(ylim=(0.5, 1e6), xlabel="step")


def main() -> None:
    """Trains with one clip after the other, from the same start."""
    what = "Norms of each layer before and after clipping."
    parser = command_line(what, "results/monitor_norms", epochs=False)
    count = "8 steps each, unless --steps says how many"
    parser.add_argument("--epochs", type=int, default=50, help=count)
    options = parser.parse_args()
    keys = jax.random.split(jax.random.key(options.seed), options.seeds)
    start_all = jax.vmap(partial(start, options.steps or options.epochs * BATCHES))
    params, order = jax.jit(start_all)(keys)
    figure, rows = Figure((13, 8.5), layout="constrained"), {}
    axes = figure.subplots(3, len(CLIPS), sharex=True, sharey="row", squeeze=False)
    bar = tqdm(CLIPS.items(), unit="clip")
    head = f"{'clipping':14}{'loss':>8}{'hidden: before':>16}{'after':>7}"
    bar.write(f"{head}{'output: before':>16}{'after':>7}{'NaN':>6}")
    for column, (name, (clip, limit, does)) in zip(axes.T, bar, strict=True):
        _, logged = jax.device_get(jax.jit(jax.vmap(partial(train, clip)))(params, order))
        nan = np.isnan(logged["loss"])
        # after NaN, ReLU makes gradients of 0, which would look like a small norm
        logged = {tag: np.where(nan, np.nan, values) for tag, values in logged.items()}
        write_events(Path(options.out) / "events" / name.replace(" ", "_"), logged)
        row = rows[name] = summary(nan, logged)
        bar.write(line_of(name, row))
        draw(column, logged, limit)
        ended = f"NaN in {row['nan_share']:.0%} of runs"
        end = ended if nan.any() else f"final loss {row['quartiles']['loss'][1]:.3g}"
        column[0].set_title(f"{name}: {does}\n{end}", fontsize="medium")
    labels = [*(f"norm of the gradient\nof {leaf}" for leaf in WEIGHTS), "loss"]
    for panel, label in zip(axes[:, 0], labels, strict=True):
        panel.set_ylabel(label)
    title = "What clipping cuts off the gradient, and what becomes of the loss"
    figure.suptitle(f"{title} (medians of {options.seeds} runs)")
    figure.legend(*axes[0, -1].get_legend_handles_labels(), loc="outside lower right", ncols=4)
    save(options.out, {"options": vars(options), "rows": rows}, norms=figure)
    print(f"and in {options.out}/events each step of the first run, for `tensorboard --logdir`")


def summary(nan: np.ndarray, logged: dict[str, np.ndarray]) -> dict[str, Any]:
    """Summarizes the runs of one clip, by means over their last epoch."""
    last = {tag: quartiles(values[:, -BATCHES:].mean(1)) for tag, values in logged.items()}
    return {
        "nan_share": nan.any(1).mean(),
        "steps_before_nan": (~nan).sum(1),
        "quartiles": last,
    }


def line_of(name: str, row: dict[str, Any]) -> str:
    """Returns a line of the table, with medians over runs."""
    last, line = row["quartiles"], f"{name:14}{row['quartiles']['loss'][1]:8.4g}"
    for leaf in WEIGHTS:
        line += f"{last[f'norm_before/{leaf}'][1]:16.4g}{last[f'norm_after/{leaf}'][1]:7.3g}"
    return f"{line}{row['nan_share']:6.0%}"


if __name__ == "__main__":
    main()
