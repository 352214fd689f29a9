"""The examples run, save what they say, and show what they claim."""

import importlib
import json
import sys

import jax
import numpy as np
import optax
import pytest
from run_example import EXAMPLES, as_script

ROWS = [
    "none",
    "leaf norm 1",
    "global norm 1",
    "value 5",
    "leaf norm 1, value 5",
    "adaptive 0.01",
    "adaptive 0.1",
]
ACCEPTED = {"leaf norm 1": (13, 18.5), "global norm 1": (15, 25), "value 5": (28, 90)}
PNG = b"\x89PNG\r\n\x1a\n"


def results(out, *pictures):
    for picture in pictures:
        assert (out / picture).read_bytes().startswith(PNG)
        assert (out / picture).stat().st_size > 10_000
    assert {path.name for path in out.iterdir()} == {"results.json", *pictures}
    return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize("name", ["mlp_regression", "sweep_thresholds"])
def test_help_names_every_option(name):
    text = as_script(name, "--help")
    assert all(f"--{option}" in text for option in ("seeds", "seed", "epochs", "steps", "out"))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    out = tmp_path_factory.mktemp("mlp") / "new" / "folder"
    return (
        as_script("mlp_regression", "--out", out),
        results(out, "learning_curves.png", "gradient_norms.png"),
        out,
    )


def test_mlp_saves_every_row_and_says_where(full):
    stdout, saved, out = full
    assert list(saved["rows"]) == ROWS
    assert saved["options"] == {
        "seeds": 20,
        "seed": 0,
        "epochs": 100,
        "steps": None,
        "out": str(out),
        "optimizer": "sgd",
    }
    keys = {
        "median_train_mse",
        "median_test_mse",
        "quartiles_test_mse",
        "nan_share",
        "first_nonfinite_step",
        "train_mse",
        "test_mse",
    }
    for name, row in saved["rows"].items():
        assert set(row) == keys
        assert (
            len(row["test_mse"]) == len(row["train_mse"]) == len(row["first_nonfinite_step"]) == 20
        )
        assert stdout.count(f"\n{name:22}") == 1
    assert str(out) in stdout


def test_mlp_is_nan_within_ten_steps_without_clipping_and_never_with_it(full):
    rows = full[1]["rows"]
    assert rows["none"]["nan_share"] == 1 and rows["none"]["median_test_mse"] is None
    assert max(rows["none"]["first_nonfinite_step"]) <= 10
    for name in ROWS[1:]:
        assert rows[name]["nan_share"] == 0
        assert rows[name]["first_nonfinite_step"] == [None] * 20


@pytest.mark.parametrize("name", ACCEPTED)
def test_mlp_reproduces_the_known_distribution(full, name):
    row = full[1]["rows"][name]
    low, high = ACCEPTED[name]
    assert low <= row["median_test_mse"] <= high
    assert row["median_test_mse"] == pytest.approx(np.median(row["test_mse"]))
    assert row["quartiles_test_mse"] == [np.sort(row["test_mse"])[4], np.sort(row["test_mse"])[15]]


def test_mlp_value_clip_after_a_smaller_norm_clip_does_nothing(full):
    rows = full[1]["rows"]
    np.testing.assert_allclose(
        rows["leaf norm 1, value 5"]["test_mse"], rows["leaf norm 1"]["test_mse"], rtol=1e-3
    )


@pytest.fixture
def mlp(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("mlp_regression")


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_mlp_stops_after_so_many_steps_with_any_optimizer(
    mlp, monkeypatch, tmp_path, capsys, optimizer
):
    monkeypatch.setattr(mlp, "CLIPS", {"value 5": mlp.CLIPS["value 5"]})
    options = [
        "--seeds",
        "2",
        "--steps",
        "18",
        "--optimizer",
        optimizer,
        "--seed",
        "3",
        "--out",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr(sys, "argv", ["mlp_regression.py", *options])
    mlp.main()
    saved = results(tmp_path / "out", "learning_curves.png", "gradient_norms.png")
    assert saved["options"]["steps"] == 18 and saved["options"]["optimizer"] == optimizer
    assert saved["rows"]["value 5"]["nan_share"] == 0
    assert str(tmp_path / "out") in capsys.readouterr().out


def test_mlp_trains_on_every_example_once_an_epoch(mlp, monkeypatch):
    seen = []
    monkeypatch.setattr(
        mlp, "mse", lambda params, x, y, where=None: (seen.append((x, where)), params.sum())[1]
    )
    optimizer = mlp.with_norms(optax.identity(), optax.sgd(0.01))
    params = np.ones(1, np.float32)
    with jax.disable_jit():
        mlp.train_epoch(optimizer, (params, optimizer.init(params), jax.random.key(0)), 16)
    batches = [np.asarray(x)[np.asarray(where)[:, 0]] for x, where in seen if where is not None]
    assert [len(batch) for batch in batches] == [32] * 15 + [20]
    trained, available = np.concatenate(batches), np.asarray(mlp.TRAIN[0])
    np.testing.assert_array_equal(
        trained[np.argsort(trained[:, 0])], available[np.argsort(available[:, 0])]
    )


def test_sweep_fails_at_both_ends_of_every_kind(tmp_path):
    stdout = as_script("sweep_thresholds", "--seeds", 2, "--epochs", 15, "--out", tmp_path / "out")
    saved = results(tmp_path / "out", "sweep.png")
    assert set(saved) == {"options", "thresholds", "target_variance", "kinds"}
    assert list(saved["kinds"]) == ["leaf norm", "global norm", "value"]
    assert all(kind in stdout for kind in saved["kinds"])
    thresholds, useless = np.array(saved["thresholds"]), 0.9 * saved["target_variance"]
    for row in saved["kinds"].values():
        assert set(row) == {"median_test_mse", "quartiles_test_mse", "nan_share"}
        median = np.array(row["median_test_mse"], float)  # null becomes NaN
        assert median[0] > useless and row["nan_share"][0] == 0  # so tight that nothing is learned
        assert median[thresholds == 1] < 0.5 * useless
        assert row["nan_share"][-1] == 1 and np.isnan(median[-1])
        assert not np.any(np.array(row["nan_share"])[thresholds < 1e4])


def test_quartiles_count_nan_as_the_worst(mlp):
    values = np.array([[4.0, 1.0], [np.nan, np.nan], [3.0, np.nan], [1.0, np.nan], [2.0, 2.0]])
    np.testing.assert_equal(mlp.quartiles(values), ([2.0, 2.0], [3.0, np.nan], [4.0, np.nan]))
