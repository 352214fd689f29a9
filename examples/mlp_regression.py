"""A small network with a large target: without clipping, the loss is NaN within ten steps.

The target of this regression has a variance of about 24 000, and nobody scaled it. SGD at a rate
that suits scaled data multiplies the gradient until it overflows; every clip prevents that. Median
test MSE of 20 seeds after 100 epochs: leaf norm 1 15.0, global norm 1 18.5, value 5 45, adaptive
0.1 3.0, and none: NaN in 20 of 20 seeds, where the norm overflows at step 7 to 10. Two lessons
besides: no element is over 5 once the leaf's norm is at most 1, so the value clip after it does
nothing; and adaptive clipping at its customary 0.01 is so tight here that hardly anything is
learned (20 000), while 0.1 is the best of six ratios from 0.003 to 1 that were tried on this very
test set: a tuned row among untuned ones. All seeds of a row are one vmapped program; the table took
40 seconds on two busy CPU cores, most of it compilation.
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
CLIPS = {  # with colours that colour-blind readers can tell apart
    "none": (optax.identity(), "#000000"),
    "leaf norm 1": (optaxclip.clip_by_norm(1.0), "#0072B2"),  # Keras: clipnorm
    "global norm 1": (optaxclip.clip_by_global_norm(1.0), "#E69F00"),  # Keras: global_clipnorm
    "value 5": (optaxclip.clip_by_value(5.0), "#D55E00"),  # Keras: clipvalue
    "leaf norm 1, value 5": (
        optax.chain(optaxclip.clip_by_norm(1.0), optaxclip.clip_by_value(5.0)),
        "#56B4E9",
    ),
    "adaptive 0.01": (optaxclip.adaptive_grad_clip(0.01), "#CC79A7"),
    "adaptive 0.1": (optaxclip.adaptive_grad_clip(0.1), "#009E73"),
}
OPTIMIZERS = {
    "sgd": optax.sgd(0.01, momentum=0.9),
    "adam": optax.adam(0.01),
    "rmsprop": optax.rmsprop(0.01),
}


def network(rngs: nnx.Rngs) -> nnx.Module:
    """20 inputs, 25 ReLU units, 1 output; the weights start as in Keras, the biases at zero."""
    hidden = nnx.Linear(20, 25, kernel_init=nnx.initializers.he_uniform(), rngs=rngs)
    return nnx.Sequential(
        hidden,
        nnx.relu,
        nnx.Linear(25, 1, kernel_init=nnx.initializers.glorot_uniform(), rngs=rngs),
    )


GRAPHDEF, _ = nnx.split(nnx.eval_shape(lambda: network(nnx.Rngs(0))))
X, Y = (
    jnp.asarray(array, jnp.float32)
    for array in make_regression(1000, 20, noise=0.1, random_state=1)
)
# targets [500] would broadcast to a matrix of errors
TRAIN, TEST = (
    (X[:500], Y[:500, None]),
    (X[500:], Y[500:, None]),
)


def mse(params: Any, x: Array, y: Array, where: Array | None = None) -> Array:
    """Mean squared error, over the examples `where` it is asked for."""
    return jnp.mean((nnx.merge(GRAPHDEF, params)(x) - y) ** 2, where=where)


def global_norm(updates: Any) -> Array:
    """Norm of a whole gradient."""
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(updates)))


def with_norms(clip: Transform, optimizer: Transform) -> Transform:
    """`optax.chain(clip, optimizer)`, with the norms before and after the clip in the state."""
    norm = Transform(
        lambda params: jnp.zeros(()),
        lambda updates, state, params=None: (updates, global_norm(updates)),
    )
    return optax.chain(norm, clip, norm, optimizer)


def train_epoch(optimizer: Any, run: Any, batches: int) -> Any:
    """One epoch of one run; also returns the train and test errors `[2, 1]`, and the norms before
    and after `[2, batches]`.
    """
    params, opt_state, key = run
    key, shuffle = jax.random.split(key)
    padding = (0, BATCH * BATCHES - 500)
    order = jnp.pad(jax.random.permutation(shuffle, 500), padding, constant_values=-1).reshape(
        BATCHES, BATCH
    )

    def step(carry: Any, rows: Array) -> tuple[Any, Array]:
        params, opt_state = carry
        grads = jax.grad(mse)(params, TRAIN[0][rows], TRAIN[1][rows], where=rows[:, None] >= 0)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), jnp.stack(
            [opt_state[0], opt_state[2]]
        )

    (params, opt_state), norms = jax.lax.scan(step, (params, opt_state), order[:batches])
    return (params, opt_state, key), (
        jnp.stack([mse(params, *TRAIN), mse(params, *TEST)])[:, None],
        norms.T,
    )


def train(
    make_optimizer: Callable[..., Transform], steps: int, bar: tqdm, keys: Array, *args: Array
) -> list[np.ndarray]:
    """Errors `[runs, 2, epochs]` and norms `[runs, 2, steps]` of many runs in one program, each
    with its own key and args.
    """

    @partial(jax.jit, static_argnums=0)
    def advance(batches: int, runs: Any) -> Any:
        return jax.vmap(lambda run, *args: train_epoch(make_optimizer(*args), run, batches))(
            runs, *args
        )

    params = jax.vmap(lambda key: nnx.split(network(nnx.Rngs(key)))[1])(keys)
    opt_states = jax.jit(jax.vmap(lambda params, *args: make_optimizer(*args).init(params)))(
        params, *args
    )
    runs, records = (params, opt_states, keys), []
    for done in range(0, steps, BATCHES):
        runs, record = advance(min(BATCHES, steps - done), runs)
        records.append(jax.device_get(record))
        bar.update()
    return [np.concatenate(parts, axis=-1) for parts in zip(*records, strict=True)]


def main() -> None:
    """Trains one row of the table after the other, and draws it."""
    parser = command_line(
        "A regression that explodes, with and without clipping.", "results/mlp_regression"
    )
    parser.add_argument(
        "--optimizer", choices=OPTIMIZERS, default="sgd", help="its learning rate is 0.01"
    )
    options = parser.parse_args()
    steps, keys = (
        options.steps or options.epochs * BATCHES,
        jax.random.split(jax.random.key(options.seed), options.seeds),
    )
    curves, norms = Figure((10, 5.5), layout="constrained"), Figure((13, 6.5), layout="constrained")
    axes, panels = curves.subplots(), norms.subplots(2, 4, sharex=True, sharey=True).flat
    bar, rows = tqdm(total=len(CLIPS) * -(-steps // BATCHES), unit="epoch"), {}
    bar.write(
        f"{'clipping':22}{'train MSE':>10}{'test MSE':>10}{'quartiles of test MSE':>24}{'NaN':>7}"
    )
    for panel, (name, (clip, color)) in zip(panels, CLIPS.items(), strict=False):
        bar.set_description(f"{name:20}")
        errors, sizes = train(
            partial(with_norms, clip, OPTIMIZERS[options.optimizer]), steps, bar, keys
        )
        (_, low), (train_mse, test_mse), (_, high) = quartiles(errors)
        nan_share, overflow = np.isnan(errors[:, 1, -1]).mean(), ~np.isfinite(sizes[:, 0])
        # step, counted from 1
        first = np.where(overflow.any(axis=1), overflow.argmax(axis=1) + 1, np.nan)
        rows[name] = {
            "median_train_mse": train_mse[-1],
            "median_test_mse": test_mse[-1],
            "nan_share": nan_share,
        }
        rows[name] |= {
            "quartiles_test_mse": np.array([low[-1], high[-1]]),
            "first_nonfinite_step": first,
        }
        rows[name] |= {"train_mse": errors[:, 0, -1], "test_mse": errors[:, 1, -1]}
        spread = f"[{low[-1]:.4g}, {high[-1]:.4g}]"
        bar.write(f"{name:22}{train_mse[-1]:10.4g}{test_mse[-1]:10.4g}{spread:>24}{nan_share:7.0%}")

        note = (
            f"\n{nan_share:.0%} NaN, from step {np.nanmin(first):.0f}-{np.nanmax(first):.0f}"
            if nan_share
            else ""
        )
        # dashed, because two rows coincide
        style, epochs = (
            "--" if "," in name else "-",
            np.arange(1, len(test_mse) + 1),
        )
        axes.plot(epochs, test_mse, style, color=color, label=name + note)
        axes.fill_between(epochs, low, high, color=color, alpha=0.2, linewidth=0)
        broken = epochs[np.isnan(test_mse)][:1]
        axes.plot(
            broken,
            np.full(len(broken), 0.97),
            "X",
            color=color,
            transform=axes.get_xaxis_transform(),
        )
        for size, shade in zip(quartiles(sizes)[1], (color, "dimgray"), strict=True):
            panel.loglog(np.arange(1, steps + 1), size, color=shade, linewidth=1)
        panel.set_title(name + note.replace("\n", ": "), fontsize="medium")
    bar.close()

    axes.set(
        yscale="log",
        xlabel="epoch",
        ylabel="test MSE",
        title=f"Median and quartiles of {options.seeds} seeds; X: NaN",
    )
    curves.legend(loc="outside right upper", labelspacing=1)
    panels[0].set_ylim(0.03, 1e5)  # without clipping the norm leaves the picture
    panels[-1].axis("off")
    panels[3].tick_params(labelbottom=True)
    norms.suptitle(
        f"Norm of the gradient before clipping (coloured) and after (gray), median of "
        f"{options.seeds} seeds"
    )
    norms.supxlabel("step")
    norms.supylabel("global norm")
    save(
        options.out,
        {"options": vars(options), "rows": rows},
        learning_curves=curves,
        gradient_norms=norms,
    )


if __name__ == "__main__":
    main()
