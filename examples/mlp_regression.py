"""A small network with a large target: without clipping, the loss is NaN within ten steps.

The target of this regression has a variance of about 24 000, because it is not scaled. With a rate
that suits scaled data, SGD multiplies the gradient until it overflows; every clip prevents that.
Median test MSE of 20 seeds after 100 epochs: leaf norm 1 15.0, global norm 1 18.5, value 5 45,
adaptive 0.1 3.0. Without clipping all 20 seeds end in NaN; the norm overflows at step 7 to 10. Two
more lessons. First, no element exceeds 5 once the leaf's norm is at most 1, so a value clip after
the norm clip does nothing. Second, adaptive clipping at its customary 0.01 is too tight to learn
here (20 000). Its 0.1 is the best of six ratios from 0.003 to 1, chosen on this test set, so it is
a tuned row among untuned ones. All seeds of a row are one vmapped program; the table took 40
seconds on two busy CPU cores, most of it compilation.
"""

from collections.abc import Callable
from functools import partial
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
from tqdm import tqdm

import optaxclip

Transform = optax.GradientTransformation
BATCH, BATCHES = 32, 16  # the last batch of the 500 examples has 20
BOTH = optax.chain(optaxclip.clip_by_norm(1.0), optaxclip.clip_by_value(5.0))
# colour-blind readers can distinguish these colours
CLIPS = {
    "none": (optax.identity(), "#000000"),
    "leaf norm 1": (optaxclip.clip_by_norm(1.0), "#0072B2"),  # Keras: clipnorm
    "global norm 1": (optaxclip.clip_by_global_norm(1.0), "#E69F00"),  # Keras: global_clipnorm
    "value 5": (optaxclip.clip_by_value(5.0), "#D55E00"),  # Keras: clipvalue
    "leaf norm 1, value 5": (BOTH, "#56B4E9"),
    "adaptive 0.01": (optaxclip.adaptive_grad_clip(0.01), "#CC79A7"),
    "adaptive 0.1": (optaxclip.adaptive_grad_clip(0.1), "#009E73"),
}
OPTIMIZERS = {
    "sgd": optax.sgd(0.01, momentum=0.9),
    "adam": optax.adam(0.01),
    "rmsprop": optax.rmsprop(0.01),
}


def network(rngs: nnx.Rngs) -> nnx.Module:
    """Returns a network with 20 inputs, 25 ReLU units and 1 output, initialized as in Keras."""
    hidden = nnx.Linear(20, 25, kernel_init=nnx.initializers.he_uniform(), rngs=rngs)
    output = nnx.Linear(25, 1, kernel_init=nnx.initializers.glorot_uniform(), rngs=rngs)
    return nnx.Sequential(hidden, nnx.relu, output)


GRAPHDEF, _ = nnx.split(nnx.eval_shape(lambda: network(nnx.Rngs(0))))
DATA = make_regression(1000, 20, noise=0.1, random_state=1)
# targets are columns: targets [500] would broadcast to a matrix of errors
X, Y = (jnp.asarray(array, jnp.float32).reshape(1000, -1) for array in DATA)
TRAIN, TEST = (X[:500], Y[:500]), (X[500:], Y[500:])


def mse(params: Any, x: Array, y: Array, where: Array | None = None) -> Array:
    """Returns the mean squared error, over the examples `where` the mask is True."""
    return jnp.mean((nnx.merge(GRAPHDEF, params)(x) - y) ** 2, where=where)


def global_norm(updates: Any) -> Array:
    """Returns the norm of a whole gradient."""
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(updates)))


def with_norms(clip: Transform, optimizer: Transform) -> Transform:
    """Chains clip and optimizer; the state also has the norms before and after the clip."""
    norm = Transform(
        lambda params: jnp.zeros(()),
        lambda updates, state, params=None: (updates, global_norm(updates)),
    )
    return optax.chain(norm, clip, norm, optimizer)


def train_epoch(optimizer: Any, run: Any, batches: int) -> Any:
    """Trains one run for one epoch.

    Also returns the train and test errors `[2, 1]`, and the norms before and after the clip
    `[2, batches]`.
    """
    params, opt_state, key = run
    key, shuffle = jax.random.split(key)
    padding = (0, BATCH * BATCHES - 500)  # rows of -1 fill the last batch and do not count
    order = jnp.pad(jax.random.permutation(shuffle, 500), padding, constant_values=-1)

    def step(carry: Any, rows: Array) -> tuple[Any, Array]:
        params, opt_state = carry
        grads = jax.grad(mse)(params, TRAIN[0][rows], TRAIN[1][rows], where=rows[:, None] >= 0)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        norms = jnp.stack([opt_state[0], opt_state[2]])
        return (optax.apply_updates(params, updates), opt_state), norms

    rows = order.reshape(BATCHES, BATCH)[:batches]
    (params, opt_state), norms = jax.lax.scan(step, (params, opt_state), rows)
    errors = jnp.stack([mse(params, *TRAIN), mse(params, *TEST)])[:, None]
    return (params, opt_state, key), (errors, norms.T)


def train(
    make_optimizer: Callable[..., Transform], steps: int, bar: tqdm, keys: Array, *args: Array
) -> list[np.ndarray]:
    """Trains many runs in one program; each has its key and its args for `make_optimizer`.

    Returns errors `[runs, 2, epochs]` and norms `[runs, 2, steps]`.
    """

    @partial(jax.jit, static_argnums=0)
    def advance(batches: int, runs: Any) -> Any:
        def one(run: Any, *args: Array) -> Any:
            return train_epoch(make_optimizer(*args), run, batches)

        return jax.vmap(one)(runs, *args)

    params = jax.vmap(lambda key: nnx.split(network(nnx.Rngs(key)))[1])(keys)
    init = jax.vmap(lambda params, *args: make_optimizer(*args).init(params))
    runs, records = (params, jax.jit(init)(params, *args), keys), []
    for done in range(0, steps, BATCHES):
        runs, record = advance(min(BATCHES, steps - done), runs)
        records.append(jax.device_get(record))
        bar.update()
    return [np.concatenate(parts, axis=-1) for parts in zip(*records, strict=True)]


def main() -> None:
    """Trains each row of the table, and draws it."""
    what = "A regression that explodes, with and without clipping."
    parser, names = command_line(what, "results/mlp_regression"), [*OPTIMIZERS]
    parser.add_argument("--optimizer", choices=names, default="sgd", help="its rate is 0.01")
    options = parser.parse_args()
    steps = options.steps or options.epochs * BATCHES
    keys = jax.random.split(jax.random.key(options.seed), options.seeds)
    curves, norms = Figure((10, 5.5), layout="constrained"), Figure((13, 6.5), layout="constrained")
    axes, panels = curves.subplots(), norms.subplots(2, 4, sharex=True, sharey=True).flat
    bar, rows = tqdm(total=len(CLIPS) * -(-steps // BATCHES), unit="epoch"), {}
    head = f"{'clipping':22}{'train MSE':>10}{'test MSE':>10}"
    bar.write(f"{head}{'quartiles of test MSE':>24}{'NaN':>7}")
    for panel, (name, (clip, color)) in zip(panels, CLIPS.items(), strict=False):
        bar.set_description(f"{name:20}")
        make_optimizer = partial(with_norms, clip, OPTIMIZERS[options.optimizer])
        errors, sizes = train(make_optimizer, steps, bar, keys)
        row = rows[name] = summary(errors, sizes)
        low, high = row["quartiles_test_mse"]
        line = f"{name:22}{row['median_train_mse']:10.4g}{row['median_test_mse']:10.4g}"
        bar.write(f"{line}{f'[{low:.4g}, {high:.4g}]':>24}{row['nan_share']:7.0%}")
        draw(axes, panel, errors, sizes, name, note_of(row), color)
    bar.close()
    finish(curves, norms, options.seeds)
    results = {"options": vars(options), "rows": rows}
    save(options.out, results, learning_curves=curves, gradient_norms=norms)


def summary(errors: np.ndarray, norms: np.ndarray) -> dict[str, Any]:
    """Summarizes the runs of one row."""
    (_, low), (train_mse, test_mse), (_, high) = quartiles(errors)
    overflow = ~np.isfinite(norms[:, 0])
    # steps are counted from 1
    first = np.where(overflow.any(axis=1), overflow.argmax(axis=1) + 1, np.nan)
    return {
        "median_train_mse": train_mse[-1],
        "median_test_mse": test_mse[-1],
        "nan_share": np.isnan(errors[:, 1, -1]).mean(),
        "quartiles_test_mse": np.array([low[-1], high[-1]]),
        "first_nonfinite_step": first,
        "train_mse": errors[:, 0, -1],
        "test_mse": errors[:, 1, -1],
    }


def note_of(row: dict[str, Any]) -> str:
    """Says how many runs of a row ended in NaN, and at which steps that began."""
    if not row["nan_share"]:
        return ""
    first = row["first_nonfinite_step"]
    return f"\n{row['nan_share']:.0%} NaN, from step {np.nanmin(first):.0f}-{np.nanmax(first):.0f}"


def draw(
    axes: Any, panel: Any, errors: np.ndarray, norms: np.ndarray, name: str, note: str, color: str
) -> None:
    """Draws the test error of one row on the shared axes, and its norms on its panel."""
    low, test_mse, high = (part[1] for part in quartiles(errors))
    epochs, steps = np.arange(1, len(test_mse) + 1), np.arange(1, norms.shape[-1] + 1)
    style = "--" if "," in name else "-"  # dashed, because two rows coincide
    axes.plot(epochs, test_mse, style, color=color, label=name + note)
    axes.fill_between(epochs, low, high, color=color, alpha=0.2, linewidth=0)
    broken = epochs[np.isnan(test_mse)][:1]
    top = axes.get_xaxis_transform()
    axes.plot(broken, np.full(len(broken), 0.97), "X", color=color, transform=top)
    for norm, shade in zip(quartiles(norms)[1], (color, "dimgray"), strict=True):
        panel.loglog(steps, norm, color=shade, linewidth=1)
    panel.set_title(name + note.replace("\n", ": "), fontsize="medium")


def finish(curves: Figure, norms: Figure, seeds: int) -> None:
    """Adds titles and labels to both figures."""
    title = f"Median and quartiles of {seeds} seeds; X: NaN"
    curves.axes[0].set(yscale="log", xlabel="epoch", ylabel="test MSE", title=title)
    curves.legend(loc="outside right upper", labelspacing=1)
    panels = norms.axes
    panels[0].set_ylim(0.03, 1e5)  # without clipping the norm grows beyond the plot
    panels[-1].axis("off")
    panels[3].tick_params(labelbottom=True)
    what = "Norm of the gradient before clipping (coloured) and after (gray)"
    norms.suptitle(f"{what}, median of {seeds} seeds")
    norms.supxlabel("step")
    norms.supylabel("global norm")


if __name__ == "__main__":
    main()
