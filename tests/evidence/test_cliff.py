"""The cliff: the loss, its steps and its claims, against NumPy."""

import cliff
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from run_example import as_script, help_of, in_process

import optaxclip


def by_hand(w, b):
    h = 0.5
    for _ in range(50):
        h = 1 / (1 + np.exp(-(w * h + b)))
    return (h - 0.7) ** 2


@pytest.mark.parametrize("point", [(3.3, -1.5), (4.0, -2.0), (6.5, -1.5), (3.5, -3.3)])
def test_the_loss_and_its_derivative_are_those_of_the_recurrence(point):
    w, b = point
    assert cliff.loss(jnp.array(point)) == pytest.approx(by_hand(w, b), abs=1e-6)
    slope = np.array(
        [by_hand(w + e, b + f) - by_hand(w - e, b - f) for e, f in [(1e-6, 0), (0, 1e-6)]]
    )
    expected = slope / 2e-6
    np.testing.assert_allclose(jax.grad(cliff.loss)(jnp.array(point)), expected, rtol=1e-3)


def test_a_path_is_plain_gradient_descent():
    start, limit, rate = np.array([6.0, -2.5]), 0.05, 0.5
    path = cliff.descend(optaxclip.clip_by_global_norm(limit), jnp.array(start), rate, 10)
    point = start
    for k in range(10):
        np.testing.assert_allclose(path.points[k], point, atol=1e-4)
        slope = np.asarray(jax.grad(cliff.loss)(jnp.array(point)), np.float64)
        step = rate * slope * min(1, limit / np.linalg.norm(slope))
        assert path.lengths[k] == pytest.approx(np.linalg.norm(step), rel=1e-3)
        point = point - step


@pytest.mark.parametrize(("seed", "rate"), [(0, 0.5), (1, 0.4), (2, 0.6)])
def test_the_clip_arrives_from_everywhere_and_no_clip_does_not(seed, rate):
    """Other starts and rates than the table's."""
    low, high = np.transpose([cliff.W, cliff.B])
    starts = np.random.default_rng(seed).uniform(low, high, (100, 2)).astype(np.float32)

    def reached(clip):
        run = jax.jit(jax.vmap(lambda start: cliff.descend(clip, start, rate, 2000)))
        path = run(starts)
        return int((path.losses.min(1) < cliff.ARRIVED).sum()), float(path.lengths.max())

    clipped, longest = reached(optaxclip.clip_by_global_norm(0.2))
    assert clipped == 100 and longest <= 0.2 * rate * (1 + 1e-5)
    plain, longest = reached(optax.identity())
    assert plain < 95 and longest > 10


def test_the_script_prints_its_table_and_draws_both_pictures(tmp_path):
    lines = as_script("cliff", "--out", tmp_path).splitlines()
    table = [line.replace("norm", "").split() for line in lines]
    assert table[1][:2] == ["none", "77.8"] and float(table[1][4]) > 0.05
    assert table[2][:2] == ["clip", "0.1"] and float(table[2][4]) < cliff.ARRIVED
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "light.png", "dark.png"}


def test_options(tmp_path, capsys):
    text = help_of(cliff, capsys)
    for option in "--start", "--rate", "--limit", "--steps", "--out":
        assert option in text
    numbers = in_process(cliff, tmp_path, "--start", 4.0, -1.9, "--steps", 5, "--limit", 0.1)
    assert numbers["rows"]["clip"]["longest"] <= 0.05001
