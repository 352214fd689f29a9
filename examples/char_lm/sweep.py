"""Measures the table of the README: validation loss of SGD and Adam with different clips.

Some rows have corrupted batches. The seeds of a cell are one vmapped program. The table is saved
after every row, and printed at the end.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from configs.default import get_config
from jax import Array
from ml_collections import FrozenConfigDict
from tqdm import tqdm
from train import advance, start, validate

from optaxclip import telemetry

ROWS = {
    "SGD 10": {"optimizer": "sgd", "learning_rate": 10.0},
    "SGD 30": {"optimizer": "sgd", "learning_rate": 30.0},
    "Adam 0.01": {"optimizer": "adam", "learning_rate": 0.01},
    "SGD 3, 2 % corrupt": {"optimizer": "sgd", "learning_rate": 3.0, "corrupt": 0.02},
    "Adam 0.003, 2 % corrupt": {"optimizer": "adam", "learning_rate": 0.003, "corrupt": 0.02},
}
CLIPS = {
    "none": {"clip": "none"},
    "global 0.25": {"clip": "global_norm", "threshold": 0.25},
    "global 1": {"clip": "global_norm", "threshold": 1.0},
    "AutoClip 10 %": {"clip": "autoclip", "threshold": 0.1},
    "ZClip 2.5": {"clip": "zclip", "threshold": 2.5},
    "AGC 0.05": {"clip": "agc", "threshold": 0.05},
    "layers 10/100": {"clip": "layers"},
    # a batch has 768 characters, and the loss is their mean
    "layers 10/768, 100/768": {
        "clip": "layers",
        "layers": {"lstm": 10 / 768, "output": 100 / 768},
    },
}
SEED = flags.DEFINE_integer("seed", 0, "The first of the seeds.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Runs in each cell.")
STEPS = flags.DEFINE_integer("steps", 1000, "Of each run.")
OUT = flags.DEFINE_string("out", "results/char_lm_sweep", "Folder of results.json.")
CHOSEN = flags.DEFINE_multi_enum("row", list(ROWS), list(ROWS), "A row to measure; repeatable.")


def measure(config: FrozenConfigDict, steps: int, seeds: Array) -> dict[str, Any]:
    """Returns the validation loss of each seed, and the share of its steps that were clipped."""

    def run(seed: Array, state: Any) -> tuple[Array, Array]:
        state, _ = advance(config, steps, seed, state)
        metrics = telemetry.metrics(state.opt_state)
        return validate(config, state.params), metrics["clip/clipped_steps"] / metrics["clip/steps"]

    # one seed after the other: on CPU, the batched decompositions of two orthogonal initializers
    # can deadlock under vmap
    states = jax.jit(partial(jax.lax.map, partial(start, config)))(seeds)
    losses, shares = jax.jit(jax.vmap(run))(seeds, states)
    losses = np.where(np.isfinite(losses), losses, np.array(None))
    return {"loss": losses.tolist(), "clipped_share": shares.tolist()}


def table(rows: dict[str, Any]) -> str:
    """Returns the losses as a Markdown table."""

    def text(loss: float | None) -> str:
        return "NaN" if loss is None else f"{loss:.2f}" if loss < 10 else f"{loss:.3g}"

    lines = [["optimizer", *CLIPS], ["---"] * (1 + len(CLIPS))]
    for name, cells in rows.items():
        lines.append([name, *(", ".join(map(text, cell["loss"])) for cell in cells.values())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str]) -> None:
    """Measures row by row."""
    del argv
    seeds, rows, file = SEED.value + jnp.arange(SEEDS.value), {}, Path(OUT.value) / "results.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(CHOSEN.value) * len(CLIPS), unit="cell")
    for row in CHOSEN.value:
        rows[row] = {}
        for name, clip in CLIPS.items():
            config = get_config()
            config.update(ROWS[row] | clip)
            rows[row][name] = measure(FrozenConfigDict(config), STEPS.value, seeds)
            bar.update()
        results = {"seed": SEED.value, "steps": STEPS.value, "rows": rows}
        file.write_text(json.dumps(results, allow_nan=False))
    bar.close()
    print(table(rows))


if __name__ == "__main__":
    app.run(main)
