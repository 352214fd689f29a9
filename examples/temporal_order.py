"""Long memory: clipping decides whether a recurrent network learns it.

The task of Pascanu et al. (2013): a sequence of distractors has one of two marks early on, and
another before its middle; which two marks are they? Plain SGD, 800 steps. How many of 12 runs
exceed 95 % accuracy on new sequences, by length:

    RNN, rate 0.3   10  15  20  25      LSTM, rate 3      10  15  20  25
    global norm 1   12  12  10  11      global norm 0.25  12  12  12   5
    global norm 5   12   2   0   0      global norm 1     12  10   4   0
    no clipping     12   0   0   0      no clipping       12   7   1   0

No run ever reaches NaN. Where clipping decides, the norm of successful runs rises far above the
threshold and then falls; without clipping it does not change. A lower rate helps only at length 15:
without clipping, the best of the rates 0.003, 0.01, 0.03 and 0.1 solves 16, 7 and 2 of 16 RNN runs
at lengths 15, 20 and 25 (`--cell rnn --seeds 16 --learning-rate`). It takes 105 seconds of
processor time.
"""

from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from matplotlib.figure import Figure
from report import command_line, quartiles, save
from tqdm import tqdm

import optaxclip

# CHUNK steps are one call of the compiled program; each run is tested on TEST new sequences
BATCH, UNITS, CHUNK, TEST = 32, 32, 100, 1000
# colour-blind readers can distinguish these colours
COLORS = {"0.25": "#009E73", "1": "#0072B2", "5": "#D55E00", "none": "#000000"}
CELLS = {
    "rnn": (nnx.SimpleCell, 0.3, ["1", "5", "none"]),
    "lstm": (nnx.OptimizedLSTMCell, 3.0, ["0.25", "1", "none"]),
}


def sequences(
    rng: np.random.Generator, shape: tuple[int, ...], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws sequences of symbols with two marks; the class says which two marks.

    Symbols are 2 to 5. A mark is 0 or 1; one is in the second tenth of the sequence, the other in
    the fifth tenth.
    """
    x = rng.integers(2, 6, (*shape, length), np.int8)
    marks = rng.integers(0, 2, (*shape, 2), np.int8)
    first, last = np.array([1, 4]) * length // 10, np.array([2, 5]) * length // 10
    np.put_along_axis(x, rng.integers(first, last, (*shape, 2)), marks, axis=-1)
    return x, 2 * marks[..., 0] + marks[..., 1]


class Reader(nnx.Module):
    """A recurrent cell, and a linear layer after its last step."""

    def __init__(self, make_cell: Any, rngs: nnx.Rngs):
        normal = nnx.initializers.normal
        cell = make_cell(
            6, UNITS, kernel_init=normal(0.3), recurrent_kernel_init=normal(UNITS**-0.5), rngs=rngs
        )
        self.rnn, self.out = nnx.RNN(cell, rngs=False), nnx.Linear(UNITS, 4, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Maps symbols `[batch, length]` to logits `[batch, 4]`."""
        # the cell asks for rngs but does not use them: its state starts at zero
        hidden: Any = self.rnn(jax.nn.one_hot(x, 6), rngs=nnx.Rngs(0))
        return self.out(hidden[:, -1])


def train(
    name: str, rate: float | None, keys: Array, data: tuple[np.ndarray, ...], bar: tqdm
) -> dict[str, dict[str, Any]]:
    """Trains all seeds with all thresholds of a cell in one program.

    Returns for each threshold a row of arrays over seeds.
    """
    make_cell, usual_rate, labels = CELLS[name]
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Reader(make_cell, nnx.Rngs(0))))

    def optimizer(threshold: Array) -> optax.GradientTransformationExtraArgs:
        return optax.chain(optaxclip.clip_by_global_norm(threshold), optax.sgd(rate or usual_rate))

    def start(key: Array, threshold: Array) -> Any:
        params = nnx.split(Reader(make_cell, nnx.Rngs(key)))[1]
        return params, optimizer(threshold).init(params)

    def loss(params: Any, x: Array, y: Array) -> Array:
        logits = nnx.merge(graphdef, params)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(run: Any, threshold: Array, batch: tuple[Array, Array]) -> tuple[Any, Array]:
        params, opt_state = run
        grads = jax.grad(loss)(params, *batch)
        updates, opt_state = optimizer(threshold).update(grads, opt_state, params)
        norm = optaxclip.telemetry.metrics(opt_state)["clip/size_before"]
        return (optax.apply_updates(params, updates), opt_state), norm

    (x, y, *test), norms = data, []
    thresholds = jnp.array([float(label.replace("none", "inf")) for label in labels])
    # seeds by thresholds; all thresholds of a seed see the same batches
    every_step = jax.vmap(jax.vmap(step, (0, 0, None)), (0, None, 0))

    @jax.jit
    def advance(runs: Any, x: Array, y: Array) -> Any:
        return jax.lax.scan(lambda runs, batch: every_step(runs, thresholds, batch), runs, (x, y))

    runs = jax.vmap(jax.vmap(start, (None, 0)), (0, None))(keys, thresholds)
    for done in range(0, len(x), CHUNK):
        runs, norm = advance(runs, x[done : done + CHUNK], y[done : done + CHUNK])
        norms.append(jax.device_get(norm))
        bar.update()
    row = summary(accuracies(graphdef, runs[0], *test), np.concatenate(norms), runs[1])
    return {
        label: {key: np.asarray(array[:, i]) for key, array in row.items()}
        for i, label in enumerate(labels)
    }


def accuracies(graphdef: Any, params: Any, x: np.ndarray, y: np.ndarray) -> Array:
    """Returns the accuracies on new sequences, `[seeds, thresholds]`."""

    def accuracy(params: Any, x: Array, y: Array) -> Array:
        return jnp.mean(nnx.merge(graphdef, params)(x).argmax(-1) == y)

    return jax.jit(jax.vmap(jax.vmap(accuracy, (0, None, None))))(params, x, y)


def summary(accuracy: Array, norm: np.ndarray, opt_state: Any) -> dict[str, Any]:
    """Summarizes runs `[seeds, thresholds]`, with their norms `[steps, seeds, thresholds]`."""
    clipped_steps = optaxclip.telemetry.metrics(opt_state)["clip/clipped_steps"]
    return {
        "accuracy": accuracy,
        "solved": accuracy > 0.95,
        "nonfinite": ~np.isfinite(norm).all(0),
        "largest_norm": norm.max(0),
        "quartiles_norm": np.stack(quartiles(norm.swapaxes(0, 1))).swapaxes(1, 2),
        "clipped_share": clipped_steps / len(norm),
    }


def draw(cells: dict[str, Any], options: Any) -> Figure:
    """Draws for each cell the share of runs that solve the task, and the norms of the gradient."""
    figure = Figure((5.5 * len(cells), 8), layout="constrained")
    panels = figure.subplots(2, len(cells), sharey="row", squeeze=False)
    for (name, lengths), (success, norm) in zip(cells.items(), panels.T, strict=True):
        draw_success(success, name, lengths)
        draw_norms(norm, name, lengths)
    title = "Which two marks were there, and in which order?"
    figure.suptitle(f"{title} {options.steps} steps of SGD, {options.seeds} runs")
    return figure


def draw_success(panel: Any, name: str, lengths: dict[int, Any]) -> None:
    """Draws the share of runs that solve the task, against the length."""
    # wide lines first, so that later lines hide nothing
    for label, marker, width in zip(CELLS[name][2], ("o-", "s-", "X-"), (6, 4, 2), strict=True):
        share = [100 * rows[label]["solved"].mean() for rows in lengths.values()]
        size = {"linewidth": width, "markersize": 2 * width + 3}
        panel.plot(list(lengths), share, marker, **size, **look_of(label))
    labels = {"xlabel": "length", "ylabel": "% of runs that solve it"}
    panel.set(title=name.upper(), xticks=list(lengths), ylim=(-6, 106), **labels)
    panel.legend()


def draw_norms(panel: Any, name: str, lengths: dict[int, Any]) -> None:
    """Draws the norms at the length where the tightest threshold helps most."""
    tight, _, none = CELLS[name][2]
    helped = {
        length: rows[tight]["solved"].sum() - rows[none]["solved"].sum()
        for length, rows in lengths.items()
    }
    most = max(reversed(helped), key=helped.__getitem__)  # the longest of equal lengths
    for label in tight, none:
        low, median, high = lengths[most][label]["quartiles_norm"]
        steps = range(1, len(median) + 1)
        panel.semilogy(steps, median, linewidth=1, **look_of(label))
        panel.fill_between(steps, low, high, color=COLORS[label], alpha=0.25, linewidth=0)
    panel.axhline(float(tight), color=COLORS[tight], linestyle="--", label=f"threshold {tight}")
    title = f"{name.upper()} gradients, length {most}: median, quartiles"
    panel.set(title=title, xlabel="step", ylabel="norm before clip")
    panel.legend()


def look_of(label: str) -> dict[str, str]:
    """Returns the colour and the legend of a threshold."""
    text = "no clipping" if label == "none" else f"clipped to norm {label}"
    return {"color": COLORS[label], "label": text}


def main() -> None:
    """Trains every cell at every length."""
    options = options_of_the_command_line()
    names = CELLS if options.cell == "both" else [options.cell]
    keys = jax.random.split(jax.random.key(options.seed), options.seeds)
    bar = tqdm(total=len(names) * len(options.lengths) * -(-options.steps // CHUNK), unit="chunk")
    head = f"{'cell':6}{'length':>6}{'clip':>6}{'solved':>10}{'accuracy':>10}"
    bar.write(f"{head}{'non-finite':>12}{'clipped':>9}{'top norm':>10}")
    cells: dict[str, Any] = {name: {} for name in names}
    for name, length in product(names, options.lengths):
        bar.set_description(f"{name:5}{length:4}")
        rng = np.random.default_rng([options.seed, length])
        training = sequences(rng, (options.steps, options.seeds, BATCH), length)
        test = sequences(rng, (options.seeds, TEST), length)
        rows = cells[name][length] = train(
            name, options.learning_rate, keys, (*training, *test), bar
        )
        for label, row in rows.items():
            bar.write(f"{name:6}{length:6}{label:>6}{line_of(row)}")
    bar.close()
    save(options.out, {"options": vars(options), "cells": cells}, success=draw(cells, options))


def options_of_the_command_line() -> Any:
    """Returns the options that the user gave."""
    what = "A long memory, which clipping decides upon."
    parser = command_line(what, "results/temporal_order", epochs=False)
    parser.set_defaults(seeds=12, steps=800)
    add, lengths = parser.add_argument, [10, 15, 20, 25]
    add("--cell", choices=[*CELLS, "both"], default="both", help="what to train")
    add("--lengths", type=int, nargs="+", default=lengths, help="of the sequences, 10 or more")
    add("--learning-rate", type=float, help="instead of 0.3 for the RNN and 3 for the LSTM")
    return parser.parse_args()


def line_of(row: dict[str, Any]) -> str:
    """Returns the numbers of a line of the table."""
    solved, nonfinite = (f"{row[key].sum()} of {len(row[key])}" for key in ("solved", "nonfinite"))
    line = f"{solved:>10}{np.median(row['accuracy']):10.2f}{nonfinite:>12}"
    return f"{line}{row['clipped_share'].mean():9.1%}{np.median(row['largest_norm']):10.3g}"


if __name__ == "__main__":
    main()
