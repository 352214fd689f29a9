"""The benchmarks: the trees are what they are called, and every table, file and picture has every
figure.
"""

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from run_example import help_of

import optaxclip
from benchmarks import __main__ as program
from benchmarks import (
    ahead_of_time,
    compile_time,
    lowering,
    peers,
    per_example,
    step_time,
    sweep,
    trees,
)
from benchmarks.optimizers import METHODS
from benchmarks.picture import draw
from benchmarks.report import Row, tables
from benchmarks.timing import spread, timed
from benchmarks.traffic import messages, traffic

TREES = {
    "GPT-2": (trees.gpt2, 148, 124_439_808),
    "TinyLlama": (trees.llama, 201, 1_100_048_384),
    "ResNet-50": (trees.resnet50, 161, 25_557_032),
    "tiny leaves": (trees.tiny, 2000, 272_000),
}
FEW = ["none", "value", "global norm"]


@pytest.mark.parametrize("name", TREES)
def test_a_tree_has_the_leaves_and_parameters_of_its_model(name):
    make, leaves, numbers = TREES[name]
    shapes = [leaf.shape for leaf in jax.tree.leaves(make())]
    assert (len(shapes), sum(map(math.prod, shapes))) == (leaves, numbers)
    assert (
        trees.described(name, make())
        == f"{name} ({leaves} leaves, {numbers / 1e6:.4g} M parameters)"
    )


def test_noise_has_the_shapes_and_the_scale():
    tree = {
        "w": jax.ShapeDtypeStruct((300, 50), jnp.float32),
        "b": jax.ShapeDtypeStruct((50,), jnp.float32),
    }
    drawn = trees.noise(tree, 0.1)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), drawn) == jax.tree.map(
        lambda x: (x.shape, x.dtype), tree
    )
    np.testing.assert_allclose(drawn["w"].std(), 0.1, rtol=0.05)


# One run of the program, on what is small


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder it wrote to, and what it printed; with no peer but Optax."""
    folder, printed = tmp_path_factory.mktemp("benchmarks"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            peers,
            "PACKAGES",
            {peer: f"missing_{package}" for peer, package in peers.PACKAGES.items()},
        )
        patch.setattr(step_time, "TREES", {"small": (lambda: trees.tiny(4), FEW)})
        patch.setattr(compile_time, "TREES", {"two leaves": (lambda: trees.tiny(2), FEW[1:], 1)})
        patch.setattr(
            per_example, "MODELS", {"dense": (nn.Dense(10), lambda: per_example.image_batch(5))}
        )
        patch.delitem(sweep.CLIPS, "Optax")
        patch.setattr(sweep, "THRESHOLDS", np.ones(1, np.float32))
        patch.setattr(lowering.trees, "gpt2", lambda *_, **__: trees.tiny(4))
        patch.setattr(lowering, "NAMES", {"columns": ("columns",)})
        patch.setattr(lowering, "CLIPS", {"leaf norm": lowering.CLIPS["leaf norm"]})
        patch.setattr("builtins.print", lambda *text, **_: printed.append(" ".join(map(str, text))))
        patch.setattr("sys.argv", ["benchmarks", "--rounds", "1", "--out", str(folder)])
        program.main()
    return folder, "\n".join(printed)


def saved(ran, name):
    return json.loads((ran[0] / f"{name}.json").read_text())


def keys(rows):
    return {(row["method"], row["column"]) for row in rows}


LIBRARIES = {(method, library) for method in FEW for library in METHODS[method].optimizers}
WAYS = {(way, "optaxclip") for way in sweep.WAYS}
FIGURES = {
    (row, figure)
    for row in ("plain", "clipped_grad", "optax")
    for figure in ("temporary memory", "flops", "bytes", "time")
}
# it has a loop
SMALLER = {("clipped_grad, microbatch 32", figure) for figure in ("temporary memory", "time")}


@pytest.mark.parametrize(
    ("name", "count", "expected"),
    [
        ("step_time", 1, LIBRARIES),
        (
            "compile_time",
            2,
            {(method, library) for method, library in LIBRARIES if method != "none"},
        ),
        ("per_example", 1, FIGURES | SMALLER),
        ("sweep", 2, WAYS),
        ("lowering", 3, {(line, "leaf norm") for line in ("with all", "without columns")}),
    ],
)
def test_json_has_every_row_in_every_table(ran, name, count, expected):
    rows = saved(ran, name)["rows"]
    by_table = {
        row["table"]: [other for other in rows if other["table"] == row["table"]] for row in rows
    }
    assert len(by_table) == count
    for table in by_table.values():
        assert keys(table) == expected and len(table) == len(expected)
    assert all(row["low"] is None or 0 < row["low"] <= row["value"] <= row["high"] for row in rows)


def test_ratios_are_to_what_they_say(ran):
    def ones(name):
        return [
            (row["method"], row["column"])
            for row in saved(ran, name)["rows"]
            if row["value"] == row["low"] == 1
        ]

    assert ones("step_time") == [("none", "Optax")]
    assert ones("compile_time") == [("global norm", "Optax")] * 2
    assert ones("per_example") == [("plain", "time")]
    assert ones("sweep") == [("one program, under vmap", "optaxclip")] * 2


def test_limits_of_time_are_those_of_bytes(ran):
    limits = {row["method"]: row["limit"] for row in saved(ran, "step_time")["rows"]}
    assert limits == {"none": 1, "value": 1, "global norm": 8 / 7}


@pytest.mark.parametrize("name", ["step_time", "compile_time", "per_example", "sweep", "lowering"])
def test_tables_are_printed_and_say_what_json_says(ran, name):
    folder, printed = ran
    whole = saved(ran, name)
    text = tables([Row(**row) for row in whole["rows"]])
    assert text in printed and (folder / f"{name}.md").read_text().startswith(text)
    assert (
        f"jax {jax.__version__}" in (folder / f"{name}.md").read_text()
        and whole["versions"]["jax"] == jax.__version__
    )
    assert whole["rounds"] == 1 and whole["device"] == jax.devices()[0].device_kind


def test_missing_peers_are_named_and_what_has_no_rows_is_not_saved(ran):
    for peer in "torch", "Keras", "jax_privacy", "TPU", "H100":
        assert f"no rows of {peer}: missing_" in ran[1]
    measured = program.BENCHMARKS.keys() - {"ahead_of_time"}
    files = {f"{name}.{kind}" for name in measured for kind in ("json", "md")} | {"step_time.png"}
    assert {path.name for path in ran[0].iterdir()} == files


def test_an_unknown_name_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks", "steptime"])
    with pytest.raises(SystemExit):
        program.main()
    assert "no benchmark is called steptime; there are step_time," in capsys.readouterr().err


def test_help_names_all(capsys):
    assert all(name in help_of(program, capsys) for name in program.BENCHMARKS)


# Tables and pictures


ROWS = [
    Row("Time, of a tree", "none", "Optax", 1.0, 1.0, 1.0, 1.0),
    Row("Time, of a tree", "norm", "Optax", 2.0, 1.5, 2.55, 8 / 7),
    Row("Time, of a tree", "norm", "torch", 1234.4, 1.0, 2000.0, 8 / 7),
    Row("Kernels, of a tree", "norm", "Optax", 150),
    Row("Kernels, of a tree", "none", "Optax", 7.1251),
]


TIME = """\
**Time, of a tree**

|      | Optax               | torch               | limit |
| ---- | ------------------: | ------------------: | ----: |
| none | 1.00 (1.00 to 1.00) |                     | 1     |
| norm | 2.00 (1.50 to 2.55) | 1234 (1.00 to 2000) | 1.14  |
"""
KERNELS = """\
**Kernels, of a tree**

|      | Optax |
| ---- | ----: |
| norm | 150   |
| none | 7.125 |
"""


def test_tables_have_quartiles_and_limits_where_there_are_such():
    assert tables(ROWS) == f"{TIME}\n{KERNELS}"


def test_a_picture_has_a_dot_for_each_figure_that_has_a_limit():
    (ax,) = draw(ROWS).axes
    drawn = {bar.get_label(): bar.lines[0].get_xdata().tolist() for bar in ax.containers}
    assert drawn == {"Optax": [1.0, 2.0], "torch": [1234.4]}
    assert [label.get_text() for label in ax.get_yticklabels()] == ["none", "norm"]
    edges = ax.containers[0].lines[2][0].get_segments()[1][:, 0]
    np.testing.assert_allclose(edges, [1.5, 2.55])


# How it is measured


def test_all_are_timed_in_turn_and_each_follows_one_of_its_own_kind():
    calls = []
    times = timed({name: lambda name=name: calls.append(name) for name in "ab"}, 3)
    assert calls == list("aabb") * 3
    assert times["a"].shape == times["b"].shape == (3,) and (times["a"] > 0).all()


def test_spread_is_median_and_quartiles():
    assert spread(np.array([5.0, 1.0, 2.0, 4.0, 3.0])) == (3.0, 2.0, 4.0)


def test_traffic_is_what_is_read_from_and_written_to_main_memory():
    program = """HloModule step

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(f32[] %x, f32[] %y)
}

ENTRY %main (g: f32[100], p: bf16[100]) -> f32[100] {
  %g = f32[100]{0} parameter(0)
  %p = bf16[100]{0} parameter(1)
  %near = f32[100]{0:S(1)} fusion(f32[100]{0} %g), kind=kLoop
  %sum = f32[] all-reduce(f32[] %near), to_apply=%add
  ROOT %far = f32[100]{0} fusion(f32[100]{0:S(1)} %near, bf16[100]{0} %p), kind=kLoop
}
"""
    assert list(traffic(program)) == [400, 4, 600]
    assert messages(program) == 1


@pytest.mark.parametrize("name", lowering.NAMES)
def test_the_library_without_a_name_has_the_plain_line_and_the_same_numbers(name):
    before = {key: module for key, module in sys.modules.items() if key.startswith("optaxclip")}
    library = lowering.made_without(name)
    after = {key: module for key, module in sys.modules.items() if key.startswith("optaxclip")}
    assert after == before and library is not optaxclip
    for each in lowering.NAMES:
        plain = getattr(library._lowering, each).__module__ == "plain_lowering"
        assert plain == (each == name)
    grads = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.array([3.0, -4.0])}
    for clip in lowering.CLIPS.values():
        ours, theirs = (clip(one).update(grads, None, grads)[0] for one in (optaxclip, library))
        for x, y in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6)


def test_kernels_are_counted_for_every_chip_whose_compiler_is_installed(monkeypatch):
    monkeypatch.setattr(ahead_of_time, "cost", lambda *_: ahead_of_time.Cost(8.5, 0.25, 10, 0))
    monkeypatch.setattr(peers, "installed", lambda peer: peer == "H100")
    optimizers = {("with all", column): None for column in lowering.CLIPS}
    rows = list(lowering._kernels(optimizers, trees.tiny(2)))
    assert [(row.table[:15], row.column, row.value) for row in rows] == [
        ("Kernels on h100", column, 10) for column in lowering.NORMS
    ]


def test_ahead_of_time_has_rows_for_every_chip_whose_compiler_is_installed(monkeypatch):
    asked = []

    def cost(optimizer, params, kind):
        asked.append((kind, len(jax.tree.leaves(params))))
        return ahead_of_time.Cost(8.5, 0.25, 10, 0)

    monkeypatch.setattr(ahead_of_time, "cost", cost)
    monkeypatch.setattr(peers, "installed", lambda peer: peer == "H100")
    rows = list(ahead_of_time.measure(1, False))
    optimizers = [
        (method, f"h100 {library}") for method in METHODS for library in METHODS[method].optimizers
    ]
    few = [row for row in optimizers if row[0] in ahead_of_time.QUICK]
    assert asked == [("h100", 148)] * len(optimizers) + [("h100", 2000)] * len(few)
    for figure, value in ("Bytes", 8.5), ("Temporary", 0.25), ("Kernels", 10):
        own = [row for row in rows if row.table.startswith(figure) and "GPT-2" in row.table]
        assert [(row.method, row.column) for row in own] == optimizers and {
            row.value for row in own
        } == {value}
    assert [
        (row.method, row.column)
        for row in rows
        if row.table.startswith("Kernels, tiny leaves (2000")
    ] == few
    assert {row.method: row.limit for row in rows if row.table.startswith("Bytes")}[
        "AGC, by unit"
    ] == 9
