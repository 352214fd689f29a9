"""Plots of a run: `sizes clipped_shares histogram`.

Each function draws on the matplotlib `Axes` that you pass, or on the `Axes` of a new figure, and
returns them: `sizes(history).figure.savefig("sizes.png")`. It needs `pip install
'optaxclip[plots]'`, and no display.

A *history* holds the results of `telemetry.metrics` at each step: a list of dicts, or one dict of
arrays over steps, as `jax.lax.scan` returns it. Arrays may also have an axis of seeds, after or
before the steps.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from optaxclip import _validate, telemetry
from optaxclip.thresholds.ranks import WIDTH

__all__ = [
    "sizes",
    "clipped_shares",
    "histogram",
]


def __dir__() -> list[str]:
    return __all__


# Colour-blind readers can distinguish these colours. Where nothing is clipped, the thin line of
# `before` lies on the thick line of `after`.
LINES = {
    "size_before": {"label": "before", "color": "#0072B2", "linewidth": 1, "zorder": 2.1},
    "size_after": {"label": "after", "color": "#E69F00", "linewidth": 3},
    "limit": {
        "label": "limit",
        "color": "black",
        "linewidth": 1,
        "linestyle": (0, (4, 2)),
        "zorder": 2.2,
    },
}
NEEDED = {"steps", "clipped_share", *LINES}
BARS = 40  # most bars of a histogram
LONGEST = 48  # most letters of a name, about


class _Run(NamedTuple):
    """A history in NumPy.

    Attributes:
        steps: `[steps]`, numbers of the steps, counted from 1.
        values: for each key, an array `[steps, seeds]`.
        skipped: numbers of the steps that a guard skipped, for any seed.
    """

    steps: np.ndarray
    values: dict[str, np.ndarray]
    skipped: np.ndarray


def sizes(history: Any, *, prefix: str = "clip", group: str | None = None, ax: Any = None) -> Any:
    """Plots the norm before clipping, the norm after it, and the limit, over steps.

    Dots mark steps with something clipped. Ticks at the upper edge mark steps that were not finite,
    and steps that a guard such as `skip_nonfinite` skipped. Infinite limits and zeros are not
    drawn. For more than one seed the lines are medians with a band between the quartiles; a value
    that is not finite counts as the largest. A dot then means that at least half of the seeds were
    clipped; a tick means that any seed was not finite.

    Args:
        history: the results of `telemetry.metrics` at each step.
        prefix: the beginning of the clip's keys, such as `"clip_0"` if there is more than one clip.
        group: the name of a group, if `metrics` was given the parameters; None for the group that
            is largest at each step.
        ax: matplotlib `Axes` to draw on; None for a new figure.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: `history` is not a dict or a list of dicts, or `ax` is not an `Axes`.
        ValueError: the history has no such clip, group, or steps.

    Example:
        >>> import jax, jax.numpy as jnp, optaxclip
        >>> clip = optaxclip.clip_by_global_norm(1.0)
        >>> def step(state, size):
        ...     _, state = clip.update(size[None], state)
        ...     return state, optaxclip.telemetry.metrics(state)
        >>> _, history = jax.lax.scan(step, clip.init(jnp.zeros(1)), jnp.array([0.5, 2.0, 0.7]))
        >>> for line in optaxclip.plots.sizes(history).lines:
        ...     print(line.get_label(), line.get_xdata(), line.get_ydata().round(1))
        before [1. 2. 3.] [0.5 2.  0.7]
        after [1. 2. 3.] [0.5 1.  0.7]
        limit [1. 2. 3.] [1. 1. 1.]
        clipped [2.] [2.]
    """
    groups, ending = _groups(history, prefix), ""
    if group is not None and not groups:
        raise ValueError(
            f"history has no groups by name, got group={group!r}; record "
            f"telemetry.metrics(opt_state, params)"
        )
    if group is not None:
        _validate.option("group", group, groups)
        ending = f"/{group}"
    run = _read(history, prefix, [key + ending for key in ("clipped_share", *LINES)])
    ax = _axes(ax)
    share, before, after, limit = run.values.values()
    for style, values in zip(LINES.values(), (before, after, limit), strict=True):
        _line(ax, run.steps, values, style)
    _marks(ax, run, before, np.mean(share > 0, axis=1) >= 0.5)
    of = f" of {_shortened([group])[0]}" if group else " of the largest group" if groups else ""
    ax.set(yscale="log", xlabel="step", ylabel="norm" + of)
    ax.set_title("Norm before and after clipping", pad=22)
    above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": 6}
    ax.legend(**above, frameon=False, fontsize="small", columnspacing=1.2)
    _plain_numbers(ax.yaxis)
    return ax


def clipped_shares(history: Any, *, prefix: str = "clip", bins: int = 100, ax: Any = None) -> Any:
    """Plots a heat map of the clipped share: a row for each group, a column for a range of steps.

    A colour is the share of the group that was over its limit, as a mean over the column's steps
    and over seeds. If the history has no groups by name, there is one row for the mean over groups.

    Args:
        history: the results of `telemetry.metrics` at each step. Pass `params` to `metrics` for a
            row for each group.
        prefix: the beginning of the clip's keys, such as `"clip_0"` if there is more than one clip.
        bins: the largest number of columns.
        ax: matplotlib `Axes` to draw on; None for a new figure, as high as the rows need.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: `history` is not a dict or a list of dicts, `bins` is not an integer, or `ax` is
            not an `Axes`.
        ValueError: the history has no such clip or no steps, or `bins` is below 1.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> clip, history = optaxclip.clip_by_norm(1.0), []
        >>> grads = {"b": jnp.array([0.5]), "w": jnp.array([3.0, 4.0])}
        >>> state = clip.init(grads)
        >>> for _ in range(4):
        ...     _, state = clip.update(grads, state)
        ...     history.append(optaxclip.telemetry.metrics(state, grads))
        >>> ax = optaxclip.plots.clipped_shares(history, bins=2)
        >>> print(*ax.get_yticklabels(), ax.collections[0].get_array().tolist())
        Text(0, 0, 'b') Text(0, 1, 'w') [[0.0, 0.0], [1.0, 1.0]]
    """
    _validate.count("bins", bins)
    groups = _groups(history, prefix)
    names = [f"clipped_share/{group}" for group in groups] or ["clipped_share"]
    run = _read(history, prefix, names)
    parts = np.array_split(np.arange(len(run.steps)), min(bins, len(run.steps)))
    shares = np.array([[values[part].mean() for part in parts] for values in run.values.values()])
    edges = np.append(run.steps[[part[0] for part in parts]], run.steps[-1] + 1) - 0.5
    rows = np.arange(len(shares) + 1) - 0.5
    ax = _axes(ax, height=1.4 + 0.14 * max(len(shares), 8))
    mesh = ax.pcolormesh(edges, rows, shares, vmin=0, vmax=1, cmap="Blues")
    ax.figure.colorbar(mesh, ax=ax, label="share clipped")
    _name_rows(ax, _shortened(groups) or ["all"])
    ax.set(xlabel="step", title="What was clipped" + ", by group" * bool(groups))
    return ax


def histogram(opt_state: Any, *, group: str | None = None, ax: Any = None) -> Any:
    """Plots the distribution of norms that a monitor measured, and the suggested thresholds.

    Each threshold of `telemetry.suggest` is a line, labelled with the share that it would have
    clipped.

    Args:
        opt_state: as for `telemetry.readings`, with a `telemetry.monitor` that has seen updates.
        group: the group to draw; needed if the monitor has more than one.
        ax: matplotlib `Axes` to draw on; None for a new figure.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: `ax` is not an `Axes`.
        ValueError: the state has no monitor, no such group, more than one monitor of the group, or
            a monitor that has measured nothing.

    Example:
        >>> import jax.numpy as jnp, optaxclip
        >>> monitor = optaxclip.telemetry.monitor()
        >>> state = monitor.init(jnp.zeros(1))
        >>> for size in 1.0, 1.0, 2.0, 4.0:
        ...     _, state = monitor.update(jnp.array([size]), state)
        >>> for label in optaxclip.plots.histogram(state).texts[:3]:
        ...     print(label.get_text())
        0.5 x mean = 1 clips 50%
        quantile 0.5 = 1.5 clips 50%
        1 x mean = 2 clips 25%
    """
    histories = telemetry._histories(opt_state)
    names = list(dict.fromkeys(name for name, _ in histories))
    if not names:
        raise ValueError(
            f"opt_state has no telemetry.monitor, got a {type(opt_state).__name__}; put one into "
            f"the chain"
        )
    if len(names) > 1 or group is not None:
        _validate.option("group", group, names)
    chosen = [history.sketch for name, history in histories if group in (None, name)]
    if len(chosen) > 1:
        raise ValueError(
            f"opt_state has several monitors of {group or names[0]!r}; pass the state of one, such "
            f"as opt_state[0]"
        )
    seen, counts = telemetry._distribution(chosen[0])
    if not counts.any():
        raise ValueError(
            f"opt_state has a monitor of {group or names[0]!r} that saw nothing; pass a state "
            f"after some updates"
        )
    ax = _axes(ax)
    _bars(ax, np.log(seen[counts > 0]), counts[counts > 0])
    _flags(ax, [line for line in telemetry.suggest(opt_state) if group in (None, line.group)])
    _plain_numbers(ax.xaxis)
    of = f" of {_shortened([group])[0]}" if group else ""
    ax.set(xlabel="norm" + of, ylabel="how often", title="Norms seen, and what would be clipped")
    return ax


def _axes(ax: Any, height: float = 4.0) -> Any:
    """Returns the given axes, or the axes of a new figure.

    pyplot keeps no reference to that figure, so it is freed like any object.
    """
    try:
        from matplotlib import axes, figure
    except ImportError as error:
        raise ImportError(
            "optaxclip.plots has no matplotlib to draw with; pip install 'optaxclip[plots]'"
        ) from error
    if ax is None:
        return figure.Figure((7, height), layout="constrained").subplots()
    _validate.part("ax", ax, axes.Axes, "Figure().subplots()")
    return ax


def _plain_numbers(axis: Any) -> None:
    """Labels a logarithmic axis with 0.1 and 10 instead of powers of ten, unless it is long.

    A short axis also gets labels such as 2 and 3.
    """
    low, high = axis.get_view_interval()
    if high < 1e6 * low:
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}" if high < 10 * low else "")


def _groups(history: Any, prefix: str) -> list[str]:
    """Returns the groups that a history names, in natural order; refuses any other value."""
    records = [history] if isinstance(history, Mapping) else history
    if not isinstance(records, Sequence) or not all(isinstance(x, Mapping) for x in records):
        raise TypeError(
            f"history must be dicts, got {type(history).__name__}; pass a list of what "
            f"telemetry.metrics gave"
        )
    keys = dict.fromkeys(str(key) for record in records for key in record)
    heads = [key.removesuffix("/steps") for key in keys if key.endswith("/steps")]
    prefixes = [head for head in heads if all(f"{head}/{name}" in keys for name in NEEDED)]
    if not prefixes:
        raise ValueError(
            f"history has no metrics of a clip, only {list(keys)[:5]}; pass what telemetry.metrics "
            f"gave at each step"
        )
    _validate.option("prefix", prefix, prefixes)
    head = f"{prefix}/clipped_share/"
    groups = [key.removeprefix(head) for key in keys if key.startswith(head)]

    def natural(name: str) -> list[Any]:  # "layer_2" before "layer_10"
        return [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", name)]

    return sorted(groups, key=natural)


def _read(history: Any, prefix: str, names: list[str]) -> _Run:
    """Reads the values of some names at the steps in which the clip ran."""
    keys = [
        f"{prefix}/steps",
        _skipped_steps(history, prefix),
        *(f"{prefix}/{name}" for name in names),
    ]
    done, skipped, *values = _columns(history, keys)
    steps = (done + skipped).max(axis=1)
    # where the count of steps stands still, a guard skipped the clip and its values are old
    new = np.diff(done, axis=0, prepend=0).any(axis=1)
    if not new.any():
        raise ValueError(
            "history has no step that was done, got steps=0; record telemetry.metrics after each "
            "update"
        )
    left_out = np.diff(skipped, axis=0, prepend=skipped[:1]).any(axis=1)
    by_name = {name: value[new] for name, value in zip(names, values, strict=True)}
    return _Run(steps[new], by_name, steps[left_out])


def _skipped_steps(history: Any, prefix: str) -> str:
    """Returns the key of the count of guards, which is the same for all clips of a state."""
    keys = set(history) if isinstance(history, Mapping) else set().union(*history)
    heads = [key.removesuffix("/skipped_steps") for key in keys if key.endswith("/skipped_steps")]
    # "clip" for "clip_body_0", and "generator" for "monitor_generator"
    heads = [head for head in heads if head in prefix] or sorted(heads)
    return max(heads, key=len, default=prefix) + "/skipped_steps"


def _columns(history: Any, keys: list[str]) -> np.ndarray:
    """Reads keys as an array `[keys, steps, seeds]`; a key that is missing in a record is 0."""
    stacked = isinstance(history, Mapping)
    records = [history] if stacked else [record for record in history if keys[-1] in record]
    rows = [
        [record[key] if key in record else np.zeros_like(record[keys[0]]) for key in keys]
        for record in records
    ]
    columns = np.array(jax.device_get(rows), float).swapaxes(0, 1)
    columns = columns[:, 0] if stacked else columns
    if not 2 <= columns.ndim <= 3 or not columns.size:
        shape = columns.shape[1:]
        raise ValueError(
            f"history has arrays of shape {shape}; give them one axis of steps, and at most one "
            f"more, of seeds"
        )
    columns = columns.reshape(*columns.shape[:2], -1)
    steps = columns[0] + columns[1]
    seeds_first = np.ptp(steps[0]) > np.ptp(steps[:, 0])  # a scan under vmap returns them so
    return columns.swapaxes(1, 2) if seeds_first else columns


def _line(ax: Any, steps: np.ndarray, values: np.ndarray, style: dict[str, Any]) -> None:
    """Draws the median over seeds, and a band between the quartiles."""
    low, median, high = _quartiles(values)
    drawn = np.pad(np.isfinite(median), 1)
    if drawn.any():
        alone = drawn[1:-1] & ~drawn[:-2] & ~drawn[2:]  # a line of one point would not be seen
        ax.plot(steps, median, marker="_", markersize=5, markevery=alone, **style)
    if values.shape[1] > 1:
        ax.fill_between(steps, low, high, color=style["color"], alpha=0.2, linewidth=0)


def _quartiles(values: np.ndarray) -> np.ndarray:
    """Returns the quartiles and the median over the last axis: lower, median, upper.

    They are NaN where a logarithmic axis cannot show them.
    """
    ordered = np.sort(values, axis=1)  # NaN last
    n = ordered.shape[1]
    median = (ordered[:, (n - 1) // 2] + ordered[:, n // 2]) / 2
    quartiles = np.stack([ordered[:, (n - 1) // 4], median, ordered[:, -1 - (n - 1) // 4]])
    return np.where((quartiles > 0) & (quartiles < np.inf), quartiles, np.nan)


def _marks(ax: Any, run: _Run, before: np.ndarray, clipped: np.ndarray) -> None:
    """Draws dots on the line before clipping, and ticks at the upper edge."""
    if clipped.any():
        size = float(np.clip(600 / clipped.sum(), 1, 4))  # smaller dots where there are many
        dots = {"color": "#D55E00", "markersize": size, "zorder": 2.3}
        ax.plot(run.steps[clipped], _quartiles(before)[1, clipped], "o", label="clipped", **dots)
    not_finite = run.steps[~np.isfinite(before).all(axis=1)]
    tick = {"markersize": 14, "markeredgewidth": 1.5, "transform": ax.get_xaxis_transform()}
    for label, steps, color in (
        ("not finite", not_finite, "#CC79A7"),
        ("skipped", run.skipped, "#009E73"),
    ):
        if len(steps):
            ax.plot(steps, np.ones(len(steps)), "|", label=label, color=color, **tick)


def _name_rows(ax: Any, names: list[str]) -> None:
    """Names the rows of a heat map, or every n-th row if the letters would be too small."""
    height = 72 * ax.bbox.height / ax.figure.dpi / len(names)  # of a row, in points
    every = math.ceil(6 / height)
    font = min(9, 0.85 * height * every)
    ax.set_yticks(range(0, len(names), every), names[::every], fontsize=font)
    ax.invert_yaxis()


def _shortened(names: list[str]) -> list[str]:
    """Shortens names to about `LONGEST` letters.

    Long parts of a path lose their middle; a number at the end of a part stays.
    """
    short, longest = names, 16  # most letters of a part

    def shorten(part: str) -> str:
        return part if len(part) <= longest else f"{part[: longest - 3]}\u2026{part[-2:]}"

    while max(map(len, short), default=0) > LONGEST and longest > 4:
        short = ["/".join(map(shorten, name.split("/"))) for name in names]
        longest -= 1
    return short


def _bars(ax: Any, logarithms: np.ndarray, counts: np.ndarray) -> None:
    """Draws a histogram in the lower half of the plot.

    Each bar spans a whole number of the monitor's bins, so no bin is cut in two.
    """
    start = logarithms[0] - WIDTH / 2
    width = WIDTH * math.ceil((logarithms[-1] - start) / (BARS * WIDTH))
    number = math.floor((logarithms[-1] - start) / width) + 1
    heights, edges = np.histogram(logarithms, start + width * np.arange(number + 1), weights=counts)
    left, some = np.exp(edges), heights > 0
    blue = {"color": "#56B4E9", "edgecolor": "#56B4E9", "linewidth": 2}
    ax.bar(left[:-1][some], heights[some], np.diff(left)[some], align="edge", **blue)
    ax.set(xscale="log", ylim=(0, 2 * heights.max()))


def _flags(ax: Any, lines: list[telemetry.Suggestion]) -> None:
    """Draws a line for each candidate, with its label at the upper end.

    Lines further right end lower, so no line crosses a label.
    """
    labels = [
        f"{line.candidate} = {line.threshold:.3g} clips {100 * line.clipped_share:.3g}%"
        for line in lines
    ]
    across = 72 * ax.bbox.width / ax.figure.dpi  # in points
    font = float(np.clip(across / 45, 6.5, 8.5))
    at = {"xycoords": ax.get_xaxis_transform(), "textcoords": "offset points"}
    for i, (line, label) in enumerate(zip(lines, labels, strict=True)):
        top, color = 0.97 - 0.052 * i, "#D55E00" if "quantile" in line.candidate else "black"
        ax.axvline(line.threshold, ymax=top, color=color, linewidth=1)
        ax.annotate(
            label, (line.threshold, top), (3, 0), color=color, va="top", fontsize=font, **at
        )
    # make room for the labels: a letter is about half as wide as high, and the layout may still
    # make the axes narrower
    widths = np.array([len(label) for label in labels]) * 0.55 * font / (0.85 * across)
    (low, high), thresholds = np.log(ax.get_xlim()), np.log([line.threshold for line in lines])
    ends = low + (thresholds - low) / (1 - np.minimum(widths, 0.8))
    ax.set_xlim(right=np.exp(max(high, *ends)))
