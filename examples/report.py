"""Shared by the examples: options, quartiles over seeds, saving numbers and plots."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure


def quartiles(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns lower quartile, median and upper quartile over axis 0.

    NaN is sorted last, so it counts as the worst value.
    """
    n, ordered = len(values), np.sort(values, axis=0)
    median = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    return ordered[(n - 1) // 4], median, ordered[-1 - (n - 1) // 4]


def command_line(description: str, out: str, epochs: bool = True) -> argparse.ArgumentParser:
    """Returns a parser with the options that the examples share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for name, default, text in (
        ("seeds", 20, "runs"),
        ("seed", 0, "of all random numbers"),
        ("epochs", 100, "16 steps each"),
    ):
        if epochs or name != "epochs":
            parser.add_argument(f"--{name}", type=int, default=default, help=text)
    steps = "number of steps" + ", instead of epochs" * epochs
    parser.add_argument("--steps", type=int, help=steps)
    parser.add_argument("--out", default=out, help="folder for plots and numbers")
    return parser


def save(out: str, results: dict[str, Any], **figures: Figure) -> None:
    """Saves the numbers, with null for NaN and infinity, and the plots."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)

    def finite(array: Any) -> Any:
        return np.where(np.isfinite(array), array, np.array(None)).tolist()

    text = json.dumps(results, default=finite, allow_nan=False)
    (folder / "results.json").write_text(text)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=150)
    print(f"saved in {folder}: {', '.join(['results.json', *(f'{name}.png' for name in figures)])}")
