"""Measures what clipping costs, compared with Optax, PyTorch, Keras and jax_privacy.

Times are ratios within one run, as medians with quartiles. Tables also show the lowest possible
cost, which `docs/performance.md` derives.
"""

import argparse
import time
from pathlib import Path

from benchmarks import (
    ahead_of_time,
    compile_time,
    lowering,
    peers,
    per_example,
    step_time,
    sweep,
)
from benchmarks.picture import draw
from benchmarks.report import save, tables

# the function, and how often it measures each row: by default, and with --quick
BENCHMARKS = {
    "step_time": (step_time.measure, 31, 5),
    "compile_time": (compile_time.measure, 3, 1),
    "ahead_of_time": (ahead_of_time.measure, 1, 1),
    "per_example": (per_example.measure, 5, 1),
    "sweep": (sweep.measure, 3, 1),
    "lowering": (lowering.measure, 9, 3),
}


def main() -> None:
    """Prints tables, and saves them with JSON and plots."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"what to measure, of {', '.join(BENCHMARKS)}; all"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small models, few rounds: a minute in all"
    )
    parser.add_argument("--rounds", type=int, help="how often each row is measured")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results/benchmarks"),
        help="where JSON, tables and plots go",
    )
    options = parser.parse_args()
    if unknown := set(options.names) - set(BENCHMARKS):
        parser.error(
            f"no benchmark is called {', '.join(sorted(unknown))}; there are "
            f"{', '.join(BENCHMARKS)}"
        )
    for peer, package in peers.PACKAGES.items():
        if not peers.installed(peer):
            print(f"no rows of {peer}: {package} is not installed")
    for name in options.names or BENCHMARKS:
        run(name, options)
    print(f"saved in {options.out}")


def run(name: str, options: argparse.Namespace) -> None:
    """Runs one benchmark, prints its tables and saves them."""
    measure, full_rounds, quick_rounds = BENCHMARKS[name]
    rounds = options.rounds or (quick_rounds if options.quick else full_rounds)
    start = time.perf_counter()
    print(f"\n{name} ...", flush=True)
    rows = list(measure(rounds, options.quick))
    seconds = time.perf_counter() - start
    print(f"\n{tables(rows)}\n{name} took {seconds:.0f} seconds", flush=True)
    if rows:
        save(options.out, name, rows, rounds)
    if any(row.limit for row in rows):
        draw(rows).savefig(options.out / f"{name}.png", dpi=150)


if __name__ == "__main__":
    main()
