"""The monitored runs explode without a clip and not with it, and what is logged of them are the
norms on both sides.
"""

import re

import jax
import matplotlib.colors
import matplotlib.image
import monitor_norms
import numpy as np
import optax
import pytest
from run_example import help_of, in_process
from test_docs import events

import optaxclip
from optaxclip import scopes

CLIPPED = {"value 1": "value_1", "leaf norm 2": "leaf_norm_2", "global norm 2": "global_norm_2"}
LEAVES = ["hidden/bias", "hidden/kernel", "output/bias", "output/kernel"]
ACCEPTED = {  # loss, and mean norm of both weights before and after clipping
    "value 1": [(65, 150), (150, 310), (9.5, 12)],
    "leaf norm 2": [(12, 45), (90, 160), (1.99, 2.01)],
    "global norm 2": [(1.3, 2.3), (13, 22), (1.1, 1.4)],
}


def curves(folder):
    """What the one file of events in a folder holds: step and value of each number."""
    (path,) = folder.iterdir()
    found = {}
    for event in events(path):
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return {tag: np.array(points).T for tag, points in found.items()}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    out = tmp_path_factory.mktemp("monitor") / "new" / "folder"
    saved = in_process(monitor_norms, out)
    return (
        saved,
        {name: curves(out / "events" / name.replace(" ", "_")) for name in saved["rows"]},
        out,
    )


@pytest.fixture(scope="module")
def begun():
    """First parameters of a run, and the rows of its first twenty steps."""
    return jax.device_get(jax.jit(lambda key: monitor_norms.start(20, key))(jax.random.key(5)))


def test_help_names_every_option(capsys):
    assert set(re.findall(r"--(\w+)", help_of(monitor_norms, capsys))) == {
        "help",
        "seeds",
        "seed",
        "steps",
        "epochs",
        "out",
    }


def test_it_saves_numbers_picture_and_events(full):
    saved, _, out = full
    assert {path.name for path in out.iterdir()} == {"results.json", "norms.png", "events"}
    assert {path.name for path in (out / "events").iterdir()} == {"none", *CLIPPED.values()}
    assert saved["options"] == {
        "seeds": 20,
        "seed": 0,
        "steps": None,
        "epochs": 50,
        "out": str(out),
    }
    assert list(saved["rows"]) == ["none", *CLIPPED]


def test_the_picture_shows_both_norms_and_what_is_between(full):
    pixels = matplotlib.image.imread(full[2] / "norms.png")[..., :3]
    for color, least in ("#D55E00", 5_000), ("#0072B2", 5_000), ("lightgray", 100_000):
        assert (np.abs(pixels - matplotlib.colors.to_rgb(color)).max(-1) < 0.01).sum() > least


def test_without_a_clip_every_run_is_nan_within_ten_steps(full):
    saved, logged, _ = full
    row = saved["rows"]["none"]
    assert row["nan_share"] == 1 and row["quartiles"]["loss"] == [None] * 3
    assert len(row["steps_before_nan"]) == 20 and max(row["steps_before_nan"]) < 10
    norms = logged["none"]["norm_before/hidden/kernel"][1]
    assert len(norms) < 10 and norms[-1] > 1e10
    for leaf in LEAVES:
        np.testing.assert_array_equal(
            logged["none"][f"norm_before/{leaf}"], logged["none"][f"norm_after/{leaf}"]
        )


@pytest.mark.parametrize("name", CLIPPED)
def test_with_a_clip_no_run_is_nan(full, name):
    row = full[0]["rows"][name]
    assert row["nan_share"] == 0 and row["steps_before_nan"] == [400] * 20


@pytest.mark.parametrize("name", CLIPPED)
def test_the_known_distribution(full, name):
    quartiles = full[0]["rows"][name]["quartiles"]
    sizes = [
        np.mean([quartiles[f"norm_{side}/{leaf}/kernel"][1] for leaf in ("hidden", "output")])
        for side in ("before", "after")
    ]
    for value, (low, high) in zip([quartiles["loss"][1], *sizes], ACCEPTED[name], strict=True):
        assert low <= value <= high


@pytest.mark.parametrize("name", CLIPPED)
def test_every_step_is_logged(full, name):
    logged = full[1][name]
    assert {f"norm_{side}/{leaf}" for side in ("before", "after") for leaf in LEAVES} | {
        "loss"
    } < set(logged)
    assert {"clip/limit", "clip/clipped_share", "clip/clipped_steps"} < set(logged)
    if name != "global norm 2":
        assert {
            f"clip/{number}/{leaf}" for number in ("limit", "clipped_share") for leaf in LEAVES
        } < set(logged)
    for tag, (steps, _) in logged.items():
        np.testing.assert_array_equal(steps, np.arange(1, 401), tag)


@pytest.mark.parametrize("name", CLIPPED)
def test_no_norm_is_larger_after_clipping(full, name):
    before, after = (
        np.array([full[1][name][f"norm_{side}/{leaf}"][1] for leaf in LEAVES])
        for side in ("before", "after")
    )
    assert (after <= before * (1 + 1e-6)).all()
    assert (after.sum(0) < 0.5 * before.sum(0)).all()


def test_each_clip_keeps_its_own_limit(full):
    after = {
        name: np.array([full[1][name][f"norm_after/{leaf}"][1] for leaf in LEAVES])
        for name in CLIPPED
    }
    assert after["leaf norm 2"].max() == pytest.approx(2, rel=1e-5)
    assert np.sqrt((after["global norm 2"] ** 2).sum(0)).max() == pytest.approx(2, rel=1e-5)
    numbers = np.array([[25], [500], [1], [25]])
    assert (after["value 1"] <= np.sqrt(numbers) * (1 + 1e-6)).all()
    assert (after["value 1"][1] > 10).all()  # a value clip's limit of 1 is none of norms


def test_a_limit_at_the_median_norm_learns_nothing(full, begun):
    logged = full[1]["leaf norm 2"]
    limits = {leaf: float(np.median(logged[f"norm_before/{leaf}"][1])) for leaf in LEAVES}
    clip = optaxclip.clip(limits, scope=scopes.group(lambda path: path))
    params, order = begun
    _, told = jax.jit(lambda *run: monitor_norms.train(clip, *run))(
        params, np.tile(order[:8], (50, 1))
    )
    np.testing.assert_allclose(told["loss"][-8:].mean(), np.var(monitor_norms.Y), rtol=0.05)


def test_norms_and_loss_are_those_of_plain_numpy(begun):
    params, order = begun
    _, told = jax.jit(lambda *run: monitor_norms.train(optaxclip.clip_by_value(1.0), *run))(
        params, order[:3]
    )
    gradient, traces = jax.jit(jax.grad(monitor_norms.mse)), [0.0] * 4
    leaves, treedef = jax.tree.flatten(params)
    for step, rows in enumerate(order[:3]):
        used = rows[rows >= 0]
        hidden_bias, hidden, output_bias, output = leaves
        predicted = (
            np.maximum(np.asarray(monitor_norms.X)[used] @ hidden + hidden_bias, 0) @ output
            + output_bias
        )
        errors = predicted - np.asarray(monitor_norms.Y)[used]
        np.testing.assert_allclose(told["loss"][step], np.mean(errors**2), rtol=1e-4)
        grads = jax.tree.leaves(jax.device_get(gradient(jax.tree.unflatten(treedef, leaves), rows)))
        np.testing.assert_allclose(grads[2], 2 * np.mean(errors, 0), rtol=1e-3)
        for leaf, grad in zip(LEAVES, grads, strict=True):
            np.testing.assert_allclose(
                told[f"norm_before/{leaf}"][step], np.linalg.norm(grad), rtol=1e-4
            )
            np.testing.assert_allclose(
                told[f"norm_after/{leaf}"][step], np.linalg.norm(np.clip(grad, -1, 1)), rtol=1e-4
            )
        traces = [
            0.8 * trace + np.clip(grad, -1, 1) for trace, grad in zip(traces, grads, strict=True)
        ]
        leaves = [leaf - 0.07 * trace for leaf, trace in zip(leaves, traces, strict=True)]


def test_filling_of_the_last_batch_does_not_count(begun):
    params, order = begun
    last = order[7]
    assert (last >= 0).sum() == 104
    loss = jax.jit(monitor_norms.mse)
    np.testing.assert_allclose(loss(params, last), loss(params, last[last >= 0]), rtol=1e-6)


def test_every_example_once_an_epoch_in_another_order(begun):
    _, order = begun
    assert order.shape == (20, 128)
    first, second = (rows[rows >= 0] for rows in (order[:8], order[8:16]))
    assert not np.array_equal(first, second)
    for rows in first, second:
        np.testing.assert_array_equal(np.sort(rows), np.arange(1000))


def test_it_stops_after_so_many_steps_and_replaces_old_events(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(monitor_norms, "CLIPS", {"none": (optax.identity(), np.nan, "nothing cut")})
    monitor_norms.write_events(tmp_path / "events" / "none", {"loss": np.ones((1, 5))})
    saved = in_process(monitor_norms, tmp_path, "--seeds", 2, "--steps", 3, "--seed", 3)
    assert saved["rows"]["none"]["steps_before_nan"] == [3, 3]
    assert curves(tmp_path / "events" / "none")["loss"].shape == (2, 3)
    assert str(tmp_path) in capsys.readouterr().out


def test_events_end_where_a_run_is_not_finite(tmp_path):
    monitor_norms.write_events(
        tmp_path, {"loss": np.array([[4.0, 2.0, np.inf, np.nan], [1.0, 1.0, 1.0, 1.0]])}
    )
    np.testing.assert_array_equal(curves(tmp_path)["loss"], [[1, 2], [4, 2]])
