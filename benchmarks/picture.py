"""A picture of the tables that know a limit: a dot for each figure, with its quartiles, and a line
where the limit is.
"""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.report import Row, unique

MARKERS, COLORS = "osD^vP", ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"]


def draw(rows: Sequence[Row]) -> Figure:
    """A panel for each table, below one another, so that it is legible on a phone as well."""
    titles = unique(row.table for row in rows if row.limit is not None)
    styles = _styles(unique(row.column for row in rows))
    panels = [[row for row in rows if row.table == title] for title in titles]
    heights = [len({row.method for row in panel}) + 2 for panel in panels]
    figure = Figure((6.4, 0.42 * sum(heights) + 0.8), layout="constrained")
    axes = np.atleast_1d(figure.subplots(len(panels), height_ratios=heights))
    for ax, title, panel in zip(axes, titles, panels, strict=True):
        _panel(ax, panel, styles)
        ax.set_title(textwrap.fill(title, 44), fontsize=12, loc="left")
    handles = {
        label: handle
        for ax in axes
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles, loc="outside upper left", ncols=3, frameon=False, fontsize=12
    )
    return figure


def _styles(columns: list[str]) -> dict[str, tuple[str, str]]:
    """Marker and colour of each column. A library, the last word of a column, has a colour; the
    chip before it a marker.
    """
    chip, library = (
        {column: column.rpartition(" ")[part] for column in columns} for part in (0, 2)
    )
    chips, libraries = unique(chip.values()), unique(library.values())
    markers = {
        c: chips.index(chip[c]) if len(chips) > 1 else libraries.index(library[c]) for c in columns
    }
    return {c: (MARKERS[markers[c]], COLORS[libraries.index(library[c])]) for c in columns}


def _panel(ax: Any, rows: Sequence[Row], styles: dict[str, tuple[str, str]]) -> None:
    methods, columns = unique(row.method for row in rows), unique(row.column for row in rows)
    for at, column in enumerate(columns):
        own = [row for row in rows if row.column == column]
        values = np.array(
            [
                [row.value if edge is None else edge for edge in (row.low, row.value, row.high)]
                for row in own
            ]
        )
        y = [
            methods.index(row.method) + 0.7 / len(columns) * (at - (len(columns) - 1) / 2)
            for row in own
        ]
        low, median, high = values.T
        marker, color = styles[column]
        errors = [median - low, high - median]
        ax.errorbar(
            median, y, xerr=errors, fmt=marker, color=color, markersize=7, linewidth=2, label=column
        )
    limits = {row.method: row.limit for row in rows}
    for i, method in enumerate(methods):
        ax.plot(
            [limits[method]] * 2,
            [i - 0.42, i + 0.42],
            color="black",
            linewidth=2,
            label="limit" if not i else None,
        )
    ax.set_yticks(range(len(methods)), methods)
    ax.set_ylim(len(methods) - 0.4, -0.6)
    ax.tick_params(labelsize=12)
    ax.grid(axis="x", color="#dddddd")
