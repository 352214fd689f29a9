"""Every Python block of the README runs, in order, and what it says of the repository is so."""

import re
import types
from pathlib import Path

import optaxclip

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_python_blocks_run_in_order(capsys):
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)  # noqa: S102 (our own file)
    assert capsys.readouterr().out.startswith("clip/size_before ")
    assert names["swept"]["body"]["w"].shape == (3, 3)
    assert (names["updates"]["embed"]["w"] == 1).all()


def test_the_first_example_is_twelve_lines():
    block = re.search(r"## Twelve lines.*?```python\n(.*?)```", README, re.DOTALL).group(1)
    assert sum(bool(line.strip()) for line in block.splitlines()) == 12


def test_every_method_has_its_row():
    rows = set(re.findall(r"^\| `(\w+)\(", README, re.MULTILINE))
    homes = {"optaxclip.methods", "optaxclip._carry"}
    functions = {name: value for name, value in vars(optaxclip).items() if isinstance(value, types.FunctionType)}
    assert rows == {name for name, value in functions.items() if value.__module__ in homes}


def test_linked_files_and_scripts_exist():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(r"\./(scripts/[\w\-]+)", README):
        assert (ROOT / path).exists(), path
