"""What the examples share: options, quartiles over seeds, and saving numbers and pictures."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure


def quartiles(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower quartile, median, upper quartile over axis 0; NaN counts as the worst, because it is
    sorted last.
    """
    n, ordered = len(values), np.sort(values, axis=0)
    return (
        ordered[(n - 1) // 4],
        (ordered[(n - 1) // 2] + ordered[n // 2]) / 2,
        ordered[-1 - (n - 1) // 4],
    )


def command_line(description: str, out: str, epochs: bool = True) -> argparse.ArgumentParser:
    """The options that the examples share."""
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
    parser.add_argument(
        "--steps", type=int, help="stop after so many steps" + ", whatever the epochs" * epochs
    )
    parser.add_argument("--out", default=out, help="folder for pictures and numbers")
    return parser


def save(out: str, results: dict[str, Any], **figures: Figure) -> None:
    """Saves the numbers, with null for NaN and infinity, and the pictures."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        results,
        default=lambda array: np.where(np.isfinite(array), array, np.array(None)).tolist(),
        allow_nan=False,
    )
    (folder / "results.json").write_text(text)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=150)
    print(f"saved in {folder}: {', '.join(['results.json', *(f'{name}.png' for name in figures)])}")
