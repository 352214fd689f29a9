"""Wall time of an optimizer step on this machine's default device, as a ratio to the bare optimizer's.

All rows run in one process, in turn, so what disturbs one disturbs all; a step follows one of its own kind, as in
training, because what others leave in caches and allocators is not its cost: `python -m benchmarks.step_time`.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip
from benchmarks.ahead_of_time import gpt2, step_of
from optaxclip import thresholds

ADAM = optax.adam(1e-3)
OPTAX_CLIP = optax.chain(optax.clip_by_global_norm(1.0), ADAM)
CLIP = optax.chain(optaxclip.clip_by_global_norm(1.0), ADAM)
ROWS = {
    "adam": ADAM,
    "optax: clip_by_global_norm": OPTAX_CLIP,
    "clip_by_global_norm": CLIP,
    "clip_by_norm": optax.chain(optaxclip.clip_by_norm(1.0), ADAM),
    "autoclip": optax.chain(optaxclip.autoclip(), ADAM),
    "adagc": optax.chain(optaxclip.adagc(), ADAM),
    "optax: apply_if_finite": optax.apply_if_finite(OPTAX_CLIP, 10),
    "skip_nonfinite": optaxclip.skip_nonfinite(CLIP),
    "skip_spikes": optaxclip.skip_spikes(CLIP, thresholds.zscore(4.0)),
}


def ratios(rows: dict[str, optax.GradientTransformation], params: Any, rounds: int) -> dict[str, np.ndarray]:
    """For each row `[rounds]`, the time of its step over that of the first row's in the same round."""
    return timed({name: _step(optimizer, params) for name, optimizer in rows.items()}, rounds)


def timed(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """For each step `[rounds]`, its time over that of the first in the same round."""
    times = np.array([[_seconds(step) for step in steps.values()] for _ in range(rounds)])
    return dict(zip(steps, (times / times[:, :1]).T, strict=True))


def _step(optimizer: optax.GradientTransformation, params: Any) -> Callable[[], Any]:
    """Runs one compiled step on parameters and state of its own, which are donated."""
    key = jax.random.key(0)
    grads = jax.tree.map(lambda x: 0.01 * jax.random.normal(key, x.shape), params)
    params = jax.tree.map(lambda x: 0.1 * jax.random.normal(key, x.shape), params)
    held = [params, optimizer.init(params)]
    compiled = step_of(optimizer).lower(*held, grads).compile()

    def step() -> Any:
        held[:] = compiled(*held, grads)
        return held

    return step


def _seconds(step: Callable[[], Any]) -> float:
    jax.block_until_ready(step())
    start = time.perf_counter()
    jax.block_until_ready(step())
    return time.perf_counter() - start


def main() -> None:
    """Prints a line per row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41, help="how often each row runs")
    parser.add_argument("--layers", type=int, default=2, help="of a GPT-2; its embedding has 4000 words here")
    options = parser.parse_args()
    params = gpt2(options.layers)
    params["wte"] = jax.ShapeDtypeStruct((4000, 768), jnp.float32)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, optax {optax.__version__}")
    print(f"{'row':30}{'median':>8}{'quartiles':>16}")
    for name, values in ratios(ROWS, params, options.rounds).items():
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
        print(f"{name:30}{median:8.2f}{low:9.2f} to {high:.2f}")


if __name__ == "__main__":
    main()
