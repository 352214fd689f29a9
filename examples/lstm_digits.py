"""An LSTM reads images row by row: an easy task on which clipping changes nothing.

No gradient explodes here. Median test accuracy of 16 seeds with nnx, and with `--api linen`: none
.928, .929; value 1 .928, .929; leaf norm 2 .928, .931; global norm 1 .928, .919; autoclip .924,
.922; Graves 1/32 .929, .926. The choice of the fifth of the digits that is held out matters more
(.919 to .950 in five splits). Global norm 1 clips three of four steps and autoclip 99 of 100; both
only start a little slower. Graves' limit for text, 1, becomes 1/32 because the loss is a mean over
32 images. All runs together took three minutes on two busy CPU cores.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx
from flax.training.train_state import TrainState
from jax import Array
from matplotlib.figure import Figure
from report import command_line, quartiles, save
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import optaxclip

UNITS, BATCH, CHUNK = 32, 32, 100  # a chunk of steps is one compiled program
GRAVES = partial(optaxclip.clip_activation_grad, limit=1 / BATCH)
# the clip of the gradient, the wrapper of activation functions, and the colour of each row
CLIPS = {
    "none": (optax.identity(), lambda activation: activation, "#000000"),
    "value 1": (optaxclip.clip_by_value(1.0), lambda activation: activation, "#D55E00"),
    "leaf norm 2": (optaxclip.clip_by_norm(2.0), lambda activation: activation, "#0072B2"),
    "global norm 1": (optaxclip.clip_by_global_norm(1.0), lambda activation: activation, "#E69F00"),
    "autoclip": (optaxclip.autoclip(), lambda activation: activation, "#CC79A7"),
    "Graves 1/32": (optax.identity(), GRAVES, "#009E73"),
}


class NnxClassifier(nnx.Module):
    """An LSTM from images `[batch, rows, columns]` to logits `[batch, 10]`."""

    def __init__(self, columns: int, wrap: Any, rngs: nnx.Rngs):
        gates = {"gate_fn": wrap(nnx.sigmoid), "activation_fn": wrap(nnx.tanh)}
        self.rows: Any = nnx.RNN(nnx.OptimizedLSTMCell(columns, UNITS, rngs=rngs, **gates))
        self.head = nnx.Linear(UNITS, 10, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Returns the logits after the last row."""
        zeros = jnp.zeros((len(images), UNITS))
        return self.head(self.rows(images, initial_carry=(zeros, zeros))[:, -1])


class LinenClassifier(linen.Module):
    """The same network in Flax's older API."""

    wrap: Any

    @linen.compact
    def __call__(self, images: Array) -> Array:
        """Returns the logits after the last row."""
        gates = {"gate_fn": self.wrap(linen.sigmoid), "activation_fn": self.wrap(linen.tanh)}
        cell: Any = linen.OptimizedLSTMCell(UNITS, **gates)
        carry = (jnp.zeros((len(images), UNITS)),) * 2
        for row in images.swapaxes(0, 1):
            carry, _ = cell(carry, row)
        return linen.Dense(10)(carry[1])


def network(api: str, columns: int, wrap: Any) -> tuple[Any, Any]:
    """Returns the functions `key -> params` and `(params, images) -> logits`."""
    if api == "linen":
        model = LinenClassifier(wrap)
        return lambda key: model.init(key, jnp.zeros((1, 1, columns))), model.apply
    make = partial(NnxClassifier, columns, wrap)
    graphdef, _, rest = nnx.split(make(nnx.Rngs(0)), nnx.Param, ...)

    def init(key: Array) -> Any:
        return nnx.state(make(nnx.Rngs(key)), nnx.Param)

    def apply(params: Any, images: Array) -> Array:
        return nnx.merge(graphdef, params, rest)(images)

    return init, apply


def load(path: str | None) -> tuple[Array, Array, Array, Array]:
    """Returns training images, test images, training labels and test labels."""
    if path is None:
        images, labels = load_digits(return_X_y=True)
        data = train_test_split(images.reshape(-1, 8, 8), labels, test_size=0.2, random_state=0)
    else:
        with np.load(path) as file:
            data = [file[name] for name in ("x_train", "x_test", "y_train", "y_test")]
    x, x_test, y, y_test = map(jnp.asarray, data)
    return x / x.max(), x_test / x.max(), y, y_test


def train(
    init: Any, apply: Any, clip: Any, data: Any, keys: Array, steps: int, bar: tqdm
) -> list[np.ndarray]:
    """Trains all runs in one program.

    Returns test accuracies `[runs, chunks]`, and norms before and after the clip as one array
    `[runs, steps, 2]`.
    """
    measure, (x, x_test, y, y_test) = optaxclip.clip(jnp.inf, optaxclip.scopes.tree()), data
    optimizer = optax.chain(measure, clip, measure, optax.adam(1e-3))

    def loss(params: Any, rows: Array) -> Array:
        logits = apply(params, x[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

    def advance(run: TrainState, key: Array, steps: Array) -> Any:
        def step(run: TrainState, i: Array) -> tuple[TrainState, Array]:
            rows = jax.random.randint(jax.random.fold_in(key, i), (BATCH,), 0, len(x))
            run = run.apply_gradients(grads=jax.grad(loss)(run.params, rows))
            before, *_, after = optaxclip.telemetry.readings(run)
            return run, jnp.concatenate([before.size_before, after.size_before])

        run, norms = jax.lax.scan(step, run, steps)
        right = apply(run.params, x_test).argmax(-1) == y_test
        return run, (jnp.mean(right, keepdims=True), norms)

    def start(key: Array) -> TrainState:
        return TrainState.create(apply_fn=apply, params=init(key), tx=optimizer)

    # one run after the other: on CPU, the batched decompositions of two orthogonal initializers can
    # deadlock under vmap
    runs = jax.jit(partial(jax.lax.map, start))(keys)
    chunk, records = jax.jit(jax.vmap(advance, (0, 0, None))), []
    for done in range(0, steps, CHUNK):
        runs, record = chunk(runs, keys, jnp.arange(done, min(done + CHUNK, steps)))
        records.append(jax.device_get(record))
        bar.update()
    return [np.concatenate(parts, axis=1) for parts in zip(*records, strict=True)]


def main() -> None:
    """Trains each row of the table, and draws it."""
    options = options_of_the_command_line()
    keys, data = jax.random.split(jax.random.key(options.seed), options.seeds), load(options.data)
    figure, rows = Figure((13, 5), layout="constrained"), {}
    panels = figure.subplots(1, 2)
    bar = tqdm(total=len(CLIPS) * -(-options.steps // CHUNK))
    head = f"{'clipping':14}{'test accuracy':>14}{'quartiles':>15}"
    bar.write(f"{head}{'largest norm':>14}{'after':>8}{'clipped':>9}")
    for width, (name, (clip, wrap, color)) in zip((6, 5, 4, 3, 2, 1), CLIPS.items(), strict=False):
        bar.set_description(f"{name:13}")
        init, apply = network(options.api, data[0].shape[-1], wrap)
        accuracy, norm = train(init, apply, clip, data, keys, options.steps, bar)
        (low, median, high), largest = quartiles(accuracy), norm.max((0, 1))
        share = np.mean(norm[..., 1] < (1 - 1e-5) * norm[..., 0])
        rows[name] = {"accuracy": accuracy[:, -1], "median": median[-1]}
        rows[name] |= {"clipped_share": share, "largest_norms": largest}
        numbers = f"{median[-1]:14.3f}{low[-1]:9.3f}{high[-1]:6.3f}"
        bar.write(f"{name:14}{numbers}{largest[0]:14.3g}{largest[1]:8.3g}{share:9.1%}")
        draw(panels, quartiles(accuracy), quartiles(norm[..., 1])[1], name, color, width)
    bar.close()
    title = f"Test accuracy, median and quartiles of {options.seeds} seeds"
    panels[0].set(xlabel="step", title=title)
    panels[1].set(xlabel="step", title="Norm of the gradient after clipping, median")
    figure.legend(loc="outside lower center", ncols=len(CLIPS))
    save(options.out, {"options": vars(options), "rows": rows}, lstm_digits=figure)


def options_of_the_command_line() -> Any:
    """Returns the options that the user gave."""
    what = "An LSTM that reads digits row by row, clipped in many ways."
    parser = command_line(what, "results/lstm_digits", epochs=False)
    parser.add_argument("--api", choices=["nnx", "linen"], default="nnx", help="of Flax")
    images = "other images, such as mnist.npz: x_train, y_train, x_test, y_test"
    parser.add_argument("--data", help=images)
    parser.set_defaults(seeds=16, steps=1000)
    return parser.parse_args()


def draw(panels: Any, accuracy: Any, norm: np.ndarray, name: str, color: str, width: int) -> None:
    """Draws the accuracy of one row on the left, and its norm on the right."""
    low, median, high = accuracy
    steps = np.arange(1, len(median) + 1) * CHUNK
    panels[0].plot(steps, median, color=color, label=name, linewidth=width)
    panels[0].fill_between(steps, low, high, color=color, alpha=0.1, linewidth=0)
    panels[1].semilogy(np.arange(1, len(norm) + 1), norm, color=color, linewidth=width / 2)


if __name__ == "__main__":
    main()
