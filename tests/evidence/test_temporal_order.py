"""The temporal order task is what it says, each run is trained on its own, and clipping decides."""

import json
import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
import temporal_order
from flax import nnx
from run_example import as_script

KEYS = {"accuracy", "solved", "nonfinite", "largest_norm", "quartiles_norm", "clipped_share"}
LABELS = {"rnn": ["1", "5", "none"], "lstm": ["0.25", "1", "none"]}
CLASSES = {(0, 0): 0, (0, 1): 1, (1, 0): 2, (1, 1): 3}


@pytest.mark.parametrize(
    ("length", "first", "second"),
    [
        (10, {1}, {4}),
        (20, {2, 3}, {8, 9}),
        (25, {2, 3, 4}, {10, 11}),
        (30, {3, 4, 5}, {12, 13, 14}),
    ],
)
def test_two_marks_are_in_their_tenths_and_the_class_is_their_order(length, first, second):
    x, y = temporal_order.sequences(np.random.default_rng(0), (40, 100), length)
    assert x.shape == (40, 100, length) and y.shape == (40, 100)
    seen = []
    for row, label in zip(x.reshape(-1, length), y.ravel(), strict=True):
        places = [place for place, symbol in enumerate(row) if symbol in (0, 1)]
        assert len(places) == 2 and places[0] in first and places[1] in second
        assert label == CLASSES[tuple(row[places])]
        seen.append(places)
    assert {place for place, _ in seen} == first and {place for _, place in seen} == second


def test_all_classes_and_all_distractors_are_as_frequent():
    x, y = temporal_order.sequences(np.random.default_rng(1), (20_000,), 20)
    np.testing.assert_allclose(np.bincount(y) / len(y), [1 / 4] * 4, atol=0.02)
    for place in set(range(20)) - {2, 3, 8, 9}:
        np.testing.assert_allclose(
            np.bincount(x[:, place], minlength=6) / len(x), [0, 0, *[1 / 4] * 4], atol=0.02
        )
    for place in 2, 3, 8, 9:
        np.testing.assert_allclose(
            np.bincount(x[:, place], minlength=6) / len(x), [1 / 4] * 2 + [1 / 8] * 4, atol=0.02
        )


def test_a_mark_says_nothing_of_the_other_nor_of_the_distractors():
    x, y = temporal_order.sequences(np.random.default_rng(2), (20_000,), 10)
    together = np.corrcoef(np.delete(x, [1, 4], axis=1).T, np.stack([y // 2, y % 2]))
    assert np.abs(together - np.eye(len(together))).max() < 0.04


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(name, model, x):
    """Logits in NumPy, from the formulas of the cells."""
    cell, hidden = model.rnn.cell, np.zeros((len(x), 32))
    weights, bias, memory = (
        np.asarray(cell.dense_i.kernel[...]),
        (cell.dense_i if name == "rnn" else cell.dense_h).bias,
        hidden,
    )
    for symbol in x.T:
        total = (
            weights[symbol] + hidden @ np.asarray(cell.dense_h.kernel[...]) + np.asarray(bias[...])
        )
        if name == "rnn":
            hidden = np.tanh(total)
        else:
            write, keep, new, show = np.split(total, 4, axis=1)
            memory = sigmoid(keep) * memory + sigmoid(write) * np.tanh(new)
            hidden = sigmoid(show) * np.tanh(memory)
    return hidden @ np.asarray(model.out.kernel[...]) + np.asarray(model.out.bias[...])


@pytest.mark.parametrize("name", temporal_order.CELLS)
def test_the_network_is_the_cell_of_the_papers(name):
    model = temporal_order.Reader(temporal_order.CELLS[name][0], nnx.Rngs(3))
    x, _ = temporal_order.sequences(np.random.default_rng(3), (5,), 20)
    np.testing.assert_allclose(model(jnp.asarray(x)), by_hand(name, model, x), atol=1e-5)
    assert np.std(model.rnn.cell.dense_i.kernel[...]) == pytest.approx(0.3, rel=0.15)
    assert np.std(model.rnn.cell.dense_h.kernel[...]) == pytest.approx(32**-0.5, rel=0.1)


def test_every_run_is_as_if_trained_alone(monkeypatch):
    monkeypatch.setattr(temporal_order, "CHUNK", 5)
    # a few steps, before chaos
    rng, keys, rate = (
        np.random.default_rng(4),
        jax.random.split(jax.random.key(5), 2),
        0.5,
    )
    x, y, *test = (
        *temporal_order.sequences(rng, (8, 2, 32), 10),
        *temporal_order.sequences(rng, (2, 500), 10),
    )
    rows = temporal_order.train(
        "rnn", rate, keys, (x, y, *test), SimpleNamespace(update=lambda: None)
    )
    graphdef, starts = nnx.split(temporal_order.Reader(nnx.SimpleCell, nnx.Rngs(keys[0])))
    starts = [starts, nnx.split(temporal_order.Reader(nnx.SimpleCell, nnx.Rngs(keys[1])))[1]]

    def loss(params, x, y):
        return -jnp.mean(jax.nn.log_softmax(nnx.merge(graphdef, params)(x))[jnp.arange(len(y)), y])

    gradient = jax.jit(jax.grad(loss))
    for label, threshold in ("1", 1.0), ("5", 5.0), ("none", np.inf):
        assert set(rows[label]) == KEYS
        norms = np.zeros((2, 8))
        for seed, params in enumerate(starts):
            for i in range(8):
                grads = gradient(params, x[i, seed], y[i, seed])
                norms[seed, i] = np.sqrt(
                    sum(np.sum(np.asarray(leaf) ** 2) for leaf in jax.tree.leaves(grads))
                )
                scale = rate * min(1, threshold / norms[seed, i])
                params = jax.tree.map(lambda p, g, scale=scale: p - scale * g, params, grads)
            guess = np.asarray(nnx.merge(graphdef, params)(jnp.asarray(test[0][seed]))).argmax(
                axis=-1
            )
            assert rows[label]["accuracy"][seed] == pytest.approx(
                np.mean(guess == test[1][seed]), abs=0.02
            )
        np.testing.assert_allclose(rows[label]["largest_norm"], norms.max(1), rtol=1e-3)
        np.testing.assert_allclose(
            rows[label]["clipped_share"], (norms > threshold).mean(1), atol=1e-6
        )
        low, median, high = rows[label]["quartiles_norm"]
        np.testing.assert_allclose(
            [low, median, high], [norms.min(0), norms.mean(0), norms.max(0)], rtol=1e-3
        )
    assert 0 < rows["1"]["clipped_share"].mean() < 1


run = partial(as_script, "temporal_order")


def test_help_names_every_option():
    text = run("--help")
    assert set(re.findall(r"--([\w-]+)", text)) == {
        "help",
        "seeds",
        "seed",
        "steps",
        "out",
        "cell",
        "lengths",
        "learning-rate",
    }
    assert "{rnn,lstm,both}" in text and "default: 800" in text and "default: 12" in text


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    out = tmp_path_factory.mktemp("order") / "new" / "folder"
    stdout = run("--out", out, "--seeds", 5, "--lengths", 10, 20)
    assert {path.name for path in out.iterdir()} == {"results.json", "success.png"} and str(
        out
    ) in stdout
    return stdout, json.loads((out / "results.json").read_text()), out


def rows_of(saved):
    for name, lengths in saved["cells"].items():
        for length, rows in lengths.items():
            for label, row in rows.items():
                yield (name, length, label), row


def test_every_row_is_saved(both):
    _, saved, out = both
    options = {
        "seeds": 5,
        "seed": 0,
        "steps": 800,
        "out": str(out),
        "cell": "both",
        "lengths": [10, 20],
        "learning_rate": None,
    }
    assert saved["options"] == options
    assert [place for place, _ in rows_of(saved)] == [
        (n, t, label) for n in LABELS for t in ("10", "20") for label in LABELS[n]
    ]
    for _, row in rows_of(saved):
        assert set(row) == KEYS and all(len(row[key]) == 5 for key in KEYS - {"quartiles_norm"})
        assert row["solved"] == [accuracy > 0.95 for accuracy in row["accuracy"]]
        assert np.shape(row["quartiles_norm"]) == (3, 800) and np.all(
            np.diff(row["quartiles_norm"], axis=0) >= 0
        )
        assert max(row["largest_norm"]) >= np.max(row["quartiles_norm"])


def test_the_table_is_what_is_saved(both):
    lines = [re.sub(r" of +", "/", line).split() for line in both[0].splitlines()]
    for (name, length, label), row in rows_of(both[1]):
        (line,) = [line for line in lines if line[:3] == [name, length, label]]
        assert line[3] == f"{sum(row['solved'])}/5" and line[5] == f"{sum(row['nonfinite'])}/5"
        assert float(line[4]) == pytest.approx(np.median(row["accuracy"]), abs=0.006)
        assert float(line[6].rstrip("%")) == pytest.approx(
            100 * np.mean(row["clipped_share"]), abs=0.06
        )
        assert float(line[7]) == pytest.approx(np.median(row["largest_norm"]), rel=0.01)


def test_clipping_decides_at_length_20_and_not_at_length_10(both):
    solved = {place: sum(row["solved"]) for place, row in rows_of(both[1])}
    assert all(count >= 4 for (_, length, _), count in solved.items() if length == "10")
    assert solved["rnn", "20", "1"] >= 4 and solved["lstm", "20", "0.25"] >= 4
    assert solved["rnn", "20", "none"] == 0 and solved["rnn", "20", "5"] <= 1
    assert solved["lstm", "20", "none"] <= 2


def test_no_run_is_ever_lost_to_nan_and_the_clip_acts_on_the_hill(both):
    for (_, length, label), row in rows_of(both[1]):
        assert not any(row["nonfinite"])
        if label == "none":
            assert not any(row["clipped_share"])
        elif (length, label) in (("20", "1"), ("20", "0.25")):
            assert max(row["largest_norm"]) > 2 * float(label) and 0 < max(row["clipped_share"]) < 1


def test_runs_start_equal_whatever_the_threshold(both):
    for lengths in both[1]["cells"].values():
        for rows in lengths.values():
            first = [np.array(row["quartiles_norm"])[:, 0] for row in rows.values()]
            np.testing.assert_array_equal(first, [first[0]] * 3)
            assert (
                rows["none"]["accuracy"] != next(iter(rows.values()))["accuracy"]
                or rows["none"]["solved"] == [True] * 5
            )


def test_the_picture_has_every_line(both):
    image = matplotlib.image.imread(both[2] / "success.png")[..., :3]
    assert min(image.shape[:2]) > 800
    for color in temporal_order.COLORS.values():
        assert np.sum(np.abs(image - matplotlib.colors.to_rgb(color)).max(axis=-1) < 0.02) > 500


def test_one_cell_at_a_rate_that_breaks_it_is_counted_and_has_failed(tmp_path):
    stdout = run(
        "--out",
        tmp_path,
        "--cell",
        "rnn",
        "--lengths",
        10,
        "--seeds",
        2,
        "--steps",
        3,
        "--learning-rate",
        3e38,
    )
    saved = json.loads((tmp_path / "results.json").read_text())
    assert list(saved["cells"]) == ["rnn"] and saved["options"]["learning_rate"] == 3e38
    row = saved["cells"]["rnn"]["10"]["none"]
    assert (
        row["nonfinite"] == [True] * 2
        and row["solved"] == [False] * 2
        and row["largest_norm"] == [None] * 2
    )
    assert re.search(r"none\s+0 of 2 .* 2 of 2", stdout)
