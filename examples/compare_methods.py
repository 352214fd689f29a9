"""Every method of optaxclip on two tasks that plain SGD fails: one table and one picture for each.

RNN: 32 tanh units tell in which order two marks came among 20 symbols (SGD 0.3). MLP: the
regression of `mlp_regression.py` (SGD 0.01, momentum 0.9). Fixed limits are the customary ones:
norm and block RMS 1, value 0.1 for the RNN and 5 for the MLP. All else has its defaults, and Adam
the rate 0.01; nothing was tuned. A run fails if its test loss is NaN or not below what counts as
solved; of several clips in one method the busiest is counted; bytes are those of the method's
state. `python examples/compare_methods.py` took 4 minutes on two busy CPU cores. Failed seeds of
20, RNN/MLP (median MSE):

* None: 20/20, the MLP all NaN. clip_by_norm 1/0 (14.9), clip_by_global_norm 1/0 (17.6). adagc,
  which starts from a fixed norm, 0/0 (6.4), and gradient_stabilizer, which sets one, 0/0 (16.8).
* An unstable start is no spike. zclip 15/20, reset_after(zscore) 18/20, log_norm_clip, history_clip
  and spam_clip 20/20: the MLP is all NaN, and but for log_norm_clip before anything was clipped,
  within their warm-ups.
* Limits follow an explosion: autoclip and growth_clip 2/20 (3e6, 5e29), reset_after(ema) 9/20,
  quantile_clip 20/20.
* Too loose for the RNN: clip_by_block_rms 20/0 (8.3), clip_by_value(5.0) 20/0 (52.8). Its 0.1 fails
  12/0 (9.4), and 20/20 with carry, which gives back what was cut. Too tight for the MLP:
  adaptive_grad_clip 8/20, spectral_clip 11/20, clippy 20/20.
* scale_by_stable_adam 3/0 (9.9), Adam without it 3/0 (10.9); with --seed 1 it is 6 against 1 for
  the RNN.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from matplotlib.figure import Figure
from mlp_regression import BATCH, TEST, TRAIN, Transform, mse, network, with_norms
from report import command_line, quartiles, save
from tqdm import tqdm

import optaxclip
from optaxclip import thresholds

CHUNK, COLUMNS = 100, 6  # steps in one compiled program, panels in one line
# of SGD's momentum and learning rate
SPLITS = {
    "gradient": (0, 0),
    "update": (1, 1),
    "step": (2, 2),
    "instead": (0, 2),
}
METHODS = {  # what of SGD is clipped: gradient, update after momentum, step after learning rate; and by what
    "none": ("gradient", optax.identity()),
    "clip_by_value(0.1)": ("gradient", optaxclip.clip_by_value(0.1)),
    "clip_by_value(5.0)": ("gradient", optaxclip.clip_by_value(5.0)),
    "error_feedback(clip_by_value(0.1))": (
        "gradient",
        optaxclip.error_feedback(optaxclip.clip_by_value(0.1)),
    ),
    "clip_by_norm(1.0)": ("gradient", optaxclip.clip_by_norm(1.0)),
    "clip_by_global_norm(1.0)": ("gradient", optaxclip.clip_by_global_norm(1.0)),
    "clip_by_block_rms(1.0)": ("update", optaxclip.clip_by_block_rms(1.0)),
    "spectral_clip(1.0)": ("update", optaxclip.spectral_clip(1.0)),
    "adaptive_grad_clip()": ("gradient", optaxclip.adaptive_grad_clip()),
    "clippy()": ("step", optaxclip.clippy()),
    "gradient_stabilizer()": ("gradient", optaxclip.gradient_stabilizer()),
    "autoclip()": ("gradient", optaxclip.autoclip()),
    "quantile_clip()": ("gradient", optaxclip.quantile_clip()),
    "adagc()": ("gradient", optaxclip.adagc()),
    "reset_after(ema(), 50)": (
        "gradient",
        optaxclip.clip(thresholds.reset_after(thresholds.ema(), 50), optaxclip.scopes.tree()),
    ),
    "growth_clip()": ("update", optaxclip.growth_clip()),
    "zclip()": ("gradient", optaxclip.zclip()),
    "reset_after(zscore(), 50)": (
        "gradient",
        optaxclip.clip(thresholds.reset_after(thresholds.zscore(), 50), optaxclip.scopes.tree()),
    ),
    "log_norm_clip()": ("gradient", optaxclip.log_norm_clip()),
    "history_clip()": ("update", optaxclip.history_clip()),
    "spam_clip()": ("gradient", optaxclip.spam_clip()),
    "adam": ("instead", optax.adam(0.01, b2=0.99, eps=1e-6)),  # with the constants of the next
    "scale_by_stable_adam()": (
        "instead",
        optax.chain(optaxclip.scale_by_stable_adam(), optax.scale(-0.01)),
    ),
}


class Task(NamedTuple):
    """What is trained, and by which SGD."""

    title: str
    start: Callable[[Array], Any]  # key -> parameters
    batch: Callable[[Array], tuple[Array, Array]]  # key -> inputs and targets
    loss: Callable[[Any, Array, Array], Array]
    test: tuple[Array, Array]
    solved: float  # what the test loss has to be below
    steps: int
    momentum: float
    rate: float
    norms: tuple[float, float]  # range of the picture


def sequences(key: Array, count: int = BATCH) -> tuple[Array, Array]:
    """20 symbols of four kinds, but a mark, 0 or 1, at place 2 or 3 and another at 8 or 9: which
    two are they?
    """
    symbols, marks, places = jax.random.split(key, 3)
    x = jax.random.randint(symbols, (count, 20), 2, 6)
    mark = jax.random.randint(marks, (count, 2), 0, 2)
    place = jax.random.randint(places, (count, 2), jnp.array([2, 8]), jnp.array([4, 10]))
    return x.at[jnp.arange(count)[:, None], place].set(mark), 2 * mark[:, 0] + mark[:, 1]


def start_rnn(key: Array, units: int = 32) -> dict[str, Array]:
    """Weights of a plain tanh network for 6 symbols and 4 classes."""
    shapes = {
        "in": (6, units),
        "recurrent": (units, units),
        "out": (units, 4),
        "bias": (units,),
        "out_bias": (4,),
    }
    scales = {"in": 0.3, "recurrent": units**-0.5, "out": units**-0.5, "bias": 0, "out_bias": 0}
    return {
        name: scales[name] * jax.random.normal(jax.random.fold_in(key, i), shapes[name])
        for i, name in enumerate(shapes)
    }


def cross_entropy(params: dict[str, Array], x: Array, y: Array) -> Array:
    """Of the classes, told after the last symbol."""

    def read(hidden: Array, symbol: Array) -> tuple[Array, None]:
        return jnp.tanh(params["in"][symbol] + hidden @ params["recurrent"] + params["bias"]), None

    hidden, _ = jax.lax.scan(read, jnp.zeros((len(x), len(params["bias"]))), x.T)
    return optax.softmax_cross_entropy_with_integer_labels(
        hidden @ params["out"] + params["out_bias"], y
    ).mean()


def start_mlp(key: Array) -> Any:
    """Weights of the network of `mlp_regression.py`."""
    return nnx.split(network(nnx.Rngs(key)))[1]


def some_rows(key: Array) -> tuple[Array, Array]:
    """A batch, drawn with replacement."""
    rows = jax.random.randint(key, (BATCH,), 0, len(TRAIN[0]))
    return TRAIN[0][rows], TRAIN[1][rows]


UNSEEN = sequences(jax.random.key(1), 1000)
HUNDREDTH = 0.01 * float(jnp.var(TEST[1]))  # of the error of who always predicts the mean
TASKS = {  # the numbers: solved, steps, momentum, rate, norms
    "rnn": Task(
        "Temporal order, RNN",
        start_rnn,
        sequences,
        cross_entropy,
        UNSEEN,
        0.1,
        800,
        0.0,
        0.3,
        (3e-4, 30),
    ),
    "mlp": Task(
        "Unscaled regression, MLP",
        start_mlp,
        some_rows,
        mse,
        TEST,
        HUNDREDTH,
        1600,
        0.9,
        0.01,
        (1e-4, 1e7),
    ),
}


def only_limit(state: Any) -> Array:
    """The limit of a method that has a single one; NaN for the others, and where there is none at
    this step.
    """
    limit = (
        state.reading.limit
        if isinstance(state, optaxclip.ClipState) and state.reading
        else jnp.full(2, jnp.inf)
    )
    return (
        jnp.where(limit < jnp.inf, limit, jnp.nan)[0]
        if limit.shape == (1,)
        else jnp.full((), jnp.nan)
    )


def train(
    task: Task, clips: str, clip: Transform, runs: Any, batches: Callable[[Array], Any], bar: tqdm
) -> Any:
    """Parameters and state of the clip after training; norms before, after, and its only limit
    `[runs, steps]`.
    """
    first, last = SPLITS[clips]
    parts = [optax.trace(task.momentum), optax.scale_by_learning_rate(task.rate)]
    optimizer: Any = optax.chain(*parts[:first], with_norms(clip, optax.identity()), *parts[last:])

    def step(run: Any, batch: Any) -> tuple[Any, Any]:
        params, opt_state = run
        updates, opt_state = optimizer.update(
            jax.grad(task.loss)(params, *batch), opt_state, params
        )
        before, state, after, _ = opt_state[first]
        return (optax.apply_updates(params, updates), opt_state), (before, after, only_limit(state))

    advance = jax.jit(jax.vmap(partial(jax.lax.scan, step)))
    states, records = jax.vmap(optimizer.init)(runs), []
    for done in range(0, task.steps, CHUNK):
        (runs, states), norms = advance(
            (runs, states), batches(jnp.arange(done, min(done + CHUNK, task.steps)))
        )
        records.append(jax.device_get(norms))
        bar.update()
    return (
        runs,
        states[first][1],
        *(np.concatenate(parts, axis=1) for parts in zip(*records, strict=True)),
    )


def compare(task: Task, keys: Array, bar: tqdm) -> tuple[dict[str, Any], Figure]:
    """Every method on the same weights and batches: the table, printed row by row, and the picture."""
    lines, rows = -(-len(METHODS) // COLUMNS), {}
    figure = Figure((15, 2.2 * lines + 1), layout="constrained")
    panels = figure.subplots(lines, COLUMNS, sharex=True, sharey=True, squeeze=False).ravel()
    start, score = (
        jax.vmap(task.start)(keys),
        jax.jit(jax.vmap(lambda params: task.loss(params, *task.test))),
    )
    batch = jax.vmap(lambda key, step: task.batch(jax.random.fold_in(key, step)), (None, 0))
    batches = partial(jax.jit(jax.vmap(batch, (0, None))), keys)
    bar.write(
        f"\n{task.title}: {task.steps} steps of SGD, {len(keys)} seeds; failed: test loss not "
        f"below {task.solved:.3g}"
    )
    bar.write(
        f"{'method':26}{'clips':10}{'loss':>9}{'quartiles':>22}{'failed':>8}{'NaN':>6}{'clipped':>9}{'bytes':>8}"
    )
    for panel, (name, (clips, clip)) in zip(panels, METHODS.items(), strict=False):
        bar.set_description(f"{name:26}")
        params, state, *norms = train(task, clips, clip, start, batches, bar)
        readings, loss = optaxclip.telemetry.readings(state), np.asarray(score(params))
        (low, median, high), failed, nan = (
            quartiles(loss),
            1 - np.mean(loss < task.solved),
            np.mean(np.isnan(loss)),
        )
        clipped = max(
            (float(reading.clipped_steps.mean()) / task.steps for reading in readings), default=None
        )
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) // len(keys)
        rows[name] = {
            "clips": clips,
            "loss": loss,
            "median_loss": median,
            "quartiles_loss": np.array([low, high]),
        }
        rows[name] |= {
            "failed_share": failed,
            "nan_share": nan,
            "clipped_share": clipped,
            "state_bytes": size,
        }
        spread, often = f"[{low:.3g}, {high:.3g}]", "-" if clipped is None else f"{clipped:.1%}"
        bar.write(
            f"{name:26}{clips:10}{median:9.3g}{spread:>22}{failed:8.0%}{nan:6.0%}{often:>9}{size:8,}"
        )

        before, after, limit = (quartiles(norm)[1] for norm in norms)
        panel.loglog(
            np.arange(1, task.steps + 1),
            before,
            color="#E69F00",
            linewidth=2.5,
            label="norm before the method",
        )
        panel.loglog(
            np.arange(1, task.steps + 1), after, color="#0072B2", linewidth=1, label="norm after it"
        )
        panel.loglog(
            np.arange(1, task.steps + 1),
            limit,
            "--",
            color="#000000",
            linewidth=0.8,
            label="its limit, if it has only one",
        )
        panel.set_title(f"{name}\nfailed {failed:.0%}, clipped {often}", fontsize="medium")
        panel.text(0.04, 0.05, clips, color="dimgray", transform=panel.transAxes)
    for panel in panels[len(METHODS) :]:
        panel.axis("off")
    for panel in panels[len(METHODS) - COLUMNS : len(METHODS)]:
        panel.tick_params(labelbottom=True)
    panels[0].set_ylim(task.norms)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower right", ncols=3)
    figure.suptitle(
        f"{task.title}: global norm of what a method clips, median of {len(keys)} seeds"
    )
    figure.supxlabel("step")
    return rows, figure


def main() -> None:
    """Every method on the tasks that are asked for."""
    parser = command_line(
        "Every method on two tasks that plain SGD fails.", "results/compare_methods", epochs=False
    )
    parser.add_argument("--task", choices=[*TASKS, "both"], default="both", help="what to train")
    options = parser.parse_args()
    keys = jax.random.split(jax.random.key(options.seed), options.seeds)
    chosen = {name: task for name, task in TASKS.items() if options.task in (name, "both")}
    tasks = {
        name: task._replace(steps=options.steps or task.steps) for name, task in chosen.items()
    }
    with tqdm(
        total=len(METHODS) * sum(-(-task.steps // CHUNK) for task in tasks.values()), unit="chunk"
    ) as bar:
        compared = {name: compare(task, keys, bar) for name, task in tasks.items()}
    results = {
        "options": vars(options),
        "tasks": {name: rows for name, (rows, _) in compared.items()},
    }
    save(options.out, results, **{name: figure for name, (_, figure) in compared.items()})


if __name__ == "__main__":
    main()
