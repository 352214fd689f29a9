"""The LSTM on digits learns with both APIs of Flax, clipped or not, from any file of images."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import lstm_digits
import matplotlib.image
import numpy as np
import pytest
from run_example import help_of, in_process

import optaxclip

SUBSETS = {"nnx": ["none", "global norm 1", "Graves 1/32"], "linen": ["Graves 1/32"]}


def run(names, out, *options):
    return in_process(
        lstm_digits, out, *options, CLIPS={name: lstm_digits.CLIPS[name] for name in names}
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    out = tmp_path_factory.mktemp("lstm") / "new" / "folder"
    saved = {
        api: run(names, out / api, "--api", api, "--seeds", 3, "--steps", 300)
        for api, names in SUBSETS.items()
    }
    return saved, out


def test_every_row_is_saved(both):
    saved, out = both
    for api, results in saved.items():
        options = {
            "seeds": 3,
            "seed": 0,
            "steps": 300,
            "out": str(out / api),
            "api": api,
            "data": None,
        }
        assert results["options"] == options
        assert list(results["rows"]) == SUBSETS[api]
        for row in results["rows"].values():
            assert len(row["accuracy"]) == 3
            assert row["median"] == np.median(row["accuracy"])


def test_it_learns_with_both_apis_and_clipping_changes_nothing(both):
    medians = {
        (api, name): row["median"] for api in both[0] for name, row in both[0][api]["rows"].items()
    }
    assert min(medians.values()) > 0.7
    assert (
        both[0]["nnx"]["rows"]["Graves 1/32"]["accuracy"]
        != both[0]["linen"]["rows"]["Graves 1/32"]["accuracy"]
    )
    # among them runs of different weights
    assert max(medians.values()) - min(medians.values()) < 0.12


def test_norms_are_those_before_and_after_the_clip(both):
    rows = both[0]["nnx"]["rows"]
    before, after = rows["global norm 1"]["largest_norms"]
    assert (
        before > 1.5
        and 0.999 < after <= 1.000001
        and 0.2 < rows["global norm 1"]["clipped_share"] < 0.9
    )
    for name in "none", "Graves 1/32":  # what Graves clips is clipped before it is a gradient
        before, after = rows[name]["largest_norms"]
        assert before == pytest.approx(after, rel=1e-5) and rows[name]["clipped_share"] == 0
    assert rows["Graves 1/32"]["accuracy"] != rows["none"]["accuracy"]
    assert rows["Graves 1/32"]["largest_norms"][0] < rows["none"]["largest_norms"][0]


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_both_networks_have_the_clipped_activations(api):
    images = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 8)))
    for limit, moving in (
        (0.0, 2),
        (1.0, 5 if api == "nnx" else 14),
    ):  # kernel and bias of the head, or all parameters
        init, apply = lstm_digits.network(
            api, 8, partial(optaxclip.clip_activation_grad, limit=limit)
        )
        grads = jax.jit(jax.grad(lambda params: apply(params, images).sum()))(
            init(jax.random.key(0))
        )
        assert sum(bool(leaf.any()) for leaf in jax.tree.leaves(grads)) == moving


def test_the_picture_has_the_lines(both):
    image = matplotlib.image.imread(both[1] / "nnx" / "lstm_digits.png")[..., :3]
    assert min(image.shape[:2]) > 400
    for color in "#000000", "#E69F00", "#009E73":
        wanted = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert np.sum(np.abs(image - wanted).max(axis=-1) < 0.02) > 500


@pytest.fixture
def images(tmp_path):
    """A file like mnist.npz: images of 5 rows and 7 columns, which differ by their brightest
    column.
    """
    random = np.random.default_rng(0)
    parts = {}
    for part, count in ("train", 200), ("test", 59):
        labels = random.integers(0, 7, count).astype(np.uint8)
        pixels = random.integers(0, 100, (count, 5, 7)).astype(np.uint8)
        pixels[np.arange(count), :, labels] = 200
        parts |= {f"x_{part}": pixels, f"y_{part}": labels}
    parts["x_train"][0, 0, 0] = 250
    np.savez(tmp_path / "images.npz", **parts)
    return tmp_path / "images.npz", parts


def test_a_file_of_images(images, tmp_path, capsys):
    path, parts = images
    x, x_test, y, y_test = map(np.asarray, lstm_digits.load(str(path)))
    assert x.dtype == x_test.dtype == np.float32
    np.testing.assert_allclose(x, parts["x_train"] / 250, rtol=1e-6)
    # by what the training images say
    np.testing.assert_allclose(x_test, parts["x_test"] / 250, rtol=1e-6)
    np.testing.assert_array_equal(y, parts["y_train"])
    np.testing.assert_array_equal(y_test, parts["y_test"])
    saved = run(["value 1"], tmp_path / "out", "--data", path, "--seeds", 2, "--steps", 200)
    accuracies = np.array(saved["rows"]["value 1"]["accuracy"])
    assert saved["options"]["data"] == str(path) and accuracies.min() > 0.7
    # a share of its 59 images
    np.testing.assert_allclose(59 * accuracies, np.round(59 * accuracies), atol=1e-3)
    printed = capsys.readouterr().out
    assert printed.count("\nvalue 1 ") == 1 and str(tmp_path / "out") in printed


def test_digits_are_split_four_to_one():
    x, x_test, y, y_test = lstm_digits.load(None)
    assert (
        x.shape == (1437, 8, 8)
        and x_test.shape == (360, 8, 8)
        and len(y) == 1437
        and len(y_test) == 360
    )
    assert x.max() == x_test.max() == 1 and set(np.asarray(y)) == set(np.asarray(y_test)) == set(
        range(10)
    )
    rows = {image.tobytes() for image in np.asarray(x)}
    assert not any(image.tobytes() in rows for image in np.asarray(x_test))


def test_help_names_every_option(capsys):
    text = help_of(lstm_digits, capsys)
    assert set(re.findall(r"--(\w+)", text)) == {
        "help",
        "seeds",
        "seed",
        "steps",
        "out",
        "api",
        "data",
    }
    assert "{nnx,linen}" in text and "(default: 16)" in text and "(default: 1000)" in text
