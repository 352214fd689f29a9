"""Which threshold? The regression of `mlp_regression.py` over 19 decades of thresholds.

To prevent NaN is easy, to train well is not. With 20 seeds no threshold up to 1e12 gave a single
NaN, of whatever kind; all runs were NaN from 1e14 (value) or 1e15 (both norms). But already from
100 (value), 316 (leaf norm) or 1000 (global norm) on, the median run ended worse than predicting
the mean; and hardly better a hundred times below the best threshold, because little moves in 100
epochs. Best median test MSE: 7.7 with global norm 3.2, 8.3 with value 0.1, 15.3 with leaf norm 1.
Thresholds are traced numbers, so all those of a kind, times all seeds, are one compiled program of
520 runs; the three kinds together took 40 to 70 seconds on two busy CPU cores.
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

KINDS = {
    "leaf norm": (optaxclip.clip_by_norm, "#0072B2"),
    "global norm": (optaxclip.clip_by_global_norm, "#E69F00"),
    "value": (optaxclip.clip_by_value, "#009E73"),
}
# finer where it matters
THRESHOLDS = np.append(np.geomspace(1e-3, 1e3, 13), np.geomspace(1e4, 1e16, 13))
TARGET_VARIANCE = float(jnp.var(TEST[1]))  # the error of who always predicts the mean


def make_optimizer(kind: str, threshold: Array) -> Transform:
    """SGD after a clip whose threshold is traced: one compiled program serves them all."""
    return with_norms(KINDS[kind][0](threshold), OPTIMIZERS["sgd"])


def print_table(kinds: dict[str, dict[str, np.ndarray]]) -> None:
    """One line per threshold: median and quartiles of the test error, and how many seeds ended NaN."""
    print(
        f"{'threshold':9}"
        + "".join(f"{f'{kind}: median [quartiles]':>38}{'NaN':>6}" for kind in kinds)
    )
    for i, threshold in enumerate(THRESHOLDS):
        line = f"{threshold:9.3g}"
        for row in kinds.values():
            median, (low, high) = row["median_test_mse"][i], row["quartiles_test_mse"][:, i]
            line += f"{f'{median:.3g} [{low:.3g}, {high:.3g}]':>38}{row['nan_share'][i]:>6.0%}"
        print(line)


def draw(kinds: dict[str, dict[str, np.ndarray]], seeds: int) -> Figure:
    """Test error against threshold above, share of NaN below."""
    figure = Figure((10, 6.5), layout="constrained")
    error, nan = figure.subplots(2, sharex=True, height_ratios=[4, 1])
    for marker, (kind, row) in zip("osD", kinds.items(), strict=True):
        color, median = KINDS[kind][1], row["median_test_mse"]
        best = np.nanargmin(median)
        label = f"{kind}: best {median[best]:.3g} at {THRESHOLDS[best]:.2g}"
        error.loglog(THRESHOLDS, median, marker=marker, markersize=5, color=color, label=label)
        error.fill_between(
            THRESHOLDS, *row["quartiles_test_mse"], color=color, alpha=0.25, linewidth=0
        )
        nan.semilogx(THRESHOLDS, row["nan_share"], marker=marker, markersize=5, color=color)
    error.axhline(TARGET_VARIANCE, color="dimgray", linestyle="--", label="predicting the mean")
    error.set(ylim=(3, 1e7), ylabel="test MSE", title=f"Median and quartiles of {seeds} seeds")
    error.legend(loc="lower right")
    nan.set(ylim=(-0.1, 1.1), ylabel="share of NaN", xlabel="threshold")
    return figure


def main() -> None:
    """Trains all thresholds and seeds of one kind at once, then the next kind."""
    parser = command_line(
        "The regression that explodes, over 19 decades of thresholds.", "results/sweep_thresholds"
    )
    options = parser.parse_args()
    steps, keys = (
        options.steps or options.epochs * BATCHES,
        jax.random.split(jax.random.key(options.seed), options.seeds),
    )
    keys = jnp.tile(keys, len(THRESHOLDS))  # every threshold sees the same weights and batches
    thresholds = jnp.repeat(jnp.float32(THRESHOLDS), options.seeds)
    bar, kinds = tqdm(total=len(KINDS) * -(-steps // BATCHES), unit="epoch"), {}
    for kind in KINDS:
        bar.set_description(f"{kind:12}")
        errors, _ = train(partial(make_optimizer, kind), steps, bar, keys, thresholds)
        test_mse = errors[:, 1, -1].reshape(len(THRESHOLDS), options.seeds).T
        low, median, high = quartiles(test_mse)
        kinds[kind] = {"median_test_mse": median, "quartiles_test_mse": np.stack([low, high])}
        kinds[kind] |= {"nan_share": np.isnan(test_mse).mean(axis=0)}
    bar.close()
    print_table(kinds)
    results = {
        "options": vars(options),
        "thresholds": THRESHOLDS,
        "target_variance": TARGET_VARIANCE,
        "kinds": kinds,
    }
    save(options.out, results, sweep=draw(kinds, options.seeds))


if __name__ == "__main__":
    main()
