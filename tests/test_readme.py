"""Every Python block of the README runs, in order, and prints what it says; and what it says of the
repository is so.
"""

import json
import re
import types
from pathlib import Path

import optax
from flax import linen as nn

import optaxclip

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
METHODS = (ROOT / "docs" / "methods.md").read_text()
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text()


def test_python_blocks_run_in_order(capsys):
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", README, re.DOTALL)
    assert len(blocks) == 2
    for block, printed in blocks:
        exec(compile(block, "README.md", "exec"), names)  # noqa: S102 (our own file)
        assert capsys.readouterr().out == printed
    assert names["loss"].shape == () and len(names["metrics"]) >= 9
    optaxclip.testing.check_transform(names["mine"])


def test_it_is_short():
    assert len(README.splitlines()) <= 130 and len(README.split()) <= 750


def test_every_call_of_which_function_is_mine_can_be_made():
    table = re.search(r"## Which function is mine\?\n(.*?)\n## ", README, re.DOTALL).group(1)
    names = {name: getattr(optaxclip, name) for name in optaxclip.__all__}
    names |= {"optimizer": optax.adam(1e-3), "loss": lambda w, x: w * x, "nn": nn}
    calls = [
        cell
        for row in re.findall(r"^\|.*\| (.*) \|$", table, re.MULTILINE)
        for cell in re.findall(r"`(.*?)`", row)
    ]
    assert len(calls) == 10
    for call in calls:
        assert callable(eval(call, names)) or hasattr(eval(call, names), "update"), call  # noqa: S307


def test_every_method_has_its_row():
    rows = set(re.findall(r"^\| `(\w+)\(", METHODS, re.MULTILINE))
    homes = {"optaxclip.methods", "optaxclip._feedback", "optaxclip._keep"}
    functions = {
        name: value
        for name, value in vars(optaxclip).items()
        if isinstance(value, types.FunctionType)
    }
    assert rows == {name for name, value in functions.items() if value.__module__ in homes}


def test_linked_files_and_scripts_exist():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(
        r"\./(scripts/[\w\-]+)", README
    ):
        assert (ROOT / path).exists(), path


def rows_of(name):
    return json.loads((ROOT / "docs" / "measured" / f"{name}.json").read_text())["rows"]


def test_kernels_on_a_gpu_are_as_many_as_the_compiler_made():
    kernels = {
        (row["table"].split(" (")[0].removeprefix("Kernels, "), row["method"], row["column"]): row[
            "value"
        ]
        for row in rows_of("ahead_of_time")
        if row["table"].startswith("Kernels")
    }
    rows = [
        ("global norm", "h100 optaxclip"),
        ("global norm", "h100 Optax"),
        ("none", "h100 Optax"),
    ]
    ours, clipped, bare = (kernels["GPT-2", *row] for row in rows)
    words = " ".join(PERFORMANCE.split())
    assert (
        f"is {ours} kernels, by the compiler; with Optax's clip it is {clipped}, and {bare} "
        f"without any" in words
    )
    assert f"{ours} for GPT-2 where Adam alone has {bare} and Optax's clip {clipped}" in words
    ours, clipped, bare = (kernels["tiny leaves", *row] for row in rows)
    assert f"{ours} for 2000 tiny leaves where these have {bare} and {clipped}" in words


def test_what_it_costs_is_what_was_measured():
    table = (
        re.search(r"## In short\n.*?\n(\|.*?)\n\n", PERFORMANCE, re.DOTALL).group(1).splitlines()
    )
    columns = [
        ("ahead_of_time", "v5e optaxclip"),
        ("ahead_of_time", "v5e Optax"),
        ("step_time", "optaxclip"),
        ("step_time", "Optax"),
    ]
    measured = {}
    for name in {name for name, _ in columns}:
        for row in rows_of(name):
            if row["table"].startswith(
                (
                    "Bytes from and to main memory, GPT-2",
                    "Step time over the bare optimizer's, GPT-2",
                )
            ):
                measured[row["method"], name, row["column"]] = f"{row['value']:.2f}"
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    assert len(lines) == 12
    for method, *cells in lines:
        assert cells == [measured.get((method, *column), "") for column in columns], method
    units = re.search(
        r"moves ([\d.]+) units .*? Optax's ([\d.]+), alone ([\d.]+)", README, re.DOTALL
    )
    rows = ("global norm", *columns[0]), ("global norm", *columns[1]), ("none", *columns[1])
    assert units.groups() == tuple(measured[row] for row in rows)
