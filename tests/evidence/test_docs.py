"""Every Python block of every page of the documentation runs, in order, and prints what the page
says.

What the recipes for loggers write is what happened; the pages of the API have each public name
once.
"""

import contextlib
import csv
import functools
import inspect
import io
import json
import re
import struct
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorboardX.proto import event_pb2
from wandb.proto import wandb_internal_pb2

import optaxclip
from docs import gallery

DOCS = Path(__file__).parents[2] / "docs"
METHODS = (DOCS / "methods.md").read_text()
GENERATED = {"_build", "gallery.md"}
PAGES = sorted(
    str(page.relative_to(DOCS))
    for page in DOCS.rglob("*.md")
    if not GENERATED & set(page.relative_to(DOCS).parts)
)
BLOCK = re.compile(
    r"^( *)```python\n(.*?)^\1```$(?:\n\n\1```text\n(.*?)^\1```$)?", re.DOTALL | re.MULTILINE
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`page -> (folder it ran in, names that it defined)`; each page runs once."""

    @functools.cache
    def run(page):
        folder, text, names = (
            tmp_path_factory.mktemp("page"),
            (DOCS / page).read_text(),
            {"__name__": "page"},
        )
        (folder / "home").mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setenv("HOME", str(folder / "home"))
            for name, value in {
                "MODE": "offline",
                "SILENT": "true",
                "ERROR_REPORTING": "false",
                "DIR": str(folder),
            }.items():
                patch.setenv(f"WANDB_{name}", value)
            for kind in ("CACHE", "CONFIG", "DATA"):
                patch.setenv(f"WANDB_{kind}_DIR", str(folder / kind.lower()))
            for block in BLOCK.finditer(text):
                lines_above = text.count("\n", 0, block.start(2))
                code = "\n" * lines_above + textwrap.dedent(block.group(2))
                with contextlib.redirect_stdout(io.StringIO()) as printed:
                    exec(compile(code, DOCS / page, "exec"), names)  # noqa: S102 (our own file)
                if block.group(3) is not None:
                    assert printed.getvalue() == re.sub(
                        rf"^{block.group(1)}", "", block.group(3), flags=re.MULTILINE
                    )
        return folder, names

    return run


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run_in_order(page, run):
    run(page)


@pytest.mark.parametrize("page", PAGES)
def test_no_python_block_escapes(page):
    text = (DOCS / page).read_text()
    assert len(BLOCK.findall(text)) == len(
        re.findall(r"```\s*\{?(?:code-block\}\s*)?(?:python|py)\b", text)
    )


def test_there_are_pages():
    assert {"logging.md", "concepts.md", "api/clip.md"} <= set(PAGES)


def test_the_gallery_has_every_method_with_what_its_docstring_says():
    entries = sum(gallery.ENTRIES.values(), [])
    methods = set(re.findall(r"^\| `(\w+)\(", METHODS, re.MULTILINE))
    of_weights = {"keep_params", "max_norm", "qk_clip"}  # the pictures are of gradients
    assert {entry.name for entry in entries} == methods - of_weights
    for entry in entries:
        before, references = gallery.parts(inspect.getdoc(getattr(optaxclip, entry.name)))
        assert "$" in before and not re.search(r":math:|Args:|^\.\. ", before, re.MULTILINE), (
            entry.name
        )
        assert entry.name in ("clip_by_norm",) or re.search(r"\d{4}|Levanter", references), (
            entry.name
        )
        assert entry.chain is None or entry.name in json.loads(gallery.COSTS.read_text()), (
            entry.name
        )


def test_every_public_name_has_one_place_in_the_api():
    documented = []
    for page in (DOCS / "api").glob("*.md"):
        module = "optaxclip"
        for directive, name in re.findall(
            r"^\.\. (\w+):: ([\w.]+)$", page.read_text(), re.MULTILINE
        ):
            module = name if directive in ("automodule", "currentmodule") else module
            if directive.startswith("auto"):
                documented.append(name if directive == "automodule" else f"{module}.{name}")
    assert len(set(documented)) == len(documented)
    names = {name for name in vars(optaxclip) if not name.startswith("_")}
    modules = {name for name in names if inspect.ismodule(getattr(optaxclip, name))}
    assert {f"optaxclip.{name}" for name in names} <= set(documented)
    for name in documented:  # exists, where the page says
        functools.reduce(getattr, name.split(".")[1:], optaxclip)
    for page in PAGES:  # what a page calls by module and name is documented
        for module, name in re.findall(
            r"\b(\w+)\.([a-z]\w+)\b", " ".join(re.findall(r"`+[^`]+`+", (DOCS / page).read_text()))
        ):
            if module in modules and hasattr(getattr(optaxclip, module), name):
                assert (
                    f"optaxclip.{module}.{name}" in documented or f"optaxclip.{name}" in documented
                ), (page, module, name)


@pytest.fixture(scope="module")
def logged(run):
    """The folder in which the page on logging ran, and the metrics of its hundred steps, measured
    once more.
    """
    folder, names = run("logging.md")
    params, opt_state = names["start"], names["optimizer"].init(names["start"])
    rows = []
    for x, y in zip(names["xs"], names["ys"], strict=True):
        params, opt_state, metrics = names["train_step"](params, opt_state, x, y)
        rows.append({name: float(value) for name, value in jax.device_get(metrics).items()})
    return folder, names, rows


def test_the_run_that_is_logged_has_something_to_tell(logged):
    rows = logged[2]
    assert len(rows) == 100 and rows[-1]["loss"] < 0.1 * rows[0]["loss"]
    assert [step for step, row in enumerate(rows) if not np.isfinite(row["loss"])] == [40]
    assert [row["clip/skipped_steps"] for row in rows] == [0.0] * 40 + [1.0] * 60
    assert rows[-1]["clip/steps"] == 99 and 0 < rows[-1]["clip/clipped_steps"] < 99
    assert rows[-1]["clip/nonfinite_steps"] == 0
    assert max(row["clip/size_before"] for row in rows) > 2 and max(
        row["clip/size_after"] for row in rows
    ) == pytest.approx(1)
    assert {f"clip/size_before/{leaf}" for leaf in ("kernel", "bias")} < set(rows[0])


def test_csv_holds_every_step(logged):
    folder, _, rows = logged
    with open(folder / "clipping.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [int(row.pop("step")) for row in read] == list(range(100))
    np.testing.assert_equal(
        [{name: float(value) for name, value in row.items()} for row in read], rows
    )


def events(path):
    """The records of a TensorBoard file: length, checksum of it, data, checksum of those."""
    data, at = path.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        yield event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
        at += 16 + length


def test_tensorboard_holds_every_step(logged):
    folder, _, rows = logged
    (path,) = (folder / "runs" / "clipped").glob("events.out.tfevents.*")
    read = [{} for _ in rows]
    for event in events(path):
        for value in event.summary.value:
            assert value.tag not in read[event.step]
            read[event.step][value.tag] = value.simple_value
    np.testing.assert_equal(read, rows)


def wandb_records(path):
    """The records of a run's file: blocks of 32 KiB, in them pieces with checksum, length, and
    whether more of it follows.
    """
    data, at, record = path.read_bytes(), 7, b""
    while at < len(data):
        if 2**15 - at % 2**15 < 7:  # too little for a header is left empty
            at += -at % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def test_wandb_holds_every_step_and_leaves_home_alone(logged):
    folder, _, rows = logged
    (path,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    read = [{} for _ in rows]
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            items = {
                item.nested_key[-1] if item.nested_key else item.key: item.value_json
                for item in record.history.item
            }
            read[int(items["_step"])] = {
                name: float(value) for name, value in items.items() if not name.startswith("_")
            }
    np.testing.assert_equal(read, rows)
    assert not list((folder / "home").rglob("*wandb*"))


def test_every_tenth_step_is_in_the_log(logged):
    _, names, rows = logged
    assert [row["step"] for row in names["log"]] == list(range(9, 100, 10))
    np.testing.assert_equal(
        names["log"], [rows[step] | {"step": step} for step in range(9, 100, 10)]
    )


def test_scan_tells_the_same(logged):
    _, names, rows = logged
    assert [set(row) for row in names["rows"]] == [set(row) for row in rows]
    for name in rows[0]:
        np.testing.assert_allclose(
            [row[name] for row in names["rows"]], [row[name] for row in rows], rtol=1e-4, atol=1e-5
        )


def test_the_largest_layer_has_its_name(logged):
    _, names, rows = logged
    sizes = {leaf: rows[-1][f"clip/size_before/{leaf}"] for leaf in ("kernel", "bias")}
    assert names["largest"] == max(sizes, key=lambda leaf: sizes[leaf])


def test_monitors_see_both_sides_of_the_clip(logged):
    seen = logged[1]["seen"]
    for layer, before, after in ("encoder", 5, 0.5**0.5), ("head", 0.5, 0.5):
        assert seen[f"monitor_0/size_before/{layer}"] == pytest.approx(before)
        assert seen[f"monitor_1/size_before/{layer}"] == pytest.approx(after)
