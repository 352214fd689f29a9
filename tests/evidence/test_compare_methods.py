"""The comparison has every method, trains it in its place, and shows what it claims."""

import inspect
import re
from types import SimpleNamespace

import compare_methods
import jax
import jax.numpy as jnp
import matplotlib.colors
import matplotlib.image
import numpy as np
import optax
import pytest
from run_example import help_of, in_process

import optaxclip

SOURCE = inspect.getsource(compare_methods)
NOT_COMPARED = {
    "clip": "the rows are made of it",
    "skip_nonfinite": "clips nothing",
    "skip_spikes": "clips nothing",
    "clip_after": "needs a size of another tree",
    "keep_params": "limits weights",
    "max_norm": "limits weights",
    "qk_clip": "limits weights, by logits of attention",
    "clip_by_trust_ratio": "is relative to the weights, as clippy is",
}
TRANSFORMS = [
    name
    for name, function in inspect.getmembers(optaxclip, inspect.isfunction)
    if "GradientTransformation" in str(inspect.signature(function).return_annotation)
    and name not in NOT_COMPARED
]
SUBSET = ["none", "clip_by_norm(1.0)", "zclip()"]
KEYS = {
    "clips",
    "loss",
    "median_loss",
    "quartiles_loss",
    "failed_share",
    "nan_share",
    "clipped_share",
    "state_bytes",
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_public_transform_is_compared(name):
    assert name in re.findall(r"\w+", " ".join(compare_methods.METHODS))


def test_there_are_public_transforms():
    assert {"clip_by_value", "error_feedback", "zclip"} < set(TRANSFORMS)


@pytest.mark.parametrize("name", [name for name in compare_methods.METHODS if "(" in name])
def test_a_name_is_the_code_that_is_run(name):
    (lines,) = re.findall(rf'^    "{re.escape(name)}": (.*?)(?=^    "|^}})', SOURCE, re.M | re.S)
    assert name in re.sub(r"optaxclip\.|thresholds\.", "", lines)


def test_help_names_every_option(capsys):
    text = help_of(compare_methods, capsys)
    assert set(re.findall(r"--(\w+)", text)) == {"help", "seeds", "seed", "steps", "out", "task"}
    assert "{rnn,mlp,both}" in text


def run(names, out, *options):
    return in_process(
        compare_methods,
        out,
        *options,
        METHODS={name: compare_methods.METHODS[name] for name in names},
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "new" / "folder"
    return run(SUBSET, out, "--seeds", 4, "--steps", 300), out


def test_every_row_is_saved(both):
    saved, out = both
    assert saved["options"] == {
        "seeds": 4,
        "seed": 0,
        "steps": 300,
        "out": str(out),
        "task": "both",
    }
    assert list(saved["tasks"]) == ["rnn", "mlp"]
    for rows in saved["tasks"].values():
        assert list(rows) == SUBSET
        for row in rows.values():
            assert set(row) == KEYS
            assert len(row["loss"]) == 4


def test_without_clipping_no_seed_solves_a_task(both):
    rnn, mlp = (rows["none"] for rows in both[0]["tasks"].values())
    assert rnn["failed_share"] == mlp["failed_share"] == 1
    assert rnn["nan_share"] == 0 and min(rnn["loss"]) > 1
    assert mlp["nan_share"] == 1 and mlp["loss"] == [None] * 4 and mlp["median_loss"] is None
    assert rnn["clipped_share"] is None and rnn["state_bytes"] == 0


def test_a_fixed_norm_solves_both_tasks(both):
    rnn, mlp = (rows["clip_by_norm(1.0)"] for rows in both[0]["tasks"].values())
    assert rnn["failed_share"] <= 0.25 and rnn["median_loss"] < 0.1
    assert (
        mlp["failed_share"] == 0
        and mlp["nan_share"] == 0
        and max(mlp["loss"]) < compare_methods.TASKS["mlp"].solved
    )
    assert 0 < rnn["clipped_share"] < 0.6 and mlp["clipped_share"] == 1


def test_a_long_warm_up_comes_too_late(both):
    rnn, mlp = (rows["zclip()"] for rows in both[0]["tasks"].values())
    assert mlp["nan_share"] == 1 and mlp["clipped_share"] == 0
    assert rnn["nan_share"] == 0 and rnn["failed_share"] >= 0.5


@pytest.mark.parametrize("task", ["rnn", "mlp"])
def test_the_picture_has_both_lines(both, task):
    image = matplotlib.image.imread(both[1] / f"{task}.png")[..., :3]
    assert min(image.shape[:2]) > 400
    for color in "#E69F00", "#0072B2":
        assert np.sum(np.abs(image - matplotlib.colors.to_rgb(color)).max(axis=-1) < 0.02) > 500


def test_one_task_alone(tmp_path, capsys):
    saved = run(["clip_by_value(5.0)"], tmp_path, "--task", "mlp", "--seeds", 2, "--steps", 5)
    printed = capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "mlp.png"}
    assert (
        list(saved["tasks"]) == ["mlp"]
        and saved["tasks"]["mlp"]["clip_by_value(5.0)"]["clipped_share"] == 1
    )
    assert printed.count("\nclip_by_value(5.0) ") == 1 and str(tmp_path) in printed


BOWL = compare_methods.Task(
    title="Bowl",
    start=lambda key: jnp.array([4.0, 3.0]),
    batch=lambda key: (jnp.zeros(()), jnp.zeros(())),
    loss=lambda params, x, y: jnp.sum(params**2) / 2,  # its gradient is the parameters
    test=(jnp.zeros(()), jnp.zeros(())),
    solved=2.0,
    steps=3,
    momentum=0.5,
    rate=0.25,
    norms=(0.1, 10),
)


def by_hand(clips, limit, steps=3):
    """SGD in NumPy, with a norm clip somewhere in it."""
    params, trace, norms = np.array([4.0, 3.0]), np.zeros(2), []

    def clip(name, x):
        if name != clips:
            return x
        size = np.linalg.norm(x)
        norms.append((size, min(size, limit)))
        return x * min(1, limit / size)

    for _ in range(steps):
        trace = clip("gradient", params) + 0.5 * trace
        params = params + clip("step", -0.25 * clip("update", trace))
    return params, np.array(norms).T


@pytest.mark.parametrize(("clips", "limit"), [("gradient", 4.0), ("update", 4.5), ("step", 1.2)])
def test_a_method_clips_what_it_says(clips, limit):
    start, bar = jnp.array([[4.0, 3.0]]), SimpleNamespace(update=lambda: None)

    def batches(steps):
        return jnp.zeros((1, len(steps))), jnp.zeros((1, len(steps)))

    params, state, *norms, limits = compare_methods.train(
        BOWL, clips, optaxclip.clip(limit, optaxclip.scopes.tree()), start, batches, bar
    )
    expected, sizes = by_hand(clips, limit)
    np.testing.assert_allclose(params[0], expected, rtol=1e-6)
    np.testing.assert_allclose([norm[0] for norm in norms], sizes, rtol=1e-6)
    np.testing.assert_allclose(limits[0], limit, rtol=1e-6)
    assert state.reading.clipped_steps[0] == np.sum(sizes[0] > limit) > 0


def test_a_limit_is_drawn_where_it_is_the_only_one():
    tree = [jnp.ones(2), jnp.ones(3)]
    for clip, limit in {
        optaxclip.clip_by_global_norm(1.5): 1.5,
        optaxclip.clip_by_norm(1.5): np.nan,  # two
        optaxclip.zclip(): np.nan,  # none yet
        optax.identity(): np.nan,
    }.items():
        np.testing.assert_equal(
            float(compare_methods.only_limit(clip.update(tree, clip.init(tree), tree)[1])), limit
        )


def compared(monkeypatch, rows, task=BOWL):
    monkeypatch.setattr(compare_methods, "METHODS", rows)
    bar = SimpleNamespace(
        update=lambda: None, write=lambda line: None, set_description=lambda text: None
    )
    return compare_methods.compare(task, jax.random.split(jax.random.key(0), 2), bar)[0]


def test_instead_is_in_place_of_momentum_and_learning_rate(monkeypatch):
    rows = compared(monkeypatch, {"all": ("instead", optax.scale(-1.0))}, BOWL._replace(steps=1))
    assert rows["all"]["median_loss"] == 0 and rows["all"]["failed_share"] == 0


def test_of_several_clips_that_which_clipped_most_counts(monkeypatch):
    rows = compared(
        monkeypatch,
        {
            "two": (
                "gradient",
                optax.chain(
                    optaxclip.clip(4.5, optaxclip.scopes.tree()),
                    optaxclip.clip(1e9, optaxclip.scopes.tree()),
                ),
            )
        },
    )
    _, (sizes, _) = by_hand("gradient", 4.5)
    assert (
        rows["two"]["clipped_share"] == pytest.approx(np.mean(sizes > 4.5))
        and 0 < np.mean(sizes > 4.5) < 1
    )


def test_failed_is_what_ends_at_nan_or_not_below_the_threshold(monkeypatch):
    still = {"still": ("gradient", optax.identity())}
    for start, rate, failed, nan in (
        ([1.0, 1.0], 0.0, 0, 0),
        ([2.0, 0.0], 0.0, 1, 0),
        ([1.0, 1.0], np.nan, 1, 1),
    ):
        task = BOWL._replace(start=lambda key, start=start: jnp.array(start), rate=rate)
        row = compared(monkeypatch, still, task)["still"]
        assert (row["failed_share"], row["nan_share"]) == (failed, nan)
