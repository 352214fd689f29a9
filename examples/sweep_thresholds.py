"""Which threshold? Trains the regression of `mlp_regression.py` over 19 decades of thresholds.

Preventing NaN is easy; training well is not. With 20 seeds, thresholds up to 1e12 gave no NaN for
any clip. All runs were NaN from 1e14 (value) or 1e15 (both norms) on. But from 100 (value), 316
(leaf norm) or 1000 (global norm) on, the median run was worse than predicting the mean. A hundred
times below the best threshold it is hardly better than that, because 100 epochs change little. Best
median test MSE: 7.7 with global norm 3.2, 8.3 with value 0.1, 15.3 with leaf norm 1. Thresholds are
traced numbers, so all thresholds and seeds of a clip are one compiled program of 520 runs. The
three clips together took 40 to 70 seconds on two busy CPU cores.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure
from mlp_regression import BATCHES, OPTIMIZERS, TEST, Transform, train, with_norms
from report import command_line, quartiles, save
from tqdm import tqdm

import optaxclip

CLIPS = {
    "leaf norm": (optaxclip.clip_by_norm, "#0072B2"),
    "global norm": (optaxclip.clip_by_global_norm, "#E69F00"),
    "value": (optaxclip.clip_by_value, "#009E73"),
}
# a finer grid where the error changes
THRESHOLDS = np.append(np.geomspace(1e-3, 1e3, 13), np.geomspace(1e4, 1e16, 13))
TARGET_VARIANCE = float(jnp.var(TEST[1]))  # the error of predicting the mean


def make_optimizer(name: str, threshold: Array) -> Transform:
    """Returns SGD after a clip with a traced threshold, so one program serves all thresholds."""
    return with_norms(CLIPS[name][0](threshold), OPTIMIZERS["sgd"])


def print_table(results: dict[str, dict[str, np.ndarray]]) -> None:
    """Prints for each threshold median and quartiles of the test error, and the share of NaN."""
    heads = (f"{f'{name}: median [quartiles]':>38}{'NaN':>6}" for name in results)
    print(f"{'threshold':9}" + "".join(heads))
    for i, threshold in enumerate(THRESHOLDS):
        line = f"{threshold:9.3g}"
        for row in results.values():
            median, (low, high) = row["median_test_mse"][i], row["quartiles_test_mse"][:, i]
            line += f"{f'{median:.3g} [{low:.3g}, {high:.3g}]':>38}{row['nan_share'][i]:>6.0%}"
        print(line)


def draw(results: dict[str, dict[str, np.ndarray]], seeds: int) -> Figure:
    """Draws the test error against the threshold, and the share of NaN below it."""
    figure = Figure((10, 6.5), layout="constrained")
    error, nan = figure.subplots(2, sharex=True, height_ratios=[4, 1])
    for marker, (name, row) in zip("osD", results.items(), strict=True):
        color, median = CLIPS[name][1], row["median_test_mse"]
        best = np.nanargmin(median)
        label = f"{name}: best {median[best]:.3g} at {THRESHOLDS[best]:.2g}"
        error.loglog(THRESHOLDS, median, marker=marker, markersize=5, color=color, label=label)
        band = row["quartiles_test_mse"]
        error.fill_between(THRESHOLDS, *band, color=color, alpha=0.25, linewidth=0)
        nan.semilogx(THRESHOLDS, row["nan_share"], marker=marker, markersize=5, color=color)
    error.axhline(TARGET_VARIANCE, color="dimgray", linestyle="--", label="predicting the mean")
    error.set(ylim=(3, 1e7), ylabel="test MSE", title=f"Median and quartiles of {seeds} seeds")
    error.legend(loc="lower right")
    nan.set(ylim=(-0.1, 1.1), ylabel="share of NaN", xlabel="threshold")
    return figure


def main() -> None:
    """Trains all thresholds and seeds of one clip at once, then of the next clip."""
    what = "The regression that explodes, over 19 decades of thresholds."
    options = command_line(what, "results/sweep_thresholds").parse_args()
    steps = options.steps or options.epochs * BATCHES
    keys = jax.random.split(jax.random.key(options.seed), options.seeds)
    keys = jnp.tile(keys, len(THRESHOLDS))  # every threshold sees the same weights and batches
    thresholds = jnp.repeat(jnp.float32(THRESHOLDS), options.seeds)
    bar, results = tqdm(total=len(CLIPS) * -(-steps // BATCHES), unit="epoch"), {}
    for name in CLIPS:
        bar.set_description(f"{name:12}")
        errors, _ = train(partial(make_optimizer, name), steps, bar, keys, thresholds)
        test_mse = errors[:, 1, -1].reshape(len(THRESHOLDS), options.seeds).T
        low, median, high = quartiles(test_mse)
        results[name] = {"median_test_mse": median, "quartiles_test_mse": np.stack([low, high])}
        results[name] |= {"nan_share": np.isnan(test_mse).mean(axis=0)}
    bar.close()
    print_table(results)
    numbers = {"thresholds": THRESHOLDS, "target_variance": TARGET_VARIANCE, "kinds": results}
    plot = draw(results, options.seeds)
    save(options.out, {"options": vars(options), **numbers}, sweep=plot)


if __name__ == "__main__":
    main()
