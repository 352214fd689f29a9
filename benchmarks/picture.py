"""Draws the tables that have a limit: a dot with quartiles for each figure, a line at the limit."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.report import Row, unique

MARKERS, COLORS = "osD^vP", ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"]


def draw(rows: Sequence[Row]) -> Figure:
    """Draws a panel for each table; panels are stacked, so the plot is legible on a phone."""
    titles = unique(row.table for row in rows if row.limit is not None)
    styles = _styles(unique(row.column for row in rows))
    panels = [[row for row in rows if row.table == title] for title in titles]
    heights = [len({row.method for row in panel}) + 2 for panel in panels]
    figure = Figure((6.4, 0.42 * sum(heights) + 0.8), layout="constrained")
    axes = np.atleast_1d(figure.subplots(len(panels), height_ratios=heights))
    for ax, title, panel in zip(axes, titles, panels, strict=True):
        _panel(ax, panel, styles)
        ax.set_title(textwrap.fill(title, 44), fontsize=12, loc="left")
    handles = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles[label] = handle
    look = {"loc": "outside upper left", "ncols": 3, "frameon": False, "fontsize": 12}
    figure.legend(handles.values(), handles, **look)
    return figure


def _styles(columns: list[str]) -> dict[str, tuple[str, str]]:
    """Returns the marker and colour of each column, which is named `"device library"`.

    The library chooses the colour. The device chooses the marker, or the library if there is only
    one device.
    """
    device = {column: column.rpartition(" ")[0] for column in columns}
    library = {column: column.rpartition(" ")[2] for column in columns}
    devices, libraries = unique(device.values()), unique(library.values())
    styles = {}
    for column in columns:
        color = libraries.index(library[column])
        marker = devices.index(device[column]) if len(devices) > 1 else color
        styles[column] = (MARKERS[marker], COLORS[color])
    return styles


def _panel(ax: Any, rows: Sequence[Row], styles: dict[str, tuple[str, str]]) -> None:
    methods, columns = unique(row.method for row in rows), unique(row.column for row in rows)
    for at, column in enumerate(columns):
        of_column = [row for row in rows if row.column == column]
        shift = 0.7 / len(columns) * (at - (len(columns) - 1) / 2)  # columns side by side
        y = [methods.index(row.method) + shift for row in of_column]
        median = np.array([row.value for row in of_column])
        low = np.array([row.value if row.low is None else row.low for row in of_column])
        high = np.array([row.value if row.high is None else row.high for row in of_column])
        marker, color = styles[column]
        look = {"fmt": marker, "color": color, "markersize": 7, "linewidth": 2, "label": column}
        ax.errorbar(median, y, xerr=[median - low, high - median], **look)
    limits = {row.method: row.limit for row in rows}
    for i, method in enumerate(methods):
        label = None if i else "limit"
        edges = [i - 0.42, i + 0.42]
        ax.plot([limits[method]] * 2, edges, color="black", linewidth=2, label=label)
    ax.set_yticks(range(len(methods)), methods)
    ax.set_ylim(len(methods) - 0.4, -0.6)
    ax.tick_params(labelsize=12)
    ax.grid(axis="x", color="#dddddd")
