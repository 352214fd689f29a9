"""The example on single examples: no one of them adds more than it may, what is spent is known, and
wrong labels harm less.
"""

import re

import jax
import jax.numpy as jnp
import matplotlib.colors
import matplotlib.image
import numpy as np
import per_example as example
import pytest
from dp_accounting import ComposedDpEvent, GaussianDpEvent
from dp_accounting.pld import PLDAccountant
from flax import nnx
from jax.flatten_util import ravel_pytree
from run_example import help_of, in_process
from scipy.stats import binom, norm

from optaxclip import per_example as clipping
from optaxclip._types import Context

NAMES = ["none", "limit 1", "median"]
NOISES = [0.5, 2.0, 16.0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    out = tmp_path_factory.mktemp("per_example") / "new" / "folder"
    tasks = {
        "labels": ("wrong labels", [0.0, 0.2, 0.4], NAMES),
        "private": ("noise", NOISES, NAMES[1:]),
    }
    return in_process(
        example, out, "--seeds", 4, "--steps", 300, TASKS=tasks, RATES=(0.3, 3.0)
    ), out


def test_every_row_is_saved(saved):
    results, out = saved
    assert results["options"] == {
        "seeds": 4,
        "seed": 0,
        "steps": 300,
        "out": str(out),
        "task": "both",
    }
    labels, private = (results["tasks"][task] for task in ("labels", "private"))
    assert [(row["clipping"], row["wrong labels"]) for row in labels] == [
        (n, w) for n in NAMES for w in (0.0, 0.2, 0.4)
    ]
    assert [(row["clipping"], row["noise"]) for row in private] == [
        (n, s) for n in NAMES[1:] for s in NOISES
    ]
    for row in labels + private:
        assert (
            len(row["accuracy"]) == 4
            and row["median"] == pytest.approx(np.median(row["accuracy"]))
            and row["rate"] in (0.3, 3.0)
        )
    assert all((row["clipped_share"] > 0.1) == (row["clipping"] != "none") for row in labels)


def test_wrong_labels_harm_less_if_each_example_is_clipped(saved):
    median = {
        (row["clipping"], row["wrong labels"]): row["median"] for row in saved[0]["tasks"]["labels"]
    }
    assert min(median[name, 0.0] for name in NAMES) > 0.9
    # there is a price where all labels are right
    assert median["none", 0.0] > median["median", 0.0]
    assert median["limit 1", 0.4] > median["none", 0.4] + 0.005
    assert median["median", 0.4] >= median["none", 0.4]


def test_noise_is_what_privacy_costs(saved):
    private = saved[0]["tasks"]["private"]
    for row in private:
        assert row["epsilon"] == pytest.approx(example.epsilon(row["noise"], 300))
    for name in NAMES[1:]:
        epsilons, medians = zip(
            *[(row["epsilon"], row["median"]) for row in private if row["clipping"] == name],
            strict=True,
        )
        assert epsilons[0] > epsilons[1] > epsilons[2] > 0
        assert medians[0] > 0.8 and medians[2] < medians[0] - 0.2


def test_the_median_clips_half(saved):
    for row in saved[0]["tasks"]["labels"]:
        if row["clipping"] == "median":
            assert row["clipped_share"] == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("name", [name for name in example.METHODS if name != "none"])
def test_no_example_adds_more_than_it_may(name):
    limit, rule, response, _ = example.METHODS[name]
    params = nnx.state(example.network(nnx.Rngs(1)))
    images = example.IMAGES[:40] * jnp.geomspace(1e-3, 1e6, 40)[:, None]
    threshold = rule(initial=limit, noise=0.0) if rule else limit
    grad = clipping.clipped_grad(example.loss, threshold, response=response, reduce="sum")
    one = jax.vmap(
        lambda mask: ravel_pytree(grad(params, images, example.LABELS[:40], mask=mask)[1])[0]
    )
    added = np.linalg.norm(np.asarray(jax.jit(one)(jnp.eye(40, dtype=bool)), np.float64), axis=1)
    assert added.max() <= limit * (1 + 1e-6) and np.sum(added > 0.95 * limit) > 5


def test_epsilon_is_that_of_the_gaussian_mechanism_where_all_examples_are_in_every_batch(
    monkeypatch,
):
    monkeypatch.setattr(example, "EXPECTED", len(example.TRAIN))
    for noise, steps in (4.0, 1), (4.0, 9), (30.0, 9):
        found, mu = example.epsilon(noise, steps), steps**0.5 / noise
        delta = norm.cdf(mu / 2 - found / mu) - np.exp(found) * norm.cdf(-mu / 2 - found / mu)
        assert delta == pytest.approx(example.DELTA, rel=0.01)


def test_epsilon_grows_with_the_steps_and_falls_with_smaller_batches(monkeypatch):
    spent = [example.epsilon(2.0, steps) for steps in (1, 10, 100)]
    assert 0 < spent[0] < spent[1] < spent[2]
    monkeypatch.setattr(example, "EXPECTED", example.EXPECTED / 4)
    assert example.epsilon(2.0, 100) < 0.5 * spent[2]


def test_sum_and_count_together_spend_what_is_accounted_for():
    both, alone = PLDAccountant(), PLDAccountant()
    # of halves, added or not
    parts = [
        GaussianDpEvent(example.beside_count(1.0)),
        GaussianDpEvent(2 * example.COUNT_NOISE),
    ]
    both.compose(ComposedDpEvent(parts), 5)
    alone.compose(GaussianDpEvent(1.0), 5)
    assert both.get_epsilon(1e-5) == pytest.approx(alone.get_epsilon(1e-5), rel=1e-3)
    assert example.beside_count(1.0) > 1


def test_the_median_divides_the_count_by_the_expected_size():
    rule = example.median(initial=2.0, noise=0.0)
    state = rule.init(1)
    sizes, counted = jnp.array([[1.0], [1.0], [1.0], [5.0]]), jnp.array([True, True, True, False])
    moved = rule.learn(sizes, counted, state, state, Context(jnp.zeros((), jnp.int32)))
    assert moved[0] == pytest.approx(2 * np.exp(-0.2 * 1.5 / example.EXPECTED), rel=1e-6)


def test_a_batch_has_room_for_what_is_drawn():
    assert (
        binom.sf(example.PADDED, len(example.TRAIN), example.EXPECTED / len(example.TRAIN)) < 1e-13
    )


def test_examples_are_split_and_no_test_image_is_trained_on():
    parts = example.TRAIN, example.VALID, example.TEST
    assert [len(part) for part in parts] == [1077, 360, 360]
    assert sorted(np.concatenate(parts)) == list(range(len(example.IMAGES)))
    assert example.IMAGES.max() == 16


def test_the_pictures_have_the_lines(saved):
    for task, names in ("labels", NAMES), ("private", NAMES[1:]):
        image = matplotlib.image.imread(saved[1] / f"{task}.png")[..., :3]
        for name in names:
            color = matplotlib.colors.to_rgb(example.METHODS[name][-1])
            assert np.sum(np.abs(image - color).max(axis=-1) < 0.02) > 500


def test_help_names_every_option(capsys):
    text = help_of(example, capsys)
    assert set(re.findall(r"--(\w+)", text)) == {"help", "seeds", "seed", "steps", "out", "task"}
    assert "{labels,private,both}" in text and "(default: 600)" in text
