"""The figures of a benchmark as tables and as JSON."""

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

PACKAGES = (
    "jax jaxlib optax optaxclip numpy flax torch keras jax-privacy libtpu jax-cuda12-plugin".split()
)


class Row(NamedTuple):
    """One figure.

    Attributes:
        table: title of its table.
        method: its line in the table.
        column: its column, such as the library.
        value: the figure; the median if it was measured more than once.
        low: the lower quartile, if it was measured more than once.
        high: the upper quartile, if it was measured more than once.
        limit: the lowest possible value, if it is known.
    """

    table: str
    method: str
    column: str
    value: float
    low: float | None = None
    high: float | None = None
    limit: float | None = None


def circumstances() -> dict[str, Any]:
    """Returns the device, the date, and the versions of the installed packages."""
    versions = {package: _version(package) for package in PACKAGES}
    installed = {name: version for name, version in versions.items() if version}
    return {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version()} | installed,
    }


def save(folder: Path, benchmark: str, rows: Sequence[Row], rounds: int) -> None:
    """Writes the same rows to `BENCHMARK.json` and `BENCHMARK.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    where = circumstances()
    whole = {
        "benchmark": benchmark,
        **where,
        "rounds": rounds,
        "rows": [row._asdict() for row in rows],
    }
    (folder / f"{benchmark}.json").write_text(json.dumps(whole, indent=1) + "\n")
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    count = f"{rounds} rounds" if rounds > 1 else "one round"
    how = (
        f"Measured on {where['date']}, times are medians, with quartiles, of {count}; "
        f"device: {where['device']}, {where['cores']} CPU cores; {versions}."
    )
    (folder / f"{benchmark}.md").write_text(f"{tables(rows)}\n{how}\n")


def tables(rows: Sequence[Row]) -> str:
    """Returns all tables in Markdown, with a line for each method and a column for limits."""
    titles = unique(row.table for row in rows)
    return "\n".join(_table(title, [row for row in rows if row.table == title]) for title in titles)


def unique(items: Any) -> list[Any]:
    """Returns the items without repetitions, in order of first appearance."""
    return list(dict.fromkeys(items))


def _table(title: str, rows: Sequence[Row]) -> str:
    cells = {(row.method, row.column): _cell(row) for row in rows}
    limits = {row.method: f"{row.limit:.3g}" for row in rows if row.limit is not None}
    columns = unique(row.column for row in rows)
    lines = [["", *columns, *(["limit"] if limits else [])]]
    for method in unique(row.method for row in rows):
        lines.append([method, *(cells.get((method, column), "") for column in columns)])
        lines[-1] += [limits.get(method, "")] if limits else []
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]])
    text = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    return "\n".join([f"**{title}**", "", *text, ""])


def _cell(row: Row) -> str:
    if row.low is None or row.high is None:
        return f"{row.value:.0f}" if float(row.value).is_integer() else f"{row.value:.3f}"
    value, low, high = (
        f"{x:.2f}" if x < 100 else f"{x:.0f}" for x in (row.value, row.low, row.high)
    )
    return f"{value} ({low} to {high})"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
